//! A driver's part is played by hand.

use super::{Conversation, Message};
use crate::config::Size;
use crate::control::message::{Order, Word};
use crate::device::Plugged;
use crate::drops::Drop;

const SIZE: Size = Size { columns: 80, rows: 24 };

fn console() -> Plugged {
    Plugged { name: Some("con0".into()), is_console: true, size: SIZE }
}

fn data() -> Plugged {
    Plugged { name: None, is_console: false, size: SIZE }
}

/// A conversation with three places, of which the first has a console that the host has open.
fn conversation() -> Conversation {
    let mut conversation = Conversation::new(3, Order::RowsFirst);
    conversation.plug(0, console());
    conversation.set_host_open(0, true);
    conversation
}

fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

fn device_ready(conversation: &mut Conversation) {
    assert_eq!(conversation.hear(&message(u32::MAX, 0, 1)), Ok(()));
}

fn port_ready(conversation: &mut Conversation, id: u32) {
    assert_eq!(conversation.hear(&message(id, 3, 1)), Ok(()));
}

/// All that the driver is told until it has to say something.
fn told(conversation: &mut Conversation) -> Vec<(u16, Word)> {
    let mut told = Vec::new();
    while let Some(message) = conversation.next_message() {
        conversation.told(&message);
        let Message { id, word } = message;
        told.push((id, word));
        assert!(told.len() < 100, "it does not end: {told:?}");
    }
    told
}

#[test]
fn driver_is_told_of_a_console_step_by_step() {
    let mut conversation = conversation();
    assert_eq!(told(&mut conversation), []);
    device_ready(&mut conversation);
    assert_eq!(told(&mut conversation), [(0, Word::Add)]);
    port_ready(&mut conversation, 0);
    let rest = [
        (0, Word::Console),
        (0, Word::Name("con0".into())),
        (0, Word::Open(true)),
        (0, Word::Resize(SIZE)),
    ];
    assert_eq!(told(&mut conversation), rest);
    assert!(conversation.is_ready(0));
}

#[test]
fn data_port_is_told_of_its_client_and_of_no_size() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    told(&mut conversation);
    conversation.plug(2, data());
    assert_eq!(told(&mut conversation), [(2, Word::Add)]);
    port_ready(&mut conversation, 2);
    assert_eq!(told(&mut conversation), []);
    conversation.set_size(2, Size { columns: 1, rows: 1 });
    conversation.set_host_open(2, true);
    assert_eq!(told(&mut conversation), [(2, Word::Open(true))]);
    conversation.set_host_open(2, false);
    assert_eq!(told(&mut conversation), [(2, Word::Open(false))]);
}

#[test]
fn what_changes_back_is_never_told() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    told(&mut conversation);
    port_ready(&mut conversation, 0);
    told(&mut conversation);
    conversation.set_host_open(0, false);
    conversation.set_size(0, Size { columns: 100, rows: 50 });
    conversation.set_host_open(0, true);
    conversation.set_size(0, SIZE);
    assert_eq!(told(&mut conversation), []);
}

#[test]
fn port_that_comes_again_is_another_one() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    told(&mut conversation);
    port_ready(&mut conversation, 0);
    told(&mut conversation);
    assert_eq!(conversation.hear(&message(0, 6, 1)), Ok(()));
    conversation.unplug(0);
    assert!(!conversation.is_ready(0) && !conversation.is_guest_open(0));
    conversation.plug(0, data());
    // The driver has not heard yet: what it says and writes is for the one before, until it is ready for this one.
    assert_eq!(conversation.hear(&message(0, 6, 1)), Err(Drop::UnknownPort));
    assert_eq!(told(&mut conversation), [(0, Word::Remove), (0, Word::Add)]);
    assert_eq!(conversation.hear(&message(0, 6, 1)), Err(Drop::UnknownPort));
    let stance = conversation.stance(0);
    assert!(stance.discards_output && !stance.is_guest_open);
    port_ready(&mut conversation, 0);
    assert!(!conversation.stance(0).discards_output);
    assert_eq!(told(&mut conversation), []);
}

#[test]
fn port_that_goes_before_it_was_told_of_is_not_told_of() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    conversation.plug(1, data());
    conversation.unplug(1);
    assert_eq!(told(&mut conversation), [(0, Word::Add)]);
}

#[test]
fn driver_that_starts_again_is_told_all_again() {
    let mut conversation = conversation();
    for _ in 0..2 {
        device_ready(&mut conversation);
        assert_eq!(told(&mut conversation), [(0, Word::Add)]);
        port_ready(&mut conversation, 0);
        assert_eq!(told(&mut conversation).len(), 4);
    }
    conversation.restart();
    assert_eq!(told(&mut conversation), []);
    // It could not start: nothing is told.
    assert_eq!(conversation.hear(&message(0, 0, 0)), Err(Drop::PortFailed));
    assert_eq!(told(&mut conversation), []);
}

#[test]
fn nonsense_changes_nothing() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    told(&mut conversation);
    for id in [1, 2, 3, 0x1_0000, u32::MAX] {
        assert_eq!(conversation.hear(&message(id, 3, 1)), Err(Drop::UnknownPort));
        assert_eq!(conversation.hear(&message(id, 6, 1)), Err(Drop::UnknownPort));
    }
    for event in [1, 2, 4, 5, 7, 8, u16::MAX] {
        assert_eq!(conversation.hear(&message(0, event, 1)), Err(Drop::UnknownMessage));
    }
    assert_eq!(conversation.hear(&message(0, 3, 1)[..7]), Err(Drop::ShortMessage));
    assert_eq!(conversation.hear(&[]), Err(Drop::ShortMessage));
    assert_eq!(conversation.hear(&message(0, 3, 0)), Err(Drop::PortFailed));
    assert_eq!(told(&mut conversation), []);
}

#[test]
fn driver_that_wakes_from_hibernation_goes_on_with_its_ports() {
    let mut conversation = conversation();
    conversation.plug(1, data());
    // Linux says that it is ready for each port, and which are open; that it has started it does not say again.
    port_ready(&mut conversation, 0);
    assert_eq!(conversation.hear(&message(0, 6, 1)), Ok(()));
    assert!(conversation.is_ready(0) && conversation.is_guest_open(0));
    assert_eq!(told(&mut conversation).len(), 5);
    conversation.unplug(0);
    assert_eq!(told(&mut conversation), [(0, Word::Remove)]);
}

#[test]
fn driver_that_starts_has_no_port_open() {
    let mut conversation = conversation();
    device_ready(&mut conversation);
    told(&mut conversation);
    port_ready(&mut conversation, 0);
    assert_eq!(conversation.hear(&message(0, 6, 1)), Ok(()));
    assert!(conversation.is_guest_open(0));
    device_ready(&mut conversation);
    assert!(!conversation.is_guest_open(0));
}

#[test]
fn port_of_a_driver_without_messages_is_open_while_it_is_plugged() {
    let mut conversation = conversation();
    conversation.plug(1, data());
    conversation.negotiated(false);
    assert!(conversation.is_guest_open(0) && conversation.is_ready(0));
    assert!(!conversation.is_guest_open(1));
    assert_eq!(told(&mut conversation), []);
    conversation.unplug(0);
    assert!(!conversation.is_guest_open(0));
    conversation.plug(0, console());
    assert!(conversation.is_guest_open(0) && !conversation.stance(0).discards_output);
    conversation.negotiated(true);
    assert!(!conversation.is_guest_open(0));
}
