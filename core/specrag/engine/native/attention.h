/* Causal attention of a few or many queries over long caches of bfloat16 keys and values, with grouped heads. */
#ifndef SPECRAG_ATTENTION_H
#define SPECRAG_ATTENTION_H

#include <stdint.h>

/* Keys that are attended to at once. Chunks begin at multiples of it, whatever the queries: see attention.c. */
#define CHUNK 256

typedef struct {
    int64_t heads, kv_heads, size; /* size: of a head, a multiple of 32, at most MOST_SIZE */
    int64_t row_stride;            /* floats between the rows of queries, and of results */
} Heads;

#define MOST_SIZE 256

/* Queries of one conversation. The query of row first + i sees the first before + i + 1 keys.
 * In a tree it sees the first before keys, and of the others its ancestors' and its own: parents[i] < i is the query that
 * it follows, parents[0] is -1. A tree has at most MOST_TREE queries. */
typedef struct {
    int64_t first, rows, before;
    const uint16_t *keys, *values; /* [kv_heads][capacity][size]; they hold the queries' own already */
    int64_t capacity;
    const int64_t *parents; /* [rows]; NULL: no tree */
} Sequence;

#define MOST_TREE 64

/* Floats of working memory that attend needs, at most. */
int64_t attention_floats(const Heads *heads, const Sequence *sequences, int64_t count);

/* queries: [rows][heads][size], times the scale and log2(e). out: the same shape, and may be the same memory. */
void attend(
    const Heads *heads, const Sequence *sequences, int64_t count, const float *queries, float *out, float *memory);

#endif
