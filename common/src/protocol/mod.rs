//! vhost-user: from a socket to messages that have been checked.
//!
//! [`Connection`] delivers what the front end asks for as [`Message`]s and carries the answers. All that can be known of
//! a request without knowing the session stands in one [`table`]: its payload's layout, its descriptors, the feature it
//! belongs to and the kind of its answer. [`BackendChannel`] is the way by which this side may speak unasked.
//!
//! # Contract
//! A [`Message`] has a known request, a payload of that request's layout, and as many descriptors as that asks for, so
//! that the session matches on it without checking sizes. What a front end may send wrongly arrives as a
//! [`ReceiveError`], which tells faults after which the stream is still in step from those after which it is not.
//!
//! # What it deliberately does not do
//! It keeps no state of the session: it knows neither which features were negotiated nor whether an answer is due.
//! Values such as queue indexes, addresses and flags mean nothing here.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

mod backend;
mod connection;
mod features;
mod message;
pub mod table;

pub use backend::BackendChannel;
#[cfg(feature = "fuzzing")]
pub use connection::parse;
pub use connection::{Connection, ReceiveError};
pub use features::{ProtocolFeatures, VHOST_USER_F_PROTOCOL_FEATURES};
pub use message::{MAX_PAYLOAD_BYTES, Message, Payload, Refusal};
pub use table::{Answer, Request, Row};

use message::Header;
