//! Every message survives its frame, and no bytes do harm.

use proptest::prelude::*;

use super::*;

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..most)
}

fn terminal() -> impl Strategy<Value = Terminal> {
    any::<(u16, u16)>().prop_map(|(columns, rows)| Terminal { columns, rows })
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    let list = || prop::collection::vec(bytes(40), 0..20);
    let command = (list(), list(), bytes(100), prop::option::of(terminal())).prop_map(
        |(arguments, environment, directory, terminal)| Command {
            arguments,
            environment,
            directory,
            terminal,
        },
    );
    prop_oneof![
        (any::<u16>(), "\\PC{0,60}").prop_map(|(version, software)| ToAgent::Hello { version, software }),
        (bytes(200), any::<u32>()).prop_map(|(path, mode)| ToAgent::Put { path, mode }),
        bytes(200).prop_map(|path| ToAgent::Get { path }),
        command.prop_map(ToAgent::Exec),
        bytes(500).prop_map(ToAgent::Data),
        Just(ToAgent::End),
        terminal().prop_map(ToAgent::Resize),
        any::<u8>().prop_map(ToAgent::Signal),
    ]
}

fn to_host() -> impl Strategy<Value = ToHost> {
    let kind = prop::sample::select(ErrorKind::ALL.to_vec());
    prop_oneof![
        (any::<u16>(), "\\PC{0,60}").prop_map(|(version, software)| ToHost::Hello { version, software }),
        Just(ToHost::Go),
        any::<(u64, u32)>().prop_map(|(size, mode)| ToHost::File { size, mode }),
        bytes(500).prop_map(ToHost::Data),
        bytes(500).prop_map(ToHost::Output),
        bytes(500).prop_map(ToHost::Errors),
        any::<u32>().prop_map(ToHost::Taken),
        any::<u64>().prop_map(|size| ToHost::Finished { size }),
        any::<u8>().prop_map(ToHost::Exited),
        any::<u8>().prop_map(ToHost::Killed),
        (kind, "\\PC{0,60}").prop_map(|(kind, message)| ToHost::Failed { kind, message }),
    ]
}

/// Encodes `messages`, cuts the bytes into pieces of `cut`, and decodes them.
fn through<M: Message>(messages: &[M], cut: usize) -> Vec<M> {
    let stream: Vec<u8> = messages.iter().flat_map(Message::encode).collect();
    let mut decoder = Decoder::default();
    let mut decoded = Vec::new();
    for piece in stream.chunks(cut) {
        decoder.push(piece);
        while let Some(message) = decoder.take().unwrap() {
            decoded.push(message);
        }
    }
    assert!(decoder.is_empty());
    decoded
}

/// Whether a stream of these bytes, read like a hostile one, ends without a panic and without being kept.
fn survives<M: Message>(stream: &[u8]) {
    let mut decoder = Decoder::default();
    for piece in stream.chunks(1000) {
        decoder.push(piece);
        loop {
            match decoder.take::<M>() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(decoder.bytes.len() <= FRAME_MAX + 4 + 1000);
    }
}

proptest! {
    #[test]
    fn messages_survive_their_frames(agent in prop::collection::vec(to_agent(), 0..8), host in prop::collection::vec(to_host(), 0..8), cut in 1usize..900) {
        prop_assert_eq!(through(&agent, cut), agent);
        prop_assert_eq!(through(&host, cut), host);
    }

    #[test]
    fn no_bytes_do_harm(kind in 0u8..12, fields in bytes(300), stream in bytes(3000)) {
        let _ = ToAgent::decode(kind, &fields);
        let _ = ToHost::decode(kind, &fields);
        survives::<ToAgent>(&stream);
        survives::<ToHost>(&stream);
    }

    #[test]
    fn a_frame_whose_end_is_missing_or_whose_bytes_are_too_many_is_none(message in to_agent(), change in 1usize..20) {
        let frame = message.encode();
        let fields = &frame[FRAME_HEADER..];
        let longer = [fields, &vec![0; change]].concat();
        let shorter = &fields[..fields.len().saturating_sub(change)];
        if !matches!(message, ToAgent::Data(_)) {
            prop_assert!(ToAgent::decode(frame[4], &longer).is_err());
            prop_assert!(fields.is_empty() || ToAgent::decode(frame[4], shorter).is_err());
        }
    }
}

#[test]
fn limits_are_kept() {
    let mut decoder = Decoder::default();
    decoder.push(&(FRAME_MAX as u32 + 1).to_le_bytes());
    assert_eq!(decoder.take::<ToHost>(), Err(Malformed::Length(FRAME_MAX as u32 + 1)));
    let mut decoder = Decoder::default();
    decoder.push(&[0; 4]);
    assert_eq!(decoder.take::<ToHost>(), Err(Malformed::Length(0)));

    let refused = |message: &ToAgent| {
        let frame = message.encode();
        ToAgent::decode(frame[4], &frame[FRAME_HEADER..]).is_err()
    };
    assert!(refused(&ToAgent::Get {
        path: vec![b'/'; PATH_MAX + 1]
    }));
    assert!(refused(&ToAgent::Data(vec![0; DATA_MAX + 1])));
    let command = |arguments| {
        ToAgent::Exec(Command {
            arguments,
            ..Command::default()
        })
    };
    assert!(refused(&command(vec![Vec::new(); LIST_MAX + 1])));
    assert!(refused(&command(vec![vec![b'x'; LIST_BYTES_MAX + 1]])));
    // The largest there is fits into a frame.
    let full = vec![vec![b'x'; LIST_BYTES_MAX / LIST_MAX]; LIST_MAX];
    let largest = ToAgent::Exec(Command {
        arguments: full.clone(),
        environment: full,
        directory: vec![b'/'; PATH_MAX],
        terminal: Some(Terminal { columns: 1, rows: 1 }),
    });
    assert_eq!(through(std::slice::from_ref(&largest), 5000), [largest]);
}

#[test]
fn what_is_no_agent_is_told_apart() {
    let mut decoder = Decoder::default();
    let hello = ToHost::Hello {
        version: VERSION,
        software: "x".repeat(5000),
    };
    decoder.push(&hello.encode());
    let cut = ToHost::Hello {
        version: VERSION,
        software: "x".repeat(TEXT_MAX),
    };
    assert_eq!(decoder.take(), Ok(Some(cut)));
    decoder.push(&[8, 0, 0, 0, 0, b'S', b'S', b'H', b'-', 2, 0, 0]);
    assert_eq!(decoder.take::<ToHost>(), Err(Malformed::Magic));
}
