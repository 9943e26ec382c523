@0xaca0d79788863bed;
# What a guest is made of.
#
# A field that this version cannot honour is refused with NOT_SUPPORTED naming the field, never ignored. Zero values mean the documented
# default, so that an empty GuestConfig is a valid one.

using import "file.capnp".File;
using import "file.capnp".FdRef;

enum Toggle {
  # A device that is there by default, or not.
  byDefault @0;
  on @1;
  off @2;
}

struct GuestConfig {
  name @0 :Text;
  # 1 to 64 characters: letters, digits, '.', '_' and '-', starting with a letter or digit. Unique among the guests of a manager. Empty: the
  # manager chooses one (launch), or the name given to newGuest holds.

  instanceId @1 :Data;
  # Identifies the guest to what runs in it, across restarts: 64 bytes, or empty for none. Other lengths are BAD_CONFIG.

  kernel @2 :File;
  # ELF (PVH note, or 64-bit entry), or bzImage. None: the small guest that is built into Sepal.

  initrd @3 :File;
  # Initial RAM file system, as is. None: there is none.

  dtbOverlay @4 :File;
  # Device tree overlay. Not supported on x86-64.

  firmware @5 :File;
  # Firmware image to start from instead of a kernel. Not supported yet.

  cmdline @6 :Text;
  # Kernel command line. With the additions at most 2047 bytes, without control characters.

  cmdlineAdd @7 :List(Text);
  # Appended to `cmdline`, separated by a space each. At most 64.

  cpus @8 :UInt8;
  # Number of vCPUs, 1 to 64. 0: one.

  memoryMib @9 :Int32;
  # Guest memory in MiB. 0 or negative: 256 MiB. More than the host has available: GUEST_INITIALIZATION_FAILURE with the numbers.

  hugePages @10 :Bool;
  # Back guest memory with transparent huge pages where the host allows it.

  disks @11 :List(Disk);
  # Block devices in the order in which the guest finds them, at most 32.

  networks @12 :List(Network);
  # Network devices in order, at most 32.

  defaultNetwork @13 :Toggle;
  # A network device as the manager's policy would configure it, besides `networks`. Default: off.

  console @14 :Console;
  # virtio console. Default: off.

  rng @15 :Rng;
  # virtio entropy source. Default: off.

  balloon @16 :Balloon;
  # virtio balloon. Default: off.

  gpu @17 :Toggle;
  # virtio GPU. Not supported.

  sound @18 :Toggle;
  # virtio sound output. Not supported.

  soundInput @19 :Toggle;
  # virtio sound input. Not supported.

  vsock @20 :Vsock;
  # virtio vsock. Default: off.

  memoryDevice @21 :MemoryDevice;
  # virtio memory device. Default: off.

  customMemory @22 :List(MemoryBacking);
  # Ranges of guest memory that are backed by files of the client's, at most 16, not overlapping.

  protectedVm @23 :Bool;
  # The guest's memory is hidden from the host. Refused with NOT_SUPPORTED on a host that cannot.

  hypervisorSpecificAuthMethod @24 :Bool;
  # Authenticate guests by the hypervisor's own means. There is none: NOT_SUPPORTED.

  shares @25 :List(Share);
  # Host folders that the guest can mount, at most 16. Not supported yet.

  onReset @26 :OnReset;
  # What happens when the guest resets itself.

  limits @27 :Limits;
  # What the host lets the component use at most.

  waivedLayers @28 :List(Text);
  # Layers of the jail (by the names that GuestInfo.layers shows) which may be missing without the start failing. At most 32; default: none.

  watchdog @29 :Toggle;
  # Watchdog device. Not supported yet.
  generationId @30 :Toggle;
  # VM generation id device. Not supported yet.
  panicDevice @31 :Toggle;
  # pvpanic device. Not supported yet.

  struct Disk {
    id @0 :Text;
    # What the guest reads as the device's serial number: at most 20 bytes of ASCII, unique. Empty: none.
    image @1 :File;
    # The image; read-write for readWrite, readable for the others.
    mode @2 :Mode;
    format @3 :Format;
    direct @4 :Bool;
    # Go around the host's page cache (O_DIRECT).
    blockSize @5 :UInt32;
    # Logical block size in bytes: 512 or 4096. 0: 512.
    rateLimit @6 :RateLimit;

    enum Mode {
      readWrite @0;
      readOnly @1;
      volatileWrite @2;
      # Writes are kept until the guest stops, then forgotten; the image stays as it was.
    }
    enum Format {
      raw @0;
      qcow2 @1;
    }
  }

  struct Network {
    mac @0 :Data;
    # Six bytes, a unicast address. Empty: derived from the guest's name and the device's place, so that it stays the same.
    union {
      user @1 :Void;
      # User-mode networking: the guest reaches out, nobody reaches in.
      tap @2 :FdRef;
      # A tap device that the client opened.
      tapNamed @3 :Text;
      # A tap device that the manager opens or makes, where it may.
      bridge @4 :Text;
      # A tap device joined to this bridge, where the manager may.
    }
    mtu @5 :UInt16;
    # Bytes; 0: 1500.
    rateLimit @6 :RateLimit;
  }

  struct Console {
    enabled @0 :Toggle;
    ports @1 :UInt16;
    # Number of ports, 1 to 32; 0: one.
  }

  struct Rng {
    enabled @0 :Toggle;
    rateLimit @1 :RateLimit;
  }

  struct Balloon {
    enabled @0 :Toggle;
    deflateOnOom @1 :Bool;
    freePageReporting @2 :Bool;
  }

  struct Vsock {
    enabled @0 :Toggle;
    cid @1 :UInt32;
    # The guest's context id, 3 or more and unique on the host. 0: the manager chooses.
    listenPorts @2 :List(UInt32);
    # Ports on which the host listens from the start; each once.
    socketPath @3 :Text;
    # Where to offer the "CONNECT port" convention as a Unix socket; empty: nowhere.
  }

  struct MemoryDevice {
    enabled @0 :Toggle;
    blockSize @1 :UInt64;
    # Bytes, a power of two of at least 2 MiB. 0: 2 MiB.
    regionSize @2 :UInt64;
    # Bytes that can be plugged at most.
    regionAlignment @3 :UInt64;
    # Bytes, a power of two. 0: the block size.
    requested @4 :UInt64;
    # Bytes plugged at start.
  }

  struct MemoryBacking {
    memfd @0 :FdRef;
    # Must carry F_SEAL_SHRINK, so that nobody can take the memory away from under the guest: else BAD_CONFIG.
    start @1 :UInt64;
    # First guest physical address, a multiple of 4096.
    end @2 :UInt64;
    # First address after the range, a multiple of 4096, greater than `start`.
  }

  struct Share {
    tag @0 :Text;
    backend @1 :FdRef;
    # A connected vhost-user socket.
  }

  struct RateLimit {
    # A token bucket. Zero: no limit.
    bytesPerSecond @0 :UInt64;
    operationsPerSecond @1 :UInt64;
    burstBytes @2 :UInt64;
    burstOperations @3 :UInt64;
  }

  struct Limits {
    # Enforced by the host's control groups. A limit that is asked for and cannot be enforced fails the start.
    memoryMib @0 :UInt64;
    # Memory of the component and its guest together, less than 2^43; 0: no limit.
    cpuPercent @1 :UInt32;
    # CPU time, in percent of one CPU, at most 100000; 0: no limit.
    cpuWeight @2 :UInt32;
    # 1 to 10000, relative to others; 0: the host's default.
    tasks @3 :UInt32;
    # Threads of the component, at most 4194304; 0: no limit.
  }

  enum OnReset {
    stop @0;
    # The guest is stopped, and the reason says that it had reset itself.
    restart @1;
    # The guest is created and run again from the same configuration. Not supported yet.
  }
}
