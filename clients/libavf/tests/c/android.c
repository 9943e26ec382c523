/*
 * The scenario of Android's own test of the interface, many times in one program: a guest boots, bytes go to and fro over vsock and the console, and it
 * stops within ten seconds for the reason that it should. Nothing is left each time: no descriptor, no process, no thread, no memory.
 */
#include "vsock.h"

#include <malloc.h>

static void once(AVirtualizationService *service) {
    struct Machine machine = RUNNING(service, "android", "vsock-listen:1024,console-echo:0:6");
    WAIT_FOR(&machine.console, "waiting vsock-listen");
    vsock_exchange("android", "1024", "HelloFromHost");
    WAIT_FOR(&machine.console, "ok vsock-listen bytes=13");
    WAIT_FOR(&machine.console, "waiting console-echo");
    EQUAL(write(machine.input, "typed\n", 6), 6);
    while (strstr(machine.console.text + machine.console.seen, "typed") == NULL) {
        CHECK(read_more(&machine.console));
    }
    const struct timespec timeout = {10, 0};
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_UNRECOGNISED;
    CHECK(AVirtualMachine_waitForStop(machine.vm, &timeout, &reason));
    EQUAL(reason, AVIRTUAL_MACHINE_SHUTDOWN);
    machine_end(&machine);
}

/* Every other round with a service of its own. */
static void round_of(int round, AVirtualizationService *service) {
    struct Belongings before = belongings();
    if (round % 2 == 0) {
        once(service);
        OPEN_DESCRIPTORS(before.descriptors);
        NO_COMPONENT();
    } else {
        AVirtualizationService *own = new_service();
        once(own);
        AVirtualizationService_destroy(own);
        OPEN_DESCRIPTORS(before.descriptors);
    }
    while (threads() != before.threads) {
        look_again();
    }
}

int main(int count, char **arguments) {
    begin_with_kvm();
    int rounds = count > 1 ? atoi(arguments[1]) : 50;
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    size_t settled = 0;
    for (int round = 0; round < rounds; round++) {
        alarm(PATIENCE);
        round_of(round, service);
        if (round == 9) {
            settled = mallinfo2().uordblks;
        }
    }
    size_t end = mallinfo2().uordblks;
    if (getenv("AVF_TEST_SHOW") != NULL) {
        printf("in use after 10 rounds: %zu bytes, after %d: %zu\n", settled, rounds, end);
    }
    /* What the allocator keeps at hand for a thread counts as used. */
    CHECK(rounds <= 10 || end < settled + 32768);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
    return 0;
}
