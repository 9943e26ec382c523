@0xef24bf4bb35eeccc;
# The life of one virtual machine: Create, Bind, Run, Stop.
#
# A component's bootstrap capability is a GuestLifecycle. A guest manager offers the same interface (`GuestManager.newGuest`), with policy on top.
# Dropping the capability tears the virtual machine down. Create, bind and run may be sent in one round trip.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "file.capnp".FdRef;
using import "config.capnp".GuestConfig;
using import "guest.capnp".Guest;
using import "guest.capnp".StopReport;
using import "guest.capnp".EventSink;
using import "guest.capnp".LayerInfo;
using import "guest.capnp".GuestStatus;
using import "debug.capnp".Registers;

interface GuestLifecycle {
  create @0 (config :GuestConfig, host :HostSetup) -> Completion;
  # Makes the virtual machine: memory, devices, kernel loaded; no vCPU or dispatch loop runs yet. ALREADY_RUNNING while a guest is created, runs
  # or stops. A guest that was created but does not run is destroyed and made anew. After a failure there is none.
  # `host` is for the guest manager, which sets it when it forwards to the component; a client that sets it gets BAD_CONFIG.

  bind @1 () -> (guest :Guest);
  # The guest that was created. While create is in progress this waits for it. Otherwise, without a guest, the capability is broken and
  # its exception says why.

  run @2 () -> RunResult;
  # Starts the vCPUs and dispatch loops, and returns when the guest has ended: this reply is its exit status. NOT_CREATED,
  # ALREADY_RUNNING (the first run stays pending), CONTROLLER_FORCED_HALT after `stop`, VCPU_START_FAILURE, VCPU_RUNTIME_FAILURE.

  stop @3 () -> Completion;
  # Legal at any time, interrupts a create, and always completes. Returns after all threads of the guest have ended and its memory is given
  # back, so that create may follow at once.

  struct RunResult {
    union {
      ended @0 :StopReport;
      # shutdown or reset.
      error @1 :Error;
    }

    registers @2 :List(VcpuRegisters);
    # Of the vCPUs, as they were when one of them failed; empty where none did.
  }
}

struct VcpuRegisters {
  vcpu @0 :UInt8;
  registers @1 :Registers;
}

struct HostSetup {
  # What the guest manager tells and gives a component besides the configuration.

  unassisted @0 :Bool;
  # The host's KVM works without hardware virtualization, so that guests need help. (A jailed component cannot find out.)

  serial :union {
    none @1 :Void;
    # Serial output is discarded.
    stream @2 :FdRef;
    # A stream socket: output goes there, input comes from there.
  }

  events @3 :EventSink;
  # Told what happens in the machine; null: nobody is.

  consoles @4 :List(FdRef);
  # Stream sockets of the virtio console's ports, in order.

  backends @5 :Backends;
  # Whom to ask for another process behind a vhost-user device; null: nobody.

  cpuid @6 :Data;
  # What the host's KVM offers of its processor, as KVM_GET_SUPPORTED_CPUID says it: `struct kvm_cpuid_entry2` (40 bytes each, at most 256), one after the other.
  # Empty: the component asks KVM itself, which takes a third of a millisecond where the host is itself a guest. BAD_CONFIG for any other length.

  successors @7 :FdRef;
  # A SOCK_SEQPACKET socket by which the connection to the next guest manager comes, each a descriptor beside one byte, if `durable` is set: the component
  # then outlives this connection for as long as somebody holds the other end. At that end it tears the machine down and ends.

  durable @8 :Bool;
}

interface Backends {
  # What the guest manager does for vhost-user devices whose process has gone.

  reconnect @0 (device :Text) -> ReconnectResult;
  # Waits until somebody serves the device of this name again. NOT_SUPPORTED if it was given as a descriptor.

  struct ReconnectResult {
    union {
      fd @0 :FdRef;
      # A connected Unix stream socket.
      error @1 :Error;
    }
  }
}

interface Component extends (GuestLifecycle) {
  # What a component offers to its guest manager besides the lifecycle.

  layers @0 () -> (layers :List(LayerInfo));
  # The layers of its jail, as it closed them.

  attach @1 (host :HostSetup) -> AttachResult;
  # For the manager after the one that created the guest: the guest that there is, which goes on as it did. `events` and `backends` take the place of those
  # before; of the rest nothing may be set. `events` is first told what happened meanwhile, at most 256 events. NOT_CREATED if there is no guest.

  ended @2 () -> GuestLifecycle.RunResult;
  # What `run` returned, or returns when the guest ends: for whoever did not call it. NOT_CREATED if it was not called.

  struct AttachResult {
    guest @0 :Guest;
    error @1 :Error;
    status @2 :GuestStatus;
    # running, stopping, or stopped if it has ended meanwhile; notStarted if `run` was not called yet.
    paused @3 :Bool;
    uptimeNs @4 :UInt64;
    missedEvents @5 :UInt64;
    # Events that were not kept.
  }
}
