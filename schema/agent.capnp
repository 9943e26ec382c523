@0xe7c41f9d2a85b036;
# What the agent in a guest does for whoever holds its capability: files in and out, programs.

using import "error.capnp".Error;
using import "error.capnp".Completion;
using import "bytes.capnp".ByteStream;
using import "facet.capnp".Facet;

interface Agent extends (Facet) {
  # The agent of one guest. Whoever holds it can do in the guest whatever the agent can, which runs as root as a rule. All methods wait for the
  # agent to be ready, up to 10 s (TIMED_OUT), but `ready`, which waits for as long as the guest runs. Needs the right `agent`; programs end, and
  # files in transfer break off, with the capability that they were started through.

  ready @0 () -> ReadyResult;
  # Returns when the agent has answered: the guest is up.

  putFile @1 (path :Text, mode :UInt32) -> SinkResult;
  # Writes a file of the guest: what goes into the returned stream becomes its content. `path` is absolute, at most 4095 bytes; `mode` the
  # permission bits of a file that is new (0: 0644). The file appears under its name when the stream is ended, whose answer tells what went
  # wrong (NO_STORAGE, PERMISSION_DENIED, NOT_FOUND).

  getFile @2 (path :Text, sink :ByteStream) -> SizeResult;
  # Reads a file of the guest into `sink`, ends that, and returns how many bytes it had and its mode.

  exec @3 (command :Command, stdout :ByteStream, stderr :ByteStream) -> ExecResult;
  # Runs a program in the guest. Each of `stdout` and `stderr` is ended when the program has closed it; null: its bytes are dropped. With a
  # terminal all output goes to `stdout`.

  struct Command {
    arguments @0 :List(Text);
    # The program, looked up in the guest's PATH unless it has a '/', and its arguments: 1 to 1024, at most 64 KiB together.
    environment @1 :List(Text);
    # NAME=VALUE, added to the agent's own environment; at most 256.
    directory @2 :Text;
    # Where to run it; empty: the agent's own.
    terminal @3 :Terminal;
    # Run it on a terminal of this size; null: on pipes.
  }

  struct Terminal {
    columns @0 :UInt16;
    rows @1 :UInt16;
  }

  struct ReadyResult {
    union {
      version @0 :Text;
      # What the agent says that it is.
      error @1 :Error;
    }
  }

  struct SinkResult {
    sink @0 :ByteStream;
    error @1 :Error;
  }

  struct SizeResult {
    union {
      size @0 :UInt64;
      error @1 :Error;
    }
    mode @2 :UInt32;
    # Its permission bits, as the guest says.
  }

  struct ExecResult {
    process @0 :Process;
    error @1 :Error;
  }
}

interface Process {
  # A program that runs in the guest. Dropping it kills the program (SIGKILL).

  stdin @0 () -> (stdin :ByteStream);
  # The program's standard input; ended, it reads an end of file. Dropped without, the same.

  resize @1 (columns :UInt16, rows :UInt16) -> Completion;
  # The terminal has another size. NOT_SUPPORTED if it has none.

  signal @2 (number :UInt8) -> Completion;
  # Sends it a signal of the guest's numbering.

  wait @3 () -> WaitResult;
  # Returns when the program has ended and its output has been delivered.

  struct WaitResult {
    union {
      exited @0 :UInt8;
      # Its exit status.
      killed @1 :UInt8;
      # The signal that killed it.
      error @2 :Error;
      # The guest or its agent went away first.
    }
  }
}
