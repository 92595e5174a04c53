/*
 * A guest of one sector: 16-bit code that SeaBIOS loads to 0x7C00 and that knows only the
 * BIOS. It writes what guest.py can compute, then does what the mode byte says.
 *
 * Sector 1 (read to SEED): magic, 32 bytes of seed, mode, table of (first sector, blocks).
 * Sector HEARTBEAT_LBA: marker, then a 32-bit counter that goes up with every tick (18.2/s)
 * and on from where an earlier boot left it.
 *
 * guest.py holds the same numbers; change them together.
 */
.intel_syntax noprefix
.code16

.set SEED,          0x8000          /* the seed sector in memory */
.set SEED_BYTES,    SEED + 8
.set MODE,          SEED + 40
.set TABLE,         SEED + 64
.set BEAT,          0x8200          /* the heartbeat sector in memory: marker, counter */
.set COUNTER,       BEAT + 32
.set HEARTBEAT_LBA, 8
.set PATTERN_SEG,   0x1000          /* 32 KiB of xorshift32 */
.set BLOCK_SEG,     0x2000          /* pattern ^ word of this block, marker every 4 KiB */
.set BLOCK_SECTORS, 64
.set BLOCK_WORDS,   BLOCK_SECTORS * 128
.set TICKS,         0x046C          /* BIOS: counts up 18.2 times a second */
.set PM1_STATUS,    0x600           /* ACPI registers where SeaBIOS puts them on i440fx */
.set PM1_ENABLE,    0x602
.set PM1_CONTROL,   0x604
.set POWER_BUTTON,  0x100
.set SLEEP_S5,      0x2000

.globl _start
_start:
        ljmp    0, offset main
main:
        xor     ax, ax
        mov     ds, ax
        mov     es, ax
        mov     ss, ax
        mov     sp, 0x7C00
        cld
        sti
        mov     [drive], dl
        mov     dx, PM1_ENABLE
        mov     ax, POWER_BUTTON
        out     dx, ax
        mov     si, offset text_up
        call    print

        mov     edi, SEED
        mov     eax, 1
        call    read_sector
        cmp     dword ptr [SEED], 0x4C42414C    /* "LABL" */
        jne     failed
        mov     edi, BEAT
        mov     eax, HEARTBEAT_LBA
        call    read_sector

        mov     si, SEED_BYTES                  /* the marker exists from here on only */
        mov     di, BEAT
        mov     cx, 32
1:      lodsb
        xor     al, 0x5A
        stosb
        loop    1b

        mov     edx, [SEED_BYTES]               /* edx: xorshift32 state, to the end */
        mov     ax, PATTERN_SEG
        mov     es, ax
        xor     di, di
        mov     cx, BLOCK_WORDS
1:      call    xorshift
        stosd
        loop    1b

        mov     bx, TABLE
next_region:
        mov     eax, [bx]
        test    eax, eax
        jz      regions_done
        mov     [lba], eax
next_block:
        call    fill_block
        mov     word ptr [count], BLOCK_SECTORS
        mov     dword ptr [address], BLOCK_SEG << 16
        call    write
        add     dword ptr [lba], BLOCK_SECTORS
        dec     dword ptr [bx + 4]
        jnz     next_block
        add     bx, 8
        jmp     next_region

regions_done:
        mov     si, offset text_wrote
        call    print
        mov     al, [MODE]
        cmp     al, 'P'
        je      power_off
        cmp     al, 'S'
        je      stop
beat:
        mov     eax, [TICKS]
1:      hlt
        cmp     eax, [TICKS]
        je      1b
        cmp     byte ptr [MODE], 'D'            /* deaf: beats on, whatever is pressed */
        je      1f
        mov     dx, PM1_STATUS
        in      ax, dx
        test    ah, POWER_BUTTON >> 8
        jnz     power_off
1:      cmp     byte ptr [MODE], 'I'            /* idle: hears the button, writes nothing */
        je      beat
        inc     dword ptr [COUNTER]
        mov     word ptr [count], 1
        mov     dword ptr [address], BEAT
        mov     dword ptr [lba], HEARTBEAT_LBA
        call    write
        jmp     beat

power_off:
        mov     dx, PM1_CONTROL
        mov     ax, SLEEP_S5
        out     dx, ax
stop:
        cli
        hlt
        jmp     stop

failed:
        mov     si, offset text_failed
        call    print
        jmp     stop

/* edx = eax = next number */
xorshift:
        mov     eax, edx
        shl     eax, 13
        xor     edx, eax
        mov     eax, edx
        shr     eax, 17
        xor     edx, eax
        mov     eax, edx
        shl     eax, 5
        xor     edx, eax
        mov     eax, edx
        ret

/* BLOCK_SEG = pattern ^ next number, the marker on top of every 4 KiB */
fill_block:
        call    xorshift
        push    ds
        mov     ax, BLOCK_SEG
        mov     es, ax
        mov     ax, PATTERN_SEG
        mov     ds, ax
        xor     si, si
        xor     di, di
        mov     cx, BLOCK_WORDS
1:      lodsd
        xor     eax, edx
        stosd
        loop    1b
        pop     ds
        xor     di, di
1:      mov     si, BEAT
        mov     cx, 16
        push    di
        rep movsw
        pop     di
        add     di, 4096
        cmp     di, BLOCK_SECTORS * 512
        jb      1b
        ret

/* sector eax to 0:di */
read_sector:
        mov     [lba], eax
        mov     word ptr [count], 1
        mov     [address], edi
        mov     ah, 0x42
        jmp     1f
write:
        mov     ax, 0x4300                      /* extended write, no verify */
1:      push    edx
        push    bx
        mov     dl, [drive]
        mov     si, offset packet
        int     0x13
        pop     bx
        pop     edx
        jc      failed
        ret

/* the text at si, up to a NUL, to COM1 */
print:
        lodsb
        test    al, al
        jz      2f
        mov     ah, al
        mov     dx, 0x3FD
1:      in      al, dx
        test    al, 0x20
        jz      1b
        mov     dx, 0x3F8
        mov     al, ah
        out     dx, al
        jmp     print
2:      ret

text_up:        .asciz  "GUEST-UP\r\n"
text_wrote:     .asciz  "GUEST-WROTE\r\n"
text_failed:    .asciz  "GUEST-FAILED\r\n"
drive:          .byte   0
packet:         .byte   16, 0
count:          .word   0
address:        .long   0
lba:            .long   0, 0

        .org    510
        .word   0xAA55
