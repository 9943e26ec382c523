//! Tells subscribers what happens, each at its own pace: one call in flight, and a cursor into the ring of events.

use std::{future::Future, pin::pin, rc::Rc};

use futures::future::select;
use sepal_schema::{
    guest_capnp::{event_sink, subscription},
    transport::{guard, reactor::Task},
};

use crate::{events::Cursor, manager::Manager};

/// Dropping it ends the events.
struct Subscription {
    _task: Task,
}

impl subscription::Server for Subscription {}

/// Tells `sink` everything from `cursor` on, until the returned capability is dropped or the sink fails.
pub(crate) fn new_client(manager: &Rc<Manager>, cursor: Cursor, sink: event_sink::Client) -> subscription::Client {
    new_client_until(manager, cursor, sink, futures::future::pending())
}

/// As [`new_client`], until `ended` resolves, too: then the sink is dropped.
pub(crate) fn new_client_until(
    manager: &Rc<Manager>,
    mut cursor: Cursor,
    sink: event_sink::Client,
    ended: impl Future<Output = ()> + 'static,
) -> subscription::Client {
    let teller = manager.clone();
    let tell = async move {
        loop {
            let (event, dropped) = teller.next_event(&mut cursor).await;
            let mut call = sink.event_request();
            event.write(call.get().init_event());
            call.get().set_dropped(dropped);
            // Not `send`, which returns as soon as there is room in a window: the answer says that the subscriber has kept up.
            if call.hook.send().promise.await.is_err() {
                return;
            }
        }
    };
    let task = manager.handle.spawn_owned(async move {
        select(pin!(ended), pin!(tell)).await;
    });
    guard::new_client(Subscription { _task: task })
}
