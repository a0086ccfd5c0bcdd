/* host/order.h: which of those that wait goes first.
 *
 * Priority = gain + per_second * waited. The gain is what is saved for each token that must still
 * be computed, n_saved / n_remaining, up to gain_max; and, so that those with one donor, segment or
 * prefix run beside each other, near_max times the share of the prompt that the one before it has
 * just loaded. So nobody starves: who has waited (gain_max + near_max) / per_second seconds longer
 * than another goes before it, whatever the other saves. Among equal gains the first to come is the
 * first.
 * Estimates come from indices: no KV is loaded to make them.
 * Method   KVShare's cache-aware scheduling (arXiv:2503.16525), with ageing
 * Pure.    Threads  Safe from any thread. */
#ifndef KVL_HOST_ORDER_H
#define KVL_HOST_ORDER_H

#include <stddef.h>
#include <stdint.h>

typedef struct kvl_order_options {
    double per_second; /* of waiting; above 0 */
    double gain_max, near_max;
} kvl_order_options;

/* A second of waiting counts as much as saving a token for each one computed. At most 8, and 4 for
 * what is near: a request is overtaken for 12 seconds by those that come later. */
kvl_order_options kvl_order_default_options(void);

typedef struct kvl_order_item {
    double n_saved; /* tokens that need not be computed; what must be loaded counts for less */
    double n_near;  /* tokens of KV that the one that went last has loaded or computed */
    uint32_t n_remaining; /* tokens that must */
    int64_t arrived_ns;
    uint64_t number; /* of arrival: among equals the lowest goes first */
} kvl_order_item;

double kvl_order_priority(const kvl_order_options *options, const kvl_order_item *item,
                          int64_t now_ns);

/* The index of the one that goes first. items [n], n > 0. */
size_t kvl_order_first(const kvl_order_options *options, const kvl_order_item *items, size_t n,
                       int64_t now_ns);

#endif /* KVL_HOST_ORDER_H */
