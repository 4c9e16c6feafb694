//! What executes a device's I/O: the only place that makes system calls for a running ring.
//!
//! Contract: a device names an [`Op`]; the engine runs it and gives back one [`Completion`] with
//! the same [`Token`]. The buffers that an operation names stay mapped and unused by others until
//! then: the virtqueue's slot sees to that. The [`Op`] enum is the whole system-call surface of
//! every device, so sandbox rules can be read off it.
//!
//! [`uring`] is the engine: everything that a turn of the worker's loop has to say to the kernel
//! goes into one `io_uring_enter`, which also waits.

mod op;
mod uring;

pub(crate) use self::op::Subject;
pub use self::op::{Completion, FileIndex, Op, Token, Zeroing};
pub(crate) use self::uring::Event;
pub use self::uring::{EngineError, Uring, Wait};
