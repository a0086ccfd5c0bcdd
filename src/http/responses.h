/* http/responses.h: OpenAI's Responses API over the same requests and answers as chat (http/api.h).
 * Private to the room. A response is not kept: what refers to an earlier one is refused. */
#ifndef KVL_HTTP_RESPONSES_H
#define KVL_HTTP_RESPONSES_H

#include "http/api.h"

/* Turns the body of a response's request into that of a chat: instructions and input become
 * messages, max_output_tokens and text.format get the names that a chat has.
 * Returns  false when it is refused: *error says why */
KVL_MUST_USE bool kvl_responses_translate(kvl_api_request *request, kvl_api_error *error);
/* A chat's field in an error gets the name that the client knows. */
void kvl_responses_rename(kvl_api_error *error);

/* The whole response. The caller's. */
json_t *kvl_responses_whole(const kvl_api_request *request, const kvl_api_answer *answer);
/* Events of a stream, arrays of objects with their "type"; the caller's. *n_events counts them
 * over the whole stream. */
json_t *kvl_responses_opening(const kvl_api_request *request, const kvl_api_answer *answer,
                              uint32_t *n_events);
json_t *kvl_responses_piece(const kvl_api_request *request, const kvl_generation_event *event,
                            uint32_t *n_events);
json_t *kvl_responses_ending(const kvl_api_request *request, const kvl_api_answer *answer,
                             uint32_t *n_events);
/* The last, where the answer failed. */
json_t *kvl_responses_error(const kvl_api_error *error, uint32_t *n_events);

#endif /* KVL_HTTP_RESPONSES_H */
