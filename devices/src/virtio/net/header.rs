//! The header in front of every frame (virtio 5.1.6, `struct virtio_net_hdr` with `num_buffers`): what a driver may say in it. Pure.

use super::features;

/// Its bytes; the same for both directions since virtio 1.0.
pub(super) const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header: the least that the host's network takes for a frame.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Bytes of the tag of a virtual LAN.
pub(super) const VLAN_BYTES: usize = 4;
/// The longest frame: a header and what the 16 bits of an IP length can say (virtio 5.1.6.3.1 asks drivers for room for 65550 bytes).
pub(super) const MAX_FRAME: usize = ETHERNET_BYTES + 65536;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Offset of the number of chains that a received frame is spread over.
const NUM_BUFFERS: usize = 10;

/// A header, little-endian as in guest memory and, on the hosts we run on, as a tap has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header(pub(super) [u8; HEADER_BYTES]);

impl Header {
    fn u16(&self, at: usize) -> usize {
        usize::from(u16::from_le_bytes([self.0[at], self.0[at + 1]]))
    }

    /// Whether the frame is to be cut into segments by whoever sends it on.
    pub(super) fn unsegmented(&self) -> bool {
        self.0[1] & !GSO_ECN != GSO_NONE
    }

    /// Says over how many chains the frame is spread.
    pub(super) fn set_buffers(&mut self, count: u16) {
        self.0[NUM_BUFFERS..].copy_from_slice(&count.to_le_bytes());
    }

    /// What of a driver's header in front of a frame of `frame` bytes the host may see: only fields that mean something. `None`: it asks for
    /// what the driver did not accept in `accepted`, or contradicts itself or the frame (virtio 5.1.6.2.1).
    pub(super) fn checked(&self, accepted: u64, frame: usize) -> Option<Self> {
        let has = |feature: u64| accepted & feature != 0;
        let mut checked = Self::default();
        let partial = self.0[0] & NEEDS_CSUM != 0;
        if partial {
            // Both are 16 bits, so the sum is small.
            if !has(features::CSUM) || self.u16(6) + self.u16(8) + 2 > frame {
                return None;
            }
            checked.0[0] = NEEDS_CSUM;
            checked.0[6..10].copy_from_slice(&self.0[6..10]);
        }
        let kind = self.0[1] & !GSO_ECN;
        let marked = self.0[1] & GSO_ECN != 0;
        let allowed = match kind {
            GSO_NONE => return (!marked).then_some(checked),
            GSO_TCPV4 => has(features::HOST_TSO4),
            GSO_TCPV6 => has(features::HOST_TSO6),
            GSO_UDP_L4 => has(features::HOST_USO) && !marked,
            _ => false,
        };
        let whole = partial && self.u16(4) > 0 && self.u16(2) <= frame;
        if !allowed || !whole || (marked && !has(features::HOST_ECN)) {
            return None;
        }
        checked.0[1..6].copy_from_slice(&self.0[1..6]);
        Some(checked)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(flags: u8, gso: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16) -> Header {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = flags;
        bytes[1] = gso;
        for (n, field) in [hdr_len, gso_size, start, offset, 7].into_iter().enumerate() {
            bytes[2 + 2 * n..4 + 2 * n].copy_from_slice(&field.to_le_bytes());
        }
        Header(bytes)
    }

    #[test]
    fn a_header_may_say_what_was_accepted() {
        let plain = header(0, 0, 0, 0, 0, 0);
        assert_eq!(
            plain.checked(0, 60),
            Some(Header::default()),
            "num_buffers is not sent on"
        );
        let sum = header(1, 0, 0, 0, 34, 16);
        assert_eq!(sum.checked(0, 60), None);
        assert!(sum.checked(features::CSUM, 52).is_some());
        assert_eq!(
            sum.checked(features::CSUM, 51),
            None,
            "the checksum lies outside of the frame"
        );
        for (gso, feature) in [
            (1, features::HOST_TSO4),
            (4, features::HOST_TSO6),
            (5, features::HOST_USO),
        ] {
            let segments = header(1, gso, 54, 1448, 34, 16);
            assert_eq!(segments.checked(features::CSUM, 9000), None);
            let checked = segments.checked(features::CSUM | feature, 9000).unwrap();
            assert!(checked.unsegmented());
            assert_eq!(
                segments.checked(features::CSUM | feature, 53),
                None,
                "no room for headers"
            );
            let no_size = header(1, gso, 54, 0, 34, 16);
            assert_eq!(no_size.checked(u64::MAX, 9000), None);
            let no_sum = header(0, gso, 54, 1448, 34, 16);
            assert_eq!(no_sum.checked(u64::MAX, 9000), None);
        }
        let marked = header(1, 0x81, 54, 1448, 34, 16);
        assert_eq!(marked.checked(!features::HOST_ECN, 9000), None);
        assert!(marked.checked(u64::MAX, 9000).is_some());
        assert_eq!(header(0, 0x80, 0, 0, 0, 0).checked(u64::MAX, 60), None);
        assert_eq!(
            header(1, 3, 54, 1448, 34, 16).checked(u64::MAX, 9000),
            None,
            "UFO is not offered"
        );
        assert_eq!(
            header(6, 0, 9, 9, 9, 9).checked(u64::MAX, 60),
            Some(Header::default()),
            "what means nothing is not sent on"
        );
    }

    proptest! {
        #[test]
        fn what_passes_was_accepted_and_fits(bytes: [u8; HEADER_BYTES], accepted: u64, frame in 14usize..MAX_FRAME) {
            if let Some(checked) = Header(bytes).checked(accepted, frame) {
                prop_assert!(checked.0[0] & !NEEDS_CSUM == 0);
                prop_assert!(checked.0[0] == 0 || checked.u16(6) + checked.u16(8) + 2 <= frame);
                prop_assert!(checked.0[0] == 0 || accepted & features::CSUM != 0);
                prop_assert!(!checked.unsegmented() || checked.u16(4) > 0);
                prop_assert_eq!(checked.checked(accepted, frame), Some(checked));
            }
        }
    }
}
