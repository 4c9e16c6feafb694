//! A whole guest: from the connection to running queues.
//!
//! The order of the messages is QEMU's: features, memory, then each ring, then the enabling.
//! [`Options`] says what a test wants otherwise. The rings lie at the start of the first region,
//! and what is left of it is for buffers.

use crate::Error;
use crate::front_end::FrontEnd;
use crate::inflight::Inflight;
use crate::memory::{GuestMemory, Shape};
use crate::message::{
    RingAddresses, VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIG, VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_PROTOCOL_F_RESET_DEVICE, VHOST_USER_SET_VRING_CALL,
    VHOST_USER_SET_VRING_ERR, VHOST_USER_SET_VRING_KICK, VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1,
};
use crate::notifier::Notifier;
use crate::ring::SplitRing;
use crate::virtqueue::Virtqueue;
use crate::wire::Wire;
use std::path::Path;
use std::sync::Arc;

/// Rings begin on their own pages, as Linux allocates them.
const PAGE_BYTES: u64 = 4096;
/// Buffers begin on a sector, as a file system's do.
const BUFFER_ALIGNMENT_BYTES: u64 = 512;
/// What this driver can drive: the ring's features that it knows, and whatever the device type has
/// (VIRTIO 1.3, 2.2: bits 0 to 23). Not the legacy ones: a device that is asked to notify on an
/// empty ring does so when it is asked not to.
const DRIVABLE: u64 = 0x00ff_ffff
    | VIRTIO_F_VERSION_1
    | VIRTIO_F_EVENT_IDX
    | VIRTIO_F_INDIRECT_DESC
    | VHOST_USER_F_PROTOCOL_FEATURES;

/// How the memory is made known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryBy {
    /// One `SET_MEM_TABLE`, regions in their order.
    Table,
    /// One `SET_MEM_TABLE`, regions in reverse.
    ReversedTable,
    /// One `ADD_MEM_REG` a region, before the rings.
    Regions,
    /// One `ADD_MEM_REG` a region, *after* the rings, as clients on libblkio do.
    RegionsAfterRings,
}

/// What a test wants its guest to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtio features to accept where they are offered.
    pub features: u64,
    /// Protocol features to accept where they are offered.
    pub protocol_features: u64,
    /// Queues to set up, from index 0.
    pub queue_count: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Both indexes of each ring at the start.
    pub base: u16,
    /// Makes the kick descriptor; none for a device that polls.
    pub kick: Option<fn() -> Result<Notifier, Error>>,
    /// Makes the call descriptor; none for a driver that polls.
    pub call: Option<fn() -> Result<Notifier, Error>>,
    /// The guest's memory.
    pub memory: Vec<Shape>,
    /// How it is made known.
    pub memory_by: MemoryBy,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            features: DRIVABLE,
            protocol_features: VHOST_USER_PROTOCOL_F_MQ
                | VHOST_USER_PROTOCOL_F_REPLY_ACK
                | VHOST_USER_PROTOCOL_F_BACKEND_REQ
                | VHOST_USER_PROTOCOL_F_CONFIG
                | VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
                | VHOST_USER_PROTOCOL_F_RESET_DEVICE
                | VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
            queue_count: 1,
            queue_size: 128,
            base: 0,
            kick: Some(Notifier::eventfd),
            call: Some(Notifier::eventfd),
            memory: vec![Shape { guest: 0, size_bytes: 16 << 20, file_offset_bytes: 0 }],
            memory_by: MemoryBy::Table,
        }
    }
}

/// A guest with running queues.
#[derive(Debug)]
pub struct Guest {
    /// Its VMM's connection.
    pub front_end: FrontEnd,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// Its queues.
    pub queues: Vec<Virtqueue>,
    /// The err descriptor of each queue.
    pub errs: Vec<Notifier>,
    /// The virtio features that were negotiated.
    pub features: u64,
    /// The protocol features that were negotiated.
    pub protocol_features: u64,
    buffers_start: u64,
    buffers_end: u64,
    cursor: u64,
}

impl Guest {
    /// Connects to a listening back end and starts the queues.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start(path: &Path, options: &Options) -> Result<Self, Error> {
        Guest::start_on(Wire::connect(path)?, options)
    }

    /// Starts the queues over a connection that exists.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start_on(wire: Wire, options: &Options) -> Result<Self, Error> {
        let mut front_end = FrontEnd::on(wire);
        let (features, protocol_features) = negotiate(&mut front_end, options)?;
        let memory = Arc::new(GuestMemory::new(&options.memory)?);
        let first = options.memory.first().expect("a guest has memory");
        let mut guest = Guest {
            front_end,
            memory,
            queues: Vec::new(),
            errs: Vec::new(),
            features,
            protocol_features,
            buffers_start: first.guest,
            buffers_end: first.guest + first.size_bytes as u64,
            cursor: 0,
        };
        if options.memory_by != MemoryBy::RegionsAfterRings {
            guest.announce_memory(options.memory_by)?;
        }
        for index in 0..options.queue_count {
            let ring = guest.make_ring(options.queue_size);
            guest.queues.push(guest.make_queue(ring, options)?);
            guest.errs.push(Notifier::eventfd()?);
            guest.start_queue(index, u32::from(options.base))?;
        }
        if options.memory_by == MemoryBy::RegionsAfterRings {
            guest.announce_memory(MemoryBy::Regions)?;
        }
        for index in 0..options.queue_count {
            guest.enable(index)?;
        }
        Ok(guest)
    }

    fn announce_memory(&self, by: MemoryBy) -> Result<(), Error> {
        match by {
            MemoryBy::Table => self.front_end.set_mem_table(self.memory.regions()),
            MemoryBy::ReversedTable => {
                self.front_end.set_mem_table(self.memory.regions().iter().rev())
            }
            MemoryBy::Regions | MemoryBy::RegionsAfterRings => {
                let mut regions = self.memory.regions().iter();
                regions.try_for_each(|region| {
                    self.front_end.add_mem_reg(&region.description(), region.file())
                })
            }
        }
    }

    fn make_ring(&mut self, size: u16) -> SplitRing {
        let at = self.buffers_start;
        self.buffers_start =
            (at + SplitRing::total_bytes(size) as u64).next_multiple_of(PAGE_BYTES);
        self.cursor = self.buffers_start;
        assert!(
            self.cursor < self.buffers_end,
            "the rings need more memory than the first region has"
        );
        SplitRing::new(Arc::clone(&self.memory), at, size)
    }

    fn make_queue(&self, ring: SplitRing, options: &Options) -> Result<Virtqueue, Error> {
        let event_idx = self.features & VIRTIO_F_EVENT_IDX != 0;
        let kick = options.kick.map(|make| make()).transpose()?;
        let call = options.call.map(|make| make()).transpose()?;
        Ok(Virtqueue::new(ring, options.base, event_idx, (kick, call)))
    }

    /// Has the next back end, over another connection, go on where the last one was, as its region says.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn resume(
        &mut self,
        wire: Wire,
        options: &Options,
        inflight: &Inflight,
    ) -> Result<(), Error> {
        let mut front_end = FrontEnd::on(wire);
        negotiate(&mut front_end, options)?;
        self.front_end = front_end;
        self.announce_memory(options.memory_by)?;
        self.front_end.set_inflight_fd(inflight)?;
        for index in 0..options.queue_count {
            let used_index = self.queues[usize::from(index)].ring().used_index();
            self.start_queue(index, used_index.into())?;
            self.enable(index)?;
        }
        Ok(())
    }

    /// Tells the back end everything about queue `index`, which goes on from available index
    /// `base`; it is not enabled yet.
    ///
    /// # Errors
    /// The first that any message meets.
    pub fn start_queue(&self, index: u16, base: u32) -> Result<(), Error> {
        let queue = &self.queues[usize::from(index)];
        let (ring, number) = (queue.ring(), u32::from(index));
        self.front_end.set_vring_num(number, u32::from(ring.size()))?;
        self.front_end.set_vring_base(number, base)?;
        self.front_end.set_vring_addr(&self.ring_addresses(index))?;
        let err = self.errs[usize::from(index)].back_end_fd();
        self.front_end.set_vring_fd(VHOST_USER_SET_VRING_ERR, number, Some(err))?;
        let call = queue.call_notifier().map(Notifier::back_end_fd);
        self.front_end.set_vring_fd(VHOST_USER_SET_VRING_CALL, number, call)?;
        let kick = queue.kick_notifier().map(Notifier::back_end_fd);
        self.front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, number, kick)
    }

    /// Enables queue `index`, where that is a message of its own.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn enable(&self, index: u16) -> Result<(), Error> {
        if self.features & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            // vhost-user, "Ring states": then the ring starts directly in the enabled state.
            return self.front_end.barrier();
        }
        self.front_end.set_vring_enable(u32::from(index), true)
    }

    /// What `SET_VRING_ADDR` says about queue `index`.
    #[must_use]
    pub fn ring_addresses(&self, index: u16) -> RingAddresses {
        let ring = self.queues[usize::from(index)].ring();
        RingAddresses {
            index: u32::from(index),
            flags: 0,
            descriptors: self.memory.user_address(ring.descriptors_address()),
            used: self.memory.user_address(ring.used_address()),
            available: self.memory.user_address(ring.available_address()),
            log: 0,
        }
    }

    /// Guest memory for `size_bytes`; it is taken back when no queue has anything outstanding.
    ///
    /// # Panics
    /// If the first region has no more room.
    pub fn allocate(&mut self, size_bytes: usize) -> u64 {
        if self.queues.iter().all(|queue| queue.outstanding_count() == 0) {
            self.cursor = self.cursor.min(self.buffers_start);
        }
        self.carve(size_bytes)
    }

    /// Guest memory for `size_bytes` that is never taken back: for what a test submits behind the
    /// queues' backs.
    ///
    /// # Panics
    /// If the first region has no more room.
    pub fn reserve(&mut self, size_bytes: usize) -> u64 {
        self.cursor = self.cursor.max(self.buffers_start);
        let at = self.carve(size_bytes);
        self.buffers_start = self.cursor;
        at
    }

    /// As [`Guest::allocate`], but never takes anything back: for the further buffers of a chain
    /// that is not submitted yet.
    ///
    /// # Panics
    /// If the first region has no more room.
    pub fn carve(&mut self, size_bytes: usize) -> u64 {
        let at = self.cursor.next_multiple_of(BUFFER_ALIGNMENT_BYTES);
        self.cursor = at + size_bytes as u64;
        assert!(
            self.cursor <= self.buffers_end,
            "the first region has no room for {size_bytes} bytes more"
        );
        at
    }
}

fn negotiate(front_end: &mut FrontEnd, options: &Options) -> Result<(u64, u64), Error> {
    let offered = front_end.get_features()?;
    front_end.set_owner()?;
    let features = offered & options.features;
    let mut protocol_features = 0;
    if features & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
        protocol_features = front_end.get_protocol_features()? & options.protocol_features;
        front_end.set_protocol_features(protocol_features)?;
    }
    front_end.set_features(features)?;
    Ok((features, protocol_features))
}
