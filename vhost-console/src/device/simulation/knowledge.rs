//! What a driver knows of ports: what it was told, and what it says.
//!
//! Contract: it does as Linux does. Each message that it is told must be news to it, unless it has asked again or a port has
//! come to where another one was: what it said of that one may have crossed on the way.

use std::collections::BTreeMap;

use common::simulation::Random;

use crate::config::Size;
use crate::control::Order;

/// A port that the driver has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) is_ready: bool,
    pub(super) is_console: bool,
    pub(super) name: Option<String>,
    pub(super) is_host_open: bool,
    pub(super) size: Option<Size>,
    /// It has been opened, as far as the device has heard.
    pub(super) is_open: bool,
    /// What it has been told may be told again.
    is_forgetful: bool,
}

/// See the module's head.
#[derive(Default)]
pub(super) struct Knowledge {
    pub(super) ports: BTreeMap<u16, Known>,
    /// The device has heard that the driver has started.
    pub(super) has_started: bool,
    /// Places where there was another port before.
    worn: Vec<u16>,
    /// What it is to say, the oldest first.
    pub(super) says: Vec<[u8; 8]>,
}

/// Puts a message of the driver's together.
pub(super) fn message(id: u32, event: u16, value: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&id.to_le_bytes());
    bytes[4..6].copy_from_slice(&event.to_le_bytes());
    bytes[6..].copy_from_slice(&value.to_le_bytes());
    bytes
}

impl Knowledge {
    /// The driver starts.
    pub(super) fn start(&mut self) {
        *self = Self { says: vec![message(u32::MAX, 0, 1)], ..Self::default() };
    }

    /// The driver says once more that it is ready for a port.
    pub(super) fn ask_again(&mut self, id: u16) {
        if let Some(port) = self.ports.get_mut(&id).filter(|port| port.is_ready) {
            port.is_forgetful = true;
            self.says.push(message(id.into(), 3, 1));
        }
    }

    /// Somebody in the guest opens a port, or closes it.
    pub(super) fn open(&mut self, id: u16, is_open: bool) {
        if self.ports.get(&id).is_some_and(|port| port.is_ready) {
            self.says.push(message(id.into(), 6, is_open.into()));
        }
    }

    /// The device has heard a message, which was the oldest.
    pub(super) fn was_heard(&mut self, bytes: &[u8]) {
        let [id, _, _, _, event, _, value, _] = *bytes else { return };
        let port = self.ports.get_mut(&u16::from(id));
        match (event, port) {
            (0, _) => self.has_started = true,
            (3, Some(port)) => port.is_ready = value == 1,
            (6, Some(port)) if port.is_ready => port.is_open = value == 1,
            _ => {}
        }
    }

    /// The device has told something.
    pub(super) fn hear(&mut self, bytes: &[u8], order: Order, random: &mut Random) {
        let (head, rest) = bytes.split_at(8);
        let id = u16::try_from(u32::from_le_bytes(head[..4].try_into().unwrap())).unwrap();
        let event = u16::from_le_bytes(head[4..6].try_into().unwrap());
        let value = u16::from_le_bytes(head[6..].try_into().unwrap());
        if event == 1 {
            let before = self.ports.insert(id, Known::default());
            assert!(before.is_none(), "port {id} is added twice");
            let can = !random.once_in(20);
            let is_forgetful = self.worn.contains(&id);
            self.ports.get_mut(&id).unwrap().is_forgetful = is_forgetful;
            return self.says.push(message(id.into(), 3, can.into()));
        }
        if event == 2 {
            assert!(self.ports.remove(&id).is_some(), "port {id} is removed, which there is not");
            return self.worn.push(id);
        }
        let port = self.ports.get_mut(&id).expect("a port that was added");
        let before = port.clone();
        match event {
            4 => port.is_console = value == 1,
            5 => {
                let [a, b] = [&rest[..2], &rest[2..]]
                    .map(|of| u16::from_le_bytes(of.try_into().expect("two bytes each")));
                let (columns, rows) = if order == Order::ColumnsFirst { (a, b) } else { (b, a) };
                port.size = Some(Size { columns, rows });
            }
            6 => port.is_host_open = value == 1,
            7 => port.name = Some(String::from_utf8(rest.to_vec()).unwrap()),
            other => panic!("event {other}"),
        }
        assert!(before != *port || port.is_forgetful, "port {id} is told {event} again: {port:?}");
    }
}
