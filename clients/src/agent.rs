//! `guest exec` and `guest cp`, by the agent in a guest.

use std::{
    cell::RefCell,
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    rc::Rc,
    thread,
};

use anyhow::{Context, Result, bail};
use futures::{FutureExt, StreamExt, channel::mpsc, select};
use rustix::fs::Mode;
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
    // Before the size is looked at, and before there are other threads: one that does not block the signal would take it, and forget it.
    let changes = args.tty.then(|| terminal::size_changes(handle)).transpose()?;
    let process = start(agent, args).await?;
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
            say!("killed by signal {signal}");
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
    let target = Target::new(Path::new(to)).with_context(|| format!("creating {to}"))?;
    let mut request = agent.get_file_request();
    request.get().set_path(from);
    let file = target.file.try_clone().with_context(|| format!("creating {to}"))?;
    request.get().set_sink(Writer::new_client(file));
    let response = request.send().promise.await?;
    let answer = response.get()?;
    match answer.which()? {
        agent::size_result::Size(_) => target
            .finish(answer.get_mode())
            .with_context(|| format!("writing {to}")),
        agent::size_result::Error(error) => Err(Error::read(error?)?.into()),
    }
}

/// A file that is to be written, and is there whole or as it was before: what is written goes into a file beside it that takes its place. What is there
/// and no regular file, like a pipe, is written itself.
struct Target {
    file: File,
    part: Option<Part>,
}

struct Part {
    path: PathBuf,
    target: PathBuf,
    /// Those of the file that is replaced.
    permissions: Option<Permissions>,
}

impl Target {
    fn new(path: &Path) -> io::Result<Self> {
        let found = match fs::metadata(path) {
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if found.as_ref().is_some_and(|found| !found.is_file()) {
            return Ok(Self {
                file: OpenOptions::new().write(true).open(path)?,
                part: None,
            });
        }
        // Links are followed: the file that they lead to is replaced.
        let target = match &found {
            Some(_) => fs::canonicalize(path)?,
            None => path.to_owned(),
        };
        let Some(name) = target.file_name() else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let mut part = OsString::from(".");
        part.push(name);
        part.push(format!(".{}.part", std::process::id()));
        let part = target.with_file_name(part);
        Ok(Self {
            file: OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&part)?,
            part: Some(Part {
                path: part,
                target,
                permissions: found.map(|found| found.permissions()),
            }),
        })
    }

    /// Gives the file its name, and its mode if it is new: `mode` without what the umask forbids, and without what makes a program run as its
    /// owner, which no guest gives to a file of the host.
    fn finish(mut self, mode: u32) -> io::Result<()> {
        let Some(part) = &self.part else { return Ok(()) };
        let permissions = part.permissions.clone().unwrap_or_else(|| {
            // There is no way to look at it without setting it; nobody else makes files meanwhile.
            let mask = rustix::process::umask(Mode::empty());
            rustix::process::umask(mask);
            Permissions::from_mode(mode & 0o777 & !mask.bits())
        });
        self.file.set_permissions(permissions)?;
        fs::rename(&part.path, &part.target)?;
        self.part = None;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // There is nothing to do if it cannot be removed.
            let _ = fs::remove_file(&part.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    fn write(target: &Path, content: &[u8], mode: u32) {
        let mut target = Target::new(target).unwrap();
        target.file.write_all(content).unwrap();
        target.finish(mode).unwrap();
    }

    #[test]
    fn a_file_appears_whole_or_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        write(&file, b"first", 0o4700);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o700);

        std::os::unix::fs::symlink(&file, &link).unwrap();
        write(&link, b"second", 0o755);
        assert_eq!(fs::read(&file).unwrap(), b"second");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o700);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());

        let mut given_up = Target::new(&file).unwrap();
        given_up.file.write_all(b"third").unwrap();
        drop(given_up);
        assert_eq!(fs::read(&file).unwrap(), b"second");
        assert_eq!(names(folder.path()).len(), 2, "{:?}", names(folder.path()));
        let refused = Target::new(folder.path()).map(|_| ()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::IsADirectory);
    }

    #[test]
    fn guests_are_told_from_paths() {
        assert_eq!(in_guest("bee:/etc/hosts"), Some(("bee", "/etc/hosts")));
        for path in ["/etc/hosts", "hosts", "./a:b", ":x"] {
            assert_eq!(in_guest(path), None, "{path}");
        }
    }
}
