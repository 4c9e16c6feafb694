//! A network that a test plays: what the queues' channels bring and take is the simulation's (`common::simulation`).
//!
//! Contract: it has no descriptors; frames on its channels are a tap's, or bytes are a stream's. The link, and whether
//! what it is asked for succeeds, are as the test says.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use rustix::io::Errno;

use super::Offloads;
use super::link::{Link, LinkEvent};

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Simulated {
    offloads: Offloads,
    is_stream: bool,
    link: Link,
    played: Mutex<Played>,
}

/// What the test and the device have said.
#[derive(Debug)]
struct Played {
    told: LinkEvent,
    attached: Vec<bool>,
    applied: Offloads,
    /// What every change is refused with.
    refusal: Option<Errno>,
}

impl Simulated {
    /// A network of `pairs` that can have these offloads, and whose link is up.
    pub(crate) fn new(pairs: u16, offloads: Offloads) -> Self {
        let link = Link::default();
        link.set_up(true);
        let told = link.state();
        let attached = vec![false; usize::from(pairs)];
        let played = Played { told, attached, applied: Offloads::default(), refusal: None };
        Self { offloads, is_stream: false, link, played: Mutex::new(played) }
    }

    /// One of a single pair whose channels are those of a stream socket; it has a peer.
    pub(crate) fn stream() -> Self {
        let simulated = Self { is_stream: true, ..Self::new(1, Offloads::default()) };
        simulated.set_link(true, true);
        simulated
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.is_stream
    }

    /// The link falls or rises; `anew`: with another opening of the back end.
    pub(crate) fn set_link(&self, up: bool, anew: bool) {
        if anew {
            self.link.renew();
        }
        self.link.set_up(up);
    }

    /// From now on every change is refused so, or none is.
    pub(crate) fn refuse(&self, refusal: Option<Errno>) {
        self.played().refusal = refusal;
    }

    /// Whether frames may come for a pair.
    pub(crate) fn is_attached(&self, pair: u16) -> bool {
        self.played().attached[usize::from(pair)]
    }

    /// What frames may be that are handed to the driver.
    pub(crate) fn applied(&self) -> Offloads {
        self.played().applied
    }

    pub(super) fn offloads(&self) -> Offloads {
        self.offloads
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn apply(&self, offloads: Offloads) -> Result<(), Errno> {
        let mut played = self.played();
        match played.refusal {
            Some(refusal) => Err(refusal),
            None => {
                played.applied = offloads;
                Ok(())
            }
        }
    }

    pub(super) fn attach_queue(&self, pair: u16, attached: bool) -> Result<(), Errno> {
        let mut played = self.played();
        let refusal = played.refusal;
        let place = &mut played.attached[usize::from(pair)];
        match refusal {
            Some(refusal) if *place != attached => Err(refusal),
            _ => {
                *place = attached;
                Ok(())
            }
        }
    }

    /// Tells of a change whenever it is polled.
    pub(super) async fn watch(&self, mut on_change: impl FnMut(LinkEvent)) -> Infallible {
        poll_fn(|_| {
            let state = self.link.state();
            let told = std::mem::replace(&mut self.played().told, state);
            if told != state {
                on_change(state);
            }
            Poll::Pending
        })
        .await
    }

    fn played(&self) -> MutexGuard<'_, Played> {
        self.played.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
