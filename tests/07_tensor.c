/* Tests of section 7: the same bits whatever the threads and however products stand together. */
#define MEDRUN_NO_MAIN
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#include "../tools/export_int4.c"
#include "test.h"

enum { MOST_PRODUCTS = 4, MOST_TOKENS = 37 };

static float uniform(void) { return (float)((double)test_random() / 0x1p63 - 1); }

static tensor random_tensor(int type, size_t rows, size_t cols) {
    uint8_t *data = malloc(tensor_bytes(type, rows, cols));
    float *w = malloc(rows * cols * sizeof *w);
    for (size_t i = 0; i < rows * cols; i++) w[i] = uniform();
    for (size_t r = 0; r < rows; r += LANES)
        store_rows(&kernel_row_scalar, type, w + r * cols, rows - r < LANES ? rows - r : LANES, cols,
                   data + r / LANES * panel_bytes(type, cols));
    free(w);
    return (tensor){type, rows, cols, data};
}

typedef struct {
    int type;
    size_t n, tokens, cols, x_stride;
    tensor w[MOST_PRODUCTS];
    size_t stride[MOST_PRODUCTS];               /* of each output, rows rounded up and more      */
    float *x;
} problem;

static problem random_problem(int type, size_t n, size_t tokens) {
    problem m = {.type = type, .n = n, .tokens = tokens, .cols = 16 * (1 + test_random() % 14)};
    m.x_stride = m.cols + test_random() % 9;
    m.x = malloc(tokens * m.x_stride * sizeof *m.x);
    for (size_t i = 0; i < tokens * m.x_stride; i++) m.x[i] = uniform() * 3;
    for (size_t i = 0; i < n; i++) {
        m.w[i] = random_tensor(type, 1 + test_random() % (i % 2 ? 40 : 500), m.cols);
        m.stride[i] = round_up(m.w[i].rows, LANES) + test_random() % 5;
    }
    return m;
}

static void free_problem(problem *m) {
    for (size_t i = 0; i < m->n; i++) free((void *)(uintptr_t)m->w[i].data);
    free(m->x);
}

/* All products in one call on G; the outputs one behind the other, unwritten places NaN. */
static float *run_problem(const engine *g, const problem *m, size_t *n_out) {
    product products[MOST_PRODUCTS];
    packed a = {.data = malloc(pack_bytes(pack_kind(g, m->type), m->cols, m->tokens))};
    float *out, *at;
    *n_out = 0;
    for (size_t i = 0; i < m->n; i++) *n_out += m->tokens * m->stride[i];
    out = at = malloc(*n_out * sizeof *out);
    for (size_t i = 0; i < *n_out; i++) out[i] = NAN;
    for (size_t i = 0; i < m->n; i++, at += m->tokens * m->stride[i - 1])
        products[i] = (product){&m->w[i], at, m->stride[i]};
    engine with = *g;
    with.block_bytes = engine_block_bytes(g, m->type, m->cols);
    with.blocks = malloc((size_t)g->pool->threads * with.block_bytes);
    pack_activations(g, &a, m->type, m->x, m->x_stride, m->cols, m->tokens);
    matmul(&with, products, m->n, &a);
    free(a.data), free(with.blocks);
    return out;
}

/* Each output of each token against the same row of weights times the same token, alone. */
static int wrong_sums(const engine *g, const problem *m, const float *out) {
    int wrong = 0, kind = pack_kind(g, m->type);
    uint8_t *alone = malloc(pack_bytes(kind, m->cols, 1));
    for (size_t i = 0; i < m->n; i++) {
        size_t rows = m->w[i].rows, bytes = panel_bytes(m->type, m->cols);
        for (size_t t = 0; t < m->tokens; t++, out += m->stride[i]) {
            g->k->pack(kind, m->type == TYPE_INT8, m->x + t * m->x_stride, m->x_stride, m->cols, 1, alone);
            for (size_t p = 0; p < (rows + 15) / 16; p++) {
                float sums[16];
                matmul_of(g->k, m->type, kind)(&(matmul_part){
                    m->w[i].data + p * bytes, alone, 1, m->cols, 1, SIZE_MAX, NULL, sums, 16});
                wrong += memcmp(sums, out + 16 * p, sizeof sums) != 0;
            }
            for (size_t r = round_up(rows, 16); r < m->stride[i]; r++) wrong += !isnan(out[r]);
        }
    }
    free(alone);
    return wrong;
}

/* And against doubles: weights as they unpack, activations as they are. Generous: int8 moves them. */
static int far_sums(const problem *m, const float *out, double tolerance) {
    int wrong = 0;
    float *row = malloc(m->cols * sizeof *row);
    for (size_t i = 0; i < m->n; out += m->tokens * m->stride[i++])
        for (size_t r = 0; r < m->w[i].rows; r++) {
            panel_unpack_row(m->type, m->w[i].data + r / 16 * panel_bytes(m->type, m->cols), r % 16,
                             m->cols, row);
            for (size_t t = 0; t < m->tokens; t++) {
                double sum = 0, squares = 0;
                for (size_t k = 0; k < m->cols; k++) {
                    double p = (double)row[k] * (double)m->x[t * m->x_stride + k];
                    sum += p, squares += p * p;
                }
                wrong += !(fabs((double)out[t * m->stride[i] + r] - sum) <=
                           tolerance * (sqrt(squares) + 0.1));
            }
        }
    free(row);
    return wrong;
}

static void test_threads(const kernel_set *k, int type, bool strict) {
    thread_pool pools[4];
    int wrong = 0;
    for (int i = 0; i < 4; i++) CHECK_EQ(pool_start(&pools[i], i + 1, NULL), MEDRUN_OK);
    for (int run = 0; run < 12; run++) {
        size_t n_out;
        problem m = random_problem(type, 1 + (size_t)run % MOST_PRODUCTS,
                                   run % 3 ? 1 + test_random() % MOST_TOKENS : 1);
        engine g = {.pool = &pools[0], .k = k, .strict = strict};
        float *wanted = run_problem(&g, &m, &n_out);
        wrong += wrong_sums(&g, &m, wanted);
        wrong += far_sums(&m, wanted, type != TYPE_BF16 ? 0.05 : strict ? 1e-5 : 0.02);
        for (int i = 1; i < 4; i++) {
            g.pool = &pools[i];
            float *out = run_problem(&g, &m, &n_out);
            wrong += memcmp(out, wanted, n_out * sizeof *out) != 0;
            free(out);
        }
        free(wanted);
        free_problem(&m);
    }
    if (!CHECK_EQ(wrong, 0)) printf("    %s, %s\n", k->name, type_names[type]);
    for (int i = 0; i < 4; i++) pool_stop(&pools[i]);
}

/* Any cut of the panels of all products gives what the whole gives, at every border between two. */
static void test_ranges(const kernel_set *k) {
    thread_pool pool;
    int wrong = 0;
    if (!CHECK_EQ(pool_start(&pool, 1, NULL), MEDRUN_OK)) return;
    engine g = {.pool = &pool, .k = k, .strict = true, .cache = 4096};
    for (int run = 0; run < 12; run++) {
        problem m = random_problem(run % 2 ? TYPE_INT8 : TYPE_BF16, 3, 1 + (size_t)run % 5);
        size_t n_out, panels = 0;
        float *wanted = run_problem(&g, &m, &n_out), *out = malloc(n_out * sizeof *out), *at = out;
        product products[3];
        packed a = {.data = malloc(pack_bytes(pack_kind(&g, m.type), m.cols, m.tokens))};
        pack_activations(&g, &a, m.type, m.x, m.x_stride, m.cols, m.tokens);
        wrong += a.kind != pack_kind(&g, m.type) || a.tokens != m.tokens || a.cols != m.cols;
        for (size_t i = 0; i < 3; at += m.tokens * m.stride[i++]) {
            products[i] = (product){&m.w[i], at, m.stride[i]};
            panels += tensor_panels(&m.w[i]);
        }
        matmul_job j = {&g, products, products + 3, &a, 128};
        for (size_t step = 1; step <= panels; step += 1 + step / 3) {
            for (size_t i = 0; i < n_out; i++) out[i] = NAN;
            for (size_t p = 0; p < panels; p += step)
                matmul_task(&j, p, p + step < panels ? p + step : panels, 0);
            wrong += memcmp(out, wanted, n_out * sizeof *out) != 0;
        }
        free(a.data), free(out), free(wanted);
        free_problem(&m);
    }
    CHECK_EQ(wrong, 0);
    pool_stop(&pool);
}

static void test_kinds(const kernel_set *k) {
    engine g = {.k = k}, strict = {.k = k, .strict = true};
    CHECK_EQ(pack_kind(&g, TYPE_INT8), k->int_pack);
    CHECK_EQ(pack_kind(&strict, TYPE_INT8), k->int_pack);
    CHECK_EQ(pack_kind(&g, TYPE_INT4), k->int_pack);
    CHECK_EQ(pack_kind(&g, TYPE_BF16), k->bf16_dot ? PACK_BF16 : PACK_F32);
    CHECK_EQ(pack_kind(&strict, TYPE_BF16), PACK_F32);
}

int main(void) {
    const kernel_set *sets[N_KERNEL_SETS];
    int n = usable_kernels(sets);
    for (int i = 0; i < n; i++) {
        test_kinds(sets[i]);
        test_threads(sets[i], TYPE_INT8, false);
        test_threads(sets[i], TYPE_INT4, false);
        test_threads(sets[i], TYPE_BF16, true);
        test_threads(sets[i], TYPE_BF16, false);
        test_ranges(sets[i]);
    }
    return report();
}
