//! What the demo prints: steps as they begin and end, with times.

use std::{
    fmt::Display,
    io::{IsTerminal as _, Write as _, stdout},
    time::{Duration, Instant},
};

/// Prints steps and counts them.
pub struct Screen {
    start: Instant,
    steps: u32,
    bold: bool,
}

impl Screen {
    pub fn new() -> Self {
        Self { start: Instant::now(), steps: 0, bold: stdout().is_terminal() }
    }

    /// Announces a step, does it, and says how long it took and what came of it.
    pub fn step<T>(
        &mut self,
        what: &str,
        work: impl FnOnce() -> anyhow::Result<(T, String)>,
    ) -> anyhow::Result<T> {
        self.steps += 1;
        let (on, off) = if self.bold { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        print!("{on}{:>2}. {what}{off} ... ", self.steps);
        flush();
        let begun = Instant::now();
        match work() {
            Ok((value, result)) => {
                println!("{result} [{}]", span(begun.elapsed()));
                Ok(value)
            }
            Err(error) => {
                println!("FAILED");
                Err(error)
            }
        }
    }

    /// Further lines under a step.
    pub fn details(&self, text: impl Display) {
        for line in text.to_string().lines() {
            println!("      {line}");
        }
        flush();
    }

    pub fn summary(&self) {
        println!("\nAll {} steps verified in {}.", self.steps, span(self.start.elapsed()));
        flush();
    }
}

/// A span in the unit that suits it.
pub fn span(span: Duration) -> String {
    match span.as_millis() {
        0..10 => format!("{:.2} ms", span.as_secs_f64() * 1e3),
        10..1000 => format!("{} ms", span.as_millis()),
        _ => format!("{:.1} s", span.as_secs_f64()),
    }
}

fn flush() {
    // A closed pipe is the reader's wish; the steps go on and the exit code tells the result.
    let _ = stdout().flush();
}
