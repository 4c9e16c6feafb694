//! A device's main thread without a device, for tests of endpoints: a hub with ports, and a guest that the test plays.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::memory::OwnMemory;
use common::virtqueue::Buffers;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::config::Size;
use crate::control::Order;
use crate::device::{Shape, Shared};
use crate::doorbell::Doorbell;
use crate::hub::Hub;
use crate::port::Port;
use crate::port_spec::{EndpointSpec, PortSpec};
use crate::transcript::Author;
use crate::watch::watch;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a viewer who comes late is shown.
pub(crate) const REPLAY_BYTES: u64 = 64 << 10;

/// See the module's head.
pub(crate) struct Stage {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) hub: Arc<Hub>,
    pub(crate) shared: Arc<Shared>,
}

impl Stage {
    /// With places for so many ports.
    pub(crate) fn new(ports_max: u16) -> Self {
        let shape = Shape {
            has_several_ports: ports_max > 1,
            ports_max,
            replay_bytes: REPLAY_BYTES,
            size: Size::default(),
            order: Order::RowsFirst,
            queue_size_max: 64,
        };
        let shared = Arc::new(Shared::new(shape).unwrap());
        let hub = Arc::new(Hub::new(Arc::clone(&shared)));
        Self { directory: tempfile::tempdir().unwrap(), hub, shared }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A port with this endpoint.
    pub(crate) fn plug(&self, name: &str, is_console: bool, endpoint: EndpointSpec) -> Guest {
        let name = Some(name.to_owned());
        let spec = PortSpec { name, is_console, id: None, endpoints: vec![endpoint] };
        let id = self.hub.plug(&spec).unwrap();
        self.guest(id)
    }

    /// A port with a unix socket of its name.
    pub(crate) fn plug_unix(&self, name: &str, is_console: bool) -> Guest {
        self.plug(name, is_console, unix(&self.path(name)))
    }

    pub(crate) fn guest(&self, id: u16) -> Guest {
        let guest = Guest { shared: Arc::clone(&self.shared), id, author: None };
        guest.port().set_guest_open(true);
        Guest { author: Some(guest.port().take_author()), ..guest }
    }

    /// A guest's end of a port that another one writes to.
    pub(crate) fn guest_that_reads(&self, id: u16) -> Guest {
        Guest { shared: Arc::clone(&self.shared), id, author: None }
    }

    /// What the guest is to know of the host's end.
    pub(crate) fn is_host_open(&self, id: u16) -> bool {
        self.shared.conversation().is_host_open(id)
    }

    /// Runs `script` while the hub does.
    pub(crate) fn play(&self, script: impl AsyncFnOnce()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let script = timeout(PATIENCE, script());
            tokio::select! {
                never = self.hub.run() => match never {},
                played = script => played.expect("something that is waited for does not come"),
            }
        });
    }
}

pub(crate) fn unix(path: &Path) -> EndpointSpec {
    EndpointSpec::Unix { path: path.to_owned(), mode: 0o600, group: None }
}

/// The guest's end of a port.
pub(crate) struct Guest {
    shared: Arc<Shared>,
    id: u16,
    author: Option<Author>,
}

impl Guest {
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    pub(crate) fn port(&self) -> &Port {
        &self.shared.ports()[usize::from(self.id)]
    }

    /// Writes as far as there is room; how many bytes.
    pub(crate) fn try_write(&mut self, bytes: &[u8]) -> usize {
        let memory = OwnMemory::new(bytes.len());
        memory.buffer().write(0, bytes);
        let mut author = self.author.take().unwrap();
        let port = self.port();
        let takes = port.takes_output();
        let buffers = [memory.buffer()];
        let count =
            if takes { author.append(port.transcript(), Buffers::new(&buffers)) } else { 0 };
        self.shared.main_bell().ring_if_armed();
        self.author = Some(author);
        count
    }

    /// Writes, and waits for room as a ring does.
    pub(crate) async fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            rung(self.port().room_bell(), || self.port().has_room()).await;
            // As much as a guest's chains have, so that others have their turns.
            let count = self.try_write(&bytes[..bytes.len().min(64 << 10)]);
            bytes = &bytes[count..];
        }
    }

    /// Reads what there is, and waits for something as a ring does.
    pub(crate) async fn read(&mut self) -> Vec<u8> {
        rung(self.port().input_bell(), || self.port().has_input()).await;
        let memory = OwnMemory::new(4096);
        let buffers = [memory.buffer()];
        let mut bytes = vec![0; self.port().inbox().take(Buffers::new(&buffers))];
        memory.buffer().read(0, &mut bytes);
        self.shared.main_bell().ring_if_armed();
        bytes
    }

    pub(crate) async fn read_exactly(&mut self, count: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < count {
            all.extend(self.read().await);
        }
        assert_eq!(all.len(), count, "more than was expected");
        all
    }

    /// Waits for a state of the port that its endpoints change.
    pub(crate) async fn until(&self, is_so: impl Fn(&Port) -> bool) {
        while !is_so(self.port()) {
            tokio::task::yield_now().await;
        }
    }
}

/// Waits for a bell as a queue does.
async fn rung(bell: &Doorbell, is_there: impl Fn() -> bool) {
    use std::os::fd::AsFd;
    let heard = watch(bell.as_fd().try_clone_to_owned().unwrap(), Interest::READABLE).unwrap();
    loop {
        bell.arm();
        if is_there() {
            return;
        }
        let mut ready = heard.readable().await.unwrap();
        bell.clear();
        ready.clear_ready();
    }
}

/// Somebody who connects.
pub(crate) struct Peer(pub(crate) UnixStream);

impl Peer {
    pub(crate) async fn connect(path: &Path) -> Self {
        Self(UnixStream::connect(path).await.unwrap())
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    pub(crate) async fn expect(&mut self, bytes: &[u8]) {
        let mut read = vec![0; bytes.len()];
        self.0.read_exact(&mut read).await.unwrap();
        assert!(
            read == bytes,
            "{:?} instead of {:?}",
            String::from_utf8_lossy(&read[..read.len().min(200)]),
            String::from_utf8_lossy(&bytes[..bytes.len().min(200)])
        );
    }

    pub(crate) async fn read_to_end(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        self.0.read_to_end(&mut all).await.unwrap();
        all
    }
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|place| (place * 7 + place / 251) as u8).collect()
}
