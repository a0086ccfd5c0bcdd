/* cli/explain_html.h: a plan as one HTML file: what each part cost, and the prompt token by token,
 * coloured by how its KV was had. Private to the room. */
#ifndef KVL_CLI_EXPLAIN_HTML_H
#define KVL_CLI_EXPLAIN_HTML_H

#include "base/status.h"
#include "host.pb-c.h"

/* Needs nothing else to be shown: no scripts, no fonts, nothing from a network. Texts are escaped;
 * bytes that are no UTF-8 are shown as U+FFFD.
 * Errors   KVL_ERR_IO, KVL_ERR_NO_MEMORY, KVL_ERR_MALFORMED (texts and tokens do not fit) */
KVL_MUST_USE kvl_status kvl_explain_html_write(const Kvloom__V1__PlanReply *plan, const char *path,
                                               kvl_error *error);

#endif /* KVL_CLI_EXPLAIN_HTML_H */
