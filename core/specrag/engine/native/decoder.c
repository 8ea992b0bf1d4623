#include "decoder.h"

#include <math.h>
#include <stdlib.h>

#include "pack.h"
#include "pool.h"
#include "products.h"
#include "simd.h"

/* A pass with what it works on. Everything is [rows][...] but ``attending``. */
typedef struct {
    const Decoder *decoder;
    const Pass *pass;
    const float *norm; /* of the coming normalisation */
    const int64_t *chosen; /* rows that it takes; NULL: all */
    int64_t layer;
    float *x, *query, *key, *value, *cosines, *sines, *attending;
    Activations normed, attended, gated, last;
    Sequence *sequences;
    int64_t *cache, *slot; /* where each row's key and value go */
} Step;

/* --- memory ----------------------------------------------------------------------------------------------------- */

/* Hands out parts of a workspace, or counts what they would take (base NULL). */
typedef struct {
    uint8_t *base;
    int64_t used;
} Arena;

static void *take(Arena *arena, int64_t bytes)
{
    void *part = arena->base == NULL ? NULL : arena->base + arena->used;
    arena->used += (bytes + 63) / 64 * 64;
    return part;
}

static Activations take_activations(Arena *arena, int64_t rows, int64_t columns, int int8, int bfloat16)
{
    const int64_t blocks = rows * (columns / BLOCK);
    Activations made = {NULL, NULL, rows, columns};
    if (int8)
        made.int8 = take(arena, blocks * ACTIVATION_BYTES);
    if (bfloat16)
        made.bfloat16 = take(arena, blocks * ACTIVATION_BYTES_BF16);
    return made;
}

static void lay_out(Step *step, Arena *arena)
{
    const Decoder *d = step->decoder;
    const int64_t rows = step->pass->rows, size = d->heads.size;
    const int64_t queries = d->heads.heads * size, keys = d->heads.kv_heads * size;
    int int8 = d->logits.kind != BF16, bfloat16 = d->logits.kind == BF16;
    for (int64_t i = 0; i < d->layers; i++) {
        const Matrix *matrices[] = {&d->layer[i].query, &d->layer[i].key, &d->layer[i].value, &d->layer[i].attended,
                                    &d->layer[i].gate,  &d->layer[i].up,  &d->layer[i].down};
        for (int j = 0; j < 7; j++)
            *(matrices[j]->kind == BF16 ? &bfloat16 : &int8) = 1;
    }
    step->sequences = take(arena, step->pass->conversations * sizeof(Sequence));
    step->cache = take(arena, rows * sizeof(int64_t));
    step->slot = take(arena, rows * sizeof(int64_t));
    step->x = take(arena, rows * d->hidden * sizeof(float));
    step->query = take(arena, rows * queries * sizeof(float));
    step->key = take(arena, rows * keys * sizeof(float));
    step->value = take(arena, rows * keys * sizeof(float));
    step->cosines = take(arena, rows * size / 2 * sizeof(float));
    step->sines = take(arena, rows * size / 2 * sizeof(float));
    step->normed = take_activations(arena, rows, d->hidden, int8, bfloat16);
    step->attended = take_activations(arena, rows, queries, int8, bfloat16);
    step->gated = take_activations(arena, rows, d->inner, int8, bfloat16);
    step->last = take_activations(arena, step->pass->wanted, d->hidden, int8, bfloat16);
}

static int reserve(Workspace *workspace, int64_t bytes)
{
    if (workspace->bytes >= bytes)
        return 1;
    free(workspace->memory);
    workspace->memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    workspace->bytes = workspace->memory == NULL ? 0 : bytes;
    return workspace->memory != NULL;
}

static void list_sequences(const Pass *pass, Sequence *sequences, int64_t *cache, int64_t *slot)
{
    int64_t first = 0;
    for (int64_t i = 0; i < pass->conversations; first += pass->counts[i++]) {
        sequences[i] = (Sequence){first, pass->counts[i], pass->held[i], NULL, NULL, pass->capacity, pass->parents};
        for (int64_t row = 0; cache != NULL && row < pass->counts[i]; row++) {
            cache[first + row] = pass->places[i];
            slot[first + row] = pass->held[i] + row;
        }
    }
}

/* --- what happens to each row between the products -------------------------------------------------------------- */

/* Run ``task`` for tiles of TILE rows: here when it is one, else on the pool. */
static void for_tiles(void (*task)(void *, int64_t), Step *step, int64_t rows)
{
    if (rows <= TILE)
        task(step, 0);
    else
        pool_run(task, step, (rows + TILE - 1) / TILE);
}

static int64_t end_of(int64_t tile, int64_t rows) { return (tile + 1) * TILE < rows ? (tile + 1) * TILE : rows; }

static float root_mean_square(const float *x, int64_t size, double epsilon)
{
    vf sum = vf_zero();
    for (int64_t i = 0; i < size; i += LANES)
        sum = vf_fma(vf_load(x + i), vf_load(x + i), sum);
    return 1.0f / sqrtf(vf_sum(sum) / (float)size + (float)epsilon);
}

static void scale_row(float *x, const float *weights, float factor, int64_t size)
{
    for (int64_t i = 0; i < size; i += LANES)
        vf_store(x + i, vf_mul(vf_mul(vf_load(x + i), vf_set1(factor)), vf_load(weights + i)));
}

static void normalise(void *context, int64_t tile)
{
    const Step *step = context;
    const Decoder *d = step->decoder;
    const Activations *to = step->chosen != NULL ? &step->last : &step->normed;
    for (int64_t row = tile * TILE; row < end_of(tile, to->rows); row++) {
        const float *x = step->x + (step->chosen != NULL ? step->chosen[row] : row) * d->hidden;
        const vf factor = vf_set1(root_mean_square(x, d->hidden, d->epsilon));
        for (int64_t block = 0; block < d->hidden / BLOCK; block++) {
            float normed[BLOCK];
            for (int i = 0; i < BLOCK; i += LANES) {
                const int64_t at = block * BLOCK + i;
                vf_store(normed + i, vf_mul(vf_mul(vf_load(x + at), factor), vf_load(step->norm + at)));
            }
            put_block(to, row, block, normed);
        }
    }
}

static void find_angles(void *context, int64_t tile)
{
    const Step *step = context;
    const Decoder *d = step->decoder;
    const int64_t half = d->heads.size / 2;
    for (int64_t row = tile * TILE; row < end_of(tile, step->pass->rows); row++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)step->pass->positions[row] * d->frequencies[i];
            step->cosines[row * half + i] = cosf(angle) * (float)d->rotary_scale;
            step->sines[row * half + i] = sinf(angle) * (float)d->rotary_scale;
        }
}

/* Rotary position embedding (Su et al., arXiv 2104.09864) of one head, its halves being the pairs; times ``factor``. */
static void rotate(float *head, const float *cosines, const float *sines, int64_t half, float factor)
{
    for (int64_t i = 0; i < half; i += LANES) {
        const vf a = vf_load(head + i), b = vf_load(head + half + i), f = vf_set1(factor);
        const vf c = vf_mul(vf_load(cosines + i), f), s = vf_mul(vf_load(sines + i), f);
        vf_store(head + i, vf_sub(vf_mul(a, c), vf_mul(b, s)));
        vf_store(head + half + i, vf_fma(b, c, vf_mul(a, s)));
    }
}

/* Normalise and rotate queries and keys, and put keys and values into the cache. */
static void place_heads(void *context, int64_t tile)
{
    const Step *step = context;
    const Decoder *d = step->decoder;
    const Layer *layer = d->layer + step->layer;
    const int64_t size = d->heads.size, kv_heads = d->heads.kv_heads, half = size / 2;
    const float query_scale = (float)(d->attention_scale * 1.4426950408889634); /* attention takes powers of two */
    for (int64_t row = tile * TILE; row < end_of(tile, step->pass->rows); row++) {
        const float *cosines = step->cosines + row * half, *sines = step->sines + row * half;
        for (int64_t head = 0; head < d->heads.heads; head++) {
            float *query = step->query + row * d->heads.row_stride + head * size;
            if (layer->query_norm != NULL)
                scale_row(query, layer->query_norm, root_mean_square(query, size, d->epsilon), size);
            rotate(query, cosines, sines, half, query_scale);
        }
        for (int64_t head = 0; head < kv_heads; head++) {
            float *key = step->key + (row * kv_heads + head) * size;
            const float *value = step->value + (row * kv_heads + head) * size;
            const int64_t place = (step->cache[row] * kv_heads + head) * step->pass->capacity + step->slot[row];
            if (layer->key_norm != NULL)
                scale_row(key, layer->key_norm, root_mean_square(key, size, d->epsilon), size);
            rotate(key, cosines, sines, half, 1.0f);
            for (int64_t i = 0; i < size; i += LANES) {
                vf_store_bf16(step->pass->keys[step->layer] + place * size + i, vf_load(key + i));
                vf_store_bf16(step->pass->values[step->layer] + place * size + i, vf_load(value + i));
            }
        }
    }
}

static void put_attended(void *context, int64_t tile)
{
    const Step *step = context;
    for (int64_t row = tile * TILE; row < end_of(tile, step->pass->rows); row++)
        put_row(&step->attended, row, step->query + row * step->decoder->heads.row_stride);
}

/* --- the pass --------------------------------------------------------------------------------------------------- */

static void attention_part(Step *step)
{
    const Decoder *d = step->decoder;
    const Layer *layer = d->layer + step->layer;
    const int64_t keys = d->heads.kv_heads * d->heads.size;
    const Product projections[] = {
        {&layer->query, layer->query_bias, step->query, d->heads.row_stride, 0},
        {&layer->key, layer->key_bias, step->key, keys, 0},
        {&layer->value, layer->value_bias, step->value, keys, 0},
    };
    step->norm = layer->attention_norm;
    for_tiles(normalise, step, step->pass->rows);
    multiply(projections, 3, &step->normed);
    for_tiles(place_heads, step, step->pass->rows);
    for (int64_t i = 0; i < step->pass->conversations; i++) {
        const int64_t offset = step->pass->places[i] * d->heads.kv_heads * step->pass->capacity * d->heads.size;
        step->sequences[i].keys = step->pass->keys[step->layer] + offset;
        step->sequences[i].values = step->pass->values[step->layer] + offset;
    }
    attend(&d->heads, step->sequences, step->pass->conversations, step->query, step->query, step->attending);
    for_tiles(put_attended, step, step->pass->rows);
    const Product back = {&layer->attended, layer->attended_bias, step->x, d->hidden, 1};
    multiply(&back, 1, &step->attended);
}

static void mlp_part(Step *step)
{
    const Layer *layer = step->decoder->layer + step->layer;
    step->norm = layer->mlp_norm;
    for_tiles(normalise, step, step->pass->rows);
    multiply_gated(&layer->gate, &layer->up, &step->normed, &step->gated);
    const Product back = {&layer->down, NULL, step->x, step->decoder->hidden, 1};
    multiply(&back, 1, &step->gated);
}

int64_t decode(const Decoder *decoder, const Pass *pass, Workspace *workspace)
{
    Step step = {.decoder = decoder, .pass = pass};
    Arena arena = {NULL, 0};
    lay_out(&step, &arena);
    Sequence *sequences = malloc(pass->conversations * sizeof(Sequence)); /* their lengths say what attention needs */
    if (sequences == NULL)
        return 0;
    list_sequences(pass, sequences, NULL, NULL);
    const int64_t attending = attention_floats(&decoder->heads, sequences, pass->conversations) * sizeof(float);
    free(sequences);
    if (!reserve(workspace, arena.used + attending))
        return 0;
    arena = (Arena){workspace->memory, 0};
    lay_out(&step, &arena);
    step.attending = take(&arena, attending);
    list_sequences(pass, step.sequences, step.cache, step.slot);

    unpack_rows(&decoder->embeddings, pass->tokens, pass->rows, step.x, NULL);
    for_tiles(find_angles, &step, pass->rows);
    for (step.layer = 0; step.layer < decoder->layers; step.layer++) {
        attention_part(&step);
        mlp_part(&step);
    }
    if (pass->wanted > 0) {
        step.norm = decoder->norm;
        step.chosen = pass->wanted_rows;
        for_tiles(normalise, &step, pass->wanted);
        const Product out = {&decoder->logits, NULL, pass->logits, decoder->logits.rows, 0};
        multiply(&out, 1, &step.last);
    }
    return 1;
}
