//! The log: one line a message, on stderr.
//!
//! Under systemd, where stderr is the journal, each line carries its priority (`<4>`, sd-daemon(3))
//! and no time, for the journal stamps it; elsewhere it carries time and level in words. It
//! deliberately never colours, writes no file and reads no environment variable for its level:
//! `--log-level` is the one switch.
//!
//! Who is outside (a guest, a front end) must not fill the operator's disk: what they can cause
//! again and again goes through a [`RateLimit`].

use std::error::Error;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber, warn};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, SubscriberBuilder};
use tracing_subscriber::registry::LookupSpan;

use super::options::LogLevel;

/// Starts logging. To be called once, before anything logs.
pub fn start(level: LogLevel) {
    let filter = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let journal = std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stderr_is(&stream));
    // A reader of stderr that has gone away must not end the daemon: without this, the subscriber
    // reports its failed write with eprintln!, which panics when stderr cannot be written to.
    let builder = SubscriberBuilder::default()
        .with_max_level(filter)
        .with_writer(io::stderr)
        .log_internal_errors(false);
    if journal {
        builder.event_format(JournalLine).init();
    } else {
        builder.with_target(false).init();
    }
}

/// The time, in UTC, as the log has it (RFC 3339 with microseconds).
pub fn time_now() -> String {
    let mut now = String::new();
    // Writing to memory does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut now));
    now
}

/// Whether stderr is the stream that `JOURNAL_STREAM` names by device and inode: the variable is
/// inherited by processes whose stderr goes elsewhere.
fn stderr_is(stream: &str) -> bool {
    rustix::fs::fstat(io::stderr())
        .is_ok_and(|stderr| format!("{}:{}", stderr.st_dev, stderr.st_ino) == stream)
}

/// A line as the journal wants it on a stream: `<priority>message`.
struct JournalLine;

impl<S, N> FormatEvent<S, N> for JournalLine
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(out, "<{}>", priority(event.metadata().level()))?;
        context.field_format().format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

/// syslog(3)'s numbers; the journal has no priority below debug.
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// Lets at most so many messages of one kind pass per interval, and tells how many it held back.
#[derive(Debug)]
pub struct RateLimit {
    per_interval: u32,
    interval: Duration,
    /// When the current interval began; none before the first message.
    began: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

/// What a [`RateLimit`] decided about a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    /// Log it; before it, so many were suppressed that nobody has been told of.
    Pass {
        suppressed_before: u64,
    },
    Suppress,
}

impl RateLimit {
    /// A gate that admits `per_interval` messages in each `interval`.
    pub const fn new(per_interval: u32, interval: Duration) -> Self {
        Self { per_interval, interval, began: None, passed: 0, suppressed: 0 }
    }

    /// Calls `write`, which is to log one message, unless too many were logged lately. The first
    /// message of a new interval is preceded by a line that says how many were suppressed in the
    /// one before.
    pub fn log(&mut self, now: Instant, write: impl FnOnce()) {
        if let Admission::Pass { suppressed_before } = self.admit(now) {
            if suppressed_before > 0 {
                warn!(suppressed = suppressed_before, "messages like the next one were suppressed");
            }
            write();
        }
    }

    /// Whether what is no message may pass.
    pub(super) fn passes(&mut self, now: Instant) -> bool {
        matches!(self.admit(now), Admission::Pass { .. })
    }

    fn admit(&mut self, now: Instant) -> Admission {
        if self.began.is_none_or(|began| now.saturating_duration_since(began) >= self.interval) {
            self.began = Some(now);
            self.passed = 0;
        }
        if self.passed >= self.per_interval {
            self.suppressed += 1;
            return Admission::Suppress;
        }
        self.passed += 1;
        Admission::Pass { suppressed_before: std::mem::take(&mut self.suppressed) }
    }
}

/// An error and its sources, each said once, outermost first.
pub fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::{Admission, LogLevel, RateLimit};

    const PASS: Admission = Admission::Pass { suppressed_before: 0 };

    #[test]
    fn flood_passes_its_share_per_interval_and_the_rest_is_counted() {
        let mut limit = RateLimit::new(3, Duration::from_secs(10));
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let first: Vec<Admission> = (0..1000).map(|ms| limit.admit(at(ms))).collect();
        assert_eq!(first[..3], [PASS; 3]);
        assert!(first[3..].iter().all(|admission| *admission == Admission::Suppress));
        assert_eq!(limit.admit(at(9_999)), Admission::Suppress);
        assert_eq!(limit.admit(at(10_000)), Admission::Pass { suppressed_before: 998 });
        assert_eq!(limit.admit(at(10_001)), PASS);
    }

    #[test]
    fn messages_slower_than_the_limit_all_pass() {
        let mut limit = RateLimit::new(1, Duration::from_secs(1));
        let start = Instant::now();
        assert!((0..100).all(|second| limit.admit(start + Duration::from_secs(second)) == PASS));
    }

    #[test]
    fn suppressed_message_is_not_written() {
        let mut limit = RateLimit::new(2, Duration::from_secs(1));
        let now = Instant::now();
        let mut written = 0;
        (0..10).for_each(|_| limit.log(now, || written += 1));
        assert_eq!(written, 2);
    }

    /// Set for the process that a test starts to log in its place: a process has one log, and tests
    /// share theirs.
    const CHILD: &str = "OUTBOARD_TEST_LOG_CHILD";
    /// Set when the child shall find its stderr named by `JOURNAL_STREAM`; a shell fills the
    /// variable in.
    const JOURNAL: &str = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$@\"";

    fn log_of_child(test: &str, script: &str) -> String {
        let child = Command::new("/bin/sh")
            .args(["-c", script, "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", &format!("daemon::log::tests::{test}")])
            .env(CHILD, "1")
            .env("JOURNAL_STREAM", "0:0")
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        String::from_utf8(child.stderr).unwrap()
    }

    fn log_a_line_of_each_level() {
        super::start(LogLevel::Debug);
        tracing::error!(fd = 3, "cannot open");
        tracing::warn!("careful");
        tracing::info!("listening");
        tracing::debug!("message");
        tracing::trace!("step");
    }

    #[test]
    fn journal_lines_begin_with_their_priority() {
        if std::env::var_os(CHILD).is_some() {
            return log_a_line_of_each_level();
        }
        let log = log_of_child("journal_lines_begin_with_their_priority", JOURNAL);
        assert_eq!(log, "<3>cannot open fd=3\n<4>careful\n<6>listening\n<7>message\n");
    }

    #[test]
    fn stderr_that_is_not_the_journal_gets_time_and_level_in_words() {
        if std::env::var_os(CHILD).is_some() {
            return log_a_line_of_each_level();
        }
        let log = log_of_child(
            "stderr_that_is_not_the_journal_gets_time_and_level_in_words",
            "exec \"$@\"",
        );
        let lines: Vec<&str> = log.lines().collect();
        assert_eq!(lines.len(), 4, "{log}");
        let (time, rest) = lines[0].split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
        assert_eq!(rest.trim_start(), "ERROR cannot open fd=3");
    }

    #[test]
    fn closed_reader_of_stderr_does_not_end_the_process() {
        if std::env::var_os(CHILD).is_some() {
            // The parent has closed its end of stderr's pipe when this line arrives.
            std::io::stdin().read_line(&mut String::new()).unwrap();
            return log_a_line_of_each_level();
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "daemon::log::tests::closed_reader_of_stderr_does_not_end_the_process",
            ])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stderr.take());
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let child = child.wait_with_output().unwrap();
        assert!(child.status.success(), "{child:?}");
        assert!(String::from_utf8_lossy(&child.stdout).contains("1 passed"), "{child:?}");
    }
}
