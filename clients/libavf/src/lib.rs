//! libavf: Android's virtual machine API (`AVirtualMachine*`) as a C library over the guest manager. `include/android/virtualization.h` says what each
//! function promises, `docs/libavf.md` the rest; `build` links the library.
//!
//! ```text
//!   exports   the C functions: pointers and descriptors become values, panics become errors
//!   config    AVirtualMachineRawConfig: what is set, and the configuration that the manager gets
//! ```

mod config;
pub mod exports;
