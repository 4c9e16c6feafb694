//! Frames, their headers, and what must become of them.
//!
//! Written from the specification and not from the device: the one is to be compared with the other.

use common::simulation::Random;

use super::mode::{Mode, OWN};

/// The longest frame that there is.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// Addresses of groups, and of others.
pub(super) const GROUPS: [[u8; 6]; 2] = [[1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]];
pub(super) const OTHERS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 0x11], [2, 0, 0, 0, 0, 0x22]];
pub(super) const BROADCAST: [u8; 6] = [0xff; 6];
/// VLANs that frames are of.
pub(super) const VLANS: [u16; 3] = [0, 7, 9];

/// Why a frame is dropped: the counter's name.
pub(super) type Reason = &'static str;

/// The fields of a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Fields {
    pub(super) fn bytes(self) -> [u8; 12] {
        let mut bytes = [0; 12];
        (bytes[0], bytes[1]) = (self.flags, self.gso_type);
        for (at, field) in
            [(2, self.hdr_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset)]
        {
            bytes[at..at + 2].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    fn is_segmented(self) -> bool {
        self.gso_type & 0x7f != 0
    }

    /// The header once the frame has got a tag, or lost it.
    fn moved(mut self, by: i16) -> Self {
        if self.flags & 1 != 0 {
            self.csum_start = self.csum_start.wrapping_add_signed(by);
        }
        if self.hdr_len != 0 {
            self.hdr_len = self.hdr_len.saturating_add_signed(by);
        }
        self
    }
}

/// What the other side may be left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowed {
    pub(super) csum: bool,
    pub(super) tso4: bool,
    /// `VIRTIO_NET_HDR_F_DATA_VALID` may be said.
    pub(super) valid: bool,
}

/// A header of one kind or another for a frame of `frame_bytes`.
pub(super) fn any_header(frame_bytes: usize, random: &mut Random) -> Fields {
    let len = frame_bytes.min(60_000) as u16;
    // What means nothing is anything.
    let noise = random.number() as u16;
    let hdr_len = random.pick(&[0, 54, noise]);
    let plain = Fields { flags: random.pick(&[0, 0, 2, 4, 0xfe]), hdr_len, ..Fields::default() };
    if random.once_in(2) {
        return plain;
    }
    if random.once_in(8) {
        return Fields { gso_size: noise, csum_start: noise, csum_offset: noise, ..plain };
    }
    let start = 14 + random.within(0..u64::from(len.max(40) - 30)) as u16;
    let summed = Fields { flags: 1, csum_start: start, csum_offset: 6, ..plain };
    let tso4 = Fields { gso_type: 1, gso_size: 1448, csum_offset: 16, ..summed };
    let is_bad = random.once_in(4);
    match random.within(0..if is_bad { 10 } else { 4 }) {
        0 | 1 => summed,
        2 | 3 => tso4,
        4 => Fields { csum_start: len.saturating_sub(7), ..summed },
        5 => Fields { csum_start: random.within(0..14) as u16, ..summed },
        6 => Fields { gso_size: 0, ..tso4 },
        7 => Fields { flags: 0, ..tso4 },
        8 => Fields { gso_type: random.pick(&[2, 6, 0x7f, 0x83]), ..tso4 },
        _ => Fields { csum_offset: noise, ..tso4 },
    }
}

/// The header as the other side must see it, or why it is none.
pub(super) fn judge(
    fields: Fields,
    frame_bytes: usize,
    allowed: Allowed,
) -> Result<Fields, Reason> {
    if frame_bytes < 14 {
        return Err("runt");
    }
    if frame_bytes > FRAME_BYTES_MAX {
        return Err("giant");
    }
    let sums = fields.flags & 1 != 0;
    let hdr_len = usize::from(fields.hdr_len).min(frame_bytes) as u16;
    let valid = if allowed.valid { fields.flags & 2 } else { 0 };
    let mut seen = Fields { flags: u8::from(sums) | valid, hdr_len, ..Fields::default() };
    let (start, offset) = (usize::from(fields.csum_start), usize::from(fields.csum_offset));
    if sums {
        if !allowed.csum {
            return Err("not_negotiated");
        }
        if start + offset + 2 > frame_bytes {
            return Err("checksum_outside");
        }
        if start < 14 {
            return Err("checksum_in_ethernet");
        }
        (seen.csum_start, seen.csum_offset) = (fields.csum_start, fields.csum_offset);
    }
    match fields.gso_type {
        0 | 0x80 => {}
        1 if !allowed.tso4 => return Err("not_negotiated"),
        1 if !sums => return Err("gso_checksum"),
        1 if fields.gso_size == 0 => return Err("gso_size"),
        1 if offset != 16 || start + 20 > frame_bytes => return Err("gso_header"),
        1 => (seen.gso_type, seen.gso_size) = (1, fields.gso_size),
        _ => return Err("gso_type"),
    }
    Ok(seen)
}

/// How long frames are.
fn any_len(random: &mut Random) -> usize {
    let ranges = [(14, 19), (14, 19), (19, 64), (60, 1515), (60, 1515), (1000, 3000), (3000, 9015)];
    let (least, end) = random.pick(&ranges);
    let is_long = random.once_in(40);
    random.within(if is_long { 60_000..FRAME_BYTES_MAX as u64 + 1 } else { least..end }) as usize
}

/// The bytes of a frame that no other frame has.
fn any_bytes(number: u32, from: [u8; 6], random: &mut Random) -> Vec<u8> {
    let len = any_len(random);
    let to = match random.within(0..8) {
        0 | 1 => BROADCAST,
        2 => random.pick(&GROUPS),
        3 => random.pick(&OTHERS),
        _ => OWN,
    };
    let mut frame = [to, from].concat();
    if len >= 16 && random.once_in(3) {
        let vlan = random.pick(&VLANS) | 0x2000;
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    // An EtherType that is none of a tag.
    frame.extend([0x40 | (number >> 8) as u8 & 0x3f, number as u8]);
    // It may end with its tag.
    frame.truncate(len);
    let (low, high) = (number as u8, (number >> 8) as u8);
    frame.extend((0..len.saturating_sub(frame.len())).map(|at| match at % 3 {
        0 => low,
        1 => high,
        _ => (at / 3) as u8,
    }));
    frame
}

/// The VLAN of a frame's tag, if it has one.
pub(super) fn vlan_of(frame: &[u8]) -> Option<u16> {
    let is_tagged = frame.len() >= 16 && frame[12..14] == [0x81, 0];
    is_tagged.then(|| u16::from_be_bytes([frame[14], frame[15]]) & 0xfff)
}

/// A frame on its way to the guest.
#[derive(Clone, Debug)]
pub(super) struct Inbound {
    pub(super) fields: Fields,
    pub(super) frame: Vec<u8>,
}

impl Inbound {
    pub(super) fn any(number: u32, random: &mut Random) -> Self {
        let mut frame = any_bytes(number, [2, 0, 0, 0, (number >> 8) as u8, number as u8], random);
        let fields = any_header(frame.len(), random);
        if random.once_in(100) {
            frame.truncate(random.within(0..14) as usize);
        }
        Self { fields, frame }
    }

    /// One for the guest, without anything special.
    pub(super) fn plain(number: u32, frame_bytes: usize) -> Self {
        let mut frame = [OWN, OTHERS[0]].concat();
        frame.resize(frame_bytes, number as u8);
        Self { fields: Fields::default(), frame }
    }

    /// As a tap has it.
    pub(super) fn on_the_wire(&self) -> Vec<u8> {
        [&self.fields.bytes()[..], &self.frame].concat()
    }

    /// As the driver must see it, if it listens to such frames: header and frame.
    pub(super) fn seen(
        &self,
        mode: &Mode,
        allowed: Allowed,
        wants: impl Fn(&[u8]) -> Result<(), Reason>,
    ) -> Result<(Fields, Vec<u8>), Reason> {
        let mut fields = judge(self.fields, self.frame.len(), allowed)?;
        let mut frame = self.frame.clone();
        if let Some(vlan) = mode.vlan {
            if vlan_of(&frame) != Some(vlan) {
                return Err("vlan");
            }
            if frame.len() < 18 {
                return Err("runt");
            }
            if fields.flags & 1 != 0 && fields.csum_start < 18 {
                return Err("checksum_in_ethernet");
            }
            fields = fields.moved(-4);
            frame.drain(12..16);
        }
        wants(&frame)?;
        let ethernet = if vlan_of(&frame).is_some() { 18 } else { 14 };
        let is_long = mode.mtu_in_force().is_some_and(|mtu| frame.len() > mtu + ethernet);
        if is_long && !fields.is_segmented() { Err("too_long") } else { Ok((fields, frame)) }
    }
}

/// What a guest sends: the bytes of a chain.
#[derive(Clone, Debug)]
pub(super) struct Outbound {
    pub(super) chain: Vec<u8>,
    /// What is to be on the wire.
    pub(super) wire: Result<Vec<u8>, Reason>,
}

impl Outbound {
    pub(super) fn any(number: u32, mode: &Mode, own: [u8; 6], random: &mut Random) -> Self {
        let from = if random.once_in(12) { OTHERS[0] } else { own };
        let mut frame = any_bytes(number, from, random);
        match random.within(0..60) {
            0 => frame.truncate(random.within(0..14) as usize),
            1 => frame.resize(FRAME_BYTES_MAX + random.within(0..100) as usize, 1),
            _ => {}
        }
        let fields = any_header(frame.len(), random);
        let mut chain = fields.bytes()[..mode.header_bytes()].to_vec();
        if mode.header_bytes() == 12 && random.once_in(4) {
            // VIRTIO 1.3, 5.1.6.2: num_buffers is unused on transmitted packets.
            chain[10] = number as u8;
        }
        if random.once_in(60) {
            chain.truncate(random.within(1..mode.header_bytes() as u64) as usize);
            return Self { chain, wire: Err("no_header") };
        }
        chain.extend(&frame);
        let wire = Self::judge(fields, frame, mode, own);
        Self { chain, wire }
    }

    fn judge(
        fields: Fields,
        mut frame: Vec<u8>,
        mode: &Mode,
        own: [u8; 6],
    ) -> Result<Vec<u8>, Reason> {
        let mut fields = judge(fields, frame.len(), mode.allowed_to_driver())?;
        if mode.only_mac && frame[6..12] != own {
            return Err("spoofed");
        }
        if let Some(vlan) = mode.vlan {
            if vlan_of(&frame).is_some() {
                return Err("vlan");
            }
            if frame.len() + 4 > FRAME_BYTES_MAX {
                return Err("giant");
            }
            if fields.flags & 1 != 0 && fields.csum_start.checked_add(4).is_none() {
                return Err("checksum_outside");
            }
            fields = fields.moved(4);
            let [high, low] = vlan.to_be_bytes();
            frame.splice(12..12, [0x81, 0, high, low]);
        }
        Ok([&fields.bytes()[..], &frame].concat())
    }
}
