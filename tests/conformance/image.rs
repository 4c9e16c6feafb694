//! The image: what can be one, and who else has it open.

use crate::launch::{Process, must_fail};
use crate::subject::{
    DISK_BYTES, DISK_SECTORS, QUEUE_COUNT, Subject, is_another_program, make_disk, must_work, ours,
};
use frontend::block::{
    BlockDriver, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use frontend::guest::Options;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tests::{cannot_run, temp_dir, temp_dir_with_direct_io};

/// How often a daemon is killed whose image the next one opens at once.
const KILLS: u32 = 20;
/// Requests of each queue that it is killed amid.
const REQUESTS_UNDER_WAY: u64 = 64;
/// Of each of them.
const DATA_SECTORS: usize = 64;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

#[test]
fn image_that_cannot_be_opened_is_named() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let [socket, nowhere, empty] =
        ["socket", "nowhere", "empty"].map(|name| directory.path().join(name));
    std::fs::write(&empty, [0; 100]).expect("a file fits in a fresh directory");
    for image in [&nowhere, directory.path(), &empty, Path::new("/dev/null")] {
        must_fail(&["--blk-file", text(image), "--socket-path", text(&socket)], 1, &[text(image)]);
        assert!(!socket.exists(), "a socket was left behind");
    }
}

#[test]
fn second_daemon_on_an_image_is_refused() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let image = subject.image();
    for option in [&[][..], &["--read-only"]] {
        let arguments =
            [&["--blk-file", text(&image), "--socket-path", text(&socket)], option].concat();
        must_fail(&arguments, 1, &[text(&image), "--no-lock"]);
    }
    subject.must_serve_the_next();
}

#[test]
fn image_is_free_again_when_its_daemon_is_killed() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    make_disk(directory.path());
    for _ in 0..3 {
        // Dropping it kills it.
        drop(ours(directory.path(), &[]).start());
    }
}

#[test]
fn image_is_free_again_when_its_daemon_is_killed_amid_requests() {
    // A signal is sent before the process that gets it has died, and with it its requests.
    if is_another_program() {
        return;
    }
    let Some(directory) = temp_dir_with_direct_io() else { return };
    make_disk(directory.path());
    let mut killed = Vec::new();
    for _ in 0..KILLS {
        let daemon = ours(directory.path(), &["--cache", "none"]).start();
        let options = Options { queue_count: QUEUE_COUNT, ..Options::default() };
        let driver = BlockDriver::start(daemon.socket(), &options);
        let mut driver = driver.expect("a fresh daemon serves the first who comes");
        for queue in 0..QUEUE_COUNT {
            for at in 0..REQUESTS_UNDER_WAY {
                let sector = u64::from(queue) * DISK_SECTORS / 2 + at * DATA_SECTORS as u64;
                let data = [7; DATA_SECTORS * SECTOR_BYTES];
                let write = Request::write(sector, &data).through_indirect_table();
                driver.submit(queue, &write);
            }
            driver.kick(queue).expect("the device can be kicked");
        }
        // The first has ended, the others have begun.
        driver.complete(0).expect("a write ends");
        daemon.signal(Signal::KILL);
        // Nobody waits for it to have died.
        killed.push((daemon, driver));
    }
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    if is_another_program() {
        return;
    }
    let first = Subject::with_options(&["--read-only"]);
    let directory = temp_dir();
    let image = first.image();
    let socket = directory.path().join("socket");
    let second =
        tests::DaemonCommand::block(&image).socket(&socket).argument("--read-only").start();
    must_fail(
        &["--blk-file", text(&image), "--socket-path", text(&directory.path().join("third"))],
        1,
        &[text(&image)],
    );
    drop(second);
    assert!(
        qemu_io(&image, &["-r"]).is_none_or(|output| output.status.success()),
        "qemu-io may read as well"
    );
    assert!(
        qemu_io(&image, &[]).is_none_or(|output| !output.status.success()),
        "qemu-io may not write"
    );
}

#[test]
fn image_is_served_sparse_or_preallocated_as_it_is() {
    const MIB: u64 = 1 << 20;
    if is_another_program() {
        return;
    }
    for preallocated in [false, true] {
        for mode in ["writeback", "none"] {
            let Some(directory) = temp_dir_with_direct_io() else { return };
            let image = make_disk(directory.path());
            if preallocated {
                let file = File::options().write(true).open(&image).expect("the image is ours");
                let allocated = fallocate(&file, FallocateFlags::empty(), 0, DISK_BYTES as u64);
                if let Err(error) = allocated {
                    return eprintln!("not run: /var/tmp preallocates no files: {error}");
                }
            }
            let subject = Subject::in_directory(directory, &["--cache", mode]);
            let allocated = || {
                let metadata = std::fs::metadata(subject.image()).expect("the image is there");
                metadata.blocks() * 512 / MIB
            };
            let unwritten = if preallocated { DISK_BYTES as u64 / MIB } else { 0 };
            assert_eq!(allocated(), unwritten, "opening it changes nothing");
            let mut driver = subject.driver(&Options::default());
            let mut must = |request: &Request| {
                let outcome = driver.perform(0, request).expect("the request ends");
                assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "request type {}", request.kind);
                outcome.data
            };
            let zeros = vec![0; MIB as usize];
            assert!(must(&Request::read(0, zeros.len())) == zeros, "unwritten parts are zeros");
            must(&Request::write(0, &vec![0xee; 4 * MIB as usize]));
            must(&Request::flush());
            let written = if preallocated { unwritten } else { 4 };
            assert_eq!(allocated(), written);
            let mut over = |kind, mib: u64, flags| {
                let segment = Segment { sector: mib * MIB / 512, count: 2048, flags };
                must(&Request::over_segments(kind, &[segment]));
                assert!(must(&Request::read(segment.sector, zeros.len())) == zeros, "{kind}");
                allocated()
            };
            assert_eq!(over(VIRTIO_BLK_T_WRITE_ZEROES, 0, 0), written, "it may not be unmapped");
            let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            assert_eq!(over(VIRTIO_BLK_T_WRITE_ZEROES, 1, unmap), written - 1);
            assert_eq!(over(VIRTIO_BLK_T_DISCARD, 2, 0), written - 2);
        }
    }
}

#[test]
fn no_lock_opts_out() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let second =
        tests::DaemonCommand::block(&subject.image()).socket(&socket).argument("--no-lock").start();
    drop(second);
    subject.must_serve_the_next();
}

/// Opens the image as QEMU's own tool does; none where the tool is missing.
fn qemu_io(image: &Path, options: &[&str]) -> Option<Output> {
    let mut command = Command::new("qemu-io");
    let output = command
        .args(["-f", "raw", "-c", "read 0 512"])
        .args(options)
        .arg(image)
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            cannot_run(&format!("qemu-io (package qemu-utils): {error}"));
            None
        }
    }
}

#[test]
fn qemu_io_is_kept_out_while_we_have_the_image() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let Some(output) = qemu_io(&subject.image(), &[]) else { return };
    assert!(!output.status.success(), "qemu-io opened our image for writing");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("lock"), "{message}");
    // Whoever reads and does not mind that others write may look on: QEMU's own images allow that
    // too.
    assert!(
        qemu_io(&subject.image(), &["-r"]).is_some_and(|output| output.status.success()),
        "qemu-io may read"
    );
    must_work(&mut subject.driver(&Options::default()), 0);
    let image = subject.image();
    let (daemon, _directory) = subject.into_daemon();
    daemon.terminate();
    assert!(
        qemu_io(&image, &[]).is_some_and(|output| output.status.success()),
        "the image is free again"
    );
}

#[test]
fn we_are_kept_out_while_qemu_has_the_image() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let image = make_disk(directory.path());
    let [socket, theirs] = ["socket", "theirs"].map(|name| directory.path().join(name));
    let file = format!("driver=file,filename={},node-name=file", text(&image));
    let export = format!(
        "vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={},writable=on",
        text(&theirs)
    );
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &file, "--export", &export]).stdin(Stdio::null());
    let mut daemon = match Process::spawn(&mut command) {
        Ok(daemon) => daemon,
        Err(error) => {
            return cannot_run(&format!("qemu-storage-daemon (package qemu-utils): {error}"));
        }
    };
    // Its socket is there once the image is open and locked.
    daemon.wait_for_socket(&theirs);
    must_fail(
        &["--blk-file", text(&image), "--socket-path", text(&socket)],
        1,
        &[text(&image), "--no-lock"],
    );
    drop(daemon);
    let ours = ours(directory.path(), &[]).start();
    assert_eq!(std::fs::metadata(&image).expect("the image is there").len(), DISK_BYTES as u64);
    drop(ours);
}
