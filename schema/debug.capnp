@0x8ad4b91e57c20f36;
# Looking into a guest. Needs the right `debug`. A vCPU that does not come out of the guest for it within 2 s, or a component that does not answer within 5 s, is TIMED_OUT.

using import "error.capnp".Error;
using import "facet.capnp".Facet;

interface Debug extends (Facet) {
  registers @0 (vcpu :UInt8) -> RegistersResult;
  # The registers of a vCPU, which leaves the guest for a moment and goes on, unless the guest is paused. BAD_CONFIG for a vCPU that is not there.

  readPhysical @1 (address :UInt64, length :UInt32) -> MemoryResult;
  # Guest memory by physical address, as it is at this moment: at most 65536 bytes, none for a length of 0. BAD_CONFIG naming the first address
  # of the range that is not memory.

  readVirtual @2 (vcpu :UInt8, address :UInt64, length :UInt32) -> MemoryResult;
  # Guest memory by virtual address, through the page tables that the vCPU uses at this moment: at most 65536 bytes, none for a length of 0. BAD_CONFIG
  # naming the first address of the range that is not mapped, or not to memory.

  translate @3 (vcpu :UInt8, address :UInt64) -> TranslateResult;
  # Where a virtual address leads.

  stack @4 (vcpu :UInt8, most :UInt16 = 64) -> StackResult;
  # The calls that the vCPU is in, innermost first, as far as they can be read: by frame pointers while these lead on, and by what looks like return
  # addresses on the stack before the first of them and after the last. At most 256 frames.

  struct TranslateResult {
    union {
      translation @0 :Translation;
      error @1 :Error;
    }
  }

  struct Translation {
    physical @0 :UInt64;
    pageSize @1 :UInt64;
    # Bytes: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 0 where the vCPU uses no page tables.
    writable @2 :Bool;
    user @3 :Bool;
    executable @4 :Bool;
  }

  struct StackResult {
    union {
      frames @0 :List(Frame);
      error @1 :Error;
    }
    end @2 :Text;
    # Why it ends there.
  }

  struct Frame {
    address @0 :UInt64;
    # Of the instruction: where the vCPU is, then where each call returns to.
    stackPointer @1 :UInt64;
    # Where that was read; of the first frame, the stack pointer.
    reliable @2 :Bool;
    # Frame pointers led there. Otherwise it only looks like a return address.
  }

  struct RegistersResult {
    union {
      registers @0 :Registers;
      error @1 :Error;
    }
  }

  struct MemoryResult {
    union {
      bytes @0 :Data;
      error @1 :Error;
    }
  }
}

struct Registers {
  # Of an x86-64 processor.
  rax @0 :UInt64;
  rbx @1 :UInt64;
  rcx @2 :UInt64;
  rdx @3 :UInt64;
  rsi @4 :UInt64;
  rdi @5 :UInt64;
  rsp @6 :UInt64;
  rbp @7 :UInt64;
  r8 @8 :UInt64;
  r9 @9 :UInt64;
  r10 @10 :UInt64;
  r11 @11 :UInt64;
  r12 @12 :UInt64;
  r13 @13 :UInt64;
  r14 @14 :UInt64;
  r15 @15 :UInt64;
  rip @16 :UInt64;
  rflags @17 :UInt64;
  cr0 @18 :UInt64;
  cr2 @19 :UInt64;
  cr3 @20 :UInt64;
  cr4 @21 :UInt64;
  cr8 @22 :UInt64;
  efer @23 :UInt64;
  cs @24 :UInt16;
  ds @25 :UInt16;
  es @26 :UInt16;
  fs @27 :UInt16;
  gs @28 :UInt16;
  ss @29 :UInt16;
  fsBase @30 :UInt64;
  gsBase @31 :UInt64;
  cpl @32 :UInt8;
  # Current privilege level.
  halted @33 :Bool;
  # It waits for an interrupt.
}
