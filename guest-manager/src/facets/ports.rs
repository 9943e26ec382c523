//! The serial port, the ports of the console, and what they printed.

use std::{cell::Cell, future::Future, rc::Rc};

use sepal_schema::{
    config::Handles,
    error::{Error, Kind, Outcome, write_completion},
    facet::Right,
    guest_capnp::{console, guest, output, serial},
};

use super::{Reply, complete, facet, not_there};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
        thing::Thing,
    },
    guest::Guest,
    serial::{Port, Ways},
};

const READ: Deed = Deed::new("Output.read", &[Right::Output]);
const END: Deed = Deed::new("Output.end", &[Right::Output]);
const WRITE: Deed = Deed::new("Serial.write", &[Right::Input]);
const OPEN: Deed = Deed::new("Serial.open", &[Right::Input]);
const OPEN_OUTPUT: Deed = Deed::new("Serial.open", &[Right::Output]);
const RESIZE: Deed = Deed::new("Console.resize", &[Right::Input]);

/// Output alone.
pub(crate) struct OutputServer(pub(crate) Holder);

/// Output and input of the serial port, or of a port of the console.
pub(crate) struct PortServer {
    holder: Holder,
    /// The first time that something is typed is noted in the audit, not every key.
    typed: Cell<bool>,
}

facets!(OutputServer { 0 }, PortServer { holder });

impl PortServer {
    pub(crate) fn new(holder: Holder) -> Self {
        Self {
            holder,
            typed: Cell::new(false),
        }
    }
}

/// The port that a capability is for.
fn port(holder: &Holder) -> Result<Rc<Port>, Error> {
    match holder.thing {
        Thing::Console(number) => console_port(&holder.guest, number),
        _ => Ok(holder.guest.port.clone()),
    }
}

/// A port of a guest's console.
///
/// # Errors
/// `DEVICE_NOT_PRESENT`.
pub(crate) fn console_port(guest: &Guest, number: u32) -> Result<Rc<Port>, Error> {
    // A number that does not fit is of a port that is not there.
    let index = usize::try_from(number).unwrap_or(usize::MAX);
    guest.consoles.get(index).cloned().ok_or_else(|| {
        let ports = guest.consoles.len();
        if ports == 0 {
            return not_there("console");
        }
        let message = format!(
            "the guest's console has no port {number}: its ports are 0 to {}",
            ports - 1
        );
        Error::new(Kind::DeviceNotPresent, message).about("console")
    })
}

async fn read(holder: Holder, params: output::ReadParams, mut results: output::ReadResults) -> Reply {
    let (position, most, wait) = {
        let params = params.get()?;
        let most = usize::try_from(params.get_max_bytes()).unwrap_or(usize::MAX);
        (params.get_position(), most, params.get_wait())
    };
    let read = async { Ok(port(&holder)?.read(position, most, wait).await) };
    let mut to = results.get();
    match holder.perform(READ, "", read).await {
        Ok(piece) => {
            to.set_position(piece.position);
            to.set_bytes(&piece.bytes);
            to.set_dropped(piece.dropped);
            to.set_ended(piece.ended);
        }
        Err(error) => error.write(to.init_error()),
    }
    Ok(())
}

fn end(holder: &Holder, mut results: output::EndResults) -> impl Future<Output = Reply> + use<> {
    match holder.admit(END).and_then(|()| port(holder)) {
        Ok(port) => results.get().set_position(port.end()),
        Err(error) => error.write(results.get().init_error()),
    }
    futures::future::ready(Ok(()))
}

impl output::Server for OutputServer {
    fn read(
        self: Rc<Self>,
        params: output::ReadParams,
        results: output::ReadResults,
    ) -> impl Future<Output = Reply> + 'static {
        read(self.0.clone(), params, results)
    }

    fn end(self: Rc<Self>, _: output::EndParams, results: output::EndResults) -> impl Future<Output = Reply> + 'static {
        end(&self.0, results)
    }
}

impl output::Server for PortServer {
    fn read(
        self: Rc<Self>,
        params: output::ReadParams,
        results: output::ReadResults,
    ) -> impl Future<Output = Reply> + 'static {
        read(self.holder.clone(), params, results)
    }

    fn end(self: Rc<Self>, _: output::EndParams, results: output::EndResults) -> impl Future<Output = Reply> + 'static {
        end(&self.holder, results)
    }
}

impl serial::Server for PortServer {
    async fn write(self: Rc<Self>, params: serial::WriteParams) -> Reply {
        let holder = &self.holder;
        let admitted = holder.admit(WRITE);
        if admitted.is_err() || !self.typed.replace(true) {
            holder.note(WRITE, &holder.thing.to_string(), admitted.as_ref().copied());
        }
        admitted.map_err(|error| error.exception())?;
        let bytes = params.get()?.get_bytes()?;
        let write = async { port(holder)?.write(bytes).await };
        holder.while_live(write).await.map_err(|error| error.exception())
    }

    async fn open(self: Rc<Self>, params: serial::OpenParams, mut results: serial::OpenResults) -> Reply {
        let holder = &self.holder;
        let position = params.get()?.get_position();
        let ways = Ways {
            output: holder.may(Right::Output),
            input: holder.may(Right::Input),
        };
        let deed = if ways.input { OPEN } else { OPEN_OUTPUT };
        let open = async { port(holder)?.open(holder.handle(), position, ways, holder.until_ended()) };
        let stream = holder.perform(deed, holder.thing, open).await;
        // Nothing is awaited between here and the answer, which takes the descriptor along.
        let number = stream.and_then(|stream| Handles::send(&holder.client.fds, stream));
        match number {
            Ok(number) => results.get().init_fd().set_number(number),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}

impl console::Server for PortServer {
    async fn resize(self: Rc<Self>, params: console::ResizeParams, mut results: console::ResizeResults) -> Reply {
        let (columns, rows) = {
            let params = params.get()?;
            (params.get_columns(), params.get_rows())
        };
        let guest = &self.holder.guest;
        let resize = async {
            match self.holder.thing {
                Thing::Console(port) => resize(guest, port, columns, rows).await,
                _ => Err(not_there("console")),
            }
        };
        let detail = format!("{columns}x{rows}");
        let outcome = self.holder.perform(RESIZE, detail, resize).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// Tells the guest the size of the terminal at a port of its console.
async fn resize(guest: &Guest, port: u32, columns: u16, rows: u16) -> Result<(), Error> {
    let ask = |remote: &guest::Client| {
        let mut request = remote.console_request();
        request.get().set_port(port);
        request.send().promise
    };
    let console: console::Client = facet(guest, ask, |answer| Ok(answer.outcome()?.get_console()?)).await?;
    let mut call = console.resize_request();
    call.get().set_columns(columns);
    call.get().set_rows(rows);
    complete(guest, call.send().promise).await
}
