//! The transport as its users see it: calls, capabilities, streams and descriptors between a client and a server in
//! another thread.

mod support;

use futures::{FutureExt, future::join_all};
use sepal_schema::transport::{EndReason, FdError, Limits};

use support::*;

#[test]
fn calls_are_answered_and_the_end_is_told() {
    let ((), reason) = with_server(Limits::default(), |_, probe, _connection| {
        async move {
            assert_eq!(ping(&probe, 1).await.unwrap(), 2);
            let answers = join_all((0..900).map(|n| ping(&probe, n))).await;
            for (n, answer) in answers.into_iter().enumerate() {
                assert_eq!(answer.unwrap(), n as u64 + 1);
            }
        }
        .boxed_local()
    });
    assert_eq!(reason, EndReason::ClosedByPeer);
}

#[test]
fn thousands_of_descriptors_arrive_each_with_its_message() {
    with_server(Limits::default(), |_, probe, connection| {
        async move {
            let table = connection.fds();
            for round in 0..100 {
                let calls = (0..40).map(|n| {
                    let (probe, table) = (&probe, &table);
                    async move {
                        let count = (round + n) % 4;
                        let mut request = probe.take_fds_request();
                        let mut numbers = request.get().init_numbers(count);
                        let mut expected = Vec::new();
                        for index in 0..count {
                            let fd = memfd();
                            expected.push(inode(&fd));
                            numbers.set(index, table.send(fd).unwrap());
                        }
                        let response = request.send().promise.await.unwrap();
                        let inodes: Vec<u64> = response.get().unwrap().get_inodes().unwrap().iter().collect();
                        assert_eq!(inodes, expected);
                    }
                });
                let replies = (0..20).map(|_| async {
                    let response = probe.give_fd_request().send().promise.await.unwrap();
                    let response = response.get().unwrap();
                    let fd = table.take(response.get_number()).unwrap();
                    assert_eq!(inode(&fd), response.get_inode());
                });
                futures::join!(join_all(calls), join_all(replies));
            }
            assert_eq!(table.unclaimed(), 0);
            assert_eq!(table.take(0).unwrap_err(), FdError::Missing(0));
        }
        .boxed_local()
    });
}
