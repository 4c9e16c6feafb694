//! What a device writes to a ring and to the memory around it, what it leaves alone, and which of the
//! driver's fields it heeds (VIRTIO 1.3, 2.7).

use crate::subject::Subject;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::memory::Shape;
use frontend::message::VIRTIO_F_EVENT_IDX;
use frontend::ring::{SplitRing, VIRTQ_AVAIL_F_NO_INTERRUPT};
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;
use std::ops::Range;
use std::time::Duration;

/// Little enough to be compared whole.
const MEMORY_BYTES: usize = 1 << 20;
const QUEUE_SIZE: u16 = 32;

fn options(event_idx: bool) -> Options {
    let all = Options::default().features;
    Options {
        features: if event_idx { all } else { all & !VIRTIO_F_EVENT_IDX },
        queue_size: QUEUE_SIZE,
        memory: vec![Shape { guest: 0, size_bytes: MEMORY_BYTES, file_offset_bytes: 0 }],
        ..Options::default()
    }
}

/// A chain of a request, and where the device may write in it.
fn chain(driver: &mut BlockDriver, request: &Request) -> (Vec<Buffer>, Vec<Range<u64>>) {
    let mut buffers = Vec::new();
    let parts = [(request.header(), false)]
        .into_iter()
        .chain(request.readable.iter().map(|data| (data.clone(), false)))
        .chain(request.writable_bytes.iter().map(|len| (vec![0xa5; *len], true)))
        .chain([(vec![0xa5], true)]);
    for (bytes, writable) in parts {
        let address = driver.guest.reserve(bytes.len());
        driver.guest.memory.write(address, &bytes);
        let len_bytes = u32::try_from(bytes.len()).expect("a test's buffers are short");
        buffers.push(Buffer { address, len_bytes, writable });
    }
    let writable = buffers.iter().filter(|buffer| buffer.writable);
    let rooms = writable.map(|buffer| buffer.address..buffer.address + u64::from(buffer.len_bytes));
    let rooms = rooms.collect();
    (buffers, rooms)
}

fn used_area(ring: &SplitRing) -> Range<u64> {
    // VIRTIO 1.3, 2.7: 6 bytes and 8 for each entry.
    ring.used_address()..ring.used_address() + 6 + 8 * u64::from(ring.size())
}

#[test]
fn nothing_is_written_but_the_used_ring_and_device_writable_buffers() {
    // VIRTIO 1.3, 2.7.5.1: the device MUST NOT write to a device-readable buffer, nor to any entry of
    // a descriptor table.
    let subject = Subject::start();
    for event_idx in [true, false] {
        let mut driver = subject.driver(&options(event_idx));
        let table = driver.guest.reserve(256);
        let data = [0x3c; 4 * SECTOR_BYTES];
        let requests = [
            Request::write(8, &data),
            Request::read(8, data.len()),
            Request::flush(),
            Request::get_id(),
        ];
        for (round, request) in requests.iter().cycle().take(40).enumerate() {
            let (buffers, mut rooms) = chain(&mut driver, request);
            let queue = &mut driver.guest.queues[0];
            rooms.push(used_area(queue.ring()));
            if round % 2 == 0 {
                queue.submit(&buffers);
            } else {
                queue.submit_indirect(&buffers, table);
            }
            let status = buffers.last().expect("a chain has buffers").address;
            let before = driver.guest.memory.read(0, MEMORY_BYTES);
            let queue = &mut driver.guest.queues[0];
            queue.kick().expect("the device can be kicked");
            queue.look_for_used(PATIENCE).expect("the request ends");
            let after = driver.guest.memory.read(0, MEMORY_BYTES);
            assert_eq!(driver.guest.memory.read(status, 1), [VIRTIO_BLK_S_OK]);
            for (at, (old, new)) in (0..).zip(before.iter().zip(&after)) {
                let may_change = old == new || rooms.iter().any(|room| room.contains(&at));
                assert!(may_change, "request type {}: byte {at:#x} was written", request.kind);
            }
        }
    }
}

#[test]
fn used_flags_are_0_with_event_idx_and_never_more_than_1_without() {
    // VIRTIO 1.3, 2.7.10.2: the device MUST set flags to 0 with EVENT_IDX, to 0 or 1 without.
    let subject = Subject::start();
    for (event_idx, most) in [(true, 0), (false, 1)] {
        let mut driver = subject.driver(&options(event_idx));
        for _ in 0..200 {
            for at in 0..4 {
                driver.submit(0, &Request::read(at, SECTOR_BYTES));
            }
            driver.kick(0).expect("the device can be kicked");
            for _ in 0..4 {
                let flags = driver.guest.queues[0].ring().used_flags();
                assert!(flags <= most, "EVENT_IDX: {event_idx}, flags: {flags:#x}");
                driver.complete_by_looking(0).expect("the request ends");
            }
        }
        driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        assert_eq!(
            driver.guest.queues[0].ring().used_flags(),
            0,
            "whoever comes next gets no kicks"
        );
    }
}

/// One request, of whose end the driver must be told by a call.
#[track_caller]
fn must_call(driver: &mut BlockDriver, what: &str) {
    let call = driver.guest.queues[0].call_notifier().expect("the queue has a call descriptor");
    call.wait(Duration::ZERO).expect("the call descriptor can be read");
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    driver.kick(0).expect("the device can be kicked");
    driver.complete_by_looking(0).expect("the request ends");
    let call = driver.guest.queues[0].call_notifier().expect("the queue has a call descriptor");
    assert_ne!(call.wait(PATIENCE).expect("the call descriptor can be read"), 0, "{what}");
}

#[test]
fn with_event_idx_the_flag_against_calls_means_nothing() {
    // VIRTIO 1.3, 2.7.7.2: the device MUST ignore the lower bit of flags.
    let subject = Subject::start();
    let mut driver = subject.driver(&options(true));
    driver.guest.queues[0].ring().set_available_flags(VIRTQ_AVAIL_F_NO_INTERRUPT);
    for _ in 0..20 {
        let ring = driver.guest.queues[0].ring();
        ring.set_used_event(ring.used_index());
        must_call(&mut driver, "no call at used_event");
    }
}

#[test]
fn without_event_idx_the_event_index_means_nothing() {
    // VIRTIO 1.3, 2.7.7.2: the device MUST ignore the used_event value.
    let subject = Subject::start();
    let mut driver = subject.driver(&options(false));
    for ahead in [1000, 5, 0, u16::MAX, 1 << 15] {
        let ring = driver.guest.queues[0].ring();
        ring.set_used_event(ring.used_index().wrapping_add(ahead));
        must_call(&mut driver, "no call, for the sake of a used_event that is none");
    }
}
