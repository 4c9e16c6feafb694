//! Sockets that another process opened and passed by number: `--fd` and `LISTEN_FDS`.
//!
//! A number is a claim. Here it becomes a socket that is known to be open, to be a unix stream
//! socket, to be close-on-exec, and to have one owner. Turning a number into an owned descriptor is
//! `unsafe` in Rust, since nothing proves that the number is not somebody else's already. This is
//! not one of the places with `unsafe`, so the kernel makes the proof: the number is sent through a
//! socket pair, what comes out is a new descriptor of our own, and the number is closed.
//! (`pidfd_getfd` would do it in one call, but system call filters meant for services and
//! containers commonly refuse it as a debugger's tool.)

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg,
    sockopt,
};

use super::{Endpoint, ListenError, Listener, Origin};

/// Takes over the unix stream socket with the number `fd`; the number itself is free afterwards.
pub(super) fn take(origin: &Origin, fd: RawFd) -> Result<Endpoint, ListenError> {
    let unusable = |source| ListenError::Descriptor { origin: origin.clone(), source };
    let socket = duplicate(fd).map_err(unusable)?;
    if !is_unix_stream(&socket).map_err(|error| unusable(error.into()))? {
        return Err(ListenError::NotUnixStream { origin: origin.clone() });
    }
    let listening = sockopt::socket_acceptconn(&socket).map_err(|error| unusable(error.into()))?;
    let endpoint = if listening {
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true).map_err(unusable)?;
        Endpoint::Listening(Listener { socket, file: None })
    } else {
        let stream = UnixStream::from(socket);
        if rustix::net::getpeername(&stream) == Err(Errno::NOTCONN) {
            return Err(ListenError::Idle { origin: origin.clone() });
        }
        stream.set_nonblocking(true).map_err(unusable)?;
        Endpoint::Connected(stream)
    };
    // Last, when it is known that the number meant what the operator thinks. Left open, the number
    // would keep the connection alive when the session has ended, and would reach processes that we
    // start.
    release(fd).map_err(unusable)?;
    Ok(endpoint)
}

fn is_unix_stream(socket: impl AsFd) -> Result<bool, Errno> {
    match sockopt::socket_domain(&socket) {
        Err(Errno::NOTSOCK) => Ok(false),
        Err(error) => Err(error),
        Ok(domain) => {
            Ok(domain == AddressFamily::UNIX
                && sockopt::socket_type(&socket)? == SocketType::STREAM)
        }
    }
}

/// A new, close-on-exec descriptor of what the number `fd` refers to.
///
/// # Errors
/// The number is of no open file, or no further descriptor may be had.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    let (near, far) = UnixDatagram::pair()?;
    // A number that was free until the line above is not what anybody passed to us.
    if fd == near.as_raw_fd() || fd == far.as_raw_fd() {
        return Err(Errno::BADF.into());
    }
    // Control messages travel with at least one byte (unix(7)).
    let data = [0_u8];
    let rights = [ControlMessage::ScmRights(&[fd])];
    sendmsg::<UnixAddr>(
        near.as_raw_fd(),
        &[IoSlice::new(&data)],
        &rights,
        MsgFlags::empty(),
        None,
    )?;

    let mut data = [0_u8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&far, &mut [IoSliceMut::new(&mut data)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    // Nothing arrives when this process has as many descriptors as it may have.
    received.ok_or_else(|| Errno::MFILE.into())
}

/// Closes the number `fd`. The standard descriptors become /dev/null instead: a closed one would be
/// given to the next file that is opened, and the program's output would go there.
///
/// # Errors
/// The number is of no open file.
pub fn release(fd: RawFd) -> io::Result<()> {
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null");
    match fd {
        0 => rustix::stdio::dup2_stdin(null()?)?,
        1 => rustix::stdio::dup2_stdout(null()?)?,
        2 => rustix::stdio::dup2_stderr(null()?)?,
        _ => nix::unistd::close(fd)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd, RawFd};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use rustix::fs::OFlags;
    use rustix::io::FdFlags;
    use rustix::net::{AddressFamily, SocketType};

    use super::super::{Endpoint, ListenError, Origin};
    use super::take;

    fn take_fd(fd: RawFd) -> Result<Endpoint, ListenError> {
        take(&Origin::Fd(fd), fd)
    }

    fn assert_ready_for_use(socket: impl AsFd) {
        assert!(rustix::io::fcntl_getfd(&socket).unwrap().contains(FdFlags::CLOEXEC));
        assert!(rustix::fs::fcntl_getfl(&socket).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn listening_and_connected_sockets_are_told_apart_and_made_ready() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("sock")).unwrap();
        rustix::io::fcntl_setfd(&listener, FdFlags::empty()).unwrap();
        match take_fd(listener.into_raw_fd()).unwrap() {
            Endpoint::Listening(listener) => assert_ready_for_use(&listener.socket),
            Endpoint::Connected(stream) => panic!("{stream:?}"),
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&ours, FdFlags::empty()).unwrap();
        match take_fd(ours.into_raw_fd()).unwrap() {
            Endpoint::Connected(stream) => assert_ready_for_use(&stream),
            Endpoint::Listening(listener) => panic!("{listener:?}"),
        }
    }

    #[test]
    fn what_is_no_unix_stream_socket_is_refused_and_stays_open() {
        let file = tempfile::tempfile().unwrap();
        let datagram = UnixDatagram::unbound().unwrap();
        let internet = TcpListener::bind("127.0.0.1:0").unwrap();
        for fd in [file.as_raw_fd(), datagram.as_raw_fd(), internet.as_raw_fd()] {
            let error = take_fd(fd).unwrap_err();
            assert!(matches!(error, ListenError::NotUnixStream { .. }), "{error}");
            assert!(error.to_string().contains(&format!("--fd {fd}")), "{error}");
        }
        rustix::io::fcntl_getfd(&file).unwrap();
        rustix::io::fcntl_getfd(&datagram).unwrap();
        rustix::io::fcntl_getfd(&internet).unwrap();
    }

    #[test]
    fn socket_that_neither_listens_nor_has_a_peer_is_refused() {
        let idle = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let error = take_fd(idle.as_raw_fd()).unwrap_err();
        assert!(matches!(error, ListenError::Idle { .. }), "{error}");
    }

    #[test]
    fn number_that_is_not_open_is_refused() {
        let error = take_fd(1_000_000).unwrap_err();
        assert!(matches!(error, ListenError::Descriptor { .. }), "{error}");
    }

    #[test]
    fn connected_socket_whose_peer_has_hung_up_is_still_a_connection() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(take_fd(ours.into_raw_fd()), Ok(Endpoint::Connected(_))));
    }
}
