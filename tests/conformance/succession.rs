//! Daemons that are followed by others under a service manager which keeps descriptors: the front end is told nothing, and its
//! driver loses nothing. What cannot be gone on with ends the connection, and nothing else.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use frontend::block::{BlockDriver, Request, VIRTIO_BLK_S_OK};
use frontend::front_end::FrontEnd;
use frontend::guest::Options;
use frontend::message::{
    VHOST_USER_GET_FEATURES, VHOST_USER_NEED_REPLY_MASK, VHOST_USER_VERSION, header,
};
use frontend::net::{NetDriver, VIRTIO_NET_OK};
use frontend::wire::PATIENCE;
use tests::{DaemonCommand, Service, TempDir, temp_dir};

use crate::cache::{WRITEBACK, switch};
use crate::network_commands::{OTHER_MAC, command, is_received, mac_table};
use crate::network_frames::options as network_options;
use crate::rounds;
use crate::subject::{QUEUE_COUNT, is_another_program, make_disk, must_carry, must_work, ours};
use crate::wire::Wire;

const IMAGE: &str = "outboard-image";
/// More than any session here has.
const ROOM: usize = 64;
/// Where the image says that a message is being dealt with.
const BUSY_AT: u64 = 12;
/// Where it has the version of its form.
const VERSION_AT: u64 = 8;
/// Where its first slot has its payload, and how far behind it the second has.
const PAYLOAD_AT: u64 = 64 + 16;
const SLOT_BYTES: u64 = (1 << 20) + 16;
const KILL_COUNT: u64 = 20;
/// The address of a network's guest, and another one that it may want.
const MAC: &str = "52:54:00:12:34:56";
const THIRD_MAC: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcd];

/// A daemon under a manager with room for so many descriptors, and its disk.
fn service(room: usize, options: &[&str]) -> (Service, TempDir) {
    let directory = temp_dir();
    make_disk(directory.path());
    (Service::start(ours(directory.path(), options), room), directory)
}

fn options() -> Options {
    Options { queue_count: QUEUE_COUNT, ..Options::default() }
}

fn driver(service: &Service) -> BlockDriver {
    BlockDriver::start(service.socket(), &options()).expect("a session begins")
}

/// What the daemon writes for its successor.
fn image_of(service: &Service) -> File {
    service.kept_file(|name, _| name == IMAGE)
}

fn names(service: &Service) -> Vec<String> {
    service.kept().iter().map(|(name, _)| name.clone()).collect()
}

/// The connection is closed, the daemon says why, and serves who comes next.
#[track_caller]
fn expect_refusal(service: &mut Service, driver: &BlockDriver, why: &str) {
    let wire = driver.guest.front_end.wire();
    wire.wait_for_hang_up(PATIENCE).expect("the connection is closed");
    assert!(service.log().contains(why), "nothing of {why:?} in\n{}", service.log());
    let mut next = self::driver(service);
    must_work(&mut next, 0);
    kill_between_messages(service);
    service.start_next();
    must_work(&mut next, 1);
}

#[test]
fn killed_daemon_s_requests_are_finished_by_the_next_one_on_the_same_connection() {
    if is_another_program() {
        return;
    }
    for region in [Region::Daemon, Region::FrontEnd] {
        kill_under_load(region);
    }
}

/// Whose record of requests in flight there is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Region {
    Daemon,
    FrontEnd,
}

/// Has the rings go on with a record that the front end keeps.
fn give_region(driver: &BlockDriver) {
    let guest = &driver.guest;
    for queue in 0..QUEUE_COUNT {
        guest.front_end.get_vring_base(queue.into()).expect("a ring can be stopped");
    }
    let size = options().queue_size;
    let inflight = guest.front_end.get_inflight_fd(QUEUE_COUNT, size).expect("a region is made");
    guest.front_end.set_inflight_fd(&inflight).expect("the region is taken");
    for queue in 0..QUEUE_COUNT {
        guest.start_queue(queue, 0).expect("a ring can be described");
        guest.enable(queue).expect("a ring can be enabled");
    }
}

fn kill_under_load(region: Region) {
    let (mut service, directory) = service(ROOM, &[]);
    let mut driver = driver(&service);
    if region == Region::FrontEnd {
        give_region(&driver);
    }
    let mut pauses = Vec::new();
    for round in 1..=KILL_COUNT {
        rounds::begin(&mut driver, round);
        kill_between_messages(&mut service);
        let killed = Instant::now();
        service.start_next();
        for queue in 0..QUEUE_COUNT {
            while driver.guest.queues[usize::from(queue)].outstanding_count() > 0 {
                let (_, outcome) = driver.complete(queue).expect("it ends");
                assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
            }
        }
        pauses.push(killed.elapsed());
        rounds::expect_contents(&directory.path().join("disk"), round);
    }
    report(region, &mut pauses, found_in_flight(&service));
    assert!(found_in_flight(&service) > 0, "no daemon had anything in flight");
    driver.guest.front_end.get_features().expect("the connection is the same");
}

/// Requests that daemons have found in flight, by their log.
fn found_in_flight(service: &Service) -> u64 {
    let log = service.log();
    let lines = log.lines().filter_map(|line| line.split_once("requests=")?.1.split(' ').next());
    lines.filter_map(|count| count.parse::<u64>().ok()).sum()
}

/// What a person is to judge.
fn report(region: Region, pauses: &mut [Duration], in_flight: u64) {
    pauses.sort_unstable();
    eprintln!(
        "{} daemons were killed over {in_flight} requests ({region:?}); until all of them had ended: {:.0?} (median), {:.0?} (longest)",
        pauses.len(),
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1],
    );
}

#[test]
fn daemon_that_is_told_to_end_leaves_its_front_end_to_the_next_one() {
    if is_another_program() {
        return;
    }
    let (mut service, _directory) = service(ROOM, &[]);
    let mut driver = driver(&service);
    must_work(&mut driver, 0);
    switch(&driver, 0);
    for round in 0..3 {
        assert!(service.terminate().success());
        // Nobody is there to hear the kick, but for the descriptor.
        driver.submit(0, &Request::write(round, &[round as u8; 512]));
        driver.kick(0).expect("the device can be kicked");
        service.start_next();
        assert_eq!(driver.complete(0).expect("it ends").1.status, VIRTIO_BLK_S_OK);
        must_work(&mut driver, 1);
    }
    let told = driver.guest.front_end.get_config(WRITEBACK, 1).expect("it can be read");
    assert_eq!(told, [0], "what the driver has switched stays so");
    assert!(service.socket().exists());
}

#[test]
fn front_end_that_comes_while_nobody_runs_is_served() {
    if is_another_program() {
        return;
    }
    let (mut service, _directory) = service(ROOM, &[]);
    drop(driver(&service));
    for end in [kill_between_messages as fn(&mut Service), |service| {
        assert!(service.terminate().success())
    }] {
        end(&mut service);
        let front_end = FrontEnd::connect(service.socket()).expect("somebody listens");
        service.start_next();
        front_end.get_features().expect("it is served");
    }
}

#[test]
fn nothing_is_kept_of_a_session_that_has_ended() {
    if is_another_program() {
        return;
    }
    let (service, _directory) = service(ROOM, &[]);
    let before = names(&service);
    assert_eq!(before.len(), 2, "the image and the listener: {before:?}");
    for _ in 0..3 {
        let driver = driver(&service);
        assert!(names(&service).len() > 8);
        drop(driver);
        let deadline = Instant::now() + PATIENCE;
        while names(&service) != before {
            assert!(Instant::now() < deadline, "{:?} is kept", names(&service));
            std::thread::yield_now();
        }
    }
}

#[test]
fn daemon_that_dies_in_the_middle_of_a_message_ends_the_connection() {
    if is_another_program() {
        return;
    }
    let (mut service, _directory) = service(ROOM, &[]);
    let driver = driver(&service);
    let flags = VHOST_USER_VERSION | VHOST_USER_NEED_REPLY_MASK;
    let message = header(VHOST_USER_GET_FEATURES, flags, 0);
    driver.guest.front_end.wire().send_bytes(&message[..5], &[]).expect("bytes go out");
    let image = image_of(&service);
    let deadline = Instant::now() + PATIENCE;
    while !is_busy(&image) {
        assert!(Instant::now() < deadline, "the daemon does not say that it has begun");
    }
    service.kill();
    service.start_next();
    expect_refusal(&mut service, &driver, "in the middle of a message");
}

/// Kills the daemon when it has dealt with all that it was sent. Who has read an answer may be a moment ahead of it.
fn kill_between_messages(service: &mut Service) {
    let image = image_of(service);
    let deadline = Instant::now() + PATIENCE;
    while is_busy(&image) {
        assert!(Instant::now() < deadline, "the daemon does not say that it is through");
        std::thread::yield_now();
    }
    service.kill();
}

fn is_busy(image: &File) -> bool {
    let mut busy = [0];
    image.read_exact_at(&mut busy, BUSY_AT).expect("the image is as long as it was made");
    busy != [0]
}

#[test]
fn image_that_cannot_be_believed_ends_the_connection_and_nothing_else() {
    if is_another_program() {
        return;
    }
    type Spoil = fn(&File);
    let spoilt: [(&str, Spoil); 4] = [
        ("version 2", |image| image.write_all_at(&[2], VERSION_AT).expect("it can be written")),
        ("begins with", |image| image.write_all_at(&[0; 8], 0).expect("it can be written")),
        ("neither of its slots", |image| {
            for slot in 0..2 {
                let at = PAYLOAD_AT + slot * SLOT_BYTES + 1;
                image.write_all_at(b"?", at).expect("it can be written");
            }
        }),
        // A whole slot of another daemon's hand, newer than ours.
        ("has not the form", |image| {
            let payload = b"{\"device\":\"block\"}";
            let (slot, generation) = (64, 1_u64 << 40);
            image.write_all_at(payload, slot + 16).expect("it can be written");
            let length = u32::try_from(payload.len()).expect("it is short");
            image.write_all_at(&length.to_le_bytes(), slot + 8).expect("it can be written");
            let sum = crc32(&[&generation.to_le_bytes()[..], payload].concat());
            image.write_all_at(&sum.to_le_bytes(), slot + 12).expect("it can be written");
            image.write_all_at(&generation.to_le_bytes(), slot).expect("it can be written");
        }),
    ];
    for (why, spoil) in spoilt {
        let (mut service, _directory) = service(ROOM, &[]);
        let driver = driver(&service);
        let image = image_of(&service);
        kill_between_messages(&mut service);
        spoil(&image);
        service.start_next();
        expect_refusal(&mut service, &driver, why);
    }
}

/// The checksum of zip files, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum: u32, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xedb8_8320 * (sum & 1)))
    })
}

#[test]
fn descriptors_that_are_missing_or_mixed_up_end_the_connection_and_nothing_else() {
    if is_another_program() {
        return;
    }
    let count = {
        let (service, _directory) = service(ROOM, &[]);
        let _driver = driver(&service);
        names(&service).len()
    };
    for at in 0..count {
        let (mut service, _directory) = service(ROOM, &[]);
        let driver = driver(&service);
        kill_between_messages(&mut service);
        let name = service.kept().remove(at).0;
        service.start_next();
        let why = if name == IMAGE { "without an image" } else { "is not in the store" };
        expect_refusal(&mut service, &driver, why);
    }
    // Each is called by the name of one behind it, but for the image.
    for by in 1..count - 1 {
        let (mut service, _directory) = service(ROOM, &[]);
        let driver = driver(&service);
        kill_between_messages(&mut service);
        let (mut names, mut fds): (Vec<_>, Vec<OwnedFd>) = service.kept().drain(..).unzip();
        let image = names.iter().position(|name| name == IMAGE).expect("there is one");
        let image = (names.remove(image), fds.remove(image));
        fds.rotate_left(by);
        service.kept().extend(names.into_iter().zip(fds).chain([image]));
        service.start_next();
        expect_refusal(&mut service, &driver, "WARN");
    }
}

#[test]
fn network_knows_what_its_driver_has_said_to_a_daemon_before() {
    if is_another_program() {
        return;
    }
    let directory = temp_dir();
    let path = directory.path().join("wire");
    let listener = UnixListener::bind(&path).expect("a socket fits in a fresh directory");
    let network = DaemonCommand::network(&format!("socket={}", path.display()));
    let mut service = Service::start(network.argument("--mac").argument(MAC), ROOM);
    let mut wire = Wire::accept(&listener);
    let mut driver =
        NetDriver::start(service.socket(), &network_options()).expect("a session begins");
    let promiscuous = |is_on: u8| [0, 0, is_on];
    assert_eq!(command(&mut driver, &promiscuous(0)), VIRTIO_NET_OK);
    let ends = [kill_between_messages, |service: &mut Service| {
        assert!(service.terminate().success());
    }];
    for (end, wanted) in ends.into_iter().cycle().zip([OTHER_MAC, THIRD_MAC, OTHER_MAC, THIRD_MAC])
    {
        assert_eq!(command(&mut driver, &mac_table(&[wanted], &[])), VIRTIO_NET_OK);
        end(&mut service);
        service.start_next();
        wire = Wire::accept(&listener);
        for mac in [OTHER_MAC, THIRD_MAC] {
            assert_eq!(is_received(&mut driver, &wire, mac, &[]), mac == wanted);
        }
        must_carry(&mut driver.guest, &wire, "the driver has said nothing to it");
    }
    // Another guest's driver has said nothing yet.
    drop(driver);
    let mut driver =
        NetDriver::start(service.socket(), &network_options()).expect("a session begins");
    assert!(is_received(&mut driver, &wire, OTHER_MAC, &[]));
}

#[test]
fn store_that_is_too_small_costs_the_session_and_no_daemon() {
    if is_another_program() {
        return;
    }
    let (mut service, _directory) = service(6, &[]);
    let mut driver = driver(&service);
    must_work(&mut driver, 0);
    kill_between_messages(&mut service);
    service.start_next();
    let wire = driver.guest.front_end.wire();
    wire.wait_for_hang_up(PATIENCE).expect("the connection is closed");
    assert!(service.log().contains("FileDescriptorStoreMax="), "{}", service.log());
    must_work(&mut self::driver(&service), 0);
}
