//! Server objects whose methods cannot take anything else down.
//!
//! A client made by [`new_client`] differs from one of `capnp_rpc::new_client` in two ways:
//!
//! - A panic in a method, in its beginning or at any point later, is caught. The caller gets the error "internal error
//!   in ...", the log gets the message of the panic, and the object goes on to serve other calls.
//! - When a caller at the other end of a connection gives a call up, the method is dropped where it stands, and the
//!   call is answered, so that both sides forget it (see `network::cancel` for why that is not so by itself).
//!
//! [`forward`] gives the second to capabilities that come from elsewhere and are handed on.

use std::{
    any::Any,
    future::Future,
    ops::Deref,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use capnp::{
    any_pointer,
    capability::{self, DispatchCallResult, FromClientHook, FromServer, Params, Promise, Results, Server},
    private::capability::{ClientHook, ParamsHook, ResultsHook},
};
use futures::{
    FutureExt,
    future::{Either, select},
};

use super::network::cancel::Token;

/// Makes a capability of a server object: `guard::new_client::<console::Client, _>(server)`.
pub fn new_client<C, S>(server: S) -> C
where
    C: FromServer<S>,
{
    new_client_from_rc(Rc::new(server))
}

/// As [`new_client`], for an object that is shared.
pub fn new_client_from_rc<C, S>(server: Rc<S>) -> C
where
    C: FromServer<S>,
{
    let dispatch = Rc::new(Named {
        dispatch: C::from_server(server),
        interface: interface_name::<C>(),
    });
    let guarded: Hook = capnp_rpc::new_client_from_rc(dispatch);
    C::new(guarded.0)
}

/// Makes a capability that came from elsewhere fit to be handed on to a peer that may give up its calls.
pub fn forward<C: FromClientHook>(client: C) -> C {
    C::new(Box::new(Forward(Rc::new(client.into_client_hook()))))
}

/// `serial` of `sepal_schema::generated::guest_capnp::serial::Client`.
fn interface_name<C>() -> &'static str {
    let name = std::any::type_name::<C>();
    let name = name.split_once('<').map_or(name, |(name, _)| name);
    name.trim_end_matches("::Client").rsplit("::").next().unwrap_or(name)
}

/// A client that is only its hook, to get at the dispatching client of the library, which takes its server from a
/// [`FromServer`].
struct Hook(Box<dyn ClientHook>);

impl FromClientHook for Hook {
    fn new(hook: Box<dyn ClientHook>) -> Self {
        Self(hook)
    }

    fn into_client_hook(self) -> Box<dyn ClientHook> {
        self.0
    }

    fn as_client_hook(&self) -> &dyn ClientHook {
        &*self.0
    }
}

/// The dispatch of a server object with the name of its interface.
struct Named<D> {
    dispatch: D,
    interface: &'static str,
}

struct Guarded<D>(Rc<Named<D>>);

impl<D> Clone for Guarded<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D> Deref for Guarded<D> {
    type Target = Named<D>;

    fn deref(&self) -> &Named<D> {
        &self.0
    }
}

impl<D: Server + Clone + 'static> FromServer<Named<D>> for Hook {
    type Dispatch = Guarded<D>;

    fn from_server(named: Rc<Named<D>>) -> Guarded<D> {
        Guarded(named)
    }
}

impl<D: Server + Clone> Server for Guarded<D> {
    fn dispatch_call(
        self,
        interface_id: u64,
        method_id: u16,
        params: Params<any_pointer::Owned>,
        results: Results<any_pointer::Owned>,
    ) -> DispatchCallResult {
        let interface = self.interface;
        let token = Token::adopt(|| drop(params.hook.get()));
        if token.as_ref().is_some_and(|token| token.is_cancelled()) {
            return DispatchCallResult::new(Promise::err(given_up()), false);
        }
        let dispatched = catch_unwind(AssertUnwindSafe(|| {
            self.0
                .dispatch
                .clone()
                .dispatch_call(interface_id, method_id, params, results)
        }));
        let DispatchCallResult { promise, is_streaming } = match dispatched {
            Ok(result) => result,
            Err(panic) => {
                return DispatchCallResult::new(Promise::err(failed(interface, method_id, &*panic)), false);
            }
        };
        let method = AssertUnwindSafe(promise)
            .catch_unwind()
            .map(move |result| result.unwrap_or_else(|panic| Err(failed(interface, method_id, &*panic))));
        // An error of a streaming call would fail all later calls; one that nobody waits for must not.
        let when_given_up = if is_streaming { Ok(()) } else { Err(given_up()) };
        DispatchCallResult::new(
            Promise::from_future(until_given_up(token, method, when_given_up)),
            is_streaming,
        )
    }

    fn as_ptr(&self) -> usize {
        self.0.dispatch.as_ptr()
    }
}

fn failed(interface: &str, method: u16, panic: &(dyn Any + Send)) -> capnp::Error {
    tracing::error!(
        interface,
        method,
        panic = super::panic_message(panic),
        "a method panicked"
    );
    capnp::Error::failed(format!("internal error in {interface}.@{method}"))
}

fn given_up() -> capnp::Error {
    capnp::Error::failed("the caller gave the call up".into())
}

/// Drives `method`, and drops it when the peer gives the call up.
async fn until_given_up(
    token: Option<Rc<Token>>,
    method: impl Future<Output = capnp::Result<()>>,
    when_given_up: capnp::Result<()>,
) -> capnp::Result<()> {
    let Some(token) = token else { return method.await };
    match select(std::pin::pin!(method), token.cancelled()).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => when_given_up,
    }
}

/// See [`forward`].
struct Forward(Rc<Box<dyn ClientHook>>);

impl ClientHook for Forward {
    fn add_ref(&self) -> Box<dyn ClientHook> {
        Box::new(Self(self.0.clone()))
    }

    fn new_call(
        &self,
        interface: u64,
        method: u16,
        size: Option<capnp::MessageSize>,
    ) -> capability::Request<any_pointer::Owned, any_pointer::Owned> {
        self.0.new_call(interface, method, size)
    }

    fn call(
        &self,
        interface: u64,
        method: u16,
        params: Box<dyn ParamsHook>,
        results: Box<dyn ResultsHook>,
    ) -> Promise<(), capnp::Error> {
        let token = Token::adopt(|| drop(params.get()));
        let call = self.0.call(interface, method, params, results);
        Promise::from_future(until_given_up(token, call, Err(given_up())))
    }

    fn get_brand(&self) -> usize {
        // That of no connection, so that a connection does not look through this.
        0
    }

    fn get_ptr(&self) -> usize {
        Rc::as_ptr(&self.0).addr()
    }

    fn get_resolved(&self) -> Option<Box<dyn ClientHook>> {
        None
    }

    fn when_more_resolved(&self) -> Option<Promise<Box<dyn ClientHook>, capnp::Error>> {
        None
    }

    fn when_resolved(&self) -> Promise<(), capnp::Error> {
        self.0.when_resolved()
    }
}
