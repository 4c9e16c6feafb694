//! Whether frames can travel, and since when: what queues look at, and the errand that keeps it true.
//!
//! Contract: [`Link`] is two atomics that every queue reads without waiting. While it is down, a queue leaves the back
//! end's descriptors alone. The generation says which opening of the back end they lead to: a queue that finds another
//! one than it knows forgets what it was in the middle of. [`follow`] tells of each change, in order, on the main
//! thread.
//!
//! What it deliberately does not do: it does not stop a queue at once. A frame that is under way when the link falls
//! meets an error of the kernel's, and is dropped as on any other wire.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use tracing::error;

use super::descriptor;
use super::netlink::Notices;

/// How often an interface is tried again that is there, and cannot be opened yet: another process may hold it still,
/// and the kernel sends no notice when that lets go.
const RETRY: Duration = Duration::from_secs(1);

/// Whether the back end's descriptors lead anywhere.
#[derive(Debug, Default)]
pub(crate) struct Link {
    up: AtomicBool,
    generation: AtomicU32,
}

/// What a link has become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkEvent {
    pub(crate) up: bool,
    /// Goes up by one each time that the back end has been opened anew.
    pub(crate) generation: u32,
}

impl Link {
    pub(crate) fn is_up(&self) -> bool {
        // Acquire: pairs with the Release of `set_up`; who sees the link up sees the generation that it came up with.
        self.up.load(Ordering::Acquire)
    }

    pub(crate) fn generation(&self) -> u32 {
        // Acquire: pairs with the Release of `renew`; who sees a generation finds its files under the descriptors.
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> LinkEvent {
        LinkEvent { up: self.is_up(), generation: self.generation() }
    }

    /// Main thread only.
    pub(super) fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }

    /// The back end has been opened anew. Main thread only, while the link is down.
    pub(super) fn renew(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// What came of a look at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// The next change of an interface is soon enough for the next one.
    Settled,
    /// It is there, and could not be opened.
    Again,
}

/// Has `look` look at an interface now and whenever one changes. It brings `link` up to date, and calls what it is given
/// after each step of that; changes go on to `on_change`.
pub(super) async fn follow(
    link: &Link,
    notices: &Notices,
    mut look: impl FnMut(&mut dyn FnMut()) -> Look,
    mut on_change: impl FnMut(LinkEvent),
) -> Infallible {
    let mut told = link.state();
    let mut step = || {
        let state = link.state();
        if state != told {
            told = state;
            on_change(state);
        }
    };
    let notified = match descriptor::readable(notices.as_fd()) {
        Ok(notified) => notified,
        Err(cause) => {
            error!(%cause, "cannot watch the network interface: the link stays as it is");
            std::future::pending().await
        }
    };
    loop {
        match look(&mut step) {
            Look::Settled => next(&notified, notices).await,
            // Whether a notice came or the time is over makes no difference.
            Look::Again => timeout(RETRY, next(&notified, notices)).await.unwrap_or_default(),
        }
    }
}

/// Waits until an interface has changed.
async fn next(notified: &AsyncFd<BorrowedFd<'_>>, notices: &Notices) {
    loop {
        match notified.readable().await {
            Ok(mut guard) => {
                if guard.try_io(|_| Ok(notices.take()?)).is_ok() {
                    return;
                }
            }
            // The runtime is being shut down.
            Err(_gone) => std::future::pending().await,
        }
    }
}
