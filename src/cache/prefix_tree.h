/* cache/prefix_tree.h: radix tree over token ids; nodes own runs of whole pages with exact KV.
 *
 * Only what a host computed itself with exact KV before it is inserted. Sharing is by whole pages:
 * the last, partly filled page of a prompt is never shared. A salt (tenant and cache_salt, hashed)
 * separates trees completely.
 * Method   RadixAttention (SGLang, arXiv:2312.07104, section 3), page-aligned.
 * Threads  The engine thread only. */
#ifndef KVL_CACHE_PREFIX_TREE_H
#define KVL_CACHE_PREFIX_TREE_H

#include "cache/page_pool.h"

typedef struct kvl_prefix_tree kvl_prefix_tree;

KVL_MUST_USE kvl_status kvl_prefix_tree_create(kvl_page_pool *pool, kvl_prefix_tree **tree,
                                               kvl_error *error);
/* Releases the pages that the tree holds. NULL does nothing. */
void kvl_prefix_tree_destroy(kvl_prefix_tree *tree);

/* Finds the longest prefix of ids held, in whole pages, and gives the caller one reference to each
 * of its pages.
 * pages     [n_ids / KVL_PAGE_TOKENS] room; *n_pages of it are filled, 0 when nothing matches
 * Result    pages are the caller's to release */
void kvl_prefix_tree_acquire(kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids,
                             size_t n_ids, uint32_t *pages, size_t *n_pages);

/* How many leading ids are held, in whole pages; nothing is taken, nor counts as used. */
uint32_t kvl_prefix_tree_peek(const kvl_prefix_tree *tree, uint64_t salt, const uint32_t *ids,
                              size_t n_ids);

/* Inserts the KV of ids: pages [n_ids / KVL_PAGE_TOKENS], whole pages only; the tree takes a
 * reference of its own to those that it keeps, and keeps what it had where it knew the prefix.
 * Errors   KVL_ERR_NO_MEMORY: the tree is as before */
KVL_MUST_USE kvl_status kvl_prefix_tree_insert(kvl_prefix_tree *tree, uint64_t salt,
                                               const uint32_t *ids, size_t n_ids,
                                               const uint32_t *pages);

/* Frees leaves that nobody but the tree holds, least recently used first, until n_pages are free
 * in the pool or nothing is left to free. Returns how many pages it freed. */
uint32_t kvl_prefix_tree_evict(kvl_prefix_tree *tree, uint32_t n_pages);

/* Who is told what enters and leaves the tree. Calls come while it changes: do not use it then. */
typedef struct kvl_prefix_tree_watcher {
    /* n_pages pages behind `parent` (NULL: the first of a prompt), by their hashes, and their ids
     * [n_pages * KVL_PAGE_TOKENS]. Borrowed. */
    void (*stored)(void *context, const uint64_t *parent, const uint64_t *hashes,
                   const uint32_t *ids, size_t n_pages);
    void (*removed)(void *context, const uint64_t *hashes, size_t n_pages);
    void *context;
} kvl_prefix_tree_watcher;

/* A page's hash is one of salt, the page before it and its ids: the same prefix has the same one.
 * NULL: nobody is told any more. */
void kvl_prefix_tree_watch(kvl_prefix_tree *tree, const kvl_prefix_tree_watcher *watcher);

/* ---- looking ---- */

#define KVL_PREFIX_VIEW_NODES 200u
#define KVL_PREFIX_VIEW_FIRST UINT32_MAX

/* A node as it stood at one moment. */
typedef struct kvl_prefix_node {
    uint32_t parent; /* its place among those of the view, before this one; or ..._VIEW_FIRST */
    uint32_t n_pages, n_children;
    uint32_t page;                 /* the first of its pages */
    uint32_t n_holders;            /* of its first page, beside the tree */
    uint32_t ids[KVL_PAGE_TOKENS]; /* of its first page */
} kvl_prefix_node;

/* Nodes of one salt, last used first, and sums over all that are there. */
typedef struct kvl_prefix_view {
    kvl_prefix_node nodes[KVL_PREFIX_VIEW_NODES]; /* [n_nodes] */
    uint32_t n_nodes;
    uint32_t own_nodes, own_pages;     /* of the salt, those that are not in the view too */
    uint32_t other_nodes, other_pages; /* of all other salts */
} kvl_prefix_view;

/* Copies at most n_max nodes (KVL_PREFIX_VIEW_NODES) of a salt; none stands there without those
 * above it. Nothing is taken, nor counts as used. */
void kvl_prefix_tree_look(const kvl_prefix_tree *tree, uint64_t salt, uint32_t n_max,
                          kvl_prefix_view *view);

uint32_t kvl_prefix_tree_n_pages(const kvl_prefix_tree *tree);

#endif /* KVL_CACHE_PREFIX_TREE_H */
