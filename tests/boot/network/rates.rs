//! Limits of rate as a guest's network finds them: set over the control socket while the guest runs, with iperf3 as the load.
//!
//! Contract: as in `limits.rs`. What was found is printed, in a table, for a person to judge; what is asserted no noise can
//! break: by the host's clock, the daemon has let no more through since a limit was set than that gives.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::control;
use crate::dialogue::Guest;
use crate::statistics::Statistics;

/// What the daemon saves up for who comes late: what the rate gives in this time, and one frame.
const TOLERANCE: Duration = Duration::from_millis(5);
/// How long after a look at the counters the next one is taken, until the guest has done.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// The longest frame, with which a limit of bytes is met as with the shortest.
const LONGEST_FRAME_BYTES: u64 = 66_000;

/// A limit, and the load that meets it.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// `tx` or `rx`, as the guest sees it.
    direction: &'static str,
    /// As the daemon counts it.
    kind: &'static str,
    what: Unit,
    rate: u64,
    /// Of iperf3 in the guest.
    options: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Frames,
    Bytes,
}

const SMALL: &str = "--udp --bitrate 40M --length 1000 --time 1";
const SMALL_IN: &str = "--udp --bitrate 40M --length 1000 --time 1 --reverse";
const RUNS: [Run; 4] = [
    Run { direction: "tx", kind: "transmit", what: Unit::Frames, rate: 1000, options: SMALL },
    Run { direction: "rx", kind: "receive", what: Unit::Frames, rate: 1000, options: SMALL_IN },
    Run {
        direction: "tx",
        kind: "transmit",
        what: Unit::Bytes,
        rate: 8 << 20,
        options: "--time 1",
    },
    Run {
        direction: "rx",
        kind: "receive",
        what: Unit::Bytes,
        rate: 8 << 20,
        options: "--time 1 --reverse",
    },
];

impl Run {
    fn unit(&self) -> &'static str {
        match self.what {
            Unit::Frames => "frames",
            Unit::Bytes => "bytes",
        }
    }

    /// What the daemon has let through.
    fn count(&self, statistics: &Statistics) -> u64 {
        match self.what {
            Unit::Frames => statistics.requests(self.kind),
            Unit::Bytes => statistics.bytes(self.kind),
        }
    }

    /// What may pass at once: what was saved up, and a frame on top, which is let through when anything is left.
    fn burst(&self) -> f64 {
        let frame = match self.what {
            Unit::Frames => 1,
            Unit::Bytes => LONGEST_FRAME_BYTES,
        };
        self.rate as f64 * TOLERANCE.as_secs_f64() + 2.0 * frame as f64
    }
}

/// Has the guest load its network, whose other end at `peer` serves iperf3, under each limit; prints a table of what came of it.
pub(crate) fn measure(guest: &mut Guest, peer: &str, control: &Path) {
    let mut table = format!(
        "\n{:<9} {:>10} {:>11} {:>6} {:>10}\n",
        "limit", "asked/s", "found/s", "ratio", "waits"
    );
    for run in RUNS {
        limit(control, run.direction, &format!("{}={}", run.unit(), run.rate));
        // The guest is idle: all that is counted from here on was let through by this limit.
        let (began, idle) = (Instant::now(), Statistics::ask(control));
        let looks = thread::scope(|scope| {
            let (end, ended) = mpsc::channel();
            let looks = scope.spawn(move || look_until(control, &ended));
            guest.load(&format!("{peer} {}", run.options));
            drop(end);
            looks.join().expect("the daemon tells what it has counted")
        });
        for (answered, statistics) in &looks {
            let (passed, time) = (run.count(statistics) - run.count(&idle), *answered - began);
            let allowed = run.rate as f64 * time.as_secs_f64() + run.burst();
            assert!(passed as f64 <= allowed, "{run:?} lets {passed} through in {time:?}");
        }
        let Some((answered, last)) = looks.last() else { continue };
        let waits = last.all_queues("throttled") - idle.all_queues("throttled");
        assert!(waits > 0, "{run:?} was never met");
        let found = (run.count(last) - run.count(&idle)) as f64 / (*answered - began).as_secs_f64();
        let name = format!("{} {}", run.direction, run.unit());
        let ratio = found / run.rate as f64;
        writeln!(table, "{name:<9} {:>10} {found:>11.1} {ratio:>6.3} {waits:>10}", run.rate)
            .expect("a string takes any text");
        limit(control, run.direction, &format!("{}=none", run.unit()));
    }
    // Not by a macro: what those print is shown for failed tests only.
    std::io::stderr().write_all(table.as_bytes()).expect("stderr can be written");
}

fn limit(control: &Path, direction: &str, rate: &str) {
    control::ask(control, &json!({ "command": "limit", direction: rate }));
}

/// Looks from time to time, for the last time after the other end of `ended` is dropped.
fn look_until(control: &Path, ended: &Receiver<()>) -> Vec<(Instant, Statistics)> {
    let mut looks = Vec::new();
    loop {
        let has_ended = ended.recv_timeout(LOOK_INTERVAL) != Err(RecvTimeoutError::Timeout);
        let statistics = Statistics::ask(control);
        looks.push((Instant::now(), statistics));
        if has_ended {
            return looks;
        }
    }
}
