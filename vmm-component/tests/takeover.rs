//! The real component in its jail, with a guest that goes on while its manager is replaced.

#![expect(clippy::unwrap_used, reason = "a test")]

#[path = "machine/guests.rs"]
#[allow(dead_code, reason = "shared with the tests of the machine")]
mod guests;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use capnp::capability::FromClientHook;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};
use sepal_runner::outer::{ComponentSpec, Program, Runner};
use sepal_runner::startup::{CONTROL, HandleKind, KVM};
use sepal_schema::error::read_completion;
use sepal_schema::guest_capnp::GuestStatus;
use sepal_schema::lifecycle_capnp::{component, guest_lifecycle};
use sepal_schema::report::{Reason, StopReport};
use sepal_schema::transport::{Connection, Handle, Limits, Reactor, connect};

use guests::guest;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many bytes the guest writes at a time.
const LINE: usize = 200;

guest!(
    /// For each byte of input writes 200 bytes, which count on; resets for a 'q'.
    counts_when_asked, "sepal_guest_asked", "sepal_guest_asked_end",
    [
        // Ready to receive.
        "mov $0x3fc, %edx", "mov $3, %al", "out %al, (%dx)", "xor %ebx, %ebx",
        "1: mov $0x3fd, %edx", "in (%dx), %al", "test $1, %al", "jz 1b",
        "mov $0x3f8, %edx", "in (%dx), %al", "cmp $'q', %al", "je 3f",
        "mov $200, %ecx", "2: mov %bl, %al", "out %al, (%dx)", "inc %bl", "dec %ecx", "jnz 2b", "jmp 1b",
        "3: mov $0xfe, %al", "out %al, $0x64", "4: hlt", "jmp 4b",
    ]
);

fn file(bytes: &[u8]) -> OwnedFd {
    let memory = rustix::fs::memfd_create(c"kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memory);
    file.write_all(bytes).unwrap();
    file.into()
}

fn send(door: &OwnedFd, fd: OwnedFd) {
    let rights = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&rights));
    sendmsg(door, &[IoSlice::new(b"m")], &mut control, SendFlags::empty()).unwrap();
}

/// What outlives a manager: the ways in, for whoever comes next.
struct Kept {
    serial: UnixStream,
    door: OwnedFd,
}

impl Kept {
    /// Waits for bytes, which have to count on from `from`.
    fn read(&mut self, from: usize, bytes: usize) {
        let mut read = vec![0; bytes];
        self.serial.read_exact(&mut read).unwrap();
        assert!(
            read.iter()
                .enumerate()
                .all(|(i, byte)| usize::from(*byte) == (from + i) % 256)
        );
    }
}

/// A guest is made and started, and asked for its first bytes.
async fn first_manager(handle: &Handle, socket: UnixStream) -> Kept {
    let (component, connection): (component::Client, Connection) = connect(handle, socket, Limits::default()).unwrap();
    let lifecycle = component.clone().cast_to::<guest_lifecycle::Client>();
    let fds = connection.fds();
    let (serial, theirs) = UnixStream::pair().unwrap();
    serial.set_read_timeout(Some(PATIENCE)).unwrap();
    let (door, successors) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let mut request = lifecycle.create_request();
    let mut config = request.get().init_config();
    config.set_memory_mib(16);
    let kernel = fds.send(file(&guests::elf(&counts_when_asked()))).unwrap();
    config.init_kernel().init_fd().set_number(kernel);
    let mut host = request.get().init_host();
    host.set_unassisted(Path::new("/sys/module/kvm_pvm").exists());
    host.set_durable(true);
    let number = fds.send(theirs.into()).unwrap();
    host.reborrow().init_serial().init_stream().set_number(number);
    let number = fds.send(successors).unwrap();
    host.init_successors().set_number(number);
    let created = request.send().promise.await.unwrap();
    read_completion(created.get().unwrap()).unwrap();
    let _run = lifecycle.run_request().send().promise;

    let mut kept = Kept { serial, door };
    kept.serial.write_all(b"x").unwrap();
    // Behind the others, which have gone out when it is answered: what follows stops this loop.
    component.layers_request().send().promise.await.unwrap();
    // Not all of it: the rest is the next manager's.
    kept.read(0, 150);
    kept
}

/// Finds the guest as it is, and stays with it until it ends.
async fn second_manager(handle: &Handle, kept: &mut Kept) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&kept.door, theirs.into());
    let (component, _connection): (component::Client, Connection) = connect(handle, ours, Limits::default()).unwrap();
    let answer = component.attach_request().send().promise.await.unwrap();
    let answer = answer.get().unwrap();
    assert!(!answer.has_error());
    assert_eq!(answer.get_status().unwrap(), GuestStatus::Running);
    assert!(answer.get_uptime_ns() > 0);
    let guest = answer.get_guest().unwrap();

    kept.read(150, 2 * LINE - 150);
    // Its figures are still counted.
    let statistics = guest.statistics_request().send().pipeline.get_statistics();
    assert!(statistics.get_request().send().promise.await.is_ok());

    let ended = component.ended_request().send().promise;
    kept.serial.write_all(b"q").unwrap();
    let ended = ended.await.unwrap();
    match ended.get().unwrap().which().unwrap() {
        guest_lifecycle::run_result::Which::Ended(report) => {
            assert_eq!(StopReport::read(report.unwrap()).unwrap().reason, Reason::Reset);
        }
        guest_lifecycle::run_result::Which::Error(error) => panic!("{:?}", error.unwrap().get_message()),
    }
    // Nothing came twice.
    assert_eq!(rustix::io::ioctl_fionread(&kept.serial).unwrap(), 0);
}

#[test]
fn a_guest_goes_on_while_its_manager_is_replaced() {
    let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") else {
        println!("skipped: no /dev/kvm");
        return;
    };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let program = Program::open(env!("CARGO_BIN_EXE_vmm-component")).unwrap();
    let mut spec = ComponentSpec::new(program, c"vmm-component".to_owned());
    spec.stderr = Some(std::io::stderr().as_fd().try_clone_to_owned().unwrap());
    spec.handles.add(CONTROL, HandleKind::Socket, theirs.into()).unwrap();
    spec.handles.add(KVM, HandleKind::Kvm, kvm.into()).unwrap();
    let mut runner = Runner::new().unwrap();
    let mut process = runner.spawn(spec).unwrap();

    let within = |manager: &mut dyn FnMut(&mut Reactor, &Handle)| {
        // Each has a loop of its own, which ends with all that it holds.
        let mut reactor = Reactor::new().unwrap();
        let handle = reactor.handle();
        manager(&mut reactor, &handle);
    };
    let (mut ours, mut kept) = (Some(ours), None);
    within(&mut |reactor, handle| {
        let first = first_manager(handle, ours.take().unwrap());
        kept = Some(reactor.run_until(handle.timeout(PATIENCE, first)).unwrap().unwrap());
    });
    let mut kept = kept.unwrap();
    // Asked for while nobody is there.
    kept.serial.write_all(b"x").unwrap();
    within(&mut |reactor, handle| {
        let second = second_manager(handle, &mut kept);
        reactor.run_until(handle.timeout(PATIENCE, second)).unwrap().unwrap();
    });
    // Nobody can come any more.
    drop(kept);
    assert!(process.wait().unwrap().success());
}
