//! Kernels that are none, too large or half there, and what a sound one is told.

use std::fs::File;
use std::io::Write;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any};
use proptest::proptest;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{BZIMAGE_MAGIC_AT, Entry, Error, Images, PAGE, load};
use crate::layout::{
    BOOT_PARAMETERS, COMMAND_LINE, ECAM, HIGH_MEMORY_START, KERNEL, LEGACY_HOLE, RSDP,
};

const LOW: u64 = 16 << 20;
const HIGH: u64 = 2 << 20;
const COMMAND: &str = "console=hvc0";
/// Where the header of a bzImage begins, and how much of the file is in front of the kernel.
const HEADER_AT: usize = 0x1F1;
const SETUP_BYTES: usize = 2 * 512;
/// What a sound kernel needs for itself, from [`KERNEL`] on.
const INIT_BYTES: u32 = 4 << 20;
const PVH_ENTRY: u32 = 0x10_0040;
const SEGMENT: [u8; 3] = *b"elf";

fn memory() -> GuestMemoryMmap {
    let ranges =
        [(GuestAddress(0), LOW as usize), (GuestAddress(HIGH_MEMORY_START), HIGH as usize)];
    GuestMemoryMmap::from_ranges(&ranges).expect("memory")
}

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(content).expect("written");
    file
}

fn load_with(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
) -> Result<Entry, Error> {
    let (kernel, initrd) = (file(kernel), initrd.map(file));
    load(memory, &Images { kernel: &kernel, initrd: initrd.as_ref(), command_line })
}

fn sound_header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xAA55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020F,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7FFF_FFFF,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: KERNEL,
        init_size: INIT_BYTES,
        ..Default::default()
    }
}

fn bzimage(header: setup_header) -> Vec<u8> {
    let mut image = vec![0; SETUP_BYTES];
    let bytes = header.as_slice();
    image[HEADER_AT..HEADER_AT + bytes.len()].copy_from_slice(bytes);
    image.extend(b"kernel");
    image
}

/// An ELF file of one segment at [`KERNEL`], and of a note that is called so.
fn elf(note: &[u8; 4]) -> Vec<u8> {
    let (headers, note_len) = (64 + 2 * 56_u64, 12 + 4 + 4_u64);
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // Type, machine, version, entry, program headers, section headers, flags, sizes and counts.
    for half in [2_u16, 62, 1, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [KERNEL, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [0_u16, 0, 64, 56, 2, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    // Program headers: type and flags; offset, both addresses, size in the file and in memory, alignment.
    for (kind, offset, len) in [(1_u64, headers + note_len, 3), (4, headers, note_len)] {
        for word in [kind, offset, KERNEL, KERNEL, len, len, 4] {
            image.extend(word.to_le_bytes());
        }
    }
    for word in [4_u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(note);
    image.extend(PVH_ENTRY.to_le_bytes());
    image.extend(SEGMENT);
    image
}

fn text_at(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut text = vec![0; len];
    memory.read_slice(&mut text, GuestAddress(at)).expect("read");
    text
}

#[test]
fn files_that_are_no_kernels_are_refused() {
    let arm = [&[0; 56][..], b"ARM\x64"].concat();
    for content in [&b""[..], b"\x7f", b"#!/bin/sh\n", &[0; 4096], &arm] {
        let error = load_with(&memory(), content, None, "").expect_err("no kernel");
        assert!(matches!(error, Error::NoKernel(_)), "{content:02x?}: {error}");
    }
    for content in [&b"\x7fELF"[..], &elf(b"Xen\0")[..100]] {
        let error = load_with(&memory(), content, None, "").expect_err("half a kernel");
        assert!(matches!(error, Error::Load { .. }), "{error}");
    }
}

#[test]
fn kernels_without_an_entry_of_ours_are_refused() {
    let old = setup_header { version: 0x0209, ..sound_header() };
    let short = setup_header { xloadflags: 0, ..sound_header() };
    for header in [old, short] {
        let error = load_with(&memory(), &bzimage(header), None, "").expect_err("32 bits");
        assert!(matches!(error, Error::No64Bit { .. }), "{error}");
    }
    let error = load_with(&memory(), &elf(b"GNU\0"), None, "").expect_err("no PVH");
    assert!(matches!(error, Error::NoPvh), "{error}");
}

#[test]
fn bzimage_finds_its_zero_page() {
    let memory = memory();
    let initrd = [7; 5000];
    let entry = load_with(&memory, &bzimage(sound_header()), Some(&initrd), COMMAND);
    assert_eq!(entry.expect("loaded"), Entry::Linux64(KERNEL + 0x200));
    assert_eq!(text_at(&memory, KERNEL, 6), b"kernel");
    assert_eq!(text_at(&memory, COMMAND_LINE.start, COMMAND.len()), COMMAND.as_bytes());
    let page: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMETERS)).expect("read");
    let (rsdp, header) = (page.acpi_rsdp_addr, page.hdr);
    assert_eq!(rsdp, RSDP);
    let (start, len, line) = (header.ramdisk_image, header.ramdisk_size, header.cmd_line_ptr);
    assert_eq!(u64::from(line), COMMAND_LINE.start);
    assert_eq!((u64::from(start), len), (LOW - 2 * PAGE, 5000));
    assert_eq!(text_at(&memory, LOW - 2 * PAGE, 5000), initrd);
    let count = usize::from(page.e820_entries);
    let table = page.e820_table;
    let map = table[..count].iter().map(|entry| (entry.addr, entry.size, entry.r#type));
    let expected = [
        (0, LEGACY_HOLE.start, 1),
        (LEGACY_HOLE.start, LEGACY_HOLE.end - LEGACY_HOLE.start, 2),
        (LEGACY_HOLE.end, LOW - LEGACY_HOLE.end, 1),
        (ECAM.start, ECAM.end - ECAM.start, 2),
        (HIGH_MEMORY_START, HIGH, 1),
    ];
    assert_eq!(map.collect::<Vec<_>>(), expected);
}

#[test]
fn elf_finds_its_start_info() {
    let memory = memory();
    let entry = load_with(&memory, &elf(b"Xen\0"), Some(b"disk"), COMMAND).expect("loaded");
    assert_eq!(entry, Entry::Pvh(PVH_ENTRY.into()));
    assert_eq!(text_at(&memory, KERNEL, 3), SEGMENT);
    let info: hvm_start_info = memory.read_obj(GuestAddress(BOOT_PARAMETERS)).expect("read");
    assert_eq!((info.magic, info.version), (XEN_HVM_START_MAGIC_VALUE, 1));
    assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (RSDP, COMMAND_LINE.start));
    assert_eq!((info.nr_modules, info.memmap_entries), (1, 5));
    let module: hvm_modlist_entry =
        memory.read_obj(GuestAddress(info.modlist_paddr)).expect("read");
    assert_eq!((module.paddr, module.size), (LOW - PAGE, 4));
    let last = info.memmap_paddr + 4 * size_of::<hvm_memmap_table_entry>() as u64;
    let last: hvm_memmap_table_entry = memory.read_obj(GuestAddress(last)).expect("read");
    assert_eq!((last.addr, last.size, last.type_), (HIGH_MEMORY_START, HIGH, 1));
}

#[test]
fn too_little_memory_is_said_with_numbers() {
    let greedy = setup_header { init_size: LOW as u32, ..sound_header() };
    let error = load_with(&memory(), &bzimage(greedy), None, "").expect_err("too large");
    assert!(
        matches!(error, Error::TooLittleMemory { needed, available } if needed == KERNEL + LOW && available == LOW),
        "{error}"
    );
    // What is left between the kernel and the end of memory, exactly, and a byte more.
    let room = LOW - KERNEL - u64::from(INIT_BYTES);
    let mut initrd = vec![1; room as usize];
    let kernel = bzimage(sound_header());
    load_with(&memory(), &kernel, Some(&initrd), "").expect("it fits");
    initrd.push(1);
    let error = load_with(&memory(), &kernel, Some(&initrd), "").expect_err("too large");
    assert!(
        matches!(error, Error::InitrdTooLarge { len, room: left } if len == room + 1 && left == room),
        "{error}"
    );
}

#[test]
fn initial_ram_disk_is_where_the_kernel_can_reach_it() {
    let memory = memory();
    let last = (8 << 20) - 1;
    let header = setup_header { initrd_addr_max: last, ..sound_header() };
    load_with(&memory, &bzimage(header), Some(b"disk"), "").expect("loaded");
    let page: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMETERS)).expect("read");
    let start = page.hdr.ramdisk_image;
    assert_eq!(u64::from(start), u64::from(last) + 1 - PAGE);
}

#[test]
fn command_line_is_as_long_as_the_kernel_takes() {
    let kernel = bzimage(sound_header());
    load_with(&memory(), &kernel, None, &"x".repeat(2047)).expect("it fits");
    let error = load_with(&memory(), &kernel, None, &"x".repeat(2048)).expect_err("too long");
    assert!(matches!(error, Error::CommandLineTooLong { len: 2048, max: 2047 }), "{error}");
    let error = load_with(&memory(), &kernel, None, "a\0b").expect_err("no text");
    assert!(matches!(error, Error::CommandLineZero), "{error}");
    // A kernel that takes any length gets what there is room for.
    let generous = bzimage(setup_header { cmdline_size: u32::MAX, ..sound_header() });
    assert!(load_with(&memory(), &generous, None, &"x".repeat(1 << 16)).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_damage_to_a_kernel_is_an_error_or_another_kernel(
        is_elf in any::<bool>(),
        damage in vec((0..256_usize, any::<u8>()), 1..12),
    ) {
        let mut image = if is_elf { elf(b"Xen\0") } else { bzimage(sound_header()) };
        let first = if is_elf { 0 } else { BZIMAGE_MAGIC_AT as usize - 17 };
        let len = image.len();
        for (at, byte) in damage {
            image[(first + at) % len] = byte;
        }
        let _ = load_with(&memory(), &image, Some(b"disk"), COMMAND);
    }
}
