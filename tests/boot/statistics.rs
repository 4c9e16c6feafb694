//! What the daemon has counted, asked over its control socket.

use std::path::Path;

use serde_json::{Value, json};

use crate::control;

/// The answer to one `stats` command.
#[derive(Debug)]
pub(crate) struct Statistics(Value);

impl Statistics {
    /// Asks the daemon whose control socket this is.
    pub(crate) fn ask(control: &Path) -> Self {
        Self(control::ask(control, &json!({ "command": "stats" })))
    }

    /// One of the counters of the daemon as a whole.
    pub(crate) fn daemon(&self, counter: &str) -> u64 {
        count(&self.0["daemon"][counter])
    }

    /// One of the counters of requests, summed over their kinds: a number for each queue.
    pub(crate) fn queues(&self, counter: &str) -> Vec<u64> {
        queues(&self.0).iter().map(|queue| all_kinds(queue, counter)).collect()
    }

    /// How many requests of one kind have been completed, or frames moved.
    pub(crate) fn requests(&self, kind: &str) -> u64 {
        self.kind(kind, "requests").iter().sum()
    }

    /// How many bytes requests of one kind had.
    pub(crate) fn bytes(&self, kind: &str) -> u64 {
        self.kind(kind, "bytes").iter().sum()
    }

    /// One of the counters of one kind of requests: a number for each queue.
    pub(crate) fn kind(&self, kind: &str, counter: &str) -> Vec<u64> {
        queues(&self.0).iter().map(|queue| count(&queue["kinds"][kind][counter])).collect()
    }

    /// One of the counters that are not of requests, over all queues.
    pub(crate) fn all_queues(&self, counter: &str) -> u64 {
        queues(&self.0).iter().map(|queue| count(&queue[counter])).sum()
    }

    /// How many frames were dropped for this reason.
    pub(crate) fn drops(&self, reason: &str) -> u64 {
        queues(&self.0).iter().map(|queue| count(&queue["drops"][reason])).sum()
    }
}

fn queues(statistics: &Value) -> &[Value] {
    statistics["queues"].as_array().unwrap_or_else(|| panic!("no queues in {statistics}"))
}

fn all_kinds(queue: &Value, counter: &str) -> u64 {
    let kinds =
        queue["kinds"].as_object().unwrap_or_else(|| panic!("no kinds of requests in {queue}"));
    kinds.values().map(|kind| count(&kind[counter])).sum()
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("a counter is expected, found {value}"))
}
