//! Where peers of a unix endpoint come in.
//!
//! Contract: the socket is made as the daemon's own are: one of a dead process is replaced, one that is served is not
//! touched. Its file goes with the endpoint, at the latest with the process.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::daemon::listener::{self, Access, Listener, SocketFile};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::fs::{Gid, Mode};
use tokio::time::sleep;
use tracing::warn;

use super::OpenError;

/// Pause after a failed accept (no descriptors left, in general), which would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Door {
    path: PathBuf,
    socket: UnixListener,
    file: Mutex<Option<SocketFile>>,
}

impl Door {
    pub(crate) fn new(path: &Path, mode: u32, group: Option<Gid>) -> Result<Self, OpenError> {
        let access = Access { mode: Mode::from_raw_mode(mode), group };
        let Listener { socket, file } =
            listener::listen_for("endpoint=unix:PATH", path, access).map_err(OpenError::Listen)?;
        Ok(Self { path: path.to_owned(), socket, file: Mutex::new(file) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes way for another endpoint at the same path.
    pub(crate) fn close(&self) {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits for peers at the door.
    pub(crate) async fn attend(&self) -> Attendant<'_> {
        loop {
            match self.socket.try_clone().and_then(tokio::net::UnixListener::from_std) {
                Ok(socket) => return Attendant { door: self, socket },
                Err(cause) => {
                    warn!(%cause, "nobody can be waited for at {:?}", self.path);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Who waits at a door.
pub(crate) struct Attendant<'a> {
    door: &'a Door,
    socket: tokio::net::UnixListener,
}

impl Attendant<'_> {
    /// The next who comes; the connection does not block.
    pub(crate) async fn accept(&self) -> UnixStream {
        loop {
            match self.socket.accept().await.and_then(|(stream, _)| stream.into_std()) {
                Ok(stream) => return stream,
                Err(cause) => {
                    warn!(%cause, "nobody can be let in at {:?}", self.door.path);
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// The process at the other end of a socket; 0 if it cannot be seen from here.
pub(crate) fn peer_of(stream: &UnixStream) -> i32 {
    getsockopt(stream, PeerCredentials).map_or(0, |peer| peer.pid())
}
