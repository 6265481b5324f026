/* Resizes a box of pixels to resolution x resolution pixels like OpenCV's INTER_AREA, which FFCV uses. If both sides shrink, an
 * output pixel is the mean over the area that it covers; otherwise it is interpolated between its two neighbours.
 *
 * The box may begin and end within a pixel. Results are the same on any machine, because no sum depends on the width of its
 * vectors.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#define FOR_SEVERAL_CPUS __attribute__((target_clones("default", "avx2")))
#else
#define FOR_SEVERAL_CPUS
#endif

typedef float four __attribute__((vector_size(16)));
typedef float eight __attribute__((vector_size(32)));

/* Output pixel i is the sum of `count` input pixels from first[i] on, times weights[i * count], ... Most weights may be 0. */
struct axis { int count; int *first; float *weights; };

static int clamped(double value, long last) { return value < 0 ? 0 : value > last ? last : (int)value; }

static int most_taps(double begin, double scale, long resolution)
{
    int most = 0;
    for (long place = 0; place < resolution; place++) {
        int taps = (int)ceil(begin + (place + 1) * scale) - (int)floor(begin + place * scale);
        most = taps > most ? taps : most;
    }
    return most;
}

static void area_taps(double begin, double end, long last, float *weights, int *first)
{
    int low = clamped(floor(begin), last), high = clamped(ceil(end) - 1, last);
    for (int place = low; place <= high; place++) {
        double from = place > begin ? place : begin, to = place + 1 < end ? place + 1 : end;
        weights[place - low] = (float)((to - from) / (end - begin));
    }
    *first = low;
}

/* OpenCV's interpolation between two neighbours for areas smaller than a pixel. `length` pixels become `resolution`. */
static void line_taps(long length, long resolution, long place, float *weights, int *first)
{
    long low = place * length / resolution, beyond = (place + 1) * length - (low + 1) * resolution;
    double second = beyond <= 0 || low + 1 >= length ? 0 : (double)(beyond % length) / length;
    *first = low;
    weights[0] = (float)(1 - second);
    weights[1] = (float)second;
}

/* Returns the axis for `resolution` output pixels from begin ... begin + length of the input. Its first is NULL if no memory is
 * left. */
static struct axis axis_of(double begin, double length, long resolution, int is_area, int mirrored)
{
    double scale = length / resolution;
    struct axis axis = {.count = is_area ? most_taps(begin, scale, resolution) : 2};
    axis.first = calloc(resolution + 1, sizeof *axis.first);
    axis.weights = axis.first ? calloc((resolution + 1) * axis.count, sizeof *axis.weights) : NULL;
    if (!axis.weights) {
        free(axis.first);
        axis.first = NULL;
        return axis;
    }
    for (int place = 0; place < resolution; place++) {
        int to = mirrored ? resolution - 1 - place : place;
        if (is_area)
            area_taps(begin + place * scale, begin + (place + 1) * scale, (long)ceil(begin + length) - 1,
                      axis.weights + to * axis.count, axis.first + to);
        else
            line_taps((long)length, resolution, place, axis.weights + to * axis.count, axis.first + to);
        axis.first[to] += is_area ? 0 : (int)begin;
    }
    return axis;
}

FOR_SEVERAL_CPUS
static void down_columns(const uint8_t *row, long stride, const float *weights, int taps, long count, float *sums)
{
    if (taps == 1 || weights[1] == 0) {
        for (long i = 0; i < count; i++)
            sums[i] = weights[0] * row[i];
        return;
    }
    for (long i = 0; i < count; i++)
        sums[i] = weights[0] * row[i] + weights[1] * row[i + stride];
    for (int tap = 2; tap < taps && weights[tap] > 0; tap++) {
        row += stride;
        for (long i = 0; i < count; i++)
            sums[i] += weights[tap] * row[i + stride];
    }
}

/* sums: (columns, 3) and `taps` more pixels. row: (resolution, 3) and a few more numbers. weights: those of two pixels, 4 times
 * each. */
static inline __attribute__((always_inline)) void along_row(const float *sums, const struct axis *axis, const eight *weights,
                                                            int taps, long resolution, float *row)
{
    for (long x = 0; x < resolution; x += 2) {
        eight sum = {0};
        for (int tap = 0; tap < taps; tap++) {
            four left, right;
            memcpy(&left, sums + 3 * (axis->first[x] + tap), sizeof left);
            memcpy(&right, sums + 3 * (axis->first[x + 1] + tap), sizeof right);
            sum += *weights++ * __builtin_shufflevector(left, right, 0, 1, 2, 3, 4, 5, 6, 7);
        }
        four first = __builtin_shufflevector(sum, sum, 0, 1, 2, 3), second = __builtin_shufflevector(sum, sum, 4, 5, 6, 7);
        memcpy(row + 3 * x, &first, sizeof first);
        memcpy(row + 3 * x + 3, &second, sizeof second);
    }
}

/* The loop takes half the time if the compiler knows the number of taps. */
FOR_SEVERAL_CPUS
static void along_row_of(const float *sums, const struct axis *axis, const eight *weights, long resolution, float *row)
{
    switch (axis->count) {
    case 2: return along_row(sums, axis, weights, 2, resolution, row);
    case 3: return along_row(sums, axis, weights, 3, resolution, row);
    case 4: return along_row(sums, axis, weights, 4, resolution, row);
    default: along_row(sums, axis, weights, axis->count, resolution, row);
    }
}

FOR_SEVERAL_CPUS
static void rounded(const float *row, long count, uint8_t *destination)
{
    for (long i = 0; i < count; i++)
        destination[i] = (uint8_t)(int)(row[i] + 0.5f);
}

/* Memory for one image. */
struct work { struct axis vertical, horizontal; float *sums, *row; eight *weights; };

static void end_work(struct work *work)
{
    free(work->vertical.first), free(work->vertical.weights);
    free(work->horizontal.first), free(work->horizontal.weights);
    free(work->sums), free(work->weights);
}

/* Allocates the rest of the memory once both axes exist. Returns 0 if no memory is left. */
static int make_work(struct work *work, long columns, long resolution)
{
    int taps = work->horizontal.count;
    if (!work->vertical.first || !work->horizontal.first)
        return 0;
    work->sums = calloc(3 * (columns + taps) + 3 * resolution + 6, sizeof *work->sums);
    work->weights = aligned_alloc(sizeof *work->weights, (resolution + 1) / 2 * taps * sizeof *work->weights);
    if (!work->sums || !work->weights)
        return 0;
    work->row = work->sums + 3 * (columns + taps) + 1;
    eight *weight = work->weights;
    for (long x = 0; x < resolution; x += 2)
        for (int tap = 0; tap < taps; tap++, weight++)
            for (int i = 0; i < 8; i++)
                (*weight)[i] = work->horizontal.weights[(x + i / 4) * taps + tap];
    return 1;
}

/* Resizes the box height x width at (top, left) of RGB pixels, whose rows are stride bytes apart, and mirrors it.
 *
 * Returns 0: done. 3: no memory is left, and destination is unchanged. The numbers are those of lbsgd_decode_crop.
 */
long lbsgd_resize(const uint8_t *pixels, long stride, double top, double left, double height, double width, long mirrored,
                  uint8_t *destination, long resolution)
{
    int is_area = height >= resolution && width >= resolution;
    long first = (long)left, columns = (long)ceil(left + width) - first;
    struct work work = {
        .vertical = axis_of(top, height, resolution, is_area, 0),
        .horizontal = axis_of(left - first, width, resolution, is_area, mirrored),
    };
    int ready = make_work(&work, columns, resolution);
    const struct axis *vertical = &work.vertical;
    for (long y = 0; ready && y < resolution; y++) {
        down_columns(pixels + vertical->first[y] * stride + 3 * first, stride, vertical->weights + y * vertical->count,
                     vertical->count, 3 * columns, work.sums);
        along_row_of(work.sums, &work.horizontal, work.weights, resolution, work.row);
        rounded(work.row, 3 * resolution, destination + 3 * resolution * y);
    }
    end_work(&work);
    return ready ? 0 : 3;
}

/* images[i, c] = (pixels[i, c] - mean[c]) / std[c] for `count` pixels i of one image or several. */
FOR_SEVERAL_CPUS
void lbsgd_normalise_interleaved(const uint8_t *restrict pixels, long count, const float *mean, const float *std,
                                 float *restrict images)
{
    for (long i = 0; i < count; i++)
        for (int c = 0; c < 3; c++)
            images[3 * i + c] = (pixels[3 * i + c] - mean[c]) / std[c];
}
