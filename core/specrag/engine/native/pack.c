#include "pack.h"

#include <math.h>
#include <string.h>

#include "pool.h"
#include "simd.h"

/* A block of one row, of 32 or 256 weights, whatever layout it came from or goes to.
 *
 * A weight is d * (q - offset), d * q + m, d * s[i / 32] * q - m * t[i / 32] (Q4_K, Q5_K) or
 * d * s[i / 16] * (q - 32) (Q6_K, s signed); d and m are float16.
 */
typedef struct {
    uint8_t q[SUPERBLOCK], s[16], t[8];
    uint16_t d, m;
} Plain;

static int64_t weights_of(int64_t kind) { return kind == Q4_K || kind == Q5_K || kind == Q6_K ? SUPERBLOCK : BLOCK; }

static int bits_of(int64_t kind)
{
    switch (kind) {
    case Q4_0: case Q4_1: case Q4_K: return 4;
    case Q5_0: case Q5_1: case Q5_K: return 5;
    case Q6_K: return 6;
    default: return 8;
    }
}

/* Bytes of a block in a GGUF file. */
static int64_t gguf_bytes(int64_t kind)
{
    switch (kind) {
    case Q4_0: return 18;
    case Q4_1: return 20;
    case Q5_0: return 22;
    case Q5_1: return 24;
    case Q8_0: return 34;
    case Q4_K: return 144;
    case Q5_K: return 176;
    case Q6_K: return 210;
    default: return 2 * BLOCK;
    }
}

/* --- GGUF's blocks ------------------------------------------------------------------------------------------------ */

static void read_simple(int64_t kind, const uint8_t *from, Plain *to)
{
    const int has_minimum = kind == Q4_1 || kind == Q5_1;
    memcpy(&to->d, from, 2);
    from += 2;
    if (has_minimum) {
        memcpy(&to->m, from, 2);
        from += 2;
    }
    if (kind == Q8_0) {
        for (int i = 0; i < BLOCK; i++)
            to->q[i] = (uint8_t)((int8_t)from[i] + 128);
        return;
    }
    uint32_t fifth = 0;
    if (bits_of(kind) == 5) {
        memcpy(&fifth, from, 4);
        from += 4;
    }
    for (int i = 0; i < 16; i++) {
        to->q[i] = (from[i] & 15) | (fifth >> i & 1) << 4;
        to->q[i + 16] = from[i] >> 4 | (fifth >> (i + 16) & 1) << 4;
    }
}

static void read_k(int64_t kind, const uint8_t *from, Plain *to)
{
    const uint8_t *packed = from + 4, *fifth = from + 16, *quants = from + (kind == Q5_K ? 48 : 16);
    memcpy(&to->d, from, 2);
    memcpy(&to->m, from + 2, 2);
    for (int i = 0; i < 4; i++) {
        to->s[i] = packed[i] & 63;
        to->t[i] = packed[i + 4] & 63;
        to->s[i + 4] = (packed[i + 8] & 15) | packed[i] >> 6 << 4;
        to->t[i + 4] = packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4;
    }
    for (int part = 0; part < 8; part++) {
        for (int i = 0; i < BLOCK; i++) {
            uint8_t q = quants[part / 2 * BLOCK + i] >> (part % 2 * 4) & 15;
            if (kind == Q5_K)
                q |= (fifth[i] >> part & 1) << 4;
            to->q[part * BLOCK + i] = q;
        }
    }
}

static void read_q6_k(const uint8_t *from, Plain *to)
{
    memcpy(to->s, from + 192, 16);
    memcpy(&to->d, from + 208, 2);
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = from + 64 * half, *high = from + 128 + 32 * half;
        uint8_t *q = to->q + 128 * half;
        for (int i = 0; i < 32; i++) {
            q[i] = (low[i] & 15) | (high[i] & 3) << 4;
            q[i + 32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
            q[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
            q[i + 96] = low[i + 32] >> 4 | high[i] >> 6 << 4;
        }
    }
}

static void read_gguf(int64_t kind, const uint8_t *from, Plain *to)
{
    if (kind == Q6_K)
        read_q6_k(from, to);
    else if (weights_of(kind) == SUPERBLOCK)
        read_k(kind, from, to);
    else
        read_simple(kind, from, to);
}

/* --- panels ------------------------------------------------------------------------------------------------------- */

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

/* --- floats ------------------------------------------------------------------------------------------------------- */

static void to_floats(int64_t kind, const Plain *from, float *to)
{
    const float d = f16_to_float(from->d), m = f16_to_float(from->m);
    const int offset = kind == Q4_0 ? 8 : kind == Q5_0 ? 16 : kind == Q8_0 ? 128 : 0;
    for (int i = 0; i < weights_of(kind); i++) {
        if (kind == Q6_K)
            to[i] = d * (float)(int8_t)from->s[i / 16] * (float)(from->q[i] - 32);
        else if (kind == Q4_K || kind == Q5_K)
            to[i] = d * from->s[i / BLOCK] * from->q[i] - m * from->t[i / BLOCK];
        else if (kind == Q4_1 || kind == Q5_1)
            to[i] = d * from->q[i] + m;
        else
            to[i] = d * (float)(from->q[i] - offset);
    }
}

static uint16_t to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

static void round_q8_0(const float *from, Plain *to)
{
    float largest = 0;
    for (int i = 0; i < BLOCK; i++)
        largest = fmaxf(largest, fabsf(from[i]));
    to->d = to_f16(largest / 127);
    const float d = f16_to_float(to->d), inverse = d > 0 ? 1 / d : 0;
    for (int i = 0; i < BLOCK; i++)
        to->q[i] = (uint8_t)(128 + fminf(fmaxf(rintf(from[i] * inverse), -127), 127));
}

/* The quants for a scale and a minimum, both as they will be stored; returns the squared error. */
static float quantise_q4_1(const float *from, float d, float m, Plain *to)
{
    to->d = to_f16(d);
    to->m = to_f16(m);
    d = f16_to_float(to->d);
    m = f16_to_float(to->m);
    const float inverse = d > 0 ? 1 / d : 0;
    float error = 0;
    for (int i = 0; i < BLOCK; i++) {
        const float q = fminf(fmaxf(rintf((from[i] - m) * inverse), 0), 15), off = d * q + m - from[i];
        to->q[i] = (uint8_t)q;
        error += off * off;
    }
    return error;
}

/* Scale and minimum of least squared error: from the range and from ranges a little smaller, each fitted once. */
static void round_q4_1(const float *from, Plain *to)
{
    float least = from[0], most = from[0];
    for (int i = 1; i < BLOCK; i++) {
        least = fminf(least, from[i]);
        most = fmaxf(most, from[i]);
    }
    float best = quantise_q4_1(from, (most - least) / 15, least, to);
    for (int step = 0; step < 8 && best > 0; step++) {
        Plain other = {0};
        const float d = (most - least) * (1 - 0.04f * step) / 15, m = least + (most - least) * 0.02f * step;
        quantise_q4_1(from, d, m, &other);
        float n = BLOCK, sq = 0, sqq = 0, sx = 0, sqx = 0; /* the line through (q, x) */
        for (int i = 0; i < BLOCK; i++) {
            const float q = other.q[i];
            sq += q, sqq += q * q, sx += from[i], sqx += q * from[i];
        }
        const float spread = n * sqq - sq * sq;
        if (spread <= 0)
            continue;
        const float slope = (n * sqx - sq * sx) / spread;
        const float error = quantise_q4_1(from, slope, (sx - slope * sq) / n, &other);
        if (error < best) {
            best = error;
            *to = other;
        }
    }
}

/* --- whole matrices ----------------------------------------------------------------------------------------------- */

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
