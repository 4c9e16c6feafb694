//! The configuration space (VIRTIO 1.3, 5.2.4), and access to it over the socket.

use crate::subject::{
    DISK_SECTORS, QUEUE_COUNT, Subject, is_ours_to_promise, lacks, lacks_feature, must_work,
    promise,
};
use frontend::Error;
use frontend::block::{
    CONFIG_BYTES, Request, SECTOR_BYTES, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
};
use frontend::guest::Options;
use frontend::message::{
    VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, VHOST_USER_PROTOCOL_F_BACKEND_REQ, VHOST_USER_SET_CONFIG,
    config_access,
};
use frontend::wire::{PATIENCE, Wire};
use rustix::process::Signal;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Segments that a request may at least have: Linux makes requests of 1 MiB from 4 KiB pages with
/// fewer, bigger ones.
const LEAST_SEG_MAX: u32 = 254;

#[test]
fn fields_describe_the_disk() {
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let config = driver.config().expect("the configuration space can be read");
    assert_eq!(config.capacity(), DISK_SECTORS);
    promise(config.seg_max() >= LEAST_SEG_MAX, || format!("seg_max is {}", config.seg_max()));
    // Without the feature the field means nothing.
    let has_size_max = driver.guest.features & VIRTIO_BLK_F_SIZE_MAX != 0;
    promise(has_size_max, || "size_max is not offered".into());
    assert!(!has_size_max || config.size_max() >= 4096, "size_max is {}", config.size_max());
    assert_eq!(config.num_queues(), QUEUE_COUNT);
    let block = config.blk_size();
    assert!(block.is_power_of_two() && (512..=4096).contains(&block), "blk_size is {block}");
    let physical = u64::from(block) << config.physical_block_exp();
    assert!((512..=65_536).contains(&physical), "a physical block of {physical} bytes");
    assert!(u32::from(config.alignment_offset()) < 1 << config.physical_block_exp());
    let optimal_bytes = u64::from(config.opt_io_size()) * u64::from(block);
    assert!(optimal_bytes <= DISK_SECTORS * 512, "opt_io_size is {}", config.opt_io_size());
    assert!(
        u64::from(config.min_io_size()) * u64::from(block) <= 1 << 20,
        "min_io_size is {}",
        config.min_io_size()
    );
}

#[test]
fn discard_and_write_zeroes_have_limits() {
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    assert_ne!(driver.guest.features & VIRTIO_BLK_F_DISCARD, 0);
    assert_ne!(driver.guest.features & VIRTIO_BLK_F_WRITE_ZEROES, 0);
    let config = driver.config().expect("the configuration space can be read");
    assert!(config.max_discard_sectors() > 0 && config.max_discard_seg() > 0);
    promise(config.max_discard_seg() > 1, || "a discard has one segment".into());
    assert!(config.discard_sector_alignment() > 0);
    assert!(config.max_write_zeroes_sectors() > 0 && config.max_write_zeroes_seg() > 0);
    assert!(config.write_zeroes_may_unmap() <= 1);
}

#[test]
fn parts_can_be_read_by_themselves() {
    let subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let front_end = &driver.guest.front_end;
    let whole = front_end.get_config(0, CONFIG_BYTES).expect("the whole can be read");
    for (offset, size_bytes) in [(0, 8), (8, 4), (20, 4), (34, 2), (4, 8), (33, 1)] {
        let part = front_end.get_config(offset, size_bytes).expect("a part can be read");
        let offset = usize::try_from(offset).expect("offsets are small");
        assert_eq!(part, whole[offset..offset + size_bytes], "{size_bytes} bytes at {offset}");
    }
    // QEMU reads as much as it knows of, crosvm 256 bytes.
    let more = front_end.get_config(0, 256).expect("more than there is can be read");
    assert_eq!(more[..CONFIG_BYTES], whole);
}

#[test]
fn reading_out_of_range_is_refused_without_harm() {
    if !is_ours_to_promise() {
        return;
    }
    let mut subject = Subject::start();
    for (offset, size_bytes) in [(4096_u32, 8), (u32::MAX, 8), (u32::MAX - 3, 4)] {
        let driver = subject.driver(&Options::default());
        let refused = driver.guest.front_end.get_config(offset, size_bytes);
        assert!(refused.is_err(), "{size_bytes} bytes at {offset} were read");
    }
    subject.must_serve_the_next();
}

#[test]
fn read_only_fields_cannot_be_written() {
    // vhost-user, "SET_CONFIG": back ends MUST NOT accept SET_CONFIG for read-only fields.
    let mut subject = Subject::start();
    let driver = subject.driver(&Options::default());
    let refused = driver.guest.front_end.set_config(0, &u64::MAX.to_le_bytes());
    assert!(
        matches!(refused, Err(Error::Refused { .. } | Error::HangUp)),
        "the capacity was written: {refused:?}"
    );
    drop(driver);
    let driver = subject.driver(&Options::default());
    let wrapping = driver.guest.front_end.tell(
        VHOST_USER_SET_CONFIG,
        &config_access(u32::MAX, 0, &[1; 8]),
        &[],
    );
    assert!(wrapping.is_err(), "a write at the end of the address space was accepted");
    drop(driver);
    let config =
        subject.driver(&Options::default()).config().expect("the configuration space can be read");
    assert_eq!(config.capacity(), DISK_SECTORS);
    subject.must_serve_the_next();
}

#[test]
fn read_only_disk_says_so() {
    if crate::subject::is_another_program() {
        return;
    }
    let subject = Subject::with_options(&["--read-only"]);
    let features = subject.connect().get_features().expect("features are told");
    assert_ne!(features & VIRTIO_BLK_F_RO, 0, "RO is missing");
    assert_eq!(
        features & (VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES),
        0,
        "a read-only disk offers to be changed"
    );
}

#[test]
fn back_end_channel_is_taken() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks(&driver, VHOST_USER_PROTOCOL_F_BACKEND_REQ) {
        return;
    }
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    driver.guest.front_end.set_backend_req_fd(theirs.as_fd()).expect("the channel is accepted");
    drop(theirs);
    must_work(&mut driver, 0);
    // The channel lives as long as the session: our end sees no hang-up before.
    let channel = Wire::from_stream(ours);
    assert!(
        matches!(channel.receive(std::time::Duration::ZERO), Err(Error::Silence(_))),
        "the channel was not kept"
    );
    drop(driver);
    channel.wait_for_hang_up(frontend::wire::PATIENCE).expect("the channel ends with its session");
}

#[test]
fn grown_disk_is_announced_and_served() {
    if crate::subject::is_another_program() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    driver.guest.front_end.set_backend_req_fd(theirs.as_fd()).expect("the channel is accepted");
    let beyond = Request::read(DISK_SECTORS, SECTOR_BYTES);
    assert_eq!(driver.perform(0, &beyond).expect("answered").status, VIRTIO_BLK_S_IOERR);

    let image = File::options().write(true).open(subject.image()).expect("the image is ours");
    image.set_len((DISK_SECTORS + 8) * SECTOR_BYTES as u64).expect("it can grow");
    subject.signal(Signal::HUP);
    let told = Wire::from_stream(ours).receive(PATIENCE).expect("the change is announced");
    assert_eq!(told.request, VHOST_USER_BACKEND_CONFIG_CHANGE_MSG);
    assert_eq!((told.flags, told.payload.len()), (1, 0), "a request that wants no answer");
    assert_eq!(driver.config().expect("it can be read").capacity(), DISK_SECTORS + 8);
    assert_eq!(driver.perform(0, &beyond).expect("answered").status, VIRTIO_BLK_S_OK);
}

#[test]
fn shrunk_disk_keeps_its_capacity() {
    if crate::subject::is_another_program() {
        return;
    }
    let subject = Subject::start();
    let image = File::options().write(true).open(subject.image()).expect("the image is ours");
    image.set_len(SECTOR_BYTES as u64).expect("it can shrink");
    subject.signal(Signal::HUP);
    let mut driver = subject.driver(&Options::default());
    assert_eq!(driver.config().expect("it can be read").capacity(), DISK_SECTORS);
    let last = Request::read(DISK_SECTORS - 1, SECTOR_BYTES);
    assert_eq!(driver.perform(0, &last).expect("answered").status, VIRTIO_BLK_S_IOERR);
}
