//! No network at all, for benches of everything but it: what is sent vanishes, and frames come without end or never.
//!
//! Contract: there is no descriptor, and so no system call: a queue that sends has sent, and one that receives finds a frame
//! of [`Null::frame_bytes`] which begins with [`HEAD`], or nothing.

use super::link::Link;

/// What a frame begins with: to everybody, from a locally administered address, of a type for experiments (IEEE 802,
/// "local experimental Ethertype 1").
pub(crate) const HEAD: [u8; 14] =
    [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x01, 0x88, 0xb5];

/// No network.
#[derive(Debug)]
pub(crate) struct Null {
    frame_bytes: Option<u16>,
    link: Link,
}

impl Null {
    pub(super) fn new(frame_bytes: Option<u16>) -> Self {
        let link = Link::default();
        link.set_up(true);
        Self { frame_bytes, link }
    }

    /// The length of the frames that come, if any do.
    pub(crate) fn frame_bytes(&self) -> Option<u16> {
        self.frame_bytes
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }
}
