/* Weights in blocks, as the kernels read them, and activations in int8.
 *
 * A matrix lies in panels of 16 rows (the last one filled up with zeros). A panel holds one segment after the other:
 *
 *   quants  for every 32 columns eight vectors of 64 bytes, vector j of which has columns 4j to 4j + 3 of the 16
 *           rows; of quants with up to six bits the low four: vector j's in the low half of a byte, j + 4's in the high
 *   high    of quants with five and six bits the rest: bit j of a byte belongs to vector j; two bits of a byte in the
 *           first half to vectors 0 to 3, in the second to 4 to 7
 *   scales  for every 32 columns 16 float16 scales d, then 16 minima m where the format has them; a weight is
 *           d * (q - offset), or d * q + m.
 *           Q4_K and Q5_K: for every 256 columns 16 d, 16 m, then 256 numbers of six bits, of sub-block i of 32 columns
 *           16 scales s at 32 i and 16 minima t behind them: 128 bytes with the low four bits (numbers 128 a + b in the
 *           low half of byte 64 a + b, 128 a + 64 + b in the high), 64 with the high two (number 64 a + b in bits 2 a
 *           and 2 a + 1 of byte b). A weight is d * s * q - m * t.
 *           Q6_K: for every 256 columns 16 x 16 signed bytes s, of sub-blocks of 16 columns; then for every 256 columns
 *           16 d. A weight is d * s * (q - 32).
 *
 * Every segment begins at a multiple of 64 bytes.
 */
#ifndef SPECRAG_BLOCKS_H
#define SPECRAG_BLOCKS_H

#include <stdint.h>

#define PANEL 16       /* rows of a panel */
#define BLOCK 32       /* columns of a block; of activations too */
#define SUPERBLOCK 256 /* columns of a block of the K formats */
#if defined(__AVX512F__) /* rows of activations that a kernel multiplies at once, at most: as many as registers hold */
#define TILE 8
#else
#define TILE 4
#endif

/* GGUF's numbers for them. */
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

typedef struct {
    int64_t kind, rows, columns;
    const uint8_t *panels;
} Matrix;

/* Bytes of a panel's segments for so many columns; 0 quants: the kind is not known. */
typedef struct {
    int64_t quants, high, scales;
} Segments;

static inline Segments segments(int64_t kind, int64_t columns)
{
    int64_t blocks = columns / BLOCK, whole = columns / SUPERBLOCK;
    /* The scales of 32-column blocks fill whole cache lines only in pairs. */
    int64_t one = (blocks * 32 + 63) / 64 * 64, two = blocks * 64;
    switch (kind) {
    case Q4_0: return (Segments){blocks * 256, 0, one};
    case Q4_1: return (Segments){blocks * 256, 0, two};
    case Q5_0: return (Segments){blocks * 256, blocks * 64, one};
    case Q5_1: return (Segments){blocks * 256, blocks * 64, two};
    case Q8_0: return (Segments){blocks * 512, 0, one};
    case Q4_K: return (Segments){whole * 2048, 0, whole * 256};
    case Q5_K: return (Segments){whole * 2048, whole * 512, whole * 256};
    case Q6_K: return (Segments){whole * 2048, whole * 1024, whole * 256 + (whole * 32 + 63) / 64 * 64};
    case BF16: return (Segments){blocks * 1024, 0, 0};
    default: return (Segments){0, 0, 0};
    }
}

static inline int64_t panel_bytes(int64_t kind, int64_t columns)
{
    Segments s = segments(kind, columns);
    return s.quants + s.high + s.scales;
}

/* Rows of activations, quantised for the kernels: tiles of TILE rows, the last with what is left.
 *
 * A tile has for every 32 columns, of its R rows: 8 x R dwords of four int8 (dword j of row r at j * R + r), R floats
 * (the scale), R floats (scale times the sum of the quants), R int32 (minus that sum), R int32 (minus that of the
 * first half).
 * For BF16: 16 x R dwords of two bfloat16.
 */
#define ACTIVATION_BYTES 48 /* of 32 columns of a row */
#define ACTIVATION_BYTES_BF16 64

static inline int64_t activation_bytes(int bfloat16) { return bfloat16 ? ACTIVATION_BYTES_BF16 : ACTIVATION_BYTES; }

#endif
