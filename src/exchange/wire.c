/* exchange/wire.c: protobuf-c on one side, kvl_message on the other, a check on every field.
 *
 * Unpacking allocates from the decoder's arena only, so a hostile control part can use up the
 * arena and nothing else. Unknown fields are skipped: a later version may add some. */
#include "exchange/wire.h"

#include "kvloom.pb-c.h"

#include <string.h>

typedef Kvloom__V1__Envelope envelope;

static const char *const kind_names[] = {
    [KVL_MESSAGE_HELLO] = "HELLO",
    [KVL_MESSAGE_WELCOME] = "WELCOME",
    [KVL_MESSAGE_PING] = "PING",
    [KVL_MESSAGE_PONG] = "PONG",
    [KVL_MESSAGE_GOODBYE] = "GOODBYE",
    [KVL_MESSAGE_LOCATE] = "LOCATE",
    [KVL_MESSAGE_LOCATED] = "LOCATED",
    [KVL_MESSAGE_ANNOUNCE] = "ANNOUNCE",
    [KVL_MESSAGE_FETCH] = "FETCH",
    [KVL_MESSAGE_FETCH_HEADER] = "FETCH_HEADER",
    [KVL_MESSAGE_BLOCK] = "BLOCK",
    [KVL_MESSAGE_CREDIT] = "CREDIT",
    [KVL_MESSAGE_FETCH_DONE] = "FETCH_DONE",
    [KVL_MESSAGE_CANCEL] = "CANCEL",
    [KVL_MESSAGE_LIST] = "LIST",
    [KVL_MESSAGE_LISTED] = "LISTED",
    [KVL_MESSAGE_TASK] = "TASK",
    [KVL_MESSAGE_TASK_POLL] = "TASK_POLL",
    [KVL_MESSAGE_TASK_REPLY] = "TASK_REPLY",
    [KVL_MESSAGE_TASK_DONE] = "TASK_DONE",
    [KVL_MESSAGE_ERROR] = "ERROR",
};

const char *kvl_message_kind_name(kvl_message_kind kind)
{
    const size_t index = (size_t)kind;
    if (index >= sizeof kind_names / sizeof *kind_names || kind_names[index] == NULL) return "?";
    return kind_names[index];
}

bool kvl_name_is_valid(const char *name)
{
    size_t n = 0;
    for (; name[n] != '\0'; n++) {
        const char c = name[n];
        const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        const bool other = (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-';
        if (n == KVL_NAME_BYTES_MAX || !(letter || other)) return false;
    }
    return n > 0;
}

/* ---- encoding ---- */

static ProtobufCBinaryData binary_of(const kvl_digest *digest)
{
    /* protobuf-c has no read-only bytes; packing does not write to them. */
    return (ProtobufCBinaryData){.len = KVL_DIGEST_BYTES, .data = (uint8_t *)(uintptr_t)digest};
}

static char *text_of(const char *text)
{
    return (char *)(uintptr_t)text;
}

/* Room for the parts of an envelope that protobuf-c wants pointers to. */
typedef struct parts {
    char *features[KVL_FEATURES_MAX];
    Kvloom__V1__BulkOffer bulk;
    ProtobufCBinaryData ids[KVL_LOCATE_IDS_MAX];
    union {
        Kvloom__V1__Empty empty;
        Kvloom__V1__Hello hello;
        Kvloom__V1__Locate locate;
        Kvloom__V1__Located located;
        Kvloom__V1__Announce announce;
        Kvloom__V1__Fetch fetch;
        Kvloom__V1__FetchHeader fetch_header;
        Kvloom__V1__Block block;
        Kvloom__V1__Credit credit;
        Kvloom__V1__List list;
        Kvloom__V1__Listed listed;
        Kvloom__V1__Task task;
        Kvloom__V1__TaskReply reply;
        Kvloom__V1__Error error;
    };
} parts;

/* An asker has no token to tell: zeros stand for none. */
static void set_bulk(const kvl_bulk_offer *from, parts *to)
{
    static const uint8_t none[KVL_BULK_TOKEN_BYTES];
    kvloom__v1__bulk_offer__init(&to->bulk);
    to->bulk.port = from->port;
    to->bulk.has_aes = from->has_aes;
    if (memcmp(from->token, none, sizeof none) != 0) {
        to->bulk.token.len = sizeof from->token;
        to->bulk.token.data = (uint8_t *)(uintptr_t)from->token;
    }
    to->bulk.share.len = sizeof from->share;
    to->bulk.share.data = (uint8_t *)(uintptr_t)from->share;
    to->hello.bulk = &to->bulk;
}

static void set_hello(const kvl_message_hello *from, parts *to)
{
    KVL_ASSERT(from->n_features <= KVL_FEATURES_MAX);
    kvloom__v1__hello__init(&to->hello);
    to->hello.magic = from->magic;
    to->hello.version_min = from->version_min;
    to->hello.version_max = from->version_max;
    to->hello.name = text_of(from->name);
    to->hello.fingerprint = binary_of(&from->fingerprint);
    to->hello.frame_bytes_max = from->frame_bytes_max;
    to->hello.window_bytes_max = from->window_bytes_max;
    to->hello.task_bytes_max = from->task_bytes_max;
    for (uint32_t i = 0; i < from->n_features; i++) to->features[i] = text_of(from->features[i]);
    to->hello.n_features = from->n_features;
    to->hello.features = to->features;
    if (from->bulk.port != 0) set_bulk(&from->bulk, to);
}

static void set_locate(const kvl_message *from, parts *to)
{
    KVL_ASSERT(from->locate.n_ids >= 1 && from->locate.n_ids <= KVL_LOCATE_IDS_MAX);
    kvloom__v1__locate__init(&to->locate);
    for (uint32_t i = 0; i < from->locate.n_ids; i++) to->ids[i] = binary_of(&from->locate.ids[i]);
    to->locate.n_ids = from->locate.n_ids;
    to->locate.ids = to->ids;
}

static void set_fetch(const kvl_message *from, parts *to)
{
    kvloom__v1__fetch__init(&to->fetch);
    to->fetch.id = binary_of(&from->fetch.id);
    to->fetch.block_first = from->fetch.block_first;
    to->fetch.block_past = from->fetch.block_past;
    to->fetch.header_checksum = from->fetch.header_checksum;
    to->fetch.credit_bytes = from->fetch.credit_bytes;
}

static void set_fetch_header(const kvl_message *from, parts *to)
{
    kvloom__v1__fetch_header__init(&to->fetch_header);
    to->fetch_header.id = binary_of(&from->fetch_header.id);
    to->fetch_header.n_blocks = from->fetch_header.n_blocks;
    to->fetch_header.block_first = from->fetch_header.block_first;
    to->fetch_header.header_checksum = from->fetch_header.header_checksum;
    to->fetch_header.header_bytes = from->fetch_header.header_bytes;
}

static void set_block(const kvl_message *from, parts *to)
{
    kvloom__v1__block__init(&to->block);
    to->block.id = binary_of(&from->block.id);
    to->block.block = from->block.block;
    to->block.offset = from->block.offset;
    to->block.total = from->block.total;
}

static void set_reply(const kvl_message *from, parts *to)
{
    kvloom__v1__task_reply__init(&to->reply);
    to->reply.status = (int32_t)from->reply.status;
    to->reply.text = text_of(from->reply.text);
    to->reply.body_bytes = from->reply.body_bytes;
}

static void set_error(const kvl_message *from, parts *to)
{
    kvloom__v1__error__init(&to->error);
    to->error.status = (int32_t)from->reply.status;
    to->error.text = text_of(from->reply.text);
}

/* Sets the member of the union and its case; INIT fills the part. */
#define BODY(KIND, member, INIT)                                                                   \
    case KVL_MESSAGE_##KIND:                                                                       \
        INIT;                                                                                      \
        to->body_case = KVLOOM__V1__ENVELOPE__BODY_##KIND;                                         \
        to->member = (void *)&room->empty;                                                         \
        break

/* All members of the union in `parts` begin with protobuf-c's own base, so one pointer does for
 * every kind; the case says which it is. */
static void set_body(const kvl_message *from, envelope *to, parts *room)
{
    switch (from->kind) {
        BODY(HELLO, hello, set_hello(&from->hello, room));
        BODY(WELCOME, welcome, set_hello(&from->hello, room));
        BODY(PING, ping, kvloom__v1__empty__init(&room->empty));
        BODY(PONG, pong, kvloom__v1__empty__init(&room->empty));
        BODY(GOODBYE, goodbye, kvloom__v1__empty__init(&room->empty));
        BODY(LOCATE, locate, set_locate(from, room));
        BODY(LOCATED, located, kvloom__v1__located__init(&room->located);
             room->located.n_ids = from->located.n_ids; room->located.held = from->located.held);
        BODY(ANNOUNCE, announce, kvloom__v1__announce__init(&room->announce);
             room->announce.id = binary_of(&from->announce.id);
             room->announce.kind = (uint32_t)from->announce.kind);
        BODY(FETCH, fetch, set_fetch(from, room));
        BODY(FETCH_HEADER, fetch_header, set_fetch_header(from, room));
        BODY(BLOCK, block, set_block(from, room));
        BODY(CREDIT, credit, kvloom__v1__credit__init(&room->credit);
             room->credit.granted_bytes = from->credit.granted_bytes);
        BODY(FETCH_DONE, fetch_done, kvloom__v1__empty__init(&room->empty));
        BODY(CANCEL, cancel, kvloom__v1__empty__init(&room->empty));
        BODY(LIST, list, kvloom__v1__list__init(&room->list);
             room->list.kind = (uint32_t)from->list.kind);
        BODY(LISTED, listed, kvloom__v1__listed__init(&room->listed);
             room->listed.n_ids = from->listed.n_ids;
             room->listed.truncated = from->listed.truncated);
        BODY(TASK, task, kvloom__v1__task__init(&room->task);
             room->task.body_bytes = from->task.body_bytes);
        BODY(TASK_POLL, task_poll, kvloom__v1__empty__init(&room->empty));
        BODY(TASK_REPLY, task_reply, set_reply(from, room));
        BODY(TASK_DONE, task_done, kvloom__v1__empty__init(&room->empty));
        BODY(ERROR, error, set_error(from, room));
    }
}
#undef BODY

size_t kvl_wire_encode(const kvl_message *message, uint8_t bytes[KVL_CONTROL_BYTES_MAX])
{
    envelope to;
    parts room;
    kvloom__v1__envelope__init(&to);
    to.epoch = message->epoch;
    to.request = message->request;
    to.body_case = KVLOOM__V1__ENVELOPE__BODY__NOT_SET;
    set_body(message, &to, &room);
    KVL_ASSERT(to.body_case != KVLOOM__V1__ENVELOPE__BODY__NOT_SET);
    KVL_ASSERT(kvloom__v1__envelope__get_packed_size(&to) <= KVL_CONTROL_BYTES_MAX);
    return kvloom__v1__envelope__pack(&to, bytes);
}

/* ---- decoding ---- */

static void *arena_alloc(void *data, size_t size)
{
    kvl_wire_decoder *decoder = data;
    if (size > KVL_WIRE_ARENA_BYTES) return NULL;
    const size_t padded = (size + 15) / 16 * 16;
    if (padded > KVL_WIRE_ARENA_BYTES - decoder->n_used) return NULL;
    void *memory = decoder->arena + decoder->n_used;
    decoder->n_used += padded;
    return memory;
}

static void arena_free(void *data, void *memory)
{
    (void)data;
    (void)memory; /* the whole arena is reset before the next message */
}

/* What a decoding step needs: where to report, how large the bulk is. */
typedef struct decoding {
    kvl_message *message;
    size_t n_frames;
    uint64_t frame_bytes;
    kvl_error *error;
} decoding;

/* One form for every refusal: whoever wrote the other side sees the field, the value that came and
 * what is allowed. */
static kvl_status refuse(const decoding *d, const char *field, uint64_t value, const char *wanted)
{
    return KVL_FAIL(d->error, KVL_ERR_MALFORMED, "%s.%s is %llu, must be %s",
                    kvl_message_kind_name(d->message->kind), field, (unsigned long long)value,
                    wanted);
}

static kvl_status take_digest(const decoding *d, const char *field, const ProtobufCBinaryData *from,
                              kvl_digest *to)
{
    if (from->len != KVL_DIGEST_BYTES) return refuse(d, field, from->len, "32 bytes long");
    memcpy(to->bytes, from->data, KVL_DIGEST_BYTES);
    return KVL_OK;
}

static kvl_status take_kind(const decoding *d, uint32_t from, kvl_container_kind *to)
{
    if (from != KVL_CONTAINER_SEGMENT && from != KVL_CONTAINER_ANCHOR) {
        return refuse(d, "kind", from, "1 (segment) or 2 (anchor)");
    }
    *to = (kvl_container_kind)from;
    return KVL_OK;
}

/* Copies a text for people. Control characters would let a peer forge lines in our log. */
static kvl_status take_text(const decoding *d, const char *from, char *to, size_t n_bytes_max)
{
    const size_t n = from == NULL ? 0 : strlen(from);
    if (n > n_bytes_max) return refuse(d, "text", n, "at most 511 bytes");
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)from[i];
        to[i] = c < 0x20 || c == 0x7f ? '?' : (char)c;
    }
    to[n] = '\0';
    return KVL_OK;
}

/* What a control part says about its bulk must be true to the byte: later code copies by these
 * numbers and does not look at the frames again. */
static kvl_status take_frames(const decoding *d, uint64_t n_bytes, size_t n_frames_max)
{
    if (d->n_frames > n_frames_max) {
        return refuse(d, "frames", d->n_frames, "within the message's number of bulk frames");
    }
    if (n_bytes != d->frame_bytes) {
        return refuse(d, "bytes in frames", d->frame_bytes, "what the control part says");
    }
    return KVL_OK;
}

static kvl_status take_bulk(const decoding *d, const Kvloom__V1__BulkOffer *from)
{
    kvl_bulk_offer *to = &d->message->hello.bulk;
    memset(to, 0, sizeof *to);
    if (from == NULL) return KVL_OK;
    if (from->port > UINT16_MAX) return refuse(d, "bulk.port", from->port, "at most 65535");
    if (from->token.len != 0 && from->token.len != sizeof to->token)
        return refuse(d, "bulk.token", from->token.len, "0 or 16 bytes long");
    if (from->share.len != sizeof to->share)
        return refuse(d, "bulk.share", from->share.len, "32 bytes long");
    to->port = (uint16_t)from->port;
    to->has_aes = from->has_aes != 0;
    if (from->token.len != 0) memcpy(to->token, from->token.data, sizeof to->token);
    memcpy(to->share, from->share.data, sizeof to->share);
    return KVL_OK;
}

/* Magic, versions and fingerprint are not judged here: the protocol answers a mismatch with a text
 * that names both sides, and that needs a Hello that could be read. */
static kvl_status take_hello(const decoding *d, const Kvloom__V1__Hello *from)
{
    kvl_message_hello *to = &d->message->hello;
    to->magic = from->magic;
    to->version_min = from->version_min;
    to->version_max = from->version_max;
    if (from->version_min == 0 || from->version_min > from->version_max) {
        return refuse(d, "version_min", from->version_min, "1 .. version_max");
    }
    if (from->name == NULL || !kvl_name_is_valid(from->name)) {
        return refuse(d, "name length", from->name == NULL ? 0 : strlen(from->name),
                      "1 .. 31 and all of A-Z a-z 0-9 . _ -");
    }
    memcpy(to->name, from->name, strlen(from->name) + 1);
    KVL_TRY(take_digest(d, "fingerprint", &from->fingerprint, &to->fingerprint));
    to->frame_bytes_max = from->frame_bytes_max;
    if (from->frame_bytes_max < KVL_FRAME_BYTES_MAX) {
        return refuse(d, "frame_bytes_max", from->frame_bytes_max, "at least 1048576");
    }
    to->window_bytes_max = from->window_bytes_max;
    if (from->window_bytes_max < KVL_CREDIT_BYTES_MIN) {
        return refuse(d, "window_bytes_max", from->window_bytes_max, "at least 1048576");
    }
    to->task_bytes_max = from->task_bytes_max;
    if (from->n_features > KVL_FEATURES_MAX) {
        return refuse(d, "features", from->n_features, "at most 8");
    }
    to->n_features = (uint32_t)from->n_features;
    for (size_t i = 0; i < from->n_features; i++) {
        const size_t n = strlen(from->features[i]);
        if (n == 0 || n > KVL_FEATURE_BYTES_MAX) {
            return refuse(d, "feature length", n, "1 .. 31 bytes");
        }
        KVL_TRY(take_text(d, from->features[i], to->features[i], KVL_FEATURE_BYTES_MAX));
    }
    KVL_TRY(take_bulk(d, from->bulk));
    return take_frames(d, 0, 0);
}

static kvl_status take_locate(const decoding *d, const Kvloom__V1__Locate *from)
{
    if (from->n_ids < 1 || from->n_ids > KVL_LOCATE_IDS_MAX) {
        return refuse(d, "n_ids", from->n_ids, "1 .. 16");
    }
    d->message->locate.n_ids = (uint32_t)from->n_ids;
    for (size_t i = 0; i < from->n_ids; i++) {
        KVL_TRY(take_digest(d, "id", &from->ids[i], &d->message->locate.ids[i]));
    }
    return take_frames(d, 0, 0);
}

static kvl_status take_located(const decoding *d, const Kvloom__V1__Located *from)
{
    if (from->n_ids < 1 || from->n_ids > KVL_LOCATE_IDS_MAX) {
        return refuse(d, "n_ids", from->n_ids, "1 .. 16");
    }
    if (from->held >> from->n_ids != 0) return refuse(d, "held", from->held, "a bit an id");
    d->message->located.n_ids = from->n_ids;
    d->message->located.held = from->held;
    return take_frames(d, 0, 0);
}

static kvl_status take_announce(const decoding *d, const Kvloom__V1__Announce *from)
{
    KVL_TRY(take_digest(d, "id", &from->id, &d->message->announce.id));
    KVL_TRY(take_kind(d, from->kind, &d->message->announce.kind));
    return take_frames(d, 0, 0);
}

/* Beginning in the middle makes sense only for somebody who has the header already. */
static kvl_status take_fetch(const decoding *d, const Kvloom__V1__Fetch *from)
{
    kvl_message *to = d->message;
    KVL_TRY(take_digest(d, "id", &from->id, &to->fetch.id));
    to->fetch.block_first = from->block_first;
    to->fetch.block_past = from->block_past;
    to->fetch.header_checksum = from->header_checksum;
    to->fetch.credit_bytes = from->credit_bytes;
    if (from->block_first != 0 && from->header_checksum == 0) {
        return refuse(d, "block_first", from->block_first, "0 without a header_checksum");
    }
    if (from->block_past != 0 && from->block_past <= from->block_first) {
        return refuse(d, "block_past", from->block_past, "0 or above block_first");
    }
    if (from->credit_bytes < KVL_CREDIT_BYTES_MIN || from->credit_bytes > KVL_CREDIT_BYTES_MAX) {
        return refuse(d, "credit_bytes", from->credit_bytes, "1048576 .. 8388608");
    }
    return take_frames(d, 0, 0);
}

static kvl_status take_fetch_header(const decoding *d, const Kvloom__V1__FetchHeader *from)
{
    kvl_message *to = d->message;
    KVL_TRY(take_digest(d, "id", &from->id, &to->fetch_header.id));
    to->fetch_header.n_blocks = from->n_blocks;
    to->fetch_header.block_first = from->block_first;
    to->fetch_header.header_checksum = from->header_checksum;
    to->fetch_header.header_bytes = from->header_bytes;
    if (from->n_blocks == 0) return refuse(d, "n_blocks", 0, "at least 1");
    if (from->block_first >= from->n_blocks) {
        return refuse(d, "block_first", from->block_first, "below n_blocks");
    }
    if (from->header_bytes != 0 && from->block_first != 0) {
        return refuse(d, "block_first", from->block_first, "0 where a header is sent");
    }
    return take_frames(d, from->header_bytes, KVL_HEADER_FRAMES_MAX);
}

static kvl_status take_block(const decoding *d, const Kvloom__V1__Block *from)
{
    kvl_message *to = d->message;
    KVL_TRY(take_digest(d, "id", &from->id, &to->block.id));
    to->block.block = from->block;
    to->block.offset = from->offset;
    to->block.total = from->total;
    to->block.has_checksum = false; /* nobody else says what has landed here */
    if (d->n_frames != 1 || d->frame_bytes == 0) {
        return refuse(d, "frames", d->n_frames, "exactly 1, not empty");
    }
    /* Subtracted, because offset + bytes can wrap. */
    if (d->frame_bytes > from->total || from->offset > from->total - d->frame_bytes) {
        return refuse(d, "offset", from->offset, "inside the block with the whole frame");
    }
    return KVL_OK;
}

static kvl_status take_list(const decoding *d, const Kvloom__V1__List *from)
{
    KVL_TRY(take_kind(d, from->kind, &d->message->list.kind));
    if (d->n_frames > 1 || d->frame_bytes > KVL_LIST_PREFIX_BYTES_MAX) {
        return refuse(d, "prefix bytes", d->frame_bytes, "at most 1024, in one frame");
    }
    return KVL_OK;
}

static kvl_status take_listed(const decoding *d, const Kvloom__V1__Listed *from)
{
    if (from->n_ids > KVL_LIST_IDS_MAX) return refuse(d, "n_ids", from->n_ids, "at most 16384");
    d->message->listed.n_ids = from->n_ids;
    d->message->listed.truncated = from->truncated != 0;
    return take_frames(d, (uint64_t)from->n_ids * KVL_DIGEST_BYTES, 1);
}

static kvl_status take_task(const decoding *d, const Kvloom__V1__Task *from)
{
    d->message->task.body_bytes = from->body_bytes;
    return take_frames(d, from->body_bytes, KVL_FRAMES_MAX);
}

/* A status above IN_PROGRESS is none, and only a success carries a body. */
static kvl_status take_reply(const decoding *d, const Kvloom__V1__TaskReply *from)
{
    kvl_message *to = d->message;
    to->reply.status = (kvl_status)from->status;
    to->reply.body_bytes = from->body_bytes;
    if (from->status > KVL_IN_PROGRESS) {
        return refuse(d, "status", (uint64_t)from->status, "1, 0 or below 0");
    }
    KVL_TRY(take_text(d, from->text, to->reply.text, KVL_WIRE_TEXT_BYTES_MAX));
    if (from->status != KVL_OK && from->body_bytes != 0) {
        return refuse(d, "body_bytes", from->body_bytes, "0 unless the status is 0");
    }
    return take_frames(d, from->body_bytes, KVL_FRAMES_MAX);
}

static kvl_status take_error(const decoding *d, const Kvloom__V1__Error *from)
{
    kvl_message *to = d->message;
    to->reply.status = (kvl_status)from->status;
    to->reply.body_bytes = 0;
    if (from->status >= 0) return refuse(d, "status", (uint64_t)from->status, "below 0");
    KVL_TRY(take_text(d, from->text, to->reply.text, KVL_WIRE_TEXT_BYTES_MAX));
    return take_frames(d, 0, 0);
}

#define BODY(KIND, TAKE)                                                                           \
    case KVLOOM__V1__ENVELOPE__BODY_##KIND: d->message->kind = KVL_MESSAGE_##KIND; return TAKE

static kvl_status take_body(const decoding *d, const envelope *from)
{
    switch (from->body_case) {
        BODY(HELLO, take_hello(d, from->hello));
        BODY(WELCOME, take_hello(d, from->welcome));
        BODY(PING, take_frames(d, 0, 0));
        BODY(PONG, take_frames(d, 0, 0));
        BODY(GOODBYE, take_frames(d, 0, 0));
        BODY(LOCATE, take_locate(d, from->locate));
        BODY(LOCATED, take_located(d, from->located));
        BODY(ANNOUNCE, take_announce(d, from->announce));
        BODY(FETCH, take_fetch(d, from->fetch));
        BODY(FETCH_HEADER, take_fetch_header(d, from->fetch_header));
        BODY(BLOCK, take_block(d, from->block));
        BODY(CREDIT, (d->message->credit.granted_bytes = from->credit->granted_bytes,
                      take_frames(d, 0, 0)));
        BODY(FETCH_DONE, take_frames(d, 0, 0));
        BODY(CANCEL, take_frames(d, 0, 0));
        BODY(LIST, take_list(d, from->list));
        BODY(LISTED, take_listed(d, from->listed));
        BODY(TASK, take_task(d, from->task));
        BODY(TASK_POLL, take_frames(d, 0, 0));
        BODY(TASK_REPLY, take_reply(d, from->task_reply));
        BODY(TASK_DONE, take_frames(d, 0, 0));
        BODY(ERROR, take_error(d, from->error));
    case KVLOOM__V1__ENVELOPE__BODY__NOT_SET:
    default: break;
    }
    return KVL_FAIL(d->error, KVL_ERR_MALFORMED,
                    "a message of a kind that version %u does not know", KVL_PROTOCOL_VERSION_MAX);
}
#undef BODY

kvl_status kvl_wire_decode(kvl_wire_decoder *decoder, const void *bytes, size_t n_bytes,
                           const kvl_frame *frames, size_t n_frames, kvl_message *message,
                           kvl_error *error)
{
    message->epoch = 0;
    message->request = 0;
    if (n_bytes == 0 || n_bytes > KVL_CONTROL_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a control part of %zu bytes, must be 1 .. %u",
                        n_bytes, KVL_CONTROL_BYTES_MAX);
    }
    if (n_frames > KVL_FRAMES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "%zu bulk frames, must be at most %u", n_frames,
                        KVL_FRAMES_MAX);
    }
    decoding d = {message, n_frames, 0, error};
    for (size_t i = 0; i < n_frames; i++) {
        if (frames[i].n_bytes > KVL_FRAME_BYTES_MAX) {
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                            "a bulk frame of %zu bytes, must be at most %u", frames[i].n_bytes,
                            KVL_FRAME_BYTES_MAX);
        }
        d.frame_bytes += frames[i].n_bytes;
    }
    decoder->n_used = 0;
    ProtobufCAllocator arena = {arena_alloc, arena_free, decoder};
    const envelope *from = kvloom__v1__envelope__unpack(&arena, n_bytes, bytes);
    if (from == NULL) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "a control part of %zu bytes that is no Envelope",
                        n_bytes);
    }
    message->epoch = from->epoch;
    message->request = from->request;
    if (from->epoch == 0) return KVL_FAIL(error, KVL_ERR_MALFORMED, "an envelope without an epoch");
    return take_body(&d, from);
}
