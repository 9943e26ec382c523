//! The table of the module's head, row by row, and random sequences of operations against what must always hold.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// The world around the state machine: it holds the machine that the effects make, and collects replies.
#[derive(Default)]
struct World {
    lifecycle: Lifecycle,
    next_token: Token,
    asked: BTreeSet<Token>,
    replies: BTreeMap<Token, Reply>,
    /// A build that has not reported yet.
    building: Option<Generation>,
    cancelled: bool,
    /// The machine that exists.
    machine: Option<Generation>,
    started: bool,
    tearing_down: bool,
    gone: BTreeMap<Generation, Result<Ending, Error>>,
    lingering: Option<Absence>,
    exited: bool,
}

impl World {
    fn ask(&mut self, request: impl FnOnce(Token) -> Input) -> Token {
        self.next_token += 1;
        let token = self.next_token;
        self.asked.insert(token);
        self.feed(request(token));
        token
    }

    fn feed(&mut self, input: Input) {
        for effect in self.lifecycle.handle(input) {
            match effect {
                Effect::Build {
                    generation, replaces, ..
                } => {
                    assert_eq!(self.building, None, "two builds at once");
                    assert_eq!(self.machine, replaces, "a machine is replaced unnoticed");
                    assert!(!self.started, "a running machine is replaced");
                    self.machine = None;
                    self.building = Some(generation);
                    self.cancelled = false;
                }
                Effect::CancelBuild(generation) => {
                    assert_eq!(self.building, Some(generation));
                    self.cancelled = true;
                }
                Effect::Start(generation) => {
                    assert_eq!(self.machine, Some(generation));
                    assert!(!self.started, "started twice");
                    self.started = true;
                }
                Effect::TearDown(generation) => {
                    assert_eq!(self.machine, Some(generation));
                    assert!(!self.tearing_down, "torn down twice");
                    self.tearing_down = true;
                }
                Effect::Gone(generation, ending) => {
                    assert!(self.building != Some(generation), "gone while it is being built");
                    assert_eq!(self.gone.insert(generation, ending), None, "gone twice");
                }
                Effect::Reply(token, reply) => {
                    assert!(self.asked.contains(&token));
                    if matches!(reply, Reply::Ended(Ok(_))) {
                        assert_eq!(self.machine, None, "run is answered before the machine is gone");
                    }
                    assert_eq!(self.replies.insert(token, reply), None, "answered twice");
                }
                Effect::Linger(absence) => {
                    assert_eq!((self.machine, self.building), (None, None));
                    assert!(!self.lifecycle.attended, "lingers for nobody");
                    self.lingering = Some(absence);
                }
                Effect::Exit => {
                    assert_eq!(
                        (self.machine, self.building),
                        (None, None),
                        "exit leaves something behind"
                    );
                    assert!(!self.exited, "exits twice");
                    self.exited = true;
                }
            }
        }
    }

    fn finish_build(&mut self, outcome: Result<(), Error>) {
        if let Some(generation) = self.building.take() {
            self.machine = outcome.is_ok().then_some(generation);
            self.feed(Input::Built(generation, outcome));
        }
    }

    fn finish_tear_down(&mut self) {
        if self.tearing_down {
            self.tearing_down = false;
            self.started = false;
            let generation = self.machine.take().unwrap();
            self.feed(Input::TornDown(generation));
        }
    }

    fn created(&mut self) -> Token {
        let create = self.ask(Input::Create);
        self.finish_build(Ok(()));
        create
    }

    fn kind(&self, token: Token) -> Option<Kind> {
        match self.replies.get(&token)? {
            Reply::Completed(Err(error)) | Reply::Bound(Err(error)) | Reply::Ended(Err(error)) => Some(error.kind),
            _ => None,
        }
    }

    fn pending(&self, token: Token) -> bool {
        !self.replies.contains_key(&token)
    }
}

const OK: Reply = Reply::Completed(Ok(()));

fn failure(kind: Kind) -> Error {
    Error::new(kind, "as the test wants it")
}

#[test]
fn disconnect_while_idle_exits() {
    let mut world = World::default();
    world.feed(Input::Disconnected);
    assert!(world.exited);
}

#[test]
fn disconnect_exits_only_after_everything_is_gone() {
    for run in [false, true] {
        let mut world = World::default();
        world.created();
        if run {
            world.ask(Input::Run);
        }
        world.feed(Input::Disconnected);
        assert!(!world.exited && world.tearing_down);
        world.finish_tear_down();
        assert!(world.exited);
    }
    let mut world = World::default();
    world.ask(Input::Create);
    world.feed(Input::Disconnected);
    assert!(!world.exited && world.cancelled);
    world.finish_build(Err(failure(Kind::Cancelled)));
    assert!(world.exited);
}

#[test]
fn a_guest_goes_on_without_its_manager() {
    for run in [false, true] {
        let mut world = World::default();
        world.created();
        if run {
            world.ask(Input::Run);
        }
        world.feed(Input::Left);
        assert!(world.machine.is_some() && !world.tearing_down && !world.exited);
        world.feed(Input::Attended);
        if !run {
            world.ask(Input::Run);
        }
        assert!(world.started);
        // The next one, too; then nobody can come any more.
        world.feed(Input::Left);
        world.feed(Input::Disconnected);
        world.finish_tear_down();
        assert!(world.exited);
    }
}

#[test]
fn a_manager_that_leaves_takes_with_it_what_did_not_begin() {
    let mut world = World::default();
    world.feed(Input::Left);
    assert!(world.exited);

    let mut world = World::default();
    world.ask(Input::Create);
    world.ask(Input::Run);
    world.feed(Input::Left);
    assert!(world.cancelled);
    world.finish_build(Err(failure(Kind::Cancelled)));
    assert!(world.exited);

    let mut world = World::default();
    world.created();
    world.ask(Input::Stop);
    world.feed(Input::Left);
    world.finish_tear_down();
    assert!(world.exited, "it never ran");
}

#[test]
fn how_a_guest_ended_waits_a_while_for_the_next_manager() {
    let ends = |leaves_first: bool| {
        let mut world = World::default();
        world.created();
        world.ask(Input::Run);
        if leaves_first {
            world.feed(Input::Left);
        }
        world.feed(Input::Ended(1, Ok(Ending::Shutdown)));
        world.finish_tear_down();
        if !leaves_first {
            world.feed(Input::Left);
        }
        assert!(!world.exited);
        world
    };
    for leaves_first in [false, true] {
        let mut world = ends(leaves_first);
        assert_eq!(world.lingering, Some(1));
        world.feed(Input::Lingered(1));
        assert!(world.exited);

        let mut world = ends(leaves_first);
        world.feed(Input::Attended);
        world.feed(Input::Lingered(1));
        assert!(!world.exited, "somebody came");
        world.feed(Input::Left);
        world.feed(Input::Lingered(1));
        assert!(!world.exited, "that was the time before");
        world.feed(Input::Lingered(2));
        assert!(world.exited);
    }
}

#[test]
fn a_bad_second_create_leaves_nothing() {
    let mut world = World::default();
    assert_eq!(world.created(), 1);
    let second = world.ask(Input::Create);
    world.finish_build(Err(failure(Kind::BadConfig)));
    assert_eq!(world.kind(second), Some(Kind::BadConfig));
    let run = world.ask(Input::Run);
    assert_eq!(world.kind(run), Some(Kind::NotCreated));
}

#[test]
fn create_while_running_is_refused_and_the_run_stays_pending() {
    let mut world = World::default();
    world.created();
    let run = world.ask(Input::Run);
    let create = world.ask(Input::Create);
    assert_eq!(world.kind(create), Some(Kind::AlreadyRunning));
    assert!(world.pending(run));
}

#[test]
fn run_before_create() {
    let mut world = World::default();
    let run = world.ask(Input::Run);
    assert_eq!(world.kind(run), Some(Kind::NotCreated));
}

#[test]
fn a_second_run_is_refused_and_the_first_stays_pending() {
    for early in [false, true] {
        let mut world = World::default();
        world.ask(Input::Create);
        if !early {
            world.finish_build(Ok(()));
        }
        let first = world.ask(Input::Run);
        let second = world.ask(Input::Run);
        assert_eq!(world.kind(second), Some(Kind::AlreadyRunning));
        assert!(world.pending(first));
    }
}

#[test]
fn a_vcpu_that_cannot_start_leaves_nothing() {
    let mut world = World::default();
    world.created();
    let run = world.ask(Input::Run);
    world.feed(Input::StartFailed(1, failure(Kind::VcpuStartFailure)));
    assert!(world.pending(run));
    world.finish_tear_down();
    assert_eq!(world.kind(run), Some(Kind::VcpuStartFailure));
    let run = world.ask(Input::Run);
    assert_eq!(world.kind(run), Some(Kind::NotCreated));
}

#[test]
fn stop_replies_with_nothing_created() {
    let mut world = World::default();
    let stop = world.ask(Input::Stop);
    assert_eq!(world.replies[&stop], OK);
}

#[test]
fn stop_of_a_created_guest_replies_after_it_is_gone() {
    let mut world = World::default();
    world.created();
    let stop = world.ask(Input::Stop);
    assert!(world.pending(stop));
    world.finish_tear_down();
    assert_eq!(world.replies[&stop], OK);
}

#[test]
fn a_forced_stop_ends_the_run() {
    let mut world = World::default();
    world.created();
    let run = world.ask(Input::Run);
    let stop = world.ask(Input::Stop);
    let second = world.ask(Input::Stop);
    assert!(world.pending(run) && world.pending(stop) && world.pending(second));
    world.finish_tear_down();
    assert_eq!(world.kind(run), Some(Kind::ControllerForcedHalt));
    assert_eq!((&world.replies[&stop], &world.replies[&second]), (&OK, &OK));
}

#[test]
fn a_clean_shutdown_ends_the_run_and_the_guest() {
    let mut world = World::default();
    world.created();
    let run = world.ask(Input::Run);
    world.feed(Input::Ended(1, Ok(Ending::Shutdown)));
    assert!(world.pending(run), "run is answered after the joins");
    world.finish_tear_down();
    assert_eq!(world.replies[&run], Reply::Ended(Ok(Ending::Shutdown)));
    assert_eq!(world.gone[&1], Ok(Ending::Shutdown));
    let run = world.ask(Input::Run);
    assert_eq!(world.kind(run), Some(Kind::NotCreated));
}

#[test]
fn everything_in_one_round_trip() {
    let mut world = World::default();
    let create = world.ask(Input::Create);
    let bind = world.ask(Input::Bind);
    let run = world.ask(Input::Run);
    assert!(world.pending(create) && world.pending(bind) && world.pending(run));
    world.finish_build(Ok(()));
    assert_eq!(world.replies[&create], OK);
    assert_eq!(world.replies[&bind], Reply::Bound(Ok(1)));
    assert!(world.started && world.pending(run));
}

#[test]
fn bind_without_a_guest_says_why() {
    let mut world = World::default();
    let bind = world.ask(Input::Bind);
    assert_eq!(world.kind(bind), Some(Kind::NotCreated));
    world.ask(Input::Create);
    let bind = world.ask(Input::Bind);
    world.finish_build(Err(failure(Kind::KernelLoadFailure)));
    assert_eq!(world.kind(bind), Some(Kind::NotCreated));
    world.created();
    world.ask(Input::Stop);
    let bind = world.ask(Input::Bind);
    assert_eq!(world.kind(bind), Some(Kind::NotCreated));
}

#[test]
fn stop_interrupts_a_create() {
    // The build may notice, or be ready first.
    for outcome in [Err(failure(Kind::Cancelled)), Ok(())] {
        let mut world = World::default();
        let create = world.ask(Input::Create);
        let run = world.ask(Input::Run);
        let stop = world.ask(Input::Stop);
        assert!(world.cancelled && world.pending(stop));
        assert_eq!(world.kind(run), Some(Kind::NotCreated));
        world.finish_build(outcome);
        assert_eq!(world.kind(create), Some(Kind::Cancelled));
        world.finish_tear_down();
        assert_eq!(world.replies[&stop], OK);
        let again = world.created();
        assert_eq!(world.replies[&again], OK);
    }
}

#[test]
fn what_an_old_generation_reports_is_ignored() {
    let mut world = World::default();
    world.created();
    world.ask(Input::Run);
    world.ask(Input::Stop);
    world.finish_tear_down();
    world.created();
    let run = world.ask(Input::Run);
    world.feed(Input::Ended(1, Ok(Ending::Shutdown)));
    world.feed(Input::TornDown(1));
    world.feed(Input::Built(1, Ok(())));
    world.feed(Input::StartFailed(1, failure(Kind::VcpuStartFailure)));
    assert!(world.pending(run) && !world.tearing_down);
}

#[derive(Debug, Clone)]
enum Step {
    Create,
    Bind,
    Run,
    Stop,
    BuildFinishes(bool),
    GuestEnds(u64),
    StartFails,
    TearDownFinishes,
    Disconnect,
    Leave,
    Attend,
    Linger,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Create),
        2 => Just(Step::Bind),
        4 => Just(Step::Run),
        3 => Just(Step::Stop),
        6 => any::<bool>().prop_map(Step::BuildFinishes),
        3 => (0..3_u64).prop_map(Step::GuestEnds),
        1 => Just(Step::StartFails),
        6 => Just(Step::TearDownFinishes),
        1 => Just(Step::Disconnect),
        2 => Just(Step::Leave),
        2 => Just(Step::Attend),
        1 => Just(Step::Linger),
    ]
}

proptest! {
    /// Whatever happens in whatever order: the world's assertions hold, and once stopped, everything has been answered and nothing is left.
    #[test]
    fn any_sequence_of_operations(steps in proptest::collection::vec(step(), 0..60)) {
        let mut world = World::default();
        for step in steps {
            let latest = world.lifecycle.last_generation;
            let asks = matches!(step, Step::Create | Step::Bind | Step::Run | Step::Stop);
            if asks && !world.lifecycle.attended {
                // There is nobody.
                continue;
            }
            match step {
                Step::Create => { world.ask(Input::Create); }
                Step::Bind => { world.ask(Input::Bind); }
                Step::Run => { world.ask(Input::Run); }
                Step::Stop => { world.ask(Input::Stop); }
                Step::BuildFinishes(true) => world.finish_build(Ok(())),
                Step::BuildFinishes(false) => world.finish_build(Err(failure(Kind::BadConfig))),
                // Also from generations that are gone.
                Step::GuestEnds(back) => world.feed(Input::Ended(latest.saturating_sub(back), Ok(Ending::Shutdown))),
                Step::StartFails => world.feed(Input::StartFailed(latest, failure(Kind::VcpuStartFailure))),
                Step::TearDownFinishes => world.finish_tear_down(),
                Step::Disconnect => world.feed(Input::Disconnected),
                Step::Leave => {
                    let goes_on = world.machine.is_some() && !world.tearing_down && !world.lifecycle.leaving;
                    world.feed(Input::Left);
                    prop_assert!(!goes_on || !world.tearing_down, "a guest is torn down with its manager");
                }
                Step::Attend => world.feed(Input::Attended),
                Step::Linger => if let Some(absence) = world.lingering {
                    world.feed(Input::Lingered(absence));
                },
            }
            if world.exited {
                break;
            }
            // Without a guest and a manager it waits for its end.
            let idle = matches!(world.lifecycle.state, State::Idle);
            prop_assert!(world.lifecycle.attended || !idle || world.lingering == Some(world.lifecycle.absences));
        }
        if !world.exited {
            let stop = world.ask(Input::Stop);
            world.finish_build(Ok(()));
            world.finish_tear_down();
            prop_assert_eq!(&world.replies[&stop], &OK);
            prop_assert!(matches!(world.lifecycle.state, State::Idle));
        }
        prop_assert_eq!((world.machine, world.building), (None, None));
        prop_assert_eq!(world.gone.len() as u64, world.lifecycle.last_generation);
        let unanswered: Vec<_> = world.asked.iter().filter(|token| world.pending(**token)).collect();
        prop_assert!(unanswered.is_empty(), "never answered: {:?}", unanswered);
    }
}
