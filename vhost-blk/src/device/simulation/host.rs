//! What the host does with operations: when they reach the disk, how they end, and whose fault that is.

use common::engine::Zeroing;
use common::simulation::{Operation, Work};
use rustix::io::Errno;

use super::mode::PAGE;
use super::world::{World, writes};

/// What becomes of operations.
#[derive(Clone, Copy, Debug)]
pub(super) enum Luck {
    /// Anything: they end short, are interrupted, fail, each once in this many times.
    Any(u64),
    /// They succeed, but for this one, which ends so.
    But(u64, Fate),
}

/// How an operation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Whole,
    Short,
    Nothing,
    Interrupted,
    Failed(Errno),
}

/// How far an operation is.
pub(super) struct Progress {
    pub(super) submitted: u64,
    /// It has reached the disk: how it will end, and what it has read.
    pub(super) done: Option<(Result<u32, Errno>, Vec<u8>)>,
}

impl World {
    /// Direct I/O and the host's page cache never hold one page at a time, but for requests that
    /// write the same sectors at a time.
    pub(super) fn check_pages(&self, one: &Operation, other: &Operation) {
        let is_write = |operation: &Operation| match operation.work {
            Work::Write { offset, .. } => Some((offset, operation.len_bytes() as u64)),
            Work::Zero { offset, len_bytes, zeroing: Zeroing::Write } => Some((offset, len_bytes)),
            _ => None,
        };
        let (Some(here), Some(there)) = (is_write(one), is_write(other)) else { return };
        let pages = |(at, len_bytes): (u64, u64)| at / PAGE..(at + len_bytes).div_ceil(PAGE);
        let (here, there) = (pages(here), pages(there));
        let one_page = here.start < there.end && there.start < here.end;
        if one.file == other.file || !one_page {
            return;
        }
        let sectors = |operation: &Operation| {
            writes(&self.rings[usize::from(operation.queue)].requests[&operation.slot].ask)
        };
        let meet = sectors(one).iter().any(|(here, _)| {
            sectors(other).iter().any(|(there, _)| here.start < there.end && there.start < here.end)
        });
        assert!(meet, "a page is written past the cache by {one:?}, and through it by {other:?}");
    }

    /// A held operation does its work; false if there is none that has not.
    pub(super) fn reach_disk(&mut self) -> bool {
        let waiting: Vec<Operation> = self.stage.kernel().held();
        let waiting: Vec<&Operation> = waiting
            .iter()
            .filter(|operation| {
                self.operations.get(&operation.number).is_some_and(|known| known.done.is_none())
            })
            .collect();
        if waiting.is_empty() {
            return false;
        }
        let operation = waiting[self.random.index(waiting.len())];
        let fate = self.fate(operation);
        let done = self.execute(operation, fate);
        self.tell("reached", &(operation.number, operation.queue, operation.work, &done.0));
        let known = self.operations.get_mut(&operation.number).expect("known");
        known.done = Some(done);
        true
    }

    fn fate(&mut self, operation: &Operation) -> Fate {
        match self.luck {
            Luck::But(number, fate) if number == operation.number => fate,
            Luck::But(..) => Fate::Whole,
            // After a failed sync not much succeeds: it is to be rare.
            Luck::Any(_) if operation.work == Work::Sync && !self.random.once_in(8) => Fate::Whole,
            Luck::Any(rarely) if self.random.once_in(rarely) => self.random.pick(&[
                Fate::Short,
                Fate::Short,
                Fate::Short,
                Fate::Nothing,
                Fate::Interrupted,
                Fate::Failed(Errno::IO),
                Fate::Failed(Errno::NOSPC),
            ]),
            Luck::Any(_) => Fate::Whole,
        }
    }

    /// What an operation does to the disk: its result, and what it has read.
    fn execute(&mut self, operation: &Operation, fate: Fate) -> (Result<u32, Errno>, Vec<u8>) {
        let (number, granule) = (operation.number, self.mode.granule(operation.file));
        match (operation.work, fate) {
            (_, Fate::Interrupted) => (Err(Errno::INTR), Vec::new()),
            (Work::Read { offset }, fate) => {
                let len_bytes = self.part(operation.len_bytes(), granule, fate);
                let bytes = self.storage.read(offset, len_bytes);
                (fate.result(bytes.len()), bytes)
            }
            (Work::Write { offset, .. }, fate) => {
                let bytes = operation.bytes();
                let len_bytes = self.part(bytes.len(), granule, fate);
                self.storage.write(number, offset, &bytes[..len_bytes]);
                (fate.result(len_bytes), Vec::new())
            }
            (Work::Zero { offset, len_bytes, zeroing: Zeroing::Write }, fate) => {
                let len_bytes = self.part(len_bytes as usize, granule, fate);
                self.storage.write(number, offset, &vec![0; len_bytes]);
                (fate.result(len_bytes), Vec::new())
            }
            (Work::Sync | Work::Zero { .. }, Fate::Failed(errno)) => (Err(errno), Vec::new()),
            (Work::Zero { zeroing, .. }, _) if !self.mode.can(zeroing) => {
                (Err(Errno::OPNOTSUPP), Vec::new())
            }
            (Work::Zero { offset, len_bytes, .. }, _) => {
                self.storage.write(number, offset, &vec![0; len_bytes as usize]);
                (Ok(0), Vec::new())
            }
            (Work::Sync, _) => (Ok(0), Vec::new()),
        }
    }

    /// How much of a transfer is made, in multiples of `granule`.
    fn part(&mut self, len_bytes: usize, granule: usize, fate: Fate) -> usize {
        let granules = len_bytes / granule;
        match fate {
            Fate::Whole => len_bytes,
            Fate::Nothing | Fate::Interrupted => 0,
            Fate::Short if granules < 2 => len_bytes,
            // Of what failed a part may have been done too.
            Fate::Short | Fate::Failed(_) => self.random.index(granules.max(1)).max(1) * granule,
        }
        .min(len_bytes)
    }

    /// An operation that has done its work ends; false if there is none.
    pub(super) fn end_one(&mut self) -> bool {
        let held = self.stage.kernel().held();
        let ready: Vec<&Operation> = held
            .iter()
            .filter(|operation| {
                self.operations.get(&operation.number).is_some_and(|known| known.done.is_some())
            })
            .collect();
        if ready.is_empty() {
            return false;
        }
        let operation = ready[self.random.index(ready.len())];
        let known = self.operations.remove(&operation.number).expect("known");
        let Some((result, read)) = known.done else { unreachable!("it is ready") };
        self.now += 1;
        operation.fill(&read);
        match operation.work {
            Work::Sync if result.is_ok() => self.storage.synced(known.submitted),
            Work::Write { durable, .. } if result.is_ok() => {
                self.storage.ended(operation.number, self.now, durable);
            }
            Work::Zero { .. } if result.is_ok() => {
                self.storage.ended(operation.number, self.now, false);
            }
            Work::Sync if result != Err(Errno::INTR) => self.lose(),
            Work::Write { durable: true, .. } if result == Err(Errno::IO) => self.lose(),
            _ => {}
        }
        self.blame(operation, result);
        self.tell("ended", &(operation.number, result));
        self.stage.kernel().end(operation.number, result);
        true
    }

    /// A sync has failed, and with it the host has forgotten what it was to write.
    pub(super) fn lose(&mut self) {
        self.tell("lost", &());
        self.lost = true;
        self.storage.sync_failed();
    }

    /// Notes what an operation's end means for its request.
    fn blame(&mut self, operation: &Operation, result: Result<u32, Errno>) {
        let ring = &mut self.rings[usize::from(operation.queue)];
        let request = ring.requests.get_mut(&operation.slot);
        let request = request.expect("an operation serves a request that the device has");
        let moves = matches!(
            operation.work,
            Work::Read { .. } | Work::Write { .. } | Work::Zero { zeroing: Zeroing::Write, .. }
        );
        let unsupported = matches!(operation.work, Work::Zero { .. });
        // A write that ended short is gone on with, and synced if it must be.
        let promises = |bytes: u32| match operation.work {
            Work::Write { durable, .. } => durable && bytes as usize == operation.len_bytes(),
            work => matches!(work, Work::Sync),
        };
        match result {
            Ok(bytes) if self.lost && promises(bytes) => request.failed = true,
            Ok(0) if moves => request.failed = true,
            Ok(bytes) => {
                if let Work::Read { offset } = operation.work {
                    let got = request.has_read(offset, bytes);
                    assert!(got > 0, "{operation:?} brings nothing to {:?}", request.ask);
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP) if unsupported => {}
            Err(_) => request.failed = true,
        }
    }
}

impl Fate {
    fn result(self, len_bytes: usize) -> Result<u32, Errno> {
        match self {
            Self::Failed(errno) => Err(errno),
            _ => Ok(len_bytes as u32),
        }
    }
}
