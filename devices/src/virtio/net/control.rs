//! Commands of the control queue (virtio 5.1.6.5): what their bytes say. Pure.

use super::features;

/// Most bytes of a command that are read. The longest, a table of addresses, may have more; the rest of it changes nothing.
pub(super) const MAX_COMMAND: usize = 4096;

/// The answer to a command that was carried out.
pub(super) const OK: u8 = 0;
/// The answer to all others.
pub(super) const ERROR: u8 = 1;

/// A command that the device knows, and whose data make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Which frames the driver wants. The host's switch decides what comes, and drivers sort out themselves what they do not want.
    Filter,
    /// The driver's MAC address from now on.
    SetMac([u8; 6]),
    /// The driver uses this many pairs of queues.
    SetPairs(u16),
    /// The driver takes these offloads from now on: feature bits.
    SetOffloads(u64),
}

/// Reads a command of `total` bytes that begins with `bytes`, from a driver that accepted the features `accepted`, on a device with `pairs` pairs
/// of queues. `None`: it is to be refused.
pub(super) fn parse(bytes: &[u8], total: usize, accepted: u64, pairs: u16) -> Option<Command> {
    let has = |feature: u64| accepted & feature != 0;
    let (&[class, command], data) = bytes.split_first_chunk()?;
    match (class, command) {
        // VIRTIO_NET_CTRL_RX: promiscuous, all multicast, with one byte each. Those after them need a feature that is not offered.
        (0, 0..=1) if has(features::CTRL_RX) => matches!(data, [0 | 1]).then_some(Command::Filter),
        // VIRTIO_NET_CTRL_MAC: a table of addresses for one receiver, then one for groups.
        (1, 0) if has(features::CTRL_RX) => tables_fit(data, total.checked_sub(2)?).then_some(Command::Filter),
        (1, 1) if has(features::CTRL_MAC_ADDR) => {
            let mac: [u8; 6] = data.try_into().ok()?;
            is_unicast(mac).then_some(Command::SetMac(mac))
        }
        // VIRTIO_NET_CTRL_MQ
        (4, 0) if has(features::MQ) => {
            let count = u16::from_le_bytes(data.try_into().ok()?);
            (1..=pairs).contains(&count).then_some(Command::SetPairs(count))
        }
        // VIRTIO_NET_CTRL_GUEST_OFFLOADS
        (5, 0) if has(features::CTRL_GUEST_OFFLOADS) => {
            let offloads = u64::from_le_bytes(data.try_into().ok()?);
            (offloads & !(accepted & features::GUEST_OFFLOADS) == 0).then_some(Command::SetOffloads(offloads))
        }
        _ => None,
    }
}

/// Whether `mac` can be one device's own address.
pub fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// Whether two tables, each a count and that many addresses, fill `total` bytes, of which `data` are the first.
fn tables_fit(data: &[u8], total: usize) -> bool {
    let table = |at: usize| {
        let count = data.get(at..at.checked_add(4)?)?;
        let count = u32::from_le_bytes(count.try_into().ok()?);
        at.checked_add(4)?
            .checked_add(usize::try_from(count).ok()?.checked_mul(6)?)
    };
    // What is longer than `MAX_COMMAND` cannot be checked, and is let pass: nothing depends on it.
    match table(0) {
        Some(second) if second < data.len() => table(second) == Some(total),
        Some(second) => data.len() < total && second < total,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Option<Command> {
        parse(bytes, bytes.len(), u64::MAX, 4)
    }

    #[test]
    fn commands_are_told_apart() {
        assert_eq!(read(&[0, 0, 1]), Some(Command::Filter));
        assert_eq!(read(&[0, 1, 0]), Some(Command::Filter));
        assert_eq!(
            read(&[1, 1, 2, 3, 4, 5, 6, 7]),
            Some(Command::SetMac([2, 3, 4, 5, 6, 7]))
        );
        assert_eq!(read(&[4, 0, 4, 0]), Some(Command::SetPairs(4)));
        let offloads = [&[5, 0][..], &features::GUEST_CSUM.to_le_bytes()].concat();
        assert_eq!(read(&offloads), Some(Command::SetOffloads(features::GUEST_CSUM)));
    }

    #[test]
    fn commands_that_make_no_sense_are_refused() {
        let refused: [&[u8]; 17] = [
            &[],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 0, 1, 1],
            &[0, 2, 1],
            &[1, 1, 3, 3, 4, 5, 6, 7],
            &[1, 1, 0, 0, 0, 0, 0, 0],
            &[1, 1, 2, 3, 4],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[4, 0, 1],
            &[4, 1, 1, 0],
            &[5, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            &[3, 0],
            &[99, 0, 0],
        ];
        for command in refused {
            assert_eq!(read(command), None, "{command:?}");
        }
        assert_eq!(parse(&[4, 0, 1, 0], 4, 0, 4), None, "the feature was not accepted");
        let offloads = [&[5, 0][..], &features::GUEST_TSO4.to_le_bytes()].concat();
        let accepted = features::CTRL_GUEST_OFFLOADS | features::GUEST_CSUM;
        assert_eq!(parse(&offloads, offloads.len(), accepted, 1), None);
    }

    #[test]
    fn tables_of_addresses_have_to_fit() {
        let table = |counts: [u32; 2], addresses: [usize; 2]| {
            let mut bytes = vec![1, 0];
            for (count, addresses) in counts.into_iter().zip(addresses) {
                bytes.extend_from_slice(&count.to_le_bytes());
                bytes.resize(bytes.len() + 6 * addresses, 0xaa);
            }
            bytes
        };
        for good in [[0, 0], [1, 0], [0, 3], [2, 2]] {
            assert_eq!(
                read(&table(good, good.map(|n| n as usize))),
                Some(Command::Filter),
                "{good:?}"
            );
        }
        for (counts, addresses) in [
            ([1, 0], [0, 0]),
            ([0, 1], [0, 0]),
            ([0, u32::MAX], [0, 1]),
            ([u32::MAX, 0], [1, 0]),
        ] {
            assert_eq!(read(&table(counts, addresses)), None, "{counts:?}");
        }
        let long = table([1000, 2], [1000, 2]);
        assert_eq!(
            parse(&long[..MAX_COMMAND], long.len(), u64::MAX, 1),
            Some(Command::Filter)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, more in 0usize..100, accepted: u64, pairs in 1u16..=8) {
            if let Some(Command::SetPairs(count)) = parse(&bytes, bytes.len() + more, accepted, pairs) {
                prop_assert!((1..=pairs).contains(&count));
            }
        }
    }
}
