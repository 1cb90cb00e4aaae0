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
#ifdef _WIN32
    SKIP("the C library's sinl is not exact near multiples of pi");
#else
    if (!CHECK(worst <= 3)) printf("    sin, cos: %.2f ulp\n", worst);
#endif
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

/* YaRN as transformers 5.23.0 computes it: AFM's numbers with both factors, and others, on a theta
 * whose powers torch rounds correctly (it does not always). */
#define AFM(factor) {.head_dim = 128, .rope_theta = 1e4, .rope_type = ROPE_YARN, \
                     .rope_factor = factor, .rope_original = 4096, .rope_beta_fast = 32, \
                     .rope_beta_slow = 1, .rope_truncate = true}
static const model_config afm16 = AFM(16), afm20 = AFM(20);
static const model_config yarn_uneven = {.head_dim = 64, .rope_theta = 1e5, .rope_type = ROPE_YARN,
                                         .rope_factor = 6.5, .rope_original = 300,
                                         .rope_beta_fast = 5, .rope_beta_slow = 0.5};
static const uint32_t bits_afm16[64] = {
    0x3f800000, 0x3f5dafd7, 0x3f3ff911, 0x3f263de0, 0x3f0ff59a, 0x3ef953cf, 0x3ed7e89b, 0x3ebaf81b,
    0x3ea1e89b, 0x3e8c3504, 0x3e72d423, 0x3e5247ed, 0x3e361887, 0x3e1db040, 0x3e088d77, 0x3dec7fd6,
    0x3dcccccd, 0x3db15978, 0x3d99940d, 0x3d84fe4d, 0x3d6655c2, 0x3d40450f, 0x3d204547, 0x3d056532,
    0x3cddb0b6, 0x3cb7e311, 0x3c983c21, 0x3c7b8744, 0x3c4f4f20, 0x3c2a6cc3, 0x3c0bb42d, 0x3be45015,
    0x3bb9e538, 0x3b96bf40, 0x3b735cd2, 0x3b4365df, 0x3b1beb49, 0x3af706a1, 0x3ac1fc4e, 0x3a96b9d5,
    0x3a6727db, 0x3a2e49c8, 0x3a00832d, 0x39b7c0d4, 0x397b0318, 0x391f24e4, 0x38aec98e, 0x38975c0e,
    0x3883126f, 0x386301e2, 0x3844948c, 0x382a3b44, 0x38136a16, 0x37ff4fac, 0x37dd1725, 0x37bf74d7,
    0x37a5cb60, 0x378f9272, 0x3778a815, 0x375753e4, 0x373a7753, 0x37217916, 0x370bd472, 0x36f22ce2,
};
static const uint32_t bits_afm20[64] = {
    0x3f800000, 0x3f5dafd7, 0x3f3ff911, 0x3f263de0, 0x3f0ff59a, 0x3ef953cf, 0x3ed7e89b, 0x3ebaf81b,
    0x3ea1e89b, 0x3e8c3504, 0x3e72d423, 0x3e5247ed, 0x3e361887, 0x3e1db040, 0x3e088d77, 0x3dec7fd6,
    0x3dcccccd, 0x3db15978, 0x3d99940d, 0x3d84fe4d, 0x3d6655c2, 0x3d402c82, 0x3d201ac3, 0x3d052df7,
    0x3cdd312d, 0x3cb75904, 0x3c97acad, 0x3c7a6567, 0x3c4e3041, 0x3c29554a, 0x3c0aa745, 0x3be24fca,
    0x3bb80143, 0x3b94f93c, 0x3b700e04, 0x3b405430, 0x3b19158d, 0x3af1cf27, 0x3abd33ce, 0x3a925a8c,
    0x3a5f2f4f, 0x3a270a63, 0x39f3dfed, 0x39abd91d, 0x39657f2b, 0x390bbc7d, 0x388bd471, 0x38722ce4,
    0x3851b717, 0x38359b1b, 0x381d43a3, 0x38082f69, 0x37ebdcf0, 0x37cc3fbc, 0x37b0df51, 0x37992a46,
    0x3784a2b3, 0x3765b71d, 0x3746ecdd, 0x372c431d, 0x37152c42, 0x37012dab, 0x36dfba4f, 0x36c1bd81,
};
static const uint32_t bits_yarn_uneven[32] = {
    0x3f800000, 0x3f32a506, 0x3ef953cf, 0x3eadfcff, 0x3e72d423, 0x3e297409, 0x3dec7fd6, 0x3d9525d0,
    0x3d31b4ec, 0x3ccd8433, 0x3c63834a, 0x3beabe16, 0x3b541397, 0x3abba62d, 0x3a82f283, 0x3a36c212,
    0x39ff117f, 0x39b1fe97, 0x39786b84, 0x392d5ae6, 0x38f1f1e7, 0x38a8d62a, 0x386ba37f, 0x38246f95,
    0x37e57f2c, 0x37a0265d, 0x375f83d3, 0x371bf9bd, 0x36d9b065, 0x3697e8fa, 0x365403d5, 0x3613f357,
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
    CHECK_EQ(differing(&afm16, bits_afm16), 0);
    CHECK_EQ(differing(&afm20, bits_afm20), 0);
    CHECK_EQ(differing(&yarn_uneven, bits_yarn_uneven), 0);
    model_config apertus = llama31;                     /* the same scaling on another base      */
    apertus.rope_theta = 1.2e7;
    rope_frequencies(&apertus, f);
    CHECK(fabs((double)f[20] / 6.134170748e-03 - 1) < 1e-6);
    CHECK(fabs((double)f[23] / 2.627920959e-03 - 1) < 1e-6);
    CHECK(fabs((double)f[28] / 1.098536628e-04 - 1) < 1e-6);
    CHECK(fabs((double)f[63] / 1.343819609e-08 - 1) < 1e-6);
    static const struct { int i; double f16, f20; } yarn[] = {
        {0, 1, 1}, {20, 5.623413252e-02, 5.623413252e-02}, {21, 4.694086000e-02, 4.691744810e-02},
        {30, 8.526843773e-03, 8.462732166e-03}, {40, 8.817889629e-04, 8.513824470e-04},
        {46, 8.334508951e-05, 6.667607161e-05}, {47, 7.217387404e-05, 5.773909923e-05},
        {63, 7.217387404e-06, 5.773909923e-06}};
    float g[64];
    rope_frequencies(&afm16, f), rope_frequencies(&afm20, g);
    for (size_t i = 0; i < sizeof yarn / sizeof *yarn; i++) {
        CHECK(fabs((double)f[yarn[i].i] / yarn[i].f16 - 1) < 1e-6);
        CHECK(fabs((double)g[yarn[i].i] / yarn[i].f20 - 1) < 1e-6);
    }
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

static const field config_changes[] = {
    {"vocab_size", "1000"}, {"hidden_size", "64"}, {"n_layers", "2"}, {"n_heads", "4"},
    {"n_kv_heads", "2"}, {"head_dim", "16"}, {"ffn_size", "128"}, {"max_positions", "131072"},
    {"norm_eps", "1e-05"}, {"activation", "\"silu\""}, {"tied", "true"}, {"rope_theta", "500000"},
    {"rope_scaling", "{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
                     "\"high_freq_factor\":4,\"original_max_positions\":8192}"},
};
enum { N_FIELDS = sizeof config_changes / sizeof *config_changes };

/* Reads a config in which KEY has this value; NULL: the field is left out. */
static int read_with(const char *key, const char *value, model_config *c, medrun_error *e) {
    buffer b = {0};
    model_file f = {.path = "x.mdr"};
    buffer_text(&b, "{\"config\":{");
    bool used = false;
    int n = 0;
    for (int i = 0; i < N_FIELDS; i++) {
        bool this = key && !strcmp(key, config_changes[i].key);
        const char *v = this ? value : config_changes[i].value;
        if (v) buffer_printf(&b, "%s\"%s\":%s", n++ ? "," : "", config_changes[i].key, v);
        used |= this;
    }
    if (key && value && !used) buffer_printf(&b, ",\"%s\":%s", key, value);   /* one more field */
    buffer_text(&b, "}}");
    *c = (model_config){0}, *e = (medrun_error){0};
    int code = json_parse(&f.header, (const char *)b.data, b.n, e);
    if (!code) code = read_config(&f, c, e);
    json_free(&f.header);
    buffer_free(&b);
    return code;
}

#define YARN(factor, truncate) "{\"type\":\"yarn\",\"factor\":" factor ",\"original_max_positions\":" \
    "4096,\"beta_fast\":32,\"beta_slow\":1,\"attention_factor\":1.25,\"truncate\":" truncate "}"
#define DIVISORS(list) "{\"type\":\"divisors\",\"divisors\":[" list "]}"

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

    CHECK(c.sliding_window == 0 && !c.qk_norm && c.activation == ACTIVATION_SILU);
    CHECK_EQ(read_with("sliding_window", "4096", &c, &e), MEDRUN_OK);
    CHECK_EQ(c.sliding_window, 4096);
    CHECK_EQ(read_with("qk_norm", "true", &c, &e), MEDRUN_OK);
    CHECK(c.qk_norm);
    CHECK_EQ(read_with("activation", "\"relu2\"", &c, &e), MEDRUN_OK);
    CHECK_EQ(c.activation, ACTIVATION_RELU2);
    CHECK_EQ(read_with("activation", "\"xielu\"", &c, &e), MEDRUN_OK);
    CHECK_EQ(c.activation, ACTIVATION_XIELU);
    CHECK_EQ(read_with("rope_scaling", YARN("20", "true"), &c, &e), MEDRUN_OK);
    CHECK(c.rope_type == ROPE_YARN && c.rope_factor == 20 && c.rope_original == 4096);
    CHECK(c.rope_beta_fast == 32 && c.rope_beta_slow == 1 && c.rope_attention == 1.25);
    CHECK(c.rope_truncate);
    CHECK_EQ(read_with("rope_scaling", DIVISORS("1,1,2,4,8,8,8,8"), &c, &e), MEDRUN_OK);
    float f[8];
    rope_frequencies(&c, f);
    CHECK(c.rope_type == ROPE_DIVISORS && f[0] == 1);
    for (int i = 0; i < 8; i++) {
        model_config plain = {.head_dim = 16, .rope_theta = 5e5};
        float g[8];
        rope_frequencies(&plain, g);
        CHECK(f[i] == g[i] / c.rope_divisors[i]);
    }

    static const field bad[] = {
        {"sliding_window", "-1"}, {"sliding_window", "1.5"}, {"sliding_window", "\"all\""},
        {"sliding_window", "16777217"}, {"qk_norm", "1"}, {"activation", "\"swiglu\""},
        {"rope_scaling", YARN("0.5", "true")}, {"rope_scaling", YARN("20", "1")},
        {"rope_scaling", "{\"type\":\"yarn\",\"factor\":20}"},
        {"rope_scaling", "{\"type\":\"divisors\"}"}, {"rope_scaling", DIVISORS("1,1,2,4,8,8,8")},
        {"rope_scaling", DIVISORS("1,1,2,4,8,8,8,8,8")},
        {"rope_scaling", DIVISORS("1,1,2,4,8,8,8,0")},
        {"rope_scaling", DIVISORS("1,1,2,4,8,8,8,\"8\"")},
        {"rope_scaling", DIVISORS("1,1,2,4,8,8,[8],8")}, {"rope_theta", "1"},
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
        int code = read_with(config_changes[i].key, NULL, &c, &e);
        if (!CHECK(code == MEDRUN_BAD_FILE && e.text[0])) printf("    %s\n", config_changes[i].key);
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
