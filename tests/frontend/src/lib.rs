//! A scripted vhost-user front end, with the driver side of virtio block and network devices: what the tests
//! talk to a back end with.
//!
//! It shares no code with the daemons, so that a misreading of the specification cannot hide in a
//! type that both sides use. From the socket upwards:
//!
//! - [`message`]: the numbers and layouts of vhost-user messages.
//! - [`wire`]: bytes and file descriptors over the socket, well formed or not, with a limit on
//!   every wait.
//! - [`front_end`]: one method a request, for the tests that want the protocol to work.
//! - [`memory`]: guest memory in memfds, shared with the back end; the only module with `unsafe`.
//! - [`notifier`]: kick, call and err descriptors as eventfd, pipe or socket, empty or full.
//! - [`ring`]: a split virtqueue's fields, each readable and writable on its own; and
//!   [`virtqueue`], a driver that plays by the rules.
//! - [`block`]: the requests of a virtio block device; [`net`]: the frames and commands of a network
//!   device; [`guest`]: a whole driver, from connection to running queues.
//!
//! It deliberately offers no retries and no reconnection: a test that expects a hang-up must see
//! it.

pub mod block;
pub mod console;
mod error;
pub mod front_end;
pub mod guest;
pub mod inflight;
pub mod memory;
pub mod message;
pub mod net;
pub mod notifier;
pub mod ring;
pub mod virtqueue;
pub mod wire;

pub use error::Error;
