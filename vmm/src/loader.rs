//! A kernel's way into memory: bzImage by Linux's 64-bit boot protocol, ELF by PVH.
//!
//! Contract: [`load`] leaves in memory what the kernel finds when it is entered, and says where and how to enter it. Memory
//! is all zeros before. What does not fit or is no kernel is an error that says so. The files may be anything.
//!
//! What it deliberately does not do: unpack, verify, or take kernels that start in real or 32-bit mode only.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::layout::{
    BOOT_LISTS, BOOT_PARAMETERS, COMMAND_LINE, ECAM, HIGH_MEMORY_START, KERNEL, LEGACY_HOLE, RSDP,
};

/// Where the two formats have their names.
const ELF_MAGIC: &[u8] = b"\x7fELF";
const BZIMAGE_MAGIC_AT: u64 = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
/// Linux/x86 boot protocol: XLF_KERNEL_64, and where that entry is.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// The protocol from which on `init_size` and `xloadflags` are there (Linux 3.8).
const PROTOCOL_MIN: u16 = 0x020C;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Where an initial RAM disk begins: at a page.
const PAGE: u64 = 0x1000;
/// PVH: the version of the structure that has a memory map.
const START_INFO_VERSION: u32 = 1;
/// PVH puts no limit on the command line; Linux's own is this (`COMMAND_LINE_SIZE`).
const PVH_COMMAND_LINE_MAX: u32 = 2048;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 64-bit mode, with the zero page's address in `rsi`.
    Linux64(u64),
    /// In protected mode without paging, with the start info's address in `ebx`.
    Pvh(u64),
}

/// What is to be loaded.
#[derive(Debug)]
pub(crate) struct Images<'a> {
    pub(crate) kernel: &'a File,
    pub(crate) initrd: Option<&'a File>,
    pub(crate) command_line: &'a str,
}

/// Why there is no kernel in memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read the kernel")]
    ReadKernel(#[source] io::Error),
    #[error("the kernel is no bzImage and no ELF file; it begins with {0:02x?}")]
    NoKernel(Vec<u8>),
    #[error(
        "the kernel speaks boot protocol {version:#x} with flags {flags:#x}: it has no 64-bit entry"
    )]
    No64Bit { version: u16, flags: u16 },
    #[error("the kernel is an ELF file without a PVH entry (CONFIG_PVH)")]
    NoPvh,
    #[error("the kernel cannot be loaded into {memory} bytes of memory")]
    Load { memory: u64, source: linux_loader::loader::Error },
    #[error(
        "too little memory: the kernel takes {needed} bytes, there are {available} below the hole for devices"
    )]
    TooLittleMemory { needed: u64, available: u64 },
    #[error("cannot read the initial RAM disk")]
    ReadInitrd(#[source] io::Error),
    #[error(
        "too little memory: the initial RAM disk has {len} bytes, and there is room for {room}"
    )]
    InitrdTooLarge { len: u64, room: u64 },
    #[error("the command line has {len} bytes, and the kernel takes {max}")]
    CommandLineTooLong { len: usize, max: u32 },
    #[error("the command line has a zero byte")]
    CommandLineZero,
    #[error("cannot write what the kernel is told")]
    Write(#[from] GuestMemoryError),
}

/// Where a kernel is, and what it needs to be told.
struct Loaded {
    entry: Entry,
    /// The first address that the kernel does not use before it reads the memory map.
    end: u64,
    /// The last address that an initial RAM disk may have.
    initrd_last: u64,
    command_line_max: u32,
    header: Option<setup_header>,
}

/// A place in memory.
#[derive(Clone, Copy)]
struct Extent {
    start: u64,
    len: u64,
}

/// Loads all of it.
pub(crate) fn load(memory: &GuestMemoryMmap, images: &Images<'_>) -> Result<Entry, Error> {
    let loaded = load_kernel(memory, images.kernel)?;
    let available = low_end(memory);
    if loaded.end > available {
        return Err(Error::TooLittleMemory { needed: loaded.end, available });
    }
    let initrd = match images.initrd {
        Some(file) => Some(load_initrd(memory, file, &loaded)?),
        None => None,
    };
    write_command_line(memory, images.command_line, loaded.command_line_max)?;
    match loaded.header {
        Some(header) => write_zero_page(memory, header, initrd)?,
        None => write_start_info(memory, initrd)?,
    }
    Ok(loaded.entry)
}

fn load_kernel(memory: &GuestMemoryMmap, mut kernel: &File) -> Result<Loaded, Error> {
    let mut start = [0; ELF_MAGIC.len()];
    let mut name = [0; BZIMAGE_MAGIC.len()];
    // A file that is too short for a name has none.
    read_at(kernel, 0, &mut start).map_err(Error::ReadKernel)?;
    read_at(kernel, BZIMAGE_MAGIC_AT, &mut name).map_err(Error::ReadKernel)?;
    kernel.rewind().map_err(Error::ReadKernel)?;
    if start == ELF_MAGIC {
        load_elf(memory, kernel)
    } else if name == BZIMAGE_MAGIC {
        load_bzimage(memory, kernel)
    } else {
        Err(Error::NoKernel(start.to_vec()))
    }
}

fn load_elf(memory: &GuestMemoryMmap, kernel: &File) -> Result<Loaded, Error> {
    let mut kernel = kernel;
    let result = Elf::load(memory, None, &mut kernel, Some(GuestAddress(KERNEL)))
        .map_err(|source| Error::Load { memory: len_of(memory), source })?;
    let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap else {
        return Err(Error::NoPvh);
    };
    Ok(Loaded {
        entry: Entry::Pvh(entry.0),
        end: result.kernel_end,
        initrd_last: u64::from(u32::MAX),
        command_line_max: PVH_COMMAND_LINE_MAX,
        header: None,
    })
}

fn load_bzimage(memory: &GuestMemoryMmap, kernel: &File) -> Result<Loaded, Error> {
    let mut kernel = kernel;
    let result = BzImage::load(memory, Some(GuestAddress(KERNEL)), &mut kernel, None)
        .map_err(|source| Error::Load { memory: len_of(memory), source })?;
    let header = result.setup_header.unwrap_or_default();
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_MIN || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64Bit { version, flags });
    }
    // The kernel unpacks itself to where it wants to be, or above where it is.
    let start = KERNEL.max(header.pref_address);
    let unpacked = start.saturating_add(u64::from(header.init_size));
    Ok(Loaded {
        entry: Entry::Linux64(KERNEL.saturating_add(ENTRY_64)),
        end: unpacked.max(result.kernel_end),
        initrd_last: u64::from(header.initrd_addr_max),
        command_line_max: header.cmdline_size,
        header: Some(header),
    })
}

/// Puts the initial RAM disk as high as the kernel allows, so that it is in nobody's way.
fn load_initrd(
    memory: &GuestMemoryMmap,
    mut file: &File,
    kernel: &Loaded,
) -> Result<Extent, Error> {
    let len = file.seek(SeekFrom::End(0)).map_err(Error::ReadInitrd)?;
    file.rewind().map_err(Error::ReadInitrd)?;
    let top = low_end(memory).min(kernel.initrd_last.saturating_add(1));
    let room = top.saturating_sub(kernel.end);
    let start = match top.checked_sub(len) {
        Some(start) => start & !PAGE.wrapping_sub(1),
        None => return Err(Error::InitrdTooLarge { len, room }),
    };
    if start < kernel.end {
        return Err(Error::InitrdTooLarge { len, room });
    }
    let len_here = usize::try_from(len).unwrap_or(usize::MAX);
    memory.read_exact_volatile_from(GuestAddress(start), &mut file, len_here)?;
    Ok(Extent { start, len })
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str, max: u32) -> Result<(), Error> {
    let room = COMMAND_LINE.end.saturating_sub(COMMAND_LINE.start).saturating_sub(1);
    let max = max.min(u32::try_from(room).unwrap_or(u32::MAX));
    if line.contains('\0') {
        return Err(Error::CommandLineZero);
    }
    if u32::try_from(line.len()).is_ok_and(|len| len <= max) {
        // The final zero is there already.
        Ok(memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE.start))?)
    } else {
        Err(Error::CommandLineTooLong { len: line.len(), max })
    }
}

/// Linux/x86 boot protocol, "The Linux/x86 Boot Protocol", "64-bit Boot Protocol".
fn write_zero_page(
    memory: &GuestMemoryMmap,
    header: setup_header,
    initrd: Option<Extent>,
) -> Result<(), Error> {
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: RSDP, ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low_32(COMMAND_LINE.start);
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = low_32(initrd.start);
        page.hdr.ramdisk_size = low_32(initrd.len);
    }
    let map = memory_map(memory);
    page.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    let mut table = page.e820_table;
    for (slot, (place, is_memory)) in table.iter_mut().zip(map) {
        let kind = if is_memory { E820_RAM } else { E820_RESERVED };
        *slot = boot_e820_entry { addr: place.start, size: place.len, r#type: kind };
    }
    page.e820_table = table;
    Ok(memory.write_obj(page, GuestAddress(BOOT_PARAMETERS))?)
}

/// Xen's `arch-x86/hvm/start_info.h`.
fn write_start_info(memory: &GuestMemoryMmap, initrd: Option<Extent>) -> Result<(), Error> {
    let mut at = BOOT_LISTS;
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: START_INFO_VERSION,
        cmdline_paddr: COMMAND_LINE.start,
        rsdp_paddr: RSDP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module =
            hvm_modlist_entry { paddr: initrd.start, size: initrd.len, ..Default::default() };
        memory.write_obj(module, GuestAddress(at))?;
        info.nr_modules = 1;
        info.modlist_paddr = at;
        at = at.saturating_add(size_of::<hvm_modlist_entry>() as u64);
    }
    info.memmap_paddr = at;
    for (place, is_memory) in memory_map(memory) {
        let kind = if is_memory { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_RESERVED };
        let entry =
            hvm_memmap_table_entry { addr: place.start, size: place.len, type_: kind, reserved: 0 };
        memory.write_obj(entry, GuestAddress(at))?;
        at = at.saturating_add(size_of::<hvm_memmap_table_entry>() as u64);
        info.memmap_entries = info.memmap_entries.saturating_add(1);
    }
    Ok(memory.write_obj(info, GuestAddress(BOOT_PARAMETERS))?)
}

/// What is memory, and what is reserved.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(Extent, bool)> {
    let extent = |start: u64, end: u64| Extent { start, len: end.saturating_sub(start) };
    let mut map = vec![
        (extent(0, LEGACY_HOLE.start), true),
        (extent(LEGACY_HOLE.start, LEGACY_HOLE.end), false),
        (extent(LEGACY_HOLE.end, low_end(memory)), true),
        (extent(ECAM.start, ECAM.end), false),
    ];
    for region in memory.iter().filter(|region| region.start_addr().0 >= HIGH_MEMORY_START) {
        map.push((Extent { start: region.start_addr().0, len: region.len() }, true));
    }
    map
}

/// Where the memory below the hole for devices ends.
fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

fn len_of(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().fold(0, |len, region| region.len().saturating_add(len))
}

/// An address or a length below 4 GiB, as all of low memory is.
fn low_32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Reads as much as there is.
fn read_at(mut file: &File, at: u64, bytes: &mut [u8]) -> io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    match file.read_exact(bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other,
    }
}
