//! What the driver is to know of each port, and what it does.
//!
//! Contract: [`next_message`](Conversation::next_message) is the first thing that the driver does not know yet; when it has been given
//! the message, that is [`told`](Conversation::told). What changes back before it was told is never told. A port that goes and
//! comes again is another one: the driver hears that it has gone first.

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
    /// The driver has said that it is there.
    has_started: bool,
    places: Vec<Place>,
}

/// A place for a port.
#[derive(Clone, Debug, Default)]
struct Place {
    plugged: Option<Plugged>,
    is_host_open: bool,
    /// What the driver knows of it; `None`: that there is none.
    known: Option<Known>,
}

/// What the driver knows of a port.
#[derive(Clone, Debug, Default)]
struct Known {
    /// It is another one than what is plugged in.
    is_gone: bool,
    /// The driver has made it, and can be told more.
    is_ready: bool,
    knows_console: bool,
    knows_name: bool,
    is_host_open: bool,
    size: Option<Size>,
}

/// A message that is to be given to the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    id: u16,
    word: Word,
}

/// What follows from a message of the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// No port is open in the guest: it has only started.
    Started,
    /// This one is open there, or no longer.
    Open { id: u16, is_open: bool },
    /// Nothing for others.
    Noted,
}

impl Conversation {
    pub(crate) fn new(ports_max: u16, order: Order) -> Self {
        let places = vec![Place::default(); usize::from(ports_max)];
        Self { order, has_started: false, places }
    }

    pub(crate) fn plug(&mut self, id: u16, plugged: Plugged) {
        if let Some(place) = self.place(id) {
            place.plugged = Some(plugged);
            place.is_host_open = false;
        }
    }

    pub(crate) fn unplug(&mut self, id: u16) {
        if let Some(place) = self.place(id) {
            place.plugged = None;
            place.is_host_open = false;
            if let Some(known) = &mut place.known {
                known.is_gone = true;
            }
        }
    }

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

    /// There is a new driver, which knows nothing yet and has yet to say that it is there.
    pub(crate) fn restart(&mut self) {
        self.has_started = false;
        self.places.iter_mut().for_each(|place| place.known = None);
    }

    /// What is plugged in at a place.
    pub(crate) fn plugged(&self, id: u16) -> Option<&Plugged> {
        self.places.get(usize::from(id))?.plugged.as_ref()
    }

    /// The host has the port open.
    pub(crate) fn is_host_open(&self, id: u16) -> bool {
        self.places.get(usize::from(id)).is_some_and(|place| place.is_host_open)
    }

    /// The driver has made the port.
    pub(crate) fn is_ready(&self, id: u16) -> bool {
        let known = self.places.get(usize::from(id)).and_then(|place| place.known.as_ref());
        known.is_some_and(|known| known.is_ready && !known.is_gone)
    }

    fn place(&mut self, id: u16) -> Option<&mut Place> {
        self.places.get_mut(usize::from(id))
    }

    /// What is to be told next.
    pub(super) fn next_message(&self) -> Option<Message> {
        if !self.has_started {
            return None;
        }
        let mut places = (0..).zip(&self.places);
        places.find_map(|(id, place)| place.next_word().map(|word| Message { id, word }))
    }

    /// As it lies in the driver's memory.
    pub(super) fn encode(&self, message: &Message) -> Vec<u8> {
        message.word.encode(message.id, self.order)
    }

    /// The driver has been given the message.
    pub(super) fn told(&mut self, message: &Message) {
        if let Some(place) = self.place(message.id) {
            place.told(&message.word);
        }
    }

    /// Takes a message of the driver's in.
    pub(super) fn hear(&mut self, message: &[u8]) -> Result<Heard, Drop> {
        let said = Said::parse(message).map_err(|nonsense| match nonsense {
            Nonsense::Short => Drop::ShortMessage,
            Nonsense::Event => Drop::UnknownMessage,
        })?;
        match said {
            Said::DeviceReady(is_ready) => {
                self.restart();
                self.has_started = is_ready;
                Ok(Heard::Started)
            }
            Said::PortReady { id, is_ready } => {
                let (_, known) = self.known(id)?;
                known.is_ready = is_ready;
                if is_ready { Ok(Heard::Noted) } else { Err(Drop::PortFailed) }
            }
            Said::PortOpen { id, is_open } => {
                let (id, known) = self.known(id)?;
                if known.is_gone {
                    // It does not know yet, and will.
                    return Ok(Heard::Noted);
                }
                Ok(Heard::Open { id, is_open })
            }
        }
    }

    /// The port that the driver speaks of, which it must know of.
    fn known(&mut self, id: u32) -> Result<(u16, &mut Known), Drop> {
        let Ok(id) = u16::try_from(id) else { return Err(Drop::UnknownPort) };
        let known = self.place(id).and_then(|place| place.known.as_mut());
        known.map(|known| (id, known)).ok_or(Drop::UnknownPort)
    }
}

impl Place {
    /// The first thing that the driver does not know.
    // VIRTIO 1.3, 5.3.6.2, and what drivers expect: a port is added, the driver says that it is ready, and is told the rest.
    fn next_word(&self) -> Option<Word> {
        let Some(known) = &self.known else { return self.plugged.as_ref().map(|_| Word::Add) };
        if known.is_gone {
            return Some(Word::Remove);
        }
        let plugged = self.plugged.as_ref().filter(|_| known.is_ready)?;
        if plugged.is_console && !known.knows_console {
            return Some(Word::Console);
        }
        if let (Some(name), false) = (&plugged.name, known.knows_name) {
            return Some(Word::Name(name.clone()));
        }
        if known.is_host_open != self.is_host_open {
            return Some(Word::Open(self.is_host_open));
        }
        let is_resized = plugged.is_console && known.size != Some(plugged.size);
        is_resized.then_some(Word::Resize(plugged.size))
    }

    fn told(&mut self, word: &Word) {
        match (word, &mut self.known) {
            (Word::Add, known) => *known = Some(Known::default()),
            (Word::Remove, known) => *known = None,
            (Word::Console, Some(known)) => known.knows_console = true,
            (Word::Name(_), Some(known)) => known.knows_name = true,
            (Word::Open(is_open), Some(known)) => known.is_host_open = *is_open,
            (Word::Resize(size), Some(known)) => known.size = Some(*size),
            (_, None) => {}
        }
    }
}

#[cfg(test)]
mod tests;
