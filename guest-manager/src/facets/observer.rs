//! The read-only facets: what is known of a guest, what happens to it, its figures.

use std::{future::Future, rc::Rc, time::Instant};

use sepal_schema::{
    crash::CrashReport,
    error::Error,
    facet::Right,
    guest_capnp::{observer, statistics},
};

use super::Reply;
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
        thing::{Thing, serve_as},
    },
    statistics as figures, subscription,
};

const INFO: Deed = Deed::new("Observer.info", &[Right::Observe]);
const WAIT: Deed = Deed::new("Observer.wait", &[Right::Observe]);
const OUTPUT: Deed = Deed::new("Observer.output", &[Right::Observe]);
const SUBSCRIBE: Deed = Deed::new("Observer.subscribe", &[Right::Observe]);
const STATS: Deed = Deed::new("Observer.stats", &[Right::Observe]);
const CRASHES: Deed = Deed::new("Observer.crashes", &[Right::Observe]);
const CONFIGURATION: Deed = Deed::new("Observer.configuration", &[Right::Observe]);
const GET: Deed = Deed::new("Statistics.get", &[Right::Observe]);

/// See `guest.capnp`.
pub(crate) struct ObserverServer(pub(crate) Holder);

/// See `guest.capnp`.
pub(crate) struct StatisticsServer(pub(crate) Holder);

facets!(ObserverServer { 0 }, StatisticsServer { 0 });

fn reply(result: Reply) -> impl Future<Output = Reply> + 'static {
    futures::future::ready(result)
}

impl Holder {
    /// As much of a crash as its rights permit to see.
    fn seen(&self, crash: &CrashReport) -> CrashReport {
        let permits = |right| self.grant.permits(right, Instant::now()).is_ok();
        let mut seen = crash.clone();
        if !permits(Right::Debug) {
            seen.last_lines.clear();
            seen.registers.clear();
        }
        if !permits(Right::Output) {
            seen.output.clear();
        }
        seen
    }
}

impl observer::Server for ObserverServer {
    fn info(
        self: Rc<Self>,
        _: observer::InfoParams,
        mut results: observer::InfoResults,
    ) -> impl Future<Output = Reply> + 'static {
        match self.0.admit(INFO) {
            Ok(()) => self.0.guest.info().write(results.get().init_info()),
            Err(error) => error.write(results.get().init_error()),
        }
        reply(Ok(()))
    }

    async fn wait(self: Rc<Self>, _: observer::WaitParams, mut results: observer::WaitResults) -> Reply {
        let ended = async { Ok(self.0.guest.ended().await) };
        match self.0.perform(WAIT, "", ended).await {
            Ok(report) => report.write(results.get().init_report()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    fn output(
        self: Rc<Self>,
        _: observer::OutputParams,
        mut results: observer::OutputResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(self.0.admit(OUTPUT).map_err(|error| error.exception()).map(|()| {
            results.get().set_output(serve_as(self.0.part(Thing::Output)));
        }))
    }

    fn subscribe(
        self: Rc<Self>,
        params: observer::SubscribeParams,
        mut results: observer::SubscribeResults,
    ) -> impl Future<Output = Reply> + 'static {
        let subscribe = || {
            self.0.admit(SUBSCRIBE)?;
            let guest = &self.0.guest;
            let params = params.get()?;
            let replay = usize::try_from(params.get_replay()).unwrap_or(usize::MAX);
            let cursor = guest
                .manager
                .registry(|registry, _| registry.log().cursor_of(guest.id, replay));
            let ended = self.0.until_ended();
            Ok::<_, Error>(subscription::new_client_until(
                &guest.manager,
                cursor,
                params.get_sink()?,
                ended,
            ))
        };
        match subscribe() {
            Ok(subscription) => results.get().set_subscription(subscription),
            Err(error) => error.write(results.get().init_error()),
        }
        reply(Ok(()))
    }

    fn stats(
        self: Rc<Self>,
        _: observer::StatsParams,
        results: observer::StatsResults,
    ) -> impl Future<Output = Reply> + 'static {
        stats(self.0.clone(), STATS, results)
    }

    fn crashes(
        self: Rc<Self>,
        _: observer::CrashesParams,
        mut results: observer::CrashesResults,
    ) -> impl Future<Output = Reply> + 'static {
        match self.0.admit(CRASHES) {
            Ok(()) => {
                let crashes = self.0.guest.crashes();
                // At most four.
                let mut list = results.get().init_crashes(u32::try_from(crashes.len()).unwrap_or(0));
                for (i, crash) in (0..).zip(&crashes) {
                    self.0.seen(crash).write(list.reborrow().get(i));
                }
            }
            Err(error) => error.write(results.get().init_error()),
        }
        reply(Ok(()))
    }

    fn configuration(
        self: Rc<Self>,
        _: observer::ConfigurationParams,
        mut results: observer::ConfigurationResults,
    ) -> impl Future<Output = Reply> + 'static {
        reply(match self.0.admit(CONFIGURATION) {
            Ok(()) => self.0.guest.write_configuration(results.get()),
            Err(error) => {
                error.write(results.get().init_error());
                Ok(())
            }
        })
    }
}

impl statistics::Server for StatisticsServer {
    fn get(
        self: Rc<Self>,
        _: statistics::GetParams,
        results: statistics::GetResults,
    ) -> impl Future<Output = Reply> + 'static {
        stats(self.0.clone(), GET, results)
    }
}

async fn stats(holder: Holder, deed: Deed, mut results: statistics::GetResults) -> Reply {
    match holder.perform(deed, "", figures::of(&holder.guest)).await {
        Ok(figures) => figures.write(results.get()),
        Err(error) => {
            error.write(results.get().init_error());
            Ok(())
        }
    }
}
