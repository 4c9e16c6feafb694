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
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

use crate::daemon::build_directory;
use crate::deadline::{first_readable, process_descriptor, wait_for_exit};
use crate::{DaemonCommand, temp_dir};

/// Time in which a healthy daemon has long become ready, or ended.
const LIMIT: Duration = Duration::from_secs(30);
/// Pause before a daemon that is to become ready is looked after.
const PAUSE: Duration = Duration::from_millis(50);
/// What daemons say, and what the test says to its own stand-in: that it has heard all before, and that it may end.
const READY: &str = "READY=1";
const SYNC: &str = "X_SYNC=1";
const END: &str = "X_END=1";
/// The longest message that a daemon sends.
const MESSAGE_BYTES: usize = 4096;

/// What is kept, by its names.
pub type Kept = Vec<(String, OwnedFd)>;

/// See the module's head. Dropping it kills the daemon.
#[derive(Debug)]
pub struct Service {
    command: DaemonCommand,
    socket: PathBuf,
    kept: Arc<Mutex<Kept>>,
    /// What has been said that somebody may wait for.
    said: Receiver<&'static str>,
    listener: Option<JoinHandle<()>>,
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
        let socket = directory.path().join("socket");
        let kept = Arc::<Mutex<Kept>>::default();
        let (tell, said) = channel();
        // A manager reads at all times: its queue is short.
        let listener = thread::spawn({
            let kept = Arc::clone(&kept);
            move || listen(&notify, &kept, limit, &tell)
        });
        let listener = Some(listener);
        let mut service =
            Self { command, socket, kept, said, listener, limit, child: None, directory };
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

    /// What is kept, after all that the daemon has said by now.
    ///
    /// # Panics
    /// If the stand-in itself has failed.
    pub fn kept(&self) -> MutexGuard<'_, Kept> {
        self.tell(SYNC);
        while self.said.recv_timeout(LIMIT).expect("the stand-in listens") != SYNC {}
        self.kept.lock().expect("the stand-in has not failed")
    }

    /// Something that is kept, by its name.
    ///
    /// # Panics
    /// If nothing is kept under that name.
    pub fn kept_file(&self, is_it: impl Fn(&str, &OwnedFd) -> bool) -> File {
        let kept = self.kept();
        let (_, fd) = kept.iter().find(|(name, fd)| is_it(name, fd)).expect("it is kept");
        File::from(fd.try_clone().expect("descriptors"))
    }

    /// Says something to the stand-in itself.
    fn tell(&self, word: &str) {
        let path = self.directory.path().join("notify");
        let socket = UnixDatagram::unbound().expect("sockets");
        socket.send_to(word.as_bytes(), path).expect("the stand-in listens");
    }

    /// Has the daemon stand still, all threads of it.
    ///
    /// # Panics
    /// If none runs, or it ends.
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let child = self.child.as_ref().expect("a daemon runs");
        let waited = waitpid(Some(Pid::from_child(child)), WaitOptions::UNTRACED);
        let status = waited.expect("our own child").map(|(_, status)| status);
        assert!(status.is_some_and(|status| status.stopped()), "it ended: {}", self.log());
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

    /// Sends the daemon a signal.
    ///
    /// # Panics
    /// If none runs.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("a daemon runs");
        kill_process(Pid::from_child(child), signal).expect("our own child can be signalled");
    }

    fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("a daemon runs");
        let ended = wait_for_exit(&mut child, LIMIT).expect("our own child");
        ended.unwrap_or_else(|| panic!("the daemon does not end; its log:\n{}", self.log()))
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
        for (name, fd) in self.kept().iter() {
            give(&near, name, fd);
        }
        drop((command, near));
        let ended = process_descriptor(&child);
        self.child = Some(child);
        let deadline = Instant::now() + LIMIT;
        while self.said.recv_timeout(PAUSE) != Ok(READY) {
            if first_readable(&[ended.as_fd()], Instant::now()).is_some() {
                panic!("the daemon ended before it was ready; the log:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "the daemon is not ready; the log:\n{}", self.log());
        }
    }
}

/// Takes what the daemons say, one after the other.
fn listen(notify: &UnixDatagram, kept: &Mutex<Kept>, limit: usize, tell: &Sender<&'static str>) {
    while let Some((message, fds)) = hear(notify) {
        let says = |word: &str| message.lines().any(|line| line == word);
        let name = message.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("");
        let mut kept = kept.lock().expect("nobody has failed");
        if says("FDSTORE=1") {
            assert!(says("FDPOLL=0"), "a descriptor whose end hangs up would be lost: {message}");
            let room = limit.saturating_sub(kept.len());
            kept.extend(fds.into_iter().take(room).map(|fd| (name.to_owned(), fd)));
        }
        if says("FDSTOREREMOVE=1") {
            kept.retain(|(kept, _)| kept != name);
        }
        drop(kept);
        if says(END) {
            return;
        }
        for word in [READY, SYNC].into_iter().filter(|word| says(word)) {
            // Who has stopped waiting has failed.
            let _ = tell.send(word);
        }
    }
}

/// One message, and what came with it.
fn hear(notify: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(notify, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Some((String::from_utf8_lossy(&bytes[..received.bytes]).into_owned(), fds))
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
        self.tell(END);
        if let Some(listener) = self.listener.take() {
            // What it has failed of is on stderr.
            let _ = listener.join();
        }
        if std::thread::panicking() {
            eprintln!("log of the daemons at {}:\n{}", self.socket.display(), self.log());
        }
    }
}
