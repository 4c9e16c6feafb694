//! Rings that are stopped or disabled, and the device while all of them are (vhost-user, "Ring
//! states", "Suspended device state"; VIRTIO 1.3, 2.1.2 and 2.4.1).

use crate::subject::{
    DISK_SECTORS, QUEUE_COUNT, Subject, is_another_program, is_ours_to_promise, lacks, must_work,
};
use frontend::Error;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::memory::Shape;
use frontend::message::{
    VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE, VHOST_USER_SET_VRING_CALL,
};
use frontend::notifier::Notifier;
use frontend::wire::{PATIENCE, Wire};
use rustix::process::Signal;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Little enough to be compared whole.
const MEMORY_BYTES: usize = 1 << 20;

fn options() -> Options {
    Options {
        queue_count: QUEUE_COUNT,
        queue_size: 32,
        memory: vec![Shape { guest: 0, size_bytes: MEMORY_BYTES, file_offset_bytes: 0 }],
        ..Options::default()
    }
}

/// Queue 0 has a request that waits; queue 1, which works, shows that time has passed.
#[track_caller]
fn must_wait(driver: &mut BlockDriver, what: &str) {
    for _ in 0..5 {
        driver.kick(0).expect("the device can be kicked");
        must_work(driver, 1);
    }
    let waits = driver.complete_within(0, Duration::ZERO);
    assert!(matches!(waits, Err(Error::Silence(_))), "{what}: {waits:?}");
}

#[track_caller]
fn must_end(driver: &mut BlockDriver) {
    assert_eq!(driver.complete(0).expect("the request ends").1.status, VIRTIO_BLK_S_OK);
}

#[test]
fn enabling_and_disabling_a_stopped_ring_counts_once_it_starts() {
    // What a disabled ring may do is not said of a disk.
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&options());
    for _ in 0..5 {
        let base = driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        driver.guest.front_end.set_vring_enable(0, false).expect("a ring can be disabled");
        driver.submit(0, &Request::read(0, SECTOR_BYTES));
        driver.guest.start_queue(0, base).expect("the ring can be started");
        must_wait(&mut driver, "it was disabled while it was stopped");
        driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        driver.guest.front_end.set_vring_enable(0, true).expect("a ring can be enabled");
        must_wait(&mut driver, "it was enabled, but is stopped");
        driver.guest.start_queue(0, base).expect("the ring can be started");
        must_end(&mut driver);
    }
}

#[test]
fn after_a_reset_no_ring_is_touched_until_it_is_set_up_and_enabled() {
    // VIRTIO 1.3, 2.4.1: a device MUST NOT send notifications or interact with the queues after a
    // reset, until the driver re-initializes it.
    let subject = Subject::start();
    let mut driver = subject.driver(&options());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_RESET_DEVICE) {
        return;
    }
    must_work(&mut driver, 0);
    driver.guest.front_end.reset_device().expect("the device can be reset");
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    let before = driver.guest.memory.read(0, MEMORY_BYTES);
    for queue in 0..QUEUE_COUNT {
        driver.kick(queue).expect("the device can be kicked");
    }
    driver.guest.front_end.barrier().expect("the connection is still there");
    assert!(driver.guest.memory.read(0, MEMORY_BYTES) == before, "guest memory was written");
    let guest = &driver.guest;
    guest.front_end.set_features(guest.features).expect("features can be set again");
    for queue in 0..QUEUE_COUNT {
        // The driver numbers its rings on.
        let base = guest.queues[usize::from(queue)].ring().used_index();
        guest.start_queue(queue, u32::from(base)).expect("the ring can be started");
    }
    driver.guest.enable(1).expect("a ring can be enabled");
    must_wait(&mut driver, "it is not enabled since the reset");
    driver.guest.enable(0).expect("a ring can be enabled");
    must_end(&mut driver);
}

#[test]
fn features_without_protocol_features_enable_all_rings_at_once() {
    // vhost-user, "Ring states": upon SET_FEATURES without the bit. Before that they are disabled.
    let subject = Subject::start();
    let mut driver = subject.driver(&options());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_RESET_DEVICE) {
        return;
    }
    driver.guest.front_end.reset_device().expect("the device can be reset");
    for queue in 0..QUEUE_COUNT {
        driver.submit(queue, &Request::read(0, SECTOR_BYTES));
    }
    let guest = &driver.guest;
    guest.front_end.set_vring_enable(1, false).expect("a ring can be disabled");
    for queue in 0..QUEUE_COUNT {
        guest.start_queue(queue, 0).expect("the ring can be started");
        driver.kick(queue).expect("the device can be kicked");
    }
    driver.guest.front_end.barrier().expect("the connection is still there");
    for queue in 0..QUEUE_COUNT {
        let early = driver.complete_within(queue, Duration::ZERO);
        assert!(matches!(early, Err(Error::Silence(_))), "ring {queue}: {early:?}");
    }
    let features = driver.guest.features & !VHOST_USER_F_PROTOCOL_FEATURES;
    driver.guest.front_end.set_features(features).expect("features can be set again");
    for queue in 0..QUEUE_COUNT {
        let ended = driver.complete(queue).expect("the request ends").1;
        assert_eq!(ended.status, VIRTIO_BLK_S_OK, "ring {queue}");
    }
}

/// Stops all rings of `driver`; their bases.
fn suspend(driver: &BlockDriver) -> Vec<u32> {
    let stop = |queue| driver.guest.front_end.get_vring_base(queue).expect("a ring can be stopped");
    (0..u32::from(QUEUE_COUNT)).map(stop).collect()
}

#[test]
fn suspended_device_touches_nothing_tells_nobody_and_still_answers() {
    // vhost-user, "Suspended device state": while all rings are stopped.
    let subject = Subject::start();
    let mut driver = subject.driver(&options());
    for queue in 0..QUEUE_COUNT {
        must_work(&mut driver, queue);
    }
    let bases = suspend(&driver);
    let call = Notifier::eventfd().expect("eventfds can be made");
    driver.submit(0, &Request::read(0, SECTOR_BYTES));
    let before = driver.guest.memory.read(0, MEMORY_BYTES);
    let front_end = &driver.guest.front_end;
    front_end
        .set_vring_fd(VHOST_USER_SET_VRING_CALL, 0, Some(call.back_end_fd()))
        .expect("the call descriptor can be changed");
    front_end.set_vring_enable(1, false).expect("a ring can be disabled");
    front_end.set_vring_enable(1, true).expect("a ring can be enabled");
    front_end.set_mem_table(driver.guest.memory.regions()).expect("the table can be sent again");
    for queue in 0..QUEUE_COUNT {
        driver.kick(queue).expect("the device can be kicked");
    }
    assert_eq!(suspend(&driver), bases, "a stopped ring has another base");
    front_end.get_queue_num().expect("it is answered");
    driver.config().expect("it is answered");
    assert!(driver.guest.memory.read(0, MEMORY_BYTES) == before, "guest memory was written");
    assert_eq!(
        call.wait(Duration::ZERO).expect("eventfds can be read"),
        0,
        "the driver was called"
    );
    driver.guest.start_queue(0, bases[0]).expect("the ring can be started");
    must_end(&mut driver);
}

#[test]
fn suspended_device_tells_of_a_changed_configuration_when_it_goes_on() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let driver = subject.driver(&options());
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    driver.guest.front_end.set_backend_req_fd(theirs.as_fd()).expect("the channel is accepted");
    let channel = Wire::from_stream(ours);
    let bases = suspend(&driver);

    let image = File::options().write(true).open(subject.image()).expect("the image is ours");
    image.set_len((DISK_SECTORS + 8) * SECTOR_BYTES as u64).expect("it can grow");
    subject.signal(Signal::HUP);
    // Whoever asks hears of it all the same.
    let deadline = Instant::now() + PATIENCE;
    while driver.config().expect("it is answered").capacity() == DISK_SECTORS {
        assert!(Instant::now() < deadline, "the growth is not noticed");
        std::thread::yield_now();
    }
    let early = channel.receive(Duration::ZERO);
    assert!(matches!(early, Err(Error::Silence(_))), "a message of a suspended device: {early:?}");

    driver.guest.start_queue(1, bases[1]).expect("the ring can be started");
    let told = channel.receive(PATIENCE).expect("the change is announced");
    assert_eq!(told.request, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG);
    driver.guest.start_queue(0, bases[0]).expect("the ring can be started");
    let again = channel.receive(Duration::ZERO);
    assert!(matches!(again, Err(Error::Silence(_))), "it is told twice: {again:?}");
}
