//! How the units have daemons come back, how they give one up, and which ends first when the host does.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use frontend::front_end::FrontEnd;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::{
    INSIDE, JournalOnPanic, configure, install, output, outside_with_the_rig, run, show, systemctl,
};
use crate::console::server::wait_for;

const INSTANCE: &str = "vhost-blk@life";
const SERVICE: &str = "vhost-blk@life.service";
const SOCKET: &str = "/run/outboard/blk/life.sock";

/// More than a host upgrades in a second, and as many as the tests of recovery kill.
const KILLS: u32 = 20;

#[test]
fn installed_units_bring_daemons_back_until_that_is_in_vain() {
    match env::var_os(INSIDE) {
        Some(_) => inside(),
        None => outside_with_the_rig(
            "systemd::life::installed_units_bring_daemons_back_until_that_is_in_vain",
        ),
    }
}

/// In the namespace, as a unit of the systemd there.
fn inside() {
    let _journal = JournalOnPanic;
    install();
    configure("blk", "life", "DISK=null:16M\n");
    systemctl(&["start", &format!("{INSTANCE}.socket")]);
    comes_back_from_kills_in_a_row();
    comes_back_from_a_signal_to_end();
    a_thread_that_hangs_ends_the_daemon();
    outlives_the_machines_when_the_host_ends();
    a_daemon_that_cannot_start_is_given_up();
}

/// As fast as they can follow each other, each with a front end that is served.
fn comes_back_from_kills_in_a_row() {
    for _ in 0..KILLS {
        let front_end = FrontEnd::connect(Path::new(SOCKET)).expect("the socket is there");
        front_end.get_features().expect("the daemon answers");
        systemctl(&["kill", "--signal=KILL", SERVICE]);
    }
    is_served_after(KILLS);
}

/// Somebody other than the service manager may say so; only the manager's own word is final.
fn comes_back_from_a_signal_to_end() {
    systemctl(&["kill", "--signal=TERM", SERVICE]);
    is_served_after(KILLS + 1);
}

/// One worker alone, which nothing else would notice, and then all threads.
fn a_thread_that_hangs_ends_the_daemon() {
    let drop_in = Path::new("/etc/systemd/system/vhost-blk@life.service.d");
    fs::create_dir_all(drop_in).expect("root may");
    fs::write(drop_in.join("override.conf"), "[Service]\nWatchdogSec=1\n").expect("root may");
    systemctl(&["daemon-reload"]);
    systemctl(&["restart", SERVICE]);
    let heard = || show(SERVICE, "WatchdogTimestampMonotonic");
    let first = heard();
    wait_for(|| (heard() != first).then_some(())).expect("the daemon feeds its watchdog");

    let before: u32 = show(SERVICE, "NRestarts").parse().expect("a number");
    let process = show(SERVICE, "MainPID");
    hang_a_worker(&process).wait_for_its_end();
    is_served_after(before + 1);
    systemctl(&["kill", "--signal=STOP", SERVICE]);
    is_served_after(before + 2);
}

/// A thread that we hold as a debugger does.
struct Held(Pid);

fn hang_a_worker(process: &str) -> Held {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the daemon runs");
    let worker = tasks
        .map(|task| task.expect("a directory can be read"))
        .find(|task| {
            fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "worker-0\n")
        })
        .expect("it has a worker");
    let thread = worker.file_name().into_string().expect("a number");
    let thread = Pid::from_raw(thread.parse().expect("a number"));
    ptrace::seize(thread, ptrace::Options::empty()).expect("root may");
    ptrace::interrupt(thread).expect("it is ours");
    let held = Held(thread);
    assert!(matches!(held.changes(), WaitStatus::PtraceEvent(..)), "it stops");
    held
}

impl Held {
    fn changes(&self) -> WaitStatus {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        let look = || Some(waitpid(self.0, Some(flags)).expect("it is ours"));
        wait_for(|| look().filter(|found| *found != WaitStatus::StillAlive))
            .unwrap_or_else(|| panic!("nothing happens to thread {}", self.0))
    }

    /// Also what the kernel wants of us before it lets the process go.
    fn wait_for_its_end(self) {
        let end = self.changes();
        assert!(matches!(end, WaitStatus::Signaled(..)), "{end:?}");
    }
}

/// A front end is served, by a daemon that was started anew so many times.
fn is_served_after(restarts: u32) {
    let restarts = restarts.to_string();
    wait_for(|| (show(SERVICE, "NRestarts") == restarts).then_some(()))
        .unwrap_or_else(|| panic!("{} restarts, not {restarts}", show(SERVICE, "NRestarts")));
    let front_end = FrontEnd::connect(Path::new(SOCKET)).expect("the socket is there");
    front_end.get_features().expect("the daemon answers");
    // The answer may come before the manager has read READY.
    systemctl(&["start", SERVICE]);
}

/// Units that have machines, as libvirt's and an administrator's are, find the disk there while they end.
fn outlives_the_machines_when_the_host_ends() {
    // As systemd/README.md has it.
    let own = "[Unit]\nWants=vhost-blk@life.socket\n\
        After=vhost-blk@life.socket vhost-blk@life.service\n";
    for (unit, head) in [("libvirt-guests.service", ""), ("own-machine.service", own)] {
        let machines = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n\
            ExecStop=/bin/systemctl is-active vhost-blk@life.service\n";
        // What ends a host is one transaction, in which only order counts.
        let all = format!("{INSTANCE}.socket {SERVICE} {unit}");
        let end = format!("[Unit]\nConflicts={all}\nAfter={all}\n");
        let units = Path::new("/etc/systemd/system");
        fs::write(units.join(unit), format!("{head}{machines}")).expect("root may");
        fs::write(units.join("end.target"), end).expect("root may");
        systemctl(&["daemon-reload"]);
        systemctl(&["start", &format!("{INSTANCE}.socket"), SERVICE, unit]);
        systemctl(&["start", "end.target"]);
        assert_eq!(show(unit, "Result"), "success", "{unit} found no disk when it ended");
        assert_eq!(show(SERVICE, "ActiveState"), "inactive");
        assert_eq!(show(SERVICE, "Result"), "success");
        systemctl(&["stop", "end.target"]);
    }
}

fn a_daemon_that_cannot_start_is_given_up() {
    let image = Path::new("/var/lib/outboard/blk/missing/disk.raw");
    configure("blk", "missing", &format!("DISK=file:{}\n", image.display()));
    let [service, socket] = ["service", "socket"].map(|kind| format!("vhost-blk@missing.{kind}"));
    systemctl(&["start", &socket]);
    let first = output(Command::new("systemctl").args(["start", &service]));
    assert!(!first.status.success(), "there is no image");
    wait_for(|| (show(&socket, "Result") == "service-start-limit-hit").then_some(()))
        .expect("it is given up");
    assert_eq!(show(&service, "ActiveState"), "failed");

    // What an administrator does about it.
    run(Command::new("truncate").args(["--size=16M"]).arg(image));
    run(Command::new("chown").arg("outboard:").arg(image));
    systemctl(&["reset-failed", "vhost-blk@missing.*"]);
    systemctl(&["start", &socket, &service]);
    assert_eq!(show(&service, "ActiveState"), "active");
    systemctl(&["stop", &socket]);
}
