/* medrun-export - makes a medrun checkpoint from a Hugging Face folder. MIT licence, see LICENSE.
 *
 *     cc -O2 -o medrun-export tools/export.c -lm -lpthread
 *     medrun-export SOURCE OUT.mdr --type int8
 *
 * A source gives three things: a config, named tensors and a tokenizer. Everything in it is checked
 * before anything is written: what is not known to be right is refused with file, field, what was
 * found and what was wanted. Then the weights stream through, a panel of 16 rows at a time, many
 * tensors at once, into OUT.partial; the engine opens that file and computes the proofs; the file
 * is read again, hash by hash, and only then gets its name.
 *
 *  1 Files         a folder's files, JSON without doubts
 *  2 Config        config.json and generation_config.json
 *  3 Tokenizer     tokenizer.json -> tokenizer.bin
 *  4 Chat          template, stop ids, licence
 *  5 Safetensors   a strict parser
 *  6 Plan          which tensor of the source becomes which section; the header
 *  7 Proofs        texts, conversations and prompts with what they must give
 *  8 Progress      the bar, and Ctrl-C
 *  9 Writing       sections, on all threads
 * 10 Finishing     proofs, reading again, the name
 * 11 Commands      options, --dry-run, main
 *
 * Tests: tests/20_export.c. */

#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include <sys/file.h>
#include <sys/statvfs.h>

/* ============================================================================================
 * 1 Files: a folder's files, JSON without doubts
 * ============================================================================================ */

enum { PATH_BYTES = 4096, JSON_BYTES = 64 << 20, MAX_SHARDS = 512, READ_BYTES = 1 << 20 };

/* A file the checkpoint is made from, for its provenance. */
typedef struct {
    char name[256];             /* within the folder                                           */
    uint64_t bytes;
    uint8_t digest[32];
    int fd;                     /* of a shard of weights; else -1                              */
    dev_t device;
    ino_t inode;
} source_file;

enum { SOURCE_BF16, SOURCE_F16, SOURCE_F32 };       /* the number types that can be exported   */

typedef struct {
    char *name;
    int dtype;                  /* an entry of source_types                                    */
    int rank;
    uint64_t shape[2];          /* when rank <= 2                                              */
    size_t file;                /* of source.files                                             */
    uint64_t begin, end;        /* bytes of that file                                          */
    bool indexed, used;
} source_tensor;

typedef struct {
    double temperature, top_p, min_p, repeat_penalty;
    int64_t top_k;
} source_sampling;

/* Everything a kind of source has to give; only the functions that fill it know which kind. */
typedef struct {
    const char *folder;
    source_file *files;
    size_t n_files, files_cap;
    source_tensor *tensors;     /* by name once they are all there                             */
    size_t n_tensors, tensors_cap;
    model_config config;
    buffer tokenizer;           /* the bytes of a tokenizer.bin                                */
    int32_t eos;                /* the tokenizer's, or -1                                      */
    const chat_template *chat;
    int n_stops, stops[MEDRUN_MAX_STOPS];
    source_sampling sampling;
    char licence[128];
} source;

typedef struct {
    char path[PATH_BYTES];      /* for messages                                                */
    file_map map;
    json j;
} json_file;

/* Room for one more item at the end of *ARRAY. */
static int grow(void *array, size_t n, size_t *cap, size_t size, medrun_error *e) {
    void **at = array;
    if (n < *cap) return MEDRUN_OK;
    size_t more = *cap ? *cap * 2 : 16;
    void *p = mul_overflows(more, size) ? NULL : MEDRUN_ALLOC(*at, more * size);
    if (!p) return out_of_memory(e, more * size);
    return *at = p, *cap = more, MEDRUN_OK;
}

static int join_path(char path[PATH_BYTES], const char *folder, const char *name,
                     medrun_error *e) {
    int n = snprintf(path, PATH_BYTES, "%s/%s", folder, name);
    if (n > 0 && n < PATH_BYTES) return MEDRUN_OK;
    return fail(e, MEDRUN_BAD_FILE, "%s: this path is too long", name);
}

static bool file_exists(const char *folder, const char *name) {
    char path[PATH_BYTES];
    struct stat st;
    return !join_path(path, folder, name, NULL) && !stat(path, &st);
}

/* Adds a file to the provenance; its digest is the caller's to fill in. */
static int add_file(source *s, const char *name, const char *path, source_file **out,
                    medrun_error *e) {
    struct stat st;
    if (grow(&s->files, s->n_files, &s->files_cap, sizeof *s->files, e)) return e->code;
    if (stat(path, &st)) return fail(e, MEDRUN_BAD_FILE, "%s: %s", path, strerror(errno));
    source_file *f = &s->files[s->n_files++];
    *f = (source_file){.bytes = (uint64_t)st.st_size, .fd = -1, .device = st.st_dev,
                       .inode = st.st_ino};
    snprintf(f->name, sizeof f->name, "%s", name);
    return *out = f, MEDRUN_OK;
}

/* ---- JSON ---------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *p;
    size_t n;
} span;

static int compare_spans(const void *a, const void *b) {
    const span *x = a, *y = b;
    size_t n = x->n < y->n ? x->n : y->n;
    int order = n ? memcmp(x->p, y->p, n) : 0;
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

/* A key that stands twice in an object means that two readers may see two different files. */
static int check_keys(const json *j, uint32_t v, const char *path, medrun_error *e) {
    size_t n = j->nodes[v].count / 2;
    if (n < 2) return MEDRUN_OK;
    buffer text = {0};
    span *keys = new_array(n, sizeof *keys);
    uint32_t c = v + 1;
    for (size_t i = 0; keys && i < n; i++, c = j->nodes[c + 1].next) {
        size_t before = text.n;
        json_unescape(j, c, &text);
        keys[i].n = text.n - before;
    }
    int code = !keys || text.failed ? out_of_memory(e, n * sizeof *keys) : MEDRUN_OK;
    const uint8_t *p = text.data;
    for (size_t i = 0; !code && i < n; p += keys[i++].n) keys[i].p = p;
    if (!code) qsort(keys, n, sizeof *keys, compare_spans);
    for (size_t i = 1; !code && i < n; i++)
        if (!compare_spans(&keys[i - 1], &keys[i]))
            code = fail(e, MEDRUN_BAD_FILE, "%s: field %.*s: found twice in one object, wanted "
                        "once; remove one of the two", path, keys[i].n < 80 ? (int)keys[i].n : 80,
                        keys[i].n ? (const char *)keys[i].p : "");
    free(keys);
    buffer_free(&text);
    return code;
}

/* The parser stops at NaN and Infinity, which are no JSON but which Python writes: name them. */
static int json_failure(const json *j, size_t n, const char *path, const medrun_error *why,
                        medrun_error *e) {
    const json_node *last = j->n ? &j->nodes[j->n - 1] : NULL, *key = last - 1;
    static const char *const words[] = {"NaN", "Infinity", "-Infinity"};
    for (size_t i = 0; last && i < 3; i++) {
        size_t len = strlen(words[i]);
        if (n - last->start < len || memcmp(j->text + last->start, words[i], len)) continue;
        bool named = j->n > 1 && key->type == JSON_STRING;
        return fail(e, MEDRUN_BAD_FILE, "%s: field %.*s: found %s, wanted a finite number", path,
                    named ? (int)(key->end - key->start) : 1, named ? j->text + key->start : "?",
                    words[i]);
    }
    return fail(e, why->code, "%s: %s; download it again", path, why->text);
}

/* Parses TEXT and refuses doubtful objects; on failure J is free again. */
static int parse_json(json *j, const char *text, size_t n, const char *path, medrun_error *e) {
    medrun_error why = {0};
    int code = json_parse(j, text, n, &why);
    if (code) json_failure(j, n, path, &why, e);
    for (uint32_t v = 0; !code && v < j->n; v++)
        if (json_typeof(j, v) == JSON_OBJECT) code = check_keys(j, v, path, e);
    if (!code && json_typeof(j, 0) != JSON_OBJECT)
        code = fail(e, MEDRUN_BAD_FILE, "%s: found another JSON value, wanted an object", path);
    if (code) json_free(j);
    return code;
}

static void close_json(json_file *f) {
    json_free(&f->j);
    unmap_file(&f->map);
}

static bool is_open(const json_file *f) { return f->map.data != NULL; }

/* Maps and parses the file at f->path. */
static int open_json_path(json_file *f, medrun_error *e) {
    int code = map_file(f->path, &f->map, e);
    if (!code && f->map.n > JSON_BYTES)
        code = fail(e, MEDRUN_BAD_FILE, "%s: found %zu bytes, wanted at most %d", f->path, f->map.n,
                    JSON_BYTES);
    if (!code) code = parse_json(&f->j, (const char *)f->map.data, f->map.n, f->path, e);
    if (code) close_json(f);
    return code;
}

/* Opens NAME of the folder and adds it to the provenance. A missing OPTIONAL file stays closed. */
static int open_json(source *s, const char *name, bool optional, json_file *f, medrun_error *e) {
    source_file *file;
    *f = (json_file){0};
    if (join_path(f->path, s->folder, name, e)) return e->code;
    if (optional && !file_exists(s->folder, name)) return MEDRUN_OK;
    int code = open_json_path(f, e);
    if (code || (code = add_file(s, name, f->path, &file, e))) return close_json(f), code;
    file->bytes = f->map.n;
    sha256_of(f->map.data, f->map.n, file->digest);
    return MEDRUN_OK;
}

/* The value of KEY, JSON_NONE also when it is null: Hugging Face writes null for "not set". */
static uint32_t given(const json *j, uint32_t v, const char *key) {
    uint32_t f = json_get(j, v, key);
    return f != JSON_NONE && json_typeof(j, f) == JSON_NULL ? JSON_NONE : f;
}

/* A value as it stands in the file, shortened, for messages. */
typedef struct { char text[120]; } shown;

static shown show(const json *j, uint32_t v) {
    shown s = {"nothing"};
    if (v == JSON_NONE) return s;
    size_t n = j->nodes[v].end - j->nodes[v].start, most = sizeof s.text - 5;
    bool cut = n > most;
    if (json_typeof(j, v) <= JSON_TRUE)
        return snprintf(s.text, sizeof s.text, "%s", json_typeof(j, v) == JSON_NULL ? "null" :
                        json_typeof(j, v) == JSON_TRUE ? "true" : "false"), s;
    if (cut) n = most;
    memcpy(s.text, j->text + j->nodes[v].start, n);
    if (cut) n -= utf8_unfinished((const uint8_t *)s.text, n);
    snprintf(s.text + n, sizeof s.text - n, "%s", cut ? "..." : "");
    return s;
}

static int wrong_field(const json_file *f, const char *field, uint32_t v, const char *wanted,
                       medrun_error *e) {
    return fail(e, MEDRUN_BAD_FILE, "%s: field %s: found %s, wanted %s", f->path, field,
                show(&f->j, v).text, wanted);
}

/* true or false, FALLBACK when it is not given. */
static int read_bool(const json_file *f, uint32_t v, const char *key, bool fallback, bool *out,
                     medrun_error *e) {
    uint32_t b = given(&f->j, v, key);
    *out = fallback;
    if (b == JSON_NONE) return MEDRUN_OK;
    json_type type = json_typeof(&f->j, b);
    if (type != JSON_TRUE && type != JSON_FALSE)
        return wrong_field(f, key, b, "true or false", e);
    return *out = type == JSON_TRUE, MEDRUN_OK;
}

/* A number that may be missing: then *OUT keeps its value. */
static int read_real(const json_file *f, uint32_t v, const char *key, double min, double max,
                     double *out, medrun_error *e) {
    if (given(&f->j, v, key) == JSON_NONE) return MEDRUN_OK;
    return json_real(&f->j, v, f->path, key, min, max, out, e) ? MEDRUN_OK : e->code;
}

static int read_whole(const json_file *f, uint32_t v, const char *key, int64_t min, int64_t max,
                      int64_t *out, medrun_error *e) {
    if (given(&f->j, v, key) == JSON_NONE) return MEDRUN_OK;
    return json_int(&f->j, v, f->path, key, min, max, out, e) ? MEDRUN_OK : e->code;
}

/* A whole number without sign, point or exponent, exactly. */
static bool json_size(const json *j, uint32_t v, uint64_t *out) {
    if (v == JSON_NONE || json_typeof(j, v) != JSON_NUMBER) return false;
    *out = 0;
    for (const char *p = j->text + j->nodes[v].start; p < j->text + j->nodes[v].end; p++) {
        if (*p < '0' || *p > '9' || *out > (UINT64_MAX - 9) / 10) return false;
        *out = *out * 10 + (uint64_t)(*p - '0');
    }
    return true;
}

/* ============================================================================================
 * 2 Config: config.json and generation_config.json
 *
 * Files of transformers 4 have rope_theta and rope_scaling, files of transformers 5 have
 * rope_parameters. Who looks for one spelling only takes the default theta for the other, silently;
 * so both are read, and where both stand they must say the same.
 * ============================================================================================ */

typedef struct {
    bool llama3;
    double theta;               /* 0: not given */
    double factor, low, high, original;
} rope;

static int check_architecture(const json_file *f, medrun_error *e) {
    const json *j = &f->j;
    uint32_t list = given(j, 0, "architectures"), type = given(j, 0, "model_type");
    bool one = list != JSON_NONE && json_typeof(j, list) == JSON_ARRAY && j->nodes[list].count == 1;
    if (!one || !json_is(j, list + 1, "LlamaForCausalLM"))
        return wrong_field(f, "architectures", list, "[\"LlamaForCausalLM\"]; this medrun knows no "
                           "other", e);
    if (type != JSON_NONE && !json_is(j, type, "llama"))
        return wrong_field(f, "model_type", type, "llama", e);
    return MEDRUN_OK;
}

/* What a Llama config may say but this engine does not compute. */
static int check_unsupported(const json_file *f, medrun_error *e) {
    const json *j = &f->j;
    uint32_t activation = given(j, 0, "hidden_act"), v;
    static const char *const flags[] = {"attention_bias", "mlp_bias"};
    bool on;
    double part = 1;
    if (activation != JSON_NONE && !json_is(j, activation, "silu"))
        return wrong_field(f, "hidden_act", activation, "silu", e);
    for (size_t i = 0; i < 2; i++) {
        if (read_bool(f, 0, flags[i], false, &on, e)) return e->code;
        if (on) return fail(e, MEDRUN_BAD_FILE, "%s: field %s: found true, wanted false; models "
                            "with biases are not supported", f->path, flags[i]);
    }
    if ((v = given(j, 0, "quantization_config")) != JSON_NONE)
        return wrong_field(f, "quantization_config", v, "none; use the original bf16 or f16 "
                           "weights", e);
    if (read_real(f, 0, "partial_rotary_factor", 0, 1, &part, e)) return e->code;
    if (part != 1)
        return wrong_field(f, "partial_rotary_factor", given(j, 0, "partial_rotary_factor"), "1", e);
    uint32_t before = given(j, 0, "torch_dtype"), now = given(j, 0, "dtype");
    if (before != JSON_NONE && now != JSON_NONE && strcmp(show(j, before).text, show(j, now).text))
        return fail(e, MEDRUN_BAD_FILE, "%s: fields torch_dtype and dtype: found %s and %s, wanted "
                    "the same; remove the wrong one", f->path, show(j, before).text,
                    show(j, now).text);
    return MEDRUN_OK;
}

static int read_sizes(const json_file *f, model_config *c, medrun_error *e) {
    const struct { const char *key; int64_t min, max; int *to; bool optional; } fields[] = {
        {"vocab_size", 257, 1 << 22, &c->vocab_size, false},
        {"hidden_size", 16, 1 << 16, &c->hidden_size, false},
        {"num_hidden_layers", 1, 1024, &c->n_layers, false},
        {"num_attention_heads", 1, 1024, &c->n_heads, false},
        {"num_key_value_heads", 1, 1024, &c->n_kv_heads, true},
        {"head_dim", 16, 1024, &c->head_dim, true},
        {"intermediate_size", 16, 1 << 20, &c->ffn_size, false},
        {"max_position_embeddings", 1, 1 << 24, &c->max_positions, false},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        int64_t n = 0;
        if (fields[i].optional && given(&f->j, 0, fields[i].key) == JSON_NONE) continue;
        if (!json_int(&f->j, 0, f->path, fields[i].key, fields[i].min, fields[i].max, &n, e))
            return e->code;
        *fields[i].to = (int)n;
    }
    if (!c->n_kv_heads) c->n_kv_heads = c->n_heads;
    if (!c->head_dim) {
        if (c->hidden_size % c->n_heads)
            return fail(e, MEDRUN_BAD_FILE, "%s: field head_dim: found nothing, and hidden_size %d "
                        "is no multiple of num_attention_heads %d", f->path, c->hidden_size,
                        c->n_heads);
        c->head_dim = c->hidden_size / c->n_heads;
    }
    return MEDRUN_OK;
}

/* One block of rope fields, without layer types. A field that is not known is an error: it might
 * change every position. */
static int read_rope_block(const json_file *f, uint32_t v, const char *block, rope *r,
                           medrun_error *e) {
    const json *j = &f->j;
    char what[PATH_BYTES + 64];
    snprintf(what, sizeof what, "%s: %s", f->path, block);
    const struct { const char *key; double min, max, *to; } fields[] = {
        {"rope_theta", 1, 1e12, &r->theta},       {"factor", 1, 1e6, &r->factor},
        {"low_freq_factor", 1e-3, 1e6, &r->low},  {"high_freq_factor", 1e-3, 1e6, &r->high},
        {"original_max_position_embeddings", 1, 1e9, &r->original},
    };
    enum { N = sizeof fields / sizeof *fields };
    uint32_t type = JSON_NONE, c = v + 1;
    for (uint32_t i = 0; i < j->nodes[v].count; i += 2, c = j->nodes[c + 1].next) {
        size_t k = 0;
        bool names_type = json_is(j, c, "rope_type") || json_is(j, c, "type");
        while (k < N && !json_is(j, c, fields[k].key)) k++;
        if (names_type && type != JSON_NONE && strcmp(show(j, type).text, show(j, c + 1).text))
            return fail(e, MEDRUN_BAD_FILE, "%s: fields rope_type and type: found %s and %s, wanted "
                        "the same", what, show(j, type).text, show(j, c + 1).text);
        if (names_type) type = c + 1;
        else if (k == N)
            return fail(e, MEDRUN_BAD_FILE, "%s: field %s: found a field this medrun does not know; "
                        "it may change what the model computes", what, show(j, c).text);
        else if (!json_real(j, v, what, fields[k].key, fields[k].min, fields[k].max, fields[k].to,
                            e)) return e->code;
    }
    r->llama3 = json_is(j, type, "llama3");
    if (!r->llama3 && !json_is(j, type, "default") && (type != JSON_NONE || r->factor > 0))
        return fail(e, MEDRUN_BAD_FILE, "%s: field rope_type: found %s, wanted default or llama3",
                    what, show(j, type).text);
    bool some = r->factor > 0 || r->low > 0 || r->high > 0 || r->original > 0;
    bool all = r->factor > 0 && r->low > 0 && r->high > 0 && r->original > 0;
    if (r->llama3 ? !all : some)
        return fail(e, MEDRUN_BAD_FILE, "%s: rope_type %s: wanted %s factor, low_freq_factor, "
                    "high_freq_factor, original_max_position_embeddings", what,
                    r->llama3 ? "llama3" : "default", r->llama3 ? "all of" : "none of");
    return MEDRUN_OK;
}

static bool same_scaling(const rope *a, const rope *b) {
    return a->llama3 == b->llama3 && !(a->factor < b->factor || a->factor > b->factor ||
           a->low < b->low || a->low > b->low || a->high < b->high || a->high > b->high ||
           a->original < b->original || a->original > b->original);
}

static bool differ(double a, double b) { return a < b || a > b; }

/* rope_parameters: one block, or one for each type of layer, which must then be the same. */
static int read_rope_parameters(const json_file *f, uint32_t v, rope *r, medrun_error *e) {
    const json *j = &f->j;
    uint32_t c = v + 1, n = j->nodes[v].count;
    if (n == 0 || json_typeof(j, c + 1) != JSON_OBJECT)
        return read_rope_block(f, v, "rope_parameters", r, e);
    for (uint32_t i = 0; i < n; i += 2, c = j->nodes[c + 1].next) {
        rope next = {0};
        if (json_typeof(j, c + 1) != JSON_OBJECT)
            return wrong_field(f, "rope_parameters", v, "one block, or a block per layer type", e);
        if (read_rope_block(f, c + 1, "rope_parameters", &next, e)) return e->code;
        if (i && (!same_scaling(r, &next) || differ(r->theta, next.theta)))
            return fail(e, MEDRUN_BAD_FILE, "%s: field rope_parameters: found layer types with "
                        "different positions, wanted the same in all layers", f->path);
        *r = next;
    }
    return MEDRUN_OK;
}

/* Reads both spellings into *R. */
static int read_both_ropes(const json_file *f, rope *r, medrun_error *e) {
    const json *j = &f->j;
    rope old = {0};
    uint32_t scaling = given(j, 0, "rope_scaling"), now = given(j, 0, "rope_parameters");
    double theta = 0;
    if (read_real(f, 0, "rope_theta", 1, 1e12, &theta, e)) return e->code;
    if (scaling != JSON_NONE && json_typeof(j, scaling) != JSON_OBJECT)
        return wrong_field(f, "rope_scaling", scaling, "an object or null", e);
    if (now != JSON_NONE && json_typeof(j, now) != JSON_OBJECT)
        return wrong_field(f, "rope_parameters", now, "an object or null", e);
    if (scaling != JSON_NONE && read_rope_block(f, scaling, "rope_scaling", &old, e)) return e->code;
    if (theta > 0 && old.theta > 0 && differ(theta, old.theta))
        return fail(e, MEDRUN_BAD_FILE, "%s: field rope_theta: found %g, but %g in rope_scaling; "
                    "remove the wrong one", f->path, theta, old.theta);
    if (theta > 0) old.theta = theta;
    *r = old;
    if (now == JSON_NONE) return MEDRUN_OK;
    *r = (rope){0};
    if (read_rope_parameters(f, now, r, e)) return e->code;
    bool scaling_stands = json_get(j, 0, "rope_scaling") != JSON_NONE;
    if ((old.theta > 0 && r->theta > 0 && differ(old.theta, r->theta)) ||
        (scaling_stands && !same_scaling(&old, r)))
        return fail(e, MEDRUN_BAD_FILE, "%s: field rope_parameters: found other values than in "
                    "rope_theta and rope_scaling, wanted the same; remove the wrong ones", f->path);
    if (!(r->theta > 0)) r->theta = old.theta;
    return MEDRUN_OK;
}

static int read_hf_rope(const json_file *f, model_config *c, medrun_error *e) {
    rope r = {0};
    double outside = 0;
    int code = read_both_ropes(f, &r, e);
    if (code || (code = read_real(f, 0, "original_max_position_embeddings", 1, 1e9, &outside, e)))
        return code;
    if (outside > 0 && r.llama3 && differ(outside, r.original))
        return fail(e, MEDRUN_BAD_FILE, "%s: field original_max_position_embeddings: found %g, but "
                    "%g in the rope block; remove the wrong one", f->path, outside, r.original);
    if (r.llama3 && r.high <= r.low)
        return fail(e, MEDRUN_BAD_FILE, "%s: field high_freq_factor: found %g, wanted more than "
                    "low_freq_factor %g", f->path, r.high, r.low);
    if (!(r.theta > 0)) {
        fprintf(stderr, "%s: no rope_theta: 10000 is used, the default of transformers' Llama\n",
                f->path);
        r.theta = 10000;
    }
    c->rope_theta = r.theta, c->rope_llama3 = r.llama3, c->rope_factor = r.factor;
    c->rope_low = r.low, c->rope_high = r.high, c->rope_original = r.original;
    return MEDRUN_OK;
}

static int read_hf_config(const json_file *f, model_config *c, medrun_error *e) {
    double eps = 0;
    int code = check_architecture(f, e);
    if (code || (code = check_unsupported(f, e)) || (code = read_sizes(f, c, e)) ||
        (code = read_bool(f, 0, "tie_word_embeddings", false, &c->tied, e))) return code;
    if (c->n_heads % c->n_kv_heads)
        return fail(e, MEDRUN_BAD_FILE, "%s: field num_attention_heads: found %d, wanted a multiple "
                    "of num_key_value_heads %d", f->path, c->n_heads, c->n_kv_heads);
    if (c->hidden_size % 16 || c->head_dim % 16 || c->ffn_size % 16)
        return fail(e, MEDRUN_BAD_FILE, "%s: found hidden_size %d, head_dim %d, intermediate_size "
                    "%d, wanted multiples of 16", f->path, c->hidden_size, c->head_dim, c->ffn_size);
    if (!json_real(&f->j, 0, f->path, "rms_norm_eps", 1e-12, 1, &eps, e)) return e->code;
    c->norm_eps = (float)eps;
    return read_hf_rope(f, c, e);
}

/* ---- stop ids and sampling ----------------------------------------------------------------- */

static int add_stop(source *s, const char *path, double id, medrun_error *e) {
    if (!(id >= 0 && id < s->config.vocab_size) || differ(id, floor(id)))
        return fail(e, MEDRUN_BAD_FILE, "%s: field eos_token_id: found %.17g, wanted an id below "
                    "vocab_size %d", path, id, s->config.vocab_size);
    for (int i = 0; i < s->n_stops; i++) if (s->stops[i] == (int)id) return MEDRUN_OK;
    if (s->n_stops == MEDRUN_MAX_STOPS)
        return fail(e, MEDRUN_BAD_FILE, "%s: field eos_token_id: found more than %d different ids "
                    "that end an answer", path, MEDRUN_MAX_STOPS);
    return s->stops[s->n_stops++] = (int)id, MEDRUN_OK;
}

/* eos_token_id: an id, several, or none. */
static int read_eos_ids(source *s, const json_file *f, medrun_error *e) {
    uint32_t v = is_open(f) ? given(&f->j, 0, "eos_token_id") : JSON_NONE, c = v, n = 1;
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_typeof(&f->j, v) == JSON_ARRAY) c = v + 1, n = f->j.nodes[v].count;
    for (; n; n--, c = f->j.nodes[c].next) {
        if (json_typeof(&f->j, c) != JSON_NUMBER)
            return wrong_field(f, "eos_token_id", v, "an id or a list of ids", e);
        if (add_stop(s, f->path, json_number(&f->j, c), e)) return e->code;
    }
    return MEDRUN_OK;
}

/* transformers' defaults, greedy unless do_sample is true. Closed file: as if it were empty. */
static int read_generation(source *s, const json_file *f, medrun_error *e) {
    source_sampling *p = &s->sampling;
    bool sample = false;
    *p = (source_sampling){.temperature = 1, .top_p = 1, .repeat_penalty = 1, .top_k = 50};
    if (is_open(f) && (read_bool(f, 0, "do_sample", false, &sample, e) ||
                       read_real(f, 0, "temperature", 0, 100, &p->temperature, e) ||
                       read_real(f, 0, "top_p", 0, 1, &p->top_p, e) ||
                       read_real(f, 0, "min_p", 0, 1, &p->min_p, e) ||
                       read_whole(f, 0, "top_k", 0, 1 << 24, &p->top_k, e) ||
                       read_real(f, 0, "repetition_penalty", 0.01, 100, &p->repeat_penalty, e)))
        return e->code;
    if (!sample) p->temperature = 0;
    return read_eos_ids(s, f, e);
}

/* ============================================================================================
 * 3 Tokenizer: tokenizer.json -> tokenizer.bin
 *
 * A tokenizer.json is a small program: normalizer, pre-tokenizer, model, post-processor, decoder.
 * Only the programs that section 10 of medrun.c runs are known here; each part of another one is
 * refused by its name. The vocabulary comes in GPT-2's byte alphabet, which is undone.
 * ============================================================================================ */

static const struct { const char *name, *regex; } split_patterns[] = {
    {"llama3", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
};

enum { PIECE_FOREIGN = 0 };     /* a key outside the byte alphabet: an added token must claim it */

typedef struct {
    size_t at, n;               /* its bytes in hf_tokenizer.text                              */
    int type;                   /* PIECE_UNUSED until an entry has this id                     */
} hf_piece;

typedef struct {
    span bytes;
    uint32_t id;
} vocab_entry;

typedef struct {
    json_file file, config;     /* tokenizer.json; tokenizer_config.json, or closed            */
    hf_piece *pieces;
    size_t n_pieces, n_merges;
    buffer text, merges;
    vocab_entry *entries;       /* the vocabulary by its bytes, which point into text          */
    size_t n_entries;
    const char *pretokenizer;
    int32_t bos, eos;           /* or -1                                                       */
    bool add_bos, ignore_merges;
} hf_tokenizer;

static void free_hf_tokenizer(hf_tokenizer *t) {
    close_json(&t->file);
    close_json(&t->config);
    free(t->pieces);
    free(t->entries);
    buffer_free(&t->text);
    buffer_free(&t->merges);
}

/* GPT-2's alphabet: printable bytes stand for themselves, the other 68 for U+0100, U+0101, ... */
static int byte_of(uint32_t code) {
    bool printable = (code >= 33 && code <= 126) || (code >= 161 && code <= 172) ||
                     (code >= 174 && code <= 255);
    if (printable) return (int)code;
    if (code < 256 || code > 323) return -1;
    int n = (int)code - 256;                            /* 0..32, then 127..160, then 173        */
    return n < 33 ? n : n < 67 ? n + 94 : 173;
}

/* Appends the bytes that TEXT stands for; false if some character is not of the alphabet. */
static bool undo_alphabet(const uint8_t *text, size_t n, buffer *out) {
    uint32_t code;
    for (size_t i = 0, len; i < n; i += len) {
        len = utf8_decode(text + i, n - i, &code);
        int b = len ? byte_of(code) : -1;
        if (b < 0) return false;
        buffer_add(out, &(uint8_t){(uint8_t)b}, 1);
    }
    return true;
}

/* The id of the vocabulary's entry with these bytes, or -1. */
static int64_t find_entry(const hf_tokenizer *t, const uint8_t *p, size_t n) {
    vocab_entry key = {{p, n}, 0};
    if (!t->n_entries) return -1;
    const vocab_entry *v = bsearch(&key, t->entries, t->n_entries, sizeof key, compare_spans);
    return v ? (int64_t)v->id : -1;
}

/* How many ids there are: the largest of the vocabulary and the added tokens, and one. */
static int count_pieces(hf_tokenizer *t, uint32_t vocab, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    uint64_t entries = j->nodes[vocab].count / 2, largest = 0, id = 0;
    uint32_t c = vocab + 1, v = vocab;
    bool good = true;
    for (uint32_t i = 0; good && i < j->nodes[vocab].count; i += 2, c = j->nodes[v].next) {
        good = json_size(j, v = c + 1, &id);
        if (id > largest) largest = id;
    }
    if (!good) return wrong_field(&t->file, "model.vocab", v, "ids: whole numbers", e);
    uint32_t n_added = added == JSON_NONE ? 0 : j->nodes[added].count;
    c = added + 1;
    for (uint32_t i = 0; good && i < n_added; i++, c = j->nodes[c].next) {
        good = json_size(j, v = json_get(j, c, "id"), &id);
        if (id > largest) largest = id;
    }
    if (!good) return wrong_field(&t->file, "added_tokens", v, "entries with an id", e);
    entries += n_added;
    if (largest >= 1u << 22 || largest > 2 * entries + 1024)
        return fail(e, MEDRUN_BAD_FILE, "%s: found id %llu among %llu entries, wanted ids without "
                    "large gaps", t->file.path, (unsigned long long)largest,
                    (unsigned long long)entries);
    t->n_pieces = (size_t)largest + 1;
    t->pieces = new_array(t->n_pieces, sizeof *t->pieces);
    t->entries = new_array(j->nodes[vocab].count / 2, sizeof *t->entries);
    if (!t->pieces || !t->entries) return out_of_memory(e, t->n_pieces * sizeof *t->pieces);
    for (size_t i = 0; i < t->n_pieces; i++) t->pieces[i].type = PIECE_UNUSED;
    /* all text is shorter than the file: it will not move any more */
    return buffer_room(&t->text, t->file.map.n) ? MEDRUN_OK : out_of_memory(e, t->file.map.n);
}

static int read_vocab(hf_tokenizer *t, uint32_t vocab, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t c = vocab + 1;
    buffer key = {0};
    int code = MEDRUN_OK;
    for (uint32_t i = 0; !code && i < j->nodes[vocab].count; i += 2, c = j->nodes[c + 1].next) {
        uint64_t id = 0;
        json_size(j, c + 1, &id);
        hf_piece *piece = &t->pieces[id];
        key.n = 0;
        json_unescape(j, c, &key);
        if (key.failed) code = out_of_memory(e, key.n);
        else if (piece->type != PIECE_UNUSED)
            code = fail(e, MEDRUN_BAD_FILE, "%s: model.vocab: found id %llu twice, wanted each once",
                        t->file.path, (unsigned long long)id);
        else if (!key.n)
            code = fail(e, MEDRUN_BAD_FILE, "%s: model.vocab: found an empty entry with id %llu",
                        t->file.path, (unsigned long long)id);
        else {
            size_t at = t->text.n;
            bool known = undo_alphabet(key.data, key.n, &t->text);
            if (!known) t->text.n = at, buffer_add(&t->text, key.data, key.n);
            *piece = (hf_piece){at, t->text.n - at, known ? PIECE_NORMAL : PIECE_FOREIGN};
            if (known)
                t->entries[t->n_entries++] = (vocab_entry){{t->text.data + at, piece->n},
                                                           (uint32_t)id};
        }
    }
    if (t->n_entries) qsort(t->entries, t->n_entries, sizeof *t->entries, compare_spans);
    buffer_free(&key);
    return code;
}

/* The id of a merge's side, which is written in the byte alphabet; -1 if it is no entry. */
static int64_t side_id(const hf_tokenizer *t, const uint8_t *p, size_t n, buffer *scratch) {
    scratch->n = 0;
    if (!n || !undo_alphabet(p, n, scratch) || scratch->failed) return -1;
    return find_entry(t, scratch->data, scratch->n);
}

/* Merges are strings "a b" (until 2024) or pairs ["a", "b"]. */
static int read_merges(hf_tokenizer *t, uint32_t merges, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t c = merges + 1, n = j->nodes[merges].count;
    buffer text = {0}, scratch = {0};
    int code = MEDRUN_OK;
    for (uint32_t i = 0; !code && i < n; i++, c = j->nodes[c].next) {
        size_t left = 0, right = 0;
        bool good = false;
        text.n = 0;
        if (json_typeof(j, c) == JSON_STRING) {
            json_unescape(j, c, &text);
            const uint8_t *space = text.n ? memchr(text.data, ' ', text.n) : NULL;
            left = space ? (size_t)(space - text.data) : 0, right = left + 1;
            good = space && !memchr(space + 1, ' ', text.n - right);
        } else if (json_typeof(j, c) == JSON_ARRAY && j->nodes[c].count == 2 &&
                   json_typeof(j, c + 1) == JSON_STRING && json_typeof(j, c + 2) == JSON_STRING) {
            json_unescape(j, c + 1, &text);
            left = right = text.n;
            json_unescape(j, c + 2, &text);
            good = true;
        }
        int64_t a = good ? side_id(t, text.data, left, &scratch) : -1;
        int64_t b = a < 0 ? -1 : side_id(t, text.data + right, text.n - right, &scratch);
        if (text.failed || scratch.failed) code = out_of_memory(e, text.n);
        else if (b < 0)
            code = fail(e, MEDRUN_BAD_FILE, "%s: model.merges: entry %u: found %s, wanted two "
                        "entries of the vocabulary", t->file.path, i, show(j, c).text);
        else write_le(&t->merges, (uint64_t)a, 4), write_le(&t->merges, (uint64_t)b, 4);
    }
    if (!code && t->merges.failed) code = out_of_memory(e, t->merges.n);
    t->n_merges = n;
    buffer_free(&text);
    buffer_free(&scratch);
    return code;
}

/* An added token's literal text becomes the piece of its id. */
static int add_token(hf_tokenizer *t, uint32_t v, const buffer *content, buffer *scratch,
                     medrun_error *e) {
    static const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
    bool on, special;
    uint64_t id = 0;
    json_size(&t->file.j, json_get(&t->file.j, v, "id"), &id);
    for (size_t i = 0; i < 4; i++) {
        if (read_bool(&t->file, v, flags[i], false, &on, e)) return e->code;
        if (on) return fail(e, MEDRUN_BAD_FILE, "%s: added token %.80s: field %s: found true, wanted "
                            "false", t->file.path, (const char *)content->data, flags[i]);
    }
    if (read_bool(&t->file, v, "special", false, &special, e)) return e->code;
    hf_piece *piece = &t->pieces[id];
    scratch->n = 0;
    bool known = undo_alphabet(content->data, content->n, scratch);
    const buffer *as_key = piece->type == PIECE_FOREIGN ? content : scratch;
    bool same = as_key->n == piece->n && !memcmp(as_key->data, t->text.data + piece->at, piece->n);
    int64_t other = known ? find_entry(t, scratch->data, scratch->n) : -1;
    if ((piece->type != PIECE_UNUSED && !same) || (other >= 0 && other != (int64_t)id))
        return fail(e, MEDRUN_BAD_FILE, "%s: added token %.80s: found id %llu, but the vocabulary "
                    "has another entry there or this one elsewhere", t->file.path,
                    (const char *)content->data, (unsigned long long)id);
    *piece = (hf_piece){t->text.n, content->n, special ? PIECE_CONTROL : PIECE_USER};
    buffer_add(&t->text, content->data, content->n);
    return t->text.failed ? out_of_memory(e, t->text.n) : MEDRUN_OK;
}

static int read_added(hf_tokenizer *t, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t c = added + 1, n = added == JSON_NONE ? 0 : j->nodes[added].count;
    buffer content = {0}, scratch = {0};
    int code = MEDRUN_OK;
    for (uint32_t i = 0; !code && i < n; i++, c = j->nodes[c].next) {
        uint32_t text = json_get(j, c, "content");
        content.n = 0;
        if (text != JSON_NONE && json_typeof(j, text) == JSON_STRING)
            json_unescape(j, text, &content);
        if (content.failed) code = out_of_memory(e, content.n);
        else if (!content.n) code = wrong_field(&t->file, "added_tokens", c, "some content", e);
        else code = add_token(t, c, &content, &scratch, e);
    }
    for (size_t id = 0; !code && id < t->n_pieces; id++)
        if (t->pieces[id].type == PIECE_FOREIGN)
            code = fail(e, MEDRUN_BAD_FILE, "%s: model.vocab: id %zu: found %.*s, which is not in "
                        "the byte alphabet, wanted a byte-level BPE vocabulary", t->file.path, id,
                        t->pieces[id].n < 80 ? (int)t->pieces[id].n : 80,
                        (const char *)t->text.data + t->pieces[id].at);
    buffer_free(&content);
    buffer_free(&scratch);
    return code;
}

/* ---- the programs around the vocabulary ---------------------------------------------------- */

static bool is_part(const json *j, uint32_t v, const char *type) {
    return json_is(j, json_get(j, v, "type"), type);
}

static bool is_false(const json *j, uint32_t v, const char *key) {
    uint32_t f = json_get(j, v, key);
    return f != JSON_NONE && json_typeof(j, f) == JSON_FALSE;
}

static int read_pretokenizer(hf_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "pre_tokenizer"), list = json_get(j, v, "pretokenizers");
    bool two = is_part(j, v, "Sequence") && list != JSON_NONE &&
               json_typeof(j, list) == JSON_ARRAY && j->nodes[list].count == 2;
    uint32_t split = two ? list + 1 : JSON_NONE, bytes = two ? j->nodes[split].next : JSON_NONE;
    uint32_t regex = json_get(j, json_get(j, split, "pattern"), "Regex");
    bool known = is_part(j, split, "Split") && json_is(j, json_get(j, split, "behavior"), "Isolated") &&
                 is_false(j, split, "invert") && is_part(j, bytes, "ByteLevel") &&
                 is_false(j, bytes, "add_prefix_space") && is_false(j, bytes, "use_regex");
    for (size_t i = 0; known && i < sizeof split_patterns / sizeof *split_patterns; i++)
        if (json_is(j, regex, split_patterns[i].regex)) t->pretokenizer = split_patterns[i].name;
    if (t->pretokenizer) return MEDRUN_OK;
    return wrong_field(&t->file, known ? "pre_tokenizer: Regex" : "pre_tokenizer", known ? regex : v,
                       "that of Llama-3; this medrun knows no other", e);
}

/* One post-processor: ByteLevel changes no id; a template may put one token before the text. */
static int read_post_part(hf_tokenizer *t, uint32_t v, medrun_error *e) {
    const json *j = &t->file.j;
    if (is_part(j, v, "ByteLevel")) return MEDRUN_OK;
    uint32_t single = json_get(j, v, "single"), n = 0, first = single + 1;
    if (is_part(j, v, "TemplateProcessing") && single != JSON_NONE &&
        json_typeof(j, single) == JSON_ARRAY) n = j->nodes[single].count;
    uint32_t text = n == 1 ? first : n == 2 ? j->nodes[first].next : JSON_NONE;
    if (!json_is(j, json_get(j, json_get(j, text, "Sequence"), "id"), "A") || t->add_bos)
        return wrong_field(&t->file, "post_processor", v, "ByteLevel, or a template that adds "
                           "nothing or one token before the text", e);
    if (n == 1) return MEDRUN_OK;
    uint32_t name = json_get(j, json_get(j, first, "SpecialToken"), "id");
    char key[256];
    uint64_t id;
    if (name == JSON_NONE || j->nodes[name].end - j->nodes[name].start >= sizeof key)
        return wrong_field(&t->file, "post_processor", first, "a SpecialToken", e);
    buffer b = {0};
    json_unescape(j, name, &b);
    snprintf(key, sizeof key, "%s", b.n ? (const char *)b.data : "");
    buffer_free(&b);
    uint32_t ids = json_get(j, json_get(j, json_get(j, v, "special_tokens"), key), "ids");
    if (ids == JSON_NONE || json_typeof(j, ids) != JSON_ARRAY || j->nodes[ids].count != 1 ||
        !json_size(j, ids + 1, &id) || id >= t->n_pieces)
        return wrong_field(&t->file, "post_processor: special_tokens", ids, "one id", e);
    return t->add_bos = true, t->bos = (int32_t)id, MEDRUN_OK;
}

static int read_post_processor(hf_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "post_processor"), list = json_get(j, v, "processors");
    if (v == JSON_NONE) return MEDRUN_OK;
    if (!is_part(j, v, "Sequence") || list == JSON_NONE || json_typeof(j, list) != JSON_ARRAY)
        return read_post_part(t, v, e);
    uint32_t c = list + 1;
    for (uint32_t i = 0; i < j->nodes[list].count; i++, c = j->nodes[c].next)
        if (read_post_part(t, c, e)) return e->code;
    return MEDRUN_OK;
}

/* Options of the BPE model that would change ids. */
static int check_bpe(hf_tokenizer *t, uint32_t model, medrun_error *e) {
    static const char *const empty[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                        "end_of_word_suffix"};
    const json *j = &t->file.j;
    bool fallback;
    if (!is_part(j, model, "BPE"))
        return wrong_field(&t->file, "model.type", json_get(j, model, "type"), "BPE", e);
    for (size_t i = 0; i < 4; i++) {
        uint32_t v = given(j, model, empty[i]);
        if (v != JSON_NONE && !json_is(j, v, ""))
            return wrong_field(&t->file, empty[i], v, "null; only byte-level BPE is supported", e);
    }
    if (read_bool(&t->file, model, "byte_fallback", false, &fallback, e)) return e->code;
    if (fallback)
        return fail(e, MEDRUN_BAD_FILE, "%s: field byte_fallback: found true (SentencePiece), wanted "
                    "false; only byte-level BPE is supported", t->file.path);
    return read_bool(&t->file, model, "ignore_merges", false, &t->ignore_merges, e);
}

/* ---- tokenizer_config.json ----------------------------------------------------------------- */

/* bos_token or eos_token: a string, an object with its content, or nothing. */
static int named_token(const hf_tokenizer *t, const char *field, int32_t *id, medrun_error *e) {
    const json *j = &t->config.j;
    uint32_t v = given(j, 0, field);
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_typeof(j, v) == JSON_OBJECT) v = json_get(j, v, "content");
    if (v == JSON_NONE || json_typeof(j, v) != JSON_STRING)
        return wrong_field(&t->config, field, v, "a token's text", e);
    buffer b = {0};
    json_unescape(j, v, &b);
    for (size_t i = 0; !b.failed && i < t->n_pieces; i++)
        if (t->pieces[i].type == PIECE_CONTROL && t->pieces[i].n == b.n &&
            !memcmp(t->text.data + t->pieces[i].at, b.data, b.n)) *id = (int32_t)i;
    buffer_free(&b);
    return *id >= 0 ? MEDRUN_OK :
           wrong_field(&t->config, field, v, "a special token of tokenizer.json", e);
}

/* transformers adds what stands here but not in tokenizer.json: nothing may. */
static int check_added_decoder(const hf_tokenizer *t, medrun_error *e) {
    const json *j = &t->config.j;
    uint32_t v = given(j, 0, "added_tokens_decoder"), c = v + 1;
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_typeof(j, v) != JSON_OBJECT)
        return wrong_field(&t->config, "added_tokens_decoder", v, "an object", e);
    for (uint32_t i = 0; i < j->nodes[v].count; i += 2, c = j->nodes[c + 1].next) {
        char id_text[16] = "";
        size_t n = j->nodes[c].end - j->nodes[c].start;
        if (n < sizeof id_text) memcpy(id_text, j->text + j->nodes[c].start, n);
        uint64_t id = strtoull(id_text, NULL, 10);
        buffer b = {0};
        uint32_t content = json_get(j, c + 1, "content");
        if (content != JSON_NONE && json_typeof(j, content) == JSON_STRING)
            json_unescape(j, content, &b);
        const hf_piece *p = id < t->n_pieces ? &t->pieces[id] : NULL;
        bool same = p && (p->type == PIECE_CONTROL || p->type == PIECE_USER) && b.n && p->n == b.n &&
                    !memcmp(t->text.data + p->at, b.data, b.n);
        buffer_free(&b);
        if (!same) return fail(e, MEDRUN_BAD_FILE, "%s: added_tokens_decoder: found %s %s, wanted "
                               "the same added token in tokenizer.json", t->config.path,
                               show(j, c).text, show(j, content).text);
    }
    return MEDRUN_OK;
}

static int read_tokenizer_config(hf_tokenizer *t, medrun_error *e) {
    int32_t bos = -1;
    bool add_bos, add_eos;
    if (!is_open(&t->config)) return MEDRUN_OK;
    if (named_token(t, "bos_token", &bos, e) || named_token(t, "eos_token", &t->eos, e) ||
        check_added_decoder(t, e) ||
        read_bool(&t->config, 0, "add_bos_token", t->add_bos, &add_bos, e) ||
        read_bool(&t->config, 0, "add_eos_token", false, &add_eos, e)) return e->code;
    if (t->add_bos && bos >= 0 && bos != t->bos)
        return fail(e, MEDRUN_BAD_FILE, "%s: field bos_token: found id %d, but the post_processor of "
                    "tokenizer.json adds id %d", t->config.path, bos, t->bos);
    if (add_bos != t->add_bos || add_eos)
        return fail(e, MEDRUN_BAD_FILE, "%s: found add_bos_token %s, add_eos_token %s, but the "
                    "post_processor of tokenizer.json adds %s; make them agree", t->config.path,
                    add_bos ? "true" : "false", add_eos ? "true" : "false",
                    t->add_bos ? "a BOS" : "nothing");
    if (bos >= 0) t->bos = bos;
    return MEDRUN_OK;
}

static int read_tokenizer_json(hf_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t normalizer = given(j, 0, "normalizer"), model = given(j, 0, "model");
    uint32_t vocab = given(j, model, "vocab"), merges = given(j, model, "merges");
    uint32_t added = given(j, 0, "added_tokens"), decoder = given(j, 0, "decoder");
    int code = check_bpe(t, model, e);
    if (code) return code;
    if (normalizer != JSON_NONE) return wrong_field(&t->file, "normalizer", normalizer, "null", e);
    if (!is_part(j, decoder, "ByteLevel"))
        return wrong_field(&t->file, "decoder", decoder, "ByteLevel", e);
    if (vocab == JSON_NONE || json_typeof(j, vocab) != JSON_OBJECT)
        return wrong_field(&t->file, "model.vocab", vocab, "an object", e);
    if (merges == JSON_NONE || json_typeof(j, merges) != JSON_ARRAY)
        return wrong_field(&t->file, "model.merges", merges, "an array", e);
    if (added != JSON_NONE && json_typeof(j, added) != JSON_ARRAY)
        return wrong_field(&t->file, "added_tokens", added, "an array", e);
    if ((code = read_pretokenizer(t, e)) || (code = count_pieces(t, vocab, added, e)) ||
        (code = read_vocab(t, vocab, e)) || (code = read_merges(t, merges, e)) ||
        (code = read_added(t, added, e)) || (code = read_post_processor(t, e))) return code;
    return read_tokenizer_config(t, e);
}

/* ---- tokenizer.bin ------------------------------------------------------------------------- */

static void write_tokenizer(const hf_tokenizer *t, buffer *out) {
    buffer body = {0}, text = {0}, types = {0};
    char pattern[24] = {0};
    uint8_t digest[32];
    snprintf(pattern, sizeof pattern, "%s", t->pretokenizer);
    for (size_t i = 0; i < t->n_pieces; i++) {
        buffer_add(&text, t->text.data + t->pieces[i].at, t->pieces[i].n);
        buffer_add(&types, &(uint8_t){(uint8_t)t->pieces[i].type}, 1);
    }
    while (types.n % 4 && !types.failed) buffer_add(&types, "", 1);
    const uint64_t head[8] = {1, 1, (t->ignore_merges ? 1u : 0) | (t->add_bos ? 2u : 0),
                              t->n_pieces, t->n_merges, (uint32_t)t->bos, text.n, 0};
    for (size_t i = 0; i < 8; i++) write_le(&body, head[i], 4);
    buffer_add(&body, pattern, sizeof pattern);
    for (size_t i = 0, end = 0; i < t->n_pieces; i++)
        write_le(&body, end += t->pieces[i].n, 4);
    buffer_add(&body, types.data, types.n);
    buffer_add(&body, t->merges.data, t->merges.n);
    buffer_add(&body, text.data, text.n);
    sha256_of(body.data, body.n, digest);
    buffer_add(out, "MEDTOK01", 8);
    buffer_add(out, digest, 32);
    buffer_add(out, body.data, body.n);
    if (body.failed || text.failed || types.failed) out->failed = true;
    buffer_free(&body);
    buffer_free(&text);
    buffer_free(&types);
}

/* Converts an open tokenizer.json (and config) and lets the engine check the result. */
static int convert_tokenizer(hf_tokenizer *t, buffer *out, medrun_error *e) {
    tokenizer check;
    t->bos = t->eos = -1;
    int code = read_tokenizer_json(t, e);
    if (!code) write_tokenizer(t, out);
    if (!code && out->failed) code = out_of_memory(e, out->n);
    if (!code && !(code = tokenizer_open(&check, out->data, out->n, t->file.path, e)))
        tokenizer_close(&check);
    return code;
}

/* ============================================================================================
 * 4 Chat: template, stop ids, licence
 * ============================================================================================ */

static bool contains(const buffer *b, const char *word) {
    return b->n && memmem(b->data, b->n, word, strlen(word));
}

static int read_text(source *s, const char *name, buffer *out, medrun_error *e) {
    char path[PATH_BYTES];
    file_map map;
    source_file *f;
    if (join_path(path, s->folder, name, e) || map_file(path, &map, e)) return e->code;
    int code = add_file(s, name, path, &f, e);
    if (!code) {
        f->bytes = map.n;
        sha256_of(map.data, map.n, f->digest);
        buffer_add(out, map.data, map.n);
    }
    unmap_file(&map);
    return code ? code : out->failed ? out_of_memory(e, out->n) : MEDRUN_OK;
}

/* The Jinja text: chat_template.jinja, or a field, or of several the one called default. */
static int read_jinja(source *s, const json_file *config, buffer *out, medrun_error *e) {
    const json *j = &config->j;
    if (file_exists(s->folder, "chat_template.jinja"))
        return read_text(s, "chat_template.jinja", out, e);
    uint32_t v = is_open(config) ? given(j, 0, "chat_template") : JSON_NONE;
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_typeof(j, v) == JSON_ARRAY) {
        uint32_t c = v + 1, n = j->nodes[v].count;
        while (n && !json_is(j, json_get(j, c, "name"), "default")) c = j->nodes[c].next, n--;
        if (n) v = json_get(j, c, "template");
    }
    if (v == JSON_NONE || json_typeof(j, v) != JSON_STRING)
        return wrong_field(config, "chat_template", v, "a template; choose one with --template", e);
    json_unescape(j, v, out);
    return out->failed ? out_of_memory(e, out->n) : MEDRUN_OK;
}

/* NAME is what the user asked for, or NULL: then the template is recognised, never guessed. */
static int choose_template(source *s, const json_file *config, const char *name, medrun_error *e) {
    if (name) {
        s->chat = chat_find(name);
        return s->chat ? MEDRUN_OK : fail(e, MEDRUN_USAGE, "--template: found \"%s\", wanted one of "
                                          "%s", name, CHAT_NAMES);
    }
    buffer b = {0};
    int code = read_jinja(s, config, &b, e);
    if (!code && !b.n) s->chat = chat_find("none");
    if (!code && contains(&b, "<|start_header_id|>") && contains(&b, "<|eot_id|>") &&
        !contains(&b, "Cutting Knowledge")) s->chat = chat_find("llama3");
    else if (!code && contains(&b, "### Instruction:")) s->chat = chat_find("alpaca");
    buffer_free(&b);
    if (code || s->chat) return code;
    return fail(e, MEDRUN_BAD_FILE, "%s: chat_template: found one this medrun does not recognise; "
                "name the right one with --template (%s)", s->folder, CHAT_NAMES);
}

/* Copies the value of KEY at the start of a line of TEXT's front matter, or makes OUT empty. */
static void front_matter(const char *text, const char *key, char *out, size_t cap) {
    out[0] = 0;
    if (strncmp(text, "---\n", 4) && strncmp(text, "---\r\n", 5)) return;
    const char *line = strchr(text, '\n') + 1;
    for (; strncmp(line, "---", 3); line++) {
        size_t n = strlen(key), len = strcspn(line, "\r\n");
        if (!strncmp(line, key, n) && line[n] == ':') {
            const char *from = line + n + 1, *end = line + len;
            while (from < end && strchr(" \t\"'", *from)) from++;
            while (end > from && strchr(" \t\"'", end[-1])) end--;
            if ((size_t)(end - from) < cap) snprintf(out, cap, "%.*s", (int)(end - from), from);
            return;
        }
        if (!(line = strchr(line, '\n'))) return;
    }
}

/* The licence's name in the model card; Hugging Face writes "other" and a license_name. */
static int read_licence(source *s, medrun_error *e) {
    buffer b = {0};
    char path[PATH_BYTES];
    struct stat st;
    if (join_path(path, s->folder, "README.md", e)) return e->code;
    if (stat(path, &st) || !S_ISREG(st.st_mode) || !st.st_size || st.st_size > JSON_BYTES)
        return MEDRUN_OK;
    int code = read_text(s, "README.md", &b, e);
    if (!code) {
        char name[sizeof s->licence];
        front_matter((const char *)b.data, "license", s->licence, sizeof s->licence);
        front_matter((const char *)b.data, "license_name", name, sizeof name);
        if (!strcmp(s->licence, "other") && name[0]) memcpy(s->licence, name, sizeof name);
    }
    buffer_free(&b);
    return code;
}

/* ============================================================================================
 * 5 Safetensors: a strict parser
 *
 * A file is a 64-bit header length, a JSON header, data. Each tensor says its type, its shape and
 * its bytes of the data; together they must fill the data, without gap or overlap, as the reference
 * implementation demands: then nothing can hide in the file.
 * ============================================================================================ */

/* The first three, in the order of SOURCE_BF16 and so on, can be exported. */
static const struct { const char *name; size_t size; } source_types[] = {
    {"BF16", 2}, {"F16", 2}, {"F32", 4}, {"F64", 8}, {"I64", 8}, {"U64", 8}, {"I32", 4},
    {"U32", 4}, {"I16", 2}, {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1},
    {"F8_E5M2", 1},
};
enum { N_SOURCE_TYPES = sizeof source_types / sizeof *source_types, SHARD_HEADER = 100000000 };

static int read_at(int fd, void *to, size_t n, uint64_t at, const char *path, medrun_error *e) {
    uint8_t *p = to;
    while (n) {
        ssize_t got = pread(fd, p, n, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(e, MEDRUN_FAILED, "%s: cannot read: %s", path, strerror(errno));
        if (got == 0) return fail(e, MEDRUN_FAILED, "%s: it became shorter while it was read", path);
        p += got, n -= (size_t)got, at += (uint64_t)got;
    }
    return MEDRUN_OK;
}

/* Shape and place of the tensor that entry V describes; DATA bytes follow the header. */
static int read_entry(const json *j, uint32_t v, const char *path, const char *name, uint64_t data,
                      source_tensor *t, medrun_error *e) {
    uint32_t dtype = json_get(j, v, "dtype"), shape = json_get(j, v, "shape");
    uint32_t place = json_get(j, v, "data_offsets");
    bool object = json_typeof(j, v) == JSON_OBJECT && j->nodes[v].count == 6;
    if (!object || dtype == JSON_NONE || shape == JSON_NONE || place == JSON_NONE ||
        json_typeof(j, shape) != JSON_ARRAY || json_typeof(j, place) != JSON_ARRAY ||
        j->nodes[place].count != 2 || !json_size(j, place + 1, &t->begin) ||
        !json_size(j, place + 2, &t->end))
        return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: found %s, wanted dtype, shape and two "
                    "data_offsets", path, name, show(j, v).text);
    while (t->dtype < N_SOURCE_TYPES && !json_is(j, dtype, source_types[t->dtype].name)) t->dtype++;
    if (t->dtype == N_SOURCE_TYPES)
        return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: dtype: found %s, wanted BF16, F16 or F32",
                    path, name, show(j, dtype).text);
    uint64_t bytes = source_types[t->dtype].size, n = 0;
    t->rank = (int)j->nodes[shape].count;
    uint32_t c = shape + 1;
    for (int i = 0; i < t->rank; i++, c = j->nodes[c].next) {
        if (!json_size(j, c, &n) || (n && bytes > UINT64_MAX / n))
            return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: shape: found %s, wanted whole numbers "
                        "whose product a file can hold", path, name, show(j, shape).text);
        bytes *= n;
        if (i < 2) t->shape[i] = n;
    }
    if (t->begin > t->end || t->end > data)
        return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: data_offsets: found %llu to %llu in %llu bytes "
                    "of data; the file was cut, download it again", path, name,
                    (unsigned long long)t->begin, (unsigned long long)t->end,
                    (unsigned long long)data);
    if (t->end - t->begin != bytes)
        return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: data_offsets: found %llu bytes, its shape "
                    "wants %llu", path, name, (unsigned long long)(t->end - t->begin),
                    (unsigned long long)bytes);
    return MEDRUN_OK;
}

static int compare_places(const void *a, const void *b) {
    const source_tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int check_places(source_tensor *t, size_t n, const char *path, uint64_t data,
                        medrun_error *e) {
    uint64_t at = 0;
    if (n) qsort(t, n, sizeof *t, compare_places);
    for (size_t i = 0; i < n; at = t[i++].end)
        if (t[i].begin != at)
            return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: data_offsets: found a beginning at %llu, "
                        "wanted %llu; tensors must neither overlap nor leave a gap", path, t[i].name,
                        (unsigned long long)t[i].begin, (unsigned long long)at);
    if (at != data)
        return fail(e, MEDRUN_BAD_FILE, "%s: found %llu bytes of data, its tensors want %llu; "
                    "download it again", path, (unsigned long long)data, (unsigned long long)at);
    return MEDRUN_OK;
}

static int check_metadata(const json *j, uint32_t v, const char *path, medrun_error *e) {
    bool good = json_typeof(j, v) == JSON_OBJECT;
    uint32_t c = v + 1;
    for (uint32_t i = 0; good && i < j->nodes[v].count; i += 2, c = j->nodes[c + 1].next)
        good = json_typeof(j, c + 1) == JSON_STRING;
    return good ? MEDRUN_OK : fail(e, MEDRUN_BAD_FILE, "%s: field __metadata__: found %s, wanted an "
                                   "object of strings", path, show(j, v).text);
}

/* A copy of string node V as a name, or NULL. */
static char *copy_name(const json *j, uint32_t v) {
    buffer b = {0};
    json_unescape(j, v, &b);
    if (b.failed || (b.n && memchr(b.data, 0, b.n))) return buffer_free(&b), NULL;
    return b.n ? (char *)b.data : new_array(1, 1);
}

static int read_entries(source *s, const json *j, const char *path, uint64_t data_at, uint64_t data,
                        medrun_error *e) {
    size_t first = s->n_tensors;
    uint32_t c = 1;
    int code = MEDRUN_OK;
    for (uint32_t i = 0; !code && i < j->nodes[0].count; i += 2, c = j->nodes[c + 1].next) {
        if (json_is(j, c, "__metadata__")) {
            code = check_metadata(j, c + 1, path, e);
            continue;
        }
        code = grow(&s->tensors, s->n_tensors, &s->tensors_cap, sizeof *s->tensors, e);
        if (code) break;
        source_tensor *t = &s->tensors[s->n_tensors];
        *t = (source_tensor){.name = copy_name(j, c), .file = s->n_files - 1};
        if (!t->name) return fail(e, MEDRUN_BAD_FILE, "%s: a tensor's name holds a NUL", path);
        s->n_tensors++;
        code = read_entry(j, c + 1, path, t->name, data, t, e);
    }
    size_t n = s->n_tensors - first;
    if (!code) code = check_places(s->tensors + first, n, path, data, e);
    for (size_t i = first; i < s->n_tensors; i++)
        s->tensors[i].begin += data_at, s->tensors[i].end += data_at;
    return code;
}

/* The header of the open file FD of SIZE bytes. */
static int read_shard_header(source *s, int fd, uint64_t size, const char *path, medrun_error *e) {
    uint8_t head[8];
    if (size < 8) return fail(e, MEDRUN_BAD_FILE, "%s: found %llu bytes, wanted a safetensors file; "
                              "download it again", path, (unsigned long long)size);
    if (read_at(fd, head, 8, 0, path, e)) return e->code;
    uint64_t n = read_u64(&(reader){head, 8, 0, false});
    if (n > SHARD_HEADER || n > size - 8)
        return fail(e, MEDRUN_BAD_FILE, "%s: header length: found %llu in a file of %llu bytes, "
                    "wanted at most %d and less than the file; download it again", path,
                    (unsigned long long)n, (unsigned long long)size, SHARD_HEADER);
    char *text = new_array((size_t)n, 1);
    json j = {0};
    int code = text ? read_at(fd, text, (size_t)n, 8, path, e) : out_of_memory(e, (size_t)n);
    if (!code) code = parse_json(&j, text, (size_t)n, path, e);
    if (!code) code = read_entries(s, &j, path, 8 + n, size - 8 - n, e);
    json_free(&j);
    free(text);
    return code;
}

/* Opens one file of weights, adds it and its tensors to the source. */
static int read_shard(source *s, const char *name, medrun_error *e) {
    char path[PATH_BYTES];
    source_file *f;
    struct stat st;
    if (join_path(path, s->folder, name, e)) return e->code;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return fail(e, MEDRUN_BAD_FILE, "%s: cannot open: %s; the weights are not complete", path,
                    strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode) || add_file(s, name, path, &f, e)) {
        close(fd);
        return fail(e, MEDRUN_BAD_FILE, "%s: found no regular file, wanted weights", path);
    }
    f->fd = fd;
    f->bytes = (uint64_t)st.st_size;
    return read_shard_header(s, fd, f->bytes, path, e);
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const source_tensor *)a)->name, ((const source_tensor *)b)->name);
}

static source_tensor *find_tensor(const source *s, const char *name) {
    source_tensor key = {.name = (char *)(uintptr_t)name};
    if (!s->n_tensors) return NULL;
    return bsearch(&key, s->tensors, s->n_tensors, sizeof key, compare_names);
}

/* Sorts all tensors by name; a name must stand once in all shards together. */
static int sort_tensors(source *s, medrun_error *e) {
    if (s->n_tensors) qsort(s->tensors, s->n_tensors, sizeof *s->tensors, compare_names);
    for (size_t i = 1; i < s->n_tensors; i++)
        if (!compare_names(&s->tensors[i - 1], &s->tensors[i]))
            return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: found in %s and in %s, wanted once",
                        s->folder, s->tensors[i].name, s->files[s->tensors[i - 1].file].name,
                        s->files[s->tensors[i].file].name);
    return MEDRUN_OK;
}

/* ---- the index of shards ------------------------------------------------------------------- */

/* The source's file that string node V names, or n_files. */
static size_t find_file(const source *s, const json *j, uint32_t v) {
    size_t i = 0;
    while (i < s->n_files && !json_is(j, v, s->files[i].name)) i++;
    return i;
}

/* Opens each file that the weight map names, once. */
static int open_shards(source *s, const json_file *f, uint32_t map, medrun_error *e) {
    const json *j = &f->j;
    uint32_t c = map + 1, previous = JSON_NONE;
    size_t n_shards = 0;
    for (uint32_t i = 0; i < j->nodes[map].count; i += 2, c = j->nodes[c + 1].next) {
        char name[sizeof s->files->name];
        bool same = previous != JSON_NONE && !strcmp(show(j, previous).text, show(j, c + 1).text);
        if (json_typeof(j, c + 1) == JSON_STRING && same) continue;
        if (json_typeof(j, c + 1) != JSON_STRING || j->nodes[c + 1].end == j->nodes[c + 1].start)
            return wrong_field(f, "weight_map", c + 1, "names of files", e);
        previous = c + 1;
        if (find_file(s, j, c + 1) < s->n_files) continue;
        buffer b = {0};
        json_unescape(j, c + 1, &b);
        bool plain = b.n && b.n < sizeof name && !memchr(b.data, '/', b.n) &&
                     !memchr(b.data, 0, b.n) && b.data[0] != '.';
        if (plain) memcpy(name, b.data, b.n + 1);
        buffer_free(&b);
        if (!plain || ++n_shards > MAX_SHARDS)
            return wrong_field(f, "weight_map", c + 1, "at most 512 files of this folder", e);
        if (read_shard(s, name, e)) return e->code;
    }
    return MEDRUN_OK;
}

/* Index and shards must name the same tensors in the same files. */
static int match_index(source *s, const json_file *f, uint32_t map, medrun_error *e) {
    const json *j = &f->j;
    uint32_t c = map + 1;
    for (uint32_t i = 0; i < j->nodes[map].count; i += 2, c = j->nodes[c + 1].next) {
        char *name = copy_name(j, c);
        source_tensor *t = name ? find_tensor(s, name) : NULL;
        free(name);
        if (!t || !json_is(j, c + 1, s->files[t->file].name))
            return fail(e, MEDRUN_BAD_FILE, "%s: weight_map: tensor %s: not found in %s; download "
                        "the folder again", f->path, show(j, c).text, show(j, c + 1).text);
        t->indexed = true;
    }
    for (size_t i = 0; i < s->n_tensors; i++)
        if (!s->tensors[i].indexed)
            return fail(e, MEDRUN_BAD_FILE, "%s/%s: tensor %s: found, but the index does not name "
                        "it; download the folder again", s->folder,
                        s->files[s->tensors[i].file].name, s->tensors[i].name);
    return MEDRUN_OK;
}

static int read_index(source *s, medrun_error *e) {
    json_file f;
    int code = open_json(s, "model.safetensors.index.json", false, &f, e);
    if (code) return code;
    uint32_t map = given(&f.j, 0, "weight_map");
    if (map == JSON_NONE || json_typeof(&f.j, map) != JSON_OBJECT)
        code = wrong_field(&f, "weight_map", map, "an object", e);
    if (!code) code = open_shards(s, &f, map, e);
    if (!code) code = sort_tensors(s, e);
    if (!code) code = match_index(s, &f, map, e);
    close_json(&f);
    return code;
}

static int read_weights(source *s, medrun_error *e) {
    bool one = file_exists(s->folder, "model.safetensors");
    bool many = file_exists(s->folder, "model.safetensors.index.json");
    if (one && many)
        return fail(e, MEDRUN_BAD_FILE, "%s: found model.safetensors and model.safetensors.index.json"
                    ", wanted one of them; remove the one that is out of date", s->folder);
    if (many) return read_index(s, e);
    if (!one)
        return fail(e, MEDRUN_BAD_FILE, "%s: found no model.safetensors and no index of shards%s",
                    s->folder, file_exists(s->folder, "pytorch_model.bin") ||
                    file_exists(s->folder, "pytorch_model.bin.index.json") ?
                    ", only pytorch_model.bin; get the safetensors form of this model" : "");
    int code = read_shard(s, "model.safetensors", e);
    return code ? code : sort_tensors(s, e);
}

/* ---- a whole Hugging Face folder ----------------------------------------------------------- */

static int read_hf_tokenizer(source *s, const char *template_name, medrun_error *e) {
    hf_tokenizer t = {0};
    int code = open_json(s, "tokenizer.json", false, &t.file, e);
    if (!code) code = open_json(s, "tokenizer_config.json", true, &t.config, e);
    if (!code) code = convert_tokenizer(&t, &s->tokenizer, e);
    if (!code && t.n_pieces != (size_t)s->config.vocab_size)
        code = fail(e, MEDRUN_BAD_FILE, "%s/config.json: field vocab_size: found %d, but "
                    "tokenizer.json has %zu ids; use the tokenizer of this model", s->folder,
                    s->config.vocab_size, t.n_pieces);
    if (!code) code = choose_template(s, &t.config, template_name, e);
    s->eos = t.eos;
    free_hf_tokenizer(&t);
    return code;
}

/* The union of all that says when an answer ends; Med42's own files name only one of its two. */
static int finish_stops(source *s, medrun_error *e) {
    tokenizer t;
    int code = MEDRUN_OK;
    if (s->eos >= 0) code = add_stop(s, s->folder, s->eos, e);
    if (code || strcmp(s->chat->name, "llama3")) return code;
    if ((code = tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e))) return code;
    int32_t eot = tokenizer_find(&t, "<|eot_id|>", strlen("<|eot_id|>"));
    tokenizer_close(&t);
    return eot < 0 ? MEDRUN_OK : add_stop(s, s->folder, eot, e);
}

static int open_hf_folder(source *s, const char *template_name, medrun_error *e) {
    json_file config, generation;
    int code = open_json(s, "config.json", false, &config, e);
    if (code) return code;
    code = read_hf_config(&config, &s->config, e);
    if (!code) code = read_eos_ids(s, &config, e);
    close_json(&config);
    if (!code) code = open_json(s, "generation_config.json", true, &generation, e);
    if (code) return code;
    code = read_generation(s, &generation, e);
    close_json(&generation);
    if (code || (code = read_hf_tokenizer(s, template_name, e)) || (code = finish_stops(s, e)) ||
        (code = read_licence(s, e))) return code;
    return read_weights(s, e);
}

static void close_source(source *s) {
    for (size_t i = 0; i < s->n_files; i++) if (s->files[i].fd >= 0) close(s->files[i].fd);
    for (size_t i = 0; i < s->n_tensors; i++) free(s->tensors[i].name);
    free(s->files);
    free(s->tensors);
    buffer_free(&s->tokenizer);
}

/* ============================================================================================
 * 6 Plan: which tensor of the source becomes which section; the header
 * ============================================================================================ */

typedef struct {
    char name[64];
    int type;                   /* of medrun.c, section 5                                      */
    size_t rows, cols;
    const source_tensor *from;  /* NULL: the tokenizer                                         */
    uint64_t offset, bytes;
    uint8_t digest[32];
} section;

typedef struct {
    int32_t *ids;
    size_t n;
    uint8_t digest[32], wanted[32];
    bool given;                 /* --proof says which digest is wanted                         */
} logits_proof;

typedef struct {
    const char *source, *out, *type, *template_name, *name, *proof, *yarn_factor, *threads;
    bool tokenizer_only, dry_run, help, version;
} export_options;

typedef struct {
    atomic_uint_fast64_t done;
    uint64_t total;
    double start, last;
    int tenth;                  /* the last line that was printed, when not on a terminal      */
    bool terminal;
    pthread_mutex_t lock;
} progress;

typedef struct {
    uint8_t *raw, *out;
    float *rows;
} scratch;                      /* of one thread                                               */

typedef struct {
    export_options options;
    source source;
    char name[128];
    int type, threads;
    section *sections;          /* tensors, then the tokenizer                                 */
    size_t n_sections, sections_cap;
    uint64_t data_at, file_bytes;   /* where the first section begins; all of it               */
    buffer header;
    buffer token_proofs, chat_proofs;               /* JSON arrays without their brackets      */
    logits_proof *logits;
    size_t n_logits, logits_cap;
    tokenizer tokenizer;        /* opened on source.tokenizer, for the proofs                  */
    char partial[PATH_BYTES];   /* "" until it is there                                        */
    int fd;
    thread_pool pool;
    scratch scratch[MAX_THREADS];
    size_t raw_bytes, out_bytes, row_floats;
    struct job *jobs;
    progress progress;
    medrun_error error;         /* the first failure of any thread                             */
    atomic_bool stop;
} exporter;

static int add_section(exporter *x, const char *name, int type, size_t rows, size_t cols,
                       const source_tensor *from, medrun_error *e) {
    if (grow(&x->sections, x->n_sections, &x->sections_cap, sizeof *x->sections, e)) return e->code;
    section *t = &x->sections[x->n_sections++];
    *t = (section){.type = type, .rows = rows, .cols = cols, .from = from};
    snprintf(t->name, sizeof t->name, "%s", name);
    t->bytes = from ? tensor_bytes(type, rows, cols) : x->source.tokenizer.n;
    return MEDRUN_OK;
}

/* Finds tensor HF_NAME, checks its type and shape (rows 0: a vector) and plans section NAME. */
static int plan_tensor(exporter *x, const char *name, const char *hf_name, int rows, int cols,
                       medrun_error *e) {
    source *s = &x->source;
    source_tensor *t = find_tensor(s, hf_name);
    if (!t) return fail(e, MEDRUN_BAD_FILE, "%s: tensor %s: found nothing, wanted (%d, %d); the "
                        "weights are not complete", s->folder, hf_name, rows ? rows : 1, cols);
    const char *file = s->files[t->file].name;
    if (t->dtype > SOURCE_F32)
        return fail(e, MEDRUN_BAD_FILE, "%s/%s: tensor %s: dtype: found %s, wanted BF16, F16 or F32",
                    s->folder, file, hf_name, source_types[t->dtype].name);
    bool same = rows ? t->rank == 2 && t->shape[0] == (uint64_t)rows && t->shape[1] == (uint64_t)cols
                     : t->rank == 1 && t->shape[0] == (uint64_t)cols;
    if (!same) {
        char found[64] = "another rank", wanted[64];
        if (t->rank == 1) snprintf(found, sizeof found, "(%llu)", (unsigned long long)t->shape[0]);
        if (t->rank == 2) snprintf(found, sizeof found, "(%llu, %llu)",
                                   (unsigned long long)t->shape[0], (unsigned long long)t->shape[1]);
        snprintf(wanted, sizeof wanted, rows ? "(%d, %d)" : "(%.0d%d)", rows, cols);
        return fail(e, MEDRUN_BAD_FILE, "%s/%s: tensor %s: shape: found %s, wanted %s as config.json "
                    "says", s->folder, file, hf_name, found, wanted);
    }
    t->used = true;
    return add_section(x, name, rows ? x->type : TYPE_F32, rows ? (size_t)rows : 1, (size_t)cols, t,
                       e);
}

static int plan_layer(exporter *x, int layer, medrun_error *e) {
    const model_config *c = &x->source.config;
    int hidden = c->hidden_size, heads = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const struct { const char *name, *hf_name; int rows, cols; } all[] = {
        {"attn_norm", "input_layernorm", 0, hidden},
        {"q", "self_attn.q_proj", heads, hidden},
        {"k", "self_attn.k_proj", kv, hidden},
        {"v", "self_attn.v_proj", kv, hidden},
        {"o", "self_attn.o_proj", hidden, heads},
        {"ffn_norm", "post_attention_layernorm", 0, hidden},
        {"gate", "mlp.gate_proj", c->ffn_size, hidden},
        {"up", "mlp.up_proj", c->ffn_size, hidden},
        {"down", "mlp.down_proj", hidden, c->ffn_size},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char name[64], hf_name[96];
        snprintf(name, sizeof name, "layers.%d.%s", layer, all[i].name);
        snprintf(hf_name, sizeof hf_name, "model.layers.%d.%s.weight", layer, all[i].hf_name);
        if (plan_tensor(x, name, hf_name, all[i].rows, all[i].cols, e)) return e->code;
    }
    return MEDRUN_OK;
}

/* A tied model's file may hold the output matrix once more: only if it is the same. */
static int same_bytes(const source *s, const source_tensor *a, const source_tensor *b, bool *same,
                      medrun_error *e) {
    uint8_t *p = new_array(2, READ_BYTES);
    uint64_t n = a->end - a->begin, at = 0;
    int code = p ? MEDRUN_OK : out_of_memory(e, 2 * (size_t)READ_BYTES);
    *same = a->dtype == b->dtype && n == b->end - b->begin;
    for (size_t take; !code && *same && at < n; at += take) {
        take = n - at < READ_BYTES ? (size_t)(n - at) : READ_BYTES;
        code = read_at(s->files[a->file].fd, p, take, a->begin + at, a->name, e);
        if (!code) code = read_at(s->files[b->file].fd, p + READ_BYTES, take, b->begin + at,
                                  b->name, e);
        if (!code) *same = !memcmp(p, p + READ_BYTES, take);
    }
    free(p);
    return code;
}

/* A tensor nobody asked for is a part of the model that would silently be missing. */
static int check_leftover(exporter *x, const source_tensor *t, medrun_error *e) {
    static const char harmless[] = "rotary_emb.inv_freq";
    size_t n = strlen(t->name), len = sizeof harmless - 1;
    bool ignored = n >= len && !strcmp(t->name + n - len, harmless);
    const source_tensor *embed = find_tensor(&x->source, "model.embed_tokens.weight");
    if (!strcmp(t->name, "lm_head.weight") && same_bytes(&x->source, t, embed, &ignored, e))
        return e->code;
    return ignored ? MEDRUN_OK :
           fail(e, MEDRUN_BAD_FILE, "%s/%s: tensor %s: found a tensor that %s", x->source.folder,
                x->source.files[t->file].name, t->name, strcmp(t->name, "lm_head.weight") ?
                "is no part of a Llama model; this medrun would not compute with it" :
                "differs from model.embed_tokens.weight though tie_word_embeddings is true");
}

static int plan_model(exporter *x, medrun_error *e) {
    const model_config *c = &x->source.config;
    int vocab = c->vocab_size, hidden = c->hidden_size;
    int code = plan_tensor(x, "embed", "model.embed_tokens.weight", vocab, hidden, e);
    for (int layer = 0; !code && layer < c->n_layers; layer++) code = plan_layer(x, layer, e);
    if (!code) code = plan_tensor(x, "final_norm", "model.norm.weight", 0, hidden, e);
    if (!code && !c->tied) code = plan_tensor(x, "output", "lm_head.weight", vocab, hidden, e);
    for (size_t i = 0; !code && i < x->source.n_tensors; i++)
        if (!x->source.tensors[i].used) code = check_leftover(x, &x->source.tensors[i], e);
    return code ? code : add_section(x, "tokenizer", -1, 0, 0, NULL, e);
}

/* ---- the header ---------------------------------------------------------------------------- */

/* Nine digits; more only where they would change the number. */
static void put_real(buffer *b, double v) {
    char text[40];
    snprintf(text, sizeof text, "%.9g", v);
    if (differ(strtod(text, NULL), v)) snprintf(text, sizeof text, "%.17g", v);
    buffer_text(b, text);
}

static void put_string(buffer *b, const char *text) { json_quote(b, text, strlen(text)); }

static void put_ids(buffer *b, const int32_t *ids, size_t n) {
    buffer_text(b, "[");
    for (size_t i = 0; i < n; i++) buffer_printf(b, i ? ",%d" : "%d", ids[i]);
    buffer_text(b, "]");
}

static void put_digest(buffer *b, const uint8_t digest[32]) {
    char hex[65];
    hex_of(digest, hex);
    buffer_printf(b, "\"sha256\":\"%s\"}", hex);
}

static void put_config(buffer *b, const model_config *c) {
    buffer_printf(b, "\"config\":{\"vocab_size\":%d,\"hidden_size\":%d,\"n_layers\":%d,"
                  "\"n_heads\":%d,\"n_kv_heads\":%d,\"head_dim\":%d,\"ffn_size\":%d,"
                  "\"max_positions\":%d,\"norm_eps\":", c->vocab_size, c->hidden_size, c->n_layers,
                  c->n_heads, c->n_kv_heads, c->head_dim, c->ffn_size, c->max_positions);
    put_real(b, (double)c->norm_eps);
    buffer_text(b, ",\"rope_theta\":");
    put_real(b, c->rope_theta);
    buffer_printf(b, ",\"rope_scaling\":{\"type\":\"%s\"", c->rope_llama3 ? "llama3" : "none");
    const struct { const char *key; double v; } scaling[] = {
        {"factor", c->rope_factor}, {"low_freq_factor", c->rope_low},
        {"high_freq_factor", c->rope_high}, {"original_max_positions", c->rope_original}};
    for (size_t i = 0; c->rope_llama3 && i < 4; i++) {
        buffer_printf(b, ",\"%s\":", scaling[i].key);
        put_real(b, scaling[i].v);
    }
    buffer_printf(b, "},\"activation\":\"silu\",\"tied\":%s},\n", c->tied ? "true" : "false");
}

static void put_sections(buffer *b, const exporter *x) {
    buffer_text(b, "\"tensors\":[");
    for (const section *t = x->sections; t->from; t++) {
        buffer_printf(b, "%s\n{\"name\":\"%s\",\"type\":\"%s\",\"rows\":%zu,\"cols\":%zu,"
                      "\"offset\":%llu,\"bytes\":%llu,", t == x->sections ? "" : ",", t->name,
                      type_names[t->type], t->rows, t->cols, (unsigned long long)t->offset,
                      (unsigned long long)t->bytes);
        put_digest(b, t->digest);
    }
    const section *t = &x->sections[x->n_sections - 1];
    buffer_printf(b, "],\n\"tokenizer\":{\"offset\":%llu,\"bytes\":%llu,",
                  (unsigned long long)t->offset, (unsigned long long)t->bytes);
    put_digest(b, t->digest);
}

static void put_chat(buffer *b, const source *s) {
    const source_sampling *p = &s->sampling;
    buffer_printf(b, ",\n\"chat\":{\"template\":\"%s\",\"system\":\"\",\"stop_ids\":", s->chat->name);
    put_ids(b, s->stops, (size_t)s->n_stops);
    buffer_text(b, ",\"sampling\":{\"temperature\":");
    put_real(b, p->temperature);
    buffer_printf(b, ",\"top_k\":%lld,\"top_p\":", (long long)p->top_k);
    put_real(b, p->top_p);
    buffer_text(b, ",\"min_p\":");
    put_real(b, p->min_p);
    buffer_text(b, ",\"repeat_penalty\":");
    put_real(b, p->repeat_penalty);
    buffer_text(b, "}},\n");
}

static void put_provenance(buffer *b, const source *s) {
    buffer_text(b, "\"provenance\":{\"sources\":[");
    for (size_t i = 0; i < s->n_files; i++) {
        buffer_text(b, i ? ",\n{\"file\":" : "\n{\"file\":");
        put_string(b, s->files[i].name);
        buffer_printf(b, ",\"bytes\":%llu,", (unsigned long long)s->files[i].bytes);
        put_digest(b, s->files[i].digest);
    }
    buffer_text(b, "],\"licence\":");
    put_string(b, s->licence);
    buffer_text(b, ",\"notice\":\"For research and education. Not a medical device; not for clinical "
                   "use.\"},\n");
}

static void put_proofs(buffer *b, const exporter *x) {
    buffer_text(b, "\"proofs\":{\"tokens\":[");
    buffer_add(b, x->token_proofs.data, x->token_proofs.n);
    buffer_text(b, "],\n\"chats\":[");
    buffer_add(b, x->chat_proofs.data, x->chat_proofs.n);
    buffer_text(b, "],\n\"logits\":[");
    for (size_t i = 0; i < x->n_logits; i++) {
        buffer_text(b, i ? ",\n{\"ids\":" : "\n{\"ids\":");
        put_ids(b, x->logits[i].ids, x->logits[i].n);
        buffer_text(b, ",");
        put_digest(b, x->logits[i].digest);
    }
    buffer_text(b, "]}}\n");
}

/* The whole header into x->header. Digests that are not known yet have the same length. */
static int render_header(exporter *x, medrun_error *e) {
    buffer *b = &x->header;
    b->n = 0;
    buffer_text(b, "{\"format\":1,\"engine\":\"medrun " MEDRUN_VERSION "\",\"name\":");
    put_string(b, x->name);
    buffer_printf(b, ",\"architecture\":\"llama\",\"type\":\"%s\",\n", type_names[x->type]);
    put_config(b, &x->source.config);
    put_sections(b, x);
    put_chat(b, &x->source);
    put_provenance(b, &x->source);
    put_proofs(b, x);
    if (b->failed) return out_of_memory(e, b->n);
    if (b->n > MAX_HEADER)
        return fail(e, MEDRUN_USAGE, "the header takes %zu bytes, wanted at most %d; give fewer "
                    "proofs", b->n, MAX_HEADER);
    return MEDRUN_OK;
}

/* Offsets are part of the header, whose length moves them: try until nothing moves. */
static int lay_out(exporter *x, medrun_error *e) {
    for (uint64_t wanted = FILE_ALIGN; wanted != x->data_at;) {
        uint64_t at = x->data_at = wanted;
        for (size_t i = 0; i < x->n_sections; i++) {
            x->sections[i].offset = round_up((size_t)at, FILE_ALIGN);
            at = x->sections[i].offset + x->sections[i].bytes;
        }
        x->file_bytes = at;
        if (render_header(x, e)) return e->code;
        wanted = round_up(PREAMBLE + x->header.n + 32, FILE_ALIGN);
    }
    return MEDRUN_OK;
}

/* What the engine will say about the config, before hours of writing rather than after. */
static int check_header(exporter *x, medrun_error *e) {
    model_file f = {.path = x->source.folder};
    model_config c = {0};
    int code = json_parse(&f.header, (const char *)x->header.data, x->header.n, e);
    if (!code) code = read_config(&f, &c, e);
    json_free(&f.header);
    return code;
}

/* ============================================================================================
 * 7 Proofs: texts, conversations and prompts with what they must give
 *
 * They go into the header, so that `medrun verify` shows on any machine that what arrived computes
 * what was exported. With --proof come more, best made by another implementation: ids and digests
 * that stand there already must come out the same here.
 * ============================================================================================ */

static const char *const proof_texts[] = {
    "The patient is a 54-year-old woman with fever, cough and shortness of breath for three days.",
    "BP 138/84 mmHg, HR 96/min, SpO2 93 %; Na+ 138 mmol/l, K+ 4.1 mmol/l (2019-11-05).",
    "I'm sure she'd better see the doctor, but THEY'VE said it isn't urgent; we'll wait, don't you?",
    "Give 2.5mg/kg q8h x10d, then 1000000 IU; see p. 12345.",
    "  two  spaces,\ttabs\t\tand\n\nempty\r\n lines \n\n\n   at the end   ",
    "for (int i = 0; i < n; i++) { sum += x[i] * y[i]; }  // a loop",
    "Der Patient klagt \303\274ber Kopfschmerzen und \303\234belkeit; 37,5\302\240\302\260C.",
    "\346\202\243\350\200\205\345\217\221\347\203\255\344\270\211\345\244\251\357\274\214\345\222\263"
    "\345\227\275\343\200\202",
    "\330\247\331\204\331\205\330\261\331\212\330\266 \331\212\330\271\330\247\331\206\331\212 "
    "\320\261\320\276\320\273\321\214 \340\244\260\340\245\213\340\244\227\340\245\200",
    "e\314\201 \360\237\251\272\360\237\221\251\342\200\215\342\232\225\357\270\217 \342\211\245 5 "
    "\302\265g \342\200\224 \342\200\234quoted\342\200\235\342\200\246",
    "Text that looks like control: <|eot_id|><|start_header_id|>system<|end_header_id|></s>[INST]",
    "",
};

enum { PROOF_TURNS = 4 };
static const struct { const char *role, *text; } proof_chats[][PROOF_TURNS] = {
    {{"user", "What is hypertension?"}},
    {{"system", "You are a careful medical assistant."},
     {"user", "  A 30-year-old man has chest pain.\nWhat should be asked first?\n"}},
    {{"system", "Answer briefly."}, {"user", "Is 38.5 \302\260C a fever?"},
     {"assistant", "Yes.<|eot_id|>"}, {"user", "And 37.0?"}},
};

/* IDS of a proof that FILE's entry V, if any, must repeat. */
static int compare_ids(const json_file *f, uint32_t v, const char *what, const int32_t *ids,
                       size_t n, medrun_error *e) {
    uint32_t list = f ? given(&f->j, v, "ids") : JSON_NONE, c = list + 1;
    if (list == JSON_NONE) return MEDRUN_OK;
    bool same = json_typeof(&f->j, list) == JSON_ARRAY && f->j.nodes[list].count == n;
    for (size_t i = 0; same && i < n; i++, c = f->j.nodes[c].next) {
        uint64_t id;
        same = json_size(&f->j, c, &id) && id == (uint64_t)ids[i];
    }
    if (same) return MEDRUN_OK;
    buffer b = {0};
    put_ids(&b, ids, n);
    fail(e, MEDRUN_DIFFERS, "%s: %s: found ids %.150s, wanted %s", f->path, what,
         b.data ? (const char *)b.data : "", show(&f->j, list).text);
    return buffer_free(&b), e->code;
}

/* A text's ids, without BOS and without special tokens in the text. */
static int prove_text(exporter *x, const char *text, size_t n, const json_file *f, uint32_t v,
                      medrun_error *e) {
    buffer ids = {0}, *b = &x->token_proofs;
    int code = tokenizer_encode(&x->tokenizer, text, n, 0, &ids, e);
    if (!code) code = compare_ids(f, v, "tokens", (int32_t *)(void *)ids.data, ids.n / 4, e);
    buffer_text(b, b->n ? ",\n{\"text\":" : "\n{\"text\":");
    json_quote(b, text, n);
    buffer_text(b, ",\"ids\":");
    put_ids(b, (int32_t *)(void *)ids.data, ids.n / 4);
    buffer_text(b, "}");
    if (!code && (b->failed || ids.failed)) code = out_of_memory(e, b->n);
    buffer_free(&ids);
    return code;
}

/* A conversation's ids with the opening of the answer. */
static int prove_chat(exporter *x, const medrun_message *m, size_t n, const json_file *f, uint32_t v,
                      medrun_error *e) {
    buffer ids = {0}, *b = &x->chat_proofs;
    int code = chat_render(x->source.chat, &x->tokenizer, m, n, true, &ids, e);
    if (!code) code = compare_ids(f, v, "chats", (int32_t *)(void *)ids.data, ids.n / 4, e);
    buffer_text(b, b->n ? ",\n{\"messages\":[" : "\n{\"messages\":[");
    for (size_t i = 0; i < n; i++) {
        buffer_text(b, i ? ",{\"role\":" : "{\"role\":");
        put_string(b, m[i].role);
        buffer_text(b, ",\"content\":");
        json_quote(b, m[i].text, m[i].n_bytes);
        buffer_text(b, "}");
    }
    buffer_text(b, "],\"ids\":");
    put_ids(b, (int32_t *)(void *)ids.data, ids.n / 4);
    buffer_text(b, "}");
    if (!code && (b->failed || ids.failed)) code = out_of_memory(e, b->n);
    buffer_free(&ids);
    return code;
}

/* Plans a digest of the logits after IDS, which are copied. */
static int plan_logits(exporter *x, const int32_t *ids, size_t n, medrun_error *e) {
    if (grow(&x->logits, x->n_logits, &x->logits_cap, sizeof *x->logits, e)) return e->code;
    logits_proof *p = &x->logits[x->n_logits];
    *p = (logits_proof){.ids = new_array(n, sizeof *ids), .n = n};
    if (!p->ids) return out_of_memory(e, n * sizeof *ids);
    memcpy(p->ids, ids, n * sizeof *ids);
    return x->n_logits++, MEDRUN_OK;
}

static int own_proofs(exporter *x, medrun_error *e) {
    enum { N_TEXTS = sizeof proof_texts / sizeof *proof_texts, LONGER = 12 };
    int code = MEDRUN_OK;
    for (size_t i = 0; !code && i < N_TEXTS; i++)
        code = prove_text(x, proof_texts[i], strlen(proof_texts[i]), NULL, 0, e);
    for (size_t i = 0; !code && i < sizeof proof_chats / sizeof *proof_chats; i++) {
        medrun_message m[PROOF_TURNS];
        size_t n = 0;
        for (; n < PROOF_TURNS && proof_chats[i][n].role; n++)
            m[n] = (medrun_message){proof_chats[i][n].role, proof_chats[i][n].text,
                                    strlen(proof_chats[i][n].text)};
        code = prove_chat(x, m, n, NULL, 0, e);
    }
    buffer ids = {0};
    if (!code) code = tokenizer_encode(&x->tokenizer, proof_texts[0], strlen(proof_texts[0]),
                                       x->tokenizer.bos >= 0 ? MEDRUN_ADD_BOS : 0, &ids, e);
    if (!code && ids.failed) code = out_of_memory(e, ids.n);
    size_t n = ids.n / 4, most = (size_t)x->source.config.max_positions;
    if (n > LONGER) n = LONGER;
    if (n > most) n = most;
    if (!code) code = plan_logits(x, (int32_t *)(void *)ids.data, 1, e);
    if (!code) code = plan_logits(x, (int32_t *)(void *)ids.data, n, e);
    buffer_free(&ids);
    return code;
}

/* ---- --proof FILE.json --------------------------------------------------------------------- */

static int read_proof_chat(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    const json *j = &f->j;
    uint32_t list = given(j, v, "messages"), n = 0, c = list + 1;
    if (list != JSON_NONE && json_typeof(j, list) == JSON_ARRAY) n = j->nodes[list].count;
    if (!n) return wrong_field(f, "chats", v, "messages", e);
    medrun_message *m = new_array(n, sizeof *m);
    char *roles = new_array(n, 16);
    buffer text = {0};
    int code = m && roles ? MEDRUN_OK : out_of_memory(e, n * sizeof *m);
    for (uint32_t i = 0; !code && i < n; i++, c = j->nodes[c].next) {
        uint32_t content = given(j, c, "content");
        size_t before = text.n;
        if (!json_text(j, c, f->path, "role", roles + 16 * i, 16, e)) code = e->code;
        else if (content == JSON_NONE || json_typeof(j, content) != JSON_STRING)
            code = wrong_field(f, "content", content, "a string", e);
        else json_unescape(j, content, &text);
        m[i] = (medrun_message){roles + 16 * i, "", text.n - before};
    }
    if (!code && text.failed) code = out_of_memory(e, text.n);
    for (size_t i = 0, at = 0; !code && i < n; at += m[i++].n_bytes)
        if (m[i].n_bytes) m[i].text = (const char *)text.data + at;
    if (!code) code = prove_chat(x, m, n, f, v, e);
    free(m);
    free(roles);
    buffer_free(&text);
    return code;
}

static int read_proof_text(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    uint32_t text = given(&f->j, v, "text");
    buffer b = {0};
    if (text == JSON_NONE || json_typeof(&f->j, text) != JSON_STRING)
        return wrong_field(f, "tokens", v, "a text", e);
    json_unescape(&f->j, text, &b);
    int code = b.failed ? out_of_memory(e, b.n) :
               prove_text(x, b.n ? (const char *)b.data : "", b.n, f, v, e);
    buffer_free(&b);
    return code;
}

static int read_proof_logits(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    const json *j = &f->j;
    uint32_t list = given(j, v, "ids"), n = 0, c = list + 1;
    if (list != JSON_NONE && json_typeof(j, list) == JSON_ARRAY) n = j->nodes[list].count;
    if (!n || n > (uint32_t)x->source.config.max_positions)
        return wrong_field(f, "logits", v, "1 to max_position_embeddings ids", e);
    int32_t *ids = new_array(n, sizeof *ids);
    int code = ids ? MEDRUN_OK : out_of_memory(e, n * sizeof *ids);
    for (uint32_t i = 0; !code && i < n; i++, c = j->nodes[c].next) {
        uint64_t id;
        if (!json_size(j, c, &id) || id >= (uint64_t)x->source.config.vocab_size)
            code = wrong_field(f, "logits", c, "ids below vocab_size", e);
        else ids[i] = (int32_t)id;
    }
    if (!code) code = plan_logits(x, ids, n, e);
    free(ids);
    char hex[65];
    if (code || given(j, v, "sha256") == JSON_NONE) return code;
    logits_proof *p = &x->logits[x->n_logits - 1];
    if (!json_text(j, v, f->path, "sha256", hex, sizeof hex, e)) return e->code;
    p->given = strlen(hex) == 64 && parse_hex(hex, p->wanted);
    return p->given ? MEDRUN_OK : wrong_field(f, "sha256", v, "64 hex digits", e);
}

static int read_proof_file(exporter *x, medrun_error *e) {
    static const struct {
        const char *key;
        int (*read)(exporter *, const json_file *, uint32_t, medrun_error *);
    } kinds[] = {{"tokens", read_proof_text}, {"chats", read_proof_chat},
                 {"logits", read_proof_logits}};
    json_file f = {0};
    snprintf(f.path, sizeof f.path, "%s", x->options.proof);
    int code = open_json_path(&f, e);
    for (size_t k = 0; !code && k < 3; k++) {
        uint32_t list = given(&f.j, 0, kinds[k].key), c = list + 1;
        if (list == JSON_NONE) continue;
        if (json_typeof(&f.j, list) != JSON_ARRAY)
            code = wrong_field(&f, kinds[k].key, list, "an array", e);
        else for (uint32_t i = 0; !code && i < f.j.nodes[list].count; i++, c = f.j.nodes[c].next)
            code = kinds[k].read(x, &f, c, e);
    }
    close_json(&f);
    return code;
}

static int plan_proofs(exporter *x, medrun_error *e) {
    const buffer *b = &x->source.tokenizer;
    int code = tokenizer_open(&x->tokenizer, b->data, b->n, x->source.folder, e);
    if (code || (code = own_proofs(x, e)) || !x->options.proof) return code;
    return read_proof_file(x, e);
}

/* ============================================================================================
 * 8 Progress: the bar, and Ctrl-C
 * ============================================================================================ */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) {
    (void)signal_number;
    interrupted = 1;
}

/* Signals that would end the program end the export instead: OUT.partial goes. A file that grows
 * too large and a closed stderr are then errors of write. */
static void catch_signals(void) {
    static const int ends[] = {SIGINT, SIGTERM, SIGHUP}, ignored[] = {SIGPIPE, SIGXFSZ};
    struct sigaction a = {.sa_handler = on_interrupt};
    sigemptyset(&a.sa_mask);
    for (size_t i = 0; i < 3; i++) sigaction(ends[i], &a, NULL);
    a.sa_handler = SIG_IGN;
    for (size_t i = 0; i < 2; i++) sigaction(ignored[i], &a, NULL);
}

static void draw_progress(progress *p, uint64_t done) {
    double share = p->total ? (double)done / (double)p->total : 1, passed = seconds() - p->start;
    double rate = passed > 0 ? (double)done / passed : 0;
    int left = rate > 0 ? (int)((double)(p->total - done) / rate) : 0, filled = (int)(share * 30);
    if (p->terminal) {
        fprintf(stderr, "\r[%.*s%*s] %3d %%  %5.0f MB/s  %d:%02d left ", filled,
                "##############################", 30 - filled, "", (int)(share * 100), rate / 1e6,
                left / 60, left % 60);
    } else if ((int)(share * 10) > p->tenth) {
        p->tenth = (int)(share * 10);
        fprintf(stderr, "%3d %%  %.0f MB/s\n", p->tenth * 10, rate / 1e6);
    }
}

/* N more bytes are done. Any thread may say so; one of them draws, five times a second. */
static void add_progress(progress *p, uint64_t n) {
    uint64_t done = atomic_fetch_add(&p->done, n) + n;
    if (pthread_mutex_trylock(&p->lock)) return;
    double now = seconds();
    if (now - p->last > 0.2 || done == p->total) {
        p->last = now;
        draw_progress(p, done);
    }
    pthread_mutex_unlock(&p->lock);
}

static void end_progress(progress *p) {
    if (p->terminal) fprintf(stderr, "\r%76s\r", "");
}

/* ============================================================================================
 * 9 Writing: sections, on all threads
 *
 * A job is a section to write or a source file to hash. Sections have known places, so threads
 * write at once, each one tensor from its first panel to its last; memory is a few buffers each.
 * Jobs stand in the order of the source files, so that hashing and packing read about the same
 * places at about the same time, and the disk once.
 * ============================================================================================ */

typedef struct job {
    bool hash;                  /* else: write                                                 */
    size_t index;               /* of files, or of sections                                    */
    size_t file;
    uint64_t begin;
} job;

/* Records a thread's failure, if it is the first, and stops the others. */
static void stop_export(exporter *x, const medrun_error *why) {
    pthread_mutex_lock(&x->progress.lock);
    if (!x->error.code) x->error = *why;
    pthread_mutex_unlock(&x->progress.lock);
    atomic_store(&x->stop, true);
}

static int check_interrupt(medrun_error *e) {
    return interrupted ? fail(e, MEDRUN_INTERRUPTED, "interrupted; nothing is left behind") :
                         MEDRUN_OK;
}

static int write_at(const exporter *x, const void *from, size_t n, uint64_t at, medrun_error *e) {
    const uint8_t *p = from;
    while (n) {
        ssize_t put = pwrite(x->fd, p, n, (off_t)at);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return fail(e, MEDRUN_FAILED, "%s: cannot write: %s; nothing is left behind",
                                  x->partial, put ? strerror(errno) : "nothing was written");
        p += put, n -= (size_t)put, at += (uint64_t)put;
    }
    return MEDRUN_OK;
}

/* N numbers -> floats; false if one is infinite, not a number, or too large for a bf16. */
static bool to_floats(int dtype, const uint8_t *raw, size_t n, float *out) {
    uint32_t bad = 0, bits;
    uint16_t h;
    for (size_t k = 0; dtype == SOURCE_BF16 && k < n; k++) {
        memcpy(&h, raw + 2 * k, 2);
        bits = (uint32_t)h << 16;
        bad |= (bits & 0x7F800000) == 0x7F800000;
        memcpy(&out[k], &bits, 4);
    }
    for (size_t k = 0; dtype == SOURCE_F16 && k < n; k++) {
        memcpy(&h, raw + 2 * k, 2);
        bad |= (h & 0x7C00) == 0x7C00;
        out[k] = f16_to_f32(h);
    }
    for (size_t k = 0; dtype == SOURCE_F32 && k < n; k++) {
        memcpy(&bits, raw + 4 * k, 4);
        bad |= (bits & 0x7FFFFFFF) >= 0x7F7F8000;
        memcpy(&out[k], &bits, 4);
    }
    return !bad;
}

/* One section, 16 rows at a time: read, widen, pack, hash, write. */
static int write_section(exporter *x, section *t, const scratch *m, medrun_error *e) {
    const source_tensor *from = t->from;
    const source_file *file = &x->source.files[from->file];
    size_t size = source_types[from->dtype].size, step = t->type == TYPE_F32 ? 1 : LANES;
    uint64_t at = t->offset;
    sha256 sum;
    sha256_init(&sum);
    for (size_t row = 0; row < t->rows && !atomic_load(&x->stop); row += step) {
        size_t n = t->rows - row < step ? t->rows - row : step, bytes = n * t->cols * size;
        if (check_interrupt(e) ||
            read_at(file->fd, m->raw, bytes, from->begin + row * t->cols * size, file->name, e))
            return e->code;
        if (!to_floats(from->dtype, m->raw, n * t->cols, m->rows))
            return fail(e, MEDRUN_BAD_FILE, "%s/%s: tensor %s: rows %zu to %zu: found a weight that "
                        "is infinite, not a number or too large; the model is damaged",
                        x->source.folder, file->name, from->name, row, row + n - 1);
        const void *out = m->rows;
        size_t n_out = n * t->cols * sizeof(float);
        if (t->type != TYPE_F32) {
            panel_pack(t->type, m->rows, n, t->cols, m->out);
            out = m->out, n_out = panel_bytes(t->type, t->cols);
        }
        sha256_add(&sum, out, n_out);
        if (write_at(x, out, n_out, at, e)) return e->code;
        at += n_out;
        add_progress(&x->progress, bytes);
    }
    sha256_done(&sum, t->digest);
    return MEDRUN_OK;
}

/* SHA-256 of BYTES bytes of FD from AT on. */
static int hash_range(exporter *x, int fd, uint64_t at, uint64_t bytes, const char *path,
                      const scratch *m, uint8_t digest[32], medrun_error *e) {
    sha256 sum;
    sha256_init(&sum);
    while (bytes && !atomic_load(&x->stop)) {
        size_t n = bytes < READ_BYTES ? (size_t)bytes : READ_BYTES;
        if (check_interrupt(e) || read_at(fd, m->raw, n, at, path, e)) return e->code;
        sha256_add(&sum, m->raw, n);
        at += n, bytes -= n;
        add_progress(&x->progress, n);
    }
    sha256_done(&sum, digest);
    return MEDRUN_OK;
}

static void run_jobs(void *context, size_t begin, size_t end, int thread) {
    exporter *x = context;
    for (size_t i = begin; i < end && !atomic_load(&x->stop); i++) {
        const job *j = &x->jobs[i];
        const scratch *m = &x->scratch[thread];
        source_file *f = &x->source.files[j->file];
        medrun_error why = {0};
        int code = j->hash ? hash_range(x, f->fd, 0, f->bytes, f->name, m, f->digest, &why) :
                             write_section(x, &x->sections[j->index], m, &why);
        if (code) stop_export(x, &why);
    }
}

/* Reads each section again and compares its hash with the header's. */
static void run_checks(void *context, size_t begin, size_t end, int thread) {
    exporter *x = context;
    for (size_t i = begin; i < end && !atomic_load(&x->stop); i++) {
        const section *t = &x->sections[i];
        uint8_t digest[32];
        medrun_error why = {0};
        int code = hash_range(x, x->fd, t->offset, t->bytes, x->partial, &x->scratch[thread], digest,
                              &why);
        if (!code && !atomic_load(&x->stop) && memcmp(digest, t->digest, 32))
            code = fail(&why, MEDRUN_FAILED, "%s: %s: what was read again is not what was written; "
                        "the disk or the memory is faulty", x->partial, t->name);
        if (code) stop_export(x, &why);
    }
}

static int compare_jobs(const void *a, const void *b) {
    const job *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    if (x->hash != y->hash) return x->hash ? -1 : 1;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

static int plan_jobs(exporter *x, size_t *n_jobs, medrun_error *e) {
    size_t n = 0;
    x->jobs = new_array(x->n_sections + x->source.n_files, sizeof *x->jobs);
    if (!x->jobs) return out_of_memory(e, x->n_sections * sizeof *x->jobs);
    for (size_t i = 0; i < x->source.n_files; i++) {
        if (x->source.files[i].fd < 0) continue;
        x->jobs[n++] = (job){true, i, i, 0};
        x->progress.total += x->source.files[i].bytes;
    }
    for (size_t i = 0; i < x->n_sections; i++) {
        const source_tensor *t = x->sections[i].from;
        x->progress.total += x->sections[i].bytes;      /* each is read again at the end         */
        if (!t) continue;
        x->jobs[n++] = (job){false, i, t->file, t->begin};
        x->progress.total += t->end - t->begin;
    }
    qsort(x->jobs, n, sizeof *x->jobs, compare_jobs);
    return *n_jobs = n, MEDRUN_OK;
}

/* How large a thread's buffers are; fewer threads where all of them would take over 512 MB. */
static void plan_memory(exporter *x) {
    x->raw_bytes = x->row_floats = READ_BYTES;
    for (size_t i = 0; i < x->n_sections; i++) {
        const section *t = &x->sections[i];
        if (!t->from) continue;
        size_t rows = t->type == TYPE_F32 ? 1 : LANES, n = rows * t->cols;
        size_t raw = n * source_types[t->from->dtype].size;
        size_t out = t->type == TYPE_F32 ? 0 : panel_bytes(t->type, t->cols);
        if (raw > x->raw_bytes) x->raw_bytes = raw;
        if (n > x->row_floats) x->row_floats = n;
        if (out > x->out_bytes) x->out_bytes = out;
    }
    size_t each = x->raw_bytes + x->out_bytes + 4 * x->row_floats, most = (512u << 20) / each;
    if ((size_t)x->threads > most) x->threads = most ? (int)most : 1;
}

static int start_threads(exporter *x, medrun_error *e) {
    for (int i = 0; i < x->threads; i++) {
        scratch *m = &x->scratch[i];
        *m = (scratch){new_array(x->raw_bytes, 1), new_array(x->out_bytes, 1),
                       new_array(x->row_floats, sizeof(float))};
        if (!m->raw || !m->out || !m->rows) return out_of_memory(e, x->raw_bytes);
    }
    return pool_start(&x->pool, x->threads, e);
}

static int run_parallel(exporter *x, size_t n, task_fn *task, medrun_error *e) {
    parallel_for(&x->pool, n, 1, task, x);
    if (x->error.code) return fail(e, x->error.code, "%s", x->error.text);
    return check_interrupt(e);
}

/* ---- OUT.partial --------------------------------------------------------------------------- */

/* OUT may be a new name or a file to replace, but no device, and none of the sources. */
static int check_target(const exporter *x, medrun_error *e) {
    struct stat st;
    if (stat(x->options.out, &st)) return MEDRUN_OK;
    if (!S_ISREG(st.st_mode))
        return fail(e, MEDRUN_FAILED, "%s: cannot write: found no regular file there, wanted one or "
                    "nothing", x->options.out);
    for (size_t i = 0; i < x->source.n_files; i++)
        if (x->source.files[i].device == st.st_dev && x->source.files[i].inode == st.st_ino)
            return fail(e, MEDRUN_USAGE, "%s: is a file of the source; choose another name",
                        x->options.out);
    return MEDRUN_OK;
}

/* Creates OUT.partial, which nobody else may be writing, with room for BYTES bytes. */
static int create_partial(exporter *x, uint64_t bytes, medrun_error *e) {
    struct statvfs fs;
    char path[PATH_BYTES];
    if (check_target(x, e)) return e->code;
    if (snprintf(path, sizeof path, "%s.partial", x->options.out) >= (int)sizeof path)
        return fail(e, MEDRUN_USAGE, "%s: this path is too long", x->options.out);
    x->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (x->fd < 0) return fail(e, MEDRUN_FAILED, "%s: cannot write: %s", path, strerror(errno));
    if (flock(x->fd, LOCK_EX | LOCK_NB))
        return fail(e, MEDRUN_FAILED, "%s: cannot write: another export is writing it", path);
    memcpy(x->partial, path, sizeof path);
    if (ftruncate(x->fd, 0) || fstatvfs(x->fd, &fs))
        return fail(e, MEDRUN_FAILED, "%s: cannot write: %s", path, strerror(errno));
    uint64_t room = (uint64_t)fs.f_bavail * fs.f_frsize;
    if (room < bytes)
        return fail(e, MEDRUN_FAILED, "%s: needs %llu MB, but this disk has %llu MB free; make room "
                    "or choose another disk", x->options.out,
                    (unsigned long long)(bytes + 999999) / 1000000,
                    (unsigned long long)room / 1000000);
    if (ftruncate(x->fd, (off_t)bytes))
        return fail(e, MEDRUN_FAILED, "%s: cannot write: %s", path, strerror(errno));
    return MEDRUN_OK;
}

/* Gives the finished file its name; a crash of the machine leaves the old file or the new one. */
static int rename_partial(exporter *x, medrun_error *e) {
    char folder[PATH_BYTES];
    snprintf(folder, sizeof folder, "%s", x->options.out);
    char *slash = strrchr(folder, '/');
    if (slash) slash[slash == folder] = 0;
    if (check_interrupt(e)) return e->code;
    if (rename(x->partial, x->options.out))
        return fail(e, MEDRUN_FAILED, "%s: cannot rename %s: %s", x->options.out, x->partial,
                    strerror(errno));
    x->partial[0] = 0;
    int fd = open(slash ? folder : ".", O_RDONLY | O_CLOEXEC);
    if (fd >= 0) fsync(fd), close(fd);
    return MEDRUN_OK;
}

static void drop_partial(exporter *x) {
    if (x->partial[0]) unlink(x->partial);
    if (x->fd >= 0) close(x->fd);
    x->partial[0] = 0, x->fd = -1;
}

/* ============================================================================================
 * 10 Finishing: proofs, reading again, the name
 * ============================================================================================ */

static int write_header(exporter *x, medrun_error *e) {
    buffer b = {0};
    uint8_t digest[32];
    if (render_header(x, e)) return e->code;
    buffer_add(&b, "MEDRUN01", 8);
    write_le(&b, x->header.n, 8);
    buffer_add(&b, x->header.data, x->header.n);
    if (!b.failed) sha256_of(b.data, b.n, digest);
    buffer_add(&b, digest, 32);
    int code = b.failed ? out_of_memory(e, b.n) : MEDRUN_OK;
    if (!code && round_up(b.n, FILE_ALIGN) != x->data_at)
        code = fail(e, MEDRUN_FAILED, "the header takes %zu bytes, not what was reserved", b.n);
    if (!code) code = write_at(x, b.data, b.n, 0, e);
    buffer_free(&b);
    return code;
}

static int write_tokenizer_section(exporter *x, medrun_error *e) {
    section *t = &x->sections[x->n_sections - 1];
    const buffer *b = &x->source.tokenizer;
    sha256_of(b->data, b->n, t->digest);
    return write_at(x, b->data, b->n, t->offset, e);
}

static int prove_logits(const medrun_model *m, logits_proof *p, medrun_error *e) {
    medrun_session *s = NULL;
    medrun_session_options o = {.context = (int)p->n, .strict = true, .kv = MEDRUN_KV_F32};
    int code = medrun_start(&s, m, &o, NULL, 0, e);
    if (!code) code = medrun_feed(s, p->ids, p->n, e);
    while (!code && medrun_pending(s) && !(code = check_interrupt(e))) code = medrun_step(&s, 1, e);
    if (!code) {
        const float *row = medrun_logits(s, 0);
        for (int i = 0; !code && i < m->config.vocab_size; i++)
            if (!(fabsf(row[i]) <= FLT_MAX))
                code = fail(e, MEDRUN_FAILED, "the model computes logits that are not finite");
        sha256_of(row, (size_t)m->config.vocab_size * sizeof *row, p->digest);
    }
    medrun_stop(s);
    if (!code && p->given && memcmp(p->digest, p->wanted, 32))
        code = fail(e, MEDRUN_DIFFERS, "--proof: logits of %zu ids: their SHA-256 differs from the "
                    "one that is given", p->n);
    return code;
}

/* Opens what was written, as anyone will, and computes the proofs. */
static int prove_model(exporter *x, medrun_error *e) {
    medrun_model *m = NULL;
    medrun_options o = {.threads = x->threads};
    int code = medrun_open(&m, x->partial, &o, e);
    for (size_t i = 0; !code && i < x->n_logits; i++) code = prove_logits(m, &x->logits[i], e);
    medrun_close(m);
    return code;
}

/* What the disk has, not what memory still remembers of it, as far as the system lets us. */
static int read_again(exporter *x, medrun_error *e) {
    model_file f;
    if (fsync(x->fd))
        return fail(e, MEDRUN_FAILED, "%s: cannot write: %s; nothing is left behind", x->partial,
                    strerror(errno));
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(x->fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    int code = file_open(&f, x->partial, e);
    if (code) return code;
    file_close(&f);
    return run_parallel(x, x->n_sections, run_checks, e);
}

static int write_checkpoint(exporter *x, medrun_error *e) {
    size_t n_jobs = 0;
    double start = x->progress.start = seconds();
    x->progress.terminal = isatty(STDERR_FILENO);
    plan_memory(x);
    int code = create_partial(x, x->file_bytes, e);
    if (!code) code = plan_jobs(x, &n_jobs, e);
    if (!code) code = start_threads(x, e);
    if (!code) code = run_parallel(x, n_jobs, run_jobs, e);
    if (!code) code = write_tokenizer_section(x, e);
    if (!code) code = write_header(x, e);
    if (!code) code = prove_model(x, e);
    if (!code) code = write_header(x, e);
    if (!code) code = read_again(x, e);
    if (!code) code = rename_partial(x, e);
    end_progress(&x->progress);
    if (!code)
        fprintf(stderr, "%s: %s, %s, %zu tensors, %.1f MB, %.1f s\n", x->options.out, x->name,
                type_names[x->type], x->n_sections - 1, (double)x->file_bytes / 1e6,
                seconds() - start);
    return code;
}

static void close_exporter(exporter *x) {
    drop_partial(x);
    if (x->pool.threads) pool_stop(&x->pool);
    for (int i = 0; i < MAX_THREADS; i++) {
        free(x->scratch[i].raw);
        free(x->scratch[i].out);
        free(x->scratch[i].rows);
    }
    for (size_t i = 0; i < x->n_logits; i++) free(x->logits[i].ids);
    free(x->logits);
    free(x->sections);
    free(x->jobs);
    buffer_free(&x->header);
    buffer_free(&x->token_proofs);
    buffer_free(&x->chat_proofs);
    tokenizer_close(&x->tokenizer);
    close_source(&x->source);
}

/* ============================================================================================
 * 11 Commands: options, --dry-run, main
 * ============================================================================================ */

typedef struct {
    const char *name, *value;   /* value NULL: a flag                                          */
    size_t at;                  /* in export_options                                           */
    const char *help;
} export_option;

#define AT(field) offsetof(export_options, field)
static const export_option option_table[] = {
    {"--type", "TYPE", AT(type), "int8 (default) or bf16"},
    {"--template", "NAME", AT(template_name), "chat template: " CHAT_NAMES " (default: recognised)"},
    {"--name", "TEXT", AT(name), "the checkpoint's name (default: the folder's)"},
    {"--proof", "FILE", AT(proof), "JSON with more proofs: tokens, chats, logits"},
    {"--threads", "N", AT(threads), "threads (default: all processors)"},
    {"--yarn-factor", "F", AT(yarn_factor), "not supported yet"},
    {"--dry-run", NULL, AT(dry_run), "check everything, print what would be written"},
    {"--tokenizer-only", NULL, AT(tokenizer_only), "write only a tokenizer.bin"},
    {"--help", NULL, AT(help), "this text"},
    {"--version", NULL, AT(version), "the version"},
};
#undef AT
enum { N_EXPORT_OPTIONS = sizeof option_table / sizeof *option_table };

static void print_export_help(void) {
    printf("medrun-export SOURCE OUT.mdr [options]\n"
           "medrun-export --tokenizer-only SOURCE OUT.bin\n\n"
           "Makes a medrun checkpoint from a Hugging Face folder: config.json, tokenizer.json and\n"
           "safetensors. Writes OUT.partial and renames it when it is complete and read again.\n\n");
    for (size_t i = 0; i < N_EXPORT_OPTIONS; i++)
        printf("  %-17s%-6s%s\n", option_table[i].name,
               option_table[i].value ? option_table[i].value : "", option_table[i].help);
    printf("\nExit codes: 0 ok, 1 failed while running, 2 usage, 3 file missing, unsupported or\n"
           "malformed, 4 a given proof differs, 6 out of memory, 130 interrupted.\n");
}

/* Letters to insert, remove or change to get from A to B (at most 31 letters of each). */
static size_t edit_distance(const char *a, const char *b) {
    size_t row[32], na = strlen(a), nb = strlen(b);
    if (na > 31) na = 31;
    if (nb > 31) nb = 31;
    for (size_t k = 0; k <= nb; k++) row[k] = k;
    for (size_t i = 1; i <= na; i++) {
        size_t corner = row[0]++;
        for (size_t k = 1; k <= nb; k++) {
            size_t best = corner + (a[i - 1] != b[k - 1]);
            if (row[k] + 1 < best) best = row[k] + 1;
            if (row[k - 1] + 1 < best) best = row[k - 1] + 1;
            corner = row[k], row[k] = best;
        }
    }
    return row[nb];
}

/* The option whose name are the N letters at TEXT. */
static const export_option *find_option(const char *text, size_t n, medrun_error *e) {
    char name[32];
    snprintf(name, sizeof name, "%.*s", (int)(n < 31 ? n : 31), text);
    if (!strcmp(name, "-t")) snprintf(name, sizeof name, "--threads");
    if (!strcmp(name, "-h")) snprintf(name, sizeof name, "--help");
    const export_option *nearest = option_table;
    for (size_t i = 0; i < N_EXPORT_OPTIONS; i++) {
        if (!strcmp(name, option_table[i].name)) return &option_table[i];
        if (edit_distance(name, option_table[i].name) < edit_distance(name, nearest->name))
            nearest = &option_table[i];
    }
    fail(e, MEDRUN_USAGE, "unknown option %s; the nearest is %s", name, nearest->name);
    return NULL;
}

static int parse_options(export_options *o, int argc, char **argv, medrun_error *e) {
    bool only_words = false;
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *equals = strchr(arg, '=');
        if (!only_words && !strcmp(arg, "--")) { only_words = true; continue; }
        if (only_words || arg[0] != '-' || !arg[1]) {
            if (o->out) return fail(e, MEDRUN_USAGE, "found a third word %s, wanted SOURCE and OUT; "
                                    "see --help", arg);
            *(o->source ? &o->out : &o->source) = arg;
            continue;
        }
        const export_option *p = find_option(arg, equals ? (size_t)(equals - arg) : strlen(arg), e);
        if (!p) return e->code;
        char *field = (char *)o + p->at;
        if (!p->value && equals) return fail(e, MEDRUN_USAGE, "%s takes no value", p->name);
        if (!p->value) { *(bool *)(void *)field = true; continue; }
        if (!equals && i + 1 == argc)
            return fail(e, MEDRUN_USAGE, "%s: wanted a value %s", p->name, p->value);
        *(const char **)(void *)field = equals ? equals + 1 : argv[++i];
    }
    return MEDRUN_OK;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), len = strlen(end);
    return n >= len && !strcmp(text + n - len, end);
}

/* Ranges of options, and what is not there yet. */
static int check_options(exporter *x, medrun_error *e) {
    const export_options *o = &x->options;
    if (!o->source || (!o->out && !o->dry_run))
        return fail(e, MEDRUN_USAGE, "wanted SOURCE and OUT; see --help");
    x->type = o->type ? type_find(o->type) : TYPE_INT8;
    if (o->type && !strcmp(o->type, "int4"))
        return fail(e, MEDRUN_USAGE, "--type: int4 is not supported yet, wanted bf16 or int8");
    if (x->type != TYPE_BF16 && x->type != TYPE_INT8)
        return fail(e, MEDRUN_USAGE, "--type: found %s, wanted bf16 or int8", o->type);
    if (o->yarn_factor) return fail(e, MEDRUN_USAGE, "--yarn-factor is not supported yet");
    if (ends_with(o->source, ".gguf"))
        return fail(e, MEDRUN_BAD_FILE, "%s: GGUF is not supported yet, wanted a Hugging Face folder",
                    o->source);
    x->threads = processors();
    if (o->threads) {
        char *end;
        long n = strtol(o->threads, &end, 10);
        if (*end || end == o->threads || n < 1 || n > MAX_THREADS)
            return fail(e, MEDRUN_USAGE, "--threads: found %s, wanted 1 to %d", o->threads,
                        MAX_THREADS);
        x->threads = (int)n;
    }
    if (x->threads > MAX_THREADS) x->threads = MAX_THREADS;
    if (o->name && (strlen(o->name) >= sizeof x->name || !*o->name))
        return fail(e, MEDRUN_USAGE, "--name: found %zu bytes, wanted 1 to %zu", strlen(o->name),
                    sizeof x->name - 1);
    return MEDRUN_OK;
}

/* --name, or the folder's own name, cut between characters. */
static int choose_name(exporter *x, medrun_error *e) {
    char *full = x->options.name ? NULL : realpath(x->options.source, NULL);
    const char *slash = full ? strrchr(full, '/') : NULL, *name = x->options.name;
    if (!name && !full)
        return fail(e, MEDRUN_BAD_FILE, "%s: %s", x->options.source, strerror(errno));
    if (!name) name = slash ? slash + 1 : full;
    size_t n = strlen(name) < sizeof x->name ? strlen(name) : sizeof x->name - 1;
    memcpy(x->name, name, n);
    x->name[n - utf8_unfinished((const uint8_t *)name, n)] = 0;
    free(full);
    return MEDRUN_OK;
}

static void print_plan(const exporter *x) {
    const source *s = &x->source;
    const model_config *c = &s->config;
    uint64_t parameters = 0, weights = 0, row = (uint64_t)c->n_layers * 4;
    for (size_t i = 0; i + 1 < x->n_sections; i++) {
        parameters += (uint64_t)x->sections[i].rows * x->sections[i].cols;
        weights += x->sections[i].bytes;
    }
    row *= (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim;
    printf("name       %s\nsource     %s\nlicence    %s\n", x->name, s->folder,
           s->licence[0] ? s->licence : "not stated");
    printf("model      llama, %.2f billion parameters, %d layers, hidden %d, heads %d, kv heads %d, "
           "head_dim %d, ffn %d, vocabulary %d, positions %d%s\n", (double)parameters / 1e9,
           c->n_layers, c->hidden_size, c->n_heads, c->n_kv_heads, c->head_dim, c->ffn_size,
           c->vocab_size, c->max_positions, c->tied ? ", tied" : "");
    printf("rope       theta %g, %s\n", c->rope_theta, c->rope_llama3 ? "llama3 scaling" : "unscaled");
    printf("chat       %s, stop ids", s->chat->name);
    for (int i = 0; i < s->n_stops; i++) printf(" %d", s->stops[i]);
    printf("\nsampling   temperature %g, top_k %lld, top_p %g, min_p %g, repeat_penalty %g\n",
           s->sampling.temperature, (long long)s->sampling.top_k, s->sampling.top_p,
           s->sampling.min_p, s->sampling.repeat_penalty);
    printf("tensors    %zu, matrices %s, norms f32\n", x->n_sections - 1, type_names[x->type]);
    printf("file       %llu bytes\n", (unsigned long long)x->file_bytes);
    printf("memory     %.1f MB of weights, and %.1f KB of keys and values a token of context (f16): "
           "%.1f MB for all %d\n", (double)weights / 1e6, (double)row / 1e3,
           (double)row * c->max_positions / 1e6, c->max_positions);
}

static int export_model(exporter *x, medrun_error *e) {
    source *s = &x->source;
    s->folder = x->options.source;
    int code = choose_name(x, e);
    if (!code) code = open_hf_folder(s, x->options.template_name, e);
    if (!code) code = plan_model(x, e);
    if (!code) code = plan_proofs(x, e);
    if (!code) code = lay_out(x, e);
    if (!code) code = check_header(x, e);
    if (code) return code;
    if (!x->options.dry_run) return write_checkpoint(x, e);
    print_plan(x);
    return fflush(stdout) || ferror(stdout) ? fail(e, MEDRUN_FAILED, "cannot write to stdout") :
                                              MEDRUN_OK;
}

/* SOURCE is a folder, or a tokenizer.json by itself. */
static int export_tokenizer(exporter *x, medrun_error *e) {
    source *s = &x->source;
    hf_tokenizer t = {0};
    struct stat st;
    s->folder = x->options.source;
    int code = MEDRUN_OK;
    if (!stat(s->folder, &st) && S_ISREG(st.st_mode)) {
        source_file *file;
        snprintf(t.file.path, sizeof t.file.path, "%s", s->folder);
        if (!(code = open_json_path(&t.file, e))) code = add_file(s, "", s->folder, &file, e);
    } else {
        code = open_json(s, "tokenizer.json", false, &t.file, e);
        if (!code) code = open_json(s, "tokenizer_config.json", true, &t.config, e);
    }
    if (!code) code = convert_tokenizer(&t, &s->tokenizer, e);
    free_hf_tokenizer(&t);
    if (code || x->options.dry_run) return code;
    if (!(code = create_partial(x, s->tokenizer.n, e)))
        code = write_at(x, s->tokenizer.data, s->tokenizer.n, 0, e);
    if (!code && fsync(x->fd))
        code = fail(e, MEDRUN_FAILED, "%s: cannot write: %s", x->partial, strerror(errno));
    return code ? code : rename_partial(x, e);
}

/* The whole program; tests call it in a child process. */
static int export_main(int argc, char **argv) {
    static exporter x;
    medrun_error e = {0};
    x = (exporter){.fd = -1, .progress.tenth = 0};
    pthread_mutex_init(&x.progress.lock, NULL);
    catch_signals();
    int code = parse_options(&x.options, argc, argv, &e);
    if (!code && x.options.help) return print_export_help(), MEDRUN_OK;
    if (!code && x.options.version) return puts("medrun-export " MEDRUN_VERSION), MEDRUN_OK;
    if (!code) code = check_options(&x, &e);
    if (!code) code = x.options.tokenizer_only ? export_tokenizer(&x, &e) : export_model(&x, &e);
    close_exporter(&x);
    if (code) fprintf(stderr, "medrun-export: %s\n", e.text);
    return code;
}

#ifndef MEDRUN_EXPORT_NO_MAIN
int main(int argc, char **argv) { return export_main(argc, argv); }
#endif
