//! The service manager's watchdog: it hears of the daemon while the daemon does its work.
//!
//! Contract: the manager is told so by the main thread, and only after each worker has answered. So a main thread that
//! hangs ends the process, and so does a worker that hangs, however well the others do. A disk that hangs does not: the
//! loop of the worker that waits for it goes round, and another process could not do better.
//!
//! Without a manager that asks for it nothing happens here, and nobody is woken.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::error;

use super::notify;
use crate::worker::RollCall;

/// In each of these parts of the manager's limit it hears once of us. sd_watchdog_enabled(3) wants two: a message that is late
/// by half the limit is still in time, and idle threads are woken no more than that takes.
const BEATS_PER_LIMIT: u32 = 2;

/// Tells the manager as often as it wants that all threads do their work, for as long as they do.
pub(super) async fn watch<Q>(workers: &RollCall<Q>) -> Infallible {
    match notify::watchdog_limit() {
        Some(limit) => beat(limit, async || workers.all_answer().await, notify::alive).await,
        None => std::future::pending().await,
    }
}

/// `tell`s after each time that `ask` finds all present.
async fn beat(limit: Duration, ask: impl AsyncFn() -> bool, mut tell: impl FnMut()) -> Infallible {
    let interval = limit / BEATS_PER_LIMIT;
    loop {
        sleep(interval).await;
        let mut asked = pin!(ask());
        let all_present = match timeout(interval, &mut asked).await {
            Ok(all_present) => all_present,
            Err(_late) => {
                let seconds = interval.as_secs_f32();
                error!(
                    "a worker has not answered for {seconds} s: the service manager will end this process"
                );
                asked.await
            }
        };
        if all_present {
            tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::beat;

    /// Short: a test waits for some of them.
    const LIMIT: Duration = Duration::from_millis(4);

    /// Beats until `ended`, with workers that answer `answer` the n-th time; how often the manager was told.
    fn told_until(ended: &Notify, answer: impl AsyncFn(u32) -> bool) -> u32 {
        let (asked, told) = (Cell::new(0), Cell::new(0));
        let ask = async || {
            asked.set(asked.get() + 1);
            answer(asked.get()).await
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            tokio::select! {
                biased;
                () = ended.notified() => {}
                never = beat(LIMIT, ask, || told.set(told.get() + 1)) => match never {},
            }
        });
        told.get()
    }

    /// When the manager's patience has ended. What is waited for is just that.
    async fn long_after() {
        let never = std::future::pending::<()>();
        tokio::time::timeout(2 * LIMIT, never).await.unwrap_err();
    }

    #[test]
    fn the_manager_is_told_after_each_answer_and_not_while_a_worker_is_silent() {
        let ended = Notify::new();
        let told = told_until(&ended, async |time| {
            if time == 4 {
                long_after().await;
                ended.notify_one();
                let never: Infallible = std::future::pending().await;
                match never {}
            }
            true
        });
        assert_eq!(told, 3);
    }

    #[test]
    fn the_manager_is_told_nothing_once_a_worker_has_ended() {
        let ended = Notify::new();
        let told = told_until(&ended, async |time| {
            if time == 5 {
                ended.notify_one();
            }
            time < 3
        });
        assert_eq!(told, 2);
    }

    #[test]
    fn a_late_answer_counts() {
        let ended = Notify::new();
        let told = told_until(&ended, async |time| {
            match time {
                1 => long_after().await,
                _ => ended.notify_one(),
            }
            time == 1
        });
        assert_eq!(told, 1);
    }
}
