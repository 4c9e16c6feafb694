//! The command line of vhost-blk.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked, before
//! anything is opened. The options that every daemon has are `common`'s; here are those of a disk.
//! This one definition yields help and checks. `--print-capabilities`, with which all others are
//! ignored, right or wrong, is asked for before parsing (`common::daemon::capabilities`).
//!
//! What it deliberately does not do: open files, or read a configuration file (under systemd, an
//! instance's file holds this same command line).

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser};
use common::daemon::DaemonOptions;
use common::daemon::options::parse_queue_size;
use common::rate_limit::{Change, Topic};

use crate::config::{QueueLimits, Serial};
use crate::disk::{CacheMode, DiskSpec, OpenOptions};

/// Most queues of a device.
///
/// A guest uses one queue per virtual CPU at most, and VMMs stop at about this number of CPUs; each
/// queue costs its share of memory and descriptors before it is used.
const QUEUE_COUNT_MAX: i64 = 256;

/// Seconds between two looks at the disk's size, at most: a day.
const WATCH_SECONDS_MAX: u64 = 86_400;

/// Options, as the parser calls them, that mean nothing without a file.
const STORAGE_OPTIONS: [&str; 3] = ["cache", "watch_size", "no_lock"];

/// The options of a daemon that serves a disk.
#[derive(Debug)]
pub(crate) struct Options {
    /// Sockets, threads and log.
    pub(crate) daemon: DaemonOptions,
    /// What to open.
    pub(crate) disk: DiskSpec,
    /// How to open it.
    pub(crate) open: OpenOptions,
    /// What the guest is told when it asks for the disk's serial number; zeros if nothing was
    /// given.
    pub(crate) serial: Serial,
    /// How many queues, and how large.
    pub(crate) queues: QueueLimits,
    /// How often to look whether the disk has grown.
    pub(crate) watch_size: Option<Duration>,
    /// What requests are held to at first.
    pub(crate) limits: Change,
}

/// Parses a command line, the program's name first. The error prints itself and knows the exit
/// status (`clap::Error::exit`).
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let matches = CommandLine::command().try_get_matches_from(arguments)?;
    let line = CommandLine::from_arg_matches(&matches)?;
    check_null(&line, &matches)?;
    let Some(disk) = line.source.disk.or(line.source.blk_file.map(DiskSpec::File)) else {
        // The group has already asked for one of them; should it ever stop, this does.
        return Err(CommandLine::command()
            .error(ErrorKind::MissingRequiredArgument, "no disk: --blk-file PATH names one"));
    };
    let mut limits = Change::default();
    line.iops.iter().chain(&line.bps).for_each(|change| limits.and(change));
    Ok(Options {
        daemon: line.daemon,
        disk,
        open: OpenOptions {
            read_only: line.read_only,
            lock: !line.no_lock,
            cache: line.cache,
            queue_count: line.num_queues,
            logical_block_bytes: line.logical_block_size,
        },
        serial: line.serial.unwrap_or_default(),
        queues: QueueLimits { count: line.num_queues, size_max: line.queue_size },
        watch_size: line.watch_size.map(Duration::from_secs),
        limits,
    })
}

/// Refuses options of what a disk without storage does not have.
fn check_null(line: &CommandLine, matches: &ArgMatches) -> Result<(), clap::Error> {
    let Some(DiskSpec::Null { .. }) = line.source.disk else { return Ok(()) };
    let is_given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let Some(option) = STORAGE_OPTIONS.into_iter().find(is_given) else { return Ok(()) };
    let option = option.replace('_', "-");
    Err(CommandLine::command().error(
        ErrorKind::ArgumentConflict,
        format!("--{option} is for a file or a block device, and --disk null:SIZE has no storage"),
    ))
}

/// Serve a disk to a virtual machine, as a process of its own
///
/// vhost-blk is the back end of a virtio block device: it listens on a vhost-user socket, to which
/// a VMM (QEMU, Cloud Hypervisor, Firecracker, crosvm, User-Mode Linux) connects, shares the
/// guest's memory with it and leaves the guest's disk requests to it. The guest uses its ordinary
/// virtio driver. When the VMM goes away, the daemon waits for the next one.
#[derive(Debug, Parser)]
#[command(name = "vhost-blk", version, after_long_help = EXAMPLES, max_term_width = 100)]
struct CommandLine {
    #[command(flatten)]
    source: Source,

    /// Offer a read-only disk, and open the file for reading only
    ///
    /// Several daemons may serve one image read-only at the same time.
    #[arg(long, help_heading = "Disk options")]
    read_only: bool,

    /// How the host's cache is used, with QEMU's meaning
    ///
    /// Where each write is stable before it completes, the guest finds a write-through cache and
    /// sends no flushes; else a write-back cache. It may switch between these two (CONFIG_WCE), which
    /// stays so until it switches again. Direct I/O (none, directsync) needs a file system that has
    /// it; requests that are misaligned for it make a detour. "unsafe" is for what may be lost.
    #[arg(long, value_name = "MODE", value_enum, default_value_t, help_heading = "Disk options")]
    cache: CacheMode,

    /// Logical block size in bytes that the guest sees: 512, 1024, 2048 or 4096
    ///
    /// Default: 512 for a file, its own for a block device. A disk keeps its partitions only with
    /// the block size that it was partitioned with, and SeaBIOS boots from 512 only. A rest of the
    /// disk that is not a whole block is not served.
    #[arg(
        long,
        value_name = "BYTES",
        value_parser = parse_logical_block_size,
        help_heading = "Disk options"
    )]
    logical_block_size: Option<u32>,

    /// Serial number that the guest sees: at most 20 printable ASCII characters
    ///
    /// Linux makes it the link /dev/disk/by-id/virtio-SERIAL. Without this option there is none:
    /// one that we made up, say from the file's name, would change when the file moves, and guests
    /// would take two disks for one when two names begin alike.
    #[arg(long, value_name = "SERIAL", help_heading = "Disk options")]
    serial: Option<Serial>,

    /// Queues of the device, 1 to 256
    ///
    /// The VMM may use fewer, and fails to start if it wants more: QEMU wants one for each of the
    /// guest's CPUs unless its num-queues= says otherwise. One for each CPU lets them send requests
    /// side by side; more than one thread of this daemon (--threads) serves them so too.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=QUEUE_COUNT_MAX),
        help_heading = "Disk options"
    )]
    num_queues: u16,

    /// Largest queue size that is accepted: a power of two from 2 to 32768
    ///
    /// The VMM chooses the size of a queue (QEMU: queue-size=, at most 1024), this is only an upper
    /// limit. Guests are told that a request has at most 254 segments, or two less than this size
    /// if that is fewer.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_queue_size, help_heading = "Disk options")]
    queue_size: u16,

    /// Look every SECONDS, 1 to 86400, whether the disk has grown; without a number, every second
    ///
    /// The guest is told of a larger disk at once. Without this option, or sooner: SIGHUP, or
    /// {"command":"resize"} on the control socket. A disk that shrinks keeps its size for the guest.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1",
        value_parser = clap::value_parser!(u64).range(1..=WATCH_SECONDS_MAX),
        help_heading = "Disk options"
    )]
    watch_size: Option<u64>,

    /// Most operations per second: [total=|read=|write=]RATE[/BURST], e.g. 1000, or
    /// read=2000,write=500/4000.
    ///
    /// A RATE without a name is for reads and writes together. k, M, G and T stand for 1000, 1000²
    /// and so on; none for no limit. Requests over the limit wait, evenly spaced. BURST is how many
    /// may come at once after a pause; without it, what the rate gives in 5 ms. The control socket
    /// changes limits while the daemon runs: {"command":"limit","iops":"read=none"}.
    #[arg(
        long,
        value_name = "LIMIT[,LIMIT]",
        value_parser = |text: &str| Change::parse(text, Topic::Iops),
        help_heading = "Disk options"
    )]
    iops: Vec<Change>,

    /// Most bytes per second: [total=|read=|write=]RATE[/BURST], e.g. 100M, or
    /// read=200M,write=50M/1G.
    ///
    /// As --iops, for the bytes that are read and written; here k, M, G and T stand for 1024, 1024²
    /// and so on.
    #[arg(
        long,
        value_name = "LIMIT[,LIMIT]",
        value_parser = |text: &str| Change::parse(text, Topic::Bps),
        help_heading = "Disk options"
    )]
    bps: Vec<Change>,

    /// Open the image without locking it, and even if another process has it locked
    ///
    /// The locks are those of QEMU: they keep QEMU's tools and other vhost-blk daemons from writing
    /// to an image in use, and vhost-blk from opening an image that they write to. Two writers
    /// destroy a file system.
    #[arg(long, help_heading = "Disk options")]
    no_lock: bool,

    #[command(flatten)]
    daemon: DaemonOptions,
}

/// The disk, named in one of two ways.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// Raw image file or block device to serve: short for --disk file:PATH
    #[arg(long, value_name = "PATH", help_heading = "Disk options")]
    blk_file: Option<PathBuf>,

    /// Disk to serve: file:PATH, or null:SIZE for a disk without storage
    ///
    /// file:PATH is a raw image or a block device.
    ///
    /// null:SIZE forgets what is written and reads at once, whatever was in the guest's buffer: for
    /// measuring everything but the disk. Options of storage (--cache, --watch-size, --no-lock) are
    /// refused with it. SIZE is in bytes, or with k, M, G or T in units of 1024, 1024², 1024³ or
    /// 1024⁴ bytes, and a multiple of 512 bytes.
    #[arg(long, value_name = "file:PATH|null:SIZE", help_heading = "Disk options")]
    disk: Option<DiskSpec>,
}

/// A block size that every guest takes.
fn parse_logical_block_size(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(size @ (512 | 1024 | 2048 | 4096)) => Ok(size),
        _ => Err("a logical block size is 512, 1024, 2048 or 4096".to_owned()),
    }
}

/// No line has more than 80 columns, the width of many terminals: clap would wrap it, and a command
/// that is wrapped within an option does not work when it is pasted.
const EXAMPLES: &str = "\
Examples:
  Serve an image on a socket that only this user can reach, and give it to QEMU:
    vhost-blk --socket-path /run/vm1/disk.sock --blk-file disk.img
    qemu-system-x86_64 -m 2G \\
      -object memory-backend-memfd,id=mem,size=2G,share=on \\
      -machine q35,memory-backend=mem \\
      -chardev socket,id=disk,path=/run/vm1/disk.sock,reconnect-ms=200 \\
      -device vhost-user-blk-pci,chardev=disk

  A block device with four queues on two threads, and figures to ask for:
    vhost-blk --socket-path /run/vm1/disk.sock --blk-file /dev/vg0/vm1 \\
      --num-queues 4 --threads 2 --control /run/vm1/disk.ctl
    curl --unix-socket /run/vm1/disk.ctl http://localhost/metrics

  A database's disk: past the host's cache, in blocks that it writes whole:
    vhost-blk --socket-path /run/vm1/db.sock --blk-file /dev/vg0/db \\
      --cache none --logical-block-size 4096

  At most 2000 reads and 500 writes a second, or more of them for a moment
  after a pause, and 100 MiB a second; then another limit while it runs:
    vhost-blk --socket-path /run/vm1/disk.sock --blk-file disk.img \\
      --iops read=2000,write=500/4000 --bps 100M --control /run/vm1/disk.ctl
    echo '{\"command\":\"limit\",\"bps\":\"200M\"}' | \\
      socat - UNIX-CONNECT:/run/vm1/disk.ctl

  An image that grows under the running guest, who sees it within a second:
    vhost-blk --socket-path /run/vm1/disk.sock --blk-file disk.img --watch-size
    truncate --size +10G disk.img

  One image, read by many guests:
    vhost-blk --socket-path /run/vm2/base.sock --blk-file base.img \\
      --read-only --serial base-12

  A disk without storage, to measure all the rest:
    vhost-blk --socket-path /tmp/null.sock --disk null:64G

Exit status:
  0  ended by SIGTERM or SIGINT after the requests in flight were done, or
     because the only connection (--fd) ended, or printed what was asked for
  1  something could not be opened (the image, a lock on it, a socket),
     requests in flight did not end in time, or the I/O engine failed
  2  the command line is wrong";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Result<Options, clap::Error> {
        let line = format!("vhost-blk --socket-path s {words}");
        parse(line.split_whitespace().map(OsString::from))
    }

    fn refused(words: &str) -> String {
        let error = parse_words(words).expect_err(words);
        assert_eq!(error.exit_code(), 2, "{words}");
        error.to_string()
    }

    #[test]
    fn definition_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn examples_can_be_pasted_from_a_terminal_of_80_columns() {
        for line in EXAMPLES.lines() {
            assert!(line.len() <= 80, "clap would wrap {line:?}");
        }
    }

    #[test]
    fn defaults_are_those_that_the_help_gives() {
        let options = parse_words("--blk-file disk.img").unwrap();
        assert_eq!(options.disk, DiskSpec::File("disk.img".into()));
        assert_eq!(options.open, OpenOptions::default());
        assert_eq!(options.open.cache, CacheMode::Writeback);
        assert_eq!(options.serial, Serial::default());
        assert_eq!(options.queues, QueueLimits { count: 1, size_max: 1024 });
        assert_eq!(options.watch_size, None);
    }

    #[test]
    fn every_disk_option_arrives() {
        let options = parse_words(
            "--blk-file disk.img --read-only --serial abc --num-queues 256 --queue-size 32768 \
             --no-lock --cache directsync --logical-block-size 2048",
        )
        .unwrap();
        assert_eq!(options.disk, DiskSpec::File("disk.img".into()));
        let open = OpenOptions {
            read_only: true,
            lock: false,
            cache: CacheMode::Directsync,
            queue_count: 256,
            logical_block_bytes: Some(2048),
        };
        assert_eq!(options.open, open);
        assert_eq!(options.serial, "abc".parse().unwrap());
        assert_eq!(options.queues, QueueLimits { count: 256, size_max: 32_768 });
    }

    #[test]
    fn size_is_watched_every_second_or_as_often_as_is_said() {
        let watch = |words| parse_words(words).unwrap().watch_size.map(|every| every.as_secs());
        assert_eq!(watch("--watch-size --blk-file a"), Some(1));
        assert_eq!(watch("--blk-file a --watch-size=60"), Some(60));
        assert!(refused("--blk-file a --watch-size 60").contains("60"));
    }

    #[test]
    fn blk_file_is_short_for_disk_file() {
        let disk = |words| parse_words(words).unwrap().disk;
        assert_eq!(disk("--blk-file /a:b"), disk("--disk file:/a:b"));
    }

    #[test]
    fn exactly_one_disk_is_named() {
        assert!(refused("").contains("--blk-file"));
        assert!(refused("--blk-file a --disk null:512").contains("cannot be used with"));
        assert!(refused("--disk null:512 --disk null:512").contains("multiple times"));
    }

    #[test]
    fn disk_without_storage_has_no_options_of_storage() {
        for option in ["--cache=writeback", "--cache=none", "--watch-size", "--no-lock"] {
            let told = refused(&format!("--disk null:1G {option}"));
            let (name, _) = option.split_once('=').unwrap_or((option, ""));
            assert!(told.contains(name) && told.contains("null:SIZE"), "{told}");
            parse_words(&format!("--disk file:a {option}")).unwrap();
        }
        let all_others = "--read-only --serial a --num-queues 2 --logical-block-size 512";
        let options = parse_words(&format!("--disk null:1G {all_others}")).unwrap();
        assert_eq!(options.disk, DiskSpec::Null { len_bytes: 1 << 30 });
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for wrong in [
            "--disk null:513",
            "--disk disk.img",
            "--blk-file a --watch-size=0",
            "--blk-file a --watch-size=86401",
            "--blk-file a --num-queues 0",
            "--blk-file a --num-queues 257",
            "--blk-file a --queue-size 0",
            "--blk-file a --queue-size 1",
            "--blk-file a --queue-size 1000",
            "--blk-file a --queue-size 65536",
            "--blk-file a --serial 123456789012345678901",
            "--blk-file a stray",
            "--blk-file a --cache writearound",
            "--blk-file a --cache None",
            "--blk-file a --logical-block-size 0",
            "--blk-file a --logical-block-size 513",
            "--blk-file a --logical-block-size 8192",
        ] {
            refused(wrong);
        }
    }

    #[test]
    fn limits_are_given_together_or_one_by_one_and_the_last_one_counts() {
        let limits = |words: &str| parse_words(&format!("--blk-file x {words}")).unwrap().limits;
        assert!(limits("").is_empty());
        let mut wanted = Change::parse("read=1,write=500/4000", Topic::Iops).unwrap();
        wanted.and(&Change::parse("100M", Topic::Bps).unwrap());
        let given = "--iops read=2k,write=500/4000 --bps 100M --iops read=1";
        assert_eq!(limits(given), wanted);
    }

    #[test]
    fn wrong_limit_is_refused_by_its_option_and_what_is_wrong() {
        for (option, value, said) in [
            ("--iops", "fast", "powers of 1000"),
            ("--bps", "fast", "powers of 1024"),
            ("--bps", "read=1M,rx=5M", "\"rx\" is none of total, read and write"),
            ("--iops", "0", "a rate is from 1"),
        ] {
            let message = refused(&format!("--blk-file x {option} {value}"));
            assert!(message.contains(option) && message.contains(said), "{message}");
        }
    }
}
