//! What `--backend` says: which back end, as the operator names it.
//!
//! Contract: a [`BackendSpec`] names something that can be there. Whether it is there is found out when it is opened.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fmt;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::libc;
use thiserror::Error;

/// The longest path of a unix socket: `sun_path` without its terminating zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The shortest frame that a null back end makes: an Ethernet header.
const FRAME_BYTES_MIN: u16 = 14;

/// What the operator asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BackendSpec {
    /// `tap=NAME`: a tap interface, made where there is none.
    Tap(InterfaceName),
    /// `--tap-fd N[,N…]`: queues of a tap or macvtap interface which are open already, by number.
    TapFds(Vec<RawFd>),
    /// `macvtap=PARENT`: a macvtap interface of our own, in bridge mode on another interface.
    Macvtap(InterfaceName),
    /// `socket=PATH[,server]`: the stream protocol of QEMU's `-netdev stream`.
    Socket {
        path: PathBuf,
        /// Listen, instead of connecting.
        server: bool,
    },
    /// `null[=FRAME_BYTES]`: swallows what is sent; makes frames of that length without end.
    Null { frame_bytes: Option<u16> },
}

/// Why a `--backend` value is no back end.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum SpecError {
    #[error(
        "expected tap=NAME, macvtap=PARENT, socket=PATH[,server] or null[=FRAME_BYTES], not {0:?}"
    )]
    Kind(String),
    #[error("{kind}= needs a {what}")]
    Missing { kind: &'static str, what: &'static str },
    #[error(
        "{0:?} is not the name of an interface: 1 to 15 bytes, no '/', ':', '%' and white space, not \".\" or \"..\""
    )]
    Name(String),
    #[error("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes, {path:?} has {len_bytes}")]
    Path { path: PathBuf, len_bytes: usize },
    #[error("{0:?} is not an option of socket=PATH: there is only \"server\"")]
    SocketOption(String),
    #[error("{0:?} is not the length of a frame: {FRAME_BYTES_MIN} to 65535 bytes")]
    Frame(String),
}

/// The name of a network interface, as the kernel takes it for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InterfaceName(String);

impl InterfaceName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for InterfaceName {
    type Err = SpecError;

    fn from_str(name: &str) -> Result<Self, SpecError> {
        // As the kernel's `dev_valid_name`; and no '%', which it would replace by a number.
        let banned = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control();
        let too_long = name.len() >= libc::IFNAMSIZ;
        if name.is_empty() || too_long || matches!(name, "." | "..") || name.contains(banned) {
            return Err(SpecError::Name(name.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }
}

impl FromStr for BackendSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let (kind, value) = match spec.split_once('=') {
            Some((kind, value)) => (kind, Some(value)),
            None => (spec, None),
        };
        let named = |kind, what| match value {
            None | Some("") => Err(SpecError::Missing { kind, what }),
            Some(value) => Ok(value),
        };
        match kind {
            "tap" => Ok(Self::Tap(named("tap", "name")?.parse()?)),
            "macvtap" => Ok(Self::Macvtap(named("macvtap", "parent interface")?.parse()?)),
            "socket" => parse_socket(named("socket", "path")?),
            "null" => Ok(Self::Null { frame_bytes: value.map(parse_frame_bytes).transpose()? }),
            _ => Err(SpecError::Kind(spec.to_owned())),
        }
    }
}

fn parse_socket(value: &str) -> Result<BackendSpec, SpecError> {
    let (path, option) = match value.split_once(',') {
        Some((path, option)) => (path, Some(option)),
        None => (value, None),
    };
    let server = match option {
        None => false,
        Some("server") => true,
        Some(other) => return Err(SpecError::SocketOption(other.to_owned())),
    };
    let path = Path::new(path);
    match path.as_os_str().as_bytes().len() {
        0 => Err(SpecError::Missing { kind: "socket", what: "path" }),
        len_bytes if len_bytes > SOCKET_PATH_BYTES_MAX => {
            Err(SpecError::Path { path: path.to_owned(), len_bytes })
        }
        _ => Ok(BackendSpec::Socket { path: path.to_owned(), server }),
    }
}

fn parse_frame_bytes(value: &str) -> Result<u16, SpecError> {
    let refused = || SpecError::Frame(value.to_owned());
    // `u16::from_str` takes a leading plus sign, which no length has.
    if !value.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refused());
    }
    match value.parse() {
        Ok(bytes) if bytes >= FRAME_BYTES_MIN => Ok(bytes),
        _ => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{BackendSpec, SpecError};

    #[test]
    fn each_kind_is_understood() {
        let parsed = |spec: &str| spec.parse::<BackendSpec>().unwrap();
        assert_eq!(parsed("tap=vm0"), BackendSpec::Tap("vm0".parse().unwrap()));
        assert_eq!(parsed("macvtap=eth0.7"), BackendSpec::Macvtap("eth0.7".parse().unwrap()));
        let path = PathBuf::from("/run/a=b");
        let client = BackendSpec::Socket { path: path.clone(), server: false };
        assert_eq!(parsed("socket=/run/a=b"), client);
        assert_eq!(parsed("socket=/run/a=b,server"), BackendSpec::Socket { path, server: true });
        assert_eq!(parsed("null"), BackendSpec::Null { frame_bytes: None });
        assert_eq!(parsed("null=64"), BackendSpec::Null { frame_bytes: Some(64) });
    }

    #[test]
    fn names_that_the_kernel_would_refuse_or_change_are_refused() {
        assert!("tap=fifteen-bytes-x".parse::<BackendSpec>().is_ok());
        for name in ["sixteen-bytes-xy", "a/b", "a b", "a:1", "vm%d", ".", "..", "a\tb", "ä\u{a0}"]
        {
            let refused = format!("tap={name}").parse::<BackendSpec>();
            assert_eq!(refused, Err(SpecError::Name(name.to_owned())));
        }
    }

    #[test]
    fn wrong_values_are_refused_with_what_would_be_right() {
        let refused = |spec: &str| spec.parse::<BackendSpec>().unwrap_err().to_string();
        assert_eq!(
            refused("vde=x"),
            "expected tap=NAME, macvtap=PARENT, socket=PATH[,server] or null[=FRAME_BYTES], not \"vde=x\""
        );
        assert_eq!(refused("tap"), "tap= needs a name");
        assert_eq!(refused("macvtap="), "macvtap= needs a parent interface");
        assert_eq!(refused("socket=,server"), "socket= needs a path");
        assert_eq!(
            refused("socket=/s,client"),
            "\"client\" is not an option of socket=PATH: there is only \"server\""
        );
        for bytes in ["", "13", "65536", "+64", "6 4"] {
            assert_eq!(
                refused(&format!("null={bytes}")),
                format!("{bytes:?} is not the length of a frame: 14 to 65535 bytes")
            );
        }
        let path = format!("/{}", "a".repeat(107));
        assert_eq!(
            refused(&format!("socket={path}")),
            format!("a socket's path has at most 107 bytes, {path:?} has 108")
        );
    }
}
