//! Output of commands: formats, colors, tables.
//!
//! Colors are for terminals only: `anstream` strips them elsewhere, and if `NO_COLOR` is set.

use std::{
    fmt::Display,
    future::Future,
    io::Write as _,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anstream::adapter::strip_str;
use clap::ValueEnum;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Client, block_on, fail};
use crate::{
    api::{ClientError, SlotCounts},
    model::{Liveness, Problem, escaped_lines, visible_lines},
};

/// Longest name, in characters, that a table shows whole.
const MAX_NAME_CHARS: usize = 24;
/// Sentences are wrapped at this column.
const LINE_COLUMNS: usize = 98;

/// Format of a command's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables and sentences within 100 columns
    #[default]
    Text,
    /// The same, with all columns and full names
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

impl Format {
    /// Prints an answer. `text` formats it for people; its second argument is true for the wide form. It
    /// gets the answer without control characters.
    pub fn print<T: Serialize + DeserializeOwned>(
        self,
        answer: &T,
        text: impl FnOnce(&T, bool) -> String,
    ) {
        match visible_answer(answer) {
            Ok(visible) => self.print_visible(answer, |wide| text(&visible, wide)),
            Err(error) => eprintln!("gossamer: {error}"),
        }
    }

    /// Prints an answer. `text` formats it for people, without control characters of other programs; its
    /// argument is true for the wide form.
    pub fn print_visible(self, answer: &impl Serialize, text: impl FnOnce(bool) -> String) {
        write_stdout(&match self {
            Self::Text => text(false),
            Self::Wide => text(true),
            Self::Json => escaped_lines(&format!("{:#}\n", json(answer))),
            Self::Yaml => {
                serde_yaml_ng::to_string(&without_control_chars(&json(answer))).unwrap_or_default()
            }
        });
    }

    pub const fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Wide)
    }
}

/// Returns an answer as JSON, with its keys in alphabetical order.
pub fn json(answer: &impl Serialize) -> Value {
    serde_json::to_value(answer).unwrap_or_default()
}

/// Returns an answer without control characters in its strings.
///
/// # Errors
/// Fails if a string that is not free text contained some.
pub fn visible_answer<T: Serialize + DeserializeOwned>(answer: &T) -> serde_json::Result<T> {
    serde_json::from_value(without_control_chars(&json(answer)))
}

/// Removes control characters from all strings: names of interfaces and pods come from other programs and
/// may hold terminal escape sequences.
pub fn without_control_chars(value: &Value) -> Value {
    match value {
        Value::String(text) => visible_lines(text).into(),
        Value::Array(values) => values.iter().map(without_control_chars).collect(),
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| (visible_lines(key), without_control_chars(value)))
            .collect(),
        other => other.clone(),
    }
}

/// Writes to standard output. Returns false if the reader has closed it.
pub fn write_stdout(text: &str) -> bool {
    anstream::stdout().write_all(text.as_bytes()).is_ok()
}

/// Queries the agent and prints the answer.
///
/// # Errors
/// Prints the error and returns the exit code if the agent cannot be queried.
pub fn query_and_print<T: Serialize + DeserializeOwned>(
    client: &Client,
    query: impl Future<Output = Result<T, ClientError>>,
    text: impl FnOnce(&T, bool) -> String,
) -> Result<T, ExitCode> {
    let answer = block_on(query).map_err(fail)?.map_err(fail)?;
    client.output.print(&answer, text);
    Ok(answer)
}

pub fn good(text: impl Display) -> String {
    painted(32, &text)
}

pub fn doubtful(text: impl Display) -> String {
    painted(33, &text)
}

pub fn bad(text: impl Display) -> String {
    painted(31, &text)
}

pub fn strong(text: impl Display) -> String {
    painted(1, &text)
}

/// Colors a text by "Select Graphic Rendition" (ECMA-48, 8.3.117).
fn painted(code: u8, text: &dyn Display) -> String {
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// Formats a problem: what is wrong, since when, and the remedy.
pub fn problem_text(problem: &Problem) -> String {
    let since = problem.since.map(|since| now().saturating_sub(since));
    let since = since.filter(|age| *age >= 60).map(|age| format!(" (for {})", duration_text(age)));
    let what = format!("{}{}", problem.what, since.unwrap_or_default());
    Problem { what, ..problem.clone() }.to_string()
}

/// Formats the first names and the number of the others.
pub fn first_names(names: &[String], most: usize) -> String {
    let shown = names.iter().take(most).cloned().collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Returns the seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// Formats a time in seconds by its largest unit.
fn duration_text(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Formats a table with two spaces between columns.
pub fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let columns = |cell: &str| strip_str(cell).map(|text| text.chars().count()).sum::<usize>();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| columns(&row[column]));
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - columns(cell))));
        format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    let header = line(header);
    let rows = rows.iter().map(|row| line(std::array::from_fn(|column| row[column].as_str())));
    std::iter::once(header).chain(rows).collect()
}

/// Wraps a sentence. Every line but the first is indented.
pub fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut column = indent;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if column > indent && column + 1 + len > LINE_COLUMNS {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            column = indent;
        } else if column > indent {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += len;
    }
    lines
}

/// Formats a name, and shortens it unless `wide`.
pub fn name(name: &str, wide: bool) -> String {
    if wide || name.chars().count() <= MAX_NAME_CHARS {
        return name.to_owned();
    }
    let kept: String = name.chars().take(MAX_NAME_CHARS - 1).collect();
    format!("{kept}…")
}

/// Formats an optional value, `None` as "-".
pub fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Formats a member's liveness; `None` is a member that gossip does not know.
pub fn liveness_text(liveness: Option<Liveness>) -> String {
    or_dash(liveness.map(Liveness::name))
}

/// Formats values: all if `wide`, otherwise the first one and the number of the others.
pub fn list(values: &[impl Display], wide: bool) -> String {
    match values {
        [] => "-".to_owned(),
        [first, more @ ..] if !wide && !more.is_empty() => format!("{first} +{}", more.len()),
        all => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
    }
}

/// Formats a time in seconds since 1970.
pub fn time(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

/// Formats the numbers of slots.
pub fn slots_text(slots: &SlotCounts) -> String {
    format!("{} leased, {} free of {}", slots.leased, slots.free, slots.total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_colored_cells_columns_are_aligned() {
        let rows =
            [["a".to_owned(), bad("10.42.7.0/24")], ["long-name".to_owned(), "-".to_owned()]];
        let text = table(["NAME", "SUBNET"], &rows);
        assert_eq!(
            strip_str(&text).to_string(),
            "NAME       SUBNET\na          10.42.7.0/24\nlong-name  -\n"
        );
    }

    #[test]
    fn wrapped_long_sentence_breaks_between_words() {
        let text = wrapped(&"word ".repeat(40), 4);
        assert!(text.lines().count() > 1);
        assert!(text.lines().all(|line| line.len() <= LINE_COLUMNS), "{text}");
        assert!(text.lines().skip(1).all(|line| line.starts_with("    word")), "{text}");
    }
}
