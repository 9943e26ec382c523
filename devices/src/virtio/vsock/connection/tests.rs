//! The states of a connection against a model: a guest that keeps the rules, on a wire that delays packets.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::packet::STREAM;
use super::*;

const WINDOW: u32 = 1000;

fn packet(op: Op) -> Header {
    Header {
        kind: STREAM,
        op: op as u16,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

fn connected() -> Connection {
    let mut connection = Connection::request(WINDOW);
    assert_eq!(connection.due(false), Some(Due::Control(Op::Request, 0)));
    connection.sent_control(Op::Request);
    assert_eq!(connection.receive(&packet(Op::Response)), Received::Established);
    connection
}

fn offered() -> Connection {
    Connection::offer(WINDOW, &packet(Op::Request))
}

fn is_broken(received: Received) -> bool {
    matches!(
        received,
        Received::Gone {
            answer: true,
            how: Gone::Broken(_)
        }
    )
}

#[test]
fn a_request_is_granted_by_its_response_only() {
    // Before the request is out, nothing can be an answer to it.
    assert!(is_broken(Connection::request(WINDOW).receive(&packet(Op::Response))));
    for op in [Op::Request, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        let mut connection = Connection::request(WINDOW);
        connection.sent_control(Op::Request);
        assert!(is_broken(connection.receive(&packet(op))), "{op:?}");
    }
    let mut refused = Connection::request(WINDOW);
    refused.sent_control(Op::Request);
    let gone = Received::Gone {
        answer: false,
        how: Gone::Reset,
    };
    assert_eq!(refused.receive(&packet(Op::Reset)), gone);
    assert_eq!(connected().state(), State::Connected);
}

#[test]
fn an_offer_waits_for_the_host_and_the_guest_must_wait_too() {
    let mut connection = offered();
    assert_eq!(connection.due(true), None);
    assert_eq!(connection.receive(&packet(Op::CreditUpdate)), Received::Nothing);
    assert!(connection.accept());
    assert!(!connection.accept());
    assert_eq!(connection.due(true), Some(Due::Control(Op::Response, 0)));
    connection.sent_control(Op::Response);
    assert_eq!(connection.due(true), Some(Due::Data(1 << 20)));
    for op in [Op::Request, Op::Response, Op::Data] {
        assert!(is_broken(offered().receive(&packet(op))), "{op:?}");
    }
}

#[test]
fn rules_of_a_connection_that_is_there() {
    for op in [Op::Request, Op::Response] {
        assert!(is_broken(connected().receive(&packet(op))), "{op:?}");
    }
    let unknown = Header {
        op: 8,
        ..packet(Op::Data)
    };
    assert!(is_broken(connected().receive(&unknown)));
    let mut ended = connected();
    let shutdown = Header {
        flags: NO_MORE_SENDING,
        ..packet(Op::Shutdown)
    };
    assert!(matches!(ended.receive(&shutdown), Received::Ended(_)));
    let data = Header {
        len: 1,
        ..packet(Op::Data)
    };
    assert!(is_broken(ended.receive(&data)));
    let too_much = Header {
        len: WINDOW + 1,
        ..packet(Op::Data)
    };
    assert!(is_broken(connected().receive(&too_much)));
}

#[test]
fn what_is_ended_stays_ended_and_both_make_an_end() {
    let mut connection = connected();
    let ends = |flags| Header {
        flags,
        ..packet(Op::Shutdown)
    };
    assert_eq!(connection.receive(&ends(0)), Received::Nothing);
    assert!(matches!(
        connection.receive(&ends(NO_MORE_RECEIVING)),
        Received::Ended(_)
    ));
    assert!(!connection.wants_host_data());
    // Flags that are clear take nothing back (virtio 5.10.6.5).
    assert_eq!(connection.receive(&ends(0)), Received::Nothing);
    let gone = Received::Gone {
        answer: true,
        how: Gone::Closed,
    };
    assert_eq!(connection.receive(&ends(NO_MORE_SENDING)), gone);
}

#[test]
fn a_host_that_closes_says_so_after_its_bytes_and_waits() {
    let mut connection = connected();
    assert_eq!(connection.due(true), Some(Due::Data(1 << 20)));
    connection.sent_data(5);
    connection.host_ends(Ended::BOTH);
    let flags = NO_MORE_RECEIVING | NO_MORE_SENDING;
    assert_eq!(connection.due(false), Some(Due::Control(Op::Shutdown, flags)));
    connection.sent_control(Op::Shutdown);
    assert_eq!((connection.state(), connection.due(true)), (State::Closing, None));
    // Sent before the guest knew: it keeps its credit.
    let data = Header {
        len: WINDOW,
        ..packet(Op::Data)
    };
    for _ in 0..3 {
        assert_eq!(connection.receive(&data), Received::Nothing);
    }
}

#[test]
fn without_credit_the_guest_is_asked_once() {
    let mut connection = connected();
    connection.sent_data(1 << 20);
    assert_eq!(connection.due(false), None);
    assert_eq!(connection.due(true), Some(Due::Control(Op::CreditRequest, 0)));
    connection.sent_control(Op::CreditRequest);
    assert_eq!(connection.due(true), None);
    let update = Header {
        fwd_cnt: 10,
        ..packet(Op::CreditUpdate)
    };
    connection.receive(&update);
    assert_eq!(connection.due(true), Some(Due::Data(10)));
    connection.sent_data(10);
    assert_eq!(connection.due(true), Some(Due::Control(Op::CreditRequest, 0)));
}

/// A guest that keeps the rules, and both wires.
struct Guest {
    to_host: VecDeque<Header>,
    to_guest: VecDeque<(Header, u32)>,
    window: u32,
    base: u32,
    sent: u64,
    received: u64,
    taken: u64,
    host_window: u32,
    host_forwarded: u32,
    host_ended: bool,
}

impl Guest {
    fn free(&self) -> u32 {
        let sent = self.base.wrapping_add(self.sent as u32);
        self.host_window - sent.wrapping_sub(self.host_forwarded)
    }

    fn send(&mut self, op: Op, len: u32, flags: u32) {
        let header = Header {
            op: op as u16,
            len,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.base.wrapping_add(self.taken as u32),
            ..Header::default()
        };
        self.to_host.push_back(header);
    }

    fn deliver(&mut self) -> Result<bool, TestCaseError> {
        let Some((header, len)) = self.to_guest.pop_front() else {
            return Ok(false);
        };
        (self.host_window, self.host_forwarded) = (header.buf_alloc, header.fwd_cnt);
        match Op::new(header.op) {
            Some(Op::Data) => {
                prop_assert!(!self.host_ended, "bytes after the end");
                self.received += u64::from(len);
                prop_assert!(self.received - self.taken <= self.window.into(), "the guest is overrun");
            }
            Some(Op::CreditRequest) => self.send(Op::CreditUpdate, 0, 0),
            Some(Op::Shutdown) => self.host_ended = true,
            _ => {}
        }
        Ok(true)
    }
}

#[derive(Clone, Debug)]
enum Step {
    HostWrites(u32),
    HostTakes(u32),
    GuestWrites(u32),
    GuestTakes(u32),
    DeviceTurn(u32),
    ToGuest,
    ToHost,
}

fn step() -> impl Strategy<Value = Step> {
    let some = || 1..3000u32;
    prop_oneof![
        some().prop_map(Step::HostWrites),
        some().prop_map(Step::HostTakes),
        some().prop_map(Step::GuestWrites),
        some().prop_map(Step::GuestTakes),
        some().prop_map(Step::DeviceTurn),
        Just(Step::ToGuest),
        Just(Step::ToHost),
    ]
}

/// The connection under test, its host, and the guest.
struct World {
    device: Connection,
    guest: Guest,
    host_wrote: u64,
    device_sent: u64,
    held: u64,
    host_took: u64,
    host_closes: bool,
}

impl World {
    fn host_has(&self) -> bool {
        self.host_wrote > self.device_sent || self.host_closes
    }

    fn turn(&mut self, most: u32) -> Result<bool, TestCaseError> {
        let Some(due) = self.device.due(self.host_has()) else {
            return Ok(false);
        };
        let (op, flags, len) = match due {
            Due::Control(op, flags) => {
                self.device.sent_control(op);
                (op, flags, 0)
            }
            Due::Data(free) => {
                let left = (self.host_wrote - self.device_sent).min(u64::from(u32::MAX)) as u32;
                let len = left.min(free).min(most);
                if len == 0 {
                    self.device.host_ends(Ended {
                        sending: true,
                        receiving: false,
                    });
                    return Ok(true);
                }
                self.device.sent_data(len);
                self.device_sent += u64::from(len);
                (Op::Data, 0, len)
            }
        };
        let (buf_alloc, fwd_cnt) = self.device.tell_credit();
        let header = Header {
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        };
        self.guest.to_guest.push_back((header, len));
        Ok(true)
    }

    fn deliver_to_host(&mut self) -> Result<bool, TestCaseError> {
        let Some(header) = self.guest.to_host.pop_front() else {
            return Ok(false);
        };
        match self.device.receive(&header) {
            Received::Data => self.held += u64::from(header.len),
            Received::Nothing => {}
            other => prop_assert!(false, "{other:?} of a guest that keeps the rules"),
        }
        prop_assert!(self.held <= WINDOW.into());
        Ok(true)
    }

    fn host_takes(&mut self, most: u32) -> bool {
        let count = self.held.min(most.into());
        self.held -= count;
        self.host_took += count;
        self.device.forwarded(count as u32);
        count > 0
    }

    fn guest_writes(&mut self, most: u32) -> bool {
        let count = self.guest.free().min(most);
        if count > 0 {
            self.guest.sent += u64::from(count);
            self.guest.send(Op::Data, count, 0);
        }
        count > 0
    }

    fn guest_takes(&mut self, most: u32) -> bool {
        let count = (self.guest.received - self.guest.taken).min(most.into());
        self.guest.taken += count;
        if count > 0 {
            self.guest.send(Op::CreditUpdate, 0, 0);
        }
        count > 0
    }
}

proptest! {
    #[test]
    fn all_bytes_arrive_nobody_is_overrun_and_nothing_gets_stuck(
        base in prop_oneof![Just(0), (u32::MAX - 5000)..=u32::MAX],
        window in 1..5000u32,
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut device = offered().after(base);
        let greeting = Header { buf_alloc: window, fwd_cnt: base, ..packet(Op::CreditUpdate) };
        device.receive(&greeting);
        device.accept();
        let mut world = World {
            device,
            guest: Guest {
                to_host: VecDeque::new(),
                to_guest: VecDeque::new(),
                window,
                base,
                sent: 0,
                received: 0,
                taken: 0,
                host_window: WINDOW,
                host_forwarded: base,
                host_ended: false,
            },
            host_wrote: 0,
            device_sent: 0,
            held: 0,
            host_took: 0,
            host_closes: false,
        };
        let mut guest_wants = 0;
        for step in steps {
            match step {
                Step::HostWrites(n) => world.host_wrote += u64::from(n),
                Step::HostTakes(n) => drop(world.host_takes(n)),
                Step::GuestWrites(n) => {
                    guest_wants += u64::from(n);
                    world.guest_writes(n);
                }
                Step::GuestTakes(n) => drop(world.guest_takes(n)),
                Step::DeviceTurn(n) => drop(world.turn(n)?),
                Step::ToGuest => drop(world.guest.deliver()?),
                Step::ToHost => drop(world.deliver_to_host()?),
            }
        }
        // Everybody goes on until nothing moves; then all has to be where it belongs.
        world.host_closes = true;
        let mut rounds = 0;
        loop {
            let rest = (guest_wants - world.guest.sent.min(guest_wants)) as u32;
            let moved = [
                world.turn(700)?,
                world.guest.deliver()?,
                world.deliver_to_host()?,
                world.host_takes(300),
                rest > 0 && world.guest_writes(rest),
                world.guest_takes(400),
            ];
            if moved == [false; 6] {
                break;
            }
            rounds += 1;
            prop_assert!(rounds < 100_000, "does not come to rest");
        }
        prop_assert_eq!(world.guest.taken, world.host_wrote);
        prop_assert_eq!(world.host_took, guest_wants.max(world.guest.sent));
        prop_assert!(world.guest.host_ended);
    }

    #[test]
    fn no_packet_makes_a_connection_panic_or_send_more_than_the_guest_allows(
        packets in proptest::collection::vec((0..9u16, any::<u32>(), 0..4u32, 0..3000u32, any::<u32>(), any::<u8>()), 1..50),
    ) {
        let mut connection = connected();
        for (op, buf_alloc, flags, len, fwd_cnt, host) in packets {
            let header = Header { op, len, flags, buf_alloc, fwd_cnt, kind: STREAM, ..Header::default() };
            match connection.receive(&header) {
                Received::Gone { .. } => break,
                Received::Data => connection.forwarded(u32::from(host)),
                _ => {}
            }
            match connection.due(host & 1 == 0) {
                Some(Due::Data(most)) => {
                    prop_assert!(most > 0 && most <= buf_alloc);
                    connection.sent_data(most.min(host.into()));
                }
                Some(Due::Control(op, _)) => connection.sent_control(op),
                None => {}
            }
        }
    }
}
