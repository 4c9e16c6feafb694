//! The baseline's device: `vhost-user-backend`'s trait over a [`Disk`].
//!
//! The trait's shared form (`&self`) is implemented, not the `Mut` one: the latter puts a lock around the whole device
//! and makes its queues take turns. The runtime calls [`VhostUserBackend::handle_event`] on the queue's own thread for
//! each kick.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Error as QueueError, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
    GuestMemoryMmap, Permissions, VolatileSlice,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::disk::Disk;

/// What QEMU and `vhost-blk` allow too.
const MAX_QUEUE_SIZE: usize = 1024;
/// Data descriptors in a request: what a driver's queue of 128 has room for, beside header and status.
const SEG_MAX: u32 = 126;
const BLK_SIZE_BYTES: u32 = 512;
/// VIRTIO 1.3, 5.2.4: `struct virtio_blk_config`, as far as and including `num_queues`.
const CONFIG_BYTES: usize = 36;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The device as the runtime sees it.
pub(crate) struct StockBlk {
    disk: Arc<Disk>,
    queue_count: u16,
    memory: Memory,
}

impl StockBlk {
    pub(crate) fn new(disk: Arc<Disk>, queue_count: u16, memory: Memory) -> Self {
        Self { disk, queue_count, memory }
    }

    /// Serves every chain that the driver has made available. It is called as soon as it wants to be, as in the crates'
    /// own example: at depth 32 that made 1.8 times the requests of one call at the end of each turn.
    fn drain(
        &self,
        vring: &mut VringState<Memory>,
        guest: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(guest) {
            let head = chain.head_index();
            let written_bytes = self.serve(chain).unwrap_or_else(|error| {
                // There is no status byte to answer in: the chain goes back with nothing written.
                eprintln!("stock-blk: malformed request: {error}");
                0
            });
            vring.add_used(head, written_bytes)?;
            if vring.needs_notification()?
                && let Err(error) = vring.signal_used_queue()
            {
                eprintln!("stock-blk: call: {error}");
            }
        }
        Ok(())
    }

    /// Executes one request and returns the number of bytes written to guest memory, status included.
    fn serve(&self, chain: DescriptorChain<&GuestMemoryMmap>) -> io::Result<u32> {
        let guest = chain.memory();
        let descriptors: Vec<Descriptor> = chain.clone().collect();
        // VIRTIO 1.3, 5.2.6: header, data, status. Every driver known gives header and status descriptors of their own.
        let [header, data @ .., status] = descriptors.as_slice() else {
            return Err(io::Error::other("fewer than two descriptors"));
        };
        let [kind, _, sector_low, sector_high]: [u32; 4] =
            guest.read_obj(header.addr()).map_err(io::Error::other)?;
        let sector =
            u64::from(u32::from_le(sector_low)) | u64::from(u32::from_le(sector_high)) << 32;
        let (code, data_bytes) = match u32::from_le(kind) {
            VIRTIO_BLK_T_IN => outcome(
                buffers(guest, data, Permissions::Write).and_then(|to| self.disk.read(sector, &to)),
                data,
            ),
            VIRTIO_BLK_T_OUT => outcome(
                buffers(guest, data, Permissions::Read)
                    .and_then(|from| self.disk.write(sector, &from)),
                &[],
            ),
            VIRTIO_BLK_T_FLUSH => outcome(self.disk.flush(), &[]),
            VIRTIO_BLK_T_GET_ID => outcome(write_id(guest, data), data),
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        guest.write_obj(code as u8, last_byte(status)).map_err(io::Error::other)?;
        Ok(data_bytes + 1)
    }
}

/// The status of a request, and how many bytes it wrote: all of `written`, or none.
fn outcome(result: io::Result<()>, written: &[Descriptor]) -> (u32, u32) {
    match result {
        Ok(()) => (VIRTIO_BLK_S_OK, written.iter().map(Descriptor::len).sum()),
        Err(error) => {
            eprintln!("stock-blk: request failed: {error}");
            (VIRTIO_BLK_S_IOERR, 0)
        }
    }
}

fn buffers<'a>(
    guest: &'a GuestMemoryMmap,
    data: &[Descriptor],
    access: Permissions,
) -> io::Result<Vec<VolatileSlice<'a>>> {
    let mut slices = Vec::with_capacity(data.len());
    for descriptor in data {
        let parts = guest
            .get_slices(descriptor.addr(), descriptor.len() as usize, access)
            .map_err(io::Error::other)?;
        for part in parts {
            slices.push(part.map_err(io::Error::other)?);
        }
    }
    Ok(slices)
}

fn write_id(guest: &GuestMemoryMmap, data: &[Descriptor]) -> io::Result<()> {
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    id[..9].copy_from_slice(b"stock-blk");
    let to = data.first().ok_or(io::ErrorKind::InvalidInput)?;
    let len_bytes = id.len().min(to.len() as usize);
    guest.write_slice(&id[..len_bytes], to.addr()).map_err(io::Error::other)
}

fn last_byte(descriptor: &Descriptor) -> GuestAddress {
    descriptor.addr().unchecked_add(u64::from(descriptor.len().saturating_sub(1)))
}

impl VhostUserBackend for StockBlk {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.queue_count.into()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        bits.iter()
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The vrings have been told too, and nothing else here depends on it.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; CONFIG_BYTES];
        config[0..8].copy_from_slice(&self.disk.capacity_sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&BLK_SIZE_BYTES.to_le_bytes());
        config[34..36].copy_from_slice(&self.queue_count.to_le_bytes());
        // A front end may know a later, longer structure: what this device does not have reads as zero.
        config
            .iter()
            .copied()
            .chain(std::iter::repeat(0))
            .skip(offset as usize)
            .take(size as usize)
            .collect()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // It is the handle that `new` got: a new table is seen through it at the next turn.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queue_count).map(|queue_index| 1 << queue_index).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the runtime never ends its threads, and dropping the daemon would wait for them for ever.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[VringMutex],
        _thread_id: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.get(usize::from(device_event)) else {
            return Ok(());
        };
        loop {
            // Taken anew each turn, so that a busy queue lets the control thread in.
            let mut vring = vring.get_mut();
            let guest = self.memory.memory();
            let turn = vring
                .disable_notification()
                .and_then(|()| self.drain(&mut vring, &guest))
                .and_then(|()| vring.enable_notification());
            match turn {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    // Returned to the runtime, it would silently end this queue's thread.
                    eprintln!("stock-blk: ring: {error}");
                    return Ok(());
                }
            }
        }
    }
}
