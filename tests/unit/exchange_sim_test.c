/* exchange/protocol in a simulated network: a few hundred seeds of everything that can go wrong.
 * KVL_SIM_SEED=n runs that one seed in every scene; the seed of a failure is printed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "exchange/protocol.h"
#include "exchange_sim.h"
#include "test_random.h"

enum { SEEDS = 40 };

/* Runs a scene with many seeds and adds the reports up. */
static kvl_sim_report run_scene(kvl_sim_options options)
{
    const char *only = getenv("KVL_SIM_SEED");
    kvl_sim_report sum = {0};
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        options.seed = only == NULL ? seed : strtoull(only, NULL, 10);
        options.n_hosts = 2 + (uint32_t)(options.seed % 4);
        const int64_t live = kvl_alloc_live();
        kvl_sim_report report;
        kvl_sim_run(&options, &report);
        kvl_container_spare_clear();
        if (report.violation[0] != '\0') {
            fail_msg("KVL_SIM_SEED=%llu: %s", (unsigned long long)options.seed, report.violation);
        }
        assert_int_equal(report.n_ended, report.n_requests);
        assert_int_equal(kvl_alloc_live(), live);
        sum.n_requests += report.n_requests;
        sum.n_ok += report.n_ok;
        sum.n_unreachable += report.n_unreachable;
        sum.n_timeout += report.n_timeout;
        sum.n_not_found += report.n_not_found;
        sum.n_kills += report.n_kills;
        sum.n_tasks_run += report.n_tasks_run;
        sum.n_blocks_damaged += report.n_blocks_damaged;
        sum.n_refused += report.n_refused;
        sum.n_splits += report.n_splits;
        sum.n_jumps += report.n_jumps;
        sum.n_disk_errors += report.n_disk_errors;
        sum.n_messages += report.n_messages;
        if (report.under_way_bytes_max > sum.under_way_bytes_max) {
            sum.under_way_bytes_max = report.under_way_bytes_max;
        }
        if (only != NULL) break;
    }
    print_message("%llu requests: %llu ok, %llu nowhere, %llu unreachable, %llu too late; "
                  "%llu messages, %llu kills, %llu damaged blocks, %llu refused\n",
                  (unsigned long long)sum.n_requests, (unsigned long long)sum.n_ok,
                  (unsigned long long)sum.n_not_found, (unsigned long long)sum.n_unreachable,
                  (unsigned long long)sum.n_timeout, (unsigned long long)sum.n_messages,
                  (unsigned long long)sum.n_kills, (unsigned long long)sum.n_blocks_damaged,
                  (unsigned long long)sum.n_refused);
    return sum;
}

/* Nothing goes wrong: what is there is found, in order and at once. */
static void test_a_good_network_serves_everything(void **state)
{
    (void)state;
    const kvl_sim_report sum = run_scene((kvl_sim_options){.n_requests = 60});
    assert_int_equal(sum.n_blocks_damaged, 0);
    assert_int_equal(sum.n_refused, 0);
    assert_int_equal(sum.n_unreachable, 0);
    assert_true(sum.under_way_bytes_max <= KVL_STREAMS_PER_PEER * KVL_STREAM_WINDOW_BYTES);
    assert_true(sum.n_tasks_run > 0 && sum.n_not_found > 0);
}

static void test_losses_cost_time_only(void **state)
{
    (void)state;
    const kvl_sim_report sum =
        run_scene((kvl_sim_options){.n_requests = 60, .n_lost = 100, .n_doubled = 50});
    assert_true(sum.n_ok > sum.n_requests / 2);
}

static void test_order_does_not_matter(void **state)
{
    (void)state;
    const kvl_sim_report sum =
        run_scene((kvl_sim_options){.n_requests = 60, .n_doubled = 50, .reorders = true});
    assert_true(sum.n_ok > sum.n_requests / 3);
}

static void test_damage_is_never_handed_out(void **state)
{
    (void)state;
    const kvl_sim_report sum = run_scene((kvl_sim_options){.n_requests = 60, .n_damaged = 60});
    assert_true(sum.n_blocks_damaged > 0);
    assert_true(sum.n_refused > 0);
}

static void test_hosts_may_die_at_any_time(void **state)
{
    (void)state;
    const kvl_sim_report sum = run_scene((kvl_sim_options){.n_requests = 80, .kills = true});
    assert_true(sum.n_kills > 0 && sum.n_unreachable > 0);
}

static void test_everything_at_once(void **state)
{
    (void)state;
    const kvl_sim_report sum = run_scene((kvl_sim_options){.n_requests = 80,
                                                           .n_lost = 50,
                                                           .n_doubled = 50,
                                                           .n_damaged = 20,
                                                           .reorders = true,
                                                           .kills = true});
    assert_true(sum.n_kills > 0 && sum.n_ok > 0);
}

static void test_networks_fall_apart_and_clocks_jump(void **state)
{
    (void)state;
    const kvl_sim_report sum = run_scene((kvl_sim_options){
        .n_requests = 80, .n_lost = 20, .splits = true, .jumps = true, .n_disk_errors = 100});
    assert_true(sum.n_splits > 0 && sum.n_jumps > 0 && sum.n_disk_errors > 0 && sum.n_ok > 0);
}

/* The same seed gives the same events at the same times, so a failure can be looked at again. */
static void test_a_run_can_be_repeated(void **state)
{
    (void)state;
    kvl_sim_options options = kvl_sim_everything(12345);
    kvl_sim_report first, second, other;
    kvl_sim_run(&options, &first);
    kvl_sim_run(&options, &second);
    assert_memory_equal(&first, &second, sizeof first);
    options.seed++;
    kvl_sim_run(&options, &other);
    assert_int_not_equal(first.trace, other.trace);
    options.seed--;
    options.n_steps = first.n_steps / 2;
    kvl_sim_run(&options, &other);
    assert_int_equal(other.n_steps, options.n_steps);
}

/* Seeds that nobody has seen before, for ten seconds; each failure prints how to repeat it. */
static void test_fresh_seeds(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const uint64_t first = kvl_random_next(&random) >> 24;
    const int64_t end_ns = kvl_clock_now(kvl_clock_system()) + 10 * KVL_NS_PER_S;
    uint64_t n = 0;
    for (; kvl_clock_now(kvl_clock_system()) < end_ns; n++) {
        const kvl_sim_options options = kvl_sim_everything(first + n);
        kvl_sim_report report;
        kvl_sim_run(&options, &report);
        if (report.violation[0] != '\0')
            fail_msg("kvloom-sim --seed %llu: %s", (unsigned long long)options.seed,
                     report.violation);
    }
    print_message("seeds %llu to %llu\n", (unsigned long long)first,
                  (unsigned long long)(first + n - 1));
    assert_true(n > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_good_network_serves_everything),
        cmocka_unit_test(test_losses_cost_time_only),
        cmocka_unit_test(test_order_does_not_matter),
        cmocka_unit_test(test_damage_is_never_handed_out),
        cmocka_unit_test(test_hosts_may_die_at_any_time),
        cmocka_unit_test(test_everything_at_once),
        cmocka_unit_test(test_networks_fall_apart_and_clocks_jump),
        cmocka_unit_test(test_a_run_can_be_repeated),
        cmocka_unit_test(test_fresh_seeds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
