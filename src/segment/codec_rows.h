/* segment/codec_rows.h: conversions of one run of numbers, in plain C and for AVX2 with F16C; both
 * give the same bits.
 * Threads  Safe from any thread. */
#ifndef KVL_SEGMENT_CODEC_ROWS_H
#define KVL_SEGMENT_CODEC_ROWS_H

#include "base/status.h"

/* `in` and `out` must not overlap. Any n. */
typedef struct kvl_codec_rows {
    void (*f16_from_f32)(size_t n, const float *in, uint16_t *out);
    void (*f32_from_f16)(size_t n, const uint16_t *in, float *out);
    void (*bf16_from_f32)(size_t n, const float *in, uint16_t *out);
    void (*f32_from_bf16)(size_t n, const uint16_t *in, float *out);
    /* Bits of the largest finite |x|; 0 where there is none. */
    uint32_t (*magnitude_max)(size_t n, const float *in);
    /* out[i] = in[i] * inverse, rounded, within +-127; 0 where that is NaN. */
    void (*int8_from_f32)(size_t n, const float *in, float inverse, int8_t *out);
    void (*f32_from_int8)(size_t n, const int8_t *in, float scale, float *out);
} kvl_codec_rows;

const kvl_codec_rows *kvl_codec_rows_portable(void);
/* NULL where this processor or this build has none. */
const kvl_codec_rows *kvl_codec_rows_avx2(void);

#endif /* KVL_SEGMENT_CODEC_ROWS_H */
