//! Whether data is on the host's storage when the driver may count on it (VIRTIO 1.3, 5.2.6.2).
//!
//! No power is cut here. What tells is the host's file system: data that it has taken but not
//! written yet has no place on its storage (`delalloc`, in the words of `filefrag`), as long as it
//! goes to a part of the file that was a hole.

use crate::subject::{Subject, is_another_program};
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use frontend::guest::Options;
use std::path::Path;
use std::process::Command;

/// A directory that outlives a reboot, and so is on storage, where `/tmp` may be in memory.
const ON_STORAGE: &str = "/var/tmp";
/// Offset of the byte `writeback` in the configuration space.
const WRITEBACK: u32 = 32;
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
fn subject_on_storage() -> Option<Subject> {
    if is_another_program() {
        return None;
    }
    let directory = tempfile::Builder::new().prefix("outboard-").tempdir_in(ON_STORAGE).ok()?;
    let subject = Subject::in_directory(directory, &[]);
    let mut driver = subject.driver(&Options::default());
    // A write that may wait must be seen to, now and then, or seeing none proves nothing.
    let seen = (0..4).any(|number| {
        write_to_hole(&mut driver, number);
        waits(&subject.image()) == Some(true)
    });
    must(&mut driver, &Request::flush());
    drop(driver);
    if !seen {
        eprintln!(
            "not run: the file system of {ON_STORAGE} does not tell what waits to be written"
        );
    }
    seen.then_some(subject)
}

#[test]
fn flush_waits_for_what_was_written() {
    let Some(subject) = subject_on_storage() else { return };
    let mut driver = subject.driver(&Options::default());
    write_to_hole(&mut driver, 5);
    must(&mut driver, &Request::flush());
    assert_eq!(waits(&subject.image()), Some(false), "the flush was answered too early");
}

#[test]
fn driver_without_flush_has_every_write_on_storage() {
    let Some(subject) = subject_on_storage() else { return };
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

#[test]
fn driver_that_switches_to_write_through_has_every_write_on_storage() {
    // VIRTIO 1.3, 5.2.6.2: `writeback` is 0 from the submission of a write to its completion.
    let Some(subject) = subject_on_storage() else { return };
    let mut driver = subject.driver(&Options::default());
    let writeback = |driver: &BlockDriver| driver.config().expect("it can be read").writeback();
    assert_eq!(writeback(&driver), 1, "the cache is write-back by default");
    driver.guest.front_end.set_config(WRITEBACK, &[0]).expect("the driver may switch");
    assert_eq!(writeback(&driver), 0);
    for number in 5..9 {
        write_to_hole(&mut driver, number);
        assert_eq!(waits(&subject.image()), Some(false), "write {number} was answered too early");
    }
    driver.guest.front_end.set_config(WRITEBACK, &[1]).expect("the driver may switch back");
    assert_eq!(writeback(&driver), 1);
}
