/* The tools' kernels: medrun.c compiles them in each of its passes (MEDRUN_MORE_KERNELS), with the
 * words of its section 6. tools/export_calibrate.c and export_int4.c use the first three,
 * tools/lab.c the others. MIT licence, see LICENSE. */

#if MEDRUN_PASS <= 1            /* that of plain C, or none: the kernels are another object's     */
/* 16 groups of int4 whose errors are made good in the columns behind them. COUPLING (32, 32) says
 * by how much, above its diagonal; LOSS (32) what an error that is left in a column counts. */
typedef struct {
    const float *w, *v;             /* (32, 16): the weights, and with what earlier errors want  */
    const float *coupling;
    size_t stride;                  /* of COUPLING                                               */
    const float *loss;
} int4_chain;

typedef struct {
    float *c;
    const float *a, *b;
    size_t c_stride, a_stride, b_stride, rows, cols, depth;
} matrix_sum;

struct more_kernels {
    /* 16 groups of int4: V (32, 16) -> their scales and shifts, and the nibbles (32, 16). The sum
     * of the squared errors, weighted by the (32) importances, is made small; one of them is more
     * than 0, and what is has a size near 1. */
    void (*fit_int4)(const float *v, const float *importance, uint16_t *bits, uint8_t *q);
    /* Rounds the groups of a chain one column after the other. BITS is where the search for scales
     * and shifts begins, and what it finds; the nibbles (32, 16); the errors (32, 16), what is left
     * of the chain's weights; LOSS (16) grows by that of these columns. */
    void (*chain_int4)(const int4_chain *c, uint16_t *bits, uint8_t *q, float *error, float *loss);
    /* C (rows, cols) += A^T B for A (depth, rows) and B (depth, cols); cols a multiple of 16. Each
     * sum is taken in the order of depth. */
    void (*sum_products)(const matrix_sum *s);
    /* ROUNDS rounds of nothing but the products of packing KIND, in registers; *SINK gets their
     * sum, so that they are made. Returns the multiplications and additions of a round. */
    size_t (*peak)(int kind, size_t rounds, float *sink);
    float (*read_all)(const uint8_t *p, size_t n);              /* reads N bytes, for the same  */
};
#endif

#ifdef MEDRUN_PASS
#include "export_int4.h"
#include "lab_kernels.h"
static const struct more_kernels K(more_kernels) = {fit_int4, chain_int4, sum_products, peak,
                                                    read_all};
#undef level_of
#undef shift_near
#undef int4_error
#undef refit_int4
#undef settle_int4
#undef int4_fit
#undef round_int4
#undef start_int4
#undef fit_int4
#undef run_chain
#undef try_chain
#undef chain_int4
#undef add_tile
#undef sum_products
#undef SUM_ROWS
#undef peak
#undef read_all
#endif
