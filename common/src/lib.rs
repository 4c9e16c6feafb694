//! The runtime that every Outboard device shares.
//!
//! This page is the map; it holds no code. Modules stand in the order in which the bytes travel.
//!
//! | module | turns | into |
//! |---|---|---|
//! | [`daemon`] | options and sockets | a process's life: open, listen, serve, drain |
//! | [`protocol`] | bytes on the vhost-user socket | messages |
//! | [`session`] | messages | what the rings and the memory should be; no I/O |
//! | [`worker`] | kicks | the loop: pop, submit, complete, used, call |
//! | [`device`] | chains | operations: the contract that a device implements |
//! | [`virtqueue`] | a ring in guest memory | chains, and used entries back |
//! | [`engine`] | operations | results: the only place that makes a device's system calls |
//! | [`memory`] | guest addresses | host bytes |
//! | [`metrics`] | events | counters that anyone may read at any time |
//! | [`rate_limit`] | requests | the times at which they may go |
//! | [`sandbox`] | what a thread needs | a thread that can do no more |
//! | `simulation` | a seed | a worker without thread, kernel and clock, for tests only |
//!
//! One arrow is allowed: `daemon → session → worker → {device, virtqueue, engine} → memory`, with
//! `protocol` below `session`, `metrics`, `rate_limit` and `sandbox` below all. `tests/tidy.rs` fails on one that points
//! the other way.

pub mod daemon;
pub mod device;
pub mod engine;
pub mod memory;
pub mod metrics;
pub mod protocol;
pub mod rate_limit;
pub mod sandbox;
pub mod session;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod virtqueue;
pub mod worker;
