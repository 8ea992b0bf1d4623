/* Between rows of weights, as files hold them or as floats, and panels. */
#ifndef SPECRAG_PACK_H
#define SPECRAG_PACK_H

#include "blocks.h"

/* GGUF's blocks of ``rows`` rows into panels. order[i]: which row of ``blocks`` becomes row i; NULL: as they lie. */
void pack_blocks(
    int64_t kind, const uint8_t *blocks, int64_t rows, int64_t columns, const int64_t *order, uint8_t *panels);

/* Floats rounded to ``kind``: BF16, Q8_0 or Q4_1. */
void pack_floats(int64_t kind, const float *weights, int64_t rows, int64_t columns, uint8_t *panels);

/* Rows of a matrix, as floats or rounded to bfloat16; the other is NULL. ids: which rows; NULL: 0 to count - 1. */
void unpack_rows(const Matrix *matrix, const int64_t *ids, int64_t count, float *floats, uint16_t *bfloat16);

#endif
