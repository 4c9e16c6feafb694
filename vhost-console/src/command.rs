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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{COMMANDS, answer};
    use crate::endpoint::stage::{Peer, Stage};

    fn ask(stage: &Stage, line: Value) -> Result<Value, String> {
        answer(&stage.hub, &line).expect("a command of the device's")
    }

    fn refusal(stage: &Stage, line: Value) -> String {
        ask(stage, line).expect_err("the command is wrong")
    }

    /// The roles of the first port's viewers.
    fn roles(stage: &Stage) -> Vec<Value> {
        let ports = ask(stage, json!({ "command": "ports" })).unwrap();
        let viewers = ports[0]["endpoints"][0]["viewers"].as_array().unwrap();
        viewers.iter().map(|viewer| viewer["role"].clone()).collect()
    }

    async fn until_roles_are(stage: &Stage, expected: &[&str]) {
        while roles(stage) != expected {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn command_of_another_kind_is_not_the_devices() {
        let stage = Stage::new(1);
        for line in [json!({ "command": "stats" }), json!({}), json!([]), json!({ "command": 1 })] {
            assert!(answer(&stage.hub, &line).is_none(), "{line}");
        }
        for command in COMMANDS {
            let answered = answer(&stage.hub, &json!({ "command": command, "wrong": 1 }));
            let error = answered.unwrap().unwrap_err();
            assert!(error.contains(command) && error.contains("wrong"), "{error}");
        }
    }

    #[test]
    fn ports_are_listed_with_what_went_through_them() {
        let stage = Stage::new(2);
        let mut guest = stage.plug_unix("con0", true);
        let _data = stage.plug_unix("data", false);
        stage.play(async || {
            let mut viewer = Peer::connect(&stage.path("con0")).await;
            until_roles_are(&stage, &["writer"]).await;
            guest.write(b"12345").await;
            viewer.expect(b"12345").await;
            viewer.write(b"abc").await;
            guest.read_exactly(3).await;
        });
        let ports = ask(&stage, json!({ "command": "ports" })).unwrap();
        let console = &ports[0];
        assert_eq!(console["name"], "con0");
        assert_eq!((&console["console"], &console["guest_open"]), (&json!(true), &json!(true)));
        assert_eq!((&console["columns"], &console["rows"]), (&json!(80), &json!(24)));
        assert_eq!((&console["bytes_out"], &console["bytes_in"]), (&json!(5), &json!(3)));
        assert_eq!(console["endpoints"][0]["kind"], "unix");
        let data = &ports[1];
        assert_eq!((&data["id"], &data["name"]), (&json!(1), &json!("data")));
        assert_eq!((&data["columns"], &data["host_open"]), (&Value::Null, &json!(false)));
        assert_eq!(data["endpoints"][0]["client"], Value::Null);
    }

    #[test]
    fn roles_are_taken_over_and_released() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("con0", true);
        let path = stage.path("con0");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            until_roles_are(&stage, &["writer"]).await;
            let mut second = Peer::connect(&path).await;
            until_roles_are(&stage, &["writer", "watcher"]).await;
            let taken = ask(&stage, json!({ "command": "take-over", "viewer": "2" })).unwrap();
            assert_eq!((&taken["role"], &taken["name"]), (&json!("writer"), &json!("con0")));
            assert_eq!(taken["viewers"].as_array().unwrap().len(), 2);
            first.write(b"not heard").await;
            second.write(b"heard").await;
            assert_eq!(guest.read_exactly(5).await, b"heard");
            let released = ask(&stage, json!({ "command": "release", "viewer": "2" })).unwrap();
            assert_eq!(released["role"], "watcher");
            assert_eq!(roles(&stage), ["watcher", "watcher"]);
            let who = ask(&stage, json!({ "command": "who", "viewer": "1" })).unwrap();
            assert_eq!((&who["port"], &who["role"]), (&json!(0), &json!("watcher")));
            for command in ["take-over", "release", "who"] {
                let error = refusal(&stage, json!({ "command": command, "viewer": "9" }));
                assert!(error.contains("\"9\""), "{error}");
            }
        });
    }

    #[test]
    fn paste_that_waits_stops_when_another_takes_over() {
        let stage = Stage::new(1);
        let mut guest = stage.plug_unix("con0", true);
        guest.port().set_guest_open(false);
        let path = stage.path("con0");
        stage.play(async || {
            let mut first = Peer::connect(&path).await;
            until_roles_are(&stage, &["writer"]).await;
            first.write(&[b'x'; 100_000]).await;
            guest.until(|port| port.inbox().room() < 20_000).await;
            let mut second = Peer::connect(&path).await;
            until_roles_are(&stage, &["writer", "watcher"]).await;
            ask(&stage, json!({ "command": "take-over", "viewer": "2" })).unwrap();
            second.write(b"stop").await;
            guest.port().set_guest_open(true);
            let mut read = Vec::new();
            while !read.ends_with(b"stop") {
                read.extend(guest.read().await);
            }
            assert!(read.len() < 70_000, "{} bytes", read.len());
        });
    }

    #[test]
    fn size_is_a_consoles() {
        let stage = Stage::new(2);
        let _console = stage.plug_unix("con0", true);
        let _data = stage.plug_unix("data", false);
        let size = |port: &str, columns: u32| json!({ "command": "size", "port": port, "columns": columns, "rows": 43 });
        ask(&stage, size("con0", 132)).unwrap();
        let ports = ask(&stage, json!({ "command": "ports" })).unwrap();
        assert_eq!((&ports[0]["columns"], &ports[0]["rows"]), (&json!(132), &json!(43)));
        ask(&stage, size("0", 133)).unwrap();
        for (port, columns, word) in [
            ("data", 80, "\"data\""),
            ("none", 80, "\"none\""),
            ("con0", 0, "nonzero"),
            ("7", 80, "\"7\""),
        ] {
            let error = refusal(&stage, size(port, columns));
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn port_is_removed_by_name_or_number() {
        let stage = Stage::new(2);
        let _console = stage.plug_unix("con0", true);
        let _data = stage.plug_unix("data", false);
        ask(&stage, json!({ "command": "port-remove", "port": "data" })).unwrap();
        ask(&stage, json!({ "command": "port-remove", "port": "0" })).unwrap();
        let error = refusal(&stage, json!({ "command": "port-remove", "port": "0" }));
        assert!(error.contains("\"0\""), "{error}");
        assert_eq!(ask(&stage, json!({ "command": "ports" })).unwrap(), json!([]));
        assert!(!stage.path("data").exists() && !stage.path("con0").exists());
    }
}
