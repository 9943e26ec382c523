//! A virtio device driven by a guest through all of the machine: PCI configuration, doorbells that ring in the kernel, messages by irqfd.
//!
//! ```text
//!   0x100000  set-up, CPL 0: tables, then to CPL 3        0x110000  GDT, pointers for it and the IDT at 0x110f00
//!   0x101000  interrupt handler, CPL 0                    0x111000  IDT          0x112000  TSS
//!   0x102000  driver, CPL 3                               0x113000  the driver's script
//!   0x118000  interrupts seen, and how many end the test  0x120000  rings        0x130000  buffer
//! ```
//!
//! The driver first writes what its script says, which the test makes: address, value and width, line by line. Then it makes one request after
//! the other and waits for the interrupt of each. The handler ends the guest with the first byte that the device wrote.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sepal_devices::dispatch::DeviceEvent;
use sepal_devices::virtio::device::{Context, DeviceKind, Fault, VirtioDevice};
use sepal_devices::virtio::feature;
use sepal_devices::virtio::violation::Violation;
use sepal_vmm_component::layout;
use sepal_vmm_component::machine::{DeviceSpec, ExitReason, Happening, ResetCause, Stopped};

use crate::guests::{self, guest};
use crate::rig::{Rig, kvm};

guest!(
    /// Loads the tables, lets user mode at all memory, and goes there.
    set_up, "sepal_virtio_set_up", "sepal_virtio_set_up_end",
    [
        "mov $0x180000, %esp",
        "lgdt 0x110f00", "lidt 0x110f10", "mov $0x30, %ax", "ltr %ax",
        "mov %cr3, %rsi", "mov $3072, %ecx",
        "1: orq $4, (%rsi)", "add $8, %rsi", "dec %ecx", "jnz 1b",
        "mov %cr3, %rax", "mov %rax, %cr3",
        "mov $0xfee00000, %ebx", "movl $0x1ff, 0xf0(%rbx)",
        "pushq $0x23", "pushq $0x190000", "pushq $0x202", "pushq $0x2b", "pushq $0x102000", "iretq",
    ]
);

guest!(
    /// Counts interrupts: messages all, those by the pin only if the ISR register has one, since a level may interrupt once too often. After the
    /// last one writes what the device wrote, and resets.
    handler, "sepal_virtio_handler", "sepal_virtio_handler_end",
    [
        "push %rax", "push %rdx", "push %rbx",
        "testb $1, 0x118018", "jnz 3f",
        "mov 0x118010, %rbx", "testb $1, (%rbx)", "jz 2f",
        "3: incq 0x118000",
        "2: mov $0xfee00000, %ebx", "movl $0, 0xb0(%rbx)",
        "mov 0x118000, %rax", "cmp 0x118008, %rax", "jb 1f",
        "mov $0x3f8, %edx", "mov 0x130000, %al", "out %al, (%dx)",
        "mov $0xfe, %al", "out %al, $0x64",
        "1: pop %rbx", "pop %rdx", "pop %rax", "iretq",
    ]
);

guest!(
    /// Follows the script, then makes requests.
    driver, "sepal_virtio_driver", "sepal_virtio_driver_end",
    [
        "mov $0x113000, %esi",
        "1: mov (%rsi), %rdi", "mov 8(%rsi), %rax", "mov 16(%rsi), %rcx", "add $24, %rsi",
        "test %rcx, %rcx", "jz 5f",
        "cmp $1, %ecx", "je 2f", "cmp $2, %ecx", "je 3f", "cmp $4, %ecx", "je 4f",
        "mov %rax, (%rdi)", "jmp 1b",
        "2: mov %al, (%rdi)", "jmp 1b",
        "3: mov %ax, (%rdi)", "jmp 1b",
        "4: mov %eax, (%rdi)", "jmp 1b",
        // RDI is the doorbell now. The only chain is the one of descriptor 0.
        "5: xor %r12d, %r12d", "xor %eax, %eax",
        "6: inc %r12", "mov %r12w, 0x120102", "mov %ax, (%rdi)",
        "7: pause", "cmp 0x118000, %r12", "jne 7b",
        "cmp 0x118008, %r12", "jne 6b",
        "8: pause", "jmp 8b",
    ]
);

/// Where the device's BAR is at first, and its parts.
const BAR: u64 = layout::PCI_WINDOW.start;
const ISR: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
/// Configuration space of the first device.
const CONFIG: u64 = layout::ECAM + 0x8000;
/// The vector that the handler serves.
const VECTOR: u64 = 0x40;

/// What the driver writes: address, value, bytes.
#[derive(Default)]
struct Script(Vec<(u64, u64, u64)>);

impl Script {
    fn write(&mut self, address: u64, value: u64, bytes: u64) {
        self.0.push((address, value, bytes));
    }

    /// Up to the enabled queue, with the rings at 0x120000.
    fn set_up(&mut self, descriptor_address: u64) {
        // A bus master, whose memory is there.
        self.write(CONFIG + 4, 6, 2);
        let common = |offset| BAR + offset;
        for status in [1, 3] {
            self.write(common(0x14), status, 1);
        }
        // Version 1 and nothing else: no event index, so that the driver need not keep one.
        self.write(common(0x08), 1, 4);
        self.write(common(0x0c), feature::VERSION_1 >> 32, 4);
        self.write(common(0x14), 11, 1);
        self.write(common(0x16), 0, 2);
        self.write(common(0x18), 8, 2);
        self.write(common(0x1a), 0, 2);
        for (offset, address) in [(0x20, 0x12_0000), (0x28, 0x12_0100), (0x30, 0x12_0200)] {
            self.write(common(offset), address, 4);
            self.write(common(offset + 4), 0, 4);
        }
        self.write(common(0x1c), 1, 2);
        // Descriptor 0: 16 bytes for the device to write.
        self.write(0x12_0000, descriptor_address, 8);
        self.write(0x12_0008, 2 << 32 | 16, 8);
    }

    /// The message of vector 0, and MSI-X on.
    fn message(&mut self) {
        for (word, value) in (0..).zip([0xfee0_0000, 0, VECTOR, 0]) {
            self.write(BAR + TABLE + 4 * word, value, 4);
        }
        self.write(CONFIG + 0x42, 0x8000, 2);
        // Nothing to read.
        self.write(0x11_8018, 1, 8);
    }

    /// A kernel that drives the device like this, `requests` times, with the BAR at `bar` in the end.
    fn kernel(mut self, bar: u64, requests: u64) -> Vec<u8> {
        self.write(bar + 0x14, 15, 1);
        self.write(0x11_8010, bar + ISR, 8);
        self.write(0x11_8008, requests, 8);
        self.write(bar + NOTIFY, 0, 0);
        let mut image = Image(set_up());
        image.put(0x10_1000, &handler());
        image.put(0x10_2000, &driver());
        // Null, null, code, data, user data, user code, task state.
        let tss = 0x11_2000_u64;
        let segments = [
            0,
            0,
            0x00af_9a00_0000_ffff,
            0x00cf_9200_0000_ffff,
            0x00cf_f200_0000_ffff,
            0x00af_fa00_0000_ffff,
            0x0000_8900_0000_0067 | (tss & 0xff_ffff) << 16,
            0,
        ];
        image.put_words(0x11_0000, &segments);
        image.put(0x11_0f00, &pointer(0x11_0000, 8 * 8));
        image.put(0x11_0f10, &pointer(0x11_1000, 256 * 16));
        // An interrupt gate to the handler.
        image.put_words(0x11_1000 + 16 * VECTOR, &[0x0010_8e00_0010_1000]);
        // The stack of CPL 0.
        image.put(tss + 4, &0x18_0000_u64.to_le_bytes());
        let words: Vec<u64> = self.0.iter().flat_map(|line| [line.0, line.1, line.2]).collect();
        image.put_words(0x11_3000, &words);
        image.put(0x11_8000, &[0; 32]);
        image.0
    }
}

/// What is loaded at [`guests::BASE`].
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - guests::BASE) as usize;
        if self.0.len() < at + bytes.len() {
            self.0.resize(at + bytes.len(), 0);
        }
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_words(&mut self, address: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(address, &bytes);
    }
}

/// What LGDT and LIDT read.
fn pointer(base: u64, bytes: u16) -> Vec<u8> {
    let mut pointer = (bytes - 1).to_le_bytes().to_vec();
    pointer.extend(base.to_le_bytes());
    pointer
}

/// Writes a letter into each request.
pub(crate) struct Stamp {
    pub(crate) served: Arc<AtomicU64>,
}

impl VirtioDevice for Stamp {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn notify(&mut self, queue: u16, context: &mut Context<'_>) -> Result<(), Fault> {
        let memory = context.memory;
        while let Some(ring) = context.queue(queue)
            && let Some(chain) = ring.pop()?
        {
            chain.writer(memory).write(b"V").map_err(|error| Violation::Device {
                queue,
                reason: error.to_string(),
            })?;
            ring.push(chain, 1)?;
            self.served.fetch_add(1, Ordering::Relaxed);
            context.interrupt(queue)?;
        }
        Ok(())
    }

    fn reset(&mut self, _: &mut Context<'_>) {}
}

/// Runs a guest with one such device: how it ended, what it wrote, what it cost, how many requests the device served.
fn run(kvm: &kvm_ioctls::Kvm, kernel: &[u8]) -> (Happening, Vec<u8>, Stopped, u64) {
    let served = Arc::new(AtomicU64::new(0));
    let device = Stamp {
        served: Arc::clone(&served),
    };
    let mut rig = Rig::make(kvm, kernel, 1, |config| {
        config.devices = vec![DeviceSpec {
            name: "stamp".to_owned(),
            device: Box::new(device),
        }];
    })
    .expect("the machine is made");
    rig.machine.start().expect("the machine starts");
    let what = rig.next();
    let (stopped, output) = rig.stop();
    (what, output, stopped, served.load(Ordering::Relaxed))
}

/// How many requests a guest makes.
pub(crate) const REQUESTS: u64 = 1000;

/// A kernel that drives the first device by messages, [`REQUESTS`] times.
pub(crate) fn kernel_of_requests() -> Vec<u8> {
    let mut script = Script::default();
    script.set_up(0x13_0000);
    script.message();
    script.kernel(BAR, REQUESTS)
}

fn check(kernel: &[u8], most_exits: u64) {
    let Some(kvm) = kvm() else { return };
    let start = Instant::now();
    let (ending, output, stopped, served) = run(&kvm, kernel);
    let took = start.elapsed();
    assert!(
        matches!(ending, Happening::Reset { how: ResetCause::I8042 }),
        "{ending:?}"
    );
    assert_eq!(output, b"V");
    assert_eq!(served, REQUESTS);
    let exits = stopped.stats.vcpus[0].exits_for(ExitReason::Mmio);
    println!("{REQUESTS} requests in {took:?}, {exits} exits for memory");
    assert!(
        exits <= most_exits,
        "{exits} exits: a doorbell or a message took the long way"
    );
}

#[test]
fn doorbells_and_messages_stay_in_the_kernel() {
    check(&kernel_of_requests(), 100);
}

#[test]
fn doorbells_move_with_the_bar() {
    let mut script = Script::default();
    script.set_up(0x13_0000);
    script.message();
    let moved = BAR + 0x40_0000;
    script.write(CONFIG + 0x10, moved, 4);
    check(&script.kernel(moved, REQUESTS), 100);
}

#[test]
fn the_pin_interrupts_a_guest_without_msi_x() {
    let mut script = Script::default();
    script.set_up(0x13_0000);
    // Level-triggered, as PCI's are.
    let pin = u64::from(layout::PCI_GSI) + 1;
    for (index, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, 0x8000 | VECTOR)] {
        script.write(layout::IOAPIC, index, 4);
        script.write(layout::IOAPIC + 0x10, value, 4);
    }
    // One for each interrupt: the ISR register. Hosts without hardware virtualization may interrupt once more than the level asks for, if the
    // vCPU's thread was preempted just then.
    check(&script.kernel(BAR, REQUESTS), 2 * REQUESTS);
}

#[test]
fn a_buffer_outside_of_memory_is_reported_and_the_guest_goes_on() {
    let Some(kvm) = kvm() else { return };
    let mut script = Script::default();
    script.set_up(0x7000_0000);
    script.message();
    // The interrupt that it waits for is the one for the changed status, whose vector is not set: it waits for ever.
    let kernel = script.kernel(BAR, 1);
    let served = Arc::new(AtomicU64::new(0));
    let mut rig = Rig::make(&kvm, &kernel, 1, |config| {
        config.devices = vec![DeviceSpec {
            name: "stamp".to_owned(),
            device: Box::new(Stamp { served }),
        }];
    })
    .expect("the machine is made");
    rig.machine.start().expect("the machine starts");
    let Happening::Device(DeviceEvent::NeedsReset { device, reason }) = rig.next() else {
        panic!("not that event");
    };
    assert_eq!(device, "stamp");
    assert!(reason.contains("0x70000000 is not in guest memory"), "{reason}");
    rig.stop();
}
