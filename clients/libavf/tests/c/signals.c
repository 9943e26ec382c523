/*
 * A program's signals stay its own: handlers run on its threads, none comes that it did not send itself, and it may wait for all of its children.
 */
#include "avf_test.h"

static volatile sig_atomic_t elsewhere = 0, handled = 0, reaped = 0;
static pid_t main_thread;

static void on_user(int signal) {
    (void)signal;
    handled++;
    elsewhere += gettid() != main_thread;
}

/* As a program does that does not care which children it has. */
static void on_child(int signal) {
    (void)signal;
    int error = errno;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
        reaped++;
    }
    errno = error;
}

static void handle(int signal, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    EQUAL(sigaction(signal, &action, NULL), 0);
}

/* Handlers that interrupt calls of the library. */
static void *disturbs(void *target) {
    for (int count = 0; count < 200; count++) {
        pthread_kill(*(pthread_t *)target, SIGUSR1);
        kill(getpid(), SIGUSR2);
        look_again();
    }
    return NULL;
}

/* A service and a machine, from the beginning to the end. */
static void a_life(void) {
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    struct Machine machine = RUNNING(service, "children", "say:done");
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    machine_end(&machine);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
}

int main(void) {
    begin_with_kvm();
    main_thread = getpid();
    struct Belongings before = belongings();
    handle(SIGUSR1, on_user);
    handle(SIGUSR2, on_user);
    AVirtualizationService *service = new_service();
    struct Machine machine = RUNNING(service, "signals", "halt");
    WAIT_FOR(&machine.console, "waiting halt");
    /* Everything below happens while signals come; only the thread that sends them may take one besides the main thread, so it takes none. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_t self = pthread_self(), other;
    EQUAL(pthread_create(&other, NULL, disturbs, &self), 0);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    const struct timespec piece = {0, 20000000};
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_UNRECOGNISED;
    CHECK(!AVirtualMachine_waitForStop(machine.vm, &piece, &reason));
    for (int round = 0; round < 3; round++) {
        EQUAL(AVirtualMachine_stop(machine.vm), 0);
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        WAIT_FOR(&machine.console, "waiting halt");
    }
    EQUAL(pthread_join(other, NULL), 0);
    CHECK(handled > 0);
    EQUAL(elsewhere, 0);
    machine_end(&machine);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);

    handle(SIGCHLD, on_child);
    a_life();
    /* Nobody is to wait for children. */
    signal(SIGCHLD, SIG_IGN);
    a_life();
    return 0;
}
