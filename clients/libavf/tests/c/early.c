/*
 * Early machines: those that a file of the folder defines for this program, with the context id that it says; everything else is refused, and why is told.
 */
#include "vsock.h"

#include <limits.h>

static const char *folder;

/* Writes a definition. */
static void define(const char *file, const char *text) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    EQUAL(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

static void forget(const char *file) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    EQUAL(unlink(path), 0);
}

static AVirtualizationService *early_service(void) {
    AVirtualizationService *service = NULL;
    EQUAL(AVirtualizationService_create(&service, true), 0);
    return service;
}

/* A machine that is refused, with these words on the log. */
static void refused(const char *name, const char *words) {
    AVirtualizationService *service = early_service();
    int log, log_out;
    make_pipe(&log, &log_out);
    AVirtualMachine *vm = NULL;
    EQUAL(AVirtualMachine_createRaw(service, config_of(name, ""), -1, -1, log_out, &vm), -EIO);
    CHECK(vm == NULL);
    struct Output output = output_of(log);
    const char *text = read_all(&output);
    CONTAINS(text, "libavf: ");
    CONTAINS(text, words);
    output_end(&output);
    AVirtualizationService_destroy(service);
}

int main(void) {
    begin_with_kvm();
    struct Belongings before = belongings();
    folder = getenv("SEPAL_AVF_EARLY_DIR");
    CHECK(folder != NULL);
    refused("first", folder);

    char own[PATH_MAX] = "", text[3 * PATH_MAX];
    CHECK(readlink("/proc/self/exe", own, sizeof own - 1) > 0);
    /* Under valgrind that is another program. */
    snprintf(text, sizeof text,
             "<?xml version=\"1.0\"?>\n<early_vms>\n"
             "  <early_vm>\n    <name>first</name>\n    <cid>123456</cid>\n    <path>%s</path>\n  </early_vm>\n"
             "  <early_vm><name>other</name><cid>123457</cid><path>/nowhere/program</path></early_vm>\n</early_vms>\n",
             own);
    define("early_vms_test.xml", text);
    define("not_early.xml", "<early_vms><early_vm>");
    refused("unknown", "unknown");
    refused("other", "/nowhere/program");

    AVirtualizationService *service = early_service();
    int listener = vsock_listen("first", "5000");
    struct Machine machine = RUNNING(service, "first", "vsock-echo:5000:10");
    int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    EQUAL(echo(accepted), 10);
    close(accepted);
    close(listener);
    char *line = LINE(&machine.console, "ok vsock-echo");
    CONTAINS(line, "cid=123456");
    free(line);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    machine_end(&machine);
    AVirtualizationService_destroy(service);
    struct sockaddr_un address = vsock_address("first", "5000");
    unlink(address.sun_path);

    /* For services that are not early, nothing is defined and nothing needs to be. */
    service = new_service();
    machine = RUNNING(service, "unknown", "say:hello");
    WAIT_FOR(&machine.console, "ok say hello");
    machine_end(&machine);
    AVirtualizationService_destroy(service);

    /* One file that is broken: nobody can say what it would have defined. */
    define("early_vms_broken.xml", "<early_vms>\n  <early_vm>\n</early_vms>\n");
    refused("first", "early_vms_broken.xml");
    forget("early_vms_broken.xml");
    forget("early_vms_test.xml");
    forget("not_early.xml");
    NOTHING_LEFT(before);
    return 0;
}
