//! `conformance`: what the conformance suite says of a back end, ours or another.
//!
//! The cases are the test functions of the suite (`tests/conformance`), and stay that: this program
//! has cargo build the suite, runs each case in a process of its own, and reads what it prints. A
//! case that hangs is ended after [`CASE_LIMIT`], with everything that it has started: case and back
//! end are one process group, and their files are in a directory that goes with them.
//!
//! It knows nothing of vhost-user, nor which case is about what: a case says by itself when it is
//! about something that the back end does not have.

mod verdict;

use crate::verdict::Verdict;
use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Time for one case: many times what any takes of a back end that works, with several waits for
/// one that answers nothing.
const CASE_LIMIT: Duration = Duration::from_secs(120);
/// Differences that are told of one case; the others are counted.
const DIFFERENCES_TOLD: usize = 3;
/// The suite reads the other back end's command line from here.
const COMMAND_VARIABLE: &str = "OUTBOARD_CONFORMANCE_COMMAND";

/// Runs the conformance suite against a vhost-user-blk back end and prints a verdict for each case.
///
/// "passed": the back end does what the specifications demand and survives what the case does to it;
/// "differs" lines tell what it does otherwise than vhost-blk promises to, which no specification
/// forbids. "failed": it died, hung, mixed up data, or does not do what is demanded. "not
/// applicable": the case is about vhost-blk's own command line, about what vhost-blk alone promises,
/// or about something that the back end does not offer or this machine does not have. The exit
/// status is 0 if no case failed, 1 if one did, 2 if they could not be run.
///
/// Needs cargo and the project's tree, from which the suite is built.
#[derive(Debug, Parser)]
struct Options {
    /// Command line of the back end, for `sh`; by default this tree's vhost-blk.
    ///
    /// $SOCKET and $IMAGE stand for the paths of the socket to listen on and of the raw image to
    /// serve (16 MiB, zeroes). The back end must stay in the foreground, and offer two queues and a
    /// disk that can be written. It is started anew for each case.
    #[arg(long, value_name = "COMMAND LINE")]
    command: Option<String>,
    /// Print the names of the cases, and run none.
    #[arg(long)]
    list: bool,
    /// Run only cases whose name has one of these in it, such as `hostile_` or `rings::indexes_wrap`.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

/// Why the cases cannot be run.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot run {program}")]
    Start { program: String, source: io::Error },
    #[error("{what} failed")]
    Build { what: &'static str },
    #[error("cargo does not say where the suite is")]
    Lost,
    #[error("no case has {filters:?} in its name; --list tells what there is")]
    NoCase { filters: Vec<String> },
    #[error("cannot prepare case {name}")]
    Prepare { name: String, source: io::Error },
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let cause = std::error::Error::source(&error);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("conformance: {error}{cause}");
            ExitCode::from(2)
        }
    }
}

/// Whether no case failed.
fn run(options: &Options) -> Result<bool, Failure> {
    let suite = build(options)?;
    let cases = cases(&suite, &options.filters)?;
    if options.list {
        cases.iter().for_each(|name| println!("{name}"));
        return Ok(true);
    }
    let mut totals = BTreeMap::new();
    judge_all(&suite, options.command.as_deref(), &cases, |name, verdict| {
        print_verdict(name, verdict);
        let (suite, _) = name.split_once("::").unwrap_or((name, ""));
        totals.entry(suite.to_owned()).or_insert_with(Total::default).add(verdict);
    })?;
    print_totals(&totals);
    Ok(totals.values().all(|total| total.failed == 0))
}

/// Builds the suite, and our daemon if that is what it is to run against; the suite's program.
fn build(options: &Options) -> Result<PathBuf, Failure> {
    if options.command.is_none() && !options.list && std::env::var_os("OUTBOARD_BIN_DIR").is_none()
    {
        let mut daemon = cargo(&["build", "--quiet", "-p", "vhost-blk"]);
        let status = daemon.status().map_err(|source| cannot_start("cargo", source))?;
        if !status.success() {
            return Err(Failure::Build { what: "building vhost-blk" });
        }
    }
    let mut command = cargo(&["test", "--quiet", "-p", "tests", "--test", "conformance"]);
    command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|source| cannot_start("cargo", source))?;
    if !output.status.success() {
        return Err(Failure::Build { what: "building the suite" });
    }
    String::from_utf8_lossy(&output.stdout).lines().find_map(suite_in).ok_or(Failure::Lost)
}

/// The suite's program, if this message of cargo's names it.
fn suite_in(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let target = &message["target"];
    let is_suite = target["name"] == "conformance" && target["kind"][0] == "test";
    is_suite.then(|| message["executable"].as_str().map(PathBuf::from))?
}

/// Cargo, in the project's tree and for the profile that this program was built in.
fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command
}

fn cannot_start(program: &str, source: io::Error) -> Failure {
    Failure::Start { program: program.to_owned(), source }
}

/// The names of the cases that are asked for.
fn cases(suite: &Path, filters: &[String]) -> Result<Vec<String>, Failure> {
    let output = Command::new(suite).args(["--list", "--format", "terse"]).output();
    let output = output.map_err(|source| cannot_start(&suite.display().to_string(), source))?;
    let wanted = |name: &&str| {
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text.lines().filter_map(|line| line.strip_suffix(": test"));
    let cases: Vec<String> = names.filter(wanted).map(str::to_owned).collect();
    if cases.is_empty() { Err(Failure::NoCase { filters: filters.to_vec() }) } else { Ok(cases) }
}

/// Runs the cases, one a processor at a time, and tells of each in their order.
fn judge_all(
    suite: &Path,
    command: Option<&str>,
    cases: &[String],
    mut tell: impl FnMut(&str, &Verdict),
) -> Result<(), Failure> {
    let at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let (sender, verdicts) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                while let Some((index, name)) = take(next, cases) {
                    if sender.send((index, judge(suite, command, name))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut told = 0;
        for (index, verdict) in verdicts {
            early.insert(index, verdict?);
            while let Some(verdict) = early.remove(&told) {
                tell(&cases[told], &verdict);
                told += 1;
            }
        }
        Ok(())
    })
}

fn take<'a>(next: &AtomicUsize, cases: &'a [String]) -> Option<(usize, &'a String)> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    cases.get(index).map(|name| (index, name))
}

/// Runs one case to its end, or to the end of its time.
fn judge(suite: &Path, command: Option<&str>, name: &str) -> Result<Verdict, Failure> {
    let prepare = |source| Failure::Prepare { name: name.to_owned(), source };
    let directory = ::tests::temp_dir();
    let log = directory.path().join("stderr");
    let stderr = File::create(&log).map_err(prepare)?;
    let mut case = Command::new(suite);
    case.args(["--exact", name, "--nocapture", "--test-threads", "1"])
        // What a killed case leaves in its temporary directories goes with ours.
        .env("TMPDIR", directory.path())
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .process_group(0);
    match command {
        Some(command) => case.env(COMMAND_VARIABLE, command),
        None => case.env_remove(COMMAND_VARIABLE),
    };
    let mut case = case.spawn().map_err(prepare)?;
    let ended = ends_within(&case, CASE_LIMIT);
    // Before it is waited for, while its id is certainly its own. What a case leaves behind is none
    // of ours but in its group; one that cleaned up has only itself there.
    let _ = kill_process_group(Pid::from_child(&case), Signal::KILL);
    let status = case.wait().map_err(prepare)?;
    if !ended {
        return Ok(Verdict::Failed(format!("no end within {} s", CASE_LIMIT.as_secs())));
    }
    let stderr = std::fs::read(&log).map_err(prepare)?;
    Ok(Verdict::of(status.success(), &String::from_utf8_lossy(&stderr)))
}

/// Whether the process ends in time. It is not waited for: its id stays taken.
fn ends_within(child: &Child, limit: Duration) -> bool {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .expect("the kernel has pidfd_open (Linux 5.3)");
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a case's time is short");
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("cannot poll: {error}"),
        }
    }
}

fn print_verdict(name: &str, verdict: &Verdict) {
    match verdict {
        Verdict::Passed { differences } => {
            println!("passed          {name}");
            differences
                .iter()
                .take(DIFFERENCES_TOLD)
                .for_each(|line| println!("  differs: {line}"));
            let more = differences.len().saturating_sub(DIFFERENCES_TOLD);
            if more > 0 {
                println!("  and {more} more like that");
            }
        }
        Verdict::Failed(why) => println!("FAILED          {name}\n  {why}"),
        Verdict::NotApplicable(why) => println!("not applicable  {name}: {why}"),
    }
}

/// Verdicts of a suite.
#[derive(Debug, Default)]
struct Total {
    passed: usize,
    differing: usize,
    failed: usize,
    not_applicable: usize,
}

impl Total {
    fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Passed { differences } => {
                self.passed += 1;
                self.differing += usize::from(!differences.is_empty());
            }
            Verdict::Failed(_) => self.failed += 1,
            Verdict::NotApplicable(_) => self.not_applicable += 1,
        }
    }
}

fn print_totals(totals: &BTreeMap<String, Total>) {
    let line = |name: &str, cells: [&dyn std::fmt::Display; 4]| {
        let [passed, differing, failed, not_applicable] = cells;
        println!("{name:<22}{passed:>8}{differing:>11}{failed:>8}{not_applicable:>16}");
    };
    println!();
    line("suite", [&"passed", &"differing", &"failed", &"not applicable"]);
    let mut all = Total::default();
    for (name, total) in totals {
        line(name, [&total.passed, &total.differing, &total.failed, &total.not_applicable]);
        all.passed += total.passed;
        all.differing += total.differing;
        all.failed += total.failed;
        all.not_applicable += total.not_applicable;
    }
    line("all", [&all.passed, &all.differing, &all.failed, &all.not_applicable]);
}

#[cfg(test)]
mod tests {
    use super::{Options, suite_in};
    use clap::CommandFactory;

    #[test]
    fn options_are_well_formed() {
        Options::command().debug_assert();
    }

    #[test]
    fn suite_is_found_among_cargo_s_messages() {
        let suite = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"conformance"},"executable":"/x/conformance-1"}"#;
        assert_eq!(suite_in(suite), Some("/x/conformance-1".into()));
        let program = suite.replace(r#"["test"]"#, r#"["bin"]"#);
        assert_eq!(suite_in(&program), None);
        assert_eq!(suite_in("no JSON"), None);
    }
}
