//! PCI (PCI Local Bus specification 3.0, called "PCI" below): one segment with one bus, its functions, and the ways to reach them.
//!
//! ```text
//!   port 0xcf8, 0xcfc  access::ConfigPorts --.                     .-- config_space::ConfigSpace   header, BARs, capabilities
//!   ECAM window        access::Ecam ---------+--> bus::PciBus ---> function::PciFunction
//!   memory windows     access::MemoryWindow -'    who is where     '-- msix::Msix                  table, masks, pending bits
//!                                                                          |
//!                                                                          v
//!                                                          function::MsiVectors, InterruptLine: the machine's
//! ```
//!
//! A guest moves a function's memory by writing its base address registers: [`bus::PciBus`] then works out who answers where, so that a function
//! placed over another, or outside of the windows, disturbs nobody.

pub mod access;
mod address;
pub mod bus;
pub mod config_space;
pub mod function;
pub mod host_bridge;
pub mod msix;

pub use address::PciAddress;
pub use bus::{PciBus, PciError};
pub use function::{Bar, MsiVector, MsiVectors, PciFunction};
