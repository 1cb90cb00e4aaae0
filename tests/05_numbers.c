/* Tests of section 5: bf16, f16, rounding, and the panels of weights. */
#define MEDRUN_NO_MAIN
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#include "../tools/export_int4.c"
#include "test.h"

static const kernel_set *packer;            /* searches for the scales of int4                    */

/* ---- halves, against their definitions in doubles ------------------------------------------ */

/* The value of a 16-bit float with this many exponent and fraction bits; where the standard puts
 * infinity, the number that would follow. */
static double half_value(uint16_t h, int exponent_bits, int fraction_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, exponent = (h & 0x7FFF) >> fraction_bits;
    int fraction = h & ((1 << fraction_bits) - 1);
    if (exponent) fraction += 1 << fraction_bits;
    else exponent = 1;
    double v = ldexp(fraction, exponent - bias - fraction_bits);
    return h & 0x8000 ? -v : v;
}

static double value_bf16(uint16_t h) { return half_value(h, 8, 7); }
static double value_f16(uint16_t h) { return half_value(h, 5, 10); }

typedef struct {
    const char *name;
    double (*value)(uint16_t);
    uint16_t (*from)(float);
    float (*to)(uint16_t);
    uint16_t infinity, quiet;               /* infinity's bits; the bit every NaN that is made has */
} half_type;

static const half_type half_types[] = {
    {"bf16", value_bf16, f32_to_bf16, bf16_to_f32, 0x7F80, 0x0040},
    {"f16", value_f16, f32_to_f16, f16_to_f32, 0x7C00, 0x0200},
};

static void test_half_widening(const half_type *t) {
    int wrong = 0;
    for (uint32_t i = 0; i < 65536; i++) {
        uint16_t h = (uint16_t)i;
        float f = t->to(h);
        if ((h & 0x7FFF) < t->infinity) {
            wrong += (double)f != t->value(h) || !signbit(f) != !(h >> 15);
            wrong += t->from(f) != h;
        } else if ((h & 0x7FFF) == t->infinity) {
            wrong += !isinf(f) || (f > 0) != !(h >> 15) || t->from(f) != h;
        } else {
            wrong += !isnan(f) || t->from(f) != (h | t->quiet);
        }
    }
    if (!CHECK_EQ(wrong, 0)) printf("    %s\n", t->name);
}

/* Rounding changes only half way between two neighbours: at, just below and just above each. */
static void test_half_rounding(const half_type *t) {
    int wrong = 0;
    for (uint16_t h = 0; h < t->infinity; h++) {
        double low = t->value(h), high = t->value((uint16_t)(h + 1)), middle = (low + high) / 2;
        uint16_t even = h & 1 ? (uint16_t)(h + 1) : h;
        float tie = (float)middle;
        if ((double)tie != middle) continue;            /* finer than a float: not to be met     */
        for (uint16_t sign = 0; sign < 2; sign++) {
            float s = sign ? -1.0f : 1.0f;
            uint16_t bit = (uint16_t)(sign << 15);
            wrong += t->from(s * tie) != (even | bit);
            wrong += t->from(s * nextafterf(tie, 0)) != (h | bit);
            wrong += t->from(s * nextafterf(tie, INFINITY)) != ((h + 1) | bit);
            wrong += t->from(s * nextafterf((float)low, INFINITY)) != (h | bit);
        }
    }
    wrong += t->from(FLT_MAX) != t->infinity || t->from(-FLT_MAX) != (t->infinity | 0x8000);
    wrong += t->from(bits_float(1)) != 0 || t->from(-0.0f) != 0x8000;
    if (!CHECK_EQ(wrong, 0)) printf("    %s\n", t->name);
}

/* The nearest by search, the even one on a tie. */
static uint16_t nearest_half(const half_type *t, float f) {
    double x = fabs((double)f);
    uint16_t low = 0, high = t->infinity, sign = signbit(f) ? 0x8000 : 0;
    if (x >= t->value(high)) return high | sign;
    while (high - low > 1) {
        uint16_t middle = (uint16_t)((low + high) / 2);
        if (t->value(middle) <= x) low = middle;
        else high = middle;
    }
    double below = x - t->value(low), above = t->value(high) - x;
    return (below < above || (below == above && low % 2 == 0) ? low : high) | sign;
}

static void test_half_random(const half_type *t) {
    int wrong = 0;
    for (int i = 0; i < 1000000; i++) {
        float f = bits_float((uint32_t)test_random());
        if (isnan(f)) continue;
        if (i & 1) f = (float)ldexp((double)f, -ilogbf(f) + (int)(test_random() % 45) - 27);
        if (isnan(f)) continue;
        wrong += t->from(f) != nearest_half(t, f);
    }
    if (!CHECK_EQ(wrong, 0)) printf("    %s\n", t->name);
}

#ifdef MEDRUN_X86
__attribute__((target("f16c"))) static int differs_from_f16c(void) {
    int wrong = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        uint32_t mine = float_bits(f16_to_f32((uint16_t)h)), its = float_bits(_cvtsh_ss((uint16_t)h));
        bool signalling = (h & 0x7E00) == 0x7C00 && (h & 0x1FF);        /* it makes them quiet   */
        wrong += mine != its && !(signalling && (mine | 0x400000) == its);
    }
    for (uint32_t i = 0; i < 1u << 25; i++) {           /* every 128th float and its neighbours  */
        float f = bits_float(i << 7 | (uint32_t)(test_random() & 127));
        wrong += f32_to_f16(f) != _cvtss_sh(f, 0);
    }
    return wrong;
}
#endif

static void test_f16c(void) {
#ifdef MEDRUN_X86
    if (detect_cpu().avx2) {
        CHECK_EQ(differs_from_f16c(), 0);
        return;
    }
#endif
    SKIP("this processor has no F16C to compare f16 with");
}

static void test_bf16_up(void) {
    int wrong = 0;
    for (int i = 0; i < 1000000; i++) {
        uint32_t bits = (uint32_t)test_random() % 0x7F7F0000;
        if (i & 1) bits &= 0xFFFF0000;                  /* those that are a bf16 already         */
        float f = bits_float(bits);
        uint16_t up = f32_to_bf16_up(f);
        wrong += !(bf16_to_f32(up) >= f);
        wrong += up && !(bf16_to_f32((uint16_t)(up - 1)) < f);
    }
    CHECK_EQ(wrong, 0);
}

static void test_round_even(void) {
    int wrong = 0;
    const float most = 4194303.5f;                      /* the last below 2^22                   */
    for (int i = -300; i <= 300; i++)
        for (int part = 0; part < 4; part++) {
            float f = (float)i + 0.25f * (float)part;
            wrong += round_even(f) != (int32_t)nearbyintf(f);
            wrong += round_even(nextafterf(f, 1e9f)) != (int32_t)nearbyintf(nextafterf(f, 1e9f));
            wrong += round_even(nextafterf(f, -1e9f)) != (int32_t)nearbyintf(nextafterf(f, -1e9f));
        }
    for (int i = 0; i < 1000000; i++) {
        float f = (float)((double)test_random() / 0x1p63 - 1) * most;
        if (i & 1) f /= (float)(1 + test_random() % 40000);
        wrong += round_even(f) != (int32_t)nearbyintf(f);
    }
    wrong += round_even(most) != 4194304 || round_even(-most) != -4194304 || round_even(-0.0f) != 0;
    CHECK_EQ(wrong, 0);
}

/* ---- panels -------------------------------------------------------------------------------- */

static const size_t all_cols[] = {1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192, 320};
enum { N_COLS = sizeof all_cols / sizeof *all_cols };

static float random_weight(int style) {
    float f = (float)((double)test_random() / 0x1p63 - 1);
    switch (style) {
        case 0: return f;
        case 1: return f * f * f * 0.02f;               /* like a model's: few are large         */
        case 2: return test_random() % 70 ? 0 : f;      /* mostly zeros, whole groups of them    */
        case 3: return f * 1e-29f;                      /* close to what counts as nothing       */
        case 4: return f * 1e30f;
        case 5: return test_random() % 5 ? f * 1e-6f : f * 1e6f;
        case 6: return test_random() & 1 ? 127.0f : (float)(int)(test_random() % 255) - 127.0f + 0.5f;
        default: return f * 1e-40f;                     /* subnormal                             */
    }
}
enum { STYLES = 8 };

/* ROWS x COLS random weights, packed panel by panel from memory that ends where the rows do. */
static float *random_matrix(int type, size_t rows, size_t cols, int style, uint8_t **packed_rows) {
    float *w = malloc(rows * cols * sizeof *w);
    uint8_t *out = malloc(tensor_bytes(type, rows, cols));
    memset(out, 0xAA, tensor_bytes(type, rows, cols));
    for (size_t i = 0; i < rows * cols; i++) w[i] = random_weight(style);
    for (size_t r = 0; r < rows; r += LANES)
        store_rows(packer, type, w + r * cols, rows - r < LANES ? rows - r : LANES, cols,
                   out + r / LANES * panel_bytes(type, cols));
    return *packed_rows = out, w;
}

static const uint8_t *panel_of(int type, const uint8_t *packed_rows, size_t row, size_t cols) {
    return packed_rows + row / LANES * panel_bytes(type, cols);
}

static void test_bf16_panels(void) {
    int wrong = 0;
    for (size_t c = 0; c < N_COLS; c++)
        for (size_t rows = 1; rows <= 33; rows++) {
            size_t cols = all_cols[c];
            uint8_t *p;
            float *w = random_matrix(TYPE_BF16, rows, cols, (int)(rows % STYLES), &p);
            float *back = malloc(cols * sizeof *back);
            for (size_t r = 0; r < round_up(rows, LANES); r++) {
                panel_unpack_row(TYPE_BF16, panel_of(TYPE_BF16, p, r, cols), r % LANES, cols, back);
                for (size_t k = 0; k < cols; k++) {
                    float wanted = r < rows ? bf16_to_f32(f32_to_bf16(w[r * cols + k])) : 0;
                    wrong += float_bits(back[k]) != float_bits(wanted);
                }
            }
            free(back), free(p), free(w);
        }
    CHECK_EQ(wrong, 0);
}

/* One weight w of a group whose largest magnitude is LARGEST came back as q * scale. */
static int wrong_int8(float w, float largest, int q, float scale, float back) {
    int wrong = 0;
    if (scale == 0) return (largest >= 1e-30f) + (q != 0) + (back != 0);
    wrong += (double)scale < (double)largest / 127 * (1 - 0x1p-23);     /* nothing clips ...     */
    wrong += (double)scale > (double)largest / 127 * (1 + 0x1p-6);      /* ... or is wasted      */
    wrong += q < -127 || q > 127;
    wrong += fabs((double)w - (double)q * (double)scale) >
             (0.5 + 127 * 0x1p-24) * (double)scale;     /* half a step, and the quotient rounded */
    wrong += back != (float)q * scale;
    return wrong;
}

/* turn_group against a sum over the signs in double precision; twice it is nothing, but for what
 * rounding moves; fewer than 64 numbers stay. */
static void test_turn(void) {
    int wrong = 0;
    for (int run = 0; run < 200; run++) {
        float x[64], was[64], other[64];
        double size = 0;
        for (size_t k = 0; k < 64; k++) x[k] = was[k] = other[k] = random_weight(run % 3);
        for (size_t k = 0; k < 64; k++) size += fabs((double)x[k]);
        turn_group(x, 63);
        wrong += memcmp(x, was, sizeof x) != 0;
        turn_group(x, 64), turn_row(other, 64);
        wrong += memcmp(x, other, sizeof x) != 0;
        for (unsigned k = 0; k < 64; k++) {
            double sum = 0;
            for (unsigned i = 0; i < 64; i++)
                sum += (__builtin_popcount(i & k) % 2 ? -0.125 : 0.125) * (double)was[i];
            wrong += !(fabs((double)x[k] - sum) <= size * 0x1p-24);
        }
        turn_group(x, 64);
        for (size_t k = 0; k < 64; k++)
            wrong += !(fabs((double)x[k] - (double)was[k]) <= size * 0x1p-22);
    }
    CHECK_EQ(wrong, 0);
}

/* The largest weights that the exporter lets through (2^120), 64 at a time, of one sign and with the
 * signs of each turn, which add up to 2^123; in the last columns, which are not turned, too. */
static void test_int8_of_huge_weights(void) {
    uint8_t *panel = malloc(panel_bytes(TYPE_INT8, 80));
    float v[80], row[80];
    int wrong = 0;
    for (unsigned k = 0; k < 64; k++) {
        for (unsigned i = 0; i < 80; i++)
            v[i] = __builtin_popcount(i & k) % 2 ? -0x1p120f : 0x1p120f;
        store_rows(packer, TYPE_INT8, v, 1, 80, panel);
        panel_unpack_row(TYPE_INT8, panel, 0, 80, row);
        for (unsigned i = 0; i < 80; i++) wrong += !(fabsf(row[i] - v[i]) <= 0x1p114f);
    }
    CHECK_EQ(wrong, 0);
    free(panel);
}

/* A row of a panel as it is stored: turned, if it was. */
static void unpack_stored(int type, const uint8_t *panel, size_t lane, size_t cols, float *row) {
    for (size_t k = 0; k < cols; k++)
        row[k] = (float)stored_int(type, panel, lane, k) * stored_scale(type, panel, lane, k);
}

/* The weights of a row of zeros, or of W, as they are stored. */
static void turned_rows(float *w, size_t rows, size_t cols) {
    for (size_t r = 0; r < rows; r++) turn_row(w + r * cols, cols);
}

static void test_int8_panels(void) {
    int wrong = 0, extreme = 0;
    for (size_t c = 0; c < N_COLS; c++)
        for (size_t rows = 1; rows <= 33; rows++) {
            size_t cols = all_cols[c];
            uint8_t *p;
            float *w = random_matrix(TYPE_INT8, rows, cols, (int)(rows % STYLES), &p);
            float *back = malloc(cols * sizeof *back), *whole = malloc(cols * sizeof *whole);
            turned_rows(w, rows, cols);
            for (size_t r = 0; r < round_up(rows, LANES); r++) {
                const uint8_t *panel = panel_of(TYPE_INT8, p, r, cols);
                unpack_stored(TYPE_INT8, panel, r % LANES, cols, back);
                for (size_t k = 0; k < round_up(cols, 64); k++) {
                    size_t first = k / 64 * 64;
                    float largest = 0;
                    for (size_t i = first; i < first + 64 && i < cols && r < rows; i++)
                        if (fabsf(w[r * cols + i]) > largest) largest = fabsf(w[r * cols + i]);
                    uint16_t bits;
                    /* two groups make a block: a line of 2 x 16 scales, then 2 x 16 steps       */
                    const uint8_t *block = panel + k / 128 * (64 + 2 * 1024);
                    memcpy(&bits, block + k % 128 / 64 * 32 + 2 * (r % 16), 2);
                    const uint8_t *steps = block + 64 + k % 128 / 64 * 1024;
                    int q = steps[k % 64 / 4 * 64 + 4 * (r % 16) + k % 4] - 128;
                    bool padding = k >= cols || r >= rows;
                    if (padding) wrong += q != 0;
                    else wrong += wrong_int8(w[r * cols + k], largest, q, bf16_to_f32(bits), back[k]);
                    if (r >= rows && k < cols) wrong += back[k] != 0 || bits != 0;
                    extreme += q == 127 || q == -127;
                }
                panel_unpack_row(TYPE_INT8, panel, r % LANES, cols, whole);
                turn_row(back, cols);
                wrong += memcmp(back, whole, cols * sizeof *back) != 0;
            }
            free(back), free(whole), free(p), free(w);
        }
    CHECK_EQ(wrong, 0);
    CHECK(extreme > 1000);                              /* the range is used to its ends         */
}

/* ---- int4 ---------------------------------------------------------------------------------- */

static const int levels[16] = {-96, -72, -57, -45, -34, -24, -15, -6, 2, 10, 19, 27, 36, 47, 60, 76};

/* What the bits of a group and a nibble stand for, in double precision. */
static double value_int4(uint16_t bits, int q) {
    return half_value((uint16_t)(bits & 0xFFC0), 5, 10) / 8192 * (levels[q] + (bits & 63) - 32);
}

/* Where a weight of LANE and K has its nibble, and its group the scale and shift: two groups make
 * a block, a line of 2 x 16 of these, then 2 x 4 steps of 16 x 4 bytes. */
static size_t nibble_at(size_t lane, size_t k, int *high) {
    *high = k % 8 >= 4;
    return k / 64 * (64 + 512) + 64 + k % 64 / 32 * 256 + k % 32 / 8 * 64 + 4 * lane + k % 4;
}

static size_t bits_at(size_t lane, size_t k) { return k / 64 * 576 + k % 64 / 32 * 32 + 2 * lane; }

static uint16_t bits_of(const uint8_t *panel, size_t lane, size_t k) {
    uint16_t bits;
    memcpy(&bits, panel + bits_at(lane, k), 2);
    return bits;
}

static int nibble_of(const uint8_t *panel, size_t lane, size_t k) {
    int high, byte = panel[nibble_at(lane, k, &high)];
    return high ? byte >> 4 : byte & 15;
}

/* Every finite scale, both signs, zero and subnormal ones too, with every shift and level. */
static void test_int4_values(void) {
    int wrong = 0;
    uint8_t panel[576] = {0};
    float row[64];
    for (size_t k = 0; k < 64; k++)
        for (int high, i = 0; i < 16; i++) {
            size_t at = nibble_at((size_t)i, k, &high);
            panel[at] |= (uint8_t)(((int)k + i) % 16 << 4 * high);
        }
    for (uint32_t h = 0; h < 65536; h++) {
        uint16_t bits = (uint16_t)h;
        size_t lane = h % 16;
        if ((bits & 0x7C00) == 0x7C00) continue;
        memcpy(panel + bits_at(lane, 0), &bits, 2), memcpy(panel + bits_at(lane, 32), &bits, 2);
        panel_unpack_row(TYPE_INT4, panel, lane, 64, row);
        for (size_t k = 0; k < 64; k++)
            wrong += (double)row[k] != value_int4(bits, ((int)k + (int)lane) % 16);
    }
    CHECK_EQ(wrong, 0);
}

/* A nibble that changes moves its own weight and no other, the bits of a group its 32 weights; all
 * bytes of a panel are one or the other. */
static void test_int4_layout(void) {
    int wrong = 0;
    for (size_t c = 0; c < N_COLS; c++) {
        size_t cols = round_up(all_cols[c], 64), bytes = panel_bytes(TYPE_INT4, all_cols[c]);
        uint8_t *panel = malloc(bytes), *used = calloc(bytes, 1);
        float *before = malloc(16 * cols * sizeof *before), *row = malloc(cols * sizeof *row);
        wrong += bytes != cols / 64 * 576;
        for (size_t i = 0; i < bytes; i++) panel[i] = (uint8_t)(i % 576 < 64 ? 0x15 : i * 37 % 256);
        for (size_t r = 0; r < 16; r++)
            panel_unpack_row(TYPE_INT4, panel, r, cols, before + r * cols);
        for (size_t i = 0; i < 16 * cols * 2; i++) {
            size_t r = i / 2 / cols, k = i / 2 % cols, moved = 0;
            int high;
            bool nibble = i % 2;
            size_t at = nibble ? nibble_at(r, k, &high) : bits_at(r, k);
            if (!nibble && k % 32) continue;
            uint8_t old = panel[at], flip = nibble ? high ? 0x90 : 0x09 : 0x20;
            panel[at] ^= flip, used[at] |= flip;
            if (!nibble) used[at + 1]++;
            for (size_t lane = 0; lane < 16; lane++) {
                panel_unpack_row(TYPE_INT4, panel, lane, cols, row);
                for (size_t n = 0; n < cols; n++) {
                    bool own = lane == r && (nibble ? n == k : n / 32 == k / 32);
                    bool differs = row[n] != before[lane * cols + n];
                    wrong += differs && !own, moved += differs;
                }
                if (c > 9 && lane == r) lane = 15;      /* the others were seen in small panels  */
            }
            wrong += moved != (nibble ? 1 : 32);
            panel[at] = old;
        }
        for (size_t i = 0; i < bytes; i++)
            wrong += used[i] != (i % 576 >= 64 ? 0x99 : i % 2 ? 1 : 0x20);
        free(panel), free(used), free(before), free(row);
    }
    CHECK_EQ(wrong, 0);
}

/* No level of the group is nearer to W than the one that is stored. */
static int wrong_int4(float w, uint16_t bits, int q, float back) {
    double off = fabs(value_int4(bits, q) - (double)w), size = fabs((double)w);
    int wrong = (double)back != value_int4(bits, q);
    for (int i = 0; i < 16 && bits; i++)
        wrong += fabs(value_int4(bits, i) - (double)w) * (1 + 1e-5) + size * 1e-6 < off;
    return wrong;
}

/* Two neighbours of the levels, which span 172, are 24 apart: were a group's ends met exactly, no
 * weight would be off by more than 12 / 172 of its range. The search makes squares small instead,
 * so that bounds their mean, beside half the smallest scale at the furthest level (128): scales are
 * rounded. A group that is none is all zeros. */
static void test_int4_panels(void) {
    int wrong = 0, used[16] = {0}, signs[2] = {0};
    double worst = 0;
    for (size_t c = 0; c < N_COLS; c++)
        for (size_t rows = 1; rows <= 33; rows++) {
            static const int styles[] = {0, 1, 2, 6, 0, 1};
            size_t cols = all_cols[c];
            uint8_t *p;
            float *w = random_matrix(TYPE_INT4, rows, cols, styles[rows % 6], &p);
            float *back = malloc(cols * sizeof *back);
            for (size_t r = 0; r < round_up(rows, LANES); r++) {
                const uint8_t *panel = panel_of(TYPE_INT4, p, r, cols);
                panel_unpack_row(TYPE_INT4, panel, r % LANES, cols, back);
                for (size_t k = 0; k < round_up(cols, 64); k += 32) {
                    double squares = 0, low = 0, high = 0;
                    uint16_t bits = bits_of(panel, r % 16, k);
                    size_t n = r >= rows || k >= cols ? 0 : cols - k < 32 ? cols - k : 32;
                    for (size_t i = 0; i < n; i++) {
                        double x = (double)w[r * cols + k + i], d = (double)back[k + i] - x;
                        int q = nibble_of(panel, r % 16, k + i);
                        wrong += wrong_int4((float)x, bits, q, back[k + i]);
                        squares += d * d, low = fmin(low, x), high = fmax(high, x);
                        used[q]++, signs[bits >> 15]++;
                    }
                    double step = (high - low) * 12 / 172 + 128 * 0x1p-32;
                    if (n) worst = fmax(worst, squares / (double)n / (step * step));
                    for (size_t i = n; i < 32 && !n; i++) wrong += nibble_of(panel, r % 16, k + i);
                    wrong += low == 0 && high == 0 && bits != 0;
                    wrong += fmax(-low, high) > 0x1p-32 && bits == 0;   /* half the least weight */
                    wrong += (bits & 0x7C00) == 0x7C00;
                }
            }
            free(back), free(p), free(w);
        }
    CHECK_EQ(wrong, 0);
    if (!CHECK(worst < 1)) printf("    %.3f\n", worst);
    printf("int4: mean square of a group at most %.3f\n", worst);
    for (int i = 0; i < 16; i++) CHECK(used[i] > 1000);
    CHECK(signs[0] > 10000 && signs[1] > 10000);
}

/* One group in row 0 of a panel of 32 columns -> what is off, relative to its largest weight. */
static double group_error(const float *v, uint16_t *bits) {
    uint8_t panel[576];
    float row[32];
    double off = 0, largest = 0;
    store_rows(packer, TYPE_INT4, v, 1, 32, panel);
    panel_unpack_row(TYPE_INT4, panel, 0, 32, row);
    for (size_t i = 0; i < 32; i++) {
        double d = fabs((double)row[i] - (double)v[i]);
        off = d > off ? d : off;                        /* fmax: gcc 12 for arm64 gives up       */
        largest = fmax(largest, fabs((double)v[i]));
    }
    *bits = bits_of(panel, 0, 0);
    return largest > 0 ? off / largest : 0;
}

/* What bits can say exactly comes back exactly: every scale with every shift. */
static void test_int4_exact(void) {
    int wrong = 0;
    for (uint32_t h = 64; h < 0x7BC0; h += 64)
        for (int i = 0; i < 8; i++) {
            float v[32];
            uint16_t found, bits = (uint16_t)(h | (test_random() & 1) << 15 | test_random() % 64);
            double largest = 0;
            for (size_t k = 0; k < 32; k++) {
                v[k] = (float)value_int4(bits, k < 16 ? (int)k : (int)(test_random() % 16));
                largest = fmax(largest, fabs((double)v[k]));
            }
            if (largest > INT4_LARGEST) continue;
            wrong += group_error(v, &found) != 0 || found != bits;
        }
    CHECK_EQ(wrong, 0);
}

/* The ends: the largest weights there may be, of one sign, of both, alone; weights so small that
 * the smallest scale is too large; nothing. */
static void test_int4_extremes(void) {
    float v[32] = {0};
    uint16_t bits;
    double worst = 0;
    CHECK(group_error(v, &bits) == 0 && bits == 0);
    v[5] = -0.0f;
    CHECK(group_error(v, &bits) == 0 && bits == 0);
    for (int style = 0; style < 200; style++) {
        for (size_t k = 0; k < 32; k++) {
            float f = (float)((double)test_random() / 0x1p63 - 1) * INT4_LARGEST;
            v[k] = style % 5 == 0 ? f : style % 5 == 1 ? fabsf(f) : style % 5 == 2 ? -fabsf(f) :
                   style % 5 == 3 ? copysignf(INT4_LARGEST, f) : f * 1e-3f;
        }
        v[style % 32] = copysignf(INT4_LARGEST, style & 1 ? -1.0f : 1.0f);
        worst = fmax(worst, group_error(v, &bits));
        CHECK((bits & 0x7FC0) <= 0x7BC0);
    }
    printf("int4: largest weights off by at most %.3f\n", worst);
    CHECK(worst < 0.16);
    for (size_t k = 0; k < 32; k++) v[k] = k % 2 ? INT4_LARGEST : INT4_LARGEST * 0.999f;
    CHECK(group_error(v, &bits) < 0.02);
    for (int i = 0; i < 40; i++) {                      /* ever smaller: well, badly, as zeros   */
        for (size_t k = 0; k < 32; k++) v[k] = ldexpf((float)levels[k / 2], -24 - i);
        double error = group_error(v, &bits);
        CHECK(i < 8 ? error < 0.01 : i < 15 ? error <= 1 : bits == 0 && error == 1);
    }
    for (size_t k = 0; k < 32; k++) v[k] = bits_float((uint32_t)k);     /* subnormal             */
    CHECK(group_error(v, &bits) == 1 && bits == 0);
}

/* A line between two random numbers (Box and Muller 1958), and what is made of such. */
static double normal(void) {
    double u = ((double)(test_random() >> 11) + 1) * 0x1p-53;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * (double)(test_random() >> 11) * 0x1p-53);
}

static double student(int freedom) {
    double top = normal(), squares = 0;
    for (int i = 0; i < freedom; i++) {
        double x = normal();
        squares += x * x;
    }
    return top / sqrt(squares / freedom);
}

/* Relative squared error against that of llama.cpp's Q4_K, of as many bits, on these very matrices
 * (ggml_quantize_chunk, without an importance matrix). */
static void test_int4_error(void) {
    static const struct { const char *name; int freedom; double q4_k; } kinds[] = {
        {"normal", 0, 0.0051}, {"Student t5", 5, 0.0068}, {"Student t3", 3, 0.0085},
        {"Laplace", -1, 0.0071}};
    enum { ROWS = 256, COLS = 4096 };
    float *w = malloc(ROWS * COLS * sizeof *w), row[COLS];
    uint8_t *panel = malloc(panel_bytes(TYPE_INT4, COLS));
    test_random_state = 88172645463325252ull;           /* the same matrices whatever ran before */
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        double off = 0, size = 0;
        int freedom = kinds[i].freedom;
        for (size_t k = 0; k < ROWS * COLS; k++) {
            double u = (double)(test_random() >> 11) * 0x1p-53 - 0.5;
            double laplace = (u < 0 ? 1 : -1) * log(1 - 2 * fabs(u) + 1e-16);
            w[k] = (float)(0.02 * (freedom > 0 ? student(freedom) : freedom ? laplace : normal()));
        }
        for (size_t r = 0; r < ROWS; r++) {
            if (r % 16 == 0) store_rows(packer, TYPE_INT4, w + r * COLS, 16, COLS, panel);
            panel_unpack_row(TYPE_INT4, panel, r % 16, COLS, row);
            for (size_t k = 0; k < COLS; k++) {
                double x = (double)w[r * COLS + k], d = (double)row[k] - x;
                off += d * d, size += x * x;
            }
        }
        printf("%s: relative squared error %.5f, Q4_K %.4f\n", kinds[i].name, off / size,
               kinds[i].q4_k);
        CHECK(off / size < kinds[i].q4_k);
    }
    free(w), free(panel);
}

/* Each weight has bytes of its own inside the panel: one weight is changed at a time, and the
 * bytes that differ may belong to no other weight (int8: to no other group; which weight of a group
 * has which byte, test_int8_panels knows). */
static void test_layout(int type) {
    int wrong = 0;
    for (size_t c = 0; c < N_COLS; c++) {
        size_t cols = all_cols[c], bytes = panel_bytes(type, cols), group = type == TYPE_INT8 ? 64 : 1;
        float *w = calloc(LANES * cols, sizeof *w);
        int *owner = calloc(bytes, sizeof *owner), *shared = calloc(bytes, sizeof *shared);
        uint8_t *empty = malloc(bytes + 64), *p = malloc(bytes + 64);
        memset(empty, 0xAA, bytes + 64), memset(p, 0xAA, bytes + 64);
        store_panel(type, w, LANES, cols, empty);
        for (size_t i = 0; i < LANES * cols; i++) {
            size_t changed = 0;
            int id = (int)(i / cols * 1000 + i % cols / group) + 1;
            bool whole = type == TYPE_INT8 && i % cols / 64 * 64 + 64 <= cols;
            w[i] = 0.7f;
            store_panel(type, w, LANES, cols, p);
            w[i] = 0;
            for (size_t b = 0; b < bytes; b++) {
                if (p[b] == empty[b]) continue;
                changed++;
                if (type == TYPE_INT8 && b % 2112 < 64) {       /* a scale, of this group alone  */
                    wrong += shared[b] && shared[b] != id;
                    shared[b] = id;
                } else {
                    wrong += (owner[b] && (!whole || owner[b] != id)) || shared[b];
                    owner[b] = id;
                }
            }
            wrong += whole ? changed < 65 || changed > 66 : changed < 2 || changed > 3;
        }
        for (size_t b = bytes; b < bytes + 64; b++) wrong += p[b] != 0xAA;      /* none behind   */
        wrong += bytes % 64 != 0;
        free(w), free(owner), free(shared), free(empty), free(p);
    }
    if (!CHECK_EQ(wrong, 0)) printf("    %s\n", type_names[type]);
}

static void test_sizes(void) {
    CHECK_EQ(panel_bytes(TYPE_BF16, 4096), 16 * 4096 * 2);
    CHECK_EQ(panel_bytes(TYPE_BF16, 15), 8 * 64);
    CHECK_EQ(panel_bytes(TYPE_INT8, 4096), 16 * 4096 + 16 * 2 * 4096 / 64);
    CHECK_EQ(panel_bytes(TYPE_INT8, 64), 1024 + 64);
    CHECK_EQ(panel_bytes(TYPE_INT8, 65), 2 * 1024 + 64);
    CHECK_EQ(panel_bytes(TYPE_INT8, 129), 3 * 1024 + 2 * 64);
    CHECK_EQ(panel_bytes(TYPE_INT4, 4096), 16 * 4096 / 2 + 16 * 2 * 4096 / 32);
    CHECK_EQ(panel_bytes(TYPE_INT4, 1), 512 + 64);
    CHECK_EQ(panel_bytes(TYPE_INT4, 64), 512 + 64);
    CHECK_EQ(panel_bytes(TYPE_INT4, 65), 2 * (512 + 64));
    CHECK_EQ(tensor_bytes(TYPE_INT4, 17, 80), 2 * 2 * (512 + 64));
    CHECK_EQ(tensor_bytes(TYPE_F32, 3, 5), 60);
    CHECK_EQ(tensor_bytes(TYPE_F32, 1 << 20, 1 << 18), 1ll << 40);      /* on 32 bits, too       */
    CHECK_EQ(tensor_bytes(TYPE_BF16, 1 << 22, 1 << 16), 1ll << 39);
    CHECK_EQ(tensor_bytes(TYPE_INT8, 17, 64), 2 * (1024 + 64));
    CHECK_EQ(tensor_bytes(TYPE_BF16, 33, 2), 3 * 64);
    CHECK_EQ(tensor_bytes(TYPE_BF16, 16, 2), 64);
    CHECK(type_find("f32") == TYPE_F32 && type_find("bf16") == TYPE_BF16);
    CHECK(type_find("int4") == TYPE_INT4 && rows_type(TYPE_INT4) == TYPE_INT8);
    CHECK(rows_type(TYPE_INT8) == TYPE_INT8 && rows_type(TYPE_BF16) == TYPE_BF16);
    CHECK(type_find("int8") == TYPE_INT8 && type_find("int") == -1 && type_find("") == -1);
    CHECK(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(16, 16) == 16);
    CHECK(round_up(4097, 4096) == 8192);
}

int main(void) {
    const kernel_set *sets[N_KERNEL_SETS];
    usable_kernels(sets);
    packer = sets[0];
    for (size_t i = 0; i < sizeof half_types / sizeof *half_types; i++) {
        test_half_widening(&half_types[i]);
        test_half_rounding(&half_types[i]);
        test_half_random(&half_types[i]);
    }
    test_f16c();
    test_bf16_up();
    test_round_even();
    test_sizes();
    test_bf16_panels();
    test_turn();
    test_int8_panels();
    test_int8_of_huge_weights();
    test_layout(TYPE_BF16);
    test_layout(TYPE_INT8);
    test_int4_values();
    test_int4_layout();
    test_int4_panels();
    test_int4_exact();
    test_int4_extremes();
    test_int4_error();
    return report();
}
