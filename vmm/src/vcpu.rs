//! Processors: a thread each, which runs the guest and answers its exits.
//!
//! Contract: a [`Crew`] runs all processors of a machine, and pauses, resumes and stops them together. When
//! [`Crew::pause`] returns, none of them is in the guest or in a device. [`Crew::stop`] gives them back.
//!
//! A thread that is in the guest is got out of it by a signal. A signal that comes just before it enters is lost, so it is
//! sent until the thread has answered: no flag that the kernel reads is needed for that, and no pointer in a handler.
//!
//! What it deliberately does not do: know what answers to an address ([`crate::bus`]).

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::thread::{CpuSet, sched_setaffinity};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::cpu::PowerOn;
use crate::power::{Outcome, Power};
use crate::seccomp::{Role, Sandbox, confine};

/// How long to wait before the signal is sent again.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(2);

/// What processors are to do.
const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// Why a processor left the guest. The names are those of the statistics.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub(crate) enum Reason {
    PortRead,
    PortWrite,
    MemoryRead,
    MemoryWrite,
    /// A signal: to pause, to stop, or one more than was needed.
    Signal,
    Shutdown,
    Other,
}

impl Reason {
    const NAMES: [&str; 7] = [
        "port_reads",
        "port_writes",
        "memory_reads",
        "memory_writes",
        "signals",
        "shutdowns",
        "others",
    ];
}

/// How often a processor left the guest, by reason.
#[derive(Debug, Default)]
pub(crate) struct Exits([AtomicU64; Reason::NAMES.len()]);

impl Exits {
    fn count(&self, reason: Reason) {
        // One thread adds, and readers want no order among counters.
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Names and counts.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        Reason::NAMES.into_iter().zip(counts)
    }
}

/// What answers to a processor.
pub(crate) struct Surroundings {
    pub(crate) ports: Bus,
    pub(crate) memory: Bus,
    pub(crate) power: Arc<Power>,
    pub(crate) sandbox: Sandbox,
}

/// A processor that does not run.
pub(crate) struct Processor {
    pub(crate) index: u8,
    pub(crate) fd: VcpuFd,
    pub(crate) power_on: PowerOn,
    pub(crate) exits: Arc<Exits>,
    /// The host's processor that it is to run on.
    pub(crate) host_cpu: Option<usize>,
}

/// The processors of a running machine.
pub(crate) struct Crew {
    threads: Vec<JoinHandle<Processor>>,
    gate: Arc<Gate>,
}

impl Crew {
    /// Starts them all.
    pub(crate) fn start(
        processors: Vec<Processor>,
        surroundings: &Arc<Surroundings>,
    ) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let mut crew = Self { threads: Vec::new(), gate: Arc::default() };
        for processor in processors {
            let gate = crew.gate.clone();
            let surroundings = surroundings.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{}", processor.index))
                .spawn(move || processor.work(&gate, &surroundings))?;
            crew.threads.push(thread);
        }
        Ok(crew)
    }

    /// Returns when no processor is in the guest any more.
    pub(crate) fn pause(&self) {
        self.bring(PAUSE);
    }

    /// The opposite of [`Crew::pause`].
    pub(crate) fn resume(&self) {
        self.gate.order(RUN);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.gate.order.load(Ordering::Relaxed) == PAUSE
    }

    /// Ends the threads.
    pub(crate) fn stop(self) -> Vec<Processor> {
        self.bring(STOP);
        // A thread that panics ends the process: there is none to miss.
        self.threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    }

    fn bring(&self, order: u8) {
        self.gate.order(order);
        let mut waiting = self.gate.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while *waiting < self.threads.len() {
            for thread in &self.threads {
                // Fails only for a thread that has ended, which is counted.
                let _ = thread.kill(SIGRTMIN());
            }
            let (guard, _) = self
                .gate
                .changed
                .wait_timeout(waiting, SIGNAL_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner);
            waiting = guard;
        }
    }
}

/// Interrupts the system call that runs the guest, by being there.
extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Where processors wait that are not to run.
#[derive(Debug, Default)]
struct Gate {
    order: AtomicU8,
    /// How many wait, or have ended.
    waiting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    fn order(&self, order: u8) {
        let _waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever misses it here is in the guest soon, and gets a signal.
        self.order.store(order, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn is_open(&self) -> bool {
        self.order.load(Ordering::Relaxed) == RUN
    }

    /// Waits until it is no longer open.
    fn wait_until_closed(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while self.is_open() {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the processor may run, or is to stop: false.
    fn pass(&self) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        *waiting += 1;
        self.changed.notify_all();
        while self.order.load(Ordering::Relaxed) == PAUSE {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let is_open = self.is_open();
        if is_open {
            *waiting -= 1;
        }
        is_open
    }
}

impl Processor {
    fn work(mut self, gate: &Gate, surroundings: &Surroundings) -> Self {
        if let Some(cpu) = self.host_cpu {
            let mut cpus = CpuSet::new();
            cpus.set(cpu);
            if let Err(error) = sched_setaffinity(None, &cpus) {
                let why =
                    format!("processor {} cannot run on the host's {cpu}: {error}", self.index);
                surroundings.power.end(Outcome::Failed(why));
            }
        }
        confine(Role::Processor, surroundings.sandbox);
        loop {
            if !gate.is_open() {
                if !gate.pass() {
                    return self;
                }
                // The guest's watchdogs are told of the pause. A guest without this clock has none to tell.
                let _ = self.fd.kvmclock_ctrl();
            }
            let (reason, outcome) = self.run(surroundings);
            self.exits.count(reason);
            if let Some(outcome) = outcome {
                surroundings.power.end(outcome);
                // The main thread will stop this one: until then it stays out of the guest.
                gate.wait_until_closed();
            }
        }
    }

    /// Runs the guest until its next exit, and answers that.
    fn run(&mut self, surroundings: &Surroundings) -> (Reason, Option<Outcome>) {
        let reason = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                surroundings.ports.read(port.into(), data);
                Reason::PortRead
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                surroundings.ports.write(port.into(), data);
                Reason::PortWrite
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                surroundings.memory.read(address, data);
                Reason::MemoryRead
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                surroundings.memory.write(address, data);
                Reason::MemoryWrite
            }
            Ok(VcpuExit::Intr) => Reason::Signal,
            // A fault while a fault's fault was handled: a PC's processor is reset, and so is the machine.
            Ok(VcpuExit::Shutdown) => return (Reason::Shutdown, Some(Outcome::Reset)),
            Ok(exit) => {
                let why = format!("{exit:?}");
                return (Reason::Other, Some(self.failed(&why)));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Reason::Signal,
            Err(error) => return (Reason::Other, Some(self.failed(&error.to_string()))),
        };
        (reason, None)
    }

    fn failed(&self, why: &str) -> Outcome {
        let at = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Outcome::Failed(format!("processor {} cannot run at {at:#x}: {why}", self.index))
    }
}
