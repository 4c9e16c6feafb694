//! The command line.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked. Nothing is opened here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::daemons::{Device, Whose};
use crate::front_end::Kind;
use crate::layout::PCI_DEVICES_MAX;
use crate::memory::{LEN_MAX, LEN_MIN, LEN_UNIT};
use crate::seccomp::Sandbox;

/// What Linux asks for at most; a daemon is sent no larger.
const QUEUE_SIZE: u16 = 256;
/// VIRTIO 1.3, 2.7: the largest split ring.
const QUEUE_SIZE_MAX: u16 = 1 << 15;
/// As many as have an APIC id of 8 bits; the last is for "all".
const VCPUS_MAX: u8 = 254;

/// What is to run.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) command_line: String,
    pub(crate) memory_bytes: u64,
    pub(crate) hugepages: bool,
    pub(crate) vcpu_count: u8,
    /// The host's processor for each, or none at all.
    pub(crate) affinity: Vec<usize>,
    /// What happens when the guest restarts its machine.
    pub(crate) reboots: bool,
    pub(crate) sandbox: Sandbox,
    /// In the order of their places on the bus.
    pub(crate) devices: Vec<Device>,
    /// Where the operator gives orders.
    pub(crate) control: Option<PathBuf>,
}

/// Parses a command line, the program's name first. The error prints itself and knows the exit
/// status (`clap::Error::exit`).
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let line = CommandLine::try_parse_from(arguments)?;
    let vcpu_count = line.vcpus;
    if !line.vcpu_affinity.is_empty() && line.vcpu_affinity.len() != usize::from(vcpu_count) {
        let message = format!(
            "--vcpu-affinity names {} processors of the host, and --vcpus is {vcpu_count}",
            line.vcpu_affinity.len()
        );
        return Err(CommandLine::command().error(ErrorKind::WrongNumberOfValues, message));
    }
    let devices: Vec<_> = [line.blk, line.net, line.console].concat();
    // The first place is the bridge's.
    if devices.len() >= PCI_DEVICES_MAX {
        let message =
            format!("{} devices, and the bus has room for {}", devices.len(), PCI_DEVICES_MAX - 1);
        return Err(CommandLine::command().error(ErrorKind::TooManyValues, message));
    }
    Ok(Options {
        kernel: line.kernel,
        initrd: line.initrd,
        command_line: line.cmdline,
        memory_bytes: line.memory,
        hugepages: line.hugepages,
        vcpu_count,
        affinity: line.vcpu_affinity,
        reboots: !line.no_reboot,
        sandbox: line.sandbox,
        devices,
        control: line.control,
    })
}

/// Run a virtual machine whose devices are all other processes
///
/// outboard-vmm boots a Linux kernel under KVM. Its guest's disks, networks and consoles are behind the
/// vhost-user sockets of daemons, which may come, go and come back while it runs.
///
/// A daemon is somebody else's, by the path of its socket, or started here and ended with the machine, by what it is to
/// serve: --blk file=disk.img. Then what follows are options of the daemon's (vhost-blk, vhost-net, vhost-console), without
/// their dashes: --blk file=disk.img,num-queues=4,read-only. It is looked for beside this program, then in PATH.
///
/// SIGUSR1 pauses the machine, SIGUSR2 resumes it, SIGHUP writes statistics to standard error, SIGTERM
/// presses the power button and, the second time, ends it; SIGINT ends it at once.
#[derive(Debug, Parser)]
#[command(name = "outboard-vmm", version, max_term_width = 100)]
struct CommandLine {
    /// The kernel: a bzImage, or an ELF file with a PVH entry
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    cmdline: String,
    /// The guest's memory, with K, M, G or T for units of 1024, a multiple of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    memory: u64,
    /// Take huge pages of 2 MiB for it, which must be there (vm.nr_hugepages)
    #[arg(long)]
    hugepages: bool,
    /// How many processors the guest has
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u8).range(1..=i64::from(VCPUS_MAX))
    )]
    vcpus: u8,
    /// The host's processor for each of the guest's, by their numbers
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = parse_host_cpu)]
    vcpu_affinity: Vec<usize>,
    /// A disk, by the socket of its vhost-user daemon, or by file=PATH (--blk-file) and other options of vhost-blk
    ///
    /// With queue-size=N its queues have at most N entries. Words are parted by commas; a comma in a word is doubled.
    /// The machine starts when each daemon has been there once, and then runs on whether or not they are.
    #[arg(long, value_name = "SOCKET|OPTION[,WORD]", value_parser = parse_block)]
    blk: Vec<Device>,
    /// A network, by the socket of its daemon, or by tap=NAME or macvtap=PARENT (--backend) and other options of vhost-net
    ///
    /// With mac=ADDRESS the guest finds that address, else the daemon's.
    #[arg(long, value_name = "SOCKET|OPTION[,WORD]", value_parser = parse_network)]
    net: Vec<Device>,
    /// A console, by the socket of its daemon, or by stdio, pty[:LINK], unix:PATH or file:PATH (the endpoint of --port) and
    /// other options of vhost-console
    #[arg(long, value_name = "SOCKET|ENDPOINT|OPTION[,WORD]", value_parser = parse_console)]
    console: Vec<Device>,
    /// Take commands on a unix socket created at PATH, as JSON lines such as {"command":"stats"}
    ///
    /// The others are pause, resume, powerdown (the power button) and quit (ends at once).
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// End when the guest restarts its machine
    #[arg(long)]
    no_reboot: bool,
    /// What becomes of a system call that its thread has no need of: it ends the process, the kernel logs it, or nothing
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Sandbox::On)]
    sandbox: Sandbox,
}

fn parse_block(text: &str) -> Result<Device, String> {
    parse_device(Kind::Block, text)
}

fn parse_network(text: &str) -> Result<Device, String> {
    parse_device(Kind::Network(None), text)
}

fn parse_console(text: &str) -> Result<Device, String> {
    parse_device(Kind::Console, text)
}

fn parse_device(kind: Kind, text: &str) -> Result<Device, String> {
    // No path has a zero byte, so one can stand for a doubled comma.
    let parted = text.replace(",,", "\0");
    let mut words = parted.split(',').map(|word| word.replace('\0', ","));
    let first = words.next().filter(|word| !word.is_empty());
    let first = first.ok_or("the path of a socket, or what is to be served, is missing")?;
    let served = served(kind, &first);
    let is_ours = served.is_some();
    let mut arguments = Vec::from_iter(served);
    let mut device = Device { kind, queue_size: QUEUE_SIZE, daemon: Whose::Theirs(first.into()) };
    for word in words {
        match word.split_once('=') {
            Some(("queue-size", size)) => device.queue_size = parse_queue_size(size)?,
            Some(("mac", address)) if !is_ours && matches!(kind, Kind::Network(_)) => {
                device.kind = Kind::Network(Some(parse_mac(address)?));
            }
            _ if !is_ours => return Err(format!("{word:?} is no word of this device")),
            _ => {}
        }
        arguments.push(format!("--{word}"));
    }
    if is_ours {
        device.daemon = Whose::Ours(arguments);
    }
    Ok(device)
}

/// The daemon's option that a device's first word is, if it is none of a socket: a path with such a beginning is written with
/// its directory.
fn served(kind: Kind, word: &str) -> Option<String> {
    let is_endpoint =
        |word: &str| matches!(word.split(':').next(), Some("stdio" | "pty" | "unix" | "file"));
    let key = word.split_once('=').map(|(key, _)| key);
    let is_option = |key: &str| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    match (kind, key) {
        // A comma within the word is doubled once more.
        (Kind::Console, _) if is_endpoint(word) => {
            Some(format!("--port=console,endpoint={}", word.replace(',', ",,")))
        }
        (Kind::Block, Some("file")) => Some(format!("--blk-{word}")),
        (Kind::Network(_), Some("tap" | "macvtap")) => Some(format!("--backend={word}")),
        (_, Some(key)) if is_option(key) => Some(format!("--{word}")),
        _ => None,
    }
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    let size: u16 = text.parse().map_err(|error| format!("{text:?}: {error}"))?;
    if size.is_power_of_two() && size <= QUEUE_SIZE_MAX {
        Ok(size)
    } else {
        Err(format!("a queue of {size} entries: powers of two up to {QUEUE_SIZE_MAX} are possible"))
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bad = || format!("{text:?} is no Ethernet address, such as 52:54:00:12:34:56");
    let mut address = [0; 6];
    let mut words = text.split(':');
    for byte in &mut address {
        let word = words.next().filter(|word| word.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(word, 16).map_err(|error| format!("{}: {error}", bad()))?;
    }
    match (words.next(), address[0] & 1) {
        (None, 0) => Ok(address),
        (None, _) => Err(format!("{text:?} is a group's address")),
        (Some(_), _) => Err(bad()),
    }
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        other => return Err(format!("{other} is none of the units K, M, G and T")),
    };
    let number: u64 = digits.parse().map_err(|error| format!("{digits:?}: {error}"))?;
    let len = number.checked_mul(unit).ok_or("more bytes than there are numbers for")?;
    if !(LEN_MIN..=LEN_MAX).contains(&len) {
        return Err(format!("{len} bytes are not between {LEN_MIN} (64M) and {LEN_MAX} (16T)"));
    }
    if len % LEN_UNIT != 0 {
        return Err(format!("{len} bytes are no multiple of {LEN_UNIT} (2M)"));
    }
    Ok(len)
}

fn parse_host_cpu(text: &str) -> Result<usize, String> {
    let cpu: usize = text.parse().map_err(|error| format!("{text:?}: {error}"))?;
    let max = rustix::thread::CpuSet::MAX_CPU;
    if cpu < max { Ok(cpu) } else { Err(format!("{cpu} is not below {max}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &str) -> Result<Options, clap::Error> {
        let words = ["outboard-vmm"].into_iter().chain(words.split_whitespace());
        parse(words.map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_memory("2G"), Ok(2 << 30));
        assert_eq!(parse_memory("67108864"), Ok(64 << 20));
        for text in ["", "G", "2g", "2GiB", "1M", "65537K", "32T", "99999999999999999999", "-1G"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn each_processor_has_one_of_the_host_s_or_none_has() {
        let options = parse_words("--kernel k --vcpus 2 --vcpu-affinity 3,1").unwrap();
        assert_eq!(options.affinity, [3, 1]);
        let error = parse_words("--kernel k --vcpus 2 --vcpu-affinity 3").unwrap_err();
        assert!(error.to_string().contains("names 1 processors"), "{error}");
        assert!(parse_words("--kernel k --vcpu-affinity 100000").is_err());
    }

    #[test]
    fn devices_have_sockets_and_words_of_their_own() {
        let options = parse_words(
            "--kernel k --console c --net n,mac=52:54:00:12:34:56 --blk a,,b,queue-size=64 --blk d",
        )
        .unwrap();
        let devices: Vec<_> = options
            .devices
            .iter()
            .map(|device| (device.kind, device.daemon.clone(), device.queue_size))
            .collect();
        let theirs = |path: &str| Whose::Theirs(path.into());
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let expected = [
            (Kind::Block, theirs("a,b"), 64),
            (Kind::Block, theirs("d"), QUEUE_SIZE),
            (Kind::Network(Some(mac)), theirs("n"), QUEUE_SIZE),
            (Kind::Console, theirs("c"), QUEUE_SIZE),
        ];
        assert_eq!(devices, expected);
        for words in [
            "--blk ,queue-size=2",
            "--blk a,mac=52:54:00:12:34:56",
            "--blk a,queue-size=3",
            "--blk a,queue-size=0",
            "--net a,mac=52:54:00:12:34",
            "--net a,mac=52:54:00:12:34:56:78",
            "--net a,mac=53:54:00:12:34:56",
            "--net a,mac=52:54:00:12:34:g6",
        ] {
            assert!(parse_words(&format!("--kernel k {words}")).is_err(), "{words}");
        }
    }

    #[test]
    fn what_is_to_be_served_is_said_by_the_daemon_s_own_options() {
        for (words, expected) in [
            (
                "--blk file=a=,,b,read-only,queue-size=64",
                "--blk-file=a=,b --read-only --queue-size=64",
            ),
            ("--blk disk=null:1G,num-queues=4", "--disk=null:1G --num-queues=4"),
            ("--net tap=t0,mac=52:54:00:12:34:56", "--backend=tap=t0 --mac=52:54:00:12:34:56"),
            ("--net backend=null,mtu=1400", "--backend=null --mtu=1400"),
            ("--console stdio,replay=1M", "--port=console,endpoint=stdio --replay=1M"),
            ("--console pty:a,,b", "--port=console,endpoint=pty:a,,b"),
            ("--console port=name=a,,endpoint=null", "--port=name=a,endpoint=null"),
        ] {
            let options = parse_words(&format!("--kernel k {words}")).unwrap();
            let [Device { daemon: Whose::Ours(arguments), kind, .. }] = &*options.devices else {
                panic!("{words}: {:?}", options.devices);
            };
            assert_eq!(arguments.join(" "), expected);
            assert!(
                !matches!(kind, Kind::Network(Some(_))),
                "the address is the daemon's to offer"
            );
        }
        for words in ["--blk stdio", "--blk ./file=a", "--net /run/tap=0", "--console ./stdio"] {
            let options = parse_words(&format!("--kernel k {words}")).unwrap();
            assert!(matches!(options.devices[0].daemon, Whose::Theirs(_)), "{words}");
        }
        assert!(parse_words("--kernel k --blk file=a,queue-size=3").is_err());
    }

    #[test]
    fn there_are_at_most_254_processors() {
        assert!(parse_words("--kernel k --vcpus 254").is_ok());
        assert!(parse_words("--kernel k --vcpus 255").is_err());
        assert!(parse_words("--kernel k --vcpus 0").is_err());
    }
}
