//! Networks of the tests' own: each test's thread has a network namespace, which goes with it. Where that is not allowed, the tests say so.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{CapabilitySet, set_capabilities};

use super::interface::Interfaces;
use super::*;

/// Runs `test` on a thread of its own, so that the namespace goes with it, and while no other test here starts a process: until that process
/// has become another program, it holds the descriptors of all tests, and their taps stay.
fn alone(test: impl FnOnce() + Send) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(panic) = std::thread::scope(|scope| scope.spawn(test).join()) {
        std::panic::resume_unwind(panic);
    }
}

/// Puts this thread into a network namespace of its own.
fn namespace() -> bool {
    // SAFETY: only this thread's network namespace changes.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    let tun = std::path::Path::new("/dev/net/tun").exists();
    if !unshared || !tun {
        eprintln!("skipped: no privilege for a network namespace, or no /dev/net/tun");
    }
    unshared && tun
}

/// Makes a bridge that is up.
fn bridge(name: &str) {
    const SIOCBRADDBR: libc::Ioctl = 0x89a0;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let name_bytes = std::ffi::CString::new(name).unwrap();
    // SAFETY: the request takes a name.
    let made = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCBRADDBR, name_bytes.as_ptr()) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    Interfaces::new().unwrap().set_up(name).unwrap();
}

fn open_link(link: Link) -> Result<(Vec<OwnedFd>, Guard), Error> {
    let (network, guard) = open(3, Network::new(link))?;
    match network.link {
        Link::Tap(queues) => Ok((queues, guard)),
        Link::Socket(socket) => Ok((vec![socket], guard)),
        _ => panic!("no handles"),
    }
}

fn refused(link: Link) -> (Kind, String, String) {
    let error = open_link(link).err().unwrap();
    (error.kind, error.about, error.message)
}

/// Makes this thread lack CAP_NET_ADMIN.
fn lose_privilege() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::NET_ADMIN);
    set_capabilities(None, sets).unwrap();
}

fn wait_readable(fd: impl AsFd) {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
}

#[test]
fn a_tap_is_made_and_goes_with_its_descriptor() {
    alone(|| {
        if !namespace() {
            return;
        }
        let interfaces = Interfaces::new().unwrap();
        let (tap, guard) = open_link(Link::TapNamed("mine".into())).unwrap();
        assert!(guard.passt.is_none());
        assert!(interfaces.index("mine").is_some());
        drop(tap);
        assert!(interfaces.index("mine").is_none());

        let network = Network {
            queue_pairs: 3,
            mtu: 9000,
            ..Network::new(Link::TapNamed(String::new()))
        };
        let (network, _guard) = open(0, network).unwrap();
        let Link::Tap(queues) = network.link else {
            panic!("no tap");
        };
        assert_eq!(queues.len(), 3);
        assert!(interfaces.index("sepal0").is_some(), "the kernel chose a name");
        drop(queues);
        assert!(interfaces.index("sepal0").is_none());
    });
}

#[test]
fn what_could_be_made_is_told_and_not_made() {
    let refused = |link| {
        let error = check(3, &Network::new(link)).unwrap_err();
        (error.kind, error.about, error.message)
    };
    alone(|| {
        if !namespace() {
            return;
        }
        let missing = || Link::Bridge("br-test".into());
        assert_eq!(refused(missing()), self::refused(missing()));
        let wrong = || Link::TapNamed("a b".into());
        assert_eq!(refused(wrong()), self::refused(wrong()));
        bridge("br-test");
        for link in [missing(), Link::TapNamed("mine".into()), Link::TapNamed(String::new())] {
            check(3, &Network::new(link)).unwrap();
        }
        let interfaces = Interfaces::new().unwrap();
        assert_eq!(["mine", "sepal0"].map(|name| interfaces.index(name)), [None, None]);
    });
    passt::check("sh").unwrap();
    let error = passt::check("no-such-program").unwrap_err();
    assert_eq!(error.kind(), Kind::FailedServiceConnect);
}

#[test]
fn a_tap_that_is_there_is_adopted() {
    alone(|| {
        if !namespace() {
            return;
        }
        let (first, _guard) = open_link(Link::TapNamed("old".into())).unwrap();
        let busy = refused(Link::TapNamed("old".into()));
        assert_eq!((busy.0, &busy.1[..]), (Kind::AlreadyBound, "networks[3].tapNamed"));
        assert_eq!(busy.2, "networks[3].tapNamed: the tap old is in use");
        const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
        // SAFETY: the request takes a number.
        assert_eq!(unsafe { libc::ioctl(first[0].as_raw_fd(), TUNSETPERSIST, 1) }, 0);
        drop(first);
        let (adopted, _guard) = open_link(Link::TapNamed("old".into())).unwrap();
        drop(adopted);
        assert!(
            Interfaces::new().unwrap().index("old").is_some(),
            "it stays as its owner made it"
        );
        let several = Network {
            queue_pairs: 2,
            ..Network::new(Link::TapNamed("old".into()))
        };
        assert_eq!(open(0, several).err().unwrap().kind, Kind::BadConfig);
        assert_eq!(refused(Link::TapNamed("lo".into())).0, Kind::BadConfig, "lo is no tap");
    });
}

#[test]
fn taps_on_a_bridge_reach_each_other() {
    alone(|| {
        if !namespace() {
            return;
        }
        bridge("br-test");
        let (a, _guard_a) = open_link(Link::Bridge("br-test".into())).unwrap();
        let (b, _guard_b) = open_link(Link::Bridge("br-test".into())).unwrap();
        // A header of 10 bytes, then a frame of a kind of its own to everybody.
        let mut frame = vec![0; 10];
        frame.extend_from_slice(&[0xff; 6]);
        frame.extend_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
        frame.resize(10 + 60, 0x5a);
        let written = rustix::io::write(&a[0], &frame).unwrap();
        assert_eq!(written, frame.len());
        let mut got = [0; 2000];
        loop {
            wait_readable(&b[0]);
            let len = rustix::io::read(&b[0], &mut got).unwrap();
            // Others are the kernel's own.
            if got[10..len] == frame[10..] {
                break;
            }
        }
    });
}

#[test]
fn bridges_that_cannot_be_joined_are_named() {
    alone(|| {
        if !namespace() {
            return;
        }
        let missing = refused(Link::Bridge("br-none".into()));
        assert_eq!((missing.0, &missing.1[..]), (Kind::NotFound, "networks[3].bridge"));
        assert!(missing.2.contains("no network interface br-none"), "{}", missing.2);
        let other = refused(Link::Bridge("lo".into()));
        assert_eq!(other.0, Kind::BadConfig);
        assert!(
            other.2.contains("lo is a network interface, but no bridge"),
            "{}",
            other.2
        );
        assert!(
            Interfaces::new().unwrap().index("sepal0").is_none(),
            "nothing is left of the attempt"
        );
        assert_eq!(refused(Link::Bridge("a b".into())).0, Kind::BadConfig);
        assert_eq!(refused(Link::TapNamed("tap%d".into())).0, Kind::BadConfig);
    });
}

#[test]
fn the_privilege_that_is_lacking_is_named() {
    alone(|| {
        if !namespace() {
            return;
        }
        bridge("br-test");
        lose_privilege();
        for link in [Link::TapNamed("mine".into()), Link::Bridge("br-test".into())] {
            let (kind, _, message) = refused(link);
            assert_eq!(kind, Kind::PermissionDenied);
            assert!(
                message.contains("may not make a tap device: it lacks CAP_NET_ADMIN"),
                "{message}"
            );
        }
    });
}

#[test]
fn a_missing_passt_names_its_package() {
    alone(|| {
        let error = passt::start("/nonexistent/passt", 1500, None).err().unwrap();
        assert!(
            error.to_string().ends_with("does not have: install the package passt"),
            "{error}"
        );
        assert_eq!(error.kind(), Kind::FailedServiceConnect);
    });
}

#[test]
fn a_program_that_is_not_passt_does_not_pass_for_it() {
    alone(|| {
        let error = passt::start("/bin/false", 1500, None).err().unwrap();
        assert!(matches!(error, NetworkError::PasstFailed(_)), "{error}");
    });
}

/// A namespace in which passt works: with a default route, over a tap. `None`, and it says so, where that cannot be.
fn outside() -> Option<Vec<OwnedFd>> {
    if !namespace() {
        return None;
    }
    if std::process::Command::new(passt::PROGRAM)
        .arg("--version")
        .output()
        .is_err()
    {
        eprintln!("skipped: no passt");
        return None;
    }
    let tap = tap::named("outside", 1, 1500).unwrap();
    let interfaces = Interfaces::new().unwrap();
    interfaces.set_up("lo").unwrap();
    route("outside");
    Some(tap)
}

/// Gives an interface the address 192.0.2.2/24 and the default route by 192.0.2.1.
fn route(name: &str) {
    let address = |ip: [u8; 4]| {
        let mut data = [0; 14];
        for (place, byte) in data[2..].iter_mut().zip(ip) {
            *place = byte.cast_signed();
        }
        libc::sockaddr {
            sa_family: libc::AF_INET as u16,
            sa_data: data,
        }
    };
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut request = interface::request(name);
    for (what, ip) in [
        (libc::SIOCSIFADDR, [192, 0, 2, 2]),
        (libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
    ] {
        request.ifr_ifru.ifru_addr = address(ip);
        // SAFETY: both requests read a `struct ifreq`.
        assert_eq!(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) }, 0);
    }
    // SAFETY: zeroes are a route to everywhere, by nothing yet.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address([0; 4]);
    route.rt_genmask = address([0; 4]);
    route.rt_gateway = address([192, 0, 2, 1]);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the request reads a `struct rtentry`.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw mut route) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

#[test]
fn passt_serves_and_ends_with_its_guard() {
    alone(|| {
        let Some(_tap) = outside() else {
            return;
        };
        let (sockets, mut guard) = open_link(Link::User).unwrap();
        let ended = guard.passt.as_mut().unwrap().child.try_wait().unwrap();
        assert_eq!(ended, None, "it runs");
        drop(guard);
        let mut socket = UnixStream::from(sockets.into_iter().next().unwrap());
        let mut rest = Vec::new();
        // Perhaps a frame, then the end.
        socket.read_to_end(&mut rest).unwrap();
    });
}

#[test]
fn passt_ends_with_the_guests_end_of_its_socket() {
    alone(|| {
        let Some(_tap) = outside() else {
            return;
        };
        let (socket, mut guard) = open_link(Link::User).unwrap();
        drop(socket);
        let ended = guard.passt.as_mut().unwrap().child.wait().unwrap();
        assert!(ended.success(), "{ended}");
    });
}

#[test]
fn what_passt_says_is_told() {
    alone(|| {
        // A namespace without any way out.
        if !namespace() {
            return;
        }
        let (kind, about, message) = refused(Link::User);
        assert_eq!((kind, &about[..]), (Kind::FailedServiceConnect, "networks[3].user"));
        let told = message.contains("External interface not usable") || message.contains("install the package passt");
        assert!(told, "{message}");
    });
}
