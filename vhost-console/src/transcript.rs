//! What a port has put out: a ring of bytes that many read and one writes.
//!
//! Contract: every byte has an *offset*, counted from the port's first. The one [`Author`], the port's transmit queue, appends;
//! nobody waits for anybody. A [`Cursor`] is where a reader has got to. Readers are of two kinds. *Keepers* (a log, a
//! client that is to get every byte) bound the author: he never overwrites what one of them has not read, and appends
//! less than he wanted instead ([`Author::append`]). All others are overtaken: what they have not read in time is
//! lost to them, and they are told how much. The ring is the scrollback, too: who comes late begins some way
//! [back](Transcript::replay).
//!
//! All readers are on the main thread, the author on a worker's; no lock is between them. A reader copies first and
//! then looks whether the author has begun to overwrite what was copied ([`Transcript::read`]).
//!
//! What it deliberately does not do: know who the readers are, or wake them. The [port](crate::port) does.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use common::memory::OwnMemory;
use common::virtqueue::Buffers;

/// The least that a ring holds. What is on its way to a keeper is in here, so that the guest need not wait for each
/// write to a file; and it stays in a processor's cache.
const CAPACITY_MIN: u64 = 256 << 10;

/// See the module's head.
pub(crate) struct Transcript {
    memory: OwnMemory,
    /// A power of two.
    capacity: u64,
    /// How far a new reader is set back at most.
    replay: u64,
    /// Up to where the author has appended.
    end: AtomicU64,
    /// Up to where he has begun to.
    claimed: AtomicU64,
    /// Where the port begins: before it the ring has what another one put out.
    begin: AtomicU64,
    /// What the keepers have not read begins here; [`NOBODY`] where there are none.
    floor: AtomicU64,
    /// Where the keepers are, by their numbers. Only the main thread takes this lock.
    keepers: Mutex<Vec<(KeeperId, u64)>>,
}

/// The floor without keepers.
const NOBODY: u64 = u64::MAX;

/// A keeper's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeeperId(u64);

/// Where a reader has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor(u64);

impl Cursor {
    /// Bytes from the first on that are behind it.
    pub(crate) fn offset(self) -> u64 {
        self.0
    }

    /// Moves over bytes that were read, or lost.
    pub(crate) fn pass(&mut self, bytes: u64) {
        self.0 += bytes;
    }
}

/// What a reader was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Read {
    /// Bytes before it that he was too late for.
    pub(crate) lost_bytes: u64,
    /// Bytes that he has now.
    pub(crate) count: usize,
}

impl Transcript {
    /// An empty one that sets new readers `replay_bytes` back.
    pub(crate) fn new(replay_bytes: u64) -> Self {
        // As much again is on its way when a viewer comes to read the oldest of it.
        let capacity = replay_bytes.saturating_mul(2).max(CAPACITY_MIN).next_power_of_two();
        Self {
            // Zeros that nobody has touched take no memory.
            memory: OwnMemory::new(usize::try_from(capacity).unwrap_or(usize::MAX)),
            capacity,
            replay: replay_bytes,
            end: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            begin: AtomicU64::new(0),
            floor: AtomicU64::new(NOBODY),
            keepers: Mutex::default(),
        }
    }

    /// Bytes that the port has put out.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.end.load(Ordering::Acquire) - self.begin.load(Ordering::Relaxed)
    }

    /// A new port begins here.
    pub(crate) fn begin_anew(&self) {
        self.begin.store(self.end.load(Ordering::Acquire), Ordering::Relaxed);
    }

    /// Where a reader starts that wants to see nothing of the past.
    pub(crate) fn now(&self) -> Cursor {
        Cursor(self.end.load(Ordering::Acquire))
    }

    /// Where a reader starts that comes late.
    pub(crate) fn replay(&self) -> Cursor {
        let end = self.end.load(Ordering::Acquire);
        Cursor(end.saturating_sub(self.replay).max(self.begin.load(Ordering::Relaxed)))
    }

    /// Bytes that come after `cursor`.
    pub(crate) fn unread_bytes(&self, cursor: Cursor) -> u64 {
        self.end.load(Ordering::Acquire).saturating_sub(cursor.0)
    }

    /// Copies what comes next to `into`, and moves the cursor behind it.
    pub(crate) fn read(&self, cursor: &mut Cursor, into: &mut [u8]) -> Read {
        // Pairs with the release in `append`: the bytes before the end are visible.
        let end = self.end.load(Ordering::Acquire);
        let start = cursor.0.max(end.saturating_sub(self.capacity));
        let count = usize::try_from(end - start).unwrap_or(usize::MAX).min(into.len());
        let (place, memory) = (self.place(start), self.memory.buffer());
        let first = memory.read(place, &mut into[..count]);
        memory.read(0, &mut into[first..count]);
        // Pairs with the fence in `append`: if any byte that was copied is a newer one, its claim is seen.
        fence(Ordering::Acquire);
        let oldest = self.claimed.load(Ordering::Relaxed).saturating_sub(self.capacity);
        let torn = usize::try_from(oldest.saturating_sub(start)).unwrap_or(usize::MAX).min(count);
        into.copy_within(torn..count, 0);
        let lost_bytes = start - cursor.0 + torn as u64;
        cursor.0 = start + count as u64;
        Read { lost_bytes, count: count - torn }
    }

    /// Has the author wait for a reader from here on; the reader says how far he is by [`keep`](Self::keep).
    pub(crate) fn add_keeper(&self, cursor: Cursor) -> KeeperId {
        let mut keepers = self.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        let id = KeeperId(keepers.last().map_or(0, |(KeeperId(last), _)| last + 1));
        keepers.push((id, cursor.0));
        self.set_floor(&keepers);
        id
    }

    /// A keeper is done with all that is before `cursor`.
    pub(crate) fn keep(&self, id: KeeperId, cursor: Cursor) {
        let mut keepers = self.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        keepers.iter_mut().filter(|(of, _)| *of == id).for_each(|(_, at)| *at = cursor.0);
        self.set_floor(&keepers);
    }

    /// The author need not wait for this reader any more.
    pub(crate) fn remove_keeper(&self, id: KeeperId) {
        let mut keepers = self.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        keepers.retain(|(of, _)| *of != id);
        self.set_floor(&keepers);
    }

    fn set_floor(&self, keepers: &[(KeeperId, u64)]) {
        let floor = keepers.iter().map(|(_, at)| *at).min().unwrap_or(NOBODY);
        // Pairs with the acquire in `room`: a keeper has read what the author is about to overwrite.
        self.floor.store(floor, Ordering::Release);
    }

    fn place(&self, offset: u64) -> usize {
        (offset & (self.capacity - 1)) as usize
    }

    /// How much the author may append now.
    pub(crate) fn room(&self) -> usize {
        let floor = self.floor.load(Ordering::Acquire);
        let unread = self.end.load(Ordering::Relaxed).saturating_sub(floor);
        usize::try_from(self.capacity.saturating_sub(unread)).unwrap_or(usize::MAX)
    }
}

/// Who may append; of each transcript there is one, which the port [keeps](crate::port::Port) while no queue has it.
#[derive(Debug)]
pub(crate) struct Author {
    /// The chain of which a part is in the transcript. It may be the next ring's, which begins with it again.
    begun: Option<Begun>,
}

/// A chain that was taken in part.
#[derive(Debug)]
struct Begun {
    of: ChainId,
    taken_bytes: usize,
}

/// What a chain that was put back into its ring is known by. A guest that starts anew without resetting the device may give
/// another one in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChainId {
    pub(crate) slot: u16,
    pub(crate) len_bytes: usize,
}

impl Author {
    /// The one of a new transcript.
    pub(crate) fn new() -> Self {
        Self { begun: None }
    }

    /// Bytes of this chain that are in the transcript already: its ring was stopped in the middle of it.
    pub(crate) fn taken_bytes(&self, of: ChainId) -> usize {
        self.begun.as_ref().filter(|begun| begun.of == of).map_or(0, |begun| begun.taken_bytes)
    }

    /// So much of this chain is in the transcript, which is not all.
    pub(crate) fn remember_chain(&mut self, of: ChainId, taken_bytes: usize) {
        self.begun = Some(Begun { of, taken_bytes });
    }

    /// The next chain is a new one.
    pub(crate) fn forget_chain(&mut self) {
        self.begun = None;
    }

    /// Appends bytes of the guest's, as far as the keepers let him; how many.
    pub(crate) fn append(&mut self, to: &Transcript, from: Buffers<'_>) -> usize {
        let count = from.len_bytes().min(to.room());
        let end = to.end.load(Ordering::Relaxed);
        to.claimed.store(end + count as u64, Ordering::Relaxed);
        // Pairs with the fence in `read`: the claim is visible before any byte that overwrites an older one.
        fence(Ordering::Release);
        let mut at = end;
        for piece in from.slice(0, count).iter() {
            let memory = to.memory.buffer();
            let place = to.place(at);
            let first = memory.slice(place, piece.len()).copy_from(&piece);
            memory.copy_from(&piece.slice(first, piece.len() - first));
            at += piece.len() as u64;
        }
        // Pairs with the acquire in `read`.
        to.end.store(at, Ordering::Release);
        count
    }

    /// Appends a byte of the emergency register's; false where the keepers do not let him.
    pub(crate) fn append_byte(&mut self, to: &Transcript, byte: u8) -> bool {
        let memory = OwnMemory::new(1);
        memory.buffer().write(0, &[byte]);
        self.append(to, Buffers::new(&[memory.buffer()])) == 1
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use common::memory::OwnMemory;
    use common::virtqueue::Buffers;

    use super::{Author, Transcript};

    /// The byte at an offset: no two places near each other look alike.
    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    /// Reads until the author has ended; each byte is the one of its place, and what is missing was told. How many were.
    fn follow(transcript: &Transcript, is_keeper: bool, has_ended: &AtomicBool) -> u64 {
        let mut cursor = transcript.now();
        let keeper = is_keeper.then(|| transcript.add_keeper(cursor));
        let (mut at, mut lost_bytes) = (cursor.offset(), 0);
        let mut scratch = vec![0; 40_000];
        loop {
            let is_last = has_ended.load(Ordering::Acquire);
            let read = transcript.read(&mut cursor, &mut scratch);
            at += read.lost_bytes;
            lost_bytes += read.lost_bytes;
            let found = scratch[..read.count].iter();
            assert!(found.zip(at..).all(|(found, at)| *found == byte(at)), "near {at}");
            at += read.count as u64;
            assert_eq!(at, cursor.offset());
            if let Some(id) = keeper {
                transcript.keep(id, cursor);
            }
            if read.count == 0 && is_last {
                return lost_bytes;
            }
        }
    }

    /// An author who writes this much as fast as he can.
    fn write(transcript: &Transcript, total: u64) {
        let mut author = Author::new();
        let (mut at, mut most) = (0, 1);
        while at < total {
            let bytes: Vec<u8> = (at..total.min(at + most)).map(byte).collect();
            let memory = OwnMemory::new(bytes.len());
            memory.buffer().write(0, &bytes);
            at += author.append(transcript, Buffers::new(&[memory.buffer()])) as u64;
            most = most * 7 % 90_001;
        }
    }

    #[test]
    fn readers_of_a_ring_that_is_being_written_see_what_was_written_or_hear_what_they_lost() {
        let (transcript, has_ended) = (Transcript::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let keeper = scope.spawn(|| follow(&transcript, true, &has_ended));
            let viewers = [(), ()].map(|()| scope.spawn(|| follow(&transcript, false, &has_ended)));
            // A keeper who comes while it is written may have lost what was being written then: this one comes before.
            while transcript.floor.load(Ordering::Acquire) == super::NOBODY {
                thread::yield_now();
            }
            write(&transcript, 20 << 20);
            has_ended.store(true, Ordering::Release);
            assert_eq!(keeper.join().unwrap(), 0);
            for viewer in viewers {
                viewer.join().unwrap();
            }
        });
        assert_eq!(transcript.len_bytes(), 20 << 20);
    }

    #[test]
    fn author_waits_for_the_slowest_keeper_and_for_nobody_else() {
        let transcript = Transcript::new(0);
        let capacity = transcript.room();
        let (first, second) = (transcript.now(), transcript.now());
        let (slow, fast) = (transcript.add_keeper(first), transcript.add_keeper(second));
        write(&transcript, capacity as u64);
        assert_eq!(transcript.room(), 0);
        let mut cursor = second;
        transcript.read(&mut cursor, &mut [0; 100]);
        transcript.keep(fast, cursor);
        assert_eq!(transcript.room(), 0);
        transcript.remove_keeper(slow);
        assert_eq!(transcript.room(), 100);
        transcript.remove_keeper(fast);
        assert_eq!(transcript.room(), capacity);
    }
}
