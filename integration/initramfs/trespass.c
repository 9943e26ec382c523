/*
 * Whether user code can use the system-call trampoline of a VMM on a host without hardware virtualization to get more than a system
 * call gives: it jumps there with registers that SYSCALL never leaves behind. On other hosts there is nothing at that address.
 * Prints one line and exits with 0 if each attempt ended the process.
 */
#include "tiny.h"

/* vmm-component/src/unassisted/syscall_entry.rs: the first of its slots. */
#define TRAMPOLINE 0xfffffd8000000000

enum { SYS_getpid = 39 };

#define PLAIN_FLAGS 0x246
#define PORT_PRIVILEGE 0x3000
#define INTERRUPTS 0x200

static void jump(unsigned long to, unsigned long return_address, unsigned long flags)
{
	register unsigned long r11 __asm__("r11") = flags;

	__asm__ volatile("jmp *%0" : : "r"(to), "a"(SYS_getpid), "c"(return_address), "r"(r11) : "memory");
	__builtin_unreachable();
}

void _start(void)
{
	static const unsigned long attempts[][3] = {
		{ TRAMPOLINE, 0x1000, PLAIN_FLAGS | PORT_PRIVILEGE },
		{ TRAMPOLINE, 0x1000, PLAIN_FLAGS & ~INTERRUPTS },
		{ TRAMPOLINE, 0x800000000000, PLAIN_FLAGS },
		{ TRAMPOLINE + 7, 0x1000, PLAIN_FLAGS },
	};
	int survived = 0, status;
	unsigned i;

	for (i = 0; i < sizeof(attempts) / sizeof(attempts[0]); i++) {
		status = 0;
		if (system_call(SYS_fork, 0, 0, 0) == 0) {
			jump(attempts[i][0], attempts[i][1], attempts[i][2]);
			leave(0);
		}
		system_call(SYS_wait4, -1, (long)&status, 0);
		/* The low seven bits are the signal. */
		survived += (status & 0x7f) == 0;
	}
	say(survived ? "TRESPASS possible\n" : "TRESPASS refused\n");
	leave(survived);
}
