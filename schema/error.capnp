@0xd8eb1b69f88ddd79;
# Errors that a caller can expect, as data. An exception, by contrast, means a broken connection or a bug.
#
# A result is a union of what was asked for and an error. Where a capability was asked for, it is a struct of both, so that calls can be sent to the
# capability ahead of the answer: `error` is null if it worked, and otherwise those calls fail with an exception that says what the error says.

struct Error {
  # Why an expected operation did not happen.

  kind @0 :Kind;
  # What to match on.

  message @1 :Text;
  # One sentence or two for a person: what was wrong, with the values seen, and where there is one, what to do next.

  about @2 :Text;
  # The field ("disks[2].id"), file or device that the error is about; empty where it is about none.

  enum Kind {
    # The first fifteen are Fuchsia's GuestError, the next three are the rest of its GuestManagerError (BAD_CONFIG and
    # ALREADY_RUNNING are in both), noResources and connectionRefused come from its vsock protocol; those after are Sepal's own.

    internalError @0;
    # The component or the manager failed in a way that is no fault of the request.
    deviceNotPresent @1;
    # The guest has no such device: its configuration left it out.
    badConfig @2;
    # A field of the request is out of range, contradicts another, or names something that cannot be used.
    guestInitializationFailure @3;
    # Guest memory or the virtual machine itself could not be made.
    deviceInitializationFailure @4;
    # A device could not be made.
    deviceStartFailure @5;
    # A device was made, but its dispatch loop did not start.
    deviceMemoryOverlap @6;
    # Two devices, or a device and memory, claim the same addresses.
    failedServiceConnect @7;
    # Something that a device needs from outside could not be reached.
    duplicatePublicServices @8;
    # Two devices want to publish the same service.
    kernelLoadFailure @9;
    # The kernel, or what goes with it, could not be loaded.
    vcpuStartFailure @10;
    # A vCPU could not be started.
    vcpuRuntimeFailure @11;
    # A vCPU met something that it cannot go on from.
    notCreated @12;
    # The operation needs a successful `create` first.
    alreadyRunning @13;
    # The operation is not possible while the guest runs, starts or stops, or the name is taken by such a guest.
    controllerForcedHalt @14;
    # `stop` was called while the guest ran.

    notRunning @15;
    # No guest of that name runs.
    startFailure @16;
    # The component could not be started, or its jail could not be closed.
    noStorage @17;
    # There is not enough space on the host for what the guest needs.

    noResources @18;
    # A limit is reached: connections, guests, file descriptors, memory.
    connectionRefused @19;
    # Nobody listens there.

    notSupported @20;
    # The request is valid, but this version, host or guest cannot do it; `about` names the field.
    permissionDenied @21;
    # The caller may not do this; the message says what it lacks.
    notFound @22;
    # No such guest, file or object.
    timedOut @23;
    # The deadline passed first; the message says what was still awaited.
    cancelled @24;
    # The operation was interrupted by another (a `stop`, for example) before it finished.
    vmmTerminated @25;
    # The guest's component ended unexpectedly (Fuchsia's VMM_UNEXPECTED_TERMINATION); the message says how.
    alreadyBound @26;
    # Somebody has that port, context id or name already.
    revoked @27;
    # The capability, or one that it was derived from, was revoked or has expired. Nothing brings it back.
  }
}

struct Completion {
  # The result of an operation that returns nothing but whether it worked.
  union {
    ok @0 :Void;
    error @1 :Error;
  }
}
