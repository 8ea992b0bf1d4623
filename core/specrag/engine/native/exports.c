/* What Python calls, by way of ctypes: whole numbers are int64, arrays are addresses. */
#include "attention.h"
#include "decoder.h"
#include "pack.h"
#include "pool.h"
#include "products.h"

#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT void specrag_set_threads(int64_t threads) { pool_set_threads(threads); }

/* Bytes of a packed matrix; 0: the kind is not known. */
EXPORT int64_t specrag_packed_bytes(int64_t kind, int64_t rows, int64_t columns)
{
    return (rows + PANEL - 1) / PANEL * panel_bytes(kind, columns);
}

EXPORT void specrag_pack_blocks(
    int64_t kind, const uint8_t *blocks, int64_t rows, int64_t columns, const int64_t *order, uint8_t *panels)
{
    pack_blocks(kind, blocks, rows, columns, order, panels);
}

EXPORT void specrag_pack_floats(int64_t kind, const float *weights, int64_t rows, int64_t columns, uint8_t *panels)
{
    pack_floats(kind, weights, rows, columns, panels);
}

EXPORT void specrag_unpack_rows(
    const Matrix *matrix, const int64_t *ids, int64_t count, float *floats, uint16_t *bfloat16)
{
    unpack_rows(matrix, ids, count, floats, bfloat16);
}

typedef struct {
    const Activations *to;
    const float *from;
} Rows;

static void put_one(void *context, int64_t row)
{
    const Rows *job = context;
    put_row(job->to, row, job->from + row * job->to->columns);
}

/* out [rows][matrix rows] = x [rows][matrix columns] times the matrix, plus bias (or NULL). Returns 0: no memory. */
EXPORT int64_t specrag_multiply(const Matrix *matrix, const float *bias, const float *x, int64_t rows, float *out)
{
    const int bfloat16 = matrix->kind == BF16;
    uint8_t *buffer = aligned_alloc(64, (rows * (matrix->columns / BLOCK) * activation_bytes(bfloat16) + 63) / 64 * 64);
    if (buffer == NULL)
        return 0;
    Activations activations = {bfloat16 ? NULL : buffer, bfloat16 ? buffer : NULL, rows, matrix->columns};
    Rows job = {&activations, x};
    pool_run(put_one, &job, rows);
    Product product = {matrix, bias, out, matrix->rows, 0};
    multiply(&product, 1, &activations);
    free(buffer);
    return 1;
}

/* Attention of one conversation's last ``rows`` queries, scaled, over its keys and values. Returns 0: no memory. */
EXPORT int64_t specrag_attend(const Heads *heads, const Sequence *sequence, const float *queries, float *out)
{
    float *memory = malloc(attention_floats(heads, sequence, 1) * sizeof(float) + 1);
    if (memory == NULL)
        return 0;
    attend(heads, sequence, 1, queries, out, memory);
    free(memory);
    return 1;
}

EXPORT Workspace *specrag_workspace(void) { return calloc(1, sizeof(Workspace)); }

EXPORT void specrag_free_workspace(Workspace *workspace)
{
    free(workspace->memory);
    free(workspace);
}

EXPORT int64_t specrag_decode(const Decoder *decoder, const Pass *pass, Workspace *workspace)
{
    return decode(decoder, pass, workspace);
}
