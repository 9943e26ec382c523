@0xb4f2c8a1d07e6395;
# Bytes that flow from one side to the other, for connections that carry no descriptors.

using import "error.capnp".Completion;

interface ByteStream {
  # Takes bytes in order. Dropping it without `end` means that the rest will never come.

  write @0 (bytes :Data) -> stream;
  # At most 64 KiB a call: more fails the stream. Flow-controlled: completes when the other side has taken the bytes, or keeps them within
  # a bound of its own.

  end @1 () -> Completion;
  # No bytes follow. Returns when all have been taken; the error says what became of those that were not.
}
