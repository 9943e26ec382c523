//! Which blocks of the region are plugged, and what becomes of a request (virtio 5.15.6); decides only.
//!
//! ```text
//!   request --decide--> Decision::Answer(response)               nothing changes
//!                   '-> Decision::Plug(blocks), ::Unplug(blocks) the device does it; done(..) if it worked --> Ack, else Busy
//! ```

use std::ops::Range;

/// What the driver asks for (virtio 5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug { address: u64, blocks: u16 },
    Unplug { address: u64, blocks: u16 },
    UnplugAll,
    State { address: u64, blocks: u16 },
    Unknown,
}

impl Request {
    /// Bytes of any request.
    pub(super) const BYTES: usize = 24;

    /// Reads `le16 type, le16 padding[3], le64 addr, le16 nb_blocks, le16 padding[3]`.
    pub(super) fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let blocks = u16::from_le_bytes([n0, n1]);
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug { address, blocks },
            1 => Self::Unplug { address, blocks },
            2 => Self::UnplugAll,
            3 => Self::State { address, blocks },
            _ => Self::Unknown,
        }
    }
}

/// The state of a row of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    Ack,
    AckState(State),
    /// Not as long as so much is not requested.
    Nack,
    /// Not now.
    Busy,
    /// Never.
    Error,
}

impl Response {
    /// Bytes of any response.
    pub(super) const BYTES: usize = 10;

    /// `le16 type, le16 padding[3], le16 state`.
    pub(super) fn bytes(self) -> [u8; Self::BYTES] {
        let (kind, state) = match self {
            Self::Ack => (0, 0),
            Self::AckState(State::Plugged) => (0, 0),
            Self::AckState(State::Unplugged) => (0, 1),
            Self::AckState(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        // All of them are below 256.
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// What is to be done about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Only to answer it.
    Answer(Response),
    /// To note these blocks as plugged.
    Plug(Range<usize>),
    /// To give the memory of these blocks back, and then to note them as unplugged.
    Unplug(Range<usize>),
}

/// The blocks of a region.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    block_size: u64,
    region: Range<u64>,
    plugged: Vec<u64>,
    count: u64,
    requested: u64,
}

const WORD: usize = u64::BITS as usize;

impl Blocks {
    /// All unplugged. `block_size` is a power of two; `region` and `requested` are multiples of it.
    pub(super) fn new(block_size: u64, region: Range<u64>, requested: u64) -> Self {
        let blocks = ((region.end - region.start) / block_size) as usize;
        Self {
            block_size,
            region,
            plugged: vec![0; blocks.div_ceil(WORD)],
            count: 0,
            requested,
        }
    }

    pub(super) fn block_size(&self) -> u64 {
        self.block_size
    }

    pub(super) fn region(&self) -> &Range<u64> {
        &self.region
    }

    pub(super) fn region_size(&self) -> u64 {
        self.region.end - self.region.start
    }

    /// Bytes that the driver is asked to have plugged.
    pub(super) fn requested_size(&self) -> u64 {
        self.requested
    }

    pub(super) fn request(&mut self, bytes: u64) {
        self.requested = bytes;
    }

    /// Bytes that are plugged.
    pub(super) fn plugged_size(&self) -> u64 {
        self.count * self.block_size
    }

    /// The guest addresses of blocks.
    pub(super) fn addresses(&self, blocks: &Range<usize>) -> Range<u64> {
        let address = |block: usize| self.region.start + block as u64 * self.block_size;
        address(blocks.start)..address(blocks.end)
    }

    /// What is to be done about a request.
    pub(super) fn decide(&self, request: Request) -> Decision {
        use Decision::Answer;
        let (address, blocks) = match request {
            Request::Unknown => return Answer(Response::Error),
            Request::UnplugAll if self.count == 0 => return Answer(Response::Ack),
            Request::UnplugAll => return Decision::Unplug(0..(self.region_size() / self.block_size) as usize),
            Request::Plug { address, blocks }
            | Request::Unplug { address, blocks }
            | Request::State { address, blocks } => (address, blocks),
        };
        let Some(range) = self.locate(address, blocks) else {
            return Answer(Response::Error);
        };
        let state = self.state(&range);
        match request {
            Request::State { .. } => Answer(Response::AckState(state)),
            Request::Plug { .. } if state != State::Unplugged => Answer(Response::Error),
            // Both are at most the region's size.
            Request::Plug { .. } if self.plugged_size() + u64::from(blocks) * self.block_size > self.requested => {
                Answer(Response::Nack)
            }
            Request::Plug { .. } => Decision::Plug(range),
            _ if state != State::Plugged => Answer(Response::Error),
            _ => Decision::Unplug(range),
        }
    }

    /// A decision was carried out.
    pub(super) fn done(&mut self, decision: &Decision) {
        let (blocks, plug) = match decision {
            Decision::Answer(_) => return,
            Decision::Plug(blocks) => (blocks, true),
            Decision::Unplug(blocks) => (blocks, false),
        };
        for (word, mask) in masks(blocks) {
            let word = &mut self.plugged[word];
            *word = if plug { *word | mask } else { *word & !mask };
        }
        self.count = self.plugged.iter().map(|word| u64::from(word.count_ones())).sum();
    }

    /// The blocks that a request is about, if it is about any that there are.
    fn locate(&self, address: u64, blocks: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.region.start)?;
        let end = offset.checked_add(u64::from(blocks) * self.block_size)?;
        if blocks == 0 || !offset.is_multiple_of(self.block_size) || end > self.region_size() {
            return None;
        }
        Some((offset / self.block_size) as usize..(end / self.block_size) as usize)
    }

    fn state(&self, blocks: &Range<usize>) -> State {
        let mut words = masks(blocks).map(|(word, mask)| (self.plugged[word] & mask, mask));
        if words.clone().all(|(plugged, mask)| plugged == mask) {
            State::Plugged
        } else if words.all(|(plugged, _)| plugged == 0) {
            State::Unplugged
        } else {
            State::Mixed
        }
    }
}

/// The words of a map of bits that hold the bits `bits`, and which of their bits are among them.
fn masks(bits: &Range<usize>) -> impl Iterator<Item = (usize, u64)> + Clone + use<> {
    let Range { start, end } = *bits;
    (start / WORD..end.div_ceil(WORD)).map(move |word| {
        let first = start.max(word * WORD) - word * WORD;
        let last = end.min((word + 1) * WORD) - word * WORD;
        // At least one bit and at most all.
        (word, (u64::MAX >> (WORD - (last - first))) << first)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const REGION: Range<u64> = 1 << 32..(1 << 32) + 200 * 2 * MIB;

    fn blocks(requested: u64) -> Blocks {
        Blocks::new(2 * MIB, REGION, requested)
    }

    fn carry_out(blocks: &mut Blocks, request: Request) -> Decision {
        let decision = blocks.decide(request);
        blocks.done(&decision);
        decision
    }

    fn plug(block: u64, blocks: u16) -> Request {
        Request::Plug {
            address: REGION.start + block * 2 * MIB,
            blocks,
        }
    }

    fn unplug(block: u64, blocks: u16) -> Request {
        Request::Unplug {
            address: REGION.start + block * 2 * MIB,
            blocks,
        }
    }

    fn state(block: u64, blocks: u16) -> Request {
        Request::State {
            address: REGION.start + block * 2 * MIB,
            blocks,
        }
    }

    #[test]
    fn requests_are_read_and_responses_written_as_the_standard_has_them() {
        let mut bytes = [0xff; Request::BYTES];
        bytes[..2].copy_from_slice(&[1, 0]);
        bytes[8..18].copy_from_slice(&[0, 0, 0x20, 0, 1, 0, 0, 0, 3, 1]);
        let expected = Request::Unplug {
            address: 0x1_0020_0000,
            blocks: 259,
        };
        assert_eq!(Request::parse(&bytes), expected);
        bytes[0] = 4;
        assert_eq!(Request::parse(&bytes), Request::Unknown);
        assert_eq!(Response::Nack.bytes(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Response::AckState(State::Mixed).bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }

    #[test]
    fn blocks_are_plugged_up_to_what_is_requested() {
        let mut blocks = blocks(100 * 2 * MIB);
        assert_eq!(carry_out(&mut blocks, plug(60, 10)), Decision::Plug(60..70));
        assert_eq!(blocks.plugged_size(), 20 * MIB);
        assert_eq!(blocks.decide(plug(0, 60)), Decision::Plug(0..60));
        assert_eq!(blocks.decide(plug(80, 90)), Decision::Plug(80..170));
        assert_eq!(blocks.decide(plug(80, 91)), Decision::Answer(Response::Nack));
        assert_eq!(blocks.decide(plug(69, 2)), Decision::Answer(Response::Error));
        assert_eq!(blocks.decide(plug(60, 1)), Decision::Answer(Response::Error));
    }

    #[test]
    fn less_may_always_be_plugged() {
        let mut blocks = blocks(100 * 2 * MIB);
        carry_out(&mut blocks, plug(60, 10));
        blocks.request(200 * 2 * MIB);
        assert_eq!(blocks.decide(unplug(59, 2)), Decision::Answer(Response::Error));
        assert_eq!(blocks.decide(unplug(10, 1)), Decision::Answer(Response::Error));
        assert_eq!(carry_out(&mut blocks, unplug(65, 5)), Decision::Unplug(65..70));
        assert_eq!(blocks.plugged_size(), 10 * MIB);
        assert_eq!(carry_out(&mut blocks, Request::UnplugAll), Decision::Unplug(0..200));
        assert_eq!(blocks.plugged_size(), 0);
        assert_eq!(blocks.decide(Request::UnplugAll), Decision::Answer(Response::Ack));
    }

    #[test]
    fn states_are_told() {
        let mut blocks = blocks(100 * 2 * MIB);
        carry_out(&mut blocks, plug(60, 10));
        let told = |request| blocks.decide(request);
        assert_eq!(
            told(state(60, 10)),
            Decision::Answer(Response::AckState(State::Plugged))
        );
        assert_eq!(
            told(state(0, 60)),
            Decision::Answer(Response::AckState(State::Unplugged))
        );
        assert_eq!(told(state(59, 2)), Decision::Answer(Response::AckState(State::Mixed)));
    }

    #[test]
    fn what_is_not_a_row_of_blocks_is_an_error() {
        let blocks = blocks(100 * 2 * MIB);
        let at = |address, count| Request::Plug { address, blocks: count };
        for request in [
            plug(0, 0),
            at(REGION.start + MIB, 1),
            at(REGION.start - 2 * MIB, 1),
            at(REGION.end, 1),
            plug(199, 2),
            plug(0, u16::MAX),
            at(u64::MAX - (2 * MIB - 1), 1),
            at(u64::MAX - (2 * MIB - 1), u16::MAX),
            at(0, 1),
            Request::Unknown,
        ] {
            assert_eq!(blocks.decide(request), Decision::Answer(Response::Error), "{request:?}");
        }
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            4 => (0u64..210, 0u16..80).prop_map(|(block, count)| plug(block, count)),
            3 => (0u64..210, 0u16..80).prop_map(|(block, count)| unplug(block, count)),
            2 => (0u64..210, 0u16..80).prop_map(|(block, count)| state(block, count)),
            1 => Just(Request::UnplugAll),
            1 => any::<[u8; Request::BYTES]>().prop_map(|bytes| Request::parse(&bytes)),
        ]
    }

    proptest! {
        /// The map of bits does what a set of blocks would do.
        #[test]
        fn the_map_is_a_set(requests in prop::collection::vec((request(), 0u64..=200), 0..60)) {
            let mut blocks = blocks(0);
            let mut model = [false; 200];
            for (request, requested) in requests {
                blocks.request(requested * 2 * MIB);
                let before = model.iter().filter(|plugged| **plugged).count();
                let decision = carry_out(&mut blocks, request);
                match &decision {
                    Decision::Plug(range) => {
                        prop_assert!(model[range.clone()].iter().all(|plugged| !plugged));
                        prop_assert!(before + range.len() <= requested as usize);
                        model[range.clone()].fill(true);
                    }
                    Decision::Unplug(range) => {
                        prop_assert!(request == Request::UnplugAll || model[range.clone()].iter().all(|plugged| *plugged));
                        model[range.clone()].fill(false);
                    }
                    Decision::Answer(Response::AckState(told)) => {
                        let Request::State { address, blocks: count } = request else { panic!("{request:?}") };
                        let first = ((address - REGION.start) / (2 * MIB)) as usize;
                        let row = &model[first..first + usize::from(count)];
                        let plugged = row.iter().filter(|plugged| **plugged).count();
                        let expected = match plugged {
                            0 => State::Unplugged,
                            n if n == row.len() => State::Plugged,
                            _ => State::Mixed,
                        };
                        prop_assert_eq!(*told, expected);
                    }
                    Decision::Answer(_) => {}
                }
                prop_assert_eq!(blocks.plugged_size(), model.iter().filter(|p| **p).count() as u64 * 2 * MIB);
                prop_assert!(blocks.plugged_size() <= blocks.region_size());
            }
        }
    }
}
