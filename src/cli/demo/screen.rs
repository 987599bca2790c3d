//! Output of the demo: steps with their results and times.

use std::{
    fmt::Display,
    io::{IsTerminal as _, Write as _, stdout},
    time::{Duration, Instant},
};

/// Prints and counts steps.
pub struct Screen {
    start: Instant,
    steps: u32,
    bold: bool,
}

impl Screen {
    pub fn new() -> Self {
        Self { start: Instant::now(), steps: 0, bold: stdout().is_terminal() }
    }

    /// Prints the name of a step, executes it, and prints its result and duration.
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

    /// Prints further lines below a step.
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

/// Formats a duration in ms or s.
pub fn span(span: Duration) -> String {
    match span.as_millis() {
        0..10 => format!("{:.2} ms", span.as_secs_f64() * 1e3),
        10..1000 => format!("{} ms", span.as_millis()),
        _ => format!("{:.1} s", span.as_secs_f64()),
    }
}

fn flush() {
    // A failure means that the reader closed the pipe. The steps continue; the exit code reports the
    // result.
    let _ = stdout().flush();
}
