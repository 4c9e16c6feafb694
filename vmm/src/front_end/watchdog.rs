//! The limit on a daemon's silence.
//!
//! Contract: the calls of `vhost`'s front end wait without end. So one thread watches all waits of the process: a socket
//! whose [`Guard`] is not dropped in time is shut down, which ends the wait with an error, and costs that device only.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::seccomp::{Role, Sandbox, confine};

/// The watch over all sockets.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    /// By a number that tells guards apart.
    waits: BTreeMap<u64, Wait>,
    is_over: bool,
}

struct Wait {
    until: Instant,
    socket: Arc<UnixStream>,
}

/// A wait that is watched.
pub(crate) struct Guard {
    shared: Arc<Shared>,
    number: u64,
}

impl Watchdog {
    pub(crate) fn new(sandbox: Sandbox) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("watchdog".to_owned());
        let thread = Some(thread.spawn(move || {
            confine(Role::Watchdog, sandbox);
            watched.watch();
        })?);
        Ok(Self { shared, thread })
    }

    /// Shuts the socket down if the guard still is there after `limit`.
    pub(crate) fn guard(&self, socket: &Arc<UnixStream>, limit: Duration) -> Guard {
        let mut state = self.shared.state();
        let number = state.next;
        state.next = number.wrapping_add(1);
        let now = Instant::now();
        let until = now.checked_add(limit).unwrap_or(now);
        let is_first = state.waits.values().all(|wait| until < wait.until);
        state.waits.insert(number, Wait { until, socket: Arc::clone(socket) });
        if is_first {
            self.shared.changed.notify_one();
        }
        Guard { shared: Arc::clone(&self.shared), number }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.state().waits.remove(&self.number);
    }
}

impl Shared {
    fn watch(&self) {
        let mut state = self.state();
        while !state.is_over {
            let now = Instant::now();
            state.waits.retain(|_, wait| {
                let is_in_time = now < wait.until;
                if !is_in_time {
                    warn!("a daemon has not answered in time: its connection is cut");
                    let _closed_already = wait.socket.shutdown(Shutdown::Both);
                }
                is_in_time
            });
            state = match state.waits.values().map(|wait| wait.until).min() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::Duration;

    use super::{Sandbox, Watchdog};

    #[test]
    fn silence_beyond_the_limit_ends_the_wait_and_only_that_one() {
        let watchdog = Watchdog::new(Sandbox::On).expect("a thread");
        let pair = || UnixStream::pair().map(|(a, b)| (Arc::new(a), b)).expect("sockets");
        let ((silent, _peer), (patient, mut other)) = (pair(), pair());
        let _long = watchdog.guard(&patient, Duration::from_secs(600));
        let _short = watchdog.guard(&silent, Duration::from_millis(20));
        assert_eq!((&*silent).read(&mut [0]).expect("an end of file"), 0);
        other.write_all(&[7]).expect("sent");
        let mut byte = [0];
        assert_eq!((&*patient).read(&mut byte).expect("read"), 1);
    }

    #[test]
    fn wait_that_ended_in_time_is_forgotten() {
        let watchdog = Watchdog::new(Sandbox::On).expect("a thread");
        let (socket, mut peer) = UnixStream::pair().expect("sockets");
        let socket = Arc::new(socket);
        drop(watchdog.guard(&socket, Duration::from_millis(1)));
        let (other, _other_peer) = UnixStream::pair().expect("sockets");
        let other = Arc::new(other);
        // By the time that this one is cut, the first one's limit is over.
        let _later = watchdog.guard(&other, Duration::from_millis(20));
        assert_eq!((&*other).read(&mut [0]).expect("an end of file"), 0);
        peer.write_all(&[7]).expect("sent");
        assert_eq!((&*socket).read(&mut [0]).expect("read"), 1);
    }
}
