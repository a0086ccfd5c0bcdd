/* host/heal.h: right in the end; private to this room.
 *
 * An answer that was sent from approximate KV is checked behind its back: when the host has nothing
 * else to do, prompt and answer are prefilled in full (host/check.h), the exact KV goes into the
 * prefix tree and is published, and the approximate one is withdrawn. So errors do not pile up from
 * agent to agent. The queue is bounded; what is dropped from it stays marked as unhealed.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_HEAL_H
#define KVL_HOST_HEAL_H

#include "base/hash.h"
#include "host.pb-c.h"
#include "host/check.h"
#include "host/donor.h"
#include "reuse/error_model.h"

enum { KVL_HEALS_MAX = 16, KVL_HEAL_OUTCOMES = 64 };

/* What is to be checked behind an answer; owns sent.tokens and reused. */
typedef struct heal_request {
    kvl_sent_answer sent;
    kvl_digest home; /* of the answer behind exact KV */
    bool swaps;      /* exact KV takes the place of the approximate; false: an audit only */
    float *reused;   /* [n_reused][n_vocab] what the first tokens were drawn from; NULL: no audit */
    uint32_t n_reused;
    double shares[KVL_ACTIONS]; /* of the prompt, by action */
    bool has_score;             /* of the gate, which learns what became of it */
    float score;
    char workflow[65], template_name[65];
    exact_lesson lesson; /* what exact KV of the prompt teaches, also of an audit */
} heal_request;

typedef struct heal_job {
    struct heal_job *next;
    heal_request asked;
    double kl_sum; /* over n_kl tokens */
    uint32_t n_kl;
    exact_check check; /* under way where it has a session */
    int64_t spent_ns;
} heal_job;

typedef struct heal_outcome {
    kvl_digest home;
    Kvloom__V1__HealState state;
    uint32_t n_tokens, n_differed, first_differed;
    int64_t spent_ns;
} heal_outcome;

typedef struct heal_queue {
    heal_job *first, *last;
    uint32_t n;
    heal_outcome outcomes[KVL_HEAL_OUTCOMES]; /* a ring: the last ones */
    uint64_t n_outcomes;
    uint64_t n_healed, n_dropped, n_failed;
    uint64_t n_tokens, n_differed; /* of healed answers */
} heal_queue;

struct kvl_host;

/* The home that an unhealed answer is published under: nobody who asks for `home` gets it. */
kvl_digest heal_unhealed_home(const struct kvl_host *host, const kvl_digest *home);

/* Takes the request and what it owns. The oldest goes, counted, where there is no room: what was
 * sent last is read next. Without memory the request is dropped, and counted. */
void heal_add(struct kvl_host *host, heal_request *asked);
/* Computes a slice of the oldest; false where nothing is left to do. */
bool heal_step(struct kvl_host *host);
/* Heals the answer of this home before the others, for at most max_ns. */
void heal_wait(struct kvl_host *host, const kvl_digest *home, int64_t max_ns);
/* A prompt is to be run: what is under way gives its pages back if it could stand in the way. */
void heal_make_room(struct kvl_host *host);
void heal_tell(const struct kvl_host *host, const kvl_digest *home, Kvloom__V1__HealReply *reply);
void heal_deinit(struct kvl_host *host);

#endif /* KVL_HOST_HEAL_H */
