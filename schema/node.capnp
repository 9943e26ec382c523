@0xd27f90b6a3e8c415;
# What the host of a manager is, has and offers.

struct NodeInfo {
  hostName @0 :Text;
  kernel @1 :Text;
  # "6.1.0-44-amd64"
  version @2 :Text;
  # Of the manager.
  cpuModel @3 :Text;
  cpus @4 :UInt32;
  # Processors that are online.
  usableCpus @5 :UInt32;
  # Of these, how many the manager and its guests may run on.
  sockets @6 :UInt32;
  coresPerSocket @7 :UInt32;
  threadsPerCore @8 :UInt32;
  mhz @9 :UInt32;
  # 0 if the host does not tell.
  memoryBytes @10 :UInt64;
  freeBytes @11 :UInt64;
  # Unused by anybody.
  availableBytes @12 :UInt64;
  # What new programs can have without swapping, as far as the host can tell (MemAvailable).
  cells @13 :List(Cell);
  # NUMA cells, at least one.
  kvm @14 :Kvm;
  layers @15 :List(Layer);
  # The layers of the jail, and whether this host offers them to this manager.
  findings @16 :List(Finding);
  # What is not as it should be, worst first; empty on a host that offers everything.
  capacity @17 :Capacity;

  struct Cell {
    id @0 :UInt32;
    memoryBytes @1 :UInt64;
    freeBytes @2 :UInt64;
    cpus @3 :List(UInt16);
    distances @4 :List(UInt16);
    # To each of the cells in order, 10 to itself.
    hugePages @5 :List(HugePages);
  }

  struct HugePages {
    sizeBytes @0 :UInt64;
    total @1 :UInt64;
    free @2 :UInt64;
  }

  struct Kvm {
    usable @0 :Bool;
    detail @1 :Text;
    # Why not, if not.
    apiVersion @2 :UInt32;
    hardware @3 :Bool;
    # The processor's own virtualization is used. Otherwise guests run slowly, with help.
    maxVcpus @4 :UInt32;
    capabilities @5 :List(Capability);
  }

  struct Capability {
    name @0 :Text;
    # "KVM_CAP_IRQFD"
    value @1 :Int32;
    # What KVM_CHECK_EXTENSION returns; 0: it is not there.
    needed @2 :Bool;
    # Sepal does not work without it.
  }

  struct Layer {
    name @0 :Text;
    offered @1 :Bool;
    detail @2 :Text;
    # What the host offers or lacks.
    remedy @3 :Text;
    # How to get it; empty if it is there.
  }

  struct Finding {
    severity @0 :Severity;
    about @1 :Text;
    # What it is about: "kvm", "cgroup", "landlock", "limits"...
    what @2 :Text;
    remedy @3 :Text;

    enum Severity {
      problem @0;
      # Guests cannot be started, or some of them.
      warning @1;
      # Something is weaker or slower than it could be.
      note @2;
    }
  }

  struct Capacity {
    # What the manager's own limits are, and how much of them is used.
    guests @0 :UInt32;
    maxGuests @1 :UInt32;
    descriptors @2 :UInt64;
    maxDescriptors @3 :UInt64;
    tasks @4 :UInt64;
    # Of the manager's user or control group, whichever is nearer to its limit.
    maxTasks @5 :UInt64;
    memoryBytes @6 :UInt64;
    # Memory that guests were promised.
    maxMemoryBytes @7 :UInt64;
    # What may be promised to guests at most; 0: what the host has available at the moment.
  }
}

struct PressurePolicy {
  # What the manager does when the host runs short of memory. All guests with a balloon take part whose balloon nobody has set by hand.

  enabled @0 :Bool;
  stallPercent @1 :UInt8;
  # Pressure begins when tasks of the host stall for memory this share of the time (PSI, "some"), 1 to 100; 0: 10.
  windowMs @2 :UInt32;
  # In each window of so many milliseconds, 500 to 10000; 0: 1000.
  stepPercent @3 :UInt8;
  # How much of a guest's memory is taken at a time, 1 to 50; 0: 5.
  reservePercent @4 :UInt8;
  # What each guest keeps at least of its memory, 10 to 100; 0: 50.
  calmMs @5 :UInt32;
  # How long there has to be no pressure before memory is given back, a step at a time, at most 3600000; 0: 10000.
}

struct PressureState {
  supported @0 :Bool;
  detail @1 :Text;
  # Why not, if not.
  policy @2 :PressurePolicy;
  # As it is used: no zeros.
  underPressure @3 :Bool;
  takenBytes @4 :UInt64;
  # Taken from guests at the moment.
  inflations @5 :UInt64;
  # How often memory was taken, and given back, so far.
  deflations @6 :UInt64;
}
