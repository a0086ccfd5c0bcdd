/* exchange/peer.c: the hosts that we dial: greeting, liveness, and the way of their answers.
 *
 * away -> (connected) greeting -> (Welcome) up; a disconnection, a Goodbye, silence or another
 * epoch leads back. A peer that restarted is known by the epoch in every message that it sends. */
#include "exchange/protocol_state.h"

#include <inttypes.h>
#include <string.h>

void kvl_hello_fill(const kvl_protocol *p, kvl_link link, kvl_message *message)
{
    kvl_message_hello *hello = &message->hello;
    memset(hello, 0, sizeof *hello);
    hello->magic = KVL_PROTOCOL_MAGIC;
    hello->version_min = KVL_PROTOCOL_VERSION_MIN;
    hello->version_max = KVL_PROTOCOL_VERSION_MAX;
    memcpy(hello->name, p->name, sizeof p->name);
    hello->fingerprint = p->fingerprint;
    hello->frame_bytes_max = KVL_FRAME_BYTES_MAX;
    hello->window_bytes_max = KVL_CREDIT_BYTES_MAX;
    hello->task_bytes_max = KVL_TASK_BYTES_MAX;
    if (p->runs_tasks) memcpy(hello->features[hello->n_features++], "tasks", sizeof "tasks");
    if (p->store != NULL) memcpy(hello->features[hello->n_features++], "store", sizeof "store");
    if (p->output.bulk_offer != NULL) p->output.bulk_offer(p->output.context, link, &hello->bulk);
}

kvl_status kvl_hello_check(const kvl_protocol *p, const kvl_message_hello *hello, bool *shares_kv,
                           kvl_error *error)
{
    *shares_kv = false;
    if (hello->magic != KVL_PROTOCOL_MAGIC) {
        return KVL_FAIL(
            error, KVL_ERR_UNSUPPORTED,
            "magic %08x, a KVLoom host says %08x: something else speaks at this endpoint",
            hello->magic, KVL_PROTOCOL_MAGIC);
    }
    if (hello->version_min > KVL_PROTOCOL_VERSION_MAX ||
        hello->version_max < KVL_PROTOCOL_VERSION_MIN) {
        return KVL_FAIL(
            error, KVL_ERR_UNSUPPORTED,
            "%s speaks protocol versions %u to %u, %s speaks %u to %u: update the older one",
            hello->name, hello->version_min, hello->version_max, p->name, KVL_PROTOCOL_VERSION_MIN,
            KVL_PROTOCOL_VERSION_MAX);
    }
    *shares_kv = kvl_digest_equal(&hello->fingerprint, &p->fingerprint);
    /* Who has no model can still send tasks, or run them. */
    if (*shares_kv || kvl_digest_is_zero(&hello->fingerprint) ||
        kvl_digest_is_zero(&p->fingerprint)) {
        return KVL_OK;
    }
    char theirs[KVL_DIGEST_TEXT_BYTES], ours[KVL_DIGEST_TEXT_BYTES];
    return KVL_FAIL(
        error, KVL_ERR_FOREIGN,
        "model fingerprint of %s is %s, of %s it is %s: both must run the same model file",
        hello->name, kvl_digest_to_text(&hello->fingerprint, theirs), p->name,
        kvl_digest_to_text(&p->fingerprint, ours));
}

uint64_t kvl_peers_up(const kvl_protocol *p, bool sharing)
{
    uint64_t up = 0;
    for (uint32_t i = 0; i < p->n_peers; i++) {
        const kvl_peer *peer = &p->peers[i];
        if (peer->state == KVL_PEER_UP && (peer->shares_kv || !sharing)) up |= kvl_bit(i);
    }
    return up;
}

bool kvl_peer_is_expected(const kvl_protocol *p, uint32_t peer, int64_t now_ns)
{
    const kvl_peer *it = &p->peers[peer];
    if (it->ever_up || it->state == KVL_PEER_REFUSED) return false;
    return now_ns - p->started_ns < KVL_CONNECT_GRACE_NS;
}

bool kvl_peers_are_expected(const kvl_protocol *p, int64_t now_ns)
{
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if (kvl_peer_is_expected(p, i, now_ns)) return true;
    }
    return false;
}

/* Says Hello, for the first time or again. A peer that is up stays so meanwhile. */
void kvl_peer_greet(kvl_protocol *p, uint32_t index, int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    if (peer->state == KVL_PEER_AWAY) peer->state = KVL_PEER_GREETING;
    peer->hello_ns = now_ns;
    /* A repeated Hello keeps its number: its Welcome may take longer than our patience. */
    if (peer->hello_request == 0) peer->hello_request = ++p->last_number;
    kvl_message message = kvl_message_of(KVL_MESSAGE_HELLO, peer->hello_request);
    kvl_hello_fill(p, index, &message);
    (void)kvl_send(p, index, &message, NULL, 0, KVL_NO_OWNER);
}

/* Every request gets to know; a request may end here and its slot stay free. */
static void tell_ops_lost(kvl_protocol *p, uint32_t index, const char *why, int64_t now_ns)
{
    for (size_t i = 0; p->n_ops > 0 && i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind == KVL_OP_FETCH) kvl_fetch_peer_lost(p, op, index, now_ns);
        if (op->kind == KVL_OP_LIST) kvl_list_peer_lost(p, op, index, now_ns);
        if (op->kind == KVL_OP_CALL && op->peer == index) {
            KVL_NOTE(&op->cause, KVL_ERR_UNREACHABLE, "peer %s is gone: %s", p->peers[index].name,
                     why);
            kvl_op_fail(p, op, KVL_ERR_UNREACHABLE, op->cause.text);
        }
    }
}

static void lose(kvl_protocol *p, uint32_t index, kvl_log_level level, const char *why,
                 int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    const bool was_up = peer->state == KVL_PEER_UP;
    peer->state = peer->connected ? KVL_PEER_GREETING : KVL_PEER_AWAY;
    peer->hello_ns = now_ns;
    peer->hello_request = 0;
    peer->shares_kv = false;
    kvl_bulk_reset(p, index);
    if (!was_up) return;
    p->stats.peers_lost++;
    kvl_peer_directory_forget_peer(p->directory, index);
    kvl_report(p, level, "peer_lost", "peer=%s epoch=%016" PRIx64 " why=\"%s\"", peer->name,
               peer->epoch, why);
    tell_ops_lost(p, index, why, now_ns);
}

void kvl_peer_lose(kvl_protocol *p, uint32_t index, const char *why, int64_t now_ns)
{
    lose(p, index, KVL_LOG_WARN, why, now_ns);
}

/* For good: what was refused once is not asked again before the connection ends, so a wrong
 * configuration costs one line in the log and no traffic. */
static void refuse_peer(kvl_protocol *p, uint32_t index, const char *why, int64_t now_ns)
{
    kvl_peer_lose(p, index, why, now_ns);
    p->peers[index].state = KVL_PEER_REFUSED;
    p->stats.peers_refused++;
    kvl_report(p, KVL_LOG_ERROR, "peer_refused", "peer=%s why=\"%s\"", p->peers[index].name, why);
    for (size_t i = 0; p->n_ops > 0 && i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind == KVL_OP_CALL && op->peer == index) {
            kvl_op_fail(p, op, KVL_ERR_UNREACHABLE, p->peers[index].refusal.text);
        }
    }
}

static void take_welcome(kvl_protocol *p, uint32_t index, const kvl_message *message,
                         int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    const kvl_message_hello *hello = &message->hello;
    if (peer->hello_request == 0 || message->request != peer->hello_request) return;
    peer->hello_request = 0;
    if (peer->state == KVL_PEER_UP && peer->epoch == message->epoch) return;
    if (peer->state == KVL_PEER_UP) kvl_peer_lose(p, index, "it restarted", now_ns);

    bool shares_kv = false;
    kvl_status status = kvl_hello_check(p, hello, &shares_kv, &peer->refusal);
    if (status == KVL_OK && strcmp(hello->name, peer->name) != 0) {
        status = KVL_FAIL(&peer->refusal, KVL_ERR_INVALID,
                          "the endpoint of peer %s is answered by %s: check the configuration",
                          peer->name, hello->name);
    }
    if (status < 0) {
        kvl_send_error(p, index, message->request, status, "%.400s", peer->refusal.text);
        refuse_peer(p, index, peer->refusal.text, now_ns);
        return;
    }
    kvl_bulk_agree(p, index, hello);
    peer->state = KVL_PEER_UP;
    peer->ever_up = true;
    peer->shares_kv = shares_kv;
    peer->epoch = message->epoch;
    peer->heard_ns = peer->pinged_ns = now_ns;
    peer->task_bytes_max = hello->task_bytes_max;
    kvl_report(p, KVL_LOG_INFO, "peer_up", "peer=%s epoch=%016" PRIx64, peer->name, peer->epoch);
    for (size_t i = 0; p->n_ops > 0 && i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind == KVL_OP_FETCH) kvl_fetch_peer_up(p, op, now_ns);
        if (op->kind == KVL_OP_LIST) kvl_list_peer_up(p, op, now_ns);
        if (op->kind == KVL_OP_CALL && op->peer == index) kvl_call_peer_up(p, op, now_ns);
    }
}

static void take_error(kvl_protocol *p, uint32_t index, const kvl_message *message, int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    if (message->request != 0 && message->request == peer->hello_request &&
        peer->state == KVL_PEER_GREETING) {
        KVL_NOTE(&peer->refusal, message->reply.status, "peer %s refused us: %.400s", peer->name,
                 message->reply.text);
        refuse_peer(p, index, peer->refusal.text, now_ns);
        return;
    }
    if (message->reply.status == KVL_ERR_DENIED && peer->state == KVL_PEER_UP) {
        /* It does not know us any more: it restarted, or we were silent for too long. */
        kvl_peer_lose(p, index, "it forgot our session", now_ns);
        kvl_peer_greet(p, index, now_ns);
        return;
    }
    kvl_op *op = kvl_op_find(p, message->request);
    if (op == NULL) return;
    if (op->kind == KVL_OP_FETCH) {
        kvl_fetch_error(p, op, index, message, now_ns);
    } else if (op->request == message->request && op->kind == KVL_OP_LIST) {
        kvl_op_blame(p, op, index, message->reply.status, message->reply.text);
        kvl_list_tick(p, op, now_ns);
    } else if (op->request == message->request && op->peer == index) {
        kvl_call_error(p, op, message, now_ns);
    }
}

/* On a link that we dialled the other side only answers; anything else is a mistake of its. */
static void take_answer(kvl_protocol *p, uint32_t index, const kvl_message *message,
                        const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    switch (message->kind) {
    case KVL_MESSAGE_PONG: return;
    case KVL_MESSAGE_LOCATED: kvl_fetch_located(p, index, message, now_ns); return;
    case KVL_MESSAGE_FETCH_HEADER:
        kvl_fetch_header(p, index, message, frames, n_frames, now_ns);
        return;
    case KVL_MESSAGE_BLOCK: kvl_fetch_block(p, index, message, frames, now_ns); return;
    case KVL_MESSAGE_FETCH_DONE: kvl_fetch_done(p, index, message, now_ns); return;
    case KVL_MESSAGE_LISTED: kvl_list_answer(p, index, message, frames, n_frames, now_ns); return;
    case KVL_MESSAGE_TASK_REPLY:
        kvl_call_answer(p, index, message, frames, n_frames, now_ns);
        return;
    default: break;
    }
    kvl_error error;
    KVL_NOTE(&error, KVL_ERR_MALFORMED, "%s is nothing that a server sends",
             kvl_message_kind_name(message->kind));
    kvl_protocol_refuse(p, index, 0, &error);
}

void kvl_peer_receive(kvl_protocol *p, uint32_t index, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    if (message->kind == KVL_MESSAGE_WELCOME) {
        take_welcome(p, index, message, now_ns);
        return;
    }
    if (peer->state == KVL_PEER_UP && message->epoch != peer->epoch) {
        /* Either an old message came late or the process is a new one. A Hello finds out; until
         * its answer is here, nothing of the stranger is believed. */
        if (now_ns - peer->hello_ns >= KVL_HELLO_RETRY_NS) kvl_peer_greet(p, index, now_ns);
        return;
    }
    if (message->kind == KVL_MESSAGE_ERROR) {
        take_error(p, index, message, now_ns);
        return;
    }
    if (peer->state != KVL_PEER_UP) return;
    peer->heard_ns = now_ns;
    if (message->kind == KVL_MESSAGE_GOODBYE) {
        lose(p, index, KVL_LOG_INFO, "it said goodbye", now_ns);
        return;
    }
    take_answer(p, index, message, frames, n_frames, now_ns);
}

void kvl_peer_tick(kvl_protocol *p, uint32_t index, int64_t now_ns)
{
    kvl_peer *peer = &p->peers[index];
    switch (peer->state) {
    case KVL_PEER_AWAY:
    case KVL_PEER_REFUSED: return;
    case KVL_PEER_GREETING:
        if (now_ns - peer->hello_ns >= KVL_HELLO_RETRY_NS) kvl_peer_greet(p, index, now_ns);
        return;
    case KVL_PEER_UP: break;
    }
    if (now_ns - peer->heard_ns >= KVL_PEER_SILENCE_NS) {
        kvl_peer_lose(p, index, "it is silent", now_ns);
        return;
    }
    /* Any message is a sign of life; pings are for quiet links only. */
    if (now_ns - peer->heard_ns >= KVL_PING_NS && now_ns - peer->pinged_ns >= KVL_PING_NS) {
        peer->pinged_ns = now_ns;
        kvl_send_plain(p, index, KVL_MESSAGE_PING, 0);
    }
}
