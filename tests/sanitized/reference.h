/* What libjpeg-turbo makes of a whole image with its own Huffman decoder. */
#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>
#include <jerror.h>

struct reference { struct jpeg_error_mgr base; jmp_buf back; int damaged; };

static void leave(j_common_ptr image) { longjmp(((struct reference *)image->err)->back, 1); }

static void note(j_common_ptr image, int level)
{
    static const int made_up[] = {JWRN_HIT_MARKER, JWRN_HUFF_BAD_CODE, JWRN_JPEG_EOF, JWRN_MUST_RESYNC, JWRN_ARITH_BAD_CODE};
    struct reference *found = (struct reference *)image->err;
    for (int i = 0; i < 5; i++)
        found->damaged |= level < 0 && found->base.msg_code == made_up[i];
}

/* Whether the image is progressive and lacks scans. libjpeg then smooths its blocks, and differently at the edge of a crop. */
static int is_smoothed(const struct jpeg_decompress_struct *image)
{
    for (int i = 0; image->progressive_mode && i < image->num_components; i++)
        for (int place = 1; place < DCTSIZE2; place++)
            if (image->coef_bits[i][place])
                return 1;
    return 0;
}

/* Decodes a whole image of this size at 1 / shrink. Returns a status, the number of rows that were decoded, and whether it is
 * smoothed. */
static int reference_of(const struct file *file, long height, long width, int shrink, uint8_t *pixels,
                        volatile long *num_rows, volatile int *smoothed)
{
    struct jpeg_decompress_struct image;
    struct reference errors = {.damaged = 0};
    image.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = leave;
    errors.base.emit_message = note;
    *num_rows = *smoothed = 0;
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&image);
        return 2;
    }
    jpeg_create_decompress(&image);
    jpeg_mem_src(&image, file->bytes, file->size);
    jpeg_read_header(&image, TRUE);
    if (image.image_height != height || image.image_width != width)
        leave((j_common_ptr)&image);
    image.out_color_space = JCS_RGB;
    image.dct_method = JDCT_IFAST;
    image.scale_num = 8 / shrink;
    image.scale_denom = 8;
    jpeg_start_decompress(&image);
    *smoothed = is_smoothed(&image);
    while (image.output_scanline < image.output_height) {
        JSAMPROW row = pixels + 3 * image.output_width * *num_rows;
        *num_rows += jpeg_read_scanlines(&image, &row, 1);
    }
    jpeg_destroy_decompress(&image);
    return errors.damaged;
}
