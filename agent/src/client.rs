//! The host's side of one operation: a state machine without I/O, over a stream that its user moves the bytes of.
//!
//! ```text
//!   [greeting] --Hello--> [asked] --Go, File--> [under way] --Finished, Exited, Killed, Failed--> [over]
//!        '-------------------'-----------------------'--- breaks the protocol, or the stream ends: ClientError
//! ```
//!
//! ```text
//!   loop { write client.outgoing() to the stream, client.sent(n);
//!          read from the stream, client.receive(bytes); while let Some(event) = client.next_event()? { ... } }
//! ```
//!
//! The agent may be hostile: what it sends is bounded frame by frame, and what it sends out of turn ends the operation. Backpressure is the
//! stream's: who does not take events does not read, and then the agent does not send. Input (of a file or a program) goes the same way:
//! [`Client::write`] takes no more than there is room for.

use crate::protocol::{
    Command, DATA_MAX, Decoder, ErrorKind, FRAME_HEADER, FRAME_MAX, LIST_BYTES_MAX, LIST_MAX, Malformed, Message,
    PATH_MAX, Terminal, ToAgent, ToHost, VERSION, WINDOW,
};

/// Bytes of unsent data above which no more is taken.
const UNSENT_MAX: usize = 128 << 10;

/// What to do in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Learn whether the agent is there.
    Greet,
    /// Make a file of what [`Client::write`] is given.
    Put {
        /// Absolute, at most [`PATH_MAX`] bytes.
        path: Vec<u8>,
        /// Permission bits of a file that is new; 0: 0644.
        mode: u32,
    },
    /// Send a file.
    Get {
        /// Absolute, at most [`PATH_MAX`] bytes.
        path: Vec<u8>,
    },
    /// Run a program, whose input [`Client::write`] is given.
    Exec(Command),
}

/// Why an operation cannot be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadOperation {
    /// Not absolute, too long, or with a zero byte.
    #[error("a path has to be absolute, of at most {PATH_MAX} bytes and without a zero byte")]
    Path,
    /// No arguments, or too many.
    #[error(
        "a program and its arguments are 1 to {LIST_MAX}, together at most {LIST_BYTES_MAX} bytes, without zero bytes"
    )]
    Arguments,
    /// Too many variables, or one without `=`.
    #[error(
        "an environment is at most {LIST_MAX} times NAME=VALUE, together at most {LIST_BYTES_MAX} bytes, without zero bytes"
    )]
    Environment,
}

impl Operation {
    /// Checks it.
    ///
    /// # Errors
    ///
    /// [`BadOperation`].
    pub fn check(&self) -> Result<(), BadOperation> {
        match self {
            Self::Greet => Ok(()),
            Self::Put { path, .. } | Self::Get { path } => check_path(path),
            Self::Exec(command) => {
                if !command.directory.is_empty() {
                    check_path(&command.directory)?;
                }
                let fits = |list: &[Vec<u8>]| {
                    list.len() <= LIST_MAX
                        && list.iter().map(Vec::len).sum::<usize>() <= LIST_BYTES_MAX
                        && list.iter().all(|item| !item.contains(&0))
                };
                let named = |variable: &Vec<u8>| variable.iter().position(|&byte| byte == b'=') > Some(0);
                let program = command.arguments.first().is_some_and(|program| !program.is_empty());
                if !program || !fits(&command.arguments) {
                    Err(BadOperation::Arguments)
                } else if !fits(&command.environment) || !command.environment.iter().all(named) {
                    Err(BadOperation::Environment)
                } else {
                    Ok(())
                }
            }
        }
    }

    fn request(&self) -> Option<ToAgent> {
        match self.clone() {
            Self::Greet => None,
            Self::Put { path, mode } => Some(ToAgent::Put { path, mode }),
            Self::Get { path } => Some(ToAgent::Get { path }),
            Self::Exec(command) => Some(ToAgent::Exec(command)),
        }
    }
}

/// Whether `path` is one that both sides take.
pub(crate) fn check_path(path: &[u8]) -> Result<(), BadOperation> {
    if path.first() == Some(&b'/') && path.len() <= PATH_MAX && !path.contains(&0) {
        Ok(())
    } else {
        Err(BadOperation::Path)
    }
}

/// Something that happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The agent is there: what it says that it is, for people.
    Hello(String),
    /// The file can be written, or the program runs. From now on [`Client::write`] takes input.
    Started,
    /// The file is there, and its contents follow.
    File {
        /// Bytes that it had when it was opened.
        size: u64,
        /// Permission bits.
        mode: u32,
    },
    /// A piece of the file, at most [`DATA_MAX`] bytes.
    Data(Vec<u8>),
    /// A piece of standard output, or of what is on the terminal.
    Output(Vec<u8>),
    /// A piece of standard error.
    Errors(Vec<u8>),
    /// There is room for input again.
    Room,
    /// The file was put or sent whole. The last event.
    Finished {
        /// Its bytes.
        size: u64,
    },
    /// The program ended with this status. The last event.
    Exited(u8),
    /// A signal killed the program. The last event.
    Killed(u8),
    /// The agent could not do it. The last event.
    Failed {
        /// Why.
        kind: ErrorKind,
        /// Why, for a person.
        message: String,
    },
}

/// Why an operation ended without a last event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The agent does not speak the protocol.
    #[error("the agent sent {0}")]
    Malformed(#[from] Malformed),
    /// It speaks another version.
    #[error("the agent speaks version {0} of the protocol, and version {VERSION} is needed")]
    Version(u16),
    /// It sent something when it was not its turn.
    #[error("the agent sent {0} out of turn")]
    Turn(&'static str),
    /// The guest, its agent or the connection went away.
    #[error("the connection to the guest's agent ended")]
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    Asked,
    UnderWay,
    Over,
}

/// See the module's head.
pub struct Client {
    operation: Operation,
    state: State,
    decoder: Decoder,
    outgoing: Vec<u8>,
    /// Bytes of input that the agent has room for; of a file, the stream's alone.
    credit: usize,
    /// No more input comes.
    ended: bool,
    /// Bytes of the file that came.
    received: u64,
}

impl Client {
    /// Begins `operation`.
    ///
    /// # Errors
    ///
    /// [`BadOperation`].
    pub fn new(operation: Operation) -> Result<Self, BadOperation> {
        operation.check()?;
        let hello = ToAgent::Hello {
            version: VERSION,
            software: concat!("sepal ", env!("CARGO_PKG_VERSION")).into(),
        };
        let mut outgoing = hello.encode();
        outgoing.extend(operation.request().into_iter().flat_map(|request| request.encode()));
        Ok(Self {
            credit: if matches!(operation, Operation::Exec(_)) {
                WINDOW
            } else {
                usize::MAX
            },
            operation,
            state: State::Greeting,
            decoder: Decoder::default(),
            outgoing,
            ended: false,
            received: 0,
        })
    }

    /// Bytes for the agent; tell [`sent`](Self::sent) how many of them went.
    pub fn outgoing(&self) -> &[u8] {
        &self.outgoing
    }

    /// The first `count` bytes of [`outgoing`](Self::outgoing) are on their way.
    pub fn sent(&mut self, count: usize) {
        self.outgoing.drain(..count.min(self.outgoing.len()));
    }

    /// Takes bytes from the agent. Take all events before the next call.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// The most bytes that are worth reading at once.
    pub const READ: usize = FRAME_MAX + FRAME_HEADER;

    /// The next event; `None`: more has to be received.
    ///
    /// # Errors
    ///
    /// [`ClientError`]: the operation is over, and the stream of no use.
    pub fn next_event(&mut self) -> Result<Option<Event>, ClientError> {
        if self.is_over() {
            return Ok(None);
        }
        match self.decoder.take()? {
            Some(message) => self.take(message).map(Some),
            None => Ok(None),
        }
    }

    /// Whether the last event was given out.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// The stream ended.
    ///
    /// # Errors
    ///
    /// [`ClientError::Ended`], unless the operation was over.
    pub fn closed(&self) -> Result<(), ClientError> {
        if self.is_over() {
            Ok(())
        } else {
            Err(ClientError::Ended)
        }
    }

    /// Takes input: returns how many of `bytes` there was room for, from the first on. After less than all, there is room again when
    /// [`outgoing`](Self::outgoing) has been sent or [`Event::Room`] came.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let takes_input = matches!(self.operation, Operation::Put { .. } | Operation::Exec(_));
        if !takes_input || self.state != State::UnderWay || self.ended {
            return 0;
        }
        let room = UNSENT_MAX.saturating_sub(self.outgoing.len());
        let count = bytes.len().min(room).min(self.credit);
        for piece in bytes[..count].chunks(DATA_MAX) {
            self.outgoing.extend(ToAgent::Data(piece.to_vec()).encode());
        }
        self.credit -= count;
        count
    }

    /// No more input follows. Before [`Event::Started`] it is remembered.
    pub fn end_input(&mut self) {
        let first = !std::mem::replace(&mut self.ended, true);
        if first && self.state == State::UnderWay {
            self.outgoing.extend(ToAgent::End.encode());
        }
    }

    /// The terminal has another size. Nothing happens to a program without one.
    pub fn resize(&mut self, terminal: Terminal) {
        self.tell(&ToAgent::Resize(terminal));
    }

    /// Sends the program a signal of the guest's numbering.
    pub fn signal(&mut self, number: u8) {
        self.tell(&ToAgent::Signal(number));
    }

    /// Tells a program that runs.
    fn tell(&mut self, message: &ToAgent) {
        let runs = matches!(self.operation, Operation::Exec(_)) && self.state == State::UnderWay;
        // A stream that takes nothing has no need to be told over and over.
        if runs && self.outgoing.len() < UNSENT_MAX {
            self.outgoing.extend(message.encode());
        }
    }

    /// What a message of the agent means.
    fn take(&mut self, message: ToHost) -> Result<Event, ClientError> {
        use {Operation as O, State as S};
        Ok(match (self.state, &self.operation, message) {
            (S::Greeting, operation, ToHost::Hello { version, software }) => {
                if version != VERSION {
                    return Err(ClientError::Version(version));
                }
                self.state = if *operation == O::Greet { S::Over } else { S::Asked };
                Event::Hello(software)
            }
            (S::Greeting | S::Asked | S::UnderWay, _, ToHost::Failed { kind, message }) => {
                self.state = S::Over;
                Event::Failed { kind, message }
            }
            (S::Asked, O::Put { .. } | O::Exec(_), ToHost::Go) => {
                self.state = S::UnderWay;
                if self.ended {
                    self.outgoing.extend(ToAgent::End.encode());
                }
                Event::Started
            }
            (S::Asked, O::Get { .. }, ToHost::File { size, mode }) => {
                self.state = S::UnderWay;
                Event::File { size, mode }
            }
            (S::UnderWay, O::Get { .. }, ToHost::Data(data)) => {
                self.received += data.len() as u64;
                Event::Data(data)
            }
            (S::UnderWay, O::Get { .. }, ToHost::Finished { size }) if size == self.received => {
                self.state = S::Over;
                Event::Finished { size }
            }
            (S::UnderWay, O::Put { .. }, ToHost::Finished { size }) if self.ended => {
                self.state = S::Over;
                Event::Finished { size }
            }
            (S::UnderWay, O::Exec(_), ToHost::Output(data)) => Event::Output(data),
            (S::UnderWay, O::Exec(_), ToHost::Errors(data)) => Event::Errors(data),
            (S::UnderWay, O::Exec(_), ToHost::Taken(bytes)) => {
                let credit = self.credit.saturating_add(bytes as usize);
                if credit > WINDOW {
                    return Err(ClientError::Turn("more room than there was input"));
                }
                self.credit = credit;
                Event::Room
            }
            (S::UnderWay, O::Exec(_), ToHost::Exited(status)) => {
                self.state = S::Over;
                Event::Exited(status)
            }
            (S::UnderWay, O::Exec(_), ToHost::Killed(signal)) => {
                self.state = S::Over;
                Event::Killed(signal)
            }
            (_, _, message) => return Err(ClientError::Turn(name(&message))),
        })
    }
}

fn name(message: &ToHost) -> &'static str {
    match message {
        ToHost::Hello { .. } => "a greeting",
        ToHost::Go => "a start",
        ToHost::File { .. } => "a file",
        ToHost::Data(_) => "a file's data",
        ToHost::Output(_) | ToHost::Errors(_) => "a program's output",
        ToHost::Taken(_) => "news of a program's input",
        ToHost::Finished { .. } => "the end of a file",
        ToHost::Exited(_) | ToHost::Killed(_) => "a program's end",
        ToHost::Failed { .. } => "a failure",
    }
}

#[cfg(test)]
mod tests;
