//! The decoder against a well-known one: on every instruction of the table in every form, and on bytes as they come.

use super::*;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction as Reference, OpKind, Register as Name};
use proptest::prelude::*;

/// The table's instructions as the reference names them.
fn expected(reference: &Reference) -> Option<(Operation, u8)> {
    Some(match reference.code() {
        Code::Int3 => (Operation::Int3, 0),
        Code::Wait => (Operation::Fwait, 0),
        Code::Popcnt_r16_rm16 => (Operation::Popcnt, 2),
        Code::Popcnt_r32_rm32 => (Operation::Popcnt, 4),
        Code::Popcnt_r64_rm64 => (Operation::Popcnt, 8),
        Code::Ldmxcsr_m32 => (Operation::Ldmxcsr, 0),
        Code::Stmxcsr_m32 => (Operation::Stmxcsr, 0),
        Code::Xsave_mem | Code::Xsave64_mem => (Operation::Xsave, 0),
        Code::Xrstor_mem | Code::Xrstor64_mem => (Operation::Xrstor, 0),
        _ => return None,
    })
}

fn regs(values: [u64; 16]) -> kvm_regs {
    let mut regs = kvm_regs::default();
    for (number, value) in values.into_iter().enumerate() {
        *register_mut(&mut regs, number as u8) = value;
    }
    regs
}

const FS: u64 = 0x7f12_3456_7000;
const GS: u64 = 0xffff_8880_0780_0000;
const RIP: u64 = 0xffff_ffff_8123_4567;

fn check(bytes: &[u8], values: [u64; 16]) -> Result<(), TestCaseError> {
    let reference = Decoder::with_ip(64, bytes, RIP, DecoderOptions::NONE).decode();
    let ours = decode(bytes);
    let Some((operation, size)) = expected(&reference) else {
        prop_assert_eq!(ours, None, "{:02x?} is {:?}", bytes, reference.code());
        return Ok(());
    };
    let Some(ours) = ours else {
        return Err(TestCaseError::fail(format!("{bytes:02x?} is {:?}", reference.code())));
    };
    prop_assert_eq!(ours.operation, operation);
    prop_assert_eq!(usize::from(ours.length), reference.len());
    if size != 0 {
        prop_assert_eq!(ours.size, size);
        let number = reference.op0_register().number() as u8;
        prop_assert_eq!(ours.register, number);
    }
    let regs = regs(values);
    for operand in 0..reference.op_count() {
        if reference.op_kind(operand) == OpKind::Memory {
            let Operand::Memory(address) = ours.operand else {
                return Err(TestCaseError::fail("no memory operand"));
            };
            let next = RIP.wrapping_add(u64::from(ours.length));
            let linear = address.linear(&regs, next, |segment| match segment {
                Segment::Fs => FS,
                Segment::Gs => GS,
            });
            let theirs = reference.virtual_address(operand, 0, |name, _, _| {
                Some(match name {
                    Name::FS => FS,
                    Name::GS => GS,
                    Name::CS | Name::DS | Name::ES | Name::SS => 0,
                    name if name.is_gpr64() => values[name.number()],
                    name if name.is_gpr32() => u64::from(values[name.number()] as u32),
                    _ => return None,
                })
            });
            prop_assert_eq!(Some(linear), theirs, "{:02x?}", bytes);
        } else if operand == 1 {
            let number = reference.op1_register().number() as u8;
            prop_assert_eq!(ours.operand, Operand::Register(number));
        }
    }
    Ok(())
}

fn prefix() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(0x66u8),
        Just(0x67),
        Just(0xf0),
        Just(0xf2),
        Just(0xf3),
        Just(0x64),
        Just(0x65),
        Just(0x2e),
        Just(0x3e),
        0x40u8..=0x4f,
    ]
}

fn opcode() -> impl Strategy<Value = Vec<u8>> {
    let rows: Vec<Vec<u8>> = TABLE.iter().map(|row| row.opcode.to_vec()).collect();
    proptest::sample::select(rows)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn the_tables_instructions_are_read_as_another_decoder_reads_them(
        prefixes in proptest::collection::vec(prefix(), 0..5),
        opcode in opcode(),
        rest in any::<[u8; 8]>(),
        cut in 0usize..20,
        values in any::<[u64; 16]>(),
    ) {
        let mut bytes = [&prefixes[..], &opcode, &rest].concat();
        if cut > 0 && cut < bytes.len() {
            bytes.truncate(cut);
        }
        check(&bytes, values)?;
    }

    #[test]
    fn any_bytes_are_read_as_another_decoder_reads_them(
        bytes in proptest::collection::vec(any::<u8>(), 0..20),
        values in any::<[u64; 16]>(),
    ) {
        check(&bytes, values)?;
    }

    #[test]
    fn registers_keep_their_numbers(values in any::<[u64; 16]>()) {
        let regs = regs(values);
        for (number, value) in values.into_iter().enumerate() {
            prop_assert_eq!(register(&regs, number as u8), value);
        }
        prop_assert_eq!(regs.rsp, values[4]);
        prop_assert_eq!(regs.r12, values[12]);
    }
}

#[test]
fn one_byte_and_two_byte_opcodes() {
    assert_eq!(
        decode(&[0xcc]).map(|i| (i.operation, i.length)),
        Some((Operation::Int3, 1))
    );
    assert_eq!(
        decode(&[0x9b, 0xdb]).map(|i| (i.operation, i.length)),
        Some((Operation::Fwait, 1))
    );
    // popcnt %rdi,%rax
    let popcnt = decode(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7]).unwrap();
    assert_eq!(
        (popcnt.operation, popcnt.length, popcnt.size),
        (Operation::Popcnt, 5, 8)
    );
    assert_eq!((popcnt.register, popcnt.operand), (0, Operand::Register(7)));
    // The same bytes without F3 are no instruction, nor is it one with LOCK.
    assert_eq!(decode(&[0x48, 0x0f, 0xb8, 0xc7]), None);
    assert_eq!(decode(&[0xf0, 0xf3, 0x48, 0x0f, 0xb8, 0xc7]), None);
    assert_eq!(decode(&[]), None);
    assert_eq!(decode(&[0x66; 15]), None);
    assert_eq!(decode(&[0x66; 40]), None);
}
