/*
 * Memory of the program's own in the guest: what one side writes, the other reads; inside the guest's memory and beyond it.
 */
#include "avf_test.h"

enum { MIB = 1 << 20 };

/* FNV-1a, as the guest computes it. */
static uint64_t fnv(const unsigned char *bytes, size_t size) {
    uint64_t sum = UINT64_C(0xcbf29ce484222325);
    for (size_t index = 0; index < size; index++) {
        sum = (sum ^ bytes[index]) * UINT64_C(0x100000001b3);
    }
    return sum;
}

/* Two MiB at `start`: the first is the host's to write and the second the guest's. */
static void is_shared(AVirtualizationService *service, uint64_t start, unsigned flags) {
    int memfd = memfd_create("shared", MFD_CLOEXEC | flags);
    CHECK(memfd >= 0);
    EQUAL(ftruncate(memfd, 2 * MIB), 0);
    unsigned char *memory = (unsigned char *)mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    CHECK(memory != MAP_FAILED);
    for (size_t index = 0; index < MIB; index++) {
        memory[index] = (unsigned char)(index * 7 + start / MIB);
    }
    char commands[256], expected[32];
    unsigned long long second = start + MIB;
    snprintf(commands, sizeof commands, "mem-sum:%#llx:%d,mem-wait:%#llx:9,mem-fill:%#llx:%d:5,mem-wait:%#llx:1", (unsigned long long)start, MIB,
             second, second, MIB, (unsigned long long)start);
    AVirtualMachineRawConfig *config = config_of("is-shared", commands);
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, dup(memfd), start, start + 2 * MIB), 0);
    struct Machine machine = MACHINE_OF(service, config);
    for (int round = 0; round < 2; round++) {
        memory[0] = (unsigned char)(100 + round);
        memory[MIB] = 0;
        snprintf(expected, sizeof expected, "fnv=%016llx", (unsigned long long)fnv(memory, MIB));
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        char *line = LINE(&machine.console, "ok mem-sum");
        CONTAINS(line, expected);
        free(line);
        WAIT_FOR(&machine.console, "waiting mem-wait");
        /* The guest runs, and sees it. */
        *(volatile unsigned char *)(memory + MIB) = 9;
        WAIT_FOR(&machine.console, "ok mem-fill");
        /* So does the host, while the guest waits. */
        for (size_t index = 0; index < MIB; index++) {
            EQUAL(memory[MIB + index], (5 + index) % 251);
        }
        *(volatile unsigned char *)memory = 1;
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    }
    machine_end(&machine);
    munmap(memory, 2 * MIB);
    close(memfd);
}

/* Memory that the program takes away under the guest: that guest ends, and nothing else. */
static void is_cut(AVirtualizationService *service) {
    const unsigned long long start = UINT64_C(5) << 30;
    int memfd = memfd_create("shared", MFD_CLOEXEC);
    EQUAL(ftruncate(memfd, MIB), 0);
    char commands[64];
    snprintf(commands, sizeof commands, "mem-wait:%#llx:1", start);
    AVirtualMachineRawConfig *config = config_of("is-cut", commands);
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, dup(memfd), start, start + MIB), 0);
    struct Machine machine = MACHINE_OF(service, config), other = RUNNING(service, "other", "console-echo:0:1");
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    WAIT_FOR(&machine.console, "waiting mem-wait");
    WAIT_FOR(&other.console, "waiting console-echo");
    EQUAL(ftruncate(memfd, 0), 0);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_CRASH);
    /* Where it is too short from the beginning it does not start. */
    EQUAL(AVirtualMachine_start(machine.vm), -EIO);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_START_FAILED);
    EQUAL(write(other.input, "x", 1), 1);
    EQUAL(stop_reason(other.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    machine_end(&machine);
    machine_end(&other);
    close(memfd);
}

/* Ranges that cannot be, told when the machine is made or started. */
static void cannot_be(AVirtualizationService *service, int fd, uint64_t start, uint64_t end) {
    AVirtualMachineRawConfig *config = config_of("cannot-be", "");
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, fd, start, end), 0);
    AVirtualMachine *vm = NULL;
    int result = AVirtualMachine_createRaw(service, config, -1, -1, -1, &vm);
    if (result == 0) {
        EQUAL(AVirtualMachine_start(vm), -EIO);
        EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_START_FAILED);
        AVirtualMachine_destroy(vm);
    } else {
        EQUAL(result, -EIO);
        CHECK(vm == NULL);
    }
}

static int memfd_of(off_t size) {
    int memfd = memfd_create("shared", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    EQUAL(ftruncate(memfd, size), 0);
    return memfd;
}

static void all_shared(AVirtualizationService *service) {
    is_shared(service, UINT64_C(64) * MIB, MFD_ALLOW_SEALING);
    is_shared(service, UINT64_C(5) << 30, MFD_ALLOW_SEALING);
    is_shared(service, UINT64_C(5) << 30, 0);
}

static void none_can_be(AVirtualizationService *service) {
    const uint64_t above = UINT64_C(5) << 30;
    cannot_be(service, memfd_of(MIB), above + 1, above + MIB);
    cannot_be(service, memfd_of(MIB), above, above + 100);
    cannot_be(service, memfd_of(MIB), above, above);
    /* Not so much memory. */
    cannot_be(service, memfd_of(MIB), above, above + 2 * MIB);
    /* Where devices are. */
    cannot_be(service, memfd_of(MIB), UINT64_C(0xe0000000), UINT64_C(0xe0000000) + MIB);
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {all_shared, is_cut, none_can_be, NULL};
    with_service(tests);
    return 0;
}
