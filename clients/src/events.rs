//! `guest events`: what happens, as it happens, a line an event.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    rc::Rc,
};

use anyhow::{Result, bail};
use futures::{FutureExt, channel::oneshot, pin_mut, select};
use sepal_schema::{
    error::Error,
    guest_capnp::{
        event::{self, Which},
        event_sink,
        observer::{self, subscribe_result},
    },
    news::{DeviceNews, Panic},
    report::{StopReport, reason_name},
    transport::{Handle, guard},
};
use serde_json::{Map, Value, json};

use crate::{
    args::{EventOptions, Events},
    calls,
    manager::Manager,
    place::Place,
    show, status, table,
};

/// The most events that a guest manager keeps.
const ALL: u32 = 1024;
/// Bytes of a balloon's page.
const PAGE: u64 = 4096;
/// Calls in a row that come back with no event before them, after which everything that was kept has arrived: events come one at a time, each when the one
/// before it has been taken, and a call is answered while the next event is being sent.
const QUIET_CALLS: u32 = 8;

/// `guest events`.
pub(crate) async fn events(handle: &Handle, place: &Place, args: &Events) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    match &args.name {
        Some(name) => {
            let guest = calls::lookup(&manager.client, name).await?;
            of_guest(&manager, &calls::observer(&guest), &args.options).await
        }
        None => of_all(&manager, &args.options).await,
    }
}

/// Prints what happens to a guest, until it has ended if that is to be waited for.
pub(crate) async fn of_guest(manager: &Manager, observer: &observer::Client, options: &EventOptions) -> Result<u8> {
    let sink = Sink::new(options);
    let mut request = observer.subscribe_request();
    request.get().set_sink(sink.client());
    request.get().set_replay(replay(options));
    let response = request.send().promise.await?;
    let _subscription = match response.get()?.which()? {
        subscribe_result::Subscription(subscription) => subscription?,
        subscribe_result::Error(error) => return Err(Error::read(error?)?.into()),
    };
    let printer = sink.printer.clone();
    let over = async {
        if !options.no_follow {
            calls::wait(observer).await?;
        }
        printer.quiet(|| calls::info(observer)).await
    };
    sink.until(manager, over).await
}

async fn of_all(manager: &Manager, options: &EventOptions) -> Result<u8> {
    let sink = Sink::new(options);
    let mut request = manager.client.subscribe_request();
    request.get().set_sink(sink.client());
    request.get().set_replay(replay(options));
    let response = request.send().promise.await?;
    let _subscription = response.get()?.get_subscription()?;
    let printer = sink.printer.clone();
    let over = async {
        if !options.no_follow {
            futures::future::pending::<()>().await;
        }
        let ask = || async { Ok(manager.client.version_request().send().promise.await?) };
        printer.quiet(ask).await
    };
    sink.until(manager, over).await
}

fn replay(options: &EventOptions) -> u32 {
    options.replay.unwrap_or(if options.no_follow { ALL } else { 0 })
}

/// Where the events arrive.
struct Sink {
    printer: Rc<Printer>,
    /// Why nothing more can be printed.
    over: oneshot::Receiver<Result<()>>,
}

/// Prints the events.
struct Printer {
    json: bool,
    /// How many there were.
    count: Cell<u64>,
    over: RefCell<Option<oneshot::Sender<Result<()>>>>,
}

impl Sink {
    fn new(options: &EventOptions) -> Self {
        let (sender, over) = oneshot::channel();
        let printer = Rc::new(Printer {
            json: options.json,
            count: Cell::new(0),
            over: RefCell::new(Some(sender)),
        });
        Self { printer, over }
    }

    fn client(&self) -> event_sink::Client {
        guard::new_client_from_rc(self.printer.clone())
    }

    /// Goes on until `over`, or nobody reads any more what is printed.
    async fn until(self, manager: &Manager, over: impl Future<Output = Result<()>>) -> Result<u8> {
        let over = over.fuse();
        pin_mut!(over);
        select! {
            over = over => over?,
            printed = self.over.fuse() => printed.unwrap_or(Ok(()))?,
            reason = manager.connection.ended().fuse() => bail!("the connection to the guest manager ended: {reason}"),
        }
        Ok(status::SUCCESS)
    }
}

impl Printer {
    /// Asks until no event comes any more between the answers.
    async fn quiet<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn() -> F) -> Result<()> {
        let mut calls = 0;
        while calls < QUIET_CALLS {
            let before = self.count.get();
            ask().await?;
            calls = if self.count.get() == before { calls + 1 } else { 0 };
        }
        Ok(())
    }

    fn print(&self, event: event::Reader<'_>, dropped: u64) -> Result<bool> {
        if dropped > 0 && !self.json {
            say!("[{dropped} events were lost: this program did not keep up]");
        }
        let line = match self.json {
            true => json(event, dropped)?.to_string(),
            false => table::cut(&line(event)?),
        };
        show::print(format!("{line}\n").as_bytes())
    }
}

impl event_sink::Server for Printer {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        let params = params.get()?;
        let outcome = match self.print(params.get_event()?, params.get_dropped()) {
            Ok(true) => None,
            Ok(false) => Some(Ok(())),
            Err(error) => Some(Err(error)),
        };
        self.count.set(self.count.get() + 1);
        if let Some(outcome) = outcome
            && let Some(over) = self.over.borrow_mut().take()
        {
            // Nobody waits any more if the command is ending.
            let _ = over.send(outcome);
        }
        Ok(())
    }
}

/// What happened, in words: its name, and what there is to say about it.
fn words(event: event::Reader<'_>) -> Result<(&'static str, String)> {
    let nothing = String::new();
    if let Some(news) = DeviceNews::read(event)? {
        return Ok(device_words(news));
    }
    let Ok(which) = event.which() else {
        return Ok(("unknown", "this version does not know what".into()));
    };
    let report = |report: StopReport| format!("{}: {}", reason_name(report.reason), report.detail);
    Ok(match which {
        Which::Defined(()) => ("defined", nothing),
        Which::Starting(()) => ("starting", nothing),
        Which::Started(()) => ("started", nothing),
        Which::Paused(()) => ("paused", nothing),
        Which::Resumed(()) => ("resumed", nothing),
        Which::ShuttingDown(()) => ("shutting-down", nothing),
        Which::Removed(()) => ("removed", nothing),
        Which::Stopped(of) => ("stopped", report(StopReport::read(of?)?)),
        Which::Restarting(of) => ("restarting", report(StopReport::read(of?)?)),
        Which::Crashed(of) => ("crashed", report(StopReport::read(of?)?)),
        // Read above.
        _ => ("unknown", nothing),
    })
}

fn device_words(news: DeviceNews) -> (&'static str, String) {
    match news {
        DeviceNews::Failed { device, reason } => ("device-failed", format!("{device}: {reason}")),
        DeviceNews::NeedsReset { device, reason } => ("device-needs-reset", format!("{device}: {reason}")),
        DeviceNews::Recovered { device } => ("device-recovered", device),
        DeviceNews::IoError {
            device,
            operation,
            message,
            count,
            no_space,
        } => {
            let times = if count > 1 {
                format!(" ({count} times)")
            } else {
                String::new()
            };
            let full = if no_space { ", the host's disk is full" } else { "" };
            ("io-error", format!("{device}: {operation}: {message}{full}{times}"))
        }
        DeviceNews::Balloon {
            current_pages,
            requested_pages,
        } => {
            let of = |pages| table::size(u64::from(pages) * PAGE);
            let text = format!("{} of {} requested", of(current_pages), of(requested_pages));
            ("balloon-changed", text)
        }
        DeviceNews::Memory { plugged, requested } => {
            let text = format!("{} of {} requested", table::size(plugged), table::size(requested));
            ("memory-changed", text)
        }
        DeviceNews::BackendLost { device, reason } => ("backend-lost", format!("{device}: {reason}")),
        DeviceNews::BackendRestored { device } => ("backend-restored", device),
        DeviceNews::GuestPanicked(how) => ("guest-panicked", panic_name(how).into()),
        DeviceNews::WatchdogExpired { action } => ("watchdog-expired", format!("what is done: {action}")),
        DeviceNews::GuestReady => ("guest-ready", String::new()),
    }
}

fn panic_name(how: Panic) -> &'static str {
    match how {
        Panic::Panicked => "panicked",
        Panic::CrashLoaded => "crash-loaded",
        Panic::ShutDown => "shut-down",
    }
}

/// An event as a line for people.
fn line(event: event::Reader<'_>) -> Result<String> {
    let (name, detail) = words(event)?;
    let guest = event.get_guest()?.to_str()?;
    let line = format!("{}  {guest:10}  {name:13}  {detail}", table::clock(event.get_time_ns()));
    // What comes from a guest does not move the cursor.
    let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    Ok(line.trim_end().to_owned())
}

/// An event with all its fields, whose names are the protocol's.
fn json(event: event::Reader<'_>, dropped: u64) -> Result<Value> {
    let mut all = Map::new();
    let mut put = |key: &str, value: Value| all.insert(key.into(), value);
    put("sequence", event.get_sequence().into());
    put("timeNs", event.get_time_ns().into());
    put("guest", event.get_guest()?.to_str()?.into());
    put("generation", event.get_generation().into());
    put("dropped", dropped.into());
    put("event", words(event)?.0.into());
    if let Some(news) = DeviceNews::read(event)? {
        let fields = match news {
            DeviceNews::Failed { device, reason }
            | DeviceNews::NeedsReset { device, reason }
            | DeviceNews::BackendLost { device, reason } => json!({"device": device, "reason": reason}),
            DeviceNews::Recovered { device } | DeviceNews::BackendRestored { device } => json!({"device": device}),
            DeviceNews::IoError {
                device,
                operation,
                message,
                count,
                no_space,
            } => json!({
                "device": device, "operation": operation, "message": message, "count": count, "noSpace": no_space,
            }),
            DeviceNews::Balloon {
                current_pages,
                requested_pages,
            } => json!({"currentPages": current_pages, "requestedPages": requested_pages}),
            DeviceNews::Memory { plugged, requested } => {
                json!({"pluggedBytes": plugged, "requestedBytes": requested})
            }
            DeviceNews::GuestPanicked(how) => json!({"panic": panic_name(how)}),
            DeviceNews::WatchdogExpired { action } => json!({"action": action}),
            DeviceNews::GuestReady => json!({}),
        };
        all.extend(fields.as_object().cloned().unwrap_or_default());
    } else if let Ok(Which::Stopped(report) | Which::Restarting(report) | Which::Crashed(report)) = event.which() {
        let report = StopReport::read(report?)?;
        all.insert("stop".into(), serde_json::to_value(show::Ending::from(&report))?);
    }
    Ok(all.into())
}

#[cfg(test)]
mod tests {
    use sepal_schema::{guest_capnp::event::Builder, news::examples};

    use super::*;

    fn told(write: impl FnOnce(Builder<'_>)) -> (String, Value) {
        let mut message = capnp::message::Builder::new_default();
        let mut event: Builder<'_> = message.init_root();
        event.set_sequence(7);
        event.set_guest("bee");
        event.set_generation(2);
        write(event.reborrow());
        let event = event.into_reader();
        (line(event).unwrap(), json(event, 3).unwrap())
    }

    #[test]
    fn every_event_has_a_name_and_its_fields() {
        for news in examples() {
            let (line, json) = told(|event| news.write(event));
            assert!(!line.contains("unknown") && line.contains("bee"), "{line}");
            assert_eq!(
                (&json["sequence"], &json["guest"], &json["generation"], &json["dropped"]),
                (&7.into(), &"bee".into(), &2.into(), &3.into())
            );
            let plain = matches!(news, DeviceNews::GuestReady);
            assert_eq!(json.as_object().unwrap().len() > 6, !plain, "{json}");
        }
        let (line, json) = told(|mut event| event.set_shutting_down(()));
        assert!(line.ends_with("bee         shutting-down"), "{line}");
        assert_eq!(json["event"], "shutting-down");
        let (line, json) = told(|event| event.init_stopped().set_detail("it was\x1b[2J stopped"));
        assert!(
            line.contains("unknown: it was [2J stopped") && json["stop"]["detail"].is_string(),
            "{line} {json}"
        );
    }
}
