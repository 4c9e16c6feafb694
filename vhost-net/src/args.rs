//! The command line of vhost-net.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked, and fits the
//! others, before anything is opened. The options that every daemon has are `common`'s; here are
//! those of a network. This one definition yields help and checks. `--print-capabilities`, with which
//! all others are ignored, right or wrong, is asked for before parsing
//! (`common::daemon::capabilities`).
//!
//! What it deliberately does not do: open files, or read a configuration file (under systemd, an
//! instance's file holds this same command line).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser};
use common::daemon::DaemonOptions;
use common::daemon::options::{parse_queue_size, parse_size};
use common::rate_limit::{Change, Topic};
use thiserror::Error;

use crate::backend::{BackendSpec, InterfaceName};
use crate::capture::CaptureSpec;
use crate::config::{Identity, MTU_MIN, Mac, QUEUE_PAIRS_MAX, VlanId};
use crate::header::FRAME_BYTES_MAX;

/// The last VLAN that can be used: 4095 is reserved.
const VLAN_MAX: i64 = 4094;

/// The largest speed that the configuration space can name, in units of 1,000,000 bits per second.
// VIRTIO 1.3, 5.1.4: 0 to 0x7fffffff.
const SPEED_MAX: i64 = 0x7fff_ffff;

/// The smallest capture: with the largest frame in it.
const PCAP_BYTES_MIN: u64 = 128 << 10;

/// The fewest bytes of a frame that are worth capturing: Ethernet, IPv6 and UDP headers.
const SNAP_BYTES_MIN: i64 = 64;

/// The options of a daemon that serves a network.
#[derive(Debug)]
pub(crate) struct Options {
    /// Sockets, threads and log.
    pub(crate) daemon: DaemonOptions,
    /// What traffic is held to at first.
    pub(crate) limits: Change,
    /// What to open.
    pub(crate) backend: BackendSpec,
    /// Which bridge to attach it to.
    pub(crate) bridge: Option<InterfaceName>,
    /// What the guest is told of its device.
    pub(crate) identity: Identity,
    /// How large a driver may make a queue.
    pub(crate) queue_size: u16,
    /// The one VLAN that the guest is in, without seeing its tags.
    pub(crate) vlan: Option<VlanId>,
    /// Frames are sent from the guest's own address only.
    pub(crate) only_mac: bool,
    /// Where frames are captured.
    pub(crate) capture: Option<CaptureSpec>,
}

/// Parses a command line, the program's name first. The error prints itself and knows the exit
/// status (`clap::Error::exit`).
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let line = CommandLine::try_parse_from(arguments)?;
    let wrong = |wrong: Wrong| CommandLine::command().error(ErrorKind::ArgumentConflict, wrong);
    let queue_pairs = line.queue_pairs().map_err(wrong)?;
    let backend = line.backend(queue_pairs).map_err(wrong)?;
    let capture = line.pcap.map(|path| CaptureSpec {
        path,
        size_bytes: line.pcap_size,
        snap_bytes: line.pcap_snap,
    });
    let mut limits = Change::default();
    line.rx_rate.iter().chain(&line.tx_rate).for_each(|change| limits.and(change));
    let identity = Identity { mac: line.mac, mtu: line.mtu, speed_mbps: line.speed, queue_pairs };
    Ok(Options {
        daemon: line.daemon,
        limits,
        backend,
        bridge: line.bridge,
        identity,
        queue_size: line.queue_size,
        vlan: line.vlan.and_then(VlanId::new),
        only_mac: line.only_mac,
        capture,
    })
}

/// Options that do not fit each other.
#[derive(Debug, Error)]
enum Wrong {
    #[error("--bridge makes a tap the port of a bridge: it needs --backend tap=NAME or --tap-fd")]
    Bridge,
    #[error("--queue-pairs {0}: a socket carries one stream of frames, for one pair of queues")]
    Socket(u16),
    #[error("--queue-pairs {pairs}, and {fds} descriptors (--tap-fd): there is one for each pair")]
    TapFds { pairs: u16, fds: usize },
    #[error("--tap-fd: {fds} descriptors, of {QUEUE_PAIRS_MAX} at most")]
    ManyTapFds { fds: usize },
    #[error("descriptor {0} is given twice (--tap-fd, --fd)")]
    Twice(RawFd),
    #[error("no network: --backend names one")]
    NoBackend,
}

/// Serve a network to a virtual machine, as a process of its own
///
/// vhost-net is the back end of a virtio network device: it listens on a vhost-user socket, to which
/// a VMM (QEMU, Cloud Hypervisor, crosvm, User-Mode Linux) connects, shares the guest's memory with
/// it and leaves the guest's frames to it. The guest uses its ordinary virtio driver. When the VMM
/// goes away, the daemon waits for the next one.
#[derive(Debug, Parser)]
#[command(name = "vhost-net", version, after_long_help = EXAMPLES, max_term_width = 100)]
struct CommandLine {
    #[command(flatten)]
    source: Source,

    /// Make the tap a port of this bridge, e.g. br0
    #[arg(long, value_name = "NAME", help_heading = "Network options")]
    bridge: Option<InterfaceName>,

    /// MAC address that the guest is given, e.g. 52:54:00:12:34:56
    ///
    /// Without this option the guest makes one up whenever it boots; on a macvtap it gets the
    /// interface's. QEMU's -netdev vhost-user always gives the guest the address of its own command
    /// line (mac=), so name the same there.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network options")]
    mac: Option<Mac>,

    /// Let the guest send from the address of --mac only
    ///
    /// Frames from others are dropped and counted, and the guest cannot change its address.
    #[arg(long, requires = "mac", help_heading = "Network options")]
    only_mac: bool,

    /// MTU that the guest is told, 68 to 65535; IPv6 needs 1280
    ///
    /// A tap or macvtap is given it, too.
    #[arg(
        long,
        value_name = "BYTES",
        value_parser = clap::value_parser!(u16).range(i64::from(MTU_MIN)..),
        help_heading = "Network options"
    )]
    mtu: Option<u16>,

    /// Speed that the guest is told, in units of 1000000 bits per second, e.g. 10000
    ///
    /// It limits nothing (--rx-rate, --tx-rate do). Guests show it, and some choose by it.
    #[arg(
        long,
        value_name = "MBPS",
        value_parser = clap::value_parser!(u32).range(1..=SPEED_MAX),
        help_heading = "Network options"
    )]
    speed: Option<u32>,

    /// Put the guest into VLAN ID, 1 to 4094, which it does not see
    ///
    /// As an access port of a switch does: what it sends is tagged, frames of that VLAN are handed
    /// to it without their tag, and all others are not.
    #[arg(
        long,
        value_name = "ID",
        value_parser = clap::value_parser!(u16).range(1..=VLAN_MAX),
        help_heading = "Network options"
    )]
    vlan: Option<u16>,

    /// Most that the guest receives in a second: [bytes=|frames=]RATE[/BURST], e.g. 100M
    ///
    /// A RATE without a name is in bytes; bytes=100M,frames=50k limits both. k, M, G and T stand for
    /// 1024, 1024² and so on bytes, and 1000, 1000² and so on frames; none for no limit. Frames over
    /// the limit wait, evenly spaced, and what does not find room meanwhile is dropped by the host.
    /// BURST is how much may come at once after a pause; without it, what the rate gives in 5 ms.
    /// What is still to be segmented is one frame, however many it will be on the wire.
    /// The control socket changes limits while the daemon runs: {"command":"limit","rx":"frames=none"}.
    #[arg(
        long,
        value_name = "LIMIT[,LIMIT]",
        value_parser = |text: &str| Change::parse(text, Topic::Rx),
        help_heading = "Network options"
    )]
    rx_rate: Vec<Change>,

    /// Most that the guest sends in a second: [bytes=|frames=]RATE[/BURST], e.g. frames=50k
    ///
    /// As --rx-rate. Frames over the limit wait in the guest's queue.
    #[arg(
        long,
        value_name = "LIMIT[,LIMIT]",
        value_parser = |text: &str| Change::parse(text, Topic::Tx),
        help_heading = "Network options"
    )]
    tx_rate: Vec<Change>,

    /// Pairs of a receive and a transmit queue, 1 to 127 [default: 1, or one for each --tap-fd]
    ///
    /// One for each of the guest's CPUs lets them send side by side; more than one thread of this
    /// daemon (--threads) serves them so too. The guest may use fewer. QEMU's -netdev vhost-user
    /// takes the number by queues=.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUE_PAIRS_MAX)),
        help_heading = "Network options"
    )]
    queue_pairs: Option<u16>,

    /// Largest queue size that is accepted: a power of two from 2 to 32768
    ///
    /// The VMM chooses the size of a queue (QEMU: rx_queue_size=, tx_queue_size=, 256 if they are
    /// not given and 1024 at most), this is only an upper limit.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1024,
        value_parser = parse_queue_size,
        help_heading = "Network options"
    )]
    queue_size: u16,

    /// Capture the frames of both directions in FILE, for Wireshark or tcpdump -r
    ///
    /// FILE is emptied first, and can be read while it grows; a FIFO that somebody has opened for
    /// reading will do, too. It is a pcapng file with stamps in nanoseconds, which says of each
    /// frame whether the guest has sent it (outbound) or received it. A frame that finds the
    /// file too slow is left out, and the log says in the end how many were.
    #[arg(long, value_name = "FILE", help_heading = "Network options")]
    pcap: Option<PathBuf>,

    /// Size that the captured file stops at: bytes, or with k, M, G or T units of 1024 and so on
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64M",
        value_parser = parse_pcap_size,
        requires = "pcap",
        help_heading = "Network options"
    )]
    pcap_size: u64,

    /// Bytes of each frame that are captured, 64 to 65553
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = FRAME_BYTES_MAX as u32,
        value_parser = clap::value_parser!(u32).range(SNAP_BYTES_MIN..=FRAME_BYTES_MAX as i64),
        requires = "pcap",
        help_heading = "Network options"
    )]
    pcap_snap: u32,

    #[command(flatten)]
    daemon: DaemonOptions,
}

/// The network, named in one of two ways.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// Network to serve: a tap, a macvtap, a stream socket, or nothing
    ///
    /// tap=NAME is a tap interface of the host, made if there is none and that is allowed
    /// (CAP_NET_ADMIN). Its host's end gets its addresses, or a bridge (--bridge), by other tools.
    ///
    /// macvtap=PARENT puts the guest beside the host on the network of the interface PARENT.
    ///
    /// socket=PATH speaks the stream protocol of QEMU's -netdev stream with whoever listens there,
    /// or with ",server" whoever connects. passt does, and gives the guest the host's network without
    /// any privilege.
    ///
    /// null swallows what the guest sends; null=FRAME_BYTES makes frames of that length as fast as
    /// the guest takes them: for measuring everything but a network.
    #[arg(long, value_name = "KIND[=WHAT]", help_heading = "Network options")]
    backend: Option<BackendSpec>,

    /// Serve a tap or macvtap interface whose queues are open already, as descriptors N
    ///
    /// One for each pair of queues, e.g. --tap-fd 3,4
    #[arg(
        long,
        value_name = "N[,N...]",
        value_delimiter = ',',
        value_parser = clap::value_parser!(i32).range(0..),
        help_heading = "Network options"
    )]
    tap_fd: Vec<RawFd>,
}

impl CommandLine {
    fn queue_pairs(&self) -> Result<u16, Wrong> {
        let fds = self.source.tap_fd.len();
        if fds > usize::from(QUEUE_PAIRS_MAX) {
            return Err(Wrong::ManyTapFds { fds });
        }
        match (self.queue_pairs, u16::try_from(fds).unwrap_or(QUEUE_PAIRS_MAX)) {
            (None, fds) => Ok(fds.max(1)),
            (Some(pairs), 0) => Ok(pairs),
            (Some(pairs), fds) if pairs == fds => Ok(pairs),
            (Some(pairs), _) => Err(Wrong::TapFds { pairs, fds }),
        }
    }

    fn backend(&self, queue_pairs: u16) -> Result<BackendSpec, Wrong> {
        let mut seen: BTreeSet<RawFd> = self.daemon.fd.into_iter().collect();
        if let Some(fd) = self.source.tap_fd.iter().find(|fd| !seen.insert(**fd)) {
            return Err(Wrong::Twice(*fd));
        }
        let backend = match &self.source.backend {
            Some(backend) => backend.clone(),
            None if !self.source.tap_fd.is_empty() => {
                BackendSpec::TapFds(self.source.tap_fd.clone())
            }
            // The group has already asked for one of them; should it ever stop, this does.
            None => return Err(Wrong::NoBackend),
        };
        let is_tap = matches!(backend, BackendSpec::Tap(_) | BackendSpec::TapFds(_));
        if self.bridge.is_some() && !is_tap {
            return Err(Wrong::Bridge);
        }
        if matches!(backend, BackendSpec::Socket { .. }) && queue_pairs > 1 {
            return Err(Wrong::Socket(queue_pairs));
        }
        Ok(backend)
    }
}

fn parse_pcap_size(text: &str) -> Result<u64, String> {
    parse_size(text).filter(|size| *size >= PCAP_BYTES_MIN).ok_or_else(|| {
        format!("expected {PCAP_BYTES_MIN} bytes at least, or a number with k, M, G or T")
    })
}

/// No line has more than 80 columns, the width of many terminals: clap would wrap it, and a command
/// that is wrapped within an option does not work when it is pasted.
const EXAMPLES: &str = "\
Examples:
  A guest of QEMU on a bridge of the host, through a tap that is made for it:
    vhost-net --socket-path /run/vm1/net.sock --backend tap=vm1 --bridge br0
    qemu-system-x86_64 -m 2G \\
      -object memory-backend-memfd,id=mem,size=2G,share=on \\
      -machine q35,memory-backend=mem \\
      -chardev socket,id=net,path=/run/vm1/net.sock,reconnect-ms=200 \\
      -netdev vhost-user,id=net0,chardev=net \\
      -device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56

  The host's network without root, through passt:
    passt --socket /run/user/1000/passt.sock
    vhost-net --socket-path /run/user/1000/net.sock \\
      --backend socket=/run/user/1000/passt.sock

  A neighbour that is not trusted: one address, one VLAN, at most 100 MiB and
  50000 frames a second each way; then another limit while it runs:
    vhost-net --socket-path /run/vm2/net.sock --backend tap=vm2 --bridge br0 \\
      --mac 52:54:00:00:00:02 --only-mac --vlan 20 \\
      --rx-rate 100M,frames=50k --tx-rate 100M,frames=50k \\
      --control /run/vm2/net.ctl
    echo '{\"command\":\"limit\",\"tx\":\"200M\"}' | \\
      socat - UNIX-CONNECT:/run/vm2/net.ctl

  Four pairs of queues on two threads (QEMU: queues=4, and mq=on):
    vhost-net --socket-path /run/vm1/net.sock --backend tap=vm1 \\
      --queue-pairs 4 --threads 2

  See the frames as they travel:
    vhost-net --socket-path /run/vm1/net.sock --backend tap=vm1 \\
      --pcap /tmp/vm1.pcapng
    tail -c +1 -f /tmp/vm1.pcapng | wireshark -k -i -

  A network without a network, to measure all the rest:
    vhost-net --socket-path /tmp/null.sock --backend null=1514

Exit status:
  0  ended by SIGTERM or SIGINT, or because the only connection (--fd) ended,
     or printed what was asked for
  1  something could not be opened (the interface, a socket, the captured
     file), or the I/O engine failed
  2  the command line is wrong";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Result<Options, clap::Error> {
        let line = format!("vhost-net --socket-path s {words}");
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
    fn examples_are_right() {
        let joined = EXAMPLES.replace("\\\n", " ");
        let ours = joined.lines().map(str::trim).filter(|line| line.starts_with("vhost-net "));
        let parsed = ours.map(|line| parse(line.split_whitespace().map(OsString::from)));
        assert_eq!(parsed.map(Result::unwrap).count(), 6);
    }

    #[test]
    fn defaults_are_those_that_the_help_gives() {
        let options = parse_words("--backend tap=vm0").unwrap();
        assert_eq!(options.backend, "tap=vm0".parse().unwrap());
        assert_eq!(options.identity.queue_pairs, 1);
        assert_eq!((options.identity.mac, options.identity.mtu), (None, None));
        assert_eq!((options.identity.speed_mbps, options.queue_size), (None, 1024));
        assert_eq!((options.bridge, options.vlan, options.only_mac), (None, None, false));
        assert_eq!(options.capture, None);
        assert!(options.limits.is_empty());
        let capture = parse_words("--backend null --pcap f").unwrap().capture.unwrap();
        assert_eq!((capture.size_bytes, capture.snap_bytes), (64 << 20, 65_553));
    }

    #[test]
    fn every_network_option_arrives() {
        let options = parse_words(
            "--backend tap=vm0 --bridge br0 --mac 52:54:00:12:34:56 --only-mac --mtu 9000 \
             --speed 25000 --vlan 4094 --queue-pairs 127 --queue-size 256 --pcap /a/b \
             --pcap-size 1G --pcap-snap 128",
        )
        .unwrap();
        assert_eq!(options.bridge, Some("br0".parse().unwrap()));
        assert_eq!(options.identity.mac, Some("52:54:00:12:34:56".parse().unwrap()));
        assert_eq!((options.identity.mtu, options.identity.speed_mbps), (Some(9000), Some(25_000)));
        assert_eq!((options.identity.queue_pairs, options.queue_size), (127, 256));
        assert_eq!(options.vlan, VlanId::new(4094));
        assert!(options.only_mac);
        let capture = CaptureSpec { path: "/a/b".into(), size_bytes: 1 << 30, snap_bytes: 128 };
        assert_eq!(options.capture, Some(capture));
    }

    #[test]
    fn exactly_one_network_is_named() {
        assert!(refused("").contains("--backend"));
        assert!(refused("--backend null --tap-fd 3").contains("cannot be used with"));
        assert!(refused("--backend null --backend null").contains("multiple times"));
    }

    #[test]
    fn open_taps_are_a_pair_of_queues_each() {
        let options = parse_words("--tap-fd 3,4 --tap-fd 7").unwrap();
        assert_eq!(options.backend, BackendSpec::TapFds(vec![3, 4, 7]));
        assert_eq!(options.identity.queue_pairs, 3);
        assert!(parse_words("--tap-fd 3,4 --queue-pairs 2").is_ok());
        assert!(refused("--tap-fd 3,4 --queue-pairs 3").contains("--queue-pairs 3, and 2 desc"));
        assert!(refused("--tap-fd 3,4,3").contains("descriptor 3 is given twice"));
        let line = "vhost-net --fd 4 --tap-fd 3,4".split_whitespace().map(OsString::from);
        let error = parse(line).expect_err("one descriptor, twice");
        assert!(error.to_string().contains("descriptor 4 is given twice"));
        let many = (3..131).map(|fd| fd.to_string()).collect::<Vec<_>>().join(",");
        assert!(refused(&format!("--tap-fd {many}")).contains("128 descriptors"));
    }

    #[test]
    fn options_that_do_not_fit_each_other_are_refused() {
        for (words, said) in [
            ("--backend null --bridge br0", "--backend tap=NAME"),
            ("--backend socket=/s --bridge br0", "--backend tap=NAME"),
            ("--backend macvtap=eth0 --bridge br0", "--backend tap=NAME"),
            ("--backend socket=/s --queue-pairs 2", "--queue-pairs 2: a socket"),
            ("--backend null --only-mac", "--mac"),
            ("--backend null --pcap-size 1G", "--pcap"),
            ("--backend null --pcap-snap 64", "--pcap"),
        ] {
            assert!(refused(words).contains(said), "{words}: {}", refused(words));
        }
        assert!(parse_words("--tap-fd 3 --bridge br0").is_ok());
    }

    #[test]
    fn rates_are_the_limits_of_their_direction() {
        let given =
            "--backend null --rx-rate 100M/1G,frames=50k --tx-rate frames=7/8 --tx-rate none";
        let mut wanted = Change::parse("bytes=100M/1G,frames=50k", Topic::Rx).unwrap();
        wanted.and(&Change::parse("none", Topic::Tx).unwrap());
        assert_eq!(parse_words(given).unwrap().limits, wanted);
    }

    #[test]
    fn wrong_rate_is_refused_by_its_option_and_what_is_wrong() {
        for (option, value, said) in [
            ("--rx-rate", "fast", "powers of 1024"),
            ("--tx-rate", "frames=fast", "powers of 1000"),
            ("--rx-rate", "bits=1M", "\"bits\" is none of bytes and frames"),
            ("--rx-rate", "read=1M", "\"read\" is none of bytes and frames"),
            ("--tx-rate", "1M,bytes=2M", "bytes is given twice"),
            ("--tx-rate", "1M,", "\"\" is no rate"),
            ("--tx-rate", "frames=0", "a rate is from 1"),
            ("--tx-rate", "bytes=read=1", "\"read=1\" is no rate"),
        ] {
            let message = refused(&format!("--backend null {option} {value}"));
            assert!(message.contains(option) && message.contains(said), "{message}");
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for wrong in [
            "--backend vde=x",
            "--backend tap",
            "--backend tap=a/b",
            "--backend null=13",
            "--tap-fd -1",
            "--tap-fd 3,,4",
            "--backend null --bridge a/b",
            "--backend null --mac 52:54:00:12:34",
            "--backend null --mac 33:33:00:00:00:01",
            "--backend null --mtu 67",
            "--backend null --mtu 65536",
            "--backend null --speed 0",
            "--backend null --speed 2147483648",
            "--backend null --vlan 0",
            "--backend null --vlan 4095",
            "--backend null --queue-pairs 0",
            "--backend null --queue-pairs 128",
            "--backend null --queue-size 1",
            "--backend null --queue-size 1000",
            "--backend null --queue-size 65536",
            "--backend null --pcap f --pcap-size 64",
            "--backend null --pcap f --pcap-size 1.5G",
            "--backend null --pcap f --pcap-size +1G",
            "--backend null --pcap f --pcap-size M",
            "--backend null --pcap f --pcap-size 99999999T",
            "--backend null --pcap f --pcap-snap 63",
            "--backend null --pcap f --pcap-snap 65554",
            "--backend null stray",
        ] {
            refused(wrong);
        }
    }
}
