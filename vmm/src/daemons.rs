//! The daemons that this process starts itself: one for each device whose option says what is to be served.
//!
//! Contract: [`Daemons::start`] makes a listening socket for each, which outlives it, and a thread that runs it. One that ends
//! before [`Daemons::keep`] is a failure of the machine; one that ends later is started again, later and later. When
//! [`Daemons`] are dropped their daemons end: they are asked to, and made to when they take too long. Should this process
//! be killed, the kernel asks them. What a daemon says on its standard error is said on ours, behind the device's name.
//!
//! The socket's file is removed before anybody can connect, and front ends find it through `/proc/self/fd`: nothing is left
//! behind, however this process ends.
//!
//! What it deliberately does not do: know a daemon's options. They are handed on, and the daemon says what is wrong.
//!
//! `unsafe` is here because what a process does between fork and exec is.

#![allow(unsafe_code, reason = "see the end of this head")]

use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, pidfd_open, pidfd_send_signal,
    set_parent_process_death_signal,
};
use tracing::warn;

use crate::front_end::{DeviceConfig, Kind};

/// How long after its end a daemon is started again: first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How long a daemon may take to end: one whose storage hangs gives up after 5 s.
const GRACE: Duration = Duration::from_secs(10);
/// A longer line of a daemon's comes in pieces.
const LINE_BYTES_MAX: u64 = 8 << 10;

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot make a socket for a daemon in {}", std::env::temp_dir().display())]
    Socket(#[source] io::Error),
    #[error("cannot start a thread for a daemon")]
    Thread(#[source] io::Error),
    #[error("{device}: cannot start {program}: is it beside this program, or in PATH?")]
    Start { device: String, program: String, source: io::Error },
    #[error("{device}: {program} has ended: {status}")]
    Ended { device: String, program: String, status: ExitStatus },
}

/// A device, and who serves it.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) kind: Kind,
    pub(crate) queue_size: u16,
    pub(crate) daemon: Whose,
}

/// Whose its daemon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// Somebody else's, who has it listen there.
    Theirs(PathBuf),
    /// Ours, with these arguments.
    Ours(Vec<String>),
}

/// Our daemons.
pub(crate) struct Daemons(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The machine runs: who ends is started again.
    is_kept: bool,
    is_over: bool,
    failure: Option<Error>,
    /// Threads that have not ended.
    thread_count: usize,
    /// Of those that run, by their places.
    processes: Vec<Option<OwnedFd>>,
}

/// One of them, as its thread has it.
struct Daemon {
    shared: Arc<Shared>,
    place: usize,
    device: String,
    program: String,
    arguments: Vec<String>,
    /// What a console has on this terminal is for it to read.
    has_terminal: bool,
    socket: Arc<OwnedFd>,
}

impl Daemons {
    /// Starts those that are ours; also says where each device's daemon is reached.
    pub(crate) fn start(devices: &[Device]) -> Result<(Self, Vec<DeviceConfig>), Error> {
        let daemons = Self(Arc::default());
        let mut configs = Vec::new();
        for (index, Device { kind, queue_size, daemon }) in devices.iter().enumerate() {
            let (kind, queue_size) = (*kind, *queue_size);
            let (name, socket) = match daemon {
                Whose::Theirs(socket) => (socket.display().to_string(), socket.clone()),
                Whose::Ours(arguments) => {
                    let alike = |other: &&Device| other.kind.word() == kind.word();
                    let count = devices.iter().take(index).filter(alike).count();
                    let name = format!("{}{count}", kind.word());
                    let program = format!("vhost-{}", kind.word());
                    let has_terminal = kind == Kind::Console;
                    let socket = daemons.run(name.clone(), program, arguments, has_terminal)?;
                    (name, socket)
                }
            };
            configs.push(DeviceConfig { kind, name, socket, queue_size });
        }
        Ok((daemons, configs))
    }

    /// Has a daemon run, and returns the path that its socket has for this process.
    fn run(
        &self,
        device: String,
        program: String,
        arguments: &[String],
        has_terminal: bool,
    ) -> Result<PathBuf, Error> {
        let (socket, file) = listen().map_err(Error::Socket)?;
        let shared = self.0.clone();
        let mut state = self.0.state();
        let place = state.processes.len();
        let arguments = arguments.to_vec();
        let socket = Arc::new(socket);
        let daemon = Daemon { shared, place, device, program, arguments, has_terminal, socket };
        let thread = std::thread::Builder::new().name("daemon".to_owned());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        thread
            .spawn(move || {
                daemon.run();
                drop(file);
            })
            .map_err(Error::Thread)?;
        state.processes.push(None);
        state.thread_count += 1;
        Ok(path)
    }

    /// Why the machine cannot start, if a daemon has ended.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.0.state().failure.take().map_or(Ok(()), Err)
    }

    /// Has daemons that end started again from now on.
    pub(crate) fn keep(&self) -> Result<(), Error> {
        self.0.state().is_kept = true;
        self.check()
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.is_over = true;
        self.0.changed.notify_all();
        for signal in [Signal::TERM, Signal::KILL] {
            state.processes.iter().flatten().for_each(|process| send(process, signal));
            let waited =
                self.0.changed.wait_timeout_while(state, GRACE, |state| state.thread_count > 0);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.thread_count == 0 {
                return;
            }
        }
        warn!("{} daemons cannot be ended", state.thread_count);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    fn run(self) {
        let mut backoff = BACKOFF.0;
        loop {
            let begin = Instant::now();
            let ended = self.run_once();
            let mut state = self.shared.state();
            if !state.is_over {
                let failure = self.failure(ended);
                if state.is_kept {
                    warn!("{}; it is started again", crate::with_sources(&failure));
                } else {
                    state.failure.get_or_insert(failure);
                    state.is_over = true;
                }
            }
            // Those that come and go at once are started later and later.
            backoff = if begin.elapsed() > BACKOFF.1 { BACKOFF.0 } else { backoff };
            let changed = &self.shared.changed;
            let waited = changed.wait_timeout_while(state, backoff, |state| !state.is_over);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.is_over {
                state.thread_count -= 1;
                return changed.notify_all();
            }
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    fn failure(&self, ended: io::Result<ExitStatus>) -> Error {
        let (device, program) = (self.device.clone(), self.program.clone());
        match ended {
            Ok(status) => Error::Ended { device, program, status },
            Err(source) => Error::Start { device, program, source },
        }
    }

    /// Starts the daemon, and says how it has ended.
    fn run_once(&self) -> io::Result<ExitStatus> {
        let mut child = self.command().spawn()?;
        let process = Pid::from_child(&child);
        let process = pidfd_open(process, PidfdFlags::empty()).inspect_err(|_| {
            // Only we know of it: it must not go on.
            let _ = child.kill();
        })?;
        let mut state = self.shared.state();
        if state.is_over {
            send(&process, Signal::TERM);
        }
        if let Some(place) = state.processes.get_mut(self.place) {
            *place = Some(process);
        }
        drop(state);
        if let Some(errors) = child.stderr.take() {
            self.relay(errors);
        }
        let status = child.wait();
        if let Some(place) = self.shared.state().processes.get_mut(self.place) {
            *place = None;
        }
        status
    }

    fn command(&self) -> Command {
        let beside = std::env::current_exe().map(|program| program.with_file_name(&self.program));
        let found = beside.ok().filter(|path| path.is_file());
        let mut command = Command::new(found.unwrap_or_else(|| self.program.clone().into()));
        command.args(&self.arguments).arg(format!("--fd={}", self.socket.as_raw_fd()));
        command.stderr(Stdio::piped());
        if !self.has_terminal {
            // An interrupt that is typed there is for us, who end the daemons in their turn.
            command.stdin(Stdio::null()).process_group(0);
        }
        let (socket, parent) = (self.socket.clone(), getpid());
        // SAFETY: the closure only makes system calls, allocates nothing and takes no lock: that is allowed in a process that
        // has been forked from one with several threads.
        unsafe { command.pre_exec(move || prepare(&socket, parent)) };
        command
    }

    /// Says what the daemon says, until it has closed its standard error.
    fn relay(&self, errors: ChildStderr) {
        let mut errors = BufReader::new(errors);
        loop {
            let mut line = format!("{}: ", self.device).into_bytes();
            let begin = line.len();
            match errors.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(len) if len > 0 => {}
                _ => return,
            }
            if line.get(begin..) == Some(b"\n") {
                line.truncate(begin - 1);
                line.push(b'\n');
            } else if !line.ends_with(b"\n") {
                line.push(b'\n');
            }
            // Who has closed our standard error wants to hear nothing.
            let _ = io::stderr().write_all(&line);
        }
    }
}

/// The last steps of a process before it is the daemon.
fn prepare(socket: &OwnedFd, parent: Pid) -> io::Result<()> {
    fcntl_setfd(socket, FdFlags::empty())?;
    // This process takes its signals in another way.
    SigSet::empty().thread_set_mask()?;
    // A request to end: the daemon finishes what is in flight, and a console restores its terminal.
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // Too late, if it has died before.
    if getppid() == Some(parent) { Ok(()) } else { Err(Errno::SRCH.into()) }
}

fn send(process: &OwnedFd, signal: Signal) {
    // Fails only for one that has ended.
    let _ = pidfd_send_signal(process, signal);
}

/// A socket that listens, and its file, which has no name any more.
fn listen() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let directory =
        std::env::temp_dir().join(format!("outboard-vmm-{:x}", u64::from_ne_bytes(random)));
    DirBuilder::new().mode(0o700).create(&directory)?;
    let path = directory.join("socket");
    let made = UnixListener::bind(&path).and_then(|socket| {
        let file = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok((socket.into(), file))
    });
    // What was not made cannot be removed, and that is well.
    let _ = fs::remove_file(&path);
    fs::remove_dir(&directory)?;
    made
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// For what comes within milliseconds.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A shell's script for a daemon. Its socket's number is the last word of its command line.
    fn start(script: &str) -> (Daemons, PathBuf) {
        let daemons = Daemons(Arc::default());
        let arguments = ["-c".to_owned(), script.to_owned()];
        let path = daemons.run("blk0".into(), "sh".into(), &arguments, false).unwrap();
        (daemons, path)
    }

    fn wait(daemons: &Daemons, is_so: impl Fn(&mut State) -> bool) {
        let state = daemons.0.state();
        let waited = daemons.0.changed.wait_timeout_while(state, PATIENCE, |state| !is_so(state));
        assert!(!waited.unwrap().1.timed_out());
    }

    /// Waits until a file is there.
    fn wait_for(path: &std::path::Path) -> String {
        let begin = Instant::now();
        loop {
            match fs::read_to_string(path) {
                Ok(text) if text.ends_with('\n') => return text.trim_end().to_owned(),
                _ => assert!(begin.elapsed() < PATIENCE, "{}", path.display()),
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn daemon_that_cannot_start_is_the_machine_s_failure() {
        let (daemons, _) = start("exit 3");
        wait(&daemons, |state| state.failure.is_some());
        let error = daemons.check().unwrap_err().to_string();
        assert_eq!(error, "blk0: sh has ended: exit status: 3");
        let daemons = Daemons(Arc::default());
        daemons.run("net0".into(), "vhost-none".into(), &[], false).unwrap();
        wait(&daemons, |state| state.failure.is_some());
        assert!(daemons.keep().unwrap_err().to_string().contains("cannot start vhost-none"));
    }

    #[test]
    fn daemon_that_dies_is_started_again_on_the_same_socket() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000", file.display());
        let (daemons, path) = start(&script);
        daemons.keep().unwrap();
        let first = wait_for(&file);
        fs::remove_file(&file).unwrap();
        let number = Pid::from_raw(first.parse().unwrap()).unwrap();
        rustix::process::kill_process(number, Signal::KILL).unwrap();
        assert_ne!(wait_for(&file), first);
        let _connection = UnixStream::connect(path).unwrap();
    }

    #[test]
    fn daemons_end_with_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let (file, ended) = (directory.path().join("pid"), directory.path().join("ended"));
        let script =
            "trap 'echo yes > ENDED; exit' TERM; echo $$ > PID; while :; do sleep 0.01; done";
        let script = script.replace("PID", &file.display().to_string());
        let (daemons, path) = start(&script.replace("ENDED", &ended.display().to_string()));
        let process = wait_for(&file);
        assert!(UnixStream::connect(&path).is_ok());
        drop(daemons);
        assert_eq!(wait_for(&ended), "yes");
        assert!(!std::path::Path::new("/proc").join(process).exists());
    }
}
