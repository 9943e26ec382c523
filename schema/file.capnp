@0xc69c670abcec9fa7;
# Files and other handles, and how they travel.

struct FdRef {
  # A file descriptor that travels beside the bytes of the connection, as SCM_RIGHTS of a Unix socket. Each side counts the descriptors
  # that it has sent on the connection, from 0; a message names one by that number. A descriptor is sent with the first byte of the message
  # that names it, and can be taken once. One that is not taken is closed with that message. At most 200 may be there untaken, those
  # of messages that have not come whole included: one more ends the connection.

  number @0 :UInt32;
  # The n-th descriptor sent in the direction of the message.
}

struct File {
  # A file that a guest shall use. Exactly one way to name it.

  union {
    none @0 :Void;
    # No file: the field's default applies.

    fd @1 :FdRef;
    # An open file: a regular file, or a memfd. Readable; writable where the guest may write to it.

    bytes @2 :Data;
    # The content itself, as far as it fits into a message (64 KiB at most).

    upload @3 :Upload;
    # The content as it was streamed before; for connections that carry no descriptors.

    path @4 :Text;
    # An absolute path, opened by the guest manager with its own authority, and only for a client that may name paths
    # (one with the manager's own uid). A component never accepts one.
  }
}

interface Upload {
  # A file that is streamed to the guest manager, kept in memory until the capability is dropped and nothing uses it any more.

  write @0 (bytes :Data) -> stream;
  # Appends at most 64 KiB. Past the limit of the upload the stream fails with a message that says so.

  finish @1 () -> (size :UInt64);
  # No bytes may follow. Returns the number of bytes received. An upload can be used in a File only after this.
}
