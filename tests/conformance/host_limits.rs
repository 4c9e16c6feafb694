//! A host that takes less than it is given, or cannot do what others can.

use crate::control::{counts, stats};
use crate::subject::{DISK_SECTORS, Subject, is_another_program, lacks_feature};
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_WRITE_ZEROES,
};
use frontend::guest::Options;
use std::fs::File;
use std::os::unix::fs::FileExt;
use tests::{TempDir, cannot_run, temp_dir};

/// A directory in memory, on a file system that cannot zero a range other than by writing.
const IN_MEMORY: &str = "/dev/shm";

fn must(driver: &mut BlockDriver, request: &Request) -> Vec<u8> {
    let outcome = driver.perform(0, request).expect("the request ends");
    assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "request type {}", request.kind);
    outcome.data
}

fn is_tmpfs(directory: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(directory) && fields.next() == Some("tmpfs")
    })
}

/// A directory there; none where the tests that need it cannot run.
fn directory_in_memory() -> Option<TempDir> {
    if !is_tmpfs(IN_MEMORY) {
        cannot_run(&format!("{IN_MEMORY} is no tmpfs, which has no FALLOC_FL_ZERO_RANGE"));
        return None;
    }
    tempfile::Builder::new()
        .prefix("outboard-")
        .tempdir_in(IN_MEMORY)
        .inspect_err(|error| cannot_run(&format!("{IN_MEMORY}: {error}")))
        .ok()
}

#[test]
fn zeroes_are_written_where_the_host_cannot_zero_a_range() {
    let Some(directory) = directory_in_memory() else { return };
    let subject = Subject::in_directory(directory, &[]);
    let mut driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let config = driver.config().expect("the configuration space can be read");
    for (sector, count) in [(9, 1), (100, 777), (1, 20_000)] {
        let count = count.min(config.max_write_zeroes_sectors());
        let neighbour = sector + u64::from(count);
        let ones = vec![0xee; 1 << 20];
        for at in (0..DISK_SECTORS).step_by(ones.len() / SECTOR_BYTES) {
            must(&mut driver, &Request::write(at, &ones));
        }
        let segment = Segment { sector, count, flags: 0 };
        must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &[segment]));
        let image = subject.image_bytes(0, usize::try_from(DISK_SECTORS * 512).unwrap_or(0));
        for (at, found) in (0..).zip(image.chunks(SECTOR_BYTES)) {
            let expected = if (sector..neighbour).contains(&at) { 0 } else { 0xee };
            assert!(found.iter().all(|byte| *byte == expected), "{segment:?}: sector {at}");
        }
        assert_eq!(must(&mut driver, &Request::read(neighbour - 1, 512)), [0; 512]);
        assert_eq!(must(&mut driver, &Request::read(neighbour, 512)), [0xee; 512]);
    }
}

#[test]
fn zeroes_of_which_the_host_takes_part_are_an_error() {
    if is_another_program() {
        return;
    }
    let Some(directory) = directory_in_memory() else { return };
    let limit = DISK_SECTORS / 2;
    let subject = Subject::with_file_limit(directory, limit);
    let image = File::options().write(true).open(subject.image()).expect("the image is ours");
    let ones = [0xee; 8 * SECTOR_BYTES];
    image.write_all_at(&ones, (limit - 4) * 512).expect("the image can be written");
    let mut driver = subject.driver(&Options::default());
    let segment = Segment { sector: limit - 4, count: 8, flags: 0 };
    let zeroes = Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &[segment]);
    let outcome = driver.perform(0, &zeroes).expect("the request ends");
    assert_eq!(outcome.status, VIRTIO_BLK_S_IOERR);
    assert_eq!(must(&mut driver, &Request::read(limit - 4, 2048)), [0; 2048]);
    assert_eq!(must(&mut driver, &Request::read(limit, 2048)), [0xee; 2048]);
}

#[test]
fn host_that_takes_part_of_a_write_fails_it_and_is_logged_sparingly() {
    /// Writes that fail, one after another.
    const FAILING: u64 = 200;
    /// Lines that the log may have: those of the start, and a few for the faults.
    const LINES_MAX: usize = 20;
    if is_another_program() {
        return;
    }
    let limit = DISK_SECTORS / 2;
    let subject = Subject::with_file_limit(temp_dir(), limit);
    let mut driver = subject.driver(&Options::default());
    let across = Request::write(limit - 4, &[0x3c; 8 * SECTOR_BYTES]);
    for round in 0..FAILING {
        let request = if round % 2 == 0 { &across } else { &Request::write(limit, &[1; 512]) };
        let outcome = driver.perform(0, request).expect("the request ends");
        assert_eq!(outcome.status, VIRTIO_BLK_S_IOERR, "round {round}");
    }
    // The host took the part below its limit, and nothing beyond.
    let at = (limit - 4) * 512;
    assert_eq!(subject.image_bytes(at, 4 * SECTOR_BYTES), [0x3c; 4 * SECTOR_BYTES]);
    assert_eq!(subject.image_bytes(limit * 512, 4 * SECTOR_BYTES), [0; 4 * SECTOR_BYTES]);
    let data = [0x5a; 8 * SECTOR_BYTES];
    must(&mut driver, &Request::write(limit - 8, &data));
    assert_eq!(must(&mut driver, &Request::read(limit - 8, data.len())), data);
    assert_eq!(must(&mut driver, &Request::read(limit, 512)), [0; 512]);
    driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
    let [requests, _, errors] = counts(&stats(&subject), 0, "write");
    assert_eq!([requests, errors], [FAILING + 1, FAILING]);
    let log = subject.log();
    assert!(log.contains("write failed"), "the log does not say so:\n{log}");
    assert!(log.lines().count() <= LINES_MAX, "a guest fills the log:\n{log}");
}
