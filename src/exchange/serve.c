/* exchange/serve.c: answers from the store: who has it, blocks under credit, lists.
 *
 * Blocks are never copied here: a frame points into the container, and the transport holds a
 * reference until the bytes are sent. A slow asker holds a reference and its window, and nothing
 * more than that. */
#include "exchange/protocol_state.h"

#include "base/alloc.h"

#include <string.h>

void kvl_serve_locate(kvl_protocol *p, kvl_link link, const kvl_message *message)
{
    kvl_tier *store = kvl_store_of(p, link);
    kvl_message answer = kvl_message_of(KVL_MESSAGE_LOCATED, message->request);
    answer.located.n_ids = message->locate.n_ids;
    answer.located.held = 0;
    for (uint32_t i = 0; i < message->locate.n_ids; i++) {
        if (store->ops->has(store, &message->locate.ids[i])) answer.located.held |= 1u << i;
    }
    (void)kvl_send(p, link, &answer, NULL, 0, KVL_NO_OWNER);
}

/* ---- streams of blocks ---- */

static void end_stream(kvl_protocol *p, kvl_stream *stream)
{
    if (stream->container == NULL) return;
    kvl_container_release(stream->container);
    stream->container = NULL;
    p->n_streams--;
}

static kvl_stream *find_stream(kvl_session *session, uint64_t request)
{
    for (size_t i = 0; i < KVL_STREAMS_PER_LINK; i++) {
        kvl_stream *stream = &session->streams[i];
        if (stream->container != NULL && stream->request == request) return stream;
    }
    return NULL;
}

/* A free place, or that of the stream which has not moved for the longest time: an asker that
 * starts more than it may gives up its oldest. */
static kvl_stream *place_for_stream(kvl_protocol *p, kvl_session *session)
{
    kvl_stream *place = &session->streams[0];
    for (size_t i = 0; i < KVL_STREAMS_PER_LINK; i++) {
        kvl_stream *stream = &session->streams[i];
        if (stream->container == NULL) return stream;
        if (stream->moved_ns < place->moved_ns) place = stream;
    }
    end_stream(p, place);
    return place;
}

/* Sends one piece. False when the stream has to wait, or the link is gone. */
static bool send_piece(kvl_protocol *p, kvl_link link, kvl_stream *stream, int64_t now_ns)
{
    size_t n_block_bytes = 0;
    const uint8_t *block =
        kvl_container_block_view(stream->container, stream->block, &n_block_bytes);
    const size_t rest = n_block_bytes - (size_t)stream->offset;
    const kvl_frame frame = {block + stream->offset,
                             rest < KVL_PIECE_BYTES ? rest : KVL_PIECE_BYTES};
    const uint64_t charge =
        frame.n_bytes > KVL_PIECE_CHARGE_MIN ? frame.n_bytes : KVL_PIECE_CHARGE_MIN;
    if (charge > stream->granted - stream->charged) return false;

    kvl_message message = kvl_message_of(KVL_MESSAGE_BLOCK, stream->request);
    message.block.id = kvl_container_info_of(stream->container)->id;
    message.block.block = stream->block;
    message.block.offset = stream->offset;
    message.block.total = n_block_bytes;
    /* A full queue is no loss: the same piece is tried again at the next tick. */
    const kvl_owner owner = {.container = stream->container};
    if (kvl_send(p, link, &message, &frame, 1, owner) < 0) {
        stream->stalled = true;
        return false;
    }
    stream->charged += charge;
    stream->moved_ns = now_ns;
    p->stats.bytes_served += frame.n_bytes;
    stream->offset += frame.n_bytes;
    if (stream->offset == n_block_bytes) {
        stream->block++;
        stream->offset = 0;
    }
    return true;
}

/* Sends all that the credit allows in one go: queueing a piece takes a microsecond or two, because
 * its bytes stay where they are. */
static void pump(kvl_protocol *p, kvl_link link, kvl_stream *stream, int64_t now_ns)
{
    stream->stalled = false;
    while (stream->block < stream->block_past) {
        if (!send_piece(p, link, stream, now_ns)) return;
    }
    kvl_send_plain(p, link, KVL_MESSAGE_FETCH_DONE, stream->request);
    p->stats.containers_served++;
    end_stream(p, stream);
}

/* The header, unless the asker has the same one already. */
static kvl_status send_header(kvl_protocol *p, kvl_link link, const kvl_message *fetch,
                              kvl_container *container, bool known, const kvl_frame *header,
                              uint64_t checksum)
{
    kvl_frame frames[KVL_FRAMES_MAX];
    kvl_message message = kvl_message_of(KVL_MESSAGE_FETCH_HEADER, fetch->request);
    message.fetch_header.id = fetch->fetch.id;
    message.fetch_header.n_blocks = kvl_container_n_blocks(container);
    message.fetch_header.block_first = known ? fetch->fetch.block_first : 0;
    message.fetch_header.header_checksum = checksum;
    message.fetch_header.header_bytes = known ? 0 : (uint32_t)header->n_bytes;
    size_t n_frames = 0;
    if (!known) {
        if (header->n_bytes > (size_t)KVL_HEADER_FRAMES_MAX * KVL_FRAME_BYTES_MAX) {
            return KVL_ERR_TOO_LARGE;
        }
        n_frames = kvl_frames_cut(header->bytes, header->n_bytes, frames);
    }
    const kvl_owner owner = {.container = container};
    return kvl_send(p, link, &message, frames, n_frames, owner);
}

/* Takes the reference. */
static void open_stream(kvl_protocol *p, kvl_link link, const kvl_message *message,
                        kvl_container *container, int64_t now_ns)
{
    kvl_frame header = {NULL, 0};
    header.bytes = kvl_container_header(container, &header.n_bytes);
    const uint64_t checksum = kvl_checksum(header.bytes, header.n_bytes);
    const uint32_t n_blocks = kvl_container_n_blocks(container);
    const bool known = checksum != 0 && checksum == message->fetch.header_checksum &&
                       message->fetch.block_first < n_blocks;
    const uint32_t past = message->fetch.block_past;
    if (kvl_container_info_of(container)->block_bytes == 0 || n_blocks == 0 ||
        send_header(p, link, message, container, known, &header, checksum) < 0) {
        kvl_container_release(container);
        return; /* the asker's timer asks again */
    }
    kvl_stream *stream = place_for_stream(p, kvl_session_of(p, link));
    *stream = (kvl_stream){
        .container = container,
        .request = message->request,
        .block = known ? message->fetch.block_first : 0,
        .block_past = past == 0 || past > n_blocks || !known ? n_blocks : past,
        .granted = message->fetch.credit_bytes,
        .moved_ns = now_ns,
    };
    p->n_streams++;
    pump(p, link, stream, now_ns);
}

void kvl_serve_fetch(kvl_protocol *p, kvl_link link, const kvl_message *message, int64_t now_ns)
{
    kvl_session *session = kvl_session_of(p, link);
    if (find_stream(session, message->request) != NULL) return; /* the same Fetch once more */
    kvl_container *container = NULL;
    kvl_error error;
    error.text[0] = '\0';
    kvl_tier *store = kvl_store_of(p, link);
    kvl_status status = store->ops->get(store, &message->fetch.id, false, &container, &error);
    /* A store may hold containers of an earlier model; for this asker they are not there. */
    if (status == KVL_OK &&
        !kvl_digest_equal(&kvl_container_info_of(container)->fingerprint, &p->fingerprint)) {
        kvl_container_release(container);
        status = KVL_FAIL(&error, KVL_ERR_NOT_FOUND, "held, but made by another model");
    }
    if (status < 0) {
        kvl_send_error(p, link, message->request, status, "%.400s", error.text);
        return;
    }
    open_stream(p, link, message, container, now_ns);
}

void kvl_serve_credit(kvl_protocol *p, kvl_link link, const kvl_message *message, int64_t now_ns)
{
    kvl_stream *stream = find_stream(kvl_session_of(p, link), message->request);
    if (stream == NULL) return; /* late: everything is sent already */
    const uint64_t granted = message->credit.granted_bytes;
    if (granted <= stream->granted) return; /* late, or a repetition */
    /* Whatever an asker grants, no more than the window is ever under way. */
    if (granted - stream->charged > KVL_CREDIT_BYTES_MAX) {
        p->stats.messages_refused++;
        kvl_send_error(p, link, message->request, KVL_ERR_TOO_LARGE,
                       "CREDIT.granted_bytes exceeds the window of %llu bytes",
                       (unsigned long long)KVL_CREDIT_BYTES_MAX);
        end_stream(p, stream);
        return;
    }
    stream->granted = granted;
    pump(p, link, stream, now_ns);
}

void kvl_serve_cancel(kvl_protocol *p, kvl_link link, uint64_t request)
{
    kvl_stream *stream = find_stream(kvl_session_of(p, link), request);
    if (stream != NULL) end_stream(p, stream);
}

void kvl_serve_tick(kvl_protocol *p, kvl_link link, int64_t now_ns)
{
    kvl_session *session = kvl_session_of(p, link);
    for (size_t i = 0; i < KVL_STREAMS_PER_LINK; i++) {
        kvl_stream *stream = &session->streams[i];
        if (stream->container == NULL) continue;
        if (now_ns - stream->moved_ns >= KVL_STREAM_IDLE_NS) {
            end_stream(p, stream);
        } else if (stream->stalled) {
            pump(p, link, stream, now_ns);
        }
    }
}

/* ---- lists ---- */

static void end_listing(kvl_protocol *p, kvl_listing *listing)
{
    if (!listing->open) return;
    kvl_free(listing->ids);
    listing->ids = NULL;
    listing->open = false;
    p->n_listings--;
}

void kvl_serve_end(kvl_protocol *p, kvl_link link)
{
    kvl_session *session = kvl_session_of(p, link);
    for (size_t i = 0; i < KVL_STREAMS_PER_LINK; i++) end_stream(p, &session->streams[i]);
    for (size_t i = 0; i < KVL_LISTINGS_MAX; i++) {
        kvl_listing *listing = &p->listings[i];
        if (listing->open && listing->link == link) end_listing(p, listing);
    }
}

/* Runs inside the tier, which must not be called back: only ids are noted here, and looked at
 * afterwards, a few at a time. */
static bool collect_id(void *context, const kvl_digest *id, kvl_container_kind kind,
                       uint64_t n_bytes)
{
    (void)n_bytes;
    kvl_listing *listing = context;
    if (kind != listing->kind) return true;
    if (listing->n_ids == KVL_LIST_TOTAL_IDS_MAX) {
        listing->truncated = true;
        return false;
    }
    if (listing->n_ids == listing->capacity) {
        const size_t capacity = listing->capacity == 0 ? 64 : 2 * listing->capacity;
        kvl_digest *ids = kvl_realloc(listing->ids, capacity * sizeof *ids);
        if (ids == NULL) {
            listing->truncated = true;
            return false;
        }
        listing->ids = ids;
        listing->capacity = capacity;
    }
    listing->ids[listing->n_ids++] = *id;
    return true;
}

void kvl_serve_list(kvl_protocol *p, kvl_link link, const kvl_message *message,
                    const kvl_frame *frames, size_t n_frames)
{
    kvl_listing *place = NULL;
    for (size_t i = 0; i < KVL_LISTINGS_MAX; i++) {
        kvl_listing *listing = &p->listings[i];
        if (listing->open && listing->link == link && listing->request == message->request) return;
        if (!listing->open && place == NULL) place = listing;
    }
    if (place == NULL) return; /* too many at once; the asker's timer asks again */
    memset(place, 0, sizeof *place);
    place->open = true;
    place->link = link;
    place->serial = kvl_session_of(p, link)->serial;
    place->request = message->request;
    place->kind = message->list.kind;
    if (n_frames == 1 && frames[0].n_bytes > 0) {
        memcpy(place->prefix, frames[0].bytes, frames[0].n_bytes);
        place->n_prefix_bytes = frames[0].n_bytes;
    }
    p->n_listings++;
    kvl_tier *store = kvl_store_of(p, link);
    store->ops->list(store, collect_id, place);
}

/* A container that has gone since the ids were collected simply does not match. */
static bool matches(kvl_protocol *p, const kvl_listing *listing, const kvl_digest *id)
{
    if (listing->n_prefix_bytes == 0) return true;
    kvl_container *container = NULL;
    kvl_tier *store = kvl_store_of(p, listing->link);
    if (store->ops->get(store, id, false, &container, NULL) < 0) return false;
    const kvl_container_info *info = kvl_container_info_of(container);
    const bool same = info->n_extra_bytes >= listing->n_prefix_bytes &&
                      memcmp(info->extra, listing->prefix, listing->n_prefix_bytes) == 0;
    kvl_container_release(container);
    return same;
}

static void send_list(kvl_protocol *p, const kvl_listing *listing)
{
    const size_t n_bytes = listing->n_kept * sizeof(kvl_digest);
    const kvl_frame frame = {listing->ids, n_bytes};
    kvl_message message = kvl_message_of(KVL_MESSAGE_LISTED, listing->request);
    message.listed.n_ids = (uint32_t)listing->n_kept;
    message.listed.truncated = listing->truncated;
    (void)kvl_send(p, listing->link, &message, &frame, n_bytes > 0 ? 1 : 0, KVL_NO_OWNER);
}

/* Thousands of headers take tens of milliseconds to look at; in steps, blocks and pings of others
 * get through in between. The answer grows at the front of the array of candidates. */
bool kvl_serve_work(kvl_protocol *p)
{
    for (size_t i = 0; i < KVL_LISTINGS_MAX; i++) {
        kvl_listing *listing = &p->listings[i];
        if (!listing->open) continue;
        for (uint32_t step = 0; step < KVL_LISTING_STEP && listing->n_looked < listing->n_ids;
             step++) {
            const kvl_digest id = listing->ids[listing->n_looked++];
            if (!matches(p, listing, &id)) continue;
            if (listing->n_kept == KVL_LIST_IDS_MAX) {
                listing->truncated = true;
                listing->n_looked = listing->n_ids;
                break;
            }
            listing->ids[listing->n_kept++] = id;
        }
        if (listing->n_looked < listing->n_ids) continue;
        send_list(p, listing);
        end_listing(p, listing);
    }
    return p->n_listings > 0;
}
