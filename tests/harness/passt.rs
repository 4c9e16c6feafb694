//! passt: a network behind a stream socket, on which each frame follows its length, 32 bits in network order.
//!
//! It answers for a router at [`Passt::ROUTER`], hands out [`Passt::ADDRESS`] by DHCP, and turns what is sent to the router into
//! connections to the loopback of its namespace: servers there are reached so.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::{Machine, Namespace, temp_dir};

/// Longer than any guest lives.
const LIMIT: Duration = Duration::from_secs(240);
/// What it says once it can be connected to.
const LISTENING: &str = "You can now start qemu";

/// A running passt. It serves one connection at a time.
#[derive(Debug)]
pub struct Passt {
    /// Held: it ends with this.
    process: Machine,
    directory: TempDir,
}

impl Passt {
    /// The router's address.
    pub const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    /// The address that the other end is to have, of a network of 24 bits.
    pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

    /// Starts it in a namespace that has none yet, and waits until it can be connected to.
    ///
    /// # Panics
    /// If it does not get so far; the message has what it said.
    pub fn serve(namespace: &Namespace) -> Self {
        // It wants an interface with a default route, for a template, though nothing is to leave by it.
        namespace.add_veth("passt0", namespace, "passt1");
        namespace.add_address("passt0", "192.0.2.1/24");
        namespace.ip("route add default via 192.0.2.2");
        // Pings it forwards as they are, and only where the kernel lets it.
        namespace.add_address("lo", &format!("{}/32", Self::ROUTER));
        let groups = "/proc/sys/net/ipv4/ping_group_range";
        namespace.run(|| fs::write(groups, "0 0")).expect("root may write it");
        let directory = temp_dir();
        Self { process: start(namespace, directory.path()), directory }
    }

    /// Has it die and another one serve in its place. `meanwhile` there is none.
    ///
    /// # Panics
    /// As [`Passt::serve`] does.
    #[must_use]
    pub fn restart(self, namespace: &Namespace, meanwhile: impl FnOnce()) -> Self {
        let Self { process, directory } = self;
        // SIGKILL: its socket stays.
        drop(process);
        meanwhile();
        Self { process: start(namespace, directory.path()), directory }
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        socket(self.directory.path())
    }
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("socket")
}

fn start(namespace: &Namespace, directory: &Path) -> Machine {
    let mut command = namespace.tool("passt");
    command
        // As nobody, which it would become, it could make no socket here.
        .args(["--foreground", "--runas", "0", "--ipv4-only", "--netmask", "24"])
        .args(["--address", &Passt::ADDRESS.to_string(), "--gateway", &Passt::ROUTER.to_string()])
        .arg("--socket")
        .arg(socket(directory));
    let mut process = Machine::start(command, LIMIT);
    process.wait_for(LISTENING);
    process
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::Passt;
    use crate::{Frame, Namespace, Rig};

    const ARP: u16 = 0x0806;

    #[test]
    fn router_answers_a_frame_behind_its_length() {
        let Some(rig) = Rig::find() else { return };
        let Some(namespace) = Namespace::new(&rig) else { return };
        let passt = Passt::serve(&namespace);
        let mut stream = UnixStream::connect(passt.socket()).expect("it listens");
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        // RFC 826: who has the router's address?
        let mut frame = [[0xff; 6], mac].concat();
        frame.extend_from_slice(&ARP.to_be_bytes());
        frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&Passt::ADDRESS.octets());
        frame.extend_from_slice(&[0; 6]);
        frame.extend_from_slice(&Passt::ROUTER.octets());
        let len = u32::try_from(frame.len()).expect("it is short").to_be_bytes();
        stream.write_all(&[&len[..], &frame].concat()).expect("it reads");
        let mut len = [0; 4];
        stream.read_exact(&mut len).expect("it answers");
        let mut answer = vec![0; u32::from_be_bytes(len) as usize];
        stream.read_exact(&mut answer).expect("the frame is whole");
        let answer = Frame::new(0, answer);
        let packet = answer.packet().expect("it is whole");
        assert_eq!((packet.ether_type, packet.destination), (ARP, mac));
        assert_eq!(answer.bytes()[28..32], Passt::ROUTER.octets());
    }
}
