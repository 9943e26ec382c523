/*
 * Configurations: what each setter accepts and returns, and that every descriptor is taken, whatever it returns.
 */
#include "avf_test.h"

/* A descriptor to give away. */
static int some_fd(void) { return file_of("content", 7); }

/* A number that is no descriptor. */
static const int NOT_OPEN = 1 << 20;

static void names(void) {
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    EQUAL(AVirtualMachineRawConfig_setName(config, "vm"), 0);
    EQUAL(AVirtualMachineRawConfig_setName(config, "a longer name with blanks, \xc3\xa4\xc3\xb6\xc3\xbc and \xe2\x98\x83"), 0);
    EQUAL(AVirtualMachineRawConfig_setName(config, "\xff"), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_setName(config, "cut \xc3"), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_setName(config, "too long a form \xc0\xaf"), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_setName(config, "half a pair \xed\xa0\x80"), -EINVAL);
    AVirtualMachineRawConfig_destroy(config);
}

static void instance_ids(void) {
    int8_t id[128] = {1, -1};
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    for (size_t size = 0; size <= sizeof id; size++) {
        EQUAL(AVirtualMachineRawConfig_setInstanceId(config, id, size), size == 64 ? 0 : -EINVAL);
    }
    EQUAL(AVirtualMachineRawConfig_setInstanceId(config, id, SIZE_MAX), -EINVAL);
    AVirtualMachineRawConfig_destroy(config);
}

/* One descriptor that can be set, replaced and unset. */
static void single(void (*set)(AVirtualMachineRawConfig *, int)) {
    int before = descriptors();
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    int first = some_fd(), second = some_fd();
    set(config, first);
    CHECK(is_open(first));
    set(config, second);
    CHECK(!is_open(first) && is_open(second));
    set(config, -1);
    CHECK(!is_open(second));
    set(config, -1);
    int last = some_fd();
    set(config, last);
    set(config, NOT_OPEN);
    CHECK(!is_open(last));
    set(config, some_fd());
    AVirtualMachineRawConfig_destroy(config);
    OPEN_DESCRIPTORS(before);
}

static void disks(void) {
    int before = descriptors();
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    int disk = some_fd();
    EQUAL(AVirtualMachineRawConfig_addDisk(config, disk, true), 0);
    EQUAL(AVirtualMachineRawConfig_addDisk(config, some_fd(), false), 0);
    CHECK(is_open(disk));
    EQUAL(AVirtualMachineRawConfig_addDisk(config, -1, false), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_addDisk(config, -7, true), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_addDisk(config, NOT_OPEN, true), -EINVAL);
    OPEN_DESCRIPTORS(before + 2);
    AVirtualMachineRawConfig_destroy(config);
    OPEN_DESCRIPTORS(before);
}

static void memory(void) {
    int before = descriptors();
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, some_fd(), 0x100000000, 0x100001000), 0);
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, -1, 0x100000000, 0x100001000), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, NOT_OPEN, 0x100000000, 0x100001000), -EINVAL);
    int unused = some_fd();
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(config, unused, 0x100001000, 0x100000000), -EINVAL);
    CHECK(!is_open(unused));
    OPEN_DESCRIPTORS(before + 1);
    AVirtualMachineRawConfig_destroy(config);
    OPEN_DESCRIPTORS(before);
}

static void flags_and_sizes(void) {
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    const int32_t sizes[] = {INT32_MIN, -1, 0, 1, 128, INT32_MAX};
    for (size_t index = 0; index < sizeof sizes / sizeof *sizes; index++) {
        AVirtualMachineRawConfig_setMemoryMib(config, sizes[index]);
        AVirtualMachineRawConfig_setMemoryMiB(config, sizes[index]);
    }
    AVirtualMachineRawConfig_setProtectedVm(config, true);
    AVirtualMachineRawConfig_setProtectedVm(config, false);
    AVirtualMachineRawConfig_setBalloon(config, true);
    AVirtualMachineRawConfig_setBalloon(config, false);
    EQUAL(AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod(config, true), -ENOTSUP);
    EQUAL(AVirtualMachineRawConfig_setHypervisorSpecificAuthMethod(config, false), -ENOTSUP);
    AVirtualMachineRawConfig_destroy(config);
}

/* Where the header allows null nothing happens, and where it does not nothing breaks. */
static void nulls(void) {
    int before = descriptors();
    AVirtualMachineRawConfig *none = NULL;
    const char *no_name = NULL;
    const int8_t *no_id = NULL;
    AVirtualMachineRawConfig_destroy(none);
    AVirtualMachineRawConfig *config = AVirtualMachineRawConfig_create();
    EQUAL(AVirtualMachineRawConfig_setName(config, no_name), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_setInstanceId(config, no_id, 64), -EINVAL);
    AVirtualMachineRawConfig_destroy(config);
    EQUAL(AVirtualMachineRawConfig_setName(none, "vm"), -EINVAL);
    AVirtualMachineRawConfig_setKernel(none, some_fd());
    AVirtualMachineRawConfig_setInitRd(none, some_fd());
    EQUAL(AVirtualMachineRawConfig_addDisk(none, some_fd(), false), -EINVAL);
    EQUAL(AVirtualMachineRawConfig_addCustomMemoryBackingFile(none, some_fd(), 0, 4096), -EINVAL);
    AVirtualMachineRawConfig_setMemoryMib(none, 1);
    AVirtualMachineRawConfig_setProtectedVm(none, true);
    AVirtualMachineRawConfig_setBalloon(none, true);
    OPEN_DESCRIPTORS(before);
}

int main(void) {
    begin();
    names();
    instance_ids();
    single(AVirtualMachineRawConfig_setKernel);
    single(AVirtualMachineRawConfig_setInitRd);
    disks();
    memory();
    flags_and_sizes();
    nulls();
    return 0;
}
