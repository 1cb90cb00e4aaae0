/* How the exporter stores weights in panels: int4's scales are searched for with the kernels of
 * tools/export_int4.h, which the tool names as MEDRUN_MORE_KERNELS before medrun.c. A tool includes
 * this file after medrun.c. MIT licence, see LICENSE. */
#ifndef MEDRUN_EXPORT_INT4
#define MEDRUN_EXPORT_INT4
#include "store.c"

/* Packs 16 rows of one int4 panel; IMPORTANCE (cols) says how much an error of each column counts,
 * NULL: all the same. */
static void store_int4(const kernel_set *k, const float *rows, size_t n_rows, size_t cols,
                      const float *importance, uint8_t *out) {
    for (size_t g = 0; g * GROUP4 < cols; g++) {
        float v[GROUP4 * LANES] = {0}, weights[GROUP4] = {0};
        uint8_t q[GROUP4 * LANES], *steps = out + group_steps(TYPE_INT4, g);
        uint16_t bits[LANES];
        for (size_t i = 0; i < GROUP4 && g * GROUP4 + i < cols; i++) {
            weights[i] = importance ? importance[g * GROUP4 + i] : 1;
            for (size_t r = 0; r < n_rows; r++) v[i * LANES + r] = rows[r * cols + g * GROUP4 + i];
        }
        k->more->fit_int4(v, weights, bits, q);
        memcpy(out + group_scales(TYPE_INT4, g), bits, sizeof bits);
        for (size_t i = 0; i < GROUP4 * LANES; i++) {
            size_t c = i / LANES, at = c / 8 * STEP_BYTES + 4 * (i % LANES) + c % 4;
            steps[at] |= (uint8_t)(q[i] << (c % 8 / 4 * 4));
        }
    }
}

/* ROWS (n_rows <= 16, cols), row-major floats -> one panel; missing rows become zeros. */
static void store_rows(const kernel_set *k, int type, const float *rows, size_t n_rows,
                       size_t cols, const float *importance, uint8_t *out) {
    if (type != TYPE_INT4) {
        store_panel(type, rows, n_rows, cols, out);
        return;
    }
    memset(out, 0, panel_bytes(type, cols));
    store_int4(k, rows, n_rows, cols, importance, out);
}

#endif
