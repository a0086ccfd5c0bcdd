/* cache/prefix_tree against a model: a plain list of every whole-page prefix that was inserted,
 * with its page. Random prompts over a tiny alphabet branch often and at every depth. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/alloc.h"
#include "cache/prefix_tree.h"
#include "test_random.h"

static void *lend(kvl_backend *backend, size_t n_bytes)
{
    (void)backend;
    return kvl_alloc_aligned(n_bytes);
}

static void take_back(kvl_backend *backend, void *memory)
{
    (void)backend;
    kvl_free(memory);
}

static const kvl_backend_ops lender = {
    .name = "lender", .memory_create = lend, .memory_destroy = take_back};

enum { DEPTH_MAX = 6, N_PAGES = 120, HOLDS_MAX = 24, N_SALTS = 2, ENTRIES_MAX = 4000 };

/* A prompt is one letter a page, all its tokens alike but for the last, which is the letter. */
typedef struct prompt {
    uint64_t salt;
    uint32_t n_pages;
    uint8_t letters[DEPTH_MAX];
    size_t n_ids; /* whole pages and sometimes a rest */
    uint32_t ids[(DEPTH_MAX + 1) * KVL_PAGE_TOKENS];
} prompt;

/* One prefix that the tree should hold, and the page of its last step. */
typedef struct entry {
    uint64_t salt;
    uint32_t n_letters;
    uint8_t letters[DEPTH_MAX];
    uint32_t page;
    bool alive;
} entry;

typedef struct hold {
    size_t n_pages;
    uint32_t pages[DEPTH_MAX];
} hold;

typedef struct model {
    kvl_backend backend;
    kvl_page_pool *pool;
    kvl_prefix_tree *tree;
    entry entries[ENTRIES_MAX];
    size_t n_entries;
    hold holds[HOLDS_MAX];
    size_t n_holds;
} model;

static void spell(prompt *p, size_t n_rest)
{
    p->n_ids = (size_t)p->n_pages * KVL_PAGE_TOKENS + n_rest;
    for (size_t i = 0; i < p->n_ids; i++) p->ids[i] = 7;
    for (uint32_t i = 0; i < p->n_pages; i++) p->ids[(i + 1) * KVL_PAGE_TOKENS - 1] = p->letters[i];
}

static prompt random_prompt(kvl_random *random)
{
    prompt p = {.salt = kvl_test_below(random, N_SALTS),
                .n_pages = kvl_test_below(random, DEPTH_MAX + 1)};
    for (uint32_t i = 0; i < p.n_pages; i++) p.letters[i] = (uint8_t)kvl_test_below(random, 3);
    spell(&p, kvl_test_below(random, KVL_PAGE_TOKENS));
    return p;
}

static entry *find_entry(model *m, uint64_t salt, const uint8_t *letters, uint32_t n_letters)
{
    for (size_t i = 0; i < m->n_entries; i++) {
        entry *e = &m->entries[i];
        if (e->alive && e->salt == salt && e->n_letters == n_letters &&
            memcmp(e->letters, letters, n_letters) == 0)
            return e;
    }
    return NULL;
}

static void make_model(model *m)
{
    kvl_error error;
    memset(m, 0, sizeof *m);
    m->backend.ops = &lender;
    assert_int_equal(kvl_page_pool_create(&m->backend, 1, 1, 16, N_PAGES, &m->pool, &error),
                     KVL_OK);
    assert_int_equal(kvl_prefix_tree_create(m->pool, &m->tree, &error), KVL_OK);
}

static void free_model(model *m)
{
    for (size_t i = 0; i < m->n_holds; i++)
        kvl_page_pool_release(m->pool, (uint32_t)m->holds[i].n_pages, m->holds[i].pages);
    kvl_prefix_tree_destroy(m->tree);
    assert_int_equal(kvl_page_pool_n_free(m->pool), N_PAGES);
    kvl_page_pool_destroy(m->pool);
}

/* Gives the longest prefix that the model knows, and checks that the tree knows the same. */
static hold acquire_both(model *m, const prompt *p)
{
    hold h;
    kvl_prefix_tree_acquire(m->tree, p->salt, p->ids, p->n_ids, h.pages, &h.n_pages);
    uint32_t n_known = 0;
    while (n_known < p->n_pages && find_entry(m, p->salt, p->letters, n_known + 1) != NULL)
        n_known++;
    assert_int_equal(h.n_pages, n_known);
    for (uint32_t i = 0; i < n_known; i++)
        assert_int_equal(h.pages[i], find_entry(m, p->salt, p->letters, i + 1)->page);
    return h;
}

/* As a host does: what is known is acquired, the rest computed into new pages, all inserted, and
 * the request's own references kept for a while or given back. Sometimes the known part has been
 * computed again, too. */
static void insert_both(model *m, kvl_random *random, const prompt *p)
{
    hold h = {0};
    if (kvl_test_below(random, 4) != 0) h = acquire_both(m, p);
    uint32_t pages[DEPTH_MAX];
    memcpy(pages, h.pages, sizeof pages);
    const uint32_t n_new = p->n_pages - (uint32_t)h.n_pages;
    if (kvl_page_pool_acquire(m->pool, n_new, pages + h.n_pages) != KVL_OK) {
        kvl_page_pool_release(m->pool, (uint32_t)h.n_pages, h.pages);
        return;
    }
    assert_int_equal(kvl_prefix_tree_insert(m->tree, p->salt, p->ids, p->n_ids, pages), KVL_OK);
    for (uint32_t i = 0; i < p->n_pages; i++) {
        if (find_entry(m, p->salt, p->letters, i + 1) != NULL) continue;
        assert_true(m->n_entries < ENTRIES_MAX);
        entry *e = &m->entries[m->n_entries++];
        *e = (entry){.salt = p->salt, .n_letters = i + 1, .page = pages[i], .alive = true};
        memcpy(e->letters, p->letters, i + 1);
    }
    if (m->n_holds < HOLDS_MAX && kvl_test_below(random, 2) == 0) {
        hold *kept = &m->holds[m->n_holds++];
        kept->n_pages = p->n_pages;
        memcpy(kept->pages, pages, sizeof kept->pages);
    } else {
        kvl_page_pool_release(m->pool, p->n_pages, pages);
    }
}

static bool is_held(const model *m, uint32_t page)
{
    for (size_t i = 0; i < m->n_holds; i++)
        for (size_t j = 0; j < m->holds[i].n_pages; j++)
            if (m->holds[i].pages[j] == page) return true;
    return false;
}

static bool has_child(const model *m, const entry *parent)
{
    for (size_t i = 0; i < m->n_entries; i++) {
        const entry *e = &m->entries[i];
        if (e->alive && e->salt == parent->salt && e->n_letters == parent->n_letters + 1 &&
            memcmp(e->letters, parent->letters, parent->n_letters) == 0)
            return true;
    }
    return false;
}

/* Which entries went is the tree's choice: the model asks for each. What must hold: as many went as
 * was said, nothing held did, and if too few went then none was left that could. */
static void evict_both(model *m, uint32_t n_wanted)
{
    const uint32_t n_free = kvl_page_pool_n_free(m->pool);
    const uint32_t n_freed = kvl_prefix_tree_evict(m->tree, n_wanted);
    assert_int_equal(kvl_page_pool_n_free(m->pool), n_free + n_freed);
    assert_true(n_freed == 0 || n_free + n_freed == n_wanted || n_free + n_freed < n_wanted);
    uint32_t n_gone = 0;
    for (size_t i = 0; i < m->n_entries; i++) {
        entry *e = &m->entries[i];
        if (!e->alive) continue;
        prompt p = {.salt = e->salt, .n_pages = e->n_letters};
        memcpy(p.letters, e->letters, e->n_letters);
        spell(&p, 0);
        hold h;
        kvl_prefix_tree_acquire(m->tree, p.salt, p.ids, p.n_ids, h.pages, &h.n_pages);
        kvl_page_pool_release(m->pool, (uint32_t)h.n_pages, h.pages);
        if (h.n_pages == e->n_letters) {
            assert_int_equal(h.pages[h.n_pages - 1], e->page);
            continue;
        }
        assert_false(is_held(m, e->page));
        e->alive = false;
        n_gone++;
    }
    assert_int_equal(n_gone, n_freed);
    if (kvl_page_pool_n_free(m->pool) >= n_wanted) return;
    for (size_t i = 0; i < m->n_entries; i++) {
        const entry *e = &m->entries[i];
        if (e->alive && !has_child(m, e)) assert_true(is_held(m, e->page));
    }
}

/* Every page's references are one for the tree, where it has it, and one for each hold. */
static void check_balance(const model *m)
{
    uint32_t counts[N_PAGES] = {0};
    uint32_t n_alive = 0;
    for (size_t i = 0; i < m->n_entries; i++) {
        if (!m->entries[i].alive) continue;
        counts[m->entries[i].page]++;
        n_alive++;
    }
    assert_int_equal(kvl_prefix_tree_n_pages(m->tree), n_alive);
    for (size_t i = 0; i < m->n_holds; i++)
        for (size_t j = 0; j < m->holds[i].n_pages; j++) counts[m->holds[i].pages[j]]++;
    for (uint32_t page = 0; page < N_PAGES; page++)
        assert_int_equal(kvl_page_pool_references(m->pool, page), counts[page]);
}

static void forget_dead(model *m)
{
    size_t n = 0;
    for (size_t i = 0; i < m->n_entries; i++)
        if (m->entries[i].alive) m->entries[n++] = m->entries[i];
    m->n_entries = n;
}

/* ---- who is told ---- */

typedef struct told {
    uint64_t hash, parent; /* 0: the first of a prompt */
    uint8_t letter;
} told;

typedef struct listener {
    told blocks[N_PAGES];
    size_t n_blocks;
} listener;

static const told *find_told(const listener *l, uint64_t hash)
{
    for (size_t i = 0; i < l->n_blocks; i++)
        if (l->blocks[i].hash == hash) return &l->blocks[i];
    return NULL;
}

/* Blocks come behind what is known, once. */
static void hear_stored(void *context, const uint64_t *parent, const uint64_t *hashes,
                        const uint32_t *ids, size_t n_pages)
{
    listener *l = context;
    uint64_t before = parent == NULL ? 0 : *parent;
    assert_true(n_pages > 0 && (parent == NULL || find_told(l, before) != NULL));
    for (size_t i = 0; i < n_pages; i++) {
        assert_true(l->n_blocks < N_PAGES && find_told(l, hashes[i]) == NULL);
        l->blocks[l->n_blocks++] =
            (told){hashes[i], before, (uint8_t)ids[(i + 1) * KVL_PAGE_TOKENS - 1]};
        before = hashes[i];
    }
}

/* And go before what they stand behind. */
static void hear_removed(void *context, const uint64_t *hashes, size_t n_pages)
{
    listener *l = context;
    for (size_t i = 0; i < n_pages; i++) {
        assert_non_null(find_told(l, hashes[i]));
        for (size_t b = 0; b < l->n_blocks; b++) assert_true(l->blocks[b].parent != hashes[i]);
        told *gone = &l->blocks[find_told(l, hashes[i]) - l->blocks];
        *gone = l->blocks[--l->n_blocks];
    }
}

/* Whoever was told knows as many blocks as there are, and each prefix of the model by its letters:
 * the same hash for the same prefix of a salt, whatever was split and removed in between. */
static void check_told(model *m, const listener *l)
{
    assert_int_equal(l->n_blocks, kvl_prefix_tree_n_pages(m->tree));
    for (size_t i = 0; i < m->n_entries; i++) {
        const entry *e = &m->entries[i];
        if (!e->alive) continue;
        size_t n_found = 0;
        for (size_t b = 0; b < l->n_blocks; b++) {
            const told *at = &l->blocks[b];
            uint32_t n = e->n_letters;
            while (at != NULL && n > 0 && at->letter == e->letters[n - 1]) {
                n--;
                at = find_told(l, at->parent);
            }
            n_found += n == 0 && at == NULL;
        }
        assert_in_range(n_found, 1, N_SALTS);
    }
}

/* ---- looking ---- */

static size_t n_alive_of(const model *m, uint64_t salt)
{
    size_t n = 0;
    for (size_t i = 0; i < m->n_entries; i++)
        n += m->entries[i].alive && m->entries[i].salt == salt;
    return n;
}

/* The prefix that ends with a page of the tree: no other one has the page. */
static const entry *entry_of_page(const model *m, uint32_t page)
{
    for (size_t i = 0; i < m->n_entries; i++)
        if (m->entries[i].alive && m->entries[i].page == page) return &m->entries[i];
    fail_msg("page %u is not of the model", page);
    return NULL;
}

/* A node's first page is that of a prefix of the model: behind all pages of the node above it,
 * with as many holds. */
static void check_node(const model *m, uint64_t salt, const kvl_prefix_view *view, uint32_t at)
{
    const kvl_prefix_node *node = &view->nodes[at];
    const entry *e = entry_of_page(m, node->page);
    uint32_t n_above = 0;
    uint32_t n_holders = 0;
    if (node->parent != KVL_PREFIX_VIEW_FIRST) {
        assert_true(node->parent < at);
        const kvl_prefix_node *parent = &view->nodes[node->parent];
        const entry *above = entry_of_page(m, parent->page);
        n_above = above->n_letters - 1 + parent->n_pages;
        assert_memory_equal(above->letters, e->letters, above->n_letters);
    }
    for (size_t h = 0; h < m->n_holds; h++)
        for (size_t p = 0; p < m->holds[h].n_pages; p++)
            n_holders += m->holds[h].pages[p] == e->page;
    assert_int_equal(e->salt, salt);
    assert_int_equal(e->n_letters, n_above + 1);
    assert_int_equal(node->ids[KVL_PAGE_TOKENS - 1], e->letters[n_above]);
    assert_int_equal(node->n_holders, n_holders);
    for (uint32_t i = 0; i < at; i++) assert_true(view->nodes[i].page != node->page);
}

static void check_view(const model *m, uint32_t n_max)
{
    for (uint64_t salt = 0; salt < N_SALTS + 1; salt++) {
        kvl_prefix_view view;
        uint32_t n_children[KVL_PREFIX_VIEW_NODES] = {0};
        uint32_t n_pages = 0;
        kvl_prefix_tree_look(m->tree, salt, n_max, &view);
        assert_int_equal(view.n_nodes, view.own_nodes < n_max ? view.own_nodes : n_max);
        for (uint32_t i = 0; i < view.n_nodes; i++) {
            n_pages += view.nodes[i].n_pages;
            if (view.nodes[i].parent != KVL_PREFIX_VIEW_FIRST) n_children[view.nodes[i].parent]++;
            check_node(m, salt, &view, i);
        }
        assert_int_equal(view.own_pages, n_alive_of(m, salt));
        assert_int_equal(view.own_pages + view.other_pages, kvl_prefix_tree_n_pages(m->tree));
        for (uint32_t i = 0; i < view.n_nodes; i++)
            assert_true(n_children[i] <= view.nodes[i].n_children);
        if (view.n_nodes < view.own_nodes) continue;
        assert_int_equal(n_pages, view.own_pages);
        for (uint32_t i = 0; i < view.n_nodes; i++)
            assert_int_equal(n_children[i], view.nodes[i].n_children);
    }
}

static void test_tree_matches_a_model(void **state)
{
    (void)state;
    kvl_random random = kvl_test_random();
    const int64_t live = kvl_alloc_live();
    for (int round = 0; round < 6; round++) {
        static model m;
        static listener heard;
        const kvl_prefix_tree_watcher watcher = {hear_stored, hear_removed, &heard};
        make_model(&m);
        heard.n_blocks = 0;
        kvl_prefix_tree_watch(m.tree, &watcher);
        for (int step = 0; step < 700; step++) {
            const prompt p = random_prompt(&random);
            const uint32_t action = kvl_test_below(&random, 10);
            if (action < 5) {
                insert_both(&m, &random, &p);
            } else if (action < 7 && m.n_holds < HOLDS_MAX) {
                m.holds[m.n_holds++] = acquire_both(&m, &p);
            } else if (action < 9 && m.n_holds > 0) {
                const size_t at = kvl_test_below(&random, (uint32_t)m.n_holds);
                kvl_page_pool_release(m.pool, (uint32_t)m.holds[at].n_pages, m.holds[at].pages);
                m.holds[at] = m.holds[--m.n_holds];
            } else if (action == 9) {
                evict_both(&m, kvl_test_below(&random, N_PAGES + 1));
                forget_dead(&m);
            }
            check_balance(&m);
            check_told(&m, &heard);
            check_view(&m, step % 2 == 0 ? KVL_PREFIX_VIEW_NODES : kvl_test_below(&random, 6));
        }
        evict_both(&m, N_PAGES);
        free_model(&m);
    }
    assert_true(kvl_alloc_live() == live);
}

static void insert_letters(model *m, const char *letters)
{
    prompt p = {.n_pages = (uint32_t)strlen(letters)};
    memcpy(p.letters, letters, p.n_pages);
    spell(&p, 0);
    uint32_t pages[DEPTH_MAX];
    assert_int_equal(kvl_page_pool_acquire(m->pool, p.n_pages, pages), KVL_OK);
    assert_int_equal(kvl_prefix_tree_insert(m->tree, 0, p.ids, p.n_ids, pages), KVL_OK);
    kvl_page_pool_release(m->pool, p.n_pages, pages);
}

static size_t known_of(model *m, const char *letters, uint64_t salt)
{
    prompt p = {.salt = salt, .n_pages = (uint32_t)strlen(letters)};
    memcpy(p.letters, letters, p.n_pages);
    spell(&p, 0);
    hold h;
    kvl_prefix_tree_acquire(m->tree, salt, p.ids, p.n_ids, h.pages, &h.n_pages);
    kvl_page_pool_release(m->pool, (uint32_t)h.n_pages, h.pages);
    return h.n_pages;
}

/* The leaf that was used longest ago goes first, from its end, and a parent after its children. */
static void test_eviction_takes_the_oldest(void **state)
{
    (void)state;
    static model m;
    make_model(&m);
    insert_letters(&m, "abc");
    insert_letters(&m, "abd");
    insert_letters(&m, "xy");
    assert_int_equal(known_of(&m, "abc", 0), 3); /* now abd is the oldest, then xy */
    assert_int_equal(kvl_prefix_tree_n_pages(m.tree), 6);
    assert_int_equal(kvl_prefix_tree_evict(m.tree, N_PAGES - 5), 1);
    assert_int_equal(kvl_prefix_tree_evict(m.tree, N_PAGES - 4), 1);
    assert_int_equal(known_of(&m, "xy", 0), 1);
    assert_int_equal(known_of(&m, "abd", 0), 2); /* ab is used anew, c below it is the oldest */
    assert_int_equal(kvl_prefix_tree_evict(m.tree, N_PAGES - 3), 1);
    assert_int_equal(known_of(&m, "abc", 0), 2);
    assert_int_equal(kvl_prefix_tree_evict(m.tree, N_PAGES), 3);
    assert_int_equal(kvl_prefix_tree_n_pages(m.tree), 0);
    free_model(&m);
}

static void test_salts_see_nothing_of_each_other(void **state)
{
    (void)state;
    static model m;
    make_model(&m);
    insert_letters(&m, "abc");
    assert_int_equal(known_of(&m, "abc", 0), 3);
    assert_int_equal(known_of(&m, "abc", 1), 0);
    assert_int_equal(known_of(&m, "abc", UINT64_MAX), 0);
    free_model(&m);
}

/* More first pages than buckets, so that the table grows under way. */
static void test_many_branches(void **state)
{
    (void)state;
    static model m;
    make_model(&m);
    char letters[2] = {0};
    for (int i = 1; i <= N_PAGES; i++) {
        letters[0] = (char)i;
        insert_letters(&m, letters);
    }
    for (int i = 1; i <= N_PAGES; i++) {
        letters[0] = (char)i;
        assert_int_equal(known_of(&m, letters, 0), 1);
    }
    free_model(&m);
}

/* An insert that runs out of memory leaves the tree as it was; destroying it frees everything. */
static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    const int64_t live = kvl_alloc_live();
    static model m;
    make_model(&m);
    insert_letters(&m, "aab");
    prompt p = {.n_pages = 4, .letters = "aaca"};
    spell(&p, 3);
    uint32_t pages[DEPTH_MAX];
    assert_int_equal(kvl_page_pool_acquire(m.pool, p.n_pages, pages), KVL_OK);
    kvl_status status = KVL_ERR_NO_MEMORY;
    for (int64_t allowed = 0; status != KVL_OK; allowed++) {
        const int64_t before = kvl_alloc_live();
        kvl_alloc_fail_after(allowed);
        status = kvl_prefix_tree_insert(m.tree, 0, p.ids, p.n_ids, pages);
        kvl_alloc_fail_after(-1);
        if (status == KVL_OK) break;
        assert_int_equal(status, KVL_ERR_NO_MEMORY);
        assert_true(kvl_alloc_live() == before);
        assert_int_equal(kvl_prefix_tree_n_pages(m.tree), 3);
        assert_int_equal(known_of(&m, "aab", 0), 3);
        assert_int_equal(known_of(&m, "aaca", 0), 2);
    }
    kvl_page_pool_release(m.pool, p.n_pages, pages);
    assert_int_equal(known_of(&m, "aaca", 0), 4);
    assert_int_equal(known_of(&m, "aab", 0), 3);
    free_model(&m);

    m.backend.ops = &lender;
    kvl_error error;
    assert_int_equal(kvl_page_pool_create(&m.backend, 1, 1, 16, 1, &m.pool, &error), KVL_OK);
    for (int64_t allowed = 0; allowed < 2; allowed++) {
        kvl_alloc_fail_after(allowed);
        assert_int_equal(kvl_prefix_tree_create(m.pool, &m.tree, &error), KVL_ERR_NO_MEMORY);
        kvl_alloc_fail_after(-1);
        assert_null(m.tree);
    }
    kvl_page_pool_destroy(m.pool);
    kvl_prefix_tree_destroy(NULL);
    assert_true(kvl_alloc_live() == live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tree_matches_a_model),
        cmocka_unit_test(test_eviction_takes_the_oldest),
        cmocka_unit_test(test_salts_see_nothing_of_each_other),
        cmocka_unit_test(test_many_branches),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
