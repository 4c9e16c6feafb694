//! A tap as an open file.

#![allow(unsafe_code, reason = "a tap is opened by a control call that takes an address")]

use std::fs::File;
use std::io;

use rustix::ioctl::{Opcode, Setter, ioctl};

/// `linux/if_tun.h`: TUNSETIFF.
const TUNSETIFF: Opcode = 0x4004_54ca;
/// `linux/if_tun.h`: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, as our daemon and DPDK's open a tap.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// `struct ifreq`, as far as it is used.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Opens the tap `name` of this thread's namespace, which has one queue. Reads do not block. Before each frame there is a `struct
/// virtio_net_hdr` of 10 bytes.
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
