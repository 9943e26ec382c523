//! Which guest uses which image, so that no image is written to by one while another uses it.
//!
//! Within a manager a table tells, by name. Towards guests of other managers, and whoever else keeps to it, the image carries a lock
//! (flock(2)): exclusive for a guest that writes, shared for others. The lock belongs to the open file that the component gets, so it lasts
//! exactly as long as somebody has that, even when the manager is killed.
//!
//! Who only wants to know whether an image could be used ([`Claims::look`]) asks the same table, and for locks the kernel's list of them, so that
//! it is in nobody's way.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{AtFlags, FileType, FlockOperation, StatxFlags, flock, makedev, statx};
use sepal_schema::error::{Error, Kind};

use super::no_resources;

/// The rings of a guest that has ended keep its images for some 50 ms more: so long, and far longer, a lock on one that was let go of is waited for.
const PATIENCE: Duration = Duration::from_millis(200);
/// Between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// What identifies a file on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileId {
    device: u64,
    inode: u64,
}

#[derive(Debug)]
struct Use {
    guest: String,
    exclusive: bool,
    number: u64,
}

#[derive(Debug, Default)]
struct Table {
    used: HashMap<FileId, Vec<Use>>,
    /// What was let go of a moment ago, oldest first.
    let_go: VecDeque<(Instant, FileId)>,
    numbers: u64,
}

impl Table {
    fn forget_long_gone(&mut self) {
        while self.let_go.front().is_some_and(|(when, _)| when.elapsed() > PATIENCE) {
            self.let_go.pop_front();
        }
    }

    /// Whether `guest` could use a file besides those that do.
    fn check(&self, guest: &str, field: &str, file: FileId, exclusive: bool) -> Result<(), Error> {
        let uses = self.used.get(&file).map_or(&[][..], Vec::as_slice);
        let Some(other) = uses.iter().find(|other| exclusive || other.exclusive) else {
            return Ok(());
        };
        let who = match other.guest == guest {
            true => "another disk of this guest".to_owned(),
            false => format!("guest \"{}\"", other.guest),
        };
        Err(in_use(field, &who, other.exclusive))
    }

    /// Whether a guest let go of this file a moment ago.
    fn was_let_go(&mut self, file: FileId) -> bool {
        self.forget_long_gone();
        self.let_go.iter().any(|(_, known)| *known == file)
    }
}

/// The images that are in use.
#[derive(Debug, Clone, Default)]
pub struct Images(Arc<Mutex<Table>>);

/// An image in use by a guest, until this is dropped.
#[derive(Debug)]
pub struct ImageUse {
    images: Images,
    file: FileId,
    number: u64,
}

impl Drop for ImageUse {
    fn drop(&mut self) {
        let mut table = self.images.table();
        if let Some(uses) = table.used.get_mut(&self.file) {
            uses.retain(|used| used.number != self.number);
            if uses.is_empty() {
                table.used.remove(&self.file);
            }
        }
        table.forget_long_gone();
        table.let_go.push_back((Instant::now(), self.file));
    }
}

/// Claims that one configuration makes.
pub(super) struct Claims {
    images: Images,
    /// The guest's name.
    guest: String,
    /// Only looks, and notes here what the configuration itself would use.
    own: Option<Images>,
}

impl Claims {
    /// Images are taken into use by `guest`.
    pub(super) fn new(images: &Images, guest: &str) -> Self {
        Self {
            images: images.clone(),
            guest: guest.to_owned(),
            own: None,
        }
    }

    /// Nothing is taken into use.
    pub(super) fn look(images: &Images) -> Self {
        Self {
            images: images.clone(),
            // What no guest is called.
            guest: String::new(),
            own: Some(Images::default()),
        }
    }

    /// Whether nothing is taken into use.
    pub(super) fn only_looks(&self) -> bool {
        self.own.is_some()
    }

    /// Takes `image` into use, or looks whether that could be done.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`, naming who uses it.
    pub(super) fn claim(&self, field: &str, image: &OwnedFd, exclusive: bool) -> Result<ImageUse, Error> {
        match &self.own {
            None => self.images.claim(&self.guest, field, image, exclusive),
            Some(own) => {
                self.images.look(field, image, exclusive)?;
                own.note(&self.guest, field, Identity::of(field, image)?.file, exclusive)
            }
        }
    }
}

/// Which file an image is.
struct Identity {
    file: FileId,
    /// As proc_locks(5) names it.
    place: String,
}

impl Identity {
    fn of(field: &str, image: &OwnedFd) -> Result<Self, Error> {
        Self::by(field, image, AtFlags::empty())
    }

    /// As the kernel remembers it: nothing is asked of what the file lies on.
    fn remembered(field: &str, image: &OwnedFd) -> Result<Self, Error> {
        Self::by(field, image, AtFlags::STATX_DONT_SYNC)
    }

    fn by(field: &str, image: &OwnedFd, flags: AtFlags) -> Result<Self, Error> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        let status = statx(image, c"", flags | AtFlags::EMPTY_PATH, wanted);
        let status = status.map_err(|error| no_resources(field, &error.into()))?;
        let file = match FileType::from_raw_mode(status.stx_mode.into()) {
            // Whatever node leads to it.
            FileType::BlockDevice => FileId {
                device: u64::MAX,
                inode: makedev(status.stx_rdev_major, status.stx_rdev_minor),
            },
            _ => FileId {
                device: makedev(status.stx_dev_major, status.stx_dev_minor),
                inode: status.stx_ino,
            },
        };
        let (major, minor) = (status.stx_dev_major, status.stx_dev_minor);
        let place = format!("{major:02x}:{minor:02x}:{}", status.stx_ino);
        Ok(Self { file, place })
    }
}

impl Images {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        // Nothing panics between two changes that belong together.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `image` into use, `exclusive` for a guest that writes to it.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`, naming who uses it.
    pub(super) fn claim(&self, guest: &str, field: &str, image: &OwnedFd, exclusive: bool) -> Result<ImageUse, Error> {
        let Identity { file, place } = Identity::of(field, image)?;
        let claimed = self.note(guest, field, file, exclusive)?;
        // Not with the table locked: a lock may be asked for over a network, and the event loop gives images back.
        let wish = match exclusive {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        match patiently(|| self.table().was_let_go(file), || flock(image, wish)) {
            Ok(()) => Ok(claimed),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let holder = holder(&locks(), &place);
                let (who, writes) = holder.unwrap_or_else(|| ("another program".to_owned(), false));
                Err(in_use(field, &who, writes))
            }
            Err(error) => {
                // A file system without locks.
                tracing::debug!(field, "the image cannot be locked: {error}");
                Ok(claimed)
            }
        }
    }

    /// Notes that a guest goes on using `image`, by the open file that has carried the lock all along. Does not block.
    ///
    /// # Errors
    /// `ALREADY_RUNNING`, naming who uses it.
    pub(super) fn claim_again(
        &self,
        guest: &str,
        field: &str,
        image: &OwnedFd,
        exclusive: bool,
    ) -> Result<ImageUse, Error> {
        self.note(guest, field, Identity::remembered(field, image)?.file, exclusive)
    }

    /// Whether `image` could be taken into use.
    ///
    /// # Errors
    /// As for [`Images::claim`], but for locks that the kernel does not show to this process.
    fn look(&self, field: &str, image: &OwnedFd, exclusive: bool) -> Result<(), Error> {
        let Identity { file, place } = Identity::of(field, image)?;
        self.table().check("", field, file, exclusive)?;
        let mut in_the_way = None;
        let look = || {
            in_the_way = holder(&locks(), &place).filter(|(_, writes)| exclusive || *writes);
            match in_the_way {
                Some(_) => Err(rustix::io::Errno::WOULDBLOCK),
                None => Ok(()),
            }
        };
        // Fails with that alone, and then there is somebody.
        let _ = patiently(|| self.table().was_let_go(file), look);
        in_the_way.map_or(Ok(()), |(who, writes)| Err(in_use(field, &who, writes)))
    }

    /// Notes that a guest uses an image, unless another use is in the way.
    fn note(&self, guest: &str, field: &str, file: FileId, exclusive: bool) -> Result<ImageUse, Error> {
        let mut table = self.table();
        table.check(guest, field, file, exclusive)?;
        table.numbers += 1;
        let number = table.numbers;
        table.used.entry(file).or_default().push(Use {
            guest: guest.to_owned(),
            exclusive,
            number,
        });
        Ok(ImageUse {
            images: self.clone(),
            file,
            number,
        })
    }
}

/// Tries to lock, and while `worth_waiting` again if somebody has.
fn patiently(
    worth_waiting: impl Fn() -> bool,
    mut lock: impl FnMut() -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    loop {
        match lock() {
            Err(rustix::io::Errno::WOULDBLOCK) if worth_waiting() => thread::sleep(BETWEEN_TRIES),
            outcome => return outcome,
        }
    }
}

fn in_use(field: &str, who: &str, writes: bool) -> Error {
    let how = if writes { "writes to it" } else { "uses it" };
    let message =
        format!("{field}: {who} {how}; a guest may only write to an image that nobody else uses at the same time");
    Error::new(Kind::AlreadyRunning, message).about(field)
}

/// The locks of the host that the kernel shows to this process.
fn locks() -> String {
    fs::read_to_string("/proc/locks").unwrap_or_default()
}

/// Who has locked the file at `place`, and whether exclusively, by what proc_locks(5) says.
fn holder(locks: &str, place: &str) -> Option<(String, bool)> {
    for line in locks.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        if let [_, "FLOCK", _, access, pid, file, ..] = words[..]
            && file == place
        {
            return Some((format!("process {pid}"), access == "WRITE"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn a_lock_is_waited_for_while_that_is_worth_it() {
        const BUSY: rustix::io::Result<()> = Err(rustix::io::Errno::WOULDBLOCK);
        let tries = std::cell::Cell::new(0);
        let busy_for = |times: u32, worth: u32| {
            tries.set(0);
            patiently(
                || tries.get() < worth,
                || {
                    tries.set(tries.get() + 1);
                    if tries.get() <= times { BUSY } else { Ok(()) }
                },
            )
        };
        assert_eq!((busy_for(2, 9), tries.get()), (Ok(()), 3));
        assert_eq!((busy_for(u32::MAX, 4), tries.get()), (BUSY, 4));
        // Other failures do not pass.
        assert_eq!(
            patiently(|| true, || Err(rustix::io::Errno::IO)),
            Err(rustix::io::Errno::IO)
        );
    }

    #[test]
    fn only_what_a_guest_let_go_of_a_moment_ago_is_worth_waiting_for() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let images = Images::default();
        let used = images
            .claim("web", "disks[0].image", &open(image.path()), true)
            .unwrap();
        let file = used.file;
        assert!(!images.table().was_let_go(file));
        drop(used);
        assert!(images.table().was_let_go(file));
        images.table().let_go[0].0 -= PATIENCE * 2;
        assert!(!images.table().was_let_go(file));
    }

    #[test]
    fn one_writes_or_many_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let images = Images::default();
        let claim = |guest: &str, exclusive| images.claim(guest, "disks[0].image", &open(image.path()), exclusive);
        let writer = claim("web", true).unwrap();
        for exclusive in [true, false] {
            let error = claim("db", exclusive).unwrap_err();
            assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyRunning, "disks[0].image"));
            assert!(error.message.contains("guest \"web\" writes to it"), "{error}");
        }
        assert!(
            claim("web", true)
                .unwrap_err()
                .message
                .contains("another disk of this guest")
        );
        drop(writer);
        let readers = (claim("web", false).unwrap(), claim("db", false).unwrap());
        assert!(claim("mail", true).unwrap_err().message.contains("uses it"));
        drop(readers);
        claim("mail", true).unwrap();
        assert!(images.table().used.is_empty());
    }

    #[test]
    fn the_lock_is_seen_by_others_and_lasts_as_long_as_the_open_file() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (Images::default(), Images::default());
        let writer = open(image.path());
        let claimed = ours.claim("web", "disks[0].image", &writer, true).unwrap();
        drop(claimed);
        let error = theirs
            .claim("db", "disks[1].image", &open(image.path()), false)
            .unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyRunning, "disks[1].image"));
        assert!(
            error.message.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        drop(writer);
        theirs
            .claim("db", "disks[1].image", &open(image.path()), false)
            .unwrap();
    }

    #[test]
    fn who_goes_on_using_an_image_is_in_the_way_of_others_and_asks_for_no_lock() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (before, now) = (Images::default(), Images::default());
        let (field, kept) = ("disks[0].image", open(image.path()));
        let used = before.claim("web", field, &kept, true).unwrap();
        // Also if somebody else had the lock.
        let again = now.claim_again("web", field, &open(image.path()), true).unwrap();
        assert_eq!(again.file, used.file);
        for error in [
            now.claim("db", field, &open(image.path()), false).unwrap_err(),
            now.claim_again("db", field, &kept, false).unwrap_err(),
        ] {
            assert!(error.message.contains("guest \"web\" writes to it"), "{error}");
        }
    }

    #[test]
    fn who_only_looks_is_told_the_same_and_is_in_nobodys_way() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (ours, theirs) = (Images::default(), Images::default());
        let field = "disks[0].image";
        let look = |images: &Images| Claims::look(images).claim(field, &open(image.path()), true);
        let claims = Claims::look(&ours);
        let looked = claims.claim(field, &open(image.path()), true).unwrap();
        let error = claims.claim("disks[1].image", &open(image.path()), false).unwrap_err();
        assert!(error.message.contains("another disk of this guest"), "{error}");
        // Whoever takes it into use meanwhile.
        let writer = open(image.path());
        let used = ours.claim("web", field, &writer, true).unwrap();
        drop(looked);
        let error = look(&ours).unwrap_err();
        assert_eq!((error.kind, &error.about[..]), (Kind::AlreadyRunning, field));
        assert!(error.message.contains("guest \"web\""), "{error}");
        let error = look(&theirs).unwrap_err();
        assert!(
            error.message.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        drop((used, writer));
        look(&ours).unwrap();
        look(&theirs).unwrap();
        assert!(ours.table().used.is_empty());
    }

    #[test]
    fn who_holds_a_lock_is_read() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:01:7 0 EOF\n2: FLOCK  ADVISORY  READ 12 fe:01:7 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 fe:01:8 0 EOF\n";
        assert_eq!(holder(locks, "fe:01:7"), Some(("process 12".into(), false)));
        assert_eq!(holder(locks, "fe:01:8"), Some(("process 13".into(), true)));
        assert_eq!(holder(locks, "fe:01:9"), None);
    }
}
