@0xaca0d79788863bed;
# What a guest is made of.
#
# A field that this version cannot honour is refused with NOT_SUPPORTED naming the field, never ignored. Zero values mean the documented
# default, so that an empty GuestConfig is a valid one.

using import "file.capnp".File;
using import "file.capnp".FdRef;
using import "vsock.capnp".VsockAcceptor;

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
  # Identifies the guest to what runs in it, across restarts: 64 bytes, or empty for none. Other lengths are BAD_CONFIG. The guest finds it as the
  # unique id (_UID, 128 lower-case hexadecimal digits) of the ACPI device SEPL0002.

  kernel @2 :File;
  # ELF (PVH note, or 64-bit entry), or bzImage. None: the small guest that is built into Sepal.

  initrd @3 :File;
  # Initial RAM file system, as is, for the `kernel`. None: there is none. BAD_CONFIG without a kernel: the default guest reads none.

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
  # Block devices in the order in which the guest finds them, at most 32. All devices on the bus together (`disks`, `networks`, `shares`,
  # `vhostUser`, and each of console, rng, balloon, vsock, memoryDevice) are at most 32, too: else BAD_CONFIG about `devices`.

  networks @12 :List(Network);
  # Network devices in order, at most 32.

  defaultNetwork @13 :Toggle;
  # A network device after `networks` as `Network.user` makes it, with nothing else set. Default: off.

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
  # The guest's memory is hidden from the host. Not supported yet: NOT_SUPPORTED says whether the host could, and what it lacks if not.

  hypervisorSpecificAuthMethod @24 :Bool;
  # Authenticate guests by the hypervisor's own means. There is none: NOT_SUPPORTED.

  shares @25 :List(Share);
  # Host folders that the guest can mount, each served by a vhost-user file system back end, at most 16.

  onReset @26 :OnReset;
  # What happens when the guest resets itself (its watchdog included).

  limits @27 :Limits;
  # What the host lets the component use at most.

  waivedLayers @28 :List(Text);
  # Layers of the jail (by the names that GuestInfo.layers shows) which may be missing without the start failing. At most 32; default: none.

  watchdog @29 :Toggle;
  # Watchdog device: expires unless the guest keeps writing to it, and then does `watchdogAction`. Default: off.

  generationId @30 :Toggle;
  # VM generation id device: tells the guest by a new number that it is not the machine any more which it was. Default: off.

  panicDevice @31 :Toggle;
  # pvpanic device: the guest's kernel tells through it that it has panicked. Default: off.

  watchdogAction @32 :WatchdogAction;
  # What happens when the watchdog expires, besides the event.

  vhostUser @33 :List(VhostUser);
  # Devices that other processes serve, at most 16. Such a process sees all of the guest's memory.

  agent @34 :Toggle;
  # Whether `Guest.agent` talks to an agent in the guest, over vsock port 1024: needs `vsock`, and BAD_CONFIG if that is off. On by default
  # where there is a vsock device.

  onPanic @35 :OnPanic;
  # What happens when the guest's kernel tells that it has panicked; BAD_CONFIG without `panicDevice`, unless leave.

  uuid @36 :Data;
  # Identifies the guest to whoever manages it: 16 bytes, not all zero, in the order of RFC 9562; unique among the guests of a manager, defined ones
  # included: else ALREADY_BOUND. Empty: the manager makes one (version 4). The guest itself is not told.

  restart @37 :Restart;
  # What follows when it ends by itself. Default: nothing. `onReset` and `onPanic` count before this.

  durable @38 :Bool;
  # It goes on when its manager ends, and the next manager takes it over; whoever holds its lease has 30 s to redeem it there. NOT_SUPPORTED about
  # `durable` where the manager keeps no state, or about what cannot go on alone (a network of `user`).

  pins @39 :List(Pin);
  # Which processors of the host its vCPUs may run on. Those not named here: all that the component may.

  struct Restart {
    # Runs that failed in a row are followed by longer and longer waits, and by giving up: the guest's status is then crashLoop.
    policy @0 :Policy;
    attempts @1 :UInt32;
    # How many failed runs in a row it is begun again after; one more, and it is given up. 0: 5. A run of `healthyMs` ends a row.
    delayMs @2 :UInt32;
    # Milliseconds before it is begun again the first time, twice as many before each further one of a row. 0: 100.
    maxDelayMs @3 :UInt32;
    # The longest wait. 0: 30000. BAD_CONFIG if less than `delayMs`.
    healthyMs @4 :UInt32;
    # How long a run has to last to count as a good one. 0: 10000.

    enum Policy {
      never @0;
      onFailure @1;
      # When it crashed, or its component died. Not when it was made to end.
      always @2;
      # Also when it shut itself down. Not when it was asked to, or stopped by force.
    }
  }

  struct Pin {
    vcpu @0 :UInt8;
    # Each at most once; BAD_CONFIG for one that the guest has not.
    cpus @1 :List(UInt16);
    # Numbers of processors of the host, 1 to 1024 of them. BAD_CONFIG where none of them is there, or may be used.
  }

  enum OnPanic {
    leave @0;
    # Whatever the guest does about it: halt, reboot, write a dump.
    stop @1;
    # It is stopped by force; the reason is crash.
    restart @2;
    # It is created and run again, as by Power.reset.
    pause @3;
    # It is paused, to be looked into.
  }

  enum WatchdogAction {
    reset @0;
    # The guest is reset; `onReset` says what that means.
    stop @1;
    # The guest is stopped by force.
    none @2;
    # Nothing else.
  }

  struct Disk {
    id @0 :Text;
    # What the guest reads as the device's serial number: at most 20 bytes of printable ASCII without blanks, unique among the disks. Empty:
    # none.

    image @1 :File;
    # The image, a regular file or a block device; read-write for readWrite, readable for the others. `bytes` and `upload` only with
    # readOnly or volatileWrite. An image that another guest of this host writes to, or a readWrite one that another guest uses at all, is
    # ALREADY_RUNNING naming that guest.

    mode @2 :Mode;
    format @3 :Format;

    direct @4 :Bool;
    # Go around the host's page cache (O_DIRECT). DEVICE_INITIALIZATION_FAILURE where the image's file system cannot.

    blockSize @5 :UInt32;
    # Logical block size in bytes: 512 or 4096. 0: 512. The size of the image must be a multiple of it.

    rateLimit @6 :RateLimit;

    backing @7 :List(File);
    # The files below a qcow2 image, nearest first, at most 8, each readable. An image that names a backing file needs it here: names inside
    # images are never followed. BAD_CONFIG for raw.

    queues @8 :UInt16;
    # Number of request queues, 1 to 16; 0: one. More than the guest has vCPUs are of no use.

    backingFormat @9 :List(Format);
    # The format of each of `backing`, in the same order; missing ones are unspecified, as at `format`.

    scratch @10 :File;
    # Where a volatileWrite disk keeps what is written: an empty regular file, open for reading and writing; never `bytes` nor `upload`. None:
    # the manager makes one without a name in its folder for such files. BAD_CONFIG for the other modes.

    enum Mode {
      readWrite @0;
      readOnly @1;
      # The guest is told so, and a write is refused all the same.
      volatileWrite @2;
      # Writes are kept until the guest stops, then forgotten; the image stays as it was.
    }
    enum Format {
      unspecified @0;
      # Raw; but BAD_CONFIG if the file begins as a qcow2 image does, so that nobody takes one for the other by mistake. Formats are never
      # guessed: the guest could write what makes the next guess read another file.
      raw @1;
      qcow2 @2;
    }
  }

  struct Network {
    mac @0 :Data;
    # Six bytes, a unicast address that is not all zero. Empty: derived from the guest's name and the device's place, so that it stays the
    # same.

    union {
      user @1 :Void;
      # User-mode networking: the guest reaches out, nobody reaches in. FAILED_SERVICE_CONNECT if this host lacks the program for it.
      tap @2 :List(FdRef);
      # A tap device that the client opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: one descriptor for each queue pair (more than one needs
      # IFF_MULTI_QUEUE), at most 8.
      tapNamed @3 :Text;
      # A tap device of that name which the manager opens, or makes where it may and takes away again at the end. 1 to 15 bytes. Empty: of a
      # name that the manager chooses. PERMISSION_DENIED where the manager lacks the privilege, or the client may not name one.
      bridge @4 :Text;
      # A tap device that the manager makes and joins to the bridge of this name, where it may.
      socket @7 :FdRef;
      # A connected Unix stream socket that carries Ethernet frames, each after its length as 4 bytes, big-endian: what passt and QEMU's
      # "-netdev stream" speak.
    }

    mtu @5 :UInt16;
    # Bytes, 68 to 65520; 0: 1500. The guest is told.

    rateLimit @6 :RateLimit;
    # In each direction.

    queuePairs @8 :UInt16;
    # 1 to 8; 0: one (tap: as many as descriptors). More than one only with tap, tapNamed and bridge.

    offloads @9 :Toggle;
    # Checksums and segmentation are left to the host. Default: on where the other side can take them.

    linkDown @10 :Bool;
    # The link is down until NetController.setLink brings it up.
  }

  struct Console {
    enabled @0 :Toggle;
    ports @1 :UInt16;
    # Number of ports, 1 to 32; 0: one. Those after port 0 are named "port1", "port2"...
    consolePorts @2 :UInt16;
    # How many of the ports, from the first, are consoles (hvc0, hvc1... in Linux); 0: one. The others are plain streams (/dev/vport0p1...). More
    # than `ports` are BAD_CONFIG.
  }

  struct Rng {
    enabled @0 :Toggle;
    rateLimit @1 :RateLimit;
    # Only the bytes count; an rng's operations have no limit of their own. Zero: 1 MiB a second, so that no guest drains the host.
  }

  struct Balloon {
    enabled @0 :Toggle;
    deflateOnOom @1 :Bool;
    # The guest may take memory back by itself before it runs out.
    freePageReporting @2 :Bool;
    # The guest tells which memory it does not use, which is given back to the host.
  }

  struct Vsock {
    enabled @0 :Toggle;

    cid @1 :UInt32;
    # The guest's context id, 3 to 2^32-2, unique among the guests of this host: ALREADY_BOUND if another has it. 0: the manager chooses.

    listeners @2 :List(Listener);
    # Ports of the host on which somebody listens from the start, at most 64, each once.

    socketPath @3 :Text;
    # Where to offer the convention of Firecracker and Cloud Hypervisor as a Unix socket: "CONNECT <port>" and a newline, answered by "OK <port>"
    # and a newline, connect to the guest's port; what the guest connects to at port P of the host is passed on to the Unix socket
    # "<socketPath>_P". Absolute, at most 90 bytes, in a folder that is there; for clients that may name paths. Empty: nowhere.

    struct Listener {
      port @0 :UInt32;
      acceptor @1 :VsockAcceptor;
    }
  }

  struct MemoryDevice {
    # Memory that can be added and taken away in blocks while the guest runs (virtio-mem).
    enabled @0 :Toggle;
    blockSize @1 :UInt64;
    # Bytes, a power of two of at least 2 MiB. 0: 2 MiB.
    regionSize @2 :UInt64;
    # Bytes that can be plugged at most: a multiple of the block size, at most 1 TiB, not 0.
    regionAlignment @3 :UInt64;
    # Bytes, a power of two, at most 1 GiB. 0: the block size.
    requested @4 :UInt64;
    # Bytes to be plugged at start: a multiple of the block size, at most `regionSize`.
  }

  struct MemoryBacking {
    memfd @0 :FdRef;
    # A memfd, or another file of shared memory (tmpfs, hugetlbfs), open for reading and writing, at least as large as the range: else BAD_CONFIG.
    # Whoever can still shrink it (it lacks F_SEAL_SHRINK) can end the guest by that: a vCPU that meets what is gone is a crash, a device that does
    # takes the component with it (vmmTerminated, by SIGBUS). Nobody else's guest notices.
    start @1 :UInt64;
    # First guest physical address, a multiple of 4096.
    end @2 :UInt64;
    # First address after the range, a multiple of 4096, greater than `start`. No memory can be between 3 and 4 GiB, where devices are, nor after
    # 2^42: else BAD_CONFIG.
  }

  struct Backend {
    # The process that serves a vhost-user device.
    union {
      socket @0 :FdRef;
      # A connected Unix stream socket. When that process ends, the device is without it for good.
      path @1 :Text;
      # The absolute path of a Unix socket, at most 107 bytes, that the manager connects to, and again when the process that listened there has ended and another
      # listens; for clients that may name paths. FAILED_SERVICE_CONNECT if nobody listens at the start.
    }
  }

  struct Share {
    tag @0 :Text;
    # What the guest mounts it by: 1 to 36 bytes of UTF-8, unique among the shares.
    backend @1 :Backend;
    # A vhost-user file system back end: virtiofsd, for example.
    queues @2 :UInt16;
    # Number of request queues, 1 to 16; 0: one.
  }

  struct VhostUser {
    deviceType @0 :UInt16;
    # The virtio device type (virtio 1.2, section 5): 1 network, 2 block, 16 GPU, 25 sound, 26 file system, ... 1 to 63.
    backend @1 :Backend;
    queues @2 :UInt16;
    # Number of queues, 1 to 64; 0: one.
    queueSize @3 :UInt16;
    # Entries of each queue, a power of two of at most 1024; 0: 256.
  }

  struct RateLimit {
    # Token buckets for bytes and for operations (requests, frames). Zero: no limit.
    bytesPerSecond @0 :UInt64;
    # At most 2^40.
    operationsPerSecond @1 :UInt64;
    # At most 2^32.
    burstBytes @2 :UInt64;
    # How many bytes may pass at once after a rest, at most 2^40; 0: what passes in a second. BAD_CONFIG without bytesPerSecond.
    burstOperations @3 :UInt64;
    # The same for operations, at most 2^32.
  }

  struct Limits {
    # Enforced by the host's control groups. A limit that is asked for and cannot be enforced fails the start.
    memoryMib @0 :UInt64;
    # Memory of the component and its guest together, less than 2^43; 0: no limit. BAD_CONFIG says what the component needs at least.
    cpuPercent @1 :UInt32;
    # CPU time, in percent of one CPU, at most 100000; 0: no limit.
    cpuWeight @2 :UInt32;
    # 1 to 10000, relative to others; 0: the host's default.
    tasks @3 :UInt32;
    # Threads of the component, at most 4194304; 0: no limit. BAD_CONFIG says what it needs at least.
  }

  enum OnReset {
    stop @0;
    # The guest is stopped, and the reason says that it had reset itself.
    restart @1;
    # The guest is created and run again from the same configuration, under the same capabilities.
    pause @2;
    # The same, but paused before its first instruction.
  }
}
