//! The options that every daemon has: where its sockets are and who may open them, how many
//! threads, how much log.
//!
//! A device's own options flatten these in (`#[command(flatten)]`), so that a name means the same
//! in every daemon and the help text has one source. Values are parsed here into types that cannot
//! be wrong; whether a path can be bound or a descriptor is a socket is for [`super::listener`] to
//! find out. The names `--socket-path`, `--fd` and `--print-capabilities` are vhost-user's
//! (vhost-user, "Backend program conventions").

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use rustix::fs::{Gid, Mode};
use thiserror::Error;

use super::aio::Aio;
use crate::sandbox::{self, Sandbox};
use crate::virtqueue::MAX_QUEUE_SIZE;

/// The most worker threads that `--threads` accepts: more than any machine gains from one device's
/// queues, and few enough that their stacks and rings are no burden when somebody mistypes.
pub const MAX_THREADS: u16 = 64;

/// Options common to all daemons.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Daemon options")]
pub struct DaemonOptions {
    /// Listen for the front end on a unix socket created at PATH, e.g. /run/outboard/disk0.sock.
    ///
    /// A stale socket file left by a dead process is replaced, one that a live process serves is
    /// refused. Without --socket-path and --fd the socket comes from the service manager
    /// (LISTEN_FDS).
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Use the inherited file descriptor N: a unix stream socket that is listening, or already
    /// connected to the front end, e.g. --fd 3.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<i32>,

    /// Access mode, in octal, of the sockets created by --socket-path and --control, e.g. 0660 to
    /// admit a group.
    ///
    /// Whoever may write to the vhost-user socket can read and change what the device holds.
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = parse_mode)]
    pub socket_mode: Mode,

    /// Group, by name or number, of the sockets created by --socket-path and --control, e.g. kvm
    /// [default: the daemon's own group].
    #[arg(long, value_name = "GROUP", value_parser = parse_group)]
    pub socket_group: Option<Gid>,

    /// Print what this program supports as JSON, then exit; all other options are ignored.
    #[arg(long)]
    pub print_capabilities: bool,

    /// Answer commands on a unix socket created at PATH: JSON lines such as {"command":"stats"},
    /// and GET /metrics in OpenMetrics format.
    ///
    /// For example: curl --unix-socket PATH http://localhost/metrics
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Worker threads, from 1 to 64; the device's queues are spread over them.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_THREADS))
    )]
    pub threads: u16,

    /// How files are read and written.
    ///
    /// io_uring is faster and uses less CPU; leave it to the default to use it wherever it works.
    /// Choose `threads` on a host where io_uring is forbidden for good, so that the log does not
    /// mention it at each start, or to rule it out as the cause of a problem. Choose `io_uring`
    /// where a slower disk is worse than one that does not start.
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub aio: Aio,

    /// What the daemon can do once it has opened what it serves: no more than it needs.
    ///
    /// With `on` it has no capabilities left, opens files in no other places than the options name (Landlock), and a system
    /// call that it has no need of ends it (seccomp). `log` has the kernel log such calls, and withholds nothing.
    #[arg(long, value_name = "WHETHER", default_value = "on")]
    pub sandbox: Sandbox,

    /// Least severe messages to log on stderr.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LogLevel,
}

/// How much to log; each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// What failed.
    Error,
    /// What a front end, a driver or the host did wrong.
    Warn,
    /// Start, stop and each front end.
    Info,
    /// Each vhost-user message.
    Debug,
    /// Each step of a queue's life.
    Trace,
}

/// Why a value of `--socket-mode` or `--socket-group` was not accepted.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what they are about")]
pub enum ValueError {
    #[error("not an octal number")]
    NotOctal(#[source] std::num::ParseIntError),
    #[error("only permission bits, 0000 to 0777, can be set on a socket")]
    NotPermissionBits,
    #[error("the group database cannot be read: {0}")]
    GroupDatabase(nix::errno::Errno),
    #[error("there is no group of that name, and it is not a group number")]
    NoSuchGroup,
    #[error("in the sandbox a group is known by its number only")]
    GroupByName,
}

/// An access mode, in octal.
///
/// # Errors
/// It is none, or has more than permissions.
pub fn parse_mode(text: &str) -> Result<Mode, ValueError> {
    let bits = u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8)
        .map_err(ValueError::NotOctal)?;
    if bits & !0o777 != 0 {
        return Err(ValueError::NotPermissionBits);
    }
    Ok(Mode::from_raw_mode(bits))
}

/// A name is looked up before it is tried as a number, as chown(1) does: a group may be called
/// `100`. In the sandbox it is a number.
///
/// # Errors
/// There is no such group.
pub fn parse_group(text: &str) -> Result<Gid, ValueError> {
    // The group database is behind files and sockets that the sandbox does not let be opened.
    let is_hidden = sandbox::is_on();
    if !is_hidden
        && let Some(group) =
            nix::unistd::Group::from_name(text).map_err(ValueError::GroupDatabase)?
    {
        return Ok(Gid::from_raw(group.gid.as_raw()));
    }
    match text.parse::<u32>() {
        Err(_) if is_hidden => Err(ValueError::GroupByName),
        // chown takes the largest number for "leave as it is"; it is nobody's group.
        Ok(number) if number != u32::MAX => Ok(Gid::from_raw(number)),
        _ => Err(ValueError::NoSuchGroup),
    }
}

/// A request, or a frame with its header, has at least two descriptors.
const QUEUE_SIZE_MIN: u16 = 2;

/// A size that a split virtqueue can have.
///
/// # Errors
/// It is none.
pub fn parse_queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (QUEUE_SIZE_MIN..=MAX_QUEUE_SIZE).contains(&size) => {
            Ok(size)
        }
        _ => {
            Err(format!("a queue size is a power of two from {QUEUE_SIZE_MIN} to {MAX_QUEUE_SIZE}"))
        }
    }
}

/// Bytes of `64k` and the like; `None` if it is no size.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.strip_prefix(digits)? {
        "" => 0,
        "k" | "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    // `u64::from_str` takes a leading plus sign, which no size has.
    let count = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    count?.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Aio, DaemonOptions, LogLevel, MAX_THREADS};

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        daemon: DaemonOptions,
    }

    fn parse(arguments: &[&str]) -> Result<DaemonOptions, clap::Error> {
        Program::try_parse_from([&["program"], arguments].concat()).map(|program| program.daemon)
    }

    fn refusal(arguments: &[&str]) -> String {
        let error = parse(arguments).expect_err("the arguments are wrong");
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn definitions_are_consistent() {
        Program::command().debug_assert();
    }

    #[test]
    fn defaults_are_private_and_single_threaded() {
        let options = parse(&[]).unwrap();
        assert_eq!(options.socket_mode.bits(), 0o600);
        assert_eq!((options.socket_path, options.fd, options.control), (None, None, None));
        assert_eq!((options.socket_group, options.print_capabilities), (None, false));
        assert_eq!((options.threads, options.log_level), (1, LogLevel::Info));
        assert_eq!(options.aio, Aio::Auto);
    }

    #[test]
    fn socket_path_and_fd_exclude_each_other() {
        assert!(refusal(&["--socket-path", "/run/x", "--fd", "3"]).contains("cannot be used with"));
    }

    #[test]
    fn fd_is_not_negative() {
        assert_eq!(parse(&["--fd", "0"]).unwrap().fd, Some(0));
        assert!(refusal(&["--fd=-1"]).contains("--fd"));
        assert!(refusal(&["--fd=socket"]).contains("--fd"));
    }

    #[test]
    fn socket_mode_is_octal_permission_bits() {
        for (text, mode) in [("0660", 0o660), ("600", 0o600), ("0o666", 0o666), ("0", 0)] {
            assert_eq!(parse(&["--socket-mode", text]).unwrap().socket_mode.bits(), mode, "{text}");
        }
        for text in ["0888", "rw", "", "1777", "-1", "77777777777777"] {
            let message = refusal(&[&format!("--socket-mode={text}")]);
            assert!(message.contains("--socket-mode"), "{text}: {message}");
        }
    }

    #[test]
    fn socket_group_is_a_name_or_a_number() {
        let group = |text| parse(&["--socket-group", text]).unwrap().socket_group.unwrap().as_raw();
        assert_eq!(group("root"), 0);
        assert_eq!(group("12345"), 12345);
        for text in ["no such group", "4294967295", "-1", ""] {
            let message = refusal(&[&format!("--socket-group={text}")]);
            assert!(message.contains("--socket-group"), "{text}: {message}");
        }
    }

    #[test]
    fn threads_have_a_limit_that_the_help_names() {
        let most = MAX_THREADS.to_string();
        assert_eq!(parse(&["--threads", &most]).unwrap().threads, MAX_THREADS);
        assert!(refusal(&["--threads", "0"]).contains("--threads"));
        assert!(refusal(&["--threads", &(MAX_THREADS + 1).to_string()]).contains(&most));
        assert!(
            Program::command()
                .render_long_help()
                .to_string()
                .contains(&format!("from 1 to {most}"))
        );
    }

    #[test]
    fn aio_is_one_of_three_words() {
        assert_eq!(parse(&["--aio", "io_uring"]).unwrap().aio, Aio::IoUring);
        assert_eq!(parse(&["--aio", "threads"]).unwrap().aio, Aio::Threads);
        assert!(refusal(&["--aio", "native"]).contains("auto, io_uring, threads"));
    }

    #[test]
    fn log_level_is_one_of_five_words() {
        assert_eq!(parse(&["--log-level", "trace"]).unwrap().log_level, LogLevel::Trace);
        assert!(refusal(&["--log-level", "loud"]).contains("error, warn, info, debug, trace"));
    }
}
