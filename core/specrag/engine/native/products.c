#include "products.h"

#include "kernels.h"
#include "pool.h"
#include "simd.h"

/* --- activations ------------------------------------------------------------------------------------------------ */

/* Columns of one block of one row, row r of the R in its tile; out: the tile's part for the block. */
INLINE void quantise_block(uint8_t *out, const float *x, int64_t r, int64_t R)
{
    vf a = vf_load(x), b = vf_load(x + 16);
    float largest = vf_largest(vf_max(vf_abs(a), vf_abs(b)));
    float scale = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
    vi qa = vi_from_vf(vf_mul(a, vf_set1(inverse))), qb = vi_from_vf(vf_mul(b, vf_set1(inverse)));
    int8_t quants[BLOCK];
    vi_store_s8(quants, qa);
    vi_store_s8(quants + 16, qb);
    int32_t *dwords = (int32_t *)out;
    for (int j = 0; j < 8; j++)
        memcpy(dwords + j * R + r, quants + 4 * j, 4);
    int32_t first = (int32_t)vf_sum(vf_from_vi(qa)), both = first + (int32_t)vf_sum(vf_from_vi(qb));
    float *scales = (float *)(dwords + 8 * R);
    scales[r] = scale;
    scales[R + r] = scale * (float)both;
    dwords[10 * R + r] = -both;
    dwords[11 * R + r] = -first;
}

INLINE void round_block(uint8_t *out, const float *x, int64_t r, int64_t R)
{
    uint16_t rounded[BLOCK];
    vf_store_bf16(rounded, vf_load(x));
    vf_store_bf16(rounded + 16, vf_load(x + 16));
    for (int j = 0; j < 16; j++)
        memcpy((int32_t *)out + j * R + r, rounded + 2 * j, 4);
}

/* Where the tile of a row begins, how many rows it has, and which of them the row is. */
typedef struct {
    int64_t begin, rows, within;
} Place;

INLINE Place place_of(int64_t row, int64_t rows)
{
    int64_t begin = row / TILE * TILE;
    return (Place){begin, rows - begin < TILE ? rows - begin : TILE, row - begin};
}

void put_block(const Activations *to, int64_t row, int64_t block, const float *x)
{
    const Place at = place_of(row, to->rows);
    const int64_t before = at.begin * (to->columns / BLOCK) + block * at.rows;
    if (to->int8 != NULL)
        quantise_block(to->int8 + before * ACTIVATION_BYTES, x, at.within, at.rows);
    if (to->bfloat16 != NULL)
        round_block(to->bfloat16 + before * ACTIVATION_BYTES_BF16, x, at.within, at.rows);
}

void put_row(const Activations *to, int64_t row, const float *x)
{
    for (int64_t block = 0; block < to->columns / BLOCK; block++)
        put_block(to, row, block, x + block * BLOCK);
}

/* --- products --------------------------------------------------------------------------------------------------- */

/* Work that shares activations, cut into runs of panels. */
typedef struct {
    const Product *products;
    int64_t count, run;
    const Activations *x;
} Job;

static inline int64_t panels_of(const Matrix *matrix) { return (matrix->rows + PANEL - 1) / PANEL; }

/* Panels of a run: few enough to share them out evenly and to stay in the second-level cache, else many. */
static int64_t run_length(int64_t panels, int64_t bytes)
{
    int64_t fair = panels / (8 * pool_threads()), fitting = (128 << 10) / bytes;
    int64_t run = fair < fitting ? fair : fitting;
    return run < 1 ? 1 : run;
}

INLINE const uint8_t *tile_of(const Activations *x, int64_t kind, int64_t begin)
{
    const int64_t before = begin * (x->columns / BLOCK);
    return kind == BF16 ? x->bfloat16 + before * ACTIVATION_BYTES_BF16 : x->int8 + before * ACTIVATION_BYTES;
}

/* One panel's sums for R rows to where they belong. */
INLINE void deliver(const Product *p, const float *sums, int64_t panel, int64_t begin, int64_t R)
{
    const int64_t first = panel * PANEL, width = p->matrix->rows - first < PANEL ? p->matrix->rows - first : PANEL;
    for (int64_t r = 0; r < R; r++, sums += PANEL) {
        float *out = p->out + (begin + r) * p->stride + first;
        for (int64_t i = 0; i < width; i++) {
            float value = sums[i] + (p->bias != NULL ? p->bias[first + i] : 0.0f);
            out[i] = p->add ? out[i] + value : value;
        }
    }
}

static void multiply_run(void *context, int64_t index)
{
    const Job *job = context;
    const Product *p = job->products;
    int64_t runs;
    for (; index >= (runs = (panels_of(p->matrix) + job->run - 1) / job->run); p++)
        index -= runs;
    const Matrix *m = p->matrix;
    const Kernel kernel = kernel_of(m->kind);
    const int64_t bytes = panel_bytes(m->kind, m->columns), panels = panels_of(m);
    const int64_t first = index * job->run, end = first + job->run < panels ? first + job->run : panels;
    float sums[TILE * PANEL] __attribute__((aligned(64)));
    for (int64_t begin = 0; begin < job->x->rows; begin += TILE) {
        const int64_t R = job->x->rows - begin < TILE ? job->x->rows - begin : TILE;
        for (int64_t panel = first; panel < end; panel++) {
            kernel(m->panels + panel * bytes, m->columns, tile_of(job->x, m->kind, begin), sums, R);
            deliver(p, sums, panel, begin, R);
        }
    }
}

void multiply(const Product *products, int64_t count, const Activations *x)
{
    int64_t panels = 0, bytes = 1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t its = panel_bytes(products[i].matrix->kind, products[i].matrix->columns);
        panels += panels_of(products[i].matrix);
        bytes = its > bytes ? its : bytes;
    }
    Job job = {products, count, run_length(panels, bytes), x};
    int64_t runs = 0;
    for (int64_t i = 0; i < count; i++)
        runs += (panels_of(products[i].matrix) + job.run - 1) / job.run;
    pool_run(multiply_run, &job, runs);
}

/* --- the gated part of an MLP ----------------------------------------------------------------------------------- */

typedef struct {
    const Matrix *gate, *up;
    int64_t run; /* blocks of BLOCK outputs */
    const Activations *x, *out;
} Gated;

static void gated_run(void *context, int64_t index)
{
    const Gated *job = context;
    const Matrix *gate = job->gate, *up = job->up;
    const Kernel gate_kernel = kernel_of(gate->kind), up_kernel = kernel_of(up->kind);
    const int64_t gate_bytes = panel_bytes(gate->kind, gate->columns), up_bytes = panel_bytes(up->kind, up->columns);
    const int64_t blocks = gate->rows / BLOCK, first = index * job->run;
    const int64_t end = first + job->run < blocks ? first + job->run : blocks;
    float g[2][TILE * PANEL] __attribute__((aligned(64))), u[2][TILE * PANEL] __attribute__((aligned(64)));
    for (int64_t begin = 0; begin < job->x->rows; begin += TILE) {
        const int64_t R = job->x->rows - begin < TILE ? job->x->rows - begin : TILE;
        for (int64_t block = first; block < end; block++) {
            for (int half = 0; half < 2; half++) {
                const int64_t panel = 2 * block + half;
                gate_kernel(
                    gate->panels + panel * gate_bytes, gate->columns, tile_of(job->x, gate->kind, begin), g[half], R);
                up_kernel(up->panels + panel * up_bytes, up->columns, tile_of(job->x, up->kind, begin), u[half], R);
            }
            for (int64_t r = 0; r < R; r++) {
                float both[BLOCK];
                for (int half = 0; half < 2; half++) {
                    const vf z = vf_load(g[half] + PANEL * r), e = vf_exp2(vf_mul(z, vf_set1(-1.44269504f)));
                    const vf silu = vf_div(z, vf_add(e, vf_set1(1.0f)));
                    vf_store(both + PANEL * half, vf_mul(silu, vf_load(u[half] + PANEL * r)));
                }
                put_block(job->out, begin + r, block, both);
            }
        }
    }
}

void multiply_gated(const Matrix *gate, const Matrix *up, const Activations *x, const Activations *out)
{
    const int64_t blocks = gate->rows / BLOCK;
    const int64_t bytes = 2 * (panel_bytes(gate->kind, gate->columns) + panel_bytes(up->kind, up->columns));
    Gated job = {gate, up, run_length(blocks, bytes), x, out};
    pool_run(gated_run, &job, (blocks + job.run - 1) / job.run);
}
