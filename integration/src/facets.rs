//! What a client does to the devices of a guest, through the capabilities that it has.

use std::{
    future::Future,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use capnp::capability::FromClientHook;
use sepal_schema::{
    debug_capnp::debug,
    device_capnp::{balloon_controller, disk_controller, mem_controller, net_controller},
    error::{Error, Outcome, read_completion},
    guest_capnp::{console, output, serial, statistics},
};

use crate::{Guest, HarnessError, manager::PATIENCE};

/// Sizes of a balloon, in pages of 4096 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonSize {
    /// What the guest has given.
    pub current: u32,
    /// What it was asked for.
    pub requested: u32,
}

/// Sizes of a memory device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize {
    /// What the guest has plugged.
    pub plugged: u64,
    /// What it was asked to plug.
    pub requested: u64,
}

/// A call that a vCPU is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where the vCPU is, or where the call returns to.
    pub address: u64,
    /// Frame pointers led there.
    pub reliable: bool,
}

/// Where a virtual address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub physical: u64,
    /// Writing is allowed.
    pub writable: bool,
    /// Programs are allowed.
    pub user: bool,
    /// Fetching instructions is allowed.
    pub executable: bool,
}

impl Guest {
    /// Waits for an answer of the manager or the component.
    fn ask<T>(
        &mut self,
        what: &str,
        question: impl Future<Output = Result<T, capnp::Error>>,
    ) -> Result<T, HarnessError> {
        let answer = self.manager.within(PATIENCE, question)?;
        Ok(answer.ok_or_else(|| self.timed_out(what, PATIENCE))??)
    }

    fn balloon(&mut self) -> Result<balloon_controller::Client, HarnessError> {
        let question = self.guest.balloon_controller_request().send().promise;
        let answer = self.ask("finding the balloon", question)?;
        Ok(answer.get()?.outcome()?.get_controller()?)
    }

    /// Asks the guest for a balloon of so many pages.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn request_balloon(&mut self, pages: u32) -> Result<(), HarnessError> {
        let mut request = self.balloon()?.request_balloon_size_request();
        request.get().set_pages(pages);
        let answer = self.ask("asking for a balloon", request.send().promise)?;
        Ok(read_completion(answer.get()?)?)
    }

    /// How large the balloon is.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn balloon_size(&mut self) -> Result<BalloonSize, HarnessError> {
        use balloon_controller::size_result::Which;
        let question = self.balloon()?.get_balloon_size_request().send().promise;
        let answer = self.ask("the balloon's size", question)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Size(size) => Ok(BalloonSize {
                current: size.get_current_pages(),
                requested: size.get_requested_pages(),
            }),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// What the guest says about its memory: tags of virtio 1.2, section 5.5.6.4, and values.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn balloon_statistics(&mut self) -> Result<Vec<(u16, u64)>, HarnessError> {
        use balloon_controller::stats_result::Which;
        let question = self.balloon()?.get_mem_stats_request().send().promise;
        let answer = self.ask("the guest's statistics", question)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Stats(stats) => Ok(stats?.iter().map(|stat| (stat.get_tag(), stat.get_value())).collect()),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// What the figures have of the guest's memory: bytes by the host's count, and what the guest said last, as [`Self::balloon_statistics`] tells it.
    /// The guest is not asked.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn told_memory(&mut self) -> Result<(u64, Vec<(u16, u64)>), HarnessError> {
        use statistics::stats_result::Which;
        let figures = self.guest.statistics_request().send().pipeline.get_statistics();
        let answer = self.ask("the guest's figures", figures.get_request().send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Stats(stats) => {
                let stats = stats?;
                let told = stats.get_devices()?.get_balloon()?.get_memory()?;
                let told = told.iter().map(|stat| (stat.get_tag(), stat.get_value())).collect();
                Ok((stats.get_memory()?.get_guest(), told))
            }
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    fn debug(&self) -> debug::Client {
        self.guest.debug_request().send().pipeline.get_debug()
    }

    /// Guest memory by virtual address, as a vCPU sees it.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn read_virtual(&mut self, vcpu: u8, address: u64, length: u32) -> Result<Vec<u8>, HarnessError> {
        use debug::memory_result::Which;
        let mut request = self.debug().read_virtual_request();
        request.get().set_vcpu(vcpu);
        request.get().set_address(address);
        request.get().set_length(length);
        let answer = self.ask("reading memory", request.send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Bytes(bytes) => Ok(bytes?.to_vec()),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// Where a virtual address leads, as a vCPU sees it.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn translate(&mut self, vcpu: u8, address: u64) -> Result<Translation, HarnessError> {
        use debug::translate_result::Which;
        let mut request = self.debug().translate_request();
        request.get().set_vcpu(vcpu);
        request.get().set_address(address);
        let answer = self.ask("translating an address", request.send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Translation(found) => {
                let found = found?;
                Ok(Translation {
                    physical: found.get_physical(),
                    writable: found.get_writable(),
                    user: found.get_user(),
                    executable: found.get_executable(),
                })
            }
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// The calls that a vCPU is in, innermost first, and why they end there.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn stack(&mut self, vcpu: u8, most: u16) -> Result<(Vec<Frame>, String), HarnessError> {
        use debug::stack_result::Which;
        let mut request = self.debug().stack_request();
        request.get().set_vcpu(vcpu);
        request.get().set_most(most);
        let answer = self.ask("reading the stack", request.send().promise)?;
        let stack = answer.get()?;
        let end = String::from_utf8_lossy(stack.get_end()?.as_bytes()).into_owned();
        match stack.which().map_err(capnp::Error::from)? {
            Which::Frames(frames) => {
                let frames = frames?.iter().map(|frame| Frame {
                    address: frame.get_address(),
                    reliable: frame.get_reliable(),
                });
                Ok((frames.collect(), end))
            }
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// Guest memory by physical address.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn read_physical(&mut self, address: u64, length: u32) -> Result<Vec<u8>, HarnessError> {
        use debug::memory_result::Which;
        let mut request = self.debug().read_physical_request();
        request.get().set_address(address);
        request.get().set_length(length);
        let answer = self.ask("reading memory", request.send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Bytes(bytes) => Ok(bytes?.to_vec()),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    fn memory_device(&mut self) -> Result<mem_controller::Client, HarnessError> {
        let question = self.guest.mem_controller_request().send().promise;
        let answer = self.ask("finding the memory device", question)?;
        Ok(answer.get()?.outcome()?.get_controller()?)
    }

    /// Asks the guest to have so many bytes plugged.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn request_memory(&mut self, bytes: u64) -> Result<(), HarnessError> {
        let mut request = self.memory_device()?.request_size_request();
        request.get().set_bytes(bytes);
        let answer = self.ask("asking for memory", request.send().promise)?;
        Ok(read_completion(answer.get()?)?)
    }

    /// How much memory is plugged.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn memory_size(&mut self) -> Result<MemorySize, HarnessError> {
        use mem_controller::size_result::Which;
        let question = self.memory_device()?.get_mem_size_request().send().promise;
        let answer = self.ask("the memory device's size", question)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Size(size) => {
                let size = size?;
                Ok(MemorySize {
                    plugged: size.get_plugged_size(),
                    requested: size.get_requested_size(),
                })
            }
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// Asks until `condition` holds for what `question` tells; for sizes, which a guest reaches in its own time.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`] with the last answer; what the guest manager answered.
    pub fn wait_until_it_tells<T: std::fmt::Debug>(
        &mut self,
        patience: Duration,
        mut question: impl FnMut(&mut Self) -> Result<T, HarnessError>,
        condition: impl Fn(&T) -> bool,
    ) -> Result<T, HarnessError> {
        let deadline = Instant::now() + patience;
        loop {
            let answer = question(self)?;
            if condition(&answer) {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                return Err(self.timed_out(&format!("a change of {answer:?}"), patience));
            }
            // The guest needs the processor to get there.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Gives a disk another size.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn resize_disk(&mut self, disk: &str, bytes: u64) -> Result<(), HarnessError> {
        let question = self.guest.disk_controller_request().send().promise;
        let answer = self.ask("finding the disks", question)?;
        let disks: disk_controller::Client = answer.get()?.outcome()?.get_controller()?;
        let mut request = disks.resize_request();
        request.get().set_disk(disk);
        request.get().set_bytes(bytes);
        let answer = self.ask("resizing a disk", request.send().promise)?;
        Ok(read_completion(answer.get()?)?)
    }

    /// Plugs a network device's cable in or out.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn set_link(&mut self, network: &str, up: bool) -> Result<(), HarnessError> {
        let question = self.guest.net_controller_request().send().promise;
        let answer = self.ask("finding the network devices", question)?;
        let networks: net_controller::Client = answer.get()?.outcome()?.get_controller()?;
        let mut request = networks.set_link_request();
        request.get().set_network(network);
        request.get().set_up(up);
        let answer = self.ask("setting a link", request.send().promise)?;
        Ok(read_completion(answer.get()?)?)
    }

    fn console(&mut self, port: u32) -> Result<console::Client, HarnessError> {
        let mut request = self.guest.console_request();
        request.get().set_port(port);
        let answer = self.ask("finding a console port", request.send().promise)?;
        Ok(answer.get()?.outcome()?.get_console()?)
    }

    /// Types on a port of the virtio console.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn type_on_console(&mut self, port: u32, text: &str) -> Result<(), HarnessError> {
        let mut request = self.console(port)?.cast_to::<serial::Client>().write_request();
        request.get().set_bytes(text.as_bytes());
        self.ask("taking the typed text", request.send())
    }

    /// Both ways of a port of the virtio console as a stream: what the guest has printed and is still kept, what it prints from now on, and
    /// what is typed.
    ///
    /// # Errors
    /// What the guest manager answered.
    pub fn open_console(&mut self, port: u32) -> Result<UnixStream, HarnessError> {
        use serial::open_result::Which;
        let request = self.console(port)?.cast_to::<serial::Client>().open_request();
        let answer = self.ask("opening a console port", request.send().promise)?;
        match answer.get()?.which().map_err(capnp::Error::from)? {
            Which::Fd(fd) => self.manager.take_fd(fd?.get_number()).map(UnixStream::from),
            Which::Error(error) => Err(Error::read(error?)?.into()),
        }
    }

    /// Waits until a port of the virtio console has printed `text`, and returns everything that it printed and still keeps.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`], [`HarnessError::Ended`].
    pub fn wait_for_on_console(&mut self, port: u32, text: &str, patience: Duration) -> Result<String, HarnessError> {
        let console: output::Client = self.console(port)?.cast_to();
        let deadline = Instant::now() + patience;
        let (mut printed, mut position) = (Vec::new(), 0);
        loop {
            let so_far = String::from_utf8_lossy(&printed).into_owned();
            if so_far.contains(text) {
                return Ok(so_far);
            }
            let what = format!("the text {text:?} on console port {port} after {so_far:?}");
            let mut request = console.read_request();
            request.get().set_position(position);
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = self.manager.within(left, request.send().promise)?;
            let answer = answer.ok_or_else(|| self.timed_out(&what, patience))??;
            let piece = answer.get()?;
            printed.extend_from_slice(piece.get_bytes()?);
            position = piece.get_position() + piece.get_bytes()?.len() as u64;
            if piece.get_ended() {
                return Err(HarnessError::Ended {
                    what,
                    how: self.wait(PATIENCE)?.detail,
                    output: self.output(),
                });
            }
        }
    }
}
