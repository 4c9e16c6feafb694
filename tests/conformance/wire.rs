//! The wire behind a network device, or behind a console: the other end of the stream socket that our daemon has for it, so
//! that a test sees each frame or piece of text that the guest sends, and sends each that it is to get.
//!
//! Contract: frames are as QEMU's `-netdev stream` has them, behind their length in 32 bits, big endian; of a console there are
//! only bytes. Who waits for a frame longer than any back end takes, fails.

use frontend::message::VIRTIO_F_VERSION_1;
use frontend::net::VIRTIO_NET_F_MRG_RXBUF;
use frontend::wire::PATIENCE;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// What it is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Network,
    Console,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Wire(UnixStream, Device);

impl Wire {
    /// The wire of the daemon that has connected, or is about to.
    pub(crate) fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("the daemon connects");
        Self::new(stream, Device::Network)
    }

    /// A viewer of the console at this socket.
    pub(crate) fn view(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).expect("the daemon listens"), Device::Console)
    }

    /// Another hand on it, for another thread.
    pub(crate) fn another(&self) -> Self {
        Self(self.0.try_clone().expect("a socket has many descriptors"), self.1)
    }

    fn new(stream: UnixStream, device: Device) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        Self(stream, device)
    }

    /// Whether there is a console at the other end.
    pub(crate) fn is_of_a_console(&self) -> bool {
        self.1 == Device::Console
    }

    /// Bytes that a driver with these features has before a frame, in guest memory.
    pub(crate) fn header_bytes(&self, features: u64) -> usize {
        match self.1 {
            Device::Console => 0,
            Device::Network if features & (VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF) == 0 => 10,
            Device::Network => 12,
        }
    }

    /// Has the device look at what its receive queue has: a network's does so anyhow, a console's when there is something to
    /// put in.
    pub(crate) fn provoke(&self) {
        if self.is_of_a_console() {
            self.send(b"?");
        }
    }

    /// A frame, or text, for the guest.
    pub(crate) fn send(&self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).expect("a frame is short").to_be_bytes();
        let length = if self.is_of_a_console() { &[] } else { &length[..] };
        (&self.0).write_all(&[length, frame].concat()).expect("the daemon takes frames");
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

    /// The next frame that the guest has sent is this one, or the text: none that is wrong was sent before it.
    #[track_caller]
    pub(crate) fn must_receive(&self, frame: &[u8], what: &str) {
        let received = self.next(frame.len());
        assert!(
            received == frame,
            "{what}: {} bytes are on the wire, {:x?}…",
            received.len(),
            &received[..received.len().min(32)]
        );
    }

    /// So many bytes of text, or else a frame.
    fn next(&self, text_bytes: usize) -> Vec<u8> {
        if !self.is_of_a_console() {
            return self.receive();
        }
        let mut text = vec![0; text_bytes];
        (&self.0).read_exact(&mut text).unwrap_or_else(|error| panic!("no text: {error}"));
        text
    }
}
