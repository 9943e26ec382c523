//! A console with several ports (virtio 5.3, VIRTIO_CONSOLE_F_MULTIPORT), which the crate's driver has not: queues and control messages of our own.
//!
//! ```text
//!   DEVICE_READY -> DEVICE_ADD of each port;  PORT_READY -> CONSOLE_PORT or PORT_NAME, and PORT_OPEN;  PORT_OPEN -> the port may be used
//! ```

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

const MULTIPORT: u64 = 1 << 1;
/// Offset of the number of ports in the configuration.
const MAX_PORTS: usize = 4;
/// Entries of each queue.
const ENTRIES: usize = 16;
/// Bytes of a control message without a name.
const HEADER: usize = 8;
/// Values of a message's event field.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// The control queues.
const RECEIVE_CONTROL: u16 = 2;
const SEND_CONTROL: u16 = 3;
/// Most ports that are driven.
const PORTS: u32 = 8;
/// How long an answer may take, in milliseconds.
const PATIENCE: u64 = 60_000;

type Queue = Box<VirtQueue<Identity, ENTRIES>>;

/// A queue that the device fills, with its buffers.
pub(crate) struct Inbox {
    index: u16,
    queue: Queue,
    /// Each with the token of its chain.
    buffers: Vec<(u16, Vec<u8>)>,
}

impl Inbox {
    pub(crate) fn new(port: &mut Port, index: u16) -> Result<Self, Failure> {
        Ok(Self {
            index,
            queue: Box::new(VirtQueue::new(port, index, false, false)?),
            buffers: Vec::new(),
        })
    }

    pub(crate) fn post(&mut self, port: &mut Port, mut buffer: Vec<u8>) -> Result<(), Failure> {
        // SAFETY: the buffer is on the heap and kept until its chain is taken back.
        let token = unsafe { self.queue.add(&[], &mut [buffer.as_mut_slice()]) }?;
        self.buffers.push((token, buffer));
        port.notify(self.index);
        Ok(())
    }

    /// The next message, waited for.
    pub(crate) fn take(&mut self, guest: &mut Guest, port: &mut Port) -> Result<Vec<u8>, Failure> {
        ensure!(
            guest.within(PATIENCE, || self.queue.can_pop()),
            "nothing comes in queue {}",
            self.index
        );
        let token = self.queue.peek_used();
        let at = self.buffers.iter().position(|(known, _)| Some(*known) == token);
        let (Some(at), Some(token)) = (at, token) else {
            return Err(Failure(format!("queue {} gives back {token:?}", self.index)));
        };
        let (_, mut buffer) = self.buffers.swap_remove(at);
        // SAFETY: the buffer of this token.
        let count = unsafe { self.queue.pop_used(token, &[], &mut [buffer.as_mut_slice()]) }?;
        let message = buffer.get(..count as usize).map(<[u8]>::to_vec);
        self.post(port, buffer)?;
        message.ok_or_else(|| Failure(format!("queue {} gives back {count} bytes", self.index)))
    }
}

/// The queues of one port.
struct Lane {
    input: Inbox,
    output: Queue,
    output_index: u16,
}

struct Ports {
    port: Port,
    control: Inbox,
    tell: Queue,
    lanes: Vec<Lane>,
}

impl Ports {
    fn open(guest: &mut Guest, number: usize) -> Result<Self, Failure> {
        let mut port = Port::open(guest, DeviceType::Console, number)?;
        port.negotiate(MULTIPORT, 0)?;
        let count: u32 = port.read_config_space(MAX_PORTS)?;
        ensure!((1..=PORTS).contains(&count), "it has {count} ports");
        let mut lanes = Vec::new();
        for id in 0..count as u16 {
            // The control queues lie between those of the first two ports (virtio 5.3.2).
            let first = if id == 0 { 0 } else { 2 + 2 * id };
            lanes.push(Lane {
                input: Inbox::new(&mut port, first)?,
                output: Box::new(VirtQueue::new(&mut port, first + 1, false, false)?),
                output_index: first + 1,
            });
        }
        let control = Inbox::new(&mut port, RECEIVE_CONTROL)?;
        let tell = Box::new(VirtQueue::new(&mut port, SEND_CONTROL, false, false)?);
        port.finish_init();
        let mut ports = Self {
            port,
            control,
            tell,
            lanes,
        };
        for _ in 0..ENTRIES / 2 {
            ports.control.post(&mut ports.port, vec![0; 64])?;
        }
        Ok(ports)
    }

    /// Gives port `id` a buffer for what the host has for it.
    fn listen(&mut self, id: usize) -> Result<(), Failure> {
        match self.lanes.get_mut(id) {
            Some(lane) => lane.input.post(&mut self.port, vec![0; 256]),
            None => Err(Failure(format!("there is no port {id}"))),
        }
    }

    /// All ports, with the number of the one that a command's first argument names, and what to report: `names=` of all, and `open=` of those that
    /// somebody is at the other end of.
    fn with(guest: &mut Guest, arguments: Arguments<'_>) -> Result<(Self, usize, String), Failure> {
        let id = arguments.number(0, 0)?;
        let mut ports = Self::open(guest, arguments.device)?;
        let greeted = ports.greet(guest)?;
        let names: Vec<&str> = greeted.iter().map(|(name, _)| name.as_str()).collect();
        let open: Vec<String> = (0..greeted.len())
            .filter(|&id| greeted.get(id).is_some_and(|(_, open)| *open))
            .map(|id| format!("{id}"))
            .collect();
        let report = format!("names={} open={}", names.join("+"), open.join("+"));
        Ok((ports, id, report))
    }

    fn tell(&mut self, id: u32, event: u16, value: u16) -> Result<(), Failure> {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.tell.add_notify_wait_pop(&[&message], &mut [], &mut self.port)?;
        Ok(())
    }

    /// The next control message: port, event, value, and what follows.
    fn hear(&mut self, guest: &mut Guest) -> Result<(u32, u16, u16, Vec<u8>), Failure> {
        let message = self.control.take(guest, &mut self.port)?;
        let (Some(&[a, b, c, d, e, f, g, h]), Some(rest)) = (message.first_chunk::<HEADER>(), message.get(HEADER..))
        else {
            return Err(Failure(format!("a control message of {} bytes", message.len())));
        };
        Ok((
            u32::from_le_bytes([a, b, c, d]),
            u16::from_le_bytes([e, f]),
            u16::from_le_bytes([g, h]),
            rest.to_vec(),
        ))
    }

    /// Sets all ports up; their names, a console's as `console`, and whether somebody is at the other end.
    fn greet(&mut self, guest: &mut Guest) -> Result<Vec<(String, bool)>, Failure> {
        let count = self.lanes.len() as u32;
        self.tell(u32::MAX, DEVICE_READY, 1)?;
        for id in 0..count {
            let (port, event, ..) = self.hear(guest)?;
            ensure!((port, event) == (id, DEVICE_ADD), "event {event} of port {port}");
        }
        let mut names = Vec::new();
        for id in 0..count {
            self.tell(id, PORT_READY, 1)?;
            let mut name = String::new();
            // The last one says whether somebody is at the other end.
            let open = loop {
                let (port, event, value, rest) = self.hear(guest)?;
                ensure!(port == id, "event {event} of port {port} instead of {id}");
                match event {
                    CONSOLE_PORT => name = "console".into(),
                    PORT_NAME => name = String::from_utf8_lossy(&rest).into_owned(),
                    PORT_OPEN => break value == 1,
                    _ => {}
                }
            };
            self.tell(id, PORT_OPEN, 1)?;
            names.push((name, open));
        }
        Ok(names)
    }

    /// Sends a line through a port.
    fn say(&mut self, id: usize, line: &str) -> Result<(), Failure> {
        self.send(id, &format!("{line}\n").into_bytes())
    }

    /// Sends bytes through a port.
    fn send(&mut self, id: usize, bytes: &[u8]) -> Result<(), Failure> {
        let Self { port, lanes, .. } = self;
        let Some(Lane {
            output, output_index, ..
        }) = lanes.get_mut(id)
        else {
            return Err(Failure(format!("there is no port {id}")));
        };
        // SAFETY: the bytes live until the chain was taken back, or for ever if that does not happen.
        let token = unsafe { output.add(&[bytes], &mut []) }?;
        port.notify(*output_index);
        while !output.can_pop() {
            core::hint::spin_loop();
        }
        // SAFETY: as above.
        unsafe { output.pop_used(token, &[bytes], &mut []) }?;
        Ok(())
    }

    /// Waits for what the host has for a port.
    fn take(&mut self, guest: &mut Guest, id: usize) -> Result<Vec<u8>, Failure> {
        match self.lanes.get_mut(id) {
            Some(lane) => lane.input.take(guest, &mut self.port),
            None => Err(Failure(format!("there is no port {id}"))),
        }
    }

    /// Waits for a line from a port.
    fn read(&mut self, guest: &mut Guest, id: usize) -> Result<String, Failure> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.extend(self.take(guest, id)?);
        }
        line.pop();
        Ok(String::from_utf8_lossy(&line).into_owned())
    }
}

/// `console-ports[:TEXT]`: sets all ports up, writes `TEXT-N` to port N, then reads a line from each, the last port first.
pub(crate) fn talk(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut ports = Ports::open(guest, arguments.device)?;
    for id in 0..ports.lanes.len() {
        ports.listen(id)?;
    }
    let (names, open): (Vec<String>, Vec<bool>) = ports.greet(guest)?.into_iter().unzip();
    let closed = open.iter().position(|open| !open);
    ensure!(closed.is_none(), "nobody is at the other end of port {closed:?}");
    let text = arguments.text(0).unwrap_or("hello");
    for id in 0..names.len() {
        ports.say(id, &format!("{text}-{id}"))?;
    }
    let mut got = Vec::new();
    for id in (0..names.len()).rev() {
        got.push(ports.read(guest, id)?);
    }
    got.reverse();
    Ok(format!("names={} got={}", names.join("+"), got.join("+")))
}

/// `console-say:PORT:TEXT`: writes a line to one of several ports.
pub(crate) fn say(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (mut ports, id, greeting) = Ports::with(guest, arguments)?;
    ports.say(id, arguments.text(1).unwrap_or("hello"))?;
    Ok(greeting)
}

/// `console-echo:PORT[:BYTES]`: sends back what one of several ports receives, until it was so many bytes.
pub(crate) fn echo(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let total: usize = arguments.number(1, 1)?;
    let (mut ports, id, greeting) = Ports::with(guest, arguments)?;
    ports.listen(id)?;
    guest.say("waiting console-echo");
    let mut echoed = 0;
    while echoed < total {
        let bytes = ports.take(guest, id)?;
        ports.send(id, &bytes)?;
        echoed += bytes.len();
    }
    Ok(format!("bytes={echoed} {greeting}"))
}
