/* exchange/directory: announcements are remembered up to a limit and forgotten with their peer. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "exchange/directory.h"
#include "tiny_store.h"

static void test_the_directory_remembers_and_forgets(void **state)
{
    (void)state;
    kvl_peer_directory *directory = kvl_peer_directory_create(5);
    for (uint64_t k = 0; k < 4 * KVL_DIRECTORY_IDS; k++) {
        const kvl_digest id = tiny_id(k);
        kvl_peer_directory_add(directory, &id, (uint32_t)(k % 64));
        assert_int_equal(kvl_peer_directory_find(directory, &id), UINT64_C(1) << (k % 64));
    }
    size_t n_found = 0;
    for (uint64_t k = 0; k < 4 * KVL_DIRECTORY_IDS; k++) {
        const kvl_digest id = tiny_id(k);
        const uint64_t peers = kvl_peer_directory_find(directory, &id);
        assert_true(peers == 0 || peers == UINT64_C(1) << (k % 64));
        n_found += peers != 0;
    }
    assert_true(n_found <= KVL_DIRECTORY_IDS && n_found > KVL_DIRECTORY_IDS * 9 / 10);
    const kvl_digest last = tiny_id(4 * KVL_DIRECTORY_IDS - 1);
    kvl_peer_directory_add(directory, &last, 2);
    kvl_peer_directory_forget_peer(directory, 63);
    assert_int_equal(kvl_peer_directory_find(directory, &last), 4);
    kvl_peer_directory_remove(directory, &last, 2);
    assert_int_equal(kvl_peer_directory_find(directory, &last), 0);
    kvl_peer_directory_destroy(directory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_directory_remembers_and_forgets),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
