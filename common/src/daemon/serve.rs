//! One front end after another, until a signal or the only connection's end.

use std::convert::Infallible;
use std::error::Error;
use std::os::unix::net::UnixStream as StdStream;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::control::{self, Answers, Command, Reply};
use super::front_end::{End, FrontEnd};
use super::listener::{self, Endpoint, Sockets};
use super::{DaemonOptions, log, notify};
use crate::device::Device;
use crate::memory::sigbus;
use crate::metrics::Metrics;
use crate::worker::{WorkerEvent, Workers};

/// How long requests in flight may take to end after a termination signal. The service manager and
/// the VMM wait for us (vhost-user, "Backend program conventions": "must end quickly").
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Pause after a failed accept (no descriptors left, in general), which would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

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

/// Serves the device that `open` opens until told to end. The exit status is 1, and the log says
/// why, where something could not be opened.
pub fn run<D: Device, E: Error + 'static>(
    options: &DaemonOptions,
    open: impl FnOnce() -> Result<D, E>,
) -> ExitCode {
    log::start(options.log_level);
    match start(options, open) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{}", chain(failure.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Opens everything, then serves.
fn start<D: Device, E: Error + 'static>(
    options: &DaemonOptions,
    open: impl FnOnce() -> Result<D, E>,
) -> Result<(), Box<dyn Error>> {
    sigbus::install();
    let sockets = listener::open(options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From here on a signal waits until the daemon serves, and ends it in good order.
    let signals = {
        let _runtime = runtime.enter();
        Signals::new()?
    };
    let device = Arc::new(open()?);
    let metrics = Arc::new(Metrics::new(D::NAME, D::KINDS, device.queue_count()));
    let (workers, events) = Workers::start(Arc::clone(&device), options.threads, &metrics)?;
    let daemon = Daemon { device, workers, events, metrics };
    Ok(runtime.block_on(daemon.serve(sockets, signals))?)
}

struct Daemon<D: Device> {
    device: Arc<D>,
    workers: Workers<D>,
    events: mpsc::Receiver<WorkerEvent>,
    metrics: Arc<Metrics>,
}

/// The signals that a daemon heeds.
struct Signals {
    termination: Termination,
    /// SIGHUP: look again at what the device is made of.
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
    async fn serve(mut self, sockets: Sockets, mut signals: Signals) -> Result<(), Failure> {
        let Sockets { vhost_user, control } = sockets;
        let answers = Rc::new(Figures(Arc::clone(&self.metrics)));
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
        let front_ends = async {
            match vhost_user {
                Endpoint::Listening(listener) => {
                    let socket = tokio_listener(listener.socket)?;
                    self.serve_all(&socket, &mut signals).await
                }
                Endpoint::Connected(stream) => {
                    notify::ready("serving the front end that was given");
                    self.serve_one(stream, None, &mut signals).await.map(drop)
                }
            }
        };
        tokio::select! {
            ended = front_ends => {
                notify::stopping();
                ended
            }
            never = operators => match never {},
        }
    }

    /// Serves front ends one after another.
    async fn serve_all(
        &mut self,
        listener: &UnixListener,
        signals: &mut Signals,
    ) -> Result<(), Failure> {
        notify::ready("waiting for a front end");
        info!("waiting for a front end");
        let mut next = None;
        loop {
            let accepted = match next.take() {
                Some(stream) => Ok(stream),
                None => tokio::select! {
                    accepted = listener.accept() => accepted.and_then(|(new, _)| new.into_std()),
                    () = signals.termination.requested() => return Ok(()),
                    _ = signals.refresh.recv() => {
                        self.device.refresh();
                        continue;
                    }
                },
            };
            match accepted {
                Ok(stream) => {
                    notify::status("serving a front end");
                    let others = Some((listener, &mut next));
                    if self.serve_one(stream, others, signals).await? == Then::Exit {
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
        stream: StdStream,
        others: Option<(&UnixListener, &mut Option<StdStream>)>,
        signals: &mut Signals,
    ) -> Result<Then, Failure> {
        let Signals { termination, refresh } = signals;
        let pid = socket_peercred(&stream).map_or(0, |peer| peer.pid.as_raw_nonzero().get());
        info!(pid, "front end connected");
        self.metrics.daemon.sessions.add(1);
        // What workers said of the last session is no business of this one.
        while self.events.try_recv().is_ok() {}
        let current = stream.try_clone().map_err(Failure::Socket)?;
        let mut front_end = FrontEnd::new(stream, &*self.device, &mut self.workers, &self.metrics)
            .map_err(Failure::Socket)?;
        let end = tokio::select! {
            end = front_end.serve(&mut self.events, refresh) => Some(end),
            () = termination.requested() => None,
            never = turn_away(others, &current, &self.metrics) => match never {},
        };
        // Whoever connects from here on waits until this session is drained.
        match end {
            Some(End::HangUp) => info!("front end hung up"),
            // An engine that failed will not end what is in flight.
            Some(End::Engine(error)) => return Err(Failure::Engine(error)),
            Some(end) => {
                self.metrics.daemon.broken_sessions.add(1);
                warn!("session ended: {}", chain(&end));
            }
            None => {
                info!("told to end");
                give_up_after(DRAIN_MAX, front_end.drain()).await;
                return Ok(Then::Exit);
            }
        }
        let drained = front_end.drain();
        tokio::pin!(drained);
        tokio::select! {
            () = &mut drained => Ok(Then::Next),
            () = termination.requested() => {
                give_up_after(DRAIN_MAX, drained).await;
                Ok(Then::Exit)
            }
        }
    }
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
        notify::stopping();
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
    loop {
        match listener.accept().await {
            Ok((stream, _)) if has_hung_up(current) => {
                *next = stream.into_std().ok();
                return std::future::pending().await;
            }
            Ok((stream, _)) => refuse(&stream, metrics),
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

fn refuse(stream: &UnixStream, metrics: &Metrics) {
    metrics.daemon.refused_front_ends.add(1);
    let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
    warn!(pid, "refused a further front end: one is being served");
}

fn tokio_listener(socket: std::os::unix::net::UnixListener) -> Result<UnixListener, Failure> {
    UnixListener::from_std(socket).map_err(Failure::Socket)
}

/// An error and its sources, each said once.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Answers the operator from the counters.
struct Figures(Arc<Metrics>);

impl Answers for Figures {
    fn command(&self, command: Command) -> Reply {
        match command {
            Command::Stats => Ok(self.0.to_json()),
        }
    }

    fn openmetrics(&self) -> String {
        self.0.to_openmetrics()
    }
}
