//! The host's side against an agent that says anything.

use proptest::prelude::*;

use super::*;

fn command() -> Operation {
    Operation::Exec(Command {
        arguments: vec![b"cat".to_vec()],
        ..Command::default()
    })
}

fn hello() -> ToHost {
    ToHost::Hello {
        version: VERSION,
        software: "agent".into(),
    }
}

fn events(client: &mut Client, messages: &[ToHost]) -> Result<Vec<Event>, ClientError> {
    let mut events = Vec::new();
    for message in messages {
        client.receive(&message.encode());
        while let Some(event) = client.next_event()? {
            events.push(event);
        }
    }
    Ok(events)
}

/// What the client said since the last call.
fn said(client: &mut Client) -> Vec<ToAgent> {
    let mut decoder = Decoder::default();
    decoder.push(client.outgoing());
    let mut messages = Vec::new();
    while let Some(message) = decoder.take().unwrap() {
        messages.push(message);
    }
    let count = client.outgoing().len();
    client.sent(count);
    messages
}

#[test]
fn a_program_gets_no_more_input_than_it_has_room_for() {
    let mut client = Client::new(command()).unwrap();
    assert_eq!(client.write(b"too early"), 0);
    assert_eq!(events(&mut client, &[hello(), ToHost::Go]).unwrap()[1], Event::Started);
    said(&mut client);
    let mut written = 0;
    loop {
        let count = client.write(&[7; 50_000]);
        if count == 0 {
            break;
        }
        written += count;
        said(&mut client);
    }
    assert_eq!(written, WINDOW);
    assert_eq!(events(&mut client, &[ToHost::Taken(10)]).unwrap(), [Event::Room]);
    assert_eq!(client.write(&[7; 50]), 10);
    client.signal(15);
    client.end_input();
    client.end_input();
    assert_eq!(
        said(&mut client),
        [ToAgent::Data(vec![7; 10]), ToAgent::Signal(15), ToAgent::End]
    );
    let more = events(&mut client, &[ToHost::Taken(WINDOW as u32 + 1)]);
    assert_eq!(more, Err(ClientError::Turn("more room than there was input")));
}

#[test]
fn input_that_ends_before_the_start_ends_after_it() {
    let mut client = Client::new(command()).unwrap();
    client.end_input();
    assert!(!said(&mut client).contains(&ToAgent::End));
    events(&mut client, &[hello(), ToHost::Go]).unwrap();
    assert_eq!(said(&mut client), [ToAgent::End]);
}

#[test]
fn a_file_that_is_shorter_than_it_claims_is_noticed() {
    let get = Operation::Get {
        path: b"/file".to_vec(),
    };
    let mut client = Client::new(get).unwrap();
    let file = ToHost::File { size: 3, mode: 0o644 };
    let data = ToHost::Data(b"abc".to_vec());
    let wrong = events(&mut client, &[hello(), file, data, ToHost::Finished { size: 4 }]);
    assert_eq!(wrong, Err(ClientError::Turn("the end of a file")));
}

#[test]
fn another_version_and_an_early_end_are_errors() {
    let mut client = Client::new(Operation::Greet).unwrap();
    assert_eq!(client.closed(), Err(ClientError::Ended));
    let later = ToHost::Hello {
        version: 2,
        software: String::new(),
    };
    assert_eq!(events(&mut client, &[later]), Err(ClientError::Version(2)));
    let mut client = Client::new(Operation::Greet).unwrap();
    events(&mut client, &[hello()]).unwrap();
    assert_eq!((client.is_over(), client.closed()), (true, Ok(())));
}

#[test]
fn operations_that_no_agent_would_take_are_refused_here() {
    let exec = |arguments: &[&[u8]], environment: &[&[u8]], directory: &[u8]| {
        let list = |items: &[&[u8]]| items.iter().map(|item| item.to_vec()).collect();
        Client::new(Operation::Exec(Command {
            arguments: list(arguments),
            environment: list(environment),
            directory: directory.to_vec(),
            terminal: None,
        }))
        .err()
    };
    assert_eq!(exec(&[b"ls"], &[b"A=1", b"B="], b"/tmp"), None);
    assert_eq!(exec(&[], &[], b""), Some(BadOperation::Arguments));
    assert_eq!(exec(&[b""], &[], b""), Some(BadOperation::Arguments));
    assert_eq!(exec(&[b"ls", b"a\0b"], &[], b""), Some(BadOperation::Arguments));
    assert_eq!(exec(&[b"ls"], &[b"=1"], b""), Some(BadOperation::Environment));
    assert_eq!(exec(&[b"ls"], &[], b"tmp"), Some(BadOperation::Path));
    let path = vec![b'/'; PATH_MAX + 1];
    assert_eq!(Client::new(Operation::Get { path }).err(), Some(BadOperation::Path));
}

fn operations() -> impl Strategy<Value = Operation> {
    let path = || b"/x".to_vec();
    prop::sample::select(vec![
        Operation::Greet,
        Operation::Put { path: path(), mode: 0 },
        Operation::Get { path: path() },
        command(),
    ])
}

fn messages() -> impl Strategy<Value = Vec<ToHost>> {
    let message = prop_oneof![
        Just(hello()),
        Just(ToHost::Go),
        Just(ToHost::File { size: 2, mode: 0 }),
        Just(ToHost::Data(vec![1])),
        Just(ToHost::Output(vec![1])),
        Just(ToHost::Errors(vec![1])),
        (0u32..10).prop_map(ToHost::Taken),
        (0u64..3).prop_map(|size| ToHost::Finished { size }),
        Just(ToHost::Exited(1)),
        Just(ToHost::Killed(9)),
        Just(ToHost::Failed {
            kind: ErrorKind::Other,
            message: String::new()
        }),
    ];
    // Most sequences begin well, so that there is something to go wrong later.
    (any::<bool>(), prop::collection::vec(message, 0..12)).prop_map(|(well, mut messages)| {
        if well {
            messages.splice(0..0, [hello(), ToHost::Go]);
        }
        messages
    })
}

proptest! {
    /// Whatever an agent says: there is at most one last event, it comes last, and nothing grows beyond its bounds.
    #[test]
    fn an_operation_ends_once(operation in operations(), messages in messages()) {
        let mut client = Client::new(operation.clone()).unwrap();
        let mut last = false;
        for message in messages {
            prop_assert!(client.outgoing().len() <= 2 * UNSENT_MAX);
            client.write(&[0; 100]);
            client.receive(&message.encode());
            match client.next_event() {
                Err(_) => return Ok(()),
                Ok(None) => prop_assert!(last),
                Ok(Some(event)) => {
                    prop_assert!(!last, "{event:?} after the last");
                    last = matches!(
                        event,
                        Event::Finished { .. } | Event::Exited(_) | Event::Killed(_) | Event::Failed { .. }
                    ) || operation == Operation::Greet;
                }
            }
            prop_assert_eq!(client.is_over(), last);
        }
    }
}
