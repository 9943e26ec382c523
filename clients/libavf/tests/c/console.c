/*
 * The console and the log: what the guest prints on its serial port and its consoles, what it reads there, and readers that go away or stand still.
 */
#include "avf_test.h"

static void type(struct Machine *machine, const char *text) {
    EQUAL(write(machine->input, text, strlen(text)), strlen(text));
}

/* Each stream to its descriptor; input to the console and to the serial port. */
static void both_ways(AVirtualizationService *service) {
    struct Machine machine = RUNNING(service, "both-ways", "console-echo:0:6,serial-line,console-say:0:first,console-say:2:third");
    WAIT_FOR(&machine.console, "waiting console-echo");
    type(&machine, "twelve");
    /* The console and the serial port are joined, byte by byte: the echo may be anywhere. */
    while (strstr(machine.console.text, "twelve") == NULL) {
        CHECK(read_more(&machine.console));
    }
    type(&machine, "\n");
    char *line = LINE(&machine.console, "ok serial-line");
    CONTAINS(line, "got=twelve");
    free(line);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    AVirtualMachine_destroy(machine.vm);
    const char *console = read_all(&machine.console);
    CONTAINS(console, "first");
    CHECK(strstr(console, "third") == NULL);
    EQUAL(strcmp(read_all(&machine.log), "third\n"), 0);
    close(machine.input);
    output_end(&machine.console);
    output_end(&machine.log);
}

/* Everything has been written when the machine has stopped, and nothing is lost. */
static void all_is_written(AVirtualizationService *service) {
    const size_t bulk = 200000;
    char commands[64];
    snprintf(commands, sizeof commands, "console-bulk:%zu", bulk);
    int file = memfd_create("console", MFD_CLOEXEC);
    AVirtualMachine *vm = NULL;
    /* One open file under two numbers, as `2>&1` makes it. */
    int again = dup(file), flags = fcntl(file, F_GETFL);
    EQUAL(AVirtualMachine_createRaw(service, config_of("all-is-written", commands), dup(file), -1, again, &vm), 0);
    for (int round = 1; round <= 2; round++) {
        EQUAL(AVirtualMachine_start(vm), 0);
        EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_SHUTDOWN);
        struct stat status;
        EQUAL(fstat(file, &status), 0);
        size_t size = (size_t)status.st_size;
        char *text = (char *)mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
        CHECK(text != MAP_FAILED);
        size_t high = 0;
        int ends = 0;
        for (size_t index = 0; index < size; index++) {
            /* Bytes that the serial port never prints. */
            high += (unsigned char)text[index] >= 128;
            ends += index + 4 <= size && memcmp(text + index, "DONE", 4) == 0;
        }
        munmap(text, size);
        /* 123 of 251 values, as the bulk counts. */
        EQUAL(high, (size_t)round * (bulk / 251 * 123 + (bulk % 251 > 128 ? bulk % 251 - 128 : 0)));
        EQUAL(ends, round);
    }
    EQUAL(fcntl(file, F_GETFL), flags);
    AVirtualMachine_destroy(vm);
    close(file);
}

/* A reader that goes away: the guest goes on, and no signal comes. */
static void reader_goes(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "reader-goes", "say:first,console-echo:0:1,console-say:0:second,console-say:2:third");
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    WAIT_FOR(&machine.console, "waiting console-echo");
    close(machine.console.fd);
    close(machine.log.fd);
    type(&machine, "x");
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    AVirtualMachine_destroy(machine.vm);
    close(machine.input);
    free(machine.console.text);
    free(machine.log.text);
}

/* A reader that stands still holds up neither the guest nor who wants to stop it. */
static void reader_stands_still(AVirtualizationService *service) {
    int reading, writing;
    make_pipe(&reading, &writing);
    AVirtualMachine *vm = NULL;
    EQUAL(AVirtualMachine_createRaw(service, config_of("reader-stands-still", "console-bulk:1000000,halt"), dup(writing), -1, -1, &vm), 0);
    EQUAL(AVirtualMachine_start(vm), 0);
    /* Until nothing more goes into the pipe. */
    struct pollfd room = {writing, POLLOUT, 0};
    while (poll(&room, 1, 0) != 0) {
        look_again();
    }
    CHECK(!has_stopped(vm));
    EQUAL(AVirtualMachine_stop(vm), 0);
    EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_KILLED);
    AVirtualMachine_destroy(vm);
    close(reading);
    close(writing);
}

/* Input that ends, and input that came before there was a guest. */
static void input_ends(AVirtualizationService *service) {
    struct Machine machine = MACHINE(service, "input-ends", "serial-line,say:hello");
    type(&machine, "early\n");
    close(machine.input);
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    char *line = LINE(&machine.console, "ok serial-line");
    CONTAINS(line, "got=early");
    free(line);
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    machine.input = -1;
    machine_end(&machine);
}

/* Descriptors that do not block, which they go on not to, and a socket for both directions. */
static void not_blocking(AVirtualizationService *service) {
    int ends[2];
    EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends), 0);
    int log_end, log;
    make_pipe(&log_end, &log);
    fcntl(log, F_SETFL, O_NONBLOCK);
    AVirtualMachine *vm = NULL;
    int result = AVirtualMachine_createRaw(service, config_of("not-blocking", "serial-line,console-bulk:200000,console-say:2:third"),
                                           dup(ends[1]), dup(ends[1]), log, &vm);
    EQUAL(result, 0);
    EQUAL(AVirtualMachine_start(vm), 0);
    /* Ours blocks. */
    fcntl(ends[0], F_SETFL, 0);
    struct Output console = output_of(ends[0]), third = output_of(log_end);
    WAIT_FOR(&console, "waiting serial-line");
    /* The bulk, which comes later, holds bytes that are zero: counted, not searched. The beginning of it may be read with the line before it. */
    size_t start = console.size;
    EQUAL(write(ends[0], "typed\n", 6), 6);
    char *line = LINE(&console, "ok serial-line");
    CONTAINS(line, "got=typed");
    free(line);
    WAIT_FOR(&third, "third");
    while (console.size < start + 200000) {
        CHECK(read_more(&console));
    }
    EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_SHUTDOWN);
    EQUAL(fcntl(ends[1], F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    close(ends[1]);
    AVirtualMachine_destroy(vm);
    read_all(&console);
    CHECK(console.size > start + 200000);
    output_end(&console);
    output_end(&third);
}

/* One descriptor for everything, given three times. */
static void one_for_all(AVirtualizationService *service) {
    int ends[2];
    EQUAL(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    AVirtualMachine *vm = NULL;
    EQUAL(AVirtualMachine_createRaw(service, config_of("one-for-all", "serial-line,console-say:2:third"), ends[1], ends[1], ends[1], &vm), 0);
    EQUAL(AVirtualMachine_start(vm), 0);
    struct Output console = output_of(ends[0]);
    WAIT_FOR(&console, "waiting serial-line");
    EQUAL(write(ends[0], "typed\n", 6), 6);
    char *line = LINE(&console, "ok serial-line");
    CONTAINS(line, "got=typed");
    free(line);
    EQUAL(stop_reason(vm), AVIRTUAL_MACHINE_SHUTDOWN);
    AVirtualMachine_destroy(vm);
    CHECK(!is_open(ends[1]));
    CONTAINS(read_all(&console), "third");
    output_end(&console);
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {both_ways, all_is_written, reader_goes, reader_stands_still, input_ends, not_blocking, one_for_all, NULL};
    with_service(tests);
    return 0;
}
