//! A pool of threads that perform one worker's jobs, as many as the jobs need.
//!
//! Contract: each job that is handed over is performed once, by any thread, in any order; or not at
//! all when the pool is dropped first, which waits for those that are being performed. Handing over
//! waits for no job. A thread is started when a job waits and none is idle, up to a limit; one that
//! has been idle for long ends, but for the first, without which the next job might find that no
//! thread can be started.
//!
//! Who hands over wakes one thread at most. A thread that takes a job and leaves others wakes the
//! next: a burst of quick jobs is over before many were woken, a burst of slow ones has them all
//! soon. The thread that became idle last is woken first: its caches are warm, and the others come
//! to their end when there is little to do.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Thread, current, park_timeout};
use std::time::{Duration, Instant};

/// Plenty for a system call and what leads to it; a signal handler has a stack of its own.
const STACK_BYTES: usize = 128 << 10;

/// How many threads there may be, and for how long in vain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The most threads.
    pub(super) thread_count: usize,
    /// A thread ends that has had nothing to do for so long.
    pub(super) idle: Duration,
}

/// See the module's head.
pub(super) struct Pool<J: Send + 'static>(Arc<Shared<J>>);

struct Shared<J> {
    state: Mutex<State<J>>,
    /// Told when the last thread has ended.
    ended: Condvar,
    limits: Limits,
    perform: Box<dyn Fn(J) + Send + Sync>,
}

struct State<J> {
    jobs: VecDeque<J>,
    /// The threads that wait for a job; the last has waited for the shortest time.
    idle: Vec<Thread>,
    /// All threads, also one that is just being started.
    thread_count: usize,
    closing: bool,
}

/// Who is to look at the jobs as well.
enum Help {
    Nobody,
    Idle(Thread),
    /// A thread that is yet to be started, and counted already.
    New,
}

impl<J: Send + 'static> Pool<J> {
    /// A pool with one thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(
        limits: Limits,
        perform: impl Fn(J) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let state =
            State { jobs: VecDeque::new(), idle: Vec::new(), thread_count: 0, closing: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            ended: Condvar::new(),
            limits,
            perform: Box::new(perform),
        });
        shared.lock().thread_count = 1;
        start_thread(&shared, true)?;
        Ok(Self(shared))
    }

    /// Has the jobs performed, and leaves `jobs` empty.
    pub(super) fn hand_over(&self, jobs: &mut Vec<J>) {
        let help = {
            let mut state = self.0.lock();
            state.jobs.extend(jobs.drain(..));
            state.help(self.0.limits)
        };
        call(&self.0, help);
    }
}

impl<J: Send + 'static> Drop for Pool<J> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closing = true;
        state.jobs.clear();
        state.idle.drain(..).for_each(|thread| thread.unpark());
        while state.thread_count > 0 {
            state = self.0.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<J> State<J> {
    /// Finds somebody for the jobs that wait.
    fn help(&mut self, limits: Limits) -> Help {
        if self.jobs.is_empty() {
            return Help::Nobody;
        }
        match self.idle.pop() {
            Some(thread) => Help::Idle(thread),
            None if self.thread_count < limits.thread_count => {
                self.thread_count += 1;
                Help::New
            }
            None => Help::Nobody,
        }
    }
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        // A panic elsewhere leaves the queue and the counts as whole as they were.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_thread(&self) {
        let mut state = self.lock();
        state.thread_count -= 1;
        if state.thread_count == 0 {
            self.ended.notify_all();
        }
    }

    /// Waits for a call; false when the time has come to end.
    fn rest(&self, mut state: MutexGuard<'_, State<J>>, lasting: bool) -> bool {
        state.idle.push(current());
        drop(state);
        let began = Instant::now();
        park_timeout(self.limits.idle);
        let mut state = self.lock();
        // Who was called is no longer among the idle.
        let own = current().id();
        match state.idle.iter().position(|thread| thread.id() == own) {
            Some(place) => {
                state.idle.remove(place);
                lasting || began.elapsed() < self.limits.idle
            }
            None => true,
        }
    }
}

/// Calls for help, without the lock: neither is cheap.
fn call<J: Send + 'static>(shared: &Arc<Shared<J>>, help: Help) {
    match help {
        Help::Nobody => {}
        Help::Idle(thread) => thread.unpark(),
        // Where no further thread can be had, those that are there have more to do.
        Help::New => {
            if start_thread(shared, false).is_err() {
                shared.forget_thread();
            }
        }
    }
}

/// Starts a thread that has been counted already; a `lasting` one does not end for idleness.
fn start_thread<J: Send + 'static>(shared: &Arc<Shared<J>>, lasting: bool) -> io::Result<()> {
    let thread = Builder::new().name("aio".to_owned()).stack_size(STACK_BYTES);
    let shared = Arc::clone(shared);
    thread.spawn(move || work(&shared, lasting)).map(drop)
}

/// The life of a thread.
fn work<J: Send + 'static>(shared: &Arc<Shared<J>>, lasting: bool) {
    loop {
        let mut state = shared.lock();
        if state.closing {
            break;
        }
        match state.jobs.pop_front() {
            Some(job) => {
                let help = state.help(shared.limits);
                drop(state);
                call(shared, help);
                (shared.perform)(job);
            }
            None if shared.rest(state, lasting) => {}
            None => break,
        }
    }
    shared.forget_thread();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use super::{Limits, Pool};

    /// After that long a test that waits has failed.
    const PATIENCE: Duration = Duration::from_secs(20);
    const LONG: Duration = Duration::from_secs(3600);

    fn limits(thread_count: usize, idle: Duration) -> Limits {
        Limits { thread_count, idle }
    }

    fn counts(pool: &Pool<u32>) -> (usize, usize) {
        let state = pool.0.lock();
        (state.thread_count, state.idle.len())
    }

    fn wait_until(what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::yield_now();
        }
    }

    /// Lets jobs end; all of them when it is dropped, so that a failed test ends.
    struct Gate(Sender<()>);

    impl Gate {
        fn let_go(&self, count: usize) {
            (0..count).for_each(|_| self.0.send(()).unwrap());
        }
    }

    /// A pool whose jobs say that they have begun and then wait to be let go.
    fn held(limits: Limits) -> (Pool<u32>, Receiver<u32>, Gate) {
        let (begun, beginnings): (Sender<u32>, _) = channel();
        let (gate, let_go) = channel();
        let let_go = Mutex::new(let_go);
        let pool = Pool::start(limits, move |job| {
            let _ = begun.send(job);
            let _ = let_go.lock().unwrap().recv();
        });
        (pool.unwrap(), beginnings, Gate(gate))
    }

    #[test]
    fn every_job_is_performed_once() {
        let (done, results) = channel();
        let perform = move |job| {
            let _ = done.send(job);
        };
        let pool = Pool::start(limits(4, LONG), perform).unwrap();
        let mut expected: Vec<u32> = Vec::new();
        for burst in 0..200 {
            let mut jobs: Vec<u32> = (0..burst % 7).map(|at| burst * 10 + at).collect();
            expected.extend(&jobs);
            pool.hand_over(&mut jobs);
            assert!(jobs.is_empty());
        }
        let mut seen: Vec<u32> =
            expected.iter().map(|_| results.recv_timeout(PATIENCE).unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, expected);
    }

    #[test]
    fn slow_jobs_run_side_by_side_up_to_the_limit() {
        let (pool, beginnings, gate) = held(limits(3, LONG));
        assert_eq!(counts(&pool).0, 1);
        pool.hand_over(&mut (0..6).collect());
        for _ in 0..3 {
            beginnings.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!((counts(&pool).0, beginnings.try_recv().ok()), (3, None));
        gate.let_go(3);
        for _ in 0..3 {
            beginnings.recv_timeout(PATIENCE).unwrap();
        }
    }

    #[test]
    fn idle_threads_end_but_for_one() {
        let (pool, beginnings, gate) = held(limits(3, Duration::from_millis(1)));
        for _ in 0..2 {
            pool.hand_over(&mut (0..3).collect());
            for _ in 0..3 {
                beginnings.recv_timeout(PATIENCE).unwrap();
            }
            gate.let_go(3);
            wait_until("one thread is left", || counts(&pool).0 == 1);
        }
    }

    #[test]
    fn single_job_wakes_no_more_than_one_thread() {
        let (pool, beginnings, gate) = held(limits(2, LONG));
        pool.hand_over(&mut vec![0, 1]);
        beginnings.recv_timeout(PATIENCE).unwrap();
        beginnings.recv_timeout(PATIENCE).unwrap();
        gate.let_go(2);
        wait_until("both are idle", || counts(&pool) == (2, 2));
        pool.hand_over(&mut vec![2]);
        beginnings.recv_timeout(PATIENCE).unwrap();
        assert_eq!(counts(&pool), (2, 1));
    }

    #[test]
    fn end_of_the_pool_waits_for_the_job_in_progress_and_drops_the_others() {
        let (pool, beginnings, gate) = held(limits(1, LONG));
        pool.hand_over(&mut vec![0, 1]);
        assert_eq!(beginnings.recv_timeout(PATIENCE), Ok(0));
        let closing = Arc::clone(&pool.0);
        let end = std::thread::spawn(move || drop(pool));
        wait_until("the pool is closing", || closing.lock().closing);
        assert!(!end.is_finished());
        gate.let_go(1);
        end.join().unwrap();
        drop(closing);
        assert!(beginnings.recv_timeout(PATIENCE).is_err(), "the second job was performed");
    }
}
