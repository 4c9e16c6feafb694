//! What a tap can by itself: one frame for each system call, and nothing else is done.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sample::Way;

/// `struct virtio_net_hdr`, which is before each frame of such a tap.
const HEADER_BYTES: usize = 10;
/// Longer than any frame here.
const BUFFER_BYTES: usize = 2048;
/// Waits are cut short, so that the loop notices that its time is over.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Writes or reads frames for `time`; how many there were.
pub(crate) fn turn(tap: &File, way: Way, frame_bytes: usize, time: Duration) -> io::Result<u64> {
    let mut buffer = [0; BUFFER_BYTES];
    // To everybody, of a type for experiments: the host has no use for it.
    buffer[HEADER_BYTES..][..6].fill(0xff);
    buffer[HEADER_BYTES + 12..][..2].copy_from_slice(&[0x88, 0xb5]);
    let until = Instant::now() + time;
    let mut frames = 0;
    while Instant::now() < until {
        let mut handle = tap;
        let moved = match way {
            Way::Sends => handle.write(&buffer[..HEADER_BYTES + frame_bytes]),
            Way::Receives => handle.read(&mut buffer),
        };
        match moved {
            Ok(_) => frames += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&tap.as_fd(), PollFlags::IN)], Some(&WAIT))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(frames)
}
