/*
 * Sockets to the host (AF_VSOCK) for shell scripts:
 *
 *   vsock connect PORT   connects to the host's port: standard input goes there, what comes back goes to standard output
 *   vsock listen PORT    takes one connection from the host, and does the same
 *   vsock echo PORT      takes one connection from the host and sends back what comes
 *
 * The end of the input is passed on as a shutdown of one direction; the program ends when the other one has ended too. It says on standard
 * error why it failed, and exits with 1.
 */
#include "tiny.h"

enum { SYS_read = 0, SYS_poll = 7, SYS_socket = 41, SYS_connect = 42, SYS_accept = 43, SYS_shutdown = 48, SYS_bind = 49, SYS_listen = 50 };
enum { AF_VSOCK = 40, SOCK_STREAM = 1, SHUT_WR = 1, POLLIN = 1, HOST = 2, ANY = -1 };

struct address {
	unsigned short family, reserved;
	unsigned port, cid;
	unsigned char zero[4];
};

struct waiting {
	int fd;
	short events, seen;
};

static void fail(const char *what, long error)
{
	char digits[] = ": error 000\n";
	long length = 0;

	for (error = -error; what[length]; length++)
		;
	digits[8] += error / 100 % 10;
	digits[9] += error / 10 % 10;
	digits[10] += error % 10;
	system_call(SYS_write, 2, (long)"vsock: ", 7);
	system_call(SYS_write, 2, (long)what, length);
	system_call(SYS_write, 2, (long)digits, sizeof digits - 1);
	leave(1);
}

static long try(const char *what, long result)
{
	if (result < 0)
		fail(what, result);
	return result;
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static unsigned number(const char *text)
{
	unsigned value = 0;

	while (*text >= '0' && *text <= '9')
		value = value * 10 + (unsigned)(*text++ - '0');
	return value;
}

/* Moves what there is; 0 at the end. */
static long move(int from, int to)
{
	static char buffer[65536];
	long got = try("read", system_call(SYS_read, from, (long)buffer, sizeof buffer)), done = 0;

	while (done < got)
		done += try("write", system_call(SYS_write, to, (long)buffer + done, got - done));
	return got;
}

static int take_one(unsigned port)
{
	struct address own = { AF_VSOCK, 0, port, (unsigned)ANY, { 0 } };
	int listener = (int)try("socket", system_call(SYS_socket, AF_VSOCK, SOCK_STREAM, 0));

	try("bind", system_call(SYS_bind, listener, (long)&own, sizeof own));
	try("listen", system_call(SYS_listen, listener, 1, 0));
	system_call(SYS_write, 2, (long)"waiting vsock\n", 14);
	return (int)try("accept", system_call(SYS_accept, listener, 0, 0));
}

static int reach(unsigned port)
{
	struct address host = { AF_VSOCK, 0, port, HOST, { 0 } };
	int fd = (int)try("socket", system_call(SYS_socket, AF_VSOCK, SOCK_STREAM, 0));

	try("connect", system_call(SYS_connect, fd, (long)&host, sizeof host));
	return fd;
}

static void both_ways(int fd)
{
	struct waiting waits[2] = { { 0, POLLIN, 0 }, { fd, POLLIN, 0 } };

	while (waits[0].fd >= 0 || waits[1].fd >= 0) {
		try("poll", system_call(SYS_poll, (long)waits, 2, -1));
		if (waits[0].fd >= 0 && waits[0].seen && !move(0, fd)) {
			try("shutdown", system_call(SYS_shutdown, fd, SHUT_WR, 0));
			waits[0].fd = -1;
		}
		if (waits[1].fd >= 0 && waits[1].seen && !move(fd, 1))
			waits[1].fd = -1;
	}
}

__attribute__((used)) static void run(long *stack)
{
	char **arguments = (char **)(stack + 1);
	int fd;

	if (stack[0] != 3)
		fail("usage: vsock connect|listen|echo PORT", 0);
	if (same(arguments[1], "connect")) {
		both_ways(reach(number(arguments[2])));
	} else if (same(arguments[1], "listen")) {
		both_ways(take_one(number(arguments[2])));
	} else if (same(arguments[1], "echo")) {
		fd = take_one(number(arguments[2]));
		while (move(fd, fd))
			;
		system_call(SYS_shutdown, fd, SHUT_WR, 0);
	} else {
		fail("no such command", 0);
	}
	leave(0);
}

/* The arguments lie where the stack begins. */
__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run");
