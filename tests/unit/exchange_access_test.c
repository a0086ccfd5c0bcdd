/* exchange_access_test.c: who may speak over tcp, as whom, and what for (S8, S10, S11, S15,
 * S21). */
#include "base/alloc.h"
#include "base/file.h"
#include "base/log.h"
#include "exchange/exchange.h"
#include "tiny_store.h"

#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

enum { WAIT_MS = 10000 };

static char directory[64];
static char list_path[96];
static kvl_key_pair server_keys, client_keys;

static int64_t in_ms(int64_t ms)
{
    return kvl_clock_now(kvl_clock_system()) + ms * KVL_NS_PER_MS;
}

static int set_up(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_SILENT);
    (void)snprintf(directory, sizeof directory, "/tmp/kvloom-access-XXXXXX");
    if (mkdtemp(directory) == NULL) return -1;
    (void)snprintf(list_path, sizeof list_path, "%s/allow", directory);
    if (kvl_key_pair_make(&server_keys, NULL) < 0) return -1;
    return kvl_key_pair_make(&client_keys, NULL) < 0 ? -1 : 0;
}

static int tear_down(void **state)
{
    (void)state;
    kvl_log_set_level(KVL_LOG_WARN);
    return kvl_directory_remove(directory, NULL) < 0 ? -1 : 0;
}

/* Writes lines in which KEY stands for the key. */
static void write_list(const char *lines, const char *key)
{
    char text[1024] = "";
    size_t n = 0;
    for (const char *at = lines; *at != '\0';) {
        const bool is_key = strncmp(at, "KEY", 3) == 0;
        const char *from = is_key ? key : at;
        const size_t n_from = is_key ? strlen(key) : 1;
        assert_true(n + n_from < sizeof text);
        memcpy(text + n, from, n_from);
        n += n_from;
        at += is_key ? 3 : 1;
    }
    assert_int_equal(kvl_file_write(list_path, text, n, NULL), KVL_OK);
}

typedef struct server {
    char endpoint[64];
    tiny_store stores[2];
    kvl_allow_list *list;
    kvl_exchange *exchange;
} server;

static void answer(void *context, uint64_t task, const void *body, size_t n_bytes)
{
    kvl_exchange_reply(((server *)context)->exchange, task, KVL_OK, NULL, body, n_bytes);
}

static const tiny_shape shape = {.n_blocks = 4, .block_bytes = 300000};

/* Serves the tenants "a", who has container 1, and "b", who has container 2. */
static void start_server(server *s, const char *lines)
{
    memset(s, 0, sizeof *s);
    static int n_started; /* a new port each time: those of before may still linger */
    (void)snprintf(s->endpoint, sizeof s->endpoint, "tcp://127.0.0.1:%d",
                   10000 + (int)(getpid() % 20000) + n_started++);
    for (uint64_t i = 0; i < 2; i++) {
        tiny_store_init(&s->stores[i]);
        assert_true(tiny_store_add(&s->stores[i], i + 1, 0, &shape));
    }
    write_list(lines, client_keys.public_key);
    kvl_error error;
    assert_int_equal(kvl_allow_list_open(list_path, &s->list, &error), KVL_OK);
    const kvl_exchange_tenant tenants[] = {{"a", &s->stores[0].tier}, {"b", &s->stores[1].tier}};
    const kvl_exchange_options options = {.name = "server",
                                          .endpoint = s->endpoint,
                                          .store = &s->stores[0].tier,
                                          .tenants = tenants,
                                          .n_tenants = 2,
                                          .keys = &server_keys,
                                          .allow_list = s->list,
                                          .clock = kvl_clock_system(),
                                          .task = answer,
                                          .task_context = s};
    assert_int_equal(kvl_exchange_start(&options, &s->exchange, &error), KVL_OK);
}

static void stop_server(server *s)
{
    kvl_exchange_stop(s->exchange);
    kvl_allow_list_close(s->list);
    for (int i = 0; i < 2; i++) tiny_store_deinit(&s->stores[i]);
}

static kvl_exchange *start_client(const server *s, const kvl_key_pair *keys, const char *server_key)
{
    const kvl_exchange_peer peer = {
        .name = "server", .endpoint = s->endpoint, .public_key = server_key};
    const kvl_exchange_options options = {
        .name = "client", .peers = &peer, .n_peers = 1, .keys = keys, .clock = kvl_clock_system()};
    kvl_exchange *client = NULL;
    kvl_error error = {.text = ""};
    if (kvl_exchange_start(&options, &client, &error) < 0) print_message("%s\n", error.text);
    assert_non_null(client);
    return client;
}

static bool is_up(kvl_exchange *client, bool wanted, int ms)
{
    for (int i = 0; i < ms / 10 && kvl_exchange_peer_is_up(client, "server") != wanted; i++)
        (void)poll(NULL, 0, 10);
    return kvl_exchange_peer_is_up(client, "server");
}

static kvl_status fetch(kvl_exchange *client, uint64_t number)
{
    kvl_container *container = NULL;
    const kvl_digest id = tiny_id(number);
    const kvl_status status =
        kvl_exchange_fetch(client, &id, in_ms(3000), &container, NULL, 0, NULL);
    if (status == KVL_OK) assert_true(tiny_container_is(container, number, 0));
    kvl_container_release(container);
    return status;
}

static kvl_status call(kvl_exchange *client)
{
    void *reply = NULL;
    size_t n = 0;
    const kvl_status status =
        kvl_exchange_call(client, "server", "x", 1, in_ms(3000), &reply, &n, NULL);
    kvl_free(reply);
    return status;
}

static void s8_other_addresses_need_keys_and_a_list(void **state)
{
    (void)state;
    kvl_exchange *exchange = NULL;
    kvl_error error;
    kvl_exchange_options options = {.name = "h", .clock = kvl_clock_system()};
    const char *const endpoints[] = {"tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://192.0.2.1:5555",
                                     "tcp://example.org:5555", "tcp://[::]:5555"};
    for (size_t i = 0; i < sizeof endpoints / sizeof *endpoints; i++) {
        options.endpoint = endpoints[i];
        options.keys = NULL;
        assert_int_equal(kvl_exchange_start(&options, &exchange, &error), KVL_ERR_DENIED);
        assert_non_null(strstr(error.text, "keygen"));
        options.keys = &server_keys;
        assert_int_equal(kvl_exchange_start(&options, &exchange, &error), KVL_ERR_DENIED);
        assert_non_null(strstr(error.text, "allow-list"));
        /* Nor is anybody dialled there without knowing who it is. */
        const kvl_exchange_peer peer = {.name = "p", .endpoint = endpoints[i]};
        const kvl_exchange_options dialling = {.name = "h",
                                               .peers = &peer,
                                               .n_peers = 1,
                                               .keys = &server_keys,
                                               .clock = kvl_clock_system()};
        assert_int_equal(kvl_exchange_start(&dialling, &exchange, &error), KVL_ERR_DENIED);
        assert_null(exchange);
    }
}

static void s10_a_key_that_is_not_on_the_list_gets_no_answer(void **state)
{
    (void)state;
    server s;
    kvl_key_pair stranger;
    assert_int_equal(kvl_key_pair_make(&stranger, NULL), KVL_OK);
    start_server(&s, "KEY a all\n");
    kvl_exchange *client = start_client(&s, &stranger, server_keys.public_key);
    kvl_exchange *plain = start_client(&s, NULL, NULL); /* without any key */
    assert_false(is_up(client, true, 700));
    assert_false(is_up(plain, true, 100));
    kvl_exchange_stats stats;
    kvl_exchange_stats_of(s.exchange, &stats);
    assert_true(stats.keys_refused > 0);
    assert_int_equal(stats.bytes_served, 0);
    kvl_exchange_stop(client);
    kvl_exchange_stop(plain);
    /* Nor does a client take another server for the one whose key it knows. */
    client = start_client(&s, &client_keys, stranger.public_key);
    assert_false(is_up(client, true, 500));
    kvl_exchange_stop(client);
    stop_server(&s);
}

static void s11_a_key_sees_its_tenant_only(void **state)
{
    (void)state;
    server s;
    start_server(&s, "# who may come\nKEY b all client # of b\n");
    kvl_exchange *client = start_client(&s, &client_keys, server_keys.public_key);
    assert_true(is_up(client, true, WAIT_MS));
    assert_int_equal(fetch(client, 2), KVL_OK);
    assert_int_equal(fetch(client, 1), KVL_ERR_NOT_FOUND);
    assert_int_equal(fetch(client, 3), KVL_ERR_NOT_FOUND);
    kvl_exchange_stop(client);
    stop_server(&s);
    /* A tenant that this server does not know has nothing here. */
    start_server(&s, "KEY c all\n");
    client = start_client(&s, &client_keys, server_keys.public_key);
    assert_true(is_up(client, true, WAIT_MS));
    assert_int_not_equal(fetch(client, 1), KVL_OK);
    kvl_exchange_stop(client);
    stop_server(&s);
}

static void s11_rights_and_verbs(void **state)
{
    (void)state;
    static const struct {
        const char *list;
        bool reads, runs;
    } cases[] = {{"KEY a read\n", true, false},      {"KEY a write\n", false, false},
                 {"KEY a admin\n", false, true},     {"KEY a read,write\n", true, false},
                 {"KEY a read,admin\n", true, true}, {"KEY a all\n", true, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        server s;
        start_server(&s, cases[i].list);
        kvl_exchange *client = start_client(&s, &client_keys, server_keys.public_key);
        assert_true(is_up(client, true, WAIT_MS));
        assert_int_equal(fetch(client, 1), cases[i].reads ? KVL_OK : KVL_ERR_FORBIDDEN);
        assert_int_equal(call(client), cases[i].runs ? KVL_OK : KVL_ERR_FORBIDDEN);
        assert_true(is_up(client, true, 10)); /* a refusal is no loss of the link */
        kvl_exchange_stop(client);
        stop_server(&s);
    }
}

static void a_key_that_leaves_the_list_is_disconnected(void **state)
{
    (void)state;
    server s;
    start_server(&s, "KEY a all\n");
    kvl_exchange *client = start_client(&s, &client_keys, server_keys.public_key);
    assert_true(is_up(client, true, WAIT_MS));
    assert_int_equal(fetch(client, 1), KVL_OK);
    /* Fewer rights count at once. */
    write_list("KEY a write\n", client_keys.public_key);
    assert_int_equal(kvl_allow_list_reload(s.list, NULL), KVL_OK);
    kvl_exchange_recheck(s.exchange);
    (void)poll(NULL, 0, 100);
    assert_int_equal(fetch(client, 1), KVL_ERR_FORBIDDEN);
    /* A list with a mistake changes nothing. */
    kvl_error error;
    write_list("KEY a everything\n", client_keys.public_key);
    assert_int_equal(kvl_allow_list_reload(s.list, &error), KVL_ERR_MALFORMED);
    assert_non_null(strstr(error.text, "line 1"));
    write_list("# nobody\n", "");
    assert_int_equal(kvl_allow_list_reload(s.list, NULL), KVL_OK);
    kvl_exchange_recheck(s.exchange);
    assert_int_not_equal(fetch(client, 1), KVL_OK);
    assert_false(is_up(client, false, WAIT_MS));
    kvl_exchange_stop(client);
    stop_server(&s);
}

static void s15_names_and_lines_of_a_list_are_checked(void **state)
{
    (void)state;
    static const char *const wrong[] = {"KEY ../../etc read\n",
                                        "KEY a/b read\n",
                                        "KEY a\n",
                                        "KEY a read name extra\n",
                                        "KEY a \n",
                                        "KEY a read;write x\n",
                                        "shortkeyKEY a read\n",
                                        "KEY a read ../x\n",
                                        "KEY aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa read\n"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        kvl_allow_list *list = NULL;
        write_list(wrong[i], client_keys.public_key);
        assert_int_equal(kvl_allow_list_open(list_path, &list, NULL), KVL_ERR_MALFORMED);
        assert_null(list);
    }
    kvl_allow_list *list = NULL;
    write_list("KEY a read\nKEY b all\n", client_keys.public_key);
    assert_int_equal(kvl_allow_list_open(list_path, &list, NULL), KVL_ERR_MALFORMED);
}

static void a_key_pair_is_its_owners_only(void **state)
{
    (void)state;
    char path[96];
    kvl_key_pair read;
    (void)snprintf(path, sizeof path, "%s/pair", directory);
    assert_int_equal(kvl_key_pair_write(&client_keys, path, NULL), KVL_OK);
    assert_int_equal(kvl_key_pair_write(&client_keys, path, NULL), KVL_ERR_EXISTS);
    struct stat about;
    assert_int_equal(stat(path, &about), 0);
    assert_int_equal(about.st_mode & 0777, 0600);
    assert_int_equal(kvl_key_pair_read(path, &read, NULL), KVL_OK);
    assert_memory_equal(&read, &client_keys, sizeof read);
    assert_int_equal(chmod(path, 0644), 0);
    assert_int_equal(kvl_key_pair_read(path, &read, NULL), KVL_ERR_DENIED);
    assert_int_equal(chmod(path, 0600), 0);
    assert_int_equal(kvl_file_write(path, "public x\n", 9, NULL), KVL_OK);
    assert_int_equal(chmod(path, 0600), 0);
    assert_int_equal(kvl_key_pair_read(path, &read, NULL), KVL_ERR_MALFORMED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(s8_other_addresses_need_keys_and_a_list),
        cmocka_unit_test(s10_a_key_that_is_not_on_the_list_gets_no_answer),
        cmocka_unit_test(s11_a_key_sees_its_tenant_only),
        cmocka_unit_test(s11_rights_and_verbs),
        cmocka_unit_test(a_key_that_leaves_the_list_is_disconnected),
        cmocka_unit_test(s15_names_and_lines_of_a_list_are_checked),
        cmocka_unit_test(a_key_pair_is_its_owners_only),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
