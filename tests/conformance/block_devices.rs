//! Disks on block devices, which here are loop devices: root's tests.

use crate::control::ask;
use crate::scattered::{Layout, churn, read, write};
use crate::subject::{DISK_BYTES, DISK_SECTORS, Subject, is_another_program};
use frontend::block::{
    BlockDriver, Request, Segment, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use frontend::guest::Options;
use frontend::memory::Shape;
use std::os::unix::fs::symlink;
use tests::{LoopDevice, temp_dir};

/// A daemon on a loop device with blocks of so many bytes; both are gone when they are dropped, the
/// daemon first.
struct OnDevice {
    subject: Subject,
    device: LoopDevice,
}

impl OnDevice {
    fn start(block: &str, options: &[&str]) -> Option<Self> {
        if is_another_program() {
            return None;
        }
        let device = LoopDevice::attach(DISK_BYTES as u64, &["--sector-size", block])?;
        let directory = temp_dir();
        symlink(device.path(), directory.path().join("disk")).expect("the directory is empty");
        Some(OnDevice { subject: Subject::in_directory(directory, options), device })
    }

    fn driver(&self) -> BlockDriver {
        let memory = vec![Shape { guest: 0, size_bytes: 64 << 20, file_offset_bytes: 0 }];
        self.subject.driver(&Options { memory, ..Options::default() })
    }
}

fn must(driver: &mut BlockDriver, request: &Request) {
    let outcome = driver.perform(0, request).expect("the request ends");
    assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "request type {}", request.kind);
}

#[test]
fn device_is_told_with_its_own_blocks_or_those_that_the_operator_wants() {
    for (own, options, told) in [
        ("512", &[][..], 512),
        ("4096", &[], 4096),
        ("4096", &["--logical-block-size", "512"], 512),
        ("512", &["--logical-block-size", "4096"], 4096),
    ] {
        for mode in ["writeback", "none"] {
            let options = [options, &["--cache", mode]].concat();
            let Some(disk) = OnDevice::start(own, &options) else { return };
            let config = disk.driver().config().expect("the configuration space can be read");
            assert_eq!((config.capacity(), config.blk_size()), (DISK_SECTORS, told));
            let physical = config.blk_size() << config.physical_block_exp();
            assert!(physical >= own.parse().expect("a number"), "{physical}");
            let block_sectors = told / 512;
            for sectors in [config.max_discard_sectors(), config.max_write_zeroes_sectors()] {
                assert!(sectors >= block_sectors && sectors.is_multiple_of(block_sectors));
            }
            assert!(config.discard_sector_alignment().is_multiple_of(block_sectors));
        }
    }
}

#[test]
fn device_that_has_grown_is_told_and_served_to_its_end() {
    for mode in ["writeback", "none"] {
        let Some(disk) = OnDevice::start("4096", &["--cache", mode]) else { return };
        let mut driver = disk.driver();
        let grown_bytes = 2 * DISK_BYTES as u64;
        disk.device.grow(grown_bytes);
        let found = ask(&disk.subject, r#"{"command":"resize"}"#);
        assert_eq!(found["ok"]["capacity_bytes"], grown_bytes, "{found}");
        let config = driver.config().expect("the configuration space can be read");
        assert_eq!(config.capacity(), 2 * DISK_SECTORS);
        let data = [0x5a; 4096];
        must(&mut driver, &Request::write(2 * DISK_SECTORS - 8, &data));
        let read = driver.perform(0, &Request::read(2 * DISK_SECTORS - 8, data.len()));
        assert!(read.expect("a read ends").data == data);
    }
}

#[test]
fn every_sector_of_a_device_with_large_blocks_can_be_read_and_written() {
    let modes = [("none", 1), ("directsync", 2), ("writeback", 3), ("writethrough", 4)];
    for block in ["4096", "2048", "1024"] {
        for (mode, seed) in modes {
            let Some(disk) = OnDevice::start(block, &["--cache", mode]) else { return };
            churn(&mut disk.driver(), 0xb10c_0000 + seed, 250, DISK_BYTES);
        }
    }
}

#[test]
fn neighbouring_sectors_of_one_block_keep_out_of_each_other_s_way() {
    const SECTORS: u64 = 96;
    for block in ["4096", "2048"] {
        let Some(disk) = OnDevice::start(block, &["--cache", "none", "--threads", "2"]) else {
            return;
        };
        let options = Options { queue_count: 2, ..Options::default() };
        let mut driver = disk.subject.driver(&options);
        for round in 0..40u8 {
            let sectors = |sector: u64| match sector % 16 {
                // Whole blocks beside single sectors, on another queue: no two overlap.
                0 => 8,
                1..8 => 0,
                _ => 1,
            };
            let byte = |sector: u64| round ^ u8::try_from(sector).expect("below 256");
            let mut submitted = [0; 2];
            for sector in (0..SECTORS).filter(|sector| sectors(*sector) > 0) {
                let queue = u16::try_from(sector % 2).expect("0 or 1");
                let data = vec![byte(sector); sectors(sector) * 512];
                driver.submit(queue, &Request::write(sector, &data));
                submitted[usize::from(queue)] += 1;
            }
            for queue in [0, 1] {
                driver.kick(queue).expect("the device can be kicked");
            }
            for queue in [0, 1] {
                for _ in 0..submitted[usize::from(queue)] {
                    let (_, outcome) = driver.complete(queue).expect("each write ends");
                    assert_eq!(outcome.status, VIRTIO_BLK_S_OK);
                }
            }
            let all = usize::try_from(SECTORS).expect("few") * 512;
            let outcome = driver.perform(0, &Request::read(0, all)).expect("the read ends");
            for (sector, found) in (0..).zip(outcome.data.chunks(512)) {
                let written = if sector % 16 < 8 { sector - sector % 16 } else { sector };
                let expected = byte(written);
                assert!(found.iter().all(|found| *found == expected), "{round}: sector {sector}");
            }
        }
    }
}

#[test]
fn zeroing_and_discarding_heed_the_ends_of_a_segment_where_blocks_are_large() {
    /// Sectors before and behind the segments.
    const AROUND: u64 = 64;
    let ones = vec![0xee; 1 << 20];
    for block in ["4096", "512"] {
        for mode in ["writeback", "none", "directsync"] {
            let Some(disk) = OnDevice::start(block, &["--cache", mode]) else { return };
            let mut driver = disk.driver();
            for (sector, count) in [(64, 64), (65, 1), (71, 2), (66, 13), (65, 1001), (72, 7)] {
                for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
                    write(&mut driver, 0, &Layout::at(0, ones.len()), &ones);
                    let segments = [
                        Segment { sector, count, flags },
                        Segment { sector: sector + 1030, count: 3, flags },
                    ];
                    let zeroes = Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &segments);
                    must(&mut driver, &zeroes);
                    let found = read(&mut driver, 0, &Layout::at(0, ones.len()));
                    for (at, found) in (0..).zip(found.chunks(512)) {
                        let within = |segment: &Segment| {
                            (segment.sector..segment.sector + u64::from(segment.count))
                                .contains(&at)
                        };
                        let expected = if segments.iter().any(within) { 0 } else { 0xee };
                        let same = found.iter().all(|byte| *byte == expected);
                        assert!(same, "{block} {mode} {segments:?}: sector {at}");
                    }
                }
                write(&mut driver, 0, &Layout::at(0, ones.len()), &ones);
                let segment = Segment { sector, count, flags: 0 };
                must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_DISCARD, &[segment]));
                let len = usize::try_from(u64::from(count) + 2 * AROUND).expect("short") * 512;
                let found = read(&mut driver, sector - AROUND, &Layout::at(0, len));
                let margin = usize::try_from(AROUND).expect("small") * 512;
                let outside = found[..margin].iter().chain(&found[len - margin..]);
                assert!({ outside }.all(|byte| *byte == 0xee), "{block} {mode} {segment:?}");
            }
        }
    }
}

#[test]
fn discard_frees_the_storage_of_the_whole_blocks_within() {
    let Some(disk) = OnDevice::start("4096", &["--cache", "none"]) else { return };
    let mut driver = disk.driver();
    write(&mut driver, 0, &Layout::at(0, 1 << 20), &vec![0xee; 1 << 20]);
    must(&mut driver, &Request::flush());
    let before = disk.device.allocated_bytes();
    assert!(before >= 1 << 20, "{before}");
    let segment = Segment { sector: 1, count: 1024, flags: 0 };
    must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_DISCARD, &[segment]));
    let after = disk.device.allocated_bytes();
    assert_eq!(before - after, (1024 - 8) * 512, "{before} before, {after} after");
}
