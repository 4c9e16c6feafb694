//! What a front end may ask for: one row per request.
//!
//! Requests of features that are never offered have rows too, so that they are refused by what they are and not as
//! unknown, and the stream stays in step. Sizes and numbers are those of the vhost-user text ("Front-end message
//! types", "Payload"); where front ends in use differ from it, the row says so.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fmt;
use std::ops::RangeInclusive;

use FdCount::{Exactly, OnePerRegion, UnlessNoFd, UpTo};
use Layout::{
    Config, Empty, Inflight, MemoryRegion, MemoryTable, U64, Unparsed, VringAddress, VringFd,
    VringState,
};
use ProtocolFeatures as Features;

use super::ProtocolFeatures;
use super::message::MAX_PAYLOAD_BYTES;

/// Regions in one `SET_MEM_TABLE`. The text draws eight; the front ends that are built on the `vhost` package send up
/// to 32, as Cloud Hypervisor does for a guest with hot-pluggable memory.
pub const MAX_TABLE_REGIONS: usize = 32;

/// Descriptors of one message: those of a full memory table; no other request has more than one.
pub const MAX_FDS: usize = MAX_TABLE_REGIONS;

/// What is known of a request before its session is.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The request.
    pub request: Request,
    /// How its payload is laid out.
    pub payload: Layout,
    /// The descriptors that come with it.
    pub fds: FdCount,
    /// What must have been negotiated for it to be legal.
    pub feature: Option<Feature>,
    /// What the front end waits for.
    pub answer: Answer,
}

/// How a payload is laid out, which gives its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// No payload.
    Empty,
    /// A number of 64 bits.
    U64,
    /// Index and number of a vring.
    VringState,
    /// A vring's addresses.
    VringAddress,
    /// A vring's index and whether a descriptor is missing on purpose.
    VringFd,
    /// Several memory regions.
    MemoryTable,
    /// One memory region.
    MemoryRegion,
    /// A part of the configuration space.
    Config,
    /// Where requests in flight are recorded.
    Inflight,
    /// The layout of a feature that is never offered: from one size in bytes to another, and not looked into.
    Unparsed(usize, usize),
}

impl Layout {
    /// Sizes in bytes that a payload of this layout may have, as far as they do not depend on its contents.
    pub fn sizes(self) -> RangeInclusive<usize> {
        match self {
            Self::Empty => 0..=0,
            Self::U64 | Self::VringState | Self::VringFd => 8..=8,
            Self::VringAddress | Self::MemoryRegion => 40..=40,
            // The text draws an array of fixed length, and User-Mode Linux sends more than it fills.
            Self::MemoryTable => 8..=MAX_PAYLOAD_BYTES,
            Self::Config => 12..=MAX_PAYLOAD_BYTES,
            // The fields are 20 bytes; a C structure of them that is not packed is 24.
            Self::Inflight => 20..=24,
            Self::Unparsed(min, max) => min..=max,
        }
    }
}

/// How many descriptors come with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdCount {
    /// This many.
    Exactly(usize),
    /// At most this many.
    UpTo(usize),
    /// One for each memory region.
    OnePerRegion,
    /// One, unless the payload says that there is none.
    UnlessNoFd,
}

/// What a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// A protocol feature.
    Protocol(ProtocolFeatures),
    /// A virtio feature bit, by its number.
    Virtio(u32),
    /// A device of type GPU, which has messages of its own.
    Gpu,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol(features) => {
                write!(f, "protocol feature bit {}", features.bits().trailing_zeros())
            }
            Self::Virtio(bit) => write!(f, "feature bit {bit}"),
            Self::Gpu => f.write_str("a vhost-user-gpu device"),
        }
    }
}

/// What the front end waits for after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Success or failure, and only if the message asks for it (`REPLY_ACK`).
    Ack,
    /// A reply of the request's own kind, always.
    Value,
}

impl Row {
    /// Whether the request is legal in a session with these features: the protocol's, and virtio's as a bit mask.
    pub fn is_permitted(&self, protocol: ProtocolFeatures, virtio: u64) -> bool {
        match self.feature {
            None => true,
            Some(Feature::Protocol(needed)) => protocol.contains(needed),
            Some(Feature::Virtio(bit)) => {
                virtio.checked_shr(bit).is_some_and(|features| features & 1 == 1)
            }
            Some(Feature::Gpu) => false,
        }
    }
}

/// Defines `Request` and its rows from one list.
macro_rules! requests {
    ($($id:literal $name:ident $spec:literal $layout:expr, $fds:expr, $feature:expr, $answer:ident;)*) => {
        /// A request of the front end, named as in `VHOST_USER_…` (and displayed so).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Request {
            $(#[doc = concat!("`VHOST_USER_", $spec, "`")] $name = $id,)*
        }

        impl Request {
            /// The request with this number, if there is one.
            pub(super) fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for Request {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => concat!("VHOST_USER_", $spec),)*
                })
            }
        }

        /// What is known of a request.
        pub fn row(request: Request) -> Row {
            match request {
                $(Request::$name => Row {
                    request,
                    payload: $layout,
                    fds: $fds,
                    feature: $feature,
                    answer: Answer::$answer,
                },)*
            }
        }
    };
}

/// A request that came with a number which the table does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown request {0}")]
pub struct UnknownRequest(pub u32);

impl TryFrom<u32> for Request {
    type Error = UnknownRequest;

    fn try_from(id: u32) -> Result<Self, UnknownRequest> {
        Self::from_id(id).ok_or(UnknownRequest(id))
    }
}

impl From<Request> for u32 {
    fn from(request: Request) -> u32 {
        request as u32
    }
}

const NO_FD: FdCount = Exactly(0);
const FD: FdCount = Exactly(1);

const fn needs(feature: ProtocolFeatures) -> Option<Feature> {
    Some(Feature::Protocol(feature))
}

/// `VHOST_F_LOG_ALL`: the front end wants dirty pages logged.
const LOG_ALL: Option<Feature> = Some(Feature::Virtio(26));
/// `VIRTIO_F_ACCESS_PLATFORM`, `VIRTIO_F_IOMMU_PLATFORM` in the vhost-user text.
const ACCESS_PLATFORM: Option<Feature> = Some(Feature::Virtio(33));

// Columns: number, request, its name in the text; payload, descriptors, feature, answer.
// Where the text asks for feature bit 30 the row does not: GET_ and SET_PROTOCOL_FEATURES must work before SET_FEATURES
// has acknowledged it, and QEMU's network device sends SET_VRING_ENABLE before that as well.
#[rustfmt::skip]
requests! {
     1 GetFeatures          "GET_FEATURES"           Empty,         NO_FD,        None,                                Value;
     2 SetFeatures          "SET_FEATURES"           U64,           NO_FD,        None,                                Ack;
     3 SetOwner             "SET_OWNER"              Empty,         NO_FD,        None,                                Ack;
     4 ResetOwner           "RESET_OWNER"            Empty,         NO_FD,        None,                                Ack;
     5 SetMemTable          "SET_MEM_TABLE"          MemoryTable,   OnePerRegion, None,                                Ack;
     // Without the feature the log is an address in the front end: nothing that another process could use.
     6 SetLogBase           "SET_LOG_BASE"           Unparsed(8, 16), UpTo(1),    needs(Features::LOG_SHMFD),          Value;
     7 SetLogFd             "SET_LOG_FD"             Unparsed(0, 8), UpTo(1),     LOG_ALL,                             Ack;
     8 SetVringNum          "SET_VRING_NUM"          VringState,    NO_FD,        None,                                Ack;
     9 SetVringAddr         "SET_VRING_ADDR"         VringAddress,  NO_FD,        None,                                Ack;
    10 SetVringBase         "SET_VRING_BASE"         VringState,    NO_FD,        None,                                Ack;
    11 GetVringBase         "GET_VRING_BASE"         VringState,    NO_FD,        None,                                Value;
    12 SetVringKick         "SET_VRING_KICK"         VringFd,       UnlessNoFd,   None,                                Ack;
    13 SetVringCall         "SET_VRING_CALL"         VringFd,       UnlessNoFd,   None,                                Ack;
    14 SetVringErr          "SET_VRING_ERR"          VringFd,       UnlessNoFd,   None,                                Ack;
    15 GetProtocolFeatures  "GET_PROTOCOL_FEATURES"  Empty,         NO_FD,        None,                                Value;
    16 SetProtocolFeatures  "SET_PROTOCOL_FEATURES"  U64,           NO_FD,        None,                                Ack;
    17 GetQueueNum          "GET_QUEUE_NUM"          Empty,         NO_FD,        needs(Features::MQ),                 Value;
    18 SetVringEnable       "SET_VRING_ENABLE"       VringState,    NO_FD,        None,                                Ack;
    19 SendRarp             "SEND_RARP"              U64,           NO_FD,        needs(Features::RARP),               Ack;
    20 NetSetMtu            "NET_SET_MTU"            U64,           NO_FD,        needs(Features::MTU),                Ack;
    21 SetBackendReqFd      "SET_BACKEND_REQ_FD"     Empty,         FD,           needs(Features::BACKEND_REQ),        Ack;
    22 IotlbMsg             "IOTLB_MSG"              Unparsed(26, 32), NO_FD,     ACCESS_PLATFORM,                     Value;
    23 SetVringEndian       "SET_VRING_ENDIAN"       VringState,    NO_FD,        needs(Features::CROSS_ENDIAN),       Ack;
    24 GetConfig            "GET_CONFIG"             Config,        NO_FD,        needs(Features::CONFIG),             Value;
    25 SetConfig            "SET_CONFIG"             Config,        NO_FD,        needs(Features::CONFIG),             Ack;
    26 CreateCryptoSession  "CREATE_CRYPTO_SESSION"  Unparsed(0, MAX_PAYLOAD_BYTES), NO_FD, needs(Features::CRYPTO_SESSION), Value;
    27 CloseCryptoSession   "CLOSE_CRYPTO_SESSION"   U64,           NO_FD,        needs(Features::CRYPTO_SESSION),     Ack;
    28 PostcopyAdvise       "POSTCOPY_ADVISE"        Empty,         NO_FD,        needs(Features::PAGEFAULT),          Value;
    29 PostcopyListen       "POSTCOPY_LISTEN"        Empty,         NO_FD,        needs(Features::PAGEFAULT),          Ack;
    30 PostcopyEnd          "POSTCOPY_END"           Empty,         NO_FD,        needs(Features::PAGEFAULT),          Value;
    31 GetInflightFd        "GET_INFLIGHT_FD"        Inflight,      NO_FD,        needs(Features::INFLIGHT_SHMFD),     Value;
    32 SetInflightFd        "SET_INFLIGHT_FD"        Inflight,      FD,           needs(Features::INFLIGHT_SHMFD),     Ack;
    33 GpuSetSocket         "GPU_SET_SOCKET"         Empty,         FD,           Some(Feature::Gpu),                  Ack;
    34 ResetDevice          "RESET_DEVICE"           Empty,         NO_FD,        needs(Features::RESET_DEVICE),       Ack;
    35 VringKick            "VRING_KICK"             VringState,    NO_FD,        needs(Features::INBAND_NOTIFICATIONS), Ack;
    36 GetMaxMemSlots       "GET_MAX_MEM_SLOTS"      Empty,         NO_FD,        needs(Features::CONFIGURE_MEM_SLOTS), Value;
    37 AddMemReg            "ADD_MEM_REG"            MemoryRegion,  FD,           needs(Features::CONFIGURE_MEM_SLOTS), Ack;
    // "For compatibility with existing incorrect implementations, the back-end MAY accept messages with one file
    // descriptor": libblkio's driver sends one.
    38 RemMemReg            "REM_MEM_REG"            MemoryRegion,  UpTo(1),      needs(Features::CONFIGURE_MEM_SLOTS), Ack;
    39 SetStatus            "SET_STATUS"             U64,           NO_FD,        needs(Features::STATUS),             Ack;
    40 GetStatus            "GET_STATUS"             Empty,         NO_FD,        needs(Features::STATUS),             Value;
    41 GetSharedObject      "GET_SHARED_OBJECT"      Unparsed(16, 16), NO_FD,     needs(Features::SHARED_OBJECT),      Value;
    42 SetDeviceStateFd     "SET_DEVICE_STATE_FD"    Unparsed(8, 8), FD,          needs(Features::DEVICE_STATE),       Value;
    43 CheckDeviceState     "CHECK_DEVICE_STATE"     Empty,         NO_FD,        needs(Features::DEVICE_STATE),       Value;
    44 GetShmemConfig       "GET_SHMEM_CONFIG"       Empty,         NO_FD,        needs(Features::SHMEM),              Value;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_the_text_has_its_row() {
        for id in 1..=44 {
            let request =
                Request::from_id(id).unwrap_or_else(|| unreachable!("request {id} has a row"));
            assert_eq!(u32::from(request), id);
            assert_eq!(row(request).request, request);
        }
        for id in [0, 45, u32::MAX] {
            assert_eq!(Request::try_from(id), Err(UnknownRequest(id)));
        }
        assert_eq!(Request::SetBackendReqFd.to_string(), "VHOST_USER_SET_BACKEND_REQ_FD");
    }

    #[test]
    fn requests_that_the_text_says_have_replies_have_one() {
        let values: Vec<u32> = (1..=44)
            .filter_map(Request::from_id)
            .filter(|&r| row(r).answer == Answer::Value)
            .map(u32::from)
            .collect();
        assert_eq!(values, [1, 6, 11, 15, 17, 22, 24, 26, 28, 30, 31, 36, 40, 41, 42, 43, 44]);
    }

    #[test]
    fn requests_are_permitted_by_their_feature() {
        let all = ProtocolFeatures::from_bits(u64::MAX);
        let none = ProtocolFeatures::empty();
        assert!(row(Request::SetVringEnable).is_permitted(none, 0));
        assert!(!row(Request::GetConfig).is_permitted(none, u64::MAX));
        assert!(row(Request::GetConfig).is_permitted(ProtocolFeatures::CONFIG, 0));
        assert!(!row(Request::IotlbMsg).is_permitted(all, !(1 << 33)));
        assert!(row(Request::IotlbMsg).is_permitted(none, 1 << 33));
        assert!(!row(Request::GpuSetSocket).is_permitted(all, u64::MAX));
    }

    #[test]
    fn no_row_exceeds_the_limits_of_a_message() {
        for row in (1..=44).filter_map(Request::from_id).map(row) {
            assert!(*row.payload.sizes().end() <= MAX_PAYLOAD_BYTES, "{}", row.request);
            assert!(
                !matches!(row.fds, Exactly(fds) | UpTo(fds) if fds > MAX_FDS),
                "{}",
                row.request
            );
        }
    }
}
