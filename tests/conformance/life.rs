//! A daemon's life: one front end after another, never two at once, and a quick clean end.

use crate::launch::must_fail;
use crate::subject::{Subject, is_another_program, make_disk, must_work, promise};
use frontend::Error;
use frontend::block::Request;
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::wire::PATIENCE;
use rustix::process::Signal;
use std::net::Shutdown;
use tests::temp_dir;

/// The last message of a front end.
type Stage = fn(&mut FrontEnd) -> Result<(), Error>;

/// Front ends in a row: enough that whatever each one leaves behind is seen.
const FRONT_ENDS: usize = 20;

#[test]
fn front_ends_come_and_go_in_the_middle_of_their_requests() {
    let mut subject = Subject::start();
    let mut before = None;
    for round in 0..FRONT_ENDS {
        let mut driver = subject.driver(&Options::default());
        must_work(&mut driver, 0);
        // A back end keeps what it has learnt in its first rounds: only growth after those is a
        // leak.
        if round == 5 {
            before = Some((subject.count("fd"), subject.count("task")));
        }
        if round == FRONT_ENDS - 1 {
            let now = Some((subject.count("fd"), subject.count("task")));
            promise(now == before, || format!("descriptors and threads: {before:?}, then {now:?}"));
        }
        for at in 0..32 {
            driver.submit(0, &Request::write(at * 64, &[0x77; 32 << 10]));
        }
        driver.kick(0).expect("the device can be kicked");
    }
    subject.must_serve_the_next();
}

#[test]
fn front_ends_come_and_go_at_every_stage_of_the_handshake() {
    let mut subject = Subject::start();
    let stages: [Stage; 5] = [
        |_| Ok(()),
        |front_end| front_end.get_features().map(|_| ()),
        |front_end| front_end.set_owner(),
        |front_end| front_end.set_protocol_features(0),
        |front_end| front_end.set_vring_num(0, 64),
    ];
    for stage in stages {
        let mut front_end = subject.connect();
        stage(&mut front_end).expect("the message goes out");
        drop(front_end);
        subject.must_serve_the_next();
    }
}

#[test]
fn second_front_end_is_turned_away_while_one_is_served() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for _ in 0..5 {
        must_work(&mut driver, 0);
        match FrontEnd::connect(subject.socket()) {
            Ok(second) => {
                let refused = second.barrier();
                assert!(matches!(refused, Err(Error::HangUp)), "the second front end: {refused:?}");
            }
            Err(error) => {
                assert!(matches!(error, Error::System(_)), "the second front end: {error}")
            }
        }
    }
    must_work(&mut driver, 0);
}

#[test]
fn front_end_that_comes_at_once_after_another_hung_up_is_let_in() {
    // The daemon learns of both in the same moment, with the requests of the first in flight.
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    for round in 0..FRONT_ENDS {
        let mut driver = subject.driver(&Options::default());
        must_work(&mut driver, 0);
        let next = subject.while_stopped(|| {
            for at in 0..32 {
                driver.submit(0, &Request::write(at * 64, &[0x77; 32 << 10]));
            }
            driver.kick(0).expect("the device can be kicked");
            // Not by a close: a process that another test is just starting may hold the socket too.
            let stream = driver.guest.front_end.wire().stream();
            stream.shutdown(Shutdown::Both).expect("a connected socket can be shut down");
            FrontEnd::connect(subject.socket()).expect("the socket is still there")
        });
        next.barrier().unwrap_or_else(|error| panic!("in round {round}: {error}"));
    }
}

#[test]
fn sigterm_ends_the_process_cleanly() {
    if is_another_program() {
        return;
    }
    for served in [false, true] {
        let subject = Subject::start();
        let mut driver = served.then(|| subject.driver(&Options::default()));
        if let Some(driver) = &mut driver {
            must_work(driver, 0);
        }
        let (socket, control) = (subject.socket().to_owned(), subject.control());
        let (daemon, directory) = subject.into_daemon();
        let status = daemon.terminate();
        assert_eq!(status.code(), Some(0), "served: {served}, {status:?}");
        assert!(!socket.exists() && !control.exists(), "sockets were left behind");
        if let Some(driver) = driver {
            driver
                .guest
                .front_end
                .wire()
                .wait_for_hang_up(PATIENCE)
                .expect("the front end sees the end");
        }
        drop(directory);
    }
}

#[test]
fn sigterm_completes_what_was_begun() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for at in 0..32 {
        driver.submit(0, &Request::write(at * 8, &[0x55; 4096]));
    }
    driver.kick(0).expect("the device can be kicked");
    let first = driver.complete(0).expect("the first write ends").1;
    let (daemon, directory) = subject.into_daemon();
    assert_eq!(daemon.terminate().code(), Some(0));
    let image = std::fs::read(directory.path().join("disk")).expect("the image is there");
    let mut completed = vec![first];
    while let Some(used) = driver.guest.queues[0].poll_used().expect("only our heads are returned")
    {
        completed.push(frontend::block::Outcome {
            status: 0,
            data: Vec::new(),
            used_bytes: used.len_bytes,
        });
    }
    let stable = image.chunks(4096).filter(|block| block.iter().all(|byte| *byte == 0x55)).count();
    // What was returned is on the disk, and nothing is there that was not returned: the drain is
    // whole.
    assert_eq!(completed.len(), stable, "requests completed, and blocks on the disk");
}

#[test]
fn sigint_ends_the_process_like_sigterm() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let (daemon, _directory) = subject.into_daemon();
    daemon.signal(Signal::INT);
    // The harness sends SIGTERM after that, which the process may or may not live to see.
    assert_eq!(daemon.terminate().code(), Some(0));
}

#[test]
fn options_that_make_no_sense_are_named() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let disk = make_disk(directory.path());
    let disk = disk.to_str().expect("temporary paths are text");
    let socket = directory.path().join("socket");
    let socket = socket.to_str().expect("temporary paths are text");
    for (option, value) in [
        ("--queue-size", "100"),
        ("--queue-size", "0"),
        ("--queue-size", "65536"),
        ("--num-queues", "0"),
        ("--num-queues", "many"),
        ("--threads", "0"),
        ("--serial", "123456789012345678901"),
        ("--socket-mode", "rw"),
        ("--log-level", "loud"),
        ("--no-such-option", "1"),
    ] {
        must_fail(&["--blk-file", disk, "--socket-path", socket, option, value], 2, &[option]);
    }
    must_fail(&["--blk-file", disk, "--disk", "null:1M", "--socket-path", socket], 2, &["--disk"]);
    must_fail(&["--socket-path", socket], 2, &["--blk-file"]);
    must_fail(&["--disk", "null:banana", "--socket-path", socket], 2, &["banana"]);
    must_fail(&["--disk", "null:100", "--socket-path", socket], 2, &["100"]);
    let storage = ["--disk", "null:1M", "--cache", "none", "--socket-path", socket];
    must_fail(&storage, 2, &["--cache", "null:SIZE"]);
}
