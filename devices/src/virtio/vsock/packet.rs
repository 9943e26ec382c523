//! Packets of the socket device: the header that begins each of them (virtio 5.10.6), and nothing else.

/// The host's context id (virtio 5.10.4).
pub const HOST_CID: u64 = 2;
/// The lowest context id that a guest may have.
pub const FIRST_GUEST_CID: u64 = 3;
/// The highest context id that a guest may have: the upper 32 bits are reserved, and 2^32 - 1 means "any" to socket interfaces.
pub const LAST_GUEST_CID: u64 = 0xffff_fffe;
/// VIRTIO_VSOCK_TYPE_STREAM: the only type of socket here.
pub const STREAM: u16 = 1;
/// In flags of [`Op::Shutdown`]: the sender will not receive any more (VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE).
pub const NO_MORE_RECEIVING: u32 = 1;
/// In flags of [`Op::Shutdown`]: the sender will not send any more (VIRTIO_VSOCK_SHUTDOWN_F_SEND).
pub const NO_MORE_SENDING: u32 = 2;

/// What a packet is for (virtio 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Refuses it, or ends it at once.
    Reset = 3,
    /// Ends one direction, or both.
    Shutdown = 4,
    /// Carries bytes.
    Data = 5,
    /// Tells what there is room for.
    CreditUpdate = 6,
    /// Asks to be told.
    CreditRequest = 7,
}

impl Op {
    /// The operation of this number, if there is one.
    pub fn new(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// The header of a packet. Its fields are named as in the specification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes that follow the header.
    pub len: u32,
    /// Type of the socket.
    pub kind: u16,
    /// An [`Op`], or whatever a driver wrote.
    pub op: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes that the sender has room for, in all.
    pub buf_alloc: u32,
    /// Bytes that the sender's application has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Bytes of a header. There is no padding.
    pub const BYTES: usize = 44;

    /// Reads a header as it lies in memory.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// The header as it lies in memory.
    pub fn bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The answer to a packet that belongs to no connection; `None` to a reset, which is never answered.
    pub fn refusal(&self) -> Option<Self> {
        (Op::new(self.op) != Some(Op::Reset)).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_lies_in_memory_as_the_specification_says() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 2,
            src_port: 0x1413_1211,
            dst_port: 52,
            len: 7,
            kind: STREAM,
            op: Op::Data as u16,
            flags: 0x2423_2221,
            buf_alloc: 0x10000,
            fwd_cnt: 0xffff_fffe,
        };
        let bytes = header.bytes();
        assert_eq!(bytes[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[16..20], [0x11, 0x12, 0x13, 0x14]);
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(
            bytes[32..],
            [0x21, 0x22, 0x23, 0x24, 0, 0, 1, 0, 0xfe, 0xff, 0xff, 0xff]
        );
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn only_known_operations_have_a_meaning_and_resets_no_answer() {
        for number in 0..=u16::MAX {
            assert_eq!(
                Op::new(number).map(|op| op as u16),
                (1..=7).contains(&number).then_some(number)
            );
        }
        let header = Header {
            op: 99,
            ..Header::default()
        };
        assert!(header.refusal().is_some());
        let reset = Header {
            op: Op::Reset as u16,
            ..header
        };
        assert_eq!(reset.refusal(), None);
    }
}
