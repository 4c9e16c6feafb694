//! A guest's TCP, both ways: a User-Mode Linux guest's iperf3, through our daemon to a tap, and to passt.

use std::net::Ipv4Addr;
use std::path::Path;

use guest::throughput::Throughput;
use guest::verdict::word;
use tests::{Device, Iperf, Namespace, Passt, Tap, UserModeLinux};

use crate::contender::{Contender, TAP, start_ours};
use crate::sample::{Bench, cpu_seconds};
use crate::table::median;

const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// What was measured of one guest.
struct Sample {
    out_gbit: f64,
    in_gbit: f64,
    cpu_seconds_per_gib: f64,
}

/// Where the guest's frames go.
#[derive(Clone, Copy)]
enum Way {
    Tap,
    Passt,
}

/// Measures all our daemons in turn, and prints the table.
pub(crate) fn compare(bench: &Bench, contenders: &[Contender], samples: u32) {
    let uml = UserModeLinux::with_network(bench.rig.clone());
    let mut rows = Vec::new();
    for contender in contenders {
        if let Contender::Ours { name, program } = contender {
            rows.push((format!("{name}, tap"), program, Way::Tap, Vec::new()));
            rows.push((format!("{name}, passt's socket"), program, Way::Passt, Vec::new()));
        }
    }
    for _ in 0..samples {
        for (_, program, way, samples) in &mut rows {
            samples.push(sample(bench, &uml, program, *way));
        }
    }
    println!(
        "\n| User-Mode Linux guest, TCP | Gbit/s out | Gbit/s in | back end CPU s per GiB |\n|---|---:|---:|---:|"
    );
    for (name, _, _, samples) in &rows {
        let column = |value: fn(&Sample) -> f64| samples.iter().map(value).collect::<Vec<_>>();
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} |",
            median(&column(|sample| sample.out_gbit)),
            median(&column(|sample| sample.in_gbit)),
            median(&column(|sample| sample.cpu_seconds_per_gib)),
        );
    }
}

fn sample(bench: &Bench, uml: &UserModeLinux, program: &Path, way: Way) -> Sample {
    let namespace = bench.namespace();
    match way {
        Way::Tap => {
            namespace.add_tap(TAP, Tap::SingleQueue);
            namespace.add_address(TAP, &format!("{HOST}/24"));
            load(bench, uml, &namespace, (program, &format!("tap={TAP}")), [GUEST, HOST])
        }
        Way::Passt => {
            let passt = Passt::serve(&namespace);
            let backend = format!("socket={}", passt.socket().display());
            load(bench, uml, &namespace, (program, &backend), [Passt::ADDRESS, Passt::ROUTER])
        }
    }
}

/// Boots a guest with an address beside that of its peer, in front of a daemon with this back end.
fn load(
    bench: &Bench,
    uml: &UserModeLinux,
    namespace: &Namespace,
    (program, backend): (&Path, &str),
    [own, peer]: [Ipv4Addr; 2],
) -> Sample {
    let daemon = start_ours(bench, namespace, program, backend);
    let _iperf = Iperf::serve(namespace);
    let words = [
        format!("address={own}/24"),
        format!("peer={peer}"),
        format!("load_seconds={}", bench.seconds.as_secs()),
    ];
    let words = words.each_ref().map(|word| &**word);
    let details = uml.pass(&[Device::Network(daemon.socket())], "network", &words);
    let cpu = cpu_seconds(daemon.id());
    let found = |direction| {
        word(&details, direction)
            .and_then(Throughput::parse)
            .unwrap_or_else(|| panic!("no load {direction} in {details:?}"))
    };
    let (sent, received) = (found("out"), found("in"));
    let bytes = sent.received_bytes + received.received_bytes;
    Sample {
        out_gbit: sent.bits_per_second as f64 / 1e9,
        in_gbit: received.bits_per_second as f64 / 1e9,
        cpu_seconds_per_gib: cpu / bytes as f64 * f64::from(1 << 30),
    }
}
