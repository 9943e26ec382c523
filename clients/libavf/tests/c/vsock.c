/*
 * vsock, both ways, by the Unix sockets of a folder; the guest's socket is there while it runs.
 */
#include "vsock.h"

int main(void) {
    begin_with_kvm();
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    struct Machine machine = MACHINE(service, "talks", "vsock-listen:1024,vsock-echo:5000:100000,vsock-refused:5001");
    int listener = vsock_listen("talks", "5000");
    for (int round = 0; round < 2; round++) {
        EQUAL(AVirtualMachine_start(machine.vm), 0);
        WAIT_FOR(&machine.console, "waiting vsock-listen");
        vsock_exchange("talks", "1024", "hello");
        WAIT_FOR(&machine.console, "ok vsock-listen bytes=5");
        int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        CHECK(accepted >= 0);
        EQUAL(echo(accepted), 100000);
        close(accepted);
        WAIT_FOR(&machine.console, "ok vsock-echo");
        WAIT_FOR(&machine.console, "ok vsock-refused");
        EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    }
    machine_end(&machine);
    close(listener);
    struct sockaddr_un address = vsock_address("talks", "5000");
    unlink(address.sun_path);
    address = vsock_address("talks", "");
    CHECK(access(address.sun_path, F_OK) != 0);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
    return 0;
}
