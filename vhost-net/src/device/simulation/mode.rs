//! What a run is made of: the device, the driver's features, how it lays out its buffers.

use common::simulation::{Random, RingSpec};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};

use crate::backend::{Backend, Offloads, Simulated};
use crate::config::{
    Identity, Mac, Offer, State, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VlanId, features,
};
use crate::device::{NetDevice, Port};

/// The guest's address.
pub(super) const OWN: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// The largest of the rings.
pub(super) const RING_SIZE_MAX: u16 = 64;

/// What there is of offloads: the others take the same ways.
const OFFLOADS: Offloads =
    Offloads { csum: true, tso4: true, tso6: false, ecn: false, ufo: false, uso: false };

/// How long the buffers are that a driver gives for frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Buffers {
    /// Each has room for the longest frame.
    Big,
    /// Each has room for a frame of the wire.
    Page,
    /// Each has room for a few bytes.
    Tiny,
    Any,
}

/// See the module's head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) pairs: u16,
    /// What the driver has acknowledged.
    pub(super) features: u64,
    pub(super) vlan: Option<u16>,
    pub(super) only_mac: bool,
    mtu: Option<u16>,
    pub(super) buffers: Buffers,
    /// They are in as many pieces as can be.
    pub(super) is_scattered: bool,
    pub(super) ring_size: u16,
    /// Limits are set at first.
    pub(super) is_limited: bool,
}

impl Mode {
    pub(super) fn any(seed: u64) -> Self {
        // Its own sequence: what happens in a run does not hang on what it is made of.
        let mut random = Random::new(seed ^ 0x6d6f_6465);
        let mut mode = Self {
            pairs: random.pick(&[1, 1, 2]),
            features: 0,
            vlan: random.pick(&[None, None, Some(7)]),
            only_mac: random.once_in(3),
            mtu: random.pick(&[None, None, Some(1500)]),
            buffers: random.pick(&[Buffers::Big, Buffers::Page, Buffers::Tiny, Buffers::Any]),
            is_scattered: random.once_in(6),
            ring_size: random.pick(&[4, 16, RING_SIZE_MAX]),
            is_limited: random.once_in(3),
        };
        let ring = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC;
        let mut wanted = random.number();
        if !random.once_in(4) {
            wanted |= VIRTIO_NET_F_CTRL_VQ | VIRTIO_F_VERSION_1;
        }
        let requires = |wanted: u64, feature: u64, other: u64| {
            if wanted & other == 0 { wanted & !feature } else { wanted }
        };
        wanted = requires(wanted, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_CSUM);
        wanted = requires(wanted, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_CSUM);
        mode.features = wanted & (features(&mode.offer()) | ring);
        mode
    }

    /// One pair, mergeable buffers of which each is small, and no offloads.
    pub(super) fn plain() -> Self {
        Self {
            pairs: 1,
            features: VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF,
            vlan: None,
            only_mac: false,
            mtu: None,
            buffers: Buffers::Tiny,
            is_scattered: false,
            ring_size: 16,
            is_limited: false,
        }
    }

    fn offer(&self) -> Offer {
        Offer {
            from_driver: OFFLOADS,
            to_driver: OFFLOADS,
            queue_pairs: self.pairs,
            has_mac: true,
            has_mtu: self.mtu.is_some(),
            has_speed: false,
            only_mac: self.only_mac,
        }
    }

    pub(super) fn device(&self) -> NetDevice {
        self.device_on(Simulated::new(self.pairs, OFFLOADS))
    }

    pub(super) fn device_on(&self, network: Simulated) -> NetDevice {
        let identity = Identity {
            mac: Some(Mac::new(OWN)),
            mtu: self.mtu,
            speed_mbps: None,
            queue_pairs: self.pairs,
        };
        let port = Port {
            vlan: self.vlan.and_then(VlanId::new),
            only_mac: self.only_mac,
            capture: None,
            queue_size_max: RING_SIZE_MAX,
        };
        NetDevice::new(
            Backend::Simulated(network),
            State::new(identity),
            port,
            features(&self.offer()),
        )
    }

    /// The ring of a queue, in memory of its own.
    pub(super) fn ring(&self, index: u16) -> RingSpec {
        let (size, features) = (self.ring_size, self.features);
        let at = u64::from(index) * RingSpec::bytes(size);
        RingSpec { index, at, size, features }
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Pairs whose rings the driver has.
    pub(super) fn used_pairs(&self) -> u16 {
        if self.has(VIRTIO_NET_F_MQ) { self.pairs } else { 1 }
    }

    pub(super) fn merges(&self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Bytes of a header, as the driver has it.
    pub(super) fn header_bytes(&self) -> usize {
        if self.has(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF) { 12 } else { 10 }
    }

    /// The longest IP packet that may come unsegmented.
    pub(super) fn mtu_in_force(&self) -> Option<usize> {
        self.mtu.filter(|_| self.has(VIRTIO_NET_F_MTU)).map(usize::from)
    }
}
