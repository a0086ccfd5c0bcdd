/* base/status.c: names, classes and texts of statuses. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

const char *kvl_status_name(kvl_status status)
{
    switch (status) {
#define KVL_STATUS_NAME(number, name, class_name, sentence)                                        \
    case KVL_##name: return #name;
        KVL_STATUS_LIST(KVL_STATUS_NAME)
#undef KVL_STATUS_NAME
    }
    return "ERR_UNKNOWN";
}

const char *kvl_status_sentence(kvl_status status)
{
    switch (status) {
#define KVL_STATUS_SENTENCE(number, name, class_name, sentence)                                    \
    case KVL_##name: return sentence;
        KVL_STATUS_LIST(KVL_STATUS_SENTENCE)
#undef KVL_STATUS_SENTENCE
    }
    return "a number that is no status";
}

kvl_status_class kvl_status_class_of(kvl_status status)
{
    switch (status) {
#define KVL_STATUS_CLASS(number, name, class_name, sentence)                                       \
    case KVL_##name: return KVL_CLASS_##class_name;
        KVL_STATUS_LIST(KVL_STATUS_CLASS)
#undef KVL_STATUS_CLASS
    }
    return KVL_CLASS_FATAL;
}

kvl_status kvl_error_set(kvl_error *error, kvl_status status, const char *file, int line,
                         const char *format, ...)
{
    if (error == NULL) return status;
    error->status = status;
    error->file = file;
    error->line = line;
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

void kvl_assert_failed(const char *condition, const char *file, int line)
{
    (void)fprintf(stderr, "kvloom: assertion failed: %s (%s:%d)\n", condition, file, line);
    abort();
}
