//! Which descriptors are readable: waiting for several at once, or for none of them.
//!
//! Contract: nothing is read. A descriptor is named by its number, as its owner (`vhost`, `kvm-ioctls`) names it; one that
//! is not open is an error, and one that is another by now is a look in vain.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Waits until one of the descriptors is readable or hung up, or the time is over; says which ones are.
pub(crate) fn wait_for<const N: usize>(
    descriptors: [Option<RawFd>; N],
    limit: Option<Duration>,
) -> io::Result<[bool; N]> {
    let epoll = Epoll::new()?;
    for (descriptor, index) in descriptors.into_iter().zip(0u64..) {
        if let Some(descriptor) = descriptor {
            let event = EpollEvent::new(EventSet::IN | EventSet::READ_HANG_UP, index);
            epoll.ctl(ControlOperation::Add, descriptor, event)?;
        }
    }
    let limit_ms = match limit {
        Some(Duration::ZERO) => 0,
        // Rounded up: less than a millisecond is no reason to turn round.
        Some(limit) => i32::try_from(limit.as_millis().saturating_add(1)).unwrap_or(i32::MAX),
        None => -1,
    };
    let mut events = [EpollEvent::default(); N];
    let count = match epoll.wait(limit_ms, &mut events) {
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
        Err(error) => return Err(error),
    };
    let mut ready = [false; N];
    for event in events.iter().take(count) {
        let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
        if let Some(ready) = ready.get_mut(index) {
            *ready = true;
        }
    }
    Ok(ready)
}
