//! What a back end lets go of, and when: mappings of memory that was removed, descriptors that were
//! replaced or never needed (vhost-user, "VHOST_USER_REM_MEM_REG" and "Ring states").

use crate::subject::{Subject, lacks, must_work};
use frontend::block::BlockDriver;
use frontend::guest::{MemoryBy, Options};
use frontend::memory::Shape;
use frontend::message::{
    VHOST_USER_PROTOCOL_F_BACKEND_REQ, VHOST_USER_REM_MEM_REG, VHOST_USER_SET_BACKEND_REQ_FD,
    VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR, single_region,
};
use frontend::notifier::Notifier;
use frontend::wire::{PATIENCE, Wire, readable};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

/// Two regions: the rings and buffers are in the first.
fn driver(subject: &Subject) -> BlockDriver {
    let shape = |guest| Shape { guest, size_bytes: 1 << 20, file_offset_bytes: 0 };
    subject.driver(&Options {
        queue_size: 32,
        memory: vec![shape(0), shape(1 << 32)],
        memory_by: MemoryBy::Regions,
        ..Options::default()
    })
}

/// Times that a file is mapped in the back end.
fn mappings(subject: &Subject, file: BorrowedFd<'_>) -> usize {
    let file = File::from(file.try_clone_to_owned().expect("descriptors can be doubled"));
    let inode = file.metadata().expect("it is open").ino().to_string();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", subject.id())).expect("it lives");
    // Address, rights, offset, device, inode, name.
    maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&inode)).count()
}

/// Waits until `ours`, from which nothing else is to be read, has no other end any more.
#[track_caller]
fn must_be_closed(ours: BorrowedFd<'_>, what: &str) {
    let ended = readable(ours, PATIENCE).expect("descriptors can be polled");
    assert!(ended, "{what} is still open");
}

#[test]
fn removed_region_is_not_mapped_any_more() {
    let subject = Subject::start();
    let mut driver = driver(&subject);
    for _ in 0..3 {
        must_work(&mut driver, 0);
        let region = &driver.guest.memory.regions()[1];
        let front_end = &driver.guest.front_end;
        assert_eq!(mappings(&subject, region.file()), 1, "mappings of an added region");
        front_end.rem_mem_reg(&region.description()).expect("a region can be removed");
        assert_eq!(mappings(&subject, region.file()), 0, "mappings of a removed region");
        front_end.add_mem_reg(&region.description(), region.file()).expect("it can be added");
    }
    let regions = driver.guest.memory.regions();
    driver.guest.front_end.set_mem_table(&regions[..1]).expect("a table can be sent");
    assert_eq!(mappings(&subject, regions[1].file()), 0, "mappings of what the table lacks");
    must_work(&mut driver, 0);
}

#[test]
fn descriptor_that_comes_with_a_removal_is_closed() {
    // vhost-user, "VHOST_USER_REM_MEM_REG": the back end MUST close it.
    let subject = Subject::start();
    let driver = driver(&subject);
    let region = &driver.guest.memory.regions()[1];
    let (reader, writer) = std::io::pipe().expect("pipes can be made");
    let payload = single_region(&region.description());
    driver
        .guest
        .front_end
        .tell(VHOST_USER_REM_MEM_REG, &payload, &[writer.as_fd()])
        .expect("a region can be removed");
    drop(writer);
    must_be_closed(reader.as_fd(), "the descriptor");
}

#[test]
fn replaced_descriptors_are_closed() {
    let subject = Subject::start();
    let mut driver = driver(&subject);
    if lacks(&driver, VHOST_USER_PROTOCOL_F_BACKEND_REQ) {
        return;
    }
    for request in [VHOST_USER_SET_VRING_CALL, VHOST_USER_SET_VRING_ERR] {
        let (mut reader, writer) = std::io::pipe().expect("pipes can be made");
        let front_end = &driver.guest.front_end;
        front_end.set_vring_fd(request, 0, Some(writer.as_fd())).expect("it can be set");
        drop(writer);
        let next = Notifier::eventfd().expect("eventfds can be made");
        front_end.set_vring_fd(request, 0, Some(next.back_end_fd())).expect("it can be replaced");
        // A call may have been written on its way out.
        loop {
            must_be_closed(reader.as_fd(), "the first descriptor");
            if reader.read(&mut [0; 8]).expect("pipes can be read") == 0 {
                break;
            }
        }
    }
    let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
    let front_end = &driver.guest.front_end;
    front_end.set_backend_req_fd(theirs.as_fd()).expect("the channel is accepted");
    drop(theirs);
    let (_other, theirs) = UnixStream::pair().expect("sockets can be made");
    front_end
        .tell(VHOST_USER_SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])
        .expect("another channel is accepted");
    Wire::from_stream(ours).wait_for_hang_up(PATIENCE).expect("the first channel is closed");
    driver.guest.front_end.set_vring_fd(VHOST_USER_SET_VRING_CALL, 0, None).expect("none is fine");
    driver.submit(0, &frontend::block::Request::read(0, 512));
    driver.kick(0).expect("the device can be kicked");
    driver.complete_by_looking(0).expect("the request ends");
}
