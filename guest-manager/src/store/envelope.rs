//! What a file of the state folder is wrapped in, so that one that is torn, cut off or something else altogether is never taken for what it is not. Pure.
//!
//! ```text
//!   0   8  magic
//!   8   2  version of this format, little-endian as all numbers here: 1
//!   10  2  what is in it (Content)
//!   12  4  bytes of the content
//!   16  4  CRC-32 (IEEE 802.3) of the bytes 0 to 15 and the content
//!   20  4  zero
//!   24     the content: a Cap'n Proto message (store.capnp), which has its own ways to grow; the version counts up when they do not suffice
//! ```

/// The first byte is not text, and the rest shows what line ends and such were done to (as PNG's, ISO/IEC 15948, 5.2).
const MAGIC: [u8; 8] = *b"\x89SEPAL\r\n";
const VERSION: u16 = 1;
const HEADER: usize = 24;
/// Largest content, in bytes: a message from a client has at most 128 KiB, and there is little beside it.
pub(crate) const MAX_CONTENT: usize = 1 << 20;
/// Largest file, in bytes.
pub(crate) const MAX_FILE: usize = HEADER + MAX_CONTENT;

/// What is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// `StoredDefinition`.
    Definition = 1,
    /// `StoredSettings`.
    Settings = 2,
}

/// Why a file is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    /// It is none of ours.
    #[error("it does not begin as a file of the guest manager's does")]
    Foreign,
    /// A later version wrote it.
    #[error("it was written in version {0} of the format, and this guest manager knows version {VERSION}")]
    Newer(u16),
    /// There is something else in it.
    #[error("there is something else in it (kind {0})")]
    OtherContent(u16),
    /// It ended too soon, or goes on too long.
    #[error("it has {seen} bytes, and should have {needed}")]
    Length {
        /// What it has.
        seen: usize,
        /// What it should have.
        needed: usize,
    },
    /// Some of it is not what was written.
    #[error("it is damaged: its checksum is not right")]
    Damaged,
}

/// A file with this content.
pub(crate) fn wrap(kind: Content, content: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + content.len());
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&(kind as u16).to_le_bytes());
    // Never more than `MAX_CONTENT`.
    file.extend_from_slice(&u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
    let sum = checksum(&file, content);
    file.extend_from_slice(&sum.to_le_bytes());
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(content);
    file
}

/// The content of a file.
///
/// # Errors
/// [`Broken`].
pub(crate) fn unwrap(kind: Content, file: &[u8]) -> Result<&[u8], Broken> {
    if !file.starts_with(&MAGIC) {
        return Err(Broken::Foreign);
    }
    let Some((header, content)) = file.split_at_checked(HEADER) else {
        let (seen, needed) = (file.len(), HEADER);
        return Err(Broken::Length { seen, needed });
    };
    let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let long = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    // Whatever a later version has in it: only that much is known of it.
    if short(8) > VERSION {
        return Err(Broken::Newer(short(8)));
    }
    let needed = usize::try_from(long(12)).unwrap_or(usize::MAX);
    if content.len() != needed {
        let (seen, needed) = (file.len(), needed.saturating_add(HEADER));
        return Err(Broken::Length { seen, needed });
    }
    if checksum(&header[..16], content) != long(16) || short(8) != VERSION {
        return Err(Broken::Damaged);
    }
    match short(10) {
        seen if seen == kind as u16 => Ok(content),
        other => Err(Broken::OtherContent(other)),
    }
}

fn checksum(header: &[u8], content: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(header);
    sum.update(content);
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_file_is_told_by_its_beginning() {
        let file = wrap(Content::Definition, b"content!");
        assert_eq!(unwrap(Content::Definition, &file).unwrap(), b"content!");
        assert_eq!(unwrap(Content::Settings, &file), Err(Broken::OtherContent(1)));
        assert_eq!(unwrap(Content::Settings, b""), Err(Broken::Foreign));
        assert_eq!(unwrap(Content::Settings, b"name = \"web\"\n"), Err(Broken::Foreign));
        let mut newer = file.clone();
        newer[8] = 2;
        assert_eq!(unwrap(Content::Definition, &newer), Err(Broken::Newer(2)));
        assert_eq!(unwrap(Content::Definition, &newer[..HEADER]), Err(Broken::Newer(2)));
    }

    proptest! {
        #[test]
        fn no_part_of_a_file_is_taken_for_the_whole(content in prop::collection::vec(any::<u8>(), 0..200), cut in 0usize..224) {
            let file = wrap(Content::Settings, &content);
            prop_assert_eq!(unwrap(Content::Settings, &file), Ok(&content[..]));
            let cut = cut.min(file.len() - 1);
            prop_assert!(unwrap(Content::Settings, &file[..cut]).is_err());
            let mut longer = file;
            longer.push(0);
            prop_assert!(unwrap(Content::Settings, &longer).is_err());
        }

        #[test]
        fn no_changed_bit_goes_unnoticed(content in prop::collection::vec(any::<u8>(), 1..200), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut file = wrap(Content::Settings, &content);
            let at = at.index(file.len());
            // The four bytes that say nothing.
            prop_assume!(!(20..24).contains(&at));
            file[at] ^= 1 << bit;
            prop_assert!(unwrap(Content::Settings, &file).is_err());
        }

        #[test]
        fn anything_can_be_looked_at(bytes in prop::collection::vec(any::<u8>(), 0..64), ours in any::<bool>()) {
            let bytes = if ours { [&MAGIC[..], &bytes].concat() } else { bytes };
            let _ = unwrap(Content::Definition, &bytes);
        }
    }
}
