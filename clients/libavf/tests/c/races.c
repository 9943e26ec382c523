/*
 * Ends that meet: the manager or a machine's process dies, or the service is destroyed, while another thread starts, stops or waits. Whoever wins,
 * every call returns, and with something that fits.
 */
#include "avf_test.h"

enum { ROUNDS = 8 };

static void *starts(void *vm) { return (void *)(intptr_t)AVirtualMachine_start((AVirtualMachine *)vm); }

static void *stops(void *vm) { return (void *)(intptr_t)AVirtualMachine_stop((AVirtualMachine *)vm); }

static void *waits(void *vm) { return (void *)(intptr_t)stop_reason((AVirtualMachine *)vm); }

/* Lets another thread go on for a moment, which is of another length each round. */
static void let_others(int round) {
    const struct timespec moment = {0, round * 2000000L};
    nanosleep(&moment, NULL);
}

/* How the service goes. */
typedef void Ending(AVirtualizationService *);

static void is_killed(AVirtualizationService *service) {
    (void)service;
    EQUAL(kill(descendant(getpid(), "guest-manager"), SIGKILL), 0);
}

static void while_it_starts(Ending *end, bool destroyed) {
    for (int round = 0; round < ROUNDS; round++) {
        struct Belongings before = belongings();
        AVirtualizationService *service = new_service();
        struct Machine machine = MACHINE(service, "starts", "halt");
        pthread_t starter, waiter;
        EQUAL(pthread_create(&waiter, NULL, waits, machine.vm), 0);
        EQUAL(pthread_create(&starter, NULL, starts, machine.vm), 0);
        let_others(round);
        end(service);
        void *started = NULL, *reason = NULL;
        EQUAL(pthread_join(starter, &started), 0);
        EQUAL(pthread_join(waiter, &reason), 0);
        CHECK((intptr_t)started == 0 || (intptr_t)started == -EIO);
        EQUAL((intptr_t)reason, AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
        EQUAL(AVirtualMachine_start(machine.vm), -EIO);
        machine_end(&machine);
        if (!destroyed) {
            AVirtualizationService_destroy(service);
        }
        NOTHING_LEFT(before);
    }
}

static void while_it_stops(void) {
    for (int round = 0; round < ROUNDS; round++) {
        struct Belongings before = belongings();
        AVirtualizationService *service = new_service();
        struct Machine machine = RUNNING(service, "stops", "halt");
        pthread_t stopper;
        EQUAL(pthread_create(&stopper, NULL, stops, machine.vm), 0);
        let_others(round);
        is_killed(service);
        void *stopped = NULL;
        EQUAL(pthread_join(stopper, &stopped), 0);
        int reason = stop_reason(machine.vm);
        CHECK((intptr_t)stopped == 0 ? reason == AVIRTUAL_MACHINE_KILLED : reason == AVIRTUAL_MACHINE_VIRTUALIZATION_SERVICE_DIED);
        machine_end(&machine);
        AVirtualizationService_destroy(service);
        NOTHING_LEFT(before);
    }
}

/* Starts a machine whose process was killed a moment ago: until the manager knows, it cannot be started. */
static void start_again(AVirtualMachine *vm) {
    while (AVirtualMachine_start(vm) != 0) {
        EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_START_FAILED);
        look_again();
    }
}

/* The machine's own process, which may have ended by then. */
static void with_its_process(void) {
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    struct Machine machine = MACHINE(service, "process", "halt");
    for (int round = 0; round < ROUNDS; round++) {
        pthread_t other;
        bool starting = round % 2 == 0;
        if (!starting) {
            start_again(machine.vm);
        }
        EQUAL(pthread_create(&other, NULL, starting ? starts : stops, machine.vm), 0);
        let_others(round / 2);
        pid_t component = descendant(getpid(), "vmm-component");
        if (component > 0) {
            kill(component, SIGKILL);
        }
        void *result = NULL;
        EQUAL(pthread_join(other, &result), 0);
        CHECK((intptr_t)result == 0 || (intptr_t)result == -EIO);
        if (starting && result == NULL && component < 0) {
            EQUAL(AVirtualMachine_stop(machine.vm), 0);
        }
        int reason = stop_reason(machine.vm);
        CHECK(reason == AVIRTUAL_MACHINE_KILLED || (starting && reason == AVIRTUAL_MACHINE_START_FAILED));
    }
    /* None of that is for ever. */
    start_again(machine.vm);
    EQUAL(AVirtualMachine_stop(machine.vm), 0);
    machine_end(&machine);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
}

int main(void) {
    begin_with_kvm();
    /* A manager that is killed leaves its sockets there, until a machine of the same name replaces them. */
    unsetenv("SEPAL_AVF_VSOCK_DIR");
    while_it_starts(is_killed, false);
    while_it_starts(AVirtualizationService_destroy, true);
    while_it_stops();
    with_its_process();
    return 0;
}
