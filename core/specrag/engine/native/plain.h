/* Blocks of weights in one plain form, between the forms of GGUF files, floats and panels. */
#ifndef SPECRAG_PLAIN_H
#define SPECRAG_PLAIN_H

#include "blocks.h"

/* A block of one row, of 32 or 256 weights, whatever layout it came from or goes to.
 *
 * A weight is d * (q - offset), d * q + m, d * s[i / 32] * q - m * t[i / 32] (Q4_K, Q5_K) or
 * d * s[i / 16] * (q - 32) (Q6_K, s signed); d and m are float16.
 */
typedef struct {
    uint8_t q[SUPERBLOCK], s[16], t[8];
    uint16_t d, m;
} Plain;

int64_t weights_of(int64_t kind); /* of a block */
int bits_of(int64_t kind);        /* of a quant */
int64_t gguf_bytes(int64_t kind); /* of a block in a GGUF file */

void read_gguf(int64_t kind, const uint8_t *from, Plain *to);
void to_floats(int64_t kind, const Plain *from, float *to);

/* 32 floats rounded to a block. Q4_1 takes the scale and minimum of least squared error among a few. */
void round_q8_0(const float *from, Plain *to);
void round_q4_1(const float *from, Plain *to);

#endif
