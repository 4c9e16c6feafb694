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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use crate::endpoint::stage::{Peer, Stage, pattern};

    /// More than sockets, transcript and inbox hold together.
    const STREAM_BYTES: usize = 8 << 20;

    fn lost_bytes(stage: &Stage) -> u64 {
        stage.hub.describe()[0]["endpoints"][0]["lost_bytes"].as_u64().unwrap()
    }

    #[test]
    fn streams_go_both_ways_and_each_side_waits_for_the_other() {
        let stage = Stage::new(1);
        let (mut writes, mut reads) = {
            let guest = stage.plug_unix("data", false);
            let id = guest.id();
            (guest, stage.guest_that_reads(id))
        };
        let path = stage.path("data");
        stage.play(async || {
            let (there, back) = (pattern(STREAM_BYTES), pattern(STREAM_BYTES + 1));
            let (mut from_client, mut to_client) = Peer::connect(&path).await.0.into_split();
            tokio::join!(
                writes.write(&there),
                async { assert!(reads.read_exactly(back.len()).await == back) },
                async { from_client_is(&mut from_client, &there).await },
                async { to_client.write_all(&back).await.unwrap() },
            );
        });
        assert_eq!(lost_bytes(&stage), 0);
    }

    async fn from_client_is(client: &mut tokio::net::unix::OwnedReadHalf, expected: &[u8]) {
        use tokio::io::AsyncReadExt;
        let mut read = vec![0; expected.len()];
        client.read_exact(&mut read).await.unwrap();
        assert!(read == expected);
    }

    #[test]
    fn guest_writes_nothing_while_there_is_no_client() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("data", false);
        let path = stage.path("data");
        stage.play(async || {
            assert_eq!(guest.try_write(b"early"), 0);
            let mut first = Peer::connect(&path).await;
            guest.write(b"to the first").await;
            first.expect(b"to the first").await;
            drop(first);
            guest.until(|port| !port.takes_output()).await;
            assert_eq!(guest.try_write(b"late"), 0);
            let mut second = Peer::connect(&path).await;
            guest.write(b"to the second").await;
            second.expect(b"to the second").await;
        });
        assert_eq!(lost_bytes(&stage), 0);
    }

    #[test]
    fn further_client_is_closed_at_once() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("data", false);
        let path = stage.path("data");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            guest.until(|port| port.takes_output()).await;
            let mut second = Peer::connect(&path).await;
            assert_eq!(second.read_to_end().await, b"");
            guest.write(b"still here").await;
            first.expect(b"still here").await;
        });
        assert_eq!(stage.hub.describe()[0]["endpoints"][0]["refused"], 1);
    }

    #[test]
    fn client_that_ends_what_it_sends_takes_output_until_it_hangs_up() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("data", false);
        let path = stage.path("data");
        stage.play(async || {
            let mut client = Peer::connect(&path).await;
            client.write(b"question").await;
            client.0.shutdown().await.unwrap();
            assert_eq!(guest.read_exactly(8).await, b"question");
            guest.write(b"answer").await;
            client.expect(b"answer").await;
            drop(client);
            guest.until(|port| !port.takes_output()).await;
        });
    }

    #[test]
    fn what_a_client_has_sent_arrives_though_it_has_gone_and_the_port_closes_after_it() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("data", false);
        let path = stage.path("data");
        stage.play(async || {
            let sent = pattern(100_000);
            let mut client = Peer::connect(&path).await;
            client.write(&sent).await;
            drop(client);
            guest.until(|port| !port.takes_output() && port.inbox().len_bytes() > 0).await;
            assert!(stage.is_host_open(0), "there is something to read");
            assert!(guest.read_exactly(sent.len()).await == sent);
            while stage.is_host_open(0) {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn output_that_a_client_did_not_take_is_counted_and_not_for_the_next() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("data", false);
        let path = stage.path("data");
        stage.play(async || {
            let client = Peer::connect(&path).await;
            guest.until(|port| port.takes_output()).await;
            let mut written = 0;
            let mut idle_turns = 0;
            // Until neither socket nor transcript takes any more.
            while idle_turns < 100 {
                let count = guest.try_write(&[b'x'; 4096]) as u64;
                idle_turns = if count == 0 { idle_turns + 1 } else { 0 };
                written += count;
                tokio::task::yield_now().await;
            }
            drop(client);
            guest.until(|port| !port.takes_output()).await;
            let mut next = Peer::connect(&path).await;
            guest.write(b"news").await;
            next.expect(b"news").await;
            let lost_bytes = lost_bytes(&stage);
            assert!(lost_bytes > 100_000 && lost_bytes < written, "{lost_bytes} of {written}");
        });
    }
}
