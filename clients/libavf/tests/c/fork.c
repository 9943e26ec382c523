/*
 * Programs that fork and that have closed what they began with: a child that ends takes nothing along, one that stays keeps nothing alive.
 */
#include "avf_test.h"

/* Children that end in both ways, and one that is there until the end. */
static void children(void) {
    AVirtualizationService *service = new_service();
    struct Machine machine = RUNNING(service, "forks", "console-echo:0:2,halt");
    WAIT_FOR(&machine.console, "waiting console-echo");
    for (int round = 0; round < 2; round++) {
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            if (round == 0) {
                exit(0);
            }
            _exit(0);
        }
        int status = -1;
        EQUAL(waitpid(child, &status, 0), child);
        EQUAL(status, 0);
        CHECK(!has_stopped(machine.vm));
        EQUAL(write(machine.input, "x", 1), 1);
    }
    WAIT_FOR(&machine.console, "waiting halt");
    int ours, theirs;
    make_pipe(&ours, &theirs);
    pid_t child = fork();
    if (child == 0) {
        /* Until this program closes its end. */
        close(theirs);
        char byte;
        _exit(read(ours, &byte, 1) == 0 ? 0 : 1);
    }
    pid_t manager = descendant(getpid(), "guest-manager");
    CHECK(manager > 0);
    machine_end(&machine);
    AVirtualizationService_destroy(service);
    CHECK(kill(manager, 0) != 0 && errno == ESRCH);
    int status = -1;
    close(theirs);
    EQUAL(waitpid(child, &status, 0), child);
    EQUAL(status, 0);
    close(ours);
}

/* What the library opens gets the numbers of the standard descriptors. */
static void without_standard_descriptors(void) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        for (int fd = 0; fd <= 2; fd++) {
            close(fd);
        }
        AVirtualizationService *service = new_service();
        struct Machine machine = RUNNING(service, "closed", "say:hello");
        WAIT_FOR(&machine.console, "ok say hello");
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
        machine_end(&machine);
        AVirtualizationService_destroy(service);
        for (int fd = 0; fd <= 2; fd++) {
            CHECK(!is_open(fd));
        }
        _exit(0);
    }
    int status = -1;
    EQUAL(waitpid(child, &status, 0), child);
    EQUAL(status, 0);
}

/* Handed over, they are closed as any other. */
static void gives_standard_descriptors(void) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        AVirtualizationService *service = new_service();
        AVirtualMachine *vm = NULL;
        int log, log_out;
        make_pipe(&log, &log_out);
        dup2(log_out, STDOUT_FILENO);
        close(log_out);
        EQUAL(AVirtualMachine_createRaw(service, config_of("standard", "say:hello"), STDOUT_FILENO, STDIN_FILENO, -1, &vm), 0);
        EQUAL(AVirtualMachine_start(vm), 0);
        EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_SHUTDOWN);
        AVirtualMachine_destroy(vm);
        CHECK(!is_open(STDIN_FILENO) && !is_open(STDOUT_FILENO));
        struct Output output = output_of(log);
        CONTAINS(read_all(&output), "ok say hello");
        AVirtualizationService_destroy(service);
        _exit(0);
    }
    int status = -1;
    EQUAL(waitpid(child, &status, 0), child);
    EQUAL(status, 0);
}

int main(void) {
    begin_with_kvm();
    struct Belongings before = belongings();
    children();
    without_standard_descriptors();
    gives_standard_descriptors();
    NOTHING_LEFT(before);
    return 0;
}
