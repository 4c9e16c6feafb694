//! Data ports: streams both ways, of which nothing is lost, and whose ends are seen.

use std::thread;
use std::time::{Duration, Instant};

use super::FrontEnd;
use super::people::expect_size;
use super::server::Server;
use crate::dialogue::Guest;

/// A console and two data ports, all with names.
const PORTS: [&str; 3] = [
    "name=con,console,endpoint=unix:@/con",
    "name=one,endpoint=unix:@/one",
    "name=two,endpoint=unix:@/two",
];
/// More than what waits anywhere on the way: in rings, in the daemon and in sockets.
const STALLED_BYTES: u64 = 8 << 20;
/// What a person may paste.
const PASTE_BYTES: u64 = 1 << 20;

fn meet(front_end: &impl FrontEnd, server: &Server) -> Guest {
    let mut guest = front_end.meet(server.socket(), &[]);
    for name in ["con", "one", "two"] {
        guest.do_line(&format!("await {name}"));
    }
    guest
}

fn report(what: &str, len_bytes: u64, time: Duration) {
    let rate = len_bytes as f64 / time.as_secs_f64() / 1e6;
    eprintln!("{what}: {len_bytes} bytes in {time:.2?}, {rate:.0} MB/s");
}

/// A stream each way, compared byte by byte; and a stream that nobody reads, beside which another one flows.
pub(super) fn carry_streams(front_end: &impl FrontEnd) {
    let server = Server::start(&PORTS, &[]);
    let mut guest = meet(front_end, &server);
    guest.do_line("open one");
    let mut one = server.connect("one");
    let len_bytes = front_end.stream_bytes();

    let started = Instant::now();
    guest.begin(&format!("send one 1 {len_bytes}"));
    one.expect_pattern(1, len_bytes);
    guest.expect_done();
    report("guest to host", len_bytes, started.elapsed());

    let started = Instant::now();
    guest.begin(&format!("receive one 2 {len_bytes}"));
    one.send_pattern(2, len_bytes);
    guest.expect_done();
    report("host to guest", len_bytes, started.elapsed());

    guest.do_line("open two");
    let mut two = server.connect("two");
    guest.do_line(&format!("begin send one 3 {STALLED_BYTES}"));
    guest.do_line(&format!("begin send two 4 {STALLED_BYTES}"));
    guest.do_line(&format!("begin receive two 5 {STALLED_BYTES}"));
    let mut two_too = two.another();
    thread::scope(|scope| {
        scope.spawn(move || two_too.send_pattern(5, STALLED_BYTES));
        two.expect_pattern(4, STALLED_BYTES);
    });
    let port = server.port(1);
    assert!(port["bytes_out"].as_u64() < Some(len_bytes + STALLED_BYTES), "{port}");
    one.expect_pattern(3, STALLED_BYTES);
    for _ in 0..3 {
        guest.do_line("finish");
    }
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// The guest sees a client come and go; what it writes waits for one, and what one has left is read before the end of file.
pub(super) fn are_open_while_there_is_a_client(front_end: &impl FrontEnd) {
    let server = Server::start(&PORTS, &[]);
    let mut guest = meet(front_end, &server);
    guest.do_line("open one");
    guest.do_line("begin send one 1 300000");
    // Nobody is there: the end of file comes at once, even beside a writer who waits.
    assert_eq!(guest.find("drain one"), 0);
    guest.do_line("open two");
    assert_eq!(guest.find("drain two"), 0);
    let port = server.port(1);
    assert_eq!((&port["bytes_out"], &port["host_open"]), (&0.into(), &false.into()), "{port}");

    let mut client = server.connect("one");
    client.expect_pattern(1, 300_000);
    guest.do_line("finish");
    // It is the only one.
    server.connect("one").expect_end();
    client.send_pattern(2, 5000);
    drop(client);
    server.wait_for(1, |port| port["host_open"] == false);
    assert_eq!(guest.find("drain one"), 5000);

    let mut client = server.connect("one");
    server.wait_for(1, |port| port["host_open"] == true);
    guest.begin("send one 3 300000");
    client.expect_pattern(3, 300_000);
    guest.expect_done();
    guest.begin("receive one 4 300000");
    client.send_pattern(4, 300_000);
    guest.expect_done();
    guest.do_line("close one");
    server.wait_for(1, |port| port["guest_open"] == false);
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// What is pasted arrives whole and in order, though the guest takes its time; and a console's size is its own.
pub(super) fn take_a_paste(front_end: &impl FrontEnd) {
    let server = Server::start(&PORTS, &[]);
    let mut guest = meet(front_end, &server);
    guest.do_line("open hvc0");
    server.resize("con", 132, 43);
    expect_size(&mut guest, "hvc0", 43, 132);
    guest.do_line("open one");
    for (id, endpoint, file) in [(0, "con", "hvc0"), (1, "one", "one")] {
        let mut client = server.connect(endpoint);
        let mut paster = client.another();
        thread::scope(|scope| {
            scope.spawn(move || paster.send_pattern(id, PASTE_BYTES));
            // The guest does not read yet, and the daemon does not take more than it has room for.
            server.wait_for(id, |port| port["bytes_in"].as_u64() > Some(0));
            guest.do_line(&format!("receive {file} {id} {PASTE_BYTES}"));
        });
        let port = server.port(id);
        assert_eq!(port["bytes_in"], PASTE_BYTES, "{port}");
        // Nothing came back.
        guest.do_line(&format!("send {file} 7 100"));
        client.expect_pattern(7, 100);
    }
    front_end.finish(guest.part());
    server.expect_clean_end();
}
