/* cache/prefix_tree.c: nodes in one hash table and in one list by last use.
 *
 * A node owns a run of steps; a step is a page and the 16 tokens in it. Children are found through
 * a hash of (parent, first 16 tokens), so a node may have any number of them. Below nobody stand
 * the first nodes of every salt, which is hashed and compared too.
 * Using a path moves its nodes to the head of the list, deepest first: a parent always stands
 * before its children, and what stands last has none. Eviction therefore reads the list from its
 * tail. */
#include "cache/prefix_tree.h"

#include "base/alloc.h"
#include "base/hash.h"
#include "base/random.h"

#include <string.h>

typedef struct step {
    uint64_t hash; /* for the watcher */
    uint32_t page;
    uint32_t ids[KVL_PAGE_TOKENS];
} step;

typedef struct node {
    struct node *parent; /* NULL: first of its salt */
    uint64_t salt;
    uint64_t serial; /* never used again, unlike an address */
    step *steps;     /* [n_steps], at least one */
    uint32_t n_steps;
    uint32_t n_children;
    uint64_t hash;
    struct node *next_in_bucket;
    struct node *newer; /* in the list by last use */
    struct node *older;
} node;

enum { BUCKETS_FIRST = 64 };

struct kvl_prefix_tree {
    kvl_page_pool *pool; /* borrowed */
    node **buckets;      /* [n_buckets], a power of two */
    size_t n_buckets;
    size_t n_nodes;
    node *newest;
    node *oldest;
    uint64_t secret; /* so that nobody can choose prompts that fall into one bucket */
    uint64_t serial_next;
    uint32_t n_pages;
    kvl_prefix_tree_watcher watcher; /* functions NULL: none */
};

/* ---- the list by last use ---- */

static void unlist(kvl_prefix_tree *tree, node *item)
{
    if (item->newer != NULL) item->newer->older = item->older;
    if (item->older != NULL) item->older->newer = item->newer;
    if (tree->newest == item) tree->newest = item->older;
    if (tree->oldest == item) tree->oldest = item->newer;
    item->newer = item->older = NULL;
}

/* Puts an item that is in no list before `place`; at the tail where `place` is NULL. */
static void list_before(kvl_prefix_tree *tree, node *item, node *place)
{
    item->older = place;
    item->newer = place != NULL ? place->newer : tree->oldest;
    if (item->newer != NULL) item->newer->older = item;
    if (item->older != NULL) item->older->newer = item;
    if (item->newer == NULL) tree->newest = item;
    if (item->older == NULL) tree->oldest = item;
}

static void touch(kvl_prefix_tree *tree, node *deepest)
{
    for (node *item = deepest; item != NULL; item = item->parent) {
        if (tree->newest == item) continue;
        unlist(tree, item);
        list_before(tree, item, tree->newest);
    }
}

/* ---- the hash table ---- */

static uint64_t hash_of(const kvl_prefix_tree *tree, const node *parent, uint64_t salt,
                        const uint32_t *ids)
{
    struct {
        uint64_t secret;
        uint64_t salt;
        uint64_t parent;
        uint32_t ids[KVL_PAGE_TOKENS];
    } key = {.secret = tree->secret, .salt = salt, .parent = parent != NULL ? parent->serial : 0};
    memcpy(key.ids, ids, sizeof key.ids);
    return kvl_checksum(&key, sizeof key);
}

static node **bucket_of(const kvl_prefix_tree *tree, uint64_t hash)
{
    return &tree->buckets[hash & (tree->n_buckets - 1)];
}

static void bucket_add(kvl_prefix_tree *tree, node *item)
{
    item->hash = hash_of(tree, item->parent, item->salt, item->steps[0].ids);
    node **bucket = bucket_of(tree, item->hash);
    item->next_in_bucket = *bucket;
    *bucket = item;
}

static void bucket_remove(kvl_prefix_tree *tree, const node *item)
{
    node **at = bucket_of(tree, item->hash);
    while (*at != item) at = &(*at)->next_in_bucket;
    *at = item->next_in_bucket;
}

/* Twice the buckets when there are more nodes than buckets. Without memory chains grow longer,
 * which costs time only. */
static void grow_buckets(kvl_prefix_tree *tree)
{
    if (tree->n_nodes <= tree->n_buckets) return;
    node **larger = kvl_alloc_zero(2 * tree->n_buckets, sizeof(node *));
    if (larger == NULL) return;
    kvl_free(tree->buckets);
    tree->buckets = larger;
    tree->n_buckets *= 2;
    for (node *item = tree->newest; item != NULL; item = item->older) {
        node **bucket = bucket_of(tree, item->hash);
        item->next_in_bucket = *bucket;
        *bucket = item;
    }
}

static bool same_ids(const uint32_t *a, const uint32_t *b)
{
    return memcmp(a, b, KVL_PAGE_TOKENS * sizeof *a) == 0;
}

static node *find_child(const kvl_prefix_tree *tree, const node *parent, uint64_t salt,
                        const uint32_t *ids)
{
    const uint64_t hash = hash_of(tree, parent, salt, ids);
    for (node *item = *bucket_of(tree, hash); item != NULL; item = item->next_in_bucket) {
        if (item->hash == hash && item->parent == parent && item->salt == salt &&
            same_ids(item->steps[0].ids, ids))
            return item;
    }
    return NULL;
}

/* ---- walking ---- */

/* Where a walk along some ids ended. */
typedef struct place {
    node *deepest;    /* NULL when nothing matched */
    uint32_t n_steps; /* steps of it that matched, at least one */
    size_t n_pages;   /* of the ids, that matched */
} place;

/* Follows ids as far as they are known. `pages`, where not NULL, takes the pages on the way. */
static place walk(const kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids, size_t n_wanted,
                  uint32_t *pages)
{
    place at = {0};
    while (at.n_pages < n_wanted) {
        if (at.deepest != NULL && at.n_steps < at.deepest->n_steps) break;
        node *child = find_child(tree, at.deepest, salt, ids + at.n_pages * KVL_PAGE_TOKENS);
        if (child == NULL) break;
        at.deepest = child;
        at.n_steps = 0;
        while (at.n_steps < child->n_steps && at.n_pages < n_wanted &&
               same_ids(child->steps[at.n_steps].ids, ids + at.n_pages * KVL_PAGE_TOKENS)) {
            if (pages != NULL) pages[at.n_pages] = child->steps[at.n_steps].page;
            at.n_steps++;
            at.n_pages++;
        }
    }
    return at;
}

void kvl_prefix_tree_acquire(kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids,
                             size_t n_ids, uint32_t *pages, size_t *n_pages)
{
    const place at = walk(tree, salt, ids, n_ids / KVL_PAGE_TOKENS, pages);
    touch(tree, at.deepest);
    kvl_page_pool_share(tree->pool, (uint32_t)at.n_pages, pages);
    *n_pages = at.n_pages;
}

uint32_t kvl_prefix_tree_peek(const kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids,
                              size_t n_ids)
{
    const place at = walk(tree, salt, ids, n_ids / KVL_PAGE_TOKENS, NULL);
    return (uint32_t)at.n_pages * KVL_PAGE_TOKENS;
}

/* ---- changing ---- */

static void free_node(node *item)
{
    if (item == NULL) return;
    kvl_free(item->steps);
    kvl_free(item);
}

/* A node of n_steps in no list and no bucket; NULL without memory. */
static node *new_node(kvl_prefix_tree *tree, uint64_t salt, uint32_t n_steps)
{
    node *made = kvl_alloc_zero(1, sizeof *made);
    if (made == NULL) return NULL;
    made->steps = kvl_alloc_zero(n_steps, sizeof *made->steps);
    if (made->steps == NULL) {
        kvl_free(made);
        return NULL;
    }
    made->salt = salt;
    made->serial = tree->serial_next++;
    made->n_steps = n_steps;
    return made;
}

/* Gives the first steps of `lower` to `upper`, a new node of as many steps that takes its place.
 * Children stay with `lower`, so none of them has to learn of it. */
static void split(kvl_prefix_tree *tree, node *lower, node *upper)
{
    KVL_ASSERT(upper->n_steps > 0 && upper->n_steps < lower->n_steps);
    bucket_remove(tree, lower);
    const uint32_t n_left = lower->n_steps - upper->n_steps;
    memcpy(upper->steps, lower->steps, upper->n_steps * sizeof(step));
    memmove(lower->steps, lower->steps + upper->n_steps, n_left * sizeof(step));
    /* Giving memory back may fail; then it is given back with the node. */
    step *smaller = kvl_realloc(lower->steps, n_left * sizeof(step));
    if (smaller != NULL) lower->steps = smaller;
    lower->n_steps = n_left;
    upper->parent = lower->parent;
    upper->n_children = 1;
    lower->parent = upper;
    bucket_add(tree, upper);
    bucket_add(tree, lower);
    list_before(tree, upper, lower);
    tree->n_nodes++;
}

static uint64_t hash_of_step(uint64_t salt, const step *before, const uint32_t *ids)
{
    struct {
        uint64_t salt;
        uint64_t before;
        uint32_t ids[KVL_PAGE_TOKENS];
    } key = {.salt = salt, .before = before == NULL ? 0 : before->hash};
    memcpy(key.ids, ids, sizeof key.ids);
    return kvl_checksum(&key, sizeof key);
}

/* Pages by pages: a leaf has as many as there are, and no memory must be wanted here. */
static void tell_stored(const kvl_prefix_tree *tree, const node *leaf, const uint32_t *ids)
{
    enum { AT_ONCE = 64 };
    if (tree->watcher.stored == NULL) return;
    const node *parent = leaf->parent;
    const uint64_t *before = parent == NULL ? NULL : &parent->steps[parent->n_steps - 1].hash;
    for (uint32_t first = 0; first < leaf->n_steps; first += AT_ONCE) {
        uint64_t hashes[AT_ONCE];
        uint32_t n = 0;
        while (n < AT_ONCE && first + n < leaf->n_steps) {
            hashes[n] = leaf->steps[first + n].hash;
            n++;
        }
        tree->watcher.stored(tree->watcher.context, before, hashes,
                             ids + (size_t)first * KVL_PAGE_TOKENS, n);
        before = &leaf->steps[first + n - 1].hash;
    }
}

void kvl_prefix_tree_watch(kvl_prefix_tree *tree, const kvl_prefix_tree_watcher *watcher)
{
    tree->watcher = watcher == NULL ? (kvl_prefix_tree_watcher){0} : *watcher;
}

/* Adds a new leaf below `parent` and takes a reference to each of its pages. */
static void attach(kvl_prefix_tree *tree, node *parent, node *leaf, const uint32_t *ids,
                   const uint32_t *pages)
{
    for (uint32_t i = 0; i < leaf->n_steps; i++) {
        leaf->steps[i].page = pages[i];
        memcpy(leaf->steps[i].ids, ids + (size_t)i * KVL_PAGE_TOKENS, sizeof leaf->steps[i].ids);
        const step *before = i > 0            ? &leaf->steps[i - 1]
                             : parent != NULL ? &parent->steps[parent->n_steps - 1]
                                              : NULL;
        leaf->steps[i].hash = hash_of_step(leaf->salt, before, leaf->steps[i].ids);
    }
    kvl_page_pool_share(tree->pool, leaf->n_steps, pages);
    leaf->parent = parent;
    if (parent != NULL) parent->n_children++;
    bucket_add(tree, leaf);
    list_before(tree, leaf, tree->newest);
    tree->n_nodes++;
    tree->n_pages += leaf->n_steps;
    tell_stored(tree, leaf, ids);
}

kvl_status kvl_prefix_tree_insert(kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids,
                                  size_t n_ids, const uint32_t *pages)
{
    const size_t n_wanted = n_ids / KVL_PAGE_TOKENS;
    const place at = walk(tree, salt, ids, n_wanted, NULL);
    if (at.n_pages < n_wanted) {
        /* Everything that can fail comes before the first change. */
        const bool splits = at.deepest != NULL && at.n_steps < at.deepest->n_steps;
        node *leaf = new_node(tree, salt, (uint32_t)(n_wanted - at.n_pages));
        node *upper = splits ? new_node(tree, salt, at.n_steps) : NULL;
        if (leaf == NULL || (splits && upper == NULL)) {
            free_node(leaf);
            free_node(upper);
            return KVL_ERR_NO_MEMORY;
        }
        if (splits) split(tree, at.deepest, upper);
        attach(tree, splits ? upper : at.deepest, leaf, ids + at.n_pages * KVL_PAGE_TOKENS,
               pages + at.n_pages);
        grow_buckets(tree);
        touch(tree, leaf);
    } else {
        touch(tree, at.deepest);
    }
    return KVL_OK;
}

/* Releases pages of a leaf from its end until enough are free or somebody holds the next one.
 * Holders hold prefixes, so nothing that could go is left behind a page that cannot. */
static uint32_t trim(kvl_prefix_tree *tree, node *leaf, uint32_t n_free_wanted)
{
    uint32_t n_freed = 0;
    while (leaf->n_steps > 0 && kvl_page_pool_n_free(tree->pool) < n_free_wanted) {
        const uint32_t page = leaf->steps[leaf->n_steps - 1].page;
        if (kvl_page_pool_references(tree->pool, page) > 1) break;
        kvl_page_pool_release(tree->pool, 1, &page);
        leaf->n_steps--;
        n_freed++;
        if (tree->watcher.removed != NULL)
            tree->watcher.removed(tree->watcher.context, &leaf->steps[leaf->n_steps].hash, 1);
    }
    tree->n_pages -= n_freed;
    return n_freed;
}

static void remove_leaf(kvl_prefix_tree *tree, node *leaf)
{
    KVL_ASSERT(leaf->n_children == 0 && leaf->n_steps == 0);
    if (leaf->parent != NULL) leaf->parent->n_children--;
    bucket_remove(tree, leaf);
    unlist(tree, leaf);
    tree->n_nodes--;
    free_node(leaf);
}

/* A parent stands before its last child and is met later on the way, so one pass is enough. */
uint32_t kvl_prefix_tree_evict(kvl_prefix_tree *tree, uint32_t n_pages)
{
    uint32_t n_freed = 0;
    node *item = tree->oldest;
    while (item != NULL && kvl_page_pool_n_free(tree->pool) < n_pages) {
        node *next = item->newer;
        if (item->n_children == 0) {
            n_freed += trim(tree, item, n_pages);
            if (item->n_steps == 0) remove_leaf(tree, item);
        }
        item = next;
    }
    return n_freed;
}

/* ---- looking ---- */

static uint32_t index_of(const node *const *taken, uint32_t n, const node *wanted)
{
    for (uint32_t i = 0; i < n; i++)
        if (taken[i] == wanted) return i;
    return KVL_PREFIX_VIEW_FIRST;
}

static kvl_prefix_node look_at(const kvl_prefix_tree *tree, const node *item)
{
    kvl_prefix_node seen = {.n_pages = item->n_steps, .n_children = item->n_children};
    seen.page = item->steps[0].page;
    seen.n_holders = kvl_page_pool_references(tree->pool, seen.page) - 1;
    memcpy(seen.ids, item->steps[0].ids, sizeof seen.ids);
    return seen;
}

/* The list has parents before their children: whoever is taken has those above it in the view. */
void kvl_prefix_tree_look(const kvl_prefix_tree *tree, uint64_t salt, uint32_t n_max,
                          kvl_prefix_view *view)
{
    const node *taken[KVL_PREFIX_VIEW_NODES];
    KVL_ASSERT(n_max <= KVL_PREFIX_VIEW_NODES);
    *view = (kvl_prefix_view){.n_nodes = 0};
    for (const node *item = tree->newest; item != NULL; item = item->older) {
        if (item->salt != salt) {
            view->other_nodes++;
            view->other_pages += item->n_steps;
            continue;
        }
        view->own_nodes++;
        view->own_pages += item->n_steps;
        if (view->n_nodes == n_max) continue;
        kvl_prefix_node *seen = &view->nodes[view->n_nodes];
        *seen = look_at(tree, item);
        seen->parent = index_of(taken, view->n_nodes, item->parent);
        KVL_ASSERT((item->parent == NULL) == (seen->parent == KVL_PREFIX_VIEW_FIRST));
        taken[view->n_nodes++] = item;
    }
}

uint32_t kvl_prefix_tree_n_pages(const kvl_prefix_tree *tree)
{
    return tree->n_pages;
}

kvl_status kvl_prefix_tree_create(kvl_page_pool *pool, kvl_prefix_tree **tree, kvl_error *error)
{
    *tree = NULL;
    kvl_prefix_tree *made = kvl_alloc_zero(1, sizeof *made);
    node **buckets = kvl_alloc_zero(BUCKETS_FIRST, sizeof(node *));
    if (made == NULL || buckets == NULL) {
        kvl_free(made);
        kvl_free(buckets);
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "no memory for a prefix tree");
    }
    made->pool = pool;
    made->buckets = buckets;
    made->n_buckets = BUCKETS_FIRST;
    made->serial_next = 1;
    kvl_random_secret(&made->secret, sizeof made->secret);
    *tree = made;
    return KVL_OK;
}

void kvl_prefix_tree_destroy(kvl_prefix_tree *tree)
{
    if (tree == NULL) return;
    for (node *item = tree->newest, *next = NULL; item != NULL; item = next) {
        next = item->older;
        for (uint32_t i = 0; i < item->n_steps; i++)
            kvl_page_pool_release(tree->pool, 1, &item->steps[i].page);
        free_node(item);
    }
    kvl_free(tree->buckets);
    kvl_free(tree);
}
