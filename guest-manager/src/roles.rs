//! What clients may do, by who they are: the roles that `--allow` gives to users and groups.
//!
//! ```text
//!   who connects (uid, gid, supplementary groups)
//!     --> root, or the manager's own user: admin
//!     --> else the highest role that an --allow gives to its user, one of its groups, or everyone
//!     --> else refused
//!   by the read-only socket: observe at most, and everyone has that
//! ```
//!
//! Pure but for [`Allowance`]'s parsing, which looks up the names of users and groups.

use std::{collections::HashMap, fmt, str::FromStr};

use sepal_schema::{
    error::{Error, Kind},
    facet::{Right, Rights},
    manager_capnp,
};

/// What a client may do; documented in `manager.capnp`. Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Redeem tokens.
    None,
    /// See all guests, and what they print.
    Observe,
    /// Do everything to all guests but debug them, and launch guests from files that it passes.
    Operate,
    /// Everything, with the manager's own authority.
    Admin,
}

impl Role {
    /// All roles, the least first.
    pub const ALL: [Self; 4] = [Self::None, Self::Observe, Self::Operate, Self::Admin];

    /// What the guests permit that a client with this role finds or launches.
    pub fn rights(self) -> Rights {
        match self {
            Self::None => Rights::NONE,
            Self::Observe => Rights::from(Right::Observe) | Right::Output,
            Self::Operate => Rights::ALL.without(Right::Debug),
            Self::Admin => Rights::ALL,
        }
    }

    /// Whether it is enough for what needs `needed`.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, naming the role that `what` needs and this one. Who the caller is seen as is known elsewhere.
    pub fn check(self, needed: Self, what: &str) -> Result<(), Error> {
        if self >= needed {
            return Ok(());
        }
        let message = format!("{what} needs the role {needed}, and this client has the role {self}");
        Err(Error::new(Kind::PermissionDenied, message))
    }

    /// The role as it is written on command lines and in errors: `operate`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Observe => "observe",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let role = Self::ALL.into_iter().find(|role| role.name() == name);
        role.ok_or_else(|| format!("\"{name}\" is no role: none, observe, operate and admin are"))
    }
}

impl From<Role> for manager_capnp::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::None => Self::None,
            Role::Observe => Self::Observe,
            Role::Operate => Self::Operate,
            Role::Admin => Self::Admin,
        }
    }
}

/// Whom an allowance is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    /// The user with this id.
    User(u32),
    /// Every member of the group with this id.
    Group(u32),
    /// Everyone who can connect.
    Everyone,
}

/// What an `--allow` says: `uid:1000=operate`, `group:ops=observe`, `everyone=none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// To whom.
    pub subject: Subject,
    /// What.
    pub role: Role,
}

impl FromStr for Allowance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || {
            format!(
                "\"{text}\" has not the form SUBJECT=ROLE, SUBJECT being uid:NUMBER, gid:NUMBER, user:NAME, group:NAME or everyone"
            )
        };
        let (subject, role) = text.rsplit_once('=').ok_or_else(form)?;
        let role = role.parse()?;
        let subject = match subject.split_once(':') {
            Some(("uid", number)) => Subject::User(id(number)?),
            Some(("gid", number)) => Subject::Group(id(number)?),
            Some(("user", name)) => Subject::User(look_up("user", name, |name| {
                Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw()))
            })?),
            Some(("group", name)) => Subject::Group(look_up("group", name, |name| {
                Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()))
            })?),
            None if subject == "everyone" => Subject::Everyone,
            Some(_) | None => return Err(form()),
        };
        Ok(Self { subject, role })
    }
}

/// Where the kernel has no number for somebody in this user namespace, it shows this one (`overflowuid` and `overflowgid`, user_namespaces(7)),
/// so that it says nothing about who that is.
const OVERFLOW: u32 = 65534;

fn id(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(OVERFLOW) => Err(format!(
            "the number {OVERFLOW} stands for all whom the kernel does not know here, so that it can be allowed nothing; everyone can"
        )),
        // What the kernel takes for no id at all.
        Ok(u32::MAX) | Err(_) => Err(format!("\"{text}\" is not the number of a user or group")),
        Ok(id) => Ok(id),
    }
}

fn look_up(what: &str, name: &str, find: impl FnOnce(&str) -> nix::Result<Option<u32>>) -> Result<u32, String> {
    match find(name) {
        Ok(Some(found)) => id(&found.to_string()),
        Ok(None) => Err(format!("there is no {what} \"{name}\"")),
        Err(error) => Err(format!("the {what} \"{name}\" cannot be looked up: {error}")),
    }
}

/// Who connects, as the kernel noted it then.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: &'a [u32],
}

/// Who has which role.
#[derive(Debug, Clone)]
pub struct Roles {
    own_uid: u32,
    given: HashMap<Subject, Role>,
}

impl Roles {
    /// The roles at a manager of the user `own_uid`. Of two allowances for the same subject the higher one counts.
    pub fn new(own_uid: u32, allowances: impl IntoIterator<Item = Allowance>) -> Self {
        let mut given = HashMap::new();
        for Allowance { subject, role } in allowances {
            let slot = given.entry(subject).or_insert(role);
            *slot = role.max(*slot);
        }
        Self { own_uid, given }
    }

    /// Whether anybody else than root and the manager's own user may connect.
    pub fn names_others(&self) -> bool {
        !self.given.is_empty()
    }

    /// The role of somebody who connects to the manager's socket; none if that is refused.
    pub fn of(&self, peer: Peer<'_>) -> Option<Role> {
        // Where others may connect, a manager that is seen so itself cannot tell them from its own user.
        let own = peer.uid == self.own_uid && (peer.uid != OVERFLOW || !self.names_others());
        if own || peer.uid == 0 {
            return Some(Role::Admin);
        }
        let groups = peer.groups.iter().copied().chain([peer.gid]).map(Subject::Group);
        let subjects = groups.chain([Subject::User(peer.uid), Subject::Everyone]);
        subjects.filter_map(|subject| self.given.get(&subject)).max().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn roles(own_uid: u32, allowed: &[&str]) -> Roles {
        Roles::new(own_uid, allowed.iter().map(|text| text.parse().unwrap()))
    }

    fn peer(uid: u32, groups: &[u32]) -> Peer<'_> {
        Peer {
            uid,
            gid: groups.first().copied().unwrap_or(9),
            groups,
        }
    }

    #[test]
    fn without_allowances_only_the_same_user_and_root_are_served() {
        let roles = roles(7, &[]);
        assert_eq!(roles.of(peer(7, &[])), Some(Role::Admin));
        assert_eq!(roles.of(peer(0, &[])), Some(Role::Admin));
        // The second is what the kernel shows for a user that is unknown in this namespace.
        assert_eq!([8, OVERFLOW].map(|uid| roles.of(peer(uid, &[0]))), [None, None]);
        assert!(!roles.names_others());
    }

    #[test]
    fn a_manager_that_the_kernel_cannot_name_trusts_nobody_else_of_the_sort() {
        let nobody = peer(OVERFLOW, &[]);
        assert_eq!(
            roles(OVERFLOW, &[]).of(nobody),
            Some(Role::Admin),
            "its socket is its own"
        );
        assert_eq!(roles(OVERFLOW, &["uid:7=admin"]).of(nobody), None);
    }

    #[test]
    fn the_highest_role_counts() {
        let roles = roles(
            0,
            &["uid:1000=observe", "gid:100=operate", "gid:27=admin", "everyone=none"],
        );
        assert_eq!(roles.of(peer(1000, &[])), Some(Role::Observe));
        assert_eq!(
            roles.of(peer(1000, &[1, 100])),
            Some(Role::Operate),
            "a supplementary group"
        );
        assert_eq!(roles.of(peer(1001, &[100])), Some(Role::Operate), "the effective group");
        assert_eq!(roles.of(peer(1001, &[100, 27])), Some(Role::Admin));
        assert_eq!(roles.of(peer(1002, &[5])), Some(Role::None));
    }

    #[test]
    fn names_are_looked_up_and_what_is_not_understood_is_refused() {
        let parse = |text: &str| text.parse::<Allowance>();
        assert_eq!(parse("user:root=admin").unwrap().subject, Subject::User(0));
        assert_eq!(parse("group:root=admin").unwrap().subject, Subject::Group(0));
        for (text, said) in [
            ("user:no-such-user=admin", "no user \"no-such-user\""),
            ("group:no-such-group=admin", "no group"),
            ("uid:-1=admin", "not the number"),
            ("uid:4294967295=admin", "not the number"),
            ("gid:65534=observe", "does not know"),
            ("uid:1=root", "no role"),
            ("uid:1", "SUBJECT=ROLE"),
            ("1000=observe", "SUBJECT=ROLE"),
            ("", "SUBJECT=ROLE"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn a_denial_names_both_roles() {
        let error = Role::Observe.check(Role::Operate, "launch").unwrap_err();
        assert_eq!(error.kind, Kind::PermissionDenied);
        assert_eq!(
            error.message,
            "launch needs the role operate, and this client has the role observe"
        );
        assert_eq!(Role::Operate.check(Role::Operate, "launch"), Ok(()));
    }

    proptest! {
        /// Another allowance never takes anything away, and concerns nobody whom it does not name.
        #[test]
        fn allowances_only_add(
            given in prop::collection::vec((0u32..4, 0usize..3, 0usize..4), 0..8),
            more in (0u32..4, 0usize..3, 0usize..4),
            uid in 1u32..4,
            groups in prop::collection::vec(0u32..4, 0..3),
        ) {
            let allowance = |(id, kind, role): (u32, usize, usize)| Allowance {
                subject: [Subject::User(id), Subject::Group(id), Subject::Everyone][kind],
                role: Role::ALL[role],
            };
            let given: Vec<_> = given.into_iter().map(allowance).collect();
            let more = allowance(more);
            let peer = peer(uid, &groups);
            let before = Roles::new(99, given.clone()).of(peer);
            let after = Roles::new(99, given.into_iter().chain([more])).of(peer);
            let named = match more.subject {
                Subject::User(id) => id == uid,
                Subject::Group(id) => id == peer.gid || groups.contains(&id),
                Subject::Everyone => true,
            };
            let expected = if named { before.max(Some(more.role)) } else { before };
            prop_assert_eq!(after, expected);
        }

        #[test]
        fn a_higher_role_permits_more(a in 0usize..4, b in 0usize..4) {
            let (low, high) = (Role::ALL[a.min(b)], Role::ALL[a.max(b)]);
            prop_assert_eq!(low.rights().and(high.rights()), low.rights());
        }
    }
}
