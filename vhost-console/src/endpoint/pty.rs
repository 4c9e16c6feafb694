//! `endpoint=pty[:LINK]`: a pseudo-terminal, for programs that want a device to open (screen, minicom, picocom).
//!
//! Contract: the terminal is there from the beginning, raw, under the name that the kernel gave it and, if wanted, a link
//! that goes with the endpoint. Whether somebody has it open is noticed without looking time and again: when the last
//! one closes it the kernel says that the line is hung up, and when the next one opens it a watch on its file does. At
//! a console who opens it is shown what a viewer is, and may type; at a data port he is the client.
//!
//! Nothing is written while nobody has it open: the next one would read it as news.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, inotify};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, QueueSelector, tcflush, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::{info, warn};

use super::OpenError;
use super::at::At;
use super::client::{End, converse};
use super::wire::{Wire, hear, show};
use crate::watch::watch;

/// Where the kernel has its terminals.
const TERMINALS: &str = "/dev/pts/";

/// Pause after there were no descriptors left, in general, which would be so again at once.
const PAUSE: Duration = Duration::from_secs(1);

/// Room for the events that are thrown away: it is enough that there were some.
const EVENTS_BYTES: usize = 4096;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Pty {
    /// Our end.
    line: OwnedFd,
    /// The other end's file.
    path: PathBuf,
    link: Option<PathBuf>,
    link_file: Mutex<Option<Link>>,
    /// Readable when the other end was opened.
    openings: OwnedFd,
    is_open: AtomicBool,
    lost_bytes: AtomicU64,
}

/// A link to a terminal, which goes when this is dropped, unless something else has taken its place.
#[derive(Debug)]
struct Link {
    path: PathBuf,
    terminal: PathBuf,
}

impl Link {
    fn new(path: &Path, terminal: &Path) -> Result<Self, OpenError> {
        let failed = |step| {
            move |source: Errno| OpenError::Link {
                link: path.to_owned(),
                step,
                source: source.into(),
            }
        };
        match target(path) {
            Err(Errno::NOENT) => {}
            Ok(old) if old == terminal || is_gone(&old) => {
                rustix::fs::unlink(path).map_err(failed("remove the stale link"))?;
            }
            Ok(_) | Err(Errno::INVAL) => {
                return Err(OpenError::LinkTaken { link: path.to_owned() });
            }
            Err(errno) => return Err(failed("look at")(errno)),
        }
        rustix::fs::symlink(terminal, path).map_err(failed("create"))?;
        Ok(Self { path: path.to_owned(), terminal: terminal.to_owned() })
    }
}

/// A terminal whose other end is closed has no file.
fn is_gone(target: &Path) -> bool {
    target.starts_with(TERMINALS) && matches!(rustix::fs::lstat(target), Err(Errno::NOENT))
}

fn target(link: &Path) -> Result<PathBuf, Errno> {
    let target = rustix::fs::readlinkat(CWD, link, Vec::new())?;
    Ok(PathBuf::from(OsStr::from_bytes(target.as_bytes())))
}

impl Drop for Link {
    fn drop(&mut self) {
        if target(&self.path).as_ref() != Ok(&self.terminal) {
            return;
        }
        if let Err(cause) = rustix::fs::unlink(&self.path) {
            warn!(%cause, "the link {:?} cannot be removed", self.path);
        }
    }
}

impl Pty {
    pub(crate) fn open(link: Option<&Path>) -> Result<Self, OpenError> {
        let failed = |step| move |source: Errno| OpenError::Pty { step, source: source.into() };
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let line = openpt(flags).map_err(failed("open a pseudo-terminal"))?;
        grantpt(&line).map_err(failed("have the terminal for ourselves"))?;
        unlockpt(&line).map_err(failed("unlock the terminal"))?;
        let flags = rustix::fs::fcntl_getfl(&line).map_err(failed("look at the terminal"))?;
        rustix::fs::fcntl_setfl(&line, flags | OFlags::NONBLOCK)
            .map_err(failed("look at the terminal"))?;
        let name = ptsname(&line, Vec::new()).map_err(failed("find the terminal's name"))?;
        let path = PathBuf::from(OsStr::from_bytes(name.as_bytes()));
        set_raw(&path).map_err(failed("set the terminal raw"))?;
        // After we have opened and closed it ourselves: the line is hung up from here on until somebody comes.
        let openings =
            inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
                .map_err(failed("watch a file"))?;
        inotify::add_watch(&openings, &path, inotify::WatchFlags::OPEN)
            .map_err(failed("watch the terminal"))?;
        let link_file = link.map(|link| Link::new(link, &path)).transpose()?;
        info!("terminal {}", path.display());
        Ok(Self {
            line,
            path,
            link: link.map(Path::to_owned),
            link_file: Mutex::new(link_file),
            openings,
            is_open: AtomicBool::new(false),
            lost_bytes: AtomicU64::new(0),
        })
    }

    pub(crate) fn close(&self) {
        self.link_file.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(crate) fn describe(&self) -> Value {
        json!({
            "kind": "pty",
            "path": self.path,
            "link": self.link,
            "open": self.is_open.load(Ordering::Relaxed),
            "lost_bytes": self.lost_bytes.load(Ordering::Relaxed),
        })
    }

    pub(crate) async fn serve(&self, at: &At) -> Infallible {
        let openings =
            self.openings.try_clone().and_then(|openings| watch(openings, Interest::READABLE));
        let openings = match openings {
            Ok(openings) => openings,
            Err(cause) => {
                warn!(%cause, "the terminal {:?} cannot be served", self.path);
                return std::future::pending().await;
            }
        };
        loop {
            tokio::select! {
                biased;
                () = self.opened(&openings) => {}
                never = closed_to_guest(at) => match never {},
            }
            self.is_open.store(true, Ordering::Relaxed);
            info!("terminal {} opened", self.path.display());
            // Made anew each time: to the runtime a hang-up is for ever.
            match self.line.try_clone().and_then(Wire::new) {
                Ok(wire) if at.is_console() => self.show_console(at, &wire, &openings).await,
                Ok(wire) => {
                    let end = End { is_with_input: true, successor: self.reopened(&openings) };
                    let lost_bytes = converse(at, &wire, end).await;
                    self.lost_bytes.fetch_add(lost_bytes, Ordering::Relaxed);
                }
                Err(cause) => {
                    warn!(%cause, "the terminal {:?} cannot be served", self.path);
                    sleep(PAUSE).await;
                }
            }
            self.is_open.store(false, Ordering::Relaxed);
            info!("terminal {} closed", self.path.display());
            if let Err(cause) = self.clear() {
                warn!(%cause, "the terminal {:?} cannot be cleared", self.path);
            }
        }
    }

    /// Throws away what nobody has read at the other end: it is not for the next one.
    fn clear(&self) -> Result<(), Errno> {
        // What has not been passed on to the other end's reader yet, then what has: that only the other end can.
        tcflush(&self.line, QueueSelector::OFlush)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        tcflush(ioctl_tiocgptpeer(&self.line, flags)?, QueueSelector::IFlush)
    }

    /// Waits until somebody has the other end open, or had it open and left something to be read.
    async fn opened(&self, openings: &AsyncFd<OwnedFd>) {
        self.opened_while(openings, |line| {
            line.contains(PollFlags::HUP) && !line.contains(PollFlags::IN)
        })
        .await;
    }

    /// Waits until the next one has the other end open.
    async fn reopened(&self, openings: &AsyncFd<OwnedFd>) {
        self.opened_while(openings, |line| line.contains(PollFlags::HUP)).await;
    }

    /// Waits for openings of the other end while the line is so.
    async fn opened_while(&self, openings: &AsyncFd<OwnedFd>, is_so: impl Fn(PollFlags) -> bool) {
        while is_so(state(&self.line)) {
            let Ok(mut ready) = openings.readable().await else {
                return std::future::pending().await;
            };
            let clear = |events: &AsyncFd<OwnedFd>| {
                Ok(rustix::io::read(events.get_ref(), &mut [0; EVENTS_BYTES])?)
            };
            // One event or many: what counts is the line.
            let _ = ready.try_io(clear);
        }
    }

    /// Serves who has the terminal open until the last one has closed it.
    async fn show_console(&self, at: &At, wire: &Wire, openings: &AsyncFd<OwnedFd>) {
        let replay = at.port().transcript().replay();
        let is_silent = Notify::new();
        let looks_on = async {
            tokio::select! {
                _ = show(at, replay, wire, &self.lost_bytes) => {}
                () = wire.hung_up() => {}
                () = is_silent.notified() => {}
            }
        };
        let types = async {
            // It fails where the line is hung up: all that was typed has been read by then.
            let _ = hear(at, wire, || true).await;
            is_silent.notify_one();
        };
        tokio::pin!(types);
        tokio::select! {
            () = looks_on => {
                tokio::select! {
                    () = types => {}
                    // What is left of it is read with what the next one types.
                    () = self.reopened(openings) => {}
                }
            }
            () = &mut types => {}
        }
    }
}

/// Once nobody has it open, tells the guest of a data port.
async fn closed_to_guest(at: &At) -> Infallible {
    if !at.is_console() {
        at.tell_closed().await;
    }
    std::future::pending().await
}

/// So that bytes are what they are from the first opening on. Settings last while our end is open.
fn set_raw(terminal: &Path) -> Result<(), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = rustix::fs::open(terminal, flags, Mode::empty())?;
    let mut settings = tcgetattr(&terminal)?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)
}

/// Whether there is something to read from the line, and whether it is hung up.
fn state(line: impl AsFd) -> PollFlags {
    let mut fds = [PollFd::new(&line, PollFlags::IN)];
    // It fails for want of memory; then somebody comes, and is seen to have gone.
    let _ = poll(&mut fds, Some(&Timespec::default()));
    fds.iter().map(PollFd::revents).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::path::{Path, PathBuf};

    use rustix::fs::{Mode, OFlags};
    use serde_json::Value;

    use crate::endpoint::stage::{Stage, pattern};
    use crate::endpoint::wire::Wire;
    use crate::port_spec::{EndpointSpec, PortSpec};

    fn opened(terminal: &Path) -> Wire {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let terminal: OwnedFd = rustix::fs::open(terminal, flags, Mode::empty()).unwrap();
        Wire::new(terminal).unwrap()
    }

    async fn expect(terminal: &Wire, expected: &[u8]) {
        let mut all = Vec::new();
        let mut part = vec![0; 4096];
        while all.len() < expected.len() {
            let count = terminal.read(&mut part, || usize::MAX).await.unwrap().unwrap();
            all.extend(&part[..count]);
        }
        assert!(all == expected, "{:?}", String::from_utf8_lossy(&all[..all.len().min(200)]));
    }

    async fn write(terminal: &Wire, bytes: &[u8]) {
        terminal.write_all(bytes, &mut 0).await.unwrap();
    }

    fn description(stage: &Stage) -> Value {
        stage.hub.describe()[0]["endpoints"][0].clone()
    }

    async fn is_open(stage: &Stage, open: bool) {
        while description(stage)["open"] != open {
            tokio::task::yield_now().await;
        }
    }

    fn link(stage: &Stage) -> (EndpointSpec, PathBuf) {
        let link = stage.path("terminal");
        (EndpointSpec::Pty { link: Some(link.clone()) }, link)
    }

    #[test]
    fn whoever_opens_the_terminal_of_a_console_is_shown_it_and_types() {
        let stage = Stage::new(1);
        let (spec, link) = link(&stage);
        let mut guest = stage.plug("console", true, spec);
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            guest.write(b"before anybody came\r\n").await;
            for _ in 0..3 {
                let terminal = opened(&link);
                expect(&terminal, b"before anybody came\r\n").await;
                write(&terminal, b"\x03a\rb\n").await;
                assert_eq!(guest.read_exactly(5).await, b"\x03a\rb\n");
                drop(terminal);
                is_open(&stage, false).await;
            }
        });
        drop(stage);
        assert!(std::fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn terminal_that_nobody_reads_holds_up_nobody_and_is_empty_for_the_next() {
        let stage = Stage::new(1);
        let (spec, link) = link(&stage);
        let mut guest = stage.plug("console", true, spec);
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            let stalled = opened(&link);
            is_open(&stage, true).await;
            for part in pattern(1 << 20).chunks(32 << 10) {
                guest.write(part).await;
                tokio::task::yield_now().await;
            }
            drop(stalled);
            is_open(&stage, false).await;
            let last = pattern(64 << 10);
            guest.write(&last).await;
            let next = opened(&link);
            expect(&next, &last).await;
        });
    }

    #[test]
    fn data_port_is_open_while_its_terminal_is() {
        let stage = Stage::new(1);
        let (spec, link) = link(&stage);
        let mut guest = stage.plug("data", false, spec);
        let id = guest.id();
        let mut reads = stage.guest_that_reads(id);
        stage.play(async || {
            assert_eq!(guest.try_write(b"early"), 0);
            for _ in 0..3 {
                let terminal = opened(&link);
                guest.until(|port| port.takes_output()).await;
                let (there, back) = (pattern(1 << 20), pattern((1 << 20) + 1));
                tokio::join!(
                    guest.write(&there),
                    expect(&terminal, &there),
                    async { assert!(reads.read_exactly(back.len()).await == back) },
                    write(&terminal, &back),
                );
                drop(terminal);
                guest.until(|port| !port.takes_output()).await;
                while stage.is_host_open(0) {
                    tokio::task::yield_now().await;
                }
            }
        });
        assert_eq!(description(&stage)["lost_bytes"], 0);
    }

    #[test]
    fn what_was_typed_before_the_terminal_was_closed_arrives() {
        let stage = Stage::new(1);
        let (spec, link) = link(&stage);
        let mut guest = stage.plug("data", false, spec);
        stage.play(async || {
            // Before anybody has noticed that it is open.
            std::fs::write(&link, b"last words").unwrap();
            assert_eq!(guest.read_exactly(10).await, b"last words");
            while stage.is_host_open(0) {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn only_a_link_to_a_terminal_that_is_gone_is_replaced() {
        let stage = Stage::new(2);
        let (endpoint, link) = link(&stage);
        let spec = PortSpec { name: None, is_console: true, id: None, endpoints: vec![endpoint] };
        let refused = || {
            let error = stage.hub.plug(&spec).unwrap_err().to_string();
            assert!(error.contains("left as it is") && error.contains("terminal"), "{error}");
        };
        std::fs::write(&link, "a file").unwrap();
        refused();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        refused();
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("/dev/pts/999999", &link).unwrap();
        let id = stage.hub.plug(&spec).unwrap();
        assert!(std::fs::read_link(&link).unwrap().exists());
        refused();
        stage.hub.unplug(&id.to_string()).unwrap();
        assert!(std::fs::symlink_metadata(&link).is_err());
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        refused();
    }
}
