/* host/donor.h: what a host keeps of exact prompts for later ones of the same kind; private to this
 * room.
 *
 * A text's KV as it stood in an exact prompt, its donor, is the best that is known without
 * computing anything again: it has seen other texts before it, and carries them. So whoever wrote
 * those could poison it (HijackKV). Donors therefore belong to one scope, a tenant's workflow and
 * collection, and lie in a stack of tiers of their own that the exchange does not know: no peer
 * can have them, under whatever id. Approximate KV never becomes one. Means by position
 * (reuse/correct.h) are learnt from the same prompts, and belong to the same scope.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_DONOR_H
#define KVL_HOST_DONOR_H

#include "base/hash.h"
#include "host/engine.h"
#include "store/store.h"

enum { KVL_MEANS_MAX = 8, KVL_LESSON_TEXTS_MAX = 64 };

/* A mean of one scope over texts of one home. */
typedef struct host_mean {
    kvl_digest scope, home;
    kvl_mean mean;     /* keys NULL: the place is free */
    uint64_t last_use; /* by host_in_context.n_uses */
} host_mean;

typedef struct host_in_context {
    kvl_tier *tier; /* memory and LMDB; NULL until a task wants donors */
    char *path;     /* of the LMDB tier */
    uint64_t bytes_max, memory_bytes_max;
    bool is_default; /* used and kept where a task names a collection, and says no more */
    bool is_broken;  /* it could not be opened: logged once */
    host_mean means[KVL_MEANS_MAX];
    uint64_t n_uses;
} host_in_context;

/* What an exact prompt is to teach. */
typedef struct exact_lesson {
    bool keeps_donors, learns_mean;
    kvl_digest scope;
    uint32_t n_texts;
    struct {
        uint32_t first, n;  /* positions */
        kvl_digest at_home; /* id of its segment behind nothing, header or primer */
    } texts[KVL_LESSON_TEXTS_MAX];
} exact_lesson;

struct kvl_host;
struct kvl_host_options;

/* Opens nothing yet. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status donors_init(struct kvl_host *host, const struct kvl_host_options *options,
                                    kvl_error *error);
void donors_deinit(struct kvl_host *host);
/* Of what is open; zero before the first task that wants donors. */
void donors_stats(const struct kvl_host *host, kvl_tier_stats *stats);
/* Donors of the same tokens as these segments [n], of every scope. Segments that are not in the
 * store are unknown. Without memory some stay, until they are evicted. */
void donors_forget(struct kvl_host *host, const kvl_digest *ids, size_t n);

/* `session` is exact from the first token on, at least as far as the lesson's texts. A donor is
 * replaced if no fewer tokens stand before the text now. What cannot be kept is logged.
 * Returns  how many texts are donors now that were not, or were replaced */
uint32_t donors_learn(struct kvl_host *host, kvl_session *session, const exact_lesson *lesson);

/* Of segments like this one: of its home, or, for answers of other agents, which have homes of
 * their own, of all of them together. NULL where nothing was learnt of them yet.
 * Borrowed until the next lesson. */
const kvl_mean *donors_mean(struct kvl_host *host, const kvl_digest *scope,
                            const kvl_container_info *segment);

#endif /* KVL_HOST_DONOR_H */
