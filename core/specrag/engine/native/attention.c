/* Attention over chunks of keys, whose results are joined by their largest scores (flash-decoding; Dao et al., arXiv
 * 2205.14135, section 3.1).
 *
 * A few queries share out the chunks over the threads, many share out themselves. What a query becomes is the same
 * either way, and whatever queries stand beside it: chunks begin at the same keys, every chunk is summed in one order,
 * the chunks are joined in one order, and a key that a query does not see adds an exact zero.
 */
#include "attention.h"

#include <math.h>
#include <stddef.h>

#include "pool.h"
#include "simd.h"

/* Up to so many queries of a step the chunks are shared out. */
#define FEW MOST_TREE
/* Rows (a query of one head) that meet a chunk together: their scores stay in the second-level cache. */
#define ROWS 96
/* Rows of one pass of the inner loops, as many as registers hold. */
#define SCORE_ROWS 8
#define VALUE_ROWS 6
#define KEYS 16 /* of one vector of scores */

/* What a row found in a chunk: the largest score, the sum of the weights, the weighted sum of the values. */
#define PARTIAL(size) ((size) + 2)

typedef struct {
    const uint16_t *keys, *values; /* of the chunk */
    int64_t count, size;           /* keys in it */
} Chunk;

static const uint16_t zeros[MOST_SIZE];

/* --- one chunk, a few rows -------------------------------------------------------------------------------------- */

#define CASE(rows, call)                                                                                               \
    case rows: {                                                                                                       \
        enum { R = rows };                                                                                             \
        call;                                                                                                          \
        break;                                                                                                         \
    }

/* Scores of R rows with 16 keys. columns: [size / 2][16] pairs; queries: [R][size / 2] pairs; scores: [R][CHUNK]. */
INLINE void score_rows(const int32_t *columns, const int32_t *queries, int64_t pairs, float *scores, const int R)
{
    vf sum[SCORE_ROWS];
    for (int r = 0; r < R; r++)
        sum[r] = vf_zero();
    for (int64_t i = 0; i < pairs; i++) {
        const vi keys = vi_load(columns + KEYS * i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            sum[r] = dot2(sum[r], keys, vi_set1(queries[r * pairs + i]));
    }
    for (int r = 0; r < R; r++)
        vf_store(scores + CHUNK * r, sum[r]);
}

static void score(const Chunk *chunk, const int32_t *queries, int64_t rows, float *scores)
{
    int32_t columns[MOST_SIZE / 2 * KEYS] __attribute__((aligned(64)));
    const int64_t pairs = chunk->size / 2;
    for (int64_t first = 0; first < chunk->count; first += KEYS) {
        const uint16_t *keys[KEYS];
        for (int64_t i = 0; i < KEYS; i++) {
            keys[i] = first + i < chunk->count ? chunk->keys + (first + i) * chunk->size : zeros;
            /* Values are read after all keys: by then they are here. */
            if (first + i < chunk->count)
                for (int64_t line = 0; line < chunk->size; line += 32)
                    __builtin_prefetch(chunk->values + (first + i) * chunk->size + line, 0, 2);
        }
        for (int64_t part = 0; part < pairs; part += 16)
            transpose(keys, 2 * part, columns + KEYS * part);
        for (int64_t row = 0; row < rows; row += SCORE_ROWS) {
            const int32_t *q = queries + row * pairs;
            float *out = scores + row * CHUNK + first;
            switch (rows - row) {
                CASE(1, score_rows(columns, q, pairs, out, R))
                CASE(2, score_rows(columns, q, pairs, out, R))
                CASE(3, score_rows(columns, q, pairs, out, R))
                CASE(4, score_rows(columns, q, pairs, out, R))
                CASE(5, score_rows(columns, q, pairs, out, R))
                CASE(6, score_rows(columns, q, pairs, out, R))
                CASE(7, score_rows(columns, q, pairs, out, R))
            default: score_rows(columns, q, pairs, out, SCORE_ROWS);
            }
        }
    }
}

/* Weights of the ``visible`` first keys, zeros for the rest of ``count``; returns what their sum is. */
static float weigh(const float *scores, int64_t visible, int64_t count, float *largest, uint16_t *weights)
{
    const int64_t whole = visible / KEYS * KEYS;
    const vf nothing = vf_set1(-INFINITY);
    vf most = nothing, sum = vf_zero();
    for (int64_t i = 0; i < whole; i += KEYS)
        most = vf_max(most, vf_load(scores + i));
    if (whole < visible)
        most = vf_max(most, vf_first(vf_load(scores + whole), visible - whole, nothing));
    *largest = vf_largest(most);
    const vf shift = vf_set1(*largest);
    for (int64_t i = 0; i < whole; i += KEYS)
        vf_store_bf16(weights + i, vf_exp2_coarse(vf_sub(vf_load(scores + i), shift)));
    for (int64_t i = whole; i < count; i += KEYS) {
        const vf weight = vf_exp2_coarse(vf_sub(vf_load(scores + i), shift));
        vf_store_bf16(weights + i, vf_first(weight, visible - i, vf_zero()));
    }
    for (int64_t i = 0; i < visible; i += KEYS)
        sum = vf_add(sum, vf_from_bf16(weights + i));
    return vf_sum(sum);
}

/* 64 columns (or 32) of the weighted sums of the values, of R rows. weights: [R][CHUNK]; out: R partial results. */
INLINE void value_rows(
    const Chunk *chunk, const uint16_t *weights, int64_t column, float *out, const int parts, const int R)
{
    vf sum[VALUE_ROWS][4];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * parts; i++)
            sum[r][i] = vf_zero();
    for (int64_t key = 0; key < chunk->count; key += 2) {
        const uint16_t *a = chunk->values + key * chunk->size + column;
        const uint16_t *b = key + 1 < chunk->count ? a + chunk->size : zeros;
        vi pairs[4];
#pragma GCC unroll 2
        for (int i = 0; i < parts; i++)
            pairs_of(a + 32 * i, b + 32 * i, pairs + 2 * i);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, weights + r * CHUNK + key, 4);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * parts; i++)
                sum[r][i] = dot2(sum[r][i], pairs[i], vi_set1(pair));
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * parts; i++)
            vf_store(out + r * PARTIAL(chunk->size) + column + 16 * i, sum[r][i]);
}

INLINE void add_values(
    const Chunk *chunk, const uint16_t *weights, int64_t rows, int64_t column, float *partial, const int parts)
{
    for (int64_t row = 0; row < rows; row += VALUE_ROWS) {
        const uint16_t *own = weights + row * CHUNK;
        float *out = partial + row * PARTIAL(chunk->size);
        switch (rows - row) {
            CASE(1, value_rows(chunk, own, column, out, parts, R))
            CASE(2, value_rows(chunk, own, column, out, parts, R))
            CASE(3, value_rows(chunk, own, column, out, parts, R))
            CASE(4, value_rows(chunk, own, column, out, parts, R))
            CASE(5, value_rows(chunk, own, column, out, parts, R))
        default: value_rows(chunk, own, column, out, parts, VALUE_ROWS);
        }
    }
}

/* Up to ROWS rows over a chunk. visible[i]: keys of the chunk that row i sees; partial: [rows][PARTIAL(size)]. */
static void attend_chunk(
    const Chunk *chunk, const int32_t *queries, const int64_t *visible, int64_t rows, float *partial)
{
    float scores[ROWS * CHUNK] __attribute__((aligned(64)));
    uint16_t weights[ROWS * CHUNK] __attribute__((aligned(64)));
    score(chunk, queries, rows, scores);
    for (int64_t row = 0; row < rows; row++) {
        float *own = partial + row * PARTIAL(chunk->size) + chunk->size;
        own[1] = weigh(scores + row * CHUNK, visible[row], chunk->count, own, weights + row * CHUNK);
    }
    for (int64_t column = 0; column < chunk->size; column += 64)
        if (chunk->size - column >= 64)
            add_values(chunk, weights, rows, column, partial, 2);
        else
            add_values(chunk, weights, rows, column, partial, 1);
}

/* Add what a row found in the next chunk to what it found before. */
INLINE void join(float *found, const float *partial, int64_t size)
{
    const float most = fmaxf(found[size], partial[size]);
    float kept[LANES], added[LANES];
    vf_store(kept, vf_exp2(vf_set1(found[size] - most)));
    vf_store(added, vf_exp2(vf_set1(partial[size] - most)));
    for (int64_t i = 0; i < size; i += LANES) {
        const vf before = vf_mul(vf_load(found + i), vf_set1(kept[0]));
        vf_store(found + i, vf_fma(vf_load(partial + i), vf_set1(added[0]), before));
    }
    found[size] = most;
    found[size + 1] = fmaf(partial[size + 1], added[0], found[size + 1] * kept[0]);
}

static void divide(const float *found, int64_t size, float *out)
{
    for (int64_t i = 0; i < size; i += LANES)
        vf_store(out + i, vf_div(vf_load(found + i), vf_set1(found[size + 1])));
}

/* --- all of them ------------------------------------------------------------------------------------------------ */

typedef struct {
    const Heads *heads;
    const Sequence *sequences;
    int64_t count;
    const float *queries;
    float *out, *memory;
} Job;

static int64_t chunks_of(int64_t keys) { return (keys + CHUNK - 1) / CHUNK; }

static int64_t keys_of(const Sequence *s) { return s->before + s->rows; }

/* Queries of a sequence that go together when there are many. */
static int64_t block_of(const Heads *heads)
{
    const int64_t group = heads->heads / heads->kv_heads;
    return group >= ROWS ? 1 : ROWS / group;
}

static Chunk chunk_of(const Heads *heads, const Sequence *s, int64_t head, int64_t index)
{
    const int64_t first = index * CHUNK, left = keys_of(s) - first;
    const int64_t offset = (head * s->capacity + first) * heads->size;
    return (Chunk){s->keys + offset, s->values + offset, left < CHUNK ? left : CHUNK, heads->size};
}

/* Where the row'th row of a block of queries lies: of query first + row / group, head row % group of the group. */
static int64_t place_of(const Job *job, const Sequence *s, int64_t head, int64_t first, int64_t row)
{
    const int64_t group = job->heads->heads / job->heads->kv_heads;
    const int64_t query = s->first + first + row / group;
    return query * job->heads->row_stride + (head * group + row % group) * job->heads->size;
}

/* Keys that the query ``query`` sees. */
static int64_t seen_by(const Sequence *s, int64_t query)
{
    int64_t depth = query;
    if (s->parents != NULL)
        for (depth = 0; (query = s->parents[query]) >= 0;)
            depth++;
    return s->before + depth + 1;
}

/* Rows ``row`` to ``row + rows - 1`` of the queries from ``first`` on, over the chunk ``index`` of one key/value head. */
static void attend_rows(const Job *job, const Sequence *s, int64_t head, int64_t index, Chunk chunk, int64_t first,
                        int64_t row, int64_t rows, float *partial)
{
    int32_t pairs[ROWS * MOST_SIZE / 2] __attribute__((aligned(64)));
    int64_t visible[ROWS];
    const int64_t size = job->heads->size, group = job->heads->heads / job->heads->kv_heads;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t sees = seen_by(s, first + (row + i) / group) - index * CHUNK;
        visible[i] = sees < 0 ? 0 : sees < chunk.count ? sees : chunk.count;
        const float *from = job->queries + place_of(job, s, head, first, row + i);
        for (int64_t j = 0; j < size; j += LANES)
            vf_store_bf16((uint16_t *)(pairs + i * (size / 2)) + j, vf_load(from + j));
    }
    /* Without a tree the last row sees the most. With one, all rows are of one query or see all of the chunk. */
    chunk.count = visible[rows - 1];
    if (chunk.count > 0)
        attend_chunk(&chunk, pairs, visible, rows, partial);
}

/* One query of a tree over a chunk that holds keys of the tree. They are brought into the order of a text that has no
 * other branches: so the query becomes what it becomes in that text, bit for bit. */
static void attend_in_tree(const Job *job, const Sequence *s, int64_t head, int64_t index, int64_t query, float *partial)
{
    uint16_t keys[CHUNK * MOST_SIZE], values[CHUNK * MOST_SIZE];
    const int64_t size = job->heads->size, group = job->heads->heads / job->heads->kv_heads, first = index * CHUNK;
    const int64_t bytes = size * sizeof(uint16_t), seen = seen_by(s, query);
    Chunk chunk = chunk_of(job->heads, s, head, index);
    if (seen - s->before - 1 != query && seen > first) { /* its ancestors are not all queries before it */
        const int64_t shared = s->before > first ? s->before - first : 0;
        memcpy(keys, chunk.keys, shared * bytes);
        memcpy(values, chunk.values, shared * bytes);
        int64_t node = query;
        for (int64_t at = seen - 1; at >= first && at >= s->before; at--, node = s->parents[node])
            if (at < first + CHUNK) {
                const int64_t offset = (s->before + node - first) * size; /* may be in a later chunk */
                memcpy(keys + (at - first) * size, chunk.keys + offset, bytes);
                memcpy(values + (at - first) * size, chunk.values + offset, bytes);
            }
        chunk = (Chunk){keys, values, seen - first < CHUNK ? seen - first : CHUNK, size};
    }
    for (int64_t row = 0; row < group; row += ROWS) {
        const int64_t some = group - row < ROWS ? group - row : ROWS;
        attend_rows(job, s, head, index, chunk, query, row, some, partial + row * PARTIAL(size));
    }
}

/* Memory of a sequence whose chunks are shared out: [chunks][kv_heads][rows * group][PARTIAL(size)]. */
static int64_t floats_of(const Heads *heads, const Sequence *s)
{
    return chunks_of(keys_of(s)) * s->rows * heads->heads * PARTIAL(heads->size);
}

/* Item ``index``: a chunk of a head of a sequence. */
static void attend_few(void *context, int64_t index)
{
    const Job *job = context;
    const Sequence *s = job->sequences;
    float *memory = job->memory;
    int64_t items;
    for (; index >= (items = chunks_of(keys_of(s)) * job->heads->kv_heads); s++) {
        index -= items;
        memory += floats_of(job->heads, s);
    }
    const int64_t head = index / chunks_of(keys_of(s)), chunk = index % chunks_of(keys_of(s));
    const int64_t rows = s->rows * job->heads->heads / job->heads->kv_heads, stride = PARTIAL(job->heads->size);
    float *partial = memory + (chunk * job->heads->kv_heads + head) * rows * stride;
    if (s->parents != NULL && (chunk + 1) * CHUNK > s->before) {
        for (int64_t query = 0; query < s->rows; query++)
            attend_in_tree(job, s, head, chunk, query, partial + query * (rows / s->rows) * stride);
        return;
    }
    for (int64_t row = 0; row < rows; row += ROWS)
        attend_rows(job, s, head, chunk, chunk_of(job->heads, s, head, chunk), 0, row,
                    rows - row < ROWS ? rows - row : ROWS, partial + row * stride);
}

/* Item ``index``: the query ``index`` of all sequences. */
static void join_few(void *context, int64_t index)
{
    const Job *job = context;
    const Sequence *s = job->sequences;
    const float *memory = job->memory;
    for (; index >= s->rows; s++) {
        index -= s->rows;
        memory += floats_of(job->heads, s);
    }
    const int64_t size = job->heads->size, kv_heads = job->heads->kv_heads, group = job->heads->heads / kv_heads;
    const int64_t rows = s->rows * group, stride = PARTIAL(size), chunks = chunks_of(seen_by(s, index));
    float found[PARTIAL(MOST_SIZE)];
    for (int64_t member = 0; member < job->heads->heads; member++) {
        const int64_t head = member / group, row = index * group + member % group;
        const float *partial = memory + (head * rows + row) * stride;
        memcpy(found, partial, stride * sizeof(float));
        for (int64_t chunk = 1; chunk < chunks; chunk++)
            join(found, partial + chunk * kv_heads * rows * stride, size);
        divide(found, size, job->out + place_of(job, s, head, 0, row));
    }
}

/* Item ``index``: a block of queries of a head of a sequence, over all of its chunks. */
static void attend_many(void *context, int64_t index)
{
    const Job *job = context;
    const Sequence *s = job->sequences;
    const int64_t size = job->heads->size, kv_heads = job->heads->kv_heads, group = job->heads->heads / kv_heads;
    const int64_t block = block_of(job->heads), stride = PARTIAL(size);
    int64_t items;
    for (; index >= (items = (s->rows + block - 1) / block * kv_heads); s++)
        index -= items;
    /* The last blocks see the most keys: they come first, so that no thread is left with one of them at the end. */
    const int64_t head = index % kv_heads, first = (s->rows - 1) / block * block - index / kv_heads * block;
    const int64_t queries = s->rows - first < block ? s->rows - first : block, rows = queries * group;
    float found[ROWS * PARTIAL(MOST_SIZE)], partial[ROWS * PARTIAL(MOST_SIZE)];
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int64_t some = rows - row < ROWS ? rows - row : ROWS;
        const int64_t chunks = chunks_of(s->before + first + (row + some - 1) / group + 1);
        attend_rows(job, s, head, 0, chunk_of(job->heads, s, head, 0), first, row, some, found);
        for (int64_t chunk = 1; chunk < chunks; chunk++) {
            attend_rows(job, s, head, chunk, chunk_of(job->heads, s, head, chunk), first, row, some, partial);
            for (int64_t i = 0; i < some; i++)
                if (chunk < chunks_of(s->before + first + (row + i) / group + 1))
                    join(found + i * stride, partial + i * stride, size);
        }
        for (int64_t i = 0; i < some; i++)
            divide(found + i * stride, size, job->out + place_of(job, s, head, first, row + i));
    }
}

static int64_t rows_of(const Sequence *sequences, int64_t count)
{
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++)
        rows += sequences[i].rows;
    return rows;
}

int64_t attention_floats(const Heads *heads, const Sequence *sequences, int64_t count)
{
    int64_t floats = 0;
    for (int64_t i = 0; i < count && rows_of(sequences, count) <= FEW; i++)
        floats += floats_of(heads, sequences + i);
    return floats;
}

void attend(
    const Heads *heads, const Sequence *sequences, int64_t count, const float *queries, float *out, float *memory)
{
    Job job = {heads, sequences, count, queries, out, memory};
    const int64_t rows = rows_of(sequences, count);
    int64_t items = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t blocks = (sequences[i].rows + block_of(heads) - 1) / block_of(heads);
        items += (rows <= FEW ? chunks_of(keys_of(sequences + i)) : blocks) * heads->kv_heads;
    }
    pool_run(rows <= FEW ? attend_few : attend_many, &job, items);
    if (rows <= FEW)
        pool_run(join_few, &job, rows);
}
