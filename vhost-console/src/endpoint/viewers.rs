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
