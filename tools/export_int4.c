/* How the exporter stores weights in panels: int4's scales are searched for with the kernels of
 * tools/kernels.h, which the tool names as MEDRUN_MORE_KERNELS before medrun.c. A tool includes
 * this file after medrun.c. MIT licence, see LICENSE. */
#ifndef MEDRUN_EXPORT_INT4
#define MEDRUN_EXPORT_INT4
#include "store.c"

/* The nibble of one weight into a panel of zeros. */
static void put_int4(uint8_t *panel, size_t lane, size_t k, uint8_t q) {
    size_t i = k % GROUP4, at = group_steps(TYPE_INT4, k / GROUP4) + i / 8 * STEP_BYTES;
    panel[at + 4 * lane + i % 4] |= (uint8_t)(q << (i & 4));
}

/* Packs 16 rows of one int4 panel. */
static void store_int4(const kernel_set *k, const float *rows, size_t n_rows, size_t cols,
                      uint8_t *out) {
    for (size_t first = 0; first < cols; first += GROUP4) {
        float v[GROUP4 * LANES] = {0}, weights[GROUP4] = {0};
        uint8_t q[GROUP4 * LANES];
        uint16_t bits[LANES];
        for (size_t i = 0; i < GROUP4 && first + i < cols; i++) {
            weights[i] = 1;
            for (size_t r = 0; r < n_rows; r++) v[i * LANES + r] = rows[r * cols + first + i];
        }
        k->more->fit_int4(v, weights, bits, q);
        memcpy(out + group_scales(TYPE_INT4, first / GROUP4), bits, sizeof bits);
        for (size_t i = 0; i < GROUP4 * LANES; i++)
            put_int4(out, i % LANES, first + i / LANES, q[i]);
    }
}

/* ROWS (n_rows <= 16, cols), row-major floats -> one panel; missing rows become zeros. */
static void store_rows(const kernel_set *k, int type, const float *rows, size_t n_rows,
                       size_t cols, uint8_t *out) {
    if (type != TYPE_INT4) {
        store_panel(type, rows, n_rows, cols, out);
        return;
    }
    memset(out, 0, panel_bytes(type, cols));
    store_int4(k, rows, n_rows, cols, out);
}

#endif
