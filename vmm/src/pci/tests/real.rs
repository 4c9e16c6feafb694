//! Our own daemons behind the bus: their processes, ended at the worst moment.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::{Daemon, DaemonCommand, DiskImage, TempDir, temp_dir};
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Buffer, Driver, Guest, LIMIT, Queue, VERSION_1, device, quick, wait_readable};
use crate::front_end::Kind;
use crate::virtio::common::VIRTIO_MSI_NO_VECTOR;

/// An interrupt that comes at all comes within this.
const QUIET: Duration = Duration::from_millis(50);
const SECTORS: u64 = 2048;
const SECTOR_BYTES: u32 = 512;
const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

struct Disk {
    image: DiskImage,
    directory: TempDir,
}

impl Disk {
    fn new() -> Self {
        let directory = temp_dir();
        let image = DiskImage::sparse(&directory.path().join("image"), SECTORS * 512);
        Self { image, directory }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("socket")
    }

    fn serve(&self, arguments: &[&str]) -> Daemon {
        let command = DaemonCommand::block(self.image.path()).socket(&self.socket());
        arguments.iter().fold(command, |command, argument| command.argument(argument)).start()
    }
}

/// Memory for one request at a time, and where its chain begins.
struct Request {
    head: u16,
    header: u64,
    data: u64,
    status: u64,
}

impl Request {
    fn new(guest: &Guest) -> Self {
        Self::at_head(guest, 0)
    }

    fn at_head(guest: &Guest, head: u16) -> Self {
        let at = guest.allocate(4096);
        Self { head, header: at, data: at + 512, status: at + 2048 }
    }

    fn submit(&self, guest: &Guest, queue: &mut Queue<'_>, kind: u32, sector: u64) {
        let memory = &guest.memory;
        let header = [kind.to_le_bytes(), [0; 4]].concat();
        memory.write_slice(&header, GuestAddress(self.header)).expect("memory");
        memory.write_obj(sector, GuestAddress(self.header + 8)).expect("memory");
        memory.write_obj(0xffu8, GuestAddress(self.status)).expect("memory");
        let data = match kind {
            VIRTIO_BLK_T_OUT => Buffer::Readable(self.data, SECTOR_BYTES),
            _ => Buffer::Writable(self.data, SECTOR_BYTES),
        };
        queue.submit(
            self.head,
            &[Buffer::Readable(self.header, 16), data, Buffer::Writable(self.status, 1)],
        );
    }

    fn finish(&self, guest: &Guest, queue: &mut Queue<'_>) {
        let (head, _) = queue.wait_used();
        assert_eq!(head, self.head);
        self.must_have_succeeded(guest);
    }

    fn must_have_succeeded(&self, guest: &Guest) {
        let status: u8 = guest.memory.read_obj(GuestAddress(self.status)).expect("memory");
        assert_eq!(status, 0, "the request succeeds");
    }
}

fn pattern(sector: u64, round: u8) -> [u8; 512] {
    let mut bytes = [round; 512];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes
}

#[test]
fn disk_is_found_written_and_read_by_registers_rings_and_eventfds() {
    let disk = Disk::new();
    let _daemon = disk.serve(&[]);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    assert_eq!(guest.config::<4>(2, 0), [0xff; 4], "there is no second device");
    assert_eq!(guest.config::<2>(0, 0), [0x86, 0x80], "there is a bridge");
    let driver = Driver::probe(&guest, 1);
    let features = driver.negotiate(VERSION_1 | EVENT_IDX | INDIRECT);
    assert_eq!(features, VERSION_1 | EVENT_IDX | INDIRECT);
    assert_eq!(u64::from_le_bytes(driver.device_config(0)), SECTORS);
    let mut queue = driver.queue(0, 64);
    driver.go();
    let request = Request::new(&guest);
    for sector in 0..200 {
        guest.memory.write_slice(&pattern(sector, 7), GuestAddress(request.data)).expect("memory");
        request.submit(&guest, &mut queue, VIRTIO_BLK_T_OUT, sector);
        queue.notify();
        request.finish(&guest, &mut queue);
        guest.memory.write_slice(&[0; 512], GuestAddress(request.data)).expect("memory");
        request.submit(&guest, &mut queue, VIRTIO_BLK_T_IN, sector);
        queue.notify();
        request.finish(&guest, &mut queue);
        let mut found = [0; 512];
        guest.memory.read_slice(&mut found, GuestAddress(request.data)).expect("memory");
        assert_eq!(found, pattern(sector, 7));
    }
    compare(disk.image.path(), 199, &pattern(199, 7));
}

fn compare(image: &Path, sector: u64, expected: &[u8]) {
    let file = std::fs::File::open(image).expect("an image");
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, sector * 512).expect("the sector is there");
    assert!(found == expected, "sector {sector} is another");
}

#[test]
fn device_is_served_again_after_resets_of_the_driver_and_of_the_machine() {
    let disk = Disk::new();
    let _daemon = disk.serve(&[]);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    for round in 0..6 {
        let driver = Driver::probe(&guest, 1);
        driver.negotiate(VERSION_1);
        let mut queue = driver.queue(0, 16);
        driver.go();
        let request = Request::new(&guest);
        guest.memory.write_slice(&pattern(1, round), GuestAddress(request.data)).expect("memory");
        request.submit(&guest, &mut queue, VIRTIO_BLK_T_OUT, 1);
        queue.notify();
        request.finish(&guest, &mut queue);
        compare(disk.image.path(), 1, &pattern(1, round));
        if round % 2 == 0 {
            driver.reset();
        } else {
            assert!(guest.devices.reset(LIMIT), "the daemon lets go of memory");
            assert_eq!(guest.vm.state.lock().expect("whole").kicks.len(), 0);
        }
    }
    assert_eq!(guest.devices.statistics()[0].1.connections, 1, "it was one daemon all the time");
}

#[test]
fn killed_disk_is_replaced_under_load_and_each_request_is_answered_once() {
    const QUEUES: u16 = 4;
    const DEPTH: u16 = 8;
    let disk = Disk::new();
    let arguments = ["--num-queues", "4"];
    let mut daemon = disk.serve(&arguments);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    let driver = Driver::probe(&guest, 1);
    let features = driver.negotiate(VERSION_1 | 1 << 12);
    assert_ne!(features & 1 << 12, 0, "several queues");
    let mut queues: Vec<_> = (0..QUEUES).map(|index| driver.queue(index, 32)).collect();
    driver.go();
    // Three descriptors a request.
    let of_a_queue = || (0..DEPTH).map(|at| Request::at_head(&guest, 3 * at)).collect::<Vec<_>>();
    let requests: Vec<_> = (0..QUEUES).map(|_| of_a_queue()).collect();
    for round in 0..8 {
        for step in 0..10 {
            let mut sector = step * u64::from(QUEUES * DEPTH);
            for (requests, queue) in requests.iter().zip(&mut queues) {
                for request in requests {
                    let bytes = pattern(sector, round);
                    guest.memory.write_slice(&bytes, GuestAddress(request.data)).expect("memory");
                    request.submit(&guest, queue, VIRTIO_BLK_T_OUT, sector);
                    sector += 1;
                }
                queue.notify();
            }
            if step == 5 {
                daemon.signal(Signal::KILL);
                drop(daemon);
                daemon = disk.serve(&arguments);
            }
            for (requests, queue) in requests.iter().zip(&mut queues) {
                let mut heads: Vec<_> = requests.iter().map(|_| queue.wait_used().0).collect();
                heads.sort_unstable();
                assert!(heads.iter().eq(requests.iter().map(|request| &request.head)), "{heads:?}");
                requests.iter().for_each(|request| request.must_have_succeeded(&guest));
            }
        }
        for sector in 0..10 * u64::from(QUEUES * DEPTH) {
            compare(disk.image.path(), sector, &pattern(sector, round));
        }
    }
    assert_eq!(guest.devices.statistics()[0].1.connections, 9);
    drop(daemon);
}

#[test]
fn disk_that_grows_interrupts_the_driver_which_reads_another_capacity() {
    let disk = Disk::new();
    let daemon = disk.serve(&[]);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    let driver = Driver::probe(&guest, 1);
    driver.negotiate(VERSION_1);
    let _queue = driver.queue(0, 16);
    driver.go();
    let call = driver.call(0);
    let before = driver.generation();
    let file = std::fs::File::options().write(true).open(disk.image.path()).expect("an image");
    file.set_len(SECTORS * 1024).expect("it grows");
    // SIGHUP has the disk looked at anew.
    daemon.signal(Signal::HUP);
    assert!(wait_readable(&call, LIMIT), "an interrupt comes");
    assert_eq!(u64::from_le_bytes(driver.device_config(0)), SECTORS * 2);
    assert_ne!(driver.generation(), before);
    assert_eq!((driver.isr(), driver.isr()), (2, 0), "reading takes it away");
    call.iter().for_each(|call| drop(call.read()));
    driver.set_config_vector(VIRTIO_MSI_NO_VECTOR);
    file.set_len(SECTORS * 1536).expect("it grows");
    daemon.signal(Signal::HUP);
    let capacity = || u64::from_le_bytes(driver.device_config(0));
    wait_until("a driver that looks sees it", || capacity() == SECTORS * 3);
    assert!(!wait_readable(&call, QUIET), "it wants no interrupt");
}

#[test]
fn queue_without_a_vector_is_served_and_does_not_interrupt() {
    let disk = Disk::new();
    let _daemon = disk.serve(&[]);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    let driver = Driver::probe(&guest, 1);
    driver.negotiate(VERSION_1);
    let mut queue = driver.queue_with_vector(0, 16, VIRTIO_MSI_NO_VECTOR);
    driver.go();
    let request = Request::new(&guest);
    request.submit(&guest, &mut queue, VIRTIO_BLK_T_IN, 0);
    queue.notify();
    wait_until("a driver that looks finds it used", || {
        queue.wait_used_within(Duration::ZERO).is_some()
    });
    request.must_have_succeeded(&guest);
    for vector in [0, 1] {
        assert!(!wait_readable(&driver.call(vector), QUIET), "vector {vector}");
    }
}

/// Looks again and again.
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn cache_mode_that_the_driver_writes_is_read_back_and_reaches_the_daemon() {
    let disk = Disk::new();
    let _daemon = disk.serve(&[]);
    let guest = Guest::new(vec![device(Kind::Block, &disk.socket())], quick());
    let driver = Driver::probe(&guest, 1);
    let features = driver.negotiate(VERSION_1 | 1 << 9 | 1 << 11);
    assert_ne!(features & 1 << 11, 0, "the cache mode can be changed");
    let _queue = driver.queue(0, 16);
    driver.go();
    assert_eq!(driver.device_config::<1>(32), [1], "write-back");
    driver.set_device_config(32, &[0]);
    assert_eq!(driver.device_config::<1>(32), [0], "at once");
    // Read-only bytes are not the driver's, and absurd places nobody's.
    driver.set_device_config(0, &[9; 8]);
    driver.set_device_config(0xffe, &[9; 2]);
    assert_eq!(u64::from_le_bytes(driver.device_config(0)), SECTORS);
    assert_eq!(driver.device_config::<1>(32), [0]);
}

#[test]
fn killed_network_hands_frames_over_again_when_another_is_there() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let serve = || DaemonCommand::network("null=128").socket(&socket).start();
    let mut daemon = serve();
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let guest = Guest::new(vec![device(Kind::Network(Some(mac)), &socket)], quick());
    let driver = Driver::probe(&guest, 1);
    let features = driver.negotiate(VERSION_1 | 1 << 5 | 1 << 15);
    assert_ne!(features & 1 << 5, 0, "it has the MAC address that it was given");
    assert_eq!(driver.device_config(0), mac);
    let mut receive = driver.queue(0, 64);
    let mut transmit = driver.queue(1, 64);
    driver.go();
    let buffers = guest.allocate(64 * 2048);
    for head in 0..32 {
        receive.submit(head, &[Buffer::Writable(buffers + u64::from(head) * 2048, 2048)]);
    }
    receive.notify();
    let frame = guest.allocate(4096);
    for round in 0..4 {
        for _ in 0..100 {
            let (head, len) = receive.wait_used();
            assert_eq!(len, 12 + 128);
            receive.submit(head, &[Buffer::Writable(buffers + u64::from(head) * 2048, 2048)]);
            receive.notify();
            transmit.submit(0, &[Buffer::Readable(frame, 12 + 60)]);
            transmit.notify();
            assert_eq!(transmit.wait_used().0, 0);
        }
        daemon.signal(Signal::KILL);
        drop(daemon);
        if round == 2 {
            // A driver that is reset while nobody is there need not wait for anybody.
            driver.reset();
            return;
        }
        daemon = serve();
    }
}

/// Commands to a network of four pairs: how many are used, and what the answer was.
fn set_pairs(guest: &Guest, control: &mut Queue<'_>, pairs: u8, at: u64) {
    // Class MQ, command VQ_PAIRS_SET; then room for the answer.
    guest.memory.write_slice(&[4, 0, pairs, 0, 0xff], GuestAddress(at)).expect("memory");
    control.submit(0, &[Buffer::Readable(at, 4), Buffer::Writable(at + 4, 1)]);
    control.notify();
}

fn pairs_are_set(guest: &Guest, control: &mut Queue<'_>, at: u64) {
    assert_eq!(control.wait_used(), (0, 1));
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at + 4)).expect("memory"), 0, "OK");
}

#[test]
fn network_of_four_pairs_obeys_its_control_queue_and_so_does_the_next_daemon() {
    const PAIRS: u16 = 4;
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let serve = || {
        let command = DaemonCommand::network("null=128").argument("--queue-pairs").argument("4");
        command.socket(&socket).start()
    };
    let mut daemon = serve();
    let guest = Guest::new(vec![device(Kind::Network(None), &socket)], quick());
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let driver = Driver::probe(&guest, 1);
        let accepted = driver.negotiate(features | 1 << 17 | 1 << 22);
        assert_eq!(accepted, features | 1 << 17 | 1 << 22, "a control queue and several pairs");
        assert_eq!(u16::from_le_bytes(driver.device_config(8)), PAIRS);
        let mut queues: Vec<_> = (0..=2 * PAIRS).map(|index| driver.queue(index, 16)).collect();
        driver.go();
        let at = guest.allocate(8192);
        let mut control = queues.pop().expect("a control queue");
        let mut receive = queues.remove(2 * 3);
        receive.submit(0, &[Buffer::Writable(at + 1024, 2048)]);
        receive.notify();
        set_pairs(&guest, &mut control, 4, at);
        pairs_are_set(&guest, &mut control, at);
        assert_eq!(receive.wait_used().1, 12 + 128, "the fourth pair receives");
        for _ in 0..3 {
            daemon.signal(Signal::KILL);
            drop(daemon);
            receive.submit(0, &[Buffer::Writable(at + 1024, 2048)]);
            receive.notify();
            daemon = serve();
            assert_eq!(receive.wait_used().1, 12 + 128, "it still does");
        }
        // A command while nobody is there is answered by the next daemon.
        daemon.signal(Signal::KILL);
        drop(daemon);
        set_pairs(&guest, &mut control, 2, at);
        daemon = serve();
        pairs_are_set(&guest, &mut control, at);
        // What is no command is answered as an error.
        control.submit(0, &[Buffer::Readable(at, 1), Buffer::Writable(at + 4, 1)]);
        control.notify();
        assert_eq!(control.wait_used(), (0, 1));
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at + 4)).expect("memory"), 1);
        driver.reset();
    }
    drop(daemon);
}

#[test]
fn console_of_31_ports_has_64_queues_and_greets_its_driver() {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let command =
        DaemonCommand::console(&["console,name=one,endpoint=null", "name=two,endpoint=null"]);
    let _daemon = command.argument("--max-ports").argument("31").socket(&socket).start();
    let guest = Guest::new(vec![device(Kind::Console, &socket)], quick());
    let driver = Driver::probe(&guest, 1);
    driver.negotiate(VERSION_1 | 1 << 1);
    assert_eq!(u16::from_le_bytes(guest.read(driver.common + 18)), 64);
    assert_eq!(u32::from_le_bytes(driver.device_config(4)), 31);
    let mut queues: Vec<_> = (0..64).map(|index| driver.queue(index, 16)).collect();
    driver.go();
    let at = guest.allocate(4096);
    for head in 0..8 {
        queues[2].submit(head, &[Buffer::Writable(at + u64::from(head) * 64, 64)]);
    }
    queues[2].notify();
    // DEVICE_READY; then each port is announced.
    let ready = [0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0];
    guest.memory.write_slice(&ready, GuestAddress(at + 2048)).expect("memory");
    queues[3].submit(0, &[Buffer::Readable(at + 2048, 8)]);
    queues[3].notify();
    assert_eq!(queues[3].wait_used().0, 0);
    for port in 0..2 {
        let (head, len) = queues[2].wait_used();
        let mut message = [0; 8];
        let from = GuestAddress(at + u64::from(head) * 64);
        guest.memory.read_slice(&mut message, from).expect("memory");
        assert_eq!((len, message), (8, [port, 0, 0, 0, 1, 0, 1, 0]), "PORT_ADD");
    }
}

#[test]
fn device_without_a_daemon_is_waited_for_and_one_that_is_stopped_costs_nobody_else() {
    let (first, second) = (Disk::new(), Disk::new());
    let _second_daemon = second.serve(&[]);
    let configs = [&first, &second].map(|disk| device(Kind::Block, &disk.socket()));
    let mut limits = quick();
    limits.reply = Duration::from_millis(300);
    let guest = Guest::without_daemons(configs.to_vec(), limits);
    assert!(!guest.devices.wait(Duration::from_millis(30)).expect("nothing is wrong"));
    assert_eq!(guest.config::<4>(1, 0), [0xff; 4], "not there yet");
    let daemon = first.serve(&[]);
    assert!(guest.devices.wait(LIMIT).expect("nothing is wrong"));
    let drivers = [1, 2].map(|number| Driver::probe(&guest, number));
    let mut queues = drivers.each_ref().map(|driver| {
        driver.negotiate(VERSION_1);
        let queue = driver.queue(0, 16);
        driver.go();
        queue
    });
    let request = Request::new(&guest);
    for queue in &mut queues {
        request.submit(&guest, queue, VIRTIO_BLK_T_IN, 0);
        queue.notify();
        request.finish(&guest, queue);
    }
    daemon.signal(Signal::STOP);
    drivers[0].set_status(0);
    request.submit(&guest, &mut queues[1], VIRTIO_BLK_T_IN, 0);
    queues[1].notify();
    request.finish(&guest, &mut queues[1]);
    let begin = Instant::now();
    drivers[0].reset();
    assert!(begin.elapsed() < LIMIT / 2, "the watchdog ended the wait");
    daemon.signal(Signal::CONT);
}
