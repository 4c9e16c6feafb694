//! A network interface: it is configured, its peer answers, data comes back as it was sent, and load goes both ways.
//!
//! Only what the command line asks for is done, in this order; what was found is the verdict's words: `mtu=`, `queues=`,
//! `echoed=` with a number of bytes, `out=` and `in=` with a [`Throughput`].

use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::panic::resume_unwind;
use std::process::Command;
use std::thread;

use guest::announcement::Announcement;
use guest::pattern;
use guest::throughput::Throughput;

use super::{Failure, run_program};
use crate::parameters::Parameters;

pub(super) const BUSYBOX: &str = "/bin/busybox";
/// Pings of each size, and how long each may take: an emulator on a busy machine is slow.
const PING_COUNT: u32 = 3;
const PING_SECONDS: u32 = 10;
/// The echo service's port (RFC 862).
pub(super) const ECHO_PORT: u16 = 7;
/// How much of what comes back is compared at a time.
const CHUNK_BYTES: usize = 64 << 10;

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    let interface = &*parameters.interface;
    expect(interface, "address", parameters.mac.as_deref())?;
    let mut found = format!("mtu={} queues={}", attribute(interface, "mtu")?, queues(parameters)?);
    configure(parameters)?;
    let Some(peer) = parameters.peer else { return Ok(found) };
    for size in &parameters.ping_bytes {
        ping(peer, *size)?;
    }
    println!("{}", Announcement::Loaded);
    if let Some(len_bytes) = parameters.echo_bytes {
        echo(peer, parameters.seed()?, len_bytes)?;
        write!(found, " echoed={len_bytes}")?;
    }
    if let Some(seconds) = parameters.load_seconds {
        let (seconds, streams) = (seconds.to_string(), parameters.streams.unwrap_or(1).to_string());
        let options = ["--time", &seconds, "--parallel", &streams, "--reverse"];
        for (direction, options) in [("out", &options[..4]), ("in", &options)] {
            write!(found, " {direction}={}", load(peer, options)?)?;
        }
    }
    Ok(found)
}

/// How many receive queues the driver uses, which must be as many as the command line says.
fn queues(parameters: &Parameters) -> Result<usize, Failure> {
    let path = format!("/sys/class/net/{}/queues", parameters.interface);
    let entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
    let found =
        entries.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("rx-"));
    let found = found.count();
    match parameters.queues {
        Some(wanted) if wanted != found => Err(format!("{found} queues, not {wanted}").into()),
        _ => Ok(found),
    }
}

pub(super) fn configure(parameters: &Parameters) -> Result<(), Failure> {
    let interface = &*parameters.interface;
    if let Some(mtu) = parameters.mtu {
        ip(&["link", "set", interface, "mtu", &mtu.to_string()])?;
    }
    ip(&["link", "set", "lo", "up"])?;
    let has_ipv6 = parameters.addresses.iter().any(|address| address.contains(':'));
    // Without an address IPv6 would talk of its own accord. With one, nobody is asked whether it is taken: it would be of no use
    // meanwhile.
    let (switch, value) = if has_ipv6 { ("accept_dad", "0") } else { ("disable_ipv6", "1") };
    let switch = format!("/proc/sys/net/ipv6/conf/{interface}/{switch}");
    fs::write(&switch, value).map_err(|error| format!("cannot write {switch}: {error}"))?;
    ip(&["link", "set", interface, "up"])?;
    for address in &parameters.addresses {
        ip(&["address", "add", address, "dev", interface])?;
    }
    Ok(())
}

pub(super) fn ip(words: &[&str]) -> Result<(), Failure> {
    run_program(Command::new(BUSYBOX).arg("ip").args(words))
}

/// Fails unless every ping with so many bytes of data is answered.
pub(super) fn ping(peer: IpAddr, len_bytes: u32) -> Result<(), Failure> {
    let output = Command::new(BUSYBOX)
        .arg(if peer.is_ipv6() { "ping6" } else { "ping" })
        .args(["-c", &PING_COUNT.to_string(), "-i", "0.1", "-W", &PING_SECONDS.to_string()])
        .args(["-s", &len_bytes.to_string(), &peer.to_string()])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    // Its exit status is a success once any is answered.
    if said.contains(&format!(" {PING_COUNT} packets received,")) {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("pings of {len_bytes} bytes to {peer}: {said}{error}").replace('\n', "; ").into())
}

/// Sends the pattern of `seed` to the peer, whose echo service sends it back, and compares.
pub(super) fn echo(peer: IpAddr, seed: u64, len_bytes: u64) -> Result<(), Failure> {
    let mut stream = TcpStream::connect((peer, ECHO_PORT))?;
    let mut sender = stream.try_clone()?;
    let sending = thread::spawn(move || {
        pattern::write(&mut sender, seed, len_bytes)?;
        sender.flush()?;
        sender.shutdown(Shutdown::Write)
    });
    let mut expected = vec![0; CHUNK_BYTES];
    let mut received = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while at < len_bytes {
        let len = CHUNK_BYTES.min(usize::try_from(len_bytes - at)?);
        pattern::fill(&mut expected[..len], seed, at);
        stream.read_exact(&mut received[..len])?;
        if received[..len] != expected[..len] {
            return Err(format!("other data than sent came back behind byte {at}").into());
        }
        at += len as u64;
    }
    if stream.read(&mut received)? > 0 {
        return Err(format!("more than {len_bytes} bytes came back").into());
    }
    Ok(sending.join().unwrap_or_else(|panic| resume_unwind(panic))?)
}

/// Runs iperf3 to its server at the peer: `--reverse` has the peer send.
pub(super) fn load(peer: IpAddr, options: &[&str]) -> Result<Throughput, Failure> {
    let output = Command::new("/usr/bin/iperf3")
        .args(["--json", "--client", &peer.to_string()])
        .args(options)
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    Throughput::from_iperf(&String::from_utf8_lossy(&output.stdout))
        .map_err(|reason| format!("iperf3: {reason} {error}").replace('\n', "; ").into())
}

/// Fails unless the interface has this attribute, if any is asked for.
fn expect(interface: &str, name: &str, wanted: Option<&str>) -> Result<(), Failure> {
    let found = attribute(interface, name)?;
    match wanted {
        Some(wanted) if wanted != found => {
            Err(format!("{interface} has {name} {found}, not {wanted}").into())
        }
        _ => Ok(()),
    }
}

/// An attribute that the kernel shows for the interface in sysfs, without its line end.
pub(super) fn attribute(interface: &str, name: &str) -> Result<String, Failure> {
    let path = format!("/sys/class/net/{interface}/{name}");
    let value =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(value.trim().to_owned())
}
