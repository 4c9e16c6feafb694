//! What the control socket can ask of a console device, beside what all devices are asked.
//!
//! Contract: an answer is computed at once. What is asked is a JSON object whose members are all known; an error names
//! the port or the viewer that it is about.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::num::NonZeroU16;

use common::daemon::log::with_sources;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::Size;
use crate::endpoint::Endpoint;
use crate::hub::Hub;
use crate::port_spec::PortSpec;

/// What there is, for the error that lists it.
pub(crate) const COMMANDS: &[&str] =
    &["ports", "port-add", "port-remove", "size", "take-over", "release", "who"];

/// What can be asked, by the `command` member.
#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    // The braces have serde refuse members where there are none, by their names.
    /// All ports.
    Ports {},
    /// Plug in the port that this says, as `--port` has it.
    PortAdd { port: String },
    /// Take a port out.
    PortRemove { port: String },
    /// A console has this size.
    Size { port: String, columns: NonZeroU16, rows: NonZeroU16 },
    /// This viewer is the writer.
    TakeOver { viewer: String },
    /// This viewer is the writer no longer.
    Release { viewer: String },
    /// Who is there beside this viewer.
    Who { viewer: String },
}

/// What is answered: the value of `ok` or the text of `error`. `None`: it is no command of this device.
pub(crate) fn answer(hub: &Hub, line: &Value) -> Option<Result<Value, String>> {
    let name = line.get("command")?.as_str()?;
    if !COMMANDS.contains(&name) {
        return None;
    }
    let command = Command::deserialize(line);
    Some(command.map_err(|error| format!("{name}: {error}")).and_then(|command| obey(hub, command)))
}

fn obey(hub: &Hub, command: Command) -> Result<Value, String> {
    match command {
        Command::Ports {} => Ok(hub.describe()),
        Command::PortAdd { port } => {
            let spec = port.parse::<PortSpec>().map_err(|error| with_sources(&error))?;
            let id = hub.plug(&spec).map_err(|error| with_sources(&error))?;
            Ok(json!({ "id": id }))
        }
        Command::PortRemove { port } => {
            let id = hub.unplug(&port).map_err(|error| error.to_string())?;
            Ok(json!({ "id": id }))
        }
        Command::Size { port, columns, rows } => {
            let id = hub.find(&port).map_err(|error| error.to_string())?;
            if !hub.is_console(id) {
                return Err(format!("port {port:?} is no console: it has no size"));
            }
            let size = Size { columns: columns.get(), rows: rows.get() };
            hub.set_size(id, size);
            Ok(json!({ "id": id, "columns": size.columns, "rows": size.rows }))
        }
        Command::TakeOver { viewer } => {
            let taken = hub.ask(|endpoint| endpoint.viewers()?.take_over(&viewer));
            taken.ok_or_else(|| no_viewer(&viewer))?.1?;
            who(hub, &viewer)
        }
        Command::Release { viewer } => {
            let released = hub.ask(|endpoint| endpoint.viewers()?.release(&viewer));
            released.ok_or_else(|| no_viewer(&viewer))?;
            who(hub, &viewer)
        }
        Command::Who { viewer } => who(hub, &viewer),
    }
}

/// This viewer, at which port it is, and all who are there.
fn who(hub: &Hub, viewer: &str) -> Result<Value, String> {
    let there = |endpoint: &Endpoint| {
        let viewers = endpoint.viewers()?;
        Some((viewers.describe_viewer(viewer)?, viewers.describe_viewers()))
    };
    let (id, (own, all)) = hub.ask(there).ok_or_else(|| no_viewer(viewer))?;
    let role = own.get("role").cloned().unwrap_or_default();
    Ok(json!({ "port": id, "name": hub.name(id), "role": role, "viewers": all }))
}

fn no_viewer(viewer: &str) -> String {
    format!("there is no viewer {viewer:?}")
}
