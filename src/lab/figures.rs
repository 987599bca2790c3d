//! Statistics of measurements. Benchmarks report medians, because single measurements are noisy.

/// Returns the median; NaN without values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Formats "median (minimum-maximum)" with `digits` digits after the point.
pub fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    let middle = median(values.to_vec());
    format!("{middle:.digits$} ({least:.digits$}-{most:.digits$})")
}
