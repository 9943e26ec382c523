//! The device on a real loop behind the real transport: the back end listens to the driver's doorbells and interrupts it by itself.

use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::dispatch::{DeviceReporter, DispatchLoop};
use crate::interrupt::{InterruptLine, Msi};
use crate::pci::function::{Doorbells, MsiVector, MsiVectors};
use crate::pci::{PciFunction, msix};
use crate::vhost_user::testing::{ENTRIES, Requests, memory};
use crate::virtio::device::Reclaim;
use crate::virtio::transport::{Wiring, connect as connect_function};
use crate::virtio::{feature, status};

/// The machine: its vectors are eventfds that the test reads, and its doorbells all go the long way.
#[derive(Default)]
struct Machine(Mutex<Vec<Arc<Vector>>>);

struct Vector {
    bell: EventFd,
    held: AtomicBool,
}

impl Vector {
    /// Waits until it is written to.
    fn wait(&self) {
        let mut polled = libc::pollfd {
            fd: self.bell.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, which lives until the call returns.
        assert_eq!(unsafe { libc::poll(&mut polled, 1, -1) }, 1);
    }
}

impl MsiVector for Vector {
    fn trigger(&self) {
        let _ = self.bell.write(1);
    }

    fn event_fd(&self) -> Option<&EventFd> {
        Some(&self.bell)
    }

    fn hold(&self, held: bool) {
        self.held.store(held, Ordering::SeqCst);
    }

    fn take_held(&self) -> bool {
        self.bell.read().is_ok()
    }

    fn gsi(&self) -> u32 {
        24
    }
}

impl MsiVectors for Machine {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(Vector {
            bell: EventFd::new(EFD_NONBLOCK)?,
            held: AtomicBool::new(false),
        });
        lock(&self.0).push(Arc::clone(&vector));
        Ok(vector)
    }

    fn route(&self, _: &[(Arc<dyn MsiVector>, Msi)]) {}
}

impl Doorbells for Machine {
    fn attach(&self, _: u64, _: &EventFd) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn detach(&self, _: u64, _: &EventFd) {}
}

impl InterruptLine for Machine {
    fn set(&self, asserted: bool) {
        assert!(!asserted, "the driver uses messages");
    }
}

impl Reclaim for Machine {
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Events(Sender<DeviceEvent>);

impl DeviceReporter for Events {
    fn report(&self, event: DeviceEvent) {
        self.0.send(event).unwrap();
    }
}

/// The driver: registers of virtio 4.1.4.3, in the BAR's first part.
struct Driver {
    function: Arc<dyn PciFunction>,
    machine: Arc<Machine>,
    requests: Requests,
}

impl Driver {
    fn write(&self, offset: u64, value: impl Into<u64>, bytes: usize) {
        self.function.write_bar(0, offset, &value.into().to_le_bytes()[..bytes]);
    }

    /// Sets a status, and waits for a reset to be done.
    fn set_status(&self, value: u8) {
        self.write(0x14, value, 1);
        let mut now = [0xff];
        while now != [value] {
            self.function.read_bar(0, 0x14, &mut now);
            std::thread::yield_now();
        }
    }

    /// Allows messages, a vector for each queue.
    fn enable_msix(&self) {
        let mut at = [0];
        self.function.read_config(0x34, &mut at);
        let mut capability = [0; 2];
        loop {
            self.function.read_config(at[0].into(), &mut capability);
            if capability[0] == msix::CAPABILITY {
                break;
            }
            at = [capability[1]];
        }
        self.function.write_config(u16::from(at[0]) + 2, &[0, 0x80]);
        // A bus master, which answers to memory accesses.
        self.function.write_config(4, &[0b110]);
        for vector in [0, 1] {
            let entry = 0x4000 + vector * msix::ENTRY_BYTES;
            self.write(entry, 0xfee0_0000_u64, 8);
            self.write(entry + 8, 0x20 + vector, 8);
        }
    }

    fn offered(&self) -> u64 {
        let half = |select: u64| {
            let mut bits = [0; 4];
            self.write(0, select, 4);
            self.function.read_bar(0, 4, &mut bits);
            u64::from(u32::from_le_bytes(bits))
        };
        half(0) | half(1) << 32
    }

    fn start(&mut self) {
        let ready = status::ACKNOWLEDGE | status::DRIVER;
        self.set_status(ready);
        let features = feature::TRANSPORT | echo::DEVICE_FEATURE;
        for (half, bits) in [(0_u64, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x08, half, 4);
            self.write(0x0c, bits, 4);
        }
        self.set_status(ready | status::FEATURES_OK);
        for queue in [0, 1] {
            let setup = self.requests.set_up(queue);
            self.write(0x16, queue, 2);
            self.write(0x18, ENTRIES, 2);
            self.write(0x1a, queue, 2);
            self.write(0x20, setup.descriptors, 8);
            self.write(0x28, setup.available, 8);
            self.write(0x30, setup.used, 8);
            self.write(0x1c, 1_u16, 2);
        }
        self.set_status(ready | status::FEATURES_OK | status::DRIVER_OK);
    }

    /// Makes a request and waits for its interrupt.
    fn ask(&mut self, queue: u16, text: &[u8]) -> Vec<u8> {
        self.requests.make(queue, text, 4096);
        self.write(0x3000 + 4 * u64::from(queue), queue, 2);
        loop {
            let vector = Arc::clone(&lock(&self.machine.0)[usize::from(queue)]);
            vector.wait();
            vector.bell.read().unwrap();
            if let Some(answer) = self.requests.answer(queue) {
                return answer;
            }
        }
    }

    /// Masks the vector of `queue`, or unmasks it.
    fn mask(&self, queue: u16, masked: bool) {
        let entry = 0x4000 + u64::from(queue) * msix::ENTRY_BYTES;
        self.write(entry + 12, u64::from(masked), 4);
    }

    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        self.function.read_bar(0, 0x5000, &mut bits);
        u64::from_le_bytes(bits)
    }
}

fn machine(device: VhostUser) -> (Driver, DispatchLoop, Receiver<DeviceEvent>) {
    let (machine, memory) = (Arc::new(Machine::default()), memory());
    let wiring = Wiring {
        memory: memory.clone(),
        reclaim: machine.clone(),
        vectors: machine.clone(),
        doorbells: machine.clone(),
        line: machine.clone(),
    };
    let (function, worker) = connect_function(Box::new(device), wiring, 1).unwrap();
    let (sender, events) = channel();
    let setup = || Ok::<_, String>(());
    let running = DispatchLoop::spawn("echo", setup, worker, Arc::new(Events(sender))).unwrap();
    let driver = Driver {
        function,
        machine,
        requests: Requests::new(memory, 2),
    };
    driver.enable_msix();
    (driver, running, events)
}

#[test]
fn a_driver_and_a_back_end_talk_without_the_loop() {
    let first = Echo::start();
    let (device, handle) = connect(first.connect());
    let (mut driver, running, events) = machine(device);
    for _ in 0..3 {
        driver.start();
        for queue in [0, 1, 1, 0] {
            assert_eq!(driver.ask(queue, b"straight"), b"thgiarts");
        }
        driver.set_status(0);
    }
    driver.start();
    drop(first);
    assert!(matches!(events.recv(), Ok(DeviceEvent::BackendLost { .. })));
    let second = Echo::start();
    handle.reconnect(second.connect().into());
    assert!(matches!(events.recv(), Ok(DeviceEvent::BackendRestored { .. })));
    assert_eq!(driver.ask(1, b"again"), b"niaga");
    running.stop(Duration::from_secs(60)).unwrap();
}

#[test]
fn a_masked_vector_keeps_what_the_back_end_wrote() {
    let back_end = Echo::start();
    let (device, _handle) = connect(back_end.connect());
    let (mut driver, running, _events) = machine(device);
    driver.start();
    assert_eq!(driver.ask(1, b"open"), b"nepo");
    driver.mask(1, true);
    let vector = Arc::clone(&lock(&driver.machine.0)[1]);
    assert!(vector.held.load(Ordering::SeqCst));
    driver.requests.make(1, b"closed", 4096);
    driver.write(0x3000 + 4, 1_u16, 2);
    vector.wait();
    assert_eq!((driver.pending(), driver.pending()), (2, 2));
    assert!(vector.bell.read().is_err(), "it is pending instead");
    driver.mask(1, false);
    assert!(!vector.held.load(Ordering::SeqCst));
    assert_eq!((vector.bell.read().unwrap(), driver.pending()), (1, 0));
    assert_eq!(driver.requests.answer(1).unwrap(), b"desolc");
    assert_eq!(driver.ask(1, b"open"), b"nepo");
    running.stop(Duration::from_secs(60)).unwrap();
}

#[test]
fn a_driver_is_not_offered_what_the_back_end_cannot_do() {
    for (back_ends, offered) in [
        (scripted::FEATURES, feature::TRANSPORT),
        (feature::VERSION_1, feature::VERSION_1 | feature::RING_RESET),
    ] {
        let (socket, thread) = scripted::back_end(0, move |request| match request {
            1 => scripted::Act::Bytes(scripted::reply(1, &back_ends.to_le_bytes())),
            _ => scripted::Act::Well,
        });
        let (device, _handle) = VhostUser::connect(socket.into(), scripted::plain()).unwrap();
        let (driver, running, _events) = machine(device);
        assert_eq!(driver.offered(), offered);
        running.stop(Duration::from_secs(60)).unwrap();
        thread.join().unwrap();
    }
}
