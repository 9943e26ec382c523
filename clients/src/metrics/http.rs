//! As much of HTTP/1.1 (RFC 9112) as a scraper needs: one GET or HEAD a connection. Pure; what comes from the network is bounded and checked here.

use super::text::CONTENT_TYPE;

/// The longest head of a request, in bytes.
pub(super) const MOST: usize = 8 * 1024;
/// The most header fields of a request.
const MOST_FIELDS: usize = 64;
/// The only thing that there is.
const PATH: &str = "/metrics";

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The metrics.
    Metrics,
    /// Something that is refused.
    Refused(Refusal),
}

/// Why there is no answer but this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    Malformed,
    ForeignHost,
    NotFound,
    NotAllowed,
    TooLong,
    TooLate,
    Unavailable,
}

impl Refusal {
    /// Status, reason, and a sentence for a person.
    fn words(self) -> (u16, &'static str, &'static str) {
        match self {
            Self::Malformed => (400, "Bad Request", "This is no request of HTTP/1.1."),
            Self::ForeignHost => (
                403,
                "Forbidden",
                "This is for programs on this machine, which call it localhost, 127.0.0.1 or [::1].",
            ),
            Self::NotFound => (404, "Not Found", "The metrics are at /metrics."),
            Self::NotAllowed => (405, "Method Not Allowed", "Only GET and HEAD are possible."),
            Self::TooLate => (408, "Request Timeout", "The request was not complete in time."),
            Self::TooLong => (431, "Request Header Fields Too Large", "The request is too long."),
            Self::Unavailable => (503, "Service Unavailable", "The guest manager does not answer in time."),
        }
    }
}

/// Whether an answer to these bytes, complete or not, has a head alone (RFC 9110, section 9.3.2).
pub(super) fn is_head(bytes: &[u8]) -> bool {
    bytes.starts_with(b"HEAD ")
}

/// What these bytes ask for; none as long as the request is not complete. `on_port`: they came by TCP, where a browser may send what any page wants; by
/// the host that it names, one that was led here by a name which means another address is told.
pub(super) fn read(bytes: &[u8], on_port: bool) -> Option<Request> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => Some(decide(&request, on_port).unwrap_or_else(Request::Refused)),
        Ok(httparse::Status::Partial) if bytes.len() < MOST => None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Some(Request::Refused(Refusal::TooLong))
        }
        Err(_) => Some(Request::Refused(Refusal::Malformed)),
    }
}

fn decide(request: &httparse::Request<'_, '_>, on_port: bool) -> Result<Request, Refusal> {
    let mut hosts = request
        .headers
        .iter()
        .filter(|field| field.name.eq_ignore_ascii_case("host"));
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if !on_port || is_local(host.value) => {}
        (Some(_), None) => return Err(Refusal::ForeignHost),
        // HTTP/1.0 knows no hosts, and browsers not HTTP/1.0.
        (None, _) if request.version == Some(0) => {}
        _ => return Err(Refusal::Malformed),
    }
    if !matches!(request.method, Some("GET" | "HEAD")) {
        return Err(Refusal::NotAllowed);
    }
    let path = request.path.unwrap_or_default();
    match path.split_once('?').map_or(path, |(path, _)| path) {
        PATH => Ok(Request::Metrics),
        _ => Err(Refusal::NotFound),
    }
}

/// Whether a Host field names this machine.
fn is_local(host: &[u8]) -> bool {
    let Ok(host) = str::from_utf8(host) else { return false };
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    if without_port.eq_ignore_ascii_case("localhost") {
        return true;
    }
    let address = without_port
        .strip_prefix('[')
        .and_then(|address| address.strip_suffix(']'))
        .unwrap_or(without_port);
    address
        .parse()
        .is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

/// The answer with the metrics; without their text if `head`, as all of them.
pub(super) fn metrics(text: &str, head: bool) -> Vec<u8> {
    answer((200, "OK"), CONTENT_TYPE, text, head)
}

/// The answer that there is none.
pub(super) fn refusal(refusal: Refusal, head: bool) -> Vec<u8> {
    let (status, reason, words) = refusal.words();
    answer(
        (status, reason),
        "text/plain; charset=utf-8",
        &format!("{words}\n"),
        head,
    )
}

fn answer((status, reason): (u16, &str), content_type: &str, text: &str, head: bool) -> Vec<u8> {
    let allow = if status == 405 { "Allow: GET, HEAD\r\n" } else { "" };
    let head_of = format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{allow}\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        text.len()
    );
    let body = if head { "" } else { text };
    [head_of.as_bytes(), body.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ask(text: &str) -> Option<Request> {
        read(text.as_bytes(), true)
    }

    #[test]
    fn scrapers_get_the_metrics() {
        let metrics = Some(Request::Metrics);
        for host in [
            "localhost",
            "LocalHost:9100",
            "127.0.0.1",
            "127.0.0.1:9100",
            "[::1]:9100",
            "[::1]",
        ] {
            let request = format!("GET /metrics HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\n\r\n");
            assert_eq!(ask(&request), metrics, "{host}");
            for cut in 0..request.len() {
                assert_eq!(ask(&request[..cut]), None, "{cut}");
            }
        }
        let head = "HEAD /metrics?x=1 HTTP/1.1\r\nhost: localhost\r\n\r\n";
        assert_eq!((ask(head), is_head(head.as_bytes())), (metrics, true));
        let get = "GET /metrics HTTP/1.0\r\n\r\n";
        assert_eq!((ask(get), is_head(get.as_bytes())), (metrics, false));
        let by_name = b"GET /metrics HTTP/1.1\r\nHost: sepal\r\n\r\n";
        assert_eq!(read(by_name, false), metrics, "on a Unix socket any name will do");
    }

    #[test]
    fn all_else_is_refused() {
        let local = "Host: localhost\r\n\r\n";
        for (request, refusal) in [
            (format!("GET / HTTP/1.1\r\n{local}"), Refusal::NotFound),
            (format!("GET /metricsx HTTP/1.1\r\n{local}"), Refusal::NotFound),
            (format!("POST /metrics HTTP/1.1\r\n{local}"), Refusal::NotAllowed),
            (
                format!("GET /metrics HTTP/1.1\r\nHost: a\r\n{local}"),
                Refusal::Malformed,
            ),
            ("GET /metrics HTTP/1.1\r\n\r\n".into(), Refusal::Malformed),
            (
                "GET /metrics HTTP/1.1\r\nHost: evil.example:9100\r\n\r\n".into(),
                Refusal::ForeignHost,
            ),
            (
                "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n".into(),
                Refusal::ForeignHost,
            ),
            (
                "GET /metrics HTTP/1.1\r\nHost: 192.168.1.1\r\n\r\n".into(),
                Refusal::ForeignHost,
            ),
            ("\x16\x03\x01\x02 hello\r\n\r\n".into(), Refusal::Malformed),
            (
                format!("GET /metrics HTTP/1.1\r\n{}", "a: b\r\n".repeat(65)),
                Refusal::TooLong,
            ),
            (format!("GET /{}", "x".repeat(MOST)), Refusal::TooLong),
        ] {
            assert_eq!(ask(&request), Some(Request::Refused(refusal)), "{request}");
        }
    }

    #[test]
    fn answers_say_how_long_they_are() {
        let text = String::from_utf8(metrics("# EOF\n", false)).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0"));
        assert!(
            text.contains("\r\nContent-Length: 6\r\n") && text.ends_with("\r\n\r\n# EOF\n"),
            "{text}"
        );
        let head = String::from_utf8(metrics("# EOF\n", true)).unwrap();
        assert!(
            head.contains("\r\nContent-Length: 6\r\n") && head.ends_with("\r\n\r\n"),
            "{head}"
        );
        let refused = String::from_utf8(refusal(Refusal::NotFound, true)).unwrap();
        assert!(
            refused.starts_with("HTTP/1.1 404 ") && refused.contains("\r\nContent-Length: 29\r\n"),
            "{refused}"
        );
        assert!(refused.ends_with("\r\n\r\n"), "{refused}");
        let refused = String::from_utf8(refusal(Refusal::NotAllowed, false)).unwrap();
        assert!(
            refused.starts_with("HTTP/1.1 405 Method Not Allowed\r\n") && refused.contains("\r\nAllow: GET, HEAD\r\n")
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_once_there_are_enough(bytes in prop::collection::vec(any::<u8>(), 0..=MOST)) {
            let answer = read(&bytes, true);
            prop_assert!(answer.is_some() || bytes.len() < MOST);
        }
    }
}
