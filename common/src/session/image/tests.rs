//! What a successor is told is what was said, and nothing that no front end may say.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::{Action, Offer, Session};
use super::{SavedFault, SavedSession};
use crate::memory::{FrontendAddress, GuestAddress, RegionSpec, guest_file};
use crate::protocol::{Message, Payload, Request};

const OFFER: Offer =
    Offer { features: 1 << 9, queue_count: 2, max_queue_size: 256, is_network: false };

fn say(session: &mut Session, request: Request, payload: Payload, fds: Vec<OwnedFd>) -> Action {
    session.handle(Message { request, need_reply: false, payload, fds }).expect("it may be")
}

/// A session in which ring 0 runs.
fn session() -> Session {
    let mut session = Session::new(OFFER);
    say(&mut session, Request::SetFeatures, Payload::U64(1 << 30 | 1 << 9), Vec::new());
    say(&mut session, Request::SetProtocolFeatures, Payload::U64(1 << 15), Vec::new());
    let spec = RegionSpec {
        guest: GuestAddress(0),
        frontend: FrontendAddress(0x7000_0000),
        len_bytes: 0x10_0000,
        file_offset_bytes: 0x1000,
    };
    let file = guest_file(0x10_1000);
    match say(&mut session, Request::AddMemReg, Payload::MemoryRegion(spec), vec![file]) {
        Action::Memory(slots) => session.commit_memory(slots),
        other => panic!("{other:?}"),
    }
    let state = |num| Payload::VringState { index: 0, num };
    say(&mut session, Request::SetVringNum, state(128), Vec::new());
    say(&mut session, Request::SetVringBase, state(7), Vec::new());
    let addresses = Payload::VringAddress {
        index: 0,
        flags: 0,
        descriptor: FrontendAddress(0x7000_0000),
        used: FrontendAddress(0x7000_2000),
        available: FrontendAddress(0x7000_1000),
        log: 0,
    };
    say(&mut session, Request::SetVringAddr, addresses, Vec::new());
    let fd = || Payload::VringFd { index: 0, no_fd: false };
    for request in [Request::SetVringCall, Request::SetVringErr, Request::SetVringKick] {
        say(&mut session, request, fd(), vec![guest_file(0)]);
    }
    say(&mut session, Request::SetVringEnable, state(1), Vec::new());
    session.ring_started(0);
    session
}

/// With numbers for descriptors, and the descriptors.
fn written(session: &Session) -> (Value, Vec<Arc<OwnedFd>>) {
    let mut fds = Vec::new();
    let numbered = session.save().try_map(&mut |fd| {
        fds.push(fd);
        Ok::<_, Infallible>(fds.len() as u64 - 1)
    });
    (serde_json::to_value(numbered.unwrap()).unwrap(), fds)
}

fn written_anew(session: &Session) -> Value {
    written(session).0
}

fn taken_up(written: Value, fds: &[Arc<OwnedFd>]) -> Result<Session, SavedFault> {
    let saved: SavedSession<u64> = serde_json::from_value(written).expect("its form is right");
    let saved = saved.try_map(&mut |number| Ok::<_, Infallible>(Arc::clone(&fds[number as usize])));
    let (mut session, memory) = Session::restore(OFFER, saved.unwrap())?;
    session.commit_memory(memory);
    Ok(session)
}

#[test]
fn session_that_is_taken_up_says_the_same_but_that_no_ring_runs() {
    let before = session();
    let (written, fds) = written(&before);
    let mut after = taken_up(written, &fds).expect("it is what was said");
    assert!(before.save().was_running(0) && !after.save().was_running(0));
    let (old, new) = (before.ring(0).expect("all was said"), after.ring(0).expect("all is known"));
    assert_eq!((old.addresses, old.size, old.base), (new.addresses, new.size, new.base));
    assert!(Arc::ptr_eq(&old.kick.expect("a kick"), &new.kick.expect("a kick")));
    assert!(after.ring(1).is_none());
    after.ring_started(0);
    assert_eq!(written_anew(&after), written_anew(&before), "nothing else is lost");
}

#[test]
fn what_no_front_end_may_say_is_refused() {
    let (good, fds) = written(&session());
    type Spoil = fn(&mut Value);
    let spoilt: [(&str, Spoil); 6] = [
        ("feature bits 0x8", |all| all["features"] = json!(8)),
        ("protocol feature bits", |all| all["protocol_features"] = json!(1_u64 << 63)),
        ("it has 3 rings", |all| {
            let ring = all["rings"][1].clone();
            all["rings"].as_array_mut().unwrap().push(ring);
        }),
        ("ring 0", |all| all["rings"][0]["size"] = json!(512)),
        ("ring 0", |all| all["rings"][0]["addresses"][0] = json!(8)),
        ("memory regions", |all| {
            let region = all["memory"][0].clone();
            all["memory"] = Value::Array(vec![region; 510]);
        }),
    ];
    for (why, spoil) in spoilt {
        let mut bad = good.clone();
        spoil(&mut bad);
        let fault = taken_up(bad, &fds).expect_err(why);
        assert!(fault.to_string().contains(why), "{fault} is not about {why}");
    }
}
