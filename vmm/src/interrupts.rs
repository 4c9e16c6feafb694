//! Message-signalled interrupts of the guest, and the eventfds that are its doorbells: all of KVM that a device needs.
//!
//! Contract: a [`Vector`] is two eventfds for life, one for the daemon and one for this process ([`Call`]). Whoever writes
//! to one interrupts the guest as the message says that the vector is routed to, without this process waking up; while it
//! is routed nowhere (masked), what is written stays in the eventfd, which is its pending bit, and is delivered when it is
//! routed again. An eventfd that a daemon has is neither read nor written here: the daemon can make it one that waits.
//! So what was pending once may be delivered twice, which interrupts are free to be. The routes of the I/O APIC and the
//! two PICs are as KVM has them by itself. Deliberately absent: INTx.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::readiness::wait_for;

/// Interrupt lines of the I/O APIC; the first 16 are those of the two PICs, too.
const IOAPIC_LINES: u32 = 24;
/// The two PICs, as KVM numbers its interrupt controllers.
const FIRST_PIC: u32 = 0;
const SECOND_PIC: u32 = 1;
/// Interrupt lines of one PIC.
const PIC_LINES: u32 = 8;
/// The first number that no line of the I/O APIC has.
const FIRST_GSI: u32 = crate::layout::FIRST_MSI_GSI;
const _: () = assert!(FIRST_GSI >= IOAPIC_LINES);
/// `KVM_MAX_IRQ_ROUTES` of x86; lines of the PICs have two routes.
const GSI_LIMIT: u32 = 4096 - 2 * PIC_LINES;

/// What a vector sends: an address that the local APICs answer to, and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// Why a device has no vector.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("the devices have more than {} interrupt vectors", GSI_LIMIT - FIRST_GSI)]
    TooMany,
    #[error("no eventfd for an interrupt vector")]
    EventFd(#[source] io::Error),
}

/// What a device needs of KVM.
pub(crate) trait Vm: Send + Sync {
    /// Replaces all routes of messages.
    fn set_routes(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()>;
    /// Has writes to `call` send the message of `gsi`.
    fn attach_call(&self, call: &EventFd, gsi: u32) -> io::Result<()>;
    /// Leaves what is written to `call` in it.
    fn detach_call(&self, call: &EventFd, gsi: u32) -> io::Result<()>;
    /// Has the guest's writes to `address`, of any width, be writes to `kick`.
    fn attach_kick(&self, kick: &EventFd, address: u64) -> io::Result<()>;
    /// The reverse of [`Vm::attach_kick`].
    fn detach_kick(&self, kick: &EventFd, address: u64) -> io::Result<()>;
}

impl Vm for VmFd {
    fn set_routes(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()> {
        let entries: Vec<_> =
            lines().chain(messages.iter().map(|(gsi, to)| msi(*gsi, to))).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("{} routes: {error:?}", entries.len())))?;
        Ok(self.set_gsi_routing(&routing)?)
    }

    fn attach_call(&self, call: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.register_irqfd(call, gsi)?)
    }

    fn detach_call(&self, call: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.unregister_irqfd(call, gsi)?)
    }

    fn attach_kick(&self, kick: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn detach_kick(&self, kick: &EventFd, address: u64) -> io::Result<()> {
        Ok(self.unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

/// The routes that KVM makes with its interrupt controllers.
fn lines() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let line = |gsi, irqchip, pin| {
        let mut entry =
            kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let pics = (0..PIC_LINES).flat_map(move |pin| {
        [line(pin, FIRST_PIC, pin), line(pin.saturating_add(PIC_LINES), SECOND_PIC, pin)]
    });
    pics.chain((0..IOAPIC_LINES).map(move |pin| line(pin, KVM_IRQCHIP_IOAPIC, pin)))
}

fn msi(gsi: u32, message: &Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..Default::default()
    };
    entry
}

/// The vectors of all devices.
pub(crate) struct Interrupts {
    vm: Arc<dyn Vm>,
    table: Mutex<Table>,
}

struct Table {
    next_gsi: u32,
    messages: BTreeMap<u32, Message>,
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        let table = Mutex::new(Table { next_gsi: FIRST_GSI, messages: BTreeMap::new() });
        Arc::new(Self { vm, table })
    }

    /// Another vector, routed nowhere.
    pub(crate) fn vector(self: &Arc<Self>) -> Result<Vector, Error> {
        let mut table = self.table();
        let gsi = table.next_gsi;
        if gsi >= GSI_LIMIT {
            return Err(Error::TooMany);
        }
        table.next_gsi = gsi.saturating_add(1);
        let call = Call::new().map_err(Error::EventFd)?;
        Ok(Vector { interrupts: Arc::clone(self), gsi, call, routed_to: Mutex::new(None) })
    }

    fn set_message(&self, gsi: u32, message: Message) -> io::Result<()> {
        let mut table = self.table();
        if table.messages.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.vm.set_routes(&table.messages)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What interrupts the guest when it is written to.
#[derive(Clone)]
pub(crate) struct Call {
    /// The daemon's: a vring's call.
    pub(crate) theirs: Arc<EventFd>,
    /// Ours, which no other process has: writing to it never waits.
    pub(crate) ours: Arc<EventFd>,
}

impl Call {
    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK).map(Arc::new);
        Ok(Self { theirs: eventfd()?, ours: eventfd()? })
    }

    /// Interrupts the guest.
    pub(crate) fn raise(&self) {
        // It is full only if nobody has taken what was written before: that interrupts, too.
        let _full = self.ours.write(1);
    }
}

/// One vector of a device.
pub(crate) struct Vector {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    call: Call,
    routed_to: Mutex<Option<Message>>,
}

impl Vector {
    /// What is written to in order to interrupt.
    pub(crate) fn call(&self) -> &Call {
        &self.call
    }

    /// Routes the vector, or with `None` masks it.
    pub(crate) fn route(&self, message: Option<Message>) -> io::Result<()> {
        let mut routed_to = self.routed_to();
        let vm = &self.interrupts.vm;
        match (*routed_to, message) {
            (was, is) if was == is => return Ok(()),
            (Some(_), None) => {
                vm.detach_call(&self.call.theirs, self.gsi)?;
                vm.detach_call(&self.call.ours, self.gsi)?;
            }
            (Some(_), Some(message)) => self.interrupts.set_message(self.gsi, message)?,
            (None, Some(message)) => {
                self.interrupts.set_message(self.gsi, message)?;
                // KVM looks at an eventfd that it attaches, delivers what is in it, and leaves it there. Out of ours it
                // is taken first, and written again when there is somebody who takes it.
                let is_pending = self.call.ours.read().is_ok();
                vm.attach_call(&self.call.theirs, self.gsi)?;
                vm.attach_call(&self.call.ours, self.gsi)?;
                if is_pending {
                    self.call.raise();
                }
            }
            (None, None) => {}
        }
        *routed_to = message;
        Ok(())
    }

    /// Whether an interrupt waits for the vector to be routed.
    pub(crate) fn is_pending(&self) -> bool {
        let routed_to = self.routed_to();
        if routed_to.is_some() {
            return false;
        }
        let both = [&self.call.theirs, &self.call.ours].map(|call| Some(call.as_raw_fd()));
        wait_for(both, Some(Duration::ZERO)).is_ok_and(|ready| ready.contains(&true))
    }

    /// Forgets what is pending of ours: the device has been reset.
    pub(crate) fn clear(&self) {
        let _nothing_pending = self.call.ours.read();
    }

    fn routed_to(&self) -> MutexGuard<'_, Option<Message>> {
        self.routed_to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // The virtual machine may be gone already, and its routes with it.
        let _ended = self.route(None);
    }
}

/// A stand-in for KVM that writes down what it is asked for.
#[cfg(any(test, feature = "fuzzing"))]
#[allow(clippy::arithmetic_side_effects, clippy::expect_used, clippy::panic)]
pub(crate) mod fake {
    use std::collections::BTreeMap;
    use std::io;
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EventFd;

    use super::{Message, Vm};

    #[derive(Default)]
    pub(crate) struct FakeVm {
        pub(crate) state: Mutex<FakeState>,
    }

    #[derive(Default)]
    pub(crate) struct FakeState {
        pub(crate) messages: BTreeMap<u32, Message>,
        /// Vectors that are attached.
        pub(crate) calls: BTreeMap<u32, Vec<EventFd>>,
        /// What is kicked by a write to an address.
        pub(crate) kicks: BTreeMap<u64, EventFd>,
        /// How often the routes were replaced.
        pub(crate) updates: usize,
    }

    impl Vm for FakeVm {
        fn set_routes(&self, messages: &BTreeMap<u32, Message>) -> io::Result<()> {
            let mut state = self.state.lock().expect("no test panics with it");
            state.messages = messages.clone();
            state.updates += 1;
            Ok(())
        }

        fn attach_call(&self, call: &EventFd, gsi: u32) -> io::Result<()> {
            let mut state = self.state.lock().expect("no test panics with it");
            let calls = state.calls.entry(gsi).or_default();
            calls.push(call.try_clone()?);
            assert!(calls.len() <= 2, "{gsi} is attached already");
            Ok(())
        }

        fn detach_call(&self, _call: &EventFd, gsi: u32) -> io::Result<()> {
            let mut state = self.state.lock().expect("no test panics with it");
            let calls = state.calls.get_mut(&gsi).expect("it is attached");
            calls.pop();
            if calls.is_empty() {
                state.calls.remove(&gsi);
            }
            Ok(())
        }

        fn attach_kick(&self, kick: &EventFd, address: u64) -> io::Result<()> {
            let mut state = self.state.lock().expect("no test panics with it");
            let before = state.kicks.insert(address, kick.try_clone()?);
            assert!(before.is_none(), "{address:#x} has a kick already");
            Ok(())
        }

        fn detach_kick(&self, _kick: &EventFd, address: u64) -> io::Result<()> {
            let mut state = self.state.lock().expect("no test panics with it");
            assert!(state.kicks.remove(&address).is_some(), "{address:#x} has no kick");
            Ok(())
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::sync::Arc;

    use kvm_ioctls::Kvm;
    use vmm_sys_util::eventfd::EventFd;

    use super::fake::FakeVm;
    use super::{FIRST_GSI, GSI_LIMIT, Interrupts, Message, Vm};

    const MESSAGE: Message = Message { address: 0xfee0_1000, data: 0x41 };

    fn fake() -> (Arc<FakeVm>, Arc<Interrupts>) {
        let vm = Arc::new(FakeVm::default());
        let interrupts = Interrupts::new(Arc::clone(&vm) as Arc<dyn Vm>);
        (vm, interrupts)
    }

    #[test]
    fn masked_vector_keeps_what_is_pending_and_delivers_it_when_it_is_routed() {
        let (vm, interrupts) = fake();
        let vector = interrupts.vector().expect("a vector");
        assert!(!vector.is_pending());
        vector.call().ours.write(3).expect("written");
        assert!(vector.is_pending());
        assert!(vector.is_pending(), "asking does not take it away");
        vector.route(Some(MESSAGE)).expect("routed");
        assert!(!vector.is_pending(), "it is KVM's now");
        assert_eq!(vector.call().ours.read().ok(), Some(1), "written once, with KVM attached");
        let state = vm.state.lock().expect("whole");
        assert_eq!(state.messages.get(&FIRST_GSI), Some(&MESSAGE));
        assert!(state.calls.contains_key(&FIRST_GSI));
    }

    #[test]
    fn eventfd_that_a_daemon_has_made_one_that_waits_is_waited_for_by_nobody() {
        let (_vm, interrupts) = fake();
        let mut vector = interrupts.vector().expect("a vector");
        vector.call.theirs = Arc::new(EventFd::new(0).expect("an eventfd"));
        assert!(!vector.is_pending());
        vector.route(Some(MESSAGE)).expect("routed");
        vector.route(None).expect("masked");
        vector.clear();
        vector.call().theirs.write(1).expect("written");
        assert!(vector.is_pending());
    }

    #[test]
    fn routes_are_updated_when_the_message_changes_and_only_then() {
        let (vm, interrupts) = fake();
        let vector = interrupts.vector().expect("a vector");
        let updates = || vm.state.lock().expect("whole").updates;
        vector.route(Some(MESSAGE)).expect("routed");
        vector.route(Some(MESSAGE)).expect("routed");
        assert_eq!(updates(), 1);
        vector.route(None).expect("masked");
        vector.route(Some(MESSAGE)).expect("routed");
        assert_eq!(updates(), 1, "masking needs no change of the routes");
        vector.route(Some(Message { data: 7, ..MESSAGE })).expect("routed");
        assert_eq!(updates(), 2);
        drop(vector);
        assert!(vm.state.lock().expect("whole").calls.is_empty());
    }

    #[test]
    fn vectors_end_where_the_routes_of_kvm_do() {
        let (_vm, interrupts) = fake();
        interrupts.table().next_gsi = GSI_LIMIT - 1;
        let last = interrupts.vector().expect("the last");
        assert_eq!(last.gsi, GSI_LIMIT - 1);
        assert!(interrupts.vector().is_err());
    }

    /// Skipped where there is no KVM: what KVM is asked for has been tested above.
    #[test]
    fn kvm_takes_routes_and_eventfds_as_we_name_them() {
        let Ok(kvm) = Kvm::new() else { return eprintln!("skipped: no /dev/kvm") };
        let vm = kvm.create_vm().expect("a virtual machine");
        vm.create_irq_chip().expect("interrupt controllers");
        let vm: Arc<dyn Vm> = Arc::new(vm);
        let interrupts = Interrupts::new(Arc::clone(&vm));
        let vector = interrupts.vector().expect("a vector");
        vector.route(Some(MESSAGE)).expect("routed");
        vector.route(Some(Message { data: 9, ..MESSAGE })).expect("routed elsewhere");
        vector.call().theirs.write(1).expect("written");
        vector.route(None).expect("masked");
        vm.attach_kick(&vector.call().theirs, 0xd000_3000).expect("attached");
        vm.detach_kick(&vector.call().theirs, 0xd000_3000).expect("detached");
    }
}
