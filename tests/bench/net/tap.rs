//! What a tap can by itself: one frame for each system call, and nothing else is done.

#![allow(unsafe_code, reason = "a tap is opened by a control call that takes an address")]

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Opcode, Setter, ioctl};

use crate::sample::Way;

/// `linux/if_tun.h`: TUNSETIFF.
const TUNSETIFF: Opcode = 0x4004_54ca;
/// `linux/if_tun.h`: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, as our daemon and DPDK's open a tap.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
/// `struct virtio_net_hdr`, which is before each frame of such a tap.
const HEADER_BYTES: usize = 10;
/// Longer than any frame here.
const BUFFER_BYTES: usize = 2048;
/// Waits are cut short, so that the loop notices that its time is over.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// `struct ifreq`, as far as it is used.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Opens the tap `name` of this thread's namespace. Reads do not block.
pub(crate) fn open(name: &str) -> io::Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    rustix::io::ioctl_fionbio(&tap, true)?;
    let mut request = Request { name: [0; 16], flags: FLAGS, rest: [0; 22] };
    request.name.iter_mut().zip(name.bytes()).for_each(|(into, from)| *into = from);
    // SAFETY: TUNSETIFF takes a `struct ifreq`, which has 40 bytes, as `request` has.
    let call = unsafe { Setter::<TUNSETIFF, Request>::new(request) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(&tap, call) }?;
    Ok(tap)
}

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
