/* The engine of the course: medrun.c, and the few calls of course.h that need its inside. Compiled
 * once; exercises are linked to it. MIT licence, see LICENSE. */
#define MEDRUN_NO_MAIN
#include "medrun.c"
#include "course.h"

medrun_model *demo;
medrun_info facts;

/* ---- lessons 1, 2, 8: pieces, control tokens, candidates ------------------------------------- */

size_t demo_word(const char *text, size_t n) {
    return n ? next_word(demo->tokenizer.pretokenizer, (const uint8_t *)text, n) : 0;
}

size_t demo_bytes(const char *text, size_t n, int32_t *ids) {
    bpe_symbol *symbols = new_array(n, sizeof *symbols);
    n = symbols ? first_symbols(&demo->tokenizer, (const uint8_t *)text, n, symbols) : 0;
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)symbols[i].id;
    free(symbols);
    return n;
}

bool demo_merge(int32_t left, int32_t right, int32_t *rank, int32_t *result) {
    const pair_slot *s = find_pair(&demo->tokenizer, (uint32_t)left, (uint32_t)right);
    if (s->rank == UINT32_MAX) return false;
    *rank = (int32_t)s->rank, *result = (int32_t)s->result;
    return true;
}

const char *demo_piece(int32_t id) {
    static char text[8][64];
    static unsigned next;
    size_t n;
    const char *piece = tokenizer_piece(&demo->tokenizer, id, &n);
    char *to = text[next++ % 8];
    snprintf(to, sizeof *text, "%.*s", (int)n, piece);
    return to;
}

int32_t demo_control(const char *name) {
    int32_t ids[MOST_IDS];
    return demo_tokens(name, true, ids) == 1 ? ids[0] : -1;
}

size_t demo_tokens(const char *text, bool trust, int32_t *ids) {
    size_t n = 0;
    medrun_tokenize(demo, text, strlen(text), trust ? MEDRUN_PARSE_SPECIAL : 0, ids, MOST_IDS, &n,
                    NULL);
    return n < MOST_IDS ? n : MOST_IDS;
}

void demo_order(const float *logits, size_t n, int32_t *ids) {
    uint64_t *list = calloc(n, sizeof *list);
    size_t left = n;
    if (!list) exit(1);
    for (size_t i = 0; i < n; i++) list[i] = candidate_of(logits[i], i);
    for (size_t i = n / 2; i-- > 0;) heap_sink(list, n, i);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(uint32_t)heap_pop(list, &left);
    free(list);
}

/* As medrun_sample draws in a session with this seed; TICKET: the random number that it takes. */
int32_t engine_draw(const float *logits, double temperature, double top_p, uint64_t seed,
                    double *ticket) {
    size_t n = (size_t)facts.vocab_size;
    uint64_t *list = calloc(n, sizeof *list), state = seed;
    medrun_sampling s = {.temperature = (float)temperature, .top_p = (float)top_p,
                         .repeat_penalty = 1};
    if (!list) exit(1);
    int32_t id = sample_token(list, logits, n, NULL, &s, &state, NULL, 0);
    *ticket = random_uniform(&seed);
    free(list);
    return id;
}

double engine_log_sum(const float *logits) { return log_sum(logits, (size_t)facts.vocab_size); }

/* ---- a recorded pass ------------------------------------------------------------------------- */

typedef struct {
    char stage[12];
    int layer;
    size_t rows, cols;
    float *data;
} recorded;

struct recording {
    recorded *all;
    size_t n;
};

static void record(void *user, const char *stage, int layer, size_t rows, size_t cols,
                   size_t stride, const float *data) {
    recording *r = user;
    recorded *grown = realloc(r->all, (r->n + 1) * sizeof *grown);
    float *copy = calloc(rows * cols, sizeof *copy);
    if (!grown || !copy) exit(1);
    r->all = grown;
    for (size_t i = 0; i < rows; i++)
        memcpy(copy + i * cols, data + i * stride, cols * sizeof *copy);
    recorded *to = &r->all[r->n++];
    *to = (recorded){.layer = layer, .rows = rows, .cols = cols, .data = copy};
    snprintf(to->stage, sizeof to->stage, "%s", stage);
}

/* All rows are wanted, so that the last layer finishes all of them. */
recording *demo_run(const int32_t *ids, size_t n, int kv) {
    medrun_session *s = NULL;
    medrun_error e = {0};
    recording *r = calloc(1, sizeof *r);
    medrun_session_options o = {.context = MOST_IDS, .logit_rows = (int)n, .kv = kv};
    if (!r || medrun_start(&s, demo, &o, NULL, 0, &e) || medrun_feed(s, ids, n, &e)) {
        fprintf(stderr, "%s\n", e.text);
        exit(1);
    }
    medrun_observe(s, record, r);
    if (medrun_step(&s, 1, &e)) exit(1);
    medrun_stop(s);
    return r;
}

const float *demo_stage(const recording *r, const char *stage, int layer, size_t *rows,
                        size_t *cols) {
    for (size_t i = 0; i < r->n; i++) {
        const recorded *x = &r->all[i];
        if (strcmp(x->stage, stage) || x->layer != layer) continue;
        if (rows) *rows = x->rows;
        if (cols) *cols = x->cols;
        return x->data;
    }
    fprintf(stderr, "no stage %s in layer %d\n", stage, layer);
    exit(1);
}

void demo_forget(recording *r) {
    for (size_t i = 0; i < r->n; i++) free(r->all[i].data);
    free(r->all);
    free(r);
}

size_t demo_ask(const char *question, int32_t *ids) {
    size_t n = 0;
    medrun_message m = {"user", question, strlen(question)};
    medrun_render(demo, NULL, NULL, &m, 1, true, ids, MOST_IDS, &n, NULL);
    return n;
}

/* ---- numbers and weights --------------------------------------------------------------------- */

/* How medrun rounds what it multiplies by int4 weights: 64 numbers, which are not turned before. */
float engine_int8(const float *x, int8_t *q) { return quantise_group(TYPE_INT4, x, GROUP, q); }

double engine_cache_bytes(int tokens, int kv) {
    kv_cache cache;
    arena counts = {NULL, 0};
    layout_cache(&cache, &demo->config, tokens, kv, &counts);
    return (double)counts.at;
}

static void times(const tensor *w, const float *x, float *out) {
    plain_matmul(w->type, w->data, w->rows, w->cols, x, 0, 1, out, 0);
}

void engine_gate_up(int layer, const float *h, float *gate, float *up) {
    times(&demo->layers[layer].gate, h, gate);
    times(&demo->layers[layer].up, h, up);
}

static const uint8_t *panel_of(const tensor *w, size_t row) {
    return w->data + row / LANES * panel_bytes(w->type, w->cols);
}

double engine_difference(const float *x, int32_t a, int32_t b) {
    const tensor *w = &demo->output;
    size_t n = w->cols, ra = (size_t)a, rb = (size_t)b;
    float *h = calloc(n, sizeof *h);
    if (!h) exit(1);
    demo->kernels->norm(h, x, demo->final_norm, n, demo->config.norm_eps);
    double found = (double)plain_dot(w->type, panel_of(w, ra), ra % LANES, n, h) -
                   (double)plain_dot(w->type, panel_of(w, rb), rb % LANES, n, h);
    free(h);
    return found;
}

const float *weights_norm(int which, int layer) {
    return which == NORM_FINAL ? demo->final_norm : which == NORM_FFN ? demo->layers[layer].ffn_norm

                                        : demo->layers[layer].attn_norm;
}

float weights_eps(void) { return demo->config.norm_eps; }

static void unpack(const tensor *w, size_t row, float *out) {
    panel_unpack_row(w->type, panel_of(w, row), row % LANES, w->cols, out);
}

void weights_output(int32_t id, float *row) { unpack(&demo->output, (size_t)id, row); }

void weights_columns(int layer, float *columns) {
    const tensor *w = &demo->layers[layer].down;
    size_t rows = w->rows, cols = w->cols;
    float *row = calloc(cols, sizeof *row);
    if (!row) exit(1);
    for (size_t r = 0; r < rows; r++) {
        unpack(w, r, row);
        for (size_t c = 0; c < cols; c++) columns[c * rows + r] = row[c];
    }
    free(row);
}

/* The model must have been opened with medrun_options.load: then its weights are this process's
 * own. Every second line of 64 bytes from group_steps on holds whole numbers. */
static void coarsen(const tensor *w, const uint8_t *from, int step) {
    size_t groups = (w->cols + GROUP - 1) / GROUP, bytes = panel_bytes(w->type, w->cols);
    for (size_t panel = 0; panel * LANES < w->rows; panel++)
        for (size_t g = 0; g < groups; g++) {
            size_t at = panel * bytes + group_steps(w->type, g);
            uint8_t *to = (uint8_t *)(uintptr_t)(w->data + at);
            for (size_t i = 0; i < GROUP_BYTES; i++) {
                float whole = (float)((int)from[at + i] - 128) / (float)step;
                int q = round_even(whole) * step;
                to[i] = (uint8_t)((q > 127 ? q - step : q < -127 ? q + step : q) + 128);
            }
        }
}

void weights_coarser(int step) {
    static uint8_t *kept[1024];
    size_t n = 0;
    for (int l = 0; l < demo->config.n_layers; l++) {
        const model_layer *y = &demo->layers[l];
        const tensor *all[] = {&y->q, &y->k, &y->v, &y->o, &y->gate, &y->up, &y->down};
        for (size_t i = 0; i < sizeof all / sizeof *all && n < 1024; i++, n++) {
            size_t bytes = (size_t)tensor_bytes(all[i]->type, all[i]->rows, all[i]->cols);
            if (!kept[n] && (kept[n] = malloc(bytes))) memcpy(kept[n], all[i]->data, bytes);
            if (!kept[n]) exit(1);
            coarsen(all[i], kept[n], step);
        }
    }
}

/* A copy of the checkpoint whose whole numbers are multiples of STEP, for medrun-explain --compare.
 * `medrun verify` says of it that it is not what its header promises: it is not. */
bool weights_write_coarser(const char *path, int step) {
    FILE *f = fopen(path, "wb");
    weights_coarser(step);
    const file_map *map = &demo->file.map;
    bool ok = f && fwrite(map->data, 1, map->n, f) == map->n;
    weights_coarser(1);
    return f && !fclose(f) && ok;
}
