//! User-Mode Linux guests on the console daemon.

use std::path::Path;

use tests::{Device, Machine, Rig, UserModeLinux};

use super::{FrontEnd, coming_and_going, figures, logs, people, ports};

struct Uml(UserModeLinux);

impl Uml {
    /// `None`: it cannot run here, and has said why.
    fn new() -> Option<Self> {
        Some(Self(UserModeLinux::with_console(Rig::find()?)))
    }
}

impl FrontEnd for Uml {
    fn stream_bytes(&self) -> u64 {
        1 << 30
    }

    fn boot(&self, socket: &Path, words: &[&str]) -> Machine {
        self.0.boot(&[Device::Console(socket)], "console", words)
    }

    fn finish(&self, machine: Machine) {
        UserModeLinux::finish(machine);
    }
}

#[test]
fn people_log_in_and_resize_and_come_late() {
    let Some(front_end) = Uml::new() else { return };
    people::log_in(&front_end);
}

#[test]
fn people_log_in_at_a_terminal() {
    let Some(front_end) = Uml::new() else { return };
    people::log_in_at_a_terminal(&front_end);
}

#[test]
fn panic_is_read_afterwards() {
    let Some(front_end) = Uml::new() else { return };
    people::read_a_panic(&front_end);
}

#[test]
fn one_who_looks_away_holds_up_nobody() {
    let Some(front_end) = Uml::new() else { return };
    people::look_away(&front_end);
}

#[test]
fn speed_is_printed() {
    let Some(front_end) = Uml::new() else { return };
    figures::of_ours(&front_end, "User-Mode Linux, vhost-console");
}

#[test]
fn named_ports_carry_streams() {
    let Some(front_end) = Uml::new() else { return };
    ports::carry_streams(&front_end);
}

#[test]
fn ports_are_open_while_there_is_a_client() {
    let Some(front_end) = Uml::new() else { return };
    ports::are_open_while_there_is_a_client(&front_end);
}

#[test]
fn paste_arrives_whole_and_in_order() {
    let Some(front_end) = Uml::new() else { return };
    ports::take_a_paste(&front_end);
}

#[test]
fn ports_come_and_go() {
    let Some(front_end) = Uml::new() else { return };
    coming_and_going::ports_come_and_go(&front_end);
}

#[test]
fn logs_rotate_and_lose_nothing() {
    let Some(front_end) = Uml::new() else { return };
    logs::rotate_and_lose_nothing(&front_end);
}

#[test]
fn full_disk_does_not_stop_the_guest() {
    let Some(front_end) = Uml::new() else { return };
    logs::live_with_a_full_disk(&front_end);
}
