/* Tests of tools/explain.c and of medrun_edit: what an editor may do; contributions that add up;
 * the same numbers for any chunks, threads and kernels; budgets; hostile text. What transformers
 * says is compared by tools/reference/explain_fixtures.py. Run in the repository root. */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#ifndef ALL_EVAL                /* all_eval.c has included it                                    */
#define MEDRUN_EXPLAIN_NO_MAIN
#include "../tools/explain.c"
#include "test.h"
#endif

static const char *const folders[] = {"llama-plain", "llama-tied", "llama-grouped",
                                      "mistral-window", "arcee-yarn", "apertus-grouped"};
enum { N_FOLDERS = sizeof folders / sizeof *folders };

static void path_of(const char *folder, const char *type, char path[256]) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    snprintf(path, 256, "%s/%s-%s.mdr", build ? build : "build", folder, type);
}

/* ---- medrun_edit --------------------------------------------------------------------------- */

typedef struct {
    int calls, forbidden;
    const char *stage;                  /* that is changed, in layer 1; NULL: none              */
    float seen, written;                /* by the observer, by the editor                       */
} editing;

static void edit(void *user, const char *stage, int layer, size_t rows, size_t cols, size_t stride,
                 float *data) {
    editing *t = user;
    t->calls++;
    t->forbidden += !strcmp(stage, "k") || !strcmp(stage, "v");
    if (!t->stage || strcmp(stage, t->stage) || (layer != 1 && layer >= 0)) return;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) data[r * stride + c] *= 0.5f;
    t->written = data[(rows - 1) * stride + cols - 1];
}

static void see(void *user, const char *stage, int layer, size_t rows, size_t cols, size_t stride,
                const float *data) {
    editing *t = user;
    if (t->stage && !strcmp(stage, t->stage) && (layer == 1 || layer < 0))
        t->seen = data[(rows - 1) * stride + cols - 1];
}

static void test_edit(void) {
    static const char *const stages[] = {"embed", "attn_norm", "q", "attn_out", "attn_resid",
                                         "ffn_norm", "ffn_act", "layer_out", "final_norm",
                                         "logits"};
    static const int32_t ids[] = {3, 1, 4, 1, 5, 9, 2, 6};
    char path[256];
    medrun_model *m;
    medrun_error e = {0};
    path_of("llama-grouped", "int8", path);
    if (medrun_open(&m, path, NULL, &e)) { printf("%s\n", e.text); exit(1); }
    size_t n = (size_t)m->config.vocab_size * sizeof(float);
    float *plain = malloc(n);
    medrun_session *s;
    CHECK(!medrun_start(&s, m, &(medrun_session_options){.context = 16}, NULL, 0, &e));
    for (int i = -2; i < 10; i++) {
        editing t = {.stage = i < 0 ? NULL : stages[i]};
        medrun_rewind(s, 0, NULL);
        medrun_edit(s, i == -2 ? NULL : edit, &t);
        medrun_observe(s, see, &t);
        CHECK(!medrun_feed(s, ids, 8, &e));
        while (medrun_pending(s)) CHECK(!medrun_step(&s, 1, &e));
        bool same = i > -2 && !memcmp(plain, medrun_logits(s, 0), n);
        if (i == -2) memcpy(plain, medrun_logits(s, 0), n);
        else if (i == -1) CHECK(same && t.calls == 3 + 7 * m->config.n_layers);
        else CHECK(!same && float_bits(t.seen) == float_bits(t.written));
        CHECK_EQ(t.forbidden, 0);
    }
    medrun_edit(s, NULL, NULL), medrun_observe(s, NULL, NULL);
    medrun_rewind(s, 0, NULL);
    CHECK(!medrun_feed(s, ids, 8, &e));
    while (medrun_pending(s)) CHECK(!medrun_step(&s, 1, &e));
    CHECK(!memcmp(plain, medrun_logits(s, 0), n));      /* taken away, nothing is changed        */
    free(plain);
    medrun_stop(s), medrun_close(m);
}

/* ---- quantities ---------------------------------------------------------------------------- */

static const block *block_of(const explain *x, const char *name) {
    for (size_t i = 0; i < x->page.n_blocks; i++)
        if (!strcmp(x->page.blocks[i].name, name)) return &x->page.blocks[i];
    static const block none;
    printf("no block %s\n", name);
    return &none;
}

static const float *floats_of(const explain *x, const char *name) {
    return (const float *)(const void *)(x->page.bin.data + block_of(x, name)->at);
}

/* Runs MODEL on its first N ids of the fixture. X is closed by the caller. */
static int explain_ids(explain *x, const char *folder, const char *type, int n, const char *kv,
                       const char *threads, const char *batch) {
    static char ids[4096], path[256], name[256];
    int32_t list[64];
    medrun_error e = {0};
    snprintf(name, sizeof name, "tests/fixtures/%s/ids_64.i32", folder);
    FILE *f = fopen(name, "rb");
    size_t have = f ? fread(list, sizeof *list, 64, f) : 0;
    if (f) fclose(f);
    ids[0] = 0;
    for (int i = 0; i < n && (size_t)i < have; i++)
        snprintf(ids + strlen(ids), sizeof ids - strlen(ids), "%d ", list[i]);
    path_of(folder, type, path);
    *x = (explain){.v.fd = -1, .model = path};
    x->o = (explain_options){.ids = ids, .json = "-", .quiet = true, .kv = kv, .threads = threads,
                             .batch = batch, .predict = "0", .attention = "all", .budget = "50",
                             .strict = !strcmp(type, "bf16"), .ablate = "auto", .mid = true};
    if (open_explained(x, &e) || choose_place(x, &e) || plan_page(x, &e) || run_watched(x, &e) ||
        compute_facts(x, &e) || run_more(x, &e)) printf("%s: %s\n", path, e.text);
    return e.code;
}

/* Parts and heads add up to what they are parts of; weights of a row to 1; the lens ends at the
 * model's own logits. */
static void test_sums(const char *folder, const char *type, const char *kv, int n) {
    static explain x;
    double parts = 0, worst = 0, row = 0, apart = 0;
    if (!CHECK(!explain_ids(&x, folder, type, n, kv, NULL, NULL))) { close_explained(&x); return; }
    const float *part = floats_of(&x, "parts"), *head = floats_of(&x, "heads");
    for (size_t i = 0; i < x.streams; i++) parts += (double)part[i];
    double rest = (double)floats_of(&x, "rest")[0], total = (double)floats_of(&x, "total")[0];
    for (size_t l = 0; l < x.L; l++) {
        double sum = 0;
        for (size_t h = 0; h < x.H; h++) sum += (double)head[l * x.H + h];
        worst = fmax(worst, fabs(sum - (double)part[2 * l + 1]));
    }
    for (size_t at = 0; at < x.rows; at++)
        for (size_t i = 0; i < x.L * x.H; i++) {
            double sum = 0;
            for (size_t s = 0; s <= at; s++)
                sum += (double)weight_at(&x, at, i / x.H, i % x.H, s);
            row = fmax(row, fabs(sum - 1));
        }
    const block *split = block_of(&x, "split");
    const uint32_t *which = (const uint32_t *)(const void *)(x.page.bin.data +
                                                              block_of(&x, "split_head")->at);
    for (size_t i = 0; i < split->dims[0]; i++) {
        double sum = 0;
        for (size_t s = 0; s < split->dims[1]; s++)
            sum += (double)floats_of(&x, "split")[i * split->dims[1] + s];
        apart = fmax(apart, fabs(sum - (double)head[which[2 * i] * x.H + which[2 * i + 1]]));
    }
    bool exact = !strcmp(type, "bf16");
    printf("%s %s %s, %d tokens: rest %.2g, sum %.2g, heads %.2g, tokens %.2g, weights %.2g\n",
           folder, type, kv, n, rest, parts + rest - total, worst, apart, row);
    CHECK(fabs(parts + rest - total) <= 1e-4);
    CHECK(fabs(rest) <= (exact ? 1e-4 : 0.05));
    CHECK(worst <= (exact || x.D % GROUP == 0 ? 1e-5 : 0.02));  /* else heads share a scale      */
    CHECK(apart <= (exact ? 1e-4 : 0.02));              /* int8: activations were rounded, here not */
    CHECK(row <= (!strcmp(kv, "int8") ? 1e-3 : 2e-6));
    for (size_t i = 0; i < x.n_places; i++)
        CHECK(floats_of(&x, "lens_kl")[(i + 1) * x.lens_rows - 1] == 0);
    lens_logits(&x.b, x.last + (x.rows - 1) * x.d, x.d, 1);
    medrun_rewind(x.s, 0, NULL);
    CHECK(!medrun_feed(x.s, ids_at(&x.tokens, 0), x.rows, NULL));
    while (medrun_pending(x.s)) CHECK(!medrun_step(&x.s, 1, NULL));
    CHECK(!memcmp(x.b.logits, medrun_logits(x.s, 0), x.V * sizeof(float)));
    close_explained(&x);
}

/* Products with the transpose, from anywhere to anywhere, beside the engine's own columns. */
static void test_transposed(void) {
    static const char *const types[] = {"bf16", "int8", "int4"};
    for (int f = 0; f < N_FOLDERS; f++)
        for (int t = 0; t < 3; t++) {
            char path[256];
            medrun_model *m;
            medrun_session *s;
            medrun_error e = {0};
            side b;
            path_of(folders[f], types[t], path);
            if (!CHECK(!medrun_open(&m, path, NULL, &e))) continue;
            medrun_session_options options = {.context = 16, .strict = t == 0};
            CHECK(!medrun_start(&s, m, &options, NULL, 0, &e) && !start_side(&b, s, &e));
            const tensor *const all[] = {&m->layers[0].o, &m->layers[0].down};
            for (int k = 0; k < 2; k++) {
                const tensor *w = all[k];
                double u[1024], worst = 0, most = 0;
                float room[4096 + GROUP];
                for (size_t r = 0; r < w->rows; r++) u[r] = sin((double)(r + 1));
                for (size_t first = 0; first < w->cols; first += w->cols / 3 + 1) {
                    size_t end = first + w->cols / 3 + 1 < w->cols ? first + w->cols / 3 + 1
                                                                    : w->cols;
                    const float *found = transposed(&b, w, u, first, end, room);
                    for (size_t c = first; c < end; c++) {
                        unit_columns(&b, w, c, 1, b.out, side_out(&b));
                        double sum = dot_of(b.out, u, w->rows) / (double)UNIT_INPUT;
                        worst = fmax(worst, fabs(sum - (double)found[c - first]));
                        most = fmax(most, fabs(sum));
                    }
                }
                CHECK(w->rows <= 1024 && w->cols <= 4096 && most > 0 && worst <= 2e-6 * most);
            }
            stop_side(&b);
            medrun_stop(s), medrun_close(m);
        }
}

/* The digest of all blocks. */
static void test_same(void) {
    static const char *const types[] = {"int8", "int4", "bf16"};
    static const char *const how[][2] = {{"1", NULL}, {"2", NULL}, {"2", "7"}, {"1", "1"}};
    for (int t = 0; t < 3; t++) {
        uint8_t first[32], found[32];
        for (int i = 0; i < 8; i++) {
            static explain x;
            if (i >= 4) setenv("MEDRUN_KERNELS", "scalar", 1);
            CHECK(!explain_ids(&x, "llama-grouped", types[t], 30, "f16", how[i % 4][0],
                               how[i % 4][1]));
            unsetenv("MEDRUN_KERNELS");
            buffer_add(&x.page.bin, x.more.data, x.more.n);
            sha256_of(x.page.bin.data, x.page.bin.n, i ? found : first);
            if (i) CHECK(!memcmp(first, found, 32));
            close_explained(&x);
        }
    }
}

/* ---- the page ------------------------------------------------------------------------------ */

static void test_packing(void) {
    double worst = 0, share = 0;
    for (int i = 0; i <= 10000; i++) {
        double a = i / 10000.0, root = pack_share((float)a) / 255.0, back = root * root;
        worst = fmax(worst, fabs(back - a));
        if (a >= 0.01) share = fmax(share, fabs(back - a) / a);
    }
    CHECK(worst <= 0.004 && share <= 0.04);
    for (size_t n = 0; n < 5; n++) {
        static const char *const wanted[] = {"", "TQ==", "TWE=", "TWFu", "TWFuPA=="};
        buffer b = {0};
        write_base64((const uint8_t *)"Man<", n, &b);
        CHECK(b.n == strlen(wanted[n]) && (!b.n || !memcmp(b.data, wanted[n], b.n)));
        buffer_free(&b);
    }
    buffer in = {0}, out = {0};
    buffer_text(&in, "a</script><b");
    add_script_text(&in, &out);
    CHECK(!strcmp(text_of(&out), "a\\u003c/script>\\u003cb"));
    buffer_free(&in);
    buffer_free(&out);
}

int main(void) {
    (void)explain_main, (void)eval_main;
    test_edit();
    test_transposed();
    for (int f = 0; f < N_FOLDERS; f++) {
        test_sums(folders[f], "bf16", "f32", 30);
        test_sums(folders[f], "int8", "f16", 30);
        test_sums(folders[f], "int4", "int8", f % 2 ? 1 : 30);
    }
    test_same();
    test_packing();
    return report();
}
