//! Files of every kind, uploads, and the serial port.

use std::{
    fs,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use sepal_schema::{
    config::{File, GuestConfig},
    error::{Error, Kind, Outcome},
    file_capnp::upload,
    guest_capnp::serial,
    report::Reason,
};

use crate::world::{Caller, Launched, World, info, kill, named, read, run, wait};

fn kind<T>(result: Result<T, Error>) -> Kind {
    result.err().unwrap().kind
}

/// What the component finds when it reads the kernel.
fn kernel_of(world: &World) -> Vec<u8> {
    let process = world.fake.last();
    let config = process.config.borrow();
    let File::Fd(kernel) = &config.as_ref().unwrap().kernel else {
        panic!("no kernel")
    };
    let mut content = vec![0; 256 * 1024];
    let count = rustix::io::pread(kernel, &mut content, 0).unwrap();
    content.truncate(count);
    content
}

fn with_kernel(kernel: File) -> GuestConfig {
    GuestConfig { kernel, ..named("web") }
}

async fn upload(caller: &Caller, size: u64) -> Result<upload::Client, Error> {
    let mut request = caller.manager.upload_request();
    request.get().set_size(size);
    let answer = request.send().promise.await?;
    Ok(answer.get()?.outcome()?.get_upload()?)
}

async fn append(upload: &upload::Client, bytes: &[u8]) -> Result<(), capnp::Error> {
    let mut request = upload.write_request();
    request.get().set_bytes(bytes);
    request.send().await
}

async fn finish(upload: &upload::Client) -> Result<u64, capnp::Error> {
    Ok(upload.finish_request().send().promise.await?.get()?.get_size())
}

async fn launches(world: &World, caller: &Caller, kernel: File, name: &str, content: &[u8]) {
    let launched = caller.launch_config(with_kernel(kernel), false).await.unwrap();
    assert_eq!(info(&launched.guest).await.descriptor.unwrap().kernel, name);
    assert_eq!(kernel_of(world), content);
    kill(&launched.guest).await.unwrap();
}

#[test]
fn a_kernel_comes_in_every_way() {
    run(async |world| {
        let caller = world.caller();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, b"a file").unwrap();
        launches(&world, &caller, File::None, "embedded", sepal_default_guest::IMAGE).await;
        let fd: OwnedFd = fs::File::open(&path).unwrap().into();
        let name = path.to_str().unwrap().to_owned();
        launches(&world, &caller, File::Fd(fd), &name, b"a file").await;
        let mut unnamed = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut unnamed, b"no name").unwrap();
        launches(&world, &caller, File::Fd(unnamed.into()), "fd", b"no name").await;
        launches(
            &world,
            &caller,
            File::Bytes(b"some bytes".into()),
            "bytes",
            b"some bytes",
        )
        .await;
        launches(&world, &caller, File::Path(name.clone()), &name, b"a file").await;
        let upload = upload(&caller, 0).await.unwrap();
        append(&upload, b"in two ").await.unwrap();
        append(&upload, b"pieces").await.unwrap();
        assert_eq!(finish(&upload).await.unwrap(), 13);
        // Twice: an upload can be used as long as it is held, the last time for as long as the message that names it.
        let (once, again) = (File::Upload(upload.clone()), File::Upload(upload));
        launches(&world, &caller, once, "upload", b"in two pieces").await;
        launches(&world, &caller, again, "upload", b"in two pieces").await;
    });
}

#[test]
fn only_who_has_the_managers_uid_may_name_paths() {
    run(async |world| {
        let path = || File::Path("/dev/null".into());
        let stranger = world.caller_as(false);
        let error = stranger.launch_config(with_kernel(path()), false).await.err().unwrap();
        assert_eq!((error.kind, &error.about[..]), (Kind::PermissionDenied, "kernel"));
        let error = world
            .caller()
            .launch_config(with_kernel(path()), false)
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind, Kind::BadConfig, "it is opened, and no ordinary file");
        assert_eq!(
            world.fake.count(),
            0,
            "no component is started for files that cannot be used"
        );
        stranger
            .launch_config(with_kernel(File::Bytes(b"x".into())), false)
            .await
            .unwrap();
    });
}

#[test]
fn uploads_have_limits_and_must_be_finished() {
    run(async |world| {
        let caller = world.caller();
        assert_eq!(kind(upload(&caller, (4 << 30) + 1).await), Kind::NoResources);
        let mut uploads = Vec::new();
        for _ in 0..16 {
            uploads.push(upload(&caller, 4).await.unwrap());
        }
        assert_eq!(kind(upload(&caller, 4).await), Kind::NoResources);
        let _other = upload(&world.caller(), 4).await.unwrap();
        uploads.pop();
        uploads.push(upload(&caller, 4).await.unwrap());

        let open = &uploads[0];
        append(open, b"1234").await.unwrap();
        let unfinished = caller
            .launch_config(with_kernel(File::Upload(open.clone())), false)
            .await;
        assert_eq!(kind(unfinished), Kind::BadConfig);
        // The failure of a streaming call is told by the next call that is not.
        let _ = append(open, b"5").await;
        let error = finish(open).await.unwrap_err();
        assert!(error.to_string().contains("room for 4 bytes"), "{error}");
        let failed = caller
            .launch_config(with_kernel(File::Upload(open.clone())), false)
            .await;
        assert_eq!(kind(failed), Kind::BadConfig);
    });
}

fn serial(launched: &Launched) -> serial::Client {
    launched.guest.serial_request().send().pipeline.get_serial()
}

#[test]
fn the_serial_port_carries_both_ways() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let process = world.fake.last();
        process.print(b"login: ");
        assert_eq!(read(&launched.guest, 0, true).await.0, b"login: ");
        let mut request = serial(&launched).write_request();
        request.get().set_bytes(b"root\r");
        request.send().await.unwrap();
        let mut port = process.serial();
        let typed = world.handle.spawn_blocking(move || {
            port.set_nonblocking(false).unwrap();
            let mut typed = [0; 5];
            port.read_exact(&mut typed).map(|()| typed)
        });
        assert_eq!(&typed.await.unwrap().unwrap(), b"root\r");

        // What only observes may read and not write.
        let observer = launched.guest.observer_request().send().pipeline.get_observer();
        let output = observer.output_request().send().pipeline.get_output();
        let end = output.end_request().send().promise.await.unwrap();
        assert_eq!(end.get().unwrap().get_position(), 7);
        let as_serial: serial::Client = capnp::capability::FromClientHook::new(output.client.hook);
        let mut request = as_serial.write_request();
        request.get().set_bytes(b"!");
        let _ = request.send().await;
        assert!(as_serial.open_request().send().promise.await.is_err());
    });
}

#[test]
fn the_serial_port_can_be_had_as_a_socket() {
    run(async |world| {
        let caller = world.caller();
        let launched = caller.launch("web").await.unwrap();
        let process = world.fake.last();
        process.print(b"hello");
        let answer = serial(&launched).open_request().send().promise.await.unwrap();
        let serial::open_result::Fd(fd) = answer.get().unwrap().which().unwrap() else {
            panic!("no socket")
        };
        let stream = caller.connection.fds().take(fd.unwrap().get_number()).unwrap();
        let mut stream = UnixStream::from(stream);
        stream.write_all(b"x").unwrap();
        let mut port = process.serial();
        process.end(Reason::Shutdown);
        wait(&launched.guest).await;
        let all = world.handle.spawn_blocking(move || {
            stream.set_nonblocking(false).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).map(|_| all)
        });
        assert_eq!(all.await.unwrap().unwrap(), b"hello");
        port.set_nonblocking(true).unwrap();
        let _ = port.read(&mut [0; 1]);
    });
}
