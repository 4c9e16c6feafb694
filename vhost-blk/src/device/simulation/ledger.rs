//! What a guest knows of its disk: what it wrote, when it was told so, and what it was promised.
//!
//! Contract: a sector may read as any write that had begun, and that no other has replaced: one that
//! began after the first was answered, and was itself answered before the read began. After a power
//! cut only writes that were promised to be stable replace others. A sector under several writes may
//! hold a mixture of them. A request that failed, and a discard, may or may not have written.

use super::storage::{Content, SECTOR};

/// What a write leaves in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// The pattern of this number.
    Pattern(u32),
    /// Zeros.
    Zeros,
}

impl Mark {
    /// The bytes of this mark in a sector: no two sectors' or patterns' are alike in any word.
    pub(super) fn content(self, sector: usize) -> Content {
        let mut content = [0; SECTOR];
        if let Self::Pattern(number) = self {
            for (at, word) in (0..).zip(content.as_chunks_mut::<8>().0) {
                // The number in the odd places too: mixtures are to be told from either side.
                let number = number.to_le_bytes();
                let sector = (sector as u16).to_le_bytes();
                let (low, high) = (number[0], number[1]);
                *word = [low, sector[0], high, sector[1], !low, at, 1, !high];
            }
        }
        content
    }
}

/// A write to one sector.
#[derive(Clone, Debug)]
struct Entry {
    by: u64,
    content: Content,
    began: u64,
    /// When the guest was told of its end.
    answered: Option<u64>,
    /// It was done, for certain.
    done: bool,
    /// It is promised to survive a power cut.
    promised: bool,
}

/// See the module's head.
pub(super) struct Ledger {
    sectors: Vec<Vec<Entry>>,
}

impl Ledger {
    /// A disk that holds this from the beginning.
    pub(super) fn new(contents: impl Iterator<Item = Content>) -> Self {
        let entry = |content| {
            vec![Entry {
                by: u64::MAX,
                content,
                began: 0,
                answered: Some(0),
                done: true,
                promised: true,
            }]
        };
        Self { sectors: contents.map(entry).collect() }
    }

    /// Request `by` begins to write a mark to sectors.
    pub(super) fn begin(&mut self, by: u64, mark: Mark, sectors: std::ops::Range<usize>, now: u64) {
        for sector in sectors {
            let content = mark.content(sector);
            self.sectors[sector].push(Entry {
                by,
                content,
                began: now,
                answered: None,
                done: false,
                promised: false,
            });
        }
    }

    /// Request `by` was answered: it was done for certain or perhaps, and it is promised or not.
    pub(super) fn answer(&mut self, by: u64, done: bool, promised: bool, now: u64) {
        for entry in self.sectors.iter_mut().flatten().filter(|entry| entry.by == by) {
            entry.answered = Some(now);
            entry.done = done;
            entry.promised = promised && done;
        }
    }

    /// All that was done and answered before `before` is promised from now on.
    pub(super) fn promise(&mut self, before: u64) {
        for entry in self.sectors.iter_mut().flatten() {
            let was = entry.answered.is_some_and(|answered| answered < before);
            entry.promised |= entry.done && was;
        }
    }

    /// Whether a read that began at `began` may find this.
    pub(super) fn may_read(&self, sector: usize, content: &[u8], began: u64) -> bool {
        let replaces =
            |entry: &Entry| entry.done && entry.answered.is_some_and(|answered| answered < began);
        may_hold(&self.sectors[sector], content, replaces)
    }

    /// Whether this may be left by a power cut.
    pub(super) fn may_survive(&self, sector: usize, content: &[u8]) -> bool {
        may_hold(&self.sectors[sector], content, |entry| entry.promised)
    }
}

/// Whether `content` is one of the writes that none of those that replace has replaced, or a mixture
/// of them.
fn may_hold(entries: &[Entry], content: &[u8], replaces: impl Fn(&Entry) -> bool) -> bool {
    let last = entries.iter().filter(|entry| replaces(entry)).map(|entry| entry.began).max();
    let stands = |entry: &&Entry| {
        entry.answered.is_none_or(|answered| last.is_none_or(|last| answered >= last))
    };
    let standing = || entries.iter().filter(stands).map(|entry| &entry.content);
    standing().any(|allowed| allowed == content)
        || (0..SECTOR).all(|at| standing().any(|allowed| allowed[at] == content[at]))
}

#[cfg(test)]
mod tests {
    use super::{Ledger, Mark};
    use crate::device::simulation::storage::SECTOR;

    const OLD: Mark = Mark::Pattern(1);
    const NEW: Mark = Mark::Pattern(2);

    fn ledger() -> Ledger {
        Ledger::new([OLD.content(0)].into_iter())
    }

    #[test]
    fn unanswered_write_may_be_there_or_not_or_in_part() {
        let mut ledger = ledger();
        ledger.begin(7, NEW, 0..1, 10);
        let mut torn = OLD.content(0);
        torn[..100].copy_from_slice(&NEW.content(0)[..100]);
        for content in [OLD.content(0), NEW.content(0), torn] {
            assert!(ledger.may_read(0, &content, 11) && ledger.may_survive(0, &content));
        }
        assert!(!ledger.may_read(0, &[0; SECTOR], 11));
    }

    #[test]
    fn answered_write_is_read_and_survives_once_promised() {
        let mut ledger = ledger();
        ledger.begin(7, NEW, 0..1, 10);
        ledger.answer(7, true, false, 12);
        assert!(ledger.may_read(0, &OLD.content(0), 11), "the read was under way");
        assert!(!ledger.may_read(0, &OLD.content(0), 13));
        assert!(ledger.may_survive(0, &OLD.content(0)));
        ledger.promise(12);
        assert!(ledger.may_survive(0, &OLD.content(0)), "it was answered too late for that flush");
        ledger.promise(13);
        assert!(!ledger.may_survive(0, &OLD.content(0)));
        assert!(ledger.may_survive(0, &NEW.content(0)));
    }

    #[test]
    fn failed_write_replaces_nothing() {
        let mut ledger = ledger();
        ledger.begin(7, NEW, 0..1, 10);
        ledger.answer(7, false, true, 12);
        ledger.promise(20);
        for content in [OLD.content(0), NEW.content(0)] {
            assert!(ledger.may_read(0, &content, 20) && ledger.may_survive(0, &content));
        }
    }
}
