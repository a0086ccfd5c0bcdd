/* cli/cmd_trace.c: `kvloom trace record`: what is asked of a sidecar, to a file, and `kvloom trace
 * replay`: what each policy would have made of it. */
#include "base/alloc.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/units.h"
#include "cli/cli.h"
#include "kvloom.h"
#include "store/trace.h"

#include <argp.h>
#include <jansson.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

enum {
    OPTION_SOCKET = 256,
    OPTION_FINGERPRINT,
    OPTION_FOR,
    OPTION_BYTES_MAX,
    OPTION_MEMORY,
    OPTION_POLICY,
    OPTION_TENANT,
    OPTION_JSON,
    PAUSE_MS = 50,
    ACCESSES_MAX = 1024
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "record:", 1},
    {"socket", OPTION_SOCKET, "PATH", 0, "Of the sidecar ($KVLOOM_SOCKET)", 1},
    {"model", 'm', "TEXT", 0, "The model's name, as the sidecar has it", 1},
    {"fingerprint", OPTION_FINGERPRINT, "HEX", 0, "The same as its 64 hexadecimal digits", 1},
    {"for", OPTION_FOR, "TIME", 0, "How long (until it is stopped)", 1},
    {"bytes-max", OPTION_BYTES_MAX, "SIZE", 0, "Ends when the file has this size (64MiB)", 1},
    {NULL, 0, NULL, 0, "replay:", 2},
    {"memory", OPTION_MEMORY, "SIZE", 0, "What may be kept in memory (1GiB)", 2},
    {"policy", OPTION_POLICY, "WHICH", 0, "auto (all, and the best), slru, lru or s3fifo (auto)",
     2},
    {"tenant", OPTION_TENANT, "NAME", 0, "Only its lines (all, as if they were one)", 2},
    {"json", OPTION_JSON, NULL, 0, "One JSON object", 2},
    {0},
};

typedef struct arguments {
    kvloom_options client;
    bool has_model, json;
    int64_t duration_ns; /* 0: no end */
    uint64_t bytes_max, memory;
    const char *policy, *tenant, *what, *path;
} arguments;

static uint64_t bytes_of(const struct argp_state *state, const char *text)
{
    uint64_t n_bytes = 0;
    kvl_error error;
    if (kvl_bytes_from_text(text, &n_bytes, &error) < 0) argp_error(state, "%s", error.text);
    if (n_bytes == 0) argp_error(state, "'%s' is no size", text);
    return n_bytes;
}

static void take_fingerprint(arguments *wanted, const struct argp_state *state, const char *text)
{
    kvl_digest digest;
    if (kvl_digest_from_text(text, &digest) < 0)
        argp_error(state, "--fingerprint must be 64 hexadecimal digits");
    memcpy(wanted->client.fingerprint.bytes, digest.bytes, sizeof digest.bytes);
    wanted->has_model = true;
}

static error_t parse(int key, char *text, struct argp_state *state)
{
    arguments *wanted = state->input;
    kvl_error error;
    switch (key) {
    case OPTION_SOCKET: wanted->client.socket = text; return 0;
    case 'm':
        wanted->client.fingerprint = kvloom_fingerprint(text, strlen(text));
        wanted->has_model = true;
        return 0;
    case OPTION_FINGERPRINT: take_fingerprint(wanted, state, text); return 0;
    case OPTION_FOR:
        if (kvl_duration_from_text(text, &wanted->duration_ns, &error) < 0)
            argp_error(state, "%s", error.text);
        return 0;
    case OPTION_BYTES_MAX: wanted->bytes_max = bytes_of(state, text); return 0;
    case OPTION_MEMORY: wanted->memory = bytes_of(state, text); return 0;
    case OPTION_POLICY: wanted->policy = text; return 0;
    case OPTION_TENANT: wanted->tenant = text; return 0;
    case OPTION_JSON: wanted->json = true; return 0;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1) argp_usage(state);
        *(state->arg_num == 0 ? &wanted->what : &wanted->path) = text;
        return 0;
    case ARGP_KEY_END:
        if (wanted->path == NULL) argp_usage(state);
        return 0;
    default: return ARGP_ERR_UNKNOWN;
    }
}

/* ---- record ---- */

typedef struct recording {
    kvl_line_file file;
    uint64_t n_bytes, n_accesses, n_lost;
} recording;

static kvl_status add_line(recording *r, const char *line, size_t n_bytes, kvl_error *error)
{
    KVL_TRY(kvl_line_file_add(&r->file, line, n_bytes - 1, error)); /* it ends the line itself */
    r->n_bytes += n_bytes;
    return KVL_OK;
}

static kvl_status add_accesses(recording *r, const kvloom_access *accesses, size_t n,
                               const char *tenant, uint64_t bytes_max, kvl_error *error)
{
    for (size_t i = 0; i < n && r->n_bytes + KVL_TRACE_LINE_BYTES <= bytes_max; i++) {
        char line[KVL_TRACE_LINE_BYTES];
        kvl_access_record access = {.time_us = accesses[i].time_us,
                                    .n_bytes = accesses[i].n_bytes,
                                    .kind = (kvl_access_kind)accesses[i].what};
        memcpy(access.id.bytes, accesses[i].id.bytes, sizeof access.id.bytes);
        KVL_TRY(add_line(r, line, kvl_trace_line(&access, tenant, line), error));
        r->n_accesses++;
    }
    return KVL_OK;
}

/* A client that has nothing new to read pauses; the sidecar keeps what comes meanwhile. */
static int follow(const arguments *wanted, kvloom_client *client, recording *r)
{
    const kvl_clock *clock = kvl_clock_system();
    const int64_t start_ns = kvl_clock_now(clock);
    uint64_t after = 0;
    while (r->n_bytes + KVL_TRACE_LINE_BYTES <= wanted->bytes_max &&
           (wanted->duration_ns == 0 || kvl_clock_now(clock) - start_ns < wanted->duration_ns)) {
        kvloom_access accesses[ACCESSES_MAX];
        char tenant[KVLOOM_TENANT_BYTES];
        size_t n = 0;
        uint64_t n_lost = 0;
        kvloom_error reason;
        kvl_error error;
        if (kvloom_accesses(client, &after, accesses, ACCESSES_MAX, &n, &n_lost, tenant, &reason) <
            0) {
            (void)fprintf(stderr, "kvloom trace: %s\n", reason.text);
            return KVL_EXIT_FAILED;
        }
        r->n_lost += n_lost;
        if (add_accesses(r, accesses, n, tenant, wanted->bytes_max, &error) < 0)
            return kvl_cli_fail(&error);
        if (n < ACCESSES_MAX) (void)poll(NULL, 0, PAUSE_MS);
    }
    return KVL_EXIT_OK;
}

/* Goes on with a trace that is there, and with nothing else. */
static kvl_status open_file(const char *path, recording *r, kvl_error *error)
{
    kvl_trace trace;
    kvl_status status = kvl_trace_read(path, NULL, &trace, error);
    if (status < 0 && status != KVL_ERR_NOT_FOUND) return status;
    const bool is_new = status == KVL_ERR_NOT_FOUND;
    if (!is_new) kvl_trace_deinit(&trace);
    KVL_TRY(kvl_line_file_open(path, &r->file, error));
    if (!is_new) return KVL_OK;
    status = add_line(r, KVL_TRACE_HEAD, strlen(KVL_TRACE_HEAD), error);
    if (status < 0) kvl_line_file_close(&r->file);
    return status;
}

static int record(const arguments *wanted)
{
    recording r = {.n_bytes = 0};
    kvl_error error;
    kvloom_error reason;
    kvloom_client *client = NULL;
    if (!wanted->has_model) {
        (void)fprintf(stderr, "kvloom trace record: --model or --fingerprint is needed\n");
        return KVL_EXIT_USAGE;
    }
    if (kvloom_connect(&wanted->client, &client, &reason) < 0) {
        (void)fprintf(stderr, "kvloom: %s\n", reason.text);
        return KVL_EXIT_FAILED;
    }
    int result = KVL_EXIT_FAILED;
    if (open_file(wanted->path, &r, &error) < 0) {
        result = kvl_cli_fail(&error);
    } else {
        result = follow(wanted, client, &r);
        kvl_line_file_close(&r.file);
        (void)fprintf(stderr, "%llu accesses, %llu lost\n", (unsigned long long)r.n_accesses,
                      (unsigned long long)r.n_lost);
    }
    kvloom_close(client);
    return result;
}

/* ---- replay ---- */

static double share(uint64_t part, uint64_t whole)
{
    return whole == 0 ? 0.0 : (double)part / (double)whole;
}

static void print_replay(kvl_policy_kind kind, const kvl_replay *replay)
{
    (void)printf("%-8s %10llu gets  %6.2f %% hit  %6.2f %% of bytes  %10llu evicted\n",
                 kvl_policy_name(kind), (unsigned long long)replay->n_gets,
                 100.0 * share(replay->n_hits, replay->n_gets),
                 100.0 * share(replay->bytes_hit, replay->bytes_asked),
                 (unsigned long long)replay->n_evicted);
}

static json_t *json_of(const kvl_replay *replay)
{
    return json_pack("{s:I, s:f, s:f, s:I}", "gets", (json_int_t)replay->n_gets, "hit_rate",
                     share(replay->n_hits, replay->n_gets), "byte_hit_rate",
                     share(replay->bytes_hit, replay->bytes_asked), "evicted",
                     (json_int_t)replay->n_evicted);
}

static void print_all(const arguments *wanted, const kvl_replay *replays, uint32_t first,
                      uint32_t past, kvl_policy_kind best)
{
    json_t *root = wanted->json ? json_object() : NULL;
    for (uint32_t k = first; k < past; k++) {
        if (root == NULL) {
            print_replay((kvl_policy_kind)k, &replays[k]);
        } else {
            (void)json_object_set_new(root, kvl_policy_name((kvl_policy_kind)k),
                                      json_of(&replays[k]));
        }
    }
    if (root == NULL) {
        if (past - first > 1) (void)printf("best: %s\n", kvl_policy_name(best));
        return;
    }
    (void)json_object_set_new(root, "best", json_string(kvl_policy_name(best)));
    (void)json_dumpf(root, stdout, JSON_COMPACT);
    (void)printf("\n");
    json_decref(root);
}

static int replay(const arguments *wanted)
{
    kvl_trace trace;
    kvl_error error;
    kvl_replay replays[KVL_POLICIES];
    kvl_policy_kind best = KVL_POLICY_SLRU;
    const bool is_auto = strcmp(wanted->policy, "auto") == 0;
    if (!is_auto && !kvl_policy_from_name(wanted->policy, &best)) {
        (void)fprintf(stderr,
                      "kvloom trace: --policy is '%.40s'; it must be auto, slru, lru or "
                      "s3fifo\n",
                      wanted->policy);
        return KVL_EXIT_USAGE;
    }
    if (kvl_trace_read(wanted->path, wanted->tenant, &trace, &error) < 0)
        return kvl_cli_fail(&error);
    const kvl_status status =
        is_auto ? kvl_trace_choose(&trace, wanted->memory, replays, &best, &error)
                : kvl_trace_replay(&trace, best, wanted->memory, &replays[best], &error);
    kvl_trace_deinit(&trace);
    if (status < 0) return kvl_cli_fail(&error);
    print_all(wanted, replays, is_auto ? 0 : best, is_auto ? KVL_POLICIES : best + 1u, best);
    return KVL_EXIT_OK;
}

int kvl_command_trace(int argc, char **argv)
{
    static const struct argp argp = {
        options,
        parse,
        "record FILE\nreplay FILE",
        "Record what is asked of a sidecar, and see what each policy would have made of it.\v"
        "A sidecar with --policy auto --trace FILE chooses by the same replay when it starts.",
        NULL,
        NULL,
        NULL};
    arguments wanted = {
        .bytes_max = (uint64_t)64 << 20, .memory = (uint64_t)1 << 30, .policy = "auto"};
    if (argp_parse(&argp, argc, argv, 0, NULL, &wanted) != 0) return KVL_EXIT_USAGE;
    if (strcmp(wanted.what, "record") == 0) return record(&wanted);
    if (strcmp(wanted.what, "replay") == 0) return replay(&wanted);
    (void)fprintf(stderr, "kvloom trace: '%.40s' is neither record nor replay\n", wanted.what);
    return KVL_EXIT_USAGE;
}
