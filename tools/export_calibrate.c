/* A part of medrun-export, included by tools/export.c: --calibrate. */

/* ============================================================================================
 * 10 Calibration: int4's errors made good, by what is seen on a text
 *
 * What a matrix is multiplied by differs from column to column, and columns go together. So the
 * error of a weight that was rounded can be made good in the columns behind it, as far as they go
 * together with its own (GPTQ, Frantar et al. 2023). How far that is says the matrix of second
 * moments H, the products of two columns added up over a text: the error of an output is e^T H e.
 * With H = R R^T for an upper triangular R, column j takes the share R[k][j] / R[j][j] of each
 * error that columns k < j have left, and then the loss is the sum of (R[j][j] * what was rounded
 * off)^2 (LDLQ, Chee et al. 2023).
 *
 * The layers are done in their order. The engine runs the text through the layer before, which is
 * done, and the next as it was packed first; an observer adds up H; the layer's matrices are
 * rounded again. Thus each layer is fitted to what those before it really give. Two layers run at
 * a time, and the residual stream of the whole text is in memory. int4 gives the same bits on
 * every machine and for any number of threads, and each sum here has one order: so the file is the
 * same everywhere.
 * ============================================================================================ */

/* Tokens of each of MAX_WINDOWS places; the engine takes fewer at once, as Ctrl-C waits for it. A
 * place has so many bytes at least, where the text is short, and at most: 512 tokens have fewer. */
enum { WINDOW_TOKENS = 512, WINDOW_CHUNK = 256, WINDOW_LEAST = 2048, WINDOW_MOST = 8192 };

enum { MOST_CALIBRATION = 1 << 30 };    /* bytes of a text */

/* Columns whose errors are made good in each other: all, as far as the memory beside the running
 * model stays below MOST_MOMENTS bytes, else in blocks, no smaller than the least. */
enum { WIDEST_BLOCK = 4096, LEAST_BLOCK = 256, MOST_MOMENTS = 1 << 30 };

/* Rows that are rounded at once, two panels, and with them what the same rows would be without. */
enum { UNIT = 2 * LANES, UNIT_LANES = 2 * UNIT };

/* Beside its own size a column counts by this share of the mean: one that was never seen to be
 * other than zero is not free to be anything. */
static const float DAMPING = 0.01f;

/* What matrices are multiplied by: q, k and v; o; gate and up; down. */
static const char *const input_stages[N_INPUTS] = {"attn_norm", "attn_out", "ffn_norm", "ffn_act"};

/* Where characters begin: the first place from AT on. */
static size_t character_at(const file_map *map, size_t at) {
    while (at < map->n && (map->data[at] & 0xC0) == 0x80) at++;
    return at;
}

/* A NUL is looked for first: a file with a large hole is refused at once. */
static int check_text(const file_map *map, const char *path, medrun_error *e) {
    if (map->n > MOST_CALIBRATION)
        return refuse(e, "%s: found %zu bytes, wanted at most %d; take a part of it", path, map->n,
                      MOST_CALIBRATION);
    const uint8_t *nul = memchr(map->data, 0, map->n);
    size_t at = utf8_valid(map->data, nul ? (size_t)(nul - map->data) : map->n);
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
    file_map text = map;                                /* without a byte order mark             */
    if (map.n >= 3 && !memcmp(map.data, "\xEF\xBB\xBF", 3)) text.data += 3, text.n -= 3;
    if (!check_text(&map, path, e) && !tokenize_windows(x, &text, e))
        add_file(&x->source, slash ? slash + 1 : path, path, &map, e);
    unmap_file(&map);
    size_t n = x->calibration.ids.n / 4;
    if (!e->code && n < WINDOW_TOKENS)
        refuse(e, "%s: found %zu tokens, wanted at least %d, best %d or more", path, n,
               WINDOW_TOKENS, MAX_WINDOWS * WINDOW_TOKENS);
    snprintf(x->precision + used, sizeof x->precision - used,
             "; fitted to what %zu tokens of a text gave, errors fed on", n);
    return e->code;
}

/* ---- running the text ---------------------------------------------------------------------- */

/* From row to row of what sums read down a column: rows a power of two apart would share few places
 * of a cache. */
static size_t spread(size_t cols) { return cols + 16; }

typedef struct { const calibration *c; const moments *m; size_t n; } sum_job;

/* Items are numbered through blocks and their tiles of 16 rows. */
static void sum_task(void *context, size_t begin, size_t end, int thread) {
    const sum_job *j = context;
    size_t width = j->m->width, stride = spread(j->m->n * width), tiles = width / 16;
    (void)thread;
    for (size_t i = begin; i < end; i++) {
        size_t row = i % tiles * 16, at = i / tiles * width;
        const float *from = j->c->rows + at;
        float *to = j->m->sums + (at + row) * width;
        j->c->more->sum_products(&(matrix_sum){to, from + row, from, width, stride, stride, 16,
                                              row + 16, j->n});
    }
}

/* Attention is parked on the first token of a window, by activations a thousand times those of any
 * other token. As they are, nothing else would count. Left out, errors would be fed to just the
 * columns that make them, and every token looks there. So they get the size of an average row. */
static void tame_first(float *rows, size_t n, size_t cols, size_t stride) {
    double first = 0, others = 0;
    for (size_t r = 0; r < n; r++)
        for (size_t k = 0; k < cols; k++) {
            double x = rows[r * stride + k];
            *(r ? &others : &first) += x * x;
        }
    if (n < 2 || first * (double)(n - 1) <= others) return;
    float scale = (float)sqrt(others / (double)(n - 1) / first);
    for (size_t k = 0; k < cols; k++) rows[k] *= scale;
}

/* The observer: keeps the residual stream, and adds to the moments of the layer that looks on. */
static void see_inputs(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, const float *data) {
    calibration *c = user;
    int input = 0;
    while (input < N_INPUTS && strcmp(input_stages[input], stage)) input++;
    bool leaves = c->layer ? !layer && !strcmp(stage, "layer_out") : !strcmp(stage, "embed");
    for (size_t r = 0; leaves && r < rows; r++)
        memcpy(c->stream + (c->first + r) * c->hidden, data + r * stride, cols * sizeof *data);
    if (layer != (int)c->layer || input == N_INPUTS) return;
    const moments *m = &c->seen[input];
    size_t wide = m->n * m->width;
    for (size_t r = 0; r < rows; r++) {
        float *to = c->rows + r * spread(wide);
        memcpy(to, data + r * stride, cols * sizeof *data);
        memset(to + cols, 0, (wide - cols) * sizeof *data);
    }
    if (c->opening) tame_first(c->rows, rows, cols, spread(wide));
    parallel_for(c->pool, wide / 16, 1, sum_task, &(sum_job){c, m, rows});
}

/* The editor: the run begins behind the layers that are done. */
static void put_stream(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, float *data) {
    const calibration *c = user;
    (void)layer;
    for (size_t r = 0; c->layer && !strcmp(stage, "embed") && r < rows; r++)
        memcpy(data + r * stride, c->stream + (c->first + r) * c->hidden, cols * sizeof *data);
}

/* DONE layers are done. Not on a terminal: a line for each quarter. */
static void draw_calibration(const exporter *x, size_t done) {
    size_t all = (size_t)x->source.config.n_layers;
    if (x->terminal) fprintf(stderr, "\r%76s\rcalibrating: %zu of %zu layers ", "", done, all);
    else if (!x->options.quiet && (!done || done * 4 / all > (done - 1) * 4 / all))
        fprintf(stderr, "calibrating: %zu of %zu layers\n", done, all);
}

static int run_windows(exporter *x, medrun_session *s, medrun_error *e) {
    calibration *c = &x->calibration;
    const int32_t *ids = (const void *)c->ids.data;
    c->first = 0;
    for (size_t w = 0; !e->code && w < c->n_windows; w++) {
        size_t end = c->first + c->window[w];
        if (medrun_rewind(s, 0, e)) break;
        for (c->opening = true; !e->code && c->first < end; c->opening = false) {
            size_t n = end - c->first < WINDOW_CHUNK ? end - c->first : WINDOW_CHUNK;
            if (medrun_feed(s, ids + c->first, n, e) || step_pending(s, e)) break;
            c->first += n;
        }
    }
    return e->code;
}

/* The moments of LAYER: the text through the layer before and through itself, which are all that
 * the model has meanwhile. */
static int look_at_layer(exporter *x, size_t layer, medrun_error *e) {
    calibration *c = &x->calibration;
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    medrun_session_options o = {.context = WINDOW_TOKENS, .batch = WINDOW_CHUNK};
    if (x->source.config.max_positions < o.context) o.context = x->source.config.max_positions;
    medrun_options open = {.threads = x->threads, .kernels = x->kernels->name};
    for (size_t i = 0; i < N_INPUTS; i++)
        memset(c->seen[i].sums, 0, c->seen[i].n * c->seen[i].width * c->seen[i].width *
                                   sizeof(float));
    if (medrun_open(&m, x->partial, &open, e)) return e->code;
    model_layer *all = m->layers;
    int n_layers = m->config.n_layers;
    c->layer = layer ? 1 : 0, c->pool = m->pool, c->more = m->kernels->more;
    m->layers += layer - c->layer, m->config.n_layers = (int)c->layer + 1;
    if (!medrun_start(&s, m, &o, NULL, 0, e)) {
        medrun_observe(s, see_inputs, c);
        medrun_edit(s, put_stream, c);
        run_windows(x, s, e);
    }
    medrun_stop(s);
    m->layers = all, m->config.n_layers = n_layers;
    medrun_close(m);
    return e->code;
}

/* ---- the chain of a block ------------------------------------------------------------------- */

typedef struct { float size; size_t at; } ranked;

static int compare_ranked(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->size != y->size) return x->size > y->size ? -1 : 1;
    return (x->at > y->at) - (x->at < y->at);
}

/* Large columns first, while there are many to make their errors good: the groups of a block by
 * their size, and the columns of each. */
static void order_columns(calibration *c, const moments *m, const float *sums) {
    ranked groups[WIDEST_BLOCK / GROUP4], columns[GROUP4];
    size_t n = m->width / GROUP4;
    for (size_t g = 0; g < n; g++) {
        groups[g] = (ranked){0, g};
        for (size_t k = g * GROUP4; k < (g + 1) * GROUP4; k++)
            groups[g].size += sums[k * m->width + k];
    }
    qsort(groups, n, sizeof *groups, compare_ranked);
    for (size_t g = 0; g < n; g++) {
        for (size_t i = 0; i < GROUP4; i++) {
            size_t k = groups[g].at * GROUP4 + i;
            columns[i] = (ranked){sums[k * m->width + k], k};
        }
        qsort(columns, GROUP4, sizeof *columns, compare_ranked);
        for (size_t i = 0; i < GROUP4; i++) c->order[g * GROUP4 + i] = columns[i].at;
    }
}

typedef struct {
    const calibration *c;
    float *chain, *minus, *shares;          /* the block; (16, stride) of the pivots            */
    size_t stride, pivot;                   /* the first of 16                                  */
} factor_job;

/* What 16 pivots take from the rows above them, 16 at a time. */
static void factor_task(void *context, size_t begin, size_t end, int thread) {
    const factor_job *j = context;
    (void)thread;
    for (size_t row = begin * 16; row < end * 16; row += 16)
        j->c->more->sum_products(&(matrix_sum){j->chain + row * j->stride, j->minus + row,
                                              j->shares, j->stride, j->stride, j->stride, 16,
                                              row + 16, 16});
}

/* H = R R^T from the last column on. Of pivot k there stay H[k][k], which is R[k][k]^2, and below
 * the diagonal the shares. False: this is no positive matrix, as far as floats can say. */
static bool factor(const calibration *c, thread_pool *pool, float *chain, float *loss,
                   size_t width, float *pivots) {
    size_t stride = spread(width);
    factor_job j = {c, chain, pivots, pivots + 16 * stride, stride, width};
    while (j.pivot) {
        j.pivot -= 16;
        for (size_t p = 16; p-- > 0;) {
            size_t k = j.pivot + p;
            float *row = chain + k * stride;
            c->more->sum_products(&(matrix_sum){row, j.minus + (p + 1) * stride + k,
                                               j.shares + (p + 1) * stride, stride, stride, stride,
                                               1, j.pivot + 16, 15 - p});
            loss[k] = row[k];
            if (!(row[k] > 0 && row[k] <= FLT_MAX)) return false;
            for (size_t i = 0; i < k; i++) {
                j.minus[p * stride + i] = -row[i];
                j.shares[p * stride + i] = row[i] = row[i] / loss[k];
            }
            for (size_t i = k; i < j.pivot + 16; i++)
                j.minus[p * stride + i] = j.shares[p * stride + i] = 0;
        }
        parallel_for(pool, j.pivot / 16, 1, factor_task, &j);
    }
    return true;
}

/* The shares, to where chain[k][j] is that of column k's error that column j takes. */
static void turn_over(float *chain, size_t width) {
    size_t stride = spread(width);
    for (size_t k = 0; k < width; k++) {
        chain[k * stride + k] = 0;
        for (size_t j = 0; j < k; j++) {
            chain[j * stride + k] = chain[k * stride + j];
            chain[k * stride + j] = 0;
        }
    }
}

/* Prepares block B of a stage: the order, and then the chain, damped as much as it takes. */
static int prepare_block(exporter *x, const moments *m, size_t b, medrun_error *e) {
    calibration *c = &x->calibration;
    size_t width = m->width, live = m->cols - b * width < width ? m->cols - b * width : width;
    const float *sums = m->sums + b * width * width;
    double mean = 0;
    for (size_t k = 0; k < width; k++) mean += sums[k * width + k];
    if (!(mean <= FLT_MAX))
        return fail(e, MEDRUN_FAILED, "the model computes activations that are not finite");
    mean = mean > 0 ? mean / (double)live : 1;
    order_columns(c, m, sums);
    for (float damping = DAMPING; ; damping *= 10) {
        for (size_t i = 0; i < width; i++) {
            float *to = c->chain + i * spread(width);
            for (size_t j = 0; j <= i; j++) {
                size_t row = c->order[i], col = c->order[j];
                to[j] = row > col ? sums[row * width + col] : sums[col * width + row];
            }
            c->size[i] = to[i] += damping * (float)mean;
        }
        if (factor(c, &x->pool, c->chain, c->loss, width, c->rows)) break;
        if (damping > 1e6f)
            return fail(e, MEDRUN_FAILED, "the model computes activations that are not finite");
    }
    turn_over(c->chain, width);
    for (size_t i = 0; i < width; i++) if (b * width + c->order[i] >= m->cols) c->loss[i] = 0;
    return MEDRUN_OK;
}

/* ---- rounding ------------------------------------------------------------------------------- */

/* A unit of rows in a block. Its lanes are the rows, and then the same without feeding on. */
typedef struct {
    float *w, *v;               /* (width, UNIT) weights; (width, UNIT_LANES) and what is wanted */
    float error[GROUP4 * UNIT_LANES];
    uint8_t *q;                 /* (width, UNIT_LANES) nibbles                                 */
    uint16_t *bits;             /* (groups, UNIT_LANES)                                        */
    float loss[UNIT_LANES];
    uint8_t *panel;
} unit;

typedef struct {
    exporter *x;
    const section *t;
    const moments *m;
    size_t block;
} round_job;

/* Sizes with a mean of 1, those of padding 0. */
static void weigh(const calibration *c, const float *sizes, size_t first, float *importance) {
    float sum = 0;
    for (size_t i = 0; i < GROUP4; i++) sum += c->loss[first + i] > 0 ? sizes[first + i] : 0;
    for (size_t i = 0; i < GROUP4; i++)
        importance[i] = c->loss[first + i] > 0 ? sizes[first + i] / sum * GROUP4 : 0;
}

/* Columns FIRST to 31 behind it in the order, of 16 rows; PLAIN: as if nothing were fed on. */
static void round_group(const round_job *j, unit *u, size_t first, size_t lane, bool plain) {
    const calibration *c = &j->x->calibration;
    const struct more_kernels *more = j->x->kernels->more;
    size_t to = lane + (plain ? UNIT : 0), stride = spread(j->m->width);
    float w[GROUP4 * LANES], v[GROUP4 * LANES], left[GROUP4 * LANES], importance[GROUP4];
    uint8_t q[GROUP4 * LANES];
    uint16_t *bits = u->bits + first / GROUP4 * UNIT_LANES + to;
    for (size_t i = 0; i < GROUP4; i++) {
        memcpy(w + i * LANES, u->w + (first + i) * UNIT + lane, sizeof(float[LANES]));
        memcpy(v + i * LANES, u->v + (first + i) * UNIT_LANES + lane, sizeof(float[LANES]));
    }
    weigh(c, plain ? c->size : c->loss, first, importance);
    more->fit_int4(plain ? w : v, importance, bits, q);
    if (!plain)
        more->chain_int4(&(int4_chain){w, v, c->chain + first * stride + first, stride,
                                       c->loss + first}, bits, q, left, u->loss + to);
    for (size_t i = 0; i < GROUP4; i++)
        for (size_t r = 0; r < LANES; r++) {
            size_t at = i * LANES + r;
            int level = int4_levels[q[at]] - INT4_ZERO + (bits[r] & SHIFT_MASK) - SHIFT_ZERO;
            if (plain) left[at] = w[at] - (float)level * (int4_scale(bits[r]) * 0x1p-13f);
            u->error[i * UNIT_LANES + to + r] = left[at];
            u->q[(first + i) * UNIT_LANES + to + r] = q[at];
        }
}

/* All columns of a block. Of the lanes that feed nothing on, what earlier errors would want is but
 * their part of the loss. */
static void round_block(const round_job *j, unit *u) {
    const calibration *c = &j->x->calibration;
    size_t width = j->m->width, stride = spread(width);
    memset(u->loss, 0, sizeof u->loss);
    for (size_t first = 0; first < width; first += GROUP4) {
        if (!(c->loss[first] > 0)) {            /* columns that there are come first              */
            memset(u->bits + first / GROUP4 * UNIT_LANES, 0, sizeof(uint16_t[UNIT_LANES]));
            memset(u->q + first * UNIT_LANES, 0, GROUP4 * UNIT_LANES);
            continue;
        }
        for (size_t lane = 0; lane < UNIT; lane += LANES) {
            round_group(j, u, first, lane, false);
            round_group(j, u, first, lane, true);
        }
        j->x->kernels->more->sum_products(&(matrix_sum){
            u->v + first * UNIT_LANES, c->chain + first * stride + first, u->error, UNIT_LANES,
            stride, UNIT_LANES, width - first, UNIT_LANES, GROUP4});
        for (size_t i = 0; i < GROUP4; i++)
            for (size_t lane = UNIT; lane < UNIT_LANES; lane++) {
                float off = u->error[i * UNIT_LANES + lane] +
                            u->v[(first + i) * UNIT_LANES + lane];
                u->loss[lane] += off * off * c->loss[first + i];
            }
    }
}

/* N rows from LANE on to the block's part of a panel; of each, what has the smaller loss. */
static void pack_block(const round_job *j, const unit *u, size_t lane, size_t n) {
    const calibration *c = &j->x->calibration;
    memset(u->panel, 0, panel_bytes(TYPE_INT4, j->m->width));
    for (size_t r = 0; r < n; r++) {
        size_t from = lane + r + (u->loss[lane + r] <= u->loss[lane + r + UNIT] ? 0 : UNIT);
        for (size_t i = 0; i < j->m->width; i++) {
            size_t k = c->order[i];
            put_int4(u->panel, r, k, u->q[i * UNIT_LANES + from]);
            if (i % GROUP4) continue;
            memcpy(u->panel + group_scales(TYPE_INT4, k / GROUP4) + 2 * r,
                   u->bits + i / GROUP4 * UNIT_LANES + from, 2);
        }
    }
}

/* Rows from ROW on: read, rounded, written. The block's part of a panel is one piece. */
static int round_unit(const round_job *j, unit *u, size_t row, const scratch *m, medrun_error *e) {
    exporter *x = j->x;
    const section *t = j->t;
    const calibration *c = &x->calibration;
    size_t width = j->m->width, base = j->block * width;
    memset(u->w, 0, width * UNIT * sizeof *u->w);
    memset(u->v, 0, width * UNIT_LANES * sizeof *u->v);
    for (size_t lane = 0; lane < UNIT && row + lane < t->rows; lane += LANES) {
        size_t n = t->rows - row - lane < LANES ? t->rows - row - lane : LANES;
        if (check_interrupt(e) || read_rows(x, t, row + lane, n, m->raw, e)) return e->code;
        to_floats(t->from->dtype, m->raw, n * t->cols, m->rows);
        for (size_t i = 0; i < width; i++) {
            size_t k = base + c->order[i];
            for (size_t r = 0; k < t->cols && r < n; r++)
                u->w[i * UNIT + lane + r] = u->v[i * UNIT_LANES + lane + r] =
                    m->rows[r * t->cols + k];
        }
    }
    round_block(j, u);
    size_t bytes = panel_bytes(TYPE_INT4, t->cols - base < width ? t->cols - base : width);
    for (size_t lane = 0; lane < UNIT && row + lane < t->rows; lane += LANES) {
        size_t n = t->rows - row - lane < LANES ? t->rows - row - lane : LANES;
        uint64_t at = (row + lane) / LANES * panel_bytes(TYPE_INT4, t->cols);
        pack_block(j, u, lane, n);
        if (write_at(x, u->panel, bytes, t->offset + at + panel_bytes(TYPE_INT4, base), e))
            return e->code;
        if (!j->block) add_progress(x, n * source_bytes(t->from->dtype, t->cols));
    }
    return MEDRUN_OK;
}

static void round_task(void *context, size_t begin, size_t end, int thread) {
    const round_job *j = context;
    size_t width = j->m->width, lanes = width * UNIT_LANES;
    medrun_error why = {0};
    unit u = {.w = new_array(width * UNIT, sizeof(float)), .v = new_array(lanes, sizeof(float)),
              .q = new_array(lanes, 1), .bits = new_array(lanes / GROUP4, sizeof(uint16_t)),
              .panel = new_array(panel_bytes(TYPE_INT4, width), 1)};
    if (!u.w || !u.v || !u.q || !u.bits || !u.panel) out_of_memory(&why, lanes * sizeof(float));
    for (size_t i = begin; !why.code && i < end && !atomic_load(&j->x->stop); i++)
        round_unit(j, &u, i * UNIT, &j->x->scratch[thread], &why);
    if (why.code) stop_export(j->x, &why);
    free(u.w), free(u.v), free(u.q), free(u.bits), free(u.panel);
}

/* The matrices of LAYER once more, with what the text showed. */
static int round_layer(exporter *x, size_t layer, medrun_error *e) {
    const moments *seen = x->calibration.seen;
    for (size_t input = 0; input < N_INPUTS; input++)
        for (size_t b = 0; b < seen[input].n; b++) {
            if (prepare_block(x, &seen[input], b, e)) return e->code;
            for (size_t i = 0; i < x->n_sections; i++) {
                section *t = &x->sections[i];
                if (t->type != TYPE_INT4 || t->layer != layer || t->input != input) continue;
                round_job j = {x, t, &seen[input], b};
                parallel_for(&x->pool, (t->rows + UNIT - 1) / UNIT, 1, round_task, &j);
                if (x->error.code) return fail(e, x->error.code, "%s", x->error.text);
            }
        }
    return check_interrupt(e);
}

/* ---- memory, and the whole ------------------------------------------------------------------ */

/* Blocks of at most MOST columns for each stage. Returns the bytes of all that is kept. */
static uint64_t plan_moments(calibration *c, const size_t columns[N_INPUTS], size_t most) {
    uint64_t floats = c->ids.n / 4 * c->hidden;
    size_t block = 0;
    c->widest = 0;
    for (size_t i = 0; i < N_INPUTS; i++) {
        moments *m = &c->seen[i];
        m->cols = columns[i], m->n = (columns[i] + most - 1) / most;
        m->width = round_up((columns[i] + m->n - 1) / m->n, GROUP);
        floats += (uint64_t)m->n * m->width * m->width;
        if (m->n * m->width > c->widest) c->widest = m->n * m->width;
        if (m->width > block) block = m->width;
    }
    return sizeof(float) * (floats + (uint64_t)block * spread(block) +
                            WINDOW_CHUNK * spread(c->widest));
}

/* The widest blocks that there is memory for. */
static uint64_t plan_blocks(calibration *c, const size_t columns[N_INPUTS]) {
    size_t most = WIDEST_BLOCK;
    uint64_t bytes;
    while ((bytes = plan_moments(c, columns, most)) > MOST_MOMENTS && most > LEAST_BLOCK) most /= 2;
    return bytes;
}

static int start_calibration(exporter *x, medrun_error *e) {
    calibration *c = &x->calibration;
    const model_config *k = &x->source.config;
    size_t hidden = c->hidden = (size_t)k->hidden_size, block = 0;
    size_t heads = (size_t)k->n_heads * (size_t)k->head_dim;
    const size_t columns[N_INPUTS] = {hidden, heads, hidden, (size_t)k->ffn_size};
    uint64_t bytes = plan_blocks(c, columns);
    bool failed = false;
    for (size_t i = 0; i < N_INPUTS; i++) {
        moments *m = &c->seen[i];
        m->sums = new_array(m->n * m->width * m->width, sizeof *m->sums);
        failed |= !m->sums;
        if (m->width > block) block = m->width;
    }
    c->stream = new_array(c->ids.n / 4 * hidden, sizeof *c->stream);
    c->rows = new_array(WINDOW_CHUNK * spread(c->widest), sizeof *c->rows);
    c->chain = new_array(block * spread(block), sizeof *c->chain);
    c->order = new_array(block, sizeof *c->order);
    c->loss = new_array(block, sizeof *c->loss);
    c->size = new_array(block, sizeof *c->size);
    if (failed || !c->stream || !c->rows || !c->chain || !c->order || !c->loss || !c->size)
        return out_of_memory(e, bytes);
    return MEDRUN_OK;
}

/* Hashes sections that were written again. */
static void hash_task(void *context, size_t begin, size_t end, int thread) {
    exporter *x = context;
    for (size_t i = begin; i < end && !atomic_load(&x->stop); i++) {
        section *t = &x->sections[i];
        medrun_error why = {0};
        if (t->type != TYPE_INT4) continue;
        hash_range(x, x->fd, t->offset, t->bytes, x->partial, &x->scratch[thread], t->digest, &why);
        if (why.code) stop_export(x, &why);
    }
}

/* All matrices once more, layer by layer. */
static int write_calibrated(exporter *x, medrun_error *e) {
    double began = seconds();
    if (!x->options.calibrate) return MEDRUN_OK;
    if (start_calibration(x, e)) return e->code;
    for (size_t l = 0; l < (size_t)x->source.config.n_layers; l++) {
        draw_calibration(x, l);
        if (look_at_layer(x, l, e) || round_layer(x, l, e)) return e->code;
    }
    x->start += seconds() - began;          /* the rate is that of reading                        */
    return run_parallel(x, x->n_sections, hash_task, e);
}

static void free_calibration(calibration *c) {
    buffer_free(&c->ids);
    for (size_t i = 0; i < N_INPUTS; i++) free(c->seen[i].sums);
    free(c->stream), free(c->rows), free(c->chain), free(c->order), free(c->loss), free(c->size);
}
