//! What the service manager is told: that the daemon is ready, what it is doing, that it does its work, that it is
//! stopping; and the descriptors that it is to keep for a successor ([`Manager`]).
//!
//! Without `NOTIFY_SOCKET` in the environment all of this does nothing. A message that cannot be
//! delivered is logged and forgotten: the manager's socket is no reason to deny a guest its device.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use sd_notify::NotifyState;
use tracing::warn;

/// How long the manager may leave its queue full. It is busy for a moment when a host starts; no guest is to wait for more.
const SEND_MAX: Duration = Duration::from_secs(5);

/// The service manager as one who keeps descriptors. What it does not take, it drops in silence.
pub(super) struct Manager {
    socket: UnixDatagram,
    /// It has left its queue full for too long, and is waited for no more until it has made room.
    is_stuck: Cell<bool>,
}

impl Manager {
    /// `None`: there is none.
    pub(super) fn connect() -> io::Result<Option<Self>> {
        let Some(socket) = dial()? else { return Ok(None) };
        socket.set_write_timeout(Some(SEND_MAX))?;
        Ok(Some(Self { socket, is_stuck: Cell::new(false) }))
    }

    /// Has it keep a descriptor under this name, whatever the other end of it does.
    pub(super) fn store(&self, name: &str, fd: &OwnedFd) {
        let message = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
        if let Err(error) = self.send(&message, Some(fd)) {
            warn!(%error, name, "the service manager cannot be given a descriptor to keep");
        }
    }

    /// Has it close what it keeps under this name.
    pub(super) fn remove(&self, name: &str) {
        if let Err(error) = self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None) {
            warn!(%error, name, "the service manager cannot be told to close a descriptor");
        }
    }

    fn send(&self, message: &str, fd: Option<&OwnedFd>) -> io::Result<()> {
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("there is no room for the descriptor"));
        }
        let message = [IoSlice::new(message.as_bytes())];
        let wait = if self.is_stuck.get() { SendFlags::DONTWAIT } else { SendFlags::empty() };
        // A full queue is waited for, and io_uring interrupts who waits.
        let sent = rustix::io::retry_on_intr(|| {
            let flags = SendFlags::NOSIGNAL | wait;
            rustix::net::sendmsg(&self.socket, &message, &mut ancillary, flags)
        });
        self.is_stuck.set(sent == Err(Errno::AGAIN));
        sent?;
        Ok(())
    }
}

/// Whether the manager says that it keeps descriptors (`$FDSTORE`, since systemd 254: their number).
pub(super) fn has_a_store() -> bool {
    let number = std::env::var("FDSTORE").ok().and_then(|number| number.parse::<u64>().ok());
    number.is_some_and(|number| number > 0)
}

/// The daemon's sockets are open: whoever waits for it may connect. `status` is shown to the
/// operator (`systemctl status`).
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// A change of what the daemon is doing, one line for the operator.
pub fn status(status: &str) {
    send(&[NotifyState::Status(&one_line(status))]);
}

/// The daemon drains and will exit.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// The daemon does its work: the manager waits anew for as long as [`watchdog_limit`] says.
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How long the manager waits for [`alive`] before it ends the process; `None`: it does not.
pub fn watchdog_limit() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// The protocol is lines of `NAME=value`: a line break in a path of the status would start another
/// assignment.
fn one_line(status: &str) -> String {
    status.replace(char::is_control, " ")
}

/// Where the manager listens; the sandbox lets nobody go there later.
static MANAGER: OnceLock<UnixDatagram> = OnceLock::new();

/// Connects with the service manager, if there is one.
pub fn connect() {
    match dial() {
        Ok(None) => {}
        Ok(Some(socket)) => drop(MANAGER.set(socket)),
        Err(error) => warn!(%error, "the service manager cannot be notified"),
    }
}

/// A socket that is connected to where the manager listens. `None`: there is none.
fn dial() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
        return Ok(None);
    };
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(Some(socket))
}

fn send(states: &[NotifyState<'_>]) {
    let Some(manager) = MANAGER.get() else { return };
    let message: String = states.iter().map(|state| format!("{state}\n")).collect();
    if let Err(error) = manager.send(message.as_bytes()) {
        warn!(%error, "the service manager cannot be notified");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    /// Set for the process that a test starts to be its own daemon: the environment of the test
    /// process itself cannot be changed safely while other tests run.
    const CHILD: &str = "OUTBOARD_TEST_NOTIFY_CHILD";

    #[test]
    fn states_reach_the_service_manager_and_their_text_stays_one_line() {
        if std::env::var_os(CHILD).is_some() {
            super::connect();
            super::ready("listening on /run/odd\nMAINPID=1");
            super::status("serving");
            super::alive();
            super::stopping();
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon::notify::tests::states_reach_the_service_manager_and_their_text_stays_one_line"])
            .env(CHILD, "1")
            .env("NOTIFY_SOCKET", &path)
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        manager.set_nonblocking(true).unwrap();
        let receive = || {
            let mut message = [0; 256];
            let length =
                manager.recv(&mut message).expect("the child has ended and sent a message before");
            String::from_utf8_lossy(&message[..length]).into_owned()
        };
        assert_eq!(receive(), "READY=1\nSTATUS=listening on /run/odd MAINPID=1\n");
        assert_eq!(receive(), "STATUS=serving\n");
        assert_eq!(receive(), "WATCHDOG=1\n");
        assert_eq!(receive(), "STOPPING=1\n");
    }
}
