//! Frames as a network's driver may lay them out, and as it may not (VIRTIO 1.3, 5.1.6.1 to 5.1.6.4): whatever it sends,
//! the daemon lives, the wire has no frame that is wrong, the counter has the reason, and the next frame passes.

use crate::control::{counts, stats};
use crate::subject::{CONTROL_QUEUE, Subject, frame, is_another_program, must_carry};
use crate::wire::Wire;
use frontend::guest::Options;
use frontend::message::{VIRTIO_F_INDIRECT_DESC, VIRTIO_F_VERSION_1};
use frontend::net::{Header, NetDriver, VIRTIO_NET_F_MRG_RXBUF};
use frontend::wire::PATIENCE;

/// The longest frame: the largest IP packet behind an Ethernet header with a tag.
const FRAME_BYTES_MAX: usize = 65_535 + 18;

/// A pair and the control queue, with rings for a frame in very many pieces.
pub(crate) fn options() -> Options {
    Options { queue_count: CONTROL_QUEUE + 1, queue_size: 256, ..Options::default() }
}

/// Frames of a queue that were dropped for a reason.
pub(crate) fn drops(subject: &Subject, queue: u16, reason: &str) -> u64 {
    let stats = stats(subject);
    let count = &stats["queues"][usize::from(queue)]["drops"][reason];
    count.as_u64().unwrap_or_else(|| panic!("no drops for {reason:?} in {stats}"))
}

/// A chain with these bytes comes back unwritten, and is counted for this reason; the next frame passes.
#[track_caller]
pub(crate) fn must_drop(
    (subject, driver, wire): (&Subject, &mut NetDriver, &Wire),
    chain: &[&[u8]],
    reason: &str,
    what: &str,
) {
    let before = drops(subject, 1, reason);
    driver.submit(1, chain, &[]);
    driver.kick(1).expect("the device can be kicked");
    let back = driver.complete(1).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(back.bytes.is_empty(), "{what}: {back:?}");
    must_carry(&mut driver.guest, wire, what);
    assert_eq!(drops(subject, 1, reason), before + 1, "{what} is counted as {reason}");
}

#[test]
fn framing_of_what_is_sent_is_the_driver_s_choice() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    for frame_bytes in [14, 15, 60, 100] {
        let sent = frame(frame_bytes, 7);
        let whole = [&Header::default().encode()[..], &sent].concat();
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        let across: Vec<&[u8]> = [&whole[..5], &whole[5..13], &whole[13..20], &whole[20..]].into();
        for pieces in [vec![&whole[..]], vec![&whole[..12], &whole[12..]], across, bytes] {
            for indirect in [false, true] {
                let submit = if indirect { NetDriver::submit_indirect } else { NetDriver::submit };
                submit(&mut driver, 1, &pieces, &[]);
                driver.kick(1).expect("the device can be kicked");
                let back = driver.complete(1).expect("the chain comes back");
                assert!(back.bytes.is_empty(), "nothing is written to what is sent");
                wire.must_receive(&sent, &format!("{} pieces", pieces.len()));
            }
        }
    }
}

#[test]
fn frames_that_are_none_are_dropped_and_counted() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    for features in [u64::MAX, !(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF)] {
        let features = Options::default().features & features;
        let mut driver = subject.net_driver(&Options { features, ..options() });
        let header = vec![0; driver.header_bytes()];
        for len in [1, 2, header.len() - 1] {
            let what = format!("a chain of {len} bytes");
            must_drop((&subject, &mut driver, &wire), &[&header[..len]], "no_header", &what);
        }
        for frame_bytes in [0, 1, 13] {
            let what = format!("a frame of {frame_bytes} bytes");
            let whole = [&header[..], &frame(frame_bytes, 1)].concat();
            must_drop((&subject, &mut driver, &wire), &[&whole], "runt", &what);
        }
        for frame_bytes in [FRAME_BYTES_MAX + 1, FRAME_BYTES_MAX + 100, 1 << 20] {
            let what = format!("a frame of {frame_bytes} bytes");
            let giant = frame(frame_bytes, 1);
            must_drop((&subject, &mut driver, &wire), &[&header, &giant], "giant", &what);
        }
        // The longest passes.
        let long = frame(FRAME_BYTES_MAX, 9);
        driver.send(1, &Header::default(), &long).expect("the chain comes back");
        wire.must_receive(&long, "the longest frame");
    }
}

#[test]
fn buffer_without_bytes_breaks_its_ring_alone() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    for queue in [0, 1] {
        let mut driver = subject.net_driver(&options());
        must_carry(&mut driver.guest, &wire, "before");
        let header = [0; 12];
        match queue {
            0 => driver.submit(0, &[], &[100, 0, 2000]),
            _ => driver.submit(1, &[&header, &[], &frame(60, 1)], &[]),
        };
        driver.kick(queue).expect("the device can be kicked");
        let told = driver.guest.errs[usize::from(queue)].wait(PATIENCE);
        assert!(told.is_ok_and(|told| told > 0), "queue {queue} is not broken");
        drop(driver);
        subject.must_serve_the_next();
    }
}

#[test]
fn chain_without_room_for_a_frame_breaks_its_ring() {
    if is_another_program() {
        return;
    }
    let mut subject = Subject::network(&[]);
    let mut driver = subject.net_driver(&options());
    driver.submit(0, &[&[0; 100]], &[]);
    driver.kick(0).expect("the device can be kicked");
    let told = driver.guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read");
    assert!(told > 0, "the ring is not broken");
    drop(driver);
    subject.must_serve_the_next();
}

#[test]
fn frame_is_spread_over_mergeable_buffers_of_any_lengths() {
    // VIRTIO 1.3, 5.1.6.4.1: num_buffers is the number of buffers that the packet is spread over, and they are all used.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    for (buffer, frame_bytes) in
        [(12, 14), (13, 60), (30, 60), (31, 1000), (100, 1514), (1526, 9014), (1526, 65_550)]
    {
        let whole = frame_bytes + 12;
        let count = usize::div_ceil(whole, buffer);
        // One more than it takes, which stays.
        for _ in 0..=count {
            driver.submit(0, &[], &[buffer]);
        }
        driver.kick(0).expect("the device can be kicked");
        let sent = frame(frame_bytes, 5);
        wire.send(&sent);
        let chains = driver.receive(0).expect("a frame comes");
        let what = format!("{frame_bytes} bytes in buffers of {buffer}");
        assert_eq!(chains.len(), count, "{what}");
        assert!(chains[..count - 1].iter().all(|chain| chain.bytes.len() == buffer), "{what}");
        let bytes: Vec<u8> = chains.into_iter().flat_map(|chain| chain.bytes).collect();
        let header = Header { num_buffers: count as u16, ..Header::default() };
        assert_eq!(bytes[..12], header.encode(), "{what}");
        assert!(bytes[12..] == sent, "{what}");
        // The one that has stayed is the next frame's.
        driver.submit(0, &[], &[3000]);
        driver.kick(0).expect("the device can be kicked");
        wire.send(&frame(200, 6));
        let chains = driver.receive(0).expect("a frame comes");
        assert_eq!(chains[0].room_bytes, buffer, "{what}");
        while driver.guest.queues[0].outstanding_count() > 0 {
            wire.send(&frame(14, 6));
            driver.receive(0).expect("a frame comes");
        }
    }
}

#[test]
fn frame_too_long_for_a_buffer_that_is_alone_is_dropped_and_counted() {
    // Without MRG_RXBUF: VIRTIO 1.3, 5.1.6.3.1 has the driver give buffers of 1526 bytes at least.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let legacy = !(VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF);
    for features in [!VIRTIO_NET_F_MRG_RXBUF, legacy, legacy & !VIRTIO_F_INDIRECT_DESC] {
        let features = Options::default().features & features;
        let mut driver = subject.net_driver(&Options { features, ..options() });
        let before = drops(&subject, 0, "too_long");
        let header_bytes = driver.header_bytes();
        driver.submit(0, &[], &[1, header_bytes - 1, 20, 494]);
        driver.kick(0).expect("the device can be kicked");
        wire.send(&frame(515, 1));
        wire.send(&frame(514, 2));
        let chain = driver.complete(0).expect("the shorter one comes");
        assert_eq!((chain.bytes.len(), chain.room_bytes), (header_bytes + 514, header_bytes + 514));
        assert!(chain.bytes[header_bytes..] == frame(514, 2));
        // VIRTIO 1.3, 5.1.6.4.1: without MRG_RXBUF, num_buffers is 1.
        let header = Header { num_buffers: 1, ..Header::default() };
        assert_eq!(chain.bytes[..header_bytes], header.encode()[..header_bytes]);
        assert_eq!(drops(&subject, 0, "too_long"), before + 1);
        must_carry(&mut driver.guest, &wire, "after it");
    }
}

#[test]
fn driver_without_buffers_costs_nothing_and_finds_its_frames() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let frames: Vec<Vec<u8>> = (0..20).map(|number| frame(1000, number)).collect();
    frames.iter().for_each(|frame| wire.send(frame));
    must_send(&mut driver, &wire);
    // Too few buffers for the first of them.
    driver.submit(0, &[], &[100]);
    driver.kick(0).expect("the device can be kicked");
    must_send(&mut driver, &wire);
    let before = subject.cpu_time();
    for _ in 0..20 {
        must_send(&mut driver, &wire);
    }
    // A worker that turns all the time would have used what has passed.
    let used = subject.cpu_time() - before;
    assert!(used < PATIENCE / 20, "{used:?} were used while frames waited for buffers");
    for sent in &frames {
        driver.submit(0, &[], &[2000]);
        driver.kick(0).expect("the device can be kicked");
        must_be_received(&mut driver, sent);
    }
}

#[test]
fn frames_are_whole_and_in_order_however_slow_the_peer_is() {
    // A stream takes a frame in part when it is full: what is left goes before anything else.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let header = Header::default().encode();
    // Together more than a socket takes. Some are longer than 32 KiB, of which Linux takes a part; others it takes or not.
    let frames: Vec<Vec<u8>> =
        (0..120).map(|number| frame(60 + usize::from(number) * 541, number)).collect();
    for sent in &frames {
        driver.submit(1, &[&header, sent], &[]);
    }
    driver.kick(1).expect("the device can be kicked");
    driver.complete(1).expect("the first goes into the socket");
    let mut held_up = 0;
    for sent in &frames {
        held_up += u64::from(counts(&stats(&subject), 1, "transmit")[0] < frames.len() as u64);
        wire.must_receive(sent, "a frame of a row");
    }
    assert!(held_up > 1, "the peer was never slow");
    for _ in 1..frames.len() {
        driver.complete(1).expect("the others go when there is room");
    }
    must_carry(&mut driver.guest, &wire, "after it");
}

#[test]
fn frame_that_comes_in_parts_is_received_whole() {
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let frames = [frame(100, 1), frame(1500, 2)];
    // Within the length, at its end, within the header and the data.
    for cut in [1, 3, 4, 5, 17, 18, 30, 500, 1503] {
        for _ in &frames {
            driver.submit(0, &[], &[2000]);
        }
        driver.kick(0).expect("the device can be kicked");
        wire.send_in_parts(&frames, 4 + frames[0].len() + cut, || {
            // Once it has the first frame, and has answered this, it has read what there is of the second.
            must_be_received(&mut driver, &frames[0]);
            stats(&subject);
        });
        must_be_received(&mut driver, &frames[1]);
    }
    must_carry(&mut driver.guest, &wire, "after it");
}

#[track_caller]
fn must_be_received(driver: &mut NetDriver, sent: &[u8]) {
    let chains = driver.receive(0).expect("a frame comes");
    let bytes: Vec<u8> = chains.into_iter().flat_map(|chain| chain.bytes).collect();
    assert!(bytes[12..] == *sent, "{} bytes, not those of the frame", bytes.len());
}

fn must_send(driver: &mut NetDriver, wire: &Wire) {
    let sent = frame(300, 1);
    driver.send(1, &Header::default(), &sent).expect("a chain comes back");
    wire.must_receive(&sent, "meanwhile");
}

#[test]
fn fields_that_need_what_is_not_negotiated_are_refused_by_name() {
    // A stream socket offers no offload, so none is negotiated.
    if is_another_program() {
        return;
    }
    let subject = Subject::network(&[]);
    let wire = subject.wire().expect("it is a network");
    let mut driver = subject.net_driver(&options());
    let summed = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::default() };
    let sent = frame(1000, 1);
    let gso = |gso_type| Header { gso_type, gso_size: 100, ..Header::default() };
    let wrong = [(summed, "not_negotiated")]
        .into_iter()
        .chain([1, 3, 4, 5, 0x81, 0x84].map(|gso_type| (gso(gso_type), "not_negotiated")))
        .chain([2, 6, 7, 0x7f, 0x83, 0xff].map(|gso_type| (gso(gso_type), "gso_type")));
    for (header, reason) in wrong {
        let header = header.encode();
        let what = format!("{header:x?}");
        must_drop((&subject, &mut driver, &wire), &[&header, &sent], reason, &what);
    }
    // What means nothing without those is not looked at.
    let noise = Header {
        flags: 0xfe,
        hdr_len: 0xffff,
        gso_size: 0xffff,
        csum_start: 0xffff,
        csum_offset: 0xffff,
        num_buffers: 0xffff,
        gso_type: 0,
    };
    driver.send(1, &noise, &sent).expect("a chain comes back");
    wire.must_receive(&sent, "noise");
}
