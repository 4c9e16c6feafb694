//! Machines of QEMU's on the console daemon, by its device for back ends of any kind. It has one interrupt, and rings by its main
//! loop: these are no measurements.

use std::path::Path;

use tests::{KernelRelease, Machine, temp_dir};

use super::figures::{self, Ends};
use super::server::Client;
use super::{FrontEnd, coming_and_going, people, ports};
use crate::dialogue::Guest;
use crate::qemu::emulator::{Device, Emulator, OnRestart};
use crate::qemu::finish;

/// A machine whose device has so many queues: QEMU does not ask for the number.
struct Qemu {
    emulator: Emulator,
    queue_count: u16,
}

impl Qemu {
    /// `None`: it cannot run here, and has said why.
    fn new(release: KernelRelease, queue_count: u16) -> Option<Self> {
        Some(Self { emulator: Emulator::newest(release)?, queue_count })
    }
}

impl FrontEnd for Qemu {
    fn stream_bytes(&self) -> u64 {
        64 << 20
    }

    fn boot(&self, socket: &Path, words: &[&str]) -> Machine {
        // The console of the last word is the one that the check reads.
        let words = format!("check=console {} console=ttyS0", words.join(" "));
        let device = Device::Console(socket, self.queue_count);
        self.emulator.boot(&[device], &words, OnRestart::End)
    }

    fn finish(&self, machine: Machine) {
        finish(machine);
    }
}

/// The queues of a device with these places for ports.
fn queue_count(ports: u16) -> u16 {
    2 * ports + 2
}

#[test]
fn people_log_in_and_resize_and_come_late() {
    let Some(front_end) = Qemu::new(KernelRelease::Stable, 2) else { return };
    people::log_in(&front_end);
}

#[test]
fn people_log_in_on_the_newest_kernel() {
    let Some(front_end) = Qemu::new(KernelRelease::New, 2) else { return };
    people::log_in(&front_end);
}

#[test]
fn panic_is_read_afterwards() {
    let Some(front_end) = Qemu::new(KernelRelease::Stable, 2) else { return };
    people::read_a_panic(&front_end);
}

#[test]
fn named_ports_carry_streams() {
    let Some(front_end) = Qemu::new(KernelRelease::Stable, queue_count(3)) else { return };
    ports::carry_streams(&front_end);
}

#[test]
fn ports_are_open_while_there_is_a_client() {
    let Some(front_end) = Qemu::new(KernelRelease::Stable, queue_count(3)) else { return };
    ports::are_open_while_there_is_a_client(&front_end);
}

#[test]
fn paste_arrives_on_the_newest_kernel() {
    let Some(front_end) = Qemu::new(KernelRelease::New, queue_count(3)) else { return };
    ports::take_a_paste(&front_end);
}

#[test]
fn ports_come_and_go() {
    let places = coming_and_going::PORTS_MAX;
    let Some(front_end) = Qemu::new(KernelRelease::Stable, queue_count(places)) else { return };
    coming_and_going::ports_come_and_go(&front_end);
}

#[test]
fn speed_is_printed_beside_that_of_its_own_device() {
    let Some(front_end) = Qemu::new(KernelRelease::Stable, queue_count(2)) else { return };
    figures::of_ours(&front_end, "QEMU, vhost-console");
    let directory = temp_dir();
    let [console, data] = ["con", "one"].map(|name| directory.path().join(name));
    let socket =
        |id, path: &Path| format!("socket,id={id},path={},server=on,wait=off", path.display());
    let (console_socket, data_socket) = (socket("con", &console), socket("one", &data));
    let options = [
        "-device",
        "virtio-serial-pci",
        "-chardev",
        &console_socket,
        "-device",
        "virtconsole,chardev=con,name=con",
        "-chardev",
        &data_socket,
        "-device",
        "virtserialport,chardev=one,name=one",
    ];
    let words = "check=console";
    let machine = front_end.emulator.boot(&[Device::Own(&options)], words, OnRestart::End);
    let mut guest = Guest::meet(machine);
    let process = guest.process();
    let (console, data) = (Client::connect(&console), Client::connect(&data));
    let (name, len_bytes) = ("QEMU, its own device", front_end.stream_bytes());
    let ends = Ends { name, guest: &mut guest, console, data, len_bytes, process };
    figures::measure(ends, None);
    finish(guest.part());
}

/// Kernels have not always agreed about which number of a resize comes first.
#[test]
fn each_kernel_has_its_order_of_a_resize() {
    for (release, order) in [
        (KernelRelease::Old, "rows-first"),
        (KernelRelease::Stable, "columns-first"),
        (KernelRelease::New, "columns-first"),
    ] {
        let Some(front_end) = Qemu::new(release, queue_count(1)) else { return };
        people::see_the_size(&front_end, order);
    }
}
