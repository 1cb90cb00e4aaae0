/* A part of medrun-export, included by tools/export.c: --calibrate. */

/* ============================================================================================
 * 10 Calibration: which columns of a matrix count, seen on a text
 *
 * An error of a weight counts as much as what it is multiplied by is large, and that differs from
 * column to column. So the engine runs a text through the int4 file as it is, an observer adds up
 * the squares of what each matrix is multiplied by, and the matrices are packed again, in place,
 * with scales that suit the columns that count. int4 gives the same bits on every machine and for
 * any number of threads, and sums are taken token by token: so the file is the same everywhere.
 * ============================================================================================ */

/* Tokens of each of MAX_WINDOWS places; the engine takes fewer at once, as Ctrl-C waits for it. A
 * place has so many bytes at least, where the text is short, and at most: 512 tokens have fewer. */
enum { WINDOW_TOKENS = 512, WINDOW_CHUNK = 128, WINDOW_LEAST = 2048, WINDOW_MOST = 8192 };

/* Beside its own size a column counts by this share of the mean: one that was never seen to be
 * other than zero is not free to be anything. */
static const double IMPORTANCE_FLOOR = 0.05;

/* What matrices are multiplied by: q, k and v; o; gate and up; down. */
static const char *const input_stages[N_INPUTS] = {"attn_norm", "attn_out", "ffn_norm", "ffn_act"};

/* Where characters begin: the first place from AT on. */
static size_t character_at(const file_map *map, size_t at) {
    while (at < map->n && (map->data[at] & 0xC0) == 0x80) at++;
    return at;
}

static int check_text(const file_map *map, const char *path, medrun_error *e) {
    size_t at = utf8_valid(map->data, map->n);
    const uint8_t *nul = memchr(map->data, 0, at);
    if (nul) at = (size_t)(nul - map->data);
    if (at == map->n) return MEDRUN_OK;
    return refuse(e, "%s: byte %zu: found what is no UTF-8 text, wanted a text file", path, at);
}

/* The ids of the windows of a text, which lie as far apart as it is long. Control tokens that are
 * written in it count as such, so that it can hold conversations. */
static int tokenize_windows(exporter *x, const file_map *map, medrun_error *e) {
    calibration *c = &x->calibration;
    size_t most = (size_t)x->source.config.max_positions;
    size_t step = (map->n + MAX_WINDOWS - 1) / MAX_WINDOWS;
    int flags = MEDRUN_PARSE_SPECIAL | (x->tokenizer.bos >= 0 ? MEDRUN_ADD_BOS : 0);
    buffer ids = {0};
    if (most > WINDOW_TOKENS) most = WINDOW_TOKENS;
    if (step < WINDOW_LEAST) step = WINDOW_LEAST;
    for (size_t at = 0; !e->code && at < map->n; at += step) {
        size_t begin = character_at(map, at), end = map->n - at < step ? map->n : at + step;
        if (end - at > WINDOW_MOST) end = at + WINDOW_MOST;
        end = character_at(map, end);
        ids.n = 0;
        if (tokenizer_encode(&x->tokenizer, (const char *)map->data + begin, end - begin, flags,
                             &ids, e)) break;
        size_t n = ids.n / 4 < most ? ids.n / 4 : most;
        buffer_add(&c->ids, ids.data, n * 4);
        c->window[c->n_windows++] = n;
        if (ids.failed || c->ids.failed) out_of_memory(e, ids.n);
    }
    buffer_free(&ids);
    return e->code;
}

/* Reads --calibrate's file, which becomes part of the provenance. */
static int plan_calibration(exporter *x, medrun_error *e) {
    const char *path = x->options.calibrate, *slash = path ? last_slash(path) : NULL;
    size_t used = strlen(x->precision);
    file_map map;
    if (!path || map_file(path, &map, e)) return e->code;
    if (!check_text(&map, path, e) && !tokenize_windows(x, &map, e))
        add_file(&x->source, slash ? slash + 1 : path, path, &map, e);
    unmap_file(&map);
    size_t n = x->calibration.ids.n / 4;
    if (!e->code && n < WINDOW_TOKENS)
        refuse(e, "%s: found %zu tokens, wanted at least %d, best %d or more", path, n,
               WINDOW_TOKENS, MAX_WINDOWS * WINDOW_TOKENS);
    snprintf(x->precision + used, sizeof x->precision - used,
             "; scales fitted to what %zu tokens of a text gave", n);
    return e->code;
}

/* ---- running the text ---------------------------------------------------------------------- */

/* The observer: adds the squares of each column, token after token. The first token of a window is
 * left out. Attention is parked there, on activations a thousand times those of any other token,
 * whose errors nobody notices. */
static void see_inputs(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, const float *data) {
    calibration *c = user;
    int input = 0;
    while (input < N_INPUTS && strcmp(input_stages[input], stage)) input++;
    if (layer < 0 || input == N_INPUTS) return;
    double *squares = c->squares + (size_t)layer * c->at[N_INPUTS] + c->at[input];
    for (size_t r = c->opening; r < rows; r++)
        for (size_t k = 0; k < cols; k++)
            squares[k] += (double)data[r * stride + k] * (double)data[r * stride + k];
}

/* DONE tokens are done, N of them now. Not on a terminal: a line for each quarter. */
static void draw_calibration(const exporter *x, size_t done, size_t n) {
    size_t all = x->calibration.ids.n / 4;
    if (x->terminal) fprintf(stderr, "\r%76s\rcalibrating: %zu of %zu tokens ", "", done, all);
    else if (done * 4 / all > (done - n) * 4 / all)
        fprintf(stderr, "calibrating: %zu of %zu tokens\n", done, all);
}

static int run_windows(exporter *x, medrun_session *s, medrun_error *e) {
    calibration *c = &x->calibration;
    const int32_t *ids = (const void *)c->ids.data;
    size_t done = 0;
    for (size_t w = 0; !e->code && w < c->n_windows; w++) {
        size_t end = done + c->window[w];
        if (medrun_rewind(s, 0, e)) break;
        for (c->opening = 1; !e->code && done < end; c->opening = 0) {
            size_t n = end - done < WINDOW_CHUNK ? end - done : WINDOW_CHUNK;
            if (medrun_feed(s, ids + done, n, e) || step_pending(s, e)) break;
            draw_calibration(x, done += n, n);
        }
    }
    return e->code;
}

/* Mean squares -> importances with mean 1. */
static int weigh_columns(const double *squares, size_t n, float *importance, medrun_error *e) {
    double sum = 0;
    for (size_t k = 0; k < n; k++) sum += squares[k];
    if (!(sum <= DBL_MAX))
        return fail(e, MEDRUN_FAILED, "the model computes activations that are not finite");
    for (size_t k = 0; k < n; k++) {
        double share = sum > 0 ? squares[k] / sum * (double)n : 1;
        importance[k] = (float)(share * (1 - IMPORTANCE_FLOOR) + IMPORTANCE_FLOOR);
    }
    return MEDRUN_OK;
}

static int gather(exporter *x, medrun_error *e) {
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    medrun_session_options o = {.context = WINDOW_TOKENS, .batch = WINDOW_CHUNK};
    if (x->source.config.max_positions < o.context) o.context = x->source.config.max_positions;
    medrun_options open = {.threads = x->threads, .kernels = x->kernels->name};
    if (medrun_open(&m, x->partial, &open, e)) return e->code;
    if (!medrun_start(&s, m, &o, NULL, 0, e)) {
        medrun_observe(s, see_inputs, &x->calibration);
        run_windows(x, s, e);
    }
    medrun_stop(s);
    medrun_close(m);
    return e->code;
}

/* Lays out the sums, gathers, and gives each matrix its importances. */
static int calibrate(exporter *x, medrun_error *e) {
    calibration *c = &x->calibration;
    const model_config *k = &x->source.config;
    size_t hidden = (size_t)k->hidden_size, heads = (size_t)k->n_heads * (size_t)k->head_dim;
    const size_t columns[N_INPUTS] = {hidden, heads, hidden, (size_t)k->ffn_size};
    for (size_t i = 0; i < N_INPUTS; i++) c->at[i + 1] = c->at[i] + columns[i];
    size_t n = (size_t)k->n_layers * c->at[N_INPUTS];
    c->squares = new_array(n, sizeof *c->squares);
    c->importance = new_array(n, sizeof *c->importance);
    if (!c->squares || !c->importance) return out_of_memory(e, n * sizeof *c->squares);
    if (gather(x, e)) return e->code;
    for (size_t i = 0; !e->code && i < (size_t)k->n_layers * N_INPUTS; i++) {
        size_t at = i / N_INPUTS * c->at[N_INPUTS] + c->at[i % N_INPUTS];
        weigh_columns(c->squares + at, columns[i % N_INPUTS], c->importance + at, e);
    }
    for (size_t i = 0; i < x->n_sections; i++) {
        section *t = &x->sections[i];
        if (t->type != TYPE_INT4) continue;
        t->importance = c->importance + t->layer * c->at[N_INPUTS] + c->at[t->input];
    }
    return e->code;
}

/* The matrices once more, with what the text showed. */
static int write_calibrated(exporter *x, medrun_error *e) {
    size_t n = 0;
    double began = seconds();
    if (!x->options.calibrate) return MEDRUN_OK;
    if (calibrate(x, e)) return e->code;
    x->start += seconds() - began;          /* the rate is that of reading                        */
    for (size_t i = 0; i < x->n_sections; i++)
        if (x->sections[i].importance) plan_job(x, &x->sections[i], &n);
    return run_parallel(x, n, run_jobs, e);
}

static void free_calibration(calibration *c) {
    buffer_free(&c->ids);
    free(c->squares);
    free(c->importance);
}
