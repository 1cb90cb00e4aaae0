/* How the exporter finds the scales of int4: a part of tools/kernels.h. MIT licence, see LICENSE. */

#define level_of K(level_of)
#define shift_near K(shift_near)
#define int4_error K(int4_error)
#define refit_int4 K(refit_int4)
#define settle_int4 K(settle_int4)
#define int4_fit K(int4_fit)
#define round_int4 K(round_int4)
#define start_int4 K(start_int4)
#define fit_int4 B(fit_int4)
#define run_chain K(run_chain)
#define try_chain K(try_chain)
#define chain_int4 B(chain_int4)
#define add_tile K(add_tile)
#define sum_products B(sum_products)
#define SUM_ROWS (TILE_PANELS > 1 ? 8 : 4)      /* what fits the registers                      */

#ifndef PARTIAL                 /* such passes use those of the pass they are based on           */
/* 16 groups, a lane each, and the best scale and shift so far. */
typedef struct {
    const float *v, *importance;            /* (32, 16), (32)                                    */
    vec v_sum;                              /* of importance * v                                 */
    float weight;                           /* of all importances                                */
    vec error, scale, shift;
} int4_fit;

/* The level next to T, as it counts from zero, or its index. */
ALWAYS_INLINE vec level_of(vec t, bool index) {
    vec q = vsplat(index ? 0 : (float)(int4_levels[0] - INT4_ZERO));
    UNROLLED for (int i = 1; i < 16; i++) {
        float middle = (float)(int4_levels[i - 1] + int4_levels[i]) * 0.5f - (float)INT4_ZERO;
        float next = index ? (float)i : (float)(int4_levels[i] - INT4_ZERO);
        q = vless(vsplat(middle), t, vsplat(next), q);
    }
    return q;
}

/* The nearest shift that six bits can say, but for being whole. */
ALWAYS_INLINE vec shift_near(vec shift) {
    vec most = vsplat(SHIFT_MASK - SHIFT_ZERO), least = vsplat(-SHIFT_ZERO);
    return vmax(vless(shift, most, shift, most), least);
}

/* The weighted squared error of all values with this scale and shift. */
NEVER_INLINE vec int4_error(const int4_fit *f, vec scale, vec shift) {
    vec error = vsplat(0), inverse = vdiv(vsplat(1), scale), back = vsub(vsplat(0), shift);
    for (size_t k = 0; k < GROUP4; k++) {
        vec v = vload(f->v + 16 * k), level = level_of(vfma(v, inverse, back), false);
        vec off = vfma(vsub(vsplat(0), vadd(level, shift)), scale, v);
        error = vfma(vmul(off, off), vsplat(f->importance[k]), error);
    }
    return error;
}

/* Least squares for the levels that are nearest now: v = scale * (level + shift), the shift within
 * its range and the scale what suits it. */
NEVER_INLINE void refit_int4(const int4_fit *f, vec *scale, vec *shift) {
    vec sum = vsplat(0), squares = sum, products = sum;
    vec inverse = vdiv(vsplat(1), *scale), back = vsub(vsplat(0), *shift);
    for (size_t k = 0; k < GROUP4; k++) {
        vec v = vload(f->v + 16 * k), level = level_of(vfma(v, inverse, back), false);
        vec weighted = vmul(level, vsplat(f->importance[k]));
        sum = vadd(sum, weighted);
        squares = vfma(weighted, level, squares);
        products = vfma(weighted, v, products);
    }
    vec weight = vsplat(f->weight), zero = vsplat(0);
    vec spread = vsub(vmul(weight, squares), vmul(sum, sum));
    vec slope = vsub(vmul(weight, products), vmul(sum, f->v_sum));
    vec offset = vdiv(vsub(vmul(f->v_sum, spread), vmul(slope, sum)), weight);
    offset = vdiv(offset, vless(zero, vmul(slope, slope), slope, vsplat(1)));
    offset = shift_near(vless(zero, spread, offset, *shift));
    vec size = vfma(offset, vfma(offset, weight, vadd(sum, sum)), squares);
    vec fresh = vdiv(vfma(offset, f->v_sum, products), vless(zero, size, size, vsplat(1)));
    vec useful = vless(zero, size, vmul(fresh, *scale), zero);          /* the sign must stay    */
    *shift = vless(zero, useful, offset, *shift);
    *scale = vless(zero, useful, fresh, *scale);
}

/* A scale as its bits can say it, between the least and the largest, times 2^-13. */
ALWAYS_INLINE vec round_int4(vec scale, uint16_t *bits) {
    vec top = vsplat(60000.0f), all = vmul(scale, vsplat(0x1p13f));
    all = vmax(vless(all, top, all, top), vsub(vsplat(0), top));
    vstore_f16(bits, all);
    for (int i = 0; i < 16; i++) {
        unsigned h = bits[i], size = (h & 0x7FFF) + SHIFT_MASK / 2 + (h >> 6 & 1);
        bits[i] = (uint16_t)((h & 0x8000) | (size & (0xFFFF - SHIFT_MASK)));
        if (size <= SHIFT_MASK) bits[i] |= SHIFT_MASK + 1;
    }
    return vmul(vload_int4((const uint8_t *)bits), vsplat(0x1p-13f));
}

/* Whole shifts around SHIFT, each with its best scale, as bits can say them; keeps the best. Many,
 * because a scale has but five significant bits, and what rounding it takes away, a weight much
 * larger than the rest feels most: for one of the shifts the best scale hardly needs rounding. */
static void settle_int4(int4_fit *f, vec scale, vec shift) {
    vec zero = vsplat(0);
    uint16_t bits[16];
    shift = vfloat(vround(shift));
    for (int i = -8; i <= 8; i++) {
        vec s = shift_near(vadd(shift, vsplat((float)i))), squares = zero, products = zero;
        vec inverse = vdiv(vsplat(1), scale);
        for (size_t k = 0; k < GROUP4; k++) {
            vec v = vload(f->v + 16 * k), level = level_of(vsub(vmul(v, inverse), s), false);
            level = vadd(level, s);
            vec weighted = vmul(level, vsplat(f->importance[k]));
            squares = vfma(weighted, level, squares);
            products = vfma(weighted, v, products);
        }
        vec fresh = vdiv(products, vless(zero, squares, squares, vsplat(1)));
        fresh = vless(zero, vmul(fresh, scale), fresh, scale);
        fresh = round_int4(fresh, bits);
        vec error = int4_error(f, fresh, s);
        f->scale = vless(error, f->error, fresh, f->scale);
        f->shift = vless(error, f->error, s, f->shift);
        f->error = vless(error, f->error, error, f->error);
    }
}

/* Start I of 18 for a group between LOW and HIGH: its ends, drawn in by three factors each, with
 * both signs of the scale; reached from the nearest shift there is. */
ALWAYS_INLINE void start_int4(int i, vec low, vec high, vec *scale, vec *shift) {
    static const float factors[] = {1.02f, 0.87f, 0.72f};
    vec first = vsplat((float)(int4_levels[0] - INT4_ZERO)), sign = vsplat(i < 9 ? 1 : -1);
    vec last = vsplat((float)(int4_levels[15] - INT4_ZERO));
    vec from = vmul(vmul(i < 9 ? low : high, vsplat(factors[i % 3])), sign);
    vec to = vmul(vmul(i < 9 ? high : low, vsplat(factors[i / 3 % 3])), sign);
    vec size = vmax(vdiv(vsub(to, from), vsub(last, first)), vsplat(1e-12f));
    *shift = shift_near(vsub(vdiv(from, size), first));
    size = vmax(vdiv(from, vadd(first, *shift)), vdiv(to, vadd(last, *shift)));
    *scale = vmul(vmax(size, vsplat(1e-12f)), sign);
}

/* The best of all starts after three rounds of least squares, settled; then the nibbles. */
static void fit_int4(const float *v, const float *importance, uint16_t *bits, uint8_t *q) {
    vec zero = vsplat(0), low = vsplat(INFINITY), high = vsplat(-INFINITY);
    vec scale, shift, best_scale = zero, best_shift = zero, least = vsplat(INFINITY);
    int4_fit f = {v, importance, zero, 0, zero, zero, zero};
    float shifts[16];
    for (size_t k = 0; k < GROUP4; k++) {
        vec x = vload(v + 16 * k), weighted = vmul(x, vsplat(importance[k]));
        f.v_sum = vadd(f.v_sum, weighted);
        f.error = vfma(weighted, x, f.error);           /* of nothing but zeros                  */
        f.weight = f.weight + importance[k];
        if (!(importance[k] > 0)) continue;             /* padding, which may be anything        */
        high = vmax(x, high), low = vless(x, low, x, low);
    }
    for (int i = 0; i < 18; i++) {
        start_int4(i, low, high, &scale, &shift);
        for (int round = 0; round < 3; round++) refit_int4(&f, &scale, &shift);
        vec error = int4_error(&f, scale, shift);
        best_scale = vless(error, least, scale, best_scale);
        best_shift = vless(error, least, shift, best_shift);
        least = vless(error, least, error, least);
    }
    settle_int4(&f, best_scale, best_shift);
    vec used = vmul(f.scale, f.scale);                  /* 0: the group is zeros                 */
    scale = vless(zero, used, f.scale, vsplat(1));
    round_int4(scale, bits);
    vstore(shifts, vless(zero, used, f.shift, vsplat(INFINITY)));
    for (int i = 0; i < 16; i++)
        bits[i] = isinf(shifts[i]) ? 0
                                   : (uint16_t)(bits[i] | (unsigned)((int)shifts[i] + SHIFT_ZERO));
    for (size_t k = 0; k < GROUP4; k++) {
        float index[16];
        vec level = level_of(vsub(vdiv(vload(v + 16 * k), scale), f.shift), true);
        vstore(index, vless(zero, used, level, zero));
        for (size_t i = 0; i < 16; i++) q[16 * k + i] = (uint8_t)index[i];
    }
}

/* ---- feeding errors on --------------------------------------------------------------------- */

/* The loss with this scale and shift, 0: a group of zeros; leaves errors and nibbles if wanted. */
NEVER_INLINE vec run_chain(const int4_chain *c, vec scale, vec shift, float *error, uint8_t *q) {
    vec v[GROUP4], zero = vsplat(0), loss = zero, used = vmul(scale, scale);
    vec inverse = vdiv(vsplat(1), vless(zero, used, scale, vsplat(1))), back = vsub(zero, shift);
    for (size_t k = 0; k < GROUP4; k++) v[k] = vload(c->v + 16 * k);
    for (size_t k = 0; k < GROUP4; k++) {
        const float *coupling = c->coupling + k * c->stride;
        vec at = vfma(v[k], inverse, back);
        vec stored = vmul(vadd(level_of(at, false), shift), scale);
        vec off = vsub(v[k], stored), left = vsub(vload(c->w + 16 * k), stored);
        loss = vfma(vmul(off, off), vsplat(c->loss[k]), loss);
        for (size_t j = k + 1; j < GROUP4; j++) v[j] = vfma(left, vsplat(coupling[j]), v[j]);
        if (!error) continue;
        float index[16];
        vstore(index, vless(zero, used, level_of(at, true), zero));
        for (size_t i = 0; i < 16; i++) q[16 * k + i] = (uint8_t)index[i];
        vstore(error + 16 * k, left);
    }
    return loss;
}

/* The scale of BITS is one of MORE steps away, the shift one of UP; but not beyond their ends. */
static void try_chain(const uint16_t *bits, int more, int up, uint16_t *to) {
    for (int i = 0; i < 16; i++) {
        int from = bits[i] & (0x7FFF - SHIFT_MASK), size = from + more * (SHIFT_MASK + 1);
        int shift = (bits[i] & SHIFT_MASK) + up;
        bool fits = from && size > SHIFT_MASK && size < 0x7B00 && shift >= 0 && shift <= SHIFT_MASK;
        to[i] = fits ? (uint16_t)((bits[i] & 0x8000) | size | shift) : bits[i];
    }
}

/* What suits columns that are rounded by themselves is near what suits a chain: its neighbours are
 * tried, and those of the best. */
static void chain_int4(const int4_chain *c, uint16_t *bits, uint8_t *q, float *error, float *loss) {
    vec factor = vsplat(0x1p-13f);
    float shifts[16], least[16], found[16];
    uint16_t center[16], near[16];
    for (int round = 0; round < 2; round++) {
        memcpy(center, bits, sizeof center);
        for (int t = round; t < 9; t++) {                   /* 0: what it begins with             */
            int other = t == 4 ? 0 : t;
            try_chain(center, t ? other % 3 - 1 : 0, t ? other / 3 - 1 : 0, near);
            for (int i = 0; i < 16; i++) shifts[i] = (float)((near[i] & SHIFT_MASK) - SHIFT_ZERO);
            vec scale = vmul(vload_int4((const uint8_t *)near), factor);
            vstore(found, run_chain(c, scale, vload(shifts), NULL, NULL));
            for (int i = 0; i < 16; i++)
                if ((!round && !t) || found[i] < least[i]) least[i] = found[i], bits[i] = near[i];
        }
    }
    for (int i = 0; i < 16; i++) shifts[i] = (float)((bits[i] & SHIFT_MASK) - SHIFT_ZERO);
    vec scale = vmul(vload_int4((const uint8_t *)bits), factor);
    run_chain(c, scale, vload(shifts), error, q);
    for (int i = 0; i < 16; i++) loss[i] += least[i];
}

/* ROWS <= 8 rows and 32 or 16 columns at once, which stay in registers. */
ALWAYS_INLINE void add_tile(const matrix_sum *s, size_t row, size_t col, size_t rows, size_t vecs) {
    vec sum[8][2];
    UNROLLED for (size_t i = 0; i < rows; i++)
        UNROLLED for (size_t k = 0; k < vecs; k++)
            sum[i][k] = vload(s->c + (row + i) * s->c_stride + col + 16 * k);
    for (size_t d = 0; d < s->depth; d++) {
        const float *a = s->a + d * s->a_stride + row, *b = s->b + d * s->b_stride + col;
        vec right[2];
        UNROLLED for (size_t k = 0; k < vecs; k++) right[k] = vload(b + 16 * k);
        UNROLLED for (size_t i = 0; i < rows; i++)
            UNROLLED for (size_t k = 0; k < vecs; k++)
                sum[i][k] = vfma(vsplat(a[i]), right[k], sum[i][k]);
    }
    UNROLLED for (size_t i = 0; i < rows; i++)
        UNROLLED for (size_t k = 0; k < vecs; k++)
            vstore(s->c + (row + i) * s->c_stride + col + 16 * k, sum[i][k]);
}

static void sum_products(const matrix_sum *s) {
    for (size_t col = 0; col < s->cols; col += 32) {
        size_t row = 0, vecs = s->cols - col < 32 ? 1 : 2;
        for (; SUM_ROWS == 8 && row + 8 <= s->rows; row += 8)
            if (vecs == 2) add_tile(s, row, col, 8, 2);
            else add_tile(s, row, col, 8, 1);
        for (; row + 4 <= s->rows; row += 4)
            if (vecs == 2) add_tile(s, row, col, 4, 2);
            else add_tile(s, row, col, 4, 1);
        for (; row < s->rows; row++)
            if (vecs == 2) add_tile(s, row, col, 1, 2);
            else add_tile(s, row, col, 1, 1);
    }
}
#endif
