/*
 * A machine's life: made, started, shut down by its guest, started again, stopped, destroyed while it runs.
 */
#include "avf_test.h"

/* How long something took, in milliseconds. */
static long long since(const struct timespec *start) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - start->tv_sec) * 1000LL + (now.tv_nsec - start->tv_nsec) / 1000000;
}

/* Timeouts of a machine that does not stop. */
static void timeouts(AVirtualMachine *vm) {
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_HANGUP;
    /* Those that are none are as zero. */
    const struct timespec short_ones[] = {{0, 0}, {0, 1}, {-1, 0}, {0, -1}, {0, 1000000000}, {-5, 2000000000}};
    for (size_t index = 0; index < sizeof short_ones / sizeof *short_ones; index++) {
        CHECK(!AVirtualMachine_waitForStop(vm, &short_ones[index], &reason));
        EQUAL(reason, AVIRTUAL_MACHINE_HANGUP);
    }
    const struct timespec timeout = {0, 30000000};
    struct timespec start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    CHECK(!AVirtualMachine_waitForStop(vm, &timeout, &reason));
    CHECK(since(&start) >= 30);
}

static void shuts_down(AVirtualizationService *service) {
    int before = descriptors();
    struct Machine machine = MACHINE(service, "shuts-down", "say:hello");
    timeouts(machine.vm);
    EQUAL(AVirtualMachine_stop(machine.vm), -EIO);
    for (int round = 1; round <= 3; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
        CHECK(has_stopped(machine.vm));
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
        EQUAL(AVirtualMachine_stop(machine.vm), -EIO);
        WAIT_FOR(&machine.console, "ok say hello");
        WAIT_FOR(&machine.console, "DONE");
    }
    /* Very long ones, and a result that there is already. */
    const struct timespec longest = {INT64_MAX, 999999999};
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_HANGUP;
    CHECK(AVirtualMachine_waitForStop(machine.vm, &longest, &reason));
    EQUAL(reason, AVIRTUAL_MACHINE_SHUTDOWN);
    AVirtualMachine_destroy(machine.vm);
    EQUAL(times(read_all(&machine.console), "DONE"), 3);
    close(machine.input);
    output_end(&machine.console);
    output_end(&machine.log);
    OPEN_DESCRIPTORS(before);
}

static void is_stopped(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "is-stopped", "halt");
    for (int round = 0; round < 2; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        WAIT_FOR(&machine.console, "waiting halt");
        EQUAL(AVirtualMachine_start(machine.vm), -EIO);
        CHECK(!has_stopped(machine.vm));
        timeouts(machine.vm);
        EQUAL(AVirtualMachine_stop(machine.vm), 0);
        CHECK(has_stopped(machine.vm));
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_KILLED);
        EQUAL(AVirtualMachine_stop(machine.vm), -EIO);
    }
    machine_end(&machine);
}

/* One that uses its processor is stopped no less. */
static void hangs(AVirtualizationService *service) {
    struct Machine machine = RUNNING(service, "hangs", "hang");
    WAIT_FOR(&machine.console, "waiting hang");
    EQUAL(AVirtualMachine_stop(machine.vm), 0);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_KILLED);
    machine_end(&machine);
}

static void is_destroyed(AVirtualizationService *service) {
    int before = descriptors();
    struct Machine machine = RUNNING(service, "is-destroyed", "halt");
    WAIT_FOR(&machine.console, "waiting halt");
    machine_end(&machine);
    NO_COMPONENT();
    OPEN_DESCRIPTORS(before);
    /* Right after the start, and never started. */
    machine = RUNNING(service, "is-destroyed", "halt");
    machine_end(&machine);
    machine = MACHINE(service, "is-destroyed", "halt");
    machine_end(&machine);
    OPEN_DESCRIPTORS(before);
}

/* Nothing runs, and nothing breaks. */
static void nulls(AVirtualizationService *service) {
    AVirtualMachine *none = NULL;
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_HANGUP;
    const struct timespec now = {0, 0};
    EQUAL(AVirtualMachine_start(none) < 0, true);
    EQUAL(AVirtualMachine_stop(none) < 0, true);
    CHECK(!AVirtualMachine_waitForStop(none, &now, &reason));
    EQUAL(reason, AVIRTUAL_MACHINE_HANGUP);
    AVirtualMachine_destroy(none);
    /* Nobody is told the reason. */
    enum AVirtualMachineStopReason *nowhere = NULL;
    struct Machine machine = RUNNING(service, "nulls", "say:hello");
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    (void)AVirtualMachine_waitForStop(machine.vm, &now, nowhere);
    machine_end(&machine);
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {shuts_down, is_stopped, hangs, is_destroyed, nulls, NULL};
    with_service(tests);
    return 0;
}
