@0xb5f2c6d1783e90a4;
# What all capabilities to a guest have in common: each can be narrowed, handed to somebody else, and taken back.
#
#     Guest --narrow--> Power, stop but not reset --share--> token ==redeem (another client)==> Power, stop but not reset
#       revoking any of them takes with it all that is to the right, at once and for good: REVOKED
#
# Calls through a revoked capability, those in progress included, fail with REVOKED: as a typed error where the answer has one, as an exception
# that begins with "REVOKED: " where it has none. Streams that were opened through it reach their end, subscriptions and listeners end.

using import "error.capnp".Error;
using import "error.capnp".Completion;

enum Right {
  # What a capability can permit. Each call needs one of them, or none if nothing is said there; without it, PERMISSION_DENIED names what is
  # lacking.

  observe @0;
  # Info, waiting for the end, events, figures: all that only looks, but for what the guest prints.
  output @1;
  # Read what a serial port or console printed.
  input @2;
  # Type into a serial port or console, and resize it.
  shutdown @3;
  # Ask the guest to shut down.
  kill @4;
  # Stop it by force.
  pause @5;
  # Pause and resume it.
  reset @6;
  nmi @7;
  balloon @8;
  # Set the size of the balloon.
  memory @9;
  # Plug and unplug memory.
  disk @10;
  # Resize disks.
  network @11;
  # Plug network cables in and out.
  connect @12;
  # Connect to the guest's vsock ports.
  listen @13;
  # Offer vsock ports to the guest.
  agent @14;
  # Do what the agent in the guest can.
  debug @15;
  # Look at registers and memory.
  share @16;
  # Hand it on by `share`. Narrowing needs no right: a capability can be passed on over its own connection anyway.
  cpu @17;
  # Pin vCPUs, and set what share of the host's processors the guest has.
}

enum FacetKind {
  guest @0;
  serial @1;
  console @2;
  power @3;
  balloonController @4;
  memController @5;
  diskController @6;
  netController @7;
  hostVsockEndpoint @8;
  agent @9;
  observer @10;
  statistics @11;
  debug @12;
  cpuController @13;
}

struct Bounds {
  # What is left of a capability's power when it is narrowed. Everything left out is as before; nothing can be widened, so that bounds which
  # allow more than there is change nothing.

  only @0 :List(Right);
  # The rights that are kept. Empty: all.

  lifetimeMs @1 :UInt64;
  # Milliseconds from now until it is revoked by itself. 0: it stays.

  callsPerSecond @2 :UInt32;
  # How many calls that change something (all rights but observe and output) it takes, in the long run: more are NO_RESOURCES. 0: any number.

  burst @3 :UInt32;
  # How many of them may come at once after a rest; 0: as many as in a second. BAD_CONFIG without callsPerSecond.

  balloonPages @4 :Range;
  # The sizes that the balloon may be set to, in pages of 4096 bytes. Null: any. Outside: PERMISSION_DENIED naming the range.

  memoryBytes @5 :Range;
  # The sizes that may be plugged. Null: any.

  vsockPorts @6 :List(UInt32);
  # The ports, of guest and host, that may be connected to and listened on; at most 64. Empty: all.

  struct Range {
    min @0 :UInt64;
    max @1 :UInt64;
    # Both included; BAD_CONFIG if max is less than min.
  }
}

interface Facet {
  narrow @0 (bounds :Bounds) -> NarrowResult;
  # A new capability for the same thing, with at most the power of this one and revoked with it. At most 32 levels deep, and 1024 alive for a
  # guest: NO_RESOURCES. BAD_CONFIG for ranges or ports that have nothing in common with what this one permits.

  share @1 (bounds :Bounds, terms :Terms) -> ShareResult;
  # A token with which another client of this manager gets a capability for the same thing, narrowed by `bounds`: `GuestManager.redeem`.
  # Needs the right `share`. The share outlives this connection, and ends with the guest. At most 256 of a guest: NO_RESOURCES. BAD_CONFIG where
  # `bounds.only` leaves no right that means something for this kind.

  describe @2 () -> DescribeResult;
  # What this is, and what it permits. Needs no right.

  struct NarrowResult {
    facet @0 :Facet;
    # Of the same kind: to be cast to it.
    revoker @1 :Revoker;
    error @2 :Error;
  }

  struct Terms {
    once @0 :Bool;
    # The first who redeems it uses it up.
    boundToUid @1 :Bool;
    uid @2 :UInt32;
    # With `boundToUid`: only a client of this user can redeem it; others are PERMISSION_DENIED, and the token stays.
    label @3 :Text;
    # For people, shown in the list of shares: at most 64 bytes.
  }

  struct ShareResult {
    token @0 :Text;
    # Whoever has it can redeem it: at most 128 bytes of printable ASCII, beginning with the kind of facet ("console").
    id @1 :UInt64;
    # Identifies the share to the guest: `Guest.revokeShare`.
    revoker @2 :Revoker;
    error @3 :Error;
  }

  struct DescribeResult {
    union {
      description @0 :Description;
      error @1 :Error;
    }
  }
}

struct Description {
  kind @0 :FacetKind;
  guest @1 :Text;
  rights @2 :List(Right);
  # All that it permits: of the rights that mean something for its kind, those that it has.
  expiresInMs @3 :UInt64;
  # Milliseconds until it is revoked by itself; 0 if it stays.
  bounds @4 :Bounds;
  # The tightest on the way from the guest to this one: `only` as `rights`.
}

interface Revoker {
  # Takes a capability back. Dropping it does not: what was given stays given.

  revoke @0 () -> Completion;
  # When it returns, nothing works any more through that capability or any derived from it. Revoking twice does no harm.
}

struct Share {
  # A share of a guest that can still be redeemed or has been.
  id @0 :UInt64;
  kind @1 :FacetKind;
  label @2 :Text;
  rights @3 :List(Right);
  expiresInMs @4 :UInt64;
  # 0: it stays.
  once @5 :Bool;
  boundToUid @6 :Bool;
  uid @7 :UInt32;
  redeemed @8 :UInt32;
  # How often it has been redeemed.
  sharedByUid @9 :UInt32;
}
