//! One connection to a daemon, as messages: what it offers, what it is told, and how it lets go.
//!
//! Contract: each message has [`Limits::reply`] to be answered, and an answer that the specification does not permit, or
//! that contradicts what the guest has been told already, ends the connection. Nothing a daemon says is used as a length,
//! an index or an address in this process. Deliberately absent: migration, postcopy, an IOMMU, packed rings, queue pairs
//! counted by `GET_QUEUE_NUM` (it counts virtqueues, as the text has it).

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
use std::time::Duration;

use thiserror::Error;
use tracing::warn;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::channel::Channel;
use super::kind::Kind;
use super::relay::{self, Relay};
use super::setup::{RingSetup, Setup};
use super::watchdog::Watchdog;

/// vhost-user has eight bits for the index of a vring.
pub(crate) const QUEUES_MAX: u16 = 256;
/// The largest record of requests in flight that is kept for a daemon: 256 queues of 1024 entries of 16 bytes, 16 times.
const INFLIGHT_BYTES_MAX: u64 = 64 << 20;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// `VHOST_USER_F_PROTOCOL_FEATURES`, which is not the guest's to see.
const PROTOCOL_FEATURES_BIT: u64 = 1 << 30;
/// Of the bits that VIRTIO reserves for rings and transports, those that a guest is offered: `INDIRECT_DESC`, `EVENT_IDX`,
/// `VERSION_1`, `IN_ORDER`, `ORDER_PLATFORM`. The others need something of the transport that ours does not do.
const RING_FEATURES: u64 = 1 << 28 | 1 << 29 | VIRTIO_F_VERSION_1 | 1 << 35 | 1 << 36;
/// VIRTIO 1.3, 2.2: bits 24 to 49 are no device's own.
const RESERVED_FEATURES: u64 = (1 << 50) - (1 << 24);

/// What of the protocol is used where it is offered.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// Why a connection ended.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{message} failed")]
    Message {
        message: &'static str,
        #[source]
        source: vhost::Error,
    },
    #[error("the channel for the daemon's requests")]
    Channel(#[source] vhost::vhost_user::Error),
    #[error(
        "the daemon offers the features {0:#x}, without VIRTIO_F_VERSION_1 or protocol features"
    )]
    Features(u64),
    #[error("the daemon has no configuration space, which this device needs")]
    NoConfig,
    #[error("the daemon says that it has {0} queues; between {1} and {QUEUES_MAX} were expected")]
    QueueCount(u64, u16),
    #[error("the driver uses the features {wanted:#x}, of which this daemon lacks {missing:#x}")]
    Lacks { wanted: u64, missing: u64 },
    #[error("the driver uses queue {index}, and this daemon has {count} queues")]
    LacksQueue { index: u16, count: u16 },
    #[error("the daemon wants {0} bytes for its record of requests in flight")]
    Inflight(u64),
    #[error("waiting for the daemon")]
    Wait(#[source] io::Error),
    #[error("the control queue")]
    Relay(#[from] relay::Error),
    #[error("guest memory is not shared as a file")]
    Memory(#[source] vhost::Error),
}

/// What a daemon says that its device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// What the guest is offered.
    pub(crate) features: u64,
    pub(crate) queue_count: u16,
    pub(crate) config: Vec<u8>,
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// One message, its answer included; a stop waits for requests in flight.
    pub(crate) reply: Duration,
    /// Between two attempts to connect: at first, and at most.
    pub(crate) backoff: (Duration, Duration),
}

impl Default for Limits {
    fn default() -> Self {
        // A disk of the network may take seconds over a request; nobody waits for a daemon that takes longer.
        let reply = Duration::from_secs(15);
        Self { reply, backoff: (Duration::from_millis(10), Duration::from_secs(1)) }
    }
}

/// A daemon's record of requests in flight, which outlives it.
pub(crate) struct Inflight {
    layout: VhostUserInflight,
    file: File,
}

/// A connection.
pub(crate) struct Session {
    front_end: Frontend,
    socket: Arc<UnixStream>,
    watchdog: Arc<Watchdog>,
    limit: Duration,
    kind: Kind,
    protocol: VhostUserProtocolFeatures,
    /// What the daemon offers, its protocol's bit included.
    features: u64,
    queue_count: u16,
    channel: Option<Channel>,
}

impl Session {
    /// Learns what is at the other end of a connected socket.
    pub(crate) fn open(
        socket: Arc<UnixStream>,
        theirs: UnixStream,
        kind: Kind,
        watchdog: Arc<Watchdog>,
        limit: Duration,
    ) -> Result<(Self, Offer), Error> {
        let mut session = Self {
            front_end: Frontend::from_stream(theirs, u64::from(QUEUES_MAX)),
            socket,
            watchdog,
            limit,
            kind,
            protocol: VhostUserProtocolFeatures::empty(),
            features: 0,
            queue_count: kind.queues_least(),
            channel: None,
        };
        session.say("SET_OWNER", |front_end| front_end.set_owner())?;
        session.features = session.say("GET_FEATURES", |front_end| front_end.get_features())?;
        let needed = VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES_BIT;
        if session.features & needed != needed {
            return Err(Error::Features(session.features));
        }
        session.agree()?;
        let config = session.read_config()?;
        let features = kind.sound(session.guest_features(), session.queue_count);
        let offer = Offer { features, queue_count: session.queue_count, config };
        Ok((session, offer))
    }

    /// Negotiates the protocol's own features, and what follows from them.
    fn agree(&mut self) -> Result<(), Error> {
        let offered =
            self.say("GET_PROTOCOL_FEATURES", |front_end| front_end.get_protocol_features())?;
        self.protocol = offered & PROTOCOL_FEATURES;
        if self.kind.needs_config() && !self.has(VhostUserProtocolFeatures::CONFIG) {
            return Err(Error::NoConfig);
        }
        let protocol = self.protocol;
        self.say("SET_PROTOCOL_FEATURES", |front_end| front_end.set_protocol_features(protocol))?;
        if self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            self.front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if self.has(VhostUserProtocolFeatures::MQ) {
            let count = self.say("GET_QUEUE_NUM", |front_end| front_end.get_queue_num())?;
            let least = self.kind.queues_least();
            let fits = u16::try_from(count).ok().filter(|c| (least..=QUEUES_MAX).contains(c));
            self.queue_count = fits.ok_or(Error::QueueCount(count, least))?;
        }
        if self.has(VhostUserProtocolFeatures::BACKEND_REQ) {
            let has_reply_ack = self.has(VhostUserProtocolFeatures::REPLY_ACK);
            let channel = Channel::new(has_reply_ack).map_err(Error::Channel)?;
            self.say("SET_BACKEND_REQ_FD", |front_end| {
                front_end.set_backend_request_fd(&channel.theirs())
            })?;
            self.channel = Some(channel);
        }
        Ok(())
    }

    /// Reads the whole configuration space; zeros, if there is none.
    pub(crate) fn read_config(&mut self) -> Result<Vec<u8>, Error> {
        let zeros = vec![0; self.kind.config_bytes()];
        if !self.has(VhostUserProtocolFeatures::CONFIG) {
            return Ok(zeros);
        }
        let len = self.kind.config_bytes().try_into().unwrap_or(u32::MAX);
        let (_, bytes) = self.say("GET_CONFIG", |front_end| {
            front_end.get_config(0, len, VhostUserConfigFlags::WRITABLE, &zeros)
        })?;
        Ok(bytes)
    }

    /// Hands on what the driver has written. Says whether the daemon took it.
    pub(crate) fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<bool, Error> {
        if !self.has(VhostUserProtocolFeatures::CONFIG) {
            return Ok(false);
        }
        let written = self.say("SET_CONFIG", |front_end| {
            front_end.set_config(offset, VhostUserConfigFlags::empty(), bytes)
        });
        match written {
            Ok(()) => Ok(true),
            Err(Error::Message { source, .. }) if is_refusal(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Has the daemon serve the driver: the first one, or one that takes over from another.
    pub(crate) fn start(
        &mut self,
        setup: &Setup,
        memory: &GuestMemoryMmap,
        relay: Option<&Relay>,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), Error> {
        // What this process offers by itself is not the daemon's to know.
        let features = setup.features & !(self.kind.own_features() & !self.features);
        let missing = features & !self.features;
        if missing != 0 {
            return Err(Error::Lacks { wanted: features, missing });
        }
        let count = self.queue_count;
        let own = relay.map(Relay::ring);
        let rings = || setup.rings.iter().chain(own);
        if let Some(ring) = rings().find(|ring| ring.index >= count) {
            return Err(Error::LacksQueue { index: ring.index, count });
        }
        let takes_over = setup.begin();
        let features = features | PROTOCOL_FEATURES_BIT;
        self.say("SET_FEATURES", |front_end| front_end.set_features(features))?;
        self.share_inflight(setup, inflight)?;
        self.share_memory(memory, relay)?;
        if let Some(ring) = own {
            self.start_ring(ring, 0)?;
        }
        for ring in &setup.rings {
            let base = if takes_over { ring.used_index(memory) } else { 0 };
            let in_flight = if takes_over { ring.in_flight(memory) } else { 0 };
            if in_flight > 1 && inflight.is_none() {
                // Those that the last daemon used first are then served twice, and others not at all. A daemon that
                // uses chains in the order in which they come, as a network's does, has lost none.
                let queue = ring.index;
                warn!(queue, in_flight, "no record of requests in flight: some may be lost");
            }
            self.start_ring(ring, base)?;
        }
        for ring in rings() {
            let index = usize::from(ring.index);
            self.say("SET_VRING_ENABLE", |front_end| front_end.set_vring_enable(index, true))?;
            // What the driver has made available, and what a predecessor has used, may not have been told of. A kick that
            // is full tells, too.
            let _full = ring.kick.write(1);
            if takes_over {
                ring.call.raise();
            }
        }
        Ok(())
    }

    fn start_ring(&mut self, ring: &RingSetup, base: u16) -> Result<(), Error> {
        let index = usize::from(ring.index);
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = ring.addresses;
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        self.say("SET_VRING_NUM", |front_end| front_end.set_vring_num(index, ring.size))?;
        self.say("SET_VRING_BASE", |front_end| front_end.set_vring_base(index, base))?;
        self.say("SET_VRING_ADDR", |front_end| front_end.set_vring_addr(index, &addresses))?;
        self.say("SET_VRING_CALL", |front_end| front_end.set_vring_call(index, &ring.call.theirs))?;
        self.say("SET_VRING_KICK", |front_end| front_end.set_vring_kick(index, &ring.kick))
    }

    /// Gives the daemon the record of requests in flight: its predecessor's, or one that it makes.
    fn share_inflight(
        &mut self,
        setup: &Setup,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), Error> {
        if !self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if inflight.take().is_some() {
                warn!("this daemon takes no record of requests in flight: some may be lost");
            }
            return Ok(());
        }
        if inflight.is_none() {
            let asked_for = VhostUserInflight {
                num_queues: self.queue_count,
                queue_size: setup.rings.iter().map(|ring| ring.size).max().unwrap_or(1),
                ..VhostUserInflight::default()
            };
            let (layout, file) =
                self.say("GET_INFLIGHT_FD", |front_end| front_end.get_inflight_fd(&asked_for))?;
            if layout.mmap_size == 0 || layout.mmap_size > INFLIGHT_BYTES_MAX {
                return Err(Error::Inflight(layout.mmap_size));
            }
            *inflight = Some(Inflight { layout, file });
        }
        let Some(record) = inflight else { return Ok(()) };
        self.say("SET_INFLIGHT_FD", |front_end| {
            front_end.set_inflight_fd(&record.layout, record.file.as_raw_fd())
        })
    }

    fn share_memory(
        &mut self,
        memory: &GuestMemoryMmap,
        relay: Option<&Relay>,
    ) -> Result<(), Error> {
        let own = relay.into_iter().flat_map(|relay| relay.memory().iter());
        let regions = memory.iter().chain(own).map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(Error::Memory)?;
        self.say("SET_MEM_TABLE", |front_end| front_end.set_mem_table(&regions)).map(drop)
    }

    /// Has the daemon let go of the driver's rings: when this has returned, it touches them no more.
    pub(crate) fn stop(&mut self, setup: &Setup) -> Result<(), Error> {
        // The control queue has the same index, whoever's ring it is.
        for ring in setup.rings.iter().chain(&setup.control) {
            let index = usize::from(ring.index);
            self.say("SET_VRING_ENABLE", |front_end| front_end.set_vring_enable(index, false))?;
            self.say("GET_VRING_BASE", |front_end| front_end.get_vring_base(index))?;
        }
        if self.has(VhostUserProtocolFeatures::RESET_DEVICE) {
            self.say("RESET_DEVICE", |front_end| front_end.reset_device())?;
        }
        Ok(())
    }

    /// The channel for the daemon's requests, if it has one.
    pub(crate) fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    /// Takes a request of the daemon's; says whether the configuration has changed.
    pub(crate) fn take_request(&mut self) -> Result<bool, Error> {
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let _guard = self.watchdog.guard(channel.socket(), self.limit);
        channel.take().map_err(Error::Channel)
    }

    /// The connection's socket.
    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// What of the daemon's features is the guest's to see.
    fn guest_features(&self) -> u64 {
        self.features & (!RESERVED_FEATURES | RING_FEATURES)
    }

    /// Sends a message, and waits for its answer as long as is permitted.
    fn say<T>(
        &mut self,
        message: &'static str,
        send: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, Error> {
        let _guard = self.watchdog.guard(&self.socket, self.limit);
        send(&mut self.front_end).map_err(|source| Error::Message { message, source })
    }
}

/// Whether the daemon has said no, which is an answer like another.
fn is_refusal(error: &vhost::Error) -> bool {
    use vhost::vhost_user::Error::BackendInternalError;
    matches!(error, vhost::Error::VhostUserProtocol(BackendInternalError))
}
