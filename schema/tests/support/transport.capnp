@0xd8ee5c4f9a1b2c73;
# What the tests and measurements of the transport talk.

interface Probe {
  ping @0 (x :UInt64) -> (y :UInt64);
  # Returns x + 1.

  hang @1 () -> ();
  # Never returns.

  panicNow @2 () -> ();
  # Panics before it returns a future.

  panicLater @3 () -> ();
  # Panics after it has waited once.

  takeFds @4 (numbers :List(UInt32)) -> (inodes :List(UInt64));
  # Takes each descriptor and says which file it is.

  giveFd @5 () -> (number :UInt32, inode :UInt64);
  # Hands over a new memfd.

  write @6 (data :Data) -> stream;

  total @7 () -> (bytes :UInt64);
  # Bytes written so far.

  child @8 () -> (probe :Probe);
  # A new object.

  callBack @9 (probe :Probe, count :UInt32) -> (sum :UInt64);
  # Pings the probe that many times at once and sums up what comes back.

  keep @10 (probe :Probe) -> ();
  # Holds on to the capability as long as the object lives.

  blob @11 (size :UInt32) -> (data :Data);

  ignore @12 (numbers :List(UInt32)) -> ();
  # Leaves the descriptors alone.

  slowChild @13 () -> (probe :Probe);
  # A new object, after one turn of the loop.
}
