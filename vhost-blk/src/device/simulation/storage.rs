//! A disk with a cache that forgets.
//!
//! Contract: what an operation has written is seen by all that come later, but a power cut may undo
//! it, sector by sector and each on its own, until it is stable. Stable is what a durable write has
//! written, and what had ended when a sync was submitted that is done. Of versions that are not, a cut
//! leaves any. The disk may fail to write what is not stable, and forgets it then, as Linux does: no later
//! sync makes up for it. It tells so once on each description, whoever asks there first.

use std::collections::BTreeMap;

use crate::disk::SECTOR_BYTES;

/// Bytes of a sector.
pub(super) const SECTOR: usize = SECTOR_BYTES as usize;

/// What a sector holds.
pub(super) type Content = [u8; SECTOR];

/// See the module's head.
pub(super) struct Storage {
    sectors: Vec<Vec<Version>>,
    /// Times that it failed to write.
    failures: u64,
    /// By description: of how many of them it was told.
    told: BTreeMap<Description, u64>,
}

/// Who is told of failures: an open description of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Description {
    /// One that operations name, by its number.
    File(u32),
    /// That of who settles the cache.
    Settling,
}

/// What was once in a sector. The first of its versions is stable, the last is what is read.
struct Version {
    content: Content,
    /// The operation that made it.
    by: u64,
    /// When that ended.
    ended: Option<u64>,
    /// Writing it has failed: the host has forgotten that it is to be written.
    forgotten: bool,
}

impl Storage {
    /// A disk whose sectors hold this, and it is stable.
    pub(super) fn new(contents: impl Iterator<Item = Content>) -> Self {
        let version =
            |content| vec![Version { content, by: u64::MAX, ended: Some(0), forgotten: false }];
        let sectors = contents.map(version).collect();
        Self { sectors, failures: 0, told: BTreeMap::new() }
    }

    /// What is read at a byte offset, cut at the end of the disk.
    pub(super) fn read(&self, offset: u64, len_bytes: usize) -> Vec<u8> {
        let (mut at, mut bytes) = (offset as usize, Vec::with_capacity(len_bytes));
        while bytes.len() < len_bytes
            && let Some(sector) = self.sectors.get(at / SECTOR)
        {
            let content = &sector[sector.len() - 1].content;
            let step = (SECTOR - at % SECTOR).min(len_bytes - bytes.len());
            bytes.extend_from_slice(&content[at % SECTOR..][..step]);
            at += step;
        }
        bytes
    }

    /// Operation `by` writes bytes at an offset.
    pub(super) fn write(&mut self, by: u64, offset: u64, bytes: &[u8]) {
        let (mut at, mut rest) = (offset as usize, bytes);
        while !rest.is_empty() {
            let sector = &mut self.sectors[at / SECTOR];
            let mut content = sector[sector.len() - 1].content;
            let (now, later) = rest.split_at((SECTOR - at % SECTOR).min(rest.len()));
            content[at % SECTOR..][..now.len()].copy_from_slice(now);
            sector.push(Version { content, by, ended: None, forgotten: false });
            at += now.len();
            rest = later;
        }
    }

    /// What operation `by` has written is stable.
    pub(super) fn held(&mut self, by: u64) {
        for sector in &mut self.sectors {
            settle(sector, |version| version.by == by);
        }
    }

    /// Operation `by` has ended at `now`.
    pub(super) fn ended(&mut self, by: u64, now: u64) {
        for version in self.sectors.iter_mut().flatten().filter(|version| version.by == by) {
            version.ended = Some(now);
        }
    }

    /// A sync that was submitted at `submitted` is done.
    pub(super) fn synced(&mut self, submitted: u64) {
        for sector in &mut self.sectors {
            settle(sector, |version| version.ended.is_some_and(|ended| ended <= submitted));
        }
    }

    /// The disk fails to write: what is not stable will never be, whoever syncs.
    pub(super) fn fail(&mut self) {
        self.failures += 1;
        for sector in &mut self.sectors {
            sector.iter_mut().skip(1).for_each(|version| version.forgotten = true);
        }
    }

    /// Who syncs on a description is told whether there was a failure since it was told last.
    pub(super) fn tells(&mut self, description: Description) -> bool {
        self.told.insert(description, self.failures).unwrap_or(0) < self.failures
    }

    /// Number of sectors.
    pub(super) fn len(&self) -> usize {
        self.sectors.len()
    }

    /// What a power cut may leave in a sector.
    pub(super) fn survivors(&self, sector: usize) -> impl Iterator<Item = &Content> {
        self.sectors[sector].iter().map(|version| &version.content)
    }
}

/// Forgets what came before the last version that `is_stable`.
fn settle(sector: &mut Vec<Version>, is_stable: impl Fn(&Version) -> bool) {
    let is_held = |version: &Version| is_stable(version) && !version.forgotten;
    if let Some(last) = sector.iter().rposition(is_held) {
        sector.drain(..last);
    }
}

#[cfg(test)]
mod tests {
    use super::{SECTOR, Storage};

    fn storage() -> Storage {
        Storage::new([[0; SECTOR]; 3].into_iter())
    }

    fn survivors(storage: &Storage, sector: usize) -> Vec<u8> {
        storage.survivors(sector).map(|content| content[0]).collect()
    }

    #[test]
    fn unflushed_sectors_may_go_each_on_its_own() {
        let mut storage = storage();
        storage.write(1, 0, &[1; 2 * SECTOR]);
        storage.write(2, SECTOR as u64, &[2; SECTOR]);
        assert_eq!(storage.read(SECTOR as u64 - 1, 2), [1, 2]);
        assert_eq!(survivors(&storage, 0), [0, 1]);
        assert_eq!(survivors(&storage, 1), [0, 1, 2]);
    }

    #[test]
    fn sync_holds_what_had_ended_before_it_and_no_more() {
        let mut storage = storage();
        for (by, sector) in [(1, 0), (2, 1), (3, 1)] {
            storage.write(by, sector * SECTOR as u64, &[by as u8; SECTOR]);
        }
        storage.ended(1, 5);
        storage.ended(3, 7);
        storage.synced(6);
        assert_eq!(survivors(&storage, 0), [1]);
        assert_eq!(survivors(&storage, 1), [0, 2, 3]);
    }

    #[test]
    fn what_a_failed_sync_has_forgotten_no_other_holds() {
        let mut storage = storage();
        storage.write(1, 0, &[1; SECTOR]);
        storage.ended(1, 5);
        storage.fail();
        storage.write(2, SECTOR as u64, &[2; SECTOR]);
        storage.ended(2, 6);
        storage.synced(7);
        assert_eq!((survivors(&storage, 0), survivors(&storage, 1)), (vec![0, 1], vec![2]));
    }

    #[test]
    fn durable_write_is_stable_when_it_ends() {
        let mut storage = storage();
        storage.write(1, 0, &[1; SECTOR]);
        storage.write(2, 0, &[2; SECTOR]);
        storage.held(1);
        assert_eq!(survivors(&storage, 0), [1, 2]);
    }
}
