//! One method a request, for tests that want the protocol to work.
//!
//! Requests without an answer of their own are acknowledged when `REPLY_ACK` has been negotiated
//! (vhost-user, "REPLY_ACK"): then an `Ok` means that the back end agreed. Without it, an `Ok`
//! means only that the bytes went out, and [`FrontEnd::barrier`] waits until they have been dealt
//! with.

use crate::Error;
use crate::memory::Region;
use crate::message::{
    RegionDescription, RingAddresses, VHOST_USER_ADD_MEM_REG, VHOST_USER_GET_CONFIG,
    VHOST_USER_GET_FEATURES, VHOST_USER_GET_MAX_MEM_SLOTS, VHOST_USER_GET_PROTOCOL_FEATURES,
    VHOST_USER_GET_QUEUE_NUM, VHOST_USER_GET_VRING_BASE, VHOST_USER_NEED_REPLY_MASK,
    VHOST_USER_PROTOCOL_F_REPLY_ACK, VHOST_USER_REM_MEM_REG, VHOST_USER_REPLY_MASK,
    VHOST_USER_RESET_DEVICE, VHOST_USER_RESET_OWNER, VHOST_USER_SET_BACKEND_REQ_FD,
    VHOST_USER_SET_CONFIG, VHOST_USER_SET_FEATURES, VHOST_USER_SET_MEM_TABLE, VHOST_USER_SET_OWNER,
    VHOST_USER_SET_PROTOCOL_FEATURES, VHOST_USER_SET_VRING_ADDR, VHOST_USER_SET_VRING_BASE,
    VHOST_USER_SET_VRING_ENABLE, VHOST_USER_SET_VRING_NUM, VHOST_USER_VERSION,
    VHOST_USER_VRING_NOFD_MASK, config_access, memory_table, single_region, vring_state, words,
};
use crate::wire::{PATIENCE, Reply, Wire};
use rustix::fd::BorrowedFd;
use std::path::Path;

/// Bytes before the data in the reply to `GET_CONFIG`: offset, size, flags.
const CONFIG_HEAD_BYTES: usize = 12;

/// A front end on one connection.
#[derive(Debug)]
pub struct FrontEnd {
    wire: Wire,
    reply_ack: bool,
}

impl FrontEnd {
    /// Connects; nothing has been sent yet.
    ///
    /// # Errors
    /// What `connect` says.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        Ok(FrontEnd::on(Wire::connect(path)?))
    }

    /// A front end on a connection that exists.
    #[must_use]
    pub fn on(wire: Wire) -> Self {
        FrontEnd { wire, reply_ack: false }
    }

    /// The connection, for what no method here sends.
    #[must_use]
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The connection, for another front end that knows nothing of what this one has said.
    #[must_use]
    pub fn into_wire(self) -> Wire {
        self.wire
    }

    /// Sends a request that is always answered, and returns the answer.
    ///
    /// # Errors
    /// As [`Wire::receive`], and [`Error::WrongReply`] for an answer to something else.
    pub fn ask(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, Error> {
        self.wire.send(request, 0, payload, fds)?;
        self.answer(request)
    }

    /// Sends a request that is answered by an acknowledgement or not at all.
    ///
    /// # Errors
    /// [`Error::Refused`] for an acknowledgement that says no, else as [`FrontEnd::ask`].
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if !self.reply_ack {
            return self.wire.send(request, 0, payload, fds);
        }
        self.wire.send(request, VHOST_USER_NEED_REPLY_MASK, payload, fds)?;
        match whole_word(request, &self.answer(request)?)? {
            0 => Ok(()),
            code => Err(Error::Refused { request, code }),
        }
    }

    fn answer(&self, request: u32) -> Result<Reply, Error> {
        let reply = self.wire.receive(PATIENCE)?;
        // vhost-user, "Header": the reply flag needs to be set on each reply from the back end.
        let fits = reply.flags & (VHOST_USER_REPLY_MASK | 0x3)
            == VHOST_USER_REPLY_MASK | VHOST_USER_VERSION;
        if fits && reply.request == request { Ok(reply) } else { Err(wrong(request, &reply)) }
    }

    fn ask_word(&self, request: u32) -> Result<u64, Error> {
        whole_word(request, &self.ask(request, &[], &[])?)
    }

    /// Returns once the back end has dealt with everything sent before.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn barrier(&self) -> Result<(), Error> {
        self.get_features().map(|_| ())
    }

    /// `GET_FEATURES`: the virtio features on offer.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn get_features(&self) -> Result<u64, Error> {
        self.ask_word(VHOST_USER_GET_FEATURES)
    }

    /// `SET_FEATURES`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_features(&self, features: u64) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_FEATURES, &words(&[features]), &[])
    }

    /// `GET_PROTOCOL_FEATURES`.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn get_protocol_features(&self) -> Result<u64, Error> {
        self.ask_word(VHOST_USER_GET_PROTOCOL_FEATURES)
    }

    /// `SET_PROTOCOL_FEATURES`; requests after this one are acknowledged if it includes
    /// `REPLY_ACK`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_PROTOCOL_FEATURES, &words(&[features]), &[])?;
        self.reply_ack = features & VHOST_USER_PROTOCOL_F_REPLY_ACK != 0;
        Ok(())
    }

    /// `SET_OWNER`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_owner(&self) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_OWNER, &[], &[])
    }

    /// `RESET_OWNER`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn reset_owner(&self) -> Result<(), Error> {
        self.tell(VHOST_USER_RESET_OWNER, &[], &[])
    }

    /// `RESET_DEVICE`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn reset_device(&self) -> Result<(), Error> {
        self.tell(VHOST_USER_RESET_DEVICE, &[], &[])
    }

    /// `SET_MEM_TABLE` with the regions as they are, in the order given.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_mem_table<'a>(
        &self,
        regions: impl IntoIterator<Item = &'a Region>,
    ) -> Result<(), Error> {
        let (descriptions, fds): (Vec<_>, Vec<_>) =
            regions.into_iter().map(|region| (region.description(), region.file())).unzip();
        self.set_mem_table_as(&descriptions, &fds)
    }

    /// `SET_MEM_TABLE` with any descriptions and descriptors.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_mem_table_as(
        &self,
        descriptions: &[RegionDescription],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_MEM_TABLE, &memory_table(descriptions), fds)
    }

    /// `ADD_MEM_REG`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn add_mem_reg(
        &self,
        description: &RegionDescription,
        file: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        self.tell(VHOST_USER_ADD_MEM_REG, &single_region(description), &[file])
    }

    /// `REM_MEM_REG`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn rem_mem_reg(&self, description: &RegionDescription) -> Result<(), Error> {
        self.tell(VHOST_USER_REM_MEM_REG, &single_region(description), &[])
    }

    /// `GET_MAX_MEM_SLOTS`.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn get_max_mem_slots(&self) -> Result<u64, Error> {
        self.ask_word(VHOST_USER_GET_MAX_MEM_SLOTS)
    }

    /// `GET_QUEUE_NUM`.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn get_queue_num(&self) -> Result<u64, Error> {
        self.ask_word(VHOST_USER_GET_QUEUE_NUM)
    }

    /// `SET_VRING_NUM`: the ring's size.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_vring_num(&self, index: u32, size: u32) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_VRING_NUM, &vring_state(index, size), &[])
    }

    /// `SET_VRING_BASE`: the available index to go on from.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_VRING_BASE, &vring_state(index, base), &[])
    }

    /// `SET_VRING_ADDR`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_vring_addr(&self, addresses: &RingAddresses) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_VRING_ADDR, &addresses.encode(), &[])
    }

    /// `SET_VRING_KICK`, `_CALL` or `_ERR`, with a descriptor or with the flag that says there is
    /// none.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_vring_fd(
        &self,
        request: u32,
        index: u32,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let flag = if fd.is_some() { 0 } else { VHOST_USER_VRING_NOFD_MASK };
        self.tell(request, &words(&[u64::from(index) | flag]), fd.as_slice())
    }

    /// `SET_VRING_ENABLE`.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_vring_enable(&self, index: u32, enabled: bool) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_VRING_ENABLE, &vring_state(index, u32::from(enabled)), &[])
    }

    /// `GET_VRING_BASE`: stops the ring, and returns the available index that the back end got to.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`].
    pub fn get_vring_base(&self, index: u32) -> Result<u32, Error> {
        let reply = self.ask(VHOST_USER_GET_VRING_BASE, &vring_state(index, 0), &[])?;
        match (reply.half(0), reply.half(4), reply.payload.len()) {
            (Some(answered), Some(base), 8) if answered == index => Ok(base),
            _ => Err(wrong(VHOST_USER_GET_VRING_BASE, &reply)),
        }
    }

    /// `GET_CONFIG`: `size_bytes` of the configuration space from `offset`.
    ///
    /// # Errors
    /// As [`FrontEnd::ask`]; a reply without data, which is how a back end refuses, is an
    /// [`Error::WrongReply`].
    pub fn get_config(&self, offset: u32, size_bytes: usize) -> Result<Vec<u8>, Error> {
        let reply =
            self.ask(VHOST_USER_GET_CONFIG, &config_access(offset, 0, &vec![0; size_bytes]), &[])?;
        // vhost-user, "GET_CONFIG": the payload size MUST match the front-end's request.
        match reply.payload.split_at_checked(CONFIG_HEAD_BYTES) {
            Some((_, data))
                if data.len() == size_bytes && reply.half(4) == u32::try_from(size_bytes).ok() =>
            {
                Ok(data.to_vec())
            }
            _ => Err(wrong(VHOST_USER_GET_CONFIG, &reply)),
        }
    }

    /// `SET_CONFIG` on behalf of the driver.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_CONFIG, &config_access(offset, 0, data), &[])
    }

    /// `SET_BACKEND_REQ_FD`: gives the back end `socket` for requests of its own; the other end is
    /// a [`Wire`] that receives them.
    ///
    /// # Errors
    /// As [`FrontEnd::tell`].
    pub fn set_backend_req_fd(&self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        self.tell(VHOST_USER_SET_BACKEND_REQ_FD, &[], &[socket])
    }
}

fn whole_word(request: u32, reply: &Reply) -> Result<u64, Error> {
    reply.word(0).filter(|_| reply.payload.len() == 8).ok_or_else(|| wrong(request, reply))
}

fn wrong(request: u32, reply: &Reply) -> Error {
    Error::WrongReply {
        request,
        answered: reply.request,
        flags: reply.flags,
        size_bytes: reply.payload.len(),
    }
}
