@0x8ad4b91e57c20f36;
# Looking into a guest. Needs the right `debug`.

using import "error.capnp".Error;
using import "facet.capnp".Facet;

interface Debug extends (Facet) {
  registers @0 (vcpu :UInt8) -> RegistersResult;
  # The registers of a vCPU, which leaves the guest for a moment and goes on, unless the guest is paused. BAD_CONFIG for a vCPU that is not there.

  readPhysical @1 (address :UInt64, length :UInt32) -> MemoryResult;
  # Guest memory by physical address, as it is at this moment: at most 65536 bytes, none for a length of 0. BAD_CONFIG naming the first address
  # of the range that is not memory.

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
