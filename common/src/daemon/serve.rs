//! One front end after another, until a signal or the only connection's end.

use std::convert::Infallible;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::aio;
use super::confinement;
use super::control;
use super::front_end::{End, FrontEnd, Means, connection_of};
use super::listener::{self, Endpoint, Listener, Sockets};
use super::log::{self, RateLimit, with_sources};
use super::operator::Operator;
use super::refresh::Refresher;
use super::store::{HeldLife, KeptListener, Legacy, Store};
use super::{DaemonOptions, notify, watchdog};
use crate::device::{Device, Runtime};
use crate::memory::sigbus;
use crate::metrics::{Identity, Metrics, Vocabulary};
use crate::rate_limit::Change;
use crate::sandbox;
use crate::worker::{Nudge, WorkerEvent, Workers};

/// How long requests in flight may take to end after a termination signal. The service manager and
/// the VMM wait for us (vhost-user, "Backend program conventions": "must end quickly").
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Pause after a failed accept (no descriptors left, in general), which would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Lines that front ends, guests and faults of the host may write to the log in
/// [`LOG_INTERVAL`].
const LOG_LINES: u32 = 10;
/// The interval of [`LOG_LINES`].
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Why a daemon ended for another reason than being told to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot watch for signals")]
    Signals(#[source] std::io::Error),
    #[error("cannot use the socket")]
    Socket(#[source] std::io::Error),
    #[error("the I/O engine failed")]
    Engine(#[source] std::io::Error),
}

/// Serves the device that `open` opens until told to end, held to these limits at first. The exit status is 1, and the log says
/// why, where something could not be opened.
pub fn run<D: Device, E: Error + 'static>(
    options: &DaemonOptions,
    limits: &Change,
    open: impl FnOnce() -> Result<D, E>,
) -> ExitCode {
    log::start(options.log_level);
    match start(options, limits, open) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{}", with_sources(failure.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Opens everything, then serves.
fn start<D: Device, E: Error + 'static>(
    options: &DaemonOptions,
    limits: &Change,
    open: impl FnOnce() -> Result<D, E>,
) -> Result<(), Box<dyn Error>> {
    sandbox::choose(options.sandbox);
    notify::connect();
    sigbus::install();
    raise_descriptor_limit();
    let mut claimed = listener::claim(options)?;
    let kept = claimed.take_kept();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From here on a signal waits until the daemon serves, and ends it in good order.
    let signals = {
        let _runtime = runtime.enter();
        Signals::new()?
    };
    let device = Arc::new(open()?);
    let engine = aio::choose(options.aio)?;
    let identity = Identity { device: D::NAME, engine: engine.name() };
    let vocabulary = Vocabulary { kinds: D::KINDS, drops: D::DROPS, limits: D::LIMITS };
    let metrics = Arc::new(Metrics::new(identity, vocabulary, device.queue_count()));
    metrics.limits.change(limits);
    let (workers, events) = Workers::start(Arc::clone(&device), engine, options.threads, &metrics)?;
    let (mut store, legacy) = Store::open(kept, D::NAME).unzip();
    if let Some(store) = &store {
        device.keep_with(store.keeper());
    }
    let Legacy { listener, session } = legacy.unwrap_or_default();
    let mut sockets = claimed.listen_after(listener)?;
    match (&mut sockets.vhost_user, &mut store) {
        (Endpoint::Listening(listener), Some(store)) => keep_listener(listener, store),
        // Its one front end is whoever's it was that passed the connection.
        (Endpoint::Connected(_), _) => store = None,
        (Endpoint::Listening(_), None) => {}
    }
    confinement::enter(&*device, &sockets, store.as_ref().map(|_| Store::place()));
    let gate = RateLimit::new(LOG_LINES, LOG_INTERVAL);
    let refresher = Rc::new(Refresher::new(device));
    let daemon = Daemon { refresher, workers, events, metrics, gate, store };
    let served = runtime.block_on(daemon.serve(sockets, signals, session));
    // A thread that waits for a disk which hangs does not keep the process.
    runtime.shutdown_background();
    Ok(served?)
}

/// Has a socket that this process has bound outlive it. Its file does, too, where the service manager is known to keep the
/// socket: else nobody would listen there.
fn keep_listener(listener: &mut Listener, store: &mut Store) {
    let Some(file) = &listener.file else { return store.keep_listener(None) };
    let kept = listener.socket.try_clone().and_then(|socket| {
        Ok(KeptListener { socket: Arc::new(OwnedFd::from(socket)), file: file.identity()? })
    });
    match kept {
        Ok(kept) => store.keep_listener(Some(kept)),
        Err(error) => warn!(%error, "the socket cannot be kept for a successor"),
    }
    if notify::has_a_store()
        && let Some(file) = listener.file.take()
    {
        file.leave();
    }
}

/// What the device's own errands can have done.
struct Errands<'a, D: Device> {
    refresher: &'a Refresher<D>,
    nudge: Nudge<D::Queue>,
}

impl<D: Device> Runtime for Errands<'_, D> {
    fn config_changed(&self, news: &str) {
        self.refresher.config_changed(news);
    }

    fn look(&self) {
        self.nudge.look();
    }
}

struct Daemon<D: Device> {
    refresher: Rc<Refresher<D>>,
    workers: Workers<D>,
    events: mpsc::Receiver<WorkerEvent>,
    metrics: Arc<Metrics>,
    /// Bounds what front ends and guests can write to the log, however often they come.
    gate: RateLimit,
    /// Where a successor finds the session.
    store: Option<Store>,
}

/// A front end may pass a descriptor for each of its memory regions and three for each ring: more
/// than the usual soft limit, which is meant for programs that use `select`. Where it cannot be
/// raised, whoever passes too many is refused.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        info!(%error, "the limit of open files stays as it is");
    }
}

/// The signals that a daemon heeds.
struct Signals {
    termination: Termination,
    /// SIGHUP: look at the device's size again, and open its logs anew.
    refresh: Signal,
}

/// The signals that end a daemon.
struct Termination {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let watch = |kind| signal(kind).map_err(Failure::Signals);
        let (term, int) = (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
        Ok(Self { termination: Termination { term, int }, refresh: watch(SignalKind::hangup())? })
    }
}

impl Termination {
    async fn requested(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

impl<D: Device> Daemon<D> {
    async fn serve(
        mut self,
        sockets: Sockets,
        signals: Signals,
        legacy: Option<HeldLife>,
    ) -> Result<(), Failure> {
        let Sockets { vhost_user, control } = sockets;
        let Signals { mut termination, refresh } = signals;
        let refresher = Rc::clone(&self.refresher);
        let answers = Rc::new(Operator {
            metrics: Arc::clone(&self.metrics),
            throttle: self.workers.throttle(),
            refresher: Rc::clone(&refresher),
        });
        let (control, _control_file) = match control {
            Some(listener) => (Some(tokio_listener(listener.socket)?), listener.file),
            None => (None, None),
        };
        let operators = async {
            match control {
                Some(listener) => control::serve(listener, answers).await,
                None => std::future::pending().await,
            }
        };
        let errands = Errands { refresher: &refresher, nudge: self.workers.nudge() };
        let present = self.workers.roll_call();
        let front_ends = async {
            match vhost_user {
                Endpoint::Listening(listener) => {
                    let socket = tokio_listener(listener.socket)?;
                    self.serve_all(&socket, &mut termination, legacy).await
                }
                Endpoint::Connected(stream) => {
                    notify::ready("serving the front end that was given");
                    self.serve_one(Guest::New(stream), None, &mut termination).await.map(drop)
                }
            }
        };
        let errands = refresher.device().errands(&errands);
        tokio::pin!(errands);
        let ended = tokio::select! {
            ended = front_ends => ended,
            never = operators => match never {},
            never = refresher.watch(refresh) => match never {},
            never = watchdog::watch(&present) => match never {},
            never = &mut errands => match never {},
        };
        tokio::select! {
            settled = timeout(DRAIN_MAX, refresher.device().settle()) => {
                if settled.is_err() {
                    warn!("not all has found its place after {} s, ending all the same", DRAIN_MAX.as_secs());
                }
            }
            never = errands => match never {},
        }
        ended
    }

    /// Serves front ends one after another.
    async fn serve_all(
        &mut self,
        listener: &UnixListener,
        termination: &mut Termination,
        legacy: Option<HeldLife>,
    ) -> Result<(), Failure> {
        let mut next = None;
        if let Some(life) = legacy {
            let others = Some((listener, &mut next));
            notify::ready("serving a predecessor's front end");
            if self.serve_one(Guest::Left(Box::new(life)), others, termination).await? == Then::Exit
            {
                return Ok(());
            }
        }
        // Nobody goes on with what this process could not go on with.
        if let Some(store) = &mut self.store {
            store.commit(None);
        }
        notify::ready("waiting for a front end");
        info!("waiting for a front end");
        loop {
            let accepted = match next.take() {
                Some(stream) => Ok(stream),
                None => tokio::select! {
                    accepted = listener.accept() => accepted.and_then(|(new, _)| new.into_std()),
                    () = termination.requested() => {
                        notify::stopping();
                        return Ok(());
                    }
                },
            };
            match accepted {
                Ok(stream) => {
                    notify::status("serving a front end");
                    let others = Some((listener, &mut next));
                    if self.serve_one(Guest::New(stream), others, termination).await? == Then::Exit
                    {
                        return Ok(());
                    }
                    notify::status("waiting for a front end");
                }
                Err(error) => {
                    warn!(%error, "no front end can be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Serves one front end until it hangs up or is in the wrong, then drains. Of `others` that
    /// connect meanwhile, the one that comes when this one has hung up is the next.
    async fn serve_one(
        &mut self,
        guest: Guest,
        others: Option<(&UnixListener, &mut Option<StdStream>)>,
        termination: &mut Termination,
    ) -> Result<Then, Failure> {
        let Self { refresher, workers, events, metrics, gate, store } = self;
        // What workers said of the last session is no business of this one.
        while let Ok(event) = events.try_recv() {
            if let WorkerEvent::EngineFailed(error) = event {
                return Err(Failure::Engine(error));
            }
        }
        let means = Means { refresher, workers, metrics, gate, store: store.as_mut() };
        let (current, mut front_end) = match open(guest, means).await {
            Ok(opened) => opened,
            Err(then) => return Ok(then),
        };
        let leave = Notify::new();
        let has_successors = front_end.has_successors();
        let end = {
            let serving = front_end.serve(events, &leave);
            tokio::pin!(serving);
            let end = tokio::select! {
                end = &mut serving => Some(end),
                () = termination.requested() => None,
                never = turn_away(others, &current, metrics) => match never {},
            };
            match end {
                // A message that is being dealt with could not be left to anybody.
                None if has_successors => {
                    leave.notify_one();
                    timeout(DRAIN_MAX, serving).await.ok()
                }
                end => end,
            }
        };
        notify::status("finishing the requests in flight");
        // Whoever connects from here on waits until this session is drained.
        match end {
            // An engine that failed will not end what is in flight.
            Some(End::Engine(error)) => return Err(Failure::Engine(error)),
            None | Some(End::Told) => {
                info!("told to end");
                notify::stopping();
                if has_successors {
                    give_up_after(DRAIN_MAX, front_end.hand_over()).await;
                } else {
                    give_up_after(DRAIN_MAX, front_end.drain()).await;
                }
                return Ok(Then::Exit);
            }
            Some(end) => front_end.say_farewell(&end),
        }
        let drained = front_end.drain();
        tokio::pin!(drained);
        tokio::select! {
            () = &mut drained => Ok(Then::Next),
            () = termination.requested() => {
                notify::stopping();
                give_up_after(DRAIN_MAX, drained).await;
                Ok(Then::Exit)
            }
        }
    }
}

/// Whom to serve.
enum Guest {
    /// A front end that has just connected.
    New(StdStream),
    /// One that a predecessor has served.
    Left(Box<HeldLife>),
}

/// Begins a session, or takes one up; else what is to follow. Gives its connection once more.
async fn open<D: Device>(
    guest: Guest,
    means: Means<'_, D>,
) -> Result<(StdStream, FrontEnd<'_, D>), Then> {
    let (stream, life) = match guest {
        Guest::New(stream) => (Ok(stream), None),
        Guest::Left(life) => (connection_of(&life), Some(life)),
    };
    if life.is_none() {
        means.refresher.device().new_session();
    }
    if let Ok(stream) = &stream {
        let pid = peer_of(stream);
        means.gate.log(Instant::now(), || info!(pid, "front end connected"));
    }
    means.metrics.daemon.sessions.add(1);
    let opened = stream.and_then(|stream| {
        let current = stream.try_clone()?;
        FrontEnd::new(stream, means).map(|new| (current, new))
    });
    let (current, mut front_end) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            warn!(%error, "the front end cannot be served");
            sleep(ACCEPT_PAUSE).await;
            return Err(Then::Next);
        }
    };
    if let Some(life) = life
        && let Err(why) = front_end.take_up(*life).await
    {
        warn!("a predecessor's session is not taken up: {}", with_sources(&why));
        front_end.drain().await;
        return Err(Then::Next);
    }
    Ok((current, front_end))
}

/// The process at the other end of a socket; 0 if it cannot be seen from here.
fn peer_of(stream: &StdStream) -> i32 {
    getsockopt(stream, PeerCredentials).map_or(0, |peer| peer.pid())
}

/// What follows a session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Next,
    Exit,
}

async fn give_up_after(limit: Duration, drained: impl Future<Output = ()>) {
    if timeout(limit, drained).await.is_err() {
        warn!("requests are still in flight after {} s, ending all the same", limit.as_secs());
        // The workers wait for the kernel, which would not let the process end in good order.
        std::process::exit(1);
    }
}

/// Turns away who connects while a front end is being served: one at a time. They see the end of
/// the connection at once, instead of waiting for nobody knows how long. But who comes when
/// `current` has hung up, of which its session may not have heard yet, is let in next.
async fn turn_away(
    others: Option<(&UnixListener, &mut Option<StdStream>)>,
    current: &StdStream,
    metrics: &Metrics,
) -> Infallible {
    let Some((listener, next)) = others else { return std::future::pending().await };
    let mut gate = RateLimit::new(LOG_LINES, LOG_INTERVAL);
    loop {
        match listener.accept().await {
            Ok((stream, _)) if has_hung_up(current) => {
                *next = stream.into_std().ok();
                return std::future::pending().await;
            }
            Ok((stream, _)) => {
                metrics.daemon.refused_front_ends.add(1);
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
                let served = peer_of(current);
                gate.log(Instant::now(), || {
                    warn!(pid, served, "refused a further front end: one is being served");
                });
            }
            Err(error) => {
                warn!(%error, "a further front end cannot be refused");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn has_hung_up(stream: &StdStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn tokio_listener(socket: std::os::unix::net::UnixListener) -> Result<UnixListener, Failure> {
    UnixListener::from_std(socket).map_err(Failure::Socket)
}
