/*
 * Whether processes keep their vector registers over context switches: each of several processes fills them with a pattern of its
 * own, lets the others run, and looks. Prints one line and exits with 0 if all do.
 *
 * Uses AVX only if the system says that it may be used (OSXSAVE and XCR0), as every program should.
 */
#include <cpuid.h>

#include "tiny.h"

enum { PROCESSES = 3, ROUNDS = 40, REGISTERS = 16, BYTES = 32, AREA = REGISTERS * BYTES };

static int avx_is_enabled(void)
{
	unsigned a, b, c, d, low, high;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_AVX))
		return 0;
	__asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return (low & 6) == 6;
}

#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)
#define LOAD_XMM(n) "movdqu " #n "*32(%1), %%xmm" #n "\n"
#define STORE_XMM(n) "movdqu %%xmm" #n ", " #n "*32(%1)\n"
#define LOAD_YMM(n) "vmovdqu " #n "*32(%1), %%ymm" #n "\n"
#define STORE_YMM(n) "vmovdqu %%ymm" #n ", " #n "*32(%1)\n"

/* One piece of assembly, so that no code of the compiler's touches the registers in between. */
#define OVER_A_SWITCH(load, store) \
	__asm__ volatile(EACH(load) "syscall\n" EACH(store) : "+a"(number) : "r"(registers) \
		: "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
		  "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

static void over_a_switch(unsigned char *registers, int avx)
{
	long number = SYS_sched_yield;

	if (avx)
		OVER_A_SWITCH(LOAD_YMM, STORE_YMM);
	else
		OVER_A_SWITCH(LOAD_XMM, STORE_XMM);
}

static unsigned char pattern(int process, int round, int at)
{
	return (unsigned char)(at * 7 + process * 61 + round);
}

static int check(int process, int avx)
{
	unsigned char registers[AREA];
	int width = avx ? 32 : 16, round, i;

	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < AREA; i++)
			registers[i] = pattern(process, round, i);
		over_a_switch(registers, avx);
		for (i = 0; i < AREA; i++)
			if (i % BYTES < width && registers[i] != pattern(process, round, i))
				return 1;
	}
	return 0;
}

void _start(void)
{
	int avx = avx_is_enabled(), lost = 0, status = 0, i;

	for (i = 0; i < PROCESSES; i++)
		if (system_call(SYS_fork, 0, 0, 0) == 0)
			leave(check(i, avx));
	while (system_call(SYS_wait4, -1, (long)&status, 0) > 0)
		lost += status != 0;
	say(avx ? "VECTORS AVX " : "VECTORS SSE ");
	say(lost ? "LOST\n" : "kept\n");
	leave(lost != 0);
}
