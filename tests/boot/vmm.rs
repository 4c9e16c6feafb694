//! Our own VMM: stock kernels on KVM, and devices that are all other processes, which die and come back.

mod accelerator;
mod figures;
mod nested;

use std::collections::BTreeMap;
use std::time::Duration;

use guest::announcement::Announcement;
use guest::verdict::{MARK, word};
use serde_json::Value;

use self::nested::Host;
use crate::qemu::FIO;

/// The daemons of the machine's devices. The tap outlives its daemon, as an operator's does.
const BLK: &str = "vhost-blk --blk-file /tmp/disk --num-queues 4 --socket-path /run/blk";
const NET: &str = "vhost-net --backend tap=t0 --mac 52:54:00:12:34:56 --socket-path /run/net";
const CONSOLE: &str = "vhost-console --port console,endpoint=pty:/run/tty --socket-path /run/con";
const DEVICES: &str = "--blk /run/blk --net /run/net --console /run/con";
/// The same devices, each with a daemon of the VMM's own.
const SPAWNED: &str = "--control /run/vmm --blk file=/tmp/disk,num-queues=2 --net tap=t0 --console pty:/run/tty,log-level=warn";
const CONTROL: &str = "/run/vmm";
/// Succeeds if there is a daemon. Nobody waits for orphans in this host, so those that have ended are still listed.
const DAEMONS_RUN: &str =
    "cat /proc/[0-9]*/stat 2> /dev/null | grep -E '[(]vhost-(blk|net|console)[)] [^Z]'";
const WORDS: &str = "check=machine address=10.0.0.2/24 peer=10.0.0.1";
/// Of the VMM's threads during the load: the watchdog looks once more after the last message to a daemon.
const SLEEPS_MAX: u64 = 4;
/// What fio says when it begins: it goes over the disk within a second or two, too short to say that requests are completing.
const LOAD_BEGINS: &str = "Starting 2 processes";
/// Long enough for some thousand requests.
const LOAD: Duration = Duration::from_secs(4);

fn boot_with_devices(inner_programs: &[&str]) -> Option<Host> {
    let mut host = boot_with_resources(inner_programs)?;
    for daemon in [BLK, NET, CONSOLE] {
        start(&mut host, daemon);
    }
    Some(host)
}

/// With what daemons have devices on.
fn boot_with_resources(inner_programs: &[&str]) -> Option<Host> {
    let mut host = Host::boot(inner_programs)?;
    host.run("mkdir -p /run /dev/pts && mount -t devpts devpts /dev/pts");
    host.run("truncate -s 16M /tmp/disk");
    host.run("tunctl -t t0 && ip link set t0 up && ip address add 10.0.0.1/24 dev t0");
    Some(host)
}

/// Starts a daemon. Nobody need wait until it listens: the VMM does.
fn start(host: &mut Host, daemon: &str) {
    host.run(&format!("{daemon} &"));
}

/// Types a line on the machine's console.
fn type_on_console(host: &mut Host, line: &str) {
    host.run(&format!("echo {line} > /run/tty"));
}

/// How often threads of the VMM's have slept, and so were woken, that run no processor.
fn sleeps(host: &mut Host) -> u64 {
    host.count(
        "for task in /proc/$(pidof outboard-vmm)/task/*; do grep -q vcpu $task/comm || grep ^voluntary $task/status; done \
         | awk '{count += $2} END {print count}'",
    )
}

/// How often front ends' threads were woken.
fn wakeups(statistics: &Value) -> u64 {
    let devices = statistics["devices"].as_array().expect("devices");
    devices.iter().map(|device| device["wakeups"].as_u64().expect("a count")).sum()
}

/// How often processors have left the guest, by reason.
fn exits(statistics: &Value) -> BTreeMap<&str, u64> {
    let mut exits = BTreeMap::new();
    for vcpu in statistics["vcpus"].as_array().expect("processors") {
        for (reason, count) in vcpu.as_object().expect("counts") {
            *exits.entry(&**reason).or_default() += count.as_u64().expect("a count");
        }
    }
    exits
}

#[test]
fn no_request_passes_through_the_vmm() {
    let Some(mut host) = boot_with_devices(&[]) else { return };
    host.start(&format!("--memory 256M --vcpus 4 {DEVICES}"), WORDS);
    assert_eq!(host.announcement(), Announcement::Loaded);
    host.run("head -n 1 /run/tty | grep 'the machine is up'");
    every_thread_is_confined(&mut host);
    let before = steady_statistics(&mut host);
    let sleeps_before = sleeps(&mut host);
    type_on_console(&mut host, "begin");
    host.run_for(LOAD);
    let requests = end_load(&mut host);
    let sleeps = sleeps(&mut host) - sleeps_before;
    let after = host.statistics();
    assert!(requests >= 128, "{requests} requests are no load");
    assert_eq!(wakeups(&after), wakeups(&before), "during {requests} requests: {before} {after}");
    assert!(sleeps <= SLEEPS_MAX, "{sleeps} sleeps during {requests} requests");
    let before = exits(&before);
    let mut exits = exits(&after);
    exits.iter_mut().for_each(|(reason, count)| *count -= before[reason]);
    // Of a device's registers. Those of ports are the serial line's, on which the guest says how far it has come.
    assert_eq!((exits["memory_reads"], exits["memory_writes"]), (0, 0), "{requests}: {exits:?}");
    let resident_kib = host.resident_kib("outboard-vmm");
    eprintln!("exits meanwhile: {exits:?}; {resident_kib} KiB resident");
    type_on_console(&mut host, "on");
    let found = host.expect_pass();
    assert_eq!(word(&found, "processors"), Some("4"), "{found}");
    host.finish();
    restarts(&mut host);
    host.end();
}

/// The VMM's statistics once its guest has settled: a network has the guest announce itself some times within two seconds of its
/// link, and each time the driver reads why it was interrupted.
fn steady_statistics(host: &mut Host) -> Value {
    let register_exits = |statistics: &Value| {
        let exits = exits(statistics);
        (exits["memory_reads"], exits["memory_writes"])
    };
    let mut earlier = host.statistics();
    loop {
        host.run_for(LOAD / 2);
        let statistics = host.statistics();
        if register_exits(&statistics) == register_exits(&earlier) {
            return statistics;
        }
        earlier = statistics;
    }
}

/// Every thread of the VMM has a filter of its system calls (2: `SECCOMP_MODE_FILTER`), but for those that run daemons.
fn every_thread_is_confined(host: &mut Host) {
    host.run(
        "for task in /proc/$(pidof outboard-vmm)/task/*; do \
         grep -x daemon $task/comm || grep 'Seccomp:.2' $task/status || exit 1; done",
    );
}

/// A machine that its guest starts again finds what was written before.
fn restarts(host: &mut Host) {
    host.start(&format!("--memory 128M {DEVICES}"), "check=restart seed=7");
    host.expect_pass();
    host.finish();
    let restarts = host.console().matches("restarting").count();
    assert_eq!(restarts, 1, "{}", host.console());
}

/// Ends the load and returns how many requests there were.
fn end_load(host: &mut Host) -> u64 {
    // The answer to a line that is typed may come behind what the machine says of it.
    host.begin("run echo end > /run/tty");
    let requests = match (host.announcement(), host.announcement()) {
        (Announcement::Found(requests), Announcement::Done)
        | (Announcement::Done, Announcement::Found(requests)) => requests,
        other => panic!("{other:?}:\n{}", host.console()),
    };
    eprintln!("{requests} requests");
    requests
}

#[test]
fn the_machine_outlives_its_daemons() {
    let Some(mut host) = boot_with_devices(&[FIO]) else { return };
    host.start(&format!("--memory 512M --vcpus 2 {DEVICES}"), WORDS);
    assert_eq!(host.announcement(), Announcement::Loaded);
    type_on_console(&mut host, "begin");
    for (name, daemon) in [("blk", BLK), ("net", NET), ("console", CONSOLE), ("blk", BLK)] {
        host.wait_for(LOAD_BEGINS);
        host.run(&format!("kill -9 $(pidof vhost-{name})"));
        host.run_for(LOAD / 8);
        start(&mut host, daemon);
    }
    host.wait_for(LOAD_BEGINS);
    assert!(end_load(&mut host) >= 128);
    type_on_console(&mut host, "on");
    host.expect_pass();
    host.finish();
    host.end();
}

#[test]
fn one_command_is_a_whole_machine_that_an_operator_pauses_and_switches_off() {
    let Some(mut host) = boot_with_resources(&[]) else { return };
    host.start(&format!("--memory 128M --vcpus 2 --vcpu-affinity 1,0 {SPAWNED}"), "check=button");
    assert_eq!(host.announcement(), Announcement::Loaded);
    host.run(
        "grep -h Cpus_allowed_list /proc/$(pidof outboard-vmm)/task/*/status | sort | uniq -c",
    );
    obeys_its_shell(&mut host);
    host.signal("USR1");
    assert_eq!(host.statistics()["paused"], true);
    host.command(CONTROL, "resume");
    assert_eq!(host.statistics()["paused"], false);
    every_thread_is_confined(&mut host);
    host.run("kill -9 $(pidof vhost-blk)");
    types_in_shell(&mut host, "echo 3 > /proc/sys/vm/drop_caches");
    reads_its_disk(&mut host);
    assert!(host.console().contains("blk0: vhost-blk has ended: signal: 9"), "{}", host.console());
    host.command(CONTROL, "pause");
    host.command(CONTROL, "powerdown");
    host.run_for(LOAD / 2);
    assert!(!host.console().contains(MARK), "it answered while it was paused");
    host.signal("USR2");
    host.expect_pass();
    host.finish();
    host.run(&format!("! {{ {DAEMONS_RUN}; }} && ! test -e {CONTROL}"));
    takes_its_daemons_along(&mut host);
    refuses_clearly(&mut host);
    host.end();
}

/// A shell on the console, with a disk and a network.
fn obeys_its_shell(host: &mut Host) {
    types_in_shell(host, "echo $((6 * 7)) processors: $(grep -c ^processor /proc/cpuinfo)");
    host.run("grep -m 1 '^42 processors: 2' /run/tty");
    reads_its_disk(host);
    types_in_shell(host, "ip link set eth0 up && ip address add 10.0.0.2/24 dev eth0");
    types_in_shell(host, "ping -c 3 10.0.0.1");
    host.run("grep -m 1 '^3 packets transmitted, 3 packets received' /run/tty");
}

fn reads_its_disk(host: &mut Host) {
    types_in_shell(host, "dd if=/dev/vda bs=1M | wc -c");
    host.run("grep -m 1 '^16777216' /run/tty");
}

fn types_in_shell(host: &mut Host, line: &str) {
    host.run(&format!("echo '{line}' > /run/tty"));
}

/// A VMM that is killed, which waits for a daemon that never comes.
fn takes_its_daemons_along(host: &mut Host) {
    host.run(
        "outboard-vmm --kernel /kernel --blk file=/tmp/disk --console /run/none 2> /dev/null &",
    );
    host.run("until pidof vhost-blk; do :; done; kill -9 $(pidof outboard-vmm)");
    host.run(&format!("while {DAEMONS_RUN}; do :; done"));
}

fn refuses_clearly(host: &mut Host) {
    for (options, words) in [
        ("--kernel /nowhere", "cannot open /nowhere"),
        ("--kernel /initrd", "no bzImage and no ELF file"),
        // A program, and no kernel.
        ("--kernel /init", "Invalid entry address"),
        ("--kernel /kernel --memory 64M", "too little memory"),
        ("--kernel /kernel --memory 64M --initrd /kernel", "too little memory"),
        ("--kernel /kernel --hugepages", "256 huge pages"),
        ("--kernel /kernel --blk file=/nowhere", "blk0: .*/nowhere"),
        ("--kernel /kernel --blk file=/tmp/disk --net backend=none", "net0: vhost-net has ended"),
        ("--kernel /kernel --control /nowhere/control", "cannot listen there"),
    ] {
        host.run(&format!("! outboard-vmm {options} 2>/tmp/error && grep '{words}' /tmp/error"));
    }
    host.run(&format!("! {{ {DAEMONS_RUN}; }}"));
    host.run("rm /dev/kvm");
    host.run("! outboard-vmm --kernel /kernel 2>/tmp/error && grep 'no /dev/kvm' /tmp/error");
}
