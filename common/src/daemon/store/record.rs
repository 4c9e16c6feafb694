//! What is written in the image, in JSON: which descriptors the service manager keeps, and what they are to the session.
//!
//! A descriptor is called by its serial number there, and is itself here: the type parameter. Each has one number for its
//! whole time in the store, and no number has a second one.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::session::SavedSession;
use crate::virtqueue::InflightShape;

/// All of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record<F> {
    /// The device's name ([`Device::NAME`](crate::device::Device::NAME)).
    pub(super) device: String,
    /// The number of the next descriptor.
    pub(super) next_serial: u64,
    /// The socket that the daemon has bound itself.
    pub(super) listener: Option<KeptListener<F>>,
    /// The front end that is being served.
    pub(super) session: Option<Life<F>>,
}

/// A socket that the daemon has bound itself, and the file by which it is reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct KeptListener<F> {
    pub(in crate::daemon) socket: F,
    /// The file's device and inode number.
    pub(in crate::daemon) file: (u64, u64),
}

/// A session with all that belongs to it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct Life<F> {
    pub(in crate::daemon) connection: F,
    pub(in crate::daemon) channel: Option<F>,
    pub(in crate::daemon) session: SavedSession<F>,
    pub(in crate::daemon) inflight: Option<KeptInflight<F>>,
    /// The configuration space as the front end can have read it.
    pub(in crate::daemon) config: Vec<u8>,
    /// What [`Device::save`](crate::device::Device::save) says.
    pub(in crate::daemon) device: Value,
    /// What its queues have written down since, which is not in the record.
    #[serde(skip)]
    pub(in crate::daemon) kept: Option<Value>,
}

/// Where requests in flight are recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct KeptInflight<F> {
    pub(in crate::daemon) queue_count: u16,
    pub(in crate::daemon) queue_size: u16,
    pub(in crate::daemon) file_offset_bytes: u64,
    pub(in crate::daemon) file: F,
    /// The front end knows nothing of it.
    pub(in crate::daemon) is_ours: bool,
}

impl<F> KeptInflight<F> {
    pub(in crate::daemon) fn shape(&self) -> InflightShape {
        InflightShape { queue_count: self.queue_count, queue_size: self.queue_size }
    }
}

impl<F> Record<F> {
    /// The same with other names for its descriptors.
    pub(super) fn try_map<G, E>(
        self,
        name: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<Record<G>, E> {
        let Self { device, next_serial, listener, session } = self;
        let listener = match listener {
            Some(KeptListener { socket, file }) => {
                Some(KeptListener { socket: name(socket)?, file })
            }
            None => None,
        };
        let session = session.map(|life| life.try_map(name)).transpose()?;
        Ok(Record { device, next_serial, listener, session })
    }
}

impl<F> Life<F> {
    fn try_map<G, E>(self, name: &mut impl FnMut(F) -> Result<G, E>) -> Result<Life<G>, E> {
        let Self { connection, channel, session, inflight, config, device, kept } = self;
        let connection = name(connection)?;
        let channel = channel.map(&mut *name).transpose()?;
        let session = session.try_map(name)?;
        let inflight = match inflight {
            Some(KeptInflight { queue_count, queue_size, file_offset_bytes, file, is_ours }) => {
                let file = name(file)?;
                Some(KeptInflight { queue_count, queue_size, file_offset_bytes, file, is_ours })
            }
            None => None,
        };
        Ok(Life { connection, channel, session, inflight, config, device, kept })
    }
}

/// A record whose descriptors are at hand.
pub(in crate::daemon) type HeldLife = Life<Arc<OwnedFd>>;
pub(super) type HeldRecord = Record<Arc<OwnedFd>>;
