//! Where a function sits on the bus.

use std::fmt;

/// Slots of a bus; the first is the host bridge's.
pub(super) const SLOTS: u8 = 32;
/// Functions of a slot.
pub(super) const FUNCTIONS: u8 = 8;

/// A function's place: slot 0 to 31, function 0 to 7, on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress(u8);

impl PciAddress {
    /// The host bridge's place.
    pub const HOST_BRIDGE: Self = Self(0);

    /// The place of a slot and function; `None` if there is no such slot or function.
    pub fn new(slot: u8, function: u8) -> Option<Self> {
        (slot < SLOTS && function < FUNCTIONS).then_some(Self(slot << 3 | function))
    }

    /// The place that the low byte of a routing id names.
    pub(super) fn from_devfn(devfn: u8) -> Self {
        Self(devfn)
    }

    /// Where to put device number `index` of `count`, so that a guest, which looks at the functions of a slot before the next slot, finds them in
    /// order, and each has a slot of its own if there are enough. `None`: more than 248 do not fit beside the host bridge.
    pub fn spread(index: usize, count: usize) -> Option<Self> {
        let slots = usize::from(SLOTS - 1);
        let functions = count.div_ceil(slots).max(1);
        let slot = u8::try_from(1 + index / functions).ok()?;
        let function = u8::try_from(index % functions).ok()?;
        let fits = index < count && functions <= usize::from(FUNCTIONS);
        fits.then(|| Self::new(slot, function)).flatten()
    }

    /// Slot, 0 to 31.
    pub fn slot(self) -> u8 {
        self.0 >> 3
    }

    /// Function, 0 to 7.
    pub fn function(self) -> u8 {
        self.0 & 7
    }

    /// The interrupt pin of a function here: INTA# to INTD# as 1 to 4, by turns.
    pub fn interrupt_pin(self) -> u8 {
        self.function() % 4 + 1
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.slot(), self.function())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_spread_in_order_over_as_few_functions_as_can_be() {
        for count in [1usize, 2, 31, 32, 62, 63, 64, 248] {
            let places: Vec<PciAddress> = (0..count).map(|n| PciAddress::spread(n, count).unwrap()).collect();
            assert!(places.is_sorted() && places.windows(2).all(|pair| pair[0] != pair[1]));
            assert!(places.iter().all(|place| place.slot() >= 1));
            let deepest = places.iter().map(|place| place.function()).max().unwrap();
            assert_eq!(usize::from(deepest), (count - 1) / 31);
            // Function 0 exists wherever another function does.
            assert!(places.iter().all(|place| places.contains(&PciAddress(place.0 & !7))));
        }
        assert_eq!(PciAddress::spread(248, 249), None);
        assert_eq!(PciAddress::spread(3, 3), None);
    }

    #[test]
    fn reads_as_people_write_it() {
        assert_eq!(PciAddress::new(31, 7).unwrap().to_string(), "00:1f.7");
        assert_eq!(PciAddress::new(32, 0), None);
        assert_eq!(PciAddress::new(0, 8), None);
    }
}
