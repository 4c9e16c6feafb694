//! iperf3: load between a guest and a namespace, or between two namespaces.

use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::thread;

use guest::throughput::Throughput;

use crate::Namespace;

/// What the server says once it takes connections.
const LISTENING: &str = "Server listening";

/// A server in a namespace, for any number of clients one after the other. It is at port 5201 of all addresses.
#[derive(Debug)]
pub struct Iperf {
    server: Child,
}

impl Iperf {
    /// Starts a server and waits until it takes connections.
    ///
    /// # Panics
    /// If it does not get so far; the message has what it said.
    pub fn serve(namespace: &Namespace) -> Self {
        let mut server = namespace
            .tool("iperf3")
            .args(["--server", "--forceflush"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter can be run");
        let mut lines = BufReader::new(server.stdout.take().expect("it was piped")).lines();
        let iperf = Self { server };
        let mut said = String::new();
        loop {
            match lines.next() {
                Some(Ok(line)) if line.contains(LISTENING) => break,
                Some(Ok(line)) => said = said + &line + "\n",
                end => panic!("iperf3 does not serve: {said}{end:?}"),
            }
        }
        // What it says later nobody needs, for the client says the same; but the pipe must not fill up.
        thread::spawn(move || lines.map_while(Result::ok).count());
        iperf
    }

    /// Runs a client in a namespace to a server at `peer`, with further options such as `--reverse`, and returns what it found.
    ///
    /// # Panics
    /// If it fails; the message has what it said.
    pub fn measure(namespace: &Namespace, peer: IpAddr, options: &[&str]) -> Throughput {
        let output = namespace
            .tool("iperf3")
            .args(["--json", "--client", &peer.to_string()])
            .args(options)
            .output()
            .expect("nsenter can be run");
        let said = String::from_utf8_lossy(&output.stdout);
        Throughput::from_iperf(&said)
            .unwrap_or_else(|error| panic!("iperf3 {options:?} to {peer}: {error}"))
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for already.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::Iperf;
    use crate::{Namespace, Rig};

    #[test]
    fn load_between_namespaces_is_measured_each_way() {
        let Some(rig) = Rig::find() else { return };
        let (Some(here), Some(there)) = (Namespace::new(&rig), Namespace::new(&rig)) else {
            return;
        };
        here.add_veth("eth0", &there, "eth0");
        here.add_address("eth0", "fd00::1/64");
        there.add_address("eth0", "fd00::2/64");
        let peer = "fd00::2".parse().expect("an address");
        let _server = Iperf::serve(&there);
        for options in [&["--bytes", "2M"][..], &["--bytes", "2M", "--reverse"]] {
            let found = Iperf::measure(&here, peer, options);
            assert!(found.sent_bytes >= 2 << 20, "{found:?}");
        }
    }
}
