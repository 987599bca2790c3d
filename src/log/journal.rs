//! Log entries in the native protocol of systemd's journal.

use std::{
    ffi::OsString,
    fmt::{Debug, Write as _},
    io,
    os::unix::net::UnixDatagram,
    path::Path,
    sync::OnceLock,
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

use super::{QUEUE, Sink};

const SOCKET: &str = "/run/systemd/journal/socket";

/// The socket that sends entries.
static SENDER: OnceLock<UnixDatagram> = OnceLock::new();

/// Sends an entry.
///
/// # Errors
/// Fails if the journal does not run or refuses the entry.
pub(super) fn send(entry: &[u8]) -> io::Result<()> {
    let sender = SENDER.get().ok_or(io::ErrorKind::NotConnected)?;
    sender.send_to(entry, SOCKET).map(drop)
}

/// Queues each event as an entry.
pub(super) struct Journal {
    /// Name of this program in the journal.
    identifier: String,
}

impl Journal {
    /// Opens the socket and checks that the journal has one.
    pub(super) fn new() -> io::Result<Self> {
        let sender = UnixDatagram::unbound()?;
        // This has the errors of a send, but does not wait for the journal to read.
        sender.connect(SOCKET)?;
        let _ = SENDER.set(UnixDatagram::unbound()?);
        let program = std::env::args_os().next().unwrap_or_else(|| OsString::from("gossamer"));
        let name = Path::new(&program).file_name().unwrap_or(&program);
        Ok(Self { identifier: name.to_string_lossy().into_owned() })
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let priority = match *metadata.level() {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            Level::DEBUG | Level::TRACE => "7",
        };
        let mut entry = Entry(Vec::with_capacity(256));
        entry.add("PRIORITY", priority);
        entry.add("TARGET", metadata.target());
        if let Some(file) = metadata.file() {
            entry.add("CODE_FILE", file);
        }
        if let Some(line) = metadata.line() {
            entry.add("CODE_LINE", &line.to_string());
        }
        entry.add("SYSLOG_IDENTIFIER", &self.identifier);
        event.record(&mut entry);
        QUEUE.push(Sink::Journal, entry.0);
    }
}

/// An entry under construction.
struct Entry(Vec<u8>);

impl Entry {
    /// Adds a field: its name, the length of the value in eight bytes, and the value.
    fn add(&mut self, name: &str, value: &str) {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'\n');
        self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(b'\n');
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.add("MESSAGE", value),
            // The journal rejects other characters.
            name => self.add(&format!("F_{}", name.to_ascii_uppercase().replace('.', "_")), value),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = write!(text, "{value:?}");
        self.record_str(field, &text);
    }
}
