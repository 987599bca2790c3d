//! Texts of peers, made safe for logs and terminals.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// Greatest length of a text, in characters: longer than any message of this program.
const LONGEST: usize = 600;

/// Replaces characters that control a terminal, and truncates the text to 600 characters.
///
/// A peer chooses the reason with which it refuses a request or closes a connection, and a non-member may
/// answer at the address of a seed.
pub fn visible(text: &str) -> String {
    text.chars().take(LONGEST).map(|c| if controls_terminal(c) { '\u{fffd}' } else { c }).collect()
}

/// Replaces characters that control a terminal, except newlines and tabs.
pub fn visible_lines(text: &str) -> String {
    let is_kept = |c: char| matches!(c, '\n' | '\t') || !controls_terminal(c);
    text.chars().map(|c| if is_kept(c) { c } else { '\u{fffd}' }).collect()
}

/// Replaces characters that control a terminal, except newlines and tabs, by JSON escapes.
pub fn escaped_lines(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => escaped.push(c),
            // All of them are below U+10000, so four digits suffice.
            c if controls_terminal(c) => escaped.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Whether a character controls a terminal: control characters, line and paragraph separators, and characters
/// that change the direction of writing.
fn controls_terminal(c: char) -> bool {
    let changes_direction =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || changes_direction || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}')
}

/// Lists at most `limit` names, and the number of the others: "a, b and 3 more".
pub fn list_at_most<T: fmt::Display>(names: impl IntoIterator<Item = T>, limit: usize) -> String {
    let mut names = names.into_iter();
    let first: Vec<String> = names.by_ref().take(limit).map(|name| name.to_string()).collect();
    let listed = first.join(", ");
    match names.count() {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

/// A text in a message. It is made visible and truncated when it is decoded.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Text(String);

impl Text {
    /// Returns the text.
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
    fn control_characters_are_replaced_and_long_text_is_truncated() {
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

    #[test]
    fn list_at_most_counts_the_names_that_it_leaves_out() {
        assert_eq!(list_at_most(["a", "b"], 2), "a, b");
        assert_eq!(list_at_most(["a", "b", "c", "d"], 2), "a, b and 2 more");
        assert_eq!(list_at_most([0; 0], 2), "");
    }
}
