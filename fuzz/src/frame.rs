//! The network device: frames and commands of any bytes in any pieces. What becomes of each frame is compared with what
//! the text says of its header, and so are the answer to each command and what it has changed.
//!
//! Input: the port (2 bits), features (4 bytes in all), the seed of what is left to chance (1 byte), then chains: a byte that
//! says which queue and in what pieces, two for the length, and that many bytes.
//!
//! Nothing is received here: what comes from a network is the host's, and the device's own simulation has it.

use std::ffi::OsString;
use std::sync::Arc;

use common::device::Device;
use common::simulation::{Buffer, Driver, Guest, Layout, Random, Stage};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};

use crate::script::Script;

/// The sending queue, and the memory that it has for itself.
const TRANSMIT: u16 = 1;
const QUEUE_BYTES: u64 = 0x2_0000;
const TABLE: u64 = 0x2000;
const DATA: u64 = 0x4000;
const PAIRS: u16 = 2;
const CHAINS_MAX: usize = 64;
/// Turns that a worker may take for one chain: then it must have gone to sleep.
const TURNS_MAX: usize = 1000;
const OWN: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// The largest IP packet behind an Ethernet header with a tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// The longest command that is looked at.
const COMMAND_BYTES_MAX: usize = 64 << 10;

/// VIRTIO 1.3, 5.1.3: feature bits, by their numbers.
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const GUEST_UFO: u64 = 1 << 10;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const HOST_UFO: u64 = 1 << 14;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const GUEST_USO: u64 = 3 << 54;
const HOST_USO: u64 = 1 << 56;
const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO;

/// A port, as the operator has it.
#[derive(Clone, Copy)]
struct Port {
    only_mac: bool,
    has_vlan: bool,
}

/// Runs one device.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let flags = script.u32();
    let port = Port { only_mac: flags & 1 != 0, has_vlan: flags & 2 != 0 };
    // Bits 2 to 24 are where the text has them, but for the first two; those beyond are spread.
    let spread = [
        (24, CSUM),
        (25, GUEST_CSUM),
        (26, GUEST_USO),
        (27, HOST_USO),
        (28, VIRTIO_F_INDIRECT_DESC),
        (29, VIRTIO_F_EVENT_IDX),
        (30, VIRTIO_F_VERSION_1),
    ];
    let spread = spread.iter().filter(|(bit, _)| flags >> bit & 1 != 0);
    let features = spread.fold(u64::from(flags & 0xff_fffc), |all, (_, feature)| all | feature);
    Bench::new(Arc::new(device(port)), port, features | CTRL_VQ, script).run();
}

fn device(port: Port) -> impl Device {
    let mut words = vec!["vhost-net", "--socket-path=none", "--backend=null", "--queue-pairs=2"];
    words.push("--mac=52:54:00:12:34:56");
    words.extend(port.only_mac.then_some("--only-mac"));
    words.extend(port.has_vlan.then_some("--vlan=7"));
    vhost_net::open(words.into_iter().map(OsString::from)).expect("a network")
}

/// A guest and a worker.
struct Bench<'a, D: Device> {
    guest: Arc<Guest>,
    device: Arc<D>,
    stage: Stage<D>,
    /// The driver's rings, and their indexes.
    drivers: [(u16, Driver); 2],
    port: Port,
    features: u64,
    random: Random,
    script: Script<'a>,
    /// The guest's address.
    mac: [u8; 6],
}

impl<'a, D: Device> Bench<'a, D> {
    fn new(device: Arc<D>, port: Port, features: u64, mut script: Script<'a>) -> Self {
        let seed = u64::from(script.u8());
        let guest = Arc::new(Guest::new(&[(0, 2 * QUEUE_BYTES)]));
        let mut stage = Stage::new(Arc::clone(&device), seed);
        let control = if features & MQ != 0 { 2 * PAIRS } else { 2 };
        let drivers = [(TRANSMIT, 0), (control, QUEUE_BYTES)].map(|(index, at)| {
            let layout =
                Layout { size: 16, descriptors: at, available: at + 0x400, used: at + 0x800 };
            let driver = Driver::new(Arc::clone(&guest), layout, features);
            stage.start(index, driver.setup(0)).expect("a ring");
            (index, driver)
        });
        let random = Random::new(seed);
        Self { guest, device, stage, drivers, port, features, random, script, mac: OWN }
    }

    fn run(mut self) {
        for _ in 0..CHAINS_MAX {
            if self.script.is_empty() {
                break;
            }
            let shape = self.script.u8();
            let len = usize::from(self.script.u16());
            let mut bytes = self.script.bytes(len.min(4096)).to_vec();
            // Long ones are mostly zeros.
            bytes.resize(len.max(bytes.len()) + usize::from(shape >> 7) * 0x400, 0);
            if shape & 1 == 0 {
                self.send(&bytes, shape);
            } else if !self.command(&bytes, shape) {
                break;
            }
        }
    }

    /// The bytes in pieces, in a ring's memory, with room behind them; and how they were given.
    fn give(&mut self, ring: usize, bytes: &[u8], room_bytes: u32, shape: u8) {
        let base = ring as u64 * QUEUE_BYTES;
        let mut at = base + DATA;
        let size = match shape >> 1 & 3 {
            0 => bytes.len(),
            1 => bytes.len().div_ceil(7),
            2 => bytes.len().div_ceil(2),
            _ => bytes.len().max(12) - 11,
        };
        let mut readable: Vec<Buffer> = Vec::new();
        for piece in bytes.chunks(size.max(1)).take(12) {
            self.guest.write(at, piece);
            readable.push((at, piece.len() as u32));
            at += piece.len() as u64;
        }
        let writable: &[Buffer] = if room_bytes > 0 { &[(at, room_bytes)] } else { &[] };
        let is_indirect = shape & 8 != 0 && self.features & VIRTIO_F_INDIRECT_DESC != 0;
        let table = is_indirect.then_some(base + TABLE);
        let (index, driver) = &mut self.drivers[ring];
        let added = driver.add((&readable, writable), table, &mut self.random);
        assert!(added.is_some(), "the ring is empty");
        if driver.publish() {
            self.stage.kernel().kick(*index);
        }
    }

    /// The worker does what it can, and goes to sleep; the lengths that it says it has written.
    fn turn(&mut self, ring: usize) -> Vec<u32> {
        let mut turns = 0;
        while self.stage.turn() {
            turns += 1;
            assert!(turns < TURNS_MAX, "the worker does not go to sleep");
        }
        let used = self.drivers[ring].1.take_used();
        used.iter().map(|used| used.written_bytes).collect()
    }

    fn counted(&self, reason: &str) -> u64 {
        let metrics = self.stage.metrics();
        let place = metrics.vocabulary.drops.iter().position(|name| *name == reason);
        let place = place.unwrap_or_else(|| panic!("nothing is counted as {reason:?}"));
        metrics.queues[usize::from(TRANSMIT)].drops[place].get()
    }

    fn sent_bytes(&self) -> u64 {
        let kinds = &self.stage.metrics().queues[usize::from(TRANSMIT)].kinds;
        kinds.iter().map(|kind| kind.bytes.get()).sum()
    }

    /// The driver sends what may be a frame.
    fn send(&mut self, chain: &[u8], shape: u8) {
        if chain.is_empty() {
            return;
        }
        let due = judge(chain, self.features, self.port, self.mac);
        let (reason, before_bytes) = (due.err(), self.sent_bytes());
        let before = reason.map(|reason| self.counted(reason));
        self.give(0, chain, 0, shape);
        assert_eq!(self.turn(0), [0], "a chain that was sent comes back unwritten");
        let sent_bytes = self.sent_bytes() - before_bytes;
        assert_eq!(sent_bytes, due.unwrap_or(0) as u64, "{reason:?}");
        if let (Some(reason), Some(before)) = (reason, before) {
            assert_eq!(self.counted(reason), before + 1, "it is counted as {reason:?}");
        }
    }

    /// The driver makes what may be a command; false when it has broken the ring.
    fn command(&mut self, bytes: &[u8], shape: u8) -> bool {
        let room_bytes = u32::from(shape >> 4 & 3);
        if bytes.is_empty() && room_bytes == 0 {
            return true;
        }
        self.give(1, bytes, room_bytes, shape);
        let used = self.turn(1);
        if room_bytes == 0 {
            let control = self.drivers[1].0;
            assert_eq!(self.stage.kernel().errors(control), 1, "no room for an answer");
            return false;
        }
        assert_eq!(used, [1], "an answer is a byte");
        let at = QUEUE_BYTES + DATA + bytes.len() as u64;
        let is_good = is_command(bytes, self.features);
        assert_eq!(
            self.guest.read(at, 1),
            [u8::from(!is_good)],
            "{:x?}",
            &bytes[..bytes.len().min(32)]
        );
        if let (true, [1, 1, mac @ ..]) = (is_good, bytes) {
            self.mac.copy_from_slice(mac);
        }
        let mut mac = [0; 6];
        self.device.read_config(self.features, 0, &mut mac);
        assert_eq!(mac, self.mac, "the address in the configuration space");
        true
    }
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) | usize::from(bytes[at + 1]) << 8
}

/// How long the frame is that is on the wire, or why there is none (VIRTIO 1.3, 5.1.6.2).
fn judge(chain: &[u8], features: u64, port: Port, own: [u8; 6]) -> Result<usize, &'static str> {
    let header_bytes = if features & (VIRTIO_F_VERSION_1 | MRG_RXBUF) != 0 { 12 } else { 10 };
    let Some((header, frame)) = chain.split_at_checked(header_bytes) else {
        return Err("no_header");
    };
    match frame.len() {
        0..14 => return Err("runt"),
        14..=FRAME_BYTES_MAX => {}
        _ => return Err("giant"),
    }
    let has = |feature: u64| features & feature != 0;
    let sums = header[0] & 1 != 0;
    let [size, start, offset] = [4, 6, 8].map(|at| u16_at(header, at));
    if sums && !has(CSUM) {
        return Err("not_negotiated");
    }
    if sums && start + offset + 2 > frame.len() {
        return Err("checksum_outside");
    }
    if sums && start < 14 {
        return Err("checksum_in_ethernet");
    }
    let (kind, ecn) = (header[1] & 0x7f, header[1] & 0x80 != 0);
    let (feature, transport) = match (kind, ecn) {
        (0, _) => (0, None),
        (1, _) => (HOST_TSO4, Some((20, 16))),
        (4, _) => (HOST_TSO6, Some((20, 16))),
        (3, false) => (HOST_UFO, Some((8, 6))),
        (5, false) => (HOST_USO, Some((8, 6))),
        _ => return Err("gso_type"),
    };
    if let Some((transport_bytes, checksum_at)) = transport {
        if !has(feature) || ecn && !has(HOST_ECN) {
            return Err("not_negotiated");
        }
        if !sums {
            return Err("gso_checksum");
        }
        if size == 0 {
            return Err("gso_size");
        }
        if offset != checksum_at || start + transport_bytes > frame.len() {
            return Err("gso_header");
        }
    }
    if port.only_mac && frame[6..12] != own {
        return Err("spoofed");
    }
    if !port.has_vlan {
        return Ok(frame.len());
    }
    if frame.len() >= 16 && frame[12..14] == [0x81, 0] {
        return Err("vlan");
    }
    if frame.len() + 4 > FRAME_BYTES_MAX {
        return Err("giant");
    }
    if sums && start + 4 > usize::from(u16::MAX) {
        return Err("checksum_outside");
    }
    Ok(frame.len() + 4)
}

/// Whether this is a command that can be carried out (VIRTIO 1.3, 5.1.6.5).
fn is_command(bytes: &[u8], features: u64) -> bool {
    let has = |feature: u64| features & feature != 0;
    match bytes {
        _ if bytes.len() > COMMAND_BYTES_MAX => false,
        [0, 0 | 1, value] => has(CTRL_RX) && *value < 2,
        [0, 2..=5, value] => has(CTRL_RX_EXTRA) && *value < 2,
        [1, 0, tables @ ..] => has(CTRL_RX) && are_tables(tables),
        [1, 1, mac @ ..] => {
            has(CTRL_MAC_ADDR)
                && mac.len() == 6
                && mac[0] & 1 == 0
                && mac.iter().any(|byte| *byte > 0)
        }
        [2, 0 | 1, _, high] => has(CTRL_VLAN) && *high < 16,
        [3, 0] => has(GUEST_ANNOUNCE),
        [4, 0, low, high] => has(MQ) && (1..=PAIRS).contains(&u16::from_le_bytes([*low, *high])),
        [5, 0, bits @ ..] => {
            let bits = bits.try_into().map(u64::from_le_bytes);
            has(CTRL_GUEST_OFFLOADS) && bits.is_ok_and(|bits| are_offloads(bits, features))
        }
        _ => false,
    }
}

fn are_tables(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for group in [0, 1] {
        let Some((count, addresses)) = rest.split_first_chunk::<4>() else { return false };
        let len = u64::from(u32::from_le_bytes(*count)) * 6;
        let addresses = usize::try_from(len).ok().and_then(|len| addresses.split_at_checked(len));
        let Some((addresses, behind)) = addresses else { return false };
        if addresses.chunks(6).any(|address| address[0] & 1 != group) {
            return false;
        }
        rest = behind;
    }
    rest.is_empty()
}

fn are_offloads(bits: u64, features: u64) -> bool {
    let has = |offload: u64| bits & offload != 0;
    let segments = GUEST_TSO4 | GUEST_TSO6;
    bits & !(features & GUEST_OFFLOADS) == 0
        && (has(GUEST_CSUM) || !has(segments | GUEST_UFO | GUEST_USO | GUEST_ECN))
        && (has(segments) || !has(GUEST_ECN))
}
