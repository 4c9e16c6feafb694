//! The thread of a front end: it keeps a daemon connected, and brings about what the driver wants of it.
//!
//! Contract: whatever a daemon does, this thread goes on: it connects again, later and later, without end, and has the
//! next daemon take over where the last one was. It says once that it waits, once why it has cut a connection. A daemon
//! that stopped answering and was cut may still be at work on the rings, as one that died is not; the device that it
//! serves is the price.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;
use tracing::{debug, info, warn};
use vm_memory::GuestMemoryMmap;

use super::Shared;
use super::control::Control;
use super::relay::Relay;
use super::session::{Error, Inflight, Limits, Offer, Session};
use super::setup::Setup;
use super::watchdog::Watchdog;
use crate::readiness::wait_for;

/// Why there is no daemon.
#[derive(Debug, Error)]
enum Absent {
    #[error("no connection: nobody listens there")]
    Connect(#[source] io::Error),
    #[error("the daemon is of no use")]
    Session(#[from] Error),
    #[error(
        "the daemon is of no use: it has {found} queues and features {features:#x}, the guest knows others"
    )]
    Other { found: u16, features: u64 },
}

/// What is to be done next.
enum Task {
    End,
    Start(Arc<Setup>),
    Stop(Arc<Setup>),
    Write(u32, Vec<u8>),
    Kick(u16),
    Wait,
}

/// A driver's set-up, and what outlives a daemon of what it has served.
struct Served {
    setup: Arc<Setup>,
    inflight: Option<Inflight>,
    control: Option<Control>,
}

/// The thread's state.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    path: PathBuf,
    memory: GuestMemoryMmap,
    watchdog: Arc<Watchdog>,
    limits: Limits,
    /// What daemons have served, and the next one is to go on with.
    served: Option<Served>,
    /// That nobody is there has been said.
    has_said_so: bool,
}

impl Keeper {
    pub(super) fn new(
        shared: Arc<Shared>,
        path: PathBuf,
        memory: GuestMemoryMmap,
        watchdog: Arc<Watchdog>,
        limits: Limits,
    ) -> Self {
        Self { shared, path, memory, watchdog, limits, served: None, has_said_so: false }
    }

    /// Runs until the front end is dropped.
    pub(super) fn run(mut self) {
        let (first, last) = self.limits.backoff;
        let mut backoff = first;
        loop {
            let begin = Instant::now();
            match self.meet() {
                Ok(session) => self.attend(session),
                Err(absent) => self.say_absent(&absent),
            }
            self.shared.is_connected.store(false, Ordering::Relaxed);
            // Whoever was there is no longer.
            let mut state = self.shared.state();
            state.may_run = false;
            state.socket = None;
            drop(state);
            self.shared.changed.notify_all();
            // Those that come and go at once are waited for longer and longer.
            backoff = if begin.elapsed() > last { first } else { backoff };
            if self.rest(backoff) {
                self.shared.state().has_ended = true;
                return self.shared.changed.notify_all();
            }
            backoff = backoff.saturating_mul(2).min(last);
        }
    }

    fn say_absent(&mut self, absent: &Absent) {
        let cause = std::error::Error::source(absent).map(chain);
        let device = &self.shared.name;
        if std::mem::replace(&mut self.has_said_so, true) {
            debug!(device, cause, "{absent}");
        } else {
            warn!(device, cause, "{absent}; the device waits for a daemon");
        }
    }

    /// Connects, and learns who is there.
    fn meet(&mut self) -> Result<Session, Absent> {
        let socket = Arc::new(self.connect().map_err(Absent::Connect)?);
        self.shared.state().socket = Some(Arc::clone(&socket));
        let theirs = socket.try_clone().map_err(Absent::Connect)?;
        let watchdog = Arc::clone(&self.watchdog);
        let (session, offer) =
            Session::open(socket, theirs, self.shared.kind, watchdog, self.limits.reply)?;
        self.take_offer(offer)?;
        Ok(session)
    }

    /// A connected socket. The attempt itself does not wait, as it would for a daemon whose backlog is full.
    fn connect(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
        let socket = UnixStream::from(socket);
        socket.set_nonblocking(false)?;
        Ok(socket)
    }

    /// Tells the guest's side what a daemon offers: all of it the first time, its configuration from then on.
    fn take_offer(&mut self, mut offer: Offer) -> Result<(), Absent> {
        self.shared.kind.complete(&mut offer.config);
        let mut state = self.shared.state();
        let has_driver = state.wanted.is_some();
        match &mut state.offer {
            None => state.offer = Some(offer),
            Some(known) => {
                // What a driver uses is compared when its rings start: it may have accepted less than this.
                let is_less =
                    offer.queue_count < known.queue_count || known.features & !offer.features != 0;
                if is_less && !has_driver {
                    let (found, features) = (offer.queue_count, offer.features);
                    return Err(Absent::Other { found, features });
                }
                let is_other = known.config != offer.config;
                known.config = offer.config;
                if is_other {
                    state.has_unread = true;
                    state.raise_config();
                }
            }
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Serves the driver by this daemon until the connection ends.
    fn attend(&mut self, mut session: Session) {
        self.shared.is_connected.store(true, Ordering::Relaxed);
        let before = self.shared.connections.fetch_add(1, Ordering::Relaxed);
        if before > 0 || self.has_said_so {
            info!(device = self.shared.name, "a daemon is there");
        }
        self.has_said_so = false;
        match self.work(&mut session) {
            Ok(()) => debug!(device = self.shared.name, "the connection ends"),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(chain);
                warn!(device = self.shared.name, cause, "{error}; the daemon is lost");
                self.has_said_so = true;
            }
        }
    }

    fn work(&mut self, session: &mut Session) -> Result<(), Error> {
        let mut running: Option<Arc<Setup>> = None;
        let mut relay: Option<Relay> = None;
        loop {
            match self.next_task(running.as_ref()) {
                Task::End => return Ok(()),
                Task::Start(setup) => {
                    relay = self.start(session, &setup)?;
                    self.serve_control(session, relay.as_mut())?;
                    running = Some(setup);
                }
                Task::Stop(setup) => {
                    session.stop(&setup)?;
                    (running, relay) = (None, None);
                    self.served = None;
                    self.shared.state().may_run = false;
                    self.shared.changed.notify_all();
                }
                Task::Write(offset, bytes) => {
                    if !session.write_config(offset, &bytes)? {
                        self.shared.lose_write(bytes.len());
                        debug!(device = self.shared.name, offset, "the daemon refuses a write");
                    }
                    self.learn_config(session, false)?;
                }
                Task::Kick(index) => {
                    let setup = running.iter();
                    let mut rings =
                        setup.flat_map(|setup| setup.rings.iter().chain(&setup.control));
                    if let Some(ring) = rings.find(|ring| ring.index == index) {
                        let _full = ring.kick.write(1);
                    }
                }
                Task::Wait => {
                    if !self.wait(session, relay.as_mut())? {
                        // Or it was we who have.
                        if self.shared.state().is_over {
                            return Ok(());
                        }
                        info!(device = self.shared.name, "the daemon has hung up");
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Has the daemon serve the driver from where the last one was.
    fn start(&mut self, session: &mut Session, setup: &Arc<Setup>) -> Result<Option<Relay>, Error> {
        let is_same = |served: &Served| Arc::ptr_eq(&served.setup, setup);
        if !self.served.as_ref().is_some_and(is_same) {
            let ring = setup.control.as_ref();
            let control = ring
                .map(|ring| Control::new(ring, setup.features, self.memory.clone()))
                .transpose()?;
            self.served = Some(Served { setup: Arc::clone(setup), inflight: None, control });
        }
        let Some(Served { inflight, control, .. }) = &mut self.served else { return Ok(None) };
        let ring = setup.control.as_ref();
        let mut relay = ring.map(|ring| Relay::new(ring.index)).transpose()?;
        session.start(setup, &self.memory, relay.as_ref(), inflight)?;
        if let (Some(control), Some(relay)) = (control, &mut relay) {
            control
                .replay(|command| relay.carry_out(command, session.socket(), self.limits.reply))?;
        }
        Ok(relay)
    }

    /// Has the daemon carry out what commands there are.
    fn serve_control(&mut self, session: &Session, relay: Option<&mut Relay>) -> Result<(), Error> {
        let control = self.served.as_mut().and_then(|served| served.control.as_mut());
        if let (Some(control), Some(relay)) = (control, relay) {
            let limit = self.limits.reply;
            control.serve(|command| relay.carry_out(command, session.socket(), limit))?;
        }
        Ok(())
    }

    fn next_task(&self, running: Option<&Arc<Setup>>) -> Task {
        let mut state = self.shared.state();
        if state.is_over {
            return Task::End;
        }
        match (running, &state.wanted) {
            (Some(running), Some(wanted)) if Arc::ptr_eq(running, wanted) => {}
            (Some(running), _) => return Task::Stop(Arc::clone(running)),
            (None, Some(wanted)) => {
                let setup = Arc::clone(wanted);
                state.may_run = true;
                return Task::Start(setup);
            }
            (None, None) => {}
        }
        if let Some((offset, bytes)) = state.writes.pop_front() {
            return Task::Write(offset, bytes);
        }
        state.kicks.pop_first().map_or(Task::Wait, Task::Kick)
    }

    /// Waits for something to do; says whether the daemon still is there.
    fn wait(&mut self, session: &mut Session, relay: Option<&mut Relay>) -> Result<bool, Error> {
        let channel = session.channel().map(|channel| channel.socket().as_raw_fd());
        let control = self.served.as_ref().and_then(|served| served.control.as_ref());
        let kick = control.filter(|_| relay.is_some()).map(|control| control.kick().as_raw_fd());
        let wake = Some(self.shared.wake.as_raw_fd());
        let socket = Some(session.socket().as_raw_fd());
        let [hung_up, has_request, has_command, _] =
            wait_for([socket, channel, kick, wake], None).map_err(Error::Wait)?;
        self.shared.wakeups.fetch_add(1, Ordering::Relaxed);
        self.shared.take_wake();
        // Nothing was asked of it: whatever comes, the two are out of step.
        if hung_up {
            return Ok(false);
        }
        if has_command {
            self.serve_control(session, relay)?;
        }
        if has_request && session.take_request()? {
            self.shared.config_changes.fetch_add(1, Ordering::Relaxed);
            self.learn_config(session, true)?;
        }
        Ok(true)
    }

    /// Takes over the daemon's configuration, and tells the driver if it has changed or is said to have.
    fn learn_config(&self, session: &mut Session, is_told: bool) -> Result<(), Error> {
        let mut config = session.read_config()?;
        self.shared.kind.complete(&mut config);
        let mut state = self.shared.state();
        let Some(offer) = &mut state.offer else { return Ok(()) };
        if is_told || offer.config != config {
            offer.config = config;
            state.has_unread = true;
            state.raise_config();
        }
        Ok(())
    }

    /// Waits before the next attempt; says whether the front end is no longer wanted.
    fn rest(&self, time: Duration) -> bool {
        let begin = Instant::now();
        loop {
            if self.shared.state().is_over {
                return true;
            }
            let Some(left) = time.checked_sub(begin.elapsed()) else { return false };
            let wake = self.shared.wake.as_raw_fd();
            if let Err(error) = wait_for([Some(wake)], Some(left)) {
                warn!(device = self.shared.name, %error, "cannot wait");
            }
            self.shared.take_wake();
        }
    }
}

/// An error's causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
