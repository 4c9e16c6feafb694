//! What opens as a disk, what does not, and what the operator is told.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::device::Refreshed;
use rustix::fs::{Mode, OFlags, SeekFrom};

use super::{
    CacheMode, Disk, DiskSpec, IMAGE, LockError, OpenError, OpenOptions, SpecError, open_again,
    sync_file,
};

const WRITABLE: OpenOptions = OpenOptions {
    read_only: false,
    lock: true,
    cache: CacheMode::Writeback,
    queue_count: 2,
    logical_block_bytes: None,
};
const READ_ONLY: OpenOptions = OpenOptions { read_only: true, ..WRITABLE };
const DIRECT: OpenOptions = OpenOptions { cache: CacheMode::None, ..WRITABLE };

fn file_of(directory: &tempfile::TempDir, len_bytes: u64) -> DiskSpec {
    let path = directory.path().join("disk.img");
    File::create(&path).unwrap().set_len(len_bytes).unwrap();
    DiskSpec::File(path)
}

#[test]
fn specs_parse() {
    assert_eq!("file:/a:b c".parse(), Ok(DiskSpec::File("/a:b c".into())));
    for (size, len_bytes) in [
        ("512", 512),
        ("1k", 1024),
        ("1K", 1024),
        ("2M", 2 << 20),
        ("3G", 3 << 30),
        ("4T", 4 << 40),
    ] {
        assert_eq!(format!("null:{size}").parse(), Ok(DiskSpec::Null { len_bytes }), "{size}");
    }
}

#[test]
fn specs_that_are_no_disk_are_refused() {
    for spec in ["", "disk.img", "/dev/sda", "nbd:x", "File:x", "null", ":"] {
        assert_eq!(spec.parse::<DiskSpec>(), Err(SpecError::Kind(spec.to_owned())));
    }
    assert_eq!("file:".parse::<DiskSpec>(), Err(SpecError::NoPath));
    for size in [
        "",
        "G",
        "-1",
        "+512",
        "1.5G",
        "0x200",
        "1 G",
        "1g",
        "1KiB",
        "1GG",
        "8388608T",
        "99999999999999999999",
    ] {
        let expected = Err(SpecError::Size(size.to_owned()));
        assert_eq!(format!("null:{size}").parse::<DiskSpec>(), expected, "{size}");
    }
    for (size, len_bytes) in [("0", 0), ("0G", 0), ("511", 511), ("513", 513)] {
        assert_eq!(format!("null:{size}").parse::<DiskSpec>(), Err(SpecError::Sectors(len_bytes)));
    }
}

#[test]
fn file_is_a_disk_of_its_whole_sectors() {
    let directory = tempfile::tempdir().unwrap();
    for (len_bytes, sectors) in [(512, 1), (1023, 1), (1024, 2), ((1 << 20) + 511, 2048)] {
        let disk = Disk::open(&file_of(&directory, len_bytes), WRITABLE).unwrap();
        assert_eq!(disk.capacity_sectors(), sectors, "{len_bytes}");
        assert!(disk.file().is_some() && !disk.read_only());
    }
}

#[test]
fn file_shorter_than_a_sector_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    for len_bytes in [0, 511] {
        let refused = Disk::open(&file_of(&directory, len_bytes), WRITABLE);
        assert!(
            matches!(refused, Err(OpenError::TooSmall { len_bytes: told, .. }) if told == len_bytes)
        );
    }
}

#[test]
fn null_disk_has_a_capacity_and_no_file() {
    let disk = Disk::open(&DiskSpec::Null { len_bytes: 1 << 30 }, READ_ONLY).unwrap();
    assert_eq!(disk.capacity_sectors(), 1 << 21);
    assert!(disk.file().is_none() && disk.read_only());
}

#[test]
fn read_only_disk_is_opened_for_reading_only() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::open(&file_of(&directory, 4096), READ_ONLY).unwrap();
    let written = rustix::io::pwrite(disk.file().unwrap(), b"x", 0);
    assert_eq!(written, Err(rustix::io::Errno::BADF));
    assert!(disk.read_only());
}

/// Whether a descriptor of ours is open for direct I/O, as the kernel shows it.
fn is_direct(descriptor: BorrowedFd<'_>) -> bool {
    let flags = rustix::fs::fcntl_getfl(descriptor).unwrap();
    flags.contains(OFlags::DIRECT)
}

#[test]
fn operations_have_descriptions_of_one_file_of_which_direct_io_is_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, 1 << 20);
    for cache in [CacheMode::None, CacheMode::Directsync] {
        for read_only in [false, true] {
            let disk = match Disk::open(&spec, OpenOptions { cache, read_only, ..WRITABLE }) {
                Ok(disk) => disk,
                Err(OpenError::NoDirectIo { .. }) => {
                    return eprintln!(
                        "not run: the file system of {directory:?} has no direct I/O"
                    );
                }
                Err(error) => panic!("{error}"),
            };
            let files = disk.files();
            let direct: Vec<bool> = files.iter().copied().map(is_direct).collect();
            assert_eq!(direct, [true, false, false, false], "two queues");
            let inode = |file: &BorrowedFd<'_>| rustix::fs::fstat(file).unwrap().st_ino;
            assert!(files.iter().all(|file| inode(file) == inode(&files[0])));
            assert!(disk.direct().is_some());
        }
    }
    for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe] {
        let disk = Disk::open(&spec, OpenOptions { cache, ..WRITABLE }).unwrap();
        assert!(!disk.files().into_iter().any(is_direct));
        assert_eq!(disk.direct(), None);
    }
}

#[test]
fn each_queue_has_a_description_of_its_own_to_sync() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, 1 << 20);
    let disk = Disk::open(&spec, OpenOptions { queue_count: 3, ..WRITABLE }).unwrap();
    let files = disk.files();
    // What is done to the offset of one description is not seen on another.
    let syncs: Vec<_> = (0..3).map(|queue| files[sync_file(queue).0 as usize]).collect();
    for (at, file) in (1..).zip(&syncs) {
        rustix::fs::seek(file, SeekFrom::Start(at)).unwrap();
    }
    let offsets = [files[IMAGE.0 as usize]]
        .into_iter()
        .chain(syncs)
        .map(|file| rustix::fs::tell(file).unwrap());
    let end = 1 << 20;
    assert_eq!(offsets.collect::<Vec<_>>(), [end, 1, 2, 3]);
    let disk = Disk::open(&spec, OpenOptions { cache: CacheMode::Unsafe, lock: false, ..WRITABLE });
    assert_eq!(disk.unwrap().files().len(), 2, "nothing is ever synced");
}

#[test]
fn file_that_was_replaced_while_it_was_opened_is_not_mixed_with_the_new_one() {
    let directory = tempfile::tempdir().unwrap();
    let DiskSpec::File(path) = file_of(&directory, 4096) else { unreachable!("it makes files") };
    let before = rustix::fs::stat(&path).unwrap();
    let other = directory.path().join("other.img");
    File::create(&other).unwrap();
    std::fs::rename(&other, &path).unwrap();
    let refused = open_again(&path, &before, false, OFlags::empty()).unwrap_err();
    assert!(matches!(refused, OpenError::Replaced { .. }), "{refused}");
}

#[test]
fn file_system_without_direct_io_is_an_error_that_names_the_option() {
    let spec = DiskSpec::File("/proc/version".into());
    let options = OpenOptions { cache: CacheMode::None, read_only: true, lock: false, ..WRITABLE };
    let refused = Disk::open(&spec, options).unwrap_err();
    assert!(matches!(refused, OpenError::NoDirectIo { .. }), "{refused}");
    assert!(refused.to_string().contains("--cache writeback"), "{refused}");
}

#[test]
fn disk_ends_with_its_last_whole_block() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, (1 << 20) + 4095);
    for (block, sectors) in [(512, 2055), (1024, 2054), (2048, 2052), (4096, 2048)] {
        let options = OpenOptions { logical_block_bytes: Some(block), ..WRITABLE };
        let disk = Disk::open(&spec, options).unwrap();
        assert_eq!(disk.capacity_sectors(), sectors);
        assert_eq!(disk.geometry().logical_block_bytes, block);
        let DiskSpec::File(path) = &spec else { unreachable!("it makes files") };
        let file = File::options().write(true).open(path).unwrap();
        file.set_len((2 << 20) + 4095).unwrap();
        disk.measure_again().expect("it has grown");
        assert_eq!(disk.capacity_sectors(), 2048 + sectors, "nor does a grown one go on");
        file.set_len((1 << 20) + 4095).unwrap();
    }
    let null = DiskSpec::Null { len_bytes: 4096 + 512 };
    let options = OpenOptions { logical_block_bytes: Some(4096), ..WRITABLE };
    assert_eq!(Disk::open(&null, options).unwrap().capacity_sectors(), 8);
}

#[test]
fn growth_is_taken_note_of_and_shrinking_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, 8192);
    let disk = Disk::open(&spec, WRITABLE).unwrap();
    let DiskSpec::File(path) = &spec else { unreachable!("it makes files") };
    let file = File::options().write(true).open(path).unwrap();
    let unchanged = |capacity_bytes| Refreshed::Unchanged { capacity_bytes };
    assert_eq!(disk.measure_again().unwrap(), unchanged(8192));
    file.set_len(12_288 + 511).unwrap();
    let grown = Refreshed::Grown { before_bytes: 8192, capacity_bytes: 12_288 };
    assert_eq!(disk.measure_again().unwrap(), grown);
    assert_eq!(disk.measure_again().unwrap(), unchanged(12_288));
    for found_bytes in [12_287, 0] {
        file.set_len(found_bytes).unwrap();
        let refused = disk.measure_again().expect_err("it has shrunk").to_string();
        assert!(refused.contains(&format!("from 12288 to {found_bytes} bytes")), "{refused}");
        assert_eq!(disk.capacity_sectors(), 24);
    }
    file.set_len(12_288).unwrap();
    assert_eq!(disk.measure_again().unwrap(), unchanged(12_288));
    let null = Disk::open(&DiskSpec::Null { len_bytes: 4096 }, WRITABLE).unwrap();
    assert_eq!(null.measure_again().unwrap(), unchanged(4096));
}

#[test]
fn file_shorter_than_its_block_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let options = OpenOptions { logical_block_bytes: Some(4096), ..WRITABLE };
    let refused = Disk::open(&file_of(&directory, 4095), options).unwrap_err().to_string();
    assert!(refused.contains("4096"), "{refused}");
}

#[test]
fn switch_to_write_through_is_settled_soon() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::open(&file_of(&directory, 4096), WRITABLE).unwrap());
    disk.switch_cache(false);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !disk.cache().submits_stable() {
        assert!(Instant::now() < deadline, "the sync does not end");
        std::thread::yield_now();
    }
    assert!(!disk.cache().is_write_back());
}

#[test]
fn descriptors_do_not_pass_to_children() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::open(&file_of(&directory, 4096), WRITABLE).unwrap();
    let image = directory.path().canonicalize().unwrap().join("disk.img");
    let open_in = |process: &str| {
        let listed =
            Command::new("ls").arg("-l").arg(format!("/proc/{process}/fd")).output().unwrap();
        String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter(|line| line.ends_with(&*image.to_string_lossy()))
            .count()
    };
    let all = "for I/O, for the locks, for the syncs of two queues, and for who settles";
    assert_eq!(open_in(&std::process::id().to_string()), 5, "{all}");
    assert_eq!(open_in("self"), 0, "what ls, our child, has");
    drop(disk);
}

#[test]
fn what_is_no_disk_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (directory.path(), "directory"),
        (&pipe, "named pipe"),
        (&socket, "socket"),
        (Path::new("/dev/null"), "character device"),
    ] {
        for options in [WRITABLE, READ_ONLY] {
            let message =
                Disk::open(&DiskSpec::File(path.to_owned()), options).unwrap_err().to_string();
            assert_eq!(
                message,
                format!("{path:?} is a {kind}: a disk is a regular file or a block device")
            );
        }
    }
}

#[test]
fn missing_file_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing.img");
    symlink(&missing, directory.path().join("dangling")).unwrap();
    for name in ["missing.img", "dangling"] {
        let path = directory.path().join(name);
        let refused = Disk::open(&DiskSpec::File(path.clone()), WRITABLE).unwrap_err();
        assert_eq!(refused.to_string(), format!("cannot open {path:?}"));
    }
    assert!(!missing.exists(), "nothing is created");
}

#[test]
fn file_that_only_reads_hints_at_read_only() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, 4096);
    let DiskSpec::File(path) = &spec else { unreachable!("file_of makes files") };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o400)).unwrap();
    // The rights of root reach further than a file's mode; there, a running program is what cannot
    // be written.
    let busy = std::env::current_exe().unwrap();
    let path = if rustix::process::geteuid().is_root() { &busy } else { path };
    let refused = Disk::open(&DiskSpec::File(path.clone()), WRITABLE).unwrap_err();
    assert!(matches!(refused, OpenError::NotWritable { .. }), "{refused:?}");
    assert!(refused.to_string().contains("--read-only"), "{refused}");
    Disk::open(&DiskSpec::File(path.clone()), READ_ONLY).unwrap();
}

#[test]
fn locked_image_opens_only_without_the_lock() {
    let directory = tempfile::tempdir().unwrap();
    let spec = file_of(&directory, 4096);
    let _first = Disk::open(&spec, WRITABLE).unwrap();
    assert!(matches!(Disk::open(&spec, WRITABLE), Err(OpenError::Lock(LockError::InUse { .. }))));
    Disk::open(&spec, OpenOptions { lock: false, ..WRITABLE }).unwrap();
}

/// A loop device over a file of 1 MiB. It goes with its last descriptor, however a test ends.
struct LoopDevice {
    path: PathBuf,
    _open: File,
    _directory: tempfile::TempDir,
}

impl LoopDevice {
    /// `None`, and why on stderr, where this user has no loop devices. Root has, where all is to be
    /// tested (REQUIRE_ALL=1).
    fn attach(options: &[&str]) -> Option<LoopDevice> {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("backing.img");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        match Command::new("losetup").args(["--find", "--show"]).args(options).arg(&image).output()
        {
            Ok(output) if output.status.success() => {
                let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end());
                let open = File::open(&path);
                // While it is open, detaching only marks it.
                let detached = Command::new("losetup").arg("--detach").arg(&path).status();
                assert!(detached.is_ok_and(|status| status.success()), "{path:?} stays attached");
                Some(LoopDevice { path, _open: open.unwrap(), _directory: directory })
            }
            outcome => {
                let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
                assert!(
                    !(required && rustix::process::geteuid().is_root()),
                    "REQUIRE_ALL=1, but losetup attaches no loop device: {outcome:?}"
                );
                eprintln!("skipped: losetup attaches no loop device here: {outcome:?}");
                None
            }
        }
    }
}

#[test]
fn block_device_is_served_with_its_own_block_size() {
    let Some(device) = LoopDevice::attach(&["--sector-size", "4096"]) else {
        return;
    };
    let spec = DiskSpec::File(device.path.clone());
    let disk = Disk::open(&spec, WRITABLE).unwrap();
    assert_eq!(disk.capacity_sectors(), 2048);
    assert_eq!(disk.geometry().logical_block_bytes, 4096);
    assert!(disk.geometry().write_zeroes.is_some());
    assert!(matches!(Disk::open(&spec, WRITABLE), Err(OpenError::Lock(LockError::InUse { .. }))));
    drop(disk);
    let disk = Disk::open(&spec, DIRECT).unwrap();
    assert_eq!(disk.direct().map(super::Direct::block_bytes), Some(4096));
    assert_eq!(disk.zero_blocks().called, 4096);
    drop(disk);
    let disk = Disk::open(&spec, OpenOptions { logical_block_bytes: Some(512), ..DIRECT }).unwrap();
    assert_eq!(disk.geometry().logical_block_bytes, 512);
    assert_eq!(disk.geometry().physical_block_exp, 3);
    assert_eq!(disk.zero_blocks().called, 4096, "that of the device, whatever the guest is told");
}

#[test]
fn read_only_block_device_hints_at_read_only() {
    let Some(device) = LoopDevice::attach(&["--read-only"]) else {
        return;
    };
    let spec = DiskSpec::File(device.path.clone());
    let refused = Disk::open(&spec, WRITABLE).unwrap_err();
    let told = std::error::Error::source(&refused).map(ToString::to_string).unwrap_or_default();
    assert!(format!("{refused} {told}").contains("--read-only"), "{refused:?}");
    assert!(Disk::open(&spec, READ_ONLY).unwrap().read_only());
}
