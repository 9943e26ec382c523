//! The least machine that runs the default guest: KVM with a split irqchip, a 16550, an IOAPIC that sends MSIs, a clock
//! that stands still, ACPI's registers and tables, and the PVH or Linux 64-bit entry.
//!
//! One thread a vCPU; a test types, presses the power button and waits for output or for the end on a condition variable. Dropping
//! the machine stops every thread.

mod devices;
mod load;

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use devices::Devices;
pub(crate) use load::Protocol;

/// Longest that a test waits for something that must happen; only a failing test gets there.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the machine is made of.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) memory_mib: u64,
    pub(crate) vcpus: u8,
    pub(crate) command_line: String,
    pub(crate) acpi: bool,
    pub(crate) protocol: Protocol,
    pub(crate) serial: bool,
    /// KVM's clock is offered, but switching it on is an exception.
    pub(crate) broken_clock: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 32,
            vcpus: 1,
            command_line: String::new(),
            acpi: true,
            protocol: Protocol::Pvh,
            serial: true,
            broken_clock: false,
        }
    }
}

/// How the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// This byte was written to the sleep control register.
    SleepControl(u8),
    /// This byte was written to the ACPI reset register.
    AcpiReset(u8),
    /// The keyboard controller's reset command.
    I8042Reset,
    /// KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR with its suberror.
    InternalError(u32),
    /// An exit that no guest of ours should make.
    Unexpected(String),
}

#[derive(Default)]
struct Seen {
    output: Vec<u8>,
    first_byte: Option<Instant>,
    end: Option<End>,
}

struct Shared {
    vm: VmFd,
    devices: Mutex<Devices>,
    seen: Mutex<Seen>,
    changed: Condvar,
    exits: AtomicU64,
    stop: AtomicBool,
    _memory: GuestMemoryMmap,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, msi: Option<kvm_msi>) {
        if let Some(msi) = msi {
            self.vm.signal_msi(msi).expect("KVM_SIGNAL_MSI");
        }
    }

    fn write(&self, port: u16, data: &[u8]) -> Option<End> {
        match port {
            0x3f8 if !self.devices().divisor_latch() => {
                let mut seen = self.seen();
                seen.first_byte.get_or_insert_with(Instant::now);
                seen.output.extend_from_slice(data);
                self.changed.notify_all();
                None
            }
            0x64 if data == [0xfe] => Some(End::I8042Reset),
            0x600 if data[0] & 0x20 != 0 => Some(End::SleepControl(data[0])),
            0x602 => Some(End::AcpiReset(data[0])),
            _ => {
                let interrupt = self.devices().write_port(port, data);
                self.send(interrupt);
                None
            }
        }
    }

    fn run(&self, vcpu: &mut VcpuFd) -> Option<End> {
        while !self.stop.load(Ordering::Acquire) {
            let exit = vcpu.run();
            self.exits.fetch_add(1, Ordering::Relaxed);
            let end = match exit {
                Ok(VcpuExit::IoOut(port, data)) => self.write(port, data),
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.devices().read_port(port, data);
                    None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    let interrupt = self.devices().write_mmio(address, data);
                    self.send(interrupt);
                    None
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.devices().read_mmio(address, data);
                    None
                }
                Ok(VcpuExit::Shutdown) => Some(End::TripleFault),
                Ok(VcpuExit::InternalError) => {
                    // SAFETY: KVM fills `internal` on this exit.
                    Some(End::InternalError(unsafe {
                        vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror
                    }))
                }
                Ok(VcpuExit::IoapicEoi(_)) => None,
                Ok(other) => Some(End::Unexpected(format!("{other:?}"))),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
                Err(error) => Some(End::Unexpected(format!("KVM_RUN: {error}"))),
            };
            if end.is_some() {
                return end;
            }
        }
        None
    }
}

/// A running guest.
pub(crate) struct Machine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    started: Instant,
    read: usize,
}

/// Whether tests can run; says so when they cannot.
pub(crate) fn kvm_missing() -> bool {
    let missing = !std::path::Path::new("/dev/kvm").exists();
    if missing {
        println!("skipped: no /dev/kvm");
    }
    missing
}

impl Machine {
    /// Starts the default guest.
    pub(crate) fn start(options: &Options) -> Self {
        let kvm = Kvm::new().expect("/dev/kvm");
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        // Intel hosts need it; inside the hole.
        vm.set_tss_address(0xfffb_d000).expect("KVM_SET_TSS_ADDR");
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            args: [24, 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&split).expect("split irqchip");
        if options.broken_clock {
            let clock = MsrFilterRange {
                flags: MsrFilterRangeFlags::WRITE,
                base: 0x4b56_4d01,
                msr_count: 1,
                bitmap: &[0],
            };
            vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[clock])
                .expect("KVM_X86_SET_MSR_FILTER");
        }
        let memory = load::memory(options.memory_mib);
        for (slot, region) in memory.iter().enumerate() {
            let host = memory
                .get_host_address(region.start_addr())
                .expect("a region's start is in the region");
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the mapping lives in Shared beside the VM until all vCPU threads have ended.
            unsafe { vm.set_user_memory_region(slot) }.expect("KVM_SET_USER_MEMORY_REGION");
        }
        load::image(&memory, sepal_default_guest::IMAGE);
        let mut cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .expect("KVM_GET_SUPPORTED_CPUID");
        let mut vcpus = Vec::new();
        for id in 0..options.vcpus {
            let vcpu = vm.create_vcpu(u64::from(id)).expect("KVM_CREATE_VCPU");
            for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
                entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24;
            }
            vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");
            // Some hosts start an application processor only once its local APIC has been set.
            let lapic = vcpu.get_lapic().expect("KVM_GET_LAPIC");
            vcpu.set_lapic(&lapic).expect("KVM_SET_LAPIC");
            vcpus.push(vcpu);
        }
        load::boot(&memory, &vcpus[0], options);
        let shared = Arc::new(Shared {
            vm,
            devices: Mutex::new(Devices::new(options.serial)),
            seen: Mutex::default(),
            changed: Condvar::new(),
            exits: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            _memory: memory,
        });
        catch_kicks();
        let started = Instant::now();
        let threads = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let end = shared.run(&mut vcpu);
                    if end.is_some() {
                        shared.seen().end = end;
                        shared.changed.notify_all();
                    }
                })
            })
            .collect();
        Self {
            shared,
            threads,
            started,
            read: 0,
        }
    }

    /// Types on the serial console, as fast as the port takes it.
    pub(crate) fn type_in(&self, bytes: impl AsRef<[u8]>) {
        let interrupt = self.shared.devices().receive(bytes.as_ref());
        self.shared.send(interrupt);
    }

    /// Presses the ACPI power button.
    pub(crate) fn press_power_button(&self) {
        let interrupt = self.shared.devices().press_power_button();
        self.shared.send(interrupt);
    }

    /// Waits for `text` and returns all output since the last wait, up to and with it.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let shared = Arc::clone(&self.shared);
        let mut seen = shared.seen();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let fresh = &seen.output[self.read..];
            if let Some(at) = fresh.windows(text.len()).position(|window| window == text.as_bytes()) {
                let found = String::from_utf8_lossy(&fresh[..at + text.len()]).into_owned();
                self.read += at + text.len();
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let said = String::from_utf8_lossy(fresh);
            assert!(
                seen.end.is_none(),
                "the guest ended ({:?}) before it said {text:?}; it said {said:?}",
                seen.end
            );
            assert!(!left.is_zero(), "the guest did not say {text:?} but {said:?}");
            seen = shared
                .changed
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until the guest has ended; returns how, and all output since the last wait.
    pub(crate) fn wait_for_end(&mut self) -> (End, String) {
        let mut seen = self.shared.seen();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = &seen.end {
                return (
                    end.clone(),
                    String::from_utf8_lossy(&seen.output[self.read..]).into_owned(),
                );
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the guest did not end");
            seen = self
                .shared
                .changed
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// How often KVM_RUN has returned, on all vCPUs.
    pub(crate) fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// From the first KVM_RUN to the first byte.
    pub(crate) fn time_to_first_byte(&self) -> Option<Duration> {
        self.shared.seen().first_byte.map(|at| at.duration_since(self.started))
    }

    /// Since the first KVM_RUN.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A kick that comes just before KVM_RUN is lost, so kick until the thread has gone.
            while !thread.is_finished() {
                kick(&thread);
            }
            thread.join().expect("a vCPU thread panicked");
        }
    }
}

/// Interrupts KVM_RUN and gives the thread time to notice.
fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread is not joined yet, so its pthread_t is valid; the signal has a handler.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
    std::thread::sleep(Duration::from_millis(1));
}

extern "C" fn kicked(_signal: libc::c_int) {}

/// Makes SIGUSR1 do nothing but interrupt KVM_RUN.
fn catch_kicks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: all zeroes is a valid sigaction; the handler does nothing, so it is safe in a signal.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = kicked as extern "C" fn(libc::c_int) as usize;
            assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
        }
    });
}

fn guest(address: u64) -> GuestAddress {
    GuestAddress(address)
}
