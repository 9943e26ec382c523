//! Tests of configuration space as a guest's writes find it.

use proptest::prelude::*;

use super::*;

const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    revision: 9,
    class: 0x01_02_03,
    subsystem_vendor: 0xabcd,
    subsystem: 0xef01,
    interrupt_pin: 2,
};

/// A BAR of each width and two capabilities, of which the second has a byte to write.
fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(&IDENTITY);
    space.add_bar(0, BarWidth::Bits64, 0x8000).unwrap();
    space.add_bar(2, BarWidth::Bits32, 0x1000).unwrap();
    space.add_bar(4, BarWidth::Bits64, 1 << 40).unwrap();
    assert_eq!(space.add_capability(9, &[1, 2, 3], &[]), Ok(0x40));
    assert_eq!(space.add_capability(0x11, &[4, 5], &[0, 0xc0]), Ok(0x48));
    space
}

/// Ids and bodies of the capabilities, as a guest walks them.
fn walk(space: &ConfigSpace) -> Vec<(u8, u16)> {
    let byte = |at: u16| {
        let mut byte = [0];
        space.read(at, &mut byte);
        byte[0]
    };
    let mut found = Vec::new();
    let mut at = byte(0x34);
    while at != 0 {
        found.push((byte(at.into()), u16::from(at)));
        assert!(found.len() < 64, "the list does not end");
        at = byte(u16::from(at) + 1);
    }
    found
}

#[test]
fn the_header_is_where_guests_look() {
    let space = space();
    assert_eq!(space.word(0), 0x5678_1234);
    assert_eq!(space.word(8), 0x0102_0309);
    assert_eq!(space.word(0x2c), 0xef01_abcd);
    assert_eq!(space.word(0x3c), 0x0200);
    assert_eq!(space.half(6), 0x10);
    assert_eq!(space.word(0x0c), 0, "type 0, one function");
    assert_eq!(walk(&space), [(9, 0x40), (0x11, 0x48)]);
}

#[test]
fn all_ones_measure_a_bar() {
    let mut space = space();
    for at in (0x10..0x28).step_by(4) {
        space.write(at, &[0xff; 4]);
    }
    let words: Vec<u32> = (0..6).map(|n| space.word(0x10 + 4 * n)).collect();
    assert_eq!(
        words,
        [0xffff_8004, 0xffff_ffff, 0xffff_f000, 0, 4, 0xffff_ff00],
        "sizes 0x8000, 0x1000, none, 1 TiB"
    );
    // The expansion ROM is not there.
    space.write(0x30, &[0xff; 4]);
    assert_eq!(space.word(0x30), 0);
}

#[test]
fn a_bar_answers_only_while_memory_is_on() {
    let mut space = space();
    space.place_bar(0, 0x1_2345_8000);
    space.place_bar(2, 0xc000_1fff);
    assert!(space.bars().all(|(_, _, address)| address.is_none()));
    space.enable_memory();
    let bars: Vec<_> = space.bars().collect();
    assert_eq!(
        bars,
        [
            (0, 0x8000, Some(0x1_2345_8000)),
            (2, 0x1000, Some(0xc000_1000)),
            (4, 1 << 40, Some(0))
        ]
    );
    space.write(4, &[0]);
    assert!(space.bars().all(|(_, _, address)| address.is_none()));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut space = space();
    for size in [0, 1, 2048, 0x3000, 1 << 32] {
        let error = space.add_bar(3, BarWidth::Bits32, size).unwrap_err();
        assert_eq!(error, ConfigError::BarSize { index: 3, size });
    }
    for (index, width) in [
        (0, BarWidth::Bits32),
        (1, BarWidth::Bits32),
        (2, BarWidth::Bits64),
        (3, BarWidth::Bits64),
        (5, BarWidth::Bits32),
        (6, BarWidth::Bits32),
    ] {
        assert_eq!(
            space.add_bar(index, width, 0x1000),
            Err(ConfigError::BarIndex { index })
        );
    }
    assert!(matches!(
        space.add_capability(9, &[0; 180], &[]),
        Err(ConfigError::Capability { id: 9, len: 182 })
    ));
    while space.add_capability(9, &[0; 14], &[]).is_ok() {}
    assert!(walk(&space).len() > 10);
}

proptest! {
    #[test]
    fn no_write_reaches_what_a_guest_may_not_change(
        writes in prop::collection::vec((0_u16..4096, prop::collection::vec(any::<u8>(), 1..9)), 0..200),
    ) {
        let fresh = space();
        let mut space = fresh.clone();
        for (at, data) in &writes {
            space.write(*at, data);
        }
        // Identity, class, capabilities and their links, status.
        for at in [0x00, 0x08, 0x2c, 0x34, 0x40, 0x44] {
            prop_assert_eq!(space.word(at), fresh.word(at));
        }
        prop_assert_eq!(space.half(6), fresh.half(6));
        prop_assert_eq!(walk(&space), walk(&fresh));
        prop_assert_eq!(space.word(0x48) & !0xc000_0000, fresh.word(0x48) & !0xc000_0000);
        // BARs keep their kind and alignment.
        for (index, size, address) in space.bars() {
            prop_assert!(address.is_none_or(|address| address.is_multiple_of(size)));
            let kind = space.word(0x10 + 4 * u16::from(index)) & 0xf;
            prop_assert_eq!(kind, if index == 2 { 0 } else { 4 });
        }
        // Extended space is empty.
        let mut extended = [1; 8];
        space.read(0x100, &mut extended);
        prop_assert_eq!(extended, [0; 8]);
    }

    #[test]
    fn a_guest_puts_a_bar_where_it_likes(
        address in any::<u64>(),
        by_bytes in any::<bool>(),
    ) {
        let mut space = space();
        space.enable_memory();
        if by_bytes {
            for (n, byte) in (0..).zip(address.to_le_bytes()) {
                space.write(0x10 + n, &[byte]);
            }
        } else {
            space.write(0x10, &address.to_le_bytes());
        }
        prop_assert_eq!(space.bars().next(), Some((0, 0x8000, Some(address & !0x7fff))));
    }

    #[test]
    fn writes_that_can_move_a_bar_are_told_from_others(at in 0_u16..4096, len in 1_usize..9) {
        let hit = (0..len as u16).any(|n| matches!(at + n, 4..6 | 0x10..0x28));
        prop_assert_eq!(ConfigSpace::can_move_bars(at, len), hit);
    }
}
