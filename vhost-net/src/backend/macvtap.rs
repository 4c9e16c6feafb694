//! A macvtap interface of our own on another interface: made, opened by its character device, removed.
//!
//! Contract: [`Macvtap::create`] makes it in bridge mode, so that guests on one parent reach each other; it goes when the
//! value is dropped. Each [`Macvtap::open`] gives descriptors of new queues.
//!
//! A process that is killed leaves its interface behind, with the guest's address, which its successor's then could not
//! have. So a name is claimed first, by an abstract socket of that name: those are in the network namespace, as interfaces
//! are, and go with their process. An interface whose name can be claimed is nobody's any more, and is removed.
//!
//! The device of such an interface is a file of its own, `/dev/tapINDEX`, which devtmpfs makes. That name means something
//! within one network namespace only, and the first of several has it: so the node is taken if it has the numbers that
//! sysfs tells of the interface. Where it has not, or is not there, as in a container, a node with those numbers is made,
//! opened and removed again, in a directory that allows device nodes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use common::sandbox::{Access, Call, CapabilitySet, Needs, Place};
use nix::libc;
use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev, mknodat, open, unlink};
use rustix::io::Errno;
use tracing::{info, warn};

use super::descriptor;
use super::error::OpenError;
use super::netlink::{Interface, Netlink, NewMacvtap, Which};
use super::spec::InterfaceName;

/// Names that are tried for the interface: `vhostnet0` and so on. More daemons than this on one host share no parent.
const NAMES_MAX: u32 = 4096;

/// Where a device node may be made for a moment. The first is where it belongs; others are no place for device nodes on
/// hosts that mount them so, and then the next is tried.
const NODE_DIRECTORIES: &[&str] = &["/dev", "/run", "/tmp"];

/// The interface.
#[derive(Debug)]
pub(super) struct Macvtap {
    parent: String,
    name: String,
    /// What guests are reached by: the interface has it again after it was gone.
    address: Option<[u8; 6]>,
    #[expect(dead_code, reason = "held, not read: closing it gives the name up")]
    claim: UnixDatagram,
}

impl Macvtap {
    pub(super) fn create(
        parent: &InterfaceName,
        netlink: &Netlink,
        pairs: u16,
        address: Option<[u8; 6]>,
    ) -> Result<Self, OpenError> {
        let parent = parent.to_string();
        let missing = || OpenError::NoParent { parent: parent.clone() };
        let failed =
            |errno: Errno| OpenError::Macvtap { parent: parent.clone(), source: errno.into() };
        let parent_index =
            netlink.find(Which::Name(&parent)).map_err(failed)?.ok_or_else(missing)?.index;
        for number in 0..NAMES_MAX {
            let name = format!("vhostnet{number}");
            let Ok(claim) = claim(&name) else { continue };
            remove_left_over(netlink, &name).map_err(failed)?;
            let new = NewMacvtap { name: &name, parent_index, queue_count: pairs, address };
            match netlink.create(new) {
                Ok(()) => {
                    info!("made the macvtap {name} on {parent}");
                    let mut macvtap = Self { parent, name, address, claim };
                    macvtap.address = macvtap.find(netlink)?.and_then(|found| found.address);
                    return Ok(macvtap);
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Err(failed(Errno::EXIST))
    }

    /// To make it again with its parent, which has another device then; and to remove it. Where a node has to be made for it,
    /// that may be anywhere, and root's.
    pub(super) fn add_needs(needs: &mut Needs) {
        let nodes = NODE_DIRECTORIES.iter().map(|path| Place::new(path, Access::MakeNodes));
        needs.places.extend(nodes.chain([Place::new("/sys", Access::Read)]));
        let netlink = Call::with(libc::SYS_socket, 0, libc::AF_NETLINK.unsigned_abs());
        needs.calls.extend([netlink, Call::any(libc::SYS_bind), descriptor::REPLACE]);
        needs.capabilities |= CapabilitySet::MKNOD | CapabilitySet::DAC_OVERRIDE;
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the interface again, which went with its parent; false where that has not come back.
    pub(super) fn create_again(&self, netlink: &Netlink, pairs: u16) -> Result<bool, OpenError> {
        let failed = |errno: Errno| self.failed(errno);
        let Some(parent) = netlink.find(Which::Name(&self.parent)).map_err(failed)? else {
            return Ok(false);
        };
        let new = NewMacvtap {
            name: &self.name,
            parent_index: parent.index,
            queue_count: pairs,
            address: self.address,
        };
        match netlink.create(new) {
            Ok(()) | Err(Errno::EXIST) => Ok(true),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Opens as many queues.
    pub(super) fn open(
        &self,
        netlink: &Netlink,
        pairs: u16,
        flags: i32,
    ) -> Result<Vec<OwnedFd>, OpenError> {
        let interface = self.find(netlink)?.ok_or_else(|| self.failed(Errno::NODEV))?;
        let device = PathBuf::from(format!("/dev/tap{}", interface.index));
        let failed = |source| OpenError::MacvtapDevice {
            parent: self.parent.clone(),
            name: self.name.clone(),
            device: device.clone(),
            source,
        };
        let open_one = || -> io::Result<OwnedFd> {
            let numbers = self.device_numbers(interface.index)?;
            let is_it = rustix::fs::stat(&device).is_ok_and(|stat| stat.st_rdev == numbers);
            let file = if is_it { open_device(&device)? } else { self.open_node(numbers)? };
            descriptor::set_interface(file.as_fd(), &self.name, flags)?;
            Ok(file)
        };
        (0..pairs).map(|_| open_one().map_err(failed)).collect()
    }

    /// Of the interface's device. /sys shows the network namespace of whoever mounted it.
    fn device_numbers(&self, index: u32) -> io::Result<Dev> {
        let numbers = fs::read_to_string(format!("/sys/class/net/{0}/tap{index}/dev", self.name))?;
        let (major, minor) = numbers.trim().split_once(':').ok_or(Errno::NODEV)?;
        let parse = |number: &str| number.parse::<u32>().map_err(io::Error::other);
        Ok(makedev(parse(major)?, parse(minor)?))
    }

    /// Opens the interface's device by a node of our own.
    fn open_node(&self, device: Dev) -> io::Result<OwnedFd> {
        let mut refused = Errno::NODEV;
        for directory in NODE_DIRECTORIES {
            let node = Path::new(directory).join(format!(".{}-{}", self.name, std::process::id()));
            let mode = Mode::RUSR | Mode::WUSR;
            if let Err(errno) = mknodat(CWD, &node, FileType::CharacterDevice, mode, device) {
                refused = errno;
                continue;
            }
            let opened = open_device(&node);
            if let Err(errno) = unlink(&node) {
                warn!(%errno, "cannot remove the device node {node:?}");
            }
            match opened {
                Ok(file) => return Ok(file),
                Err(errno) => refused = errno,
            }
        }
        Err(refused.into())
    }

    fn find(&self, netlink: &Netlink) -> Result<Option<Interface>, OpenError> {
        netlink.find(Which::Name(&self.name)).map_err(|errno| self.failed(errno))
    }

    fn failed(&self, errno: Errno) -> OpenError {
        OpenError::Macvtap { parent: self.parent.clone(), source: errno.into() }
    }
}

impl Drop for Macvtap {
    fn drop(&mut self) {
        let removed = Netlink::open().and_then(|netlink| {
            let interface = netlink.find(Which::Name(&self.name))?;
            interface.map_or(Ok(()), |interface| netlink.remove(interface.index))
        });
        if let Err(errno) = removed {
            warn!(%errno, "cannot remove the macvtap {}", self.name);
        }
    }
}

/// Makes an interface's name ours among all daemons of this network namespace.
fn claim(name: &str) -> io::Result<UnixDatagram> {
    UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(format!("vhost-net/{name}"))?)
}

/// Removes what a killed daemon has left under a name that is ours now.
fn remove_left_over(netlink: &Netlink, name: &str) -> rustix::io::Result<()> {
    match netlink.find(Which::Name(name))? {
        Some(left) if left.kind.as_deref() == Some("macvtap") => {
            info!("removing the macvtap {name}, whose process was killed");
            netlink.remove(left.index)
        }
        _ => Ok(()),
    }
}

fn open_device(path: &Path) -> Result<OwnedFd, Errno> {
    open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
}
