//! A console device, byte by byte and message by message (VIRTIO 1.3, 5.3).

use crate::control::{ask, stats};
use crate::subject::{Subject, is_another_program};
use frontend::Error;
use frontend::console::{
    CONFIG_BYTES, CONSOLE_PORT, CONTROL_RECEIVE, CONTROL_TRANSMIT, ConsoleDriver, DEVICE_ADD,
    DEVICE_READY, DEVICE_REMOVE, EMERG_WR, Message, NO_PORT, PORT_NAME, PORT_OPEN, PORT_READY,
    RESIZE, VIRTIO_CONSOLE_F_EMERG_WRITE, VIRTIO_CONSOLE_F_MULTIPORT, VIRTIO_CONSOLE_F_SIZE,
};
use frontend::guest::Options;
use frontend::message::VHOST_USER_BACKEND_CONFIG_CHANGE_MSG;
use frontend::wire::{PATIENCE, Wire};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const PLAIN: &str = "console,endpoint=unix:@/view,endpoint=file:@/log.txt";
const CONSOLE: &str = "name=con0,console,endpoint=unix:@/view";
const DATA: &str = "name=agent,endpoint=unix:@/agent";
/// Queues of a device with two places for ports.
const TWO_PORTS: u16 = 6;
/// Of port 1.
const DATA_RECEIVE: u16 = 4;
const DATA_TRANSMIT: u16 = 5;
/// Time in which nothing happens that would have happened long before.
const SILENCE: Duration = Duration::from_millis(100);

fn options(queue_count: u16) -> Options {
    Options { queue_count, ..Options::default() }
}

fn start(subject: &Subject, queue_count: u16) -> ConsoleDriver {
    subject.console_driver(&options(queue_count))
}

/// A driver that has been told of `ports`, and is ready for them.
fn converse(subject: &Subject, ports: u32) -> ConsoleDriver {
    let mut driver = start(subject, TWO_PORTS);
    say(&mut driver, NO_PORT, DEVICE_READY, 1);
    for id in 0..ports {
        assert_eq!(hear(&mut driver), Message::new(id, DEVICE_ADD, 1));
    }
    driver
}

#[track_caller]
fn hear(driver: &mut ConsoleDriver) -> Message {
    driver.hear().unwrap_or_else(|error| panic!("no message: {error}"))
}

#[track_caller]
fn say(driver: &mut ConsoleDriver, id: u32, event: u16, value: u16) {
    driver.say(&Message::new(id, event, value)).expect("a message is taken");
}

/// Nothing comes back on a queue.
#[track_caller]
fn is_silent(driver: &mut ConsoleDriver, queue: u16) {
    let used = driver.guest.queues[usize::from(queue)].wait_used(SILENCE);
    assert!(matches!(used, Err(Error::Silence(_))), "queue {queue}: {used:?}");
}

fn read_exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("the bytes come");
    bytes
}

fn connect(path: PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).expect("the daemon listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    stream
}

fn in_directory(subject: &Subject, name: &str) -> PathBuf {
    subject.socket().with_file_name(name)
}

#[track_caller]
fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// How often a message was given up for this reason.
fn drops(subject: &Subject, queue: u16, reason: &str) -> u64 {
    let count = &stats(subject)["queues"][usize::from(queue)]["drops"][reason];
    count.as_u64().unwrap_or_else(|| panic!("no drops for {reason}"))
}

#[test]
fn size_is_in_the_configuration_space_and_its_change_is_told() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &["--size", "100x30"]);
    let driver = start(&subject, 2);
    let features = VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_EMERG_WRITE;
    assert_eq!(driver.guest.features & 0xff_ffff, features, "a plain console has no ports");
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    driver.guest.front_end.set_backend_req_fd(theirs.as_fd()).expect("it is accepted");
    let channel = Wire::from_stream(ours);
    let config = || driver.guest.front_end.get_config(0, CONFIG_BYTES).expect("it is read");
    assert_eq!(config(), [100, 0, 30, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let reply = ask(&subject, r#"{"command":"size","port":"0","columns":300,"rows":7}"#);
    assert!(reply["ok"].is_object(), "{reply}");
    wait_for("the change is not told", || {
        let told = channel.receive(PATIENCE).expect("a change is told");
        assert_eq!(told.request, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG);
        config()[..4] == [44, 1, 7, 0]
    });
}

#[test]
fn output_in_any_pieces_is_shown_and_logged_in_order() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &[]);
    let wire = subject.wire().expect("somebody looks on");
    let mut driver = start(&subject, 2);
    let mut said = Vec::new();
    for (number, pieces) in
        [&[&b"one"[..]][..], &[b"t", b"w", b"o"], &[b"three, and a long one\r\n", b"."]]
            .iter()
            .enumerate()
    {
        assert_eq!(driver.write(1, pieces).expect("it is taken"), 0, "piece {number}");
        said.extend(pieces.concat());
    }
    let long = vec![b'x'; 300_000];
    driver.write(1, &[&long]).expect("a chain is longer than what a port holds");
    driver.write(1, &[b"the end"]).expect("it is taken");
    wire.must_receive(&said, "what was said first");
    let log = in_directory(&subject, "log.txt");
    let all = [&said[..], &long, b"the end"].concat();
    wait_for("the log lacks something", || std::fs::read(&log).is_ok_and(|log| log == all));
    subject.signal(Signal::TERM);
    drop(driver);
    assert_eq!(std::fs::read(&log).expect("the log is there"), all);
}

#[test]
fn log_that_was_renamed_is_opened_anew_on_sighup() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &[]);
    let mut driver = start(&subject, 2);
    let [log, old] = ["log.txt", "old.txt"].map(|name| in_directory(&subject, name));
    driver.write(1, &[b"before\n"]).expect("it is taken");
    wait_for("it is not logged", || std::fs::read(&log).is_ok_and(|log| log == b"before\n"));
    std::fs::rename(&log, &old).expect("the log is ours");
    subject.signal(Signal::HUP);
    wait_for("it is not opened anew", || log.exists());
    driver.write(1, &[b"after\n"]).expect("it is taken");
    wait_for("it is not logged", || std::fs::read(&log).is_ok_and(|log| log == b"after\n"));
    assert_eq!(std::fs::read(&old).expect("it is there"), b"before\n");
}

#[test]
fn input_waits_for_buffers_and_fills_them_in_order() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &[]);
    let wire = subject.wire().expect("somebody types");
    let mut driver = start(&subject, 2);
    let typed: Vec<u8> = (0..100_000_u32).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| {
        let (sender, typed) = (wire.another(), &typed);
        scope.spawn(move || sender.send(typed));
        let mut got = Vec::new();
        while got.len() < typed.len() {
            driver.offer(0, 1000).expect("a buffer is given");
            let bytes = driver.read(0).expect("it is filled");
            assert!(!bytes.is_empty() && bytes.len() <= 1000);
            got.extend(bytes);
        }
        assert!(got == *typed, "something else comes than was typed");
    });
    driver.offer(0, 10).expect("a buffer is given");
    is_silent(&mut driver, 0);
    wire.send(b"y");
    assert_eq!(driver.read(0).expect("it is filled"), b"y");
}

#[test]
fn emergency_register_writes_to_the_console_whether_its_queue_runs_or_not() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &[]);
    let wire = subject.wire().expect("somebody looks on");
    let mut front_end = subject.connect();
    front_end.set_owner().expect("it is taken");
    let features = front_end.get_protocol_features().expect("they are told");
    front_end.set_protocol_features(features).expect("they are taken");
    front_end.set_config(EMERG_WR, b"a\0\0\0").expect("the register is written");
    // As QEMU's generic device does: all of the space, whatever part the driver has written.
    front_end.set_config(0, b"\0\0\0\0\0\0\0\0b\0\0\0").expect("the space is written");
    wire.must_receive(b"ab", "before any queue runs");
    drop(front_end);
    let mut driver = start(&subject, 2);
    driver.guest.front_end.set_config(EMERG_WR, b"c").expect("the register is written");
    wire.must_receive(b"c", "while a queue runs");
    driver.write(1, &[b"d"]).expect("it is taken");
    wire.must_receive(b"d", "after it");
    assert!(driver.guest.front_end.set_config(0, b"\x50\0").is_err(), "the size is read-only");
}

#[test]
fn driver_is_told_of_ports_as_it_gets_ready_for_them() {
    if is_another_program() {
        return;
    }
    let order = ["--resize-order", "columns-first", "--size", "100x30"];
    let subject = Subject::console(&[CONSOLE, DATA], &order);
    let mut driver = start(&subject, TWO_PORTS);
    assert_ne!(driver.guest.features & VIRTIO_CONSOLE_F_MULTIPORT, 0);
    driver.offer(CONTROL_RECEIVE, 256).expect("a buffer is given");
    is_silent(&mut driver, CONTROL_RECEIVE);
    say(&mut driver, NO_PORT, DEVICE_READY, 1);
    let first = driver.read(CONTROL_RECEIVE).expect("the buffer is used now");
    assert_eq!(first, Message::new(0, DEVICE_ADD, 1).encode());
    assert_eq!(hear(&mut driver), Message::new(1, DEVICE_ADD, 1));
    say(&mut driver, 0, PORT_READY, 1);
    let mut told: Vec<_> = (0..4).map(|_| hear(&mut driver)).collect();
    told.sort_by_key(|message| message.event);
    let with = |event, rest: &[u8]| Message { rest: rest.to_vec(), ..Message::new(0, event, 1) };
    let expected = [
        Message::new(0, CONSOLE_PORT, 1),
        with(RESIZE, &[100, 0, 30, 0]),
        Message::new(0, PORT_OPEN, 1),
        with(PORT_NAME, b"con0"),
    ];
    assert_eq!(told, expected);
    say(&mut driver, 1, PORT_READY, 1);
    let name = Message { rest: b"agent".to_vec(), ..Message::new(1, PORT_NAME, 1) };
    assert_eq!(hear(&mut driver), name, "a data port without a client is not open");
    let reply = ask(&subject, r#"{"command":"size","port":"con0","columns":132,"rows":43}"#);
    assert!(reply["ok"].is_object(), "{reply}");
    assert_eq!(hear(&mut driver), with(RESIZE, &[132, 0, 43, 0]));
}

#[test]
fn data_port_is_open_while_it_has_a_client_and_loses_nothing() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE, DATA], &[]);
    let mut driver = converse(&subject, 2);
    say(&mut driver, 1, PORT_READY, 1);
    assert_eq!(hear(&mut driver).event, PORT_NAME);
    say(&mut driver, 1, PORT_OPEN, 1);
    driver.submit(DATA_TRANSMIT, &[b"for whoever comes"]).expect("it is kicked");
    is_silent(&mut driver, DATA_TRANSMIT);
    let mut client = connect(in_directory(&subject, "agent"));
    assert_eq!(hear(&mut driver), Message::new(1, PORT_OPEN, 1));
    assert_eq!(read_exactly(&mut client, 17), b"for whoever comes");
    driver.guest.queues[usize::from(DATA_TRANSMIT)].wait_used(PATIENCE).expect("it is used");
    // Another one is turned away.
    assert_eq!(connect(in_directory(&subject, "agent")).read(&mut [0]).expect("an end"), 0);
    client.write_all(b"last words").expect("they are taken");
    drop(client);
    // Closed is told when all has been read.
    driver.offer(CONTROL_RECEIVE, 256).expect("a buffer is given");
    is_silent(&mut driver, CONTROL_RECEIVE);
    driver.offer(DATA_RECEIVE, 100).expect("a buffer is given");
    assert_eq!(driver.read(DATA_RECEIVE).expect("it is filled"), b"last words");
    let closed = driver.read(CONTROL_RECEIVE).expect("the buffer is used now");
    assert_eq!(closed, Message::new(1, PORT_OPEN, 0).encode());
}

#[test]
fn input_is_kept_until_the_guest_has_opened_the_port() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE, DATA], &[]);
    let wire = subject.wire().expect("somebody types");
    let mut driver = converse(&subject, 2);
    say(&mut driver, 0, PORT_READY, 1);
    driver.offer(0, 100).expect("a buffer is given");
    wire.send(b"early");
    is_silent(&mut driver, 0);
    say(&mut driver, 0, PORT_OPEN, 1);
    assert_eq!(driver.read(0).expect("it is filled"), b"early");
    say(&mut driver, 0, PORT_OPEN, 0);
    driver.offer(0, 100).expect("a buffer is given");
    wire.send(b"late");
    is_silent(&mut driver, 0);
}

#[test]
fn ports_come_and_go_while_the_driver_runs() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE], &["--max-ports", "2"]);
    let mut driver = converse(&subject, 1);
    for round in 0..3 {
        let path = in_directory(&subject, "more");
        let port = format!("name=more{round},endpoint=unix:{}", path.display());
        let reply = ask(&subject, &format!(r#"{{"command":"port-add","port":"{port}"}}"#));
        assert_eq!(reply["ok"]["id"], 1, "{reply}");
        assert_eq!(hear(&mut driver), Message::new(1, DEVICE_ADD, 1));
        say(&mut driver, 1, PORT_READY, 1);
        assert_eq!(hear(&mut driver).rest, format!("more{round}").into_bytes());
        let _client = connect(path);
        assert_eq!(hear(&mut driver), Message::new(1, PORT_OPEN, 1));
        let full = ask(&subject, r#"{"command":"port-add","port":"endpoint=null"}"#);
        assert!(full["error"].is_string(), "{full}");
        let reply = ask(&subject, &format!(r#"{{"command":"port-remove","port":"more{round}"}}"#));
        assert_eq!(reply["ok"]["id"], 1, "{reply}");
        assert_eq!(hear(&mut driver), Message::new(1, DEVICE_REMOVE, 1));
    }
    let unknown = ask(&subject, r#"{"command":"port-remove","port":"more0"}"#);
    assert!(unknown["error"].as_str().is_some_and(|error| error.contains("more0")), "{unknown}");
}

#[test]
fn messages_that_say_nothing_are_counted_and_change_nothing() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE], &["--max-ports", "2"]);
    let mut driver = converse(&subject, 1);
    let short = Message::new(0, PORT_READY, 1).encode();
    for len_bytes in 1..8 {
        driver.write(CONTROL_TRANSMIT, &[&short[..len_bytes]]).expect("it is taken");
    }
    assert_eq!(drops(&subject, CONTROL_TRANSMIT, "short_message"), 7);
    for event in [DEVICE_ADD, DEVICE_REMOVE, CONSOLE_PORT, RESIZE, PORT_NAME, 8, u16::MAX] {
        say(&mut driver, 0, event, 1);
    }
    assert_eq!(drops(&subject, CONTROL_TRANSMIT, "unknown_message"), 7);
    for id in [1, 2, 0x1_0000, NO_PORT] {
        say(&mut driver, id, PORT_READY, 1);
        say(&mut driver, id, PORT_OPEN, 1);
    }
    assert_eq!(drops(&subject, CONTROL_TRANSMIT, "unknown_port"), 8);
    // In pieces, and with more behind it, it is a message.
    let ready = [Message::new(0, PORT_READY, 1).encode(), b"and more".to_vec()].concat();
    driver.write(CONTROL_TRANSMIT, &[&ready[..3], &ready[3..5], &ready[5..]]).expect("it is taken");
    assert_eq!(hear(&mut driver), Message::new(0, CONSOLE_PORT, 1));
}

#[test]
fn buffer_without_room_for_a_message_comes_back_empty_and_the_message_in_the_next() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE], &["--max-ports", "2"]);
    let mut driver = start(&subject, TWO_PORTS);
    for room_bytes in [1, 7] {
        driver.offer(CONTROL_RECEIVE, room_bytes).expect("a buffer is given");
    }
    say(&mut driver, NO_PORT, DEVICE_READY, 1);
    for _ in 0..2 {
        assert_eq!(driver.read(CONTROL_RECEIVE).expect("it comes back"), b"");
    }
    assert_eq!(drops(&subject, CONTROL_RECEIVE, "small_buffer"), 2);
    assert_eq!(hear(&mut driver), Message::new(0, DEVICE_ADD, 1));
}

#[test]
fn driver_that_wants_no_ports_has_a_plain_console() {
    // As behind a front end that strips the device's own features.
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[CONSOLE, DATA], &[]);
    let wire = subject.wire().expect("somebody looks on");
    let features = options(2).features & !0xff_ffff;
    let mut driver = subject.console_driver(&Options { features, ..options(2) });
    driver.write(1, &[b"hello"]).expect("it is taken");
    wire.must_receive(b"hello", "without ports");
    driver.offer(0, 10).expect("a buffer is given");
    wire.send(b"you");
    assert_eq!(driver.read(0).expect("it is filled"), b"you");
}

#[test]
fn next_guest_gets_nothing_that_was_typed_for_the_one_before() {
    if is_another_program() {
        return;
    }
    let subject = Subject::console(&[PLAIN], &[]);
    let wire = subject.wire().expect("somebody types");
    let mut driver = start(&subject, 2);
    wire.send(b"secret");
    wait_for("it does not arrive", || {
        ask(&subject, r#"{"command":"ports"}"#)["ok"][0]["bytes_in"] == 6
    });
    driver.write(1, &[b"1"]).expect("it is taken");
    drop(driver);
    let mut driver = start(&subject, 2);
    driver.offer(0, 10).expect("a buffer is given");
    is_silent(&mut driver, 0);
    wire.send(b"new");
    assert_eq!(driver.read(0).expect("it is filled"), b"new");
}
