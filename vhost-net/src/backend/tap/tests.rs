//! Real interfaces, each test in a network namespace of its own, which goes with the test's thread.

mod macvtap;

use std::io::Read;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{FLAGS, Tap, attach, open_device, probe};
use crate::backend::descriptor;
use crate::backend::{Backend, BackendSpec, LinkEvent, Offloads, OpenError, Settings};

/// Far longer than the kernel takes for anything here.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test on a thread of its own, in a network namespace of its own, with a view of /sys that shows that one. Not
/// without root.
fn in_namespace(test: impl FnOnce() + Send) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: network namespaces need root");
        return;
    }
    // One at a time: a process that another test starts has copies of this one's taps until it executes its program, and
    // they are in use for that long.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            mount("none", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
            test();
        });
        thread.join().unwrap();
    });
}

/// `ip` with these arguments; what it prints.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "ip {arguments}: {err}");
    out.into_owned()
}

fn settings(pairs: u16) -> Settings {
    Settings { pairs, mtu: None, bridge: None, address: None }
}

fn open_with(spec: &str, settings: Settings) -> Result<Tap, OpenError> {
    match Backend::open(&spec.parse().unwrap(), settings)? {
        Backend::Tap(tap) => Ok(tap),
        other => panic!("{other:?}"),
    }
}

fn open(spec: &str, pairs: u16) -> Result<Tap, OpenError> {
    open_with(spec, settings(pairs))
}

fn refused(outcome: Result<Tap, OpenError>) -> String {
    outcome.unwrap_err().to_string()
}

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// An ARP request of 10.0.0.2 for 10.0.0.1, without a header.
fn arp_request(ours: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(ours);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(ours);
    frame.extend([10, 0, 0, 2]);
    frame.extend([0; 6]);
    frame.extend([10, 0, 0, 1]);
    frame
}

/// Whether it is an ARP reply, behind a header of `header_bytes`.
fn is_arp_reply(bytes: &[u8], header_bytes: usize) -> bool {
    bytes.get(header_bytes + 12..header_bytes + 14) == Some(&[8, 6])
        && bytes.get(header_bytes + 20..header_bytes + 22) == Some(&[0, 2])
}

fn exchange_arp(tap: &Tap, header_bytes: usize) {
    exchange_arp_as(tap, GUEST, header_bytes);
}

/// Asks for a host behind the interface until it answers: a link that has just come up may lose the first frames.
fn exchange_arp_as(tap: &Tap, guest: [u8; 6], header_bytes: usize) {
    let [receive, transmit] = tap.files().next().unwrap();
    let mut request = vec![0; header_bytes];
    request.extend(arp_request(guest));
    let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let start = Instant::now();
    let mut buffer = [0; 2048];
    while start.elapsed() < PATIENCE {
        assert_eq!(rustix::io::write(transmit, &request).unwrap(), request.len());
        while poll(&mut [PollFd::new(&receive, PollFlags::IN)], Some(&limit)).unwrap() > 0 {
            let len = rustix::io::read(receive, &mut buffer).unwrap();
            if is_arp_reply(&buffer[..len], header_bytes) {
                assert_eq!(buffer[header_bytes + 28..header_bytes + 32], [10, 0, 0, 1]);
                return;
            }
        }
    }
    panic!("nobody answers");
}

#[test]
fn tap_that_is_missing_is_made_brought_up_and_gone_afterwards() {
    in_namespace(|| {
        let tap = open_with("tap=vm0", Settings { mtu: Some(9000), ..settings(1) }).unwrap();
        let shown = ip("-d link show vm0");
        assert!(shown.contains("mtu 9000"), "{shown}");
        assert!(shown.contains("tun type tap"), "{shown}");
        assert!(shown.contains(",UP,LOWER_UP>"), "{shown}");
        assert_eq!(tap.mtu(), Some(9000));
        assert_eq!(tap.link().state(), LinkEvent { up: true, generation: 0 });
        drop(tap);
        assert!(!ip("link").contains("vm0"));
    });
}

#[test]
fn tap_that_is_there_is_opened_as_it_is() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap");
        ip("link set vm0 mtu 1400");
        let tap = open("tap=vm0", 1).unwrap();
        assert_eq!(tap.mtu(), Some(1400));
        assert!(!tap.link().is_up(), "nobody has set it up");
        drop(tap);
        assert!(ip("link show vm0").contains("mtu 1400"), "it stays");
    });
}

#[test]
fn frames_travel_both_ways_behind_a_header_of_either_length() {
    in_namespace(|| {
        let tap = open("tap=vm0", 1).unwrap();
        ip("addr add 10.0.0.1/24 dev vm0");
        for header_bytes in [12, 10] {
            tap.apply(Offloads::default(), header_bytes).unwrap();
            exchange_arp(&tap, header_bytes);
        }
        let [receive, _] = tap.files().next().unwrap();
        let drained = std::iter::repeat_with(|| rustix::io::read(receive, &mut [0; 2048]));
        let last = drained.take(100).find_map(Result::err);
        assert_eq!(last, Some(Errno::AGAIN), "it does not block");
    });
}

#[test]
fn many_queues_take_part_when_they_are_told_to() {
    in_namespace(|| {
        let tap = open("tap=vm0", 4).unwrap();
        assert_eq!(tap.files().count(), 4);
        let queues = || ip("-d link show vm0");
        assert!(queues().contains("multi_queue numqueues 1 numdisabled 3"), "{}", queues());
        for pair in 1..4 {
            tap.attach_queue(pair, true).unwrap();
            tap.attach_queue(pair, true).unwrap();
        }
        assert!(queues().contains("multi_queue numqueues 4 numdisabled 0"), "{}", queues());
        tap.attach_queue(2, false).unwrap();
        tap.attach_queue(0, false).unwrap();
        assert!(queues().contains("multi_queue numqueues 3 numdisabled 1"), "{}", queues());
        ip("addr add 10.0.0.1/24 dev vm0");
        tap.attach_queue(1, false).unwrap();
        tap.attach_queue(3, false).unwrap();
        exchange_arp(&tap, 12);
        assert_eq!(tap.attach_queue(4, true), Err(Errno::INVAL));
    });
}

#[test]
fn tap_made_with_many_queues_is_opened_with_one() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap multi_queue");
        open("tap=vm0", 1).unwrap();
        open("tap=vm0", 3).unwrap();
        ip("tuntap add vm1 mode tap");
        assert_eq!(
            refused(open("tap=vm1", 2)),
            "tap=vm1: the tap was made with one queue, and --queue-pairs asks for 2: `ip tuntap add vm1 mode tap multi_queue` makes one with many"
        );
    });
}

#[test]
fn tap_in_use_is_refused_whether_it_has_one_queue_or_many() {
    in_namespace(|| {
        for pairs in [1, 2] {
            let _first = open("tap=vm0", pairs).unwrap();
            let message = refused(open("tap=vm0", pairs));
            assert_eq!(message, "tap=vm0: the tap is in use by another process");
        }
    });
}

#[test]
fn interface_of_another_kind_is_refused_by_its_name() {
    in_namespace(|| {
        ip("link add br0 type bridge");
        ip("tuntap add tun0 mode tun");
        let other =
            |name, kind| format!("tap={name}: the interface is not a tap but of the kind {kind}");
        assert_eq!(refused(open("tap=br0", 1)), other("br0", "bridge"));
        assert_eq!(refused(open("tap=tun0", 1)), other("tun0", "tun"));
        assert_eq!(refused(open("tap=lo", 1)), other("lo", "hardware"));
    });
}

#[test]
fn lack_of_rights_is_told_with_what_helps() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap user 12345");
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        assert_eq!(
            refused(open("tap=vm1", 1)),
            "tap=vm1: there is no such interface, and making one needs CAP_NET_ADMIN; `ip tuntap add vm1 mode tap user USER` makes one that USER may open"
        );
        assert_eq!(
            refused(open("tap=vm0", 1)),
            "tap=vm0: the interface belongs to somebody else, and opening it needs CAP_NET_ADMIN; `ip tuntap add vm0 mode tap user USER` makes one that USER may open"
        );
    });
}

#[test]
fn missing_device_is_told_with_what_helps() {
    in_namespace(|| {
        let empty = tempfile::tempdir().unwrap();
        rustix::mount::mount_bind(empty.path(), "/dev/net").unwrap();
        let message = refused(open("tap=vm0", 1));
        assert!(message.starts_with("tap=vm0: there is no /dev/net/tun: the module"), "{message}");
    });
}

#[test]
fn tap_becomes_a_port_of_the_bridge() {
    in_namespace(|| {
        let bridged =
            |bridge: &str| Settings { bridge: Some(bridge.parse().unwrap()), ..settings(1) };
        assert_eq!(
            refused(open_with("tap=vm0", bridged("br0"))),
            "--bridge br0: there is no such interface"
        );
        assert_eq!(
            refused(open_with("tap=vm0", bridged("lo"))),
            "--bridge lo: the interface is not a bridge but of the kind hardware"
        );
        ip("link add br0 type bridge");
        ip("link set br0 up");
        ip("addr add 10.0.0.1/24 dev br0");
        let tap = open_with("tap=vm0", bridged("br0")).unwrap();
        assert!(ip("link show vm0").contains("br0"));
        exchange_arp(&tap, 12);
    });
}

#[test]
fn offloads_are_those_that_the_kernel_takes() {
    in_namespace(|| {
        let tap = open("tap=vm0", 1).unwrap();
        let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
        // USO came with Linux 6.2; the others are older than all that is supported.
        assert_eq!(Offloads { uso: true, ..tap.offloads() }, all);
        // The kernel leaves to the guest the checksums that this says it computes.
        ip("addr add 10.0.0.1/24 dev vm0");
        ip("neigh add 10.0.0.2 lladdr 52:54:00:12:34:56 dev vm0");
        let host = UdpSocket::bind("10.0.0.1:0").unwrap();
        let is_unsummed = || {
            host.send_to(b"a datagram", "10.0.0.2:9").unwrap();
            let [receive, _] = tap.files().next().unwrap();
            let mut buffer = [0; 2048];
            loop {
                let len = rustix::io::read(receive, &mut buffer).unwrap();
                if buffer[..len].ends_with(b"a datagram") {
                    // VIRTIO 1.3, 5.1.6: VIRTIO_NET_HDR_F_NEEDS_CSUM is bit 0 of the first byte.
                    return buffer[0] & 1 == 1;
                }
            }
        };
        assert!(!is_unsummed(), "nothing has been applied");
        tap.apply(all, 12).unwrap();
        assert!(is_unsummed());
        tap.apply(Offloads::default(), 12).unwrap();
        assert!(!is_unsummed());
    });
}

#[test]
fn file_that_knows_no_offloads_has_none() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(probe(null.as_fd()), Offloads::default());
}

#[test]
fn offloads_that_need_others_are_not_asked_for_without() {
    let none = Offloads::default();
    assert_eq!(Offloads { tso4: true, uso: true, ..none }.flags(), 0);
    assert_eq!(Offloads { csum: true, ecn: true, ..none }.flags(), 1);
    assert_eq!(Offloads { csum: true, ecn: true, tso6: true, ..none }.flags(), 1 | 4 | 8);
}

/// A queue of a tap, opened by somebody else.
fn foreign_queue(name: &str, flags: i32) -> OwnedFd {
    let file = open_device(name).unwrap();
    attach(file.as_fd(), name, flags, 1, false).unwrap();
    file
}

fn open_passed(files: Vec<OwnedFd>, pairs: u16) -> Result<Tap, OpenError> {
    let fds: Vec<i32> = files.into_iter().map(IntoRawFd::into_raw_fd).collect();
    match Backend::open(&BackendSpec::TapFds(fds), settings(pairs))? {
        Backend::Tap(tap) => Ok(tap),
        other => panic!("{other:?}"),
    }
}

#[test]
fn queues_that_are_passed_are_taken_over() {
    in_namespace(|| {
        let multi_queue = FLAGS | nix::libc::IFF_MULTI_QUEUE;
        let files = vec![foreign_queue("vm0", multi_queue), foreign_queue("vm0", multi_queue)];
        let first = files[0].as_raw_fd();
        ip("link set vm0 up");
        ip("addr add 10.0.0.1/24 dev vm0");
        let tap = open_passed(files, 2).unwrap();
        assert!(tap.link().is_up());
        exchange_arp(&tap, 12);
        let again = Backend::open(&BackendSpec::TapFds(vec![first]), settings(1)).unwrap_err();
        assert!(again.to_string().starts_with(&format!("--tap-fd {first}: it is not")), "{again}");
    });
}

#[test]
fn passed_files_that_are_no_fitting_queues_are_refused() {
    in_namespace(|| {
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let number = null.as_raw_fd();
        assert_eq!(
            refused(open_passed(vec![null], 1)),
            format!("--tap-fd {number}: it is not a queue of a tap or macvtap interface")
        );
        let plain = foreign_queue("vm0", FLAGS & !nix::libc::IFF_VNET_HDR);
        let number = plain.as_raw_fd();
        assert_eq!(
            refused(open_passed(vec![plain], 1)),
            format!(
                "--tap-fd {number}: vm0 was opened without IFF_VNET_HDR, which this program needs and cannot add"
            )
        );
        let two = vec![foreign_queue("vm1", FLAGS), foreign_queue("vm2", FLAGS)];
        let number = two[1].as_raw_fd();
        assert_eq!(
            refused(open_passed(two, 2)),
            format!("--tap-fd {number}: it is a queue of vm2, and the first one is of vm1")
        );
        assert_eq!(
            refused(open_passed(vec![foreign_queue("vm3", FLAGS)], 2)),
            "--tap-fd passes 1 queues, and --queue-pairs asks for 2"
        );
    });
}

/// Runs `script` while the tap is watched; it gets the events.
fn watched(tap: &Tap, script: impl AsyncFnOnce(Events)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (send, receive) = mpsc::unbounded_channel();
    runtime.block_on(async {
        tokio::select! {
            never = tap.watch(|event| send.send(event).unwrap()) => match never {},
            () = script(Events(receive)) => {}
        }
    });
}

struct Events(mpsc::UnboundedReceiver<LinkEvent>);

impl Events {
    /// The next event is this one.
    async fn next_is(&mut self, up: bool, generation: u32) {
        assert_eq!(self.next().await, LinkEvent { up, generation });
    }

    async fn next(&mut self) -> LinkEvent {
        timeout(PATIENCE, self.0.recv()).await.expect("an event").unwrap()
    }

    /// What has just been done is no event.
    async fn nothing_comes(&mut self) {
        let event = timeout(Duration::from_millis(100), self.0.recv()).await;
        assert!(event.is_err(), "{event:?}");
    }
}

#[test]
fn link_follows_the_administrator() {
    in_namespace(|| {
        let tap = open("tap=vm0", 1).unwrap();
        watched(&tap, async |mut events| {
            ip("link set vm0 down");
            events.next_is(false, 0).await;
            ip("link add unrelated type bridge");
            ip("link set vm0 up");
            events.next_is(true, 0).await;
        });
    });
}

#[test]
fn tap_that_was_removed_and_comes_back_is_open_under_the_same_numbers() {
    in_namespace(|| {
        for (pairs, made) in [(1, ""), (1, "multi_queue"), (3, "multi_queue")] {
            ip(&format!("tuntap add vm0 mode tap {made}"));
            ip("link set vm0 up");
            let tap = open("tap=vm0", pairs).unwrap();
            let numbers = |tap: &Tap| -> Vec<i32> {
                tap.files().flatten().map(|file| file.as_raw_fd()).collect()
            };
            let before = numbers(&tap);
            tap.apply(Offloads { csum: true, ..Offloads::default() }, 10).unwrap();
            if pairs > 1 {
                tap.attach_queue(1, true).unwrap();
            }
            watched(&tap, async |mut events| {
                for generation in 0..3 {
                    ip("link del vm0");
                    events.next_is(false, generation).await;
                    let [receive, _] = tap.files().next().unwrap();
                    assert_eq!(rustix::io::read(receive, &mut [0; 64]), Err(Errno::BADFD));
                    ip(&format!("tuntap add vm0 mode tap {made}"));
                    events.next_is(false, generation + 1).await;
                    ip("link set vm0 up");
                    events.next_is(true, generation + 1).await;
                }
            });
            assert_eq!(numbers(&tap), before);
            if pairs > 1 {
                let shown = ip("-d link show vm0");
                assert!(shown.contains("numqueues 2 numdisabled 1"), "{shown}");
                tap.attach_queue(1, false).unwrap();
            }
            ip("addr add 10.0.0.1/24 dev vm0");
            exchange_arp(&tap, 10);
            drop(tap);
            ip("link del vm0");
        }
    });
}

#[test]
fn what_the_kernel_refuses_is_not_in_force_when_the_tap_comes_back() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap");
        ip("link set vm0 up");
        let tap = open("tap=vm0", 1).unwrap();
        tap.apply(Offloads { csum: true, ..Offloads::default() }, 10).unwrap();
        // The kernel knows no header of less than 10 bytes.
        assert_eq!(tap.apply(Offloads::default(), 5), Err(Errno::INVAL));
        watched(&tap, async |mut events| {
            ip("link del vm0");
            events.next_is(false, 0).await;
            ip("tuntap add vm0 mode tap");
            ip("link set vm0 up");
            events.next_is(true, 1).await;
        });
        ip("addr add 10.0.0.1/24 dev vm0");
        exchange_arp(&tap, 10);
    });
}

#[test]
fn what_is_asked_of_a_tap_that_is_gone_is_in_force_when_it_comes_back() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap multi_queue");
        ip("link set vm0 up");
        let tap = open("tap=vm0", 2).unwrap();
        watched(&tap, async |mut events| {
            ip("link del vm0");
            tap.apply(Offloads::default(), 10).unwrap();
            events.next_is(false, 0).await;
            tap.attach_queue(1, true).unwrap();
            ip("tuntap add vm0 mode tap multi_queue");
            ip("link set vm0 up");
            events.next_is(true, 1).await;
        });
        let shown = ip("-d link show vm0");
        assert!(shown.contains("numqueues 2 numdisabled 0"), "{shown}");
        tap.attach_queue(1, false).unwrap();
        ip("addr add 10.0.0.1/24 dev vm0");
        exchange_arp(&tap, 10);
    });
}

#[test]
fn queue_that_could_not_be_attached_is_tried_again() {
    in_namespace(|| {
        let tap = open("tap=vm0", 2).unwrap();
        let [second, _] = tap.files().nth(1).unwrap();
        // The kernel refuses to attach what is attached, and the tap knows nothing of that.
        descriptor::attach_queue(second, true).unwrap();
        assert_eq!(tap.attach_queue(1, true), Err(Errno::INVAL));
        descriptor::attach_queue(second, false).unwrap();
        tap.attach_queue(1, true).unwrap();
        let shown = ip("-d link show vm0");
        assert!(shown.contains("numqueues 2 numdisabled 0"), "{shown}");
    });
}

#[test]
fn reopening_goes_on_where_it_failed() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap multi_queue");
        let tap = open("tap=vm0", 3).unwrap();
        let mut files = tap.files().map(|[receive, _]| receive);
        let (first, second) = (files.next().unwrap(), files.next().unwrap());
        watched(&tap, async |mut events| {
            ip("link set vm0 up");
            events.next_is(true, 0).await;
            ip("link del vm0");
            events.next_is(false, 0).await;
            ip("tuntap add vm0 mode tap multi_queue");
            ip("link set vm0 up");
            // As far as it has got.
            let multi_queue = FLAGS | nix::libc::IFF_MULTI_QUEUE;
            for file in [first, second] {
                attach(file, "vm0", multi_queue, 3, true).unwrap();
            }
            descriptor::attach_queue(second, false).unwrap();
            events.next_is(true, 1).await;
        });
        let shown = ip("-d link show vm0");
        assert!(shown.contains("numqueues 1 numdisabled 2"), "{shown}");
    });
}

#[test]
fn tap_that_comes_back_in_use_or_as_another_kind_is_tried_again() {
    in_namespace(|| {
        ip("tuntap add vm0 mode tap");
        ip("link set vm0 up");
        let tap = open("tap=vm0", 1).unwrap();
        watched(&tap, async |mut events| {
            ip("link del vm0");
            events.next_is(false, 0).await;
            ip("link add vm0 type bridge");
            ip("link set vm0 up");
            events.nothing_comes().await;
            ip("link del vm0");
            ip("tuntap add vm0 mode tap multi_queue");
            ip("link set vm0 up");
            let other = foreign_queue("vm0", FLAGS | nix::libc::IFF_MULTI_QUEUE);
            events.nothing_comes().await;
            drop(other);
            events.next_is(true, 1).await;
        });
    });
}

#[test]
fn tap_that_comes_back_before_its_bridge_waits_for_it() {
    in_namespace(|| {
        ip("link add br0 type bridge");
        ip("tuntap add vm0 mode tap");
        ip("link set vm0 up");
        let bridged = Settings { bridge: Some("br0".parse().unwrap()), ..settings(1) };
        let tap = open_with("tap=vm0", bridged).unwrap();
        watched(&tap, async |mut events| {
            ip("link del br0");
            ip("link del vm0");
            events.next_is(false, 0).await;
            ip("tuntap add vm0 mode tap");
            ip("link set vm0 up");
            events.nothing_comes().await;
            ip("link add br0 type bridge");
            events.next_is(true, 1).await;
            assert!(ip("link show vm0").contains("br0"));
        });
    });
}

#[test]
fn interface_that_moves_to_another_namespace_stays_up() {
    in_namespace(|| {
        let tap = open("tap=vm0", 1).unwrap();
        // Which lives until its input ends.
        let mut other = Command::new("unshare");
        other.args(["-n", "sh", "-c", "echo; exec cat"]);
        let mut other = other.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        other.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        watched(&tap, async |mut events| {
            ip("link set vm0 down");
            events.next_is(false, 0).await;
            ip(&format!("link set vm0 netns {}", other.id()));
            events.next_is(true, 0).await;
        });
        drop(other.stdin.take());
        other.wait().unwrap();
    });
}

#[test]
fn frames_that_nobody_takes_are_dropped_and_counted_by_the_host() {
    in_namespace(|| {
        let tap = open("tap=t0", 1).unwrap();
        assert_eq!(tap.host_drops(), Some(0));
        ip("addr add 10.0.0.1/24 dev t0");
        ip("neigh add 10.0.0.2 lladdr 52:54:00:12:34:56 dev t0");
        ip("link set t0 txqueuelen 100");
        // One socket may have as much under way as its send buffer holds: several fill the queue.
        for _ in 0..20 {
            let socket = UdpSocket::bind("10.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            for _ in 0..100 {
                let _ = socket.send_to(&[0; 32], "10.0.0.2:9");
            }
        }
        assert!(tap.host_drops().unwrap() > 0, "{}", ip("-s link show t0"));
    });
}
