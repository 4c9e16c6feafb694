//! What a driver has told the device by commands, and which frames it is to get therefore.

use common::simulation::Random;

use super::frame::{Allowed, BROADCAST, GROUPS, OTHERS, Reason, VLANS, vlan_of};
use super::mode::{Mode, OWN};
use crate::config::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ,
};

impl Mode {
    /// What the driver may leave to the device.
    pub(super) fn allowed_to_driver(&self) -> Allowed {
        Allowed {
            csum: self.has(VIRTIO_NET_F_CSUM),
            tso4: self.has(VIRTIO_NET_F_HOST_TSO4),
            valid: false,
        }
    }
}

/// See the module's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listening {
    /// Promiscuous, allmulti, alluni, nomulti, nouni, nobcast.
    modes: [bool; 6],
    /// It has never said that it is not promiscuous.
    is_silent: bool,
    unicast: Vec<[u8; 6]>,
    multicast: Vec<[u8; 6]>,
    vlans: Option<Vec<u16>>,
    pub(super) own: [u8; 6],
    pub(super) pairs: u16,
    /// The checksum's offload is in force, and segmentation's.
    offloads: [bool; 2],
}

impl Listening {
    pub(super) fn new(mode: &Mode) -> Self {
        let filters_vlans = mode.has(VIRTIO_NET_F_CTRL_VLAN) && mode.has(VIRTIO_NET_F_CTRL_VQ);
        let all = mode.has(VIRTIO_NET_F_MQ) && !mode.has(VIRTIO_NET_F_CTRL_VQ);
        Self {
            modes: [false; 6],
            is_silent: true,
            unicast: Vec::new(),
            multicast: Vec::new(),
            vlans: filters_vlans.then(Vec::new),
            own: OWN,
            pairs: if all { mode.pairs } else { 1 },
            offloads: [mode.has(VIRTIO_NET_F_GUEST_CSUM), mode.has(VIRTIO_NET_F_GUEST_TSO4)],
        }
    }

    /// What the device may leave to the driver.
    pub(super) fn allowed(&self) -> Allowed {
        let [csum, tso4] = self.offloads;
        Allowed { csum, tso4, valid: csum }
    }

    /// Whether the driver is to get a frame.
    pub(super) fn wants(&self, frame: &[u8]) -> Result<(), Reason> {
        let [all, all_groups, all_others, no_groups, no_unicast, no_broadcast] = self.modes;
        if all {
            return Ok(());
        }
        if let (Some(vlans), Some(vlan)) = (&self.vlans, vlan_of(frame))
            // A tag that names no VLAN has a priority only.
            && vlan != 0
            && !vlans.contains(&vlan)
        {
            return Err("unwanted_vlan");
        }
        let to: [u8; 6] = frame[..6].try_into().expect("a frame has an address");
        let (is_wanted, unwanted) = if self.is_silent {
            (true, "")
        } else if to == BROADCAST {
            (!no_broadcast, "unwanted_broadcast")
        } else if to[0] & 1 != 0 {
            (!no_groups && (all_groups || self.multicast.contains(&to)), "unwanted_multicast")
        } else {
            let listens = all_others || to == self.own || self.unicast.contains(&to);
            (!no_unicast && listens, "unwanted_unicast")
        };
        if is_wanted { Ok(()) } else { Err(unwanted) }
    }

    /// Carries a command out, which was answered with OK.
    pub(super) fn obey(&mut self, said: Said) {
        match said {
            Said::Mode(mode, is_on) => {
                self.modes[mode] = is_on;
                self.is_silent &= mode != 0;
            }
            Said::Table(unicast, multicast) => {
                (self.unicast, self.multicast) = (unicast, multicast);
            }
            Said::Own(own) => self.own = own,
            Said::Vlan(vlan, listens) => {
                let vlans = self.vlans.as_mut().expect("it was negotiated");
                vlans.retain(|known| *known != vlan);
                vlans.extend(listens.then_some(vlan));
            }
            Said::Announced => {}
            Said::Pairs(pairs) => self.pairs = pairs,
            Said::Offloads(offloads) => self.offloads = offloads,
        }
    }
}

/// What a command says.
#[derive(Clone, Debug)]
pub(super) enum Said {
    Mode(usize, bool),
    Table(Vec<[u8; 6]>, Vec<[u8; 6]>),
    Own([u8; 6]),
    Vlan(u16, bool),
    Announced,
    Pairs(u16),
    Offloads([bool; 2]),
}

/// A command: its bytes, and what it says to a device that knows it.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) bytes: Vec<u8>,
    pub(super) said: Option<Said>,
}

impl Command {
    pub(super) fn any(mode: &Mode, random: &mut Random) -> Self {
        let (feature, bytes, said) = Self::draw(mode, random);
        let said = said.filter(|_| mode.has(feature));
        if random.once_in(12) {
            return Self::spoilt(bytes, random);
        }
        Self { bytes, said }
    }

    /// Cut short, or longer than it is.
    fn spoilt(mut bytes: Vec<u8>, random: &mut Random) -> Self {
        if random.once_in(2) {
            bytes.truncate(random.index(bytes.len()));
        } else {
            bytes.push(0);
        }
        Self { bytes, said: None }
    }

    fn draw(mode: &Mode, random: &mut Random) -> (u64, Vec<u8>, Option<Said>) {
        match random.within(0..10) {
            0..3 => {
                let number = random.index(6);
                let value = random.pick(&[0, 0, 1, 1, 2]);
                let feature =
                    if number < 2 { VIRTIO_NET_F_CTRL_RX } else { VIRTIO_NET_F_CTRL_RX_EXTRA };
                let said = (value < 2).then_some(Said::Mode(number, value == 1));
                (feature, vec![0, number as u8, value], said)
            }
            3 => {
                let unicast: Vec<_> = OTHERS.into_iter().filter(|_| random.once_in(2)).collect();
                let multicast: Vec<_> = GROUPS.into_iter().filter(|_| random.once_in(2)).collect();
                let mut bytes = vec![1, 0];
                for table in [&unicast, &multicast] {
                    bytes.extend((table.len() as u32).to_le_bytes());
                    bytes.extend(table.concat());
                }
                (VIRTIO_NET_F_CTRL_RX, bytes, Some(Said::Table(unicast, multicast)))
            }
            4 => {
                let own = random.pick(&[OWN, OTHERS[0], GROUPS[0], [0; 6]]);
                let said = [OWN, OTHERS[0]].contains(&own).then_some(Said::Own(own));
                (VIRTIO_NET_F_CTRL_MAC_ADDR, [&[1, 1][..], &own].concat(), said)
            }
            5 | 6 => {
                let (vlan, listens) = (random.pick(&VLANS), random.once_in(2));
                let [low, high] = vlan.to_le_bytes();
                let bytes = vec![2, u8::from(!listens), low, high];
                (VIRTIO_NET_F_CTRL_VLAN, bytes, Some(Said::Vlan(vlan, listens)))
            }
            7 => (VIRTIO_NET_F_GUEST_ANNOUNCE, vec![3, 0], Some(Said::Announced)),
            8 => {
                let pairs = random.within(0..u64::from(mode.pairs) + 2) as u16;
                let said = (1..=mode.pairs).contains(&pairs).then_some(Said::Pairs(pairs));
                (VIRTIO_NET_F_MQ, [&[4, 0][..], &pairs.to_le_bytes()].concat(), said)
            }
            _ => {
                let negotiated =
                    [mode.has(VIRTIO_NET_F_GUEST_CSUM), mode.has(VIRTIO_NET_F_GUEST_TSO4)];
                let [csum, tso4] = [random.once_in(2), random.once_in(2)];
                let bits = if csum { VIRTIO_NET_F_GUEST_CSUM } else { 0 }
                    | if tso4 { VIRTIO_NET_F_GUEST_TSO4 } else { 0 };
                let may = csum <= negotiated[0] && tso4 <= negotiated[1] && tso4 <= csum;
                let bytes = [&[5, 0][..], &bits.to_le_bytes()].concat();
                let said = may.then_some(Said::Offloads([csum, tso4]));
                (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, bytes, said)
            }
        }
    }
}
