//! Limits of operations and bytes: what is over them waits in its ring, and nothing else does.
//!
//! Rates are measured and told. Asserted is only what no busy machine can break: never *more* than
//! the limit allows for the time that has passed; and what waits for minutes has not ended in the
//! moment of a test.

use crate::control::{ask, scrape, stats};
use crate::subject::{QUEUE_COUNT, Subject, is_another_program, must_work};
use frontend::Error;
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD,
};
use frontend::guest::Options;
use frontend::message::{VHOST_USER_SET_VRING_KICK, VIRTIO_F_EVENT_IDX};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The ring that is over its limit, and the one beside it.
const THROTTLED: u16 = 0;
const NEIGHBOUR: u16 = 1;
/// Of reads, at which [`LONG_READ`] owes two minutes.
const SLOW: &str = "read=512";
const LONG_READ: usize = 64 << 10;
/// Without a burst of its own, a limit lets through at once what its rate gives in 5 ms, and one
/// request.
const TOLERANCE: Duration = Duration::from_millis(5);

fn options() -> Options {
    Options { queue_count: QUEUE_COUNT, queue_size: 256, ..Options::default() }
}

fn limited(limits: &[&str]) -> (Subject, BlockDriver) {
    let subject = Subject::with_options(&[&["--threads", "1"], limits].concat());
    let driver = subject.driver(&options());
    (subject, driver)
}

fn limit(subject: &Subject, change: &Value) -> Value {
    let mut command = change.clone();
    command["command"] = json!("limit");
    ask(subject, &command.to_string())
}

/// Queues reads that fit in one descriptor each, and notifies the device.
fn submit_reads(driver: &mut BlockDriver, queue: u16, count: usize, size_bytes: usize) {
    for at in 0..count {
        let sector = (at * size_bytes / SECTOR_BYTES) as u64;
        driver.submit(queue, &Request::read(sector, size_bytes).through_indirect_table());
    }
    driver.kick(queue).expect("the device can be kicked");
}

#[track_caller]
fn must_end(driver: &mut BlockDriver, queue: u16) {
    let (_, outcome) = driver.complete(queue).expect("the request ends");
    assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
}

#[track_caller]
fn must_wait(driver: &mut BlockDriver, queue: u16, time: Duration) {
    let waits = driver.complete_within(queue, time);
    assert!(matches!(waits, Err(Error::Silence(_))), "it did not wait: {waits:?}");
}

/// One read has gone, and what follows it waits for minutes.
fn throttle(driver: &mut BlockDriver) {
    submit_reads(driver, THROTTLED, 3, LONG_READ);
    must_end(driver, THROTTLED);
}

/// Reads until `count` have ended; asserts that `rate` was not exceeded, and tells what it was.
fn must_keep(driver: &mut BlockDriver, count: usize, size_bytes: usize, rate: (f64, f64)) {
    let (rate, each) = rate;
    let began = Instant::now();
    submit_reads(driver, THROTTLED, count, size_bytes);
    for ended in 1..=count {
        must_end(driver, THROTTLED);
        let seconds = (began.elapsed() + TOLERANCE).as_secs_f64();
        let (amount, allowed) = (ended as f64 * each, rate * seconds + each);
        assert!(amount <= allowed, "{amount} after {seconds} s, {allowed} allowed");
    }
    let measured = (count as f64 * each) / began.elapsed().as_secs_f64();
    eprintln!("a limit of {rate} a second: {measured:.1}, {:.1} %", 100.0 * measured / rate);
}

#[test]
fn operations_over_the_limit_end_at_its_rate() {
    if is_another_program() {
        return;
    }
    for event_idx in [VIRTIO_F_EVENT_IDX, 0] {
        let subject = Subject::with_options(&["--iops", "read=200"]);
        let features = Options::default().features & !VIRTIO_F_EVENT_IDX | event_idx;
        let mut driver = subject.driver(&Options { features, ..options() });
        must_keep(&mut driver, 200, 4096, (200.0, 1.0));
    }
}

#[test]
fn bytes_over_the_limit_end_at_its_rate() {
    if is_another_program() {
        return;
    }
    for size_bytes in [4096, 65_536] {
        let (_subject, mut driver) = limited(&["--bps", "total=2M"]);
        let count = (2 << 20) / size_bytes;
        let count = count.min(200);
        must_keep(&mut driver, count, size_bytes, (2_097_152.0, size_bytes as f64));
    }
}

#[test]
fn limits_of_one_direction_leave_the_other_alone() {
    if is_another_program() {
        return;
    }
    let (_subject, mut driver) = limited(&["--bps", SLOW]);
    throttle(&mut driver);
    for _ in 0..100 {
        let written = driver.perform(NEIGHBOUR, &Request::write(0, &[7; LONG_READ]));
        assert_eq!(written.expect("a write ends").status, VIRTIO_BLK_S_OK);
    }
    must_wait(&mut driver, THROTTLED, Duration::ZERO);
}

#[test]
fn what_carries_no_data_waits_for_no_bytes_and_a_flush_for_nothing() {
    if is_another_program() {
        return;
    }
    let (_subject, mut driver) = limited(&["--bps", "512", "--iops", "read=1,write=1/3"]);
    throttle(&mut driver);
    let segment = Segment { sector: 0, count: 8, flags: 0 };
    let discard = Request::over_segments(VIRTIO_BLK_T_DISCARD, &[segment]);
    let beyond = Request::read(1 << 40, SECTOR_BYTES);
    for (request, status) in [
        (&discard, VIRTIO_BLK_S_OK),
        (&Request::flush(), VIRTIO_BLK_S_OK),
        (&Request::get_id(), VIRTIO_BLK_S_OK),
        (&beyond, VIRTIO_BLK_S_IOERR),
        (&discard, VIRTIO_BLK_S_OK),
        (&discard, VIRTIO_BLK_S_OK),
    ] {
        let outcome = driver.perform(NEIGHBOUR, request).expect("it does not wait");
        assert_eq!(outcome.status, status, "request type {}", request.kind);
    }
    driver.submit(NEIGHBOUR, &Request::write(0, &[1; SECTOR_BYTES]));
    driver.kick(NEIGHBOUR).expect("the device can be kicked");
    must_wait(&mut driver, NEIGHBOUR, Duration::ZERO);
}

#[test]
fn throttled_ring_leaves_its_neighbour_and_the_processor_alone() {
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&["--bps", SLOW]);
    throttle(&mut driver);
    // Both rings have the same worker.
    for _ in 0..300 {
        let id = driver.perform(NEIGHBOUR, &Request::get_id()).expect("it does not wait");
        assert_eq!(id.status, VIRTIO_BLK_S_OK);
        driver.kick(THROTTLED).expect("the device can be kicked");
    }
    must_sleep(&subject, &mut driver, THROTTLED);
}

/// While nothing ends on `queue`, the process does not use the processor.
fn must_sleep(subject: &Subject, driver: &mut BlockDriver, queue: u16) {
    let before = subject.cpu_time();
    let over = AtomicBool::new(false);
    // What a busy machine gives to who wants all that it can get.
    let given = std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            clock_gettime(ClockId::ThreadCPUTime)
        });
        let waits = driver.complete_within(queue, Duration::from_millis(300));
        over.store(true, Ordering::Relaxed);
        assert!(matches!(waits, Err(Error::Silence(_))), "it did not wait: {waits:?}");
        busy.join().expect("it does not panic")
    });
    let given = Duration::try_from(given).expect("time runs forward");
    // A thread that has ended meanwhile takes its time with it.
    let used = subject.cpu_time().saturating_sub(before);
    eprintln!("{used:?} of CPU time used where {given:?} were to be had");
    assert!(used < given / 2, "{used:?} of CPU time, {given:?} by who sleeps never");
}

#[test]
fn idle_ring_that_is_polled_does_not_use_up_the_processor() {
    // It is looked at from time to time, whether or not its next request is over a limit.
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&["--bps", SLOW]);
    let polled = u32::from(THROTTLED);
    let front_end = &driver.guest.front_end;
    front_end.set_vring_fd(VHOST_USER_SET_VRING_KICK, polled, None).expect("it can be polled");
    must_sleep(&subject, &mut driver, THROTTLED);
    throttle(&mut driver);
    must_sleep(&subject, &mut driver, THROTTLED);
    limit(&subject, &json!({ "bps": "none" }));
    for _ in 0..2 {
        must_end(&mut driver, THROTTLED);
    }
    submit_reads(&mut driver, THROTTLED, 5, 512);
    for _ in 0..5 {
        must_end(&mut driver, THROTTLED);
    }
}

#[test]
fn rings_that_share_a_limit_have_equal_parts() {
    if is_another_program() {
        return;
    }
    const EACH: usize = 100;
    let (_subject, mut driver) = limited(&["--iops", "total=400"]);
    for queue in [THROTTLED, NEIGHBOUR] {
        submit_reads(&mut driver, queue, EACH, 4096);
    }
    for _ in 0..EACH {
        must_end(&mut driver, THROTTLED);
    }
    let other = driver.guest.queues[usize::from(NEIGHBOUR)].ring().used_index();
    assert!(usize::from(other) >= EACH / 2, "{EACH} here, {other} there");
    for _ in 0..EACH {
        must_end(&mut driver, NEIGHBOUR);
    }
}

#[test]
fn throttled_ring_stops_at_once_and_goes_on_where_it_was() {
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&["--bps", SLOW]);
    throttle(&mut driver);
    let front_end = &driver.guest.front_end;
    // Memory can be replaced, too: nothing refers to it.
    front_end.set_mem_table(driver.guest.memory.regions()).expect("memory can be told again");
    let base = front_end.get_vring_base(u32::from(THROTTLED)).expect("the ring can be stopped");
    assert_eq!(base, 1, "the first request that was not served");
    limit(&subject, &json!({ "bps": "none" }));
    must_wait(&mut driver, THROTTLED, Duration::ZERO);
    driver.guest.start_queue(THROTTLED, base).expect("the ring can be started");
    for _ in 0..2 {
        must_end(&mut driver, THROTTLED);
    }
    must_work(&mut driver, THROTTLED);
}

#[test]
fn sessions_and_the_process_end_at_once_with_throttled_rings() {
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&["--bps", SLOW]);
    throttle(&mut driver);
    drop(driver);
    let mut driver = subject.driver(&options());
    limit(&subject, &json!({ "bps": "none" }));
    must_work(&mut driver, THROTTLED);
    limit(&subject, &json!({ "bps": SLOW }));
    throttle(&mut driver);
    let (daemon, _directory) = subject.into_daemon();
    assert!(daemon.terminate().success(), "it gave up on a request that was not begun");
}

#[test]
fn limits_change_while_requests_wait_for_them() {
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&[]);
    let none = json!({ "total": null, "read": null, "write": null });
    assert_eq!(limit(&subject, &json!({}))["ok"], json!({ "iops": none, "bps": none }));
    must_work(&mut driver, THROTTLED);
    let slow = json!({ "total": null, "read": { "rate": 512, "burst": null }, "write": null });
    let set = limit(&subject, &json!({ "bps": SLOW }));
    assert_eq!(set["ok"], json!({ "iops": none, "bps": slow }));
    throttle(&mut driver);
    must_wait(&mut driver, THROTTLED, Duration::ZERO);
    // Something else: those that wait go on waiting.
    let set = limit(&subject, &json!({ "iops": "2k/3k,write=5" }));
    let iops = json!({
        "total": { "rate": 2000, "burst": 3000 }, "read": null, "write": { "rate": 5, "burst": null },
    });
    assert_eq!(set["ok"], json!({ "iops": iops, "bps": slow }));
    must_wait(&mut driver, THROTTLED, Duration::ZERO);
    // Nothing is changed where anything is wrong.
    for (wrong, said) in [
        (json!({ "bps": "none", "iops": "fast" }), "iops: \"fast\" is no rate"),
        (json!({ "bps": "read=1M,rx=2M" }), "bps: \"rx\" is none of total, read and write"),
        (json!({ "bps": "none", "burst": "5" }), "there is no limit \"burst\", only iops, bps"),
    ] {
        let error = limit(&subject, &wrong)["error"].to_string().replace("\\\"", "\"");
        assert!(error.contains(said), "{wrong}: {error}");
        must_wait(&mut driver, THROTTLED, Duration::ZERO);
    }
    assert_eq!(stats(&subject)["limits"], json!({ "iops": iops, "bps": slow }));
    // A burst lets the second go, the end of the limit the third.
    limit(&subject, &json!({ "bps": "read=1k/64k" }));
    must_end(&mut driver, THROTTLED);
    must_wait(&mut driver, THROTTLED, Duration::ZERO);
    limit(&subject, &json!({ "bps": "read=none" }));
    must_end(&mut driver, THROTTLED);
    must_work(&mut driver, THROTTLED);
}

#[test]
fn limits_and_who_waits_for_them_are_shown() {
    if is_another_program() {
        return;
    }
    let (subject, mut driver) = limited(&["--bps", SLOW, "--iops", "9k,write=700/800"]);
    throttle(&mut driver);
    must_work_by_writing(&mut driver);
    // A ring is counted to its end once it has been stopped.
    driver.guest.front_end.get_vring_base(u32::from(THROTTLED)).expect("it can be stopped");
    let metrics = scrape(&subject);
    for (name, label, value) in [
        ("outboard_bps_limit", ("direction", "read"), Some(512.0)),
        ("outboard_bps_limit", ("direction", "total"), None),
        ("outboard_iops_limit", ("direction", "total"), Some(9000.0)),
        ("outboard_iops_limit", ("direction", "write"), Some(700.0)),
        ("outboard_throttled_requests_total", ("queue", "0"), Some(1.0)),
        ("outboard_throttled_requests_total", ("queue", "1"), Some(0.0)),
    ] {
        assert_eq!(metrics.sample(name, &[label]), value, "{name} of {label:?}");
    }
    let stats = stats(&subject);
    assert_eq!(stats["limits"]["iops"]["write"], json!({ "rate": 700, "burst": 800 }));
    assert_eq!(stats["queues"][0]["throttled"], json!(1));
}

fn must_work_by_writing(driver: &mut BlockDriver) {
    let written = driver.perform(NEIGHBOUR, &Request::write(0, &[3; SECTOR_BYTES]));
    assert_eq!(written.expect("a write ends").status, VIRTIO_BLK_S_OK);
}
