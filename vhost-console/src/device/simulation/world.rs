//! A guest with its driver, a device, and a main thread with whoever reads and types, in one thread and by one seed.
//!
//! Contract: [`World::step`] lets one thing happen: the guest writes or gives buffers, somebody types, a reader stalls, a port
//! comes or goes, a message is sent, rings stop, the worker or the main thread turns. What can be seen of that is checked at once.
//! [`World::rest`] lets worker and main thread go to sleep, which they must, and checks that nothing waits then that could
//! go on; [`World::settle`] takes all obstacles away first.

use std::sync::Arc;

use common::device::Device;
use common::engine::ChannelIndex;
use common::simulation::{Guest, Random, Ring, RingSpec, Stage};

use super::host::{Host, take_ringing};
use super::knowledge::{Knowledge, message};
use super::mode::{Mode, size};
use crate::device::{
    CONTROL_CHANNEL, ConsoleDevice, MAIN_CHANNEL, Plugged, Shared, input_channel, room_channel,
};
use crate::doorbell::Doorbell;
use crate::port::Port;

/// More turns than any work takes that a step makes.
const TURNS_MAX: u32 = 5000;
/// The longest chain that the guest writes.
const CHAIN_BYTES_MAX: u64 = 70_000;

/// See the module's head.
pub(super) struct World {
    pub(super) random: Random,
    mode: Mode,
    device: Arc<ConsoleDevice>,
    shared: Arc<Shared>,
    stage: Stage<ConsoleDevice>,
    guest: Arc<Guest>,
    /// By their indexes.
    rings: Vec<Ring>,
    knowledge: Knowledge,
    /// What the device has on its control queue, the oldest first.
    said: Vec<Vec<u8>>,
    /// Of each place.
    pub(super) hosts: Vec<Host>,
    main_sleeps: bool,
    pub(super) restarts: u64,
    pub(super) told: u64,
}

impl World {
    pub(super) fn new(seed: u64, mode: Mode) -> Self {
        let mut random = Random::new(seed);
        let shared = Arc::new(Shared::new(mode.shape()).unwrap());
        let device = Arc::new(ConsoleDevice::new(Arc::clone(&shared)));
        let stage = Stage::new(Arc::clone(&device), random.number());
        let ring_bytes = RingSpec::bytes(mode.ring_size);
        let memory: Vec<_> =
            (0..mode.used_queues()).map(|index| (mode.ring(index).at, ring_bytes)).collect();
        let places = usize::from(mode.ports_max);
        let mut world = Self {
            random,
            mode,
            device,
            shared,
            stage,
            guest: Arc::new(Guest::new(&memory)),
            rings: Vec::new(),
            knowledge: Knowledge::default(),
            said: Vec::new(),
            hosts: (0..places).map(|_| Host::default()).collect(),
            main_sleeps: false,
            restarts: 0,
            told: 0,
        };
        let console = Plugged { is_console: true, ..Mode::plugged(&mut world.random) };
        world.plug(0, console);
        world.shared.set_host_open(0, true);
        for id in 1..mode.ports_max {
            let plugged = Mode::plugged(&mut world.random);
            world.plug(id, plugged);
        }
        world.boot();
        world
    }

    /// A driver starts.
    fn boot(&mut self) {
        let Self { mode, guest, stage, random, .. } = self;
        let queues = 0..mode.used_queues();
        self.rings =
            queues.map(|index| Ring::start(mode.ring(index), guest, stage, random)).collect();
        self.said.clear();
        if self.mode.has_messages() {
            self.knowledge.start();
        }
    }

    fn port(&self, id: u16) -> &Port {
        &self.shared.ports()[usize::from(id)]
    }

    fn is_plugged(&self, id: u16) -> bool {
        self.shared.conversation().plugged(id).is_some()
    }

    fn any_port(&mut self) -> u16 {
        self.random.index(usize::from(self.mode.used_ports())) as u16
    }

    /// The index of a port's receive queue; that of its transmit queue follows.
    fn queue_of(id: u16) -> usize {
        if id == 0 { 0 } else { usize::from(id) * 2 + 2 }
    }

    /// The driver has the port.
    fn has_port(&self, id: u16) -> bool {
        if !self.mode.has_messages() {
            return id == 0;
        }
        self.knowledge.ports.get(&id).is_some_and(|port| port.is_ready)
    }

    /// One thing happens.
    pub(super) fn step(&mut self) {
        let id = self.any_port();
        match self.random.within(0..40) {
            0..6 => self.write(id),
            6..9 => self.post(id),
            9..11 => self.give_control_buffers(),
            11..14 => self.speak(id),
            14..22 => drop(self.turn()),
            22..27 => drop(self.main_thread()),
            27..29 => self.type_bytes(id),
            29 => {
                self.hosts[usize::from(id)].stall(&mut self.random);
                self.look(id);
            }
            30 | 31 => self.readers(id),
            32 => self.rest(),
            33 => self.host_open(id),
            34 => self.plug_or_unplug(id),
            35 => self.shared.set_size(id, size(&mut self.random)),
            36 => self.emergency(),
            37 if self.random.once_in(2) => self.stop(),
            38 if self.random.once_in(3) => drop(self.restart()),
            39 if self.random.once_in(12) => self.reboot(),
            _ => {}
        }
    }

    /// The guest writes to a port.
    fn write(&mut self, id: u16) {
        // A driver waits until what it says is heard.
        let says_ready = |said: &Vec<u8>| u16::from(said[0]) == id && said[4] == 3;
        if !self.has_port(id) || self.said.iter().any(says_ready) {
            return;
        }
        let is_gone = self.port(id).discards_output();
        let ring = &mut self.rings[Self::queue_of(id) + 1];
        for _ in 0..self.random.within(1..5) {
            let most = self.random.pick(&[8, 4096, CHAIN_BYTES_MAX]);
            let bytes: Vec<u8> =
                (0..self.random.within(1..most)).map(|_| self.random.number() as u8).collect();
            let indirect = ring.has_indirect && self.random.once_in(2);
            if !ring.give(&bytes, &[], indirect, &mut self.random) {
                break;
            }
            // The driver is the last to hear that a port is gone.
            if !is_gone {
                self.hosts[usize::from(id)].written.extend(bytes);
            }
        }
        ring.publish(&self.stage, &mut self.random);
    }

    /// The guest gives buffers for what is typed.
    fn post(&mut self, id: u16) {
        if self.has_port(id) {
            let most = self.random.pick(&[8, 4096]);
            self.give_room(Self::queue_of(id), most);
        }
    }

    fn give_control_buffers(&mut self) {
        // What the device would tell the driver before, of which it does not know, a driver ignores.
        if self.mode.has_messages() && self.knowledge.has_started {
            let most = self.random.pick(&[9, 100, 100]);
            self.give_room(2, most);
        }
    }

    fn give_room(&mut self, queue: usize, most: u64) {
        let ring = &mut self.rings[queue];
        for _ in 0..self.random.within(1..6) {
            let len_bytes = self.random.within(1..most + 1) as u32;
            let indirect = ring.has_indirect && self.random.once_in(2);
            if !ring.give(&[], &[len_bytes], indirect, &mut self.random) {
                break;
            }
        }
        ring.publish(&self.stage, &mut self.random);
    }

    /// The driver says something of a port, or something senseless, and what it has to say.
    fn speak(&mut self, id: u16) {
        if !self.mode.has_messages() {
            return;
        }
        match self.random.within(0..8) {
            0..3 => self.knowledge.open(id, true),
            3 => self.knowledge.open(id, false),
            4 if !self.mode.has_changes => self.knowledge.ask_again(id),
            5 => {
                // Of a place that there is not, or a kind of message that there is not.
                let place = u32::from(self.mode.ports_max) + self.random.within(0..300) as u32;
                let event = self.random.within(1..10) as u16;
                let of = if event == 3 || event == 6 { place } else { u32::from(id) };
                self.knowledge.says.push(message(of, event, self.random.within(0..3) as u16));
            }
            _ => {}
        }
        self.say();
    }

    fn say(&mut self) {
        while !self.knowledge.says.is_empty() {
            let mut bytes = self.knowledge.says[0].to_vec();
            let place = u16::from(bytes[0]);
            let is_ready = bytes[4] == 3 && place < self.mode.ports_max;
            if is_ready && !self.rings[Self::queue_of(place) + 1].given.is_empty() {
                // What it had written to the port before is to come back first.
                break;
            }
            let ring = &mut self.rings[3];
            if self.random.once_in(8) {
                bytes.extend(b"and so on");
            }
            let indirect = ring.has_indirect && self.random.once_in(2);
            if !ring.give(&bytes, &[], indirect, &mut self.random) {
                break;
            }
            bytes.truncate(8);
            self.said.push(bytes);
            self.knowledge.says.remove(0);
        }
        self.rings[3].publish(&self.stage, &mut self.random);
    }

    /// The worker turns; false if it sleeps.
    fn turn(&mut self) -> bool {
        self.carry_ringing();
        let may_get: Vec<_> =
            (0..self.mode.used_ports()).map(|id| self.port(id).is_guest_open()).collect();
        if !self.stage.turn() {
            return false;
        }
        for (id, may_get) in (0..).zip(may_get) {
            let (queue, place) = (Self::queue_of(id), usize::from(id));
            let is_open = may_get || self.port(id).is_guest_open();
            for (given, count) in self.rings[queue].take_used() {
                assert!(is_open || count == 0, "port {id} gets bytes, which is closed");
                assert!(count > 0, "port {id} gets a buffer back that is empty");
                self.hosts[place].arrive(&given.bytes(count, &self.guest));
            }
            for (given, count) in self.rings[queue + 1].take_used() {
                assert_eq!(count, 0, "nothing is written to {given:?}");
            }
        }
        if self.mode.has_messages() {
            self.observe_messages();
        }
        assert!(self.stage.told().is_none(), "nothing is amiss");
        true
    }

    fn observe_messages(&mut self) {
        for (given, count) in self.rings[3].take_used() {
            assert_eq!(count, 0, "nothing is written to {given:?}");
            let said = self.said.remove(0);
            self.knowledge.was_heard(&said);
        }
        for (given, count) in self.rings[2].take_used() {
            // One that was too small for what was to be said is empty.
            if count > 0 {
                let bytes = given.bytes(count, &self.guest);
                self.knowledge.hear(&bytes, self.mode.order, &mut self.random);
                self.told += 1;
            }
        }
    }

    /// Rings that were made on the main thread, or by a queue as by the main thread, come to the channels.
    fn carry_ringing(&self) {
        let carry = |bell: &Doorbell, channel: ChannelIndex| {
            // An event file counts: those who wait hear once.
            if take_ringing(bell) && self.stage.kernel().waiting(channel) == 0 {
                self.stage.kernel().deliver(channel, 1u64.to_ne_bytes().to_vec());
            }
        };
        carry(self.shared.control_bell(), CONTROL_CHANNEL);
        for (id, port) in (0..).zip(self.shared.ports()) {
            carry(port.input_bell(), input_channel(id));
            carry(port.room_bell(), room_channel(id));
        }
    }

    /// The main thread turns; false if it sleeps.
    fn main_thread(&mut self) -> bool {
        let is_rung = !self.stage.kernel().take_sent(MAIN_CHANNEL).is_empty();
        if !(take_ringing(self.shared.main_bell()) || is_rung) && self.main_sleeps {
            return false;
        }
        self.shared.main_bell().arm();
        for id in 0..self.mode.ports_max {
            self.look(id);
        }
        self.main_sleeps = true;
        true
    }

    /// Who is at a port looks, for news or because there is something to read or to write to.
    fn look(&mut self, id: u16) {
        let port = &self.shared.ports()[usize::from(id)];
        if self.shared.conversation().plugged(id).is_some() {
            self.hosts[usize::from(id)].look(port, &mut self.random);
        }
    }

    fn type_bytes(&mut self, id: u16) {
        if self.is_plugged(id) {
            self.hosts[usize::from(id)].type_bytes(&mut self.random);
            self.look(id);
        }
    }

    fn readers(&mut self, id: u16) {
        if !self.is_plugged(id) {
            return;
        }
        let port = &self.shared.ports()[usize::from(id)];
        let host = &mut self.hosts[usize::from(id)];
        if self.random.once_in(3) {
            host.go(port, &mut self.random);
        } else {
            host.come(port, self.mode.replay_bytes, &mut self.random);
        }
        self.look(id);
    }

    fn host_open(&mut self, id: u16) {
        if self.is_plugged(id) {
            self.shared.set_host_open(id, !self.random.once_in(3));
        }
    }

    fn plug_or_unplug(&mut self, id: u16) {
        if !self.mode.has_messages() || !self.mode.has_changes {
            return;
        }
        if !self.is_plugged(id) {
            let plugged = Mode::plugged(&mut self.random);
            self.plug(id, plugged);
            return;
        }
        let place = usize::from(id);
        self.shared.unplug(id);
        let port = &self.shared.ports()[place];
        self.hosts[place].end(port, &mut self.random);
        if self.random.once_in(2) {
            let plugged = Mode::plugged(&mut self.random);
            self.plug(id, plugged);
        }
    }

    fn plug(&mut self, id: u16, plugged: Plugged) {
        self.shared.plug(id, plugged);
        self.shared.set_host_open(id, !self.random.once_in(3));
    }

    /// The guest has nothing but the emergency register.
    fn emergency(&mut self) {
        let has_chains = !self.rings[1].given.is_empty();
        if has_chains || !self.is_plugged(0) || self.port(0).transcript().room() == 0 {
            return;
        }
        let byte = self.random.number() as u8;
        assert!(self.device.write_config(8, &[byte, 0, 0, 0]));
        self.hosts[0].emergency(byte);
        self.stage.look();
        // It is the transmit queue's, once that has seen it.
        self.let_worker_sleep();
        self.look(0);
    }

    fn stop(&mut self) {
        let place = self.random.index(self.rings.len());
        self.rings[place].stop(&mut self.stage);
    }

    /// Rings that have stopped go on; true when one does.
    fn restart(&mut self) -> bool {
        let Self { rings, stage, .. } = self;
        let mut count = 0;
        for ring in rings {
            let Some(base) = ring.base(stage) else { continue };
            ring.go_on(base, stage);
            count += 1;
        }
        self.restarts += count;
        count > 0
    }

    fn let_worker_sleep(&mut self) {
        let mut turns = 0;
        while self.turn() {
            turns += 1;
            assert!(turns < TURNS_MAX, "the worker spins");
        }
    }

    /// The driver ends, and another one starts: with a reset or without, or it is another guest's.
    fn reboot(&mut self) {
        self.rings.iter_mut().for_each(|ring| ring.stop(&mut self.stage));
        self.let_worker_sleep();
        for ring in &mut self.rings {
            assert!(ring.base(&mut self.stage).is_some(), "a ring has not stopped");
        }
        match self.random.within(0..3) {
            0 => self.device.reset(),
            1 => {
                self.device.new_session();
                self.hosts.iter_mut().for_each(Host::clear_typed);
                (0..self.mode.ports_max).for_each(|id| self.look(id));
            }
            _ => {}
        }
        for (host, port) in self.hosts.iter_mut().zip(self.shared.ports()) {
            host.cut(port);
        }
        self.boot();
    }

    /// Lets all go to sleep.
    pub(super) fn rest(&mut self) {
        let mut turns = 0;
        loop {
            let has_turned = self.turn();
            if !self.main_thread() && !has_turned {
                break;
            }
            turns += 1;
            assert!(turns < TURNS_MAX, "somebody spins");
        }
        for id in 0..self.mode.used_ports() {
            self.must_rest(id);
        }
        if self.mode.has_messages() {
            let has_room = self.rings[2].is_running() && !self.rings[2].given.is_empty();
            let waits = self.shared.conversation().next_message();
            assert!(!has_room || waits.is_none(), "the device sleeps over {waits:?}");
            let has_words = self.rings[3].is_running() && !self.rings[3].given.is_empty();
            assert!(!has_words, "the device does not listen");
        }
    }

    fn must_rest(&self, id: u16) {
        let (port, queue) = (self.port(id), Self::queue_of(id));
        let (receive, transmit) = (&self.rings[queue], &self.rings[queue + 1]);
        let has_room = receive.is_running() && !receive.given.is_empty();
        assert!(!has_room || !port.has_input(), "port {id} sleeps over what was typed");
        let has_output = transmit.is_running() && !transmit.given.is_empty();
        assert!(!has_output || !port.has_room(), "port {id} sleeps over what was written");
        if self.is_plugged(id) {
            self.hosts[usize::from(id)].must_rest(port);
        }
    }

    /// Takes all obstacles away, and checks that all is done then.
    pub(super) fn settle(&mut self) {
        for _ in 0..TURNS_MAX {
            self.restart();
            for id in 0..self.mode.used_ports() {
                if self.is_plugged(id) {
                    self.shared.set_host_open(id, true);
                    self.hosts[usize::from(id)].go_on();
                    self.look(id);
                    self.give_room(Self::queue_of(id), 4096);
                }
                if !self.knowledge.ports.get(&id).is_some_and(|port| port.is_open) {
                    self.knowledge.open(id, true);
                }
            }
            if self.mode.has_messages() {
                self.say();
                if self.knowledge.has_started {
                    self.give_room(2, 100);
                }
            }
            self.rest();
            if self.is_done() {
                return self.must_be_done();
            }
        }
        self.must_be_done();
    }

    fn is_done(&self) -> bool {
        let has_said = self.said.is_empty() && self.knowledge.says.is_empty();
        let is_running = self.rings.iter().all(|ring| ring.is_running());
        let has_heard = self.shared.conversation().next_message().is_none();
        let ports = 0..self.mode.used_ports();
        let waits = |id: &u16| self.port(*id).inbox().len_bytes() > 0 && self.has_port(*id);
        has_said && is_running && has_heard && !ports.into_iter().any(|id| waits(&id))
    }

    fn must_be_done(&self) {
        let waits = self.shared.conversation().next_message();
        let running: Vec<_> = self.rings.iter().map(|ring| ring.is_running()).collect();
        assert!(
            self.is_done(),
            "it is not done: {waits:?}, {:?}, {:?}, {running:?}, {:?}",
            self.said,
            self.knowledge.says,
            self.knowledge.ports
        );
        for id in 0..self.mode.used_ports() {
            let (port, plugged) = (self.port(id), self.shared.conversation().plugged(id).cloned());
            let transmit = &self.rings[Self::queue_of(id) + 1];
            assert!(transmit.given.is_empty(), "port {id} has not taken all chains");
            if plugged.is_some() && self.has_port(id) {
                self.hosts[usize::from(id)].must_be_done(port);
            }
            if !self.mode.has_messages() {
                continue;
            }
            let known = self.knowledge.ports.get(&id);
            assert_eq!(plugged.is_some(), known.is_some(), "port {id}: {plugged:?}, {known:?}");
            let (Some(plugged), Some(known)) = (plugged, known.filter(|known| known.is_ready))
            else {
                continue;
            };
            assert_eq!(known.is_open, port.is_guest_open(), "port {id} is open");
            let is_all = known.is_console == plugged.is_console
                && known.name == plugged.name
                && known.is_host_open
                && known.size == plugged.is_console.then_some(plugged.size);
            assert!(is_all, "port {id}: {plugged:?}, {known:?}");
        }
    }
}
