//! Conformance: a real back-end process, driven message by message over a real socket.
//!
//! The other side of every conversation is `tests/frontend`, which shares no code with the daemons.
//! The suites, from the outside in:
//!
//! - [`life`], [`activation`], [`access`], [`image`], [`control`]: the process, its sockets, its
//!   image and its counters; these are about our own command line.
//! - [`engine`]: which engine is chosen, on hosts that forbid io_uring, too; [`sandbox`]: how its threads are held.
//! - [`limits`], [`resize`]: requests that are held to a rate, and a disk that grows while it is used.
//! - [`host_limits`]: a host that takes less than it is given, or cannot do what others can.
//! - [`stability`]: whether data is on storage when the driver may count on it; [`cache`]: what the
//!   driver is told of that, and may switch.
//! - [`direct`], [`block_devices`]: what direct I/O and devices with large blocks cannot take as it
//!   comes, with [`scattered`] data.
//! - [`negotiation`], [`configuration`], [`memory_table`], [`requests`], [`rings`],
//!   [`fairness`], [`notification`]: what a well-behaved front end and driver may rely on.
//! - [`acknowledgement`], [`offers`], [`release`], [`ring_fields`], [`suspension`]: duties of the
//!   specifications that no driver would notice soon if they were neglected.
//! - [`inflight`], [`succession`]: what a daemon that is killed leaves to the next one, by its front end or by the service
//!   manager.
//! - [`network_frames`], [`network_commands`], [`network_offloads`], [`network_life`]: a network device's
//!   frames and headers, its control queue, and what vhost-user has for networks alone.
//! - [`hostile_messages`], [`half_messages`], [`untimely`], [`hostile_memory`],
//!   [`hostile_descriptors`], [`hostile_rings`], [`hostile_indexes`], [`memory_in_use`]: what they
//!   may do to us; [`growth`]: the same, a thousand times.
//!
//! [`aftermath`] is what every hostile case ends with: the process lives, the next front end is
//! served, and a well-behaved queue beside the attacked one was not disturbed. [`subject`] starts
//! the back end, ours or, with a command line in the environment, another one; [`wire`] is the other end
//! of a network's wire.

mod access;
mod acknowledgement;
mod activation;
mod aftermath;
mod block_devices;
mod cache;
mod configuration;
mod console;
mod control;
mod direct;
mod engine;
mod fairness;
mod growth;
mod half_messages;
mod host_limits;
mod hostile_descriptors;
mod hostile_indexes;
mod hostile_memory;
mod hostile_messages;
mod hostile_rings;
mod image;
mod inflight;
mod launch;
mod life;
mod limits;
mod memory_in_use;
mod memory_table;
mod negotiation;
mod network_commands;
mod network_frames;
mod network_life;
mod network_offloads;
mod notification;
mod offers;
mod openmetrics;
mod release;
mod requests;
mod resize;
mod ring_attack;
mod ring_fields;
mod rings;
mod rounds;
mod sandbox;
mod scattered;
mod stability;
mod subject;
mod succession;
mod suspension;
mod untimely;
mod wire;
