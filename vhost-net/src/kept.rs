//! What a driver has told the device, written down for a successor of this process.
//!
//! Contract: [`Kept::restore`] believes nothing: what no driver can have said leaves the device as it is.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use common::virtqueue::RING_FEATURES;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{KeptState, State};
use crate::filter::{Filter, KeptFilter};

/// vhost-user's own feature bit, which is not the device's to offer.
const PROTOCOL_FEATURES: u64 = 1 << common::protocol::VHOST_USER_F_PROTOCOL_FEATURES;

/// See the module's head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    features: u64,
    state: KeptState,
    filter: KeptFilter,
}

impl Kept {
    /// What a driver that acknowledged these features has said.
    pub(crate) fn new(features: u64, state: &State, filter: &Filter) -> Self {
        Self { features, state: state.save(), filter: filter.save() }
    }

    pub(crate) fn to_value(&self) -> Value {
        // Numbers and lists of them: there is nothing that could not be written.
        serde_json::to_value(self).unwrap_or(Value::Null)
    }

    pub(crate) fn parse(value: &Value) -> Option<Self> {
        Self::deserialize(value).ok()
    }

    /// Has the device be where that leaves it; the features, if it can be.
    pub(crate) fn restore(&self, offered: u64, state: &State, filter: &Filter) -> Option<u64> {
        let offered = offered | RING_FEATURES | PROTOCOL_FEATURES;
        let fits = self.features & !offered == 0
            && state.can_be(&self.state, self.features)
            && filter.can_be(&self.filter);
        if !fits {
            return None;
        }
        state.restore(&self.state);
        filter.restore(&self.filter);
        Some(self.features)
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
mod tests {
    use serde_json::json;

    use super::Kept;
    use crate::command::{MacTable, RxMode};
    use crate::config::{Identity, Mac, State, VIRTIO_NET_F_CTRL_VQ, VLANS, VlanId};
    use crate::filter::Filter;

    const FEATURES: u64 = VIRTIO_NET_F_CTRL_VQ;

    fn device() -> (State, Filter) {
        (State::new(Identity { queue_pairs: 4, ..Identity::default() }), Filter::new())
    }

    fn told() -> (State, Filter) {
        let (state, filter) = device();
        state.negotiated(FEATURES);
        filter.negotiated(FEATURES);
        state.set_mac(Mac::new([2, 0, 0, 0, 0, 1]));
        state.set_active_pairs(3);
        filter.set_mode(RxMode::Promiscuous, false);
        filter.set_addresses(&MacTable::Only(vec![Mac::new([2, 0, 0, 0, 0, 9])]), &MacTable::Any);
        filter.add_vlan(VlanId::new(VLANS - 1).unwrap());
        (state, filter)
    }

    #[test]
    fn what_a_driver_has_said_is_known_to_the_successor() {
        let (state, filter) = told();
        let kept = Kept::new(FEATURES, &state, &filter);
        let (state, filter) = device();
        let parsed = Kept::parse(&kept.to_value()).unwrap();
        assert_eq!(parsed.restore(FEATURES, &state, &filter), Some(FEATURES));
        assert_eq!(Kept::new(FEATURES, &state, &filter), kept);
    }

    #[test]
    fn what_no_driver_can_have_said_leaves_the_device_as_it_is() {
        let (state, filter) = told();
        let good = Kept::new(FEATURES, &state, &filter).to_value();
        for (part, field, value) in [
            ("state", "active_pairs", json!(0)),
            ("state", "active_pairs", json!(5)),
            ("state", "mac", json!(1_u64 << 48)),
            ("state", "offloads", json!(1 << 7)),
            ("filter", "modes", json!(1 << 20)),
            ("filter", "unicast", json!(vec![1; 65])),
            ("filter", "vlans", json!([0])),
            ("filter", "other", json!(0)),
        ] {
            let mut bad = good.clone();
            bad[part][field] = value;
            let (state, filter) = device();
            let before = Kept::new(FEATURES, &state, &filter);
            let restored =
                Kept::parse(&bad).and_then(|kept| kept.restore(FEATURES, &state, &filter));
            assert_eq!(restored, None, "{part}.{field}");
            assert_eq!(Kept::new(FEATURES, &state, &filter), before, "{part}.{field}");
        }
        let kept = Kept::parse(&good).unwrap();
        let (state, filter) = device();
        assert_eq!(kept.restore(0, &state, &filter), None, "features that are not offered");
    }
}
