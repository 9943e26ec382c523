//! Calls: too many, never answered, never awaited.

use std::{path::Path, thread, time::Duration};

use sepal_schema::{
    config::GuestConfig,
    error::{Kind, Outcome},
};
use sepal_tests::{PATIENCE, Rpc, rpc::observer};

use crate::{
    raw::{Raw, bootstrap, call},
    scene::under,
};

/// `GuestManager.version` and `GuestManager.list`.
const VERSION: u16 = 0;
const LIST: u16 = 4;

#[test]
fn a_flood_of_calls_whose_answers_are_never_read() {
    under(|socket| {
        let mut raw = Raw::connect(socket);
        raw.send(&bootstrap());
        // As much as a real flood: the end comes long before.
        let flood: Vec<u8> = (1..=100_000).flat_map(|question| call(question, LIST)).collect();
        let mut rest = &flood[..];
        let deadline = std::time::Instant::now() + PATIENCE;
        while let Some(sent) = raw.send_some(rest) {
            rest = &rest[sent..];
            assert!(!rest.is_empty(), "100,000 calls were taken");
            assert!(std::time::Instant::now() < deadline, "the connection goes on for ever");
            if sent == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

#[test]
fn calls_to_what_is_not_there() {
    under(|socket| {
        let mut raw = Raw::connect(socket);
        raw.send(&bootstrap());
        // Methods that do not exist are answered; the connection goes on.
        for question in 1..=500 {
            assert!(raw.send(&call(question, 999)));
        }
        assert!(raw.send(&call(501, VERSION)));
        raw.read_byte();
        // A question under the number of one that is not finished is against the protocol.
        raw.send(&bootstrap());
        raw.closed();
    });
}

/// Takes all names that there are.
#[test]
fn a_client_that_takes_every_name() {
    under(|socket| {
        let mut greedy = Rpc::connect(socket);
        let mut held = Vec::new();
        let refusal = loop {
            match greedy.new_guest("") {
                Ok(lifecycle) => held.push(lifecycle),
                Err(error) => break error,
            }
            assert!(held.len() <= 1000);
        };
        assert!(refusal.kind == Kind::NoResources, "{refusal:?}");
        drop(held);
        end(greedy);
        free_again(socket);
    });
}

#[test]
fn clients_that_vanish_in_the_middle_of_a_call() {
    under(|socket| {
        for attempt in 0..8 {
            let mut client = Rpc::connect(socket);
            let lifecycle = client.new_guest("ghost").unwrap();
            let config = GuestConfig {
                memory_mib: 16,
                ..GuestConfig::default()
            };
            let create = client.send_create(&lifecycle, config).unwrap();
            let run = client.send_run(&lifecycle);
            let guest = client.bind(&lifecycle);
            let waiting = observer(&guest).wait_request().send().promise;
            // It has heard of all of it, and then of nothing more.
            client.list();
            if attempt % 2 == 1 {
                client.wait("create", create).unwrap();
            }
            drop((run, waiting));
            end(client);
            free_again(socket);
        }
    });
}

#[test]
fn uploads_without_end() {
    under(|socket| {
        let mut client = Rpc::connect(socket);
        let mut held = Vec::new();
        let refused = loop {
            let mut request = client.manager.upload_request();
            request.get().set_size(1 << 32);
            let response = client.wait("upload", request.send().promise).unwrap();
            match response.get().unwrap().outcome() {
                Ok(upload) => held.push(upload.get_upload().unwrap()),
                Err(error) => break error.kind,
            }
            assert!(held.len() <= 16);
        };
        assert!(
            refused == Kind::NoResources && held.len() == 16,
            "{refused:?} after {}",
            held.len()
        );
        drop(held);
        end(client);
    });
}

/// Breaks a connection off, and returns when that has happened.
fn end(mut client: Rpc) {
    client.connection.disconnect();
    let ended = client.connection.ended();
    client.wait("the end of the connection", ended);
}

/// Waits until the guest of the honest client is the only one.
fn free_again(socket: &Path) {
    let mut client = Rpc::connect(socket);
    sepal_tests::until("the names are free again", || (client.list().len() == 1).then_some(()));
    end(client);
}
