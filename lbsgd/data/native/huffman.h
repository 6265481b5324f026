/* Huffman decoding of the scan of a JPEG (ITU-T T.81, annex F.2.2).
 *
 * An MCU is the smallest unit of a scan: the blocks of 8 x 8 coefficients of all colours at one place. Bits come from a buffer
 * of 64, which is refilled without a branch. A table indexed by the next LOOK bits gives code and value of most coefficients at
 * once. The bytes of the scan are copied without their stuffing (a 0 after each FF), and padding follows them.
 */
#include <endian.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>

#define LOOK 10
#define PADDING (D_MAX_BLOCKS_IN_MCU * 64 * 4 + 8) /* more bytes than an MCU can have */

/* The code and value at the start of LOOK bits, packed into one word, because looking them up takes most of the time. The fields
 * are the number of bits of code and value together; the number of zeros before the value, or END at the end of a block; the
 * number of bits of the value; the value. If LOOK bits do not hold the whole value, the first field is 0, the second the length
 * of the code, and the last its symbol. If they do not hold the whole code, all fields are 0. */
typedef uint32_t step;
#define END 80
#define MOST_PLACES 16 /* several values skipped at once advance by at most this much before the last of them */
static inline step make_step(int num_bits, int run, int size, int value)
{
    return num_bits | run << 6 | size << 13 | (uint32_t)value << 20;
}
static inline int bits_of(step step) { return step & 63; }
static inline int run_of(step step) { return step >> 6 & 127; }
static inline int size_of(step step) { return step >> 13 & 15; }
static inline int value_of(step step) { return (int32_t)step >> 20; }

struct codes {
    step steps[1 << LOOK];
    uint16_t passes[1 << LOOK]; /* AC only: like steps, for all values whose codes are in LOOK bits; the places to advance by */
    int32_t last[17]; /* the last code of each length, or -1 */
    int32_t shift[17]; /* from a code to its symbol's place */
    const uint8_t *symbols;
};

struct bits { const uint8_t *next; uint64_t bits; int num_bits; };

struct scan {
    struct codes dc_codes[NUM_HUFF_TBLS], ac_codes[NUM_HUFF_TBLS];
    int num_blocks, colour[D_MAX_BLOCKS_IN_MCU];
    const struct codes *dc[D_MAX_BLOCKS_IN_MCU], *ac[D_MAX_BLOCKS_IN_MCU];
    int16_t last_dc[3];
    struct bits in;
    uint8_t *bytes, *end; /* without the stuffing */
    size_t capacity;
};

static const uint8_t NATURAL_ORDER[80] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63}; /* as in libjpeg: for a run beyond the end */

/* --- bits ------------------------------------------------------------------------------------------------------------ */

/* Fills the buffer to at least 56 bits, left-aligned. */
static inline void refill(struct bits *in)
{
    uint64_t word;
    memcpy(&word, in->next, 8);
    in->bits |= be64toh(word) >> in->num_bits;
    in->next += (63 - in->num_bits) >> 3;
    in->num_bits |= 56;
}

/* Returns the number that `size` bits encode (T.81, figure F.12). */
static inline int number(uint64_t bits, int size)
{
    int value = size ? bits >> (64 - size) : 0;
    return size && value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

/* --- codes ------------------------------------------------------------------------------------------------------------ */

/* Returns a code of `length` bits and the value after it. A symbol is 16 * run + size of an AC value, or the size of a DC value. */
static inline step step_of(uint64_t bits, int length, int symbol, int is_ac)
{
    int size = is_ac ? symbol & 15 : symbol, run = is_ac ? symbol >> 4 : 0;
    return make_step(length + size, is_ac && size == 0 && run < 15 ? END : run, size, number(bits << length, size));
}

static void make_passes(struct codes *codes)
{
    for (int look = 0; look < 1 << LOOK; look++) {
        int num_bits = 0, places = 0;
        while (places <= MOST_PLACES && num_bits < LOOK) {
            step step = codes->steps[look << num_bits & ((1 << LOOK) - 1)];
            if (bits_of(step) == 0)
                step = step ? step_of(0, run_of(step), value_of(step), 1) : make_step(63, 0, 0, 0);
            if (num_bits + bits_of(step) - size_of(step) > LOOK)
                break;
            num_bits += bits_of(step);
            places += run_of(step) == END ? END : run_of(step) + 1;
        }
        codes->passes[look] = make_step(num_bits, places, 0, 0);
    }
}

/* Makes the tables. Returns 0 if these are not Huffman codes of an 8-bit JPEG. */
static int make_codes(struct codes *codes, const JHUFF_TBL *table, int is_ac)
{
    int code = 0, place = 0;
    memset(codes->steps, 0, sizeof codes->steps);
    codes->symbols = table->huffval;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        codes->shift[length] = place - code;
        for (int i = 0; i < table->bits[length]; i++, code++, place++) {
            if (place > 255 || code >= 1 << length)
                return 0;
            int symbol = table->huffval[place], size = is_ac ? symbol & 15 : symbol;
            if (size > (is_ac ? 10 : 11))
                return 0;
            for (int low = 0; length <= LOOK && low < 1 << LOOK >> length; low++) {
                uint64_t look = (code << LOOK >> length) + low;
                codes->steps[look] = length + size <= LOOK ? step_of(look << (64 - LOOK), length, symbol, is_ac)
                                                           : make_step(0, length, 0, symbol);
            }
        }
        codes->last[length] = table->bits[length] ? code - 1 : -1;
    }
    if (is_ac)
        make_passes(codes);
    return 1;
}

/* Returns a step with length and symbol of a code of more than LOOK bits; 0 if the bits begin no code. */
static __attribute__((noinline)) step long_code(const struct codes *codes, uint64_t bits)
{
    int length = LOOK + 1;
    while (length <= 16 && (int)(bits >> (64 - length)) > codes->last[length])
        length++;
    return length > 16 ? 0 : make_step(0, length, 0, codes->symbols[(int)(bits >> (64 - length)) + codes->shift[length]]);
}

/* Returns the step that LOOK bits do not hold; 0 if the bits begin no code. */
static inline step long_step(const struct codes *codes, uint64_t bits, step known, int is_ac)
{
    if (known == 0 && !(known = long_code(codes, bits)))
        return 0;
    return step_of(bits, run_of(known), value_of(known), is_ac);
}

static inline void drop(struct bits *in, step step) { in->bits <<= step & 63; in->num_bits -= step & 63; }

/* --- blocks ----------------------------------------------------------------------------------------------------------- */

static inline int next_dc(struct bits *in, const struct codes *dc, int16_t *last_dc)
{
    refill(in);
    step step = dc->steps[in->bits >> (64 - LOOK)];
    if (bits_of(step) == 0 && !(step = long_step(dc, in->bits, step, 0)))
        return 0;
    drop(in, step);
    *last_dc += value_of(step);
    return 1;
}

/* Each step waits for the previous one, and a refill for all of them, so refill rarely: 56 bits last for four steps of LOOK. */
static inline int next_ac(struct bits *in, const struct codes *ac, int *left, step *step)
{
    if (--*left < 0) {
        refill(in);
        *left = 3;
    }
    *step = ac->steps[in->bits >> (64 - LOOK)];
    if (__builtin_expect(bits_of(*step) == 0, 0)) {
        refill(in);
        *left = 2;
        *step = long_step(ac, in->bits, *step, 1);
    }
    drop(in, *step);
    return *step != 0;
}

/* Decodes the 64 coefficients of a block that holds zeros. Returns 0 if the bits begin no code. */
static inline int next_block(struct bits *in, const struct codes *dc, const struct codes *ac, int16_t *last_dc, JCOEF *block)
{
    step step;
    if (!next_dc(in, dc, last_dc))
        return 0;
    block[0] = *last_dc;
    for (int k = 1, left = 2; k < 64; k++) {
        if (!next_ac(in, ac, &left, &step))
            return 0;
        k += run_of(step);
        if (k >= END)
            break;
        block[NATURAL_ORDER[k]] = value_of(step);
    }
    return 1;
}

/* Skips to the next block. Returns 0 if the bits begin no code. */
static inline int pass_block(struct bits *in, const struct codes *dc, const struct codes *ac, int16_t *last_dc)
{
    step step;
    if (!next_dc(in, dc, last_dc))
        return 0;
    for (int k = 1, left = 0; k < 64;) {
        refill(in);
        for (int i = 0; i < 2 && k < 64; i++) { /* 56 bits last for two */
            step = ac->passes[in->bits >> (64 - LOOK)];
            if (__builtin_expect(step == 0 || k >= 64 - MOST_PLACES, 0)) {
                if (!next_ac(in, ac, &left, &step))
                    return 0;
                k += run_of(step) + 1;
                break;
            }
            k += run_of(step);
            drop(in, step);
        }
    }
    return 1;
}

/* Decodes the next MCU into blocks, or skips it if blocks is NULL. Returns 0 if the data is damaged. */
static int next_mcu(struct scan *scan, JBLOCKROW *blocks)
{
    struct bits in = scan->in;
    for (int i = 0; i < scan->num_blocks; i++) {
        int16_t *last_dc = &scan->last_dc[scan->colour[i]];
        if (!(blocks ? next_block(&in, scan->dc[i], scan->ac[i], last_dc, blocks[i][0])
                     : pass_block(&in, scan->dc[i], scan->ac[i], last_dc)))
            return 0;
    }
    scan->in = in;
    return (in.next - scan->end) * 8 <= in.num_bits;
}
