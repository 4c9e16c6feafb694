//! What an operator can ask of a running daemon, and how it is answered.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;

use super::control::{Answers, Command, Reply};
use super::log::with_sources;
use super::refresh::{Asked, Refresher};
use crate::device::Device;
use crate::metrics::Metrics;
use crate::rate_limit::Change;
use crate::worker::Throttle;

/// Answers from the counters; changes limits; has the device look at its size.
pub(super) struct Operator<D: Device> {
    pub(super) metrics: Arc<Metrics>,
    pub(super) throttle: Throttle<D::Queue>,
    pub(super) refresher: Rc<Refresher<D>>,
}

impl<D: Device> Operator<D> {
    fn host_drops(&self) -> Option<u64> {
        self.refresher.device().host_drops()
    }

    /// Changes what is named, all of it or, where something is wrong, nothing.
    fn limit(&self, named: &BTreeMap<String, String>) -> Reply {
        let mut all = Change::default();
        for (name, spec) in named {
            let topic = D::LIMITS.iter().find(|topic| topic.name() == name);
            let topic = topic.ok_or_else(|| {
                let known: Vec<_> = D::LIMITS.iter().map(|topic| topic.name()).collect();
                format!("there is no limit {name:?}, only {}", known.join(", "))
            })?;
            let change = Change::parse(spec, *topic)
                .map_err(|error| format!("{name}: {}", with_sources(&error)))?;
            all.and(&change);
        }
        if !all.is_empty() {
            self.throttle.change(&all);
        }
        Ok(self.metrics.limits_json())
    }
}

impl<D: Device> Answers for Operator<D> {
    fn command(&self, command: Command) -> Reply {
        match command {
            Command::Stats {} => Ok(self.metrics.to_json(self.host_drops())),
            Command::Limit(named) => self.limit(&named),
            Command::Resize {} => self.refresher.refresh(Asked::ByOperator),
        }
    }

    fn device_commands(&self) -> &'static [&'static str] {
        self.refresher.device().commands()
    }

    fn device_command(&self, command: &Value) -> Option<Reply> {
        self.refresher.device().command(command)
    }

    fn openmetrics(&self) -> String {
        self.metrics.to_openmetrics(self.host_drops())
    }
}
