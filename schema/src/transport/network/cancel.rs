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
//!     -> later calls are made on the result that it will have: none of this before the last of them is answered or given up
//! ```
//!
//! The last line is how a client that pipelines works: it drops its hold on `a` as soon as it has sent `a.b()`, and still wants the answer.
//!
//! A guard finds the token of its call by reading the parameters: that goes through `IncomingMessage::get_body`, which
//! leaves the token where the guard takes it (see `guard`).

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
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

/// A call that has not been answered.
struct Unanswered {
    token: Rc<Token>,
    /// The unanswered call on whose result this one was made.
    target: Option<u32>,
    /// The unanswered calls that were made on its result, and not given up.
    dependents: HashSet<u32>,
}

/// The unanswered calls of a connection, and the `Finish` messages (`M`) that are held back.
pub(super) struct Cancellations<M> {
    calls: HashMap<u32, Unanswered>,
    /// Of calls whose methods have been told to end.
    held: HashMap<u32, (Rc<Token>, M)>,
    /// Of calls on whose results others wait.
    waiting: HashMap<u32, M>,
    due: VecDeque<M>,
    nudge: Rc<Nudge>,
}

impl<M> Default for Cancellations<M> {
    fn default() -> Self {
        Self {
            calls: HashMap::new(),
            held: HashMap::new(),
            waiting: HashMap::new(),
            due: VecDeque::new(),
            nudge: Rc::default(),
        }
    }
}

impl<M> Cancellations<M> {
    /// The peer calls; `on` is the question on whose result it does, if it does not have the result yet.
    pub(super) fn call(&mut self, question: u32, on: Option<u32>) -> Rc<Token> {
        let token = Rc::new(Token {
            reads: Cell::new(0),
            guarded: Cell::new(false),
            cancelled: Cell::new(false),
            waker: RefCell::default(),
            nudge: self.nudge.clone(),
        });
        let target = on.filter(|on| match self.calls.get_mut(on) {
            Some(call) => call.dependents.insert(question),
            None => false,
        });
        let call = Unanswered {
            token: token.clone(),
            target,
            dependents: HashSet::new(),
        };
        self.calls.insert(question, call);
        token
    }

    /// The peer gives `question` up with `finish`, which comes back if it is to be delivered at once.
    pub(super) fn give_up(&mut self, question: u32, finish: M) -> Option<M> {
        let Some(call) = self.calls.get(&question) else {
            return Some(finish);
        };
        if call.dependents.is_empty() {
            self.cancel(question, finish);
        } else {
            self.waiting.insert(question, finish);
        }
        self.due.pop_front()
    }

    /// Tells the method of a call to end, and those that only waited for this.
    fn cancel(&mut self, question: u32, finish: M) {
        let mut next = Some((question, finish));
        while let Some((question, finish)) = next.take() {
            let Some(call) = self.calls.get_mut(&question) else {
                self.due.push_back(finish);
                return;
            };
            let target = call.target.take();
            if call.token.is_unguarded() {
                self.calls.remove(&question);
                self.due.push_back(finish);
            } else {
                let token = call.token.clone();
                self.held.insert(question, (token.clone(), finish));
                token.cancel();
            }
            next = target.and_then(|target| self.let_go(target, question));
        }
    }

    /// `dependent` needs the result of `target` no more. Gives the target's `Finish` if that is what it waited for.
    fn let_go(&mut self, target: u32, dependent: u32) -> Option<(u32, M)> {
        let call = self.calls.get_mut(&target)?;
        call.dependents.remove(&dependent);
        if !call.dependents.is_empty() {
            return None;
        }
        self.waiting.remove(&target).map(|finish| (target, finish))
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
        let before = self.due.len();
        if let Some(call) = self.calls.remove(&question) {
            // Its number may be used again, which is none of theirs.
            for dependent in call.dependents {
                if let Some(dependent) = self.calls.get_mut(&dependent) {
                    dependent.target = None;
                }
            }
            if let Some((target, finish)) = call.target.and_then(|target| self.let_go(target, question)) {
                self.cancel(target, finish);
            }
        }
        let held = self.held.remove(&question).map(|(_, finish)| finish);
        self.due.extend(held.or_else(|| self.waiting.remove(&question)));
        self.due.len() > before
    }
}
