//! Conformance: a real back-end process, driven message by message over a real socket.
//!
//! The other side of every conversation is `tests/frontend`, which shares no code with the daemons.
//! The suites, from the outside in:
//!
//! - [`life`], [`activation`], [`access`], [`image`], [`control`]: the process, its sockets, its
//!   image and its counters; these are about our own command line.
//! - [`host_limits`]: a host that takes less than it is given, or cannot do what others can.
//! - [`stability`]: whether data is on storage when the driver may count on it.
//! - [`negotiation`], [`configuration`], [`memory_table`], [`requests`], [`rings`],
//!   [`fairness`], [`notification`]: what a well-behaved front end and driver may rely on.
//! - [`hostile_messages`], [`hostile_memory`], [`hostile_rings`]: what they may do to us. After
//!   each case the process lives and the next front end is served; where one ring was broken, its
//!   neighbour was not.
//!
//! [`subject`] starts the back end, ours or, with a command line in the environment, another one.

mod access;
mod activation;
mod configuration;
mod control;
mod fairness;
mod host_limits;
mod hostile_memory;
mod hostile_messages;
mod hostile_rings;
mod image;
mod launch;
mod life;
mod memory_table;
mod negotiation;
mod notification;
mod openmetrics;
mod requests;
mod rings;
mod stability;
mod subject;
