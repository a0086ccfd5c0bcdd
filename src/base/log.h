/* base/log.h: one line an event, in logfmt, on standard error:
 *     level=warn event=tier_read_failed host=a1 tier=lmdb status=ERR_DAMAGED
 * Log where the cause is detected, once; callers that pass an error on do not log it again.
 * Threads  Safe from any thread; a line is never torn. */
#ifndef KVL_BASE_LOG_H
#define KVL_BASE_LOG_H

#include "base/status.h"

typedef enum kvl_log_level {
    KVL_LOG_DEBUG,
    KVL_LOG_INFO,
    KVL_LOG_WARN,
    KVL_LOG_ERROR,
    KVL_LOG_SILENT, /* as a threshold only */
} kvl_log_level;

/* Lines below `level` are dropped. Default: KVL_LOG_WARN, or KVLOOM_LOG=debug|info|warn|error. */
void kvl_log_set_level(kvl_log_level level);
/* Put into every line as host=NAME; at most 31 bytes are kept. NULL or "" for none. */
void kvl_log_set_host(const char *name);

/* `event` is a word in snake_case; `format` gives more "key=value" pairs, or is "". */
void kvl_log(kvl_log_level level, const char *event, const char *format, ...) KVL_PRINTF(3, 4);

#endif /* KVL_BASE_LOG_H */
