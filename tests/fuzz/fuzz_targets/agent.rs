//! The host's side of the guest agent's protocol, against a guest that sends anything; and the agent's decoder, against such a host.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_agent::client::{Client, Event, Operation};
use sepal_agent::protocol::{
    Command, DATA_MAX, Decoder, ErrorKind, Message, Terminal, ToAgent, ToHost, VERSION, WINDOW,
};

#[derive(Arbitrary, Debug)]
enum Step {
    Hello,
    Go,
    File { size: u8 },
    Data(Vec<u8>),
    Output(Vec<u8>),
    Taken(u32),
    Finished { size: u8 },
    Exited(u8),
    Failed(String),
    Raw(Vec<u8>),
    Write(u16),
    End,
    Signal(u8),
    Sent(u16),
}

fn message(step: &Step) -> Option<ToHost> {
    Some(match step {
        Step::Hello => ToHost::Hello {
            version: VERSION,
            software: "agent".into(),
        },
        Step::Go => ToHost::Go,
        Step::File { size } => ToHost::File {
            size: u64::from(*size),
            mode: 0,
        },
        Step::Data(data) => ToHost::Data(data.clone()),
        Step::Output(data) => ToHost::Output(data.clone()),
        Step::Taken(bytes) => ToHost::Taken(*bytes),
        Step::Finished { size } => ToHost::Finished { size: u64::from(*size) },
        Step::Exited(status) => ToHost::Exited(*status),
        Step::Failed(message) => ToHost::Failed {
            kind: ErrorKind::Other,
            message: message.clone(),
        },
        _ => return None,
    })
}

fuzz_target!(|input: (u8, Vec<Step>, Vec<u8>)| {
    let (which, steps, raw) = input;
    let path = || b"/file".to_vec();
    let operation = match which % 4 {
        0 => Operation::Greet,
        1 => Operation::Put { path: path(), mode: 0 },
        2 => Operation::Get { path: path() },
        _ => Operation::Exec(Command {
            arguments: vec![b"cat".to_vec()],
            terminal: Some(Terminal { columns: 80, rows: 24 }),
            ..Command::default()
        }),
    };
    let mut client = Client::new(operation).expect("an operation that is possible");
    let mut said = Decoder::default();
    for step in steps {
        match &step {
            Step::Write(count) => drop(client.write(&vec![0; usize::from(*count)])),
            Step::End => client.end_input(),
            Step::Signal(number) => client.signal(*number),
            Step::Sent(count) => {
                let count = client.outgoing().len().min(usize::from(*count));
                said.push(&client.outgoing()[..count]);
                client.sent(count);
                while let Some(_) = said.take::<ToAgent>().expect("the host speaks the protocol") {}
            }
            Step::Raw(bytes) => client.receive(bytes),
            _ => client.receive(&message(&step).expect("a message").encode()),
        }
        assert!(client.outgoing().len() < 4 * WINDOW);
        loop {
            match client.next_event() {
                Err(_) => return,
                Ok(None) => break,
                Ok(Some(Event::Data(bytes) | Event::Output(bytes) | Event::Errors(bytes))) => {
                    assert!(bytes.len() <= DATA_MAX);
                }
                Ok(Some(_)) => {}
            }
        }
    }

    let mut decoder = Decoder::default();
    decoder.push(&raw);
    while let Ok(Some(message)) = decoder.take::<ToAgent>() {
        let bytes = message.encode();
        let mut again = Decoder::default();
        again.push(&bytes);
        assert_eq!(again.take(), Ok(Some(message)));
    }
});
