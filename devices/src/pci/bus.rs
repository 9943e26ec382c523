//! Segment 0, bus 0: which function is at which place, and whose memory answers which address.
//!
//! ```text
//!   write to a command register or a BAR -> layout: all BARs that want to decode, in order of place
//!                                                    |  outside of the windows, or over one before it: answers nowhere
//!                                                    v
//!                                           routes, looked up by each access      bar_moved tells those that changed
//! ```
//!
//! Nothing that a guest writes into BARs can fail: of two that overlap the one in the lower place answers, and the other again as soon as
//! there is room. A function that panics is quarantined: reported once, then as if nobody were there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::address::PciAddress;
use super::config_space::{CONFIG_BYTES, ConfigSpace, MULTI_FUNCTION, offset};
use super::function::{Bar, PciFunction};
use super::host_bridge::HostBridge;
use crate::dispatch::{DeviceEvent, DeviceReporter, panic_message};
use crate::interrupt::lock;

/// Why a function cannot be put on the bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// Another function has the place.
    #[error("{name}: {address} is taken by {other}")]
    Taken {
        /// The function that was to be inserted.
        name: String,
        /// The place.
        address: PciAddress,
        /// Who has it.
        other: String,
    },
    /// A guest looks at functions 1 to 7 of a slot only if there is a function 0.
    #[error("{name}: {address} needs a function 0 in its slot first")]
    NoFirstFunction {
        /// The function that was to be inserted.
        name: String,
        /// The place.
        address: PciAddress,
    },
}

/// A function and its place.
struct Occupant {
    name: String,
    address: PciAddress,
    function: Arc<dyn PciFunction>,
    /// Set for good when the function panicked.
    quarantined: AtomicBool,
}

/// A range of memory and whose it is.
#[derive(Clone)]
struct Route {
    bar: Bar,
    occupant: Arc<Occupant>,
}

impl Route {
    fn key(&self) -> (PciAddress, u8) {
        (self.occupant.address, self.bar.index)
    }

    fn end(&self) -> u64 {
        // Inside of a window, so it does not overflow.
        self.bar.address + self.bar.size
    }
}

/// The bus (see the module's head).
pub struct PciBus {
    windows: Vec<Range<u64>>,
    occupants: RwLock<BTreeMap<PciAddress, Arc<Occupant>>>,
    /// Sorted by address, disjoint.
    routes: RwLock<Arc<Vec<Route>>>,
    /// Held while routes are worked out and functions are told, by vCPUs only.
    layout: Mutex<()>,
    reporter: Arc<dyn DeviceReporter>,
}

impl PciBus {
    /// A bus with nothing but the host bridge, whose functions' memory may lie in `windows`. Functions that panic are reported to `reporter`.
    pub fn new(windows: Vec<Range<u64>>, reporter: Arc<dyn DeviceReporter>) -> Arc<Self> {
        let bridge = Occupant {
            name: "host bridge".into(),
            address: PciAddress::HOST_BRIDGE,
            function: HostBridge::new(),
            quarantined: AtomicBool::new(false),
        };
        Arc::new(Self {
            windows,
            occupants: RwLock::new(BTreeMap::from([(bridge.address, Arc::new(bridge))])),
            routes: RwLock::default(),
            layout: Mutex::new(()),
            reporter,
        })
    }

    /// Where functions' memory may lie.
    pub fn windows(&self) -> &[Range<u64>] {
        &self.windows
    }

    /// Puts `function` at `address`. Its BARs answer at once if its registers say so.
    ///
    /// # Errors
    ///
    /// [`PciError`]; the bus is unchanged then.
    pub fn insert(
        &self,
        address: PciAddress,
        name: impl Into<String>,
        function: Arc<dyn PciFunction>,
    ) -> Result<(), PciError> {
        let name = name.into();
        let mut occupants = self.occupants.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = occupants.get(&address) {
            return Err(PciError::Taken {
                name,
                address,
                other: other.name.clone(),
            });
        }
        let first = PciAddress::new(address.slot(), 0);
        if address.function() != 0 && first.is_none_or(|first| !occupants.contains_key(&first)) {
            return Err(PciError::NoFirstFunction { name, address });
        }
        occupants.insert(
            address,
            Arc::new(Occupant {
                name,
                address,
                function,
                quarantined: AtomicBool::new(false),
            }),
        );
        drop(occupants);
        self.lay_out();
        Ok(())
    }

    /// Takes the function at `address` off the bus; its BARs are told that they answer nowhere. False if there is none.
    pub fn remove(&self, address: PciAddress) -> bool {
        let mut occupants = self.occupants.write().unwrap_or_else(PoisonError::into_inner);
        let removed = occupants.remove(&address);
        drop(occupants);
        self.lay_out();
        removed.is_some()
    }

    /// Reads configuration space; all ones where nobody is.
    pub fn read_config(&self, address: PciAddress, at: u16, data: &mut [u8]) {
        let inside = usize::from(at) + data.len() <= usize::from(CONFIG_BYTES);
        let occupant = if inside { self.occupant(address) } else { None };
        let answered = occupant.is_some_and(|occupant| {
            self.guarded(&occupant, || occupant.function.read_config(at, data))
                .is_some()
        });
        if !answered {
            data.fill(0xff);
            return;
        }
        let header_type = usize::from(offset::HEADER_TYPE.wrapping_sub(at));
        if address.function() == 0
            && let Some(byte) = data.get_mut(header_type)
            && self.has_more_functions(address)
        {
            *byte |= MULTI_FUNCTION;
        }
    }

    /// Writes configuration space.
    pub fn write_config(&self, address: PciAddress, at: u16, data: &[u8]) {
        if usize::from(at) + data.len() > usize::from(CONFIG_BYTES) {
            return;
        }
        let Some(occupant) = self.occupant(address) else {
            return;
        };
        self.guarded(&occupant, || occupant.function.write_config(at, data));
        if ConfigSpace::can_move_bars(at, data.len()) {
            self.lay_out();
        }
    }

    /// Reads a function's memory; all ones where nobody is, or beyond the end of a BAR.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        let answered = self.route(address, data.len()).is_some_and(|(route, offset)| {
            let occupant = &route.occupant;
            self.guarded(occupant, || occupant.function.read_bar(route.bar.index, offset, data))
                .is_some()
        });
        if !answered {
            data.fill(0xff);
        }
    }

    /// Writes a function's memory.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((route, offset)) = self.route(address, data.len()) {
            let occupant = &route.occupant;
            self.guarded(occupant, || occupant.function.write_bar(route.bar.index, offset, data));
        }
    }

    /// The BARs that answer now, by address, with their functions' places.
    pub fn memory(&self) -> Vec<(PciAddress, Bar)> {
        self.routes()
            .iter()
            .map(|route| (route.occupant.address, route.bar))
            .collect()
    }

    fn routes(&self) -> Arc<Vec<Route>> {
        Arc::clone(&self.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn occupant(&self, address: PciAddress) -> Option<Arc<Occupant>> {
        let occupants = self.occupants.read().unwrap_or_else(PoisonError::into_inner);
        occupants.get(&address).cloned()
    }

    fn has_more_functions(&self, address: PciAddress) -> bool {
        let occupants = self.occupants.read().unwrap_or_else(PoisonError::into_inner);
        occupants
            .keys()
            .any(|other| other.slot() == address.slot() && other.function() != 0)
    }

    /// Whose memory the whole access is in, with the offset in the BAR.
    fn route(&self, address: u64, len: usize) -> Option<(Route, u64)> {
        let routes = self.routes();
        let at = routes.partition_point(|route| route.bar.address <= address);
        let route = routes.get(at.checked_sub(1)?)?;
        let offset = address - route.bar.address;
        let room = route.bar.size.checked_sub(offset)?;
        (len as u64 <= room).then(|| (route.clone(), offset))
    }

    /// Works out who answers where, and tells those for whom that changed: first who leaves, then who comes.
    fn lay_out(&self) {
        let _guard: MutexGuard<'_, ()> = lock(&self.layout);
        let occupants: Vec<Arc<Occupant>> = {
            let occupants = self.occupants.read().unwrap_or_else(PoisonError::into_inner);
            occupants.values().cloned().collect()
        };
        let mut next: Vec<Route> = Vec::new();
        for occupant in &occupants {
            let bars = self.guarded(occupant, || occupant.function.bars()).unwrap_or_default();
            for bar in bars {
                let place = next.partition_point(|route| route.bar.address < bar.address);
                if self.fits(&next, place, &bar) {
                    let occupant = Arc::clone(occupant);
                    next.insert(place, Route { bar, occupant });
                }
            }
        }
        let before = self.routes();
        let is_in = |routes: &[Route], route: &Route| {
            let same = |other: &&Route| Arc::ptr_eq(&other.occupant, &route.occupant) && other.bar == route.bar;
            routes.iter().any(|other| same(&other))
        };
        let leaving: Vec<&Route> = before.iter().filter(|route| !is_in(&next, route)).collect();
        let coming: Vec<Route> = next.iter().filter(|route| !is_in(&before, route)).cloned().collect();
        if leaving.is_empty() && coming.is_empty() {
            return;
        }
        for route in &leaving {
            self.tell(route, None);
        }
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        for route in &coming {
            tracing::debug!(function = route.occupant.name, key = ?route.key(), bar = ?route.bar, "memory moved");
            self.tell(route, Some(route.bar.address));
        }
    }

    /// Whether `bar` lies in a window, and in nobody's way if it comes before place `place`.
    fn fits(&self, routes: &[Route], place: usize, bar: &Bar) -> bool {
        let Some(end) = bar.address.checked_add(bar.size) else {
            return false;
        };
        let inside = |window: &Range<u64>| window.start <= bar.address && end <= window.end;
        let after_the_last = place
            .checked_sub(1)
            .is_none_or(|last| routes[last].end() <= bar.address);
        let before_the_next = routes.get(place).is_none_or(|next| end <= next.bar.address);
        bar.size > 0 && self.windows.iter().any(inside) && after_the_last && before_the_next
    }

    fn tell(&self, route: &Route, address: Option<u64>) {
        let function = &route.occupant.function;
        self.guarded(&route.occupant, || function.bar_moved(route.bar.index, address));
    }

    /// Calls a function unless it is quarantined, and quarantines it if it panics: `None` in both cases.
    fn guarded<R>(&self, occupant: &Occupant, call: impl FnOnce() -> R) -> Option<R> {
        if occupant.quarantined.load(Ordering::Relaxed) {
            return None;
        }
        // A broken invariant inside the function can't be seen from outside: it is never called again.
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(result) => Some(result),
            Err(panic) => {
                if !occupant.quarantined.swap(true, Ordering::Relaxed) {
                    self.reporter.report(DeviceEvent::Failed {
                        device: occupant.name.clone(),
                        reason: panic_message(&*panic),
                    });
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
