//! A daemon process under test: started with real options, ready when it says so, ended by process id.
//!
//! Readiness comes by `sd_notify`, not by connecting: a connection would be a front end's session.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::deadline::{first_readable, process_descriptor, wait_for_exit};
use crate::temp_dir;

/// Time in which a healthy daemon has long opened its files, even on a machine busy with emulated guests.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// More than any test's daemon lives.
const LONGEST_LIFE: Duration = Duration::from_secs(3600);
/// Time in which a daemon has long drained a disk that is a file.
const EXIT_LIMIT: Duration = Duration::from_secs(30);

/// The path of one of the project's programs: in `OUTBOARD_BIN_DIR`, else beside the running test's own build.
///
/// # Panics
/// If it has not been built.
pub fn program(name: &str) -> PathBuf {
    let directory =
        std::env::var_os("OUTBOARD_BIN_DIR").map_or_else(build_directory, PathBuf::from);
    let path = directory.join(name);
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build -p {name}` first (`make test-fast` does)",
        path.display()
    );
    path
}

/// Where cargo put this test run's programs: the test itself is in `deps` below.
pub(crate) fn build_directory() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let deps = test.parent().expect("a program is in a directory");
    if deps.ends_with("deps") {
        deps.parent().expect("deps is in a directory").to_owned()
    } else {
        deps.to_owned()
    }
}

/// The engine that daemons under test are to use, where `OUTBOARD_AIO` names one: `--aio` and the
/// name. Whole suites run on either engine so.
pub fn engine_arguments() -> Vec<OsString> {
    let engine = std::env::var_os("OUTBOARD_AIO");
    engine.into_iter().flat_map(|name| ["--aio".into(), name]).collect()
}

/// The options of a daemon that is yet to be started.
#[derive(Debug)]
pub struct DaemonCommand {
    launcher: Vec<OsString>,
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    socket: Option<PathBuf>,
    stdin: Option<File>,
}

impl DaemonCommand {
    /// A `vhost-blk` that serves `image` on a socket of its own.
    pub fn block(image: &Path) -> Self {
        Self::new(&program("vhost-blk")).argument("--blk-file").argument(image)
    }

    /// A `vhost-net` that serves the network `backend` (`--backend`) on a socket of its own.
    pub fn network(backend: &str) -> Self {
        Self::new(&program("vhost-net")).argument("--backend").argument(backend)
    }

    /// A `vhost-console` with these ports (`--port`) on a socket of its own.
    pub fn console(ports: &[&str]) -> Self {
        let command = Self::new(&program("vhost-console"));
        ports.iter().fold(command, |command, port| command.argument("--port").argument(port))
    }

    /// Any program that takes `--socket-path` and reports readiness by `sd_notify`.
    pub fn new(program: &Path) -> Self {
        Self {
            launcher: Vec::new(),
            program: program.to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            socket: None,
            stdin: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn argument(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Has the daemon started by a program that becomes it: `launcher` is that program and its
    /// arguments, which the daemon's command line follows.
    #[must_use]
    pub fn through(mut self, launcher: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.launcher = launcher.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Sets an environment variable of the daemon.
    #[must_use]
    pub fn environment(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Serves at `path` in place of a socket in the daemon's own temporary directory.
    #[must_use]
    pub fn socket(mut self, path: &Path) -> Self {
        self.socket = Some(path.to_owned());
        self
    }

    /// Passes an open file to the daemon, as descriptor 0.
    #[must_use]
    pub fn stdin(mut self, file: File) -> Self {
        self.stdin = Some(file);
        self
    }

    /// The command line, for a daemon that listens at `socket` and reports to `notify`.
    pub(crate) fn command(&self, socket: &Path, notify: &Path) -> Command {
        let has_engine = self.arguments.iter().any(|argument| argument == "--aio");
        let mut words =
            self.launcher.iter().map(OsString::as_os_str).chain([self.program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).arg("--socket-path").arg(socket);
        command.args(if has_engine { Vec::new() } else { engine_arguments() });
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.env("NOTIFY_SOCKET", notify);
        command
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Panics
    /// If it ends or stays silent instead; the message has its log.
    pub fn start(self) -> Daemon {
        let directory = temp_dir();
        let socket = self.socket.clone().unwrap_or_else(|| directory.path().join("socket"));
        let notify_path = directory.path().join("notify");
        let notify = UnixDatagram::bind(&notify_path).expect("a socket fits in a fresh directory");
        let log =
            File::create(directory.path().join("log")).expect("a file fits in a fresh directory");
        let child = self
            .command(&socket, &notify_path)
            .stdin(self.stdin.map_or_else(Stdio::null, Stdio::from))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()));
        let mut daemon = Daemon { child, socket, directory };
        daemon.wait_until_ready(&notify);
        let ended = process_descriptor(&daemon.child);
        thread::spawn(move || receive_until_end(&notify, &ended));
        daemon
    }
}

/// A running daemon. Dropping it kills it; [`Daemon::terminate`] ends it as an operator would.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    directory: TempDir,
}

impl Daemon {
    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the daemon has written on stderr so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log"))
            .unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// Whether the process is still there.
    ///
    /// # Panics
    /// If the process cannot be waited for.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("our own child can be waited for").is_none()
    }

    /// Sends SIGTERM and returns the exit status.
    ///
    /// # Panics
    /// If the daemon does not end; the message has its log.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let status =
            wait_for_exit(&mut self.child, EXIT_LIMIT).expect("our own child can be waited for");
        status
            .unwrap_or_else(|| panic!("the daemon runs on after SIGTERM; its log:\n{}", self.log()))
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// If the process has been waited for already.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("our own child can be signalled");
    }

    fn wait_until_ready(&mut self, notify: &UnixDatagram) {
        let ended = process_descriptor(&self.child);
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            match first_readable(&[notify.as_fd(), ended.as_fd()], deadline) {
                Some(0) => {
                    let mut datagram = [0; 4096];
                    let len = notify.recv(&mut datagram).expect("the notify socket is readable");
                    if datagram[..len].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                        return;
                    }
                }
                Some(_) => panic!("the daemon ended before it was ready; its log:\n{}", self.log()),
                None => panic!("the daemon did not become ready; its log:\n{}", self.log()),
            }
        }
    }
}

/// Takes what the daemon says after it is ready, as a service manager does: an unread socket fills up, a closed one is an error.
fn receive_until_end(notify: &UnixDatagram, ended: &OwnedFd) {
    let mut datagram = [0; 4096];
    while first_readable(&[notify.as_fd(), ended.as_fd()], Instant::now() + LONGEST_LIFE) == Some(0)
    {
        if notify.recv(&mut datagram).is_err() {
            return;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of the daemon at {}:\n{}", self.socket.display(), self.log());
        }
    }
}
