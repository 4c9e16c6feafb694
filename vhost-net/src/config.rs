//! What the device says of itself: feature bits, the roles of its queues, the configuration space.
//!
//! Contract: what is offered follows from an [`Offer`] by one function, and what a driver sees from
//! then on is [`State`]: atomics, which any thread reads without waiting. The status changes on the
//! main thread (link, announcement) and by the control queue (an acknowledgement), so it changes by
//! read-modify-write; each other field has one writer at a time. RSS, hash reports, notification
//! coalescing and standby are not offered: their fields are zero.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use common::virtqueue::VIRTIO_F_VERSION_1;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::backend::Offloads;

// VIRTIO 1.3, 5.1.3: Feature bits.
/// Device handles packets with partial checksum.
pub(crate) const VIRTIO_NET_F_CSUM: u64 = 1 << 0;
/// Driver handles packets with partial checksum.
pub(crate) const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
/// Control channel offloads reconfiguration support.
pub(crate) const VIRTIO_NET_F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// Device maximum MTU reporting is supported.
pub(crate) const VIRTIO_NET_F_MTU: u64 = 1 << 3;
/// Device has given MAC address.
pub(crate) const VIRTIO_NET_F_MAC: u64 = 1 << 5;
/// Driver can receive TSOv4.
pub(crate) const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
/// Driver can receive TSOv6.
pub(crate) const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
/// Driver can receive TSO with ECN.
pub(crate) const VIRTIO_NET_F_GUEST_ECN: u64 = 1 << 9;
/// Driver can receive UFO.
pub(crate) const VIRTIO_NET_F_GUEST_UFO: u64 = 1 << 10;
/// Device can receive TSOv4.
pub(crate) const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
/// Device can receive TSOv6.
pub(crate) const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
/// Device can receive TSO with ECN.
pub(crate) const VIRTIO_NET_F_HOST_ECN: u64 = 1 << 13;
/// Device can receive UFO.
pub(crate) const VIRTIO_NET_F_HOST_UFO: u64 = 1 << 14;
/// Driver can merge receive buffers.
pub(crate) const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
/// Configuration status field is available.
pub(crate) const VIRTIO_NET_F_STATUS: u64 = 1 << 16;
/// Control channel is available.
pub(crate) const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
/// Control channel RX mode support.
pub(crate) const VIRTIO_NET_F_CTRL_RX: u64 = 1 << 18;
/// Control channel VLAN filtering.
pub(crate) const VIRTIO_NET_F_CTRL_VLAN: u64 = 1 << 19;
/// Control channel RX extra mode support.
pub(crate) const VIRTIO_NET_F_CTRL_RX_EXTRA: u64 = 1 << 20;
/// Driver can send gratuitous packets.
pub(crate) const VIRTIO_NET_F_GUEST_ANNOUNCE: u64 = 1 << 21;
/// Device supports multiqueue with automatic receive steering.
pub(crate) const VIRTIO_NET_F_MQ: u64 = 1 << 22;
/// Set MAC address through control channel.
pub(crate) const VIRTIO_NET_F_CTRL_MAC_ADDR: u64 = 1 << 23;
/// Driver can receive USOv4 packets.
pub(crate) const VIRTIO_NET_F_GUEST_USO4: u64 = 1 << 54;
/// Driver can receive USOv6 packets.
pub(crate) const VIRTIO_NET_F_GUEST_USO6: u64 = 1 << 55;
/// Device can receive USO packets.
pub(crate) const VIRTIO_NET_F_HOST_USO: u64 = 1 << 56;
/// Device reports speed and duplex.
pub(crate) const VIRTIO_NET_F_SPEED_DUPLEX: u64 = 1 << 63;

/// The offloads that a driver may switch on and off.
// VIRTIO 1.3, 5.1.6.5.8.1: there is a corresponding device feature for each offload.
pub(crate) const GUEST_OFFLOADS: u64 = VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_GUEST_ECN
    | VIRTIO_NET_F_GUEST_UFO
    | VIRTIO_NET_F_GUEST_USO4
    | VIRTIO_NET_F_GUEST_USO6;

/// VIRTIO 1.3, 5.1.4: the link is up.
const VIRTIO_NET_S_LINK_UP: u16 = 1;
/// VIRTIO 1.3, 5.1.4: the driver is to send gratuitous packets.
const VIRTIO_NET_S_ANNOUNCE: u16 = 2;

/// `duplex` of a link that is full duplex. The layout (5.1.4) and Linux have it so; the text below
/// it (5.1.4.1) has the two values the other way round.
const DUPLEX_FULL: u8 = 1;

/// Length of `struct virtio_net_config`.
const CONFIG_BYTES: usize = 28;

/// Most queue pairs of a device: vhost-user has eight bits for the index of a ring, and the control
/// queue is one more. (A tap could have 256.)
// VIRTIO 1.3, 5.1.4.1: The device MUST set max_virtqueue_pairs to between 1 and 0x8000 inclusive.
pub(crate) const QUEUE_PAIRS_MAX: u16 = 127;

/// The smallest MTU: what IPv4 must be able to pass on.
// VIRTIO 1.3, 5.1.4.1: The device MUST set mtu to between 68 and 65535 inclusive.
pub(crate) const MTU_MIN: u16 = 68;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Mac([u8; MAC_BYTES]);

/// Length of an Ethernet address.
pub(crate) const MAC_BYTES: usize = 6;

/// Why a text is not the address of a device.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum MacError {
    #[error("{0:?} is no MAC address: expected six bytes in hexadecimal, as in 52:54:00:12:34:56")]
    Form(String),
    #[error("{0} is the address of a group (the first byte is odd), not of a device")]
    Group(Mac),
    #[error("an address of zeros is no device's")]
    Zero,
}

impl Mac {
    /// The address with these bytes, in the order in which they are sent.
    pub(crate) const fn new(bytes: [u8; MAC_BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn bytes(self) -> [u8; MAC_BYTES] {
        self.0
    }

    /// An address of a group, of which the broadcast address is one.
    pub(crate) fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }

    pub(crate) fn is_broadcast(self) -> bool {
        self.0 == [0xff; MAC_BYTES]
    }

    /// Whether a device can have it: it is nobody else's, and not that of a group.
    pub(crate) fn is_device_address(self) -> bool {
        !self.is_multicast() && self.number() != 0
    }

    /// The address as a number that fits an atomic.
    pub(crate) fn number(self) -> u64 {
        let [b0, b1, b2, b3, b4, b5] = self.0;
        u64::from_be_bytes([0, 0, b0, b1, b2, b3, b4, b5])
    }

    /// The reverse of [`Mac::number`].
    pub(crate) fn from_number(number: u64) -> Self {
        let [_, _, bytes @ ..] = number.to_be_bytes();
        Self(bytes)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [b0, b1, b2, b3, b4, b5] = self.0;
        write!(f, "{b0:02x}:{b1:02x}:{b2:02x}:{b3:02x}:{b4:02x}:{b5:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    /// Reads the address of a device.
    fn from_str(text: &str) -> Result<Self, MacError> {
        let form = || MacError::Form(text.to_owned());
        let mut bytes = [0; MAC_BYTES];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(form)?;
            // `from_str_radix` takes a sign.
            let is_hexadecimal = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let value = u8::from_str_radix(part, 16).ok().filter(|_| is_hexadecimal);
            *byte = value.ok_or_else(form)?;
        }
        let mac = Self(bytes);
        match parts.next() {
            Some(_) => Err(form()),
            None if mac.is_multicast() => Err(MacError::Group(mac)),
            None if mac.number() == 0 => Err(MacError::Zero),
            None => Ok(mac),
        }
    }
}

/// How many VLANs a tag can name.
pub(crate) const VLANS: u16 = 4096;

/// The number of a VLAN, below [`VLANS`]; 0 is that of a tag which has a priority only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VlanId(u16);

impl VlanId {
    /// Tags without a VLAN.
    pub(crate) const NONE: Self = Self(0);

    pub(crate) fn new(number: u16) -> Option<Self> {
        (number < VLANS).then_some(Self(number))
    }

    /// The VLAN that a tag's control information names, beside a priority.
    pub(crate) fn of_tag(control: [u8; 2]) -> Self {
        Self(u16::from_be_bytes(control) & (VLANS - 1))
    }

    pub(crate) fn number(self) -> u16 {
        self.0
    }
}

/// What the feature bits follow from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Offer {
    /// What the back end takes from a driver.
    pub(crate) from_driver: Offloads,
    /// What the back end hands to a driver.
    pub(crate) to_driver: Offloads,
    /// Queue pairs, from 1.
    pub(crate) queue_pairs: u16,
    /// The device was given a MAC address.
    pub(crate) has_mac: bool,
    /// An MTU was given.
    pub(crate) has_mtu: bool,
    /// A speed was given.
    pub(crate) has_speed: bool,
    /// The driver may send from the MAC address only that it was given.
    pub(crate) only_mac: bool,
}

/// Feature bits of the network device; the transport's and the ring's are not among them.
pub(crate) fn features(offer: &Offer) -> u64 {
    let always = VIRTIO_NET_F_MRG_RXBUF
        | VIRTIO_NET_F_STATUS
        | VIRTIO_NET_F_CTRL_VQ
        | VIRTIO_NET_F_CTRL_RX
        | VIRTIO_NET_F_CTRL_RX_EXTRA
        | VIRTIO_NET_F_CTRL_VLAN
        | VIRTIO_NET_F_GUEST_ANNOUNCE;
    let to_driver = guest_offloads(offer.to_driver);
    always
        | host_offloads(offer.from_driver)
        | to_driver
        | offered_if(to_driver != 0, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
        | offered_if(offer.has_mtu, VIRTIO_NET_F_MTU)
        | offered_if(offer.has_mac, VIRTIO_NET_F_MAC)
        | offered_if(offer.queue_pairs > 1, VIRTIO_NET_F_MQ)
        // A driver that must not change its address is not told that it could.
        | offered_if(!offer.only_mac, VIRTIO_NET_F_CTRL_MAC_ADDR)
        | offered_if(offer.has_speed, VIRTIO_NET_F_SPEED_DUPLEX)
}

fn offered_if(condition: bool, feature: u64) -> u64 {
    if condition { feature } else { 0 }
}

/// The offloads of these whose own conditions hold.
// VIRTIO 1.3, 5.1.3.1: each segmentation requires the checksum of its direction, and ECN requires
// TSO4 or TSO6.
fn complete(offloads: Offloads) -> Offloads {
    let Offloads { csum, tso4, tso6, ecn, ufo, uso } = offloads;
    Offloads {
        csum,
        tso4: csum && tso4,
        tso6: csum && tso6,
        ecn: csum && (tso4 || tso6) && ecn,
        ufo: csum && ufo,
        uso: csum && uso,
    }
}

/// The bits of what a driver may leave to us.
fn host_offloads(offloads: Offloads) -> u64 {
    let offloads = complete(offloads);
    offered_if(offloads.csum, VIRTIO_NET_F_CSUM)
        | offered_if(offloads.tso4, VIRTIO_NET_F_HOST_TSO4)
        | offered_if(offloads.tso6, VIRTIO_NET_F_HOST_TSO6)
        | offered_if(offloads.ecn, VIRTIO_NET_F_HOST_ECN)
        | offered_if(offloads.ufo, VIRTIO_NET_F_HOST_UFO)
        | offered_if(offloads.uso, VIRTIO_NET_F_HOST_USO)
}

/// The bits of what we may leave to a driver.
fn guest_offloads(offloads: Offloads) -> u64 {
    let offloads = complete(offloads);
    offered_if(offloads.csum, VIRTIO_NET_F_GUEST_CSUM)
        | offered_if(offloads.tso4, VIRTIO_NET_F_GUEST_TSO4)
        | offered_if(offloads.tso6, VIRTIO_NET_F_GUEST_TSO6)
        | offered_if(offloads.ecn, VIRTIO_NET_F_GUEST_ECN)
        | offered_if(offloads.ufo, VIRTIO_NET_F_GUEST_UFO)
        | offered_if(offloads.uso, VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6)
}

/// What a back end is asked to hand over while the offloads `bits` are in force.
///
/// A back end has one switch for UDP segments, of either IP. It is on for a driver that takes both.
pub(crate) fn wanted_offloads(bits: u64) -> Offloads {
    let has = |feature: u64| bits & feature != 0;
    Offloads {
        csum: has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(VIRTIO_NET_F_GUEST_ECN),
        ufo: has(VIRTIO_NET_F_GUEST_UFO),
        uso: has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6),
    }
}

/// Whether no offload of these is without the one that it requires.
pub(crate) fn are_complete(bits: u64) -> bool {
    let offloads = wanted_offloads(bits);
    complete(offloads) == offloads
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Frames to the driver, of this pair, from 0.
    Receive(u16),
    /// Frames from the driver, of this pair, from 0.
    Transmit(u16),
    /// Commands.
    Control,
    /// Nothing, for a driver with these features.
    Unused,
}

impl Role {
    /// The role of the queue at `index`, for a driver that acknowledged `features`, of a device of
    /// `queue_pairs`.
    // VIRTIO 1.3, 5.1.2: the control queue is 2N. N is 1 if VIRTIO_NET_F_MQ is not negotiated,
    // otherwise set by max_virtqueue_pairs; it only exists if VIRTIO_NET_F_CTRL_VQ is negotiated.
    pub(crate) fn of(index: u16, features: u64, queue_pairs: u16) -> Self {
        let pairs = if features & VIRTIO_NET_F_MQ != 0 { queue_pairs } else { 1 };
        let pair = index / 2;
        if pair < pairs {
            return if index.is_multiple_of(2) {
                Self::Receive(pair)
            } else {
                Self::Transmit(pair)
            };
        }
        let is_control = index == pairs * 2 && features & VIRTIO_NET_F_CTRL_VQ != 0;
        if is_control { Self::Control } else { Self::Unused }
    }
}

/// What a device is made with, and keeps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Identity {
    /// Its address; without one, the driver makes one up.
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: Option<u16>,
    /// In units of 1,000,000 bits per second.
    pub(crate) speed_mbps: Option<u32>,
    /// From 1, to [`QUEUE_PAIRS_MAX`].
    pub(crate) queue_pairs: u16,
}

/// What a driver has told the device, written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptState {
    mac: u64,
    written: u64,
    is_to_announce: bool,
    active_pairs: u16,
    offloads: u64,
}

/// What a driver sees of the device, and has told it.
#[derive(Debug)]
pub(crate) struct State {
    identity: Identity,
    /// The address that frames to the driver have; 0: it is not known.
    mac: AtomicU64,
    /// Bytes of an address that a legacy driver has begun to write.
    written: AtomicU64,
    status: AtomicU16,
    /// Pairs that frames may be received on, from 1.
    active_pairs: AtomicU16,
    /// Offloads that are in force, by their feature bits.
    offloads: AtomicU64,
}

impl State {
    /// A device whose link is down, and to which no driver has spoken.
    pub(crate) fn new(identity: Identity) -> Self {
        let mac = identity.mac.map_or(0, Mac::number);
        Self {
            identity,
            mac: AtomicU64::new(mac),
            written: AtomicU64::new(mac),
            status: AtomicU16::new(0),
            active_pairs: AtomicU16::new(1),
            offloads: AtomicU64::new(0),
        }
    }

    /// The driver has reset the device: only the link stays as it is.
    pub(crate) fn reset(&self) {
        self.set_mac_number(self.identity.mac.map_or(0, Mac::number));
        self.status.fetch_and(!VIRTIO_NET_S_ANNOUNCE, Ordering::Relaxed);
        // VIRTIO 1.3, 5.1.6.5.6.2: After initialization or reset, the device MUST queue packets only
        // on receiveq1.
        self.active_pairs.store(1, Ordering::Relaxed);
        self.offloads.store(0, Ordering::Relaxed);
    }

    /// The driver has acknowledged `features`.
    pub(crate) fn negotiated(&self, features: u64) {
        // VIRTIO 1.3, 5.1.6.5.8.1: Upon feature negotiation corresponding offload gets enabled.
        self.offloads.store(features & GUEST_OFFLOADS, Ordering::Relaxed);
        // A front end that serves the control queue itself (QEMU, DPDK) acknowledges
        // VIRTIO_NET_F_MQ without it. What it hears there it says by enabling rings.
        let pairs = match features & (VIRTIO_NET_F_MQ | VIRTIO_NET_F_CTRL_VQ) {
            VIRTIO_NET_F_MQ => self.identity.queue_pairs,
            _ => 1,
        };
        self.active_pairs.store(pairs, Ordering::Relaxed);
    }

    pub(crate) fn save(&self) -> KeptState {
        KeptState {
            mac: self.mac.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
            is_to_announce: self.status.load(Ordering::Relaxed) & VIRTIO_NET_S_ANNOUNCE != 0,
            active_pairs: self.active_pairs(),
            offloads: self.offloads(),
        }
    }

    /// Whether a driver that acknowledged `features` can have said that.
    pub(crate) fn can_be(&self, kept: &KeptState, features: u64) -> bool {
        let is_address = |number: u64| Mac::from_number(number).number() == number;
        is_address(kept.mac)
            && is_address(kept.written)
            && (1..=self.queue_pairs()).contains(&kept.active_pairs)
            && kept.offloads & !(features & GUEST_OFFLOADS) == 0
            && are_complete(kept.offloads)
    }

    /// A driver has said that, to a predecessor of this process.
    pub(crate) fn restore(&self, kept: &KeptState) {
        self.mac.store(kept.mac, Ordering::Relaxed);
        self.written.store(kept.written, Ordering::Relaxed);
        self.set_status(VIRTIO_NET_S_ANNOUNCE, kept.is_to_announce);
        self.set_active_pairs(kept.active_pairs);
        self.set_offloads(kept.offloads);
    }

    pub(crate) fn queue_pairs(&self) -> u16 {
        self.identity.queue_pairs
    }

    pub(crate) fn mtu(&self) -> Option<u16> {
        self.identity.mtu
    }

    /// The address that frames to the driver have; `None`: the driver has made one up.
    pub(crate) fn mac(&self) -> Option<Mac> {
        let mac = Mac::from_number(self.mac.load(Ordering::Relaxed));
        mac.is_device_address().then_some(mac)
    }

    // VIRTIO 1.3, 5.1.6.5.2.1: The device MUST update mac in config space before it consumes the
    // VIRTIO_NET_CTRL_MAC_ADDR_SET command.
    pub(crate) fn set_mac(&self, mac: Mac) {
        self.set_mac_number(mac.number());
    }

    fn set_mac_number(&self, number: u64) {
        self.mac.store(number, Ordering::Relaxed);
        self.written.store(number, Ordering::Relaxed);
    }

    pub(crate) fn active_pairs(&self) -> u16 {
        self.active_pairs.load(Ordering::Relaxed)
    }

    pub(crate) fn set_active_pairs(&self, pairs: u16) {
        self.active_pairs.store(pairs, Ordering::Relaxed);
    }

    /// Those of [`GUEST_OFFLOADS`] that are in force.
    pub(crate) fn offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    pub(crate) fn set_offloads(&self, bits: u64) {
        self.offloads.store(bits & GUEST_OFFLOADS, Ordering::Relaxed);
    }

    /// Whether that is news, of which a driver is to be told.
    pub(crate) fn set_link(&self, is_up: bool) -> bool {
        self.set_status(VIRTIO_NET_S_LINK_UP, is_up)
    }

    /// Asks a driver that acknowledged `features` to send gratuitous packets. Whether it is to be
    /// told that its configuration has changed.
    pub(crate) fn announce(&self, features: u64) -> bool {
        const NEEDED: u64 = VIRTIO_NET_F_GUEST_ANNOUNCE | VIRTIO_NET_F_STATUS;
        features & NEEDED == NEEDED && self.set_status(VIRTIO_NET_S_ANNOUNCE, true)
    }

    // VIRTIO 1.3, 5.1.6.5.4.2: the device MUST clear the VIRTIO_NET_S_ANNOUNCE bit in status upon
    // receipt of VIRTIO_NET_CTRL_ANNOUNCE_ACK before marking the buffer as used.
    pub(crate) fn announced(&self) {
        self.set_status(VIRTIO_NET_S_ANNOUNCE, false);
    }

    fn set_status(&self, bit: u16, is_set: bool) -> bool {
        let before = if is_set {
            self.status.fetch_or(bit, Ordering::Relaxed)
        } else {
            self.status.fetch_and(!bit, Ordering::Relaxed)
        };
        (before & bit != 0) != is_set
    }

    /// Copies the bytes of the configuration space from `offset` on; beyond it there are zeros.
    pub(crate) fn read(&self, offset: u32, into: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let config = self.lay_out();
        let known = config.get(from..).unwrap_or_default();
        into.fill(0);
        for (byte, value) in into.iter_mut().zip(known) {
            *byte = *value;
        }
    }

    // VIRTIO 1.3, 5.1.4: Device configuration layout. All fields are little-endian.
    fn lay_out(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mac = Mac::from_number(self.mac.load(Ordering::Relaxed));
        put(&mut config, 0, mac.bytes());
        put(&mut config, 6, self.status.load(Ordering::Relaxed).to_le_bytes());
        put(&mut config, 8, self.identity.queue_pairs.to_le_bytes());
        put(&mut config, 10, self.identity.mtu.unwrap_or(0).to_le_bytes());
        if let Some(speed) = self.identity.speed_mbps {
            put(&mut config, 12, speed.to_le_bytes());
            put(&mut config, 16, [DUPLEX_FULL]);
        }
        config
    }

    /// A driver that acknowledged `features` writes to the configuration space; false where it may
    /// not.
    ///
    /// All fields are read-only (VIRTIO 1.3, 5.1.4), but `mac` to a driver without VERSION_1 that
    /// cannot set it by a command (5.1.4.3). It writes byte by byte, from the first to the last:
    /// with the last one the address is set, if it is a device's (5.1.6.5.2.3: MAY defer MAC
    /// update).
    pub(crate) fn write(&self, features: u64, offset: u32, data: &[u8], only_mac: bool) -> bool {
        let is_legacy = features != 0 && features & VIRTIO_F_VERSION_1 == 0;
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = from.saturating_add(data.len());
        let cannot_command = features & VIRTIO_NET_F_CTRL_MAC_ADDR == 0;
        let mut bytes = Mac::from_number(self.written.load(Ordering::Relaxed)).bytes();
        let may = !only_mac && is_legacy && cannot_command && !data.is_empty();
        let Some(written) = bytes.get_mut(from..end).filter(|_| may) else { return false };
        written.copy_from_slice(data);
        let mac = Mac::new(bytes);
        self.written.store(mac.number(), Ordering::Relaxed);
        if end == MAC_BYTES && mac.is_device_address() {
            self.set_mac(mac);
        }
        true
    }
}

fn put<const BYTES: usize>(config: &mut [u8; CONFIG_BYTES], offset: usize, field: [u8; BYTES]) {
    config[offset..offset + BYTES].copy_from_slice(&field);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: &str = "52:54:00:12:34:56";
    const ALL: Offloads =
        Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };

    fn identity() -> Identity {
        Identity {
            mac: Some(MAC.parse().unwrap()),
            mtu: Some(0x2328),
            speed_mbps: Some(25_000),
            queue_pairs: 0x0104,
        }
    }

    fn field<const BYTES: usize>(state: &State, offset: u32) -> [u8; BYTES] {
        let mut bytes = [0xee; BYTES];
        state.read(offset, &mut bytes);
        bytes
    }

    #[test]
    fn addresses_are_read_and_shown_in_one_form() {
        assert_eq!(MAC.parse::<Mac>().unwrap().to_string(), MAC);
        assert_eq!("0A:00:00:00:00:fF".parse::<Mac>().unwrap().to_string(), "0a:00:00:00:00:ff");
        assert_eq!(Mac::from_number(MAC.parse::<Mac>().unwrap().number()).to_string(), MAC);
        for wrong in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:00:12:34:5",
            "52-54-00-12-34-56",
            "52:54:00:12:34:+6",
            "525400123456",
            "52:54:00:12:34:5g",
        ] {
            assert_eq!(wrong.parse::<Mac>(), Err(MacError::Form(wrong.to_owned())));
        }
        assert!(matches!("33:33:00:00:00:01".parse::<Mac>(), Err(MacError::Group(_))));
        assert!(matches!("ff:ff:ff:ff:ff:ff".parse::<Mac>(), Err(MacError::Group(_))));
        assert_eq!("00:00:00:00:00:00".parse::<Mac>(), Err(MacError::Zero));
    }

    #[test]
    fn vlan_is_the_tag_without_its_priority() {
        assert_eq!(VlanId::of_tag([0xff, 0xff]).number(), 4095);
        assert_eq!(VlanId::of_tag([0xe0, 0x00]), VlanId::NONE);
        assert_eq!(VlanId::new(4096), None);
    }

    #[test]
    fn features_follow_the_offer() {
        let least = Offer { queue_pairs: 1, only_mac: true, ..Offer::default() };
        let always = VIRTIO_NET_F_MRG_RXBUF
            | VIRTIO_NET_F_STATUS
            | VIRTIO_NET_F_CTRL_VQ
            | VIRTIO_NET_F_CTRL_RX
            | VIRTIO_NET_F_CTRL_RX_EXTRA
            | VIRTIO_NET_F_CTRL_VLAN
            | VIRTIO_NET_F_GUEST_ANNOUNCE;
        assert_eq!(features(&least), always);
        for (offer, more) in [
            (Offer { queue_pairs: 2, ..least }, VIRTIO_NET_F_MQ),
            (Offer { has_mac: true, ..least }, VIRTIO_NET_F_MAC),
            (Offer { has_mtu: true, ..least }, VIRTIO_NET_F_MTU),
            (Offer { has_speed: true, ..least }, VIRTIO_NET_F_SPEED_DUPLEX),
            (Offer { only_mac: false, ..least }, VIRTIO_NET_F_CTRL_MAC_ADDR),
            (Offer { from_driver: ALL, ..least }, VIRTIO_NET_F_CSUM | 0xf << 11 | 1 << 56),
            (Offer { to_driver: ALL, ..least }, GUEST_OFFLOADS | VIRTIO_NET_F_CTRL_GUEST_OFFLOADS),
        ] {
            assert_eq!(features(&offer), always | more, "{offer:?}");
        }
    }

    /// VIRTIO 1.3, 5.1.3.1, as a table: a feature, and those of which it requires one.
    const REQUIREMENTS: &[(u64, u64)] = &[
        (VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6),
        (VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_GUEST_CSUM),
        (VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6),
        (VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_CSUM),
        (VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
        (VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ),
    ];

    #[test]
    fn no_feature_is_offered_without_what_it_requires() {
        for bits in 0..1u32 << 6 {
            let bit = |at: u32| bits & 1 << at != 0;
            let offloads = Offloads {
                csum: bit(0),
                tso4: bit(1),
                tso6: bit(2),
                ecn: bit(3),
                ufo: bit(4),
                uso: bit(5),
            };
            let offer = Offer {
                from_driver: offloads,
                to_driver: offloads,
                queue_pairs: 2,
                ..Offer::default()
            };
            let offered = features(&offer);
            for (feature, requires) in REQUIREMENTS {
                let is_met = offered & feature == 0 || offered & requires != 0;
                assert!(is_met, "{feature:#x} of {offered:#x} ({offloads:?})");
            }
            assert!(are_complete(offered & GUEST_OFFLOADS));
            assert_eq!(wanted_offloads(offered), complete(offloads));
        }
        assert!(!are_complete(VIRTIO_NET_F_GUEST_TSO4));
    }

    #[test]
    fn control_queue_is_behind_the_pairs_that_were_negotiated() {
        let mq = VIRTIO_NET_F_MQ | VIRTIO_NET_F_CTRL_VQ;
        let roles = |features| (0..8).map(|index| Role::of(index, features, 3)).collect::<Vec<_>>();
        use Role::{Control, Receive, Transmit, Unused};
        assert_eq!(
            roles(mq),
            [
                Receive(0),
                Transmit(0),
                Receive(1),
                Transmit(1),
                Receive(2),
                Transmit(2),
                Control,
                Unused
            ]
        );
        let one = [Receive(0), Transmit(0), Control, Unused, Unused, Unused, Unused, Unused];
        assert_eq!(roles(VIRTIO_NET_F_CTRL_VQ), one);
        assert_eq!(roles(0)[2..], [Unused; 6]);
        assert_eq!(roles(VIRTIO_NET_F_MQ)[5..], [Transmit(2), Unused, Unused]);
        assert_eq!(Role::of(u16::MAX, mq, QUEUE_PAIRS_MAX), Unused);
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let state = State::new(identity());
        state.set_link(true);
        assert_eq!(field(&state, 0), identity().mac.unwrap().bytes(), "mac");
        assert_eq!(field(&state, 6), [1, 0], "status");
        assert_eq!(field(&state, 8), [0x04, 0x01], "max_virtqueue_pairs");
        assert_eq!(field(&state, 10), [0x28, 0x23], "mtu");
        assert_eq!(field(&state, 12), 25_000u32.to_le_bytes(), "speed");
        assert_eq!(field(&state, 16), [1], "duplex");
        assert_eq!(field(&state, 17), [0; 11], "RSS, hashes, tunnels");
    }

    #[test]
    fn what_was_not_given_and_what_is_beyond_the_end_is_zero() {
        let state = State::new(Identity { queue_pairs: 1, ..Identity::default() });
        assert_eq!(field(&state, 0), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        let state = State::new(identity());
        let all: [u8; 256] = field(&state, 0);
        assert_eq!(all[CONFIG_BYTES..], [0; 256 - CONFIG_BYTES]);
        for offset in [27, 28, 29, 255, 256, u32::MAX] {
            assert_eq!(field(&state, offset), [0; 16], "{offset}");
        }
        assert_eq!(field(&state, 5), [0x56, 0, 0, 4], "an odd part of it");
    }

    #[test]
    fn link_and_announcement_are_news_once() {
        let state = State::new(identity());
        let wants = VIRTIO_NET_F_GUEST_ANNOUNCE | VIRTIO_NET_F_STATUS;
        assert!(!state.set_link(false), "it is down at first");
        assert!(state.set_link(true) && !state.set_link(true));
        assert!(!state.announce(VIRTIO_NET_F_STATUS), "the driver cannot");
        assert!(state.announce(wants) && !state.announce(wants));
        assert_eq!(field(&state, 6), [3, 0]);
        state.announced();
        assert_eq!(field(&state, 6), [1, 0]);
        assert!(state.set_link(false));
        assert_eq!(field(&state, 6), [0, 0]);
    }

    #[test]
    fn reset_undoes_what_the_driver_has_done() {
        let state = State::new(identity());
        let before: [u8; CONFIG_BYTES] = field(&state, 0);
        state.negotiated(VIRTIO_NET_F_MQ | VIRTIO_NET_F_CTRL_VQ | GUEST_OFFLOADS);
        assert_eq!((state.active_pairs(), state.offloads()), (1, GUEST_OFFLOADS));
        state.set_active_pairs(4);
        state.set_mac("52:54:00:00:00:01".parse().unwrap());
        state.announce(u64::MAX);
        state.set_link(true);
        state.reset();
        assert_eq!((state.active_pairs(), state.offloads()), (1, 0));
        assert!(!state.set_link(true), "the link is not the driver's");
        state.set_link(false);
        assert_eq!(field(&state, 0), before);
    }

    #[test]
    fn without_a_control_queue_of_ours_the_front_end_says_which_pairs_are_used() {
        let state = State::new(identity());
        state.negotiated(VIRTIO_NET_F_MQ);
        assert_eq!(state.active_pairs(), 0x0104);
        state.negotiated(0);
        assert_eq!(state.active_pairs(), 1);
    }

    #[test]
    fn only_a_legacy_driver_without_the_command_writes_its_address() {
        let state = State::new(identity());
        let other = Mac::new([2, 0, 0, 0, 0, 9]);
        let whole = other.bytes();
        let legacy = VIRTIO_NET_F_MAC;
        assert!(!state.write(0, 0, &whole, false), "who it is has not been said");
        assert!(!state.write(legacy | VIRTIO_F_VERSION_1, 0, &whole, false));
        assert!(!state.write(legacy | VIRTIO_NET_F_CTRL_MAC_ADDR, 0, &whole, false));
        assert!(!state.write(legacy, 0, &whole, true), "--only-mac");
        for (offset, data) in [(1, &whole[..]), (6, &[1]), (0, &[]), (u32::MAX, &[1])] {
            assert!(!state.write(legacy, offset, data, false), "{data:?} at {offset}");
        }
        assert_eq!(state.mac(), identity().mac);
        assert!(state.write(legacy, 0, &whole, false));
        assert_eq!(state.mac(), Some(other));
        state.reset();
        for (offset, byte) in (0..).zip(whole) {
            assert_eq!(state.mac(), identity().mac, "until the last byte has come");
            assert!(state.write(legacy, offset, &[byte], false));
        }
        assert_eq!(state.mac(), Some(other));
        assert!(state.write(legacy, 0, &[0xff; 6], false));
        assert_eq!(state.mac(), Some(other), "an address of a group is not taken");
    }
}
