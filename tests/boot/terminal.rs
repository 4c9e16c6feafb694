//! What `make run` gives whoever sits at a terminal: the guest's console, and nothing left behind afterwards.
//!
//! The terminal is that of `script`, which is essential in Debian: a session of its own, whose end hangs up whatever is in it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::{Machine, Rig, cannot_run, program, temp_dir};

/// A guest that boots and is told to power off takes seconds; this is for a machine that does much else meanwhile.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn console_at_a_terminal_takes_commands_until_poweroff() {
    if Rig::find().is_none() {
        return;
    }
    if let Err(error) = Command::new("script").arg("--version").output() {
        return cannot_run(&format!("cannot run script: {error}"));
    }
    let directory = temp_dir();
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/run");
    let mut command = Command::new("script");
    command
        .args([
            "--quiet",
            "--return",
            "--command",
            r#"exec "$RUN" "$DISK" "$NET" "$CONSOLE""#,
            "/dev/null",
        ])
        .env("RUN", run)
        .env("DISK", program("vhost-blk"))
        .env("NET", program("vhost-net"))
        .env("CONSOLE", program("vhost-console"))
        .env("SHELL", "/bin/sh")
        .env("TMPDIR", directory.path());
    let mut machine = Machine::start(command, LIMIT);

    machine.wait_for("is a virtio disk served by vhost-blk");
    let network = machine.wait_for("network");
    let page = network.contains("eth0").then(|| machine.wait_for("Try: "));
    // The prompt ends no line by itself: it and the echo of what is typed at it make one.
    machine.type_line("cat /proc/mounts");
    machine.wait_for("outboard:~# cat /proc/mounts");
    let root = machine.wait_for(" / ext4 ");
    assert!(root.starts_with("/dev/vda "), "{root}");
    match page.as_deref().and_then(|line| line.split_whitespace().last()) {
        Some(page) => {
            machine.type_line(&format!("wget -q -O - {page}"));
            machine.wait_for("Hello from the host");
        }
        None => cannot_run("there can be no network here"),
    }
    machine.type_line("poweroff");
    machine.wait_for("file system is clean");
    let status = machine.wait();
    assert!(status.success(), "make run ended with {status}");

    let left: Vec<_> = fs::read_dir(directory.path()).expect("it is ours").collect();
    assert!(left.is_empty(), "files are left: {left:?}");
    let left = processes_of(directory.path());
    assert!(left.is_empty(), "processes are left: {left:?}");
}

/// The command lines that name the directory: all that `run` starts has its files there.
fn processes_of(directory: &Path) -> Vec<String> {
    let name = directory.to_str().expect("our own name");
    let processes = fs::read_dir("/proc").expect("/proc is there");
    processes
        .filter_map(|entry| fs::read(entry.expect("a listed entry").path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(name))
        .collect()
}
