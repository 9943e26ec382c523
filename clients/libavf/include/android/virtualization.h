/*
 * libavf for Sepal: Android's virtual machine API on Linux/KVM. C11 and C++17.
 *
 * Link with -lavf (pkg-config libavf). docs/libavf.md has examples, the devices of a guest, and what differs from Android; libavf(3) is the short form.
 *
 * Functions may be called from any thread. A service and a virtual machine may be used by several threads at once, a configuration by one at a time.
 * Handles end with the call that consumes or destroys them. No handle may be used in a process that fork() made.
 *
 * A descriptor that a function takes is closed by the library, whatever the function returns, when nothing needs it any more. -1 stands for no descriptor
 * where that is allowed, and so does any other number that is not an open descriptor, unless the function says otherwise. The flags of an open file, which
 * others may share, stay as they are, but for those of a disk that this process may not open anew (O_DIRECT, O_NONBLOCK).
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef ANDROID_VIRTUALIZATION_H
#define ANDROID_VIRTUALIZATION_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

/* Which pointers may be null. Compilers that do not know the words skip them, here and in programs that use them, too. */
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wnullability-extension"
#else
#ifndef _Nonnull
#define _Nonnull
#endif
#ifndef _Nullable
#define _Nullable
#endif
#ifndef _Null_unspecified
#define _Null_unspecified
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What a virtual machine is made of ---- */

/** A configuration. Only its name and kernel must be set. */
typedef struct AVirtualMachineRawConfig AVirtualMachineRawConfig;

/**
 * Makes a configuration in which nothing is set.
 *
 * \return The configuration; never null: without memory, the process is aborted. It is given back by AVirtualMachine_createRaw or
 * AVirtualMachineRawConfig_destroy.
 */
AVirtualMachineRawConfig* _Nonnull AVirtualMachineRawConfig_create(void);

/** Gives a configuration back, and closes its descriptors. Nothing happens if `config` is null. */
void AVirtualMachineRawConfig_destroy(AVirtualMachineRawConfig* _Nullable config);

/**
 * Sets the name, for logs and lists. Any text will do; several machines may have the same.
 *
 * \return 0, or -EINVAL if `name` is not UTF-8; the configuration is then as before.
 */
int AVirtualMachineRawConfig_setName(AVirtualMachineRawConfig* _Nonnull config, const char* _Nonnull name);

/**
 * Sets what identifies this machine to the software in it, from one start to the next. A guest finds it as the _UID of the ACPI device SEPL0002.
 *
 * \param instanceIdSize 64: the number of bytes at `instanceId`.
 * \return 0, or -EINVAL if `instanceIdSize` is another number.
 */
int AVirtualMachineRawConfig_setInstanceId(AVirtualMachineRawConfig* _Nonnull config, const int8_t* _Nonnull instanceId,
                                           size_t instanceIdSize);

/**
 * Sets the kernel: an ELF or bzImage file.
 *
 * \param fd a readable regular file or memfd, taken; -1: none. The one that was set before is closed.
 */
void AVirtualMachineRawConfig_setKernel(AVirtualMachineRawConfig* _Nonnull config, int fd);

/**
 * Sets the initial RAM file system.
 *
 * \param fd a readable regular file or memfd, taken; -1: none. The one that was set before is closed.
 */
void AVirtualMachineRawConfig_setInitRd(AVirtualMachineRawConfig* _Nonnull config, int fd);

/**
 * Adds a disk with a raw image. The guest finds the disks in this order.
 *
 * \param fd a readable regular file or block device, taken; writable, too, if the guest may write to the disk.
 * \return 0, or -EINVAL if `fd` is not an open descriptor.
 */
int AVirtualMachineRawConfig_addDisk(AVirtualMachineRawConfig* _Nonnull config, int fd, bool writable);

/** Sets the size of the memory, in MiB. 0 or less: 256. */
void AVirtualMachineRawConfig_setMemoryMib(AVirtualMachineRawConfig* _Nonnull config, int32_t memoryMib);

/** The same as AVirtualMachineRawConfig_setMemoryMib, as some programs spell it. */
void AVirtualMachineRawConfig_setMemoryMiB(AVirtualMachineRawConfig* _Nonnull config, int32_t memoryMib);

/**
 * Sets whether the memory shall be hidden from the host. Where the host cannot do that, AVirtualMachine_createRaw fails and says what the host lacks.
 */
void AVirtualMachineRawConfig_setProtectedVm(AVirtualMachineRawConfig* _Nonnull config, bool protectedVm);

/** Sets whether the guest has a memory balloon. */
void AVirtualMachineRawConfig_setBalloon(AVirtualMachineRawConfig* _Nonnull config, bool balloon);

/**
 * Would set whether protected machines prove who they are by a method of the hypervisor's own; KVM has none.
 *
 * \return -ENOTSUP.
 */
int AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod(AVirtualMachineRawConfig* _Nonnull config, bool enable);

/**
 * Has a range of the guest's physical memory be the content of a memfd, from its beginning: what one side writes, the other reads.
 *
 * The addresses are multiples of the page size and lie where the guest has memory or beyond it; what is wrong with them is told by
 * AVirtualMachine_createRaw or AVirtualMachine_start. At most 16 ranges. The memfd must not be shortened while the guest runs: if it lets itself be
 * sealed against that, it is.
 *
 * \param fd the memfd, of at least the range's size; taken.
 * \param rangeStart the first address of the range.
 * \param rangeEnd the first address after the range.
 * \return 0, or -EINVAL if `fd` is not an open descriptor or the range ends before it begins.
 */
int AVirtualMachineRawConfig_addCustomMemoryBackingFile(AVirtualMachineRawConfig* _Nonnull config, int fd, uint64_t rangeStart,
                                                        uint64_t rangeEnd);

/* ---- Who runs virtual machines ---- */

/** A guest manager of the program's own: a child process, which ends with the service or the program, and with it the machines. */
typedef struct AVirtualizationService AVirtualizationService;

/**
 * Starts a guest manager and connects to it.
 *
 * \param early whether the machines are early ones: each must be defined, for this program, in /etc/avf/early_vms*.xml.
 * \param service where the service is stored, if it worked.
 * \return 0; a negative errno if the manager does not start (-ENOENT: it was not found); -ECONNREFUSED if it started and does not answer.
 */
int AVirtualizationService_create(AVirtualizationService* _Null_unspecified* _Nonnull service, bool early);

/**
 * Ends the manager, and with it the machines that still run: AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED. Their handles remain to be destroyed.
 * Nothing happens if `service` is null.
 */
void AVirtualizationService_destroy(AVirtualizationService* _Nullable service);

/* ---- Virtual machines ---- */

/** A virtual machine, running or not. */
typedef struct AVirtualMachine AVirtualMachine;

/** Why a virtual machine stopped. As large as an int32_t. */
#if defined(__cplusplus) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L)
enum AVirtualMachineStopReason : int32_t {
#else
enum AVirtualMachineStopReason {
#endif
    /** The guest manager gave a reason that this library does not know. */
    AVIRTUAL_MACHINE_UNRECOGNISED = 0,
    /** The service was destroyed, or its process died. */
    AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED = 1,
    /** The guest manager could not tell how it ended. */
    AVIRTUAL_MACHINE_INFRASTRUCTURE_ERROR = 2,
    /** It was stopped by AVirtualMachine_stop, or its process was killed. */
    AVIRTUAL_MACHINE_KILLED = 3,
    /** It stopped for a reason that nobody knows. */
    AVIRTUAL_MACHINE_UNKNOWN = 4,
    /** The guest shut itself down. */
    AVIRTUAL_MACHINE_SHUTDOWN = 5,
    /** It did not start. */
    AVIRTUAL_MACHINE_START_FAILED = 6,
    /** The guest reset itself, which a kernel does that has panicked, too. */
    AVIRTUAL_MACHINE_REBOOT = 7,
    /** The guest did what a processor cannot go on from, or the machine's process crashed. */
    AVIRTUAL_MACHINE_CRASH = 8,
    /** Never here: there is no firmware for protected machines. */
    AVIRTUAL_MACHINE_PVM_FIRMWARE_PUBLIC_KEY_MISMATCH = 9,
    /** Never here, either. */
    AVIRTUAL_MACHINE_PVM_FIRMWARE_INSTANCE_IMAGE_CHANGED = 10,
    /** The guest's watchdog expired. */
    AVIRTUAL_MACHINE_HANGUP = 11
};

/**
 * Makes a virtual machine, which does not run yet.
 *
 * \param config what it is made of; taken, whatever this returns.
 * \param consoleOutFd where the console's output goes; taken. -1: nowhere.
 * \param consoleInFd where the console's input comes from; taken. -1: there is none.
 * \param logFd where the log's output goes, which is the third console's; taken. -1: nowhere.
 * \param vm where the machine is stored, if it worked.
 * \return 0, or -EIO. Then a line on the log and on standard error says why.
 */
int AVirtualMachine_createRaw(const AVirtualizationService* _Nonnull service, AVirtualMachineRawConfig* _Nonnull config, int consoleOutFd,
                              int consoleInFd, int logFd, AVirtualMachine* _Null_unspecified* _Nonnull vm);

/**
 * Starts a virtual machine, for the first time or again, and returns when its processors run.
 *
 * \return 0, or -EIO: it could not be started, or it is running, or its service is gone.
 */
int AVirtualMachine_start(AVirtualMachine* _Nonnull vm);

/**
 * Stops a virtual machine as if its power failed, and returns when it has stopped. It can be started again.
 *
 * \return 0, or -EIO: it was not running.
 */
int AVirtualMachine_stop(AVirtualMachine* _Nonnull vm);

/**
 * Waits until a virtual machine has stopped. One that never ran has not; one that has is what it stopped for until it is started again. What the guest
 * printed has been written before this returns true, unless its reader stands still.
 *
 * \param timeout how long to wait at most; null: for ever.
 * \param reason where the reason is stored, if it has stopped.
 * \return whether it has stopped.
 */
bool AVirtualMachine_waitForStop(AVirtualMachine* _Nonnull vm, const struct timespec* _Nullable timeout,
                                 enum AVirtualMachineStopReason* _Nonnull reason);

/** Stops a virtual machine if it runs, and gives it back. Nothing happens if `vm` is null. */
void AVirtualMachine_destroy(AVirtualMachine* _Nullable vm);

#ifdef __cplusplus
} /* extern "C" */
#endif

#if defined(__clang__)
#pragma clang diagnostic pop
#endif

#endif /* ANDROID_VIRTUALIZATION_H */
