//! A device that gives back what it is sent, and misbehaves when asked to.

use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::virtio::device::{ConfigLayout, Context, DeviceKind, Fault};
use crate::virtio::violation::Violation;

/// A feature of its own.
pub(super) const FEATURE: u64 = 1;

/// What the first byte of a request asks for: `!` a broken rule, `#` a panic, `%` a failure of the host, `~` to be held until the test lets go,
/// `=` a change of the configuration.
pub(super) struct Loopback {
    kind: DeviceKind,
    sizes: Vec<u16>,
    written: Option<Sender<[u8; 8]>>,
    hold: Option<(Sender<()>, Receiver<()>)>,
    active: bool,
    tame: bool,
}

/// The test's side of a held device.
pub(super) struct Hold {
    entered: Receiver<()>,
    release: Sender<()>,
}

impl Hold {
    /// Waits until the device holds a request.
    pub(super) fn entered(&self) {
        self.entered.recv_timeout(PATIENCE).unwrap();
    }

    pub(super) fn release(&self) {
        self.release.send(()).unwrap();
    }
}

impl Default for Loopback {
    fn default() -> Self {
        Self::of(DeviceKind::Rng, vec![256, 16])
    }
}

impl Loopback {
    /// One that is, or says that it is, of this kind, with queues of these sizes.
    pub(super) fn of(kind: DeviceKind, sizes: Vec<u16>) -> Self {
        Self {
            kind,
            sizes,
            written: None,
            hold: None,
            active: false,
            tame: false,
        }
    }

    /// One that tells what the driver wrote to the configuration.
    pub(super) fn that_tells(written: Sender<[u8; 8]>) -> Self {
        Self {
            written: Some(written),
            ..Self::default()
        }
    }

    /// One that never misbehaves.
    pub(super) fn tame() -> Self {
        Self {
            tame: true,
            ..Self::default()
        }
    }

    pub(super) fn held() -> (Self, Hold) {
        let (enter, entered) = channel();
        let (release, released) = channel();
        let device = Self {
            hold: Some((enter, released)),
            ..Self::default()
        };
        (device, Hold { entered, release })
    }
}

impl VirtioDevice for Loopback {
    fn kind(&self) -> DeviceKind {
        self.kind
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.sizes.clone()
    }

    fn config(&self) -> ConfigLayout {
        ConfigLayout {
            bytes: b"loopback".to_vec(),
            writable: vec![4..6, 6..8],
        }
    }

    fn activate(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        assert!(!self.active && context.accepted(feature::VERSION_1));
        self.active = true;
        Ok(())
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        assert!(self.active, "a device that rests has no doorbells");
        let memory = context.memory;
        loop {
            let ring = context.queue(queue).unwrap();
            let Some(chain) = ring.pop()? else {
                return Ok(context.interrupt(queue)?);
            };
            let bytes = chain.reader(memory).read_to_end(1024);
            match bytes.first().filter(|_| !self.tame) {
                Some(b'!') => {
                    return Err(Violation::Device {
                        queue,
                        reason: "on purpose".into(),
                    }
                    .into());
                }
                Some(b'#') => panic!("on purpose"),
                Some(b'%') => return Err(Fault::Host("the host failed".into())),
                Some(b'~') => {
                    let (enter, released) = self.hold.as_ref().unwrap();
                    enter.send(()).unwrap();
                    released.recv_timeout(PATIENCE).unwrap();
                    // Keeps the request: the driver resets.
                    continue;
                }
                Some(b'=') => context.update_config(0, &bytes[1..]),
                _ => {}
            }
            // The room may be too small for a hostile test.
            let written = chain.writer(memory).write(&bytes).map_or(0, |()| bytes.len() as u32);
            context.queue(queue).unwrap().push(chain, written)?;
        }
    }

    fn config_written(&mut self, context: &mut Context<'_>) -> Result<(), Fault> {
        let mut bytes = [0; 8];
        context.read_config(0, &mut bytes);
        if let Some(written) = &self.written {
            written.send(bytes).unwrap();
        }
        Ok(())
    }

    fn reset(&mut self, context: &mut Context<'_>) {
        assert!(self.active && context.features != 0, "a device that rests is not reset");
        self.active = false;
    }
}
