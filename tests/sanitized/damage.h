/* Chance, and damage to JPEGs: to bits, bytes, segments and the fields of their tables. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct file { uint8_t *bytes; long size; };

static struct file *seeds;
static int num_seeds;
static uint64_t place;

/* --- chance --------------------------------------------------------------------------------------------------------------- */

static uint64_t next_random(void) /* splitmix64 */
{
    uint64_t z = place += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* One of 0 ... count - 1. */
static long below(long count) { return next_random() % count; }

static uint8_t any_byte(void)
{
    static const uint8_t telling[] = {0, 1, 2, 3, 4, 0x0F, 0x10, 0x11, 0x12, 0x21, 0x22, 0x41, 0x7F, 0x80, 0xF0, 0xFE, 0xFF};
    return below(2) ? next_random() : telling[below(sizeof telling)];
}

/* --- damage --------------------------------------------------------------------------------------------------------------- */

/* Returns the place of one of the markers before the coded data, 0 if there is none. */
static long any_marker(const struct file *file, const char *kinds)
{
    long found = 0, seen = 0;
    for (long at = 2; at + 4 <= file->size && file->bytes[at] == 0xFF;) {
        if ((!*kinds || strchr(kinds, file->bytes[at + 1])) && below(++seen) == 0)
            found = at;
        if (file->bytes[at + 1] == 0xDA)
            break;
        at += 2 + 256 * file->bytes[at + 2] + file->bytes[at + 3];
    }
    return found;
}

static long segment_size(const struct file *file, long at)
{
    long size = 2 + 256 * file->bytes[at + 2] + file->bytes[at + 3];
    return at + size > file->size ? file->size - at : size;
}

/* Puts `count` bytes in place of `removed` bytes. */
static void put(struct file *file, long at, long removed, const uint8_t *bytes, long count)
{
    struct file made = {malloc(file->size - removed + count + 1), file->size - removed + count};
    memcpy(made.bytes, file->bytes, at);
    memcpy(made.bytes + at, bytes, count);
    memcpy(made.bytes + at + count, file->bytes + at + removed, file->size - at - removed);
    free(file->bytes);
    *file = made;
}

static void damage_segment(struct file *file)
{
    static const char *const kinds[] = {"", "\xC4", "\xC4", "\xC0\xC1\xC2", "\xDA", "\xDB", "\xDD\xEE\xE0"};
    long at = any_marker(file, kinds[below(7)]), size = at ? segment_size(file, at) : 0;
    if (size < 5)
        return;
    uint8_t *bytes = file->bytes + at;
    int kind = bytes[1];
    if (kind == 0xC4 && size > 21 && below(2)) { /* another code of as many symbols */
        int from = 5 + below(16), to = 5 + below(16);
        if (bytes[from] && bytes[to] < 255)
            bytes[from]--, bytes[to]++;
    } else if ((kind & 0xFC) == 0xC0 && kind != 0xC4 && size > 12 && below(2)) { /* a colour's sampling factors */
        bytes[11 + 3 * below((size - 10) / 3)] = (1 + below(4)) << 4 | (1 + below(4));
    } else if ((kind & 0xFC) == 0xC0 && kind != 0xC4 && size > 9 && below(2)) { /* height or width */
        int side = 5 + 2 * below(2), length = 256 * bytes[side] + bytes[side + 1] + below(33) - 16;
        bytes[side] = length >> 8, bytes[side + 1] = length;
    } else
        bytes[1 + below(size - 1)] = any_byte();
}

static void damage_once(struct file *file)
{
    const struct file *other = &seeds[below(num_seeds)];
    long scan = any_marker(file, "\xDA"), at, count;
    if (file->size < 8)
        return;
    switch (below(11)) {
    case 0: /* a bit */
        file->bytes[below(file->size)] ^= 1 << below(8);
        break;
    case 1: /* bytes of the coded data */
        for (count = 1 + below(6); count > 0; count--)
            file->bytes[scan + below(file->size - scan)] = any_byte();
        break;
    case 2: /* the end is missing */
        file->size = below(4) ? scan + below(file->size - scan) : below(file->size);
        break;
    case 3: /* a piece of another file, in place of as much or between */
        at = below(file->size);
        count = 1 + below(other->size < 200 ? other->size : 200);
        put(file, at, below(2) && at + count <= file->size ? count : 0, other->bytes + below(other->size - count + 1), count);
        break;
    case 4: /* a piece is missing */
        at = scan + below(file->size - scan);
        count = 1 + below(20);
        put(file, at, at + count < file->size ? count : file->size - at, file->bytes, 0);
        break;
    case 5: /* a segment twice, or another file's */
    case 6: { /* a segment is missing */
        const struct file *from = below(2) ? file : other;
        long to = any_marker(file, ""), source = any_marker(from, "");
        if (!to || !source)
            break;
        count = segment_size(from, source);
        uint8_t *copy = malloc(count);
        memcpy(copy, from->bytes + source, count);
        if (below(2))
            put(file, to, 0, copy, count);
        else
            put(file, to, segment_size(file, to), copy, 0);
        free(copy);
        break;
    }
    case 7: /* 64 ones, among which no code begins */
        put(file, scan + below(file->size - scan), 0, (const uint8_t *)"\xFF\0\xFF\0\xFF\0\xFF\0\xFF\0\xFF\0\xFF\0\xFF\0", 16);
        break;
    default:
        damage_segment(file);
    }
}

/* Returns one of the files with some damage, in memory of exactly its size. */
static struct file damaged(const struct file *seed)
{
    struct file file = {malloc(seed->size + 1), seed->size};
    memcpy(file.bytes, seed->bytes, seed->size);
    for (long count = below(8) ? 1 + below(4) : 0; count > 0; count--)
        damage_once(&file);
    struct file exact = {malloc(file.size), file.size};
    memcpy(exact.bytes, file.bytes, file.size);
    free(file.bytes);
    return exact;
}
