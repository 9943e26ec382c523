//! Gives back what only the start of a machine needed.
//!
//! Most of the program's text serves the start and the set-up of devices and connections; an idle guest runs next to none of it. But what was
//! mapped stays mapped, and pages of a program's text that have been used twice are the last that a kernel takes back. So a while after a machine
//! has started, once, the text and constants are unmapped: pages that are still needed are mapped again from the page cache at the next
//! use, a microsecond for each 64 KiB, and the rest is the page cache's to keep for the next start or to drop. Free memory of the heap goes too.

use std::{
    ffi::{c_int, c_void},
    ops::Range,
    time::Duration,
};

use sepal_schema::transport::Handle;

/// From the start of the vCPUs: longer than the first requests that follow a start take.
const AFTER: Duration = Duration::from_millis(50);

/// Resolves when it is done.
pub(super) async fn after_start(handle: Handle) {
    handle.sleep(AFTER).await;
    for range in constant_parts() {
        // SAFETY: the pages are of a private mapping of this program's file, which was never writable since the program began: the system reads
        // them back from the file at the next use.
        let _ = unsafe { libc::madvise(range.start as *mut c_void, range.len(), libc::MADV_DONTNEED) };
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: only gives free memory back.
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Whole pages of this program's segments that are read or run, never written.
fn constant_parts() -> Vec<Range<usize>> {
    let mut found = Vec::new();
    // SAFETY: `visit` is called with what it expects, before this returns; `found` outlives that and nothing else uses it meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut found).cast()) };
    found
}

/// Adds the constant parts of the first object, which is the program itself, and ends the iteration.
///
/// # Safety
/// `info` describes a loaded object, and `found` points to a `Vec<Range<usize>>` that nothing else uses.
unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _size: usize, found: *mut c_void) -> c_int {
    // SAFETY: by the contract of this function.
    let (info, found) = unsafe { (&*info, &mut *found.cast::<Vec<Range<usize>>>()) };
    // SAFETY: the C library says where the program headers are and how many.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let segments = headers
        .iter()
        .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    found.extend(segments.map(|segment| {
        let start = (info.dlpi_addr as usize).wrapping_add(segment.p_vaddr as usize);
        whole_pages(start, segment.p_memsz as usize)
    }));
    1
}

/// The whole pages within: those at the ends may be shared with a segment that is written.
fn whole_pages(start: usize, len: usize) -> Range<usize> {
    let page = rustix::param::page_size();
    let from = start.next_multiple_of(page);
    let to = (start + len) / page * page;
    from..to.max(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_within_a_segment_go() {
        let page = rustix::param::page_size();
        assert_eq!(whole_pages(page, 2 * page), page..3 * page);
        assert_eq!(whole_pages(page + 1, 2 * page), 2 * page..3 * page);
        assert_eq!(whole_pages(page + 1, page - 2), 2 * page..2 * page);
    }

    #[test]
    fn text_and_constants_are_found_and_what_is_written_is_not() {
        static WRITTEN: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(1);
        let parts = constant_parts();
        let holds = |address: usize| parts.iter().any(|part| part.contains(&address));
        let local = 0;
        // The end of the segment may lie in a page that is not whole; no function of the library is there.
        assert!(holds(Vec::<u8>::reserve as *const () as usize) || holds(constant_parts as *const () as usize));
        for address in [&raw const WRITTEN as usize, &raw const local as usize] {
            assert!(!holds(address));
        }
    }
}
