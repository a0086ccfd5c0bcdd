/* base/log.c: logfmt lines, each written by one write call. */
#include "base/log.h"

#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 1024, HOST_MAX_BYTES = 32 };

static const char *const level_names[] = {"debug", "info", "warn", "error"};
static _Atomic int threshold = -1;
static char host_name[HOST_MAX_BYTES];

static int level_from_environment(void)
{
    const char *wanted = getenv("KVLOOM_LOG");
    for (int level = KVL_LOG_DEBUG; wanted != NULL && level <= KVL_LOG_ERROR; level++) {
        if (strcmp(wanted, level_names[level]) == 0) return level;
    }
    return KVL_LOG_WARN;
}

void kvl_log_set_level(kvl_log_level level)
{
    atomic_store(&threshold, (int)level);
}

void kvl_log_set_host(const char *name)
{
    (void)snprintf(host_name, sizeof host_name, "%s", name == NULL ? "" : name);
}

void kvl_log(kvl_log_level level, const char *event, const char *format, ...)
{
    int least = atomic_load(&threshold);
    if (least < 0) {
        least = level_from_environment();
        atomic_store(&threshold, least);
    }
    if ((int)level < least || level > KVL_LOG_ERROR) return;

    char line[LINE_MAX_BYTES];
    const int head =
        snprintf(line, sizeof line, "level=%s event=%s%s%s%s", level_names[level], event,
                 host_name[0] == '\0' ? "" : " host=", host_name, format[0] == '\0' ? "" : " ");
    size_t used = head < 0 ? 0 : (size_t)head;
    if (used > sizeof line - 2) used = sizeof line - 2;
    va_list arguments;
    va_start(arguments, format);
    const int tail = vsnprintf(line + used, sizeof line - 1 - used, format, arguments);
    va_end(arguments);
    if (tail > 0) used += (size_t)tail;
    if (used > sizeof line - 2) used = sizeof line - 2;
    line[used++] = '\n';
    (void)!write(STDERR_FILENO, line, used);
}
