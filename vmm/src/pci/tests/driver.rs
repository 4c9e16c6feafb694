//! A guest in a test: memory, a bus with its devices, and a driver that finds and uses them by registers and rings only.
//!
//! Contract: notifications go to the eventfd that KVM would be given, interrupts come from it, so what is tested is the
//! steady state of a real guest. Waiting is for an interrupt, with a limit that only a broken device reaches.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::Devices;
use crate::bus::Region;
use crate::front_end::{DeviceConfig, Kind, Limits};
use crate::interrupts::fake::FakeVm;
use crate::layout;
use crate::readiness::wait_for;
use crate::seccomp::Sandbox;

/// A daemon under test answers within this, or is broken.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

const MEMORY_BYTES: usize = 64 << 20;
/// Where the driver's structures begin.
const FIRST_FREE: u64 = 0x10_0000;

pub(super) const VERSION_1: u64 = 1 << 32;

/// Limits that a test need not wait long for.
pub(super) fn quick() -> Limits {
    Limits {
        reply: Duration::from_secs(10),
        backoff: (Duration::from_millis(1), Duration::from_millis(20)),
    }
}

pub(super) fn device(kind: Kind, socket: &std::path::Path) -> DeviceConfig {
    let name = socket.display().to_string();
    DeviceConfig { kind, name, socket: socket.to_owned(), queue_size: 256 }
}

/// A machine without processors.
pub(super) struct Guest {
    pub(super) memory: GuestMemoryMmap,
    pub(super) vm: Arc<FakeVm>,
    pub(super) devices: Devices,
    ecam: Arc<dyn Region>,
    window: Arc<dyn Region>,
    free: AtomicU64,
}

impl Guest {
    /// A guest whose devices' daemons are there.
    pub(super) fn new(configs: Vec<DeviceConfig>, limits: Limits) -> Self {
        let guest = Self::without_daemons(configs, limits);
        assert!(guest.devices.wait(LIMIT).expect("devices"), "the daemons have not been there");
        guest
    }

    pub(super) fn without_daemons(configs: Vec<DeviceConfig>, limits: Limits) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&file, MEMORY_BYTES as u64).expect("room");
        let file = FileOffset::new(File::from(file), 0);
        let ranges = [(GuestAddress(0), MEMORY_BYTES, Some(file))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory");
        let vm = Arc::new(FakeVm::default());
        let (kvm, to_daemons) = (Arc::clone(&vm), memory.clone());
        let devices = Devices::with_limits(kvm, to_daemons, configs, limits, Sandbox::On);
        let devices = devices.expect("devices");
        let (ecam, window) = (devices.ecam(), devices.window());
        Self { memory, vm, devices, ecam, window, free: AtomicU64::new(FIRST_FREE) }
    }

    /// Guest memory that nobody else has.
    pub(super) fn allocate(&self, len: usize) -> u64 {
        let at = self.free.fetch_add((len as u64).next_multiple_of(4096), Ordering::Relaxed);
        assert!(at + (len as u64) < MEMORY_BYTES as u64, "the guest has memory left");
        at
    }

    pub(super) fn config<const N: usize>(&self, device: u64, register: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ecam.read(device << 15 | register, &mut bytes);
        bytes
    }

    pub(super) fn set_config(&self, device: u64, register: u64, bytes: &[u8]) {
        self.ecam.write(device << 15 | register, bytes);
    }

    pub(super) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.window.read(address - layout::PCI_WINDOW.start, &mut bytes);
        bytes
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.window.write(address - layout::PCI_WINDOW.start, bytes);
    }
}

/// A driver of one device.
pub(super) struct Driver<'a> {
    pub(super) guest: &'a Guest,
    pub(super) number: u64,
    pub(super) bar: u64,
    pub(super) common: u64,
    notify: u64,
    multiplier: u64,
    isr: u64,
    config: u64,
    table: u64,
}

impl<'a> Driver<'a> {
    /// Finds what there is to a device from its capabilities, and switches it on.
    pub(super) fn probe(guest: &'a Guest, number: u64) -> Self {
        let [vendor_low, vendor_high, _, id] = guest.config(number, 0);
        assert_eq!((vendor_low, vendor_high, id), (0xf4, 0x1a, 0x10), "a virtio device");
        let bar = u64::from(u32::from_le_bytes(guest.config(number, 0x10)) & !0xf);
        let mut driver = Self {
            guest,
            number,
            bar,
            common: 0,
            notify: 0,
            multiplier: 0,
            isr: 0,
            config: 0,
            table: 0,
        };
        let [mut at] = guest.config::<1>(number, 0x34);
        while at != 0 {
            let cap: [u8; 20] = guest.config(number, at.into());
            let word = |at: usize| {
                u64::from(u32::from_le_bytes([cap[at], cap[at + 1], cap[at + 2], cap[at + 3]]))
            };
            match (cap[0], cap[3]) {
                (0x11, _) => {
                    driver.table = bar + word(4);
                    guest.set_config(number, u64::from(at) + 2, &[0, 0x80]);
                }
                (0x09, 1) => driver.common = bar + word(8),
                (0x09, 2) => (driver.notify, driver.multiplier) = (bar + word(8), word(16)),
                (0x09, 3) => driver.isr = bar + word(8),
                (0x09, 4) => driver.config = bar + word(8),
                _ => {}
            }
            at = cap[1];
        }
        guest.set_config(number, 0x04, &[0x06, 0x04]);
        driver
    }

    pub(super) fn status(&self) -> u8 {
        self.guest.read::<1>(self.common + 20)[0]
    }

    pub(super) fn set_status(&self, status: u8) {
        self.guest.write(self.common + 20, &[status]);
    }

    /// Has changes of the configuration interrupt by this vector, or by none.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.guest.write(self.common + 16, &vector.to_le_bytes());
        assert_eq!(u16::from_le_bytes(self.guest.read(self.common + 16)), vector);
    }

    pub(super) fn generation(&self) -> u8 {
        self.guest.read::<1>(self.common + 21)[0]
    }

    pub(super) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.guest.write(self.common, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.guest.read(self.common + 4)))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and accepts what it offers of `features`.
    pub(super) fn negotiate(&self, features: u64) -> u64 {
        self.reset();
        self.set_status(1);
        self.set_status(3);
        let features = features & self.offered();
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.guest.write(self.common + 8, &select.to_le_bytes());
            self.guest.write(self.common + 12, &half.to_le_bytes());
        }
        self.set_status(11);
        assert_eq!(self.status(), 11, "the features are fine");
        self.set_config_vector(0);
        self.unmask(0);
        features
    }

    pub(super) fn reset(&self) {
        self.set_status(0);
        let begin = Instant::now();
        while self.status() != 0 {
            assert!(begin.elapsed() < LIMIT, "the reset does not end");
            std::thread::yield_now();
        }
    }

    /// Describes and enables a queue, with a vector of its own.
    pub(super) fn queue(&self, index: u16, size: u16) -> Queue<'a> {
        self.queue_with_vector(index, size, index + 1)
    }

    /// The same, but that another vector, or none, is the queue's.
    pub(super) fn queue_with_vector(&self, index: u16, size: u16, vector: u16) -> Queue<'a> {
        let guest = self.guest;
        let [table, available, used] = [16, 2, 8].map(|entry| {
            let len = usize::from(size) * entry + 6;
            let at = guest.allocate(len);
            guest.memory.write_slice(&vec![0; len], GuestAddress(at)).expect("memory");
            at
        });
        guest.write(self.common + 22, &index.to_le_bytes());
        guest.write(self.common + 24, &size.to_le_bytes());
        guest.write(self.common + 26, &vector.to_le_bytes());
        assert_eq!(u16::from_le_bytes(guest.read(self.common + 26)), vector);
        self.unmask(index + 1);
        for (offset, address) in [(32, table), (40, available), (48, used)] {
            guest.write(self.common + offset, &(address as u32).to_le_bytes());
            guest.write(self.common + offset + 4, &((address >> 32) as u32).to_le_bytes());
        }
        guest.write(self.common + 28, &1u16.to_le_bytes());
        let notify_off = u64::from(u16::from_le_bytes(guest.read(self.common + 30)));
        let kick = self.notify + notify_off * self.multiplier;
        let call = self.call(index + 1);
        Queue { guest, size, table, available, used, kick, call, next: 0, seen: 0 }
    }

    /// The eventfd that KVM interrupts for.
    pub(super) fn call(&self, vector: u16) -> Vec<EventFd> {
        let data = u32::from(vector) | (self.number as u32) << 16;
        let state = self.guest.vm.state.lock().expect("whole");
        let (gsi, _) =
            state.messages.iter().find(|(_, message)| message.data == data).expect("a route");
        state.calls[gsi].iter().map(|call| call.try_clone().expect("a descriptor")).collect()
    }

    fn unmask(&self, vector: u16) {
        let entry = self.table + u64::from(vector) * 16;
        let data = u32::from(vector) | (self.number as u32) << 16;
        self.guest.write(entry, &0xfee0_0000u32.to_le_bytes());
        self.guest.write(entry + 8, &data.to_le_bytes());
        self.guest.write(entry + 12, &0u32.to_le_bytes());
    }

    pub(super) fn go(&self) {
        self.set_status(15);
        assert_eq!(self.status(), 15);
    }

    pub(super) fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.guest.read(self.config + offset)
    }

    pub(super) fn set_device_config(&self, offset: u64, bytes: &[u8]) {
        self.guest.write(self.config + offset, bytes);
    }

    pub(super) fn isr(&self) -> u8 {
        self.guest.read::<1>(self.isr)[0]
    }
}

/// What a buffer is for.
#[derive(Clone, Copy)]
pub(super) enum Buffer {
    Readable(u64, u32),
    Writable(u64, u32),
}

/// A split virtqueue.
pub(super) struct Queue<'a> {
    guest: &'a Guest,
    size: u16,
    table: u64,
    available: u64,
    used: u64,
    kick: u64,
    call: Vec<EventFd>,
    next: u16,
    seen: u16,
}

impl Queue<'_> {
    /// Makes a chain available, of which the first descriptor is `head`, and the others follow it.
    pub(super) fn submit(&mut self, head: u16, buffers: &[Buffer]) {
        let memory = &self.guest.memory;
        for (index, buffer) in (head..).zip(buffers) {
            let (address, len, writable) = match *buffer {
                Buffer::Readable(address, len) => (address, len, 0u16),
                Buffer::Writable(address, len) => (address, len, 2),
            };
            let is_last = usize::from(index - head) + 1 == buffers.len();
            let flags = if is_last { writable } else { writable | 1 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((index + 1).to_le_bytes());
            let at = GuestAddress(self.table + u64::from(index) * 16);
            memory.write_slice(&descriptor, at).expect("a descriptor");
        }
        let entry = self.available + 4 + u64::from(self.next % self.size) * 2;
        memory.write_obj(head, GuestAddress(entry)).expect("an entry");
        self.next = self.next.wrapping_add(1);
        let at = GuestAddress(self.available + 2);
        memory.store(self.next, at, Ordering::Release).expect("the index");
    }

    /// Where the used ring is.
    pub(super) fn used_ring(&self) -> u64 {
        self.used
    }

    /// Writes to where the guest notifies; KVM has an eventfd there.
    pub(super) fn notify(&self) {
        let state = self.guest.vm.state.lock().expect("whole");
        let kick = state.kicks.get(&self.kick).expect("an eventfd at the notification address");
        kick.write(1).expect("written");
    }

    /// Waits for the next used entry: the chain's head, and how much of it was written.
    pub(super) fn wait_used(&mut self) -> (u16, u32) {
        self.wait_used_within(LIMIT).expect("the device uses the buffer in time")
    }

    pub(super) fn wait_used_within(&mut self, limit: Duration) -> Option<(u16, u32)> {
        let begin = Instant::now();
        // With EVENT_IDX a call is wanted for the next entry; else nobody looks at this.
        let event = GuestAddress(self.available + 4 + u64::from(self.size) * 2);
        self.guest.memory.store(self.seen, event, Ordering::SeqCst).expect("the event index");
        loop {
            // Pairs with the device's fence between its index and its look at ours.
            fence(Ordering::SeqCst);
            let at = GuestAddress(self.used + 2);
            let used: u16 = self.guest.memory.load(at, Ordering::Acquire).expect("the index");
            if used != self.seen {
                let entry = self.used + 4 + u64::from(self.seen % self.size) * 8;
                let [id, len]: [u32; 2] =
                    self.guest.memory.read_obj(GuestAddress(entry)).expect("an entry");
                self.seen = self.seen.wrapping_add(1);
                return Some((id as u16, len));
            }
            if !wait_readable(&self.call, limit.checked_sub(begin.elapsed())?) {
                return None;
            }
            self.call.iter().for_each(|call| drop(call.read()));
        }
    }
}

/// Waits for an interrupt; says whether it came.
pub(super) fn wait_readable(call: &[EventFd], limit: Duration) -> bool {
    let [theirs, ours] = call else { panic!("a vector has two eventfds") };
    let both = [theirs, ours].map(|call| Some(call.as_raw_fd()));
    wait_for(both, Some(limit)).expect("waited").contains(&true)
}
