//! XSAVE and XRSTOR against their description, and what is kept beside the guest's memory.

use super::*;
use kvm_bindings::kvm_sregs;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 1 << 20;
const AT: u64 = 0x8000;
const ALL: u64 = u64::MAX;

/// 1 MiB, mapped from 0 and from the kernel's half by the page tables at `root`.
fn memory() -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    for root in [0x1000u64, 0x4000] {
        for (at, entry) in [
            (root, 0x2003u64),
            (root + 8 * 256, 0x2003),
            (0x2000, 0x3003),
            (0x3000, 0x83),
        ] {
            memory.write_obj(entry, GuestAddress(at)).unwrap();
        }
    }
    memory
}

const KERNEL: u64 = 0xffff_8000_0000_0000;

fn sregs(root: u64) -> kvm_sregs {
    kvm_sregs {
        cr0: 0x8001_0001,
        cr3: root,
        cr4: 0x20,
        efer: 0x500,
        ..Default::default()
    }
}

/// A state with all components in use, told apart by `seed`.
fn state(seed: u8) -> XState {
    let mut state = XState::default();
    for (i, byte) in state.area.iter_mut().enumerate() {
        *byte = (i as u8).wrapping_mul(5).wrapping_add(seed);
    }
    state.area[RESERVED].fill(0);
    state.area[RESERVED.end..OTHERS].fill(0);
    state.set_mxcsr(0x1fa0).unwrap();
    state.set_in_use(0xe7);
    state
}

fn with_space<R>(memory: &GuestMemoryMmap, root: u64, body: impl FnOnce(&AddressSpace<'_>) -> R) -> R {
    let sregs = sregs(root);
    body(&AddressSpace::new(memory, &sregs).unwrap())
}

#[test]
fn everything_that_matters_comes_back() {
    let memory = memory();
    with_space(&memory, 0x1000, |space| {
        let mut kept = Kept::default();
        let old = state(1);
        save(&old, ALL, AT, space, &mut kept).unwrap();
        let back = restore(&state(2), ALL, AT, space, &kept).unwrap();
        assert_eq!(back.area[X87_CONTROL], old.area[X87_CONTROL]);
        assert_eq!(back.area[X87_REGISTERS], old.area[X87_REGISTERS]);
        assert_eq!(back.area[XMM], old.area[XMM]);
        assert_eq!(back.mxcsr(), old.mxcsr());
        assert_eq!(back.in_use(), 0xe7);
        assert_eq!(back.area[OTHERS..], old.area[OTHERS..]);
    });
}

#[test]
fn saving_leaves_the_rest_of_the_area_to_software() {
    let memory = memory();
    memory.write_slice(&[0xee; 1024], GuestAddress(AT)).unwrap();
    with_space(&memory, 0x1000, |space| {
        save(&state(1), ALL, AT, space, &mut Kept::default()).unwrap();
    });
    let mut area = [0; 1024];
    memory.read_slice(&mut area, GuestAddress(AT)).unwrap();
    assert!(area[416..512].iter().all(|byte| *byte == 0xee));
    assert!(
        area[520..].iter().all(|byte| *byte == 0xee),
        "of the header only XSTATE_BV is written"
    );
    // Bits of components that were not asked for stay.
    assert_eq!(double_word(&area[IN_USE]), 0xeeee_eeee_eeee_eeee & !3 | 3);
}

#[test]
fn one_component_alone() {
    let memory = memory();
    memory.write_slice(&[0; 576], GuestAddress(AT)).unwrap();
    with_space(&memory, 0x1000, |space| {
        let mut kept = Kept::default();
        let old = state(1);
        save(&old, X87, AT, space, &mut kept).unwrap();
        let before = state(2);
        let after = restore(&before, X87, AT, space, &kept).unwrap();
        assert_eq!(after.area[X87_REGISTERS], old.area[X87_REGISTERS]);
        assert_eq!(after.area[XMM], before.area[XMM]);
        assert_eq!(after.mxcsr(), before.mxcsr());
        assert_eq!(
            after.area[OTHERS..],
            before.area[OTHERS..],
            "not the kernel's save of a process"
        );
    });
}

#[test]
fn components_that_are_not_in_use_are_initial() {
    let memory = memory();
    memory.write_slice(&[0; 576], GuestAddress(AT)).unwrap();
    memory.write_obj(MXCSR_INITIAL, GuestAddress(AT + 24)).unwrap();
    with_space(&memory, 0x1000, |space| {
        let after = restore(&state(1), ALL, AT, space, &Kept::default()).unwrap();
        let initial = XState::default();
        for part in [X87_CONTROL, X87_REGISTERS, MXCSR, XMM, IN_USE, OTHERS..AREA] {
            assert_eq!(after.area[part.clone()], initial.area[part]);
        }
    });
}

#[test]
fn what_can_not_be_loaded_is_refused() {
    let cases: [(&str, u64, u64); 5] = [
        ("a component that is not enabled", 512, 1 << 2),
        ("the compacted form", 520, 1 << 63),
        ("a reserved byte", 528, 1),
        ("a reserved bit of MXCSR", 24, 1 << 16),
        ("an unknown component", 512, 1 << 62),
    ];
    for (what, offset, value) in cases {
        let memory = memory();
        memory.write_obj(3u64, GuestAddress(AT + 512)).unwrap();
        memory.write_obj(value, GuestAddress(AT + offset)).unwrap();
        let result = with_space(&memory, 0x1000, |space| {
            restore(&state(1), ALL, AT, space, &Kept::default())
        });
        assert_eq!(result, Err(Error::Invalid(Invalid)), "{what}");
    }
    let memory = memory();
    with_space(&memory, 0x1000, |space| {
        let misaligned = save(&state(1), ALL, AT + 16, space, &mut Kept::default());
        assert_eq!(misaligned, Err(Error::Invalid(Invalid)));
        let unmapped = save(&state(1), ALL, 0x20_0000, space, &mut Kept::default());
        assert!(matches!(unmapped, Err(Error::Memory(Fault::Page { .. }))));
    });
}

#[test]
fn what_is_kept_belongs_to_an_address() {
    let memory = memory();
    let mut kept = Kept::default();
    with_space(&memory, 0x1000, |space| {
        save(&state(1), ALL, KERNEL + AT, space, &mut kept).unwrap();
        save(&state(2), ALL, KERNEL + AT + 0x1000, space, &mut kept).unwrap();
        save(&state(3), ALL, AT, space, &mut kept).unwrap();
    });
    // Another process: the kernel's half is the same memory to it, its own half is not.
    with_space(&memory, 0x4000, |space| {
        let others = |address| restore(&XState::default(), ALL, address, space, &kept).unwrap().area[OTHERS..].to_vec();
        assert_eq!(others(KERNEL + AT), state(1).area[OTHERS..]);
        assert_eq!(others(KERNEL + AT + 0x1000), state(2).area[OTHERS..]);
        assert!(others(AT).iter().all(|byte| *byte == 0));
    });
}

#[test]
fn what_was_put_aside_is_forgotten_when_it_is_over() {
    let memory = memory();
    let mut kept = Kept::default();
    with_space(&memory, 0x1000, |space| {
        save(&state(1), ALL, AT, space, &mut kept).unwrap();
        let mut plain = state(2);
        plain.set_in_use(COMPONENTS);
        save(&plain, ALL, AT, space, &mut kept).unwrap();
        assert!(kept.areas.is_empty());
        let after = restore(&state(3), ALL, AT, space, &kept).unwrap();
        assert_eq!(after.in_use(), COMPONENTS);
        assert!(after.area[OTHERS..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_guest_can_not_make_us_keep_without_end() {
    let memory = memory();
    let mut kept = Kept::default();
    with_space(&memory, 0x1000, |space| {
        for n in 0..Kept::MOST as u64 + 100 {
            save(&state(n as u8), ALL, AT + n * 64, space, &mut kept).unwrap();
        }
        assert_eq!(kept.areas.len(), Kept::MOST);
        let last = AT + (Kept::MOST as u64 + 99) * 64;
        assert!(kept.areas.contains_key(&Kept::key(last, space)));
        assert!(!kept.areas.contains_key(&Kept::key(AT, space)), "the oldest went first");
    });
}

proptest! {
    #[test]
    fn kvms_words_are_the_bytes(seed in any::<u8>()) {
        let state = state(seed);
        prop_assert_eq!(XState::from_words(&state.to_words()), state);
    }

    #[test]
    fn any_area_restores_or_faults(
        contents in proptest::collection::vec(any::<u8>(), 576),
        in_use in 0u64..8,
        address in prop_oneof![Just(AT), Just(0xf_ffc0), any::<u64>()],
        wanted in any::<u64>(),
    ) {
        let memory = memory();
        memory.write_slice(&contents, GuestAddress(AT)).unwrap();
        memory.write_obj(in_use, GuestAddress(AT + 512)).unwrap();
        memory.write_obj(0u128, GuestAddress(AT + 520)).unwrap();
        with_space(&memory, 0x1000, |space| {
            let before = state(9);
            let mut kept = Kept::default();
            if let Ok(after) = restore(&before, wanted, address, space, &kept) {
                assert_eq!(after.mxcsr() & !MXCSR_BITS, 0);
                assert_eq!(after.in_use() & !0xe7, 0);
            }
            let _ = save(&before, wanted, address, space, &mut kept);
            assert!(kept.areas.len() <= 1);
        });
    }
}
