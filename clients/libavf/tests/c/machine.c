/*
 * What a guest finds: as much memory as was set, a balloon if it was wanted, the instance id, and the devices that every machine has.
 */
#include "avf_test.h"

/* The lines that a machine prints on some commands. */
static struct Machine prints(AVirtualizationService *service, AVirtualMachineRawConfig *config) {
    struct Machine machine = MACHINE_OF(service, config);
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    return machine;
}

static void memory(AVirtualizationService *service, void (*set)(AVirtualMachineRawConfig *, int32_t), int32_t mib, const char *expected) {
    AVirtualMachineRawConfig *config = config_of("memory", "memory");
    set(config, mib);
    struct Machine machine = prints(service, config);
    char *line = LINE(&machine.console, "ok memory");
    CONTAINS(line, expected);
    free(line);
    machine_end(&machine);
}

static void devices(AVirtualizationService *service, bool balloon) {
    AVirtualMachineRawConfig *config = config_of("devices", "pci,rng:64");
    AVirtualMachineRawConfig_setBalloon(config, balloon);
    struct Machine machine = prints(service, config);
    char *line = LINE(&machine.console, "ok pci");
    CONTAINS(line, "Console");
    CONTAINS(line, "EntropySource");
    CONTAINS(line, "Socket");
    EQUAL(strstr(line, "Balloon") != NULL, balloon);
    free(line);
    WAIT_FOR(&machine.console, "ok rng");
    machine_end(&machine);
}

static void instance_id(AVirtualizationService *service) {
    int8_t id[64];
    char expected[3 + 128 + 1] = "id=";
    for (int index = 0; index < 64; index++) {
        id[index] = (int8_t)(index * 37 - 100);
        snprintf(expected + 3 + 2 * index, 3, "%02x", (unsigned)(uint8_t)id[index]);
    }
    AVirtualMachineRawConfig *config = config_of("instance-id", "instance-id");
    EQUAL(AVirtualMachineRawConfig_setInstanceId(config, id, sizeof id), 0);
    /* The configuration has a copy. */
    memset(id, 0, sizeof id);
    struct Machine machine = MACHINE_OF(service, config);
    for (int round = 0; round < 2; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        char *line = LINE(&machine.console, "instance-id");
        CONTAINS(line, expected);
        free(line);
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    }
    machine_end(&machine);
    machine = prints(service, config_of("instance-id", "instance-id"));
    WAIT_FOR(&machine.console, "ok instance-id id=none");
    machine_end(&machine);
}

/* Names that the manager itself would not take, and one that two machines have. */
static void names(AVirtualizationService *service) {
    char longest[300];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    const char *names[] = {"", ".", "../..", "a/b", "two words", "\n", "-v", "\xe2\x98\x83", longest};
    for (size_t index = 0; index < sizeof names / sizeof *names; index++) {
        struct Machine machine = RUNNING(service, names[index], "say:hello");
        WAIT_FOR(&machine.console, "ok say hello");
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
        machine_end(&machine);
    }
    struct Machine one = RUNNING(service, "the same", "halt"), other = RUNNING(service, "the same", "halt");
    WAIT_FOR(&one.console, "waiting halt");
    WAIT_FOR(&other.console, "waiting halt");
    EQUAL(AVirtualMachine_stop(one.vm), 0);
    CHECK(!has_stopped(other.vm));
    machine_end(&one);
    machine_end(&other);
}

static void sizes(AVirtualizationService *service) {
    memory(service, AVirtualMachineRawConfig_setMemoryMib, 64, "mib=64");
    memory(service, AVirtualMachineRawConfig_setMemoryMiB, 96, "mib=96");
    memory(service, AVirtualMachineRawConfig_setMemoryMib, 0, "mib=256");
    memory(service, AVirtualMachineRawConfig_setMemoryMib, -1, "mib=256");
}

static void with_and_without_balloon(AVirtualizationService *service) {
    devices(service, true);
    devices(service, false);
}

int main(void) {
    begin_with_kvm();
    /* The longest name does not fit into the address of a socket. */
    unsetenv("SEPAL_AVF_VSOCK_DIR");
    Test *const tests[] = {sizes, with_and_without_balloon, instance_id, names, NULL};
    with_service(tests);
    return 0;
}
