//! The console device: its places for ports, and what its queues and the main thread share.
//!
//! No byte's way has a lock. The conversation with the driver has one: control messages are rare.

use std::convert::Infallible;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::device::{Device, DeviceQueue, QueueIo, Runtime};
use common::engine::{ChannelIndex, Completion};
use common::sandbox::Needs;
use serde_json::Value;
use tokio::sync::Notify;

use crate::command::{COMMANDS, answer};
use crate::config::{
    self, Role, Size, VIRTIO_CONSOLE_F_MULTIPORT, emergency_write, features, queue_count,
};
use crate::control::{Conversation, FromDriver, Order, Stance, ToDriver};
use crate::doorbell::Doorbell;
use crate::drops::DROPS;
use crate::hub::Hub;
use crate::input::Receiver;
use crate::output::Transmitter;
use crate::port::Port;

/// What a chain is counted as, in the order of [`KINDS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Receive,
    Transmit,
    Control,
}

/// The names of [`Kind`]s in metrics.
const KINDS: &[&str] = &["receive", "transmit", "control"];

/// Rings the main thread.
pub(crate) const MAIN_CHANNEL: ChannelIndex = ChannelIndex(0);
/// Wakes the queue of control messages to the driver.
pub(crate) const CONTROL_CHANNEL: ChannelIndex = ChannelIndex(1);

/// Wakes the receive queue of a port.
pub(crate) fn input_channel(port: u16) -> ChannelIndex {
    ChannelIndex(port * 2 + 2)
}

/// Wakes the transmit queue of a port.
pub(crate) fn room_channel(port: u16) -> ChannelIndex {
    ChannelIndex(port * 2 + 3)
}

/// What the device is, as the operator has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// MULTIPORT is offered.
    pub(crate) has_several_ports: bool,
    /// Places for ports, from 1 to [`PORTS_MAX`](config::PORTS_MAX).
    pub(crate) ports_max: u16,
    /// How far back a viewer who comes late begins.
    pub(crate) replay_bytes: u64,
    /// How large consoles are until somebody says otherwise.
    pub(crate) size: Size,
    /// In which order a resize has its two numbers.
    pub(crate) order: Order,
    /// How large a ring may be.
    pub(crate) queue_size_max: u16,
}

/// What is plugged in at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plugged {
    /// What the guest calls it: `/dev/virtio-ports/NAME`.
    pub(crate) name: Option<String>,
    pub(crate) is_console: bool,
    pub(crate) size: Size,
}

/// What all queues and the main thread share.
pub(crate) struct Shared {
    shape: Shape,
    ports: Vec<Port>,
    conversation: Mutex<Conversation>,
    /// Rung by queues that have news for the main thread.
    main_bell: Doorbell,
    control_bell: Doorbell,
    /// The size of port 0 in the configuration space: columns, and rows in the upper half.
    size: AtomicU32,
    /// The configuration space has changed.
    resized: Notify,
    /// The emergency register was written while a queue has the author.
    emergency: Notify,
}

impl Shared {
    pub(crate) fn new(shape: Shape) -> rustix::io::Result<Self> {
        let ports = (0..shape.ports_max).map(|_| Port::new(shape.replay_bytes));
        let shared = Self {
            shape,
            ports: ports.collect::<Result<_, _>>()?,
            conversation: Mutex::new(Conversation::new(shape.ports_max, shape.order)),
            main_bell: Doorbell::new()?,
            control_bell: Doorbell::new()?,
            size: AtomicU32::new(0),
            resized: Notify::new(),
            emergency: Notify::new(),
        };
        shared.set_config_size(shape.size);
        Ok(shared)
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn ports(&self) -> &[Port] {
        &self.ports
    }

    pub(crate) fn main_bell(&self) -> &Doorbell {
        &self.main_bell
    }

    pub(crate) fn control_bell(&self) -> &Doorbell {
        &self.control_bell
    }

    /// Plugs a port in at a place that is free. On the main thread, as all that follows.
    pub(crate) fn plug(&self, id: u16, plugged: Plugged) {
        self.ports[usize::from(id)].begin_anew();
        if id == 0 {
            self.set_config_size(plugged.size);
        }
        self.converse(|conversation| conversation.plug(id, plugged));
    }

    /// Takes the port out of a place.
    pub(crate) fn unplug(&self, id: u16) {
        let port = &self.ports[usize::from(id)];
        port.set_takes_output(false);
        self.converse(|conversation| conversation.unplug(id));
        port.inbox().clear();
    }

    /// There is somebody at the host's end of a port, or no longer: the guest is told, and may write or not.
    pub(crate) fn set_host_open(&self, id: u16, is_open: bool) {
        self.ports[usize::from(id)].set_takes_output(is_open);
        self.converse(|conversation| conversation.set_host_open(id, is_open));
    }

    /// A console has another size.
    pub(crate) fn set_size(&self, id: u16, size: Size) {
        if id == 0 && self.set_config_size(size) {
            self.resized.notify_one();
        }
        self.converse(|conversation| conversation.set_size(id, size));
        self.ports[usize::from(id)].look();
    }

    /// Has a word with the conversation, and wakes the queues that do what came of it. From any thread.
    pub(crate) fn converse<T>(&self, word: impl FnOnce(&mut Conversation) -> T) -> T {
        let mut conversation = self.conversation();
        let before: Vec<_> = self.stances(&conversation).collect();
        let said = word(&mut conversation);
        // The ports follow while the lock is held: else the one who spoke first could have the last word.
        let after = self.stances(&conversation);
        for ((port, before), after) in self.ports.iter().zip(before).zip(after) {
            if before.is_guest_open != after.is_guest_open {
                port.set_guest_open(after.is_guest_open);
            }
            if before.discards_output != after.discards_output {
                port.set_discards_output(after.discards_output);
            }
        }
        drop(conversation);
        self.control_bell.ring_if_armed();
        said
    }

    fn stances(&self, conversation: &Conversation) -> impl Iterator<Item = Stance> {
        (0..self.shape.ports_max).map(|id| conversation.stance(id))
    }

    /// The conversation, to look at.
    pub(crate) fn conversation(&self) -> MutexGuard<'_, Conversation> {
        // A panic elsewhere leaves its flags as whole as they were.
        self.conversation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if that is another size than before.
    fn set_config_size(&self, size: Size) -> bool {
        let both = u32::from(size.columns) | u32::from(size.rows) << 16;
        self.size.swap(both, Ordering::Relaxed) != both
    }

    fn config_size(&self) -> Size {
        let both = self.size.load(Ordering::Relaxed);
        Size { columns: both as u16, rows: (both >> 16) as u16 }
    }
}

/// A console as a virtio device.
pub(crate) struct ConsoleDevice {
    shared: Arc<Shared>,
    hub: Hub,
}

impl ConsoleDevice {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { hub: Hub::new(Arc::clone(&shared)), shared }
    }

    pub(crate) fn hub(&self) -> &Hub {
        &self.hub
    }

    fn forget_driver(&self) {
        self.shared.converse(Conversation::restart);
        for port in &self.shared.ports {
            port.forget_driver();
            port.look();
        }
    }
}

impl Device for ConsoleDevice {
    type Queue = ConsoleQueue;
    const NAME: &'static str = "console";
    const KINDS: &'static [&'static str] = KINDS;
    const DROPS: &'static [&'static str] = DROPS;

    fn queue_count(&self) -> u16 {
        let shape = self.shared.shape;
        queue_count(shape.has_several_ports, shape.ports_max)
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.shape.queue_size_max
    }

    fn features(&self) -> u64 {
        features(self.shared.shape.has_several_ports)
    }

    fn read_config(&self, _features: u64, offset: u32, into: &mut [u8]) {
        config::read(self.shared.config_size(), self.shared.shape.ports_max, offset, into);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> bool {
        let (Some(byte), Some(port)) = (emergency_write(offset, data), self.shared.ports.first())
        else {
            return false;
        };
        port.emergency(byte);
        port.look();
        self.shared.emergency.notify_one();
        true
    }

    fn reset(&self) {
        self.forget_driver();
    }

    fn new_session(&self) {
        self.forget_driver();
        // It is another guest's, unless it says otherwise; and what was typed was for the one before.
        self.shared.ports.iter().for_each(|port| port.inbox().clear());
    }

    fn reopen(&self) {
        self.hub.reopen();
    }

    fn commands(&self) -> &'static [&'static str] {
        COMMANDS
    }

    fn command(&self, command: &Value) -> Option<Result<Value, String>> {
        answer(&self.hub, command)
    }

    fn needs(&self, is_commanded: bool) -> Needs {
        self.hub.needs(is_commanded)
    }

    fn files(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn channels(&self) -> Vec<BorrowedFd<'_>> {
        let of_ports =
            self.shared.ports.iter().flat_map(|port| [port.input_bell(), port.room_bell()]);
        let bells = [&self.shared.main_bell, &self.shared.control_bell];
        bells.into_iter().chain(of_ports).map(AsFd::as_fd).collect()
    }

    fn open_queue(&self, index: u16, features: u64, _queue_size: u16) -> ConsoleQueue {
        let has_messages = features & VIRTIO_CONSOLE_F_MULTIPORT != 0;
        self.shared.converse(|conversation| conversation.negotiated(has_messages));
        let role = Role::of(index, features);
        if !has_messages && role == Role::Transmit(0) {
            // Linux looks at the size of a plain console when that changes, and not before.
            self.shared.resized.notify_one();
        }
        let shared = Arc::clone(&self.shared);
        match role {
            Role::Receive(port) => ConsoleQueue::Receive(Receiver::new(shared, port)),
            Role::Transmit(port) => ConsoleQueue::Transmit(Transmitter::new(shared, port)),
            Role::ControlReceive => ConsoleQueue::ControlReceive(ToDriver::new(shared)),
            Role::ControlTransmit => ConsoleQueue::ControlTransmit(FromDriver::new(shared)),
            Role::Unused => ConsoleQueue::Unused,
        }
    }

    async fn settle(&self) {
        self.hub.settle().await;
    }

    async fn errands(&self, runtime: &impl Runtime) -> Infallible {
        let shared = &self.shared;
        let resized = async {
            loop {
                shared.resized.notified().await;
                let size = shared.config_size();
                runtime.config_changed(&format!("the console has a size of {size}"));
            }
        };
        let emergency = async {
            loop {
                shared.emergency.notified().await;
                runtime.look();
            }
        };
        tokio::select! {
            never = resized => never,
            never = emergency => never,
            never = self.hub.run() => never,
        }
    }
}

/// A virtqueue of the device, by its role.
pub(crate) enum ConsoleQueue {
    Receive(Receiver),
    Transmit(Transmitter),
    ControlReceive(ToDriver),
    ControlTransmit(FromDriver),
    /// The driver has no use for it.
    Unused,
}

impl DeviceQueue for ConsoleQueue {
    fn process(&mut self, io: &mut QueueIo<'_>) {
        match self {
            Self::Receive(receiver) => receiver.process(io),
            Self::Transmit(transmitter) => transmitter.process(io),
            Self::ControlReceive(to_driver) => to_driver.process(io),
            Self::ControlTransmit(from_driver) => from_driver.process(io),
            Self::Unused => {}
        }
    }

    fn complete(&mut self, done: Completion, _: &mut QueueIo<'_>) {
        unreachable!("no operation was submitted, yet {done:?} ended");
    }

    fn stop(&mut self, io: &mut QueueIo<'_>) {
        if let Self::Transmit(transmitter) = self {
            transmitter.stop(io);
        }
    }
}

#[cfg(test)]
mod simulation;
