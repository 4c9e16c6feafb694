//! The header before each frame (`struct virtio_net_hdr`), and the Ethernet header after it.
//!
//! Contract: [`Header::from_driver`] and [`Header::from_host`] take bytes that nobody else can
//! change any more (a private copy) and yield a header that is true of its frame: what it asks for
//! has been negotiated, every offset is inside the frame and behind the Ethernet header, and fields
//! that mean nothing are zero. What cannot be so is [`Malformed`], by a reason that has a counter.
//! Fields are little-endian: no legacy driver's byte order is offered.
//!
//! What it deliberately does not do: look into the frame beyond Ethernet. Whether `csum_start` is
//! where a TCP header starts, and whether the sum that comes out is right, is between the driver and
//! whoever receives the frame.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use common::virtqueue::VIRTIO_F_VERSION_1;

use crate::config::{
    Mac, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MRG_RXBUF, VlanId,
};

/// `struct virtio_net_hdr` with `num_buffers`.
pub(crate) const HEADER_BYTES: usize = 12;
/// The same without it.
pub(crate) const LEGACY_HEADER_BYTES: usize = 10;
/// Destination, source, type.
pub(crate) const ETHERNET_BYTES: usize = 14;
/// IEEE 802.1Q: type and control information, between source and type.
pub(crate) const VLAN_TAG_BYTES: usize = 4;

/// The longest frame: the largest packet that IP or an MTU can name, its Ethernet header, a tag.
pub(crate) const FRAME_BYTES_MAX: usize = 65_535 + ETHERNET_BYTES + VLAN_TAG_BYTES;

// VIRTIO 1.3, 5.1.6: flags and types of segmentation.
const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
const VIRTIO_NET_HDR_F_DATA_VALID: u8 = 2;
const VIRTIO_NET_HDR_GSO_NONE: u8 = 0;
const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
const VIRTIO_NET_HDR_GSO_UDP: u8 = 3;
const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
const VIRTIO_NET_HDR_GSO_UDP_L4: u8 = 5;
const VIRTIO_NET_HDR_GSO_ECN: u8 = 0x80;

/// EtherType of a frame that has a VLAN tag.
const ETH_P_8021Q: [u8; 2] = [0x81, 0x00];
/// Likewise, of a provider's (IEEE 802.1ad), within which there may be a customer's.
const ETH_P_8021AD: [u8; 2] = [0x88, 0xa8];

/// A checksum's own length.
const CHECKSUM_BYTES: usize = 2;

/// A TCP header without options, and where its checksum is.
const TCP: (usize, u16) = (20, 16);
/// A UDP header, and where its checksum is.
const UDP: (usize, u16) = (8, 6);

/// How long the header before a frame is for a driver that acknowledged `features`.
pub(crate) fn header_bytes(features: u64) -> usize {
    // VIRTIO 1.3, 5.1.6.1: a legacy driver has `num_buffers` only with VIRTIO_NET_F_MRG_RXBUF.
    if features & (VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF) != 0 {
        HEADER_BYTES
    } else {
        LEGACY_HEADER_BYTES
    }
}

/// The header of a driver whose headers have no `num_buffers`, as one that has.
pub(crate) fn widened(legacy: [u8; LEGACY_HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = legacy;
    [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, 0, 0]
}

/// Why a frame is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// The chain ends within the header.
    NoHeader,
    /// The frame ends within its Ethernet header.
    Runt,
    /// It is longer than any frame.
    Giant,
    /// Its header asks for what has not been negotiated.
    NotNegotiated,
    /// `gso_type` is none that the specification knows.
    GsoType,
    /// `gso_size` is 0 for a frame that is to be segmented.
    GsoSize,
    /// It is to be segmented without a checksum for the segments.
    GsoChecksum,
    /// It ends within the transport header that each segment repeats, or the checksum is not where
    /// that header has it.
    GsoHeader,
    /// A checksum starts, or ends, past the frame.
    ChecksumOutside,
    /// A checksum starts within the Ethernet header.
    ChecksumInEthernet,
}

/// How a frame is to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Segmentation {
    Tcp4,
    Tcp6,
    UdpFragments,
    UdpSegments,
}

/// The feature bits that stand for an offload, in one direction.
struct Permissions {
    csum: u64,
    tso4: u64,
    tso6: u64,
    ecn: u64,
    ufo: u64,
    uso: u64,
}

/// What a driver may leave to us.
const OF_DRIVER: Permissions = Permissions {
    csum: VIRTIO_NET_F_CSUM,
    tso4: VIRTIO_NET_F_HOST_TSO4,
    tso6: VIRTIO_NET_F_HOST_TSO6,
    ecn: VIRTIO_NET_F_HOST_ECN,
    ufo: VIRTIO_NET_F_HOST_UFO,
    uso: VIRTIO_NET_F_HOST_USO,
};

/// What we may leave to a driver.
// VIRTIO 1.3, 5.1.6.4.1: UDP_L4 is for a driver that has either of the USO features.
const OF_HOST: Permissions = Permissions {
    csum: VIRTIO_NET_F_GUEST_CSUM,
    tso4: VIRTIO_NET_F_GUEST_TSO4,
    tso6: VIRTIO_NET_F_GUEST_TSO6,
    ecn: VIRTIO_NET_F_GUEST_ECN,
    ufo: VIRTIO_NET_F_GUEST_UFO,
    uso: VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6,
};

/// A header that is true of its frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    /// The header of a frame of `frame_bytes` (the header not among them) that a driver sends which
    /// acknowledged `features`. Its `num_buffers` is zero.
    pub(crate) fn from_driver(
        bytes: [u8; HEADER_BYTES],
        frame_bytes: usize,
        features: u64,
    ) -> Result<Self, Malformed> {
        let mut header = Self::checked(bytes, frame_bytes, features, &OF_DRIVER)?;
        // VIRTIO 1.3, 5.1.6.2.2: The device MUST ignore flag bits that it does not recognize. The
        // other two are not the driver's to set (5.1.6.2.1).
        header.flags &= VIRTIO_NET_HDR_F_NEEDS_CSUM;
        Ok(header)
    }

    /// The header of a frame that a host hands to a driver for which these `features` are in force:
    /// those that it acknowledged, without the offloads that it has switched off. `num_buffers` is 1
    /// until it is set.
    pub(crate) fn from_host(
        bytes: [u8; HEADER_BYTES],
        frame_bytes: usize,
        features: u64,
    ) -> Result<Self, Malformed> {
        let mut header = Self::checked(bytes, frame_bytes, features, &OF_HOST)?;
        // VIRTIO 1.3, 5.1.6.4.1: without VIRTIO_NET_F_GUEST_CSUM the device MUST set flags to zero,
        // and without VIRTIO_NET_F_RSC_EXT MUST NOT set VIRTIO_NET_HDR_F_RSC_INFO.
        header.flags &= if features & VIRTIO_NET_F_GUEST_CSUM == 0 {
            0
        } else {
            VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID
        };
        header.num_buffers = 1;
        Ok(header)
    }

    fn checked(
        bytes: [u8; HEADER_BYTES],
        frame_bytes: usize,
        features: u64,
        permissions: &Permissions,
    ) -> Result<Self, Malformed> {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = bytes;
        if frame_bytes < ETHERNET_BYTES {
            return Err(Malformed::Runt);
        }
        if frame_bytes > FRAME_BYTES_MAX {
            return Err(Malformed::Giant);
        }
        // VIRTIO 1.3, 5.1.6.2.2: The device MUST NOT rely on hdr_len to be correct. It is a hint,
        // and a host takes none that is longer than the frame.
        let hdr_len = u16::from_le_bytes([h0, h1]);
        let hdr_len = hdr_len.min(u16::try_from(frame_bytes).unwrap_or(u16::MAX));
        let mut header = Self { flags, hdr_len, ..Self::default() };
        if flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            if features & permissions.csum == 0 {
                return Err(Malformed::NotNegotiated);
            }
            header.csum_start = u16::from_le_bytes([s0, s1]);
            header.csum_offset = u16::from_le_bytes([o0, o1]);
            header.check_checksum(frame_bytes)?;
        }
        // VIRTIO 1.3, 5.1.6.2.2: If VIRTIO_NET_HDR_F_NEEDS_CSUM is not set, the device MUST NOT use
        // csum_start and csum_offset: they stay zero.
        if let Some(kind) = segmentation(gso_type, features, permissions)? {
            header.gso_type = gso_type;
            header.gso_size = u16::from_le_bytes([g0, g1]);
            header.check_segmentation(kind, frame_bytes)?;
        }
        Ok(header)
    }

    /// The checksum is in the frame, and not in its Ethernet header: there, storing it would give
    /// the frame another source than the one that was looked at, or another VLAN.
    fn check_checksum(&self, frame_bytes: usize) -> Result<(), Malformed> {
        let start = usize::from(self.csum_start);
        let end = start.saturating_add(usize::from(self.csum_offset));
        if end.saturating_add(CHECKSUM_BYTES) > frame_bytes {
            return Err(Malformed::ChecksumOutside);
        }
        if start < ETHERNET_BYTES {
            return Err(Malformed::ChecksumInEthernet);
        }
        Ok(())
    }

    // VIRTIO 1.3, 5.1.6.2.1 and 5.1.6.4.1: If gso_type differs from VIRTIO_NET_HDR_GSO_NONE, then
    // VIRTIO_NET_HDR_F_NEEDS_CSUM MUST be set in flags, and gso_size to the desired MSS.
    fn check_segmentation(&self, kind: Segmentation, frame_bytes: usize) -> Result<(), Malformed> {
        if self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
            return Err(Malformed::GsoChecksum);
        }
        if self.gso_size == 0 {
            return Err(Malformed::GsoSize);
        }
        let (transport_bytes, checksum_at) = match kind {
            Segmentation::Tcp4 | Segmentation::Tcp6 => TCP,
            Segmentation::UdpFragments | Segmentation::UdpSegments => UDP,
        };
        let headers_bytes = usize::from(self.csum_start).saturating_add(transport_bytes);
        if self.csum_offset != checksum_at || headers_bytes > frame_bytes {
            return Err(Malformed::GsoHeader);
        }
        Ok(())
    }

    /// As a driver or a host reads it.
    pub(crate) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
    }

    /// Over how many chains the frame is spread, from 1.
    // VIRTIO 1.3, 5.1.6.4.1: the device MUST set num_buffers to the number of buffers that the
    // packet (including the header) is spread over; to 1 without VIRTIO_NET_F_MRG_RXBUF.
    pub(crate) fn set_num_buffers(&mut self, chains: u16) {
        self.num_buffers = chains;
    }

    /// Whether the frame is to be segmented.
    pub(crate) fn is_segmented(&self) -> bool {
        self.gso_type & !VIRTIO_NET_HDR_GSO_ECN != VIRTIO_NET_HDR_GSO_NONE
    }

    /// Whether a frame of `frame_bytes` with an Ethernet header of `ethernet_bytes` (its tag among
    /// them) may go to a driver that was told of `mtu`.
    // VIRTIO 1.3, 5.1.4.1: The device MUST NOT pass received packets that exceed mtu (plus low level
    // ethernet header length) size with gso_type NONE or ECN after VIRTIO_NET_F_MTU has been
    // negotiated.
    pub(crate) fn fits_mtu(&self, frame_bytes: usize, ethernet_bytes: usize, mtu: u16) -> bool {
        self.is_segmented() || frame_bytes <= usize::from(mtu).saturating_add(ethernet_bytes)
    }

    /// The header of this frame of `frame_bytes` once it has got a VLAN tag.
    pub(crate) fn tagged(mut self, frame_bytes: usize) -> Result<Self, Malformed> {
        const TAG: u16 = VLAN_TAG_BYTES as u16;
        if frame_bytes.saturating_add(VLAN_TAG_BYTES) > FRAME_BYTES_MAX {
            return Err(Malformed::Giant);
        }
        if self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let moved = self.csum_start.checked_add(TAG);
            self.csum_start = moved.ok_or(Malformed::ChecksumOutside)?;
        }
        if self.hdr_len != 0 {
            self.hdr_len = self.hdr_len.saturating_add(TAG);
        }
        Ok(self)
    }

    /// The header of this frame, which has a VLAN tag, without it.
    pub(crate) fn untagged(mut self) -> Result<Self, Malformed> {
        const TAG: u16 = VLAN_TAG_BYTES as u16;
        if self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let moved = self.csum_start.checked_sub(TAG);
            let behind = moved.filter(|start| usize::from(*start) >= ETHERNET_BYTES);
            self.csum_start = behind.ok_or(Malformed::ChecksumInEthernet)?;
        }
        self.hdr_len = self.hdr_len.saturating_sub(TAG);
        Ok(self)
    }
}

/// What `gso_type` asks for, if it may.
fn segmentation(
    gso_type: u8,
    features: u64,
    permissions: &Permissions,
) -> Result<Option<Segmentation>, Malformed> {
    let has_ecn = gso_type & VIRTIO_NET_HDR_GSO_ECN != 0;
    let (kind, feature) = match (gso_type & !VIRTIO_NET_HDR_GSO_ECN, has_ecn) {
        // ECN by itself is a frame like any other to 5.1.4.1; a host takes it for an unknown type.
        (VIRTIO_NET_HDR_GSO_NONE, _) => return Ok(None),
        (VIRTIO_NET_HDR_GSO_TCPV4, _) => (Segmentation::Tcp4, permissions.tso4),
        (VIRTIO_NET_HDR_GSO_TCPV6, _) => (Segmentation::Tcp6, permissions.tso6),
        (VIRTIO_NET_HDR_GSO_UDP, false) => (Segmentation::UdpFragments, permissions.ufo),
        (VIRTIO_NET_HDR_GSO_UDP_L4, false) => (Segmentation::UdpSegments, permissions.uso),
        _ => return Err(Malformed::GsoType),
    };
    // VIRTIO 1.3, 5.1.6.2.1 (the driver) and 5.1.6.4.1 (the device): MUST NOT set gso_type to what
    // has not been negotiated; nor does the host understand it then.
    let may_ecn = !has_ecn || features & permissions.ecn != 0;
    if features & feature == 0 || !may_ecn { Err(Malformed::NotNegotiated) } else { Ok(Some(kind)) }
}

/// A frame's addresses, and its VLAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    /// The VLAN that its tag names; `Some(0)` for a tag that has a priority only, and `None` where
    /// there is no tag, it is a provider's, or the bytes end before its end.
    pub(crate) vlan: Option<VlanId>,
    /// Whether it has a tag, of either kind, or begins to have one.
    pub(crate) has_tag: bool,
}

impl Head {
    /// Reads the first bytes of a frame: [`ETHERNET_BYTES`], and [`VLAN_TAG_BYTES`] more if the VLAN
    /// is of interest.
    pub(crate) fn parse(frame: &[u8]) -> Result<Self, Malformed> {
        let (ethernet, rest) = frame.split_first_chunk().ok_or(Malformed::Runt)?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, type_0, type_1]: [u8; ETHERNET_BYTES] =
            *ethernet;
        let ether_type = [type_0, type_1];
        let control = rest.first_chunk().filter(|_| ether_type == ETH_P_8021Q);
        Ok(Self {
            destination: Mac::new([d0, d1, d2, d3, d4, d5]),
            source: Mac::new([s0, s1, s2, s3, s4, s5]),
            vlan: control.map(|control| VlanId::of_tag(*control)),
            has_tag: [ETH_P_8021Q, ETH_P_8021AD].contains(&ether_type),
        })
    }

    /// How long the Ethernet header is.
    pub(crate) fn ethernet_bytes(&self) -> usize {
        if self.vlan.is_some() { ETHERNET_BYTES + VLAN_TAG_BYTES } else { ETHERNET_BYTES }
    }
}

/// The Ethernet header with a tag of this VLAN, and of priority 0.
pub(crate) fn insert_vlan_tag(
    ethernet: [u8; ETHERNET_BYTES],
    vlan: VlanId,
) -> [u8; ETHERNET_BYTES + VLAN_TAG_BYTES] {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = ethernet;
    let ([q0, q1], [c0, c1]) = (ETH_P_8021Q, vlan.number().to_be_bytes());
    [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, q0, q1, c0, c1, t0, t1]
}

/// The Ethernet header without its tag; that it has one, [`Head::vlan`] says.
pub(crate) fn strip_vlan_tag(
    tagged: [u8; ETHERNET_BYTES + VLAN_TAG_BYTES],
) -> [u8; ETHERNET_BYTES] {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, _, _, _, _, t0, t1] = tagged;
    [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    const ALL_OF_DRIVER: u64 = VIRTIO_NET_F_CSUM
        | VIRTIO_NET_F_HOST_TSO4
        | VIRTIO_NET_F_HOST_TSO6
        | VIRTIO_NET_F_HOST_ECN
        | VIRTIO_NET_F_HOST_UFO
        | VIRTIO_NET_F_HOST_USO;
    const ALL_OF_HOST: u64 = VIRTIO_NET_F_GUEST_CSUM
        | VIRTIO_NET_F_GUEST_TSO4
        | VIRTIO_NET_F_GUEST_TSO6
        | VIRTIO_NET_F_GUEST_ECN
        | VIRTIO_NET_F_GUEST_UFO
        | VIRTIO_NET_F_GUEST_USO4;

    /// A header, field by field.
    #[derive(Clone, Copy)]
    struct Fields {
        flags: u8,
        gso_type: u8,
        hdr_len: u16,
        gso_size: u16,
        csum_start: u16,
        csum_offset: u16,
    }

    impl Fields {
        fn bytes(self) -> [u8; HEADER_BYTES] {
            let mut bytes = [0; HEADER_BYTES];
            bytes[0] = self.flags;
            bytes[1] = self.gso_type;
            bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
            bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
            bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
            bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
            bytes
        }
    }

    const PLAIN: Fields =
        Fields { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0 };
    const SUMMED: Fields = Fields { flags: 1, csum_start: 34, csum_offset: 16, ..PLAIN };
    const TSO4: Fields = Fields { gso_type: 1, gso_size: 1448, hdr_len: 66, ..SUMMED };

    /// What becomes of a frame of 3000 bytes that a driver sends which has negotiated everything.
    fn sent(fields: Fields) -> Result<Header, Malformed> {
        Header::from_driver(fields.bytes(), 3000, ALL_OF_DRIVER)
    }

    #[test]
    fn each_malformed_header_is_refused_for_its_own_reason() {
        for (fields, why) in [
            (Fields { gso_type: 2, ..TSO4 }, Malformed::GsoType),
            (Fields { gso_type: 6, ..TSO4 }, Malformed::GsoType),
            (Fields { gso_type: 0x7f, ..TSO4 }, Malformed::GsoType),
            (Fields { gso_type: 0x83, ..TSO4 }, Malformed::GsoType),
            (Fields { gso_type: 0x85, ..TSO4 }, Malformed::GsoType),
            (Fields { gso_size: 0, ..TSO4 }, Malformed::GsoSize),
            (Fields { flags: 0, ..TSO4 }, Malformed::GsoChecksum),
            (Fields { flags: 2, ..TSO4 }, Malformed::GsoChecksum),
            (Fields { csum_offset: 6, ..TSO4 }, Malformed::GsoHeader),
            (Fields { csum_start: 2981, ..TSO4 }, Malformed::GsoHeader),
            (Fields { gso_type: 3, ..TSO4 }, Malformed::GsoHeader),
            (Fields { gso_type: 5, ..TSO4 }, Malformed::GsoHeader),
            (Fields { csum_start: 2983, ..SUMMED }, Malformed::ChecksumOutside),
            (Fields { csum_offset: 2965, ..SUMMED }, Malformed::ChecksumOutside),
            (
                Fields { csum_start: 0xffff, csum_offset: 0xffff, ..SUMMED },
                Malformed::ChecksumOutside,
            ),
            (Fields { csum_start: 13, ..SUMMED }, Malformed::ChecksumInEthernet),
            (Fields { csum_start: 0, csum_offset: 6, ..SUMMED }, Malformed::ChecksumInEthernet),
        ] {
            assert_eq!(sent(fields), Err(why), "{:?}", fields.bytes());
        }
    }

    #[test]
    fn headers_at_the_edge_are_taken() {
        for fields in [
            PLAIN,
            SUMMED,
            TSO4,
            Fields { gso_type: 0x81, ..TSO4 },
            Fields { gso_type: 4, ..TSO4 },
            Fields { gso_type: 0x84, ..TSO4 },
            Fields { gso_type: 3, csum_offset: 6, ..TSO4 },
            Fields { gso_type: 5, csum_offset: 6, ..TSO4 },
            Fields { csum_start: 2982, ..SUMMED },
            Fields { csum_start: 14, ..SUMMED },
            Fields { csum_start: 2980, ..TSO4 },
            Fields { gso_size: 1, ..TSO4 },
        ] {
            assert_eq!(sent(fields).map(|header| header.bytes()), Ok(fields.bytes()));
        }
    }

    #[test]
    fn runts_and_giants_are_no_frames() {
        let plain = |frame_bytes| Header::from_driver(PLAIN.bytes(), frame_bytes, 0).err();
        for (frame_bytes, why) in [
            (0, Some(Malformed::Runt)),
            (13, Some(Malformed::Runt)),
            (14, None),
            (65_553, None),
            (65_554, Some(Malformed::Giant)),
            (usize::MAX, Some(Malformed::Giant)),
        ] {
            assert_eq!(plain(frame_bytes), why, "{frame_bytes}");
        }
    }

    #[test]
    fn each_offload_needs_its_feature() {
        let udp = Fields { csum_offset: 6, ..TSO4 };
        for (fields, driver, host) in [
            (SUMMED, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
            (TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4),
            (Fields { gso_type: 4, ..TSO4 }, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6),
            (Fields { gso_type: 0x81, ..TSO4 }, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
            (Fields { gso_type: 3, ..udp }, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO),
            (Fields { gso_type: 5, ..udp }, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4),
        ] {
            let bytes = fields.bytes();
            let refused = Err(Malformed::NotNegotiated);
            assert_eq!(Header::from_driver(bytes, 3000, ALL_OF_DRIVER & !driver), refused);
            assert_eq!(Header::from_host(bytes, 3000, ALL_OF_HOST & !host), refused);
            assert!(Header::from_driver(bytes, 3000, ALL_OF_DRIVER).is_ok());
            assert!(Header::from_host(bytes, 3000, ALL_OF_HOST).is_ok());
            // The two directions are negotiated apart.
            assert_eq!(Header::from_driver(bytes, 3000, ALL_OF_HOST), refused);
            assert_eq!(Header::from_host(bytes, 3000, ALL_OF_DRIVER), refused);
        }
        let uso = Fields { gso_type: 5, ..udp }.bytes();
        let uso6 = VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_USO6;
        assert!(Header::from_host(uso, 3000, uso6).is_ok());
    }

    #[test]
    fn fields_that_mean_nothing_are_zero() {
        let noise = Fields {
            flags: 0xfe,
            gso_type: 0x80,
            hdr_len: 60,
            gso_size: 7,
            csum_start: 9000,
            csum_offset: 9000,
        };
        let mut bytes = noise.bytes();
        bytes[10..].copy_from_slice(&[5, 6]);
        let header = Header::from_driver(bytes, 3000, ALL_OF_DRIVER).unwrap();
        assert_eq!(header.bytes(), Fields { hdr_len: 60, ..PLAIN }.bytes());
        let received = Header::from_host(bytes, 3000, ALL_OF_HOST).unwrap();
        assert_eq!(received.bytes()[..10], Fields { flags: 2, hdr_len: 60, ..PLAIN }.bytes()[..10]);
        assert_eq!(received.bytes()[10..], [1, 0], "num_buffers");
        let without = Header::from_host(bytes, 3000, 0).unwrap();
        assert_eq!(without.bytes()[0], 0, "no flags without GUEST_CSUM");
    }

    #[test]
    fn header_length_is_brought_within_the_frame() {
        for (hdr_len, frame_bytes, becomes) in
            [(66, 3000, 66), (3001, 3000, 3000), (u16::MAX, 14, 14), (u16::MAX, 65_553, u16::MAX)]
        {
            let bytes = Fields { hdr_len, ..PLAIN }.bytes();
            let header = Header::from_driver(bytes, frame_bytes, 0).unwrap();
            assert_eq!(header.hdr_len, becomes);
        }
    }

    #[test]
    fn mtu_is_for_frames_that_are_not_segmented() {
        let plain = sent(PLAIN).unwrap();
        assert!(plain.fits_mtu(1514, 14, 1500) && plain.fits_mtu(1518, 18, 1500));
        assert!(!plain.fits_mtu(1515, 14, 1500));
        assert!(sent(TSO4).unwrap().fits_mtu(3000, 14, 1500));
        assert!(!sent(Fields { gso_type: 0x80, ..PLAIN }).unwrap().fits_mtu(3000, 14, 1500));
    }

    #[test]
    fn legacy_header_lacks_the_number_of_buffers() {
        let header = sent(TSO4).unwrap();
        let legacy = *header.bytes().first_chunk().unwrap();
        assert_eq!(widened(legacy), header.bytes());
        assert_eq!(header_bytes(0), 10);
        assert_eq!(header_bytes(VIRTIO_NET_F_MRG_RXBUF), 12);
        assert_eq!(header_bytes(VIRTIO_F_VERSION_1), 12);
    }

    #[test]
    fn number_of_buffers_is_little_endian() {
        let mut header = Header::default();
        header.set_num_buffers(0x0201);
        assert_eq!(header.bytes()[10..], [1, 2]);
    }

    #[test]
    fn tag_moves_what_is_behind_it() {
        let ethernet = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0x08, 0x00];
        let vlan = VlanId::new(0x123).unwrap();
        let tagged = insert_vlan_tag(ethernet, vlan);
        assert_eq!(tagged[..12], ethernet[..12]);
        assert_eq!(tagged[12..], [0x81, 0x00, 0x01, 0x23, 0x08, 0x00]);
        assert_eq!(strip_vlan_tag(tagged), ethernet);
        let header = sent(TSO4).unwrap();
        let moved = header.tagged(3000).unwrap();
        assert_eq!((moved.csum_start, moved.hdr_len), (38, 70));
        assert_eq!(moved.untagged(), Ok(header));
        // What says nothing goes on saying nothing.
        assert_eq!(sent(PLAIN).unwrap().tagged(3000), sent(PLAIN));
        assert_eq!(sent(PLAIN).unwrap().untagged(), sent(PLAIN));
    }

    #[test]
    fn frame_without_room_for_a_tag_or_a_checksum_before_its_end_is_refused() {
        assert!(Header::default().tagged(FRAME_BYTES_MAX - 4).is_ok());
        assert_eq!(Header::default().tagged(FRAME_BYTES_MAX - 3), Err(Malformed::Giant));
        let start = |csum_start| Fields { csum_start, csum_offset: 0, ..SUMMED }.bytes();
        let late = Header::from_driver(start(65_532), 65_549, ALL_OF_DRIVER).unwrap();
        assert_eq!(late.tagged(65_549), Err(Malformed::ChecksumOutside));
        for (csum_start, is_behind) in [(17, false), (18, true)] {
            let header = Header::from_host(start(csum_start), 3000, ALL_OF_HOST).unwrap();
            assert_eq!(header.untagged().is_ok(), is_behind);
        }
    }

    #[test]
    fn head_has_the_addresses_and_the_vlan() {
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x81, 0x00, 0xe1, 0x23, 0x08, 0x00]);
        let head = Head::parse(&frame).unwrap();
        assert!(head.destination.is_broadcast());
        assert_eq!(head.source, "52:54:00:12:34:56".parse().unwrap());
        assert_eq!(head.vlan.map(VlanId::number), Some(0x123));
        assert_eq!(head.ethernet_bytes(), 18);
        assert_eq!(Head::parse(&frame[..17]).unwrap().vlan.map(VlanId::number), Some(0x123));
        assert_eq!(Head::parse(&frame[..15]).unwrap().vlan, None, "a tag that is cut off");
        frame[12] = 0x08;
        assert_eq!(Head::parse(&frame).unwrap().vlan, None);
        assert_eq!(Head::parse(&frame).unwrap().ethernet_bytes(), 14);
        assert_eq!(Head::parse(&frame[..13]), Err(Malformed::Runt));
    }

    fn frame_lengths() -> impl proptest::strategy::Strategy<Value = usize> {
        proptest::prop_oneof![0usize..100, 0usize..70_000, any::<usize>()]
    }

    /// What is accepted may go to a host, whatever it was made of.
    fn holds(header: &Header, frame_bytes: usize, features: u64, may: &Permissions) -> bool {
        let checksum = header.flags & 1 != 0;
        let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
        let checksum_holds = if checksum {
            features & may.csum != 0 && start >= 14 && start + offset + 2 <= frame_bytes
        } else {
            start == 0 && offset == 0
        };
        let feature = match header.gso_type & 0x7f {
            0 => u64::MAX,
            1 => may.tso4,
            4 => may.tso6,
            3 => may.ufo,
            5 => may.uso,
            _ => 0,
        };
        let segments_hold = if header.gso_type == 0 {
            header.gso_size == 0
        } else {
            header.gso_size != 0 && checksum && features & feature != 0
        };
        checksum_holds
            && segments_hold
            && (header.gso_type & 0x80 == 0 || features & may.ecn != 0)
            && (14..=FRAME_BYTES_MAX).contains(&frame_bytes)
            && usize::from(header.hdr_len) <= frame_bytes
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_true_of_its_frame(
            mut bytes in any::<[u8; HEADER_BYTES]>(),
            frame_bytes in frame_lengths(),
            features in any::<u64>(),
            is_likely in any::<bool>(),
            at in 0u16..200,
        ) {
            if is_likely {
                // Most random headers fall at the first hurdle.
                (bytes[0], bytes[1]) = (bytes[0] | 1, [0, 1, 3, 4, 5, 0x81][usize::from(bytes[1] % 6)]);
                bytes[6..8].copy_from_slice(&at.to_le_bytes());
                (bytes[8], bytes[9]) = (if bytes[9] % 2 == 0 { 16 } else { 6 }, 0);
            }
            if let Ok(header) = Header::from_driver(bytes, frame_bytes, features) {
                prop_assert!(holds(&header, frame_bytes, features, &OF_DRIVER), "{header:?}");
                prop_assert_eq!(header.flags & !1, 0);
                prop_assert_eq!(header.num_buffers, 0);
                prop_assert_eq!(Header::from_driver(header.bytes(), frame_bytes, features), Ok(header));
                if let Ok(tagged) = header.tagged(frame_bytes) {
                    prop_assert!(holds(&tagged, frame_bytes + 4, features, &OF_DRIVER), "{tagged:?}");
                }
            }
            if let Ok(header) = Header::from_host(bytes, frame_bytes, features) {
                prop_assert!(holds(&header, frame_bytes, features, &OF_HOST), "{header:?}");
                prop_assert_eq!(header.flags & !3, 0);
                if frame_bytes >= 18 && let Ok(bare) = header.untagged() {
                    prop_assert!(holds(&bare, frame_bytes - 4, features, &OF_HOST), "{bare:?}");
                }
            }
        }

        #[test]
        fn no_frame_is_too_odd_to_look_at(frame in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(Head::parse(&frame).is_ok(), frame.len() >= 14);
        }
    }
}
