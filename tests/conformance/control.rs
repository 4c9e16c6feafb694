//! The control socket: what the daemon counts, as JSON and as OpenMetrics.

use crate::network_frames;
use crate::openmetrics::Exposition;
use crate::subject::{
    DISK_SECTORS, QUEUE_COUNT, Subject, is_another_program, must_carry, must_work,
};
use frontend::block::{Request, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::wire::PATIENCE;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

fn connect(subject: &Subject) -> UnixStream {
    let stream = UnixStream::connect(subject.control()).expect("the control socket is there");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    stream
}

/// One command and its one line of reply.
fn command(reader: &mut BufReader<UnixStream>, line: &str) -> Value {
    reader.get_mut().write_all(line.as_bytes()).expect("a command goes out");
    let mut reply = String::new();
    reader.read_line(&mut reply).expect("a reply comes");
    serde_json::from_str(&reply)
        .unwrap_or_else(|error| panic!("{line:?} was answered by {reply:?}: {error}"))
}

/// One command to our daemon, and its reply.
pub(crate) fn ask(subject: &Subject, line: &str) -> Value {
    command(&mut BufReader::new(connect(subject)), &format!("{line}\n"))
}

/// All counters of our daemon.
pub(crate) fn stats(subject: &Subject) -> Value {
    let mut reply = ask(subject, "{\"command\":\"stats\"}");
    let stats = reply["ok"].take();
    assert!(stats.is_object(), "stats were answered by {reply}");
    stats
}

/// All metrics of our daemon.
pub(crate) fn scrape(subject: &Subject) -> Exposition {
    let mut stream = connect(subject);
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .expect("a request goes out");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("the reply ends");
    let (head, body) = reply.split_once("\r\n\r\n").expect("a head and a body");
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    assert!(status.starts_with("HTTP/1.") && status.contains(" 200 "), "{status}");
    let content_type = lines
        .find(|line| line.to_ascii_lowercase().starts_with("content-type:"))
        .unwrap_or_default();
    assert!(content_type.contains("application/openmetrics-text"), "{content_type}");
    Exposition::parse(body).unwrap_or_else(|complaint| panic!("{complaint} in\n{body}"))
}

/// The counts of one kind of request on one queue: requests, bytes and errors.
pub(crate) fn counts(stats: &Value, queue: usize, kind: &str) -> [u64; 3] {
    let kind = &stats["queues"][queue]["kinds"][kind];
    ["requests", "bytes", "errors"]
        .map(|what| kind[what].as_u64().unwrap_or_else(|| panic!("no {what} in {stats}")))
}

#[test]
fn requests_bytes_and_errors_are_counted_by_queue_and_kind() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
    let names: Vec<String> = match &stats(&subject)["queues"][0]["kinds"] {
        Value::Object(kinds) => kinds.keys().cloned().collect(),
        other => panic!("kinds are {other}"),
    };
    assert!(
        ["read", "write", "flush"].iter().all(|kind| names.iter().any(|name| name == kind)),
        "kinds are {names:?}"
    );
    for _ in 0..3 {
        assert_eq!(
            driver.perform(0, &Request::read(0, 4096)).expect("a read ends").status,
            VIRTIO_BLK_S_OK
        );
    }
    driver.perform(1, &Request::write(0, &[1; 8192])).expect("a write ends");
    driver.perform(1, &Request::flush()).expect("a flush ends");
    assert_eq!(
        driver.perform(1, &Request::read(DISK_SECTORS, 512)).expect("a read ends").status,
        VIRTIO_BLK_S_IOERR
    );
    // A ring is counted to its end once it has been stopped.
    for queue in 0..QUEUE_COUNT {
        driver.guest.front_end.get_vring_base(u32::from(queue)).expect("the ring can be stopped");
    }
    let stats = stats(&subject);
    assert_eq!(counts(&stats, 0, "read"), [3, 3 * 4096, 0]);
    assert_eq!(counts(&stats, 0, "write"), [0, 0, 0]);
    assert_eq!(counts(&stats, 1, "write"), [1, 8192, 0]);
    assert_eq!(counts(&stats, 1, "flush"), [1, 0, 0]);
    assert_eq!(counts(&stats, 1, "read"), [1, 0, 1]);
    assert_eq!(stats["daemon"]["sessions"].as_u64(), Some(1));
}

#[test]
fn metrics_are_openmetrics_and_say_the_same() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for _ in 0..5 {
        driver.perform(0, &Request::read(0, 4096)).expect("a read ends");
    }
    driver.guest.front_end.get_vring_base(0).expect("the ring can be stopped");
    let metrics = scrape(&subject);
    let read = [("queue", "0"), ("kind", "read")];
    assert_eq!(metrics.sample("outboard_requests_total", &read), Some(5.0));
    assert_eq!(metrics.sample("outboard_bytes_total", &read), Some(5.0 * 4096.0));
    assert_eq!(metrics.sample("outboard_errors_total", &read), Some(0.0));
    assert_eq!(metrics.sample("outboard_request_duration_seconds_count", &read), Some(5.0));
    assert!(
        metrics.sample("outboard_kicks_total", &[("queue", "0")]).is_some_and(|kicks| kicks >= 1.0)
    );
    let stats = stats(&subject);
    assert_eq!(stats["queues"][0]["kinds"]["read"]["latency_ns"]["count"].as_u64(), Some(5));
}

#[test]
fn frames_and_drops_of_a_network_are_openmetrics() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&network_frames::options());
    for _ in 0..3 {
        must_carry(&mut driver.guest, &wire, "a frame each way");
    }
    network_frames::must_drop((&subject, &mut driver, &wire), &[&[0; 12 + 13]], "runt", "a runt");
    for queue in [0, 1] {
        driver.guest.front_end.get_vring_base(queue).expect("the ring can be stopped");
    }
    let (metrics, stats) = (scrape(&subject), stats(&subject));
    // With each drop one more is carried; frames are of 800 bytes and one for each number of a queue.
    for (queue, kind, requests, bytes, errors) in
        [(0, "receive", 4, 4 * 800, 0), (1, "transmit", 5, 4 * 801, 1)]
    {
        assert_eq!(counts(&stats, queue, kind), [requests, bytes, errors], "{stats}");
        let labels = [("queue", &*queue.to_string()), ("kind", kind)];
        let sample = |what: &str| metrics.sample(&format!("outboard_{what}_total"), &labels);
        let found = ["requests", "bytes", "errors"].map(sample);
        assert_eq!(found, [requests, bytes, errors].map(|count| Some(count as f64)), "{kind}");
    }
    let runts = [("queue", "1"), ("reason", "runt")];
    assert_eq!(metrics.sample("outboard_drops_total", &runts), Some(1.0));
    assert_eq!(metrics.sample("outboard_host_drops_total", &[]), None, "a stream does not tell");
}

#[test]
fn faults_of_front_ends_and_drivers_are_counted() {
    if is_another_program() {
        return;
    }
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    driver.guest.queues[0].ring().set_available_index(1000);
    driver.kick(0).expect("the device can be kicked");
    assert_eq!(
        driver.guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read"),
        1,
        "the ring is not broken"
    );
    if let Ok(second) = FrontEnd::connect(subject.socket()) {
        second.barrier().expect_err("one front end at a time");
    }
    driver.guest.front_end.set_vring_num(0, 3).expect_err("3 is no queue size");
    drop(driver);
    must_work(&mut subject.driver(&Options::default()), 0);
    let stats = stats(&subject);
    assert_eq!(stats["queues"][0]["broken"].as_u64(), Some(1), "{stats}");
    assert_eq!(
        stats["daemon"]["refused_front_ends"].as_u64().map(|count| count >= 1),
        Some(true),
        "{stats}"
    );
    assert_eq!(stats["daemon"]["protocol_errors"].as_u64(), Some(1), "{stats}");
}

#[test]
fn nonsense_is_answered_and_does_no_harm() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let mut reader = BufReader::new(connect(&subject));
    for line in ["{\"command\":\"explode\"}\n", "{}\n", "[]\n", "{\"command\":7}\n"] {
        let reply = command(&mut reader, line);
        assert!(reply.get("error").is_some(), "{line:?} was answered by {reply}");
    }
    for known in ["stats", "resize"] {
        let line = format!("{{\"command\":\"{known}\",\"nonsense\":1}}\n");
        let error = command(&mut reader, &line)["error"].to_string();
        assert!(error.contains("unknown field `nonsense`"), "{line:?} was answered by {error}");
    }
    assert!(
        command(&mut reader, "{\"command\":\"stats\"}\n").get("ok").is_some(),
        "a good command after bad ones"
    );
    for bytes in [
        &b"\n\n\n"[..],
        b"\xff\xfe\n",
        b"{\"command\":",
        b"GET /nowhere HTTP/1.1\r\n\r\n",
        b"GET \r\n",
        b"POST /metrics HTTP/1.1\r\n\r\n",
    ] {
        let mut stream = connect(&subject);
        stream.write_all(bytes).expect("the bytes go out");
        stream.shutdown(std::net::Shutdown::Write).expect("a socket can be shut down");
        // Whatever the answer is, it ends.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let endless = connect(&subject);
    endless
        .set_write_timeout(Some(std::time::Duration::from_millis(200)))
        .expect("a socket takes a timeout");
    // A line without end is given up at some length; sending on fails then.
    let _ = (&endless).write_all(&vec![b'x'; 16 << 20]);
    scrape(&subject);
    subject.must_serve_the_next();
}

#[test]
fn idle_clients_keep_nobody_out() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::start();
    let idle: Vec<UnixStream> = (0..8).map(|_| connect(&subject)).collect();
    scrape(&subject);
    stats(&subject);
    drop(idle);
    subject.must_serve_the_next();
}
