/* host/plans.h: how the last requests were had, for whoever asks later; private to this room.
 *
 * Every run has a number, which its reply says. For the last KVL_PLANS_MAX of them the host keeps
 * the reply's report of the parts, the parts' text, and which placed tokens were computed again:
 * what `kvloom explain --request` shows. Bounded in number and in bytes; the oldest go.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_PLANS_H
#define KVL_HOST_PLANS_H

#include "host.pb-c.h"

#include "base/status.h"

#define KVL_PLANS_MAX 64u
#define KVL_PLANS_BYTES_MAX ((size_t)4 << 20)

typedef struct plan_book {
    struct {
        uint64_t request;
        uint8_t *bytes; /* a packed PlanReply; NULL: none here */
        size_t n_bytes;
    } items[KVL_PLANS_MAX]; /* a ring */
    uint64_t n_requests;    /* ever: the number of the last one */
    uint64_t first_kept;    /* the lowest number that may still be kept */
    size_t n_bytes;
} plan_book;

struct kvl_host;
struct run;

/* Gives the run its number, and keeps what can be kept: without memory, or of more than all may
 * have, only the number. */
void plans_keep(struct kvl_host *host, const struct run *r, Kvloom__V1__RunReply *reply);
/* Owns     *found: ended with kvloom__v1__plan_reply__free_unpacked
 * Errors   KVL_ERR_NOT_FOUND (never heard of, or forgotten), KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status plans_find(const struct kvl_host *host, uint64_t request,
                                   Kvloom__V1__PlanReply **found, kvl_error *error);
void plans_deinit(struct kvl_host *host);

#endif /* KVL_HOST_PLANS_H */
