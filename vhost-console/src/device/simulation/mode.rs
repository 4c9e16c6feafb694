//! What a run is made of: the device, and what its driver can do.

use common::simulation::{Random, RingSpec};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};

use crate::config::{Size, VIRTIO_CONSOLE_F_MULTIPORT, queue_count};
use crate::control::Order;
use crate::device::{Plugged, Shape};

/// See the module's head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) ports_max: u16,
    pub(super) has_several_ports: bool,
    /// What the driver has acknowledged.
    pub(super) features: u64,
    pub(super) ring_size: u16,
    pub(super) replay_bytes: u64,
    pub(super) order: Order,
    /// Ports come and go. Else the driver says now and then that it is ready once more: both together would have what it says of
    /// one port taken for the next one's.
    pub(super) has_changes: bool,
}

impl Mode {
    pub(super) fn any(seed: u64) -> Self {
        // Its own sequence: what happens in a run does not hang on what it is made of.
        let mut random = Random::new(seed ^ 0x6d6f_6465);
        let has_several_ports = !random.once_in(4);
        let ring = VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC;
        let mut features = random.number() & ring;
        if has_several_ports && !random.once_in(6) {
            features |= VIRTIO_CONSOLE_F_MULTIPORT;
        }
        Self {
            ports_max: if has_several_ports { random.pick(&[1, 2, 3]) } else { 1 },
            has_several_ports,
            features,
            ring_size: random.pick(&[4, 8]),
            replay_bytes: random.pick(&[0, 1000, 64 << 10]),
            order: random.pick(&[Order::RowsFirst, Order::ColumnsFirst]),
            has_changes: !random.once_in(4),
        }
    }

    pub(super) fn shape(&self) -> Shape {
        Shape {
            has_several_ports: self.has_several_ports,
            ports_max: self.ports_max,
            replay_bytes: self.replay_bytes,
            size: Size::default(),
            order: self.order,
            queue_size_max: self.ring_size,
        }
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

    /// The driver takes control messages.
    pub(super) fn has_messages(&self) -> bool {
        self.has(VIRTIO_CONSOLE_F_MULTIPORT)
    }

    /// Queues that the driver has a use for.
    pub(super) fn used_queues(&self) -> u16 {
        queue_count(self.has_messages(), self.ports_max)
    }

    /// Ports that the driver can reach.
    pub(super) fn used_ports(&self) -> u16 {
        if self.has_messages() { self.ports_max } else { 1 }
    }

    /// A port.
    pub(super) fn plugged(random: &mut Random) -> Plugged {
        Plugged {
            name: random.once_in(2).then(|| format!("port{}", random.within(0..100))),
            is_console: random.once_in(2),
            size: size(random),
        }
    }
}

/// Some size.
pub(super) fn size(random: &mut Random) -> Size {
    Size { columns: random.within(1..300) as u16, rows: random.within(1..4) as u16 }
}
