//! The bits by which vhost-user itself is extended (vhost-user, "Protocol features").

use std::ops::BitOr;

/// Number of the virtio feature bit that says "protocol features can be negotiated".
pub const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// A set of protocol features. Each constant is the set of one, named as in `VHOST_USER_PROTOCOL_F_…`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProtocolFeatures(u64);

impl ProtocolFeatures {
    /// More than one queue; `GET_QUEUE_NUM`.
    pub const MQ: Self = Self(1 << 0);
    /// The log of dirty pages is passed as a descriptor.
    pub const LOG_SHMFD: Self = Self(1 << 1);
    /// `SEND_RARP`.
    pub const RARP: Self = Self(1 << 2);
    /// Any request may ask for an answer.
    pub const REPLY_ACK: Self = Self(1 << 3);
    /// `NET_SET_MTU`.
    pub const MTU: Self = Self(1 << 4);
    /// A channel for requests of the back end.
    pub const BACKEND_REQ: Self = Self(1 << 5);
    /// Legacy devices whose byte order is not the host's.
    pub const CROSS_ENDIAN: Self = Self(1 << 6);
    /// Sessions of a crypto device.
    pub const CRYPTO_SESSION: Self = Self(1 << 7);
    /// Postcopy migration.
    pub const PAGEFAULT: Self = Self(1 << 8);
    /// `GET_CONFIG` and `SET_CONFIG`.
    pub const CONFIG: Self = Self(1 << 9);
    /// Requests of the back end may carry descriptors.
    pub const BACKEND_SEND_FD: Self = Self(1 << 10);
    /// The back end gives the guest a page of its own for notifications.
    pub const HOST_NOTIFIER: Self = Self(1 << 11);
    /// The front end keeps the back end's record of requests in flight.
    pub const INFLIGHT_SHMFD: Self = Self(1 << 12);
    /// `RESET_DEVICE`.
    pub const RESET_DEVICE: Self = Self(1 << 13);
    /// Kicks and calls are messages.
    pub const INBAND_NOTIFICATIONS: Self = Self(1 << 14);
    /// Memory regions are added and removed one by one.
    pub const CONFIGURE_MEM_SLOTS: Self = Self(1 << 15);
    /// `SET_STATUS` and `GET_STATUS`.
    pub const STATUS: Self = Self(1 << 16);
    /// Memory regions of a Xen guest.
    pub const XEN_MMAP: Self = Self(1 << 17);
    /// dma-bufs shared between back ends.
    pub const SHARED_OBJECT: Self = Self(1 << 18);
    /// The back end's state is migrated.
    pub const DEVICE_STATE: Self = Self(1 << 19);
    /// `GET_VRING_BASE` may leave requests in flight.
    pub const GET_VRING_BASE_INFLIGHT: Self = Self(1 << 20);
    /// Ring addresses are guest addresses.
    pub const GPA_ADDRESSES: Self = Self(1 << 21);
    /// Memory regions of the device that the guest sees.
    pub const SHMEM: Self = Self(1 << 22);

    /// No feature.
    pub const fn empty() -> Self {
        Self(0)
    }

    /// The set as it is in a message; bits without a name are kept.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// As `SET_PROTOCOL_FEATURES` and `GET_PROTOCOL_FEATURES` carry it.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `others` are in this set.
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

impl BitOr for ProtocolFeatures {
    type Output = Self;

    fn bitor(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

#[cfg(test)]
mod tests {
    use super::ProtocolFeatures;

    #[test]
    fn sets_contain_what_was_put_in_and_nothing_else() {
        let offered = ProtocolFeatures::MQ | ProtocolFeatures::CONFIG;
        assert_eq!(offered.bits(), 0x201);
        assert!(offered.contains(ProtocolFeatures::MQ));
        assert!(offered.contains(ProtocolFeatures::empty()));
        assert!(!offered.contains(ProtocolFeatures::MQ | ProtocolFeatures::STATUS));
        assert!(!offered.contains(ProtocolFeatures::from_bits(1 << 63)));
    }
}
