//! The host's ends of bulk connections, each on a thread of its own.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread::{self, JoinHandle},
};

/// Bytes without a pattern that a device could produce by mistake, the same for the same seed (Marsaglia's xorshift64).
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// Takes one connection and sends `data` over it, then ends that direction.
pub fn serve_once(listener: TcpListener, data: Vec<u8>) -> JoinHandle<io::Result<()>> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(&data)?;
        stream.shutdown(Shutdown::Write)?;
        // Until the guest has read it all.
        drain(&mut stream).map(drop)
    })
}

/// Takes one connection and reads it to its end.
pub fn receive_all(listener: TcpListener) -> JoinHandle<io::Result<Vec<u8>>> {
    thread::spawn(move || drain(&mut listener.accept()?.0))
}

fn drain(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    stream.read_to_end(&mut data)?;
    Ok(data)
}
