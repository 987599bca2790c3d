//! Threads that work for the agent's loop: orders go in by a queue, and at the end each thread is waited for,
//! but not for ever.
//!
//! A disk, a kernel or a runtime may keep a thread for as long as it likes. The agent ends without it then.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::TryRecvError},
    thread,
    time::Instant,
};

use tokio::sync::oneshot;

pub use self::alarm::Sleeper;
use self::alarm::{Alarm, alarm};

mod alarm;

/// A thread that can be waited for until a deadline.
pub struct Thread {
    name: &'static str,
    /// Its other end is dropped when the thread ends.
    running: oneshot::Receiver<()>,
    handle: thread::JoinHandle<()>,
}

impl Thread {
    /// # Errors
    /// The system gives no thread.
    pub fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (end, running) = oneshot::channel();
        let handle = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _end: oneshot::Sender<()> = end;
            work();
        })?;
        Ok(Self { name, running, handle })
    }

    /// Whether it runs no more: at its end, or after a panic.
    pub fn has_ended(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits until it has ended, but not longer than until `deadline`. Takes no other thread: the system may
    /// give none.
    ///
    /// # Errors
    /// Its name, if it has not ended by then. It goes on by itself.
    pub async fn join(self, deadline: Instant) -> Result<(), &'static str> {
        // Nothing is ever sent.
        let ended = tokio::time::timeout_at(deadline.into(), self.running).await;
        let _ = ended.map_err(|_| self.name)?;
        if self.handle.join().is_err() {
            tracing::error!(thread = self.name, "thread panicked");
        }
        Ok(())
    }
}

/// Finds the addresses of a name, `HOST:PORT`, in a thread of its own: a look-up may take long, and a task of
/// the runtime that blocks panics where the system gives no thread.
///
/// # Errors
/// The name has no address, or the system gives no thread.
pub async fn resolve(name: String) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    let (reply, answer) = oneshot::channel();
    let look_up = move || _ = reply.send(name.to_socket_addrs().map(Iterator::collect));
    // Not joined: the caller may give up before the answer comes.
    let _thread = Thread::start("names", look_up)?;
    answer.await.map_err(io::Error::other)?
}

/// What a worker is asked for.
pub trait Order: Send + 'static {
    /// An earlier order that still waits need not be carried out any more.
    fn supersedes(&self, earlier: &Self) -> bool;
}

/// A thread with a queue of orders.
pub struct Worker<O> {
    queue: Writing<O>,
    thread: Thread,
}

impl<O: Order> Worker<O> {
    /// # Errors
    /// The system gives no thread, or no socket to wake it by.
    pub fn start(
        name: &'static str,
        work: impl FnOnce(Orders<O>) + Send + 'static,
    ) -> io::Result<Self> {
        let (alarm, sleeper) = alarm()?;
        let queue = Arc::new(Mutex::new(Queue { orders: VecDeque::new(), is_closed: false }));
        let orders = Orders { queue: queue.clone(), sleeper };
        let thread = Thread::start(name, move || work(orders))?;
        Ok(Self { queue: Writing { queue, alarm }, thread })
    }

    pub fn order(&self, order: O) {
        let mut queue = lock(&self.queue.queue);
        queue.orders.retain(|earlier| !order.supersedes(earlier));
        queue.orders.push_back(order);
        drop(queue);
        self.queue.alarm.ring();
    }

    /// Whether its thread has ended, though nothing told it to.
    pub fn has_ended(&self) -> bool {
        self.thread.has_ended()
    }

    /// Tells the thread to end once it has carried out what waits.
    pub fn end(self) -> Thread {
        self.thread
    }
}

/// The thread's end of the queue.
pub struct Orders<O> {
    queue: Arc<Mutex<Queue<O>>>,
    pub sleeper: Sleeper,
}

impl<O> Orders<O> {
    /// The next order.
    ///
    /// # Errors
    /// There is none now, or none will come any more: the thread is to end.
    pub fn take(&self) -> Result<O, TryRecvError> {
        let mut queue = lock(&self.queue);
        let is_over =
            if queue.is_closed { TryRecvError::Disconnected } else { TryRecvError::Empty };
        queue.orders.pop_front().ok_or(is_over)
    }
}

struct Queue<O> {
    orders: VecDeque<O>,
    is_closed: bool,
}

/// The loop's end of the queue, which is closed with it.
struct Writing<O> {
    queue: Arc<Mutex<Queue<O>>>,
    alarm: Alarm,
}

impl<O> Drop for Writing<O> {
    fn drop(&mut self) {
        lock(&self.queue).is_closed = true;
        self.alarm.ring();
    }
}

/// A panic with the lock held leaves a queue that is as good as before.
fn lock<O>(queue: &Mutex<Queue<O>>) -> MutexGuard<'_, Queue<O>> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Task {
        View(u32),
        Job(u32),
    }

    impl Order for Task {
        fn supersedes(&self, earlier: &Self) -> bool {
            matches!((self, earlier), (Self::View(_), Self::View(_)))
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[tokio::test]
    async fn worker_that_is_ended_carries_out_what_waits_without_what_is_superseded() {
        let (begin, begun) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let worker = Worker::start("test", move |orders: Orders<Task>| {
            let _ = begun.recv();
            loop {
                match orders.take() {
                    Ok(task) => report.send(task).expect("the test listens"),
                    Err(TryRecvError::Empty) => orders.sleeper.wait([], None),
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        });
        let worker = worker.expect("a thread");
        for task in [Task::View(1), Task::Job(1), Task::Job(2), Task::View(2)] {
            worker.order(task);
        }
        begin.send(()).expect("the thread waits");
        assert_eq!(worker.end().join(soon()).await, Ok(()));
        let tasks: Vec<Task> = reported.iter().collect();
        assert_eq!(tasks, [Task::Job(1), Task::Job(2), Task::View(2)]);
    }

    #[tokio::test]
    async fn worker_that_sleeps_is_woken_by_an_order_and_by_the_end() {
        let (report, reported) = mpsc::channel();
        let worker = Worker::start("test", move |orders: Orders<Task>| {
            loop {
                match orders.take() {
                    Ok(task) => report.send(task).expect("the test listens"),
                    Err(TryRecvError::Empty) => orders.sleeper.wait([], None),
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        });
        let worker = worker.expect("a thread");
        worker.order(Task::Job(7));
        assert_eq!(reported.recv(), Ok(Task::Job(7)));
        assert_eq!(worker.end().join(soon()).await, Ok(()));
    }

    #[tokio::test]
    async fn thread_that_hangs_is_named_and_not_waited_for() {
        let (end, ended) = mpsc::channel::<()>();
        let thread = Thread::start("stuck", move || _ = ended.recv()).expect("a thread");
        assert_eq!(thread.join(Instant::now()).await, Err("stuck"));
        drop(end);
    }

    #[tokio::test]
    async fn thread_that_panics_has_ended() {
        let (end, ended) = mpsc::channel::<()>();
        let work = move |_: Orders<Task>| {
            let _ = ended.recv();
            panic!("on purpose");
        };
        let worker = Worker::start("test", work).expect("a thread");
        assert!(!worker.has_ended());
        drop(end);
        let until = soon();
        while !worker.has_ended() {
            assert!(Instant::now() < until, "its end is not seen");
            thread::yield_now();
        }
        assert_eq!(worker.end().join(soon()).await, Ok(()));
    }
}
