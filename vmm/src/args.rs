//! The command line.
//!
//! Contract: [`parse`] turns it into [`Options`] in which every value has been checked. Nothing is opened here.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::memory::{LEN_MAX, LEN_MIN, LEN_UNIT};

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
    Ok(Options {
        kernel: line.kernel,
        initrd: line.initrd,
        command_line: line.cmdline,
        memory_bytes: line.memory,
        hugepages: line.hugepages,
        vcpu_count,
        affinity: line.vcpu_affinity,
        reboots: !line.no_reboot,
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
    /// End when the guest restarts its machine
    #[arg(long)]
    no_reboot: bool,
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
    fn there_are_at_most_254_processors() {
        assert!(parse_words("--kernel k --vcpus 254").is_ok());
        assert!(parse_words("--kernel k --vcpus 255").is_err());
        assert!(parse_words("--kernel k --vcpus 0").is_err());
    }
}
