//! No network at all, for benches of everything but it: what is sent vanishes, and frames come without end or never.
//!
//! Contract: what is written to the transmit descriptor is gone. The receive descriptor gives nothing ever, or, where
//! frames are to come, zeros without end: as many of them as [`Null::frame_bytes`] are one frame's, whose first bytes the
//! queue replaces by [`HEAD`]. There is no virtio header on either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::error::OpenError;
use super::link::Link;

/// What a frame begins with: to everybody, from a locally administered address, of a type for experiments (IEEE 802,
/// "local experimental Ethertype 1").
pub(crate) const HEAD: [u8; 14] =
    [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02, 0, 0, 0, 0, 0x01, 0x88, 0xb5];

const OPTION: &str = "null";

/// No network.
#[derive(Debug)]
pub(crate) struct Null {
    /// For each pair, where from and where to.
    files: Vec<[OwnedFd; 2]>,
    frame_bytes: Option<u16>,
    /// The other end of what never gives anything.
    #[expect(dead_code, reason = "held, not read: closing it would be an end to read")]
    silence: OwnedFd,
    link: Link,
}

impl Null {
    pub(super) fn open(frame_bytes: Option<u16>, pairs: u16) -> Result<Self, OpenError> {
        let opened = || -> Result<_, Errno> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (near, silence) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let device = |path: &str| open(path, flags, Mode::empty());
            let files: Result<Vec<_>, Errno> = (0..pairs)
                .map(|_| {
                    let receive = match frame_bytes {
                        Some(_) => device("/dev/zero")?,
                        None => rustix::io::fcntl_dupfd_cloexec(&near, 0)?,
                    };
                    Ok([receive, device("/dev/null")?])
                })
                .collect();
            Ok((files?, silence))
        };
        let (files, silence) = opened()
            .map_err(|errno| OpenError::Descriptors { option: OPTION, source: errno.into() })?;
        let link = Link::default();
        link.set_up(true);
        Ok(Self { files, frame_bytes, silence, link })
    }

    /// The length of the frames that come, if any do.
    pub(crate) fn frame_bytes(&self) -> Option<u16> {
        self.frame_bytes
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Receive and transmit descriptor of each pair.
    pub(crate) fn files(&self) -> impl Iterator<Item = [BorrowedFd<'_>; 2]> {
        self.files.iter().map(|[receive, transmit]| [receive.as_fd(), transmit.as_fd()])
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::{Errno, read, write};

    use super::Null;

    #[test]
    fn everything_is_swallowed_and_nothing_comes() {
        let null = Null::open(None, 2).unwrap();
        assert!(null.link().is_up());
        assert_eq!(null.files().count(), 2);
        for [receive, transmit] in null.files() {
            assert_eq!(write(transmit, &[1; 70000]), Ok(70000));
            assert_eq!(read(receive, &mut [0; 64]), Err(Errno::AGAIN));
        }
    }

    #[test]
    fn bytes_of_frames_come_without_end() {
        let null = Null::open(Some(64), 1).unwrap();
        assert_eq!(null.frame_bytes(), Some(64));
        let [receive, _] = null.files().next().unwrap();
        for _ in 0..1000 {
            assert_eq!(read(receive, &mut [0; 64]), Ok(64));
        }
    }
}
