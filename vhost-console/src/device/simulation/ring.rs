//! A ring as its driver has it: places in memory, chains, and where the device must have got to.

use std::sync::Arc;

use common::simulation::{Buffer, Driver, Guest, Layout, Random, Stage, Used};
use common::virtqueue::VIRTIO_F_INDIRECT_DESC;

use super::mode::Mode;
use crate::device::ConsoleDevice;

/// Memory that a ring has for itself: its areas, indirect tables, and a place for each chain.
pub(super) const RING_BYTES: u64 = 0x14_0000;
const TABLES: u64 = 0x4000;
const TABLE_BYTES: u64 = 0x400;
const PLACES: u64 = 0x2_0000;
/// Room for the longest chain.
pub(super) const PLACE_BYTES: u64 = 0x1_1800;
/// The most buffers of a chain.
const PIECES_MAX: u64 = 48;

/// A chain that the device has.
#[derive(Clone, Debug)]
pub(super) struct Given {
    head: u16,
    place: u64,
    pub(super) buffers: Vec<Buffer>,
}

impl Given {
    /// Its first bytes.
    pub(super) fn bytes(&self, len_bytes: usize, guest: &Guest) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, len) in &self.buffers {
            bytes.extend(guest.read(*at, (*len as usize).min(len_bytes - bytes.len())));
        }
        bytes
    }
}

/// See the module's head.
pub(super) struct Ring {
    pub(super) index: u16,
    driver: Driver,
    guest: Arc<Guest>,
    at: u64,
    pub(super) is_running: bool,
    pub(super) has_indirect: bool,
    first: u16,
    used: u16,
    places: Vec<u64>,
    /// What the device has, the oldest first.
    pub(super) given: Vec<Given>,
}

impl Ring {
    /// A ring that runs.
    pub(super) fn start(
        index: u16,
        mode: &Mode,
        guest: &Arc<Guest>,
        stage: &mut Stage<ConsoleDevice>,
        random: &mut Random,
    ) -> Self {
        let (at, size) = (u64::from(index) * RING_BYTES, mode.ring_size);
        let layout = Layout { size, descriptors: at, available: at + 0x1000, used: at + 0x2000 };
        let mut driver = Driver::new(Arc::clone(guest), layout, mode.features);
        let first = random.pick(&[0, u16::MAX - 5]);
        driver.start_at(first);
        stage.start(index, driver.setup(first)).expect("a ring");
        let places = (0..u64::from(size)).map(|n| at + PLACES + n * PLACE_BYTES).collect();
        Self {
            index,
            driver,
            guest: Arc::clone(guest),
            at,
            is_running: true,
            has_indirect: mode.has(VIRTIO_F_INDIRECT_DESC),
            first,
            used: 0,
            places,
            given: Vec::new(),
        }
    }

    /// Gives the device a chain of these bytes, then of buffers of these lengths; false where there is no room.
    pub(super) fn give(
        &mut self,
        readable: &[u8],
        writable: &[u32],
        indirect: bool,
        random: &mut Random,
    ) -> bool {
        let Some(place) = self.places.pop() else { return false };
        let mut at = place;
        let mut sent = Vec::new();
        let mut rest = readable;
        while !rest.is_empty() {
            let most = if sent.len() as u64 >= PIECES_MAX - 8 { rest.len() } else { 1500 };
            let most = if random.once_in(4) { 16 } else { most };
            let is_last = sent.len() as u64 >= PIECES_MAX - 8 || random.once_in(3);
            let len = if is_last { rest.len() } else { random.index(most) + 1 };
            let (piece, left) = rest.split_at(len.min(rest.len()));
            self.guest.write(at, piece);
            sent.push((at, piece.len() as u32));
            at += piece.len() as u64;
            rest = left;
        }
        let mut given = Vec::new();
        for len_bytes in writable {
            given.push((at, *len_bytes));
            at += u64::from(*len_bytes);
        }
        assert!(at <= place + PLACE_BYTES, "a chain fits its place");
        let table = self.at + TABLES + TABLE_BYTES * ((place - self.at - PLACES) / PLACE_BYTES);
        let table = indirect.then_some(table);
        let Some(head) = self.driver.add((&sent, &given), table, random) else {
            self.places.push(place);
            return false;
        };
        let buffers = if given.is_empty() { sent } else { given };
        self.given.push(Given { head, place, buffers });
        true
    }

    /// Shows the device what was given; it may want a kick.
    pub(super) fn publish(&mut self, stage: &Stage<ConsoleDevice>, random: &mut Random) {
        if self.driver.publish() || random.once_in(32) {
            stage.kernel().kick(self.index);
        }
    }

    /// The chains that have come back, which must be the oldest.
    pub(super) fn take_used(&mut self) -> Vec<(Given, usize)> {
        let used = self.driver.take_used();
        used.iter()
            .map(|Used { head, written_bytes }| {
                let given = self.given.remove(0);
                assert_eq!(given.head, *head, "chains of queue {} come back in order", self.index);
                self.places.push(given.place);
                self.used = self.used.wrapping_add(1);
                (given, *written_bytes as usize)
            })
            .collect()
    }

    pub(super) fn stop(&mut self, stage: &mut Stage<ConsoleDevice>) {
        if std::mem::take(&mut self.is_running) {
            stage.stop(self.index);
        }
    }

    /// Where the device has stopped, if it has.
    fn base(&mut self, stage: &mut Stage<ConsoleDevice>) -> Option<u16> {
        let base = if self.is_running { None } else { stage.stopped(self.index) }?;
        let taken = base.wrapping_sub(self.first);
        assert_eq!(taken, self.used, "what lies before the base {base} has come back, no more");
        Some(base)
    }

    /// Goes on where the device has stopped, if it has; true when it does.
    pub(super) fn restart(&mut self, stage: &mut Stage<ConsoleDevice>) -> bool {
        let Some(base) = self.base(stage) else { return false };
        stage.start(self.index, self.driver.setup(base)).expect("a ring");
        self.is_running = true;
        true
    }

    /// Whether the device has let it go; it is not started again.
    pub(super) fn has_stopped(&mut self, stage: &mut Stage<ConsoleDevice>) -> bool {
        self.base(stage).is_some()
    }
}
