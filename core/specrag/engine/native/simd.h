/* Vectors of 16 lanes: one thin layer over AVX-512 and AVX2.
 *
 * vf: 16 floats. vi: 16 int32, or 16 pairs of bfloat16. vb: 64 unsigned bytes, four for every lane.
 * dot4 and dot2 do most of the work: one instruction of VNNI or BF16 where the CPU has it, else several instructions
 * with the same integers (dot4) or nearly the same sums (dot2).
 */
#ifndef SPECRAG_SIMD_H
#define SPECRAG_SIMD_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

INLINE float f16_to_float(uint16_t half) { return _cvtsh_ss(half); }

INLINE float bf16_to_float(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* Rounds to the nearest, ties to even. NaN stays NaN. */
INLINE uint16_t float_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define WIDE 1
typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vf_from_vi(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_from_vf(vf a) { return _mm512_cvtps_epi32(a); }
INLINE vf vf_from_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float vf_largest(vf a) { return _mm512_reduce_max_ps(a); }
/* y times 2 to the power of n, which is whole and below 128; 0 where that is too small. */
INLINE vf vf_scale2(vf y, vf n) { return _mm512_scalef_ps(y, n); }
/* The first n lanes of a (n of any sign or size), other in the rest. */
INLINE vf vf_first(vf a, int64_t n, vf other)
{
    n = n < 0 ? 0 : n > LANES ? LANES : n;
    return _mm512_mask_blend_ps((__mmask16)((1u << n) - 1), other, a);
}

INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
#define vi_shl(a, n) _mm512_slli_epi32(a, n)
INLINE vi vi_from_u8(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE vi vi_from_s8(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE void vi_store_s8(void *p, vi a) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8(a)); }

INLINE vb vb_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vb_store(void *p, vb a) { _mm512_storeu_si512(p, a); }
INLINE vb vb_set1(uint8_t x) { return _mm512_set1_epi8((char)x); }
INLINE vb vb_and(vb a, vb b) { return _mm512_and_si512(a, b); }
INLINE vb vb_or(vb a, vb b) { return _mm512_or_si512(a, b); }
/* Shifts of 16-bit words: the caller masks what crosses a byte. */
#define vb_shr(a, n) _mm512_srli_epi16(a, n)
#define vb_shl(a, n) _mm512_slli_epi16(a, n)

/* acc + the products of four unsigned and four signed bytes per lane; the signed ones are the same in all lanes. */
INLINE vi dot4(vi acc, vb u, int32_t s)
{
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s));
#else /* halves of a byte, so that no sum of two products leaves 16 bits */
    const vb nibble = vb_set1(0x0f), b = _mm512_set1_epi32(s), one = _mm512_set1_epi16(1);
    vb low = _mm512_maddubs_epi16(vb_and(u, nibble), b), high = _mm512_maddubs_epi16(vb_and(vb_shr(u, 4), nibble), b);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, one));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
#endif
}

/* acc + the products of two pairs of bfloat16, lane by lane. */
INLINE vf dot2(vf acc, vi a, vi b)
{
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const vi high = _mm512_set1_epi32((int32_t)0xffff0000);
    acc = vf_fma(_mm512_castsi512_ps(vi_shl(a, 16)), _mm512_castsi512_ps(vi_shl(b, 16)), acc);
    return vf_fma(_mm512_castsi512_ps(vb_and(a, high)), _mm512_castsi512_ps(vb_and(b, high)), acc);
#endif
}

/* 16 floats as bfloat16. */
INLINE void vf_store_bf16(uint16_t *p, vf a)
{
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a));
#else
    vi bits = _mm512_castps_si512(a);
    vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), vi_set1(1));
    bits = vi_add(bits, vi_add(odd, vi_set1(0x7fff)));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
#endif
}

INLINE vf vf_from_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

/* Two rows of 32 bfloat16 as 32 pairs (a[i], b[i]). */
INLINE void pairs_of(const uint16_t *a, const uint16_t *b, vi pairs[2])
{
    const vi first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                      36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const vi second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const vi x = vi_load(a), y = vi_load(b);
    pairs[0] = _mm512_permutex2var_epi16(x, first, y);
    pairs[1] = _mm512_permutex2var_epi16(x, second, y);
}

/* 16 dwords of each of 16 rows; column c goes to columns + 16 * c. */
INLINE void transpose(const uint16_t *const rows[16], int64_t offset, int32_t *columns)
{
    vi a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = vi_load(rows[i] + offset);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4 i + c] has columns c, c + 4, c + 8, c + 12 of rows 4 i to 4 i + 3, each in 128 bits. */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const vi low0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), high0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const vi low1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const vi high1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        vi_store(columns + 16 * c, _mm512_shuffle_i32x4(low0, low1, 0x88));
        vi_store(columns + 16 * (c + 4), _mm512_shuffle_i32x4(high0, high1, 0x88));
        vi_store(columns + 16 * (c + 8), _mm512_shuffle_i32x4(low0, low1, 0xdd));
        vi_store(columns + 16 * (c + 12), _mm512_shuffle_i32x4(high0, high1, 0xdd));
    }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

typedef struct { __m256 l, h; } vf;
typedef struct { __m256i l, h; } vi;
typedef vi vb;

#define BOTH_F(expression_l, expression_h) ((vf){expression_l, expression_h})
#define BOTH_I(expression_l, expression_h) ((vi){expression_l, expression_h})

INLINE vf vf_zero(void) { return BOTH_F(_mm256_setzero_ps(), _mm256_setzero_ps()); }
INLINE vf vf_set1(float x) { return BOTH_F(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE vf vf_load(const float *p) { return BOTH_F(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void vf_store(float *p, vf x) { _mm256_storeu_ps(p, x.l), _mm256_storeu_ps(p + 8, x.h); }
INLINE vf vf_add(vf a, vf b) { return BOTH_F(_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)); }
INLINE vf vf_sub(vf a, vf b) { return BOTH_F(_mm256_sub_ps(a.l, b.l), _mm256_sub_ps(a.h, b.h)); }
INLINE vf vf_mul(vf a, vf b) { return BOTH_F(_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)); }
INLINE vf vf_div(vf a, vf b) { return BOTH_F(_mm256_div_ps(a.l, b.l), _mm256_div_ps(a.h, b.h)); }
INLINE vf vf_fma(vf a, vf b, vf c) { return BOTH_F(_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)); }
INLINE vf vf_max(vf a, vf b) { return BOTH_F(_mm256_max_ps(a.l, b.l), _mm256_max_ps(a.h, b.h)); }
INLINE vf vf_min(vf a, vf b) { return BOTH_F(_mm256_min_ps(a.l, b.l), _mm256_min_ps(a.h, b.h)); }
INLINE __m256 abs_half(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf vf_abs(vf a) { return BOTH_F(abs_half(a.l), abs_half(a.h)); }
#define ROUNDING (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
INLINE vf vf_round(vf a) { return BOTH_F(_mm256_round_ps(a.l, ROUNDING), _mm256_round_ps(a.h, ROUNDING)); }
INLINE vf vf_from_vi(vi a) { return BOTH_F(_mm256_cvtepi32_ps(a.l), _mm256_cvtepi32_ps(a.h)); }
INLINE vi vi_from_vf(vf a) { return BOTH_I(_mm256_cvtps_epi32(a.l), _mm256_cvtps_epi32(a.h)); }
INLINE vf vf_from_f16(const void *p)
{
    const __m128i *halves = p;
    return BOTH_F(_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
}
INLINE float vf_sum(vf a)
{
    __m256 s = _mm256_add_ps(a.l, a.h);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
INLINE float vf_largest(vf a)
{
    __m256 s = _mm256_max_ps(a.l, a.h);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
INLINE __m256 scale2_half(__m256 y, __m256 n)
{
    const __m256 bounded = _mm256_max_ps(n, _mm256_set1_ps(-127.0f)); /* whose power, as it is made here, is 0 */
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
INLINE vf vf_scale2(vf y, vf n) { return BOTH_F(scale2_half(y.l, n.l), scale2_half(y.h, n.h)); }
INLINE vf vf_first(vf a, int64_t n, vf other)
{
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const __m256i count = _mm256_set1_epi32((int32_t)(n < 0 ? 0 : n > LANES ? LANES : n));
    const __m256i l = _mm256_cmpgt_epi32(count, low), h = _mm256_cmpgt_epi32(count, high);
    return BOTH_F(_mm256_blendv_ps(other.l, a.l, _mm256_castsi256_ps(l)),
                  _mm256_blendv_ps(other.h, a.h, _mm256_castsi256_ps(h)));
}

INLINE vi vi_zero(void) { return BOTH_I(_mm256_setzero_si256(), _mm256_setzero_si256()); }
INLINE vi vi_set1(int32_t x) { return BOTH_I(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE vi vi_load(const void *p)
{
    const __m256i *halves = p;
    return BOTH_I(_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1));
}
INLINE void vi_store(void *p, vi a)
{
    __m256i *halves = p;
    _mm256_storeu_si256(halves, a.l), _mm256_storeu_si256(halves + 1, a.h);
}
INLINE vi vi_add(vi a, vi b) { return BOTH_I(_mm256_add_epi32(a.l, b.l), _mm256_add_epi32(a.h, b.h)); }
INLINE vi vi_mul(vi a, vi b) { return BOTH_I(_mm256_mullo_epi32(a.l, b.l), _mm256_mullo_epi32(a.h, b.h)); }
#define vi_shl(a, n) BOTH_I(_mm256_slli_epi32((a).l, n), _mm256_slli_epi32((a).h, n))
INLINE vi vi_from_u8(const void *p)
{
    __m128i bytes = _mm_loadu_si128(p);
    return BOTH_I(_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)));
}
INLINE vi vi_from_s8(const void *p)
{
    __m128i bytes = _mm_loadu_si128(p);
    return BOTH_I(_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)));
}
INLINE __m128i words_half(__m256i a)
{
    return _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}
INLINE void vi_store_s8(void *p, vi a) { _mm_storeu_si128(p, _mm_packs_epi16(words_half(a.l), words_half(a.h))); }

#define vb_load vi_load
#define vb_store vi_store
INLINE vb vb_set1(uint8_t x) { return BOTH_I(_mm256_set1_epi8((char)x), _mm256_set1_epi8((char)x)); }
INLINE vb vb_and(vb a, vb b) { return BOTH_I(_mm256_and_si256(a.l, b.l), _mm256_and_si256(a.h, b.h)); }
INLINE vb vb_or(vb a, vb b) { return BOTH_I(_mm256_or_si256(a.l, b.l), _mm256_or_si256(a.h, b.h)); }
#define vb_shr(a, n) BOTH_I(_mm256_srli_epi16((a).l, n), _mm256_srli_epi16((a).h, n))
#define vb_shl(a, n) BOTH_I(_mm256_slli_epi16((a).l, n), _mm256_slli_epi16((a).h, n))

INLINE __m256i dot4_half(__m256i acc, __m256i u, __m256i s)
{
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, u, s);
#else /* halves of a byte, so that no sum of two products leaves 16 bits */
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(u, nibble), s);
    __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(u, 4), nibble), s);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
}
INLINE vi dot4(vi acc, vb u, int32_t s)
{
    __m256i b = _mm256_set1_epi32(s);
    return BOTH_I(dot4_half(acc.l, u.l, b), dot4_half(acc.h, u.h, b));
}
INLINE __m256 dot2_half(__m256 acc, __m256i a, __m256i b)
{
    const __m256i high = _mm256_set1_epi32((int32_t)0xffff0000);
    acc = _mm256_fmadd_ps(
        _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), acc);
    return _mm256_fmadd_ps(
        _mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high)), acc);
}
INLINE vf dot2(vf acc, vi a, vi b) { return BOTH_F(dot2_half(acc.l, a.l, b.l), dot2_half(acc.h, a.h, b.h)); }
INLINE __m128i bf16_half(__m256 a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
INLINE void vf_store_bf16(uint16_t *p, vf a)
{
    _mm_storeu_si128((__m128i *)p, bf16_half(a.l)), _mm_storeu_si128((__m128i *)(p + 8), bf16_half(a.h));
}
INLINE __m256i words_of(const uint16_t *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf vf_from_bf16(const uint16_t *p)
{
    return BOTH_F(_mm256_castsi256_ps(_mm256_slli_epi32(words_of(p), 16)),
                  _mm256_castsi256_ps(_mm256_slli_epi32(words_of(p + 8), 16)));
}
INLINE void pairs_of(const uint16_t *a, const uint16_t *b, vi pairs[2])
{
    for (int i = 0; i < 2; i++, a += 16, b += 16)
        pairs[i] = BOTH_I(_mm256_or_si256(words_of(a), _mm256_slli_epi32(words_of(b), 16)),
                          _mm256_or_si256(words_of(a + 8), _mm256_slli_epi32(words_of(b + 8), 16)));
}
INLINE void transpose(const uint16_t *const rows[16], int64_t offset, int32_t *columns)
{
    for (int i = 0; i < 16; i++)
        for (int c = 0; c < 16; c++)
            memcpy(columns + 16 * c + i, rows[i] + offset + 2 * c, 4);
}

#else
#error "needs AVX-512 (F, BW, DQ, VL), or AVX2 with FMA and F16C"
#endif

/* 2 to the power of x, taken between -126 and 127; relative error 2e-7. */
INLINE vf vf_exp2(vf x)
{
    const vf bounded = vf_min(vf_max(x, vf_set1(-126.0f)), vf_set1(127.0f));
    const vf n = vf_round(bounded), r = vf_sub(bounded, n);
    vf y = vf_set1(1.326472709e-3f);
    y = vf_fma(y, r, vf_set1(9.671512862e-3f));
    y = vf_fma(y, r, vf_set1(5.550733746e-2f));
    y = vf_fma(y, r, vf_set1(2.402224208e-1f));
    y = vf_fma(y, r, vf_set1(6.931469776e-1f));
    y = vf_fma(y, r, vf_set1(1.0f));
    return vf_scale2(y, n);
}

/* 2 to the power of x, of any finite x <= 0; relative error 1e-4: a twentieth of what rounding to bfloat16 adds. */
INLINE vf vf_exp2_coarse(vf x)
{
    const vf n = vf_round(x), r = vf_sub(x, n);
    vf y = vf_set1(5.500892974e-2f);
    y = vf_fma(y, r, vf_set1(2.422109720e-1f));
    y = vf_fma(y, r, vf_set1(6.932829288e-1f));
    y = vf_fma(y, r, vf_set1(1.0f));
    return vf_scale2(y, n);
}

#endif
