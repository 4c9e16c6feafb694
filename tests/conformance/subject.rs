//! The back end under test: a process of its own with a temporary disk, a network or a console, and the checks
//! that every case ends with.
//!
//! By default it is our `vhost-blk`, started by the harness. With `OUTBOARD_CONFORMANCE_COMMAND`
//! set it is another program, so that a verdict can be checked on a peer: a command line for `sh`
//! in which `$SOCKET` and `$IMAGE` stand for the paths. Options that a test wants of our daemon
//! mean nothing to such a program, which must offer two queues and a writable disk by itself; the
//! suites about our own command line skip then.

use crate::launch;
use crate::wire::Wire;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::console::ConsoleDriver;
use frontend::guest::{Guest, Options};
use frontend::net::NetDriver;
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;
use frontend::{Error, front_end::FrontEnd};
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tests::{Daemon, DaemonCommand, TempDir, temp_dir};

/// Names the command line of another back end.
const COMMAND_VARIABLE: &str = "OUTBOARD_CONFORMANCE_COMMAND";
/// Length of every subject's disk: room for a discard of some size, and quick to make.
pub(crate) const DISK_BYTES: usize = 16 << 20;
/// The same in sectors.
pub(crate) const DISK_SECTORS: u64 = (DISK_BYTES / SECTOR_BYTES) as u64;
/// The most threads that perform the operations of one worker (docs/operating.md, `--aio`).
const AIO_THREADS_MAX: usize = 16;
/// Starts a program for which an error takes the place of an io_uring.
pub(crate) const WITHOUT_IO_URING: &str = env!("CARGO_BIN_EXE_without-io-uring");
/// Queues that every subject has.
pub(crate) const QUEUE_COUNT: u16 = 2;
/// Where a network's commands go: behind its one pair.
pub(crate) const CONTROL_QUEUE: u16 = 2;
/// The address of every network's guest.
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// Says why a case about our own command line has nothing to test, if it is so.
pub(crate) fn is_another_program() -> bool {
    let another = is_peer();
    if another {
        eprintln!("skipped: {COMMAND_VARIABLE} names a program with another command line");
    }
    another
}

/// Says why a case about what we alone promise has nothing to test, if it is so.
pub(crate) fn is_ours_to_promise() -> bool {
    let ours = !is_peer();
    if !ours {
        eprintln!("skipped: it is about what no specification demands");
    }
    ours
}

/// Says why a case about a protocol feature has nothing to test, if the back end lacks it.
pub(crate) fn lacks(driver: &BlockDriver, protocol_feature: u64) -> bool {
    let lacks = is_peer() && driver.guest.protocol_features & protocol_feature == 0;
    if lacks {
        let bit = protocol_feature.trailing_zeros();
        eprintln!("skipped: protocol feature bit {bit} is not offered");
    }
    lacks
}

/// The same of features of the device.
pub(crate) fn lacks_feature(driver: &BlockDriver, feature: u64) -> bool {
    let lacks = is_peer() && driver.guest.features & feature != feature;
    if lacks {
        eprintln!("skipped: not all of feature bits {feature:#x} are offered");
    }
    lacks
}

/// Whether the back end is not ours.
pub(crate) fn is_peer() -> bool {
    std::env::var_os(COMMAND_VARIABLE).is_some()
}

/// What we promise and the specifications do not demand: broken by our daemon it fails the case, by
/// another program it is a difference that the runner tells of.
#[track_caller]
pub(crate) fn promise(kept: bool, broken: impl Fn() -> String) {
    if !kept {
        assert!(is_peer(), "{}", broken());
        eprintln!("beyond the specifications: {}", broken());
    }
}

#[derive(Debug)]
enum Process {
    Ours(Daemon),
    Another(launch::Process),
}

/// The kernel closes what io_uring held a moment later than its owner; it takes no longer than this.
pub(crate) const SETTLING: Duration = Duration::from_secs(1);

/// A running back end and its disk.
#[derive(Debug)]
pub(crate) struct Subject {
    process: Process,
    socket: PathBuf,
    directory: TempDir,
    /// What it had open when it served the next front end for the first time.
    descriptors: Option<usize>,
    /// The network or the console that it serves, if it serves none of the disks.
    wire: Option<Rc<Wire>>,
}

impl Subject {
    /// The back end on an empty disk.
    pub(crate) fn start() -> Self {
        Subject::with_options(&[])
    }

    /// The back end with further options for our daemon.
    pub(crate) fn with_options(options: &[&str]) -> Self {
        Subject::in_directory(temp_dir(), options)
    }

    /// Our network device with further options, on a wire whose other end is the test's.
    pub(crate) fn network(options: &[&str]) -> Self {
        let directory = temp_dir();
        let path = directory.path().join("wire");
        let listener = UnixListener::bind(&path).expect("a socket fits in a fresh directory");
        let backend = format!("socket={}", path.display());
        let command = DaemonCommand::network(&backend);
        let mut subject = Subject::of_network(directory, command, options);
        subject.wire = Some(Rc::new(Wire::accept(&listener)));
        subject
    }

    /// Our network device with further options, on another network.
    pub(crate) fn of_network(directory: TempDir, command: DaemonCommand, options: &[&str]) -> Self {
        let [socket, control] = ["socket", "control"].map(|name| directory.path().join(name));
        let command = command.argument("--mac").argument("52:54:00:12:34:56");
        let command = command.socket(&socket).argument("--control").argument(control);
        let daemon = options.iter().fold(command, |command, option| command.argument(option));
        let process = Process::Ours(daemon.start());
        Subject { process, socket, directory, descriptors: None, wire: None }
    }

    /// Our console device with these ports and options, which somebody looks at if one of them leads to a socket `view`.
    pub(crate) fn console(ports: &[&str], options: &[&str]) -> Self {
        let directory = temp_dir();
        let [socket, control] = ["socket", "control"].map(|name| directory.path().join(name));
        let at = directory.path().display().to_string();
        let ports: Vec<_> = ports.iter().map(|port| port.replace('@', &at)).collect();
        let command = DaemonCommand::new(&tests::program("vhost-console")).socket(&socket);
        let command = command.argument("--control").argument(control);
        let command =
            ports.iter().fold(command, |command, port| command.argument("--port").argument(port));
        let daemon = options.iter().fold(command, |command, option| command.argument(option));
        let process = Process::Ours(daemon.start());
        let view = directory.path().join("view");
        let wire = view.exists().then(|| Rc::new(Wire::view(&view)));
        Subject { process, socket, directory, descriptors: None, wire }
    }

    /// What is attacked in the same way whatever it serves: the disk, and our network and console.
    pub(crate) fn each() -> Vec<Self> {
        let ours = (!is_peer()).then(|| {
            let console = Subject::console(&["console,endpoint=unix:@/view"], &[]);
            [Subject::network(&[]), console]
        });
        [Subject::start()].into_iter().chain(ours.into_iter().flatten()).collect()
    }

    /// Has the device look at its queue 0, which is under attack.
    pub(crate) fn provoke(&self) {
        if let Some(wire) = &self.wire {
            wire.provoke();
        }
    }

    /// A queue of whatever it serves does what it is for.
    #[track_caller]
    pub(crate) fn must_work(&self, driver: &mut BlockDriver, queue: u16) {
        match &self.wire {
            Some(wire) => carries(&mut driver.guest, wire, queue).expect("a chain comes back"),
            None => must_work(driver, queue),
        }
    }

    /// The wire of a network or a console.
    pub(crate) fn wire(&self) -> Option<Rc<Wire>> {
        self.wire.clone()
    }

    /// The wire is cut, and the daemon finds no other.
    pub(crate) fn cut_wire(&mut self) {
        std::fs::remove_file(self.directory.path().join("wire")).expect("it is there");
        self.wire = None;
    }

    /// The daemon finds another wire.
    pub(crate) fn mend_wire(&mut self) {
        let listener = UnixListener::bind(self.directory.path().join("wire"));
        let listener = listener.expect("a socket fits in its place");
        self.wire = Some(Rc::new(Wire::accept(&listener)));
    }

    /// Queues that it has, at most.
    pub(crate) fn queue_count(&self) -> u16 {
        match &self.wire {
            Some(wire) if !wire.is_of_a_console() => CONTROL_QUEUE + 1,
            _ => QUEUE_COUNT,
        }
    }

    /// As [`Subject::with_options`], with its disk in `directory`: the one that is there, if any.
    pub(crate) fn in_directory(directory: TempDir, options: &[&str]) -> Self {
        if !directory.path().join("disk").exists() {
            make_disk(directory.path());
        }
        let socket = directory.path().join("socket");
        let image = directory.path().join("disk");
        let process = match std::env::var(COMMAND_VARIABLE) {
            Ok(command) => Process::Another(start_another(&command, &socket, &image)),
            Err(_) => Process::Ours(ours(directory.path(), options).start()),
        };
        Subject { process, socket, directory, descriptors: None, wire: None }
    }

    /// Kills our daemon as the kernel would, and starts another one in its place.
    pub(crate) fn kill_and_replace(&mut self) {
        if let Process::Ours(daemon) = &self.process {
            daemon.signal(Signal::KILL);
        }
        self.process = Process::Ours(ours(self.directory.path(), &[]).start());
    }

    /// Our daemon on a host that lets it write no file beyond `limit_sectors`; disk and log
    /// are in `directory`.
    pub(crate) fn with_file_limit(directory: TempDir, limit_sectors: u64) -> Self {
        let image = make_disk(directory.path());
        let [socket, control, log] =
            ["socket", "control", "log"].map(|name| directory.path().join(name));
        // Without the trap, whoever writes beyond the limit is killed. The unit is that of POSIX.
        let script = format!("trap '' XFSZ; ulimit -f {limit_sectors}; exec \"$0\" \"$@\"");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).arg(tests::program("vhost-blk")).arg("--blk-file").arg(&image);
        shell.arg("--socket-path").arg(&socket).arg("--control").arg(&control);
        shell.args(tests::engine_arguments());
        let log = File::create(log).expect("a file fits in a fresh directory");
        let mut process = launch::Process::spawn(shell.stdin(Stdio::null()).stderr(log))
            .expect("there is a shell");
        process.wait_for_socket(&socket);
        Subject {
            process: Process::Another(process),
            socket,
            directory,
            descriptors: None,
            wire: None,
        }
    }

    /// Our daemon where an io_uring cannot be made, for the reason `error`.
    pub(crate) fn without_io_uring(error: &str, options: &[&str]) -> Self {
        let directory = temp_dir();
        let image = make_disk(directory.path());
        let socket = image.with_file_name("socket");
        let launcher = [WITHOUT_IO_URING, error];
        let daemon = ours(directory.path(), options).through(launcher).start();
        Subject { process: Process::Ours(daemon), socket, directory, descriptors: None, wire: None }
    }

    /// What our daemon has logged.
    pub(crate) fn log(&self) -> String {
        match &self.process {
            Process::Ours(daemon) => daemon.log(),
            Process::Another(_) => std::fs::read_to_string(self.directory.path().join("log"))
                .expect("the log is a file"),
        }
    }

    /// The vhost-user socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The control socket, if it is our daemon.
    pub(crate) fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// The image behind the disk.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Bytes of the image as the host sees them.
    pub(crate) fn image_bytes(&self, offset_bytes: u64, size_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; size_bytes];
        let image = File::open(self.image()).expect("the image is ours");
        image.read_exact_at(&mut bytes, offset_bytes).expect("the image is as long as it was made");
        bytes
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        match &self.process {
            Process::Ours(daemon) => daemon.id(),
            Process::Another(process) => process.id(),
        }
    }

    /// Sends a signal to our daemon.
    pub(crate) fn signal(&self, signal: Signal) {
        match &self.process {
            Process::Ours(daemon) => daemon.signal(signal),
            Process::Another(_) => panic!("this suite is about our own daemon"),
        }
    }

    /// Runs `act` while our daemon stands still: it finds all that happened meanwhile at once.
    pub(crate) fn while_stopped<T>(&self, act: impl FnOnce() -> T) -> T {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + PATIENCE;
        while !self.stands_still() {
            assert!(Instant::now() < deadline, "the back end does not stop");
            std::thread::yield_now();
        }
        let done = act();
        self.signal(Signal::CONT);
        done
    }

    /// Whether every thread has stopped, but for the kernel's own ones of io_uring.
    fn stands_still(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id())).expect("it lives");
        tasks.flatten().all(|task| {
            // A thread that has just ended has no state.
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").map_or("T", |(_, state)| state);
            state.starts_with('T') || stat.contains("(iou-")
        })
    }

    /// The process as the harness knows it, for the suites about our own command line.
    pub(crate) fn into_daemon(self) -> (Daemon, TempDir) {
        match self.process {
            Process::Ours(daemon) => (daemon, self.directory),
            Process::Another(_) => panic!("this suite is about our own daemon"),
        }
    }

    /// CPU time that the threads which the process has by now have used.
    pub(crate) fn cpu_time(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id())).expect("it lives");
        let times = tasks.flatten().map(|task| {
            // A thread that has just ended has used nothing.
            let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let ns = stat.split(' ').next().and_then(|ns| ns.parse().ok());
            Duration::from_nanos(ns.unwrap_or(0))
        });
        times.sum()
    }

    /// Entries of a directory of the process in `/proc`: its descriptors (`fd`) or its threads
    /// (`task`). Those that perform a worker's operations come and go; there is a limit to them.
    pub(crate) fn count(&self, what: &str) -> usize {
        let directory = format!("/proc/{}/{what}", self.id());
        let entries = std::fs::read_dir(&directory).expect("the process lives").flatten();
        if what != "task" {
            return entries.count();
        }
        // A thread that has just ended has no name.
        let names = entries.flat_map(|task| std::fs::read_to_string(task.path().join("comm")));
        let (pool, others): (Vec<_>, Vec<_>) = names.partition(|name| name == "aio\n");
        assert!(pool.len() <= AIO_THREADS_MAX, "{} threads for one worker", pool.len());
        others.len()
    }

    /// A connection that is being served. Tries again when it is turned away: a process that another
    /// test is just starting holds copies of this one's descriptors until its exec, so that the last
    /// front end may not have hung up yet. That one who comes at once is let in is for `life` and the
    /// independent client to show, where nothing is started meanwhile.
    pub(crate) fn connect(&self) -> FrontEnd {
        self.when_free(|| {
            let front_end = FrontEnd::connect(self.socket())?;
            front_end.barrier().map(|()| front_end)
        })
    }

    /// A driver with running queues.
    pub(crate) fn driver(&self, options: &Options) -> BlockDriver {
        self.when_free(|| BlockDriver::start(self.socket(), options))
    }

    /// A network's driver with running queues.
    pub(crate) fn net_driver(&self, options: &Options) -> NetDriver {
        self.when_free(|| NetDriver::start(self.socket(), options))
    }

    /// A console's driver with running queues.
    pub(crate) fn console_driver(&self, options: &Options) -> ConsoleDriver {
        self.when_free(|| ConsoleDriver::start(self.socket(), options))
    }

    fn when_free<T>(&self, attempt: impl Fn() -> Result<T, Error>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt() {
                Ok(served) => return served,
                Err(Error::HangUp | Error::System(_)) if Instant::now() < deadline => {
                    self.must_live();
                    std::thread::yield_now()
                }
                Err(error) => panic!("the back end does not serve this front end: {error:?}"),
            }
        }
    }

    /// Fails if the process has ended. Nobody has waited for it yet, so its id is still its own.
    #[track_caller]
    fn must_live(&self) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
        let has_died =
            stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X']));
        // proc(5): the last field is what waitpid will say, the signal in its low bits.
        let status =
            stat.split_whitespace().next_back().and_then(|status| status.parse::<u32>().ok());
        let signal = status.map_or(0, |status| status & 0x7f);
        assert!(!has_died, "the back end has died (signal {signal})");
    }

    /// What every hostile case ends with: the process lives, serves the next front end on all of its
    /// queues, and has no more open than when it did so for the first time.
    #[track_caller]
    pub(crate) fn must_serve_the_next(&mut self) {
        self.must_live();
        let options = Options { queue_count: self.queue_count(), ..Options::default() };
        let mut network = self.wire().map(|wire| (self.net_driver(&options), wire));
        let mut disk = network.is_none().then(|| self.driver(&options));
        if let Some((driver, wire)) = &mut network {
            must_carry(&mut driver.guest, wire, "the next front end");
        }
        if let Some(driver) = &mut disk {
            (0..QUEUE_COUNT).for_each(|queue| must_work(driver, queue));
        }
        let first = *self.descriptors.get_or_insert(self.count("fd"));
        let deadline = Instant::now() + SETTLING;
        while self.count("fd") > first && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let now = self.count("fd");
        promise(now <= first, || format!("{now} descriptors are open, {first} were at first"));
    }
}

/// A queue does what it is for: what it writes, it reads.
pub(crate) fn must_work(driver: &mut BlockDriver, queue: u16) {
    let data: Vec<u8> = (0..2 * SECTOR_BYTES)
        .map(|at| u8::try_from((at * 7 + at / 256) % 256).unwrap_or(0))
        .collect();
    let sector = DISK_SECTORS - 2 - 2 * u64::from(queue);
    let written = driver.perform(queue, &Request::write(sector, &data)).expect("a write ends");
    assert_eq!(written.status, VIRTIO_BLK_S_OK, "write on queue {queue}");
    let read = driver.perform(queue, &Request::read(sector, data.len())).expect("a read ends");
    assert_eq!(read.status, VIRTIO_BLK_S_OK, "read on queue {queue}");
    assert!(read.data == data, "queue {queue} reads something else than it wrote");
}

/// A frame of `frame_bytes` from the guest to everybody, or the other way round.
pub(crate) fn frame(frame_bytes: usize, number: u8) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &GUEST_MAC, &[0x88, 0xb5]].concat();
    frame.extend((0..frame_bytes.saturating_sub(frame.len())).map(|at| (at % 251) as u8 ^ number));
    frame.truncate(frame_bytes);
    frame
}

/// A pair does what it is for: what the guest sends is on the wire, and what comes over the wire the guest receives.
#[track_caller]
pub(crate) fn must_carry(guest: &mut Guest, wire: &Wire, what: &str) {
    carries(guest, wire, 1).unwrap_or_else(|error| panic!("{what}, sending: {error}"));
    carries(guest, wire, 0).unwrap_or_else(|error| panic!("{what}, receiving: {error}"));
}

/// One queue of a network or a console does what it is for. Nothing else is outstanding on it.
#[track_caller]
pub(crate) fn carries(guest: &mut Guest, wire: &Wire, queue: u16) -> Result<(), Error> {
    let header = vec![0; wire.header_bytes(guest.features)];
    let (sent, receives) = (frame(800 + usize::from(queue), 3), queue == 0);
    let chain = [&header[..], &sent].concat();
    let address = guest.allocate(chain.len());
    let len_bytes = u32::try_from(chain.len()).expect("a frame is short");
    guest.memory.write(address, if receives { &[] } else { &chain });
    let ring = &mut guest.queues[usize::from(queue)];
    ring.submit(&[Buffer { address, len_bytes, writable: receives }]);
    ring.kick()?;
    if receives {
        wire.send(&sent);
    } else {
        wire.must_receive(&sent, "a frame of the guest's");
    }
    let used = ring.wait_used(PATIENCE)?;
    assert_eq!(used.len_bytes, if receives { len_bytes } else { 0 }, "queue {queue}");
    let received = guest.memory.read(address, chain.len());
    assert!(received[header.len()..] == sent, "the guest receives another frame");
    Ok(())
}

/// Our daemon's command, on the disk in `directory`.
pub(crate) fn ours(directory: &Path, options: &[&str]) -> DaemonCommand {
    let command = DaemonCommand::block(&directory.join("disk")).socket(&directory.join("socket"));
    let command = command.argument("--control").argument(directory.join("control"));
    let has_queue_count = options.contains(&"--num-queues");
    let count = QUEUE_COUNT.to_string();
    let queues: &[&str] = if has_queue_count { &[] } else { &["--num-queues", &count] };
    queues.iter().chain(options).fold(command, |command, option| command.argument(option))
}

/// An empty disk image in `directory`.
pub(crate) fn make_disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk");
    tests::DiskImage::sparse(&path, DISK_BYTES as u64);
    path
}

fn start_another(command: &str, socket: &Path, image: &Path) -> launch::Process {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec {command}")]).env("SOCKET", socket).env("IMAGE", image);
    let mut process = launch::Process::spawn(shell.stdin(Stdio::null()).stdout(Stdio::null()))
        .expect("there is a shell");
    process.wait_for_socket(socket);
    process
}
