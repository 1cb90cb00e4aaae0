/* tools/export_gguf.c: blocks decode to gguf's own bits; a GGUF file gives the bytes that the
 * folder of the same model gives; bad files are refused with one line. Files are made here byte by
 * byte, from the fixtures or from lists of keys and tensors that each case changes in one place. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>

static void *test_realloc(void *p, size_t n);
#define MEDRUN_ALLOC test_realloc
#define MEDRUN_EXPORT_NO_MAIN
#include "../tools/export.c"
#include "test.h"

static long fail_alloc_at = -1;
static atomic_long n_allocs;

static void *test_realloc(void *p, size_t n) {
    long i = atomic_fetch_add(&n_allocs, 1);
    return fail_alloc_at >= 0 && i >= fail_alloc_at ? NULL : realloc(p, n);
}

static char work[256], fixtures[256];
static const char *model_path, *out_path;

static void must(bool ok, const char *what) {
    if (ok) return;
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}

static const char *path_of(const char *folder, const char *name) {
    static char paths[8][1024];
    static int i;
    i = (i + 1) % 8;
    snprintf(paths[i], sizeof paths[i], "%s/%s", folder, name);
    return paths[i];
}

static void read_file(const char *path, buffer *b) {
    file_map map = {0};
    b->n = 0;
    if (!map_file(path, &map, NULL)) buffer_add(b, map.data, map.n);
    unmap_file(&map);
}

static void write_file(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    must(f && (!n || fwrite(data, 1, n, f) == n) && !fclose(f), path);
}

/* ---- writing GGUF -------------------------------------------------------------------------- */

static void put_text(buffer *b, const char *text, size_t n) {
    write_le(b, n, 8);
    buffer_add(b, text, n);
}

/* A value as words: "u32 7", "i64 -1", "f32 0.5", "bool 1", "str text", "arr u32 1 2 3",
 * "raw HEX" with type and all. */
static uint32_t type_of(const char *word) {
    static const char *const words[] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool",
                                        "str", "arr", "u64", "i64", "f64"};
    for (uint32_t i = 0; i < 13; i++) if (!strcmp(words[i], word)) return i;
    must(false, word);
    return 0;
}

static void put_number(buffer *b, uint32_t type, const char *text) {
    double d = strtod(text, NULL);
    uint64_t bits;
    memcpy(&bits, &d, 8);
    if (type == GGUF_F32) write_le(b, float_bits((float)d), 4);
    else if (type == GGUF_F64) write_le(b, bits, 8);
    else write_le(b, *text == '-' ? (uint64_t)strtoll(text, NULL, 10) : strtoull(text, NULL, 10),
                  gguf_sizes[type]);
}

static void put_value(buffer *b, const char *value) {
    char copy[2048], *save, *word;
    snprintf(copy, sizeof copy, "%s", value);
    word = strtok_r(copy, " ", &save);
    if (!strcmp(word, "raw")) {
        for (const char *p = value + 4; p[0] && p[1]; p += 2) {
            char two[3] = {p[0], p[1], 0};
            write_le(b, strtoul(two, NULL, 16), 1);
        }
        return;
    }
    uint32_t type = type_of(word);
    write_le(b, type, 4);
    if (type == GGUF_STRING) put_text(b, save, strlen(save));
    else if (type != GGUF_ARRAY) put_number(b, type, strtok_r(NULL, " ", &save));
    else {
        uint64_t n = 0;
        buffer items = {0};
        type = type_of(strtok_r(NULL, " ", &save));
        for (; (word = strtok_r(NULL, " ", &save)); n++) put_number(&items, type, word);
        write_le(b, type, 4);
        write_le(b, n, 8);
        buffer_add(b, items.data, items.n);
        buffer_free(&items);
    }
}

typedef struct {
    uint32_t version, align;
    uint64_t n_values, n_tensors, data_at;
    buffer values, infos, data;
} writer;

static void put_key(writer *w, const char *key, const char *value) {
    put_text(&w->values, key, strlen(key));
    put_value(&w->values, value);
    w->n_values++;
}

MEDRUN_PRINTF_LIKE(3, 4)
static void put_keyf(writer *w, const char *key, const char *format, ...) {
    char value[256];
    va_list args;
    va_start(args, format);
    vsnprintf(value, sizeof value, format, args);
    va_end(args);
    put_key(w, key, value);
}

/* A tensor of RANK dimensions as the file has them, whose BYTES bytes follow those before it. */
static void put_tensor(writer *w, const char *name, uint32_t type, uint32_t rank,
                       const uint64_t *dims, const void *data, size_t bytes) {
    while (w->data.n % w->align) write_le(&w->data, 0, 1);
    put_text(&w->infos, name, strlen(name));
    write_le(&w->infos, rank, 4);
    for (uint32_t i = 0; i < rank; i++) write_le(&w->infos, dims[i], 8);
    write_le(&w->infos, type, 4);
    write_le(&w->infos, w->data.n, 8);
    buffer_add(&w->data, data, bytes);
    w->n_tensors++;
}

static void finish(writer *w, buffer *out) {
    out->n = 0;
    buffer_add(out, "GGUF", 4);
    write_le(out, w->version, 4);
    write_le(out, w->n_tensors, 8);
    write_le(out, w->n_values, 8);
    buffer_add(out, w->values.data, w->values.n);
    buffer_add(out, w->infos.data, w->infos.n);
    while (w->n_tensors && out->n % w->align) write_le(out, 0, 1);
    w->data_at = out->n;
    buffer_add(out, w->data.data, w->data.n);
    buffer_free(&w->values);
    buffer_free(&w->infos);
    buffer_free(&w->data);
}

/* ---- running ------------------------------------------------------------------------------- */

static medrun_error last;
static char notes[4096], answer[4096];
static const chat_template *last_chat;
static model_config last_config;
static int last_stops[MEDRUN_MAX_STOPS];

/* Reads the file as the exporter does before it writes. Without OPTIONS: --template none. */
static int attempt(const char *path, const export_options *options) {
    static exporter x;
    x = (exporter){.fd = -1, .options.template_name = "none"};
    last = (medrun_error){0};
    if (options) x.options = *options;
    x.options.source = path, x.options.out = out_path, x.options.dry_run = true;
    pthread_mutex_init(&x.lock, NULL);
    if (!check_options(&x, &last)) {
        source *s = &x.source;
        s->folder = path;
        if (!open_gguf_source(s, path, x.options.template_name, &last) && !choose_name(&x, &last) &&
            !plan_model(&x, &last) && !plan_proofs(&x, &last)) lay_out(&x, &last);
    }
    snprintf(notes, sizeof notes, "%s", x.source.notes.n ? (char *)x.source.notes.data : "");
    snprintf(answer, sizeof answer, "%s|%s|%s", x.name, x.precision, x.source.licence);
    last_config = x.source.config, last_chat = x.source.chat ? chat_find(x.source.chat->name) : NULL;
    memcpy(last_stops, x.source.stops, sizeof last_stops);
    close_exporter(&x);
    return last.code;
}

static int attempt_bytes(const buffer *b) {
    write_file(model_path, b->data, b->n);
    return attempt(model_path, NULL);
}

/* Exports SOURCE with all that belongs to it; stderr goes nowhere. */
static int export(const char *source_path, const char *to, const char *type) {
    char *argv[] = {(char *)(uintptr_t)"x", (char *)(uintptr_t)source_path,
                    (char *)(uintptr_t)to, (char *)(uintptr_t)"--type", (char *)(uintptr_t)type,
                    (char *)(uintptr_t)"--threads", (char *)(uintptr_t)"2",
                    (char *)(uintptr_t)"--template", (char *)(uintptr_t)"none"};
    fflush(stderr);
    int saved = dup(2), quiet = open(path_of(work, "stderr"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    must(saved >= 0 && quiet >= 0 && dup2(quiet, 2) == 2, "stderr");
    int code = export_main(9, argv);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    close(quiet);
    return code;
}

/* ---- blocks -------------------------------------------------------------------------------- */

static void test_blocks(void) {
    gguf_file g = {0};
    source s = {0};
    medrun_error e = {0};
    buffer wanted = {0};
    float found[2048];
    if (!CHECK(!open_gguf(&s, &g, path_of(fixtures, "gguf/blocks.gguf"), &e))) return;
    CHECK_EQ(s.n_tensors, N_WEIGHT_TYPES);
    for (size_t i = 0; i < s.n_tensors; i++) {
        const source_tensor *t = &s.tensors[i];
        char name[64];
        snprintf(name, sizeof name, "gguf/blocks_%s.f32", source_types[t->dtype].name);
        read_file(path_of(fixtures, name), &wanted);
        CHECK(!strncmp(t->name, name + 5, strlen(name) - 9));
        CHECK(t->rank == 2 && t->shape[0] == 4 && t->shape[1] == 512);
        CHECK_EQ(t->end - t->begin, source_bytes(t->dtype, 2048));
        CHECK(to_floats(t->dtype, g.map.data + t->begin, 2048, found));
        if (!CHECK(wanted.n == sizeof found && !memcmp(wanted.data, found, sizeof found)))
            printf("    %s\n", name);
    }
    close_gguf(&g);
    close_source(&s);
    buffer_free(&wanted);
}

/* A scale that is infinite or not a number is found, wherever it stands. */
static void test_not_finite(void) {
    static const struct { int dtype, at; } scales[] = {
        {SOURCE_F16, 0}, {SOURCE_Q8_0, 0}, {SOURCE_Q4_0, 0}, {SOURCE_Q4_1, 0}, {SOURCE_Q4_1, 2},
        {SOURCE_Q5_0, 0}, {SOURCE_Q5_1, 0}, {SOURCE_Q5_1, 2}, {SOURCE_Q4_K, 0}, {SOURCE_Q4_K, 2},
        {SOURCE_Q5_K, 0}, {SOURCE_Q5_K, 2}, {SOURCE_Q6_K, 208}};
    static const uint16_t bad[] = {0x7C00, 0xFC00, 0x7E00, 0x7C01};
    size_t wrong = 0;
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        uint8_t raw[512] = {0};                         /* all else zero: 0 * inf is no number   */
        float out[256];
        size_t n = source_types[scales[i].dtype].block;
        wrong += !to_floats(scales[i].dtype, raw, n, out);
        for (size_t k = 0; k < 4; k++) {
            memcpy(raw + scales[i].at, &bad[k], 2);
            wrong += to_floats(scales[i].dtype, raw, n, out);
        }
    }
    CHECK_EQ(wrong, 0);
    CHECK(!to_floats(SOURCE_F32, (const uint8_t *)"\0\0\xc0\x7f", 1, &(float){0}));
    CHECK(!to_floats(SOURCE_BF16, (const uint8_t *)"\x80\xff", 1, &(float){0}));
}

/* Q8_0 to int8: what the two blocks of a group stand for is turned and rounded again, which moves it
 * by half a step at most, in the mean of squares less than what made Q8_0 of floats. */
static void test_q8_0_kept(void) {
    static uint8_t panel[4096];
    double off = 0, size = 0;
    int wrong = 0;
    for (int round = 0; round < 200; round++) {
        uint8_t raw[68];
        float from[64], to[64];
        float scale = ldexpf((float)(128 + test_random() % 128), -(int)(test_random() % 12) - 8);
        uint16_t half = f32_to_f16(scale);
        for (size_t k = 0; k < 68; k++) raw[k] = (uint8_t)((int)(test_random() % 255) - 127);
        memcpy(raw, &half, 2), memcpy(raw + 34, &half, 2);
        raw[2 + test_random() % 32] = round & 1 ? 127 : (uint8_t)-127;
        wrong += !to_floats(SOURCE_Q8_0, raw, 64, from);
        store_panel(TYPE_INT8, from, 1, 64, panel);
        panel_unpack_row(TYPE_INT8, panel, 0, 64, to);
        for (size_t k = 0; k < 64; k++) {
            double d = (double)to[k] - (double)from[k], x = (double)from[k] / (double)scale;
            off += d * d / (double)scale / (double)scale, size += x * x;
        }
    }
    CHECK_EQ(wrong, 0);
    printf("Q8_0 to int8: relative squared error %.2g\n", off / size);
    CHECK(off / size < 4e-5);
}

/* ---- the same model as a folder and as GGUF ------------------------------------------------ */

/* What two checkpoints must share: config, type, proofs (ids of texts, digests of logits), digests
 * of all tensors and, unless that differs for a reason, of the tokenizer. */
static bool same_model(const char *a, const char *b, bool same_tokenizer) {
    model_file f, g;
    medrun_error e = {0};
    bool same = true;
    if (file_open(&f, a, false, &e)) return false;
    if (file_open(&g, b, false, &e)) return file_close(&f), false;
    static const char *const keys[] = {"config", "type", "proofs"};
    const json *j = &f.header, *k = &g.header;
    for (size_t i = 0; i < 3; i++) {
        const json_node *x = &j->nodes[json_get(j, 0, keys[i])];
        const json_node *y = &k->nodes[json_get(k, 0, keys[i])];
        same = same && x->end - x->start == y->end - y->start &&
               !memcmp(j->text + x->start, k->text + y->start, x->end - x->start);
    }
    uint32_t t = json_get(j, 0, "tensors"), u = json_get(k, 0, "tensors");
    same = same && children(j, t) && children(j, t) == children(k, u);
    uint32_t d = u + 1, x = json_get(j, 0, "tokenizer"), y = json_get(k, 0, "tokenizer");
    for EACH(j, t, c) {
        if (!same) break;
        same = json_is(k, json_get(k, d, "name"), show(j, json_get(j, c, "name")).text) &&
               json_is(k, json_get(k, d, "sha256"), show(j, json_get(j, c, "sha256")).text);
        d = k->nodes[d].next;
    }
    same = same && json_is(k, json_get(k, y, "sha256"), show(j, json_get(j, x, "sha256")).text) ==
                   same_tokenizer;
    file_close(&f);
    file_close(&g);
    return same;
}

/* Both routes in all types. SPM: a SentencePiece tokenizer, which llama.cpp does not run as
 * SentencePiece does. */
static void compare_routes(const char *gguf_file_path, const char *folder_path, bool spm) {
    static const char *const types[] = {"bf16", "int8", "int4"};
    char from[512], folder[512];
    snprintf(from, sizeof from, "%s", gguf_file_path);
    snprintf(folder, sizeof folder, "%s", folder_path);
    for (size_t i = 0; i < 3; i++) {
        if (!CHECK_EQ(export(from, out_path, types[i]), 0) ||
            !CHECK_EQ(export(folder, path_of(work, "other.mdr"), types[i]), 0)) continue;
        if (!CHECK(same_model(out_path, path_of(work, "other.mdr"), !spm)))
            printf("    %s %s\n", folder, types[i]);
    }
}

/* The tokens, types and merges of a byte-level tokenizer.json. */
static void put_vocabulary(writer *w, const char *folder, size_t n, int64_t bos, int64_t eos) {
    json_file f = {0};
    medrun_error e = {0};
    buffer *tokens = new_array(n, sizeof *tokens), merges = {0}, text = {0};
    uint8_t *types = new_array(n, 1);
    snprintf(f.path, sizeof f.path, "%s", path_of(folder, "tokenizer.json"));
    must(!open_json_path(&f, &e) && tokens && types, e.text);
    const json *j = &f.j;
    uint32_t model = json_get(j, 0, "model"), list = json_get(j, model, "merges");
    for EACH_KEY(j, json_get(j, model, "vocab"), c) {
        size_t id = (size_t)json_number(j, c + 1);
        json_unescape(j, c, &tokens[id]);
        types[id] = 1;
    }
    for EACH(j, json_get(j, 0, "added_tokens"), c) {
        size_t id = (size_t)json_number(j, json_get(j, c, "id"));
        tokens[id].n = 0;
        json_unescape(j, json_get(j, c, "content"), &tokens[id]);
        types[id] = json_is_type(j, json_get(j, c, "special"), JSON_TRUE) ? 3 : 4;
    }
    for EACH(j, list, c) {
        text.n = 0;
        merge_text(j, c, &text);
        put_text(&merges, (const char *)text.data, text.n);
    }
    put_key(w, "tokenizer.ggml.model", "str gpt2");
    put_key(w, "tokenizer.ggml.pre", "str llama-bpe");
    put_keyf(w, "tokenizer.ggml.bos_token_id", "u32 %lld", (long long)bos);
    put_keyf(w, "tokenizer.ggml.eos_token_id", "u32 %lld", (long long)eos);
    put_text(&w->values, "tokenizer.ggml.tokens", 21);
    write_le(&w->values, GGUF_ARRAY, 4), write_le(&w->values, GGUF_STRING, 4);
    write_le(&w->values, n, 8);
    for (size_t i = 0; i < n; i++) put_text(&w->values, (char *)tokens[i].data, tokens[i].n);
    put_text(&w->values, "tokenizer.ggml.token_type", 25);
    write_le(&w->values, GGUF_ARRAY, 4), write_le(&w->values, GGUF_I32, 4);
    write_le(&w->values, n, 8);
    for (size_t i = 0; i < n; i++) write_le(&w->values, types[i], 4), buffer_free(&tokens[i]);
    put_text(&w->values, "tokenizer.ggml.merges", 21);
    write_le(&w->values, GGUF_ARRAY, 4), write_le(&w->values, GGUF_STRING, 4);
    write_le(&w->values, children(j, list), 8);
    buffer_add(&w->values, merges.data, merges.n);
    w->n_values += 3;
    close_json(&f);
    free(tokens);
    free(types);
    buffer_free(&merges);
    buffer_free(&text);
}

/* The divisors of llama3 scaling: what the frequencies without it are more than those with it. */
static void put_divisors(writer *w, const model_config *c) {
    model_config plain = *c;
    float with[MAX_HEAD_DIM / 2], without[MAX_HEAD_DIM / 2];
    uint64_t n = (uint64_t)c->head_dim / 2;
    plain.rope_type = ROPE_NONE;
    rope_frequencies(c, with);
    rope_frequencies(&plain, without);
    for (uint64_t i = 0; i < n; i++) with[i] = without[i] / with[i];
    put_tensor(w, "rope_freqs.weight", 0, 1, &n, with, n * 4);
}

/* One tensor of the folder: norms as F32, the rest as it is, rows of q and k in pairs. */
static void put_folder_tensor(writer *w, const source *s, const char *name, const char *hf_name) {
    const source_tensor *t = find_tensor(s, hf_name);
    must(t && t->dtype == SOURCE_BF16, hf_name);
    size_t bytes = (size_t)(t->end - t->begin);
    uint8_t *raw = new_array(bytes, 1), *out = new_array(bytes, 2);
    must(raw && out && !read_at(s->files[t->file].fd, raw, bytes, t->begin, name, NULL), name);
    uint64_t dims[2] = {t->rank == 2 ? t->shape[1] : t->shape[0], t->shape[0]};
    if (t->rank == 1) {
        to_floats(SOURCE_BF16, raw, bytes / 2, (float *)(void *)out);
        put_tensor(w, name, 0, 1, dims, out, 2 * bytes);
    } else {
        size_t row = 2 * (size_t)dims[0], d = (size_t)s->config.head_dim;
        bool paired = strstr(name, "attn_q") || strstr(name, "attn_k");
        for (size_t r = 0; r < dims[1]; r++) {          /* row r of the folder goes to row TO    */
            size_t i = r % d % (d / 2), j = r % d / (d / 2);
            size_t to = paired ? r / d * d + 2 * i + j : r;
            memcpy(out + to * row, raw + r * row, row);
        }
        put_tensor(w, name, 30, 2, dims, out, bytes);
    }
    free(raw);
    free(out);
}

static void test_from_folder(const char *fixture, uint32_t align) {
    static const char *const names[][2] = {
        {"attn_norm", "input_layernorm"}, {"attn_q", "self_attn.q_proj"},
        {"attn_k", "self_attn.k_proj"}, {"attn_v", "self_attn.v_proj"},
        {"attn_output", "self_attn.o_proj"}, {"ffn_norm", "post_attention_layernorm"},
        {"ffn_gate", "mlp.gate_proj"}, {"ffn_up", "mlp.up_proj"}, {"ffn_down", "mlp.down_proj"}};
    char folder[512];
    source s = {.sliding_window = -1};
    medrun_error e = {0};
    writer w = {.version = 3, .align = align};
    buffer out = {0};
    tokenizer t;
    snprintf(folder, sizeof folder, "%s/%s", fixtures, fixture);
    s.folder = folder;
    must(!open_hf_folder(&s, "none", &e), e.text);
    must(!tokenizer_open(&t, s.tokenizer.data, s.tokenizer.n, folder, &e), e.text);
    const model_config *c = &s.config;
    put_key(&w, "general.architecture", "str llama");
    if (align != 32) put_keyf(&w, "general.alignment", "u32 %u", align);
    put_keyf(&w, "llama.block_count", "u32 %d", c->n_layers);
    put_keyf(&w, "llama.context_length", "u64 %d", c->max_positions);
    put_keyf(&w, "llama.embedding_length", "u32 %d", c->hidden_size);
    put_keyf(&w, "llama.feed_forward_length", "i32 %d", c->ffn_size);
    put_keyf(&w, "llama.attention.head_count", "arr u32 %d %d", c->n_heads, c->n_heads);
    put_keyf(&w, "llama.attention.head_count_kv", "u16 %d", c->n_kv_heads);
    put_keyf(&w, "llama.attention.key_length", "u32 %d", c->head_dim);
    put_keyf(&w, "llama.attention.value_length", "u32 %d", c->head_dim);
    put_keyf(&w, "llama.rope.freq_base", "f32 %.9g", c->rope_theta);
    put_keyf(&w, "llama.attention.layer_norm_rms_epsilon", "f32 %.9g", (double)c->norm_eps);
    put_vocabulary(&w, folder, (size_t)c->vocab_size, t.bos, s.eos);
    if (c->rope_type == ROPE_LLAMA3) put_divisors(&w, c);
    put_folder_tensor(&w, &s, "token_embd.weight", "model.embed_tokens.weight");
    for (int l = 0; l < c->n_layers; l++)
        for (size_t i = 0; i < 9; i++) {
            char name[64], hf_name[96];
            snprintf(name, sizeof name, "blk.%d.%s.weight", l, names[i][0]);
            snprintf(hf_name, sizeof hf_name, "model.layers.%d.%s.weight", l, names[i][1]);
            put_folder_tensor(&w, &s, name, hf_name);
        }
    put_folder_tensor(&w, &s, "output_norm.weight", "model.norm.weight");
    if (!c->tied) put_folder_tensor(&w, &s, "output.weight", "lm_head.weight");
    finish(&w, &out);
    write_file(model_path, out.data, out.n);
    compare_routes(model_path, folder, false);
    tokenizer_close(&t);
    close_source(&s);
    buffer_free(&out);
}

/* What gguf's own writer wrote. */
static void test_fixtures(void) {
    static const char *const names[] = {"llama-small", "arcee-yarn", "apertus-plain",
                                        "mistral-spm"};
    for (size_t i = 0; i < 4; i++) {
        char name[64];
        snprintf(name, sizeof name, "gguf/%s-bf16.gguf", names[i]);
        compare_routes(path_of(fixtures, name), path_of(fixtures, names[i]), i == 3);
    }
    export_options o = {.yarn_factor = "16", .template_name = "none"};
    CHECK_EQ(attempt(path_of(fixtures, "gguf/arcee-yarn-q8_0.gguf"), &o), 0);
    CHECK(strstr(notes, "factor 16 is used, as --yarn-factor") && strstr(notes, "the 20 of the m"));
    CHECK(strstr(notes, "come from Q8_0 (14 tensors): int8 re-encodes"));
    CHECK(!strstr(notes, "adds far less"));
    CHECK(!strcmp(answer, "arcee-yarn|Q8_0 (14 tensors)|"));
    CHECK_EQ(attempt(path_of(fixtures, "gguf/arcee-yarn-q8_0.gguf"),
                     &(export_options){.type = "int4", .template_name = "none"}), 0);
    CHECK(strstr(notes, "int4 re-encodes values that were already rounded; int8 adds far less"));
    CHECK_EQ(attempt(path_of(fixtures, "gguf/arcee-yarn-q8_0.gguf"), &o), 0);
    CHECK(last_config.rope_type == ROPE_YARN && last_config.rope_factor > 15.9 &&
          last_config.rope_factor < 16.1 && fabs(last_config.rope_attention - 1.277258872) < 1e-8);
    CHECK_EQ(attempt(path_of(fixtures, "gguf/llama-small-bf16.gguf"), &o), 2);
    CHECK(strstr(last.text, "--yarn-factor"));
    CHECK_EQ(attempt(path_of(fixtures, "gguf/llama-small-bf16.gguf"), NULL), 0);
    CHECK(!notes[0] && last_config.rope_type == ROPE_LLAMA3);
}

/* Eleven types in one model: logits of the last of 64 tokens. */
static void test_mixed(void) {
    buffer ids = {0}, logits = {0};
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    medrun_session_options o = {.context = 64, .strict = true, .kv = MEDRUN_KV_F32};
    double difference = 0, size = 0;
    read_file(path_of(fixtures, "gguf/llama-mixed_ids_64.i32"), &ids);
    read_file(path_of(fixtures, "gguf/llama-mixed_logits_64.f32"), &logits);
    CHECK_EQ(export(path_of(fixtures, "gguf/llama-mixed.gguf"), out_path, "bf16"), 0);
    if (!CHECK(!medrun_open(&m, out_path, NULL, NULL) && ids.n == 256)) return;
    size_t vocab = (size_t)m->config.vocab_size;
    CHECK(logits.n == 4 * 64 * vocab && !medrun_start(&s, m, &o, NULL, 0, NULL) &&
          !medrun_feed(s, (int32_t *)(void *)ids.data, 64, NULL));
    while (medrun_pending(s)) medrun_step(&s, 1, NULL);
    const float *found = medrun_logits(s, 0), *wanted = (float *)(void *)logits.data + 63 * vocab;
    for (size_t i = 0; i < vocab; i++) {
        double d = (double)(found[i] - wanted[i]);
        difference += d * d, size += (double)(wanted[i] * wanted[i]);
    }
    if (!CHECK(sqrt(difference / size) < 1e-5)) printf("    %g\n", sqrt(difference / size));
    medrun_stop(s);
    medrun_close(m);
    buffer_free(&ids);
    buffer_free(&logits);
}

/* ---- a small model and what may be wrong with it ------------------------------------------- */

typedef struct {
    const char *needle;         /* of the message; NULL: the file is good                      */
    const char *key, *value;    /* a key to change or, with value NULL, to leave out           */
    const char *key2, *value2;
    const char *extra, *extra_value;            /* a key to add                                */
    const char *tensor;         /* a tensor to change                                          */
    const char *name;           /* its new name; "": left out                                  */
    int64_t type;               /* its new type + 1                                            */
    uint32_t rank;              /* its new rank + 1, then dims                                 */
    uint64_t dims[5];
    uint64_t shift;             /* added to its place                                          */
    const char *more;           /* the name of a tensor to add                                 */
    bool yarn;                  /* with yarn scaling 4 from 16                                 */
} change;

static const char *const small_keys[][2] = {
    {"general.architecture", "str llama"}, {"general.name", "str A small one"},
    {"general.license", "str mit"}, {"llama.block_count", "u32 1"},
    {"llama.context_length", "u32 64"}, {"llama.embedding_length", "u32 16"},
    {"llama.feed_forward_length", "u32 16"}, {"llama.attention.head_count", "u32 1"},
    {"llama.attention.layer_norm_rms_epsilon", "f32 1e-5"}, {"llama.vocab_size", "u32 257"},
    {"llama.rope.dimension_count", "u32 16"}, {"tokenizer.ggml.model", "str gpt2"},
    {"tokenizer.ggml.pre", "str llama-bpe"}, {"tokenizer.ggml.eos_token_id", "u32 256"},
    {"tokenizer.ggml.bos_token_id", "u32 256"},
};

static const struct { const char *name; uint32_t rank; uint64_t cols, rows; } small_tensors[] = {
    {"token_embd.weight", 2, 16, 257}, {"blk.0.attn_norm.weight", 1, 16, 1},
    {"blk.0.attn_q.weight", 2, 16, 16}, {"blk.0.attn_k.weight", 2, 16, 16},
    {"blk.0.attn_v.weight", 2, 16, 16}, {"blk.0.attn_output.weight", 2, 16, 16},
    {"blk.0.ffn_norm.weight", 1, 16, 1}, {"blk.0.ffn_gate.weight", 2, 16, 16},
    {"blk.0.ffn_up.weight", 2, 16, 16}, {"blk.0.ffn_down.weight", 2, 16, 16},
    {"output_norm.weight", 1, 16, 1}, {"output.weight", 2, 16, 257},
};

/* 256 bytes and an end, no merges. */
static void put_small_vocabulary(writer *w, bool tokens) {
    put_text(&w->values, tokens ? "tokenizer.ggml.tokens" : "x.tokenizer.tokens", tokens ? 21 : 18);
    write_le(&w->values, GGUF_ARRAY, 4), write_le(&w->values, GGUF_STRING, 4);
    write_le(&w->values, 257, 8);
    for (int b = 0; b < 256; b++) {
        uint8_t text[4];
        uint32_t code = 0;
        while (byte_of(code) != b) code++;
        put_text(&w->values, (char *)text, utf8_encode(code, text));
    }
    put_text(&w->values, "<|end|>", 7);
    put_text(&w->values, "tokenizer.ggml.token_type", 25);
    write_le(&w->values, GGUF_ARRAY, 4), write_le(&w->values, GGUF_I32, 4);
    write_le(&w->values, 257, 8);
    for (int i = 0; i < 257; i++) write_le(&w->values, i == 256 ? 3 : 1, 4);
    put_key(w, "tokenizer.ggml.merges", "raw 09000000080000000000000000000000");
    w->n_values += 2;
}

static uint64_t small_rows = 257;       /* of the embedding and the output                       */

static void put_small_tensor(writer *w, size_t i, const change *c) {
    static float values[320 * 16];
    uint64_t rows = small_tensors[i].rows == 257 ? small_rows : small_tensors[i].rows;
    uint64_t dims[5] = {small_tensors[i].cols, rows, 1, 1, 1};
    const char *name = small_tensors[i].name;
    bool changed = c->tensor && !strcmp(c->tensor, name);
    uint32_t rank = changed && c->rank ? c->rank - 1 : small_tensors[i].rank;
    if (changed && c->rank) memcpy(dims, c->dims, sizeof dims);
    if (changed && c->name && !*c->name) return;
    for (size_t k = 0; k < 320 * 16; k++) values[k] = (float)((k + 7 * i) % 31) / 64 - 0.25f;
    if (changed && c->name) name = c->name;
    put_tensor(w, name, changed && c->type ? (uint32_t)(c->type - 1) : 0, rank, dims, values,
               small_tensors[i].cols * rows * 4);
    if (!changed || !c->shift) return;
    uint64_t place;
    memcpy(&place, w->infos.data + w->infos.n - 8, 8);
    place += c->shift;
    memcpy(w->infos.data + w->infos.n - 8, &place, 8);
}

/* The small model with one change. */
static size_t make_small(buffer *out, const change *c) {
    writer w = {.version = 3, .align = 32};
    for (size_t i = 0; i < sizeof small_keys / sizeof *small_keys; i++) {
        const char *key = small_keys[i][0], *value = small_keys[i][1];
        if (c->key && !strcmp(c->key, key)) value = c->value;
        if (c->key2 && !strcmp(c->key2, key)) value = c->value2;
        if (value) put_key(&w, key, value);
    }
    bool tokens = !c->key || strcmp(c->key, "tokenizer.ggml.tokens") != 0;
    put_small_vocabulary(&w, tokens);
    if (c->extra) put_key(&w, c->extra, c->extra_value);
    if (c->yarn) {
        put_key(&w, "llama.rope.scaling.type", "str yarn");
        put_key(&w, "llama.rope.scaling.factor", "f32 4");
        put_key(&w, "llama.rope.scaling.original_context_length", "u32 16");
    }
    for (size_t i = 0; i < sizeof small_tensors / sizeof *small_tensors; i++)
        put_small_tensor(&w, i, c);
    if (c->more) put_tensor(&w, c->more, 0, 1, (uint64_t[]){16}, (float[16]){1}, 64);
    finish(&w, out);
    return (size_t)w.data_at;
}

#define TENSOR "blk.0.attn_q.weight"
static const change changes[] = {
    {0},
    {"general.architecture: found nothing", .key = "general.architecture"},
    {"found \"gpt2\"", .key = "general.architecture", .value = "str gpt2"},
    {"found 7, wanted a string", .key = "general.architecture", .value = "u32 7"},
    {"found a LoRA adapter", .extra = "general.type", .extra_value = "str adapter"},
    {NULL, .extra = "general.type", .extra_value = "str model"},
    /* sizes */
    {"llama.block_count: found nothing", .key = "llama.block_count"},
    {"found 0, wanted a whole number from 1", .key = "llama.block_count", .value = "u32 0"},
    {"found -1", .key = "llama.block_count", .value = "i32 -1"},
    {"found -1", .key = "llama.block_count", .value = "i64 -1"},
    {"found 1, wanted a whole", .key = "llama.block_count", .value = "f32 1"},
    {"found 1, wanted a whole", .key = "llama.block_count", .value = "bool 1"},
    {"found \"1\"", .key = "llama.block_count", .value = "str 1"},
    {"found 1.84467441e+19", .key = "llama.block_count", .value = "u64 18446744073709551615"},
    {"tensor blk.1.attn_norm.weight: found nothing", .key = "llama.block_count", .value = "u32 2"},
    {NULL, .key = "llama.block_count", .value = "u8 1"},
    {NULL, .key = "llama.block_count", .value = "i16 1"},
    {NULL, .key = "llama.attention.head_count", .value = "arr u32 1 1 1"},
    {"the same in all layers", .key = "llama.attention.head_count", .value = "arr u32 1 2"},
    {"found an array of 0", .key = "llama.attention.head_count", .value = "arr u32"},
    {"wanted the same whole number", .key = "llama.attention.head_count", .value = "u32 3"},
    {"a divisor of", .extra = "llama.attention.head_count_kv", .extra_value = "u32 2"},
    {"multiples of 16", .key = "llama.feed_forward_length", .value = "u32 24"},
    {"as the metadata says", .key = "llama.feed_forward_length", .value = "u32 32"},
    {"heads of key_length 32", .extra = "llama.attention.key_length", .extra_value = "u32 32"},
    {"value_length 32", .extra = "llama.attention.value_length", .extra_value = "u32 32"},
    {"rope.dimension_count 8", .key = "llama.rope.dimension_count", .value = "u32 8"},
    {"epsilon: found nothing", .key = "llama.attention.layer_norm_rms_epsilon"},
    {"epsilon: found 0", .key = "llama.attention.layer_norm_rms_epsilon", .value = "f32 0"},
    {"epsilon: found nan", .key = "llama.attention.layer_norm_rms_epsilon", .value = "f32 nan"},
    {NULL, .key = "llama.vocab_size", .value = "u32 9"},
    /* positions */
    {"found 0, wanted", .extra = "llama.rope.freq_base", .extra_value = "f32 0"},
    {"found inf", .extra = "llama.rope.freq_base", .extra_value = "f64 inf"},
    {"found \"longrope\"", .extra = "llama.rope.scaling.type", .extra_value = "str longrope"},
    {"\"linear\" with factor 2", .extra = "llama.rope.scaling.factor", .extra_value = "f32 2"},
    {"\"linear\" with factor 2", .extra = "llama.rope.scale_linear", .extra_value = "f32 2"},
    {NULL, .extra = "llama.rope.scale_linear", .extra_value = "f32 1"},
    {NULL, .extra = "llama.rope.scaling.type", .extra_value = "str linear"},
    {NULL, .extra = "llama.rope.scaling.type", .extra_value = "str none"},
    {"factor: found 0", .extra = "llama.rope.scaling.type", .extra_value = "str yarn"},
    {"rope.new", .extra = "llama.rope.new", .extra_value = "f32 1"},
    /* what this medrun does not compute with */
    {"expert_count", .extra = "llama.expert_count", .extra_value = "u32 8"},
    {NULL, .extra = "llama.expert_count", .extra_value = "u32 0"},
    {"logit_scale", .extra = "llama.logit_scale", .extra_value = "f32 2"},
    {"found \"x\"", .extra = "llama.pooling", .extra_value = "str x"},
    {NULL, .extra = "llama.tensor_data_layout", .extra_value = "str Meta AI original pth"},
    {NULL, .extra = "llamas.block_count", .extra_value = "u32 3"},
    {"found file 1 of 3 of one model", .extra = "split.count", .extra_value = "u16 3"},
    /* tokenizer */
    {"tokenizer.ggml.tokens: found nothing", .key = "tokenizer.ggml.tokens"},
    {"bert", .key = "tokenizer.ggml.model", .value = "str bert"},
    {"falcon\", wanted llama-bpe", .key = "tokenizer.ggml.pre", .value = "str falcon"},
    {"--pre llama-bpe: Llama 3", .key = "tokenizer.ggml.pre"},
    {"found \"default\"", .key = "tokenizer.ggml.pre", .value = "str default"},
    {NULL, .key = "tokenizer.ggml.pre", .value = "str llama3"},
    {NULL, .key = "tokenizer.ggml.pre", .value = "str llama-v3"},
    {NULL, .key = "tokenizer.ggml.pre", .value = "str smaug-bpe"},
    {"found 257", .key = "tokenizer.ggml.bos_token_id", .value = "u32 257"},
    {"found -2", .key = "tokenizer.ggml.eos_token_id", .value = "i32 -2"},
    {"eot_token_id: found 257", .extra = "tokenizer.ggml.eot_token_id", .extra_value = "u32 257"},
    {"true or false", .extra = "tokenizer.ggml.add_bos_token", .extra_value = "u32 1"},
    {"add_eos_token", .extra = "tokenizer.ggml.add_eos_token", .extra_value = "bool 1"},
    {NULL, .extra = "tokenizer.ggml.add_eos_token", .extra_value = "bool 0"},
    {"chat_template", .extra = "tokenizer.chat_template", .extra_value = "u32 1"},
    {"scores", .extra = "tokenizer.ggml.scores", .extra_value = "arr f32 1 2"},
    /* values of all types, and of none */
    {NULL, .extra = "x", .extra_value = "u8 255"}, {NULL, .extra = "x", .extra_value = "i8 -1"},
    {NULL, .extra = "x", .extra_value = "u16 1"}, {NULL, .extra = "x", .extra_value = "i16 -1"},
    {NULL, .extra = "x", .extra_value = "f64 1e300"}, {NULL, .extra = "x", .extra_value = "i64 -9"},
    {NULL, .extra = "x", .extra_value = "str a b c"}, {NULL, .extra = "x", .extra_value = "bool 1"},
    {NULL, .extra = "x", .extra_value = "arr f64 1 2"},
    {NULL, .extra = "x", .extra_value = "raw 080000000000000000000000"},
    {"found type 13", .extra = "x", .extra_value = "raw 0D00000000000000"},
    {"found type 9 in an array", .extra = "x", .extra_value =
     "raw 0900000009000000010000000000000000000000000000000000000000000000"},
    {"found type 77 in an array", .extra = "x", .extra_value = "raw 090000004D000000"
     "0100000000000000"},
    {"end of the file", .extra = "x", .extra_value = "raw 0900000004000000FFFFFFFFFFFFFFFF"},
    {"end of the file", .extra = "x", .extra_value = "raw 0900000008000000FFFFFFFFFFFFFFFF"},
    {"end of the file", .extra = "x", .extra_value = "raw 090000000400000000000000000000C0"},
    {"end of the file", .extra = "x", .extra_value = "raw 08000000FFFFFFFFFFFFFFFF"},
    {"found twice", .extra = "llama.block_count", .extra_value = "u32 1"},
    {"wanted 1 to 65535 of ASCII", .extra = "", .extra_value = "u32 1"},
    {"wanted 1 to 65535 of ASCII", .extra = "x\xff", .extra_value = "u32 1"},
    {"wanted 1 to 65535 of ASCII", .extra = "x\n", .extra_value = "u32 1"},
    {"a power of two", .extra = "general.alignment", .extra_value = "u32 0"},
    {"a power of two", .extra = "general.alignment", .extra_value = "u32 24"},
    {"a power of two", .extra = "general.alignment", .extra_value = "u32 4294967295"},
    {"a power of two", .extra = "general.alignment", .extra_value = "u64 32"},
    {"a power of two", .extra = "general.alignment", .extra_value = "str 32"},
    {"multiple of 128", .extra = "general.alignment", .extra_value = "u32 128"},
    {"multiple of 2147483648", .extra = "general.alignment", .extra_value = "u32 2147483648"},
    /* tensors */
    {"type 10, Q2_K, which", .tensor = TENSOR, .type = 11},
    {"type 23, IQ4_XS, which", .tensor = TENSOR, .type = 24},
    {"type 31, Q4_0_4_4, which", .tensor = TENSOR, .type = 32},
    {"type 26, I32, which", .tensor = TENSOR, .type = 27},
    {"type 99, unknown, which", .tensor = TENSOR, .type = 100},
    {"rows of whole blocks", .tensor = TENSOR, .type = 9},
    {"found 5 dimensions", .tensor = TENSOR, .rank = 6, .dims = {1, 1, 1, 1, 1}},
    {"shape: found (256), wanted (16, 16)", .tensor = TENSOR, .rank = 2, .dims = {256}},
    {"of rank 3", .tensor = TENSOR, .rank = 4, .dims = {16, 16, 1}},
    {"of rank 4", .tensor = TENSOR, .rank = 5, .dims = {16, 16, 1, 1}},
    {"shape: found (8, 32), wanted (16, 16)", .tensor = TENSOR, .rank = 3, .dims = {32, 8}},
    {"neither overlap nor leave", .tensor = TENSOR, .rank = 3, .dims = {16, 17}},
    {"neither overlap nor leave", .tensor = TENSOR, .rank = 1},
    {"a size a file can have", .tensor = TENSOR, .rank = 3, .dims = {16, 0}},
    {"a size a file can have", .tensor = TENSOR, .rank = 4, .dims = {1u << 31, 1u << 31, 8}},
    {"a size a file can have", .tensor = TENSOR, .rank = 5,
     .dims = {1ull << 33, 1ull << 33, 1, 1}},
    {"a size a file can have", .tensor = TENSOR, .rank = 3, .dims = {16, 1ull << 60}},
    {"wanted them all", .tensor = "output.weight", .rank = 3, .dims = {16, 1ull << 50}},
    {"multiple of 32", .tensor = TENSOR, .shift = 4},
    {"neither overlap nor leave", .tensor = TENSOR, .shift = 32},
    {"neither overlap nor leave", .tensor = TENSOR, .shift = (uint64_t)-32},
    {"neither overlap nor leave", .tensor = "output.weight", .shift = 1ull << 62},
    {"a size a file can have", .tensor = "token_embd.weight", .shift = (uint64_t)-1024},
    {"found in model.gguf and in", .tensor = TENSOR, .name = "blk.0.attn_k.weight"},
    {"blk.0.attn_q.weight: found nothing", .tensor = TENSOR, .name = "blk.0.attn_q.bias"},
    {"found nothing", .tensor = TENSOR, .name = "model.layers.0.self_attn.q_proj.weight"},
    {"token_embd.weight: found nothing", .tensor = "token_embd.weight", .name = "embd"},
    {"a name of 65 bytes", .tensor = TENSOR, .name =
     "12345678901234567890123456789012345678901234567890123456789012345"},
    {"wanted 1 to 64 of ASCII", .tensor = TENSOR, .name = "\x1b[31m"},
    {"attn_q.bias: found a tensor that this", .more = "blk.0.attn_q.bias"},
    {"rope_factors_long.weight: found a tensor that", .more = "rope_factors_long.weight"},
    {"found a table of 16 F32, wanted 8", .more = "rope_freqs.weight"},
    {NULL, .tensor = "output.weight", .name = ""},
};

/* What llama.cpp's converter fills up with has no text, whatever type it has there. */
static void test_filler(void) {
    span tokens[260];
    uint8_t text[256][4];
    int32_t types[260];
    source_tokenizer t = {0};
    medrun_error e = {0};
    static const char *const more[] = {"<|end|>", "[PAD257]", "[PAD9]", "[PAD259]"};
    for (int b = 0; b < 256; b++) {
        uint32_t code = 0;
        while (byte_of(code) != b) code++;
        tokens[b] = (span){text[b], utf8_encode(code, text[b])};
        types[b] = PIECE_NORMAL;
    }
    for (size_t i = 0; i < 4; i++) {
        tokens[256 + i] = (span){(const uint8_t *)more[i], strlen(more[i])};
        types[256 + i] = i ? PIECE_USER : PIECE_CONTROL;
    }
    types[259] = PIECE_UNUSED;
    token_tables g = {.model = "gpt2", .pre = "llama-bpe", .n = 260, .tokens = tokens,
                      .types = types, .merges = tokens, .bos = 256, .eos = 256};
    CHECK(!tokenizer_from_tables(&t, &g, "tables", &e) && t.n_pieces == 260);
    CHECK(t.pieces[256].type == PIECE_CONTROL && t.pieces[257].type == PIECE_UNUSED &&
          !t.pieces[257].n && t.pieces[258].type == PIECE_USER &&
          t.pieces[259].type == PIECE_UNUSED);
    free_tokenizer(&t);
}

/* A word that was added though it is a piece is cut out before anything merges. */
static void test_added_word(void) {
    span tokens[258], merges[] = {{(const uint8_t *)"h e", 3}, {(const uint8_t *)"he h", 4},
                                  {(const uint8_t *)"a b", 3}};
    uint8_t text[256][4];
    int32_t types[258];
    source_tokenizer t = {0};
    medrun_error e = {0};
    for (int b = 0; b < 256; b++) {
        uint32_t code = 0;
        while (byte_of(code) != b) code++;
        tokens[b] = (span){text[b], utf8_encode(code, text[b])};
        types[b] = PIECE_NORMAL;
    }
    tokens[256] = (span){(const uint8_t *)"he", 2}, types[256] = PIECE_USER;
    tokens[257] = (span){(const uint8_t *)"ab", 2}, types[257] = PIECE_NORMAL;
    token_tables g = {.model = "gpt2", .pre = "llama-bpe", .n = 258, .tokens = tokens, .n_merges = 3,
                      .types = types, .merges = merges, .bos = -1, .eos = -1};
    CHECK(!tokenizer_from_tables(&t, &g, "tables", &e) && t.n_merges == 1 && t.merges.n == 8);
    CHECK(t.merges.n == 8 && u32_at(t.merges.data, 0) == 'a' && u32_at(t.merges.data, 1) == 'b');
    free_tokenizer(&t);
}

/* Rows behind the last token, if they are not many, have no text. */
static void test_more_rows(void) {
    static char name[] = "token_embd.weight";
    source_tensor embedding = {.name = name, .rank = 2, .shape = {320, 16}};
    source s = {.tensors = &embedding, .n_tensors = 1};
    buffer b = {0};
    CHECK_EQ(count_rows(&s, 257), 320);
    CHECK_EQ(count_rows(&s, 320), 320);
    CHECK_EQ(count_rows(&s, 400), 400);
    embedding.shape[0] = 257 + 1025;
    CHECK_EQ(count_rows(&s, 257), 257);
    small_rows = 320;
    make_small(&b, &(change){0});
    small_rows = 257;
    if (!CHECK_EQ(attempt_bytes(&b), 0)) printf("    %s\n", last.text);
    buffer_free(&b);
}

/* A vocabulary tells the pattern only if it is Llama 3's; --pre does in any case. */
static void test_pre(void) {
    static span tokens[128010];
    table_store m = {.model = "gpt2", .tokens = tokens};
    token_tables t = {.n = 128010};
    source s = {0};
    export_options o = {.template_name = "none", .pre = "llama3"};
    buffer b = {0};
    for (size_t i = 0; i < 128010; i++) tokens[i] = (span){(const uint8_t *)"x", 1};
    tokens[128000] = (span){(const uint8_t *)"<|begin_of_text|>", 17};
    tokens[128001] = (span){(const uint8_t *)"<|end_of_text|>", 15};
    CHECK(!choose_pattern(&s, &m, &t, &last) && !m.pre[0]);
    tokens[128009] = (span){(const uint8_t *)"<|eot_id|>", 10};
    CHECK(!choose_pattern(&s, &m, &t, &last) && !strcmp(m.pre, "llama-bpe") && t.add_bos);
    CHECK(s.notes.n > 0);
    snprintf(m.pre, sizeof m.pre, "falcon");
    CHECK(!choose_pattern(&s, &m, &t, &last) && !strcmp(m.pre, "falcon"));
    s.pre = "smollm";
    CHECK(!choose_pattern(&s, &m, &t, &last) && !strcmp(m.pre, "smollm") && !t.add_bos);
    buffer_free(&s.notes);
    CHECK(find_pattern("llama3")->ignore_merges && !find_pattern("smaug-bpe")->ignore_merges);
    make_small(&b, &(change){.key = "tokenizer.ggml.pre", .value = "str falcon"});
    write_file(model_path, b.data, b.n);
    CHECK_EQ(attempt(model_path, &o), 0);
    o.pre = "gpt-2";
    CHECK(attempt(model_path, &o) == 2 && strstr(last.text, "smaug-bpe"));
    buffer_free(&b);
}

static void test_changes(void) {
    buffer b = {0};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        const change *c = &changes[i];
        make_small(&b, c);
        int code = attempt_bytes(&b);
        if (!CHECK(code == (c->needle ? 3 : 0) && (!c->needle || strstr(last.text, c->needle))))
            printf("    change %zu, wanted \"%s\": code %d: %s\n", i, c->needle ? c->needle : "",
                   code, last.text);
    }
    writer w = {.version = 3, .align = 32};             /* a later part has no other keys        */
    put_key(&w, "split.no", "u16 1"), put_key(&w, "split.count", "u16 3");
    put_tensor(&w, "blk.9.attn_norm.weight", 0, 1, (uint64_t[]){16}, (float[16]){1}, 64);
    b.n = 0;
    finish(&w, &b);
    CHECK(attempt_bytes(&b) == 3 && strstr(last.text, "found file 2 of 3 of one model") &&
          strstr(last.text, "-00001-of- in its name"));
    make_small(&b, &(change){0});
    CHECK_EQ(attempt_bytes(&b), 0);
    CHECK(!strcmp(answer, "A small one|F32 (9 tensors)|mit") && !notes[0] && !last_config.tied);
    make_small(&b, &(change){.tensor = "output.weight", .name = "", .key = "general.license",
                             .value = "str other", .key2 = "general.name",
                             .extra = "general.license.name", .extra_value = "str its own"});
    CHECK_EQ(attempt_bytes(&b), 0);
    CHECK(!strcmp(answer, "model|F32 (8 tensors)|its own") && last_config.tied);
    buffer_free(&b);
}

/* The counts and the version, which stand at the beginning. */
static void test_header(void) {
    static const struct { size_t at, bytes; uint64_t value; const char *needle; } cases[] = {
        {4, 4, 2, NULL}, {4, 4, 0, "version 0"}, {4, 4, 1, "version 1"}, {4, 4, 4, "version 4"},
        {4, 4, 0x03000000, "big-endian"}, {8, 8, 1000000, "1000000 tensors"},
        {8, 8, UINT64_MAX, "wanted at most"}, {8, 8, 1ull << 63, "wanted at most"},
        {16, 8, 1000000, "1000000 keys"}, {16, 8, UINT64_MAX, "wanted at most"},
        {16, 8, 17, NULL}, {16, 8, 19, NULL}, {8, 8, 13, NULL}, {8, 8, 0, "found no tensors"}};
    buffer b = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        make_small(&b, &(change){0});
        memcpy(b.data + cases[i].at, &cases[i].value, cases[i].bytes);
        int code = attempt_bytes(&b);
        bool good = cases[i].needle ? code == 3 && strstr(last.text, cases[i].needle) :
                    cases[i].at == 4 ? code == 0 : code == 3;
        if (!CHECK(good)) printf("    %zu: code %d: %s\n", i, code, last.text);
    }
    write_file(model_path, "GGUF", 4);
    CHECK(is_gguf(model_path) && attempt(model_path, NULL) == 3);
    write_file(model_path, "GGU", 3);
    CHECK(!is_gguf(model_path) && !is_gguf(work) && !is_gguf("/dev/null") && !is_gguf("/no"));
    buffer_free(&b);
}

/* Bytes after the data are no matter; fewer are. Every cut is one clear line. */
static void test_cuts(void) {
    buffer b = {0};
    size_t wrong = 0, data = make_small(&b, &(change){0});
    for (size_t n = 0; n < b.n; n += n >= data + 64 ? 997 : test_all() ? 1 : 5) {
        write_file(model_path, b.data, n);
        int code = attempt(model_path, NULL);
        wrong += code != 3 || !last.text[0];
    }
    CHECK_EQ(wrong, 0);
    buffer_add(&b, "and more", 8);
    CHECK_EQ(attempt_bytes(&b), 0);
    buffer_free(&b);
}

/* Every byte of the header flipped, each in another bit: refused or accepted, in bounds. */
static void test_flips(void) {
    buffer b = {0};
    size_t wrong = 0, accepted = 0, step = test_all() ? 1 : 5, data = make_small(&b, &(change){0});
    write_file(model_path, b.data, b.n);
    FILE *f = fopen(model_path, "r+b");
    must(f != NULL, model_path);
    for (size_t i = 0; i < data; i += step) {
        uint8_t byte = (uint8_t)(b.data[i] ^ (1u << test_random() % 8));
        fseek(f, (long)i, SEEK_SET);
        fwrite(&byte, 1, 1, f);
        fflush(f);
        int code = attempt(model_path, NULL);
        wrong += code != last.code || (code && code != 3) || (code && !last.text[0]);
        accepted += !code;
        fseek(f, (long)i, SEEK_SET);
        fwrite(b.data + i, 1, 1, f);
    }
    CHECK_EQ(wrong, 0);
    CHECK(accepted > 0 && accepted < data / step / 2);
    fclose(f);
    buffer_free(&b);
}

/* Values that are not finite are found when they are read, with the row. */
static void test_bad_weights(void) {
    buffer b = {0}, said = {0};
    make_small(&b, &(change){0});
    float infinite = INFINITY;
    memcpy(b.data + b.n - 4 * 16, &infinite, 4);        /* output.weight, row 256                */
    write_file(model_path, b.data, b.n);
    CHECK_EQ(export(model_path, out_path, "int8"), 3);
    read_file(path_of(work, "stderr"), &said);
    CHECK(said.n && strstr((char *)said.data, "output.weight: rows 256 to 256") &&
          strstr((char *)said.data, "/model.gguf:"));
    buffer_free(&b);
    buffer_free(&said);
}

/* ---- positions ----------------------------------------------------------------------------- */

/* A model of one layer with a table for dimension 128, as the converter computes it. */
static int attempt_table(double theta, double original, double spoil) {
    writer w = {.version = 3, .align = 32};
    buffer b = {0};
    model_config c = {.head_dim = 128, .rope_theta = theta, .rope_type = ROPE_LLAMA3,
                      .rope_factor = 8, .rope_low = 1, .rope_high = 4, .rope_original = original};
    static const struct { const char *name; uint64_t cols, rows; } tensors[] = {
        {"token_embd", 128, 257}, {"blk.0.attn_q", 128, 128}, {"blk.0.attn_k", 128, 128},
        {"blk.0.attn_v", 128, 128}, {"blk.0.attn_output", 128, 128}, {"blk.0.ffn_gate", 128, 16},
        {"blk.0.ffn_up", 128, 16}, {"blk.0.ffn_down", 16, 128}, {"blk.0.attn_norm", 128, 0},
        {"blk.0.ffn_norm", 128, 0}, {"output_norm", 128, 0}};
    float *zeros = new_array(257 * 128, 4);
    for (size_t i = 0; i < sizeof small_keys / sizeof *small_keys; i++)
        put_key(&w, small_keys[i][0], strstr(small_keys[i][0], "embedding_length") ? "u32 128" :
                strstr(small_keys[i][0], "dimension_count") ? "u32 128" : small_keys[i][1]);
    put_keyf(&w, "llama.rope.freq_base", "f32 %.9g", theta);
    if (!differ(original, 777))
        put_key(&w, "llama.rope.scaling.original_context_length", "u32 777");
    put_small_vocabulary(&w, true);
    put_divisors(&w, &c);
    float *table = (float *)(void *)w.data.data;
    table[40] *= (float)spoil;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        char name[64];
        uint64_t dims[2] = {tensors[i].cols, tensors[i].rows};
        snprintf(name, sizeof name, "%s.weight", tensors[i].name);
        put_tensor(&w, name, 0, dims[1] ? 2 : 1, dims, zeros,
                   (size_t)(dims[0] * (dims[1] ? dims[1] : 1)) * 4);
    }
    finish(&w, &b);
    int code = attempt_bytes(&b);
    free(zeros);
    buffer_free(&b);
    return code;
}

static void test_rope_tables(void) {
    static const double cases[][2] = {{500000, 8192}, {1.2e7, 8192}, {500000, 4096}, {1e6, 131072},
                                      {500000, 777}, {10000, 1024}};
    const model_config *c = &last_config;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_EQ(attempt_table(cases[i][0], cases[i][1], 1), 0);
        if (!CHECK(c->rope_type == ROPE_LLAMA3 && !differ(c->rope_factor, 8) && !notes[0] &&
                   !differ(c->rope_original, cases[i][1]) && !differ(c->rope_low, 1) &&
                   !differ(c->rope_high, 4)))
            printf("    theta %g, original %g\n", cases[i][0], cases[i][1]);
    }
    CHECK_EQ(attempt_table(500000, 8192, 0.999), 0);
    CHECK(c->rope_type == ROPE_DIVISORS && strstr(notes, "is used as it stands"));
    CHECK(c->rope_divisors[0] > 0.999f && c->rope_divisors[40] < 7.993f &&
          c->rope_divisors[63] > 7.999f);
    CHECK_EQ(attempt_table(500000, 5000, 1), 0);
    CHECK(c->rope_type == ROPE_DIVISORS);
    CHECK(attempt_table(500000, 8192, -1) == 3 && strstr(last.text, "wanted 1e-6 to 1e6"));
    CHECK(attempt_table(500000, 8192, NAN) == 3);
}

/* Puts VALUE AT bytes after KEY. */
static void spoil(buffer *b, const char *key, size_t at, uint32_t value) {
    uint8_t *p = memmem(b->data, b->n, key, strlen(key));
    must(p != NULL, key);
    memcpy(p + strlen(key) + at, &value, 4);
}

/* GGUF does not say that a model has a window; who knows it may. */
static void test_window(void) {
    buffer b = {0};
    make_small(&b, &(change){.extra = "llama.attention.sliding_window", .extra_value = "u32 20"});
    CHECK(!attempt_bytes(&b) && last_config.sliding_window == 20 && !notes[0]);
    export_options o = {.window = "7", .template_name = "none"};
    CHECK(!attempt(model_path, &o) && last_config.sliding_window == 7);
    o.window = "0";
    CHECK(!attempt(model_path, &o) && last_config.sliding_window == 0);
    o.window = "-1";
    CHECK(attempt(model_path, &o) == 2 && strstr(last.text, "--sliding-window"));
    make_small(&b, &(change){.key = "llama.context_length", .value = "u32 32768"});
    CHECK(!attempt_bytes(&b) && !notes[0]);             /* not with this kind of tokenizer       */
    read_file(path_of(fixtures, "gguf/mistral-spm-bf16.gguf"), &b);
    o.window = NULL;
    spoil(&b, "llama.context_length", 4, 32768);
    spoil(&b, "llama.rope.freq_base", 4, float_bits(10000));
    write_file(model_path, b.data, b.n);
    CHECK(!attempt(model_path, &o) && strstr(notes, "--sliding-window 4096") &&
          !last_config.sliding_window);
    o.window = "4096";
    CHECK(!attempt(model_path, &o) && !notes[0] && last_config.sliding_window == 4096);
    buffer_free(&b);
}

/* The template of the metadata is recognised like a folder's, the card's sampling comes with it. */
static void test_template(void) {
    static const char llama3[] = "str {% set loop_messages = messages %}{% for message in "
        "loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}"
        "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    static const char named[] = "str {{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    const export_options o = {0};
    buffer b = {0};
    make_small(&b, &(change){.extra = "tokenizer.chat_template", .extra_value = llama3});
    write_file(model_path, b.data, b.n);
    attempt(model_path, &o);                            /* its tokenizer has no control tokens   */
    CHECK(last_chat && !strcmp(last_chat->name, "llama3") && strstr(last.text, "begin_of_text"));
    CHECK(strstr(notes, "temperature 0.4, top_k 150"));
    make_small(&b, &(change){.extra = "tokenizer.chat_template", .extra_value = named});
    write_file(model_path, b.data, b.n);                /* its bos_token is what the file has    */
    attempt(model_path, &o);
    CHECK(last_chat && !strcmp(last_chat->name, "llama3") && strstr(last.text, "start_header_id"));
    make_small(&b, &(change){.extra = "tokenizer.chat_template", .extra_value = "str {{ x }}"});
    write_file(model_path, b.data, b.n);
    CHECK(!attempt(model_path, &o) && !last_chat && strstr(notes, "--template"));
    make_small(&b, &(change){0});
    write_file(model_path, b.data, b.n);
    CHECK(!attempt(model_path, &o) && last_chat == chat_find("none") && notes[0]);
    buffer_free(&b);
}

static void test_yarn(void) {
    static const char *const keys[][2] = {
        {"llama.rope.scaling.yarn_ext_factor", "f32 0.5"}, {"llama.rope.scaling.attn_factor",
         "f32 2"}, {"llama.rope.scaling.yarn_log_multiplier", "f32 0.1"},
        {"llama.rope.scaling.yarn_attn_factor", "f32 1.25"}, {"x", "u32 1"}};
    const model_config *c = &last_config;
    buffer b = {0};
    for (size_t i = 0; i < 5; i++) {
        make_small(&b, &(change){.extra = keys[i][0], .extra_value = keys[i][1], .yarn = true});
        int code = attempt_bytes(&b);
        if (i < 3) CHECK(code == 3 && strstr(last.text, keys[i][0]));
        else CHECK(code == 0 && c->rope_type == ROPE_YARN && c->rope_truncate &&
                   !differ(c->rope_factor, 4) && !differ(c->rope_original, 16) &&
                   !differ(c->rope_beta_fast, 32) && !differ(c->rope_beta_slow, 1));
        if (i == 3) CHECK(!differ(c->rope_attention, 1.25) && strstr(notes, "factor 1.25 is used"));
        if (i == 4) CHECK(fabs(c->rope_attention - 1.138629436) < 1e-9 && !notes[0]);
    }
    buffer_free(&b);
}

/* Keys that only Apertus has, spoilt in the fixture. */
static void test_xielu(void) {
    static const char *const names[] = {"xielu.alpha_p", "xielu.alpha_n", "xielu.beta",
                                        "xielu.eps"};
    buffer b = {0};
    read_file(path_of(fixtures, "gguf/apertus-plain-bf16.gguf"), &b);
    for (size_t i = 0; i < 4; i++) {
        uint8_t *end = memmem(b.data, b.n, names[i], strlen(names[i]));
        must(end != NULL, names[i]);
        end += strlen(names[i]) - 1;
        *end ^= 1;                                      /* another key                           */
        write_file(model_path, b.data, b.n);
        CHECK(attempt(model_path, NULL) == 3 && strstr(last.text, names[i]));
        *end ^= 1;
        spoil(&b, names[i], 4, GGUF_I32);               /* of the right size, but no f32         */
        write_file(model_path, b.data, b.n);
        CHECK(attempt(model_path, NULL) == 3 && strstr(last.text, "an f32 for each layer"));
        spoil(&b, names[i], 4, GGUF_F32);
    }
    CHECK_EQ(attempt_bytes(&b), 0);
    buffer_free(&b);
}

/* The template is recognised as in a folder; eos, eot and eom end an answer. */
static void test_chat(void) {
    buffer b = {0};
    const export_options none = {0};
    CHECK_EQ(attempt(path_of(fixtures, "gguf/llama-small-bf16.gguf"), &none), 0);
    CHECK(strstr(notes, "with template llama3") && last_stops[0] == 271);
    make_small(&b, &(change){.extra = "tokenizer.ggml.eot_token_id", .extra_value = "u32 7"});
    CHECK(!attempt_bytes(&b) && last_stops[0] == 256 && last_stops[1] == 7 && !last_stops[2]);
    CHECK(!attempt(model_path, &none) && strstr(notes, "there is no chat template"));
    make_small(&b, &(change){.extra = "tokenizer.chat_template", .extra_value = "str {{ x }}"});
    CHECK(!attempt_bytes(&b) && !attempt(model_path, &none) && strstr(notes, "none that medrun"));
    buffer_free(&b);
}

/* ---- real files, and no memory ------------------------------------------------------------- */

static int tokenizer_of(const char *path, buffer *out) {
    source s = {0};
    last = (medrun_error){0};
    out->n = 0;
    if (!open_gguf_tokenizer(&s, path, &last)) buffer_add(out, s.tokenizer.data, s.tokenizer.n);
    close_source(&s);
    return last.code;
}

/* What llama.cpp takes for granted with a pre-tokenizer: merges are ignored for whole pieces, and a
 * BOS comes first, or not. */
static void test_pretokenizers(void) {
    static const struct { change c; const char *name; bool ignore_merges, add_bos; } cases[] = {
        {{.key = "x"}, "llama3", true, true},
        {{.key = "tokenizer.ggml.pre", .value = "str tekken"}, "tekken", true, true},
        {{.key = "tokenizer.ggml.pre", .value = "str smollm"}, "smollm", false, false},
        {{.key = "tokenizer.ggml.pre", .value = "str smollm",
          .extra = "tokenizer.ggml.add_bos_token", .extra_value = "bool 1"}, "smollm", false, true},
    };
    buffer b = {0}, bin = {0};
    tokenizer t;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        make_small(&b, &cases[i].c);
        write_file(model_path, b.data, b.n);
        if (!CHECK(!tokenizer_of(model_path, &bin)) ||
            !CHECK(!tokenizer_open(&t, bin.data, bin.n, "t.bin", NULL))) continue;
        CHECK(!strcmp(t.pretokenizer->name, cases[i].name));
        CHECK(!(t.flags & TOKENIZER_IGNORE_MERGES) == !cases[i].ignore_merges &&
              t.add_bos == cases[i].add_bos);
        tokenizer_close(&t);
    }
    make_small(&b, &(change){.key = "tokenizer.ggml.pre", .value = "str falcon"});
    write_file(model_path, b.data, b.n);
    CHECK(tokenizer_of(model_path, &bin) == 3 && strstr(last.text, "or smollm"));
    buffer_free(&b), buffer_free(&bin);
}

/* The ids that llama.cpp's own tests want of vocabulary NAME. */
static void test_llamacpp_ids(const char *data, const char *name, const buffer *bin) {
    json_file f = {0};
    tokenizer t;
    size_t n = 0, wrong = 0;
    char path[400];
    snprintf(path, sizeof path, "%s/vectors/llamacpp_inp_out.json", data);
    must(!map_file(path, &f.map, &last) &&
         !json_parse(&f.j, (const char *)f.map.data, f.map.n, &last), path);
    if (!CHECK(!tokenizer_open(&t, bin->data, bin->n, name, &last))) return;
    const json *j = &f.j;
    for EACH(j, 0, v) {
        if (!json_is(j, json_get(j, v, "vocab"), name)) continue;
        for EACH(j, json_get(j, v, "rows"), c) {
            buffer text = {0}, ids = {0};
            uint32_t list = json_get(j, c, "ids");
            size_t i = 0;
            json_unescape(j, json_get(j, c, "text"), &text);
            tokenizer_encode(&t, (char *)text.data, text.n, 0, &ids, &last);
            bool same = ids.n / 4 == children(j, list);
            for EACH(j, list, id) {
                if (!same) break;
                int32_t found;
                memcpy(&found, ids.data + 4 * i++, 4);
                same = found == (int32_t)json_number(j, id);
            }
            n++, wrong += !same;
            buffer_free(&text);
            buffer_free(&ids);
        }
    }
    CHECK_EQ(n, 47);
    CHECK_EQ(wrong, 0);
    tokenizer_close(&t);
    close_json(&f);
}

/* Vocabularies as people have them, if the environment names them: the same bytes as from the
 * Hugging Face form. And files that are broken on purpose. */
static void test_real(void) {
    static const struct { const char *file, *like, *ids; } good[] = {
        {"ggml-vocab-llama-bpe.gguf", "llama3-8b/tokenizer.json", "llama-bpe"},
        {"apertus-vocab.derived.gguf", "apertus.derived.tokenizer.json", NULL},
        {"mistral-v1-vocab.derived.gguf", NULL, NULL},
        {"ggml-vocab-llama-spm.gguf", NULL, "llama-spm"}};
    const char *data = getenv("MEDRUN_TEST_DATA");
    char folder[300];
    buffer a = {0}, b = {0};
    json_file f = {0};
    if (!data) { SKIP("real vocabularies, malformed GGUF: MEDRUN_TEST_DATA is not set"); return; }
    snprintf(folder, sizeof folder, "%s/tokenizers", data);
    for (size_t i = 0; i < 4; i++) {
        if (!CHECK(!tokenizer_of(path_of(folder, good[i].file), &a)))
            printf("    %s\n", last.text);
        if (good[i].ids) test_llamacpp_ids(data, good[i].ids, &a);
        if (!good[i].like) continue;
        source_tokenizer t = {0};
        medrun_error e = {0};
        snprintf(t.file.path, sizeof t.file.path, "%s", path_of(folder, good[i].like));
        b.n = 0;
        CHECK(!json_parse(&t.config.j, "{}", 2, &e) && !open_json_path(&t.file, &e) &&
              !convert_tokenizer(&t, &b, &e));
        if (!CHECK(a.n == b.n && a.n && !memcmp(a.data, b.data, a.n)))
            printf("    %s\n", good[i].file);
        free_tokenizer(&t);
    }
    CHECK(tokenizer_of(path_of(folder, "ggml-vocab-gpt-2.gguf"), &a) == 3 &&
          strstr(last.text, "gpt-2"));
    CHECK(tokenizer_of(path_of(folder, "ggml-vocab-falcon.gguf"), &a) == 3 &&
          strstr(last.text, "falcon"));
    CHECK(attempt(path_of(folder, "ggml-vocab-llama-bpe.gguf"), NULL) == 3 &&
          strstr(last.text, "only a vocabulary"));
    snprintf(folder, sizeof folder, "%s/malformed/gguf", data);
    snprintf(f.path, sizeof f.path, "%s", path_of(folder, "MANIFEST.json"));
    must(!map_file(f.path, &f.map, &last) &&
         !json_parse(&f.j, (const char *)f.map.data, f.map.n, &last), f.path);
    for EACH(&f.j, 0, c) {
        gguf_file g = {0};
        source s = {0};
        medrun_error e = {0};
        shown name = show(&f.j, json_get(&f.j, c, "file"));
        shown expect = show(&f.j, json_get(&f.j, c, "expect"));
        int code = open_gguf(&s, &g, path_of(folder, name.text), &e);
        bool either = strstr(expect.text, "-or-");
        if (!CHECK((!code && (either || !strcmp(expect.text, "accept"))) ||
                   (code == 3 && (either || !strcmp(expect.text, "refuse")))))
            printf("    %s: %s: %d %s\n", name.text, expect.text, code, e.text);
        close_gguf(&g);
        close_source(&s);
    }
    close_json(&f);
    buffer_free(&a);
    buffer_free(&b);
}

static void test_allocations(void) {
    buffer b = {0};
    int wrong = 0, runs = 0, code = 6;
    make_small(&b, &(change){0});
    write_file(model_path, b.data, b.n);
    for (long i = 0; code && runs < 400; i++, runs++) {
        n_allocs = 0;
        fail_alloc_at = i;
        code = attempt(model_path, NULL);
        fail_alloc_at = -1;
        wrong += code && (code != last.code || (code != 6 && code != 3));
    }
    CHECK(wrong == 0 && code == 0 && runs > 20);
    buffer_free(&b);
}

int main(void) {
    const char *from = getenv("MEDRUN_TEST_FIXTURES");
    snprintf(fixtures, sizeof fixtures, "%s", from ? from : "tests/fixtures");
    snprintf(work, sizeof work, "/tmp/medrun-gguf-XXXXXX");
    must(mkdtemp(work) != NULL, work);
    char model[300], out[300];
    snprintf(model, sizeof model, "%s/model.gguf", work);
    snprintf(out, sizeof out, "%s/x.mdr", work);
    model_path = model, out_path = out;
    test_blocks();
    test_not_finite();
    test_q8_0_kept();
    test_from_folder("llama-plain", 32);
    test_from_folder("llama-sharded", 64);
    test_from_folder("llama-tied", 8);
    test_from_folder("llama-grouped", 4096);
    test_fixtures();
    test_mixed();
    test_changes();
    test_filler();
    test_added_word();
    test_more_rows();
    test_pre();
    test_header();
    test_cuts();
    test_flips();
    test_bad_weights();
    test_rope_tables();
    test_window();
    test_template();
    test_pretokenizers();
    test_yarn();
    test_xielu();
    test_chat();
    test_real();
    test_allocations();
    static const char *const left[] = {"model.gguf", "x.mdr", "other.mdr", "stderr"};
    for (size_t i = 0; i < 4; i++) remove(path_of(work, left[i]));
    CHECK(!rmdir(work));
    return report();
}
