/* http/files.c: the index in memory, and what lies on the disk behind it. */
#include "http/files.h"

#include "base/alloc.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { ID_DIGITS = 24, METADATA_BYTES_MAX = 4096 };

typedef struct entry {
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    kvl_http_file file;
} entry;

struct kvl_http_files {
    char root[PATH_MAX];
    uint64_t tenant_bytes_max;
    pthread_mutex_t lock; /* of what follows */
    entry *entries;       /* [n_entries], oldest first */
    size_t n_entries, entries_max;
    kvl_http_incoming *incoming; /* not ended */
};

struct kvl_http_incoming {
    kvl_http_incoming *next;
    kvl_http_files *files;
    kvl_file_writer writer;
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    uint64_t n_bytes;
    bool is_own;
};

static const char *const purposes[] = {"batch", "batch_output"};

/* ---- names ---- */

static const char hexadecimal[] = "0123456789abcdef";

void kvl_http_id_make(const char *prefix, char *id)
{
    uint8_t secret[ID_DIGITS / 2];
    kvl_random_secret(secret, sizeof secret);
    const size_t n = strlen(prefix);
    KVL_ASSERT(n + ID_DIGITS < KVL_HTTP_ID_BYTES);
    memcpy(id, prefix, n);
    for (size_t i = 0; i < ID_DIGITS; i++)
        id[n + i] = hexadecimal[i % 2 == 0 ? secret[i / 2] >> 4 : secret[i / 2] & 15];
    id[n + ID_DIGITS] = '\0';
}

bool kvl_http_id_is(const char *prefix, const char *text)
{
    const size_t n = strlen(prefix);
    return strncmp(text, prefix, n) == 0 && strlen(text + n) == ID_DIGITS &&
           strspn(text + n, hexadecimal) == ID_DIGITS;
}

void kvl_http_folder_of(const char *tenant, char *folder)
{
    *folder++ = 't';
    *folder++ = '-';
    for (const char *at = tenant; *at != '\0'; at++) {
        *folder++ = hexadecimal[(uint8_t)*at >> 4];
        *folder++ = hexadecimal[(uint8_t)*at & 15];
    }
    *folder = '\0';
}

bool kvl_http_tenant_of(const char *folder, char *tenant)
{
    if (strncmp(folder, "t-", 2) != 0) return false;
    folder += 2;
    const size_t n = strlen(folder);
    if (n % 2 != 0 || n > 2 * KVL_HTTP_TENANT_BYTES_MAX || strspn(folder, hexadecimal) != n)
        return false;
    for (size_t i = 0; i < n / 2; i++)
        tenant[i] = (char)((strchr(hexadecimal, folder[2 * i]) - hexadecimal) * 16 +
                           (strchr(hexadecimal, folder[2 * i + 1]) - hexadecimal));
    tenant[n / 2] = '\0';
    return true;
}

kvl_status kvl_http_path_of(const char *root, const char *tenant, const char *name,
                            const char *ending, char *path, kvl_error *error)
{
    char folder[KVL_HTTP_FOLDER_BYTES];
    kvl_http_folder_of(tenant, folder);
    const int n = snprintf(path, PATH_MAX, "%s/%s%s%s%s", root, folder, name[0] == '\0' ? "" : "/",
                           name, ending);
    if (n < 0 || n >= PATH_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the data is too long");
    return KVL_OK;
}

typedef struct walk {
    const char *root;
    const char *tenant;
    kvl_http_visit each;
    void *context;
} walk;

static void visit_name(void *context, const char *name)
{
    const walk *w = context;
    w->each(w->context, w->tenant, name);
}

static void visit_folder(void *context, const char *name)
{
    const walk *w = context;
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    char path[PATH_MAX];
    kvl_error error = {0};
    if (!kvl_http_tenant_of(name, tenant)) return;
    walk inside = {w->root, tenant, w->each, w->context};
    kvl_status status = kvl_http_path_of(w->root, tenant, "", "", path, &error);
    if (status == KVL_OK) status = kvl_directory_each(path, visit_name, &inside, &error);
    if (status != KVL_OK) kvl_log(KVL_LOG_WARN, "folder_not_read", "text=\"%s\"", error.text);
}

kvl_status kvl_http_folders_each(const char *root, kvl_http_visit each, void *context,
                                 kvl_error *error)
{
    walk w = {root, NULL, each, context};
    return kvl_directory_each(root, visit_folder, &w, error);
}

/* ---- loading ---- */

static const char *purpose_of(const char *text)
{
    for (size_t i = 0; text != NULL && i < sizeof purposes / sizeof *purposes; i++)
        if (strcmp(text, purposes[i]) == 0) return purposes[i];
    return NULL;
}

/* Keeps entries in the order of their making. False without memory. */
static bool insert(kvl_http_files *files, const entry *made)
{
    if (files->n_entries == files->entries_max) {
        const size_t wanted = 2 * files->entries_max + 16;
        entry *larger = kvl_realloc(files->entries, wanted * sizeof *larger);
        if (larger == NULL) return false;
        files->entries = larger;
        files->entries_max = wanted;
    }
    size_t at = files->n_entries++;
    while (at > 0 && files->entries[at - 1].file.created_ns > made->file.created_ns) {
        files->entries[at] = files->entries[at - 1];
        at--;
    }
    files->entries[at] = *made;
    return true;
}

static bool read_metadata(const char *path, kvl_http_file *file)
{
    char *bytes = NULL;
    size_t n_bytes = 0;
    kvl_error error = {0};
    if (kvl_file_read(path, METADATA_BYTES_MAX, &bytes, &n_bytes, &error) != KVL_OK) return false;
    json_t *known = json_loadb(bytes, n_bytes, 0, NULL);
    kvl_free(bytes);
    const char *filename = json_string_value(json_object_get(known, "filename"));
    const json_t *size = json_object_get(known, "bytes");
    const json_t *created = json_object_get(known, "created_ns");
    file->purpose = purpose_of(json_string_value(json_object_get(known, "purpose")));
    const bool is_whole = filename != NULL && strlen(filename) < sizeof file->filename &&
                          json_is_integer(size) && json_is_integer(created) &&
                          file->purpose != NULL;
    if (is_whole) {
        memcpy(file->filename, filename, strlen(filename) + 1);
        file->n_bytes = (uint64_t)json_integer_value(size);
        file->created_ns = json_integer_value(created);
    }
    json_decref(known);
    return is_whole;
}

static bool cut_ending(const char *name, const char *ending, char *id)
{
    const size_t n = strlen(name);
    const size_t n_ending = strlen(ending);
    if (n < n_ending || n - n_ending >= KVL_HTTP_ID_BYTES ||
        strcmp(name + n - n_ending, ending) != 0)
        return false;
    memcpy(id, name, n - n_ending);
    id[n - n_ending] = '\0';
    return kvl_http_id_is("file-", id);
}

static void load_one(void *context, const char *tenant, const char *name)
{
    kvl_http_files *files = context;
    entry made = {.file = {.n_bytes = 0}};
    char path[PATH_MAX];
    kvl_error error = {0};
    if (!cut_ending(name, ".json", made.file.id)) return;
    if (kvl_http_path_of(files->root, tenant, name, "", path, &error) != KVL_OK) return;
    memcpy(made.tenant, tenant, strlen(tenant) + 1);
    if (!read_metadata(path, &made.file) || !insert(files, &made))
        kvl_log(KVL_LOG_WARN, "file_not_loaded", "id=%s", made.file.id);
}

/* Bytes that no metadata speaks of: of an upload that a crash cut off. */
static void sweep_one(void *context, const char *tenant, const char *name)
{
    kvl_http_files *files = context;
    char id[KVL_HTTP_ID_BYTES];
    char path[PATH_MAX];
    kvl_http_file known;
    kvl_error error = {0};
    const bool is_data = cut_ending(name, ".data", id);
    const bool is_part = cut_ending(name, ".part", id);
    if (!is_data && !is_part) return;
    if (is_data && kvl_http_files_find(files, tenant, id, &known, &error) == KVL_OK) return;
    if (kvl_http_path_of(files->root, tenant, name, "", path, &error) == KVL_OK)
        kvl_ignore(kvl_file_remove(path, &error));
}

kvl_status kvl_http_files_open(const char *path, uint64_t tenant_bytes_max, kvl_http_files **files,
                               kvl_error *error)
{
    *files = NULL;
    if (strlen(path) >= PATH_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the data is too long");
    KVL_TRY(kvl_directory_make_private(path, error));
    kvl_http_files *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for files");
    memcpy(made->root, path, strlen(path) + 1);
    made->tenant_bytes_max = tenant_bytes_max;
    (void)pthread_mutex_init(&made->lock, NULL);
    kvl_status status = kvl_http_folders_each(path, load_one, made, error);
    if (status == KVL_OK) status = kvl_http_folders_each(path, sweep_one, made, error);
    if (status != KVL_OK) {
        kvl_http_files_close(made);
        return status;
    }
    *files = made;
    return KVL_OK;
}

void kvl_http_files_close(kvl_http_files *files)
{
    if (files == NULL) return;
    KVL_ASSERT(files->incoming == NULL);
    (void)pthread_mutex_destroy(&files->lock);
    kvl_free(files->entries);
    kvl_free(files);
}

const char *kvl_http_files_root(const kvl_http_files *files)
{
    return files->root;
}

/* ---- looking ---- */

static entry *find(kvl_http_files *files, const char *tenant, const char *id)
{
    for (size_t i = 0; i < files->n_entries; i++)
        if (strcmp(files->entries[i].file.id, id) == 0 &&
            strcmp(files->entries[i].tenant, tenant) == 0)
            return &files->entries[i];
    return NULL;
}

kvl_status kvl_http_files_find(kvl_http_files *files, const char *tenant, const char *id,
                               kvl_http_file *file, kvl_error *error)
{
    pthread_mutex_lock(&files->lock);
    const entry *found = find(files, tenant, id);
    if (found != NULL) *file = found->file;
    pthread_mutex_unlock(&files->lock);
    if (found != NULL) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "there is no file '%.40s' here", id);
}

kvl_status kvl_http_files_read(kvl_http_files *files, const char *tenant, const char *id,
                               int *descriptor, size_t *n_bytes, kvl_error *error)
{
    kvl_http_file file;
    char path[PATH_MAX];
    KVL_TRY(kvl_http_files_find(files, tenant, id, &file, error));
    KVL_TRY(kvl_http_path_of(files->root, tenant, id, ".data", path, error));
    const kvl_status status = kvl_file_open(path, descriptor, n_bytes, error);
    if (status == KVL_OK) return KVL_OK;
    return KVL_FAIL(error, status, "the bytes of %s cannot be read", id);
}

kvl_status kvl_http_files_remove(kvl_http_files *files, const char *tenant, const char *id,
                                 kvl_error *error)
{
    char path[PATH_MAX];
    pthread_mutex_lock(&files->lock);
    entry *found = find(files, tenant, id);
    if (found != NULL) {
        const size_t at = (size_t)(found - files->entries);
        files->n_entries--;
        memmove(found, found + 1, (files->n_entries - at) * sizeof *found);
    }
    pthread_mutex_unlock(&files->lock);
    if (found == NULL)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "there is no file '%.40s' here", id);
    KVL_TRY(kvl_http_path_of(files->root, tenant, id, ".json", path, error));
    KVL_TRY(kvl_file_remove(path, error));
    KVL_TRY(kvl_http_path_of(files->root, tenant, id, ".data", path, error));
    return kvl_file_remove(path, error);
}

json_t *kvl_http_file_json(const kvl_http_file *file)
{
    return json_pack("{s:s, s:s, s:I, s:I, s:s, s:s, s:s}", "id", file->id, "object", "file",
                     "bytes", (json_int_t)file->n_bytes, "created_at",
                     (json_int_t)(file->created_ns / KVL_NS_PER_S), "filename", file->filename,
                     "purpose", file->purpose, "status", "processed");
}

json_t *kvl_http_files_list(kvl_http_files *files, const char *tenant, const char *after,
                            uint32_t limit, bool is_ascending, const char *purpose)
{
    json_t *data = json_array();
    bool is_begun = after == NULL;
    bool has_more = false;
    pthread_mutex_lock(&files->lock);
    for (size_t i = 0; i < files->n_entries && !has_more; i++) {
        const entry *one = &files->entries[is_ascending ? i : files->n_entries - 1 - i];
        if (strcmp(one->tenant, tenant) != 0) continue;
        if (!is_begun) {
            is_begun = strcmp(one->file.id, after) == 0;
            continue;
        }
        if (purpose != NULL && strcmp(one->file.purpose, purpose) != 0) continue;
        has_more = json_array_size(data) == limit;
        if (!has_more) (void)json_array_append_new(data, kvl_http_file_json(&one->file));
    }
    pthread_mutex_unlock(&files->lock);
    const size_t n = json_array_size(data);
    json_t *first = json_object_get(json_array_get(data, 0), "id");
    json_t *last = n == 0 ? NULL : json_object_get(json_array_get(data, n - 1), "id");
    return json_pack("{s:s, s:o, s:O?, s:O?, s:b}", "object", "list", "data", data, "first_id",
                     first, "last_id", last, "has_more", has_more);
}

/* ---- a file that comes in pieces ---- */

/* Bytes and number of a tenant's files, those that are coming in too. */
static uint64_t usage_of(const kvl_http_files *files, const char *tenant, size_t *n)
{
    uint64_t n_bytes = 0;
    *n = 0;
    for (size_t i = 0; i < files->n_entries; i++) {
        if (strcmp(files->entries[i].tenant, tenant) != 0) continue;
        n_bytes += files->entries[i].file.n_bytes;
        (*n)++;
    }
    for (const kvl_http_incoming *in = files->incoming; in != NULL; in = in->next) {
        if (strcmp(in->tenant, tenant) != 0) continue;
        n_bytes += in->n_bytes;
        (*n)++;
    }
    return n_bytes;
}

/* Takes it out of the list; its writer is the caller's business. */
static void end_incoming(kvl_http_incoming *incoming)
{
    kvl_http_files *files = incoming->files;
    pthread_mutex_lock(&files->lock);
    kvl_http_incoming **at = &files->incoming;
    while (*at != incoming) at = &(*at)->next;
    *at = incoming->next;
    pthread_mutex_unlock(&files->lock);
    kvl_free(incoming);
}

static kvl_status open_part(kvl_http_incoming *incoming, kvl_error *error)
{
    char path[PATH_MAX];
    char id[KVL_HTTP_ID_BYTES];
    kvl_http_id_make("file-", id);
    KVL_TRY(kvl_http_path_of(incoming->files->root, incoming->tenant, "", "", path, error));
    KVL_TRY(kvl_directory_make_private(path, error));
    KVL_TRY(kvl_http_path_of(incoming->files->root, incoming->tenant, id, ".part", path, error));
    return kvl_file_writer_open(path, &incoming->writer, error);
}

kvl_status kvl_http_incoming_begin(kvl_http_files *files, const char *tenant, bool is_own,
                                   kvl_http_incoming **incoming, kvl_error *error)
{
    *incoming = NULL;
    KVL_ASSERT(strlen(tenant) <= KVL_HTTP_TENANT_BYTES_MAX);
    kvl_http_incoming *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a file");
    made->files = files;
    made->is_own = is_own;
    memcpy(made->tenant, tenant, strlen(tenant) + 1);
    size_t n = 0;
    pthread_mutex_lock(&files->lock);
    (void)usage_of(files, tenant, &n);
    made->next = files->incoming;
    files->incoming = made;
    pthread_mutex_unlock(&files->lock);
    kvl_status status = KVL_OK;
    if (n >= KVL_HTTP_FILES_MAX && !is_own)
        status =
            KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                     "there are %zu files already, at most %u: delete some", n, KVL_HTTP_FILES_MAX);
    if (status == KVL_OK) status = open_part(made, error);
    if (status != KVL_OK) {
        end_incoming(made);
        return status;
    }
    *incoming = made;
    return KVL_OK;
}

kvl_status kvl_http_incoming_add(kvl_http_incoming *incoming, const void *bytes, size_t n_bytes,
                                 kvl_error *error)
{
    kvl_http_files *files = incoming->files;
    size_t n = 0;
    pthread_mutex_lock(&files->lock);
    const uint64_t n_used = usage_of(files, incoming->tenant, &n);
    const bool is_too_large =
        !incoming->is_own && incoming->n_bytes + n_bytes > KVL_HTTP_FILE_BYTES_MAX;
    const bool is_over = !incoming->is_own && n_used + n_bytes > files->tenant_bytes_max;
    if (!is_too_large && !is_over) incoming->n_bytes += n_bytes;
    pthread_mutex_unlock(&files->lock);
    if (is_too_large)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "a file has at most %" PRIu64 " MiB",
                        KVL_HTTP_FILE_BYTES_MAX >> 20);
    if (is_over)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE,
                        "your files may have %" PRIu64 " bytes together, and %" PRIu64
                        " are in use: delete some",
                        files->tenant_bytes_max, n_used);
    return kvl_file_writer_add(&incoming->writer, bytes, n_bytes, error);
}

static kvl_status write_metadata(const kvl_http_incoming *incoming, const kvl_http_file *file,
                                 kvl_error *error)
{
    char path[PATH_MAX];
    KVL_TRY(
        kvl_http_path_of(incoming->files->root, incoming->tenant, file->id, ".json", path, error));
    json_t *known =
        json_pack("{s:s, s:s, s:I, s:I}", "filename", file->filename, "purpose", file->purpose,
                  "bytes", (json_int_t)file->n_bytes, "created_ns", (json_int_t)file->created_ns);
    char text[METADATA_BYTES_MAX];
    const size_t n = known == NULL ? 0 : json_dumpb(known, text, sizeof text, JSON_COMPACT);
    json_decref(known);
    if (n == 0 || n > sizeof text)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory to describe a file");
    return kvl_file_write(path, text, n, error);
}

static kvl_status commit(kvl_http_incoming *incoming, const entry *made, kvl_error *error)
{
    kvl_http_files *files = incoming->files;
    char path[PATH_MAX];
    KVL_TRY(kvl_http_path_of(files->root, incoming->tenant, made->file.id, ".data", path, error));
    KVL_TRY(kvl_file_writer_commit(&incoming->writer, path, error));
    KVL_TRY(write_metadata(incoming, &made->file, error));
    pthread_mutex_lock(&files->lock);
    entry *known = find(files, made->tenant, made->file.id);
    if (known != NULL) *known = *made;
    const bool is_kept = known != NULL || insert(files, made);
    pthread_mutex_unlock(&files->lock);
    if (is_kept) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a file");
}

kvl_status kvl_http_incoming_commit(kvl_http_incoming *incoming, const char *id,
                                    const char *filename, const char *purpose, kvl_http_file *file,
                                    kvl_error *error)
{
    const kvl_clock *clock = kvl_clock_system();
    entry made = {.file = {.purpose = purpose_of(purpose),
                           .n_bytes = incoming->n_bytes,
                           .created_ns = clock->wall_ns(clock->context)}};
    KVL_ASSERT(made.file.purpose != NULL && strlen(filename) < KVL_HTTP_FILENAME_BYTES);
    memcpy(made.tenant, incoming->tenant, sizeof made.tenant);
    memcpy(made.file.filename, filename, strlen(filename) + 1);
    if (id != NULL) {
        memcpy(made.file.id, id, strlen(id) + 1);
    } else {
        kvl_http_id_make("file-", made.file.id);
    }
    const kvl_status status = commit(incoming, &made, error);
    if (status == KVL_OK) *file = made.file;
    kvl_file_writer_abandon(&incoming->writer);
    end_incoming(incoming);
    return status;
}

void kvl_http_incoming_abandon(kvl_http_incoming *incoming)
{
    if (incoming == NULL) return;
    kvl_file_writer_abandon(&incoming->writer);
    end_incoming(incoming);
}
