//! The descriptor store of the service manager: what a successor of this process is to have.
//!
//! Contract: [`Store::commit`] makes the manager keep each descriptor that the session needs, and the image name it. Whatever
//! store or message the process ends at, each descriptor that the image names is in the store: new ones are sent first, then
//! the image is written, then those are removed which it names no more. The manager reads one queue in its order, also when
//! this process is gone. [`Store::open`] takes up what a predecessor has left; what does not fit is told to the log, closed and
//! removed, and the daemon begins anew. It never fails the daemon.
//!
//! A manager drops what is too much for it in silence, and one without a store drops all: so a successor that misses a
//! descriptor ends the session. Rings of io_uring cannot be kept, and need not be.
//!
//! The store is used exactly if `NOTIFY_SOCKET` is set.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod identity;
mod image;
mod record;

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::Shutdown;
use serde_json::Value;
use tracing::{debug, info, warn};

use self::identity::{FD_INFO, FdInfo, Identity};
use self::image::{DeviceState, Image, ImageError};
pub(super) use self::record::{HeldLife, KeptInflight, KeptListener, Life};
use self::record::{HeldRecord, Record};
use super::listener;
use super::log::with_sources;
use super::notify::Manager;
use crate::device::Keeper;
use crate::sandbox::{Access, Place};

/// What begins all our names.
const PREFIX: &str = "outboard-";
/// The image's own.
const IMAGE_NAME: &str = "outboard-image";
/// Successors that may end while they take a session up, one after the other, before it is given up: it may be what ends them.
const ATTEMPTS_MAX: u16 = 5;

/// A descriptor that the service manager has kept, with its name.
pub(super) type Kept = (String, OwnedFd);

/// Whether a descriptor with this name is one that we have stored.
pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Why a predecessor's session is not taken up.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("the image of it")]
    Image(#[from] ImageError),
    #[error("the image of it has not the form that it should")]
    Form(#[from] serde_json::Error),
    #[error("it is of a device {found:?}, not {device:?}")]
    Device { found: String, device: &'static str },
    #[error("where it listened is no socket that listens")]
    Listener,
    #[error("descriptor {serial} is not in the store (FileDescriptorStoreMax= too small?)")]
    Missing { serial: u64 },
}

/// What a predecessor has left.
#[derive(Default)]
pub(super) struct Legacy {
    /// The socket that it had bound.
    pub(super) listener: Option<KeptListener<Arc<OwnedFd>>>,
    /// The front end that it served.
    pub(super) session: Option<HeldLife>,
}

/// What a device's queues write down, in the image.
struct StateKeeper(Arc<DeviceState>);

impl Keeper for StateKeeper {
    fn keep(&self, state: &Value) {
        let written = serde_json::to_vec(state).map_err(Unusable::Form);
        if let Err(why) = written.and_then(|bytes| Ok(self.0.write(&bytes)?)) {
            warn!("a successor will not know what the driver has said: {}", with_sources(&why));
        }
    }
}

/// See the module's head.
pub(super) struct Store {
    manager: Manager,
    image: Image,
    device: &'static str,
    next_serial: u64,
    entries: Vec<Entry>,
    fd_info: FdInfo,
    listener: Option<KeptListener<Arc<OwnedFd>>>,
    written: Vec<u8>,
    /// The image could not be written: it stays marked.
    spoilt: bool,
}

/// A descriptor in the store.
struct Entry {
    serial: u64,
    identity: Option<Identity>,
    file: Arc<OwnedFd>,
}

impl Store {
    /// The store of this process, and what a predecessor has left in it. `None`: there is no service manager, or it cannot be
    /// used.
    pub(super) fn open(kept: Vec<Kept>, device: &'static str) -> Option<(Self, Legacy)> {
        let manager = match Manager::connect() {
            Ok(manager) => manager?,
            Err(error) => {
                warn!(%error, "the service manager cannot keep the session for a successor");
                return None;
            }
        };
        let kept: Vec<_> = kept.into_iter().map(|(name, fd)| (name, Arc::new(fd))).collect();
        let names = || kept.iter().map(|(name, _)| name);
        let least = names().filter_map(|name| serial_of(name)).max();
        let least = least.map_or(0, |last| last.saturating_add(1));
        let fd_info = FdInfo::open();
        let (image, record) = match take_up(&kept, device, &fd_info) {
            Ok(Some(taken)) => taken,
            other => {
                if let Err(why) = other {
                    warn!("a predecessor's session is not taken up: {}", with_sources(&why));
                }
                names().for_each(|name| manager.remove(name));
                let store = Self::begin(manager, device, fd_info, least)?;
                return Some((store, Legacy { listener: salvage(&kept), session: None }));
            }
        };
        let HeldRecord { next_serial, listener, session, .. } = record.held;
        let store = Self {
            manager,
            image,
            device,
            next_serial: next_serial.max(least),
            entries: record.entries,
            fd_info,
            listener: listener.clone(),
            written: Vec::new(),
            spoilt: false,
        };
        for name in names().filter(|name| *name != IMAGE_NAME) {
            if !store.entries.iter().any(|entry| serial_of(name) == Some(entry.serial)) {
                store.manager.remove(name);
            }
        }
        let kept = store.image.state().read();
        let kept = kept.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let session = session.and_then(|life| store.admit(Life { kept, ..life }));
        Some((store, Legacy { listener, session }))
    }

    /// A store with nothing in it.
    fn begin(manager: Manager, device: &'static str, fd_info: FdInfo, least: u64) -> Option<Self> {
        let empty = Record::<u64> {
            device: device.to_owned(),
            next_serial: least,
            listener: None,
            session: None,
        };
        let image = serde_json::to_vec(&empty).map_err(Unusable::Form).and_then(|written| {
            Image::create(&written).map(|image| (image, written)).map_err(Unusable::Image)
        });
        let (image, written) = match image {
            Ok(made) => made,
            Err(why) => {
                warn!("no session can be left to a successor: {}", with_sources(&why));
                return None;
            }
        };
        manager.store(IMAGE_NAME, image.file());
        let (next_serial, entries, listener) = (least, Vec::new(), None);
        Some(Self {
            manager,
            image,
            device,
            next_serial,
            entries,
            fd_info,
            listener,
            written,
            spoilt: false,
        })
    }

    /// The session, unless a predecessor's end says that it must not go on. The attempt is counted until the next commit.
    fn admit(&self, life: HeldLife) -> Option<HeldLife> {
        let attempts = self.image.attempts();
        let why = if self.image.is_busy() {
            "the predecessor has ended in the middle of a message"
        } else if attempts >= ATTEMPTS_MAX {
            "several have ended while they took it up"
        } else {
            self.image.set_attempts(attempts.saturating_add(1));
            return Some(life);
        };
        warn!("the front end's connection is closed, and it may connect again: {why}");
        hang_up(&life);
        None
    }

    /// What telling descriptors apart takes, once the process is held.
    pub(super) fn place() -> Place {
        Place::new(FD_INFO, Access::Read)
    }

    /// The socket that the daemon has bound is kept from the next commit on.
    pub(super) fn keep_listener(&mut self, kept: Option<KeptListener<Arc<OwnedFd>>>) {
        self.listener = kept;
    }

    /// Where the device's queues write down what outlives the process.
    pub(super) fn keeper(&self) -> Arc<dyn Keeper> {
        Arc::new(StateKeeper(Arc::clone(self.image.state())))
    }

    /// A message begins to be dealt with, or has been.
    pub(super) fn set_busy(&self, busy: bool) {
        self.image.set_busy(busy || self.spoilt);
    }

    /// Writes what a successor is to take up, and has the service manager keep what that names.
    pub(super) fn commit(&mut self, session: Option<HeldLife>) {
        if let Err(why) = self.try_commit(session) {
            self.spoilt = true;
            self.image.set_busy(true);
            warn!("a successor cannot take this session up: {}", with_sources(&why));
        }
    }

    fn try_commit(&mut self, session: Option<HeldLife>) -> Result<(), Unusable> {
        let (device, listener) = (self.device.to_owned(), self.listener.clone());
        let is_over = session.is_none();
        let record = Record { device, next_serial: 0, listener, session };
        let stored = self.entries.iter().map(|entry| (Arc::as_ptr(&entry.file), entry.serial));
        let stored: HashMap<_, _> = stored.collect();
        let mut named = HashSet::new();
        let record = record.try_map(&mut |fd| {
            let known = stored.get(&Arc::as_ptr(&fd)).copied();
            let serial = known.unwrap_or_else(|| self.serial(fd));
            named.insert(serial);
            Ok::<_, Unusable>(serial)
        })?;
        let record = Record { next_serial: self.next_serial, ..record };
        let written = serde_json::to_vec(&record)?;
        if written != self.written {
            self.image.write(&written)?;
            self.written = written;
        }
        self.image.set_attempts(0);
        if is_over {
            self.spoilt = false;
            self.image.set_busy(false);
        }
        let (kept, gone): (Vec<_>, Vec<_>) =
            self.entries.drain(..).partition(|entry| named.contains(&entry.serial));
        self.entries = kept;
        gone.iter().for_each(|entry| self.manager.remove(&name_of(entry.serial)));
        Ok(())
    }

    /// The number of a descriptor that was not stored before this commit, if another of its file was not.
    fn serial(&mut self, fd: Arc<OwnedFd>) -> u64 {
        if let Some(entry) = self.entries.iter().find(|entry| Arc::ptr_eq(&entry.file, &fd)) {
            return entry.serial;
        }
        let identity = Identity::of(&fd, &self.fd_info);
        let mut same = self.entries.iter().filter(|entry| entry.identity == identity);
        if let (Some(_), Some(entry)) = (identity, same.next()) {
            return entry.serial;
        }
        let serial = self.next_serial;
        self.next_serial = self.next_serial.saturating_add(1);
        debug!(serial, ?identity, "stored");
        self.manager.store(&name_of(serial), &fd);
        self.entries.push(Entry { serial, identity, file: fd });
        serial
    }

    /// The session has ended: nothing of it is kept. The front end sees that at once, though the manager still has its
    /// connection for a moment.
    pub(super) fn end_session(&mut self, connection: &OwnedFd) {
        // It may have hung up.
        let _ = rustix::net::shutdown(connection, Shutdown::Both);
        self.commit(None);
    }
}

/// Closes the connection of a session that is not taken up.
pub(super) fn hang_up(life: &HeldLife) {
    // It may have hung up, or be no socket at all.
    let _ = rustix::net::shutdown(&life.connection, Shutdown::Both);
}

/// What a predecessor wrote, with the descriptors that it names.
struct Taken {
    held: HeldRecord,
    entries: Vec<Entry>,
}

/// Finds the image among what was kept, and in it what the rest is. `None`: there is none.
fn take_up(
    kept: &[(String, Arc<OwnedFd>)],
    device: &'static str,
    fd_info: &FdInfo,
) -> Result<Option<(Image, Taken)>, Unusable> {
    let Some((_, file)) = kept.iter().find(|(name, _)| name == IMAGE_NAME) else {
        if !kept.is_empty() {
            info!(count = kept.len(), "descriptors without an image are closed");
        }
        return Ok(None);
    };
    let (image, written) = Image::open(Arc::clone(file))?;
    let record: Record<u64> = serde_json::from_slice(&written)?;
    if record.device != device {
        return Err(Unusable::Device { found: record.device, device });
    }
    let mut entries: Vec<Entry> = kept
        .iter()
        .filter_map(|(name, file)| {
            let identity = Identity::of(file, fd_info);
            Some(Entry { serial: serial_of(name)?, identity, file: Arc::clone(file) })
        })
        .collect();
    let mut named = Vec::new();
    let held = record.try_map(&mut |serial| {
        named.push(serial);
        let found = entries.iter().find(|entry| entry.serial == serial);
        found.map(|entry| Arc::clone(&entry.file)).ok_or(Unusable::Missing { serial })
    })?;
    if held.listener.as_ref().is_some_and(|kept| !listener::listens(&kept.socket)) {
        return Err(Unusable::Listener);
    }
    entries.retain(|entry| named.contains(&entry.serial));
    Ok(Some((image, Taken { held, entries })))
}

/// What can be used of that which cannot be gone on with: the socket that was bound, where front ends may wait already. All
/// others end at once, though the manager still has them for a moment.
fn salvage(kept: &[(String, Arc<OwnedFd>)]) -> Option<KeptListener<Arc<OwnedFd>>> {
    let mut listener = None;
    for (_, fd) in kept {
        match listener::bound_to(fd) {
            Some(file) => listener = Some(KeptListener { socket: Arc::clone(fd), file }),
            // Most are no sockets.
            None => drop(rustix::net::shutdown(fd, Shutdown::Both)),
        }
    }
    listener
}

fn name_of(serial: u64) -> String {
    format!("{PREFIX}{serial}")
}

fn serial_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}
