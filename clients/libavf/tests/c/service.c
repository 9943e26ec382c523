/*
 * Services: a manager as a child process that comes and goes with them, several at once, and what their making returns when it fails.
 */
#include "avf_test.h"

/* Makes a service that cannot be made. */
static void refused(const char *manager, int expected) {
    static char nothing;
    AVirtualizationService *untouched = (AVirtualizationService *)&nothing;
    AVirtualizationService *service = untouched;
    struct Belongings before = belongings();
    setenv("SEPAL_GUEST_MANAGER", manager, 1);
    EQUAL(AVirtualizationService_create(&service, false), expected);
    CHECK(service == untouched);
    NOTHING_LEFT(before);
    unsetenv("SEPAL_GUEST_MANAGER");
}

int main(void) {
    begin();
    struct Belongings before = belongings();
    AVirtualizationService_destroy(NULL);

    AVirtualizationService *service = new_service();
    pid_t manager = descendant(getpid(), "guest-manager");
    CHECK(manager > 0 && getppid() != manager);
    /* What a terminal sends to the program is not for its manager. */
    CHECK(getpgid(manager) != getpgrp());
    AVirtualizationService *other = new_service();
    AVirtualizationService_destroy(service);
    CHECK(kill(manager, 0) != 0 && errno == ESRCH);
    CHECK(descendant(getpid(), "guest-manager") > 0);
    AVirtualizationService_destroy(other);
    NOTHING_LEFT(before);

    for (int round = 0; round < 5; round++) {
        AVirtualizationService_destroy(new_service());
        NOTHING_LEFT(before);
    }

    refused("/nowhere/guest-manager", -ENOENT);
    /* Nobody may execute a folder. */
    refused("/", -EACCES);
    /* One that ends without an answer. */
    refused("/bin/true", -ECONNREFUSED);
    AVirtualizationService **nowhere = NULL;
    EQUAL(AVirtualizationService_create(nowhere, false), -EINVAL);
    NOTHING_LEFT(before);
    return 0;
}
