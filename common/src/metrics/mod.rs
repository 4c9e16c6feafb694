//! What a daemon counts, and how it tells.
//!
//! Counters live with the code that counts: a queue's with the worker that owns the queue, the
//! daemon's with the main thread. Each has one writer, so counting costs a plain add; reading
//! happens only when somebody asks on the control socket. The names, help texts and places of all
//! of them stand in one table ([`export`]), from which the JSON of `stats` and the OpenMetrics text
//! of `GET /metrics` are both made.
//!
//! The limits of rate are no counters, but are asked for in the same breath; they are told here too.
//!
//! This module is a leaf: it knows no queue, no session and no socket. It deliberately has no
//! registry that a device could add metrics of its own to; a device names its kinds of request and its
//! reasons to drop one ([`Vocabulary`]), and that has been enough.

mod counter;
mod export;
mod histogram;

use std::sync::Arc;

pub use counter::Counter;
pub use histogram::{Histogram, HistogramSnapshot};

use crate::rate_limit::{RateLimits, Topic};

/// What is counted about one kind of request (a block device's read, write, flush…) on one queue.
// 128 bytes: two cache lines, because x86 prefetches lines in pairs; two queues' workers must not
// share one.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct KindMetrics {
    /// Requests completed, successful or not.
    pub requests: Counter,
    /// Payload bytes of the requests that succeeded.
    pub bytes: Counter,
    /// Requests that were answered with an error.
    pub errors: Counter,
    /// From popping the request's chain to publishing its used entry.
    pub latency: Histogram,
}

/// What is counted about one virtqueue; its worker is the one writer.
#[derive(Debug)]
#[repr(align(128))]
pub struct QueueMetrics {
    /// One entry per request kind, in the order of the kind names given to [`Metrics::new`].
    pub kinds: Box<[KindMetrics]>,
    /// Kicks received.
    pub kicks: Counter,
    /// Calls signalled.
    pub calls: Counter,
    /// Calls that could not be signalled because the call fd was full or gone.
    pub dropped_calls: Counter,
    /// Times that the ring was marked broken.
    pub broken: Counter,
    /// Work given up (a frame without a receive buffer), one entry per reason, in the order of the
    /// reasons given to [`Metrics::new`].
    pub drops: Box<[Counter]>,
    /// Requests whose data made a detour through a bounce buffer.
    pub bounced: Counter,
    /// Requests that had to wait because they were over a limit.
    pub throttled: Counter,
}

impl QueueMetrics {
    fn new(vocabulary: Vocabulary) -> Self {
        Self {
            kinds: vocabulary.kinds.iter().map(|_| KindMetrics::default()).collect(),
            kicks: Counter::new(),
            calls: Counter::new(),
            dropped_calls: Counter::new(),
            broken: Counter::new(),
            drops: vocabulary.drops.iter().map(|_| Counter::new()).collect(),
            bounced: Counter::new(),
            throttled: Counter::new(),
        }
    }
}

/// What is counted about the daemon as a whole; the main thread is the one writer.
#[derive(Debug, Default)]
pub struct DaemonMetrics {
    /// Front ends served.
    pub sessions: Counter,
    /// Front ends turned away because another one was being served.
    pub refused_front_ends: Counter,
    /// Requests of front ends that were answered with an error or ended the session.
    pub protocol_errors: Counter,
    /// Sessions that ended for another reason than a hang-up or a termination signal.
    pub broken_sessions: Counter,
}

/// What does not change while a daemon lives; plain words (letters, digits, `_`, `-`), for they are
/// exported as label values without escaping.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The kind of device, `block` for one.
    pub device: &'static str,
    /// The engine that executes its I/O.
    pub engine: &'static str,
}

/// What a device calls what is counted, in plain words, and its limits.
#[derive(Clone, Copy, Debug)]
pub struct Vocabulary {
    /// Its kinds of request.
    pub kinds: &'static [&'static str],
    /// Its reasons to give work up.
    pub drops: &'static [&'static str],
    /// What its limits are about.
    pub limits: &'static [Topic],
}

/// All counters of a daemon, and the limits that are shown beside them.
#[derive(Debug)]
pub struct Metrics {
    /// Whose counters they are.
    pub identity: Identity,
    /// What the device calls what is counted, and its limits.
    pub vocabulary: Vocabulary,
    /// The daemon's own counters.
    pub daemon: DaemonMetrics,
    /// One entry per queue, by queue index.
    pub queues: Vec<Arc<QueueMetrics>>,
    /// What the device's requests are held to.
    pub limits: Arc<RateLimits>,
}

impl Metrics {
    /// Counters at zero, and no limits, for a device with `queue_count` queues.
    pub fn new(identity: Identity, vocabulary: Vocabulary, queue_count: u16) -> Self {
        let plain = |name: &&str| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
        };
        assert!(
            plain(&identity.device)
                && plain(&identity.engine)
                && vocabulary.kinds.iter().chain(vocabulary.drops).all(plain),
            "names of device, engine, kinds and reasons are plain words"
        );
        let queues = (0..queue_count).map(|_| Arc::new(QueueMetrics::new(vocabulary))).collect();
        let (daemon, limits) = (DaemonMetrics::default(), Arc::default());
        Self { identity, vocabulary, daemon, queues, limits }
    }
}

#[cfg(test)]
mod tests {
    use super::{Identity, KindMetrics, Metrics, QueueMetrics, Vocabulary};

    #[test]
    fn queues_and_kinds_do_not_share_cache_lines() {
        assert_eq!(align_of::<QueueMetrics>() % 128, 0);
        assert_eq!(size_of::<KindMetrics>() % 128, 0);
    }

    #[test]
    fn each_queue_has_every_kind() {
        let vocabulary = Vocabulary { kinds: &["read", "write"], drops: &["runt"], limits: &[] };
        let identity = Identity { device: "block", engine: "threads" };
        let metrics = Metrics::new(identity, vocabulary, 3);
        assert_eq!(metrics.queues.len(), 3);
        assert!(metrics.queues.iter().all(|queue| queue.kinds.len() == 2));
        assert!(metrics.queues.iter().all(|queue| queue.drops.len() == 1));
    }
}
