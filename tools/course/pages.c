/* Writes the course's pages: what NN/lesson.md says, with the demo model's own numbers.
 *
 *     pages DEMO.mdr COURSE WORK OUT      WORK has NN.json, what medrun-explain --lesson NN found
 *     pages DEMO.mdr --coarser OUT.mdr    a copy with five steps instead of 255, for lesson 3
 *
 * A lesson is text with a few marks: `== heading`, `- item`, `1. item`, `? question` with answers
 * `= right -> reply` and `~ wrong -> reply`, **strong**, `code`, [text](place), and {{figure|...}},
 * which is a number, a word or a table that is computed here. Plain text may not hold a digit, so
 * that no figure is typed by hand: {{given|20}} marks one that is given, not measured. What stands
 * behind `== teacher` goes to the teacher's page. Linked to engine.o. MIT licence, see LICENSE. */
#include "course.h"
#include <ctype.h>
#include <stdarg.h>

enum { MOST_TEXT = 1 << 22, MOST_ARGS = 6, LESSONS = 10 };
enum { COARSE_STEP = 63 };              /* 127 / 63: two steps on each side of zero             */

static FILE *out;
static const char *source, *facts_text;         /* the lesson's file; its JSON                  */
static int line_number, choice_number, question_number;

_Noreturn static void fail_at(const char *text, ...) {
    va_list list;
    fprintf(stderr, "%s:%d: ", source, line_number);
    va_start(list, text);
    vfprintf(stderr, text, list);
    va_end(list);
    fprintf(stderr, "\n");
    exit(1);
}

static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    char *text = calloc(1, MOST_TEXT);
    if (!f || !text) { fprintf(stderr, "pages: %s cannot be read\n", path); exit(1); }
    text[fread(text, 1, MOST_TEXT - 1, f)] = 0;
    fclose(f);
    return text;
}

static void put(const char *text, ...) {
    va_list list;
    va_start(list, text);
    vfprintf(out, text, list);
    va_end(list);
}

static void put_text(const char *p, size_t n) {
    for (; n && *p; n--, p++)
        if (*p == '<') put("&lt;");
        else if (*p == '&') put("&amp;");
        else if (*p == '"') put("&quot;");
        else if (*p == '\n') put("\xE2\x86\xB5");
        else fputc(*p, out);
}

/* A piece as a word: without the blank in front. */
static void put_piece(int32_t id) {
    const char *p = demo_piece(id);
    p += *p == ' ' && p[1];
    put_text(p, strlen(p));
}

/* ---- what medrun-explain found --------------------------------------------------------------- */

/* Number INDEX of the array NAME. */
static double found(const char *name, size_t index) {
    char mark[64];
    snprintf(mark, sizeof mark, "\n\"%s\":[", name);
    const char *p = facts_text ? strstr(facts_text, mark) : NULL;
    if (!p) fail_at("medrun-explain found no %s", name);
    p += strlen(mark);
    while (index--) {
        while (*p != ',' && *p != ']') p++;
        if (*p++ == ']') fail_at("%s is shorter", name);
    }
    return strtod(p, NULL);
}

/* The first number named NAME behind P. */
static double member(const char *p, const char *name) {
    char mark[64];
    snprintf(mark, sizeof mark, "\"%s\":", name);
    p = p ? strstr(p, mark) : NULL;
    if (!p) fail_at("medrun-explain found no %s", name);
    return strtod(p + strlen(mark), NULL);
}

static size_t layers(void) { return (size_t)facts.n_layers; }
static size_t heads(void) { return (size_t)facts.n_heads; }

/* ---- the model ------------------------------------------------------------------------------- */

static size_t likeliest(const float *z) {
    size_t best = 0;
    for (size_t i = 1; i < (size_t)facts.vocab_size; i++) if (z[i] > z[best]) best = i;
    return best;
}

/* The answer to a question, as ids behind its prompt; *N_PROMPT ids are the prompt. */
static size_t answer_ids(const char *question, int32_t *ids, size_t *n_prompt) {
    medrun_session *s = NULL;
    medrun_session_options o = {.context = MOST_IDS};
    size_t n = *n_prompt = demo_ask(question, ids);
    if (medrun_start(&s, demo, &o, NULL, 0, NULL) || medrun_feed(s, ids, n, NULL))
        fail_at("no session");
    while (n + 1 < MOST_IDS && !medrun_step(&s, 1, NULL)) {
        int32_t id = (int32_t)likeliest(medrun_logits(s, 0));
        if (medrun_is_stop(demo, id)) break;
        medrun_feed(s, &id, 1, NULL);
        ids[n++] = id;
    }
    medrun_stop(s);
    return n;
}

static double bits(const float *z, int32_t id) {
    return (engine_log_sum(z) - (double)z[id]) / 0.69314718055994531;
}

static double mean_bits(const char *question, const char *answer) {
    int32_t ids[MOST_IDS];
    size_t from = demo_ask(question, ids), n = from + demo_tokens(answer, false, ids + from), cols;
    recording *r = demo_run(ids, n, MEDRUN_KV_F16);
    const float *z = demo_stage(r, "logits", -1, NULL, &cols);
    double sum = 0;
    for (size_t t = from; t < n; t++) sum += bits(z + (t - 1) * cols, ids[t]);
    demo_forget(r);
    return sum / (double)(n - from);
}

/* ---- figures --------------------------------------------------------------------------------- */

typedef const char *const *args;

static void table(const char *caption, const char *heads_of) {
    put("<figure><div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"");
    put_text(caption, strlen(caption));
    put("\"><table><caption>");
    put_text(caption, strlen(caption));
    put("</caption><thead><tr>");
    while (*heads_of) {
        size_t n = strcspn(heads_of, "|");
        bool left = *heads_of == '<';
        if (n == (size_t)left) put("<td></td>");
        else put(left ? "<th scope=\"col\" class=\"l\">" : "<th scope=\"col\">");
        put_text(heads_of + left, n - left);
        if (n > (size_t)left) put("</th>");
        heads_of += n + (heads_of[n] == '|');
    }
    put("</tr></thead><tbody>");
}

static void end_table(void) { put("</tbody></table></div></figure>\n"); }

static void put_bar(double share) {
    put("<td><span class=\"bar%s\"><i style=\"--w:%.1f%%\"></i></span></td>", share < 0 ? " less"
        : "",
        100 * fmin(1, fabs(share)));
}

static void put_signed(double x, int decimals) {
    put("%s%.*f", x < 0 ? "\xE2\x88\x92" : "+", decimals, fabs(x));
}

static void put_percent(double p) {
    if (p >= 0.99995 && p < 1) put("&gt; 99.99 %%");
    else put(p >= 0.9945 && p < 1 ? "%.2f %%" : p >= 0.0995 ? "%.0f %%" : "%.1f %%", 100 * p);
}

static void do_given(args a) { put_text(a[0], strlen(a[0])); }

static void do_info(args a) {
    const struct { const char *name; double value; } all[] = {
        {"vocab", facts.vocab_size}, {"hidden", facts.hidden_size}, {"layers", facts.n_layers},
        {"heads", facts.n_heads}, {"kv heads", facts.n_kv_heads}, {"head size", facts.head_dim},
        {"neurons", facts.ffn_size}, {"all heads", facts.n_layers * facts.n_heads},
        {"all neurons", facts.n_layers * facts.ffn_size}, {"context", facts.max_positions},
        {"streams", 2 * facts.n_layers + 1}, {"group", GROUP_SIZE}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(a[0], all[i].name)) { put("%.0f", all[i].value); return; }
    if (!strcmp(a[0], "parameters")) put("%.1f million", (double)facts.parameters / 1e6);
    else if (!strcmp(a[0], "bytes")) put("%.1f MB", (double)facts.file_bytes / 1e6);
    else if (!strcmp(a[0], "int8")) put("%d", 127);
    else fail_at("info has no %s", a[0]);
}

static void do_count(args a) {
    int32_t ids[MOST_IDS];
    put("%zu", demo_tokens(a[0], false, ids));
}

static void do_letters(args a) { put("%zu", strlen(a[0])); }

static void do_id(args a) {
    int32_t ids[MOST_IDS];
    if (demo_tokens(a[0], true, ids) != 1) fail_at("\"%s\" is not one piece", a[0]);
    put("%d", (int)ids[0]);
}

static void do_answer(args a) {
    int32_t ids[MOST_IDS];
    size_t from, n = answer_ids(a[0], ids, &from), bytes;
    char text[4096];
    medrun_detokenize(demo, ids + from, n - from, false, text, sizeof text, &bytes, NULL);
    put_text(text, bytes);
}

static void put_ids(const int32_t *ids, size_t n, bool numbers) {
    put("<p class=\"pieces\">");
    for (size_t i = 0; i < n; i++) {
        const char *p = demo_piece(ids[i]);
        put("<span class=\"piece%s\">", *p == '<' && p[1] == '|' ? " control" : "");
        put_text(p, strlen(p));
        if (numbers) put("<small>%d</small>", (int)ids[i]);
        put("</span><wbr>");
    }
    put("</p>\n");
}

static void do_pieces(args a) {
    int32_t ids[MOST_IDS];
    put_ids(ids, demo_tokens(a[0], false, ids), true);
}

static void do_chat(args a) {
    int32_t ids[MOST_IDS];
    put_ids(ids, demo_ask(a[0], ids), false);
}

/* A word's way through merging. */
static void do_merges(args a) {
    int32_t ids[MOST_IDS], rank, result;
    size_t n = demo_bytes(a[0], strlen(a[0]), ids), step = 0;
    table("From letters to pieces", "step|<the word now|rank of the pair that merged");
    for (int32_t last = -1;; step++) {
        size_t best = n;
        int32_t least = INT32_MAX, made = 0;
        put("<tr%s><td>%zu</td><td class=\"l\">", "", step);
        for (size_t i = 0; i < n; i++) {
            put("<span class=\"piece\">");
            put_text(demo_piece(ids[i]), 64);
            put("</span><wbr>");
            if (i + 1 < n && demo_merge(ids[i], ids[i + 1], &rank, &result) && rank < least)
                best = i, least = rank, made = result;
        }
        if (last < 0) put("</td><td></td></tr>");
        else put("</td><td>%d</td></tr>", (int)last + 1);
        if (best == n) break;
        ids[best] = made, last = least, n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
    }
    end_table();
}

/* The first eight of 64 numbers of a real row, as lesson 3 rounds them. */
static void do_group(args a) {
    int32_t ids[MOST_IDS];
    int8_t q[GROUP_SIZE];
    size_t n = demo_ask(a[0], ids), rows, cols;
    recording *r = demo_run(ids, n, MEDRUN_KV_F16);
    const float *x = demo_stage(r, "attn_norm", 0, &rows, &cols) + (n - 1) * cols;
    double scale = (double)engine_int8(x, q), largest = scale * 127;
    char caption[160];
    snprintf(caption, sizeof caption, "Eight of %d numbers. The largest magnitude of all is "
             "%.4f, so the scale is %.6f", GROUP_SIZE, largest, scale);
    table(caption, "number|divided by the scale|kept|and back|off by");
    for (int i = 0; i < 8; i++)
        put("<tr><td>%.5f</td><td>%.2f</td><td>%d</td><td>%.5f</td><td>%.5f</td></tr>",
            (double)x[i],
            (double)x[i] / scale, q[i], q[i] * scale, fabs(q[i] * scale - (double)x[i]));
    end_table();
    demo_forget(r);
}

/* What coarser whole numbers do to an answer. */
static void do_coarse(args a) {
    static const int steps[] = {1, 8, 17, 42, 63, 85};
    static float *plain;
    int32_t ids[MOST_IDS], other[MOST_IDS];
    size_t from, n = answer_ids(a[0], ids, &from), cols, m, unused, bytes;
    char text[4096];
    table("The same model with fewer steps",
          "steps on each side of zero|<its answer|same choice at|mean distance (bits)");
    for (size_t k = 0; k < sizeof steps / sizeof *steps; k++) {
        double sum = 0;
        size_t same = 0;
        weights_coarser(steps[k]);
        recording *r = demo_run(ids, n, MEDRUN_KV_F16);
        const float *z = demo_stage(r, "logits", -1, NULL, &cols);
        if (!plain) {
            if (!(plain = calloc(n * cols, sizeof *plain))) fail_at("no memory");
            memcpy(plain, z, n * cols * sizeof *plain);
        }
        for (size_t t = from - 1; t + 1 < n; t++) {
            const float *p = plain + t * cols, *q = z + t * cols;
            double log_p = engine_log_sum(p), log_q = engine_log_sum(q);
            same += likeliest(p) == likeliest(q);
            for (size_t i = 0; i < cols; i++) {
                double share = exp((double)p[i] - log_p);
                sum += share * ((double)p[i] - log_p - (double)q[i] + log_q) / 0.69314718055994531;
            }
        }
        demo_forget(r);
        m = answer_ids(a[0], other, &unused);
        medrun_detokenize(demo, other + from, m - from, false, text, sizeof text, &bytes, NULL);
        put("<tr><td>%d</td><td class=\"l\">", 127 / steps[k]);
        put_text(text, bytes < 160 ? bytes : 160);
        put("%s</td><td>%zu of %zu</td><td>%.3f</td></tr>", bytes < 160 ? "" : " ...", same,
            n - from,
            fabs(sum / (double)(n - from)));
    }
    weights_coarser(1);
    free(plain), plain = NULL;
    end_table();
}

static void do_num(args a) {
    if (!a[1] || !a[2]) fail_at("num wants a name, an index and decimals");
    put("%.*f", atoi(a[2]), found(a[0], (size_t)atoi(a[1])));
}

static void do_word(args a) {
    put_piece((int32_t)(a[1] ? found(a[0], (size_t)atoi(a[1])) : member(facts_text, a[0])));
}

/* Layers: the size of the stream, and of what both halves of a layer wrote. */
static void do_stream(args a) {
    (void)a;
    double most = 0;
    for (size_t i = 0; i <= 2 * layers(); i++) most = fmax(most, found("stream_rms", i));
    table("Size (RMS) at the explained word", "<after|attention wrote|feed-forward wrote|the "
          "stream is now|<");
    for (size_t l = 0; l <= layers(); l++) {
        if (l) put("<tr><th scope=\"row\" class=\"l\">layer %zu</th><td>%.2f</td><td>%.2f</td>", l,
                   found("written_rms", 2 * l - 1), found("written_rms", 2 * l));
        else put("<tr><th scope=\"row\" class=\"l\">embedding</th><td></td><td></td>");
        put("<td>%.2f</td>", found("stream_rms", 2 * l));
        put_bar(found("stream_rms", 2 * l) / most);
        put("</tr>");
    }
    end_table();
}

/* What each layer would say at the explained place. */
static void do_lens(args a) {
    (void)a;
    size_t at = (size_t)member(facts_text, "at"), place = 0, rows = layers() + 1;
    while (found("lens_at", place) != (double)at) place++;
    table("What would come if the model ended here", "<after|<word|its probability|<");
    for (size_t r = 0; r < rows; r++) {
        double p = exp(found("lens_logp", (place * rows + r) * 5));
        if (r) put("<tr><th scope=\"row\" class=\"l\">layer %zu</th><td class=\"l\">", r);
        else put("<tr><th scope=\"row\" class=\"l\">embedding</th><td class=\"l\">");
        put_piece((int32_t)found("lens", (place * rows + r) * 5));
        put("</td><td>"), put_percent(p), put("</td>");
        put_bar(p);
        put("</tr>");
    }
    end_table();
}

/* The place of a piece in the prompt, by its text. */
static size_t place_of(const char *text) {
    const char *p = strstr(facts_text, "\"tokens\":[");
    for (size_t t = 0; p && (p = strchr(p, '[')) != NULL; t++) {
        if (!t) p++;                            /* the outer bracket                            */
        p = strchr(p, '[');
        if (!p) break;
        if (!strcmp(demo_piece((int32_t)strtol(p + 1, NULL, 10)), text)) return t;
        p++;
    }
    fail_at("no piece \"%s\"", text);
}

static size_t sorted_heads(size_t key, size_t *order, double *weight) {
    size_t n = layers() * heads(), rows = (size_t)member(facts_text, "rows");
    for (size_t i = 0; i < n; i++) {
        size_t k = i;
        double w = found("seen", i * rows + key);
        for (; k && w > weight[k - 1]; k--) weight[k] = weight[k - 1], order[k] = order[k - 1];
        weight[k] = w, order[k] = i;
    }
    return n;
}

/* Heads that read one piece most, and what they add to the explained difference. */
static void do_readers(args a) {
    size_t order[1024];
    double weight[1024];
    sorted_heads(place_of(a[0]), order, weight);
    char caption[200];
    snprintf(caption, sizeof caption, "The heads that look most at \"%s\" when the next word is "
             "chosen",
             a[0] + (a[0][0] == ' '));
    table(caption, "<head|weight on that word|<|what it adds itself (nats)");
    for (size_t i = 0; i < 6; i++) {
        put("<tr><th scope=\"row\" class=\"l\">layer %zu, head %zu</th><td>",
            order[i] / heads() + 1,
            order[i] % heads() + 1);
        put_percent(weight[i]);
        put("</td>");
        put_bar(weight[i]);
        put("<td>"), put_signed(found("heads", order[i]), 2), put("</td></tr>");
    }
    end_table();
}

/* The text with the weights of the head that looks most at a piece. */
static void do_gaze(args a) {
    size_t order[1024], rows = (size_t)member(facts_text, "rows"), at, n_tokens = 0;
    double weight[1024];
    at = (size_t)member(facts_text, "at");
    sorted_heads(place_of(a[0]), order, weight);
    put("<figure><p class=\"pieces\">");
    const char *p = strstr(facts_text, "\"tokens\":[") + 10;
    for (; n_tokens <= at && (p = strchr(p, '[')); n_tokens++, p++) {
        int32_t id = (int32_t)strtol(p + 1, NULL, 10);
        double w = found("seen", order[0] * rows + n_tokens);
        const char *text = demo_piece(id);
        put("<span class=\"piece tint\" style=\"--a:%.3f\">", w);
        put_text(text, strlen(text));
        if (w >= 0.005) put("<small>%.0f %%</small>", 100 * w);
        put("</span><wbr>");
    }
    put("</p><figcaption>Layer %zu, head %zu, at the last word shown. Colour, line and number: "
        "how much "
        "of what it fetches comes from there.</figcaption></figure>\n", order[0] / heads() + 1,
        order[0] % heads() + 1);
}

static void do_head(args a) {                   /* the name of the head that looks most          */
    size_t order[1024];
    double weight[1024];
    sorted_heads(place_of(a[0]), order, weight);
    put("head %zu of layer %zu", order[0] % heads() + 1, order[0] / heads() + 1);
}

static double cache_of(double tokens, double l, double g, double d, double b) {
    return 2 * tokens * l * g * d * b;
}

/* The cache of the demo model, which is the engine's, and of one of 8B, by the same rule. */
static void do_cache(args a) {
    (void)a;
    table("Memory for keys and values", "tokens|demo model|a model of 8B|the same without sharing");
    for (int tokens = 256; tokens <= 131072; tokens *= 8) {
        double one = engine_cache_bytes(256, MEDRUN_KV_F16) / 256 * tokens;
        put("<tr><td>%d</td><td>%.1f MB</td><td>%.0f MB</td><td>%.0f MB</td></tr>", tokens,
            one / 1e6,
            cache_of(tokens, 32, 8, 128, 2) / 1e6, cache_of(tokens, 32, 32, 128, 2) / 1e6);
    }
    end_table();
}

static void do_kilobytes(args a) {
    put("%.1f kB", engine_cache_bytes(2048, MEDRUN_KV_F16) / 2048 / 1e3 * atof(a[0]));
}

/* Rows that go through the model for an answer, with and without a cache. */
static void do_rows(args a) {
    int32_t ids[MOST_IDS];
    size_t from, n = answer_ids(a[0], ids, &from), all = 0;
    for (size_t t = from; t < n; t++) all += t;
    if (!strcmp(a[1], "prompt")) put("%zu", from);
    else if (!strcmp(a[1], "answer")) put("%zu", n - from);
    else if (!strcmp(a[1], "with")) put("%zu", n - 1);
    else if (!strcmp(a[1], "without")) put("%zu", all);
    else put("%.0f", (double)all / (double)(n - 1));
}

static void do_neurons(args a) {
    table("Neurons that moved the difference most", "<neuron|active|adds (nats)|<words that it "
          "raises");
    for (int i = 0; i < atoi(a[0]); i++) {
        size_t k = (size_t)i;
        put("<tr><th scope=\"row\" class=\"l\">layer %.0f, neuron %.0f</th><td>", found("neuron",
                                        2 * k) + 1,
            found("neuron", 2 * k + 1) + 1);
        put_signed(found("neuron_active", k), 1), put("</td><td>");
        put_signed(found("neuron_adds", k), 2), put("</td><td class=\"l w\">");
        for (size_t j = 0; j < 5; j++) {
            if (j) put(", ");
            put_piece((int32_t)found("neuron_raises", 5 * k + j));
        }
        put("</td></tr>");
    }
    end_table();
}

/* The sum of all attention or feed-forward parts, the embedding, the rest, the total. */
static double sum_of(const char *what) {
    double sum = 0;
    if (!strcmp(what, "embedding")) return found("parts", 0);
    if (!strcmp(what, "rest")) return found("rest", 0);
    if (!strcmp(what, "total")) return found("total", 0);
    for (size_t l = 0; l < layers(); l++)
        sum += found("parts", 2 * l + (!strcmp(what, "attention") ? 1 : 2));
    return sum;
}

static void do_sum(args a) { put_signed(sum_of(a[0]), 2); }

static void do_parts(args a) {
    (void)a;
    double most = 1e-9;
    for (size_t i = 0; i <= 2 * layers(); i++) most = fmax(most, fabs(found("parts", i)));
    table("What each part adds to the difference of the two words (nats)", "<part|adds|<");
    for (size_t i = 0; i <= 2 * layers(); i++) {
        if (!i) put("<tr><th scope=\"row\" class=\"l\">embedding</th><td>");
        else put("<tr><th scope=\"row\" class=\"l\">layer %zu, %s</th><td>", (i + 1) / 2,
                 i % 2 ? "attention" : "feed-forward");
        put_signed(found("parts", i), 2), put("</td>");
        put_bar(found("parts", i) / most);
        put("</tr>");
    }
    put("<tr><th scope=\"row\" class=\"l\">rounding</th><td>"), put_signed(found("rest", 0), 2);
    put("</td><td></td></tr><tr class=\"now\"><th scope=\"row\" class=\"l\">sum</th><td>");
    put_signed(found("total", 0), 2), put("</td><td></td></tr>");
    end_table();
}

static void do_ablations(args a) {
    (void)a;
    table("Heads, and what happens without them (nats)", "<head|adds itself|lost when it is off");
    const char *p = strstr(facts_text, "\"ablations\":[");
    for (int i = 0; p && (p = strstr(p, "{\"layer\":")) && i < 6; i++, p++) {
        size_t layer = (size_t)member(p, "layer"), head = (size_t)member(p, "head");
        put("<tr><th scope=\"row\" class=\"l\">layer %zu, head %zu</th><td>", layer + 1, head + 1);
        put_signed(found("heads", layer * heads() + head), 2), put("</td><td>");
        put_signed(found("total", 0) - member(p, "difference"), 2), put("</td></tr>");
    }
    end_table();
}

/* Before and after the first change of words. */
static void do_what_if(args a) {
    (void)a;
    const char *p = strstr(facts_text, "\"what_if\":[");
    size_t at = (size_t)member(facts_text, "at");
    table("The next word, before and after", "<question|<word|its probability|<");
    put("<tr><th scope=\"row\" class=\"l\">as asked</th><td class=\"l\">");
    put_piece((int32_t)found("top", at * 10));
    double before = exp(found("top_logp", at * 10));
    put("</td><td>"), put_percent(before), put("</td>"), put_bar(before);
    put("</tr><tr><th scope=\"row\" class=\"l\">changed</th><td class=\"l\">");
    p = strstr(p, "\"top\":[[");
    if (!p) fail_at("no change was tried");
    char *end;
    long id = strtol(p + 8, &end, 10);
    double after = exp(strtod(end + 1, NULL));
    put_piece((int32_t)id);
    put("</td><td>"), put_percent(after), put("</td>"), put_bar(after), put("</tr>");
    end_table();
}

/* The place of an answer where the model is least sure: *T is the token that comes there. */
static const float *unsure(const char *question, recording **r, int32_t *ids, size_t *t) {
    size_t from, n = answer_ids(question, ids, &from), cols;
    double most = -1;
    *r = demo_run(ids, n, MEDRUN_KV_F16);
    const float *z = demo_stage(*r, "logits", -1, NULL, &cols), *best = z;
    for (size_t k = from; k < n; k++) {
        const float *row = z + (k - 1) * cols;
        double b = bits(row, (int32_t)likeliest(row));
        if (b > most) most = b, best = row, *t = k;
    }
    return best;
}

static void do_before(args a) {                 /* the answer up to that place                   */
    int32_t ids[MOST_IDS];
    recording *r;
    size_t t, from = demo_ask(a[0], ids), bytes;
    char text[4096];
    unsure(a[0], &r, ids, &t);
    medrun_detokenize(demo, ids + from, t - from, false, text, sizeof text, &bytes, NULL);
    put_text(text, bytes);
    demo_forget(r);
}

static void do_dice(args a) {
    static const double temperatures[] = {0.5, 1, 2};
    static int32_t order[1 << 16];
    int32_t ids[MOST_IDS];
    size_t t, n = (size_t)facts.vocab_size;
    double share[3][6], sum[3] = {0};
    recording *r;
    const float *z = unsure(a[0], &r, ids, &t);
    demo_order(z, n, order);
    for (int k = 0; k < 3; k++) {
        for (size_t i = 0; i < n; i++)
            sum[k] += exp(((double)z[i] - (double)z[order[0]]) / temperatures[k]);
        for (int i = 0; i < 6; i++)
            share[k][i] = exp(((double)z[order[i]] - (double)z[order[0]]) / temperatures[k]) /
                          sum[k];
    }
    table("The six likeliest words, at three temperatures", "<word|logit|at 0.5|at 1|at 2");
    for (int i = 0; i < 6; i++) {
        put("<tr><th scope=\"row\" class=\"l\">"), put_piece(order[i]);
        put("</th><td>%.2f</td>", (double)z[order[i]]);
        for (int k = 0; k < 3; k++) put("<td>"), put_percent(share[k][i]), put("</td>");
        put("</tr>");
    }
    end_table();
    demo_forget(r);
}

/* How many pieces top-p keeps there. */
static void do_kept(args a) {
    static int32_t order[1 << 16];
    int32_t ids[MOST_IDS];
    size_t t, n = (size_t)facts.vocab_size, kept = 0;
    recording *r;
    const float *z = unsure(a[0], &r, ids, &t);
    double all = 0, sum = 0, temperature = atof(a[1]), top_p = atof(a[2]);
    demo_order(z, n, order);
    for (size_t i = 0; i < n; i++) all += exp(((double)z[i] - (double)z[order[0]]) / temperature);
    while (kept < n && sum < top_p * all)
        sum += exp(((double)z[order[kept++]] - (double)z[order[0]]) / temperature);
    put("%zu", kept);
    demo_forget(r);
}

/* An answer's pieces with the surprise of each. */
static void do_surprise(args a) {
    int32_t ids[MOST_IDS];
    size_t from = demo_ask(a[0], ids), n = from + demo_tokens(a[1], false, ids + from), cols;
    recording *r = demo_run(ids, n, MEDRUN_KV_F16);
    const float *z = demo_stage(r, "logits", -1, NULL, &cols);
    put("<figure><p class=\"pieces\">");
    for (size_t t = from; t < n; t++) {
        double b = bits(z + (t - 1) * cols, ids[t]);
        const char *text = demo_piece(ids[t]);
        put("<span class=\"piece tint\" style=\"--a:%.3f\">", fmin(1, b / 12));
        put_text(text, strlen(text));
        put("<small>%.1f</small></span><wbr>", b);
    }
    put("</p><figcaption>Surprise of each piece in bits; %.2f in the mean.</figcaption></figure>\n",
        mean_bits(a[0], a[1]));
    demo_forget(r);
}

static void do_bits(args a) { put("%.2f", mean_bits(a[0], a[1])); }

/* Of the model's own answer. */
static void do_own(args a) {
    int32_t ids[MOST_IDS];
    size_t from, n = answer_ids(a[0], ids, &from), bytes;
    char text[4096];
    medrun_detokenize(demo, ids + from, n - from, false, text, sizeof text - 1, &bytes, NULL);
    text[bytes < sizeof text ? bytes : 0] = 0;
    put("%.2f", mean_bits(a[0], text));
}

/* What a lesson says of the numbers above it, without a figure, is true of them: else no page. */
static void do_holds(args a) {
    static const char *const heart = "What is a normal heart rate?";
    bool true_here = false;
    if (!strcmp(a[0], "lookers")) {     /* the head that looks most adds less than another      */
        size_t order[1024];
        double weight[1024], most = 0;
        sorted_heads(place_of(a[1]), order, weight);
        for (size_t i = 0; i < 6; i++) most = fmax(most, fabs(found("heads", order[i])));
        true_here = weight[0] > 0.9 && fabs(found("heads", order[0])) < most / 2;
    } else if (!strcmp(a[0], "tests")) {        /* one head costs less than it adds, one more   */
        bool less = false, more = false;
        const char *p = strstr(facts_text, "\"ablations\":[");
        for (int i = 0; p && (p = strstr(p, "{\"layer\":")) && i < 6; i++, p++) {
            double lost = found("total", 0) - member(p, "difference");
            double adds = found("heads", (size_t)member(p, "layer") * heads() +
                                         (size_t)member(p, "head"));
            less |= fabs(lost) < fabs(adds) / 2, more |= fabs(lost) > 1.3 * fabs(adds);
        }
        true_here = less && more;
    } else if (!strcmp(a[0], "surprise")) {     /* right in other words above wrong in the same */
        double same = mean_bits(heart, a[1]), wrong = mean_bits(heart, a[2]);
        true_here = same < wrong && wrong < mean_bits(heart, a[3]);
    }
    if (!true_here) fail_at("this is no longer true: %s", a[0]);
}

/* Tokens a second if memory gives so many GB a second and each token reads all weights. */
static void do_speed(args a) {
    double bytes = a[1] ? atof(a[1]) * 1e9 : (double)facts.weight_bytes;
    double speed = atof(a[0]) * 1e9 / bytes;
    put("%.*f", speed < 10 ? 1 : 0, speed);
}

/* A link to one view asks for no guess. */
static void do_explain(args a) {
    put("<p><a class=\"open\" href=\"explain-%s.html%s\">Open the explain page</a>%s</p>\n", a[0],
        a[1] ? a[1] : "", a[1] ? "" : " It asks for your guess first. Then it has these steps, and checks what you type.");
}

static const struct { const char *name; void (*make)(args a); bool block; } figures[] = {
    {"given", do_given, false}, {"info", do_info, false}, {"count", do_count, false},
    {"letters", do_letters, false}, {"id", do_id, false}, {"answer", do_answer, false},
    {"pieces", do_pieces, true}, {"chat", do_chat, true}, {"merges", do_merges, true},
    {"group", do_group, true}, {"coarse", do_coarse, true}, {"num", do_num, false},
    {"word", do_word, false}, {"stream", do_stream, true}, {"lens", do_lens, true},
    {"readers", do_readers, true}, {"gaze", do_gaze, true}, {"head", do_head, false},
    {"cache", do_cache, true}, {"kilobytes", do_kilobytes, false}, {"rows", do_rows, false},
    {"neurons", do_neurons, true}, {"sum", do_sum, false}, {"parts", do_parts, true},
    {"ablations", do_ablations, true}, {"what-if", do_what_if, true}, {"before", do_before, false},
    {"dice", do_dice, true}, {"kept", do_kept, false}, {"surprise", do_surprise, true},
    {"bits", do_bits, false}, {"own", do_own, false}, {"holds", do_holds, false},
    {"speed", do_speed, false}, {"explain", do_explain, true},
};

/* P stands behind {{. Returns what stands behind }}. */
static const char *put_figure(const char *p, bool block) {
    char text[512];
    const char *a[MOST_ARGS + 1] = {0}, *end = strstr(p, "}}");
    size_t n = end ? (size_t)(end - p) : 0;
    if (!end || n >= sizeof text) fail_at("{{ without }}");
    memcpy(text, p, n), text[n] = 0;
    char *rest = text;
    for (int i = 0; i <= MOST_ARGS && rest; i++) {
        a[i] = rest;
        while ((rest = strchr(rest, '|')) && (rest[-1] == '<' || rest[1] == '>')) rest++;
        if (rest) *rest++ = 0;
    }
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        if (strcmp(a[0], figures[i].name)) continue;
        if (figures[i].block != block) fail_at("%s stands in the wrong place", a[0]);
        figures[i].make(a + 1);
        return end + 2;
    }
    fail_at("no figure is called %s", a[0]);
}

/* ---- text to HTML ---------------------------------------------------------------------------- */

/* Numbers of lessons and views may be typed. */
static bool may_type(const char *start, const char *p) {
    const char *q = p;
    while (q > start && (isdigit((unsigned char)q[-1]) || q[-1] == ',' || q[-1] == ' ')) q--;
    static const char *const words[] = {"esson", "essons", "iew", "iews", "and", "to"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t n = strlen(words[i]);
        if ((size_t)(q - start) >= n && !strncmp(q - n, words[i], n)) return true;
    }
    while (p > start && isdigit((unsigned char)p[-1])) p--;
    return p > start && (isalpha((unsigned char)p[-1]) || p[-1] == '-');   /* int8, UTF-8       */
}

/* Strong words may go over lines of a paragraph, not further. */
static bool strong;

static void put_line(const char *p) {
    for (const char *start = p, *end; *p;) {
        if (!strncmp(p, "{{", 2)) p = put_figure(p + 2, false);
        else if (!strncmp(p, "**", 2)) put((strong = !strong) ? "<strong>" : "</strong>"), p += 2;
        else if (*p == '`' && (end = strchr(p + 1, '`'))) {
            put("<code>"), put_text(p + 1, (size_t)(end - p - 1)), put("</code>");
            p = end + 1;
        } else if (*p == '[' && (end = strstr(p, "]("))) {
            const char *close = strchr(end, ')');
            if (!close) fail_at("a link does not end");
            put("<a href=\""), put_text(end + 2, (size_t)(close - end - 2)), put("\">");
            put_text(p + 1, (size_t)(end - p - 1)), put("</a>");
            p = close + 1;
        } else {
            if (isdigit((unsigned char)*p) && !may_type(start, p))
                fail_at("a figure is typed by hand: %.30s", p);
            put_text(p++, 1);
        }
    }
}

static void put_choice(const char *text) {
    const char *reply = strstr(text, " -> ");
    char answer[1024];
    if (!reply) fail_at("an answer without a reply");
    snprintf(answer, sizeof answer, "%.*s", (int)(reply - text - 2), text + 2);
    put("<details><summary>%c. ", 'A' + choice_number++);
    put_line(answer);
    put("</summary><p class=\"%s\"><strong>%s</strong> ", *text == '=' ? "good" : "other",
        *text == '=' ? "Right." : "Not quite.");
    put_line(reply + 4);
    put("</p></details>\n");
}

/* Closes a list or paragraph that is open, and opens another. An item goes on over lines. */
static char open_now;
static bool item_open;

static void open_part(char kind) {
    if (strong) fail_at("** without its end");
    static const struct { char kind; const char *open, *close; } parts[] = {
        {'p', "<p>", "</p>\n"}, {'-', "<ul>\n", "</ul>\n"}, {'1', "<ol>\n", "</ol>\n"}};
    if (item_open) put("</li>\n");
    item_open = false;
    if (kind == open_now && kind != 'p') return;
    for (int i = 0; i < 3; i++) if (parts[i].kind == open_now) put("%s", parts[i].close);
    for (int i = 0; i < 3; i++) if (parts[i].kind == kind) put("%s", parts[i].open);
    open_now = kind;
}

/* The lines of TEXT until a line STOP, or the end; returns what stands behind. */
static char *put_body(char *text, const char *stop, bool sections) {
    for (char *next; text && *text; text = next) {
        if ((next = strchr(text, '\n'))) *next++ = 0;
        line_number++;
        if (stop && !strcmp(text, stop)) { open_part(0); return next; }
        if (!*text) open_part(0);
        else if (!strncmp(text, "== ", 3)) {
            open_part(0);
            put(sections ? "<h2>" : "<h3>"), put_line(text + 3), put(sections ? "</h2>\n"
                                        : "</h3>\n");
        } else if (!strncmp(text, "- ", 2)) {
            open_part('-'), put("<li>"), put_line(text + 2), item_open = true;
        } else if (!strncmp(text, "1. ", 3)) {
            open_part('1'), put("<li>"), put_line(text + 3), item_open = true;
        } else if (!strncmp(text, "? ", 2)) {
            open_part(0), choice_number = 0;
            put("<h3>Question %d</h3><p>", ++question_number), put_line(text + 2), put("</p>\n");
        } else if (!strncmp(text, "= ", 2) || !strncmp(text, "~ ", 2)) open_part(0),
            put_choice(text);
        else if (!strncmp(text, "{{", 2) && !strcmp(text + strlen(text) - 2, "}}") &&
                 strstr(text, "}}") == text + strlen(text) - 2) {
            open_part(0), put_figure(text + 2, true);
        } else {
            if (!open_now) open_part('p');
            else put(strncmp(text, "**A.**", 6) ? "\n" : "<br>\n");
            put_line(text);
        }
    }
    open_part(0);
    return text;
}

static void begin_page(const char *title, const char *style, const char *up) {
    put("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src "
        "'unsafe-inline'; img-src data:\">\n"
        "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>");
    put_text(title, strlen(title));
    put("</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>\n%s</style>\n</head>\n<body>\n"
        "<a class=\"skip\" href=\"#main\">To the text</a>\n<header><nav aria-label=\"Course\"><ul>"
        "<li><a href=\"%sindex.html\">All lessons</a></li>", style, up);
}

static void end_page(void) {
    put("</main>\n<footer><p>Numbers on this page come from the demo model, computed when the "
        "page was made. For teaching; not a medical device.</p></footer>\n</body>\n</html>\n");
    if (fclose(out)) { perror("pages"); exit(1); }
}

/* The text behind `KEY: ` at the head of a lesson. */
static char *take(char **text, const char *key) {
    char *line = *text, *end = strchr(line, '\n');
    size_t n = strlen(key);
    line_number++;
    if (!end || strncmp(line, key, n) || line[n] != ':') fail_at("wanted %s: ...", key);
    *end = 0, *text = end + 1;
    return line + n + 2;
}

static void open_out(const char *folder, const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    if (!(out = fopen(path, "wb"))) { perror(path); exit(1); }
}

typedef struct {
    char *title, *question, *goal, *teacher;
    int teacher_line;
    char source[512];
    char key[8];                                /* right answers                                */
} lesson_text;

static void find_key(const char *text, char *key) {
    size_t n = 0;
    char letter = 'A';
    for (const char *p = text; p; p = strchr(p, '\n'), p += p != NULL) {
        if (!strncmp(p, "? ", 2)) letter = 'A';
        if (!strncmp(p, "= ", 2) && n < 7) key[n++] = letter;
        if (!strncmp(p, "= ", 2) || !strncmp(p, "~ ", 2)) letter++;
    }
    key[n] = 0;
}

static void write_lesson(int n, lesson_text *y, const char *course, const char *work,
                         const char *folder, const char *style) {
    char name[1024], heading[256];
    snprintf(y->source, sizeof y->source, "%s/%02d/lesson.md", course, n);
    char *text = read_text(source = y->source);
    line_number = 0, question_number = 0;
    find_key(text, y->key);
    if (strlen(y->key) != 3) fail_at("wanted three questions with one right answer each");
    y->title = take(&text, "title"), y->question = take(&text, "question");
    y->goal = take(&text, "goal");
    snprintf(name, sizeof name, "%s/%02d.json", work, n);
    facts_text = read_text(name);
    snprintf(name, sizeof name, "lesson-%02d.html", n);
    open_out(folder, name);
    snprintf(heading, sizeof heading, "Lesson %d: %s", n, y->title);
    begin_page(heading, style, "");
    if (n > 1) put("<li><a href=\"lesson-%02d.html\">Lesson %d</a></li>", n - 1, n - 1);
    if (n < LESSONS) put("<li><a href=\"lesson-%02d.html\">Lesson %d</a></li>", n + 1, n + 1);
    put("</ul></nav></header>\n<main id=\"main\">\n<p class=\"number\">Lesson %d of %d, 45 "
        "minutes</p>\n<h1>", n, LESSONS);
    put_line(y->title);
    put("</h1>\n<p class=\"ask\">"), put_line(y->question), put("</p>\n<p>"), put_line(y->goal);
    put("</p>\n<ul class=\"times\" aria-label=\"Minutes\"><li style=\"--m:5\">5 predict</li><li "
        "style=\"--m:10\">10 read</li><li style=\"--m:20\">20 do</li><li style=\"--m:10\">10 "
            "talk</li></ul>\n");
    y->teacher = put_body(text, "== teacher", true);
    y->teacher_line = line_number;
    if (!y->teacher) fail_at("nothing for the teacher");
    end_page();
}

/* Begins the page NAME.html of a text that is no lesson, COURSE/NAME.md; gives the text. UP is the
 * way from the page to the index. PATH, of 1024 bytes, is the source that errors name. */
static char *begin_text(const char *course, const char *name, const char *folder,
                        const char *title, const char *style, const char *up, char *path) {
    char file[64];
    snprintf(path, 1024, "%s/%s.md", course, name);
    char *text = read_text(source = path);
    line_number = 0;
    snprintf(file, sizeof file, "%s.html", name);
    open_out(folder, file);
    begin_page(title, style, up);
    put("</ul></nav></header>\n<main id=\"main\">\n<h1>%s</h1>\n", title);
    return text;
}

static void write_index(const lesson_text *all, const char *course, const char *folder,
                        const char *style) {
    char path[1024];
    char *text = begin_text(course, "index", folder, "How a medical language model works", style,
                            "", path);
    text = put_body(text, "== lessons", true);
    put("<h2>The lessons</h2>\n<ol>\n");
    for (int i = 0; i < LESSONS; i++) {
        put("<li><a href=\"lesson-%02d.html\">", i + 1), put_text(all[i].title,
                                        strlen(all[i].title));
        put("</a><br>"), put_text(all[i].question, strlen(all[i].question)), put("</li>\n");
    }
    put("</ol>\n");
    put_body(text, NULL, true);
    end_page();
}

static void write_teacher(const lesson_text *all, const char *course, const char *work,
                          const char *folder, const char *style) {
    char path[1024];
    put_body(begin_text(course, "teacher/teacher", folder, "For the teacher", style, "../", path),
             NULL, true);
    for (int i = 0; i < LESSONS; i++) {
        snprintf(path, sizeof path, "%s/%02d.json", work, i + 1);
        facts_text = read_text(path);
        source = all[i].source, line_number = all[i].teacher_line;
        put("<h2 id=\"lesson%d\">Lesson %d: ", i + 1, i + 1), put_line(all[i].title);
        put("</h2>\n<p class=\"dim\">Right answers on the page: %c, %c, %c.</p>\n", all[i].key[0],
            all[i].key[1], all[i].key[2]);
        put_body(all[i].teacher, NULL, false);
    }
    end_page();
}

int main(int argc, char **argv) {
    static lesson_text all[LESSONS];
    medrun_options load = {.load = true};
    medrun_error e = {0};
    char path[1024];
    if (argc < 4 || medrun_open(&demo, argv[1], &load, &e)) {
        fprintf(stderr, "%s\n", argc < 4 ? "usage: pages DEMO.mdr COURSE WORK OUT" : e.text);
        return 2;
    }
    medrun_describe(demo, &facts);
    if (!strcmp(argv[2], "--coarser"))
        return weights_write_coarser(argv[3], COARSE_STEP) ? 0 : (perror(argv[3]), 1);
    snprintf(path, sizeof path, "%s/style.css", argv[2]);
    const char *style = read_text(path);
    for (int n = 1; n <= LESSONS; n++) write_lesson(n, &all[n - 1], argv[2], argv[3], argv[4],
                                        style);
    write_index(all, argv[2], argv[4], style);
    write_teacher(all, argv[2], argv[3], argv[4], style);
    medrun_close(demo);
    return 0;
}

