/* exchange/session.c: those who dialled us: their Hello, their questions to the part that answers.
 *
 * A session is opened by Hello and ends with a Goodbye, with silence, with a newer process of the
 * same host, or when the transport finds nobody there. Ending drops its streams and its replies. */
#include "exchange/protocol_state.h"

#include <inttypes.h>
#include <string.h>

void kvl_session_end(kvl_protocol *p, kvl_link link)
{
    kvl_session *session = kvl_session_of(p, link);
    if (!session->open) return;
    kvl_serve_end(p, link);
    kvl_task_end(p, link);
    kvl_bulk_reset(p, link);
    session->open = false;
}

static uint32_t peer_of_name(const kvl_protocol *p, const char *name)
{
    for (uint32_t i = 0; i < p->n_peers; i++) {
        if (strcmp(p->peers[i].name, name) == 0) return i;
    }
    return KVL_PEERS_MAX;
}

/* A host that restarted dials under a new identity, while its old session lingers. Clients that
 * merely share a name are left alone. */
static void end_older_sessions(kvl_protocol *p, kvl_link link)
{
    const kvl_session *fresh = kvl_session_of(p, link);
    if (fresh->peer == KVL_PEERS_MAX) return;
    for (uint32_t slot = 0; slot < KVL_CLIENTS_MAX; slot++) {
        const kvl_session *old = &p->sessions[slot];
        if (old == fresh || !old->open || old->peer != fresh->peer) continue;
        kvl_session_end(p, KVL_LINK_CLIENT + slot);
    }
}

static void open_session(kvl_protocol *p, kvl_link link, const kvl_message *message, bool shares_kv,
                         int64_t now_ns)
{
    kvl_session *session = kvl_session_of(p, link);
    const kvl_message_hello *hello = &message->hello;
    memset(session, 0, sizeof *session);
    session->open = true;
    session->shares_kv = shares_kv;
    session->serial = ++p->last_serial;
    session->epoch = message->epoch;
    memcpy(session->name, hello->name, sizeof session->name);
    session->peer = peer_of_name(p, hello->name);
    session->heard_ns = now_ns;
    end_older_sessions(p, link);
    kvl_bulk_agree(p, link, hello);
    kvl_report(p, KVL_LOG_INFO, "client_up", "client=%s epoch=%016" PRIx64, session->name,
               session->epoch);
}

/* A repeated Hello of the same process gets its Welcome again and changes nothing else: it may only
 * mean that our answer was late. */
static void take_hello(kvl_protocol *p, kvl_link link, const kvl_message *message, int64_t now_ns)
{
    kvl_session *session = kvl_session_of(p, link);
    const bool repeated = session->open && session->epoch == message->epoch;
    if (!repeated) {
        kvl_session_end(p, link);
        kvl_error error;
        bool shares_kv = false;
        const kvl_status status = kvl_hello_check(p, &message->hello, &shares_kv, &error);
        if (status < 0) {
            p->stats.peers_refused++;
            kvl_report(p, KVL_LOG_ERROR, "client_refused", "client=%s why=\"%s\"",
                       message->hello.name, error.text);
            kvl_send_error(p, link, message->request, status, "%s", error.text);
            return;
        }
        open_session(p, link, message, shares_kv, now_ns);
    }
    kvl_message welcome = kvl_message_of(KVL_MESSAGE_WELCOME, message->request);
    kvl_hello_fill(p, link, &welcome);
    (void)kvl_send(p, link, &welcome, NULL, 0, KVL_NO_OWNER);
}

static void take_announce(kvl_protocol *p, const kvl_session *session, const kvl_message *message)
{
    /* Only what we can ask for is worth remembering: the host must be a peer of ours, and up. */
    if (!session->shares_kv || session->peer == KVL_PEERS_MAX) return;
    if (p->peers[session->peer].state != KVL_PEER_UP) return;
    if (p->peers[session->peer].epoch != session->epoch) return;
    kvl_peer_directory_add(p->directory, &message->announce.id, session->peer);
}

/* Containers are spoken about only with those who run the same model. */
static bool may_share(kvl_protocol *p, kvl_link link, const kvl_message *message)
{
    const bool has_store = kvl_store_of(p, link) != NULL;
    if (kvl_session_of(p, link)->shares_kv && has_store) return true;
    kvl_send_error(p, link, message->request, has_store ? KVL_ERR_FOREIGN : KVL_ERR_UNSUPPORTED,
                   !has_store ? "%s has no store" : "%s runs a model, the asker named none",
                   p->name);
    return false;
}

/* Which right a message needs; 0: none. What is not named here needs all of them, so that a new
 * kind of message is closed until somebody has thought about it. */
static uint32_t right_for(kvl_message_kind kind)
{
    switch (kind) {
    case KVL_MESSAGE_PING:
    case KVL_MESSAGE_GOODBYE:
    case KVL_MESSAGE_ERROR: return 0;
    case KVL_MESSAGE_LOCATE:
    case KVL_MESSAGE_FETCH:
    case KVL_MESSAGE_CREDIT:
    case KVL_MESSAGE_CANCEL:
    case KVL_MESSAGE_LIST: return KVL_RIGHT_READ;
    case KVL_MESSAGE_ANNOUNCE: return KVL_RIGHT_WRITE;
    case KVL_MESSAGE_TASK:
    case KVL_MESSAGE_TASK_POLL:
    case KVL_MESSAGE_TASK_DONE: return KVL_RIGHT_ADMIN;
    default: return KVL_RIGHT_ALL;
    }
}

/* Not DENIED, which means that there is no session and asks for a new Hello. */
static bool has_right(kvl_protocol *p, kvl_link link, const kvl_message *message)
{
    const uint32_t needed = right_for(message->kind);
    const uint32_t rights = p->rights[link - KVL_LINK_CLIENT];
    if ((needed & ~rights) == 0) return true;
    p->stats.messages_refused++;
    kvl_report(p, KVL_LOG_WARN, "right_missing", "client=%s message=%s",
               kvl_session_of(p, link)->name, kvl_message_kind_name(message->kind));
    kvl_send_error(p, link, message->request, KVL_ERR_FORBIDDEN,
                   "the key of %s has no right to %s: ask whoever keeps the allow-list",
                   kvl_session_of(p, link)->name, kvl_message_kind_name(message->kind));
    return false;
}

static void take_question(kvl_protocol *p, kvl_link link, const kvl_message *message,
                          const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    switch (message->kind) {
    case KVL_MESSAGE_PING: kvl_send_plain(p, link, KVL_MESSAGE_PONG, message->request); return;
    case KVL_MESSAGE_GOODBYE: kvl_session_end(p, link); return;
    case KVL_MESSAGE_ANNOUNCE: take_announce(p, kvl_session_of(p, link), message); return;
    case KVL_MESSAGE_LOCATE:
        if (may_share(p, link, message)) kvl_serve_locate(p, link, message);
        return;
    case KVL_MESSAGE_FETCH:
        if (may_share(p, link, message)) kvl_serve_fetch(p, link, message, now_ns);
        return;
    case KVL_MESSAGE_CREDIT: kvl_serve_credit(p, link, message, now_ns); return;
    case KVL_MESSAGE_CANCEL: kvl_serve_cancel(p, link, message->request); return;
    case KVL_MESSAGE_LIST:
        if (may_share(p, link, message)) kvl_serve_list(p, link, message, frames, n_frames);
        return;
    case KVL_MESSAGE_TASK: kvl_task_receive(p, link, message, frames, n_frames); return;
    case KVL_MESSAGE_TASK_POLL: kvl_task_poll(p, link, message->request); return;
    case KVL_MESSAGE_TASK_DONE: kvl_task_done(p, link, message->request); return;
    case KVL_MESSAGE_ERROR:
        p->stats.messages_refused++;
        kvl_report(p, KVL_LOG_WARN, "client_complains", "client=%s status=%s text=\"%.300s\"",
                   kvl_session_of(p, link)->name, kvl_status_name(message->reply.status),
                   message->reply.text);
        return;
    default: break;
    }
    kvl_error error;
    KVL_NOTE(&error, KVL_ERR_MALFORMED, "%s is nothing that an asker sends",
             kvl_message_kind_name(message->kind));
    kvl_protocol_refuse(p, link, message->request, &error);
}

/* Without a session nothing is answered but the way to get one. This is also how an asker learns
 * that this process has restarted behind its back. */
void kvl_session_receive(kvl_protocol *p, kvl_link link, const kvl_message *message,
                         const kvl_frame *frames, size_t n_frames, int64_t now_ns)
{
    if (message->kind == KVL_MESSAGE_HELLO) {
        take_hello(p, link, message, now_ns);
        return;
    }
    kvl_session *session = kvl_session_of(p, link);
    if (!session->open) {
        if (message->kind == KVL_MESSAGE_ERROR || message->kind == KVL_MESSAGE_GOODBYE) return;
        kvl_send_error(p, link, message->request, KVL_ERR_DENIED,
                       "%s does not know this session: say Hello first", p->name);
        return;
    }
    if (message->epoch != session->epoch) {
        p->stats.messages_refused++; /* late, from an earlier process */
        return;
    }
    session->heard_ns = now_ns;
    if (!has_right(p, link, message)) return;
    take_question(p, link, message, frames, n_frames, now_ns);
}

void kvl_session_tick(kvl_protocol *p, kvl_link link, int64_t now_ns)
{
    kvl_session *session = kvl_session_of(p, link);
    if (session->gone || now_ns - session->heard_ns >= KVL_CLIENT_SILENCE_NS) {
        kvl_report(p, KVL_LOG_INFO, "client_lost", "client=%s", session->name);
        kvl_session_end(p, link);
        return;
    }
    kvl_serve_tick(p, link, now_ns);
}
