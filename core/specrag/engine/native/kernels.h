/* Products of one panel with 1 to TILE rows of activations: every weight is unpacked once for all rows.
 *
 * The result of a row does not depend on the rows beside it: for every output the blocks are summed in one order, in
 * which only that row takes part. Verification of ten candidates has the bits of ten single steps.
 */
#ifndef SPECRAG_KERNELS_H
#define SPECRAG_KERNELS_H

#include "blocks.h"

/* out [rows][PANEL] = the panel times a tile of ``rows`` rows of activations. */
typedef void (*Kernel)(const uint8_t *panel, int64_t columns, const uint8_t *x, float *out, int64_t rows);

Kernel kernel_of(int64_t kind);

#endif
