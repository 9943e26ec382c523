//! Rust code generated from the `.capnp` files; `schema/tests/generated.rs` says how, and keeps it true.

pub mod agent_capnp;
pub mod bytes_capnp;
pub mod config_capnp;
pub mod cpu_capnp;
pub mod debug_capnp;
pub mod device_capnp;
pub mod error_capnp;
pub mod facet_capnp;
pub mod file_capnp;
pub mod guest_capnp;
pub mod lifecycle_capnp;
pub mod manager_capnp;
pub mod node_capnp;
pub mod store_capnp;
#[path = "capnp/stream_capnp.rs"]
pub mod stream_capnp;
pub mod vsock_capnp;
