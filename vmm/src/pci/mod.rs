//! The PCI root with all devices: bus 0, of one function for each device, and the host bridge before them.
//!
//! Contract: [`Devices::new`] begins to look for the daemons; a device is on the bus when its daemon has said what it is,
//! which [`Devices::wait`] waits for, because a guest looks for its devices once. From then on a device is there, and
//! answers, whatever becomes of its daemon. Every access is answered; where there is nothing, by ones.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

pub(crate) mod config;
pub(crate) mod msix;
#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use self::config::{ConfigSpace, Identity};
use crate::bus::Region;
use crate::front_end::{Counts, DeviceConfig, FrontEnd, Limits, Watchdog};
use crate::interrupts::{Interrupts, Vm};
use crate::layout;
use crate::seccomp::Sandbox;
use crate::virtio::transport::{self, BAR_BYTES, Function};

/// A page for each function, eight functions for each device.
const FUNCTION_BYTES: u64 = 0x1000;
const FUNCTIONS: u64 = 8;

/// The host bridge: what a virtual machine's bridge is called, so that no driver takes it for a real one.
const BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x0d57,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Why there are no devices.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("{0} devices, and the bus has room for {max}", max = layout::PCI_DEVICES_MAX - 1)]
    TooMany(usize),
    #[error("no thread or descriptor for a device")]
    Resources(#[from] io::Error),
    #[error("the device of {name} cannot be made")]
    Device {
        name: String,
        #[source]
        source: transport::Error,
    },
}

/// The PCI root with all devices.
pub(crate) struct Devices {
    root: Arc<Root>,
    vm: Arc<dyn Vm>,
    memory: GuestMemoryMmap,
    interrupts: Arc<Interrupts>,
    front_ends: Vec<Arc<FrontEnd>>,
}

struct Root {
    bridge: Mutex<ConfigSpace>,
    /// By the device's number, less one. Empty until its daemon has been there.
    functions: Vec<OnceLock<Function>>,
}

impl Devices {
    /// Begins to look for the devices' daemons.
    pub(crate) fn new(
        vm: Arc<dyn Vm>,
        memory: GuestMemoryMmap,
        configs: Vec<DeviceConfig>,
        sandbox: Sandbox,
    ) -> Result<Self, Error> {
        Self::with_limits(vm, memory, configs, Limits::default(), sandbox)
    }

    fn with_limits(
        vm: Arc<dyn Vm>,
        memory: GuestMemoryMmap,
        configs: Vec<DeviceConfig>,
        limits: Limits,
        sandbox: Sandbox,
    ) -> Result<Self, Error> {
        if configs.len() >= layout::PCI_DEVICES_MAX {
            return Err(Error::TooMany(configs.len()));
        }
        let watchdog = Arc::new(Watchdog::new(sandbox)?);
        let front_ends = configs.into_iter().map(|config| {
            let (memory, watchdog) = (memory.clone(), Arc::clone(&watchdog));
            FrontEnd::new(config, memory, watchdog, limits, sandbox).map(Arc::new)
        });
        let front_ends = front_ends.collect::<io::Result<Vec<_>>>()?;
        Ok(Self::of(vm, memory, front_ends))
    }

    /// The bus with these devices, none of which is on it before [`Devices::wait`].
    pub(crate) fn of(
        vm: Arc<dyn Vm>,
        memory: GuestMemoryMmap,
        front_ends: Vec<Arc<FrontEnd>>,
    ) -> Self {
        let functions = front_ends.iter().map(|_| OnceLock::new()).collect();
        let root = Arc::new(Root { bridge: Mutex::new(ConfigSpace::new(&BRIDGE)), functions });
        let interrupts = Interrupts::new(Arc::clone(&vm));
        Self { root, vm, memory, interrupts, front_ends }
    }

    /// Waits for at most `limit` until each device's daemon has been there; says whether they have.
    pub(crate) fn wait(&self, limit: Duration) -> Result<bool, Error> {
        let begin = Instant::now();
        let bars = layout::PCI_WINDOW.step_by(BAR_BYTES as usize);
        for ((front_end, place), bar) in self.front_ends.iter().zip(&self.root.functions).zip(bars)
        {
            if place.get().is_some() {
                continue;
            }
            if !front_end.wait_for_daemon(limit.saturating_sub(begin.elapsed())) {
                return Ok(false);
            }
            let function = Function::new(
                Arc::clone(&self.vm),
                self.memory.clone(),
                Arc::clone(front_end),
                &self.interrupts,
                u32::try_from(bar).unwrap_or(u32::MAX),
            );
            let name = || front_end.name().to_owned();
            let function = function.map_err(|source| Error::Device { name: name(), source })?;
            place.get_or_init(|| function);
        }
        Ok(true)
    }

    /// Bus 0's configuration space, for [`layout::ECAM`].
    pub(crate) fn ecam(&self) -> Arc<dyn Region> {
        Arc::new(Ecam(Arc::clone(&self.root)))
    }

    /// What answers in [`layout::PCI_WINDOW`].
    pub(crate) fn window(&self) -> Arc<dyn Region> {
        Arc::new(Window(Arc::clone(&self.root)))
    }

    /// The machine starts again: all is as it was at first. Waits for at most `limit` until no daemon is at work on the
    /// guest's memory any more; says whether that is so.
    pub(crate) fn reset(&self, limit: Duration) -> bool {
        let begin = Instant::now();
        self.root.functions.iter().filter_map(OnceLock::get).for_each(Function::reset);
        let bridge = ConfigSpace::new(&BRIDGE);
        *self.root.bridge.lock().unwrap_or_else(PoisonError::into_inner) = bridge;
        let left = || limit.saturating_sub(begin.elapsed());
        self.front_ends.iter().all(|front_end| front_end.wait_until_idle(left()))
    }

    /// Each device's name and what has happened to its connection.
    pub(crate) fn statistics(&self) -> Vec<(&str, Counts)> {
        self.front_ends.iter().map(|front_end| (front_end.name(), front_end.counts())).collect()
    }
}

impl Root {
    fn function(&self, device: u64) -> Option<&Function> {
        let index = usize::try_from(device.checked_sub(1)?).ok()?;
        self.functions.get(index)?.get()
    }

    /// The function in whose BAR all bytes of an access lie, and where there.
    fn at(&self, address: u64, len: usize) -> Option<(&Function, u64)> {
        let functions = self.functions.iter().filter_map(OnceLock::get);
        functions
            .filter_map(|function| Some((function, function.bar()?)))
            .map(|(function, bar)| (function, bar..bar.saturating_add(BAR_BYTES.into())))
            .find(|(_, range)| holds(range, address, len))
            .map(|(function, range)| (function, address.saturating_sub(range.start)))
    }
}

fn holds(range: &Range<u64>, address: u64, len: usize) -> bool {
    range.contains(&address) && address.saturating_add(len as u64) <= range.end
}

/// A device, its function, and an offset in its configuration space.
fn place(offset: u64, len: usize) -> Option<(u64, u64, u64)> {
    let (page, register) = (offset / FUNCTION_BYTES, offset % FUNCTION_BYTES);
    let is_within = register.saturating_add(len as u64) <= FUNCTION_BYTES;
    is_within.then_some((page / FUNCTIONS, page % FUNCTIONS, register))
}

struct Ecam(Arc<Root>);

impl Region for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match place(offset, data.len()) {
            Some((0, 0, register)) => {
                let bridge = self.0.bridge.lock().unwrap_or_else(PoisonError::into_inner);
                bridge.read(register, data);
            }
            Some((device, 0, register)) => {
                if let Some(function) = self.0.function(device) {
                    function.read_config(register, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match place(offset, data.len()) {
            Some((0, 0, register)) => {
                let mut bridge = self.0.bridge.lock().unwrap_or_else(PoisonError::into_inner);
                bridge.write(register, data);
            }
            Some((device, 0, register)) => {
                if let Some(function) = self.0.function(device) {
                    function.write_config(register, data);
                }
            }
            _ => {}
        }
    }
}

struct Window(Arc<Root>);

impl Region for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let address = layout::PCI_WINDOW.start.saturating_add(offset);
        if let Some((function, offset)) = self.0.at(address, data.len()) {
            function.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let address = layout::PCI_WINDOW.start.saturating_add(offset);
        if let Some((function, offset)) = self.0.at(address, data.len()) {
            function.write_bar(offset, data);
        }
    }
}
