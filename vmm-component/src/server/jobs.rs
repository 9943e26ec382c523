//! What takes time: building a machine and tearing one down, each on a thread of its own.
//!
//! Both threads have the control loop's system-call filter. The build's looks at nothing but numbers that were checked: the kernel, which is hostile, is the
//! affair of another thread with a filter of its own (`ThreadRole::Loader`). The tear-down's looks at nothing of the guest's at all: it kicks, joins and unmaps.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::{Arc, atomic::AtomicBool},
    thread,
};

use futures::channel::mpsc;
use sepal_schema::error::{Error, Kind};

use super::{
    controller::News,
    vm::{Builder, LastRegisters, Vm, VmSpec},
};
use crate::lifecycle::Generation;

/// Exit status of a component whose machine had threads that would not end.
const STUCK: i32 = 3;

/// Destroys the machine that is replaced, then builds the new one.
pub(super) fn build(
    generation: Generation,
    spec: Result<VmSpec, Error>,
    replaced: Option<Box<dyn Vm>>,
    builder: Builder,
    cancel: Arc<AtomicBool>,
    news: mpsc::UnboundedSender<News>,
) {
    let failed = news.clone();
    let job = move || {
        if let Some(vm) = replaced {
            let _ = end(vm);
        }
        let events = {
            let news = news.clone();
            Arc::new(move |event| drop(news.unbounded_send(News::Machine(event))))
        };
        let built = catch_unwind(AssertUnwindSafe(|| {
            spec.and_then(|spec| builder(generation, spec, events, &cancel))
        }));
        let outcome = built.unwrap_or_else(|_| Err(Error::new(Kind::InternalError, "creating the guest panicked")));
        let _ = news.unbounded_send(News::Built(generation, outcome));
    };
    if let Err(error) = thread::Builder::new().name("build".into()).spawn(job) {
        let error = Error::new(Kind::InternalError, format!("no thread to create the guest: {error}"));
        let _ = failed.unbounded_send(News::Built(generation, Err(error)));
    }
}

/// Ends all threads of a machine and gives its memory back.
pub(super) fn tear_down(generation: Generation, vm: Box<dyn Vm>, news: mpsc::UnboundedSender<News>) {
    let slot = Arc::new(std::sync::Mutex::new(Some(vm)));
    let job = {
        let slot = slot.clone();
        move || {
            let vm = slot.lock().ok().and_then(|mut slot| slot.take());
            let registers = vm.map(end).unwrap_or_default();
            let _ = news.unbounded_send(News::TornDown(generation, registers));
        }
    };
    // Without a thread it is done here: the loop stands still meanwhile, but a stop completes.
    let inline = job.clone();
    if thread::Builder::new().name("tear-down".into()).spawn(job).is_err() {
        inline();
    }
}

/// A machine whose threads will not end cannot be trusted with anything: the process ends, and takes them with it.
fn end(vm: Box<dyn Vm>) -> LastRegisters {
    let stuck = match catch_unwind(AssertUnwindSafe(|| vm.tear_down())) {
        Ok(Ok(registers)) => return registers,
        Ok(Err(threads)) => threads,
        Err(_) => "a panic while tearing down".into(),
    };
    tracing::error!("the machine cannot be torn down ({stuck}); the component ends itself");
    process::exit(STUCK);
}
