//! `endpoint=unix:PATH` of a console: people who look on, one of whom types.
//!
//! Contract: who connects is shown the last of what the console has put out, then what it puts out; the socket carries the
//! console's bytes and nothing else, so any program will do. Nobody waits for a viewer. The first is the *writer*; what
//! others type is thrown away. When he goes, ends what he sends, or [gives the role up](Viewers::release), the next who
//! comes, or who [asks for it](Viewers::take_over), is the writer. What he has sent until then still arrives.
//!
//! A viewer has an *id* by which the control socket knows it: the one that its own address says ([`Manner`]), or the
//! next number.

use std::convert::Infallible;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::Gid;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tracing::{debug, info};

use super::OpenError;
use super::at::At;
use super::door::{Door, peer_of};
use super::wire::{Wire, hear, show};

/// Viewers of one endpoint. Each has some kilobytes of memory and a descriptor; more is a program that leaks connections.
pub(crate) const VIEWERS_MAX: usize = 64;

/// Letters of an id that a viewer has chosen: as many as nobody guesses.
const ID_LETTERS: usize = 32;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Viewers {
    door: Door,
    present: Arc<Mutex<Present>>,
}

/// Who is there. Only the main thread takes the lock.
#[derive(Debug, Default)]
struct Present {
    viewers: Vec<Arc<Viewer>>,
    /// Viewers that were given a number.
    numbered: u64,
}

/// One who looks on. Only the main thread changes it.
#[derive(Debug)]
struct Viewer {
    id: String,
    pid: i32,
    is_writer: AtomicBool,
    /// It has ended what it sends: it cannot be the writer.
    is_mute: AtomicBool,
    lost_bytes: AtomicU64,
}

/// How a viewer comes, as it says by the address from which it connects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Manner {
    /// The id that it has chosen.
    id: Option<String>,
    /// It does not want to be the writer unless it asks for it.
    only_watches: bool,
}

impl Manner {
    /// Reads an abstract address like `outboard/watch/` and 32 hexadecimal digits; any other one says nothing.
    fn of(stream: &UnixStream) -> Self {
        let address = stream.peer_addr().ok();
        let name = address.as_ref().and_then(SocketAddr::as_abstract_name).unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or_default();
        let Some((manner, id)) =
            name.strip_prefix("outboard/").and_then(|rest| rest.split_once('/'))
        else {
            return Self::default();
        };
        let is_id = id.len() == ID_LETTERS
            && id.bytes().all(|letter| matches!(letter, b'0'..=b'9' | b'a'..=b'f'));
        match manner {
            "watch" | "write" if is_id => {
                Self { id: Some(id.to_owned()), only_watches: manner == "watch" }
            }
            _ => Self::default(),
        }
    }
}

impl Viewers {
    pub(crate) fn open(path: &Path, mode: u32, group: Option<Gid>) -> Result<Self, OpenError> {
        Ok(Self { door: Door::new(path, mode, group)?, present: Arc::default() })
    }

    pub(crate) fn close(&self) {
        self.door.close();
    }

    pub(crate) async fn serve(&self, at: &At) -> Infallible {
        let door = self.door.attend().await;
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                stream = door.accept() => {
                    // Who has gone and left something for the guest to read counts as well.
                    if tasks.len() >= VIEWERS_MAX {
                        refuse(&stream);
                        continue;
                    }
                    let viewer = self.present().admit(Manner::of(&stream), peer_of(&stream));
                    info!(
                        id = viewer.id, pid = viewer.pid, role = viewer.role(),
                        "viewer at {:?}", self.door.path(),
                    );
                    tasks.spawn_local(attend(at.clone(), stream, Arc::clone(&self.present), viewer));
                }
                Some(_) = tasks.join_next() => {}
            }
        }
    }

    pub(crate) fn describe(&self) -> Value {
        json!({ "kind": "unix", "path": self.door.path(), "viewers": self.describe_viewers() })
    }

    /// All who are there.
    pub(crate) fn describe_viewers(&self) -> Value {
        self.present().viewers.iter().map(|viewer| viewer.describe()).collect()
    }

    /// One of them, if there is one with this id.
    pub(crate) fn describe_viewer(&self, id: &str) -> Option<Value> {
        self.present().find(id).map(|viewer| viewer.describe())
    }

    /// Makes this viewer the writer. `None`: there is no such viewer.
    pub(crate) fn take_over(&self, id: &str) -> Option<Result<(), String>> {
        let present = self.present();
        let viewer = present.find(id)?;
        if viewer.is_mute.load(Ordering::Relaxed) {
            return Some(Err(format!("viewer {id:?} has ended what it sends, and cannot write")));
        }
        present.viewers.iter().for_each(|other| other.set_writer(false));
        viewer.set_writer(true);
        Some(Ok(()))
    }

    /// Has this viewer write no longer. `None`: there is no such viewer.
    pub(crate) fn release(&self, id: &str) -> Option<()> {
        self.present().find(id)?.set_writer(false);
        Some(())
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        lock(&self.present)
    }
}

fn lock(present: &Mutex<Present>) -> MutexGuard<'_, Present> {
    present.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Present {
    fn find(&self, id: &str) -> Option<&Arc<Viewer>> {
        self.viewers.iter().find(|viewer| viewer.id == id)
    }

    fn admit(&mut self, manner: Manner, pid: i32) -> Arc<Viewer> {
        // One who claims to be somebody else is nobody.
        let id = manner.id.filter(|id| self.find(id).is_none()).unwrap_or_else(|| {
            self.numbered += 1;
            self.numbered.to_string()
        });
        let has_writer = self.viewers.iter().any(|viewer| viewer.is_writer());
        let viewer = Arc::new(Viewer {
            id,
            pid,
            is_writer: AtomicBool::new(!has_writer && !manner.only_watches),
            is_mute: AtomicBool::new(false),
            lost_bytes: AtomicU64::new(0),
        });
        self.viewers.push(Arc::clone(&viewer));
        viewer
    }

    fn dismiss(&mut self, viewer: &Arc<Viewer>) {
        self.viewers.retain(|other| !Arc::ptr_eq(other, viewer));
    }
}

impl Viewer {
    fn is_writer(&self) -> bool {
        self.is_writer.load(Ordering::Relaxed)
    }

    fn set_writer(&self, is_writer: bool) {
        self.is_writer.store(is_writer, Ordering::Relaxed);
    }

    fn role(&self) -> &'static str {
        if self.is_writer() { "writer" } else { "watcher" }
    }

    fn describe(&self) -> Value {
        let lost_bytes = self.lost_bytes.load(Ordering::Relaxed);
        json!({ "id": self.id, "pid": self.pid, "role": self.role(), "lost_bytes": lost_bytes })
    }
}

/// Serves one viewer until it is gone and what it has sent has arrived.
async fn attend(at: At, stream: UnixStream, present: Arc<Mutex<Present>>, viewer: Arc<Viewer>) {
    let wire = match Wire::new(stream.into()) {
        Ok(wire) => wire,
        Err(cause) => {
            debug!(%cause, id = viewer.id, "viewer cannot be served");
            lock(&present).dismiss(&viewer);
            return;
        }
    };
    let looks_on = async {
        tokio::select! {
            _ = show(&at, at.port().transcript().replay(), &wire, &viewer.lost_bytes) => {}
            () = wire.hung_up() => {}
        }
        // Who comes next may be the writer, though the guest has not yet read all that this one has sent.
        lock(&present).dismiss(&viewer);
        info!(id = viewer.id, pid = viewer.pid, "viewer has gone");
    };
    let types = async {
        // Why nothing comes any more is all the same.
        let _ = hear(&at, &wire, || viewer.is_writer()).await;
        viewer.is_mute.store(true, Ordering::Relaxed);
        viewer.set_writer(false);
    };
    tokio::join!(looks_on, types);
}

/// A new connection's buffer is empty and has room for the line; who is gone already needs none.
fn refuse(stream: &UnixStream) {
    let line = format!("\r\n[{VIEWERS_MAX} viewers are here, the most there may be]\r\n");
    if let Err(cause) = rustix::io::write(stream, line.as_bytes()) {
        debug!(%cause, "a viewer was refused without a word");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{SocketAddr, UnixStream as StdStream};
    use std::path::Path;

    use serde_json::Value;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixSocket;

    use super::VIEWERS_MAX;
    use crate::endpoint::stage::{Peer, REPLAY_BYTES, Stage, pattern, unix};

    const ID: &str = "0123456789abcdef0123456789abcdef";

    /// The viewers that the operator sees.
    fn viewers(stage: &Stage) -> Vec<(String, String)> {
        let word = |viewer: &Value, member: &str| viewer[member].as_str().unwrap().to_owned();
        let ports = stage.hub.describe();
        let viewers = ports[0]["endpoints"][0]["viewers"].as_array().unwrap();
        viewers.iter().map(|viewer| (word(viewer, "id"), word(viewer, "role"))).collect()
    }

    async fn are(stage: &Stage, expected: &[(&str, &str)]) {
        let expected: Vec<_> =
            expected.iter().map(|(id, role)| ((*id).to_owned(), (*role).to_owned())).collect();
        while viewers(stage) != expected {
            tokio::task::yield_now().await;
        }
    }

    /// Connects from an address of its own.
    async fn connect_from(name: &str, path: &Path) -> Peer {
        let socket = UnixSocket::new_stream().unwrap();
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let socket = {
            use std::os::fd::{AsFd, AsRawFd};
            let name = address.as_abstract_name().unwrap();
            let address = rustix::net::SocketAddrUnix::new_abstract_name(name).unwrap();
            assert!(socket.as_raw_fd() >= 0);
            rustix::net::bind(socket.as_fd(), &address).unwrap();
            socket
        };
        Peer(socket.connect(path).await.unwrap())
    }

    #[test]
    fn viewer_is_shown_the_past_and_then_the_present() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        stage.play(async || {
            let past = pattern(REPLAY_BYTES as usize + 1000);
            guest.write(&past).await;
            let mut first = Peer::connect(&path).await;
            first.expect(&past[1000..]).await;
            let mut second = Peer::connect(&path).await;
            second.expect(&past[1000..]).await;
            guest.write(b"login: ").await;
            first.expect(b"login: ").await;
            second.expect(b"login: ").await;
        });
    }

    #[test]
    fn first_viewer_types_and_others_do_not() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            are(&stage, &[("1", "writer")]).await;
            let mut second = Peer::connect(&path).await;
            are(&stage, &[("1", "writer"), ("2", "watcher")]).await;
            second.write(b"rm -rf /\n").await;
            first.write(b"ls\n").await;
            assert_eq!(guest.read_exactly(3).await, b"ls\n");
            // Nobody inherits the role, but who comes next gets it.
            drop(first);
            are(&stage, &[("2", "watcher")]).await;
            let mut third = Peer::connect(&path).await;
            are(&stage, &[("2", "watcher"), ("3", "writer")]).await;
            third.write(b"pwd\n").await;
            assert_eq!(guest.read_exactly(4).await, b"pwd\n");
        });
    }

    #[test]
    fn viewer_that_ends_what_it_sends_looks_on() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            first.write(b"last words").await;
            first.0.shutdown().await.unwrap();
            assert_eq!(guest.read_exactly(10).await, b"last words");
            are(&stage, &[("1", "watcher")]).await;
            guest.write(b"heard").await;
            first.expect(b"heard").await;
            let mut second = Peer::connect(&path).await;
            second.expect(b"heard").await;
            are(&stage, &[("1", "watcher"), ("2", "writer")]).await;
        });
    }

    #[test]
    fn paste_arrives_whole_though_the_guest_reads_late_and_the_viewer_has_gone() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        guest.port().set_guest_open(false);
        let path = stage.path("console");
        stage.play(async || {
            let paste = pattern(1 << 20);
            let mut first = Peer::connect(&path).await;
            let (written, read) = tokio::join!(
                async {
                    first.write(&paste).await;
                    drop(first);
                },
                async {
                    guest.until(|port| port.inbox().room() < 20_000).await;
                    guest.port().set_guest_open(true);
                    guest.read_exactly(paste.len()).await
                }
            );
            let () = written;
            assert!(read == paste);
            are(&stage, &[]).await;
        });
    }

    #[test]
    fn writer_who_has_gone_is_succeeded_though_the_guest_does_not_read() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        guest.port().set_guest_open(false);
        let path = stage.path("console");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            let paste = pattern(100_000);
            first.write(&paste).await;
            are(&stage, &[("1", "writer")]).await;
            drop(first);
            are(&stage, &[]).await;
            let _second = Peer::connect(&path).await;
            are(&stage, &[("2", "writer")]).await;
            guest.port().set_guest_open(true);
            assert!(guest.read_exactly(paste.len()).await == paste);
        });
    }

    #[test]
    fn stalled_viewer_is_told_what_it_has_lost_and_holds_up_nobody() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let mut stalled = Peer::connect(&path).await;
            let mut reader = Peer::connect(&path).await;
            are(&stage, &[("1", "writer"), ("2", "watcher")]).await;
            let all = pattern(4 << 20);
            for part in all.chunks(32 << 10) {
                guest.write(part).await;
                reader.expect(part).await;
            }
            let last = b"the end";
            guest.write(last).await;
            // All that it reads, but for the notice, is a beginning and an end of what there was.
            let mut read = Vec::new();
            while !read.ends_with(last) {
                use tokio::io::AsyncReadExt;
                stalled.0.read_buf(&mut read).await.unwrap();
            }
            let text: Vec<u8> = read.clone();
            let notice = b"\r\n[";
            let at = text.windows(3).position(|window| window == notice).unwrap();
            assert!(text[..at] == all[..at]);
            let rest = &text[at + 3..];
            let end = rest.iter().position(|byte| *byte == b' ').unwrap();
            let lost: usize = std::str::from_utf8(&rest[..end]).unwrap().parse().unwrap();
            let rest = rest[end..].strip_prefix(b" bytes lost]\r\n").unwrap();
            assert!(rest[..rest.len() - last.len()] == all[at + lost..]);
            let ports = stage.hub.describe();
            assert_eq!(ports[0]["endpoints"][0]["viewers"][0]["lost_bytes"], lost);
        });
    }

    #[test]
    fn viewer_says_by_its_address_who_it_is_and_that_it_only_watches() {
        let stage = Stage::new(1);
        let _guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let watcher = connect_from(&format!("outboard/watch/{ID}"), &path).await;
            are(&stage, &[(ID, "watcher")]).await;
            let other = ID.replace('0', "f");
            let _writer = connect_from(&format!("outboard/write/{other}"), &path).await;
            are(&stage, &[(ID, "watcher"), (&other, "writer")]).await;
            let _stranger = connect_from("outboard/write/ABC", &path).await;
            are(&stage, &[(ID, "watcher"), (&other, "writer"), ("1", "watcher")]).await;
            drop(watcher);
            are(&stage, &[(&other, "writer"), ("1", "watcher")]).await;
        });
    }

    #[test]
    fn one_viewer_too_many_is_told_so() {
        let stage = Stage::new(1);
        let _guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let mut all = Vec::new();
            for _ in 0..VIEWERS_MAX {
                all.push(Peer::connect(&path).await);
            }
            let mut further = Peer::connect(&path).await;
            let said = String::from_utf8(further.read_to_end().await).unwrap();
            assert!(said.contains(&format!("[{VIEWERS_MAX} viewers are here")), "{said:?}");
            drop(all.pop());
            while viewers(&stage).len() == VIEWERS_MAX {
                tokio::task::yield_now().await;
            }
            let _next = Peer::connect(&path).await;
            while viewers(&stage).len() < VIEWERS_MAX {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn port_that_is_removed_hangs_up_and_leaves_its_path() {
        let stage = Stage::new(2);
        let _guest = stage.plug_unix("console", true);
        let path = stage.path("console");
        stage.play(async || {
            let mut viewer = Peer::connect(&path).await;
            are(&stage, &[("1", "writer")]).await;
            stage.hub.unplug("console").unwrap();
            assert!(!path.exists());
            // At once, in the same turn.
            let mut guest = stage.plug("again", true, unix(&path));
            assert_eq!(viewer.read_to_end().await, b"");
            let mut viewer = Peer::connect(&path).await;
            guest.until(|port| port.takes_output()).await;
            guest.write(b"new").await;
            viewer.expect(b"new").await;
        });
        drop(stage);
        assert!(!path.exists());
    }

    #[test]
    fn path_that_is_served_is_refused_and_a_stale_one_is_not() {
        let stage = Stage::new(2);
        let path = stage.path("console");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let _guest = stage.plug_unix("console", true);
        let spec = crate::port_spec::PortSpec {
            name: None,
            is_console: true,
            id: None,
            endpoints: vec![unix(&path)],
        };
        let error = stage.hub.plug(&spec).unwrap_err().to_string();
        assert!(error.contains("another process is listening"), "{error}");
        let mut stream = StdStream::connect(&path).unwrap();
        drop(stage);
        assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    }
}
