//! Limits of rate as a guest finds them: set over the control socket while the guest runs, measured by its fio.
//!
//! Contract: what was measured is printed, in a table, also where the test passes: how near it is to what was asked for depends on
//! how busy the machine is, and only a person can judge that. What is asserted no noise can break: no more requests than the
//! limit lets through in the time from the first one's beginning to the last one's end.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use guest::announcement::{Announcement, Measurement};
use serde_json::json;
use tests::Machine;

use crate::control;

/// What the daemon saves up for who comes late: what the rate gives in this time, and one request.
const TOLERANCE_US: u64 = 5_000;
/// How wrong a guest's clock may be: its kernel has measured, while it booted, how fast its clock runs.
const CLOCK_ERROR: f64 = 0.02;
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

    /// The most requests that may go in this time: the rate's, what was saved up, and one for each queue, which keeps its
    /// place when it comes too late (common/src/rate_limit.rs).
    fn most(&self, time_us: u64, queue_count: u16) -> Option<f64> {
        let per_us = self.rate()? / 1e6;
        let saved_up = per_us * TOLERANCE_US as f64 + 1.0;
        Some(per_us * time_us as f64 * (1.0 + CLOCK_ERROR) + saved_up + f64::from(queue_count))
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
        control::ask(control, &command);
        machine.type_line(&run.request_bytes.to_string());
        let Announcement::Measured(found) = machine.expect_announcement() else {
            panic!("a measurement is expected:\n{}", machine.console());
        };
        add_row(&mut table, &run, &found);
        if let Some(most) = run.most(found.time_us, queue_count) {
            assert!(found.requests as f64 <= most, "{run:?} lets {found:?} through");
        }
    }
    machine.type_line("end");
    // Not by a macro: what those print is shown for failed tests only.
    std::io::stderr().write_all(table.as_bytes()).expect("stderr can be written");
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
