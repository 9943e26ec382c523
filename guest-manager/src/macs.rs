//! Addresses of network devices that nobody has chosen: always the same for a guest's name and a device's place.

use std::fs;

/// An address for network device `index` of the guest of this name: unicast, locally administered (IEEE 802, section 8.4).
///
/// Hosts differ by their machine-id(5), so that guests of the same name on two hosts of one network have different addresses.
pub fn derive(guest: &str, index: usize) -> [u8; 6] {
    derive_on(&fs::read_to_string("/etc/machine-id").unwrap_or_default(), guest, index)
}

fn derive_on(host: &str, guest: &str, index: usize) -> [u8; 6] {
    // FNV-1a: no secret is kept here, it only has to spread and to stay as it is. A guest's name has no NUL.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let parts = [
        host.trim().as_bytes(),
        &[0],
        guest.as_bytes(),
        &[0],
        &(index as u64).to_le_bytes(),
    ];
    for byte in parts.into_iter().flatten() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // The low bits alone are the weakest.
    let [a, b, c, d, e, f, ..] = (hash ^ hash >> 32).to_le_bytes();
    [a & 0xfc | 0x02, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn addresses_stay_as_they_are() {
        assert_eq!(derive_on("host", "web", 0), derive_on("host\n", "web", 0));
        assert_eq!(derive("web", 1), derive("web", 1));
    }

    #[test]
    fn addresses_differ_and_can_be_used() {
        let mut seen = HashSet::new();
        for host in ["", "a", "b"] {
            for guest in 0..100 {
                for index in 0..32 {
                    let mac = derive_on(host, &format!("guest{guest}"), index);
                    assert_eq!(mac[0] & 3, 2, "unicast and local");
                    assert!(seen.insert(mac), "{mac:?}");
                }
            }
        }
    }
}
