//! What becomes of a write before it is answered, and who may change that.
//!
//! [`CacheMode`] is the operator's choice, in QEMU's words and with QEMU's meaning; [`WriteCache`]
//! is what the driver sees of it and may switch: write-back, where an answered write is stable after
//! a flush only, or write-through, where it is stable when it is answered.
//!
//! Contract: whoever executes writes asks [`WriteCache::submits_stable`] when it names a write that
//! could be stable by itself and is the whole of its request, and [`WriteCache::must_sync`] before it answers a request of
//! which something was not written stably. So a write is stable if the cache is write-through at
//! either end of it. VIRTIO 1.3, 5.2.6.2 leaves a switch in the middle of a write undefined; but
//! drivers do switch while writes are in flight, and send no flush ever after.
//!
//! A host that fails a sync forgets what it had not written: it tells so once for each open
//! description, and a second sync there succeeds although the data is gone. So nothing is called stable any more once a sync has failed
//! ([`WriteCache::lose`]), until the daemon is started anew.
//!
//! What it does not do: any I/O. [`WriteCache::settle`] is given the sync to make.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;

/// How the host's cache is used, as QEMU's `cache=` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheMode {
    /// Not the host's cache (O_DIRECT); writes are stable when the guest flushes
    None,
    /// The host's cache; writes are stable when the guest flushes
    #[default]
    Writeback,
    /// The host's cache; each write is stable before it completes
    Writethrough,
    /// Not the host's cache (O_DIRECT); each write is stable before it completes
    Directsync,
    /// The host's cache; flushes are ignored, and a crash of the host may lose all
    Unsafe,
}

/// What a mode means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caching {
    /// Data moves past the host's page cache.
    pub(super) direct: bool,
    /// The driver finds a write-back cache, until it says otherwise.
    pub(super) write_back: bool,
    /// Data is ever made stable on demand.
    pub(super) syncs: bool,
}

impl CacheMode {
    pub(super) fn caching(self) -> Caching {
        let (direct, write_back, syncs) = match self {
            Self::None => (true, true, true),
            Self::Writeback => (false, true, true),
            Self::Writethrough => (false, false, true),
            Self::Directsync => (true, false, true),
            Self::Unsafe => (false, true, false),
        };
        Caching { direct, write_back, syncs }
    }
}

/// Where the cache stands; the lower two bits of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    WriteBack = 0,
    /// Write-through, but what was answered before may not be stable yet: until it is, a write
    /// that became stable by itself could overtake an older one that the driver takes for stable.
    Settling = 1,
    WriteThrough = 2,
}

/// The bits of a state that are its [`Stand`]; above them is the number of switches before.
const STAND_BITS: u32 = 2;

/// The driver's view of the cache: shared by all queues, switched by the control plane.
#[derive(Debug)]
pub(crate) struct WriteCache {
    caching: Caching,
    state: AtomicU64,
    /// A sync has failed.
    lost: AtomicBool,
    /// Whether somebody is settling. The control plane's; no queue looks at it.
    settles: Mutex<bool>,
}

impl WriteCache {
    pub(super) fn new(caching: Caching) -> Self {
        let stand = if caching.write_back { Stand::WriteBack } else { Stand::WriteThrough };
        Self {
            caching,
            state: AtomicU64::new(stand as u64),
            lost: AtomicBool::new(false),
            settles: Mutex::new(false),
        }
    }

    /// Whether the driver may expect a write-back cache.
    pub(crate) fn is_write_back(&self) -> bool {
        stand(self.state.load(Ordering::Relaxed)) == Stand::WriteBack
    }

    /// Whether anything is ever made stable.
    pub(crate) fn syncs(&self) -> bool {
        self.caching.syncs
    }

    /// A sync has failed, or a write that was to be stable: what was written before may be lost.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Relaxed);
    }

    /// Whether something may be lost that a driver was to find stable. Asked before it is told that
    /// something is: also by who has just had a sync that succeeded, since the data may be that of
    /// which an earlier one was told.
    pub(crate) fn has_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether a write that is submitted now is to be stable when it ends. If not, ask
    /// [`must_sync`](Self::must_sync) when it has.
    pub(crate) fn submits_stable(&self) -> bool {
        self.caching.syncs && stand(self.state.load(Ordering::Relaxed)) == Stand::WriteThrough
    }

    /// Whether a request of which something was written, not stably, must have a sync before it is
    /// answered. Asked after the write has ended.
    pub(crate) fn must_sync(&self) -> bool {
        // Pairs with the fence in `switch`: either this sees the switch, or the sync that follows
        // the switch sees the data that was written before this was asked. Without both, each side
        // could miss the other, as neither reads what the other writes before.
        fence(Ordering::SeqCst);
        self.caching.syncs && !self.is_write_back()
    }

    /// The driver (`to_write_back`) switches; true when somebody must [`settle`](Self::settle).
    pub(crate) fn switch(&self, to_write_back: bool) -> bool {
        let old = self.state.load(Ordering::Relaxed);
        if self.is_write_back() == to_write_back {
            return false;
        }
        let new = match (to_write_back, self.caching.syncs) {
            (true, _) => Stand::WriteBack,
            (false, true) => Stand::Settling,
            (false, false) => Stand::WriteThrough,
        };
        let switches = (old >> STAND_BITS) + 1;
        self.state.store(switches << STAND_BITS | new as u64, Ordering::Relaxed);
        // Pairs with the fence in `must_sync`.
        fence(Ordering::SeqCst);
        let mut settles = self.settles.lock().unwrap_or_else(PoisonError::into_inner);
        new == Stand::Settling && !std::mem::replace(&mut *settles, true)
    }

    /// The driver has reset the device: back to the operator's choice, if that is write-through;
    /// true when somebody must [`settle`](Self::settle).
    ///
    /// A driver's own choice of write-through stays. VIRTIO leaves the mode after a reset to the
    /// device (1.3, 5.2.5: "can be either"), and a front end may not hear of a change: QEMU reads
    /// the configuration space once, and tells drivers what they have written to it since. A driver
    /// that is told write-through sends no flush, so the cache must not be write-back then.
    pub(crate) fn reset(&self) -> bool {
        !self.caching.write_back && self.switch(false)
    }

    /// Makes what was answered before a switch to write-through stable, by `sync`; returns when no
    /// switch is left to do that for.
    ///
    /// # Errors
    /// That of `sync`; from then on each write fails, which tells the driver.
    pub(crate) fn settle(&self, mut sync: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        loop {
            let before = self.state.load(Ordering::Relaxed);
            let synced = if stand(before) == Stand::Settling { sync() } else { Ok(()) };
            if synced.is_err() {
                self.lose();
            }
            let mut settles = self.settles.lock().unwrap_or_else(PoisonError::into_inner);
            if synced.is_ok() && stand(before) == Stand::Settling {
                let settled = (before >> STAND_BITS) << STAND_BITS | Stand::WriteThrough as u64;
                // A driver that has switched to and fro meanwhile has written what the sync did
                // not see.
                let _ = self.state.compare_exchange(
                    before,
                    settled,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
            }
            let is_settled = stand(self.state.load(Ordering::Relaxed)) != Stand::Settling;
            if is_settled || synced.is_err() {
                *settles = false;
                return synced;
            }
        }
    }
}

fn stand(state: u64) -> Stand {
    match state & ((1 << STAND_BITS) - 1) {
        0 => Stand::WriteBack,
        1 => Stand::Settling,
        _ => Stand::WriteThrough,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(mode: CacheMode) -> WriteCache {
        WriteCache::new(mode.caching())
    }

    #[test]
    fn modes_mean_what_qemu_means() {
        let table = [
            (CacheMode::None, [true, true, true]),
            (CacheMode::Writeback, [false, true, true]),
            (CacheMode::Writethrough, [false, false, true]),
            (CacheMode::Directsync, [true, false, true]),
            (CacheMode::Unsafe, [false, true, false]),
        ];
        for (mode, expected) in table {
            let Caching { direct, write_back, syncs } = mode.caching();
            assert_eq!([direct, write_back, syncs], expected, "{mode:?}");
        }
        assert_eq!(CacheMode::value_variants().len(), table.len());
    }

    #[test]
    fn write_is_stable_where_the_cache_is_write_through_at_either_end() {
        let cache = cache(CacheMode::Writeback);
        assert!(!cache.submits_stable() && !cache.must_sync());
        assert!(cache.switch(false), "somebody must settle");
        assert!(!cache.submits_stable() && cache.must_sync(), "older writes come first");
        cache.settle(|| Ok(())).unwrap();
        assert!(cache.submits_stable() && cache.must_sync());
        assert!(!cache.switch(true));
        assert!(!cache.submits_stable() && !cache.must_sync());
    }

    #[test]
    fn only_one_settles_and_it_goes_on_while_there_are_switches() {
        let cache = cache(CacheMode::Writeback);
        assert!(cache.switch(false));
        let mut syncs = 0;
        cache
            .settle(|| {
                syncs += 1;
                if syncs < 3 {
                    assert!(!cache.switch(true) && !cache.switch(false), "it is being done");
                }
                assert!(!cache.submits_stable());
                Ok(())
            })
            .unwrap();
        assert_eq!(syncs, 3, "once for each switch");
        assert!(cache.submits_stable());
    }

    #[test]
    fn switch_back_leaves_nothing_to_settle() {
        let cache = cache(CacheMode::Writeback);
        assert!(cache.switch(false) && !cache.switch(true));
        cache.settle(|| panic!("the cache is write-back")).unwrap();
        assert!(cache.is_write_back() && cache.switch(false), "the next switch needs one again");
    }

    #[test]
    fn failed_sync_is_not_forgotten() {
        let cache = cache(CacheMode::Writeback);
        assert!(cache.switch(false));
        assert!(cache.settle(|| Err(io::Error::other("broken"))).is_err());
        assert!(!cache.submits_stable() && cache.must_sync() && !cache.is_write_back());
        assert!(cache.has_lost());
    }

    #[test]
    fn unsafe_cache_never_syncs_whatever_the_driver_wants() {
        let cache = cache(CacheMode::Unsafe);
        assert!(cache.is_write_back() && !cache.must_sync());
        assert!(!cache.switch(false), "nothing to settle");
        assert!(!cache.is_write_back() && !cache.submits_stable() && !cache.must_sync());
    }

    #[test]
    fn reset_takes_write_back_away_and_never_gives_it() {
        let chosen = cache(CacheMode::Writethrough);
        chosen.switch(true);
        assert!(chosen.reset() && !chosen.is_write_back());
        let default = cache(CacheMode::Writeback);
        default.switch(false);
        assert!(!default.reset() && !default.is_write_back());
    }
}
