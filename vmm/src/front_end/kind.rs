//! What differs from one type of device to the next.
//!
//! Contract: facts of VIRTIO 1.3, chapter 5, and of PCI's classes; no state.

use super::session::QUEUES_MAX;

/// The type of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Block,
    /// With the MAC address that the guest is to see, if it is not the daemon's to say.
    Network(Option<[u8; 6]>),
    Console,
}

/// VIRTIO 1.3, 5.2.3: `SECURE_ERASE` and `ZONED` need fields behind the part of the configuration that is read.
const BLOCK_WITHOUT: u64 = 1 << 16 | 1 << 17;

const VIRTIO_NET_F_MAC: u64 = 1 << 5;
const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
const VIRTIO_NET_F_MQ: u64 = 1 << 22;
/// VIRTIO 1.3, 5.1.3.1: what needs a control queue: the queue itself, its commands, several queue pairs.
const NETWORK_CONTROL: u64 = 1 << 2
    | VIRTIO_NET_F_CTRL_VQ
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | VIRTIO_NET_F_MQ
    | 1 << 23
    | 1 << 53
    | 1 << 57
    | 1 << 60;

impl Kind {
    /// The word for it in options, and in the name of the program that serves it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Block => "blk",
            Self::Network(_) => "net",
            Self::Console => "console",
        }
    }

    /// VIRTIO 1.3, 5: the number of the device type.
    pub(crate) fn virtio_id(self) -> u16 {
        match self {
            Self::Network(_) => 1,
            Self::Block => 2,
            Self::Console => 3,
        }
    }

    /// Class, subclass and programming interface: SCSI storage, Ethernet, another communication device.
    pub(crate) fn pci_class(self) -> [u8; 3] {
        match self {
            Self::Block => [0x01, 0x00, 0x00],
            Self::Network(_) => [0x02, 0x00, 0x00],
            Self::Console => [0x07, 0x80, 0x00],
        }
    }

    /// Bytes of the configuration space: of a disk up to the limits of WRITE_ZEROES, of a network up to those of RSS.
    pub(crate) fn config_bytes(self) -> usize {
        match self {
            Self::Block => 60,
            Self::Network(_) => 24,
            Self::Console => 12,
        }
    }

    /// A disk has its capacity there; a network and a console may be without.
    pub(crate) fn needs_config(self) -> bool {
        self == Self::Block
    }

    /// Queues that there are at least.
    pub(crate) fn queues_least(self) -> u16 {
        match self {
            Self::Block => 1,
            Self::Network(_) | Self::Console => 2,
        }
    }

    /// Features that this process offers by itself.
    pub(crate) fn own_features(self) -> u64 {
        match self {
            Self::Network(Some(_)) => VIRTIO_NET_F_MAC,
            _ => 0,
        }
    }

    /// What of a daemon's features the guest is offered, beside those of this process.
    pub(crate) fn sound(self, features: u64, queue_count: u16) -> u64 {
        let without = match self {
            Self::Block => BLOCK_WITHOUT,
            // Some daemons leave the control queue to their front end, and have no ring for it.
            Self::Network(_) if queue_count < 3 => NETWORK_CONTROL,
            Self::Network(_) | Self::Console => 0,
        };
        features & !without | self.own_features()
    }

    /// The index of a network's control queue, for a driver with these features.
    // VIRTIO 1.3, 5.1.2: controlq is behind the queues of max_virtqueue_pairs with MQ, and is queue 2 without.
    pub(crate) fn control_queue(self, features: u64, config: &[u8]) -> Option<u16> {
        let is_there = matches!(self, Self::Network(_)) && features & VIRTIO_NET_F_CTRL_VQ != 0;
        let pairs = match config {
            [_, _, _, _, _, _, _, _, low, high, ..] if features & VIRTIO_NET_F_MQ != 0 => {
                u16::from_le_bytes([*low, *high])
            }
            _ => 1,
        };
        is_there.then_some(pairs.saturating_mul(2))
    }

    /// Puts what this process says by itself into the configuration space.
    pub(crate) fn complete(self, config: &mut [u8]) {
        if let Self::Network(Some(mac)) = self {
            for (byte, own) in config.iter_mut().zip(mac) {
                *byte = own;
            }
        }
    }

    /// Whether the driver may write to this byte of the configuration space and reads there what it has written: a
    /// disk's cache mode.
    pub(crate) fn keeps_written(self, at: usize) -> bool {
        self == Self::Block && at == 32
    }
}

const _: () = assert!(QUEUES_MAX >= 3);

#[cfg(test)]
mod tests {
    use super::{Kind, NETWORK_CONTROL, VIRTIO_NET_F_MAC};

    #[test]
    fn network_without_a_ring_for_it_has_no_control_queue() {
        let network = Kind::Network(None);
        assert_eq!(network.sound(u64::MAX, 2), !NETWORK_CONTROL);
        assert_eq!(network.sound(u64::MAX, 3), u64::MAX);
    }

    #[test]
    fn control_queue_is_behind_all_pairs_only_if_the_driver_knows_of_several() {
        let network = Kind::Network(None);
        let mut config = [0; 24];
        config[8] = 4;
        assert_eq!(network.control_queue(1 << 17 | 1 << 22, &config), Some(8));
        assert_eq!(network.control_queue(1 << 17, &config), Some(2));
        assert_eq!(network.control_queue(1 << 22, &config), None);
        assert_eq!(network.control_queue(1 << 17 | 1 << 22, &[0xff; 24]), Some(0xffff));
        assert_eq!(Kind::Console.control_queue(u64::MAX, &config), None);
    }

    #[test]
    fn given_mac_is_offered_and_seen() {
        let network = Kind::Network(Some([2, 3, 4, 5, 6, 7]));
        assert_eq!(network.sound(0, 3), VIRTIO_NET_F_MAC);
        let mut config = [0xff; 8];
        network.complete(&mut config);
        assert_eq!(config, [2, 3, 4, 5, 6, 7, 0xff, 0xff]);
        network.complete(&mut []);
    }
}
