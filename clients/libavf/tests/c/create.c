/*
 * Making machines: what is refused, that the reason is told, and that configuration and descriptors are taken all the same.
 */
#include "avf_test.h"

/* What a result is set to that must not be touched. */
static char nothing;

/* Makes a machine that cannot be made; a line with `words` must come to the log and to standard error. */
static void refused(AVirtualizationService *service, AVirtualMachineRawConfig *config, const char *words) {
    AVirtualMachine *untouched = (AVirtualMachine *)&nothing;
    AVirtualMachine *vm = untouched;
    int log, log_out, console_in, input, error, error_out;
    make_pipe(&log, &log_out);
    make_pipe(&console_in, &input);
    make_pipe(&error, &error_out);
    int console_out = file_of("", 0);
    int standard_error = dup(STDERR_FILENO);
    dup2(error_out, STDERR_FILENO);
    close(error_out);
    int result = AVirtualMachine_createRaw(service, config, console_out, console_in, log_out, &vm);
    dup2(standard_error, STDERR_FILENO);
    close(standard_error);
    EQUAL(result, -EIO);
    CHECK(vm == untouched);
    CHECK(!is_open(console_out) && !is_open(console_in) && !is_open(log_out));
    /* Both end, since nobody else has them. */
    struct Output outputs[] = {output_of(log), output_of(error)};
    for (int index = 0; index < 2; index++) {
        const char *text = read_all(&outputs[index]);
        CONTAINS(text, "libavf: ");
        CONTAINS(text, words);
        CHECK(text[strlen(text) - 1] == '\n');
        output_end(&outputs[index]);
    }
    close(input);
}

static void incomplete(AVirtualizationService *service) {
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    refused(service, config, "name");
    config = AVirtualMachineRawConfig_create();
    AVirtualMachineRawConfig_setKernel(config, kernel());
    refused(service, config, "name");
    config = AVirtualMachineRawConfig_create();
    AVirtualMachineRawConfig_setName(config, "vm");
    refused(service, config, "kernel");
    config = config_of("vm", "");
    AVirtualMachineRawConfig_setKernel(config, -1);
    refused(service, config, "kernel");
}

static void unfit(AVirtualizationService *service) {
    AVirtualMachineRawConfig *config = config_of("vm", "");
    AVirtualMachineRawConfig_setProtectedVm(config, true);
    refused(service, config, "memory is hidden from the host");

    /* A pipe has no size. */
    int reading, writing;
    make_pipe(&reading, &writing);
    config = config_of("vm", "");
    AVirtualMachineRawConfig_setKernel(config, reading);
    close(writing);
    refused(service, config, "kernel");

    config = config_of("vm", "");
    AVirtualMachineRawConfig_addDisk(config, open("/proc/self/exe", O_RDONLY | O_CLOEXEC), true);
    refused(service, config, "disk");
}

static void nulls(AVirtualizationService *service) {
    AVirtualMachine *untouched = (AVirtualMachine *)&nothing;
    AVirtualMachine *vm = untouched;
    int before = descriptors();
    AVirtualMachineRawConfig *none = NULL;
    AVirtualizationService *nobody = NULL;
    AVirtualMachine **nowhere = NULL;
    CHECK(AVirtualMachine_createRaw(service, none, file_of("", 0), file_of("", 0), file_of("", 0), &vm) < 0);
    CHECK(AVirtualMachine_createRaw(nobody, config_of("vm", ""), file_of("", 0), file_of("", 0), file_of("", 0), &vm) < 0);
    CHECK(AVirtualMachine_createRaw(service, config_of("vm", ""), file_of("", 0), file_of("", 0), file_of("", 0), nowhere) < 0);
    CHECK(vm == untouched);
    OPEN_DESCRIPTORS(before);
    AVirtualMachine_destroy(NULL);
}

/* Without any of the three descriptors, and with numbers that are none. */
static void without_descriptors(AVirtualizationService *service) {
    const int numbers[] = {-1, -5, 1 << 20};
    for (int index = 0; index < 3; index++) {
        int number = numbers[index], before = descriptors();
        AVirtualMachine *vm = NULL;
        EQUAL(AVirtualMachine_createRaw(service, config_of("vm", ""), number, number, number, &vm), 0);
        CHECK(vm != NULL && !has_stopped(vm));
        AVirtualMachine_destroy(vm);
        OPEN_DESCRIPTORS(before);
    }
}

int main(void) {
    begin_with_kvm();
    Test *const tests[] = {incomplete, unfit, nulls, without_descriptors, NULL};
    with_service(tests);
    return 0;
}
