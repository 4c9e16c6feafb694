//! What a session must be after what was said: written from the vhost-user text, not from the session.

use common::memory::RegionSpec;
use common::protocol::table::row;
use common::protocol::{Message, Payload, ProtocolFeatures, Request};
use common::session::{Action, MAX_MEMORY_SLOTS, Session};
use common::virtqueue::RingAddresses;

use super::message::{Files, Said};
use super::{OFFER, RINGS};

/// A region of memory that is mapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) spec: RegionSpec,
    /// Which file.
    file: usize,
    /// How often it was added, less how often it was removed.
    times: u32,
}

impl Mapped {
    fn new(spec: RegionSpec, file: usize) -> Self {
        Self { spec, file, times: 1 }
    }
}

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES_BIT: u64 = 1 << 30;

/// Where a ring's kicks come from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Kick {
    /// vhost-user, "Ring states": the ring is stopped.
    #[default]
    None,
    Polled,
    File(usize),
}

#[derive(Debug, Default)]
struct Ring {
    size: Option<u16>,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Kick,
    call: Option<usize>,
    error: Option<usize>,
    enabled: bool,
    /// What it was started with.
    started: Option<(RingAddresses, u16, u16)>,
    /// It has got another kick since.
    outdated: bool,
}

/// A session as it must be.
#[derive(Debug)]
pub(super) struct Model {
    offered: u64,
    offered_protocol: u64,
    features: u64,
    protocol: ProtocolFeatures,
    rings: [Ring; RINGS as usize],
    memory: Vec<Mapped>,
    files: Files,
}

impl Model {
    /// A model of this session, in which nothing has been said.
    pub(super) fn new(session: &mut Session) -> Self {
        let mut ask = |request| {
            let message =
                Message { request, need_reply: false, payload: Payload::Empty, fds: Vec::new() };
            match session.handle(message) {
                Ok(Action::Answer(bits)) => bits,
                other => unreachable!("{request} is answered: {other:?}"),
            }
        };
        Self {
            offered: ask(Request::GetFeatures),
            offered_protocol: ask(Request::GetProtocolFeatures),
            features: 0,
            protocol: ProtocolFeatures::empty(),
            rings: Default::default(),
            memory: Vec::new(),
            files: Files::default(),
        }
    }

    pub(super) fn files(&mut self) -> &mut Files {
        &mut self.files
    }

    /// The session has taken this message: checks that it had to, or might, and takes it too.
    pub(super) fn accept(&mut self, said: &Said) {
        let request = said.request;
        assert!(
            row(request).is_permitted(self.protocol, self.features),
            "{request} without its feature"
        );
        match &said.payload {
            Payload::Empty => self.accept_empty(request),
            Payload::U64(bits) => self.accept_features(request, *bits),
            Payload::VringState { index, num } => self.accept_state(request, *index, *num),
            Payload::VringFd { index, .. } => {
                self.accept_fd(request, u32::from(*index), said.files.first().copied());
            }
            Payload::VringAddress { index, descriptor, used, available, .. } => {
                let (descriptor, used, available) = (*descriptor, *used, *available);
                // VIRTIO 1.3, 2.7.
                let aligned = descriptor.0 % 16 == 0 && used.0 % 4 == 0 && available.0 % 2 == 0;
                assert!(aligned, "{descriptor} {used} {available}");
                let addresses = RingAddresses { descriptor, available, used };
                let ring = self.ring(*index);
                assert!(ring.started.is_none_or(|(old, ..)| old == addresses), "a running ring");
                ring.addresses = Some(addresses);
            }
            Payload::Config { flags, .. } => {
                // "VHOST_USER_SET_CONFIG": the back end must check the flags.
                assert!(request == Request::GetConfig || *flags <= 1, "flags {flags}");
            }
            Payload::MemoryTable(_) | Payload::MemoryRegion(_) => {}
            // "VHOST_USER_SET_INFLIGHT_FD": what is recorded there is where rings go on, so none may run.
            Payload::Inflight { num_queues, queue_size, .. } => {
                assert!(*num_queues > 0 && *queue_size > 0, "a region for nothing");
                let runs = self.rings.iter().any(|ring| ring.started.is_some());
                assert!(request == Request::GetInflightFd || !runs, "a ring runs");
            }
            Payload::Unparsed => {
                unreachable!("{request} belongs to a feature that is not offered")
            }
        }
    }

    fn accept_empty(&mut self, request: Request) {
        match request {
            Request::ResetDevice => {
                self.features = 0;
                for ring in &mut self.rings {
                    *ring = Ring { call: ring.call, error: ring.error, ..Ring::default() };
                }
            }
            // "Deprecated": may be ignored, or disable all rings. Ours disables.
            Request::ResetOwner => self.rings.iter_mut().for_each(|ring| ring.enabled = false),
            _ => {}
        }
    }

    fn accept_features(&mut self, request: Request, bits: u64) {
        if request == Request::SetFeatures {
            assert_eq!(bits & !self.offered, 0, "not offered");
            let running = self.rings.iter().any(|ring| ring.started.is_some());
            assert!(bits == self.features || !running, "features of running rings");
            self.features = bits;
            // "Ring states": without the bit, all rings are enabled at once.
            if bits & PROTOCOL_FEATURES_BIT == 0 {
                self.rings.iter_mut().for_each(|ring| ring.enabled = true);
            }
        } else {
            assert_eq!(request, Request::SetProtocolFeatures);
            assert_eq!(bits & !self.offered_protocol, 0, "not offered");
            self.protocol = ProtocolFeatures::from_bits(bits);
        }
    }

    fn accept_state(&mut self, request: Request, index: u32, num: u32) {
        let ring = self.ring(index);
        let running = ring.started.is_some();
        match request {
            Request::SetVringNum => {
                let legal = num.is_power_of_two() && num <= u32::from(OFFER.max_queue_size);
                assert!(legal, "size {num}");
                let size = num as u16;
                assert!(!running || ring.size == Some(size), "the size of a running ring");
                ring.size = Some(size);
            }
            Request::SetVringBase => {
                assert!(!running && num <= u32::from(u16::MAX), "base {num}");
                ring.base = num as u16;
            }
            Request::SetVringEnable => {
                assert!(num <= 1, "state {num}");
                ring.enabled = num == 1;
            }
            // "Ring states": the ring is stopped.
            Request::GetVringBase => ring.kick = Kick::None,
            other => unreachable!("{other} was taken"),
        }
    }

    fn accept_fd(&mut self, request: Request, index: u32, file: Option<usize>) {
        let ring = self.ring(index);
        match request {
            Request::SetVringKick => {
                ring.kick = file.map_or(Kick::Polled, Kick::File);
                ring.outdated = ring.started.is_some();
            }
            Request::SetVringCall => ring.call = file,
            Request::SetVringErr => ring.error = file,
            other => unreachable!("{other} was taken"),
        }
    }

    fn ring(&mut self, index: u32) -> &mut Ring {
        let count = self.rings.len();
        let ring = self.rings.get_mut(index as usize);
        ring.unwrap_or_else(|| unreachable!("ring {index} of {count} was taken"))
    }

    pub(super) fn started(&mut self, index: u16) {
        let ring = self.ring(u32::from(index));
        let (Some(addresses), Some(size)) = (ring.addresses, ring.size) else {
            unreachable!("ring {index} was started before it was described")
        };
        ring.started = Some((addresses, size, ring.base));
        ring.outdated = false;
    }

    /// A ring that was reset has no use for the base of its former self.
    pub(super) fn stopped(&mut self, index: u16, base: u16) {
        let ring = self.ring(u32::from(index));
        if ring.started.take().is_some() {
            ring.base = base;
            ring.outdated = false;
        }
    }

    pub(super) fn kick_refused(&mut self, index: u16) {
        self.ring(u32::from(index)).kick = Kick::None;
    }

    /// What a message about memory asks for.
    pub(super) fn memory_after(&self, said: &Said) -> Vec<Mapped> {
        let mut memory = self.memory.clone();
        match &said.payload {
            Payload::MemoryTable(specs) => {
                let files = said.files.iter();
                return specs
                    .iter()
                    .zip(files)
                    .map(|(spec, file)| Mapped::new(*spec, *file))
                    .collect();
            }
            Payload::MemoryRegion(spec) if said.request == Request::AddMemReg => {
                // QEMU before version 8 adds a region once for each queue pair of a network device.
                match memory.iter_mut().find(|mapped| mapped.spec == *spec) {
                    Some(mapped) => mapped.times += 1,
                    None => memory.extend(said.files.iter().map(|file| Mapped::new(*spec, *file))),
                }
            }
            Payload::MemoryRegion(spec) => {
                // "Identified by guest address, user address and size": not by its place in the file.
                let same = |mapped: &Mapped| {
                    let old = mapped.spec;
                    RegionSpec { file_offset_bytes: spec.file_offset_bytes, ..old } == *spec
                };
                let place = memory.iter().position(same).expect("there was no such region");
                memory[place].times -= 1;
                if memory[place].times == 0 {
                    memory.remove(place);
                }
            }
            other => unreachable!("{other:?} is not about memory"),
        }
        memory
    }

    pub(super) fn commit_memory(&mut self, memory: Vec<Mapped>) {
        assert!(memory.len() <= MAX_MEMORY_SLOTS);
        self.memory = memory;
    }

    /// Compares the session with what it must be.
    pub(super) fn check(&mut self, session: &Session) {
        assert_eq!(session.features(), self.features);
        assert_eq!(session.acknowledges(), self.protocol.contains(ProtocolFeatures::REPLY_ACK));
        let specs = session.memory().iter().map(|slot| slot.spec);
        assert!(specs.eq(self.memory.iter().map(|mapped| mapped.spec)), "{:x?}", session.memory());
        for (index, ring) in (0..).zip(&self.rings) {
            assert_eq!(session.ring_base(index), ring.base);
            assert_eq!(session.ring_is_outdated(index), ring.outdated);
            let legal = ring.kick != Kick::None && ring.enabled;
            let due = ring.addresses.zip(ring.size).filter(|_| legal);
            let plan = session.ring(index);
            assert_eq!(plan.is_some(), due.is_some(), "ring {index}: {ring:?}");
            let (Some(plan), Some(due)) = (plan, due) else { continue };
            assert_eq!((plan.addresses, plan.size, plan.base), (due.0, due.1, ring.base));
            assert_eq!(plan.kick.is_some(), matches!(ring.kick, Kick::File(_)));
            assert_eq!(plan.call.is_some(), ring.call.is_some());
            assert_eq!(plan.error.is_some(), ring.error.is_some());
            let shape = (plan.addresses, plan.size, plan.base);
            assert!(ring.started.is_none_or(|started| started == shape), "a running ring changed");
        }
        assert!(session.ring(RINGS).is_none());
        let kept = self.kept();
        self.files.check_closed(&kept);
    }

    /// The descriptors that the session needs.
    fn kept(&self) -> Vec<usize> {
        let rings = self.rings.iter().flat_map(|ring| {
            let kick = if let Kick::File(file) = ring.kick { Some(file) } else { None };
            [kick, ring.call, ring.error]
        });
        let memory = self.memory.iter().map(|mapped| Some(mapped.file));
        rings.chain(memory).flatten().collect()
    }

    /// The last word has been said: the session keeps what it needs until it is gone.
    pub(super) fn end(mut self, session: Session) {
        self.files.check_open(&self.kept());
        drop(session);
        self.files.check_closed(&[]);
    }
}
