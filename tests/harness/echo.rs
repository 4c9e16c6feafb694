//! The echo service (RFC 862): whatever a guest sends comes back, so that it can compare.

use std::io;
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use rustix::net::{Shutdown, shutdown};

use crate::Namespace;

/// The service's port.
const PORT: u16 = 7;

/// The service in a namespace, at all its addresses.
#[derive(Debug)]
pub struct Echo {
    listener: TcpListener,
    server: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts the service; it takes connections at once.
    ///
    /// # Panics
    /// If the namespace has one already.
    pub fn serve(namespace: &Namespace) -> Self {
        // Linux serves IPv4 at this address as well.
        let listener = namespace.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)));
        let listener = listener.expect("the port is free");
        let accepting = listener.try_clone().expect("a descriptor can be duplicated");
        let server = thread::spawn(move || {
            while let Ok((connection, _)) = accepting.accept() {
                thread::spawn(move || send_back(&connection));
            }
        });
        Self { listener, server: Some(server) }
    }
}

/// Until the other end has sent all or goes.
fn send_back(connection: &TcpStream) {
    // A guest that is killed leaves its connection half open, or resets it: nobody waits for an answer.
    let _ = io::copy(&mut &*connection, &mut &*connection);
    let _ = connection.shutdown(std::net::Shutdown::Both);
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Whoever accepts is told that there is nothing to accept any more, and lets go of the namespace.
        let ended = shutdown(&self.listener, Shutdown::Both);
        if let (Ok(()), Some(server)) = (ended, self.server.take()) {
            // A panic there has been reported already.
            let _ = server.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    use super::{Echo, PORT};
    use crate::{Namespace, Rig};

    #[test]
    fn what_is_sent_comes_back_until_the_service_ends() {
        let Some(rig) = Rig::find() else { return };
        let Some(namespace) = Namespace::new(&rig) else { return };
        let echo = Echo::serve(&namespace);
        for host in ["127.0.0.1", "::1"] {
            let mut stream =
                namespace.run(|| TcpStream::connect((host, PORT))).expect("it is served");
            stream.write_all(b"hello").expect("it is connected");
            stream.shutdown(Shutdown::Write).expect("it is connected");
            let mut back = String::new();
            stream.read_to_string(&mut back).expect("it comes back");
            assert_eq!(back, "hello");
        }
        drop(echo);
        namespace.run(|| TcpListener::bind(("::1", PORT))).expect("the port is free again");
    }
}
