//! Requests whose data lies in pieces of any length at any guest address, as no Linux driver has it
//! and firmware may.

use frontend::block::{BlockDriver, HEADER_BYTES, Request, VIRTIO_BLK_S_OK};
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;
use load::Random;

/// What guest memory around a request holds, before and after.
const AROUND: u8 = 0xcc;

/// One piece of a request's data: so many bytes behind the last one, and so long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) gap: usize,
    pub(crate) len: usize,
}

/// The pieces of a request's data, from an address that is a multiple of a page on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) pieces: Vec<Piece>,
    /// Header and first data in one descriptor, or last data and status.
    pub(crate) joined: bool,
}

impl Layout {
    /// The data in one piece, so many bytes behind the start of a page.
    pub(crate) fn at(gap: usize, len: usize) -> Self {
        Layout { pieces: vec![Piece { gap, len }], joined: false }
    }

    /// Pieces of these lengths, each so many bytes behind the last.
    pub(crate) fn of(gap: usize, lens: &[usize]) -> Self {
        let pieces = lens.iter().map(|len| Piece { gap, len: *len }).collect();
        Layout { pieces, joined: false }
    }

    /// With header or status beside the data in one descriptor.
    pub(crate) fn joined(self) -> Self {
        Layout { joined: true, ..self }
    }

    /// Any layout of `len` bytes: aligned and not, of few pieces and of many.
    pub(crate) fn random(random: &mut Random, len: usize) -> Self {
        let mut left = len;
        let mut pieces = Vec::new();
        let [coarse, even] = [4, 2].map(|of| random.below(of) > 0);
        while left > 0 {
            let most = if coarse { 64 << 10 } else { 700 };
            let mut len = 1 + usize::try_from(random.below(most)).expect("small");
            if even {
                len = len.next_multiple_of(512);
            }
            // A chain has room for so many descriptors, and no more.
            let len = if pieces.len() >= 900 { left } else { len.min(left) };
            let gap = match random.below(4) {
                0 => 0,
                1 => 512 * usize::try_from(random.below(8)).expect("small"),
                _ => usize::try_from(random.below(4096)).expect("small"),
            };
            pieces.push(Piece { gap, len });
            left -= len;
        }
        Layout { pieces, joined: random.below(4) == 0 }
    }

    fn len_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    fn room_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.gap + piece.len).sum::<usize>() + HEADER_BYTES + 1
    }
}

/// A request in guest memory.
#[derive(Debug)]
pub(crate) struct Placed {
    /// What the data is in, gaps included.
    room: (u64, usize),
    data: Vec<(u64, usize)>,
    status: u64,
    buffers: Vec<Buffer>,
    writable: bool,
}

impl Placed {
    /// Puts a request for `sector` into guest memory: a write of `data`, or else a read.
    pub(crate) fn new(
        driver: &mut BlockDriver,
        sector: u64,
        layout: &Layout,
        data: Option<&[u8]>,
    ) -> Self {
        let guest = &mut driver.guest;
        let header = guest.carve(HEADER_BYTES);
        let room_bytes = layout.room_bytes();
        let room = guest.carve(room_bytes + 4096).next_multiple_of(4096);
        let mut status = guest.carve(1);
        guest.memory.write(room, &vec![AROUND; room_bytes]);
        let writable = data.is_none();
        let request = if writable { Request::read(sector, 0) } else { Request::write(sector, &[]) };
        let mut buffers = Vec::new();
        let mut at = room;
        let mut places = Vec::new();
        let last = layout.pieces.len() - 1;
        for (number, piece) in layout.pieces.iter().enumerate() {
            let from = at + piece.gap as u64;
            let (mut start, mut len) = (from, piece.len);
            if layout.joined && !writable && number == 0 {
                guest.memory.write(from, &request.header());
                start += HEADER_BYTES as u64;
                len += HEADER_BYTES;
            } else if number == 0 {
                guest.memory.write(header, &request.header());
                buffers.push((header, HEADER_BYTES, false));
            }
            if layout.joined && writable && number == last {
                status = start + piece.len as u64;
                len += 1;
            }
            places.push((start, piece.len));
            buffers.push((from, len, writable));
            at = start + piece.len as u64;
        }
        if !(layout.joined && writable) {
            buffers.push((status, 1, true));
        }
        guest.memory.write(status, &[0xa5]);
        let mut rest = data.unwrap_or_default();
        for (at, len) in places.iter().filter(|_| !writable) {
            let (now, later) = rest.split_at(*len);
            guest.memory.write(*at, now);
            rest = later;
        }
        let buffers = buffers
            .into_iter()
            .map(|(address, len, writable)| {
                let len_bytes = u32::try_from(len).expect("a test's buffers are short");
                Buffer { address, len_bytes, writable }
            })
            .collect();
        Placed { room: (room, room_bytes), data: places, status, buffers, writable }
    }

    /// Makes it available; its head.
    pub(crate) fn submit(&self, driver: &mut BlockDriver, queue: u16) -> u16 {
        let table = driver.guest.carve(16 * self.buffers.len());
        driver.guest.queues[usize::from(queue)].submit_indirect(&self.buffers, table)
    }

    /// What has come of it: the data that was read. Nothing around it has changed.
    pub(crate) fn answer(&self, driver: &BlockDriver) -> Vec<u8> {
        let memory = &driver.guest.memory;
        assert_eq!(memory.read(self.status, 1), [VIRTIO_BLK_S_OK], "{self:?}");
        let (room, room_bytes) = self.room;
        let mut around = memory.read(room, room_bytes);
        let mut data = Vec::new();
        for (at, len) in &self.data {
            let from = usize::try_from(at - room).expect("it is in the room");
            data.extend_from_slice(&around[from..from + len]);
            around[from..from + len].fill(AROUND);
        }
        if self.writable {
            if let Some(at) = self.status.checked_sub(room).filter(|at| *at < room_bytes as u64) {
                around[usize::try_from(at).expect("it is in the room")] = AROUND;
            }
            assert!(around.iter().all(|byte| *byte == AROUND), "bytes around {self:?} changed");
        }
        data
    }
}

/// One request from start to end.
fn perform(driver: &mut BlockDriver, sector: u64, layout: &Layout, data: Option<&[u8]>) -> Vec<u8> {
    // Takes back the room of the last one.
    driver.guest.allocate(0);
    let placed = Placed::new(driver, sector, layout, data);
    placed.submit(driver, 0);
    driver.kick(0).expect("the device can be kicked");
    let used = driver.guest.queues[0].wait_used(PATIENCE).expect("the request ends");
    let written = if placed.writable { layout.len_bytes() + 1 } else { 1 };
    assert_eq!(used.len_bytes as usize, written, "{layout:?}");
    placed.answer(driver)
}

/// Writes `data`, of which the layout has as many bytes.
pub(crate) fn write(driver: &mut BlockDriver, sector: u64, layout: &Layout, data: &[u8]) {
    perform(driver, sector, layout, Some(data));
}

/// Reads as many bytes as the layout has.
pub(crate) fn read(driver: &mut BlockDriver, sector: u64, layout: &Layout) -> Vec<u8> {
    perform(driver, sector, layout, None)
}

/// Writes and reads of random places in random layouts against a copy of the disk, whose length is
/// a whole number of sectors; the disk is full of zeros.
pub(crate) fn churn(driver: &mut BlockDriver, seed: u64, rounds: usize, disk_bytes: usize) {
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    let mut model = vec![0; disk_bytes];
    let sectors = disk_bytes as u64 / 512;
    for round in 0..rounds {
        // Mostly short, and crowded at the start, so that neighbours touch.
        let crowd = if random.below(2) == 0 { 64 } else { sectors };
        let sector = random.below(crowd.min(sectors));
        let longest = if random.below(8) == 0 { 2048 } else { 24 };
        let count = 1 + random.below(longest.min(sectors - sector));
        let len = usize::try_from(count * 512).expect("short");
        let at = usize::try_from(sector * 512).expect("a small disk");
        let layout = Layout::random(&mut random, len);
        if random.below(2) == 0 {
            let mut data = vec![0; len];
            random.fill(&mut data);
            write(driver, sector, &layout, &data);
            model[at..at + len].copy_from_slice(&data);
        } else {
            let found = read(driver, sector, &layout);
            assert!(found == model[at..at + len], "round {round}: {count} sectors at {sector}");
        }
    }
    for (number, expected) in model.chunks(1 << 20).enumerate() {
        let found = read(driver, number as u64 * 2048, &Layout::at(0, expected.len()));
        assert!(found == expected, "MiB {number} at the end");
    }
}
