//! What the operator says, by signals and on the [control socket](socket), and what the statistics say.
//!
//! Contract: [`Signals`] holds back the signals of its table from all threads that are started after it, and tells which
//! have come. [`statistics`] is one object of JSON.
//!
//! What it deliberately does not do: act on them ([`crate::machine`]).

pub(crate) mod socket;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::{Map, Value, json};

use crate::front_end::Counts;
use crate::vcpu::Exits;

/// What an operator can want of a machine that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Keep the processors out of the guest.
    Pause,
    Resume,
    Statistics,
    PowerButton,
    /// Press the power button; the second time, end.
    Terminate,
    /// End at once, as if the plug was pulled.
    End,
}

/// Which signal says what.
const TABLE: [(Signal, Wish); 5] = [
    (Signal::SIGUSR1, Wish::Pause),
    (Signal::SIGUSR2, Wish::Resume),
    (Signal::SIGHUP, Wish::Statistics),
    (Signal::SIGTERM, Wish::Terminate),
    (Signal::SIGINT, Wish::End),
];

/// Signals that wait to be taken. Readable when there is one.
#[derive(Debug)]
pub(crate) struct Signals(SignalFd);

impl Signals {
    pub(crate) fn new() -> io::Result<Self> {
        let set: SigSet = TABLE.iter().map(|(signal, _)| *signal).collect();
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags)?))
    }

    /// The next one.
    pub(crate) fn take(&self) -> Option<Wish> {
        let number = self.0.read_signal().ok()??.ssi_signo;
        TABLE.iter().find(|(signal, _)| *signal as u32 == number).map(|(_, wish)| *wish)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How often the machine was started, how often each processor left the guest and why, and what became of the devices.
pub(crate) fn statistics(
    (starts, is_paused): (u64, bool),
    exits: &[Arc<Exits>],
    devices: &[(&str, Counts)],
) -> Value {
    let vcpus: Vec<Map<String, Value>> = exits
        .iter()
        .map(|exits| exits.counts().map(|(name, count)| (name.to_owned(), count.into())).collect())
        .collect();
    let devices: Vec<Value> = devices
        .iter()
        .map(|(name, counts)| {
            json!({
                "device": name,
                "connected": counts.is_connected,
                "connections": counts.connections,
                "config_changes": counts.config_changes,
                "writes_lost": counts.writes_lost,
                "wakeups": counts.wakeups,
            })
        })
        .collect();
    json!({ "starts": starts, "paused": is_paused, "vcpus": vcpus, "devices": devices })
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn signals_wait_until_they_are_taken() {
        let signals = Signals::new().unwrap();
        assert_eq!(signals.take(), None);
        raise(Signal::SIGUSR1).unwrap();
        assert_eq!(signals.take(), Some(Wish::Pause));
        assert_eq!(signals.take(), None);
    }

    #[test]
    fn statistics_name_every_reason() {
        let line = statistics((2, true), &[Arc::default()], &[("disk", Counts::default())]);
        assert_eq!(line["starts"], 2);
        assert_eq!(line["paused"], true);
        assert_eq!(line["vcpus"][0]["memory_writes"], 0);
        assert_eq!(line["devices"][0]["connected"], false);
        assert_eq!(line["vcpus"][0].as_object().map(Map::len), Some(7));
    }
}
