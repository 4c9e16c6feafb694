//! A device's registers, without a daemon behind and without KVM: what the fuzzer writes to and reads from.
//!
//! Contract: no thread, no time, no kernel but for eventfds. A reset ends at once, because nobody is at work on rings.

use std::sync::Arc;
use std::time::Duration;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::bus::Region;
use crate::front_end::FrontEnd;
use crate::interrupts::fake::FakeVm;
use crate::layout;
use crate::pci::Devices;

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Bus 0's configuration space.
    Config,
    /// The window for registers.
    Window,
}

/// The address of the window.
pub const WINDOW: u64 = layout::PCI_WINDOW.start;
/// The device's queues.
pub const QUEUES: u16 = 9;
/// The features that it offers.
pub const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 22 | 1 << 17 | 1 << 5;
/// The largest size of a queue.
pub const QUEUE_SIZE: u16 = 256;

/// A bus with one network.
pub struct Registers {
    vm: Arc<FakeVm>,
    config: Arc<dyn Region>,
    window: Arc<dyn Region>,
    _devices: Devices,
}

impl Registers {
    /// A machine that has been switched on.
    ///
    /// # Panics
    /// If the host has no memory or descriptors left.
    pub fn new() -> Self {
        let ranges = [(GuestAddress(0), 1 << 20)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).expect("memory");
        let vm = Arc::new(FakeVm::default());
        let front_end = FrontEnd::alone(FEATURES, QUEUES, QUEUE_SIZE).expect("an eventfd");
        let devices = Devices::of(Arc::clone(&vm) as _, memory, vec![Arc::new(front_end)]);
        assert!(devices.wait(Duration::ZERO).expect("eventfds"), "the daemon has been there");
        Self { vm, config: devices.ecam(), window: devices.window(), _devices: devices }
    }

    /// Reads all of `data`.
    pub fn read(&self, space: Space, offset: u64, data: &mut [u8]) {
        self.region(space).read(offset, data);
    }

    /// Writes.
    pub fn write(&self, space: Space, offset: u64, data: &[u8]) {
        self.region(space).write(offset, data);
    }

    /// Address and data of each message that KVM would deliver, in the order of the vectors.
    ///
    /// # Panics
    /// If a vector is delivered whose message KVM does not know.
    pub fn messages(&self) -> Vec<(u64, u32)> {
        let state = self.vm.state.lock().expect("no other thread");
        let message = |gsi| state.messages.get(gsi).expect("a vector that is attached has a route");
        state.calls.keys().map(message).map(|message| (message.address, message.data)).collect()
    }

    /// The addresses at which KVM has an eventfd.
    ///
    /// # Panics
    /// Never: there is no other thread.
    pub fn kicks(&self) -> Vec<u64> {
        self.vm.state.lock().expect("no other thread").kicks.keys().copied().collect()
    }

    fn region(&self, space: Space) -> &dyn Region {
        match space {
            Space::Config => &*self.config,
            Space::Window => &*self.window,
        }
    }
}

impl Default for Registers {
    fn default() -> Self {
        Self::new()
    }
}
