//! Names: Android takes any text, and several machines may have the same; the manager takes letters, digits, '.', '_' and '-', each name once.

use std::{cell::RefCell, collections::HashSet, rc::Rc};

use sepal_schema::config::MAX_NAME;

/// What a machine is called whose name has nothing that the manager takes.
const NAMELESS: &str = "vm";
/// Room for a '-', any number, and something before it.
const MIN_NAME: usize = 24;

/// The names of a service's machines.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    taken: Rc<RefCell<HashSet<String>>>,
    /// Most characters of a name.
    most: usize,
}

/// A machine's name; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Name {
    name: String,
    names: Names,
}

impl Names {
    /// None is taken. They have at most `most` characters, as far as that leaves room for numbers, and never more than the manager takes.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            taken: Rc::default(),
            most: most.clamp(MIN_NAME, MAX_NAME),
        }
    }

    /// How many are taken.
    pub(crate) fn count(&self) -> usize {
        self.taken.borrow().len()
    }

    /// Takes a name for a machine that is called `called`.
    pub(crate) fn take(&self, called: &str) -> Name {
        let mut names = self.taken.borrow_mut();
        let name = free(called, self.most, |name| names.contains(name));
        names.insert(name.clone());
        Name {
            name,
            names: self.clone(),
        }
    }
}

impl Name {
    pub(crate) fn as_str(&self) -> &str {
        &self.name
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        self.names.taken.borrow_mut().remove(&self.name);
    }
}

/// The name for the manager: what it does not take becomes '-', and where the name is taken, a number follows it.
fn free(name: &str, most: usize, taken: impl Fn(&str) -> bool) -> String {
    let valid = valid(name, most);
    if !taken(&valid) {
        return valid;
    }
    let mut number = 2_u64;
    loop {
        let suffix = format!("-{number}");
        let kept = valid.len().min(most - suffix.len());
        let candidate = format!("{}{suffix}", &valid[..kept]);
        // There are more numbers than machines.
        if !taken(&candidate) {
            return candidate;
        }
        number += 1;
    }
}

/// Only characters of one byte remain.
fn valid(name: &str, most: usize) -> String {
    let fit = |c: char| match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '_' | '-' => c,
        _ => '-',
    };
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    match name {
        "" => NAMELESS.to_owned(),
        name => name.chars().take(most).map(fit).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sepal_schema::config::check_name;

    use super::*;

    #[test]
    fn a_name_that_fits_stays_as_it_is() {
        assert_eq!(free("microdroid_1.2", 64, |_| false), "microdroid_1.2");
    }

    #[test]
    fn others_are_made_to_fit() {
        assert_eq!(free("My machine", 64, |_| false), "My-machine");
        assert_eq!(free("/dev/kvm", 64, |_| false), "dev-kvm");
        assert_eq!(free("", 64, |_| false), "vm");
        assert_eq!(free("虚拟机", 64, |_| false), "vm");
        assert_eq!(free(&"x".repeat(100), 64, |_| false), "x".repeat(64));
    }

    #[test]
    fn the_second_of_a_name_gets_a_number() {
        let taken = ["a", "a-2"];
        assert_eq!(free("a", 64, |name| taken.contains(&name)), "a-3");
        let long = "x".repeat(64);
        assert_eq!(free(&long, 64, |name| name == long), format!("{}-2", "x".repeat(62)));
        let short = Names::new(0);
        let names = [short.take(&long), short.take(&long)];
        assert_eq!((names[0].as_str().len(), names[1].as_str().len()), (MIN_NAME, MIN_NAME));
    }

    #[test]
    fn a_name_is_free_again_when_its_machine_is_gone() {
        let names = Names::new(64);
        let [first, second] = [names.take("a"), names.take("a")];
        assert_eq!((first.as_str(), second.as_str()), ("a", "a-2"));
        drop(first);
        assert_eq!(names.count(), 1);
        assert_eq!(names.take("a").as_str(), "a");
    }

    proptest! {
        #[test]
        fn whatever_the_names_are_each_machine_gets_one_of_its_own(names in prop::collection::vec(".{0,80}", 1..40)) {
            let mut taken = HashSet::new();
            for name in names {
                let name = free(&name, 64, |name| taken.contains(name));
                prop_assert!(check_name(&name).is_ok(), "{name}");
                prop_assert!(taken.insert(name));
            }
        }
    }
}
