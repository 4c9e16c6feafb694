//! Messages in, plans out.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{Action, Fault, MAX_MEMORY_SLOTS, Offer, PROTOCOL_FEATURES_BIT, RingFault, Session};
use crate::memory::{FrontendAddress, GuestAddress, RegionSpec, guest_file};
use crate::protocol::{Message, Payload, ProtocolFeatures, Request};
use crate::virtqueue::VIRTIO_F_VERSION_1;

const OFFER: Offer =
    Offer { features: 1 << 9, queue_count: 2, max_queue_size: 256, is_network: false };

fn session() -> Session {
    Session::new(OFFER)
}

fn send(session: &mut Session, request: Request, payload: Payload) -> Result<Action, Fault> {
    send_with(session, request, payload, Vec::new())
}

fn send_with(
    session: &mut Session,
    request: Request,
    payload: Payload,
    fds: Vec<OwnedFd>,
) -> Result<Action, Fault> {
    session.handle(Message { request, need_reply: false, payload, fds })
}

fn state(index: u32, num: u32) -> Payload {
    Payload::VringState { index, num }
}

fn addresses(descriptor: u64) -> Payload {
    Payload::VringAddress {
        index: 0,
        flags: 0,
        descriptor: FrontendAddress(descriptor),
        used: FrontendAddress(0x2000),
        available: FrontendAddress(0x1000),
        log: 0,
    }
}

fn kick(session: &mut Session) {
    let payload = Payload::VringFd { index: 0, no_fd: false };
    send_with(session, Request::SetVringKick, payload, vec![guest_file(0)]).expect("kick");
}

fn negotiate(session: &mut Session, protocol: ProtocolFeatures) {
    let features = Payload::U64(PROTOCOL_FEATURES_BIT | VIRTIO_F_VERSION_1);
    send(session, Request::SetFeatures, features).expect("features");
    send(session, Request::SetProtocolFeatures, Payload::U64(protocol.bits())).expect("protocol");
}

/// Everything that ring 0 needs but `SET_VRING_ENABLE`.
fn describe(session: &mut Session) {
    send(session, Request::SetVringNum, state(0, 128)).expect("size");
    send(session, Request::SetVringBase, state(0, 7)).expect("base");
    send(session, Request::SetVringAddr, addresses(0)).expect("addresses");
    kick(session);
}

#[test]
fn ring_runs_once_all_is_said_and_it_is_enabled() {
    let mut session = session();
    negotiate(&mut session, ProtocolFeatures::empty());
    describe(&mut session);
    assert!(session.ring(0).is_none());
    let action = send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    assert!(matches!(action, Action::Ring(0)));
    let ring = session.ring(0).expect("a plan");
    assert_eq!((ring.size, ring.base), (128, 7));
    assert!(session.ring(1).is_none());
}

#[test]
fn enable_may_come_before_anything_else() {
    let mut session = session();
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    negotiate(&mut session, ProtocolFeatures::empty());
    describe(&mut session);
    assert!(session.ring(0).is_some());
}

#[test]
fn ring_is_enabled_from_its_start_without_protocol_features() {
    let mut session = session();
    send(&mut session, Request::SetFeatures, Payload::U64(VIRTIO_F_VERSION_1)).expect("features");
    describe(&mut session);
    assert!(session.ring(0).is_some());
}

#[test]
fn features_without_protocol_features_enable_all_rings_at_once() {
    let mut session = session();
    describe(&mut session);
    assert!(session.ring(0).is_none(), "a ring begins disabled");
    send(&mut session, Request::SetVringEnable, state(0, 0)).expect("disabled");
    let features = Payload::U64(VIRTIO_F_VERSION_1);
    let action = send(&mut session, Request::SetFeatures, features).expect("features");
    assert!(matches!(action, Action::Rings));
    assert!(session.ring(0).is_some());
}

#[test]
fn ring_base_stops_the_ring_and_the_next_kick_starts_it_there() {
    let mut session = session();
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    session.ring_started(0);
    let action = send(&mut session, Request::GetVringBase, state(0, 0)).expect("base");
    assert!(matches!(action, Action::RingBase(0)));
    assert!(session.ring(0).is_none());
    session.ring_stopped(0, 42);
    assert_eq!(session.ring_base(0), 42);
    kick(&mut session);
    assert_eq!(session.ring(0).expect("a plan").base, 42);
}

#[test]
fn running_ring_keeps_its_shape_and_takes_another_kick() {
    let mut session = session();
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    session.ring_started(0);
    let running = |done| matches!(done, Err(Fault::Ring { source: RingFault::Running, .. }));
    assert!(running(send(&mut session, Request::SetVringNum, state(0, 64))));
    assert!(running(send(&mut session, Request::SetVringBase, state(0, 0))));
    assert!(running(send(&mut session, Request::SetVringAddr, addresses(0x4000))));
    assert!(send(&mut session, Request::SetVringAddr, addresses(0)).is_ok(), "no change");
    assert!(!session.ring_is_outdated(0));
    kick(&mut session);
    assert!(session.ring_is_outdated(0));
}

#[test]
fn features_stay_while_rings_run() {
    let mut session = session();
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    negotiate(&mut session, ProtocolFeatures::empty());
    describe(&mut session);
    session.ring_started(0);
    let other = send(&mut session, Request::SetFeatures, Payload::U64(VIRTIO_F_VERSION_1));
    assert!(matches!(other, Err(Fault::FeaturesWhileRunning { .. })));
    let same = Payload::U64(PROTOCOL_FEATURES_BIT | VIRTIO_F_VERSION_1);
    assert!(send(&mut session, Request::SetFeatures, same).is_ok());
}

#[test]
fn reset_forgets_rings_and_features_but_not_memory_nor_who_to_tell() {
    let mut session = session();
    negotiate(&mut session, ProtocolFeatures::RESET_DEVICE);
    let error = Payload::VringFd { index: 0, no_fd: false };
    send_with(&mut session, Request::SetVringErr, error, vec![guest_file(0)]).expect("error");
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    add_region(&mut session, 0).expect("region");
    session.ring_started(0);
    let reset = send(&mut session, Request::ResetDevice, Payload::Empty);
    assert!(matches!(reset, Ok(Action::Reset)));
    session.ring_stopped(0, 99);
    assert!(session.ring(0).is_none());
    assert_eq!((session.ring_base(0), session.features()), (0, 0));
    assert_eq!(session.memory().len(), 1);
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    assert!(session.ring(0).expect("all is said again").error.is_some());
}

#[test]
fn reset_owner_disables_rings_and_forgets_nothing() {
    let mut session = session();
    negotiate(&mut session, ProtocolFeatures::empty());
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    assert!(matches!(send(&mut session, Request::ResetOwner, Payload::Empty), Ok(Action::Rings)));
    assert!(session.ring(0).is_none());
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    assert_eq!(session.ring(0).expect("as before").base, 7);
}

#[test]
fn what_was_not_offered_cannot_be_acknowledged() {
    let mut session = session();
    let extra = send(&mut session, Request::SetFeatures, Payload::U64(1 << 34));
    assert!(matches!(extra, Err(Fault::Features { extra }) if extra == 1 << 34));
    let log = Payload::U64(ProtocolFeatures::LOG_SHMFD.bits());
    let extra = send(&mut session, Request::SetProtocolFeatures, log);
    assert!(matches!(extra, Err(Fault::ProtocolFeatures { extra: 2 })));
}

#[test]
fn requests_need_what_they_belong_to() {
    let mut session = session();
    let config = || Payload::Config { offset: 0, flags: 0, data: vec![0; 8] };
    let early = send(&mut session, Request::GetConfig, config());
    assert!(matches!(early, Err(Fault::NotNegotiated { request: Request::GetConfig, .. })));
    negotiate(&mut session, ProtocolFeatures::CONFIG);
    let read = send(&mut session, Request::GetConfig, config()).expect("negotiated");
    assert!(matches!(read, Action::ReadConfig { offset: 0, len_bytes: 8 }));
    let beyond = Payload::Config { offset: 250, flags: 0, data: vec![0; 8] };
    let beyond = send(&mut session, Request::GetConfig, beyond);
    assert!(matches!(beyond, Err(Fault::ConfigRange { offset: 250, len_bytes: 8, .. })));
}

#[test]
fn writes_to_the_configuration_space_have_known_flags() {
    let mut session = session();
    negotiate(&mut session, ProtocolFeatures::CONFIG);
    let write = |flags| Payload::Config { offset: 32, flags, data: vec![1] };
    for flags in [0, 1] {
        let action = send(&mut session, Request::SetConfig, write(flags)).expect("known flags");
        assert!(matches!(action, Action::WriteConfig { offset: 32, .. }));
    }
    for flags in [2, 3, 1 << 31] {
        let refused = send(&mut session, Request::SetConfig, write(flags));
        assert!(matches!(refused, Err(Fault::ConfigFlags { flags: named }) if named == flags));
    }
    // What a reader puts there means nothing: front ends on the `vhost` package set it.
    assert!(send(&mut session, Request::GetConfig, write(2)).is_ok());
}

#[test]
fn odd_values_are_refused_by_name() {
    let mut session = session();
    for num in [0, 3, 100, 512, 65536, u32::MAX] {
        let refused = send(&mut session, Request::SetVringNum, state(0, num));
        assert!(
            matches!(refused, Err(Fault::Ring { source: RingFault::Size { max: 256, .. }, .. })),
            "{num}"
        );
    }
    let refused = send(&mut session, Request::SetVringBase, state(0, 65536));
    assert!(matches!(refused, Err(Fault::Ring { source: RingFault::Base { .. }, .. })));
    let refused = send(&mut session, Request::SetVringEnable, state(0, 2));
    assert!(matches!(refused, Err(Fault::Ring { source: RingFault::State { num: 2 }, .. })));
    let refused = send(&mut session, Request::SetVringAddr, addresses(8));
    assert!(matches!(refused, Err(Fault::Ring { source: RingFault::Misaligned { .. }, .. })));
    for index in [2, 65536, u32::MAX] {
        let refused = send(&mut session, Request::SetVringNum, state(index, 128));
        assert!(matches!(refused, Err(Fault::RingIndex { count: 2, .. })), "{index}");
    }
}

fn spec(slot: u64) -> RegionSpec {
    RegionSpec {
        guest: GuestAddress(slot << 20),
        frontend: FrontendAddress(slot << 20),
        len_bytes: 0x1000,
        file_offset_bytes: 0,
    }
}

/// Adds a region and commits it, as the daemon does once it is mapped.
fn add_region(session: &mut Session, slot: u64) -> Result<(), Fault> {
    let all = ProtocolFeatures::CONFIGURE_MEM_SLOTS | ProtocolFeatures::RESET_DEVICE;
    let bits = Payload::U64(all.bits());
    send(session, Request::SetProtocolFeatures, bits).expect("offered");
    let payload = Payload::MemoryRegion(spec(slot));
    match send_with(session, Request::AddMemReg, payload, vec![guest_file(0)])? {
        Action::Memory(slots) => session.commit_memory(slots),
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn memory_is_added_and_removed_slot_by_slot() {
    let mut session = session();
    for slot in 0..3 {
        add_region(&mut session, slot).expect("room");
    }
    let kept = Arc::clone(&session.memory()[2].file);
    let one = send(&mut session, Request::RemMemReg, Payload::MemoryRegion(spec(1)));
    let Ok(Action::Memory(slots)) = one else { panic!("{one:?}") };
    assert_eq!(slots.len(), 2);
    assert!(Arc::ptr_eq(&slots[1].file, &kept), "what stays is the same file");
    session.commit_memory(slots);
    let again = send(&mut session, Request::RemMemReg, Payload::MemoryRegion(spec(1)));
    assert!(matches!(again, Err(Fault::NoSuchRegion { .. })));
}

#[test]
fn region_that_is_added_twice_is_there_until_it_is_removed_twice() {
    let mut session = session();
    add_region(&mut session, 1).expect("room");
    let first = Arc::clone(&session.memory()[0].file);
    add_region(&mut session, 1).expect("it is the same");
    assert_eq!(session.memory().len(), 1);
    assert!(Arc::ptr_eq(&session.memory()[0].file, &first), "nothing is mapped anew");
    for left in [1, 0] {
        let removed = send(&mut session, Request::RemMemReg, Payload::MemoryRegion(spec(1)));
        let Ok(Action::Memory(slots)) = removed else { panic!("{removed:?}") };
        assert_eq!(slots.len(), left);
        session.commit_memory(slots);
    }
    let again = send(&mut session, Request::RemMemReg, Payload::MemoryRegion(spec(1)));
    assert!(matches!(again, Err(Fault::NoSuchRegion { .. })));
}

#[test]
fn memory_slots_have_a_limit() {
    let mut session = session();
    for slot in 0..MAX_MEMORY_SLOTS as u64 {
        add_region(&mut session, slot).expect("room");
    }
    let surplus = add_region(&mut session, MAX_MEMORY_SLOTS as u64);
    assert!(matches!(surplus, Err(Fault::MemorySlots { count: 510 })));
}

#[test]
fn refused_message_changes_nothing() {
    let mut session = session();
    send(&mut session, Request::SetVringEnable, state(0, 1)).expect("enable");
    describe(&mut session);
    assert!(send(&mut session, Request::SetVringNum, state(0, 3)).is_err());
    assert!(send(&mut session, Request::SetVringAddr, addresses(8)).is_err());
    let ring = session.ring(0).expect("as before");
    assert_eq!((ring.size, ring.addresses.descriptor), (128, FrontendAddress(0)));
}
