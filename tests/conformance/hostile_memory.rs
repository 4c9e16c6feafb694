//! A front end that lies about its memory, or takes it away.

use crate::subject::{QUEUE_COUNT, Subject, must_work};
use frontend::Error;
use frontend::block::{Request, VIRTIO_BLK_S_OK};
use frontend::front_end::FrontEnd;
use frontend::guest::{MemoryBy, Options};
use frontend::memory::{GuestMemory, Shape};
use frontend::message::{
    RegionDescription, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_SET_MEM_TABLE,
    VHOST_USER_SET_VRING_KICK, memory_table,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use std::os::fd::BorrowedFd;

/// Length of the regions here.
const REGION_BYTES: u64 = 1 << 16;

fn negotiated(subject: &Subject) -> FrontEnd {
    let options = Options { queue_count: 0, memory_by: MemoryBy::Regions, ..Options::default() };
    let guest = subject.driver(&options).guest;
    let region = guest.memory.regions()[0].description();
    guest.front_end.rem_mem_reg(&region).expect("a region can be removed");
    guest.front_end
}

fn file() -> GuestMemory {
    GuestMemory::flat(1 << 16).expect("memfds can be made")
}

fn region(guest: u64, size_bytes: u64, user: u64, file_offset_bytes: u64) -> RegionDescription {
    RegionDescription { guest, size_bytes, user, file_offset_bytes }
}

#[track_caller]
fn must_refuse_table(subject: &Subject, regions: &[RegionDescription], files: &[BorrowedFd<'_>]) {
    let refused = negotiated(subject).set_mem_table_as(regions, files);
    assert!(
        matches!(refused, Err(Error::Refused { .. } | Error::HangUp)),
        "{regions:x?} in a table: {refused:?}"
    );
}

/// A region that must be refused, alone in a table and added by itself.
#[track_caller]
fn must_refuse(subject: &Subject, region: RegionDescription, file: BorrowedFd<'_>) {
    must_refuse_table(subject, &[region], &[file]);
    let refused = negotiated(subject).add_mem_reg(&region, file);
    assert!(
        matches!(refused, Err(Error::Refused { .. } | Error::HangUp)),
        "{region:x?} added: {refused:?}"
    );
}

#[test]
fn file_shorter_than_its_region() {
    let mut subject = Subject::start();
    let memory = file();
    let fd = memory.regions()[0].file();
    for (size_bytes, offset) in [
        (REGION_BYTES + 4096, 0),
        (1 << 40, 0),
        (REGION_BYTES, 4096),
        (4096, REGION_BYTES),
        (4096, 1 << 40),
    ] {
        must_refuse(&subject, region(0, size_bytes, 0, offset), fd);
    }
    subject.must_serve_the_next();
}

#[test]
fn region_that_wraps_or_is_empty() {
    let mut subject = Subject::start();
    let memory = file();
    let fd = memory.regions()[0].file();
    for (guest, size_bytes, user, offset) in [
        (0, 0, 0, 0),
        (u64::MAX - 4095, REGION_BYTES, 0, 0),
        (0, REGION_BYTES, u64::MAX - 4095, 0),
        (0, u64::MAX, 0, 0),
        (0, REGION_BYTES, 0, u64::MAX - 4095),
        (4096, u64::MAX - 4095, 0, 4096),
    ] {
        must_refuse(&subject, region(guest, size_bytes, user, offset), fd);
    }
    subject.must_serve_the_next();
}

#[test]
fn descriptor_that_is_no_memory() {
    let mut subject = Subject::start();
    let (event, pipe) = (Notifier::eventfd().expect("eventfds"), Notifier::pipe().expect("pipes"));
    must_refuse(&subject, region(0, 4096, 0, 0), event.back_end_fd());
    must_refuse(&subject, region(0, 4096, 0, 0), pipe.back_end_fd());
    subject.must_serve_the_next();
}

#[test]
fn overlapping_regions() {
    let mut subject = Subject::start();
    let (one, two) = (file(), file());
    let fds = [one.regions()[0].file(), two.regions()[0].file()];
    let first = region(0x10_0000, REGION_BYTES, 0x50_0000, 0);
    for second in [
        first,
        RegionDescription { user: 0x90_0000, ..first },
        RegionDescription { guest: 0x90_0000, ..first },
        RegionDescription { guest: first.guest + REGION_BYTES - 4096, user: 0x90_0000, ..first },
        RegionDescription { guest: 0x90_0000, user: first.user - 4096, ..first },
    ] {
        must_refuse_table(&subject, &[first, second], &fds);
        let front_end = negotiated(&subject);
        front_end.add_mem_reg(&first, fds[0]).expect("the first can be added");
        assert!(
            front_end.add_mem_reg(&second, fds[1]).is_err(),
            "{second:x?} was added to {first:x?}"
        );
    }
    subject.must_serve_the_next();
}

#[test]
fn table_whose_count_does_not_fit_its_length_or_its_descriptors() {
    let mut subject = Subject::start();
    let memory = file();
    let fd = memory.regions()[0].file();
    let one = region(0, REGION_BYTES, 0, 0);
    let far = region(1 << 30, REGION_BYTES, 1 << 30, 0);
    must_refuse_table(&subject, &[one], &[]);
    must_refuse_table(&subject, &[one], &[fd, fd]);
    must_refuse_table(&subject, &[one, far], &[fd]);
    for count in [0_u32, 2, 9, 1 << 16, u32::MAX] {
        let mut payload = memory_table(&[one]);
        payload[..4].copy_from_slice(&count.to_ne_bytes());
        let front_end = negotiated(&subject);
        let sent = front_end.wire().send(
            VHOST_USER_SET_MEM_TABLE,
            VHOST_USER_NEED_REPLY_MASK,
            &payload,
            &[fd],
        );
        match sent.and_then(|()| front_end.wire().receive(PATIENCE)) {
            Ok(reply) => assert_ne!(reply.word(0), Some(0), "one region that says it is {count}"),
            Err(error) => assert!(matches!(error, Error::HangUp), "{error}"),
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn removal_of_what_is_not_there() {
    let mut subject = Subject::start();
    let memory = file();
    let there = region(0x10_0000, REGION_BYTES, 0x50_0000, 0);
    for other in [
        RegionDescription { guest: 0, ..there },
        RegionDescription { user: 0, ..there },
        RegionDescription { size_bytes: 4096, ..there },
    ] {
        let front_end = negotiated(&subject);
        front_end.add_mem_reg(&there, memory.regions()[0].file()).expect("a region can be added");
        assert!(front_end.rem_mem_reg(&other).is_err(), "{other:x?} was removed");
    }
    subject.must_serve_the_next();
}

#[test]
fn one_region_more_than_there_are_slots() {
    let mut subject = Subject::start();
    let memory = file();
    let front_end = negotiated(&subject);
    let slots = front_end.get_max_mem_slots().expect("memory slots are told");
    let place = |slot: u64| region(slot << 20, REGION_BYTES, slot << 20, 0);
    for slot in 0..slots {
        front_end
            .add_mem_reg(&place(slot), memory.regions()[0].file())
            .expect("there are slots left");
    }
    assert!(
        front_end.add_mem_reg(&place(slots), memory.regions()[0].file()).is_err(),
        "region {slots} was added"
    );
    drop(front_end);
    subject.must_serve_the_next();
}

#[test]
fn ring_addresses_outside_the_memory() {
    // They may be refused at once, or when the ring is to start; a ring may also wait for its
    // memory, which can come later.
    let mut subject = Subject::start();
    for (descriptors, available, used) in [
        (1 << 40, 0, 0),
        (0, u64::MAX - 1, 0),
        (0, 0, 0xffff_ffff_ffff_fffc),
        (8, 0, 0),
        (0, 1, 0),
        (0, 0, 2),
    ] {
        let mut driver =
            subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
        let front_end = &driver.guest.front_end;
        front_end.get_vring_base(0).expect("the ring can be stopped");
        let mut addresses = driver.guest.ring_addresses(0);
        addresses.descriptors = addresses.descriptors.wrapping_add(descriptors);
        addresses.available = addresses.available.wrapping_add(available);
        addresses.used = addresses.used.wrapping_add(used);
        match front_end.set_vring_addr(&addresses) {
            Err(Error::HangUp) => continue,
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => panic!("neither accepted nor refused: {error}"),
        }
        let kick = Notifier::eventfd().expect("eventfds");
        kick.signal().expect("an eventfd can be written");
        let started =
            front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, 0, Some(kick.back_end_fd()));
        if !matches!(started, Err(Error::HangUp)) {
            must_work(&mut driver, 1);
        }
    }
    subject.must_serve_the_next();
}

#[test]
fn memory_truncated_under_a_running_ring() {
    // Whoever touches it gets SIGBUS: the session ends, the process lives.
    let mut subject = Subject::start();
    for kick in [Options::default().kick, None] {
        let mut driver = subject.driver(&Options { kick, ..Options::default() });
        must_work(&mut driver, 0);
        driver.guest.memory.regions()[0].truncate(0).expect("a memfd can be truncated");
        driver.kick(0).expect("the device can be kicked");
        driver.guest.front_end.wire().wait_for_hang_up(PATIENCE).expect("the session ends");
    }
    subject.must_serve_the_next();
}

#[test]
fn memory_truncated_under_the_buffers() {
    // The rings stay whole, so the request may also fail by itself: the kernel, which does the
    // copying, says EFAULT.
    let mut subject = Subject::start();
    let shapes = [(0, 1 << 20), (1 << 30, REGION_BYTES)].map(|(guest, size)| Shape {
        guest,
        size_bytes: usize::try_from(size).unwrap_or(0),
        file_offset_bytes: 0,
    });
    for lost in ["data", "status", "header"] {
        let mut driver = subject.driver(&Options { memory: shapes.to_vec(), ..Options::default() });
        must_work(&mut driver, 0);
        driver.guest.memory.regions()[1].truncate(0).expect("a memfd can be truncated");
        let place = |driver: &mut frontend::block::BlockDriver, what| {
            if what == lost { shapes[1].guest } else { driver.guest.reserve(4096) }
        };
        let (header, data, status) = (
            place(&mut driver, "header"),
            place(&mut driver, "data"),
            place(&mut driver, "status"),
        );
        if lost != "header" {
            driver.guest.memory.write(header, &Request::read(0, 4096).header());
        }
        let queue = &mut driver.guest.queues[0];
        queue.submit(&[(header, 16, false), (data, 4096, true), (status, 1, true)].map(
            |(address, len_bytes, writable)| frontend::virtqueue::Buffer {
                address,
                len_bytes,
                writable,
            },
        ));
        queue.kick().expect("the device can be kicked");
        match queue.wait_used(PATIENCE) {
            Ok(_) if lost == "data" => assert_ne!(
                driver.guest.memory.read(status, 1),
                [VIRTIO_BLK_S_OK],
                "data went nowhere"
            ),
            Ok(_) => {}
            Err(_) => {
                driver.guest.front_end.wire().wait_for_hang_up(PATIENCE).expect("the session ends")
            }
        }
    }
    subject.must_serve_the_next();
}
