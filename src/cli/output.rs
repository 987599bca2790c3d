//! What commands print: formats, colours, tables.
//!
//! Colours are for terminals: elsewhere, or with `NO_COLOR`, they are taken out again while printing.

use std::{fmt::Display, future::Future, io::Write as _, process::ExitCode};

use anstream::adapter::strip_str;
use clap::ValueEnum;
use serde_json::Value;

use super::{Client, block_on, fail};
use crate::{
    api::ClientError,
    model::{escaped_lines, visible_lines},
};

/// The longest name that a table shows whole.
const NAME: usize = 24;
/// Sentences are broken into lines of so many columns.
const WIDTH: usize = 98;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people, within 100 columns
    #[default]
    Text,
    /// The same, with all there is
    Wide,
    Json,
    Yaml,
}

impl Format {
    /// Prints an answer, as it came or by `text`, which is told whether there is room for all.
    pub fn print(self, answer: &Value, text: impl FnOnce(&Value, bool) -> String) {
        put(&match self {
            Self::Text => text(&visible_value(answer), false),
            Self::Wide => text(&visible_value(answer), true),
            Self::Json => escaped_lines(&format!("{answer:#}\n")),
            Self::Yaml => serde_yaml_ng::to_string(&visible_value(answer)).unwrap_or_default(),
        });
    }

    pub const fn is_text(self) -> bool {
        matches!(self, Self::Text | Self::Wide)
    }
}

/// The same without what a terminal would obey: names of interfaces and of pods are other programs' words.
fn visible_value(value: &Value) -> Value {
    match value {
        Value::String(text) => visible_lines(text).into(),
        Value::Array(values) => values.iter().map(visible_value).collect(),
        Value::Object(object) => {
            object.iter().map(|(key, value)| (visible_lines(key), visible_value(value))).collect()
        }
        other => other.clone(),
    }
}

/// To standard output. Says whether that is read to here: a reader of the beginning has what it wanted.
pub fn put(text: &str) -> bool {
    anstream::stdout().write_all(text.as_bytes()).is_ok()
}

/// Asks the agent and prints the answer.
pub fn ask_and_print(
    client: &Client,
    ask: impl Future<Output = Result<Value, ClientError>>,
    text: impl FnOnce(&Value, bool) -> String,
) -> Result<Value, ExitCode> {
    let answer = block_on(ask).map_err(fail)?.map_err(fail)?;
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

/// By "Select Graphic Rendition", ECMA-48, 8.3.117.
fn painted(code: u8, text: &dyn Display) -> String {
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// Lays out rows of cells under a header, two spaces apart. Every row has as many cells as the header.
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

/// A sentence in lines, all but the first indented.
pub fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut column = indent;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if column > indent && column + 1 + len > WIDTH {
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

/// A name, cut where a table has no room for all of it.
pub fn name(value: &Value, wide: bool) -> String {
    let name = text(value);
    if wide || name.chars().count() <= NAME {
        return name;
    }
    let kept: String = name.chars().take(NAME - 1).collect();
    format!("{kept}…")
}

/// A value without quotes; "-" for none.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// All of them, or the first and how many more there are.
pub fn list(values: &Value, wide: bool) -> String {
    let texts: Vec<String> = values.as_array().into_iter().flatten().map(text).collect();
    match &texts[..] {
        [] => "-".to_owned(),
        [first, more @ ..] if !wide && !more.is_empty() => format!("{first} +{}", more.len()),
        all => all.join(","),
    }
}

/// The elements of an array; none, if it is no array.
pub fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_colours() {
        let rows =
            [["a".to_owned(), bad("10.42.7.0/24")], ["long-name".to_owned(), "-".to_owned()]];
        let text = table(["NAME", "SUBNET"], &rows);
        assert_eq!(
            strip_str(&text).to_string(),
            "NAME       SUBNET\na          10.42.7.0/24\nlong-name  -\n"
        );
    }

    #[test]
    fn sentences_are_broken_between_words() {
        let text = wrapped(&"word ".repeat(40), 4);
        assert!(text.lines().count() > 1);
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert!(text.lines().skip(1).all(|line| line.starts_with("    word")), "{text}");
    }
}
