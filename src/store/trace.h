/* store/trace.h: accesses of one tenant, as they came, and what a memory of some size would have
 * made of them under each policy.
 *
 * A trace is a file of lines, so that others can read and make them:
 *
 *     # kvloom trace 1
 *     TIME TENANT ID BYTES WHAT
 *
 * TIME in microseconds, on any clock that does not go back; ID 64 hexadecimal digits; BYTES of the
 * container, 0 where nobody knew; WHAT is hit (it was in memory), miss, or put. Ids are keyed
 * hashes of the tenant's: a trace tells nobody which tokens they are of.
 * Threads  One at a time. */
#ifndef KVL_STORE_TRACE_H
#define KVL_STORE_TRACE_H

#include "store/store.h"

#define KVL_TRACE_ACCESSES_MAX ((size_t)1 << 20)
#define KVL_TRACE_FILE_BYTES_MAX ((size_t)256 << 20)
#define KVL_TRACE_HEAD "# kvloom trace 1\n"
#define KVL_TRACE_TENANT_BYTES_MAX 31u
#define KVL_TRACE_LINE_BYTES 192u

typedef enum kvl_access_kind {
    KVL_ACCESS_HIT = 1,
    KVL_ACCESS_MISS,
    KVL_ACCESS_PUT
} kvl_access_kind;

typedef struct kvl_access_record {
    uint64_t time_us;
    kvl_digest id;
    uint64_t n_bytes; /* 0: not known */
    kvl_access_kind kind;
} kvl_access_record;

typedef struct kvl_trace {
    kvl_access_record *accesses; /* owned */
    size_t n_accesses;
} kvl_trace;

/* One line, ended with a newline; returns its length. `tenant` is cut where it is too long. */
size_t kvl_trace_line(const kvl_access_record *access, const char *tenant,
                      char line[KVL_TRACE_LINE_BYTES]);

/* tenant NULL: of all tenants, as if they were one.
 * Owns     trace's inside: ended with kvl_trace_deinit
 * Errors   KVL_ERR_NOT_FOUND, KVL_ERR_IO, KVL_ERR_TOO_LARGE (file, or accesses), KVL_ERR_MALFORMED
 *          (text: file and line), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_trace_read(const char *path, const char *tenant, kvl_trace *trace,
                                       kvl_error *error);
void kvl_trace_deinit(kvl_trace *trace);

typedef struct kvl_replay {
    uint64_t n_gets, n_hits;
    uint64_t bytes_asked, bytes_hit; /* of gets whose size is known from any line */
    uint64_t n_evicted;
} kvl_replay;

/* A get that misses brings the container in, as a load would, but where the line does not know its
 * size: then nothing was loaded, and a put that follows brings it in. Where what follows is another
 * miss of the same container, the two were one question, first to memory and then to the disk, and
 * count once. What is larger than the memory never comes in.
 * Errors   KVL_ERR_INVALID (bytes_max 0), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status kvl_trace_replay(const kvl_trace *trace, kvl_policy_kind policy,
                                         uint64_t bytes_max, kvl_replay *replay, kvl_error *error);

/* Replays under all and says which gave most bytes: bytes are tokens, and these are what a hit
 * spares. Equal ones: the first. Errors   as above */
KVL_MUST_USE kvl_status kvl_trace_choose(const kvl_trace *trace, uint64_t bytes_max,
                                         kvl_replay replays[KVL_POLICIES], kvl_policy_kind *best,
                                         kvl_error *error);

#endif /* KVL_STORE_TRACE_H */
