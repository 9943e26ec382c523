//! Tests of the event loop.

use std::{
    cell::{Cell, RefCell},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use futures::{AsyncReadExt, AsyncWriteExt, channel::oneshot, future::join_all};

use super::*;

fn on_loop<F: Future>(test: impl FnOnce(Handle) -> F) -> F::Output {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    reactor.run_until(test(handle)).unwrap()
}

#[test]
fn tasks_run_and_a_panic_in_one_ends_only_that() {
    std::panic::set_hook(Box::new(|_| ()));
    let done = on_loop(|handle| async move {
        let done = Rc::new(Cell::new(0));
        handle.spawn(async { panic!("a task") });
        let (sender, receiver) = oneshot::channel();
        let inner = handle.clone();
        let counted = done.clone();
        handle.spawn(async move {
            counted.set(counted.get() + 1);
            inner.sleep(Duration::from_millis(1)).await;
            counted.set(counted.get() + 1);
            let _ = sender.send(());
        });
        receiver.await.unwrap();
        done.get()
    });
    let _ = std::panic::take_hook();
    assert_eq!(done, 2);
}

#[test]
fn an_owned_task_ends_when_it_is_dropped() {
    struct Flag(Rc<Cell<bool>>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    on_loop(|handle| async move {
        let dropped = Rc::new(Cell::new(false));
        let (sender, started) = oneshot::channel();
        let flag = Flag(dropped.clone());
        let task = handle.spawn_owned(async move {
            let _flag = flag;
            let _ = sender.send(());
            std::future::pending::<()>().await;
        });
        started.await.unwrap();
        assert!(!dropped.get());
        drop(task);
        handle.sleep(Duration::ZERO).await;
        while !dropped.get() {
            handle.sleep(Duration::from_micros(1)).await;
        }
    });
}

#[test]
fn dropping_the_loop_drops_its_tasks_and_what_they_spawn_then() {
    struct Respawn(Handle, Arc<AtomicUsize>);
    impl Drop for Respawn {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
            let more = self.1.clone();
            self.0.spawn(async move {
                more.fetch_add(100, Ordering::SeqCst);
            });
        }
    }
    let drops = Arc::new(AtomicUsize::new(0));
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    for _ in 0..3 {
        let respawn = Respawn(handle.clone(), drops.clone());
        handle.spawn(async move {
            let _respawn = respawn;
            std::future::pending::<()>().await;
        });
    }
    reactor.run_until(async {}).unwrap();
    let remote = handle.remote();
    drop(reactor);
    assert_eq!(drops.load(Ordering::SeqCst), 3);
    assert_eq!(remote.run(|_| ()), Err(ReactorGone));
}

#[test]
fn other_threads_wake_the_loop_every_time() {
    // Each completion comes while the loop sleeps, is about to, or has just woken up.
    on_loop(|_| async {
        let (requests, work) = mpsc::channel::<oneshot::Sender<u32>>();
        let worker = thread::spawn(move || {
            for (n, sender) in work.into_iter().enumerate() {
                if n % 3 == 0 {
                    thread::yield_now();
                }
                sender.send(n as u32).unwrap();
            }
        });
        for n in 0..5000 {
            let (sender, receiver) = oneshot::channel();
            requests.send(sender).unwrap();
            assert_eq!(receiver.await.unwrap(), n);
        }
        drop(requests);
        worker.join().unwrap();
    });
}

#[test]
fn jobs_of_other_threads_run_in_order() {
    on_loop(|handle| async move {
        thread_local! {
            static SEEN: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
        }
        let (sender, receiver) = oneshot::channel();
        let remote = handle.remote();
        let other = thread::spawn(move || {
            for n in 0..1000 {
                remote.run(move |_| SEEN.with_borrow_mut(|seen| seen.push(n))).unwrap();
            }
            remote
                .run(move |handle| handle.spawn(async { sender.send(()).unwrap() }))
                .unwrap();
        });
        receiver.await.unwrap();
        other.join().unwrap();
        assert_eq!(SEEN.take(), (0..1000).collect::<Vec<_>>());
    });
}

#[test]
fn timers_fire_and_not_before_their_time() {
    on_loop(|handle| async move {
        let start = Instant::now();
        let fired = RefCell::new(Vec::new());
        let waits = [8u64, 2, 0, 5, 2].map(|millis| {
            let (handle, fired) = (handle.clone(), &fired);
            async move {
                handle.sleep(Duration::from_millis(millis)).await;
                assert!(start.elapsed() >= Duration::from_millis(millis));
                fired.borrow_mut().push(millis);
            }
        });
        join_all(waits).await;
        // Their order is tested with the queue: here any number may come due at once.
        let mut fired = fired.into_inner();
        fired.sort_unstable();
        assert_eq!(fired, [0, 2, 2, 5, 8]);
        let never = handle.sleep(Duration::MAX);
        assert_eq!(handle.timeout(Duration::from_millis(1), never).await, Err(TimedOut));
        assert_eq!(handle.timeout(Duration::from_secs(3600), async { 5 }).await, Ok(5));
    });
}

#[test]
fn timers_fire_while_tasks_keep_the_loop_busy() {
    on_loop(|handle| async move {
        handle.spawn(std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        handle.sleep(Duration::from_millis(2)).await;
    });
}

#[test]
fn a_loop_without_timers_is_not_woken() {
    let mut reactor = Reactor::new().unwrap();
    let handle = reactor.handle();
    let timerfd = handle.0.timers.fd().try_clone_to_owned().unwrap();
    reactor
        .run_until(async {
            // A timer that was armed once and then dropped.
            assert_eq!(
                handle
                    .timeout(Duration::from_millis(1), handle.sleep(Duration::from_secs(9)))
                    .await,
                Err(TimedOut)
            );
            let (sender, receiver) = oneshot::channel();
            let remote = handle.remote();
            // Completed from another thread, so that the loop goes to sleep in between.
            thread::spawn(move || remote.run(move |_| sender.send(()).unwrap()).unwrap());
            receiver.await.unwrap();
        })
        .unwrap();
    let armed = rustix::time::timerfd_gettime(&timerfd).unwrap();
    assert_eq!((armed.it_value.tv_sec, armed.it_value.tv_nsec), (0, 0));
}

#[test]
fn a_loop_that_lingers_sees_what_one_that_sleeps_does() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let echo = thread::spawn(move || {
        let mut byte = [0];
        while theirs.read(&mut byte).unwrap() > 0 {
            theirs.write_all(&byte).unwrap();
        }
    });
    // Far longer than an answer takes, and far shorter than the timer.
    let mut reactor = Reactor::new().unwrap().lingering(Duration::from_millis(20));
    let handle = reactor.handle();
    let rounds = async {
        let mut stream = handle.register(ours).unwrap();
        let mut byte = [0];
        for number in 0..200_u8 {
            stream.write_all(&[number]).await.unwrap();
            stream.read_exact(&mut byte).await.unwrap();
            assert_eq!(byte, [number]);
        }
        handle.sleep(Duration::from_millis(60)).await;
        let (sender, receiver) = oneshot::channel();
        let other = thread::spawn(move || sender.send(7));
        assert_eq!(receiver.await, Ok(7));
        other.join().unwrap().unwrap();
    };
    reactor.run_until(rounds).unwrap();
    drop(reactor);
    echo.join().unwrap();
}

#[test]
fn bytes_go_through_and_the_end_is_seen() {
    on_loop(|handle| async move {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, theirs) = (handle.register(ours).unwrap(), handle.register(theirs).unwrap());
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        let sending = async {
            (&ours).write_all(&sent).await.unwrap();
            (&ours).close().await.unwrap();
        };
        let mut received = Vec::new();
        let receiving = async { (&theirs).read_to_end(&mut received).await.unwrap() };
        futures::join!(sending, receiving);
        assert!(received == sent);
        // The other direction is open still.
        (&theirs).write_all(b"yes").await.unwrap();
        let mut buffer = [0; 3];
        (&ours).read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"yes");
    });
}

#[test]
fn a_pipe_whose_reader_is_gone_is_an_error() {
    on_loop(|handle| async move {
        let (reader, writer) = std::io::pipe().unwrap();
        let writer = handle.register(writer).unwrap();
        drop(reader);
        let error = (&writer).write_all(&[0; 1_000_000]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    });
}

#[test]
fn room_to_write_is_asked_for_only_where_there_was_none() {
    on_loop(|handle| async move {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let ours = handle.register(ours).unwrap();
        let asks = || ours.asks_for_room();
        (&ours).write_all(&[1]).await.unwrap();
        theirs.read_exact(&mut [0]).unwrap();
        assert!(!asks());

        let write = || ours.try_io(Direction::Write, |mut socket| socket.write(&[7; 4096]));
        let mut sent = 0;
        while let Ok(count) = write() {
            sent += count;
        }
        assert!(asks());
        theirs.read_exact(&mut vec![0; sent]).unwrap();
        ours.writable().await;
        assert!(asks(), "whoever wrote so much may soon be without room again");

        // There was room, so that there is more is no news.
        assert_eq!(write().unwrap(), 4096);
        theirs.read_exact(&mut [0; 4096]).unwrap();
        theirs.write_all(&[1]).unwrap();
        ours.exhausted(Direction::Read);
        ours.readable().await;
        assert!(!asks());
    });
}

#[test]
fn connections_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let clients = thread::spawn(move || {
        for n in 0..20u8 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(&[n]).unwrap();
            let mut answer = [0];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer[0], n + 1);
        }
    });
    on_loop(|handle| async move {
        let listener = handle.register(listener).unwrap();
        for _ in 0..20 {
            let stream = handle.register(listener.accept().await.unwrap()).unwrap();
            let mut byte = [0];
            (&stream).read_exact(&mut byte).await.unwrap();
            byte[0] += 1;
            (&stream).write_all(&byte).await.unwrap();
        }
    });
    clients.join().unwrap();
}

#[test]
fn descriptors_come_and_go_under_the_same_numbers() {
    on_loop(|handle| async move {
        for n in 0..300u32 {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let ours = Rc::new(handle.register(ours).unwrap());
            // Readable, with an event on its way, when it is dropped in this or a later round.
            theirs.write_all(&[1]).unwrap();
            let waiting = ours.clone();
            handle.spawn(async move { waiting.readable().await });
            if n % 2 == 0 {
                handle.sleep(Duration::ZERO).await;
                handle.spawn(async move { drop(ours) });
            }
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = handle.register(ours).unwrap();
        let again = handle.register(ours.get_ref().try_clone().unwrap()).unwrap();
        drop(again);
        let plain = ours.into_inner();
        let ours = handle.register(plain).unwrap();
        drop(theirs);
        assert_eq!((&ours).read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn what_cannot_be_waited_for_is_refused() {
    on_loop(|handle| async move {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(
            handle.register(file).unwrap_err().kind(),
            io::ErrorKind::PermissionDenied
        );
    });
}

#[test]
fn blocking_work_runs_elsewhere_and_its_panics_are_errors() {
    std::panic::set_hook(Box::new(|_| ()));
    on_loop(|handle| async move {
        let here = thread::current().id();
        let there = handle.spawn_blocking(move || thread::current().id()).await.unwrap();
        assert_ne!(here, there);
        let error = handle.spawn_blocking(|| panic!("in a worker")).await.unwrap_err();
        assert!(error.to_string().contains("in a worker"), "{error}");

        // As many at once as there are threads.
        let barrier = Arc::new(Barrier::new(WORKER_THREADS));
        let meet = (0..WORKER_THREADS).map(|_| {
            let barrier = barrier.clone();
            handle.spawn_blocking(move || barrier.wait())
        });
        assert!(join_all(meet).await.into_iter().all(|met| met.is_ok()));

        // More than threads: all are done, never more than the bound at once.
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let many = (0..200).map(|n| {
            let (now, most) = (now.clone(), most.clone());
            handle.spawn_blocking(move || {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                thread::yield_now();
                now.fetch_sub(1, Ordering::SeqCst);
                n
            })
        });
        let results: Vec<_> = join_all(many).await.into_iter().map(|result| result.unwrap()).collect();
        assert_eq!(results, (0..200).collect::<Vec<_>>());
        assert!(most.load(Ordering::SeqCst) <= WORKER_THREADS);
    });
    let _ = std::panic::take_hook();
}

#[test]
fn what_hangs_with_others_holds_up_nothing_of_our_own() {
    on_loop(|handle| async move {
        let gate = Arc::new(Barrier::new(FOREIGN_THREADS + 1));
        let hangs: Vec<_> = (0..FOREIGN_THREADS)
            .map(|_| {
                let gate = gate.clone();
                handle.spawn_foreign(move || {
                    gate.wait();
                })
            })
            .collect();
        let next = handle.spawn_foreign(|| ());
        handle.spawn_blocking(|| ()).await.unwrap();
        gate.wait();
        join_all(hangs).await;
        next.await.unwrap();
    });
}

#[test]
fn blocking_work_that_nobody_waits_for_is_skipped() {
    on_loop(|handle| async move {
        let gate = Arc::new(Barrier::new(WORKER_THREADS + 1));
        let busy: Vec<_> = (0..WORKER_THREADS)
            .map(|_| {
                let gate = gate.clone();
                handle.spawn_blocking(move || {
                    gate.wait();
                })
            })
            .collect();
        let done = Arc::new(AtomicBool::new(false));
        let flag = done.clone();
        drop(handle.spawn_blocking(move || flag.store(true, Ordering::SeqCst)));
        gate.wait();
        join_all(busy).await;
        handle.spawn_blocking(|| ()).await.unwrap();
        assert!(!done.load(Ordering::SeqCst));
    });
}

#[test]
fn a_single_threaded_loop_makes_no_thread() {
    let mut reactor = Reactor::single_threaded().unwrap();
    let handle = reactor.handle();
    for refused in [handle.spawn_blocking(|| ()), handle.spawn_foreign(|| ())] {
        let error = reactor.run_until(refused).unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
