//! The hub: which port is plugged in at which place, and the endpoints at its host's end.
//!
//! Contract: all of it happens on the main thread. [`Hub::run`] moves the bytes of all endpoints, each in a task of its own, and
//! wakes them when a queue has news. Ports are [plugged](Hub::plug) and [unplugged](Hub::unplug) at any time, before it
//! runs or meanwhile. A port is opened to the guest when its endpoints are ready for the first byte.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::sandbox::Needs;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tracing::{error, info};

use crate::config::Size;
use crate::device::{Plugged, Shared};
use crate::endpoint::{At, Endpoint, OpenError, needs};
use crate::port_spec::{EndpointSpec, PortSpec};
use crate::watch::watch;

/// See the module's head.
pub(crate) struct Hub {
    shared: Arc<Shared>,
    /// Only the main thread takes this lock.
    places: Mutex<Vec<Option<Plug>>>,
    /// Logs of ports that were taken out, which are yet to be finished. Only the main thread takes this lock.
    leaving: Mutex<Vec<(At, Arc<Endpoint>)>>,
    /// A port was plugged: its endpoints are to be served.
    plugged: Notify,
}

/// A port that is plugged in.
struct Plug {
    name: Option<String>,
    is_console: bool,
    /// What was given to the ports before it at this place.
    pushed_before: u64,
    at: At,
    endpoints: Vec<Arc<Endpoint>>,
    specs: Vec<EndpointSpec>,
    /// None until they are served.
    tasks: Option<Vec<AbortHandle>>,
}

/// Why a port cannot be plugged in.
#[derive(Debug, Error)]
pub(crate) enum PlugError {
    #[error("there is a port {id} already")]
    Taken { id: u16 },
    #[error("there is no place {id} for a port: they are 0 to {last}")]
    NoPlace { id: u16, last: u16 },
    #[error("all {ports_max} places for ports are taken")]
    Full { ports_max: u16 },
    #[error("there is a port with the name {name:?} already")]
    SameName { name: String },
    #[error("there is an endpoint={endpoint} already")]
    SameEndpoint { endpoint: EndpointSpec },
    #[error(transparent)]
    Endpoint(OpenError),
}

/// There is no such port.
#[derive(Debug, Error)]
#[error("there is no port {0:?}")]
pub(crate) struct NoPort(String);

impl Hub {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let places = shared.ports().iter().map(|_| None).collect();
        Self {
            shared,
            places: Mutex::new(places),
            leaving: Mutex::default(),
            plugged: Notify::new(),
        }
    }

    /// Opens a port's endpoints, and plugs it in; at which place.
    pub(crate) fn plug(&self, spec: &PortSpec) -> Result<u16, PlugError> {
        let id = self.free_place(spec)?;
        self.check_endpoints(&spec.endpoints)?;
        let open = |endpoint| Endpoint::open(endpoint, spec.is_console).map(Arc::new);
        let endpoints = spec.endpoints.iter().map(open).collect::<Result<Vec<_>, _>>();
        let endpoints = endpoints.map_err(PlugError::Endpoint)?;
        let at = At::new(Arc::clone(&self.shared), id, spec.is_console);
        let pushed_before = at.port().inbox().pushed_bytes();
        let (name, is_console) = (spec.name.clone(), spec.is_console);
        let size = self.shared.shape().size;
        self.shared.plug(id, Plugged { name: name.clone(), is_console, size });
        info!(id, name, is_console, "port plugged in");
        let specs = spec.endpoints.clone();
        let plug = Plug { name, is_console, pushed_before, at, endpoints, specs, tasks: None };
        if let Some(place) = self.places().get_mut(usize::from(id)) {
            *place = Some(plug);
        }
        self.plugged.notify_one();
        Ok(id)
    }

    /// What endpoints do once they are open, and what ports take that are plugged in later.
    pub(crate) fn needs(&self, is_commanded: bool) -> Needs {
        let places = self.places();
        let specs: Vec<&EndpointSpec> =
            places.iter().flatten().flat_map(|plug| &plug.specs).collect();
        needs(&specs, is_commanded)
    }

    /// Takes a port out, with its endpoints; which one.
    pub(crate) fn unplug(&self, port: &str) -> Result<u16, NoPort> {
        let id = self.find(port)?;
        let plug = self.places().get_mut(usize::from(id)).and_then(Option::take);
        self.shared.unplug(id);
        if let Some(plug) = plug {
            self.leaving().retain(|(_, endpoint)| endpoint.outlives_its_port());
            plug.leave(&mut self.leaving());
            info!(id, name = plug.name, "port taken out");
        }
        Ok(id)
    }

    /// The port that is called so, or has this number.
    pub(crate) fn find(&self, port: &str) -> Result<u16, NoPort> {
        let places = self.places();
        let is_called = |plug: &Option<Plug>| {
            plug.as_ref().is_some_and(|plug| plug.name.as_deref() == Some(port))
        };
        let by_number = || {
            let number = port.parse::<usize>().ok()?;
            places.get(number)?.as_ref().map(|_| number)
        };
        let found = places.iter().position(is_called).or_else(by_number);
        found.and_then(|id| u16::try_from(id).ok()).ok_or_else(|| NoPort(port.to_owned()))
    }

    /// Whether people are at the other end of a port.
    pub(crate) fn is_console(&self, id: u16) -> bool {
        let places = self.places();
        places.get(usize::from(id)).and_then(Option::as_ref).is_some_and(|plug| plug.is_console)
    }

    /// What a port is called.
    pub(crate) fn name(&self, id: u16) -> Option<String> {
        self.places().get(usize::from(id)).and_then(Option::as_ref)?.name.clone()
    }

    /// A console has another size.
    pub(crate) fn set_size(&self, id: u16, size: Size) {
        self.shared.set_size(id, size);
    }

    /// Opens logs anew: they may have been moved away.
    pub(crate) fn reopen(&self) {
        for plug in self.places().iter().flatten() {
            plug.endpoints.iter().for_each(|endpoint| endpoint.reopen());
        }
    }

    /// Waits until all that the guest has put out is where it is to be kept; while it [runs](Self::run).
    pub(crate) async fn settle(&self) {
        let mut served: Vec<_> = self.places().iter().flatten().flat_map(Plug::served).collect();
        served.extend(self.leaving().iter().cloned());
        for (at, endpoint) in served {
            endpoint.settle(&at).await;
        }
    }

    /// All ports, for the operator.
    pub(crate) fn describe(&self) -> Value {
        self.places().iter().flatten().map(|plug| self.describe_plug(plug)).collect()
    }

    fn describe_plug(&self, plug: &Plug) -> Value {
        let (id, port) = (plug.at.id(), plug.at.port());
        let conversation = self.shared.conversation();
        let size = conversation.plugged(id).map(|plugged| plugged.size);
        let size = size.filter(|_| plug.is_console);
        let endpoints: Value = plug.endpoints.iter().map(|endpoint| endpoint.describe()).collect();
        json!({
            "id": id,
            "name": plug.name,
            "console": plug.is_console,
            "guest_ready": conversation.is_ready(id),
            "guest_open": port.is_guest_open(),
            "host_open": conversation.is_host_open(id),
            "columns": size.map(|size| size.columns),
            "rows": size.map(|size| size.rows),
            "bytes_out": port.transcript().len_bytes(),
            "bytes_in": port.inbox().pushed_bytes().saturating_sub(plug.pushed_before),
            "endpoints": endpoints,
        })
    }

    /// What `word` says of the first endpoint that knows an answer, and at which port that is. All who wait there look again.
    pub(crate) fn ask<T>(&self, word: impl Fn(&Endpoint) -> Option<T>) -> Option<(u16, T)> {
        let places = self.places();
        places.iter().flatten().find_map(|plug| {
            let answer = plug.endpoints.iter().find_map(|endpoint| word(endpoint))?;
            plug.at.port().look();
            Some((plug.at.id(), answer))
        })
    }

    /// Moves the bytes, for ever.
    pub(crate) async fn run(&self) -> Infallible {
        let run = async {
            tokio::select! {
                never = self.pump() => never,
                never = self.start_tasks() => never,
            }
        };
        LocalSet::new().run_until(run).await
    }

    /// Has all endpoints look again whenever a queue has news.
    async fn pump(&self) -> Infallible {
        let bell = self.shared.main_bell();
        let heard = bell.as_fd().try_clone_to_owned();
        let heard = heard.and_then(|heard| watch(heard, Interest::READABLE));
        let heard = match heard {
            Ok(heard) => heard,
            Err(cause) => {
                error!(%cause, "the device's queues cannot be heard: no byte comes through");
                return std::future::pending().await;
            }
        };
        loop {
            // What comes from here on rings; what came before is seen by who looks now.
            bell.arm();
            self.shared.ports().iter().for_each(|port| port.look());
            let Ok(mut ready) = heard.readable().await else {
                return std::future::pending().await;
            };
            bell.clear();
            ready.clear_ready();
        }
    }

    /// Serves the endpoints of each port that is plugged in.
    async fn start_tasks(&self) -> Infallible {
        loop {
            for plug in self.places().iter_mut().flatten() {
                if plug.tasks.is_none() {
                    plug.tasks = Some(plug.serve());
                }
            }
            self.plugged.notified().await;
        }
    }

    /// None of these endpoints is in the way of another one, here or of a port that is there.
    fn check_endpoints(&self, specs: &[EndpointSpec]) -> Result<(), PlugError> {
        let places = self.places();
        let present = || places.iter().flatten().flat_map(|plug| &plug.specs);
        for (number, spec) in specs.iter().enumerate() {
            let mut others = present().chain(specs.iter().take(number));
            if others.any(|other| spec.clashes_with(other)) {
                return Err(PlugError::SameEndpoint { endpoint: spec.clone() });
            }
        }
        Ok(())
    }

    /// The place that a port is to have.
    fn free_place(&self, spec: &PortSpec) -> Result<u16, PlugError> {
        let places = self.places();
        let names = places.iter().flatten().filter_map(|plug| plug.name.as_ref());
        if let Some(name) = names.into_iter().find(|name| Some(*name) == spec.name.as_ref()) {
            return Err(PlugError::SameName { name: name.clone() });
        }
        let ports_max = self.shared.shape().ports_max;
        match spec.id {
            Some(id) if id >= ports_max => {
                Err(PlugError::NoPlace { id, last: ports_max.saturating_sub(1) })
            }
            Some(id) if places.get(usize::from(id)).is_some_and(Option::is_some) => {
                Err(PlugError::Taken { id })
            }
            Some(id) => Ok(id),
            None => {
                let free = places.iter().position(Option::is_none);
                let free = free.and_then(|place| u16::try_from(place).ok());
                free.ok_or(PlugError::Full { ports_max })
            }
        }
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<(At, Arc<Endpoint>)>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn places(&self) -> MutexGuard<'_, Vec<Option<Plug>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Plug {
    fn served(&self) -> impl Iterator<Item = (At, Arc<Endpoint>)> {
        self.endpoints.iter().map(|endpoint| (self.at.clone(), Arc::clone(endpoint)))
    }

    /// Ends what it has running, but for logs that are not yet finished: those are `leaving`.
    fn leave(&self, leaving: &mut Vec<(At, Arc<Endpoint>)>) {
        let mut tasks = self.tasks.iter().flatten();
        for endpoint in &self.endpoints {
            // A task lives until the runtime has its next turn. What is opened by name is free now.
            endpoint.close(&self.at);
            match tasks.next() {
                Some(_) if endpoint.outlives_its_port() => {
                    leaving.push((self.at.clone(), Arc::clone(endpoint)));
                }
                Some(task) => task.abort(),
                None => {}
            }
        }
        tasks.for_each(AbortHandle::abort);
    }

    /// Starts a task for each endpoint.
    fn serve(&self) -> Vec<AbortHandle> {
        let serve = |endpoint: &Arc<Endpoint>| {
            let (endpoint, at) = (Arc::clone(endpoint), self.at.clone());
            spawn_local(async move { endpoint.serve(&at).await }).abort_handle()
        };
        let mut tasks: Vec<_> = self.endpoints.iter().map(serve).collect();
        if self.is_console || !self.endpoints.iter().any(|endpoint| endpoint.has_clients()) {
            let at = self.at.clone();
            // New tasks have their first turn in the order in which they were started: by now logs are waited for.
            tasks.push(spawn_local(async move { at.open() }).abort_handle());
        }
        tasks
    }
}

#[cfg(test)]
mod tests {
    use crate::endpoint::stage::{Peer, Stage, pattern, unix};
    use crate::port_spec::{EndpointSpec, FileSpec, PortSpec};

    fn spec(name: Option<&str>, id: Option<u16>) -> PortSpec {
        let name = name.map(str::to_owned);
        PortSpec { name, is_console: true, id, endpoints: vec![EndpointSpec::Null] }
    }

    #[test]
    fn ports_have_the_places_that_they_want_or_the_next_that_is_free() {
        let stage = Stage::new(4);
        let hub = &stage.hub;
        assert_eq!(hub.plug(&spec(Some("a"), Some(1))).unwrap(), 1);
        assert_eq!(hub.plug(&spec(Some("b"), None)).unwrap(), 0);
        assert_eq!(hub.plug(&spec(None, None)).unwrap(), 2);
        let refusal = |name, id| hub.plug(&spec(name, id)).unwrap_err().to_string();
        assert!(refusal(None, Some(1)).contains("port 1"));
        assert!(refusal(None, Some(4)).contains("0 to 3"));
        assert!(refusal(Some("a"), None).contains("\"a\""));
        assert_eq!(hub.plug(&spec(None, None)).unwrap(), 3);
        assert!(refusal(None, None).contains("all 4"));
        assert_eq!(hub.unplug("a").unwrap(), 1);
        assert_eq!(hub.plug(&spec(Some("a"), None)).unwrap(), 1);
    }

    #[test]
    fn name_is_looked_for_before_a_number() {
        let stage = Stage::new(3);
        stage.hub.plug(&spec(Some("1"), Some(2))).unwrap();
        stage.hub.plug(&spec(None, Some(1))).unwrap();
        assert_eq!(stage.hub.find("1").unwrap(), 2);
        assert_eq!(stage.hub.find("2").unwrap(), 2);
        assert!(stage.hub.find("0").unwrap_err().to_string().contains("\"0\""));
    }

    #[test]
    fn port_whose_endpoint_cannot_be_opened_is_not_there() {
        let stage = Stage::new(1);
        let path = stage.path("console");
        let mut both = spec(None, None);
        both.endpoints = vec![unix(&path), unix(&stage.path("none/console"))];
        let error = stage.hub.plug(&both).unwrap_err().to_string();
        assert!(error.contains("none/console"), "{error}");
        assert!(!path.exists());
        assert!(stage.hub.plug(&spec(None, None)).is_ok());
    }

    #[test]
    fn endpoints_that_would_be_in_each_others_way_are_refused() {
        let stage = Stage::new(4);
        let log = format!("endpoint=file:{}", stage.path("log").display());
        let cast = log.replace("file:", "cast:");
        let plug = |words: &str| stage.hub.plug(&words.parse::<PortSpec>().unwrap());
        let refusal = |words: &str| plug(words).unwrap_err().to_string();
        assert!(refusal("endpoint=stdio,endpoint=stdio").contains("endpoint=stdio"));
        assert!(refusal(&format!("{log},{log}")).contains(&log));
        assert!(!stage.path("log").exists());
        plug(&format!("name=a,{log},endpoint=null,endpoint=null")).unwrap();
        assert!(refusal(&cast).contains(&cast));
        stage.hub.unplug("a").unwrap();
        plug(&log).unwrap();
    }

    #[test]
    fn port_that_is_plugged_in_later_is_served_and_starts_anew() {
        let stage = Stage::new(2);
        let mut guest = stage.plug_unix("first", true);
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            guest.write(b"of the first").await;
            stage.hub.unplug("first").unwrap();
            assert!(!guest.port().takes_output());
            stage
                .hub
                .plug(&PortSpec {
                    endpoints: vec![unix(&stage.path("second"))],
                    ..spec(Some("second"), Some(0))
                })
                .unwrap();
            guest.until(|port| port.takes_output()).await;
            guest.write(b"of the second").await;
            Peer::connect(&stage.path("second")).await.expect(b"of the second").await;
        });
    }

    #[test]
    fn log_of_a_port_that_is_taken_out_has_all_of_it_and_nothing_of_the_next() {
        let stage = Stage::new(1);
        let path = stage.path("log");
        let log = FileSpec { path: path.clone(), max_size: None, keep: 5, timestamps: false };
        let mut guest = stage.plug("first", true, EndpointSpec::File(log));
        let said = pattern(100_000);
        stage.play(async || {
            guest.until(|port| port.takes_output()).await;
            assert_eq!(guest.try_write(&said), said.len());
            stage.hub.unplug("first").unwrap();
            stage.hub.plug(&spec(Some("second"), Some(0))).unwrap();
            guest.until(|port| port.takes_output()).await;
            guest.write(b"of the second").await;
            stage.hub.settle().await;
        });
        assert!(std::fs::read(&path).unwrap() == said);
    }

    #[test]
    fn every_endpoint_of_a_port_is_served() {
        let stage = Stage::new(1);
        let (one, two) = (stage.path("one"), stage.path("two"));
        let mut both = spec(None, None);
        both.endpoints = vec![unix(&one), unix(&two), EndpointSpec::Null];
        let id = stage.hub.plug(&both).unwrap();
        let mut guest = stage.guest(id);
        stage.play(async || {
            let (mut one, mut two) = (Peer::connect(&one).await, Peer::connect(&two).await);
            guest.until(|port| port.takes_output()).await;
            guest.write(b"all").await;
            one.expect(b"all").await;
            two.expect(b"all").await;
            // Each has a writer of its own.
            one.write(b"1").await;
            assert_eq!(guest.read().await, b"1");
            two.write(b"2").await;
            assert_eq!(guest.read().await, b"2");
        });
    }
}
