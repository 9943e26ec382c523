//! `guest exec` and `guest cp`, by the agent in a guest.

use std::{
    cell::RefCell,
    fs::File,
    io::{self, Read, Write},
    rc::Rc,
    thread,
};

use anyhow::{Context, Result, bail};
use futures::{FutureExt, StreamExt, channel::mpsc, select};
use sepal_schema::{
    agent_capnp::{agent, process},
    bytes_capnp::byte_stream,
    error::{Error, Kind, Outcome, read_completion, write_completion},
    guest_capnp::guest,
    transport::{Handle, guard},
};

use crate::{
    args::{Exec, ExecOptions},
    calls,
    manager::Manager,
    place::Place,
    status,
    terminal::{self, Raw},
};

/// Bytes sent at a time.
const CHUNK: usize = 64 * 1024;

async fn agent(guest: &guest::Client) -> Result<agent::Client> {
    let response = guest.agent_request().send().promise.await?;
    Ok(response.get()?.outcome()?.get_agent()?)
}

/// Writes what comes to a file or to standard output.
struct Writer<W>(RefCell<W>);

impl<W: Write + 'static> Writer<W> {
    fn new_client(to: W) -> byte_stream::Client {
        guard::new_client(Self(RefCell::new(to)))
    }
}

impl<W: Write + 'static> byte_stream::Server for Writer<W> {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Result<(), capnp::Error> {
        let to = &mut *self.0.borrow_mut();
        let written = to.write_all(params.get()?.get_bytes()?).and_then(|()| to.flush());
        written.map_err(|error| capnp::Error::failed(error.to_string()))
    }

    async fn end(
        self: Rc<Self>,
        _: byte_stream::EndParams,
        mut results: byte_stream::EndResults,
    ) -> Result<(), capnp::Error> {
        write_completion(&Ok(()), results.get());
        Ok(())
    }
}

async fn write(to: &byte_stream::Client, bytes: &[u8]) -> Result<(), capnp::Error> {
    let mut call = to.write_request();
    call.get().set_bytes(bytes);
    call.send().await
}

async fn end(to: &byte_stream::Client) -> Result<()> {
    Ok(read_completion(to.end_request().send().promise.await?.get()?)?)
}

/// Runs a program in a guest; the exit status is the program's.
pub(crate) async fn exec(handle: &Handle, place: &Place, args: &Exec) -> Result<u8> {
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, &args.name).await?;
    run(handle, &manager, &agent(&guest).await?, &args.options).await
}

/// Runs a program by this agent.
pub(crate) async fn run(handle: &Handle, manager: &Manager, agent: &agent::Client, args: &ExecOptions) -> Result<u8> {
    let process = start(agent, args).await?;
    // Before there are other threads: one that does not block the signal would take it, and forget it.
    let changes = args.tty.then(|| terminal::size_changes(handle)).transpose()?;
    let raw = match args.tty {
        true => Raw::enter().context("making the terminal raw")?,
        false => None,
    };
    let stdin = process.stdin_request().send().pipeline.get_stdin();
    let input = handle.spawn_owned(feed(stdin, input()?));
    let sizes = process.clone();
    let resized = handle.spawn_owned(async move {
        let Some(changes) = changes else { return };
        while changes.next().await.is_ok() {
            if let Some((columns, rows)) = terminal::size() {
                let mut call = sizes.resize_request();
                call.get().set_columns(columns);
                call.get().set_rows(rows);
                // A program that cannot be told does without.
                let _ = call.send().promise.await;
            }
        }
    });
    let ended = wait(&process).fuse();
    futures::pin_mut!(ended);
    let status = select! {
        status = ended => status,
        reason = manager.connection.ended().fuse() => bail!("the connection to the guest manager ended: {reason}"),
    };
    drop((input, resized, raw));
    status
}

async fn start(agent: &agent::Client, args: &ExecOptions) -> Result<process::Client> {
    let mut request = agent.exec_request();
    let mut command = request.get().init_command();
    command.set_arguments(&args.command[..])?;
    command.set_environment(&args.env[..])?;
    command.set_directory(args.cwd.as_deref().unwrap_or_default());
    if args.tty {
        let (columns, rows) = terminal::size().unwrap_or((80, 24));
        let mut size = command.init_terminal();
        size.set_columns(columns);
        size.set_rows(rows);
    }
    request.get().set_stdout(Writer::new_client(io::stdout()));
    request.get().set_stderr(Writer::new_client(io::stderr()));
    let response = request.send().promise.await?;
    Ok(response.get()?.outcome()?.get_process()?)
}

async fn wait(process: &process::Client) -> Result<u8> {
    use process::wait_result::Which;
    let response = process.wait_request().send().promise.await?;
    match response.get()?.which()? {
        Which::Exited(status) => Ok(status),
        Which::Killed(signal) => {
            eprintln!("killed by signal {signal}");
            Ok(signal.saturating_add(128))
        }
        Which::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// Standard input, read by a thread of its own; at most a few pieces ahead.
fn input() -> Result<mpsc::Receiver<Vec<u8>>> {
    let (mut sender, pieces) = mpsc::channel(2);
    let work = move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    let sent =
                        futures::executor::block_on(futures::SinkExt::send(&mut sender, buffer[..count].to_vec()));
                    if sent.is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(work)
        .context("starting a thread for the input")?;
    Ok(pieces)
}

async fn feed(stdin: byte_stream::Client, mut pieces: mpsc::Receiver<Vec<u8>>) {
    while let Some(piece) = pieces.next().await {
        if write(&stdin, &piece).await.is_err() {
            return;
        }
    }
    // A program that has ended needs no end of its input.
    let _ = end(&stdin).await;
}

/// Copies a file into a guest, or out of one.
pub(crate) async fn cp(handle: &Handle, place: &Place, from: &str, to: &str) -> Result<u8> {
    let (name, inward) = match (in_guest(from), in_guest(to)) {
        (None, Some((name, _))) => (name, true),
        (Some((name, _)), None) => (name, false),
        _ => {
            let message =
                "exactly one of the two is in a guest, as NAME:PATH; a path here that has a ':' starts with './'";
            return Err(Error::new(Kind::BadConfig, message).into());
        }
    };
    let manager = Manager::running(handle, place)?;
    let guest = calls::lookup(&manager.client, name).await?;
    let agent = agent(&guest).await?;
    match inward {
        true => put(&agent, from, in_guest(to).map_or(to, |(_, path)| path)).await?,
        false => get(&agent, in_guest(from).map_or(from, |(_, path)| path), to).await?,
    }
    Ok(status::SUCCESS)
}

/// The name and the path of NAME:PATH; none for a path of this host.
fn in_guest(text: &str) -> Option<(&str, &str)> {
    let (name, path) = text.split_once(':')?;
    (!name.is_empty() && !name.contains('/')).then_some((name, path))
}

async fn put(agent: &agent::Client, from: &str, to: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut file = File::open(from).with_context(|| format!("opening {from}"))?;
    let found = file.metadata().with_context(|| format!("looking at {from}"))?;
    if found.is_dir() {
        bail!("{from} is a folder; single files are copied");
    }
    let mut request = agent.put_file_request();
    request.get().set_path(to);
    request.get().set_mode(found.permissions().mode() & 0o7777);
    let response = request.send().promise.await?;
    let sink = response.get()?.outcome()?.get_sink()?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("reading {from}"))?;
        // An error of a stream is told by its end.
        if count == 0 || write(&sink, &buffer[..count]).await.is_err() {
            break;
        }
    }
    end(&sink).await
}

async fn get(agent: &agent::Client, from: &str, to: &str) -> Result<()> {
    let file = File::create(to).with_context(|| format!("creating {to}"))?;
    let mut request = agent.get_file_request();
    request.get().set_path(from);
    request.get().set_sink(Writer::new_client(file));
    let response = request.send().promise.await?;
    match response.get()?.which()? {
        agent::size_result::Size(_) => Ok(()),
        agent::size_result::Error(error) => {
            // What is there is not the file.
            let _ = std::fs::remove_file(to);
            Err(Error::read(error?)?.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_told_from_paths() {
        assert_eq!(in_guest("bee:/etc/hosts"), Some(("bee", "/etc/hosts")));
        for path in ["/etc/hosts", "hosts", "./a:b", ":x"] {
            assert_eq!(in_guest(path), None, "{path}");
        }
    }
}
