@0xb90d5ce7f3a26841;
# What a guest manager keeps for itself: on disk, and with the keeper for the manager after it. No client sees any of it. It evolves as the protocol does:
# a manager reads what an older or newer one has written. The events that happened (guest.capnp, Event) are kept one by one, each as a message.

using import "manager.capnp".GuestManager;
using import "config.capnp".GuestConfig;
using import "facet.capnp".FacetKind;
using import "facet.capnp".Bounds;
using import "guest.capnp".GuestDescriptor;
using import "guest.capnp".StopReport;
using import "guest.capnp".CrashReport;
using import "guest.capnp".LayerInfo;
using import "guest.capnp".Observer;
using import "node.capnp".PressurePolicy;

struct StoredDefinition {
  # A file of the folder of definitions.
  definition @0 :GuestManager.Definition;
  uuid @1 :Data;
  changedNs @2 :UInt64;
  # Nanoseconds since 1970-01-01 UTC.
  crashes @3 :List(CrashReport);
  # The last runs that failed, newest first.
  generation @4 :UInt64;
  # The last run that had ended when `crashes` was written, whether it failed or not; 0: only `crashes` tell.
  stop @5 :StopReport;
  # How that run ended.
}

struct StoredSettings {
  pressure @0 :PressurePolicy;
}

struct DurableGuest {
  # What the next manager has to know of a guest that goes on without this one. Descriptors that belong to it are kept beside it: those that
  # the configuration names by an FdRef under the label "config", in order.
  name @0 :Text;
  uuid @1 :Data;
  generation @2 :UInt64;
  config @3 :GuestConfig;
  descriptor @4 :GuestDescriptor;
  layers @5 :List(LayerInfo);
  phase @6 :Phase;
  detached @7 :Bool;
  leaseTokens @8 :List(Data);
  # SHA-256 of each.
  uid @9 :UInt32;
  gid @10 :UInt32;
  # Of the client that launched it.
  restarts @11 :UInt32;
  failures @12 :UInt32;
  shares @13 :List(DurableShare);
  crashes @14 :List(CrashReport);
  stop @15 :StopReport;
  cid @16 :UInt32;
  startedNs @17 :UInt64;
  # When the vCPUs started, by the host's monotonic clock; 0: they have not.
  trusted @18 :Bool;
  # That client might name paths.
  agentReady @19 :Bool;
  # The agent in it has said that it is there.
  held @20 :Bool;
  # It waits before its first instruction.
  paused @21 :Bool;
  balloonTaken @22 :UInt64;
  # What was taken of its memory by its balloon, in bytes, because the host ran short.
  balloonByHand @23 :Bool;
  # Somebody has set its balloon, which is left alone then.
  origin @24 :Observer.ConfigurationResult;
  # What would create it again, as an observer tells it: `config` is what became of that on this host.
  leaseEndsNs @25 :UInt64;
  # When it is stopped unless its lease is redeemed, by the host's monotonic clock; 0: that is not waited for.
  stopWanted :union {
    # It is being stopped by force.
    no @26 :Void;
    killed @27 :Text;
    # Somebody wanted it; the sentence says who or what.
    hangup @28 :UInt64;
    # It was asked to shut down, and had not after so many milliseconds.
    panicked @29 :Void;
    # Its kernel panicked, and its configuration says that this stops it.
  }
  asked @30 :Bool;
  # It was asked to shut down.
  over @31 :Over;
  # How its run ended and what follows; null while it goes on. That has been told where the phase is `restarting`, and is still to be told otherwise.
  waits @32 :UInt32;
  # How often its restart policy had it begin again since a run of it was a good one.
  shortRuns @33 :UInt32;
  # Short runs in a row after which it began again by itself.
  heard @34 :UInt64;
  # The number of the last event that its component told, and that has been told on.
  sequence @35 :UInt64;
  # The number of the last event of all guests when this was written.
  beginAgain @36 :BeginAgain;
  # Its run is being ended for the next one to begin.
  notes @37 :List(Text);
  # What it got from the host and is not as it should be, in whole sentences.
  broken @38 :List(BrokenDevice);

  struct BrokenDevice {
    # A device that broke in this run, and was quarantined.
    device @0 :Text;
    reason @1 :Text;
  }

  enum BeginAgain {
    no @0;
    asked @1;
    # A client has reset it.
    panicked @2;
    # Its kernel panicked, and its configuration says that it begins again then.
  }

  struct Over {
    report @0 :StopReport;
    gaveUp @1 :Bool;
    # It failed so often that it is not begun again.
    follows @2 :Bool;
    # Another run does.
    hold @3 :Bool;
    # That waits, paused, before its first instruction.
    byItself @4 :Bool;
    # Nobody asked for it.
    beginsNs @5 :UInt64;
    # When, by the host's monotonic clock.
  }

  enum Phase {
    creating @0;
    created @1;
    running @2;
    restarting @3;
    ended @4;
  }
}

struct DurableShare {
  id @0 :UInt64;
  kind @1 :FacetKind;
  port @2 :UInt32;
  tokenHash @3 :Data;
  bounds @4 :Bounds;
  # The tightest on the way to the root; a lifetime is in expiresNs.
  once @5 :Bool;
  boundToUid @6 :Bool;
  uid @7 :UInt32;
  label @8 :Text;
  redeemed @9 :UInt32;
  sharedByUid @10 :UInt32;
  expiresNs @11 :UInt64;
  # Monotonic clock of the host; 0: never.
  parent @12 :UInt64;
  # The share by which whoever shared it had come to it; 0: none.
}
