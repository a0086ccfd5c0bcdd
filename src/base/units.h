/* base/units.h: sizes and times as people write them: "8GiB", "512 KiB", "50ms", "2 min".
 * Threads  Safe from any thread. */
#ifndef KVL_BASE_UNITS_H
#define KVL_BASE_UNITS_H

#include "base/status.h"

/* A whole number or a decimal fraction, then nothing (bytes), B, kB, MB, GB, TB (powers of 1000),
 * KiB, MiB, GiB or TiB (powers of 1024); K, M, G and T alone are powers of 1024.
 * Errors   KVL_ERR_MALFORMED (text says what is understood), KVL_ERR_OUT_OF_RANGE (above 2^63) */
KVL_MUST_USE kvl_status kvl_bytes_from_text(const char *text, uint64_t *n_bytes, kvl_error *error);

/* A whole number or a decimal fraction, then us, ms, s, min or h.
 * Errors   KVL_ERR_MALFORMED, KVL_ERR_OUT_OF_RANGE (above 100 years) */
KVL_MUST_USE kvl_status kvl_duration_from_text(const char *text, int64_t *duration_ns,
                                               kvl_error *error);

#define KVL_UNIT_TEXT_BYTES 32u
/* "1.5 GiB", at most two digits behind the point; returns text [KVL_UNIT_TEXT_BYTES]. */
char *kvl_bytes_to_text(uint64_t n_bytes, char *text);

#endif /* KVL_BASE_UNITS_H */
