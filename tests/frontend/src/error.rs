//! What can go wrong between this front end and a back end.

use std::io;
use std::time::Duration;

/// What a front end sees when a back end does not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing arrived in time; the connection is still there.
    #[error("no answer from the back end within {0:?}")]
    Silence(Duration),
    /// The back end closed the connection.
    #[error("the back end hung up")]
    HangUp,
    /// A `REPLY_ACK` acknowledgement that says no.
    #[error("the back end refused request {request} with code {code}")]
    Refused {
        /// The request's number.
        request: u32,
        /// The acknowledgement's nonzero value.
        code: u64,
    },
    /// An answer that does not fit the request.
    #[error(
        "request {request} was answered by request {answered}, flags {flags:#x}, {size_bytes} bytes"
    )]
    WrongReply {
        /// The request's number.
        request: u32,
        /// The reply's number.
        answered: u32,
        /// The reply's flags.
        flags: u32,
        /// The length of the reply's payload.
        size_bytes: usize,
    },
    /// The used ring named a head that this driver has not made available.
    #[error("used element with head {head} and length {len_bytes}, which is not outstanding")]
    WrongUsed {
        /// The element's `id`.
        head: u32,
        /// The element's `len`.
        len_bytes: u32,
    },
    /// The operating system refused.
    #[error("system call")]
    System(#[from] io::Error),
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Error::System(errno.into())
    }
}
