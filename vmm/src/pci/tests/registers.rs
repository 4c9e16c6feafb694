//! What a guest finds in the configuration space and in the BAR, and what becomes of it when the guest moves things.

use tests::temp_dir;

use super::driver::{Driver, Guest, LIMIT, VERSION_1, device, quick, wait_readable};
use super::scripted::{Script, Scripted, Truth};
use crate::front_end::Kind;
use crate::virtio::transport::BAR_BYTES;

/// As many as vhost-user has numbers for.
const QUEUES_MAX: u32 = 256;

/// A guest whose first device has two queues.
fn with_guest(test: impl FnOnce(&Guest)) {
    with_guest_of(Truth::default(), test);
}

fn with_guest_of(truth: Truth, test: impl FnOnce(&Guest)) {
    let directory = temp_dir();
    let socket = directory.path().join("socket");
    let _daemon = Scripted::new(&socket, vec![Script { truth, ..Script::default() }]);
    test(&Guest::new(vec![device(Kind::Block, &socket)], quick()));
}

fn capabilities(guest: &Guest) -> Vec<(u64, [u8; 20])> {
    let mut found = Vec::new();
    let [mut at] = guest.config::<1>(1, 0x34);
    while at != 0 {
        let cap: [u8; 20] = guest.config(1, at.into());
        found.push((u64::from(at), cap));
        at = cap[1];
    }
    found
}

#[test]
fn function_is_a_modern_device_of_its_kind() {
    with_guest(|guest| {
        let word = |register| u16::from_le_bytes(guest.config(1, register));
        assert_eq!((word(0x00), word(0x02)), (0x1af4, 0x1040 + 2), "a block device");
        assert_eq!(guest.config::<1>(1, 0x08), [1], "the revision");
        assert!(word(0x2e) >= 0x40, "no legacy driver takes it");
        assert_eq!(guest.config::<1>(1, 0x3d), [0], "it has no interrupt pin");
    });
}

#[test]
fn what_a_daemon_offers_of_the_transport_is_offered_only_if_ours_has_it() {
    with_guest_of(Truth { features: u64::MAX, ..Truth::default() }, |guest| {
        let reserved = (1 << 50) - (1 << 24);
        // INDIRECT_DESC, EVENT_IDX, VERSION_1, IN_ORDER, ORDER_PLATFORM: not NOTIFICATION_DATA, RING_RESET or ADMIN_VQ.
        let ours = 1 << 28 | 1 << 29 | VERSION_1 | 1 << 35 | 1 << 36;
        assert_eq!(Driver::probe(guest, 1).offered() & reserved, ours);
    });
}

#[test]
fn configuration_is_read_by_halves_before_features_are_accepted() {
    with_guest(|guest| {
        let driver = Driver::probe(guest, 1);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.device_config(0), [0, 1, 2, 3]);
        assert_eq!(driver.device_config(4), [4, 5, 6, 7]);
        assert_eq!(driver.device_config(0), [0, 1, 2, 3, 4, 5, 6, 7]);
    });
}

fn kicks(guest: &Guest) -> Vec<u64> {
    guest.vm.state.lock().expect("whole").kicks.keys().copied().collect()
}

#[test]
fn capabilities_name_each_structure_once_and_lie_in_the_bar() {
    with_guest(|guest| {
        let caps = capabilities(guest);
        let kinds: Vec<_> = caps.iter().map(|(_, cap)| (cap[0], cap[2], cap[3])).collect();
        // MSI-X for three vectors; then length and type of virtio's.
        let expected = [(0x11, 2, 0), (9, 16, 1), (9, 20, 2), (9, 16, 3), (9, 16, 4), (9, 20, 5)];
        assert_eq!(kinds, expected);
        for (_, cap) in &caps[1..5] {
            let word = |at: usize| u32::from_le_bytes(cap[at..at + 4].try_into().expect("four"));
            assert_eq!(cap[4], 0, "BAR 0");
            assert!(word(8) + word(12) <= BAR_BYTES && word(12) > 0);
            assert_eq!(word(8) % 4, 0, "aligned");
            if cap[3] == 2 {
                let multiplier = word(16);
                assert!(multiplier.is_power_of_two() && multiplier % 2 == 0);
                assert!(
                    word(12) >= (QUEUES_MAX - 1) * multiplier + 2,
                    "for each queue there may be"
                );
            }
        }
    });
}

#[test]
fn notification_addresses_follow_the_bar_and_end_with_it() {
    with_guest(|guest| {
        let driver = Driver::probe(guest, 1);
        let bar = driver.bar;
        assert_eq!(kicks(guest), [bar + 0x3000, bar + 0x3004]);
        guest.set_config(1, 0x04, &[0]);
        assert_eq!(kicks(guest), [0u64; 0]);
        assert_eq!(guest.read::<4>(driver.common), [0xff; 4], "nothing answers");
        guest.set_config(1, 0x10, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(guest.config(1, 0x10)), !(BAR_BYTES - 1));
        guest.set_config(1, 0x10, &0xd700_0000u32.to_le_bytes());
        guest.set_config(1, 0x04, &[2]);
        assert_eq!(kicks(guest), [0xd700_3000, 0xd700_3004]);
        assert_eq!(guest.read::<2>(0xd700_0012), [2, 0], "the common configuration is there");
        assert_eq!(guest.read::<4>(bar), [0xff; 4], "and no longer here");
        assert!(guest.devices.reset(LIMIT));
        assert_eq!(kicks(guest), [0u64; 0]);
        assert_eq!(u32::from_le_bytes(guest.config(1, 0x10)), bar as u32);
    });
}

#[test]
fn bar_is_reached_through_the_configuration_space() {
    with_guest(|guest| {
        let driver = Driver::probe(guest, 1);
        let (at, _) = *capabilities(guest).last().expect("the last one");
        let aim = |offset: u32, len: u32| {
            guest.set_config(1, at + 4, &[0]);
            guest.set_config(1, at + 8, &offset.to_le_bytes());
            guest.set_config(1, at + 12, &len.to_le_bytes());
        };
        aim(20, 1);
        guest.set_config(1, at + 16, &[3, 0, 0, 0]);
        assert_eq!(driver.status(), 3);
        assert_eq!(guest.config::<1>(1, at + 16), [3]);
        aim(18, 2);
        assert_eq!(guest.config::<2>(1, at + 16), [2, 0]);
        // Neither lengths nor places that there are not do anything.
        for (offset, len) in [(0, 0), (0, 3), (0, 8), (1, 2), (u32::MAX, 1), (20, u32::MAX)] {
            aim(offset, len);
            guest.set_config(1, at + 16, &[0xff; 4]);
            let _any: [u8; 4] = guest.config(1, at + 16);
        }
        guest.set_config(1, at + 4, &[1]);
        guest.set_config(1, at + 16, &[0; 4]);
        assert_eq!(driver.status(), 3, "there is no other BAR");
    });
}

#[test]
fn where_there_is_no_function_there_are_ones() {
    with_guest(|guest| {
        for (device, register) in [(2, 0), (31, 0), (0, 0x1000), (1, 0x1000), (1, 0x7000)] {
            assert_eq!(guest.config::<4>(device, register), [0xff; 4]);
            guest.set_config(device, register, &[0; 4]);
        }
        assert_eq!(guest.config::<4>(1, 0x100), [0; 4], "no extended capabilities");
        assert_eq!(guest.config::<4>(1, 0xffe), [0xff; 4], "across the end of a function");
        assert_eq!(guest.config::<3>(0, 9), [0, 0, 6], "a host bridge");
    });
}

#[test]
fn queues_that_are_nowhere_break_their_device_until_it_is_reset() {
    for (offset, address) in
        [(32, u64::MAX - 15), (40, 1), (48, 63 << 20 | 0xf_ff00), (48, 1 << 40)]
    {
        with_guest(|guest| {
            let driver = Driver::probe(guest, 1);
            driver.negotiate(VERSION_1);
            // Described before it is enabled, as all else.
            let write = |at: u64, bytes: &[u8]| guest.write(driver.common + at, bytes);
            write(22, &1u16.to_le_bytes());
            for place in [32, 40, 48] {
                write(place, &0x10_0000u64.to_le_bytes());
            }
            write(offset, &address.to_le_bytes());
            write(28, &1u16.to_le_bytes());
            driver.set_status(15);
            assert_eq!(driver.status(), 0x4f, "{address:#x}: DEVICE_NEEDS_RESET");
            assert!(wait_readable(&driver.call(0), LIMIT), "the driver is told");
            driver.reset();
            driver.negotiate(VERSION_1);
            driver.queue(0, 16);
            driver.go();
        });
    }
}
