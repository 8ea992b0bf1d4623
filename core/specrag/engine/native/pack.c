#include "pack.h"

#include <string.h>

#include "plain.h"
#include "pool.h"
#include "simd.h"

/* --- panels ----------------------------------------------------------------------------------------------------- */

/* 32 quants of row ``lane`` of a panel that was all zeros. */
static void write_quants(uint8_t *low, uint8_t *high, int lane, const uint8_t *q, int bits)
{
    for (int i = 0; i < BLOCK; i++) {
        const int vector = i / 4, byte = 4 * lane + i % 4;
        if (bits == 8) {
            low[64 * vector + byte] = q[i];
            continue;
        }
        low[64 * (vector & 3) + byte] |= (q[i] & 15) << (vector >> 2 << 2);
        if (bits == 5)
            high[byte] |= q[i] >> 4 << vector;
        else if (bits == 6)
            high[64 * (vector >> 2) + byte] |= q[i] >> 4 << 2 * (vector & 3);
    }
}

static void read_quants(const uint8_t *low, const uint8_t *high, int lane, uint8_t *q, int bits)
{
    for (int i = 0; i < BLOCK; i++) {
        const int vector = i / 4, byte = 4 * lane + i % 4;
        if (bits == 8) {
            q[i] = low[64 * vector + byte];
            continue;
        }
        q[i] = low[64 * (vector & 3) + byte] >> (vector >> 2 << 2) & 15;
        if (bits == 5)
            q[i] |= (high[byte] >> vector & 1) << 4;
        else if (bits == 6)
            q[i] |= (high[64 * (vector >> 2) + byte] >> 2 * (vector & 3) & 3) << 4;
    }
}

/* Number ``index`` of a superblock's 256 six-bit numbers. */
static void write_six_bits(uint8_t *packed, int index, uint8_t value)
{
    packed[index / 128 * 64 + index % 64] |= (value & 15) << (index / 64 % 2 * 4);
    packed[128 + index % 64] |= value >> 4 << (index / 64 * 2);
}

static uint8_t read_six_bits(const uint8_t *packed, int index)
{
    return (packed[index / 128 * 64 + index % 64] >> (index / 64 % 2 * 4) & 15) |
           (packed[128 + index % 64] >> (index / 64 * 2) & 3) << 4;
}

/* The bytes of a panel that hold the scales of one block. */
static uint8_t *scales_at(int64_t kind, uint8_t *panel, int64_t columns, int64_t block)
{
    const Segments s = segments(kind, columns);
    const int64_t size = weights_of(kind) == SUPERBLOCK ? 256 : kind == Q4_1 || kind == Q5_1 ? 64 : 32;
    return panel + s.quants + s.high + size * block;
}

/* The d of a block of Q6_K, which lie behind all of its s. */
static uint8_t *q6_k_d(uint8_t *panel, int64_t columns, int64_t block, int lane)
{
    return scales_at(Q6_K, panel, columns, columns / SUPERBLOCK) + 32 * block + 2 * lane;
}

static void write_panel(int64_t kind, uint8_t *panel, int64_t columns, int64_t block, int lane, const Plain *from)
{
    const int bits = bits_of(kind), parts = (int)(weights_of(kind) / BLOCK);
    const Segments segment = segments(kind, columns);
    uint8_t *scales = scales_at(kind, panel, columns, block);
    for (int part = 0; part < parts; part++) {
        const int64_t at = block * parts + part;
        write_quants(panel + at * (bits == 8 ? 512 : 256), panel + segment.quants + at * (bits == 6 ? 128 : 64), lane,
                     from->q + part * BLOCK, bits);
    }
    if (kind == Q6_K) {
        for (int i = 0; i < 16; i++)
            scales[16 * i + lane] = from->s[i];
        memcpy(q6_k_d(panel, columns, block, lane), &from->d, 2);
        return;
    }
    memcpy(scales + 2 * lane, &from->d, 2);
    if (kind == Q4_1 || kind == Q5_1 || parts > 1)
        memcpy(scales + 32 + 2 * lane, &from->m, 2);
    for (int i = 0; parts > 1 && i < 8; i++) {
        write_six_bits(scales + 64, 32 * i + lane, from->s[i]);
        write_six_bits(scales + 64, 32 * i + 16 + lane, from->t[i]);
    }
}

static void read_panel(int64_t kind, const uint8_t *panel, int64_t columns, int64_t block, int lane, Plain *to)
{
    const int bits = bits_of(kind), parts = (int)(weights_of(kind) / BLOCK);
    const Segments segment = segments(kind, columns);
    const uint8_t *scales = scales_at(kind, (uint8_t *)panel, columns, block);
    for (int part = 0; part < parts; part++) {
        const int64_t at = block * parts + part;
        read_quants(panel + at * (bits == 8 ? 512 : 256), panel + segment.quants + at * (bits == 6 ? 128 : 64), lane,
                    to->q + part * BLOCK, bits);
    }
    if (kind == Q6_K) {
        for (int i = 0; i < 16; i++)
            to->s[i] = scales[16 * i + lane];
        memcpy(&to->d, q6_k_d((uint8_t *)panel, columns, block, lane), 2);
        return;
    }
    memcpy(&to->d, scales + 2 * lane, 2);
    if (kind == Q4_1 || kind == Q5_1 || parts > 1)
        memcpy(&to->m, scales + 32 + 2 * lane, 2);
    for (int i = 0; parts > 1 && i < 8; i++) {
        to->s[i] = read_six_bits(scales + 64, 32 * i + lane);
        to->t[i] = read_six_bits(scales + 64, 32 * i + 16 + lane);
    }
}

/* --- whole matrices --------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t kind, rows, columns;
    const uint8_t *blocks;
    const float *floats;
    const int64_t *order;
    uint8_t *panels;
} Packing;

static void write_bf16(uint8_t *panel, int64_t columns, int lane, const uint16_t *row)
{
    for (int64_t i = 0; i < columns; i += 2)
        memcpy(panel + 32 * i + 4 * lane, row + i, 4);
}

static void pack_panel(void *context, int64_t index)
{
    const Packing *job = context;
    const int64_t columns = job->columns, weights = weights_of(job->kind), blocks = columns / weights;
    const int64_t bytes = panel_bytes(job->kind, columns);
    uint8_t *panel = job->panels + index * bytes;
    memset(panel, 0, bytes);
    for (int lane = 0; lane < PANEL && index * PANEL + lane < job->rows; lane++) {
        int64_t row = index * PANEL + lane;
        row = job->order != NULL ? job->order[row] : row;
        if (job->kind == BF16 && job->blocks != NULL) {
            write_bf16(panel, columns, lane, (const uint16_t *)job->blocks + row * columns);
            continue;
        }
        for (int64_t block = 0; block < blocks; block++) {
            Plain plain = {0};
            const float *floats = job->floats + row * columns + block * BLOCK;
            if (job->kind == BF16) {
                uint16_t rounded[BLOCK];
                for (int i = 0; i < BLOCK; i++)
                    rounded[i] = float_to_bf16(floats[i]);
                write_bf16(panel + block * 1024, BLOCK, lane, rounded);
                continue;
            }
            if (job->blocks != NULL)
                read_gguf(job->kind, job->blocks + (row * blocks + block) * gguf_bytes(job->kind), &plain);
            else if (job->kind == Q8_0)
                round_q8_0(floats, &plain);
            else
                round_q4_1(floats, &plain);
            write_panel(job->kind, panel, columns, block, lane, &plain);
        }
    }
}

void pack_blocks(
    int64_t kind, const uint8_t *blocks, int64_t rows, int64_t columns, const int64_t *order, uint8_t *panels)
{
    Packing job = {kind, rows, columns, blocks, NULL, order, panels};
    pool_run(pack_panel, &job, (rows + PANEL - 1) / PANEL);
}

void pack_floats(int64_t kind, const float *weights, int64_t rows, int64_t columns, uint8_t *panels)
{
    Packing job = {kind, rows, columns, NULL, weights, NULL, panels};
    pool_run(pack_panel, &job, (rows + PANEL - 1) / PANEL);
}

typedef struct {
    const Matrix *matrix;
    const int64_t *ids;
    int64_t count;
    float *floats;
    uint16_t *bfloat16;
} Unpacking;

#define ROWS_AT_ONCE 16

static void unpack_row(const Unpacking *job, int64_t i)
{
    const Matrix *m = job->matrix;
    const int64_t row = job->ids != NULL ? job->ids[i] : i, weights = weights_of(m->kind), columns = m->columns;
    const uint8_t *panel = m->panels + row / PANEL * panel_bytes(m->kind, columns);
    const int lane = (int)(row % PANEL);
    for (int64_t block = 0; block < columns / weights; block++) {
        float values[SUPERBLOCK];
        if (m->kind == BF16) {
            for (int j = 0; j < BLOCK; j++) {
                uint16_t rounded;
                memcpy(&rounded, panel + block * 1024 + j / 2 * 64 + 4 * lane + j % 2 * 2, 2);
                values[j] = bf16_to_float(rounded);
            }
        } else {
            Plain plain = {0};
            read_panel(m->kind, panel, columns, block, lane, &plain);
            to_floats(m->kind, &plain, values);
        }
        for (int64_t j = 0; j < weights; j++) {
            if (job->floats != NULL)
                job->floats[i * columns + block * weights + j] = values[j];
            else
                job->bfloat16[i * columns + block * weights + j] = float_to_bf16(values[j]);
        }
    }
}

static void unpack_some(void *context, int64_t index)
{
    const Unpacking *job = context;
    const int64_t end = (index + 1) * ROWS_AT_ONCE;
    for (int64_t i = index * ROWS_AT_ONCE; i < end && i < job->count; i++)
        unpack_row(job, i);
}

void unpack_rows(const Matrix *matrix, const int64_t *ids, int64_t count, float *floats, uint16_t *bfloat16)
{
    Unpacking job = {matrix, ids, count, floats, bfloat16};
    pool_run(unpack_some, &job, (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE);
}
