//! Everything that a host without hardware virtualization needs and no other host does.
//!
//! On some hosts `/dev/kvm` comes from `kvm_pvm`, a page-table virtual machine. There guest code at CPL 3 runs natively, and guest
//! code at CPL 0 goes through KVM's instruction emulator. Linux boots in that only with help:
//!
//! | what is missing there | what is done about it | where |
//! |---|---|---|
//! | CPUID can't hide what the emulator lacks unless whole leaves are missing | a recipe | [`adjust_cpuid`] |
//! | features that CPUID can't hide at all | the guest's own command line | [`CMDLINE`] |
//! | instructions that the emulator lacks | decoded and carried out here | [`Assist::internal_error`] |
//! | AVX, which user space sees and its kernel doesn't, over context switches | kept here, beside what the kernel saves | the same |
//! | SYSCALL does not enter CPL 0 | a trampoline in the guest's page tables | [`Assist::wrmsr`], [`Assist::mmio_write`] |
//!
//! Whether a host is of this kind is for the manager to find out ([`detect`]): the jail shows no `/sys`. On other hosts nothing
//! of this is called.
//!
//! A guest may be hostile: its registers, page tables, code and MSR values are checked for everything that is done with them.

mod assist;
mod cpuid;
mod decode;
mod emulate;
mod paging;
mod syscall_entry;
mod xstate;

pub use assist::{Assist, AssistError};
pub use cpuid::adjust_cpuid;

/// What a guest's Linux command line gets in addition. Put it before the user's own words: where one occurs twice, Linux takes
/// the last.
///
/// - `clearcpuid=`: features whose CPUID bits can't be hidden and whose instructions the emulator lacks, so that Linux does not
///   use them in the kernel. By number, which kernels before 5.19 understand too: pclmulqdq, ssse3, fma, sse4_1, sse4_2, movbe,
///   popcnt, aes, avx, f16c (word 4, from 129 on); xsaveopt, xsavec, xgetbv1, xsaves (word 10, from 320 on). A `clearcpuid=` of
///   the user's replaces this one, so it should contain these.
/// - `nopti`: page-table isolation would keep the system-call trampoline out of the user's page tables. Don't override.
/// - `mitigations=off`: the kernel's code is not run by the processor, so speculation in it has no meaning here, while each
///   thunk and fence costs time. May be overridden.
/// - `cryptomgr.notests`: testing its ciphers would take such a kernel minutes at each boot.
/// - `noreplace-smp`: a kernel on one processor would otherwise patch every lock prefix away, for a second and no gain.
///
/// A user should not add `noxsave`: user space sees AVX whatever is done, and only a kernel that uses XSAVE lets its registers be
/// kept over a context switch.
pub const CMDLINE: &str = "clearcpuid=129,137,140,147,148,150,151,153,156,157,320,321,322,323 nopti mitigations=off cryptomgr.notests noreplace-smp";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_plain_words() {
        assert!(CMDLINE.bytes().all(|b| b.is_ascii_graphic() || b == b' '));
        assert!(!CMDLINE.contains("  "), "a line was continued badly");
        assert!(CMDLINE.len() < crate::layout::CMDLINE_MAX / 4);
        let clear = CMDLINE.split(' ').find_map(|word| word.strip_prefix("clearcpuid="));
        // Linux reads the list into 128 bytes.
        assert!(clear.is_some_and(|list| list.len() < 128));
    }
}
