//! ELF kernels: the header is checked as a whole, then the segments flow into guest memory in the file's order.
//!
//! Field names and rules: System V ABI, "Object Files"; the PVH note: Xen, `xen/include/public/elfnote.h`.

use std::ops::Range;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFMAG, EM_X86_64, ET_DYN, ET_EXEC, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr,
    PT_LOAD, PT_NOTE,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::image::Image;
use super::{BootError, LoadedKernel, guest};
use crate::layout;
use crate::memory::MemoryMap;

/// The program headers must end within the first bytes of the file, where every linker puts them.
const MAX_HEAD: u64 = 64 << 10;

/// Most bytes of notes; Linux has about 500.
const MAX_NOTES: u64 = 64 << 10;

/// XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// What is wrong with an ELF file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// What came out of a bzImage is no ELF file.
    #[error("the bzImage's payload is no ELF file: it starts with {0:02x?}")]
    NotElf(Vec<u8>),
    /// A header field has a value that no kernel for this machine has.
    #[error("ELF header: {field} is {value:#x}, {expected}")]
    Header {
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it should.
        expected: &'static str,
    },
    /// A segment's fields contradict each other or overflow.
    #[error("ELF segment {index}: {problem} (offset {offset:#x}, {file} bytes in the file, {memory} in memory)")]
    Segment {
        /// Its place in the program header table.
        index: usize,
        /// The contradiction.
        problem: &'static str,
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        file: u64,
        /// `p_memsz`.
        memory: u64,
    },
    /// A segment does not lie in RAM that is free for it.
    #[error(
        "ELF segment {index}: {start:#x}..{end:#x} is not free guest memory, which is from {:#x} to {ram_end:#x}, \
         without {:#x}..{:#x} and {:#x}..{:#x}",
        layout::BOOT_AREA_END,
        layout::LOW_MEMORY_END,
        layout::HIGH_MEMORY,
        layout::HOLE_START,
        layout::HOLE_END
    )]
    Outside {
        /// Its place in the program header table.
        index: usize,
        /// First physical address.
        start: u64,
        /// First address after it.
        end: u64,
        /// End of the guest's memory.
        ram_end: u64,
    },
    /// Two segments share bytes of the file or of memory.
    #[error("ELF segments {first} and {second} overlap in {space}")]
    Overlap {
        /// Its place in the program header table.
        first: usize,
        /// The other's.
        second: usize,
        /// Where.
        space: &'static str,
    },
    /// There is nothing to load.
    #[error("ELF file has no loadable segment")]
    NoSegments,
    /// The entry point lies in no segment.
    #[error("{what} {entry:#x} is in no loaded segment")]
    EntryOutside {
        /// Which entry point.
        what: &'static str,
        /// The address.
        entry: u64,
    },
    /// The entry point is where the initial page tables, or 32-bit code, do not reach.
    #[error("entry point {entry:#x} is above {:#x}", layout::HOLE_END)]
    EntryTooHigh {
        /// The address.
        entry: u64,
    },
}

/// A PT_LOAD segment whose numbers are checked against each other, not yet against memory.
#[derive(Debug)]
struct Segment {
    index: usize,
    file: Range<u64>,
    memory: Range<u64>,
    virtual_start: u64,
}

/// Where the notes are in the file, and how they are aligned.
#[derive(Debug)]
struct Notes {
    file: Range<u64>,
    alignment: u64,
}

/// True if a file that starts with `head` claims to be ELF.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(ELFMAG)
}

/// Loads an ELF image. Nothing is written before all headers are checked.
pub(super) fn load(ram: &GuestMemoryMmap, map: &MemoryMap, image: &mut Image<'_>) -> Result<LoadedKernel, BootError> {
    let header = read_header(image)?;
    let (mut segments, notes) = read_program_headers(image, &header)?;
    check_memory(map, &mut segments)?;
    check_file(&mut segments)?;
    let entry = find_entry(&segments, header.e_entry)?;

    let mut note_bytes = NoteBytes::Wanted(notes);
    for segment in &segments {
        let size = segment.file.end - segment.file.start;
        if size > 0 {
            note_bytes.read_before(image, segment.file.start)?;
            image.skip_to(segment.file.start)?;
            image.load(ram, segment.memory.start, size)?;
        }
        let zeros = segment.memory.start + size..segment.memory.end;
        guest::zero(ram, zeros.start, zeros.end - zeros.start, image.cancel())?;
        note_bytes.read_from_guest(ram, segment)?;
    }
    note_bytes.read_before(image, u64::MAX)?;
    image.finish()?;

    let pvh_entry = note_bytes.pvh_entry();
    if let Some(entry) = pvh_entry
        && !segments.iter().any(|segment| segment.memory.contains(&entry))
    {
        return Err(ElfError::EntryOutside {
            what: "PVH entry point",
            entry,
        }
        .into());
    }
    segments.sort_by_key(|segment| segment.memory.start);
    let spans = segments.into_iter().map(|segment| segment.memory).collect();
    Ok(LoadedKernel {
        spans,
        entry,
        pvh_entry,
        setup: None,
    })
}

fn read_header(image: &mut Image<'_>) -> Result<Elf64_Ehdr, BootError> {
    let head = image.peek(size_of::<Elf64_Ehdr>())?;
    if !is_elf(head) {
        return Err(ElfError::NotElf(head[..head.len().min(4)].to_vec()).into());
    }
    let len = head.len();
    let Ok(header) = Elf64_Ehdr::read_exact_from(head) else {
        return Err(image.short(len, size_of::<Elf64_Ehdr>()));
    };
    let check = |field, value: u64, ok: bool, expected| {
        if ok {
            Ok(())
        } else {
            Err(ElfError::Header { field, value, expected })
        }
    };
    let class = header.e_ident[EI_CLASS];
    check(
        "EI_CLASS",
        class.into(),
        class == ELFCLASS64,
        "only 2 (64-bit) can be loaded",
    )?;
    let data = header.e_ident[EI_DATA];
    check(
        "EI_DATA",
        data.into(),
        data == ELFDATA2LSB,
        "only 1 (little-endian) can be loaded",
    )?;
    let machine = header.e_machine;
    check(
        "e_machine",
        machine.into(),
        machine == EM_X86_64,
        "only 62 (x86-64) can run",
    )?;
    let executable = matches!(header.e_type, ET_EXEC | ET_DYN);
    check(
        "e_type",
        header.e_type.into(),
        executable,
        "only 2 (executable) and 3 (shared) can be loaded",
    )?;
    let entry_size = header.e_phentsize;
    check(
        "e_phentsize",
        entry_size.into(),
        usize::from(entry_size) == size_of::<Elf64_Phdr>(),
        "it should be 56",
    )?;
    Ok(header)
}

fn read_program_headers(
    image: &mut Image<'_>,
    header: &Elf64_Ehdr,
) -> Result<(Vec<Segment>, Option<Notes>), BootError> {
    let size = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    let end = header
        .e_phoff
        .checked_add(size)
        .filter(|&end| end <= MAX_HEAD)
        .ok_or(ElfError::Header {
            field: "e_phoff",
            value: header.e_phoff,
            expected: "the program headers should end within the first 64 KiB",
        })? as usize;
    let head = image.peek(end)?;
    if head.len() < end {
        let len = head.len();
        return Err(image.short(len, end));
    }
    let (mut segments, mut notes) = (Vec::new(), None);
    let entries = head[header.e_phoff as usize..end].chunks_exact(size_of::<Elf64_Phdr>());
    for (index, entry) in entries.enumerate() {
        let Ok(entry) = Elf64_Phdr::read_exact_from(entry) else {
            break;
        };
        let fail = |problem| ElfError::Segment {
            index,
            problem,
            offset: entry.p_offset,
            file: entry.p_filesz,
            memory: entry.p_memsz,
        };
        let file_end = entry.p_offset.checked_add(entry.p_filesz);
        let file_end = file_end.filter(|&end| i64::try_from(end).is_ok());
        match entry.p_type {
            PT_LOAD if entry.p_memsz > 0 => {
                if entry.p_filesz > entry.p_memsz {
                    return Err(fail("larger in the file than in memory").into());
                }
                let file_end = file_end.ok_or_else(|| fail("its end in the file overflows"))?;
                let end = entry
                    .p_paddr
                    .checked_add(entry.p_memsz)
                    .ok_or_else(|| fail("its end in memory overflows"))?;
                segments.push(Segment {
                    index,
                    file: entry.p_offset..file_end,
                    memory: entry.p_paddr..end,
                    virtual_start: entry.p_vaddr,
                });
            }
            PT_NOTE if notes.is_none() && entry.p_filesz > 0 => {
                if entry.p_filesz > MAX_NOTES {
                    return Err(fail("more than 64 KiB of notes").into());
                }
                let file_end = file_end.ok_or_else(|| fail("its end in the file overflows"))?;
                let alignment = if entry.p_align == 8 { 8 } else { 4 };
                notes = Some(Notes {
                    file: entry.p_offset..file_end,
                    alignment,
                });
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegments.into());
    }
    Ok((segments, notes))
}

/// Every segment in free RAM, none over another: so all together are no larger than RAM.
fn check_memory(map: &MemoryMap, segments: &mut [Segment]) -> Result<(), ElfError> {
    for Segment { index, memory, .. } in &*segments {
        if memory.start < layout::BOOT_AREA_END || !map.is_usable(memory) {
            let ram_end = map.usable().last().map_or(0, |range| range.end);
            return Err(ElfError::Outside {
                index: *index,
                start: memory.start,
                end: memory.end,
                ram_end,
            });
        }
    }
    segments.sort_by_key(|segment| segment.memory.start);
    check_disjoint(segments.iter(), |segment| &segment.memory, "memory")
}

/// Leaves the segments in the file's order. None may share bytes with another, since they are read in one pass. Where one
/// of zeros only would be in the file means nothing: it may be inside another, or beyond the end.
fn check_file(segments: &mut [Segment]) -> Result<(), ElfError> {
    segments.sort_by_key(|segment| (segment.file.start, segment.file.end));
    check_disjoint(
        segments.iter().filter(|segment| !segment.file.is_empty()),
        |segment| &segment.file,
        "the file",
    )
}

/// Checks ascending ranges of the segments.
fn check_disjoint<'a>(
    segments: impl Iterator<Item = &'a Segment> + Clone,
    range: impl Fn(&Segment) -> &Range<u64>,
    space: &'static str,
) -> Result<(), ElfError> {
    let mut pairs = segments.clone().zip(segments.skip(1));
    match pairs.find(|(first, second)| range(first).end > range(second).start) {
        Some((first, second)) => Err(ElfError::Overlap {
            first: first.index,
            second: second.index,
            space,
        }),
        None => Ok(()),
    }
}

/// The physical address of `e_entry`, which is physical in Linux and virtual in other kernels.
fn find_entry(segments: &[Segment], entry: u64) -> Result<u64, ElfError> {
    if segments.iter().any(|segment| segment.memory.contains(&entry)) {
        return Ok(entry);
    }
    let physical = |segment: &Segment| {
        let offset = entry.checked_sub(segment.virtual_start)?;
        (offset < segment.memory.end - segment.memory.start).then(|| segment.memory.start + offset)
    };
    segments.iter().find_map(physical).ok_or(ElfError::EntryOutside {
        what: "entry point",
        entry,
    })
}

/// The notes on their way out of the file. They normally lie inside a segment.
enum NoteBytes {
    Wanted(Option<Notes>),
    Read { bytes: Vec<u8>, alignment: u64 },
}

impl NoteBytes {
    /// Reads notes that come before `next`, the start of the next segment.
    fn read_before(&mut self, image: &mut Image<'_>, next: u64) -> Result<(), BootError> {
        if let NoteBytes::Wanted(Some(Notes { file, alignment })) = self
            && file.start >= image.position()
            && file.end <= next
        {
            image.skip_to(file.start)?;
            let mut bytes = vec![0; (file.end - file.start) as usize];
            image.read_exact(&mut bytes)?;
            *self = NoteBytes::Read {
                bytes,
                alignment: *alignment,
            };
        }
        Ok(())
    }

    /// Reads notes that lie inside a segment, after it was loaded.
    fn read_from_guest(&mut self, ram: &GuestMemoryMmap, segment: &Segment) -> Result<(), BootError> {
        if let NoteBytes::Wanted(Some(Notes { file, alignment })) = self
            && file.start >= segment.file.start
            && file.end <= segment.file.end
        {
            let mut bytes = vec![0; (file.end - file.start) as usize];
            let address = segment.memory.start + (file.start - segment.file.start);
            ram.read_slice(&mut bytes, GuestAddress(address))?;
            *self = NoteBytes::Read {
                bytes,
                alignment: *alignment,
            };
        }
        Ok(())
    }

    fn pvh_entry(&self) -> Option<u64> {
        match self {
            NoteBytes::Read { bytes, alignment } => find_pvh_entry(bytes, *alignment as usize),
            NoteBytes::Wanted(_) => None,
        }
    }
}

/// Looks through a note segment. What is malformed ends the search: such a kernel has no PVH entry.
fn find_pvh_entry(mut notes: &[u8], alignment: usize) -> Option<u64> {
    loop {
        let header = Elf64_Nhdr::read_exact_from(notes).ok()?;
        let name_start = size_of::<Elf64_Nhdr>();
        let name_end = name_start.checked_add(header.n_namesz as usize)?;
        let value_start = name_end.checked_next_multiple_of(alignment)?;
        let value_end = value_start.checked_add(header.n_descsz as usize)?;
        let (name, value) = (notes.get(name_start..name_end)?, notes.get(value_start..value_end)?);
        if name == b"Xen\0" && header.n_type == NOTE_PHYS32_ENTRY {
            // The note is as wide as a pointer of the kernel that has it; only 32 bits can be entered.
            return match value.len() {
                4 => Some(u32::from_le_bytes(value.try_into().ok()?).into()),
                8 => Some(u64::from_le_bytes(value.try_into().ok()?)),
                _ => None,
            };
        }
        notes = notes.get(value_end.checked_next_multiple_of(alignment)?..)?;
    }
}
