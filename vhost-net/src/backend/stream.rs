//! placeholder
pub(crate) mod framing;
