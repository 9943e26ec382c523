//! What the command says about itself.

use std::process::Command;

use sepal_tests::World;

const COMMANDS: [&str; 44] = [
    "launch",
    "list",
    "info",
    "wait",
    "remove",
    "define",
    "undefine",
    "start",
    "autostart",
    "definition",
    "stop",
    "pause",
    "resume",
    "reset",
    "nmi",
    "attach",
    "console",
    "logs",
    "vsock",
    "exec",
    "cp",
    "events",
    "stats",
    "top",
    "metrics",
    "registers",
    "cpu",
    "pin",
    "peek",
    "stack",
    "doctor",
    "pressure",
    "balloon",
    "mem",
    "disk",
    "net",
    "share",
    "shares",
    "revoke",
    "redeem",
    "whoami",
    "end-manager",
    "version",
    "completions",
];

#[test]
fn help_names_every_command_and_exit_status_and_fits() {
    let world = World::new();
    let help = world.guest(&["--help"]).expect_code(0).out();
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command} in {help}");
    }
    for status in [" 0 ", " 1 ", " 2 ", "10 ", "11 ", "12 ", "13 ", "14 ", "15 ", "124 "] {
        assert!(help.contains(status), "{status} in {help}");
    }
    // In groups, with examples; the short help leaves out what is looked up rarely.
    for words in ["\nGuests:\n", "\nShare:\n", "\nExamples:\n"] {
        assert!(help.contains(words), "{words:?} in {help}");
    }
    assert!(!world.guest(&["-h"]).expect_code(0).out().contains("Exit status:"));
    // Where there is no terminal, and on one of 80 columns.
    let fits = |text: &str, columns: usize| {
        let long: Vec<&str> = text
            .lines()
            .filter(|line| line.trim_end().chars().count() > columns)
            .collect();
        assert!(long.is_empty(), "more than {columns} columns: {long:#?}");
    };
    fits(&help, 100);
    for command in COMMANDS {
        fits(&world.guest(&[command, "--help"]).expect_code(0).out(), 100);
        let mut terminal = world.pty(&[command, "--help"]);
        assert_eq!(terminal.wait().code(), Some(0));
        terminal.expect("Print help");
        fits(&plain(&terminal.screen.text()), 80);
    }
}

/// A text without the sequences that make it bold or underlined.
fn plain(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| {
        text + piece.split_once('m').map_or(piece, |(_, rest)| rest)
    })
}

#[test]
fn a_wrong_command_line_is_2() {
    let world = World::new();
    for arguments in [
        &["lunch"][..],
        &["launch", "--cpus", "65"],
        &["launch", "--cpus", "0"],
        &["launch", "--memory", "0"],
        &["launch", "--memory", "lots"],
        &["stop"],
        &["stop", "bee", "--timeout", "-1"],
        &[],
    ] {
        let finished = world.guest(arguments).expect_code(2);
        assert!(
            finished.stderr.contains("Usage") || finished.stderr.contains("--help"),
            "{}",
            finished.stderr
        );
        assert_eq!(finished.out(), "");
    }
}

#[test]
fn completions_are_scripts_of_their_shells() {
    let world = World::new();
    for (shell, check) in [("bash", &["-n"][..]), ("zsh", &["-n"]), ("fish", &["--no-execute"])] {
        let script = world.guest(&["completions", shell]).expect_code(0).out();
        for word in ["launch", "attach", "cmdline-add", "waive-layer", "timeout"] {
            assert!(script.contains(word), "{word} in {shell}'s script");
        }
        // Only bash is on every host.
        if shell != "bash" && !is_there(shell) {
            println!("{shell} is not here to check its script");
            continue;
        }
        let mut command = Command::new(shell);
        command.args(check);
        let mut checking = world.start_command(command, None);
        checking.type_in(&script);
        checking.close_input();
        checking.wait().expect_code(0);
    }
    let script = world.guest(&["completions", "bash"]).expect_code(0).out();
    let mut bash = world.start_command(Command::new("bash"), None);
    bash.type_in(&format!("{script}\ncomplete -p guest\n"));
    bash.close_input();
    assert!(bash.wait().expect_code(0).out().contains("complete"));
}

/// Whether there is a program of this name.
fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}
