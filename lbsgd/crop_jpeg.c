/* Decodes the part of a JPEG that a crop needs, which FFCV's decoder cannot: whole rows above and below it, and columns
 * beside it, are neither transformed, upsampled nor converted. The pixels are those of FFCV's whole-image decoder, bit for
 * bit (tests/test_crop_jpeg.py). Called from Numba through ctypes, one state a thread; needs libjpeg-turbo.
 */
#include <stdio.h>
#include <string.h>
#include <setjmp.h>
#include <jpeglib.h>
#include <jerror.h>

#define ROWS_AT_ONCE 16

struct errors { struct jpeg_error_mgr base; jmp_buf back; int damaged; };

static __thread struct jpeg_decompress_struct image;
static __thread struct errors errors;
static __thread int ready = 0;

static void give_up(j_common_ptr decoder)
{
    longjmp(((struct errors *)decoder->err)->back, 1);
}

/* libjpeg calls it a warning when it makes up pixels for data that is missing or no code of any kind. */
static void take_note(j_common_ptr decoder, int level)
{
    struct errors *found = (struct errors *)decoder->err;
    if (level < 0)
        switch (found->base.msg_code) {
        case JWRN_HIT_MARKER: case JWRN_HUFF_BAD_CODE: case JWRN_JPEG_EOF: case JWRN_MUST_RESYNC: case JWRN_ARITH_BAD_CODE:
            found->damaged = 1;
        }
}

static void say_nothing(j_common_ptr decoder) { (void)decoder; }

static void make_ready(void)
{
    image.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = give_up;
    errors.base.emit_message = take_note;
    errors.base.output_message = say_nothing;
    jpeg_create_decompress(&image);
    ready = 1;
}

/* Decodes rows top .. top + height of a JPEG of num_bytes, and at least columns left .. left + width of them, into RGB
 * pixels; capacity is the bytes there.
 *
 * Returns x * 2^32 + w: the rows begin at the image's column x and are w pixels long. -1: the data is damaged or no JPEG of
 * such a size.
 */
long lbsgd_decode_crop(const unsigned char *data, long num_bytes, long top, long left, long height, long width,
                       unsigned char *pixels, long capacity)
{
    if (!ready)
        make_ready();
    if (setjmp(errors.back)) {
        jpeg_abort_decompress(&image);
        return -1;
    }
    errors.damaged = 0;
    jpeg_mem_src(&image, data, num_bytes);
    jpeg_read_header(&image, TRUE);
    image.out_color_space = JCS_RGB;
    image.dct_method = JDCT_IFAST; /* as FFCV */
    jpeg_start_decompress(&image);

    /* The colours of a column are interpolated with those of its neighbours: two more on each side. */
    JDIMENSION x = left > 2 ? left - 2 : 0, end = left + width + 2, w;
    if (end > image.output_width)
        end = image.output_width;
    w = end - x;
    if (top + height > (long)image.output_height || left + width > (long)image.output_width)
        give_up((j_common_ptr)&image);
    if (w < image.output_width)
        jpeg_crop_scanline(&image, &x, &w); /* to whole blocks, and so more columns than asked for */
    if ((long)w * height * 3 > capacity)
        give_up((j_common_ptr)&image);
    if (top)
        jpeg_skip_scanlines(&image, top);
    for (long y = 0; y < height;) {
        JSAMPROW rows[ROWS_AT_ONCE];
        int count = height - y < ROWS_AT_ONCE ? height - y : ROWS_AT_ONCE;
        for (int i = 0; i < count; i++)
            rows[i] = pixels + (size_t)(y + i) * w * 3;
        y += jpeg_read_scanlines(&image, rows, count);
    }
    jpeg_abort_decompress(&image); /* what is below the crop is never read */
    return errors.damaged ? -1 : ((long)x << 32) | w;
}
