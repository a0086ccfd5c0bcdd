/* exchange/access.c: keys and the list of those who may come in. */
#include "exchange/access.h"

#include "base/alloc.h"
#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zmq.h>

enum { FILE_BYTES_MAX = 1 << 20, WORDS_MAX = 4, PATH_BYTES_MAX = 4096 };

bool kvl_key_text_is_valid(const char *text)
{
    uint8_t key[KVL_PUBLIC_KEY_BYTES];
    return strlen(text) == KVL_KEY_TEXT_BYTES - 1 && zmq_z85_decode(key, text) != NULL;
}

/* ---- key pairs ---- */

kvl_status kvl_key_pair_make(kvl_key_pair *pair, kvl_error *error)
{
    memset(pair, 0, sizeof *pair);
    if (zmq_has("curve") == 1 && zmq_curve_keypair(pair->public_key, pair->secret_key) == 0)
        return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_UNSUPPORTED, "this libzmq was built without CURVE");
}

void kvl_key_pair_wipe(kvl_key_pair *pair)
{
    sodium_memzero(pair, sizeof *pair);
}

kvl_status kvl_key_pair_write(const kvl_key_pair *pair, const char *path, kvl_error *error)
{
    char text[256];
    const int n = snprintf(text, sizeof text,
                           "# A KVLoom key pair. Whoever can read this file can speak as you.\n"
                           "public %s\nsecret %s\n",
                           pair->public_key, pair->secret_key);
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        return KVL_FAIL(error, errno == EEXIST ? KVL_ERR_EXISTS : KVL_ERR_IO,
                        "cannot create %.200s: %s", path, strerror(errno));
    }
    const bool written = write(fd, text, (size_t)n) == n && fsync(fd) == 0;
    sodium_memzero(text, sizeof text);
    if (close(fd) == 0 && written) return KVL_OK;
    (void)unlink(path);
    return KVL_FAIL(error, KVL_ERR_IO, "cannot write %.200s: %s", path, strerror(errno));
}

/* Cuts a line into words; returns their number, WORDS_MAX + 1 for more than that. */
static int split(char *line, char *words[WORDS_MAX])
{
    int n = 0;
    char *rest = NULL;
    for (char *word = strtok_r(line, " \t\r", &rest); word != NULL;
         word = strtok_r(NULL, " \t\r", &rest)) {
        if (word[0] == '#') break;
        if (n == WORDS_MAX) return WORDS_MAX + 1;
        words[n++] = word;
    }
    return n;
}

static kvl_status take_pair(char *text, const char *path, kvl_key_pair *pair, kvl_error *error)
{
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        char *words[WORDS_MAX] = {NULL};
        const int n = split(line, words);
        if (n == 0) continue;
        if (n != 2 || !kvl_key_text_is_valid(words[1])) continue;
        if (strcmp(words[0], "public") == 0) memcpy(pair->public_key, words[1], KVL_KEY_TEXT_BYTES);
        if (strcmp(words[0], "secret") == 0) memcpy(pair->secret_key, words[1], KVL_KEY_TEXT_BYTES);
    }
    char derived[KVL_KEY_TEXT_BYTES] = "";
    if (pair->secret_key[0] != '\0' && zmq_curve_public(derived, pair->secret_key) == 0 &&
        strcmp(derived, pair->public_key) == 0) {
        return KVL_OK;
    }
    return KVL_FAIL(error, KVL_ERR_MALFORMED,
                    "%.200s is no key pair: it needs the lines 'public KEY' and 'secret KEY' that "
                    "`kvloom keygen` writes",
                    path);
}

kvl_status kvl_key_pair_read(const char *path, kvl_key_pair *pair, kvl_error *error)
{
    struct stat about;
    char *text = NULL;
    size_t n_bytes = 0;
    memset(pair, 0, sizeof *pair);
    KVL_TRY(kvl_file_read(path, 4096, &text, &n_bytes, error));
    kvl_status status = KVL_OK;
    if (stat(path, &about) != 0 || (about.st_mode & (S_IRGRP | S_IROTH | S_IWGRP | S_IWOTH)) != 0) {
        status = KVL_FAIL(error, KVL_ERR_DENIED,
                          "others may read the secret key in %.200s: chmod 600 it", path);
    } else {
        status = take_pair(text, path, pair, error);
    }
    sodium_memzero(text, n_bytes);
    kvl_free(text);
    if (status < 0) kvl_key_pair_wipe(pair);
    return status;
}

/* ---- the list ---- */

typedef struct allowed {
    char key[KVL_KEY_TEXT_BYTES];
    kvl_access access;
} allowed;

struct kvl_allow_list {
    pthread_mutex_t lock; /* guards what follows the path */
    char path[PATH_BYTES_MAX];
    allowed *entries; /* sorted by key */
    size_t n_entries;
};

static bool take_rights(char *text, uint32_t *rights)
{
    static const struct {
        const char *name;
        uint32_t right;
    } known[] = {{"read", KVL_RIGHT_READ},
                 {"write", KVL_RIGHT_WRITE},
                 {"admin", KVL_RIGHT_ADMIN},
                 {"all", KVL_RIGHT_ALL}};
    char *rest = NULL;
    *rights = 0;
    for (char *word = strtok_r(text, ",", &rest); word != NULL; word = strtok_r(NULL, ",", &rest)) {
        size_t i = 0;
        while (i < sizeof known / sizeof *known && strcmp(known[i].name, word) != 0) i++;
        if (i == sizeof known / sizeof *known) return false;
        *rights |= known[i].right;
    }
    return *rights != 0;
}

/* Names are words of the log and of metrics; they never become a path. */
static bool name_is_valid(const char *name)
{
    const size_t n = strlen(name);
    return n >= 1 && n <= KVL_TENANT_NAME_BYTES_MAX &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == n;
}

static kvl_status take_line(char *line, const char *path, size_t number, allowed *entry,
                            bool *is_entry, kvl_error *error)
{
    char *words[WORDS_MAX] = {NULL};
    const int n = split(line, words);
    *is_entry = false;
    if (n == 0) return KVL_OK;
    if (n < 3 || n > WORDS_MAX) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "%.200s, line %zu: must be KEY TENANT RIGHTS [NAME]", path, number);
    }
    if (!kvl_key_text_is_valid(words[0])) {
        return KVL_FAIL(error, KVL_ERR_MALFORMED,
                        "%.200s, line %zu: '%.48s' is no public key of `kvloom keygen`", path,
                        number, words[0]);
    }
    memset(entry, 0, sizeof *entry);
    memcpy(entry->key, words[0], sizeof entry->key);
    const char *name = n == WORDS_MAX ? words[3] : words[1];
    if (!name_is_valid(words[1]) || !name_is_valid(name) ||
        !take_rights(words[2], &entry->access.rights)) {
        return KVL_FAIL(
            error, KVL_ERR_MALFORMED,
            "%.200s, line %zu: names are 1 to %u of A-Z a-z 0-9 . _ -, rights are read, "
            "write, admin or all, joined by commas",
            path, number, KVL_TENANT_NAME_BYTES_MAX);
    }
    (void)snprintf(entry->access.tenant, sizeof entry->access.tenant, "%s", words[1]);
    (void)snprintf(entry->access.name, sizeof entry->access.name, "%s", name);
    *is_entry = true;
    return KVL_OK;
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp(((const allowed *)a)->key, ((const allowed *)b)->key);
}

/* A key that stands there twice could have two meanings. */
static kvl_status check_unique(const allowed *entries, size_t n, const char *path, kvl_error *error)
{
    for (size_t i = 1; i < n; i++) {
        if (compare_keys(&entries[i - 1], &entries[i]) != 0) continue;
        return KVL_FAIL(error, KVL_ERR_MALFORMED, "%.200s: key %s stands there twice", path,
                        entries[i].key);
    }
    return KVL_OK;
}

static kvl_status take_lines(char *text, const char *path, allowed *entries, size_t *n_entries,
                             kvl_error *error)
{
    size_t number = 1;
    for (char *line = text; line != NULL; number++) {
        char *past = strchr(line, '\n');
        if (past != NULL) *past = '\0';
        bool is_entry = false;
        allowed entry;
        KVL_TRY(take_line(line, path, number, &entry, &is_entry, error));
        if (is_entry && *n_entries == KVL_ALLOWED_MAX) {
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "%.200s: more than %u keys", path,
                            KVL_ALLOWED_MAX);
        }
        if (is_entry) entries[(*n_entries)++] = entry;
        line = past == NULL ? NULL : past + 1;
    }
    if (*n_entries > 0) qsort(entries, *n_entries, sizeof *entries, compare_keys);
    return check_unique(entries, *n_entries, path, error);
}

static kvl_status read_list(const char *path, allowed **entries, size_t *n_entries,
                            kvl_error *error)
{
    char *text = NULL;
    size_t n_bytes = 0;
    *n_entries = 0;
    KVL_TRY(kvl_file_read(path, FILE_BYTES_MAX, &text, &n_bytes, error));
    *entries = kvl_alloc_zero(KVL_ALLOWED_MAX, sizeof **entries);
    kvl_status status = KVL_OK;
    if (*entries == NULL) {
        status = KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an allow-list");
    } else {
        status = take_lines(text, path, *entries, n_entries, error);
    }
    kvl_free(text);
    if (status < 0) {
        kvl_free(*entries);
        *entries = NULL;
    }
    return status;
}

kvl_status kvl_allow_list_open(const char *path, kvl_allow_list **list, kvl_error *error)
{
    *list = NULL;
    if (strlen(path) >= PATH_BYTES_MAX) {
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is too long", path);
    }
    kvl_allow_list *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for an allow-list");
    (void)snprintf(made->path, sizeof made->path, "%s", path);
    const kvl_status status = read_list(path, &made->entries, &made->n_entries, error);
    if (status < 0) {
        kvl_free(made);
        return status;
    }
    (void)pthread_mutex_init(&made->lock, NULL);
    *list = made;
    return KVL_OK;
}

kvl_status kvl_allow_list_reload(kvl_allow_list *list, kvl_error *error)
{
    allowed *entries = NULL;
    size_t n_entries = 0;
    KVL_TRY(read_list(list->path, &entries, &n_entries, error));
    (void)pthread_mutex_lock(&list->lock);
    allowed *former = list->entries;
    list->entries = entries;
    list->n_entries = n_entries;
    (void)pthread_mutex_unlock(&list->lock);
    kvl_free(former);
    return KVL_OK;
}

bool kvl_allow_list_find(kvl_allow_list *list, const char *public_key, kvl_access *access)
{
    allowed wanted = {.key = ""};
    (void)snprintf(wanted.key, sizeof wanted.key, "%s", public_key);
    (void)pthread_mutex_lock(&list->lock);
    const allowed *found = NULL;
    if (list->n_entries > 0) {
        found = bsearch(&wanted, list->entries, list->n_entries, sizeof wanted, compare_keys);
    }
    if (found != NULL && access != NULL) *access = found->access;
    (void)pthread_mutex_unlock(&list->lock);
    return found != NULL;
}

size_t kvl_allow_list_size(kvl_allow_list *list)
{
    (void)pthread_mutex_lock(&list->lock);
    const size_t n = list->n_entries;
    (void)pthread_mutex_unlock(&list->lock);
    return n;
}

void kvl_allow_list_close(kvl_allow_list *list)
{
    if (list == NULL) return;
    (void)pthread_mutex_destroy(&list->lock);
    kvl_free(list->entries);
    kvl_free(list);
}
