//! Plain tables: columns as wide as their widest cell, two spaces apart.

/// Lays out rows of cells under a header. Every row has as many cells as the header.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded: Vec<String> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let header = line(header);
    let rows = rows.iter().map(|row| line(std::array::from_fn(|column| row[column].as_str())));
    std::iter::once(header).chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [["a".to_owned(), "10.42.7.0/24".to_owned()], ["long-name".to_owned(), "-".to_owned()]];
        assert_eq!(
            table(["NAME", "SUBNET"], &rows),
            "NAME       SUBNET\na          10.42.7.0/24\nlong-name  -\n"
        );
    }
}
