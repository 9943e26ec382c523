//! A dispatch loop without a thread, for tests: the test decides when the device looks at its events, and sees when it has nothing to do.

use super::*;

/// Collects events of devices.
#[derive(Default)]
pub(crate) struct Reports(Mutex<Vec<DeviceEvent>>);

impl Reports {
    /// The events since the last call.
    pub(crate) fn take(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl DeviceReporter for Reports {
    fn report(&self, event: DeviceEvent) {
        lock(&self.0).push(event);
    }
}

/// A device, started, on the test's own thread.
pub(crate) struct Stepper<D: DispatchDevice> {
    manager: EventManager<Subscriber<D>>,
    id: SubscriberId,
    pub(crate) reports: Arc<Reports>,
}

impl<D: DispatchDevice> Stepper<D> {
    pub(crate) fn start(device: D) -> Result<Self, DeviceError> {
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
    pub(crate) fn step(&mut self) -> usize {
        self.run(0)
    }

    /// Waits for events and handles them.
    pub(crate) fn wait(&mut self) {
        while self.run(-1) == 0 {}
    }

    /// Handles events until there are none, which must happen soon: a device that finds events without end is busy for nothing.
    pub(crate) fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.step() == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    pub(crate) fn device(&mut self) -> &mut D {
        &mut self.manager.subscriber_mut(self.id).unwrap().device
    }

    fn run(&mut self, milliseconds: i32) -> usize {
        let events = self.manager.run_with_timeout(milliseconds).unwrap();
        if let State::Failed(reason) = &self.manager.subscriber_mut(self.id).unwrap().state {
            panic!("device failed: {reason}");
        }
        events
    }
}
