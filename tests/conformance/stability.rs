//! Whether data is on the host's storage when the driver may count on it (VIRTIO 1.3, 5.2.6.2).
//!
//! No power is cut here. What tells is the host's file system: data that it has taken but not
//! written yet has no place on its storage (`delalloc`, in the words of `filefrag`), as long as it
//! goes to a part of the file that was a hole.

use crate::cache::switch;
use crate::subject::{Subject, is_another_program};
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES,
};
use frontend::guest::Options;
use frontend::wire::PATIENCE;
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use tests::temp_dir_on_storage;

/// Sectors between two writes: far more than a file system looks ahead.
const STEP_SECTORS: u64 = 2048;

fn must(driver: &mut BlockDriver, request: &Request) {
    let outcome = driver.perform(0, request).expect("the request ends");
    assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "request type {}", request.kind);
}

/// A write to a part of the disk that nothing was written to before.
fn write_to_hole(driver: &mut BlockDriver, number: u64) {
    must(driver, &Request::write(number * STEP_SECTORS, &[0x5a; 16 * SECTOR_BYTES]));
}

/// Whether a part of the file waits to be written to storage; `None` where nobody can say.
fn waits(image: &Path) -> Option<bool> {
    let output = Command::new("filefrag").arg("-v").arg(image).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).contains("delalloc"))
}

/// A back end whose disk is on storage, if this host tells what waits there. That is a matter of
/// the machine's file systems, not of what a test lacks: elsewhere the test says so and passes.
fn subject_on_storage(options: &[&str]) -> Option<Subject> {
    if is_another_program() {
        return None;
    }
    let subject = Subject::in_directory(temp_dir_on_storage(), options);
    // A cache that is write-through may be write-back for a moment.
    let mut driver = subject.driver(&Options::default());
    let initial = driver.config().expect("the configuration space can be read").writeback();
    switch(&driver, 1);
    // A write that may wait must be seen to, now and then, or seeing none proves nothing.
    let seen = (0..4).any(|number| {
        write_to_hole(&mut driver, number);
        waits(&subject.image()) == Some(true)
    });
    must(&mut driver, &Request::flush());
    switch(&driver, initial);
    drop(driver);
    if !seen {
        eprintln!("not run: the file system of /var/tmp does not tell what waits to be written");
    }
    seen.then_some(subject)
}

#[test]
fn flush_waits_for_what_was_written() {
    let Some(subject) = subject_on_storage(&[]) else { return };
    let mut driver = subject.driver(&Options::default());
    write_to_hole(&mut driver, 5);
    must(&mut driver, &Request::flush());
    assert_eq!(waits(&subject.image()), Some(false), "the flush was answered too early");
}

#[test]
fn driver_without_flush_has_every_write_on_storage() {
    let Some(subject) = subject_on_storage(&[]) else { return };
    let features = Options::default().features & !VIRTIO_BLK_F_FLUSH;
    let mut driver = subject.driver(&Options { features, ..Options::default() });
    for number in 5..9 {
        write_to_hole(&mut driver, number);
        assert_eq!(waits(&subject.image()), Some(false), "write {number} was answered too early");
    }
    let segment = Segment { sector: 10 * STEP_SECTORS, count: 16, flags: 0 };
    must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &[segment]));
    assert_eq!(waits(&subject.image()), Some(false), "zeroes were answered too early");
}

/// Each kind of change, at a place of its own, is on storage when it is answered.
fn must_write_through(subject: &Subject, driver: &mut BlockDriver, first: u64) {
    for number in first..first + 3 {
        write_to_hole(driver, number);
        assert_eq!(waits(&subject.image()), Some(false), "write {number} was answered too early");
    }
    let segment = Segment { sector: (first + 3) * STEP_SECTORS, count: 16, flags: 0 };
    for kind in [VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD] {
        must(driver, &Request::over_segments(kind, &[segment]));
        assert_eq!(waits(&subject.image()), Some(false), "request type {kind}, answered too early");
    }
}

#[test]
fn write_through_mode_has_every_write_on_storage() {
    let Some(subject) = subject_on_storage(&["--cache", "writethrough"]) else { return };
    must_write_through(&subject, &mut subject.driver(&Options::default()), 5);
}

#[test]
fn driver_that_switches_to_write_through_has_everything_on_storage_with_its_next_write() {
    let Some(subject) = subject_on_storage(&[]) else { return };
    let mut driver = subject.driver(&Options::default());
    // Seen to wait once at least, or the others prove nothing.
    let mut waited = false;
    for round in 0..4 {
        let number = 5 + 2 * round;
        write_to_hole(&mut driver, number);
        waited |= waits(&subject.image()) == Some(true);
        switch(&driver, 0);
        write_to_hole(&mut driver, number + 1);
        assert_eq!(
            waits(&subject.image()),
            Some(false),
            "a write overtook one that was answered before the switch"
        );
        switch(&driver, 1);
    }
    assert!(waited, "no write waited");
}

#[test]
fn what_was_answered_before_a_switch_to_write_through_becomes_stable_by_itself() {
    let Some(subject) = subject_on_storage(&[]) else { return };
    let mut driver = subject.driver(&Options::default());
    write_to_hole(&mut driver, 5);
    switch(&driver, 0);
    let deadline = Instant::now() + PATIENCE;
    while waits(&subject.image()) == Some(true) {
        assert!(Instant::now() < deadline, "it still waits");
        std::thread::yield_now();
    }
}

#[test]
fn driver_that_switched_to_write_through_has_every_write_on_storage() {
    let Some(subject) = subject_on_storage(&[]) else { return };
    let mut driver = subject.driver(&Options::default());
    switch(&driver, 0);
    must_write_through(&subject, &mut driver, 5);
    drop(driver);
    // The same guest may be behind a new connection.
    let mut driver = subject.driver(&Options::default());
    write_to_hole(&mut driver, 10);
    assert_eq!(waits(&subject.image()), Some(false), "after a reconnect");
    driver.guest.front_end.reset_device().expect("the device can be reset");
    drop(driver);
    let mut driver = subject.driver(&Options::default());
    write_to_hole(&mut driver, 11);
    assert_eq!(waits(&subject.image()), Some(false), "after a reset");
}

#[test]
fn unsafe_mode_answers_flushes_and_syncs_nothing() {
    let Some(subject) = subject_on_storage(&["--cache", "unsafe"]) else { return };
    let features = Options::default().features & !VIRTIO_BLK_F_FLUSH;
    // Not even for a driver without flushes; the host may write by itself, but not every time.
    for options in [Options::default(), Options { features, ..Options::default() }] {
        let mut driver = subject.driver(&options);
        let waited = (5..9).any(|number| {
            write_to_hole(&mut driver, number);
            must(&mut driver, &Request::flush());
            waits(&subject.image()) == Some(true)
        });
        assert!(waited, "something was synced");
    }
}
