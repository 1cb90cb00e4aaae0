/* medrun-lab: measures what medrun does, and repeats it to the last bit.
 *
 *     cc -O2 -o medrun-lab tools/lab.c -lm -lpthread
 *
 * bench times prompts and generation beside what the machine can do at most; doctor says what the
 * machine has and whether its kernels agree; record writes a run with all that is needed to repeat
 * it, and replay repeats it; compare says how far a checkpoint's logits are from those of another
 * implementation; call shows a model functions and prints the call that it makes; constrain lets it
 * write only what fits a JSON schema, a grammar, an expression or a choice; top shows what
 * each layer would say; completion prints a script for a shell.
 * Options are read as medrun reads them (sections 16 and 17 of medrun.c). MIT licence, see
 * LICENSE. */
#define MEDRUN_NO_MAIN
#define MEDRUN_COMMANDS
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#ifdef MEDRUN_KERNELS_APART
#include "kernels.h"
#endif
#include "tool_calls.c"
#include "write.c"
#include "store.c"
#include "explain_lens.c"
#include "explain_top.c"
#include "serve_grammar.c"
#include "serve_schema.c"

enum { BENCH, DOCTOR, RECORD, REPLAY, COMPARE, CALL, CONSTRAIN, LENS, COMPLETION, LAB_HELP,
       LAB_VERSION, N_LAB_COMMANDS };

/* Options that medrun has not. */
enum { L_PROMPT = N_OPTIONS, L_PREDICT, L_DEPTH, L_REPETITIONS, L_FORMAT, L_TOOLS, L_RENDER,
       L_SCHEMA, L_GRAMMAR, L_REGEX, L_CHOICES, L_ADDITIONAL,
       N_LAB_OPTIONS };
enum { AS_TABLE, AS_CSV, AS_JSON };     /* the words of bench --output, in their order        */

/* ---- record, replay ------------------------------------------------------------------------ */

static void record_ids(buffer *b, const char *key, const int32_t *ids, size_t n) {
    buffer_printf(b, " \"%s\": [", key);
    for (size_t i = 0; i < n; i++) buffer_printf(b, i ? ",%d" : "%d", ids[i]);
    buffer_text(b, "],\n");
}

static const file_kind record_file = {"a record of a run", "{\"engine\": \"me", true, true, 0};

/* The options are those of a command line, so that replay reads them with the same table. */
static int write_record(command *c, const char *path) {
    const medrun_sampling *s = &c->sampling;
    const int32_t *ids = medrun_tokens(c->s);
    size_t n_prompt = n_ids(&c->ids);
    char hash[65], logits[65];
    file_writer w;
    buffer *b = &c->output;
    if (hash_logits(c, logits)) return c->e.code;
    hex_of(c->m->file.hash, hash);
    buffer_text(b, "{\"engine\": \"medrun " MEDRUN_VERSION "\", \"model\": ");
    json_quote(b, c->m->path, strlen(c->m->path));
    buffer_printf(b, ",\n \"model_hash\": \"%s\",\n \"kernels\": \"%s\",\n \"options\": {"
                  "\"--strict\": \"%d\", \"--kv\": \"%s\", \"--ctx\": \"%zu\", \"--seed\": "
                  "\"%llu\",\n  \"--temp\": \"%.9g\", \"--top-k\": \"%d\", \"--top-p\": \"%.9g\", "
                  "\"--min-p\": \"%.9g\", \"--repeat-penalty\": \"%.9g\"},\n", hash,
                  c->m->kernels->name, flag(c, O_STRICT), kv_names[cache_type(c)], context_of(c),
                  (unsigned long long)s->seed, (double)s->temperature, s->top_k, (double)s->top_p,
                  (double)s->min_p, (double)s->repeat_penalty);
    if (c->chat_options.date) buffer_printf(b, " \"date\": \"%s\",\n", c->chat_options.date);
    record_ids(b, "prompt", ids, n_prompt);
    record_ids(b, "answer", ids + n_prompt, medrun_length(c->s) - n_prompt);
    buffer_printf(b, " \"logits_sha256\": \"%s\"}\n", logits);
    check_buffer(c, b);
    if (writer_open(&w, path, &record_file, flag(c, O_FORCE), &c->e)) return c->e.code;
    fwrite(b->data, 1, b->n, w.f);
    return writer_done(&w, &c->e);
}

/* An answer that was cut or stopped is recorded as well, and ends the command with its own code
 * after that. */
static int record_command(command *c) {
    if (c->n_rest != 1)
        return fail(&c->e, MEDRUN_USAGE, "record: wanted a model, a file to write and a prompt");
    const char *path = c->rest[0];
    if (check_output(c, path, &record_file)) return c->e.code;
    int code = run_command(c);
    bool cut = code == MEDRUN_INTERRUPTED || code == MEDRUN_TOO_LONG;
    if (code && !(cut && c->answer.n_answer)) return code;
    medrun_error before = c->e;
    c->e = (medrun_error){0};
    if (!write_record(c, path)) c->e = before;
    return c->e.code;
}

/* Sets the options of a record, as if they had been typed. */
static int replay_options(command *c, const json *j, const char *path) {
    uint32_t all = json_get(j, 0, "options"), v = all + 1;
    if (c->e.code) return c->e.code;
    if (!json_is_type(j, all, JSON_OBJECT))
        return fail(&c->e, MEDRUN_BAD_FILE, "%s: field options: wanted an object", path);
    for (uint32_t i = 0; i < j->nodes[all].count; i += 2, v = j->nodes[v + 1].next) {
        const json_node *key = &j->nodes[v];
        char value[40], known[24], name[40];
        snprintf(name, sizeof name, "%.*s", (int)(key->end - key->start), j->text + key->start);
        int id = *name == '-' ? find_option(c->p, name, ON(RECORD)) : -1;
        if (id < 0 || c->p->options[id].kind == TEXT)
            return fail(&c->e, MEDRUN_BAD_FILE, "%s: options: found %s, which this medrun cannot "
                        "replay", path, name);
        snprintf(known, sizeof known, "--%s", c->p->options[id].name);
        if (json_text(j, all, path, known, value, sizeof value, &c->e)) return c->e.code;
        if (set_option(c, id, value, FROM_FLAG, known)) return c->e.code = MEDRUN_BAD_FILE;
        c->text[id] = NULL;                             /* the number is kept; `value` ends here */
    }
    return MEDRUN_OK;
}

/* Opens what was recorded; -m names another place of the same checkpoint. */
static int open_recorded(command *c, const json *j, const char *path) {
    char model[1024], hash[65], found[65];
    json_text(j, 0, path, "model", model, sizeof model, &c->e);
    json_text(j, 0, path, "model_hash", hash, sizeof hash, &c->e);
    if (!given(c, O_MODEL)) c->text[O_MODEL] = model;
    if (c->e.code || open_model(c)) return c->e.code;
    hex_of(c->m->file.hash, found);
    if (strcmp(hash, found))
        fail(&c->e, MEDRUN_DIFFERS, "checkpoint: expected %s, found %s", hash, found);
    replay_options(c, j, path);
    return start_session(c);
}

static void print_token(const command *c, const char *label, int32_t id) {
    printf("%s %d \"", label, id);
    print_piece(c, id, 0);
    putchar('"');
}

/* Generates again and compares each id with the one that is expected. */
static int compare_answer(command *c, const buffer *expected) {
    int32_t id;
    const char *text;
    size_t n_bytes;
    for (size_t i = 0; i < n_ids(expected) && !c->e.code; i++) {
        int32_t wanted = ids_of(expected)[i];
        if (medrun_next(c->s, &id, &text, &n_bytes, &c->e) || id == wanted) continue;
        printf("token %zu of the answer:", i + 1);
        print_token(c, " expected", wanted);
        print_token(c, ", found", id);
        puts("");
        quit(c, MEDRUN_DIFFERS);
    }
    return c->e.code;
}

static int compare_logits(command *c, const char *wanted) {
    char found[65];
    if (hash_logits(c, found) || !strcmp(wanted, found)) return c->e.code;
    printf("logits after the answer: expected %s, found %s\n", wanted, found);
    return quit(c, MEDRUN_DIFFERS);
}

static int replay_record(command *c, const json *j, const char *path) {
    buffer expected = {0};
    char wanted[65], kernels[32];
    open_recorded(c, j, path);
    if (!c->e.code) json_ids(c, j, json_get(j, 0, "prompt"), "prompt", &c->ids);
    if (!c->e.code) json_ids(c, j, json_get(j, 0, "answer"), "answer", &expected);
    json_text(j, 0, path, "logits_sha256", wanted, sizeof wanted, &c->e);
    json_text(j, 0, path, "kernels", kernels, sizeof kernels, &c->e);
    make_safe(wanted), make_safe(kernels);              /* they are printed                      */
    if (!c->e.code && !c->ids.n) fail(&c->e, MEDRUN_BAD_FILE, "%s: the prompt is empty", path);
    if (!c->e.code) medrun_feed(c->s, ids_of(&c->ids), n_ids(&c->ids), &c->e);
    compare_answer(c, &expected);
    if (!compare_logits(c, wanted))
        printf("same: %zu tokens and the logits after them\n", n_ids(&expected));
    if (c->e.code == MEDRUN_DIFFERS && c->s && strcmp(kernels, c->m->kernels->name))
        printf("recorded with %s kernels, replayed with %s: bf16 weights give the same numbers on "
               "both with --strict only\n", kernels, c->m->kernels->name);
    buffer_free(&expected);
    return c->e.code;
}

static int replay_command(command *c) {
    json j = {0};
    if (!c->n_rest) return fail(&c->e, MEDRUN_USAGE, "replay: wanted a file that record wrote");
    if (!read_json(c, c->rest[0], &j)) replay_record(c, &j, c->rest[0]);
    json_free(&j);
    return c->e.code;
}

/* ---- compare ------------------------------------------------------------------------------- */

/* How far the logits are from the numbers in LIST, those of the ids in c->output: relative L2, and
 * whether the largest is the same one. False where LIST is not as many finite numbers. */
static bool distance_to(const command *c, uint32_t list, double *distance, bool *same) {
    const json *j = &c->m->file.header;
    const float *row = medrun_logits(c->s, 0);
    size_t n = n_ids(&c->output);
    double far = 0, size = 0, top = -INFINITY;
    int32_t wanted = 0, largest = 0;
    uint32_t v = list + 1;
    if (!json_is_type(j, list, JSON_ARRAY) || !n || j->nodes[list].count != n) return false;
    for (size_t i = 0; i < n; i++, v = j->nodes[v].next) {
        int32_t id = ids_of(&c->output)[i];
        double value = json_typeof(j, v) == JSON_NUMBER ? json_number(j, v) : INFINITY;
        if (!(fabs(value) <= FLT_MAX)) return false;
        if (value > top) top = value, wanted = id;
        far += (row[id] - value) * (row[id] - value);
        size += value * value;
    }
    for (int32_t i = 1; i < c->t->vocab_size; i++) if (row[i] > row[largest]) largest = i;
    *distance = sqrt(far / (size > 0 ? size : 1));
    *same = wanted == largest;
    return true;
}

/* A proof may state what another implementation computed for some of the ids. The distance is
 * printed and decides nothing: how near is near depends on the type of the weights. */
static int report_reference(command *c, uint32_t proof, int number) {
    static const char what[] = "proofs.logits: reference";
    const json *j = &c->m->file.header;
    uint32_t node = json_get(j, proof, "reference");
    char source[64];
    double distance = 0;
    bool same = false;
    if (node == JSON_NONE) return printf("proof %d: states no reference\n", number), MEDRUN_OK;
    if (json_ids(c, j, json_get(j, proof, "ids"), "proofs: ids", &c->ids) || feed_proof(c))
        return c->e.code;
    while (!c->e.code && medrun_pending(c->s)) medrun_step(&c->s, 1, &c->e);
    json_ids(c, j, json_get(j, node, "ids"), what, &c->output);
    json_text(j, node, what, "source", source, sizeof source, &c->e);
    if (!c->e.code && !distance_to(c, json_get(j, node, "values"), &distance, &same))
        fail(&c->e, MEDRUN_BAD_FILE, "%s: values: wanted a finite number for each id", what);
    if (c->e.code) return c->e.code;
    printf("proof %d: relative L2 %.1e to ", number, distance);
    make_safe(source);
    printf("%s; the largest is %s\n", source, same ? "the same" : "another");
    medrun_stop(c->s);
    c->s = NULL;
    return MEDRUN_OK;
}

static int compare_command(command *c) {
    if (open_model(c)) return c->e.code;
    const json *j = &c->m->file.header;
    uint32_t all = json_get(j, json_get(j, 0, "proofs"), "logits"), v = all + 1;
    int n = json_is_type(j, all, JSON_ARRAY) ? (int)j->nodes[all].count : 0;
    for (int i = 0; !c->e.code && i < n; i++, v = j->nodes[v].next) {
        c->ids.n = c->output.n = 0;
        report_reference(c, v, i + 1);
    }
    return c->e.code;
}

/* ---- bench --------------------------------------------------------------------------------- */

enum { READ_CHUNK = 1 << 20 };

/* What all threads measure together; SINK keeps results alive. */
typedef struct {
    const medrun_model *m;
    const uint8_t *data;
    size_t n;
    int kind;
    size_t rounds;
    atomic_size_t operations;
    atomic_uint sink;
} ceiling;

static void read_task(void *context, size_t begin, size_t end, int thread) {
    (void)thread;
    ceiling *c = context;
    size_t last = end * READ_CHUNK < c->n ? end * READ_CHUNK : c->n, first = begin * READ_CHUNK;
    float sum = c->m->kernels->more->read_all(c->data + first, last - first);
    atomic_fetch_add(&c->sink, float_bits(sum));
}

static void peak_task(void *context, size_t begin, size_t end, int thread) {
    (void)begin, (void)end, (void)thread;
    ceiling *c = context;
    float sum = 0;
    size_t each = c->m->kernels->more->peak(c->kind, c->rounds, &sum);
    atomic_fetch_add(&c->operations, each * c->rounds);
    atomic_fetch_add(&c->sink, float_bits(sum));
}

/* GB/s of reading all weights once. */
static double read_rate(ceiling *c) {
    double start = seconds();
    parallel_for(c->m->pool, (c->n + READ_CHUNK - 1) / READ_CHUNK, 16, read_task, c);
    return (double)c->n / 1e9 / (seconds() - start);
}

/* Operations a nanosecond of the instruction that does a prompt's products, on all threads. */
static double peak_rate(ceiling *c) {
    double passed = 0;
    for (c->rounds = c->rounds ? c->rounds : 1 << 10; passed < 0.02; c->rounds *= 2) {
        double start = seconds();
        atomic_store(&c->operations, 0);
        parallel_for(c->m->pool, (size_t)c->m->pool->threads, 1, peak_task, c);
        passed = seconds() - start;
    }
    c->rounds /= 2;
    return (double)atomic_load(&c->operations) / 1e9 / passed;
}

/* Feeds N tokens, EACH at a time; the seconds that they take, or a negative number. */
static double time_tokens(command *c, int n, int each) {
    int32_t id = 1;
    double start = seconds();
    for (int i = 0; i < n; i += each) {
        for (int k = 0; k < each; k++, id = (id * 31 + 7) % c->m->config.vocab_size)
            if (medrun_feed(c->s, &id, 1, &c->e)) return -1;
        while (medrun_pending(c->s)) if (medrun_step(&c->s, 1, &c->e)) return -1;
    }
    return seconds() - start;
}

/* Brings the session to DEPTH tokens, all of them processed. */
static int go_to_depth(command *c, int depth) {
    int have = (int)medrun_length(c->s);
    medrun_rewind(c->s, (size_t)(have < depth ? have : depth), NULL);
    if (have < depth && time_tokens(c, depth - have, depth - have) < 0) return c->e.code;
    while (!c->e.code && medrun_pending(c->s)) medrun_step(&c->s, 1, &c->e);
    return c->e.code;
}

enum { MAX_LIST = 16 };

/* What is measured: a prompt (pp) or generation (tg) of N tokens behind DEPTH others. */
typedef struct {
    bool generates;
    int n, depth;                               /* tokens                                       */
    double operations, bytes;                   /* of a token                                   */
    double sum, squares;
    double attention, observed, began;          /* seconds; OBSERVED: of the pass that tells    */
} bench_row;

typedef struct {
    int repeats;
    double ceiling[2];                          /* of prompts, of generation                    */
    size_t n;
    bench_row row[2 * MAX_LIST * MAX_LIST];     /* for each depth the prompts, then the answers */
} bench_list;

/* Between these stages stand the rotation, the cache and attention. */
static void time_attention(void *user, const char *stage, int layer, size_t rows, size_t cols,
                           size_t stride, const float *data) {
    bench_row *row = user;
    (void)layer, (void)rows, (void)cols, (void)stride, (void)data;
    if (!strcmp(stage, "v")) row->began = seconds();
    if (!strcmp(stage, "attn_out")) row->attention += seconds() - row->began;
}

/* Of all repetitions together. */
typedef struct {
    double tps, sd;                             /* tokens a second, standard deviation          */
    double rate, share;                         /* in the unit of the ceiling, and of it        */
    double attention;                           /* its share of the time                        */
} bench_result;

static bench_result result_of(const bench_list *l, const bench_row *r) {
    double tps = r->sum / l->repeats, variance = r->squares / l->repeats - tps * tps;
    double rate = tps * (r->generates ? r->bytes : r->operations) / 1e9;
    return (bench_result){tps, sqrt(variance > 0 ? variance : 0), rate,
                          rate / l->ceiling[r->generates],
                          r->attention / r->observed};
}

/* The share of the model in memory that lies in pages of 2 MB, as Linux tells; else -1. */
static double large_share(const medrun_model *m) {
    FILE *f = fopen("/proc/self/smaps", "r");
    uintptr_t at = (uintptr_t)m->embed.data;
    unsigned long from, to, kb, all = 0, large = 0;
    char line[512];
    bool inside = false;
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "%lx-%lx", &from, &to) == 2) inside = from <= at && at < to;
        else if (inside && sscanf(line, "Rss: %lu", &kb) == 1) all = kb;
        else if (inside && (sscanf(line, "AnonHugePages: %lu", &kb) == 1 ||
                            sscanf(line, "ShmemPmdMapped: %lu", &kb) == 1 ||
                            sscanf(line, "FilePmdMapped: %lu", &kb) == 1)) large += kb;
    }
    if (f) fclose(f);
    return all ? (double)large / (double)all : -1;
}

static const char *test_of(const bench_row *r) { return r->generates ? "tg" : "pp"; }

/* The rows at DEPTH of a kind, in an array where there are many. */
static void print_bench_rows(const bench_list *l, int depth, bool generates) {
    size_t n = 0, done = 0;
    for (size_t i = 0; i < l->n; i++)
        n += l->row[i].depth == depth && l->row[i].generates == generates;
    if (n) printf(",\"%s\":%s", generates ? "tg" : "pp", n > 1 ? "[" : "");
    for (size_t i = 0; i < l->n; i++) {
        const bench_row *row = &l->row[i];
        if (row->depth != depth || row->generates != generates) continue;
        bench_result r = result_of(l, row);
        printf("%s{\"n\":%d,\"tps\":%.3f,\"sd\":%.3f,\"%s\":%.2f,\"%s_share\":%.4f,"
               "\"attention_share\":%.4f}", done++ ? "," : "", row->n, r.tps, r.sd,
               generates ? "gbps" : "gops", r.rate, generates ? "read" : "peak", r.share,
               r.attention);
    }
    if (n > 1) putchar(']');
}

/* A line for each depth. */
static void print_bench_json(const command *c, const bench_list *l) {
    const medrun_model *m = c->m;
    buffer name = {0};
    json_quote(&name, m->name, strlen(m->name));
    for (size_t i = 0; i < l->n; i++) {
        int depth = l->row[i].depth;
        if (i && l->row[i - 1].depth == depth) continue;
        printf("{\"model\":%s,\"type\":\"%s\",\"kernels\":\"%s\",\"threads\":%d,\"kv\":\"%s\","
               "\"depth\":%d,\"large_pages\":%.3f,\"read_gbps\":%.2f,\"dot_gops\":%.1f",
               chars(&name), type_names[m->type], m->kernels->name, m->pool->threads,
               kv_names[cache_type(c)], depth, large_share(m), l->ceiling[true], l->ceiling[false]);
        print_bench_rows(l, depth, false);
        print_bench_rows(l, depth, true);
        puts("}");
    }
    buffer_free(&name);
}

static void print_bench_csv(const command *c, const bench_list *l) {
    const medrun_model *m = c->m;
    puts("model,type,kernels,threads,kv,strict,test,n,depth,tokens_per_second,sd,rate,ceiling,unit,"
         "share,attention_share");
    for (const bench_row *row = l->row; row < l->row + l->n; row++) {
        bench_result r = result_of(l, row);
        putchar('"');
        for (const char *p = m->name; *p; p++) printf(*p == '"' ? "\"\"" : "%c", *p);
        printf("\",%s,%s,%d,%s,%d,%s,%d,%d,%.3f,%.3f,%.2f,%.2f,%s,%.4f,%.4f\n",
               type_names[m->type], m->kernels->name, m->pool->threads, kv_names[cache_type(c)],
               flag(c, O_STRICT), test_of(row), row->n, row->depth, r.tps, r.sd, r.rate,
               l->ceiling[row->generates], row->generates ? "GB/s" : "GOPS", r.share, r.attention);
    }
}

enum { BENCH_COLUMNS = 6, CELL = 40 };

static int columns_in(const char *text) {
    int n = 0;
    for (; *text; text++) n += (*text & 0xC0) != 0x80;
    return n;
}

/* A row of the table, each cell as wide as the widest of its column. */
static void print_cells(char cell[BENCH_COLUMNS][CELL], const int *width) {
    for (int k = 0; k < BENCH_COLUMNS; k++) {
        int blanks = width[k] - columns_in(cell[k]);
        if (k) printf("| %*s%s ", blanks, "", cell[k]);
        else printf("| %s%*s ", cell[k], blanks, "");
    }
    puts("|");
}
static void print_bench_table(const command *c, const bench_list *l) {
    static char cell[2 + 2 * MAX_LIST * MAX_LIST][BENCH_COLUMNS][CELL] = {
        {"test", "tokens/s", "rate", "ceiling", "share", "attention"}};
    const medrun_model *m = c->m;
    char name[sizeof m->name], dashes[] = "----------------------------------------";
    int width[BENCH_COLUMNS] = {0};
    snprintf(name, sizeof name, "%s", m->name);
    make_safe(name);
    printf("%s, %s, %s kernels, %d thread%s, kv %s%s\n\n", name, type_names[m->type],
           m->kernels->name, m->pool->threads, m->pool->threads == 1 ? "" : "s",
           kv_names[cache_type(c)], flag(c, O_STRICT) ? ", strict" : "");
    for (size_t i = 0; i < l->n; i++) {
        const bench_row *row = &l->row[i];
        const char *unit = row->generates ? "GB/s" : "GOPS";
        bench_result r = result_of(l, row);
        char depth[20] = "", (*to)[CELL] = cell[i + 1];
        if (row->depth) snprintf(depth, sizeof depth, " @ d%d", row->depth);
        snprintf(to[0], CELL, "%s%d%s", test_of(row), row->n, depth);
        snprintf(to[1], CELL, "%.2f \302\261 %.2f", r.tps, r.sd);
        snprintf(to[2], CELL, "%.1f %s", r.rate, unit);
        snprintf(to[3], CELL, "%.1f %s", l->ceiling[row->generates], unit);
        snprintf(to[4], CELL, "%.0f %%", 100 * r.share);
        snprintf(to[5], CELL, "%.1f %%", 100 * r.attention);
    }
    for (size_t i = 0; i <= l->n; i++)
        for (int k = 0; k < BENCH_COLUMNS; k++)
            if (columns_in(cell[i][k]) > width[k]) width[k] = columns_in(cell[i][k]);
    print_cells(cell[0], width);
    for (int k = 0; k < BENCH_COLUMNS; k++)
        printf(k ? "|%.*s:" : "|%.*s", width[k] + (k ? 1 : 2), dashes);
    puts("|");
    for (size_t i = 1; i <= l->n; i++) print_cells(cell[i], width);
    puts("\nceiling: what this machine can do at most, multiplying (GOPS) or reading (GB/s)");
    if (large_share(m) >= 0)
        printf("weights: %.0f %% of them lie in pages of 2 MB\n", 100 * large_share(m));
}

typedef struct {
    size_t n;
    int at[MAX_LIST];
} number_list;

/* "128,512" of the option ID. */
static int read_numbers(command *c, int id, number_list *out) {
    const char *text = given(c, id) ? c->text[id] : c->p->options[id].standard, *p = text;
    for (bool more = true; more && !c->e.code;) {
        char one[32];
        double v = -1;
        size_t n = strcspn(p, ",");
        snprintf(one, sizeof one, "%.*s", n < sizeof one ? (int)n : 0, p);
        if (!parse_number(one, &v) || v < 0 || v > 1 << 20 || v != floor(v) || out->n == MAX_LIST)
            fail(&c->e, MEDRUN_USAGE, "--%s: found %s, wanted up to %d numbers from 0 to %d, with "
                 "commas between", c->p->options[id].name, text, MAX_LIST, 1 << 20);
        else out->at[out->n++] = (int)v;
        more = p[n];
        p += n + 1;
    }
    return c->e.code;
}

/* A prompt token costs two operations a weight; a generated one reads each weight but the embedding
 * once, and the cache of the tokens before it that --depth asked for. */
static void add_row_of(command *c, bench_list *l, int n, int depth, bool generates) {
    const medrun_model *m = c->m;
    const model_config *k = &m->config;
    uint64_t embed = (uint64_t)k->vocab_size * (uint64_t)k->hidden_size;
    uint64_t inner = m->parameters - embed * (k->tied ? 1 : 2);
    bench_row *row = &l->row[l->n];
    if (!n) return;
    *row = (bench_row){.generates = generates, .n = n, .depth = depth};
    double keys = 2.0 * k->n_kv_heads * k->head_dim * k->hidden_size;
    double last = (double)inner / k->n_layers - keys;   /* which one row only needs to the end   */
    row->operations = 2 * ((double)inner - last + (last + (double)embed) / n);
    row->bytes = (double)m->weight_bytes - (k->tied ? 0 : (double)tensor_bytes(m->embed.type,
                 (size_t)k->vocab_size, (size_t)k->hidden_size));
    row->bytes += (double)cache_size(m, depth, cache_type(c));
    l->n++;
}

/* What --prompt, --predict and --depth ask for. Returns the most tokens that a row needs, or 0. */
static int list_rows(command *c, bench_list *l) {
    number_list prompts = {0}, answers = {0}, depths = {0};
    int longest = 0;
    if (read_numbers(c, L_PROMPT, &prompts) || read_numbers(c, L_PREDICT, &answers) ||
        read_numbers(c, L_DEPTH, &depths)) return 0;
    for (size_t d = 0; d < depths.n; d++) {
        for (size_t i = 0; i < prompts.n; i++) add_row_of(c, l, prompts.at[i], depths.at[d], false);
        for (size_t i = 0; i < answers.n; i++) add_row_of(c, l, answers.at[i], depths.at[d], true);
    }
    for (const bench_row *r = l->row; r < l->row + l->n; r++)
        if (r->n + r->depth > longest) longest = r->n + r->depth;
    if (!longest) fail(&c->e, MEDRUN_USAGE, "bench: found -p 0 and -n 0: nothing to do");
    else if (longest > c->m->config.max_positions)
        fail(&c->e, MEDRUN_TOO_LONG, "bench: %d tokens > context %d, the model's", longest,
             c->m->config.max_positions);
    return longest;
}

/* The first round warms up. Behind the last one an observer tells the share of attention: it slows
 * the pass, as who observes sees all rows. */
static int time_row(command *c, bench_list *l, bench_row *row, ceiling *top, int round) {
    double rate = row->generates ? read_rate(top) : peak_rate(top), passed;
    bool observed = round == l->repeats;
    if (rate > l->ceiling[row->generates]) l->ceiling[row->generates] = rate;
    if (go_to_depth(c, row->depth)) return c->e.code;
    if (observed) medrun_observe(c->s, time_attention, row);
    passed = time_tokens(c, row->n, row->generates ? 1 : row->n);
    medrun_observe(c->s, NULL, NULL);
    if (observed) row->observed = passed;
    else if (round >= 0 && passed >= 0) {
        row->sum += row->n / passed;
        row->squares += row->n / passed * (row->n / passed);
    }
    return c->e.code;
}

/* Memory to read, as large as the weights or 1 GB, in pages of 2 MB where the system has them: how
 * the file lies in memory must not lower the ceiling that it is compared with. */
static void own_memory(ceiling *top) {
    size_t most = 1 << 30, n = top->n < most ? top->n : most;
    uint8_t *p = map_bytes(-1, n);
    if (!p) return;
    want_large_pages(p, n);
    memset(p, 1, n);
    top->data = p, top->n = n;
}

/* All rows by turns with the machine's two ceilings, measured beside them. */
static int bench_command(command *c) {
    static bench_list l;
    if (open_model(c)) return c->e.code;
    const medrun_model *m = c->m;
    int longest = list_rows(c, &l);
    if (c->e.code) return c->e.code;
    l.repeats = whole(c, L_REPETITIONS);
    medrun_session_options o = session_options(c, longest);
    if (medrun_start(&c->s, m, &o, NULL, 0, &c->e)) return c->e.code;
    engine g = {.k = m->kernels, .strict = flag(c, O_STRICT)};
    ceiling top = {.m = m, .data = m->embed.data, .kind = pack_kind(&g, m->type),
                   .n = (size_t)(m->file.map.data + m->file.map.n - m->embed.data)};
    own_memory(&top);
    for (int r = -1; r <= l.repeats; r++)
        for (size_t i = 0; i < l.n; i++)
            if (time_row(c, &l, &l.row[i], &top, r)) return c->e.code;
    if (whole(c, L_FORMAT) == AS_JSON) print_bench_json(c, &l);
    else if (whole(c, L_FORMAT) == AS_CSV) print_bench_csv(c, &l);
    else print_bench_table(c, &l);
    return MEDRUN_OK;
}

/* ---- doctor -------------------------------------------------------------------------------- */

enum { CHECK_PANELS = 3, CHECK_COLS = 192, CHECK_TOKENS = 11 };

/* A small product of random numbers. OUT (tokens, rows); false: no memory. An int4 panel may be any
 * bytes, as long as each scale is a number. */
static bool small_product(const kernel_set *k, int type, float *out) {
    int kind = type == TYPE_BF16 ? PACK_F32 : k->int_pack;
    size_t rows = CHECK_PANELS * LANES, cols = CHECK_COLS, panel = panel_bytes(type, cols);
    uint64_t random = 1;
    float *x = new_array((rows + CHECK_TOKENS) * cols, sizeof *x);
    uint8_t *w = new_array(CHECK_PANELS, panel);
    uint8_t *a = new_array(1, pack_bytes(kind, cols, CHECK_TOKENS));
    uint8_t block[BLOCK_BYTES * CHECK_COLS];
    bool made = x && w && a;
    for (size_t i = 0; made && i < (rows + CHECK_TOKENS) * cols; i++)
        x[i] = (float)(random_uniform(&random) - 0.5);
    for (size_t p = 0; made && type != TYPE_INT4 && p < CHECK_PANELS; p++)
        store_panel(type, x + (CHECK_TOKENS + p * LANES) * cols, LANES, cols, w + p * panel);
    for (size_t i = 0; made && type == TYPE_INT4 && i < CHECK_PANELS * panel; i++)
        w[i] = (uint8_t)(random_uniform(&random) * 120);
    if (made) k->pack(kind, type == TYPE_INT8, x, cols, cols, CHECK_TOKENS, a);
    matmul_part part = {w, a, CHECK_PANELS, cols, CHECK_TOKENS, cols, block, out, rows};
    if (made) matmul_of(k, type, kind)(&part);
    free(x), free(w), free(a);
    return made;
}

static void list_opencl(void) {
#ifdef MEDRUN_OPENCL
    opencl cl;
    device_facts all[MAX_DEVICES];
    medrun_error e = {0};
    int n = opencl_open(&cl, getenv("MEDRUN_OPENCL_LIBRARY"), &e) ? 0 : list_devices(&cl, all);
    if (!n) printf("OpenCL     %s\n", e.code ? e.text : "no device");
    for (int i = 0; i < n; i++) {
        char platform[128] = "", version[128] = "";
        cl_platform_id id = NULL;
        cl_uint units = 0;
        cl.clGetDeviceInfo(all[i].id, CL_DEVICE_PLATFORM, sizeof id, &id, NULL);
        cl.clGetPlatformInfo(id, CL_PLATFORM_NAME, sizeof platform - 1, platform, NULL);
        cl.clGetDeviceInfo(all[i].id, CL_DEVICE_VERSION, sizeof version - 1, version, NULL);
        cl.clGetDeviceInfo(all[i].id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof units, &units, NULL);
        make_safe(all[i].name), make_safe(platform), make_safe(version);
        printf("OpenCL     %d %s (%s, %s), %.1f MB, %u units, %sfma\n", i, all[i].name, platform,
               version, (double)all[i].memory / 0x1p20, units,
               all[i].numbers & CL_FP_FMA ? "" : "slow ");
    }
#else
    puts("OpenCL     not in this build (make OPENCL=1)");
#endif
}

static int doctor_command(command *c) {
    static float found[CHECK_TOKENS * CHECK_PANELS * LANES], wanted[sizeof found / sizeof *found];
    static const struct { const char *name; int type; } checks[] = {
        {"int8", TYPE_INT8}, {"int4", TYPE_INT4}, {"bf16, strict", TYPE_BF16}};
    const kernel_set *sets[N_KERNEL_SETS], *chosen;
    const char *limit;
    machine_limits l = limits_of_machine();
    int n = usable_kernels(sets);
    if (choose_kernels(&chosen, getenv("MEDRUN_KERNELS"), &c->e)) return c->e.code;
    int threads = default_threads(&limit);
    printf(limit ? "processors %d (%s)\n" : "processors %d\n", threads, limit);
    printf("memory     %.1f MB%s, %.1f MB are free\n", mb((uint64_t)l.memory),
           l.of_group ? " (the control group's limit)" : "", mb((uint64_t)l.available));
    printf("kernels    %s\n", chosen->name);
    if (plain_only()) printf("           %s\n", plain_only());
    for (int i = 0; i < 3 * n; i++) {
        const kernel_set *k = sets[i / 3];
        int type = checks[i % 3].type;
        if (!small_product(sets[n - 1], type, wanted) || !small_product(k, type, found))
            return out_of_memory(&c->e, sizeof found);
        bool same = !memcmp((void *)found, (void *)wanted, sizeof found);
        printf("self-test  %s, %s: %s\n", k->name, checks[i % 3].name,
               same ? "as scalar" : "DIFFERS from scalar");
        if (!same) quit(c, MEDRUN_DIFFERS);
    }
    list_opencl();
    return c->e.code;
}

/* ---- call ---------------------------------------------------------------------------------- */

/* What the model writes between the tokens of a call is held back until the call has ended. */
static buffer held_call;
static bool in_call;

/* The end of a call: a line of JSON. What is no call is printed as the text it is. */
static int print_call(command *c) {
    answer *a = &c->answer;
    buffer line = {0};
    medrun_error why = {0};
    int code = tool_calls(&line, chars(&held_call), held_call.n, &why);
    const buffer *shown = code ? &held_call : &line;
    if (a->mid_line) buffer_text(&a->held, "\n");
    buffer_add(&a->held, shown->data, shown->n);
    buffer_text(&a->held, "\n");
    bool failed = a->held.failed || held_call.failed;
    buffer_free(&line);
    buffer_free(&held_call);
    in_call = false;
    if (failed) return out_of_memory(&c->e, a->held.n);
    if (print_held(c, true)) return c->e.code;
    if (!code) return MEDRUN_OK;
    return fail(&c->e, MEDRUN_FAILED, "the model's tool call is not one: %s", why.text);
}

/* Prints a token's text for next_piece. */
static int print_piece_or_call(command *c, int32_t id, const char *text, size_t n) {
    answer *a = &c->answer;
    bool opens = id == chat_token(c->t, c->chat->call_tokens[0]);
    bool closes = in_call && id == chat_token(c->t, c->chat->call_tokens[1]);
    if (!in_call) {
        in_call = opens;
        buffer_add(&a->held, text, n);
        return check_buffer(c, &a->held) ? c->e.code : print_held(c, a->ended || opens);
    }
    buffer_add(&held_call, text, n);
    return a->ended || closes ? print_call(c) : check_buffer(c, &held_call);
}

/* The functions that --tools names, as the model is to see them. */
static int read_tools(command *c, buffer *shown) {
    buffer text = {0};
    if (c->e.code || !given(c, L_TOOLS)) return c->e.code;
    if (!read_text(c, c->text[L_TOOLS], MOST_INPUT, &text))
        tools_text(c->chat, chars(&text), text.n, shown, &c->e);
    c->chat_options.tools = chars(shown);
    c->chat_options.n_tools = shown->n;
    buffer_free(&text);
    return c->e.code;
}

/* The prompt of a conversation with calls, blocks and results. */
static int render_conversation(command *c, bool as_text) {
    const char *path = c->text[O_MESSAGES];
    json j = {0};
    tool_list list = {0};
    if (c->e.code) return c->e.code;
    chat_writer w = {c->chat, c->t, &c->chat_options, as_text, tools_kinds(c->chat),
                     .out = &c->ids, .e = &c->e};
    if (!read_json(c, path, &j) &&
        !tools_messages(c->chat, &j, 0, path, given(c, L_TOOLS), &list, &c->e))
        chat_render(&w, list.m, list.n, !flag(c, O_NO_OPENING));
    tool_list_free(&list);
    json_free(&j);
    return c->e.code;
}

/* Prints what has come of a call that was cut off. */
static int end_call(command *c) {
    medrun_error before = c->e;
    if (!in_call) return c->e.code;
    c->e = (medrun_error){0};
    print_call(c);
    buffer_free(&c->answer.held);
    if (before.code) c->e = before;
    return c->e.code;
}

static int ask(command *c) {
    c->piece = print_piece_or_call;
    start_session(c);
    answer_ids(c);
    return end_call(c);
}

static int call_command(command *c) {
    buffer tools = {0};
    bool render = flag(c, L_RENDER), model = given(c, O_MODEL);
    bool as_text = render && !flag(c, O_RENDER_IDS), named = given(c, O_TEMPLATE) && as_text;
    if (!given(c, L_TOOLS) && !given(c, O_MESSAGES))
        return fail(&c->e, MEDRUN_USAGE, "call: wanted --tools FILE.json or --messages FILE.json");
    if (flag(c, O_RAW))
        return fail(&c->e, MEDRUN_USAGE, "call: wanted a chat template; leave --raw out");
    if (render && (!given(c, O_MESSAGES) || (!model && !named)))
        return fail(&c->e, MEDRUN_USAGE, "--render: wanted --messages FILE.json and a model; "
                    "--template NAME does without a model, but not with --ids");
    if (!render) open_model(c);
    else if (model) open_tokenizer(c);
    choose_chat(c);
    read_tools(c, &tools);
    if (given(c, O_MESSAGES)) render_conversation(c, as_text);
    else make_prompt(c, false);
    if (render && as_text) print_text(c, &c->ids);
    else if (render) print_ids(c);
    else ask(c);
    buffer_free(&tools);
    return c->e.code;
}

#include "lab_constrain.c"
#include "lab_completion.c"

/* ---- the program --------------------------------------------------------------------------- */

static const command_row lab_commands[N_LAB_COMMANDS + 1] = {
    [BENCH] = {"bench", bench_command, "MODEL.mdr",
        .help = "speed of a prompt and of generation, beside what this machine can do"},
    [DOCTOR] = {"doctor", doctor_command, "",
        "what this machine has, and whether its kernels agree", .no_model = true},
    [RECORD] = {"record", record_command, "MODEL.mdr OUT.json -p TEXT | -f FILE",
        "answers as medrun run does, and writes what replay needs; the file holds prompt and "
        "answer, as ids: keep it safe", .more = 1},
    [REPLAY] = {"replay", replay_command, "RUN.json",
        "repeats what record wrote; exit 4 at the first difference", .no_model = true, .more = 1},
    [COMPARE] = {"compare", compare_command, "MODEL.mdr",
        .help = "how far the logits of the proofs are from those of another implementation"},
    [CALL] = {"call", call_command, "MODEL.mdr --tools FILE.json -p TEXT | --messages FILE.json",
        .help = "shows a model functions, and prints the call it makes as JSON"},
    [CONSTRAIN] = {"constrain", constrain_command,
        "MODEL.mdr --schema FILE | --grammar FILE | ... -p TEXT",
        .help = "answers so that the answer fits a JSON schema, a grammar, an expression or a "
            "choice"},
    [LENS] = {"top", top_command, "MODEL.mdr -p TEXT | -f FILE",
        .help = "what each layer would say, where the prompt ends and the answer begins"},
    [COMPLETION] = {"completion", completion_command, "bash|zsh|fish",
        "a script for the shell: Tab completes then, for all programs of medrun", .no_model = true,
        .more = 1},
    [LAB_HELP] = {"help", help_command, "[COMMAND]", "all commands, or the options of one",
        .no_model = true, .more = 1},
    [LAB_VERSION] = {"version", version_command, "", "prints the version", .no_model = true},
};

static option_row lab_options[N_LAB_OPTIONS] = {
    [L_PROMPT] = {"prompt", "p", "N,...", TEXT, ON(BENCH), .standard = "512",
        .variable = "bench-prompt", .help = "tokens of the prompt, up to 16 lengths; 0: none"},
    [L_PREDICT] = {"predict", "n", "N,...", TEXT, ON(BENCH), .standard = "128",
        .variable = "bench-predict", .help = "tokens to generate, one after the other; 0: none"},
    [L_DEPTH] = {"depth", "d", "N,...", TEXT, ON(BENCH), .standard = "0",
        .help = "tokens that stand before each and are not timed"},
    [L_REPETITIONS] = {"repetitions", "r", "N", WHOLE, ON(BENCH), .min = 1, .max = 1000,
        .standard = "5", .help = "how often each is timed"},
    [L_TOOLS] = {"tools", NULL, "FILE.json", TEXT, ON(CALL),
        .help = "functions, [{\"type\": \"function\", \"function\": ...}] (apertus, llama3.1)"},
    [L_RENDER] = {"render", .on = ON(CALL),
        .help = "print the prompt instead of asking; --template NAME does without a model"},
    [L_SCHEMA] = {"schema", NULL, "FILE.json", TEXT, ON(CONSTRAIN), .help = "a JSON schema"},
    [L_GRAMMAR] = {"grammar", NULL, "FILE", TEXT, ON(CONSTRAIN),
        .help = "a grammar as llama.cpp has them"},
    [L_REGEX] = {"regex", NULL, "TEXT", TEXT, ON(CONSTRAIN),
        .help = "a regular expression for the whole answer"},
    [L_CHOICES] = {"choices", NULL, "A,B,...", TEXT, ON(CONSTRAIN), .help = "one of these texts"},
    [L_ADDITIONAL] = {"additional", NULL, "none|spec", CHOICE, ON(CONSTRAIN), .standard = "none",
        .help = "where a schema names properties, others too, as the standard says"},
    [L_FORMAT] = {"output", "o", "md|csv|json", CHOICE, ON(BENCH), .standard = "md",
        .help = "a table, values with commas between, or a line for each depth"},
};

/* Options of medrun's: record and call take those of run, call some of render's too, bench those of
 * a session, replay and compare a place of the model. */
static void take_options(void) {
    const int bench[] = {O_MODEL, O_THREADS, O_BATCH, O_KV, O_LOAD, O_MLOCK, O_STRICT, O_DEVICE,
                         O_GPU_LAYERS, O_QUIET};
    const int replay[] = {O_MODEL, O_THREADS, O_DEVICE, O_GPU_LAYERS, O_QUIET};
    const int call[] = {O_MESSAGES, O_RENDER_IDS, O_NO_OPENING};
    for (int id = 0; id < N_OPTIONS; id++) {
        lab_options[id] = option_rows[id];
        lab_options[id].on = option_rows[id].on & ON(RUN)
            ? ON(RECORD) | ON(CALL) | ON(LENS) | ON(CONSTRAIN) : 0;
    }
    for (size_t i = 0; i < sizeof bench / sizeof *bench; i++)
        lab_options[bench[i]].on |= ON(BENCH);
    for (size_t i = 0; i < sizeof replay / sizeof *replay; i++)
        lab_options[replay[i]].on |= ON(REPLAY) | ON(COMPARE);
    for (size_t i = 0; i < sizeof call / sizeof *call; i++) lab_options[call[i]].on |= ON(CALL);
    lab_options[O_TOP].on = 0;
    lab_options[O_HELP].on = lab_options[O_VERSION].on = ~0u;
}

int main(int argc, char **argv) {
    static const program lab = {"medrun-lab", "measures what medrun does, and repeats it",
                                lab_commands, lab_options, N_LAB_OPTIONS, -1};
    take_options();
    return run_program(&lab, argc, argv);
}
