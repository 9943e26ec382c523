//! Messages as they lie in the protocol's documentation, and replies of all shapes.

use proptest::prelude::*;

use super::*;

#[test]
fn a_request_is_a_header_and_a_payload() {
    assert_eq!(Request::GetFeatures.encode(false), [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        Request::SetVringBase { queue: 2, base: 0x1234 }.encode(true),
        [10, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0x34, 0x12, 0, 0]
    );
    let table = Request::SetMemTable(vec![Region {
        guest: 1,
        size: 2,
        user: 3,
        offset: 4,
    }]);
    let bytes = table.encode(false);
    assert_eq!(bytes.len(), HEADER_BYTES + 8 + 32);
    assert_eq!(
        bytes[HEADER_BYTES..HEADER_BYTES + 16],
        [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn configuration_is_asked_for_with_room_for_it() {
    let bytes = Request::GetConfig { len: 5 }.encode(false);
    assert_eq!(
        bytes[HEADER_BYTES..],
        [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let bytes = Request::SetConfig {
        offset: 32,
        bytes: vec![1],
    }
    .encode(false);
    assert_eq!(bytes[HEADER_BYTES..], [32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
}

fn header(request: u32, flags: u32, size: u32) -> Header {
    Header { request, flags, size }
}

#[test]
fn replies_that_are_none_are_told_apart() {
    let value = Expected::Value;
    assert_eq!(header(1, 5, 8).check(1, value), Ok(8));
    assert_eq!(header(1, 1, 8).check(1, value), Err(BadReply::Flags(1)));
    assert_eq!(header(1, 6, 8).check(1, value), Err(BadReply::Flags(6)));
    assert_eq!(
        header(2, 5, 8).check(1, value),
        Err(BadReply::Request { got: 2, wanted: 1 })
    );
    assert_eq!(header(1, 5, 9).check(1, value), Err(BadReply::Size(9)));
    let config = Expected::Config { len: 8 };
    assert_eq!(header(24, 5, u32::MAX).check(24, config), Err(BadReply::Size(u32::MAX)));
    assert_eq!(header(24, 5, 20).check(24, config), Ok(20));
    assert_eq!(
        Reply::decode(Expected::Ack, &7u64.to_le_bytes()),
        Err(BadReply::Refused(7))
    );
    assert_eq!(Reply::decode(config, &[]), Err(BadReply::NoConfig));
    let mut payload = vec![0; 20];
    assert_eq!(Reply::decode(config, &payload), Err(BadReply::Fields));
    payload[4] = 8;
    assert_eq!(Reply::decode(config, &payload), Ok(Reply::Config(vec![0; 8])));
}

fn expected() -> impl Strategy<Value = Expected> {
    prop_oneof![
        Just(Expected::Value),
        Just(Expected::VringState),
        Just(Expected::Ack),
        Just(Expected::Inflight),
        (1..=CONFIG_MAX).prop_map(|len| Expected::Config { len }),
    ]
}

proptest! {
    /// A header that passes never announces more than there is room for, and its payload can be read whatever it holds.
    #[test]
    fn no_reply_is_longer_than_its_request_calls_for(
        bytes in any::<[u8; HEADER_BYTES]>(),
        size in 0u32..300,
        wanted in 0u32..40,
        expected in expected(),
        payload in prop::collection::vec(any::<u8>(), PAYLOAD_MAX),
    ) {
        let raw = Header::decode(bytes);
        for header in [raw, header(wanted, VERSION | REPLY, size)] {
            if let Ok(len) = header.check(wanted, expected) {
                prop_assert!(len <= PAYLOAD_MAX);
                if let Ok(Reply::Config(config)) = Reply::decode(expected, &payload[..len]) {
                    prop_assert_eq!(Expected::Config { len: config.len() }, expected);
                }
            }
        }
    }
}
