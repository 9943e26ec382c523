/*
 * Disks: in the order in which they were added, and written to only where the guest may.
 */
#include "avf_test.h"

enum { SECTOR = 512, SECTORS = 128, SIZE = SECTOR * SECTORS };

static int filled(int fd, unsigned char content[SIZE]) {
    CHECK(fd >= 0);
    EQUAL(write(fd, content, SIZE), SIZE);
    return fd;
}

/* A file on a disk, without a name. */
static int file(void) {
    char path[] = "/var/tmp/libavf-test-XXXXXX";
    int fd = mkostemp(path, O_CLOEXEC);
    EQUAL(unlink(path), 0);
    return fd;
}

int main(void) {
    begin_with_kvm();
    struct Belongings before = belongings();
    AVirtualizationService *service = new_service();
    static unsigned char read_only[SIZE], writable[SIZE], now[SIZE];
    memset(read_only, 'r', SIZE);
    memset(writable, 'w', SIZE);
    int images[] = {filled(memfd_create("image", MFD_CLOEXEC), read_only), filled(file(), writable)};
    AVirtualMachineRawConfig *config =
        config_of("disks", "blk-info@0,blk-ro@0,blk-sum@0:0:4,blk-info@1,blk-fill@1:8:2:5,blk-info@2");
    EQUAL(AVirtualMachineRawConfig_addDisk(config, dup(images[0]), false), 0);
    EQUAL(AVirtualMachineRawConfig_addDisk(config, dup(images[1]), true), 0);
    struct Machine machine = MACHINE_OF(service, config);
    EQUAL(AVirtualMachine_start(machine.vm), 0);
    char *line = LINE(&machine.console, " blk-info");
    CONTAINS(line, "ok blk-info capacity=128 ro=1");
    free(line);
    WAIT_FOR(&machine.console, "ok blk-ro");
    uint64_t sum = UINT64_C(0xcbf29ce484222325);
    for (int index = 0; index < 4 * SECTOR; index++) {
        sum = (sum ^ 'r') * UINT64_C(0x100000001b3);
    }
    char expected[32];
    snprintf(expected, sizeof expected, "fnv=%016llx", (unsigned long long)sum);
    line = LINE(&machine.console, "ok blk-sum");
    CONTAINS(line, expected);
    free(line);
    line = LINE(&machine.console, " blk-info");
    CONTAINS(line, "ok blk-info capacity=128 ro=0");
    free(line);
    WAIT_FOR(&machine.console, "ok blk-fill");
    WAIT_FOR(&machine.console, "fail blk-info");
    EQUAL(stop_reason(machine.vm), AVIRTUAL_MACHINE_SHUTDOWN);
    machine_end(&machine);

    EQUAL(pread(images[0], now, SIZE, 0), SIZE);
    EQUAL(memcmp(now, read_only, SIZE), 0);
    for (int sector = 8; sector < 10; sector++) {
        for (int index = 0; index < SECTOR; index++) {
            writable[sector * SECTOR + index] = (unsigned char)((5 + 7 * sector + index) % 251);
        }
    }
    EQUAL(pread(images[1], now, SIZE, 0), SIZE);
    EQUAL(memcmp(now, writable, SIZE), 0);
    close(images[0]);
    close(images[1]);
    AVirtualizationService_destroy(service);
    NOTHING_LEFT(before);
    return 0;
}
