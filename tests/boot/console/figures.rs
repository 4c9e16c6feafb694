//! How fast consoles and data ports are. Nothing is asserted of that: whoever reads it knows what the machine did meanwhile.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::FrontEnd;
use super::server::{Client, LIMIT, Server};
use crate::dialogue::Guest;

/// Keys that are typed, each when the one before has been echoed.
const KEY_COUNT: usize = 2000;
/// What goes over the console.
const CONSOLE_BYTES: u64 = 4 << 20;
/// The time in which a daemon with nothing to do does nothing.
const IDLE: Duration = Duration::from_secs(3);
/// For so long nothing comes once all has.
const PAUSE: Duration = Duration::from_millis(200);
/// What the guest writes to a data port at once.
const STEP_BYTES: u64 = 64 << 10;
/// Clock ticks of `/proc/PID/stat`: 100 a second on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A console `hvc0` and a data port `one` of a guest's, and who is at their other ends.
pub(super) struct Ends<'a> {
    /// For the table.
    pub(super) name: &'a str,
    pub(super) guest: &'a mut Guest,
    pub(super) console: Client,
    pub(super) data: Client,
    /// What goes over the data port.
    pub(super) len_bytes: u64,
    /// The process that serves them.
    pub(super) process: u32,
}

/// Measures a daemon of ours.
pub(super) fn of_ours(front_end: &impl FrontEnd, name: &str) {
    let ports = ["name=con,console,endpoint=unix:@/con", "name=one,endpoint=unix:@/one"];
    // With room for all that goes over the console: a viewer who is not fast enough would lose some of it.
    let server = Server::start(&ports, &["--replay", "8M"]);
    let mut guest = front_end.meet(server.socket(), &[]);
    let (console, data) = (server.connect("con"), server.connect("one"));
    let (len_bytes, process) = (front_end.stream_bytes(), server.id());
    let ends = Ends { name, guest: &mut guest, console, data, len_bytes, process };
    measure(ends, Some(&server));
    front_end.finish(guest.part());
    server.expect_clean_end();
}

/// Measures, and prints a line for each figure.
pub(super) fn measure(ends: Ends<'_>, server: Option<&Server>) {
    let Ends { name, guest, mut console, mut data, len_bytes, process } = ends;
    guest.do_line("await one");
    guest.do_line("open one");
    guest.do_line("open hvc0");

    guest.do_line(&format!("begin reflect hvc0 {KEY_COUNT}"));
    let mut times: Vec<_> = (0..KEY_COUNT).map(|_| type_key(&mut console)).collect();
    guest.do_line("finish");
    times.sort_unstable();
    let (half, most) = (times[KEY_COUNT / 2], times[KEY_COUNT * 99 / 100]);
    eprintln!("{name}: a key is echoed after {half:.1?} (p50), {most:.1?} (p99)");

    let chains = || server.map(|server| server.statistics().requests("transmit"));
    let before = chains();
    let is_over = AtomicBool::new(false);
    let (time_us, came) = thread::scope(|scope| {
        let reader = scope.spawn(|| take_what_comes(&mut console, &is_over));
        let time_us = guest.find(&format!("write hvc0 {CONSOLE_BYTES} 4096"));
        is_over.store(true, Ordering::Relaxed);
        (time_us, reader.join().expect("it reads"))
    });
    // QEMU's own throws away what nobody is fast enough to read.
    assert!(server.is_none() || came == CONSOLE_BYTES, "{came} bytes came of {CONSOLE_BYTES}");
    let of_each = match (before, chains()) {
        (Some(before), Some(after)) => {
            let count = after - before;
            format!(", {:.1} us for each of {count} chains", time_us as f64 / count as f64)
        }
        _ => String::new(),
    };
    let rate = CONSOLE_BYTES as f64 / time_us as f64;
    let lost = CONSOLE_BYTES - came;
    eprintln!(
        "{name}: {rate:.1} MB/s out of the console, of which {lost} bytes were lost{of_each}"
    );

    let out = timed(process, || {
        guest.begin(&format!("write one {len_bytes} {STEP_BYTES}"));
        take(&mut data, len_bytes);
        guest.find_answer();
    });
    out.print(name, "out of a port", len_bytes);
    let into = timed(process, || {
        guest.begin(&format!("swallow one {len_bytes}"));
        give(&mut data, len_bytes);
        guest.find_answer();
    });
    into.print(name, "into a port", len_bytes);

    if let Some(server) = server {
        let before = switches(server.id());
        guest.run_for(IDLE);
        let count = switches(server.id()) - before;
        eprintln!("{name}: {count} context switches in {IDLE:?} with nothing to do");
    }
}

fn type_key(console: &mut Client) -> Duration {
    let mut key = *b"k";
    let started = Instant::now();
    console.stream().write_all(&key).expect("the other end reads");
    console.stream().read_exact(&mut key).expect("the key is echoed");
    assert_eq!(&key, b"k");
    started.elapsed()
}

/// Reads what the guest writes to its console, until there is nothing and it has ended; how much that was.
fn take_what_comes(from: &mut Client, is_over: &AtomicBool) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    let mut came = 0;
    from.stream().set_read_timeout(Some(PAUSE)).expect("a socket takes a time limit");
    loop {
        // Looked at first: what was written before has come by then.
        let was_over = is_over.load(Ordering::Relaxed);
        match from.stream().read(&mut buffer) {
            Ok(0) => panic!("the other end has hung up"),
            Ok(count) => came += count as u64,
            Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
            Err(_) if was_over => break,
            Err(_) => {}
        }
    }
    from.stream().set_read_timeout(Some(LIMIT)).expect("a socket takes a time limit");
    came
}

fn take(from: &mut Client, len_bytes: u64) {
    let mut buffer = vec![0; 1 << 20];
    let mut left = len_bytes;
    while left > 0 {
        let count = from.stream().read(&mut buffer).expect("the other end writes") as u64;
        assert!(count > 0 && count <= left, "{count} bytes where {left} are left");
        left -= count;
    }
}

fn give(to: &mut Client, len_bytes: u64) {
    let buffer = vec![0; 1 << 20];
    let mut left = len_bytes;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
        to.stream().write_all(&buffer[..step]).expect("the other end reads");
        left -= step as u64;
    }
}

/// What something took.
struct Cost {
    time: Duration,
    processor_seconds: f64,
}

impl Cost {
    fn print(&self, name: &str, what: &str, len_bytes: u64) {
        let rate = len_bytes as f64 / self.time.as_secs_f64() / 1e6;
        let per_gib = self.processor_seconds * (1 << 30) as f64 / len_bytes as f64;
        eprintln!("{name}: {rate:.0} MB/s {what}, {per_gib:.2} CPU seconds per GiB");
    }
}

fn timed(process: u32, work: impl FnOnce()) -> Cost {
    let before = processor_seconds(process);
    let started = Instant::now();
    work();
    Cost { time: started.elapsed(), processor_seconds: processor_seconds(process) - before }
}

/// What a process has used of processors.
fn processor_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    // The name, in brackets, may have spaces; the fields after it are counted from the third (proc(5)).
    let (_, fields) = stat.rsplit_once(") ").expect("it has a name");
    let ticks = |index| -> f64 {
        let field = fields.split(' ').nth(index).expect("it has all fields");
        field.parse().expect("a number")
    };
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

/// How often the threads of a process have been given a processor.
fn switches(process: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{process}/task")).expect("it runs");
    let of_thread = |status: String| -> u64 {
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum()
    };
    threads
        .map(|thread| thread.expect("a listed entry").path().join("status"))
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(of_thread)
        .sum()
}
