//! What was typed, on its way to two ports of the guest, of which it may read only one.
//!
//! ```text
//!             position of the slower            of the faster = end
//!   typed:  ......|-------------- kept --------------|
//!                  at most LAG bytes
//! ```
//!
//! More is taken in only when the faster has all there is. The slower is waited for up to [`LAG`] bytes: more than all buffers on its way hold, so if the
//! faster is further ahead, the guest reads there, and what the slower has not taken by then it loses.

use std::collections::VecDeque;

/// Ports.
pub(crate) const PORTS: usize = 2;
/// How far one port may be ahead of the other, in bytes. A port that is not read holds the 64 KiB that the manager keeps, and what is in two sockets, each
/// usually at most 208 KiB (net.core.wmem_default).
pub(crate) const LAG: usize = 1 << 20;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Window {
    kept: VecDeque<u8>,
    /// How much of what is kept each port has taken; none: the port is closed.
    taken: [Option<usize>; PORTS],
}

impl Window {
    /// Nothing was typed, and both ports are open.
    pub(crate) fn new() -> Self {
        Self {
            kept: VecDeque::new(),
            taken: [Some(0); PORTS],
        }
    }

    /// Whether more can be taken in.
    pub(crate) fn has_room(&self) -> bool {
        self.taken.iter().flatten().any(|taken| *taken == self.kept.len())
    }

    /// Takes in what was typed, when there is room.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        if let Some(surplus) = self.kept.len().checked_sub(LAG) {
            self.forget(surplus);
        }
    }

    /// What a port has not taken yet, at least the beginning of it; empty if it has all.
    pub(crate) fn next(&self, port: usize) -> &[u8] {
        let Some(taken) = self.taken[port] else { return &[] };
        let (front, back) = self.kept.as_slices();
        match front.get(taken..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => &back[taken - front.len()..],
        }
    }

    /// A port has taken so many bytes of `next`.
    pub(crate) fn took(&mut self, port: usize, count: usize) {
        if let Some(taken) = &mut self.taken[port] {
            *taken = (*taken + count).min(self.kept.len());
        }
        self.trim();
    }

    /// A port is closed.
    pub(crate) fn close(&mut self, port: usize) {
        self.taken[port] = None;
        self.trim();
    }

    /// Forgets what all have taken.
    fn trim(&mut self) {
        let slowest = self.taken.iter().flatten().min();
        self.forget(slowest.copied().unwrap_or(self.kept.len()));
    }

    fn forget(&mut self, count: usize) {
        self.kept.drain(..count);
        for taken in self.taken.iter_mut().flatten() {
            *taken = taken.saturating_sub(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes up to `most` bytes.
    fn take(window: &mut Window, port: usize, most: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < most && !window.next(port).is_empty() {
            let next = window.next(port);
            let piece = next[..next.len().min(most - all.len())].to_vec();
            window.took(port, piece.len());
            all.extend(piece);
        }
        all
    }

    #[test]
    fn both_get_everything_each_at_its_pace() {
        let mut window = Window::new();
        window.push(b"hello");
        assert!(!window.has_room());
        assert_eq!(take(&mut window, 0, 2), b"he");
        assert!(!window.has_room());
        assert_eq!(take(&mut window, 1, 9), b"hello");
        assert!(window.has_room());
        window.push(b" world");
        assert_eq!(take(&mut window, 0, 99), b"llo world");
        assert_eq!(take(&mut window, 1, 99), b" world");
        assert!(window.kept.is_empty());
    }

    #[test]
    fn who_takes_nothing_holds_the_other_up_no_more_than_it_must() {
        let mut window = Window::new();
        for i in 0..=(2 * LAG / 1024) {
            assert!(window.has_room());
            let chunk = vec![u8::try_from(i % 251).unwrap(); 1024];
            window.push(&chunk);
            assert_eq!(take(&mut window, 0, 1024), chunk);
        }
        assert_eq!((window.kept.len(), take(&mut window, 1, usize::MAX).len()), (LAG, LAG));
    }

    #[test]
    fn a_closed_port_takes_nothing() {
        let mut window = Window::new();
        window.push(b"x");
        window.close(0);
        assert!(window.next(0).is_empty() && !window.has_room());
        assert_eq!(take(&mut window, 1, 9), b"x");
        window.close(1);
        assert!(!window.has_room() && window.next(1).is_empty() && window.kept.is_empty());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_turned_round(steps in prop::collection::vec((0..3_usize, 1..700_usize), 1..200)) {
            let mut window = Window::new();
            let (mut typed, mut got) = (Vec::new(), [Vec::new(), Vec::new()]);
            for (what, count) in steps {
                if what < PORTS {
                    got[what].extend(take(&mut window, what, count));
                } else if window.has_room() {
                    let bytes: Vec<u8> = (0..count).map(|i| ((typed.len() + i) % 253) as u8).collect();
                    window.push(&bytes);
                    typed.extend(bytes);
                }
            }
            for (port, got) in got.iter_mut().enumerate() {
                got.extend(take(&mut window, port, usize::MAX));
                prop_assert_eq!(&*got, &typed);
            }
        }
    }
}
