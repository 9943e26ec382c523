//! libavf: Android's virtual machine API (`AVirtualMachine*`) as a C library over the guest manager. `include/android/virtualization.h` says what each
//! function promises, `docs/libavf.md` the rest; `build` links the library.
//!
//! ```text
//!   exports   the C functions: pointers and descriptors become values, panics become errors
//!   config    AVirtualMachineRawConfig: what is set, and the configuration that the manager gets of it
//!   service   AVirtualizationService: a thread that talks to the manager;  process  the manager itself;  early  early machines
//!   vm        AVirtualMachine: its life (life) as all threads see it
//!   machine   what the service's thread does for it;  name, reason  the manager's words in Android's, and back
//!   streams   a thread for what it prints and reads;  window  what was typed, for two ports
//!   log       lines for people;  threads  threads that take no signals;  answer, environment
//! ```
//!
//! ```text
//!   program's threads: exports -> vm --commands--> service's thread: machine --Cap'n Proto--> guest manager
//!                                  <--life, condvar--     |
//!                                                         +-- starts, joins --> streams' thread of each running machine
//! ```

mod answer;
mod config;
mod early;
mod environment;
pub mod exports;
mod life;
mod log;
mod machine;
mod name;
mod process;
mod reason;
mod service;
mod streams;
mod threads;
mod vm;
mod window;
