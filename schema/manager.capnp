@0x83906f6dd049ce62;
# The guest manager: many guests by name, and the policy around them. Bootstrap capability of the manager's socket.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "file.capnp".Upload;
using import "config.capnp".GuestConfig;
using import "lifecycle.capnp".GuestLifecycle;
using Guests = import "guest.capnp";
using Facets = import "facet.capnp";

const protocolVersion :UInt32 = 1;
# Grows when a client could need to know; fields and methods are only ever added.

enum Role {
  # What a client of the manager may do, by who it is: the manager's configuration gives a user or group one of these.
  none @0;
  # Redeem tokens, nothing else.
  observe @1;
  # See all guests: list, lookup, events; the guests that it finds permit `observe` and `output`.
  operate @2;
  # Do everything to all guests that are there, but debug, and launch guests of its own from files that it passes as descriptors or bytes.
  admin @3;
  # Everything: name paths, use networks, hand over backends, end the manager. The manager's own user and root have it.
}

interface GuestManager {
  # Calls that the caller's role does not permit are PERMISSION_DENIED, naming the role that they need: operate for what changes something,
  # observe for the rest.

  version @0 () -> (version :Text, protocol :UInt32, pid :UInt32);

  newGuest @1 (name :Text) -> NewGuestResult;
  # Takes a name (empty: one is chosen) and returns the lifecycle of a guest that does not exist yet, for a client that drives it itself. The name
  # is free again when the capability is dropped. ALREADY_RUNNING if the name is taken, BAD_CONFIG if it is not a valid name.

  launch @2 (config :GuestConfig, detach :Bool) -> LaunchResult;
  # newGuest, create, bind and run in one; returns when the vCPUs run. The guest stops when the returned `lease` is dropped (its
  # connection lost included), unless `detach` is set. BAD_CONFIG, ALREADY_RUNNING, START_FAILURE, NO_STORAGE, or what create or run returned.

  lookup @3 (name :Text) -> LookupResult;
  # A guest by name, also one that has ended and is still remembered. NOT_FOUND.

  list @4 () -> (guests :List(Guests.GuestInfo));
  # All guests, running or not, as of one moment, sorted by name. Never waits for a guest. Where there are so many that the answer would not
  # fit into a message, details are left out: first layers, then command lines and devices, then problems. Observer.info has all of them.

  subscribe @5 (sink :Guests.EventSink, replay :UInt32) -> (subscription :Guests.Subscription);
  # The events of all guests from now on, after the last `replay` ones (at most 1024 are kept). Flow-controlled: a subscriber that does not
  # keep up loses the oldest and is told how many.

  forceShutdown @6 (name :Text) -> Completion;
  # Stops by force; the name can be launched again at once when it returns. NOT_RUNNING if it does not run.

  remove @7 (name :Text) -> Completion;
  # Forgets a guest that has ended. ALREADY_RUNNING if it runs, NOT_FOUND.

  upload @8 (size :UInt64) -> UploadResult;
  # Room for a file to be streamed here by a client that cannot pass descriptors. `size` in bytes, 0 if not known; at most 4 GiB an
  # upload, and 16 uploads a connection: else NO_RESOURCES.

  shutdown @9 () -> Completion;
  # Stops all guests by force, then ends the manager. Needs the role admin.

  redeem @10 (token :Text) -> RedeemResult;
  # The capability that a token stands for (Facet.share). NOT_FOUND for what is none, was used up or has been revoked.

  whoAmI @11 () -> (uid :UInt32, gid :UInt32, role :Role, readOnly :Bool);
  # How the manager sees the caller. `readOnly`: it came by the read-only socket, where nobody has more than the role observe.

  check @12 (config :GuestConfig) -> Completion;
  # Whether a guest could be created from this, as far as that can be told without making, starting or taking anything: fails with what create would
  # fail with. Not looked at: whether the name is free, what is in a kernel, whether there is privilege for a tap, whether somebody serves at a back
  # end's socket. What the host has at the moment (memory, images and context ids that others use) may be gone by the time of create. Needs what
  # newGuest and create need.

  describe @13 (token :Text) -> Facets.Facet.DescribeResult;
  # What a token stands for, and what it would permit the caller. It is not redeemed by that: one that can be used once still can. Fails as `redeem`
  # would.

  struct RedeemResult {
    facet @0 :Facets.Facet;
    # To be cast to what `kind` says.
    kind @1 :Facets.FacetKind;
    guest @2 :Text;
    # The guest's name.
    error @3 :Error;
  }

  struct NewGuestResult {
    lifecycle @0 :GuestLifecycle;
    error @1 :Error;
  }

  struct LaunchResult {
    guest @0 :Guests.Guest;
    lease @1 :Lease;
    name @2 :Text;
    error @3 :Error;
  }

  struct LookupResult {
    guest @0 :Guests.Guest;
    error @1 :Error;
  }

  struct UploadResult {
    upload @0 :Upload;
    error @1 :Error;
  }

  interface Lease {
    # Dropping it stops the guest by force, unless it is detached.
    detach @0 () -> Completion;
    # The guest lives on by its name.
  }
}
