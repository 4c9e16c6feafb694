//! Control messages: what driver and device tell each other of ports.
//!
//! Contract: what the driver is to know of each port, and what it has been told, are *states* ([`Conversation`]), and the next message
//! follows from their difference. So what waits for a driver that takes no messages is bounded, and nothing is told that is
//! no longer true. Messages of the driver in any order, about ports that there are not, too short, or of unknown kinds are
//! counted, and change nothing.

use std::sync::Arc;

use common::device::QueueIo;

use crate::config::Size;
use crate::device::{Plugged, Shared};

/// In which order a resize has its two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// As Linux reads them.
    RowsFirst,
    /// As the specification has them.
    ColumnsFirst,
}

/// See the module's head.
pub(crate) struct Conversation {
    order: Order,
    places: Vec<Place>,
}

/// A place for a port.
#[derive(Clone, Debug, Default)]
struct Place {
    plugged: Option<Plugged>,
}

impl Conversation {
    pub(crate) fn new(ports_max: u16, order: Order) -> Self {
        Self { order, places: vec![Place::default(); usize::from(ports_max)] }
    }

    pub(crate) fn plug(&mut self, id: u16, plugged: Plugged) {
        self.places[usize::from(id)].plugged = Some(plugged);
    }

    pub(crate) fn unplug(&mut self, id: u16) {
        self.places[usize::from(id)].plugged = None;
    }

    pub(crate) fn set_host_open(&mut self, _id: u16, _is_open: bool) {}

    pub(crate) fn set_size(&mut self, id: u16, size: Size) {
        if let Some(plugged) = &mut self.places[usize::from(id)].plugged {
            plugged.size = size;
        }
    }

    /// The driver starts anew.
    pub(crate) fn restart(&mut self) {}

    /// What is plugged in at a place.
    pub(crate) fn plugged(&self, id: u16) -> Option<&Plugged> {
        self.places.get(usize::from(id))?.plugged.as_ref()
    }
}

/// The queue of messages to the driver.
pub(crate) struct ToDriver {
    shared: Arc<Shared>,
}

impl ToDriver {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn process(&mut self, _io: &mut QueueIo<'_>) {}
}

/// The queue of messages from the driver.
pub(crate) struct FromDriver {
    shared: Arc<Shared>,
}

impl FromDriver {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    pub(crate) fn process(&mut self, _io: &mut QueueIo<'_>) {}
}
