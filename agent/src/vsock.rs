//! Sockets of the vsock family, which the standard library and rustix do not know.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes of an address.
const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an address of integers, for which all zeroes are values.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    // 40.
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor was made just now, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A socket that listens on `port`, for whoever reaches it.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives until the call returns, and is as long as it says.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) })?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A connection to `port` of the host.
pub(crate) fn connect_to_host(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address lives until the call returns, and is as long as it says.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) })?;
    Ok(socket)
}

/// Whether the other end of a connection is the host.
pub(crate) fn is_host(socket: &OwnedFd) -> bool {
    let mut address = address(0, 0);
    let mut len = ADDRESS_BYTES;
    // SAFETY: both live until the call returns, which writes at most `len` bytes to the address.
    let result = unsafe { libc::getpeername(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len) };
    result == 0 && len == ADDRESS_BYTES && address.svm_cid == libc::VMADDR_CID_HOST
}
