//! Whether all workers still turn.
//!
//! A worker answers when its loop comes to its mail. So what is found out is that the loop goes round, not that the host
//! answers: a worker whose requests wait for a disk that hangs is present. One that is asked while it sleeps is woken; who
//! asks does so rarely.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::Command;
use super::mailbox::Mailbox;

/// Asks all workers of a device whether they are there.
pub struct RollCall<Q>(Vec<Arc<Mailbox<Command<Q>>>>);

impl<Q> RollCall<Q> {
    pub(super) fn of(mailboxes: Vec<Arc<Mailbox<Command<Q>>>>) -> Self {
        Self(mailboxes)
    }

    /// Waits until each worker has answered, for ever if one hangs; false when one has ended.
    pub async fn all_answer(&self) -> bool {
        let ask = |mailbox: &Arc<Mailbox<Command<Q>>>| {
            let (present, answer) = oneshot::channel();
            mailbox.send(Command::Answer(present));
            answer
        };
        // All are asked before one is waited for: they answer side by side.
        let answers: Vec<_> = self.0.iter().map(ask).collect();
        for answer in answers {
            if answer.await.is_err() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Poll, Waker};

    use super::super::Command;
    use super::super::mailbox::Mailbox;
    use super::RollCall;

    type Mail = Arc<Mailbox<Command<()>>>;

    fn two_workers() -> (Mail, Mail, RollCall<()>) {
        let [one, other] = [(); 2].map(|()| Arc::new(Mailbox::new().unwrap()));
        let all = RollCall::of(vec![Arc::clone(&one), Arc::clone(&other)]);
        (one, other, all)
    }

    fn answer(worker: &Mail) {
        let Some(Command::Answer(present)) = worker.take() else { panic!("it was not asked") };
        present.send(()).unwrap();
    }

    #[test]
    fn one_silent_worker_among_those_that_answer_is_waited_for() {
        let (one, other, all) = two_workers();
        let mut call = pin!(all.all_answer());
        let mut look = || call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(look(), Poll::Pending);
        answer(&one);
        assert_eq!(look(), Poll::Pending);
        answer(&other);
        assert_eq!(look(), Poll::Ready(true));
    }

    #[test]
    fn a_worker_that_has_ended_is_absent() {
        let (one, other, all) = two_workers();
        other.close();
        let mut call = pin!(all.all_answer());
        let mut look = || call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(look(), Poll::Pending);
        answer(&one);
        assert_eq!(look(), Poll::Ready(false));
    }
}
