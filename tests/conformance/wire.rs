//! The wire behind a network device: the other end of the stream socket that our daemon has for a network, so that a test
//! sees each frame that the guest sends, and sends each that it is to get.
//!
//! Contract: frames are as QEMU's `-netdev stream` has them, behind their length in 32 bits, big endian. Who waits for a
//! frame longer than any back end takes, fails.

use frontend::wire::PATIENCE;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Wire(UnixStream);

impl Wire {
    /// The wire of the daemon that has connected, or is about to.
    pub(crate) fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("the daemon connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        Self(stream)
    }

    /// A frame for the guest.
    pub(crate) fn send(&self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).expect("a frame is short").to_be_bytes();
        (&self.0).write_all(&[&length[..], frame].concat()).expect("the daemon takes frames");
    }

    /// Frames for the guest in two parts, of which the first has so many bytes, the lengths among them. `meanwhile` the second
    /// is yet to come.
    pub(crate) fn send_in_parts(
        &self,
        frames: &[Vec<u8>],
        first_bytes: usize,
        meanwhile: impl FnOnce(),
    ) {
        let framed = frames.iter().map(|frame| {
            let length = u32::try_from(frame.len()).expect("a frame is short").to_be_bytes();
            [&length[..], frame].concat()
        });
        let bytes = framed.collect::<Vec<_>>().concat();
        let (first, second) = bytes.split_at(first_bytes);
        (&self.0).write_all(first).expect("the daemon takes frames");
        meanwhile();
        (&self.0).write_all(second).expect("the daemon takes the rest");
    }

    /// The next frame that the guest has sent.
    #[track_caller]
    pub(crate) fn receive(&self) -> Vec<u8> {
        let mut length = [0; 4];
        (&self.0).read_exact(&mut length).unwrap_or_else(|error| panic!("no frame: {error}"));
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        (&self.0).read_exact(&mut frame).expect("a frame is whole");
        frame
    }

    /// The next frame that the guest has sent is this one: none that is wrong was sent before it.
    #[track_caller]
    pub(crate) fn must_receive(&self, frame: &[u8], what: &str) {
        let received = self.receive();
        assert!(
            received == frame,
            "{what}: {} bytes are on the wire, {:x?}…",
            received.len(),
            &received[..received.len().min(32)]
        );
    }
}
