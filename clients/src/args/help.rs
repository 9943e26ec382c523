//! What `guest --help` says: the commands in groups, examples, exit statuses.

use clap::{Arg, ArgAction, Command};

/// The groups of commands, each with what belongs to it.
const GROUPS: [(&str, &[&str]); 8] = [
    ("Guests", &["launch", "list", "info", "wait", "remove"]),
    (
        "Definitions",
        &["define", "undefine", "start", "autostart", "definition"],
    ),
    ("Power", &["stop", "pause", "resume", "reset", "nmi"]),
    ("Talk to a guest", &["attach", "console", "logs", "vsock", "exec", "cp"]),
    (
        "Look into a guest",
        &["events", "stats", "top", "metrics", "cpu", "registers", "stack", "peek"],
    ),
    ("Devices", &["pin", "balloon", "mem", "disk", "net"]),
    ("Host", &["doctor", "pressure"]),
    ("Share", &["share", "shares", "revoke", "redeem", "whoami"]),
];
/// Whatever is in no other group.
const REST: &str = "This program";

const EXAMPLES: &str = "\
Examples:
  guest launch                            the guest that is built in
  guest launch web --kernel vmlinuz --disk root.img --net user --detach
  guest attach web                        its terminal; Ctrl-] leaves
  guest stop web --timeout 10s --force    asks first, then insists
  guest share web serial --only output    a token for looking on
  guest --manager ssh://host list         the guests of another machine

`guest help COMMAND` says more about each; `guest --help` lists exit statuses.";

const EXIT_STATUS: &str = "\
Exit status:
  0  it worked; launch, attach, console and wait: the guest shut down (or was
     detached from)
  1  the command failed, and the message says why
  2  the command line is wrong
124  the time given was over first
exec: the program's own, 128 and its number for a signal

Exit status of launch, attach, console and wait, besides:
 10  the guest reset itself
 11  the guest crashed
 12  the guest was stopped by force
 13  the guest could not be started (launch itself: 1)
 14  the guest did not shut down when it was asked to, and was stopped by force
 15  the guest's component died
 16  the guest ended in a way that this version does not know";

/// Adds to the command line what its help says besides the options.
pub(super) fn add(command: Command) -> Command {
    let commands = list(&command);
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{commands}\nOptions:\n{{options}}{{after-help}}"
    );
    negatives(command)
        .help_template(template)
        .after_help(EXAMPLES)
        .after_long_help(format!("{EXAMPLES}\n\n{EXIT_STATUS}"))
}

/// Takes what begins like a negative number for the value that it is meant as, so that what is said of it is what the value can be.
fn negatives(command: Command) -> Command {
    let value = |arg: Arg| match arg.get_action() {
        ArgAction::Set | ArgAction::Append => arg.allow_negative_numbers(true),
        _ => arg,
    };
    command.mut_args(value).mut_subcommands(negatives)
}

/// The commands with what each is for, in groups.
fn list(command: &Command) -> String {
    let all = || command.get_subcommands().filter(|command| !command.is_hide_set());
    let width = all().map(|command| command.get_name().len()).max().unwrap_or(0);
    let line = |command: &Command| {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        format!("  {:width$}  {about}\n", command.get_name())
    };
    let mut text = String::new();
    for (heading, names) in GROUPS {
        text.push_str(&format!("{heading}:\n"));
        let lines = names.iter().filter_map(|name| command.find_subcommand(name)).map(line);
        text.extend(lines.chain(["\n".to_owned()]));
    }
    let grouped = |command: &&Command| !GROUPS.iter().any(|(_, names)| names.contains(&command.get_name()));
    text.push_str(&format!("{REST}:\n"));
    text.extend(all().filter(grouped).map(line));
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn every_command_is_in_one_group_and_every_group_has_commands_that_there_are() {
        let command = Cli::command();
        for (_, names) in GROUPS {
            for name in names {
                assert!(command.find_subcommand(name).is_some(), "{name}");
            }
        }
        let text = list(&command);
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            let beginning = format!("  {} ", command.get_name());
            let lines = text.lines().filter(|line| line.starts_with(&beginning)).count();
            assert_eq!(lines, 1, "{}", command.get_name());
        }
        let all = [&text, EXAMPLES, EXIT_STATUS].join("\n");
        let long: Vec<_> = all.lines().filter(|line| line.chars().count() > 80).collect();
        assert_eq!(long, Vec::<&str>::new());
    }
}
