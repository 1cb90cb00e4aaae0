/* Tests of section 5: bf16, f16, rounding, and the panels of weights. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

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
        panel_pack(type, w + r * cols, rows - r < LANES ? rows - r : LANES, cols,
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

static void test_int8_panels(void) {
    int wrong = 0, extreme = 0;
    for (size_t c = 0; c < N_COLS; c++)
        for (size_t rows = 1; rows <= 33; rows++) {
            size_t cols = all_cols[c];
            uint8_t *p;
            float *w = random_matrix(TYPE_INT8, rows, cols, (int)(rows % STYLES), &p);
            float *back = malloc(cols * sizeof *back);
            for (size_t r = 0; r < round_up(rows, LANES); r++) {
                const uint8_t *panel = panel_of(TYPE_INT8, p, r, cols);
                panel_unpack_row(TYPE_INT8, panel, r % LANES, cols, back);
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
            }
            free(back), free(p), free(w);
        }
    CHECK_EQ(wrong, 0);
    CHECK(extreme > 1000);                              /* the range is used to its ends         */
}

/* Each weight has bytes of its own inside the panel: one weight is changed at a time, and the
 * bytes that differ may belong to no other weight (int8: nor be scales of another group). */
static void test_layout(int type) {
    int wrong = 0;
    for (size_t c = 0; c < N_COLS; c++) {
        size_t cols = all_cols[c], bytes = panel_bytes(type, cols), group = type == TYPE_INT8 ? 64 : 1;
        float *w = calloc(LANES * cols, sizeof *w);
        int *owner = calloc(bytes, sizeof *owner), *shared = calloc(bytes, sizeof *shared);
        uint8_t *empty = malloc(bytes + 64), *p = malloc(bytes + 64);
        memset(empty, 0xAA, bytes + 64), memset(p, 0xAA, bytes + 64);
        panel_pack(type, w, LANES, cols, empty);
        for (size_t i = 0; i < LANES * cols; i++) {
            size_t changed = 0;
            int id = (int)(i / cols * 1000 + i % cols / group) + 1;
            w[i] = 0.7f;
            panel_pack(type, w, LANES, cols, p);
            w[i] = 0;
            for (size_t b = 0; b < bytes; b++) {
                if (p[b] == empty[b]) continue;
                changed++;
                if (type == TYPE_INT8 && b % 2112 < 64) {       /* a scale, of this group alone  */
                    wrong += shared[b] && shared[b] != id;
                    shared[b] = id;
                } else {
                    wrong += owner[b] || shared[b];
                    owner[b] = id;
                }
            }
            wrong += changed < 2 || changed > 3;
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
    CHECK_EQ(tensor_bytes(TYPE_F32, 3, 5), 60);
    CHECK_EQ(tensor_bytes(TYPE_INT8, 17, 64), 2 * (1024 + 64));
    CHECK_EQ(tensor_bytes(TYPE_BF16, 33, 2), 3 * 64);
    CHECK_EQ(tensor_bytes(TYPE_BF16, 16, 2), 64);
    CHECK(type_find("f32") == TYPE_F32 && type_find("bf16") == TYPE_BF16);
    CHECK(type_find("int8") == TYPE_INT8 && type_find("int") == -1 && type_find("") == -1);
    CHECK(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(16, 16) == 16);
    CHECK(round_up(4097, 4096) == 8192);
}

int main(void) {
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
    test_int8_panels();
    test_layout(TYPE_BF16);
    test_layout(TYPE_INT8);
    return report();
}
