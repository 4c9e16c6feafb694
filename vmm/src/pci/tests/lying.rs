//! Daemons that lie, message by message: each costs its connection, the next one is talked to, and the guest sees nothing.

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_setfl, fstat};
use tests::temp_dir;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, Guest, LIMIT, VERSION_1, device, quick, wait_readable};
use super::scripted::{
    Connection, Event, GET_CONFIG, GET_INFLIGHT_FD, LIES, Lie, SET_FEATURES, SET_INFLIGHT_FD,
    SET_VRING_BASE, SET_VRING_ENABLE, SET_VRING_KICK, Script, Scripted, Truth,
};
use crate::front_end::{Kind, Limits};

const ENDS: Script = Script {
    truth: Truth {
        features: 1 << 32 | 1 << 30 | 1 << 29,
        protocol: 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13,
        queue_count: 2,
        config: Vec::new(),
        inflight_bytes: 8192,
    },
    lie: None,
    rings: 2,
    ends_when_served: true,
};

fn impatient() -> Limits {
    Limits { reply: Duration::from_millis(100), ..quick() }
}

/// A guest whose disk has two queues, which are served.
fn driven(guest: &Guest) -> Driver<'_> {
    let driver = Driver::probe(guest, 1);
    driver.negotiate(VERSION_1);
    for index in 0..2 {
        driver.queue(index, 16);
    }
    driver.go();
    driver
}

/// The messages of a whole connection, from the first to the last ring's enabling.
fn honest_messages(socket: &Path) -> Connection {
    let daemon = Scripted::new(socket, vec![ENDS]);
    let guest = Guest::new(vec![device(Kind::Block, socket)], quick());
    driven(&guest);
    daemon.wait_ended()
}

#[test]
fn each_lie_about_each_message_costs_the_connection_only() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let honest = honest_messages(&socket);
    let count = honest.messages.len();
    assert!(count > 20, "the whole set-up is seen: {:?}", honest.requests());
    let lies = (0..count).flat_map(|at| LIES.map(|lie| (at, lie)));
    let mut scripts = vec![ENDS];
    scripts.extend(lies.map(|lie| Script { lie: Some(lie), ..ENDS }));
    scripts.push(Script::default());
    let lied = scripts.len() - 2;
    let daemon = Scripted::new(&socket, scripts);
    // The device is known and has a driver when the lies begin.
    let guest = Guest::new(vec![device(Kind::Block, &socket)], impatient());
    let driver = driven(&guest);
    let mut ended = 0;
    // A few are no lies: silence where no answer is wanted, more features than are used. Those daemons serve, and end.
    while ended < lied + 1 {
        if let Event::Ended(_) = daemon.next() {
            ended += 1;
        }
    }
    daemon.wait_served();
    assert_eq!(driver.status(), 15, "the driver has seen nothing");
    driver.reset();
}

#[test]
fn absurd_offers_are_not_taken_and_a_sound_one_is() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let truth = Truth::default();
    let absurd = [
        Truth { features: 0, ..truth.clone() },
        Truth { features: 1 << 32, ..truth.clone() },
        Truth { features: 1 << 30, ..truth.clone() },
        Truth { protocol: 0, ..truth.clone() },
        Truth { protocol: truth.protocol & !(1 << 9), ..truth.clone() },
        Truth { queue_count: 0, ..truth.clone() },
        Truth { queue_count: 257, ..truth.clone() },
        Truth { queue_count: u64::MAX, ..truth.clone() },
    ];
    let mut scripts: Vec<_> =
        absurd.map(|truth| Script { truth, ..Script::default() }).into_iter().collect();
    scripts.push(Script::default());
    let count = scripts.len() - 1;
    let daemon = Scripted::new(&socket, scripts);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], quick());
    for _ in 0..count {
        let requests = daemon.wait_ended().requests();
        assert!(!requests.contains(&SET_FEATURES) && requests.len() < 8, "{requests:?}");
    }
    let driver = driven(&guest);
    daemon.wait_served();
    assert_eq!(driver.device_config::<4>(4), [4, 5, 6, 7]);
}

#[test]
fn record_of_requests_in_flight_outlives_its_daemon_and_rings_go_on_where_they_were() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let scripts = vec![ENDS, ENDS, Script::default(), Script::default()];
    let daemon = Scripted::new(&socket, scripts);
    let guest = Guest::without_daemons(vec![device(Kind::Block, &socket)], quick());
    assert!(guest.devices.wait(LIMIT).expect("nothing is wrong"));
    let driver = Driver::probe(&guest, 1);
    driver.negotiate(VERSION_1);
    let queues = [0, 1].map(|index| driver.queue(index, 16));
    let used_index = GuestAddress(queues[1].used_ring() + 2);
    driver.go();
    let first = daemon.wait_ended();
    // What a daemon has used before its end.
    guest.memory.write_obj(5u16, used_index).expect("memory");
    let record = inode(&first);
    assert!(first.first(GET_INFLIGHT_FD).is_some());
    let mut second = daemon.wait_ended();
    while bases(&second) != [0, 5] {
        second = daemon.wait_ended();
    }
    assert!(second.first(GET_INFLIGHT_FD).is_none(), "the record is there already");
    assert_eq!(inode(&second), record, "and it is the same");
    // One kick when the rings were started, and at each takeover a kick and a call.
    let kick = &second.first(SET_VRING_KICK).expect("each ring has one").fds[0];
    let mut count = [0; 8];
    rustix::io::read(kick, &mut count).expect("somebody has written to it");
    assert!(u64::from_ne_bytes(count) >= 2, "{count:?}");
    assert!(wait_readable(&driver.call(1), LIMIT), "the driver looks at its used ring");
    daemon.wait_served();
    driver.reset();
    driven(&guest);
    daemon.wait_served();
    drop(guest);
    let last = daemon.wait_ended();
    assert_eq!(bases(&last)[2..], [0, 0], "another driver's rings begin anew");
    let requests = last.requests();
    let asked = requests.iter().filter(|request| **request == GET_INFLIGHT_FD).count();
    assert_eq!(asked, 1, "with a record of their own: {requests:?}");
}

fn inode(connection: &Connection) -> u64 {
    let message = connection.first(SET_INFLIGHT_FD).expect("the record is given");
    fstat(&message.fds[0]).expect("a file").st_ino
}

fn bases(connection: &Connection) -> Vec<u8> {
    let messages = connection.messages.iter();
    messages
        .filter(|message| message.request == SET_VRING_BASE)
        .map(|message| message.payload[4])
        .collect()
}

#[test]
fn absurd_records_of_requests_in_flight_are_not_kept() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let absurd = |inflight_bytes| {
        let truth = Truth { inflight_bytes, ..Truth::default() };
        Script { truth, ..Script::default() }
    };
    let requests = honest_messages(&socket).requests();
    let at = requests.iter().position(|request| *request == GET_INFLIGHT_FD).expect("asked for");
    let mut scripts = vec![absurd(0), absurd(u64::MAX), absurd(1 << 40)];
    scripts.extend(LIES.map(|lie| Script { lie: Some((at, lie)), ..Script::default() }));
    scripts.push(Script::default());
    let count = scripts.len() - 1;
    let daemon = Scripted::new(&socket, scripts);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], impatient());
    driven(&guest);
    for _ in 0..count {
        let requests = daemon.wait_ended().requests();
        assert!(!requests.contains(&SET_INFLIGHT_FD), "{requests:?}");
    }
    daemon.wait_served();
}

#[test]
fn daemon_that_lacks_what_the_driver_uses_is_not_told_of_the_rings() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let truth = Truth::default();
    let less = [
        Truth { queue_count: 1, ..truth.clone() },
        Truth { features: truth.features & !(1 << 29), ..truth.clone() },
    ];
    let mut scripts = vec![ENDS];
    scripts.extend(less.map(|truth| Script { truth, ..Script::default() }));
    scripts.push(Script::default());
    let daemon = Scripted::new(&socket, scripts);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], quick());
    let driver = Driver::probe(&guest, 1);
    driver.negotiate(VERSION_1 | 1 << 29);
    for index in 0..2 {
        driver.queue(index, 16);
    }
    driver.go();
    assert!(daemon.wait_ended().requests().contains(&SET_VRING_ENABLE));
    for _ in 0..2 {
        let requests = daemon.wait_ended().requests();
        assert!(requests.contains(&GET_CONFIG) && !requests.contains(&SET_FEATURES));
    }
    daemon.wait_served();
}

#[test]
fn silence_while_the_driver_resets_ends_by_the_watchdog() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    // The message after the set-up is the first of the stop.
    let count = honest_messages(&socket).messages.len();
    for lie in [Lie::Silence, Lie::HangUp, Lie::Stump] {
        let script = Script { lie: Some((count, lie)), ..Script::default() };
        let daemon = Scripted::new(&socket, vec![script, Script::default()]);
        let guest = Guest::new(vec![device(Kind::Block, &socket)], impatient());
        let driver = driven(&guest);
        daemon.wait_served();
        driver.reset();
        driven(&guest);
        daemon.wait_served();
    }
}

/// A request of the daemon's, by its channel: a header, and as many bytes as it says or as there are.
fn ask(request: u32, flags: u32, len: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, len].map(u32::to_le_bytes).concat();
    [&header, payload].concat()
}

const CONFIG_CHANGE: u32 = 2;

#[test]
fn requests_of_a_daemon_are_answered_refused_or_end_the_connection() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let daemon = Scripted::new(&socket, vec![Script::default()]);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], impatient());
    let driver = driven(&guest);
    let (mut channel, _) = daemon.wait_served();
    let call = driver.call(0);
    // VERSION, and VERSION with NEED_REPLY.
    for (flags, answer) in [(1, None), (9, Some(0))] {
        channel.write_all(&ask(CONFIG_CHANGE, flags, 0, &[])).expect("sent");
        assert!(wait_readable(&call, LIMIT), "the driver is told");
        call.iter().for_each(|call| drop(call.read()));
        if let Some(answer) = answer {
            let mut reply = [0; 20];
            channel.read_exact(&mut reply).expect("an answer");
            assert_eq!(reply[12..], u64::to_le_bytes(answer));
        }
    }
    let endings = [
        ask(0, 1, 0, &[]),
        ask(CONFIG_CHANGE, 1, 8, &[0; 8]),
        ask(CONFIG_CHANGE, 0, 0, &[]),
        ask(CONFIG_CHANGE, 1, u32::MAX, &[]),
        ask(CONFIG_CHANGE, 1, 64, &[0; 4]),
        ask(u32::MAX, 9, 0, &[]),
        // Half a header, after which there is silence.
        vec![2, 0, 0],
        vec![0x5a; 4096],
    ];
    for ending in endings {
        channel.write_all(&ending).expect("sent");
        daemon.wait_ended();
        channel = daemon.wait_served().0;
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn configuration_that_has_changed_256_times_is_another_generation() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let daemon = Scripted::new(&socket, vec![Script::default()]);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], quick());
    let driver = driven(&guest);
    let (mut channel, _) = daemon.wait_served();
    let (call, before) = (driver.call(0), driver.generation());
    for _ in 0..256 {
        channel.write_all(&ask(CONFIG_CHANGE, 1, 0, &[])).expect("sent");
        assert!(wait_readable(&call, LIMIT), "the driver is told");
        call.iter().for_each(|call| drop(call.read()));
    }
    let _config: [u8; 8] = driver.device_config(0);
    assert_ne!(driver.generation(), before);
}

#[test]
fn daemon_that_makes_shared_eventfds_full_and_waiting_holds_nobody_else_up() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let daemon = Scripted::new(&socket, vec![ENDS, Script::default()]);
    let guest = Guest::new(vec![device(Kind::Block, &socket)], impatient());
    let driver = driven(&guest);
    let (_, kick) = daemon.wait_served();
    // As full as it can be, whatever it had, and one that waits.
    let _empty = rustix::io::read(&kick, &mut [0; 8]);
    rustix::io::write(&kick, &(u64::MAX - 1).to_ne_bytes()).expect("room");
    fcntl_setfl(&kick, OFlags::empty()).expect("it has the descriptor");
    // A notification that KVM does not take, and all else that a processor does.
    guest.write(driver.bar + 0x3000, &[0; 2]);
    assert_eq!(driver.status(), 15);
    let _pending: [u8; 8] = guest.read(driver.bar + 0x4000);
    let begin = Instant::now();
    drop(guest);
    assert!(begin.elapsed() < LIMIT / 2, "the machine ends");
}
