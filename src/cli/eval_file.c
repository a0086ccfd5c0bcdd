/* cli/eval_file.c: records of an evaluation in a file, one JSON object a line. */
#include "base/alloc.h"
#include "base/file.h"
#include "cli/eval.h"

#include <errno.h>
#include <jansson.h>
#include <string.h>

enum { FILE_BYTES_MAX = 1 << 28 };

typedef struct member {
    const char *name;
    size_t offset;
} member;

static const member members[] = {
    {"kl", offsetof(eval_record, kl)},
    {"top1", offsetof(eval_record, top1)},
    {"exact", offsetof(eval_record, exact)},
    {"right", offsetof(eval_record, right)},
    {"placed", offsetof(eval_record, placed)},
    {"recomputed", offsetof(eval_record, recomputed)},
    {"corrected", offsetof(eval_record, corrected)},
    {"ttft_ms", offsetof(eval_record, ttft_ms)},
    {"full_ttft_ms", offsetof(eval_record, full_ttft_ms)},
    {"passed", offsetof(eval_record, passed)},
    {"healed_first", offsetof(eval_record, healed_first)},
    {"passed_right", offsetof(eval_record, passed_right)},
    {"work", offsetof(eval_record, work)},
    {"drafted", offsetof(eval_record, drafted)},
    {"draft_kept", offsetof(eval_record, draft_kept)},
};
enum { N_MEMBERS = sizeof members / sizeof *members };

static bool write_record(FILE *file, const eval_record *record)
{
    char policy[EVAL_NAME_MAX];
    eval_policy_name(record->policy, policy, sizeof policy);
    json_t *line = json_pack("{s:s, s:s, s:i}", "scenario", eval_scenarios[record->scenario].name,
                             "policy", policy, "prompt", (int)record->prompt);
    for (size_t i = 0; i < N_MEMBERS; i++) {
        double value = 0.0;
        memcpy(&value, (const char *)record + members[i].offset, sizeof value);
        (void)json_object_set_new(line, members[i].name, json_real(value));
    }
    const bool is_written = json_dumpf(line, file, JSON_COMPACT) == 0 && fputc('\n', file) != EOF;
    json_decref(line);
    return is_written;
}

kvl_status eval_records_save(const eval_records *records, size_t first, const char *path,
                             kvl_error *error)
{
    FILE *file = fopen(path, "ae");
    if (file == NULL)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    bool is_written = true;
    for (size_t i = first; i < records->n && is_written; i++)
        is_written = write_record(file, &records->items[i]);
    if (fclose(file) == 0 && is_written) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

static bool find(const json_t *line, uint32_t *scenario, uint32_t *policy)
{
    const char *of = json_string_value(json_object_get(line, "scenario"));
    const char *by = json_string_value(json_object_get(line, "policy"));
    if (of == NULL || by == NULL) return false;
    for (*scenario = 0; eval_scenarios[*scenario].name != NULL; ++*scenario) {
        if (strcmp(eval_scenarios[*scenario].name, of) == 0) break;
    }
    return eval_policy_find(by, policy) && eval_scenarios[*scenario].name != NULL;
}

static bool read_record(const char *text, eval_record *record)
{
    json_t *line = json_loads(text, 0, NULL);
    const json_t *prompt = json_object_get(line, "prompt");
    bool is_right = find(line, &record->scenario, &record->policy) && json_is_integer(prompt);
    record->prompt = (uint32_t)json_integer_value(prompt);
    for (size_t i = 0; i < N_MEMBERS && is_right; i++) {
        const json_t *value = json_object_get(line, members[i].name);
        const double number = json_number_value(value);
        is_right = json_is_number(value);
        memcpy((char *)record + members[i].offset, &number, sizeof number);
    }
    json_decref(line);
    return is_right;
}

/* Numbers of prompts begin anew in every run: a number that falls back, or the same prompt under
 * full prefill once more, is another prompt. */
static kvl_status read_lines(eval_records *records, char *text, const char *path, kvl_error *error)
{
    uint32_t prompt = records->n == 0 ? 0 : records->items[records->n - 1].prompt + 1;
    uint32_t n_lines = 0, number_before = 0;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        eval_record record = {.prompt = 0};
        n_lines++;
        if (!read_record(line, &record))
            return KVL_FAIL(error, KVL_ERR_MALFORMED, "%s, line %u is no record of an evaluation",
                            path, n_lines);
        const bool is_next = record.policy == EVAL_POLICIES_MAX || record.prompt != number_before;
        if (n_lines > 1 && is_next) prompt++;
        number_before = record.prompt;
        record.prompt = prompt;
        KVL_TRY(eval_records_add(records, &record, error));
    }
    return KVL_OK;
}

kvl_status eval_records_load(eval_records *records, const char *path, kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    KVL_TRY(kvl_file_read(path, FILE_BYTES_MAX, &text, &n_bytes, error));
    const kvl_status status = read_lines(records, text, path, error);
    kvl_free(text);
    return status;
}
