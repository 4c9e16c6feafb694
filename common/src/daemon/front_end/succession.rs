//! What a front end's session is to a successor of this process: written down after each message, taken up by the next
//! process on the same connection, left to it when this one is told to end.
//!
//! Contract: between two messages the image says all that a successor needs, and while one is dealt with it is marked as not
//! saying so. Requests in flight are in a region that outlives the process, the front end's or one of ours, whose rings recover
//! as they do when a front end brings it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tracing::info;

use super::super::store::{HeldLife, KeptInflight, Life};
use super::{FrontEnd, Refused, offer};
use crate::device::{Device, NotRestored};
use crate::session::{MAX_CONFIG_BYTES, SavedFault, Session};
use crate::virtqueue::{InflightShape, Record};

/// Why a session is not taken up.
#[derive(Debug, thiserror::Error)]
pub(in crate::daemon) enum NotTakenUp {
    #[error("the front end cannot have said that")]
    Session(#[from] SavedFault),
    #[error("the guest knows another device")]
    Device(#[from] NotRestored),
    #[error("what it needs cannot be had")]
    Refused(#[from] Refused),
    #[error("its region for requests in flight has room for {found:?}, of {least:?} at least")]
    Inflight { found: InflightShape, least: InflightShape },
}

impl<D: Device> FrontEnd<'_, D> {
    /// Whether a successor could go on with this session.
    pub(in crate::daemon) fn has_successors(&self) -> bool {
        self.store.is_some() && self.device.save().is_some()
    }

    /// Has a successor find the session as it is now.
    pub(super) fn commit(&mut self) {
        if self.store.is_none() {
            return;
        }
        let life = self.life();
        if let Some(store) = &mut self.store {
            store.commit(life);
        }
    }

    fn life(&self) -> Option<HeldLife> {
        let device = self.device.save()?;
        Some(Life {
            connection: Arc::clone(&self.socket),
            channel: self.channel.clone(),
            session: self.session.save(),
            inflight: self.inflight.as_ref().map(|(_, kept)| kept.clone()),
            config: self.config_space(),
            device,
            kept: None,
        })
    }

    fn config_space(&self) -> Vec<u8> {
        let mut bytes = vec![0; MAX_CONFIG_BYTES as usize];
        self.device.read_config(self.session.features(), 0, &mut bytes);
        bytes
    }

    /// What is written is all that there is, unless the session has ended with this message.
    pub(super) fn is_between_messages(&self, goes_on: bool) {
        if let Some(store) = &self.store {
            store.set_busy(!goes_on);
        }
    }

    /// Goes on where a predecessor was: each ring with what was in flight, without any word from the front end.
    pub(in crate::daemon) async fn take_up(&mut self, life: HeldLife) -> Result<(), NotTakenUp> {
        let Life { connection: _, channel, session: saved, inflight, config, device, kept } = life;
        let count = self.session.ring_count();
        self.taken_up = (0..count).filter(|index| saved.was_running(*index)).collect();
        let (session, memory) = Session::restore(offer(self.device), saved)?;
        self.session = session;
        self.device.restore(&device, kept.as_ref())?;
        if let Some(kept) = inflight {
            let (found, least) = (kept.shape(), InflightShape { queue_count: 1, queue_size: 1 });
            if found.queue_count < least.queue_count || found.queue_size < least.queue_size {
                return Err(NotTakenUp::Inflight { found, least });
            }
            self.record_at(kept)?;
        }
        if let Some(channel) = channel {
            self.speak_over(channel.try_clone().map_err(Refused::Channel)?)?;
        }
        self.replace_memory(memory).await?;
        self.taken_up.clear();
        self.note_attendance();
        let rings = (0..count).filter(|index| self.is_running(*index)).count();
        info!(rings, "a predecessor's front end is served on");
        if config != self.config_space() {
            self.refresher.config_changed("the device has changed while nobody served it");
        }
        self.commit();
        Ok(())
    }

    /// Ends what is in flight, and leaves the session to a successor. The front end is told nothing.
    pub(in crate::daemon) async fn hand_over(mut self) {
        for index in 0..self.session.ring_count() {
            if self.is_running(index) {
                self.stop(index).await;
            }
        }
        self.commit();
        info!("the front end is left to a successor");
    }

    /// Where the requests of a ring of this size are recorded, which starts.
    pub(super) fn record_of(&mut self, index: u16, size: u16) -> Result<Option<Record>, Refused> {
        if self.inflight.is_none() && self.has_successors() {
            self.record_at(self.own_inflight()?)?;
        }
        let Some((region, kept)) = &self.inflight else { return Ok(None) };
        let record = region.record(index);
        // What is in ours is of the process before this one, or of a ring that has been stopped in good order.
        if kept.is_ours && !self.taken_up.contains(&index) {
            record.iter().for_each(|record| record.forget(size));
        }
        Ok(record)
    }

    /// A region that the service manager keeps, as the front end does not.
    fn own_inflight(&self) -> Result<KeptInflight<Arc<OwnedFd>>, Refused> {
        let (queue_count, queue_size) = (self.session.ring_count(), self.device.max_queue_size());
        let shape = InflightShape { queue_count, queue_size };
        let file = Arc::new(shape.create().map_err(Refused::CreateInflight)?);
        Ok(KeptInflight { queue_count, queue_size, file_offset_bytes: 0, file, is_ours: true })
    }
}

/// The connection of a session that is to be taken up.
pub(in crate::daemon) fn connection_of(life: &HeldLife) -> std::io::Result<UnixStream> {
    life.connection.try_clone().map(UnixStream::from)
}
