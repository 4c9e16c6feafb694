//! What the service manager is told: that the daemon is ready, what it is doing, that it does its work, that it is
//! stopping.
//!
//! Without `NOTIFY_SOCKET` in the environment all of this does nothing. A message that cannot be
//! delivered is logged and forgotten: the manager's socket is no reason to deny a guest its device.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// The daemon's sockets are open: whoever waits for it may connect. `status` is shown to the
/// operator (`systemctl status`).
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// A change of what the daemon is doing, one line for the operator.
pub fn status(status: &str) {
    send(&[NotifyState::Status(&one_line(status))]);
}

/// The daemon drains and will exit.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// The daemon does its work: the manager waits anew for as long as [`watchdog_limit`] says.
pub fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How long the manager waits for [`alive`] before it ends the process; `None`: it does not.
pub fn watchdog_limit() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// The protocol is lines of `NAME=value`: a line break in a path of the status would start another
/// assignment.
fn one_line(status: &str) -> String {
    status.replace(char::is_control, " ")
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "the service manager cannot be notified");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    /// Set for the process that a test starts to be its own daemon: the environment of the test
    /// process itself cannot be changed safely while other tests run.
    const CHILD: &str = "OUTBOARD_TEST_NOTIFY_CHILD";

    #[test]
    fn states_reach_the_service_manager_and_their_text_stays_one_line() {
        if std::env::var_os(CHILD).is_some() {
            super::ready("listening on /run/odd\nMAINPID=1");
            super::status("serving");
            super::alive();
            super::stopping();
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "daemon::notify::tests::states_reach_the_service_manager_and_their_text_stays_one_line"])
            .env(CHILD, "1")
            .env("NOTIFY_SOCKET", &path)
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        manager.set_nonblocking(true).unwrap();
        let receive = || {
            let mut message = [0; 256];
            let length =
                manager.recv(&mut message).expect("the child has ended and sent a message before");
            String::from_utf8_lossy(&message[..length]).into_owned()
        };
        assert_eq!(receive(), "READY=1\nSTATUS=listening on /run/odd MAINPID=1\n");
        assert_eq!(receive(), "STATUS=serving\n");
        assert_eq!(receive(), "WATCHDOG=1\n");
        assert_eq!(receive(), "STOPPING=1\n");
    }
}
