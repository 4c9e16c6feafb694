//! Which frames a driver wants to receive: modes, MAC addresses, VLANs.
//!
//! Contract: the control queue changes the filter, one thread at a time; any number of receive
//! queues ask it about each frame, without a lock and without waiting. A command is in force when
//! the function that carries it out returns: its chain is used after that. While the table of
//! addresses is exchanged, frames pass: unwanted ones may always arrive (VIRTIO 1.3, 5.1.6.5.1,
//! 5.1.6.5.3), wanted ones must.
//!
//! A filter that was not negotiated lets everything pass. Negotiated means: together with the control
//! queue. Front ends that serve that queue themselves (DPDK) acknowledge VIRTIO_NET_F_CTRL_RX and
//! VIRTIO_NET_F_CTRL_VLAN without VIRTIO_NET_F_CTRL_VQ, and nobody would ever tell us what to let in.
//!
//! Until a driver says that it is not promiscuous, no frame is dropped for its address, as in QEMU:
//! some drivers have never said what they listen to.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use serde::{Deserialize, Serialize};

use crate::command::{MAC_TABLE_MAX, MacTable, RxMode};
use crate::config::{Mac, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VLANS, VlanId};
use crate::header::Head;

/// VLANs that a word of their table has a bit for.
const VLANS_PER_WORD: u16 = 64;

// The bits of `modes`. The first six are those of `RxMode`.
const PROMISCUOUS: u32 = 1 << RxMode::Promiscuous as u32;
const ALL_MULTICAST: u32 = 1 << RxMode::AllMulticast as u32;
const ALL_UNICAST: u32 = 1 << RxMode::AllUnicast as u32;
const NO_MULTICAST: u32 = 1 << RxMode::NoMulticast as u32;
const NO_UNICAST: u32 = 1 << RxMode::NoUnicast as u32;
const NO_BROADCAST: u32 = 1 << RxMode::NoBroadcast as u32;
/// Addresses are of no concern: not negotiated, or the driver has not said anything yet.
const ANY_ADDRESS: u32 = 1 << 6;
/// VLANs are of no concern: not negotiated.
const ANY_VLAN: u32 = 1 << 7;
/// The driver has given more unicast addresses than there is room for.
const MANY_UNICAST: u32 = 1 << 8;
/// Likewise, multicast addresses.
const MANY_MULTICAST: u32 = 1 << 9;

/// Everything passes.
const OPEN: u32 = ANY_ADDRESS | ANY_VLAN;

/// Why a frame is not wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unwanted {
    /// It is of a VLAN that the driver does not listen to.
    Vlan,
    /// The driver does without broadcasts.
    Broadcast,
    /// It is for a group that the driver is not in.
    Multicast,
    /// It is for another device.
    Unicast,
}

/// Addresses of a kind.
#[derive(Debug)]
struct Addresses {
    count: AtomicU32,
    numbers: [AtomicU64; MAC_TABLE_MAX],
}

impl Addresses {
    fn new() -> Self {
        Self { count: AtomicU32::new(0), numbers: [const { AtomicU64::new(0) }; MAC_TABLE_MAX] }
    }

    /// Only while a change is announced.
    fn set(&self, addresses: &[Mac]) {
        let mut count = 0;
        for (number, mac) in self.numbers.iter().zip(addresses) {
            number.store(mac.number(), Ordering::Relaxed);
            count += 1;
        }
        self.count.store(count, Ordering::Relaxed);
    }

    /// Only while none changes them.
    fn save(&self) -> Vec<u64> {
        let count = self.count.load(Ordering::Relaxed) as usize;
        self.numbers.iter().take(count).map(|number| number.load(Ordering::Relaxed)).collect()
    }

    fn contain(&self, mac: Mac) -> bool {
        let count = self.count.load(Ordering::Relaxed) as usize;
        let wanted = mac.number();
        self.numbers.iter().take(count).any(|number| number.load(Ordering::Relaxed) == wanted)
    }
}

/// What a driver wants to receive, written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptFilter {
    modes: u32,
    unicast: Vec<u64>,
    multicast: Vec<u64>,
    vlans: Vec<u64>,
}

/// What a driver wants to receive.
#[derive(Debug)]
pub(crate) struct Filter {
    modes: AtomicU32,
    /// How often the tables of addresses have begun or ended to change: odd while they do.
    changes: AtomicU32,
    unicast: Addresses,
    multicast: Addresses,
    vlans: [AtomicU64; (VLANS / VLANS_PER_WORD) as usize],
}

impl Filter {
    /// A filter that lets everything pass.
    pub(crate) fn new() -> Self {
        Self {
            modes: AtomicU32::new(OPEN),
            changes: AtomicU32::new(0),
            unicast: Addresses::new(),
            multicast: Addresses::new(),
            vlans: [const { AtomicU64::new(0) }; (VLANS / VLANS_PER_WORD) as usize],
        }
    }

    /// The driver has reset the device: everything passes, and what it has said is forgotten.
    // VIRTIO 1.3, 5.1.6.5.2.1: The device MUST have an empty MAC filtering table on reset.
    pub(crate) fn reset(&self) {
        self.modes.store(OPEN, Ordering::Relaxed);
        let none = || MacTable::Only(Vec::new());
        self.set_addresses(&none(), &none());
        self.vlans.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// By who could change it, too.
    pub(crate) fn save(&self) -> KeptFilter {
        KeptFilter {
            modes: self.modes.load(Ordering::Relaxed),
            unicast: self.unicast.save(),
            multicast: self.multicast.save(),
            vlans: self.vlans.iter().map(|word| word.load(Ordering::Relaxed)).collect(),
        }
    }

    /// Whether a driver can have said that.
    pub(crate) fn can_be(&self, kept: &KeptFilter) -> bool {
        let is_table = |numbers: &[u64]| {
            let are_addresses = numbers.iter().all(|n| Mac::from_number(*n).number() == *n);
            numbers.len() <= MAC_TABLE_MAX && are_addresses
        };
        kept.modes < MANY_MULTICAST << 1
            && is_table(&kept.unicast)
            && is_table(&kept.multicast)
            && kept.vlans.len() == self.vlans.len()
    }

    /// A driver has said that, to a predecessor of this process. No queue asks yet.
    pub(crate) fn restore(&self, kept: &KeptFilter) {
        let table = |numbers: &[u64]| {
            MacTable::Only(numbers.iter().map(|number| Mac::from_number(*number)).collect())
        };
        self.set_addresses(&table(&kept.unicast), &table(&kept.multicast));
        for (word, kept) in self.vlans.iter().zip(&kept.vlans) {
            word.store(*kept, Ordering::Relaxed);
        }
        self.modes.store(kept.modes, Ordering::Relaxed);
    }

    /// The driver has acknowledged `features`.
    // VIRTIO 1.3, 5.1.6.5.3: When VIRTIO_NET_F_CTRL_VLAN is negotiated, the device starts with an
    // empty VLAN filter table. 5.1.6.5.3.1: when it is not, the device MUST accept all VLAN tagged
    // packets.
    pub(crate) fn negotiated(&self, features: u64) {
        self.reset();
        let filters_vlans = [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_CTRL_VLAN];
        if filters_vlans.iter().all(|feature| features & feature != 0) {
            self.switch(ANY_VLAN, false);
        }
    }

    /// Switches a mode.
    pub(crate) fn set_mode(&self, mode: RxMode, is_on: bool) {
        self.switch(1 << mode as u32, is_on);
        if mode == RxMode::Promiscuous {
            self.switch(ANY_ADDRESS, false);
        }
    }

    /// Exchanges the addresses that the driver listens to beside its own.
    // VIRTIO 1.3, 5.1.6.5.2.1: The device MUST update the MAC filtering table before it consumes the
    // VIRTIO_NET_CTRL_MAC_TABLE_SET command.
    pub(crate) fn set_addresses(&self, unicast: &MacTable, multicast: &MacTable) {
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the acquire fence in `listens_to`: who reads one of the addresses below sees the
        // odd number, too.
        fence(Ordering::Release);
        for (table, addresses, many) in
            [(unicast, &self.unicast, MANY_UNICAST), (multicast, &self.multicast, MANY_MULTICAST)]
        {
            let only = match table {
                MacTable::Only(only) => &only[..],
                MacTable::Any => &[],
            };
            addresses.set(only);
            self.switch(many, *table == MacTable::Any);
        }
        // Pairs with the first load of `listens_to`: who reads this number sees all addresses.
        self.changes.store(changes.wrapping_add(2), Ordering::Release);
    }

    pub(crate) fn add_vlan(&self, vlan: VlanId) {
        let (word, bit) = self.place(vlan);
        word.store(word.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
    }

    pub(crate) fn delete_vlan(&self, vlan: VlanId) {
        let (word, bit) = self.place(vlan);
        word.store(word.load(Ordering::Relaxed) & !bit, Ordering::Relaxed);
    }

    /// Whether the driver, whose own address is `own`, wants a frame; `None`: what it has is not
    /// known, and every device's address may be it.
    pub(crate) fn wants(&self, head: &Head, own: Option<Mac>) -> Result<(), Unwanted> {
        let modes = self.modes.load(Ordering::Relaxed);
        let has = |mode: u32| modes & mode != 0;
        // VIRTIO 1.3, 5.1.6.5.1.1: If promiscuous mode is on, the device SHOULD receive all incoming
        // packets. This SHOULD take effect even if one of the other modes is on.
        if has(PROMISCUOUS) {
            return Ok(());
        }
        if !has(ANY_VLAN) && !head.vlan.is_none_or(|vlan| self.has_vlan(vlan)) {
            return Err(Unwanted::Vlan);
        }
        let to = head.destination;
        if has(ANY_ADDRESS) {
            return Ok(());
        }
        // VIRTIO 1.3, 5.1.6.5.1.1: what suppresses takes effect even if what allows is on, and
        // NOMULTI SHOULD NOT apply to broadcast packets.
        let (is_wanted, unwanted) = if to.is_broadcast() {
            (!has(NO_BROADCAST), Unwanted::Broadcast)
        } else if to.is_multicast() {
            let all = PROMISCUOUS | ALL_MULTICAST | MANY_MULTICAST;
            let is_wanted =
                !has(NO_MULTICAST) && (has(all) || self.listens_to(&self.multicast, to, all));
            (is_wanted, Unwanted::Multicast)
        } else {
            let all = PROMISCUOUS | ALL_UNICAST | MANY_UNICAST;
            let is_wanted = !has(NO_UNICAST)
                && (has(all)
                    || own.is_none_or(|own| own == to)
                    || self.listens_to(&self.unicast, to, all));
            (is_wanted, Unwanted::Unicast)
        };
        if is_wanted { Ok(()) } else { Err(unwanted) }
    }

    /// Whether these addresses have this one, or a mode of `all` is on, or they are just being
    /// exchanged.
    ///
    /// The modes are read once more, between the two looks at the number: one of them may have taken
    /// the place of an address since the caller read them, and may be off again afterwards.
    fn listens_to(&self, addresses: &Addresses, mac: Mac, all: u32) -> bool {
        // Pairs with the last store of `set_addresses`.
        let before = self.changes.load(Ordering::Acquire);
        if self.modes.load(Ordering::Relaxed) & all != 0 || addresses.contain(mac) {
            return true;
        }
        // Pairs with the release fence in `set_addresses`, and the store in `switch`: if an address
        // or a mode that was read is of a later change, so is the number.
        fence(Ordering::Acquire);
        !before.is_multiple_of(2) || self.changes.load(Ordering::Relaxed) != before
    }

    // VIRTIO 1.3, 5.1.6.5.3.1: the device MUST accept all VLAN tagged packets whose VLAN tag is
    // present in the VLAN filter table. A tag that has a priority only makes no frame one of a VLAN.
    fn has_vlan(&self, vlan: VlanId) -> bool {
        let (word, bit) = self.place(vlan);
        vlan == VlanId::NONE || word.load(Ordering::Relaxed) & bit != 0
    }

    fn place(&self, vlan: VlanId) -> (&AtomicU64, u64) {
        let (word, bit) = (vlan.number() / VLANS_PER_WORD, vlan.number() % VLANS_PER_WORD);
        (&self.vlans[usize::from(word)], 1 << bit)
    }

    /// A load and a store: there is one writer.
    fn switch(&self, bits: u32, is_on: bool) {
        let modes = self.modes.load(Ordering::Relaxed);
        let modes = if is_on { modes | bits } else { modes & !bits };
        // Pairs with the acquire fence in `listens_to`: who finds a mode off sees the number of the
        // table that has taken its place.
        self.modes.store(modes, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::config::VIRTIO_NET_F_CTRL_RX;

    const ALL: u64 = u64::MAX;
    const OWN: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 1]);
    const OTHER: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 2]);
    const GROUP: Mac = Mac::new([0x33, 0x33, 0, 0, 0, 1]);
    const BROADCAST: Mac = Mac::new([0xff; 6]);

    fn to(destination: Mac) -> Head {
        Head { destination, source: OTHER, vlan: None, has_tag: false }
    }

    fn in_vlan(number: u16) -> Head {
        Head { vlan: VlanId::new(number), ..to(OWN) }
    }

    fn only(addresses: &[Mac]) -> MacTable {
        MacTable::Only(addresses.to_vec())
    }

    /// A driver that listens to itself, as Linux does once it is up.
    fn listening() -> Filter {
        let filter = Filter::new();
        filter.negotiated(ALL);
        filter.set_mode(RxMode::Promiscuous, false);
        filter
    }

    /// What becomes of a frame to each kind of address.
    fn verdicts(filter: &Filter) -> [Option<Unwanted>; 4] {
        [OWN, OTHER, GROUP, BROADCAST].map(|mac| filter.wants(&to(mac), Some(OWN)).err())
    }

    const UNICAST: Option<Unwanted> = Some(Unwanted::Unicast);
    const MULTICAST: Option<Unwanted> = Some(Unwanted::Multicast);

    #[test]
    fn everything_passes_until_the_driver_says_what_it_wants() {
        let filter = Filter::new();
        assert_eq!(verdicts(&filter), [None; 4]);
        filter.negotiated(ALL);
        assert_eq!(verdicts(&filter), [None; 4]);
        filter.set_addresses(&only(&[]), &only(&[]));
        assert_eq!(verdicts(&filter), [None; 4]);
        filter.set_mode(RxMode::Promiscuous, false);
        assert_eq!(verdicts(&filter), [None, UNICAST, MULTICAST, None]);
    }

    #[test]
    fn each_mode_does_its_part() {
        for (mode, verdict) in [
            (RxMode::Promiscuous, [None; 4]),
            (RxMode::AllMulticast, [None, UNICAST, None, None]),
            (RxMode::AllUnicast, [None, None, MULTICAST, None]),
            (RxMode::NoMulticast, [None, UNICAST, MULTICAST, None]),
            (RxMode::NoUnicast, [UNICAST, UNICAST, MULTICAST, None]),
            (RxMode::NoBroadcast, [None, UNICAST, MULTICAST, Some(Unwanted::Broadcast)]),
        ] {
            let filter = listening();
            filter.set_mode(mode, true);
            assert_eq!(verdicts(&filter), verdict, "{mode:?}");
            filter.set_mode(mode, false);
            assert_eq!(verdicts(&filter), verdicts(&listening()), "{mode:?} off again");
        }
    }

    #[test]
    fn what_suppresses_is_stronger_than_what_allows_and_promiscuous_than_all() {
        let filter = listening();
        for mode in [RxMode::AllMulticast, RxMode::AllUnicast, RxMode::NoMulticast] {
            filter.set_mode(mode, true);
        }
        assert_eq!(verdicts(&filter), [None, None, MULTICAST, None]);
        filter.set_mode(RxMode::NoUnicast, true);
        filter.set_mode(RxMode::NoBroadcast, true);
        assert_eq!(verdicts(&filter), [UNICAST, UNICAST, MULTICAST, Some(Unwanted::Broadcast)]);
        filter.set_mode(RxMode::Promiscuous, true);
        assert_eq!(verdicts(&filter), [None; 4]);
    }

    #[test]
    fn tables_name_further_addresses() {
        let filter = listening();
        filter.set_addresses(&only(&[OTHER]), &only(&[GROUP]));
        assert_eq!(verdicts(&filter), [None; 4]);
        let third = to(Mac::new([0x52, 0x54, 0, 0, 0, 3]));
        assert_eq!(filter.wants(&third, Some(OWN)), Err(Unwanted::Unicast));
        filter.set_addresses(&only(&[]), &only(&[GROUP]));
        assert_eq!(verdicts(&filter), [None, UNICAST, None, None]);
        filter.set_addresses(&MacTable::Any, &only(&[]));
        assert_eq!(verdicts(&filter), [None, None, MULTICAST, None]);
        filter.set_addresses(&only(&[]), &MacTable::Any);
        assert_eq!(verdicts(&filter), [None, UNICAST, None, None]);
    }

    #[test]
    fn table_has_room_for_as_many_as_a_command_has() {
        let filter = listening();
        let macs: Vec<Mac> = (0..MAC_TABLE_MAX as u64).map(|n| Mac::from_number(n << 8)).collect();
        filter.set_addresses(&only(&macs), &only(&[]));
        assert!(macs.iter().all(|mac| filter.wants(&to(*mac), Some(OWN)).is_ok()));
        assert_eq!(filter.wants(&to(OTHER), Some(OWN)), Err(Unwanted::Unicast));
    }

    #[test]
    fn address_that_the_driver_made_up_is_not_missed() {
        let filter = listening();
        assert_eq!(filter.wants(&to(OTHER), None), Ok(()));
        assert_eq!(filter.wants(&to(GROUP), None), Err(Unwanted::Multicast));
    }

    #[test]
    fn only_vlans_of_the_table_pass_and_frames_of_none() {
        let filter = Filter::new();
        filter.negotiated(VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_VLAN);
        assert_eq!(filter.wants(&to(OTHER), Some(OWN)), Ok(()));
        assert_eq!(filter.wants(&in_vlan(0), Some(OWN)), Ok(()), "a priority is no VLAN");
        let first_and_last = [1, 63, 64, 2048, 4095];
        for number in first_and_last {
            let vlan = VlanId::new(number).unwrap();
            assert_eq!(filter.wants(&in_vlan(number), Some(OWN)), Err(Unwanted::Vlan));
            filter.add_vlan(vlan);
            assert_eq!(filter.wants(&in_vlan(number), Some(OWN)), Ok(()));
            let passing = (1..VLANS).filter(|n| filter.wants(&in_vlan(*n), Some(OWN)).is_ok());
            assert_eq!(passing.collect::<Vec<_>>(), [number]);
            filter.delete_vlan(vlan);
            assert_eq!(filter.wants(&in_vlan(number), Some(OWN)), Err(Unwanted::Vlan));
        }
        filter.set_mode(RxMode::Promiscuous, true);
        assert_eq!(filter.wants(&in_vlan(7), Some(OWN)), Ok(()));
    }

    #[test]
    fn what_was_not_negotiated_is_not_filtered() {
        for features in [
            0,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_RX | VIRTIO_NET_F_CTRL_VLAN,
        ] {
            let filter = Filter::new();
            filter.negotiated(features);
            assert_eq!(filter.wants(&in_vlan(5), Some(OWN)), Ok(()), "{features:#x}");
            assert_eq!(verdicts(&filter), [None; 4], "{features:#x}");
        }
    }

    #[test]
    fn reset_forgets_all() {
        let filter = listening();
        filter.add_vlan(VlanId::new(5).unwrap());
        filter.set_addresses(&MacTable::Any, &only(&[GROUP]));
        filter.set_mode(RxMode::NoBroadcast, true);
        filter.reset();
        assert_eq!(verdicts(&filter), [None; 4]);
        filter.negotiated(ALL);
        filter.set_mode(RxMode::Promiscuous, false);
        assert_eq!(verdicts(&filter), verdicts(&listening()));
        assert_eq!(filter.wants(&in_vlan(5), Some(OWN)), Err(Unwanted::Vlan));
    }

    #[test]
    fn address_in_both_tables_is_never_missed_while_they_are_exchanged() {
        let filter = listening();
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        // GROUP stands at another place each time, or is one of too many.
        let tables =
            [only(&[GROUP]), only(&[Mac::new([1; 6]), Mac::new([3; 6]), GROUP]), MacTable::Any];
        filter.set_addresses(&only(&[]), &tables[0]);
        thread::scope(|scope| {
            scope.spawn(|| {
                for table in tables.iter().cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                    filter.set_addresses(&only(&[]), table);
                    begun.store(true, Ordering::Relaxed);
                }
            });
            while !begun.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            let missed = (0..20_000_000).filter(|_| filter.wants(&to(GROUP), Some(OWN)).is_err());
            let missed = missed.count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(missed, 0);
        });
    }
}
