/*
 * The manager dies, or its service is destroyed, while there are machines: each is told so, everything fails from then on, and everything can be given back.
 */
#include "avf_test.h"

static void *waits(void *vm) { return (void *)(intptr_t)stop_reason((AVirtualMachine *)vm); }

/* What is left of a machine whose service is gone; one that had stopped before keeps its reason. */
static void is_dead(struct Machine *machine, enum AVirtualMachineStopReason reason) {
    EQUAL(stop_reason(machine->vm), reason);
    EQUAL(AVirtualMachine_start(machine->vm), -EIO);
    EQUAL(stop_reason(machine->vm), reason);
    EQUAL(AVirtualMachine_stop(machine->vm), -EIO);
    machine_end(machine);
}

/* How a service goes. */
typedef void Ending(AVirtualizationService *);

static void is_killed(AVirtualizationService *service) {
    (void)service;
    pid_t manager = descendant(getpid(), "guest-manager");
    CHECK(manager > 0);
    EQUAL(kill(manager, SIGKILL), 0);
}

/* Killed, and waited for by the program, which may wait for all of its children. */
static void is_reaped(AVirtualizationService *service) {
    pid_t manager = descendant(getpid(), "guest-manager");
    is_killed(service);
    int status = 0;
    pid_t reaped = waitpid(manager, &status, 0);
    /* Whoever comes first. */
    CHECK(reaped == manager || (reaped < 0 && errno == ECHILD));
}

static void dies(Ending *end, bool destroyed) {
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    struct Machine runs = RUNNING(service, "runs", "halt");
    struct Machine rests = MACHINE(service, "rests", "halt");
    struct Machine ended = RUNNING(service, "ended", "say:done");
    EQUAL(stop_reason(ended.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    WAIT_FOR(&runs.console, "waiting halt");
    pthread_t waiter;
    EQUAL(pthread_create(&waiter, NULL, waits, runs.vm), 0);
    end(service);
    void *reason = NULL;
    EQUAL(pthread_join(waiter, &reason), 0);
    EQUAL((intptr_t)reason, AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
    if (!destroyed) {
        AVirtualMachine *vm = NULL;
        EQUAL(AVirtualMachine_createRaw(service, config_of("late", ""), -1, -1, -1, &vm), -EIO);
        CHECK(vm == NULL);
    }
    is_dead(&runs, AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
    is_dead(&rests, AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
    is_dead(&ended, AVIRTUAL_MACHINE_SHUTDOWN);
    if (!destroyed) {
        AVirtualizationService_destroy(service);
    }
    NOTHING_LEFT(before);
}

int main(void) {
    begin_with_kvm();
    /* A manager that is killed leaves its sockets there, until a machine of the same name replaces them. */
    unsetenv("SEPAL_AVF_VSOCK_DIR");
    dies(is_killed, false);
    dies(is_reaped, false);
    dies(AVirtualizationService_destroy, true);
    return 0;
}
