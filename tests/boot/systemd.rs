//! The units as an administrator installs them, under a real systemd, next to a real guest.
//!
//! Each test runs twice: on the machine, where it has `tests/rig/systemd-in-namespace` boot systemd as PID 1 of namespaces
//! of its own, and in there, where it installs the units unmodified and works with them. Nothing of the machine's own
//! service manager, accounts or files is touched; a loop device, which is the kernel's, is freed also when the test is
//! killed.

mod console;
mod life;
mod network;

use std::env;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;

use frontend::block::{BlockDriver, Request, VIRTIO_BLK_S_OK};
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::message::VHOST_USER_SET_VRING_CALL;
use frontend::wire::{PATIENCE, Wire};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::process::{Gid, Uid};
use tests::{
    Device, DiskImage, Machine, Rig, UserModeLinux, cannot_run, lacks_root, program, temp_dir,
    wait_for_exit,
};

/// Set inside, to the directory that both sides share.
pub(crate) const INSIDE: &str = "OUTBOARD_TEST_SYSTEMD";
/// Four guests and a dozen unit starts take seconds; this is for a machine that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(300);
/// What `systemd-in-namespace` ends with where the machine cannot do it.
const CANNOT_RUN: i32 = 77;
const DISK_BYTES: u64 = 32 << 20;
/// Owns nothing and is in no group.
const NOBODY: u32 = 65534;

#[test]
fn installed_units_serve_a_file_and_a_loop_device_to_guests() {
    match env::var_os(INSIDE) {
        Some(shared) => inside(Path::new(&shared)),
        None => outside(),
    }
}

/// On the machine: prepares what only the machine has, boots systemd, judges the outcome.
fn outside() {
    let Some(rig) = Rig::find() else { return };
    if lacks_root("systemd as PID 1 of a namespace") {
        return;
    }
    let shared = temp_dir();
    let backing = DiskImage::patterned(&shared.path().join("backing"), DISK_BYTES, 11);
    let before = backing.checksum();
    let loop_device = match LoopDevice::attach(backing.path()) {
        Ok(device) => device,
        Err(why) => return cannot_run(&why),
    };
    fs::write(shared.path().join("loop-device"), loop_device.number.to_string())
        .expect("our own directory");

    let test = "systemd::installed_units_serve_a_file_and_a_loop_device_to_guests";
    if !passes_inside(test, shared.path(), &rig) {
        return;
    }
    drop(loop_device);
    let written = fs::read_to_string(shared.path().join("written")).expect("the guest's checksum");
    assert_eq!(
        written,
        backing.checksum(),
        "what the guest wrote to the loop device is in the file behind it"
    );
    assert_ne!(written, before);
}

/// Runs a test of this program once more, as a unit of a systemd of its own, where it must pass; false, and why on stderr,
/// where the machine cannot do that.
fn passes_inside(test: &str, shared: &Path, rig: &Rig) -> bool {
    let (status, output) = boot_systemd(test, shared, rig);
    if status.code() == Some(CANNOT_RUN) {
        cannot_run(&output);
        return false;
    }
    assert!(status.success(), "in the namespace: {status}\n{output}");
    true
}

/// Runs a test that needs nothing of the machine but the rig inside.
pub(crate) fn outside_with_the_rig(test: &str) {
    let Some(rig) = Rig::find() else { return };
    if lacks_root("systemd as PID 1 of a namespace") {
        return;
    }
    let shared = temp_dir();
    passes_inside(test, shared.path(), &rig);
}

fn boot_systemd(test: &str, shared: &Path, rig: &Rig) -> (ExitStatus, String) {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let this = env::current_exe().expect("a test knows its own path");
    // The script ends, and what it has started with it, also when this test is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM"]).arg(tests.join("rig/systemd-in-namespace"));
    // What lies on a file system of its own is not in the overlay of /.
    let project = tests.parent().expect("tests is in the project").to_owned();
    for directory in [
        project,
        folder(&this),
        folder(&program("vhost-blk")),
        rig.path("").join(".."),
        shared.to_owned(),
    ] {
        command.arg("--bind").arg(directory);
    }
    let log = shared.join("output");
    let output = File::create(&log).expect("our own directory");
    let errors = output.try_clone().expect("a descriptor can be duplicated");
    let mut systemd = command
        .arg("--")
        .arg(&this)
        .args(["--exact", "--nocapture", test])
        .env(INSIDE, shared)
        .stdout(output)
        .stderr(errors)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let status = wait_for_exit(&mut systemd, LIMIT)
        .expect("our own child can be waited for")
        .unwrap_or_else(|| {
            // The script ends what it has started when it is asked to end, not when it is killed.
            let script = rustix::process::Pid::from_child(&systemd);
            rustix::process::kill_process(script, rustix::process::Signal::TERM)
                .expect("our own child can be signalled");
            systemd.wait().expect("our own child can be waited for")
        });
    (status, fs::read_to_string(&log).unwrap_or_else(|error| error.to_string()))
}

fn folder(file: &Path) -> PathBuf {
    file.parent().expect("a file is in a directory").to_owned()
}

/// A loop device that the kernel frees with the last descriptor on it, so also when this process is killed.
struct LoopDevice {
    number: u64,
    _open: File,
}

impl LoopDevice {
    fn attach(backing: &Path) -> Result<LoopDevice, String> {
        let losetup =
            |arguments: &[&std::ffi::OsStr]| Command::new("losetup").args(arguments).output();
        let attached = losetup(&["--find".as_ref(), "--show".as_ref(), backing.as_os_str()]);
        let attached = attached.map_err(|error| format!("cannot run losetup: {error}"))?;
        if !attached.status.success() {
            return Err(format!("no loop device: {}", text(&attached.stderr)));
        }
        let path = PathBuf::from(text(&attached.stdout));
        let open = File::open(&path)
            .map_err(|error| format!("cannot open {}: {error}", path.display()))?;
        // While it is open, detaching only marks the device: it goes with the last descriptor.
        losetup(&["--detach".as_ref(), path.as_os_str()])
            .map_err(|error| format!("cannot run losetup: {error}"))?;
        let number = open.metadata().expect("it is open").rdev();
        Ok(LoopDevice { number, _open: open })
    }
}

/// In the namespace, as a unit of the systemd there.
fn inside(shared: &Path) {
    let _journal = JournalOnPanic;
    install();
    let guests = UserModeLinux::new(Rig::find().expect("the rig is bound into the namespace"));
    serves_a_file(&guests);
    comes_back_after_a_crash();
    leaves_its_front_end_to_the_next();
    serves_a_loop_device(&guests, shared);
    says_what_is_wrong_with_its_configuration();
}

/// A failure is explained by what the units have said, and the journal ends with the namespace.
pub(crate) struct JournalOnPanic;

impl Drop for JournalOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            output(Command::new("journalctl").arg("--sync"));
            let journal = output(Command::new("journalctl").args([
                "--lines=80",
                "--output=short-monotonic",
                "--no-hostname",
            ]));
            println!("journal:\n{}", text(&journal.stdout));
        }
    }
}

/// As `systemd/README.md` has it.
fn install() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    run(Command::new(project.join("packaging/install")).arg(folder(&program("vhost-blk"))));
    take_notice();
}

/// Has the running system take notice of what was installed.
pub(crate) fn take_notice() {
    run(Command::new("systemd-sysusers").arg("outboard.conf"));
    run(Command::new("systemd-tmpfiles").args(["--create", "outboard.conf"]));
    run(Command::new("systemctl").arg("daemon-reload"));
}

fn serves_a_file(guests: &UserModeLinux) {
    let directory = Path::new("/var/lib/outboard/blk/file");
    fs::create_dir_all(directory).expect("root may");
    let image = DiskImage::patterned(&directory.join("a disk, with spaces.raw"), DISK_BYTES, 12);
    let options = "--serial from-systemd --num-queues 2";
    let description = format!("DISK=file:{}\nOPTIONS={options}\n", image.path().display());
    configure("blk", "file", &description);
    verify("vhost-blk@file", 10);

    let socket = Path::new("/run/outboard/blk/file.sock");
    starts_when_a_vmm_connects("vhost-blk@file", socket);
    assert_is_confined(&show("vhost-blk@file.service", "MainPID"), Capabilities::NONE);

    let size = format!("size_bytes={DISK_BYTES}");
    assert_eq!(pass(guests, socket, "read", &[]), image.checksum());
    pass(guests, socket, "identity", &[&size, "serial=from-systemd"]);
    assert_eq!(pass(guests, socket, "write", &["seed=13"]), image.checksum());
    assert_counts_requests(Path::new("/run/outboard/blk/file/control.sock"));
}

/// Starts the socket unit, and by it, as the first VMM that connects, the daemon. Nobody else may.
pub(crate) fn starts_when_a_vmm_connects(instance: &str, socket: &Path) {
    let service = format!("{instance}.service");
    systemctl(&["start", &format!("{instance}.socket")]);
    let metadata = fs::metadata(socket).expect("the socket unit has made it");
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    assert_eq!(metadata.gid(), group("outboard-vmm"));

    let refusal = connect_as(socket, NOBODY).expect_err("a stranger is refused");
    assert_eq!(refusal.kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(show(&service, "ActiveState"), "inactive", "nobody has connected yet");

    // The answer is the daemon's: the connection of a VMM's account has started it.
    let stream = connect_as(socket, group("outboard-vmm")).expect("a VMM's group is admitted");
    FrontEnd::on(Wire::from_stream(stream)).get_features().expect("the daemon answers");
    // The answer may come before the manager has read READY: the start job ends with that.
    systemctl(&["start", &service]);
    assert_eq!(show(&service, "ActiveState"), "active");
    assert_ne!(show(&service, "StatusText"), "");
}

/// Goes on with the unit that [`serves_a_file`] has left running, and stops it.
fn comes_back_after_a_crash() {
    let before = show("vhost-blk@file.service", "MainPID");
    systemctl(&["kill", "--signal=KILL", "vhost-blk@file.service"]);
    // The socket outlives the daemon: the connection waits in it for the next one.
    let front_end =
        FrontEnd::connect(Path::new("/run/outboard/blk/file.sock")).expect("the socket is there");
    front_end.get_features().expect("the restarted daemon answers");
    assert_eq!(show("vhost-blk@file.service", "NRestarts"), "1");
    assert_ne!(show("vhost-blk@file.service", "MainPID"), before);

    // With a front end connected: it must not keep the daemon from ending.
    systemctl(&["stop", "vhost-blk@file.socket"]);
    assert_eq!(show("vhost-blk@file.service", "Result"), "success");
    assert_eq!(show("vhost-blk@file.service", "ExecMainStatus"), "0");
    assert_eq!(show("vhost-blk@file.service", "ActiveState"), "inactive");
    for gone in ["/run/outboard/blk/file.sock", "/run/outboard/blk/file"] {
        assert!(!Path::new(gone).exists(), "{gone} is left behind");
    }
}

/// A front end that says nothing goes on with the daemon that follows a crash, and with the one that follows an upgrade.
fn leaves_its_front_end_to_the_next() {
    let (unit, service) = ("vhost-blk@left", "vhost-blk@left.service");
    let directory = Path::new("/var/lib/outboard/blk/left");
    fs::create_dir_all(directory).expect("root may");
    let image = DiskImage::sparse(&directory.join("disk"), DISK_BYTES);
    let description = format!("DISK=file:{}\nOPTIONS=--num-queues 2\n", image.path().display());
    configure("blk", "left", &description);
    systemctl(&["start", &format!("{unit}.socket")]);
    let options = Options { queue_count: 2, ..Options::default() };
    let mut driver = BlockDriver::start(Path::new("/run/outboard/blk/left.sock"), &options)
        .expect("the daemon answers");
    // The manager drops a file that it has already, whatever its name.
    let guest = &driver.guest;
    let call = guest.queues[0].call_notifier().expect("it has one").back_end_fd();
    guest
        .front_end
        .set_vring_fd(VHOST_USER_SET_VRING_CALL, 1, Some(call))
        .expect("rings may share one");
    guest.front_end.barrier().expect("the daemon answers");
    let ends: [&[&str]; 4] = [
        &["kill", "--signal=KILL", service],
        &["restart", service],
        &["kill", "--signal=KILL", service],
        &["stop", &format!("{unit}.socket")],
    ];
    let (stop, ends) = ends.split_last().expect("there are some");
    let started = show(service, "MainPID");
    for (round, end) in (0_u64..).zip(ends) {
        for queue in 0..2 {
            for at in 0..16 {
                let sector = 64 * (16 * u64::from(queue) + at);
                driver.submit(queue, &Request::write(sector, &[round as u8; 32 << 10]));
            }
            driver.kick(queue).expect("the device can be kicked");
        }
        systemctl(end);
        for queue in 0..2 {
            while driver.guest.queues[usize::from(queue)].outstanding_count() > 0 {
                let (_, outcome) = driver.complete_by_looking(queue).expect("it ends");
                assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "{end:?}");
            }
        }
        driver.guest.front_end.get_features().expect("the connection is the same");
    }
    assert_ne!(show(service, "MainPID"), started);
    systemctl(stop);
    let wire = driver.guest.front_end.wire();
    wire.wait_for_hang_up(PATIENCE).expect("nobody keeps what is stopped");
    assert_eq!(show(service, "Result"), "success");
}

fn serves_a_loop_device(guests: &UserModeLinux, shared: &Path) {
    let number = fs::read_to_string(shared.join("loop-device")).expect("written outside");
    let number: u64 = number.parse().expect("a device number");
    // By its group, as the udev rule in `systemd/README.md` has it.
    let device = Path::new("/dev/outboard-loop");
    let name = makedev(rustix::fs::major(number), rustix::fs::minor(number));
    mknodat(CWD, device, FileType::BlockDevice, Mode::empty(), name).expect("root may make a node");
    chown(device, None, Some(group("outboard"))).expect("root may");
    fs::set_permissions(device, Permissions::from_mode(0o660)).expect("root may");
    configure("blk", "loop", "DISK=file:/dev/outboard-loop\n");

    systemctl(&["start", "vhost-blk@loop.socket"]);
    let socket = Path::new("/run/outboard/blk/loop.sock");
    pass(guests, socket, "identity", &[&format!("size_bytes={DISK_BYTES}")]);
    let written = pass(guests, socket, "write", &["seed=14"]);
    fs::write(shared.join("written"), written).expect("the shared directory is writable");
    assert_opens_its_device_only(&show("vhost-blk@loop.service", "ControlGroup"), device);
    systemctl(&["stop", "vhost-blk@loop.socket"]);
    assert_eq!(show("vhost-blk@loop.service", "Result"), "success");
}

/// The kernel's filter on the unit's control group, by a process of root's: no permission of a node stands in its way.
fn assert_opens_its_device_only(control_group: &str, device: &Path) {
    let opens = |group: &str, node: &Path| {
        // The shell's own number is 0 to the file; what it opens, it does not read.
        let script = r#"echo 0 >"/sys/fs/cgroup$1/cgroup.procs" || exit 3; : <"$2""#;
        let tried = output(Command::new("sh").args(["-c", script, "sh", group]).arg(node));
        assert_ne!(tried.status.code(), Some(3), "{group}: {}", text(&tried.stderr));
        tried.status.success().then_some(()).ok_or_else(|| text(&tried.stderr))
    };
    // The control device of loop devices, which is none of any unit's.
    let other = Path::new("/dev/outboard-loop-control");
    mknodat(CWD, other, FileType::CharacterDevice, Mode::RUSR, makedev(10, 237))
        .expect("root may make a node");
    let own = show("rig.service", "ControlGroup");
    assert_eq!(opens(&own, other), Ok(()), "outside the unit");
    assert_eq!(opens(control_group, device), Ok(()));
    let refusal = opens(control_group, other).expect_err("DevicePolicy= has no effect");
    assert!(refusal.contains("Operation not permitted"), "{refusal}");
}

fn says_what_is_wrong_with_its_configuration() {
    // Without a description there is nothing to serve, and nothing listens in its name.
    assert!(
        !output(Command::new("systemctl").args(["start", "vhost-blk@unknown.socket"]))
            .status
            .success()
    );
    configure("blk", "empty", "OPTIONS=--read-only\n");
    assert!(
        !output(Command::new("systemctl").args(["start", "vhost-blk@empty.service"]))
            .status
            .success()
    );
    assert_eq!(show("vhost-blk@empty.service", "ExecMainStatus"), "2");
    assert_eq!(show("vhost-blk@empty.service", "NRestarts"), "0", "a usage error does not heal");
    // The journal takes messages in when it comes to them, also after the unit has failed: follow it.
    let mut journal = Command::new("journalctl");
    journal.args(["--follow", "--lines=all", "--output=cat", "--unit=vhost-blk@empty.service"]);
    Machine::start(journal, LIMIT).wait_for("--disk");
}

/// The verdict of systemd itself on the installed files: that they are right, and what the unit is exposed to, in tenths of
/// the figure that `systemd-analyze` gives.
pub(crate) fn verify(instance: &str, exposure_max: u32) {
    let units = ["service", "socket"].map(|kind| format!("{instance}.{kind}"));
    let verdict = output(
        Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=yes"])
            .args(&units),
    );
    let words = text(&verdict.stdout) + &text(&verdict.stderr);
    assert!(
        verdict.status.success() && words.is_empty(),
        "systemd-analyze verify: {}: {words}",
        verdict.status
    );
    run(Command::new("systemd-analyze")
        .args(["security", "--offline=true", &format!("--threshold={exposure_max}")])
        .arg(&units[0]));
}

pub(crate) fn configure(device: &str, instance: &str, description: &str) {
    fs::write(format!("/etc/outboard/{device}/{instance}.conf"), description).expect("root may");
}

/// Boots a guest on the disk behind `socket`, has it pass `check`, and returns what it found.
fn pass(guests: &UserModeLinux, socket: &Path, check: &str, words: &[&str]) -> String {
    pass_with(guests, Device::Block(socket), check, words)
}

/// The same with any device.
fn pass_with(guests: &UserModeLinux, device: Device<'_>, check: &str, words: &[&str]) -> String {
    let mut machine = guests.boot(&[device], check, words);
    let details = machine.expect_pass();
    let status = machine.wait();
    assert!(status.success(), "User-Mode Linux ended with {status}");
    details
}

/// Connects as nobody in the group `gid`. The kernel judges by the thread's own credentials, which end with it.
fn connect_as(socket: &Path, gid: u32) -> std::io::Result<UnixStream> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            rustix::thread::set_thread_groups(&[]).expect("root may");
            rustix::thread::set_thread_gid(Gid::from_raw(gid)).expect("root may");
            rustix::thread::set_thread_uid(Uid::from_raw(NOBODY)).expect("root may");
            UnixStream::connect(socket)
        });
        thread.join().expect("no panic")
    })
}

/// The capabilities that a daemon has and may have, as `/proc` tells them.
#[derive(Clone, Copy)]
struct Capabilities(u64);

impl Capabilities {
    const NONE: Self = Self(0);
    const NET_ADMIN: Self = Self(1 << 12);
}

/// What holds whichever way the unit's lines are written.
fn assert_is_confined(process: &str, Capabilities(bits): Capabilities) {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the daemon runs");
    let sets = ["CapEff", "CapBnd"].map(|set| format!("{set}:\t{bits:016x}"));
    for line in
        ["NoNewPrivs:\t1", "Seccomp:\t2"].into_iter().chain(sets.each_ref().map(|set| &**set))
    {
        assert!(status.lines().any(|found| found == line), "{line} is not in\n{status}");
    }
    let own = fs::metadata(format!("/proc/{process}")).expect("the daemon runs");
    assert_ne!(own.uid(), 0, "the daemon runs as root");
}

fn assert_counts_requests(control: &Path) {
    let mut stream = UnixStream::connect(control).expect("root may");
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers and closes");
    assert!(answer.starts_with("HTTP/1.") && answer.contains("requests_total"), "{answer}");
}

fn group(name: &str) -> u32 {
    let entry = output(Command::new("getent").args(["group", name]));
    let entry = text(&entry.stdout);
    let gid = entry.split(':').nth(2).unwrap_or_else(|| panic!("there is no group {name}"));
    gid.parse().expect("a group's number")
}

pub(crate) fn show(unit: &str, property: &str) -> String {
    text(
        &output(Command::new("systemctl").args(["show", "--value", "--property", property, unit]))
            .stdout,
    )
}

pub(crate) fn systemctl(arguments: &[&str]) {
    run(Command::new("systemctl").args(arguments));
}

pub(crate) fn run(command: &mut Command) {
    let result = output(command);
    assert!(result.status.success(), "{command:?}: {}\n{}", result.status, text(&result.stderr));
}

pub(crate) fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}
