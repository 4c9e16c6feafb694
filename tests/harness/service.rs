//! A daemon under a stand-in for a service manager that keeps descriptors (sd_notify(3), `FDSTORE=1`).
//!
//! Contract: what the daemon gives it to keep, it gives to the next one, under the same names, and in no other way. It reads
//! what a dead daemon has said before it starts the next, as systemd does. What it deliberately does not do: drop a file that
//! it has already under another name; that is tested with systemd itself.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::daemon::build_directory;
use crate::deadline::{first_readable, process_descriptor, wait_for_exit};
use crate::{DaemonCommand, temp_dir};

/// Time in which a healthy daemon has long become ready, or ended.
const LIMIT: Duration = Duration::from_secs(30);
/// The longest message that a daemon sends.
const MESSAGE_BYTES: usize = 4096;

/// See the module's head. Dropping it kills the daemon.
#[derive(Debug)]
pub struct Service {
    command: DaemonCommand,
    socket: PathBuf,
    notify: UnixDatagram,
    kept: Vec<(String, OwnedFd)>,
    /// More are dropped.
    limit: usize,
    child: Option<Child>,
    directory: TempDir,
}

impl Service {
    /// Starts the daemon, which may have so many descriptors kept, and waits until it is ready.
    pub fn start(command: DaemonCommand, limit: usize) -> Self {
        let directory = temp_dir();
        let notify = UnixDatagram::bind(directory.path().join("notify"));
        let notify = notify.expect("a socket fits in a fresh directory");
        notify.set_nonblocking(true).expect("a socket can be made non-blocking");
        let socket = directory.path().join("socket");
        let mut service =
            Self { command, socket, notify, kept: Vec::new(), limit, child: None, directory };
        service.start_next();
        service
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the daemons have written on stderr so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log"))
            .unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// The process id of the daemon that runs.
    ///
    /// # Panics
    /// If none does.
    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("a daemon runs").id()
    }

    /// What is kept, by its names.
    pub fn kept(&mut self) -> &mut Vec<(String, OwnedFd)> {
        self.listen(Instant::now());
        &mut self.kept
    }

    /// Kills the daemon as the kernel would.
    ///
    /// # Panics
    /// If none runs.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// Ends the daemon as an operator would.
    ///
    /// # Panics
    /// If none runs, or it does not end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait()
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("a daemon runs");
        kill_process(Pid::from_child(child), signal).expect("our own child can be signalled");
    }

    fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("a daemon runs");
        let ended = process_descriptor(&child);
        let deadline = Instant::now() + LIMIT;
        loop {
            match first_readable(&[self.notify.as_fd(), ended.as_fd()], deadline) {
                Some(0) => drop(self.hear()),
                Some(_) => break,
                None => panic!("the daemon does not end; its log:\n{}", self.log()),
            }
        }
        self.listen(Instant::now());
        wait_for_exit(&mut child, LIMIT).expect("our own child").expect("it has ended")
    }

    /// Starts the next daemon with all that is kept, and waits until it is ready.
    ///
    /// # Panics
    /// If it ends instead, or stays silent; the message has its log.
    pub fn start_next(&mut self) {
        let path = self.directory.path();
        let log = File::options().create(true).append(true).open(path.join("log"));
        let log = log.expect("a file fits in a fresh directory");
        let (near, far) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .expect("sockets");
        let daemon = self.command.command(&self.socket, &path.join("notify"));
        let mut command = Command::new(build_directory().join("with-descriptors"));
        command.arg(daemon.get_program()).args(daemon.get_args());
        for (name, value) in daemon.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let child = command
            .env("FDSTORE", self.limit.to_string())
            .stdin(Stdio::from(far))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("with-descriptors has been built with this test");
        // It takes them while they are sent: their number may be more than a socket holds.
        for (name, fd) in &self.kept {
            give(&near, name, fd);
        }
        drop((command, near));
        let ended = process_descriptor(&child);
        self.child = Some(child);
        let deadline = Instant::now() + LIMIT;
        loop {
            match first_readable(&[self.notify.as_fd(), ended.as_fd()], deadline) {
                Some(0) => {
                    if self.hear().is_some_and(|message| message.contains("READY=1")) {
                        return;
                    }
                }
                Some(_) => panic!("the daemon ended before it was ready; the log:\n{}", self.log()),
                None => panic!("the daemon did not become ready; the log:\n{}", self.log()),
            }
        }
    }

    /// Reads what the daemons have said until the deadline, or, if it has passed, what is there.
    pub fn listen(&mut self, deadline: Instant) {
        while first_readable(&[self.notify.as_fd()], deadline).is_some() {
            self.hear();
        }
    }

    /// One message, after which something may be kept that was not, or the other way round.
    fn hear(&mut self) -> Option<String> {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let received =
            recvmsg(&self.notify, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds: Vec<OwnedFd> = fds.flatten().collect();
        let message = String::from_utf8_lossy(&bytes[..received.bytes]).into_owned();
        let says = |word: &str| message.lines().any(|line| line == word);
        let name = message.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("");
        if says("FDSTORE=1") {
            assert!(says("FDPOLL=0"), "a descriptor whose end hangs up would be lost: {message}");
            let room = self.limit.saturating_sub(self.kept.len());
            self.kept.extend(fds.into_iter().take(room).map(|fd| (name.to_owned(), fd)));
        }
        if says("FDSTOREREMOVE=1") {
            self.kept.retain(|(kept, _)| kept != name);
        }
        Some(message)
    }
}

fn give(socket: &OwnedFd, name: &str, fd: &OwnedFd) {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [IoSlice::new(name.as_bytes())];
    sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL).expect("the program takes it");
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only for a process that has been waited for already.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of the daemons at {}:\n{}", self.socket.display(), self.log());
        }
    }
}
