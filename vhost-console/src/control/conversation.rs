//! What driver and device have told each other of ports, as states.
//!
//! Contract: the next message is computed from what the driver is to know and what it has been told
//! ([`next_message`](Conversation::next_message)), and counts as told when it has been handed over
//! ([`told`](Conversation::told)). What changes back
//! before it was told is not told. A port that was taken out is removed before another is added at its place; what the
//! driver says of that place until it has the new one is about the old one.
//!
//! It holds whether the guest has a port open, too: the [port](crate::port)'s own flag follows this one.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use super::message::{Nonsense, Order, Said, Word};
use crate::config::Size;
use crate::device::Plugged;
use crate::drops::Drop;

/// See the module's head.
pub(crate) struct Conversation {
    order: Order,
    places: Vec<Place>,
    driver: Driver,
}

/// Who there is to talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    /// None that has said anything.
    Silent,
    /// One that takes messages.
    Listens,
    /// One without queues for messages. It has one port, which is open.
    Plain,
}

/// A message that is to be given to the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(super) id: u16,
    pub(super) word: Word,
}

/// What the queues of a port are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stance {
    /// What is given to the guest is read.
    pub(crate) is_guest_open: bool,
    /// What the guest puts out is thrown away.
    pub(crate) discards_output: bool,
}

/// A place for a port.
#[derive(Clone, Debug, Default)]
struct Place {
    plugged: Option<Plugged>,
    /// Somebody is at the host's end.
    is_host_open: bool,
    /// The guest has opened the port.
    is_guest_open: bool,
    standing: Standing,
}

/// What the driver knows of the port at a place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// It has not been told of any; it may know one from before it slept.
    #[default]
    Untold,
    /// The port that it knows is there no more.
    Stale,
    /// It has been told so.
    Removed,
    /// It has been told of the port, and has not said that it is ready for it. It has known another one here.
    Added {
        is_successor: bool,
    },
    Ready(Known),
}

/// What a driver that is ready for a port has been told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    is_console: bool,
    has_name: bool,
    /// VIRTIO 1.3, 5.3.6.2: a port is closed until the device says otherwise.
    is_host_open: bool,
    size: Option<Size>,
}

impl Conversation {
    pub(crate) fn new(ports_max: u16, order: Order) -> Self {
        let places = vec![Place::default(); usize::from(ports_max)];
        Self { order, places, driver: Driver::Silent }
    }

    /// A port is plugged in at a place that is free.
    pub(crate) fn plug(&mut self, id: u16, plugged: Plugged) {
        if let Some(place) = self.place(id) {
            place.is_host_open = false;
            place.plugged = Some(plugged);
        }
    }

    pub(crate) fn unplug(&mut self, id: u16) {
        let Some(place) = self.place(id) else { return };
        place.plugged = None;
        place.is_host_open = false;
        place.is_guest_open = false;
        if matches!(place.standing, Standing::Added { .. } | Standing::Ready(_)) {
            place.standing = Standing::Stale;
        }
    }

    /// Somebody has come to the host's end of a port, or has gone.
    pub(crate) fn set_host_open(&mut self, id: u16, is_open: bool) {
        if let Some(place) = self.place(id) {
            place.is_host_open = is_open;
        }
    }

    pub(crate) fn set_size(&mut self, id: u16, size: Size) {
        if let Some(plugged) = self.place(id).and_then(|place| place.plugged.as_mut()) {
            plugged.size = size;
        }
    }

    /// The driver starts anew.
    pub(crate) fn restart(&mut self) {
        self.driver = Driver::Silent;
        for place in &mut self.places {
            place.is_guest_open = false;
            place.standing = Standing::Untold;
        }
    }

    /// The driver has acknowledged its features: with queues for messages, or without.
    pub(crate) fn negotiated(&mut self, has_messages: bool) {
        let was_plain = self.driver == Driver::Plain;
        if was_plain == has_messages {
            self.restart();
            self.driver = if has_messages { Driver::Silent } else { Driver::Plain };
        }
    }

    /// What is plugged in at a place.
    pub(crate) fn plugged(&self, id: u16) -> Option<&Plugged> {
        self.places.get(usize::from(id))?.plugged.as_ref()
    }

    /// Whether the driver has said that it is ready for the port.
    pub(crate) fn is_ready(&self, id: u16) -> bool {
        let place = self.places.get(usize::from(id));
        self.is_plain_port(id)
            || place.is_some_and(|place| matches!(place.standing, Standing::Ready(_)))
    }

    /// Whether the guest has opened the port.
    pub(crate) fn is_guest_open(&self, id: u16) -> bool {
        let place = self.places.get(usize::from(id));
        self.is_plain_port(id) || place.is_some_and(|place| place.is_guest_open)
    }

    /// What the queues of a port are to do.
    pub(crate) fn stance(&self, id: u16) -> Stance {
        Stance { is_guest_open: self.is_guest_open(id), discards_output: self.discards_output(id) }
    }

    /// Whether what the guest puts out is for a port that is plugged in no more, or never was.
    fn discards_output(&self, id: u16) -> bool {
        let Some(place) = self.places.get(usize::from(id)) else { return true };
        match place.standing {
            _ if place.plugged.is_none() => true,
            _ if self.driver == Driver::Plain => false,
            Standing::Stale | Standing::Removed | Standing::Added { is_successor: true } => true,
            Standing::Untold | Standing::Added { is_successor: false } | Standing::Ready(_) => {
                false
            }
        }
    }

    /// Whether somebody is at the host's end.
    pub(crate) fn is_host_open(&self, id: u16) -> bool {
        self.places.get(usize::from(id)).is_some_and(|place| place.is_host_open)
    }

    /// The one port of a driver that knows of no others.
    fn is_plain_port(&self, id: u16) -> bool {
        id == 0 && self.driver == Driver::Plain && self.plugged(id).is_some()
    }

    fn place(&mut self, id: u16) -> Option<&mut Place> {
        self.places.get_mut(usize::from(id))
    }

    /// Takes a message of the driver's in.
    pub(crate) fn hear(&mut self, message: &[u8]) -> Result<(), Drop> {
        let said = Said::parse(message).map_err(|nonsense| match nonsense {
            Nonsense::Short => Drop::ShortMessage,
            Nonsense::Event => Drop::UnknownMessage,
        })?;
        match said {
            Said::DeviceReady(is_ready) => {
                self.restart();
                if !is_ready {
                    return Err(Drop::PortFailed);
                }
                self.driver = Driver::Listens;
                Ok(())
            }
            Said::PortReady { id, is_ready } => {
                let standing = &mut self.addressed(id)?.standing;
                if !is_ready {
                    *standing = Standing::Added { is_successor: false };
                    self.set_guest_open(id, false);
                    return Err(Drop::PortFailed);
                }
                // Who says so twice asks anew.
                *standing = Standing::Ready(Known::default());
                self.driver = Driver::Listens;
                Ok(())
            }
            Said::PortOpen { id, is_open } => {
                let place = self.addressed(id)?;
                match place.standing {
                    // It is about the one before.
                    Standing::Added { .. } => return Err(Drop::UnknownPort),
                    Standing::Untold => place.standing = Standing::Ready(Known::default()),
                    // Of a port that is gone it cannot be: then it was not addressed.
                    Standing::Ready(_) | Standing::Stale | Standing::Removed => {}
                }
                place.is_guest_open = is_open;
                self.driver = Driver::Listens;
                Ok(())
            }
        }
    }

    fn set_guest_open(&mut self, id: u32, is_open: bool) {
        if let Ok(place) = self.addressed(id) {
            place.is_guest_open = is_open;
        }
    }

    /// The place that the driver means.
    ///
    /// A Linux that wakes from hibernation has reset the device and says nothing of it: it goes on with the ports that it
    /// has. So a port may be one of which the driver was never told, but none that it has been told is gone.
    fn addressed(&mut self, id: u32) -> Result<&mut Place, Drop> {
        let place = u16::try_from(id).ok().and_then(|id| self.place(id));
        let place = place.filter(|place| place.plugged.is_some()).ok_or(Drop::UnknownPort)?;
        match place.standing {
            Standing::Stale | Standing::Removed => Err(Drop::UnknownPort),
            Standing::Untold | Standing::Added { .. } | Standing::Ready(_) => Ok(place),
        }
    }

    /// What the driver is to be told next.
    pub(crate) fn next_message(&self) -> Option<Message> {
        if self.driver != Driver::Listens {
            return None;
        }
        let next = |(id, place): (u16, &Place)| Some(Message { id, word: place.next_word()? });
        (0..).zip(&self.places).find_map(next)
    }

    /// As it lies in the driver's memory.
    pub(super) fn encode(&self, message: &Message) -> Vec<u8> {
        message.word.encode(message.id, self.order)
    }

    /// The driver has been given this, which was the [next message](Self::next_message).
    pub(super) fn told(&mut self, message: &Message) {
        if let Some(place) = self.place(message.id) {
            place.told(&message.word);
        }
    }
}

impl Place {
    fn next_word(&self) -> Option<Word> {
        match (&self.standing, &self.plugged) {
            (Standing::Stale, _) => Some(Word::Remove),
            (Standing::Untold | Standing::Removed, Some(_)) => Some(Word::Add),
            (Standing::Ready(known), Some(plugged)) => known.next_word(plugged, self.is_host_open),
            (Standing::Added { .. }, Some(_)) | (_, None) => None,
        }
    }

    fn told(&mut self, word: &Word) {
        match (word, &mut self.standing) {
            (Word::Remove, standing) => *standing = Standing::Removed,
            (Word::Add, standing) => {
                let is_successor = *standing == Standing::Removed;
                *standing = Standing::Added { is_successor };
            }
            (Word::Console, Standing::Ready(known)) => known.is_console = true,
            (Word::Name(_), Standing::Ready(known)) => known.has_name = true,
            (Word::Open(is_open), Standing::Ready(known)) => known.is_host_open = *is_open,
            (Word::Resize(size), Standing::Ready(known)) => known.size = Some(*size),
            // It is ready no more, and will be told all of it again when it is.
            (Word::Console | Word::Name(_) | Word::Open(_) | Word::Resize(_), _) => {}
        }
    }
}

impl Known {
    /// What a driver that knows this is to be told next. That it is a console comes first: Linux makes a terminal of it
    /// then, which has a size.
    fn next_word(&self, plugged: &Plugged, is_open: bool) -> Option<Word> {
        if plugged.is_console && !self.is_console {
            return Some(Word::Console);
        }
        if let Some(name) = plugged.name.as_ref().filter(|_| !self.has_name) {
            return Some(Word::Name(name.clone()));
        }
        if is_open != self.is_host_open {
            return Some(Word::Open(is_open));
        }
        let is_other_size = plugged.is_console && self.size != Some(plugged.size);
        is_other_size.then_some(Word::Resize(plugged.size))
    }
}

#[cfg(test)]
mod tests;
