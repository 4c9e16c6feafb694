//! One vring as the front end has described it, and whether that is what runs.
//!
//! Contract: [`Vring::plan`] says what the ring needs to run once everything has been said, in
//! whatever order it was. A running ring's size, base and addresses stay; a front end that wants
//! others stops it first.

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

use crate::memory::FrontendAddress;
use crate::virtqueue::RingAddresses;

/// Why a ring cannot be what a message says.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RingFault {
    #[error("size {num} is not a power of two up to {max}")]
    Size { num: u32, max: u16 },
    #[error("base {num} is not a ring index of 16 bits")]
    Base { num: u32 },
    #[error("state {num} is neither 0 nor 1")]
    State { num: u32 },
    #[error("the {area} at {at} is not aligned to {align} bytes")]
    Misaligned { area: &'static str, at: FrontendAddress, align: u64 },
    #[error("the ring is running")]
    Running,
}

/// What a ring needs to run.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Where it lies.
    pub addresses: RingAddresses,
    /// Its number of entries.
    pub size: u16,
    /// The next available entry.
    pub base: u16,
    /// Where kicks come from; `None`: it is polled.
    pub kick: Option<Arc<OwnedFd>>,
    /// Where calls go to.
    pub call: Option<Arc<OwnedFd>>,
    /// Where errors go to.
    pub error: Option<Arc<OwnedFd>>,
}

/// What a front end has said of a vring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    size: Option<u16>,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: KickState,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) error: Option<Arc<OwnedFd>>,
    /// By `SET_VRING_ENABLE`, which may come before anything else (QEMU's network device), or by
    /// `SET_FEATURES`.
    enabled: bool,
    running: Running,
}

/// vhost-user, "Ring states": a ring without a kick is stopped.
#[derive(Debug, Default)]
enum KickState {
    #[default]
    Stopped,
    Polled,
    Descriptor(Arc<OwnedFd>),
}

#[derive(Debug, Default, PartialEq)]
enum Running {
    #[default]
    No,
    Yes,
    /// Running with a kick that has been replaced.
    Outdated,
}

/// A vring written down, with descriptors named by `F`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedRing<F> {
    size: Option<u16>,
    base: u16,
    /// Descriptor table, available ring, used ring.
    addresses: Option<[u64; 3]>,
    kick: SavedKick<F>,
    call: Option<F>,
    error: Option<F>,
    enabled: bool,
    /// It is on its worker.
    pub(super) running: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum SavedKick<F> {
    Stopped,
    Polled,
    Descriptor(F),
}

impl<F> SavedRing<F> {
    pub(super) fn try_map<G, E>(
        self,
        name: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<SavedRing<G>, E> {
        let kick = match self.kick {
            SavedKick::Stopped => SavedKick::Stopped,
            SavedKick::Polled => SavedKick::Polled,
            SavedKick::Descriptor(fd) => SavedKick::Descriptor(name(fd)?),
        };
        let Self { size, base, addresses, enabled, running, .. } = self;
        let call = self.call.map(&mut *name).transpose()?;
        let error = self.error.map(&mut *name).transpose()?;
        Ok(SavedRing { size, base, addresses, kick, call, error, enabled, running })
    }
}

impl Vring {
    pub(super) fn save(&self) -> SavedRing<Arc<OwnedFd>> {
        let kick = match &self.kick {
            KickState::Stopped => SavedKick::Stopped,
            KickState::Polled => SavedKick::Polled,
            KickState::Descriptor(fd) => SavedKick::Descriptor(Arc::clone(fd)),
        };
        let addresses = self.addresses.map(|at| [at.descriptor.0, at.available.0, at.used.0]);
        SavedRing {
            size: self.size,
            base: self.base,
            addresses,
            kick,
            call: self.call.clone(),
            error: self.error.clone(),
            enabled: self.enabled,
            running: self.is_running(),
        }
    }

    /// The vring that was described so. It does not run.
    pub(super) fn restore(saved: SavedRing<Arc<OwnedFd>>, max: u16) -> Result<Self, RingFault> {
        let mut ring = Self { call: saved.call, error: saved.error, ..Self::default() };
        if let Some(size) = saved.size {
            ring.set_size(size.into(), max)?;
        }
        ring.base = saved.base;
        if let Some([descriptor, available, used]) = saved.addresses {
            let [descriptor, available, used] = [descriptor, available, used].map(FrontendAddress);
            ring.set_addresses(descriptor, available, used)?;
        }
        ring.enabled = saved.enabled;
        ring.kick = match saved.kick {
            SavedKick::Stopped => KickState::Stopped,
            SavedKick::Polled => KickState::Polled,
            SavedKick::Descriptor(fd) => KickState::Descriptor(fd),
        };
        Ok(ring)
    }

    pub(super) fn set_size(&mut self, num: u32, max: u16) -> Result<(), RingFault> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= max);
        let size = size.ok_or(RingFault::Size { num, max })?;
        if self.is_running() && self.size != Some(size) {
            return Err(RingFault::Running);
        }
        self.size = Some(size);
        Ok(())
    }

    pub(super) fn set_base(&mut self, num: u32) -> Result<(), RingFault> {
        let Ok(base) = u16::try_from(num) else { return Err(RingFault::Base { num }) };
        if self.is_running() {
            return Err(RingFault::Running);
        }
        self.base = base;
        Ok(())
    }

    pub(super) fn set_addresses(
        &mut self,
        descriptor: FrontendAddress,
        available: FrontendAddress,
        used: FrontendAddress,
    ) -> Result<(), RingFault> {
        // VIRTIO 1.3, 2.7: the areas are aligned to 16, 2 and 4 bytes.
        for (area, at, align) in [
            ("descriptor table", descriptor, 16),
            ("available ring", available, 2),
            ("used ring", used, 4),
        ] {
            if !at.0.is_multiple_of(align) {
                return Err(RingFault::Misaligned { area, at, align });
            }
        }
        let addresses = Some(RingAddresses { descriptor, available, used });
        // The same addresses again are no change: QEMU sends them to toggle the log flag.
        if self.is_running() && self.addresses != addresses {
            return Err(RingFault::Running);
        }
        self.addresses = addresses;
        Ok(())
    }

    pub(super) fn set_enabled(&mut self, num: u32) -> Result<(), RingFault> {
        self.enabled = match num {
            0 => false,
            1 => true,
            num => return Err(RingFault::State { num }),
        };
        Ok(())
    }

    /// Enables the ring of a front end that has no message for it.
    pub(super) fn enable(&mut self) {
        self.enabled = true;
    }

    pub(super) fn set_kick(&mut self, fd: Option<Arc<OwnedFd>>) {
        self.kick = fd.map_or(KickState::Polled, KickState::Descriptor);
        if self.is_running() {
            self.running = Running::Outdated;
        }
    }

    /// vhost-user, "Ring states": `GET_VRING_BASE` stops the ring.
    pub(super) fn stop(&mut self) {
        self.kick = KickState::Stopped;
    }

    /// vhost-user, "VHOST_USER_RESET_DEVICE": back to the initial state. The call and error
    /// descriptors stay: QEMU sends the latter only once.
    pub(super) fn reset(&mut self) {
        let (call, error) = (self.call.take(), self.error.take());
        *self = Self { call, error, ..Self::default() };
    }

    /// Disables the ring until the front end enables it again.
    pub(super) fn disable(&mut self) {
        self.enabled = false;
    }

    pub(super) fn started(&mut self) {
        self.running = Running::Yes;
    }

    /// A ring that was reset meanwhile has no use for the base of its former self.
    pub(super) fn stopped(&mut self, base: u16) {
        if self.is_running() {
            self.running = Running::No;
            self.base = base;
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running != Running::No
    }

    pub(super) fn is_outdated(&self) -> bool {
        self.running == Running::Outdated
    }

    pub(super) fn base(&self) -> u16 {
        self.base
    }

    /// What the ring needs to run.
    pub(super) fn plan(&self) -> Option<Ring> {
        if !self.enabled {
            return None;
        }
        let kick = match &self.kick {
            KickState::Stopped => return None,
            KickState::Polled => None,
            KickState::Descriptor(fd) => Some(Arc::clone(fd)),
        };
        Some(Ring {
            addresses: self.addresses?,
            size: self.size?,
            base: self.base,
            kick,
            call: self.call.clone(),
            error: self.error.clone(),
        })
    }
}
