//! Looking at the device's size again: when a signal, a command or the clock asks for it.
//!
//! Contract: [`Refresher::refresh`] has the device measure itself, and where it has grown tells the
//! front end that is being served, if there is one and it can hear. It waits for nothing, so that
//! the control socket can answer with what came of it, whatever the serving of front ends is busy
//! with. A device that shrinks is none of ours to mend: the log says so, and who asked is told.

use std::cell::RefCell;
use std::convert::Infallible;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::signal::unix::Signal;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::log::with_sources;
use crate::device::{Device, NotRefreshed, Refreshed};
use crate::protocol::BackendChannel;

/// Who wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// An operator: each complaint is told.
    ByOperator,
    /// The clock: a complaint is told once.
    ByClock,
}

/// The device, and whom to tell of its changes.
pub(super) struct Refresher<D> {
    device: Arc<D>,
    front_end: RefCell<Option<Audience>>,
    /// What was wrong the last time, as the log was told.
    complaint: RefCell<Option<String>>,
}

/// How the front end that is being served can hear.
#[derive(Default)]
struct Audience {
    channel: Option<BackendChannel>,
    reads_config: bool,
    /// It has a ring that runs.
    runs: bool,
    /// The configuration space has changed, which it is yet to be told.
    untold: bool,
}

impl Audience {
    /// Has the front end look at the configuration space, if it is to; what came of that.
    fn tell(&mut self) -> String {
        match &mut self.channel {
            None => "not told: it has no back-end channel".to_owned(),
            Some(_) if !self.reads_config => {
                "not told: it does not read the configuration space from here".to_owned()
            }
            // vhost-user, "Suspended device state": while all rings are stopped the back end must
            // not send messages. The first ring that starts brings it.
            Some(_) if !self.runs => "told when a ring starts".to_owned(),
            Some(channel) => {
                self.untold = false;
                match channel.config_changed() {
                    Ok(()) => "told".to_owned(),
                    Err(error) => format!("not told: {error}"),
                }
            }
        }
    }
}

impl<D: Device> Refresher<D> {
    pub(super) fn new(device: Arc<D>) -> Self {
        Self { device, front_end: RefCell::default(), complaint: RefCell::default() }
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }

    /// A front end is being served, until the attendance ends.
    pub(super) fn attend(&self) -> Attendance<'_, D> {
        *self.front_end.borrow_mut() = Some(Audience::default());
        Attendance { refresher: self }
    }

    /// Refreshes whenever the signal comes, and as often as the device wants it.
    pub(super) async fn watch(&self, mut signal: Signal) -> Infallible {
        let mut ticks = self.device.refresh_interval().map(|every| {
            let mut ticks = interval(every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            let asked = tokio::select! {
                Some(()) = signal.recv() => {
                    self.device.reopen();
                    Asked::ByOperator
                }
                () = next(&mut ticks) => Asked::ByClock,
            };
            // The log has been told what there is to tell.
            let _ = self.refresh(asked);
        }
    }

    /// Looks at the size now; what came of it, for the control socket.
    pub(super) fn refresh(&self, asked: Asked) -> Result<Value, String> {
        match self.device.refresh() {
            Ok(Refreshed::Unchanged { capacity_bytes }) => {
                *self.complaint.borrow_mut() = None;
                Ok(json!({ "changed": false, "capacity_bytes": capacity_bytes }))
            }
            Ok(Refreshed::Grown { before_bytes, capacity_bytes }) => {
                *self.complaint.borrow_mut() = None;
                let front_end = self.tell();
                info!(
                    before_bytes,
                    capacity_bytes,
                    "{} has grown; front end: {front_end}",
                    D::NAME
                );
                Ok(json!({
                    "changed": true, "capacity_bytes": capacity_bytes, "front_end": front_end,
                }))
            }
            Err(refused) => Err(self.complain(asked, &refused)),
        }
    }

    fn complain(&self, asked: Asked, refused: &NotRefreshed) -> String {
        let complaint = with_sources(refused).to_string();
        // Who asks is told; it is nothing that is wrong with the device.
        if matches!(refused, NotRefreshed::NoSize) {
            return complaint;
        }
        let before = self.complaint.replace(Some(complaint.clone()));
        if asked == Asked::ByOperator || before.as_ref() != Some(&complaint) {
            warn!("{} keeps its size: {complaint}", D::NAME);
        }
        complaint
    }

    /// Has the front end look at the configuration space, for this reason.
    pub(super) fn config_changed(&self, news: &str) {
        let front_end = self.tell();
        info!("{news}; front end: {front_end}");
    }

    /// Has the front end look at the configuration space; what came of that.
    fn tell(&self) -> String {
        match self.front_end.borrow_mut().as_mut() {
            None => "none connected".to_owned(),
            Some(audience) => {
                audience.untold = true;
                audience.tell()
            }
        }
    }
}

async fn next(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

/// The front end that is being served, as far as it hears of changes.
pub(super) struct Attendance<'a, D> {
    refresher: &'a Refresher<D>,
}

impl<D: Device> Attendance<'_, D> {
    /// It has given a channel, to be spoken to.
    pub(super) fn set_channel(&self, channel: BackendChannel) {
        if let Some(audience) = self.refresher.front_end.borrow_mut().as_mut() {
            audience.channel = Some(channel);
        }
    }

    /// Whether it reads the configuration space from us, and whether a ring runs. It is told then of
    /// what it could not be told before.
    pub(super) fn is_now(&self, reads_config: bool, runs: bool) {
        let mut front_end = self.refresher.front_end.borrow_mut();
        let Some(audience) = front_end.as_mut() else { return };
        (audience.reads_config, audience.runs) = (reads_config, runs);
        if !audience.untold {
            return;
        }
        let front_end = audience.tell();
        if !audience.untold {
            info!("{} has changed before; front end: {front_end}", D::NAME);
        }
    }
}

impl<D> Drop for Attendance<'_, D> {
    fn drop(&mut self) {
        *self.refresher.front_end.borrow_mut() = None;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use serde_json::json;
    use tokio::signal::unix::{SignalKind, signal};

    use super::{Asked, Refresher};
    use crate::device::{Device, DeviceQueue, NotRefreshed, QueueIo, Refreshed};
    use crate::engine::Completion;
    use crate::protocol::BackendChannel;

    /// A device that is as large as the test says.
    struct Sized {
        taken_bytes: AtomicU64,
        found_bytes: AtomicU64,
        looks: AtomicU64,
    }

    struct NoQueue;

    impl Device for Sized {
        type Queue = NoQueue;
        const NAME: &'static str = "sized";
        const KINDS: &'static [&'static str] = &[];

        fn queue_count(&self) -> u16 {
            0
        }
        fn max_queue_size(&self) -> u16 {
            0
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _features: u64, _offset: u32, into: &mut [u8]) {
            into.fill(0);
        }
        fn refresh(&self) -> Result<Refreshed, NotRefreshed> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            let found_bytes = self.found_bytes.load(Ordering::Relaxed);
            let before_bytes = self.taken_bytes.load(Ordering::Relaxed);
            if found_bytes < before_bytes {
                return Err(NotRefreshed::Shrunk { capacity_bytes: before_bytes, found_bytes });
            }
            self.taken_bytes.store(found_bytes, Ordering::Relaxed);
            Ok(if found_bytes == before_bytes {
                Refreshed::Unchanged { capacity_bytes: before_bytes }
            } else {
                Refreshed::Grown { before_bytes, capacity_bytes: found_bytes }
            })
        }
        fn refresh_interval(&self) -> Option<Duration> {
            Some(Duration::from_secs(2))
        }
        fn files(&self) -> Vec<BorrowedFd<'_>> {
            Vec::new()
        }
        fn open_queue(&self, _index: u16, _features: u64, _queue_size: u16) -> NoQueue {
            NoQueue
        }
    }

    impl DeviceQueue for NoQueue {
        fn process(&mut self, _: &mut QueueIo<'_>) {}
        fn complete(&mut self, _: Completion, _: &mut QueueIo<'_>) {}
    }

    fn refresher(bytes: u64) -> (Arc<Sized>, Refresher<Sized>) {
        let device = Arc::new(Sized {
            taken_bytes: AtomicU64::new(bytes),
            found_bytes: AtomicU64::new(bytes),
            looks: AtomicU64::new(0),
        });
        (Arc::clone(&device), Refresher::new(device))
    }

    /// What is logged meanwhile.
    fn log_of(act: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Log {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, act);
        let bytes = log.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_the_clock_finds_wrong_is_logged_once_until_it_changes() {
        let (device, refresher) = refresher(4096);
        let lines = |found_bytes: u64, asked| {
            device.found_bytes.store(found_bytes, Ordering::Relaxed);
            log_of(|| drop(refresher.refresh(asked))).lines().count()
        };
        assert_eq!(lines(4096, Asked::ByClock), 0);
        assert_eq!(lines(512, Asked::ByClock), 1);
        assert_eq!(lines(512, Asked::ByClock), 0);
        assert_eq!(lines(512, Asked::ByOperator), 1);
        assert_eq!(lines(512, Asked::ByClock), 0);
        assert_eq!(lines(1024, Asked::ByClock), 1);
        assert_eq!(lines(4096, Asked::ByClock), 0);
        assert_eq!(lines(1024, Asked::ByClock), 1);
        assert_eq!(lines(8192, Asked::ByClock), 1);
        assert_eq!(lines(8192, Asked::ByClock), 0);
    }

    #[test]
    fn growth_is_told_once_to_who_can_hear_it() {
        let (device, refresher) = refresher(4096);
        let grow = || {
            device.found_bytes.fetch_add(4096, Ordering::Relaxed);
            refresher.refresh(Asked::ByOperator).unwrap()["front_end"].clone()
        };
        assert_eq!(grow(), "none connected");
        let attendance = refresher.attend();
        attendance.is_now(true, true);
        assert_eq!(grow(), "not told: it has no back-end channel");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        attendance.set_channel(BackendChannel::new(ours.into()).unwrap());
        attendance.is_now(false, true);
        attendance.is_now(true, false);
        theirs.set_nonblocking(true).unwrap();
        let mut messages = [0; 64];
        assert!(theirs.read(&mut messages).is_err(), "nobody could be told yet");
        attendance.is_now(true, true);
        assert_eq!(theirs.read(&mut messages).unwrap(), 12, "the growth of before");
        attendance.is_now(true, true);
        assert!(theirs.read(&mut messages).is_err(), "it was told already");
        assert_eq!(grow(), "told");
        assert_eq!(theirs.read(&mut messages).unwrap(), 12);
        drop(attendance);
        assert_eq!(grow(), "none connected");
        let unchanged = json!({ "changed": false, "capacity_bytes": 5 * 4096 });
        assert_eq!(refresher.refresh(Asked::ByOperator), Ok(unchanged));
    }

    #[tokio::test(start_paused = true)]
    async fn device_is_looked_at_as_often_as_it_wants() {
        let (device, refresher) = refresher(4096);
        let hangups = signal(SignalKind::hangup()).unwrap();
        tokio::select! {
            never = refresher.watch(hangups) => match never {},
            // tidy(sleep): of a clock that stands still but for this.
            () = tokio::time::sleep(Duration::from_secs(21)) => {}
        }
        assert_eq!(device.looks.load(Ordering::Relaxed), 11);
    }
}
