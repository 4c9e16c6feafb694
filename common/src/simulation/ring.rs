//! A ring as its driver has it: places in memory, chains, and where the device must have got to.

use std::sync::Arc;

use super::{Buffer, Driver, Guest, Layout, Random, Stage, Used};
use crate::device::Device;
use crate::virtqueue::VIRTIO_F_INDIRECT_DESC;

const TABLES: u64 = 0x4000;
const TABLE_BYTES: u64 = 0x400;
const PLACES: u64 = 0x2_0000;
/// Room for the longest chain: a frame, and one that is too long.
const PLACE_BYTES: u64 = 0x1_1800;
/// The most buffers of a chain.
pub const PIECES_MAX: u64 = 48;

/// A chain that the device has.
#[derive(Clone, Debug)]
pub struct Given {
    head: u16,
    place: u64,
    /// Of what the device reads or, if there are any, of what it writes.
    pub buffers: Vec<Buffer>,
}

impl Given {
    /// Bytes of its buffers.
    pub fn len_bytes(&self) -> usize {
        self.buffers.iter().map(|(_, len_bytes)| *len_bytes as usize).sum()
    }

    /// Its first bytes.
    pub fn bytes(&self, len_bytes: usize, guest: &Guest) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, len) in &self.buffers {
            bytes.extend(guest.read(*at, (*len as usize).min(len_bytes - bytes.len())));
        }
        bytes
    }
}

/// A ring that is to be.
#[derive(Clone, Copy, Debug)]
pub struct RingSpec {
    /// Its place in the device.
    pub index: u16,
    /// Where the memory begins that it has for itself, [`bytes`](Self::bytes) of it.
    pub at: u64,
    /// Its entries.
    pub size: u16,
    /// What the driver has acknowledged.
    pub features: u64,
}

impl RingSpec {
    /// Memory that a ring of so many entries has for itself: its areas, indirect tables, and a place for each chain.
    pub const fn bytes(size: u16) -> u64 {
        (PLACES + size as u64 * PLACE_BYTES).next_multiple_of(0x1_0000)
    }
}

/// See the module's head.
pub struct Ring {
    index: u16,
    driver: Driver,
    guest: Arc<Guest>,
    at: u64,
    is_running: bool,
    /// Chains may be in a table.
    pub has_indirect: bool,
    first: u16,
    used: u16,
    places: Vec<u64>,
    /// What the device has, the oldest first.
    pub given: Vec<Given>,
}

impl Ring {
    /// A ring that runs.
    ///
    /// # Panics
    /// Its memory is not the guest's.
    pub fn start<D: Device>(
        spec: RingSpec,
        guest: &Arc<Guest>,
        stage: &mut Stage<D>,
        random: &mut Random,
    ) -> Self {
        let RingSpec { index, at, size, features } = spec;
        let layout = Layout { size, descriptors: at, available: at + 0x1000, used: at + 0x2000 };
        let mut driver = Driver::new(Arc::clone(guest), layout, features);
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
            has_indirect: features & VIRTIO_F_INDIRECT_DESC != 0,
            first,
            used: 0,
            places,
            given: Vec::new(),
        }
    }

    /// Its place in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether it runs, as its driver has it.
    pub fn is_running(&self) -> bool {
        self.is_running
    }

    /// Gives the device a chain of these bytes, then of buffers of these lengths; false where there is no room.
    ///
    /// # Panics
    /// The chain is longer than any.
    pub fn give(
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
    pub fn publish<D: Device>(&mut self, stage: &Stage<D>, random: &mut Random) {
        if self.driver.publish() || random.once_in(32) {
            stage.kernel().kick(self.index);
        }
    }

    /// The chains that have come back, which must be the oldest.
    ///
    /// # Panics
    /// They are not.
    pub fn take_used(&mut self) -> Vec<(Given, usize)> {
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

    /// Has the device stop it.
    pub fn stop<D: Device>(&mut self, stage: &mut Stage<D>) {
        if std::mem::take(&mut self.is_running) {
            stage.stop(self.index);
        }
    }

    /// Where the device has stopped, if it has.
    ///
    /// # Panics
    /// That is not where its chains have come back up to.
    pub fn base<D: Device>(&mut self, stage: &mut Stage<D>) -> Option<u16> {
        let base = if self.is_running { None } else { stage.stopped(self.index) }?;
        let taken = base.wrapping_sub(self.first);
        assert_eq!(taken, self.used, "what lies before the base {base} has come back, no more");
        Some(base)
    }

    /// Goes on from where the device [has stopped](Self::base).
    ///
    /// # Panics
    /// The ring cannot be started.
    pub fn go_on<D: Device>(&mut self, base: u16, stage: &mut Stage<D>) {
        stage.start(self.index, self.driver.setup(base)).expect("a ring");
        self.is_running = true;
    }
}
