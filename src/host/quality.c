/* host/quality.c: the book of what reuse cost. */
#include "host/quality.h"

#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "reuse/planner.h"

#include <jansson.h>
#include <string.h>

/* With each audit what was before counts 1 % less. */
static const double AUDIT_DECAY = 0.99;
enum { FILE_VERSION = 1, FILE_BYTES_MAX = 1 << 20 };

static kvl_error_model read_model(const json_t *list, const kvl_error_model *otherwise)
{
    kvl_error_model model = *otherwise;
    for (size_t a = 0; a < KVL_ACTIONS && json_array_size(list) == KVL_ACTIONS; a++) {
        const double kl = json_number_value(json_array_get(list, a));
        if (kl >= 0.0 && kl <= 10.0) model.kl[a] = kl;
    }
    return model;
}

static json_t *write_model(const kvl_error_model *model)
{
    json_t *list = json_array();
    for (size_t a = 0; a < KVL_ACTIONS; a++)
        (void)json_array_append_new(list, json_real(model->kl[a]));
    return list;
}

static void read_bins(const json_t *list, float *bins)
{
    for (size_t b = 0; b < KVL_GATE_BINS; b++) {
        const double n = json_number_value(json_array_get(list, b));
        bins[b] = n >= 0.0 && n < 1e9 ? (float)n : 0.0F;
    }
}

static json_t *write_bins(const float *bins)
{
    json_t *list = json_array();
    for (size_t b = 0; b < KVL_GATE_BINS; b++)
        (void)json_array_append_new(list, json_real((double)bins[b]));
    return list;
}

static void read_sums(const json_t *from, audit_sums *sums)
{
    const double n = json_number_value(json_object_get(from, "n"));
    const double kl = json_number_value(json_object_get(from, "kl"));
    const double top1 = json_number_value(json_object_get(from, "top1"));
    const double exact = json_number_value(json_object_get(from, "exact"));
    const json_int_t ever = json_integer_value(json_object_get(from, "ever"));
    if (!(n > 0.0 && n < 1e6 && kl >= 0.0 && kl < 1e9 && top1 >= 0.0 && top1 <= n + 1e-6 &&
          exact >= 0.0 && exact <= n + 1e-6 && ever > 0))
        return;
    *sums = (audit_sums){n, kl, top1, exact, (uint64_t)ever};
}

static void read_entry(quality_book *book, const json_t *from)
{
    const char *name = json_string_value(json_object_get(from, "name"));
    if (name == NULL || strlen(name) >= QUALITY_NAME || book->n == QUALITY_KEYS_MAX) return;
    quality_entry *entry = &book->entries[book->n++];
    *entry = (quality_entry){.last_use = ++book->tick};
    memcpy(entry->name, name, strlen(name) + 1);
    entry->errors = read_model(json_object_get(from, "errors"), &book->errors);
    read_bins(json_object_get(from, "right"), entry->gate.right);
    read_bins(json_object_get(from, "wrong"), entry->gate.wrong);
    for (size_t a = 0; a < KVL_ACTIONS; a++)
        read_sums(json_array_get(json_object_get(from, "audits"), a), &entry->audits[a]);
}

static json_t *write_entry(const quality_entry *entry)
{
    json_t *audits = json_array();
    for (size_t a = 0; a < KVL_ACTIONS; a++) {
        const audit_sums *s = &entry->audits[a];
        (void)json_array_append_new(audits, json_pack("{s:f, s:f, s:f, s:f, s:I}", "n", s->n, "kl",
                                                      s->kl, "top1", s->top1, "exact", s->exact,
                                                      "ever", (json_int_t)s->n_ever));
    }
    return json_pack("{s:s, s:o, s:o, s:o, s:o}", "name", entry->name, "errors",
                     write_model(&entry->errors), "right", write_bins(entry->gate.right), "wrong",
                     write_bins(entry->gate.wrong), "audits", audits);
}

static void read_book(quality_book *book, const char *model)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    kvl_error error = {0};
    const kvl_status status = kvl_file_read(book->path, FILE_BYTES_MAX, &bytes, &n_bytes, &error);
    if (status == KVL_ERR_NOT_FOUND) return;
    json_t *root =
        status == KVL_OK ? json_loadb(bytes, n_bytes, JSON_REJECT_DUPLICATES, NULL) : NULL;
    kvl_free(bytes);
    const char *of = json_string_value(json_object_get(root, "model"));
    if (json_integer_value(json_object_get(root, "version")) != FILE_VERSION || of == NULL ||
        strcmp(of, model) != 0) {
        kvl_log(KVL_LOG_WARN, "quality_not_loaded", "path=%s remedy=\"begun anew\"", book->path);
        json_decref(root);
        return;
    }
    book->errors = read_model(json_object_get(root, "errors"), &book->errors);
    const json_t *entries = json_object_get(root, "entries");
    for (size_t i = 0; i < json_array_size(entries); i++)
        read_entry(book, json_array_get(entries, i));
    json_decref(root);
}

kvl_status quality_init(quality_book *book, const char *directory, double audit_share,
                        const char *model, kvl_error *error)
{
    *book = (quality_book){.gate = kvl_gate_default_options(),
                           .errors = kvl_error_model_first(),
                           .audit_share = audit_share};
    kvl_random_secret(&book->random.state, sizeof book->random.state);
    if (directory == NULL) return KVL_OK;
    static const char FILE_NAME[] = "/quality.json";
    const size_t n = strlen(directory);
    book->path = kvl_alloc(n + sizeof FILE_NAME);
    if (book->path == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a path");
    memcpy(book->path, directory, n);
    memcpy(book->path + n, FILE_NAME, sizeof FILE_NAME);
    read_book(book, model);
    return KVL_OK;
}

void quality_deinit(quality_book *book)
{
    kvl_free(book->path);
    book->path = NULL;
}

void quality_save(const quality_book *book, const char *model)
{
    if (book->path == NULL || book->n == 0) return;
    json_t *entries = json_array();
    for (uint32_t i = 0; i < book->n; i++)
        (void)json_array_append_new(entries, write_entry(&book->entries[i]));
    json_t *root = json_pack("{s:i, s:s, s:o, s:o}", "version", FILE_VERSION, "model", model,
                             "errors", write_model(&book->errors), "entries", entries);
    char *text = root == NULL ? NULL : json_dumps(root, JSON_INDENT(1));
    kvl_error error = {.text = "no memory"};
    kvl_status status = KVL_ERR_NO_MEMORY;
    if (text != NULL) status = kvl_file_write(book->path, text, strlen(text), &error);
    if (status != KVL_OK)
        kvl_log(KVL_LOG_WARN, "quality_not_saved", "path=%s text=\"%s\"", book->path, error.text);
    free(text); /* tidy: free, the JSON library allocated it */
    json_decref(root);
}

/* Names go into metrics and a file: what could break a line there is replaced. */
static void name_of(char *name, const char *workflow, const char *template_name)
{
    (void)snprintf(name, QUALITY_NAME, "%.64s/%.64s", workflow, template_name);
    for (char *c = name; *c != '\0'; c++) {
        if ((unsigned char)*c < 0x20 || (unsigned char)*c >= 0x7F || *c == '"' || *c == '\\')
            *c = '_';
    }
}

quality_entry *quality_find(quality_book *book, const char *workflow, const char *template_name)
{
    char name[QUALITY_NAME];
    name_of(name, workflow, template_name);
    quality_entry *oldest = &book->entries[0];
    for (uint32_t i = 0; i < book->n; i++) {
        quality_entry *entry = &book->entries[i];
        if (entry->last_use < oldest->last_use) oldest = entry;
        if (strcmp(entry->name, name) != 0) continue;
        entry->last_use = ++book->tick;
        return entry;
    }
    quality_entry *made = book->n < QUALITY_KEYS_MAX ? &book->entries[book->n++] : oldest;
    *made = (quality_entry){.last_use = ++book->tick, .errors = book->errors};
    memcpy(made->name, name, strlen(name) + 1);
    return made;
}

bool quality_draws_audit(quality_book *book)
{
    return (double)kvl_random_uniform(&book->random) < book->audit_share;
}

static uint32_t largest(const double *shares)
{
    uint32_t best = KVL_ACTION_PLACE;
    for (uint32_t a = KVL_ACTION_PLACE; a < KVL_ACTIONS; a++) {
        if (shares[a] > shares[best]) best = a;
    }
    return best;
}

void quality_learn_audit(quality_book *book, quality_entry *entry, const audit_result *result)
{
    if (!result->has_kl) return;
    kvl_error_learn(&book->errors, result->shares, result->kl);
    kvl_error_learn(&entry->errors, result->shares, result->kl);
    audit_sums *sums = &entry->audits[largest(result->shares)];
    sums->n = sums->n * AUDIT_DECAY + 1.0;
    sums->kl = sums->kl * AUDIT_DECAY + result->kl;
    sums->top1 = sums->top1 * AUDIT_DECAY + result->top1;
    sums->exact = sums->exact * AUDIT_DECAY + (result->is_exact ? 1.0 : 0.0);
    sums->n_ever++;
    book->n_audits++;
}

float quality_bar(const quality_book *book, const quality_entry *entry)
{
    return kvl_gate_bar(&entry->gate, &book->gate);
}

static quality_row row_of(const quality_book *book, const quality_entry *entry, uint32_t action)
{
    const audit_sums *sums = &entry->audits[action];
    quality_row row = {.action = action,
                       .n_audited = sums->n_ever,
                       .kl = sums->kl / sums->n,
                       .top1 = sums->top1 / sums->n,
                       .exact = sums->exact / sums->n,
                       .bar = (double)quality_bar(book, entry)};
    memcpy(row.name, entry->name, sizeof row.name);
    return row;
}

uint32_t quality_rows(const quality_book *book, quality_row *rows)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < book->n; i++) {
        for (uint32_t a = 0; a < KVL_ACTIONS; a++) {
            if (book->entries[i].audits[a].n_ever > 0)
                rows[n++] = row_of(book, &book->entries[i], a);
        }
    }
    return n;
}

static kvl_status add_audit(const quality_row *row, Kvloom__V1__StatusReply *status,
                            kvl_error *error)
{
    Kvloom__V1__AuditReport *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    kvloom__v1__audit_report__init(made);
    status->audits[status->n_audits++] = made;
    made->key = kvl_strdup(row->name);
    if (made->key == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    made->action = (Kvloom__V1__Action)row->action;
    made->audited = row->n_audited;
    made->kl = row->kl;
    made->top1_agreement = row->top1;
    made->exact_match = row->exact;
    made->gate_bar = (float)row->bar;
    return KVL_OK;
}

kvl_status quality_fill_status(const quality_book *book, Kvloom__V1__StatusReply *status,
                               kvl_error *error)
{
    status->gated = book->n_gated;
    status->healed_first = book->n_healed_first;
    status->audits_skipped = book->n_audits_skipped;
    const size_t n_max = (size_t)QUALITY_KEYS_MAX * KVL_ACTIONS;
    status->audits = kvl_alloc_zero(n_max, sizeof *status->audits);
    quality_row *rows = kvl_alloc_zero(n_max, sizeof *rows);
    kvl_status filled = KVL_OK;
    if (status->audits == NULL || rows == NULL)
        filled = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a reply");
    const uint32_t n = filled == KVL_OK ? quality_rows(book, rows) : 0;
    for (uint32_t i = 0; i < n && filled == KVL_OK; i++)
        filled = add_audit(&rows[i], status, error);
    kvl_free(rows);
    return filled;
}

void quality_free_status(Kvloom__V1__StatusReply *status)
{
    for (size_t i = 0; i < status->n_audits; i++) {
        kvl_free(status->audits[i]->key);
        kvl_free(status->audits[i]);
    }
    kvl_free(status->audits);
}
