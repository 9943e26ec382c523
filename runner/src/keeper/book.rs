//! What the keeper has under each id: a component, the descriptors beside it, and whether it outlives the manager. Pure: neither
//! processes nor descriptors are touched, so that its rules can be tested with numbers for both.
//!
//! ```text
//!             keep, durable               spawn                    the component ends
//!   (unknown) ─────────────> without one ───────> with a component ──────────────────> ended    (durable)
//!                                ^    ^                                   │              │
//!                                │    └───────────────────────────────────┼── spawn ─────┤
//!                                │                                        v              v
//!                                └ descriptors only                    (unknown)     (unknown)
//!                                                                    not durable     released
//! ```

use std::collections::BTreeMap;

use super::OWN;
use super::wire::Ended;

/// Whether there is a component under an id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Life<C> {
    /// Not yet.
    None,
    /// There is.
    Alive(C),
    /// There was.
    Ended(Ended),
}

/// What there is under an id: components are `C`, what is kept under a label `F`.
#[derive(Debug)]
pub(super) struct Entry<C, F> {
    pub(super) durable: bool,
    pub(super) kept: BTreeMap<String, F>,
    pub(super) life: Life<C>,
}

impl<C, F> Entry<C, F> {
    fn new() -> Self {
        Self {
            durable: false,
            kept: BTreeMap::new(),
            life: Life::None,
        }
    }

    /// Nothing would be lost with it.
    fn is_empty(&self) -> bool {
        let alive = matches!(self.life, Life::Alive(_));
        !self.durable && !alive && self.kept.is_empty()
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct Book<C, F>(BTreeMap<u64, Entry<C, F>>);

impl<C, F> Book<C, F> {
    pub(super) fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Everything, in the order of the ids.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u64, &Entry<C, F>)> {
        self.0.iter().map(|(id, entry)| (*id, entry))
    }

    /// The components that have not ended.
    pub(super) fn components(&self) -> impl Iterator<Item = (u64, &C)> {
        self.entries().filter_map(|(id, entry)| match &entry.life {
            Life::Alive(component) => Some((id, component)),
            _ => None,
        })
    }

    pub(super) fn component(&mut self, id: u64) -> Option<&mut C> {
        match &mut self.0.get_mut(&id)?.life {
            Life::Alive(component) => Some(component),
            _ => None,
        }
    }

    /// A component was started; gives it back if there is one under this id, or the id is the manager's own.
    pub(super) fn start(&mut self, id: u64, component: C) -> Result<(), C> {
        if id == OWN || self.component(id).is_some() {
            return Err(component);
        }
        self.0.entry(id).or_insert_with(Entry::new).life = Life::Alive(component);
        Ok(())
    }

    /// The component has ended, and is given back. A durable one is remembered.
    pub(super) fn end(&mut self, id: u64, how: Ended) -> Option<C> {
        let entry = self.0.get_mut(&id)?;
        if !matches!(entry.life, Life::Alive(_)) {
            return None;
        }
        let before = std::mem::replace(&mut entry.life, Life::Ended(how));
        if !entry.durable {
            self.0.remove(&id);
        }
        match before {
            Life::Alive(component) => Some(component),
            _ => None,
        }
    }

    /// Something is kept under this label, in the place of what was.
    pub(super) fn keep(&mut self, id: u64, label: String, what: F) {
        let entry = self.0.entry(id).or_insert_with(Entry::new);
        entry.kept.insert(label, what);
    }

    /// It is not kept any more.
    pub(super) fn drop_kept(&mut self, id: u64, label: &str) {
        if let Some(entry) = self.0.get_mut(&id) {
            entry.kept.remove(label);
        }
        self.tidy(id);
    }

    /// Neither durable nor is anything kept any more; a component that lives goes on.
    pub(super) fn release(&mut self, id: u64) {
        if let Some(entry) = self.0.get_mut(&id) {
            entry.kept.clear();
        }
        self.set_durable(id, false);
    }

    /// Whether what is under this id outlives the manager.
    pub(super) fn set_durable(&mut self, id: u64, durable: bool) {
        if durable && id != OWN {
            self.0.entry(id).or_insert_with(Entry::new).durable = true;
        } else if let Some(entry) = self.0.get_mut(&id) {
            entry.durable = false;
            self.tidy(id);
        }
    }

    fn tidy(&mut self, id: u64) {
        if self.0.get(&id).is_some_and(Entry::is_empty) {
            self.0.remove(&id);
        }
    }

    /// The manager is gone: all goes that is not durable. Returns the components whose end that is.
    pub(super) fn orphan(&mut self) -> Vec<C> {
        let gone = self.0.extract_if(.., |id, entry| *id != OWN && !entry.durable);
        let components = gone.filter_map(|(_, entry)| match entry.life {
            Life::Alive(component) => Some(component),
            _ => None,
        });
        components.collect()
    }

    /// Nothing is left but what is the manager's own.
    pub(super) fn is_empty(&self) -> bool {
        self.0.keys().all(|id| *id == OWN)
    }

    /// Everything goes. Returns the components that had not ended.
    pub(super) fn clear(&mut self) -> Vec<C> {
        let entries = std::mem::take(&mut self.0);
        let components = entries.into_values().filter_map(|entry| match entry.life {
            Life::Alive(component) => Some(component),
            _ => None,
        });
        components.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::outer::ExitStatus;

    const HOW: Ended = Ended::Exited(ExitStatus::Code(0));

    #[derive(Clone, Debug)]
    enum Step {
        Start(u64),
        End(u64),
        Keep(u64, String),
        DropKept(u64, String),
        Release(u64),
        Durable(u64, bool),
        Orphan,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let (id, label) = (|| 0_u64..4, || "[ab]");
        let step = prop_oneof![
            id().prop_map(Step::Start),
            id().prop_map(Step::End),
            (id(), label()).prop_map(|(id, label)| Step::Keep(id, label)),
            (id(), label()).prop_map(|(id, label)| Step::DropKept(id, label)),
            id().prop_map(Step::Release),
            (id(), any::<bool>()).prop_map(|(id, durable)| Step::Durable(id, durable)),
            Just(Step::Orphan),
        ];
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        /// A component is under its id from its start until it is given back, once; without the manager only what is durable stays.
        #[test]
        fn no_component_is_lost_and_only_durable_ones_outlive(steps in steps()) {
            let mut book: Book<u32, ()> = Book::new();
            let (mut serial, mut alive) = (0, BTreeSet::new());
            for step in steps {
                match step {
                    Step::Start(id) => {
                        let taken = id == OWN || book.component(id).is_some();
                        serial += 1;
                        let refused = book.start(id, serial).is_err();
                        prop_assert_eq!(refused, taken);
                        if !refused {
                            alive.insert(serial);
                        }
                    }
                    Step::End(id) => {
                        let durable = book.entries().any(|(known, entry)| known == id && entry.durable);
                        let ended = book.end(id, HOW);
                        prop_assert!(ended.is_none_or(|component| alive.remove(&component)));
                        if ended.is_some() {
                            prop_assert_eq!(book.entries().any(|(known, _)| known == id), durable);
                        }
                    }
                    Step::Keep(id, label) => {
                        book.keep(id, label.clone(), ());
                        prop_assert!(book.entries().any(|(known, entry)| known == id && entry.kept.contains_key(&label)));
                    }
                    Step::DropKept(id, label) => book.drop_kept(id, &label),
                    Step::Release(id) => {
                        book.release(id);
                        let left = book.entries().find(|(known, _)| *known == id);
                        prop_assert!(left.is_none_or(|(_, entry)| matches!(entry.life, Life::Alive(_))));
                    }
                    Step::Durable(id, durable) => book.set_durable(id, durable),
                    Step::Orphan => {
                        for component in book.orphan() {
                            prop_assert!(alive.remove(&component));
                        }
                        prop_assert!(book.entries().all(|(id, entry)| id == OWN || entry.durable));
                    }
                }
                let known: BTreeSet<u32> = book.components().map(|(_, component)| *component).collect();
                prop_assert_eq!(&known, &alive);
                prop_assert!(book.entries().all(|(_, entry)| !entry.is_empty()), "something empty stayed");
                prop_assert!(book.entries().all(|(id, entry)| id != OWN || !entry.durable));
            }
            prop_assert_eq!(book.clear().into_iter().collect::<BTreeSet<_>>(), alive);
            prop_assert!(book.is_empty());
        }
    }

    #[test]
    fn a_durable_one_is_remembered_after_its_end_and_can_be_started_again() {
        let mut book: Book<u32, ()> = Book::new();
        book.keep(1, "record".into(), ());
        book.set_durable(1, true);
        book.start(1, 7).unwrap();
        assert_eq!(book.end(1, HOW), Some(7));
        assert!(book.orphan().is_empty() && !book.is_empty());
        book.start(1, 8).unwrap();
        assert_eq!(book.component(1), Some(&mut 8));
        book.release(1);
        assert!(!book.is_empty(), "it lives");
        assert_eq!(book.orphan(), vec![8]);
        assert!(book.is_empty());
    }
}
