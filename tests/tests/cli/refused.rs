//! What is refused, and that the message says why and what to do.

use std::{fs, path::Path};

use rustix::fs::{CWD, FileType, Mode};
use sepal_tests::{Finished, World, kvm_missing, program, programs::PROGRAMS};

/// Launches something that has to be refused with exit status 1.
#[track_caller]
fn refused(world: &World, arguments: &[&str]) -> Finished {
    let all: Vec<&str> = ["launch"].iter().chain(arguments).copied().collect();
    let finished = world.guest(&all).expect_code(1);
    assert_eq!(finished.out(), "", "standard output is the guest's");
    finished
}

/// Checks that a message has all of these words.
#[track_caller]
fn says(finished: &Finished, words: &[&str]) {
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "{word:?} is not in {}: {}",
            finished.command,
            finished.stderr
        );
    }
}

#[test]
fn kernels_that_are_none() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let path = world.folder().join("kernel");
    let name = path.to_str().unwrap();
    let mut elf = vec![0; 4096];
    elf[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
    for (content, why) in [
        (&b"no kernel"[..], "neither an x86-64 ELF file nor a bzImage"),
        (b"", "empty file"),
        (&elf, "e_machine is 0xb7"),
    ] {
        fs::write(&path, content).unwrap();
        let finished = refused(&world, &["--kernel", name]);
        says(&finished, &["KERNEL_LOAD_FAILURE", why]);
    }
    let finished = refused(&world, &["--kernel", "/nonexistent/vmlinux"]);
    says(&finished, &["opening the kernel /nonexistent/vmlinux", "No such file"]);
    // Nobody waits for the other end of a pipe.
    let pipe = world.folder().join("pipe");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let finished = refused(&world, &["--kernel", pipe.to_str().unwrap()]);
    says(&finished, &["BAD_CONFIG", "kernel", "pipe"]);
    // A device or a pipe is no file that a guest can be made of.
    let finished = refused(&world, &["--kernel", "/dev/zero"]);
    says(&finished, &["BAD_CONFIG", "kernel", "character device"]);
    world.end();
}

#[test]
fn an_initrd_that_does_not_fit() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let (kernel, path) = (world.folder().join("kernel"), world.folder().join("initrd"));
    fs::write(&kernel, sepal_driver_guest::IMAGE).unwrap();
    fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let (kernel, initrd) = (kernel.to_str().unwrap(), path.to_str().unwrap());
    let finished = refused(&world, &["--kernel", kernel, "--initrd", initrd, "--memory", "32M"]);
    says(&finished, &["BAD_CONFIG", "initramfs", "67108864 bytes do not fit"]);
    // Nobody would read it.
    let finished = world.guest(&["launch", "--initrd", initrd]).expect_code(2);
    says(&finished, &["--kernel"]);
    world.end();
}

#[test]
fn more_memory_than_the_host_has() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let finished = refused(&world, &["--memory", "900000G"]);
    says(&finished, &["GUEST_INITIALIZATION_FAILURE", "MiB"]);
    world.end();
}

#[test]
fn a_command_line_that_is_too_long() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let long = "x".repeat(1500);
    let finished = refused(&world, &["--cmdline", &long, "--cmdline-add", &long]);
    says(&finished, &["BAD_CONFIG", "2047"]);
    world.end();
}

#[test]
fn names() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let long = "n".repeat(65);
    for name in ["-x", "two words", "a/b", "..", "ü", &long] {
        let finished = refused(&world, &["--", name]);
        says(&finished, &["BAD_CONFIG", "name"]);
    }
    // The name is free again after a failure, and taken while a guest has it.
    world.guest(&["launch", "bee", "--detach"]).expect_code(0);
    let finished = refused(&world, &["bee"]);
    says(&finished, &["ALREADY_RUNNING", "bee", "hint:"]);
    for command in ["info", "attach", "stop", "wait", "logs"] {
        let finished = world.guest(&[command, "wasp"]).expect_code(1);
        says(&finished, &["NOT_FOUND", "wasp", "guest list"]);
    }
    world.end();
}

#[test]
fn layers_and_limits() {
    if kvm_missing() {
        return;
    }
    let world = World::with_manager();
    let finished = refused(&world, &["--waive-layer", "chastity"]);
    says(&finished, &["BAD_CONFIG", "chastity"]);
    let finished = refused(&world, &["--limit-cpu", "4000000000"]);
    says(&finished, &["limit"]);
    let finished = refused(&world, &["--limit-memory", "1"]);
    says(&finished, &["BAD_CONFIG", "limits.memoryMib is 1;", "needs 4 at least"]);
    let finished = refused(&world, &["--limit-tasks", "1", "--cpus", "2", "--console"]);
    says(&finished, &["BAD_CONFIG", "limits.tasks is 1;", "needs 8 at least"]);
    // What is named does it, unless the host cannot enforce it.
    for limit in [["--limit-memory", "4"], ["--limit-tasks", "6"]] {
        let arguments = [&["launch", "--cmdline", "quiet run=shutdown"][..], &limit].concat();
        let finished = world.guest(&arguments);
        let enforced = !finished.stderr.contains("cannot be enforced");
        finished.expect_code(if enforced { 0 } else { 1 });
    }
    world.end();
}

#[test]
fn without_a_manager_nothing_answers() {
    let world = World::new();
    for arguments in [
        &["list"][..],
        &["info", "bee"],
        &["attach", "bee"],
        &["stop", "bee"],
        &["wait", "bee"],
        &["logs", "bee"],
    ] {
        let finished = world.guest(arguments).expect_code(1);
        says(
            &finished,
            &[
                "no guest manager runs",
                world.socket().to_str().unwrap(),
                "guest launch --detach",
            ],
        );
    }
    let version = world.guest(&["version"]).expect_code(0);
    assert!(version.out().contains("not running"), "{}", version.out());
    // Nor is one started where an address is given, which may be mistyped.
    let (address, mistyped) = ("--manager=sock", world.folder().join("sock"));
    for detach in [&["--detach"][..], &[]] {
        let mut command = world.command(&[&[address, "launch", "bee"], detach].concat());
        command.current_dir(world.folder());
        let mut guest = world.start_command(command, None);
        guest.close_input();
        let finished = guest.wait().expect_code(1);
        says(
            &finished,
            &["no guest manager runs", "nobody listens at sock", "no address is given"],
        );
        assert!(!mistyped.exists());
    }
    world.end();
}

#[test]
fn a_program_that_is_missing_is_named() {
    let world = World::new();
    let folder = world.folder().join("bin");
    fs::create_dir(&folder).unwrap();
    // By and by what belongs together: the message names what is still missing.
    for present in 1..PROGRAMS.len() {
        copy(PROGRAMS[present - 1], &folder);
        let mut command = std::process::Command::new(folder.join("guest"));
        command.arg("launch").env("XDG_RUNTIME_DIR", world.folder());
        command.env("XDG_STATE_HOME", world.state_home());
        let mut guest = world.start_command(command, None);
        guest.close_input();
        let finished = guest.wait().expect_code(1);
        says(
            &finished,
            &[PROGRAMS[present], if present == 1 { "missing" } else { "No such file" }],
        );
        assert_eq!(
            present > 1,
            finished.stderr.contains("the guest manager ended"),
            "{}",
            finished.stderr
        );
    }
    world.end();
}

fn copy(name: &str, folder: &Path) {
    fs::copy(program(name), folder.join(name)).unwrap();
}
