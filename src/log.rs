//! The agent's log. A thread of its own writes it to standard error or to systemd's journal, so a reader
//! that does not read delays neither the agent nor its end.
//!
//! Lines wait in a bounded queue. When it is full, further lines are dropped and counted. [`flush`] waits a
//! bounded time for the queue before the process ends.

mod journal;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::VecDeque,
    fmt::Display,
    io::{self, IsTerminal as _},
    panic::{self, PanicHookInfo},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::write,
};
use tracing_subscriber::{
    filter::Targets, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use self::journal::Journal;
use crate::{
    config::LogFormat,
    model::{Problem, ProblemCode},
};

/// Maximum size of the waiting lines, in bytes.
const QUEUE_SIZE: usize = 1 << 20;
/// A reader that has not read for this time is reported.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a loss is reported after the last lost line.
const LOSS_REPORT: Duration = Duration::from_secs(600);

static QUEUE: Queue = Queue::new(QUEUE_SIZE);

/// Starts the thread that writes the log, and sends panic messages through it.
///
/// # Errors
/// Fails if the system cannot create a thread.
pub fn start() -> io::Result<()> {
    thread::Builder::new().name("log".to_owned()).spawn(|| QUEUE.write_lines(Sink::write))?;
    panic::set_hook(Box::new(|panic| print(panic_message(panic))));
    Ok(())
}

/// Installs the log subscriber and returns a function that replaces its filter later.
///
/// # Errors
/// Fails if systemd's journal is not reachable.
pub fn subscribe(
    filter: Targets,
    format: LogFormat,
) -> Result<impl Fn(Targets) -> Result<(), String>, String> {
    let (filter, handle) = reload::Layer::new(filter);
    let log = fmt::layer().with_writer(|| StderrLine).with_ansi(io::stderr().is_terminal());
    // The layer would report its own errors on standard error.
    let log = log.log_internal_errors(false);
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => registry.with(log.with_target(false)).init(),
        LogFormat::Json => registry.with(log.json()).init(),
        LogFormat::Journal => {
            let journal = Journal::new().map_err(|error| {
                format!("log_format: cannot reach systemd's journal: {error}; use \"text\"")
            })?;
            registry.with(journal).init();
        }
    }
    Ok(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
}

/// Writes a line to standard error.
pub fn print(line: impl Display) {
    QUEUE.push(Sink::Stderr, format!("{line}\n").into_bytes());
}

/// Waits until all lines are written, or until the time is over.
pub fn flush(timeout: Duration) {
    QUEUE.flush(timeout);
}

/// Returns the number of lost lines.
pub fn lost() -> u64 {
    QUEUE.lock().lost
}

/// Describes a reader that does not read, or recent losses, with a remedy.
pub fn notice(now: Instant) -> Option<Problem> {
    QUEUE.notice(now)
}

fn panic_message(panic: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    format!("thread '{}' {panic}{backtrace}", thread.name().unwrap_or("<unnamed>"))
}

/// Where a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sink {
    Stderr,
    /// Systemd's journal.
    Journal,
}

impl Sink {
    const fn name(self) -> &'static str {
        match self {
            Self::Stderr => "standard error",
            Self::Journal => "systemd's journal",
        }
    }

    const fn remedy(self) -> &'static str {
        match self {
            Self::Stderr => {
                "check the program or the disk at the other end of this agent's standard error"
            }
            Self::Journal => "check systemd-journald",
        }
    }

    /// Writes a line. Waits as long as the reader does not read.
    fn write(self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => write_to_stderr(line),
            Self::Journal => journal::send(line),
        }
    }
}

/// Writes without the lock of [`io::stderr`], for which other threads might wait.
fn write_to_stderr(mut line: &[u8]) -> io::Result<()> {
    let stderr = io::stderr();
    while !line.is_empty() {
        match write(&stderr, line) {
            Ok(written) => line = &line[written..],
            Err(Errno::EINTR) => {}
            // Another process has made the pipe non-blocking.
            Err(Errno::EAGAIN) => {
                use std::os::fd::AsFd as _;
                let mut polled = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut polled, PollTimeout::NONE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Queues lines for standard error. The subscriber writes each line at once.
struct StderrLine;

impl io::Write for StderrLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(Sink::Stderr, line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines on their way to the thread that writes them.
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    /// Maximum size of the waiting lines, in bytes.
    limit: usize,
}

struct State {
    lines: VecDeque<(Sink, Vec<u8>)>,
    /// Size of the waiting lines, in bytes.
    size: usize,
    /// The line that is being written, and since when.
    writing: Option<(Sink, Instant)>,
    lost: u64,
    /// Lost lines that the log itself has reported.
    reported: u64,
    last_loss: Option<Loss>,
}

/// The last loss of a line.
struct Loss {
    sink: Sink,
    at: Instant,
    /// The error of the write; `None` if the queue was full.
    error: Option<String>,
}

impl Queue {
    const fn new(limit: usize) -> Self {
        let state = State {
            lines: VecDeque::new(),
            size: 0,
            writing: None,
            lost: 0,
            reported: 0,
            last_loss: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line, or drops and counts it.
    fn push(&self, sink: Sink, line: Vec<u8>) {
        let mut state = self.lock();
        if state.size + line.len() > self.limit {
            state.lose(sink, None);
            return;
        }
        state.size += line.len();
        state.lines.push_back((sink, line));
        drop(state);
        self.changed.notify_all();
    }

    /// Writes queued lines, forever.
    fn write_lines(&self, mut write: impl FnMut(Sink, &[u8]) -> io::Result<()>) {
        loop {
            let idle = |state: &mut State| state.lines.is_empty();
            let waited = self.changed.wait_while(self.lock(), idle);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            let Some((sink, line)) = state.lines.pop_front() else { continue };
            state.size -= line.len();
            state.writing = Some((sink, Instant::now()));
            drop(state);
            let written = write(sink, &line);
            let mut state = self.lock();
            state.writing = None;
            let all = state.lost;
            let lost = match written {
                Ok(()) => all - std::mem::replace(&mut state.reported, all),
                Err(error) => {
                    state.lose(sink, Some(error.to_string()));
                    0
                }
            };
            drop(state);
            if lost > 0 {
                tracing::warn!(lines = lost, "log lines were lost");
            }
            self.changed.notify_all();
        }
    }

    fn flush(&self, timeout: Duration) {
        let is_busy = |state: &mut State| !state.lines.is_empty() || state.writing.is_some();
        let _ = self.changed.wait_timeout_while(self.lock(), timeout, is_busy);
    }

    fn notice(&self, now: Instant) -> Option<Problem> {
        let state = self.lock();
        let lost = state.lost;
        let notice = |sink: Sink, what| {
            Problem::new(ProblemCode::LogLost, "log", what, sink.remedy()).notice()
        };
        let hanging = state.writing.filter(|(_, since)| *since + READ_TIMEOUT <= now);
        if let Some((sink, _)) = hanging {
            let name = sink.name();
            let what = format!(
                "the log's reader does not read ({name}), so lines wait, and {lost} lines were dropped"
            );
            return Some(notice(sink, what));
        }
        let loss = state.last_loss.as_ref().filter(|loss| loss.at + LOSS_REPORT > now)?;
        let name = loss.sink.name();
        let why = loss.error.as_deref().unwrap_or("its reader did not read");
        Some(notice(loss.sink, format!("{lost} log lines were lost ({name}: {why})")))
    }
}

impl State {
    fn lose(&mut self, sink: Sink, error: Option<String>) {
        self.lost += 1;
        self.last_loss = Some(Loss { sink, at: Instant::now(), error });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    /// Starts a thread that writes what arrives, each line after a permission.
    fn start(queue: &Arc<Queue>) -> (mpsc::Sender<io::Result<()>>, mpsc::Receiver<Vec<u8>>) {
        let (permit, permitted) = mpsc::channel();
        let (sender, written) = mpsc::channel();
        let queue = queue.clone();
        thread::spawn(move || {
            queue.write_lines(|_, line| {
                let _ = sender.send(line.to_vec());
                permitted.recv().unwrap_or(Ok(()))
            });
        });
        (permit, written)
    }

    #[test]
    fn lines_beyond_the_limit_are_dropped_counted_and_reported_until_long_after() {
        let queue = Arc::new(Queue::new(8));
        let (permit, written) = start(&queue);
        queue.push(Sink::Stderr, b"one".to_vec());
        assert_eq!(written.recv_timeout(LONG), Ok(b"one".to_vec()));
        // The first line is being written.
        ["four", "five", "six"]
            .iter()
            .for_each(|line| queue.push(Sink::Stderr, line.as_bytes().to_vec()));
        assert_eq!(queue.lock().lost, 1);
        queue.flush(Duration::ZERO);
        let now = Instant::now();
        let text = queue.notice(now + READ_TIMEOUT).expect("a notice");
        assert!(
            text.contains("does not read (standard error), so lines wait, and 1 lines"),
            "{text}"
        );
        (0..3).for_each(|_| permit.send(Ok(())).expect("the thread runs"));
        queue.flush(LONG);
        assert_eq!(written.try_iter().collect::<Vec<_>>(), [b"four", b"five"]);
        let text = queue.notice(now).expect("a notice");
        assert!(text.contains("1 log lines were lost"), "{text}");
        assert_eq!(queue.notice(Instant::now() + LOSS_REPORT), None);
    }

    #[test]
    fn failed_write_is_reported_with_its_error() {
        let queue = Arc::new(Queue::new(8));
        let (permit, _written) = start(&queue);
        permit.send(Err(io::ErrorKind::StorageFull.into())).expect("the thread runs");
        queue.push(Sink::Stderr, b"one".to_vec());
        queue.flush(LONG);
        let text = queue.notice(Instant::now()).expect("a notice");
        assert!(text.contains("1 log lines were lost (standard error: no storage space"), "{text}");
    }
}
