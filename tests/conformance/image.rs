//! The image: what can be one, and who else has it open.

use crate::launch::{Process, must_fail};
use crate::subject::{DISK_BYTES, Subject, is_another_program, make_disk, must_work, ours};
use frontend::guest::Options;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tests::{cannot_run, temp_dir};

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
