//! A network interface that does what the host types, line by line: so a host can change what is around a guest between one
//! step and the next.
//!
//! | line | what is done before it is answered |
//! |---|---|
//! | `ip WORDS` | busybox's `ip`: addresses, MTU, modes, the interface's own address |
//! | `ethtool WORDS` | `ethtool`: queues and offloads of the driver |
//! | `tc WORDS` | `tc`: what happens to frames before the driver has them |
//! | `set NAME VALUE` | a setting of the kernel's, below `/proc/sys/net` |
//! | `ping PEER BYTES` | every ping of this size is answered |
//! | `miss PEER` | no ping is |
//! | `serve` | others can have what they send echoed from now on, datagrams too |
//! | `segments PEER PORT BYTES COUNT` | the kernel is given so many datagrams as one, for whoever is last to cut |
//! | `echo PEER SEED BYTES` | the peer sends a pattern back |
//! | `begin-echo PEER SEED BYTES` | nothing yet: the same goes on meanwhile |
//! | `end-echo` | what was begun is over |
//! | `load PEER OPTIONS` | iperf3; the answer has what was sent and received |
//! | `await ATTRIBUTE VALUE` | the kernel's attribute of the interface has this value |
//! | `show ATTRIBUTE` | the answer has the attribute's value |
//! | `end` | the check passes |
//!
//! All is of the interface of the command line, whose addresses and MTU are set first; the first answer says that they are.

use std::fs;
use std::io;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use guest::announcement::Announcement;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketType, bind, recv, socket};

use super::network::{BUSYBOX, ECHO_PORT, attribute, configure, echo, ip, load, ping};
use super::{Failure, run_program};
use crate::parameters::Parameters;

const ETHTOOL: &str = "/sbin/ethtool";
const SOCAT: &str = "/usr/bin/socat";
const TC: &str = "/sbin/tc";
const SETTINGS: &str = "/proc/sys/net";
/// Notices of interfaces (rtnetlink(7): `RTMGRP_LINK`).
const INTERFACES: u32 = 1;
/// A notice is shorter, and what it says is looked up.
const NOTICE_BYTES: usize = 16 << 10;
/// How long an answer is waited for that must not come: others, which do, take a few milliseconds.
const MISS_SECONDS: &str = "1";

pub(super) fn run(parameters: &Parameters) -> Result<String, Failure> {
    configure(parameters)?;
    println!("{}", Announcement::Loaded);
    let mut guest = Guest { interface: &parameters.interface, echo: None };
    for (count, line) in io::stdin().lines().enumerate() {
        let line = line?;
        if line == "end" {
            return Ok(format!("{count} lines"));
        }
        let answer = guest.obey(&line);
        println!("{}", answer.map_err(|error| format!("{line}: {error}"))?);
    }
    Err("the console is closed".into())
}

struct Guest<'a> {
    interface: &'a str,
    /// Which goes on meanwhile.
    echo: Option<JoinHandle<Result<(), String>>>,
}

impl Guest<'_> {
    fn obey(&mut self, line: &str) -> Result<Announcement, Failure> {
        let words: Vec<_> = line.split_whitespace().collect();
        match &*words {
            ["ip", words @ ..] => ip(words)?,
            ["ethtool", words @ ..] => run_program(Command::new(ETHTOOL).args(words))?,
            ["tc", words @ ..] => run_program(Command::new(TC).args(words))?,
            ["set", name, value] => fs::write(Path::new(SETTINGS).join(name), value)?,
            ["ping", peer, len_bytes] => ping(peer.parse()?, len_bytes.parse()?)?,
            ["miss", peer] => miss(peer.parse()?)?,
            ["serve"] => serve()?,
            ["segments", peer, port, len_bytes, count] => {
                send_as_one(peer, port, len_bytes.parse()?, count.parse()?)?;
            }
            ["echo", peer, seed, len_bytes] => {
                echo(peer.parse()?, seed.parse()?, len_bytes.parse()?)?;
            }
            ["begin-echo", peer, seed, len_bytes] => {
                let (peer, seed, len_bytes) = (peer.parse()?, seed.parse()?, len_bytes.parse()?);
                let echo =
                    move || echo(peer, seed, len_bytes).map_err(|failure| failure.to_string());
                self.echo = Some(thread::spawn(echo));
            }
            ["end-echo"] => {
                let echo = self.echo.take().ok_or("none was begun")?;
                echo.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            }
            ["load", peer, options @ ..] => {
                return Ok(Announcement::Moved(load(peer.parse()?, options)?));
            }
            ["await", name, value] => await_value(self.interface, name, value)?,
            ["show", name] => {
                return Ok(Announcement::Found(attribute(self.interface, name)?.parse()?));
            }
            _ => return Err("nobody knows how".into()),
        }
        Ok(Announcement::Done)
    }
}

/// Fails if any ping is answered.
fn miss(peer: IpAddr) -> Result<(), Failure> {
    let output = Command::new(BUSYBOX)
        .arg(if peer.is_ipv6() { "ping6" } else { "ping" })
        .args(["-c", "3", "-i", "0.1", "-W", MISS_SECONDS, &peer.to_string()])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    // Nor was none sent, as where there is no route.
    if said.contains(" 0 packets received,") {
        return Ok(());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("pings to {peer}: {said}{error}").replace('\n', "; ").into())
}

/// Serves the echo service until the guest ends.
fn serve() -> Result<(), Failure> {
    let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT))?;
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok((len, from)) = datagrams.recv_from(&mut bytes) {
            // Who does not wait for it has gone.
            let _ = datagrams.send_to(&bytes[..len], from);
        }
    });
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT))?;
    thread::spawn(move || {
        for connection in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || send_back(connection));
        }
    });
    Ok(())
}

/// Gives the kernel datagrams of this length as one (`UDP_SEGMENT`). Each is full of its number.
fn send_as_one(peer: &str, port: &str, len_bytes: usize, count: u8) -> Result<(), Failure> {
    let bytes: Vec<_> = (0..count).flat_map(|number| vec![number; len_bytes]).collect();
    let mut socat = Command::new(SOCAT)
        .args(["-u", "-b", &bytes.len().to_string(), "-"])
        // The option's level is UDP (17), its number 103 (linux/udp.h).
        .arg(format!("UDP:{peer}:{port},setsockopt-int=17:103:{len_bytes}"))
        .stdin(Stdio::piped())
        .spawn()?;
    socat.stdin.take().ok_or("socat has no input")?.write_all(&bytes)?;
    let status = socat.wait()?;
    if status.success() { Ok(()) } else { Err(format!("socat ended with {status}").into()) }
}

fn send_back(mut connection: TcpStream) -> io::Result<()> {
    let mut bytes = vec![0; 64 << 10];
    loop {
        match connection.read(&mut bytes)? {
            0 => return connection.shutdown(Shutdown::Both),
            len => connection.write_all(&bytes[..len])?,
        }
    }
}

/// Waits until an attribute has a value. The kernel tells of each change of an interface.
fn await_value(interface: &str, name: &str, value: &str) -> Result<(), Failure> {
    // No protocol is number 0, NETLINK_ROUTE.
    let notices = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    bind(&notices, &SocketAddrNetlink::new(0, INTERFACES))?;
    let mut notice = vec![0; NOTICE_BYTES];
    while attribute(interface, name)? != value {
        recv(&notices, &mut *notice, RecvFlags::empty())?;
    }
    Ok(())
}
