//! Texts from elsewhere, made fit for a terminal.

/// Longer than any sentence of this program.
const LONGEST: usize = 600;

/// Without what a terminal would obey, and not without end: reasons why a peer refuses or closes are its own
/// words, and a stranger may answer at a seed's address.
pub fn visible(text: &str) -> String {
    text.chars().take(LONGEST).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_none_of_it() {
        assert_eq!(visible("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(visible(&"x".repeat(10_000)).len(), LONGEST);
        assert_eq!(visible("müde, aber wach"), "müde, aber wach");
    }
}
