//! Guest memory as honest front ends describe it: one region or several, in any order, in parts of
//! files, coming and going.

use crate::subject::{Subject, is_ours_to_promise, must_work};
use frontend::block::{BlockDriver, HEADER_BYTES, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::{MemoryBy, Options};
use frontend::memory::Shape;
use frontend::message::VIRTIO_F_EVENT_IDX;
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;

/// Length of the first region, which holds the rings.
const FIRST_BYTES: usize = 1 << 20;
/// Length of the regions after it.
const FURTHER_BYTES: usize = 1 << 16;
/// Where a PC has memory again, behind its hole for devices.
const ABOVE_4_GIB: u64 = 4 << 30;

fn shapes() -> Vec<Shape> {
    // The second is adjacent to the first; the last begins somewhere inside its file, as parts of a
    // file on hugetlbfs do.
    [
        (0, FIRST_BYTES, 0),
        (FIRST_BYTES as u64, FURTHER_BYTES, 0),
        (ABOVE_4_GIB, FURTHER_BYTES, 1 << 16),
    ]
    .map(|(guest, size_bytes, file_offset_bytes)| Shape { guest, size_bytes, file_offset_bytes })
    .to_vec()
}

/// Writes from a buffer at `from` and reads back into one at `to`.
fn must_carry(driver: &mut BlockDriver, (from, to): (u64, u64), size_bytes: u32) {
    let data: Vec<u8> = (0..size_bytes).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
    driver.guest.memory.write(from, &data);
    for (request, address, writable) in
        [(Request::write(8, &[]), from, false), (Request::read(8, 0), to, true)]
    {
        let header = driver.guest.allocate(HEADER_BYTES);
        let status = driver.guest.carve(1);
        driver.guest.memory.write(header, &request.header());
        driver.guest.memory.write(status, &[0xff]);
        let queue = &mut driver.guest.queues[0];
        queue.submit(&[
            Buffer { address: header, len_bytes: 16, writable: false },
            Buffer { address, len_bytes: size_bytes, writable },
            Buffer { address: status, len_bytes: 1, writable: true },
        ]);
        queue.kick().expect("the device can be kicked");
        queue.wait_used(PATIENCE).expect("the request ends");
        assert_eq!(driver.guest.memory.read(status, 1), [VIRTIO_BLK_S_OK], "data at {address:#x}");
    }
    assert!(
        driver.guest.memory.read(to, data.len()) == data,
        "{size_bytes} bytes from {from:#x} to {to:#x}"
    );
}

#[test]
fn buffers_may_lie_in_any_region_and_cross_adjacent_ones() {
    let subject = Subject::start();
    for memory_by in [MemoryBy::Table, MemoryBy::ReversedTable, MemoryBy::Regions] {
        let mut driver =
            subject.driver(&Options { memory: shapes(), memory_by, ..Options::default() });
        let size_bytes = 4 * u32::try_from(SECTOR_BYTES).unwrap_or(512);
        let border = FIRST_BYTES as u64 - SECTOR_BYTES as u64;
        must_carry(&mut driver, (border, ABOVE_4_GIB), size_bytes);
        must_carry(
            &mut driver,
            (ABOVE_4_GIB + FURTHER_BYTES as u64 - u64::from(size_bytes), border),
            size_bytes,
        );
        // Guests use buffers of any alignment for requests of their own making.
        must_carry(&mut driver, (border + 1, ABOVE_4_GIB + 3), size_bytes);
    }
}

#[test]
fn region_can_be_removed_and_added_while_the_ring_runs() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options {
        memory: shapes(),
        memory_by: MemoryBy::Regions,
        ..Options::default()
    });
    for _ in 0..20 {
        must_carry(&mut driver, (ABOVE_4_GIB, ABOVE_4_GIB + 8192), 4096);
        let region = &driver.guest.memory.regions()[2];
        driver.guest.front_end.rem_mem_reg(&region.description()).expect("a region can be removed");
        must_work(&mut driver, 0);
        let region = &driver.guest.memory.regions()[2];
        driver
            .guest
            .front_end
            .add_mem_reg(&region.description(), region.file())
            .expect("a region can be added");
    }
}

/// Takes the memory of the rings away and gives it back with `take` and `give`: nothing is lost.
fn must_outlast(
    driver: &mut BlockDriver,
    take: impl Fn(&BlockDriver) -> Result<(), frontend::Error>,
    give: impl Fn(&BlockDriver) -> Result<(), frontend::Error>,
) {
    for _ in 0..20 {
        must_work(driver, 0);
        take(driver).expect("the memory of a running ring can be taken away");
        driver.guest.front_end.barrier().expect("the connection is still there");
        let used = driver.guest.queues[0].ring().used_index();
        driver.submit(0, &Request::read(0, SECTOR_BYTES));
        driver.kick(0).expect("the device can be kicked");
        driver.guest.front_end.barrier().expect("the connection is still there");
        assert_eq!(driver.guest.queues[0].ring().used_index(), used, "it used memory that is gone");
        give(driver).expect("the memory can be given back");
        let outcome = driver.complete(0).expect("the request ends").1;
        assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
        let next = driver.guest.queues[0].ring().used_index();
        assert_eq!(next, used.wrapping_add(1), "the ring went on somewhere else");
    }
}

#[test]
fn ring_goes_on_where_it_was_when_its_own_region_is_removed_and_added() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    for event_idx in [VIRTIO_F_EVENT_IDX, 0] {
        let features = Options::default().features & !VIRTIO_F_EVENT_IDX | event_idx;
        let mut driver = subject.driver(&Options {
            memory: shapes(),
            memory_by: MemoryBy::Regions,
            features,
            ..Options::default()
        });
        must_outlast(
            &mut driver,
            |driver| {
                let region = driver.guest.memory.regions()[0].description();
                driver.guest.front_end.rem_mem_reg(&region)
            },
            |driver| {
                let region = &driver.guest.memory.regions()[0];
                driver.guest.front_end.add_mem_reg(&region.description(), region.file())
            },
        );
    }
}

#[test]
fn ring_goes_on_where_it_was_when_a_table_leaves_its_region_out_for_a_while() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { memory: shapes(), ..Options::default() });
    must_outlast(
        &mut driver,
        |driver| driver.guest.front_end.set_mem_table(&driver.guest.memory.regions()[1..]),
        |driver| driver.guest.front_end.set_mem_table(driver.guest.memory.regions()),
    );
}

#[test]
fn table_can_be_sent_again_while_the_ring_runs() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { memory: shapes(), ..Options::default() });
    for _ in 0..20 {
        must_carry(&mut driver, (ABOVE_4_GIB, 1 << 19), 4096);
        driver
            .guest
            .front_end
            .set_mem_table(driver.guest.memory.regions())
            .expect("the table can be sent again");
    }
}
