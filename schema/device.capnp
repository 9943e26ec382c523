@0xa61d0e83f5c9472b;
# What can be done to the devices of a guest while it runs: a capability for each kind. All fail with NOT_RUNNING when the guest has ended.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "facet.capnp".Facet;
using Config = import "config.capnp".GuestConfig;

interface BalloonController extends (Facet) {
  # Looking needs the right `observe`, setting the right `balloon`.
  # How much memory the guest lends back to the host. In pages of 4096 bytes, as Fuchsia's BalloonController.

  getBalloonSize @0 () -> SizeResult;

  requestBalloonSize @1 (pages :UInt32) -> Completion;
  # Asks the guest for a balloon of this size; it may take its time, or never get there. BAD_CONFIG for more than the guest's memory.

  getMemStats @2 () -> StatsResult;
  # What the guest says about its memory. Asks the guest's driver and waits for its answer, up to 2 s: TIMED_OUT. NOT_SUPPORTED if the driver
  # does not tell.

  struct SizeResult {
    union {
      size :group {
        currentPages @0 :UInt32;
        # What the guest says that it has given.
        requestedPages @1 :UInt32;
      }
      error @2 :Error;
    }
  }

  struct StatsResult {
    union {
      stats @0 :List(MemStat);
      error @1 :Error;
    }
  }

  struct MemStat {
    tag @0 :UInt16;
    # virtio 1.2, section 5.5.6.4: 0 swapped in, 1 swapped out, 2 major faults, 3 minor faults, 4 free, 5 total, 6 available, 7 disk caches,
    # 8 and 9 huge pages that could and could not be had. 0, 1 and 4 to 7 are bytes.
    value @1 :UInt64;
  }
}

interface MemController extends (Facet) {
  # Looking needs the right `observe`, setting the right `memory`.
  # Memory that is plugged into the guest and out of it.

  getMemSize @0 () -> SizeResult;

  requestSize @1 (bytes :UInt64) -> Completion;
  # Asks the guest to have this much plugged; it may take its time. BAD_CONFIG unless a multiple of the block size, and at most the region size.

  struct SizeResult {
    union {
      size @0 :Size;
      error @1 :Error;
    }
  }

  struct Size {
    # All in bytes.
    blockSize @0 :UInt64;
    regionSize @1 :UInt64;
    usableRegionSize @2 :UInt64;
    # The part of the region that the guest may plug now.
    pluggedSize @3 :UInt64;
    requestedSize @4 :UInt64;
  }
}

interface DiskController extends (Facet) {
  # Looking needs the right `observe`, resizing the right `disk`.
  list @0 () -> ListResult;
  # The disks in the order of the configuration.

  resize @1 (disk :Text, bytes :UInt64, shrink :Bool) -> Completion;
  # Gives the disk of this name ("disk0") or id another size and tells the guest. The image of a raw readWrite disk that is a regular file is
  # made so large, or with `shrink` cut, which loses what is behind the new size; 0 takes over the size that the image has by now. BAD_CONFIG about
  # `shrink` where it would be cut without that; BAD_CONFIG unless a multiple of the block size, NOT_FOUND, NOT_SUPPORTED for other disks.

  struct ListResult {
    union {
      disks @0 :List(Disk);
      error @1 :Error;
    }
  }

  struct Disk {
    name @0 :Text;
    # "disk0", "disk1", ...: what events and statistics call it.
    id @1 :Text;
    mode @2 :Config.Disk.Mode;
    format @3 :Config.Disk.Format;
    bytes @4 :UInt64;
    # The size that the guest sees.
    blockSize @5 :UInt32;
    queues @6 :UInt16;
    direct @7 :Bool;
  }
}

interface NetController extends (Facet) {
  # Looking needs the right `observe`, setting the right `network`.
  list @0 () -> ListResult;
  # The network devices in the order of the configuration.

  setLink @1 (network :Text, up :Bool) -> Completion;
  # Plugs the cable in or out of the device of this name ("net0"). NOT_FOUND.

  struct ListResult {
    union {
      networks @0 :List(Network);
      error @1 :Error;
    }
  }

  struct Network {
    name @0 :Text;
    # "net0", "net1", ...: what events and statistics call it.
    mac @1 :Data;
    mtu @2 :UInt16;
    queuePairs @3 :UInt16;
    linkUp @4 :Bool;
    kind @5 :Kind;

    enum Kind {
      tap @0;
      socket @1;
    }
  }
}

struct DeviceStats {
  # Counters of the devices since the guest's creation.

  disks @0 :List(Disk);
  networks @1 :List(Network);
  balloon @2 :Balloon;
  # Null if there is none.

  struct Disk {
    name @0 :Text;
    readOperations @1 :UInt64;
    writeOperations @2 :UInt64;
    otherOperations @3 :UInt64;
    # Flushes, discards, zero writes, ids.
    readBytes @4 :UInt64;
    writtenBytes @5 :UInt64;
    errors @6 :UInt64;
    # Requests that ended with an I/O error.
  }

  struct Network {
    # As the guest sees it: received is what it receives.
    name @0 :Text;
    receivedFrames @1 :UInt64;
    receivedBytes @2 :UInt64;
    receivedDropped @3 :UInt64;
    # For want of the guest's buffers, or by the rate limit.
    receivedErrors @4 :UInt64;
    sentFrames @5 :UInt64;
    sentBytes @6 :UInt64;
    sentDropped @7 :UInt64;
    sentErrors @8 :UInt64;
  }

  struct Balloon {
    currentPages @0 :UInt32;
    requestedPages @1 :UInt32;
    reportedBytes @2 :UInt64;
    # Given back to the host by free page reporting so far.
    memory @3 :List(BalloonController.MemStat);
    # What the guest said last about its memory; empty if it has not. A guest is asked along with the figures, for the next time, once it has run for
    # 50 ms since the last time: one that is idle is not woken. At most 64.
    memoryAgeNs @4 :UInt64;
    # How long ago that was, in nanoseconds, when the figures were told.
  }
}
