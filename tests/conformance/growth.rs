//! Nothing grows: after 1,000 rounds of whatever front ends and drivers do, the process has the
//! descriptors, threads, mappings and memory that it had after 500, or would have after more.
//!
//! Compared are moments at which one fresh front end is served, so that all before it has ended.

use crate::aftermath::{Reaction, reaction};
use crate::control;
use crate::subject::{
    QUEUE_COUNT, SETTLING, Subject, is_another_program, is_ours_to_promise, is_peer, must_work,
    promise,
};
use frontend::block::{BlockDriver, Request};
use frontend::front_end::FrontEnd;
use frontend::guest::{MemoryBy, Options};
use frontend::memory::{GuestMemory, Shape};
use frontend::message::{
    HEADER_BYTES, RegionDescription, TABLE, VHOST_USER_GET_FEATURES, VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_SET_FEATURES, VHOST_USER_SET_MEM_TABLE, VHOST_USER_SET_OWNER,
    VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR, VHOST_USER_SET_VRING_KICK,
    VHOST_USER_VERSION, header, memory_table,
};
use frontend::notifier::Notifier;
use frontend::wire::PATIENCE;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Rounds of each kind; the first half is for what is learnt once.
const ROUNDS: usize = 1000;
/// Halves of which one must leave nothing behind.
const HALVES: usize = 4;
/// What the allocator may have come to hold in a half without there being a leak: seen are one or
/// two pages. A leak can hide in what it has free at first, some 100 KiB: 400 bytes a round cannot.
const MEMORY_NOISE_BYTES: u64 = 32 << 10;
/// The same for its mappings. Those of guest memory that is not let go of are one a round.
const MAPPINGS_NOISE: usize = 8;

/// What a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    memory_bytes: u64,
}

impl Held {
    fn by(subject: &Subject) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{}/status", subject.id()))
            .expect("the process lives");
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).expect("Linux tells it");
            line.split_whitespace()
                .nth(1)
                .and_then(|kib| kib.parse::<u64>().ok())
                .expect("a number")
        };
        // Pages of files are the kernel's to keep or drop.
        let memory_bytes = (kib("RssAnon:") + kib("RssShmem:")) << 10;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", subject.id()))
            .expect("the process lives");
        Held {
            descriptors: subject.count("fd"),
            threads: threads(subject),
            mappings: maps.lines().count(),
            memory_bytes,
        }
    }

    fn is_no_more_than(&self, before: &Held) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.mappings <= before.mappings + MAPPINGS_NOISE
            && self.memory_bytes <= before.memory_bytes + MEMORY_NOISE_BYTES
    }
}

/// Threads but for the kernel's own of io_uring, which come and go as it likes.
fn threads(subject: &Subject) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", subject.id())).expect("it lives");
    let is_ours = |name: &String| !name.is_empty() && !name.starts_with("iou-");
    tasks
        .flatten()
        .map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default())
        .filter(is_ours)
        .count()
}

/// Runs a half twice or more often, until one has left nothing behind. What grows without end grows
/// in each; what an allocator comes to hold once, when threads first meet in it, in one.
#[track_caller]
fn halves_must_be_alike(subject: &mut Subject, mut half: impl FnMut(&Subject)) {
    half(subject);
    let mut held = vec![held_when_idle(subject, None)];
    while held.len() <= HALVES {
        let before = held[held.len() - 1];
        half(subject);
        let now = held_when_idle(subject, Some(before));
        held.push(now);
        if now.is_no_more_than(&before) {
            return subject.must_serve_the_next();
        }
    }
    promise(false, || format!("it grows and grows: {held:#?}"));
    subject.must_serve_the_next();
}

/// What the process has while it serves a front end that does nothing; waits a while for it to be
/// no more than `before`.
fn held_when_idle(subject: &Subject, before: Option<Held>) -> Held {
    let _served = idle(subject);
    let deadline = Instant::now() + SETTLING;
    loop {
        let now = Held::by(subject);
        let settled = before.is_none_or(|before| now.is_no_more_than(&before));
        if settled || Instant::now() >= deadline {
            return now;
        }
        std::thread::yield_now();
    }
}

/// Rounds that have nothing in common but the process.
#[track_caller]
fn rounds_must_leave_nothing(subject: &mut Subject, round: impl Fn(&Subject, usize)) {
    halves_must_be_alike(subject, |subject| (0..ROUNDS / 2).for_each(|at| round(subject, at)));
}

/// Rounds of one session, which ends with them.
#[track_caller]
fn session_must_leave_nothing(subject: &mut Subject, round: impl Fn(&BlockDriver)) {
    halves_must_be_alike(subject, |subject| {
        let driver = subject.driver(&small());
        (0..ROUNDS / 2).for_each(|_| round(&driver));
    });
}

/// A front end that has negotiated, and nothing else.
fn idle(subject: &Subject) -> FrontEnd {
    subject.driver(&without_queues()).guest.front_end
}

fn without_queues() -> Options {
    let memory = vec![Shape { guest: 0, size_bytes: 1 << 16, file_offset_bytes: 0 }];
    Options { queue_count: 0, memory, ..Options::default() }
}

/// A small guest, so that making it costs little.
fn small() -> Options {
    let memory = vec![Shape { guest: 0, size_bytes: 1 << 20, file_offset_bytes: 0 }];
    Options { queue_size: 16, queue_count: QUEUE_COUNT, memory, ..Options::default() }
}

#[test]
fn connections_that_say_nothing() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| drop(FrontEnd::connect(subject.socket())));
}

#[test]
fn connections_that_negotiate() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| drop(idle(subject)));
}

#[test]
fn sessions_with_requests() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        let mut driver = subject.driver(&small());
        for queue in 0..QUEUE_COUNT {
            must_work(&mut driver, queue);
        }
    });
}

#[test]
fn sessions_that_end_with_requests_in_flight() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        let mut driver = subject.driver(&small());
        for at in 0..4 {
            driver.submit(0, &Request::write(at * 8, &[0x77; 4096]));
        }
        driver.kick(0).expect("the device can be kicked");
    });
}

#[test]
fn bad_messages() {
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds");
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        let front_end = idle(subject);
        let row = &TABLE[number % TABLE.len()];
        let fds = vec![file.back_end_fd(); number % 5];
        let flags = if number % 2 == 0 { VHOST_USER_NEED_REPLY_MASK } else { 0 };
        let payload = vec![0; row.size_bytes + 1];
        front_end.wire().send(row.request, flags, &payload, &fds).expect("the bytes go out");
    });
}

#[test]
fn half_messages_with_descriptors() {
    let mut subject = Subject::start();
    let file = Notifier::eventfd().expect("eventfds");
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        let front_end = idle(subject);
        let mut message = header(VHOST_USER_SET_FEATURES, VHOST_USER_VERSION, 8);
        message.extend([0; 7]);
        let fds = vec![file.back_end_fd(); number % 33];
        let cut = 1 + number % (HEADER_BYTES + 7);
        let sent = front_end.wire().send_bytes(&message[..cut], &fds);
        promise(sent.is_ok(), || format!("half a message does not go out: {sent:?}"));
    });
}

#[test]
fn refusals_within_one_session() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    session_must_leave_nothing(&mut subject, |driver| {
        let front_end = &driver.guest.front_end;
        let memory = &driver.guest.memory.regions()[0];
        let size = front_end.set_vring_num(0, 3);
        let whole = memory.description();
        let overlapping = RegionDescription { size_bytes: whole.size_bytes / 2, ..whole };
        let region = front_end.add_mem_reg(&overlapping, memory.file());
        let many = vec![memory.file(); 31];
        let surplus = (VHOST_USER_SET_OWNER, VHOST_USER_NEED_REPLY_MASK);
        let surplus = reaction(front_end.wire(), surplus, &[], &many);
        assert!(
            size.is_err() && region.is_err() && surplus == Reaction::Refused,
            "{size:?}, {region:?}, {surplus:?}"
        );
    });
}

#[test]
fn broken_rings() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        let driver = subject.driver(&small());
        driver.guest.queues[0].ring().set_available_index(1000);
        driver.kick(0).expect("the device can be kicked");
        // Another program need not say so.
        let patience = if is_peer() { Duration::ZERO } else { PATIENCE };
        let broken = driver.guest.errs[0].wait(patience).expect("it can be read");
        promise(broken == 1, || "nobody hears that a ring is broken".into());
    });
}

#[test]
fn rings_that_break_and_start_again() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    session_must_leave_nothing(&mut subject, |driver| {
        let guest = &driver.guest;
        let ring = guest.queues[0].ring();
        ring.set_available_index(1000);
        driver.kick(0).expect("the device can be kicked");
        let broken = guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read");
        assert_eq!(broken, 1, "the ring is not broken");
        guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        ring.set_available_index(0);
        guest.start_queue(0, 0).expect("the ring can be started");
        guest.enable(0).expect("the ring can be enabled");
    });
}

#[test]
fn memory_tables() {
    let mut subject = Subject::start();
    let memory = GuestMemory::flat(1 << 16).expect("memfds can be made");
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        let front_end = idle(subject);
        let regions: Vec<_> = (0..32)
            .map(|at| {
                let mut region = memory.regions()[0].description();
                (region.guest, region.user) = (at << 20, at << 20);
                // One that is refused, so that the others are unmapped again.
                region.size_bytes += u64::from(at == 31 && number % 2 == 0);
                region
            })
            .collect();
        let fds = vec![memory.regions()[0].file(); regions.len()];
        let payload = memory_table(&regions);
        let flags = VHOST_USER_NEED_REPLY_MASK;
        let set = (VHOST_USER_SET_MEM_TABLE, flags);
        let reaction = reaction(front_end.wire(), set, &payload, &fds);
        let due = if number % 2 == 0 { Reaction::Refused } else { Reaction::Answered };
        promise(reaction == due, || format!("a table of 32 regions: {reaction:?}"));
    });
}

#[test]
fn regions_that_come_and_go() {
    let mut subject = Subject::start();
    let memory = GuestMemory::flat(1 << 16).expect("memfds can be made");
    let mut region = memory.regions()[0].description();
    (region.guest, region.user) = (1 << 40, 1 << 41);
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        let driver = subject.driver(&Options { memory_by: MemoryBy::Regions, ..small() });
        let front_end = &driver.guest.front_end;
        for _ in 0..number % 4 {
            let file = memory.regions()[0].file();
            front_end.add_mem_reg(&region, file).expect("a region can be added");
            front_end.rem_mem_reg(&region).expect("a region can be removed");
        }
    });
}

#[test]
fn truncated_memory() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        let driver = subject.driver(&small());
        driver.guest.memory.regions()[0].truncate(0).expect("a memfd can be truncated");
        driver.kick(0).expect("the device can be kicked");
        driver.guest.front_end.wire().wait_for_hang_up(PATIENCE).expect("the session ends");
    });
}

#[test]
fn descriptors_of_rings() {
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        let driver = subject.driver(&small());
        let front_end = &driver.guest.front_end;
        for at in 0..number % 4 {
            let full = Notifier::full_socket().expect("sockets");
            let kick = Notifier::eventfd().expect("eventfds");
            for (request, fd) in [
                (VHOST_USER_SET_VRING_CALL, &full),
                (VHOST_USER_SET_VRING_ERR, &full),
                (VHOST_USER_SET_VRING_KICK, &kick),
            ] {
                let ring = u32::try_from(at).unwrap_or(0) % 2;
                let set = front_end.set_vring_fd(request, ring, Some(fd.back_end_fd()));
                promise(set.is_ok(), || format!("a descriptor cannot be changed: {set:?}"));
            }
        }
        let socket = Notifier::socket().expect("sockets");
        let set = front_end.set_backend_req_fd(socket.back_end_fd());
        promise(set.is_ok(), || format!("a channel cannot be set: {set:?}"));
    });
}

#[test]
fn calls_that_nobody_takes() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    let call: fn() -> _ = Notifier::full_pipe;
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        let mut driver = subject.driver(&Options { call: Some(call), ..small() });
        for _ in 0..3 {
            driver.submit(0, &Request::read(0, 512));
            driver.kick(0).expect("the device can be kicked");
            driver.complete_by_looking(0).expect("a read ends");
        }
    });
}

#[test]
fn replies_that_nobody_reads() {
    let mut subject = Subject::start();
    let burst = header(VHOST_USER_GET_FEATURES, VHOST_USER_VERSION, 0).repeat(200);
    rounds_must_leave_nothing(&mut subject, |subject, _| {
        idle(subject).wire().send_bytes(&burst, &[]).expect("the bytes go out");
    });
}

#[test]
fn front_ends_that_are_turned_away() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let socket = subject.socket().to_owned();
    session_must_leave_nothing(&mut subject, |_| {
        if let Ok(second) = FrontEnd::connect(&socket) {
            second.barrier().expect_err("one front end at a time");
        }
    });
}

#[test]
fn clients_of_the_control_socket() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    rounds_must_leave_nothing(&mut subject, |subject, number| {
        if number % 2 == 0 {
            control::stats(subject);
        } else {
            let mut client = UnixStream::connect(subject.control()).expect("it listens");
            // Nobody waits for the answer, if there is one.
            client
                .write_all(&b"GET /metrics HTTP/1.1\r\n\r\n"[..number % 26])
                .expect("it goes out");
        }
    });
}

#[test]
fn rings_that_start_and_stop() {
    let mut subject = Subject::start();
    session_must_leave_nothing(&mut subject, |driver| {
        for ring in 0..QUEUE_COUNT {
            let front_end = &driver.guest.front_end;
            front_end.get_vring_base(u32::from(ring)).expect("a ring can be stopped");
            driver.guest.start_queue(ring, 0).expect("a ring can be started");
        }
    });
}
