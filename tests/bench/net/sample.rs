//! One sample: a front end, a back end, and how many frames went from one to the other in some seconds.
//!
//! Frames are counted where they have arrived: by the front end, or by the kernel behind the tap, since a back end may drop
//! what a tap does not take. Where they end at the back end, by the front end that has got rid of them.

use std::ffi::OsString;
use std::fmt;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use tests::{Machine, Namespace, Rig, Tap};

use crate::contender::{Contender, GUEST_MAC, TAP, start_front_end};
use crate::tap;

/// Seconds before anything is counted, as the front end tells them.
const WARM_UP_SECONDS: usize = 2;
/// Unit of the CPU times in `/proc/PID/stat`: the kernel's USER_HZ, 100 in the ABI of every architecture we build for.
const TICKS_PER_SECOND: f64 = 100.0;
/// Headers of Ethernet, IPv4 and UDP.
const HEADERS_BYTES: usize = 14 + 20 + 8;
/// What a command line begins with whose process is to end with this one, also where a panic aborts it.
pub(crate) const MORTAL: [&str; 3] = ["setpriv", "--pdeathsig", "KILL"];
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Nobody listens there (RFC 863, "discard").
const PORT: u16 = 9;

/// What the front end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Sends,
    Receives,
}

/// What is on the back end's other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Null,
    Tap,
}

/// A kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) over: Over,
    pub(crate) way: Way,
    pub(crate) frame_bytes: u16,
}

impl fmt::Display for Cell {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let over = match self.over {
            Over::Null => "null",
            Over::Tap => "tap",
        };
        let way = match self.way {
            Way::Sends => "sends",
            Way::Receives => "receives",
        };
        write!(to, "{over}: front end {way} {} B", self.frame_bytes)
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) frames_per_second: f64,
    pub(crate) gbit_per_second: f64,
    pub(crate) cpu_seconds_per_million: f64,
    pub(crate) cpu_seconds_per_gib: f64,
}

impl Sample {
    fn new(cell: Cell, frames: u64, elapsed: Duration, cpu_seconds: f64) -> Self {
        let (frames, frame_bytes) = (frames as f64, f64::from(cell.frame_bytes));
        let frames_per_second = frames / elapsed.as_secs_f64();
        Self {
            frames_per_second,
            gbit_per_second: frames_per_second * frame_bytes * 8.0 / 1e9,
            cpu_seconds_per_million: cpu_seconds / frames * 1e6,
            cpu_seconds_per_gib: cpu_seconds / (frames * frame_bytes) * f64::from(1 << 30),
        }
    }
}

/// What all samples share.
pub(crate) struct Bench {
    pub(crate) rig: Rig,
    /// Of the back end, and of the front end and whoever sends to the tap.
    pub(crate) cpus: [usize; 2],
    pub(crate) seconds: Duration,
}

impl Bench {
    /// A namespace of its own for a sample.
    ///
    /// # Panics
    /// If there cannot be one.
    pub(crate) fn namespace(&self) -> Namespace {
        Namespace::new(&self.rig).expect("root can make a namespace; why not, it has said")
    }

    /// What the command line of a daemon begins with: it is on the back end's CPU.
    pub(crate) fn pinned_to_back_end(&self) -> Vec<OsString> {
        let pin = ["taskset".into(), "--cpu-list".into(), self.cpus[0].to_string().into()];
        MORTAL.map(OsString::from).into_iter().chain(pin).collect()
    }

    /// Takes one sample of a contender.
    ///
    /// # Panics
    /// If a process does not start or ends; the message has what it said.
    pub(crate) fn sample(&self, contender: &Contender, cell: Cell) -> Sample {
        let namespace = self.namespace();
        let Some(back_end) = contender.start(self, &namespace, Some(cell)) else {
            return self.sample_of_loop(&namespace, cell);
        };
        self.with_sender(&namespace, cell, || {
            let socket = back_end.socket();
            let (mut front_end, _directory) =
                start_front_end(self, &namespace, &socket, Some(cell));
            for _ in 0..WARM_UP_SECONDS {
                count(&mut front_end, &namespace, cell);
            }
            let (frames_before, begin) = count(&mut front_end, &namespace, cell);
            let cpu_before = cpu_seconds(back_end.id());
            for _ in 1..self.seconds.as_secs() {
                count(&mut front_end, &namespace, cell);
            }
            let (frames, end) = count(&mut front_end, &namespace, cell);
            let cpu = cpu_seconds(back_end.id()) - cpu_before;
            Sample::new(cell, frames - frames_before, end - begin, cpu)
        })
    }

    /// CPU use in percent with a front end that is connected, and neither sends nor is sent to.
    pub(crate) fn idle_percent(&self, contender: &Contender) -> f64 {
        let namespace = self.namespace();
        let Some(back_end) = contender.start(self, &namespace, None) else { return f64::NAN };
        let (mut front_end, _directory) =
            start_front_end(self, &namespace, &back_end.socket(), None);
        for _ in 0..=WARM_UP_SECONDS {
            front_end.wait_for("RX-packets:");
        }
        let (before, begin) = (cpu_seconds(back_end.id()), Instant::now());
        for _ in 0..self.seconds.as_secs() {
            front_end.wait_for("RX-packets:");
        }
        (cpu_seconds(back_end.id()) - before) / begin.elapsed().as_secs_f64() * 100.0
    }

    /// The tap by itself.
    fn sample_of_loop(&self, namespace: &Namespace, cell: Cell) -> Sample {
        namespace.add_tap(TAP, Tap::SingleQueue);
        let tap = namespace.open_tap(TAP);
        let measure = || {
            pin(self.cpus[0]);
            let turn = |time| {
                let frame_bytes = usize::from(cell.frame_bytes);
                tap::turn(&tap, cell.way, frame_bytes, time).expect("the tap is up")
            };
            turn(Duration::from_secs(1));
            let (begin, cpu_before) = (Instant::now(), thread_cpu_seconds());
            let frames = turn(self.seconds);
            let cpu = thread_cpu_seconds() - cpu_before;
            Sample::new(cell, frames, begin.elapsed(), cpu)
        };
        self.with_sender(namespace, cell, || {
            thread::scope(|scope| scope.spawn(measure).join())
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Does `work` while the host sends frames into the tap, if the cell wants some to come out of it.
    fn with_sender<T>(&self, namespace: &Namespace, cell: Cell, work: impl FnOnce() -> T) -> T {
        if (cell.over, cell.way) != (Over::Tap, Way::Receives) {
            return work();
        }
        namespace.add_address(TAP, &format!("{HOST}/24"));
        namespace.ip(&format!("neighbour add {GUEST} lladdr {GUEST_MAC} dev {TAP}"));
        let socket = namespace.run(|| UdpSocket::bind((HOST, 0))).expect("the address is there");
        let payload = vec![0; usize::from(cell.frame_bytes).saturating_sub(HEADERS_BYTES)];
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                pin(self.cpus[1]);
                while !done.load(Ordering::Relaxed) {
                    // What finds no room, or no carrier yet, is lost, as on any network.
                    let _ = socket.send_to(&payload, (GUEST, PORT));
                }
            });
            let _stop = Stop(&done);
            work()
        })
    }
}

/// Ends the sender, also where a panic ends the work.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits for the front end's next word, which comes each second; how many frames have arrived until then.
fn count(front_end: &mut Machine, namespace: &Namespace, cell: Cell) -> (u64, Instant) {
    let word = match cell.way {
        Way::Sends => "TX-packets:",
        Way::Receives => "RX-packets:",
    };
    let line = front_end.wait_for(word);
    let now = Instant::now();
    let frames = if (cell.over, cell.way) == (Over::Tap, Way::Sends) {
        namespace.run(received_by_tap)
    } else {
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok())
    };
    (frames.unwrap_or_else(|| panic!("no number of frames in {line:?}")), now)
}

/// How many frames the host has from the tap, as this thread's namespace tells.
fn received_by_tap() -> Option<u64> {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev").ok()?;
    let line = devices.lines().find_map(|line| line.trim_start().strip_prefix(TAP))?;
    line.trim_start_matches(':').split_whitespace().nth(1)?.parse().ok()
}

/// CPU time of all threads of a process since its start, in user space and in the kernel.
pub(crate) fn cpu_seconds(process: u32) -> f64 {
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    // proc(5): utime and stime are fields 14 and 15; the second, the program's name, ends at the last parenthesis.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks as f64 / TICKS_PER_SECOND
}

fn thread_cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Moves this thread to a CPU.
fn pin(cpu: usize) {
    let mut own = CpuSet::new();
    own.set(cpu);
    sched_setaffinity(None, &own).expect("the CPU is one of ours");
}
