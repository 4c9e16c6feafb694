//! What the disk does in a second, measured by fio: for each line on the console, which says how long requests are, a run.
//!
//! fio's log has each request with its length, the time it ended and the time it took. From that come the numbers that are
//! announced; judging them is the host's part, which alone knows the limits.

use std::fs;
use std::io;
use std::process::Command;

use guest::announcement::{Announcement, MOST_IN_FLIGHT, Measurement};

use super::{Failure, attribute_path, run_program};
use crate::parameters::Parameters;

/// Long enough for hundreds of requests at the lowest rate that the host sets.
const RUN_SECONDS: u64 = 2;
/// Jobs that run side by side, for every queue to have requests.
const JOB_COUNT: u64 = 4;
/// Requests that each job keeps in flight: more than the disk may start in the time that they take.
const DEPTH: u64 = MOST_IN_FLIGHT / JOB_COUNT;
/// Windows in which completions are counted, in milliseconds: what stands out here is felt by who waits.
const WINDOW_MS: u64 = 100;
/// Where fio has its logs: `rate_lat.1.log` and so on, a job each.
const LOG: &str = "/rate";

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    // The limits are of the disk's requests, of which merged ones are one.
    fs::write(attribute_path(parameters, "queue/nomerges")?, "2")?;
    println!("{}", Announcement::Loaded);
    for (runs, line) in io::stdin().lines().enumerate() {
        let line = line?;
        if line == "end" {
            return Ok(format!("{runs} runs"));
        }
        println!("{}", Announcement::Measured(measure(parameters, line.trim().parse()?)?));
    }
    Err("the console is closed".into())
}

fn measure(parameters: &Parameters, request_bytes: u64) -> Result<Measurement, Failure> {
    run_program(
        Command::new("/usr/bin/fio")
            .args(["--name=rate", "--thread", "--direct=1", "--ioengine=libaio", "--eta=never"])
            .args(["--rw=randrw", "--norandommap", "--time_based", "--output=/dev/null"])
            // Its own choice, the processor's counter, is calibrated anew by each run.
            .arg("--clocksource=clock_gettime")
            .arg(format!("--numjobs={JOB_COUNT}"))
            .arg(format!("--iodepth={DEPTH}"))
            .arg(format!("--bs={request_bytes}"))
            .arg(format!("--runtime={RUN_SECONDS}"))
            .arg(format!("--write_lat_log={LOG}"))
            .arg(format!("--filename={}", parameters.disk.display())),
    )?;
    let mut requests = Vec::new();
    for job in 1..=JOB_COUNT {
        let log = fs::read_to_string(format!("{LOG}_lat.{job}.log"))?;
        for line in log.lines() {
            requests.push(Request::parse(line)?);
        }
    }
    summarize(&requests).ok_or_else(|| "fio has made no request".into())
}

/// A request of the log, in nanoseconds since fio began.
struct Request {
    began_ns: u64,
    ended_ns: u64,
}

impl Request {
    /// Reads a line, "time in ms, latency in ns, direction, length, …" (fio's manual, "Log File Formats").
    fn parse(line: &str) -> Result<Self, Failure> {
        let mut fields = line.split(", ");
        let mut number = || -> Result<u64, Failure> {
            Ok(fields.next().ok_or_else(|| format!("no log line: {line}"))?.trim().parse()?)
        };
        let (ended_ms, latency_ns) = (number()?, number()?);
        // The time is rounded down. What it may have been more makes the request longer here, so that a run does not seem
        // shorter, and the disk faster, than it was.
        Ok(Self {
            began_ns: (ended_ms * 1_000_000).saturating_sub(latency_ns),
            ended_ns: (ended_ms + 1) * 1_000_000,
        })
    }
}

fn summarize(requests: &[Request]) -> Option<Measurement> {
    let began_ns = requests.iter().map(|request| request.began_ns).min()?;
    let ended_ns = || requests.iter().map(|request| request.ended_ns);
    let (first_ns, last_ns) = (ended_ns().min()?, ended_ns().max()?);
    // The last window is cut off by the end of the run, and does not count.
    let window_of = |ended_ns: u64| ((ended_ns - first_ns) / (WINDOW_MS * 1_000_000)) as usize;
    let mut windows = vec![0; window_of(last_ns)];
    for ended in ended_ns() {
        if let Some(count) = windows.get_mut(window_of(ended)) {
            *count += 1;
        }
    }
    Some(Measurement {
        requests: requests.len() as u64,
        time_us: (last_ns - began_ns) / 1000,
        least_in_window: windows.iter().min().copied()?,
        most_in_window: windows.iter().max().copied()?,
    })
}

#[cfg(test)]
mod tests {
    use super::{Request, summarize};

    #[test]
    fn requests_count_from_the_first_beginning_to_the_last_end() {
        // Two at once, then one every 10 ms; the last window is cut off.
        let log = ["99, 50000000, 0, 4096, 0", "99, 20000000, 1, 4096, 0"];
        let log = log.into_iter().map(str::to_owned);
        let log: Vec<_> = log
            .chain((1..=25).map(|step| format!("{}, 9000000, 0, 4096, 0", 99 + step * 10)))
            .map(|line| Request::parse(&line).expect("a line of fio's"))
            .collect();
        let found = summarize(&log).expect("there are requests");
        assert_eq!(found.requests, 27);
        assert_eq!(found.time_us, 301_000);
        assert_eq!((found.least_in_window, found.most_in_window), (10, 11));
    }

    #[test]
    fn a_line_without_numbers_is_no_request() {
        assert!(Request::parse("99").is_err());
        assert!(Request::parse("fio, 1, 0, 4096").is_err());
    }
}
