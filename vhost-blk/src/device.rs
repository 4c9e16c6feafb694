//! The block device: requests in, operations out, status bytes back.
//!
//! Each request is executed step by step: one operation at a time, the next one named when the
//! last has ended. So short reads and writes are continued, a discard works through its segments,
//! and a write becomes stable before it is answered where the driver sends no flushes.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use common::device::{Account, Device, DeviceQueue, HostFault, QueueIo};
use common::engine::{Completion, FileIndex, Op, Zeroing};
use common::virtqueue::Chain;
use rustix::io::Errno;

use crate::config::{ConfigSpace, QueueLimits, Serial, VIRTIO_BLK_F_FLUSH, features};
use crate::disk::Disk;
use crate::request::{HEADER_BYTES, KINDS, Kind, Request, Segment, Status};

/// The one file that operations name.
const IMAGE: FileIndex = FileIndex(0);

/// A disk as a virtio device.
pub(crate) struct BlockDevice {
    disk: Arc<Disk>,
    serial: Serial,
    queues: QueueLimits,
}

impl BlockDevice {
    pub(crate) fn new(disk: Disk, serial: Serial, queues: QueueLimits) -> Self {
        Self { disk: Arc::new(disk), serial, queues }
    }
}

impl Device for BlockDevice {
    type Queue = BlockQueue;
    const NAME: &'static str = "block";
    const KINDS: &'static [&'static str] = KINDS;

    fn queue_count(&self) -> u16 {
        self.queues.count
    }

    fn max_queue_size(&self) -> u16 {
        self.queues.size_max
    }

    fn features(&self) -> u64 {
        features(&self.disk, self.queues.count)
    }

    fn read_config(&self, _features: u64, offset: u32, into: &mut [u8]) {
        ConfigSpace::new(&self.disk, self.queues).read(offset, into);
    }

    fn refresh(&self) -> bool {
        self.disk.measure_again()
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.disk.file().into_iter().collect()
    }

    fn open_queue(&self, _index: u16, features: u64, queue_size: u16) -> BlockQueue {
        BlockQueue {
            disk: Arc::clone(&self.disk),
            serial: self.serial,
            // VIRTIO 1.3, 5.2.6.2: a driver that did not accept FLUSH assumes write-through: its
            // writes are stable before they are answered.
            write_through: features & VIRTIO_BLK_F_FLUSH == 0,
            pending: (0..queue_size).map(|_| Pending::default()).collect(),
        }
    }
}

/// One virtqueue of the device.
pub(crate) struct BlockQueue {
    disk: Arc<Disk>,
    serial: Serial,
    write_through: bool,
    /// What is under way, by the chain's slot.
    pending: Box<[Pending]>,
}

/// A slot: the request under way, and a list kept for its capacity.
#[derive(Default)]
struct Pending {
    work: Option<Work>,
    segments: Vec<Segment>,
}

/// A request under way.
struct Work {
    chain: Chain,
    request: Request,
    step: Step,
    /// Bytes of data that a transfer is to move.
    len_bytes: u64,
    /// Bytes of data that have been moved or zeroed.
    done: u64,
}

/// Which operation a request waits for.
#[derive(Clone, Copy)]
enum Step {
    /// A read or write, of which `done` bytes are through.
    Transfer,
    /// The segment with this number, of which `from` bytes are through, in this way.
    Zero { segment: usize, from: u64, zeroing: Zeroing },
    /// The data becoming stable.
    Sync,
}

impl DeviceQueue for BlockQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        while let Some(chain) = io.pop() {
            self.begin(chain, io);
        }
    }

    fn complete(&mut self, done: Completion, io: &mut QueueIo<'_>) {
        let slot = usize::from(done.token.slot);
        let work = self.pending[slot].work.take();
        let Some(work) = work else { unreachable!("{done:?} ends what was never begun") };
        match self.advance(work, done.result) {
            Next::Step(work) => self.submit(work, io),
            Next::Done(work, outcome) => self.finish(work, outcome, io),
        }
    }
}

/// What a request does after an operation.
enum Next {
    Step(Work),
    Done(Work, Result<(), Errno>),
}

impl BlockQueue {
    /// Parses a chain and starts what it asks for.
    fn begin(&mut self, chain: Chain, io: &mut QueueIo<'_>) {
        // VIRTIO 1.3, 5.2.6: the status byte is the last device-writable byte.
        let Some(room_bytes) = io.writable(&chain).len_bytes().checked_sub(1) else {
            return io.reject(chain, "it has no room for a status");
        };
        let segments = &mut self.pending[usize::from(chain.slot())].segments;
        let parsed = Request::parse(io.readable(&chain), room_bytes, &self.disk, segments);
        let request = match parsed {
            Ok(request) => request,
            Err(refusal) => return answer(chain, refusal.status, Moved::none(refusal.kind), io),
        };
        let step = match request {
            Request::Read { .. } | Request::Write { .. } => Step::Transfer,
            Request::Flush => Step::Sync,
            Request::Discard | Request::WriteZeroes => {
                Step::Zero { segment: 0, from: 0, zeroing: first_choice(request, segments.first()) }
            }
            Request::GetId => {
                let id = io.writable(&chain).slice(0, room_bytes).write(self.serial.bytes());
                let moved = Moved { filled: id, ..Moved::none(Kind::GetId) };
                return answer(chain, Status::Ok, moved, io);
            }
        };
        let len_bytes = match request {
            Request::Read { .. } => room_bytes as u64,
            Request::Write { .. } => (io.readable(&chain).len_bytes() - HEADER_BYTES) as u64,
            _ => 0,
        };
        let is_nothing = match step {
            Step::Transfer => len_bytes == 0,
            Step::Zero { .. } => segments.is_empty(),
            Step::Sync => false,
        };
        let work = Work { chain, request, step, len_bytes, done: 0 };
        if self.disk.file().is_none() || is_nothing {
            return self.finish(Work { done: len_bytes, ..work }, Ok(()), io);
        }
        self.submit(work, io);
    }

    /// Names the operation of the work's step.
    fn submit(&mut self, work: Work, io: &mut QueueIo<'_>) {
        let pending = &mut self.pending[usize::from(work.chain.slot())];
        let done = work.done as usize;
        let durable = self.write_through;
        match (work.step, work.request) {
            (Step::Transfer, Request::Read { offset }) => io.submit(&work.chain, 0, |parts| {
                let room = parts.writable;
                let data_bytes = room.len_bytes() - 1 - done;
                let into = room.slice(done, data_bytes);
                Op::Read { file: IMAGE, offset: offset + work.done, into }
            }),
            (Step::Transfer, Request::Write { offset }) => io.submit(&work.chain, 0, |parts| {
                let from = parts.readable.slice(HEADER_BYTES + done, usize::MAX);
                Op::Write { file: IMAGE, offset: offset + work.done, from, durable }
            }),
            (Step::Zero { segment, from, zeroing }, _) => {
                let range = pending.segments[segment];
                let (offset, len_bytes) = (range.offset + from, range.len_bytes - from);
                io.submit(&work.chain, 0, |_| Op::Zero { file: IMAGE, offset, len_bytes, zeroing });
            }
            (Step::Sync | Step::Transfer, _) => {
                io.submit(&work.chain, 0, |_| Op::Sync { file: IMAGE });
            }
        }
        pending.work = Some(work);
    }

    /// Takes in what an operation brought, and says what is next.
    fn advance(&self, mut work: Work, result: Result<u32, Errno>) -> Next {
        let segments = &self.pending[usize::from(work.chain.slot())].segments;
        match (work.step, result) {
            // The kernel was interrupted before it did anything.
            (_, Err(Errno::INTR)) => Next::Step(work),
            (Step::Sync, result) => Next::Done(work, result.map(drop)),
            // A file that ends before the disk does has been truncated by somebody.
            (Step::Transfer | Step::Zero { zeroing: Zeroing::Write, .. }, Ok(0)) => {
                Next::Done(work, Err(Errno::NODATA))
            }
            (Step::Transfer, Ok(bytes)) => {
                work.done += u64::from(bytes);
                if work.done < work.len_bytes { Next::Step(work) } else { Next::Done(work, Ok(())) }
            }
            (Step::Zero { segment, from, zeroing }, Ok(bytes)) => {
                let range = segments[segment];
                let step =
                    if zeroing == Zeroing::Write { u64::from(bytes) } else { range.len_bytes };
                work.done += step;
                let from = from + step;
                work.step = if from < range.len_bytes {
                    Step::Zero { segment, from, zeroing }
                } else if let Some(next) = segments.get(segment + 1) {
                    let zeroing = first_choice(work.request, Some(next));
                    Step::Zero { segment: segment + 1, from: 0, zeroing }
                } else if self.write_through && work.request == Request::WriteZeroes {
                    Step::Sync
                } else {
                    return Next::Done(work, Ok(()));
                };
                Next::Step(work)
            }
            (Step::Zero { segment, from, zeroing }, Err(Errno::OPNOTSUPP | Errno::NOSYS)) => {
                match (work.request, zeroing) {
                    // VIRTIO 1.3, 5.2.6: a discard is a hint, the host is free not to take it.
                    (Request::Discard, _) => Next::Done(work, Ok(())),
                    (_, Zeroing::Write) => Next::Done(work, Err(Errno::OPNOTSUPP)),
                    _ => {
                        work.step = Step::Zero { segment, from, zeroing: Zeroing::Write };
                        Next::Step(work)
                    }
                }
            }
            (_, Err(errno)) => Next::Done(work, Err(errno)),
        }
    }

    /// Answers a request whose operations have ended.
    fn finish(&self, work: Work, outcome: Result<(), Errno>, io: &mut QueueIo<'_>) {
        let kind = work.request.kind();
        let status = match outcome {
            Ok(()) => Status::Ok,
            Err(errno) => {
                let offset = match work.request {
                    Request::Read { offset } | Request::Write { offset } => offset + work.done,
                    _ => 0,
                };
                io.report(HostFault { what: kind.name(), offset, errno });
                Status::IoError
            }
        };
        let filled = match work.request {
            // A disk without a file leaves the guest's buffers as they were.
            Request::Read { .. } if self.disk.file().is_some() => work.done as usize,
            _ => 0,
        };
        answer(work.chain, status, Moved { kind, bytes: work.done, filled }, io);
    }
}

/// How a segment is zeroed at first; where the host cannot, zeros are written.
fn first_choice(request: Request, segment: Option<&Segment>) -> Zeroing {
    let unmap = segment.is_some_and(|segment| segment.unmap);
    // VIRTIO 1.3, 5.2.6.2: without the unmap flag the range MUST stay allocated.
    if request == Request::Discard || unmap { Zeroing::Deallocate } else { Zeroing::Keep }
}

/// What an answered request has done.
struct Moved {
    kind: Kind,
    /// Bytes of data moved, which are counted if it succeeded.
    bytes: u64,
    /// Bytes written to the chain, from its first writable one on, before the status.
    filled: usize,
}

impl Moved {
    fn none(kind: Kind) -> Self {
        Self { kind, bytes: 0, filled: 0 }
    }
}

/// Writes the status byte and gives the chain back.
fn answer(chain: Chain, status: Status, moved: Moved, io: &mut QueueIo<'_>) {
    let room = io.writable(&chain);
    let status_at = room.len_bytes() - 1;
    room.slice(status_at, 1).write(&[status as u8]);
    // VIRTIO 1.3, 2.7.8.2: the device MUST write at least `len` bytes from the first writable one
    // on, so the status counts only where nothing before it was left out.
    let written = if moved.filled == status_at { status_at + 1 } else { moved.filled };
    let failed = status != Status::Ok;
    let bytes = if failed { 0 } else { moved.bytes };
    let account = Account { kind: moved.kind as usize, bytes, failed };
    io.finish(chain, u32::try_from(written).unwrap_or(u32::MAX), account);
}
