@0xd3a9e51c7b60f482;
# Streams between host and guest (virtio-vsock), as capabilities: whoever holds the endpoint may connect and listen, nobody else.

using import "error.capnp".Error;
using import "file.capnp".FdRef;
using import "bytes.capnp".ByteStream;
using import "facet.capnp".Facet;

interface HostVsockEndpoint extends (Facet) {
  # The host's side of a guest's vsock device. The host's context id is 2. Connections and listeners end with the capability that they were made
  # through.

  listen @0 (port :UInt32, acceptor :VsockAcceptor) -> ListenResult;
  # Offers a port to the guest, until the listener is dropped; 2^32-1 (VMADDR_PORT_ANY) stands for every port that has no listener of its own.
  # ALREADY_BOUND if somebody listens there; NO_RESOURCES past 64 listeners. Needs the right `listen`.

  connect @1 (port :UInt32) -> StreamResult;
  # Connects to a port of the guest. CONNECTION_REFUSED if nobody listens there, NO_RESOURCES if there are too many connections (1024; 256 of those
  # as byte streams or through capabilities that can be revoked), TIMED_OUT if the guest does not answer within 2 s. Needs the right `connect`,
  # and for port 1024 of a guest with an agent the right `agent`, too.

  connectStream @2 (port :UInt32, fromGuest :ByteStream) -> ByteStreamResult;
  # The same for clients that receive no descriptors: what the guest sends goes to `fromGuest`, which is ended when the guest ends it, and dropped when
  # the capability is revoked.

  address @3 () -> (cid :UInt32, error :Error);
  # The guest's context id; `error` is null if it can be told. Needs no right.

  struct ListenResult {
    listener @0 :VsockListener;
    error @1 :Error;
  }

  struct StreamResult {
    union {
      fd @0 :FdRef;
      # One end of a Unix stream socket, whose other end is the connection. shutdown(2) of either direction reaches the guest; a reset by the
      # guest reads as an end of file or ECONNRESET.
      error @1 :Error;
    }
  }

  struct ByteStreamResult {
    toGuest @0 :ByteStream;
    # Takes what the guest is to receive; `end` ends that direction. Dropping it before resets the connection.
    error @1 :Error;
  }
}

interface VsockListener {
  # Dropping it gives the port up; connections that were accepted go on.
}

interface VsockAcceptor {
  # Implemented by whoever listens.

  accept @0 (port :UInt32, sourcePort :UInt32, connection :VsockConnection) -> ();
  # The guest connects to `port`. It is connected once `connection` has been opened; if that is dropped before, the guest is refused.
}

interface VsockConnection {
  # A connection that the guest has asked for. Exactly one of the methods can be called, once; BAD_CONFIG after that. NOT_RUNNING if the
  # guest has given up or ended meanwhile.

  open @0 () -> HostVsockEndpoint.StreamResult;
  # As HostVsockEndpoint.connect.

  openStream @1 (fromGuest :ByteStream) -> HostVsockEndpoint.ByteStreamResult;
  # As HostVsockEndpoint.connectStream.
}
