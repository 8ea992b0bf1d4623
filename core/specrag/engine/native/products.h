/* Products of weights in blocks with rows of activations. All of them run on the pool. */
#ifndef SPECRAG_PRODUCTS_H
#define SPECRAG_PRODUCTS_H

#include "blocks.h"

/* Rows of activations as the kernels read them; a form that no matrix wants is NULL. */
typedef struct {
    uint8_t *int8, *bfloat16;
    int64_t rows, columns;
} Activations;

/* Row ``row`` of ``to`` from floats. */
void put_row(const Activations *to, int64_t row, const float *x);

/* Columns 32 * block to 32 * block + 31 of a row. */
void put_block(const Activations *to, int64_t row, int64_t block, const float *x);

typedef struct {
    const Matrix *matrix;
    const float *bias; /* [matrix rows], or NULL */
    float *out;        /* [activation rows][stride] */
    int64_t stride;
    int64_t add; /* whether to add to what is there */
} Product;

/* Products over the same activations. */
void multiply(const Product *products, int64_t count, const Activations *x);

/* out = silu(gate x) * (up x). Rows of the matrices: a multiple of 32. */
void multiply_gated(const Matrix *gate, const Matrix *up, const Activations *x, const Activations *out);

#endif
