//! Whether the host can hold another guest: what guests were promised, what the manager's own limits are, and what a guest takes.
//!
//! ```text
//!   configuration --> Need --.
//!                            +--> admit: yes --> Promise: of memory until the guest is gone, of descriptors and tasks until it has them
//!   limits --------> Room ---'         no: an error with the numbers, and which limit to raise
//! ```
//!
//! The decision is pure; [`Capacity`] keeps the account of promises. Descriptors and tasks that a guest has are counted by the kernel, its memory is not: it
//! is used as the guest touches it.

use std::{cell::Cell, ops::Range, rc::Rc};

use sepal_schema::{
    config::{DEVICE_HOLE, GuestConfig},
    error::{Error, Kind},
};

/// Descriptors that are kept free for connections and for what the manager opens for a moment.
const SPARE_DESCRIPTORS: u64 = 64;
/// What each guest takes of the manager's descriptors, whatever it is made of: the component's socket, process and standard error, the serial port's wire,
/// kernel and initramfs; and as many again for the moment in which a component is given its own.
const DESCRIPTORS_OF_A_GUEST: u64 = 16;
/// What each console port, disk, network and other device takes: the manager's own, and one on its way to the component.
const DESCRIPTORS_OF_A_DEVICE: u64 = 2;
/// Tasks that are left to everybody else on the host.
const SPARE_TASKS: u64 = 32;

/// What a guest takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Memory that it can come to use of the host's, in bytes: its own, without what its client brings, and all that can be plugged.
    pub memory: u64,
    /// What of that is there from the start, in bytes.
    pub at_once: u64,
    /// Descriptors of the manager's.
    pub descriptors: u64,
    /// Threads of its component.
    pub tasks: u64,
}

impl Need {
    /// What a guest with this configuration takes.
    pub fn of(config: &GuestConfig) -> Self {
        let at_once = own_memory(config);
        let pluggable = config.memory_device.as_ref().map_or(0, |device| device.region_size);
        let ports = config.console.as_ref().map_or(0, |console| u64::from(console.ports()));
        let files: usize = config.disks.iter().map(|disk| 2 + disk.backing.len()).sum();
        let devices = config.bus_devices() as u64 + ports + files as u64 + config.custom_memory.len() as u64;
        Self {
            memory: at_once.saturating_add(pluggable),
            at_once,
            descriptors: DESCRIPTORS_OF_A_GUEST + DESCRIPTORS_OF_A_DEVICE * devices,
            tasks: config.least_tasks(),
        }
    }
}

/// Bytes of a guest's memory that are the host's to give: without the ranges in it that its client brings. Those above it come on top of it.
fn own_memory(config: &GuestConfig) -> u64 {
    let size = u64::from(config.memory_mib()) << 20;
    let low = size.min(DEVICE_HOLE.start);
    let ranges = [0..low, DEVICE_HOLE.end..DEVICE_HOLE.end + (size - low)];
    let within = |range: &Range<u64>, start: u64, end: u64| end.min(range.end).saturating_sub(start.max(range.start));
    let brought = config
        .custom_memory
        .iter()
        .flat_map(|custom| ranges.iter().map(move |range| within(range, custom.start, custom.end)));
    // They do not overlap each other, or the configuration would have been refused.
    size.saturating_sub(brought.sum())
}

/// What there is of something, and how much of it is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// In use.
    pub used: u64,
    /// The limit; none if there is none, or nobody can tell.
    pub most: Option<u64>,
}

impl Used {
    /// How much more there is of it; none if there is no limit.
    pub fn left(&self) -> Option<u64> {
        Some(self.most?.saturating_sub(self.used))
    }
}

/// What the host and the manager's limits leave for guests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Memory that guests were promised, in bytes, and what may be promised at most, if that was set.
    pub memory: Used,
    /// Memory that the host can give away without swapping, in bytes; none if it does not say.
    pub available: Option<u64>,
    /// The manager's descriptors, those that guests were promised included.
    pub descriptors: Used,
    /// Tasks, by the limit that is nearest, those that guests were promised included.
    pub tasks: Used,
}

/// Whether a guest fits.
///
/// # Errors
/// `GUEST_INITIALIZATION_FAILURE` about `memoryMib`: the host has less memory. `NO_RESOURCES`: one of the limits is reached; both with the numbers.
pub fn admit(need: &Need, room: &Room) -> Result<(), Error> {
    let mib = |bytes: u64| bytes >> 20;
    if let Some(available) = room.available.filter(|&available| need.at_once > available) {
        let (needed, available) = (need.at_once.div_ceil(1 << 20), mib(available));
        let message = format!("the guest needs {needed} MiB of memory, and the host has {available} MiB left");
        return Err(Error::new(Kind::GuestInitializationFailure, message).about("memoryMib"));
    }
    if let (Some(left), Some(most)) = (room.memory.left(), room.memory.most)
        && need.memory > left
    {
        let message = format!(
            "the guest may come to use {} MiB of memory; the guests that there are were promised {} of the {} MiB that this manager gives away (--max-memory)",
            need.memory.div_ceil(1 << 20),
            room.memory.used.div_ceil(1 << 20),
            mib(most)
        );
        return Err(Error::new(Kind::NoResources, message).about("memoryMib"));
    }
    if let (Some(left), Some(most)) = (room.descriptors.left(), room.descriptors.most)
        && need.descriptors + SPARE_DESCRIPTORS > left
    {
        let message = format!(
            "the guest takes about {} of the guest manager's descriptors, of which {} of {most} are in use or promised and {SPARE_DESCRIPTORS} are kept for \
             connections; raise its limit (ulimit -n, LimitNOFILE= of its service)",
            need.descriptors, room.descriptors.used
        );
        return Err(Error::new(Kind::NoResources, message).about("descriptors"));
    }
    if let (Some(left), Some(most)) = (room.tasks.left(), room.tasks.most)
        && need.tasks + SPARE_TASKS > left
    {
        let message = format!(
            "the guest's component has about {} threads; {} of the {most} tasks that there may be are there or promised, and {SPARE_TASKS} are kept for others; raise \
             the limit (kernel.pid_max, kernel.threads-max, ulimit -u, TasksMax= of its service)",
            need.tasks, room.tasks.used
        );
        return Err(Error::new(Kind::NoResources, message).about("tasks"));
    }
    Ok(())
}

/// How many guests of the ordinary kind (nothing but a disk and a network) there is room for by descriptors alone; none where those have no limit.
pub fn guests_by_descriptors(descriptors: Used) -> Option<u64> {
    let each = DESCRIPTORS_OF_A_GUEST + 5 * DESCRIPTORS_OF_A_DEVICE;
    Some(descriptors.left()?.saturating_sub(SPARE_DESCRIPTORS) / each)
}

/// The account of what guests were promised.
#[derive(Debug, Default)]
pub struct Capacity {
    account: Rc<Account>,
}

#[derive(Debug, Default)]
struct Account {
    memory: Cell<u64>,
    /// Descriptors that nobody counts yet.
    descriptors: Cell<u64>,
    /// Tasks that nobody counts yet.
    tasks: Cell<u64>,
}

fn more(of: &Cell<u64>, by: u64) {
    of.set(of.get().saturating_add(by));
}

fn less(of: &Cell<u64>, by: u64) {
    of.set(of.get().saturating_sub(by));
}

impl Capacity {
    /// Memory that guests were promised, in bytes.
    pub fn promised(&self) -> u64 {
        self.account.memory.get()
    }

    /// What is left when what guests were promised of it, and do not have yet, is taken from it.
    pub fn reserve(&self, descriptors: Used, tasks: Used) -> (Used, Used) {
        let with = |counted: Used, promised: &Cell<u64>| Used {
            used: counted.used.saturating_add(promised.get()),
            ..counted
        };
        (
            with(descriptors, &self.account.descriptors),
            with(tasks, &self.account.tasks),
        )
    }

    /// Notes that a guest was promised what it needs.
    pub fn promise(&self, need: &Need) -> Promise {
        more(&self.account.memory, need.memory);
        more(&self.account.descriptors, need.descriptors);
        more(&self.account.tasks, need.tasks);
        Promise {
            account: self.account.clone(),
            need: Cell::new(*need),
        }
    }
}

/// What a guest was promised. Dropping it gives that back.
#[derive(Debug)]
pub struct Promise {
    account: Rc<Account>,
    /// What of it nobody else counts.
    need: Cell<Need>,
}

impl Promise {
    /// The guest is there: its descriptors and tasks are among those that the kernel counts.
    pub fn is_kept(&self) {
        let need = self.need.get();
        less(&self.account.descriptors, need.descriptors);
        less(&self.account.tasks, need.tasks);
        self.need.set(Need {
            descriptors: 0,
            tasks: 0,
            ..need
        });
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.is_kept();
        less(&self.account.memory, self.need.get().memory);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sepal_schema::config::{File, MemoryBacking, device};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn used(used: u64, most: u64) -> Used {
        Used { used, most: Some(most) }
    }

    fn plenty() -> Room {
        Room {
            memory: Used::default(),
            available: Some(1 << 40),
            descriptors: used(100, 20_000),
            tasks: used(200, 30_000),
        }
    }

    fn small() -> Need {
        Need::of(&GuestConfig {
            memory_mib: 16,
            ..GuestConfig::default()
        })
    }

    #[test]
    fn a_guest_takes_what_its_configuration_says() {
        let plain = small();
        assert_eq!((plain.memory, plain.at_once), (16 * MIB, 16 * MIB));
        let disk = || device::Disk::new(File::None, device::DiskMode::ReadOnly);
        let larger = Need::of(&GuestConfig {
            memory_mib: 16,
            disks: vec![disk(), disk()],
            cpus: 4,
            memory_device: Some(device::MemoryDevice {
                region_size: 64 * MIB,
                ..device::MemoryDevice::default()
            }),
            ..GuestConfig::default()
        });
        assert_eq!((larger.memory, larger.at_once), (80 * MIB, 16 * MIB));
        assert!(larger.descriptors >= plain.descriptors + 4 && larger.tasks >= plain.tasks + 5);
    }

    #[test]
    fn each_limit_refuses_with_its_numbers() {
        let refused = |change: fn(&mut Room)| {
            let mut room = plenty();
            change(&mut room);
            admit(&small(), &room).unwrap_err()
        };
        admit(&small(), &plenty()).unwrap();
        let memory = refused(|room| room.available = Some(15 * MIB + 1));
        assert_eq!(memory.kind, Kind::GuestInitializationFailure);
        assert!(
            memory.message.contains("16 MiB") && memory.message.contains("15 MiB"),
            "{memory}"
        );
        let promised = refused(|room| room.memory = used(100 * MIB, 115 * MIB));
        assert_eq!((promised.kind, &*promised.about), (Kind::NoResources, "memoryMib"));
        assert!(promised.message.contains("100 of the 115 MiB"), "{promised}");
        let descriptors = refused(|room| room.descriptors = used(950, 1024));
        assert_eq!(descriptors.kind, Kind::NoResources);
        assert!(descriptors.message.contains("950 of 1024"), "{descriptors}");
        let tasks = refused(|room| room.tasks = used(4090, 4096));
        assert!(tasks.message.contains("4090 of the 4096 tasks"), "{tasks}");
        let unknown = Room {
            available: None,
            descriptors: Used::default(),
            tasks: Used::default(),
            ..plenty()
        };
        admit(&small(), &unknown).unwrap();
    }

    #[test]
    fn promises_are_given_back() {
        let capacity = Capacity::default();
        let first = capacity.promise(&small());
        let second = capacity.promise(&small());
        assert_eq!(capacity.promised(), 32 * MIB);
        drop(first);
        assert_eq!(capacity.promised(), 16 * MIB);
        drop(second);
        assert_eq!(capacity.promised(), 0);
    }

    #[test]
    fn what_guests_do_not_have_yet_is_not_promised_twice() {
        let (capacity, need) = (Capacity::default(), small());
        let room = || capacity.reserve(used(100, 1000), used(10, 500));
        let (first, second) = (capacity.promise(&need), capacity.promise(&need));
        let both = (100 + 2 * need.descriptors, 10 + 2 * need.tasks);
        assert_eq!((room().0.used, room().1.used), both);
        assert_eq!((room().0.most, room().1.most), (Some(1000), Some(500)));
        first.is_kept();
        first.is_kept();
        assert_eq!(
            (room().0.used, room().1.used),
            (100 + need.descriptors, 10 + need.tasks)
        );
        assert_eq!(
            capacity.promised(),
            2 * need.memory,
            "its memory is not counted by anybody"
        );
        drop(second);
        drop(first);
        assert_eq!((room().0.used, room().1.used, capacity.promised()), (100, 10, 0));
    }

    #[test]
    fn only_memory_that_is_brought_in_place_of_the_hosts_is_not_asked_of_it() {
        let need = |memory_mib, ranges: &[(u64, u64)]| {
            let brought = |&(start, end)| MemoryBacking {
                memfd: rustix::fs::memfd_create("range", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
                start,
                end,
            };
            Need::of(&GuestConfig {
                memory_mib,
                custom_memory: ranges.iter().map(brought).collect(),
                ..GuestConfig::default()
            })
        };
        let high = DEVICE_HOLE.end;
        assert_eq!(need(16, &[(8 * MIB, 12 * MIB)]).memory, 12 * MIB);
        // It comes on top, whole or in part.
        assert_eq!(need(16, &[(high, high + 16 * MIB)]).memory, 16 * MIB);
        assert_eq!(need(16, &[(12 * MIB, 20 * MIB)]).memory, 12 * MIB);
        // 4 GiB are 3 GiB, the hole, and another one.
        assert_eq!(
            need(4096, &[(high, high + 512 * MIB), (0, MIB)]).memory,
            (4096 - 513) * MIB
        );
        assert_eq!(need(4096, &[(high + 1024 * MIB, high + 1025 * MIB)]).memory, 4096 * MIB);
    }

    proptest! {
        /// However guests come and go, no more is promised than may be.
        #[test]
        fn never_more_than_may_be_is_promised(most in 0..200_u64, steps in prop::collection::vec((1..64_i32, any::<bool>()), 0..60)) {
            let (capacity, mut held) = (Capacity::default(), Vec::new());
            for (memory_mib, ends) in steps {
                if ends && !held.is_empty() {
                    held.remove(0);
                }
                let need = Need::of(&GuestConfig { memory_mib, ..GuestConfig::default() });
                let room = Room { memory: used(capacity.promised(), most * MIB), ..plenty() };
                let fits = capacity.promised() + need.memory <= most * MIB;
                prop_assert_eq!(admit(&need, &room).is_ok(), fits);
                if fits {
                    held.push(capacity.promise(&need));
                }
                prop_assert!(capacity.promised() <= most * MIB);
            }
            drop(held);
            prop_assert_eq!(capacity.promised(), 0);
        }
    }
}
