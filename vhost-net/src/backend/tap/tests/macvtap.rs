//! Macvtap interfaces.

use std::collections::BTreeSet;

use rustix::io::Errno;

use super::{
    GUEST, exchange_arp, exchange_arp_as, in_namespace, ip, open, open_passed, open_with, refused,
    settings, watched,
};
use crate::backend::macvtap::Macvtap;
use crate::backend::netlink::Netlink;
use crate::backend::tap::FLAGS;
use crate::backend::{LinkEvent, Offloads, Settings};

/// Names of all macvtap interfaces here.
fn macvtaps() -> BTreeSet<String> {
    let shown = ip("-br link show type macvtap");
    shown.lines().filter_map(|line| Some(line.split_once('@')?.0.to_owned())).collect()
}

#[test]
fn macvtap_is_made_on_its_parent_and_removed() {
    in_namespace(|| {
        assert_eq!(refused(open("macvtap=up0", 1)), "macvtap=up0: there is no such interface");
        ip("link add up0 type veth peer name far0");
        ip("link set up0 up");
        ip("link set far0 up");
        ip("addr add 10.0.0.1/24 dev far0");
        let settings = Settings { address: Some(GUEST), ..settings(2) };
        let tap = open_with("macvtap=up0", settings).unwrap();
        assert_eq!(tap.address(), Some(GUEST));
        assert_eq!(tap.mtu(), Some(1500));
        assert!(tap.offloads().csum && tap.offloads().tso4, "{:?}", tap.offloads());
        assert_eq!(macvtaps(), BTreeSet::from(["vhostnet0".to_owned()]));
        exchange_arp(&tap, 12);
        let second = open("macvtap=up0", 1).unwrap();
        assert_ne!(second.address(), tap.address());
        assert_eq!(macvtaps().len(), 2);
        drop(second);
        drop(tap);
        assert_eq!(macvtaps(), BTreeSet::new());
    });
}

#[test]
fn queues_of_a_macvtap_are_taken_over_too() {
    in_namespace(|| {
        ip("link add up0 type veth peer name far0");
        ip("link set up0 up");
        ip("link set far0 up");
        ip("addr add 10.0.0.1/24 dev far0");
        let netlink = Netlink::open().unwrap();
        let made = Macvtap::create(&"up0".parse().unwrap(), &netlink, 2, Some(GUEST)).unwrap();
        let files = made.open(&netlink, 2, FLAGS).unwrap();
        ip(&format!("link set {} up", made.name()));
        let tap = open_passed(files, 2).unwrap();
        assert_eq!(tap.address(), Some(GUEST));
        tap.apply(Offloads::default(), 10).unwrap();
        exchange_arp(&tap, 10);
        // The header of the second queue has become shorter, too: all that is behind it is a frame, and 14 bytes are the
        // shortest.
        let [_, second] = tap.files().nth(1).unwrap();
        assert_eq!(rustix::io::write(second, &[0; 10 + 13]), Err(Errno::INVAL));
        assert_eq!(rustix::io::write(second, &[0; 10 + 14]), Ok(24));
    });
}

#[test]
fn macvtap_of_a_killed_daemon_is_removed() {
    in_namespace(|| {
        ip("link add up0 type veth peer name far0");
        ip("link add link up0 name vhostnet0 address 52:54:00:12:34:56 type macvtap mode bridge");
        ip("link set vhostnet0 up");
        let address = Some(GUEST);
        let _tap = open_with("macvtap=up0", Settings { address, ..settings(1) }).unwrap();
        assert_eq!(macvtaps(), BTreeSet::from(["vhostnet0".to_owned()]));
    });
}

#[test]
fn macvtap_follows_its_parent() {
    in_namespace(|| {
        let parent = || {
            ip("link add up0 type veth peer name far0");
            ip("link set up0 up");
            ip("link set far0 up");
        };
        parent();
        let tap = open("macvtap=up0", 2).unwrap();
        let address = tap.address();
        assert!(tap.link().is_up());
        watched(&tap, async |mut events| {
            ip("link set far0 down");
            events.next_is(false, 0).await;
            ip("link set far0 up");
            events.next_is(true, 0).await;
            ip("link del up0");
            events.next_is(false, 0).await;
            parent();
            // Which may be without a carrier at first.
            while events.next().await != (LinkEvent { up: true, generation: 1 }) {}
        });
        ip("addr add 10.0.0.1/24 dev far0");
        assert_eq!(tap.address(), address);
        exchange_arp_as(&tap, address.unwrap(), 12);
    });
}
