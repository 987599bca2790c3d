//! Wakes a thread that polls file descriptors.
//!
//! A thread in poll(2) cannot also wait for a queue. The sender of an order therefore writes to a socket that
//! the thread polls.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// Pause after a failure of poll(2), which is not expected.
const RETRY: Duration = Duration::from_secs(1);

/// The waking end, for the agent's loop.
#[derive(Debug)]
pub struct Alarm(UnixStream);

/// The waiting end, for the thread.
#[derive(Debug)]
pub struct Sleeper(UnixStream);

/// Creates both ends.
///
/// # Errors
/// If the system cannot create a socket pair.
pub fn alarm() -> io::Result<(Alarm, Sleeper)> {
    let (alarm, sleeper) = UnixStream::pair()?;
    alarm.set_nonblocking(true)?;
    sleeper.set_nonblocking(true)?;
    Ok((Alarm(alarm), Sleeper(sleeper)))
}

impl Alarm {
    /// Wakes the thread, or makes its next wait return at once.
    pub fn ring(&self) {
        // A full socket means that earlier rings are still unread, so the thread wakes anyway.
        let _ = (&self.0).write(&[0]);
    }
}

impl Sleeper {
    /// Waits until the alarm rings, one of `others` is readable, or `pause` is over (`None` for no limit).
    pub fn wait<'a>(
        &'a self,
        others: impl IntoIterator<Item = BorrowedFd<'a>>,
        pause: Option<Duration>,
    ) {
        self.wait_for(others, [], pause);
    }

    /// Waits like [`Sleeper::wait`], and also until one of `writable` is writable.
    pub fn wait_for<'a>(
        &'a self,
        others: impl IntoIterator<Item = BorrowedFd<'a>>,
        writable: impl IntoIterator<Item = BorrowedFd<'a>>,
        pause: Option<Duration>,
    ) {
        let timeout = pause.map_or(PollTimeout::NONE, |pause| {
            // Rounds up: a remainder below 1 ms would become 0 and make the thread spin.
            PollTimeout::try_from(pause.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(self.0.as_fd())];
        fds.extend(others.into_iter().map(readable));
        fds.extend(writable.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLOUT)));
        if let Err(error) = poll(&mut fds, timeout)
            && error != Errno::EINTR
        {
            tracing::error!(%error, "poll failed");
            thread::sleep(RETRY);
        }
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }
}
