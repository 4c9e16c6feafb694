//! A front end that lies about its memory, or takes it away.

use crate::aftermath::{Attacker, Reaction, Session};
use crate::subject::{Subject, must_work, promise};
use frontend::Error;
use frontend::block::{Request, VIRTIO_BLK_S_OK};
use frontend::front_end::FrontEnd;
use frontend::guest::{MemoryBy, Options};
use frontend::memory::{GuestMemory, Shape};
use frontend::message::{
    RegionDescription, VHOST_USER_ADD_MEM_REG, VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_SET_MEM_TABLE, VHOST_USER_SET_VRING_KICK,
    memory_table, single_region,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use rustix::fs::{Mode, OFlags, SealFlags, fcntl_add_seals};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Length of the regions here.
const REGION_BYTES: u64 = 1 << 16;
/// Guest and user address of regions that are far from the guest's own memory.
const FAR_GUEST: u64 = 1 << 40;
const FAR_USER: u64 = 1 << 41;
/// Regions in the longest table that a back end must take (our message table has the reason).
const TABLE_REGIONS: u64 = 32;

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

/// A region that has nothing wrong but what a test makes wrong.
fn far_region() -> RegionDescription {
    region(FAR_GUEST, REGION_BYTES, FAR_USER, 0)
}

/// Sends something about memory to a session whose rings run, with and without a way to be told of
/// its refusal. It must be refused, and change nothing.
#[track_caller]
fn must_refuse_message(
    subject: &mut Subject,
    request: u32,
    message: impl Fn(&Attacker) -> Vec<u8>,
    own_and_files: (bool, &[BorrowedFd<'_>]),
) {
    let all = Options::default();
    let protocol_features = all.protocol_features & !VHOST_USER_PROTOCOL_F_REPLY_ACK;
    for options in [all.clone(), Options { protocol_features, ..all }] {
        let attacker = Attacker::begin(subject, &options);
        let payload = message(&attacker);
        let own = attacker.driver.guest.memory.regions()[0].file();
        let (with_own, files) = own_and_files;
        let fds: Vec<_> =
            with_own.then_some(own).into_iter().chain(files.iter().copied()).collect();
        let asks = options.protocol_features & VHOST_USER_PROTOCOL_F_REPLY_ACK != 0;
        let flags = if asks { VHOST_USER_NEED_REPLY_MASK } else { 0 };
        let reaction = attacker.send((request, flags), &payload, &fds);
        let what = format!("request {request}, {payload:x?}, {} descriptors", fds.len());
        let refused = match reaction {
            Reaction::Refused => asks,
            Reaction::HungUp => true,
            Reaction::Answered | Reaction::Ignored => false,
        };
        promise(refused, || format!("{what}: {reaction:?}"));
        // Another program that believed it may have lost the neighbour's memory by that.
        let session = match reaction {
            Reaction::HungUp => Session::Over,
            _ if !refused => {
                drop(attacker);
                return subject.must_serve_the_next();
            }
            _ => Session::Lives,
        };
        attacker.after(subject, session, &what);
    }
}

/// Regions that must be refused in a table, after the guest's own.
#[track_caller]
fn must_refuse_table(
    subject: &mut Subject,
    regions: &[RegionDescription],
    files: &[BorrowedFd<'_>],
) {
    let table = |attacker: &Attacker| {
        let own = attacker.driver.guest.memory.regions()[0].description();
        memory_table(&[&[own], regions].concat())
    };
    must_refuse_message(subject, VHOST_USER_SET_MEM_TABLE, table, (true, files));
}

/// A region that must be refused, in a table and added by itself.
#[track_caller]
fn must_refuse(subject: &mut Subject, region: RegionDescription, file: BorrowedFd<'_>) {
    must_refuse_table(subject, &[region], &[file]);
    let message = |_: &Attacker| single_region(&region);
    must_refuse_message(subject, VHOST_USER_ADD_MEM_REG, message, (false, &[file]));
}

#[test]
fn file_shorter_than_its_region() {
    for mut subject in Subject::each() {
        let memory = file();
        let fd = memory.regions()[0].file();
        for (size_bytes, file_offset_bytes) in [
            (REGION_BYTES + 1, 0),
            (REGION_BYTES + 4096, 0),
            (1 << 40, 0),
            (1 << 62, 0),
            (REGION_BYTES, 1),
            (REGION_BYTES, 4096),
            (1, REGION_BYTES),
            (4096, REGION_BYTES),
            (4096, 1 << 40),
            (4096, 1 << 63),
        ] {
            must_refuse(
                &mut subject,
                RegionDescription { size_bytes, file_offset_bytes, ..far_region() },
                fd,
            );
        }
    }
}

#[test]
fn region_that_wraps_or_is_empty() {
    for mut subject in Subject::each() {
        let memory = file();
        let fd = memory.regions()[0].file();
        for (guest, size_bytes, user, offset) in [
            (FAR_GUEST, 0, FAR_USER, 0),
            (FAR_GUEST, 0, FAR_USER, REGION_BYTES),
            (u64::MAX - 4095, REGION_BYTES, FAR_USER, 0),
            (u64::MAX, 2, FAR_USER, 0),
            (FAR_GUEST, REGION_BYTES, u64::MAX - 4095, 0),
            (FAR_GUEST, u64::MAX, FAR_USER, 0),
            (FAR_GUEST, 1 << 63, FAR_USER, 0),
            (FAR_GUEST, (1 << 63) - 1, FAR_USER, 1 << 63),
            (FAR_GUEST, REGION_BYTES, FAR_USER, u64::MAX - 4095),
            (FAR_GUEST, REGION_BYTES, FAR_USER, u64::MAX),
            (4096, u64::MAX - 4095, FAR_USER, 4096),
            (0, u64::MAX, 0, u64::MAX),
        ] {
            must_refuse(&mut subject, region(guest, size_bytes, user, offset), fd);
        }
    }
}

/// An open file as the kernel gives it for `flags`.
fn open(path: &Path, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("it is there")
}

/// A memfd of the right length with seals.
fn sealed(seals: SealFlags) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("sealed", flags).expect("memfds can be made");
    rustix::fs::ftruncate(&memfd, REGION_BYTES).expect("a memfd can be extended");
    fcntl_add_seals(&memfd, seals).expect("a memfd that nobody has mapped can be sealed");
    memfd
}

#[test]
fn descriptor_that_is_no_memory() {
    for mut subject in Subject::each() {
        let directory = tests::temp_dir();
        let plain = directory.path().join("plain");
        File::create(&plain)
            .and_then(|file| file.set_len(REGION_BYTES))
            .expect("a file can be made");
        let notifiers = [Notifier::eventfd(), Notifier::pipe(), Notifier::socket()]
            .map(|notifier| notifier.expect("notifiers can be made"));
        let files = [
            open(directory.path(), OFlags::DIRECTORY),
            open(Path::new("/dev/null"), OFlags::RDWR),
            open(Path::new("/dev/zero"), OFlags::RDWR),
            open(&plain, OFlags::PATH),
            open(&plain, OFlags::RDONLY),
            open(&plain, OFlags::WRONLY),
            sealed(SealFlags::WRITE),
            sealed(SealFlags::FUTURE_WRITE),
            sealed(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL),
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
                .expect("epoll"),
        ];
        let all = notifiers.iter().map(Notifier::back_end_fd).chain(files.iter().map(AsFd::as_fd));
        for fd in all {
            must_refuse(&mut subject, RegionDescription { size_bytes: 4096, ..far_region() }, fd);
        }
    }
}

#[test]
fn overlapping_regions() {
    for mut subject in Subject::each() {
        let (one, two) = (file(), file());
        let fds = [one.regions()[0].file(), two.regions()[0].file()];
        let first = far_region();
        let elsewhere = RegionDescription { guest: 2 * FAR_GUEST, user: 2 * FAR_USER, ..first };
        for second in [
            first,
            RegionDescription { user: elsewhere.user, ..first },
            RegionDescription { guest: elsewhere.guest, ..first },
            RegionDescription { guest: first.guest + REGION_BYTES - 1, ..elsewhere },
            RegionDescription { guest: first.guest + REGION_BYTES - 4096, ..elsewhere },
            RegionDescription { guest: first.guest - REGION_BYTES + 1, ..elsewhere },
            RegionDescription { guest: first.guest + 4096, size_bytes: 4096, ..elsewhere },
            RegionDescription { user: first.user - 4096, ..elsewhere },
            RegionDescription { user: first.user + 4096, size_bytes: 4096, ..elsewhere },
        ] {
            must_refuse_table(&mut subject, &[first, second], &fds);
            must_refuse_table(&mut subject, &[second, first], &fds);
            // QEMU before version 8 adds one region for each queue pair.
            if second == first {
                continue;
            }
            let front_end = negotiated(&subject);
            front_end.add_mem_reg(&first, fds[0]).expect("the first can be added");
            let added = front_end.add_mem_reg(&second, fds[1]);
            promise(added.is_err(), || format!("{second:x?} was added to {first:x?}"));
        }
        subject.must_serve_the_next();
    }
}

#[test]
fn table_whose_count_does_not_fit_its_length_or_its_descriptors() {
    for mut subject in Subject::each() {
        let memory = file();
        let fd = memory.regions()[0].file();
        let one = far_region();
        let far = region(2 * FAR_GUEST, REGION_BYTES, 2 * FAR_USER, 0);
        must_refuse_table(&mut subject, &[one], &[]);
        must_refuse_table(&mut subject, &[one], &[fd, fd]);
        must_refuse_table(&mut subject, &[one, far], &[fd]);
        must_refuse_table(&mut subject, &[], &[fd]);
        for count in [0_u32, 2, 9, 33, 127, 1 << 16, 1 << 27, (1 << 27) + 1, u32::MAX] {
            let message = |_: &Attacker| {
                let mut payload = memory_table(&[one]);
                payload[..4].copy_from_slice(&count.to_ne_bytes());
                payload
            };
            must_refuse_message(&mut subject, VHOST_USER_SET_MEM_TABLE, message, (false, &[fd]));
        }
    }
}

/// Regions that lie one behind the other, with holes between them.
fn row_of_regions(count: u64) -> Vec<RegionDescription> {
    (0..count)
        .map(|at| region(FAR_GUEST + (at << 20), REGION_BYTES, FAR_USER + (at << 20), 0))
        .collect()
}

#[test]
fn tables_longer_than_any() {
    for mut subject in Subject::each() {
        let memory = file();
        let fd = memory.regions()[0].file();
        for (regions, fds) in [(32, 32), (32, 31), (126, 31), (126, 126), (126, 1)] {
            let fds = vec![fd; fds];
            must_refuse_table(&mut subject, &row_of_regions(regions), &fds);
        }
    }
}

#[test]
fn one_file_may_be_many_regions_in_any_order() {
    // A guest with much memory in one file: nothing forbids that its parts are the same.
    let mut subject = Subject::start();
    let memory = file();
    for reversed in [false, true] {
        let mut attacker = Attacker::begin(&subject, &Options::default());
        let guest = &attacker.driver.guest;
        let own = &guest.memory.regions()[0];
        let mut table: Vec<_> = row_of_regions(TABLE_REGIONS - 1)
            .into_iter()
            .map(|region| (region, memory.regions()[0].file()))
            .chain([(own.description(), own.file())])
            .collect();
        if reversed {
            table.reverse();
        }
        let (regions, fds): (Vec<_>, Vec<_>) = table.into_iter().unzip();
        let set = guest.front_end.set_mem_table_as(&regions, &fds);
        promise(set.is_ok(), || format!("a table of {TABLE_REGIONS} regions: {set:?}"));
        if set.is_ok() {
            must_work(&mut attacker.driver, 0);
            attacker.neighbour_must_work("the memory was described again");
        }
        attacker.after(&mut subject, Session::Either, "one file many times");
    }
}

#[test]
fn sealed_memory_and_plain_files_are_served() {
    let mut subject = Subject::start();
    let directory = tests::temp_dir();
    let plain = directory.path().join("plain");
    File::create(&plain).and_then(|file| file.set_len(REGION_BYTES)).expect("a file can be made");
    let files =
        [sealed(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), open(&plain, OFlags::RDWR)];
    for file in files {
        let attacker = Attacker::begin(&subject, &Options::default());
        let added = attacker.driver.guest.front_end.add_mem_reg(&far_region(), file.as_fd());
        added.expect("a region can be added");
        attacker.after(&mut subject, Session::Lives, "sealed memory");
    }
}

#[test]
fn regions_of_odd_lengths_and_places() {
    // Nothing says that they are whole pages: they may be served or refused.
    let mut subject = Subject::start();
    let memory = file();
    let fd = memory.regions()[0].file();
    for (guest, size_bytes, user, offset) in [
        (1, 4096, 0, 0),
        (0, 4095, 0, 0),
        (0, 1, 0, 0),
        (0, 4096, 1, 0),
        (0, 4096, 0, 1),
        (3, 5, 7, 11),
        (0, REGION_BYTES - 1, 0, 1),
    ] {
        let odd = region(FAR_GUEST + guest, size_bytes, FAR_USER + user, offset);
        let attacker = Attacker::begin(&subject, &Options::default());
        let request = (VHOST_USER_ADD_MEM_REG, VHOST_USER_NEED_REPLY_MASK);
        attacker.send(request, &single_region(&odd), &[fd]);
        attacker.after(&mut subject, Session::Either, &format!("{odd:x?}"));
    }
}

#[test]
fn removal_of_what_is_not_there() {
    for mut subject in Subject::each() {
        let memory = file();
        let there = region(0x10_0000, REGION_BYTES, 0x50_0000, 0);
        for other in [
            RegionDescription { guest: 0, ..there },
            RegionDescription { user: 0, ..there },
            RegionDescription { size_bytes: 4096, ..there },
        ] {
            let front_end = negotiated(&subject);
            front_end
                .add_mem_reg(&there, memory.regions()[0].file())
                .expect("a region can be added");
            let removed = front_end.rem_mem_reg(&other);
            promise(removed.is_err(), || format!("{other:x?} was removed"));
        }
        subject.must_serve_the_next();
    }
}

#[test]
fn one_region_more_than_there_are_slots() {
    for mut subject in Subject::each() {
        let memory = file();
        let front_end = negotiated(&subject);
        let slots = front_end.get_max_mem_slots().expect("memory slots are told");
        let place = |slot: u64| region(slot << 20, REGION_BYTES, slot << 20, 0);
        for slot in 0..slots {
            front_end
                .add_mem_reg(&place(slot), memory.regions()[0].file())
                .expect("there are slots left");
        }
        let added = front_end.add_mem_reg(&place(slots), memory.regions()[0].file());
        promise(added.is_err(), || format!("region {slots} was added"));
        drop(front_end);
        subject.must_serve_the_next();
    }
}

#[test]
fn ring_addresses_outside_the_memory() {
    // They may be refused at once, or when the ring is to start; a ring may also wait for its
    // memory, which can come later.
    for mut subject in Subject::each() {
        for (descriptors, available, used) in [
            (1 << 40, 0, 0),
            (0, u64::MAX - 1, 0),
            (0, 0, 0xffff_ffff_ffff_fffc),
            (8, 0, 0),
            (0, 1, 0),
            (0, 0, 2),
        ] {
            let mut driver = subject
                .driver(&Options { queue_count: subject.queue_count(), ..Options::default() });
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
                subject.must_work(&mut driver, 1);
            }
        }
        subject.must_serve_the_next();
    }
}

#[test]
fn memory_truncated_under_a_running_ring() {
    // Whoever touches it gets SIGBUS: the session ends, the process lives.
    for mut subject in Subject::each() {
        for kick in [Options::default().kick, None] {
            let mut driver = subject.driver(&Options { kick, ..Options::default() });
            subject.must_work(&mut driver, 0);
            driver.guest.memory.regions()[0].truncate(0).expect("a memfd can be truncated");
            driver.kick(0).expect("the device can be kicked");
            subject.provoke();
            driver.guest.front_end.wire().wait_for_hang_up(PATIENCE).expect("the session ends");
        }
        subject.must_serve_the_next();
    }
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
