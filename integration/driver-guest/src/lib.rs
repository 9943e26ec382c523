//! The driver guest: a small x86-64 kernel that drives virtio devices with the crate `virtio-drivers`, an implementation independent of
//! this project's, and says on the serial port how each test went.
//!
//! [`IMAGE`] is an ELF64 file for PVH and Linux's 64-bit protocol, as the default guest's, and for QEMU's `-kernel`, so that the same
//! guest measures both. It runs at CPL 3, at native speed also where KVM emulates CPL 0. Give it 128 MiB.
//!
//! # On the kernel command line
//!
//! - `run=COMMAND,COMMAND,...` with each `NAME[@DEVICE][:ARGUMENT]...`: DEVICE counts the devices of a kind from 0, in the order of the bus. Without
//!   that word the commands are what the initial RAM file system holds as text, with commas, blanks or line ends between them.
//! - `pci=ports` uses the ports 0xcf8 and 0xcfc instead of ECAM; `pci=HEX` names ECAM's address, which otherwise ACPI does.
//!
//! # On the serial port
//!
//! `DRIVERS N devices`, then a line for each command: `ok NAME KEY=VALUE...` or `fail NAME REASON`; `waiting ...` where the host has
//! something to do first; `DONE` at the end, when the guest powers off. An exception or a panic prints `fail guest ...` and resets.
//!
//! | command | what it does |
//! |---|---|
//! | `pci` | lists the virtio devices |
//! | `pci-ways` | compares ECAM and the configuration ports |
//! | `bar-move[@N]` | moves the N-th device's first BAR, and back (N counts all devices) |
//! | `msix[@N]` | block requests that complete by MSI-X, with masks and pending bits |
//! | `intx[@N]:GSI` | block requests that complete by the interrupt pin, which is that pin of the IOAPIC |
//! | `blk-info` | `capacity=` in sectors, `ro=`, `id=` |
//! | `blk-rw[:SEED]` | writes, flushes and reads in eight places |
//! | `blk-fill:SECTOR:COUNT[:SEED]` | byte `i` of sector `s` becomes `(SEED + 7 s + i) mod 251`; flushes |
//! | `blk-sum[:SECTOR:COUNT]` | `fnv=`: FNV-1a, 64 bits, of the sectors |
//! | `blk-ro` | the device says that it is read-only; a write is an I/O error |
//! | `blk-past-end`, `blk-error:SECTOR` | reads past the end, or of that sector, are I/O errors |
//! | `blk-zero[:SECTOR:COUNT]`, `blk-discard[:SECTOR:COUNT]` | fills, then writes zeroes or discards; `left=` bytes that are not zero |
//! | `blk-wait-size:SECTORS` | waits until the capacity is that |
//! | `blk-reset-in-flight[:ROUNDS]`, `blk-queue-reset` | device and queue reset with a full queue |
//! | `blk-bench:BYTES:DEPTH:OP:COUNT` | OP `r`, `w`, `sr`, `sw`; `median_us=` an operation |
//! | `rng[:BYTES[:PIECE]]` | entropy |
//! | `console[:TEXT]` | writes a line, reads a line: `got=` |
//! | `console-bulk[:BYTES[:PIECE]]` | writes the counter 0, 1, ... modulo 251 |
//! | `console-take[:BYTES]` | reads what `console-bulk` would write |
//! | `console-ping[:COUNT[:BYTES]]` | writes what the host sends back: `median_us=` |
//! | `console-ports[:TEXT]` | several ports: writes `TEXT-N` to each, reads a line from each: `names=`, `got=`, joined by `+` |
//! | `net-info` | `mac=` |
//! | `net-ping:OWN:PEER[:COUNT[:BYTES]]` | ARP and pings, `median_us=`, `p90_us=` |
//! | `net-serve:OWN` | answers ARP and pings, echoes UDP port 7, until UDP comes to port 9 |
//! | `net-tx:OWN:PEER[:BYTES[:COUNT]]`, `net-rx:OWN[:BYTES[:COUNT]]` | UDP datagrams to port 9: `pps=`, `mbit_s=` |
//! | `vsock-echo:PORT[:BYTES]` | connects to the host, which echoes |
//! | `vsock-listen:PORT` | echoes to the host |
//! | `vsock-refused:PORT` | nobody listens there |
//! | `vsock-bulk:PORT[:BYTES[:out\|in]]` | `mb_s=`; in both directions whoever receives reads to the end |
//! | `vsock-ping:PORT[:COUNT[:BYTES]]` | writes what the host echoes: `median_us=` |
//! | `balloon[:PAGES]` | inflates to what the host asks for, then deflates when it asks for nothing |
//! | `balloon-bench:MIB[:scattered]` | inflates and deflates when the host asks: `inflate_us=`, `deflate_us=`, `write_us=` to each page again |
//! | `balloon-stats[:TIMES]` | answers questions for statistics |
//! | `balloon-report[:MIB]` | free page reporting: `zero=` of `pages=` read as zero after it |
//! | `mem[:MIB]` | virtio-mem: plugs what the host asks for, uses it, unplugs when it asks for nothing |
//! | `hostile:KIND[:QUEUE]` | rings against the rules: `refused=` with DEVICE_NEEDS_RESET, `used=`, `ignored=`; resets after each |
//! | `serial-bulk[:BYTES]` | prints so many bytes, looking for room before each: `bytes_s=` |
//! | `serial-line` | reads a line from the serial port: `got=` |
//! | `console-say:PORT:TEXT` | several ports: writes a line to one: `names=`, `open=` |
//! | `console-echo:PORT[:BYTES]` | several ports: sends back what one receives, until it was so many bytes |
//! | `memory` | `mib=` usable, `ranges=` |
//! | `mem-sum:ADDRESS:BYTES` | `fnv=` of guest memory |
//! | `mem-fill:ADDRESS:BYTES[:SEED]` | byte `i` becomes `(SEED + i) mod 251` |
//! | `mem-wait:ADDRESS:VALUE` | until the host has made the byte there that value |
//! | `instance-id` | `id=` as the ACPI device SEPL0002 tells it, or `none` |
//! | `hang`, `halt` | runs or halts for ever |
//! | `reset[:acpi\|i8042\|triple-fault]`, `crash` | resets; makes its vCPU fail |
//! | `watchdog[:MILLISECONDS]` | arms the watchdog and does not feed it |
//! | `say:TEXT` | `ok say TEXT` |

/// The guest, an ELF64 executable; see the crate's head for what it does.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/driver-guest.elf"));
