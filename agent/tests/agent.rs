//! The program itself, as a process of this machine on a Unix socket: every operation, and hosts and programs that go away.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};

use sepal_agent::client::{Client, Event, Operation};
use sepal_agent::protocol::{Command, ErrorKind, Message, Terminal, ToAgent, VERSION};

struct Agent {
    process: Child,
    folder: tempfile::TempDir,
}

impl Agent {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        let process = Process::new(env!("CARGO_BIN_EXE_sepal-agent"))
            .arg("--listen-fd")
            .arg(listener.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.path("socket")).unwrap()
    }

    fn begin(&self, operation: Operation) -> Session {
        Session {
            client: Client::new(operation).unwrap(),
            stream: self.stream(),
            output: Vec::new(),
        }
    }

    fn exec(&self, command: Command) -> Session {
        self.begin(Operation::Exec(command))
    }

    fn put(&self, path: &Path, mode: u32, data: &[u8]) -> Event {
        let path = path.to_str().unwrap().as_bytes().to_vec();
        let mut session = self.begin(Operation::Put { path, mode });
        session.run(data).1
    }

    fn get(&self, path: &Path) -> (Vec<Event>, Event) {
        let path = path.to_str().unwrap().as_bytes().to_vec();
        self.begin(Operation::Get { path }).run(&[])
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An operation, moved by blocking calls.
struct Session {
    client: Client,
    stream: UnixStream,
    /// Output that `expect` has read beyond what it looked for.
    output: Vec<u8>,
}

impl Session {
    fn send(&mut self) {
        while !self.client.outgoing().is_empty() {
            let count = self.stream.write(self.client.outgoing()).unwrap();
            self.client.sent(count);
        }
    }

    fn next(&mut self) -> Event {
        self.send();
        let mut buffer = vec![0; Client::READ];
        loop {
            if let Some(event) = self.client.next_event().unwrap() {
                return event;
            }
            let count = self.stream.read(&mut buffer).unwrap();
            assert!(count > 0, "the agent hung up");
            self.client.receive(&buffer[..count]);
        }
    }

    /// Gives it `input` and its end as there is room, and collects the events before the last one.
    fn run(&mut self, mut input: &[u8]) -> (Vec<Event>, Event) {
        let mut events = Vec::new();
        loop {
            loop {
                let count = self.client.write(input);
                input = &input[count..];
                if count == 0 {
                    break;
                }
                self.send();
            }
            if input.is_empty() {
                self.client.end_input();
            }
            let event = self.next();
            if self.client.is_over() {
                return (events, event);
            }
            events.push(event);
        }
    }

    /// Reads until the output that no earlier call passed contains `text`, and passes that.
    fn expect(&mut self, text: &str) {
        loop {
            let found = self
                .output
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.output.drain(..at + text.len());
                return;
            }
            match self.next() {
                Event::Output(bytes) => self.output.extend(bytes),
                Event::Hello(_) | Event::Started | Event::Room => {}
                event => panic!(
                    "{event:?} while {text:?} was expected after {:?}",
                    String::from_utf8_lossy(&self.output)
                ),
            }
        }
    }
}

fn shell(script: &str) -> Command {
    Command {
        arguments: ["sh", "-c", script].map(|word| word.as_bytes().to_vec()).to_vec(),
        ..Command::default()
    }
}

/// Standard output and standard error.
fn outputs(events: &[Event]) -> (String, String) {
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Event::Output(bytes) => output.extend_from_slice(bytes),
            Event::Errors(bytes) => errors.extend_from_slice(bytes),
            _ => {}
        }
    }
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(output), text(errors))
}

fn failure(event: Event) -> (ErrorKind, String) {
    match event {
        Event::Failed { kind, message } => (kind, message),
        event => panic!("{event:?} where a failure was expected"),
    }
}

/// Bytes that differ.
fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|n| (n * 7 + n / 251) as u8).collect()
}

#[test]
fn it_says_what_it_is() {
    let agent = Agent::start();
    let event = agent.begin(Operation::Greet).next();
    assert_eq!(
        event,
        Event::Hello(concat!("sepal-agent ", env!("CARGO_PKG_VERSION")).into())
    );
}

#[test]
fn a_file_goes_in_and_comes_out_as_it_was() {
    let agent = Agent::start();
    for size in [0, 1, 5_000_000] {
        let (path, data) = (agent.path("file"), pattern(size));
        assert_eq!(agent.put(&path, 0o751, &data), Event::Finished { size: size as u64 });
        assert!(std::fs::read(&path).unwrap() == data);
        let (events, last) = agent.get(&path);
        assert_eq!(last, Event::Finished { size: size as u64 });
        assert_eq!(
            events[1],
            Event::File {
                size: size as u64,
                mode: 0o751
            }
        );
        let got: Vec<u8> = events
            .into_iter()
            .filter_map(|event| match event {
                Event::Data(bytes) => Some(bytes),
                _ => None,
            })
            .flatten()
            .collect();
        assert!(got == data);
    }
}

#[test]
fn a_new_file_gets_its_mode_and_an_old_one_keeps_its_own() {
    let agent = Agent::start();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    agent.put(&agent.path("default"), 0, b"x");
    assert_eq!(mode(&agent.path("default")), 0o644);
    agent.put(&agent.path("given"), 0o600, b"x");
    assert_eq!(mode(&agent.path("given")), 0o600);
    agent.put(&agent.path("given"), 0o777, b"y");
    assert_eq!(mode(&agent.path("given")), 0o600);
}

#[test]
fn half_a_file_leaves_nothing_behind() {
    let agent = Agent::start();
    let path = agent.path("file");
    std::fs::write(&path, "before").unwrap();
    let name = path.to_str().unwrap().as_bytes().to_vec();
    let mut session = agent.begin(Operation::Put { path: name, mode: 0 });
    while session.next() != Event::Started {}
    session.client.write(&pattern(100_000));
    session.send();
    // The agent sees the end after the data, removes what it has, and hangs up.
    session.stream.shutdown(std::net::Shutdown::Write).unwrap();
    session.stream.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"before");
    let names: Vec<_> = std::fs::read_dir(agent.folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn what_cannot_be_put_or_sent_is_told_with_a_reason() {
    let agent = Agent::start();
    let nowhere = agent.path("nowhere/file");
    let (kind, message) = failure(agent.put(&nowhere, 0, b"x"));
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(message.contains("nowhere/file: No such file"), "{message}");
    assert_eq!(failure(agent.get(&nowhere).1).0, ErrorKind::NotFound);
    let folder = agent.folder.path().to_owned();
    assert_eq!(failure(agent.put(&folder, 0, b"x")).0, ErrorKind::NotAFile);
    assert_eq!(failure(agent.get(&folder).1).0, ErrorKind::NotAFile);
    let pipe = agent.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    assert_eq!(failure(agent.get(&pipe).1).0, ErrorKind::NotAFile);
}

#[test]
fn a_program_has_arguments_environment_directory_and_outputs() {
    let agent = Agent::start();
    let mut command = shell("echo \"$1 $NAME\"; pwd; echo trouble >&2; exit 7");
    command.arguments.extend([b"sh".to_vec(), b"an argument".to_vec()]);
    command.environment = vec![b"NAME=a=value".to_vec()];
    command.directory = b"/usr".to_vec();
    let (events, last) = agent.exec(command).run(&[]);
    assert_eq!(last, Event::Exited(7));
    assert_eq!(
        outputs(&events),
        ("an argument a=value\n/usr\n".into(), "trouble\n".into())
    );
}

#[test]
fn input_reaches_a_program_whole_and_ends() {
    let agent = Agent::start();
    let data = pattern(3_000_000);
    let (events, last) = agent.exec(shell("cat")).run(&data);
    assert_eq!(last, Event::Exited(0));
    let output: Vec<u8> = events
        .into_iter()
        .filter_map(|event| match event {
            Event::Output(bytes) => Some(bytes),
            _ => None,
        })
        .flatten()
        .collect();
    assert!(output == data);
}

#[test]
fn a_program_that_reads_no_input_is_still_signalled() {
    let agent = Agent::start();
    let mut session = agent.exec(shell(
        "trap 'exit 42' TERM; echo ready; while :; do sleep 1000 & wait; done",
    ));
    session.expect("ready");
    while session.client.write(&[0; 10_000]) > 0 {
        session.send();
    }
    session.client.signal(15);
    assert_eq!(session.run(&[]).1, Event::Exited(42));
}

#[test]
fn a_program_that_a_signal_kills_is_told_from_one_that_exits() {
    let agent = Agent::start();
    assert_eq!(agent.exec(shell("kill -9 $$")).run(&[]).1, Event::Killed(9));
    let mut session = agent.exec(shell("echo ready; sleep 1000"));
    session.expect("ready");
    // The whole group: the shell and its sleep.
    session.client.signal(15);
    assert_eq!(session.run(&[]).1, Event::Killed(15));
}

#[test]
fn a_program_that_closes_its_input_gets_no_more_and_goes_on() {
    let agent = Agent::start();
    let (events, last) = agent.exec(shell("exec <&-; echo deaf")).run(&pattern(2_000_000));
    assert_eq!((last, outputs(&events).0), (Event::Exited(0), "deaf\n".into()));
}

#[test]
fn what_a_program_leaves_behind_does_not_hold_its_host_up() {
    let agent = Agent::start();
    let mut session = agent.exec(shell("sleep 1000 & echo $!"));
    let (events, last) = session.run(&[]);
    assert_eq!(last, Event::Exited(0));
    let pid: i32 = outputs(&events).0.trim().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_host_that_goes_away_ends_its_program() {
    let agent = Agent::start();
    let mut session = agent.exec(shell("echo $$; exec sleep 1000"));
    let mut output = String::new();
    while !output.ends_with('\n') {
        if let Event::Output(bytes) = session.next() {
            output.push_str(std::str::from_utf8(&bytes).unwrap());
        }
    }
    let pid = rustix::process::Pid::from_raw(output.trim().parse().unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    drop(session);
    let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None), Ok(1));
}

#[test]
fn a_terminal_has_its_size_and_can_be_resized() {
    let agent = Agent::start();
    let mut command =
        shell("tty; stty size; trap 'stty size; exit 5' WINCH; echo ready; while read line; do echo got $line; done");
    command.terminal = Some(Terminal { columns: 97, rows: 31 });
    let mut session = agent.exec(command);
    session.expect("/dev/pts/");
    session.expect("ready");
    session.client.write(b"words\n");
    session.expect("got words\r\n");
    session.client.resize(Terminal { columns: 40, rows: 12 });
    let (events, last) = session.run(&[]);
    assert_eq!(last, Event::Exited(5));
    assert!(outputs(&events).0.contains("12 40"), "{events:?}");
}

#[test]
fn the_end_of_a_terminals_input_is_seen_and_its_last_words_arrive() {
    let agent = Agent::start();
    let mut command = shell("stty -echo; echo ready; cat; seq 2000; echo bye");
    command.terminal = Some(Terminal { columns: 80, rows: 24 });
    let mut session = agent.exec(command);
    session.expect("ready");
    session.client.write(b"line\n");
    let (events, last) = session.run(&[]);
    assert_eq!(last, Event::Exited(0));
    let output = String::from_utf8_lossy(&session.output).into_owned() + &outputs(&events).0;
    assert!(
        output.starts_with("line\r\n1\r\n") || output.starts_with("\r\nline\r\n1\r\n"),
        "{output:.80?}"
    );
    assert!(output.ends_with("2000\r\nbye\r\n"), "{output:?}");
}

#[test]
fn a_program_that_is_not_there_is_told() {
    let agent = Agent::start();
    let command = |program: &str| Command {
        arguments: vec![program.as_bytes().to_vec()],
        ..Command::default()
    };
    let (kind, message) = failure(agent.exec(command("no-such-program")).run(&[]).1);
    assert_eq!((kind, &message[..16]), (ErrorKind::NotFound, "no-such-program:"));
    assert_eq!(
        failure(agent.exec(command("/etc/passwd")).run(&[]).1).0,
        ErrorKind::PermissionDenied
    );
    let mut lost = shell("true");
    lost.directory = b"/no/such/folder".to_vec();
    assert_eq!(failure(agent.exec(lost).run(&[]).1).0, ErrorKind::NotFound);
}

#[test]
fn many_operations_run_at_once() {
    let agent = Agent::start();
    let mut sessions: Vec<Session> = (0..20)
        .map(|n| agent.exec(shell(&format!("echo ready; read line; echo \"$line {n}\""))))
        .collect();
    for session in &mut sessions {
        session.expect("ready");
    }
    for (n, session) in sessions.iter_mut().enumerate().rev() {
        let (events, last) = session.run(b"");
        assert_eq!((last, outputs(&events).0), (Event::Exited(0), format!(" {n}\n")));
    }
}

#[test]
fn more_operations_than_there_is_room_for_are_refused() {
    let agent = Agent::start();
    let mut sessions: Vec<Session> = (0..64).map(|_| agent.begin(Operation::Greet)).collect();
    for session in &mut sessions {
        assert!(matches!(session.next(), Event::Hello(_)));
    }
    let mut refused = agent.exec(shell("true"));
    let (kind, _) = failure(loop {
        match refused.next() {
            Event::Hello(_) => {}
            event => break event,
        }
    });
    assert_eq!(kind, ErrorKind::Busy);
}

#[test]
fn a_host_that_does_not_speak_the_protocol_hurts_nobody() {
    let agent = Agent::start();
    let nonsense: [&[u8]; 5] = [
        b"GET / HTTP/1.0\r\n\r\n",
        &[0xff; 100],
        &[0; 100],
        &ToAgent::End.encode(),
        &ToAgent::Hello {
            version: VERSION + 1,
            software: String::new(),
        }
        .encode(),
    ];
    for bytes in nonsense {
        let mut stream = agent.stream();
        stream.write_all(bytes).unwrap();
        // It may hang up before it has read all.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(agent.exec(shell("exit 3")).run(&[]).1, Event::Exited(3));
}

#[test]
fn it_serves_one_connection_that_it_was_started_with() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let mut process = Process::new(env!("CARGO_BIN_EXE_sepal-agent"))
        .arg("--fd")
        .arg(theirs.as_raw_fd().to_string())
        .spawn()
        .unwrap();
    drop(theirs);
    let mut session = Session {
        client: Client::new(Operation::Exec(shell("echo here"))).unwrap(),
        stream: ours,
        output: Vec::new(),
    };
    assert_eq!(session.run(&[]).1, Event::Exited(0));
    drop(session);
    assert!(process.wait().unwrap().success());
    let usage = Process::new(env!("CARGO_BIN_EXE_sepal-agent"))
        .arg("--what")
        .output()
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).starts_with("usage: sepal-agent"));
}
