//! The connection to the console's socket, bound so that the daemon knows which viewer it is.
//!
//! Contract: the socket is bound, before it connects, to the abstract address `outboard/write/ID` or `outboard/watch/ID`,
//! the ID 32 random hex digits. The daemon sees it as its peer's address, so nothing but the console's bytes need go over the
//! connection; on the control socket the ID then names the viewer. Any other server takes no notice of it.

use std::fmt::Write as _;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with,
};
use rustix::rand::{GetRandomFlags, getrandom};

/// Bytes of an ID: no two viewers have the same, and nobody guesses one.
const ID_BYTES: usize = 16;

/// A connection, and the ID that it is bound to.
#[derive(Debug)]
pub(super) struct Viewer {
    pub(super) stream: UnixStream,
    pub(super) id: String,
}

impl Viewer {
    /// Connects. May wait, as long as the daemon's backlog is full.
    pub(super) fn connect(path: &Path, watch: bool) -> io::Result<Self> {
        let id = random_id()?;
        let wish = if watch { "watch" } else { "write" };
        let own = SocketAddrUnix::new_abstract_name(format!("outboard/{wish}/{id}").as_bytes())?;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &own)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self { stream: UnixStream::from(socket), id })
    }
}

fn random_id() -> io::Result<String> {
    let mut bytes = [0; ID_BYTES];
    // Requests of up to 256 bytes are never short (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    let mut id = String::new();
    for byte in bytes {
        // Writing to a string cannot fail.
        let _infallible = write!(id, "{byte:02x}");
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn server_sees_which_viewer_it_is_and_what_it_wants() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut ids = Vec::new();
        for (watch, wish) in [(false, "write"), (true, "watch")] {
            let viewer = Viewer::connect(&path, watch).unwrap();
            let (_stream, address) = listener.accept().unwrap();
            let wanted = format!("outboard/{wish}/{}", viewer.id);
            assert_eq!(address.as_abstract_name(), Some(wanted.as_bytes()));
            assert!(viewer.id.len() == 32 && viewer.id.bytes().all(|b| b.is_ascii_hexdigit()));
            ids.push(viewer.id);
        }
        assert_ne!(ids[0], ids[1]);
    }

    #[test]
    fn path_without_a_server_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Viewer::connect(&directory.path().join("none"), false).is_err());
        assert!(Viewer::connect(Path::new(&"x".repeat(200)), false).is_err());
    }
}
