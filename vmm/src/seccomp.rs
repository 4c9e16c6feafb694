//! Which system calls a thread may make from the moment on when it has what it needs.
//!
//! Contract: a thread of a [`Role`] that has called [`confine`] makes no system call but those of its table, by arguments
//! that the table permits; to open a file is refused, and any other call ends the process by SIGSYS. So whoever gets hold of a processor's thread, by a fault of
//! ours that a guest has found, runs no program and opens no file; nor does a front end's that a daemon has got hold of, and
//! its sockets are unix sockets. No role maps memory that is executed.
//!
//! A thread that starts another hands its filter down, and the other adds its own. So the main thread, whose restart of a
//! machine starts the processors' threads anew, may do whatever they may; and a thread that starts programs is started
//! before the main thread is confined, and has no role: those that run daemons ([`crate::daemons`]).
//!
//! What it deliberately does not do: limit what is opened while a machine is made. All that the command line names is
//! opened by then.

use std::collections::BTreeMap;
use std::sync::Once;

use clap::ValueEnum;
use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_ioeventfd, kvm_irq_routing, kvm_irqchip, kvm_irqfd,
    kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use libc::c_long;
use rustix::ioctl::opcode;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

/// What becomes of a system call that a thread has no need of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sandbox {
    /// It ends the process.
    On,
    /// It is made, and the kernel logs it.
    Log,
    /// It is made.
    Off,
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The operator's and the machine's wishes. It loads a kernel again, from a file that is open.
    Main,
    /// A virtual processor, with the registers of devices.
    Processor,
    /// A device's front end, which connects to its daemon again and again.
    FrontEnd,
    /// The one that cuts connections.
    Watchdog,
    /// The control socket's, and those of its clients, which it starts.
    Control,
}

/// By which arguments a call may be made.
#[derive(Clone, Copy)]
enum When {
    Always,
    /// The argument of this index is one of these.
    Among(u8, &'static [u64]),
    /// The argument of this index has none of these bits.
    Without(u8, u64),
}

use When::{Always, Among, Without};

type Table = &'static [(c_long, When)];

/// Memory that is executed comes from program files only.
const NOT_EXECUTED: When = Without(2, libc::PROT_EXEC as u64);

/// What fails, by a filter of its own. The C library opens files when nobody thinks of it: its allocator counts the host's
/// processors when the ninth thread of the process allocates. It does without them.
const REFUSED: c_long = libc::SYS_openat;

/// What the allocator, locks, output, an eventfd, waiting for several descriptors, the end of a thread, and that of the
/// process by a panic ask of the kernel.
const ALL: Table = &[
    (libc::SYS_brk, Always),
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_close, Always),
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_eventfd2, Always),
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
    // A build with assertions asks whether what it closes is open.
    (libc::SYS_fcntl, Among(1, &[libc::F_DUPFD_CLOEXEC as u64, libc::F_GETFD as u64])),
    (libc::SYS_futex, Always),
    (libc::SYS_getpid, Always),
    (libc::SYS_getrandom, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_mmap, NOT_EXECUTED),
    (libc::SYS_mprotect, NOT_EXECUTED),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    (REFUSED, Always),
    (libc::SYS_read, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_rt_sigaction, Always),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_sched_getaffinity, Always),
    (libc::SYS_shutdown, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_tgkill, Always),
    (libc::SYS_write, Always),
];

/// The start of a thread, which inherits this filter.
const THREADS: Table = &[
    (libc::SYS_clone, Always),
    (libc::SYS_clone3, Always),
    (libc::SYS_prctl, Among(0, &[libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64])),
    (libc::SYS_rseq, Always),
    (libc::SYS_set_robust_list, Always),
];

/// Where files have been read, processors are started, an operator is answered, and daemons are ended.
const MAIN: Table = &[
    (libc::SYS_fallocate, Always),
    (libc::SYS_ioctl, Among(1, &RESTART_REQUESTS)),
    (libc::SYS_lseek, Always),
    (libc::SYS_pidfd_send_signal, Always),
    (libc::SYS_poll, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_sched_setaffinity, Always),
    (libc::SYS_seccomp, Always),
    (libc::SYS_sendto, Always),
    // The control socket's file.
    (libc::SYS_unlink, Always),
];

const PROCESSOR: Table = &[(libc::SYS_ioctl, Among(1, &RUN_REQUESTS))];

const FRONT_END: Table = &[
    (libc::SYS_connect, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_ioctl, Among(1, &[libc::FIONBIO])),
    (libc::SYS_memfd_create, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_socket, Among(0, &[libc::AF_UNIX as u64])),
    (libc::SYS_socketpair, Among(0, &[libc::AF_UNIX as u64])),
];

const CONTROL: Table = &[
    (libc::SYS_accept4, Always),
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_recvfrom, Always),
    (libc::SYS_sendto, Always),
    (libc::SYS_setsockopt, Among(1, &[libc::SOL_SOCKET as u64])),
];

/// The group of KVM's requests.
const KVMIO: u8 = 0xAE;
const KVM_RUN: u64 = opcode::none(KVMIO, 0x80) as u64;
const KVM_KVMCLOCK_CTRL: u64 = opcode::none(KVMIO, 0xAD) as u64;
const KVM_GET_REGS: u64 = opcode::read::<kvm_regs>(KVMIO, 0x81) as u64;
const KVM_IRQFD: u64 = opcode::write::<kvm_irqfd>(KVMIO, 0x76) as u64;
const KVM_IOEVENTFD: u64 = opcode::write::<kvm_ioeventfd>(KVMIO, 0x79) as u64;
const KVM_SET_GSI_ROUTING: u64 = opcode::write::<kvm_irq_routing>(KVMIO, 0x6A) as u64;

/// What a running processor asks of KVM, for itself and where its guest moves a device or an interrupt.
const RUN_REQUESTS: [u64; 6] =
    [KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_IRQFD, KVM_IOEVENTFD, KVM_SET_GSI_ROUTING];

/// The same, and what makes a machine as it was when it was new.
const RESTART_REQUESTS: [u64; 17] = [
    KVM_RUN,
    KVM_KVMCLOCK_CTRL,
    KVM_GET_REGS,
    KVM_IRQFD,
    KVM_IOEVENTFD,
    KVM_SET_GSI_ROUTING,
    // KVM_SET_IRQCHIP: the interface has it the wrong way round.
    opcode::read::<kvm_irqchip>(KVMIO, 0x63) as u64,
    opcode::write::<kvm_regs>(KVMIO, 0x82) as u64,
    opcode::read::<kvm_sregs>(KVMIO, 0x83) as u64,
    opcode::write::<kvm_sregs>(KVMIO, 0x84) as u64,
    opcode::write::<kvm_msrs>(KVMIO, 0x89) as u64,
    opcode::write::<kvm_fpu>(KVMIO, 0x8D) as u64,
    opcode::write::<kvm_lapic_state>(KVMIO, 0x8F) as u64,
    opcode::write::<kvm_mp_state>(KVMIO, 0x99) as u64,
    opcode::write::<kvm_vcpu_events>(KVMIO, 0xA0) as u64,
    opcode::write::<kvm_debugregs>(KVMIO, 0xA2) as u64,
    opcode::write::<kvm_xcrs>(KVMIO, 0xA7) as u64,
];

/// Puts the filter of a role in force for the thread that calls. A host without such filters runs the machine all the same.
pub(crate) fn confine(role: Role, sandbox: Sandbox) {
    static SAID: Once = Once::new();
    let filters = match sandbox {
        // Of two answers the stricter one counts.
        Sandbox::On => vec![refuse(), program(role, SeccompAction::KillProcess)],
        Sandbox::Log => vec![program(role, SeccompAction::Log)],
        Sandbox::Off => return,
    };
    let applied: Result<(), seccompiler::Error> =
        filters.into_iter().try_for_each(|filter| apply_filter(&filter?));
    if let Err(error) = applied {
        SAID.call_once(|| tracing::info!("system calls are not limited on this host: {error}"));
    }
}

fn program(role: Role, refusal: SeccompAction) -> Result<BpfProgram, BackendError> {
    let own: &[Table] = match role {
        Role::Main => &[THREADS, MAIN],
        Role::Processor => &[PROCESSOR],
        Role::FrontEnd => &[FRONT_END],
        Role::Watchdog => &[],
        Role::Control => &[THREADS, CONTROL],
    };
    let mut rules = BTreeMap::new();
    for (call, when) in ALL.iter().chain(own.iter().copied().flatten()) {
        rules.insert(*call, rules_of(*when)?);
    }
    compile(rules, refusal, SeccompAction::Allow)
}

fn refuse() -> Result<BpfProgram, BackendError> {
    let refusal = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    compile(BTreeMap::from([(REFUSED, Vec::new())]), SeccompAction::Allow, refusal)
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// Any of the rules permits a call; none at all permits all calls.
fn rules_of(when: When) -> Result<Vec<SeccompRule>, BackendError> {
    // All of these arguments have 32 bits: what is above them the kernel does not look at either.
    let rule = |index, comparison, value| {
        let length = SeccompCmpArgLen::Dword;
        SeccompRule::new(vec![SeccompCondition::new(index, length, comparison, value)?])
    };
    match when {
        Always => Ok(Vec::new()),
        Among(index, values) => {
            values.iter().map(|value| rule(index, SeccompCmpOp::Eq, *value)).collect()
        }
        Without(index, bits) => Ok(vec![rule(index, SeccompCmpOp::MaskedEq(bits), 0)?]),
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::fs::File;
    use std::net::TcpListener;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;
    use std::sync::Barrier;
    use std::thread;

    use vm_memory::MmapRegion;

    use super::*;

    /// In a child: the role, the mode and the call, by their places.
    const CHILD: &str = "OUTBOARD_TEST_CONFINED";
    const TEST: &str = "seccomp::tests::a_call_that_a_role_has_no_need_of_ends_the_process";
    const ROLES: [Role; 5] =
        [Role::Main, Role::Processor, Role::FrontEnd, Role::Watchdog, Role::Control];
    const FORBIDDEN: [(&str, fn()); 4] = [
        ("a program", || drop(Command::new("/bin/true").exec())),
        ("a network", || drop(TcpListener::bind("127.0.0.1:0"))),
        ("another request", || {
            let _ended = rustix::io::ioctl_fionread(std::io::stdin());
        }),
        ("memory that is executed", || {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            drop(MmapRegion::<()>::build(None, 4096, libc::PROT_READ | libc::PROT_EXEC, flags));
        }),
    ];

    /// This program, which is to run one of its tests in a process of its own.
    fn child(test: &str) -> Command {
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", test]);
        child
    }

    /// What became of one that made a call.
    fn signal_of_child(role: usize, sandbox: Sandbox, call: usize) -> Option<i32> {
        let is_on = u8::from(sandbox == Sandbox::On);
        let words = format!("{role} {is_on} {call}");
        let output = child(TEST).env(CHILD, words).output().unwrap();
        let signal = output.status.signal();
        assert!(signal.is_some() || output.status.success(), "{output:?}");
        signal
    }

    fn be_child(words: &str) {
        let numbers: Vec<usize> = words.split(' ').map(|word| word.parse().unwrap()).collect();
        let sandbox = if numbers[1] == 1 { Sandbox::On } else { Sandbox::Log };
        confine(ROLES[numbers[0]], sandbox);
        let is_refused = sandbox == Sandbox::On;
        match FORBIDDEN.get(numbers[2]) {
            Some((_, call)) => call(),
            None => assert_eq!(File::open("/dev/null").is_err(), is_refused),
        }
    }

    #[test]
    fn threads_that_allocate_need_no_file_however_many_they_are() {
        const THREADS: usize = 32;
        if env::var(CHILD).is_ok() {
            confine(Role::Main, Sandbox::On);
            let all_are_there = Barrier::new(THREADS);
            let allocate = |number| {
                all_are_there.wait();
                let vector = vec![number; 100];
                all_are_there.wait();
                vector.len()
            };
            thread::scope(|scope| {
                (0..THREADS).for_each(|number| drop(scope.spawn(move || allocate(number))))
            });
            return;
        }
        let test = "seccomp::tests::threads_that_allocate_need_no_file_however_many_they_are";
        let output = child(test).env(CHILD, "").output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn a_call_that_a_role_has_no_need_of_ends_the_process() {
        if let Ok(words) = env::var(CHILD) {
            return be_child(&words);
        }
        for (number, role) in ROLES.iter().enumerate() {
            for (call, (name, _)) in FORBIDDEN.iter().enumerate() {
                let signal = signal_of_child(number, Sandbox::On, call);
                assert_eq!(signal, Some(libc::SIGSYS), "{role:?}: {name}");
            }
            assert_eq!(signal_of_child(number, Sandbox::On, FORBIDDEN.len()), None, "{role:?}");
            assert_eq!(signal_of_child(number, Sandbox::Log, 1), None, "{role:?}");
        }
    }
}
