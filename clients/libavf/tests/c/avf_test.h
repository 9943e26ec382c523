/*
 * What the programs of this folder share: checks, the driver guest with its commands, what it prints, and what a program has open.
 *
 * A program ends with status 0 if everything was as it should be, and otherwise says where it was not. Nothing here has a time limit but the alarm that
 * ends a program which does not get anywhere. C11 and C++17.
 */
#ifndef AVF_TEST_H
#define AVF_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <android/virtualization.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* How long a program may take at most, in seconds. */
#define PATIENCE 80

/* ---- Checks ---- */

/* Where the program is, for the alarm. */
static const char *volatile at_file = "";
static volatile int at_line = 0;

static inline void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", at_file, at_line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

/* Notes the place. */
#define HERE (at_file = __FILE__, at_line = __LINE__)
/* Ends the program unless the condition holds. */
#define CHECK(condition) (HERE, (condition) ? (void)0 : fail("not so: %s", #condition))
/* Ends the program unless two numbers are equal. */
#define EQUAL(actual, expected) (HERE, equal((long long)(actual), (long long)(expected), #actual))
/* Ends the program unless a text has another one in it. */
#define CONTAINS(text, part) (HERE, contains((text), (part)))

static inline void equal(long long actual, long long expected, const char *what) {
    if (actual != expected) {
        fail("%s is %lld, not %lld", what, actual, expected);
    }
}

static inline void contains(const char *text, const char *part) {
    if (strstr(text, part) == NULL) {
        fail("no \"%s\" in \"%s\"", part, text);
    }
}

/* Between two looks at something that announces itself to nobody. */
static inline void look_again(void) {
    const struct timespec pause = {0, 1000000};
    nanosleep(&pause, NULL);
}

static inline void too_late(int signal) {
    (void)signal;
    char text[256];
    int length = snprintf(text, sizeof text, "%s:%d: nothing happens any more\n", at_file, at_line);
    if (write(STDERR_FILENO, text, (size_t)length) < 0) {
        /* Nothing is left to tell it to. */
    }
    _exit(1);
}

/* To be called first. */
static inline void begin(void) {
    signal(SIGALRM, too_late);
    alarm(PATIENCE);
}

/* For programs that run guests: ends them where that cannot be. */
static inline void begin_with_kvm(void) {
    begin();
    if (access("/dev/kvm", R_OK | W_OK) != 0) {
        puts("skipped: no /dev/kvm");
        exit(0);
    }
}

/* ---- What the program has open ---- */

/* Entries of a folder of /proc/self. */
static inline int entries(const char *path) {
    DIR *folder = opendir(path);
    int count = 0;
    if (folder == NULL) {
        fail("%s: %s", path, strerror(errno));
    }
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        count += entry->d_name[0] != '.';
    }
    closedir(folder);
    return count;
}

static inline int descriptors(void) { return entries("/proc/self/fd"); }

static inline int threads(void) { return entries("/proc/self/task"); }

static inline bool is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

/* Checks how many descriptors are open, and says which they are if it is another number. */
#define OPEN_DESCRIPTORS(expected) (HERE, open_descriptors(expected))
static inline void open_descriptors(int expected) {
    int count = descriptors();
    if (count == expected) {
        return;
    }
    for (int fd = 0; fd < 1024; fd++) {
        char path[64], target[256];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof target);
        if (length > 0) {
            fprintf(stderr, "%d: %.*s\n", fd, (int)length, target);
        }
    }
    fail("%d descriptors are open, not %d", count, expected);
}

/* Whether this process has a child that was not waited for. */
static inline bool has_children(void) {
    siginfo_t info;
    return waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

struct Belongings {
    int descriptors;
    int threads;
};

static inline struct Belongings belongings(void) {
    struct Belongings now = {descriptors(), threads()};
    return now;
}

/* Checks that the program has what it had before, and no children. A thread that has been joined may be seen for a moment longer. */
#define NOTHING_LEFT(before) (HERE, nothing_left(before))
static inline void nothing_left(struct Belongings before) {
    open_descriptors(before.descriptors);
    equal(has_children(), false, "whether there are children");
    while (threads() != before.threads) {
        look_again();
    }
}

/* ---- What a guest prints ---- */

/* The reading end of a pipe or socket, what came from it, and how much of that earlier waits have passed. */
struct Output {
    int fd;
    char *text;
    size_t size;
    size_t seen;
};

static inline struct Output output_of(int fd) {
    struct Output output = {fd, (char *)calloc(1, 1), 0, 0};
    return output;
}

/* Reads what comes next; false at the end. */
static inline bool read_more(struct Output *output) {
    char piece[4096];
    ssize_t length;
    do {
        length = read(output->fd, piece, sizeof piece);
    } while (length < 0 && errno == EINTR);
    if (length <= 0) {
        return false;
    }
    output->text = (char *)realloc(output->text, output->size + (size_t)length + 1);
    memcpy(output->text + output->size, piece, (size_t)length);
    output->size += (size_t)length;
    output->text[output->size] = 0;
    return true;
}

/* Waits for a line with a text in it, after what earlier waits have passed; the caller frees the line. */
#define LINE(output, text) (HERE, line_with((output), (text)))
static inline char *line_with(struct Output *output, const char *text) {
    for (;;) {
        char *fresh = output->text + output->seen;
        /* Bytes that are zero may stand before it: two ports print here. */
        size_t length = output->size - output->seen;
        char *found = (char *)memmem(fresh, length, text, strlen(text));
        char *end = found == NULL ? NULL : (char *)memchr(found, '\n', length - (size_t)(found - fresh));
        if (end != NULL) {
            while (found > fresh && found[-1] != '\n') {
                found--;
            }
            output->seen = (size_t)(end + 1 - output->text);
            return strndup(found, (size_t)(end - found));
        }
        if (!read_more(output)) {
            fail("no line with \"%s\" came: %s", text, fresh);
        }
    }
}

/* Waits for a line, and no more. */
#define WAIT_FOR(output, text) (HERE, free(line_with((output), (text))))

/* Reads to the end; everything that was ever read. */
static inline const char *read_all(struct Output *output) {
    while (read_more(output)) {
    }
    return output->text;
}

static inline void output_end(struct Output *output) {
    close(output->fd);
    free(output->text);
}

/* How often a text has another one in it. */
static inline int times(const char *text, const char *part) {
    int count = 0;
    for (; (text = strstr(text, part)) != NULL; text += strlen(part)) {
        count++;
    }
    return count;
}

/* ---- Files ---- */

/* A memfd of this content. */
static inline int file_of(const void *content, size_t size) {
    int fd = memfd_create("content", MFD_CLOEXEC);
    if (fd < 0 || write(fd, content, size) != (ssize_t)size || lseek(fd, 0, SEEK_SET) != 0) {
        fail("a memfd: %s", strerror(errno));
    }
    return fd;
}

/* A pipe. */
static inline void make_pipe(int *reading, int *writing) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        fail("a pipe: %s", strerror(errno));
    }
    *reading = ends[0];
    *writing = ends[1];
}

/* The driver guest. */
static inline int kernel(void) {
    const char *path = getenv("AVF_TEST_KERNEL");
    int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        fail("AVF_TEST_KERNEL does not name the guest: %s", strerror(errno));
    }
    return fd;
}

/* ---- Machines ---- */

/* The driver guest with these commands; integration/driver-guest says which there are. */
static inline AVirtualMachineRawConfig *config_of(const char *name, const char *commands) {
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    equal(AVirtualMachineRawConfig_setName(config, name), 0, "setName");
    AVirtualMachineRawConfig_setKernel(config, kernel());
    AVirtualMachineRawConfig_setInitRd(config, file_of(commands, strlen(commands)));
    return config;
}

static inline AVirtualizationService *new_service(void) {
    AVirtualizationService *service = NULL;
    equal(AVirtualizationService_create(&service, false), 0, "AVirtualizationService_create");
    return service;
}

/* A machine, and our ends of its console and its log. */
struct Machine {
    AVirtualMachine *vm;
    struct Output console;
    struct Output log;
    int input;
};

/* A machine of a configuration. */
#define MACHINE_OF(service, config) (HERE, machine_of((service), (config)))
static inline struct Machine machine_of(AVirtualizationService *service, AVirtualMachineRawConfig *config) {
    struct Machine machine;
    int console_out, console_in, console, log_out, log;
    make_pipe(&console, &console_out);
    make_pipe(&console_in, &machine.input);
    make_pipe(&log, &log_out);
    machine.vm = NULL;
    machine.console = output_of(console);
    machine.log = output_of(log);
    int result = AVirtualMachine_createRaw(service, config, console_out, console_in, log_out, &machine.vm);
    if (result != 0) {
        fail("AVirtualMachine_createRaw returns %d and says \"%s\"", result, read_all(&machine.log));
    }
    return machine;
}

/* A machine that executes commands. */
#define MACHINE(service, name, commands) MACHINE_OF((service), (HERE, config_of((name), (commands))))

/* A machine that runs. */
#define RUNNING(service, name, commands) (HERE, running((service), config_of((name), (commands))))
static inline struct Machine running(AVirtualizationService *service, AVirtualMachineRawConfig *config) {
    struct Machine machine = machine_of(service, config);
    equal(AVirtualMachine_start(machine.vm), 0, "AVirtualMachine_start");
    return machine;
}

/* Destroys a machine, and closes our ends. */
static inline void machine_end(struct Machine *machine) {
    AVirtualMachine_destroy(machine->vm);
    close(machine->input);
    output_end(&machine->console);
    output_end(&machine->log);
}

/* A test with a service. */
typedef void Test(AVirtualizationService *);

/* Does tests, a null after the last, with one service; each leaves nothing open, and the service nothing at all. */
static inline void with_service(Test *const *tests) {
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    int open = descriptors();
    for (; *tests != NULL; tests++) {
        (*tests)(service);
        OPEN_DESCRIPTORS(open);
    }
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
}

/* Why a machine stopped, waited for without a limit. */
static inline int stop_reason(AVirtualMachine *vm) {
    enum AVirtualMachineStopReason reason = AVIRTUAL_MACHINE_UNRECOGNISED;
    if (!AVirtualMachine_waitForStop(vm, NULL, &reason)) {
        fail("AVirtualMachine_waitForStop returns false without a timeout");
    }
    return (int)reason;
}

/* Whether a machine has stopped already, which does not touch the reason if not. */
static inline bool has_stopped(AVirtualMachine *vm) {
    const struct timespec now = {0, 0};
    const enum AVirtualMachineStopReason untouched = AVIRTUAL_MACHINE_PVM_FIRMWARE_INSTANCE_IMAGE_CHANGED;
    enum AVirtualMachineStopReason reason = untouched;
    bool stopped = AVirtualMachine_waitForStop(vm, &now, &reason);
    if (stopped == (reason == untouched)) {
        fail("AVirtualMachine_waitForStop returns %d with the reason %d", stopped, (int)reason);
    }
    return stopped;
}

/* ---- Processes ---- */

/* The parent of a process, and its name; -1 if it is gone, or has ended and its parent does not know yet. */
static inline pid_t parent_of(pid_t pid, char name[64]) {
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "re");
    size_t length = file == NULL ? 0 : fread(text, 1, sizeof text - 1, file);
    if (file != NULL) {
        fclose(file);
    }
    text[length] = 0;
    char *start = strchr(text, '('), *end = strrchr(text, ')');
    int parent = -1;
    char state = 'Z';
    if (start == NULL || end == NULL || sscanf(end + 1, " %c %d", &state, &parent) != 2 || state == 'Z' || state == 'X') {
        return -1;
    }
    snprintf(name, 64, "%.*s", (int)(end - start - 1), start + 1);
    return parent;
}

/* A process with this name that descends from `ancestor`; -1 if there is none. */
static inline pid_t descendant(pid_t ancestor, const char *wanted) {
    DIR *folder = opendir("/proc");
    pid_t found = -1;
    for (struct dirent *entry; found < 0 && (entry = readdir(folder)) != NULL;) {
        pid_t pid = (pid_t)atoi(entry->d_name);
        char name[64], other[64];
        if (pid <= 0 || pid == ancestor || parent_of(pid, name) < 0 || strcmp(name, wanted) != 0) {
            continue;
        }
        for (pid_t above = pid; above > 0; above = parent_of(above, other)) {
            if (above == ancestor) {
                found = pid;
                break;
            }
        }
    }
    closedir(folder);
    return found;
}

/* Waits until no machine's process is left: a machine has stopped before its process has ended. */
#define NO_COMPONENT() (HERE, no_component())
static inline void no_component(void) {
    while (descendant(getpid(), "vmm-component") > 0) {
        look_again();
    }
}

#endif /* AVF_TEST_H */
