//! The requests of the block device (VIRTIO 1.3, 5.2.6), one by one and many at a time.

use crate::subject::{
    DISK_SECTORS, QUEUE_COUNT, Subject, is_ours_to_promise, lacks_feature, must_work,
};
use frontend::block::{
    BlockDriver, ID_BYTES, Request, SECTOR_BYTES, Segment, VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use frontend::guest::Options;
use frontend::virtqueue::Buffer;
use frontend::wire::PATIENCE;
use std::os::unix::fs::MetadataExt;

/// Request types that no device of this kind knows: between the known ones, just beyond them, and
/// at the end.
const UNKNOWN_KINDS: [u32; 6] = [2, 3, 12, 30, 0x8000_0000, u32::MAX];

fn bytes(seed: usize, size_bytes: usize) -> Vec<u8> {
    (0..size_bytes).map(|at| u8::try_from((at + seed * 31 + at / 251) % 256).unwrap_or(0)).collect()
}

/// Performs a request that must succeed, and returns its data.
fn must(driver: &mut BlockDriver, request: &Request) -> Vec<u8> {
    let outcome = driver.perform(0, request).expect("the request ends");
    assert_eq!(
        outcome.status, VIRTIO_BLK_S_OK,
        "request type {} at {}",
        request.kind, request.sector
    );
    outcome.data
}

fn status(driver: &mut BlockDriver, request: &Request) -> u8 {
    driver.perform(0, request).expect("the request ends").status
}

#[test]
fn written_data_is_read_back_and_reaches_the_image() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for (seed, (sector, sectors)) in
        [(0, 1), (1, 8), (9, 300), (DISK_SECTORS - 1, 1), (1000, 2048)].into_iter().enumerate()
    {
        let data = bytes(seed, sectors * SECTOR_BYTES);
        must(&mut driver, &Request::write(sector, &data));
        assert!(
            must(&mut driver, &Request::read(sector, data.len())) == data,
            "{sectors} sectors at {sector}"
        );
        must(&mut driver, &Request::flush());
        assert!(
            subject.image_bytes(sector * 512, data.len()) == data,
            "{sectors} sectors at {sector} of the image"
        );
    }
}

#[test]
fn data_may_be_scattered_over_many_segments() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options { queue_size: 512, ..Options::default() });
    for indirect in [false, true] {
        for lens in [vec![512; 254], vec![4096, 512, 8192, 1024], vec![1, 511], vec![3, 5, 504]] {
            let data = bytes(lens.len(), lens.iter().sum());
            let mut rest = data.as_slice();
            let mut readable = Vec::new();
            for len in &lens {
                let (part, later) = rest.split_at(*len);
                readable.push(part.to_vec());
                rest = later;
            }
            must(
                &mut driver,
                &Request {
                    kind: VIRTIO_BLK_T_OUT,
                    sector: 16,
                    readable,
                    indirect,
                    ..Request::default()
                },
            );
            let read = Request {
                kind: VIRTIO_BLK_T_IN,
                sector: 16,
                writable_bytes: lens,
                indirect,
                ..Request::default()
            };
            assert!(must(&mut driver, &read) == data, "indirect: {indirect}");
        }
    }
}

#[test]
fn framing_is_the_driver_s_choice() {
    // VIRTIO 1.3, 2.7.4.1: the device MUST NOT make assumptions about the arrangement of
    // descriptors.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    let data = bytes(3, 1024);
    must(&mut driver, &Request::write(0, &data));
    for (readable, writable) in [
        (&[16_u32][..], &[1025_u32][..]),
        (&[8, 8], &[1024, 1]),
        (&[1, 15], &[1, 1023, 1]),
        (&[4, 4, 4, 4], &[512, 513]),
    ] {
        let at = driver.guest.allocate(4096);
        driver.guest.memory.write(at, &Request::read(0, 0).header());
        driver.guest.memory.write(at + 16, &[0xff; 1025]);
        let mut next = at;
        let lens =
            readable.iter().map(|len| (*len, false)).chain(writable.iter().map(|len| (*len, true)));
        let buffers: Vec<_> = lens
            .map(|(len_bytes, writable)| {
                let address = next;
                next += u64::from(len_bytes);
                Buffer { address, len_bytes, writable }
            })
            .collect();
        let queue = &mut driver.guest.queues[0];
        queue.submit(&buffers);
        queue.kick().expect("the device can be kicked");
        let used = queue.wait_used(PATIENCE).expect("the request ends");
        assert_eq!(used.len_bytes, 1025, "{readable:?} {writable:?}");
        let answer = driver.guest.memory.read(at + 16, 1025);
        assert!(
            answer[..1024] == data && answer[1024] == VIRTIO_BLK_S_OK,
            "{readable:?} {writable:?}"
        );
    }
}

#[test]
fn used_length_counts_what_was_written() {
    // VIRTIO 1.3, 2.7.8: len is the number of bytes written into the device-writable portion.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for (request, expected) in
        [(Request::read(0, 4096), 4097), (Request::write(0, &[1; 4096]), 1), (Request::flush(), 1)]
    {
        let outcome = driver.perform(0, &request).expect("the request ends");
        assert_eq!(
            (outcome.status, outcome.used_bytes),
            (VIRTIO_BLK_S_OK, expected),
            "request type {}",
            request.kind
        );
    }
}

#[test]
fn many_requests_at_once_all_come_back_with_their_own_data() {
    const OUTSTANDING: u16 = 40;
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for round in 0..10 {
        let heads: Vec<_> = (0..OUTSTANDING)
            .map(|at| {
                driver.submit(
                    0,
                    &Request::write(u64::from(at) * 8, &bytes(usize::from(at) + round, 4096)),
                )
            })
            .collect();
        driver.kick(0).expect("the device can be kicked");
        for _ in &heads {
            assert_eq!(driver.complete(0).expect("a write ends").1.status, VIRTIO_BLK_S_OK);
        }
        let heads: Vec<_> = (0..OUTSTANDING)
            .map(|at| {
                driver.submit(0, &Request::read(u64::from(at) * 8, 4096).through_indirect_table())
            })
            .collect();
        driver.kick(0).expect("the device can be kicked");
        for _ in &heads {
            let (head, outcome) = driver.complete(0).expect("a read ends");
            let at = heads.iter().position(|submitted| *submitted == head).expect("a head of ours");
            assert!(outcome.data == bytes(at + round, 4096), "the data of request {at}");
        }
    }
}

#[test]
fn more_requests_than_fit_into_one_turn_write_each_their_own_data() {
    if crate::subject::is_another_program() {
        return;
    }
    // As many as a worker takes from one ring in a turn, which is also what its engine has room
    // for.
    const EACH: u16 = 256;
    let subject = Subject::with_options(&["--threads", "1"]);
    for (round, segments) in [[1_usize, 2], [2, 3], [3, 4], [1, 5]].into_iter().enumerate() {
        let mut driver = subject.driver(&Options {
            queue_count: QUEUE_COUNT,
            queue_size: EACH,
            ..Options::default()
        });
        let write = |queue: u16, at: u16| {
            let count = segments[usize::from(queue)];
            let sector = u64::from(queue * EACH + at) * 8;
            // Every segment has its own number in all its bytes.
            let fill = |segment| {
                (usize::from(at) + usize::from(queue) * 97 + segment * 31 + round * 7 + 1) % 251
            };
            let readable: Vec<_> = (0..count)
                .map(|segment| vec![u8::try_from(fill(segment)).unwrap_or(0); SECTOR_BYTES])
                .collect();
            Request { kind: VIRTIO_BLK_T_OUT, sector, readable, ..Request::default() }
        };
        let all = || (0..QUEUE_COUNT).flat_map(|queue| (0..EACH).map(move |at| (queue, at)));
        subject.while_stopped(|| {
            for (queue, at) in all() {
                driver.submit(queue, &write(queue, at).through_indirect_table());
            }
            for queue in 0..QUEUE_COUNT {
                driver.kick(queue).expect("the device can be kicked");
            }
        });
        for (queue, _) in all() {
            assert_eq!(driver.complete(queue).expect("a write ends").1.status, VIRTIO_BLK_S_OK);
        }
        for (queue, at) in all() {
            let expected = write(queue, at);
            let written = expected.readable.concat();
            assert!(
                subject.image_bytes(expected.sector * 512, written.len()) == written,
                "round {round}: write {at} of queue {queue}"
            );
        }
    }
}

#[test]
fn serial_number_is_told() {
    if crate::subject::is_another_program() {
        return;
    }
    for (serial, expected) in
        [("disk-7", "disk-7"), ("12345678901234567890", "12345678901234567890")]
    {
        let subject = Subject::with_options(&["--serial", serial]);
        let id = must(&mut subject.driver(&Options::default()), &Request::get_id());
        assert_eq!(id.len(), ID_BYTES);
        // VIRTIO 1.3, 5.2.6.1: NUL-terminated, unless it is 20 bytes long.
        let told: Vec<u8> = id.into_iter().take_while(|byte| *byte != 0).collect();
        assert_eq!(told, expected.as_bytes());
    }
}

#[test]
fn discard_of_several_segments_frees_the_host_s_blocks() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    let config = driver.config().expect("the configuration space can be read");
    must(&mut driver, &Request::write(0, &bytes(1, 1 << 20)));
    must(&mut driver, &Request::flush());
    let before = std::fs::metadata(subject.image()).expect("the image is there").blocks();
    let mut segments: Vec<_> =
        [0, 1024].map(|sector| Segment { sector, count: 512, flags: 0 }).to_vec();
    if config.max_discard_seg() == 1 {
        segments.truncate(1);
    }
    must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_DISCARD, &segments));
    let after = std::fs::metadata(subject.image()).expect("the image is there").blocks();
    let freed = 512 * segments.len() as u64;
    assert!(before - after >= freed, "{before} blocks before, {after} after, {freed} discarded");
    assert!(
        must(&mut driver, &Request::read(512, 512 * SECTOR_BYTES))
            == bytes(1, 1 << 20)[512 * SECTOR_BYTES..1024 * SECTOR_BYTES]
    );
}

#[test]
fn write_zeroes_leaves_zeroes_and_nothing_else() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let config = driver.config().expect("the configuration space can be read");
    for flags in [0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP] {
        let data = bytes(5, 256 << 10);
        must(&mut driver, &Request::write(0, &data));
        let mut segments =
            vec![Segment { sector: 8, count: 64, flags }, Segment { sector: 101, count: 3, flags }];
        segments.truncate(usize::try_from(config.max_write_zeroes_seg()).unwrap_or(usize::MAX));
        let mut expected = data.clone();
        for segment in &segments {
            let from = usize::try_from(segment.sector).unwrap_or(0) * SECTOR_BYTES;
            expected[from..from + usize::try_from(segment.count).unwrap_or(0) * SECTOR_BYTES]
                .fill(0);
        }
        must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &segments));
        assert!(must(&mut driver, &Request::read(0, data.len())) == expected, "flags {flags}");
    }
}

#[test]
fn segments_that_break_the_rules_are_refused() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let config = driver.config().expect("the configuration space can be read");
    let plain = Segment { sector: 0, count: 8, flags: 0 };
    let refused = [
        (VIRTIO_BLK_T_DISCARD, Segment { sector: DISK_SECTORS - 1, ..plain }),
        (VIRTIO_BLK_T_DISCARD, Segment { sector: u64::MAX - 3, ..plain }),
        (VIRTIO_BLK_T_WRITE_ZEROES, Segment { sector: DISK_SECTORS, ..plain }),
        (VIRTIO_BLK_T_WRITE_ZEROES, Segment { sector: 0, count: u32::MAX, flags: 0 }),
    ];
    for (kind, segment) in refused {
        assert_eq!(
            status(&mut driver, &Request::over_segments(kind, &[segment])),
            VIRTIO_BLK_S_IOERR,
            "{kind}: {segment:?}"
        );
    }
    // VIRTIO 1.3, 5.2.6.2: UNSUPP for unknown flags, and for UNMAP in a discard.
    for (kind, flags) in
        [(VIRTIO_BLK_T_DISCARD, 1), (VIRTIO_BLK_T_DISCARD, 2), (VIRTIO_BLK_T_WRITE_ZEROES, 2)]
    {
        let request = Request::over_segments(kind, &[Segment { flags, ..plain }]);
        assert_eq!(status(&mut driver, &request), VIRTIO_BLK_S_UNSUPP, "{kind}: flags {flags}");
    }
    let too_many = vec![plain; usize::try_from(config.max_discard_seg()).unwrap_or(0) + 1];
    assert_ne!(
        status(&mut driver, &Request::over_segments(VIRTIO_BLK_T_DISCARD, &too_many)),
        VIRTIO_BLK_S_OK
    );
    let half =
        Request { readable: vec![vec![0; 8]], ..Request::over_segments(VIRTIO_BLK_T_DISCARD, &[]) };
    assert_ne!(status(&mut driver, &half), VIRTIO_BLK_S_OK, "half a segment");
    must_work(&mut driver, 0);
}

#[test]
fn segments_of_no_sectors_are_nothing_to_do() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    if lacks_feature(&driver, VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let config = driver.config().expect("the configuration space can be read");
    let data = bytes(7, 64 << 10);
    must(&mut driver, &Request::write(0, &data));
    for (kind, limit) in [
        (VIRTIO_BLK_T_DISCARD, config.max_discard_seg()),
        (VIRTIO_BLK_T_WRITE_ZEROES, config.max_write_zeroes_seg()),
    ] {
        let empty = |sector| Segment { sector, count: 0, flags: 0 };
        for sector in [0, 8, DISK_SECTORS] {
            must(&mut driver, &Request::over_segments(kind, &[empty(sector)]));
        }
        if limit >= 3 {
            let all = [empty(8), empty(0), empty(16)];
            must(&mut driver, &Request::over_segments(kind, &all));
        }
        assert!(must(&mut driver, &Request::read(0, data.len())) == data, "request type {kind}");
    }
    let segments = [0, 1, 0].map(|count| Segment { sector: 8, count, flags: 0 });
    if config.max_write_zeroes_seg() >= 3 {
        must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &segments));
        let mut expected = data;
        expected[8 * SECTOR_BYTES..9 * SECTOR_BYTES].fill(0);
        assert!(must(&mut driver, &Request::read(0, expected.len())) == expected);
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    // VIRTIO 1.3, 5.2.6.2: UNSUPP for a request that the device does not know.
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for kind in UNKNOWN_KINDS {
        let shapes = [
            Request { kind, ..Request::default() },
            Request { kind, writable_bytes: vec![512], ..Request::default() },
            Request { kind, readable: vec![vec![7; 512]], ..Request::default() },
        ];
        for request in shapes {
            assert_eq!(status(&mut driver, &request), VIRTIO_BLK_S_UNSUPP, "{request:?}");
        }
    }
    must_work(&mut driver, 0);
}

#[test]
fn requests_past_the_end_fail_and_change_nothing() {
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for sector in [DISK_SECTORS, DISK_SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(
            status(&mut driver, &Request::read(sector, 1024)),
            VIRTIO_BLK_S_IOERR,
            "read at {sector}"
        );
        assert_eq!(
            status(&mut driver, &Request::write(sector, &[1; 1024])),
            VIRTIO_BLK_S_IOERR,
            "write at {sector}"
        );
    }
    let length = std::fs::metadata(subject.image()).expect("the image is there").len();
    assert_eq!(length, DISK_SECTORS * 512, "the image has another length now");
    assert_eq!(subject.image_bytes((DISK_SECTORS - 1) * 512, SECTOR_BYTES), [0; SECTOR_BYTES]);
}

#[test]
fn data_of_half_sectors_is_refused() {
    if !is_ours_to_promise() {
        return;
    }
    let subject = Subject::start();
    let mut driver = subject.driver(&Options::default());
    for size_bytes in [1, 511, 513] {
        assert_eq!(
            status(&mut driver, &Request::read(0, size_bytes)),
            VIRTIO_BLK_S_IOERR,
            "read of {size_bytes} bytes"
        );
        assert_eq!(
            status(&mut driver, &Request::write(0, &vec![1; size_bytes])),
            VIRTIO_BLK_S_IOERR,
            "write of {size_bytes} bytes"
        );
    }
    must_work(&mut driver, 0);
}

#[test]
fn read_only_disk_reads_and_refuses_to_change() {
    if crate::subject::is_another_program() {
        return;
    }
    let subject = Subject::with_options(&["--read-only"]);
    let mut driver = subject.driver(&Options::default());
    assert_eq!(must(&mut driver, &Request::read(0, 4096)), [0; 4096]);
    // VIRTIO 1.3, 5.2.6.2: a write to a read-only device fails with IOERR and writes nothing.
    assert_eq!(status(&mut driver, &Request::write(0, &[1; 512])), VIRTIO_BLK_S_IOERR);
    let segment = [Segment { sector: 0, count: 8, flags: 0 }];
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_ne!(
            status(&mut driver, &Request::over_segments(kind, &segment)),
            VIRTIO_BLK_S_OK,
            "request type {kind}"
        );
    }
    assert_eq!(subject.image_bytes(0, 512), [0; 512]);
}

#[test]
fn driver_without_flush_writes_correct_data() {
    // That its writes are also stable before they complete is a matter of `stability`.
    let subject = Subject::start();
    let options = Options {
        features: Options::default().features & !VIRTIO_BLK_F_FLUSH,
        ..Options::default()
    };
    let mut driver = subject.driver(&options);
    for round in 0..10 {
        let data = bytes(round, 8192);
        must(&mut driver, &Request::write(round as u64 * 16, &data));
        assert!(subject.image_bytes(round as u64 * 8192, data.len()) == data);
    }
    if lacks_feature(&driver, VIRTIO_BLK_F_WRITE_ZEROES) {
        return;
    }
    let segment = [Segment { sector: 0, count: 16, flags: 0 }];
    must(&mut driver, &Request::over_segments(VIRTIO_BLK_T_WRITE_ZEROES, &segment));
    assert_eq!(must(&mut driver, &Request::read(0, 512)), [0; 512]);
}
