//! A disk that grows, or shrinks, while it is used: whoever says so, and whoever can be told.

use crate::control::ask;
use crate::subject::{
    DISK_BYTES, DISK_SECTORS, QUEUE_COUNT, Subject, is_another_program, must_work,
};
use frontend::Error;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, VHOST_USER_PROTOCOL_F_CONFIG};
use frontend::wire::{PATIENCE, Wire};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What a disk grows by at a time.
const STEP_SECTORS: u64 = 2048;
/// Reads that are on their way at any time.
const IN_FLIGHT: u64 = 16;

/// Makes the image `sectors` long.
fn set_length(subject: &Subject, sectors: u64) {
    let image = File::options().write(true).open(subject.image()).expect("the image is ours");
    image.set_len(sectors * SECTOR_BYTES as u64).expect("a file has any length");
}

fn resize(subject: &Subject) -> Value {
    ask(subject, r#"{"command":"resize"}"#)
}

/// Gives the back end a channel to speak first.
fn open_channel(driver: &BlockDriver) -> Wire {
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    driver.guest.front_end.set_backend_req_fd(theirs.as_fd()).expect("the channel is accepted");
    Wire::from_stream(ours)
}

#[track_caller]
fn must_be_told(channel: &Wire) {
    let told = channel.receive(PATIENCE).expect("the change is announced");
    assert_eq!(told.request, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG);
    assert_eq!((told.flags, told.payload.len()), (1, 0), "a request that wants no answer");
}

#[track_caller]
fn must_not_be_told(channel: &Wire) {
    let silence = channel.receive(Duration::ZERO);
    assert!(matches!(silence, Err(Error::Silence(_))), "it was told: {silence:?}");
}

/// Waits until the log has `count` lines with these words.
fn must_log(subject: &Subject, words: &str, count: usize) {
    let deadline = Instant::now() + PATIENCE;
    while subject.log().lines().filter(|line| line.contains(words)).count() < count {
        assert!(Instant::now() < deadline, "no {words:?} in\n{}", subject.log());
        std::thread::yield_now();
    }
}

fn submit_reads(driver: &mut BlockDriver) {
    for at in 0..IN_FLIGHT {
        driver.submit(0, &Request::read(at * 8, 4096));
    }
    driver.kick(0).expect("the device can be kicked");
}

fn end_reads(driver: &mut BlockDriver) {
    for _ in 0..IN_FLIGHT {
        assert_eq!(driver.complete(0).expect("requests end").1.status, VIRTIO_BLK_S_OK);
    }
}

/// Grows the disk while requests are in flight, has `announce` say so, and uses what is new.
fn must_grow(options: &[&str], announce: impl Fn(&Subject)) {
    let subject = Subject::with_options(options);
    let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
    let channel = open_channel(&driver);
    for round in 1..=3 {
        let (before, sectors) =
            (DISK_SECTORS + (round - 1) * STEP_SECTORS, DISK_SECTORS + round * STEP_SECTORS);
        submit_reads(&mut driver);
        set_length(&subject, sectors);
        announce(&subject);
        // Requests go on and on until the news are there.
        let deadline = Instant::now() + PATIENCE;
        let told = loop {
            end_reads(&mut driver);
            let told = channel.receive(Duration::ZERO);
            submit_reads(&mut driver);
            if told.is_ok() || Instant::now() > deadline {
                break told;
            }
        };
        assert_eq!(told.expect("it is told").request, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG);
        assert_eq!(driver.config().expect("it can be read").capacity(), sectors);
        let data = vec![round as u8; 4096];
        let last = sectors - 8;
        assert!(last >= before, "all of it lies in the new part");
        let written = driver.perform(1, &Request::write(last, &data)).expect("a write ends");
        assert_eq!(written.status, VIRTIO_BLK_S_OK);
        let read = driver.perform(1, &Request::read(last, 4096)).expect("a read ends");
        assert!(read.status == VIRTIO_BLK_S_OK && read.data == data);
        assert!(subject.image_bytes(last * SECTOR_BYTES as u64, 4096) == data);
        let beyond = driver.perform(1, &Request::read(sectors, SECTOR_BYTES)).expect("answered");
        assert_eq!(beyond.status, VIRTIO_BLK_S_IOERR);
        end_reads(&mut driver);
        must_not_be_told(&channel);
    }
}

#[test]
fn disk_grows_by_command_while_it_is_used() {
    if is_another_program() {
        return;
    }
    must_grow(&[], |subject| {
        let reply = resize(subject);
        let bytes = std::fs::metadata(subject.image()).expect("the image is ours").len();
        let told = json!({ "changed": true, "capacity_bytes": bytes, "front_end": "told" });
        assert_eq!(reply["ok"], told);
        assert_eq!(resize(subject)["ok"], json!({ "changed": false, "capacity_bytes": bytes }));
    });
}

#[test]
fn disk_grows_by_signal_while_it_is_used() {
    if is_another_program() {
        return;
    }
    must_grow(&[], |subject| subject.signal(Signal::HUP));
}

#[test]
fn disk_that_is_watched_grows_by_itself_while_it_is_used() {
    if is_another_program() {
        return;
    }
    must_grow(&["--watch-size"], |_| {});
}

#[test]
fn disk_grows_without_a_front_end() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    set_length(&subject, DISK_SECTORS + STEP_SECTORS);
    assert_eq!(resize(&subject)["ok"]["front_end"], "none connected");
    let mut driver = subject.driver(&Options::default());
    let config = driver.config().expect("it can be read");
    assert_eq!(config.capacity(), DISK_SECTORS + STEP_SECTORS);
    must_work(&mut driver, 0);
}

#[test]
fn who_cannot_be_told_of_growth_is_named_and_told_when_it_can_be() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    set_length(&subject, DISK_SECTORS + STEP_SECTORS);
    let reply = resize(&subject);
    assert_eq!(reply["ok"]["changed"], true);
    let front_end = reply["ok"]["front_end"].as_str().expect("it says so");
    assert!(front_end.contains("not told") && front_end.contains("channel"), "{front_end}");
    must_log(&subject, "has grown", 1);
    must_log(&subject, front_end, 1);
    // Whoever asks sees it all the same.
    let config = driver.config().expect("it can be read");
    assert_eq!(config.capacity(), DISK_SECTORS + STEP_SECTORS);
    let channel = open_channel(&driver);
    must_be_told(&channel);
    drop(driver);

    // One that does not read the configuration space from us cannot be told at all.
    let features = Options::default().protocol_features & !VHOST_USER_PROTOCOL_F_CONFIG;
    let driver = subject.driver(&Options { protocol_features: features, ..Options::default() });
    let channel = open_channel(&driver);
    set_length(&subject, DISK_SECTORS + 2 * STEP_SECTORS);
    let told = resize(&subject)["ok"]["front_end"].to_string();
    assert!(told.contains("not told"), "{told}");
    driver.guest.front_end.barrier().expect("the connection is there");
    must_not_be_told(&channel);
}

#[test]
fn front_end_with_stopped_rings_is_told_when_one_starts() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let channel = open_channel(&driver);
    let base = driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
    set_length(&subject, DISK_SECTORS + STEP_SECTORS);
    assert_eq!(resize(&subject)["ok"]["front_end"], "told when a ring starts");
    must_not_be_told(&channel);
    driver.guest.start_queue(0, base).expect("the ring can be started");
    must_be_told(&channel);
}

#[test]
fn shrunk_disk_is_refused_and_logged_each_time_that_somebody_asks() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    let channel = open_channel(&driver);
    set_length(&subject, DISK_SECTORS - STEP_SECTORS);
    for round in 1..=2 {
        let error = resize(&subject)["error"].to_string();
        let shorter = DISK_BYTES - STEP_SECTORS as usize * SECTOR_BYTES;
        assert!(error.contains(&format!("shrunk from {DISK_BYTES} to {shorter}")), "{error}");
        must_log(&subject, "it has shrunk", round);
    }
    subject.signal(Signal::HUP);
    must_log(&subject, "it has shrunk", 3);
    assert_eq!(driver.config().expect("it can be read").capacity(), DISK_SECTORS);
    must_not_be_told(&channel);
    let lost = driver.perform(0, &Request::read(DISK_SECTORS - 8, 4096)).expect("answered");
    assert_eq!(lost.status, VIRTIO_BLK_S_IOERR);
    // Once it is as long as it was, all is well again.
    set_length(&subject, DISK_SECTORS);
    let capacity = json!({ "changed": false, "capacity_bytes": DISK_BYTES });
    assert_eq!(resize(&subject)["ok"], capacity);
    must_work(&mut driver, 0);
}

#[test]
fn watched_disk_that_shrinks_is_logged() {
    if is_another_program() {
        return;
    }
    let subject = Subject::with_options(&["--watch-size=1"]);
    set_length(&subject, DISK_SECTORS - STEP_SECTORS);
    must_log(&subject, "it has shrunk", 1);
    // Another change, another line; that there is none without is a unit's test.
    set_length(&subject, DISK_SECTORS - 2 * STEP_SECTORS);
    must_log(&subject, "it has shrunk", 2);
}
