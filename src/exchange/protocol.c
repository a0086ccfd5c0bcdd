/* exchange/protocol.c: events to the part that they concern, and local requests.
 *
 * A request lives in a slot of `ops`; the low bits of every request number are the slot, so that a
 * reply finds its request without a search, and the high bits never repeat, so that a late reply
 * finds out that it is late. */
#include "exchange/protocol_state.h"

#include "base/alloc.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

kvl_status kvl_protocol_create(const kvl_protocol_options *options, int64_t now_ns,
                               kvl_protocol **protocol)
{
    KVL_ASSERT(options->n_peers <= KVL_PEERS_MAX && options->epoch != 0);
    KVL_ASSERT(kvl_name_is_valid(options->name) && options->timeout_ms > 0);
    *protocol = NULL;
    kvl_protocol *p = kvl_alloc_zero(1, sizeof *p);
    if (p == NULL) return KVL_ERR_NO_MEMORY;
    p->directory = kvl_peer_directory_create(options->seed);
    if (p->directory == NULL) {
        kvl_free(p);
        return KVL_ERR_NO_MEMORY;
    }
    memcpy(p->name, options->name, strlen(options->name) + 1);
    p->epoch = options->epoch;
    p->fingerprint = options->fingerprint;
    p->store = options->store;
    p->runs_tasks = options->runs_tasks;
    p->timeout_ns = (int64_t)options->timeout_ms * KVL_NS_PER_MS;
    p->started_ns = now_ns;
    p->ticked_ns = now_ns;
    p->output = options->output;
    p->n_peers = (uint32_t)options->n_peers;
    for (uint32_t i = 0; i < p->n_peers; i++) {
        KVL_ASSERT(kvl_name_is_valid(options->peers[i]));
        memcpy(p->peers[i].name, options->peers[i], strlen(options->peers[i]) + 1);
    }
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        p->rights[slot] = KVL_RIGHT_ALL;
        p->stores[slot] = p->store;
    }
    *protocol = p;
    return KVL_OK;
}

void kvl_protocol_destroy(kvl_protocol *p)
{
    if (p == NULL) return;
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        kvl_session_end(p, KVL_LINK_CLIENT + slot);
    }
    for (size_t i = 0; i < KVL_TASKS_MAX; i++) kvl_task_free(p, &p->tasks[i]);
    for (size_t i = 0; i < KVL_OPS_MAX; i++) {
        kvl_container_release(p->ops[i].container);
        kvl_bulk_release(p->ops[i].body);
        kvl_free(p->ops[i].ids);
    }
    kvl_peer_directory_destroy(p->directory);
    kvl_free(p);
}

void kvl_protocol_set_access(kvl_protocol *p, kvl_link link, uint32_t rights, kvl_tier *store)
{
    KVL_ASSERT(link >= KVL_LINK_CLIENT && link < KVL_LINKS_MAX);
    p->rights[link - KVL_LINK_CLIENT] = rights;
    p->stores[link - KVL_LINK_CLIENT] = store;
}

/* ---- output ---- */

void kvl_bulk_reset(const kvl_protocol *p, kvl_link link)
{
    if (p->output.bulk_reset != NULL) p->output.bulk_reset(p->output.context, link);
}

void kvl_bulk_agree(const kvl_protocol *p, kvl_link link, const kvl_message_hello *hello)
{
    if (p->output.bulk_agree != NULL) p->output.bulk_agree(p->output.context, link, &hello->bulk);
}

kvl_message kvl_message_of(kvl_message_kind kind, uint64_t request)
{
    kvl_message message;
    /* Only the head is cleared: the union is several hundred bytes, and each kind fills its own. */
    message.kind = kind;
    message.epoch = 0;
    message.request = request;
    return message;
}

kvl_status kvl_send(kvl_protocol *p, kvl_link link, kvl_message *message, const kvl_frame *frames,
                    size_t n_frames, kvl_owner owner)
{
    message->epoch = p->epoch;
    const kvl_status status =
        p->output.send(p->output.context, link, message, frames, n_frames, owner);
    if (status == KVL_ERR_UNREACHABLE && link >= KVL_LINK_CLIENT) {
        kvl_session_of(p, link)->gone = true;
    }
    return status;
}

void kvl_send_plain(kvl_protocol *p, kvl_link link, kvl_message_kind kind, uint64_t request)
{
    kvl_message message = kvl_message_of(kind, request);
    (void)kvl_send(p, link, &message, NULL, 0, KVL_NO_OWNER);
}

void kvl_send_error(kvl_protocol *p, kvl_link link, uint64_t request, kvl_status status,
                    const char *format, ...)
{
    kvl_message message = kvl_message_of(KVL_MESSAGE_ERROR, request);
    message.reply.status = status;
    message.reply.body_bytes = 0;
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(message.reply.text, sizeof message.reply.text, format, arguments);
    va_end(arguments);
    (void)kvl_send(p, link, &message, NULL, 0, KVL_NO_OWNER);
}

void kvl_report(kvl_protocol *p, kvl_log_level level, const char *event, const char *format, ...)
{
    char text[KVL_ERROR_TEXT_MAX];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    p->output.event(p->output.context, level, event, text);
}

/* ---- local requests ---- */

uint64_t kvl_op_number(kvl_protocol *p, const kvl_op *op)
{
    p->last_number++;
    return p->last_number * KVL_OPS_MAX + (uint64_t)(op - p->ops);
}

kvl_op *kvl_op_find(kvl_protocol *p, uint64_t request)
{
    kvl_op *op = &p->ops[request % KVL_OPS_MAX];
    return op->kind == KVL_OP_FREE ? NULL : op;
}

/* The slot is freed before the completion goes out, so that a caller who asks again at once finds
 * room even when all slots were taken. */
void kvl_op_end(kvl_protocol *p, kvl_op *op, kvl_completion *completion)
{
    if (op->kind == KVL_OP_FETCH) kvl_fetch_leave(p, op);
    completion->waiter = op->waiter;
    if (completion->container == op->container) op->container = NULL;
    if (completion->ids == op->ids) op->ids = NULL;
    kvl_container_release(op->container);
    kvl_bulk_release(op->body);
    kvl_free(op->ids);
    op->container = NULL;
    op->body = NULL;
    op->ids = NULL;
    op->kind = KVL_OP_FREE;
    p->n_ops--;
    p->output.complete(p->output.context, completion);
}

void kvl_op_fail(kvl_protocol *p, kvl_op *op, kvl_status status, const char *text)
{
    if (op->kind == KVL_OP_FETCH && status != KVL_ERR_NOT_FOUND) p->stats.fetches_failed++;
    kvl_completion completion = {.status = status, .text = text};
    kvl_op_end(p, op, &completion);
}

void kvl_op_blame(kvl_protocol *p, kvl_op *op, uint32_t peer, kvl_status status, const char *text)
{
    op->failed |= kvl_bit(peer);
    KVL_NOTE(&op->cause, status, "peer %s: %.400s", p->peers[peer].name, text);
}

/* NULL, with a completion on its way, when all slots are taken: back-pressure and never growth. */
static kvl_op *take_op(kvl_protocol *p, kvl_op_kind kind, void *waiter, int64_t deadline_ns,
                       int64_t now_ns)
{
    for (size_t i = 0; i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind != KVL_OP_FREE) continue;
        memset(op, 0, sizeof *op);
        op->kind = kind;
        op->waiter = waiter;
        op->order = ++p->last_number;
        op->deadline_ns = deadline_ns;
        op->asked_ns = op->sent_ns = op->moved_ns = now_ns;
        op->request = kvl_op_number(p, op);
        p->n_ops++;
        return op;
    }
    char text[128];
    (void)snprintf(text, sizeof text, "%u requests are open already, the most there can be",
                   KVL_OPS_MAX);
    const kvl_completion busy = {.waiter = waiter, .status = KVL_ERR_BUSY, .text = text};
    p->output.complete(p->output.context, &busy);
    return NULL;
}

void kvl_protocol_fetch(kvl_protocol *p, void *waiter, const kvl_digest *id, int64_t deadline_ns,
                        int64_t now_ns)
{
    kvl_op *op = take_op(p, KVL_OP_FETCH, waiter, deadline_ns, now_ns);
    if (op == NULL) return;
    op->id = *id;
    op->holders = kvl_peer_directory_find(p->directory, id);
    kvl_fetch_peer_up(p, op, now_ns);
}

void kvl_protocol_list(kvl_protocol *p, void *waiter, kvl_container_kind kind, const void *prefix,
                       size_t n_prefix_bytes, int64_t deadline_ns, int64_t now_ns)
{
    KVL_ASSERT(n_prefix_bytes <= KVL_LIST_PREFIX_BYTES_MAX);
    kvl_op *op = take_op(p, KVL_OP_LIST, waiter, deadline_ns, now_ns);
    if (op == NULL) return;
    op->wanted_kind = kind;
    if (n_prefix_bytes > 0) memcpy(op->prefix, prefix, n_prefix_bytes);
    op->n_prefix_bytes = n_prefix_bytes;
    kvl_list_peer_up(p, op, now_ns);
}

void kvl_protocol_call(kvl_protocol *p, void *waiter, uint32_t peer, kvl_bulk *body,
                       int64_t deadline_ns, int64_t now_ns)
{
    KVL_ASSERT(peer < p->n_peers);
    kvl_op *op = take_op(p, KVL_OP_CALL, waiter, deadline_ns, now_ns);
    if (op == NULL) return;
    kvl_bulk_share(body);
    op->peer = peer;
    op->body = body;
    kvl_call_peer_up(p, op, now_ns);
}

/* Nobody answers an announcement and nothing repeats it: a peer that misses it will ask everybody
 * when it needs the container. */
void kvl_protocol_announce(kvl_protocol *p, const kvl_digest *id, kvl_container_kind kind)
{
    const uint64_t up = kvl_peers_up(p, true);
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if ((up & kvl_bit(i)) == 0) continue;
        kvl_message message = kvl_message_of(KVL_MESSAGE_ANNOUNCE, 0);
        message.announce.id = *id;
        message.announce.kind = kind;
        (void)kvl_send(p, i, &message, NULL, 0, KVL_NO_OWNER);
    }
}

/* ---- events ---- */

void kvl_protocol_connected(kvl_protocol *p, kvl_link link, int64_t now_ns)
{
    KVL_ASSERT(link < p->n_peers);
    if (p->peers[link].connected) kvl_peer_lose(p, link, "connected anew", now_ns);
    p->peers[link].connected = true;
    kvl_peer_greet(p, link, now_ns);
}

void kvl_protocol_disconnected(kvl_protocol *p, kvl_link link, int64_t now_ns)
{
    if (link >= KVL_LINK_CLIENT) {
        kvl_session_end(p, link);
        return;
    }
    KVL_ASSERT(link < p->n_peers);
    p->peers[link].connected = false;
    kvl_peer_lose(p, link, "the connection ended", now_ns);
}

void kvl_protocol_receive(kvl_protocol *p, kvl_link link, const kvl_message *message,
                          const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    if (link >= KVL_LINK_CLIENT) {
        kvl_session_receive(p, link, message, frames, n_frames, now_ns);
    } else {
        KVL_ASSERT(link < p->n_peers);
        kvl_peer_receive(p, link, message, frames, n_frames, now_ns);
    }
}

/* An Error is never answered with an Error, so two sides cannot keep each other busy with them. */
void kvl_protocol_refuse(kvl_protocol *p, kvl_link link, uint64_t request, const kvl_error *error)
{
    p->stats.messages_refused++;
    kvl_report(p, KVL_LOG_WARN, "message_refused", "link=%u status=%s text=\"%.300s\"", link,
               kvl_status_name(error->status), error->text);
    kvl_send_error(p, link, request, error->status, "%.400s", error->text);
}

/* If this process did not run for a while, the others may well have spoken: their silence is
 * counted from now on, not from before. */
static void forgive_pause(kvl_protocol *p, int64_t now_ns)
{
    const int64_t pause_ns = now_ns - p->ticked_ns;
    p->ticked_ns = now_ns;
    if (pause_ns <= KVL_PING_NS) return;
    for (uint32_t i = 0; i < p->n_peers; i++) p->peers[i].heard_ns += pause_ns;
    for (size_t i = 0; i < KVL_CLIENTS_MAX; i++) p->sessions[i].heard_ns += pause_ns;
    for (size_t i = 0; i < KVL_OPS_MAX; i++) {
        p->ops[i].asked_ns += pause_ns;
        p->ops[i].moved_ns += pause_ns;
    }
}

void kvl_protocol_tick(kvl_protocol *p, int64_t now_ns)
{
    forgive_pause(p, now_ns);
    for (uint32_t i = 0; i < p->n_peers; i++) kvl_peer_tick(p, i, now_ns);
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        if (p->sessions[slot].open) kvl_session_tick(p, KVL_LINK_CLIENT + slot, now_ns);
    }
    for (size_t i = 0; p->n_ops > 0 && i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind == KVL_OP_FETCH) kvl_fetch_tick(p, op, now_ns);
        if (op->kind == KVL_OP_LIST) kvl_list_tick(p, op, now_ns);
        if (op->kind == KVL_OP_CALL) kvl_call_tick(p, op, now_ns);
    }
    kvl_fetch_kick(p, now_ns);
    kvl_task_tick(p, now_ns);
}

bool kvl_protocol_work(kvl_protocol *p, int64_t now_ns)
{
    (void)now_ns;
    return p->n_listings > 0 && kvl_serve_work(p);
}

/* Goodbye on both kinds of links: those who asked us know at once that nothing will come, those
 * whom we asked can drop what they keep for us. */
void kvl_protocol_stop(kvl_protocol *p)
{
    for (size_t i = 0; i < KVL_OPS_MAX; i++) {
        kvl_op *op = &p->ops[i];
        if (op->kind != KVL_OP_FREE)
            kvl_op_fail(p, op, KVL_ERR_CANCELLED, "the exchange is ending");
    }
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if (p->peers[i].connected) kvl_send_plain(p, i, KVL_MESSAGE_GOODBYE, 0);
    }
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        const kvl_link link = KVL_LINK_CLIENT + slot;
        if (p->sessions[slot].open) kvl_send_plain(p, link, KVL_MESSAGE_GOODBYE, 0);
    }
}

/* ---- looking ---- */

bool kvl_protocol_peer_is_up(const kvl_protocol *p, uint32_t peer)
{
    return peer < p->n_peers && p->peers[peer].state == KVL_PEER_UP;
}

uint64_t kvl_protocol_announced(kvl_protocol *p, const kvl_digest *id)
{
    return kvl_peer_directory_find(p->directory, id);
}

bool kvl_protocol_client_is_open(const kvl_protocol *p, kvl_link link)
{
    return p->sessions[link - KVL_LINK_CLIENT].open;
}

bool kvl_protocol_is_active(const kvl_protocol *p)
{
    return p->n_ops > 0 || p->n_streams > 0 || p->n_listings > 0;
}

const kvl_exchange_stats *kvl_protocol_stats(const kvl_protocol *p)
{
    return &p->stats;
}
