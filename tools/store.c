/* How weights get into panels, as section 5 of medrun.c lays them out; medrun.c only reads them. A
 * tool includes this file after medrun.c. MIT licence, see LICENSE. */
#ifndef MEDRUN_STORE
#define MEDRUN_STORE

/* The type of this name, or -1. */
__attribute__((unused)) static int type_find(const char *name) {
    for (int t = 0; t < N_TYPES; t++) if (!strcmp(name, type_names[t])) return t;
    return -1;
}

static void store_bf16_row(const float *row, size_t cols, size_t lane, uint8_t *out) {
    for (size_t k = 0; k < cols; k++) {
        uint16_t h = f32_to_bf16(row[k]);
        memcpy(out + k / 2 * STEP_BYTES + 4 * lane + k % 2 * 2, &h, 2);
    }
}

/* One group of one row: the scale is the largest magnitude / 127, rounded up to a bf16, and the
 * weights are rounded with that scale, so that what is stored is what is meant. */
static void store_int8_group(const float *from, size_t n, size_t lane, uint8_t *scales,
                            uint8_t *steps) {
    float row[GROUP], largest = 0;
    memcpy(row, from, n * sizeof *row);
    turn_group(row, n);
    for (size_t k = 0; k < n; k++) largest = fmaxf(largest, fabsf(row[k]));
    uint16_t scale = largest < 1e-30f ? 0 : f32_to_bf16_up(largest / 127.0f);
    memcpy(scales + 2 * lane, &scale, 2);
    float d = bf16_to_f32(scale);
    for (size_t k = 0; k < GROUP; k++) {
        int32_t q = k < n && scale ? round_even(row[k] / d) : 0;
        steps[k / 4 * STEP_BYTES + 4 * lane + k % 4] = (uint8_t)(q + 128);
    }
}

/* ROWS (n_rows <= 16, cols), row-major floats -> one panel of bf16 or int8; missing rows become
 * zeros. int4 is stored by export_int4.c, which searches for the scales. */
__attribute__((unused)) static void store_panel(int type, const float *rows, size_t n_rows,
                                                size_t cols, uint8_t *out) {
    size_t groups = (cols + GROUP - 1) / GROUP;
    memset(out, 0, panel_bytes(type, cols));
    if (type == TYPE_BF16) {
        for (size_t r = 0; r < n_rows; r++) store_bf16_row(rows + r * cols, cols, r, out);
        return;
    }
    for (size_t g = 0; g < groups; g++)
        for (size_t r = 0; r < LANES; r++) {
            size_t n = r >= n_rows ? 0 : cols - g * GROUP < GROUP ? cols - g * GROUP : GROUP;
            const float *from = n ? rows + r * cols + g * GROUP : rows;
            store_int8_group(from, n, r, out + group_scales(TYPE_INT8, g),
                             out + group_steps(TYPE_INT8, g));
        }
}

#endif
