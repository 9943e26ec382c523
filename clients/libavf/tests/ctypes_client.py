"""A machine from Python, by ctypes alone: what a binding in any language does.

Takes the library's path and the guest's; ends with status 0 if everything was as it should be.
"""

import ctypes
import errno
import os
import sys

SHUTDOWN, KILLED = 5, 3


class Timespec(ctypes.Structure):
    """struct timespec of a 64-bit Linux."""

    _fields_ = [("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64)]


def functions(path):
    """The library with the types of what is used of it."""
    avf = ctypes.CDLL(path)
    handle, fd = ctypes.c_void_p, ctypes.c_int
    types = {
        "AVirtualMachineRawConfig_create": (handle,),
        "AVirtualMachineRawConfig_destroy": (None, handle),
        "AVirtualMachineRawConfig_setName": (ctypes.c_int, handle, ctypes.c_char_p),
        "AVirtualMachineRawConfig_setKernel": (None, handle, fd),
        "AVirtualMachineRawConfig_setInitRd": (None, handle, fd),
        "AVirtualMachineRawConfig_setMemoryMiB": (None, handle, ctypes.c_int32),
        "AVirtualizationService_create": (ctypes.c_int, ctypes.POINTER(handle), ctypes.c_bool),
        "AVirtualizationService_destroy": (None, handle),
        "AVirtualMachine_createRaw": (ctypes.c_int, handle, handle, fd, fd, fd, ctypes.POINTER(handle)),
        "AVirtualMachine_start": (ctypes.c_int, handle),
        "AVirtualMachine_stop": (ctypes.c_int, handle),
        "AVirtualMachine_waitForStop": (
            ctypes.c_bool,
            handle,
            ctypes.POINTER(Timespec),
            ctypes.POINTER(ctypes.c_int32),
        ),
        "AVirtualMachine_destroy": (None, handle),
    }
    for name, (result, *arguments) in types.items():
        function = getattr(avf, name)
        function.restype, function.argtypes = result, arguments
    return avf


def machine(avf, service, kernel, commands):
    """A machine that executes commands, and the reading end of its console."""
    config = avf.AVirtualMachineRawConfig_create()
    assert avf.AVirtualMachineRawConfig_setName(config, b"\xff") == -errno.EINVAL
    assert avf.AVirtualMachineRawConfig_setName(config, "Schlange \N{SNAKE}".encode()) == 0
    avf.AVirtualMachineRawConfig_setKernel(config, os.open(kernel, os.O_RDONLY))
    script = os.memfd_create("script")
    os.write(script, commands.encode())
    avf.AVirtualMachineRawConfig_setInitRd(config, script)
    avf.AVirtualMachineRawConfig_setMemoryMiB(config, 64)
    reading, writing = os.pipe()
    vm = ctypes.c_void_p()
    assert avf.AVirtualMachine_createRaw(service, config, writing, -1, -1, ctypes.byref(vm)) == 0
    return vm, open(reading, "rb")


def reason(avf, vm, timeout=None):
    """Why a machine stopped; none if it has not."""
    number = ctypes.c_int32(-1)
    stopped = avf.AVirtualMachine_waitForStop(vm, timeout, ctypes.byref(number))
    assert stopped == (number.value != -1)
    return number.value if stopped else None


def main():
    path, kernel = sys.argv[1:]
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("skipped: no /dev/kvm")
        return
    avf = functions(path)
    before = len(os.listdir("/proc/self/fd"))
    service = ctypes.c_void_p()
    assert avf.AVirtualizationService_create(ctypes.byref(service), False) == 0

    vm, console = machine(avf, service, kernel, "say:hello")
    assert reason(avf, vm, Timespec(0, 1000)) is None
    assert avf.AVirtualMachine_start(vm) == 0
    assert reason(avf, vm, Timespec(10, 0)) == SHUTDOWN
    avf.AVirtualMachine_destroy(vm)
    with console:
        assert b"ok say hello" in console.read()

    vm, console = machine(avf, service, kernel, "halt")
    assert avf.AVirtualMachine_start(vm) == 0
    with console:
        for line in console:
            if b"waiting halt" in line:
                break
        assert avf.AVirtualMachine_stop(vm) == 0
        assert reason(avf, vm) == KILLED
        avf.AVirtualMachine_destroy(vm)

    avf.AVirtualizationService_destroy(service)
    assert len(os.listdir("/proc/self/fd")) == before


main()
