//! The agent in a guest, as a capability: one connection over vsock for each operation, driven by `sepal_agent::client`.
//!
//! ```text
//!   Agent.exec, putFile, getFile --> Operation: socket <--> Client (state machine) --> byte streams of the caller
//!                                     '- dropped with the Process or stream that stands for it: the connection ends, and what it was for
//!   presence: whether the agent is there
//! ```

mod presence;

use std::{os::unix::net::UnixStream, pin::pin, rc::Rc, time::Duration};

use futures::future::{Either, select};
use sepal_agent::{
    client::{Client, ClientError, Event, Operation as Wish},
    protocol::{Command, ErrorKind, Terminal},
};
use sepal_schema::{
    agent_capnp::{agent, process},
    answer,
    bytes_capnp::byte_stream,
    config::device::AGENT_PORT,
    error::{Error, Kind, write_completion},
    facet::Right,
    transport::{AsyncFd, guard, reactor::Task},
};

pub(crate) use self::presence::{look_again, ready_acceptor};
use crate::{
    access::{
        facet::facets,
        holder::{Deed, Holder},
    },
    changed::Changed,
    guest::Guest,
    model::cut,
    serial::{hang_up, receive, send},
    vsock,
};

type Reply = Result<(), capnp::Error>;

/// How long an operation waits for an agent that is not there yet.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest sentence of an agent that is told, in bytes.
const MAX_SENTENCE: usize = 512;
/// What is sent at a time.
const CHUNK: usize = 64 * 1024;

/// How an operation ended.
#[derive(Debug, Clone)]
enum Outcome {
    Version(String),
    Done(u64),
    Exited(u8),
    Killed(u8),
}

#[derive(Debug, Default)]
struct Progress {
    started: bool,
    /// Permission bits of the file that is read.
    mode: u32,
    outcome: Option<Result<Outcome, Error>>,
}

/// One operation, which ends with the capability that it was begun through.
struct Operation {
    holder: Holder,
    socket: AsyncFd<UnixStream>,
    client: Changed<Client>,
    progress: Changed<Progress>,
}

fn agent_error(kind: ErrorKind, message: &str) -> Error {
    let kind = match kind {
        ErrorKind::NotFound => Kind::NotFound,
        ErrorKind::PermissionDenied => Kind::PermissionDenied,
        ErrorKind::NoSpace => Kind::NoStorage,
        ErrorKind::NotAFile | ErrorKind::BadRequest => Kind::BadConfig,
        ErrorKind::Busy => Kind::NoResources,
        ErrorKind::Other => Kind::InternalError,
    };
    Error::new(kind, format!("in the guest: {}", cut(message, MAX_SENTENCE))).about("agent")
}

fn client_error(error: &ClientError) -> Error {
    Error::new(Kind::FailedServiceConnect, error.to_string()).about("agent")
}

/// Connects to the agent; with `patience`, waits that long for it to be there, else for as long as the guest runs.
async fn connect(guest: &Guest, patience: Option<Duration>) -> Result<UnixStream, Error> {
    let remote = vsock::remote(guest).await?;
    match vsock::connect(guest, &remote, AGENT_PORT).await {
        // Whoever had said that it is there is not any more; the next one says so again.
        Err(error) if error.kind == Kind::ConnectionRefused => guest.set_agent_ready(false),
        Err(error) if error.kind == Kind::TimedOut => {}
        answer => return answer,
    }
    let ended = pin!(guest.ended());
    let ready = pin!(guest.agent_ready());
    let there = select(ready, ended);
    let handle = &guest.manager.handle;
    let waited = match patience {
        Some(patience) => handle.timeout(patience, there).await,
        None => Ok(there.await),
    };
    match waited {
        // The guest may have begun again meanwhile.
        Ok(Either::Left(_)) => vsock::connect(guest, &vsock::remote(guest).await?, AGENT_PORT).await,
        Ok(Either::Right(_)) => Err(guest
            .check_live()
            .err()
            .unwrap_or_else(|| Error::new(Kind::NotRunning, "the guest has ended"))),
        Err(_) => {
            let message = format!(
                "no agent answers in guest \"{}\": sepal-agent has to run there",
                guest.name
            );
            Err(Error::new(Kind::TimedOut, message).about("agent"))
        }
    }
}

/// Has the agent turn the guest off, for who may have it shut down.
///
/// # Errors
/// No agent answers, or it cannot run the program.
pub(crate) async fn power_off(holder: &Holder) -> Result<(), Error> {
    let command = Command {
        arguments: vec![b"poweroff".to_vec()],
        ..Command::default()
    };
    let operation = Operation::begin(holder, Wish::Exec(command), Some(PATIENCE)).await?;
    // Input that never ends would not matter to it, but is nobody's to give.
    operation.client.change(Client::end_input);
    operation.drive(None, None).await;
    match operation.outcome().await? {
        Outcome::Exited(0) => Ok(()),
        Outcome::Exited(status) => Err(failed(&format!("poweroff exited with status {status}"))),
        Outcome::Killed(signal) => Err(failed(&format!("poweroff was killed by signal {signal}"))),
        Outcome::Version(_) | Outcome::Done(_) => Err(client_error(&ClientError::Turn("another end"))),
    }
}

fn failed(what: &str) -> Error {
    Error::new(Kind::InternalError, format!("in the guest: {what}")).about("agent")
}

impl Operation {
    async fn begin(holder: &Holder, wish: Wish, patience: Option<Duration>) -> Result<Rc<Self>, Error> {
        let client = Client::new(wish).map_err(|error| Error::bad_config("command", error.to_string()))?;
        let socket = connect(&holder.guest, patience).await?;
        let registered = holder.handle().register(socket);
        let socket = registered.map_err(|error| Error::new(Kind::NoResources, error.to_string()))?;
        Ok(Rc::new(Self {
            holder: holder.clone(),
            socket,
            client: Changed::new(client),
            progress: Changed::default(),
        }))
    }

    /// Moves bytes to and fro until the operation is over; output goes to the streams.
    async fn drive(&self, stdout: Option<byte_stream::Client>, stderr: Option<byte_stream::Client>) {
        let drive = async {
            let outcome = {
                let (sending, hearing) = (pin!(self.send()), pin!(self.hear(stdout.as_ref(), stderr.as_ref())));
                match select(hearing, sending).await {
                    Either::Left((outcome, _)) => outcome,
                    // The agent may have said why it takes no more.
                    Either::Right(((), hearing)) => hearing.await,
                }
            };
            for stream in [&stdout, &stderr].into_iter().flatten() {
                // Whoever does not want to know the end needs no help.
                let _ = stream.end_request().send().promise.await;
            }
            outcome
        };
        let outcome = self.holder.while_live(drive).await;
        if matches!(&outcome, Err(error) if error.kind == Kind::Revoked) {
            // The agent ends what it was for.
            hang_up(&self.socket);
        }
        self.progress.change(|progress| progress.outcome = Some(outcome));
    }

    async fn send(&self) {
        loop {
            let next = |client: &mut Client| {
                let outgoing = client.outgoing();
                (!outgoing.is_empty()).then(|| outgoing[..outgoing.len().min(CHUNK)].to_vec())
            };
            let bytes = self.client.until(next).await;
            let Ok(sent) = send(&self.socket, &bytes).await else {
                return;
            };
            self.client.change(|client| client.sent(sent));
        }
    }

    async fn hear(
        &self,
        stdout: Option<&byte_stream::Client>,
        stderr: Option<&byte_stream::Client>,
    ) -> Result<Outcome, Error> {
        let mut buffer = vec![0; Client::READ];
        loop {
            let count = receive(&self.socket, &mut buffer).await.unwrap_or(0);
            if count == 0 {
                return Err(client_error(&ClientError::Ended));
            }
            self.client.change(|client| client.receive(&buffer[..count]));
            while let Some(event) = self
                .client
                .change(Client::next_event)
                .map_err(|error| client_error(&error))?
            {
                match event {
                    Event::Hello(software) if self.client.look(Client::is_over) => {
                        return Ok(Outcome::Version(cut(&software, MAX_SENTENCE)));
                    }
                    Event::Hello(_) | Event::Room => {}
                    Event::Started => self.progress.change(|progress| progress.started = true),
                    Event::File { mode, .. } => self.progress.change(|progress| {
                        progress.started = true;
                        progress.mode = mode;
                    }),
                    Event::Data(bytes) | Event::Output(bytes) => pass(stdout, &bytes).await?,
                    Event::Errors(bytes) => pass(stderr, &bytes).await?,
                    Event::Finished { size } => return Ok(Outcome::Done(size)),
                    Event::Exited(status) => return Ok(Outcome::Exited(status)),
                    Event::Killed(signal) => return Ok(Outcome::Killed(signal)),
                    Event::Failed { kind, message } => return Err(agent_error(kind, &message)),
                }
            }
        }
    }

    /// Waits until it is under way.
    async fn started(&self) -> Result<(), Error> {
        let started = |progress: &mut Progress| match &progress.outcome {
            Some(Err(error)) => Some(Err(error.clone())),
            Some(Ok(_)) => Some(Ok(())),
            None => progress.started.then_some(Ok(())),
        };
        self.progress.until(started).await
    }

    async fn outcome(&self) -> Result<Outcome, Error> {
        self.progress.until(|progress| progress.outcome.clone()).await
    }

    /// Hands over input, all of it, as there is room.
    async fn write(&self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let room = |client: &mut Client| Some(client.write(bytes)).filter(|count| *count > 0);
            match select(pin!(self.client.until(room)), pin!(self.outcome())).await {
                Either::Left((count, _)) => bytes = &bytes[count..],
                Either::Right((Err(error), _)) => return Err(error),
                // A program that has ended takes no more input.
                Either::Right((Ok(_), _)) => return Ok(()),
            }
            // Whoever sends looks again.
            self.client.change(|_| ());
        }
        Ok(())
    }
}

/// Hands output on; who is not there drops it.
async fn pass(to: Option<&byte_stream::Client>, bytes: &[u8]) -> Result<(), Error> {
    let Some(to) = to else { return Ok(()) };
    let mut call = to.write_request();
    call.get().set_bytes(bytes);
    let sent = call.send().await;
    sent.map_err(|error| Error::new(Kind::Cancelled, format!("nobody takes the output: {error}")))
}

/// Starts an operation on a task of its own, which ends when the task is dropped.
fn start(operation: &Rc<Operation>, stdout: Option<byte_stream::Client>, stderr: Option<byte_stream::Client>) -> Task {
    let driven = operation.clone();
    let drive = async move { driven.drive(stdout, stderr).await };
    operation.holder.handle().spawn_owned(drive)
}

/// See `agent.capnp`.
pub(crate) struct AgentServer(pub(crate) Holder);

facets!(AgentServer { 0 });

const READY: Deed = Deed::new("Agent.ready", &[Right::Agent]).only_looks();
const PUT_FILE: Deed = Deed::new("Agent.putFile", &[Right::Agent]);
const GET_FILE: Deed = Deed::new("Agent.getFile", &[Right::Agent]);
const EXEC: Deed = Deed::new("Agent.exec", &[Right::Agent]);

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn strings(list: capnp::text_list::Reader<'_>) -> Result<Vec<Vec<u8>>, capnp::Error> {
    list.iter().map(|text| Ok(text?.as_bytes().to_vec())).collect()
}

fn command(from: agent::command::Reader<'_>) -> Result<Command, capnp::Error> {
    let terminal = match from.has_terminal() {
        true => {
            let size = from.get_terminal()?;
            Some(Terminal {
                columns: size.get_columns(),
                rows: size.get_rows(),
            })
        }
        false => None,
    };
    Ok(Command {
        arguments: strings(from.get_arguments()?)?,
        environment: strings(from.get_environment()?)?,
        directory: from.get_directory()?.as_bytes().to_vec(),
        terminal,
    })
}

impl agent::Server for AgentServer {
    async fn ready(self: Rc<Self>, _: agent::ReadyParams, mut results: agent::ReadyResults) -> Reply {
        let greet = async {
            let operation = Operation::begin(&self.0, Wish::Greet, None).await?;
            operation.drive(None, None).await;
            operation.outcome().await
        };
        match self.0.perform(READY, "", greet).await {
            Ok(Outcome::Version(version)) => results.get().set_version(&version),
            Ok(_) => client_error(&ClientError::Turn("another end")).write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn put_file(self: Rc<Self>, params: agent::PutFileParams, mut results: agent::PutFileResults) -> Reply {
        let (path, mode) = {
            let params = params.get()?;
            (params.get_path()?.as_bytes().to_vec(), params.get_mode())
        };
        let detail = lossy(&path);
        let wish = Wish::Put { path, mode };
        let begin = async {
            let operation = Operation::begin(&self.0, wish, Some(PATIENCE)).await?;
            let task = start(&operation, None, None);
            operation.started().await?;
            Ok::<_, Error>(Input {
                operation,
                task: Some(task).into(),
                is_file: true,
            })
        };
        let sink = self.0.perform(PUT_FILE, detail, begin).await;
        answer!(results, set_sink, sink.map(guard::new_client));
        Ok(())
    }

    async fn get_file(self: Rc<Self>, params: agent::GetFileParams, mut results: agent::GetFileResults) -> Reply {
        let (path, sink) = {
            let params = params.get()?;
            (params.get_path()?.as_bytes().to_vec(), params.get_sink()?)
        };
        let (detail, wish) = (lossy(&path), Wish::Get { path });
        let get = async {
            let operation = Operation::begin(&self.0, wish, Some(PATIENCE)).await?;
            operation.drive(Some(sink), None).await;
            let mode = operation.progress.look(|progress| progress.mode);
            Ok::<_, Error>((operation.outcome().await?, mode))
        };
        match self.0.perform(GET_FILE, detail, get).await {
            Ok((Outcome::Done(size), mode)) => {
                results.get().set_size(size);
                results.get().set_mode(mode);
            }
            Ok(_) => client_error(&ClientError::Turn("another end")).write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }

    async fn exec(self: Rc<Self>, params: agent::ExecParams, mut results: agent::ExecResults) -> Reply {
        let (command, stdout, stderr) = {
            let params = params.get()?;
            let stdout = params.has_stdout().then(|| params.get_stdout()).transpose()?;
            let stderr = params.has_stderr().then(|| params.get_stderr()).transpose()?;
            (command(params.get_command()?)?, stdout, stderr)
        };
        // The program alone: its arguments may be nobody else's business.
        let detail = command
            .arguments
            .first()
            .map(|program| lossy(program))
            .unwrap_or_default();
        let wish = Wish::Exec(command);
        let begin = async {
            let operation = Operation::begin(&self.0, wish, Some(PATIENCE)).await?;
            let task = start(&operation, stdout, stderr);
            operation.started().await?;
            Ok::<_, Error>(Running { operation, _task: task })
        };
        let running = self.0.perform(EXEC, detail, begin).await;
        answer!(results, set_process, running.map(guard::new_client));
        Ok(())
    }
}

/// The input of an operation. Dropping it before its end ends a file's operation, and a program's input.
struct Input {
    operation: Rc<Operation>,
    /// Of a file: what drives it.
    task: std::cell::RefCell<Option<Task>>,
    is_file: bool,
}

impl Drop for Input {
    fn drop(&mut self) {
        drop(self.task.take());
        if !self.is_file {
            self.operation.client.change(Client::end_input);
        }
    }
}

impl byte_stream::Server for Input {
    async fn write(self: Rc<Self>, params: byte_stream::WriteParams) -> Reply {
        let bytes = params.get()?.get_bytes()?;
        if bytes.len() > CHUNK {
            let length = bytes.len();
            let message = format!("{length} bytes were written at once; at most {CHUNK} are allowed");
            return Err(capnp::Error::failed(message));
        }
        let operation = &self.operation;
        let written = operation.holder.while_live(operation.write(bytes)).await;
        written.map_err(|error| error.exception())
    }

    async fn end(self: Rc<Self>, _: byte_stream::EndParams, mut results: byte_stream::EndResults) -> Reply {
        let operation = &self.operation;
        operation.client.change(Client::end_input);
        let end = async {
            match self.is_file {
                true => operation.outcome().await.map(drop),
                false => Ok(()),
            }
        };
        let outcome = operation.holder.while_live(end).await;
        write_completion(&outcome, results.get());
        Ok(())
    }
}

/// A program that runs. Dropping it ends the connection, which kills the program.
struct Running {
    operation: Rc<Operation>,
    _task: Task,
}

impl process::Server for Running {
    async fn stdin(self: Rc<Self>, _: process::StdinParams, mut results: process::StdinResults) -> Reply {
        self.operation.holder.check_live().map_err(|error| error.exception())?;
        let input = Input {
            operation: self.operation.clone(),
            task: None.into(),
            is_file: false,
        };
        results.get().set_stdin(guard::new_client(input));
        Ok(())
    }

    async fn resize(self: Rc<Self>, params: process::ResizeParams, mut results: process::ResizeResults) -> Reply {
        let params = params.get()?;
        let terminal = Terminal {
            columns: params.get_columns(),
            rows: params.get_rows(),
        };
        let outcome = self.operation.holder.check_live();
        if outcome.is_ok() {
            self.operation.client.change(|client| client.resize(terminal));
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn signal(self: Rc<Self>, params: process::SignalParams, mut results: process::SignalResults) -> Reply {
        let number = params.get()?.get_number();
        let outcome = self.operation.holder.check_live();
        if outcome.is_ok() {
            self.operation.client.change(|client| client.signal(number));
        }
        write_completion(&outcome, results.get());
        Ok(())
    }

    async fn wait(self: Rc<Self>, _: process::WaitParams, mut results: process::WaitResults) -> Reply {
        let operation = &self.operation;
        match operation.holder.while_live(operation.outcome()).await {
            Ok(Outcome::Exited(status)) => results.get().set_exited(status),
            Ok(Outcome::Killed(signal)) => results.get().set_killed(signal),
            Ok(_) => client_error(&ClientError::Turn("another end")).write(results.get().init_error()),
            Err(error) => error.write(results.get().init_error()),
        }
        Ok(())
    }
}
