//! Threads that work for the agent's loop. Orders reach a thread through a queue; at the end, the loop waits
//! for each thread up to a deadline.
//!
//! A disk, a kernel or a container runtime may block a thread without limit. In this case the agent ends
//! without the thread.

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

/// A thread that can be joined with a deadline.
pub struct Thread {
    name: &'static str,
    /// Closed when the thread ends; the thread holds the sender.
    running: oneshot::Receiver<()>,
    handle: thread::JoinHandle<()>,
}

impl Thread {
    /// Starts a thread. The name appears in logs and in `/proc`.
    ///
    /// # Errors
    /// If the system cannot create a thread.
    pub fn start(name: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (end, running) = oneshot::channel();
        let handle = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _end: oneshot::Sender<()> = end;
            work();
        })?;
        Ok(Self { name, running, handle })
    }

    /// Whether the thread has returned or panicked.
    pub fn has_ended(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits for the end of the thread, until `deadline`. Needs no other thread, which the system may be
    /// unable to create.
    ///
    /// # Errors
    /// The thread's name, if it has not ended by then. It continues to run, detached.
    pub async fn join(self, deadline: Instant) -> Result<(), &'static str> {
        // No value is ever sent: the channel closes.
        let ended = tokio::time::timeout_at(deadline.into(), self.running).await;
        let _ = ended.map_err(|_| self.name)?;
        if self.handle.join().is_err() {
            tracing::error!(thread = self.name, "thread panicked");
        }
        Ok(())
    }
}

/// Resolves a name, `HOST:PORT`, in a separate thread. A lookup may take long, and a blocking task of the
/// runtime would panic if the system cannot create a thread.
///
/// # Errors
/// If the name has no address, or the system cannot create a thread.
pub async fn resolve(name: String) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    let (reply, answer) = oneshot::channel();
    let look_up = move || _ = reply.send(name.to_socket_addrs().map(Iterator::collect));
    // Not joined: the caller may stop waiting before the lookup ends.
    let _thread = Thread::start("names", look_up)?;
    answer.await.map_err(io::Error::other)?
}

/// An order to a worker.
pub trait Order: Send + 'static {
    /// Whether this order makes an earlier, still queued one unnecessary.
    fn supersedes(&self, earlier: &Self) -> bool;
}

/// A thread with a queue of orders. Dropping it, like [`Worker::end`], closes the queue.
pub struct Worker<O> {
    queue: QueueWriter<O>,
    thread: Thread,
}

impl<O: Order> Worker<O> {
    /// Starts the thread, which receives its end of the queue.
    ///
    /// # Errors
    /// If the system cannot create a thread, or the socket pair that wakes it.
    pub fn start(
        name: &'static str,
        work: impl FnOnce(Orders<O>) + Send + 'static,
    ) -> io::Result<Self> {
        let (alarm, sleeper) = alarm()?;
        let queue = Arc::new(Mutex::new(Queue { orders: VecDeque::new(), is_closed: false }));
        let orders = Orders { queue: queue.clone(), sleeper };
        let thread = Thread::start(name, move || work(orders))?;
        Ok(Self { queue: QueueWriter { queue, alarm }, thread })
    }

    /// Queues an order, removes those that it supersedes, and wakes the thread.
    pub fn order(&self, order: O) {
        let mut queue = lock(&self.queue.queue);
        queue.orders.retain(|earlier| !order.supersedes(earlier));
        queue.orders.push_back(order);
        drop(queue);
        self.queue.alarm.ring();
    }

    /// Whether the thread has ended, although the queue is open.
    pub fn has_ended(&self) -> bool {
        self.thread.has_ended()
    }

    /// Closes the queue. The thread ends after the orders that are already queued.
    pub fn end(self) -> Thread {
        self.thread
    }
}

/// The thread's end of the queue.
pub struct Orders<O> {
    queue: Arc<Mutex<Queue<O>>>,
    /// Blocks the thread until an order arrives.
    pub sleeper: Sleeper,
}

impl<O> Orders<O> {
    /// Takes the next order.
    ///
    /// # Errors
    /// `Empty` if no order is queued; `Disconnected` if the queue is also closed, after which the thread must
    /// end.
    pub fn take(&self) -> Result<O, TryRecvError> {
        let mut queue = lock(&self.queue);
        let error = if queue.is_closed { TryRecvError::Disconnected } else { TryRecvError::Empty };
        queue.orders.pop_front().ok_or(error)
    }
}

/// Orders shared between the loop and the thread.
struct Queue<O> {
    orders: VecDeque<O>,
    is_closed: bool,
}

/// The loop's end of the queue. Closes the queue when it is dropped.
struct QueueWriter<O> {
    queue: Arc<Mutex<Queue<O>>>,
    alarm: Alarm,
}

impl<O> Drop for QueueWriter<O> {
    fn drop(&mut self) {
        lock(&self.queue).is_closed = true;
        self.alarm.ring();
    }
}

/// Locks the queue. A panic while the lock is held leaves the queue consistent.
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
    async fn ended_worker_executes_queued_orders_except_superseded_ones() {
        let (begin, begun) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        let worker = Worker::start("test", move |orders: Orders<Task>| {
            let _ = begun.recv();
            loop {
                match orders.take() {
                    Ok(task) => report.send(task).expect("the test receives"),
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
    async fn sleeping_worker_is_woken_by_an_order_and_by_the_end() {
        let (report, reported) = mpsc::channel();
        let worker = Worker::start("test", move |orders: Orders<Task>| {
            loop {
                match orders.take() {
                    Ok(task) => report.send(task).expect("the test receives"),
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
    async fn join_of_a_hanging_thread_returns_its_name_at_the_deadline() {
        let (end, ended) = mpsc::channel::<()>();
        let thread = Thread::start("stuck", move || _ = ended.recv()).expect("a thread");
        assert_eq!(thread.join(Instant::now()).await, Err("stuck"));
        drop(end);
    }

    #[tokio::test]
    async fn panicked_thread_has_ended_and_can_be_joined() {
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
            assert!(Instant::now() < until, "the end of the thread was not noticed");
            thread::yield_now();
        }
        assert_eq!(worker.end().join(soon()).await, Ok(()));
    }
}
