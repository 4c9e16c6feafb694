//! A command of the control queue, from a chain's bytes to a change that can be made.
//!
//! Contract: [`Command::parse`] takes a private copy of what the driver sent (class, command and
//! data; the byte for the answer is not part of it) and yields a command that belongs to what was
//! negotiated, with values in their ranges. What cannot be is [`Refused`]: the answer is
//! [`Ack::Error`], and nothing changes. Data must have exactly its length: a command that is longer
//! is not the one that it seems to be.
//!
//! What it deliberately does not do: carry a command out.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::config::{
    GUEST_OFFLOADS, MAC_BYTES, Mac, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VlanId, are_complete,
};

// VIRTIO 1.3, 5.1.6.5: classes, and their commands.
const VIRTIO_NET_CTRL_RX: u8 = 0;
const VIRTIO_NET_CTRL_RX_PROMISC: u8 = 0;
const VIRTIO_NET_CTRL_RX_ALLMULTI: u8 = 1;
const VIRTIO_NET_CTRL_RX_ALLUNI: u8 = 2;
const VIRTIO_NET_CTRL_RX_NOMULTI: u8 = 3;
const VIRTIO_NET_CTRL_RX_NOUNI: u8 = 4;
const VIRTIO_NET_CTRL_RX_NOBCAST: u8 = 5;
const VIRTIO_NET_CTRL_MAC: u8 = 1;
const VIRTIO_NET_CTRL_MAC_TABLE_SET: u8 = 0;
const VIRTIO_NET_CTRL_MAC_ADDR_SET: u8 = 1;
const VIRTIO_NET_CTRL_VLAN: u8 = 2;
const VIRTIO_NET_CTRL_VLAN_ADD: u8 = 0;
const VIRTIO_NET_CTRL_VLAN_DEL: u8 = 1;
const VIRTIO_NET_CTRL_ANNOUNCE: u8 = 3;
const VIRTIO_NET_CTRL_ANNOUNCE_ACK: u8 = 0;
const VIRTIO_NET_CTRL_MQ: u8 = 4;
const VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
const VIRTIO_NET_CTRL_GUEST_OFFLOADS: u8 = 5;
const VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET: u8 = 0;

/// Longest command, class and command included: a table of 10,000 addresses. Who has more neighbours
/// to listen to uses one of the modes.
pub(crate) const COMMAND_BYTES_MAX: usize = 64 << 10;

/// Addresses of a kind (unicast, multicast) that are told apart. Each is compared with each frame,
/// so they are few; QEMU takes 64 of both kinds together.
pub(crate) const MAC_TABLE_MAX: usize = 64;

/// VIRTIO 1.3, 5.1.6.5: the last byte of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Ack {
    /// `VIRTIO_NET_OK`
    Ok = 0,
    /// `VIRTIO_NET_ERR`
    Error = 1,
}

/// A mode of receiving, which is on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RxMode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// The addresses of a kind that the driver listens to, beside its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MacTable {
    /// These, at most [`MAC_TABLE_MAX`].
    Only(Vec<Mac>),
    /// There were more.
    // VIRTIO 1.3, 5.1.6.5.2: it can silently switch to allmulti or promiscuous mode if it is given
    // too many addresses. (So does QEMU, for the kind of which there are too many.)
    Any,
}

/// A command that can be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    RxMode {
        mode: RxMode,
        is_on: bool,
    },
    MacTable {
        unicast: MacTable,
        multicast: MacTable,
    },
    /// An address that a device can have.
    MacAddress(Mac),
    VlanAdd(VlanId),
    VlanDelete(VlanId),
    AnnounceAck,
    /// From 1 to the device's.
    QueuePairs(u16),
    /// Those of [`GUEST_OFFLOADS`] that are to be on; they were acknowledged, and none lacks the one
    /// that it requires.
    GuestOffloads(u64),
}

/// Why a command is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("a command of {0} bytes")]
    Length(usize),
    #[error("there is no command {command} of class {class}")]
    Unknown { class: u8, command: u8 },
    #[error("the command {command} of class {class} was not negotiated")]
    NotNegotiated { class: u8, command: u8 },
    #[error("a mode is 0 (off) or 1 (on), not {0}")]
    Mode(u8),
    #[error("{0} cannot be a device's address")]
    Address(Mac),
    #[error("{0} is in the table of the other kind of addresses")]
    Table(Mac),
    #[error("there is no VLAN {0}")]
    Vlan(u16),
    #[error("{pairs} queue pairs, of a device that has {most}")]
    QueuePairs { pairs: u16, most: u16 },
    #[error("the offloads {0:#x} are not all negotiated, or some lack those that they require")]
    Offloads(u64),
}

impl Command {
    /// Parses what a driver sent that acknowledged `features`, to a device of `queue_pairs`.
    pub(crate) fn parse(bytes: &[u8], features: u64, queue_pairs: u16) -> Result<Self, Refused> {
        let wrong_length = Refused::Length(bytes.len());
        let [class, command, data @ ..] = bytes else { return Err(wrong_length) };
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(wrong_length);
        }
        let (class, command) = (*class, *command);
        let feature = match (class, command) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI)
            | (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => VIRTIO_NET_F_CTRL_RX,
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLUNI..=VIRTIO_NET_CTRL_RX_NOBCAST) => {
                VIRTIO_NET_F_CTRL_RX_EXTRA
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => VIRTIO_NET_F_CTRL_MAC_ADDR,
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
                VIRTIO_NET_F_CTRL_VLAN
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => VIRTIO_NET_F_GUEST_ANNOUNCE,
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => VIRTIO_NET_F_MQ,
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
            }
            _ => return Err(Refused::Unknown { class, command }),
        };
        if features & feature == 0 {
            return Err(Refused::NotNegotiated { class, command });
        }
        match class {
            VIRTIO_NET_CTRL_RX => rx_mode(command, exactly(data).ok_or(wrong_length)?),
            VIRTIO_NET_CTRL_MAC if command == VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                mac_table(data).ok_or(wrong_length)?
            }
            VIRTIO_NET_CTRL_MAC => mac_address(exactly(data).ok_or(wrong_length)?),
            VIRTIO_NET_CTRL_VLAN => vlan(command, exactly(data).ok_or(wrong_length)?),
            VIRTIO_NET_CTRL_ANNOUNCE if data.is_empty() => Ok(Self::AnnounceAck),
            VIRTIO_NET_CTRL_MQ => pairs(exactly(data).ok_or(wrong_length)?, queue_pairs),
            VIRTIO_NET_CTRL_GUEST_OFFLOADS => {
                offloads(exactly(data).ok_or(wrong_length)?, features)
            }
            _ => Err(wrong_length),
        }
    }
}

/// Data that has just this length.
fn exactly<const BYTES: usize>(data: &[u8]) -> Option<[u8; BYTES]> {
    data.try_into().ok()
}

// VIRTIO 1.3, 5.1.6.5.1.1: The command-specific-data is one byte containing 0 (off) or 1 (on).
fn rx_mode(command: u8, [value]: [u8; 1]) -> Result<Command, Refused> {
    let mode = match command {
        VIRTIO_NET_CTRL_RX_PROMISC => RxMode::Promiscuous,
        VIRTIO_NET_CTRL_RX_ALLMULTI => RxMode::AllMulticast,
        VIRTIO_NET_CTRL_RX_ALLUNI => RxMode::AllUnicast,
        VIRTIO_NET_CTRL_RX_NOMULTI => RxMode::NoMulticast,
        VIRTIO_NET_CTRL_RX_NOUNI => RxMode::NoUnicast,
        VIRTIO_NET_CTRL_RX_NOBCAST => RxMode::NoBroadcast,
        _ => return Err(Refused::Unknown { class: VIRTIO_NET_CTRL_RX, command }),
    };
    match value {
        0 | 1 => Ok(Command::RxMode { mode, is_on: value == 1 }),
        _ => Err(Refused::Mode(value)),
    }
}

/// Two tables, one behind the other; `None` where they do not end with the data.
// VIRTIO 1.3, 5.1.6.5.2.2: a le32 number, followed by that number of non-multicast MAC addresses,
// followed by another le32 number, followed by that number of multicast addresses.
fn mac_table(data: &[u8]) -> Option<Result<Command, Refused>> {
    let (unicast, rest) = addresses(data)?;
    let (multicast, rest) = addresses(rest)?;
    rest.is_empty().then(|| {
        let unicast = table(unicast, false)?;
        Ok(Command::MacTable { unicast, multicast: table(multicast, true)? })
    })
}

/// The bytes of a table's addresses, and those behind it.
fn addresses(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (entries, rest) = data.split_first_chunk()?;
    let entries = usize::try_from(u32::from_le_bytes(*entries)).ok()?;
    rest.split_at_checked(entries.checked_mul(MAC_BYTES)?)
}

fn table(bytes: &[u8], is_multicast: bool) -> Result<MacTable, Refused> {
    let (addresses, _) = bytes.as_chunks::<MAC_BYTES>();
    let addresses = addresses.iter().copied().map(Mac::new);
    if let Some(other) = addresses.clone().find(|mac| mac.is_multicast() != is_multicast) {
        return Err(Refused::Table(other));
    }
    if addresses.len() > MAC_TABLE_MAX {
        return Ok(MacTable::Any);
    }
    Ok(MacTable::Only(addresses.collect()))
}

fn mac_address(bytes: [u8; MAC_BYTES]) -> Result<Command, Refused> {
    let mac = Mac::new(bytes);
    if mac.is_device_address() { Ok(Command::MacAddress(mac)) } else { Err(Refused::Address(mac)) }
}

// VIRTIO 1.3, 5.1.6.5.3: a little-endian 16-bit VLAN id.
fn vlan(command: u8, bytes: [u8; 2]) -> Result<Command, Refused> {
    let number = u16::from_le_bytes(bytes);
    let vlan = VlanId::new(number).ok_or(Refused::Vlan(number))?;
    if command == VIRTIO_NET_CTRL_VLAN_ADD {
        Ok(Command::VlanAdd(vlan))
    } else {
        Ok(Command::VlanDelete(vlan))
    }
}

// VIRTIO 1.3, 5.1.6.5.6.1: The driver MUST NOT request a virtqueue_pairs of 0 or greater than
// max_virtqueue_pairs.
fn pairs(bytes: [u8; 2], most: u16) -> Result<Command, Refused> {
    let pairs = u16::from_le_bytes(bytes);
    if (1..=most).contains(&pairs) {
        Ok(Command::QueuePairs(pairs))
    } else {
        Err(Refused::QueuePairs { pairs, most })
    }
}

// VIRTIO 1.3, 5.1.6.5.8.2: A driver MUST NOT enable an offload for which the appropriate feature has
// not been negotiated. One without what it requires (5.1.3.1) no back end could give.
fn offloads(bytes: [u8; 8], features: u64) -> Result<Command, Refused> {
    let wanted = u64::from_le_bytes(bytes);
    if wanted & !(features & GUEST_OFFLOADS) != 0 || !are_complete(wanted) {
        return Err(Refused::Offloads(wanted));
    }
    Ok(Command::GuestOffloads(wanted))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, proptest};

    use super::*;
    use crate::config::{
        VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VLANS,
    };

    const ALL: u64 = u64::MAX;
    const PAIRS: u16 = 0x0102;

    fn parse(bytes: &[u8]) -> Result<Command, Refused> {
        Command::parse(bytes, ALL, PAIRS)
    }

    fn mode(mode: RxMode, is_on: bool) -> Result<Command, Refused> {
        Ok(Command::RxMode { mode, is_on })
    }

    /// A table of this many addresses that begin with `first`.
    fn table_bytes(entries: u32, first: u8) -> Vec<u8> {
        let mut bytes = entries.to_le_bytes().to_vec();
        for entry in 0..entries {
            let [.., high, low] = entry.to_be_bytes();
            bytes.extend([first, 0, 0, 0, high, low]);
        }
        bytes
    }

    fn table_command(unicast: &[u8], multicast: &[u8]) -> Vec<u8> {
        [&[1, 0], unicast, multicast].concat()
    }

    #[test]
    fn every_command_is_understood() {
        let csum_and_tso4 = VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_GUEST_TSO4;
        let offloads = [&[5, 0][..], &csum_and_tso4.to_le_bytes()].concat();
        let mac = Mac::new([2, 0, 0, 0, 0, 1]);
        for (bytes, command) in [
            (&[0, 0, 1][..], mode(RxMode::Promiscuous, true)),
            (&[0, 0, 0], mode(RxMode::Promiscuous, false)),
            (&[0, 1, 1], mode(RxMode::AllMulticast, true)),
            (&[0, 2, 1], mode(RxMode::AllUnicast, true)),
            (&[0, 3, 1], mode(RxMode::NoMulticast, true)),
            (&[0, 4, 0], mode(RxMode::NoUnicast, false)),
            (&[0, 5, 1], mode(RxMode::NoBroadcast, true)),
            (&[1, 1, 2, 0, 0, 0, 0, 1], Ok(Command::MacAddress(mac))),
            (&[2, 0, 0x34, 0x02], Ok(Command::VlanAdd(VlanId::new(0x234).unwrap()))),
            (&[2, 1, 0xff, 0x0f], Ok(Command::VlanDelete(VlanId::new(4095).unwrap()))),
            (&[3, 0], Ok(Command::AnnounceAck)),
            (&[4, 0, 0x02, 0x01], Ok(Command::QueuePairs(PAIRS))),
            (&offloads, Ok(Command::GuestOffloads(csum_and_tso4))),
            (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0], Ok(Command::GuestOffloads(0))),
        ] {
            assert_eq!(parse(bytes), command, "{bytes:?}");
        }
    }

    #[test]
    fn tables_of_addresses_are_read_one_behind_the_other() {
        let both = table_command(&table_bytes(2, 2), &table_bytes(1, 0x33));
        let mac = |first, last| Mac::new([first, 0, 0, 0, 0, last]);
        assert_eq!(
            parse(&both),
            Ok(Command::MacTable {
                unicast: MacTable::Only(vec![mac(2, 0), mac(2, 1)]),
                multicast: MacTable::Only(vec![mac(0x33, 0)]),
            })
        );
        let none = MacTable::Only(Vec::new());
        let empty = table_command(&[0; 4], &[0; 4]);
        assert_eq!(
            parse(&empty),
            Ok(Command::MacTable { unicast: none.clone(), multicast: none.clone() })
        );
    }

    #[test]
    fn too_many_addresses_of_a_kind_are_any_of_that_kind() {
        let most = u32::try_from(MAC_TABLE_MAX).unwrap();
        for (unicast, multicast) in [(most, most), (most + 1, most), (0, most + 1), (10_000, 0)] {
            let bytes = table_command(&table_bytes(unicast, 2), &table_bytes(multicast, 1));
            let Ok(Command::MacTable { unicast: ours, multicast: groups }) = parse(&bytes) else {
                panic!("{unicast} and {multicast} addresses are refused");
            };
            assert_eq!(ours == MacTable::Any, unicast > most);
            assert_eq!(groups == MacTable::Any, multicast > most);
        }
    }

    #[test]
    fn table_that_does_not_end_with_the_command_is_refused() {
        let good = table_command(&table_bytes(1, 2), &table_bytes(1, 0x33));
        let longer = [&good[..], &[0]].concat();
        for cut in (2..good.len()).map(|end| &good[..end]).chain([&longer[..]]) {
            assert_eq!(parse(cut), Err(Refused::Length(cut.len())), "{cut:?}");
        }
        for entries in [u32::MAX, 0x2aaa_aaab] {
            let lying = table_command(&entries.to_le_bytes(), &[0; 4]);
            assert_eq!(parse(&lying), Err(Refused::Length(10)));
        }
    }

    #[test]
    fn address_in_the_wrong_table_is_refused() {
        let mac = |first| Mac::new([first, 0, 0, 0, 0, 0]);
        let group = table_command(&table_bytes(1, 0x33), &[0; 4]);
        assert_eq!(parse(&group), Err(Refused::Table(mac(0x33))));
        let device = table_command(&[0; 4], &table_bytes(1, 2));
        assert_eq!(parse(&device), Err(Refused::Table(mac(2))));
    }

    #[test]
    fn values_out_of_their_ranges_are_refused() {
        let tso4_alone = [&[5, 0][..], &VIRTIO_NET_F_GUEST_TSO4.to_le_bytes()].concat();
        let no_offload = [&[5, 0][..], &VIRTIO_NET_F_CTRL_VQ.to_le_bytes()].concat();
        let broadcast = Mac::new([0xff; 6]);
        for (bytes, why) in [
            (&[0, 0, 2][..], Refused::Mode(2)),
            (&[0, 5, 0xff], Refused::Mode(0xff)),
            (&[1, 1, 255, 255, 255, 255, 255, 255], Refused::Address(broadcast)),
            (&[1, 1, 0, 0, 0, 0, 0, 0], Refused::Address(Mac::new([0; 6]))),
            (&[2, 0, 0x00, 0x10], Refused::Vlan(4096)),
            (&[2, 1, 0xff, 0xff], Refused::Vlan(0xffff)),
            (&[4, 0, 0, 0], Refused::QueuePairs { pairs: 0, most: PAIRS }),
            (&[4, 0, 0x03, 0x01], Refused::QueuePairs { pairs: 0x0103, most: PAIRS }),
            (&tso4_alone, Refused::Offloads(VIRTIO_NET_F_GUEST_TSO4)),
            (&no_offload, Refused::Offloads(VIRTIO_NET_F_CTRL_VQ)),
        ] {
            assert_eq!(parse(bytes), Err(why), "{bytes:?}");
        }
    }

    #[test]
    fn data_of_another_length_is_refused() {
        for (command, length) in [
            ([0, 0], 1),
            ([0, 5], 1),
            ([1, 1], 6),
            ([2, 0], 2),
            ([3, 0], 0),
            ([4, 0], 2),
            ([5, 0], 8),
        ] {
            for data in (0..12).filter(|data| *data != length) {
                let bytes = [&command[..], &vec![0; data]].concat();
                assert_eq!(parse(&bytes), Err(Refused::Length(2 + data)), "{bytes:?}");
            }
        }
        for bytes in [&[][..], &[0]] {
            assert_eq!(parse(bytes), Err(Refused::Length(bytes.len())));
        }
        let long = vec![0; COMMAND_BYTES_MAX + 1];
        assert_eq!(parse(&long), Err(Refused::Length(COMMAND_BYTES_MAX + 1)));
    }

    #[test]
    fn class_and_command_that_do_not_exist_are_refused() {
        for (class, command) in
            [(0, 6), (1, 2), (2, 2), (3, 1), (4, 1), (4, 2), (5, 1), (6, 0), (255, 255)]
        {
            let bytes = [class, command, 0, 0];
            assert_eq!(parse(&bytes), Err(Refused::Unknown { class, command }));
        }
    }

    #[test]
    fn every_command_needs_its_feature() {
        let empty = table_command(&[0; 4], &[0; 4]);
        for (bytes, feature) in [
            (&[0, 0, 1][..], VIRTIO_NET_F_CTRL_RX),
            (&[0, 1, 1], VIRTIO_NET_F_CTRL_RX),
            (&[0, 2, 1], VIRTIO_NET_F_CTRL_RX_EXTRA),
            (&[0, 3, 1], VIRTIO_NET_F_CTRL_RX_EXTRA),
            (&[0, 4, 1], VIRTIO_NET_F_CTRL_RX_EXTRA),
            (&[0, 5, 1], VIRTIO_NET_F_CTRL_RX_EXTRA),
            (&empty, VIRTIO_NET_F_CTRL_RX),
            (&[1, 1, 2, 0, 0, 0, 0, 1], VIRTIO_NET_F_CTRL_MAC_ADDR),
            (&[2, 0, 1, 0], VIRTIO_NET_F_CTRL_VLAN),
            (&[2, 1, 1, 0], VIRTIO_NET_F_CTRL_VLAN),
            (&[3, 0], VIRTIO_NET_F_GUEST_ANNOUNCE),
            (&[4, 0, 1, 0], VIRTIO_NET_F_MQ),
            (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0], VIRTIO_NET_F_CTRL_GUEST_OFFLOADS),
        ] {
            assert!(Command::parse(bytes, feature, PAIRS).is_ok(), "{bytes:?}");
            let refused = Refused::NotNegotiated { class: bytes[0], command: bytes[1] };
            assert_eq!(Command::parse(bytes, ALL & !feature, PAIRS), Err(refused));
        }
        let csum = [&[5, 0][..], &VIRTIO_NET_F_GUEST_CSUM.to_le_bytes()].concat();
        let without = ALL & !VIRTIO_NET_F_GUEST_CSUM;
        let refused = Err(Refused::Offloads(VIRTIO_NET_F_GUEST_CSUM));
        assert_eq!(Command::parse(&csum, without, PAIRS), refused);
    }

    /// What is accepted can be carried out.
    fn holds(command: &Command, features: u64, queue_pairs: u16) -> bool {
        let is_table = |table: &MacTable, is_multicast| match table {
            MacTable::Any => true,
            MacTable::Only(addresses) => {
                addresses.len() <= MAC_TABLE_MAX
                    && addresses.iter().all(|mac| mac.is_multicast() == is_multicast)
            }
        };
        match command {
            Command::RxMode { .. } | Command::AnnounceAck => true,
            Command::MacTable { unicast, multicast } => {
                is_table(unicast, false) && is_table(multicast, true)
            }
            Command::MacAddress(mac) => mac.is_device_address(),
            Command::VlanAdd(vlan) | Command::VlanDelete(vlan) => vlan.number() < VLANS,
            Command::QueuePairs(pairs) => (1..=queue_pairs).contains(pairs),
            Command::GuestOffloads(bits) => {
                bits & !(features & GUEST_OFFLOADS) == 0 && are_complete(*bits)
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_a_command(
            class in 0u8..7,
            command in 0u8..7,
            data in proptest::collection::vec(any::<u8>(), 0..40),
            features in any::<u64>(),
            queue_pairs in any::<u16>(),
        ) {
            let bytes = [&[class, command], &data[..]].concat();
            if let Ok(command) = Command::parse(&bytes, features, queue_pairs) {
                prop_assert!(holds(&command, features, queue_pairs), "{command:?}");
            }
        }
    }
}
