//! Limits of rate as a guest finds them: set over the control socket while the guest runs, measured by its fio.
//!
//! Contract: what was measured is printed, in a table, also where the test passes: how near it is to what was asked for depends on
//! how busy the machine is, and only a person can judge that. What is asserted no noise can break: between any two looks at the
//! daemon's counters, by the host's clock, it has completed no more requests than the limit lets through. The guest's clock is
//! no witness: User-Mode Linux' loses time on a busy host (2.55 s of at least 2.77 s was seen), in which requests go on.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use guest::announcement::{Announcement, MOST_IN_FLIGHT, Measurement};
use serde_json::json;
use tests::Machine;

use crate::control;
use crate::statistics::Statistics;

/// What the daemon saves up for who comes late: what the rate gives in this time, and one request.
const TOLERANCE: Duration = Duration::from_millis(5);
/// How long after a look at the counters the next one is taken, until the guest has done.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// What fio counts windows of, as many in a second.
const WINDOWS_A_SECOND: f64 = 10.0;

/// What is asked for: a limit on operations or bytes, and requests of one length.
#[derive(Clone, Copy, Debug)]
struct Run {
    iops: Option<u64>,
    bytes_a_second: Option<u64>,
    request_bytes: u64,
}

const RUNS: [Run; 4] = [
    // What the guest can do without a limit, without which the others say nothing.
    Run { iops: None, bytes_a_second: None, request_bytes: 4 << 10 },
    Run { iops: Some(200), bytes_a_second: None, request_bytes: 4 << 10 },
    Run { iops: Some(2000), bytes_a_second: None, request_bytes: 4 << 10 },
    Run { iops: None, bytes_a_second: Some(4 << 20), request_bytes: 64 << 10 },
];

impl Run {
    /// Requests that the limit gives in a second, if there is one.
    fn rate(&self) -> Option<f64> {
        let by_bytes = || Some(self.bytes_a_second? as f64 / self.request_bytes as f64);
        self.iops.map(|iops| iops as f64).or_else(by_bytes)
    }

    /// Requests that may begin at once: what was saved up, and one for each queue, which keeps its place when it comes too late
    /// (common/src/rate_limit.rs).
    fn burst(&self, queue_count: u16) -> Option<f64> {
        Some(self.rate()? * TOLERANCE.as_secs_f64() + 1.0 + f64::from(queue_count))
    }
}

/// Has the machine, which runs the check "rate", measure each limit; prints a table of what came of it.
pub(crate) fn measure(machine: &mut Machine, control: &Path, title: &str, queue_count: u16) {
    assert_eq!(machine.expect_announcement(), Announcement::Loaded);
    let mut table = format!(
        "\n{title:<16} {:>9} {:>9} {:>7}   requests per 100 ms: asked, least, most\n",
        "asked/s", "found/s", "ratio"
    );
    for run in RUNS {
        let limit = |limit: Option<u64>| limit.map_or("none".to_owned(), |rate| rate.to_string());
        let command = json!({
            "command": "limit",
            "iops": limit(run.iops),
            "bps": limit(run.bytes_a_second),
        });
        // The guest is idle: all that is counted from here on was let through by this limit.
        let idle = Look::take(control);
        control::ask(control, &command);
        let (found, looks) = thread::scope(|scope| {
            let (end, ended) = mpsc::channel();
            let looks = scope.spawn(move || look_until(control, idle, &ended));
            machine.type_line(&run.request_bytes.to_string());
            let Announcement::Measured(found) = machine.expect_announcement() else {
                panic!("a measurement is expected:\n{}", machine.console());
            };
            drop(end);
            (found, looks.join().expect("the daemon tells what it has counted"))
        });
        add_row(&mut table, &run, &found);
        let counted = looks.last().map_or(0, |last| last.requests - idle.requests);
        assert!(counted >= found.requests, "{counted} requests are counted of {found:?}");
        expect_no_more_than_allowed(&run, &looks, queue_count);
    }
    machine.type_line("end");
    // Not by a macro: what those print is shown for failed tests only.
    std::io::stderr().write_all(table.as_bytes()).expect("stderr can be written");
}

/// A look at the daemon's counters, which is some time between two moments of the host's clock.
#[derive(Clone, Copy, Debug)]
struct Look {
    asked: Instant,
    answered: Instant,
    /// The reads and writes that it has completed.
    requests: u64,
}

impl Look {
    fn take(control: &Path) -> Self {
        let asked = Instant::now();
        let statistics = Statistics::ask(control);
        let requests = statistics.requests("read") + statistics.requests("write");
        Self { asked, answered: Instant::now(), requests }
    }
}

/// Looks from time to time, for the last time after the other end of `ended` is dropped.
fn look_until(control: &Path, first: Look, ended: &Receiver<()>) -> Vec<Look> {
    let mut looks = vec![first];
    loop {
        let has_ended = ended.recv_timeout(LOOK_INTERVAL) != Err(RecvTimeoutError::Timeout);
        looks.push(Look::take(control));
        if has_ended {
            return looks;
        }
    }
}

/// Fails if between any two looks, of which the first is from before the run, more requests were completed than its limit lets
/// through.
fn expect_no_more_than_allowed(run: &Run, looks: &[Look], queue_count: u16) {
    let (Some(rate), Some(burst)) = (run.rate(), run.burst(queue_count)) else { return };
    for (index, from) in looks.iter().enumerate() {
        // Let through before the look: what was in flight, and what the worker went on to take by a time from before it.
        let before = if index == 0 { 0.0 } else { MOST_IN_FLIGHT as f64 + burst };
        for to in &looks[index + 1..] {
            let (requests, time) = (to.requests - from.requests, to.answered - from.asked);
            assert!(
                requests as f64 <= rate * time.as_secs_f64() + burst + before,
                "{run:?} lets {requests} requests through in {time:?}, at most {before} of them before"
            );
        }
    }
}

fn add_row(table: &mut String, run: &Run, found: &Measurement) {
    let what = match run.bytes_a_second {
        Some(rate) => format!("{} KiB/s", rate >> 10),
        None => format!("{} B each", run.request_bytes),
    };
    let rate = found.requests as f64 / (found.time_us as f64 / 1e6);
    let (asked, ratio, even) = match run.rate() {
        Some(asked) => {
            let even = asked / WINDOWS_A_SECOND;
            (format!("{asked:.0}"), format!("{:.3}", rate / asked), format!("{even:.1}"))
        }
        None => ("any".into(), String::new(), "any".into()),
    };
    let windows = format!("{even:>6} {:>6} {:>6}", found.least_in_window, found.most_in_window);
    writeln!(table, "{what:<16} {asked:>9} {rate:>9.1} {ratio:>7}   {windows}")
        .expect("a string takes any text");
}
