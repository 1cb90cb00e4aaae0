/* Tests of section 14: the distribution that is sampled from, measured exactly (every random number
 * of a fine grid is tried) and with real seeds, against plain sorting and transformers' results. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

enum { MOST = 3000 };

static double uniform(void) { return (double)test_random() / 0x1p63 - 1; }

/* ---- the generator ------------------------------------------------------------------------- */

/* The first outputs from seed 1234567 (Rosetta Code) and from 0 (Vigna's splitmix64.c). */
static void test_random_numbers(void) {
    static const uint64_t first[] = {6457827717110365317u, 3203168211198807973u,
                                     9817491932198370423u, 4593380528125082431u,
                                     16408922859458223821u};
    static const uint64_t zero[] = {16294208416658607535u, 7960286522194355700u, 487617019471545679u};
    uint64_t state = 1234567;
    for (int i = 0; i < 5; i++) CHECK(random_uniform(&state) == (double)(first[i] >> 11) / 0x1p53);
    state = 0;
    for (int i = 0; i < 3; i++) CHECK(random_uniform(&state) == (double)(zero[i] >> 11) / 0x1p53);
    state = 99;
    int wrong = 0;
    double sum = 0;
    for (int i = 0; i < 1000000; i++) {
        double u = random_uniform(&state);
        wrong += !(u >= 0 && u < 1);
        sum += u;
    }
    CHECK(wrong == 0 && fabs(sum / 1e6 - 0.5) < 0.0015);        /* 5 standard deviations         */
}

/* The number whose product with the odd number A is 1, modulo 2^64 (Newton). */
static uint64_t inverse(uint64_t a) {
    uint64_t x = a;
    for (int i = 0; i < 6; i++) x *= 2 - a * x;
    return x;
}

static uint64_t undo_shift(uint64_t z, int shift) {
    uint64_t x = z;
    for (int i = 0; i < 64; i += shift) x = z ^ x >> shift;
    return x;
}

/* The state from which the next random number is U: the steps of splitmix64 undone. */
static uint64_t state_for(double u) {
    uint64_t z = undo_shift((uint64_t)(u * 0x1p53) << 11, 31);
    z = undo_shift(z * inverse(0x94D049BB133111EB), 27);
    z = undo_shift(z * inverse(0xBF58476D1CE4E5B9), 30);
    return z - 0x9E3779B97F4A7C15;
}

/* ---- the same by plain sorting ------------------------------------------------------------- */

typedef struct { double logit, weight; int id; } token;

static int by_logit(const void *a, const void *b) {
    const token *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->id < y->id ? -1 : 1;
}

/* Probabilities by transformers' order: repetition penalty, temperature, top-k, top-p, min-p.
 * False where a token stands so close to a threshold that rounding may decide. */
static bool reference(const float *logits, int vocab, const medrun_sampling *s, const int32_t *history,
                      int n_history, double *p) {
    static token t[MOST];
    bool sure = true;
    for (int i = 0; i < vocab; i++) {
        float l = logits[i];
        bool seen = false;
        for (int h = 0; h < n_history; h++) seen |= history[h] == i;
        if (seen) l = l < 0 ? l * s->repeat_penalty : l / s->repeat_penalty;
        t[i] = (token){(double)l, 0, i};
        p[i] = 0;
    }
    qsort(t, (size_t)vocab, sizeof *t, by_logit);
    double total = 0, before = 0, kept = 0;
    int n = vocab;
    if (s->top_k > 0 && s->top_k < vocab)
        for (n = s->top_k; n < vocab && t[n].logit == t[s->top_k - 1].logit; n++);
    for (int i = 0; i < n; i++) {
        t[i].weight = exp((t[i].logit - t[0].logit) / (double)s->temperature);
        total += t[i].weight;
    }
    int end = n;
    for (int i = 0; i < n; before += t[i++].weight) {
        double share = before - (double)s->top_p * total;
        if (i && s->top_p < 1 && fabs(share) < 1e-9 * total) sure = false;
        if (i && s->top_p < 1 && share >= 0) { end = i; break; }
    }
    for (int i = 0; i < end; i++) {
        if (i && fabs(t[i].weight - (double)s->min_p) < 1e-12) sure = s->min_p == 1 && t[i].weight == 1;
        if (i && t[i].weight < (double)s->min_p) { end = i; break; }
        kept += t[i].weight;
    }
    for (int i = 0; i < end; i++) p[t[i].id] = t[i].weight / kept;
    return sure;
}

static int32_t sample_at(const float *logits, int vocab, const medrun_sampling *s,
                         const int32_t *history, int n_history, uint64_t *state) {
    uint64_t *list = malloc((size_t)vocab * sizeof *list);     /* exactly what is asked for     */
    int32_t id = sample_token(list, logits, (size_t)vocab, NULL, s, state, history,
                              (size_t)n_history);
    free(list);
    return id;
}

/* Samples with GRID evenly spaced random numbers. Each token must come its share of times: it owns
 * one interval of them, so its count is off by one at most. Returns how many tokens are wrong. */
static int wrong_counts(const float *logits, int vocab, const medrun_sampling *s,
                        const int32_t *history, int n_history, const double *p, int grid) {
    static int count[MOST];
    int wrong = 0;
    memset(count, 0, sizeof count);
    for (int i = 0; i < grid; i++) {
        uint64_t state = state_for((i + 0.5) / grid), before = state;
        int32_t id = sample_at(logits, vocab, s, history, n_history, &state);
        if (id < 0 || id >= vocab) return vocab;
        wrong += state != before + 0x9E3779B97F4A7C15;          /* one number for each sample    */
        count[id]++;
    }
    for (int i = 0; i < vocab; i++)
        wrong += !(fabs(count[i] - p[i] * grid) <= 1.001) || (p[i] == 0 && count[i]);
    return wrong;
}

static void test_against_sorting(void) {
    static const float temperatures[] = {1, 0.7f, 0.3f, 2.5f, 1e-3f, 100, 0.9f};
    static const float top_ps[] = {1, 0.9f, 0.5f, 0.95f, 0, 1e-9f, 0.999f};
    static const float min_ps[] = {0, 0, 0.05f, 0.3f, 1, 0.9f};
    static const float penalties[] = {1, 1.1f, 1.5f, 0.8f, 2};
    float logits[300];
    double p[MOST];
    int32_t history[50];
    int wrong = 0, runs = 0, first = -1, wanted = test_all() ? 4000 : 1000;
    for (int run = 0; run < wanted; run++) {
        int vocab = 1 + (int)(test_random() % (run % 10 ? 40 : 300)), kind = run % 4;
        int n_history = (int)(test_random() % 50);
        for (int i = 0; i < vocab; i++) {
            logits[i] = (float)(uniform() * (kind == 1 ? 20 : 4));
            if (kind == 2) logits[i] = (float)(int)logits[i];           /* many ties             */
            if (kind == 3 && test_random() % 3 == 0) logits[i] = -INFINITY;
        }
        if (kind == 3) logits[0] = 1;
        for (int i = 0; i < n_history; i++) history[i] = (int32_t)(test_random() % (unsigned)vocab);
        medrun_sampling s = {
            .temperature = temperatures[test_random() % 7],
            .top_k = run % 3 ? (int)(test_random() % ((unsigned)vocab + 5)) : 0,
            .top_p = top_ps[test_random() % 7], .min_p = min_ps[test_random() % 6],
            .repeat_penalty = penalties[test_random() % 5]};
        if (!reference(logits, vocab, &s, history, n_history, p)) continue;
        runs++;
        int w = wrong_counts(logits, vocab, &s, history, n_history, p, 200);
        wrong += w;
        if (!w || first >= 0) continue;
        first = run;
        printf("    vocab %d, temperature %g, top_k %d, top_p %g, min_p %g, penalty %g\n", vocab,
               (double)s.temperature, s.top_k, (double)s.top_p, (double)s.min_p,
               (double)s.repeat_penalty);
    }
    CHECK_EQ(wrong, 0);
    CHECK(runs > wanted * 5 / 8);
}

/* ---- what transformers 5.23.0's own processors gave ---------------------------------------- */

typedef struct {
    int vocab;
    float logits[7];
    int n_history;
    int32_t history[4];
    medrun_sampling s;
    double p[7];
} known;

static const known from_transformers[] = {
    {6, {1, 2, 3, 4, 5, 6}, 0, {0}, {1, 3, 1, 0, 1, 0},
     {0, 0, 0, 0.0900306, 0.2447285, 0.6652409}},
    {5, {1, 2, 2, 2, 0.5f}, 0, {0}, {1, 2, 1, 0, 1, 0},         /* ties with the k-th stay       */
     {0, 0.3333333, 0.3333333, 0.3333333, 0}},
    {4, {3, 2, 1, 0}, 0, {0}, {1, 0, 0.7f, 0, 1, 0}, {0.7310586, 0.2689414, 0, 0}},
    {4, {3, 2, 1, 0}, 0, {0}, {1, 0, 0.9f, 0, 1, 0}, {0.6652409, 0.2447285, 0.0900306, 0}},
    {4, {3, 2, 1, 0}, 0, {0}, {0.5f, 0, 0.9f, 0, 1, 0}, {0.8807970, 0.1192029, 0, 0}},
    {4, {3, 2, 1, 0}, 0, {0}, {2, 0, 0.9f, 0, 1, 0}, {0.4550542, 0.2760043, 0.1674051, 0.1015363}},
    {4, {3, 2, 1, 0}, 0, {0}, {1, 0, 1, 0.1f, 1, 0}, {0.6652409, 0.2447285, 0.0900306, 0}},
    {4, {3, 2, 1, 0}, 0, {0}, {1, 0, 1, 0.3f, 1, 0}, {0.7310586, 0.2689414, 0, 0}},
    {5, {3, -2, 1, 0, -1}, 4, {0, 1, 1, 3}, {1, 0, 1, 0, 1.5f, 0},
     {0.6411326, 0.0043199, 0.2358595, 0.0867679, 0.0319201}},
    {5, {3, -2, 1, 0, -1}, 4, {0, 0, 2, 4}, {1, 0, 1, 0, 0.8f, 0},
     {0.8933735, 0.0028434, 0.0733326, 0.0210101, 0.0094405}},
    {3, {0.5f, 0.3f, 0.2f}, 0, {0}, {1, 0, 1, 0, 1, 0}, {0.3906938, 0.3198730, 0.2894331}},
    {3, {0, -0.5f, -1}, 0, {0}, {1, 3, 0.6f, 0.5f, 1, 0}, {0.6224594, 0.3775407, 0}},
    {4, {0, -0.5f, -1, -1.2f}, 0, {0}, {1, 3, 0.6f, 0.5f, 1, 0},        /* top-p before min-p    */
     {0.6224594, 0.3775407, 0, 0}},
    {7, {2, 1.9f, 1, 0.5f, 0, -1, -3}, 2, {1, 5}, {0.7f, 5, 0.9f, 0.05f, 1.3f, 0},
     {0.5871919, 0.2720868, 0.1407212, 0, 0, 0, 0}},
    {7, {2, 1.9f, 1, 0.5f, 0, -1, -3}, 2, {1, 5}, {1.7f, 4, 0.8f, 0.3f, 1.3f, 0},
     {0.4378619, 0.3189906, 0.2431475, 0, 0, 0, 0}},
};

static void test_against_transformers(void) {
    for (size_t i = 0; i < sizeof from_transformers / sizeof *from_transformers; i++) {
        const known *k = &from_transformers[i];
        double p[7], off = 0;
        CHECK(reference(k->logits, k->vocab, &k->s, k->history, k->n_history, p));
        for (int t = 0; t < k->vocab; t++) off = fmax(off, fabs(p[t] - k->p[t]));
        CHECK(off < 3e-7);                              /* the test's own reference is right too */
        if (!CHECK_EQ(wrong_counts(k->logits, k->vocab, &k->s, k->history, k->n_history, k->p,
                                   20000), 0)) printf("    case %zu\n", i);
    }
}

/* ---- seeds --------------------------------------------------------------------------------- */

/* Chi-square of 60,000 samples, one after the other from one seed: below the 99.99 % point. */
static void test_chi_square(void) {
    float logits[40];
    double p[MOST];
    int32_t history[] = {3, 3, 17};
    for (uint64_t seed = 1; seed <= (test_all() ? 12 : 4); seed++) {
        medrun_sampling s = {.temperature = 0.8f, .top_k = seed % 2 ? 0 : 20,
                             .top_p = seed % 3 ? 1 : 0.9f, .min_p = seed % 4 ? 0 : 0.02f,
                             .repeat_penalty = 1.2f};
        for (int i = 0; i < 40; i++) logits[i] = (float)(uniform() * 2);
        if (!CHECK(reference(logits, 40, &s, history, 3, p))) continue;
        int count[40] = {0}, n = 60000, degrees = -1, stray = 0;
        uint64_t state = seed;
        for (int i = 0; i < n; i++) count[sample_at(logits, 40, &s, history, 3, &state)]++;
        double chi = 0;
        for (int i = 0; i < 40; i++) {
            if (p[i] == 0) { stray += count[i]; continue; }
            double expected = p[i] * n;
            chi += (count[i] - expected) * (count[i] - expected) / expected, degrees++;
        }
        /* Wilson and Hilferty's cube root: 3.719 standard deviations are 99.99 %                */
        double z = cbrt(chi / degrees) - (1 - 2.0 / (9 * degrees));
        if (!CHECK(stray == 0 && z < 3.719 * sqrt(2.0 / (9 * degrees))))
            printf("    seed %d: %g of %d\n", (int)seed, chi, degrees);
    }
}

/* ---- extremes ------------------------------------------------------------------------------ */

static void test_greedy(void) {
    medrun_sampling s = {.temperature = 0, .top_k = 40, .top_p = 0.9f, .min_p = 0.1f,
                         .repeat_penalty = 1, .seed = 1};
    uint64_t state = 1;
    const float tie[] = {-3, 7, 2, 7, 7, -1}, all[] = {-2, -2, -2}, lost[] = {-INFINITY, -5, -INFINITY};
    CHECK_EQ(sample_at(tie, 6, &s, NULL, 0, &state), 1);
    CHECK_EQ(sample_at(all, 3, &s, NULL, 0, &state), 0);
    CHECK_EQ(sample_at(lost, 3, &s, NULL, 0, &state), 1);
    CHECK_EQ(sample_at(lost, 1, &s, NULL, 0, &state), 0);
    s.repeat_penalty = 2;
    CHECK_EQ(sample_at(tie, 6, &s, (int32_t[]){1, 1, 4}, 3, &state), 3);
    CHECK_EQ(sample_at(all, 3, &s, (int32_t[]){0}, 1, &state), 1);      /* negative: made lower  */
    s.repeat_penalty = 0.5f;
    CHECK_EQ(sample_at(all, 3, &s, (int32_t[]){2}, 1, &state), 2);      /* ... or higher         */
}

/* Whatever the logits and the settings, an id comes back; never one that cannot be. */
static void test_extremes(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN, 1};
    static const double us[] = {0, 0x1p-53, 0.25, 0.5, 1 - 0x1p-53};
    float logits[20];
    double p[MOST];
    int wrong = 0, stray = 0;
    for (int run = 0; run < 40000; run++) {
        int vocab = 1 + (int)(test_random() % 20);
        bool finite = run % 2;
        for (int i = 0; i < vocab; i++)
            logits[i] = finite ? test_random() % 3 ? (float)(uniform() * 60) : -INFINITY
                               : odd[test_random() % 9];
        if (finite) logits[test_random() % (unsigned)vocab] = 2;
        medrun_sampling s = {
            .temperature = (const float[]){0, 1e-3f, 1, 100, 1e-45f}[test_random() % 5],
            .top_k = (const int[]){0, 1, 2, 5, 19, 20, INT_MAX}[test_random() % 7],
            .top_p = (const float[]){0, 1e-9f, 0.5f, 1}[test_random() % 4],
            .min_p = (const float[]){0, 1e-9f, 0.5f, 1}[test_random() % 4],
            .repeat_penalty = (const float[]){1, 0.01f, 100}[test_random() % 3]};
        int32_t history[] = {0, vocab - 1, vocab / 2};
        uint64_t state = run % 3 ? state_for(us[test_random() % 5]) : test_random();
        int32_t id = sample_at(logits, vocab, &s, history, 3, &state);
        wrong += id < 0 || id >= vocab;
        if (finite && id >= 0 && id < vocab) {          /* -infinity means never                 */
            if (s.temperature > 0) reference(logits, vocab, &s, history, 3, p);
            stray += logits[id] == -INFINITY;
            stray += s.temperature >= 1e-3f && p[id] == 0 && s.top_p != 0.5f && s.min_p != 0.5f;
        }
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(stray, 0);
}

/* The last random number before 1 and a top-k that reaches into tokens ruled out by -infinity: what
 * rounding leaves over must not fall to them. */
static void test_ruled_out(void) {
    int stray = 0;
    for (int run = 0; run < 20000; run++) {
        float logits[8];
        for (int i = 0; i < 8; i++) logits[i] = i < 5 ? (float)(uniform() * 3) : -INFINITY;
        medrun_sampling s = {.temperature = 1, .top_k = run % 3 ? 7 : 0, .top_p = 1,
                             .repeat_penalty = 1};
        uint64_t state = state_for(1 - 0x1p-53);
        stray += sample_at(logits, 8, &s, NULL, 0, &state) >= 5;
    }
    CHECK_EQ(stray, 0);
}

static void test_equal_logits(void) {
    static float logits[MOST];
    static double p[MOST];
    uint64_t state = 5;
    medrun_sampling s = {.temperature = 1, .top_p = 1, .repeat_penalty = 1};
    for (int i = 0; i < MOST; i++) logits[i] = 1.5f, p[i] = 1.0 / MOST;
    CHECK_EQ(wrong_counts(logits, MOST, &s, NULL, 0, p, 300), 0);
    s.top_k = 1;                                        /* ties with the first stay              */
    CHECK_EQ(wrong_counts(logits, MOST, &s, NULL, 0, p, 300), 0);
    s.top_k = 0, s.top_p = 0.25f;
    int high = 0;
    for (int i = 0; i < 300; i++) high += sample_at(logits, MOST, &s, NULL, 0, &state) >= MOST / 4;
    CHECK_EQ(high, 0);                                  /* of equals the lower ids               */
    s.top_p = 0;
    CHECK_EQ(sample_at(logits, MOST, &s, NULL, 0, &state), 0);
    s.top_p = 1, s.min_p = 1;
    CHECK_EQ(wrong_counts(logits, MOST, &s, NULL, 0, p, 300), 0);
}

/* The largest vocabulary and a tail of many small weights: the sum must not lose them. */
static void test_large(void) {
    int vocab = 128256, low = 0, n = 20;
    float *logits = malloc((size_t)vocab * sizeof *logits);
    uint64_t *list = malloc((size_t)vocab * sizeof *list);
    medrun_sampling s = {.temperature = 1, .top_p = 1, .repeat_penalty = 1};
    for (int i = 0; i < vocab; i++) logits[i] = i == 70000 ? 11.0f : 0.0f;
    double p = exp(11) / (exp(11) + vocab - 1);         /* about 0.318                           */
    for (int i = 0; i < n; i++) {
        uint64_t state = state_for((i + 0.5) / n);
        low += sample_token(list, logits, (size_t)vocab, NULL, &s, &state, NULL, 0) == 70000;
    }
    CHECK(fabs(low - p * n) <= 1);
    free(logits), free(list);
}

/* Ids without text are not chosen, however large their logits and whatever the history. */
static void test_textless(void) {
    static const uint8_t types[6] = {PIECE_NORMAL, PIECE_UNUSED, PIECE_CONTROL, PIECE_UNUSED,
                                     PIECE_USER, PIECE_UNUSED};
    const float logits[6] = {1, 9, 2, 9, 1.5f, INFINITY};
    const int32_t history[2] = {1, 5};
    int wrong = 0, seen = 0;
    uint64_t list[6];
    for (int i = 0; i < 600; i++) {
        medrun_sampling s = {.temperature = (float)(i % 3), .top_k = i % 5, .top_p = i % 7 ? 1 : 0.5f,
                             .repeat_penalty = i % 2 ? 1 : 0.5f};
        uint64_t state = (uint64_t)i;
        int32_t id = sample_token(list, logits, 6, types, &s, &state, history, 2);
        wrong += id % 2;
        seen |= 1 << id;
    }
    CHECK(!wrong && seen == (1 | 4 | 16));
}

int main(void) {
    test_random_numbers();
    CHECK(random_uniform(&(uint64_t){state_for(0.625)}) == 0.625);
    test_against_transformers();
    test_against_sorting();
    test_chi_square();
    test_greedy();
    test_extremes();
    test_ruled_out();
    test_equal_logits();
    test_large();
    test_textless();
    return report();
}
