//! Devices of the machine and the loops that run them. Nothing here makes a hypervisor call: the machine hands in what leads there
//! ([`interrupt::InterruptLine`], [`interrupt::MsiSink`], [`legacy::acpi_pm::PowerSink`]) and puts each device's bus side on a [`bus::Bus`].
//!
//! ```text
//!   vCPU thread                      shared, behind a short lock            the device's own thread
//!   -----------                      ---------------------------            -----------------------
//!   exit -> bus::Bus -> BusDevice -> registers, rings of bytes  <---------> dispatch::DispatchLoop <-> host socket, file, timer
//!                          |                    |              doorbell                 |
//!                          |                    '--- level changed ---.                 |
//!                          v                                          v                 v
//!                    PowerSink: shutdown, reset             InterruptLine (a wire)    DeviceReporter: failed, host closed
//!                                                                     |
//!                                                   legacy::ioapic::IoApic (pin -> message)
//!                                                                     v
//!                                                          MsiSink -> hypervisor -> local APIC
//! ```
//!
//! A vCPU never waits for a device's thread: the lock between them is never held in a system call. A device's thread that panics or hangs
//! is quarantined or left alone; its bus side goes on answering.

mod alarm;
pub mod bus;
pub mod dispatch;
pub mod generation_id;
pub mod interrupt;
pub mod legacy;
pub mod pci;
pub mod pvpanic;
pub mod rate;
mod stream;
pub mod vhost_user;
pub mod virtio;
pub mod watchdog;
