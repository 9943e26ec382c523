//! Calls that the peer gives up before they are answered.
//!
//! The RPC library drops such a call without a return, and then neither side ever frees the number of the question. So
//! the `Finish` that gives a call up is held back, the method is told to end, and the library sees the `Finish` only
//! after it has sent the return:
//!
//! ```text
//!   Finish of an unanswered call
//!     -> method runs under a guard:   token cancelled, Finish held -> method dropped -> Return -> Finish delivered
//!     -> method has not begun yet:    the same, as soon as a guard finds the token cancelled
//!     -> no guard looks after it:     Finish delivered at once; the call counts until the connection ends
//! ```
//!
//! A guard finds the token of its call by reading the parameters: that goes through `IncomingMessage::get_body`, which
//! leaves the token where the guard takes it (see `guard`).

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

thread_local! {
    /// Token of the message that was read last.
    static LAST_READ: RefCell<Option<Rc<Token>>> = const { RefCell::new(None) };
}

/// The library reads a call once to handle it; whoever reads it after that dispatches it.
const READ_BY_DISPATCH: u32 = 2;

/// Tells the connection that a call that was given up has been dispatched, perhaps without a guard.
#[derive(Default)]
struct Nudge {
    pending: Cell<bool>,
    connection: RefCell<Option<Waker>>,
}

/// Links the call of a peer with the guard of the method that serves it.
pub(in crate::transport) struct Token {
    reads: Cell<u32>,
    guarded: Cell<bool>,
    cancelled: Cell<bool>,
    waker: RefCell<Option<Waker>>,
    nudge: Rc<Nudge>,
}

impl Token {
    pub(super) fn touch(token: &Rc<Self>) {
        token.reads.set(token.reads.get().saturating_add(1));
        LAST_READ.set(Some(token.clone()));
        if token.cancelled.get() && !token.guarded.get() {
            token.nudge.pending.set(true);
            if let Some(waker) = token.nudge.connection.take() {
                waker.wake();
            }
        }
    }

    /// The token of the call whose parameters `read` reads, now guarded by the caller.
    pub(in crate::transport) fn adopt(read: impl FnOnce()) -> Option<Rc<Self>> {
        LAST_READ.set(None);
        read();
        let token = LAST_READ.take()?;
        token.guarded.set(true);
        Some(token)
    }

    /// Resolves when the peer gives the call up.
    pub(in crate::transport) fn cancelled(self: Rc<Self>) -> Cancelled {
        Cancelled(self)
    }

    pub(in crate::transport) fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    fn cancel(&self) {
        self.cancelled.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Whether it was dispatched to something that does not look for the token.
    fn is_unguarded(&self) -> bool {
        !self.guarded.get() && self.reads.get() >= READ_BY_DISPATCH
    }
}

/// See [`Token::cancelled`].
pub(in crate::transport) struct Cancelled(Rc<Token>);

impl Future for Cancelled {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0.cancelled.get() {
            return Poll::Ready(());
        }
        let mut waker = self.0.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// The unanswered calls of a connection, and the `Finish` messages (`M`) that are held back.
pub(super) struct Cancellations<M> {
    calls: HashMap<u32, Rc<Token>>,
    held: HashMap<u32, (Rc<Token>, M)>,
    due: VecDeque<M>,
    nudge: Rc<Nudge>,
}

impl<M> Default for Cancellations<M> {
    fn default() -> Self {
        Self {
            calls: HashMap::new(),
            held: HashMap::new(),
            due: VecDeque::new(),
            nudge: Rc::default(),
        }
    }
}

impl<M> Cancellations<M> {
    pub(super) fn call(&mut self, question: u32) -> Rc<Token> {
        let token = Rc::new(Token {
            reads: Cell::new(0),
            guarded: Cell::new(false),
            cancelled: Cell::new(false),
            waker: RefCell::default(),
            nudge: self.nudge.clone(),
        });
        self.calls.insert(question, token.clone());
        token
    }

    /// The peer gives `question` up with `finish`, which comes back if it is to be delivered at once.
    pub(super) fn give_up(&mut self, question: u32, finish: M) -> Option<M> {
        let Some(token) = self.calls.get(&question) else {
            return Some(finish);
        };
        if token.is_unguarded() {
            self.calls.remove(&question);
            return Some(finish);
        }
        let token = token.clone();
        self.held.insert(question, (token.clone(), finish));
        token.cancel();
        None
    }

    /// A `Finish` that the library shall see now. Wakes `cx` when there may be another.
    pub(super) fn next_due(&mut self, cx: &mut Context<'_>) -> Option<M> {
        if self.held.is_empty() {
            return self.due.pop_front();
        }
        *self.nudge.connection.borrow_mut() = Some(cx.waker().clone());
        if self.nudge.pending.take() {
            let unguarded = self.held.extract_if(|_, (token, _)| token.is_unguarded());
            for (question, (_, finish)) in unguarded {
                self.calls.remove(&question);
                self.due.push_back(finish);
            }
        }
        self.due.pop_front()
    }

    /// `question` was answered. Whether a `Finish` has become due by that.
    pub(super) fn returned(&mut self, question: u32) -> bool {
        self.calls.remove(&question);
        let held = self.held.remove(&question);
        let is_due = held.is_some();
        self.due.extend(held.map(|(_, finish)| finish));
        is_due
    }
}
