//! The command line.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked. Nothing is opened here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::front_end::{DeviceConfig, Kind};
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
    pub(crate) devices: Vec<DeviceConfig>,
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
    /// A disk, by the socket of its vhost-user daemon; with `queue-size=N`, of queues of at most N entries
    ///
    /// Words are parted by commas; a comma in a path is doubled. The machine starts when each daemon has
    /// been there once, and then runs on whether or not they are.
    #[arg(long, value_name = "SOCKET[,queue-size=N]", value_parser = parse_block)]
    blk: Vec<DeviceConfig>,
    /// A network, by the socket of its daemon; with `mac=ADDRESS` of that address, else of the daemon's
    #[arg(long, value_name = "SOCKET[,mac=ADDRESS][,queue-size=N]", value_parser = parse_network)]
    net: Vec<DeviceConfig>,
    /// A console, by the socket of its daemon
    #[arg(long, value_name = "SOCKET[,queue-size=N]", value_parser = parse_console)]
    console: Vec<DeviceConfig>,
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

fn parse_block(text: &str) -> Result<DeviceConfig, String> {
    parse_device(Kind::Block, text)
}

fn parse_network(text: &str) -> Result<DeviceConfig, String> {
    parse_device(Kind::Network(None), text)
}

fn parse_console(text: &str) -> Result<DeviceConfig, String> {
    parse_device(Kind::Console, text)
}

fn parse_device(kind: Kind, text: &str) -> Result<DeviceConfig, String> {
    // No path has a zero byte, so one can stand for a doubled comma.
    let parted = text.replace(",,", "\0");
    let mut words = parted.split(',').map(|word| word.replace('\0', ","));
    let socket =
        words.next().filter(|path| !path.is_empty()).ok_or("the path of a socket is missing")?;
    let mut config = DeviceConfig { kind, socket: socket.into(), queue_size: QUEUE_SIZE };
    for word in words {
        match (word.split_once('='), kind) {
            (Some(("queue-size", size)), _) => config.queue_size = parse_queue_size(size)?,
            (Some(("mac", address)), Kind::Network(_)) => {
                config.kind = Kind::Network(Some(parse_mac(address)?));
            }
            _ => return Err(format!("{word:?} is no word of this device")),
        }
    }
    Ok(config)
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
            .map(|device| (device.kind, device.socket.to_str().unwrap(), device.queue_size))
            .collect();
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let expected = [
            (Kind::Block, "a,b", 64),
            (Kind::Block, "d", QUEUE_SIZE),
            (Kind::Network(Some(mac)), "n", QUEUE_SIZE),
            (Kind::Console, "c", QUEUE_SIZE),
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
    fn there_are_at_most_254_processors() {
        assert!(parse_words("--kernel k --vcpus 254").is_ok());
        assert!(parse_words("--kernel k --vcpus 255").is_err());
        assert!(parse_words("--kernel k --vcpus 0").is_err());
    }
}
