//! What an operator can ask of a running daemon, and how it is answered.

use std::rc::Rc;
use std::sync::Arc;

use super::control::{Answers, Command, Reply};
use super::log::with_sources;
use super::refresh::{Asked, Refresher};
use crate::device::Device;
use crate::metrics::{Metrics, limits_json};
use crate::rate_limit::{Change, Unit};
use crate::worker::Throttle;

/// Answers from the counters; changes limits; has the device look at its size.
pub(super) struct Operator<D: Device> {
    pub(super) metrics: Arc<Metrics>,
    pub(super) throttle: Throttle<D::Queue>,
    pub(super) refresher: Rc<Refresher<D>>,
}

impl<D: Device> Operator<D> {
    /// Changes what is named, all of it or, where something is wrong, nothing.
    fn limit(&self, iops: Option<String>, bps: Option<String>) -> Reply {
        let mut changes = Vec::new();
        let named = [("iops", Unit::Operations, iops), ("bps", Unit::Bytes, bps)];
        for (name, unit, spec) in named {
            let Some(spec) = spec else { continue };
            let change = Change::parse(&spec, unit)
                .map_err(|error| format!("{name}: {}", with_sources(&error)))?;
            changes.push((unit, change));
        }
        if !changes.is_empty() {
            self.throttle.change(&changes);
        }
        Ok(limits_json(self.throttle.limits()))
    }
}

impl<D: Device> Answers for Operator<D> {
    fn command(&self, command: Command) -> Reply {
        match command {
            Command::Stats {} => Ok(self.metrics.to_json()),
            Command::Limit { iops, bps } => self.limit(iops, bps),
            Command::Resize {} => self.refresher.refresh(Asked::ByOperator),
        }
    }

    fn openmetrics(&self) -> String {
        self.metrics.to_openmetrics()
    }
}
