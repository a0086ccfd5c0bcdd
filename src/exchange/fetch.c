/* exchange/fetch.c: getting a container from whoever has it.
 *
 * Searching: holders that announced it come first, without a question; otherwise all peers are
 * asked. Streaming: header, then blocks in order under credit; each block is checked when its last
 * byte is here. A gap, a pause or a lost sender leads to a new Fetch that starts at the first
 * missing block. Two hosts may have computed the same segment with different roundings: the header
 * carries the checksums of all blocks, so a holder with another header starts from the beginning.
 * Damage is blamed on the sender first; the second time the header itself is under suspicion. */
#include "exchange/protocol_state.h"

#include "base/alloc.h"

#include <stdio.h>
#include <string.h>

enum { RETRIES_MAX = 4, HEADER_BYTES_MAX = 2 * KVL_CONTAINER_HEADER_BYTES_MAX };

static void advance(kvl_protocol *p, kvl_op *op, int64_t now_ns);

/* Whatever a former stream still has under way carries its number and is ignored from now on. */
void kvl_fetch_leave(kvl_protocol *p, kvl_op *op)
{
    if (op->state != KVL_FETCH_STREAMING) return;
    op->state = KVL_FETCH_SEARCHING;
    kvl_hedge_drop(p, op);
    if (p->output.leave != NULL) p->output.leave(p->output.context, op->peer, op->stream_request);
    kvl_peer *peer = &p->peers[op->peer];
    KVL_ASSERT(peer->n_streams > 0);
    peer->n_streams--;
    const bool complete = op->n_blocks > 0 && op->block == op->n_blocks;
    if (!complete && peer->state == KVL_PEER_UP) {
        kvl_send_plain(p, op->peer, KVL_MESSAGE_CANCEL, op->stream_request);
    }
}

static void send_fetch(kvl_protocol *p, const kvl_op *op, uint32_t peer, uint64_t request)
{
    p->peers[peer].n_streams++;
    kvl_message message = kvl_message_of(KVL_MESSAGE_FETCH, request);
    message.fetch.id = op->id;
    message.fetch.block_first = op->container == NULL ? 0 : op->block;
    message.fetch.block_past = 0;
    message.fetch.header_checksum = op->container == NULL ? 0 : op->header_checksum;
    message.fetch.credit_bytes = KVL_STREAM_WINDOW_BYTES;
    (void)kvl_send(p, peer, &message, NULL, 0, KVL_NO_OWNER);
}

static void start_stream(kvl_protocol *p, kvl_op *op, uint32_t peer, int64_t now_ns)
{
    op->state = KVL_FETCH_STREAMING;
    op->peer = peer;
    op->stream_request = kvl_op_number(p, op);
    op->header_seen = op->moved = false;
    op->offset = 0; /* a block that was cut off is asked for as a whole */
    op->charged = 0;
    op->granted = KVL_STREAM_WINDOW_BYTES;
    op->begun_ns = op->moved_ns = now_ns;
    send_fetch(p, op, peer, op->stream_request);
}

/* Of some holders the one that sends us least; KVL_PEERS_MAX when all have enough to do. Ties are
 * broken by the id, so that many fetches spread over equal holders. */
static uint32_t choose(const kvl_protocol *p, const kvl_op *op, uint64_t holders)
{
    uint32_t best = KVL_PEERS_MAX;
    uint32_t least = KVL_STREAMS_PER_PEER;
    for (uint32_t k = 0; k < p->n_peers; k++) {
        const uint32_t i = (op->id.bytes[0] + k) % p->n_peers;
        if ((holders & kvl_bit(i)) == 0 || p->peers[i].n_streams >= least) continue;
        least = p->peers[i].n_streams;
        best = i;
    }
    return best;
}

static void ask_who_has_it(kvl_protocol *p, kvl_op *op, uint64_t whom, int64_t now_ns)
{
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if ((whom & kvl_bit(i)) == 0) continue;
        kvl_message message = kvl_message_of(KVL_MESSAGE_LOCATE, op->request);
        message.locate.n_ids = 1;
        message.locate.ids[0] = op->id;
        (void)kvl_send(p, i, &message, NULL, 0, KVL_NO_OWNER);
    }
    if ((whom & ~op->asked) != 0) op->asked_ns = now_ns;
    op->sent_ns = now_ns;
    op->asked |= whom;
}

/* NOT_FOUND only when everybody who was asked said so; otherwise the failure that got in the way,
 * so that a caller can tell "nobody has it" from "who has it could not be reached". */
static void give_up(kvl_protocol *p, kvl_op *op)
{
    if (op->cause.status < 0) {
        kvl_op_fail(p, op, op->cause.status, op->cause.text);
    } else if (kvl_peers_up(p, true) == 0) {
        kvl_op_fail(p, op, KVL_ERR_UNREACHABLE, "no peer with this model is up");
    } else {
        kvl_op_fail(p, op, KVL_ERR_NOT_FOUND, "no peer has it");
    }
}

/* Where only one peer can have it, asking whether it does costs a round trip and spares nothing:
 * it says so to a Fetch as well. Not while it has enough to send, for a miss would wait with the
 * hits. */
static bool is_only_place(const kvl_protocol *p, const kvl_op *op, uint64_t unasked, int64_t now_ns)
{
    const bool is_one = (unasked & (unasked - 1)) == 0;
    return is_one && op->asked == 0 && !kvl_peers_are_expected(p, now_ns) &&
           choose(p, op, unasked) != KVL_PEERS_MAX;
}

/* Decides what a fetch without a stream does next. May end it. */
static void advance(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    if (op->state == KVL_FETCH_STREAMING) return;
    const uint64_t up = kvl_peers_up(p, true) & ~op->failed;
    const uint64_t trusted = op->holders & up & ~op->damaged_by;
    const uint64_t unasked = up & ~op->asked & ~op->holders;
    uint64_t candidates = trusted;
    if (candidates == 0 && unasked != 0) {
        if (is_only_place(p, op, unasked, now_ns)) {
            op->holders |= unasked;
            candidates = unasked;
        } else {
            ask_who_has_it(p, op, unasked, now_ns);
        }
    }
    const bool waiting =
        (op->asked & up & ~op->answered & ~op->holders) != 0 || kvl_peers_are_expected(p, now_ns);
    /* Who sent damage once is asked again only when nobody else is left. */
    if (candidates == 0 && !waiting) candidates = op->holders & up;
    if (candidates != 0) {
        const uint32_t peer = choose(p, op, candidates);
        op->state = peer == KVL_PEERS_MAX ? KVL_FETCH_WAITING : KVL_FETCH_SEARCHING;
        if (peer != KVL_PEERS_MAX) start_stream(p, op, peer, now_ns);
        return;
    }
    op->state = KVL_FETCH_SEARCHING;
    if (!waiting) give_up(p, op);
}

/* First come, first served. */
void kvl_fetch_kick(kvl_protocol *p, int64_t now_ns)
{
    for (;;) {
        kvl_op *oldest = NULL;
        for (size_t i = 0; p->n_ops > 0 && i < KVL_OPS_MAX; i++) {
            kvl_op *op = &p->ops[i];
            if (op->kind != KVL_OP_FETCH || op->state != KVL_FETCH_WAITING) continue;
            if (choose(p, op, op->holders & kvl_peers_up(p, true) & ~op->failed) == KVL_PEERS_MAX) {
                continue;
            }
            if (oldest == NULL || op->order < oldest->order) oldest = op;
        }
        if (oldest == NULL) return;
        advance(p, oldest, now_ns);
        /* One that would rather wait for a holder it trusts keeps its place in the queue. */
        if (oldest->kind == KVL_OP_FETCH && oldest->state == KVL_FETCH_WAITING) return;
    }
}

/* Leaves the stream and goes on with another holder, or ends. */
static void fail_holder(kvl_protocol *p, kvl_op *op, kvl_status status, const char *text,
                        int64_t now_ns)
{
    kvl_fetch_leave(p, op);
    kvl_op_blame(p, op, op->peer, status, text);
    advance(p, op, now_ns);
    kvl_fetch_kick(p, now_ns);
}

/* The same holder again, from the first missing block. */
static void restart_stream(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    const uint32_t peer = op->peer;
    kvl_fetch_leave(p, op);
    start_stream(p, op, peer, now_ns);
}

/* A message does not continue the stream: something before it was lost. */
static void take_gap(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    /* Without progress the timer decides, or a broken sender would keep us busy for ever. */
    if (op->moved) restart_stream(p, op, now_ns);
}

void kvl_fetch_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    advance(p, op, now_ns);
}

void kvl_fetch_peer_lost(kvl_protocol *p, kvl_op *op, uint32_t peer, int64_t now_ns)
{
    const bool sending = op->state == KVL_FETCH_STREAMING && op->peer == peer;
    const bool concerned = sending || ((op->asked | op->holders) & kvl_bit(peer)) != 0;
    if (!concerned) return;
    if (op->has_hedge && op->hedge_peer == peer) kvl_hedge_drop(p, op);
    kvl_op_blame(p, op, peer, KVL_ERR_UNREACHABLE, "gone while it was asked");
    if (sending) kvl_fetch_leave(p, op);
    advance(p, op, now_ns);
}

void kvl_fetch_located(kvl_protocol *p, uint32_t peer, const kvl_message *message, int64_t now_ns)
{
    kvl_op *op = kvl_op_find(p, message->request);
    if (op == NULL || op->kind != KVL_OP_FETCH || op->request != message->request) return;
    if ((op->asked & kvl_bit(peer)) == 0 || message->located.n_ids != 1) return;
    op->answered |= kvl_bit(peer);
    if (message->located.held == 1) op->holders |= kvl_bit(peer);
    advance(p, op, now_ns);
}

/* The op whose stream a message belongs to, or NULL when it is late. */
static kvl_op *find_stream(kvl_protocol *p, uint32_t peer, const kvl_message *message)
{
    kvl_op *op = kvl_op_find(p, message->request);
    if (op == NULL || op->kind != KVL_OP_FETCH || op->state != KVL_FETCH_STREAMING) return NULL;
    if (op->peer != peer || op->stream_request != message->request) return NULL;
    return op;
}

/* What a holder sent breaks the rules: it is told, counted and not asked again. */
static void refuse_holder(kvl_protocol *p, kvl_op *op, const char *text, int64_t now_ns)
{
    p->stats.messages_refused++;
    kvl_report(p, KVL_LOG_WARN, "answer_refused", "peer=%s why=\"%s\"", p->peers[op->peer].name,
               text);
    kvl_send_error(p, op->peer, op->stream_request, KVL_ERR_DAMAGED, "%s", text);
    fail_holder(p, op, KVL_ERR_DAMAGED, text, now_ns);
}

/* The header is somebody else's claim: the checksum guards the way here, the format's own checks
 * the sizes, and the id and the model must be what was asked for. */
static kvl_status make_container(kvl_protocol *p, const kvl_op *op, const kvl_message *message,
                                 const void *bytes, kvl_container **container, kvl_error *error)
{
    const size_t n_bytes = message->fetch_header.header_bytes;
    if (kvl_checksum(bytes, n_bytes) != message->fetch_header.header_checksum) {
        return KVL_FAIL(error, KVL_ERR_DAMAGED, "the header's checksum does not match");
    }
    KVL_TRY(kvl_container_from_header(bytes, n_bytes, container, error));
    const kvl_container_info *info = kvl_container_info_of(*container);
    kvl_status status = KVL_OK;
    if (!kvl_digest_equal(&info->id, &op->id)) {
        status =
            KVL_FAIL(error, KVL_ERR_DAMAGED, "the header is of another container than asked for");
    } else if (!kvl_digest_equal(&info->fingerprint, &p->fingerprint)) {
        char theirs[KVL_DIGEST_TEXT_BYTES], ours[KVL_DIGEST_TEXT_BYTES];
        status = KVL_FAIL(error, KVL_ERR_FOREIGN, "the container is of model %s, this host runs %s",
                          kvl_digest_to_text(&info->fingerprint, theirs),
                          kvl_digest_to_text(&p->fingerprint, ours));
    } else if (kvl_container_n_blocks(*container) != message->fetch_header.n_blocks ||
               info->block_bytes == 0) {
        status = KVL_FAIL(error, KVL_ERR_DAMAGED, "the header has %u blocks of %llu bytes, not %u",
                          kvl_container_n_blocks(*container), (unsigned long long)info->block_bytes,
                          message->fetch_header.n_blocks);
    }
    if (status < 0) {
        kvl_container_release(*container);
        *container = NULL;
    }
    return status;
}

/* Makes room for the blocks. One frame is read where it lies, several are joined. */
static kvl_status take_container(kvl_protocol *p, kvl_op *op, const kvl_message *message,
                                 const kvl_frame *frames, size_t n_frames, kvl_error *error)
{
    kvl_container *container = NULL;
    if (message->fetch_header.header_bytes > HEADER_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a header of %u bytes, must be at most %d",
                        message->fetch_header.header_bytes, HEADER_BYTES_MAX);
    }
    if (n_frames == 1) {
        KVL_TRY(make_container(p, op, message, frames[0].bytes, &container, error));
    } else {
        kvl_bulk *joined = kvl_bulk_create(message->fetch_header.header_bytes);
        if (joined == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a header");
        kvl_frames_join(frames, n_frames, kvl_bulk_bytes(joined));
        const kvl_status status =
            make_container(p, op, message, kvl_bulk_bytes(joined), &container, error);
        kvl_bulk_release(joined);
        if (status < 0) return status;
    }
    kvl_container_release(op->container);
    op->container = container;
    op->header_checksum = message->fetch_header.header_checksum;
    op->header_peer = op->peer;
    op->n_blocks = message->fetch_header.n_blocks;
    op->block = 0;
    p->stats.bytes_fetched += message->fetch_header.header_bytes;
    return KVL_OK;
}

/* Timeouts count from the last step forward: a large container on a slow link is not given up. */
static void note_progress(kvl_op *op, int64_t now_ns)
{
    op->moved = true;
    op->n_retries = 0;
    op->moved_ns = now_ns;
}

void kvl_fetch_header(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    kvl_op *op = kvl_op_find(p, message->request);
    if (kvl_hedge_is(op, peer, message->request)) kvl_hedge_win(p, op, now_ns);
    op = find_stream(p, peer, message);
    if (op == NULL || op->header_seen) return;
    if (!kvl_digest_equal(&message->fetch_header.id, &op->id)) {
        refuse_holder(p, op, "FETCH_HEADER.id is not what was asked for", now_ns);
        return;
    }
    if (message->fetch_header.header_bytes == 0) {
        if (op->container == NULL || message->fetch_header.block_first != op->block ||
            message->fetch_header.n_blocks != op->n_blocks ||
            message->fetch_header.header_checksum != op->header_checksum) {
            refuse_holder(p, op, "FETCH_HEADER without a header does not continue the fetch",
                          now_ns);
            return;
        }
    } else {
        kvl_error error;
        const kvl_status status = take_container(p, op, message, frames, n_frames, &error);
        if (status < 0) {
            /* How much memory it takes is what the peer says, so a lack of it is no failure of this
             * host: another holder may have a smaller truth. */
            if (status == KVL_ERR_NO_MEMORY) {
                fail_holder(p, op, KVL_ERR_BUSY, error.text, now_ns);
            } else if (status == KVL_ERR_FOREIGN) {
                fail_holder(p, op, status, error.text, now_ns);
            } else {
                refuse_holder(p, op, error.text, now_ns);
            }
            return;
        }
    }
    op->header_seen = op->trusts_landing = true;
    kvl_hedge_drop(p, op);
    kvl_hedge_sample(&p->peers[op->peer], now_ns - op->begun_ns);
    if (p->output.land != NULL) {
        p->output.land(p->output.context, op->peer, op->stream_request, op->container, op->block);
    }
    note_progress(op, now_ns);
}

static void finish(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    p->stats.containers_fetched++;
    kvl_completion completion = {
        .status = KVL_OK, .from = p->peers[op->peer].name, .container = op->container};
    kvl_op_end(p, op, &completion);
    kvl_fetch_kick(p, now_ns);
}

static void take_damage(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    p->stats.blocks_damaged++;
    op->n_damaged++;
    const uint32_t peer = op->peer;
    kvl_report(p, KVL_LOG_WARN, "block_damaged", "peer=%s block=%u", p->peers[peer].name,
               op->block);
    kvl_fetch_leave(p, op);
    op->damaged_by |= kvl_bit(peer);
    KVL_NOTE(&op->cause, KVL_ERR_DAMAGED, "peer %s: block %u does not match its checksum",
             p->peers[peer].name, op->block);
    if (op->n_damaged > 1) {
        /* Whose header it was may have lied about the checksums, so both are done with. */
        op->failed |= kvl_bit(peer) | kvl_bit(op->header_peer);
        kvl_container_release(op->container);
        op->container = NULL;
        op->block = op->n_blocks = 0;
    }
    advance(p, op, now_ns);
    kvl_fetch_kick(p, now_ns);
}

/* Credit in steps of a quarter of the window: often enough that the sender never waits, seldom
 * enough that credits cost nothing. */
static void grant_credit(kvl_protocol *p, kvl_op *op)
{
    const uint64_t wanted = op->charged + KVL_STREAM_WINDOW_BYTES;
    if (wanted - op->granted < KVL_STREAM_WINDOW_BYTES / 4) return;
    op->granted = wanted;
    kvl_message message = kvl_message_of(KVL_MESSAGE_CREDIT, op->stream_request);
    message.credit.granted_bytes = wanted;
    (void)kvl_send(p, op->peer, &message, NULL, 0, KVL_NO_OWNER);
}

/* Where the piece is in the stream: -1 seen already, 0 the next one, 1 further on. */
static int place_of(const kvl_op *op, const kvl_message *message)
{
    if (message->block.block != op->block) return message->block.block < op->block ? -1 : 1;
    if (message->block.offset != op->offset) return message->block.offset < op->offset ? -1 : 1;
    return 0;
}

/* A piece that has landed is where it belongs. */
static void put_piece(kvl_protocol *p, kvl_op *op, uint8_t *to, const kvl_frame *frame)
{
    if (frame->bytes == to) return;
    if (p->output.claim != NULL &&
        !p->output.claim(p->output.context, op->peer, op->stream_request, op->block)) {
        op->trusts_landing = false;
    }
    memcpy(to, frame->bytes, frame->n_bytes);
}

static kvl_status check_block(const kvl_op *op, const kvl_message *message)
{
    if (message->block.has_checksum && op->trusts_landing)
        return kvl_container_block_accept(op->container, op->block, message->block.checksum, NULL);
    return kvl_container_block_check(op->container, op->block, NULL);
}

void kvl_fetch_block(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frame, int64_t now_ns)
{
    kvl_op *op = find_stream(p, peer, message);
    if (op == NULL || !op->header_seen) return;
    size_t n_block_bytes = 0;
    uint8_t *block = kvl_container_block(op->container, op->block, &n_block_bytes);
    if (!kvl_digest_equal(&message->block.id, &op->id) || message->block.block >= op->n_blocks ||
        message->block.total != n_block_bytes) {
        refuse_holder(p, op, "BLOCK is outside of what was asked for", now_ns);
        return;
    }
    const int place = place_of(op, message);
    if (place < 0) return;
    if (place > 0) {
        take_gap(p, op, now_ns);
        return;
    }
    const uint64_t charge =
        frame->n_bytes > KVL_PIECE_CHARGE_MIN ? frame->n_bytes : KVL_PIECE_CHARGE_MIN;
    put_piece(p, op, block + op->offset, frame);
    op->offset += frame->n_bytes;
    op->charged += charge;
    p->stats.bytes_fetched += frame->n_bytes;
    note_progress(op, now_ns);
    /* Credit goes out before the check: the sender works on while we hash. */
    const bool last = op->offset == n_block_bytes && op->block + 1 == op->n_blocks;
    if (!last) grant_credit(p, op);
    if (op->offset < n_block_bytes) return;
    if (check_block(op, message) < 0) {
        take_damage(p, op, now_ns);
        return;
    }
    op->block++;
    op->offset = 0;
    if (p->output.progress != NULL) {
        p->output.progress(p->output.context, op->waiter, op->container, op->block);
    }
    if (op->block == op->n_blocks) finish(p, op, now_ns);
}

/* The end of a stream that is not complete here means that pieces were lost before it. */
void kvl_fetch_done(kvl_protocol *p, uint32_t peer, const kvl_message *message, int64_t now_ns)
{
    kvl_op *op = find_stream(p, peer, message);
    if (op != NULL) take_gap(p, op, now_ns);
}

/* An announcement that is out of date is no failure: the search goes on as if it had not been
 * there. */
static void note_not_there(kvl_protocol *p, kvl_op *op, uint32_t peer)
{
    kvl_peer_directory_remove(p->directory, &op->id, peer);
    op->holders &= ~kvl_bit(peer);
    op->asked |= kvl_bit(peer);
    op->answered |= kvl_bit(peer);
}

void kvl_fetch_error(kvl_protocol *p, kvl_op *op, uint32_t peer, const kvl_message *message,
                     int64_t now_ns)
{
    if (op->request == message->request) {
        kvl_op_blame(p, op, peer, message->reply.status, message->reply.text);
        advance(p, op, now_ns);
        return;
    }
    if (kvl_hedge_is(op, peer, message->request)) {
        kvl_hedge_drop(p, op);
        if (message->reply.status == KVL_ERR_NOT_FOUND) note_not_there(p, op, peer);
        return;
    }
    if (find_stream(p, peer, message) != op) return;
    if (message->reply.status == KVL_ERR_BUSY) return; /* the timer asks again */
    if (message->reply.status == KVL_ERR_NOT_FOUND) {
        kvl_fetch_leave(p, op);
        note_not_there(p, op, peer);
        advance(p, op, now_ns);
        kvl_fetch_kick(p, now_ns);
        return;
    }
    fail_holder(p, op, message->reply.status, message->reply.text, now_ns);
}

static void tick_search(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    const uint64_t silent = op->asked & ~op->answered & ~op->failed & kvl_peers_up(p, true);
    /* Nobody waited for an answer while another holder's blocks came: patience begins after it. */
    const int64_t since_ns = op->asked_ns > op->moved_ns ? op->asked_ns : op->moved_ns;
    if (silent != 0 && now_ns - since_ns >= p->timeout_ns) {
        for (uint32_t i = 0; i < p->n_peers; i++) {
            if ((silent & kvl_bit(i)) != 0) {
                kvl_op_blame(p, op, i, KVL_ERR_TIMEOUT, "no answer to Locate");
            }
        }
    } else if (silent != 0 && now_ns - op->sent_ns >= p->timeout_ns / 4) {
        ask_who_has_it(p, op, silent, now_ns);
    }
    advance(p, op, now_ns);
}

/* The holder takes longer to begin than it usually does: another one is asked too, or those who
 * have not been asked yet whether they have it. */
static void tick_hedge(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    if (op->header_seen || op->has_hedge || op->n_hedges >= KVL_HEDGES_MAX) return;
    if (now_ns - op->begun_ns < kvl_hedge_patience(&p->peers[op->peer])) return;
    const uint64_t others = kvl_peers_up(p, true) & ~op->failed & ~kvl_bit(op->peer);
    const uint64_t holders = op->holders & others & ~op->damaged_by;
    const uint64_t unasked = others & ~op->asked & ~op->holders;
    if (holders == 0) {
        if (unasked != 0) ask_who_has_it(p, op, unasked, now_ns);
        return;
    }
    const uint32_t peer = choose(p, op, holders);
    if (peer == KVL_PEERS_MAX) return;
    op->has_hedge = true;
    op->hedge_peer = peer;
    op->hedge_request = kvl_op_number(p, op);
    op->hedge_begun_ns = now_ns;
    op->n_hedges++;
    p->stats.hedges++;
    send_fetch(p, op, peer, op->hedge_request);
}

void kvl_fetch_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    if (now_ns >= op->deadline_ns) {
        kvl_op_fail(p, op, KVL_ERR_TIMEOUT,
                    op->cause.status < 0 ? op->cause.text : "the deadline passed");
        return;
    }
    if (op->state == KVL_FETCH_SEARCHING) {
        tick_search(p, op, now_ns);
    } else if (op->state == KVL_FETCH_STREAMING && now_ns - op->moved_ns < p->timeout_ns / 4) {
        tick_hedge(p, op, now_ns);
    } else if (op->state == KVL_FETCH_STREAMING) {
        if (++op->n_retries >= RETRIES_MAX) {
            fail_holder(p, op, KVL_ERR_TIMEOUT, "blocks stopped coming", now_ns);
        } else {
            restart_stream(p, op, now_ns);
        }
    }
}
