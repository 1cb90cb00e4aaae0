/* Tests of section 6: every kernel set this machine can run, bit for bit against the scalar pass,
 * and the scalar pass against double precision. */
#define MEDRUN_NO_MAIN
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#include "../tools/export_int4.c"
#include "test.h"

static const kernel_set *sets[N_KERNEL_SETS];
static int n_sets;
static const kernel_set *const scalar = &kernel_row_scalar;

static const double UNIT = 0x1p-24;         /* what one rounding to float can change, relatively */

static void *need(size_t n) {
    void *p = malloc(n ? n : 1);
    if (!p) printf("out of memory\n"), exit(1);
    return p;
}

/* Bit for bit, but any NaN is like any other. */
static int differences(const float *a, const float *b, size_t n) {
    int wrong = 0;
    for (size_t i = 0; i < n; i++)
        wrong += float_bits(a[i]) != float_bits(b[i]) && !(isnan(a[i]) && isnan(b[i]));
    return wrong;
}

static float uniform(void) { return (float)((double)test_random() / 0x1p63 - 1); }

enum { STYLES = 10 };

/* Activations and weights of every kind. Most styles change from group to group of 64. */
static float random_value(int style, size_t k) {
    float f = uniform();
    switch (style) {
        case 0: return f;
        case 1: return f * f * f * 30;
        case 2: return test_random() & 1 ? 0.0f : -0.0f;
        case 3: return f * 1e-39f;                      /* subnormal                             */
        case 4: return f * 1e30f;
        case 5: return k / 64 % 2 ? f * 3e-30f : f;     /* groups around what counts as nothing  */
        case 6: return k / 64 % 2 ? 0 : k % 64 == 5 ? 1e10f : f;
        case 7: return f > 0 ? 1.0f : -1.0f;
        case 8: return -2.5f;                           /* all -127                              */
        default: return (float)((int)(test_random() % 255) - 127) / 2.0f;       /* ties          */
    }
}

/* ---- matmul -------------------------------------------------------------------------------- */

typedef struct {
    int kind, type;
    size_t tokens, panels, cols, x_stride, out_stride;
    float *x;                                   /* (tokens, x_stride)                            */
    uint8_t *w, *w_memory;                      /* panels, at an odd address                     */
    uint8_t *stream;                            /* x packed by the scalar pass                   */
    float *out;                                 /* (tokens, out_stride) by the scalar pass       */
} problem;

static size_t packed_size(const problem *m, size_t tokens) {
    return pack_bytes(m->kind, m->cols, tokens);
}

static problem make_problem(int kind, int type, size_t tokens, size_t panels, size_t cols,
                            int style) {
    problem m = {kind, type, tokens, panels, cols,
                 cols + test_random() % 20, panels * 16 + test_random() % 20, NULL, NULL, NULL, NULL,
                 NULL};
    size_t bytes = panel_bytes(m.type, cols);
    float *rows = need(16 * cols * sizeof *rows);
    m.x = need(((tokens - 1) * m.x_stride + cols) * sizeof *m.x);
    for (size_t t = 0; t < tokens; t++)
        for (size_t k = 0; k < m.x_stride && t * m.x_stride + k < (tokens - 1) * m.x_stride + cols; k++)
            m.x[t * m.x_stride + k] = k < cols ? random_value(style, k + 64 * t) : NAN;
    m.w_memory = need(panels * bytes + 1);
    m.w = m.w_memory + 1;
    for (size_t p = 0; p < panels; p++) {
        int w_style = style == 8 ? 8 : style == 4 ? 0 : (int)(test_random() % 8);
        for (size_t i = 0; i < 16 * cols; i++)
            rows[i] = (style == 8 ? -1.0f : 1.0f) * random_value(w_style == 4 ? 1 : w_style, i % cols);
        for (size_t i = 0; type == TYPE_INT4 && i < 16 * cols; i++)
            rows[i] = fmaxf(-INT4_LARGEST, fminf(INT4_LARGEST, rows[i]));
        store_rows(sets[0], m.type, rows, 16, cols, m.w + p * bytes);
    }
    free(rows);
    return m;
}

static void free_problem(problem *m) {
    free(m->x), free(m->w_memory), free(m->stream), free(m->out);
}

/* Packs and multiplies tokens [t, t + n) and panels [p, p + np) alone. OUT holds a guard. */
static uint8_t *run_part(const kernel_set *k, const problem *m, size_t t, size_t n, size_t p,
                         size_t np, float *out) {
    int kind = m->kind == PACK_INT8 ? k->int_pack : m->kind;
    uint8_t *stream = need(pack_bytes(kind, m->cols, n));
    k->pack(kind, m->type == TYPE_INT8, m->x + t * m->x_stride, m->x_stride, m->cols, n, stream);
    static const size_t some[] = {128, SIZE_MAX, 256, 384};         /* must not matter           */
    static size_t turn;
    size_t columns = some[turn++ % 4];
    uint8_t *block = need((columns < m->cols ? columns : round_up(m->cols, 128)) * BLOCK_BYTES);
    matmul_of(k, m->type, m->kind)(&(matmul_part){
        m->w + p * panel_bytes(m->type, m->cols), stream, np, m->cols, n, columns, block,
        out + t * m->out_stride + 16 * p, m->out_stride});
    free(block);
    return stream;
}

static const float GUARD = 12345.678f;

static float *guarded(const problem *m) {
    float *out = need(m->tokens * m->out_stride * sizeof *out);
    for (size_t i = 0; i < m->tokens * m->out_stride; i++) out[i] = GUARD;
    return out;
}

/* Where token T's words stand: the tile it is in, and its place there. */
static const uint8_t *tile_of(const problem *m, size_t t, size_t *width, size_t *place) {
    size_t first = t / 8 * 8, left = m->tokens - first, w = 8;
    while (w / 2 >= left) w /= 2;
    *width = w, *place = t - first;
    return m->stream + packed_size(m, first);
}

/* The activation the packed stream stands for, read as the comment above PACK_F32 says. */
static double packed_value(const problem *m, size_t t, size_t k, int *q, float *scale,
                           int32_t sum[2]) {
    size_t width, place;
    const uint8_t *tile = tile_of(m, t, &width, &place);
    uint16_t h;
    if (m->kind == PACK_F32) return (double)load_float(tile + 4 * (k * width + place));
    if (m->kind == PACK_BF16) {
        memcpy(&h, tile + 4 * (k / 2 * width + place) + 2 * (k % 2), 2);
        return (double)bf16_to_f32(h);
    }
    const uint8_t *group = tile + k / 64 * width * (64 + 12);
    memcpy(&sum[0], group + 4 * place, 4);
    memcpy(&sum[1], group + 4 * (width + place), 4);
    memcpy(scale, group + 4 * (2 * width + place), 4);
    *q = (int8_t)group[4 * ((3 + k % 64 / 4) * width + place) + k % 4];
    return (double)*q * (double)*scale;
}

/* A token as it is rounded: turned, where whole numbers are made of it. The caller frees it. */
static float *token_of(const problem *m, size_t t) {
    float *x = need(m->cols * sizeof *x);
    memcpy(x, m->x + t * m->x_stride, m->cols * sizeof *x);
    if (m->type == TYPE_INT8) turn_row(x, m->cols);
    return x;
}

/* Is the stream of the scalar pass what its comment says? */
static int wrong_stream(const problem *m) {
    int wrong = 0, q;
    float scale, *token = NULL;
    int32_t sum[2];
    for (size_t t = 0; t < m->tokens; free(token), t++)
        for (size_t k = 0; k < m->cols; k++) {
            if (k == 0) token = token_of(m, t);
            float x = token[k];
            double v = packed_value(m, t, k, &q, &scale, sum);
            if (m->kind == PACK_F32) wrong += float_bits((float)v) != float_bits(x);
            if (m->kind == PACK_BF16) wrong += float_bits((float)v) !=
                                               float_bits(bf16_to_f32(f32_to_bf16(x)));
            if (m->kind != PACK_INT8) continue;
            float largest = 0;
            int32_t q_sum[2] = {0};
            size_t first = k / 64 * 64, end = first + 64 < m->cols ? first + 64 : m->cols;
            for (size_t i = first; i < end; i++)
                largest = fmaxf(largest, fabsf(token[i]));
            for (size_t i = first; k == first && i < first + 64; i++) {
                int32_t ignored[2];
                packed_value(m, t, i, &q, &scale, ignored);
                q_sum[(i - first) / 32] += q;
                wrong += i >= m->cols && q != 0;
            }
            for (int h = 0; h < 2; h++) wrong += k == first && sum[h] != -128 * q_sum[h];
            packed_value(m, t, k, &q, &scale, sum);
            wrong += scale != (largest < 1e-30f ? 0 : largest / 127.0f) || q < -127;
            if (scale > 0)
                wrong += fabs((double)x - v) > (double)scale * (0.5 + 127 * 4 * UNIT);
            else wrong += q != 0;
        }
    return wrong;
}

/* Does PACK_INT16 hold the numbers of the PACK_INT8 stream, for all tokens of one tile? */
static int wrong_int16(const uint8_t *int8, const uint8_t *int16, size_t cols, size_t wide) {
    int wrong = 0;
    for (size_t k = 0; k < cols; k += 64, int8 += wide * 76, int16 += wide * 140) {
        wrong += memcmp(int8, int16, 12 * wide) != 0;
        for (size_t i = 0; i < 64; i++)
            for (size_t t = 0; t < wide; t++) {
                int16_t q;
                size_t word = i / 4 * 2 + i % 2;        /* 0 and 2 of four, then 1 and 3         */
                memcpy(&q, int16 + 12 * wide + 4 * (word * wide + t) + i % 4 / 2 * 2, 2);
                wrong += q != (int8_t)int8[12 * wide + 4 * (i / 4 * wide + t) + i % 4];
            }
    }
    return wrong;
}

/* K's packing of integers in both forms, against the scalar pass. */
static int wrong_pack(const kernel_set *k, const problem *m) {
    size_t size = pack_bytes(PACK_INT16, m->cols, m->tokens);
    uint8_t *mine = calloc(1, size), *its = calloc(1, size);
    k->pack(PACK_INT8, m->type == TYPE_INT8, m->x, m->x_stride, m->cols, m->tokens, mine);
    int wrong = memcmp(mine, m->stream, packed_size(m, m->tokens)) != 0;
    k->pack(PACK_INT16, m->type == TYPE_INT8, m->x, m->x_stride, m->cols, m->tokens, mine);
    scalar->pack(PACK_INT16, m->type == TYPE_INT8, m->x, m->x_stride, m->cols, m->tokens, its);
    wrong += memcmp(mine, its, size) != 0;
    for (size_t t = 0, wide; t < m->tokens; t += wide) {
        wide = tile_width(m->tokens - t);
        wrong += wrong_int16(m->stream + pack_bytes(PACK_INT8, m->cols, t),
                             its + pack_bytes(PACK_INT16, m->cols, t), m->cols, wide);
    }
    free(mine), free(its);
    return wrong;
}

/* Every output against the sum in double precision of what the bytes stand for. A chain of n fused
 * multiply-adds is off by at most n roundings of the sum of magnitudes; for int8 that holds group
 * by group (the dot product is exact, the product of the scales is rounded once). The bf16 dot
 * instruction takes subnormal numbers for zeros. */
static int beyond_bound(const problem *m, const float *out) {
    int wrong = 0, q;
    int32_t sum[2];
    double *x = need(m->tokens * m->cols * sizeof *x), *step = need(m->tokens * m->cols * sizeof *x);
    float **token = need(m->tokens * sizeof *token);
    for (size_t t = 0; t < m->tokens; t++) token[t] = token_of(m, t);
    float *row = need(m->cols * sizeof *row), scale = 0;
    for (size_t i = 0; i < m->tokens * m->cols; i++) {
        x[i] = packed_value(m, i / m->cols, i % m->cols, &q, &scale, sum);
        step[i] = m->kind == PACK_INT8 ? (double)scale / 2 * (1 + 1e-4) : 0;
    }
    size_t links = m->kind == PACK_INT8 ? (m->cols + 63) / 64 * 3 + 2 : m->cols + 2;
    for (size_t r = 0; r < m->panels * 16; r++) {
        panel_unpack_row(m->type, m->w + r / 16 * panel_bytes(m->type, m->cols), r % 16, m->cols, row);
        for (size_t k = 0; m->type == TYPE_INT8 && k < m->cols; k++) {      /* as it is stored   */
            const uint8_t *panel = m->w + r / 16 * panel_bytes(m->type, m->cols);
            row[k] = (float)stored_int(m->type, panel, r % 16, k) *
                     stored_scale(m->type, panel, r % 16, k);
        }
        for (size_t t = 0; t < m->tokens; t++) {
            double exact = 0, size = 0, plain = 0, coarse = 0, flushed = (double)m->cols;
            for (size_t k = 0; k < m->cols; k++) {
                double w = (double)row[k], xk = x[t * m->cols + k];
                exact += w * xk, size += fabs(w * xk);
                plain += w * (double)token[t][k];
                coarse += fabs(w) * step[t * m->cols + k];
                if (m->kind == PACK_BF16) flushed += fabs(w) + fabs(xk);
            }
            double got = (double)out[t * m->out_stride + r];
            double bound = (double)links * UNIT * size * 1.01 + flushed * 0x1p-125;
            wrong += !(fabs(got - exact) <= bound);
            if (m->kind == PACK_INT8)                   /* and quantising moved each x half a step */
                wrong += !(fabs(got - plain) <= bound + coarse + (double)m->cols * 1e-29);
        }
    }
    for (size_t t = 0; t < m->tokens; t++) free(token[t]);
    free(x), free(step), free(row), free(token);
    return wrong;
}

/* OUT is SCALAR_OUT between the guards, which are whole. */
static int wrong_rows(const problem *m, const float *out, const float *wanted) {
    int wrong = 0;
    for (size_t t = 0; t < m->tokens; t++) {
        const float *row = out + t * m->out_stride;
        wrong += differences(row, wanted + t * m->out_stride, m->panels * 16);
        for (size_t i = m->panels * 16; i < m->out_stride; i++) wrong += row[i] != GUARD;
    }
    return wrong;
}

/* All of a set's matmul of one kind. The scalar pass also against doubles. */
static int wrong_matmul(const kernel_set *k, problem *m) {
    int wrong = 0;
    float *out = guarded(m), *parts = guarded(m);
    uint8_t *stream = run_part(k, m, 0, m->tokens, 0, m->panels, out);
    bool own = k == scalar || m->kind == PACK_BF16;     /* no scalar pass of the bf16 dot        */
    if (own) {
        free(m->stream), free(m->out);
        m->stream = stream, m->out = out;
        wrong += wrong_stream(m) + beyond_bound(m, out);
    } else if (m->kind == PACK_INT8) {
        wrong += wrong_pack(k, m);
    } else {
        wrong += memcmp(stream, m->stream, packed_size(m, m->tokens)) != 0;
    }
    wrong += wrong_rows(m, out, m->out);
    if (m->kind != PACK_BF16) {                         /* as section 5 defines it               */
        plain_matmul(m->type, m->w, m->panels * 16, m->cols, m->x, m->x_stride, m->tokens, parts,
                     m->out_stride);
        wrong += wrong_rows(m, out, parts);
    }
    for (size_t t = 0; t < m->tokens; t++)              /* each token alone                      */
        free(run_part(k, m, t, 1, 0, m->panels, parts));
    wrong += wrong_rows(m, parts, m->out);
    size_t cut = m->tokens / 3, split = m->panels / 2;  /* in four uneven parts                  */
    for (size_t i = 0; i < m->tokens * m->out_stride; i++) parts[i] = GUARD;
    for (int part = 0; part < 4; part++) {
        size_t t = part & 1 ? cut : 0, n = part & 1 ? m->tokens - cut : cut;
        size_t p = part & 2 ? split : 0, np = part & 2 ? m->panels - split : split;
        if (n && np) free(run_part(k, m, t, n, p, np, parts));
    }
    wrong += wrong_rows(m, parts, m->out);
    free(parts);
    if (!own) free(stream), free(out);
    return wrong;
}

static void test_matmul(int kind, int type) {
    int wrong[N_KERNEL_SETS] = {0}, runs = 0;
    for (size_t tokens = 1; tokens <= 20; tokens++)
        for (size_t panels = 1; panels <= 9; panels++) {
            size_t cols = 16 * (1 + test_random() % 12);
            problem m = make_problem(kind, type, tokens, panels, cols, runs++ % STYLES);
            for (int i = n_sets - 1; i >= 0; i--)       /* the scalar pass stands last           */
                if (matmul_of(sets[i], type, kind)) wrong[i] += wrong_matmul(sets[i], &m);
            free_problem(&m);
        }
    for (size_t cols = 16; cols <= 512; cols += 16)
        for (int style = 0; style < STYLES; style++) {
            static const size_t some[] = {1, 8, 2, 4, 15, 1, 12, 3};
            problem m = make_problem(kind, type, some[(cols / 16 + (size_t)style) % 8], 1 + cols / 16 % 5,
                                     cols, style);
            for (int i = n_sets - 1; i >= 0; i--)
                if (matmul_of(sets[i], type, kind)) wrong[i] += wrong_matmul(sets[i], &m);
            free_problem(&m);
        }
    for (int i = 0; i < n_sets; i++) {
        static const char *const kinds[] = {"f32", "bf16", "int8"};
        matmul_fn *f = matmul_of(sets[i], type, kind);
        CHECK_EQ(f != NULL, kind != PACK_BF16 || sets[i]->bf16_dot);
        if (f && !CHECK_EQ(wrong[i], 0))
            printf("    %s, weights %s, activations %s\n", sets[i]->name, type_names[type],
                   kinds[kind]);
    }
}

/* The largest dot products: every weight byte the same, every activation -127 or 127. */
static void test_int8_extremes(void) {
    static const uint8_t bytes[] = {255, 1, 128, 0, 129};
    enum { COLS = 192, PANELS = 5 };
    int wrong = 0;
    for (size_t b = 0; b < sizeof bytes; b++)
        for (size_t tokens = 1; tokens <= 11; tokens++) {
            problem m = make_problem(PACK_INT8, TYPE_INT8, tokens, PANELS, COLS, 0);
            size_t size = panel_bytes(TYPE_INT8, COLS);
            uint16_t one = f32_to_bf16(1);
            for (size_t i = 0; i < PANELS * size; i++) m.w[i] = bytes[b];
            for (size_t p = 0; p < PANELS; p++)
                for (size_t g = 0; g < COLS / 64; g++)
                    for (size_t r = 0; r < 16; r++)
                        memcpy(m.w + p * size + group_scales(TYPE_INT8, g) + 2 * r, &one, 2);
            for (size_t t = 0; t < tokens; t++) {
                for (size_t k = 0; k < COLS; k++) m.x[t * m.x_stride + k] = t % 2 ? 127 : -127;
                turn_row(m.x + t * m.x_stride, COLS);   /* and back, exactly                     */
            }
            for (int i = 0; i < n_sets; i++) {
                float *out = guarded(&m);
                free(run_part(sets[i], &m, 0, tokens, 0, PANELS, out));
                for (size_t t = 0; t < tokens; t++)
                    for (size_t r = 0; r < PANELS * 16; r++)
                        wrong += out[t * m.out_stride + r] !=
                                 (t % 2 ? 1.0f : -1.0f) * 127 * COLS * (float)(bytes[b] - 128);
                free(out);
            }
            free_problem(&m);
        }
    CHECK_EQ(wrong, 0);
}

/* ---- the kernels on rows ------------------------------------------------------------------- */

/* A copy of X that begins at an address that is a multiple of 4 only. */
static float *unaligned(const float *x, size_t n) {
    float *p = need((n + 1) * sizeof *p);
    if (x) memcpy(p + 1, x, n * sizeof *p);
    return p + 1;
}

static void test_norm(void) {
    int wrong = 0, off = 0;
    double worst = 0;
    for (size_t n = 16; n <= 1040; n += n < 200 ? 16 : 112)
        for (int style = 0; style < STYLES; style++) {
            float *x = unaligned(NULL, n), *w = unaligned(NULL, n), *wanted = unaligned(NULL, n);
            float eps = style % 3 ? 1e-5f : 1e-6f;
            for (size_t i = 0; i < n; i++) x[i] = random_value(style, i), w[i] = uniform() * 2;
            scalar->norm(wanted, x, w, n, eps);
            for (int i = 0; i < n_sets; i++) {
                float *out = unaligned(NULL, n), *same = unaligned(x, n);
                sets[i]->norm(out, x, w, n, eps);
                sets[i]->norm(same, same, w, n, eps);   /* in place                              */
                wrong += differences(out, wanted, n) + differences(same, wanted, n);
                free(out - 1), free(same - 1);
            }
            double squares = 0;
            for (size_t i = 0; i < n; i++) squares += (double)x[i] * (double)x[i];
            double scale = 1 / sqrt(squares / (double)n + (double)eps);
            for (size_t i = 0; i < n && style != 4; i++) {      /* 1e30 squared is no float      */
                double exact = (double)x[i] * scale * (double)w[i];
                double bound = (((double)n / 16 + 7) / 2 + 5) * UNIT * fabs(exact) + 0x1p-148;
                double error = fabs((double)wanted[i] - exact);
                off += !(error <= bound);
                if (error / bound > worst) worst = error / bound;
            }
            free(x - 1), free(w - 1), free(wanted - 1);
        }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
    CHECK(worst > 0.001);
}

/* e^x as the comment promises: within 2 ulp to 87, zero below -86, and 1 at 0. */
static void test_exp(void) {
    double worst = 0;
    int wrong = 0;
    for (int i = 0; i < 1000000; i++) {
        float x[16], e[16];
        for (int k = 0; k < 16; k++)
            x[k] = i % 64 ? uniform() * (i & 1 ? 87.0f : 1.0f) : ldexpf(uniform(), -(i / 64 % 40));
        for (int k = 0; k < 16; k++) if (x[k] < -86) x[k] = -86;
        vstore_scalar(e, vexp_scalar(vload_scalar(x)));
        for (int k = 0; k < 16; k++) {
            double exact = exp((double)x[k]);
            double ulp = ldexp(1, ilogb(exact) - 23), error = fabs((double)e[k] - exact) / ulp;
            if (error > worst) worst = error;
        }
        if (i == 40000) i = 900000;
    }
    if (!CHECK(worst <= 2)) printf("    %.3f ulp\n", worst);
    CHECK(worst > 0.4);
    float x[16] = {0, -0.0f, -86.001f, -87, -1e30f, -INFINITY, 87, -86, 1e-30f, -1e-30f}, e[16];
    vstore_scalar(e, vexp_scalar(vload_scalar(x)));
    CHECK(e[0] == 1 && e[1] == 1 && e[8] == 1 && e[9] == 1);
    for (int k = 2; k < 6; k++) wrong += e[k] != 0 || signbit(e[k]);
    CHECK_EQ(wrong, 0);
    CHECK(e[6] > 6.07e37f && e[6] < 6.08e37f && e[7] > 4.4e-38f);
}

static void test_silu_mul(void) {
    int wrong = 0, off = 0;
    for (size_t n = 16; n <= 2000; n += n < 100 ? 16 : 304)
        for (int style = 0; style < STYLES + 2; style++) {
            float *z = unaligned(NULL, n), *up = unaligned(NULL, n), *wanted;
            for (size_t i = 0; i < n; i++) {
                z[i] = style < STYLES ? random_value(style, i) : uniform() * (style > STYLES ? 12 : 95);
                up[i] = random_value(style == 4 ? 0 : style, i);
            }
            z[0] = -1e38f, z[1] = 1e38f, z[2] = -87, z[3] = -87.0001f, z[4] = -0.0f, up[1] = 1;
            wanted = unaligned(z, n);
            scalar->silu_mul(wanted, up, n);
            for (int i = 0; i < n_sets; i++) {
                float *got = unaligned(z, n);
                sets[i]->silu_mul(got, up, n);
                wrong += differences(got, wanted, n);
                free(got - 1);
            }
            for (size_t i = 0; i < n; i++) {
                double exact = (double)z[i] / (1 + exp(-(double)z[i])) * (double)up[i];
                /* e^-z is off by 2 ulp (4 units), then a sum, a quotient and a product          */
                double bound = 7 * UNIT * fabs(exact) + 0x1p-148 * (1 + fabs((double)up[i]));
                if (z[i] < -87) bound = fabs((double)z[i] * (double)up[i]) * 1.7e-38 + 0x1p-148;
                off += !(fabs((double)wanted[i] - exact) <= bound);
            }
            free(z - 1), free(up - 1), free(wanted - 1);
        }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
}

static void test_relu2(void) {
    int wrong = 0, off = 0;
    for (int style = 0; style < STYLES; style++) {
        enum { N = 144 };
        float *x = unaligned(NULL, N), *wanted;
        for (size_t i = 0; i < N; i++) x[i] = random_value(style, i);
        x[0] = 0, x[1] = -0.0f, x[2] = -INFINITY, x[3] = INFINITY, x[4] = 1e-30f, x[5] = -3;
        wanted = unaligned(x, N);
        scalar->relu2(wanted, N);
        for (size_t i = 0; i < N; i++)
            off += float_bits(wanted[i]) != float_bits(x[i] > 0 ? x[i] * x[i] : 0);
        for (int i = 0; i < n_sets; i++) {
            float *got = unaligned(x, N);
            sets[i]->relu2(got, N);
            wrong += differences(got, wanted, N);
            free(got - 1);
        }
        free(x - 1), free(wanted - 1);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
}

/* Golden values for alphas of 0 (softplus: ln 2), beta 0.5, eps -1e-6; then a sweep. Left of 0 the
 * bend e^x - 1 - x is off by a few units of x, by which it also vanishes. */
static void test_xielu(void) {
    static const struct { float x; double y; } golden[] = {
        {2, 3.7725887222}, {1, 1.1931471806}, {0, -1.19315e-06}, {-1, -0.0610656820},
        {-5, 2.2806280847}};
    const double ln2 = 0.69314718055994531;
    const xielu_numbers a = {(float)ln2, (float)(0.5 + ln2), 0.5f, -1e-6f};
    int wrong = 0, off = 0;
    for (int i = 0; i < n_sets; i++) {
        float x[16] = {0};
        for (size_t k = 0; k < 5; k++) x[k] = golden[k].x;
        sets[i]->xielu(x, 16, &a);
        for (size_t k = 0; k < 5; k++)
            off += !(fabs((double)x[k] - golden[k].y) <= (k == 2 ? 5e-6 : 3e-7) * fabs(golden[k].y));
    }
    CHECK_EQ(off, 0);
    for (int style = 0; style < 6; style++) {
        enum { N = 2000 };
        static const double sizes[] = {0.001, 0.1, 0.35, 2, 30, 300};
        float *x = unaligned(NULL, N), *wanted;
        const xielu_numbers b = {1.7f, 2.3f, style % 2 ? 0.4f : 0.5f, style % 2 ? -0.01f : -1e-6f};
        for (size_t i = 0; i < N; i++) x[i] = uniform() * (float)sizes[style];
        x[0] = 0, x[1] = -0.0f, x[2] = -1e-6f, x[3] = -90, x[4] = -1e30f, x[5] = 1e18f, x[6] = -1e-30f;
        wanted = unaligned(x, N);
        scalar->xielu(wanted, N, &b);
        for (size_t i = 0; i < N; i++) {
            double z = (double)x[i], low = fmin(z, (double)b.eps), beta = (double)b.beta;
            double exact = z > 0 ? (double)b.positive * z * z + beta * z :
                           (double)b.negative * (expm1(low) - z) + beta * z;
            double size = z > 0 ? exact : (double)b.negative * (fabs(expm1(low)) + fabs(z)) +
                                          beta * fabs(z);
            off += !(fabs((double)wanted[i] - exact) <= 6 * UNIT * size + 1e-44);
        }
        for (int i = 0; i < n_sets; i++) {
            float *got = unaligned(x, N);
            sets[i]->xielu(got, N, &b);
            wrong += differences(got, wanted, N);
            free(got - 1);
        }
        free(x - 1), free(wanted - 1);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
}

static void test_add_and_half(void) {
    int wrong = 0;
    for (size_t n = 16; n <= 400; n += 16)
        for (int style = 0; style < STYLES; style++) {
            float *x = unaligned(NULL, n), *y = unaligned(NULL, n);
            for (size_t i = 0; i < n; i++) {
                x[i] = random_value(style, i) * (style == 1 ? 5000.0f : 1);
                y[i] = random_value((style + 3) % STYLES, i);
            }
            x[0] = 65504, x[1] = 65519.99f, x[2] = 65520, x[3] = -1e20f, x[4] = INFINITY;
            x[5] = -INFINITY, x[6] = 6e-8f, x[7] = 2.9e-8f, x[8] = -6.1e-5f, x[9] = 65535;
            for (int i = 0; i < n_sets; i++) {
                uint16_t *half = need(n * sizeof *half + 2), *to = half + 1;
                float *sum = unaligned(x, n);
                sets[i]->to_half(to, x, n);
                sets[i]->add(sum, y, n);
                for (size_t k = 0; k < n; k++) {
                    float clamped = x[k] > 65504 ? 65504 : x[k] < -65504 ? -65504 : x[k];
                    wrong += to[k] != f32_to_f16(clamped);
                    wrong += float_bits(sum[k]) != float_bits(x[k] + y[k]);
                }
                free(half), free(sum - 1);
            }
            free(x - 1), free(y - 1);
        }
    CHECK_EQ(wrong, 0);
}

/* A row of a cache: what an int8 says is at most half a step from what was, a step being a bf16 that
 * is at most 2^-7 above the largest magnitude / 127. */
static void test_to_int8(void) {
    int wrong = 0, off = 0;
    for (size_t n = 16; n <= 256; n += 16)
        for (int style = 0; style < STYLES; style++) {
            float *x = unaligned(NULL, n);
            for (size_t i = 0; i < n; i++) x[i] = random_value(style, i);
            if (style == 1) x[3] = INFINITY, x[5] = -1e20f, x[7] = NAN;
            int8_t wanted[256], q[257];
            uint16_t wanted_scale[4], scale[5];
            scalar->to_int8(wanted, wanted_scale, x, n);
            float turned[256];
            for (size_t k = 0; k < n; k++) turned[k] = fmaxf(fminf(x[k], 65504), -65504);
            turn_row(turned, n);
            for (size_t k = 0; k < n && style != 1; k++) {
                double step = (double)bf16_to_f32(wanted_scale[k / 64]), most = 0;
                for (size_t i = k / 64 * 64; i < n && i / 64 == k / 64; i++)
                    most = fmax(most, fabs((double)turned[i]));
                off += !(fabs(wanted[k] * step - (double)turned[k]) <= step * 0.5001 + 1.1e-30);
                off += step > most / 127 * (1 + 0x1p-7) || wanted[k] == -128;
            }
            for (int i = 0; i < n_sets; i++) {
                sets[i]->to_int8(q + 1, scale + 1, x, n);
                wrong += memcmp(q + 1, wanted, n) || memcmp(scale + 1, wanted_scale,
                                                            (n + 63) / 64 * sizeof *scale);
            }
            free(x - 1);
        }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
}

/* ---- attention ----------------------------------------------------------------------------- */

/* A cache of N keys as section 13 lays it out, and its contents as floats. */
typedef struct {
    size_t n, dim;
    int kv;
    float *key, *value;                         /* (n, dim) what the cache holds, turned or not  */
    uint8_t *keys, *values;                     /* the cache                                     */
} cache;

/* Puts number D of position I where the cache has it, and returns what is there then. */
static float put_item(uint8_t *to, const cache *c, size_t i, size_t d, bool key, float f) {
    size_t at = key ? (i / 16 * c->dim + d) * 16 + i % 16 : i * c->dim + d;
    uint16_t h = f32_to_f16(f);
    if (c->kv == MEDRUN_KV_F32) memcpy(to + 4 * at, &f, 4);
    else memcpy(to + 2 * at, &h, 2);
    return c->kv == MEDRUN_KV_F32 ? f : f16_to_f32(h);
}

/* The same for a whole row of an int8 cache; X becomes what is there. */
static void put_int8(uint8_t *to, const cache *c, size_t i, bool key, float *x) {
    int8_t q[256];
    uint16_t scale[4];
    scalar->to_int8(q, scale, x, c->dim);
    to += i / 16 * cache_panel(c->kv, c->dim);
    for (size_t d = 0; d < c->dim; d++) {
        to[key ? d / 2 * 32 + i % 16 * 2 + d % 2 : i % 16 / 2 * 2 * c->dim + 2 * d + i % 2] =
            (uint8_t)q[d];
        x[d] = (float)q[d] * bf16_to_f32(scale[d / 64]);
        memcpy(to + 16 * c->dim + d / 64 * 32 + i % 16 * 2, scale + d / 64, 2);
    }
}

static void set_key(cache *c, size_t i, float size) {
    float k[256], v[256];
    bool extreme = c->kv == MEDRUN_KV_INT8 && test_random() % 4 == 0;   /* all +-127             */
    for (size_t d = 0; d < c->dim; d++) {
        k[d] = uniform() * size, v[d] = uniform() * size;
        if (extreme) k[d] = copysignf(size, k[d]), v[d] = copysignf(size, v[d]);
    }
    if (extreme) turn_row(k, c->dim), turn_row(v, c->dim);
    if (c->kv == MEDRUN_KV_INT8) put_int8(c->keys, c, i, true, k);
    for (size_t d = 0; d < c->dim && c->kv != MEDRUN_KV_INT8; d++)
        k[d] = put_item(c->keys, c, i, d, true, k[d]);
    if (c->kv == MEDRUN_KV_INT8 && i < round_up(c->n, 16)) put_int8(c->values, c, i, false, v);
    if (i >= c->n) return;                              /* a panel's unused keys                 */
    for (size_t d = 0; d < c->dim && c->kv != MEDRUN_KV_INT8; d++)
        v[d] = put_item(c->values, c, i, d, false, v[d]);
    memcpy(c->key + i * c->dim, k, c->dim * sizeof *k);
    memcpy(c->value + i * c->dim, v, c->dim * sizeof *v);
}

static cache make_cache(size_t n, size_t dim, int kv, float size) {
    size_t panel = cache_panel(kv, dim);
    cache c = {n, dim, kv, need(n * dim * 4), need(n * dim * 4),
               need(round_up(n, KEY_STEP) / 16 * panel),
               need(kv == MEDRUN_KV_INT8 ? round_up(n, 16) / 16 * panel : n * (panel / 16))};
    for (size_t i = 0; i < round_up(n, KEY_STEP); i++) set_key(&c, i, i < n ? size : 60000);
    return c;
}

static void free_cache(cache *c) { free(c->key), free(c->value), free(c->keys), free(c->values); }

static size_t window = SIZE_MAX;                /* how many keys a query sees at most            */

static size_t start_of(size_t limit) { return limit > window ? limit - window : 0; }

/* Queries Q[ORDER[i]] with their limits, WIDTH at a time, into OUT[ORDER[i]]; SPLIT: block by block
 * of keys, merged. */
static void run_attention(const kernel_set *k, const cache *c, float *q, const size_t *limit,
                          const int *order, int n, int width, bool split, float *out) {
    size_t n_scratch = attend_scratch(c->dim), blocks = (c->n + KEY_BLOCK - 1) / KEY_BLOCK;
    size_t part = c->dim + PART_EXTRA;
    float *scratch = need(n_scratch * sizeof *scratch);
    float *parts = need((size_t)width * blocks * part * sizeof *parts);
    for (int i = 0; i < n; i += width) {
        attention a = {.n = (size_t)(n - i < width ? n - i : width), .kv = c->kv, .part = split,
                       .head_dim = c->dim, .scale = 1.0f / sqrtf((float)c->dim), .keys = c->keys,
                       .values = c->values, .scratch = scratch, .end = SIZE_MAX};
        for (size_t t = 0; t < a.n; t++) {
            a.q[t] = q + (size_t)order[(size_t)i + t] * c->dim;
            a.out[t] = out + (size_t)order[(size_t)i + t] * c->dim;
            a.limit[t] = limit[order[(size_t)i + t]];
            a.start[t] = start_of(a.limit[t]);
        }
        for (size_t s = 0; s < n_scratch; s++) scratch[s] = NAN;
        for (size_t t = 0; t < a.n; t++) for (size_t d = 0; d < c->dim; d++) a.out[t][d] = NAN;
        if (!split) k->attend(&a);
        for (size_t b = blocks; split && b--;) {
            a.begin = b * KEY_BLOCK, a.end = a.begin + KEY_BLOCK;
            for (size_t t = 0; t < a.n; t++) a.out[t] = parts + (t * blocks + b) * part;
            k->attend(&a);
        }
        for (size_t t = 0; split && t < a.n; t++)
            k->merge(out + (size_t)order[(size_t)i + t] * c->dim, parts + t * blocks * part, blocks,
                     c->dim, c->kv);
    }
    free(scratch), free(parts);
}

/* One query in double precision. A score is off by dim + 1 roundings of its magnitudes, a weight by
 * that, 2 ulp and the rounding of its distance to the largest; a sum over a block's keys by their
 * number; the quotient doubles it. Beside an int8 cache a query is off by half a unit of 1 / 32767
 * of its largest number, and in each block a weighted value by as much of the largest; all that is
 * turned, and so are they here. */
static int wrong_attention(const cache *c, const float *query, size_t limit, const float *result) {
    float q[256], out[256];
    double *s = need(limit * sizeof *s), most = -INFINITY, total = 0, off = 0, largest = 0;
    size_t start = start_of(limit);
    int wrong = 0;
    double half = c->kv == MEDRUN_KV_INT8 ? 0.5 / 32766 : 0, q_most = 0;
    memcpy(q, query, c->dim * sizeof *q), memcpy(out, result, c->dim * sizeof *out);
    if (c->kv == MEDRUN_KV_INT8) turn_row(q, c->dim), turn_row(out, c->dim);
    for (size_t d = 0; d < c->dim; d++) q_most = fmax(q_most, fabs((double)q[d]));
    for (size_t i = start; i < limit; i++) {
        double dot = 0, size = 0, sum = 0, scale = 1 / sqrt((double)c->dim);
        for (size_t d = 0; d < c->dim; d++) {
            double p = (double)q[d] * (double)c->key[i * c->dim + d];
            dot += p, size += fabs(p), sum += fabs((double)c->key[i * c->dim + d]);
            if (fabs((double)c->value[i * c->dim + d]) > largest)
                largest = fabs((double)c->value[i * c->dim + d]);
        }
        s[i] = dot * scale;
        if (s[i] > most) most = s[i];
        off = fmax(off, (((double)c->dim + 3) * size * UNIT + half * q_most * sum) * scale);
    }
    for (size_t i = start; i < limit; i++) total += s[i] = exp(s[i] - most);
    size_t chain = limit < KEY_BLOCK ? limit : KEY_BLOCK;
    double relative = 2 * off + ((double)chain + 12 + 6 * (double)(limit / KEY_BLOCK)) * 2 * UNIT;
    relative += (double)chain * half;
    for (size_t d = 0; d < c->dim; d++) {
        double exact = 0;
        for (size_t i = start; i < limit; i++) exact += s[i] / total * (double)c->value[i * c->dim + d];
        wrong += !(fabs((double)out[d] - exact) <= relative * largest);
    }
    free(s);
    return wrong;
}

static void test_attention(int kv) {
    static const size_t limits[] = {1, 15, 16, 17, 255, 256, 257, 600, 2, 31, 511, 512, 513, 300, 100, 64};
    static const size_t dims[] = {16, 64, 80, 128};
    enum { N = 16 };
    float odd = kv == MEDRUN_KV_F32 ? 1e38f : 60000;
    int off = 0, wrong[N_KERNEL_SETS] = {0}, garbage[N_KERNEL_SETS] = {0};
    for (int run = 0; run < 18; run++) {
        static const size_t windows[] = {1, 17, 255, 256, 300, 500};
        size_t dim = dims[run % 4], limit[N], bytes = N * dim * sizeof(float);
        window = run < 12 ? SIZE_MAX : windows[run - 12];
        float size = run % 3 == 0 ? 1.0f : run % 3 == 1 ? 8.0f : 0.05f;
        cache c = make_cache(600, dim, kv, size);
        float *q = need(bytes), *wanted = need(bytes), *out = need(bytes);
        int order[N];
        for (int i = 0; i < N; i++) {
            order[i] = i;
            limit[i] = run < 4 ? limits[i] : 1 + test_random() % (run < 8 ? 40 : 600);
            for (size_t d = 0; d < dim; d++) q[(size_t)i * dim + d] = uniform() * size;
        }
        run_attention(scalar, &c, q, limit, order, N, 1, false, wanted);
        for (int i = 0; i < N; i++)
            off += wrong_attention(&c, q + (size_t)i * dim, limit[i], wanted + (size_t)i * dim);
        for (int width = 1; width <= N; width += width < 5 ? 1 : 5)
            for (int mix = 0; mix < 3; mix++) {         /* the same queries beside other ones    */
                for (int i = 0; mix && i < N; i++) {
                    int k = (int)(test_random() % N), swap = order[i];
                    order[i] = order[k], order[k] = swap;
                }
                for (int i = 0; i < n_sets; i++) {
                    run_attention(sets[i], &c, q, limit, order, N, width, mix == 1, out);
                    wrong[i] += differences(out, wanted, N * dim);
                }
            }
        size_t longest = 0;
        for (int i = 0; i < N; i++) if (limit[i] > longest) longest = limit[i];
        for (size_t i = longest; i < round_up(c.n, KEY_STEP); i++) set_key(&c, i, odd);
        for (int i = 0; i < n_sets; i++) {
            run_attention(sets[i], &c, q, limit, order, N, 8, false, out);
            garbage[i] += differences(out, wanted, N * dim);
        }
        for (int t = 0; t < N; t++) {                   /* what is before its window             */
            if (limit[t] < longest || start_of(longest) == 0) continue;
            for (size_t i = 0; i < start_of(longest); i++) set_key(&c, i, odd);
            for (int i = 0; i < n_sets; i++) {
                run_attention(sets[i], &c, q, limit, &(int){t}, 1, 1, false, out);
                garbage[i] += differences(out + (size_t)t * dim, wanted + (size_t)t * dim, dim);
            }
        }
        for (size_t from = 600; run < 12 && from-- > 1;) {  /* what a single query must not see  */
            set_key(&c, from, odd);
            for (int t = 0; t < N; t++)
                for (int i = 0; limit[t] == from && i < n_sets; i++) {
                    run_attention(sets[i], &c, q, limit, &(int){t}, 1, 1, false, out);
                    garbage[i] += differences(out + (size_t)t * dim, wanted + (size_t)t * dim, dim);
                }
        }
        free_cache(&c), free(q), free(wanted), free(out);
    }
    window = SIZE_MAX;
    CHECK_EQ(off, 0);
    for (int i = 0; i < n_sets; i++)
        if (!CHECK_EQ(wrong[i], 0) || !CHECK_EQ(garbage[i], 0)) printf("    %s\n", sets[i]->name);
}

/* Values that are all equal give that value; zeros give a plus zero. */
static void test_attention_exact(void) {
    for (int i = 0; i < n_sets; i++) {
        cache c = make_cache(300, 32, MEDRUN_KV_F32, 2);
        float q[32] = {1, 2, -1}, out[32];
        int wrong = 0;
        for (int zero = 0; zero < 2; zero++) {
            for (size_t k = 0; k < 300 * 32; k++)
                put_item(c.values, &c, k / 32, k % 32, false, zero ? -0.0f : 0.75f);
            for (size_t limit = 1; limit <= 300; limit += 23) {
                run_attention(sets[i], &c, q, &limit, &(int){0}, 1, 1, false, out);
                for (int d = 0; d < 32; d++)
                    wrong += zero ? float_bits(out[d]) != 0 : fabsf(out[d] - 0.75f) > 2e-5f;
            }
        }
        CHECK_EQ(wrong, 0);
        free_cache(&c);
    }
}

/* ---- the scales of int4 -------------------------------------------------------------------- */

enum { FIT_STYLES = 12 };

/* 16 groups (32, 16) of weights as they are and as they should not be. */
static void fill_groups(float *v, int style) {
    for (int i = 0; i < 512; i++) {
        float f = uniform(), one = (float)((int)(test_random() % 3) - 1);
        int k = i / 16, lane = i % 16;
        switch (style) {
            case 0: v[i] = f * f * f * 0.02f; break;
            case 1: v[i] = f; break;
            case 2: v[i] = (float)(lane - 5) * 0.01f; break;            /* constants, one is 0   */
            case 3: v[i] = k == lane ? 3.7f : f * 1e-3f; break;         /* one outlier           */
            case 4: v[i] = lane % 3 ? f : lane % 2 ? -0.0f : 0.0f; break;
            case 5: v[i] = f * 1e-39f; break;                           /* subnormal             */
            case 6: v[i] = f * INT4_LARGEST; break;
            case 7: v[i] = copysignf(INT4_LARGEST, f); break;
            case 8: v[i] = (float)(int)(f * 172) / 256; break;          /* ties between levels   */
            case 9: v[i] = (0.5f + 0.001f * f) * (lane % 2 ? 1.0f : -1.0f); break;  /* one sign  */
            case 10: v[i] = one; break;                                 /* three values          */
            default: v[i] = ldexpf(f, -(int)(test_random() % 40));      /* every size            */
        }
    }
}

static void fill_importance(float *importance, int style) {
    for (int k = 0; k < 32; k++) {
        float f = fabsf(uniform());
        importance[k] = style == 0 ? 1 : style == 1 ? 0.05f + f : style == 2 ? k < 16 ? 1 : 0 :
                        style == 3 ? k == 7 ? 14000 : 0.05f : f * f * f * 20 + 0.05f;
    }
}

static double level_value(int index, double scale, int shift) {
    static const int levels[16] = {-96, -72, -57, -45, -34, -24, -15, -6, 2, 10, 19, 27, 36, 47, 60,
                                   76};
    return scale * (levels[index] + shift);
}

/* The weighted squared error of lane LANE with what was found for it. */
static double found_error(const float *v, const float *importance, int lane, uint16_t bits,
                          const uint8_t *q) {
    double error = 0, scale = (double)f16_to_f32(bits & 0xFFC0) / 8192;
    for (int k = 0; k < 32; k++) {
        double off = level_value(q[16 * k + lane], scale, (bits & 63) - 32);
        off -= (double)v[16 * k + lane];
        error += off * off * (double)importance[k];
    }
    return error;
}

/* The same with the nearest level of each; stops above MOST. */
static double nearest_error(const float *v, const float *importance, int lane, double scale,
                            int shift, double most) {
    double error = 0;
    for (int k = 0; k < 32 && error < most; k++) {
        double x = (double)v[16 * k + lane], best = INFINITY;
        for (int q = 0; q < 16; q++) {
            double off = fabs(level_value(q, scale, shift) - x);
            best = off < best ? off : best;             /* fmin: gcc 12 for arm64 gives up       */
        }
        error += best * best * (double)importance[k];
    }
    return error;
}

/* The least error that any scale and shift give, in double precision. */
static double least_error(const float *v, const float *importance, int lane) {
    double low = 0, high = 0, least = INFINITY;
    for (int k = 0; k < 32; k++) {
        if (importance[k] > 0) low = fmin(low, (double)v[16 * k + lane]);
        if (importance[k] > 0) high = fmax(high, (double)v[16 * k + lane]);
    }
    least = nearest_error(v, importance, lane, 0, 0, INFINITY);
    for (int bits = 64; bits <= 0x7BC0; bits += 64) {
        double scale = (double)f16_to_f32((uint16_t)bits) / 8192, span = (high - low) / 172;
        if (scale < span * 0.3 || scale > span * 2.7) continue;
        for (int shift = -32; shift < 32; shift++)
            for (int sign = -1; sign <= 1; sign += 2)
                least = fmin(least, nearest_error(v, importance, lane, sign * scale, shift, least));
    }
    return least;
}

/* All sets give the bits of the scalar pass. Nothing is off by more than all zeros would be. */
static void test_fit(void) {
    int wrong[N_KERNEL_SETS] = {0}, worse = 0, scales = 0;
    for (int run = 0; run < FIT_STYLES * 20; run++) {
        float v[512], importance[32];
        uint16_t wanted[16], bits[16];
        uint8_t nibbles[512], q[512];
        fill_groups(v, run % FIT_STYLES), fill_importance(importance, run / FIT_STYLES % 5);
        scalar->more->fit_int4(v, importance, wanted, nibbles);
        for (int i = 0; i < n_sets; i++) {
            memset(bits, 0xAA, sizeof bits), memset(q, 0xAA, sizeof q);
            sets[i]->more->fit_int4(v, importance, bits, q);
            wrong[i] += memcmp(bits, wanted, sizeof bits) || memcmp(q, nibbles, sizeof q);
        }
        for (int lane = 0; lane < 16; lane++) {
            double zeros = nearest_error(v, importance, lane, 0, 0, INFINITY);
            double error = found_error(v, importance, lane, wanted[lane], nibbles);
            worse += !(error <= zeros * (1 + 1e-5));
            worse += zeros == 0 && wanted[lane] != 0;
            scales += (wanted[lane] & 0x7FC0) > 64 && error < zeros / 4;
            for (int k = 0; k < 32; k++) worse += nibbles[16 * k + lane] > 15;
        }
    }
    for (int i = 0; i < n_sets; i++) if (!CHECK_EQ(wrong[i], 0)) printf("    %s\n", sets[i]->name);
    CHECK_EQ(worse, 0);
    CHECK(scales > FIT_STYLES * 20 * 16 / 2);
}

/* The search against brute force, in sum and for the worst group. */
static void test_fit_near_best(void) {
    double found[2] = {0}, best[2] = {0}, worst = 0;
    for (int run = 0; run < 16; run++) {
        float v[512], importance[32];
        uint16_t bits[16];
        uint8_t q[512];
        int kind = run / 8;                             /* all the same; columns of unlike weight */
        fill_groups(v, run % 2 ? 1 : 0), fill_importance(importance, kind ? 4 : 0);
        sets[0]->more->fit_int4(v, importance, bits, q);
        for (int lane = 0; lane < 16; lane++) {
            double error = found_error(v, importance, lane, bits[lane], q);
            double least = least_error(v, importance, lane);
            found[kind] += error / (run % 2 ? 1 : 4e-4), best[kind] += least / (run % 2 ? 1 : 4e-4);
            worst = fmax(worst, error / least);
            CHECK(error >= least * (1 - 1e-5));
        }
    }
    printf("int4: %.3f and %.3f times the least error there is, at most %.2f in a group\n",
           found[0] / best[0], found[1] / best[1], worst);
    CHECK(found[0] < best[0] * 1.1 && found[1] < best[1] * 1.15);
    CHECK(worst < 3);
}

/* The loss of a lane's chain with the scale and shift of BITS, each column to its nearest level. */
static double chain_loss(const float *w, const float *v, const float *coupling, const float *loss,
                         const uint16_t *bits, int lane) {
    double scale = (double)int4_scale(bits[lane]) / 8192, left[32], lost = 0;
    int shift = (bits[lane] & SHIFT_MASK) - SHIFT_ZERO;
    for (int k = 0; k < 32; k++) {
        double at = (double)v[16 * k + lane], best = 0;
        for (int j = 0; j < k; j++) at += left[j] * (double)coupling[j * 40 + k];
        for (int i = 0; i < 16; i++) {
            double stored = (int4_levels[i] - INT4_ZERO + shift) * scale;
            if (!i || fabs(at - stored) < fabs(at - best)) best = stored;
        }
        left[k] = (double)w[16 * k + lane] - best;
        lost += (at - best) * (at - best) * (double)loss[k];
    }
    return lost;
}

/* All sets feed errors on with the same bits; what is left and lost is what the nibbles say; and the
 * search keeps nothing worse than what it began with. */
static void test_chain(void) {
    int wrong[N_KERNEL_SETS] = {0}, off = 0;
    double fed = 0, plain = 0;
    for (int run = 0; run < FIT_STYLES * 10; run++) {
        float w[512], v[512], coupling[32 * 40], loss[32], sum[2][16] = {{0}}, left[2][512];
        uint16_t bits[2][16], from[16];
        uint8_t q[2][512];
        fill_groups(w, run % FIT_STYLES), fill_importance(loss, run / FIT_STYLES % 2 ? 4 : 0);
        for (int i = 0; i < 512; i++) v[i] = w[i] * (run % 3 ? 1.0f : 1.125f);
        for (int i = 0; i < 32 * 40; i++) coupling[i] = uniform() - 0.25f;
        scalar->more->fit_int4(v, loss, from, q[0]);
        for (int i = 0; i < n_sets; i++) {
            float *to = sum[i > 0];
            memcpy(bits[i > 0], from, sizeof from);
            memset(to, 0, sizeof sum[0]), memset(q[i > 0], 0xAA, sizeof q[0]);
            sets[i]->more->chain_int4(&(int4_chain){w, v, coupling, 40, loss}, bits[i > 0],
                                      q[i > 0], left[i > 0], to);
            wrong[i] += i && (memcmp(bits[0], bits[1], sizeof from) || memcmp(q[0], q[1], 512) ||
                              memcmp(left[0], left[1], sizeof left[0]) ||
                              memcmp(sum[0], sum[1], sizeof sum[0]));
        }
        for (int lane = 0; lane < 16; lane++) {
            double scale = (double)int4_scale(bits[0][lane]) / 8192, lost = 0;
            for (int k = 0; k < 32; k++) {
                int level = int4_levels[q[0][16 * k + lane]] - INT4_ZERO +
                            (bits[0][lane] & SHIFT_MASK) - SHIFT_ZERO;
                double at = (double)v[16 * k + lane];
                for (int j = 0; j < k; j++)
                    at += (double)left[0][16 * j + lane] * (double)coupling[j * 40 + k];
                at -= level * scale, lost += at * at * (double)loss[k];
                double error = (double)w[16 * k + lane] - level * scale;
                off += fabs(error - (double)left[0][16 * k + lane]) > 1e-5 * fabs(level * scale) + 1e-30;
            }
            off += fabs(lost - (double)sum[0][lane]) > 1e-3 * lost + 1e-30;
            if (run % FIT_STYLES < 2) fed += lost;
        }
        for (int lane = 0; run % FIT_STYLES < 2 && lane < 16; lane++)
            plain += chain_loss(w, v, coupling, loss, from, lane);
    }
    for (int i = 0; i < n_sets; i++) if (!CHECK_EQ(wrong[i], 0)) printf("    %s\n", sets[i]->name);
    CHECK_EQ(off, 0);
    printf("int4: searching where errors are fed on leaves %.3f of the loss\n", fed / plain);
    CHECK(fed < plain * 0.97);
}

/* Sums of products as in double, and the same bits from all sets. */
static void test_sum_products(void) {
    int wrong = 0, off = 0;
    for (int run = 0; run < 40; run++) {
        size_t rows = 1 + (size_t)run % 19, cols = 16 * (1 + (size_t)run % 5), depth = (size_t)run;
        float a[64 * 20], b[64 * 96], c[2][20 * 96];
        for (size_t i = 0; i < 64 * 20; i++) a[i] = uniform();
        for (size_t i = 0; i < 64 * 96; i++) b[i] = uniform();
        for (int i = 0; i < n_sets; i++) {
            float *to = c[i > 0];
            for (size_t k = 0; k < 20 * 96; k++) to[k] = (float)k;
            sets[i]->more->sum_products(&(matrix_sum){to, a, b, 96, 20, 96, rows, cols, depth});
            wrong += i && memcmp(c[0], c[1], sizeof c[0]);
        }
        for (size_t r = 0; r < 20; r++)
            for (size_t k = 0; k < 96; k++) {
                double sum = (double)(r * 96 + k);
                for (size_t d = 0; d < depth && r < rows && k < cols; d++)
                    sum += (double)a[d * 20 + r] * (double)b[d * 96 + k];
                off += fabs(sum - (double)c[0][r * 96 + k]) > 1e-3;
            }
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(off, 0);
}

/* Importances make the error smaller that they weigh; what a column of none holds changes nothing,
 * and neither does a power of two that all have in common. */
static void test_importance(void) {
    double with = 0, without = 0, plain = 0, plain_without = 0;
    int wrong = 0;
    for (int run = 0; run < 200; run++) {
        float v[512], importance[32], ones[32], few[32];
        uint16_t bits[16], other[16];
        uint8_t q[512], p[512];
        fill_groups(v, run % 2), fill_importance(importance, 4), fill_importance(ones, 0);
        sets[0]->more->fit_int4(v, importance, bits, q);
        sets[0]->more->fit_int4(v, ones, other, p);
        for (int lane = 0; lane < 16; lane++) {
            double size = run % 2 ? 1 : 4e-4;
            with += found_error(v, importance, lane, bits[lane], q) / size;
            without += found_error(v, importance, lane, other[lane], p) / size;
            plain += found_error(v, ones, lane, bits[lane], q) / size;
            plain_without += found_error(v, ones, lane, other[lane], p) / size;
        }
        for (int k = 0; k < 32; k++) few[k] = k % 3 ? importance[k] : 0;
        sets[0]->more->fit_int4(v, few, bits, q);
        for (int i = 0; i < 512; i++) if (few[i / 16] == 0) v[i] = uniform() * 100;
        sets[0]->more->fit_int4(v, few, other, p);
        wrong += memcmp(bits, other, sizeof bits) != 0;
        for (int i = 0; i < 512; i++) wrong += few[i / 16] > 0 && p[i] != q[i];
        for (int k = 0; k < 32; k++) few[k] *= 4;
        sets[0]->more->fit_int4(v, few, bits, q);
        wrong += memcmp(bits, other, sizeof bits) || memcmp(p, q, sizeof p);
    }
    printf("int4: importances make the error %.2f times what it was, all columns' %.2f\n",
           with / without, plain / plain_without);
    CHECK(with < without * 0.9 && plain > plain_without);
    CHECK_EQ(wrong, 0);
}

/* ---- the table ----------------------------------------------------------------------------- */

static void test_choice(void) {
    const kernel_set *k = NULL;
    medrun_error e = {0};
    setenv("MEDRUN_KERNELS", "scalar", 1);      /* is for the commands, which hand it on         */
    CHECK(choose_kernels(&k, NULL, &e) == MEDRUN_OK && k == sets[0]);
    unsetenv("MEDRUN_KERNELS");
    CHECK(sets[n_sets - 1] == scalar && !strcmp(scalar->name, "scalar") && !scalar->bf16_dot);
    for (int i = 0; i < n_sets; i++) {
        CHECK(choose_kernels(&k, sets[i]->name, &e) == MEDRUN_OK && k == sets[i]);
        CHECK(choose_kernels(&k, "scalar", &e) == MEDRUN_OK && k == scalar);
        for (int other = 0; other < i; other++) CHECK(strcmp(sets[i]->name, sets[other]->name) != 0);
    }
    CHECK(choose_kernels(&k, "", &e) == MEDRUN_OK && k == sets[0]);
    k = NULL;
    CHECK(choose_kernels(&k, "sse9", &e) == MEDRUN_USAGE && k == NULL);
    CHECK(strstr(e.text, "\"sse9\"") && strstr(e.text, " scalar"));
}

int main(void) {
    n_sets = usable_kernels(sets);
    for (int i = 0; i < n_sets; i++) printf("%s%s", sets[i]->name, i + 1 < n_sets ? ", " : "\n");
    if (n_sets < N_KERNEL_SETS) SKIP("this machine cannot run every kernel set");
    test_choice();
    test_matmul(PACK_F32, TYPE_BF16);
    test_matmul(PACK_INT8, TYPE_INT8);
    test_matmul(PACK_INT8, TYPE_INT4);
    test_matmul(PACK_BF16, TYPE_BF16);
    test_int8_extremes();
    test_fit();
    test_fit_near_best();
    test_importance();
    test_chain();
    test_sum_products();
    test_norm();
    test_exp();
    test_silu_mul();
    test_relu2();
    test_xielu();
    test_add_and_half();
    test_to_int8();
    test_attention(MEDRUN_KV_F32);
    test_attention(MEDRUN_KV_F16);
    test_attention(MEDRUN_KV_INT8);
    test_attention_exact();
    return report();
}
