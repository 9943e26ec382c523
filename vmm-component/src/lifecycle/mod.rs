//! The life of one virtual machine as a pure state machine: requests and happenings go in, effects and replies come out.
//!
//! ```text
//!                 create                       built                  run
//!      +------+ ---------> +----------+ ----------------> +---------+ ----> +---------+
//!      | Idle |            | Creating |                   | Created |       | Running |
//!      +------+ <--------- +----------+ <---------------- +---------+       +---------+
//!        ^  ^     failed        |       create (replaces)      |                 |
//!        |  |                   | stop                         | stop            | stop, the guest ends,
//!        |  |                   v                              v                 v a vCPU fails or cannot start
//!        |  |              +-----------------------------------------------------------+
//!        |  +------------- |                         Stopping                          |
//!        |     torn down   +-----------------------------------------------------------+
//!        +-- then, if nobody can come any more: exit
//! ```
//!
//! | request | Idle | Creating | Created | Running | Stopping |
//! |---|---|---|---|---|---|
//! | create | -> Creating | ALREADY_RUNNING | -> Creating, the old one destroyed | ALREADY_RUNNING | ALREADY_RUNNING |
//! | bind | refused | with create | the guest | the guest | refused |
//! | run | NOT_CREATED | after create | -> Running | ALREADY_RUNNING | ALREADY_RUNNING |
//! | stop | replies | cancels create, -> Stopping | -> Stopping | -> Stopping, run = CONTROLLER_FORCED_HALT | waits for the same end |
//! | nobody can come any more | exit | cancels create, exit | -> Stopping, exit | -> Stopping, exit | exit after it |
//! | the manager left, another may come | exit, or lingers after a guest that ran | cancels create, exit | goes on | goes on | lingers after a guest that ran, otherwise exit |
//!
//! Lingering is for the next manager, who may want to know how the guest ended; after a while it is an exit, too.
//!
//! Every creation has a generation of its own; what an older one reports is ignored. A stop, and the run that it ends, is answered only after
//! the machine is gone, so that create may follow at once.

#[cfg(test)]
mod tests;

use sepal_schema::error::{Error, Kind};

/// Counts the creations of a component, from 1.
pub type Generation = u64;

/// Names a request until it is answered.
pub type Token = u64;

/// How a guest ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest shut itself down.
    Shutdown,
    /// The guest was reset, by itself or by a device.
    Reset {
        /// Says how.
        detail: String,
        /// The device, if it was one.
        about: String,
    },
}

/// What a request is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To create and stop.
    Completed(Result<(), Error>),
    /// To bind: the generation of the guest that was bound.
    Bound(Result<Generation, Error>),
    /// To run.
    Ended(Result<Ending, Error>),
}

/// What goes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A request to make a machine.
    Create(Token),
    /// A request for the guest that was made.
    Bind(Token),
    /// A request to run it.
    Run(Token),
    /// A request to end it.
    Stop(Token),
    /// [`Effect::Build`] is done.
    Built(Generation, Result<(), Error>),
    /// [`Effect::Start`] failed; its success needs no word.
    StartFailed(Generation, Error),
    /// The guest came to its end, or a vCPU failed.
    Ended(Generation, Result<Ending, Error>),
    /// [`Effect::TearDown`] is done: no thread of the machine is left.
    TornDown(Generation),
    /// Nobody is left who could ask for anything.
    Disconnected,
    /// The manager has gone, but its successor may come.
    Left,
    /// It has come.
    Attended,
    /// The time of [`Effect::Linger`] is over.
    Lingered(Absence),
}

/// Counts how often the manager has left.
pub type Absence = u64;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make the machine that the request describes, after destroying the machine of generation `replaces`. Answered by [`Input::Built`].
    Build {
        /// Generation of the new machine.
        generation: Generation,
        /// The create request.
        request: Token,
        /// The machine to destroy before.
        replaces: Option<Generation>,
    },
    /// Make the build end soon, one way or the other. [`Input::Built`] still follows.
    CancelBuild(Generation),
    /// Start vCPUs and dispatch loops.
    Start(Generation),
    /// End all threads of the machine and give its memory back. Answered by [`Input::TornDown`].
    TearDown(Generation),
    /// Tell whoever holds this guest that it is gone, and how it ended. Each generation that was built goes exactly once.
    Gone(Generation, Result<Ending, Error>),
    /// Answer a request.
    Reply(Token, Reply),
    /// Nothing is left to go on, but a successor might ask how it ended: wait a while for one, then [`Input::Lingered`].
    Linger(Absence),
    /// End the process.
    Exit,
}

#[derive(Debug)]
enum State {
    Idle,
    Creating {
        generation: Generation,
        create: Token,
        binds: Vec<Token>,
        run: Option<Token>,
    },
    Created(Generation),
    Running {
        generation: Generation,
        run: Token,
    },
    Stopping {
        generation: Generation,
        /// The build has been cancelled but has not reported yet; this create is to be answered then.
        building: Option<Token>,
        run: Option<(Token, Result<Ending, Error>)>,
        stops: Vec<Token>,
    },
}

/// The state machine.
#[derive(Debug)]
pub struct Lifecycle {
    state: State,
    last_generation: Generation,
    leaving: bool,
    /// A manager is there.
    attended: bool,
    absences: Absence,
    /// The latest guest ran and is no more.
    has_run: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            state: State::Idle,
            last_generation: 0,
            leaving: false,
            attended: true,
            absences: 0,
            has_run: false,
        }
    }
}

impl Lifecycle {
    /// Takes one input and says what is to be done, in this order.
    pub fn handle(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Create(token) => self.create(token),
            Input::Bind(token) => self.bind(token),
            Input::Run(token) => self.run(token),
            Input::Stop(token) => self.stop(token),
            Input::Built(generation, outcome) => self.built(generation, outcome),
            Input::StartFailed(generation, error) => self.ended(generation, Err(error)),
            Input::Ended(generation, ending) => self.ended(generation, ending),
            Input::TornDown(generation) => self.torn_down(generation),
            Input::Disconnected => self.disconnected(),
            Input::Left => self.left(),
            Input::Attended => {
                self.attended = true;
                Vec::new()
            }
            Input::Lingered(absence) => self.lingered(absence),
        }
    }

    /// The generation that runs, if one does.
    pub fn running(&self) -> Option<Generation> {
        match self.state {
            State::Running { generation, .. } => Some(generation),
            _ => None,
        }
    }

    /// A guest is being stopped.
    pub fn is_stopping(&self) -> bool {
        matches!(self.state, State::Stopping { .. })
    }

    fn create(&mut self, token: Token) -> Vec<Effect> {
        let replaces = match self.state {
            State::Idle => None,
            State::Created(generation) => Some(generation),
            State::Creating { .. } => return completed(token, Err(already_running("a guest is being created"))),
            State::Running { .. } => return completed(token, Err(already_running("a guest runs; stop it first"))),
            State::Stopping { .. } => return completed(token, Err(already_running("a guest is still being stopped"))),
        };
        self.last_generation += 1;
        self.has_run = false;
        let generation = self.last_generation;
        self.state = State::Creating {
            generation,
            create: token,
            binds: Vec::new(),
            run: None,
        };
        let gone = replaces.map(|old| Effect::Gone(old, Err(halted("another create replaced the guest"))));
        let build = Effect::Build {
            generation,
            request: token,
            replaces,
        };
        gone.into_iter().chain([build]).collect()
    }

    fn bind(&mut self, token: Token) -> Vec<Effect> {
        let outcome = match &mut self.state {
            State::Creating { binds, .. } => {
                binds.push(token);
                return Vec::new();
            }
            State::Created(generation) | State::Running { generation, .. } => Ok(*generation),
            State::Idle => Err(not_created()),
            State::Stopping { .. } => Err(Error::new(Kind::NotCreated, "the guest is being stopped")),
        };
        vec![Effect::Reply(token, Reply::Bound(outcome))]
    }

    fn run(&mut self, token: Token) -> Vec<Effect> {
        let error = match &mut self.state {
            State::Idle => not_created(),
            State::Creating { run: run @ None, .. } => {
                *run = Some(token);
                return Vec::new();
            }
            State::Created(generation) => {
                let generation = *generation;
                self.state = State::Running { generation, run: token };
                return vec![Effect::Start(generation)];
            }
            State::Creating { .. } | State::Running { .. } => already_running("the guest has been started already"),
            State::Stopping { .. } => already_running("the guest is still being stopped"),
        };
        vec![Effect::Reply(token, Reply::Ended(Err(error)))]
    }

    fn stop(&mut self, token: Token) -> Vec<Effect> {
        if let State::Stopping { stops, .. } = &mut self.state {
            stops.push(token);
            return Vec::new();
        }
        if matches!(self.state, State::Idle) {
            return completed(token, Ok(()));
        }
        self.begin_stop(vec![token])
    }

    /// Leaves Creating, Created or Running for Stopping.
    fn begin_stop(&mut self, stops: Vec<Token>) -> Vec<Effect> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Creating {
                generation,
                create,
                binds,
                run,
            } => {
                self.state = State::Stopping {
                    generation,
                    building: Some(create),
                    run: None,
                    stops,
                };
                let mut effects = vec![Effect::CancelBuild(generation)];
                let why = Error::new(Kind::NotCreated, "the guest was stopped while it was being created");
                effects.extend(refuse_waiting(binds, run, &why));
                effects
            }
            State::Created(generation) => {
                self.state = State::Stopping {
                    generation,
                    building: None,
                    run: None,
                    stops,
                };
                vec![Effect::TearDown(generation)]
            }
            State::Running { generation, run } => {
                self.state = State::Stopping {
                    generation,
                    building: None,
                    run: Some((run, Err(halted("the guest was stopped by force")))),
                    stops,
                };
                vec![Effect::TearDown(generation)]
            }
            state @ (State::Idle | State::Stopping { .. }) => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn built(&mut self, built: Generation, outcome: Result<(), Error>) -> Vec<Effect> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Creating {
                generation,
                create,
                binds,
                run,
            } if generation == built => match outcome {
                Ok(()) => {
                    let mut effects = completed(create, Ok(()));
                    effects.extend(
                        binds
                            .into_iter()
                            .map(|bind| Effect::Reply(bind, Reply::Bound(Ok(generation)))),
                    );
                    self.state = State::Created(generation);
                    effects.extend(run.map(|run| self.run(run)).into_iter().flatten());
                    effects
                }
                Err(error) => {
                    let why = Error::new(Kind::NotCreated, format!("create failed: {}", error.message));
                    let mut effects = vec![Effect::Gone(generation, Err(error.clone()))];
                    effects.extend(completed(create, Err(error)));
                    effects.extend(refuse_waiting(binds, run, &why));
                    effects
                }
            },
            State::Stopping {
                generation,
                building: Some(create),
                run,
                stops,
            } if generation == built => {
                let cancelled = Error::new(Kind::Cancelled, "create was interrupted by stop");
                let mut effects = completed(create, Err(cancelled));
                self.state = State::Stopping {
                    generation,
                    building: None,
                    run,
                    stops,
                };
                match outcome {
                    // It was ready before the cancellation reached it.
                    Ok(()) => effects.push(Effect::TearDown(generation)),
                    Err(_) => effects.extend(self.torn_down(generation)),
                }
                effects
            }
            state => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn ended(&mut self, ended: Generation, ending: Result<Ending, Error>) -> Vec<Effect> {
        match self.state {
            State::Running { generation, run } if generation == ended => {
                let run = Some((run, ending));
                self.state = State::Stopping {
                    generation,
                    building: None,
                    run,
                    stops: Vec::new(),
                };
                vec![Effect::TearDown(generation)]
            }
            _ => Vec::new(),
        }
    }

    fn torn_down(&mut self, gone: Generation) -> Vec<Effect> {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Stopping {
                generation,
                building: None,
                run,
                stops,
            } if generation == gone => {
                let ending = match &run {
                    Some((_, ending)) => ending.clone(),
                    None => Err(halted("the guest was stopped before it ran")),
                };
                self.has_run = run.is_some();
                let mut effects = vec![Effect::Gone(generation, ending)];
                effects.extend(run.map(|(run, ending)| Effect::Reply(run, Reply::Ended(ending))));
                effects.extend(stops.into_iter().flat_map(|stop| completed(stop, Ok(()))));
                effects.extend(self.rest());
                effects
            }
            state => {
                self.state = state;
                Vec::new()
            }
        }
    }

    fn disconnected(&mut self) -> Vec<Effect> {
        self.leaving = true;
        match self.state {
            State::Idle => vec![Effect::Exit],
            State::Stopping { .. } => Vec::new(),
            _ => self.begin_stop(Vec::new()),
        }
    }

    fn left(&mut self) -> Vec<Effect> {
        self.attended = false;
        self.absences += 1;
        match &self.state {
            State::Idle if self.has_run => self.rest().into_iter().collect(),
            // What would come of it can be made anew by whoever wants it.
            State::Idle | State::Creating { .. } | State::Stopping { run: None, .. } => self.disconnected(),
            State::Created(_) | State::Running { .. } | State::Stopping { run: Some(_), .. } => Vec::new(),
        }
    }

    fn lingered(&mut self, absence: Absence) -> Vec<Effect> {
        match self.state {
            State::Idle if !self.attended && absence == self.absences => self.disconnected(),
            _ => Vec::new(),
        }
    }

    /// What follows when there is no guest any more.
    fn rest(&self) -> Option<Effect> {
        match (self.leaving, self.attended) {
            (true, _) => Some(Effect::Exit),
            (false, true) => None,
            (false, false) => Some(Effect::Linger(self.absences)),
        }
    }
}

fn completed(token: Token, outcome: Result<(), Error>) -> Vec<Effect> {
    vec![Effect::Reply(token, Reply::Completed(outcome))]
}

/// Answers those that waited for a create of which nothing came.
fn refuse_waiting(binds: Vec<Token>, run: Option<Token>, why: &Error) -> impl Iterator<Item = Effect> {
    let bound = binds
        .into_iter()
        .map(|bind| Effect::Reply(bind, Reply::Bound(Err(why.clone()))));
    let ended = run.map(|run| Effect::Reply(run, Reply::Ended(Err(why.clone()))));
    bound.chain(ended)
}

fn already_running(message: &str) -> Error {
    Error::new(Kind::AlreadyRunning, message)
}

fn halted(message: &str) -> Error {
    Error::new(Kind::ControllerForcedHalt, message)
}

fn not_created() -> Error {
    Error::new(Kind::NotCreated, "there is no guest; create comes first")
}
