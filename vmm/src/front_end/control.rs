//! A network's control queue, as far as this process has a part in it: commands are handed on to the daemon, and those that
//! it has carried out are remembered for the next one.
//!
//! What a driver says by this queue (how many queue pairs it uses, which frames it wants to see) is nowhere else, and a
//! daemon that died takes it along. The driver does not know, and says nothing twice.
//!
//! Contract: commands are rare, and each is answered when the daemon has answered; one that a daemon's death has left
//! without an answer is given to the next one. The driver's ring is read by `virtio-queue`, not by a ring of our own: it
//! is somebody else's reading of the specification, as all of this crate is to the daemons.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;

use tracing::debug;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::relay::{COMMAND_BYTES_MAX, Error};
use super::setup::RingSetup;
use crate::interrupts::Call;

const VIRTIO_F_EVENT_IDX: u64 = 1 << 29;

const VIRTIO_NET_OK: u8 = 0;
const VIRTIO_NET_ERR: u8 = 1;

// VIRTIO 1.3, 5.1.6.5: classes, and their commands.
const VIRTIO_NET_CTRL_VLAN: u8 = 2;
const VIRTIO_NET_CTRL_VLAN_ADD: u8 = 0;
const VIRTIO_NET_CTRL_VLAN_DEL: u8 = 1;
const VIRTIO_NET_CTRL_ANNOUNCE: u8 = 3;

/// Commands that are remembered: all VLANs that there are, and as many others as no driver has.
const COMMANDS_MAX: usize = 4096 + 64;

/// What a command replaces when it is given again: class, command, and of a VLAN its number.
type Key = (u8, u8, [u8; 2]);

/// The driver's end of the queue.
pub(super) struct Control {
    queue: Queue,
    memory: GuestMemoryMmap,
    kick: Arc<EventFd>,
    call: Call,
    carried_out: BTreeMap<Key, Vec<u8>>,
}

impl Control {
    pub(super) fn new(
        ring: &RingSetup,
        features: u64,
        memory: GuestMemoryMmap,
    ) -> Result<Self, Error> {
        let mut queue = Queue::new(ring.size)?;
        queue.set_size(ring.size);
        let halves = |address: u64| {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            (Some(u32::from_le_bytes([a, b, c, d])), Some(u32::from_le_bytes([e, f, g, h])))
        };
        let [(a, b), (c, d), (e, f)] = ring.places.map(halves);
        queue.set_desc_table_address(a, b);
        queue.set_avail_ring_address(c, d);
        queue.set_used_ring_address(e, f);
        queue.set_event_idx(features & VIRTIO_F_EVENT_IDX != 0);
        queue.set_ready(true);
        let (kick, call) = (Arc::clone(&ring.kick), ring.call.clone());
        Ok(Self { queue, memory, kick, call, carried_out: BTreeMap::new() })
    }

    /// What becomes readable when the driver has made a command available.
    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Tells a daemon what its predecessors have carried out.
    pub(super) fn replay(
        &self,
        mut carry_out: impl FnMut(&[u8]) -> Result<u8, Error>,
    ) -> Result<(), Error> {
        for command in self.carried_out.values() {
            let answer = carry_out(command)?;
            if answer != VIRTIO_NET_OK {
                let head = command.get(..2);
                debug!(?head, answer, "this daemon refuses a command that another took");
            }
        }
        Ok(())
    }

    /// Has the commands that there are carried out, at most as many as the ring has room for.
    pub(super) fn serve(
        &mut self,
        mut carry_out: impl FnMut(&[u8]) -> Result<u8, Error>,
    ) -> Result<(), Error> {
        let _not_kicked = self.kick.read();
        let mut has_taken_one = false;
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop_descriptor_chain(&self.memory) else { break };
            let command = read(&self.memory, chain.clone());
            let answer = match &command {
                Some(command) => match carry_out(command) {
                    Ok(VIRTIO_NET_OK) => VIRTIO_NET_OK,
                    Ok(_) => VIRTIO_NET_ERR,
                    Err(error) => {
                        self.queue.go_to_previous_position();
                        return Err(error);
                    }
                },
                None => VIRTIO_NET_ERR,
            };
            let head = chain.head_index();
            let answered = answer_with(&self.memory, chain, answer);
            self.queue.add_used(&self.memory, head, answered)?;
            if self.queue.needs_notification(&self.memory)? {
                self.call.raise();
            }
            if let Some(command) = command.filter(|_| answer == VIRTIO_NET_OK) {
                remember(&mut self.carried_out, command);
            }
            has_taken_one = true;
        }
        // Whoever says that there is more has to have been seen to mean it.
        if self.queue.enable_notification(&self.memory)? && has_taken_one {
            let _full = self.kick.write(1);
        }
        Ok(())
    }
}

/// The device-readable part of a chain, if it is a command and not too long for one.
fn read(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Option<Vec<u8>> {
    let reader = chain.reader(memory).ok()?;
    let mut command = Vec::new();
    // One byte more than any command has: what is longer is seen to be.
    let most = COMMAND_BYTES_MAX.saturating_add(1) as u64;
    reader.take(most).read_to_end(&mut command).ok()?;
    (command.len() >= 2 && command.len() <= COMMAND_BYTES_MAX).then_some(command)
}

/// Writes the answer; returns how many bytes that were.
fn answer_with(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    answer: u8,
) -> u32 {
    match chain.writer(memory).map(|mut writer| writer.write(&[answer])) {
        Ok(Ok(1)) => 1,
        _ => 0,
    }
}

fn remember(carried_out: &mut BTreeMap<Key, Vec<u8>>, command: Vec<u8>) {
    let key = match *command.as_slice() {
        // An announcement is over when it has been acknowledged.
        [VIRTIO_NET_CTRL_ANNOUNCE, ..] => return,
        [VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, low, high, ..] => {
            carried_out.remove(&(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, [low, high]));
            return;
        }
        [class @ VIRTIO_NET_CTRL_VLAN, order, low, high, ..] => (class, order, [low, high]),
        [class, order, ..] => (class, order, [0; 2]),
        _ => return,
    };
    if carried_out.len() < COMMANDS_MAX || carried_out.contains_key(&key) {
        carried_out.insert(key, command);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{COMMANDS_MAX, remember};

    #[test]
    fn last_command_of_each_kind_is_remembered_and_vlans_one_by_one() {
        let mut carried_out = BTreeMap::new();
        for command in [
            &[0, 1, 1][..],
            &[4, 0, 2, 0],
            &[2, 0, 7, 0],
            &[2, 0, 8, 0],
            &[0, 1, 0],
            &[3, 0],
            &[2, 1, 7, 0],
        ] {
            remember(&mut carried_out, command.to_vec());
        }
        let left: Vec<_> = carried_out.into_values().collect();
        assert_eq!(left, [vec![0, 1, 0], vec![2, 0, 8, 0], vec![4, 0, 2, 0]]);
    }

    #[test]
    fn memory_of_commands_has_an_end() {
        let mut carried_out = BTreeMap::new();
        for number in 0..=u16::MAX {
            let [low, high] = number.to_le_bytes();
            remember(&mut carried_out, vec![2, 0, low, high]);
        }
        assert_eq!(carried_out.len(), COMMANDS_MAX);
    }
}
