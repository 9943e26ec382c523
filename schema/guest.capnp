@0x9f10dee89590d3ce;
# A guest and its facets: each a capability of its own, so that holding one is the permission to use it.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "file.capnp".FdRef;
using import "device.capnp".BalloonController;
using import "device.capnp".MemController;
using import "device.capnp".DiskController;
using import "device.capnp".NetController;
using import "device.capnp".DeviceStats;
using import "vsock.capnp".HostVsockEndpoint;
using import "agent.capnp".Agent;
using import "debug.capnp".Debug;
using import "debug.capnp".Registers;
using import "cpu.capnp".CpuController;
using import "config.capnp".GuestConfig;
using import "facet.capnp".Facet;
using import "facet.capnp".Share;

enum GuestStatus {
  # Fuchsia's GuestStatus.
  notStarted @0;
  starting @1;
  running @2;
  stopping @3;
  stopped @4;
  vmmUnexpectedTermination @5;
  crashLoop @6;
  # It failed again and again, and is not begun again any more (GuestConfig.restart). Starting it by hand begins a new row.
}

struct StopReport {
  # How a guest ended.

  reason @0 :Reason;
  detail @1 :Text;
  # A sentence for a person: which way of resetting, which vCPU failed and how, which signal killed the component.
  error @2 :Error;
  # The typed error behind it, null for `shutdown` and `reset`.
  uptimeNs @3 :UInt64;
  # Nanoseconds from the start of the vCPUs to the end; 0 if they never ran.
  timeNs @4 :UInt64;
  # When it ended: nanoseconds since 1970-01-01 UTC.
  about @5 :Text;
  # The vCPU ("vcpu1") or device ("watchdog") that it ended by; empty where there is none.
  rung @6 :Rung;
  # Which rung of the ladder ended it, if it was made to stop.
  component :union {
    # How its component's process ended, where the guest ended with that: `vmmTerminated`.
    unknown @7 :Void;
    # It did not end so, or nobody can tell.
    exited @8 :UInt8;
    # The component's exit status.
    killed @9 :UInt8;
    # The signal that killed the component: 9 (SIGKILL) is what somebody sends, or the host when memory is short; 11 (SIGSEGV) is a crash.
  }

  enum Rung {
    none @0;
    # It ended by itself.
    asked @1;
    # It was asked to shut down, and did.
    forced @2;
    # Its component stopped the machine.
    killed @3;
    # Its component did not, and was killed.
  }

  enum Reason {
    unknown @0;
    shutdown @1;
    # The guest shut itself down, by itself or because it was asked to.
    reset @2;
    # The guest reset itself (ACPI, keyboard controller or triple fault) and its configuration says that this stops it. Linux does so
    # after a panic as well, when it is told to reboot on one.
    crash @3;
    # A vCPU failed: the guest did something that it cannot go on from.
    killed @4;
    # It was stopped by force.
    startFailed @5;
    # It never ran.
    hangup @6;
    # It was asked to shut down, did not within the deadline, and was then stopped by force.
    vmmTerminated @7;
    # Its component died.
  }
}

struct LayerInfo {
  # One layer of the jail around the guest's component.
  name @0 :Text;
  state @1 :State;
  detail @2 :Text;
  # What holds, or why it does not, in a few words.

  enum State {
    holds @0;
    waived @1;
    # The host cannot provide it, and the configuration allowed to go on without it.
    notRequested @2;
    # A limit that nobody asked for.
  }
}

struct GuestDescriptor {
  # What a guest is made of, as it was created. Fuchsia's GuestDescriptor.
  cpus @0 :UInt8;
  memoryMib @1 :UInt64;
  kernel @2 :Text;
  # Where the kernel came from: "embedded", "fd", "upload", "bytes", or its path.
  cmdline @3 :Text;
  # The complete command line that the guest was given.
  devices @4 :List(Text);
  # The names of its devices: "serial", "rtc", ..., "disk0", "net0", "console", "rng", "balloon", "vsock", "memory", "share0", "vhost-user0",
  # "watchdog", "generation-id", "instance-id", "panic".
}

struct GuestInfo {
  name @0 :Text;
  status @1 :GuestStatus;
  generation @2 :UInt64;
  # Counts the creations under this name, from 1; 0 before the first.
  uptimeNs @3 :UInt64;
  # Nanoseconds since the vCPUs started; 0 unless the guest runs.
  descriptor @4 :GuestDescriptor;
  # As it was created; of a defined guest that does not run and whose definition was replaced since: what it would be created as. Null before the first creation.
  stop @5 :StopReport;
  # How it ended the last time; null if it has not yet.
  problems @6 :List(Text);
  # At most 8 sentences for a person about what is not as it should be.
  layers @7 :List(LayerInfo);
  # The layers of the jail; empty unless there is a component.
  componentPid @8 :UInt32;
  # Process id of the component on the host; 0 if there is none.
  paused @9 :Bool;
  detached @10 :Bool;
  # It lives on without the client that launched it.
  uuid @11 :Data;
  # 16 bytes.
  defined @12 :Bool;
  # There is a definition of this name; otherwise nothing is left when the guest has ended and is not remembered any more.
  autostart @13 :Bool;
  # It is started when its manager starts.
  durable @14 :Bool;
  # It goes on without its manager.
  restarts @15 :UInt32;
  # How often it was begun again by itself since somebody started it.
  failures @16 :UInt32;
  # How many runs in a row have failed.
  leaseEndsMs @17 :UInt32;
  # Milliseconds until it is stopped unless its lease, which outlived the manager, is redeemed; 0: it is not waited for.
  restart @18 :GuestConfig.Restart;
  # What follows when it ends by itself. Null: nothing, or its manager is one that does not tell.
}

struct CrashReport {
  # What is known about a run that failed.
  report @0 :StopReport;
  generation @1 :UInt64;
  lastLines @2 :List(Text);
  # The last lines of the component's log, oldest first: at most 20, of at most 256 bytes each. Empty without the right `debug`.
  registers @3 :List(Registers);
  # Of the vCPUs in order, where the machine could still tell. Empty without the right `debug`.
  output @4 :Text;
  # The end of what the guest had printed on its serial port: at most 2048 bytes. Empty without the right `output`.
}

struct Event {
  # Something that happened to a guest.
  sequence @0 :UInt64;
  # Counts the events of a manager, from 1 and without gaps; a manager that takes guests over goes on where the one before stopped. Whoever is told an event
  # again, because it subscribed anew, knows it by its number. What a component tells its manager is counted by that component instead, where the next manager
  # may have to be told again.
  timeNs @1 :UInt64;
  # Nanoseconds since 1970-01-01 UTC.
  guest @2 :Text;
  generation @3 :UInt64;
  union {
    defined @4 :Void;
    # The name is taken; nothing runs yet.
    starting @5 :Void;
    # Its component is being started or the machine created.
    started @6 :Void;
    # The vCPUs run.
    paused @7 :Void;
    resumed @8 :Void;
    shuttingDown @9 :Void;
    # It was asked to shut down, or is being stopped.
    stopped @10 :StopReport;
    deviceFailed :group {
      # A device broke and was quarantined; the guest goes on without it.
      device @11 :Text;
      reason @12 :Text;
    }
    removed @13 :Void;
    # The name is free again.
    deviceNeedsReset :group {
      # The driver broke a rule of the device's rings: the device rests until the driver resets it; the guest and its other devices go on.
      device @14 :Text;
      reason @15 :Text;
    }
    deviceRecovered @16 :Text;
    # The driver has reset the device of this name, which works again.
    ioError :group {
      # The host failed a request of the guest, which was told. At most one event a second and device.
      device @17 :Text;
      operation @18 :Text;
      # "read", "write", "flush", "discard", "send", ...
      message @19 :Text;
      count @20 :UInt64;
      # How many errors this event stands for, from 1.
      noSpace @31 :Bool;
      # The host's file system is full (ENOSPC, EDQUOT).
    }
    balloonChanged :group {
      # The guest or its owner changed the balloon. In pages of 4096 bytes; at most one event a second.
      currentPages @21 :UInt32;
      requestedPages @22 :UInt32;
    }
    memoryChanged :group {
      # Memory was plugged, unplugged or requested. In bytes; at most one event a second.
      pluggedBytes @23 :UInt64;
      requestedBytes @24 :UInt64;
    }
    backendLost :group {
      # The process behind a device has gone. The device waits for another where the manager can connect to one.
      device @25 :Text;
      reason @26 :Text;
    }
    backendRestored @27 :Text;
    # The device of this name has a process behind it again.
    guestPanicked @28 :Panic;
    # The guest's kernel told that it has panicked.
    watchdogExpired @29 :Text;
    # The guest did not keep its watchdog from expiring; what is done about it: "reset", "stop", "none".
    guestReady @30 :Void;
    # The agent in the guest has answered for the first time in this run.
    restarting @32 :StopReport;
    # It has ended so, and is created again under the same capabilities, because it was reset or its configuration says so.
    crashed @33 :StopReport;
    # A vCPU or the component failed. What becomes of the guest is told by the event that follows: stopped, restarting.
  }

  enum Panic {
    panicked @0;
    # It halts, or reboots.
    crashLoaded @1;
    # A crash kernel takes over.
    shutDown @2;
    # It asks to be turned off.
  }
}

interface EventSink {
  # Implemented by whoever wants to be told.
  event @0 (event :Event, dropped :UInt64) -> stream;
  # One event. `dropped` counts the events that this subscriber lost since the last call, because it did not keep up.
}

interface Subscription {
  # Dropping it ends the events.
}

struct ReadResult {
  # A piece of an output stream. Positions count all bytes since the guest was created.
  position @0 :UInt64;
  # Position of the first byte of `bytes`.
  bytes @1 :Data;
  dropped @2 :UInt64;
  # Bytes that were asked for but are no longer kept.
  ended @3 :Bool;
  # The guest is gone, and there is nothing after these bytes.
  error @4 :Error;
  # Null, unless nothing could be read: REVOKED, PERMISSION_DENIED.
}

interface Output extends (Facet) {
  # What a serial port or console printed: a bounded history that readers share without disturbing each other or the guest. Needs the
  # right `output`. `describe` calls it a serial port that permits no input.

  read @0 (position :UInt64, maxBytes :UInt32, wait :Bool = true) -> ReadResult;
  # Bytes from `position` on, at most `maxBytes` (0: 65536, which is also the most). Waits for at least one byte, unless `wait` is false or
  # the output has ended. Position 0 is the beginning: a reader that wants only news starts from what `end` returned.
  # The next position to read is position + the length of bytes.

  end @1 () -> (position :UInt64, error :Error);
  # The position after the last byte printed so far; `error` is null if that can be told.
}

interface Serial extends (Output) {
  # The first serial port, both ways. Any number of clients may hold one. Typing needs the right `input`.

  write @0 (bytes :Data) -> stream;
  # Types into the guest; at most 64 KiB a call. Flow-controlled: completes when the guest's side has taken the bytes or they are queued
  # within the bound of 64 KiB. After the guest has ended the bytes are discarded. Needs the right `input`.

  open @1 (position :UInt64) -> OpenResult;
  # One end of a stream socket: output from `position` on arrives there, what is written to it is typed into the guest. End of file means
  # that the guest is gone. A reader that does not keep up loses the oldest output, never stalls the guest. Without the right `input` what is
  # written is discarded; without `output` nothing arrives; at least one of them is needed.

  struct OpenResult {
    union {
      fd @0 :FdRef;
      error @1 :Error;
    }
  }
}

interface Console extends (Serial) {
  # A port of the virtio console: as the serial port, with a size. What is typed waits while the guest has not opened the port.

  resize @0 (columns :UInt16, rows :UInt16) -> Completion;
  # Tells the guest the size of the terminal at the other end. The latest of several clients counts. Needs the right `input`.
}

interface Power extends (Facet) {
  # Everything that changes whether the guest runs.

  shutdown @0 () -> Completion;
  # Presses the power button and returns at once; what the guest makes of it is its own affair. Needs the right `shutdown`.

  stop @1 (timeoutMs :UInt64, force :Bool) -> StopResult;
  # The ladder: ask by the power button, and by the agent if the guest runs one and has not begun by half the time; wait for `timeoutMs`
  # (0: 30 s); then stop by force if `force` is set, else return TIMED_OUT and leave the guest as it is. Returns after the guest's threads and
  # processes are gone; the report says which rung it took. Dropping the call ends the waiting, not the asking. Needs the right `shutdown`,
  # and with `force` the right `kill`.

  kill @2 () -> StopResult;
  # Stops by force at once. Always completes. Needs the right `kill`.

  pause @3 () -> Completion;
  # All vCPUs leave the guest before it returns. Needs the right `pause`.
  resume @4 () -> Completion;
  # Needs the right `pause`.

  reset @5 () -> Completion;
  # Begins the guest again as at its start, from the same configuration and under the same capabilities, whatever `onReset` says; returns when
  # its vCPUs run again. What it held in memory is lost, as by the button of a PC. Needs the right `reset`.
  nmi @6 () -> Completion;
  # A non-maskable interrupt for every vCPU. Needs the right `nmi`.

  struct StopResult {
    union {
      report @0 :StopReport;
      error @1 :Error;
    }
  }
}

interface Observer extends (Facet) {
  # Read-only: all needs the right `observe`.

  info @0 () -> InfoResult;
  # Never waits for the guest or its component.

  wait @1 () -> WaitResult;
  # Returns when the guest has ended, at once if it has already. Dropping the call ends the waiting.

  output @2 () -> (output :Output);
  # What the serial port printed; reading it needs the right `output` besides.

  subscribe @3 (sink :EventSink, replay :UInt32) -> SubscribeResult;
  # The events of this guest from now on, after the last `replay` of them that are kept. When this is revoked, the sink is dropped.

  stats @4 () -> Statistics.StatsResult;
  # As Statistics.get.

  crashes @5 () -> CrashesResult;
  # The last runs under this name that failed, newest first: at most 4.

  configuration @6 () -> ConfigurationResult;
  # What would create this guest again, as a definition: files by their paths, as far as they have any. What only a handle could give is left out,
  # and `missing` names its field.

  struct CrashesResult {
    union {
      crashes @0 :List(CrashReport);
      error @1 :Error;
    }
  }

  struct ConfigurationResult {
    config @0 :GuestConfig;
    missing @1 :List(Text);
    error @2 :Error;
  }

  struct InfoResult {
    union {
      info @0 :GuestInfo;
      error @1 :Error;
    }
  }

  struct WaitResult {
    union {
      report @0 :StopReport;
      error @1 :Error;
    }
  }

  struct SubscribeResult {
    union {
      subscription @0 :Subscription;
      error @1 :Error;
    }
  }
}

interface Statistics extends (Facet) {
  # The figures of a guest alone. Needs the right `observe`.

  get @0 () -> StatsResult;
  # Answers within a few milliseconds: what the component does not tell in that time is what it told last, and `ageNs` says how long ago.
  # TIMED_OUT if it has never told anything, NOT_RUNNING for a guest that ended before it did.

  struct StatsResult {
    union {
      stats @0 :Stats;
      error @1 :Error;
    }
  }
}

enum VcpuState {
  stopped @0;
  # Not started, or over.
  running @1;
  # In the guest, or handling one of its exits.
  halted @2;
  # It waits for an interrupt, as far as that can be told.
  paused @3;
}

struct Stats {
  # Counters since the guest's creation, taken without waking an idle guest.

  ageNs @3 :UInt64;
  # How old they are: nanoseconds since the component told them; 0 if it has just done so.
  vcpus @0 :List(Vcpu);
  serialDropped @1 :UInt64;
  # Bytes of serial output that were lost because nobody drained them.
  devices @2 :DeviceStats;

  uptimeNs @4 :UInt64;
  # Nanoseconds since the vCPUs started.
  memory @5 :Memory;

  struct Memory {
    # In bytes, of the component's process as the host sees it.
    guest @0 :UInt64;
    # What the guest was configured with, and what was plugged in.
    resident @1 :UInt64;
    # What the component has of the host's memory, guest memory included (resident set size).
    shared @2 :UInt64;
    # How much of `resident` is shared memory or files: guest memory is.
  }

  struct Vcpu {
    index @0 :UInt8;
    exits @1 :UInt64;
    # All exits to the component.
    ioExits @2 :UInt64;
    mmioExits @3 :UInt64;
    otherExits @4 :UInt64;
    assists @5 :UInt64;
    # Instructions and system calls completed for the guest on hosts without hardware virtualization.
    cpuTimeNs @6 :UInt64;
    # CPU time of the vCPU's thread.
    reasons @7 :List(ExitCount);
    # The exits by reason, those that occurred.
    state @8 :VcpuState;
  }

  struct ExitCount {
    reason @0 :Text;
    # "io", "mmio", "hlt", "ioapic-eoi", "interrupted", ...: by KVM's names, in lower case.
    count @1 :UInt64;
  }
}

interface Guest extends (Facet) {
  # One guest, from its creation to its end. When the guest ends, calls to its facets fail with NOT_RUNNING, but the read-only ones still
  # answer as long as the manager remembers the guest. A facet permits what the Guest does that it was asked of; asking needs no right.

  serial @0 () -> (serial :Serial);
  power @1 () -> (power :Power);
  observer @2 () -> (observer :Observer);

  # For a device that its configuration left out, each of these is DEVICE_NOT_PRESENT.
  console @3 (port :UInt32) -> ConsoleResult;
  # A port of the virtio console, from 0.
  balloonController @4 () -> BalloonControllerResult;
  memController @5 () -> MemControllerResult;
  hostVsockEndpoint @6 () -> HostVsockEndpointResult;
  diskController @7 () -> DiskControllerResult;
  netController @8 () -> NetControllerResult;
  agent @9 () -> AgentResult;
  # The agent in the guest; DEVICE_NOT_PRESENT without vsock, or if the configuration has it off. That it is there says nothing about whether
  # the guest runs one.

  statistics @10 () -> (statistics :Statistics);
  debug @11 () -> (debug :Debug);

  shares @12 () -> SharesResult;
  # What was shared of this guest and can still be redeemed or used, oldest first; through a narrowed guest, what was shared through it or what came
  # of it. Needs the right `share`.

  revokeShare @13 (id :UInt64) -> Completion;
  # Takes a share back, and all that was made of it; 0: all that `shares` tells. NOT_FOUND. Needs the right `share`.

  cpuController @14 () -> CpuControllerResult;

  struct CpuControllerResult {
    controller @0 :CpuController;
    error @1 :Error;
  }

  struct SharesResult {
    union {
      shares @0 :List(Share);
      error @1 :Error;
    }
  }

  struct ConsoleResult {
    console @0 :Console;
    error @1 :Error;
  }

  struct BalloonControllerResult {
    controller @0 :BalloonController;
    error @1 :Error;
  }

  struct MemControllerResult {
    controller @0 :MemController;
    error @1 :Error;
  }

  struct HostVsockEndpointResult {
    endpoint @0 :HostVsockEndpoint;
    error @1 :Error;
  }

  struct DiskControllerResult {
    controller @0 :DiskController;
    error @1 :Error;
  }

  struct NetControllerResult {
    controller @0 :NetController;
    error @1 :Error;
  }

  struct AgentResult {
    agent @0 :Agent;
    error @1 :Error;
  }
}
