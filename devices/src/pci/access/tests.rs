//! Tests of the ports and the ECAM window.

use super::*;
use crate::dispatch::stepper::Reports;

fn bus() -> Arc<PciBus> {
    PciBus::new(vec![], Arc::new(Reports::default()))
}

fn read(device: &dyn BusDevice, offset: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    device.read(offset, &mut data[..len]);
    u64::from_le_bytes(data)
}

#[test]
fn the_ports_lead_where_the_address_says() {
    let ports = ConfigPorts::new(bus());
    assert_eq!(read(&*ports, 4, 4), 0xffff_ffff, "not enabled");
    ports.write(0, &0x8000_0000_u32.to_le_bytes());
    assert_eq!(read(&*ports, 0, 4), 0x8000_0000, "guests probe for the ports by this");
    assert_eq!(read(&*ports, 4, 4), 0x0d57_8086);
    assert_eq!(read(&*ports, 6, 2), 0x0d57);
    assert_eq!(read(&*ports, 5, 1), 0x80);
    ports.write(0, &0x8000_0008_u32.to_le_bytes());
    assert_eq!(read(&*ports, 7, 1), 0x06, "a bridge");
    // Another bus, another slot.
    for address in [0x8001_0000_u32, 0x80ff_0000, 0x8000_0800] {
        ports.write(0, &address.to_le_bytes());
        assert_eq!(read(&*ports, 4, 4), 0xffff_ffff, "{address:#x}");
    }
    // What cannot be written reads as 0.
    ports.write(0, &0xffff_ffff_u32.to_le_bytes());
    assert_eq!(read(&*ports, 0, 4), 0x8fff_fffc);
    // Extended space, which is empty.
    ports.write(0, &0x8100_0000_u32.to_le_bytes());
    assert_eq!(read(&*ports, 4, 4), 0);
}

#[test]
fn narrow_accesses_to_the_address_are_not_for_it() {
    let ports = ConfigPorts::new(bus());
    ports.write(0, &0x8000_0000_u32.to_le_bytes());
    // On a PC, the reset register.
    ports.write(1, &[6]);
    ports.write(0, &[0, 0]);
    assert_eq!(read(&*ports, 0, 4), 0x8000_0000);
    assert_eq!(read(&*ports, 1, 1), 0xff);
    assert_eq!(read(&*ports, 0, 2), 0xffff);
}

#[test]
fn registers_that_can_be_written_are_by_both_ways() {
    let bus = bus();
    let (ports, ecam) = (ConfigPorts::new(Arc::clone(&bus)), Ecam::new(bus));
    ports.write(0, &0x8000_003c_u32.to_le_bytes());
    ports.write(4, &[11]);
    assert_eq!(read(&*ecam, 0x3c, 1), 11);
    ecam.write(0x3c, &[12, 0, 0, 0]);
    assert_eq!(read(&*ports, 4, 4), 12);
}

#[test]
fn ecam_has_a_page_for_each_function() {
    let ecam = Ecam::new(bus());
    assert_eq!(read(&*ecam, 0, 8), 0x0d57_8086);
    assert_eq!(read(&*ecam, 0x100, 8), 0, "extended space");
    assert_eq!(read(&*ecam, 0xffc, 4), 0);
    assert_eq!(read(&*ecam, 0xffc, 8), u64::MAX, "across the end of a function");
    for other in [0x1000, 0xf_f000, ECAM_BYTES, u64::MAX - 7] {
        assert_eq!(read(&*ecam, other, 4), 0xffff_ffff);
        ecam.write(other, &[0; 4]);
    }
}
