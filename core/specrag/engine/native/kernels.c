#include "kernels.h"

#include "simd.h"

/* How far ahead of its use a cache line is asked for: what hides the latency of memory at its full bandwidth. */
#define AHEAD 2048

INLINE void prefetch(const uint8_t *p, const int lines)
{
#pragma GCC unroll 8
    for (int i = 0; i < lines; i++)
        __builtin_prefetch(p + AHEAD + 64 * i, 0, 3);
}

/* Where in a panel what belongs to its first block lies. */
typedef struct {
    const uint8_t *quants, *high, *scales;
} Reader;

INLINE Reader reader(const uint8_t *panel, int64_t kind, int64_t columns)
{
    Segments s = segments(kind, columns);
    return (Reader){panel, panel + s.quants, panel + s.quants + s.high};
}

/* The eight vectors of 32 columns of a panel, as unsigned bytes. */
INLINE void unpack(vb w[8], const uint8_t *quants, const uint8_t *high, const int bits)
{
    if (bits == 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            w[j] = vb_load(quants + 64 * j);
        return;
    }
    const vb nibble = vb_set1(0x0f);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vb both = vb_load(quants + 64 * j);
        w[j] = vb_and(both, nibble);
        w[j + 4] = vb_and(vb_shr(both, 4), nibble);
    }
    if (bits == 5) {
        const vb fifth = vb_set1(0x10);
        vb h = vb_load(high);
        w[0] = vb_or(w[0], vb_and(vb_shl(h, 4), fifth));
        w[1] = vb_or(w[1], vb_and(vb_shl(h, 3), fifth));
        w[2] = vb_or(w[2], vb_and(vb_shl(h, 2), fifth));
        w[3] = vb_or(w[3], vb_and(vb_shl(h, 1), fifth));
        w[4] = vb_or(w[4], vb_and(h, fifth));
        w[5] = vb_or(w[5], vb_and(vb_shr(h, 1), fifth));
        w[6] = vb_or(w[6], vb_and(vb_shr(h, 2), fifth));
        w[7] = vb_or(w[7], vb_and(vb_shr(h, 3), fifth));
    } else if (bits == 6) {
        const vb upper = vb_set1(0x30);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            vb h = vb_load(high + 64 * half), *part = w + 4 * half;
            part[0] = vb_or(part[0], vb_and(vb_shl(h, 4), upper));
            part[1] = vb_or(part[1], vb_and(vb_shl(h, 2), upper));
            part[2] = vb_or(part[2], vb_and(h, upper));
            part[3] = vb_or(part[3], vb_and(vb_shr(h, 2), upper));
        }
    }
}

/* acc[r] += the products of vectors first to first + count - 1 with row r. x: the dwords of the block. */
INLINE void dots(vi acc[TILE], const vb w[8], const int32_t *x, const int first, const int count, const int R)
{
#pragma GCC unroll 8
    for (int j = first; j < first + count; j++) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            acc[r] = dot4(acc[r], w[j], x[j * R + r]);
    }
}

INLINE void finish(float *out, const vf acc[TILE], const int R)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        vf_store(out + PANEL * r, acc[r]);
}

/* Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: a scale, and a minimum or an offset, for every 32 columns. */
INLINE void simple_panel(
    const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, const int kind, const int bits, const int R)
{
    const int minimum = kind == Q4_1 || kind == Q5_1;
    Reader at = reader(panel, kind, columns);
    vf sum[TILE];
    for (int r = 0; r < R; r++)
        sum[r] = vf_zero();
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        const int32_t *q = (const int32_t *)x;
        const float *scale = (const float *)(q + 8 * R), *scaled_sum = scale + R;
        const int32_t *negative_sum = (const int32_t *)(scaled_sum + R);
        vb w[8];
        vi dot[TILE];
        prefetch(at.quants, bits == 8 ? 8 : 4);
        unpack(w, at.quants, at.high, bits);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            dot[r] = minimum ? vi_zero() : vi_shl(vi_set1(negative_sum[r]), bits - 1);
        dots(dot, w, q, 0, 8, R);
        const vf d = vf_from_f16(at.scales);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            sum[r] = vf_fma(vf_from_vi(dot[r]), vf_mul(d, vf_set1(scale[r])), sum[r]);
        if (minimum) {
            const vf m = vf_from_f16(at.scales + 32);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[r] = vf_fma(m, vf_set1(scaled_sum[r]), sum[r]);
        }
        at.quants += bits == 8 ? 512 : 256;
        if (bits == 5) {
            prefetch(at.high, 1);
            at.high += 64;
        }
        prefetch(at.scales, 1);
        at.scales += minimum ? 64 : 32;
        x += ACTIVATION_BYTES * R;
    }
    finish(out, sum, R);
}

/* The 256 six-bit numbers of a superblock as bytes. */
INLINE void six_bits(uint8_t numbers[256], const uint8_t *packed)
{
    const vb nibble = vb_set1(0x0f), upper = vb_set1(0x30);
    vb a = vb_load(packed), b = vb_load(packed + 64), h = vb_load(packed + 128);
    vb_store(numbers, vb_or(vb_and(a, nibble), vb_and(vb_shl(h, 4), upper)));
    vb_store(numbers + 64, vb_or(vb_and(vb_shr(a, 4), nibble), vb_and(vb_shl(h, 2), upper)));
    vb_store(numbers + 128, vb_or(vb_and(b, nibble), vb_and(h, upper)));
    vb_store(numbers + 192, vb_or(vb_and(vb_shr(b, 4), nibble), vb_and(vb_shr(h, 2), upper)));
}

/* Q4_K and Q5_K. */
INLINE void k_panel(
    const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, const int kind, const int bits, const int R)
{
    Reader at = reader(panel, kind, columns);
    vf sum[TILE];
    for (int r = 0; r < R; r++)
        sum[r] = vf_zero();
    for (int64_t whole = 0; whole < columns / SUPERBLOCK; whole++) {
        uint8_t numbers[256] __attribute__((aligned(64)));
        const vf d = vf_from_f16(at.scales), m = vf_sub(vf_zero(), vf_from_f16(at.scales + 32));
        six_bits(numbers, at.scales + 64);
        prefetch(at.scales, 4);
        at.scales += 256;
        for (int block = 0; block < SUPERBLOCK / BLOCK; block++) {
            const int32_t *q = (const int32_t *)x;
            const float *scale = (const float *)(q + 8 * R), *scaled_sum = scale + R;
            vb w[8];
            vi dot[TILE];
            prefetch(at.quants, 4);
            unpack(w, at.quants, at.high, bits);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                dot[r] = vi_zero();
            dots(dot, w, q, 0, 8, R);
            const vf s = vf_mul(d, vf_from_vi(vi_from_u8(numbers + 32 * block)));
            const vf t = vf_mul(m, vf_from_vi(vi_from_u8(numbers + 32 * block + 16)));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                sum[r] = vf_fma(vf_from_vi(dot[r]), vf_mul(s, vf_set1(scale[r])), sum[r]);
                sum[r] = vf_fma(t, vf_set1(scaled_sum[r]), sum[r]);
            }
            at.quants += 256;
            if (bits == 5) {
                prefetch(at.high, 1);
                at.high += 64;
            }
            x += ACTIVATION_BYTES * R;
        }
    }
    finish(out, sum, R);
}

INLINE void q6_k_panel(const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, const int R)
{
    Reader at = reader(panel, Q6_K, columns);
    const int64_t superblocks = columns / SUPERBLOCK;
    const uint8_t *scales = at.scales + 256 * superblocks;
    vf sum[TILE];
    for (int r = 0; r < R; r++)
        sum[r] = vf_zero();
    for (int64_t whole = 0; whole < superblocks; whole++, scales += 32) {
        const vf d = vf_from_f16(scales);
        prefetch(scales, 1);
        for (int block = 0; block < SUPERBLOCK / BLOCK; block++) {
            const int32_t *q = (const int32_t *)x, *negative_sum = q + 10 * R, *negative_first = q + 11 * R;
            const float *scale = (const float *)(q + 8 * R);
            vb w[8];
            vi first[TILE], second[TILE];
            prefetch(at.quants, 4);
            prefetch(at.high, 2);
            unpack(w, at.quants, at.high, 6);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                first[r] = vi_shl(vi_set1(negative_first[r]), 5);
            dots(first, w, q, 0, 4, R);
            const vi s = vi_from_s8(at.scales), t = vi_from_s8(at.scales + 16);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                first[r] = vi_mul(first[r], s);
                second[r] = vi_shl(vi_set1(negative_sum[r] - negative_first[r]), 5);
            }
            dots(second, w, q, 4, 4, R);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf both = vf_from_vi(vi_add(first[r], vi_mul(second[r], t)));
                sum[r] = vf_fma(both, vf_mul(d, vf_set1(scale[r])), sum[r]);
            }
            at.quants += 256;
            at.high += 128;
            prefetch(at.scales, 1);
            at.scales += 32;
            x += ACTIVATION_BYTES * R;
        }
    }
    finish(out, sum, R);
}

/* Two sums for every row, so that few rows do not wait for one another. */
INLINE void bf16_panel(const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, const int R)
{
    vf even[TILE], odd[TILE];
    for (int r = 0; r < R; r++)
        even[r] = odd[r] = vf_zero();
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        const int32_t *pairs = (const int32_t *)x;
        prefetch(panel, 8);
        prefetch(panel + 512, 8);
#pragma GCC unroll 8
        for (int j = 0; j < 16; j += 2) {
            const vi a = vi_load(panel + 64 * j), b = vi_load(panel + 64 * j + 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                even[r] = dot2(even[r], a, vi_set1(pairs[j * R + r]));
                odd[r] = dot2(odd[r], b, vi_set1(pairs[(j + 1) * R + r]));
            }
        }
        panel += 1024;
        x += ACTIVATION_BYTES_BF16 * R;
    }
    for (int r = 0; r < R; r++)
        even[r] = vf_add(even[r], odd[r]);
    finish(out, even, R);
}

/* A function that multiplies one panel with some rows, from an inlined one that is made for every number R of rows. */
#define KERNEL(name, call)                                                                                             \
    static void name(const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, int64_t rows)                \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
            CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call) MORE_CASES(call)                                   \
        }                                                                                                              \
    }
#define CASE(rows, call)                                                                                               \
    case rows: {                                                                                                       \
        enum { R = rows };                                                                                             \
        call;                                                                                                          \
        break;                                                                                                         \
    }
#if TILE == 8
#define MORE_CASES(call) CASE(5, call) CASE(6, call) CASE(7, call) CASE(8, call)
#else
#define MORE_CASES(call)
#endif

KERNEL(q4_0, simple_panel(panel, columns, x, out, Q4_0, 4, R))
KERNEL(q4_1, simple_panel(panel, columns, x, out, Q4_1, 4, R))
KERNEL(q5_0, simple_panel(panel, columns, x, out, Q5_0, 5, R))
KERNEL(q5_1, simple_panel(panel, columns, x, out, Q5_1, 5, R))
KERNEL(q8_0, simple_panel(panel, columns, x, out, Q8_0, 8, R))
KERNEL(q4_k, k_panel(panel, columns, x, out, Q4_K, 4, R))
KERNEL(q5_k, k_panel(panel, columns, x, out, Q5_K, 5, R))
KERNEL(q6_k, q6_k_panel(panel, columns, x, out, R))
KERNEL(bf16, bf16_panel(panel, columns, x, out, R))

Kernel kernel_of(int64_t kind)
{
    switch (kind) {
    case Q4_0: return q4_0;
    case Q4_1: return q4_1;
    case Q5_0: return q5_0;
    case Q5_1: return q5_1;
    case Q8_0: return q8_0;
    case Q4_K: return q4_k;
    case Q5_K: return q5_k;
    case Q6_K: return q6_k;
    default: return bf16;
    }
}
