//! Which engine is chosen (`--aio`), and what is said of it. That both do the same is shown by running all suites on
//! either (`OUTBOARD_AIO`).

use std::process::Command;

use crate::control::{scrape, stats};
use crate::subject::{
    QUEUE_COUNT, Subject, WITHOUT_IO_URING, is_another_program, make_disk, must_work,
};
use frontend::guest::Options;
use tests::{program, temp_dir};

/// Errors in the place of an io_uring, and what the log makes of each.
const FORBIDDEN: [(&str, &str); 3] =
    [("EPERM", "seccomp"), ("EACCES", "seccomp"), ("ENOSYS", "the kernel has none")];

/// The engine that control socket and metrics name.
fn must_use(subject: &Subject, engine: &str) {
    assert_eq!(stats(subject)["engine"].as_str(), Some(engine));
    let labels = [("device", "block"), ("engine", engine)];
    assert_eq!(scrape(subject).sample("outboard_daemon_info", &labels), Some(1.0));
}

#[test]
fn engine_that_is_asked_for_is_used_and_named() {
    if is_another_program() {
        return;
    }
    for engine in ["io_uring", "threads"] {
        let subject = Subject::with_options(&["--aio", engine]);
        must_work(&mut subject.driver(&Options::default()), 0);
        must_use(&subject, engine);
        let log = subject.log();
        assert!(log.contains(&format!("read and written by {engine}")), "{log}");
    }
}

#[test]
fn threads_take_over_where_io_uring_is_forbidden_and_the_log_says_so_once() {
    if is_another_program() {
        return;
    }
    for (error, cause) in FORBIDDEN {
        let options = ["--aio", "auto", "--threads", "2"];
        let subject = Subject::without_io_uring(error, &options);
        let queues = Options { queue_count: QUEUE_COUNT, ..Options::default() };
        let mut driver = subject.driver(&queues);
        (0..QUEUE_COUNT).for_each(|queue| must_work(&mut driver, queue));
        must_use(&subject, "threads");
        let log = subject.log();
        let told: Vec<&str> = log.lines().filter(|line| line.contains("io_uring")).collect();
        let [line] = told[..] else { panic!("{error}: {log}") };
        assert!(line.contains(cause) && line.contains("by threads"), "{error}: {line}");
    }
}

#[test]
fn io_uring_that_is_insisted_on_and_forbidden_ends_the_daemon() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let image = make_disk(directory.path());
    for (error, cause) in FORBIDDEN {
        let mut daemon = Command::new(WITHOUT_IO_URING);
        daemon.arg(error).arg(program("vhost-blk")).arg("--blk-file").arg(&image);
        daemon.arg("--socket-path").arg(directory.path().join("socket"));
        let ended = crate::launch::to_its_end(daemon.args(["--aio", "io_uring"]));
        assert_eq!(ended.code, Some(1), "{error}: {}", ended.stderr);
        for word in ["--aio io_uring", cause] {
            assert!(ended.stderr.contains(word), "{error}: {}", ended.stderr);
        }
    }
}
