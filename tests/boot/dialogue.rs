//! A guest that runs the check "dialogue" or "console": it does what the host types, and the host changes what is around it
//! meanwhile.

use std::time::Duration;

use guest::announcement::Announcement;
use guest::throughput::Throughput;
use tests::Machine;

/// A guest whose interface is configured, or whose drivers are loaded.
pub(crate) struct Guest(Machine);

impl Guest {
    /// Waits until the guest, which was booted for one of these checks, can be talked to.
    pub(crate) fn meet(machine: Machine) -> Self {
        let mut guest = Self(machine);
        assert_eq!(guest.0.expect_announcement(), Announcement::Loaded);
        guest
    }

    /// Has a line done, and waits until it is.
    pub(crate) fn do_line(&mut self, line: &str) {
        self.begin(line);
        self.expect_done();
    }

    /// Has a line done while the host does something else, up to [`Guest::expect_done`].
    pub(crate) fn begin(&mut self, line: &str) {
        self.0.type_line(line);
    }

    /// Waits until the line that was begun is done.
    pub(crate) fn expect_done(&mut self) {
        let answer = self.0.expect_announcement();
        assert_eq!(answer, Announcement::Done, "{}", self.0.console());
    }

    /// A number that the guest's kernel has about its interface.
    pub(crate) fn show(&mut self, attribute: &str) -> u64 {
        self.find(&format!("show {attribute}"))
    }

    /// Has a line done that is answered by a number.
    pub(crate) fn find(&mut self, line: &str) -> u64 {
        self.begin(line);
        self.find_answer()
    }

    /// Waits until the line that was begun is answered by a number.
    pub(crate) fn find_answer(&mut self) -> u64 {
        match self.0.expect_announcement() {
            Announcement::Found(number) => number,
            answer => panic!("{answer} is no number:\n{}", self.0.console()),
        }
    }

    /// Leaves the guest alone for this time.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.0.run_for(time);
    }

    /// The process of its machine.
    pub(crate) fn process(&self) -> u32 {
        self.0.id()
    }

    /// Runs iperf3 in the guest, with this peer and these options.
    pub(crate) fn load(&mut self, words: &str) -> Throughput {
        self.begin(&format!("load {words}"));
        match self.0.expect_announcement() {
            Announcement::Moved(found) => found,
            answer => panic!("load {words} is answered by {answer}:\n{}", self.0.console()),
        }
    }

    /// Pulls the plug, if it has not ended by itself.
    pub(crate) fn end(self) {
        drop(self.0);
    }

    /// Ends the dialogue; the machine is about to pass its check.
    pub(crate) fn part(mut self) -> Machine {
        self.begin("end");
        self.0
    }
}
