//! How soon a guest's first program runs, and what its machine takes of the host's memory beside the guest's: our VMM next to
//! QEMU's machines, in one nested host, by turns.
//!
//! Contract: all boot the same kernel with the same initial RAM disk, memory and words, on KVM, with a serial line and no
//! other device. Nothing is asserted of the figures: whoever reads them knows what the host did meanwhile.

use std::time::Instant;

use tests::{Initrd, Rig};

use super::nested::Host;

/// How many times each machine boots. Without it none does: that takes half a minute a round, and tests nothing.
const ROUNDS: &str = "OUTBOARD_FIGURES";
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What QEMU's machines begin with.
const FIRMWARE: [&str; 6] = [
    "qemu/qboot.rom",
    "qemu/kvmvapic.bin",
    "qemu/linuxboot_dma.bin",
    "qemu/pvh.bin",
    "seabios/bios-256k.bin",
    "seabios/bios-microvm.bin",
];
/// The guest's first program says so, and stays.
const FIRST_PROGRAM: &[u8] =
    b"#!/bin/busybox sh\necho the first program runs\nexec /bin/busybox sleep 1000\n";
const BEGIN: &str = "the machine begins";
const BEGUN: &str = "the first program runs";
const WORDS: &str = "'console=ttyS0 quiet'";
const OPTIONS: &str = "--memory 128M";
const QEMU_OPTIONS: &str = "-nodefaults -no-user-config -accel kvm -cpu host -m 128M -display none -serial stdio \
    -L /firmware -object memory-backend-memfd,id=m,size=128M,share=on";
struct Contender {
    name: &'static str,
    program: &'static str,
    options: String,
}

fn contenders() -> [Contender; 3] {
    let ours = format!("{OPTIONS} --kernel /kernel --initrd /first --cmdline {WORDS}");
    let qemu = |name| {
        let options = format!(
            "-machine {name},memory-backend=m {QEMU_OPTIONS} -kernel /kernel -initrd /first -append {WORDS}"
        );
        Contender { name, program: QEMU, options }
    };
    let ours = Contender { name: "outboard-vmm", program: "/bin/outboard-vmm", options: ours };
    [ours, qemu("microvm"), qemu("q35")]
}

#[test]
fn a_guest_s_first_program_runs_in_our_machine_and_in_qemu_s() {
    let Ok(rounds) = std::env::var(ROUNDS) else {
        eprintln!("not measured: {ROUNDS} says how many times each machine is to boot");
        return;
    };
    let rounds: usize = rounds.parse().expect("a number of rounds");
    let Some(mut host) = Host::boot_with(&[], pack) else { return };
    let contenders = contenders();
    let mut found: Vec<Vec<(f64, u64)>> = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (contender, found) in contenders.iter().zip(&mut found) {
            found.push(measure(&mut host, contender));
        }
    }
    host.end();
    println!("{:<14} {:<17} KiB resident: median (least, most)", "machine", "seconds:");
    for (contender, found) in contenders.iter().zip(found) {
        let (mut seconds, mut kib): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        seconds.sort_by(f64::total_cmp);
        kib.sort_unstable();
        let (last, middle) = (seconds.len() - 1, seconds.len() / 2);
        let time = format!("{:.2} ({:.2}, {:.2})", seconds[middle], seconds[0], seconds[last]);
        let memory = format!("{} ({}, {})", kib[middle], kib[0], kib[last]);
        println!("{:<14} {time:<17} {memory}", contender.name);
    }
}

/// The time from the start to the guest's first program, and what is resident then.
fn measure(host: &mut Host, contender: &Contender) -> (f64, u64) {
    let Contender { program, options, .. } = contender;
    // Without the pipe QEMU has the host's console, and makes it one that does not wait for anybody.
    host.ask(
        &format!("begin run (echo {BEGIN}; exec {program} {options}) </dev/null 2>&1 | cat"),
        BEGIN,
    );
    let start = Instant::now();
    host.wait_for(BEGUN);
    let seconds = start.elapsed().as_secs_f64();
    let process = program.rsplit('/').next().unwrap_or(program);
    let kib = host.resident_kib(process);
    host.run(&format!("kill -9 $(pidof {process})"));
    host.finish();
    (seconds, kib)
}

fn pack(rig: &Rig, initrd: &mut Initrd) {
    initrd.program(rig, QEMU.trim_start_matches('/'));
    for file in FIRMWARE {
        let name = file.split('/').next_back().expect("a name");
        initrd.file(&format!("firmware/{name}"), &rig.path(&format!("usr/share/{file}")));
    }
    let mut first = Initrd::default();
    first.file("bin/busybox", &rig.path("bin/busybox"));
    first.content("init", FIRST_PROGRAM);
    let directory = tests::temp_dir();
    let path = directory.path().join("first");
    first.write(&path);
    initrd.file("first", &path);
}
