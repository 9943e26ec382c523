//! The figures of all guests in one call, and what the manager adds to what a component tells.

use sepal_schema::{
    error::{Error, Kind},
    info::GuestStatus,
};

use crate::{
    fake::Behaviour,
    world::{Caller, World, info, kill, named, run, status},
};

/// One guest in the answer.
#[derive(Debug)]
struct Told {
    name: String,
    uuid: Vec<u8>,
    figures: Result<Figures, Error>,
}

#[derive(Debug, Clone, Copy)]
struct Figures {
    lost: u64,
    age_ns: u64,
    uptime_ns: u64,
    resident: u64,
    shared: u64,
}

impl Told {
    fn figures(&self) -> Figures {
        self.figures.clone().unwrap()
    }
}

/// Those after a name, at most so many, and whether there are others after them.
async fn page(caller: &Caller, after: &str, most: u32) -> (Vec<Told>, bool) {
    let mut request = caller.manager.stats_request();
    request.get().set_after(after);
    request.get().set_most(most);
    let answer = request.send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    let guests = answer.get_guests().unwrap().iter().map(|guest| Told {
        name: guest.get_name().unwrap().to_string().unwrap(),
        uuid: guest.get_uuid().unwrap().to_vec(),
        figures: match guest.has_error() {
            true => Err(Error::read(guest.get_error().unwrap()).unwrap()),
            false => {
                let stats = guest.get_stats().unwrap();
                let memory = stats.get_memory().unwrap();
                Ok(Figures {
                    lost: stats.get_serial_dropped(),
                    age_ns: stats.get_age_ns(),
                    uptime_ns: stats.get_uptime_ns(),
                    resident: memory.get_resident(),
                    shared: memory.get_shared(),
                })
            }
        },
    });
    (guests.collect(), answer.get_more())
}

async fn names(caller: &Caller, after: &str, most: u32) -> (String, bool) {
    let (told, more) = page(caller, after, most).await;
    (told.into_iter().map(|told| told.name).collect(), more)
}

/// Asks until all of them have told something just now: on a busy host an answer may well take longer than the manager waits.
async fn until_all_answer(caller: &Caller) -> Vec<Told> {
    loop {
        let (told, _) = page(caller, "", 0).await;
        let fresh = |told: &Told| told.figures.as_ref().is_ok_and(|figures| figures.age_ns == 0);
        if told.iter().all(fresh) {
            return told;
        }
    }
}

#[test]
fn those_of_all_that_run_are_told_page_by_page() {
    run(async |world| {
        let caller = world.caller();
        assert_eq!(names(&caller, "", 0).await, (String::new(), false));
        let mut launched = Vec::new();
        for name in ["b", "d", "a", "c"] {
            launched.push(caller.launch(name).await.unwrap());
        }
        assert_eq!(names(&caller, "", 0).await, ("abcd".into(), false));
        assert_eq!(names(&caller, "", 2).await, ("ab".into(), true));
        assert_eq!(names(&caller, "b", 2).await, ("cd".into(), false));
        assert_eq!(names(&caller, "bb", 1).await, ("c".into(), true));
        assert_eq!(names(&caller, "d", 0).await, (String::new(), false));
        let told = until_all_answer(&caller).await;
        for one in &told {
            assert!(one.figures().lost == 17 && one.figures().uptime_ns > 0, "{one:?}");
            let uuid = info(&caller.lookup(&one.name).await.unwrap()).await.upkeep.uuid;
            assert_eq!(uuid.map_or(Vec::new(), |uuid| uuid.as_bytes().to_vec()), one.uuid);
        }
        // Who has ended, and who has not begun, has nothing to tell.
        kill(&launched[0].guest).await.unwrap();
        let lifecycle = caller.new_guest("e").await.unwrap();
        caller.create(&lifecycle, named("")).await.unwrap();
        assert_eq!(names(&caller, "", 0).await, ("acd".into(), false));
    });
}

#[test]
fn memory_is_what_the_host_says_of_the_component() {
    run(async |world| {
        // Its process is this one, as far as the manager knows.
        world.fake.behaviour.set(Behaviour {
            is_the_test: true,
            ..Behaviour::default()
        });
        let caller = world.caller();
        let _launched = caller.launch("a").await.unwrap();
        let figures = until_all_answer(&caller).await[0].figures();
        assert!(figures.resident > figures.shared && figures.shared > 0, "{figures:?}");
    });
}

#[test]
fn one_that_does_not_answer_spoils_nothing() {
    run(async |world| {
        let caller = world.caller();
        let _silent = caller.launch("a").await.unwrap();
        let silent = world.fake.last();
        let _told = caller.launch("b").await.unwrap();
        until_all_answer(&caller).await;
        silent.figures.mute.change(|mute| *mute = true);
        let dumb = begin_dumb(&world, &caller, "c").await;
        for _ in 0..3 {
            let (told, more) = page(&caller, "", 0).await;
            assert_eq!((told.len(), more), (3, false));
            let old = told[0].figures();
            assert!(old.lost == 17 && old.age_ns > 0, "told before: {old:?}");
            assert!(told[1].figures.is_ok());
            assert_eq!(told[2].figures.as_ref().unwrap_err().kind, Kind::TimedOut);
        }
        drop(dumb);
    });
}

/// A guest whose component never tells any figures.
async fn begin_dumb(world: &World, caller: &Caller, name: &str) -> impl Sized {
    let lifecycle = caller.new_guest(name).await.unwrap();
    caller.create(&lifecycle, named("")).await.unwrap();
    world.fake.last().figures.mute.change(|mute| *mute = true);
    let over = lifecycle.run_request().send().promise;
    let guest = caller.lookup(name).await.unwrap();
    while status(&guest).await != GuestStatus::Running {}
    (lifecycle, over)
}
