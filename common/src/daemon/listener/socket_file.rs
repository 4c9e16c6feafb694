//! Sockets that this process creates: who may reach them, what may be replaced, and when the file
//! goes away.
//!
//! A vhost-user socket is the guest's disk or network for whoever can connect. So there is no
//! moment at which it is more open than the options say: the file appears with mode 0600 and is
//! opened up, if at all, when its group is right. What is at the path already is replaced only if
//! it is the socket of a process that is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tracing::warn;

use super::super::store::KeptListener;
use super::{ListenError, Listener, Origin};

/// The longest path that a socket address holds: `sun_path` has 108 bytes, the last of which is the
/// terminating zero.
const SUN_PATH_LIMIT_BYTES: usize = 107;

/// Connections that may wait to be accepted. One front end at a time is served, the next is refused
/// at once; this only has to outlast a busy moment of the main thread.
const BACKLOG: i32 = 128;

/// Who may connect.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The mode of the socket's file.
    pub mode: Mode,
    /// Its group. None: the one that the system gives a new file.
    pub group: Option<Gid>,
}

/// The file of a socket that this process created. Dropping it removes the file, unless something
/// else has taken its place at the path by then.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Keeps the file's inode number from being used again, which is what tells this file from a
    /// later one.
    inode: OwnedFd,
    /// It stays when this is dropped.
    is_left: bool,
}

impl SocketFile {
    fn at(path: &Path) -> Result<Self, Errno> {
        let inode = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { path: path.to_owned(), inode, is_left: false })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's device and inode number, by which a successor knows it.
    pub(in crate::daemon) fn identity(&self) -> Result<(u64, u64), Errno> {
        rustix::fs::fstat(&self.inode).map(|stat| (stat.st_dev, stat.st_ino))
    }

    /// Leaves the file to a successor.
    pub(in crate::daemon) fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        let ours = self.identity();
        let there = rustix::fs::lstat(&self.path).map(|stat| (stat.st_dev, stat.st_ino));
        if ours != there || there.is_err() {
            return;
        }
        if let Err(error) = rustix::fs::unlink(&self.path) {
            warn!(path = %self.path.display(), %error, "the socket file cannot be removed");
        }
    }
}

/// Creates a listening socket at `path`.
pub(super) fn listen_at(
    origin: &Origin,
    path: &Path,
    access: Access,
) -> Result<Listener, ListenError> {
    let length_bytes = path.as_os_str().as_bytes().len();
    if length_bytes > SUN_PATH_LIMIT_BYTES {
        let (origin, path) = (origin.clone(), path.to_owned());
        return Err(ListenError::PathTooLong {
            origin,
            path,
            length_bytes,
            limit_bytes: SUN_PATH_LIMIT_BYTES,
        });
    }
    let failed = |step| {
        move |source: Errno| ListenError::Create {
            origin: origin.clone(),
            path: path.to_owned(),
            step,
            source: source.into(),
        }
    };
    remove_stale(origin, path)?;
    let socket = bind_private(path).map_err(|error| match error {
        Errno::NOENT => ListenError::NoDirectory { origin: origin.clone(), path: path.to_owned() },
        error => failed("create the socket")(error),
    })?;
    let file = SocketFile::at(path).map_err(failed("open the new socket"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen on"))?;
    let (set_group, set_mode) = match origin {
        Origin::Device(_) => ("set the group of", "set the mode of"),
        _ => ("set the group (--socket-group) of", "set the mode (--socket-mode) of"),
    };
    // The group before the mode: in the other order the old group could connect in between.
    if let Some(group) = access.group {
        rustix::fs::chownat(CWD, path, None, Some(group), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed(set_group))?;
    }
    rustix::fs::chmod(path, access.mode).map_err(failed(set_mode))?;
    Ok(Listener { socket: UnixListener::from(socket), file: Some(file) })
}

/// The socket that a predecessor has bound to `path`, if its file is still there.
pub(super) fn listen_again(path: &Path, kept: &KeptListener<Arc<OwnedFd>>) -> Option<Listener> {
    let there = rustix::fs::lstat(path).ok()?;
    if !listens(&kept.socket) || (there.st_dev, there.st_ino) != kept.file {
        return None;
    }
    let socket = UnixListener::from(kept.socket.try_clone().ok()?);
    socket.set_nonblocking(true).ok()?;
    Some(Listener { socket, file: Some(SocketFile::at(path).ok()?) })
}

/// Whether it is a socket that listens.
pub(in crate::daemon) fn listens(socket: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_acceptconn(socket).is_ok_and(|listens| listens)
}

/// The device and inode number of the file that a listening socket is reached by; `None`: it is none, or is not reached.
pub(in crate::daemon) fn bound_to(socket: &OwnedFd) -> Option<(u64, u64)> {
    if !listens(socket) {
        return None;
    }
    let address = SocketAddrUnix::try_from(rustix::net::getsockname(socket).ok()?).ok()?;
    let there = rustix::fs::lstat(address.path()?).ok()?;
    Some((there.st_dev, there.st_ino))
}

/// A socket bound to `path`, with a file that only its owner can use, not yet listening.
fn bind_private(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket, less the umask (unix(7) knows only of
    // the umask). A tighter umask around bind would do as well, but it belongs to the whole
    // process, other threads' files included.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Makes way for a new socket: removes the file of a dead one, refuses to touch anything else.
fn remove_stale(origin: &Origin, path: &Path) -> Result<(), ListenError> {
    let failed = |step, source: Errno| ListenError::Create {
        origin: origin.clone(),
        path: path.to_owned(),
        step,
        source: io::Error::from(source),
    };
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(ListenError::NotASocket { origin: origin.clone(), path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match probe(path) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // EAGAIN: its backlog is full. EPROTOTYPE: it is a datagram socket. Somebody serves it in
        // both cases.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(ListenError::Live { origin: origin.clone(), path: path.to_owned() });
        }
        Err(error) => return Err(failed("find out whether a process listens on", error)),
    }
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("remove the stale socket", error)),
    }
}

/// Connects and hangs up. Without blocking: a process that has stopped accepting must not hold up
/// ours.
fn probe(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::path::Path;

    use rustix::fs::{Mode, OFlags};

    use super::super::{ListenError, Listener, Origin};
    use super::{Access, SUN_PATH_LIMIT_BYTES, bind_private, listen_at};

    const PRIVATE: Access = Access { mode: Mode::from_raw_mode(0o600), group: None };

    fn listen(path: &Path) -> Result<Listener, ListenError> {
        listen_at(&Origin::SocketPath, path, PRIVATE)
    }

    #[test]
    fn file_is_private_from_its_first_moment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let _socket = bind_private(&path).unwrap();
        assert_eq!(rustix::fs::lstat(&path).unwrap().st_mode & 0o777, 0o600);
    }

    #[test]
    fn stale_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a closed listener leaves its file");
        let listener = listen(&path).unwrap();
        assert_eq!(listener.file.as_ref().unwrap().path(), path);
        assert!(rustix::fs::fcntl_getfl(&listener.socket).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn live_socket_is_refused_and_lives_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let first = listen(&path).unwrap();
        let error = listen(&path).unwrap_err();
        assert!(matches!(error, ListenError::Live { .. }), "{error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap())
                && error.to_string().contains("--socket-path")
        );
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn live_socket_that_accepts_no_more_connections_is_refused_without_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let busy = bind_private(&path).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert!(matches!(listen(&path), Err(ListenError::Live { .. })));
        drop(waiting);
    }

    #[test]
    fn datagram_socket_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let _datagram = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(listen(&path), Err(ListenError::Live { .. })));
    }

    #[test]
    fn what_is_not_a_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("disk.img"), directory.path().join("link"));
        std::fs::write(&file, b"data").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &directory.path().to_owned()] {
            let error = listen(path).unwrap_err();
            assert!(matches!(error, ListenError::NotASocket { .. }), "{error}");
        }
        assert_eq!(std::fs::read(&link).unwrap(), b"data");
    }

    #[test]
    fn path_that_fits_no_socket_address_is_refused_with_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let room = SUN_PATH_LIMIT_BYTES - directory.path().as_os_str().len() - 1;
        let longest = directory.path().join("s".repeat(room));
        assert!(listen(&longest).is_ok());
        let error = listen(&directory.path().join("s".repeat(room + 1))).unwrap_err().to_string();
        assert!(error.contains("108 bytes") && error.contains("107"), "{error}");
    }

    #[test]
    fn missing_directory_is_named_as_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let error = listen(&directory.path().join("none/sock")).unwrap_err();
        assert!(matches!(error, ListenError::NoDirectory { .. }), "{error}");
        std::fs::write(directory.path().join("file"), b"").unwrap();
        let error = listen(&directory.path().join("file/sock")).unwrap_err();
        assert!(matches!(error, ListenError::Create { .. }), "{error}");
    }

    #[test]
    fn successors_socket_at_the_same_path_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let Listener { socket, file } = listen(&path).unwrap();
        drop(socket);
        // File systems give a free inode number to the next file: the pinned one is what keeps them
        // different.
        let successor = listen(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }
}
