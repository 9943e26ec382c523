//! The vCPUs' threads as a group: started together by handshake, kicked together, joined before a deadline.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use super::error::MachineError;
use super::stats::{VcpuCounters, VcpuStats};
use super::vcpu::mailbox::{self, Mailbox, Orders};
use super::vcpu::run_page::RunMapping;
use super::vcpu::{self, Birth, Handshake, Seed};

/// Address space for each vCPU's stack, of which only what is touched costs memory.
const STACK: usize = 512 << 10;

/// One vCPU as its owner sees it.
struct Handle {
    index: u8,
    mailbox: Arc<Mailbox>,
    counters: Arc<VcpuCounters>,
    /// What a kick needs, once the thread has said that it is ready.
    mapping: Option<Arc<RunMapping>>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Changes the vCPU's orders, and gets it to look at them.
    fn order<R>(&self, change: impl FnOnce(&mut Orders) -> R) -> R {
        let result = self.mailbox.change(change);
        if let (Some(mapping), Some(thread)) = (&self.mapping, &self.thread) {
            mailbox::kick(mapping, thread);
        }
        result
    }
}

/// A vCPU's thread that waits for its machine; it ends when this is dropped.
struct Waiting {
    index: u8,
    seed: Sender<Seed>,
    thread: JoinHandle<()>,
}

/// The threads of all vCPUs.
pub(super) struct VcpuThreads {
    /// One that was made ahead.
    waiting: Option<Waiting>,
    handles: Vec<Handle>,
    handshake: Receiver<(u8, Handshake)>,
    sender: Option<Sender<(u8, Handshake)>>,
    ended: Receiver<u8>,
    end_sender: Option<Sender<u8>>,
}

/// Tells that a thread is at its end, however it got there.
struct EndNotice {
    index: u8,
    to: Sender<u8>,
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        // Nobody listens when the owner has given the threads up.
        let _ = self.to.send(self.index);
    }
}

impl VcpuThreads {
    /// No thread yet.
    pub(super) fn new() -> Self {
        let (sender, handshake) = channel();
        let (end_sender, ended) = channel();
        Self {
            waiting: None,
            handles: Vec::new(),
            handshake,
            sender: Some(sender),
            ended,
            end_sender: Some(end_sender),
        }
    }

    /// Makes a vCPU, on its thread, before there is a machine to set it up for. What becomes of it is told as of any other.
    pub(super) fn make_ahead(&mut self, birth: Birth) -> Result<(), MachineError> {
        self.waiting = Some(self.make(birth)?);
        Ok(())
    }

    /// Has one vCPU made, if that was not done ahead, and set up; [`wait_ready`](Self::wait_ready) tells what became of it.
    pub(super) fn spawn(&mut self, birth: Birth, seed: Seed) -> Result<(), MachineError> {
        let index = seed.index;
        let Waiting { seed: to, thread, .. } = match self.waiting.take_if(|ahead| ahead.index == index) {
            Some(ahead) => ahead,
            None => self.make(birth)?,
        };
        self.handles.push(Handle {
            index,
            mailbox: Arc::clone(&seed.mailbox),
            counters: Arc::clone(&seed.counters),
            mapping: None,
            thread: Some(thread),
        });
        // A thread that is gone already has said why in its handshake.
        let _ = to.send(seed);
        Ok(())
    }

    fn make(&self, birth: Birth) -> Result<Waiting, MachineError> {
        let index = birth.index;
        let failed = |reason: String| MachineError::VcpuStart { vcpu: index, reason };
        let (Some(handshake), Some(end)) = (self.sender.clone(), self.end_sender.clone()) else {
            return Err(failed("the vCPUs were started before".to_owned()));
        };
        let (to, seed) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || {
                let _notice = EndNotice { index, to: end };
                vcpu::thread(birth, &seed, &handshake);
            })
            .map_err(|e| failed(format!("start its thread: {e}")))?;
        Ok(Waiting {
            index,
            seed: to,
            thread,
        })
    }

    /// Waits until every vCPU is set up, or the first that isn't.
    pub(super) fn wait_ready(&mut self) -> Result<(), MachineError> {
        // Without this sender the channel closes when the last thread that hasn't answered is gone.
        self.sender = None;
        for _ in 0..self.handles.len() {
            match self.handshake.recv() {
                Ok((index, Ok(mapping))) => {
                    if let Some(handle) = self.handles.iter_mut().find(|h| h.index == index) {
                        handle.mapping = Some(mapping);
                    }
                }
                Ok((vcpu, Err(reason))) => return Err(MachineError::VcpuStart { vcpu, reason }),
                Err(_) => {
                    let vcpu = self.handles.iter().find(|h| h.mapping.is_none()).map_or(0, |h| h.index);
                    return Err(MachineError::VcpuStart {
                        vcpu,
                        reason: "its thread ended".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Changes every vCPU's orders.
    pub(super) fn order_all(&self, change: impl Fn(&mut Orders)) {
        for handle in &self.handles {
            handle.order(&change);
        }
    }

    /// Changes the orders of all vCPUs for the sake of those that are parked: the bell wakes them, and a vCPU in the guest is left there.
    pub(super) fn order_parked(&self, change: impl Fn(&mut Orders)) {
        for handle in &self.handles {
            handle.mailbox.change(&change);
        }
    }

    /// Changes one vCPU's orders; `None` if there is no such vCPU.
    pub(super) fn order<R>(&self, index: u8, change: impl FnOnce(&mut Orders) -> R) -> Option<R> {
        self.handles.iter().find(|h| h.index == index).map(|h| h.order(change))
    }

    /// Counters by vCPU index.
    pub(super) fn stats(&self) -> Vec<VcpuStats> {
        self.handles.iter().map(|h| h.counters.read()).collect()
    }

    /// Joins the threads, which must have been told to stop; returns the names of those that were not at their end by `deadline`.
    pub(super) fn join(&mut self, deadline: Instant) -> Vec<String> {
        self.end_sender = None;
        let mut running = self.handles.iter().filter(|h| h.thread.is_some()).count();
        while running > 0 {
            match self
                .ended
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(index) => {
                    running -= 1;
                    if let Some(handle) = self.handles.iter_mut().find(|h| h.index == index)
                        && let Some(thread) = handle.thread.take()
                    {
                        // A panic has been reported by the thread itself.
                        let _ = thread.join();
                        handle.mapping = None;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        self.handles
            .iter()
            .filter(|h| h.thread.is_some())
            .map(|h| format!("vcpu{}", h.index))
            .collect()
    }
}
