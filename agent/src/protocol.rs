//! What host and agent say to each other: frames over a stream, one operation a stream. Pure.
//!
//! ```text
//!   host: Hello, then Put | Get | Exec        agent: Hello
//!   Put:  Data* End                           Go, Finished       or at any time Failed, which ends the operation
//!   Get:                                      File, Data*, Finished
//!   Exec: Data* End, Resize, Signal, any time Go, (Output | Errors | Taken)*, Exited | Killed
//! ```
//!
//! A frame is the length of what follows (32 bits), its type (8 bits) and its fields. Numbers are little-endian; a text or a string of bytes is its
//! length (32 bits) and its bytes. `Data` of an Exec is the program's input: at most [`WINDOW`] bytes more than `Taken` has confirmed, so that what
//! comes after it never waits for a program that does not read.

/// Port (vsock) on which the agent listens in the guest, and on which the host may listen to hear that it is ready.
pub const PORT: u32 = 1024;
/// Version of the protocol. A side that hears another one ends the connection.
pub const VERSION: u16 = 1;
/// First bytes of a Hello.
const MAGIC: [u8; 4] = *b"sepa";

/// Most bytes of data in one frame.
pub const DATA_MAX: usize = 64 << 10;
/// Most bytes of a frame after its length: enough for the largest Exec.
pub const FRAME_MAX: usize = 160 << 10;
/// Bytes of a frame before its fields: length and type.
pub const FRAME_HEADER: usize = 5;
/// Bytes of input that a program's host may send ahead of what the program took.
pub const WINDOW: usize = 256 << 10;
/// Most bytes of a path.
pub const PATH_MAX: usize = 4095;
/// Most arguments of a program, and most variables of its environment.
pub const LIST_MAX: usize = 1024;
/// Most bytes of all arguments together, and of all variables.
pub const LIST_BYTES_MAX: usize = 64 << 10;
/// Most bytes of a message for a person, and of a software's name.
pub const TEXT_MAX: usize = 512;

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Something that fits no other.
    Other,
    /// The file, the program or the folder is not there.
    NotFound,
    /// The agent may not.
    PermissionDenied,
    /// No space is left.
    NoSpace,
    /// A folder, a device or the like where a file is needed.
    NotAFile,
    /// The request makes no sense: a relative path, no arguments.
    BadRequest,
    /// The agent has as much to do as it can.
    Busy,
}

impl ErrorKind {
    const ALL: [Self; 7] = [
        Self::Other,
        Self::NotFound,
        Self::PermissionDenied,
        Self::NoSpace,
        Self::NotAFile,
        Self::BadRequest,
        Self::Busy,
    ];

    fn decode(number: u8) -> Self {
        // Those of later versions fit no other here.
        Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::Other)
    }
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// The program, looked up in PATH unless it has a `/`, and its arguments: 1 to [`LIST_MAX`], none with a zero byte.
    pub arguments: Vec<Vec<u8>>,
    /// `NAME=VALUE`, added to the agent's own environment; at most [`LIST_MAX`].
    pub environment: Vec<Vec<u8>>,
    /// Where to run it, absolute; empty: where the agent runs.
    pub directory: Vec<u8>,
    /// On a terminal of this size; `None`: on pipes.
    pub terminal: Option<Terminal>,
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// Comes first: the version of the protocol, and what software it is.
    Hello {
        /// Has to be [`VERSION`].
        version: u16,
        /// For people.
        software: String,
    },
    /// Make a file of the data that follows.
    Put {
        /// Absolute.
        path: Vec<u8>,
        /// Permission bits of a file that is new; 0: 0644.
        mode: u32,
    },
    /// Send a file.
    Get {
        /// Absolute.
        path: Vec<u8>,
    },
    /// Run a program.
    Exec(Command),
    /// A piece of the file, or of the program's input.
    Data(Vec<u8>),
    /// There is no more data.
    End,
    /// The terminal has another size.
    Resize(Terminal),
    /// Send the program a signal, by its number in the guest.
    Signal(u8),
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost {
    /// Comes first: the version of the protocol, and what software it is.
    Hello {
        /// Has to be [`VERSION`].
        version: u16,
        /// For people.
        software: String,
    },
    /// The file can be written, or the program runs.
    Go,
    /// The file is there, and its contents follow.
    File {
        /// Bytes that it had when it was opened; it may have more or less by the end.
        size: u64,
        /// Permission bits.
        mode: u32,
    },
    /// A piece of the file.
    Data(Vec<u8>),
    /// A piece of the program's standard output, or of what it shows on its terminal.
    Output(Vec<u8>),
    /// A piece of its standard error.
    Errors(Vec<u8>),
    /// The program took so many bytes more of its input.
    Taken(u32),
    /// The whole file is where it belongs.
    Finished {
        /// Bytes that were put, or sent.
        size: u64,
    },
    /// The program ended with this status, and all of its output was sent.
    Exited(u8),
    /// A signal killed the program, and all of its output was sent.
    Killed(u8),
    /// The operation failed.
    Failed {
        /// Why.
        kind: ErrorKind,
        /// Why, for a person.
        message: String,
    },
}

/// Bytes that are no frame of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A frame that is longer than any may be, or has no type.
    #[error("a frame of {0} bytes, 1 to {FRAME_MAX} are possible")]
    Length(u32),
    /// A type that there is not.
    #[error("a frame of type {0}")]
    Type(u8),
    /// A field ends after its frame does, is longer than it may be, or more follows after the last one.
    #[error("a frame of type {0} whose fields do not fit it")]
    Fields(u8),
    /// The other side does not speak this protocol.
    #[error("not an agent's protocol")]
    Magic,
}

/// A side's frames.
pub trait Message: Sized {
    /// The whole frame.
    fn encode(&self) -> Vec<u8>;

    /// Reads a frame of type `kind`.
    ///
    /// # Errors
    ///
    /// [`Malformed`].
    fn decode(kind: u8, fields: &[u8]) -> Result<Self, Malformed>;
}

impl Message for ToAgent {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { version, software } => Writer::hello(*version, software),
            Self::Put { path, mode } => Writer::new(1).bytes(path).number(&mode.to_le_bytes()),
            Self::Get { path } => Writer::new(2).bytes(path),
            Self::Exec(command) => {
                let writer = Writer::new(3)
                    .list(&command.arguments)
                    .list(&command.environment)
                    .bytes(&command.directory);
                match command.terminal {
                    Some(terminal) => writer.number(&[1]).terminal(terminal),
                    None => writer.number(&[0]),
                }
            }
            Self::Data(data) => Writer::new(4).number(data),
            Self::End => Writer::new(5),
            Self::Resize(terminal) => Writer::new(6).terminal(*terminal),
            Self::Signal(signal) => Writer::new(7).number(&[*signal]),
        }
        .finish()
    }

    fn decode(kind: u8, fields: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader { kind, rest: fields };
        let message = match kind {
            0 => {
                let (version, software) = reader.hello()?;
                Self::Hello { version, software }
            }
            1 => Self::Put {
                path: reader.bytes(PATH_MAX)?,
                mode: u32::from_le_bytes(reader.take()?),
            },
            2 => Self::Get {
                path: reader.bytes(PATH_MAX)?,
            },
            3 => Self::Exec(Command {
                arguments: reader.list()?,
                environment: reader.list()?,
                directory: reader.bytes(PATH_MAX)?,
                terminal: match reader.take()? {
                    [0] => None,
                    [_] => Some(reader.terminal()?),
                },
            }),
            4 => Self::Data(reader.data()?),
            5 => Self::End,
            6 => Self::Resize(reader.terminal()?),
            7 => Self::Signal(u8::from_le_bytes(reader.take()?)),
            _ => return Err(Malformed::Type(kind)),
        };
        reader.finish(message)
    }
}

impl Message for ToHost {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Hello { version, software } => Writer::hello(*version, software),
            Self::Go => Writer::new(1),
            Self::File { size, mode } => Writer::new(2).number(&size.to_le_bytes()).number(&mode.to_le_bytes()),
            Self::Data(data) => Writer::new(3).number(data),
            Self::Output(data) => Writer::new(4).number(data),
            Self::Errors(data) => Writer::new(5).number(data),
            Self::Taken(bytes) => Writer::new(6).number(&bytes.to_le_bytes()),
            Self::Finished { size } => Writer::new(7).number(&size.to_le_bytes()),
            Self::Exited(status) => Writer::new(8).number(&[*status]),
            Self::Killed(signal) => Writer::new(9).number(&[*signal]),
            Self::Failed { kind, message } => {
                // A kind's place in the list is its number.
                Writer::new(10).number(&[*kind as u8]).text(message)
            }
        }
        .finish()
    }

    fn decode(kind: u8, fields: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader { kind, rest: fields };
        let message = match kind {
            0 => {
                let (version, software) = reader.hello()?;
                Self::Hello { version, software }
            }
            1 => Self::Go,
            2 => Self::File {
                size: u64::from_le_bytes(reader.take()?),
                mode: u32::from_le_bytes(reader.take()?),
            },
            3 => Self::Data(reader.data()?),
            4 => Self::Output(reader.data()?),
            5 => Self::Errors(reader.data()?),
            6 => Self::Taken(u32::from_le_bytes(reader.take()?)),
            7 => Self::Finished {
                size: u64::from_le_bytes(reader.take()?),
            },
            8 => Self::Exited(u8::from_le_bytes(reader.take()?)),
            9 => Self::Killed(u8::from_le_bytes(reader.take()?)),
            10 => Self::Failed {
                kind: ErrorKind::decode(u8::from_le_bytes(reader.take()?)),
                message: reader.text()?,
            },
            _ => return Err(Malformed::Type(kind)),
        };
        reader.finish(message)
    }
}

/// Takes bytes as they come, and gives whole messages.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Bytes of those that were given out.
    taken: usize,
}

impl Decoder {
    /// Keeps `bytes` until their frames are whole. Whoever takes all messages after each call never has it keep more than a frame and these.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if it is whole.
    ///
    /// # Errors
    ///
    /// [`Malformed`]: nothing that follows can be understood.
    pub fn take<M: Message>(&mut self) -> Result<Option<M>, Malformed> {
        let rest = &self.bytes[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length);
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        if !(1..=FRAME_MAX).contains(&len) {
            return Err(Malformed::Length(length));
        }
        let Some((&kind, fields)) = rest.get(..len).and_then(<[u8]>::split_first) else {
            return Ok(None);
        };
        let message = M::decode(kind, fields)?;
        self.taken += 4 + len;
        Ok(Some(message))
    }

    /// Whether bytes of a frame are kept that is not whole, or was not taken.
    pub fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }
}

/// A frame under construction.
struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    fn hello(version: u16, software: &str) -> Self {
        Self::new(0)
            .number(&MAGIC)
            .number(&version.to_le_bytes())
            .text(software)
    }

    /// Bytes without a length.
    fn number(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        // What is too long for its length is refused by the other side, as what is too long for its frame.
        self.number(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes())
            .number(bytes)
    }

    /// A text, cut where it gets too long.
    fn text(self, text: &str) -> Self {
        self.bytes(&text.as_bytes()[..text.floor_char_boundary(TEXT_MAX)])
    }

    fn list(self, list: &[Vec<u8>]) -> Self {
        let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
        list.iter()
            .fold(self.number(&count.to_le_bytes()), |writer, item| writer.bytes(item))
    }

    fn terminal(self, terminal: Terminal) -> Self {
        self.number(&terminal.columns.to_le_bytes())
            .number(&terminal.rows.to_le_bytes())
    }

    fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len() - 4).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&len.to_le_bytes());
        self.0
    }
}

/// A frame that is read.
struct Reader<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(Malformed::Fields(self.kind))?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn bytes(&mut self, most: usize) -> Result<Vec<u8>, Malformed> {
        let len = u32::from_le_bytes(self.take()?) as usize;
        if len > most || len > self.rest.len() {
            return Err(Malformed::Fields(self.kind));
        }
        let (bytes, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(bytes.to_vec())
    }

    fn text(&mut self) -> Result<String, Malformed> {
        Ok(String::from_utf8_lossy(&self.bytes(TEXT_MAX)?).into_owned())
    }

    fn list(&mut self) -> Result<Vec<Vec<u8>>, Malformed> {
        let count = u32::from_le_bytes(self.take()?) as usize;
        if count > LIST_MAX {
            return Err(Malformed::Fields(self.kind));
        }
        let mut left = LIST_BYTES_MAX;
        (0..count)
            .map(|_| {
                let item = self.bytes(left)?;
                left -= item.len();
                Ok(item)
            })
            .collect()
    }

    fn terminal(&mut self) -> Result<Terminal, Malformed> {
        Ok(Terminal {
            columns: u16::from_le_bytes(self.take()?),
            rows: u16::from_le_bytes(self.take()?),
        })
    }

    fn hello(&mut self) -> Result<(u16, String), Malformed> {
        if self.take()? != MAGIC {
            return Err(Malformed::Magic);
        }
        Ok((u16::from_le_bytes(self.take()?), self.text()?))
    }

    /// The rest of the frame.
    fn data(&mut self) -> Result<Vec<u8>, Malformed> {
        if self.rest.len() > DATA_MAX {
            return Err(Malformed::Fields(self.kind));
        }
        Ok(std::mem::take(&mut self.rest).to_vec())
    }

    fn finish<M>(self, message: M) -> Result<M, Malformed> {
        if self.rest.is_empty() {
            Ok(message)
        } else {
            Err(Malformed::Fields(self.kind))
        }
    }
}

#[cfg(test)]
mod tests;
