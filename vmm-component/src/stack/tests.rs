//! Stacks that are as they should be, as compilers leave them, and any others.

use std::cell::Cell;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use proptest::prelude::*;

use super::*;

const TEXT: u64 = 0xffff_ffff_8100_0000;
const TEXT_SIZE: u64 = 0x1000;
const STACK: u64 = 0xffff_c900_0000_4000;
const OTHER: u64 = 0xffff_c900_0001_0000;
const BACK_FROM: u64 = 128;

/// Text full of calls of five bytes, every 16 bytes, and some stacks. The calls from [`BACK_FROM`] on are followed by `pop %rsp`.
struct Fake {
    stacks: Vec<(u64, Vec<u64>)>,
    user: bool,
    reads: Cell<usize>,
}

impl Fake {
    fn new(stack: Vec<u64>) -> Self {
        Self {
            stacks: vec![(STACK, stack)],
            user: false,
            reads: Cell::new(0),
        }
    }

    fn byte(&self, address: u64) -> Option<u8> {
        if let Some(offset) = address.checked_sub(TEXT).filter(|offset| *offset < TEXT_SIZE) {
            return Some(match (offset % 16, offset / 16) {
                (0, _) => 0xe8,
                (12, BACK_FROM..) => 0x5c,
                _ => 0x90,
            });
        }
        self.stacks.iter().find_map(|(base, words)| {
            let offset = address.checked_sub(*base)?;
            let word = words.get(usize::try_from(offset / 8).ok()?)?;
            Some(word.to_le_bytes()[(offset % 8) as usize])
        })
    }
}

impl View for Fake {
    fn read(&self, address: u64, to: &mut [u8]) -> bool {
        self.reads.set(self.reads.get() + 1);
        (0..).zip(to).all(|(n, byte)| match self.byte(address.wrapping_add(n)) {
            Some(there) => {
                *byte = there;
                true
            }
            None => false,
        })
    }

    fn is_text(&self, address: u64, user: bool) -> bool {
        user == self.user && (TEXT..TEXT + TEXT_SIZE).contains(&address)
    }
}

/// What the n-th call of the text returns to.
fn after(n: u64) -> u64 {
    TEXT + 16 * n + 5
}

fn start(frame: u64) -> Start {
    Start {
        instruction: TEXT + 0x10,
        stack: STACK,
        frame,
        word: Some(8),
        user: false,
        code_segment: 0x10,
    }
}

fn frames(stack: &Stack) -> Vec<(u64, u64, bool)> {
    let of = |frame: &Frame| (frame.address, frame.stack_pointer, frame.reliable);
    stack.frames.iter().map(of).collect()
}

#[test]
fn frame_pointers_are_followed_and_what_comes_after_is_searched() {
    let mut words = vec![0; 2048];
    // Two frames, whose callers' frame pointer comes right before their return address.
    (words[2], words[3]) = (STACK + 6 * 8, after(4));
    (words[6], words[7]) = (1, after(5));
    // A local variable between them, which is skipped, and something behind the last.
    words[5] = after(6);
    words[20] = after(7);
    let stack = unwind(&Fake::new(words), &start(STACK + 2 * 8), 64);
    let expected = [
        (TEXT + 0x10, STACK, true),
        (after(4), STACK + 3 * 8, true),
        (after(5), STACK + 7 * 8, true),
        (after(7), STACK + 20 * 8, false),
    ];
    assert_eq!(frames(&stack), expected);
    assert_eq!(stack.end, format!("a stack of 16 KiB ends at {:#x}", STACK + 0x4000));
}

#[test]
fn the_innermost_functions_may_have_no_frames() {
    let mut words = vec![0; 2048];
    words[2] = after(2);
    (words[6], words[7]) = (0, after(3));
    let stack = unwind(&Fake::new(words), &start(STACK + 6 * 8), 64);
    let expected = [
        (TEXT + 0x10, STACK, true),
        (after(2), STACK + 2 * 8, false),
        (after(3), STACK + 7 * 8, true),
    ];
    assert_eq!(frames(&stack), expected);
}

#[test]
fn without_frame_pointers_what_follows_a_call_is_found() {
    let mut words = vec![0; 2048];
    words[1] = after(1);
    // Text, but no call before it.
    words[2] = after(2) + 1;
    words[3] = STACK;
    words[4] = after(3);
    for frame in [0, 7, STACK + 8 * 2048, STACK - 8, u64::MAX - 7, STACK + 3] {
        let stack = unwind(&Fake::new(words.clone()), &start(frame), 64);
        let expected = [
            (TEXT + 0x10, STACK, true),
            (after(1), STACK + 8, false),
            (after(3), STACK + 4 * 8, false),
        ];
        assert_eq!(frames(&stack), expected, "{frame:#x}");
    }
}

#[test]
fn an_interrupt_leads_to_the_stack_that_it_came_from() {
    let mut words = vec![0; 2048];
    // Instruction, code segment, flags, stack pointer, stack segment; in the middle of no call.
    words[9] = TEXT + 0x123;
    words[10..13].copy_from_slice(&[0x10, 0x246, OTHER + 8]);
    words[14] = after(9);
    let mut fake = Fake::new(words);
    fake.stacks.push((OTHER, {
        let mut other = vec![0; 2048];
        other[3] = after(2);
        other
    }));
    let stack = unwind(&fake, &start(0), 64);
    let expected = [
        (TEXT + 0x10, STACK, true),
        (TEXT + 0x123, STACK + 9 * 8, false),
        (after(2), OTHER + 3 * 8, false),
    ];
    assert_eq!(frames(&stack), expected);
    // With another code segment or impossible flags it is none.
    for (n, value) in [(10, 0x33), (11, 0x8_0000_0246), (11, 0x244)] {
        let mut other = Fake::new(fake.stacks[0].1.clone());
        other.stacks[0].1[n] = value;
        let stack = unwind(&other, &start(0), 64);
        assert_eq!(frames(&stack)[1], (after(9), STACK + 14 * 8, false), "{n}: {value:#x}");
    }
}

#[test]
fn it_ends_where_a_program_was_left() {
    let program = 0x40_1000;
    let mut words = vec![0; 2048];
    words[3] = after(1);
    words[5] = program;
    words[6..10].copy_from_slice(&[0x33, 0x246, 0x7fff_0000, 0x2b]);
    words[11] = after(2);
    let mut fake = Fake::new(words);
    fake.stacks.push((program, vec![0; 4]));
    let stack = unwind(&fake, &start(0), 64);
    let expected = [
        (TEXT + 0x10, STACK, true),
        (after(1), STACK + 3 * 8, false),
        (program, STACK + 5 * 8, false),
    ];
    assert_eq!(frames(&stack), expected);
    assert!(stack.end.contains("a program"), "{}", stack.end);
    // Where nothing is, or by segments that no program has, it is something else.
    for (n, value) in [(5, 0x50_0000), (6, 0x10), (7, 0x244), (8, STACK), (9, 0x18)] {
        let mut other = Fake::new(fake.stacks[0].1.clone());
        other.stacks[0].1[n] = value;
        other.stacks.push((program, vec![0; 4]));
        let stack = unwind(&other, &start(0), 64);
        assert_eq!(
            frames(&stack).last(),
            Some(&(after(2), STACK + 11 * 8, false)),
            "{n}: {value:#x}"
        );
    }
}

#[test]
fn small_kernels_have_no_programs() {
    // All of it is mapped where it is, and its numbers look like addresses, segments and flags.
    let low = 0x8000;
    let mut words = vec![0; 2048];
    words[5..10].copy_from_slice(&[low, 0x33, 0x246, 0x7000, 0x2b]);
    words[11] = after(2);
    let mut fake = Fake::new(Vec::new());
    fake.stacks = vec![(low, words)];
    let start = Start { stack: low, ..start(0) };
    let expected = [(TEXT + 0x10, low, true), (after(2), low + 11 * 8, false)];
    let stack = unwind(&fake, &start, 64);
    assert_eq!(frames(&stack), expected);
    assert_eq!(stack.end, "a stack of 16 KiB ends at 0xc000");
}

#[test]
fn an_interrupts_own_stack_leads_back_too() {
    let mut words = vec![0; 2048];
    words[4] = after(1);
    (words[2046], words[2047]) = (after(BACK_FROM), OTHER + 16);
    let mut fake = Fake::new(words);
    let mut other = vec![0; 2048];
    other[1] = after(2);
    other[2] = after(3);
    // Two stacks that lead to each other are not read for ever.
    (other[2046], other[2047]) = (after(BACK_FROM), STACK);
    fake.stacks.push((OTHER, other));
    let stack = unwind(&fake, &start(0), 64);
    let found: Vec<_> = stack.frames.iter().map(|frame| frame.address).collect();
    let (back, round) = (after(BACK_FROM), [after(1), after(BACK_FROM), after(3)]);
    assert_eq!(found, [&[TEXT + 0x10], &round[..], &[back], &round, &[back]].concat());
    assert!(stack.end.contains("4 stacks were searched"), "{}", stack.end);
}

#[test]
fn an_interrupts_own_stack_begins_at_any_page() {
    // From the last page of 16 KiB on, over three pages of the next ones; a page is 512 words.
    let words = |last: [u64; 2]| {
        let mut words = vec![0; 4096];
        words[2047 - 3] = after(1);
        words[2048 + 7] = after(2);
        words[2048 + 1534..2048 + 1536].copy_from_slice(&last);
        // What is behind it is not part of it.
        words[2048 + 1537] = after(5);
        words
    };
    let found = |last, stack| {
        let mut fake = Fake::new(words(last));
        fake.stacks.push((OTHER, vec![0, 0, after(3), 0]));
        let start = Start { stack, ..start(0) };
        let frames = unwind(&fake, &start, 64).frames;
        frames.iter().skip(1).map(|frame| frame.address).collect::<Vec<_>>()
    };
    let back = after(BACK_FROM);
    let (before, behind) = (STACK + 8 * (2048 - 16), STACK + 8 * 2048);
    assert_eq!(found([back, OTHER], before), [after(1), after(2), back, after(3)]);
    assert_eq!(found([back, OTHER], behind), [after(2), back, after(3)]);
    // A call that goes on on the same stack, an address of a program, one that is no stack pointer or not there, one on the same stack: no such end.
    for last in [
        [after(6), OTHER],
        [back, 0x7fff_0000],
        [back, OTHER + 1],
        [back, OTHER + 8 * 4],
        [back, behind],
    ] {
        assert_eq!(found(last, before), [after(1)], "{last:x?}");
        assert_eq!(found(last, behind), [after(2), last[0], after(5)], "{last:x?}");
    }
}

#[test]
fn it_ends_where_nothing_is_mapped() {
    let stack = unwind(&Fake::new(vec![0, after(1), 0]), &start(0), 64);
    assert_eq!(frames(&stack).len(), 2);
    assert_eq!(
        stack.end,
        format!("nothing is mapped at {:#x}, where the stack goes on", STACK + 24)
    );
    let mut nowhere = start(0);
    nowhere.stack = u64::MAX - 3;
    let stack = unwind(&Fake::new(Vec::new()), &nowhere, 64);
    assert_eq!(frames(&stack), [(TEXT + 0x10, u64::MAX - 3, true)]);
}

#[test]
fn no_more_frames_come_than_were_asked_for() {
    let fake = Fake::new(vec![after(1); 2048]);
    for (most, count) in [(0, 0), (1, 1), (64, 64), (256, 256), (1000, 256)] {
        let stack = unwind(&fake, &start(0), most);
        assert_eq!(stack.frames.len(), count);
        assert!(stack.end.contains("asked for"), "{}", stack.end);
    }
}

#[test]
fn programs_have_their_own_text() {
    let mut fake = Fake::new(vec![after(1), 0]);
    let user = Start { user: true, ..start(0) };
    assert_eq!(unwind(&fake, &user, 64).frames.len(), 1);
    fake.user = true;
    assert_eq!(unwind(&fake, &user, 64).frames.len(), 2);
    // A kernel that lets programs get at its text.
    assert_eq!(unwind(&fake, &start(0), 64).frames.len(), 2);
    let elsewhere = Start {
        instruction: STACK,
        ..start(0)
    };
    assert_eq!(unwind(&fake, &elsewhere, 64).frames.len(), 1);
}

#[test]
fn where_a_vcpu_is_depends_on_its_mode() {
    let segment = |base, l, db| kvm_segment {
        base,
        l,
        db,
        ..kvm_segment::default()
    };
    let mut dump = RegisterDump {
        regs: kvm_regs {
            rip: 0x123,
            rsp: 0x456,
            rbp: 0x789,
            ..kvm_regs::default()
        },
        sregs: kvm_sregs {
            efer: LONG_MODE_ACTIVE,
            cs: segment(0x1000, 1, 0),
            ss: segment(0x2000, 0, 1),
            ..kvm_sregs::default()
        },
        ..RegisterDump::default()
    };
    let of = |dump: &RegisterDump| {
        let start = Start::of(dump);
        (start.instruction, start.stack, start.frame, start.word)
    };
    assert_eq!(of(&dump), (0x123, 0x456, 0x789, Some(8)));
    dump.sregs.cs.l = 0;
    dump.sregs.cs.db = 1;
    assert_eq!(of(&dump), (0x1123, 0x2456, 0x2789, Some(4)));
    dump.sregs.cs.db = 0;
    assert_eq!(of(&dump), (0x1123, 0x2456, 0x2789, None));
    let stack = unwind(&Fake::new(Vec::new()), &Start::of(&dump), 64);
    assert_eq!(frames(&stack), [(0x1123, 0x2456, true)]);
    assert!(stack.end.contains("16-bit"), "{}", stack.end);
}

#[test]
fn all_forms_of_calls_are_known() {
    let calls: [&[u8]; 10] = [
        &[0xe8, 1, 2, 3, 4],             // call rel32
        &[0xff, 0xd0],                   // call *%rax
        &[0x41, 0xff, 0xd3],             // call *%r11
        &[0xff, 0x10],                   // call *(%rax)
        &[0xff, 0x50, 0x18],             // call *0x18(%rax)
        &[0xff, 0x14, 0xc5],             // call *(%rbp,%rax,8), short form
        &[0xff, 0x54, 0x24, 0x08],       // call *8(%rsp)
        &[0xff, 0x15, 1, 2, 3, 4],       // call *disp32(%rip)
        &[0xff, 0x92, 1, 2, 3, 4],       // call *disp32(%rdx)
        &[0xff, 0x14, 0xc5, 1, 2, 3, 4], // call *disp32(,%rax,8)
    ];
    for call in calls {
        let mut before = [0x90; LONGEST_CALL];
        before[LONGEST_CALL - call.len()..].copy_from_slice(call);
        assert!(ends_with_call(&before), "{call:x?}");
    }
    let others: [&[u8]; 5] = [
        &[0xe9, 1, 2, 3, 4], // jmp rel32
        &[0xff, 0xe0],       // jmp *%rax
        &[0xff, 0x30],       // push (%rax)
        &[0xc3],             // ret
        &[0xff, 0x14],       // half of a call
    ];
    for other in others {
        let mut before = [0x90; LONGEST_CALL];
        before[LONGEST_CALL - other.len()..].copy_from_slice(other);
        assert!(!ends_with_call(&before), "{other:x?}");
    }
}

/// Words as a hostile guest would put them: into text, onto the stacks, flags, segments, and anything.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0..TEXT_SIZE).prop_map(|offset| TEXT + offset),
        (0..256_u64).prop_map(after),
        (0..2048_u64).prop_map(|n| STACK + 8 * n),
        (0..2048_u64).prop_map(|n| OTHER + 8 * n),
        Just(0x10),
        Just(0x246),
        any::<u64>(),
    ]
}

proptest! {
    // Each looks at some thousands of words.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_is_on_the_stack_it_ends_soon(
        words in proptest::collection::vec(word(), 1..600),
        other in proptest::collection::vec(word(), 1..600),
        at in prop_oneof![(0..4800_u64).prop_map(|n| STACK + n), any::<u64>()],
        frame in word(),
        most in 0..400_usize,
        narrow in any::<bool>(),
        user in any::<bool>(),
    ) {
        let mut fake = Fake::new(words.iter().copied().cycle().take(2048).collect());
        fake.stacks.push((OTHER, other.iter().copied().cycle().take(2048).collect()));
        fake.user = user;
        let start = Start {
            stack: at,
            word: Some(if narrow { 4 } else { 8 }),
            user,
            ..start(frame)
        };
        let stack = unwind(&fake, &start, most);
        prop_assert!(stack.frames.len() <= most.min(MOST_FRAMES));
        prop_assert!(!stack.end.is_empty());
        // A word, and what may be around it, for each place that is looked at.
        prop_assert!(fake.reads.get() <= 10 * (MOST_STACKS * 2048 * 8 + 8192 * 2 + MOST_FRAMES));
        for frame in stack.frames.iter().skip(1) {
            prop_assert!(fake.is_text(frame.address, fake.user) || frame.address < PROGRAMS);
            let (mut there, word) = ([0; 8], if narrow { 4 } else { 8 });
            let read = fake.read(frame.stack_pointer, &mut there[..word]);
            prop_assert!(read);
            prop_assert_eq!(u64::from_le_bytes(there), frame.address);
        }
    }
}
