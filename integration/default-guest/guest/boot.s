# Everything that runs at CPL 0: entry, gates, interrupt handlers, application-processor start.
#
# Kept to few instructions and without SSE: on hosts without hardware virtualization CPL 0 is emulated, at more than half a
# microsecond an instruction, while CPL 3 runs natively. So tables (page tables, GDT, IDT, TSS, even the frame for
# the first iretq) are laid out here at assembly time and nothing is built at run time. AT&T syntax.
#
# The image is linked at 1 MiB and this section comes first, so that every handler lies in 0x100000-0x10ffff and its address
# can be split into a gate's fields by the linker (it refuses the image if one does not fit).

.set IMAGE_BASE,  0x100000
.set COM1,        0x3f8
.set LAPIC,       0xfee00000
.set LAPIC_EOI,   0xfee000b0
.set CR4_BITS,    0x620                 # OSXMMEXCPT, OSFXSR, PAE
.set CR0_BITS,    0x80000033            # PG, NE, ET, MP, PE
.set EFER,        0xc0000080
.set EFER_LME,    0x100
.set KERNEL_CODE, 0x10
.set USER_DATA,   0x2b
.set USER_CODE,   0x33
.set TSS_SEL,     0x38

# ---- entries ------------------------------------------------------------------------------------------------------

# Xen's note that names the 32-bit PVH entry: type 18, XEN_ELFNOTE_PHYS32_ENTRY.
.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_entry

.section .boot, "ax", @progbits
# PVH: 32-bit protected mode, flat segments, paging off, EBX = hvm_start_info. The banner's first letter goes out before
# anything else, so that it marks when the guest got control.
.code32
.globl pvh_entry
pvh_entry:
    movl $COM1, %edx
    movb $'S', %al
    outb %al, %dx
    xorl %edi, %edi                     # protocol 0: PVH
    movl %ebx, %esi
    movl $pml4, %eax
    movl %eax, %cr3
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $EFER, %ecx
    xorl %edx, %edx
    movl $EFER_LME, %eax
    wrmsr
    movl $CR0_BITS, %eax
    movl %eax, %cr0
    lgdtl gdt_pointer
    ljmpl $KERNEL_CODE, $enter_user

# Linux's 64-bit boot protocol: long mode, identity-mapped, RSI = boot_params.
.code64
.globl long_mode_entry
long_mode_entry:
    movl $COM1, %edx
    movb $'S', %al
    outb %al, %dx
    movl $1, %edi                       # protocol 1: Linux
    movl $CR4_BITS, %eax
    movq %rax, %cr4
    movl $pml4, %eax
    movq %rax, %cr3
    lgdt gdt_pointer
enter_user:
    lidt idt_pointer
    movl $TSS_SEL, %eax
    ltr %ax
    movl $first_frame, %esp
    iretq                               # to start(EDI = protocol, ESI = address) at CPL 3, interrupts off

# ---- exceptions ---------------------------------------------------------------------------------------------------

# One 16-byte stub a vector: 8, 10-14, 17, 21, 29 and 30 push an error code themselves.
.balign 16
exception_stubs:
.set vector, 0
.rept 32
    .balign 16
    .if !((0x60227d00 >> vector) & 1)
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .set vector, vector + 1
.endr

# Notes what happened and goes on in fault_report at CPL 3, on a stack of its own. A second exception means that the
# report itself failed: no way out is left but a triple fault.
.balign 16
exception:
    popq fault_vector
    popq fault_error
    popq fault_rip
    popq fault_cs
    movq %cr2, %rax
    movq %rax, fault_cr2
    incl fault_count
    cmpl $1, fault_count
    jne triple_fault_service
    movl $fault_frame, %esp
    iretq

# ---- interrupts: each sets its bit in `pending` ---------------------------------------------------------------------

.macro interrupt name, bit
.balign 16
\name:
    orl $\bit, pending
    pushq %rax
    movl $LAPIC_EOI, %eax
    movl $0, (%rax)
    popq %rax
    iretq
.endm
interrupt serial_interrupt, 1
interrupt ged_interrupt,    2
interrupt timer_interrupt,  4
interrupt hello_interrupt,  8

# ---- services that CPL 3 calls by int3, R8 = which (numbers in cpu.rs) -----------------------------------------------------

# int3 is the one software interrupt that arrives from CPL 3 on every host: where CPL 3 runs natively outside hardware
# virtualization, `int n` and `syscall` do not reach the guest's tables.
.balign 16
service_gate:
    jmpq *services(,%r8,8)

# Waits until an interrupt has set a bit of `pending`; it may return earlier. CPL 3 runs with interrupts off, so no
# interrupt falls between the look at `pending` and the hlt.
.balign 16
idle_service:
    cmpl $0, pending
    jne 1f
    sti
    hlt
    cli
1:  iretq

# The next four do in one go what CPL 3 could do piece by piece, because an exit from CPL 0 costs a quarter of one from CPL 3
# where CPL 0 is emulated.

# Writes RCX bytes from RSI to port DX.
.balign 16
write_service:
    rep outsb
    iretq

# Reads what the serial port has, at most RCX (1 or more) bytes, to RDI.
.balign 16
receive_service:
    movl $(COM1 + 5), %edx
    inb %dx, %al
    testb $1, %al
    jz 1f
    movl $COM1, %edx
    insb
    decl %ecx
    jnz receive_service
1:  iretq

# Reads the RCX (1 or more) CMOS registers listed at RSI to RDI.
.balign 16
cmos_service:
    lodsb
    outb %al, $0x70
    inb $0x71, %al
    stosb
    decl %ecx
    jnz cmos_service
    iretq

# Writes RCX (1 or more) pairs of {address, value}, 32 bits each, from RSI.
.balign 16
mmio_service:
    movl (%rsi), %eax
    movl 4(%rsi), %edx
    movl %edx, (%rax)
    addl $8, %esi
    decl %ecx
    jnz mmio_service
    iretq

# CPUID as the VMM set it: at CPL 3 it may show the host's own leaves.
.balign 16
cpuid_service:
    cpuid
    iretq

.balign 16
wrmsr_service:
    wrmsr
spurious_interrupt:
    iretq

# Fetches instructions from the IOAPIC's registers, where there is no memory for KVM to map or to read code from. Emulation
# fails, and at CPL 0 KVM reports that as KVM_EXIT_INTERNAL_ERROR (suberror 1, emulation) instead of injecting #UD.
.balign 16
crash_service:
    movl $0xfec00000, %eax
    jmpq *%rax

# No interrupt table, so the next exception becomes a triple fault.
.balign 16
triple_fault_service:
    lidt no_idt_pointer
    ud2

# ---- application processors -----------------------------------------------------------------------------------------

# Copied below 1 MiB; a start-up IPI begins here in real mode, CS = its page.
.globl ap_trampoline, ap_trampoline_end
.balign 16
.code16
ap_trampoline:
    lgdtl %cs:(ap_gdt_pointer - ap_trampoline)
    movl $pml4, %eax
    movl %eax, %cr3
    movl $CR4_BITS, %eax
    movl %eax, %cr4
    movl $EFER, %ecx
    xorl %edx, %edx
    movl $EFER_LME, %eax
    wrmsr
    movl $CR0_BITS, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $ap_hello
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:

# Says hello, tells who it is, wakes the boot processor and halts for good (until the next INIT).
.code64
.balign 16
ap_hello:
    movl $LAPIC, %ebx
    movl 0x20(%rbx), %eax
    shrl $24, %eax
    movl %eax, ap_id
    movl ap_greeting, %esi
    movl ap_greeting_len, %ecx
    movl $COM1, %edx
    rep outsb
    movl $0x13f, 0xf0(%rbx)             # local APIC on, spurious vector 0x3f
    movl boot_apic_id, %eax
    shll $24, %eax
    movl %eax, 0x310(%rbx)              # to the boot processor ...
    movl $0x23, 0x300(%rbx)             # ... vector 0x23, fixed
1:  cli
    hlt
    jmp 1b

# ---- tables -------------------------------------------------------------------------------------------------------------

.section .boot.data, "aw", @progbits
# Linux's order of selectors.
.balign 16
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff            # 0x10 code, CPL 0
    .quad 0x00cf93000000ffff            # 0x18 data, CPL 0
    .quad 0
    .quad 0x00cff3000000ffff            # 0x28 data, CPL 3
    .quad 0x00affb000000ffff            # 0x30 code, CPL 3
    .word tss_end - tss - 1             # 0x38 task state, 16 bytes
    .word tss - IMAGE_BASE
    .byte IMAGE_BASE >> 16, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0

# Task state: the stack for CPL 0, and a bitmap that opens ports 0-0xcff to CPL 3. (The other way, IOPL 3 in the flags,
# is lost on hosts where CPL 3 runs natively outside hardware virtualization.)
.balign 16
tss:
    .long 0
    .quad kernel_stack_top, 0, 0
    .fill 8, 8, 0
    .quad 0
    .word 0, 104
    .fill 416, 1, 0
    .byte 0xff
tss_end:

.macro gate handler, dpl
    .word \handler - IMAGE_BASE, KERNEL_CODE
    .byte 0, 0x8e | (\dpl << 5)
    .word IMAGE_BASE >> 16
    .quad 0
.endm
.balign 16
idt:
.set vector, 0
.rept 32
    .if vector == 3
    gate service_gate, 3
    .else
    gate (exception_stubs + 16 * vector), 0
    .endif
    .set vector, vector + 1
.endr
    gate serial_interrupt, 0            # 0x20
    gate ged_interrupt, 0
    gate timer_interrupt, 0
    gate hello_interrupt, 0
    .fill 27 * 2, 8, 0
    gate spurious_interrupt, 0          # 0x3f
idt_end:

.balign 8
services:
    .quad idle_service, write_service, receive_service, cmos_service, mmio_service, cpuid_service, wrmsr_service
    .quad crash_service, triple_fault_service

.balign 16
first_frame:
    .quad start, USER_CODE, 2, user_stack_top - 8, USER_DATA
fault_frame:
    .quad fault_report, USER_CODE, 2, fault_stack_top - 8, USER_DATA

# Identity map of the first GiB and of the one below 4 GiB (the APICs), 2 MiB pages, open to CPL 3, accessed and dirty
# preset. The guest adds memory above when a command touches it.
.section .boot.tables, "aw", @progbits
.globl pdpt
.balign 4096
pml4:
    .quad pdpt + 0x67
    .fill 511, 8, 0
pdpt:
    .quad pd0 + 0x67, 0, 0, pd3 + 0x67
    .fill 508, 8, 0
pd0:
.set page, 0
.rept 512
    .quad page + 0xe7
    .set page, page + 0x200000
.endr
pd3:
.set page, 0xc0000000
.rept 512
    .quad page + 0xff                   # uncached
    .set page, page + 0x200000
.endr

.section .bss.boot, "aw", @nobits
.globl fault_vector, fault_error, fault_rip, fault_cs, fault_cr2, pending, ap_id, ap_greeting, ap_greeting_len, boot_apic_id
.balign 16
    .skip 2048
kernel_stack_top:
    .skip 4096
fault_stack_top:
    .skip 32768
user_stack_top:
fault_vector:    .skip 8
fault_error:     .skip 8
fault_rip:       .skip 8
fault_cs:        .skip 8
fault_cr2:       .skip 8
fault_count:     .skip 4
pending:         .skip 4
ap_id:           .skip 4
ap_greeting:     .skip 4
ap_greeting_len: .skip 4
boot_apic_id:    .skip 4
