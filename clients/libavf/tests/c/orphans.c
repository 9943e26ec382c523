/*
 * A program that ends without giving anything back, or is killed, leaves no process; and what it starts besides inherits none of the library's descriptors.
 */
#include "avf_test.h"

#include <sys/prctl.h>

/* A program with a guest; ends as `how` says. */
static void with_a_guest(int how) {
    AVirtualizationService *service = new_service();
    struct Machine machine = RUNNING(service, "with-a-guest", "halt");
    WAIT_FOR(&machine.console, "waiting halt");
    if (how == SIGKILL) {
        kill(getpid(), SIGKILL);
    }
    exit(how);
}

/* Everything that descends from this program ends, which adopts it if need be. */
static void all_end(int how) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        with_a_guest(how);
    }
    int status = -1, ended = 0, processes = 0;
    for (pid_t pid; (pid = wait(&status)) > 0;) {
        processes++;
        if (pid == child) {
            ended = how == SIGKILL ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : WIFEXITED(status) && WEXITSTATUS(status) == how;
            CHECK(ended);
        }
    }
    CHECK(errno == ECHILD && ended);
    CHECK(processes >= 2);
}

static void inherits_nothing(void) {
    AVirtualizationService *service = NULL;
    /* What a child has anyway. */
    int counts[2];
    for (int index = 0; index < 2; index++) {
        struct Machine machine;
        if (index == 1) {
            service = new_service();
            machine = RUNNING(service, "inherits-nothing", "halt");
            WAIT_FOR(&machine.console, "waiting halt");
        }
        FILE *listing = popen("ls -l /proc/self/fd", "re");
        char line[512];
        counts[index] = 0;
        while (listing != NULL && fgets(line, sizeof line, listing) != NULL) {
            counts[index]++;
        }
        pclose(listing);
        if (index == 1) {
            machine_end(&machine);
        }
    }
    EQUAL(counts[1], counts[0]);
    AVirtualizationService_destroy(service);
}

int main(void) {
    begin_with_kvm();
    inherits_nothing();
    EQUAL(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    all_end(SIGKILL);
    all_end(0);
    all_end(3);
    return 0;
}
