//! What is settled with a back end before it serves anything. Pure: replies come in, requests go out.
//!
//! ```text
//!   [features] --no protocol features------------------------------.
//!       |  GET_PROTOCOL_FEATURES                                   |
//!       v                                                          v
//!   [protocol] -- SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG -> [queues] -> [config] -> [done]
//! ```
//!
//! Of the features of rings a back end needs only VIRTIO_F_VERSION_1: the driver is offered what both sides have.
//!
//! A back end that comes after another has to offer whatever was settled with the first, since the driver counts on it.

use super::message::{FEATURE_PROTOCOL, Reply, Request, protocol};
use crate::virtio::feature;

/// Feature bits that say what a device can do; those between are the transport's, or how rings are used (virtio 6).
const DEVICE_FEATURES: u64 = ((1 << 24) - 1) | !((1 << 50) - 1);

/// What was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settled {
    /// Virtio features of the back end, without [`FEATURE_PROTOCOL`].
    pub(super) features: u64,
    /// Whether rings begin disabled and have to be enabled, and there are protocol features.
    pub(super) has_protocol: bool,
    /// Protocol features that are in use.
    pub(super) protocol: u64,
    /// The configuration space, if it was asked for and told.
    pub(super) config: Option<Vec<u8>>,
}

impl Settled {
    /// The virtio features that the device offers to its driver beside the transport's.
    pub(super) fn offered(&self) -> u64 {
        self.features & DEVICE_FEATURES
    }

    /// The features of rings and transport that the device offers. Single queues are taken back by the front end itself.
    pub(super) fn offered_transport(&self) -> u64 {
        feature::TRANSPORT & (self.features | feature::RING_RESET)
    }

    /// Whether all of the protocol features in `bits` are in use.
    pub(super) fn uses(&self, bits: u64) -> bool {
        self.protocol & bits == bits
    }
}

/// Why a back end cannot serve the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It serves drivers from before virtio 1.0 only, whose rings are laid out in another way.
    #[error("it lacks the virtio feature VIRTIO_F_VERSION_1, without which no driver here works")]
    Legacy,
    /// It lacks what the driver counts on since it spoke to the one before.
    #[error("it lacks the virtio features {0:#x}, which the one before had")]
    Features(u64),
    /// It lacks protocol features that are in use since the one before.
    #[error("it lacks the protocol features {0:#x}, which the one before had")]
    Protocol(u64),
    /// It has too few queues.
    #[error("it serves {served} queues, and the device has {queues}")]
    Queues {
        /// Queues that it serves.
        served: u64,
        /// Queues of the device.
        queues: usize,
    },
    /// It said something when it was not its turn.
    #[error("it answered what it was not asked")]
    Turn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Features,
    Protocol,
    Queues,
    Config,
    Done,
}

/// See the module's head.
pub(super) struct Greeting {
    step: Step,
    queues: usize,
    /// Bytes of configuration to ask for; 0: none.
    config_len: usize,
    /// What the one before had.
    required: Option<Settled>,
    settled: Settled,
}

impl Greeting {
    /// A greeting to a back end that is to serve `queues` queues, and to tell `config_len` bytes of configuration; `required` was settled with
    /// the one before. Begins with [`begin`](Self::begin).
    pub(super) fn new(queues: usize, config_len: usize, required: Option<Settled>) -> Self {
        Self {
            step: Step::Features,
            queues,
            config_len,
            required,
            settled: Settled {
                features: 0,
                has_protocol: false,
                protocol: 0,
                config: None,
            },
        }
    }

    /// What to send first.
    pub(super) fn begin(&self) -> Vec<Request> {
        vec![Request::SetOwner, Request::GetFeatures]
    }

    /// What was settled, once nothing is left to ask.
    pub(super) fn done(&self) -> Option<&Settled> {
        (self.step == Step::Done).then_some(&self.settled)
    }

    /// Takes a reply: what to send next.
    ///
    /// # Errors
    ///
    /// [`Refusal`].
    pub(super) fn take(&mut self, reply: Reply) -> Result<Vec<Request>, Refusal> {
        match (self.step, reply) {
            (Step::Features, Reply::Value(features)) => self.take_features(features),
            (Step::Protocol, Reply::Value(offered)) => self.take_protocol(offered),
            (Step::Queues, Reply::Value(served)) => {
                if served < self.queues as u64 {
                    return Err(Refusal::Queues {
                        served,
                        queues: self.queues,
                    });
                }
                self.step = self.after_queues();
                Ok(Vec::new())
            }
            (Step::Config, Reply::Config(bytes)) => {
                self.settled.config = Some(bytes);
                self.step = Step::Done;
                Ok(Vec::new())
            }
            _ => Err(Refusal::Turn),
        }
    }

    fn take_features(&mut self, features: u64) -> Result<Vec<Request>, Refusal> {
        if features & feature::VERSION_1 == 0 {
            return Err(Refusal::Legacy);
        }
        let has_protocol = features & FEATURE_PROTOCOL != 0;
        if let Some(before) = &self.required {
            let missing = before.features & !features;
            if missing != 0 {
                return Err(Refusal::Features(missing));
            }
            if before.has_protocol && !has_protocol {
                return Err(Refusal::Protocol(before.protocol));
            }
        }
        self.settled.features = match &self.required {
            Some(before) => before.features,
            None => features & !FEATURE_PROTOCOL,
        };
        self.settled.has_protocol = has_protocol;
        if has_protocol {
            self.step = Step::Protocol;
            return Ok(vec![Request::GetProtocolFeatures]);
        }
        self.step = Step::Done;
        Ok(Vec::new())
    }

    fn take_protocol(&mut self, offered: u64) -> Result<Vec<Request>, Refusal> {
        let mut chosen = offered & protocol::WANTED;
        if self.config_len == 0 {
            chosen &= !protocol::CONFIG;
        }
        if let Some(before) = &self.required {
            let missing = before.protocol & !chosen;
            if missing != 0 {
                return Err(Refusal::Protocol(missing));
            }
            chosen = before.protocol;
        }
        self.settled.protocol = chosen;
        let mut requests = vec![Request::SetProtocolFeatures(chosen)];
        self.step = self.after_queues();
        if self.step == Step::Config {
            requests.push(Request::GetConfig { len: self.config_len });
        }
        if self.settled.uses(protocol::MQ) {
            self.step = Step::Queues;
            requests.insert(1, Request::GetQueueNum);
        }
        Ok(requests)
    }

    fn after_queues(&self) -> Step {
        if self.settled.uses(protocol::CONFIG) {
            Step::Config
        } else {
            Step::Done
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RINGS: u64 = feature::INDIRECT_DESC | feature::EVENT_IDX | feature::VERSION_1;

    fn features(device: u64) -> Reply {
        Reply::Value(RINGS | FEATURE_PROTOCOL | device)
    }

    #[test]
    fn everything_is_settled_with_a_back_end_that_has_it_all() {
        let mut greeting = Greeting::new(2, 40, None);
        assert_eq!(greeting.begin(), [Request::SetOwner, Request::GetFeatures]);
        let next = greeting.take(features(1 << 5 | 1 << 26 | 1 << 34)).unwrap();
        assert_eq!(next, [Request::GetProtocolFeatures]);
        let next = greeting.take(Reply::Value(u64::MAX)).unwrap();
        assert_eq!(
            next,
            [
                Request::SetProtocolFeatures(protocol::WANTED),
                Request::GetQueueNum,
                Request::GetConfig { len: 40 },
            ]
        );
        assert!(greeting.take(Reply::Value(2)).unwrap().is_empty());
        assert_eq!(greeting.done(), None);
        assert!(greeting.take(Reply::Config(vec![9; 40])).unwrap().is_empty());
        let settled = greeting.done().unwrap();
        assert_eq!(settled.config, Some(vec![9; 40]));
        // Neither logging nor packed rings are the driver's to see.
        assert_eq!(settled.offered(), 1 << 5);
        assert_eq!(settled.offered_transport(), feature::TRANSPORT);
    }

    #[test]
    fn a_simple_back_end_is_settled_with_at_once() {
        let mut greeting = Greeting::new(2, 40, None);
        assert!(greeting.take(Reply::Value(RINGS)).unwrap().is_empty());
        let settled = greeting.done().unwrap();
        assert!(!settled.has_protocol && settled.protocol == 0 && settled.config.is_none());
    }

    #[test]
    fn the_driver_is_offered_what_the_back_end_does_with_rings() {
        for extra in [0, feature::INDIRECT_DESC, feature::EVENT_IDX] {
            let mut greeting = Greeting::new(2, 0, None);
            greeting.take(Reply::Value(feature::VERSION_1 | extra)).unwrap();
            let offered = greeting.done().unwrap().offered_transport();
            assert_eq!(offered, feature::VERSION_1 | feature::RING_RESET | extra);
        }
        let mut greeting = Greeting::new(2, 0, None);
        let refused = greeting.take(Reply::Value(feature::INDIRECT_DESC | feature::EVENT_IDX));
        assert_eq!(refused, Err(Refusal::Legacy));
    }

    #[test]
    fn too_few_queues_are_refused() {
        let mut greeting = Greeting::new(3, 0, None);
        greeting.take(features(0)).unwrap();
        greeting.take(Reply::Value(protocol::MQ)).unwrap();
        let refused = greeting.take(Reply::Value(2));
        assert_eq!(refused, Err(Refusal::Queues { served: 2, queues: 3 }));
    }

    #[test]
    fn the_next_back_end_needs_what_the_first_had_and_gets_no_more() {
        let before = Settled {
            features: RINGS | 1 << 3,
            has_protocol: true,
            protocol: protocol::REPLY_ACK,
            config: None,
        };
        let mut greeting = Greeting::new(1, 0, Some(before.clone()));
        let refused = greeting.take(features(1 << 4));
        assert_eq!(refused, Err(Refusal::Features(1 << 3)));

        let mut greeting = Greeting::new(1, 0, Some(before.clone()));
        greeting.take(features(1 << 3 | 1 << 4)).unwrap();
        let refused = greeting.take(Reply::Value(protocol::MQ));
        assert_eq!(refused, Err(Refusal::Protocol(protocol::REPLY_ACK)));

        let mut greeting = Greeting::new(1, 0, Some(before.clone()));
        greeting.take(features(1 << 3 | 1 << 4)).unwrap();
        let next = greeting.take(Reply::Value(u64::MAX)).unwrap();
        assert_eq!(next, [Request::SetProtocolFeatures(protocol::REPLY_ACK)]);
        assert_eq!(greeting.done(), Some(&before));

        let mut greeting = Greeting::new(1, 0, Some(before));
        let refused = greeting.take(Reply::Value(RINGS | 1 << 3));
        assert_eq!(refused, Err(Refusal::Protocol(protocol::REPLY_ACK)));
    }

    fn replies() -> impl Strategy<Value = Vec<Reply>> {
        let reply = prop_oneof![
            any::<u64>().prop_map(|value| Reply::Value(RINGS | value)),
            any::<u64>().prop_map(Reply::Value),
            prop::collection::vec(any::<u8>(), 0..64).prop_map(Reply::Config),
            Just(Reply::Done),
        ];
        prop::collection::vec(reply, 0..8)
    }

    proptest! {
        /// Whatever a back end says, a device never offers what belongs to the transport, and never uses a protocol feature that was not
        /// offered.
        #[test]
        fn nothing_is_settled_that_was_not_offered(replies in replies(), queues in 1usize..64) {
            let mut greeting = Greeting::new(queues, 8, None);
            for reply in replies {
                if greeting.take(reply).is_err() {
                    return Ok(());
                }
            }
            if let Some(settled) = greeting.done() {
                prop_assert_eq!(settled.offered() & (feature::TRANSPORT | FEATURE_PROTOCOL), 0);
                prop_assert_eq!(settled.protocol & !protocol::WANTED, 0);
                prop_assert_eq!(settled.offered_transport() & !settled.features, feature::RING_RESET & !settled.features);
                prop_assert!(settled.offered_transport() & feature::VERSION_1 != 0);
            }
        }
    }
}
