//! What a front end has asked for: message in, state and an [`Action`] out.
//!
//! Contract: [`Session::handle`] checks a message against what was negotiated before, records it,
//! and says what is to be done about it; it does no I/O and touches no ring. The daemon does that,
//! and then brings rings and memory to where [`Session::ring`] and [`Session::memory`] say that
//! they should be. A message that may not be is a [`Fault`]; the state is then as before.
//!
//! All state stands in plain values beside the descriptors that came with it ([`Vring`],
//! [`MemorySlot`]), so that it can be written down and taken up by a successor ([`image`]).
//!
//! What it deliberately does not do: dirty logging, postcopy. Their features are
//! not offered, so the message table refuses their requests.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod image;
mod vring;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::memory::RegionSpec;
use crate::protocol::{
    Message, Payload, ProtocolFeatures, Request, VHOST_USER_F_PROTOCOL_FEATURES, table,
};
use crate::virtqueue::{InflightShape, RING_FEATURES};

pub use self::image::{SavedFault, SavedSession};
use self::vring::Vring;
pub use self::vring::{Ring, RingFault};

/// Regions of guest memory that a front end may have at a time: as many as QEMU's memory slots
/// (KVM has 509 that are not its own).
pub const MAX_MEMORY_SLOTS: usize = 509;
/// vhost-user, "Virtio device config space": the space is at most 256 bytes.
pub const MAX_CONFIG_BYTES: u32 = 256;

/// vhost-user, "Virtio device config space": 0 is a write by the driver, 1 one by live migration. (The
/// front ends on the `vhost` package say 1 for the former.)
const CONFIG_FLAG_MIGRATION: u32 = 1;

/// vhost-user's own feature bit among virtio's.
const PROTOCOL_FEATURES_BIT: u64 = 1 << VHOST_USER_F_PROTOCOL_FEATURES;

/// What every device's session offers. Missing on purpose, because a front end relies on what it is
/// told: `LOG_SHMFD` until every write is logged.
const PROTOCOL_FEATURES: u64 = ProtocolFeatures::MQ.bits()
    | ProtocolFeatures::REPLY_ACK.bits()
    | ProtocolFeatures::BACKEND_REQ.bits()
    | ProtocolFeatures::CONFIG.bits()
    | ProtocolFeatures::INFLIGHT_SHMFD.bits()
    | ProtocolFeatures::RESET_DEVICE.bits()
    | ProtocolFeatures::CONFIGURE_MEM_SLOTS.bits();

/// What is offered for a network device besides.
const NETWORK_FEATURES: u64 = ProtocolFeatures::RARP.bits() | ProtocolFeatures::MTU.bits();

/// What the device brings to a session.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// The device's own feature bits.
    pub features: u64,
    /// Number of virtqueues.
    pub queue_count: u16,
    /// The largest size of one.
    pub max_queue_size: u16,
    /// It is a network device: what vhost-user has for these alone is offered.
    pub is_network: bool,
}

/// A region of guest memory and the file that it is in.
#[derive(Clone, Debug)]
pub struct MemorySlot {
    /// Where it lies.
    pub spec: RegionSpec,
    /// What to map.
    pub file: Arc<OwnedFd>,
    /// How often it has been added, less how often it has been removed.
    times: u32,
}

impl MemorySlot {
    fn new(spec: RegionSpec, file: OwnedFd) -> Self {
        Self { spec, file: Arc::new(file), times: 1 }
    }

    // vhost-user, "VHOST_USER_REM_MEM_REG": guest address, user address and size identify it.
    fn is(&self, spec: RegionSpec) -> bool {
        (self.spec.guest, self.spec.frontend, self.spec.len_bytes)
            == (spec.guest, spec.frontend, spec.len_bytes)
    }
}

/// Where requests in flight are recorded, and the file that it is in.
#[derive(Debug)]
pub struct InflightSlot {
    /// What it has room for.
    pub shape: InflightShape,
    /// Where it begins in the file.
    pub file_offset_bytes: u64,
    /// What to map.
    pub file: OwnedFd,
}

/// What is to be done about a message, besides acknowledging it.
#[derive(Debug)]
pub enum Action {
    /// Nothing.
    Done,
    /// Answer with this number.
    Answer(u64),
    /// Bring the ring to where it should be.
    Ring(u16),
    /// Bring all rings to where they should be.
    Rings,
    /// Bring all rings to a stop, and reset the device.
    Reset,
    /// Bring the ring to a stop, and answer with its base.
    RingBase(u16),
    /// The ring has another call descriptor.
    Call(u16),
    /// The ring has another error descriptor.
    Error(u16),
    /// Map these regions, give the map to the rings, and [`Session::commit_memory`].
    Memory(Vec<MemorySlot>),
    /// Make a file in which requests in flight can be recorded, and answer with it.
    CreateInflight(InflightShape),
    /// Map this, and have rings that start record requests there.
    Inflight(InflightSlot),
    /// Answer with this part of the configuration space.
    ReadConfig {
        /// Offset in bytes.
        offset: u32,
        /// Length in bytes.
        len_bytes: u32,
    },
    /// Write this to the configuration space.
    WriteConfig {
        /// Offset in bytes.
        offset: u32,
        /// What to write.
        data: Vec<u8>,
    },
    /// Speak to the front end over this socket.
    BackendChannel(OwnedFd),
    /// Announce a guest with this MAC address on the network.
    Announce([u8; 6]),
    /// The guest is to have this MTU, in bytes.
    SetMtu(u64),
}

/// Why a message may not be.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Fault {
    #[error("{request} needs {feature}, which was not negotiated")]
    NotNegotiated { request: Request, feature: table::Feature },
    #[error("feature bits {extra:#x} were acknowledged but not offered")]
    Features { extra: u64 },
    #[error("protocol feature bits {extra:#x} were acknowledged but not offered")]
    ProtocolFeatures { extra: u64 },
    #[error("{request} would change features while rings are running")]
    FeaturesWhileRunning { request: Request },
    #[error("{request} names ring {index} of {count}")]
    RingIndex { request: Request, index: u32, count: u16 },
    #[error("{request}")]
    Ring {
        request: Request,
        #[source]
        source: RingFault,
    },
    #[error("{count} memory regions, more than the {MAX_MEMORY_SLOTS} that were offered")]
    MemorySlots { count: usize },
    #[error("there is no memory region {spec:x?} to remove")]
    NoSuchRegion { spec: RegionSpec },
    #[error("{request} of {len_bytes} bytes at {offset}, beyond {MAX_CONFIG_BYTES}")]
    ConfigRange { request: Request, offset: u32, len_bytes: usize },
    #[error("a write to the configuration space with flags {flags:#x}, of which only 1 is known")]
    ConfigFlags { flags: u32 },
    #[error(
        "{request} for {queue_count} queues of {queue_size} entries; there are {queue_count_max} of up to {queue_size_max}"
    )]
    InflightShape {
        request: Request,
        queue_count: u16,
        queue_size: u16,
        queue_count_max: u16,
        queue_size_max: u16,
    },
    #[error("{request} of {len_bytes} bytes at {offset}: {needed} are needed, at a multiple of 8")]
    InflightPlace { request: Request, len_bytes: u64, offset: u64, needed: u64 },
    #[error("{request} while rings are running")]
    InflightWhileRunning { request: Request },
    #[error("{request} carries another payload than its row of the message table says")]
    Payload { request: Request },
}

/// One front end's session.
#[derive(Debug)]
pub struct Session {
    offer: Offer,
    /// Acknowledged virtio features.
    features: u64,
    protocol_features: ProtocolFeatures,
    rings: Vec<Vring>,
    memory: Vec<MemorySlot>,
}

impl Session {
    /// A session in which nothing has been said.
    pub fn new(offer: Offer) -> Self {
        Self {
            offer,
            features: 0,
            protocol_features: ProtocolFeatures::empty(),
            rings: (0..offer.queue_count).map(|_| Vring::default()).collect(),
            memory: Vec::new(),
        }
    }

    /// Checks and records a message, and says what is to be done about it.
    ///
    /// # Errors
    /// The message may not be; nothing has changed.
    pub fn handle(&mut self, message: Message) -> Result<Action, Fault> {
        let Message { request, payload, fds, .. } = message;
        let row = table::row(request);
        if let Some(feature) = row.feature
            && !row.is_permitted(self.protocol_features, self.features)
        {
            return Err(Fault::NotNegotiated { request, feature });
        }
        match payload {
            Payload::Empty => self.handle_empty(request, fds),
            Payload::U64(value) => self.handle_number(request, value),
            Payload::VringState { index, num } => self.handle_vring_state(request, index, num),
            Payload::VringFd { index, .. } => {
                self.handle_vring_fd(request, index, fds.into_iter().next())
            }
            Payload::VringAddress { index, descriptor, used, available, .. } => {
                let (at, ring) = self.vring(request, index)?;
                ring.set_addresses(descriptor, available, used)
                    .map_err(|source| Fault::Ring { request, source })?;
                Ok(Action::Ring(at))
            }
            Payload::MemoryTable(specs) => self.replace_memory(specs, fds),
            Payload::MemoryRegion(spec) => match request {
                Request::AddMemReg => self.add_memory(spec, fds),
                _ => self.remove_memory(spec),
            },
            Payload::Config { offset, flags, data } => handle_config(request, offset, flags, data),
            Payload::Inflight { mmap_size, mmap_offset, num_queues, queue_size } => {
                let shape = InflightShape { queue_count: num_queues, queue_size };
                self.handle_inflight(request, shape, (mmap_offset, mmap_size), fds)
            }
            Payload::Unparsed => Err(Fault::Payload { request }),
        }
    }

    fn handle_empty(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Action, Fault> {
        Ok(match request {
            Request::GetFeatures => Action::Answer(self.offered_features()),
            Request::GetProtocolFeatures => Action::Answer(self.offered_protocol_features()),
            Request::GetQueueNum => Action::Answer(u64::from(self.offer.queue_count)),
            Request::GetMaxMemSlots => Action::Answer(MAX_MEMORY_SLOTS as u64),
            Request::SetOwner => Action::Done,
            Request::ResetDevice => {
                self.features = 0;
                self.rings.iter_mut().for_each(Vring::reset);
                Action::Reset
            }
            // vhost-user, "VHOST_USER_RESET_OWNER": deprecated; a back end should ignore it, or
            // disable all rings.
            Request::ResetOwner => {
                self.rings.iter_mut().for_each(Vring::disable);
                Action::Rings
            }
            Request::SetBackendReqFd => match fds.into_iter().next() {
                Some(socket) => Action::BackendChannel(socket),
                None => return Err(Fault::Payload { request }),
            },
            _ => return Err(Fault::Payload { request }),
        })
    }

    fn handle_number(&mut self, request: Request, value: u64) -> Result<Action, Fault> {
        match request {
            Request::SetFeatures => {
                let extra = value & !self.offered_features();
                if extra != 0 {
                    return Err(Fault::Features { extra });
                }
                if value != self.features && self.rings.iter().any(Vring::is_running) {
                    return Err(Fault::FeaturesWhileRunning { request });
                }
                self.features = value;
                // vhost-user, "Ring states": upon SET_FEATURES without the bit, the back end must
                // enable all rings; with it, the front end says when.
                if value & PROTOCOL_FEATURES_BIT == 0 {
                    self.rings.iter_mut().for_each(Vring::enable);
                }
                Ok(Action::Rings)
            }
            Request::SetProtocolFeatures => {
                let extra = value & !self.offered_protocol_features();
                if extra != 0 {
                    return Err(Fault::ProtocolFeatures { extra });
                }
                self.protocol_features = ProtocolFeatures::from_bits(value);
                Ok(Action::Done)
            }
            // vhost-user, "VHOST_USER_SEND_RARP": the address is in the lower 6 bytes, its first one lowest.
            Request::SendRarp => {
                let [a, b, c, d, e, f, ..] = value.to_le_bytes();
                Ok(Action::Announce([a, b, c, d, e, f]))
            }
            Request::NetSetMtu => Ok(Action::SetMtu(value)),
            _ => Err(Fault::Payload { request }),
        }
    }

    fn handle_vring_state(
        &mut self,
        request: Request,
        index: u32,
        num: u32,
    ) -> Result<Action, Fault> {
        let max_size = self.offer.max_queue_size;
        let (at, ring) = self.vring(request, index)?;
        let done = match request {
            Request::SetVringNum => ring.set_size(num, max_size),
            Request::SetVringBase => ring.set_base(num),
            Request::SetVringEnable => ring.set_enabled(num),
            Request::GetVringBase => {
                ring.stop();
                return Ok(Action::RingBase(at));
            }
            _ => return Err(Fault::Payload { request }),
        };
        done.map_err(|source| Fault::Ring { request, source })?;
        Ok(Action::Ring(at))
    }

    fn handle_vring_fd(
        &mut self,
        request: Request,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<Action, Fault> {
        let (at, ring) = self.vring(request, u32::from(index))?;
        let fd = fd.map(Arc::new);
        Ok(match request {
            Request::SetVringKick => {
                ring.set_kick(fd);
                Action::Ring(at)
            }
            Request::SetVringCall => {
                ring.call = fd;
                Action::Call(at)
            }
            Request::SetVringErr => {
                ring.error = fd;
                Action::Error(at)
            }
            _ => return Err(Fault::Payload { request }),
        })
    }

    fn replace_memory(&self, specs: Vec<RegionSpec>, fds: Vec<OwnedFd>) -> Result<Action, Fault> {
        let slots = specs.into_iter().zip(fds).map(|(spec, file)| MemorySlot::new(spec, file));
        Ok(Action::Memory(slots.collect()))
    }

    /// QEMU before version 8 adds each region once for each queue pair of a network device, and removes it as often: what is
    /// there already is counted.
    fn add_memory(&self, spec: RegionSpec, fds: Vec<OwnedFd>) -> Result<Action, Fault> {
        let mut slots = self.memory.clone();
        match slots.iter_mut().find(|slot| slot.spec == spec) {
            Some(slot) => slot.times = slot.times.saturating_add(1),
            None => slots.extend(fds.into_iter().map(|file| MemorySlot::new(spec, file))),
        }
        if slots.len() > MAX_MEMORY_SLOTS {
            return Err(Fault::MemorySlots { count: slots.len() });
        }
        Ok(Action::Memory(slots))
    }

    fn remove_memory(&self, spec: RegionSpec) -> Result<Action, Fault> {
        let mut slots = self.memory.clone();
        let slot = slots.iter_mut().find(|slot| slot.is(spec));
        let slot = slot.ok_or(Fault::NoSuchRegion { spec })?;
        slot.times = slot.times.saturating_sub(1);
        slots.retain(|slot| slot.times > 0);
        Ok(Action::Memory(slots))
    }

    fn handle_inflight(
        &self,
        request: Request,
        shape: InflightShape,
        (file_offset_bytes, len_bytes): (u64, u64),
        fds: Vec<OwnedFd>,
    ) -> Result<Action, Fault> {
        let InflightShape { queue_count, queue_size } = shape;
        let (queue_count_max, queue_size_max) = (self.offer.queue_count, self.offer.max_queue_size);
        if !(1..=queue_count_max).contains(&queue_count)
            || !(1..=queue_size_max).contains(&queue_size)
        {
            return Err(Fault::InflightShape {
                request,
                queue_count,
                queue_size,
                queue_count_max,
                queue_size_max,
            });
        }
        if request == Request::GetInflightFd {
            return Ok(Action::CreateInflight(shape));
        }
        let needed = shape.len_bytes();
        if len_bytes < needed || !file_offset_bytes.is_multiple_of(8) {
            let offset = file_offset_bytes;
            return Err(Fault::InflightPlace { request, len_bytes, offset, needed });
        }
        if self.rings.iter().any(Vring::is_running) {
            return Err(Fault::InflightWhileRunning { request });
        }
        let file = fds.into_iter().next().ok_or(Fault::Payload { request })?;
        Ok(Action::Inflight(InflightSlot { shape, file_offset_bytes, file }))
    }

    fn offered_protocol_features(&self) -> u64 {
        let own = if self.offer.is_network { NETWORK_FEATURES } else { 0 };
        PROTOCOL_FEATURES | own
    }

    fn offered_features(&self) -> u64 {
        self.offer.features | RING_FEATURES | PROTOCOL_FEATURES_BIT
    }

    fn vring(&mut self, request: Request, index: u32) -> Result<(u16, &mut Vring), Fault> {
        let count = self.offer.queue_count;
        let fault = Fault::RingIndex { request, index, count };
        let Ok(at) = u16::try_from(index) else { return Err(fault) };
        match self.rings.get_mut(usize::from(at)) {
            Some(ring) => Ok((at, ring)),
            None => Err(fault),
        }
    }

    /// The feature bits that the driver acknowledged.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the front end may ask for an acknowledgement of anything.
    pub fn acknowledges(&self) -> bool {
        self.protocol_features.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// Whether the front end reads the configuration space from us.
    pub fn reads_config(&self) -> bool {
        self.protocol_features.contains(ProtocolFeatures::CONFIG)
    }

    /// Number of rings, used or not.
    pub fn ring_count(&self) -> u16 {
        self.offer.queue_count
    }

    /// What a ring needs to run, or `None` while it should not.
    pub fn ring(&self, index: u16) -> Option<Ring> {
        self.rings.get(usize::from(index))?.plan()
    }

    /// What the front end gave as the ring's kick is none: the ring waits for another.
    pub fn kick_refused(&mut self, index: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.stop();
        }
    }

    /// The ring is on its worker.
    pub fn ring_started(&mut self, index: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.started();
        }
    }

    /// The ring has come back from its worker with this base.
    pub fn ring_stopped(&mut self, index: u16, base: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(index)) {
            ring.stopped(base);
        }
    }

    /// Whether a running ring must be started anew to be what it should be.
    pub fn ring_is_outdated(&self, index: u16) -> bool {
        self.rings.get(usize::from(index)).is_some_and(Vring::is_outdated)
    }

    /// The base that a stopped ring goes on from.
    pub fn ring_base(&self, index: u16) -> u16 {
        self.rings.get(usize::from(index)).map_or(0, Vring::base)
    }

    /// The memory that the rings use.
    pub fn memory(&self) -> &[MemorySlot] {
        &self.memory
    }

    /// The memory of an [`Action::Memory`] is mapped and in use.
    pub fn commit_memory(&mut self, slots: Vec<MemorySlot>) {
        self.memory = slots;
    }
}

fn handle_config(
    request: Request,
    offset: u32,
    flags: u32,
    data: Vec<u8>,
) -> Result<Action, Fault> {
    let fault = Fault::ConfigRange { request, offset, len_bytes: data.len() };
    let Ok(len_bytes) = u32::try_from(data.len()) else { return Err(fault) };
    if offset.checked_add(len_bytes).is_none_or(|end| end > MAX_CONFIG_BYTES) {
        return Err(fault);
    }
    // vhost-user, "VHOST_USER_SET_CONFIG": the back end must check the flags. A write for migration
    // is like one of the driver's: nothing but what the driver may write is ours to take over.
    if request == Request::SetConfig && flags > CONFIG_FLAG_MIGRATION {
        return Err(Fault::ConfigFlags { flags });
    }
    Ok(match request {
        Request::SetConfig => Action::WriteConfig { offset, data },
        _ => Action::ReadConfig { offset, len_bytes },
    })
}

#[cfg(test)]
mod tests;
