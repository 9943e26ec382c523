//! Who may send how much: the credit of both directions of a connection (virtio 5.10.6.3). Pure; all counters are modulo 2^32, as on the wire.
//!
//! ```text
//!   guest -> host:  forwarded <= received <= forwarded + window          (what is between them waits here)
//!                   told: the forwarded that the guest knows of
//!   host -> guest:  peer_forwarded <= sent <= peer_forwarded + peer_window
//! ```

/// The credit of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credit {
    window: u32,
    received: u32,
    forwarded: u32,
    told: u32,
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
}

/// The peer sent more than it was allowed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

impl Credit {
    /// A connection that takes in up to `window` bytes which nobody has taken out yet.
    pub fn new(window: u32) -> Self {
        Self {
            window,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_window: 0,
            peer_forwarded: 0,
        }
    }

    /// The same, as it is after `count` bytes in each direction.
    #[cfg(any(test, feature = "testing"))]
    pub fn after(self, count: u32) -> Self {
        Self {
            received: count,
            forwarded: count,
            told: count,
            sent: count,
            peer_forwarded: count,
            ..self
        }
    }

    /// Bytes that may be sent now.
    pub fn free(&self) -> u32 {
        // A peer that claims to have taken what was never sent has a distance of nearly 2^32, and gets nothing.
        self.peer_window
            .saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Bytes that were received and not yet forwarded.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// `count` bytes were sent.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The peer told its side, which it does in every packet.
    pub fn peer_says(&mut self, window: u32, forwarded: u32) {
        (self.peer_window, self.peer_forwarded) = (window, forwarded);
    }

    /// `count` bytes came.
    ///
    /// # Errors
    ///
    /// There is no room for them; nothing has changed.
    pub fn receive(&mut self, count: u32) -> Result<(), Overrun> {
        if count > self.window - self.held() {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(count);
        Ok(())
    }

    /// `count` of the bytes held have left, or are not wanted any more.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count.min(self.held()));
    }

    /// What a packet to the peer has to say: room in all, and what was forwarded. The peer knows it from then on.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.window, self.forwarded)
    }

    /// Whether the peer should be told for its own sake: it believes that less than half of the room is left, and there is more.
    pub fn worth_telling(&self) -> bool {
        let believed = self.window.saturating_sub(self.received.wrapping_sub(self.told));
        self.told != self.forwarded && believed < self.window / 2
    }
}

/// How much room is promised to all connections together, and to each.
#[derive(Clone, Debug)]
pub struct Windows {
    budget: u64,
    most_connections: u64,
    open: u64,
    given: u64,
}

/// The least and the most that a connection is promised, in bytes.
pub const WINDOW: std::ops::RangeInclusive<u32> = 16 * 1024..=256 * 1024;

impl Windows {
    /// Room for `most_connections`, each with at least the least of [`WINDOW`], and `extra` bytes besides.
    pub fn new(most_connections: u32, extra: u64) -> Self {
        let most_connections = u64::from(most_connections);
        Self {
            budget: most_connections * u64::from(*WINDOW.start()) + extra,
            most_connections,
            open: 0,
            given: 0,
        }
    }

    /// Room for one more connection; `None` if there are as many as there may be. The fewer there are, the more each gets.
    pub fn take(&mut self) -> Option<u32> {
        if self.open >= self.most_connections {
            return None;
        }
        let reserved = (self.most_connections - self.open) * u64::from(*WINDOW.start());
        let extra = self.budget.saturating_sub(self.given + reserved);
        let most = WINDOW.end() - WINDOW.start();
        let window = WINDOW.start() + u32::try_from(extra / 4).unwrap_or(most).min(most);
        self.open += 1;
        self.given += u64::from(window);
        Some(window)
    }

    /// A connection with this room is gone.
    pub fn give_back(&mut self, window: u32) {
        self.open = self.open.saturating_sub(1);
        self.given = self.given.saturating_sub(window.into());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the counters mean, without a modulus.
    #[derive(Debug, Default)]
    struct Model {
        received: u64,
        forwarded: u64,
        told: u64,
        sent: u64,
        peer_forwarded: u64,
        peer_window: u64,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Receive(u32),
        Forward(u32),
        Tell,
        Send(u32),
        PeerTakes(u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let some = || 0..200_000u32;
        prop_oneof![
            some().prop_map(Step::Receive),
            some().prop_map(Step::Forward),
            Just(Step::Tell),
            some().prop_map(Step::Send),
            (some(), some()).prop_map(|(taken, window)| Step::PeerTakes(taken, window)),
        ]
    }

    proptest! {
        #[test]
        fn counters_that_wrap_mean_what_counters_that_do_not_wrap_mean(
            start in prop_oneof![Just(0), Just(u32::MAX), (u32::MAX - 1_000_000)..u32::MAX],
            window in 1..200_000u32,
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let mut credit = Credit::new(window).after(start);
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Receive(n) => {
                        let fits = model.received - model.forwarded + u64::from(n) <= u64::from(window);
                        prop_assert_eq!(credit.receive(n).is_ok(), fits);
                        model.received += if fits { n.into() } else { 0 };
                    }
                    Step::Forward(n) => {
                        credit.forward(n);
                        model.forwarded += u64::from(n).min(model.received - model.forwarded);
                    }
                    Step::Tell => {
                        model.told = model.forwarded;
                        let told = start.wrapping_add(model.told as u32);
                        prop_assert_eq!(credit.tell(), (window, told));
                    }
                    Step::Send(n) => {
                        let n = n.min(credit.free());
                        credit.sent(n);
                        model.sent += u64::from(n);
                    }
                    Step::PeerTakes(n, peer_window) => {
                        model.peer_forwarded += u64::from(n).min(model.sent - model.peer_forwarded);
                        model.peer_window = peer_window.into();
                        credit.peer_says(peer_window, start.wrapping_add(model.peer_forwarded as u32));
                    }
                }
                let outstanding = model.sent - model.peer_forwarded;
                prop_assert_eq!(u64::from(credit.free()), model.peer_window.saturating_sub(outstanding));
                prop_assert_eq!(u64::from(credit.held()), model.received - model.forwarded);
                let believed = u64::from(window).saturating_sub(model.received - model.told);
                let worth = model.told != model.forwarded && believed < u64::from(window / 2);
                prop_assert_eq!(credit.worth_telling(), worth);
            }
        }

        #[test]
        fn a_peer_that_lies_gets_no_more_than_it_offers(window: u32, forwarded: u32, sent: u32) {
            let mut credit = Credit::new(1).after(sent);
            credit.peer_says(window, forwarded);
            prop_assert!(credit.free() <= window);
        }

        #[test]
        fn no_more_room_is_promised_than_there_is(
            most in 1..64u32,
            extra in 0..4_000_000u64,
            steps in proptest::collection::vec(any::<bool>(), 1..200),
        ) {
            let mut windows = Windows::new(most, extra);
            let mut open = Vec::new();
            for take in steps {
                if take {
                    let window = windows.take();
                    prop_assert_eq!(window.is_some(), open.len() < most as usize);
                    prop_assert!(window.is_none_or(|window| WINDOW.contains(&window)));
                    open.extend(window);
                } else if let Some(window) = open.pop() {
                    windows.give_back(window);
                }
                let sum: u64 = open.iter().map(|&window| u64::from(window)).sum();
                prop_assert!(sum <= u64::from(most) * u64::from(*WINDOW.start()) + extra);
            }
        }
    }
}
