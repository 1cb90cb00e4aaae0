/* Tests of section 12: its mathematics against long double and transformers, and the config. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

/* ---- functions ----------------------------------------------------------------------------- */

static double ulps(double got, long double exact) {
    return (double)(fabsl((long double)got - exact) / ldexpl(1, ilogbl(exact) - 52));
}

static double uniform(void) { return (double)test_random() / 0x1p63 - 1; }

static void test_ln(void) {
    double worst = 0;
    for (int i = 0; i < 400000; i++) {
        double x = i % 3 == 0 ? exp(uniform() * 700) : i % 3 == 1 ? 1 + uniform() * 0.4 :
                   1 + ldexp(uniform(), -(int)(test_random() % 52));
        if (x == 1) continue;
        double off = ulps(ln_exact(x), logl((long double)x));
        if (off > worst) worst = off;
    }
    if (!CHECK(worst <= 3)) printf("    ln: %.2f ulp\n", worst);
    CHECK(ln_exact(1) == 0);
    CHECK(ln_exact(0x1p-1022) < -708.39 && ln_exact(DBL_MAX) > 709.78);
    for (int k = -1000; k <= 1000; k += 125)
        if (k && !CHECK(ulps(ln_exact(ldexp(1, k)), k * 0.693147180559945309417232L) <= 1))
            printf("    ln 2^%d\n", k);
}

static void test_exp(void) {
    double worst = 0;
    for (int i = 0; i < 400000; i++) {
        double x = i % 2 ? uniform() * 700 : ldexp(uniform(), 2 - (int)(test_random() % 60));
        double off = ulps(exp_exact(x), expl((long double)x));
        if (off > worst) worst = off;
    }
    if (!CHECK(worst <= 2)) printf("    exp: %.2f ulp\n", worst);
    CHECK(exp_exact(0) == 1 && exp_exact(-0.0) == 1);
    CHECK(exp_exact(-700) > 0 && exp_exact(699.9) < DBL_MAX);
}

typedef struct { double sine, cosine; } pair;

static pair sin_cos_pair(double x) {
    pair p;
    sin_cos(x, &p.sine, &p.cosine);
    return p;
}

static double wrong_angle(double x) {
    pair p = sin_cos_pair(x);
    double s = x == 0 ? 0 : ulps(p.sine, sinl((long double)x));
    double c = ulps(p.cosine, cosl((long double)x));
    return s > c ? s : c;
}

/* Angles as the rotation makes them: a position times a frequency, rounded to float. */
static void test_sin_cos(void) {
    double worst = 0, farthest = 0;
    for (int i = 0; i < 64; i++) {
        float f = powf(5e5f, -(float)i / 64);
        for (int position = i % 11; position <= 131072; position += 11) {
            double off = wrong_angle((double)((float)position * f));
            if (off > worst) worst = off;
        }
    }
    for (int n = 0; n < 83443; n++) {                   /* the floats nearest to n pi / 2 / 2    */
        float x = (float)((double)n * 0.78539816339744831);
        for (int k = 0; k < 3; k++, x = nextafterf(x, INFINITY)) {
            double off = wrong_angle((double)x);
            if (off > worst) worst = off;
        }
    }
    if (!CHECK(worst <= 3)) printf("    sin, cos: %.2f ulp\n", worst);
    CHECK(sin_cos_pair(0).sine == 0 && sin_cos_pair(0).cosine == 1);

    int odd = 0;
    for (int i = 0; i < 200000; i++) {                  /* to the longest context that is allowed */
        double x = (double)(float)(uniform() * 0x1p24);
        pair p = sin_cos_pair(x), m = sin_cos_pair(-x);
        double off = fmax(fabs(p.sine - (double)sinl((long double)x)),
                          fabs(p.cosine - (double)cosl((long double)x)));
        if (off > farthest) farthest = off;
        odd += fabs(p.sine + m.sine) > 2e-9 || fabs(p.cosine - m.cosine) > 2e-9;
    }
    if (!CHECK(farthest <= 0x1p-29)) printf("    sin, cos to 2^24: %.3g\n", farthest);
    CHECK_EQ(odd, 0);
}

/* ---- rotary frequencies -------------------------------------------------------------------- */

static const model_config llama31 = {.head_dim = 128, .rope_theta = 5e5, .rope_type = ROPE_LLAMA3,
                                     .rope_factor = 8, .rope_low = 1, .rope_high = 4,
                                     .rope_original = 8192};
static const model_config llama32 = {.head_dim = 64, .rope_theta = 5e5, .rope_type = ROPE_LLAMA3,
                                     .rope_factor = 32, .rope_low = 1, .rope_high = 4,
                                     .rope_original = 8192};

/* inv_freq of transformers 5.23.0's LlamaRotaryEmbedding with torch 2.13.0, as bits. */
static const uint32_t bits_llama31[64] = {
    0x3f800000, 0x3f508ac1, 0x3f29e1c6, 0x3f0a6384, 0x3ee177bc, 0x3eb7ab7d, 0x3e959ee3, 0x3e73c461,
    0x3e4693b0, 0x3e21c3a0, 0x3e03c6a0, 0x3dd6b19c, 0x3daee4ad, 0x3d8e7898, 0x3d681e67, 0x3d3d1684,
    0x3d1a08c8, 0x3cfaf53f, 0x3ccc6f49, 0x3ca68939, 0x3c87a9c3, 0x3c5d06ec, 0x3c340d6d, 0x3c12ac7f,
    0x3beef74f, 0x3bc2aa76, 0x3b9e9402, 0x3b812e35, 0x3b527720, 0x3b0dfd06, 0x3ab3d11d, 0x3a60979e,
    0x3a0995d2, 0x39a3f108, 0x393b2dd2, 0x38c86886, 0x38a3418d, 0x3884fdbf, 0x3858ac81, 0x38308199,
    0x380fc8f8, 0x37ea426f, 0x37bed4f4, 0x379b7475, 0x377d45c3, 0x374e51f5, 0x3728126b, 0x3708ea0f,
    0x36df10c4, 0x36b5b687, 0x369406cb, 0x36712b80, 0x36447610, 0x36200a69, 0x36025f34, 0x35d46808,
    0x35ad07a7, 0x358cf400, 0x3565a54d, 0x353b12c7, 0x351864a7, 0x34f848c2, 0x34ca41b0, 0x34a4c2ff,
};
static const uint32_t bits_llama32[32] = {
    0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3daee4ad, 0x3d681e67,
    0x3d1a08c8, 0x3ccc6f49, 0x3c87a9c3, 0x3c340d6d, 0x3beef74f, 0x3b9e9402, 0x3b527720, 0x3aa9279b,
    0x39e13620, 0x38cb98f7, 0x37a3418d, 0x3758ac81, 0x370fc8f8, 0x36bed4f4, 0x367d45c3, 0x3628126b,
    0x35df10c4, 0x359406cb, 0x35447610, 0x35025f34, 0x34ad07a7, 0x3465a54d, 0x341864a7, 0x33ca41b0,
};
/* Numbers that are no powers of two, so that the order of the roundings shows. */
static const model_config uneven = {.head_dim = 64, .rope_theta = 5e5, .rope_type = ROPE_LLAMA3,
                                    .rope_factor = 5, .rope_low = 1.5, .rope_high = 6,
                                    .rope_original = 4096};
static const uint32_t bits_uneven[32] = {
    0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3daee4ad, 0x3d681e67,
    0x3d1a08c8, 0x3ccc6f49, 0x3c87a9c3, 0x3c340d6d, 0x3bba0927, 0x3b1cbc30, 0x3a809a0e, 0x39df76ce,
    0x39944a81, 0x3944cfee, 0x39029ad7, 0x38ad56ce, 0x38660e5a, 0x3818aa5d, 0x37ca9e36, 0x37867522,
    0x373273d0, 0x36ecd7ab, 0x369d2b40, 0x36509853, 0x360a6c86, 0x35b7b771, 0x3573d43e, 0x3521ce26,
};

static int differing(const model_config *c, const uint32_t *bits) {
    float f[512];
    int wrong = 0;
    rope_frequencies(c, f);
    for (int i = 0; i < c->head_dim / 2; i++) wrong += float_bits(f[i]) != bits[i];
    return wrong;
}

static void test_frequencies_scaled(void) {
    static const struct { int i; double f; } golden[] = {
        {0, 1}, {20, 1.656044008e-02}, {29, 2.166570764e-03}, {34, 1.785078128e-04},
        {40, 3.428102196e-05}, {63, 3.068925989e-07},
    };
    float f[64];
    rope_frequencies(&llama31, f);
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++)
        CHECK(fabs((double)f[golden[i].i] / golden[i].f - 1) < 1e-6);
    CHECK_EQ(differing(&llama31, bits_llama31), 0);
    CHECK_EQ(differing(&llama32, bits_llama32), 0);
    CHECK_EQ(differing(&uneven, bits_uneven), 0);
    model_config apertus = llama31;                     /* the same scaling on another base      */
    apertus.rope_theta = 1.2e7;
    rope_frequencies(&apertus, f);
    CHECK(fabs((double)f[20] / 6.134170748e-03 - 1) < 1e-6);
    CHECK(fabs((double)f[23] / 2.627920959e-03 - 1) < 1e-6);
    CHECK(fabs((double)f[28] / 1.098536628e-04 - 1) < 1e-6);
    CHECK(fabs((double)f[63] / 1.343819609e-08 - 1) < 1e-6);
}

/* theta^(-2i/d): the exponent, the power and the reciprocal are rounded to float. */
static void test_frequencies_plain(void) {
    static const double thetas[] = {1, 1e4, 5e5, 1e6, 1.2e7, 1e12};
    int wrong = 0;
    for (size_t t = 0; t < sizeof thetas / sizeof *thetas; t++)
        for (int dim = 16; dim <= 1024; dim += dim < 128 ? 16 : 224) {
            model_config c = {.head_dim = dim, .rope_theta = thetas[t]};
            float f[513];
            f[dim / 2] = -1;
            rope_frequencies(&c, f);
            for (int i = 0; i < dim / 2; i++) {
                long double exponent = 2.0L * i / dim;
                long double exact = powl((long double)thetas[t], -exponent);
                double bound = 0x1p-24 * (2.1 + (double)exponent * log(thetas[t]));
                wrong += !(fabs((double)((long double)f[i] / exact - 1)) <= bound);
            }
            wrong += f[dim / 2] != -1 || f[0] != 1;
        }
    CHECK_EQ(wrong, 0);
}

/* ---- the config ---------------------------------------------------------------------------- */

typedef struct { const char *key, *value; } field;

static const field config_fields[] = {
    {"vocab_size", "1000"}, {"hidden_size", "64"}, {"n_layers", "2"}, {"n_heads", "4"},
    {"n_kv_heads", "2"}, {"head_dim", "16"}, {"ffn_size", "128"}, {"max_positions", "131072"},
    {"norm_eps", "1e-05"}, {"activation", "\"silu\""}, {"tied", "true"}, {"rope_theta", "500000"},
    {"rope_scaling", "{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
                     "\"high_freq_factor\":4,\"original_max_positions\":8192}"},
};
enum { N_FIELDS = sizeof config_fields / sizeof *config_fields };

/* Reads a config in which KEY has this value; NULL: the field is left out. */
static int read_with(const char *key, const char *value, model_config *c, medrun_error *e) {
    buffer b = {0};
    model_file f = {.path = "x.mdr"};
    buffer_text(&b, "{\"config\":{");
    for (int i = 0, n = 0; i < N_FIELDS; i++) {
        bool this = key && !strcmp(key, config_fields[i].key);
        const char *v = this ? value : config_fields[i].value;
        if (v) buffer_printf(&b, "%s\"%s\":%s", n++ ? "," : "", config_fields[i].key, v);
    }
    buffer_text(&b, "}}");
    *c = (model_config){0}, *e = (medrun_error){0};
    int code = json_parse(&f.header, (const char *)b.data, b.n, e);
    if (!code) code = read_config(&f, c, e);
    json_free(&f.header);
    buffer_free(&b);
    return code;
}

static void test_config(void) {
    model_config c;
    medrun_error e;
    CHECK_EQ(read_with(NULL, NULL, &c, &e), MEDRUN_OK);
    CHECK(c.vocab_size == 1000 && c.hidden_size == 64 && c.n_layers == 2 && c.n_heads == 4);
    CHECK(c.n_kv_heads == 2 && c.head_dim == 16 && c.ffn_size == 128 && c.max_positions == 131072);
    CHECK(c.norm_eps == 1e-5f && c.tied && c.rope_theta == 5e5 && c.rope_type == ROPE_LLAMA3);
    CHECK(c.rope_factor == 8 && c.rope_low == 1 && c.rope_high == 4 && c.rope_original == 8192);
    CHECK_EQ(read_with("tied", "false", &c, &e), MEDRUN_OK);
    CHECK(!c.tied);
    CHECK_EQ(read_with("rope_scaling", "{\"type\":\"none\"}", &c, &e), MEDRUN_OK);
    CHECK_EQ(c.rope_type, ROPE_NONE);

    static const field bad[] = {
        {"vocab_size", "0"}, {"vocab_size", "4194305"}, {"vocab_size", "1000.5"},
        {"hidden_size", "65"}, {"hidden_size", "0"}, {"hidden_size", "65552"}, {"n_layers", "0"},
        {"n_layers", "1025"}, {"n_heads", "0"}, {"n_heads", "3"}, {"n_heads", "1025"},
        {"n_kv_heads", "0"}, {"n_kv_heads", "8"}, {"head_dim", "24"}, {"head_dim", "1040"},
        {"head_dim", "-16"}, {"ffn_size", "100"}, {"ffn_size", "1048592"}, {"max_positions", "0"},
        {"max_positions", "16777217"}, {"norm_eps", "0"}, {"norm_eps", "2"}, {"norm_eps", "\"x\""},
        {"activation", "\"gelu\""}, {"activation", "1"}, {"tied", "1"}, {"rope_theta", "0"},
        {"rope_theta", "1e999"}, {"rope_scaling", "{}"},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":8,\"low_freq_factor\":1,"
                         "\"high_freq_factor\":4,\"original_max_positions\":8192}"},
        {"rope_scaling", "\"none\""}, {"rope_scaling", "{\"type\":\"llama3\"}"},
        {"rope_scaling", "{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
                         "\"high_freq_factor\":4,\"original_max_positions\":8192}"},
        {"rope_scaling", "{\"type\":\"llama3\",\"factor\":0,\"low_freq_factor\":1,"
                         "\"high_freq_factor\":4,\"original_max_positions\":8192}"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int code = read_with(bad[i].key, bad[i].value, &c, &e);
        if (!CHECK(code == MEDRUN_BAD_FILE && e.code == code && strstr(e.text, "x.mdr: ") == e.text))
            printf("    %s %s: %s\n", bad[i].key, bad[i].value, e.text);
    }
    for (int i = 0; i < N_FIELDS; i++) {
        int code = read_with(config_fields[i].key, NULL, &c, &e);
        if (!CHECK(code == MEDRUN_BAD_FILE && e.text[0])) printf("    %s\n", config_fields[i].key);
    }
}

int main(void) {
    if (LDBL_MANT_DIG >= 64) {
        test_ln();
        test_exp();
        test_sin_cos();
    } else SKIP("long double is no longer than double here: ln, exp, sin and cos");
    test_frequencies_scaled();
    test_frequencies_plain();
    test_config();
    return report();
}
