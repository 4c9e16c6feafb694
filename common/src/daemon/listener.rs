//! From options to sockets: where the front end comes in, and where the operator does.
//!
//! A daemon has one vhost-user socket, which comes from exactly one of `--socket-path`, `--fd` and
//! the service manager (`LISTEN_FDS`), and at most one control socket, from `--control` or from the
//! service manager under the name `control`. [`claim`] takes over what was passed, and
//! [`Claimed::listen`] creates the rest; both say which option is wrong and why. What it creates obeys one set of access rules ([`SocketFile`]); what it inherits is checked
//! to be what it should be, and then owned ([`inherited`]).
//!
//! Contract: `claim` is called once, after the options are parsed and before anything else opens
//! files, since a descriptor number that the options name must not mean a file of our own; `listen`
//! when everything else is open, since who connects is to be served. Neither accepts nor reads.

mod inherited;
mod socket_file;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Mode;
use thiserror::Error;
use tracing::warn;

pub use inherited::{duplicate, release};
pub use socket_file::{Access, SocketFile};
pub(super) use socket_file::{bound_to, listens};

use super::options::DaemonOptions;
use super::store::{self, Kept, KeptListener};

/// The name under which a service manager passes the control socket (`FileDescriptorName=control`).
const CONTROL_NAME: &str = "control";

/// A socket to accept connections from, in non-blocking mode.
#[derive(Debug)]
pub struct Listener {
    /// The socket itself.
    pub socket: UnixListener,
    /// Its file if this process created it, which goes when this is dropped; inherited sockets
    /// belong to who made them.
    pub file: Option<SocketFile>,
}

/// Where the front end comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// Front ends connect here, one after another.
    Listening(Listener),
    /// The one front end there will be is connected already. The stream is in non-blocking mode.
    Connected(UnixStream),
}

/// The sockets that the options and the service manager gave the daemon.
#[derive(Debug)]
pub struct Sockets {
    /// The vhost-user socket.
    pub vhost_user: Endpoint,
    /// The control socket, if wanted.
    pub control: Option<Listener>,
}

/// What gave us a socket; its text is how an error message names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `--socket-path`
    SocketPath,
    /// `--control`
    Control,
    /// `--fd`
    Fd(RawFd),
    /// A descriptor passed by the service manager, with its name.
    ListenFds(RawFd, String),
    /// An option of a device's own.
    Device(&'static str),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SocketPath => write!(out, "--socket-path"),
            Self::Control => write!(out, "--control"),
            Self::Fd(fd) => write!(out, "--fd {fd}"),
            Self::ListenFds(fd, name) => write!(out, "LISTEN_FDS: descriptor {fd} named {name:?}"),
            Self::Device(option) => write!(out, "{option}"),
        }
    }
}

/// Why the daemon has no socket to serve.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Neither an option nor the service manager gave a vhost-user socket.
    #[error("no vhost-user socket: give --socket-path or --fd, or pass a socket by LISTEN_FDS")]
    NoSocket,
    /// The descriptors of the service manager cannot be made out.
    #[error("LISTEN_FDS: cannot take the descriptors that the service manager passed")]
    ServiceManager(#[source] io::Error),
    /// Two sources for one socket.
    #[error("{first} and {second}: only one of them can be the {purpose} socket")]
    Ambiguous {
        /// `vhost-user` or `control`.
        purpose: &'static str,
        /// The one that was seen first.
        first: Origin,
        /// The one too many.
        second: Origin,
    },
    /// An inherited descriptor that cannot be used at all: not open, for one.
    #[error(
        "{origin}: not a usable file descriptor (is it open, and passed without close-on-exec?)"
    )]
    Descriptor {
        /// Which descriptor.
        origin: Origin,
        /// What the system says.
        source: io::Error,
    },
    /// An inherited descriptor that is no unix stream socket.
    #[error("{origin}: not a unix stream socket")]
    NotUnixStream {
        /// Which descriptor.
        origin: Origin,
    },
    /// An inherited socket without peer that does not listen either.
    #[error("{origin}: a socket that is neither listening nor connected")]
    Idle {
        /// Which descriptor.
        origin: Origin,
    },
    /// A control socket must be one that can be connected to.
    #[error("{origin}: the control socket must be a listening one")]
    ControlNotListening {
        /// Which descriptor.
        origin: Origin,
    },
    /// The path does not fit a socket address.
    #[error(
        "{origin}: {path:?} has {length_bytes} bytes; the path of a socket may have {limit_bytes} at most"
    )]
    PathTooLong {
        /// Which option.
        origin: Origin,
        /// Its value.
        path: PathBuf,
        /// Its length.
        length_bytes: usize,
        /// The longest there can be.
        limit_bytes: usize,
    },
    /// The directory to create the socket in is not there.
    #[error("{origin}: the directory of {path:?} does not exist")]
    NoDirectory {
        /// Which option.
        origin: Origin,
        /// Its value.
        path: PathBuf,
    },
    /// Something that is not ours to remove is at the path.
    #[error("{origin}: {path:?} exists and is not a socket; it is left as it is")]
    NotASocket {
        /// Which option.
        origin: Origin,
        /// Its value.
        path: PathBuf,
    },
    /// A process serves the socket at the path.
    #[error("{origin}: another process is listening on {path:?}")]
    Live {
        /// Which option.
        origin: Origin,
        /// Its value.
        path: PathBuf,
    },
    /// A step of creating the socket failed.
    #[error("{origin}: cannot {step} {path:?}")]
    Create {
        /// Which option.
        origin: Origin,
        /// Its value.
        path: PathBuf,
        /// What was tried, as a verb phrase that the path completes.
        step: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// A place to get a socket from.
struct Source<'a> {
    origin: Origin,
    place: Place<'a>,
}

enum Place<'a> {
    Create(&'a Path),
    Inherit(RawFd),
}

/// The descriptors that were passed are ours; the sockets that the options name do not exist yet.
pub struct Claimed<'a> {
    vhost_user: Claim<'a>,
    control: Option<Claim<'a>>,
    access: Access,
    kept: Vec<Kept>,
}

enum Claim<'a> {
    Inherited(Origin, Endpoint),
    Path(Origin, &'a Path),
}

impl<'a> Source<'a> {
    fn claim(self) -> Result<Claim<'a>, ListenError> {
        Ok(match self.place {
            Place::Create(path) => Claim::Path(self.origin, path),
            Place::Inherit(fd) => {
                let endpoint = inherited::take(&self.origin, fd)?;
                Claim::Inherited(self.origin, endpoint)
            }
        })
    }
}

impl Claim<'_> {
    fn listen(self, access: Access) -> Result<(Origin, Endpoint), ListenError> {
        Ok(match self {
            Claim::Inherited(origin, endpoint) => (origin, endpoint),
            Claim::Path(origin, path) => {
                let listener = socket_file::listen_at(&origin, path, access)?;
                (origin, Endpoint::Listening(listener))
            }
        })
    }
}

/// Creates a socket at `path` for a device that waits for a peer there, which only its owner's
/// processes can be.
///
/// # Errors
/// As for the daemon's own sockets.
pub fn listen_private(option: &'static str, path: &Path) -> Result<Listener, ListenError> {
    listen_for(option, path, Access { mode: Mode::RUSR | Mode::WUSR, group: None })
}

/// Creates a socket at `path` for a device that waits for peers there, which `access` says who can be.
///
/// # Errors
/// As for the daemon's own sockets.
pub fn listen_for(
    option: &'static str,
    path: &Path,
    access: Access,
) -> Result<Listener, ListenError> {
    socket_file::listen_at(&Origin::Device(option), path, access)
}

/// Takes over the descriptors that `options` and the service manager's environment variables
/// name.
///
/// # Errors
/// Says which option or descriptor is wrong.
pub fn claim(options: &DaemonOptions) -> Result<Claimed<'_>, ListenError> {
    let passed = sd_notify::listen_fds_with_names().map_err(ListenError::ServiceManager)?;
    claim_with(options, passed)
}

/// [`claim`] with the service manager's descriptors given: their numbers and names.
fn claim_with(
    options: &DaemonOptions,
    passed: impl Iterator<Item = (RawFd, String)>,
) -> Result<Claimed<'_>, ListenError> {
    let at_path = |origin, path| Source { origin, place: Place::Create(path) };
    let from_fd = |origin, fd| Source { origin, place: Place::Inherit(fd) };
    let mut control = options.control.as_deref().map(|path| at_path(Origin::Control, path));
    let mut vhost_user = match (&options.socket_path, options.fd) {
        (Some(path), _) => Some(at_path(Origin::SocketPath, path)),
        (None, Some(fd)) => Some(from_fd(Origin::Fd(fd), fd)),
        (None, None) => None,
    };
    let mut kept = Vec::new();
    for (fd, name) in passed {
        if store::is_ours(&name) {
            kept.extend(take_kept(fd, name));
            continue;
        }
        let (slot, purpose) = if name == CONTROL_NAME {
            (&mut control, "control")
        } else {
            (&mut vhost_user, "vhost-user")
        };
        let origin = Origin::ListenFds(fd, name);
        if let Some(first) = slot.take() {
            return Err(ListenError::Ambiguous { purpose, first: first.origin, second: origin });
        }
        *slot = Some(from_fd(origin, fd));
    }
    Ok(Claimed {
        vhost_user: vhost_user.ok_or(ListenError::NoSocket)?.claim()?,
        control: control.map(Source::claim).transpose()?,
        access: Access { mode: options.socket_mode, group: options.socket_group },
        kept,
    })
}

/// Takes over a descriptor that a predecessor has stored. One that cannot be had is missing, which its image will show.
fn take_kept(fd: RawFd, name: String) -> Option<Kept> {
    match duplicate(fd).and_then(|file| release(fd).map(|()| file)) {
        Ok(file) => Some((name, file)),
        Err(error) => {
            warn!(%error, "LISTEN_FDS: descriptor {fd} named {name:?} cannot be taken over");
            None
        }
    }
}

impl Claimed<'_> {
    /// What a predecessor has stored.
    pub(super) fn take_kept(&mut self) -> Vec<Kept> {
        std::mem::take(&mut self.kept)
    }

    /// Creates the sockets that the options name.
    ///
    /// # Errors
    /// Says which path is wrong; sockets created before the error are removed again.
    pub fn listen(self) -> Result<Sockets, ListenError> {
        self.listen_after(None)
    }

    /// The same; what a predecessor had bound to the path of the vhost-user socket is used in place of a new one, if it still is
    /// what is there.
    pub(super) fn listen_after(
        self,
        predecessor: Option<KeptListener<Arc<OwnedFd>>>,
    ) -> Result<Sockets, ListenError> {
        let bound = match (&self.vhost_user, predecessor) {
            (Claim::Path(_, path), Some(kept)) => socket_file::listen_again(path, &kept),
            _ => None,
        };
        let vhost_user = match bound {
            Some(listener) => Endpoint::Listening(listener),
            None => self.vhost_user.listen(self.access)?.1,
        };
        let control = match self.control.map(|claim| claim.listen(self.access)).transpose()? {
            None => None,
            Some((_, Endpoint::Listening(listener))) => Some(listener),
            Some((origin, Endpoint::Connected(_))) => {
                return Err(ListenError::ControlNotListening { origin });
            }
        };
        Ok(Sockets { vhost_user, control })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, IntoRawFd, OwnedFd, RawFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use clap::Parser;
    use rustix::fs::{Gid, Mode};

    use super::{Endpoint, ListenError, Origin, Sockets, claim, claim_with};
    use crate::daemon::options::DaemonOptions;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        daemon: DaemonOptions,
    }

    /// After that long a test that waits for a hang-up has failed.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn open(options: &DaemonOptions) -> Result<Sockets, ListenError> {
        claim(options)?.listen()
    }

    fn open_with(
        options: &DaemonOptions,
        passed: impl Iterator<Item = (RawFd, String)>,
    ) -> Result<Sockets, ListenError> {
        claim_with(options, passed)?.listen()
    }

    fn options(arguments: &[&str]) -> DaemonOptions {
        Program::parse_from([&["program"], arguments].concat()).daemon
    }

    fn at(path: &Path) -> DaemonOptions {
        DaemonOptions { socket_path: Some(path.to_owned()), ..options(&[]) }
    }

    fn passed(fds: &[(RawFd, &str)]) -> impl Iterator<Item = (RawFd, String)> {
        let owned: Vec<_> = fds.iter().map(|(fd, name)| (*fd, (*name).to_owned())).collect();
        owned.into_iter()
    }

    fn listening_fd(directory: &Path, name: &str) -> RawFd {
        UnixListener::bind(directory.join(name)).unwrap().into_raw_fd()
    }

    fn mode_of(path: &Path) -> u32 {
        rustix::fs::lstat(path).unwrap().st_mode & 0o777
    }

    fn assert_listens(sockets: Sockets, path: &Path) {
        let Endpoint::Listening(listener) = sockets.vhost_user else { panic!("not listening") };
        let _client = UnixStream::connect(path).unwrap();
        listener.socket.accept().unwrap();
    }

    #[test]
    fn socket_is_private_by_default_and_its_file_goes_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        let sockets = open(&at(&path)).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        assert!(sockets.control.is_none());
        assert_listens(sockets, &path);
        assert!(!path.exists());
    }

    #[test]
    fn both_sockets_get_the_mode_and_group_of_the_options() {
        let directory = tempfile::tempdir().unwrap();
        let (path, control) =
            (directory.path().join("blk.sock"), directory.path().join("control.sock"));
        let own_group = rustix::process::getgid();
        let options = DaemonOptions {
            control: Some(control.clone()),
            socket_mode: Mode::from_raw_mode(0o660),
            socket_group: Some(own_group),
            ..at(&path)
        };
        let _sockets = open(&options).unwrap();
        for path in [&path, &control] {
            assert_eq!(mode_of(path), 0o660);
            assert_eq!(Gid::from_raw(rustix::fs::lstat(path).unwrap().st_gid), own_group);
        }
    }

    #[test]
    fn control_socket_that_cannot_be_created_leaves_no_vhost_user_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        let options = DaemonOptions {
            control: Some(directory.path().join("none/control.sock")),
            ..at(&path)
        };
        let error = open(&options).unwrap_err();
        assert!(
            matches!(error, ListenError::NoDirectory { origin: Origin::Control, .. }),
            "{error}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn without_any_socket_the_message_names_the_ways_to_give_one() {
        let message = open(&options(&[])).unwrap_err().to_string();
        assert!(
            ["--socket-path", "--fd", "LISTEN_FDS"].iter().all(|way| message.contains(way)),
            "{message}"
        );
    }

    #[test]
    fn fd_may_be_listening_or_connected() {
        let directory = tempfile::tempdir().unwrap();
        let fd = listening_fd(directory.path(), "blk.sock");
        let sockets = open(&options(&["--fd", &fd.to_string()])).unwrap();
        assert_listens(sockets, &directory.path().join("blk.sock"));
        assert!(
            directory.path().join("blk.sock").exists(),
            "an inherited socket's file is not ours to remove"
        );

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sockets = open(&options(&["--fd", &ours.into_raw_fd().to_string()])).unwrap();
        let Endpoint::Connected(stream) = sockets.vhost_user else { panic!("not connected") };
        (&stream).write_all(b"x").unwrap();
        drop(stream);
        let mut received = Vec::new();
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        // The end of the stream arrives: no other descriptor of it stays open here.
        theirs.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"x");
    }

    #[test]
    fn service_managers_sockets_are_told_apart_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let control = listening_fd(directory.path(), "control.sock");
        let device = listening_fd(directory.path(), "blk.sock");
        let sockets =
            open_with(&options(&[]), passed(&[(control, "control"), (device, "blk")])).unwrap();
        let control = sockets.control.as_ref().unwrap().socket.local_addr().unwrap();
        assert_eq!(control.as_pathname().unwrap().file_name().unwrap(), "control.sock");
        assert_listens(sockets, &directory.path().join("blk.sock"));
    }

    #[test]
    fn two_sources_for_one_socket_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        // Numbers that are never looked at: the names alone decide.
        let error =
            open_with(&options(&[]), passed(&[(900, "a"), (901, "b")])).unwrap_err().to_string();
        assert!(
            error.contains("\"a\"") && error.contains("\"b\"") && error.contains("vhost-user"),
            "{error}"
        );
        let error = open_with(&at(&path), passed(&[(900, "a")])).unwrap_err().to_string();
        assert!(error.contains("--socket-path") && error.contains("LISTEN_FDS"), "{error}");
        let error = open_with(&options(&["--control", "/x"]), passed(&[(900, "control")]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("--control") && error.contains("LISTEN_FDS"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn connected_control_socket_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let options = at(&directory.path().join("blk.sock"));
        let error = open_with(&options, passed(&[(ours.into_raw_fd(), "control")])).unwrap_err();
        assert!(matches!(error, ListenError::ControlNotListening { .. }), "{error}");
    }

    /// Set for the process that a test starts to open sockets in its place.
    const CHILD: &str = "OUTBOARD_TEST_LISTENER_CHILD";

    fn child(test: &str, script: &str, stdin: impl Into<OwnedFd>) {
        let output = Command::new("/bin/sh")
            .args(["-c", script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &format!("daemon::listener::tests::{test}")])
            .env(CHILD, "1")
            .stdin(Stdio::from(stdin.into()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{output:?}");
    }

    #[test]
    fn environment_of_socket_activation_is_read() {
        if std::env::var_os(CHILD).is_some() {
            let Endpoint::Listening(listener) = open(&options(&[])).unwrap().vhost_user else {
                panic!("connected")
            };
            listener.socket.accept().unwrap();
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("blk.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        let script = "exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=blk exec \"$@\"";
        child("environment_of_socket_activation_is_read", script, listener);
    }

    #[test]
    fn standard_input_as_fd_is_replaced_and_not_closed() {
        if std::env::var_os(CHILD).is_some() {
            let Endpoint::Connected(stream) = open(&options(&["--fd", "0"])).unwrap().vhost_user
            else {
                panic!("listening")
            };
            assert!(
                rustix::io::fcntl_getfd(&stream).unwrap().contains(rustix::io::FdFlags::CLOEXEC)
            );
            let standard_input = rustix::fs::fstat(std::io::stdin().as_fd()).unwrap();
            assert_eq!(standard_input.st_rdev, rustix::fs::stat("/dev/null").unwrap().st_rdev);
            return;
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        child("standard_input_as_fd_is_replaced_and_not_closed", "exec \"$@\"", ours);
    }
}
