/* host/host_parts.h: what the files of this room share; private to it. */
#ifndef KVL_HOST_HOST_PARTS_H
#define KVL_HOST_HOST_PARTS_H

#include "base/clock.h"
#include "base/queue.h"
#include "host.pb-c.h"
#include "host/check.h"
#include "host/donor.h"
#include "host/heal.h"
#include "host/host.h"
#include "host/plans.h"
#include "host/quality.h"
#include "host/refresh.h"
#include "host/waiting.h"
#include "reuse/align.h"
#include "reuse/correct.h"
#include "reuse/planner.h"
#include "reuse/select.h"

#include <pthread.h>

#define KVL_PARTS_MAX 64u
#define KVL_WHOLE_MAX 8u
#define KVL_DONORS_MAX 512u
#define KVL_SLOT_NAME_MAX 32u
#define KVL_FORGET_MAX 1024u
/* Primers that a host remembers: one a collection that is asked now. */
#define KVL_PRIMERS_MAX 8u

/* Float rows of KV of a run of tokens, all layers: [n_layers][n_tokens][n_kv_heads][head_dim].
 * Grown as needed and kept: first touch of fresh memory costs more than filling it. */
typedef struct kv_buffer {
    float *keys, *values;
    size_t n_floats; /* room in each */
} kv_buffer;

/* Distributions of the last full run: what reuse is compared with. */
typedef struct reference {
    kvl_digest prompt; /* digest of the prompt's ids */
    uint32_t *tokens;  /* [n_tokens] the answer */
    uint32_t n_tokens;
    float *logits; /* [n_positions][n_vocab]: before each token, and after the last one */
    uint32_t n_positions, n_positions_max;
} reference;

/* What other threads may look at: a copy, filled by the engine thread. */
typedef struct host_seen {
    pthread_mutex_t lock;
    int64_t heal_beside_ns;
    uint64_t n_moved;
    uint64_t n_waiting, n_healed, n_dropped, n_failed, n_tokens, n_differed;
    uint64_t n_gated, n_healed_first, n_audits, n_audits_skipped;
    uint32_t n_anchors;
    uint64_t anchor_bytes;
    uint32_t n_rows;
    quality_row rows[QUALITY_KEYS_MAX * KVL_ACTIONS];
} host_seen;

/* What slots' texts are computed behind. Different homes give different ids, so that segments of
 * several stand side by side in one store and never mix. */
typedef struct host_home {
    kvl_digest id; /* zero: behind nothing */
    uint32_t *ids; /* [n_ids] */
    uint32_t n_ids;
    uint64_t last_use; /* of a primer */
} host_home;

/* Texts of requests that nobody has read at home yet: read when there is nothing else to do. */
typedef struct host_read {
    uint32_t *ids; /* [n_ids] */
    uint32_t n_ids;
    kvl_digest owner;
    uint64_t salt;
} host_read;

#define KVL_READS_MAX 64u

typedef struct host_reads {
    host_read texts[KVL_READS_MAX]; /* [n], oldest first */
    uint32_t n;
} host_reads;

struct kvl_host {
    kvl_engine *engine;
    kvl_tier *store;  /* the stack of memory and LMDB */
    kvl_tier *memory; /* its first tier, borrowed from it: what came from peers stays here */
    kvl_exchange *exchange;
    kvl_anchor_pool *anchors;
    kvl_queue *tasks; /* as they come; the engine thread takes them from `waiting` */
    waiting_tasks waiting;
    kvl_service *service; /* or NULL */
    const kvl_clock *clock;
    kvl_kv_dtype segment_dtype;
    void (*stream)(void *context, const char *bytes, size_t n_bytes);
    void *stream_context;
    uint8_t tenant_key[KVL_TENANT_KEY_BYTES];
    char name[KVL_SLOT_NAME_MAX];
    kvl_digest fingerprint;
    host_home nothing;
    host_home header; /* the chat template's own opening */
    host_home primers[KVL_PRIMERS_MAX];
    uint64_t n_primer_uses;
    kvl_align_index *donors; /* tokens of segments at canonical homes */
    host_in_context in_context;
    kv_buffer bases[KVL_PARTS_MAX]; /* of each slot of the run */
    kv_buffer corrected;
    float *logits; /* [n_vocab] */
    reference reference;
    kvl_plan_rates rates; /* measured on this host, refreshed by every run */
    heal_queue heals;
    plan_book plans;
    host_reads reads;
    quality_book quality;
    host_seen seen;
    char peer_names[KVL_PEERS_MAX][KVL_SLOT_NAME_MAX]; /* [n_peers], for other threads: as made */
    uint32_t n_peers;
    int64_t left_ns; /* when work between two steps of the service was last over */
    bool stopping;
    _Atomic bool is_closed; /* kvl_host_stop: what waits is not healed any more */
};

/* One part of a prompt as the host sees it. */
typedef struct run_part {
    const Kvloom__V1__PromptPart *asked;
    uint32_t first, n_tokens;
    bool is_slot;
    bool is_canonical; /* its home is the run's, which everybody can compute behind */
    uint32_t slot;     /* number of the slot in the template */
    kvl_digest home, id;
    kvl_container *container; /* its KV at home, once it is had; a reference */
    bool is_aligned;          /* the container is another text's, with these tokens in it, */
    uint32_t container_first; /* from here on */
    bool is_declined;         /* it could be loaded, but computing it is faster */
    bool is_missing;          /* an answer that was asked for and is not to be had */
    bool is_unhealed;         /* `container` is an answer whose own KV was approximate */
    bool is_donor;            /* `container` is its KV in an earlier exact prompt of the scope */
    char from[KVL_SLOT_NAME_MAX];
    uint64_t fetched_bytes;
    kvl_anchor_match match;
    kvl_plan_step step; /* what the planner chose */
} run_part;

/* Tokens of a drafted answer at most. */
enum { RUN_DRAFT_MAX = 12 };

typedef struct run {
    kvl_host *host;
    const Kvloom__V1__RunTask *task;
    uint32_t *ids;
    size_t n_ids;
    run_part parts[KVL_PARTS_MAX];
    uint32_t n_parts;
    run_part whole[KVL_WHOLE_MAX]; /* parts that run_align took apart, as they were */
    uint32_t n_whole;
    const host_home *home; /* of slots that bring none; the host's, or: */
    host_home owned;       /* the same ids, under an id of the owner's; ids borrowed */
    kvl_digest template_id;
    uint64_t salt;
    kvl_session *session;
    uint32_t n_shared;
    uint32_t *positions;             /* [n_ids] scratch: what is computed */
    const kvl_select_policy *select; /* NULL: nothing is blended */
    kvl_select_policy widened;       /* what `select` is where more is computed again for free */
    const kvl_correction *correction;
    kvl_digest scope; /* of donors and means: workflow and collection */
    bool has_scope, reads_donors, keeps_donors, learns_mean;
    float *deviation;        /* [n_ids] of all that was placed, while probes are chosen, or NULL */
    struct run_probe *probe; /* while they are computed */
    uint32_t n_recomputed, n_corrected;
    uint32_t n_shifted, n_donors_kept;
    uint32_t draft[RUN_DRAFT_MAX]; /* what the answer may begin with */
    uint32_t n_draft, n_draft_kept;
    uint32_t n_read; /* slots computed at home */
    bool is_verified;
    /* What the gate and audits need to know of the answer; sent.tokens is NULL where none asks. */
    kvl_sent_answer sent;
    float lowest_probability; /* of the likeliest token, over the answer */
    float *sent_logits;       /* [n_sent_logits][n_vocab] before the first tokens; NULL: no audit */
    uint32_t n_sent_logits;
    uint32_t *again; /* [n_again] placed positions computed again before the first token; or NULL */
    uint32_t n_again;
    uint32_t n_filled; /* positions that run_fill computed, in `positions` */
    float gate_score, gate_bar;
    bool is_gated, is_healed_first;
    int64_t gate_ns;
    bool is_healing;       /* in the queue of those that are healed behind the answer */
    double expected_error; /* of the plan, nats */
    bool is_exact;         /* only shared and computed: the answer must be that of a full prefill */
    /* Outcome. */
    uint32_t n_answer;
    bool ended;
    int64_t start_ns, first_token_ns, end_ns;
    int64_t fetch_ns, correct_ns, place_ns, select_ns, compute_ns, verify_ns, wait_ns;
    kvl_refresh refresh; /* of the answer, while it is decoded */
    float *scores;       /* [2][n_ids] what chose among the placed tokens, and their deviation;
                            NULL: nothing is refreshed, nobody asks */
    bool has_scores, has_deviation;
    kvl_load_times *load_times; /* NULL: nothing was loaded beside the computing */
    kvl_digest answer_home;
    kvl_digest *anchors; /* [KVL_PARTS_MAX] measured in this run */
    uint32_t n_anchors, n_wrong;
    Kvloom__V1__Evaluation evaluation, place_only;
    bool has_evaluation, has_place_only;
} run;

/* host/host.c: the ids of a tier's containers of one kind; without memory for all of them, of some.
 * The caller frees `ids`. */
typedef struct host_ids {
    kvl_container_kind kind;
    kvl_digest *ids; /* [n] */
    size_t n, n_max;
} host_ids;
host_ids host_list_ids(kvl_tier *tier, kvl_container_kind kind);

/* host/buffer.c */
KVL_MUST_USE kvl_status kv_buffer_reserve(kv_buffer *buffer, const kvl_model_shape *shape,
                                          uint32_t n_tokens, kvl_error *error);
void kv_buffer_deinit(kv_buffer *buffer);
kvl_kv_view kv_buffer_view(const kv_buffer *buffer, const kvl_model_shape *shape,
                           uint32_t n_tokens);
/* Decodes all layers of a segment into the buffer, in parallel. */
KVL_MUST_USE kvl_status kv_buffer_load(kv_buffer *buffer, kvl_engine *engine,
                                       const kvl_container *container, kvl_error *error);

/* host/home.c */
/* Has the header's ids. */
KVL_MUST_USE kvl_status host_homes_init(kvl_host *host, kvl_error *error);
void host_homes_deinit(kvl_host *host);
/* The home that a task asks for; a new primer takes the place of the one not used for longest.
 * Borrowed until the next task.
 * Errors   KVL_ERR_INVALID (no such home; a primer without "primer", or the other way round),
 *          KVL_ERR_TOO_LARGE, KVL_ERR_NOT_FOUND (an id of a primer that is not remembered) */
KVL_MUST_USE kvl_status host_home_find(kvl_host *host, const Kvloom__V1__RunTask *task,
                                       const host_home **home, kvl_error *error);

/* host/prompt.c: parts of the task to ids; `run` keeps what it makes until run_deinit. */
KVL_MUST_USE kvl_status run_init(run *r, kvl_host *host, const Kvloom__V1__RunTask *task,
                                 kvl_error *error);
void run_deinit(run *r);

/* host/resolve.c: has the KV at home of every slot: from the store or from peers, or, where
 * `may_compute`, computed behind the header and published, so that whoever reads the text next
 * places it. A slot whose KV cannot be had is marked and logged, no error. */
KVL_MUST_USE kvl_status run_resolve(run *r, bool may_compute, kvl_error *error);

/* host/align.c: takes parts that nobody has read apart where runs of their tokens stand in other
 * texts: these runs become parts with the other text's KV, the rest is computed. What comes of it
 * is as private to the run as all blended KV. Where little is found nothing changes. */
KVL_MUST_USE kvl_status run_align(run *r, kvl_error *error);
/* Remembers the tokens of a segment at a canonical home; without memory it is not found. */
void host_remember_donor(kvl_host *host, const kvl_container *container);

/* host/donor.c */
/* What of donors and means the task may use, and leave. Errors   KVL_ERR_TOO_LARGE (a name) */
KVL_MUST_USE kvl_status run_find_scope(run *r, kvl_error *error);
/* Has a part's donor, where the task wants one and there is one: part->container then. */
bool run_find_donor(run *r, run_part *part);
/* What the run's texts teach once the prompt's KV is exact. */
void run_make_lesson(const run *r, exact_lesson *lesson);

/* host/correct.c */
/* What is added to a part as it is placed; NULL: nothing. */
const kvl_mean *run_mean(const run *r, const run_part *part);
/* How far all that was placed is from the KV in context in some layer, by position, as a selection
 * has found: probes need it. Nothing where the run has none. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status run_note_deviation(run *r, const float *deviation, kvl_error *error);
/* The chosen tokens [n_chosen], some of those of the runs, are the probes of the next run_compute,
 * where the run has probes. Without a deviation that was noted, layers 0 and 1 of all that is
 * placed and of r->positions [n_computed] are computed. Errors   those of kvl_session_deviation */
KVL_MUST_USE kvl_status run_choose_probes(run *r, const kvl_select_run *runs, size_t n_runs,
                                          uint32_t n_computed, const uint32_t *chosen,
                                          uint32_t n_chosen, kvl_error *error);
void run_probe_end(run *r);
/* Computes r->positions [n], with the last one's logits into host->logits; probes move what is not
 * computed. Errors   those of kvl_session_compute */
KVL_MUST_USE kvl_status run_compute(run *r, uint32_t n, kvl_error *error);

/* host/publish.c */
typedef struct host_publication {
    uint32_t first, n; /* positions */
    kvl_digest home;
    bool is_canonical, is_unhealed;
    const void *extra; /* borrowed for the call */
    size_t n_extra_bytes;
} host_publication;
/* KV of positions first .. first + n - 1 as a sealed segment, which nobody hears of. */
KVL_MUST_USE kvl_status host_encode(kvl_host *host, kvl_session *session,
                                    const host_publication *what, kvl_container **container,
                                    kvl_error *error);
/* KV of positions first .. first + n - 1 as a sealed segment, stored and announced. */
KVL_MUST_USE kvl_status host_publish(kvl_host *host, kvl_session *session,
                                     const host_publication *what, kvl_container **container,
                                     kvl_error *error);
/* Measures anchors of every slot that none covers yet, from the exact prompt of the session. */
KVL_MUST_USE kvl_status run_measure_anchors(run *r, kvl_error *error);

/* host/reuse.c */
/* Moves a measured rate towards amount / ms. */
void host_learn_rate(double *rate, double amount, double ms);
/* Bytes of KV of a token as segments are kept here. */
double host_bytes_of_token(const kvl_host *host);
/* What the planner believes before anything was measured here. */
kvl_plan_rates host_first_rates(void);
/* Whether KV at home goes straight into pages while the first layers are computed. */
bool run_loads_beside(const run *r);
/* Has KV at home of what is placed in the host's bases again, as it was before it was corrected. */
KVL_MUST_USE kvl_status run_load_bases(run *r, kvl_error *error);
/* Chooses what to do with each part: matches anchors where KV at home was resolved. */
KVL_MUST_USE kvl_status run_plan(run *r, kvl_error *error);
/* Places what is reused and computes the rest; logits of the prompt's last token end in
 * host->logits. `with_anchors`: corrected by anchors, and blended, as planned; without, what is
 * placed stays as it is. */
KVL_MUST_USE kvl_status run_fill(run *r, bool with_anchors, kvl_error *error);

/* host/blend.c */
/* Adds to the positions that are computed [*n, ascending, in r->positions] those of blended parts
 * that the run's policy chooses. Nothing happens without blended parts. */
KVL_MUST_USE kvl_status run_select(run *r, uint32_t *n, kvl_error *error);
/* Two ascending lists into one, `all`, which has room for both; a position in both comes once. How
 * many. */
uint32_t run_merge(const uint32_t *computed, uint32_t n_computed, const uint32_t *chosen,
                   uint32_t n_chosen, uint32_t *all);

/* Tokens of the runs that are not among the chosen ones, ascending as these are. How many. */
uint32_t run_list_others(const kvl_select_run *runs, size_t n_runs, const uint32_t *chosen,
                         uint32_t n_chosen, uint32_t *others);

/* host/draft.c: drafts the beginning of the answer, which stays in the run, over what is placed.
 * The rows in `positions` are computed on the way.
 * scores   [n_ids] zeros; the attention of the rows that said the draft, by position */
KVL_MUST_USE kvl_status run_draft(run *r, uint32_t n_computed, float *scores, kvl_error *error);

/* host/refresh.c: refreshing the run's stale tokens while it decodes (host/refresh.h), where the
 * task asks for it: made ready behind run_fill; the `compute` of kvl_decode_options; and what the
 * choice of tokens went by, which blend.c tells. */
KVL_MUST_USE kvl_status run_begin_refresh(run *r, kvl_error *error);
KVL_MUST_USE kvl_status run_decode_row(void *r, kvl_session *session, uint32_t n_logits,
                                       float *logits, kvl_error *error);
void run_keep_scores(run *r, const float *scores);
void run_keep_deviation(run *r, const float *deviation);

/* host/resolve.c: the segment `id` from a peer, kept in memory; part->container stays NULL where
 * nobody has it. */
void run_fetch(run *r, run_part *part, const kvl_digest *id);

/* host/heal_read.c: the KV of another agent's answer from store or peers: the exact one where it is
 * to be had, or comes within the time that the task gives it; else, unless the task's quality is
 * one that is checked, the unhealed one. */
void run_find_answer(run *r, run_part *part);

/* host/run.c: a copy of prompt and answer; sent->tokens ended with kvl_free. */
KVL_MUST_USE kvl_status run_copy_sent(const run *r, kvl_sent_answer *sent, kvl_error *error);

/* host/gate.c: where the task asks for it, a second cache with more recompute is asked for the same
 * answer; if the two do not agree, or are not sure enough, the run is verified. */
KVL_MUST_USE kvl_status run_gate(run *r, kvl_error *error);

/* host/fill.c: prompts of the service whose texts may stand elsewhere. For kvl_service_fill; the
 * context is the host. */
KVL_MUST_USE kvl_status host_fill(void *host, const kvl_generation *asked, kvl_filled *filled,
                                  kvl_error *error);
/* Reads one of the texts that wait, if any. */
void host_read_step(kvl_host *host);
void host_reads_deinit(kvl_host *host);

/* host/host_metrics.c: other threads see what is known now. */
void host_show(kvl_host *host);

/* host/host.c */
void host_save_quality(const kvl_host *host);

/* host/audit.c */
/* Draws whether this run is audited, and has memory for what that needs; called before decoding. */
void run_begin_audit(run *r);
/* Notes what a token was drawn from, for gate and audit. */
void run_watch(run *r, const float *logits);
/* Heals behind the answer, audits, or both: what is due waits in the host's queue. */
void run_check_later(run *r);

/* host/verify.c: prefills the prompt in full, checks the answer in one pass and decodes anew from
 * the first token that differs. The run's session is the exact one from then on. */
KVL_MUST_USE kvl_status run_verify(run *r, kvl_error *error);

/* host/evaluate.c */
/* KL(full || reused) of two rows of logits [n_vocab]; whether their likeliest token is the same. */
double divergence(const float *full, const float *reused, uint32_t n_vocab, bool *agrees);
void reference_deinit(reference *kept);
KVL_MUST_USE kvl_status reference_begin(reference *kept, const run *r, kvl_error *error);
void reference_add(reference *kept, uint32_t n_vocab, const float *logits);
/* Forces the reference's answer behind the first n_prompt tokens of the session and compares.
 * refreshes  the prompt is filled anew, and refreshed as the task says while it is forced */
KVL_MUST_USE kvl_status run_evaluate(run *r, bool refreshes, Kvloom__V1__Evaluation *evaluation,
                                     kvl_error *error);

/* host/run.c: one run task from end to end; packs the reply. */
KVL_MUST_USE kvl_status host_run_task(kvl_host *host, const Kvloom__V1__RunTask *task,
                                      Kvloom__V1__RunReply *reply, kvl_error *error);
/* Frees what host_run_task put into the reply. */
void host_reply_deinit(Kvloom__V1__RunReply *reply);

#endif /* KVL_HOST_HOST_PARTS_H */
