//! Ports that are plugged in and taken out while the guest runs.

use serde_json::json;

use super::FrontEnd;
use super::people::expect_size;
use super::server::Server;
use crate::dialogue::Guest;

/// Places for ports.
pub(super) const PORTS_MAX: u16 = 3;

fn add(server: &Server, port: &str, id: u64) {
    let directory = server.path("");
    let port = port.replace('@', directory.to_str().expect("our own name").trim_end_matches('/'));
    let added = server.ask(&json!({ "command": "port-add", "port": port }));
    assert_eq!(added["id"], id, "{added}");
}

fn remove(server: &Server, port: &str) {
    server.ask(&json!({ "command": "port-remove", "port": port }));
}

/// A stream each way over a data port.
fn expect_traffic(guest: &mut Guest, server: &Server, name: &str) {
    guest.do_line(&format!("await {name}"));
    guest.do_line(&format!("open {name}"));
    let mut client = server.connect(name);
    guest.begin(&format!("send {name} 1 100000"));
    client.expect_pattern(1, 100_000);
    guest.expect_done();
    guest.begin(&format!("receive {name} 2 100000"));
    client.send_pattern(2, 100_000);
    guest.expect_done();
}

/// The guest sees ports come, uses them, and sees them go; a place is used again.
pub(super) fn ports_come_and_go(front_end: &impl FrontEnd) {
    let places = PORTS_MAX.to_string();
    let first = "name=first,console,endpoint=unix:@/first";
    let server = Server::start(&[first], &["--max-ports", &places]);
    let mut guest = front_end.meet(server.socket(), &[]);
    guest.do_line("await first");

    add(&server, "name=late,endpoint=unix:@/late", 1);
    expect_traffic(&mut guest, &server, "late");
    guest.do_line("close late");
    remove(&server, "late");
    guest.do_line("await-gone late");
    assert!(!server.path("late").exists());

    // The same place, another name; and it goes while the guest has it open.
    add(&server, "name=later,endpoint=unix:@/later", 1);
    expect_traffic(&mut guest, &server, "later");
    remove(&server, "later");
    guest.do_line("await-gone later");
    guest.do_line("close later");

    // One goes and another comes before the guest has had time to look.
    add(&server, "name=short,endpoint=unix:@/short", 1);
    remove(&server, "short");
    add(&server, "name=long,endpoint=unix:@/long", 1);
    expect_traffic(&mut guest, &server, "long");
    guest.do_line("await-gone short");

    // A console comes, too, and has its own size.
    add(&server, "name=second,console,endpoint=unix:@/second", 2);
    guest.do_line("await second");
    guest.do_line("open hvc1");
    server.resize("second", 100, 50);
    expect_size(&mut guest, "hvc1", 50, 100);
    let mut viewer = server.connect("second");
    guest.do_line("send hvc1 3 10000");
    viewer.expect_pattern(3, 10_000);
    guest.do_line("close hvc1");
    remove(&server, "second");
    guest.do_line("await-gone second");
    front_end.finish(guest.part());
    server.expect_clean_end();
}
