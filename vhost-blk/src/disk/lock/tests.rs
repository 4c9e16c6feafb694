//! Locks between two of ours, and between us and the real QEMU tools in both directions.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{ImageLock, LockError, one_byte};

struct Image {
    directory: tempfile::TempDir,
}

impl Image {
    fn new() -> Image {
        let image = Image { directory: tempfile::tempdir().unwrap() };
        File::create(image.path()).unwrap().set_len(1 << 20).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("disk.img")
    }

    fn lock(&self, read_only: bool) -> Result<ImageLock, LockError> {
        let file = File::open(self.path()).unwrap();
        ImageLock::take_now(&self.path(), file.as_fd(), read_only)
    }
}

/// The permission over which a lock was refused.
fn refused(outcome: Result<ImageLock, LockError>) -> &'static str {
    match outcome {
        Err(LockError::InUse { permission, .. }) => permission,
        other => panic!("expected a refusal: {other:?}"),
    }
}

#[test]
fn second_writer_is_refused_and_told_why() {
    let image = Image::new();
    let _first = image.lock(false).unwrap();
    let message = image.lock(false).unwrap_err().to_string();
    let expected = format!(
        "{:?} is in use by another process (lock on write permission); --no-lock opens it all the same",
        image.path()
    );
    assert_eq!(message, expected);
}

#[test]
fn read_only_users_share_an_image() {
    let image = Image::new();
    let _first = image.lock(true).unwrap();
    let _second = image.lock(true).unwrap();
}

#[test]
fn reader_and_writer_exclude_each_other() {
    let image = Image::new();
    let reader = image.lock(true).unwrap();
    assert_eq!(refused(image.lock(false)), "write");
    drop(reader);
    let _writer = image.lock(false).unwrap();
    assert_eq!(refused(image.lock(true)), "write");
}

#[test]
fn refused_user_leaves_no_lock_behind() {
    let image = Image::new();
    let first = image.lock(true).unwrap();
    assert_eq!(refused(image.lock(false)), "write");
    drop(first);
    image.lock(false).unwrap();
}

#[test]
fn io_description_holds_no_lock() {
    let image = Image::new();
    let file = File::open(image.path()).unwrap();
    drop(ImageLock::take(&image.path(), file.as_fd(), false).unwrap());
    // `file` is still open: were the locks its own, they would still be held.
    image.lock(false).unwrap();
}

#[test]
fn dropped_lock_is_gone_though_a_forked_child_shares_its_description() {
    let image = Image::new();
    let lock = image.lock(false).unwrap();
    let _shared = lock.description.try_clone().unwrap();
    drop(lock);
    image.lock(false).unwrap();
}

#[test]
fn lock_bytes_are_those_of_a_guest_disk_in_qemu() {
    let image = Image::new();
    let held_bytes = |read_only| -> Vec<libc::off_t> {
        let _lock = image.lock(read_only).unwrap();
        let other = File::open(image.path()).unwrap();
        (0..300)
            .filter(|offset| {
                let mut byte = one_byte(libc::F_WRLCK, *offset);
                fcntl(other.as_fd(), FcntlArg::F_OFD_GETLK(&mut byte)).unwrap();
                i32::from(byte.l_type) != libc::F_UNLCK
            })
            .collect()
    };
    assert_eq!(held_bytes(false), [100, 101, 201]);
    assert_eq!(held_bytes(true), [100, 201]);
}

#[test]
fn exclusive_lock_on_the_whole_file_counts_as_in_use() {
    let image = Image::new();
    let other = File::options().read(true).write(true).open(image.path()).unwrap();
    let whole = libc::flock { l_len: 0, ..one_byte(libc::F_WRLCK, 0) };
    fcntl(other.as_fd(), FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    assert_eq!(refused(image.lock(true)), "consistent read");
}

#[test]
fn file_replaced_between_the_two_openings_is_noticed() {
    let image = Image::new();
    let old = File::open(image.path()).unwrap();
    let new = image.directory.path().join("new");
    File::create(&new).unwrap();
    std::fs::rename(&new, image.path()).unwrap();
    let outcome = ImageLock::take(&image.path(), old.as_fd(), true);
    assert!(matches!(outcome, Err(LockError::Replaced { .. })), "{outcome:?}");
}

/// A QEMU tool that may have the image open; ended by its own pid when dropped.
struct Holder(Child);

impl Holder {
    /// Starts a tool, sends it `line`, and waits until it answers with a line that contains
    /// `ready`: then it holds its locks. What it says on stderr, if it ends before.
    fn start(command: &mut Command, line: &str, ready: &str) -> Result<Holder, String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut holder = Holder(command.spawn().unwrap());
        // A tool that was refused at once reads no more.
        let _ = holder.0.stdin.as_mut().unwrap().write_all(line.as_bytes());
        let mut answers = BufReader::new(holder.0.stdout.take().unwrap()).lines();
        if answers.any(|answer| answer.unwrap().contains(ready)) {
            return Ok(holder);
        }
        let mut error = String::new();
        holder.0.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        Err(error)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Errors mean that it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a QEMU tool is installed. Where it must be (REQUIRE_ALL=1), its absence fails the test;
/// else the test says that it did not run.
fn have(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        assert!(
            std::env::var_os("REQUIRE_ALL").is_none(),
            "REQUIRE_ALL is set, but {tool} cannot be run"
        );
        eprintln!("skipped: {tool} (Debian: qemu-utils, qemu-system-common) is not installed");
    }
    found
}

fn qemu_io_holds(image: &Image, options: &[&str]) -> Holder {
    let mut command = Command::new("qemu-io");
    command.args(options).args(["-f", "raw"]).arg(image.path());
    Holder::start(&mut command, "read 0 512\n", "read 512/512 bytes").unwrap()
}

/// Runs a short command of qemu-io on the image; the error it printed, if it could not open it.
fn qemu_io_refused(image: &Image, options: &[&str]) -> Option<String> {
    let mut command = Command::new("qemu-io");
    command.args(options).args(["-f", "raw", "-c", "read 0 512"]).arg(image.path());
    let output = command.stdin(Stdio::null()).output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn qemu_respects_our_locks() {
    if !have("qemu-io") {
        return;
    }
    let image = Image::new();
    let writer = image.lock(false).unwrap();
    let error = qemu_io_refused(&image, &[]).expect("a second writer opened the image");
    assert!(error.contains(r#"Failed to get "write" lock"#), "{error}");
    drop(writer);
    let reader = image.lock(true).unwrap();
    let error = qemu_io_refused(&image, &[]).expect("a writer opened a read-only guest's image");
    assert!(error.contains(r#"Failed to get "write" lock"#), "{error}");
    assert_eq!(qemu_io_refused(&image, &["-r"]), None);
    drop(reader);
    assert_eq!(qemu_io_refused(&image, &[]), None);
}

#[test]
fn we_respect_the_locks_of_qemu() {
    if !have("qemu-io") {
        return;
    }
    let image = Image::new();
    let writer = qemu_io_holds(&image, &[]);
    assert_eq!(refused(image.lock(false)), "write");
    assert_eq!(refused(image.lock(true)), "write");
    drop(writer);
    let _reader = qemu_io_holds(&image, &["-r"]);
    image.lock(true).unwrap();
    // qemu-io shares everything, unlike a guest's disk, so its reading does not keep a writer away.
    image.lock(false).unwrap();
}

#[test]
fn we_and_a_qemu_storage_daemon_exclude_each_other() {
    if !have("qemu-storage-daemon") {
        return;
    }
    let image = Image::new();
    let socket = image.directory.path().join("export.sock");
    let daemon = || {
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", image.path().display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ))
            // Options are executed in their order: once the monitor greets, the export is there.
            .args(["--chardev", "stdio,id=stdio", "--monitor", "stdio"]);
        command
    };
    let start = || Holder::start(&mut daemon(), "", "QMP");
    let running = start().unwrap();
    assert_eq!(refused(image.lock(false)), "write");
    assert_eq!(refused(image.lock(true)), "write");
    drop(running);
    let _ours = image.lock(false).unwrap();
    let error = start().map(|_| ()).unwrap_err();
    assert!(error.contains(r#"Failed to get "write" lock"#), "{error}");
}
