//! What is done to descriptors that no safe wrapper knows: the control calls of a tap, another file under a number, and
//! waiting on the main thread.
//!
//! Contract: each function is one system call, and says what the kernel said. The calls of a tap are known to tap and
//! macvtap files alone; other files refuse them (ENOTTY), whatever they are. Nothing here knows what a call is for.

#![allow(
    unsafe_code,
    reason = "control calls that take addresses, and numbers that are held elsewhere"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

use common::sandbox::Call;
use nix::errno::Errno;
use nix::libc;
use rustix::io;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The control calls of a tap that is open.
pub(super) const CALLS: &[Call] = &[
    Call::ioctl(libc::TUNGETIFF as u32),
    Call::ioctl(libc::TUNSETQUEUE as u32),
    Call::ioctl(libc::TUNSETOFFLOAD as u32),
    Call::ioctl(libc::TUNSETVNETHDRSZ as u32),
];
/// The one by which a file takes an interface that has come back.
pub(super) const ATTACH: Call = Call::ioctl(libc::TUNSETIFF as u32);
/// Another file comes under a number.
pub(super) const REPLACE: Call = Call::any(libc::SYS_dup3);

/// Room for an interface's name and the zero behind it.
const NAME_BYTES: usize = libc::IFNAMSIZ;

/// The kernel's `struct ifreq`, as far as a tap uses it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Request {
    name: [u8; NAME_BYTES],
    flags: i16,
    rest: [u8; size_of::<libc::ifreq>() - NAME_BYTES - size_of::<i16>()],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

impl Request {
    fn new(name: &str, flags: i32) -> Self {
        let mut request = Self { name: [0; NAME_BYTES], flags: low_half(flags), rest: [0; _] };
        // The last byte stays the terminating zero.
        for (into, from) in request.name[..NAME_BYTES - 1].iter_mut().zip(name.bytes()) {
            *into = from;
        }
        request
    }

    fn tap(&self) -> Tap {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        let flags = i32::from(u16::from_ne_bytes(self.flags.to_ne_bytes()));
        Tap { name: String::from_utf8_lossy(name).into_owned(), flags }
    }
}

/// The flags of a tap are 16 bits, which the kernel's structure has as a signed number.
fn low_half(flags: i32) -> i16 {
    let [low, high, ..] = flags.to_le_bytes();
    i16::from_le_bytes([low, high])
}

/// What a tap's file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tap {
    /// The interface's name now, in the network namespace where it is.
    pub(super) name: String,
    /// `IFF_TAP` and the like.
    pub(super) flags: i32,
}

/// TUNSETIFF: makes the file a queue of the tap `name`, which is created if there is no interface of that name.
pub(super) fn set_interface(file: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    let mut request = Request::new(name, flags);
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` is as large as.
    let call = unsafe { Updater::<{ libc::TUNSETIFF as Opcode }, Request>::new(&mut request) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(file, call) }
}

/// TUNGETIFF: which tap the file is a queue of; EBADFD where it is of none, or of one that is gone.
pub(super) fn interface(file: BorrowedFd<'_>) -> io::Result<Tap> {
    let mut request = Request::new("", 0);
    // SAFETY: TUNGETIFF writes a `struct ifreq`, which `request` is as large as.
    let call = unsafe { Updater::<{ libc::TUNGETIFF as Opcode }, Request>::new(&mut request) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(file, call) }?;
    Ok(request.tap())
}

/// TUNSETQUEUE: whether the queue takes part in the tap's traffic.
pub(super) fn attach_queue(file: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let request = Request::new("", flags);
    // SAFETY: TUNSETQUEUE reads a `struct ifreq`, which `request` is as large as.
    let call = unsafe { Setter::<{ libc::TUNSETQUEUE as Opcode }, Request>::new(request) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(file, call) }
}

/// TUNSETOFFLOAD: which frames may be read unsegmented or without a checksum (`TUN_F_*`).
pub(super) fn set_offloads(file: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number, no address. `Opcode` has 32 bits, and `usize` has them.
    let call =
        unsafe { IntegerSetter::<{ libc::TUNSETOFFLOAD as Opcode }>::new_usize(flags as usize) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(file, call) }
}

/// TUNSETVNETHDRSZ: the length of the header before each frame.
pub(super) fn set_header_bytes(file: BorrowedFd<'_>, header_bytes: i32) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    let call = unsafe { Setter::<{ libc::TUNSETVNETHDRSZ as Opcode }, i32>::new(header_bytes) };
    // SAFETY: as said of the call's construction.
    unsafe { ioctl(file, call) }
}

/// The file of `with` under the number of `held` too, which it stays open under for whoever uses that number.
pub(super) fn replace(held: BorrowedFd<'_>, with: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the number is held open for as long as `held` is borrowed, before and after the call: it never becomes
    // free, its owner still closes it once, and no memory depends on which file it leads to.
    let done = unsafe { libc::dup3(with.as_raw_fd(), held.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 { Err(io::Errno::from_raw_os_error(Errno::last_raw())) } else { Ok(()) }
}

/// For the main thread to wait until there is something to read. Within the runtime, and not for a number that is ever
/// [replaced](replace).
pub(super) fn readable(file: BorrowedFd<'_>) -> std::io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor is open for as long as it is borrowed, which outlasts what holds it, and its number
    // never changes; the files that are watched are none of a queue's, which alone are replaced.
    let watched = unsafe { AsyncFd::register_with_interest(file, Interest::READABLE) };
    Ok(watched?)
}
