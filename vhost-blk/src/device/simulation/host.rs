//! What the host does with operations: when they reach the disk, how they end, and whose fault that is.

use common::engine::Zeroing;
use common::simulation::{Operation, Work};
use rustix::io::Errno;

use super::mode::PAGE;
use super::storage::Description;
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

/// A sync that has ended: it serves the requests of its queue that waited when it was submitted.
pub(super) struct Synced {
    /// The slot of the request that carried it.
    pub(super) carrier: u16,
    pub(super) submitted: u64,
    /// It made nothing stable, or nothing is called so any more.
    pub(super) failed: bool,
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
        let description = Description::File(operation.file.0);
        match (operation.work, fate) {
            (_, Fate::Interrupted) => (Err(Errno::INTR), Vec::new()),
            (Work::Read { offset }, fate) => {
                let len_bytes = self.part(operation.len_bytes(), granule, fate);
                let bytes = self.storage.read(offset, len_bytes);
                (fate.result(bytes.len()), bytes)
            }
            (Work::Write { offset, durable }, fate) => {
                let bytes = operation.bytes();
                let len_bytes = self.part(bytes.len(), granule, fate);
                self.storage.write(number, offset, &bytes[..len_bytes]);
                let result = fate.result(len_bytes);
                if !durable || result.is_err() {
                    return (result, Vec::new());
                }
                self.storage.held(number);
                // Where the storage has no command for it, the kernel syncs on the description.
                let syncs = self.random.once_in(2) && self.storage.tells(description);
                (if syncs { Err(Errno::IO) } else { result }, Vec::new())
            }
            (Work::Zero { offset, len_bytes, zeroing: Zeroing::Write }, fate) => {
                let len_bytes = self.part(len_bytes as usize, granule, fate);
                self.storage.write(number, offset, &vec![0; len_bytes]);
                (fate.result(len_bytes), Vec::new())
            }
            (Work::Zero { .. }, Fate::Failed(errno)) => (Err(errno), Vec::new()),
            (Work::Zero { zeroing, .. }, _) if !self.mode.can(zeroing) => {
                (Err(Errno::OPNOTSUPP), Vec::new())
            }
            (Work::Zero { offset, len_bytes, .. }, _) => {
                self.storage.write(number, offset, &vec![0; len_bytes as usize]);
                (Ok(0), Vec::new())
            }
            (Work::Sync, fate) => {
                if let Fate::Failed(_) = fate {
                    self.tell("failed", &());
                    self.storage.fail();
                }
                if self.storage.tells(description) {
                    return (fate.result(0).and(Err(Errno::IO)), Vec::new());
                }
                self.storage.synced(self.operations[&number].submitted);
                (Ok(0), Vec::new())
            }
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
            Work::Write { .. } | Work::Zero { .. } if result.is_ok() => {
                self.storage.ended(operation.number, self.now);
            }
            Work::Sync if result.is_err() && result != Err(Errno::INTR) => self.lose(),
            Work::Write { durable: true, .. } if result == Err(Errno::IO) => self.lose(),
            _ => {}
        }
        match operation.work {
            Work::Sync => self.sync_ended(operation, known.submitted, result),
            _ => self.blame(operation, result),
        }
        self.tell("ended", &(operation.number, result));
        self.stage.kernel().end(operation.number, result);
        true
    }

    /// The device is told that a sync has failed.
    pub(super) fn lose(&mut self) {
        self.tell("lost", &());
        self.lost = true;
    }

    /// Notes how a sync has ended, for those whom it served.
    fn sync_ended(&mut self, operation: &Operation, submitted: u64, result: Result<u32, Errno>) {
        if result != Err(Errno::INTR) {
            let ring = &mut self.rings[usize::from(operation.queue)];
            let (carrier, failed) = (operation.slot, result.is_err() || self.lost);
            ring.synced = Some(Synced { carrier, submitted, failed });
        }
    }

    /// Notes what an operation's end means for its request.
    fn blame(&mut self, operation: &Operation, result: Result<u32, Errno>) {
        let ring = &mut self.rings[usize::from(operation.queue)];
        let request = ring.requests.get_mut(&operation.slot);
        let request = request.expect("an operation serves a request that the device has");
        request.ended = Some(self.now);
        let moves = matches!(
            operation.work,
            Work::Read { .. } | Work::Write { .. } | Work::Zero { zeroing: Zeroing::Write, .. }
        );
        let unsupported = matches!(operation.work, Work::Zero { .. });
        // A write that ended short is gone on with, and synced if it must be.
        let promises = |bytes: u32| match operation.work {
            Work::Write { durable, .. } => durable && bytes as usize == operation.len_bytes(),
            _ => false,
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
