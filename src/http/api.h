/* http/api.h: OpenAI's requests to generations, and events to OpenAI's answers. Private to the
 * room: knows JSON, knows nothing of sockets. */
#ifndef KVL_HTTP_API_H
#define KVL_HTTP_API_H

#include "host/service.h"

#include <jansson.h>

/* What becomes {"error": {"message", "type", "param", "code"}}. */
typedef struct kvl_api_error {
    unsigned http_status; /* 0: none */
    const char *type;     /* static text */
    const char *code;     /* static text, or NULL */
    char param[64];       /* the field, or "" */
    char message[KVL_ERROR_TEXT_MAX];
} kvl_api_error;

/* Fills *error and returns false, so that a refusal is one line. */
bool kvl_api_refuse(kvl_api_error *error, const char *param, const char *format, ...)
    KVL_PRINTF(3, 4);
/* Any status of KVLoom's own; param may be "". */
void kvl_api_error_from(kvl_api_error *error, kvl_status status, const char *param,
                        const char *text);
json_t *kvl_api_error_json(const kvl_api_error *error);

typedef enum kvl_api_kind {
    KVL_API_CHAT,
    KVL_API_TEXT,     /* completions */
    KVL_API_RESPONSE, /* a chat in other words: http/responses.h */
} kvl_api_kind;

/* One request for completions. */
typedef struct kvl_api_request {
    kvl_api_kind kind;
    bool is_chat, is_stream, with_usage; /* is_chat of a response too: it has messages */
    char id[48];
    char cache_salt[129];
    kvl_generation generation; /* ids and stops are those below; salt is the caller's to set */
    kvl_prompt prompt;
    const char **stops; /* borrowed from body */
    json_t *body;
    kvl_text_run *texts; /* [generation.n_texts]: contents of messages */
    const json_t *tools; /* functions that the model may call; borrowed from body; NULL: none */
    int64_t created_s, start_ns;
    const char *model_name; /* borrowed from the server */
} kvl_api_request;

/* Parses and checks a body [n_bytes] for /v1/chat/completions, /v1/completions or /v1/responses.
 * Owns     *request: ended with kvl_api_request_deinit, also after a refusal
 * Returns  false when it is refused: *error says why */
KVL_MUST_USE bool kvl_api_request_parse(const kvl_engine *engine, const char *model_name,
                                        kvl_api_kind kind, const char *body, size_t n_bytes,
                                        kvl_api_request *request, kvl_api_error *error);
/* Takes kvloom.quality, or `otherwise` where a chat names none that it could have, into a parsed
 * request; of one that is not exact its messages' contents become texts of the generation.
 * can_reuse  whether the service has a store of texts
 * Returns  false when it is refused */
KVL_MUST_USE bool kvl_api_request_reuse(kvl_api_request *request, kvl_reuse_quality otherwise,
                                        bool can_reuse, kvl_api_error *error);
/* False: no such quality. */
KVL_MUST_USE bool kvl_api_quality_of(const char *name, kvl_reuse_quality *quality);
const char *kvl_api_quality_name(kvl_reuse_quality quality);
void kvl_api_request_deinit(kvl_api_request *request);

/* A message's content: a text, or parts of type text, which are put together; ended with kvl_free.
 * NULL where a part is something else, or without memory. */
char *kvl_api_content(const json_t *content, size_t *n_bytes);

/* What an answer has come to so far. */
typedef struct kvl_api_choice {
    char *text; /* [n_text], grown; of a stream only where calls of tools may be in it */
    size_t n_text, text_max;
    size_t n_shown;   /* of a stream with tools: what has gone out */
    json_t *logprobs; /* array of entries so far, or NULL */
    kvl_finish finish;
    uint32_t n_tokens;
} kvl_api_choice;

typedef struct kvl_api_answer {
    kvl_api_choice choices[KVL_BRANCHES_MAX];
    uint32_t n_cached;
    kvl_reuse_report reuse;
    int64_t first_token_ns; /* 0: none yet */
} kvl_api_answer;

void kvl_api_answer_deinit(kvl_api_answer *answer);
/* Adds an event to what an answer has come to. False without memory. */
KVL_MUST_USE bool kvl_api_answer_add(kvl_api_answer *answer, const kvl_api_request *request,
                                     const kvl_tokenizer *tokenizer,
                                     const kvl_generation_event *event);

/* The whole answer. The caller's. */
json_t *kvl_api_whole(const kvl_api_request *request, const kvl_api_answer *answer);
/* Chunks of a stream, the caller's; kvl_api_answer_add comes first.
 * opening   the role of a chat's answer, for one choice
 * piece     an event's text, or its finish; NULL where there is nothing to say. With tools, text
 *           that may be a call is held back until it is known to be one, or none
 * usage     the last, without choices */
json_t *kvl_api_opening(const kvl_api_request *request, uint32_t choice);
json_t *kvl_api_piece(const kvl_api_request *request, kvl_api_answer *answer,
                      const kvl_tokenizer *tokenizer, const kvl_generation_event *event);
json_t *kvl_api_usage(const kvl_api_request *request, const kvl_api_answer *answer);

#endif /* KVL_HTTP_API_H */
