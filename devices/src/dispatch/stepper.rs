//! A dispatch loop without a thread, for tests: the test decides when the device looks at its events, and sees when it has nothing to do.

use super::*;

/// Collects events of devices.
#[derive(Default)]
pub struct Reports(Mutex<Vec<DeviceEvent>>);

impl Reports {
    /// The events since the last call.
    pub fn take(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl DeviceReporter for Reports {
    fn report(&self, event: DeviceEvent) {
        lock(&self.0).push(event);
    }
}

/// A device, started, on the test's own thread.
pub struct Stepper<D: DispatchDevice> {
    manager: EventManager<Subscriber<D>>,
    id: SubscriberId,
    /// What the device reported.
    pub reports: Arc<Reports>,
}

impl<D: DispatchDevice> Stepper<D> {
    /// Starts the device.
    ///
    /// # Errors
    ///
    /// What keeps it from working.
    pub fn start(device: D) -> Result<Self, DeviceError> {
        let reports = Arc::new(Reports::default());
        let identity = Arc::new(Identity {
            name: "device".into(),
            reporter: reports.clone(),
        });
        let stop = Arc::new(StopRequest {
            fd: EventFd::new(EFD_NONBLOCK)?,
            deadline: Mutex::new(None),
        });
        let mut manager = EventManager::new()?;
        let id = start(
            &mut manager,
            Subscriber {
                device,
                identity,
                stop,
                state: State::Running,
            },
        )?;
        Ok(Self { manager, id, reports })
    }

    /// Handles the events that are there now: how many descriptors had some.
    ///
    /// # Panics
    ///
    /// The device failed, here as in all that handles events.
    pub fn step(&mut self) -> usize {
        self.run(0)
    }

    /// Waits for events and handles them.
    ///
    /// # Panics
    ///
    /// As [`step`](Self::step).
    pub fn wait(&mut self) {
        while self.run(-1) == 0 {}
    }

    /// Handles events until there are none, which must happen soon: a device that finds events without end is busy for nothing.
    ///
    /// # Panics
    ///
    /// As [`step`](Self::step), or it does not happen soon.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.step() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// The device.
    ///
    /// # Panics
    ///
    /// Never: it stays where it was put.
    pub fn device(&mut self) -> &mut D {
        &mut self.subscriber().device
    }

    #[expect(clippy::expect_used, reason = "it is never taken out")]
    fn subscriber(&mut self) -> &mut Subscriber<D> {
        self.manager.subscriber_mut(self.id).expect("the device")
    }

    #[expect(clippy::expect_used, reason = "a loop that cannot look at its events is no loop")]
    fn run(&mut self, milliseconds: i32) -> usize {
        let events = self.manager.run_with_timeout(milliseconds).expect("events");
        if let State::Failed(reason) = &self.subscriber().state {
            panic!("device failed: {reason}");
        }
        events
    }
}
