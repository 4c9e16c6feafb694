//! The channel by which a daemon asks something of its front end: that the configuration has changed.
//!
//! Contract: a request is taken when there is one ([`Channel::socket`] is readable), and answered if it asks for that. Other
//! requests are refused; what is no request ends the connection. `unsafe` is here because `vhost` names the channel's
//! descriptor by its number only, and waiting for it takes a descriptor of our own.

#![allow(unsafe_code, reason = "see the head of this module")]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};

/// What a daemon has asked for.
#[derive(Default)]
struct Asked {
    config_changed: AtomicBool,
}

impl VhostUserFrontendReqHandler for Asked {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.config_changed.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// The front end's end of the channel.
pub(crate) struct Channel {
    handler: FrontendReqHandler<Asked>,
    asked: Arc<Asked>,
    socket: Arc<UnixStream>,
}

impl Channel {
    pub(crate) fn new(has_reply_ack: bool) -> Result<Self, vhost::vhost_user::Error> {
        let asked = Arc::new(Asked::default());
        let mut handler = FrontendReqHandler::new(Arc::clone(&asked))?;
        handler.set_reply_ack_flag(has_reply_ack);
        // SAFETY: `handler` has the descriptor open, and outlives the borrow, which ends with this statement.
        let ours = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let ours = ours.try_clone_to_owned().map_err(vhost::vhost_user::Error::SocketError)?;
        let socket = Arc::new(UnixStream::from(ours));
        Ok(Self { handler, asked, socket })
    }

    /// The end that the daemon is sent.
    pub(crate) fn theirs(&self) -> Theirs<'_> {
        Theirs(&self.handler)
    }

    /// What becomes readable when there is a request, and is shut down if it is not whole in time.
    pub(crate) fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// Takes a request; says whether the configuration has changed.
    pub(crate) fn take(&mut self) -> Result<bool, vhost::vhost_user::Error> {
        match self.handler.handle_request() {
            Ok(_) | Err(vhost::vhost_user::Error::ReqHandlerError(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(self.asked.config_changed.swap(false, Ordering::Relaxed))
    }
}

/// The daemon's end of the channel, of which `vhost` tells the number.
pub(crate) struct Theirs<'a>(&'a FrontendReqHandler<Asked>);

impl AsRawFd for Theirs<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.get_tx_raw_fd()
    }
}
