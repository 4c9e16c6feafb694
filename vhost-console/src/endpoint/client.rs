//! `endpoint=unix:PATH` of a data port: one client, and every byte.
//!
//! Contract: while a client is connected the port is open to the guest, and bytes go both ways as they are: each side waits
//! for the other, and nothing is dropped. Who else connects is closed at once. Without a client the guest's
//! writes wait in its ring. When a client goes, the guest is told once it has read all that he sent; what it had written
//! for him and he did not take is lost, and counted.
//!
//! Who comes before the guest has read what the one before him sent goes on in the same opening of the port.

use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use rustix::fs::Gid;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tracing::{debug, info};

use super::OpenError;
use super::at::At;
use super::door::{Attendant, Door, peer_of};
use super::wire::{Delivery, Wire, deliver, hear};

/// No process has this number.
const NOBODY: i32 = -1;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Client {
    door: Door,
    /// The client's process; 0 if it cannot be seen from here, and [`NOBODY`].
    pid: AtomicI32,
    lost_bytes: AtomicU64,
    refused: AtomicU64,
}

impl Client {
    pub(crate) fn open(path: &Path, mode: u32, group: Option<Gid>) -> Result<Self, OpenError> {
        Ok(Self {
            door: Door::new(path, mode, group)?,
            pid: AtomicI32::new(NOBODY),
            lost_bytes: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    pub(crate) fn close(&self) {
        self.door.close();
    }

    pub(crate) async fn serve(&self, at: &At) -> Infallible {
        let door = self.door.attend().await;
        let mut next = None;
        loop {
            let stream = match next.take() {
                Some(stream) => stream,
                None => door.accept().await,
            };
            self.serve_one(at, &door, stream).await;
            next = tokio::select! {
                biased;
                () = at.tell_closed() => None,
                stream = door.accept() => Some(stream),
            };
        }
    }

    pub(crate) fn describe(&self) -> Value {
        let pid = Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != NOBODY);
        json!({
            "kind": "unix",
            "path": self.door.path(),
            "client": pid.map(|pid| json!({ "pid": pid })),
            "lost_bytes": self.lost_bytes.load(Ordering::Relaxed),
            "refused": self.refused.load(Ordering::Relaxed),
        })
    }

    async fn serve_one(&self, at: &At, door: &Attendant<'_>, stream: UnixStream) {
        let pid = peer_of(&stream);
        let wire = match Wire::new(stream.into()) {
            Ok(wire) => wire,
            Err(cause) => {
                debug!(%cause, pid, "client cannot be served");
                return;
            }
        };
        info!(pid, "client at {:?}", self.door.path());
        self.pid.store(pid, Ordering::Relaxed);
        let end = End { is_with_input: false, successor: std::future::pending() };
        let lost_bytes = tokio::select! {
            lost_bytes = converse(at, &wire, end) => lost_bytes,
            never = self.refuse_others(door) => match never {},
        };
        self.pid.store(NOBODY, Ordering::Relaxed);
        self.lost_bytes.fetch_add(lost_bytes, Ordering::Relaxed);
        info!(pid, lost_bytes, "client has gone");
    }

    async fn refuse_others(&self, door: &Attendant<'_>) -> Infallible {
        loop {
            let stream = door.accept().await;
            self.refused.fetch_add(1, Ordering::Relaxed);
            debug!(pid = peer_of(&stream), "a further client was closed: one is being served");
        }
    }
}

/// Bytes both ways between a data port and a client, from its coming until it is gone and what it has sent has found room;
/// how many bytes of the guest's it did not take. `end` says when a client is gone.
pub(crate) async fn converse(at: &At, wire: &Wire, end: End<impl Future<Output = ()>>) -> u64 {
    // From the first byte on that the guest writes.
    let mut delivery = Delivery::new(at);
    at.come();
    let is_silent = Notify::new();
    let takes = async {
        tokio::select! {
            _ = deliver(at, wire, &mut delivery) => {}
            () = wire.hung_up() => {}
            () = is_silent.notified() => {}
        }
        at.take_no_output();
        let undelivered_bytes = delivery.undelivered_bytes();
        // The guest waits for this one no longer, but for the next.
        drop(delivery);
        undelivered_bytes
    };
    let sends = async {
        // Why nothing comes any more is all the same.
        let _ = hear(at, wire, || true).await;
        if end.is_with_input {
            is_silent.notify_one();
        }
    };
    tokio::pin!(takes, sends);
    let lost_bytes = tokio::select! {
        lost_bytes = &mut takes => {
            tokio::select! {
                () = sends => {}
                () = end.successor => {}
            }
            lost_bytes
        }
        () = &mut sends => takes.await,
    };
    at.leave();
    lost_bytes
}

/// When a client is gone, other than by hanging up.
pub(crate) struct End<S> {
    /// It cannot end what it sends and still take output.
    pub(crate) is_with_input: bool,
    /// Another one has come on the same wire: what is left of the first one's input is heard with his.
    pub(crate) successor: S,
}
