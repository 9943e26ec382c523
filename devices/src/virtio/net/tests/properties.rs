//! Whatever buffers the driver gives, in whatever order things happen: frames arrive whole and in order.

use proptest::prelude::*;

use super::*;

/// What may happen.
#[derive(Clone, Debug)]
enum Step {
    /// The driver gives a chain of buffers of these lengths.
    Give(Vec<u32>),
    /// A frame of so many bytes comes.
    Come(usize),
    /// The driver sends a frame of so many bytes, in so many pieces.
    Send(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => proptest::collection::vec(prop_oneof![12u32..200, 1500u32..2100], 1..4).prop_map(Step::Give),
        2 => (14usize..1500).prop_map(Step::Come),
        1 => (14usize..3000, 1usize..6).prop_map(|(len, pieces)| Step::Send(len, pieces)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn frames_arrive_whole_and_in_order(steps in proptest::collection::vec(step(), 1..60), event_idx: bool) {
        let (net, handle, mut peer) = net();
        let mut rig = Rig::new(net);
        let features = if event_idx { u64::MAX } else { !crate::virtio::feature::EVENT_IDX };
        rig.activate(features).unwrap();
        let (mut came, mut sent, mut number) = (Vec::new(), Vec::new(), 0);
        let mut chains = Vec::new();
        for step in steps {
            number += 1;
            match step {
                Step::Give(lens) => {
                    let lens: Vec<Buffer> = lens.into_iter().map(Buffer::In).collect();
                    rig.add(RX, &lens);
                    rig.kick(RX);
                }
                Step::Come(len) => {
                    peer.send(&frame(number, len));
                    came.push(frame(number, len));
                    rig.settle().unwrap();
                }
                Step::Send(len, pieces) => {
                    let whole = [&[0; HEADER][..], &frame(number, len)].concat();
                    let pieces: Vec<_> =
                        whole.chunks(whole.len().div_ceil(pieces)).map(|piece| Buffer::Out(piece.to_vec())).collect();
                    rig.add(TX, &pieces);
                    rig.kick(TX);
                    sent.push(frame(number, len));
                }
            }
            chains.extend(given_back(&mut rig, RX));
            given_back(&mut rig, TX);
        }
        // Room for all that still waits.
        for _ in 0..2 * came.len() {
            give(&mut rig, 1, 2048);
            chains.extend(given_back(&mut rig, RX));
        }
        prop_assert_eq!(merged(chains), came);
        let out: Vec<_> = std::iter::from_fn(|| peer.receive()).collect();
        prop_assert_eq!(out, sent);
        let stats = handle.stats();
        prop_assert_eq!((stats.received.dropped, stats.received.errors, stats.sent.errors), (0, 0, 0));
    }
}
