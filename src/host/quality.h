/* host/quality.h: what reuse costs in quality on this host, template by template; private to this
 * room.
 *
 * A key is workflow and template (or collection) of a task: prompts of one key are alike. For each
 * the book keeps the gate's outcomes (reuse/gate.h), decayed means of audits by action, and the
 * planner's expected errors (reuse/error_model.h). It survives a restart as quality.json beside
 * the store; damaged or foreign, it is begun anew.
 * Threads  The engine thread only. */
#ifndef KVL_HOST_QUALITY_H
#define KVL_HOST_QUALITY_H

#include "base/hash.h"
#include "base/random.h"
#include "host.pb-c.h"
#include "reuse/error_model.h"
#include "reuse/gate.h"

enum { QUALITY_KEYS_MAX = 64, QUALITY_NAME = 136 };

/* Decayed sums: divided by n they are means of the last 100 or so. */
typedef struct audit_sums {
    double n, kl, top1, exact;
    uint64_t n_ever;
} audit_sums;

typedef struct quality_entry {
    char name[QUALITY_NAME]; /* "workflow/template" */
    uint64_t last_use;
    kvl_gate gate;
    kvl_error_model errors;
    audit_sums audits[KVL_ACTIONS]; /* by the action that had most of the prompt */
} quality_entry;

typedef struct quality_book {
    quality_entry entries[QUALITY_KEYS_MAX];
    uint32_t n;
    uint64_t tick;
    kvl_gate_options gate;
    kvl_error_model errors; /* of all keys: what a new key begins with */
    kvl_random random;      /* which requests are audited */
    double audit_share;
    uint64_t n_gated, n_healed_first, n_audits, n_audits_skipped;
    char *path; /* of the file; NULL: not kept */
} quality_book;

/* What an audit found. */
typedef struct audit_result {
    double shares[KVL_ACTIONS]; /* of the prompt's tokens, by what was done to them */
    double kl, top1;            /* means over the answer's tokens */
    bool has_kl;                /* otherwise only the tokens were compared */
    bool is_exact;              /* all tokens, and where it ended, are full prefill's */
} audit_result;

/* Reads the file of the directory, where there is one. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status quality_init(quality_book *book, const char *directory, double audit_share,
                                     const char *model, kvl_error *error);
void quality_deinit(quality_book *book);

/* Of a task; made where it is new, in place of the one that was not used for the longest time.
 * Borrowed until the next call. */
quality_entry *quality_find(quality_book *book, const char *workflow, const char *template_name);
/* Draws whether the next request is audited. */
bool quality_draws_audit(quality_book *book);
void quality_learn_audit(quality_book *book, quality_entry *entry, const audit_result *result);
float quality_bar(const quality_book *book, const quality_entry *entry);

/* Writes the file; a failure is logged. */
void quality_save(const quality_book *book, const char *model);

/* What other threads may know of the book: a copy. */
typedef struct quality_row {
    char name[QUALITY_NAME];
    uint32_t action;
    uint64_t n_audited;
    double kl, top1, exact, bar;
} quality_row;
/* One row for each key and action that was audited; rows [QUALITY_KEYS_MAX * KVL_ACTIONS]. */
uint32_t quality_rows(const quality_book *book, quality_row *rows);

/* Fills n_audits and audits; freed with quality_status_free. Errors   KVL_ERR_NO_MEMORY */
KVL_MUST_USE kvl_status quality_fill_status(const quality_book *book,
                                            Kvloom__V1__StatusReply *status, kvl_error *error);
void quality_free_status(Kvloom__V1__StatusReply *status);

#endif /* KVL_HOST_QUALITY_H */
