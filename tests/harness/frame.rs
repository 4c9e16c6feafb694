//! An Ethernet frame taken apart, as far as tests judge frames: tags, addresses, lengths, and whether its checksums are right.
//!
//! Contract: [`Frame::packet`] says what a frame is or where it is cut off or contradicts itself; it never guesses. A fragment
//! has no transport header that could be judged, and says so by having none.
//!
//! Deliberately absent: whatever no test asks about, such as options, extension headers' contents and other protocols.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

const VLAN: u16 = 0x8100;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Protocol numbers (IANA, "Protocol Numbers").
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// IPv6's extension headers that a length of their own says how to skip: hop-by-hop, routing, destination.
const SKIPPED: [u8; 3] = [0, 43, 60];
const FRAGMENT: u8 = 44;

/// A frame as it was captured, without the Ethernet checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    time_ns: u64,
    bytes: Vec<u8>,
}

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The Ethernet address it is for.
    pub destination: [u8; 6],
    /// The Ethernet address it is from.
    pub source: [u8; 6],
    /// The number of its VLAN, where it has a tag (IEEE 802.1Q).
    pub vlan: Option<u16>,
    /// The type behind the tag.
    pub ether_type: u16,
    /// From and to, of IP.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Of the IPv4 header; IPv6 has none.
    pub header_checksum: Option<Checksum>,
    /// Of TCP, UDP and ICMP, unless it is a fragment.
    pub transport: Option<Transport<'a>>,
}

/// A segment, datagram or message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transport<'a> {
    /// IP's number of its protocol.
    pub protocol: u8,
    /// From and to, of TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// The checksum of all of it.
    pub checksum: Checksum,
    /// What is behind its header.
    pub payload: &'a [u8],
}

/// A checksum judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// It is right.
    Good,
    /// It is the pseudo-header's alone: the sender has left the rest to an interface, which has not sent it yet (VIRTIO 1.3,
    /// 5.1.6.2: `VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    Unfinished,
    /// The datagram has none, which UDP over IPv4 permits.
    Absent,
    /// It is wrong.
    Bad,
}

/// Where a frame is cut off or contradicts itself.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// It ends within a header.
    #[error("the frame ends within its {0}")]
    Short(&'static str),
    /// A header says so, and the frame has not so many bytes, or the header itself more.
    #[error("{what} of {len_bytes} bytes does not fit")]
    Length {
        /// What has this length.
        what: &'static str,
        /// The length in the header.
        len_bytes: usize,
    },
    /// A version that the Ethernet type contradicts.
    #[error("IP version {0} behind another's Ethernet type")]
    Version(u8),
}

impl Frame {
    /// A frame of these bytes, from the destination's address on.
    pub fn new(time_ns: u64, bytes: Vec<u8>) -> Self {
        Self { time_ns, bytes }
    }

    /// When it passed, in nanoseconds since 1970.
    pub fn time_ns(&self) -> u64 {
        self.time_ns
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes the frame apart.
    ///
    /// # Errors
    /// Where it cannot be; what is not known is no error.
    pub fn packet(&self) -> Result<Packet<'_>, Malformed> {
        let header = Malformed::Short("Ethernet header");
        let (&destination, rest) = self.bytes.split_first_chunk().ok_or(header)?;
        let (&source, rest) =
            rest.split_first_chunk().ok_or(Malformed::Short("Ethernet header"))?;
        let (mut ether_type, mut rest) = number(rest, "Ethernet header")?;
        let mut vlan = None;
        if ether_type == VLAN {
            let (tag, behind) = number(rest, "VLAN tag")?;
            (ether_type, rest) = number(behind, "VLAN tag")?;
            // Priority and drop eligibility are above.
            vlan = Some(tag & 0xfff);
        }
        let mut packet = Packet {
            destination,
            source,
            vlan,
            ether_type,
            addresses: None,
            header_checksum: None,
            transport: None,
        };
        match ether_type {
            IPV4 => packet.read_ipv4(rest)?,
            IPV6 => packet.read_ipv6(rest)?,
            _ => {}
        }
        Ok(packet)
    }
}

impl<'a> Packet<'a> {
    /// Whether a checksum is wrong or unfinished, as none may be that has reached a wire.
    pub fn has_bad_checksum(&self) -> bool {
        let transport = self.transport.as_ref().map(|transport| transport.checksum);
        [self.header_checksum, transport]
            .into_iter()
            .flatten()
            .any(|checksum| matches!(checksum, Checksum::Bad | Checksum::Unfinished))
    }

    /// RFC 791, 3.1.
    fn read_ipv4(&mut self, bytes: &'a [u8]) -> Result<(), Malformed> {
        let fixed: &[u8; 20] = bytes.first_chunk().ok_or(Malformed::Short("IPv4 header"))?;
        if fixed[0] >> 4 != 4 {
            return Err(Malformed::Version(fixed[0] >> 4));
        }
        let header_len = usize::from(fixed[0] & 0xf) * 4;
        let len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        // Behind a short packet Ethernet has padding.
        let bytes = prefix(bytes, len, "an IPv4 packet")?;
        if header_len < fixed.len() || header_len > len {
            return Err(Malformed::Length { what: "an IPv4 header", len_bytes: header_len });
        }
        let (header, payload) = bytes.split_at(header_len);
        let [source, destination] = [12, 16]
            .map(|at| Ipv4Addr::from([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]));
        self.addresses = Some((source.into(), destination.into()));
        self.header_checksum =
            Some(if sum(header, 0) == 0xffff { Checksum::Good } else { Checksum::Bad });
        // "More fragments", or an offset.
        let is_fragment = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff != 0;
        if !is_fragment {
            let pseudo = sum(&fixed[12..20], u32::from(fixed[9]) + payload.len() as u32);
            self.read_transport(fixed[9], payload, pseudo)?;
        }
        Ok(())
    }

    /// RFC 8200, 3 and 4.
    fn read_ipv6(&mut self, bytes: &'a [u8]) -> Result<(), Malformed> {
        let fixed: &[u8; 40] = bytes.first_chunk().ok_or(Malformed::Short("IPv6 header"))?;
        if fixed[0] >> 4 != 6 {
            return Err(Malformed::Version(fixed[0] >> 4));
        }
        let len = usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
        let mut payload = prefix(&bytes[fixed.len()..], len, "an IPv6 payload")?;
        let [source, destination] = [8, 24].map(|at| {
            let octets: [u8; 16] = fixed[at..at + 16].try_into().expect("sixteen octets");
            Ipv6Addr::from(octets)
        });
        self.addresses = Some((source.into(), destination.into()));
        let mut protocol = fixed[6];
        while SKIPPED.contains(&protocol) {
            let &[next, units] = payload.first_chunk().ok_or(Malformed::Short("IPv6 extension"))?;
            let len_bytes = (usize::from(units) + 1) * 8;
            let whole = prefix(payload, len_bytes, "an IPv6 extension")?;
            (protocol, payload) = (next, &payload[whole.len()..]);
        }
        if protocol != FRAGMENT {
            let pseudo = sum(&fixed[8..40], u32::from(protocol) + payload.len() as u32);
            self.read_transport(protocol, payload, pseudo)?;
        }
        Ok(())
    }

    /// `pseudo` is the sum of the pseudo-header (RFC 9293, 3.1; RFC 768; RFC 8200, 8.1).
    fn read_transport(
        &mut self,
        protocol: u8,
        bytes: &'a [u8],
        pseudo: u16,
    ) -> Result<(), Malformed> {
        let (name, header_len, checksum_at) = match protocol {
            TCP => ("TCP header", 20, 16),
            UDP => ("UDP header", 8, 6),
            ICMP => ("ICMP header", 4, 2),
            ICMPV6 => ("ICMPv6 header", 4, 2),
            _ => return Ok(()),
        };
        if bytes.len() < header_len {
            return Err(Malformed::Short(name));
        }
        let header_len = if protocol == TCP { usize::from(bytes[12] >> 4) * 4 } else { header_len };
        let payload = bytes
            .get(header_len..)
            .ok_or(Malformed::Length { what: "a TCP header", len_bytes: header_len })?;
        if protocol == UDP {
            let len_bytes = usize::from(u16::from_be_bytes([bytes[4], bytes[5]]));
            if len_bytes != bytes.len() {
                return Err(Malformed::Length { what: "a datagram", len_bytes });
            }
        }
        // ICMP alone leaves the addresses out (RFC 792).
        let pseudo = if protocol == ICMP { 0 } else { pseudo };
        let found = u16::from_be_bytes([bytes[checksum_at], bytes[checksum_at + 1]]);
        let checksum = if protocol == UDP && found == 0 {
            Checksum::Absent
        } else if sum(bytes, pseudo.into()) == 0xffff {
            Checksum::Good
        } else if found == pseudo && [TCP, UDP].contains(&protocol) {
            Checksum::Unfinished
        } else {
            Checksum::Bad
        };
        let port = |at| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let ports = [TCP, UDP].contains(&protocol).then(|| (port(0), port(2)));
        self.transport = Some(Transport { protocol, ports, checksum, payload });
        Ok(())
    }
}

/// The sum in ones' complement of 16-bit numbers, from `start` on (RFC 1071). A packet that holds its right checksum has the
/// sum 0xffff.
fn sum(bytes: &[u8], start: u32) -> u16 {
    // No packet has so many bytes that 64 bits overflow.
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn number<'a>(bytes: &'a [u8], what: &'static str) -> Result<(u16, &'a [u8]), Malformed> {
    let (number, rest) = bytes.split_first_chunk().ok_or(Malformed::Short(what))?;
    Ok((u16::from_be_bytes(*number), rest))
}

fn prefix<'a>(bytes: &'a [u8], len: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
    bytes.get(..len).ok_or(Malformed::Length { what, len_bytes: len })
}

#[cfg(test)]
mod tests {
    use super::{Checksum, Frame, Malformed, Packet};

    /// A datagram of an odd length.
    const UDP_V4: &str = "525400123456 525400123457 0800 \
        45000023 1c464000 4011 0a82 0a000001 0a000002 d4310035 000f 7e5f 1234016f646421";
    /// Where its checksum is, and its pseudo-header's sum.
    const UDP_CHECKSUM: (usize, [u8; 2]) = (14 + 20 + 6, [0x14, 0x23]);
    /// A SYN over IPv6, behind an extension header, within VLAN 7 of priority 1.
    const TCP_V6: &str = "525400123456 525400123457 8100 2007 86dd 60000000 0020 00 40 \
        fd000000000000000000000000000001 fd000000000000000000000000000002 0600010400000000 \
        d4311451 00000001 00000000 6002ffff b5b20000 020405a0";

    /// Echo requests of both kinds.
    const ICMP_V4: &str = "5254001234565254001234570800 4500002000010000400166da0a0000010a000002 \
        0800192c0001000270696e67";
    const ICMP_V6: &str = "52540012345652540012345786dd 60000000000c3a40 \
        fd000000000000000000000000000001 fd000000000000000000000000000002 \
        8000a6e00001000270696e67";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
        let pairs = digits.chunks(2).map(|pair| pair.iter().collect::<String>());
        pairs.map(|pair| u8::from_str_radix(&pair, 16).expect("two digits")).collect()
    }

    fn with_packet<T>(bytes: Vec<u8>, judge: impl FnOnce(Result<Packet<'_>, Malformed>) -> T) -> T {
        judge(Frame::new(0, bytes).packet())
    }

    fn checksums(bytes: Vec<u8>) -> (Option<Checksum>, Option<Checksum>) {
        with_packet(bytes, |packet| {
            let packet = packet.expect("well-formed");
            (packet.header_checksum, packet.transport.map(|transport| transport.checksum))
        })
    }

    #[test]
    fn right_checksums_are_good() {
        let good = Some(Checksum::Good);
        assert_eq!(checksums(bytes(UDP_V4)), (good, good));
        assert_eq!(checksums(bytes(TCP_V6)), (None, good));
        assert_eq!(checksums(bytes(ICMP_V4)), (good, good));
        assert_eq!(checksums(bytes(ICMP_V6)), (None, good));
    }

    #[test]
    fn what_a_frame_says_is_read() {
        with_packet(bytes(TCP_V6), |packet| {
            let packet = packet.expect("well-formed");
            assert_eq!((packet.vlan, packet.ether_type), (Some(7), super::IPV6));
            let (from, to) = packet.addresses.expect("it is IP");
            assert_eq!((from.to_string(), to.to_string()), ("fd00::1".into(), "fd00::2".into()));
            let transport = packet.transport.expect("it is TCP");
            assert_eq!((transport.ports, transport.payload), (Some((54321, 5201)), &[][..]));
        });
        with_packet(bytes(UDP_V4), |packet| {
            let packet = packet.expect("well-formed");
            assert_eq!((packet.vlan, packet.destination[5]), (None, 0x56));
            assert_eq!(packet.transport.expect("it is UDP").payload, b"\x12\x34\x01odd!");
        });
    }

    #[test]
    fn every_flipped_bit_that_a_checksum_covers_is_found() {
        // IPv4 from its header on; of IPv6 the addresses, then what is behind header and extension.
        for (frame, covered) in [
            (UDP_V4, 14..49),
            (ICMP_V4, 14..46),
            (TCP_V6, 26..58),
            (TCP_V6, 66..90),
            (ICMP_V6, 22..66),
        ] {
            let frame = bytes(frame);
            for bit in covered.start * 8..covered.end * 8 {
                let mut wrong = frame.clone();
                wrong[bit / 8] ^= 1 << (bit % 8);
                with_packet(wrong, |packet| match packet {
                    // A flipped bit of a type or length may leave nothing to judge by.
                    Err(_) => {}
                    Ok(packet) if packet.transport.is_none() => {
                        assert_ne!(packet.header_checksum, Some(Checksum::Good), "bit {bit}");
                    }
                    Ok(packet) => assert!(packet.has_bad_checksum(), "bit {bit}: {packet:?}"),
                });
            }
        }
    }

    #[test]
    fn checksum_left_to_the_interface_is_unfinished_and_none_is_absent() {
        let (at, pseudo) = UDP_CHECKSUM;
        let mut frame = bytes(UDP_V4);
        frame[at..at + 2].copy_from_slice(&pseudo);
        with_packet(frame.clone(), |packet| {
            let packet = packet.expect("well-formed");
            assert!(packet.has_bad_checksum());
            assert_eq!(packet.transport.expect("it is UDP").checksum, Checksum::Unfinished);
        });
        frame[at..at + 2].fill(0);
        assert_eq!(checksums(frame), (Some(Checksum::Good), Some(Checksum::Absent)));
    }

    #[test]
    fn padding_behind_a_short_packet_is_no_part_of_it() {
        let mut frame = bytes(UDP_V4);
        frame.resize(60, 0xff);
        assert_eq!(checksums(frame), (Some(Checksum::Good), Some(Checksum::Good)));
    }

    #[test]
    fn fragment_has_no_transport_header() {
        let mut frame = bytes(UDP_V4);
        // "More fragments" in place of "don't fragment", which makes the checksum more by as much.
        frame[14 + 6] = 0x20;
        frame[14 + 10] += 0x20;
        assert_eq!(checksums(frame), (Some(Checksum::Good), None));
    }

    #[test]
    fn frame_that_was_cut_off_is_malformed() {
        for frame in [UDP_V4, TCP_V6, ICMP_V4, ICMP_V6].map(bytes) {
            for len in 0..frame.len() {
                with_packet(frame[..len].to_vec(), |packet| {
                    assert!(packet.is_err(), "{len} bytes")
                });
            }
        }
    }
}
