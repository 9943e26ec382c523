//! vCPUs: where they run, what share of the host they get, what they are doing. Their threads are the test's own here, under the names that components
//! give theirs.

use std::sync::mpsc;

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
use sepal_schema::{
    config::{GuestConfig, Limits, Pin},
    cpu_capnp::cpu_controller,
    debug_capnp::debug,
    error::{Error, Kind, read_completion},
    guest_capnp::{VcpuState, guest},
};

use crate::{
    fake::{Behaviour, Does},
    world::{World, info, kill, named, power, run},
};

/// A thread that looks like a vCPU's, until it is dropped.
struct Thread {
    id: Pid,
    _alive: mpsc::Sender<()>,
}

impl Thread {
    fn of_vcpu(index: u8) -> Self {
        let (alive, ends) = mpsc::channel();
        let (tells, told) = mpsc::channel();
        let body = move || {
            tells.send(rustix::thread::gettid()).unwrap();
            let _: Result<(), _> = ends.recv();
        };
        std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(body)
            .unwrap();
        Self {
            id: told.recv().unwrap(),
            _alive: alive,
        }
    }

    fn cpus(&self) -> Vec<u16> {
        of_set(&sched_getaffinity(Some(self.id)).unwrap())
    }

    /// As a thread is that was started just now.
    fn is_new(&self) {
        sched_setaffinity(Some(self.id), &sched_getaffinity(None).unwrap()).unwrap();
    }
}

fn of_set(set: &CpuSet) -> Vec<u16> {
    (0..1024).filter(|cpu| set.is_set(usize::from(*cpu))).collect()
}

/// The processors that there are for the test.
fn own() -> Vec<u16> {
    of_set(&sched_getaffinity(None).unwrap())
}

fn with_cpus(name: &str, cpus: u8) -> GuestConfig {
    GuestConfig { cpus, ..named(name) }
}

fn in_the_test(world: &World) {
    world.fake.behaviour.set(Behaviour {
        is_the_test: true,
        ..Behaviour::default()
    });
}

fn controller(guest: &guest::Client) -> cpu_controller::Client {
    guest.cpu_controller_request().send().pipeline.get_controller()
}

async fn pin(guest: &guest::Client, vcpu: u8, cpus: &[u16]) -> Result<(), Error> {
    let mut call = controller(guest).pin_request();
    call.get().set_vcpu(vcpu);
    call.get().set_cpus(cpus).unwrap();
    read_completion(call.send().promise.await.unwrap().get().unwrap())
}

async fn set_scheduler(guest: &guest::Client, weight: u32, percent: u32) -> Result<(), Error> {
    let mut call = controller(guest).set_scheduler_request();
    let mut scheduler = call.get().init_scheduler();
    scheduler.set_weight(weight);
    scheduler.set_percent(percent);
    read_completion(call.send().promise.await.unwrap().get().unwrap())
}

async fn scheduler(guest: &guest::Client) -> (u32, u32) {
    use cpu_controller::scheduler_result::Scheduler;
    let answer = controller(guest).scheduler_request().send().promise.await.unwrap();
    let Ok(Scheduler(scheduler)) = answer.get().unwrap().which() else {
        panic!("there is none");
    };
    let scheduler = scheduler.unwrap();
    (scheduler.get_weight(), scheduler.get_percent())
}

/// State, thread and processors of each vCPU.
async fn list(guest: &guest::Client) -> Vec<(VcpuState, u32, Vec<u16>)> {
    let answer = controller(guest).list_request().send().promise.await.unwrap();
    let Ok(cpu_controller::list_result::Vcpus(vcpus)) = answer.get().unwrap().which() else {
        panic!("there are none");
    };
    let vcpus = vcpus.unwrap().iter().enumerate();
    vcpus
        .map(|(i, vcpu)| {
            assert_eq!(usize::from(vcpu.get_index()), i);
            let cpus = vcpu.get_cpus().unwrap().iter().collect();
            (vcpu.get_state().unwrap(), vcpu.get_host_thread(), cpus)
        })
        .collect()
}

#[test]
fn a_vcpu_runs_where_the_configuration_says_from_its_first_instruction() {
    run(async |world| {
        in_the_test(&world);
        let thread = Thread::of_vcpu(31);
        let last = own().pop().unwrap();
        let config = GuestConfig {
            pins: vec![Pin {
                vcpu: 31,
                cpus: vec![last],
            }],
            ..with_cpus("web", 32)
        };
        let caller = world.caller();
        let web = caller.launch_config(config, false).await.unwrap();
        assert_eq!(thread.cpus(), [last]);
        let listed = list(&web.guest).await;
        assert_eq!(listed.len(), 32);
        // It waits, as a halted one does.
        let id = thread.id.as_raw_nonzero().get().unsigned_abs();
        assert_eq!(listed[31], (VcpuState::Halted, id, vec![last]));
    });
}

#[test]
fn a_pin_holds_until_it_is_lifted_also_when_the_guest_begins_again() {
    run(async |world| {
        in_the_test(&world);
        let thread = Thread::of_vcpu(32);
        let caller = world.caller();
        let web = caller.launch_config(with_cpus("web", 33), false).await.unwrap();
        let (all, last) = (own(), own().pop().unwrap());
        pin(&web.guest, 32, &[last, 1023, last]).await.unwrap();
        assert_eq!(thread.cpus(), [last]);
        thread.is_new();
        let answer = power(&web.guest).reset_request().send().promise.await.unwrap();
        read_completion(answer.get().unwrap()).unwrap();
        assert_eq!(info(&web.guest).await.generation, 2);
        assert_eq!(thread.cpus(), [last]);
        pin(&web.guest, 32, &[]).await.unwrap();
        assert_eq!(thread.cpus(), all);
    });
}

#[test]
fn a_pin_that_cannot_be_is_refused_and_changes_nothing() {
    run(async |world| {
        in_the_test(&world);
        let thread = Thread::of_vcpu(34);
        let caller = world.caller();
        let web = caller.launch_config(with_cpus("web", 35), false).await.unwrap();
        let all = own();
        let refused = async |vcpu, cpus: &[u16], about: &str, says: &str| {
            let error = pin(&web.guest, vcpu, cpus).await.unwrap_err();
            assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, about), "{error}");
            assert!(error.message.contains(says), "{error}");
        };
        refused(35, &all, "vcpu", "0 to 34").await;
        refused(34, &[1022, 1023, 65535], "cpus", "1022-1023,65535 none is there").await;
        refused(34, &[0; 1025], "cpus", "1024 are the most").await;
        assert_eq!(thread.cpus(), all);

        let nowhere = GuestConfig {
            pins: vec![Pin {
                vcpu: 0,
                cpus: vec![1023],
            }],
            ..named("db")
        };
        let error = caller.launch_config(nowhere, false).await.err().unwrap();
        assert_eq!(
            (error.kind, &error.about[..]),
            (Kind::BadConfig, "pins[0].cpus"),
            "{error}"
        );
        kill(&web.guest).await.unwrap();
        assert_eq!(pin(&web.guest, 0, &[]).await.unwrap_err().kind, Kind::NotRunning);
    });
}

#[test]
fn vcpus_tell_what_they_do() {
    run(async |world| {
        in_the_test(&world);
        let _thread = Thread::of_vcpu(36);
        let caller = world.caller();
        let lifecycle = caller.new_guest("web").await.unwrap();
        caller.create(&lifecycle, with_cpus("web", 38)).await.unwrap();
        let guest = caller.lookup("web").await.unwrap();
        assert_eq!(list(&guest).await[36].0, VcpuState::Stopped, "it was not started");
        let _run = lifecycle.run_request().send();
        let started = async {
            while list(&guest).await[36].0 != VcpuState::Halted {
                world.handle.sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        started.await;
        assert_eq!(
            list(&guest).await[37],
            (VcpuState::Stopped, 0, vec![]),
            "it has no thread"
        );
        let answer = power(&guest).pause_request().send().promise.await.unwrap();
        read_completion(answer.get().unwrap()).unwrap();
        assert_eq!(list(&guest).await[36].0, VcpuState::Paused);
    });
}

#[test]
fn the_share_of_a_guest_is_changed_and_kept() {
    run(async |world| {
        let limits = Limits {
            memory_mib: 512,
            cpu_weight: 50,
            ..Limits::default()
        };
        let config = GuestConfig { limits, ..named("web") };
        let caller = world.caller();
        let web = caller.launch_config(config, false).await.unwrap();
        assert_eq!(scheduler(&web.guest).await, (50, 0));
        set_scheduler(&web.guest, 700, 150).await.unwrap();
        let changed = Limits {
            cpu_weight: 700,
            cpu_percent: 150,
            ..limits
        };
        assert_eq!(world.fake.limited.take(), [(world.fake.last().pid, changed)]);
        assert_eq!(scheduler(&web.guest).await, (700, 150));
        let answer = power(&web.guest).reset_request().send().promise.await.unwrap();
        read_completion(answer.get().unwrap()).unwrap();
        assert_eq!(world.fake.requests.borrow()[1].limits, changed, "the next run's, too");

        world.fake.behaviour.set(Behaviour {
            limit: Does::Fails(Kind::NotSupported),
            ..Behaviour::default()
        });
        let error = set_scheduler(&web.guest, 1, 1).await.unwrap_err();
        assert_eq!(
            (error.kind, &error.message[..]),
            (Kind::NotSupported, "the fake has no limits")
        );
        assert_eq!(scheduler(&web.guest).await, (700, 150));
        for (weight, percent, about) in [(10_001, 0, "weight"), (0, 100_001, "percent")] {
            let error = set_scheduler(&web.guest, weight, percent).await.unwrap_err();
            assert_eq!((error.kind, &error.about[..]), (Kind::BadConfig, about), "{error}");
        }
    });
}

#[test]
fn what_a_component_says_of_a_stack_is_fit_to_be_shown() {
    run(async |world| {
        let caller = world.caller();
        let web = caller.launch("web").await.unwrap();
        let debug: debug::Client = web.guest.debug_request().send().pipeline.get_debug();
        let mut call = debug.stack_request();
        call.get().set_most(3);
        let answer = call.send().promise.await.unwrap();
        let stack = answer.get().unwrap();
        assert_eq!(stack.get_end().unwrap(), "ends [2J here");
        let Ok(debug::stack_result::Frames(frames)) = stack.which() else {
            panic!("there is none");
        };
        assert_eq!(frames.unwrap().len(), 3);
        let mut call = debug.read_virtual_request();
        call.get().set_vcpu(7);
        call.get().set_length(2);
        let answer = call.send().promise.await.unwrap();
        let Ok(debug::memory_result::Bytes(bytes)) = answer.get().unwrap().which() else {
            panic!("there is none");
        };
        assert_eq!(bytes.unwrap(), [7, 7]);
    });
}
