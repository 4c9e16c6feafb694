//! The front end of a hostile case, with a neighbour queue that behaves well on the same connection,
//! and what every case ends with: [`Attacker::after`].
//!
//! The neighbour has requests under way while queue 0 or the session is attacked. Their data is
//! checked, and so is that of new ones. A network's neighbour is the queue that sends, beside the one
//! that receives: its frames are on the wire, and its chains come back.

use crate::subject::{DISK_SECTORS, Subject, frame, is_peer, promise};
use crate::wire::Wire as NetworkWire;
use frontend::Error;
use frontend::block::{BlockDriver, Request, SECTOR_BYTES, VIRTIO_BLK_S_OK};
use frontend::guest::Options;
use frontend::message::{
    VHOST_USER_GET_CONFIG, VHOST_USER_GET_FEATURES, VHOST_USER_GET_PROTOCOL_FEATURES,
    VHOST_USER_NEED_REPLY_MASK,
};
use frontend::virtqueue::Buffer;
use frontend::wire::{PATIENCE, Reply, Wire};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::time::Duration;

/// The queue beside the attacked one, which is queue 0.
pub(crate) const NEIGHBOUR: u16 = 1;
/// Requests of the neighbour that are under way during an attack.
const UNDER_WAY: u64 = 4;
/// Room for a frame of the neighbour's, if it is a network's.
const FRAME_PLACE_BYTES: usize = 512;
/// Sectors of each.
const SECTORS: usize = 2;
/// How long another program's neighbour queue may take.
const PEER_PATIENCE: Duration = Duration::from_secs(1);
/// Where the neighbour's sectors begin: the attacked queue must keep away from there, and
/// [`must_work`](crate::subject::must_work) uses those behind them.
pub(crate) const NEIGHBOUR_SECTOR: u64 = DISK_SECTORS - 64;

/// What is left of a session after an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    /// It goes on.
    Lives,
    /// The back end has closed the connection.
    Over,
    /// One or the other.
    Either,
}

/// What a back end made of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// An acknowledgement that says no, or a reply without data to a `GET_` request.
    Refused,
    /// The connection was closed.
    HungUp,
    /// An acknowledgement that says yes, or a reply.
    Answered,
    /// Nothing came before the answer to the next message.
    Ignored,
}

/// A hostile front end or driver, and its neighbour.
#[derive(Debug)]
pub(crate) struct Attacker {
    /// Both queues. The attack is on queue 0, or on the session.
    pub(crate) driver: BlockDriver,
    round: u8,
    /// Another program's device has stopped altogether.
    stands_still: bool,
    network: Option<Network>,
}

/// What the neighbour of a network needs.
#[derive(Debug)]
struct Network {
    wire: Rc<NetworkWire>,
    /// Memory for its frames.
    place: u64,
}

impl Attacker {
    /// A session with two queues; the neighbour's is in use.
    pub(crate) fn begin(subject: &Subject, options: &Options) -> Self {
        let options = Options { queue_count: subject.queue_count(), ..options.clone() };
        let mut driver = subject.driver(&options);
        let network = subject.wire().map(|wire| {
            let place = driver.guest.reserve(UNDER_WAY as usize * FRAME_PLACE_BYTES);
            Network { wire, place }
        });
        let mut attacker = Attacker { driver, round: 0, stands_still: false, network };
        attacker.occupy_neighbour().expect("the neighbour can work");
        attacker
    }

    fn data(&self, at: u64) -> Vec<u8> {
        let fill = self.round.wrapping_mul(31).wrapping_add(u8::try_from(at).unwrap_or(0));
        vec![fill; SECTORS * SECTOR_BYTES]
    }

    fn sector(at: u64) -> u64 {
        NEIGHBOUR_SECTOR + at * SECTORS as u64
    }

    /// Writes new data and leaves reads of it under way.
    fn occupy_neighbour(&mut self) -> Result<(), Error> {
        self.round = self.round.wrapping_add(1);
        if self.network.is_some() {
            return self.send_frames();
        }
        for at in 0..UNDER_WAY {
            let write = Request::write(Self::sector(at), &self.data(at));
            self.driver.submit(NEIGHBOUR, &write);
            self.driver.kick(NEIGHBOUR)?;
            let (_, written) = self.driver.complete_within(NEIGHBOUR, patience())?;
            assert_eq!(written.status, VIRTIO_BLK_S_OK, "a write of the neighbour");
        }
        for at in 0..UNDER_WAY {
            let read = Request::read(Self::sector(at), SECTORS * SECTOR_BYTES);
            self.driver.submit(NEIGHBOUR, &read);
        }
        self.driver.kick(NEIGHBOUR)
    }

    /// Sends frames that are on the wire before anything else happens; their chains are left to come back.
    fn send_frames(&mut self) -> Result<(), Error> {
        let Some(Network { wire, place }) = &self.network else { return Ok(()) };
        let guest = &mut self.driver.guest;
        let header_bytes = wire.header_bytes(guest.features);
        let frames = (0..UNDER_WAY).map(|at| frame(100 + at as usize, self.round));
        let frames: Vec<Vec<u8>> = frames.collect();
        for (at, frame) in (0..).zip(&frames) {
            let address = place + at * FRAME_PLACE_BYTES as u64;
            let chain = [&vec![0; header_bytes][..], frame].concat();
            guest.memory.write(address, &chain);
            let len_bytes = u32::try_from(chain.len()).unwrap_or(u32::MAX);
            let buffer = Buffer { address, len_bytes, writable: false };
            guest.queues[usize::from(NEIGHBOUR)].submit(&[buffer]);
        }
        guest.queues[usize::from(NEIGHBOUR)].kick()?;
        frames.iter().for_each(|frame| wire.must_receive(frame, "the neighbour"));
        Ok(())
    }

    /// What the neighbour had under way ends, with its own data.
    fn neighbour_completes(&mut self, what: &str) -> Result<(), Error> {
        if self.network.is_some() {
            let queue = &mut self.driver.guest.queues[usize::from(NEIGHBOUR)];
            return (0..UNDER_WAY).try_for_each(|_| queue.wait_used(PATIENCE).map(drop));
        }
        let mut read = Vec::new();
        for _ in 0..UNDER_WAY {
            let (_, outcome) = self.driver.complete_within(NEIGHBOUR, patience())?;
            assert_eq!(outcome.status, VIRTIO_BLK_S_OK, "{what}: a read of the neighbour");
            read.push(outcome.data);
        }
        // In any order: a back end may complete what it began later first.
        let mut expected: Vec<_> = (0..UNDER_WAY).map(|at| self.data(at)).collect();
        read.sort();
        expected.sort();
        assert!(read == expected, "{what}: the neighbour reads other data than it wrote");
        Ok(())
    }

    /// The neighbour was not disturbed: what it had under way has ended well, and so does what it
    /// does next. Puts further requests under way.
    #[track_caller]
    pub(crate) fn neighbour_must_work(&mut self, what: &str) {
        if self.stands_still {
            return;
        }
        // VIRTIO 1.3, 2.1.2: a device may stop altogether. Wrong data has no such excuse.
        let works = self.neighbour_completes(what).and_then(|()| self.occupy_neighbour());
        promise(works.is_ok(), || format!("{what}: the neighbour stands still: {works:?}"));
        self.stands_still = works.is_err();
    }

    /// Sends a message and says what came of it. No silence is waited for: the next message, which
    /// is always answered, ends it.
    pub(crate) fn send(
        &self,
        (request, flags): (u32, u32),
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Reaction {
        reaction(self.driver.guest.front_end.wire(), (request, flags), payload, fds)
    }

    /// What every hostile case ends with. The session is as it should be, the neighbour was not
    /// disturbed if it goes on, the process lives, and it serves the next front end.
    #[track_caller]
    pub(crate) fn after(mut self, subject: &mut Subject, session: Session, what: &str) {
        let over = match session {
            Session::Lives => false,
            Session::Over if !is_peer() => {
                let hang_up = self.driver.guest.front_end.wire().wait_for_hang_up(PATIENCE);
                assert!(hang_up.is_ok(), "{what}: the session is not over: {hang_up:?}");
                true
            }
            Session::Over | Session::Either => self.is_over(),
        };
        if !over {
            self.neighbour_must_work(what);
        }
        drop(self);
        subject.must_serve_the_next();
    }

    fn is_over(&self) -> bool {
        self.driver.guest.front_end.barrier().is_err()
    }
}

/// How long the neighbour may take. Whether another program's device has stopped is asked often.
fn patience() -> Duration {
    if is_peer() { PEER_PATIENCE } else { PATIENCE }
}

/// As [`Attacker::send`], over any connection.
pub(crate) fn reaction(
    wire: &Wire,
    (request, flags): (u32, u32),
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Reaction {
    let next = if request == VHOST_USER_GET_FEATURES {
        VHOST_USER_GET_PROTOCOL_FEATURES
    } else {
        VHOST_USER_GET_FEATURES
    };
    let mut reaction = Reaction::Ignored;
    let sent = wire.send(request, flags, payload, fds).and_then(|()| wire.send(next, 0, &[], &[]));
    // What was answered before a hang-up is still to be read.
    loop {
        match wire.receive(PATIENCE) {
            Ok(reply) if reply.request == next => return reaction,
            Ok(reply) => reaction = what_it_says(&reply, request, flags),
            Err(Error::HangUp) => return Reaction::HungUp,
            Err(error) => panic!(
                "request {request}, flags {flags:#x}, {} bytes, {} descriptors: {error} ({sent:?})",
                payload.len(),
                fds.len()
            ),
        }
    }
}

fn what_it_says(reply: &Reply, request: u32, flags: u32) -> Reaction {
    let acknowledges = flags & VHOST_USER_NEED_REPLY_MASK != 0 && reply.payload.len() == 8;
    // vhost-user, "VHOST_USER_GET_CONFIG": a reply without data says that it failed.
    let has_no_data = request == VHOST_USER_GET_CONFIG && reply.payload.len() <= 12;
    let refuses = if acknowledges { reply.word(0) != Some(0) } else { has_no_data };
    if refuses { Reaction::Refused } else { Reaction::Answered }
}
