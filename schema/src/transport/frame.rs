//! Bytes to messages: the stream framing of Cap'n Proto.
//!
//! ```text
//!   u32 segments-1 | u32 words of segment 0 | ... | padding to 8 bytes | segment 0 | segment 1 | ...
//! ```
//!
//! The decoder is fed bytes as they come, split anywhere. What a header claims is checked as soon as it is there, and
//! memory grows with the bytes that have come, never with what a header says is to come. Pure: no I/O.

use std::ops::Range;

use capnp::serialize::{OwnedSegments, SegmentLengthsBuilder};

use super::limits::{Limit, Limits};

/// Room for this many bytes is offered to a read at least. A connection that waits between two messages keeps no more.
const MIN_CHUNK: usize = 4 * 1024;
/// The room doubles up to this with each read that filled what it was offered.
const MAX_CHUNK: usize = 64 * 1024;
/// Memory that is kept between messages of a burst.
const KEEP: usize = 128 * 1024;
const WORD: usize = 8;

/// A whole message.
pub(crate) struct Frame {
    /// Its content.
    pub(crate) segments: OwnedSegments,
    /// Where it was in the stream, in bytes, with its segment table.
    pub(crate) range: Range<u64>,
}

/// Turns bytes into messages.
pub(crate) struct Decoder {
    message_words: usize,
    max_segments: usize,
    /// Bytes that have come are `buffer[start..end]`; all of it is initialised.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// What the next read is offered at least, in bytes.
    room: usize,
    /// Bytes that have come since the last rest.
    burst: usize,
    /// Stream offset of `buffer[start]`.
    offset: u64,
}

/// Size of a message by its segment table.
struct Header {
    bytes: usize,
    segments: usize,
    words: usize,
}

impl Decoder {
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            message_words: limits.message_words,
            max_segments: limits.segments,
            buffer: Vec::new(),
            start: 0,
            end: 0,
            room: MIN_CHUNK,
            burst: 0,
            offset: 0,
        }
    }

    /// Where the next bytes go; say with [`Decoder::filled`] how many came. To be called when [`Decoder::next`] has
    /// nothing more, so that what is kept is less than one message.
    pub(crate) fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > KEEP {
                self.buffer = Vec::new();
            }
        }
        if self.buffer.len() - self.end < self.room {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            // Doubles what has come, so that a long message is not copied over and over.
            let room = self.end.clamp(self.room, MAX_CHUNK);
            if self.buffer.len() - self.end < room {
                self.buffer.resize(self.end + room, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// `count` bytes were put into [`Decoder::space`]. Returns their range in the stream.
    pub(crate) fn filled(&mut self, count: usize) -> Range<u64> {
        let offered = self.buffer.len() - self.end;
        let count = count.min(offered);
        if count == offered {
            self.room = (2 * self.room).min(MAX_CHUNK);
        }
        let from = self.offset + (self.end - self.start) as u64;
        self.end += count;
        self.burst = self.burst.saturating_add(count);
        from..from + count as u64
    }

    /// Nothing more has come: gives back what only the last burst needed, unless the rest of a message is awaited. The next one begins with as much room
    /// as this one needed, so that a peer that sends much at a time is read with as few calls as if it had been kept.
    pub(crate) fn rest(&mut self) {
        if !self.is_between_messages() {
            return;
        }
        (self.start, self.end) = (0, 0);
        if self.buffer.len() > MIN_CHUNK {
            self.buffer = Vec::new();
        }
        if self.burst > 0 {
            self.room = self.burst.min(MAX_CHUNK).next_power_of_two().max(MIN_CHUNK);
            self.burst = 0;
        }
    }

    /// Whether the stream may end here, between two messages.
    pub(crate) fn is_between_messages(&self) -> bool {
        self.start == self.end
    }

    /// Whether a whole message is there.
    pub(crate) fn has_message(&self) -> bool {
        let there = self.end - self.start;
        matches!(self.header(), Ok(Some(header)) if there - header.bytes >= header.words * WORD)
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// The limit that a header goes past, which the caller must take as the end of the stream.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>, Limit> {
        let Some(header) = self.header()? else { return Ok(None) };
        let bytes = header.words * WORD;
        let body = self.start + header.bytes;
        if self.end - body < bytes {
            return Ok(None);
        }
        let mut lengths = SegmentLengthsBuilder::with_capacity(header.segments);
        for index in 0..header.segments {
            // Cannot overflow: the sum is within the limit.
            lengths
                .try_push_segment(self.segment_words(index))
                .map_err(|_| Limit::MessageWords)?;
        }
        let mut segments = lengths.into_owned_segments();
        segments.copy_from_slice(&self.buffer[body..body + bytes]);
        let length = header.bytes + bytes;
        let range = self.offset..self.offset + length as u64;
        self.start += length;
        self.offset = range.end;
        Ok(Some(Frame { segments, range }))
    }

    /// The segment table, if all of it is there.
    fn header(&self) -> Result<Option<Header>, Limit> {
        let there = self.end - self.start;
        if there < WORD {
            return Ok(None);
        }
        let segments = self.u32_at(0).saturating_add(1);
        if segments > self.max_segments {
            return Err(Limit::Segments);
        }
        let bytes = (4 * (segments + 1)).next_multiple_of(WORD);
        let mut words = 0usize;
        // Counts what is there of the table, so that a lie in its beginning is found before its end has come.
        for index in 0..segments.min(there / 4 - 1) {
            words = words.saturating_add(self.segment_words(index));
            if words > self.message_words {
                return Err(Limit::MessageWords);
            }
        }
        Ok((there >= bytes).then_some(Header { bytes, segments, words }))
    }

    fn segment_words(&self, index: usize) -> usize {
        self.u32_at(4 * (index + 1))
    }

    fn u32_at(&self, at: usize) -> usize {
        let at = self.start + at;
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.buffer[at..at + 4]);
        u32::from_le_bytes(bytes) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::message::ReaderSegments;
    use proptest::prelude::*;

    fn limits() -> Limits {
        Limits {
            message_words: 300,
            segments: 6,
            ..Limits::default()
        }
    }

    fn encode(segments: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = (segments.len() as u32 - 1).to_le_bytes().to_vec();
        for segment in segments {
            bytes.extend(((segment.len() / WORD) as u32).to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(WORD), 0);
        bytes.extend(segments.concat());
        bytes
    }

    /// Feeds `bytes` in pieces, returns the messages until the end or the first error.
    fn decode(bytes: &[u8], pieces: &[usize]) -> (Vec<Vec<Vec<u8>>>, Option<Limit>, Decoder) {
        let mut decoder = Decoder::new(&limits());
        let mut messages = Vec::new();
        let (mut rest, mut expected_start) = (bytes, 0);
        for piece in pieces.iter().copied().chain(std::iter::repeat(usize::MAX)) {
            loop {
                let has_message = decoder.has_message();
                match decoder.next() {
                    Ok(Some(frame)) => {
                        assert!(has_message);
                        assert_eq!(frame.range.start, expected_start);
                        expected_start = frame.range.end;
                        let count = frame.segments.len() as u32;
                        messages.push(
                            (0..count)
                                .map(|n| frame.segments.get_segment(n).unwrap().to_vec())
                                .collect(),
                        );
                    }
                    Ok(None) => {
                        assert!(!has_message);
                        break;
                    }
                    Err(limit) => return (messages, Some(limit), decoder),
                }
            }
            if rest.is_empty() {
                return (messages, None, decoder);
            }
            let space = decoder.space();
            let count = piece.clamp(1, rest.len()).min(space.len());
            space[..count].copy_from_slice(&rest[..count]);
            let at = (bytes.len() - rest.len()) as u64;
            assert_eq!(decoder.filled(count), at..at + count as u64);
            rest = &rest[count..];
        }
        unreachable!("the pieces never end")
    }

    fn segments() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(
            (0usize..50).prop_flat_map(|n| prop::collection::vec(any::<u8>(), n * WORD)),
            1..6,
        )
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(
            messages in prop::collection::vec(segments(), 0..8),
            pieces in prop::collection::vec(1usize..700, 0..60),
        ) {
            let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message)).collect();
            let (decoded, error, decoder) = decode(&bytes, &pieces);
            prop_assert_eq!(error, None);
            prop_assert_eq!(decoded, messages);
            prop_assert!(decoder.is_between_messages());
        }

        #[test]
        fn any_bytes_give_the_same_however_they_are_split(
            bytes in prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => 0u8..8, 1 => any::<u8>()], 0..400),
            pieces in prop::collection::vec(1usize..40, 0..60),
        ) {
            let whole = decode(&bytes, &[]);
            let split = decode(&bytes, &pieces);
            prop_assert_eq!(whole.0, split.0);
            prop_assert_eq!(whole.1, split.1);
            prop_assert!(split.2.buffer.len() <= 2 * MAX_CHUNK);
        }
    }

    /// Puts `bytes` in, as much at a time as there is room for, and takes all messages out. Returns the number of reads.
    fn burst(decoder: &mut Decoder, mut bytes: &[u8]) -> usize {
        let mut reads = 0;
        while !bytes.is_empty() {
            let space = decoder.space();
            let count = space.len().min(bytes.len());
            space[..count].copy_from_slice(&bytes[..count]);
            decoder.filled(count);
            bytes = &bytes[count..];
            reads += 1;
            while decoder.next().unwrap().is_some() {}
        }
        reads
    }

    #[test]
    fn after_a_burst_a_resting_decoder_is_small_and_the_next_burst_is_read_as_fast() {
        let mut decoder = Decoder::new(&limits());
        let message = encode(&[vec![1; 1024]]);
        let many = message.repeat(60);
        let first = burst(&mut decoder, &many);
        decoder.rest();
        assert!(decoder.buffer.capacity() <= MIN_CHUNK);
        let next = burst(&mut decoder, &many);
        assert!(next == 1 && first > next, "{next} reads after {first}");
        decoder.rest();
        // One that sends little has little, from its second message on.
        for _ in 0..2 {
            assert_eq!(burst(&mut decoder, &message), 1);
            decoder.rest();
        }
        let little = decoder.space().len();
        assert_eq!(little, MIN_CHUNK);
    }

    #[test]
    fn what_has_come_of_a_message_stays_while_the_decoder_rests() {
        let mut decoder = Decoder::new(&limits());
        let message = encode(&[vec![7; 2400]]);
        let (head, tail) = message.split_at(1001);
        burst(&mut decoder, head);
        decoder.rest();
        decoder.space()[..tail.len()].copy_from_slice(tail);
        decoder.filled(tail.len());
        let frame = decoder.next().unwrap().unwrap();
        assert_eq!(frame.segments.get_segment(0).unwrap(), [7; 2400]);
    }

    #[test]
    fn a_header_that_claims_much_costs_nothing() {
        for (header, limit) in [
            ([0u32, 301], Limit::MessageWords),
            ([0, u32::MAX], Limit::MessageWords),
            ([6, 0], Limit::Segments),
            ([u32::MAX, 0], Limit::Segments),
        ] {
            let bytes: Vec<u8> = header.iter().flat_map(|n| n.to_le_bytes()).collect();
            let (messages, error, decoder) = decode(&bytes, &[]);
            assert!(messages.is_empty());
            assert_eq!(error, Some(limit));
            assert!(decoder.buffer.capacity() <= MAX_CHUNK);
        }
        // Within the limit, but nothing of it comes.
        let bytes: Vec<u8> = [0u32, 300].iter().flat_map(|n| n.to_le_bytes()).collect();
        let (_, error, decoder) = decode(&bytes, &[]);
        assert_eq!(error, None);
        assert!(!decoder.is_between_messages());
        assert!(decoder.buffer.capacity() <= MAX_CHUNK);
    }
}
