//! The block device: requests of any bytes in any pieces, a disk that holds, shortens and fails what it is asked for, a
//! driver that changes requests after it has made them. Each answer is compared with what the text says of the request,
//! and each operation with what the request allows.
//!
//! Input: which disk (2 bits) and features (1 byte in all), the seed of what is left to chance (1 byte), then steps: a byte
//! that says which, and what it takes (see [`Bench::step`]).

mod ask;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use common::device::Device;
use common::engine::Zeroing;
use common::simulation::{Buffer, Driver, Guest, Layout, Operation, Random, Stage, Work};
use common::virtqueue::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use self::ask::{Ask, Due, Facts, PLACE_BYTES, SECTOR, pieces};
use crate::script::Script;

const SECTORS: u64 = 24;
const RING: Layout = Layout { size: 16, descriptors: 0, available: 0x400, used: 0x800 };
/// Where requests lie.
const PLACES: u64 = 0x1000;
const PLACES_COUNT: u64 = 8;
const MEMORY_BYTES: u64 = PLACES + PLACES_COUNT * PLACE_BYTES;
const STEPS_MAX: usize = 128;
/// Turns that a worker may take with nothing more to do: it must go to sleep.
const TURNS_MAX: usize = 10_000;

/// VIRTIO 1.3, 5.2.3: feature bits.
const RO: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
/// VIRTIO 1.3, 5.2.4: offsets in the configuration space.
const MAX_DISCARD: u32 = 36;
const MAX_WRITE_ZEROES: u32 = 48;

/// Runs one device, of its own: it remembers a sync that has failed.
pub fn run(data: &[u8]) {
    const WAYS: [&str; 4] =
        ["--cache=writeback", "--cache=writethrough", "--read-only", "--logical-block-size=4096"];
    let mut script = Script::new(data);
    let flags = script.u8();
    let device = Arc::new(device(WAYS[usize::from(flags & 3)]));
    Bench::new(device, flags, script).run();
}

/// A device over a file that nobody reads or writes: what an operation moves is decided here.
fn device(way: &str) -> impl Device {
    let file = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&file, SECTORS * SECTOR as u64).expect("its length");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let words = ["vhost-blk", "--socket-path=none", "--no-lock", "--blk-file", &path, way];
    vhost_blk::open(words.map(OsString::from)).expect("a disk")
}

/// A request that the device has, or will find.
struct Pending {
    ask: Ask,
    place: u64,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    /// The driver has written to its memory since.
    changed: bool,
    /// It has had operations, syncs aside.
    operated: bool,
    /// One of its operations failed, or a sync for it and others.
    failed: bool,
}

/// A guest, a worker and a disk.
struct Bench<'a, D: Device> {
    guest: Arc<Guest>,
    stage: Stage<D>,
    driver: Driver,
    random: Random,
    facts: Facts,
    script: Script<'a>,
    /// By head.
    pending: BTreeMap<u16, Pending>,
    places: Vec<u64>,
    /// Operations that have been looked at.
    seen: u64,
    broken: bool,
    /// A sync has failed: nothing is called stable any more.
    lost: bool,
    /// By head: what has had an operation end since the last turn, syncs aside.
    ended: BTreeSet<u16>,
    /// A sync has ended since the last turn: whether in vain.
    synced: Option<bool>,
    indirect: bool,
}

impl<'a, D: Device> Bench<'a, D> {
    fn new(device: Arc<D>, flags: u8, mut script: Script<'a>) -> Self {
        let mut features = 0;
        for (bit, feature) in
            [(2, FEATURE_FLUSH), (3, VIRTIO_F_INDIRECT_DESC), (4, VIRTIO_F_EVENT_IDX)]
        {
            features |= if flags >> bit & 1 == 1 { feature } else { 0 };
        }
        let seed = u64::from(script.u8());
        let guest = GUEST.with(Arc::clone);
        guest.write(0, &[0; MEMORY_BYTES as usize]);
        let driver = Driver::new(Arc::clone(&guest), RING, features);
        let facts = facts(&*device);
        let mut stage = Stage::new(device, seed);
        stage.start(0, driver.setup(0)).expect("a ring");
        let places = (0..PLACES_COUNT).map(|number| PLACES + number * PLACE_BYTES).collect();
        Self {
            guest,
            stage,
            driver,
            random: Random::new(seed),
            facts,
            script,
            pending: BTreeMap::new(),
            places,
            seen: 0,
            broken: false,
            lost: false,
            ended: BTreeSet::new(),
            synced: None,
            indirect: features & VIRTIO_F_INDIRECT_DESC != 0,
        }
    }

    fn run(mut self) {
        for _ in 0..STEPS_MAX {
            if self.script.is_empty() {
                break;
            }
            self.step();
        }
        self.settle();
        assert!(self.broken || self.pending.is_empty(), "requests without an answer");
    }

    fn step(&mut self) {
        match self.script.below(8) {
            0..3 => self.send(),
            3 | 4 => self.turn(),
            5 | 6 => {
                let held = self.stage.kernel().held();
                if !held.is_empty() {
                    let operation = &held[self.script.below(held.len().min(256))];
                    let fate = self.script.u8();
                    self.end(operation, fate);
                }
            }
            _ => match self.script.below(4) {
                0 => self.restart(),
                _ => self.change(),
            },
        }
    }

    /// The driver makes a request.
    fn send(&mut self) {
        let ask = Ask::new(&mut self.script, &self.facts);
        // A chain has a descriptor.
        if ask.sent.is_empty() && ask.room_bytes == 0 {
            return;
        }
        let Some(place) = self.places.pop() else { return };
        // The indirect table comes first.
        let mut at = place + 0x100;
        let readable = pieces(ask.sent.len(), &mut at, &mut self.script);
        let writable = pieces(ask.room_bytes, &mut at, &mut self.script);
        assert!(at <= place + PLACE_BYTES, "a place has room for a request");
        let mut rest = ask.sent.as_slice();
        for (at, len_bytes) in &readable {
            let (piece, later) = rest.split_at(*len_bytes as usize);
            self.guest.write(*at, piece);
            rest = later;
        }
        let table = self.script.bool() && self.indirect;
        let table = table.then_some(place);
        let (changed, operated, failed) = (false, false, false);
        match self.driver.add((&readable, &writable), table, &mut self.random) {
            Some(head) => {
                let pending = Pending { ask, place, readable, writable, changed, operated, failed };
                self.pending.insert(head, pending);
                if self.driver.publish() {
                    self.stage.kernel().kick(0);
                }
            }
            None => self.places.push(place),
        }
    }

    /// The worker does what it can, and goes to sleep.
    fn turn(&mut self) {
        let mut turns = 0;
        while self.stage.turn() {
            turns += 1;
            assert!(turns < TURNS_MAX, "the worker does not go to sleep");
        }
        for operation in self.stage.kernel().held() {
            if operation.number >= self.seen {
                self.check_operation(&operation);
            }
        }
        self.seen = self.stage.kernel().submitted();
        self.broken |= self.stage.kernel().errors(0) > 0;
        for used in self.driver.take_used() {
            let mut pending = self.pending.remove(&used.head).expect("the driver's books");
            // One sync serves all that wait for it: whose own operations had ended before.
            let waits = pending.operated || pending.ask.due == Due::Flush;
            if waits && !self.ended.contains(&used.head) && !pending.changed {
                pending.failed |= self.synced.expect("what nothing has ended for waits for a sync");
            }
            self.check_answer(&pending, used.written_bytes);
            self.places.push(pending.place);
        }
        self.ended.clear();
        self.synced = None;
    }

    /// An operation that a request may not ask for, or not there.
    fn check_operation(&mut self, operation: &Operation) {
        let (range, writes) = match operation.work {
            Work::Read { offset } => (offset..offset + operation.len_bytes() as u64, false),
            Work::Write { offset, durable } => {
                assert!(!durable, "through the host's cache: {operation:?}");
                (offset..offset + operation.len_bytes() as u64, true)
            }
            Work::Zero { offset, len_bytes, .. } => (offset..offset + len_bytes, true),
            Work::Sync => return,
        };
        assert!(range.end <= self.facts.sectors * SECTOR as u64, "beyond the disk: {operation:?}");
        assert!(!(writes && self.facts.read_only), "a read-only disk: {operation:?}");
        let pending = self.pending.get_mut(&operation.slot).expect("the driver's books");
        pending.operated = true;
        if pending.changed {
            return;
        }
        let within = |whole: &Range<u64>| whole.start <= range.start && range.end <= whole.end;
        let legal = match (&pending.ask.due, operation.work) {
            (Due::Read(whole), Work::Read { .. }) => within(whole),
            (Due::Write(whole), Work::Write { .. }) => {
                let from = 16 + (range.start - whole.start) as usize;
                let sent = pending.ask.sent.get(from..from + operation.len_bytes());
                within(whole) && sent == Some(&operation.bytes())
            }
            (Due::Discard(segments) | Due::WriteZeroes(segments), Work::Zero { .. }) => {
                segments.iter().any(within)
            }
            _ => false,
        };
        assert!(legal, "{operation:?} for {:x?}", pending.ask);
    }

    fn check_answer(&self, pending: &Pending, written_bytes: u32) {
        let room: Vec<u8> = pending
            .writable
            .iter()
            .flat_map(|(at, len_bytes)| self.guest.read(*at, *len_bytes as usize))
            .collect();
        assert!(written_bytes as usize <= room.len(), "{written_bytes} of {} bytes", room.len());
        if pending.changed {
            return;
        }
        let Some((status, data)) = room.split_last() else {
            assert!(self.broken && pending.ask.due == Due::Broken, "no room for a status");
            return;
        };
        let due = match pending.ask.due {
            Due::Refused(status) => status,
            _ => u8::from(pending.failed),
        };
        assert_eq!(*status, due, "the status of {:x?}", pending.ask);
        match &pending.ask.due {
            Due::Read(range) if *status == 0 => {
                let due = range.clone().map(content);
                assert!(data.iter().copied().eq(due), "what was read");
                assert_eq!(written_bytes as usize, room.len());
            }
            _ => {}
        }
    }

    /// Ends an operation, in one of the ways in which the kernel may.
    fn end(&mut self, operation: &Operation, fate: u8) {
        let whole = match operation.work {
            Work::Read { offset } => {
                let end = offset + operation.len_bytes() as u64;
                let bytes: Vec<u8> = (offset..end).map(content).collect();
                operation.fill(&bytes);
                operation.len_bytes() as u32
            }
            Work::Write { .. } => operation.len_bytes() as u32,
            Work::Zero { len_bytes, zeroing: Zeroing::Write, .. } => len_bytes as u32,
            Work::Zero { .. } | Work::Sync => 0,
        };
        let zeroes =
            matches!(operation.work, Work::Zero { zeroing, .. } if zeroing != Zeroing::Write);
        let result = match fate & 7 {
            // The file has come to its end.
            3 => Ok(0),
            4 => Ok(whole.div_ceil(2 + u32::from(fate >> 3))),
            5 => Err(Errno::INTR),
            6 => Err(Errno::IO),
            7 => Err(Errno::OPNOTSUPP),
            _ => Ok(whole),
        };
        // 5.2.6: a discard is a hint; zeroes that the host cannot make by a call are written.
        let survived = match result {
            Ok(bytes) => bytes > 0 || whole == 0,
            Err(Errno::INTR) => true,
            Err(errno) => errno == Errno::OPNOTSUPP && zeroes,
        };
        if operation.work != Work::Sync {
            self.ended.insert(operation.slot);
            if let Some(pending) = self.pending.get_mut(&operation.slot) {
                pending.failed |= !survived;
            }
        } else if result != Err(Errno::INTR) {
            self.lost |= result.is_err();
            self.synced = Some(self.lost);
        }
        self.stage.kernel().end(operation.number, result);
    }

    /// The driver writes to a request that it has made.
    fn change(&mut self) {
        let heads: Vec<u16> = self.pending.keys().copied().collect();
        let Some(head) = heads.get(self.script.below(16)) else { return };
        let Some(pending) = self.pending.get_mut(head) else { return };
        let buffers = if self.script.bool() { &pending.readable } else { &pending.writable };
        let Some((at, len_bytes)) = buffers.get(self.script.below(4)) else { return };
        let offset = u32::from(self.script.u16()) % len_bytes;
        let len = self.script.below(17);
        let bytes = self.script.bytes(len.min((len_bytes - offset) as usize));
        self.guest.write(at + u64::from(offset), bytes);
        pending.changed = true;
    }

    /// The ring stops, and goes on from its base.
    fn restart(&mut self) {
        self.stage.stop(0);
        self.settle();
        let base = self.stage.stopped(0).expect("nothing is held any more");
        // The error was that of the ring before.
        self.stage.start(0, self.driver.setup(base)).expect("a ring");
    }

    /// All that is held ends well.
    fn settle(&mut self) {
        loop {
            self.turn();
            let held = self.stage.kernel().held();
            if held.is_empty() {
                break;
            }
            held.iter().for_each(|operation| self.end(operation, 0));
        }
    }
}

/// What a disk of this thread's guest holds at an offset.
fn content(offset: u64) -> u8 {
    (offset / 256 + offset % 256) as u8
}

/// What a driver learns of a device.
fn facts(device: &impl Device) -> Facts {
    let features = device.features();
    let number = |offset: u32| {
        let mut bytes = [0; 4];
        device.read_config(features, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let limits =
        |feature, offset| (features & feature != 0).then(|| (number(offset + 4), number(offset)));
    Facts {
        sectors: u64::from(number(0)) | u64::from(number(4)) << 32,
        read_only: features & RO != 0,
        discard: limits(FEATURE_DISCARD, MAX_DISCARD),
        write_zeroes: limits(FEATURE_WRITE_ZEROES, MAX_WRITE_ZEROES),
    }
}

thread_local! {
    static GUEST: Arc<Guest> = Arc::new(Guest::new(&[(0, MEMORY_BYTES)]));
}
