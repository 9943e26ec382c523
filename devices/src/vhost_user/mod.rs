//! vhost-user front end: a virtio device that another process serves (QEMU, `docs/interop/vhost-user.rst`, called "vhost-user" below).
//!
//! ```text
//!   VhostUser::connect: greeting::Greeting over connection::Connection -> features, configuration
//!        |
//!        v                    memory, rings, doorbells, calls
//!   device::VhostUser  ------------------------------------------> back end  <--- reads and writes all guest memory
//!     (on its loop)    <--- replies; end of the connection -------
//!        ^                                                             driver --- doorbell eventfd ---> back end
//!        '-- VhostUserHandle::reconnect: another process's socket      back end - call eventfd --> driver, or the loop, which relays
//! ```
//!
//! **A back end sees and can change all guest memory.** It has to be trusted with the guest as the component itself is; the guest's other devices
//! and the host are as safe from it as from the guest. Here it is hostile all the same: what it sends is checked ([`message`]), no wait for it is
//! without a bound, and one that breaks the protocol, dies or does not answer is cut off and reported ([`BackendLost`]), while the device waits
//! for another ([`VhostUserHandle::reconnect`]).
//!
//! Waits: the greeting of [`VhostUser::connect`] ([`GREETING`]), on the thread that makes the device; and while the driver resets the device or a
//! queue, or the machine stops, until the back end has let go of the rings ([`QUIESCE`]). Everything else is events.
//!
//! A back end that lost its connection is trusted to stop by itself: until it does, it can still reach guest memory, also after the
//! driver's reset.
//!
//! System calls of the loop beside those of [`dispatch`](crate::dispatch): `sendmsg`, `recvmsg`, `poll`, `fcntl` (`F_DUPFD_CLOEXEC`), `eventfd2`,
//! `timerfd_settime`, and `read` and `write` on its eventfds and its timer.
//!
//! [`BackendLost`]: crate::dispatch::DeviceEvent::BackendLost

mod connection;
mod device;
mod greeting;
pub mod message;
mod settings;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use connection::Lost;
pub use device::{ConnectError, GREETING, PATIENCE, QUIESCE, VhostUser, VhostUserHandle};
pub use greeting::Refusal;
pub use settings::{BadSettings, ConfigSource, QUEUES_MAX, Settings, fs_config};
