#include "plain.h"

#include <math.h>
#include <string.h>

#include "simd.h"

int64_t weights_of(int64_t kind) { return kind == Q4_K || kind == Q5_K || kind == Q6_K ? SUPERBLOCK : BLOCK; }

int bits_of(int64_t kind)
{
    switch (kind) {
    case Q4_0: case Q4_1: case Q4_K: return 4;
    case Q5_0: case Q5_1: case Q5_K: return 5;
    case Q6_K: return 6;
    default: return 8;
    }
}

int64_t gguf_bytes(int64_t kind)
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

/* --- GGUF's blocks ---------------------------------------------------------------------------------------------- */

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

void read_gguf(int64_t kind, const uint8_t *from, Plain *to)
{
    if (kind == Q6_K)
        read_q6_k(from, to);
    else if (weights_of(kind) == SUPERBLOCK)
        read_k(kind, from, to);
    else
        read_simple(kind, from, to);
}

/* --- floats ----------------------------------------------------------------------------------------------------- */

void to_floats(int64_t kind, const Plain *from, float *to)
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

void round_q8_0(const float *from, Plain *to)
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
void round_q4_1(const float *from, Plain *to)
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
