/* base/status.h: what a call can answer, and how an error explains itself.
 *
 * One list gives every status its number, name, class and sentence. The class tells a caller what
 * to do, so that nobody has to know every single status:
 *   OK      it worked
 *   MISS    nothing usable there: the part is computed instead, and the miss is counted
 *   RETRY   not now: wait and ask again, or ask somebody else
 *   REFUSE  the request is at fault: tell the client what to change
 *   FATAL   this process cannot go on serving
 * Numbers travel on the wire, so they never change; new ones are appended. */
#ifndef KVL_BASE_STATUS_H
#define KVL_BASE_STATUS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KVL_MUST_USE __attribute__((warn_unused_result))
#define KVL_PRINTF(format_at, first_at) __attribute__((format(printf, format_at, first_at)))

#define KVL_STATUS_LIST(X)                                                                         \
    X(0, OK, OK, "done")                                                                           \
    X(1, IN_PROGRESS, OK, "not finished yet")                                                      \
    X(-1, ERR_INVALID, REFUSE, "a value is not allowed")                                           \
    X(-2, ERR_OUT_OF_RANGE, REFUSE, "a number is outside its range")                               \
    X(-3, ERR_TOO_LARGE, REFUSE, "larger than a limit")                                            \
    X(-4, ERR_UNSUPPORTED, REFUSE, "known, but not supported here")                                \
    X(-5, ERR_DENIED, REFUSE, "not allowed")                                                       \
    X(-6, ERR_MALFORMED, REFUSE, "not in the expected format")                                     \
    X(-7, ERR_EXISTS, REFUSE, "already there")                                                     \
    X(-8, ERR_FORBIDDEN, REFUSE, "known, but without the right to this")                           \
    X(-20, ERR_NOT_FOUND, MISS, "not there")                                                       \
    X(-21, ERR_DAMAGED, MISS, "a checksum or a size does not match")                               \
    X(-22, ERR_FOREIGN, MISS, "made by another model or format version")                           \
    X(-23, ERR_EXPIRED, MISS, "its time is over")                                                  \
    X(-40, ERR_BUSY, RETRY, "no capacity now")                                                     \
    X(-41, ERR_TIMEOUT, RETRY, "the deadline passed")                                              \
    X(-42, ERR_UNREACHABLE, RETRY, "no answer from there")                                         \
    X(-43, ERR_CANCELLED, RETRY, "ended by the caller")                                            \
    X(-60, ERR_NO_MEMORY, FATAL, "memory could not be had")                                        \
    X(-61, ERR_IO, FATAL, "the operating system refused an operation")                             \
    X(-62, ERR_CORRUPT, FATAL, "the store cannot be trusted")                                      \
    X(-63, ERR_INTERNAL, FATAL, "a mistake in KVLoom itself")

typedef enum kvl_status {
#define KVL_STATUS_ENUM(number, name, class_name, sentence) KVL_##name = (number),
    KVL_STATUS_LIST(KVL_STATUS_ENUM)
#undef KVL_STATUS_ENUM
} kvl_status;

typedef enum kvl_status_class {
    KVL_CLASS_OK,
    KVL_CLASS_MISS,
    KVL_CLASS_RETRY,
    KVL_CLASS_REFUSE,
    KVL_CLASS_FATAL,
} kvl_status_class;

/* "ERR_BUSY"; for a number that is no status, "ERR_UNKNOWN". Static text. */
const char *kvl_status_name(kvl_status status);

/* One sentence for a person. Static text. */
const char *kvl_status_sentence(kvl_status status);

/* An unknown number is FATAL: never trust what you do not understand. */
kvl_status_class kvl_status_class_of(kvl_status status);

#define KVL_ERROR_TEXT_MAX 512u

/* Where a door reports what went wrong: which thing, which value, which limit, what to do.
 * The caller owns it; it needs no ending. No pointers, secrets or prompt text go into `text`. */
typedef struct kvl_error {
    kvl_status status;
    int line;
    const char *file; /* static text */
    char text[KVL_ERROR_TEXT_MAX];
} kvl_error;

/* Fills `error` (which may be NULL) and returns `status`, so that a failure is one line:
 *     return KVL_FAIL(error, KVL_ERR_INVALID, "key %s is %u, must be below %u", ...); */
KVL_MUST_USE kvl_status kvl_error_set(kvl_error *error, kvl_status status, const char *file,
                                      int line, const char *format, ...) KVL_PRINTF(5, 6);
#define KVL_FAIL(error, status, ...)                                                               \
    kvl_error_set((error), (status), __FILE__, __LINE__, __VA_ARGS__)

/* Returns the status of `call` when it is an error; the callee has filled the error already. */
#define KVL_TRY(call)                                                                              \
    do {                                                                                           \
        const kvl_status kvl_try_status = (call);                                                  \
        if (kvl_try_status < 0) return kvl_try_status;                                             \
    } while (0)

/* For the rare call whose failure changes nothing: says that the status was thought of. */
static inline void kvl_ignore(kvl_status status)
{
    (void)status;
}

/* Our own mistakes, never outside data. Stays on in release builds: prints and aborts. */
_Noreturn void kvl_assert_failed(const char *condition, const char *file, int line);
#define KVL_ASSERT(condition)                                                                      \
    ((condition) ? (void)0 : kvl_assert_failed(#condition, __FILE__, __LINE__))

#endif /* KVL_BASE_STATUS_H */
