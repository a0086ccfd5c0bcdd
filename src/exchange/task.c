/* exchange/task.c: tasks from those who dialled us. Each runs once, whatever arrives twice, and its
 * reply is kept until the asker has it.
 *
 * The numbers of an asker grow, so a ring of the latest ones and a floor below them are enough to
 * know a repetition. A place in the table is only free again when the handler has answered: the
 * handler's number for a task can never come to mean another one. */
#include "exchange/protocol_state.h"

#include <stdio.h>
#include <string.h>

uint32_t kvl_task_index(uint64_t task)
{
    return (uint32_t)(task % KVL_TASKS_MAX);
}

static uint64_t number_of(const kvl_protocol *p, const kvl_task *task)
{
    return task->generation * KVL_TASKS_MAX + (uint64_t)(task - p->tasks);
}

void kvl_task_free(kvl_protocol *p, kvl_task *task)
{
    if (task->body != NULL) p->reply_bytes_kept -= kvl_bulk_size(task->body);
    kvl_bulk_release(task->body);
    task->body = NULL;
    task->state = KVL_TASK_FREE;
}

static kvl_task *find_task(kvl_protocol *p, kvl_link link, uint64_t request)
{
    const uint64_t serial = kvl_session_of(p, link)->serial;
    for (size_t i = 0; i < KVL_TASKS_MAX; i++) {
        kvl_task *task = &p->tasks[i];
        if (task->state != KVL_TASK_FREE && !task->unwanted && task->link == link &&
            task->serial == serial && task->request == request) {
            return task;
        }
    }
    return NULL;
}

/* Whether the number came before, exactly for the latest ones and by order for older ones. */
static bool was_seen(const kvl_session *session, uint64_t request)
{
    if (session->n_tasks > KVL_TASKS_REMEMBERED && request <= session->task_floor) return true;
    for (size_t i = 0; i < KVL_TASKS_REMEMBERED && i < session->n_tasks; i++) {
        if (session->tasks[i] == request) return true;
    }
    return false;
}

static void remember(kvl_session *session, uint64_t request)
{
    uint64_t *place = &session->tasks[session->n_tasks % KVL_TASKS_REMEMBERED];
    if (session->n_tasks >= KVL_TASKS_REMEMBERED && *place > session->task_floor) {
        session->task_floor = *place;
    }
    *place = request;
    session->n_tasks++;
}

/* Drops the oldest reply that is kept; false when there is none. */
static bool drop_oldest_reply(kvl_protocol *p)
{
    kvl_task *oldest = NULL;
    for (size_t i = 0; i < KVL_TASKS_MAX; i++) {
        kvl_task *task = &p->tasks[i];
        if (task->state != KVL_TASK_REPLIED) continue;
        if (oldest == NULL || task->replied_ns < oldest->replied_ns) oldest = task;
    }
    if (oldest == NULL) return false;
    kvl_task_free(p, oldest);
    return true;
}

/* Replies that are only kept in case they were lost give way to tasks that want to run. */
static kvl_task *free_task(kvl_protocol *p)
{
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < KVL_TASKS_MAX; i++) {
            if (p->tasks[i].state == KVL_TASK_FREE) return &p->tasks[i];
        }
        if (!drop_oldest_reply(p)) return NULL;
    }
    return NULL;
}

static void send_reply(kvl_protocol *p, kvl_link link, uint64_t request, kvl_status status,
                       const char *text, kvl_bulk *body)
{
    kvl_frame frames[KVL_FRAMES_MAX];
    kvl_message message = kvl_message_of(KVL_MESSAGE_TASK_REPLY, request);
    message.reply.status = status;
    (void)snprintf(message.reply.text, sizeof message.reply.text, "%s", text);
    message.reply.body_bytes = body == NULL ? 0 : kvl_bulk_size(body);
    size_t n_frames = 0;
    if (body != NULL) {
        n_frames = kvl_frames_cut(kvl_bulk_bytes(body), kvl_bulk_size(body), frames);
    }
    const kvl_owner owner = {.bulk = body};
    (void)kvl_send(p, link, &message, frames, n_frames, owner);
}

/* Hands the body over in one piece; one frame, by far the most frequent case, is not copied. */
static void run(kvl_protocol *p, kvl_task *task, const kvl_frame *frames, size_t n_frames)
{
    const uint64_t number = number_of(p, task);
    if (n_frames <= 1) {
        const kvl_frame body = n_frames == 1 ? frames[0] : (kvl_frame){"", 0};
        p->output.task(p->output.context, number, body.bytes, body.n_bytes);
        return;
    }
    const size_t n_bytes = kvl_frames_bytes(frames, n_frames);
    kvl_bulk *joined = kvl_bulk_create(n_bytes);
    if (joined == NULL) {
        send_reply(p, task->link, task->request, KVL_ERR_BUSY, "no memory for the task", NULL);
        kvl_task_free(p, task);
        return;
    }
    kvl_frames_join(frames, n_frames, kvl_bulk_bytes(joined));
    p->output.task(p->output.context, number, kvl_bulk_bytes(joined), n_bytes);
    kvl_bulk_release(joined);
}

/* Answers for a task that arrived before. */
static void answer_again(kvl_protocol *p, kvl_link link, const kvl_task *task)
{
    if (task->state == KVL_TASK_RUNNING) {
        send_reply(p, link, task->request, KVL_IN_PROGRESS, "", NULL);
    } else {
        send_reply(p, link, task->request, task->status, task->text, task->body);
    }
}

void kvl_task_receive(kvl_protocol *p, kvl_link link, const kvl_message *message,
                      const kvl_frame *frames, size_t n_frames)
{
    kvl_session *session = kvl_session_of(p, link);
    const kvl_task *known = find_task(p, link, message->request);
    if (known != NULL) {
        answer_again(p, link, known);
        return;
    }
    if (was_seen(session, message->request)) return; /* it ran, and its asker is done with it */
    if (!p->runs_tasks || message->task.body_bytes > KVL_TASK_BYTES_MAX) {
        send_reply(
            p, link, message->request, p->runs_tasks ? KVL_ERR_TOO_LARGE : KVL_ERR_UNSUPPORTED,
            p->runs_tasks ? "the task is larger than 64 MiB" : "this host runs no tasks", NULL);
        return;
    }
    kvl_task *task = free_task(p);
    if (task == NULL) {
        send_reply(p, link, message->request, KVL_ERR_BUSY,
                   "as many tasks run already as this host takes", NULL);
        return;
    }
    remember(session, message->request);
    task->state = KVL_TASK_RUNNING;
    task->unwanted = false;
    task->generation++;
    task->link = link;
    task->serial = session->serial;
    task->request = message->request;
    run(p, task, frames, n_frames);
}

void kvl_task_poll(kvl_protocol *p, kvl_link link, uint64_t request)
{
    const kvl_task *task = find_task(p, link, request);
    if (task != NULL) {
        answer_again(p, link, task);
    } else if (was_seen(kvl_session_of(p, link), request)) {
        kvl_send_error(p, link, request, KVL_ERR_EXPIRED,
                       "the task ran, but its reply is not kept any more");
    } else {
        kvl_send_error(p, link, request, KVL_ERR_NOT_FOUND, "this task never arrived");
    }
}

/* A task that runs is not interrupted, it only loses its audience: handlers cannot be stopped. */
void kvl_task_done(kvl_protocol *p, kvl_link link, uint64_t request)
{
    kvl_task *task = find_task(p, link, request);
    if (task == NULL) return;
    if (task->state == KVL_TASK_RUNNING) {
        task->unwanted = true;
    } else {
        kvl_task_free(p, task);
    }
}

/* The session is over. Running tasks keep their places until their handlers answer. */
void kvl_task_end(kvl_protocol *p, kvl_link link)
{
    for (size_t i = 0; i < KVL_TASKS_MAX; i++) {
        kvl_task *task = &p->tasks[i];
        if (task->state == KVL_TASK_FREE || task->link != link) continue;
        if (task->state == KVL_TASK_RUNNING) task->unwanted = true;
        if (task->state == KVL_TASK_REPLIED) kvl_task_free(p, task);
    }
}

void kvl_task_tick(kvl_protocol *p, int64_t now_ns)
{
    for (size_t i = 0; i < KVL_TASKS_MAX; i++) {
        kvl_task *task = &p->tasks[i];
        if (task->state == KVL_TASK_REPLIED && now_ns - task->replied_ns >= KVL_REPLY_KEPT_NS) {
            kvl_task_free(p, task);
        }
    }
}

void kvl_protocol_reply(kvl_protocol *p, uint64_t number, kvl_status status, const char *text,
                        kvl_bulk *body, int64_t now_ns)
{
    kvl_task *task = &p->tasks[kvl_task_index(number)];
    if (task->state != KVL_TASK_RUNNING || number_of(p, task) != number) {
        kvl_bulk_release(body);
        return;
    }
    /* Whoever asked has given up or gone; this frees the place. */
    if (task->unwanted) {
        kvl_bulk_release(body);
        kvl_task_free(p, task);
        return;
    }
    task->state = KVL_TASK_REPLIED;
    task->status = status;
    task->replied_ns = now_ns;
    (void)snprintf(task->text, sizeof task->text, "%s", text == NULL ? "" : text);
    task->body = body;
    if (body != NULL) p->reply_bytes_kept += kvl_bulk_size(body);
    send_reply(p, task->link, task->request, status, task->text, body);
    while (p->reply_bytes_kept > KVL_REPLY_BYTES_KEPT_MAX && drop_oldest_reply(p)) continue;
}
