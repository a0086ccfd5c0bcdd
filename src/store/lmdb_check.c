/* lmdb_check.c: walks a data.mdb page by page without LMDB.
 *
 * Format   LMDB 0.9, data version 1: pages 0 and 1 are meta pages, of which the one with the higher
 *          transaction counts; it has the roots of two trees, the list of free pages and the main
 *          table, whose nodes hold the roots of named tables.
 * Promise  In what passes, every page number that LMDB can follow lies in the file and is followed
 *          once only (so there are no circles, and no page is both used and free), every node
 *          lies in its page and overlaps no other, keys are in order, and the counts are right. */
#include "store/lmdb_check.h"

#include "base/alloc.h"

#include <inttypes.h>
#include <string.h>

enum {
    PAGE_HEADER = 16,
    NODE_HEADER = 8,
    AT_FLAGS = 10,
    AT_LOWER = 12,
    AT_UPPER = 14,
    AT_OVERFLOW_PAGES = 12,
    PAGE_BRANCH = 1,
    PAGE_LEAF = 2,
    PAGE_OVERFLOW = 4,
    PAGE_META = 8,
    NODE_BIG = 1, /* the value is in overflow pages */
    NODE_TABLE = 2,
    TREE_BYTES = 48,
    META_AT_TREES = 24,
    META_BYTES = META_AT_TREES + 2 * TREE_BYTES + 16,
    FLAG_INTEGER_KEY = 8,
    FLAG_NO_SUBDIR = 0x4000,
    DEPTH_MAX = 32,
    KEY_BYTES_MAX = 511,
    PAGE_BYTES_MAX = 65536,
    PAGES_PAST_FILE_MAX = 1 << 18,
};

static const uint32_t META_MAGIC = 0xBEEFC0DE;
static const uint32_t META_VERSION = 1;
static const uint64_t PAGE_NONE = UINT64_MAX;

typedef struct checker {
    const uint8_t *bytes;
    size_t page_bytes;
    uint64_t n_file_pages;
    uint64_t n_pages;  /* that the meta page knows; free ones may lie past the end of the file */
    uint8_t *is_taken; /* a bit a page */
    kvl_error *error;
} checker;

typedef enum tree_kind { TREE_FREE, TREE_MAIN, TREE_TABLE } tree_kind;

typedef struct tree {
    tree_kind kind;
    uint16_t flags, depth;
    uint64_t n_branch, n_leaf, n_overflow, n_entries; /* as it says, counted down to 0 */
    uint64_t root;
    const uint8_t *last_key; /* the greatest so far; NULL at first */
    size_t last_key_bytes;
    bool is_separator; /* last_key stands in a branch: the next key may be equal */
} tree;

static uint16_t get_u16(const uint8_t *bytes)
{
    uint16_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint32_t get_u32(const uint8_t *bytes)
{
    uint32_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint64_t get_u64(const uint8_t *bytes)
{
    uint64_t value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static kvl_status bad(const checker *c, uint64_t page, const char *what)
{
    return KVL_FAIL(c->error, KVL_ERR_CORRUPT, "store: page %" PRIu64 ": %s", page, what);
}

/* Each page belongs to one owner. */
static kvl_status take(checker *c, uint64_t page, uint64_t n)
{
    if (page < 2 || page >= c->n_pages || n > c->n_pages - page)
        return bad(c, page, "number is out of range");
    for (uint64_t i = page; i < page + n; i++) {
        const uint8_t bit = (uint8_t)(1u << (i % 8));
        if (c->is_taken[i / 8] & bit) return bad(c, i, "it is used twice");
        c->is_taken[i / 8] |= bit;
    }
    return KVL_OK;
}

static kvl_status take_in_file(checker *c, uint64_t page, uint64_t n)
{
    KVL_TRY(take(c, page, n));
    return page + n > c->n_file_pages ? bad(c, page, "it is past the end of the file") : KVL_OK;
}

static tree tree_read(const uint8_t *bytes, tree_kind kind)
{
    return (tree){
        .kind = kind,
        .flags = get_u16(bytes + 4),
        .depth = get_u16(bytes + 6),
        .n_branch = get_u64(bytes + 8),
        .n_leaf = get_u64(bytes + 16),
        .n_overflow = get_u64(bytes + 24),
        .n_entries = get_u64(bytes + 32),
        .root = get_u64(bytes + 40),
    };
}

static bool count_down(uint64_t *left, uint64_t n)
{
    if (*left < n) return false;
    *left -= n;
    return true;
}

/* Keys ascend through the whole tree, and a separator stands between what is left and right of
 * it. */
static bool key_follows(tree *t, const uint8_t *key, size_t n_bytes, bool is_separator)
{
    int order = 1;
    if (t->last_key != NULL && t->kind == TREE_FREE) {
        const uint64_t this_key = get_u64(key), last_key = get_u64(t->last_key);
        order = (this_key > last_key) - (this_key < last_key);
    } else if (t->last_key != NULL) {
        const size_t shorter = n_bytes < t->last_key_bytes ? n_bytes : t->last_key_bytes;
        order = memcmp(key, t->last_key, shorter);
        if (order == 0) order = (n_bytes > t->last_key_bytes) - (n_bytes < t->last_key_bytes);
    }
    if (order < 0 || (order == 0 && !t->is_separator)) return false;
    t->last_key = key;
    t->last_key_bytes = n_bytes;
    t->is_separator = is_separator;
    return true;
}

/* A record of the list of free pages: their number, then the numbers, descending. */
static kvl_status check_free_record(checker *c, uint64_t page, const uint8_t *value,
                                    uint64_t n_bytes)
{
    if (n_bytes < 8 || n_bytes % 8 != 0) return bad(c, page, "a free list has a wrong size");
    const uint64_t n = get_u64(value);
    if (n > n_bytes / 8 - 1) return bad(c, page, "a free list is longer than its record");
    uint64_t above = UINT64_MAX;
    for (uint64_t i = 1; i <= n; i++) {
        const uint64_t number = get_u64(value + 8 * i);
        if (number >= above) return bad(c, page, "a free list is not in order");
        above = number;
        KVL_TRY(take(c, number, 1));
    }
    return KVL_OK;
}

static kvl_status check_tree(checker *c, tree *t);

static kvl_status check_value(checker *c, tree *t, uint64_t page, uint16_t flags,
                              const uint8_t *value, uint64_t n_bytes)
{
    if (t->kind == TREE_FREE) return check_free_record(c, page, value, n_bytes);
    if ((flags & NODE_TABLE) == 0) return KVL_OK;
    if (n_bytes != TREE_BYTES) return bad(c, page, "the record of a table has a wrong size");
    tree table = tree_read(value, TREE_TABLE);
    return check_tree(c, &table);
}

/* Finds the value of a leaf node and checks it; `node` lies in its page as a whole. */
static kvl_status check_leaf_node(checker *c, tree *t, uint64_t page, const uint8_t *node)
{
    const uint16_t flags = get_u16(node + 4);
    const uint8_t *value = node + NODE_HEADER + get_u16(node + 6);
    const uint64_t n_bytes = get_u32(node);
    if (flags != 0 && flags != NODE_BIG && !(flags == NODE_TABLE && t->kind == TREE_MAIN))
        return bad(c, page, "a node is of a kind that KVLoom does not use");
    if (!count_down(&t->n_entries, 1)) return bad(c, page, "there are more entries than counted");
    if ((flags & NODE_BIG) == 0) return check_value(c, t, page, flags, value, n_bytes);

    const uint64_t first = get_u64(value);
    const uint64_t n_needed = (PAGE_HEADER - 1 + n_bytes) / c->page_bytes + 1;
    KVL_TRY(take_in_file(c, first, n_needed));
    const uint8_t *overflow = c->bytes + first * c->page_bytes;
    const uint64_t n_said = get_u32(overflow + AT_OVERFLOW_PAGES);
    if (get_u64(overflow) != first || get_u16(overflow + AT_FLAGS) != PAGE_OVERFLOW)
        return bad(c, first, "it is no overflow page");
    if (n_said < n_needed) return bad(c, first, "it has fewer pages than its value");
    /* A value that was written over by a shorter one keeps its pages. */
    if (n_said > n_needed) KVL_TRY(take_in_file(c, first + n_needed, n_said - n_needed));
    if (!count_down(&t->n_overflow, n_said))
        return bad(c, first, "there are more overflow pages than counted");
    return check_value(c, t, page, 0, overflow + PAGE_HEADER, n_bytes);
}

/* Whether a node lies in its page; `marks` has a bit for two bytes of the page. */
static bool node_fits(const checker *c, const uint8_t *page, size_t at, uint8_t *marks)
{
    if (at % 2 != 0 || at < get_u16(page + AT_UPPER) || at + NODE_HEADER > c->page_bytes)
        return false;
    const uint8_t *node = page + at;
    const size_t n_key = get_u16(node + 6);
    size_t n_bytes = NODE_HEADER + n_key;
    if (get_u16(page + AT_FLAGS) == PAGE_LEAF)
        n_bytes += get_u16(node + 4) & NODE_BIG ? sizeof(uint64_t) : get_u32(node);
    if (n_key > KEY_BYTES_MAX || n_bytes > c->page_bytes - at) return false;
    for (size_t i = at / 2; i < (at + n_bytes + 1) / 2; i++) {
        const uint8_t bit = (uint8_t)(1u << (i % 8));
        if (marks[i / 8] & bit) return false;
        marks[i / 8] |= bit;
    }
    return true;
}

/* All nodes of a page, before any of them is followed. */
static kvl_status check_nodes(const checker *c, uint64_t number, const uint8_t *page,
                              size_t *n_keys)
{
    uint8_t marks[PAGE_BYTES_MAX / 16];
    memset(marks, 0, c->page_bytes / 16);
    const size_t lower = get_u16(page + AT_LOWER);
    const size_t upper = get_u16(page + AT_UPPER);
    if (lower < PAGE_HEADER || lower % 2 != 0 || upper % 2 != 0 || upper < lower ||
        upper > c->page_bytes)
        return bad(c, number, "its bounds are wrong");
    *n_keys = (lower - PAGE_HEADER) / 2;
    for (size_t i = 0; i < *n_keys; i++) {
        if (!node_fits(c, page, get_u16(page + PAGE_HEADER + 2 * i), marks))
            return bad(c, number, "a node does not lie in it");
    }
    return KVL_OK;
}

static kvl_status check_page(checker *c, tree *t, uint64_t number, uint16_t level);

static kvl_status check_branch_node(checker *c, tree *t, uint64_t page, const uint8_t *node,
                                    bool is_first, uint16_t level)
{
    const uint64_t child = get_u32(node) | (uint64_t)get_u16(node + 4) << 32;
    const size_t n_key = get_u16(node + 6);
    /* The key of the first child is never looked at. */
    if (!is_first) {
        if (n_key == 0 || (t->kind == TREE_FREE && n_key != sizeof(uint64_t)))
            return bad(c, page, "a key has a wrong size");
        if (!key_follows(t, node + NODE_HEADER, n_key, true))
            return bad(c, page, "keys are not in order");
    }
    return check_page(c, t, child, (uint16_t)(level + 1));
}

static kvl_status check_leaf(checker *c, tree *t, uint64_t number, const uint8_t *page,
                             size_t n_keys)
{
    for (size_t i = 0; i < n_keys; i++) {
        const uint8_t *node = page + get_u16(page + PAGE_HEADER + 2 * i);
        const size_t n_key = get_u16(node + 6);
        if (n_key == 0 || (t->kind == TREE_FREE && n_key != sizeof(uint64_t)))
            return bad(c, number, "a key has a wrong size");
        if (!key_follows(t, node + NODE_HEADER, n_key, false))
            return bad(c, number, "keys are not in order");
        KVL_TRY(check_leaf_node(c, t, number, node));
    }
    return KVL_OK;
}

static kvl_status check_page(checker *c, tree *t, uint64_t number, uint16_t level)
{
    KVL_TRY(take_in_file(c, number, 1));
    const uint8_t *page = c->bytes + number * c->page_bytes;
    const uint16_t flags = get_u16(page + AT_FLAGS);
    const bool is_leaf = level == t->depth;
    size_t n_keys = 0;
    if (get_u64(page) != number) return bad(c, number, "it has the number of another");
    if (flags != (is_leaf ? PAGE_LEAF : PAGE_BRANCH))
        return bad(c, number, "it is of a wrong kind");
    KVL_TRY(check_nodes(c, number, page, &n_keys));
    if (!count_down(is_leaf ? &t->n_leaf : &t->n_branch, 1))
        return bad(c, number, "there are more pages than counted");
    /* LMDB leaves a branch with one child in the list of free pages now and then, nowhere else. */
    if (n_keys < (is_leaf || t->kind == TREE_FREE ? 1u : 2u)) return bad(c, number, "it is empty");
    if (is_leaf) return check_leaf(c, t, number, page, n_keys);
    for (size_t i = 0; i < n_keys; i++) {
        const uint8_t *node = page + get_u16(page + PAGE_HEADER + 2 * i);
        KVL_TRY(check_branch_node(c, t, number, node, i == 0, level));
    }
    return KVL_OK;
}

static kvl_status check_tree(checker *c, tree *t)
{
    const uint16_t expected = t->kind == TREE_FREE ? FLAG_INTEGER_KEY : 0;
    const uint16_t ignored = t->kind == TREE_FREE ? FLAG_NO_SUBDIR : 0;
    if ((t->flags & ~ignored) != expected) {
        return KVL_FAIL(c->error, KVL_ERR_FOREIGN,
                        "store: a table has flags 0x%x; it is not one of KVLoom's", t->flags);
    }
    if (t->root == PAGE_NONE) {
        if (t->depth != 0) return bad(c, 0, "an empty tree has levels");
    } else {
        if (t->depth == 0 || t->depth > DEPTH_MAX) return bad(c, t->root, "its tree is too deep");
        KVL_TRY(check_page(c, t, t->root, 1));
    }
    if (t->n_branch != 0 || t->n_leaf != 0 || t->n_overflow != 0 || t->n_entries != 0)
        return bad(c, t->root, "its tree has less than was counted");
    return KVL_OK;
}

static kvl_status check_meta(const uint8_t *page, size_t n_bytes, kvl_error *error)
{
    if (n_bytes < PAGE_HEADER + META_BYTES)
        return KVL_FAIL(error, KVL_ERR_CORRUPT, "store: the file has only %zu bytes", n_bytes);
    const uint8_t *meta = page + PAGE_HEADER;
    if ((get_u16(page + AT_FLAGS) & PAGE_META) == 0 || get_u32(meta) != META_MAGIC)
        return KVL_FAIL(error, KVL_ERR_CORRUPT, "store: the file does not start like LMDB's");
    if (get_u32(meta + 4) != META_VERSION) {
        return KVL_FAIL(error, KVL_ERR_FOREIGN, "store: LMDB's format is %u, this build reads %u",
                        get_u32(meta + 4), META_VERSION);
    }
    return KVL_OK;
}

/* Picks the meta page that LMDB will pick, and reads the sizes. */
static kvl_status read_metas(checker *c, size_t n_bytes, const uint8_t **picked)
{
    KVL_TRY(check_meta(c->bytes, n_bytes, c->error));
    const uint8_t *first = c->bytes + PAGE_HEADER;
    const size_t page_bytes = get_u32(first + META_AT_TREES);
    if (page_bytes < 256 || page_bytes > PAGE_BYTES_MAX / 2 || (page_bytes & (page_bytes - 1)) != 0)
        return bad(c, 0, "the size of pages is wrong");
    if (n_bytes < 2 * page_bytes) return bad(c, 1, "it is past the end of the file");
    KVL_TRY(check_meta(c->bytes + page_bytes, page_bytes, c->error));
    const uint8_t *second = c->bytes + page_bytes + PAGE_HEADER;
    if (get_u32(second + META_AT_TREES) != page_bytes)
        return bad(c, 1, "the size of pages is wrong");
    enum { AT_LAST_PAGE = META_AT_TREES + 2 * TREE_BYTES, AT_TRANSACTION = AT_LAST_PAGE + 8 };
    *picked = get_u64(first + AT_TRANSACTION) < get_u64(second + AT_TRANSACTION) ? second : first;
    c->page_bytes = page_bytes;
    c->n_file_pages = n_bytes / page_bytes;
    const uint64_t last_page = get_u64(*picked + AT_LAST_PAGE);
    if (last_page < 1 || last_page >= c->n_file_pages + PAGES_PAST_FILE_MAX)
        return bad(c, last_page, "the last page is out of range");
    if (get_u64(*picked + AT_TRANSACTION) > UINT64_MAX / 2)
        return bad(c, 0, "the number of the transaction is out of range");
    c->n_pages = last_page + 1;
    return KVL_OK;
}

kvl_status kvl_lmdb_check(const uint8_t *bytes, size_t n_bytes, kvl_error *error)
{
    checker c = {.bytes = bytes, .error = error};
    const uint8_t *meta = NULL;
    KVL_TRY(read_metas(&c, n_bytes, &meta));
    c.is_taken = kvl_alloc_zero((size_t)(c.n_pages / 8 + 1), 1);
    if (c.is_taken == NULL)
        return KVL_FAIL(error, KVL_ERR_NO_MEMORY, "store: no memory to check it");
    tree main_table = tree_read(meta + META_AT_TREES + TREE_BYTES, TREE_MAIN);
    tree free_list = tree_read(meta + META_AT_TREES, TREE_FREE);
    kvl_status status = check_tree(&c, &main_table);
    if (status == KVL_OK) status = check_tree(&c, &free_list);
    kvl_free(c.is_taken);
    return status;
}
