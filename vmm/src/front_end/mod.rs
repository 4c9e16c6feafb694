//! The front end of one device: what the guest's side sees of it, whether or not a daemon is there.
//!
//! Contract: a [`FrontEnd`] has a thread of its own, which alone waits for the daemon ([`keeper`]). All that is here
//! returns at once: a virtual processor may call it. What the driver wants (rings that run or none, bytes in the
//! configuration space) is left here, and the thread brings it about; what the daemon says (its features, its
//! configuration) is left here by the thread. The description that a guest has been given stands for good: a daemon that
//! cannot serve it is not talked to.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod channel;
mod control;
mod keeper;
mod kind;
mod relay;
mod session;
pub(crate) mod setup;
mod watchdog;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use tracing::debug;
use vm_memory::GuestMemoryMmap;

use self::keeper::Keeper;
pub(crate) use self::kind::Kind;
pub(crate) use self::session::Limits;
use self::session::Offer;
use self::setup::Setup;
pub(crate) use self::watchdog::Watchdog;
use crate::interrupts::Call;
use crate::seccomp::{Role, Sandbox, confine};

/// Writes to the configuration space that wait for the daemon; what is more is lost. A driver waits for none of them, and
/// makes them one by one: a console's emergency bytes are the most.
const WRITES_MAX: usize = 256;

/// How long the end of a front end may take. It waits for no daemon, so any will do.
const END_LIMIT: Duration = Duration::from_secs(2);

/// What a front end is made for.
#[derive(Clone, Debug)]
pub(crate) struct DeviceConfig {
    pub(crate) kind: Kind,
    /// What messages call it.
    pub(crate) name: String,
    /// Where its daemon listens.
    pub(crate) socket: PathBuf,
    /// The largest size of a queue that the driver is offered: a power of two.
    pub(crate) queue_size: u16,
}

/// What a guest is told of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) features: u64,
    pub(crate) queue_count: u16,
    pub(crate) queue_size: u16,
}

/// What has happened to a device's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// A daemon is there.
    pub(crate) is_connected: bool,
    /// Daemons that there have been.
    pub(crate) connections: u64,
    /// Messages of theirs that the configuration has changed.
    pub(crate) config_changes: u64,
    /// Bytes that the driver wrote to the configuration space, and no daemon got.
    pub(crate) writes_lost: u64,
    /// How often its thread was woken while a daemon was there.
    pub(crate) wakeups: u64,
}

/// A device's front end.
pub(crate) struct FrontEnd {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What both sides look at.
struct Shared {
    name: String,
    kind: Kind,
    queue_size: u16,
    state: Mutex<State>,
    /// The description is there, or the rings have stopped.
    changed: Condvar,
    /// Wakes the thread.
    wake: OwnedFd,
    is_connected: AtomicBool,
    connections: AtomicU64,
    config_changes: AtomicU64,
    writes_lost: AtomicU64,
    wakeups: AtomicU64,
}

#[derive(Default)]
struct State {
    /// What the first daemon said, and what the last one has in its configuration space.
    offer: Option<Offer>,
    generation: u8,
    /// The configuration has changed, and the driver has read nothing of it since.
    has_unread: bool,
    /// The configuration has changed since the driver has last asked.
    has_changed: bool,
    config_call: Option<Call>,
    /// What the driver wants to have served.
    wanted: Option<Arc<Setup>>,
    /// A daemon may be at work on rings.
    may_run: bool,
    writes: VecDeque<(u32, Vec<u8>)>,
    /// Queues whose kicks have not gone by an eventfd of KVM.
    kicks: BTreeSet<u16>,
    /// The connection that there is, or that is being made.
    socket: Option<Arc<UnixStream>>,
    is_over: bool,
    has_ended: bool,
}

impl FrontEnd {
    /// A front end that looks for its daemon from now on.
    pub(crate) fn new(
        config: DeviceConfig,
        memory: GuestMemoryMmap,
        watchdog: Arc<Watchdog>,
        limits: Limits,
        sandbox: Sandbox,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::new(&config)?);
        let keeper = Keeper::new(Arc::clone(&shared), config.socket, memory, watchdog, limits);
        let thread = std::thread::Builder::new().name("front-end".to_owned());
        let thread = Some(thread.spawn(move || {
            confine(Role::FrontEnd, sandbox);
            keeper.run();
        })?);
        Ok(Self { shared, thread })
    }

    /// A front end without a thread, of a network whose daemon has offered these queues, and is gone.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn alone(features: u64, queue_count: u16, queue_size: u16) -> io::Result<Self> {
        let kind = Kind::Network(None);
        let (name, socket) = Default::default();
        let shared = Shared::new(&DeviceConfig { kind, name, socket, queue_size })?;
        let config = vec![1; kind.config_bytes()];
        shared.state().offer = Some(Offer { features, queue_count, config });
        Ok(Self { shared: Arc::new(shared), thread: None })
    }

    /// What messages call it: the path of its daemon's socket, or its place among those of its kind.
    pub(crate) fn name(&self) -> &str {
        &self.shared.name
    }

    pub(crate) fn kind(&self) -> Kind {
        self.shared.kind
    }

    /// Waits for the first daemon for at most `limit`; says whether it has been there.
    pub(crate) fn wait_for_daemon(&self, limit: Duration) -> bool {
        self.shared.wait(limit, |state| state.offer.is_some())
    }

    /// What the guest is told; of a device without queues, before a daemon was there.
    pub(crate) fn description(&self) -> Description {
        let state = self.shared.state();
        let (features, queue_count) =
            state.offer.as_ref().map_or((0, 0), |offer| (offer.features, offer.queue_count));
        Description { features, queue_count, queue_size: self.shared.queue_size }
    }

    /// The queue of a driver with these features that is a network's control queue.
    pub(crate) fn control_queue(&self, features: u64) -> Option<u16> {
        let state = self.shared.state();
        let config = state.offer.as_ref().map_or(&[][..], |offer| &offer.config);
        self.shared.kind.control_queue(features, config)
    }

    /// Has the driver's rings served, now and by every daemon that comes, until [`FrontEnd::stop`].
    pub(crate) fn start(&self, setup: Setup) {
        self.shared.state().wanted = Some(Arc::new(setup));
        self.shared.wake();
    }

    /// Kicks a queue for the driver.
    pub(crate) fn kick(&self, index: u16) {
        self.shared.state().kicks.insert(index);
        self.shared.wake();
    }

    /// Has the daemon let go of the rings: [`FrontEnd::is_idle`] says when it has.
    pub(crate) fn stop(&self) {
        self.shared.state().wanted = None;
        self.shared.wake();
    }

    /// No daemon is at work on rings, nor will one be before the next [`FrontEnd::start`].
    pub(crate) fn is_idle(&self) -> bool {
        self.shared.state().is_idle()
    }

    /// Waits until it is idle, for at most `limit`; says whether it is.
    pub(crate) fn wait_until_idle(&self, limit: Duration) -> bool {
        self.shared.wait(limit, State::is_idle)
    }

    /// Reads the configuration space, as the daemon had it last; beyond its end there are zeros.
    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut state = self.shared.state();
        // VIRTIO 1.3, 4.1.4.3.1: the device MUST present a changed config_generation after the driver has read a value that
        // has changed. With a count of all changes, 256 of them would be none.
        if std::mem::take(&mut state.has_unread) {
            state.generation = state.generation.wrapping_add(1);
        }
        let config = state.offer.iter().flat_map(|offer| &offer.config);
        for (into, from) in data.iter_mut().zip(config.skip(at)) {
            *into = *from;
        }
    }

    /// Leaves a write to the configuration space for the daemon.
    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        let kind = self.shared.kind;
        let Ok(at) = usize::try_from(offset) else { return };
        let end = at.saturating_add(data.len());
        let (Ok(offset), true) = (u32::try_from(at), end <= kind.config_bytes()) else { return };
        let mut state = self.shared.state();
        let config = state.offer.iter_mut().flat_map(|offer| &mut offer.config);
        for ((place, byte), new) in config.enumerate().skip(at).zip(data) {
            // The driver may read this before the daemon has answered.
            if kind.keeps_written(place) {
                *byte = *new;
            }
        }
        if state.writes.len() < WRITES_MAX {
            state.writes.push_back((offset, data.to_vec()));
        } else {
            self.shared.lose_write(data.len());
        }
        drop(state);
        self.shared.wake();
    }

    /// Another number each time that the driver has read of a configuration which has changed.
    pub(crate) fn generation(&self) -> u8 {
        self.shared.state().generation
    }

    /// Whether the configuration has changed since this was last asked.
    pub(crate) fn take_config_changed(&self) -> bool {
        std::mem::take(&mut self.shared.state().has_changed)
    }

    /// What is written to when the configuration changes.
    pub(crate) fn set_config_call(&self, call: Option<Call>) {
        self.shared.state().config_call = call;
    }

    /// Tells the driver to look at the configuration, and at the device's status.
    pub(crate) fn raise_config(&self) {
        self.shared.state().raise_config();
    }

    pub(crate) fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            is_connected: self.shared.is_connected.load(Ordering::Relaxed),
            connections: load(&self.shared.connections),
            config_changes: load(&self.shared.config_changes),
            writes_lost: load(&self.shared.writes_lost),
            wakeups: load(&self.shared.wakeups),
        }
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_over = true;
        if let Some(socket) = state.socket.take() {
            let _closed_already = socket.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.wake();
        // A daemon can have it wait where it should not, by an eventfd that they share: nobody waits along.
        if let Some(thread) = self.thread.take()
            && self.shared.wait(END_LIMIT, |state| state.has_ended)
        {
            let _ended = thread.join();
        }
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.wanted.is_none() && !self.may_run
    }

    fn raise_config(&mut self) {
        self.has_changed = true;
        if let Some(call) = &self.config_call {
            call.raise();
        }
    }
}

impl Shared {
    fn new(config: &DeviceConfig) -> io::Result<Self> {
        Ok(Self {
            name: config.name.clone(),
            kind: config.kind,
            queue_size: config.queue_size,
            state: Mutex::default(),
            changed: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_connected: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            config_changes: AtomicU64::new(0),
            writes_lost: AtomicU64::new(0),
            wakeups: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            debug!(device = self.name, %error, "its thread has not looked for long");
        }
    }

    /// It has been woken.
    fn take_wake(&self) {
        let _not_woken = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    fn wait(&self, limit: Duration, is_so: impl Fn(&State) -> bool) -> bool {
        let begin = Instant::now();
        let mut state = self.state();
        while !is_so(&state) {
            let Some(left) = limit.checked_sub(begin.elapsed()) else { return false };
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lose_write(&self, len: usize) {
        self.writes_lost.fetch_add(len as u64, Ordering::Relaxed);
    }
}
