//! Direct I/O (`--cache none`, `directsync`): that it is used, and that requests which it cannot take
//! are served all the same.

use crate::control::stats;
use crate::launch::must_fail;
use crate::scattered::{Layout, Placed, churn, read, write};
use crate::subject::{DISK_BYTES, Subject, is_another_program};
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::memory::Shape;
use frontend::wire::PATIENCE;
use rustix::fs::OFlags;
use std::path::Path;
use std::process::Command;
use tests::{TempDir, temp_dir, temp_dir_with_direct_io};

/// Bounce buffers of a queue: more requests than these wait in the ring.
const BOUNCE_BUFFERS: usize = 16;
/// A bounce buffer's length.
const BOUNCE_BYTES: usize = 128 << 10;

/// Where a disk of ours can have direct I/O.
fn directory() -> Option<TempDir> {
    if is_another_program() {
        return None;
    }
    temp_dir_with_direct_io()
}

fn subject(options: &[&str]) -> Option<Subject> {
    Some(Subject::in_directory(directory()?, options))
}

/// A driver with room for requests of some MiB.
fn driver(subject: &Subject) -> BlockDriver {
    let memory = vec![Shape { guest: 0, size_bytes: 64 << 20, file_offset_bytes: 0 }];
    subject.driver(&Options { memory, ..Options::default() })
}

fn bytes(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + at / 509 + seed) % 256).unwrap_or(0)).collect()
}

/// The flags of the descriptions that the process has open of a file.
fn flags_of_descriptions(subject: &Subject, file: &Path) -> Vec<OFlags> {
    let process = format!("/proc/{}", subject.id());
    let descriptors = std::fs::read_dir(format!("{process}/fd")).expect("the process lives");
    let ours = descriptors.flatten().filter(|descriptor| {
        std::fs::read_link(descriptor.path()).is_ok_and(|target| target == file)
    });
    let flags = ours.map(|descriptor| {
        let number = descriptor.file_name().into_string().expect("a number");
        let info = std::fs::read_to_string(format!("{process}/fdinfo/{number}")).expect("open");
        let octal = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags");
        OFlags::from_bits_retain(u32::from_str_radix(octal.trim(), 8).expect("octal"))
    });
    flags.collect()
}

/// Bytes of a file in the host's page cache; `None` where nobody can say.
fn cached_bytes(file: &Path) -> Option<u64> {
    let output = Command::new("fincore")
        .args(["--bytes", "--noheadings", "--output", "RES"])
        .arg(file)
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

#[test]
fn direct_modes_go_past_the_page_cache_and_the_others_through_it() {
    let data = bytes(1, 1 << 20);
    for (mode, is_direct) in [
        ("none", true),
        ("directsync", true),
        ("writeback", false),
        ("writethrough", false),
        ("unsafe", false),
    ] {
        let Some(subject) = subject(&["--cache", mode]) else { return };
        let mut driver = driver(&subject);
        write(&mut driver, 0, &Layout::at(0, data.len()), &data);
        assert!(read(&mut driver, 0, &Layout::at(0, data.len())) == data, "{mode}");
        let image = subject.image().canonicalize().expect("the image is there");
        let flags = flags_of_descriptions(&subject, &image);
        assert_eq!(
            flags.iter().any(|flags| flags.contains(OFlags::DIRECT)),
            is_direct,
            "{mode}: {flags:?}"
        );
        match cached_bytes(&image) {
            Some(cached) => assert_eq!(cached == 0, is_direct, "{mode}: {cached} bytes cached"),
            None => eprintln!("not looked at: the page cache (fincore, of util-linux)"),
        }
        assert!(subject.image_bytes(0, data.len()) == data, "{mode}: the host sees other data");
    }
}

#[test]
fn data_at_any_address_is_read_and_written() {
    let Some(subject) = subject(&["--cache", "none"]) else { return };
    let mut driver = driver(&subject);
    let mut layouts = vec![
        Layout::of(0, &[1; 512]),
        Layout::of(3, &[1; 512]),
        Layout::of(0, &[4096, 512, 1024]),
        Layout::of(512, &[512, 4096, 8192]),
        Layout::of(0, &[511, 1]),
        Layout::of(0, &[1, 511, 512, 513, 511]),
        Layout::of(7, &[256, 256, 3072, 512]),
        Layout::of(0, &[4096, 4096, 100, 412]),
    ];
    for gap in [0, 1, 2, 3, 4, 8, 16, 255, 256, 511, 512, 513, 4095] {
        for len in [512, 4096, 65_536, BOUNCE_BYTES, BOUNCE_BYTES + 512, 1 << 20, 5 << 20] {
            layouts.push(Layout::at(gap, len));
        }
    }
    let joined: Vec<Layout> = layouts.iter().cloned().map(Layout::joined).collect();
    layouts.extend(joined);
    for (number, layout) in layouts.iter().enumerate() {
        let len = layout.pieces.iter().map(|piece| piece.len).sum();
        let sector = 1 + number as u64 * 7;
        let data = bytes(number, len);
        write(&mut driver, sector, layout, &data);
        let image = subject.image_bytes(sector * 512, len);
        assert!(image == data, "{layout:?}: the host sees other data");
        assert!(read(&mut driver, sector, layout) == data, "{layout:?} reads something else");
    }
}

#[test]
fn random_layouts_read_what_was_written() {
    for (seed, mode) in [(0x3d15_c0de, "none"), (0x3d15_c0df, "directsync")] {
        let Some(subject) = subject(&["--cache", mode]) else { return };
        churn(&mut driver(&subject), seed, 400, DISK_BYTES);
    }
}

#[test]
fn only_misaligned_requests_are_copied() {
    let Some(subject) = subject(&["--cache", "none"]) else { return };
    let mut driver = driver(&subject);
    let bounced = || stats(&subject)["queues"][0]["bounced"].as_u64().expect("it is counted");
    for len in [4096, 1 << 20] {
        let data = bytes(2, len);
        write(&mut driver, 8, &Layout::at(0, len), &data);
        assert!(read(&mut driver, 8, &Layout::of(512, &[len / 2, len / 2])) == data);
    }
    assert_eq!(bounced(), 0, "aligned requests are copied");
    write(&mut driver, 8, &Layout::at(1, 4096), &bytes(3, 4096));
    read(&mut driver, 8, &Layout::of(0, &[4095, 1]));
    assert_eq!(bounced(), 2);
}

/// So many misaligned reads, available and not kicked.
fn submit_misaligned(driver: &mut BlockDriver, count: usize) -> Vec<(u16, Placed)> {
    let mut placed = Vec::new();
    for number in 0..count {
        let request = Placed::new(driver, number as u64 * 8, &Layout::at(1, 4096), None);
        placed.push((request.submit(driver, 0), request));
    }
    placed
}

/// Waits for all of them; they have read what [`fill`] wrote.
fn must_be_answered(driver: &mut BlockDriver, placed: &[(u16, Placed)]) {
    for _ in placed {
        let used = driver.guest.queues[0].wait_used(PATIENCE).expect("each request ends");
        let number = placed.iter().position(|(head, _)| *head == used.head).expect("one of ours");
        assert!(placed[number].1.answer(driver) == bytes(number, 4096), "request {number}");
    }
}

fn fill(driver: &mut BlockDriver, count: usize) {
    for number in 0..count {
        let request = Request::write(number as u64 * 8, &bytes(number, 4096));
        let outcome = driver.perform(0, &request).expect("a write ends");
        assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn more_misaligned_requests_than_there_are_buffers_are_all_answered() {
    const COUNT: usize = 7 * BOUNCE_BUFFERS + 3;
    let Some(subject) = subject(&["--cache", "none"]) else { return };
    let mut driver = driver(&subject);
    fill(&mut driver, COUNT);
    for _ in 0..20 {
        driver.guest.allocate(0);
        let placed = submit_misaligned(&mut driver, COUNT);
        driver.kick(0).expect("the device can be kicked");
        must_be_answered(&mut driver, &placed);
    }
}

#[test]
fn ring_that_stops_short_of_buffers_goes_on_where_it_was() {
    const COUNT: usize = 6 * BOUNCE_BUFFERS;
    let Some(subject) = subject(&["--cache", "none"]) else { return };
    let mut driver = driver(&subject);
    fill(&mut driver, COUNT);
    for _ in 0..20 {
        driver.guest.allocate(0);
        let placed = submit_misaligned(&mut driver, COUNT);
        driver.kick(0).expect("the device can be kicked");
        let base = driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
        let used = driver.guest.queues[0].ring().used_index();
        assert_eq!(base, u32::from(used), "what was taken is answered, the rest is not taken");
        driver.guest.start_queue(0, base).expect("the ring can be started");
        driver.guest.enable(0).expect("and enabled");
        must_be_answered(&mut driver, &placed);
    }
}

#[test]
fn file_system_without_direct_io_is_named_with_the_option() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    // A file of the kernel's that is open for all and has no direct I/O.
    must_fail(
        &[
            "--blk-file",
            "/proc/version",
            "--read-only",
            "--no-lock",
            "--cache",
            "none",
            "--socket-path",
            socket.to_str().expect("temporary paths are text"),
        ],
        1,
        &["/proc/version", "direct I/O", "--cache writeback"],
    );
}

#[test]
fn read_only_disk_is_read_directly() {
    let Some(directory) = directory() else { return };
    let image = crate::subject::make_disk(directory.path());
    let data = bytes(9, 64 * SECTOR_BYTES);
    std::fs::write(&image, &data).expect("the image is ours");
    let subject = Subject::in_directory(directory, &["--cache", "none", "--read-only"]);
    let mut driver = driver(&subject);
    for layout in [Layout::at(0, data.len()), Layout::at(1, data.len())] {
        assert!(read(&mut driver, 0, &layout) == data, "{layout:?}");
    }
}
