//! Feature bits of a network device (virtio 5.1.3), and which of a tap's offloads follow from them. Pure.

/// The device takes frames whose checksum is partial.
pub(super) const CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is partial.
pub(super) const GUEST_CSUM: u64 = 1 << 1;
/// The driver may change its offloads at any time.
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration space has an MTU.
pub(super) const MTU: u64 = 1 << 3;
/// The configuration space has a MAC address.
pub(super) const MAC: u64 = 1 << 5;
/// The driver takes unsegmented TCP over IPv4.
pub(super) const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes unsegmented TCP over IPv6.
pub(super) const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes unsegmented TCP with congestion marks.
pub(super) const GUEST_ECN: u64 = 1 << 9;
/// The device takes unsegmented TCP over IPv4.
pub(super) const HOST_TSO4: u64 = 1 << 11;
/// The device takes unsegmented TCP over IPv6.
pub(super) const HOST_TSO6: u64 = 1 << 12;
/// The device takes unsegmented TCP with congestion marks.
pub(super) const HOST_ECN: u64 = 1 << 13;
/// A received frame may be spread over several chains.
pub(super) const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has the link's status.
pub(super) const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub(super) const CTRL_VQ: u64 = 1 << 17;
/// The control queue takes receive modes.
pub(super) const CTRL_RX: u64 = 1 << 18;
/// There may be several pairs of queues.
pub(super) const MQ: u64 = 1 << 22;
/// The control queue sets the MAC address.
pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
/// The driver takes unsegmented UDP over IPv4.
pub(super) const GUEST_USO4: u64 = 1 << 54;
/// The driver takes unsegmented UDP over IPv6.
pub(super) const GUEST_USO6: u64 = 1 << 55;
/// The device takes unsegmented UDP.
pub(super) const HOST_USO: u64 = 1 << 56;

/// Unsegmented frames that a driver may take.
const GUEST_SEGMENTATION: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
/// What a driver may turn on and off through the control queue (virtio 5.1.6.5.6.1).
pub(super) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_SEGMENTATION | GUEST_ECN;
/// What a tap can do for segmentation of UDP, if its kernel can.
pub(super) const TAP_USO: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;
/// What every tap with a header can do.
pub(super) const TAP_OFFLOADS: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN | CTRL_GUEST_OFFLOADS;
/// What the device offers whatever is behind it.
pub(super) const ALWAYS: u64 = MTU | MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR;

// Offloads of a tap's reader (linux/if_tun.h, TUNSETOFFLOAD).
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

/// The argument of `TUNSETOFFLOAD` for the offloads of the driver's side in `features`. Without checksums there is no segmentation, and
/// without TCP's no congestion marks: so say virtio 5.1.3.1 and the kernel.
pub(super) fn tun_offloads(features: u64) -> u32 {
    if features & GUEST_CSUM == 0 {
        return 0;
    }
    let tcp = features & (GUEST_TSO4 | GUEST_TSO6) != 0;
    [
        (GUEST_CSUM, TUN_F_CSUM),
        (GUEST_TSO4, TUN_F_TSO4),
        (GUEST_TSO6, TUN_F_TSO6),
        (GUEST_ECN, TUN_F_TSO_ECN),
        (GUEST_USO4, TUN_F_USO4),
        (GUEST_USO6, TUN_F_USO6),
    ]
    .into_iter()
    .filter(|&(feature, _)| features & feature != 0 && (feature != GUEST_ECN || tcp))
    .fold(0, |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_of_a_tap_follow_what_the_driver_takes() {
        assert_eq!(tun_offloads(0), 0);
        assert_eq!(tun_offloads(GUEST_CSUM), TUN_F_CSUM);
        assert_eq!(
            tun_offloads(GUEST_TSO4 | GUEST_USO4),
            0,
            "no segmentation without checksums"
        );
        assert_eq!(
            tun_offloads(GUEST_CSUM | GUEST_ECN),
            TUN_F_CSUM,
            "no marks without TCP's segmentation"
        );
        assert_eq!(tun_offloads(GUEST_OFFLOADS), 0x6f);
    }
}
