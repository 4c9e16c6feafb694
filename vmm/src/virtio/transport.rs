//! One virtio device as a PCI function (VIRTIO 1.3, 4.1): its capabilities, its BAR, and the eventfds in it.
//!
//! Contract: what the guest does to the configuration space and to the BAR ends here, under one lock per device, which no
//! daemon can hold up. While the BAR is mapped, each queue's notification address is an eventfd of KVM: the vring's
//! kick. A vector's eventfd is the vring's call. So a running device takes no lock and costs no exit.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use tracing::{debug, warn};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common::{COMMON_BYTES, Common, Effect};
use crate::front_end::FrontEnd;
use crate::front_end::setup::{RingSetup, Setup};
use crate::interrupts::{self, Call, Interrupts, Vm};
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{ENTRY_BYTES, Msix, VECTORS_MAX};

/// Bytes of a device's BAR.
pub(crate) const BAR_BYTES: u32 = 0x1_0000;

// What is where in the BAR: a page each, and the table of MSI-X behind.
const COMMON: Range<u64> = 0x0000..0x1000;
const ISR: Range<u64> = 0x1000..0x2000;
const DEVICE: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const PENDING: Range<u64> = 0x4000..0x5000;
const TABLE: Range<u64> = 0x8000..0x1_0000;

/// Bytes from one queue's notification address to the next one's.
const NOTIFY_MULTIPLIER: u64 = 4;
/// As many queues as there are notification addresses for.
const QUEUES_LIMIT: u16 = 1024;
const _: () = assert!(QUEUES_LIMIT as u64 * NOTIFY_MULTIPLIER == 0x1000);
const _: () = assert!(VECTORS_MAX * ENTRY_BYTES == 0x8000 && (QUEUES_LIMIT as usize) < VECTORS_MAX);

/// Red Hat, which lends its number to virtio.
const VENDOR: u16 = 0x1af4;
/// VIRTIO 1.3, 4.1.2: the PCI device is this plus the virtio device.
const DEVICE_BASE: u16 = 0x1040;
/// VIRTIO 1.3, 4.1.2.1: any number from 0x40 on says that there is no legacy interface.
const SUBSYSTEM: u16 = 0x1100;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

/// Number of the structure in a capability (VIRTIO 1.3, 4.1.4).
#[derive(Clone, Copy)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Pci = 5,
}

/// The ISR status: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// Why there is no such function.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{0} queues, more than the {QUEUES_LIMIT} that there is room for")]
    Queues(u16),
    #[error(transparent)]
    Interrupts(#[from] interrupts::Error),
    #[error("no eventfd for a queue's notifications")]
    EventFd(#[source] io::Error),
}

/// A device.
pub(crate) struct Function {
    vm: Arc<dyn Vm>,
    memory: GuestMemoryMmap,
    front_end: Arc<FrontEnd>,
    /// One for each queue.
    kicks: Vec<Arc<EventFd>>,
    /// The call of queues without a vector: nobody listens.
    nobody: Call,
    /// Where the capability is by which the BAR is reached through the configuration space.
    window_at: u64,
    /// Where MSI-X's capability is.
    msix_at: u64,
    initial: ConfigSpace,
    state: Mutex<State>,
}

struct State {
    config: ConfigSpace,
    msix: Msix,
    common: Common,
    /// Where the notification addresses are eventfds.
    mapped_at: Option<u64>,
}

impl Function {
    /// A function whose BAR is at `bar` until the guest moves it, of a front end that knows its device.
    pub(crate) fn new(
        vm: Arc<dyn Vm>,
        memory: GuestMemoryMmap,
        front_end: Arc<FrontEnd>,
        interrupts: &Arc<Interrupts>,
        bar: u32,
    ) -> Result<Self, Error> {
        let (kind, description) = (front_end.kind(), front_end.description());
        let queue_count = description.queue_count;
        if queue_count > QUEUES_LIMIT {
            return Err(Error::Queues(queue_count));
        }
        let eventfd = || EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(Error::EventFd);
        let kicks = (0..queue_count).map(|_| eventfd()).collect::<Result<Vec<_>, _>>()?;
        let vectors = (0..=queue_count).map(|_| interrupts.vector());
        let msix = Msix::new(vectors.collect::<Result<Vec<_>, _>>()?);
        let mut config = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.saturating_add(kind.virtio_id()),
            revision: 1,
            class: kind.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        config.set_bar(bar, BAR_BYTES);
        let (msix_at, window_at) = add_capabilities(&mut config, msix.table_size());
        let common = Common::new(description.features, queue_count, description.queue_size);
        let initial = config.clone();
        let state = Mutex::new(State { config, msix, common, mapped_at: None });
        let nobody = Call::new().map_err(Error::EventFd)?;
        Ok(Self { vm, memory, front_end, kicks, nobody, window_at, msix_at, initial, state })
    }

    /// Where the BAR answers, if it does.
    pub(crate) fn bar(&self) -> Option<u64> {
        self.state().config.bar()
    }

    pub(crate) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state();
        if let Some((address, len)) = self.window(&state, offset, data.len()) {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..len) {
                self.read_structure(&mut state, address, bytes);
            }
            let at = usize::try_from(self.window_at.saturating_add(16)).unwrap_or(usize::MAX);
            state.config.put(at, &bytes);
        }
        state.config.read(offset, data);
    }

    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        state.config.write(offset, data);
        if let Some((address, len)) = self.window(&state, offset, data.len()) {
            let mut bytes = [0; 4];
            state.config.read(self.window_at.saturating_add(16), &mut bytes);
            self.write_structure(&mut state, address, bytes.get(..len).unwrap_or(&bytes));
        }
        let mut control = [0];
        state.config.read(self.msix_at.saturating_add(3), &mut control);
        let [control] = control;
        state.msix.set_control(control);
        self.map(&mut state);
    }

    pub(crate) fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.state(), offset, data);
    }

    pub(crate) fn write_bar(&self, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.state(), offset, data);
    }

    /// The machine starts again. The daemon lets go of the rings; [`FrontEnd::is_idle`] says when.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        self.front_end.stop();
        self.front_end.set_config_call(None);
        state.common.finish_reset();
        state.msix.reset();
        state.config = self.initial.clone();
        self.map(&mut state);
    }

    /// The part of the BAR that an access to the configuration space means, if it means one (VIRTIO 1.3, 4.1.4.9).
    fn window(&self, state: &State, offset: u64, len: usize) -> Option<(u64, usize)> {
        let data_at = self.window_at.saturating_add(16);
        let end = offset.saturating_add(len as u64);
        if end <= data_at || offset >= data_at.saturating_add(4) {
            return None;
        }
        let mut cap = [0; 16];
        state.config.read(self.window_at, &mut cap);
        let [_, _, _, _, bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3] = cap;
        let at = u32::from_le_bytes([o0, o1, o2, o3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        // VIRTIO 1.3, 4.1.4.9.1: the device MUST perform accesses of 1, 2 or 4 bytes, aligned.
        let is_sound = bar == 0 && matches!(len, 1 | 2 | 4) && at.is_multiple_of(len);
        is_sound.then_some((u64::from(at), len as usize))
    }

    fn read_structure(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if COMMON.contains(&offset) {
            if state.common.is_resetting() && self.front_end.is_idle() {
                state.common.finish_reset();
            }
            state.common.read(offset, data, self.front_end.generation());
        } else if ISR.contains(&offset) {
            if let Some(first) = data.first_mut().filter(|_| offset == ISR.start) {
                *first = if self.front_end.take_config_changed() { ISR_CONFIG } else { 0 };
            }
        } else if DEVICE.contains(&offset) {
            self.front_end.read_config(offset.saturating_sub(DEVICE.start), data);
        } else if PENDING.contains(&offset) {
            state.msix.read_pending(offset.saturating_sub(PENDING.start), data);
        } else if TABLE.contains(&offset) {
            state.msix.read_table(offset.saturating_sub(TABLE.start), data);
        }
    }

    fn write_structure(&self, state: &mut State, offset: u64, data: &[u8]) {
        if COMMON.contains(&offset) {
            if state.common.is_resetting() && self.front_end.is_idle() {
                state.common.finish_reset();
            }
            if let Some(effect) = state.common.write(offset, data) {
                self.carry_out(state, effect);
            }
        } else if DEVICE.contains(&offset) {
            self.front_end.write_config(offset.saturating_sub(DEVICE.start), data);
        } else if NOTIFY.contains(&offset) {
            // Through the configuration space, or while KVM has no eventfd there.
            let queue = offset.saturating_sub(NOTIFY.start) / NOTIFY_MULTIPLIER;
            if let Ok(queue) = u16::try_from(queue) {
                self.front_end.kick(queue);
            }
        } else if TABLE.contains(&offset) {
            state.msix.write_table(offset.saturating_sub(TABLE.start), data);
        }
    }

    fn carry_out(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::ConfigVector(vector) => {
                self.front_end.set_config_call(state.msix.call(vector).cloned());
            }
            Effect::Reset => {
                self.front_end.stop();
                self.front_end.set_config_call(None);
            }
            Effect::Start => match self.setup(state) {
                Ok(setup) => self.front_end.start(setup),
                Err(error) => {
                    warn!(device = self.front_end.name(), %error, "the driver's queues cannot be served");
                    state.common.set_needs_reset();
                    self.front_end.raise_config();
                }
            },
        }
    }

    fn setup(&self, state: &State) -> Result<Setup, crate::front_end::setup::Error> {
        let mut rings = Vec::new();
        for (index, (queue, kick)) in (0..).zip(state.common.queues().iter().zip(&self.kicks)) {
            if queue.is_enabled {
                let call = state.msix.call(queue.vector).unwrap_or(&self.nobody);
                let eventfds = (Arc::clone(kick), call.clone());
                rings.push(RingSetup::new(&self.memory, index, queue, eventfds)?);
            }
        }
        let features = state.common.features();
        Ok(Setup::new(features, rings, self.front_end.control_queue(features)))
    }

    /// Has the notification addresses be eventfds where the BAR is now.
    fn map(&self, state: &mut State) {
        let bar = state.config.bar();
        if bar == state.mapped_at {
            return;
        }
        let each = |at: u64| {
            let addresses = (at.saturating_add(NOTIFY.start)..).step_by(NOTIFY_MULTIPLIER as usize);
            self.kicks.iter().zip(addresses)
        };
        for (kick, address) in state.mapped_at.into_iter().flat_map(each) {
            if let Err(error) = self.vm.detach_kick(kick, address) {
                debug!(address, %error, "no eventfd to take away");
            }
        }
        for (kick, address) in bar.into_iter().flat_map(each) {
            // Two functions at one address: the second one's kicks come by way of `write_structure`.
            if let Err(error) = self.vm.attach_kick(kick, address) {
                warn!(device = self.front_end.name(), address, %error, "kicks will be slow");
            }
        }
        state.mapped_at = bar;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds all capabilities; returns where those of MSI-X and of the window to the BAR are.
fn add_capabilities(config: &mut ConfigSpace, table_size: u16) -> (u64, u64) {
    let page = |range: &Range<u64>| (range.start, range.end.saturating_sub(range.start));
    let structure = |structure, (at, len): (u64, u64), behind: &[u8]| {
        let len_bytes = [behind.len().saturating_add(16).to_le_bytes()[0]];
        let le = |value: u64| {
            let [a, b, c, d, ..] = value.to_le_bytes();
            [a, b, c, d]
        };
        [&len_bytes[..], &[structure as u8, 0, 0, 0, 0], &le(at), &le(len), behind].concat()
    };
    // Of the message control register the driver may write the two bits in its second byte.
    let [size_low, size_high] = table_size.to_le_bytes();
    let [_, table_at, ..] = TABLE.start.to_le_bytes();
    let [_, pending_at, ..] = PENDING.start.to_le_bytes();
    let msix = [size_low, size_high, 0, table_at, 0, 0, 0, pending_at, 0, 0];
    let msix_at = config.add_capability(CAP_MSIX, &msix, &[0, 0xc0]);
    let common = (COMMON.start, COMMON_BYTES as u64);
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    for body in [
        structure(Structure::Common, common, &[]),
        structure(Structure::Notify, page(&NOTIFY), &multiplier),
        structure(Structure::Isr, (ISR.start, 1), &[]),
        structure(Structure::Device, page(&DEVICE), &[]),
    ] {
        config.add_capability(CAP_VENDOR, &body, &[]);
    }
    // VIRTIO 1.3, 4.1.4.9: the driver chooses BAR, offset and length, and reads and writes the data behind.
    let window = structure(Structure::Pci, (0, 0), &[0; 4]);
    let writable = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    (msix_at, config.add_capability(CAP_VENDOR, &window, &writable))
}
