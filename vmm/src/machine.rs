//! One virtual machine: what it is made of, and its life from power-on to power-off.
//!
//! Contract: [`Machine::new`] opens and makes everything, so that what is missing is said before anything runs.
//! [`Machine::run`] starts it; a guest that resets starts again, in the same memory file and with the same devices, from its
//! kernel on. All of that is done by the main thread, which sleeps while the guest runs.
//!
//! What it deliberately does not do: touch a guest's request. Kicks and calls go past it, from the guest to the daemon and
//! back, by the descriptors that KVM has been given.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::kvm_irqchip;
use kvm_ioctls::{Cap, Kvm, VmFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::acpi;
use crate::args::Options;
use crate::bus::{Bus, Overlap, Region};
use crate::control::socket::{ControlSocket, Reply};
use crate::control::{Signals, Wish, statistics};
use crate::cpu::{self, PowerOn};
use crate::daemons::{self, Daemons};
use crate::layout::{
    ECAM, I8042_PORTS, KVM_IDENTITY_MAP, KVM_TSS, PCI_WINDOW, POWER_IRQ, POWER_PORTS, SERIAL_PORTS,
};
use crate::loader::{self, Images};
use crate::memory::{self, Memory, errno, ranges_of};
use crate::pci::{self, Devices};
use crate::power::{KeyboardController, Outcome, Power, SleepAndReset, install_firmware};
use crate::seccomp::{Role, Sandbox, confine};
use crate::serial::{self, Com1};
use crate::vcpu::{Crew, Exits, Processor, Surroundings};

/// KVM's interrupt controllers: two of 1981 for 8 interrupts each, and the IOAPIC.
const IRQCHIP_COUNT: u32 = 3;
/// What a host's KVM must have.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::Irqchip, "interrupt controllers"),
    (Cap::UserMemory, "memory of ours"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ExtCpuid, "CPUID"),
];

/// How long it takes until a signal is heard while daemons are awaited.
const DAEMON_WAIT: Duration = Duration::from_millis(100);
/// How long daemons may take to let go of a machine that resets: longer than the limit of each message to them, after
/// which they are no longer talked to.
const DAEMON_RESET: Duration = Duration::from_secs(60);

/// What is answered when there is nothing to say.
const DONE: Reply = Ok(Value::Null);

/// Why there is no machine, or no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is no /dev/kvm: is KVM's module loaded, and virtualisation switched on?")]
    NoKvm(#[source] io::Error),
    #[error("no right to use /dev/kvm: is this user in its group (kvm)?")]
    NoRight(#[source] io::Error),
    #[error("cannot use /dev/kvm")]
    Open(#[source] io::Error),
    #[error("the host's KVM has no {0}")]
    Missing(&'static str),
    #[error("the host's KVM has at most {max} processors for a guest, and {count} are wanted")]
    TooManyProcessors { count: u8, max: usize },
    #[error("cannot open {path}")]
    OpenFile { path: PathBuf, source: io::Error },
    #[error("KVM refuses {action}")]
    Kvm { action: &'static str, source: io::Error },
    #[error("cannot describe {0} processors to the guest")]
    Describe(u8),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error("cannot start {kernel}")]
    Load { kernel: PathBuf, source: loader::Error },
    #[error(transparent)]
    Cpu(#[from] cpu::Error),
    #[error(transparent)]
    Serial(#[from] serial::Error),
    #[error("cannot write tables and firmware")]
    Tables(#[source] GuestMemoryError),
    #[error(transparent)]
    Devices(#[from] pci::Error),
    #[error(transparent)]
    Daemon(#[from] daemons::Error),
    #[error("--control {path}: cannot listen there")]
    Control { path: PathBuf, source: io::Error },
    #[error("two devices are in the same place")]
    Bus(#[from] Overlap),
    #[error("cannot {action}")]
    Host { action: &'static str, source: io::Error },
    #[error("{0}")]
    Guest(String),
}

/// How a machine's life ended, if nothing failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    PoweredOff,
    /// The guest restarts, and the operator wants that to be the end.
    Reset,
    /// By the operator's wish.
    Plug,
}

/// A machine that is switched off.
pub(crate) struct Machine {
    options: Options,
    kernel: File,
    initrd: Option<File>,
    vm: Arc<VmFd>,
    /// KVM's interrupt controllers as they were first.
    irqchips: Vec<kvm_irqchip>,
    processors: Vec<Processor>,
    surroundings: Arc<Surroundings>,
    power: Arc<Power>,
    power_button: EventFd,
    devices: Devices,
    /// After the devices: those hang up first.
    daemons: Daemons,
    exits: Vec<Arc<Exits>>,
    signals: Signals,
    control: Option<ControlSocket>,
    starts: u64,
    /// By a signal, in this run.
    is_asked_to_end: Cell<bool>,
    // Last: KVM is told of it.
    memory: Memory,
}

impl Machine {
    /// Makes the machine.
    pub(crate) fn new(options: Options, signals: Signals) -> Result<Self, Error> {
        let kernel = open(&options.kernel)?;
        let initrd = options.initrd.as_deref().map(open).transpose()?;
        let kvm = open_kvm(&options)?;
        let memory = Memory::new(options.memory_bytes, options.hugepages)?;
        let vm = make_vm(&kvm)?;
        memory.register(&vm)?;
        let power = Arc::new(Power::new().map_err(host("make an event"))?);
        let power_button =
            EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("make an event"))?;
        vm.register_irqfd(&power_button, POWER_IRQ).map_err(kvm_error("an interrupt"))?;
        let processors = make_processors(&kvm, &vm, &options)?;
        let exits = processors.iter().map(|processor| processor.exits.clone()).collect();
        let sandbox = options.sandbox;
        let control = options.control.as_deref().map(|path| listen(path, sandbox)).transpose()?;
        let (daemons, configs) = Daemons::start(&options.devices)?;
        let devices = Devices::new(vm.clone(), memory.guest().clone(), configs, sandbox)?;
        let surroundings = Arc::new(surround(&vm, &power, &devices, sandbox)?);
        let irqchips = read_irqchips(&vm)?;
        Ok(Self {
            options,
            kernel,
            initrd,
            vm,
            irqchips,
            processors,
            surroundings,
            power,
            power_button,
            devices,
            daemons,
            exits,
            signals,
            control,
            starts: 0,
            is_asked_to_end: Cell::new(false),
            memory,
        })
    }

    /// Runs it to its end.
    pub(crate) fn run(mut self) -> Result<End, Error> {
        if !self.await_daemons()? {
            return Ok(End::Plug);
        }
        // All files are open, and all threads that need more than this one may are there.
        confine(Role::Main, self.options.sandbox);
        loop {
            let crew = self.start()?;
            let end = self.attend(&crew);
            self.processors = crew.stop();
            match end? {
                Some(end) => return Ok(end),
                None if self.options.reboots => self.reset()?,
                None => return Ok(End::Reset),
            }
        }
    }

    /// Waits, without a limit, until each device's daemon has been there, so that the guest finds them all. False: the
    /// operator wants to wait no longer.
    fn await_daemons(&self) -> Result<bool, Error> {
        while !self.devices.wait(DAEMON_WAIT)? {
            self.daemons.check()?;
            if self.obey(None)?.is_some() {
                return Ok(false);
            }
        }
        self.daemons.keep()?;
        Ok(true)
    }

    /// Loads the kernel into memory that is all zeros, and starts the processors.
    fn start(&mut self) -> Result<Crew, Error> {
        self.starts += 1;
        self.is_asked_to_end.set(false);
        let memory = self.memory.guest();
        let images = Images {
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            command_line: &self.options.command_line,
        };
        let entry = loader::load(memory, &images)
            .map_err(|source| Error::Load { kernel: self.options.kernel.clone(), source })?;
        let end = ranges_of(self.options.memory_bytes).last().map_or(0, |(start, len)| start + len);
        acpi::write(memory, self.options.vcpu_count, end).map_err(Error::Tables)?;
        install_firmware(memory).map_err(Error::Tables)?;
        for processor in &self.processors {
            processor.power_on.restore(&processor.fd)?;
            if processor.index == 0 {
                cpu::enter(&processor.fd, memory, entry)?;
            }
        }
        let processors = std::mem::take(&mut self.processors);
        Crew::start(processors, &self.surroundings).map_err(host("start a processor's thread"))
    }

    /// Waits for what the guest or the operator wants. `None`: the machine is to start again.
    fn attend(&self, crew: &Crew) -> Result<Option<End>, Error> {
        loop {
            let mut events = vec![
                PollFd::new(&self.power, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            events.extend(self.control.iter().map(|control| PollFd::new(control, PollFlags::IN)));
            match poll(&mut events, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(host("wait for events")(error.into())),
            }
            match self.power.take() {
                Some(Outcome::PoweredOff) => return Ok(Some(End::PoweredOff)),
                Some(Outcome::Reset) => return Ok(None),
                Some(Outcome::Failed(why)) => return Err(Error::Guest(why)),
                None => {}
            }
            if let Some(end) = self.obey(Some(crew))? {
                return Ok(Some(end));
            }
        }
    }

    /// Does what the operator wants, of a machine with these processors running, or with none yet.
    fn obey(&self, crew: Option<&Crew>) -> Result<Option<End>, Error> {
        let mut end = None;
        while let Some(wish) = self.signals.take() {
            let (reply, its_end) = self.grant(wish, crew)?;
            if let (Wish::Statistics, Ok(line)) = (wish, reply) {
                // In one piece, so that nothing else gets into the line. Who has closed standard error wants none.
                let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
            }
            end = end.or(its_end);
        }
        while let Some(order) = self.control.as_ref().and_then(ControlSocket::take) {
            let (reply, its_end) = self.grant(order.wish, crew)?;
            order.answer(reply);
            end = end.or(its_end);
        }
        Ok(end)
    }

    fn grant(&self, wish: Wish, crew: Option<&Crew>) -> Result<(Reply, Option<End>), Error> {
        match (wish, crew) {
            (Wish::Statistics, _) => {
                let is_paused = crew.is_some_and(Crew::is_paused);
                let devices = self.devices.statistics();
                let value = statistics((self.starts, is_paused), &self.exits, &devices);
                return Ok((Ok(value), None));
            }
            (Wish::End, _) | (Wish::Terminate, None) => return Ok((DONE, Some(End::Plug))),
            (_, None) => return Ok((Err("the machine waits for its daemons".to_owned()), None)),
            (Wish::Pause, Some(crew)) => crew.pause(),
            (Wish::Resume, Some(crew)) => crew.resume(),
            (Wish::Terminate, Some(_)) if self.is_asked_to_end.replace(true) => {
                return Ok((DONE, Some(End::Plug)));
            }
            (Wish::Terminate | Wish::PowerButton, Some(_)) => {
                self.power_button.write(1).map_err(host("press the power button"))?;
            }
        }
        Ok((DONE, None))
    }

    /// Makes everything as it was when the machine was new, but for the processors, which [`Machine::start`] resets.
    fn reset(&self) -> Result<(), Error> {
        if !self.devices.reset(DAEMON_RESET) {
            tracing::warn!("a daemon has not let go of the guest's memory in {DAEMON_RESET:?}");
        }
        for chip in &self.irqchips {
            self.vm.set_irqchip(chip).map_err(kvm_error("an interrupt controller's state"))?;
        }
        Ok(self.memory.clear()?)
    }
}

fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::OpenFile { path: path.to_owned(), source })
}

fn listen(path: &Path, sandbox: Sandbox) -> Result<ControlSocket, Error> {
    let failed = |source| Error::Control { path: path.to_owned(), source };
    ControlSocket::listen(path, sandbox).map_err(failed)
}

fn open_kvm(options: &Options) -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm(errno(error)),
        libc::EACCES | libc::EPERM => Error::NoRight(errno(error)),
        _ => Error::Open(errno(error)),
    })?;
    if let Some((_, what)) = NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability))
    {
        return Err(Error::Missing(what));
    }
    let (count, max) = (options.vcpu_count, kvm.get_max_vcpus());
    if usize::from(count) > max {
        return Err(Error::TooManyProcessors { count, max });
    }
    Ok(kvm)
}

fn make_vm(kvm: &Kvm) -> Result<Arc<VmFd>, Error> {
    let vm = kvm.create_vm().map_err(kvm_error("a virtual machine"))?;
    // Addresses of 32 bits fit everywhere.
    vm.set_tss_address(KVM_TSS as usize).map_err(kvm_error("the task state's place"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm_error("the identity map's place"))?;
    vm.create_irq_chip().map_err(kvm_error("interrupt controllers"))?;
    Ok(Arc::new(vm))
}

fn make_processors(kvm: &Kvm, vm: &VmFd, options: &Options) -> Result<Vec<Processor>, Error> {
    let supported = cpu::supported(kvm).map_err(|source| Error::Kvm { action: "CPUID", source })?;
    let msrs = kvm.get_msr_index_list().map_err(kvm_error("the list of MSRs"))?;
    let count = options.vcpu_count;
    let mut processors = Vec::new();
    for index in 0..count {
        let fd = vm.create_vcpu(index.into()).map_err(kvm_error("a processor"))?;
        let leaves = cpu::describe(&supported, index, count).ok_or(Error::Describe(count))?;
        fd.set_cpuid2(&leaves).map_err(kvm_error("a processor's CPUID"))?;
        let power_on = PowerOn::of(&fd, index, msrs.as_slice())?;
        let host_cpu = options.affinity.get(usize::from(index)).copied();
        processors.push(Processor { index, fd, power_on, exits: Arc::default(), host_cpu });
    }
    Ok(processors)
}

/// Puts everything where [`crate::layout`] has it.
fn surround(
    vm: &VmFd,
    power: &Arc<Power>,
    devices: &Devices,
    sandbox: Sandbox,
) -> Result<Surroundings, Error> {
    let mut ports = Bus::default();
    let places: [(_, Arc<dyn Region>); 3] = [
        (SERIAL_PORTS, Arc::new(Com1::new(vm)?)),
        (POWER_PORTS, Arc::new(SleepAndReset(power.clone()))),
        (I8042_PORTS, Arc::new(KeyboardController(power.clone()))),
    ];
    for (range, region) in places {
        ports.insert(range.start, range.end - range.start, region)?;
    }
    let mut memory = Bus::default();
    for (range, region) in [(ECAM, devices.ecam()), (PCI_WINDOW, devices.window())] {
        memory.insert(range.start, range.end - range.start, region)?;
    }
    Ok(Surroundings { ports, memory, power: power.clone(), sandbox })
}

fn read_irqchips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, Error> {
    let read = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(kvm_error("to tell an interrupt controller's state"))?;
        Ok(chip)
    };
    (0..IRQCHIP_COUNT).map(read).collect()
}

fn kvm_error(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm { action, source: errno(error) }
}

fn host(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host { action, source }
}
