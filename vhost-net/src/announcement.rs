//! The frame by which a guest is announced whose driver cannot do so itself.
//!
//! It is the one that QEMU sends: a reverse ARP request (RFC 903) of the guest's, from which switches learn behind which
//! of their ports it is.

use crate::config::VlanId;
use crate::header::{ETHERNET_BYTES, insert_vlan_tag};

/// Ethernet's shortest frame, without its checksum.
const ANNOUNCEMENT_BYTES: usize = 60;

/// EtherType of reverse ARP.
const ETH_P_RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet and IPv4, with addresses of 6 and 4 bytes.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// RFC 903: "request reverse".
const REQUEST_REVERSE: [u8; 2] = [0, 3];

/// The announcement of a guest with this MAC address, at a port of this VLAN if it is of one.
pub(crate) fn announcement(mac: [u8; 6], vlan: Option<VlanId>) -> Vec<u8> {
    let no_address = [0; 4];
    let parts: [&[u8]; 9] = [
        &[0xff; 6],
        &mac,
        &ETH_P_RARP,
        &ETHERNET_IPV4,
        &REQUEST_REVERSE,
        &mac,
        &no_address,
        &mac,
        &no_address,
    ];
    let mut frame = parts.concat();
    frame.resize(ANNOUNCEMENT_BYTES, 0);
    if let (Some(vlan), Some(ethernet)) = (vlan, frame.first_chunk().copied()) {
        frame.splice(..ETHERNET_BYTES, insert_vlan_tag(ethernet, vlan));
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::{ANNOUNCEMENT_BYTES, announcement};
    use crate::config::VlanId;

    #[test]
    fn everybody_learns_where_the_guest_is() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let frame = announcement(mac, None);
        assert_eq!(frame.len(), ANNOUNCEMENT_BYTES);
        assert_eq!((&frame[..6], &frame[6..12]), (&[0xff; 6][..], &mac[..]));
        assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
        assert!(frame[38..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn announcement_is_tagged_as_the_guests_frames_are() {
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let (bare, tagged) = (announcement(mac, None), announcement(mac, VlanId::new(0x123)));
        assert_eq!(tagged[12..18], [0x81, 0, 1, 0x23, 0x80, 0x35]);
        assert_eq!([&tagged[..12], &tagged[16..]].concat(), bare);
    }
}
