//! A ring of our own in a daemon: by it a network's daemon is given the driver's commands, one at a time.
//!
//! Contract: the ring and the commands are in memory that the daemon shares with this process and no guest. A command is
//! answered within a limit, or the connection is given up. What the daemon writes there is used for nothing but the
//! answer: one byte.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use thiserror::Error;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::setup::{self, RingSetup};
use crate::interrupts::Call;
use crate::readiness::wait_for;
use crate::virtio::common::{Queue, VIRTIO_MSI_NO_VECTOR};

/// Bytes of a command: a table of MAC addresses is the longest, and has room for 2,700 of them.
pub(super) const COMMAND_BYTES_MAX: usize = 0x4000;

/// Where the memory is for the daemon: beyond what any guest of ours has.
const BASE: u64 = 1 << 46;
// What is where in it.
const TABLE: u64 = BASE;
const AVAILABLE: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
const COMMAND: u64 = BASE + 0x4000;
const ANSWER: u64 = BASE + 0x8000;
const MEMORY_BYTES: usize = 0x1_0000;
/// One command's two descriptors.
const SIZE: u16 = 2;

const VIRTQ_DESC_F_NEXT: u16 = 1;
const VIRTQ_DESC_F_WRITE: u16 = 2;

/// Why a command was not answered.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("no memory or descriptors for it")]
    Resources(#[source] io::Error),
    #[error("its memory cannot be mapped")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    #[error("its ring")]
    Ring(#[from] setup::Error),
    #[error("its memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("the driver's ring")]
    DriverRing(#[from] virtio_queue::Error),
    #[error("the daemon has hung up")]
    HungUp,
    #[error("the daemon has not carried out a command in time")]
    Late,
}

/// The ring.
pub(super) struct Relay {
    memory: GuestMemoryMmap,
    ring: RingSetup,
    /// Commands so far.
    count: u16,
}

impl Relay {
    /// A ring that is to be the daemon's queue of this index.
    pub(super) fn new(index: u16) -> Result<Self, Error> {
        let resources = |errno: rustix::io::Errno| Error::Resources(errno.into());
        let file = memfd_create("control-queue", MemfdFlags::CLOEXEC).map_err(resources)?;
        ftruncate(&file, MEMORY_BYTES as u64).map_err(resources)?;
        let range = (GuestAddress(BASE), MEMORY_BYTES, Some(FileOffset::new(File::from(file), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).map_err(Error::Map)?;
        let kick = EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(Error::Resources)?;
        let call = Call::new().map_err(Error::Resources)?;
        let queue = Queue {
            size: SIZE,
            vector: VIRTIO_MSI_NO_VECTOR,
            is_enabled: true,
            descriptors: TABLE,
            driver: AVAILABLE,
            device: USED,
        };
        let ring = RingSetup::new(&memory, index, &queue, (kick, call))?;
        Ok(Self { memory, ring, count: 0 })
    }

    pub(super) fn ring(&self) -> &RingSetup {
        &self.ring
    }

    /// What the daemon is to map besides guest memory.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Has a command of at most [`COMMAND_BYTES_MAX`] carried out; returns the answer.
    pub(super) fn carry_out(
        &mut self,
        command: &[u8],
        socket: &UnixStream,
        limit: Duration,
    ) -> Result<u8, Error> {
        let (memory, count) = (&self.memory, self.count);
        let next = count.wrapping_add(1);
        memory.write_slice(command, GuestAddress(COMMAND))?;
        memory.write_obj(u8::MAX, GuestAddress(ANSWER))?;
        let len = u32::try_from(command.len()).unwrap_or(u32::MAX);
        self.describe(0, (COMMAND, len, VIRTQ_DESC_F_NEXT))?;
        self.describe(1, (ANSWER, 1, VIRTQ_DESC_F_WRITE))?;
        // Every entry is the chain from descriptor 0 on: they are zero from the start. With EVENT_IDX, a call is wanted
        // for the next used entry.
        let event = AVAILABLE.saturating_add(4).saturating_add(u64::from(SIZE).saturating_mul(2));
        memory.store(count.to_le(), GuestAddress(event), Ordering::Relaxed)?;
        // VIRTIO 1.3, 2.7.13.3: the index is written after the entry, and pairs with the device's look at it.
        let available = GuestAddress(AVAILABLE.saturating_add(2));
        memory.store(next.to_le(), available, Ordering::Release)?;
        // Between our index and our look at the device's, as between its index and its look at our event index.
        fence(Ordering::SeqCst);
        let _full = self.ring.kick.write(1);
        self.count = next;
        let begin = Instant::now();
        while self.ring.used_index(memory) != next {
            let left = limit.checked_sub(begin.elapsed()).ok_or(Error::Late)?;
            let descriptors = [Some(self.ring.call.theirs.as_raw_fd()), Some(socket.as_raw_fd())];
            let [_, has_hung_up] = wait_for(descriptors, Some(left)).map_err(Error::Resources)?;
            let _not_called = self.ring.call.theirs.read();
            if has_hung_up && self.ring.used_index(memory) != next {
                return Err(Error::HungUp);
            }
        }
        Ok(memory.load::<u8>(GuestAddress(ANSWER), Ordering::Acquire)?)
    }

    fn describe(&self, index: u16, (at, len, flags): (u64, u32, u16)) -> Result<(), Error> {
        let next = index.saturating_add(1).to_le_bytes();
        let words = (at.to_le_bytes(), len.to_le_bytes(), flags.to_le_bytes());
        let bytes = [&words.0[..], &words.1, &words.2, &next].concat();
        let place = TABLE.saturating_add(u64::from(index).saturating_mul(16));
        Ok(self.memory.write_slice(&bytes, GuestAddress(place))?)
    }
}
