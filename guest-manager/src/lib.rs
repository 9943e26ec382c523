//! The guest manager: many guests by name, each in a jailed component of its own, and the policy around them.
//!
//! ```text
//!   main       command line, signals, the order in which things begin and end
//!   server     connections ---> manager_server, lifecycle_server, guest_server: the protocol's interfaces
//!              peer, roles: who it is, and what that gives; authority: what needs more; audit: who changed what
//!   listener   the sockets; state: the folder of what is kept; lock: one manager has them; service, journal: what systemd gives and wants
//!                                 |      ladder (stopping), power (resets, pauses), subscription, uploads, list, facets, vsock (devices)
//!                                 |      access: the grant that each capability goes through: narrowed, shared, revoked
//!                                 v
//!   durable    guests that go on without their manager: what the next one needs is kept with the keeper, and how it takes over
//!   definitions  what guests are started from, kept by store (files, written as a whole)
//!   node       what the host is and offers; capacity: whether it can hold another guest (pure); pressure: balloons, when it runs short of memory
//!   manager    what all share: registry (names and statuses, pure), events and history (rings, pure), host, protection, problems
//!     slot     who holds a name: one guest after the other, and a component
//!       guest  one guest, from its creation to its end; serial is its port
//!       life   the task that drives it, run after run; what follows each: outcome and pace (pure)
//!       statistics  its figures, and how old they are
//!       resources  what it holds of the host: files (images), network, cids, macs, backends
//!     component  one process; starter starts it through the keeper, and pool keeps some ready
//! ```
//!
//! One thread runs the event loop and only ever waits on it. What may block goes to worker threads (files), to the keeper (processes) or to
//! the threads of the log and the audit. Queries are answered from what the registry knows; they wait for nobody.

pub mod access;
mod agent;
pub mod audit;
mod authority;
mod backends;
pub mod capacity;
pub mod changed;
pub mod cids;
pub mod client;
pub mod component;
mod configuration;
mod course;
pub mod cpu;
pub mod definitions;
pub mod durable;
pub mod events;
mod facets;
pub mod files;
pub mod guest;
pub mod guest_server;
pub mod history;
pub mod host;
pub mod journal;
mod ladder;
mod lease;
mod life;
pub mod lifecycle_server;
mod list;
pub mod listener;
pub mod lock;
pub mod log;
pub mod macs;
pub mod manager;
pub mod manager_server;
pub mod model;
pub mod network;
mod networks;
pub mod node;
mod outcome;
mod pace;
pub mod peer;
pub mod pool;
mod power;
pub mod pressure;
pub mod problems;
mod protection;
pub mod registry;
mod resources;
mod restart;
pub mod roles;
pub mod serial;
pub mod server;
pub mod service;
pub mod slot;
pub mod starter;
pub mod state;
mod statistics;
mod store;
mod subscription;
pub mod uploads;
mod vsock;
