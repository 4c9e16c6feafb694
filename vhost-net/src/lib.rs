//! `vhost-net`: a network as a virtio network device, served to one virtual machine over vhost-user.
//!
//! The daemon is one function, [`run`]; `main.rs` calls it. A library, so that a fuzzer reaches the
//! device ([`open`], with the feature `fuzzing`); nothing else is public.

mod announcement;
mod args;
mod backend;
mod capture;
mod command;
mod config;
mod control;
mod device;
mod drops;
mod filter;
mod header;
mod kept;
mod outbox;
mod rx;
mod source;
mod tx;

use std::ffi::OsString;
use std::process::ExitCode;

use common::daemon::{capabilities, serve};
use common::device::Device;

use crate::args::Options;
use crate::backend::{Backend, OpenError, Settings};
use crate::capture::{Capture, CaptureError};
use crate::config::{Identity, Mac, Offer, State, features};
use crate::device::{NetDevice, Port};

/// What `--print-capabilities` lists: vhost-user has no words for a network's options.
const CAPABILITIES: &[&str] = &[];

/// The whole daemon, with these arguments, the program's name first.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if capabilities::requested(arguments.iter().skip(1).cloned()) {
        return match capabilities::print(NetDevice::NAME, CAPABILITIES) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_closed) => ExitCode::FAILURE,
        };
    }
    let options = match args::parse(arguments) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    serve::run(&options.daemon, &options.limits, || device(&options))
}

/// The device that a daemon with these arguments serves.
///
/// # Errors
/// As [`run`] would say it.
#[cfg(feature = "fuzzing")]
pub fn open(arguments: impl IntoIterator<Item = OsString>) -> Result<impl Device, String> {
    let options = args::parse(arguments).map_err(|error| error.to_string())?;
    device(&options).map_err(|error| error.to_string())
}

fn device(options: &Options) -> Result<NetDevice, NoNetwork> {
    let Options { identity, vlan, only_mac, .. } = *options;
    let settings = Settings {
        pairs: identity.queue_pairs,
        mtu: identity.mtu,
        bridge: options.bridge.clone(),
        address: identity.mac.map(Mac::bytes),
    };
    let backend = Backend::open(&options.backend, settings).map_err(NoNetwork::Backend)?;
    let capture = options.capture.as_ref().map(Capture::begin).transpose();
    let capture = capture.map_err(NoNetwork::Capture)?;
    // The guest of a macvtap is reached by the address that this has.
    let mac = identity.mac.or(backend.address().map(Mac::new));
    let identity = Identity { mac, ..identity };
    let offer = Offer {
        from_driver: backend.offloads(),
        to_driver: backend.offloads(),
        queue_pairs: identity.queue_pairs,
        has_mac: identity.mac.is_some(),
        has_mtu: identity.mtu.is_some(),
        has_speed: identity.speed_mbps.is_some(),
        only_mac,
    };
    let port = Port { vlan, only_mac, capture, queue_size_max: options.queue_size };
    Ok(NetDevice::new(backend, State::new(identity), port, features(&offer)))
}

/// The network cannot be served; the source says why.
#[derive(Debug, thiserror::Error)]
enum NoNetwork {
    #[error("no network (--backend, --tap-fd)")]
    Backend(#[source] OpenError),
    #[error("no capture (--pcap)")]
    Capture(#[source] CaptureError),
}
