//! `--sandbox`: how the threads of each daemon are held while a front end is served, as the kernel tells it.
//!
//! What a thread that is held cannot do, the unit tests of `common/src/sandbox` show; that nothing is missed which a daemon
//! does do, every other test of a daemon does.

use std::fs;
use std::path::Path;

use tests::{Daemon, DaemonCommand, DiskImage};

use crate::subject::is_another_program;

/// One of each, with an option that has it do something on a thread of its own or by name.
fn commands(image: &Path, directory: &Path) -> Vec<DaemonCommand> {
    let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let log = format!("console,endpoint=file:{}", path("log"));
    let socket = format!("endpoint=unix:{}", path("viewers"));
    vec![
        DaemonCommand::block(image).argument("--threads").argument("2"),
        DaemonCommand::network("null").argument("--pcap").argument(path("frames.pcap")),
        DaemonCommand::network(&format!("socket={}", path("peer"))),
        DaemonCommand::console(&[&log, &socket]).argument("--control").argument(path("control")),
    ]
}

/// What the kernel says of each thread.
fn threads(daemon: &Daemon) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).expect("it runs");
    let status = |task: std::io::Result<fs::DirEntry>| {
        let path = task.expect("it can be listed").path().join("status");
        // One that has ended meanwhile says nothing.
        fs::read_to_string(path).unwrap_or_default()
    };
    tasks.map(status).filter(|status| !status.is_empty()).collect()
}

#[test]
fn every_thread_is_held() {
    if is_another_program() {
        return;
    }
    let directory = tests::temp_dir();
    let image = DiskImage::sparse(&directory.path().join("disk"), 1 << 20);
    for command in commands(image.path(), directory.path()) {
        let daemon = command.start();
        let threads = threads(&daemon);
        assert!(threads.len() > 1, "there are workers");
        for status in threads {
            for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000"] {
                assert!(status.contains(line), "{line} is not in {status}");
            }
        }
        assert!(daemon.terminate().success());
    }
}

#[test]
fn nothing_is_withheld_where_the_operator_says_so() {
    if is_another_program() {
        return;
    }
    let directory = tests::temp_dir();
    let image = DiskImage::sparse(&directory.path().join("disk"), 1 << 20);
    for (sandbox, line) in [("off", "Seccomp:\t0"), ("log", "Seccomp:\t2")] {
        let daemon =
            DaemonCommand::block(image.path()).argument("--sandbox").argument(sandbox).start();
        for status in threads(&daemon) {
            assert!(status.contains(line), "{sandbox}: {line} is not in {status}");
        }
        assert!(daemon.terminate().success());
    }
}
