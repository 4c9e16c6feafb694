//! The common configuration structure (VIRTIO 1.3, 4.1.4.3): what driver and device agree on before the rings run.
//!
//! Contract: a state machine without I/O. [`Common::write`] takes any bytes at any offset, changes what may be changed in
//! the state that the device is in, and says what is to be done about it; a field is never half written that was not
//! written at all. What a driver may not do is ignored, and it reads that it was. After it has set FEATURES_OK the
//! features stand; after DRIVER_OK the queues do. A reset is not over before the daemon has let go of the rings:
//! until then the status is not 0, and nothing else that is written counts.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

/// Bytes of the structure without the fields of features that are not offered.
pub(crate) const COMMON_BYTES: usize = 56;

/// No vector: no interrupt.
pub(crate) const VIRTIO_MSI_NO_VECTOR: u16 = 0xffff;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// The fields: where they are, and how many bytes they have.
const FIELDS: [(Field, usize, usize); 16] = [
    (Field::DeviceFeatureSelect, 0, 4),
    (Field::DriverFeatureSelect, 8, 4),
    (Field::DriverFeature, 12, 4),
    (Field::ConfigVector, 16, 2),
    (Field::Status, 20, 1),
    (Field::QueueSelect, 22, 2),
    (Field::QueueSize, 24, 2),
    (Field::QueueVector, 26, 2),
    (Field::QueueEnable, 28, 2),
    (Field::Descriptors, 32, 8),
    (Field::Driver, 40, 8),
    (Field::Device, 48, 8),
    // Fields that are read only.
    (Field::None, 4, 4),
    (Field::None, 18, 2),
    (Field::None, 21, 1),
    (Field::None, 30, 2),
];

#[derive(Clone, Copy)]
enum Field {
    None,
    DeviceFeatureSelect,
    DriverFeatureSelect,
    DriverFeature,
    ConfigVector,
    Status,
    QueueSelect,
    QueueSize,
    QueueVector,
    QueueEnable,
    Descriptors,
    Driver,
    Device,
}

/// What a write asks for besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// DRIVER_OK: the rings are to run.
    Start,
    /// The rings are to stop; then [`Common::finish_reset`].
    Reset,
    /// Changes of the configuration are to be signalled by another vector.
    ConfigVector(u16),
}

/// What a driver has said of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) vector: u16,
    pub(crate) is_enabled: bool,
    /// Guest addresses of the descriptor table, the available and the used ring.
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Normal,
    Resetting,
}

/// The structure, and the device's state with it.
pub(crate) struct Common {
    offered: u64,
    vector_count: u16,
    queue_size_max: u16,
    stage: Stage,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

impl Common {
    /// A device that has been reset. `queue_size_max` is a power of two.
    pub(crate) fn new(offered: u64, queue_count: u16, queue_size_max: u16) -> Self {
        let queue = Queue {
            size: queue_size_max,
            vector: VIRTIO_MSI_NO_VECTOR,
            is_enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        Self {
            offered,
            // One for each queue, and one for changes of the configuration.
            vector_count: queue_count.saturating_add(1),
            queue_size_max,
            stage: Stage::Normal,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: VIRTIO_MSI_NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(queue_count)],
        }
    }

    /// The features that the driver has accepted.
    pub(crate) fn features(&self) -> u64 {
        self.driver_features
    }

    /// The queues, the disabled ones too.
    pub(crate) fn queues(&self) -> &[Queue] {
        &self.queues
    }

    pub(crate) fn is_resetting(&self) -> bool {
        self.stage == Stage::Resetting
    }

    /// The daemon has let go of the rings: all is as it was at first.
    pub(crate) fn finish_reset(&mut self) {
        let queue_count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        *self = Self::new(self.offered, queue_count, self.queue_size_max);
    }

    /// The device can go on only after a reset.
    pub(crate) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// Answers a read. `generation` is that of the device's configuration.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], generation: u8) {
        data.fill(0);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (into, from) in data.iter_mut().zip(self.image(generation).iter().skip(at)) {
            *into = *from;
        }
    }

    /// Takes a write.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Effect> {
        let at = usize::try_from(offset).ok().filter(|at| *at < COMMON_BYTES)?;
        if self.is_resetting() {
            return None;
        }
        let mut image = self.image(0);
        for (byte, new) in image.iter_mut().skip(at).zip(data) {
            *byte = *new;
        }
        let end = at.saturating_add(data.len());
        let mut effect = None;
        for (field, start, len) in FIELDS {
            if start < end && at < start.saturating_add(len) {
                let bytes = image.iter().skip(start).take(len).rev();
                let value = bytes.fold(0u64, |value, byte| value << 8 | u64::from(*byte));
                effect = self.set(field, value).or(effect);
            }
        }
        effect
    }

    /// The structure's bytes.
    fn image(&self, generation: u8) -> [u8; COMMON_BYTES] {
        let queue = self.queues.get(usize::from(self.queue_select));
        let queue_count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        let device_feature = half(self.offered, self.device_feature_select);
        let driver_feature = half(self.driver_features, self.driver_feature_select);
        let mut image = [0; COMMON_BYTES];
        let mut fields = Vec::with_capacity(COMMON_BYTES);
        fields.extend(self.device_feature_select.to_le_bytes());
        fields.extend(device_feature.to_le_bytes());
        fields.extend(self.driver_feature_select.to_le_bytes());
        fields.extend(driver_feature.to_le_bytes());
        fields.extend(self.config_vector.to_le_bytes());
        fields.extend(queue_count.to_le_bytes());
        fields.extend([self.status, generation]);
        fields.extend(self.queue_select.to_le_bytes());
        if let Some(queue) = queue {
            fields.extend(queue.size.to_le_bytes());
            fields.extend(queue.vector.to_le_bytes());
            fields.extend(u16::from(queue.is_enabled).to_le_bytes());
            // The notification of a queue is at its index times the multiplier.
            fields.extend(self.queue_select.to_le_bytes());
            fields.extend(queue.descriptors.to_le_bytes());
            fields.extend(queue.driver.to_le_bytes());
            fields.extend(queue.device.to_le_bytes());
        }
        // VIRTIO 1.3, 4.1.4.3.1: The device MUST present a 0 in queue_size if the virtqueue is unavailable.
        for (into, from) in image.iter_mut().zip(fields) {
            *into = from;
        }
        image
    }

    fn set(&mut self, field: Field, value: u64) -> Option<Effect> {
        let [a, b, c, d, ..] = value.to_le_bytes();
        let (byte, word, dword) = (a, u16::from_le_bytes([a, b]), u32::from_le_bytes([a, b, c, d]));
        match field {
            Field::None => {}
            Field::DeviceFeatureSelect => self.device_feature_select = dword,
            Field::DriverFeatureSelect => self.driver_feature_select = dword,
            Field::DriverFeature => self.set_driver_feature(dword),
            Field::ConfigVector => {
                self.config_vector = self.vector(word);
                return Some(Effect::ConfigVector(self.config_vector));
            }
            Field::Status => return self.set_status(byte),
            Field::QueueSelect => self.queue_select = word,
            Field::QueueSize => {
                let fits = word.is_power_of_two() && word <= self.queue_size_max;
                if let Some(queue) = self.queue().filter(|_| fits) {
                    queue.size = word;
                }
            }
            Field::QueueVector => {
                // VIRTIO 1.3, 4.1.5.1.2.1: Device MUST report NO_VECTOR for a vector that cannot be mapped.
                let vector = self.vector(word);
                if let Some(queue) = self.queue() {
                    queue.vector = vector;
                }
            }
            Field::QueueEnable => {
                if let Some(queue) = self.queue().filter(|_| word == 1) {
                    queue.is_enabled = true;
                }
            }
            Field::Descriptors => {
                if let Some(queue) = self.queue() {
                    queue.descriptors = value;
                }
            }
            Field::Driver => {
                if let Some(queue) = self.queue() {
                    queue.driver = value;
                }
            }
            Field::Device => {
                if let Some(queue) = self.queue() {
                    queue.device = value;
                }
            }
        }
        None
    }

    fn set_driver_feature(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        let rest = self.driver_features;
        match self.driver_feature_select {
            0 => self.driver_features = rest & !0xffff_ffff | value,
            1 => self.driver_features = rest & 0xffff_ffff | value << 32,
            // There are no such features, and accepting none of them is no fault.
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) -> Option<Effect> {
        if value == 0 {
            self.stage = Stage::Resetting;
            return Some(Effect::Reset);
        }
        let was = self.status;
        let mut now = was | value & !STATUS_NEEDS_RESET;
        // VIRTIO 1.3, 2.2.2: The device SHOULD NOT offer what needs VERSION_1 to a driver that does not accept it; it
        // MUST NOT accept features that it has not offered.
        let features = self.driver_features;
        let are_acceptable = features & !self.offered == 0 && features & VIRTIO_F_VERSION_1 != 0;
        if was & STATUS_FEATURES_OK == 0 && !are_acceptable {
            now &= !STATUS_FEATURES_OK;
        }
        if now & STATUS_FEATURES_OK == 0 {
            now &= !STATUS_DRIVER_OK;
        }
        self.status = now;
        (now & !was & STATUS_DRIVER_OK != 0).then_some(Effect::Start)
    }

    /// The selected queue, while it may be changed.
    fn queue(&mut self) -> Option<&mut Queue> {
        let may_change = self.status & STATUS_DRIVER_OK == 0;
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        queue.filter(|queue| may_change && !queue.is_enabled)
    }

    fn vector(&self, asked_for: u16) -> u16 {
        if asked_for < self.vector_count { asked_for } else { VIRTIO_MSI_NO_VECTOR }
    }
}

/// One half of 64 feature bits; there are no others.
fn half(features: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use super::{Common, Effect, VIRTIO_F_VERSION_1, VIRTIO_MSI_NO_VECTOR};

    const OFFERED: u64 = VIRTIO_F_VERSION_1 | 1 << 5 | 1 << 29;

    fn common() -> Common {
        Common::new(OFFERED, 3, 256)
    }

    fn read<const N: usize>(common: &Common, offset: u64) -> [u8; N] {
        let mut bytes = [0xaa; N];
        common.read(offset, &mut bytes, 7);
        bytes
    }

    fn word(common: &Common, offset: u64) -> u16 {
        u16::from_le_bytes(read(common, offset))
    }

    fn accept(common: &mut Common, features: u64) {
        for (select, value) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            common.write(8, &select.to_le_bytes());
            common.write(12, &value.to_le_bytes());
        }
    }

    fn status(common: &mut Common, value: u8) -> (Option<Effect>, u8) {
        let effect = common.write(20, &[value]);
        (effect, read::<1>(common, 20)[0])
    }

    #[test]
    fn features_are_offered_in_halves_and_there_is_no_third() {
        let mut common = common();
        for (select, expected) in [(0u32, OFFERED as u32), (1, 1), (2, 0), (u32::MAX, 0)] {
            common.write(0, &select.to_le_bytes());
            assert_eq!(u32::from_le_bytes(read(&common, 4)), expected, "{select}");
        }
    }

    #[test]
    fn driver_gets_to_driver_ok_with_offered_features_and_then_they_stand() {
        let mut common = common();
        assert_eq!(status(&mut common, 1), (None, 1));
        assert_eq!(status(&mut common, 3), (None, 3));
        accept(&mut common, VIRTIO_F_VERSION_1 | 1 << 5);
        assert_eq!(status(&mut common, 11), (None, 11));
        accept(&mut common, VIRTIO_F_VERSION_1);
        assert_eq!(common.features(), VIRTIO_F_VERSION_1 | 1 << 5);
        for (select, expected) in [(0u32, 1u32 << 5), (1, 1), (2, 0)] {
            common.write(8, &select.to_le_bytes());
            assert_eq!(u32::from_le_bytes(read(&common, 12)), expected, "it reads what it wrote");
        }
        assert_eq!(status(&mut common, 15), (Some(Effect::Start), 15));
        assert_eq!(status(&mut common, 15), (None, 15), "it starts once");
        assert_eq!(status(&mut common, 1), (None, 15), "bits are not taken back");
    }

    #[test]
    fn features_that_were_not_offered_or_lack_version_1_are_not_ok() {
        for features in [0, 1 << 5, VIRTIO_F_VERSION_1 | 1 << 6, u64::MAX] {
            let mut common = common();
            accept(&mut common, features);
            assert_eq!(status(&mut common, 11), (None, 3), "{features:#x}");
            assert_eq!(status(&mut common, 15), (None, 3), "nor does DRIVER_OK count then");
        }
    }

    #[test]
    fn queue_is_described_while_it_is_disabled_and_stands_when_it_is_enabled() {
        let mut common = common();
        assert_eq!(word(&common, 18), 3);
        common.write(22, &2u16.to_le_bytes());
        assert_eq!((word(&common, 24), word(&common, 30)), (256, 2));
        common.write(24, &64u16.to_le_bytes());
        common.write(26, &3u16.to_le_bytes());
        common.write(32, &0x1_2345_6000u64.to_le_bytes());
        common.write(40, &0x1000u32.to_le_bytes());
        common.write(44, &0x2u32.to_le_bytes());
        common.write(48, &0x3000u64.to_le_bytes());
        common.write(28, &1u16.to_le_bytes());
        common.write(24, &32u16.to_le_bytes());
        common.write(28, &0u16.to_le_bytes());
        let queue = common.queues()[2];
        assert_eq!((queue.size, queue.vector, queue.is_enabled), (64, 3, true));
        assert_eq!(
            (queue.descriptors, queue.driver, queue.device),
            (0x1_2345_6000, 0x2_0000_1000, 0x3000)
        );
        assert!(!common.queues()[0].is_enabled);
    }

    #[test]
    fn absurd_sizes_queues_and_vectors_are_not_taken() {
        let mut common = common();
        for size in [0u16, 3, 255, 512, 0x8000, 0xffff] {
            common.write(24, &size.to_le_bytes());
            assert_eq!(word(&common, 24), 256, "{size}");
        }
        for vector in [4u16, 0x100, 0xffff] {
            common.write(26, &vector.to_le_bytes());
            assert_eq!(word(&common, 26), VIRTIO_MSI_NO_VECTOR);
            let effect = common.write(16, &vector.to_le_bytes());
            assert_eq!(effect, Some(Effect::ConfigVector(VIRTIO_MSI_NO_VECTOR)));
        }
        for select in [3u16, 0xffff] {
            common.write(22, &select.to_le_bytes());
            for (offset, value) in [(24, 8u16), (26, 1), (28, 1), (32, 0x1000)] {
                common.write(offset, &value.to_le_bytes());
                assert_eq!(word(&common, offset), 0, "queue {select} is not there");
            }
        }
        assert!(common.queues().iter().all(|queue| !queue.is_enabled));
    }

    #[test]
    fn reset_is_over_when_the_daemon_has_let_go() {
        let mut common = common();
        accept(&mut common, VIRTIO_F_VERSION_1);
        for (offset, value) in [(16, 1u16), (24, 64), (26, 1), (28, 1)] {
            common.write(offset, &value.to_le_bytes());
        }
        assert_eq!(status(&mut common, 15).1, 15);
        assert_eq!(status(&mut common, 0), (Some(Effect::Reset), 15));
        assert_eq!(status(&mut common, 1), (None, 15), "nothing counts before");
        assert!(common.is_resetting());
        common.finish_reset();
        assert_eq!(read::<1>(&common, 20), [0]);
        assert_eq!((common.features(), word(&common, 16)), (0, VIRTIO_MSI_NO_VECTOR));
        let queue = [24, 26, 28].map(|offset| word(&common, offset));
        assert_eq!(queue, [256, VIRTIO_MSI_NO_VECTOR, 0], "its size, its vector, and disabled");
    }

    #[test]
    fn needs_reset_is_the_devices_to_set_and_a_reset_ends_it() {
        let mut common = common();
        assert_eq!(status(&mut common, 64 | 1).1, 1);
        common.set_needs_reset();
        assert_eq!(status(&mut common, 3).1, 67);
        status(&mut common, 0);
        common.finish_reset();
        assert_eq!(read::<1>(&common, 20), [0]);
    }

    #[test]
    fn odd_widths_and_offsets_are_answered() {
        let mut common = common();
        assert_eq!(read::<3>(&common, 20), [0, 7, 0]);
        for offset in [0, 1, 19, 21, 31, 54, 55, 56, 4095, u64::MAX] {
            for len in 0..=64 {
                let mut bytes = vec![0x5a; len];
                common.write(offset, &bytes);
                common.read(offset, &mut bytes, 0);
                common.finish_reset();
            }
        }
        assert_eq!(read::<4>(&common, 54), [0, 0, 0, 0]);
    }
}
