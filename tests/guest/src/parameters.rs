//! The words of the kernel command line that are for us.
//!
//! | word | meaning |
//! |---|---|
//! | `check=NAME` | which check to run (`checks`) |
//! | `disk=PATH` | the block device, `/dev/vda` unless given |
//! | `size_bytes=N` | the size that the disk must have |
//! | `serial=TEXT` | the serial number that it must have |
//! | `seed=N` | of the pattern to write |
//! | `queues=N` | how many request or receive queues the driver must have set up |
//! | `block_bytes=N` | the size of the logical blocks that the disk must have |
//! | `cache=KIND` | the cache that the driver must find: `write-back` or `write-through` |
//! | `switch=KIND` | the cache to switch to then |
//! | `kind=NAME` | of file system: `ext4` or `xfs` |
//! | `files=N` | how many files earlier machines have announced as stable |
//! | `interface=NAME` | the network interface, `eth0` unless given |
//! | `mac=ADDRESS` | the Ethernet address that it must have |
//! | `mtu=N` | the MTU to give it |
//! | `address=ADDRESS/LENGTH,…` | the IP addresses to give it |
//! | `peer=ADDRESS` | who is at the other end |
//! | `ping_bytes=N,…` | how much data pings to the peer are to have |
//! | `echo_bytes=N` | how much the peer is to send back |
//! | `load_seconds=N` | how long iperf3 is to run in each direction |
//! | `passes=N` | how often the load is to write and read all, 4 times unless given |
//! | `streams=N` | how many connections it is to use, 1 unless given |

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::checks::Failure;

/// The parsed command line. What a check needs and was not given is its failure, not a default.
#[derive(Debug)]
pub(crate) struct Parameters {
    pub(crate) check: String,
    pub(crate) disk: PathBuf,
    pub(crate) size_bytes: Option<u64>,
    pub(crate) serial: Option<String>,
    pub(crate) seed: Option<u64>,
    pub(crate) queues: Option<usize>,
    pub(crate) block_bytes: Option<u32>,
    pub(crate) cache: Option<String>,
    pub(crate) switch: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) files: Option<u64>,
    pub(crate) interface: String,
    pub(crate) mac: Option<String>,
    pub(crate) mtu: Option<u32>,
    pub(crate) addresses: Vec<String>,
    pub(crate) peer: Option<IpAddr>,
    pub(crate) ping_bytes: Vec<u32>,
    pub(crate) echo_bytes: Option<u64>,
    pub(crate) load_seconds: Option<u64>,
    pub(crate) streams: Option<u32>,
    pub(crate) passes: Option<u32>,
}

impl Parameters {
    /// Reads `/proc/cmdline`.
    pub(crate) fn read() -> Result<Self, Failure> {
        Self::parse(&fs::read_to_string("/proc/cmdline")?)
    }

    fn parse(command_line: &str) -> Result<Self, Failure> {
        let mut parameters = Self {
            check: String::new(),
            disk: "/dev/vda".into(),
            size_bytes: None,
            serial: None,
            seed: None,
            queues: None,
            block_bytes: None,
            cache: None,
            switch: None,
            kind: None,
            files: None,
            interface: "eth0".into(),
            mac: None,
            mtu: None,
            addresses: Vec::new(),
            peer: None,
            ping_bytes: Vec::new(),
            echo_bytes: None,
            load_seconds: None,
            streams: None,
            passes: None,
        };
        for (name, value) in command_line.split_whitespace().filter_map(|word| word.split_once('='))
        {
            match name {
                "check" => value.clone_into(&mut parameters.check),
                "disk" => parameters.disk = value.into(),
                "size_bytes" => parameters.size_bytes = Some(value.parse()?),
                "serial" => parameters.serial = Some(value.to_owned()),
                "seed" => parameters.seed = Some(value.parse()?),
                "queues" => parameters.queues = Some(value.parse()?),
                "block_bytes" => parameters.block_bytes = Some(value.parse()?),
                "cache" => parameters.cache = Some(kernel_s_word(value)),
                "switch" => parameters.switch = Some(kernel_s_word(value)),
                "kind" => parameters.kind = Some(value.to_owned()),
                "files" => parameters.files = Some(value.parse()?),
                "interface" => value.clone_into(&mut parameters.interface),
                "mac" => parameters.mac = Some(value.to_owned()),
                "mtu" => parameters.mtu = Some(value.parse()?),
                "address" => parameters.addresses = value.split(',').map(str::to_owned).collect(),
                "peer" => parameters.peer = Some(value.parse()?),
                "ping_bytes" => {
                    parameters.ping_bytes =
                        value.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                "echo_bytes" => parameters.echo_bytes = Some(value.parse()?),
                "load_seconds" => parameters.load_seconds = Some(value.parse()?),
                "streams" => parameters.streams = Some(value.parse()?),
                "passes" => parameters.passes = Some(value.parse()?),
                // The rest is the kernel's.
                _ => {}
            }
        }
        Ok(parameters)
    }

    /// The seed, which the check cannot do without.
    pub(crate) fn seed(&self) -> Result<u64, Failure> {
        self.seed.ok_or_else(|| "the check needs seed= on the command line".into())
    }

    /// The kind of file system, which the check cannot do without.
    pub(crate) fn kind(&self) -> Result<&str, Failure> {
        self.kind.as_deref().ok_or_else(|| "the check needs kind= on the command line".into())
    }

    /// The number of files, which the check cannot do without.
    pub(crate) fn files(&self) -> Result<u64, Failure> {
        self.files.ok_or_else(|| "the check needs files= on the command line".into())
    }
}

/// The kernel's attribute says "write back"; a word of the command line has no space.
fn kernel_s_word(cache: &str) -> String {
    cache.replace('-', " ")
}

#[cfg(test)]
mod tests {
    use super::Parameters;

    #[test]
    fn words_of_the_kernel_are_passed_over() {
        let parameters = Parameters::parse("console=ttyS0 quiet check=read seed=7 root=/dev/vdb\n")
            .expect("valid");
        assert_eq!(parameters.check, "read");
        assert_eq!(parameters.seed, Some(7));
        assert_eq!(parameters.disk.to_str(), Some("/dev/vda"));
    }

    #[test]
    fn lists_are_split_at_commas() {
        let parameters = Parameters::parse("address=10.0.0.2/24,fd00::2/64 ping_bytes=56,1472\n")
            .expect("valid");
        assert_eq!(parameters.addresses, ["10.0.0.2/24", "fd00::2/64"]);
        assert_eq!(parameters.ping_bytes, [56, 1472]);
    }

    #[test]
    fn a_number_that_is_none_is_refused() {
        assert!(Parameters::parse("check=read seed=seven").is_err());
    }
}
