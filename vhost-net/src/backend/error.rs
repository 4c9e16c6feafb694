//! Why a back end cannot be opened, in words that tell the operator what to mend.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use common::daemon::listener::ListenError;
use rustix::io::Errno;
use thiserror::Error;

/// Why a back end cannot be opened. Every variant is the operator's to mend.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub(crate) enum OpenError {
    #[error(
        "cannot ask the kernel about network interfaces: is AF_NETLINK allowed (systemd: RestrictAddressFamilies=)?"
    )]
    Netlink(#[source] io::Error),
    #[error(
        "tap={name}: there is no /dev/net/tun: the module \"tun\" is not loaded, or the device is hidden (systemd: DeviceAllow=/dev/net/tun rw)"
    )]
    NoTunDevice { name: String, source: io::Error },
    #[error("tap={name}: cannot open /dev/net/tun")]
    TunDevice { name: String, source: io::Error },
    #[error(
        "tap={name}: there is no such interface, and making one needs CAP_NET_ADMIN; `ip tuntap add {name} mode tap user USER` makes one that USER may open"
    )]
    MayNotCreate { name: String },
    #[error(
        "tap={name}: the interface belongs to somebody else, and opening it needs CAP_NET_ADMIN; `ip tuntap add {name} mode tap user USER` makes one that USER may open"
    )]
    MayNotOpen { name: String },
    #[error("tap={name}: the interface is not a tap but of the kind {kind}")]
    OtherKind { name: String, kind: String },
    #[error("tap={name}: the tap is in use by another process")]
    Busy { name: String },
    #[error(
        "tap={name}: the tap was made with one queue, and --queue-pairs asks for {pairs}: `ip tuntap add {name} mode tap multi_queue` makes one with many"
    )]
    NotMultiQueue { name: String, pairs: u16 },
    #[error("tap={name}: a tap has fewer queues than the {pairs} that --queue-pairs asks for")]
    TooManyQueues { name: String, pairs: u16 },
    #[error("tap={name}: the kernel does not open it")]
    Attach { name: String, source: io::Error },
    #[error("cannot set {what} of the interface {name}{}", rights(.source))]
    Set { what: &'static str, name: String, source: io::Error },
    #[error("--bridge {bridge}: there is no such interface")]
    NoBridge { bridge: String },
    #[error("--bridge {bridge}: the interface is not a bridge but of the kind {kind}")]
    NotABridge { bridge: String, kind: String },
    #[error("--tap-fd {fd}: it is not an open file that was passed")]
    Passed { fd: RawFd, source: io::Error },
    #[error("--tap-fd {fd}: it is not a queue of a tap or macvtap interface")]
    NotATap { fd: RawFd, source: io::Error },
    #[error(
        "--tap-fd {fd}: {name} was opened without {flag}, which this program needs and cannot add"
    )]
    TapFlags { fd: RawFd, name: String, flag: &'static str },
    #[error("--tap-fd {fd}: it is a queue of {name}, and the first one is of {other}")]
    OtherTap { fd: RawFd, name: String, other: String },
    #[error("--tap-fd passes {passed} queues, and --queue-pairs asks for {pairs}")]
    PassedQueues { passed: usize, pairs: u16 },
    #[error("macvtap={parent}: there is no such interface")]
    NoParent { parent: String },
    #[error("macvtap={parent}: cannot make a macvtap interface on it{}", rights(.source))]
    Macvtap { parent: String, source: io::Error },
    #[error(
        "macvtap={parent}: cannot open the device {device} of the interface {name}{}",
        rights(.source)
    )]
    MacvtapDevice { parent: String, name: String, device: PathBuf, source: io::Error },
    #[error("{option} has one queue pair, and --queue-pairs asks for {pairs}")]
    OnePair { option: &'static str, pairs: u16 },
    #[error("{option} has no interface that --bridge {bridge} could attach")]
    NoInterface { option: &'static str, bridge: String },
    #[error(transparent)]
    Listen(ListenError),
    #[error("cannot set up the descriptors of {option}")]
    Descriptors { option: &'static str, source: io::Error },
}

/// The cause that is likely where the kernel does not permit something.
fn rights(source: &io::Error) -> &'static str {
    match Errno::from_io_error(source) {
        Some(Errno::PERM | Errno::ACCESS) => ", which needs CAP_NET_ADMIN",
        Some(Errno::OPNOTSUPP) => ": the kernel does not know this kind of interface",
        _ => "",
    }
}
