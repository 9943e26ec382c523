//! What device and driver tell each other about the ports (virtio 5.3.6.2); decides only, and knows no queues.
//!
//! ```text
//!   driver: DEVICE_READY ----> device: DEVICE_ADD for each port
//!   driver: PORT_READY ------> device: CONSOLE_PORT, RESIZE, PORT_NAME, PORT_OPEN for that port, as far as they apply
//!   driver: PORT_OPEN(1/0) --> input may be delivered, or has to wait
//!   owner: size, host end ---> device: RESIZE, PORT_OPEN
//! ```
//!
//! What is due is a set a port and not a queue, so a driver that asks without end and never takes the answers costs nothing.

/// Bytes of a message without what follows it.
pub(super) const HEADER: usize = 8;

/// Values of a message's event field (virtio 5.3.6.2).
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(in super::super) const DEVICE_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(in super::super) const CONSOLE_PORT: u16 = 4;
    pub(in super::super) const RESIZE: u16 = 5;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(in super::super) const PORT_NAME: u16 = 7;
}

/// A message that is due, in the order in which a port's are sent: what a console needs first of all is to be one.
const ORDER: [u16; 5] = [
    event::DEVICE_ADD,
    event::CONSOLE_PORT,
    event::RESIZE,
    event::PORT_NAME,
    event::PORT_OPEN,
];

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) cols: u16,
    pub(super) rows: u16,
}

impl Size {
    /// As it is in messages and in the configuration space: columns first. (Linux read the message's rows first up to 6.15 and in stable
    /// releases of before 2026.)
    pub(super) fn bytes(self) -> [u8; 4] {
        let [a, b] = self.cols.to_le_bytes();
        let [c, d] = self.rows.to_le_bytes();
        [a, b, c, d]
    }
}

/// What is known of a port from the beginning.
#[derive(Debug)]
pub(super) struct Known {
    /// Empty: it has none.
    pub(super) name: String,
    /// It is a console.
    pub(super) console: bool,
    /// Its host end is there.
    pub(super) host_open: bool,
}

/// What a port's driver and owner know of each other.
#[derive(Debug)]
struct Port {
    name: String,
    console: bool,
    size: Option<Size>,
    host_open: bool,
    /// The driver has set it up.
    ready: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
    /// The events of `ORDER`, as bits of their numbers.
    due: u8,
}

impl Port {
    fn ask(&mut self, event: u16) {
        self.due |= 1 << event;
    }
}

/// The conversation about all ports.
#[derive(Debug)]
pub(super) struct Control {
    ports: Vec<Port>,
}

impl Control {
    /// The device's ports in their order.
    pub(super) fn new(ports: impl IntoIterator<Item = Known>) -> Self {
        let ports = ports.into_iter().map(|known| Port {
            name: known.name,
            console: known.console,
            size: None,
            host_open: known.host_open,
            ready: false,
            guest_open: false,
            due: 0,
        });
        Self { ports: ports.collect() }
    }

    /// Takes a message of the driver's; the port whose state changed, if one's did.
    ///
    /// # Errors
    ///
    /// In words, the rule that it breaks.
    pub(super) fn received(&mut self, message: [u8; HEADER]) -> Result<Option<usize>, String> {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let (id, event) = (u32::from_le_bytes([i0, i1, i2, i3]), u16::from_le_bytes([e0, e1]));
        let yes = u16::from_le_bytes([v0, v1]) != 0;
        if event == event::DEVICE_READY {
            if yes {
                self.ports.iter_mut().for_each(|port| port.ask(event::DEVICE_ADD));
            }
            return Ok(None);
        }
        if event != event::PORT_READY && event != event::PORT_OPEN {
            return Err(format!("a control message with event {event}, which no driver sends"));
        }
        let (index, count) = (id as usize, self.ports.len());
        let Some(port) = self.ports.get_mut(index) else {
            return Err(format!("a control message about port {id}, of {count}"));
        };
        if event == event::PORT_OPEN {
            port.guest_open = yes;
            return Ok(Some(index));
        }
        port.ready = yes;
        port.due = 0;
        if yes {
            let tell = [
                (port.console, event::CONSOLE_PORT),
                (port.console && port.size.is_some(), event::RESIZE),
                (!port.name.is_empty(), event::PORT_NAME),
                (port.host_open, event::PORT_OPEN),
            ];
            tell.iter()
                .filter(|(applies, _)| *applies)
                .for_each(|(_, event)| port.ask(*event));
        } else {
            port.guest_open = false;
        }
        Ok(Some(index))
    }

    /// Whether there is anything to tell the driver.
    pub(super) fn is_due(&self) -> bool {
        self.ports.iter().any(|port| port.due != 0)
    }

    /// The next message to the driver. It counts as sent.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let (index, port) = self.ports.iter_mut().enumerate().find(|(_, port)| port.due != 0)?;
        let event = ORDER.into_iter().find(|event| port.due & (1 << event) != 0)?;
        port.due &= !(1 << event);
        // At most 32 ports.
        let mut message = (index as u32).to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        let value = event != event::PORT_OPEN || port.host_open;
        message.extend(u16::from(value).to_le_bytes());
        match event {
            event::RESIZE => message.extend(port.size.unwrap_or_default().bytes()),
            event::PORT_NAME => message.extend(port.name.as_bytes()),
            _ => {}
        }
        Some(message)
    }

    /// Whether the guest wants the port's input.
    pub(super) fn is_open(&self, port: usize) -> bool {
        self.ports.get(port).is_some_and(|port| port.guest_open)
    }

    /// The port's host end was closed.
    pub(super) fn host_closed(&mut self, port: usize) {
        if let Some(port) = self.ports.get_mut(port) {
            port.host_open = false;
            if port.ready {
                port.ask(event::PORT_OPEN);
            }
        }
    }

    /// The terminal at the port's host end has another size. True if it was not so before.
    pub(super) fn resize(&mut self, port: usize, size: Size) -> bool {
        let Some(port) = self.ports.get_mut(port) else {
            return false;
        };
        let changes = port.size != Some(size);
        port.size = Some(size);
        if changes && port.ready && port.console {
            port.ask(event::RESIZE);
        }
        changes
    }

    /// The driver is gone. What the owner knows stays.
    pub(super) fn reset(&mut self) {
        for port in &mut self.ports {
            (port.ready, port.guest_open, port.due) = (false, false, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn control() -> Control {
        let known = |name: &str, console, host_open| Known {
            name: name.to_owned(),
            console,
            host_open,
        };
        Control::new([
            known("", true, true),
            known("logs", false, false),
            known("data", false, true),
        ])
    }

    fn message(id: u32, event: u16, value: u16) -> [u8; HEADER] {
        let mut message = [0; HEADER];
        message[..4].copy_from_slice(&id.to_le_bytes());
        message[4..6].copy_from_slice(&event.to_le_bytes());
        message[6..].copy_from_slice(&value.to_le_bytes());
        message
    }

    fn all(control: &mut Control) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| control.next()).collect()
    }

    fn with(id: u32, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
        [&message(id, event, value)[..], rest].concat()
    }

    #[test]
    fn a_driver_that_is_ready_is_told_of_every_port() {
        let mut control = control();
        assert_eq!(control.received(message(0, event::DEVICE_READY, 1)), Ok(None));
        let expected: Vec<_> = (0..3).map(|id| with(id, event::DEVICE_ADD, 1, b"")).collect();
        assert_eq!(all(&mut control), expected);
        assert!(!control.is_due());
        control.received(message(0, event::DEVICE_READY, 0)).unwrap();
        assert!(!control.is_due(), "a driver that has failed gets no ports");
    }

    #[test]
    fn a_port_that_is_ready_is_described() {
        let mut control = control();
        control.resize(0, Size { cols: 132, rows: 43 });
        control.received(message(0, event::PORT_READY, 1)).unwrap();
        assert_eq!(
            all(&mut control),
            [
                with(0, event::CONSOLE_PORT, 1, b""),
                with(0, event::RESIZE, 1, &[132, 0, 43, 0]),
                with(0, event::PORT_OPEN, 1, b""),
            ]
        );
        control.received(message(1, event::PORT_READY, 1)).unwrap();
        assert_eq!(all(&mut control), [with(1, event::PORT_NAME, 1, b"logs")]);
        control.host_closed(2);
        control.received(message(2, event::PORT_READY, 1)).unwrap();
        assert_eq!(all(&mut control), [with(2, event::PORT_NAME, 1, b"data")]);
    }

    #[test]
    fn every_console_is_told_that_it_is_one() {
        let port = |name: &str, console| Known {
            name: name.to_owned(),
            console,
            host_open: true,
        };
        let mut control = Control::new([port("", true), port("port1", true), port("port2", false)]);
        assert!(control.resize(1, Size { cols: 80, rows: 25 }));
        control.received(message(1, event::PORT_READY, 1)).unwrap();
        control.received(message(2, event::PORT_READY, 1)).unwrap();
        assert_eq!(
            all(&mut control),
            [
                with(1, event::CONSOLE_PORT, 1, b""),
                with(1, event::RESIZE, 1, &[80, 0, 25, 0]),
                with(1, event::PORT_NAME, 1, b"port1"),
                with(1, event::PORT_OPEN, 1, b""),
                with(2, event::PORT_NAME, 1, b"port2"),
                with(2, event::PORT_OPEN, 1, b""),
            ]
        );
    }

    #[test]
    fn later_changes_are_told_once_and_only_to_who_is_ready() {
        let mut control = control();
        assert!(control.resize(0, Size { cols: 80, rows: 25 }));
        control.host_closed(0);
        assert!(!control.is_due());
        control.received(message(0, event::PORT_READY, 1)).unwrap();
        all(&mut control);
        assert!(control.resize(0, Size { cols: 100, rows: 30 }));
        assert!(control.resize(0, Size { cols: 101, rows: 30 }));
        assert!(!control.resize(0, Size { cols: 101, rows: 30 }));
        assert_eq!(all(&mut control), [with(0, event::RESIZE, 1, &[101, 0, 30, 0])]);
        control.received(message(2, event::PORT_READY, 1)).unwrap();
        all(&mut control);
        control.host_closed(2);
        assert!(control.resize(2, Size { cols: 9, rows: 9 }), "but it is no console");
        assert_eq!(all(&mut control), [with(2, event::PORT_OPEN, 0, b"")]);
    }

    #[test]
    fn a_port_is_open_between_open_and_close() {
        let mut control = control();
        assert!(!control.is_open(1));
        assert_eq!(control.received(message(1, event::PORT_OPEN, 1)), Ok(Some(1)));
        assert!(control.is_open(1) && !control.is_open(0) && !control.is_open(7));
        control.received(message(1, event::PORT_OPEN, 0)).unwrap();
        assert!(!control.is_open(1));
        control.received(message(1, event::PORT_OPEN, 1)).unwrap();
        control.received(message(1, event::PORT_READY, 0)).unwrap();
        assert!(!control.is_open(1), "the driver could not set it up");
        control.received(message(1, event::PORT_OPEN, 1)).unwrap();
        control.reset();
        assert!(!control.is_open(1));
    }

    #[test]
    fn what_no_driver_says_breaks_the_rules() {
        let mut control = control();
        for event in [
            event::DEVICE_ADD,
            2,
            event::CONSOLE_PORT,
            event::RESIZE,
            event::PORT_NAME,
            8,
            u16::MAX,
        ] {
            let reason = control.received(message(0, event, 1)).unwrap_err();
            assert!(reason.contains(&format!("event {event},")), "{reason}");
        }
        for id in [3, u32::MAX] {
            let reason = control.received(message(id, event::PORT_READY, 1)).unwrap_err();
            assert_eq!(reason, format!("a control message about port {id}, of 3"));
        }
    }

    proptest! {
        /// Whatever is said, what is due stays bounded, and a driver that takes its messages learns the last state of each port.
        #[test]
        fn the_driver_learns_the_last_state(
            steps in prop::collection::vec((0u32..4, 0u16..9, 0u16..2, any::<bool>()), 0..100),
        ) {
            let mut control = control();
            for (id, event, value, owner) in steps {
                if owner {
                    control.resize(id as usize, Size { cols: event, rows: value });
                } else {
                    let _ = control.received(message(id, event, value));
                }
            }
            let told = all(&mut control);
            prop_assert!(told.len() <= 3 * ORDER.len());
            for port in told.chunk_by(|a, b| a[..4] == b[..4]) {
                let place = |m: &Vec<u8>| ORDER.iter().position(|event| *event == u16::from_le_bytes([m[4], m[5]]));
                prop_assert!(port.is_sorted_by_key(place));
            }
            if let Some(size) = told.iter().find(|m| m[4] == 5) {
                prop_assert_eq!(&size[8..], &control.ports[0].size.unwrap().bytes()[..]);
            }
            prop_assert!(!control.is_due());
        }
    }
}
