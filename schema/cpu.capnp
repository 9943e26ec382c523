@0xe1b7c04a5d92f683;
# The vCPUs of a guest, and what the host's scheduler gives them.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "facet.capnp".Facet;
using Guests = import "guest.capnp";

interface CpuController extends (Facet) {
  # Looking needs the right `observe`, setting the right `cpu`. What is set holds for this guest under all its restarts, until it ends.

  list @0 () -> ListResult;
  # The vCPUs in order.

  pin @1 (vcpu :UInt8, cpus :List(UInt16)) -> Completion;
  # Lets a vCPU run on these processors of the host only; none: on all that the component may. BAD_CONFIG for a vCPU that is not there, for more than
  # 1024 processors, and where none of them is there.

  scheduler @2 () -> SchedulerResult;

  setScheduler @3 (scheduler :Scheduler) -> Completion;
  # Takes effect at once. NOT_SUPPORTED where the host's control groups do not reach that far: the message says what is lacking.

  struct ListResult {
    union {
      vcpus @0 :List(Vcpu);
      error @1 :Error;
    }
  }

  struct SchedulerResult {
    union {
      scheduler @0 :Scheduler;
      error @1 :Error;
    }
  }

  struct Vcpu {
    index @0 :UInt8;
    state @1 :Guests.VcpuState;
    cpuTimeNs @2 :UInt64;
    # CPU time of the vCPU's thread.
    waitTimeNs @3 :UInt64;
    # How long it was ready to run and did not, because others did (the host's run queue).
    hostThread @4 :UInt32;
    # Thread id on the host; 0 if there is none.
    hostCpu @5 :UInt16;
    # The processor on which it ran last.
    cpus @6 :List(UInt16);
    # Those on which it may run.
  }

  struct Scheduler {
    # What share of the host's processors the guest has as a whole, its component's other threads included.
    weight @0 :UInt32;
    # 1 to 10000, relative to others (cpu.weight); 0: the host's default, 100.
    percent @1 :UInt32;
    # At most that much CPU time, in percent of one processor, up to 100000 (cpu.max); 0: no limit.
  }
}
