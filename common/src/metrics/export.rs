//! The table of all metrics, and the two forms in which they leave the daemon.
//!
//! Each counter is defined once: its OpenMetrics family, its JSON key, its help text and where it
//! is read. [`Metrics::to_json`] answers the control socket's `stats`, [`Metrics::to_openmetrics`]
//! its `GET /metrics` (OpenMetrics 1.0.0 text format).
//!
//! The text is written here and not by the `prometheus-client` crate: that wants to own its metrics
//! or collectors (`'static`, so every scrape would first copy all counters), splits a unit off the
//! family's name (leaving a family called just `outboard` for the bytes), and its part of the work
//! would be the forty lines of [`Text`].

use serde_json::{Map, Value, json};

use super::{
    Counter, DaemonMetrics, Histogram, HistogramSnapshot, KindMetrics, Metrics, QueueMetrics,
};
use crate::rate_limit::{Limit, RateLimits, Term, Topic, Unit};

/// One counter of `T`.
struct CounterDefinition<T> {
    /// OpenMetrics name; samples carry the suffix `_total`.
    family: &'static str,
    json_key: &'static str,
    unit: Option<&'static str>,
    help: &'static str,
    read: fn(&T) -> &Counter,
}

/// One latency histogram of `T`.
struct HistogramDefinition<T> {
    family: &'static str,
    json_key: &'static str,
    unit: &'static str,
    help: &'static str,
    read: fn(&T) -> &Histogram,
}

const KIND_COUNTERS: &[CounterDefinition<KindMetrics>] = &[
    CounterDefinition {
        family: "outboard_requests",
        json_key: "requests",
        unit: None,
        help: "Requests completed, successful or not.",
        read: |kind| &kind.requests,
    },
    CounterDefinition {
        family: "outboard_bytes",
        json_key: "bytes",
        unit: Some("bytes"),
        help: "Payload bytes of requests that succeeded.",
        read: |kind| &kind.bytes,
    },
    CounterDefinition {
        family: "outboard_errors",
        json_key: "errors",
        unit: None,
        help: "Requests answered with an error.",
        read: |kind| &kind.errors,
    },
];

const KIND_LATENCY: HistogramDefinition<KindMetrics> = HistogramDefinition {
    family: "outboard_request_duration_seconds",
    json_key: "latency_ns",
    unit: "seconds",
    help: "Time from taking a request off its queue to publishing its completion.",
    read: |kind| &kind.latency,
};

const QUEUE_COUNTERS: &[CounterDefinition<QueueMetrics>] = &[
    CounterDefinition {
        family: "outboard_kicks",
        json_key: "kicks",
        unit: None,
        help: "Kicks received from the driver.",
        read: |queue| &queue.kicks,
    },
    CounterDefinition {
        family: "outboard_calls",
        json_key: "calls",
        unit: None,
        help: "Calls signalled to the driver.",
        read: |queue| &queue.calls,
    },
    CounterDefinition {
        family: "outboard_dropped_calls",
        json_key: "dropped_calls",
        unit: None,
        help: "Calls not signalled because the call fd was full or gone.",
        read: |queue| &queue.dropped_calls,
    },
    CounterDefinition {
        family: "outboard_broken_rings",
        json_key: "broken",
        unit: None,
        help: "Times the ring was marked broken because of what the driver wrote into it.",
        read: |queue| &queue.broken,
    },
    CounterDefinition {
        family: "outboard_bounced_requests",
        json_key: "bounced",
        unit: None,
        help: "Requests whose data was copied because direct I/O could not use it where it lay.",
        read: |queue| &queue.bounced,
    },
    CounterDefinition {
        family: "outboard_throttled_requests",
        json_key: "throttled",
        unit: None,
        help: "Requests that had to wait because they were over a limit.",
        read: |queue| &queue.throttled,
    },
];

const DAEMON_COUNTERS: &[CounterDefinition<DaemonMetrics>] = &[
    CounterDefinition {
        family: "outboard_sessions",
        json_key: "sessions",
        unit: None,
        help: "Front ends served.",
        read: |daemon| &daemon.sessions,
    },
    CounterDefinition {
        family: "outboard_refused_front_ends",
        json_key: "refused_front_ends",
        unit: None,
        help: "Front ends turned away because another one was being served.",
        read: |daemon| &daemon.refused_front_ends,
    },
    CounterDefinition {
        family: "outboard_protocol_errors",
        json_key: "protocol_errors",
        unit: None,
        help: "Requests of front ends answered with an error or with the end of the session.",
        read: |daemon| &daemon.protocol_errors,
    },
    CounterDefinition {
        family: "outboard_broken_sessions",
        json_key: "broken_sessions",
        unit: None,
        help: "Sessions that ended for another reason than a hang-up or a termination signal.",
        read: |daemon| &daemon.broken_sessions,
    },
];

/// Work given up, by reason.
const DROPS: CounterDefinition<Counter> = CounterDefinition {
    family: "outboard_drops",
    json_key: "drops",
    unit: None,
    help: "Work given up, by reason.",
    read: |count| count,
};

/// A family of limits.
struct LimitDefinition {
    family: &'static str,
    help: &'static str,
    holds: fn(Topic, &Term) -> bool,
}

const LIMITS: &[LimitDefinition] = &[
    LimitDefinition {
        family: "outboard_iops_limit",
        help: "Operations per second that requests are held to; absent where there is no limit.",
        holds: |topic, _| topic == Topic::Iops,
    },
    LimitDefinition {
        family: "outboard_fps_limit",
        help: "Frames per second that traffic is held to; absent where there is no limit.",
        holds: |topic, term| is_traffic(topic) && term.unit == Unit::Operations,
    },
    LimitDefinition {
        family: "outboard_bps_limit",
        help: "Bytes per second that requests are held to; absent where there is no limit.",
        holds: |_, term| term.unit == Unit::Bytes,
    },
];

fn is_traffic(topic: Topic) -> bool {
    matches!(topic, Topic::Rx | Topic::Tx)
}

/// JSON keys of the quantiles, and the quantiles in thousandths.
const QUANTILES: [(&str, u16); 5] =
    [("p50", 500), ("p90", 900), ("p99", 990), ("p999", 999), ("max", 1000)];

impl Metrics {
    /// All counters as the value of the `stats` reply: `{device, engine, daemon: {…}, host_drops, limits: {…}, queues:
    /// [{…, drops: {reason: …}, kinds: {name: {…}}}]}`, counts since the process started, latencies in nanoseconds.
    ///
    /// `host_drops` is what the device says of the host, and is told as `host_drops`; `null`: it says nothing.
    pub fn to_json(&self, host_drops: Option<u64>) -> Value {
        let queues: Vec<Value> = self.queues.iter().map(|queue| self.queue_json(queue)).collect();
        json!({
            "device": self.identity.device,
            "engine": self.identity.engine,
            "daemon": counters_json(DAEMON_COUNTERS, &self.daemon),
            "host_drops": host_drops,
            "limits": self.limits_json(),
            "queues": queues,
        })
    }

    /// The limits in force, as `limit` answers with them.
    pub fn limits_json(&self) -> Value {
        limits_json(&self.limits, self.vocabulary.limits)
    }

    fn queue_json(&self, queue: &QueueMetrics) -> Value {
        let kinds = self.vocabulary.kinds.iter().zip(&queue.kinds).map(|(name, kind)| {
            let mut object = counters_json(KIND_COUNTERS, kind);
            let latency = (KIND_LATENCY.read)(kind).snapshot();
            object.insert(KIND_LATENCY.json_key.to_owned(), latency_json(&latency));
            ((*name).to_owned(), Value::Object(object))
        });
        let kinds = Value::Object(kinds.collect());
        let mut object = counters_json(QUEUE_COUNTERS, queue);
        let drops = self.vocabulary.drops.iter().zip(&queue.drops);
        let drops = drops.map(|(reason, count)| ((*reason).to_owned(), Value::from(count.get())));
        object.insert(DROPS.json_key.to_owned(), Value::Object(drops.collect()));
        object.insert("kinds".to_owned(), kinds);
        Value::Object(object)
    }

    /// All counters as OpenMetrics 1.0.0 text, `# EOF` included.
    pub fn to_openmetrics(&self, host_drops: Option<u64>) -> String {
        let mut text = Text(String::new());
        let device = format!("device=\"{}\"", self.identity.device);
        text.family("outboard_daemon", "info", None, "What serves the device.");
        let engine = self.identity.engine;
        text.line(format_args!("outboard_daemon_info{{{device},engine=\"{engine}\"}} 1"));
        for definition in DAEMON_COUNTERS {
            text.counter_family(definition);
            text.counter(definition, &device, &self.daemon);
        }
        let (family, help) =
            ("outboard_host_drops", "Work that the host gave up before it came here.");
        text.family(family, "counter", None, help);
        if let Some(count) = host_drops {
            text.line(format_args!("{family}_total{{{device}}} {count}"));
        }
        let topics = self.vocabulary.limits.iter();
        let terms: Vec<(Topic, Term)> = topics
            .flat_map(|topic| topic.terms().into_iter().map(move |term| (*topic, term)))
            .collect();
        for LimitDefinition { family, help, holds } in LIMITS {
            text.family(family, "gauge", None, help);
            for (_, term) in terms.iter().filter(|(topic, term)| holds(*topic, term)) {
                if let Limit::At { rate, .. } = self.limits.in_force(term.unit, term.scope) {
                    let direction = term.direction;
                    text.line(format_args!(
                        "{family}{{{device},direction=\"{direction}\"}} {rate}"
                    ));
                }
            }
        }
        let queues: Vec<(String, &QueueMetrics)> = self
            .queues
            .iter()
            .enumerate()
            .map(|(index, queue)| (format!("{device},queue=\"{index}\""), &**queue))
            .collect();
        for definition in QUEUE_COUNTERS {
            text.counter_family(definition);
            for (labels, queue) in &queues {
                text.counter(definition, labels, queue);
            }
        }
        text.counter_family(&DROPS);
        for (labels, queue) in &queues {
            for (reason, count) in self.vocabulary.drops.iter().zip(&queue.drops) {
                text.counter(&DROPS, &format!("{labels},reason=\"{reason}\""), count);
            }
        }
        let kinds: Vec<(String, &KindMetrics)> = queues
            .iter()
            .flat_map(|(labels, queue)| {
                let named = self.vocabulary.kinds.iter().zip(&queue.kinds);
                named.map(move |(name, kind)| (format!("{labels},kind=\"{name}\""), kind))
            })
            .collect();
        for definition in KIND_COUNTERS {
            text.counter_family(definition);
            for (labels, kind) in &kinds {
                text.counter(definition, labels, kind);
            }
        }
        text.family(KIND_LATENCY.family, "histogram", Some(KIND_LATENCY.unit), KIND_LATENCY.help);
        for (labels, kind) in &kinds {
            text.histogram(KIND_LATENCY.family, labels, &(KIND_LATENCY.read)(kind).snapshot());
        }
        text.line(format_args!("# EOF"));
        text.0
    }
}

fn counters_json<T>(definitions: &[CounterDefinition<T>], from: &T) -> Map<String, Value> {
    let pair = |definition: &CounterDefinition<T>| {
        (definition.json_key.to_owned(), Value::from((definition.read)(from).get()))
    };
    definitions.iter().map(pair).collect()
}

/// The limits in force, by topic and name: `{"iops": {"total": {"rate": …, "burst": …}, …}, …}`, `null`
/// where there is none.
fn limits_json(limits: &RateLimits, topics: &[Topic]) -> Value {
    let limit = |term: Term| {
        let limit = match limits.in_force(term.unit, term.scope) {
            Limit::None => Value::Null,
            Limit::At { rate, burst } => json!({ "rate": rate, "burst": burst }),
        };
        (term.name.to_owned(), limit)
    };
    let topic = |topic: &Topic| {
        let limits = topic.terms().into_iter().map(limit).collect();
        (topic.name().to_owned(), Value::Object(limits))
    };
    Value::Object(topics.iter().map(topic).collect())
}

fn latency_json(latency: &HistogramSnapshot) -> Value {
    let mut object = Map::new();
    object.insert("count".to_owned(), Value::from(latency.count()));
    object.insert("sum".to_owned(), Value::from(latency.sum_ns()));
    for (key, per_mille) in QUANTILES {
        object.insert(key.to_owned(), Value::from(latency.quantile_ns(per_mille)));
    }
    Value::Object(object)
}

/// OpenMetrics text in the making.
struct Text(String);

impl Text {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.0.push_str(&std::fmt::format(line));
        self.0.push('\n');
    }

    fn family(&mut self, family: &str, kind: &str, unit: Option<&str>, help: &str) {
        self.line(format_args!("# TYPE {family} {kind}"));
        if let Some(unit) = unit {
            self.line(format_args!("# UNIT {family} {unit}"));
        }
        self.line(format_args!("# HELP {family} {help}"));
    }

    fn counter_family<T>(&mut self, definition: &CounterDefinition<T>) {
        self.family(definition.family, "counter", definition.unit, definition.help);
    }

    fn counter<T>(&mut self, definition: &CounterDefinition<T>, labels: &str, from: &T) {
        let count = (definition.read)(from).get();
        self.line(format_args!("{}_total{{{labels}}} {count}", definition.family));
    }

    fn histogram(&mut self, family: &str, labels: &str, latency: &HistogramSnapshot) {
        for (bound, count) in latency.cumulative_seconds() {
            // Display writes infinity as `inf`; OpenMetrics wants `+Inf` for the last bucket.
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
            self.line(format_args!("{family}_bucket{{{labels},le=\"{bound}\"}} {count}"));
        }
        self.line(format_args!("{family}_count{{{labels}}} {}", latency.count()));
        self.line(format_args!("{family}_sum{{{labels}}} {}", latency.sum_seconds()));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::json;

    use super::super::{Identity, Metrics, Vocabulary};
    use super::{DAEMON_COUNTERS, DROPS, KIND_COUNTERS, KIND_LATENCY, LIMITS, QUEUE_COUNTERS};
    use crate::rate_limit::{Change, Topic};

    fn sample() -> Metrics {
        let limits = &[Topic::Iops, Topic::Bps];
        let vocabulary =
            Vocabulary { kinds: &["read", "write"], drops: &["runt", "giant"], limits };
        let identity = Identity { device: "block", engine: "threads" };
        let metrics = Metrics::new(identity, vocabulary, 2);
        metrics.daemon.sessions.add(3);
        metrics.queues[1].kicks.add(7);
        metrics.queues[1].broken.add(1);
        metrics.queues[1].drops[1].add(5);
        let change = Change::parse("read=2000/50", Topic::Iops).expect("a limit");
        metrics.limits.change(&change);
        let write = &metrics.queues[1].kinds[1];
        write.requests.add(2);
        write.bytes.add(8192);
        write.latency.record(1_000);
        write.latency.record(2_000_000_000);
        metrics
    }

    #[test]
    fn json_holds_every_counter_of_its_queue_and_kind() {
        let stats = sample().to_json(None);
        assert_eq!(stats["host_drops"], json!(null));
        assert_eq!((&stats["device"], &stats["engine"]), (&json!("block"), &json!("threads")));
        assert_eq!(
            stats["daemon"],
            json!({"sessions": 3, "refused_front_ends": 0, "protocol_errors": 0, "broken_sessions": 0})
        );
        assert_eq!(
            stats["limits"],
            json!({"iops": {"total": null, "read": {"rate": 2000, "burst": 50}, "write": null},
                   "bps": {"total": null, "read": null, "write": null}})
        );
        assert_eq!(stats["queues"][0]["kicks"], 0);
        let queue = &stats["queues"][1];
        assert_eq!(
            (&queue["kicks"], &queue["broken"], &queue["drops"]),
            (&json!(7), &json!(1), &json!({ "runt": 0, "giant": 5 }))
        );
        let write = &queue["kinds"]["write"];
        assert_eq!(
            (&write["requests"], &write["bytes"], &write["errors"]),
            (&json!(2), &json!(8192), &json!(0))
        );
        // 2 s lies in the bucket that ends at 2^31 ns, 1 µs in the one that ends at 2^10 ns.
        assert_eq!(
            write["latency_ns"],
            json!({"count": 2, "sum": 2_000_001_000_u64, "p50": 1024, "p90": 2_147_483_648_u64,
                   "p99": 2_147_483_648_u64, "p999": 2_147_483_648_u64, "max": 2_147_483_648_u64})
        );
    }

    #[test]
    fn openmetrics_has_a_sample_per_label_set_and_ends_with_eof() {
        let text = sample().to_openmetrics(Some(17));
        for line in [
            "outboard_host_drops_total{device=\"block\"} 17",
            "# TYPE outboard_daemon info",
            "outboard_daemon_info{device=\"block\",engine=\"threads\"} 1",
            "# TYPE outboard_sessions counter",
            "outboard_sessions_total{device=\"block\"} 3",
            "outboard_kicks_total{device=\"block\",queue=\"1\"} 7",
            "outboard_broken_rings_total{device=\"block\",queue=\"0\"} 0",
            "# TYPE outboard_iops_limit gauge",
            "outboard_iops_limit{device=\"block\",direction=\"read\"} 2000",
            "outboard_throttled_requests_total{device=\"block\",queue=\"1\"} 0",
            "outboard_drops_total{device=\"block\",queue=\"1\",reason=\"giant\"} 5",
            "# UNIT outboard_bytes bytes",
            "outboard_bytes_total{device=\"block\",queue=\"1\",kind=\"write\"} 8192",
            "# TYPE outboard_request_duration_seconds histogram",
            "# UNIT outboard_request_duration_seconds seconds",
            "outboard_request_duration_seconds_bucket{device=\"block\",queue=\"1\",kind=\"write\",le=\"0.000000512\"} 0",
            "outboard_request_duration_seconds_bucket{device=\"block\",queue=\"1\",kind=\"write\",le=\"0.000001024\"} 1",
            "outboard_request_duration_seconds_bucket{device=\"block\",queue=\"1\",kind=\"write\",le=\"+Inf\"} 2",
            "outboard_request_duration_seconds_count{device=\"block\",queue=\"1\",kind=\"write\"} 2",
            "outboard_request_duration_seconds_sum{device=\"block\",queue=\"1\",kind=\"write\"} 2.000001",
        ] {
            assert!(text.lines().any(|written| written == line), "{line} is missing in\n{text}");
        }
        assert!(text.ends_with("\n# EOF\n"));
        assert!(!text.contains("\n\n"));
    }

    #[test]
    fn samples_follow_the_header_of_their_family_and_no_series_is_written_twice() {
        let text = sample().to_openmetrics(None);
        let mut family = "";
        let mut series = HashSet::new();
        let mut families = HashSet::new();
        for line in text.lines().filter(|line| *line != "# EOF") {
            if let Some(header) = line.strip_prefix("# TYPE ") {
                family = header.split(' ').next().expect("split yields one part at least");
                assert!(families.insert(family), "{family} is written in two places");
            }
            let name = line
                .trim_start_matches("# HELP ")
                .trim_start_matches("# UNIT ")
                .trim_start_matches("# TYPE ");
            assert!(name.starts_with(family), "{line} stands under {family}");
            if !line.starts_with('#') {
                let (labels, _) = line.rsplit_once(' ').expect("a sample has a value");
                assert!(series.insert(labels), "{labels} is written twice");
            }
        }
    }

    #[test]
    fn definitions_share_no_name() {
        let families: Vec<&str> = DAEMON_COUNTERS
            .iter()
            .map(|definition| definition.family)
            .chain(QUEUE_COUNTERS.iter().map(|definition| definition.family))
            .chain(KIND_COUNTERS.iter().map(|definition| definition.family))
            .chain([KIND_LATENCY.family, DROPS.family, "outboard_host_drops"])
            .chain(LIMITS.iter().map(|definition| definition.family))
            .collect();
        assert_eq!(families.iter().collect::<HashSet<_>>().len(), families.len());
        assert!(
            families.iter().all(|family| !family.ends_with("_total")),
            "the suffix belongs to samples"
        );
    }
}
