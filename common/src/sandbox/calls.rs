//! System calls by name, and what they may be asked: lists that several threads have.
//!
//! Contract: a list holds what its heading says and nothing more. A call that the C library or the standard library makes
//! on its own is listed where that happens. Numbers are those of the machine that this is compiled for; some are only on
//! x86-64, whose C library still makes them.

use libc::c_long;

use super::Access;

/// A system call that may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub(super) number: c_long,
    pub(super) condition: Option<Condition>,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    /// Its place, from 0.
    pub(super) argument: u8,
    /// Of these bits of it.
    pub(super) mask: u64,
    /// This is left.
    pub(super) value: u64,
}

impl Call {
    /// The call, whatever it is asked.
    pub const fn any(number: c_long) -> Self {
        Self { number, condition: None }
    }

    /// The call if this argument has this value.
    pub const fn with(number: c_long, argument: u8, value: u32) -> Self {
        Self::masked(number, argument, u32::MAX, value)
    }

    /// The call if these bits of an argument are so.
    pub const fn masked(number: c_long, argument: u8, mask: u32, value: u32) -> Self {
        let condition = Condition { argument, mask: mask as u64, value: value as u64 };
        Self { number, condition: Some(condition) }
    }

    /// `ioctl` with this request.
    pub const fn ioctl(request: u32) -> Self {
        Self::with(libc::SYS_ioctl, 1, request)
    }
}

/// Memory is never made executable.
const NO_EXEC: u32 = libc::PROT_EXEC as u32;
const ONLY_THREADS: u32 = libc::CLONE_THREAD as u32;

/// What any thread does: it allocates, waits for others, writes to the log, reads and writes what it has open and closes it,
/// has its signal handlers run (the one for SIGBUS maps memory), and ends, also by a panic.
pub const EVERY_THREAD: &[Call] = &[
    Call::any(libc::SYS_brk),
    Call::masked(libc::SYS_mmap, 2, NO_EXEC, 0),
    Call::masked(libc::SYS_mprotect, 2, NO_EXEC, 0),
    Call::any(libc::SYS_munmap),
    Call::any(libc::SYS_mremap),
    Call::any(libc::SYS_madvise),
    Call::any(libc::SYS_futex),
    Call::any(libc::SYS_sched_yield),
    // malloc asks for the number of processors.
    Call::any(libc::SYS_sched_getaffinity),
    Call::any(libc::SYS_getrandom),
    Call::any(libc::SYS_clock_gettime),
    Call::any(libc::SYS_clock_nanosleep),
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_readv),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_close),
    Call::any(libc::SYS_fcntl),
    Call::any(libc::SYS_fstat),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll),
    Call::any(libc::SYS_ppoll),
    // A signal comes to any thread, whose handler tells the main thread by a socket that it has.
    Call::with(libc::SYS_sendto, 5, 0),
    Call::any(libc::SYS_rt_sigaction),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_rt_sigreturn),
    Call::any(libc::SYS_sigaltstack),
    Call::any(libc::SYS_restart_syscall),
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_gettid),
    Call::any(libc::SYS_tgkill),
    Call::any(libc::SYS_exit),
    Call::any(libc::SYS_exit_group),
];

/// A thread is started, by the C library of today or of some years ago.
pub const START_THREADS: &[Call] = &[
    // What it is to share is behind an address, where no filter looks. It cannot become another program.
    Call::any(libc::SYS_clone3),
    Call::masked(libc::SYS_clone, 0, ONLY_THREADS, ONLY_THREADS),
    Call::any(libc::SYS_set_robust_list),
    Call::any(libc::SYS_rseq),
    Call::with(libc::SYS_prctl, 0, libc::PR_SET_NAME as u32),
];

/// epoll waits.
pub const EPOLL: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_ctl),
];

/// A unix socket goes to where somebody listens.
pub const CONNECT: &[Call] =
    &[Call::with(libc::SYS_socket, 0, libc::AF_UNIX as u32), Call::any(libc::SYS_connect)];

/// A unix socket is made for others to connect to, with its group and mode.
pub const LISTEN: &[Call] = &[
    Call::any(libc::SYS_bind),
    Call::any(libc::SYS_listen),
    Call::any(libc::SYS_fchmod),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_chmod),
    Call::any(libc::SYS_fchmodat),
    Call::any(libc::SYS_fchownat),
];

/// What a terminal is set to.
pub const TERMINAL: &[Call] = &[
    Call::ioctl(libc::TCGETS as u32),
    Call::ioctl(libc::TCSETS as u32),
    Call::ioctl(libc::TCSETSW as u32),
    Call::ioctl(libc::TCSETSF as u32),
    Call::ioctl(libc::TCGETS2 as u32),
    Call::ioctl(libc::TCSETS2 as u32),
    Call::ioctl(libc::TCSETSW2 as u32),
    Call::ioctl(libc::TCSETSF2 as u32),
    Call::ioctl(libc::TCFLSH as u32),
    Call::ioctl(libc::TIOCGWINSZ as u32),
];

/// What is at a path.
const LOOK: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_stat),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_lstat),
    Call::any(libc::SYS_newfstatat),
    Call::any(libc::SYS_statx),
];

const REMOVE: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_unlink),
    Call::any(libc::SYS_unlinkat),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_readlink),
    Call::any(libc::SYS_readlinkat),
];

const OPEN: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_open),
    Call::any(libc::SYS_openat),
    Call::any(libc::SYS_lseek),
];

const RENAME: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_rename),
    Call::any(libc::SYS_renameat),
    Call::any(libc::SYS_renameat2),
];

const LINK: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_symlink),
    Call::any(libc::SYS_symlinkat),
];

const NODES: &[Call] = &[Call::any(libc::SYS_mknodat)];

impl Access {
    /// The system calls that it takes.
    pub(super) fn calls(self) -> impl Iterator<Item = &'static Call> {
        let lists: &[&[Call]] = match self {
            Self::Remove => &[LOOK, REMOVE],
            Self::Read | Self::Open => &[LOOK, OPEN],
            Self::Keep => &[LOOK, OPEN, REMOVE, RENAME],
            Self::Make => &[LOOK, OPEN, REMOVE, RENAME, LINK],
            Self::MakeNodes => &[LOOK, OPEN, REMOVE, NODES],
        };
        lists.iter().copied().flatten()
    }
}
