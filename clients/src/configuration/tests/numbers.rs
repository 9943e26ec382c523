//! Numbers that a field cannot have: which field, what it can have, and where that stands.

use super::refused;

#[test]
fn what_a_field_can_have_is_told_with_its_place() {
    let huge = format!("cpus = -{}", "9".repeat(50));
    let size = "'memory' is one of 1 to 2147483647 MiB";
    for (text, words) in [
        (
            "cpus = 65",
            "web.toml:1:8: 'cpus' is one of 1 to 64\n  |\n1 | cpus = 65\n  |        ^^",
        ),
        ("cpus = 0", "'cpus' is one of 1 to 64"),
        ("cpus = -1", "'cpus' is one of 1 to 64"),
        ("cpus = 99999999999999999999", "'cpus' is one of 1 to 64"),
        (&huge, "'cpus' is one of 1 to 64"),
        ("memory = 0", &format!("{size}, and this is 0")),
        ("memory = -1", &format!("{size}, and this is -1")),
        ("memory = \"9999T\"", size),
        ("[[net]]\nmtu = 10", "'mtu' is one of 68 to 65520"),
        (
            "[[disk]]\nfile = \"a\"\nbps = -1",
            "'bps' is one of 0 to 18446744073709551615",
        ),
        (
            "[[vhost-user]]\ntype = -1\nsocket = \"/x\"",
            "'type' is one of 0 to 65535",
        ),
        ("[[pin]]\nvcpu = -1\ncpus = \"0\"", "'vcpu' is one of 0 to 63"),
    ] {
        let error = refused(text);
        assert!(
            error.starts_with("web.toml:") && error.contains(words),
            "{text}: {error}"
        );
    }
}

#[test]
fn one_of_a_list_is_told_at_its_place_in_the_list() {
    let error = refused("[[pin]]\nvcpu = 0\ncpus = [0, -1]");
    let shown = "web.toml:3:12: 'cpus' is one of 0 to 65535\n  |\n3 | cpus = [0, -1]\n  |            ^^";
    assert!(error.contains(shown), "{error}");
    let error = refused("[[pin]]\nvcpu = 0\ncpus = [70000]");
    assert!(error.contains("web.toml:3:9: 'cpus' is one of 0 to 65535"), "{error}");
}

#[test]
fn times_are_told_with_their_bounds() {
    for (value, told) in [
        ("0", "0 s"),
        ("-1", "-1 s"),
        ("-0.5", "-0.5 s"),
        ("5000000", "5000000 s"),
    ] {
        let error = refused(&format!("[restart]\npolicy = \"always\"\ndelay = {value}"));
        let words = format!("web.toml:3:9: 'delay' is a time of 1ms to 49d, and this is {told}\n");
        assert!(error.contains(&words), "{error}");
    }
}
