//! The numbers and layouts of vhost-user messages, from the front end's side.
//!
//! Numbers are plain integers, not an enum: a test may send any of them. All of them are in machine
//! byte order (vhost-user, "Message Specification"). [`TABLE`] says what a well-formed request
//! looks like.

/// Length of the header: request, flags and payload size, 32 bits each.
pub const HEADER_BYTES: usize = 12;
/// The version in the lower two bits of a message's flags.
pub const VHOST_USER_VERSION: u32 = 0x1;
/// The back end's messages in answer to a request carry this flag.
pub const VHOST_USER_REPLY_MASK: u32 = 0x4;
/// The front end asks for an acknowledgement (`REPLY_ACK`).
pub const VHOST_USER_NEED_REPLY_MASK: u32 = 0x8;
/// In the payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: no descriptor comes with the message.
pub const VHOST_USER_VRING_NOFD_MASK: u64 = 0x100;

/// The virtio feature bit that stands for "protocol features can be negotiated".
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

macro_rules! protocol_features {
    ($($name:ident = $bit:literal,)*) => { $(
        #[doc = concat!("Protocol feature bit ", $bit, ", as a mask.")]
        pub const $name: u64 = 1 << $bit;
    )* };
}
protocol_features! {
    VHOST_USER_PROTOCOL_F_MQ = 0,
    VHOST_USER_PROTOCOL_F_LOG_SHMFD = 1,
    VHOST_USER_PROTOCOL_F_RARP = 2,
    VHOST_USER_PROTOCOL_F_REPLY_ACK = 3,
    VHOST_USER_PROTOCOL_F_MTU = 4,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5,
    VHOST_USER_PROTOCOL_F_CROSS_ENDIAN = 6,
    VHOST_USER_PROTOCOL_F_CRYPTO_SESSION = 7,
    VHOST_USER_PROTOCOL_F_PAGEFAULT = 8,
    VHOST_USER_PROTOCOL_F_CONFIG = 9,
    VHOST_USER_PROTOCOL_F_BACKEND_SEND_FD = 10,
    VHOST_USER_PROTOCOL_F_HOST_NOTIFIER = 11,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13,
    VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15,
    VHOST_USER_PROTOCOL_F_STATUS = 16,
    VHOST_USER_PROTOCOL_F_XEN_MMAP = 17,
    VHOST_USER_PROTOCOL_F_SHARED_OBJECT = 18,
    VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19,
    VHOST_USER_PROTOCOL_F_SHMEM = 22,
}

macro_rules! virtio_features {
    ($($name:ident = $bit:literal,)*) => { $(
        #[doc = concat!("VIRTIO feature bit ", $bit, ", as a mask.")]
        pub const $name: u64 = 1 << $bit;
    )* };
}
virtio_features! {
    VIRTIO_F_INDIRECT_DESC = 28,
    VIRTIO_F_EVENT_IDX = 29,
    VIRTIO_F_VERSION_1 = 32,
    VIRTIO_F_ACCESS_PLATFORM = 33,
    VIRTIO_F_RING_PACKED = 34,
}

/// How many descriptors belong to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    /// None.
    None,
    /// One.
    One,
    /// One, or none with [`VHOST_USER_VRING_NOFD_MASK`] set.
    OneUnlessFlagged,
    /// One a region.
    OnePerRegion,
    /// None or one.
    Optional,
}

/// What a well-formed request looks like.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The request's number.
    pub request: u32,
    /// Its name in the text, without the `VHOST_USER_` prefix.
    pub name: &'static str,
    /// Length of its payload; the shortest one where lengths vary.
    pub size_bytes: usize,
    /// True where longer payloads can be well formed too.
    pub varies: bool,
    /// Its descriptors.
    pub descriptors: Descriptors,
    /// The protocol feature it belongs to, 0 for none.
    pub feature: u64,
    /// True where an answer is due whether or not one was asked for.
    pub answered: bool,
}

macro_rules! requests {
    ($($name:ident = $number:literal: $size:literal $varies:literal $fds:ident $feature:ident $answered:literal;)*) => {
        $(
            #[doc = concat!("Request number ", $number, ".")]
            pub const $name: u32 = $number;
        )*
        /// Every request of the text that a front end may send, in the order of its number.
        pub const TABLE: &[Row] = &[$(
            Row {
                request: $number,
                name: stringify!($name),
                size_bytes: $size,
                varies: $varies,
                descriptors: Descriptors::$fds,
                feature: $feature,
                answered: $answered,
            },
        )*];
    };
}
const NONE: u64 = 0;
requests! {
    VHOST_USER_GET_FEATURES = 1: 0 false None NONE true;
    VHOST_USER_SET_FEATURES = 2: 8 false None NONE false;
    VHOST_USER_SET_OWNER = 3: 0 false None NONE false;
    VHOST_USER_RESET_OWNER = 4: 0 false None NONE false;
    VHOST_USER_SET_MEM_TABLE = 5: 40 true OnePerRegion NONE false;
    VHOST_USER_SET_LOG_BASE = 6: 16 false One VHOST_USER_PROTOCOL_F_LOG_SHMFD true;
    VHOST_USER_SET_LOG_FD = 7: 0 false One VHOST_USER_PROTOCOL_F_LOG_SHMFD false;
    VHOST_USER_SET_VRING_NUM = 8: 8 false None NONE false;
    VHOST_USER_SET_VRING_ADDR = 9: 40 false None NONE false;
    VHOST_USER_SET_VRING_BASE = 10: 8 false None NONE false;
    VHOST_USER_GET_VRING_BASE = 11: 8 false None NONE true;
    VHOST_USER_SET_VRING_KICK = 12: 8 false OneUnlessFlagged NONE false;
    VHOST_USER_SET_VRING_CALL = 13: 8 false OneUnlessFlagged NONE false;
    VHOST_USER_SET_VRING_ERR = 14: 8 false OneUnlessFlagged NONE false;
    VHOST_USER_GET_PROTOCOL_FEATURES = 15: 0 false None NONE true;
    VHOST_USER_SET_PROTOCOL_FEATURES = 16: 8 false None NONE false;
    VHOST_USER_GET_QUEUE_NUM = 17: 0 false None VHOST_USER_PROTOCOL_F_MQ true;
    VHOST_USER_SET_VRING_ENABLE = 18: 8 false None NONE false;
    VHOST_USER_SEND_RARP = 19: 8 false None VHOST_USER_PROTOCOL_F_RARP false;
    VHOST_USER_NET_SET_MTU = 20: 8 false None VHOST_USER_PROTOCOL_F_MTU false;
    VHOST_USER_SET_BACKEND_REQ_FD = 21: 0 false One VHOST_USER_PROTOCOL_F_BACKEND_REQ false;
    VHOST_USER_IOTLB_MSG = 22: 32 false None NONE true;
    VHOST_USER_SET_VRING_ENDIAN = 23: 8 false None VHOST_USER_PROTOCOL_F_CROSS_ENDIAN false;
    VHOST_USER_GET_CONFIG = 24: 12 true None VHOST_USER_PROTOCOL_F_CONFIG true;
    VHOST_USER_SET_CONFIG = 25: 12 true None VHOST_USER_PROTOCOL_F_CONFIG false;
    VHOST_USER_CREATE_CRYPTO_SESSION = 26: 0 true None VHOST_USER_PROTOCOL_F_CRYPTO_SESSION true;
    VHOST_USER_CLOSE_CRYPTO_SESSION = 27: 8 false None VHOST_USER_PROTOCOL_F_CRYPTO_SESSION false;
    VHOST_USER_POSTCOPY_ADVISE = 28: 0 false None VHOST_USER_PROTOCOL_F_PAGEFAULT true;
    VHOST_USER_POSTCOPY_LISTEN = 29: 0 false None VHOST_USER_PROTOCOL_F_PAGEFAULT false;
    VHOST_USER_POSTCOPY_END = 30: 0 false None VHOST_USER_PROTOCOL_F_PAGEFAULT true;
    VHOST_USER_GET_INFLIGHT_FD = 31: 24 true None VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD true;
    VHOST_USER_SET_INFLIGHT_FD = 32: 24 true One VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD false;
    VHOST_USER_GPU_SET_SOCKET = 33: 0 false One NONE false;
    VHOST_USER_RESET_DEVICE = 34: 0 false None VHOST_USER_PROTOCOL_F_RESET_DEVICE false;
    VHOST_USER_VRING_KICK = 35: 8 false None VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS false;
    VHOST_USER_GET_MAX_MEM_SLOTS = 36: 0 false None VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS true;
    VHOST_USER_ADD_MEM_REG = 37: 40 false One VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS false;
    VHOST_USER_REM_MEM_REG = 38: 40 false Optional VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS false;
    VHOST_USER_SET_STATUS = 39: 8 false None VHOST_USER_PROTOCOL_F_STATUS false;
    VHOST_USER_GET_STATUS = 40: 0 false None VHOST_USER_PROTOCOL_F_STATUS true;
    VHOST_USER_GET_SHARED_OBJECT = 41: 16 false None VHOST_USER_PROTOCOL_F_SHARED_OBJECT true;
    VHOST_USER_SET_DEVICE_STATE_FD = 42: 8 false One VHOST_USER_PROTOCOL_F_DEVICE_STATE true;
    VHOST_USER_CHECK_DEVICE_STATE = 43: 0 false None VHOST_USER_PROTOCOL_F_DEVICE_STATE true;
    VHOST_USER_GET_SHMEM_CONFIG = 44: 0 false None VHOST_USER_PROTOCOL_F_SHMEM true;
}

/// The back end's request on its own channel that says "the configuration space has changed".
pub const VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: u32 = 2;

/// Length of one region in `SET_MEM_TABLE`.
pub const REGION_BYTES: usize = 32;

/// One region as a message describes it; nothing checks that it makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest address of the first byte.
    pub guest: u64,
    /// Length.
    pub size_bytes: u64,
    /// Address of the first byte in the front end ("user address").
    pub user: u64,
    /// Where the region begins in its file.
    pub file_offset_bytes: u64,
}

impl RegionDescription {
    /// The region's 32 bytes in a message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        words(&[self.guest, self.size_bytes, self.user, self.file_offset_bytes])
    }
}

/// The addresses of one ring as `SET_VRING_ADDR` carries them: user addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Which ring.
    pub index: u32,
    /// `VHOST_VRING_F_LOG` or 0.
    pub flags: u32,
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
    /// Guest address for the log.
    pub log: u64,
}

impl RingAddresses {
    /// The payload of `SET_VRING_ADDR`.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = halves(&[self.index, self.flags]);
        payload.extend(words(&[self.descriptors, self.used, self.available, self.log]));
        payload
    }
}

/// The payload of `SET_MEM_TABLE`.
#[must_use]
pub fn memory_table(regions: &[RegionDescription]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).expect("a test's table is short");
    let mut payload = halves(&[count, 0]);
    for region in regions {
        payload.extend(region.encode());
    }
    payload
}

/// The payload of `ADD_MEM_REG` and `REM_MEM_REG`: 64 bits of padding, then the region.
#[must_use]
pub fn single_region(region: &RegionDescription) -> Vec<u8> {
    let mut payload = words(&[0]);
    payload.extend(region.encode());
    payload
}

/// The payload of `GET_CONFIG` and `SET_CONFIG`; `data` is as long as the access.
#[must_use]
pub fn config_access(offset: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let size = u32::try_from(data.len()).expect("a test's configuration space is short");
    let mut payload = halves(&[offset, size, flags]);
    payload.extend(data);
    payload
}

/// The payload of the requests about one ring (`SET_VRING_NUM`, `_BASE`, `_ENABLE`,
/// `GET_VRING_BASE`).
#[must_use]
pub fn vring_state(index: u32, value: u32) -> Vec<u8> {
    halves(&[index, value])
}

/// A payload of 64-bit numbers.
#[must_use]
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// A payload of 32-bit numbers.
#[must_use]
pub fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// A message's header.
#[must_use]
pub fn header(request: u32, flags: u32, size_bytes: u32) -> Vec<u8> {
    halves(&[request, flags, size_bytes])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_its_numbers_without_gaps() {
        for (row, number) in TABLE.iter().zip(1..) {
            assert_eq!(row.request, number, "{}", row.name);
        }
    }

    #[test]
    fn regions_are_laid_out_as_the_text_says() {
        let region = RegionDescription { guest: 1, size_bytes: 2, user: 3, file_offset_bytes: 4 };
        assert_eq!(memory_table(&[region]).len(), 8 + REGION_BYTES);
        assert_eq!(single_region(&region)[8..], words(&[1, 2, 3, 4]));
    }
}
