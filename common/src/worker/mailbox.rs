//! What the control plane tells a worker: a queue of commands and a bell.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// Commands for one worker. Any thread sends; the worker takes.
pub(super) struct Mailbox<C> {
    /// `None` when the worker is gone: commands are dropped then, and with them whatever their
    /// senders wait on.
    commands: Mutex<Option<VecDeque<C>>>,
    /// Written with each command, watched by the worker's engine, never read.
    bell: OwnedFd,
}

impl<C> Mailbox<C> {
    pub(super) fn new() -> rustix::io::Result<Self> {
        Ok(Self {
            commands: Mutex::new(Some(VecDeque::new())),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    pub(super) fn send(&self, command: C) {
        match &mut *self.lock() {
            Some(commands) => commands.push_back(command),
            None => return,
        }
        // The count never nears 2^64, the only way in which this can fail.
        let rung = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        debug_assert!(rung.is_ok(), "the bell of a mailbox always has room");
    }

    pub(super) fn take(&self) -> Option<C> {
        self.lock().as_mut()?.pop_front()
    }

    /// The worker will take no more.
    pub(super) fn close(&self) {
        let unread = self.lock().take();
        drop(unread);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<VecDeque<C>>> {
        // A panic elsewhere leaves a queue of commands as whole as it was.
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
