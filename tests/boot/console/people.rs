//! People at a console: they log in, look on, come late, look away.

use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use tests::Rig;

use super::FrontEnd;
use super::server::{Client, Server, wait_for};
use crate::dialogue::Guest;

/// A console that somebody looks at and that is logged and recorded.
const PORT: &str = "console,endpoint=unix:@/con,endpoint=file:@/log,endpoint=cast:@/cast";
/// Has the kernel print on the console whatever it has to say.
const WORDS: [&str; 2] = ["console=hvc0", "loglevel=7"];
/// Linux loses what it has for a console until the driver is done with it. This is all of that.
const PRINT_BOOT: &str = "run dmesg >/dev/hvc0";
/// The first line of every boot.
const FIRST_LINE: &str = "Linux version ";

/// Somebody logs in and resizes; who comes late sees the boot; the log is what was seen.
pub(super) fn log_in(front_end: &impl FrontEnd) {
    let server = Server::start(&[PORT], &[]);
    let mut early = server.connect("con");
    server.wait_for(0, |port| port["endpoints"][0]["viewers"][0]["role"] == "writer");
    let mut guest = front_end.meet(server.socket(), &WORDS);
    guest.do_line(PRINT_BOOT);
    early.expect(FIRST_LINE);
    guest.do_line("login hvc0");
    early.expect("login: ");
    early.type_text("root\n");
    early.expect("# ");
    early.type_text("stty size\n");
    early.expect("\n24 80\r\n");
    server.resize("0", 132, 43);
    expect_size(&mut guest, "hvc0", 43, 132);
    early.type_text("stty size\n");
    early.expect("\n43 132\r\n");

    let mut late = server.connect("con");
    late.expect(FIRST_LINE);
    late.expect("login: ");
    late.expect("\n43 132\r\n");
    late.type_text("this is nobody's business\n");
    early.type_text("echo two and two is $((2 + 2))\n");
    late.expect("two and two is 4");

    front_end.finish(guest.part());
    let len_bytes = server.port(0)["bytes_out"].as_u64().expect("a number");
    early.expect_bytes(usize::try_from(len_bytes).expect("a test's"));
    server.wait_for_file("log", len_bytes);
    assert!(early.seen() == server.read("log"), "the log is another");
    server.wait_for(0, |port| port["endpoints"][2]["written_bytes"] == len_bytes);
    expect_recording(&server, early.seen());
    let business = b"nobody's business";
    assert!(!early.seen().windows(business.len()).any(|part| part == business));
    server.expect_clean_end();
}

/// A player would show what was seen, in a terminal that grows when this one did.
fn expect_recording(server: &Server, seen: &[u8]) {
    let cast = String::from_utf8(server.read("cast")).expect("JSON is UTF-8");
    let parse = |line| {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let mut lines = cast.lines().map(parse);
    let head = lines.next().expect("a recording has a head");
    assert_eq!(
        (&head["version"], &head["width"], &head["height"]),
        (&json!(2), &json!(80), &json!(24))
    );
    let events: Vec<_> = lines.collect();
    assert!(events.is_sorted_by_key(|event| event[0].as_f64()), "time goes back");
    let all = |kind: &str| {
        let of_it = events.iter().filter(|event| event[1] == kind);
        of_it.filter_map(|event| event[2].as_str()).collect::<Vec<_>>()
    };
    assert!(
        all("o").concat() == String::from_utf8_lossy(seen),
        "the recording shows something else"
    );
    assert_eq!(all("r"), ["132x43"]);
}

/// Somebody logs in at the daemon's end of a terminal, through a program that knows of terminals and of nothing else.
pub(super) fn log_in_at_a_terminal(front_end: &impl FrontEnd) {
    let Some(rig) = Rig::find() else { return };
    let server = Server::start(&["console,endpoint=pty:@/tty"], &[]);
    let (terminal, bridge) = (server.path("tty"), server.path("bridge"));
    let mut socat = rig.tool("socat");
    socat.arg(format!("UNIX-LISTEN:{}", bridge.display()));
    let mut socat =
        socat.arg(format!("{},raw,echo=0", terminal.display())).spawn().expect("socat runs");
    wait_for(|| bridge.exists().then_some(())).expect("socat listens");
    let mut person = server.connect("bridge");
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("login hvc0");
    person.expect("login: ");
    person.type_text("root\n");
    person.expect("# ");
    person.type_text("echo two and two is $((2 + 2))\n");
    person.expect("two and two is 4");
    socat.kill().expect("it runs");
    socat.wait().expect("it is ours");
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// A console that is resized by messages has the size that it is given, from the first look on, if the daemon knows in which
/// order the kernel reads its two numbers.
pub(super) fn see_the_size(front_end: &impl FrontEnd, order: &str) {
    let port = "name=con,console,endpoint=unix:@/con";
    let server = Server::start(&[port], &["--resize-order", order, "--size", "100x30"]);
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("await con");
    expect_size(&mut guest, "hvc0", 30, 100);
    server.resize("con", 132, 43);
    expect_size(&mut guest, "hvc0", 43, 132);
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// Waits until a console of the guest's has a size.
pub(super) fn expect_size(guest: &mut Guest, console: &str, rows: u64, columns: u64) {
    // A terminal that has not been told yet has none, which stty takes for an error; amid a change it was seen to say nothing.
    let size = format!("(stty size </dev/{console} || echo 0 0) | sed 's/ /0000/'");
    let line = format!("count {size} | grep . || echo 0");
    let wanted = format!("{rows}0000{columns}").parse();
    let wanted: u64 = wanted.expect("digits");
    let deadline = Instant::now() + super::server::LIMIT;
    loop {
        let found = guest.find(&line);
        if found == wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{found} instead of {wanted}");
    }
}

/// The last words of a guest are in the log, and whoever comes then sees them.
pub(super) fn read_a_panic(front_end: &impl FrontEnd) {
    let server = Server::start(&[PORT], &[]);
    let mut guest = front_end.meet(server.socket(), &WORDS);
    guest.do_line(PRINT_BOOT);
    guest.begin("run echo c >/proc/sysrq-trigger");
    let text = "Kernel panic - not syncing: sysrq triggered crash";
    let mut late = server.connect("con");
    late.expect(text);
    let is_logged = || String::from_utf8_lossy(&server.read("log")).contains(text).then_some(());
    wait_for(is_logged).expect("the panic is in the log");
    // However it ends, its console stays.
    guest.end();
    let mut later = server.connect("con");
    later.expect(FIRST_LINE);
    later.expect(text);
    server.expect_clean_end();
}

/// Viewers of whom one does not look.
const VIEWER_COUNT: usize = 20;
const BURST_BYTES: usize = 4 << 20;
const BURST_COUNT: usize = 5;

/// Twenty look on, and one of them looks away: the guest and the others do not notice, and he is told what he has missed.
pub(super) fn look_away(front_end: &impl FrontEnd) {
    let options = ["--replay", "4M"];
    let server = Server::start(&["console,endpoint=unix:@/con"], &options);
    let mut stalled = server.connect("con");
    let mut others: Vec<_> = (1..VIEWER_COUNT).map(|_| server.connect("con")).collect();
    let all_are_there = |viewers: &serde_json::Value| {
        viewers.as_array().is_some_and(|viewers| viewers.len() == VIEWER_COUNT)
    };
    server.wait_for(0, |port| all_are_there(&port["endpoints"][0]["viewers"]));
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("open hvc0");
    let mut times_us = Vec::new();
    for burst in 1..=BURST_COUNT {
        let line = format!("write hvc0 {BURST_BYTES} 4096");
        let all = BURST_BYTES * burst;
        // The next burst comes when all others have this one: none of them is so slow that he would lose anything.
        thread::scope(|scope| {
            for viewer in &mut others {
                scope.spawn(move || viewer.expect_bytes(all));
            }
            times_us.push(guest.find(&line));
        });
    }
    eprintln!("{BURST_BYTES} bytes to {VIEWER_COUNT} viewers took {times_us:?} us each");
    for viewer in &others {
        assert!(viewer.seen().iter().all(|byte| *byte == 0), "a viewer was told something");
    }
    front_end.finish(guest.part());
    expect_loss(&server, &mut stalled, BURST_BYTES * BURST_COUNT);
    server.expect_clean_end();
}

/// What has come to a viewer, what he was told is lost, and nothing else, is all of this.
fn expect_loss(server: &Server, viewer: &mut Client, all: usize) {
    viewer.expect("\r\n[");
    viewer.expect(" bytes lost]\r\n");
    let seen = String::from_utf8_lossy(viewer.seen()).into_owned();
    let (before, told) = seen.split_once("\r\n[").expect("it was found");
    let (lost, _) = told.split_once(" bytes lost]\r\n").expect("it was found");
    let lost_bytes: usize = lost.parse().expect("a number");
    let notice = format!("\r\n[{lost} bytes lost]\r\n");
    assert!(lost_bytes > 0 && before.len() < all, "{lost}");
    viewer.expect_bytes(all - lost_bytes + notice.len());
    let zeroes = viewer.seen().iter().filter(|byte| **byte == 0).count();
    assert_eq!(zeroes + lost_bytes, all);
    let counted = server.ask(&json!({ "command": "ports" }));
    assert_eq!(counted[0]["endpoints"][0]["viewers"][0]["lost_bytes"], lost_bytes, "{counted}");
}
