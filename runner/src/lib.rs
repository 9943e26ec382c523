//! Starts a component in its jail and hands it its startup handles.
//!
//! Two halves meet across `exec`:
//!
//! - [`outer`] runs in the process that starts components (normally the [`keeper`]): it makes the namespaces, the
//!   component's host uid and its limits, lays the handles out at fixed numbers and executes the component's binary.
//! - [`inner`] runs in the component: it takes the handles, and [`inner::seal`] gives up everything else.
//!
//! Each protection is a [`Layer`] with a name. All of them are required; one that the host lacks fails the start with an
//! error that names it, unless the caller waived it.
//!
//! ```text
//!   manager ── KeeperClient ── SOCK_SEQPACKET ──> sepal-keeper ── outer::Runner ── clone3, exec ──> component
//!                                                    │                                              inner::seal
//!                                                    └ reaps, removes cgroups and sockets            inner::narrow, per thread
//! ```

pub mod cgroup;
pub mod descriptors;
pub mod host;
pub mod inner;
pub mod keeper;
pub mod layer;
pub mod outer;
pub mod seccomp;
pub mod startup;

pub use layer::{Layer, LayerState, LayerStatus};
