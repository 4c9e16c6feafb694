//! Survives a front end that shortens the memory it has shared.
//!
//! An access to a page that the file no longer has raises SIGBUS in the thread that makes it, in the middle of whatever
//! it does. Unwinding or jumping out of there would cross frames that do not expect it. Instead the handler puts a page
//! of zeros under the access, notes in a table that the region is poisoned, and lets the thread go on: it reads a
//! meaningless but harmless zero, and the session learns from [`MemoryMap::is_poisoned`](super::MemoryMap::is_poisoned)
//! that its front end must go. (The kernel's own accesses, such as those of io_uring, get `EFAULT` and need none of this.)
//!
//! # Contract
//! - The table is static and lock-free, since the handler may interrupt anything. Each slot is a sequence lock: the
//!   handler believes what it has read of a slot only if the slot was live and unchanged throughout. A slot that changes
//!   meanwhile belongs to some other region: the one in which a thread makes an access stays mapped during it.
//! - The handler calls nothing but three system calls, keeps `errno`, and handles threads that fault at the same time:
//!   each puts its own page of zeros, and the last one stays.
//! - A SIGBUS that is none of ours (another address, another process's signal) has its default effect.
//!
//! # What it deliberately does not do
//! It replaces one page per fault, not the region: pages that are still there keep the guest's data until the session
//! has stopped its rings, so that a write in progress does not put zeros on a disk.

#![allow(unsafe_code)]

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

/// Regions that may be mapped at once in this process. A front end may have 509 memory slots (what QEMU's KVM has to
/// give), and two generations of them while a table is being replaced; the rest is room for rings that still drain.
pub(super) const MAX_REGIONS: usize = 4096;

/// States of a slot, in the low bits of `Slot::state`; the bits above count how often it was registered.
const FREE: u64 = 0;
const CHANGING: u64 = 1;
const LIVE: u64 = 2;
const STATE_MASK: u64 = 3;
const ONE_REGISTRATION: u64 = 4;

struct Slot {
    state: AtomicU64,
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    page_bytes: AtomicUsize,
    poisoned: AtomicBool,
}

static SLOTS: [Slot; MAX_REGIONS] = [const { Slot::new() }; MAX_REGIONS];

/// Whether any region of this process has ever been poisoned: saves looking at each of them.
static ANY_POISONED: AtomicBool = AtomicBool::new(false);

/// Installs the handler for SIGBUS, once per process; further calls do nothing.
///
/// [`Region::map`](super::Region::map) does it too. A daemon calls it at its start, before a sandbox might forbid it.
pub fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        let handler =
            on_sigbus as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
        let installed = set_action(
            handler as libc::sighandler_t,
            libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART,
        );
        assert!(installed, "sigaction accepts a handler for SIGBUS");
    });
}

/// Whether any region of this process has ever been poisoned.
#[inline]
pub(super) fn any_poisoned() -> bool {
    // Relaxed: the flag is set by the thread that faulted, and others may learn it a little later.
    ANY_POISONED.load(Ordering::Relaxed)
}

/// A mapped range that the handler knows. The range must stay mapped until this is dropped.
#[derive(Debug)]
pub(super) struct Registration {
    index: usize,
}

impl Registration {
    /// Registers a range in whole pages of `page_bytes` (a power of two). None: the table is full.
    pub(super) fn new(start: usize, len_bytes: usize, page_bytes: usize) -> Option<Self> {
        let index = SLOTS.iter().position(Slot::claim)?;
        let registration = Self { index };
        let slot = registration.slot();
        slot.start.store(start, Ordering::Relaxed);
        slot.len_bytes.store(len_bytes, Ordering::Relaxed);
        slot.page_bytes.store(page_bytes, Ordering::Relaxed);
        slot.poisoned.store(false, Ordering::Relaxed);
        // Release: pairs with the Acquire load in `Slot::page_of`, which then sees the fields stored above.
        slot.state.fetch_add(LIVE - CHANGING, Ordering::Release);
        Some(registration)
    }

    #[inline]
    pub(super) fn is_poisoned(&self) -> bool {
        self.slot().poisoned.load(Ordering::Relaxed)
    }

    #[inline]
    fn slot(&self) -> &'static Slot {
        &SLOTS[self.index]
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // One step from live to free: the fields change only after the next claim. AcqRel: whoever claims the slot next
        // (Acquire, in `Slot::claim`) comes after all that was done with this registration.
        self.slot().state.fetch_add(ONE_REGISTRATION - LIVE, Ordering::AcqRel);
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            state: AtomicU64::new(FREE),
            start: AtomicUsize::new(0),
            len_bytes: AtomicUsize::new(0),
            page_bytes: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Takes the slot if it is free; it is then `CHANGING`, and its fields are the caller's to set.
    fn claim(&self) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        let claimed = state & STATE_MASK == FREE
            && self
                .state
                .compare_exchange(
                    state,
                    state + (CHANGING - FREE),
                    Ordering::Acquire,
                    Ordering::Relaxed,
                )
                .is_ok();
        // Pairs with the Acquire fence in `page_of`: a handler that sees a field stored after this sees the state
        // changed as well. Without it the stores of the fields could become visible before the change of state.
        fence(Ordering::Release);
        claimed
    }

    /// The page that holds `address`, if this slot is live and covers it: its first address and its size.
    fn page_of(&self, address: usize) -> Option<(usize, usize)> {
        // Acquire: pairs with the Release in `Registration::new`.
        let state = self.state.load(Ordering::Acquire);
        if state & STATE_MASK != LIVE {
            return None;
        }
        let offset = address.wrapping_sub(self.start.load(Ordering::Relaxed));
        let covered = offset < self.len_bytes.load(Ordering::Relaxed);
        let page_bytes = self.page_bytes.load(Ordering::Relaxed);
        // Pairs with the Release fence in `claim`.
        fence(Ordering::Acquire);
        let unchanged = self.state.load(Ordering::Relaxed) == state;
        (covered && unchanged).then_some((address & !page_bytes.wrapping_sub(1), page_bytes))
    }
}

/// The handler. Only what POSIX calls async-signal-safe may happen from here on: no allocation, no lock, no panic.
extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: errno is a thread-local int that is there for as long as the thread is.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; the pointer is the thread's own.
    let kept = unsafe { errno.read() };
    // SAFETY: the kernel passes a valid siginfo to a handler that was installed with SA_SIGINFO.
    let info = unsafe { &*info };
    let code = info.si_code;
    // SAFETY: for every SIGBUS this reads initialised bytes; that they are an address is what `code` tells.
    let address = unsafe { info.si_addr() }.addr();
    // The kernel's own codes: no page for the address (the file is shorter), or one whose memory has failed. A code that
    // is not positive means that a process sent the signal, and then there is no address.
    let is_fault = code == libc::BUS_ADRERR || code == libc::BUS_MCEERR_AR;
    if !(is_fault && replace_page(address)) {
        // Returning repeats the access, which then ends the process where the fault is. A signal that somebody sent
        // would not be repeated, so it is sent once more.
        set_action(libc::SIG_DFL, 0);
        if !is_fault {
            resend();
        }
    }
    // SAFETY: as for the read.
    unsafe { errno.write(kept) };
}

/// Puts zeros in the place of the page at `address`, if it lies in a region, and poisons the region.
fn replace_page(address: usize) -> bool {
    let found = SLOTS.iter().find_map(|slot| slot.page_of(address).map(|page| (slot, page)));
    let Some((slot, (page, page_bytes))) = found else {
        return false;
    };
    // The flags come first: a thread that reads the zeros finds them set.
    slot.poisoned.store(true, Ordering::Relaxed);
    ANY_POISONED.store(true, Ordering::Release);
    // A system call without the C library's wrapper, which need not be async-signal-safe.
    // SAFETY: the page lies in a mapping that its region owns and that a thread is using right now, so that it is not
    // being unmapped; nothing but guest memory, which may hold any bytes, is replaced.
    let mapped = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            page,
            page_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1 as libc::c_long,
            0 as libc::c_long,
        )
    };
    mapped != -1
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> bool {
    // SAFETY: all bytes zero is a valid sigaction: the default handler, an empty mask, no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: the action is valid, and `on_sigbus`, the only handler ever passed, is made for being called at any time.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
    result == 0
}

/// Sends SIGBUS to this thread; it arrives when the handler returns.
fn resend() {
    // SAFETY: getpid has no effects.
    let process = unsafe { libc::getpid() };
    // SAFETY: gettid has no effects.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) };
    // SAFETY: signals this thread only, which is where the signal came from.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGBUS) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::sync::{Arc, Barrier};

    use super::super::{FrontendAddress, GuestAddress, MemoryMap, Region, RegionSpec, guest_file};
    use super::*;

    const PAGE: u64 = 0x1000;

    fn region(file: &OwnedFd, pages: u64) -> Region {
        let spec = RegionSpec {
            guest: GuestAddress(0),
            frontend: FrontendAddress(0),
            len_bytes: pages * PAGE,
            file_offset_bytes: 0,
        };
        Region::map(spec, file.as_fd()).expect("map")
    }

    fn byte(region: &Region, page: u64) -> u8 {
        let mut byte = [0xee];
        assert_eq!(region.bytes().read((page * PAGE + 7) as usize, &mut byte), 1);
        byte[0]
    }

    fn fill(region: &Region) {
        region.bytes().write(0, &vec![0x55; region.bytes().len()]);
    }

    #[test]
    fn truncated_file_reads_as_zeros_and_poisons_only_its_region() {
        let (file, other_file) = (guest_file(4 * PAGE), guest_file(PAGE));
        let (shrunk, other) = (region(&file, 4), region(&other_file, 1));
        fill(&shrunk);
        fill(&other);
        rustix::fs::ftruncate(&file, 2 * PAGE).expect("truncate");
        assert_eq!((byte(&shrunk, 1), shrunk.is_poisoned()), (0x55, false));
        assert_eq!((byte(&shrunk, 2), shrunk.is_poisoned()), (0, true));
        // What was cut off can be written, to no effect on the file, and what was not is still the guest's.
        shrunk.bytes().store_u64(3 * PAGE as usize, 1);
        assert_eq!(shrunk.bytes().load_u64(3 * PAGE as usize), 1);
        assert_eq!(byte(&shrunk, 0), 0x55);
        assert_eq!((byte(&other, 0), other.is_poisoned()), (0x55, false));
        assert!(MemoryMap::new(vec![Arc::new(shrunk)]).expect("map").is_poisoned());
        assert!(!MemoryMap::new(vec![Arc::new(other)]).expect("map").is_poisoned());
    }

    #[test]
    fn slot_of_a_poisoned_region_starts_clean_when_it_is_used_again() {
        for _ in 0..3 {
            let file = guest_file(PAGE);
            let shrunk = region(&file, 1);
            assert!(!shrunk.is_poisoned());
            rustix::fs::ftruncate(&file, 0).expect("truncate");
            assert_eq!(byte(&shrunk, 0), 0);
            assert!(shrunk.is_poisoned());
        }
    }

    #[test]
    fn threads_that_fault_at_once_all_survive() {
        const THREADS: usize = 4;
        const PAGES: u64 = 64;
        let file = guest_file(PAGES * PAGE);
        let shrunk = region(&file, PAGES);
        fill(&shrunk);
        rustix::fs::ftruncate(&file, 0).expect("truncate");
        let barrier = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    barrier.wait();
                    assert!((0..PAGES).all(|page| byte(&shrunk, page) == 0));
                });
            }
        });
        assert!(shrunk.is_poisoned());
    }

    #[test]
    fn faults_find_their_region_while_others_come_and_go() {
        let running = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while running.load(Ordering::Relaxed) {
                    let file = guest_file(PAGE);
                    let other = region(&file, 1);
                    fill(&other);
                    assert!(!other.is_poisoned());
                }
            });
            for _ in 0..500 {
                let file = guest_file(2 * PAGE);
                let shrunk = region(&file, 2);
                rustix::fs::ftruncate(&file, PAGE).expect("truncate");
                assert_eq!(byte(&shrunk, 1), 0);
                assert!(shrunk.is_poisoned());
            }
            running.store(false, Ordering::Relaxed);
        });
    }

    /// Runs the test `name` of this file in a process of its own, in which `CHILD` is set.
    fn signal_that_ends(name: &str) -> Option<i32> {
        let (_crate, module) = module_path!().split_once("::").expect("a path in this crate");
        let program = std::env::current_exe().expect("this test program");
        let test = format!("{module}::{name}");
        let output = Command::new(program)
            .args(["--exact", &test])
            .env(CHILD, "1")
            .output()
            .expect("run it");
        output.status.signal()
    }

    const CHILD: &str = "OUTBOARD_TEST_CHILD";

    fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    #[test]
    fn fault_at_another_address_ends_the_process() {
        if !is_child() {
            let ended = signal_that_ends("fault_at_another_address_ends_the_process");
            assert_eq!(ended, Some(libc::SIGBUS));
            return;
        }
        let file = guest_file(PAGE);
        let known = region(&file, 1);
        drop(known);
        let flags = rustix::mm::MapFlags::SHARED;
        // SAFETY: a new mapping at an address of the kernel's choice, beyond the file's end, to be touched below.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                4096,
                rustix::mm::ProtFlags::READ,
                flags,
                &file,
                PAGE,
            )
        };
        let start: *const u8 = start.expect("mmap").cast_const().cast();
        // SAFETY: mapped above; that the file has no such page is what this is about.
        let value = unsafe { start.read_volatile() };
        println!("survived with {value}");
    }

    #[test]
    fn signal_from_a_process_ends_the_process() {
        if !is_child() {
            let ended = signal_that_ends("signal_from_a_process_ends_the_process");
            assert_eq!(ended, Some(libc::SIGBUS));
            return;
        }
        install();
        resend();
    }
}
