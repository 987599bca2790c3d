//! Texts of peers, made fit for a log and a terminal.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// Longer than any sentence of this program, in characters.
const LONGEST: usize = 600;

/// Replaces what a terminal would obey, and cuts what is longer than any sentence of this program.
///
/// Reasons why a peer refuses or closes are its own words, and a non-member may answer at a seed's address.
pub fn visible(text: &str) -> String {
    text.chars().take(LONGEST).map(|c| if obeyed(c) { '\u{fffd}' } else { c }).collect()
}

/// Replaces what a terminal would obey, but for the ends of lines and tabs.
pub fn visible_lines(text: &str) -> String {
    let is_kept = |c: char| matches!(c, '\n' | '\t') || !obeyed(c);
    text.chars().map(|c| if is_kept(c) { c } else { '\u{fffd}' }).collect()
}

/// Writes what a terminal would obey, but for the ends of lines and tabs, as JSON can have it.
pub fn escaped_lines(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => escaped.push(c),
            // All of them are of the first plane.
            c if obeyed(c) => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Control characters, line and paragraph separators, and what changes the direction of writing.
fn obeyed(c: char) -> bool {
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// A text in a message: visible and bounded from the moment it is decoded.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Text(String);

impl Text {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<T: AsRef<str>> From<T> for Text {
    fn from(text: T) -> Self {
        Self(visible(text.as_ref()))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_with_control_characters_is_shown_without_them() {
        assert_eq!(visible("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
        assert_eq!(visible("\u{9b}2J\u{202e}txt\u{2028}x"), "\u{fffd}2J\u{fffd}txt\u{fffd}x");
        assert_eq!(visible(&"x".repeat(10_000)).len(), LONGEST);
        assert_eq!(visible("müde, aber wach"), "müde, aber wach");
        assert_eq!(
            visible_lines("a\tb\r\n\u{1b}]0;x\u{7}\n"),
            "a\tb\u{fffd}\n\u{fffd}]0;x\u{fffd}\n"
        );
        assert_eq!(escaped_lines("\"a\u{9b}b\u{202e}\"\n"), "\"a\\u009bb\\u202e\"\n");
    }
}
