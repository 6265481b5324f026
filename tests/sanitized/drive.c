/* Runs the C of lbsgd/data/native on damaged JPEGs, boxes of pixels and lost files, for test_sanitized_kernels.py.
 *
 *     drive SEED NUM_IMAGES FILE...
 *
 * All buffers have exactly the size that the callers promise, so sanitizers see the first read or write outside. Pixels and
 * status are compared with those of libjpeg-turbo, which decodes the whole image with its own Huffman decoder. It prints how
 * many images ended how.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "damage.h"
#include "reference.h"

#define MOST_PIXELS (1 << 19) /* of an image whose header is damaged, so that none takes long */
#define IMAGES_PER_THREAD 64

long lbsgd_decode_crop(const uint8_t *data, long num_bytes, long image_height, long image_width, long top, long left,
                       long height, long width, long mirrored, uint8_t *destination, long resolution);
long lbsgd_resize(const uint8_t *pixels, long stride, double top, double left, double height, double width, long mirrored,
                  uint8_t *destination, long resolution);
void lbsgd_normalise_interleaved(const uint8_t *pixels, long count, const float *mean, const float *std, float *images);
void *lbsgd_watch(const void *begin, long num_bytes, const char *line, long exit_code);
void lbsgd_forget(void *mapping);
extern long lbsgd_times_given_up;

struct box { long top, left, height, width; };

static struct { long status[4], compared, ours_alone; } counts;

static struct box any_box(long height, long width)
{
    struct box box = {.height = 1 + below(height), .width = 1 + below(width)};
    if (below(4) == 0)
        box.height = height, box.width = width;
    box.top = below(height - box.height + 1), box.left = below(width - box.width + 1);
    return box;
}

/* --- memory that is missing (linked with --wrap) -------------------------------------------------------------------------- */

static int memory_is_short;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);

static int is_missing(void) { return memory_is_short && below(8) == 0; }

void *__wrap_malloc(size_t size) { return is_missing() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return is_missing() ? NULL : __real_calloc(count, size); }
void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    return is_missing() ? NULL : __real_aligned_alloc(alignment, size);
}

/* --- the same as libjpeg-turbo -------------------------------------------------------------------------------------------- */

/* The largest square of the image, decoded at 1, 1/2, 1/4 or 1/8 of its size, has the pixels and the status of libjpeg-turbo.
 * Two differences are meant: libjpeg reads on below the square, and takes bits that are no code without a warning. */
static void compare(const struct file *file, long height, long width)
{
    long shrink = 1 << below(4), side = (height < width ? height : width) / shrink;
    if (side == 0)
        side = height < width ? height : width, shrink = 1;
    long top = below(height / shrink - side + 1), left = below(width / shrink - side + 1);
    uint8_t *ours = malloc(3 * side * side), *theirs = malloc(3 * height * width);
    long num_rows, before = lbsgd_times_given_up;
    long status = lbsgd_decode_crop(file->bytes, file->size, height, width, top * shrink, left * shrink, side * shrink,
                                    side * shrink, 0, ours, side);
    int given_up = lbsgd_times_given_up != before, smoothed;
    int expected = reference_of(file, height, width, shrink, theirs, &num_rows, &smoothed);
    int alike = status == 2 ? expected == 2 : num_rows >= top + side && (status ? expected || given_up : !given_up);
    width = (width + shrink - 1) / shrink;
    for (long y = 0; y < side && status == 0 && !smoothed; y++)
        alike &= !memcmp(ours + 3 * side * y, theirs + 3 * (width * (top + y) + left), 3 * side);
    if (!alike) {
        fprintf(stderr, "status %ld, and %d of libjpeg-turbo, or other pixels at 1/%ld\n", status, expected, shrink);
        abort();
    }
    counts.compared += status == 0 && !smoothed;
    counts.ours_alone += status == 1 && expected == 0;
    free(ours), free(theirs);
}

/* --- one image ------------------------------------------------------------------------------------------------------------ */

/* Looks for the size that the image says it has. */
static int size_of(const struct file *file, long *height, long *width)
{
    long at = any_marker(file, "\xC0\xC1\xC2");
    if (!at || at + 9 > file->size)
        return 0;
    *height = 256 * file->bytes[at + 5] + file->bytes[at + 6];
    *width = 256 * file->bytes[at + 7] + file->bytes[at + 8];
    return *height > 0 && *width > 0 && *height * *width <= MOST_PIXELS;
}

static void try_image(const struct file *file)
{
    long height, width;
    if (!size_of(file, &height, &width))
        height = 1 + below(100), width = 1 + below(100);
    for (int i = 0; i < 3; i++) {
        struct box box = any_box(height, width);
        long resolution = 1 + below(below(2) ? 16 : 80), size = 3 * resolution * resolution;
        uint8_t *destination = malloc(size);
        memset(destination, 77, size);
        memory_is_short = i == 2;
        long status = lbsgd_decode_crop(file->bytes, file->size, height, width, box.top, box.left, box.height, box.width,
                                        below(2), destination, resolution);
        assert(0 <= status && status <= (memory_is_short ? 3 : 2));
        memory_is_short = 0;
        counts.status[status]++;
        for (long j = 0; j < size && status >= 2; j++)
            assert(destination[j] == 77);
        free(destination);
    }
    compare(file, height, width);
}

static void try_pixels(void)
{
    long height = 1 + below(70), width = 1 + below(70), resolution = 1 + below(50);
    struct box box = any_box(height, width);
    uint8_t *pixels = malloc(3 * height * width), *resized = malloc(3 * resolution * resolution);
    float *images = malloc(3 * resolution * resolution * sizeof *images), mean[] = {120, 0, 255}, std[] = {60, 1, 255};
    memset(pixels, 255, 3 * height * width);
    double scale = 1, top = box.top, left = box.left;
    if (box.height / 2 > resolution && box.width / 2 > resolution) /* as after decoding at a smaller scale */
        scale = 1.0 / (1 << below(4)), top += below(8) / 8.0, left += below(8) / 8.0;
    double below_it = height - top, beside_it = width - left;
    double h = fmin(scale < 1 ? box.height - below(8) / 8.0 : box.height, below_it);
    double w = fmin(scale < 1 ? box.width - below(8) / 8.0 : box.width, beside_it);
    assert(lbsgd_resize(pixels, 3 * width, top, left, h, w, below(2), resized, resolution) == 0);
    for (long i = 0; i < 3 * resolution * resolution; i++)
        assert(resized[i] == 255);
    lbsgd_normalise_interleaved(resized, resolution * resolution, mean, std, images);
    assert(images[0] == 2.25f && images[1] == 255 && images[3 * resolution * resolution - 1] == 0);
    free(pixels), free(resized), free(images);
}

/* A mapped file that becomes shorter ends a process with the last line that was watched for. */
static void try_lost_file(void)
{
    long size = 2 * sysconf(_SC_PAGESIZE);
    FILE *file = tmpfile();
    assert(file && !ftruncate(fileno(file), size));
    volatile char *mapping = mmap(NULL, size, PROT_READ, MAP_SHARED, fileno(file), 0);
    assert(mapping != MAP_FAILED && mapping[size - 1] == 0);
    for (int i = 0; i < 10; i++) {
        void *first = lbsgd_watch((char *)mapping, size, "a line\n", 1), *second = lbsgd_watch((char *)mapping, 1, "none\n", 1);
        assert(first && second && first != second);
        lbsgd_forget(first), lbsgd_forget(second);
    }
    lbsgd_watch((char *)mapping, size, "the file is lost\n", 7);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(ftruncate(fileno(file), 0) || mapping[size - 1]);
    int ended;
    assert(waitpid(child, &ended, 0) == child && WIFEXITED(ended) && WEXITSTATUS(ended) == 7);
    munmap((char *)mapping, size);
    fclose(file);
}

static void *try_some(void *number)
{
    for (int i = 0; i < *(int *)number; i++) {
        struct file file = damaged(&seeds[below(num_seeds)]);
        try_image(&file);
        free(file.bytes);
        try_pixels();
    }
    return NULL;
}

static struct file contents(const char *name)
{
    FILE *stream = fopen(name, "rb");
    assert(stream && !fseek(stream, 0, SEEK_END));
    struct file file = {malloc(ftell(stream)), ftell(stream)};
    rewind(stream);
    assert(fread(file.bytes, 1, file.size, stream) == (size_t)file.size);
    fclose(stream);
    return file;
}

int main(int num_arguments, char **arguments)
{
    place = strtoul(arguments[1], NULL, 10);
    seeds = calloc(num_seeds = num_arguments - 3, sizeof *seeds);
    for (int i = 0; i < num_seeds; i++)
        seeds[i] = contents(arguments[3 + i]);
    for (long left = strtol(arguments[2], NULL, 10); left > 0; left -= IMAGES_PER_THREAD) {
        pthread_t thread; /* its end frees what it kept */
        int number = left < IMAGES_PER_THREAD ? left : IMAGES_PER_THREAD;
        assert(!pthread_create(&thread, NULL, try_some, &number) && !pthread_join(thread, NULL));
    }
    try_lost_file();
    const long *status = counts.status;
    printf("%ld done, %ld damaged, %ld refused, %ld without memory, %ld compared, %ld noticed by ours alone\n", status[0],
           status[1], status[2], status[3], counts.compared, counts.ours_alone);
    for (int i = 0; i < num_seeds; i++)
        free(seeds[i].bytes);
    free(seeds);
    return 0;
}
