//! A driver that breaks the rules of descriptors and chains, or asks for nonsense in a request: each
//! field of a descriptor, in the table and in an indirect one.

use crate::ring_attack::{
    Attack, Reaction, SIZE, TABLE_BYTES, UNWRITTEN, breaks, descriptor, ends, fails, under,
};
use crate::subject::{QUEUE_COUNT, Subject, is_ours_to_promise, must_work, promise};
use frontend::block::{Request, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use frontend::guest::Options;
use frontend::ring::{
    DESCRIPTOR_BYTES, VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT as NEXT, VIRTQ_DESC_F_WRITE as WRITE,
};
use frontend::wire::PATIENCE;
use std::cell::OnceCell;
use std::sync::Arc;

#[test]
fn chains_that_loop() {
    for mut subject in Subject::each() {
        breaks(&mut subject, "descriptor that is its own next", |attack| {
            attack.chain(&[descriptor(attack.header, 16, NEXT, 0)]);
        });
        breaks(&mut subject, "two descriptors in a circle", |attack| {
            attack.chain(&[
                descriptor(attack.header, 16, NEXT, 1),
                descriptor(attack.data, 512, WRITE | NEXT, 0),
            ]);
        });
        breaks(&mut subject, "circle that the head is not part of", |attack| {
            let [header, ..] = attack.good();
            attack.chain(&[
                header,
                descriptor(attack.data, 512, WRITE | NEXT, 2),
                descriptor(attack.data, 512, WRITE | NEXT, 1),
            ]);
        });
        breaks(&mut subject, "circle in an indirect table", |attack| {
            let circle = [
                descriptor(attack.header, 16, NEXT, 1),
                descriptor(attack.data, 512, WRITE | NEXT, 1),
            ];
            attack.indirect(&circle, 32, 0);
        });
    }
}

#[test]
fn indexes_out_of_range() {
    for mut subject in Subject::each() {
        for index in [SIZE, SIZE + 1, 0x7fff, u16::MAX] {
            breaks(&mut subject, &format!("head {index}"), |attack| attack.offer(index));
            breaks(&mut subject, &format!("next {index}"), |attack| {
                attack.chain(&[descriptor(attack.header, 16, NEXT, index)])
            });
            breaks(&mut subject, &format!("next {index} in an indirect table"), |attack| {
                attack.indirect(&[descriptor(attack.header, 16, NEXT, index)], 16, 0);
            });
        }
    }
}

#[test]
fn available_index_that_jumps() {
    for mut subject in Subject::each() {
        let (far, back) = ([0x7fff, 0x8001], (0..15).map(|bit| 0_u16.wrapping_sub(1 << bit)));
        for ahead in (5..16).map(|bit| 1 << bit).chain([SIZE + 1]).chain(far).chain(back) {
            let status = OnceCell::new();
            breaks(&mut subject, &format!("{ahead} ahead"), |attack| {
                // Whoever believes the index finds a good request in every entry.
                let memory = attack.ring.memory();
                for (at, part) in (0..).zip(attack.good()) {
                    memory.write(attack.table + at * DESCRIPTOR_BYTES, &part.encode());
                }
                for index in 0..SIZE {
                    let all = descriptor(attack.table, 48, VIRTQ_DESC_F_INDIRECT, 0);
                    attack.ring.write_descriptor(index, &all);
                    attack.ring.write_available(index, index);
                }
                attack.ring.set_available_index(attack.ring.available_index().wrapping_add(ahead));
                status.set((Arc::clone(memory), attack.status)).expect("there is one attack");
            });
            let (memory, status) = status.get().expect("the attack was run");
            let untouched = memory.read(*status, 1) == [UNWRITTEN];
            promise(untouched, || format!("{ahead} ahead: a request was served that was not made"));
        }
    }
}

#[test]
fn buffers_outside_the_memory() {
    let mut subject = Subject::start();
    let end = u64::try_from(Options::default().memory[0].size_bytes).unwrap_or(0);
    for address in [end, end - 8, 1 << 40, 1 << 63, u64::MAX - 8, u64::MAX] {
        fails(&mut subject, &format!("header at {address:#x}"), |attack| {
            let [mut header, data, status] = attack.good();
            header.address = address;
            attack.chain(&[header, data, status]);
        });
        fails(&mut subject, &format!("data at {address:#x}"), |attack| {
            let [header, mut data, status] = attack.good();
            data.address = address;
            attack.chain(&[header, data, status]);
        });
        fails(&mut subject, &format!("indirect table at {address:#x}"), |attack| {
            attack.chain(&[descriptor(address, 48, VIRTQ_DESC_F_INDIRECT, 0)]);
        });
    }
    for address in [end, 1 << 40, u64::MAX] {
        breaks(&mut subject, &format!("status at {address:#x}"), |attack| {
            let [header, data, mut status] = attack.good();
            status.address = address;
            attack.chain(&[header, data, status]);
        });
    }
    fails(&mut subject, "data of 4 GiB", |attack| {
        let [header, mut data, status] = attack.good();
        data.len_bytes = u32::MAX;
        attack.chain(&[header, data, status]);
    });
}

#[test]
fn indirect_tables_that_break_the_rules() {
    for mut subject in Subject::each() {
        breaks(&mut subject, "indirect in indirect", |attack| {
            attack.indirect(&[descriptor(attack.table + 64, 48, VIRTQ_DESC_F_INDIRECT, 0)], 16, 0);
        });
        breaks(&mut subject, "indirect after a descriptor in an indirect table", |attack| {
            let [header, ..] = attack.good();
            attack.indirect(
                &[header, descriptor(attack.table + 64, 48, VIRTQ_DESC_F_INDIRECT, 0)],
                32,
                0,
            );
        });
        // VIRTIO 1.3, 2.7.5.3.1: the driver MUST NOT set both INDIRECT and NEXT.
        breaks(&mut subject, "indirect with next", |attack| {
            attack.indirect(&attack.good(), 48, NEXT)
        });
        for len_bytes in [0, 1, 15, 17, 47] {
            breaks(&mut subject, &format!("table of {len_bytes} bytes"), |attack| {
                attack.indirect(&attack.good(), len_bytes, 0)
            });
        }
        breaks(&mut subject, "table of 4 GiB", |attack| {
            attack.indirect(&attack.good(), u32::MAX - 15, 0)
        });
        breaks(&mut subject, "endless table", |attack| {
            let endless: Vec<_> =
                (1..=65_535).map(|next| descriptor(attack.header, 1, NEXT, next)).collect();
            attack.indirect(&endless, 65_535 * 16, 0);
        });
    }
}

#[test]
fn requests_without_a_place_for_their_status() {
    let mut subject = Subject::start();
    breaks(&mut subject, "header alone", |attack| {
        attack.chain(&[descriptor(attack.header, 16, 0, 0)])
    });
    breaks(&mut subject, "device-readable status", |attack| {
        let [header, mut data, mut status] = attack.good();
        (data.flags, status.flags) = (NEXT, 0);
        attack.chain(&[header, data, status]);
    });
    breaks(&mut subject, "status without length", |attack| {
        attack.chain(&[
            descriptor(attack.header, 16, NEXT, 1),
            descriptor(attack.status, 0, WRITE, 0),
        ]);
    });
}

#[test]
fn requests_of_a_wrong_form() {
    let mut subject = Subject::start();
    for len_bytes in [0, 1, 8, 15] {
        fails(&mut subject, &format!("header of {len_bytes} bytes"), |attack| {
            let [mut header, data, status] = attack.good();
            header.len_bytes = len_bytes;
            attack.chain(&[header, data, status]);
        });
    }
    fails(&mut subject, "device-writable header", |attack| {
        let [mut header, data, status] = attack.good();
        header.flags |= WRITE;
        attack.chain(&[header, data, status]);
    });
    // VIRTIO 1.3, 2.7.4.2: the driver MUST place device-writable descriptors after device-readable
    // ones.
    fails(&mut subject, "device-writable before device-readable", |attack| {
        let [header, data, mut status] = attack.good();
        (status.flags, status.next) = (WRITE, 0);
        attack.chain(&[header, data, descriptor(attack.data, 512, NEXT, 3), status]);
    });
}

#[test]
fn data_in_the_wrong_direction_is_not_moved() {
    // There is no data in the right direction: the request may fail, or have nothing to do.
    const PATTERN: [u8; 4096] = [0x5a; 4096];
    let mut subject = Subject::start();
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let memory = OnceCell::new();
        let reaction = under(&mut subject, "data in the wrong direction", |attack| {
            attack
                .ring
                .memory()
                .write(attack.header, &Request { kind, ..Request::default() }.header());
            attack.ring.memory().write(attack.data, &PATTERN);
            memory
                .set((Arc::clone(attack.ring.memory()), attack.data))
                .expect("there is one attack");
            let [header, mut data, status] = attack.good();
            data.flags = if kind == VIRTIO_BLK_T_IN { NEXT } else { WRITE | NEXT };
            attack.chain(&[header, data, status]);
        });
        assert_ne!(reaction, Reaction::Nothing);
        let (memory, data) = memory.get().expect("the attack was run");
        assert!(
            memory.read(*data, PATTERN.len()) == PATTERN,
            "request type {kind} wrote into a device-readable buffer"
        );
        assert_eq!(subject.image_bytes(0, 512), [0; 512], "request type {kind} wrote to the disk");
    }
}

#[test]
fn buffers_without_length_do_no_harm() {
    let mut subject = Subject::start();
    for position in 0..3 {
        ends(&mut subject, &format!("descriptor {position} without length"), |attack| {
            let mut chain = attack.good();
            chain[position].len_bytes = 0;
            attack.chain(&chain);
        });
        ends(&mut subject, &format!("indirect, descriptor {position} without length"), |attack| {
            let mut chain = attack.good();
            chain[position].len_bytes = 0;
            attack.indirect(&chain, 48, 0);
        });
    }
    breaks(&mut subject, "nothing but buffers without length", |attack| {
        attack.chain(&attack.good().map(|part| descriptor(part.address, 0, part.flags, part.next)));
    });
}

#[test]
fn every_flag_of_every_descriptor() {
    // What the specification reserves may be ignored.
    let mut subject = Subject::start();
    let known = 0..8;
    let reserved = (3..16).map(|bit| 1 << bit);
    for flags in known.chain(reserved) {
        for position in 0..3 {
            ends(&mut subject, &format!("flags {flags:#x} in descriptor {position}"), |attack| {
                let mut chain = attack.good();
                chain[position].flags = flags;
                attack.chain(&chain);
            });
            let what = format!("flags {flags:#x} in descriptor {position} of a table");
            ends(&mut subject, &what, |attack| {
                let mut chain = attack.good();
                chain[position].flags = flags;
                attack.indirect(&chain, 48, 0);
            });
        }
        ends(&mut subject, &format!("flags {flags:#x} beside INDIRECT"), |attack| {
            attack.indirect(&attack.good(), 48, flags);
        });
    }
}

#[test]
fn every_length_of_every_descriptor() {
    let mut subject = Subject::start();
    // Not so long that it fits into the guest's memory, and overwrites what is the neighbour's.
    let lengths = [1, 2, 15, 17, 511, 513, 4095, 4097, 65_535, (TABLE_BYTES / 2) as u32];
    let beyond = [1 << 24, 1 << 30, (1 << 31) - 1, 1 << 31, u32::MAX - 15, u32::MAX];
    for len_bytes in lengths.into_iter().chain(beyond) {
        for position in 0..3 {
            let what = format!("{len_bytes} bytes in descriptor {position}");
            ends(&mut subject, &what, |attack| {
                let mut chain = attack.good();
                // The status in front of the room behind it.
                if position == 2 {
                    chain[position].address = attack.table;
                }
                chain[position].len_bytes = len_bytes;
                attack.chain(&chain);
            });
        }
    }
}

#[test]
fn buffers_in_the_ring_itself() {
    // The device reads its request from there, or has data written over its own ring.
    let mut subject = Subject::start();
    let areas = |attack: &Attack<'_>| {
        let ring = attack.ring;
        [ring.descriptors_address(), ring.available_address(), ring.used_address()]
    };
    for area in 0..3 {
        for position in 0..3 {
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
                let what = format!("request type {kind}, descriptor {position} in area {area}");
                ends(&mut subject, &what, |attack| {
                    let request = Request { kind, ..Request::default() };
                    attack.ring.memory().write(attack.header, &request.header());
                    let mut chain = attack.good();
                    if kind == VIRTIO_BLK_T_OUT {
                        chain[1].flags = NEXT;
                    }
                    chain[position].address = areas(attack)[area];
                    // No longer than the ring's page has room for.
                    chain[position].len_bytes = chain[position].len_bytes.min(512);
                    attack.chain(&chain);
                });
            }
        }
        ends(&mut subject, &format!("indirect table in area {area}"), |attack| {
            attack.chain(&[descriptor(areas(attack)[area], 48, VIRTQ_DESC_F_INDIRECT, 0)]);
        });
    }
}

#[test]
fn indirect_table_that_is_its_own_data() {
    let mut subject = Subject::start();
    for position in 0..3 {
        ends(&mut subject, &format!("descriptor {position} is the table"), |attack| {
            let mut chain = attack.good();
            chain[position].address = attack.table;
            attack.indirect(&chain, 48, 0);
        });
    }
}

#[test]
fn same_head_twice_does_no_harm() {
    // The second may find the first under way, which breaks the ring, or done.
    let mut subject = Subject::start();
    let reaction = under(&mut subject, "one head twice", |attack| {
        attack.chain(&attack.good());
        attack.offer(0);
    });
    promise(reaction != Reaction::Nothing, || "one head twice: nothing happens".into());
    let reaction = under(&mut subject, "one head in every entry", |attack| {
        attack.chain(&attack.good());
        (1..SIZE).for_each(|_| attack.offer(0));
    });
    promise(reaction != Reaction::Nothing, || "one head in every entry: nothing happens".into());
}

#[test]
fn broken_ring_runs_again_once_it_is_set_up_again() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_count: QUEUE_COUNT, ..Options::default() });
    let ring = driver.guest.queues[0].ring().clone();
    ring.set_available_index(1000);
    driver.kick(0).expect("the device can be kicked");
    assert_eq!(
        driver.guest.errs[0].wait(PATIENCE).expect("the err descriptor can be read"),
        1,
        "the ring is not broken"
    );
    driver.guest.front_end.get_vring_base(0).expect("a broken ring can be stopped");
    ring.set_available_index(0);
    driver.guest.start_queue(0, 0).expect("the ring can be set up");
    driver.guest.enable(0).expect("the ring can be enabled");
    must_work(&mut driver, 0);
    must_work(&mut driver, 1);
}
