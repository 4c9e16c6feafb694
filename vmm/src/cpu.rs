//! What a processor is, and what it has in its registers when it starts.
//!
//! Contract: [`describe`] makes the CPUID leaves of one of `count` processors out of those that KVM supports. [`PowerOn`] is
//! the state of a new one, to which a reset returns it. [`enter`] has the first processor enter a kernel; the others wait
//! for it to start them, as KVM has them from the beginning.
//!
//! What it deliberately does not do: hide or pretend features. The guest sees the host's, as far as KVM has them.

use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_fpu, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{BOOT_PARAMETERS, GDT, PAGE_TABLES};
use crate::loader::Entry;
use crate::memory::errno;

/// CPUID: features, cache topology (Intel), extended topology, its successor, AMD's sizes and topology.
const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const TOPOLOGY: u32 = 0xB;
const TOPOLOGY_V2: u32 = 0x1F;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001E;
/// `FEATURES.ecx`: the timer that needs no calibration, which KVM has whatever it says of the host; and "this is a guest".
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// `FEATURES.edx`: the number of logical processors is given.
const HYPER_THREADING: u32 = 1 << 28;
/// `TOPOLOGY.ecx`: kinds of levels.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

const MSR_TSC: u32 = 0x10;
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2FF;
/// MTRRs are on, and all that none names is write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The only bit that is always set.
const RFLAGS: u64 = 2;
/// Page table entries: present and writable, and a large page.
const PAGE_TABLE: u64 = 3;
const PAGE_LARGE: u64 = 0x83;
const LARGE_PAGE: u64 = 2 << 20;
/// How much is mapped before the kernel maps its own: all that has addresses of 32 bits.
const MAPPED_GIB: u64 = 4;
/// Linux/x86 boot protocol: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Why a processor cannot be made or set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("KVM refuses {action} of processor {index}")]
    Kvm { action: &'static str, index: u8, source: io::Error },
    #[error("cannot write page tables")]
    Memory(#[from] GuestMemoryError),
}

/// The CPUID leaves of processor `index` of `count`, each of them a core of the same package.
pub(crate) fn describe(supported: &CpuId, index: u8, count: u8) -> Option<CpuId> {
    let (id, count) = (u32::from(index), u32::from(count));
    let id_bits = u32::BITS - (count - 1).leading_zeros();
    let mut entries = Vec::new();
    for mut entry in supported.as_slice().iter().copied() {
        match entry.function {
            FEATURES => {
                entry.ebx = entry.ebx & 0xFFFF | count << 16 | id << 24;
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx &= !HYPER_THREADING;
                entry.edx |= if count > 1 { HYPER_THREADING } else { 0 };
            }
            // How many share a cache and how many cores there are: each core has its own.
            CACHES if entry.eax & 0x1F != 0 => {
                entry.eax = entry.eax & 0x3FFF | ((1 << id_bits) - 1) << 26;
            }
            AMD_SIZES => entry.ecx = entry.ecx & !0xF0FF | (count - 1) | id_bits << 12,
            AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            TOPOLOGY | TOPOLOGY_V2 => continue,
            _ => {}
        }
        entries.push(entry);
    }
    for (level, kind, shift, members) in [(0, LEVEL_THREAD, 0, 1), (1, LEVEL_CORE, id_bits, count)]
    {
        entries.push(kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index: level,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: members,
            ecx: kind | level,
            edx: id,
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).ok()
}

/// What KVM supports on this host.
pub(crate) fn supported(kvm: &Kvm) -> io::Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(errno)
}

/// The state of a processor that has just been switched on.
pub(crate) struct PowerOn {
    index: u8,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: Option<kvm_xcrs>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOn {
    /// Takes the state of a processor that has not run. `msrs` are those that KVM has.
    pub(crate) fn of(vcpu: &VcpuFd, index: u8, msrs: &[u32]) -> Result<Self, Error> {
        let failed = |action| move |error| Error::Kvm { action, index, source: errno(error) };
        let mut state = Self {
            index,
            mp_state: vcpu.get_mp_state().map_err(failed("to tell the run state"))?,
            regs: vcpu.get_regs().map_err(failed("to tell the registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("to tell the system registers"))?,
            fpu: vcpu.get_fpu().map_err(failed("to tell the floating point state"))?,
            // A host without XSAVE has none.
            xcrs: vcpu.get_xcrs().ok(),
            lapic: vcpu.get_lapic().map_err(failed("to tell the APIC's state"))?,
            events: vcpu.get_vcpu_events().map_err(failed("to tell the events"))?,
            debug: vcpu.get_debug_regs().map_err(failed("to tell the debug registers"))?,
            msrs: msrs.iter().filter_map(|&index| read_msr(vcpu, index)).collect(),
        };
        for msr in &mut state.msrs {
            match msr.index {
                // All processors start to count at the same time: KVM takes writes of the same value as one.
                MSR_TSC => msr.data = 0,
                MSR_MISC_ENABLE => msr.data |= MISC_ENABLE_FAST_STRING,
                MSR_MTRR_DEFAULT => msr.data = MTRR_WRITE_BACK,
                _ => {}
            }
        }
        Ok(state)
    }

    /// Puts a processor that does not run back into this state.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let index = self.index;
        let failed = |action| move |error| Error::Kvm { action, index, source: errno(error) };
        vcpu.set_mp_state(self.mp_state).map_err(failed("the run state"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("the system registers"))?;
        vcpu.set_regs(&self.regs).map_err(failed("the registers"))?;
        vcpu.set_fpu(&self.fpu).map_err(failed("the floating point state"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(failed("the extended control registers"))?;
        }
        vcpu.set_debug_regs(&self.debug).map_err(failed("the debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("the APIC's state"))?;
        for msr in &self.msrs {
            write_msr(vcpu, *msr);
        }
        vcpu.set_vcpu_events(&self.events).map_err(failed("the events"))
    }
}

fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<kvm_msr_entry> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let count = vcpu.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| count == 1).copied()
}

/// Some registers can be read and not be written, as what they were anyway: KVM says how many it has taken.
fn write_msr(vcpu: &VcpuFd, msr: kvm_msr_entry) {
    let taken = Msrs::from_entries(&[msr]).is_ok_and(|one| vcpu.set_msrs(&one) == Ok(1));
    if !taken {
        tracing::debug!("KVM keeps its own value of MSR {:#x}", msr.index);
    }
}

/// Has the first processor, which has just been switched on, enter a kernel.
pub(crate) fn enter(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: Entry) -> Result<(), Error> {
    let failed = |action| move |error| Error::Kvm { action, index: 0, source: errno(error) };
    let mut sregs = vcpu.get_sregs().map_err(failed("to tell the system registers"))?;
    let (rip, is_long) = match entry {
        Entry::Linux64(rip) => (rip, true),
        Entry::Pvh(rip) => (rip, false),
    };
    write_descriptors(memory, is_long)?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = TASK_SELECTOR + 15;
    sregs.cs = segment(CODE_SELECTOR, 0xB, is_long);
    let data = segment(DATA_SELECTOR, 0x3, false);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: TASK_SELECTOR,
        limit: 0x67,
        type_: 0xB,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION;
    if is_long {
        sregs.cr3 = write_page_tables(memory)?;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PAGING;
        sregs.efer = EFER_LONG_MODE;
    }
    let mut regs = kvm_regs { rip, rflags: RFLAGS, ..Default::default() };
    if is_long {
        regs.rsi = BOOT_PARAMETERS;
    } else {
        regs.rbx = BOOT_PARAMETERS;
    }
    vcpu.set_sregs(&sregs).map_err(failed("the system registers"))?;
    vcpu.set_regs(&regs).map_err(failed("the registers"))
}

/// A segment of all addresses: code or data, by its type.
fn segment(selector: u16, type_: u8, is_long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!is_long),
        s: 1,
        l: u8::from(is_long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The same segments as a table, for a kernel that loads them anew.
fn write_descriptors(memory: &GuestMemoryMmap, is_long: bool) -> Result<(), GuestMemoryError> {
    // From the highest bits: base, flags (granularity, 32 or 64 bits), limit, access, base, limit.
    let code: u64 = if is_long { 0x00AF_9B00_0000_FFFF } else { 0x00CF_9B00_0000_FFFF };
    let data: u64 = 0x00CF_9300_0000_FFFF;
    let task: u64 = 0x0000_8B00_0000_0067;
    for (selector, descriptor) in
        [(CODE_SELECTOR, code), (DATA_SELECTOR, data), (TASK_SELECTOR, task)]
    {
        memory.write_obj(descriptor, GuestAddress(GDT + u64::from(selector)))?;
    }
    Ok(())
}

/// Maps the addresses of 32 bits to themselves in large pages; returns where the tables begin.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<u64, GuestMemoryError> {
    const TABLE: u64 = 0x1000;
    const ENTRIES: u64 = 512;
    let top = PAGE_TABLES.start;
    let gibs = top + TABLE;
    memory.write_obj(gibs | PAGE_TABLE, GuestAddress(top))?;
    for gib in 0..MAPPED_GIB {
        let pages = gibs + TABLE * (1 + gib);
        memory.write_obj(pages | PAGE_TABLE, GuestAddress(gibs + 8 * gib))?;
        for page in 0..ENTRIES {
            let address = (gib * ENTRIES + page) * LARGE_PAGE;
            memory.write_obj(address | PAGE_LARGE, GuestAddress(pages + 8 * page))?;
        }
    }
    Ok(top)
}
