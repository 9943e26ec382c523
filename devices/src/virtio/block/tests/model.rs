//! Random requests against every kind of disk, compared with an array of bytes.

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use proptest::prelude::*;

use super::*;
use crate::virtio::block::qcow2::storage::HandleStorage;
use crate::virtio::block::raw::HostFile;

/// Sectors of the disk, which does not end with a page.
const SECTORS: u64 = 1025;

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: u64,
        sectors: u64,
        seed: u8,
    },
    Read {
        sector: u64,
        sectors: u64,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
    Zero {
        sector: u64,
        sectors: u64,
        unmap: bool,
    },
    Flush,
    /// Many reads at once, in this order.
    Reads(Vec<(u64, u64)>),
    Reset,
}

/// A place and a length; mostly inside, seldom not.
fn place() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        8 => (0..SECTORS, 1..40u64).prop_map(|(sector, sectors)| (sector, sectors.min(SECTORS - sector))),
        2 => (0..SECTORS / 8, 1..6u64).prop_map(|(page, pages)| (page * 8, (pages * 8).min(SECTORS - page * 8))),
        1 => (0..SECTORS).prop_map(|sector| (sector, SECTORS - sector)),
        1 => (SECTORS - 10..SECTORS + 10, 0..20u64),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|((sector, sectors), seed)| Step::Write { sector, sectors, seed }),
        4 => place().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        1 => place().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        2 => (place(), any::<bool>()).prop_map(|((sector, sectors), unmap)| Step::Zero { sector, sectors, unmap }),
        1 => Just(Step::Flush),
        1 => prop::collection::vec(place(), 1..10).prop_map(Step::Reads),
        1 => Just(Step::Reset),
    ]
}

/// The disk as it should be; what was discarded is anything.
struct Model(Vec<Option<u8>>);

impl Model {
    fn range(&mut self, sector: u64, sectors: u64) -> Option<&mut [Option<u8>]> {
        self.0.get_mut(sector as usize * 512..(sector + sectors) as usize * 512)
    }

    fn agrees(&mut self, sector: u64, sectors: u64, found: (u8, Vec<u8>)) -> Result<(), TestCaseError> {
        match self.range(sector, sectors) {
            None => prop_assert_eq!(found.0, IOERR),
            Some(expected) => {
                prop_assert_eq!(found.0, OK);
                let wrong = expected
                    .iter()
                    .zip(&found.1)
                    .position(|(want, got)| want.is_some_and(|want| want != *got));
                prop_assert_eq!(wrong, None, "first wrong byte from sector {} on", sector);
            }
        }
        Ok(())
    }

    fn change(&mut self, sector: u64, sectors: u64, byte: impl Fn(usize) -> Option<u8>) -> u8 {
        match self.range(sector, sectors) {
            None => IOERR,
            Some(range) => {
                range.iter_mut().enumerate().for_each(|(n, place)| *place = byte(n));
                OK
            }
        }
    }
}

fn run(config: BlockConfig, start: Vec<u8>, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut model = Model(start.into_iter().map(Some).collect());
    let mut rig = rig_of(config);
    for step in steps {
        match *step {
            Step::Write { sector, sectors, seed } => {
                let data = pattern(sectors as usize * 512, seed);
                let status = model.change(sector, sectors, |n| Some(data[n]));
                prop_assert_eq!(write(&mut rig, sector, &data), status);
            }
            Step::Read { sector, sectors } => {
                let found = read(&mut rig, sector, sectors as u32 * 512);
                model.agrees(sector, sectors, found)?;
            }
            Step::Discard { sector, sectors } => {
                let status = model.change(sector, sectors, |_| None);
                prop_assert_eq!(ranged(&mut rig, T_DISCARD, sector, sectors as u32, 0), status);
            }
            Step::Zero { sector, sectors, unmap } => {
                let status = model.change(sector, sectors, |_| Some(0));
                let found = ranged(&mut rig, T_WRITE_ZEROES, sector, sectors as u32, unmap.into());
                prop_assert_eq!(found, status);
            }
            Step::Flush => prop_assert_eq!(flush(&mut rig), OK),
            Step::Reads(ref places) => {
                let mut heads = std::collections::BTreeMap::new();
                for &(sector, sectors) in places {
                    let buffers = [Buffer::Out(header(T_IN, sector)), Buffer::In(sectors as u32 * 512 + 1)];
                    heads.insert(rig.add(0, &buffers), (sector, sectors));
                }
                for mut used in finish_all(&mut rig, 0, places.len()) {
                    let (sector, sectors) = heads[&used.head];
                    let status = used.bytes.pop().unwrap();
                    model.agrees(sector, sectors, (status, used.bytes))?;
                }
            }
            Step::Reset => {
                rig.reset();
                rig.activate(u64::MAX).unwrap();
            }
        }
    }
    prop_assert!(rig.reports().is_empty());
    Ok(())
}

fn raw() -> (NamedTempFile, Vec<u8>) {
    let mut file = image(0);
    let bytes = pattern(SECTORS as usize * 512, 0x55);
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

/// An image of small clusters, so that their edges matter.
pub(super) fn new_qcow2() -> (NamedTempFile, Vec<u8>) {
    let file = image(0);
    let storage = HandleStorage::new(HostFile::new(fd(&file), true, false).unwrap());
    let builder = Qcow2::<HandleStorage>::create_builder(storage).cluster_size(4096);
    builder.size(SECTORS * 512).create().unwrap();
    (file, vec![0; SECTORS as usize * 512])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn raw_in_place(steps in prop::collection::vec(step(), 1..60), io_uring: bool) {
        let (file, start) = raw();
        run(BlockConfig { io_uring, ..BlockConfig::new("", fd(&file)) }, start, &steps)?;
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * 512);
    }

    #[test]
    fn raw_volatile(steps in prop::collection::vec(step(), 1..60)) {
        let (file, start) = raw();
        let config = BlockConfig { mode: DiskMode::Volatile, ..BlockConfig::new("", File::open(file.path()).unwrap().into()) };
        run(config, start.clone(), &steps)?;
        prop_assert!(contents(&file) == start);
    }

    #[test]
    fn qcow2_in_place(steps in prop::collection::vec(step(), 1..60)) {
        let (file, start) = new_qcow2();
        run(BlockConfig { format: DiskFormat::Qcow2, ..BlockConfig::new("", fd(&file)) }, start, &steps)?;
    }

    #[test]
    fn qcow2_volatile(steps in prop::collection::vec(step(), 1..60)) {
        let (file, start) = new_qcow2();
        let before = contents(&file);
        let config = BlockConfig {
            format: DiskFormat::Qcow2,
            mode: DiskMode::Volatile,
            ..BlockConfig::new("", File::open(file.path()).unwrap().into())
        };
        run(config, start, &steps)?;
        prop_assert!(contents(&file) == before);
    }

    #[test]
    fn raw_direct(steps in prop::collection::vec(step(), 1..40), io_uring: bool) {
        let (file, start) = raw();
        if let Some(image) = open_direct(&file) {
            run(BlockConfig { direct: true, io_uring, ..BlockConfig::new("", image) }, start, &steps)?;
        }
    }
}
