/*
 * Every reason for which a machine can stop on this host, each by a guest that does it, or by what happens to the machine's process.
 */
#include "avf_test.h"

struct Case {
    const char *commands;
    enum AVirtualMachineStopReason reason;
};

static const struct Case CASES[] = {
    {"say:done", AVIRTUAL_MACHINE_SHUTDOWN},
    {"reset:acpi", AVIRTUAL_MACHINE_REBOOT},
    {"reset:i8042", AVIRTUAL_MACHINE_REBOOT},
    {"reset:triple-fault", AVIRTUAL_MACHINE_REBOOT},
    {"crash", AVIRTUAL_MACHINE_CRASH},
    {"watchdog:50", AVIRTUAL_MACHINE_HANGUP},
};

/* What a guest does, twice: the second start is as good as the first. */
static void of_guests(AVirtualizationService *service) {
    for (size_t index = 0; index < sizeof CASES / sizeof *CASES; index++) {
        struct Machine machine = MACHINE(service, "of-guests", CASES[index].commands);
        for (int round = 0; round < 2; round++) {
            EQUAL(AVirtualMachine_start(machine.vm), 0);
            int reason = stop_reason(machine.vm);
            if (reason != (int)CASES[index].reason) {
                fail("%s: reason %d instead of %d", CASES[index].commands, reason, (int)CASES[index].reason);
            }
        }
        machine_end(&machine);
    }
}

/* The machine's process is killed, as by a host without memory. */
static void of_its_process(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "killed", "halt");
    for (int round = 0; round < 2; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        WAIT_FOR(&machine.console, "waiting halt");
        pid_t component = descendant(getpid(), "vmm-component");
        CHECK(component > 0);
        EQUAL(kill(component, SIGKILL), 0);
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_KILLED);
        CHECK(AVirtualMachine_stop(machine.vm) == -EIO);
    }
    machine_end(&machine);
}

/* A kernel that is none. */
static void never_starts(AVirtualizationService *service) {
    AVirtualMachineRawConfig *config = config_of("never-starts", "");
    const char text[] = "This is no kernel.";
    AVirtualMachineRawConfig_setKernel(config, file_of(text, sizeof text));
    struct Machine machine = MACHINE_OF(service, config);
    for (int round = 0; round < 2; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), -EIO);
        WAIT_FOR(&machine.log, "libavf: ");
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_START_FAILED);
        EQUAL(AVirtualMachine_stop(machine.vm), -EIO);
    }
    machine_end(&machine);
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {of_guests, of_its_process, never_starts, NULL};
    with_service(tests);
    return 0;
}
