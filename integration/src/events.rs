//! What the manager tells about the devices of its guests.

use std::{rc::Rc, time::Duration, time::Instant};

use futures::{
    StreamExt,
    channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded},
};
use sepal_schema::{
    guest_capnp::{event_sink, subscription},
    news::DeviceNews,
    transport::guard,
};

use crate::{Guest, HarnessError, Manager};

/// Events of the past that are asked for: all that a manager keeps.
const REPLAY: u32 = 1024;

/// A subscription to the events, from the manager's start on.
pub(crate) struct News {
    received: UnboundedReceiver<DeviceNews>,
    _subscription: subscription::Client,
}

struct Sink(UnboundedSender<DeviceNews>);

impl event_sink::Server for Sink {
    async fn event(self: Rc<Self>, params: event_sink::EventParams) -> Result<(), capnp::Error> {
        if let Some(news) = DeviceNews::read(params.get()?.get_event()?)? {
            // Nobody may be waiting any more.
            let _ = self.0.unbounded_send(news);
        }
        Ok(())
    }
}

impl News {
    fn subscribe(manager: &Manager) -> Self {
        let (sender, received) = unbounded();
        let mut request = manager.client().subscribe_request();
        request.get().set_sink(guard::new_client(Sink(sender)));
        request.get().set_replay(REPLAY);
        Self {
            received,
            _subscription: request.send().pipeline.get_subscription(),
        }
    }
}

impl Guest {
    /// Waits for news of a device that `is_it` recognizes, after those that earlier waits have found, and returns them.
    ///
    /// # Errors
    /// [`HarnessError::TimedOut`].
    pub fn wait_for_news(
        &mut self,
        what: &str,
        patience: Duration,
        is_it: impl Fn(&DeviceNews) -> bool,
    ) -> Result<DeviceNews, HarnessError> {
        let deadline = Instant::now() + patience;
        let mut news = match self.news.take() {
            Some(news) => news,
            None => News::subscribe(&self.manager),
        };
        let found = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.manager.within(left, news.received.next())? {
                Some(Some(found)) if is_it(&found) => break Ok(found),
                Some(Some(_)) => {}
                None | Some(None) => break Err(self.timed_out(&format!("the news of {what}"), patience)),
            }
        };
        self.news = Some(news);
        found
    }
}
