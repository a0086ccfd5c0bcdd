/* kvloom.h: exchange KV cache segments with any process on this machine, and through its sidecar
 * with other machines.
 *
 * A segment is the KV of a run of tokens, layer by layer, keys before rotation. It is named by the
 * model, the tokens and what stood before them (the home); the sidecar computes the name, so nobody
 * can put one text's KV under another text's name without knowing it. `kvloom sidecar` keeps
 * segments in memory and on disk and fetches them from peers; a get on the same machine maps the
 * sidecar's own memory, read-only, and copies nothing.
 *
 *     kvloom_options options = {.fingerprint = kvloom_fingerprint("my-model", 8), .shape = shape};
 *     kvloom_client *client;  kvloom_segment *segment;  kvloom_error error;
 *     kvloom_key key = {.tokens = tokens, .n_tokens = n};
 *     if (kvloom_connect(&options, &client, &error) < 0) ...error.text says why...
 *     if (kvloom_put(client, &key, layers, 0, &error) < 0) ...
 *     if (kvloom_get(client, &key, 1000, &segment, &error) == KVLOOM_OK)
 *         ...kvloom_segment_layer(segment, l, &n_bytes)...
 *     kvloom_segment_release(segment);
 *     kvloom_close(client);
 *
 * Errors   Every call that can fail gives a status: 0 done, below 0 not. KVLOOM_IS_MISS: nothing
 *          usable there, compute it; KVLOOM_IS_RETRY: not now. `error` may be NULL.
 * Time     Every call ends: by its deadline, or after KVLOOM_CALL_MS_MAX where it has none. A
 *          sidecar that restarted is dialled again by the next call; what it had leased is gone,
 *          what was mapped stays readable.
 * Threads  A client is used by one thread at a time; different clients are independent. Segments
 *          may be read by any thread and outlive their client.
 * ABI      Structs that the caller fills begin zeroed (= {0}); zero always means the default, and
 *          new members come at the end, in place of reserved ones. */
#ifndef KVL_KVLOOM_H
#define KVL_KVLOOM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVLOOM_VERSION_MAJOR 0
#define KVLOOM_VERSION_MINOR 1
#define KVLOOM_DIGEST_BYTES 32
#define KVLOOM_CALL_MS_MAX 30000
#define KVLOOM_KEYS_MAX 256
#define KVLOOM_TENANT_BYTES 32 /* of a name, with the zero behind it */

/* Numbers are those of the wire; they never change. */
typedef int kvloom_status;
enum {
    KVLOOM_OK = 0,
    KVLOOM_IN_PROGRESS = 1,
    KVLOOM_ERR_INVALID = -1,
    KVLOOM_ERR_OUT_OF_RANGE = -2,
    KVLOOM_ERR_TOO_LARGE = -3,
    KVLOOM_ERR_UNSUPPORTED = -4,
    KVLOOM_ERR_DENIED = -5,
    KVLOOM_ERR_MALFORMED = -6,
    KVLOOM_ERR_FORBIDDEN = -8,
    KVLOOM_ERR_NOT_FOUND = -20,
    KVLOOM_ERR_DAMAGED = -21,
    KVLOOM_ERR_FOREIGN = -22,
    KVLOOM_ERR_EXPIRED = -23,
    KVLOOM_ERR_BUSY = -40,
    KVLOOM_ERR_TIMEOUT = -41,
    KVLOOM_ERR_UNREACHABLE = -42,
    KVLOOM_ERR_CANCELLED = -43,
    KVLOOM_ERR_NO_MEMORY = -60,
    KVLOOM_ERR_IO = -61
};
#define KVLOOM_IS_MISS(status) ((status) <= -20 && (status) > -40)
#define KVLOOM_IS_RETRY(status) ((status) <= -40 && (status) > -60)

typedef struct kvloom_error {
    kvloom_status status;
    char text[512]; /* for a person: which value, which limit, what to do */
} kvloom_error;

typedef struct kvloom_digest {
    uint8_t bytes[KVLOOM_DIGEST_BYTES];
} kvloom_digest;

typedef enum kvloom_dtype {
    KVLOOM_F32 = 1,
    KVLOOM_F16 = 2,
    KVLOOM_BF16 = 3,
    KVLOOM_INT8 =
        4 /* float16 scales of keys, then of values, [n_kv_heads][n_tokens], behind them */
} kvloom_dtype;

/* One layer of a segment is keys [n_kv_heads][n_tokens][head_dim], then values the same. */
typedef struct kvloom_shape {
    kvloom_dtype dtype;
    uint32_t n_layers, n_kv_heads, head_dim;
    uint32_t
        /* the model rotates x[i] with x[i + head_dim / 2] (1) or with x[i + 1] (0) */
        rotated_halves;
} kvloom_shape;

/* Names a model: weights, architecture, rotation. Two processes exchange KV only if theirs are
 * equal: hash whatever must agree, for example the digest of the weights' file and the engine's
 * name. */
kvloom_digest kvloom_fingerprint(const void *description, size_t n_bytes);

typedef struct kvloom_options {
    const char *socket; /* of the sidecar; NULL: $KVLOOM_SOCKET, or /run/kvloom/sidecar.sock */
    const char *name;   /* of this client, for logs; NULL: its process id */
    const char *salt;   /* narrows what is shared further than the tenant; NULL: no narrower */
    kvloom_digest fingerprint;
    kvloom_shape shape; /* of what is put; zeroed: this client only reads */
    uint64_t reserved[8];
} kvloom_options;

/* What names a segment. */
typedef struct kvloom_key {
    const uint32_t *tokens; /* [n_tokens] ids, 1 .. 131072 */
    size_t n_tokens;
    const uint32_t *home; /* [n_home] ids that stood before them; NULL: nothing did */
    size_t n_home;
    uint64_t reserved[2];
} kvloom_key;

typedef struct kvloom_client kvloom_client;

/* Owns     *client: ended with kvloom_close
 * Errors   KVLOOM_ERR_UNREACHABLE (no sidecar there), KVLOOM_ERR_FOREIGN (it serves another model:
 *          text names both), KVLOOM_ERR_UNSUPPORTED (its version), KVLOOM_ERR_INVALID, ... */
kvloom_status kvloom_connect(const kvloom_options *options, kvloom_client **client,
                             kvloom_error *error);
/* Ends leases and asynchronous gets; segments stay. NULL does nothing. */
void kvloom_close(kvloom_client *client);

/* ---- putting ---- */

enum {
    KVLOOM_CANONICAL_HOME = 1, /* the home is fixed, public text: other workflows may use this */
    KVLOOM_WRITE_BACK = 2      /* answer when it is in memory; the disk follows */
};

/* Bytes of one layer of n_tokens; 0 where the shape has none. */
size_t kvloom_layer_bytes(const kvloom_shape *shape, size_t n_tokens);

/* Keeps a segment. When this returns KVLOOM_OK, it can be got, and, without KVLOOM_WRITE_BACK, is
 * on disk if the sidecar has one. What is there already is left as it is: that is no error.
 * layers   [n_layers], kvloom_layer_bytes each; read during the call
 * Errors   KVLOOM_ERR_TOO_LARGE (above the tenant's share), KVLOOM_ERR_BUSY, ... */
kvloom_status kvloom_put(kvloom_client *client, const kvloom_key *key, const void *const *layers,
                         unsigned flags, kvloom_error *error);

/* The same without a copy on this side: the engine writes where the sidecar will read. One at a
 * time for each client.
 * Errors   KVLOOM_ERR_BUSY (another one is open) */
kvloom_status kvloom_put_begin(kvloom_client *client, const kvloom_key *key, kvloom_error *error);
/* Where layer `layer` is to be written, 64-byte aligned, kvloom_layer_bytes; what stands there is
 * undefined. NULL: no put is open, or there is no such layer. */
void *kvloom_put_layer(kvloom_client *client, uint32_t layer);
kvloom_status kvloom_put_end(kvloom_client *client, unsigned flags, kvloom_error *error);
void kvloom_put_cancel(kvloom_client *client);

/* ---- getting ---- */

typedef struct kvloom_segment kvloom_segment; /* read-only */

typedef enum kvloom_place {
    KVLOOM_NOWHERE = 0,
    KVLOOM_IN_MEMORY = 1,
    KVLOOM_ON_DISK = 2,
    KVLOOM_AT_PEER = 3
} kvloom_place;

/* Gives a segment from memory, disk or a peer, whichever has it first.
 * deadline_ms  how long it may take; 0: only if it is in memory now
 * Owns         *segment: ended with kvloom_segment_release
 * Errors       KVLOOM_ERR_NOT_FOUND, KVLOOM_ERR_TIMEOUT, KVLOOM_ERR_UNREACHABLE, ... */
kvloom_status kvloom_get(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                         kvloom_segment **segment, kvloom_error *error);
/* The same, copied: layers one after another without gaps, kvloom_layer_bytes each.
 * n_bytes  room in `buffer`; *n_needed gets what it takes, also when it is too little */
kvloom_status kvloom_get_into(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                              void *buffer, size_t n_bytes, size_t *n_needed, kvloom_error *error);
/* Ends the lease and the map. From any thread but those that use its client now. NULL does
 * nothing. */
void kvloom_segment_release(kvloom_segment *segment);

/* Borrowed until the segment is released; 64-byte aligned. NULL: no such layer, or not there
 * yet. */
const void *kvloom_segment_layer(const kvloom_segment *segment, uint32_t layer, size_t *n_bytes);
const kvloom_shape *kvloom_segment_shape(const kvloom_segment *segment);
const uint32_t *kvloom_segment_tokens(const kvloom_segment *segment, size_t *n_tokens);
const kvloom_digest *kvloom_segment_id(const kvloom_segment *segment);
kvloom_place kvloom_segment_place(const kvloom_segment *segment);
/* The whole segment as a .kvseg file has it (docs/segment-format.md), borrowed until it is
 * released. NULL: layers are missing yet. */
const void *kvloom_segment_bytes(const kvloom_segment *segment, size_t *n_bytes);
/* Compares a layer with its checksum. The sidecar has done this when the segment came to it; this
 * is for those who want to know that nothing has happened to the memory since.
 * Errors   KVLOOM_ERR_DAMAGED */
kvloom_status kvloom_segment_check(const kvloom_segment *segment, uint32_t layer,
                                   kvloom_error *error);

/* ---- getting layer by layer, without waiting ---- */

typedef struct kvloom_transfer kvloom_transfer;

/* Readable while kvloom_dispatch has something to do. Borrowed until the client is closed; changes
 * never. For poll, epoll, or an event loop of any kind. */
int kvloom_fd(const kvloom_client *client);
/* Takes note of what has arrived, without waiting. Errors: KVLOOM_ERR_UNREACHABLE (all transfers
 * have ended with it). */
kvloom_status kvloom_dispatch(kvloom_client *client, kvloom_error *error);

/* Starts a get. Owns *transfer: ended with kvloom_transfer_end. */
kvloom_status kvloom_get_start(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                               kvloom_transfer **transfer, kvloom_error *error);
/* KVLOOM_IN_PROGRESS, KVLOOM_OK (all layers are there) or why it failed. *n_layers_ready of the
 * layers can be read already; both may be NULL. */
kvloom_status kvloom_transfer_status(const kvloom_transfer *transfer, uint32_t *n_layers_ready,
                                     kvloom_error *error);
/* The segment as far as it is there; NULL before its first layer. Borrowed until
 * kvloom_transfer_end, unless it is taken by kvloom_transfer_take. */
const kvloom_segment *kvloom_transfer_segment(const kvloom_transfer *transfer);
/* Gives the finished segment to the caller; NULL where it is not finished. */
kvloom_segment *kvloom_transfer_take(kvloom_transfer *transfer);
/* At any time; NULL does nothing. */
void kvloom_transfer_end(kvloom_transfer *transfer);

/* ---- knowing and asking ahead ---- */

/* places [n_keys]: where each is, as far as the sidecar knows without asking anybody. n_keys: at
 * most KVLOOM_KEYS_MAX. */
kvloom_status kvloom_locate(kvloom_client *client, const kvloom_key *keys, size_t n_keys,
                            kvloom_place *places, kvloom_error *error);
/* Asks the sidecar to have them in memory soon, and returns at once; what has not come when the
 * deadline is over is given up. */
kvloom_status kvloom_prefetch(kvloom_client *client, const kvloom_key *keys, size_t n_keys,
                              uint32_t deadline_ms, kvloom_error *error);
/* Brings a segment into memory and keeps it there until it is released, the lease ends, or this
 * client is gone. lease_ms 0: as long as the sidecar allows. */
kvloom_status kvloom_pin(kvloom_client *client, const kvloom_key *key, uint32_t deadline_ms,
                         uint32_t lease_ms, uint64_t *lease, kvloom_error *error);
kvloom_status kvloom_unpin(kvloom_client *client, uint64_t lease, kvloom_error *error);
/* Forgets a segment in memory and on disk. Errors   KVLOOM_ERR_NOT_FOUND */
kvloom_status kvloom_remove(kvloom_client *client, const kvloom_key *key, kvloom_error *error);

/* By id instead of by key, for tools: ids come from kvloom_list and kvloom_segment_id. */
kvloom_status kvloom_get_id(kvloom_client *client, const kvloom_digest *id, uint32_t deadline_ms,
                            kvloom_segment **segment, kvloom_error *error);
kvloom_status kvloom_pin_id(kvloom_client *client, const kvloom_digest *id, uint32_t deadline_ms,
                            uint32_t lease_ms, uint64_t *lease, kvloom_error *error);
kvloom_status kvloom_remove_id(kvloom_client *client, const kvloom_digest *id, kvloom_error *error);

typedef struct kvloom_entry {
    kvloom_digest id;
    uint32_t kind; /* 1 segment, 2 anchor */
    uint64_t n_bytes;
} kvloom_entry;

/* Lists what the tenant has, in the order of ids, from behind `after` (NULL: from the start).
 * entries [n_max]; *n_entries below n_max: that was all. n_max: at most 4096. */
kvloom_status kvloom_list(kvloom_client *client, const kvloom_digest *after, kvloom_entry *entries,
                          size_t n_max, size_t *n_entries, kvloom_error *error);

/* ---- anchors ---- */

/* A measured example of what a context did to the KV of one slot of a template (KVCOMM,
 * arXiv:2510.12872): an engine that has measured one puts it, another one that fills the same slot
 * lists what there is and gets what it needs. What a layer's bytes mean is between engines of one
 * fingerprint. */
typedef struct kvloom_anchor_key {
    const char *template_name; /* of workflow and template, 1 .. 256 bytes */
    uint32_t slot;             /* 0 .. 1023, in the order of the template */
    const uint32_t *tokens;    /* [n_tokens] of the text that it was measured with */
    size_t n_tokens;
    uint64_t reserved[2];
} kvloom_anchor_key;

/* Keeps one, as kvloom_put does; one text in one slot has one anchor, and what is there is left as
 * it is. The client's options must have a shape: its n_layers is that of `layers`.
 * layers  [n_layers], n_layer_bytes each: 1 or more; read during the call
 * extra   n_extra bytes that go with it, at most 4,096; may be NULL
 * id      may be NULL
 * Errors  KVLOOM_ERR_TOO_LARGE, KVLOOM_ERR_OUT_OF_RANGE, KVLOOM_ERR_BUSY (a put is open), ... */
kvloom_status kvloom_put_anchor(kvloom_client *client, const kvloom_anchor_key *key,
                                const void *const *layers, size_t n_layer_bytes, const void *extra,
                                size_t n_extra, unsigned flags, kvloom_digest *id,
                                kvloom_error *error);
/* Ids of the anchors of a slot in memory and on disk, at most 256, for kvloom_get_id. The segment
 * that this gives has the tokens, the layers and the extra of the anchor.
 * ids  [n_max] */
kvloom_status kvloom_list_anchors(kvloom_client *client, const char *template_name, uint32_t slot,
                                  kvloom_digest *ids, size_t n_max, size_t *n_ids,
                                  kvloom_error *error);
/* What goes with an anchor, borrowed until it is released; NULL where there is nothing. */
const void *kvloom_segment_extra(const kvloom_segment *segment, size_t *n_bytes);

typedef struct kvloom_stats {
    uint64_t memory_bytes, memory_bytes_max, disk_bytes, disk_bytes_max;
    uint64_t n_containers;
    uint64_t hits_memory, hits_disk, hits_peer, misses, puts;
    uint64_t refused, damaged, evictions;
    uint64_t leases, leases_expired, clients;
    uint64_t reserved[16];
} kvloom_stats;

/* Of this tenant, since the sidecar started. */
kvloom_status kvloom_get_stats(kvloom_client *client, kvloom_stats *stats, kvloom_error *error);

/* ---- answers of a host ---- */

/* A host that `kvloom serve --http` runs. Texts are borrowed for the call. */
typedef struct kvloom_host {
    const char *address; /* "127.0.0.1:8080", "[::1]:8080" or "unix:/PATH", without TLS; NULL:
                            $KVLOOM_HOST, or 127.0.0.1:8080 */
    const char *api_key; /* NULL: none */
    uint64_t reserved[4];
} kvloom_host;

typedef struct kvloom_message {
    const char *role; /* "system", "user", "assistant" */
    const char *text; /* UTF-8 */
} kvloom_message;

typedef struct kvloom_question {
    const kvloom_message *messages; /* [n_messages], 1 .. 1024 */
    size_t n_messages;
    uint32_t max_tokens;    /* 0: what the context leaves */
    int has_temperature;    /* 0: the host's default */
    double temperature;     /* 0: the likeliest token */
    uint64_t seed;          /* 0: by chance */
    const char *cache_salt; /* narrows what is shared further than the tenant; NULL: no narrower */
    uint64_t reserved[4];
} kvloom_question;

typedef struct kvloom_answer kvloom_answer;

/* Asks, and returns when the host has the question; the answer is read as it comes. Independent of
 * any kvloom_client.
 * deadline_ms  for the whole answer; 0: none
 * Owns         *answer: ended with kvloom_answer_end
 * Errors       KVLOOM_ERR_UNREACHABLE (nobody listens there), KVLOOM_ERR_INVALID (the question),
 *              KVLOOM_ERR_TIMEOUT, KVLOOM_ERR_NO_MEMORY; what the host says comes later */
kvloom_status kvloom_stream(const kvloom_host *host, const kvloom_question *question,
                            uint32_t deadline_ms, kvloom_answer **answer, kvloom_error *error);
/* The same, and waits until the answer is whole. */
kvloom_status kvloom_generate(const kvloom_host *host, const kvloom_question *question,
                              uint32_t deadline_ms, kvloom_answer **answer, kvloom_error *error);
/* Readable while kvloom_answer_read has something to do. Borrowed until the answer is ended. */
int kvloom_answer_fd(const kvloom_answer *answer);
/* Takes what has arrived, without waiting.
 * Returns  KVLOOM_IN_PROGRESS, KVLOOM_OK (it is whole), or why it failed, then and ever after
 * Errors   KVLOOM_ERR_INVALID, KVLOOM_ERR_DENIED (key), KVLOOM_ERR_BUSY, KVLOOM_ERR_TOO_LARGE: as
 *          the host says; KVLOOM_ERR_UNREACHABLE (it ended), KVLOOM_ERR_TIMEOUT,
 *          KVLOOM_ERR_MALFORMED (it is no host, or sent more than an answer may be) */
kvloom_status kvloom_answer_read(kvloom_answer *answer, kvloom_error *error);
/* The text so far, UTF-8, with a zero byte behind it; borrowed until the next read. It only grows:
 * what is new stands behind what has been seen. */
const char *kvloom_answer_text(const kvloom_answer *answer, size_t *n_bytes);

typedef struct kvloom_usage {
    uint64_t prompt_tokens, cached_tokens, answer_tokens;
    int hit_max_tokens; /* the answer was cut */
    uint64_t reserved[4];
} kvloom_usage;

/* Errors   KVLOOM_ERR_NOT_FOUND (the answer is not whole yet) */
kvloom_status kvloom_answer_usage(const kvloom_answer *answer, kvloom_usage *usage);
/* At any time: a host stops computing for who has gone. NULL does nothing. */
void kvloom_answer_end(kvloom_answer *answer);

enum { KVLOOM_ACCESS_HIT = 1, KVLOOM_ACCESS_MISS = 2, KVLOOM_ACCESS_PUT = 3 };

typedef struct kvloom_access {
    uint64_t time_us; /* on the sidecar's clock, which does not go back */
    kvloom_digest id;
    uint64_t n_bytes; /* 0: not known */
    uint32_t what;    /* hit: it was in memory */
} kvloom_access;

/* What the tenant's clients have asked for of late, the oldest first; for traces. A sidecar keeps
 * the latest 16,384 from the first call on until a minute after the last.
 * after     number of the last access that is known, 0: from now on; set to the one given last
 * accesses  [n_max], n_max: at least 1,024
 * *n_lost   accesses behind `after` that were asked for too late; may be NULL
 * tenant    [KVLOOM_TENANT_BYTES], whose they are; may be NULL */
kvloom_status kvloom_accesses(kvloom_client *client, uint64_t *after, kvloom_access *accesses,
                              size_t n_max, size_t *n_accesses, uint64_t *n_lost, char *tenant,
                              kvloom_error *error);

/* "0.1.0"; static text. */
const char *kvloom_version(void);
/* One sentence for a person. Static text. */
const char *kvloom_status_text(kvloom_status status);

#ifdef __cplusplus
}
#endif

#endif /* KVL_KVLOOM_H */
