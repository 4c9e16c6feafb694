//! `endpoint=stdio` and `endpoint=fd:N`: what was passed to the daemon. A socket, a pipe, a terminal, or a file.
//!
//! Contract: it is used as it is, but for a terminal that is the daemon's own standard input: that is raw while the endpoint
//! is open, except that the keys which send signals still do. At a console nobody waits for it; at a data port it is sent
//! every byte. The end of what comes ends only that; who cannot be written to any more is written to no more.
//!
//! That a read of it does not block is a property of the open file, which the daemon may share with the shell that started
//! it. So a pipe or a terminal is opened anew where the system has a name for it.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use common::daemon::listener::{duplicate, release};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::OpenError;
use super::at::At;
use super::wire::{Delivery, Wire, deliver, hear, show};

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Stream {
    name: Name,
    input: Option<OwnedFd>,
    /// None: the input, or nothing, as [`Name`] has it.
    output: Option<OwnedFd>,
    terminal: Mutex<Option<RawTerminal>>,
    has_input_ended: AtomicBool,
    has_output_ended: AtomicBool,
    lost_bytes: AtomicU64,
}

/// How the operator calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Stdio,
    Fd(RawFd),
}

impl std::fmt::Display for Name {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdio => write!(out, "stdio"),
            Self::Fd(fd) => write!(out, "fd:{fd}"),
        }
    }
}

/// What is read from and what is written to.
struct Wires {
    input: Option<Rc<Wire>>,
    output: Option<Rc<Wire>>,
}

/// Which way a descriptor is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ways {
    reads: bool,
    writes: bool,
}

impl Ways {
    fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(fd)? & OFlags::ACCMODE;
        Ok(Self { reads: flags != OFlags::WRONLY, writes: flags != OFlags::RDONLY })
    }

    fn flags(self) -> OFlags {
        match self {
            Self { reads: true, writes: true } => OFlags::RDWR,
            Self { reads: false, .. } => OFlags::WRONLY,
            Self { writes: false, .. } => OFlags::RDONLY,
        }
    }
}

impl Stream {
    /// Standard input and output.
    pub(crate) fn stdio() -> Result<Self, OpenError> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let failed = |fd| {
            move |source| OpenError::Descriptor { endpoint: Name::Stdio.to_string(), fd, source }
        };
        let terminal = RawTerminal::new(stdin.as_fd()).map_err(failed(0))?;
        let input = unblocked(stdin.as_fd(), OFlags::RDONLY).map_err(failed(0))?;
        let output = unblocked(stdout.as_fd(), OFlags::WRONLY).map_err(failed(1))?;
        Ok(Self::new(Name::Stdio, Some(input), Some(output), terminal))
    }

    /// The descriptor that whoever started the daemon has passed.
    pub(crate) fn passed(fd: RawFd) -> Result<Self, OpenError> {
        let name = Name::Fd(fd);
        if is_our_own(fd) {
            return Err(OpenError::OwnDescriptor { endpoint: name.to_string(), fd });
        }
        let failed = |source| OpenError::Descriptor { endpoint: name.to_string(), fd, source };
        let passed = duplicate(fd).map_err(failed)?;
        let stream = Self::owned(name, passed).map_err(failed)?;
        release(fd).map_err(failed)?;
        Ok(stream)
    }

    fn owned(name: Name, fd: OwnedFd) -> io::Result<Self> {
        let ways = Ways::of(fd.as_fd())?;
        let fd = unblocked(fd.as_fd(), ways.flags())?;
        let (input, output) = match ways {
            Ways { reads: true, .. } => (Some(fd), None),
            Ways { reads: false, .. } => (None, Some(fd)),
        };
        Ok(Self::new(name, input, output, None))
    }

    fn new(
        name: Name,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        terminal: Option<RawTerminal>,
    ) -> Self {
        Self {
            name,
            input,
            output,
            terminal: Mutex::new(terminal),
            has_input_ended: AtomicBool::new(false),
            has_output_ended: AtomicBool::new(false),
            lost_bytes: AtomicU64::new(0),
        }
    }

    pub(crate) fn close(&self) {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub(crate) fn describe(&self) -> Value {
        let has_ended =
            |flag: &AtomicBool| if flag.load(Ordering::Relaxed) { "ended" } else { "ok" };
        let (kind, fd) = match self.name {
            Name::Stdio => ("stdio", None),
            Name::Fd(fd) => ("fd", Some(fd)),
        };
        json!({
            "kind": kind,
            "fd": fd,
            "input": has_ended(&self.has_input_ended),
            "output": has_ended(&self.has_output_ended),
            "lost_bytes": self.lost_bytes.load(Ordering::Relaxed),
        })
    }

    pub(crate) async fn serve(&self, at: &At) -> Infallible {
        let Wires { input, output } = match self.wires() {
            Ok(wires) => wires,
            Err(cause) => {
                warn!(%cause, "endpoint={} cannot be served", self.name);
                return std::future::pending().await;
            }
        };
        let puts_out = async {
            if let Some(wire) = output {
                self.put_out(at, &wire).await;
            }
            self.has_output_ended.store(true, Ordering::Relaxed);
        };
        let hears = async {
            if let Some(wire) = input {
                // Why nothing comes any more is all the same.
                let _ = hear(at, &wire, || true).await;
                info!("endpoint={}: nothing more comes from there", self.name);
            }
            self.has_input_ended.store(true, Ordering::Relaxed);
        };
        tokio::join!(puts_out, hears);
        std::future::pending().await
    }

    fn wires(&self) -> io::Result<Wires> {
        let wire = |fd: &Option<OwnedFd>| {
            let fd = fd.as_ref().map(OwnedFd::try_clone).transpose()?;
            io::Result::Ok(fd.map(Wire::new).transpose()?.map(Rc::new))
        };
        let (input, output) = (wire(&self.input)?, wire(&self.output)?);
        let writes = |fd: &OwnedFd| Ways::of(fd.as_fd()).is_ok_and(|ways| ways.writes);
        let both = input.clone().filter(|_| self.input.as_ref().is_some_and(writes));
        Ok(Wires { output: output.or(both), input })
    }

    /// Writes what the port puts out until it cannot be written any more.
    async fn put_out(&self, at: &At, wire: &Wire) {
        if at.is_console() {
            let replay = at.port().transcript().replay();
            tokio::select! {
                _ = show(at, replay, wire, &self.lost_bytes) => {}
                () = wire.hung_up() => {}
            }
        } else {
            let mut delivery = Delivery::new(at);
            tokio::select! {
                _ = deliver(at, wire, &mut delivery) => {}
                () = wire.hung_up() => {}
            }
            self.lost_bytes.fetch_add(delivery.undelivered_bytes(), Ordering::Relaxed);
        }
        info!("endpoint={}: nobody takes output there any more", self.name);
    }
}

/// Whether the daemon has opened this number itself: what is passed to a program is not closed when it starts. Where the
/// system does not tell, no.
fn is_our_own(fd: RawFd) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).unwrap_or(0);
    OFlags::from_bits_retain(flags).contains(OFlags::CLOEXEC)
}

/// A descriptor of the same file that does not block, where that can be had.
fn unblocked(fd: BorrowedFd<'_>, ways: OFlags) -> io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
    if matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        let flags = ways | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        if let Ok(anew) = rustix::fs::open(name, flags, Mode::empty()) {
            return Ok(anew);
        }
    }
    let own = fd.try_clone_to_owned()?;
    if kind != FileType::RegularFile {
        let flags = rustix::fs::fcntl_getfl(&own)?;
        rustix::fs::fcntl_setfl(&own, flags | OFlags::NONBLOCK)?;
    }
    Ok(own)
}

/// A terminal that is raw until this is dropped.
struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl std::fmt::Debug for RawTerminal {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_tuple("RawTerminal").field(&self.terminal).finish()
    }
}

impl RawTerminal {
    /// `None`: it is no terminal.
    fn new(fd: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(fd) else { return Ok(None) };
        let mut raw = before.clone();
        raw.make_raw();
        // Who started the daemon here must be able to end it.
        raw.local_modes |= LocalModes::ISIG;
        tcsetattr(fd, OptionalActions::Now, &raw)?;
        Ok(Some(Self { terminal: fd.try_clone_to_owned()?, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(cause) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            warn!(%cause, "the terminal stays raw");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
    use std::os::unix::net::UnixStream as StdStream;

    use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
    use rustix::termios::{InputModes, LocalModes, tcgetattr};
    use serde_json::Value;

    use super::RawTerminal;
    use crate::endpoint::stage::{Peer, Stage, pattern};
    use crate::port_spec::{EndpointSpec, PortSpec};

    fn description(stage: &Stage) -> Value {
        stage.hub.describe()[0]["endpoints"][0].clone()
    }

    /// What an endpoint is given, as if it had been passed at start.
    fn pass(fd: impl Into<OwnedFd>) -> EndpointSpec {
        let fd: OwnedFd = fd.into();
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        EndpointSpec::Fd(fd.into_raw_fd())
    }

    fn peer() -> (EndpointSpec, StdStream) {
        let (ours, theirs) = StdStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (pass(ours), theirs)
    }

    #[test]
    fn socket_that_was_passed_is_a_data_ports_other_end() {
        let stage = Stage::new(1);
        let (spec, theirs) = peer();
        let mut guest = stage.plug("data", false, spec);
        let mut reads = stage.guest_that_reads(guest.id());
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            let (there, back) = (pattern(1 << 20), pattern((1 << 20) + 1));
            let mut peer = Peer(tokio::net::UnixStream::from_std(theirs).unwrap());
            tokio::join!(guest.write(&there), peer.expect(&there));
            tokio::join!(peer.write(&back), async {
                assert!(reads.read_exactly(back.len()).await == back);
            });
            drop(peer);
            while description(&stage)["output"] != "ended" {
                tokio::task::yield_now().await;
            }
            // The port stays open, and nobody is waited for.
            guest.write(&there).await;
            assert!(stage.is_host_open(0));
        });
        assert_eq!(description(&stage)["input"], "ended");
    }

    #[test]
    fn socket_of_a_console_is_shown_the_past_and_holds_up_nobody() {
        let stage = Stage::new(1);
        let (spec, theirs) = peer();
        let mut guest = stage.plug("console", true, spec);
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            guest.write(b"hello").await;
            let mut peer = Peer(tokio::net::UnixStream::from_std(theirs).unwrap());
            peer.expect(b"hello").await;
            peer.write(b"typed").await;
            assert_eq!(guest.read_exactly(5).await, b"typed");
            for part in pattern(2 << 20).chunks(32 << 10) {
                guest.write(part).await;
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn pipes_go_one_way_and_the_shells_end_still_blocks() {
        let stage = Stage::new(1);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::NONBLOCK).unwrap();
        let shells = writer.try_clone().unwrap();
        let mut guest = stage.plug("data", false, pass(writer));
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            guest.write(b"out").await;
            let mut bytes = [0; 3];
            while rustix::io::read(&reader, &mut bytes) != Ok(3) {
                tokio::task::yield_now().await;
            }
            assert_eq!(&bytes, b"out");
            let flags = rustix::fs::fcntl_getfl(&shells).unwrap();
            assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
            drop(reader);
            while description(&stage)["output"] != "ended" {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn file_that_was_passed_gets_every_byte() {
        let stage = Stage::new(1);
        let path = stage.path("file");
        let file = std::fs::File::create(&path).unwrap();
        let mut guest = stage.plug("data", false, pass(file));
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            let all = pattern(3 << 20);
            guest.write(&all).await;
            while std::fs::metadata(&path).unwrap().len() < all.len() as u64 {
                tokio::task::yield_now().await;
            }
            assert!(std::fs::read(&path).unwrap() == all);
        });
    }

    #[test]
    fn file_is_read_to_its_end() {
        let stage = Stage::new(1);
        let path = stage.path("file");
        let all = pattern(1 << 20);
        std::fs::write(&path, &all).unwrap();
        let mut guest = stage.plug("data", false, pass(std::fs::File::open(&path).unwrap()));
        stage.play(async || {
            assert!(guest.read_exactly(all.len()).await == all);
            while description(&stage)["input"] != "ended" {
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn descriptor_that_is_not_open_and_the_daemons_own_are_refused() {
        let stage = Stage::new(1);
        let own = tempfile::tempfile().unwrap();
        for (fd, reason) in [(900_000, "is it open"), (own.as_raw_fd(), "opened itself")] {
            let endpoints = vec![EndpointSpec::Fd(fd)];
            let spec = PortSpec { name: None, is_console: false, id: None, endpoints };
            let error = stage.hub.plug(&spec).unwrap_err().to_string();
            assert!(error.contains(&format!("fd:{fd}")) && error.contains(reason), "{error}");
        }
        rustix::io::fcntl_getfd(&own).unwrap();
    }

    #[test]
    fn terminal_is_raw_but_for_signals_until_the_end() {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap();
        let mut terminal =
            std::fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let raw = RawTerminal::new(terminal.as_fd()).unwrap().unwrap();
        let meanwhile = tcgetattr(&terminal).unwrap();
        assert!(!meanwhile.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO));
        assert!(meanwhile.local_modes.contains(LocalModes::ISIG));
        assert!(!meanwhile.input_modes.contains(InputModes::ICRNL));
        drop(raw);
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.input_modes, before.input_modes);
        let (mut ours, mut bytes) = (std::fs::File::from(ours), [0; 2]);
        ours.write_all(b"\r").unwrap();
        terminal.read_exact(&mut bytes[..1]).unwrap();
        assert_eq!(bytes[0], b'\n');
        assert!(RawTerminal::new(tempfile::tempfile().unwrap().as_fd()).unwrap().is_none());
    }
}
