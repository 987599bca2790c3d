//! Waking a thread that waits for the kernel.
//!
//! A thread that polls file descriptors cannot wait for a queue too, so an order that is put into its queue
//! rings as well.

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

/// After a failure of `poll`, which should not be.
const RETRY: Duration = Duration::from_secs(1);

/// For the loop, which wakes the thread.
#[derive(Debug)]
pub struct Alarm(UnixStream);

/// For the thread.
#[derive(Debug)]
pub struct Sleeper(UnixStream);

/// Both ends.
pub fn alarm() -> io::Result<(Alarm, Sleeper)> {
    let (alarm, sleeper) = UnixStream::pair()?;
    alarm.set_nonblocking(true)?;
    sleeper.set_nonblocking(true)?;
    Ok((Alarm(alarm), Sleeper(sleeper)))
}

impl Alarm {
    pub fn ring(&self) {
        // If it is full the thread is about to wake anyway.
        let _ = (&self.0).write(&[0]);
    }
}

impl Sleeper {
    /// Waits until the alarm rings, one of these is readable, or the time is over.
    pub fn wait<'a>(
        &'a self,
        others: impl IntoIterator<Item = BorrowedFd<'a>>,
        pause: Option<Duration>,
    ) {
        self.wait_for(others, [], pause);
    }

    /// The same, and until one of the second ones is writable.
    pub fn wait_for<'a>(
        &'a self,
        others: impl IntoIterator<Item = BorrowedFd<'a>>,
        writable: impl IntoIterator<Item = BorrowedFd<'a>>,
        pause: Option<Duration>,
    ) {
        let timeout = pause.map_or(PollTimeout::NONE, |pause| {
            // A whole millisecond more than none, or it would spin through the last one.
            PollTimeout::try_from(pause.as_millis() + 1).unwrap_or(PollTimeout::MAX)
        });
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![readable(self.0.as_fd())];
        fds.extend(others.into_iter().map(readable));
        fds.extend(writable.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLOUT)));
        if let Err(error) = poll(&mut fds, timeout)
            && error != Errno::EINTR
        {
            tracing::error!(%error, "poll");
            thread::sleep(RETRY);
        }
        let mut bytes = [0; 64];
        while (&self.0).read(&mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }
}
