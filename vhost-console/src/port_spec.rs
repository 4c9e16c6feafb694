//! What `--port` says: a port, and the endpoints at its host's end.
//!
//! Contract: words with commas between them, of which those that follow an endpoint are that endpoint's. A comma within a word is
//! doubled, as QEMU has it. An error names the word. Whether a port has a place among the others is not known here.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use common::daemon::options::{ValueError, parse_group, parse_mode, parse_size};
use rustix::fs::{Gid, Mode};
use thiserror::Error;

use crate::config::PORTS_MAX;

/// The longest name. udev has it in a path of its own, whose names have 255 bytes; this is what people read in a list.
const NAME_BYTES_MAX: usize = 64;
/// Endpoints of a port: each is a task, and a descriptor or more.
const ENDPOINTS_MAX: usize = 16;
/// The smallest log that is worth turning over.
const MAX_SIZE_MIN: u64 = 4096;
/// Logs that are kept when one is turned over.
const KEEP_DEFAULT: u32 = 5;
/// The most: each turning-over renames them all.
const KEEP_MAX: u32 = 1000;
/// Sockets are the daemon's own account's only.
const MODE_DEFAULT: Mode = Mode::from_raw_mode(0o600);

/// A port that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortSpec {
    pub(crate) name: Option<String>,
    pub(crate) is_console: bool,
    /// Its place; none: the next that is free.
    pub(crate) id: Option<u16>,
    /// At least one.
    pub(crate) endpoints: Vec<EndpointSpec>,
}

/// An endpoint that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EndpointSpec {
    Pty { link: Option<PathBuf> },
    Unix { path: PathBuf, mode: u32, group: Option<Gid> },
    File(FileSpec),
    Cast { path: PathBuf },
    Stdio,
    Fd(RawFd),
    Null,
}

/// A log that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FileSpec {
    pub(crate) path: PathBuf,
    /// It is turned over before it grows beyond this; none: never.
    pub(crate) max_size: Option<u64>,
    /// How many that were turned over are kept.
    pub(crate) keep: u32,
    /// Lines begin with their time.
    pub(crate) timestamps: bool,
}

/// What is wrong with what `--port` says.
#[derive(Debug, Error)]
pub(crate) enum SpecError {
    #[error(
        "{0:?} is no word of a port: they are console, name=NAME, id=N and endpoint=KIND[:WHAT]"
    )]
    Word(String),
    #[error("{0:?} is there twice")]
    Twice(String),
    #[error(
        "name={0:?}: a name has 1 to {NAME_BYTES_MAX} bytes, letters, digits and any of . _ - : +, and begins with no dot"
    )]
    Name(String),
    #[error("id={0}: it is a number from 0 to {last}", last = PORTS_MAX - 1)]
    Id(String),
    #[error("it has no endpoint: endpoint=null is one that leads nowhere")]
    NoEndpoint,
    #[error("it has more than {ENDPOINTS_MAX} endpoints")]
    ManyEndpoints,
    #[error("endpoint={0}: it is pty[:LINK], unix:PATH, file:PATH, cast:FILE, stdio, fd:N or null")]
    Endpoint(String),
    #[error("endpoint={0}: the descriptor is a number")]
    Descriptor(String),
    #[error("{word:?} belongs to {owner}, and there is none before it")]
    Owner { word: String, owner: &'static str },
    #[error("max-size={0}: it is {MAX_SIZE_MIN} bytes at least, or a number with k, M, G or T")]
    MaxSize(String),
    #[error("keep={0}: it is a number from 0 to {KEEP_MAX}")]
    Keep(String),
    #[error("mode={mode}")]
    Mode { mode: String, source: ValueError },
    #[error("group={group}")]
    Group { group: String, source: ValueError },
}

impl FromStr for PortSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut spec = Self { name: None, is_console: false, id: None, endpoints: Vec::new() };
        for word in words(text) {
            spec.take(&word)?;
        }
        match spec.endpoints.len() {
            0 => Err(SpecError::NoEndpoint),
            len if len > ENDPOINTS_MAX => Err(SpecError::ManyEndpoints),
            _ => Ok(spec),
        }
    }
}

impl PortSpec {
    fn take(&mut self, word: &str) -> Result<(), SpecError> {
        let twice = || SpecError::Twice(word.to_owned());
        match word.split_once('=') {
            None if word == "console" && !self.is_console => self.is_console = true,
            None if word == "console" => return Err(twice()),
            Some(("name", _)) if self.name.is_some() => return Err(twice()),
            Some(("name", name)) => self.name = Some(parse_name(name)?),
            Some(("id", _)) if self.id.is_some() => return Err(twice()),
            Some(("id", id)) => self.id = Some(parse_id(id)?),
            Some(("endpoint", endpoint)) => self.endpoints.push(endpoint.parse()?),
            _ => take_option(self.endpoints.last_mut(), word)?,
        }
        Ok(())
    }
}

/// The words of `text`, with doubled commas made single.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(character);
        }
    }
    words
}

fn parse_name(name: &str) -> Result<String, SpecError> {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || "._-:+".contains(c);
    let is_name = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.chars().all(is_safe);
    is_name.then(|| name.to_owned()).ok_or_else(|| SpecError::Name(name.to_owned()))
}

fn parse_id(id: &str) -> Result<u16, SpecError> {
    id.parse().ok().filter(|id| *id < PORTS_MAX).ok_or_else(|| SpecError::Id(id.to_owned()))
}

impl EndpointSpec {
    /// Whether two would be in each other's way, and nothing else says so: who writes the same file turns it over for the
    /// other, and who reads the same input takes it away. Of sockets and links the system knows whose they are.
    pub(crate) fn clashes_with(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Stdio, Self::Stdio) => true,
            (Self::Fd(one), Self::Fd(another)) => one == another,
            _ => self.file().is_some_and(|file| other.file() == Some(file)),
        }
    }

    fn file(&self) -> Option<&Path> {
        match self {
            Self::File(FileSpec { path, .. }) | Self::Cast { path } => Some(path),
            Self::Pty { .. } | Self::Unix { .. } | Self::Stdio | Self::Fd(_) | Self::Null => None,
        }
    }
}

impl fmt::Display for EndpointSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pty { link: None } => write!(formatter, "pty"),
            Self::Pty { link: Some(link) } => write!(formatter, "pty:{}", link.display()),
            Self::Unix { path, .. } => write!(formatter, "unix:{}", path.display()),
            Self::File(file) => write!(formatter, "file:{}", file.path.display()),
            Self::Cast { path } => write!(formatter, "cast:{}", path.display()),
            Self::Stdio => write!(formatter, "stdio"),
            Self::Fd(fd) => write!(formatter, "fd:{fd}"),
            Self::Null => write!(formatter, "null"),
        }
    }
}

impl FromStr for EndpointSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (kind, what) = match text.split_once(':') {
            Some((kind, what)) => (kind, Some(what)),
            None => (text, None),
        };
        match (kind, what) {
            ("pty", None) => Ok(Self::Pty { link: None }),
            ("stdio", None) => Ok(Self::Stdio),
            ("null", None) => Ok(Self::Null),
            (_, None | Some("")) => Err(SpecError::Endpoint(text.to_owned())),
            ("pty", Some(link)) => Ok(Self::Pty { link: Some(link.into()) }),
            ("unix", Some(path)) => {
                let mode = MODE_DEFAULT.as_raw_mode();
                Ok(Self::Unix { path: path.into(), mode, group: None })
            }
            ("file", Some(path)) => Ok(Self::File(FileSpec {
                path: path.into(),
                max_size: None,
                keep: KEEP_DEFAULT,
                timestamps: false,
            })),
            ("cast", Some(path)) => Ok(Self::Cast { path: path.into() }),
            ("fd", Some(number)) => {
                let fd = number.parse().ok().filter(|fd| *fd >= 0);
                fd.map(Self::Fd).ok_or_else(|| SpecError::Descriptor(text.to_owned()))
            }
            _ => Err(SpecError::Endpoint(text.to_owned())),
        }
    }
}

/// A word that belongs to the endpoint before it.
fn take_option(endpoint: Option<&mut EndpointSpec>, word: &str) -> Result<(), SpecError> {
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    let owner = match (name, value) {
        ("max-size" | "keep", Some(_)) | ("timestamps", None) => "endpoint=file:PATH",
        ("mode" | "group", Some(_)) => "endpoint=unix:PATH",
        _ => return Err(SpecError::Word(word.to_owned())),
    };
    let value = value.unwrap_or_default();
    match (endpoint, name) {
        (Some(EndpointSpec::File(file)), "max-size") => {
            let size = parse_size(value).filter(|size| *size >= MAX_SIZE_MIN);
            let size = size.ok_or_else(|| SpecError::MaxSize(value.to_owned()))?;
            file.max_size = Some(size);
        }
        (Some(EndpointSpec::File(file)), "keep") => {
            let keep = value.parse().ok().filter(|keep| *keep <= KEEP_MAX);
            file.keep = keep.ok_or_else(|| SpecError::Keep(value.to_owned()))?;
        }
        (Some(EndpointSpec::File(file)), "timestamps") => file.timestamps = true,
        (Some(EndpointSpec::Unix { mode, .. }), "mode") => {
            let parsed = parse_mode(value);
            let wrong = |source| SpecError::Mode { mode: value.to_owned(), source };
            *mode = parsed.map_err(wrong)?.as_raw_mode();
        }
        (Some(EndpointSpec::Unix { group, .. }), "group") => {
            let parsed = parse_group(value);
            let wrong = |source| SpecError::Group { group: value.to_owned(), source };
            *group = Some(parsed.map_err(wrong)?);
        }
        _ => return Err(SpecError::Owner { word: word.to_owned(), owner }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{EndpointSpec, FileSpec, PortSpec};

    fn parse(text: &str) -> PortSpec {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn port_has_the_endpoints_that_it_names_with_their_words() {
        let spec = parse(
            "name=con0,console,id=3,endpoint=unix:/run/c.sock,mode=0660,endpoint=file:/l,max-size=10M,keep=2,timestamps,\
             endpoint=pty:/run/tty,endpoint=pty,endpoint=cast:/c,endpoint=stdio,endpoint=fd:7,endpoint=null",
        );
        assert_eq!(spec.name.as_deref(), Some("con0"));
        assert_eq!((spec.is_console, spec.id), (true, Some(3)));
        let file =
            FileSpec { path: "/l".into(), max_size: Some(10 << 20), keep: 2, timestamps: true };
        let endpoints = [
            EndpointSpec::Unix { path: "/run/c.sock".into(), mode: 0o660, group: None },
            EndpointSpec::File(file),
            EndpointSpec::Pty { link: Some("/run/tty".into()) },
            EndpointSpec::Pty { link: None },
            EndpointSpec::Cast { path: "/c".into() },
            EndpointSpec::Stdio,
            EndpointSpec::Fd(7),
            EndpointSpec::Null,
        ];
        assert_eq!(spec.endpoints, endpoints);
    }

    #[test]
    fn doubled_comma_is_a_comma() {
        let spec = parse("endpoint=unix:/run/a,,b,,,mode=0600");
        let path = "/run/a,b,".into();
        assert_eq!(spec.endpoints, [EndpointSpec::Unix { path, mode: 0o600, group: None }]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, said) in [
            ("", "no word of a port"),
            ("console", "no endpoint"),
            ("consol,endpoint=null", "\"consol\""),
            ("console,console,endpoint=null", "twice"),
            ("name=a,name=b,endpoint=null", "twice"),
            ("name=,endpoint=null", "name=\"\""),
            ("name=a/b,endpoint=null", "a/b"),
            ("name=..,endpoint=null", ".."),
            ("id=31,endpoint=null", "0 to 30"),
            ("id=-1,endpoint=null", "id=-1"),
            ("endpoint=tcp:80", "endpoint=tcp:80"),
            ("endpoint=unix:", "endpoint=unix:"),
            ("endpoint=file", "endpoint=file"),
            ("endpoint=null:x", "endpoint=null:x"),
            ("endpoint=fd:-1", "a number"),
            ("endpoint=unix:/a,keep=3", "endpoint=file:PATH"),
            ("mode=0600,endpoint=unix:/a", "endpoint=unix:PATH"),
            ("endpoint=file:/a,max-size=1", "max-size=1"),
            ("endpoint=file:/a,keep=1001", "keep=1001"),
            ("endpoint=unix:/a,mode=9", "mode=9"),
            ("endpoint=unix:/a,group=no-such-group", "group=no-such-group"),
            ("endpoint=null,", "\"\""),
        ] {
            let error = text.parse::<PortSpec>().expect_err(text).to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        let many = ["endpoint=null"; 17].join(",");
        assert!(many.parse::<PortSpec>().is_err());
    }
}
