/* A forward pass of a Llama-like decoder over rows of one or several conversations. */
#ifndef SPECRAG_DECODER_H
#define SPECRAG_DECODER_H

#include "attention.h"
#include "blocks.h"

typedef struct {
    const float *attention_norm, *mlp_norm;                           /* [hidden] */
    const float *query_norm, *key_norm;                               /* [size], or NULL */
    const float *query_bias, *key_bias, *value_bias, *attended_bias;  /* as many as the matrix has rows, or NULL */
    Matrix query, key, value, attended, gate, up, down;
} Layer;

typedef struct {
    int64_t layers, hidden, inner;
    Heads heads;
    double epsilon, attention_scale, rotary_scale;
    const float *frequencies; /* [size / 2], radians per position */
    const float *norm;        /* [hidden] */
    Matrix embeddings, logits;
    const Layer *layer;
} Decoder;

/* One pass. Rows are grouped by conversation; the caches have room for them. */
typedef struct {
    int64_t rows, conversations, wanted;
    const int64_t *tokens, *positions; /* [rows] */
    const int64_t *counts, *held, *places; /* [conversations]: rows, tokens held before them, which cache is its own */
    uint16_t *const *keys, *const *values; /* [layers]: [caches][kv_heads][capacity][size] */
    int64_t capacity;
    const int64_t *parents;     /* of a tree, see attention.h; then there is one conversation. NULL: no tree */
    const int64_t *wanted_rows; /* [wanted]: the rows whose logits are asked for */
    float *logits;              /* [wanted][vocabulary] */
} Pass;

/* Memory that passes work in; it grows with the largest of them. */
typedef struct {
    void *memory;
    int64_t bytes;
} Workspace;

/* Returns 0 when memory runs out; then nothing was written to the caches. */
int64_t decode(const Decoder *decoder, const Pass *pass, Workspace *workspace);

#endif
