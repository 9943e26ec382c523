@0x83906f6dd049ce62;
# The guest manager: many guests by name, and the policy around them. Bootstrap capability of the manager's socket.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "file.capnp".Upload;
using import "config.capnp".GuestConfig;
using import "lifecycle.capnp".GuestLifecycle;
using Guests = import "guest.capnp";
using Facets = import "facet.capnp";
using Node = import "node.capnp";

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
  # is free again when the capability is dropped. ALREADY_RUNNING if the name is taken, ALREADY_BOUND if there is a definition of it, BAD_CONFIG if it is not a
  # valid name.

  launch @2 (config :GuestConfig, detach :Bool) -> LaunchResult;
  # newGuest, create, bind and run in one; returns when the vCPUs run. The guest stops when the returned `lease` is dropped (its
  # connection lost included), unless `detach` is set. BAD_CONFIG, ALREADY_RUNNING, ALREADY_BOUND (there is a definition of that name, or another guest has
  # the uuid), START_FAILURE, NO_STORAGE, or what create or run returned.

  lookup @3 (name :Text) -> LookupResult;
  # A guest by name, also one that has ended and is still remembered. NOT_FOUND.

  list @4 () -> (guests :List(Guests.GuestInfo));
  # All guests, running or not, as of one moment, sorted by name. Never waits for a guest. Where there are so many that the answer would not
  # fit into a message, details are left out: first layers, then command lines and devices, then problems. Observer.info has all of them. Where even so they
  # do not fit, NO_RESOURCES, as an exception: `browse` has no such limit.

  subscribe @5 (sink :Guests.EventSink, replay :UInt32) -> (subscription :Guests.Subscription);
  # The events of all guests from now on, after the last `replay` ones (at most 1024 are kept). Flow-controlled: a subscriber that does not
  # keep up loses the oldest and is told how many. Who subscribes again, at this manager or one that took its guests over, and has enough replayed, is told every event
  # at least once, and each under the number that it had (Event.sequence).

  forceShutdown @6 (name :Text) -> Completion;
  # Stops by force; the name can be launched again at once when it returns. NOT_RUNNING if it does not run.

  remove @7 (name :Text) -> Completion;
  # Forgets a guest that has ended. ALREADY_RUNNING if it runs, ALREADY_BOUND if there is a definition of it, NOT_FOUND.

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

  # Definitions: what a guest is started from, kept by the manager across its own restarts and the host's. NO_STORAGE if this manager keeps no state. All
  # of them need the role admin, but for `start` (operate) and `definition` (observe).

  define @14 (definition :Definition, replace :Bool) -> DefineResult;
  # Keeps a definition under the name in its configuration, which must have one. Files are named by paths, which are opened when the guest starts; what
  # only a handle or an upload can give is BAD_CONFIG naming the field. The same checks as `check`, except that a file which is not there yet is only
  # told in `warnings`. ALREADY_BOUND if there is one of that name, unless `replace`, or if another guest has the uuid. With `replace`, a guest
  # that runs goes on as it is, keeps its uuid, and is started from the new definition the next time. On return it is on the disk. Calls about one name that
  # are under way at the same time take effect in any order. At most 1024 definitions: NO_RESOURCES. NO_STORAGE if the disk refuses.

  undefine @15 (name :Text) -> Completion;
  # Forgets a definition, and with it how its last run ended. A guest that runs goes on, as a transient one. NOT_FOUND.

  definition @16 (name :Text) -> DefinitionResult;
  # NOT_FOUND.

  start @17 (name :Text, detach :Bool) -> LaunchResult;
  # As `launch`, from the definition of this name. NOT_FOUND, ALREADY_RUNNING.

  setAutostart @18 (name :Text, autostart :Bool) -> Completion;
  # Whether it is started when the manager starts. NOT_FOUND.

  browse @19 () -> (listing :Listing, count :UInt32);
  # All guests, defined, running or ended, as of one moment, sorted by name: to be read page by page. At most 16 listings a connection, and for users who are no
  # admins 32768 guests in all listings of each, 65536 in those of all: NO_RESOURCES, as an exception.

  stats @20 (after :Text, most :UInt32) -> (guests :List(NamedStats), more :Bool);
  # The figures of all guests that run, sorted by name, those after `after`: at most `most` (0: as many as fit). `more`: there are others after the last.
  # Answers as Statistics.get, when none of them has told anything for 5 ms, or after 50 ms; a guest without figures is there with an error.

  node @21 () -> (node :Node.NodeInfo);
  # What the host is and offers.

  pressure @22 () -> (state :Node.PressureState);
  setPressurePolicy @23 (policy :Node.PressurePolicy) -> Completion;
  # What the manager does when the host runs short of memory. Kept across restarts where the manager keeps state. Needs the role admin.

  redeemLease @24 (token :Text) -> LaunchResult;
  # The lease that a token stands for (Lease.token), after its connection or its manager has ended; the guest is not stopped then. Redeeming it again moves
  # it. NOT_FOUND.

  retire @25 () -> Completion;
  # Ends the manager for another one to take its place: finishes what is being created (for at most 10 s), stops the guests that are not durable, and leaves
  # the others as they are. Needs the role admin.

  struct Definition {
    config @0 :GuestConfig;
    autostart @1 :Bool;
  }

  struct DefineResult {
    uuid @0 :Data;
    # 16 bytes.
    warnings @1 :List(Text);
    # At most 16 sentences for a person about what would keep it from starting now.
    error @2 :Error;
  }

  struct DefinitionResult {
    definition @0 :Definition;
    error @1 :Error;
  }

  interface Listing {
    next @0 (most :UInt32) -> (guests :List(Guests.GuestInfo), ended :Bool);
    # The next ones, at most `most` (0: as many as fit). `ended`: these were the last.
  }

  struct NamedStats {
    name @0 :Text;
    uuid @1 :Data;
    stats @2 :Guests.Stats;
    error @3 :Error;
    # Null if there are figures.
  }

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
    # The guest lives on by its name. NOT_SUPPORTED if somebody else has redeemed the lease.

    token @1 () -> TokenResult;
    # What stands for this lease. From now on the guest is not stopped at once when this is dropped, but 30 s later unless the lease is redeemed by then,
    # also if the manager ends meanwhile and the guest is durable: the 30 s begin when a manager first finds that nobody has the lease, and managers after it
    # do not begin them anew. At most 16 tokens of a guest's lease can be redeemed at a time, the last ones. NOT_SUPPORTED if the guest does not depend on this lease.

    struct TokenResult {
      union {
        token @0 :Text;
        # At most 128 bytes of printable ASCII, beginning with "lease.".
        error @1 :Error;
      }
    }
  }
}
