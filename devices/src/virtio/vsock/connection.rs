//! One connection as the device sees it: what each packet of the guest means for it, and which packet is due next. Pure: no socket, no ring,
//! no clock; bytes are only counted.
//!
//! ```text
//!   host connects                                            guest connects (REQUEST)
//!        |                                                        |
//!        v                                                        v
//!   [Requested] --RESPONSE--> [Connected] <-----accept------- [Offered]
//!        |                     |   |  |                           |
//!        | RST, anything else  |   |  '- host closed both ways:   | RST, SHUTDOWN, refused, deadline
//!        | but RESPONSE,       |   |     SHUTDOWN sent            |
//!        | deadline            |   |         |                    |
//!        |                     |   |         v                    |
//!        |                     |   |     [Closing]                |
//!        |                     |   |         | RST, SHUTDOWN of both, deadline
//!        |  RST, broken rule --'   '---------+------- SHUTDOWN of both directions by the guest, answered by RST
//!        v                                   v                    v
//!   ------------------------------ gone: the owner forgets it ------------------------------
//! ```
//!
//! In `Connected` each side may end its sending, its receiving or both; what is ended stays ended (virtio 5.10.6.5). A packet that breaks a
//! rule costs the guest this connection and nothing else.

use super::credit::Credit;
use super::packet::{Header, NO_MORE_RECEIVING, NO_MORE_SENDING, Op};

/// See the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host asked; the guest has not answered.
    Requested,
    /// The guest asked; the host has not answered.
    Offered,
    /// Bytes flow.
    Connected,
    /// The host has closed both directions and the guest knows; it is to answer by a reset.
    Closing,
}

/// Which directions a side has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// It will not receive any more.
    pub receiving: bool,
    /// It will not send any more.
    pub sending: bool,
}

impl Ended {
    /// Both directions.
    pub const BOTH: Self = Self {
        receiving: true,
        sending: true,
    };

    fn from_flags(flags: u32) -> Self {
        Self {
            receiving: flags & NO_MORE_RECEIVING != 0,
            sending: flags & NO_MORE_SENDING != 0,
        }
    }

    fn flags(self) -> u32 {
        (u32::from(self.receiving) * NO_MORE_RECEIVING) | (u32::from(self.sending) * NO_MORE_SENDING)
    }

    fn or(self, other: Self) -> Self {
        Self {
            receiving: self.receiving || other.receiving,
            sending: self.sending || other.sending,
        }
    }
}

/// What a packet of the guest means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing that anybody else has to act on; a packet may be due now.
    Nothing,
    /// The guest granted the connection.
    Established,
    /// The packet's bytes are for the host, and are held until [`Connection::forwarded`].
    Data,
    /// The guest has ended these directions, which the host has to learn after the bytes that came before.
    Ended(Ended),
    /// The connection is gone. The guest is to be sent a reset if `answer`.
    Gone {
        /// The guest waits for a reset, or is owed one.
        answer: bool,
        /// Why.
        how: Gone,
    },
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The guest closed it in order.
    Closed,
    /// The guest reset it, or refused.
    Reset,
    /// The guest broke a rule.
    Broken(&'static str),
}

/// A packet that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// One without bytes, with these flags.
    Control(Op, u32),
    /// Bytes of the host, at most so many; never 0.
    Data(u32),
}

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Connection {
    state: State,
    credit: Credit,
    /// REQUEST or RESPONSE has not been sent yet.
    greeting_due: bool,
    /// The guest asked for our credit.
    update_due: bool,
    /// The guest was asked for its credit, and has not given any since.
    asked: bool,
    guest_ended: Ended,
    host_ended: Ended,
    /// What the guest knows of `host_ended`.
    told: Ended,
}

impl Connection {
    fn new(state: State, window: u32) -> Self {
        Self {
            state,
            credit: Credit::new(window),
            greeting_due: false,
            update_due: false,
            asked: false,
            guest_ended: Ended::default(),
            host_ended: Ended::default(),
            told: Ended::default(),
        }
    }

    /// The host asks the guest for a connection.
    pub fn request(window: u32) -> Self {
        Self {
            greeting_due: true,
            ..Self::new(State::Requested, window)
        }
    }

    /// The guest asked the host for a connection by the packet `header`.
    pub fn offer(window: u32, header: &Header) -> Self {
        let mut offered = Self::new(State::Offered, window);
        offered.credit.peer_says(header.buf_alloc, header.fwd_cnt);
        offered
    }

    /// The same, as if `count` bytes had gone each way before.
    #[cfg(any(test, feature = "testing"))]
    pub fn after(mut self, count: u32) -> Self {
        self.credit = self.credit.after(count);
        self
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Directions that the guest has ended.
    pub fn guest_ended(&self) -> Ended {
        self.guest_ended
    }

    /// Whether the guest has heard of this connection, and so has to hear of its end.
    pub fn known_to_guest(&self) -> bool {
        self.state != State::Requested || !self.greeting_due
    }

    /// The host grants what the guest asked for. False if that is not what this connection waits for.
    pub fn accept(&mut self) -> bool {
        let offered = self.state == State::Offered;
        if offered {
            (self.state, self.greeting_due) = (State::Connected, true);
        }
        offered
    }

    /// A packet of the guest came.
    pub fn receive(&mut self, header: &Header) -> Received {
        let broken = |why| Received::Gone {
            answer: true,
            how: Gone::Broken(why),
        };
        let Some(op) = Op::new(header.op) else {
            return broken("an operation that there is not");
        };
        if op == Op::Reset {
            return Received::Gone {
                answer: false,
                how: Gone::Reset,
            };
        }
        let before = self.credit.free();
        self.credit.peer_says(header.buf_alloc, header.fwd_cnt);
        if self.credit.free() > before {
            self.asked = false;
        }
        match (self.state, op) {
            (State::Requested, Op::Response) if !self.greeting_due => {
                self.state = State::Connected;
                Received::Established
            }
            (State::Requested, _) => broken("something else than an answer to a request"),
            (State::Offered, Op::CreditUpdate | Op::CreditRequest) => Received::Nothing,
            // It has given up; Linux does so by a SHUTDOWN.
            (State::Offered, Op::Shutdown) => Received::Gone {
                answer: true,
                how: Gone::Closed,
            },
            (State::Offered, _) => broken("more before its request was answered"),
            (_, Op::Request) => broken("a request on a connection that is there"),
            (_, Op::Response) => broken("an answer to no request"),
            (_, Op::CreditUpdate) => Received::Nothing,
            (_, Op::CreditRequest) => {
                self.update_due = true;
                Received::Nothing
            }
            (_, Op::Shutdown) => self.shutdown(Ended::from_flags(header.flags)),
            (_, Op::Data) => self.data(header.len),
            (_, Op::Reset) => Received::Nothing,
        }
    }

    fn shutdown(&mut self, ended: Ended) -> Received {
        let before = self.guest_ended;
        self.guest_ended = before.or(ended);
        if self.guest_ended == Ended::BOTH {
            Received::Gone {
                answer: true,
                how: Gone::Closed,
            }
        } else if self.guest_ended != before {
            Received::Ended(self.guest_ended)
        } else {
            Received::Nothing
        }
    }

    fn data(&mut self, len: u32) -> Received {
        let broken = |why| Received::Gone {
            answer: true,
            how: Gone::Broken(why),
        };
        if self.guest_ended.sending {
            return broken("bytes after the end of its sending");
        }
        if self.credit.receive(len).is_err() {
            return broken("more bytes than there is credit for");
        }
        if self.host_ended.receiving {
            // Sent before the guest knew.
            self.credit.forward(len);
            return Received::Nothing;
        }
        if len == 0 { Received::Nothing } else { Received::Data }
    }

    /// The host took `count` of the bytes that were held.
    pub fn forwarded(&mut self, count: u32) {
        self.credit.forward(count);
    }

    /// The host ended these directions, too. What is held is lost if it does not receive any more.
    pub fn host_ends(&mut self, ended: Ended) {
        self.host_ended = self.host_ended.or(ended);
        if self.host_ended.receiving {
            self.credit.forward(self.credit.held());
        }
    }

    /// Whether bytes of the host are wanted, now or later.
    pub fn wants_host_data(&self) -> bool {
        self.state == State::Connected && !self.host_ended.sending && !self.guest_ended.receiving
    }

    /// The packet that is due; `host_has` says that the host may have bytes, or its end, to be read.
    pub fn due(&self, host_has: bool) -> Option<Due> {
        let control = |op| Some(Due::Control(op, 0));
        match self.state {
            State::Offered => return None,
            State::Requested => return self.greeting_due.then_some(Due::Control(Op::Request, 0)),
            State::Connected | State::Closing => {}
        }
        if self.greeting_due {
            return control(Op::Response);
        }
        if self.update_due {
            return control(Op::CreditUpdate);
        }
        if self.told != self.host_ended {
            return Some(Due::Control(Op::Shutdown, self.host_ended.flags()));
        }
        if host_has && self.wants_host_data() {
            match self.credit.free() {
                0 if !self.asked => return control(Op::CreditRequest),
                0 => {}
                free => return Some(Due::Data(free)),
            }
        }
        if self.credit.worth_telling() {
            return control(Op::CreditUpdate);
        }
        None
    }

    /// The control packet that was due went out.
    pub fn sent_control(&mut self, op: Op) {
        match op {
            Op::Request | Op::Response => self.greeting_due = false,
            Op::CreditUpdate => self.update_due = false,
            Op::CreditRequest => self.asked = true,
            Op::Shutdown => {
                self.told = self.host_ended;
                if self.told == Ended::BOTH {
                    self.state = State::Closing;
                }
            }
            Op::Reset | Op::Data => {}
        }
    }

    /// `count` bytes of the host went out.
    pub fn sent_data(&mut self, count: u32) {
        self.credit.sent(count);
    }

    /// What every packet of this connection says of its credit: `buf_alloc` and `fwd_cnt`.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.credit.tell()
    }
}

#[cfg(test)]
mod tests;
