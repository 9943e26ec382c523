//! Frames: Ethernet with ARP (RFC 826), IPv4 (RFC 791), ICMP echo (RFC 792) and UDP (RFC 768).

use alloc::format;
use alloc::vec::Vec;

use crate::guest::Failure;

/// A hardware address.
pub(super) type Ethernet = [u8; 6];
/// An IPv4 address.
pub(super) type Address = [u8; 4];
/// Everybody on the link.
pub(super) const BROADCAST: Ethernet = [0xff; 6];

const ARP: [u8; 2] = [8, 6];
const IPV4: [u8; 2] = [8, 0];
const ICMP: u8 = 1;
const UDP: u8 = 17;
/// Bytes of the headers.
const ETHERNET_HEADER: usize = 14;
const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;

/// What a frame is, of those that matter here.
pub(super) enum Packet<'a> {
    ArpRequest {
        mac: Ethernet,
        sender: Address,
        target: Address,
    },
    ArpReply {
        mac: Ethernet,
        sender: Address,
    },
    Ping {
        mac: Ethernet,
        from: Address,
        to: Address,
        body: &'a [u8],
    },
    Pong {
        from: Address,
        body: &'a [u8],
    },
    Udp {
        mac: Ethernet,
        from: Address,
        to: Address,
        from_port: u16,
        to_port: u16,
        body: &'a [u8],
    },
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn port(bytes: &[u8], at: usize) -> Option<u16> {
    field(bytes, at).map(u16::from_be_bytes)
}

impl<'a> Packet<'a> {
    /// Takes a frame apart; `None` if it is nothing of these, or not sound.
    pub(super) fn parse(frame: &'a [u8]) -> Option<Self> {
        let mac = field(frame, 6)?;
        let body = frame.get(ETHERNET_HEADER..)?;
        match field(frame, 12)? {
            ARP => {
                let (sender, target) = (field(body, 14)?, field(body, 24)?);
                match port(body, 6)? {
                    1 => Some(Self::ArpRequest {
                        mac: field(body, 8)?,
                        sender,
                        target,
                    }),
                    2 => Some(Self::ArpReply {
                        mac: field(body, 8)?,
                        sender,
                    }),
                    _ => None,
                }
            }
            IPV4 => {
                let length = usize::from(port(body, 2)?);
                let header = usize::from(body.first()? & 0xf) * 4;
                let (from, to) = (field(body, 12)?, field(body, 16)?);
                let inner = body.get(header..length)?;
                match *body.get(9)? {
                    ICMP if checksum(inner) == 0 => match *inner.first()? {
                        8 => Some(Self::Ping {
                            mac,
                            from,
                            to,
                            body: inner.get(4..)?,
                        }),
                        0 => Some(Self::Pong {
                            from,
                            body: inner.get(4..)?,
                        }),
                        _ => None,
                    },
                    UDP => Some(Self::Udp {
                        mac,
                        from,
                        to,
                        from_port: port(inner, 0)?,
                        to_port: port(inner, 2)?,
                        body: inner.get(UDP_HEADER..)?,
                    }),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An ARP frame: operation 1 asks, 2 answers.
pub(super) fn arp(operation: u8, mac: Ethernet, own: Address, to: Ethernet, peer: Address) -> Vec<u8> {
    let asked = if to == BROADCAST { [0; 6] } else { to };
    let mut frame = Vec::new();
    for part in [
        to.as_slice(),
        &mac,
        &ARP,
        &[0, 1, 8, 0, 6, 4, 0, operation],
        &mac,
        &own,
        &asked,
        &peer,
    ] {
        frame.extend_from_slice(part);
    }
    frame
}

fn ipv4(protocol: u8, from: (Ethernet, Address), to: (Ethernet, Address), inner: &[u8]) -> Vec<u8> {
    let length = ((IP_HEADER + inner.len()) as u16).to_be_bytes();
    let mut header = Vec::from([0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend_from_slice(&from.1);
    header.extend_from_slice(&to.1);
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    let mut frame = Vec::with_capacity(ETHERNET_HEADER + IP_HEADER + inner.len());
    for part in [to.0.as_slice(), &from.0, &IPV4, &header, inner] {
        frame.extend_from_slice(part);
    }
    frame
}

/// An ICMP echo: kind 8 asks, 0 answers; the body begins with identifier and sequence number.
pub(super) fn icmp(kind: u8, from: (Ethernet, Address), to: (Ethernet, Address), body: &[u8]) -> Vec<u8> {
    let mut inner = Vec::from([kind, 0, 0, 0]);
    inner.extend_from_slice(body);
    let sum = checksum(&inner).to_be_bytes();
    inner[2..4].copy_from_slice(&sum);
    ipv4(ICMP, from, to, &inner)
}

/// A UDP datagram, without checksum.
pub(super) fn udp(from: (Ethernet, Address, u16), to: (Ethernet, Address, u16), body: &[u8]) -> Vec<u8> {
    let mut inner = Vec::new();
    for part in [
        from.2.to_be_bytes(),
        to.2.to_be_bytes(),
        ((UDP_HEADER + body.len()) as u16).to_be_bytes(),
        [0, 0],
    ] {
        inner.extend_from_slice(&part);
    }
    inner.extend_from_slice(body);
    ipv4(UDP, (from.0, from.1), (to.0, to.1), &inner)
}

/// "10.0.0.1".
pub(super) fn parse_address(text: &str) -> Result<Address, Failure> {
    let mut address = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut address {
        let part = parts.next().and_then(|part| part.parse().ok());
        *byte = part.ok_or_else(|| Failure(format!("{text:?} is no IPv4 address")))?;
    }
    Ok(address)
}
