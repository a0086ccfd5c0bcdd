/* exchange/ask.c: the two other requests from here: lists of ids from all peers, and tasks.
 *
 * A task is sent once. After that short polls ask for it: "still running", the reply again if it
 * was lost, or "never heard of it", and only then the task is sent once more. The server remembers
 * the numbers, so a task never runs twice. */
#include "exchange/protocol_state.h"

#include "base/alloc.h"

#include <stdlib.h>
#include <string.h>

/* ---- lists ---- */

static void ask_list(kvl_protocol *p, kvl_op *op, uint64_t whom, int64_t now_ns)
{
    const kvl_frame prefix = {op->prefix, op->n_prefix_bytes};
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if ((whom & kvl_bit(i)) == 0) continue;
        kvl_message message = kvl_message_of(KVL_MESSAGE_LIST, op->request);
        message.list.kind = op->wanted_kind;
        (void)kvl_send(p, i, &message, &prefix, op->n_prefix_bytes > 0 ? 1 : 0, KVL_NO_OWNER);
    }
    if ((whom & ~op->asked) != 0) op->asked_ns = now_ns;
    op->sent_ns = now_ns;
    op->asked |= whom;
}

/* Any order does, as long as equal ids come to stand side by side. */
static int compare_ids(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(kvl_digest));
}

/* Several peers may have the same container: each id is given once. */
static void finish_list(kvl_protocol *p, kvl_op *op)
{
    size_t n_kept = 0;
    if (op->n_ids > 0) qsort(op->ids, op->n_ids, sizeof *op->ids, compare_ids);
    for (size_t i = 0; i < op->n_ids; i++) {
        if (n_kept > 0 && compare_ids(&op->ids[n_kept - 1], &op->ids[i]) == 0) continue;
        op->ids[n_kept++] = op->ids[i];
    }
    kvl_completion completion = {.status = KVL_OK, .ids = op->ids, .n_ids = n_kept};
    kvl_op_end(p, op, &completion);
}

/* A list is the best that could be had in time, so it never fails for a peer: whoever is silent or
 * gone is left out. A host that starts alone gets an empty one. */
void kvl_list_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    const uint64_t silent = op->asked & ~op->answered & ~op->failed;
    if (now_ns >= op->deadline_ns || (silent != 0 && now_ns - op->asked_ns >= p->timeout_ns)) {
        finish_list(p, op);
        return;
    }
    if (silent == 0 && !kvl_peers_are_expected(p, now_ns)) {
        finish_list(p, op);
        return;
    }
    if (silent != 0 && now_ns - op->sent_ns >= p->timeout_ns / 4) ask_list(p, op, silent, now_ns);
}

void kvl_list_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    const uint64_t unasked = kvl_peers_up(p, true) & ~op->asked;
    if (unasked != 0) ask_list(p, op, unasked, now_ns);
    kvl_list_tick(p, op, now_ns);
}

void kvl_list_peer_lost(kvl_protocol *p, kvl_op *op, uint32_t peer, int64_t now_ns)
{
    if ((op->asked & kvl_bit(peer)) == 0) return;
    op->failed |= kvl_bit(peer);
    kvl_list_tick(p, op, now_ns);
}

void kvl_list_answer(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    kvl_op *op = kvl_op_find(p, message->request);
    if (op == NULL || op->kind != KVL_OP_LIST || op->request != message->request) return;
    if ((op->asked & ~op->answered & kvl_bit(peer)) == 0) return;
    op->answered |= kvl_bit(peer);
    size_t n_ids = message->listed.n_ids;
    if (n_ids > KVL_LIST_TOTAL_IDS_MAX - op->n_ids) n_ids = KVL_LIST_TOTAL_IDS_MAX - op->n_ids;
    if (n_ids > 0) {
        KVL_ASSERT(n_frames == 1 && frames[0].n_bytes >= n_ids * sizeof(kvl_digest));
        kvl_digest *ids = kvl_realloc(op->ids, (op->n_ids + n_ids) * sizeof *ids);
        if (ids == NULL) {
            kvl_op_fail(p, op, KVL_ERR_NO_MEMORY, "no memory for the ids");
            return;
        }
        op->ids = ids;
        memcpy(ids + op->n_ids, frames[0].bytes, n_ids * sizeof *ids);
        op->n_ids += n_ids;
    }
    if (message->listed.truncated || n_ids < message->listed.n_ids) {
        kvl_report(p, KVL_LOG_WARN, "list_truncated", "peer=%s ids=%u", p->peers[peer].name,
                   message->listed.n_ids);
    }
    kvl_list_tick(p, op, now_ns);
}

/* ---- tasks ---- */

/* The body is shared with ZeroMQ and not copied again: the caller may be gone before it is sent. */
static void send_task(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    kvl_frame frames[KVL_FRAMES_MAX];
    const size_t n_bytes = kvl_bulk_size(op->body);
    if (n_bytes > p->peers[op->peer].task_bytes_max || n_bytes > KVL_TASK_BYTES_MAX) {
        kvl_op_fail(p, op, KVL_ERR_TOO_LARGE, "the task is larger than the peer takes");
        return;
    }
    const size_t n_frames = kvl_frames_cut(kvl_bulk_bytes(op->body), n_bytes, frames);
    kvl_message message = kvl_message_of(KVL_MESSAGE_TASK, op->request);
    message.task.body_bytes = n_bytes;
    const kvl_owner owner = {.bulk = op->body};
    (void)kvl_send(p, op->peer, &message, frames, n_frames, owner);
    op->sent = true;
    op->sent_ns = op->moved_ns = now_ns;
}

/* Also asked before the peer is up: a call right after the start of a process waits for the first
 * connection, one to a peer that was lost fails at once. */
void kvl_call_peer_up(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    const kvl_peer *peer = &p->peers[op->peer];
    if (peer->state == KVL_PEER_UP) {
        if (!op->sent) send_task(p, op, now_ns);
        return;
    }
    if (kvl_peer_is_expected(p, op->peer, now_ns)) return;
    KVL_NOTE(&op->cause, KVL_ERR_UNREACHABLE, "%s%.60s%s",
             peer->state == KVL_PEER_REFUSED ? "" : "peer ",
             peer->state == KVL_PEER_REFUSED ? "" : peer->name,
             peer->state == KVL_PEER_REFUSED ? peer->refusal.text : " is not up");
    kvl_op_fail(p, op, KVL_ERR_UNREACHABLE, op->cause.text);
}

/* Ends in failure; the peer need not keep the reply, or run on for us. */
static void end_call(kvl_protocol *p, kvl_op *op, kvl_status status, const char *text)
{
    if (op->sent && p->peers[op->peer].state == KVL_PEER_UP) {
        kvl_send_plain(p, op->peer, KVL_MESSAGE_TASK_DONE, op->request);
    }
    kvl_op_fail(p, op, status, text);
}

void kvl_call_answer(kvl_protocol *p, uint32_t peer, const kvl_message *message,
                     const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    kvl_op *op = kvl_op_find(p, message->request);
    if (op == NULL || op->kind != KVL_OP_CALL || op->request != message->request ||
        op->peer != peer) {
        /* A reply that nobody waits for need not be kept over there. */
        if (message->reply.status != KVL_IN_PROGRESS) {
            kvl_send_plain(p, peer, KVL_MESSAGE_TASK_DONE, message->request);
        }
        return;
    }
    op->moved_ns = now_ns;
    if (message->reply.status == KVL_IN_PROGRESS) return;
    if (message->reply.status < 0) {
        KVL_NOTE(&op->cause, message->reply.status, "%s", message->reply.text);
        end_call(p, op, message->reply.status, op->cause.text);
        return;
    }
    /* 64 frames of 1 MiB are 64 MiB, so this only guards the two limits against drifting apart. */
    const size_t n_bytes = kvl_frames_bytes(frames, n_frames);
    if (n_bytes > KVL_TASK_BYTES_MAX) {
        end_call(p, op, KVL_ERR_TOO_LARGE, "the reply is larger than a reply may be");
        return;
    }
    /* One byte more, so that an empty reply has memory too and a text ends with NUL. */
    uint8_t *reply = kvl_alloc(n_bytes + 1);
    if (reply == NULL) {
        end_call(p, op, KVL_ERR_NO_MEMORY, "no memory for the reply");
        return;
    }
    kvl_frames_join(frames, n_frames, reply);
    reply[n_bytes] = 0;
    kvl_send_plain(p, peer, KVL_MESSAGE_TASK_DONE, op->request);
    kvl_completion completion = {
        .status = KVL_OK, .from = p->peers[peer].name, .reply = reply, .n_reply_bytes = n_bytes};
    kvl_op_end(p, op, &completion);
}

void kvl_call_error(kvl_protocol *p, kvl_op *op, const kvl_message *message, int64_t now_ns)
{
    if (message->reply.status == KVL_ERR_NOT_FOUND) {
        send_task(p, op, now_ns); /* the first one was lost on the way */
        return;
    }
    KVL_NOTE(&op->cause, message->reply.status, "%s", message->reply.text);
    kvl_op_fail(p, op, message->reply.status, op->cause.text);
}

void kvl_call_tick(kvl_protocol *p, kvl_op *op, int64_t now_ns)
{
    if (now_ns >= op->deadline_ns) {
        end_call(p, op, KVL_ERR_TIMEOUT, "the deadline passed");
        return;
    }
    if (!op->sent) {
        kvl_call_peer_up(p, op, now_ns);
        return;
    }
    /* Polls start early, in case the task was lost, and become rare while it runs. */
    const int64_t pause_ns = op->n_retries == 0 ? p->timeout_ns / 4 : KVL_TASK_POLL_NS;
    if (now_ns - op->sent_ns < pause_ns) return;
    /* There is no timeout but the caller's deadline: a task may run for minutes, and whether its
     * host is still there is the link's concern. */
    op->n_retries++;
    op->sent_ns = now_ns;
    kvl_send_plain(p, op->peer, KVL_MESSAGE_TASK_POLL, op->request);
}
