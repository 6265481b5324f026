/* Decodes only the part of a JPEG that a crop needs. FFCV decodes whole images.
 *
 * libjpeg-turbo transforms, upsamples and converts only the blocks of the crop (jpeg_crop_scanline, jpeg_skip_scanlines), at
 * the smallest scale that still covers the output. That alone still takes three quarters of the time, because libjpeg-turbo
 * decodes the Huffman codes of everything above and next to the crop. huffman.h replaces its Huffman decoder: it takes half
 * the time and drops everything next to the crop. The coefficients are the same, so at full scale the pixels equal those of
 * FFCV's decoder, bit for bit (tests/test_kernels.py). Progressive and other less common JPEGs are left to libjpeg-turbo.
 *
 * Numba's compiled code calls these functions by name. Each thread has its own state, which is freed when the thread ends.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdio.h>
#include "huffman.h"
#include <jerror.h>

#define ROWS_AT_ONCE 16

/* The beginning of libjpeg's jpeg_entropy_decoder (jpegint.h, which is not installed), unchanged since version 6b. */
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr image);
    boolean (*decode_mcu)(j_decompress_ptr image, JBLOCKROW *blocks);
    boolean insufficient_data;
};

struct errors { struct jpeg_error_mgr base; jmp_buf back; int damaged; };

struct state {
    struct jpeg_decompress_struct image;
    struct errors errors;
    struct scan scan;
    long num_mcus, first, last, next; /* of a row of MCUs: their number, the wanted range, and the next MCU */
    uint8_t *pixels;
    size_t capacity;
};

long lbsgd_resize(const uint8_t *pixels, long stride, double top, double left, double height, double width, long mirrored,
                  uint8_t *destination, long resolution);

/* --- a thread's state --------------------------------------------------------------------------------------------------- */

static void give_up(j_common_ptr image)
{
    longjmp(((struct errors *)image->err)->back, 1);
}

/* libjpeg only warns when it makes up pixels because data is missing or is not a code. If many bytes of the scan are left, it
 * says nothing about bits that begin no code; our own decoder notices them. */
static void take_note(j_common_ptr image, int level)
{
    struct errors *found = (struct errors *)image->err;
    if (level < 0)
        switch (found->base.msg_code) {
        case JWRN_HIT_MARKER: case JWRN_HUFF_BAD_CODE: case JWRN_JPEG_EOF: case JWRN_MUST_RESYNC: case JWRN_ARITH_BAD_CODE:
            found->damaged = 1;
        }
}

static void say_nothing(j_common_ptr image) { (void)image; }

long lbsgd_times_given_up = 0; /* read by the tests: how often our decoder gave up and libjpeg took over */

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void end_state(void *ended)
{
    struct state *state = ended;
    free(state->scan.bytes);
    free(state->pixels);
    free(state);
}

static void make_key(void) { pthread_key_create(&key, end_state); }

static __attribute__((noinline)) struct state *my_state(void)
{
    pthread_once(&once, make_key);
    struct state *state = pthread_getspecific(key);
    if (!state && (state = calloc(1, sizeof *state))) {
        state->image.err = jpeg_std_error(&state->errors.base);
        state->errors.base.error_exit = give_up;
        state->errors.base.emit_message = take_note;
        state->errors.base.output_message = say_nothing;
        state->image.client_data = state;
        pthread_setspecific(key, state);
    }
    return state;
}

static void make_room(struct state *state, uint8_t **memory, size_t *capacity, size_t wanted)
{
    if (wanted <= *capacity)
        return;
    free(*memory);
    *memory = malloc(wanted + wanted / 2);
    *capacity = *memory ? wanted + wanted / 2 : 0;
    if (!*memory) {
        state->errors.base.msg_code = JERR_OUT_OF_MEMORY; /* like libjpeg's own */
        give_up((j_common_ptr)&state->image);
    }
}

/* --- our Huffman decoder instead of libjpeg's --------------------------------------------------------------------------- */

/* Copies the bytes of the scan without their stuffing, up to a marker, and starts reading at the first of them. */
static void copy_scan(struct state *state, const uint8_t *begin, const uint8_t *end)
{
    struct scan *scan = &state->scan;
    make_room(state, &scan->bytes, &scan->capacity, end - begin + PADDING);
    uint8_t *to = scan->bytes;
    while (begin < end) {
        const uint8_t *stop = memchr(begin, 0xFF, end - begin);
        size_t count = stop ? stop + 1 - begin : end - begin;
        memcpy(to, begin, count);
        to += count;
        begin += count + 1; /* the byte after FF */
        if (stop && (begin > end || begin[-1] != 0)) {
            to--;
            break;
        }
    }
    memset(to, 0, PADDING);
    scan->end = to;
    scan->in = (struct bits){scan->bytes, 0, 0};
}

/* Prepares the scan of an image whose header has been read. Returns 0 for a kind of image that is left to libjpeg. */
static int take_scan(struct state *state, const uint8_t *end)
{
    struct jpeg_decompress_struct *image = &state->image;
    struct scan *scan = &state->scan;
    if (image->progressive_mode || image->arith_code || image->restart_interval || image->data_precision != 8
        || image->comps_in_scan != image->num_components || (image->num_components != 1 && image->num_components != 3))
        return 0;
    if (image->src->next_input_byte + image->src->bytes_in_buffer != end) /* libjpeg made up the header's end */
        return 0;
    int h = 1;
    scan->num_blocks = 0;
    for (int i = 0; i < image->num_components; i++) {
        const jpeg_component_info *colour = image->cur_comp_info[i];
        int blocks = colour->h_samp_factor * colour->v_samp_factor;
        if (colour->dc_tbl_no >= NUM_HUFF_TBLS || colour->ac_tbl_no >= NUM_HUFF_TBLS
            || (image->num_components == 1 && blocks > 1) || scan->num_blocks + blocks > D_MAX_BLOCKS_IN_MCU
            || !image->dc_huff_tbl_ptrs[colour->dc_tbl_no] || !image->ac_huff_tbl_ptrs[colour->ac_tbl_no])
            return 0;
        h = colour->h_samp_factor > h ? colour->h_samp_factor : h;
        for (int block = 0; block < blocks; block++, scan->num_blocks++) {
            scan->colour[scan->num_blocks] = i;
            scan->dc[scan->num_blocks] = &scan->dc_codes[colour->dc_tbl_no];
            scan->ac[scan->num_blocks] = &scan->ac_codes[colour->ac_tbl_no];
        }
    }
    for (int i = 0; i < NUM_HUFF_TBLS; i++)
        if ((image->dc_huff_tbl_ptrs[i] && !make_codes(&scan->dc_codes[i], image->dc_huff_tbl_ptrs[i], 0))
            || (image->ac_huff_tbl_ptrs[i] && !make_codes(&scan->ac_codes[i], image->ac_huff_tbl_ptrs[i], 1)))
            return 0;
    memset(scan->last_dc, 0, sizeof scan->last_dc);
    copy_scan(state, image->src->next_input_byte, end);
    state->num_mcus = (image->image_width + 8 * h - 1) / (8 * h);
    state->next = 0;
    return 1;
}

/* libjpeg asks for all MCUs in turn, with blocks of zeros. If blocks is NULL, it does not want the MCU. */
static boolean decode_mcu(j_decompress_ptr image, JBLOCKROW *blocks)
{
    struct state *state = image->client_data;
    int wanted = blocks && state->first <= state->next && state->next <= state->last;
    if (++state->next == state->num_mcus)
        state->next = 0;
    if (!next_mcu(&state->scan, wanted ? blocks : NULL))
        give_up((j_common_ptr)image);
    return TRUE;
}

/* --- crops -------------------------------------------------------------------------------------------------------------- */

static long at_least(long bound, double value) { return value > bound ? value : bound; }

static long at_most(long bound, double value) { return value < bound ? value : bound; }

/* Returns 1, 2, 4 or 8 eighths, for which libjpeg has SIMD code. Other scales take longer than decoding at full scale. */
static int smallest_scale(long height, long width, long resolution)
{
    int eighths = 8;
    while (eighths > 1 && height * eighths / 16 >= resolution && width * eighths / 16 >= resolution)
        eighths /= 2;
    return eighths;
}

/* Whether libjpeg-turbo can be asked for part of the columns. At a smaller scale it transforms some colours to a larger one.
 * Before 3.0 jpeg_crop_scanline ignores that in their width, so it leaves columns unwritten if such a colour is also
 * interpolated. Of the usual samplings, only 4:1:0 has such a colour. */
static int can_crop_columns(const struct jpeg_decompress_struct *image)
{
    for (int i = 0; i < image->num_components; i++) {
        const jpeg_component_info *colour = &image->comp_info[i];
        JDIMENSION taken_for = (image->output_width * colour->h_samp_factor - 1) / image->max_h_samp_factor + 1;
        int is_whole = colour->downsampled_width == image->output_width && colour->downsampled_height == image->output_height;
        if (colour->downsampled_width != taken_for && !is_whole)
            return 0;
    }
    return 1;
}

/* Decodes the crop height x width at (top, left) of a JPEG of num_bytes with image_height x image_width pixels, resizes it to
 * resolution x resolution RGB pixels, mirrors it, and writes it to destination.
 *
 * Returns 0: done. 1: the data is damaged, and libjpeg made up some of the pixels. 2: it is not a JPEG of this size. 3: no
 * memory is left. After 2 and 3, destination is unchanged. kernels.py names these numbers.
 */
long lbsgd_decode_crop(const uint8_t *data, long num_bytes, long image_height, long image_width, long top, long left,
                       long height, long width, long mirrored, uint8_t *destination, long resolution)
{
    struct state *state = my_state();
    if (!state)
        return 3;
    struct jpeg_decompress_struct *image = &state->image;
    volatile int ours = 1, taken_over = 0;
    if (setjmp(state->errors.back)) {
        jpeg_destroy_decompress(image);
        if (state->errors.base.msg_code == JERR_OUT_OF_MEMORY)
            return 3;
        if (!ours)
            return 2;
        ours = 0; /* libjpeg takes over if our Huffman decoder gives up, and may find nothing wrong */
        taken_over = 1;
        __atomic_fetch_add(&lbsgd_times_given_up, 1, __ATOMIC_RELAXED);
    }
    state->errors.damaged = state->errors.base.msg_code = 0;
    jpeg_create_decompress(image); /* each time, or an image without tables would get those of the last one */
    jpeg_mem_src(image, data, num_bytes);
    jpeg_read_header(image, TRUE);
    if (image->image_height != image_height || image->image_width != image_width || top + height > image_height
        || left + width > image_width)
        give_up((j_common_ptr)image);
    ours = ours && take_scan(state, data + num_bytes);
    image->out_color_space = JCS_RGB;
    image->dct_method = JDCT_IFAST; /* as in FFCV */
    image->scale_num = smallest_scale(height, width, resolution);
    image->scale_denom = 8;
    jpeg_start_decompress(image);

    /* Colours are interpolated from neighbouring pixels, so decode two more on each side. */
    double scale = image->scale_num / 8.0;
    long begin = at_least(0, scale * top - 2), end = at_most(image->output_height, scale * (top + height) + 3);
    JDIMENSION x = at_least(0, scale * left - 2), w = at_most(image->output_width, scale * (left + width) + 3) - x;
    if (!can_crop_columns(image))
        x = 0, w = image->output_width;
    if (w < image->output_width)
        jpeg_crop_scanline(image, &x, &w); /* extends x and w to whole MCUs */
    if (ours) {
        long mcu_width = image->scale_num * image->max_h_samp_factor;
        state->first = x / mcu_width;
        state->last = (x + w - 1) / mcu_width;
        image->entropy->decode_mcu = decode_mcu;
    }
    make_room(state, &state->pixels, &state->capacity, (size_t)w * (end - begin) * 3);
    if (begin)
        jpeg_skip_scanlines(image, begin);
    for (long y = 0; y < end - begin;) {
        JSAMPROW rows[ROWS_AT_ONCE];
        int count = at_most(ROWS_AT_ONCE, end - begin - y);
        for (int i = 0; i < count; i++)
            rows[i] = state->pixels + (size_t)(y + i) * w * 3;
        y += jpeg_read_scanlines(image, rows, count);
    }
    jpeg_destroy_decompress(image); /* without reading the rows below the crop */
    long status = lbsgd_resize(state->pixels, 3 * w, scale * top - begin, scale * left - x, scale * height, scale * width,
                               mirrored, destination, resolution);
    return status ? status : taken_over || state->errors.damaged;
}
