/* store/trace.c: reading traces and replaying them. */
#include "store/trace.h"

#include "base/alloc.h"
#include "base/file.h"
#include "store/policy.h"

#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const kinds[] = {
    [KVL_ACCESS_HIT] = "hit", [KVL_ACCESS_MISS] = "miss", [KVL_ACCESS_PUT] = "put"};

size_t kvl_trace_line(const kvl_access_record *access, const char *tenant,
                      char line[KVL_TRACE_LINE_BYTES])
{
    char id[KVL_DIGEST_TEXT_BYTES];
    const int n =
        snprintf(line, KVL_TRACE_LINE_BYTES, "%" PRIu64 " %.*s %s %" PRIu64 " %s\n",
                 access->time_us, (int)KVL_TRACE_TENANT_BYTES_MAX, tenant,
                 kvl_digest_to_text(&access->id, id), access->n_bytes, kinds[access->kind]);
    return (size_t)n;
}

/* ---- reading ---- */

static bool take_number(const char *text, uint64_t *number)
{
    char *end = NULL;
    errno = 0;
    *number = strtoull(text, &end, 10);
    return text[0] >= '0' && text[0] <= '9' && *end == '\0' && errno == 0;
}

static bool take_kind(const char *text, kvl_access_kind *kind)
{
    for (int k = KVL_ACCESS_HIT; k <= KVL_ACCESS_PUT; k++) {
        *kind = (kvl_access_kind)k;
        if (strcmp(kinds[k], text) == 0) return true;
    }
    return false;
}

/* Cuts the line in place. False: it is none of a trace's. */
static bool take_line(char *line, kvl_access_record *access, const char **tenant)
{
    enum { WORDS = 5 };
    char *words[WORDS];
    char *rest = line;
    for (int i = 0; i < WORDS; i++) {
        words[i] = rest;
        rest += strcspn(rest, " ");
        if ((*rest == '\0') != (i == WORDS - 1) || rest == words[i]) return false;
        if (*rest != '\0') *rest++ = '\0';
    }
    *tenant = words[1];
    return strlen(words[1]) <= KVL_TRACE_TENANT_BYTES_MAX &&
           take_number(words[0], &access->time_us) &&
           kvl_digest_from_text(words[2], &access->id) == KVL_OK &&
           take_number(words[3], &access->n_bytes) && take_kind(words[4], &access->kind);
}

static kvl_status add_access(kvl_trace *trace, size_t *capacity, const kvl_access_record *access,
                             const char *path, kvl_error *error)
{
    if (trace->n_accesses == KVL_TRACE_ACCESSES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "%.200s: more than %zu accesses; cut it", path,
                        KVL_TRACE_ACCESSES_MAX);
    }
    if (trace->n_accesses == *capacity) {
        const size_t wider = *capacity == 0 ? 1024 : 2 * *capacity;
        kvl_access_record *accesses = kvl_realloc(trace->accesses, wider * sizeof *accesses);
        if (accesses == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a trace");
        trace->accesses = accesses;
        *capacity = wider;
    }
    trace->accesses[trace->n_accesses++] = *access;
    return KVL_OK;
}

static kvl_status take_text(char *text, const char *path, const char *wanted, kvl_trace *trace,
                            kvl_error *error)
{
    size_t capacity = 0;
    size_t number = 0;
    for (char *line = text; *line != '\0';) {
        char *end = strchr(line, '\n');
        number++;
        /* A line without an end is one that was being written when the machine stopped. */
        if (end == NULL) return KVL_OK;
        *end = '\0';
        kvl_access_record access;
        const char *tenant = NULL;
        if (line[0] != '#') {
            if (!take_line(line, &access, &tenant)) {
                return KVL_FAIL(error, KVL_ERR_MALFORMED,
                                "%.200s, line %zu: must be TIME TENANT ID BYTES hit|miss|put", path,
                                number);
            }
            if (wanted == NULL || strcmp(wanted, tenant) == 0)
                KVL_TRY(add_access(trace, &capacity, &access, path, error));
        }
        line = end + 1;
    }
    return KVL_OK;
}

kvl_status kvl_trace_read(const char *path, const char *tenant, kvl_trace *trace, kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    *trace = (kvl_trace){NULL, 0};
    KVL_TRY(kvl_file_read(path, KVL_TRACE_FILE_BYTES_MAX, &text, &n_bytes, error));
    kvl_status status = KVL_OK;
    if (strncmp(text, KVL_TRACE_HEAD, strlen(KVL_TRACE_HEAD)) != 0) {
        status = KVL_FAIL(error, KVL_ERR_MALFORMED, "%.200s does not begin with '%.16s'", path,
                          KVL_TRACE_HEAD);
    } else if (strlen(text) != n_bytes) {
        status = KVL_FAIL(error, KVL_ERR_MALFORMED, "%.200s has a zero byte", path);
    } else {
        status = take_text(text, path, tenant, trace, error);
    }
    kvl_free(text);
    if (status < 0) kvl_trace_deinit(trace);
    return status;
}

void kvl_trace_deinit(kvl_trace *trace)
{
    kvl_free(trace->accesses);
    *trace = (kvl_trace){NULL, 0};
}

/* ---- replaying ---- */

/* One for each id of the trace. */
typedef struct item {
    kvl_entry by_id; /* first: of the map of all ids */
    kvl_policy_entry entry;
    uint64_t n_bytes;
    kvl_access_kind next_kind; /* of what was asked for it later */
    bool is_there;
} item;

typedef struct world {
    item *items;    /* [n_accesses], as many as there are ids are used */
    item **item_of; /* [n_accesses]; NULL: it is not replayed */
    size_t n_items;
    kvl_entry_map map;
    kvl_policy policy;
    uint64_t bytes;
    kvl_replay *replay;
} world;

static item *item_of_entry(kvl_policy_entry *entry)
{
    return (item *)(void *)((char *)entry - offsetof(item, entry));
}

/* Sizes come from whichever line knows them: a miss at first sight has none. */
static void name_items(world *w, const kvl_trace *trace)
{
    for (size_t i = 0; i < trace->n_accesses; i++) {
        const kvl_access_record *access = &trace->accesses[i];
        item *it = (item *)kvl_entry_map_find(&w->map, &access->id);
        if (it == NULL) {
            it = &w->items[w->n_items++];
            it->by_id.id = it->entry.entry.id = access->id;
            kvl_entry_map_add(&w->map, &it->by_id);
        }
        if (access->n_bytes > 0) it->n_bytes = access->n_bytes;
        w->item_of[i] = it;
    }
}

/* Accesses that another one repeats have no item. */
static void drop_repeated(world *w, const kvl_trace *trace)
{
    for (size_t i = trace->n_accesses; i-- > 0;) {
        const kvl_access_record *access = &trace->accesses[i];
        item *it = w->item_of[i];
        const bool is_repeated = access->kind == KVL_ACCESS_MISS && access->n_bytes == 0 &&
                                 it->next_kind == KVL_ACCESS_MISS;
        if (is_repeated) w->item_of[i] = NULL;
        it->next_kind = access->kind;
    }
}

static void bring_in(world *w, item *it)
{
    if (it->n_bytes == 0 || it->n_bytes > w->policy.bytes_max) return;
    while (w->bytes > w->policy.bytes_max - it->n_bytes) {
        kvl_policy_entry *victim = kvl_policy_evict(&w->policy, NULL);
        KVL_ASSERT(victim != NULL);
        item_of_entry(victim)->is_there = false;
        w->bytes -= victim->n_bytes;
        w->replay->n_evicted++;
    }
    it->entry.n_bytes = it->n_bytes;
    it->is_there = true;
    w->bytes += it->n_bytes;
    kvl_policy_add(&w->policy, &it->entry);
}

static void replay_access(world *w, const kvl_access_record *access, item *it)
{
    if (access->kind == KVL_ACCESS_PUT) {
        if (!it->is_there) bring_in(w, it);
        return;
    }
    w->replay->n_gets++;
    w->replay->bytes_asked += it->n_bytes;
    if (!it->is_there) {
        if (access->kind == KVL_ACCESS_HIT || access->n_bytes > 0) bring_in(w, it);
        return;
    }
    w->replay->n_hits++;
    w->replay->bytes_hit += it->n_bytes;
    kvl_policy_use(&w->policy, &it->entry);
}

static kvl_status replay_all(world *w, const kvl_trace *trace, kvl_policy_kind policy,
                             uint64_t bytes_max, kvl_error *error)
{
    const size_t n = trace->n_accesses;
    w->items = kvl_alloc_zero(n, sizeof *w->items);
    w->item_of = kvl_alloc_zero(n, sizeof(item *));
    if (w->items == NULL || w->item_of == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to replay %zu accesses", n);
    KVL_TRY(kvl_entry_map_init(&w->map, error));
    KVL_TRY(kvl_policy_init(&w->policy, policy, bytes_max, error));
    name_items(w, trace);
    drop_repeated(w, trace);
    for (size_t i = 0; i < n; i++) {
        if (w->item_of[i] != NULL) replay_access(w, &trace->accesses[i], w->item_of[i]);
    }
    return KVL_OK;
}

kvl_status kvl_trace_replay(const kvl_trace *trace, kvl_policy_kind policy, uint64_t bytes_max,
                            kvl_replay *replay, kvl_error *error)
{
    *replay = (kvl_replay){0};
    if (bytes_max == 0) return KVL_FAIL(error, KVL_ERR_INVALID, "a memory of no bytes");
    if (trace->n_accesses == 0) return KVL_OK;
    world w = {.replay = replay};
    const kvl_status status = replay_all(&w, trace, policy, bytes_max, error);
    kvl_policy_deinit(&w.policy);
    kvl_entry_map_deinit(&w.map);
    kvl_free(w.item_of);
    kvl_free(w.items);
    return status;
}

kvl_status kvl_trace_choose(const kvl_trace *trace, uint64_t bytes_max,
                            kvl_replay replays[KVL_POLICIES], kvl_policy_kind *best,
                            kvl_error *error)
{
    *best = KVL_POLICY_SLRU;
    for (uint32_t k = 0; k < KVL_POLICIES; k++) {
        KVL_TRY(kvl_trace_replay(trace, (kvl_policy_kind)k, bytes_max, &replays[k], error));
        if (replays[k].bytes_hit > replays[*best].bytes_hit) *best = (kvl_policy_kind)k;
    }
    return KVL_OK;
}
