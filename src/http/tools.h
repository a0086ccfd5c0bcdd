/* http/tools.h: functions that a model may call, in the way of ChatML models (Qwen2.5's template):
 * their signatures stand in the system's message, a call is JSON between <tool_call> marks in the
 * answer, and what a function gave is read between <tool_response> marks. Private to the room. */
#ifndef KVL_HTTP_TOOLS_H
#define KVL_HTTP_TOOLS_H

#include "http/api.h"

#define KVL_TOOLS_MAX 128u

/* Checks tools, tool_choice and the messages' tool_calls, and writes the messages anew, as texts of
 * system, user and assistant. A request that has none of these stays as it is.
 * Returns  false when it is refused: *error says why */
KVL_MUST_USE bool kvl_tools_translate(const kvl_engine *engine, kvl_api_request *request,
                                      kvl_api_error *error);

/* The calls in an answer's text [n_bytes], as OpenAI has them in tool_calls: between marks, or a
 * bare one that is the whole answer. NULL where there is none that is whole, is JSON, and names a
 * tool of the request. The caller's.
 * *n_before  how many bytes of content stand before the first call */
json_t *kvl_tools_calls(const kvl_api_request *request, const char *text, size_t n_bytes,
                        size_t *n_before);

/* How many bytes of a text that is still coming can be shown: nothing from where a call begins, or
 * may begin. */
size_t kvl_tools_shown(const char *text, size_t n_bytes);

#endif /* KVL_HTTP_TOOLS_H */
