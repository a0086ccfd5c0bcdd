/* http: files of clients: whole or not there, each tenant's alone, within their limits, and the
 * same after a restart, whatever a crash left behind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "http/files.h"

enum { QUOTA = 1000 };

typedef struct fixture {
    char root[64];
    kvl_http_files *files;
} fixture;

static void open_files(fixture *f)
{
    kvl_error error = {0};
    if (kvl_http_files_open(f->root, QUOTA, &f->files, &error) != KVL_OK)
        fail_msg("%s", error.text);
}

static void restart(fixture *f)
{
    kvl_http_files_close(f->files);
    open_files(f);
}

static int setup(void **state)
{
    static fixture f;
    (void)snprintf(f.root, sizeof f.root, "/tmp/kvloom-files-XXXXXX");
    assert_non_null(mkdtemp(f.root));
    open_files(&f);
    *state = &f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    kvl_error error = {0};
    kvl_http_files_close(f->files);
    return kvl_directory_remove(f->root, &error) == KVL_OK ? 0 : -1;
}

static kvl_status put(fixture *f, const char *tenant, const char *text, kvl_http_file *file)
{
    kvl_error error = {0};
    kvl_http_incoming *incoming = NULL;
    const kvl_status begun = kvl_http_incoming_begin(f->files, tenant, false, &incoming, &error);
    if (begun != KVL_OK) return begun;
    const size_t half = strlen(text) / 2;
    kvl_status status = kvl_http_incoming_add(incoming, text, half, &error);
    if (status == KVL_OK)
        status = kvl_http_incoming_add(incoming, text + half, strlen(text) - half, &error);
    if (status != KVL_OK) {
        kvl_http_incoming_abandon(incoming);
        return status;
    }
    return kvl_http_incoming_commit(incoming, NULL, "rows.jsonl", "batch", file, &error);
}

static void assert_holds(fixture *f, const char *tenant, const char *id, const char *text)
{
    char found[QUOTA + 1] = {0};
    int descriptor = -1;
    size_t n_bytes = 0;
    kvl_error error = {0};
    assert_int_equal(kvl_http_files_read(f->files, tenant, id, &descriptor, &n_bytes, &error),
                     KVL_OK);
    assert_int_equal(n_bytes, strlen(text));
    assert_int_equal(read(descriptor, found, QUOTA), n_bytes);
    (void)close(descriptor);
    assert_string_equal(found, text);
}

static size_t n_listed(fixture *f, const char *tenant)
{
    json_t *list = kvl_http_files_list(f->files, tenant, NULL, 1000, false, NULL);
    const size_t n = json_array_size(json_object_get(list, "data"));
    json_decref(list);
    return n;
}

static void test_files_are_their_tenants_alone_and_stay(void **state)
{
    fixture *f = *state;
    kvl_http_file red;
    kvl_http_file blue;
    kvl_http_file found;
    kvl_error error = {0};
    assert_int_equal(put(f, "red/../blue", "of red", &red), KVL_OK);
    assert_int_equal(put(f, "", "of nobody", &blue), KVL_OK);
    assert_true(kvl_http_id_is("file-", red.id) && strcmp(red.id, blue.id) != 0);
    for (int round = 0; round < 2; round++) {
        assert_holds(f, "red/../blue", red.id, "of red");
        assert_holds(f, "", blue.id, "of nobody");
        assert_int_equal(kvl_http_files_find(f->files, "", red.id, &found, &error),
                         KVL_ERR_NOT_FOUND);
        assert_int_equal(kvl_http_files_remove(f->files, "", red.id, &error), KVL_ERR_NOT_FOUND);
        assert_int_equal(n_listed(f, ""), 1);
        assert_int_equal(n_listed(f, "red"), 0);
        restart(f);
    }
    struct stat about;
    assert_int_equal(stat(f->root, &about), 0);
    assert_int_equal(about.st_mode & 077, 0);
    assert_int_equal(kvl_http_files_remove(f->files, "", blue.id, &error), KVL_OK);
    restart(f);
    assert_int_equal(n_listed(f, ""), 0);
    assert_int_equal(n_listed(f, "red/../blue"), 1);
}

static void test_lists_go_page_by_page(void **state)
{
    fixture *f = *state;
    kvl_http_file made[7];
    for (int i = 0; i < 7; i++) assert_int_equal(put(f, "t", "x", &made[i]), KVL_OK);
    for (int is_ascending = 0; is_ascending < 2; is_ascending++) {
        char after[KVL_HTTP_ID_BYTES] = "";
        int n = 0;
        for (bool has_more = true; has_more;) {
            json_t *list = kvl_http_files_list(f->files, "t", n == 0 ? NULL : after, 3,
                                               is_ascending != 0, "batch");
            const json_t *data = json_object_get(list, "data");
            for (size_t i = 0; i < json_array_size(data); i++, n++)
                assert_string_equal(
                    json_string_value(json_object_get(json_array_get(data, i), "id")),
                    made[is_ascending ? n : 6 - n].id);
            has_more = json_is_true(json_object_get(list, "has_more"));
            (void)snprintf(after, sizeof after, "%s",
                           json_string_value(json_object_get(list, "last_id")));
            json_decref(list);
        }
        assert_int_equal(n, 7);
    }
}

/* Files that are there and files that are coming count alike; what was refused counts no more. */
static void test_a_tenant_has_so_much_room_and_no_more(void **state)
{
    fixture *f = *state;
    char text[QUOTA / 2 + 2] = {0};
    kvl_http_file file;
    kvl_error error = {0};
    memset(text, 'a', QUOTA / 2);
    assert_int_equal(put(f, "red", text, &file), KVL_OK);
    kvl_http_incoming *coming = NULL;
    assert_int_equal(kvl_http_incoming_begin(f->files, "red", false, &coming, &error), KVL_OK);
    assert_int_equal(kvl_http_incoming_add(coming, text, 1, &error), KVL_OK);
    kvl_http_file other;
    assert_int_equal(put(f, "red", text, &other), KVL_ERR_TOO_LARGE);
    assert_int_equal(put(f, "blue", text, &other), KVL_OK);
    kvl_http_incoming_abandon(coming);
    assert_int_equal(put(f, "red", text, &other), KVL_OK);
    assert_int_equal(put(f, "red", "a", &other), KVL_ERR_TOO_LARGE);
    restart(f);
    assert_int_equal(put(f, "red", "a", &other), KVL_ERR_TOO_LARGE);
    assert_int_equal(kvl_http_files_remove(f->files, "red", file.id, &error), KVL_OK);
    assert_int_equal(put(f, "red", "a", &other), KVL_OK);
    /* The server's own are never refused: they are what somebody has waited for. */
    assert_int_equal(kvl_http_incoming_begin(f->files, "blue", true, &coming, &error), KVL_OK);
    for (int i = 0; i < 5; i++)
        assert_int_equal(kvl_http_incoming_add(coming, text, QUOTA / 2, &error), KVL_OK);
    assert_int_equal(kvl_http_incoming_commit(coming, NULL, "out", "batch_output", &other, &error),
                     KVL_OK);
}

static void leave(const fixture *f, const char *tenant, const char *name, const char *text)
{
    char path[PATH_MAX];
    kvl_error error = {0};
    assert_int_equal(kvl_http_path_of(f->root, tenant, name, "", path, &error), KVL_OK);
    assert_int_equal(kvl_file_write(path, text, strlen(text), &error), KVL_OK);
}

static bool is_left(const fixture *f, const char *tenant, const char *name)
{
    char path[PATH_MAX];
    kvl_error error = {0};
    assert_int_equal(kvl_http_path_of(f->root, tenant, name, "", path, &error), KVL_OK);
    return access(path, F_OK) == 0;
}

static void test_what_a_crash_left_behind_is_swept(void **state)
{
    fixture *f = *state;
    kvl_http_file file;
    static const char *const gone[] = {"file-0123456789abcdef01234567.data",
                                       "file-0123456789abcdef01234567.part"};
    static const char *const kept[] = {"file-short.data", "batch_0123456789abcdef01234567.lines"};
    assert_int_equal(put(f, "red", "whole", &file), KVL_OK);
    for (int i = 0; i < 2; i++) {
        leave(f, "red", gone[i], "half");
        leave(f, "red", kept[i], "other");
    }
    leave(f, "red", "file-0123456789abcdef01234568.json", "{\"filename\": 5}");
    restart(f);
    for (int i = 0; i < 2; i++) {
        assert_false(is_left(f, "red", gone[i]));
        assert_true(is_left(f, "red", kept[i]));
    }
    assert_int_equal(n_listed(f, "red"), 1);
    assert_holds(f, "red", file.id, "whole");
}

static void test_ids_are_nothing_but_ids(void **state)
{
    (void)state;
    static const char *const bad[] = {"",
                                      "file-",
                                      "file-0123456789abcdef0123456",
                                      "file-0123456789abcdef012345678",
                                      "file-0123456789ABCDEF01234567",
                                      "file-../../../../../../etc/pa",
                                      "batch_0123456789abcdef01234567"};
    char id[KVL_HTTP_ID_BYTES];
    char tenant[KVL_HTTP_TENANT_BYTES_MAX + 1];
    char folder[KVL_HTTP_FOLDER_BYTES];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(kvl_http_id_is("file-", bad[i]));
    kvl_http_id_make("batch_", id);
    assert_true(kvl_http_id_is("batch_", id));
    char longest[KVL_HTTP_TENANT_BYTES_MAX + 1] = {0};
    memset(longest, '/', KVL_HTTP_TENANT_BYTES_MAX);
    static const char *const tenants[] = {"", ".", "..", "a/b", "\xff\x01"};
    for (size_t i = 0; i < sizeof tenants / sizeof *tenants + 1; i++) {
        const char *one = i < sizeof tenants / sizeof *tenants ? tenants[i] : longest;
        kvl_http_folder_of(one, folder);
        assert_null(strpbrk(folder, "/."));
        assert_true(kvl_http_tenant_of(folder, tenant));
        assert_string_equal(tenant, one);
    }
    assert_false(kvl_http_tenant_of("t-0", tenant));
    assert_false(kvl_http_tenant_of("t-zz", tenant));
    assert_false(kvl_http_tenant_of("lost+found", tenant));
}

static void test_every_allocation_may_fail(void **state)
{
    fixture *f = *state;
    for (int64_t n = 0;; n++) {
        kvl_http_file file;
        const int64_t n_live = kvl_alloc_live();
        const size_t n_before = n_listed(f, "red");
        kvl_alloc_fail_after(n);
        const kvl_status status = put(f, "red", "text", &file);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_int_equal(n_listed(f, "red"), n_before);
        assert_int_equal(kvl_alloc_live(), n_live);
        assert_true(n < 100);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_files_are_their_tenants_alone_and_stay, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_lists_go_page_by_page, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_tenant_has_so_much_room_and_no_more, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(test_what_a_crash_left_behind_is_swept, setup, teardown),
        cmocka_unit_test(test_ids_are_nothing_but_ids),
        cmocka_unit_test_setup_teardown(test_every_allocation_may_fail, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
