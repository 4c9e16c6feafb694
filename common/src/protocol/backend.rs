//! The channel on which the back end may speak first (vhost-user, "Back-end communication").
//!
//! It only says things that need no answer, so that a front end which never reads, or never replies, cannot hold up
//! anything here: a message is taken by the socket at once, or given up.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, SocketType, sockopt};

use super::Header;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE_MSG: u32 = 2;

/// The socket that came with `SET_BACKEND_REQ_FD`.
#[derive(Debug)]
pub struct BackendChannel {
    socket: OwnedFd,
}

impl BackendChannel {
    /// A channel over this socket.
    ///
    /// # Errors
    /// The descriptor is not a Unix stream socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let domain = sockopt::socket_domain(&socket)?;
        let socket_type = sockopt::socket_type(&socket)?;
        if domain != AddressFamily::UNIX || socket_type != SocketType::STREAM {
            let message = "the back-end channel must be a unix stream socket";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Self { socket })
    }

    /// Says that the configuration space has changed, so that the front end reads it again. Legal if `CONFIG` and
    /// `BACKEND_REQ` have been negotiated.
    ///
    /// # Errors
    /// `WouldBlock` if the front end has not read what it was told before, in which case it will learn of this change
    /// as well when it does; otherwise the channel is of no more use.
    pub fn config_changed(&mut self) -> io::Result<()> {
        let message = Header::request(CONFIG_CHANGE_MSG, 0).to_bytes();
        // Whether the descriptor blocks is the front end's choice, and to change it would change it there too.
        let sent =
            rustix::net::send(&self.socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn config_change_is_a_request_without_payload_that_wants_no_reply() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let mut channel = BackendChannel::new(ours.into()).expect("channel");
        channel.config_changed().expect("sent");
        drop(channel);
        let mut received = Vec::new();
        theirs.read_to_end(&mut received).expect("received");
        let expected: Vec<u8> = [2u32, 1, 0].iter().flat_map(|field| field.to_ne_bytes()).collect();
        assert_eq!(received, expected);
    }

    #[test]
    fn front_end_that_does_not_read_does_not_block_us() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let mut channel = BackendChannel::new(ours.into()).expect("channel");
        let full = loop {
            if let Err(error) = channel.config_changed() {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(channel.config_changed().expect_err("hung up").kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn what_is_no_stream_socket_is_rejected() {
        let (reader, _writer) = rustix::pipe::pipe().expect("pipe");
        assert!(BackendChannel::new(reader).is_err());
        let (ours, _theirs) = UnixDatagram::pair().expect("sockets");
        assert_eq!(
            BackendChannel::new(ours.into()).expect_err("datagrams").kind(),
            ErrorKind::InvalidInput
        );
    }
}
