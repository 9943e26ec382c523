/*
 * A program that runs out of descriptors at every point of a machine's life in turn: what fails says so as documented, and nothing is left of it.
 */
#include "avf_test.h"

#include <sys/resource.h>

/* Lets the program have so many descriptors with numbers below this. */
static void allow(rlim_t most) {
    struct rlimit limit;
    EQUAL(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = most;
    EQUAL(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

/* The lowest number that is free. */
static rlim_t lowest(void) {
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    close(fd);
    return (rlim_t)fd;
}

/* A whole life with `spare` descriptors for the library; how far it came: 0 no service, 1 no machine, 2 no start, 3 all. */
static int life(rlim_t spare, rlim_t normal) {
    AVirtualMachineRawConfig *config = config_of("exhausted", "say:hello");
    int console, console_out;
    make_pipe(&console, &console_out);
    struct Output output = output_of(console);
    AVirtualizationService *service = NULL;
    AVirtualMachine *vm = NULL;
    int step = 0;
    allow(lowest() + spare);
    int result = AVirtualizationService_create(&service, false);
    if (result == 0) {
        step = 1;
        result = AVirtualMachine_createRaw(service, config, console_out, -1, -1, &vm);
    } else {
        CHECK(result == -EMFILE || result == -ECONNREFUSED);
        CHECK(service == NULL);
        AVirtualMachineRawConfig_destroy(config);
        close(console_out);
    }
    if (step == 1 && result == 0) {
        step = 2;
        result = AVirtualMachine_start(vm);
        if (result == 0) {
            step = 3;
            WAIT_FOR(&output, "ok say hello");
            EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_SHUTDOWN);
        } else {
            EQUAL(result, -EIO);
            int reason = stop_reason(vm);
            CHECK(reason == AVIRTUAL_MACHINE_START_FAILED || reason == AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
        }
        AVirtualMachine_destroy(vm);
    } else if (step == 1) {
        EQUAL(result, -EIO);
        CHECK(vm == NULL);
    }
    AVirtualizationService_destroy(service);
    allow(normal);
    output_end(&output);
    return step;
}

/* With more of them again, a machine that did not start does. */
static void later(rlim_t spare, rlim_t normal) {
    AVirtualizationService *service = new_service();
    struct Machine machine = MACHINE(service, "later", "say:hello");
    allow(lowest() + spare);
    int result = AVirtualMachine_start(machine.vm);
    allow(normal);
    int reason = stop_reason(machine.vm);
    if (result != 0 && reason == AVIRTUAL_MACHINE_START_FAILED) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    } else {
        /* A descriptor of the manager's that could not be taken in: the connection is of no use any more. */
        EQUAL(reason, result == 0 ? AVIRTUAL_MACHINE_SHUTDOWN : AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
    }
    machine_end(&machine);
    AVirtualizationService_destroy(service);
}

int main(void) {
    begin_with_kvm();
    struct rlimit limit;
    EQUAL(getrlimit(RLIMIT_NOFILE, &limit), 0);
    struct Belongings before = belongings();
    int step = 0;
    for (rlim_t spare = 0; step < 3; spare++) {
        CHECK(spare < 100);
        step = life(spare, limit.rlim_cur);
        NOTHING_LEFT(before);
    }
    for (rlim_t spare = 0; spare < 14; spare++) {
        later(spare, limit.rlim_cur);
        NOTHING_LEFT(before);
    }
    return 0;
}
