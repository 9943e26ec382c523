//! A network of the test's own: a namespace that goes with the test's thread, a tap in it, and the kernel's side of that tap.

use std::fs::OpenOptions;
use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

/// The kernel's address on the tap.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// The guest's.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The kernel's end of the tap has this address.
pub(super) const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];
/// The tap's name.
pub(super) const NAME: &str = "tap0";

/// Runs `test` on a thread of its own, so that the namespace goes with it.
pub(super) fn alone(test: impl FnOnce() + Send) {
    if let Err(panic) = std::thread::scope(|scope| scope.spawn(test).join()) {
        std::panic::resume_unwind(panic);
    }
}

/// Puts the calling thread into a network namespace of its own, with a tap that is up, has [`HOST`], and knows [`GUEST`]. `None`, and it says so,
/// where the test may not do that.
pub(super) fn tap(queues: usize) -> Option<Vec<OwnedFd>> {
    // SAFETY: only this thread's network namespace changes, and it has no sockets yet.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("skipped: no privilege for a network namespace, or no /dev/net/tun");
        return None;
    }
    // No frames that nobody asked for.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let flags = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let open = || {
        let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        let mut request = request();
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as i16;
        control(&tun, 0x4004_54ca, &mut request);
        OwnedFd::from(tun)
    };
    let taps = (0..queues).map(|_| open()).collect();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut address = request();
    let mut hardware = [0; 14];
    for (place, byte) in hardware.iter_mut().zip(HOST_MAC) {
        *place = byte.cast_signed();
    }
    address.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: hardware,
    };
    control(&socket, libc::SIOCSIFHWADDR, &mut address);
    for (what, ip) in [
        (libc::SIOCSIFADDR, HOST),
        (libc::SIOCSIFNETMASK, Ipv4Addr::new(255, 255, 255, 0)),
    ] {
        let mut address = request();
        address.ifr_ifru.ifru_addr = socket_address(ip);
        control(&socket, what, &mut address);
    }
    set_up(true);
    // SAFETY: zeroes are a request about nothing.
    let mut neighbour: libc::arpreq = unsafe { zeroed() };
    neighbour.arp_pa = socket_address(GUEST);
    neighbour.arp_ha.sa_family = libc::ARPHRD_ETHER;
    for (place, byte) in neighbour.arp_ha.sa_data.iter_mut().zip(super::MAC) {
        *place = byte.cast_signed();
    }
    neighbour.arp_flags = libc::ATF_PERM | libc::ATF_COM;
    copy_name(&mut neighbour.arp_dev);
    control(&socket, libc::SIOCSARP, &mut neighbour);
    Some(taps)
}

/// Brings the kernel's end up or down.
pub(super) fn set_up(up: bool) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut flags = request();
    flags.ifr_ifru.ifru_flags = if up { libc::IFF_UP as i16 } else { 0 };
    control(&socket, libc::SIOCSIFFLAGS, &mut flags);
}

/// Deletes the tap, as `ip link delete` does.
pub(super) fn delete() {
    // struct nlmsghdr, struct ifinfomsg, and the attribute IFLA_IFNAME.
    let mut message = Vec::new();
    message.extend_from_slice(&(16u32 + 16 + 12).to_ne_bytes());
    message.extend_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
    message.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.resize(32, 0);
    message.extend_from_slice(&(4 + NAME.len() as u16 + 1).to_ne_bytes());
    message.extend_from_slice(&libc::IFLA_IFNAME.to_ne_bytes());
    message.extend_from_slice(NAME.as_bytes());
    message.resize(44, 0);
    let kind = rustix::net::SocketType::RAW;
    let socket = rustix::net::socket(rustix::net::AddressFamily::NETLINK, kind, None).unwrap();
    rustix::net::send(&socket, &message, rustix::net::SendFlags::empty()).unwrap();
    let mut answer = [0; 64];
    let (_, len) = rustix::net::recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty()).unwrap();
    assert!(len >= 20 && answer[16..20] == [0; 4], "{:?}", &answer[..len]);
}

fn request() -> libc::ifreq {
    // SAFETY: zeroes are a request about nothing.
    let mut request: libc::ifreq = unsafe { zeroed() };
    copy_name(&mut request.ifr_name);
    request
}

fn copy_name(to: &mut [libc::c_char]) {
    for (place, byte) in to.iter_mut().zip(NAME.bytes()) {
        *place = byte.cast_signed();
    }
}

fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (place, byte) in data[2..].iter_mut().zip(ip.octets()) {
        *place = byte.cast_signed();
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: data,
    }
}

fn control<T>(fd: &impl AsRawFd, what: libc::Ioctl, request: &mut T) {
    // SAFETY: each caller passes the structure that the request takes.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), what, request) };
    assert!(done == 0, "ioctl {what:#x}: {}", io::Error::last_os_error());
}

/// A UDP packet over IPv4 in an Ethernet frame, from the guest to the kernel.
pub(super) fn udp_frame(ports: [u16; 2], payload: &[u8], checksum: u16) -> Vec<u8> {
    let mut frame = [&HOST_MAC[..], &super::MAC, &[8, 0]].concat();
    let len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend_from_slice(&(20 + len).to_be_bytes());
    ip.extend_from_slice(&[0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend_from_slice(&GUEST.octets());
    ip.extend_from_slice(&HOST.octets());
    let sum = !folded(sum(&ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&ip);
    for field in [ports[0], ports[1], len, checksum] {
        frame.extend_from_slice(&field.to_be_bytes());
    }
    frame.extend_from_slice(payload);
    frame
}

/// Whether a frame is such a packet, of either side.
pub(super) fn is_udp(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0] && frame[23] == 17
}

/// Has the kernel send what `socket` is given in UDP packets of `size` bytes, or leave that to the tap. 0: as one packet.
pub(super) fn set_segments(socket: &UdpSocket, size: i32) {
    const UDP_SEGMENT: i32 = 103;
    let (at, len) = ((&raw const size).cast(), size_of_val(&size) as libc::socklen_t);
    // SAFETY: the option takes an int.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, UDP_SEGMENT, at, len) };
    assert_eq!(done, 0);
}

/// The checksum of the pseudo header in front of a UDP packet with `payload` bytes: what a checksum that the host completes begins with.
pub(super) fn partial_checksum(from: Ipv4Addr, to: Ipv4Addr, payload: usize) -> u16 {
    let rest = sum(&from.octets()) + sum(&to.octets()) + 17 + 8 + payload as u32;
    folded(rest)
}

/// Whether the checksum of the UDP packet in a frame is right.
pub(super) fn checksum_is_right(frame: &[u8]) -> bool {
    let packet = &frame[34..];
    let pseudo = sum(&frame[26..34]) + 17 + packet.len() as u32;
    folded(pseudo + sum(packet)) == 0xffff
}

fn sum(bytes: &[u8]) -> u32 {
    let word = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    bytes.chunks(2).map(word).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
