//! `guest metrics`: what it prints is what Prometheus' own parser reads, and its server is one for this machine's scrapers alone.
//!
//! The parser (prometheus_client) comes from PyPI, into a virtual environment in the user's cache, once.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: a failure is a panic with a message"
)]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    thread,
};

use rustix::process::Signal;
use sepal_tests::{Running, World, kvm_missing};

/// What the embedded guest prints when it waits for a command.
const PROMPT: &str = "sepal> ";
/// Prometheus' client library for Python, whose parser is the reference.
const PARSER: &str = "0.26.0";
/// Scrapers at a time: more than are answered at once.
const SCRAPERS: usize = 80;

/// The samples of a text, by Prometheus' parser: names with their labels, and values; and the families by their types.
fn parse(world: &World, text: &str) -> (BTreeMap<String, f64>, Vec<String>) {
    let mut command = Command::new(sepal_tests::python::with("prometheus_client", PARSER));
    command
        .arg("-I")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openmetrics/check.py"));
    let mut parser = world.start_command(command, None);
    parser.type_in(text);
    parser.close_input();
    let told = parser.wait().expect_code(0).out();
    let (families, samples): (Vec<_>, Vec<_>) = told.lines().partition(|line| line.starts_with("family "));
    let sample = |line: &&str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    (
        samples.iter().map(sample).collect(),
        families.into_iter().map(str::to_owned).collect(),
    )
}

#[test]
fn prometheus_reads_what_is_printed() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let image = world.folder().join("image");
    std::fs::write(&image, [0; 4096]).unwrap();
    let disk = format!("--disk={},ro", image.display());
    world.guest(&["launch", "ant", "--detach"]).expect_code(0);
    let mut bee = world.start(&["launch", "bee", "--cpus=2", "--memory=32M", &disk, "--balloon"]);
    bee.stdout.expect(PROMPT);
    let scrape = || world.guest(&["metrics"]).expect_code(0).out();
    // On a busy host a component may take a while to tell anything.
    let text = sepal_tests::until("figures of both", || {
        let text = scrape();
        (text.matches("\nsepal_guest_uptime_seconds{").count() == 2).then_some(text)
    });
    assert!(text.ends_with("\n# EOF\n"), "{text}");
    let (samples, families) = parse(&world, &text);
    let value = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("no {name} in {text}"));
    assert_eq!(value("sepal_up{}"), 1.0);
    assert_eq!(value("sepal_guests{status=running}"), 2.0);
    assert_eq!(value("sepal_guest_status{name=bee,sepal_guest_status=running}"), 1.0);
    assert_eq!(value("sepal_guest_status{name=bee,sepal_guest_status=stopped}"), 0.0);
    assert_eq!(value("sepal_guest_vcpus{name=bee}"), 2.0);
    assert_eq!(value("sepal_guest_memory_bytes{name=bee}"), f64::from(32 << 20));
    assert!(value("sepal_guest_resident_memory_bytes{name=bee}") > f64::from(1 << 20));
    assert!(value("sepal_guest_uptime_seconds{name=bee}") > 0.0);
    assert!(value("sepal_guest_vcpu_cpu_seconds_total{name=bee,vcpu=0}") > 0.0);
    assert!(value("sepal_guest_vcpu_exits_total{name=bee,reason=io,vcpu=0}") > 0.0);
    assert_eq!(value("sepal_guest_disk_written_bytes_total{disk=disk0,name=bee}"), 0.0);
    assert_eq!(value("sepal_guest_balloon_bytes{name=bee}"), 0.0);
    let infos = samples.keys().filter(|name| name.starts_with("sepal_guest_info{"));
    assert_eq!(
        infos.filter(|name| name.contains("kernel=embedded")).count(),
        2,
        "{text}"
    );
    assert!(
        families.contains(&"family sepal_guest_vcpu_exits counter".to_owned()),
        "{families:?}"
    );
    assert!(
        families.contains(&"family sepal_guest_vcpu_state stateset".to_owned()),
        "{families:?}"
    );
    // Counters only grow.
    bee.type_in("mem\r");
    bee.stdout.expect(PROMPT);
    let counters = samples.iter().filter(|(name, _)| name.contains("_total{"));
    sepal_tests::until("a counter has grown", || {
        let (later, _) = parse(&world, &scrape());
        for (name, value) in counters.clone() {
            assert!(later[name] >= *value, "{name}");
        }
        counters.clone().any(|(name, value)| later[name] > *value).then_some(())
    });
    bee.type_in("shutdown\r");
    bee.wait().expect_code(0);
    // Of one that has ended there is its state, and no figures.
    let (samples, _) = parse(&world, &scrape());
    assert_eq!(samples["sepal_guest_status{name=bee,sepal_guest_status=stopped}"], 1.0);
    assert!(!samples.contains_key("sepal_guest_uptime_seconds{name=bee}"));
    assert!(samples.contains_key("sepal_guest_uptime_seconds{name=ant}"));
    world.guest(&["stop", "ant", "--kill"]).expect_code(0);
    world.end();
}

/// Asks, and reads to the end of the answer: its head and its body.
fn ask(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

const GET: &str =
    "GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n";

/// Starts the server on a port of the loopback interface: the port.
fn serve_on_port(world: &World) -> (Running, u16) {
    let server = world.start(&["metrics", "--listen", "127.0.0.1:0"]);
    server.stderr.expect("http://127.0.0.1:");
    let port = server.stderr.expect("/metrics");
    let port = port.strip_suffix("/metrics").unwrap().parse().unwrap();
    (server, port)
}

#[test]
fn scrapers_of_this_machine_are_served() {
    if kvm_missing() {
        return;
    }
    let mut world = World::with_manager();
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    let (server, port) = serve_on_port(&world);
    let connect = move || TcpStream::connect(("127.0.0.1", port)).unwrap();
    // On a busy host its component may take a while to tell anything.
    sepal_tests::until("figures", || {
        ask(connect(), GET)
            .1
            .contains("sepal_guest_uptime_seconds")
            .then_some(())
    });
    // These never ask.
    let silent: Vec<_> = (0..8).map(|_| connect()).collect();
    let scrapers: Vec<_> = (0..SCRAPERS)
        .map(|_| thread::spawn(move || ask(connect(), GET)))
        .collect();
    for scraper in scrapers {
        let (head, body) = scraper.join().unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let kind = "\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n";
        assert!(head.contains(kind), "{head}");
        assert!(
            head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
            "{head}"
        );
        assert!(
            body.contains("sepal_guest_uptime_seconds{name=\"bee\"}") && body.ends_with("# EOF\n"),
            "{body}"
        );
    }
    for (request, status) in [
        ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
        ("GET /metrics HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", "403"),
        ("HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
        ("HEAD /metrics HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", "403"),
        ("HEAD /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", "200"),
        ("HEAD /metrics nonsense\r\n\r\n", "400"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let (head, body) = ask(connect(), request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {head}");
        assert_eq!(body.is_empty(), request.starts_with("HEAD"), "{request}: {body}");
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(8 * 1024));
    assert!(ask(connect(), &long).0.starts_with("HTTP/1.1 431 "));
    // One that is gone before it has asked.
    connect().shutdown(Shutdown::Both).unwrap();
    drop(silent);

    // Without a guest manager there is nothing to tell but that; the next one is found.
    world.guest(&["end-manager"]).expect_code(0);
    world.take_manager().wait().expect_code(0);
    let (head, body) = ask(connect(), GET);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(body.contains("\nsepal_up 0\n") && !body.contains("bee"), "{body}");
    world.start_manager();
    assert!(ask(connect(), GET).1.contains("\nsepal_up 1\n"));

    server.signal(Signal::TERM);
    server.wait().expect_code(0);
    world.end();
}

#[test]
fn who_never_asks_or_never_listens_makes_room_for_who_does() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let (server, port) = serve_on_port(&world);
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    // More than are served at a time, of both kinds; each has far more time than this test takes.
    let held: Vec<_> = (0..2 * SCRAPERS)
        .map(|number| {
            let mut held = connect();
            if number % 2 == 0 {
                held.write_all(GET.as_bytes()).unwrap();
            }
            held
        })
        .collect();
    for _ in 0..3 {
        let (head, body) = ask(connect(), GET);
        assert!(
            head.starts_with("HTTP/1.1 200 OK\r\n") && body.contains("sepal_up 1"),
            "{head}"
        );
    }
    // The first that was silent had to go, and was not told that its time is over.
    let mut told = Vec::new();
    let _: std::io::Result<usize> = (&held[1]).read_to_end(&mut told);
    assert_eq!(String::from_utf8(told).unwrap(), "");
    server.signal(Signal::TERM);
    server.wait().expect_code(0);
    world.end();
}

#[test]
fn a_unix_socket_is_there_as_long_as_its_server() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let path = world.folder().join("metrics");
    let at = format!("unix:{}", path.display());
    let server = world.start(&["metrics", "--listen", &at]);
    server.stderr.expect(&at);
    let (head, body) = ask(UnixStream::connect(&path).unwrap(), "GET /metrics HTTP/1.0\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 OK") && body.contains("sepal_up 1"),
        "{head}"
    );
    let second = world.guest(&["metrics", "--listen", &at]).expect_code(1);
    assert!(second.stderr.contains("listening on"), "{}", second.stderr);
    server.signal(Signal::INT);
    server.wait().expect_code(0);
    assert!(!path.exists());
    world.end();
}

#[test]
fn nobody_else_is_served() {
    let world = World::new();
    for address in ["0.0.0.0:9100", "[::]:9100", "192.0.2.1:9100"] {
        let refused = world.guest(&["metrics", "--listen", address]).expect_code(2);
        assert!(refused.stderr.contains("other machines"), "{}", refused.stderr);
    }
    world.end();
}
