/*
 * A guest's ports as Unix sockets in a folder, where SEPAL_AVF_VSOCK_DIR names one (docs/libavf.md).
 */
#ifndef AVF_TEST_VSOCK_H
#define AVF_TEST_VSOCK_H

#include "avf_test.h"

/* The address of a guest's socket; `port` is that of the host on which the program listens, or empty. */
static inline struct sockaddr_un vsock_address(const char *name, const char *port) {
    struct sockaddr_un address;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/%s.vsock%s%s", getenv("SEPAL_AVF_VSOCK_DIR"), name,
                          port[0] == 0 ? "" : "_", port);
    CHECK(length > 0 && (size_t)length < sizeof address.sun_path);
    return address;
}

/* Connects to a guest's port. */
static inline int vsock_connect(const char *name, const char *port) {
    struct sockaddr_un address = vsock_address(name, "");
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) != 0) {
        fail("%s: %s", address.sun_path, strerror(errno));
    }
    dprintf(fd, "CONNECT %s\n", port);
    char answer[64] = "";
    for (size_t length = 0; strchr(answer, '\n') == NULL; length++) {
        CHECK(length < sizeof answer - 1 && read(fd, answer + length, 1) == 1);
    }
    CHECK(strncmp(answer, "OK ", 3) == 0);
    return fd;
}

/* Sends a text to a guest's port, on which it sends everything back, and gets the same. */
static inline void vsock_exchange(const char *name, const char *port, const char *text) {
    int connection = vsock_connect(name, port);
    char answer[64] = "";
    size_t length = strlen(text);
    CHECK(length < sizeof answer);
    EQUAL(write(connection, text, length), length);
    EQUAL(recv(connection, answer, length, MSG_WAITALL), length);
    EQUAL(strcmp(answer, text), 0);
    close(connection);
}

/* Listens on a port of the host for a guest. */
static inline int vsock_listen(const char *name, const char *port) {
    struct sockaddr_un address = vsock_address(name, port);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (const struct sockaddr *)&address, sizeof address) != 0 || listen(fd, 1) != 0) {
        fail("%s: %s", address.sun_path, strerror(errno));
    }
    return fd;
}

/* Sends back what comes, to the end; how much it was. */
static inline size_t echo(int fd) {
    char piece[16384];
    size_t total = 0;
    for (ssize_t length; (length = read(fd, piece, sizeof piece)) > 0;) {
        for (ssize_t sent = 0; sent < length;) {
            ssize_t count = write(fd, piece + sent, (size_t)(length - sent));
            CHECK(count > 0);
            sent += count;
        }
        total += (size_t)length;
    }
    return total;
}

#endif /* AVF_TEST_VSOCK_H */
