/*
 * One machine used by many threads, and many machines by one thread each: everybody who waits is told, and of those who start or stop, one is right.
 */
#include "avf_test.h"

enum { THREADS = 4, ROUNDS = 3 };

static void *waits(void *vm) { return (void *)(intptr_t)stop_reason((AVirtualMachine *)vm); }

/* Waits in pieces. */
static void *looks(void *vm) {
    const struct timespec piece = {0, 1000000};
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_UNRECOGNISED;
    while (!AVirtualMachine_waitForStop((AVirtualMachine *)vm, &piece, &reason)) {
    }
    return (void *)(intptr_t)reason;
}

static void *starts(void *vm) { return (void *)(intptr_t)AVirtualMachine_start((AVirtualMachine *)vm); }

static void *stops(void *vm) { return (void *)(intptr_t)AVirtualMachine_stop((AVirtualMachine *)vm); }

/* Runs a function in some threads at once. */
static void all(pthread_t threads[THREADS], void *(*function)(void *), AVirtualMachine *vm) {
    for (int index = 0; index < THREADS; index++) {
        EQUAL(pthread_create(&threads[index], NULL, function, vm), 0);
    }
}

/* How many of them returned 0; the others must have returned -EIO. */
static int succeeded(pthread_t threads[THREADS]) {
    int count = 0;
    for (int index = 0; index < THREADS; index++) {
        void *result = NULL;
        EQUAL(pthread_join(threads[index], &result), 0);
        CHECK((intptr_t)result == 0 || (intptr_t)result == -EIO);
        count += result == NULL;
    }
    return count;
}

static void one_machine(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "one-machine", "halt");
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t starters[THREADS], waiters[THREADS], lookers[THREADS], stoppers[THREADS];
        all(starters, starts, machine.vm);
        EQUAL(succeeded(starters), 1);
        all(waiters, waits, machine.vm);
        all(lookers, looks, machine.vm);
        WAIT_FOR(&machine.console, "waiting halt");
        all(stoppers, stops, machine.vm);
        CHECK(succeeded(stoppers) >= 1);
        for (int index = 0; index < THREADS; index++) {
            void *reason = NULL, *other = NULL;
            EQUAL(pthread_join(waiters[index], &reason), 0);
            EQUAL(pthread_join(lookers[index], &other), 0);
            EQUAL((intptr_t)reason, AVIRTUAL_MACHINE_KILLED);
            EQUAL((intptr_t)other, AVIRTUAL_MACHINE_KILLED);
        }
    }
    machine_end(&machine);
}

/* Whoever waited before the first start is told of the first end. */
static void before_the_start(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "before-the-start", "reset");
    pthread_t waiters[THREADS];
    all(waiters, waits, machine.vm);
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    for (int index = 0; index < THREADS; index++) {
        void *reason = NULL;
        EQUAL(pthread_join(waiters[index], &reason), 0);
        EQUAL((intptr_t)reason, AVIRTUAL_MACHINE_REBOOT);
    }
    machine_end(&machine);
}

/* Stops while the machine starts: it has stopped or it runs, and can be stopped. */
static void stop_while_it_starts(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "stop-while-it-starts", "halt");
    for (int round = 0; round < 5 * ROUNDS; round++) {
        pthread_t starter, stopper;
        EQUAL(pthread_create(&starter, NULL, starts, machine.vm), 0);
        EQUAL(pthread_create(&stopper, NULL, stops, machine.vm), 0);
        void *started = NULL, *stopped = NULL;
        EQUAL(pthread_join(starter, &started), 0);
        EQUAL(pthread_join(stopper, &stopped), 0);
        if (stopped != NULL) {
            EQUAL((intptr_t)started, 0);
            EQUAL(AVirtualMachine_stop(machine.vm), 0);
        }
        CHECK(has_stopped(machine.vm));
    }
    machine_end(&machine);
}

static void *has_machines(void *service) {
    for (int round = 0; round < ROUNDS; round++) {
        struct Machine machine = MACHINE((AVirtualizationService *)service, "the same name", "console-say:2:logged");
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
        WAIT_FOR(&machine.console, "DONE");
        WAIT_FOR(&machine.log, "logged");
        machine_end(&machine);
    }
    return NULL;
}

static void many_machines(AVirtualizationService *service) {
    pthread_t threads[THREADS];
    for (int index = 0; index < THREADS; index++) {
        EQUAL(pthread_create(&threads[index], NULL, has_machines, service), 0);
    }
    for (int index = 0; index < THREADS; index++) {
        EQUAL(pthread_join(threads[index], NULL), 0);
    }
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {one_machine, before_the_start, stop_while_it_starts, many_machines, NULL};
    with_service(tests);
    return 0;
}
