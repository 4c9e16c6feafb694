//! The ring against `virtio_queue::Queue`: random tables, rings and notification fields, good and
//! bad, are given to both over equal memory.
//!
//! Where the oracle is right, both must do the same: give the same chains, leave the same bytes in
//! the used ring, want the same calls and kicks. Where we are stricter on purpose, [`Strict`] says
//! why, and the reason must be found in what the driver wrote: so nothing is refused without one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::{Just, Strategy, any, prop};
use proptest::prop_oneof;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::{INDIRECT, NEXT, WRITE};
use crate::memory::HostBuffer;
use crate::simulation::{Driver, Guest, Layout, cases, chosen_seed};
use crate::virtqueue::{
    Chain, MAX_CHAIN_DESCRIPTORS, RingError, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, Virtqueue,
};

/// Rings, then two regions that adjoin, then a hole, then another one.
const REGIONS: [(u64, u64); 4] =
    [(0, 0x4000), (0x4000, 0x1000), (0x5000, 0x1000), (0x8000, 0x5000)];
/// Where descriptors that mean a table find one.
const TABLES: [u64; 4] = [0x3000, 0x3100, 0x4f80, 0x8000];
/// Entries of each such table.
const TABLE_ENTRIES: usize = 12;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A descriptor as a driver may write it: address, bytes, flags, next.
type Raw = (u64, u32, u16, u16);

#[derive(Clone, Debug)]
enum Step {
    /// Makes chains available: those that are neither out nor available already, and for which
    /// there is room; or, carelessly, any.
    Offer { heads: Vec<u16>, careless: bool },
    /// Writes an available index that is off by this much.
    Jump(u16),
    /// The device takes all there is.
    Pop,
    /// The device gives the chain at this place back as used, with this many bytes.
    Use(usize, u32),
    /// The device puts back up to this many chains, the newest first.
    Retract(usize),
    /// The device shows what it used.
    Publish,
    /// The driver writes `used_event`, this far from the index of the last used entry.
    UsedEvent(u16),
    /// The driver writes the available ring's flags.
    Flags(u16),
    /// The device asks for kicks.
    RequestKick,
    /// The device asks for none.
    SuppressKicks,
    /// The driver writes a descriptor anew.
    Describe(u16, Raw),
}

#[derive(Clone)]
struct Case {
    size: u16,
    base: u16,
    features: u64,
    table: Vec<Raw>,
    indirect: Vec<Vec<Raw>>,
    steps: Vec<Step>,
}

/// A line for each part, where the derived form has one for each number.
impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { size, base, features, table, indirect, steps } = self;
        write!(f, "size {size}, base {base}, features {features:#x}, table {table:x?}")?;
        for (at, table) in TABLES.iter().zip(indirect) {
            write!(f, "\nat {at:#x} {table:x?}")?;
        }
        write!(f, "\n{steps:x?}")
    }
}

fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0x4000..0x5f00_u64,
        3 => prop::sample::select(&TABLES[..]),
        1 => prop::sample::select(&[0x3004_u64, 0x3108, 0x4f88, 0x5ffc, 0xfff0][..]),
        1 => prop::sample::select(&[0x5fff_u64, 0x6000, 0x7fff, 0xcfff, u64::MAX, 1 << 63][..]),
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 1..0x100_u32,
        4 => (1..=TABLE_ENTRIES as u32).prop_map(|entries| 16 * entries),
        1 => prop::sample::select(&[0x1000_u32, 0x2000, 0x4000, 0x4010, u32::MAX][..]),
        1 => Just(0),
    ]
}

/// A descriptor at `index` of a table of `entries`: mostly one that ends a chain, or goes on at its
/// neighbour; or any.
fn descriptors(index: u16, entries: u16) -> impl Strategy<Value = Raw> {
    let flags = prop_oneof![
        10 => prop::sample::select(&[0, WRITE, NEXT, NEXT, NEXT | WRITE][..]),
        2 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![20 => 0..entries, 1 => entries..=entries + 1, 1 => any::<u16>()];
    let data = || 0x4000..0x5f00_u64;
    prop_oneof![
        4 => (data(), 1..0x100_u32, prop::sample::select(&[0, WRITE, WRITE][..]), Just(0)),
        3 => (data(), 1..0x100_u32, Just(NEXT), Just((index + 1) % entries)),
        1 => (data(), 1..0x100_u32, Just(NEXT | WRITE), Just((index + 1) % entries)),
        1 => (
            prop::sample::select(&TABLES[..]),
            (1..=TABLE_ENTRIES as u32).prop_map(|entries| 16 * entries),
            prop::sample::select(&[INDIRECT, INDIRECT, INDIRECT, INDIRECT | NEXT][..]),
            Just(0),
        ),
        2 => (addresses(), lengths(), flags, next),
    ]
}

fn tables(entries: u16) -> impl Strategy<Value = Vec<Raw>> {
    (0..entries).map(|index| descriptors(index, entries)).collect::<Vec<_>>()
}

fn steps(size: u16) -> impl Strategy<Value = Step> {
    let heads = prop_oneof![30 => 0..size, 1 => any::<u16>()];
    let entry = prop_oneof![4 => 0..size, 1 => any::<u16>()];
    prop_oneof![
        8 => (prop::collection::vec(heads, 1..4), prop::bool::weighted(0.03))
            .prop_map(|(heads, careless)| Step::Offer { heads, careless }),
        1 => prop_oneof![0..40_u16, any::<u16>()].prop_map(Step::Jump),
        8 => Just(Step::Pop),
        6 => (any::<prop::sample::Index>(), any::<u32>())
            .prop_map(|(at, bytes)| Step::Use(at.index(1 << 16), bytes)),
        2 => (1..4_usize).prop_map(Step::Retract),
        4 => Just(Step::Publish),
        2 => entry.prop_map(Step::UsedEvent),
        1 => (0..2_u16).prop_map(Step::Flags),
        3 => Just(Step::RequestKick),
        2 => Just(Step::SuppressKicks),
        3 => (0..size)
            .prop_flat_map(move |at| (Just(at), descriptors(at, size)))
            .prop_map(|(at, raw)| Step::Describe(at, raw)),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let features = prop::sample::select(
        &[
            0,
            VIRTIO_F_EVENT_IDX,
            VIRTIO_F_INDIRECT_DESC,
            VIRTIO_F_INDIRECT_DESC,
            VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC,
        ][..],
    );
    let base = prop_oneof![Just(0), Just(u16::MAX - 2), any::<u16>()];
    (0..5_u32, base, features).prop_flat_map(|(log2, base, features)| {
        let size = 1 << log2;
        (
            tables(size),
            prop::collection::vec(tables(TABLE_ENTRIES as u16), TABLES.len()),
            prop::collection::vec(steps(size), 1..40),
        )
            .prop_map(move |(table, indirect, steps)| Case {
                size,
                base,
                features,
                table,
                indirect,
                steps,
            })
    })
}

/// Why we refuse a chain that the oracle walks, or walks in part without a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Strict {
    /// The oracle gives a chain without descriptors for a head that is none.
    HeadOutsideTheTable,
    /// The oracle does not know which chains are out. Two chains of one head have one slot, and a
    /// device would answer one request twice.
    HeadThatIsOut,
    /// The oracle ends the chain there, as if the driver had: the device would see half a request.
    NextOutsideTheTable,
    /// Likewise.
    Loop,
    /// The oracle leaves the order to the device; 2.7.4.2 demands it, and a slot relies on it.
    ReadableAfterWritable,
    /// The oracle does not know what was negotiated.
    IndirectWithoutTheFeature,
    /// The oracle ignores `NEXT` there, 2.7.5.3.1 forbids it.
    IndirectWithNext,
    /// The oracle ends the chain there.
    IndirectInIndirect,
    /// The oracle ends the chain at a table that is empty or not of whole descriptors, and allows
    /// more of them than one readv takes.
    IndirectLength,
    /// The oracle reads tables that are misaligned or span regions; no driver makes one.
    IndirectPlace,
    /// The oracle ends the chain at a table that is not in memory.
    IndirectUnmapped,
    /// The oracle ends the chain before it exceeds 4 GiB.
    TooManyBytes,
    /// The oracle leaves it to the device whether a buffer has bytes, and they are in memory.
    BufferNowhere,
}

/// What all cases together have met: a test that meets nothing says nothing.
#[derive(Debug, Default)]
struct Met {
    /// Chains that both took.
    chains: u64,
    /// Times that each reason was the one for refusing a chain.
    refused: BTreeMap<Strict, u64>,
    /// Indexes that both took for a jump.
    jumps: u64,
    /// Calls that both wanted.
    calls: u64,
}

/// Both rings, over equal memory.
struct Pair<'a> {
    met: &'a RefCell<Met>,
    case: Case,
    guest: Arc<Guest>,
    driver: Driver,
    ours: Virtqueue,
    memory: GuestMemoryMmap,
    theirs: Queue,
    out: Vec<Chain>,
    /// All heads that were ever offered.
    offered: Vec<u16>,
    /// The index as we have last looked at it.
    seen: u16,
    /// The index as the driver shows it.
    shown: u16,
    /// Used entries that were not shown yet.
    unpublished: usize,
    used: u16,
    flags: u16,
}

type Verdict = Result<(), TestCaseError>;

macro_rules! agree {
    ($ours:expr, $theirs:expr, $($what:tt)+) => {
        let (ours, theirs) = (&$ours, &$theirs);
        if ours != theirs {
            let what = format!($($what)+);
            return Err(TestCaseError::fail(format!("{what}: {ours:?}, not {theirs:?}")));
        }
    };
}

impl<'a> Pair<'a> {
    fn new(case: Case, met: &'a RefCell<Met>) -> Self {
        let case_base = case.base.to_le();
        let guest = Arc::new(Guest::new(&REGIONS));
        let layout = Layout { size: case.size, descriptors: 0, available: AVAILABLE, used: USED };
        let mut driver = Driver::new(Arc::clone(&guest), layout, case.features);
        driver.start_at(case.base);
        for (at, table) in TABLES.iter().zip(&case.indirect) {
            for (index, raw) in table.iter().enumerate() {
                driver.describe_at(at + 16 * index as u64, (raw.0, raw.1), raw.2, raw.3);
            }
        }
        for (index, raw) in (0..).zip(&case.table) {
            driver.describe(index, (raw.0, raw.1), raw.2, raw.3);
        }
        let ours = Virtqueue::new(driver.setup(case.base)).expect("a ring in memory");
        let regions: Vec<_> =
            REGIONS.iter().map(|(at, len)| (GuestAddress(*at), *len as usize)).collect();
        let memory = GuestMemoryMmap::from_ranges(&regions).expect("memory");
        let mut theirs = Queue::new(case.size).expect("a queue size");
        theirs.try_set_desc_table_address(GuestAddress(0)).expect("aligned");
        theirs.try_set_avail_ring_address(GuestAddress(AVAILABLE)).expect("aligned");
        theirs.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
        theirs.set_event_idx(case.features & VIRTIO_F_EVENT_IDX != 0);
        theirs.set_next_avail(case.base);
        theirs.set_next_used(case.base);
        theirs.set_ready(true);
        let mut pair = Self {
            met,
            seen: case.base,
            shown: case.base,
            used: case.base,
            case,
            guest,
            driver,
            ours,
            memory,
            theirs,
            out: Vec::new(),
            offered: Vec::new(),
            unpublished: 0,
            flags: 0,
        };
        pair.memory.store(case_base, GuestAddress(USED + 2), Ordering::Relaxed).expect("in memory");
        pair.copy();
        pair
    }

    /// Gives the oracle what the driver has written.
    fn copy(&mut self) {
        for (at, len_bytes) in [(0, 0x1000), (AVAILABLE, 0x1000), (0x3000, 0x1000)] {
            let bytes = self.guest.read(at, len_bytes);
            self.memory.write_slice(&bytes, GuestAddress(at)).expect("in memory");
        }
        for (at, len_bytes) in &REGIONS[1..] {
            let bytes = self.guest.read(*at, *len_bytes as usize);
            self.memory.write_slice(&bytes, GuestAddress(*at)).expect("in memory");
        }
    }

    fn copy_available(&mut self) {
        let bytes = self.guest.read(AVAILABLE, 2 * usize::from(self.case.size) + 6);
        self.memory.write_slice(&bytes, GuestAddress(AVAILABLE)).expect("in memory");
    }

    /// Runs the case; ends early where the driver has broken the ring.
    fn run(mut self) -> Verdict {
        for step in std::mem::take(&mut self.case.steps) {
            if !self.step(step)? {
                break;
            }
        }
        self.end()
    }

    /// True while the ring is whole.
    fn step(&mut self, step: Step) -> Result<bool, TestCaseError> {
        match step {
            Step::Offer { heads, careless } => {
                for head in heads {
                    if careless || self.is_free(head) {
                        self.driver.offer(head);
                        self.offered.push(head);
                    }
                }
                self.shown = self.driver.next_available();
                self.driver.show(self.shown);
                self.copy_available();
            }
            Step::Jump(by) => {
                self.shown = self.driver.next_available().wrapping_add(by);
                self.driver.show(self.shown);
                self.copy_available();
            }
            Step::Pop => return self.pop(),
            Step::Use(at, bytes) if !self.out.is_empty() => {
                let chain = self.out.swap_remove(at % self.out.len());
                self.theirs.add_used(&self.memory, chain.slot(), bytes).expect("in memory");
                self.ours.used(chain, bytes);
                self.used = self.used.wrapping_add(1);
                self.unpublished += 1;
            }
            Step::Use(..) => {}
            Step::Retract(count) => self.retract(count),
            Step::Publish => self.publish()?,
            Step::UsedEvent(distance) => {
                self.driver.set_used_event(self.used.wrapping_add(distance));
                self.copy_available();
            }
            Step::Flags(flags) => {
                self.driver.set_flags(flags);
                self.flags = flags;
                self.copy_available();
            }
            Step::RequestKick => return self.request_kick(),
            Step::SuppressKicks => {
                self.ours.suppress_kicks();
                self.theirs.disable_notification(&self.memory).expect("in memory");
                self.compare_used_ring()?;
            }
            Step::Describe(at, raw) => {
                self.case.table[usize::from(at)] = raw;
                self.driver.describe(at, (raw.0, raw.1), raw.2, raw.3);
                self.copy();
            }
        }
        Ok(true)
    }

    /// Whether a driver that keeps the rules may offer this head: the device has not got it.
    fn is_free(&self, head: u16) -> bool {
        let waiting = self.driver.next_available().wrapping_sub(self.ours.next_available());
        let is_out = self.out.iter().any(|chain| chain.slot() == head);
        let waits = self.offered.iter().rev().take(waiting.into()).any(|other| *other == head);
        !is_out && !waits && waiting < self.case.size
    }

    fn pop(&mut self) -> Result<bool, TestCaseError> {
        let memory = self.memory.clone();
        let theirs = self.theirs.iter(&memory).map(|chains| {
            chains.map(|chain| (chain.head_index(), chain.collect::<Vec<_>>())).collect::<Vec<_>>()
        });
        let Ok(theirs) = theirs else { return self.pop_what_the_oracle_refuses() };
        let mut theirs = theirs.into_iter();
        loop {
            let (looks, taken) = self.take();
            match (taken, theirs.next()) {
                (Ok(Some(chain)), Some((head, list))) => {
                    let slot = chain.slot();
                    let same = self.same_chain(&chain, &list);
                    self.out.push(chain);
                    agree!(slot, head, "the head that we took");
                    same?;
                    self.met.borrow_mut().chains += 1;
                }
                (Err(error), Some((head, list))) => {
                    self.justify(&error, head, &list)?;
                    return Ok(false);
                }
                (Ok(Some(chain)), None) if !looks => self.out.push(chain),
                (Err(_other), None) if !looks => return Ok(false),
                (Ok(None), None) => return Ok(true),
                (Err(error), None) => return self.jumped(&error),
                (taken, theirs) => {
                    let differ = format!("we took {taken:?}, the oracle {theirs:?}");
                    self.out.extend(taken.ok().flatten());
                    return Err(TestCaseError::fail(differ));
                }
            }
        }
    }

    /// Pops once; whether that took a look at the index. An entry that was seen is taken without
    /// another one, wherever the index has gone since; the oracle looks each time.
    fn take(&mut self) -> (bool, Result<Option<Chain>, RingError>) {
        let looks = self.ours.next_available() == self.seen;
        let taken = self.ours.pop(0);
        if looks && !matches!(taken, Err(RingError::IndexJump { .. })) {
            self.seen = self.shown;
        }
        (looks, taken)
    }

    /// The oracle says that the index jumped.
    fn pop_what_the_oracle_refuses(&mut self) -> Result<bool, TestCaseError> {
        let (looks, taken) = self.take();
        match taken {
            Err(error) if looks => self.jumped(&error),
            Ok(Some(chain)) if !looks => {
                // From there on the index may be none that jumped.
                self.out.push(chain);
                Ok(false)
            }
            Err(_other) => Ok(false),
            taken => {
                let differ = format!("we took {taken:?}, where the oracle sees a jump");
                self.out.extend(taken.ok().flatten());
                Err(TestCaseError::fail(differ))
            }
        }
    }

    /// We refused the index: it did jump. The ring is broken.
    fn jumped(&self, error: &RingError) -> Result<bool, TestCaseError> {
        let ahead = self.shown.wrapping_sub(self.ours.next_available());
        let is_so = matches!(error, RingError::IndexJump { .. }) && ahead > self.case.size;
        agree!(is_so, true, "we refuse the index {} with {error:?}: that it is so", self.shown);
        self.met.borrow_mut().jumps += 1;
        Ok(false)
    }

    /// A chain that we took: the oracle's is the same, whole, and nothing is wrong with it.
    fn same_chain(&self, chain: &Chain, theirs: &[Descriptor]) -> Verdict {
        let found = self.faults(chain.slot(), theirs);
        agree!(found, Vec::<Strict>::new(), "what is wrong with a chain that we took");
        let place = |writable: bool| -> Vec<(usize, usize)> {
            let descriptors = theirs.iter().filter(|one| one.is_write_only() == writable);
            let buffers =
                descriptors.flat_map(|one| self.guest.buffers(one.addr().0, one.len() as usize));
            buffers.map(|buffer| (buffer.address(), buffer.len())).collect()
        };
        let ours = |buffers: Vec<HostBuffer>| -> Vec<(usize, usize)> {
            buffers.iter().map(|buffer| (buffer.address(), buffer.len())).collect()
        };
        agree!(ours(self.ours.readable(chain).iter().collect()), place(false), "readable buffers");
        agree!(ours(self.ours.writable(chain).iter().collect()), place(true), "writable buffers");
        Ok(())
    }

    /// A chain that we refused: what we say of it is true.
    fn justify(&self, error: &RingError, head: u16, theirs: &[Descriptor]) -> Verdict {
        let reasons: &[Strict] = match error {
            RingError::Head { .. } => &[Strict::HeadOutsideTheTable],
            RingError::HeadInUse { .. } => &[Strict::HeadThatIsOut],
            RingError::Next { .. } => &[Strict::NextOutsideTheTable],
            RingError::ChainTooLong { .. } => &[Strict::Loop],
            RingError::ChainTooManyBytes { .. } => &[Strict::TooManyBytes],
            RingError::ReadableAfterWritable { .. } => &[Strict::ReadableAfterWritable],
            RingError::Indirect { .. } => &[
                Strict::IndirectWithoutTheFeature,
                Strict::IndirectWithNext,
                Strict::IndirectInIndirect,
            ],
            RingError::IndirectLength { .. } => &[Strict::IndirectLength],
            RingError::IndirectPlace { .. } => &[Strict::IndirectPlace],
            RingError::Buffer { .. } => &[Strict::BufferNowhere, Strict::IndirectUnmapped],
            other => return Err(TestCaseError::fail(format!("we have no reason for {other:?}"))),
        };
        let found = self.faults(head, theirs);
        let Some(reason) = found.iter().find(|fault| reasons.contains(fault)) else {
            let untrue = format!("{error:?} is told of chain {head}, where we find {found:?}");
            return Err(TestCaseError::fail(untrue));
        };
        *self.met.borrow_mut().refused.entry(*reason).or_default() += 1;
        Ok(())
    }

    /// What is wrong with a chain, from what the driver wrote and how far the oracle came.
    fn faults(&self, head: u16, theirs: &[Descriptor]) -> Vec<Strict> {
        if head >= self.case.size {
            assert!(theirs.is_empty());
            return vec![Strict::HeadOutsideTheTable];
        }
        let mut faults = Vec::new();
        let mut fault = |is: bool, what: Strict| faults.extend(is.then_some(what));
        fault(self.out.iter().any(|chain| chain.slot() == head), Strict::HeadThatIsOut);
        let (direct, indirect) = self.direct_part(head);
        let indirect = indirect.filter(|_| theirs.len() >= direct);
        let within_memory = |at: GuestAddress, len_bytes: u32| {
            self.memory.check_range(at, len_bytes as usize, Permissions::Read)
        };
        let mut entries = self.case.size;
        if let Some((at, len_bytes, flags, _)) = indirect {
            entries = u16::try_from(len_bytes / 16).unwrap_or(u16::MAX);
            let negotiated = self.case.features & VIRTIO_F_INDIRECT_DESC != 0;
            fault(!negotiated, Strict::IndirectWithoutTheFeature);
            fault(flags & NEXT != 0, Strict::IndirectWithNext);
            let whole = len_bytes % 16 == 0;
            let fits = whole && (1..=MAX_CHAIN_DESCRIPTORS).contains(&entries);
            fault(!fits, Strict::IndirectLength);
            let mapped = within_memory(GuestAddress(at), len_bytes);
            fault(!mapped, Strict::IndirectUnmapped);
            let one_piece = mapped && self.guest.buffers(at, len_bytes as usize).len() == 1;
            fault(mapped && fits && (!one_piece || at % 8 != 0), Strict::IndirectPlace);
        }
        let walked = &theirs[direct.min(theirs.len())..];
        let walked = if indirect.is_some() { walked } else { theirs };
        let last = walked.last().filter(|last| last.has_next());
        let goes_on_outside = last.is_some_and(|last| last.next() >= entries);
        fault(goes_on_outside, Strict::NextOutsideTheTable);
        fault(last.is_some() && walked.len() == usize::from(entries), Strict::Loop);
        // The descriptor that the oracle stopped at, if it stopped before the end.
        let table = indirect.map_or(0, |table| table.0);
        let stopped_at = match (last, walked.is_empty(), indirect) {
            (Some(last), _, _) => self.descriptor(table, last.next()),
            (None, true, Some(_)) => self.descriptor(table, 0),
            _ => None,
        };
        if let Some(next) = stopped_at {
            let nested = indirect.is_some() && next.flags() & INDIRECT != 0;
            fault(nested, Strict::IndirectInIndirect);
            let bytes: u64 = theirs.iter().map(|one| u64::from(one.len())).sum();
            let too_many = bytes + u64::from(next.len()) > u64::from(u32::MAX);
            fault(too_many, Strict::TooManyBytes);
            let last_writes = theirs.last().is_some_and(Descriptor::is_write_only);
            let out_of_order = too_many && last_writes && !next.is_write_only();
            fault(out_of_order, Strict::ReadableAfterWritable);
        }
        let out_of_order =
            theirs.windows(2).any(|pair| pair[0].is_write_only() && !pair[1].is_write_only());
        fault(out_of_order, Strict::ReadableAfterWritable);
        let nowhere = |one: &Descriptor| one.len() == 0 || !within_memory(one.addr(), one.len());
        fault(theirs.iter().any(nowhere), Strict::BufferNowhere);
        faults
    }

    /// Descriptors of the ring's own table that a chain begins with, and the indirect one that
    /// they lead to.
    fn direct_part(&self, head: u16) -> (usize, Option<Raw>) {
        let mut index = head;
        for count in 0..usize::from(self.case.size) {
            let Some(raw) = self.case.table.get(usize::from(index)) else { break };
            if raw.2 & INDIRECT != 0 {
                return (count, Some(*raw));
            }
            if raw.2 & NEXT == 0 {
                break;
            }
            index = raw.3;
        }
        (0, None)
    }

    /// A descriptor in a table somewhere; `None` where there is no memory.
    fn descriptor(&self, table: u64, index: u16) -> Option<Descriptor> {
        let at = table.checked_add(16 * u64::from(index))?;
        self.memory.read_obj(GuestAddress(at)).ok()
    }

    fn retract(&mut self, count: usize) {
        for _ in 0..count {
            let newest = self.ours.next_available().wrapping_sub(1);
            let position = |chain: &Chain| self.ours.slots.position(chain.slot()) == Some(newest);
            let Some(at) = self.out.iter().position(position) else { return };
            self.ours.retract(self.out.swap_remove(at));
            self.theirs.go_to_previous_position();
        }
    }

    fn publish(&mut self) -> Verdict {
        let added = std::mem::take(&mut self.unpublished);
        let ours = self.ours.publish();
        let theirs = added > 0 && self.theirs.needs_notification(&self.memory).expect("in memory");
        let theirs = if self.case.features & VIRTIO_F_EVENT_IDX == 0 {
            // "The VRING_AVAIL_F_NO_INTERRUPT flag isn't supported yet", the oracle says.
            theirs && self.flags & 1 == 0
        } else {
            theirs
        };
        agree!(ours, theirs, "whether the driver is called for {added} used entries");
        self.met.borrow_mut().calls += u64::from(ours);
        self.compare_used_ring()
    }

    fn request_kick(&mut self) -> Result<bool, TestCaseError> {
        let theirs = self.theirs.enable_notification(&self.memory).expect("in memory");
        match self.ours.request_kick(0) {
            Ok(ours) => {
                agree!(ours, theirs, "whether chains wait while kicks are asked for");
                self.seen = self.shown;
            }
            Err(error) => return self.jumped(&error),
        }
        self.compare_used_ring()?;
        Ok(true)
    }

    /// Equal bytes, but for used entries that the oracle shows at once and we at the turn's end.
    fn compare_used_ring(&self) -> Verdict {
        if self.unpublished > 0 {
            return Ok(());
        }
        let len_bytes = 8 * usize::from(self.case.size) + 6;
        let mut theirs = vec![0; len_bytes];
        self.memory.read_slice(&mut theirs, GuestAddress(USED)).expect("in memory");
        agree!(self.guest.read(USED, len_bytes), theirs, "the used ring");
        Ok(())
    }

    /// What is out ends, so that nothing is left but equal memory.
    fn end(mut self) -> Verdict {
        for chain in std::mem::take(&mut self.out) {
            self.theirs.add_used(&self.memory, chain.slot(), 7).expect("in memory");
            self.ours.used(chain, 7);
            self.unpublished += 1;
        }
        agree!(self.ours.chains_out(), 0, "chains that are out");
        self.publish()
    }
}

impl Drop for Pair<'_> {
    /// A disagreement leaves chains out; they are to end all the same.
    fn drop(&mut self) {
        for chain in self.out.drain(..) {
            self.ours.used(chain, 0);
        }
    }
}

#[test]
fn ring_does_what_the_oracle_does_or_says_why_not() {
    let seed = chosen_seed().unwrap_or(0);
    let mut runner = TestRunner::new(Config {
        cases: u32::try_from(cases(3000)).unwrap_or(u32::MAX),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    });
    let met = RefCell::default();
    let outcome = runner.run(&case(), |case| Pair::new(case, &met).run());
    if let Err(failure) = outcome {
        panic!("OUTBOARD_SIMULATION_SEED={seed}: {failure}");
    }
    let Met { chains, refused, jumps, calls } = met.into_inner();
    assert!(chains > 1000 && jumps > 10 && calls > 100, "{chains} chains, {jumps}, {calls}");
    assert_eq!(refused.len(), 13, "each reason is met: {refused:?}");
}
