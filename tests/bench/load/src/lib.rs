//! A client of vhost-user-blk daemons: front end and driver on the `virtio-driver` crate, whose authors are not ours.
//!
//! It loads the daemons that the bench compares, and is the independent client of the tests: protocol, rings and
//! request layout are all somebody else's reading of the specifications. Buffers are memfds that the daemon maps; this
//! process reaches them by `pread` and `pwrite` only, and needs no `unsafe`.
//!
//! What the crate does not do is not here either: indirect descriptors, `GET_VRING_BASE`, in-flight regions,
//! reconnection.

mod random;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

pub use crate::random::Random;

/// No daemon takes this long over a request, however busy the machine: it has lost it.
const COMPLETION_LIMIT: Duration = Duration::from_secs(30);
/// Buffers begin on a page, as a guest's do.
const PAGE_BYTES: usize = 4096;

/// What this client makes use of. FLUSH among it: a driver without it asks for writes that are stable at once.
const WANTED_BLK_FEATURES: VirtioBlkFeatureFlags = VirtioBlkFeatureFlags::FLUSH
    .union(VirtioBlkFeatureFlags::MQ)
    .union(VirtioBlkFeatureFlags::DISCARD)
    .union(VirtioBlkFeatureFlags::WRITE_ZEROES);

/// A connection whose queues are running.
pub struct Client {
    /// The request queues. Each may be driven by a thread of its own.
    pub queues: Vec<ClientQueue>,
    /// What the device said about the disk.
    pub geometry: Geometry,
    /// Hangs up when dropped.
    _transport: Box<VirtioBlkTransport>,
}

/// The part of the configuration space that a client needs (VIRTIO 1.3, 5.2.4).
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Limit of a discard request in sectors; 0 if the device does not offer the command.
    pub max_discard_sectors: u32,
    /// Limit of a write zeroes request in sectors; 0 if the device does not offer the command.
    pub max_write_zeroes_sectors: u32,
}

impl Client {
    /// Connects to a daemon and starts `queue_count` queues of `queue_size` descriptors, each with `buffer_bytes` of
    /// memory to transfer from and to.
    ///
    /// # Errors
    /// If nobody listens at `socket`, or the daemon lacks a protocol feature, refuses a message or has too few queues.
    pub fn connect(
        socket: &Path,
        queue_count: usize,
        queue_size: u16,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        let wanted = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | WANTED_BLK_FEATURES.bits();
        let socket = socket.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(socket, wanted)?);
        let features = VirtioBlkFeatureFlags::from_bits_truncate(transport.get_features());
        let config = transport.get_config()?;
        let limit = |feature, sectors: virtio_driver::Le32| {
            if features.contains(feature) { sectors.to_native() } else { 0 }
        };
        let geometry = Geometry {
            capacity_sectors: config.capacity.to_native(),
            max_discard_sectors: limit(VirtioBlkFeatureFlags::DISCARD, config.max_discard_sectors),
            max_write_zeroes_sectors: limit(
                VirtioBlkFeatureFlags::WRITE_ZEROES,
                config.max_write_zeroes_sectors,
            ),
        };
        let rings = VirtioBlkQueue::setup_queues(&mut *transport, queue_count, queue_size)?;
        let mut queues = Vec::with_capacity(queue_count);
        for (queue_index, ring) in rings.into_iter().enumerate() {
            queues.push(ClientQueue {
                ring,
                notifier: transport.get_submission_notifier(queue_index),
                call: transport.get_completion_fd(queue_index),
                buffers: Buffers::share(&mut *transport, buffer_bytes)?,
            });
        }
        Ok(Self { queues, geometry, _transport: transport })
    }
}

/// A request that the device has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// What the request was submitted with.
    pub tag: usize,
    /// 0, or a negative errno: `-EIO` for IOERR, `-ENOTSUP` for UNSUPP, `-EPROTO` for any other status.
    pub result: i32,
}

/// One request queue and its buffer memory.
///
/// Requests are placed in the available ring; the device is told of them by [`Self::kick`]. Disk offsets are in bytes and
/// multiples of 512, `buffer` is a range of the buffer memory. All fail if the ring is full or an offset is none.
pub struct ClientQueue {
    ring: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    buffers: Buffers,
}

impl ClientQueue {
    /// Submits a read from the disk into the buffer.
    ///
    /// # Errors
    /// See [`ClientQueue`].
    pub fn read(&mut self, offset_bytes: u64, buffer: Range<usize>, tag: usize) -> io::Result<()> {
        self.ring.read(offset_bytes, self.buffers.addresses(buffer), tag)
    }

    /// Submits a write of the buffer to the disk.
    ///
    /// # Errors
    /// See [`ClientQueue`].
    pub fn write(&mut self, offset_bytes: u64, buffer: Range<usize>, tag: usize) -> io::Result<()> {
        self.ring.write(offset_bytes, self.buffers.addresses(buffer), tag)
    }

    /// Submits a flush: what has been written before becomes stable.
    ///
    /// # Errors
    /// See [`ClientQueue`].
    pub fn flush(&mut self, tag: usize) -> io::Result<()> {
        self.ring.flush(tag)
    }

    /// Submits a discard: the bytes of this range of the disk are not needed any more.
    ///
    /// # Errors
    /// See [`ClientQueue`].
    pub fn discard(&mut self, disk: Range<u64>, tag: usize) -> io::Result<()> {
        self.ring.discard(disk.start, disk.end - disk.start, tag)
    }

    /// Submits a write zeroes: the range of the disk reads as zeroes from then on, and with `unmap` needs no space.
    ///
    /// # Errors
    /// See [`ClientQueue`].
    pub fn write_zeroes(&mut self, disk: Range<u64>, unmap: bool, tag: usize) -> io::Result<()> {
        self.ring.write_zeroes(disk.start, disk.end - disk.start, unmap, tag)
    }

    /// Notifies the device, if it asked to be.
    ///
    /// # Errors
    /// Those of `write` on an eventfd.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() { self.notifier.notify() } else { Ok(()) }
    }

    /// Sleeps until at least one request has completed and appends all that have to `completed`.
    ///
    /// # Errors
    /// `TimedOut` if the device has lost a request; those of `poll`.
    pub fn wait(&mut self, completed: &mut Vec<Completed>) -> io::Result<()> {
        while !self.ring.completions().has_next() {
            self.ring.set_used_notif_enabled(true);
            // The device may have finished before it could see that a call is wanted.
            if !self.ring.completions().has_next() && !self.called_within(COMPLETION_LIMIT)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.ring.set_used_notif_enabled(false);
        let all = self.ring.completions();
        completed.extend(all.map(|one| Completed { tag: one.context, result: one.ret }));
        Ok(())
    }

    /// Whether the device calls within `limit`. Swallows the call.
    ///
    /// # Errors
    /// Those of `poll`.
    pub fn called_within(&self, limit: Duration) -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&self.call.as_fd(), PollFlags::IN)], Some(&limit))? == 0 {
            return Ok(false);
        }
        self.call.read()?;
        Ok(true)
    }

    /// Puts `bytes` into the buffer memory, for a later write request.
    ///
    /// # Errors
    /// If they do not fit.
    pub fn fill(&self, offset_bytes: usize, bytes: &[u8]) -> io::Result<()> {
        self.buffers.memory.write_all_at(bytes, offset_bytes as u64)
    }

    /// Copies out of the buffer memory what a read request has put there.
    ///
    /// # Errors
    /// If there is not as much.
    pub fn fetch(&self, offset_bytes: usize, bytes: &mut [u8]) -> io::Result<()> {
        self.buffers.memory.read_exact_at(bytes, offset_bytes as u64)
    }
}

/// Memory that the daemon transfers from and to.
///
/// `virtio-driver` wants each buffer as a slice and uses nothing of it but its address. So the bytes are in a memfd,
/// which the daemon maps, and the slices come from a reservation of addresses that is announced as that memfd's place
/// and is never touched. Were the memfd mapped here too, a slice over it would be memory that changes under Rust's feet.
struct Buffers {
    memory: File,
    reservation: Box<[u8]>,
    begin: usize,
}

impl Buffers {
    fn share(transport: &mut VirtioBlkTransport, len_bytes: usize) -> io::Result<Self> {
        let memory: File = memfd_create("buffers", MemfdFlags::CLOEXEC)?.into();
        // Written, not just extended: the bench is not to count the allocation of pages.
        memory.write_all_at(&vec![0; len_bytes], 0)?;
        // Zeroed memory of this size comes straight from the kernel and takes none until it is touched.
        let reservation = vec![0; len_bytes + PAGE_BYTES].into_boxed_slice();
        let begin = reservation.as_ptr().align_offset(PAGE_BYTES);
        let address = reservation.as_ptr().addr() + begin;
        transport.map_mem_region(address, len_bytes, memory.as_raw_fd(), 0)?;
        Ok(Self { memory, reservation, begin })
    }

    fn addresses(&mut self, buffer: Range<usize>) -> &mut [u8] {
        &mut self.reservation[self.begin..][buffer]
    }
}
