//! A process's life: options → open → listen → serve → drain.
//!
//! A daemon's `main` parses its options, and gives [`serve::run`] a closure that opens its device.
//! Everything else is here, once for all devices: sockets and who may reach them ([`listener`]),
//! one front end after another ([`serve`], [`front_end`]), the engine that workers get ([`aio`]), the
//! operator's questions ([`control`], [`operator`]), what the main thread may do once all is open ([`confinement`]), a device
//! that grows ([`refresh`]), what a killed daemon still has open ([`predecessor`]) and what it has left on purpose ([`store`]),
//! the service manager ([`notify`], [`watchdog`]) and the log ([`log`]).
//!
//! All of it runs on the main thread, on one `tokio` runtime, and never touches a running ring.

pub mod aio;
pub mod capabilities;
mod confinement;
pub mod control;
mod front_end;
pub mod listener;
pub mod log;
pub mod notify;
mod operator;
pub mod options;
pub mod predecessor;
mod refresh;
pub mod serve;
mod store;
mod watchdog;

pub use self::options::DaemonOptions;
