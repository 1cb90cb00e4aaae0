/* Part of medrun-explain and medrun-lab: what is computed beside a run, with the run's own kernels,
 * so that its numbers are the run's. Rows of the residual stream become logits here, as the last
 * step of a pass makes them (output, section 13 of medrun.c). Included after medrun.c.
 * MIT licence, see LICENSE. */

enum { SIDE_ROWS = 32 };                /* rows that are multiplied together                    */

/* Room for SIDE_ROWS rows of the widest matrix. Weights are read through the engine's products
 * alone: how a type stores them is its own business. */
typedef struct {
    const medrun_model *m;
    engine eng;                         /* the session's: its kernels, strict or not            */
    size_t hidden, heads, ffn, vocab;   /* floats in a row; vocab rounded up to 16              */
    float *normed;                      /* (SIDE_ROWS, hidden)                                  */
    float *wide;                        /* (SIDE_ROWS, heads or ffn) what is multiplied         */
    float *out;                         /* (SIDE_ROWS, hidden rounded up to 16)                 */
    float *logits;                      /* (SIDE_ROWS, vocab)                                   */
    packed packed;
    void *memory;
    size_t bytes;
} side;

static size_t side_out(const side *b) { return round_up(b->hidden, LANES); }

static void lay_out_side(side *b, arena *a) {
    size_t wide = b->ffn > b->heads ? b->ffn : b->heads, kinds[2];
    size_t widest = wide > b->hidden ? wide : b->hidden;
    kinds[0] = pack_bytes(pack_kind(&b->eng, b->m->type), widest, SIDE_ROWS);
    kinds[1] = pack_bytes(pack_kind(&b->eng, b->m->output.type), widest, SIDE_ROWS);
    b->normed = arena_take(a, SIDE_ROWS * b->hidden, sizeof(float));
    b->wide = arena_take(a, SIDE_ROWS * widest, sizeof(float));
    b->out = arena_take(a, SIDE_ROWS * side_out(b), sizeof(float));
    b->logits = arena_take(a, SIDE_ROWS * b->vocab, sizeof(float));
    b->packed.data = arena_take(a, kinds[0] > kinds[1] ? kinds[0] : kinds[1], 1);
}

/* B computes as S does, and no longer than S lives. */
static int start_side(side *b, const medrun_session *s, medrun_error *e) {
    const pass *p = &s->pass;
    *b = (side){.m = s->model, .eng = p->eng, .hidden = p->hidden, .heads = p->heads,
                .ffn = p->ffn, .vocab = p->vocab};
    arena counts = {NULL, 0};
    lay_out_side(b, &counts);
    b->bytes = (size_t)counts.at;
    b->memory = map_bytes(-1, b->bytes);
    if (!b->memory) return out_of_memory(e, b->bytes);
    lay_out_side(b, &(arena){b->memory, 0});
    return MEDRUN_OK;
}

static void stop_side(side *b) {
    if (b->memory) unmap_bytes(b->memory, b->bytes);
    b->memory = NULL;
}

/* out (n, rows of w) = w times x (n, cols), N at most SIDE_ROWS. */
static void side_multiply(side *b, const tensor *w, const float *x, size_t stride, size_t n,
                          float *out, size_t out_stride) {
    pack_activations(&b->eng, &b->packed, w->type, x, stride, w->cols, n);
    matmul(&b->eng, &(product){w, out, out_stride}, 1, &b->packed);
}

static void norm_for_lens(side *b, size_t i, const float *x) {
    b->eng.k->norm(b->normed + i * b->hidden, x, b->m->final_norm, b->hidden,
                   b->m->config.norm_eps);
}

static void normed_logits(side *b, size_t n) {
    side_multiply(b, &b->m->output, b->normed, b->hidden, n, b->logits, b->vocab);
}

/* b->logits = logits of N rows of the residual stream, each with its own norm: for rows of the last
 * layer the very bits of medrun_logits, for rows of others the raw logit lens. */
static void lens_logits(side *b, const float *x, size_t stride, size_t n) {
    for (size_t i = 0; i < n; i++) norm_for_lens(b, i, x + i * stride);
    normed_logits(b, n);
}

/* What a row of logits says: the K likeliest ids, the lowest id first on a tie, the natural
 * logarithm of the sum of exp, and the entropy in nats. */
typedef struct {
    double log_total, entropy;
    int32_t top[64];
} row_facts;

/* 2^(i / 16) */
static const double sixteenths[16] = {
    1.0, 1.0442737824274138, 1.0905077326652577, 1.1387886347566916,
    1.189207115002721, 1.241857812073484, 1.2968395546510096, 1.3542555469368927,
    1.4142135623730951, 1.4768261459394993, 1.5422108254079407, 1.6104903319492543,
    1.681792830507429, 1.7562521603732995, 1.8340080864093424, 1.9152065613971474,
};

/* e^x for -60 <= x <= 0 to 12 digits: 2^(k / 16) times a polynomial. exp_exact is right to the last
 * bit and takes many times as long, which for all ids of all rows would be most of the work. */
static double exp_near(double x) {
    int k = (int)(x * 23.083120654223414 - 0.5);
    double r = x - k * 0.043321698784996581, scale;
    double sum = 1 + r * (1 + r * (0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 +
                 r * (1.0 / 720))))));
    uint64_t bits = (uint64_t)(1023 + (k - (k & 15)) / 16) << 52;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale * sixteenths[k & 15];
}

static void look_at_row(const float *z, size_t n, size_t k, row_facts *f) {
    size_t have = largest_logits(z, n, k, f->top);
    while (have < k) f->top[have++] = -1;
    double most = (double)z[f->top[0]], sum = 0, mean = 0;
    for (size_t i = 0; i < n; i++) {
        double x = (double)z[i] - most;
        if (x < -60) continue;              /* less than a double tells apart                  */
        double p = exp_near(x);
        sum += p, mean += p * x;
    }
    f->log_total = most + ln_exact(sum);
    f->entropy = ln_exact(sum) - mean / sum;
}

typedef struct {
    const side *b;
    size_t k;
    row_facts *facts;
} look_job;

static void look_task(void *context, size_t begin, size_t end, int thread) {
    (void)thread;
    look_job *j = context;
    for (size_t r = begin; r < end; r++)
        look_at_row(j->b->logits + r * j->b->vocab, (size_t)j->b->m->config.vocab_size, j->k,
                    &j->facts[r]);
}

/* The facts of the first N rows of b->logits. */
static void look_at_rows(side *b, size_t n, size_t k, row_facts *facts) {
    look_job j = {b, k, facts};
    parallel_for(b->eng.pool, n, 1, look_task, &j);
}

/* How many ids are likelier than ID. */
__attribute__((unused)) static uint32_t rank_of(const float *z, size_t n, int32_t id) {
    uint32_t before = 0;
    for (size_t i = 0; i < n; i++) before += z[i] > z[id];
    return before;
}

/* The one number that every way of packing keeps exactly: the largest int8. */
#define UNIT_INPUT 127.0f

/* Multiplies W by unit vectors FIRST .. FIRST + N - 1 (N at most SIDE_ROWS): b->out or b->logits
 * then has those columns of W as rows, UNIT_INPUT times as large. So weights are read as products,
 * whatever the type. */
__attribute__((unused))
static void unit_columns(side *b, const tensor *w, size_t first, size_t n, float *out,
                         size_t stride) {
    memset(b->wide, 0, n * w->cols * sizeof(float));
    for (size_t i = 0; i < n; i++) b->wide[i * w->cols + first + i] = UNIT_INPUT;
    side_multiply(b, w, b->wide, w->cols, n, out, stride);
}

/* Row ROW of W, (cols): its panel alone is multiplied by every unit vector. */
__attribute__((unused)) static void weight_row(side *b, const tensor *w, size_t row, double *out) {
    tensor panel = {w->type, LANES, w->cols,
                    w->data + row / LANES * panel_bytes(w->type, w->cols)};
    float found[SIDE_ROWS * LANES];
    for (size_t at = 0, n; at < w->cols; at += n) {
        n = w->cols - at < SIDE_ROWS ? w->cols - at : SIDE_ROWS;
        unit_columns(b, &panel, at, n, found, LANES);
        for (size_t i = 0; i < n; i++)
            out[at + i] = (double)found[i * LANES + row % LANES] / (double)UNIT_INPUT;
    }
}

/* ---- products with the transpose ------------------------------------------------------------ */

/* The 16 rows of a panel, each times its number in U, are added lane by lane to SUM: the weights of
 * group G as they lie there, a number for each (of bf16 as many columns as of int8). */
static void add_panel(int type, const uint8_t *panel, size_t cols, size_t g, const float u[LANES],
                      float sum[GROUP * LANES]) {
    float factor[4 * LANES], shift[4 * LANES] = {0};
    if (type == TYPE_BF16) {
        const uint8_t *from = panel + g * (GROUP / 2) * STEP_BYTES;
        size_t steps = (cols - g * GROUP + 1) / 2;
        if (steps > GROUP / 2) steps = GROUP / 2;
        for (size_t i = 0; i < 2 * LANES; i++) factor[i] = u[i / 2];
        for (size_t step = 0; step < steps; step++, from += STEP_BYTES, sum += 2 * LANES)
            for (size_t i = 0; i < 2 * LANES; i++)
                sum[i] += factor[i] * bf16_to_f32(load_16(from + 2 * i));
        return;
    }
    const uint8_t *from = panel + group_steps(type, g), *scales = panel + group_scales(type, g);
    for (size_t i = 0; i < 4 * LANES; i++) {
        uint16_t bits = load_16(scales + i / 4 * 2);
        factor[i] = u[i / 4] * stored_scale(type, panel, i / 4, g * group_cols(type));
        shift[i] = (float)(type == TYPE_INT8 ? -128 : (bits & SHIFT_MASK) - SHIFT_ZERO - INT4_ZERO);
    }
    for (size_t step = 0; step < group_bytes(type) / STEP_BYTES; step++, from += STEP_BYTES)
        if (type == TYPE_INT8) {
            for (size_t i = 0; i < 4 * LANES; i++)
                sum[i] += factor[i] * ((float)from[i] + shift[i]);
            sum += 4 * LANES;
        } else {
            for (size_t half = 0; half < 8; half += 4, sum += 4 * LANES)
                for (size_t i = 0; i < 4 * LANES; i++)
                    sum[i] += factor[i] * ((float)int4_levels[from[i] >> half & 15] + shift[i]);
        }
}

typedef struct {
    const tensor *w;
    const double *u;
    size_t first;                       /* group                                                */
    float *out;
} transposed_job;

static void transposed_task(void *context, size_t begin, size_t end, int thread) {
    const transposed_job *j = context;
    const tensor *w = j->w;
    int type = w->type;
    size_t wide = type == TYPE_INT4 ? GROUP4 : GROUP, step = type == TYPE_BF16 ? 2 : 4;
    (void)thread;
    for (size_t i = begin; i < end; i++) {
        float sum[GROUP * LANES] = {0}, u[LANES], *to = j->out + i * wide;
        for (size_t row = 0; row < w->rows; row += LANES) {
            for (size_t k = 0; k < LANES; k++)
                u[k] = row + k < w->rows ? (float)j->u[row + k] : 0;
            add_panel(type, w->data + row / LANES * panel_bytes(type, w->cols), w->cols,
                      j->first + i, u, sum);
        }
        size_t n = w->cols - (j->first + i) * wide < wide ? w->cols - (j->first + i) * wide : wide;
        for (size_t c = 0; c < n; c++) {
            double all = 0;
            for (size_t k = 0; k < LANES; k++)
                all += (double)sum[c / step * step * LANES + k * step + c % step];
            to[c] = (float)all;
        }
        if (type == TYPE_INT8) turn_group(to, n);
    }
}

/* Sums of columns FIRST to END - 1 of W, each row times its number in U. The weights are read once,
 * by their place in memory; a column is one thread's. ROOM has cols + GROUP floats, of which the
 * sums are those from what is returned. */
__attribute__((unused))
static const float *transposed(side *b, const tensor *w, const double *u, size_t first, size_t end,
                               float *room) {
    size_t wide = w->type == TYPE_INT4 ? GROUP4 : GROUP;
    transposed_job j = {w, u, first / wide, room};
    parallel_for(b->eng.pool, (end + wide - 1) / wide - j.first, 1, transposed_task, &j);
    return room + first % wide;
}
