//! A real back end, on the crate that most back ends in Rust are made with: answers each request with its bytes in reverse order.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::interrupt::lock;
use crate::virtio::feature;

/// A feature of the device's own.
pub(super) const DEVICE_FEATURE: u64 = 1 << 9;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// What a driver wrote to the configuration space: where, and what.
type Written = Arc<Mutex<Option<(u32, Vec<u8>)>>>;

struct Device {
    memory: Memory,
    written: Written,
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::VERSION_1
            | DEVICE_FEATURE
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = b"configuration".to_vec();
        config.resize(256, 0);
        config[offset as usize..][..size as usize].to_vec()
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        *lock(&self.written) = Some((offset, bytes.to_vec()));
        Ok(())
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap())
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let memory = self.memory.memory();
        let vring = &vrings[usize::from(event)];
        loop {
            let mut state = vring.get_mut();
            state.disable_notification().unwrap();
            // Rung just before the driver took the ring back.
            let Ok(chains) = state.get_queue_mut().iter(memory.clone()) else {
                return Ok(());
            };
            for chain in chains.collect::<Vec<_>>() {
                let head = chain.head_index();
                let mut bytes = Vec::new();
                let mut written = 0;
                for descriptor in chain {
                    let len = descriptor.len() as usize;
                    if descriptor.is_write_only() {
                        bytes.reverse();
                        bytes.truncate(len);
                        memory.write_slice(&bytes, descriptor.addr()).unwrap();
                        written += bytes.len() as u32;
                    } else {
                        bytes.resize(len, 0);
                        memory.read_slice(&mut bytes, descriptor.addr()).unwrap();
                    }
                }
                state.add_used(head, written).unwrap();
                if state.needs_notification().unwrap() {
                    state.signal_used_queue().unwrap();
                }
            }
            if !state.enable_notification().unwrap() {
                return Ok(());
            }
        }
    }
}

/// A running back end, which ends when this is dropped.
pub(super) struct Echo {
    _folder: tempfile::TempDir,
    path: std::path::PathBuf,
    written: Written,
    shutdown: std::sync::mpsc::Receiver<ShutdownHandle>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    /// Starts a back end that takes one connection.
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("echo.sock");
        let mut listener = Listener::new(&path, true).unwrap();
        let written = Written::default();
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Device {
            memory: memory.clone(),
            written: Arc::clone(&written),
        };
        let (sender, shutdown) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let device = Arc::new(Mutex::new(device));
            let mut daemon = VhostUserDaemon::new("echo".into(), device, memory).unwrap();
            daemon.start(&mut listener).unwrap();
            // The test may be over by now.
            let _ = sender.send(daemon.shutdown_handle().unwrap());
            // An error is a front end that hung up in the middle of something.
            let _ = daemon.wait();
        });
        Self {
            _folder: folder,
            path,
            written,
            shutdown,
            thread: Some(thread),
        }
    }

    pub(super) fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// What the driver wrote to the configuration space.
    pub(super) fn written(&self) -> Option<(u32, Vec<u8>)> {
        lock(&self.written).clone()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // One that nobody connected to waits for that.
        let _ = UnixStream::connect(&self.path);
        if let Ok(shutdown) = self.shutdown.recv() {
            shutdown.shutdown();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
