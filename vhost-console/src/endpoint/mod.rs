//! What is at the host's end of a port.
//!
//! Contract: [`Endpoint::open`] makes every system call that can fail for the operator's reasons, and its errors name the
//! endpoint, what it was to open and the likely cause. [`Endpoint::serve`] moves the bytes, on the main thread, until it is
//! dropped. An endpoint never blocks: nobody on the main thread waits but for the runtime.
//!
//! The same words mean different things at a console and at a data port. At a console people look on, for whom nobody
//! waits; at a data port a program is at the other end, which gets every byte. Logs get every byte of both.

pub(crate) mod at;
mod cast;
mod client;
mod door;
mod file;
mod needs;
mod pty;
mod record;
#[cfg(test)]
pub(crate) mod stage;
mod stream;
mod viewers;
mod wire;

use std::io;
use std::path::PathBuf;

use common::daemon::listener::ListenError;
use serde_json::{Value, json};
use thiserror::Error;

pub(crate) use at::At;
pub(crate) use needs::needs;

use self::cast::Cast;
use self::client::Client;
use self::file::Log;
use self::pty::Pty;
use self::record::Record;
use self::stream::Stream;
use self::viewers::Viewers;
use crate::port_spec::EndpointSpec;

/// Why an endpoint cannot be opened.
#[derive(Debug, Error)]
pub(crate) enum OpenError {
    /// The socket cannot be made.
    #[error(transparent)]
    Listen(ListenError),
    /// A step on the way to a terminal failed.
    #[error("endpoint=pty: cannot {step}")]
    Pty { step: &'static str, source: io::Error },
    /// Something that is not ours to replace is where the link is to be.
    #[error(
        "endpoint=pty:LINK: {link:?} exists, and is no link to a terminal that is gone; it is left as it is"
    )]
    LinkTaken { link: PathBuf },
    /// A step on the way to a terminal's link failed.
    #[error("endpoint=pty:LINK: cannot {step} {link:?}")]
    Link { link: PathBuf, step: &'static str, source: io::Error },
    /// A log or a recording cannot be begun.
    #[error("endpoint={endpoint}:{path:?} cannot be opened for writing")]
    File { endpoint: &'static str, path: PathBuf, source: io::Error },
    /// What was passed, or standard input and output, cannot be used.
    #[error(
        "endpoint={endpoint}: cannot use the descriptor {fd} (is it open, and passed without close-on-exec?)"
    )]
    Descriptor { endpoint: String, fd: i32, source: io::Error },
    /// It is not what the operator means.
    #[error("endpoint={endpoint}: the descriptor {fd} is one that the daemon has opened itself")]
    OwnDescriptor { endpoint: String, fd: i32 },
}

/// See the module's head.
#[derive(Debug)]
pub(crate) enum Endpoint {
    Viewers(Viewers),
    Client(Client),
    Pty(Pty),
    Stream(Stream),
    File(Record<Log>),
    Cast(Record<Cast>),
    /// Nothing: what the guest puts out is only kept for who comes later.
    Null,
}

impl Endpoint {
    pub(crate) fn open(spec: &EndpointSpec, is_console: bool) -> Result<Self, OpenError> {
        match spec {
            EndpointSpec::Unix { path, mode, group } if is_console => {
                Viewers::open(path, *mode, *group).map(Self::Viewers)
            }
            EndpointSpec::Unix { path, mode, group } => {
                Client::open(path, *mode, *group).map(Self::Client)
            }
            EndpointSpec::Pty { link } => Pty::open(link.as_deref()).map(Self::Pty),
            EndpointSpec::Stdio => Stream::stdio().map(Self::Stream),
            EndpointSpec::Fd(fd) => Stream::passed(*fd).map(Self::Stream),
            EndpointSpec::File(spec) => file::open(spec).map(Self::File),
            EndpointSpec::Cast { path } => cast::open(path).map(Self::Cast),
            EndpointSpec::Null => Ok(Self::Null),
        }
    }

    /// Moves the bytes, until it is dropped; a log or a recording ends by itself once it has been [closed](Self::close) and
    /// all is written.
    pub(crate) async fn serve(&self, at: &At) {
        match self {
            Self::Viewers(viewers) => match viewers.serve(at).await {},
            Self::Client(client) => match client.serve(at).await {},
            Self::Pty(pty) => match pty.serve(at).await {},
            Self::Stream(stream) => match stream.serve(at).await {},
            Self::File(log) => log.serve(at).await,
            Self::Cast(cast) => cast.serve(at).await,
            Self::Null => {}
        }
    }

    /// Whether the guest finds the port closed while nobody is at this endpoint of a data port.
    pub(crate) fn has_clients(&self) -> bool {
        matches!(self, Self::Client(_) | Self::Pty(_))
    }

    /// Its port is removed: makes way for another endpoint of the same name.
    pub(crate) fn close(&self, at: &At) {
        match self {
            Self::Viewers(viewers) => viewers.close(),
            Self::Client(client) => client.close(),
            Self::Pty(pty) => pty.close(),
            Self::Stream(stream) => stream.close(),
            // Their names are free at any time: they only learn where they end.
            Self::File(log) => log.close(at),
            Self::Cast(cast) => cast.close(at),
            Self::Null => {}
        }
    }

    /// Whether it has something to do yet after it was [closed](Self::close).
    pub(crate) fn outlives_its_port(&self) -> bool {
        match self {
            Self::File(log) => !log.has_ended(),
            Self::Cast(cast) => !cast.has_ended(),
            Self::Viewers(_) | Self::Client(_) | Self::Pty(_) | Self::Stream(_) | Self::Null => {
                false
            }
        }
    }

    /// Opens anew what is opened by name: it may have been moved away.
    pub(crate) fn reopen(&self) {
        match self {
            Self::File(log) => log.reopen(),
            Self::Cast(cast) => cast.reopen(),
            Self::Viewers(_) | Self::Client(_) | Self::Pty(_) | Self::Stream(_) | Self::Null => {}
        }
    }

    /// Waits until all that the guest has put out is where it is to be kept.
    pub(crate) async fn settle(&self, at: &At) {
        match self {
            Self::File(log) => log.settle(at).await,
            Self::Cast(cast) => cast.settle(at).await,
            Self::Viewers(_) | Self::Client(_) | Self::Pty(_) | Self::Stream(_) | Self::Null => {}
        }
    }

    /// For the operator.
    pub(crate) fn describe(&self) -> Value {
        match self {
            Self::Viewers(viewers) => viewers.describe(),
            Self::Client(client) => client.describe(),
            Self::Pty(pty) => pty.describe(),
            Self::Stream(stream) => stream.describe(),
            Self::File(log) => log.describe(),
            Self::Cast(cast) => cast.describe(),
            Self::Null => json!({ "kind": "null" }),
        }
    }

    /// Those who look on, where this is for such.
    pub(crate) fn viewers(&self) -> Option<&Viewers> {
        match self {
            Self::Viewers(viewers) => Some(viewers),
            _ => None,
        }
    }
}
