//! The console device: control messages of any bytes in any pieces, and buffers of any size for the answers. What is counted of
//! each message is compared with what the text says of it, and so is what the driver is told of each port.
//!
//! Input: features (1 byte), the seed of what is left to chance (1 byte), then steps: a byte that says whether a message or
//! buffers come, and in what pieces; a byte for the length of either; and the message.
//!
//! No port comes or goes here, and nobody is at their other ends: the device's own simulation has that.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::Arc;

use common::device::Device;
use common::simulation::{Buffer, Driver, Guest, Layout, Random, Stage};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};

use crate::script::Script;

/// VIRTIO 1.3, 5.3.2 and 5.3.3.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
const MULTIPORT: u64 = 1 << 1;

/// VIRTIO 1.3, 5.3.6.2: events, by their numbers.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What is to be told of each port that the driver is ready for: a console with a name, a port with a name, one without.
const PORTS: [&[u16]; 3] = [&[CONSOLE_PORT, PORT_NAME, RESIZE], &[PORT_NAME], &[]];
const STEPS_MAX: usize = 64;
/// Turns that a worker may take for one step: then it must have gone to sleep.
const TURNS_MAX: usize = 1000;
/// Memory of each queue, and what is where in it.
const QUEUE_BYTES: u64 = 0x1_0000;
const TABLE: u64 = 0x2000;
const DATA: u64 = 0x4000;
const BUFFER_BYTES: u64 = 0x100;
const RING_SIZE: u16 = 16;

/// What the driver knows of a port.
#[derive(Clone, Debug, Default)]
enum Standing {
    #[default]
    Untold,
    Added,
    /// What it has yet to be told.
    Ready(BTreeSet<u16>),
}

/// Runs one device.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data);
    let flags = script.u8();
    let optional = [(0, VIRTIO_F_INDIRECT_DESC), (1, VIRTIO_F_EVENT_IDX)];
    let optional = optional.iter().filter(|(bit, _)| flags >> bit & 1 != 0);
    let features = optional.fold(VIRTIO_F_VERSION_1 | MULTIPORT, |all, (_, feature)| all | feature);
    Bench::new(Arc::new(device()), features, script).run();
}

fn device() -> impl Device {
    let words = [
        "vhost-console",
        "--socket-path=none",
        "--port=name=a,console,endpoint=null",
        "--port=name=b,endpoint=null",
        "--port=endpoint=null",
    ];
    vhost_console::open(words.into_iter().map(OsString::from)).expect("a console")
}

/// A guest and a worker.
struct Bench<'a, D: Device> {
    guest: Arc<Guest>,
    stage: Stage<D>,
    to_driver: Driver,
    from_driver: Driver,
    features: u64,
    random: Random,
    script: Script<'a>,
    standings: [Standing; PORTS.len()],
    /// The driver has said that it is there.
    listens: bool,
    /// Where the buffers are that the device has, the oldest first, and their sizes.
    offered: Vec<(u64, u32)>,
    /// Places for buffers that it does not have.
    free: Vec<u64>,
}

impl<'a, D: Device> Bench<'a, D> {
    fn new(device: Arc<D>, features: u64, mut script: Script<'a>) -> Self {
        let seed = u64::from(script.u8());
        let guest = Arc::new(Guest::new(&[(0, 2 * QUEUE_BYTES)]));
        let mut stage = Stage::new(device, seed);
        let [to_driver, from_driver] =
            [(CONTROL_RECEIVE, 0), (CONTROL_TRANSMIT, QUEUE_BYTES)].map(|(index, at)| {
                let (available, used) = (at + 0x400, at + 0x800);
                let layout = Layout { size: RING_SIZE, descriptors: at, available, used };
                let driver = Driver::new(Arc::clone(&guest), layout, features);
                stage.start(index, driver.setup(0)).expect("a ring");
                driver
            });
        let places = (0..u64::from(RING_SIZE)).map(|place| DATA + place * BUFFER_BYTES);
        Self {
            guest,
            stage,
            to_driver,
            from_driver,
            features,
            random: Random::new(seed),
            script,
            standings: Default::default(),
            listens: false,
            offered: Vec::new(),
            free: places.collect(),
        }
    }

    fn run(mut self) {
        for _ in 0..STEPS_MAX {
            if self.script.is_empty() {
                break;
            }
            let shape = self.script.u8();
            let len = self.script.u8();
            if shape & 1 == 0 {
                let message = self.script.bytes(usize::from(len % 32)).to_vec();
                self.say(&message, shape);
            } else {
                self.offer(u32::from(len) + 1, shape);
            }
            self.hear();
        }
    }

    /// The driver says something, in pieces.
    fn say(&mut self, message: &[u8], shape: u8) {
        if message.is_empty() {
            return;
        }
        let mut at = QUEUE_BYTES + DATA;
        let mut readable: Vec<Buffer> = Vec::new();
        for piece in message.chunks([message.len(), 1, 3, 7][usize::from(shape >> 1 & 3)]).take(12)
        {
            self.guest.write(at, piece);
            readable.push((at, piece.len() as u32));
            at += piece.len() as u64;
        }
        let said: usize = readable.iter().map(|(_, len_bytes)| *len_bytes as usize).sum();
        let is_indirect = shape & 8 != 0 && self.features & VIRTIO_F_INDIRECT_DESC != 0;
        let table = is_indirect.then_some(QUEUE_BYTES + TABLE);
        let added = self.from_driver.add((&readable, &[]), table, &mut self.random);
        assert!(added.is_some(), "the ring is empty");
        if self.from_driver.publish() {
            self.stage.kernel().kick(CONTROL_TRANSMIT);
        }
        let due = self.judge(&message[..said]);
        let before = due.map(|reason| self.counted(CONTROL_TRANSMIT, reason));
        self.rest();
        let used = self.from_driver.take_used();
        assert!(matches!(&used[..], [used] if used.written_bytes == 0), "{used:?}");
        if let (Some(reason), Some(before)) = (due, before) {
            let counted = self.counted(CONTROL_TRANSMIT, reason);
            assert_eq!(counted, before + 1, "{message:x?} is counted as {reason:?}");
        }
    }

    /// What a message changes, or why it is counted.
    fn judge(&mut self, message: &[u8]) -> Option<&'static str> {
        let Some(&[i, j, k, l, e, f, v, w]) = message.first_chunk::<8>() else {
            return Some("short_message");
        };
        let id = u32::from_le_bytes([i, j, k, l]) as usize;
        let is_so = u16::from_le_bytes([v, w]) != 0;
        let event = u16::from_le_bytes([e, f]);
        if event == DEVICE_READY {
            self.standings = Default::default();
            self.listens = is_so;
            return (!is_so).then_some("port_failed");
        }
        if !matches!(event, PORT_READY | PORT_OPEN) {
            return Some("unknown_message");
        }
        let (Some(standing), Some(words)) = (self.standings.get_mut(id), PORTS.get(id)) else {
            return Some("unknown_port");
        };
        let ready = Standing::Ready(words.iter().copied().collect());
        match (event, &standing) {
            (PORT_READY, _) if is_so => *standing = ready,
            (PORT_READY, _) => {
                *standing = Standing::Added;
                return Some("port_failed");
            }
            (_, Standing::Added) => return Some("unknown_port"),
            // A driver that wakes from hibernation opens ports that it was not told of since.
            (_, Standing::Untold) => *standing = ready,
            (_, Standing::Ready(_)) => {}
        }
        self.listens = true;
        None
    }

    /// Gives the device a buffer to say something in.
    fn offer(&mut self, room_bytes: u32, shape: u8) {
        // One place stays free: the ring has as many entries as there are places.
        let Some(at) = self.free.pop() else { return };
        let room_bytes = if shape & 2 == 0 { room_bytes } else { room_bytes % 12 + 1 };
        let added = self.to_driver.add((&[], &[(at, room_bytes)]), None, &mut self.random);
        assert!(added.is_some(), "there is a place for each entry");
        self.offered.push((at, room_bytes));
        self.to_driver.publish();
    }

    /// What the device has said is what the driver did not know; and it has said all that there are buffers for.
    fn hear(&mut self) {
        // The main thread tells the one queue what the other has brought about; it is not here.
        self.stage.kernel().kick(CONTROL_RECEIVE);
        self.rest();
        let small = self.counted(CONTROL_RECEIVE, "small_buffer");
        let mut empty = 0;
        for used in self.to_driver.take_used() {
            let (at, room_bytes) = self.offered.remove(0);
            self.free.push(at);
            assert!(used.written_bytes <= room_bytes, "{used:?} of {room_bytes}");
            if used.written_bytes == 0 {
                empty += 1;
                assert!(room_bytes < 13, "{room_bytes} bytes have room for any message here");
                continue;
            }
            self.take_note(&self.guest.read(at, used.written_bytes as usize));
        }
        assert!(small >= empty, "what comes back empty is counted");
        assert!(
            self.offered.is_empty() || !self.has_more(),
            "the device keeps something to itself"
        );
    }

    fn take_note(&mut self, message: &[u8]) {
        assert!(self.listens, "nobody listens");
        let Some(&[i, j, k, l, e, f, ..]) = message.first_chunk::<8>() else {
            panic!("{message:x?} is no message");
        };
        let id = u32::from_le_bytes([i, j, k, l]) as usize;
        let event = u16::from_le_bytes([e, f]);
        match &mut self.standings[id] {
            standing @ Standing::Untold => {
                assert_eq!(event, DEVICE_ADD, "port {id}");
                *standing = Standing::Added;
            }
            Standing::Added => panic!("port {id} is not ready for {event}"),
            Standing::Ready(untold) => assert!(untold.remove(&event), "port {id} knows {event}"),
        }
    }

    fn has_more(&self) -> bool {
        let has_more = |standing: &Standing| match standing {
            Standing::Untold => true,
            Standing::Added => false,
            Standing::Ready(untold) => !untold.is_empty(),
        };
        self.listens && self.standings.iter().any(has_more)
    }

    /// The worker does what it can, and goes to sleep.
    fn rest(&mut self) {
        let mut turns = 0;
        while self.stage.turn() {
            turns += 1;
            assert!(turns < TURNS_MAX, "the worker does not go to sleep");
        }
    }

    fn counted(&self, queue: u16, reason: &str) -> u64 {
        let metrics = self.stage.metrics();
        let place = metrics.vocabulary.drops.iter().position(|name| *name == reason);
        let place = place.unwrap_or_else(|| panic!("nothing is counted as {reason:?}"));
        metrics.queues[usize::from(queue)].drops[place].get()
    }
}
