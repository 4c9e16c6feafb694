//! An operation as a thread performs it: one system call, which may block.
//!
//! Contract: the buffers of a job stay valid until its event has been returned, as for every
//! operation; the list of them is the job's own copy. Guest memory is only ever touched by the
//! kernel here, which answers memory that is gone with `EFAULT`.

#![allow(unsafe_code, reason = "system calls take addresses that the kernel will use")]

use std::io;
use std::os::fd::RawFd;

use crate::engine::op::zeros;
use crate::engine::{Event, FileIndex, Op, Subject};
use crate::memory::HostBuffer;
use crate::virtqueue::{Buffers, MAX_CHAIN_DESCRIPTORS};

/// See the module's head.
pub(super) struct Job {
    subject: Subject,
    file: RawFd,
    call: Call,
}

/// Offsets and lengths are in bytes.
enum Call {
    Read { offset: u64, into: Vec<HostBuffer> },
    Write { offset: u64, from: Vec<HostBuffer>, flags: i32 },
    WriteZeros { offset: u64, len_bytes: u64 },
    Allocate { offset: u64, len_bytes: u64, mode: i32 },
    Sync,
}

impl Job {
    /// `op` on one of `files`, whose end is an event for `subject`.
    pub(super) fn new(subject: Subject, op: Op<'_>, files: &[RawFd]) -> Self {
        let file = |index: FileIndex| files[index.0 as usize];
        let (file, call) = match op {
            Op::Read { file: index, offset, into } => {
                (file(index), Call::Read { offset, into: list(into) })
            }
            Op::Write { file: index, offset, from, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                (file(index), Call::Write { offset, from: list(from), flags })
            }
            Op::Sync { file: index } => (file(index), Call::Sync),
            Op::Zero { file: index, offset, len_bytes, zeroing } => {
                let call = match zeroing.fallocate_mode() {
                    Some(mode) => Call::Allocate { offset, len_bytes, mode },
                    None => Call::WriteZeros { offset, len_bytes },
                };
                (file(index), call)
            }
        };
        Self { subject, file, call }
    }

    /// Performs it.
    pub(super) fn run(self) -> Event {
        let result = loop {
            let returned = self.call.make(self.file);
            match i32::try_from(returned) {
                Ok(moved) if moved >= 0 => break moved,
                _ => match io::Error::last_os_error().raw_os_error() {
                    // A signal for the process came to this thread.
                    Some(libc::EINTR) => {}
                    errno => break -errno.unwrap_or(libc::EIO),
                },
            }
        };
        Event { subject: self.subject, result, more: false }
    }
}

impl Call {
    /// The system call; -1 with `errno` set where it failed. No file is as long as 2^63 bytes, and
    /// what would end beyond is refused by the kernel.
    fn make(&self, file: RawFd) -> isize {
        let place = |offset: u64| libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX);
        match self {
            Self::Read { offset, into } => {
                let (list, count) = as_kernel_takes_it(into);
                // SAFETY: the list is the job's own, and its buffers are mapped until the job's
                // event is returned; the kernel writes to no others.
                unsafe { libc::preadv(file, list, count, place(*offset)) }
            }
            Self::Write { offset, from, flags } => {
                let (list, count) = as_kernel_takes_it(from);
                // SAFETY: as for the read, with the directions exchanged.
                unsafe { libc::pwritev2(file, list, count, place(*offset), *flags) }
            }
            Self::WriteZeros { offset, len_bytes } => {
                let zeros: Vec<_> = zeros(*len_bytes).collect();
                let (list, count) = as_kernel_takes_it(&zeros);
                // SAFETY: the buffers are a constant of this process.
                unsafe { libc::pwritev(file, list, count, place(*offset)) }
            }
            Self::Allocate { offset, len_bytes, mode } => {
                // SAFETY: no memory is involved.
                let done =
                    unsafe { libc::fallocate(file, *mode, place(*offset), place(*len_bytes)) };
                done as isize
            }
            Self::Sync => {
                // SAFETY: no memory is involved.
                let done = unsafe { libc::fdatasync(file) };
                done as isize
            }
        }
    }
}

fn list(buffers: Buffers<'_>) -> Vec<HostBuffer> {
    buffers.iter().collect()
}

/// Address and length of a list.
fn as_kernel_takes_it(list: &[HostBuffer]) -> (*const libc::iovec, libc::c_int) {
    // A buffer has the layout of an `iovec`. What is beyond the kernel's limit is a short transfer.
    let count = list.len().min(usize::from(MAX_CHAIN_DESCRIPTORS));
    (list.as_ptr().cast(), count as libc::c_int)
}
