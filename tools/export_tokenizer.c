/* A part of medrun-export, included by tools/export.c: the tokenizers of all kinds of sources
 * become the bytes of a tokenizer.bin, as section 10 of medrun.c reads it. */

/* ============================================================================================
 * 3 Tokenizer: tokenizer.json -> tokenizer.bin
 *
 * A tokenizer.json is a small program: normalizer, pre-tokenizer, model, post-processor, decoder.
 * Only the programs that section 10 of medrun.c runs are known here; each part of another one is
 * refused by its name. The vocabulary comes in GPT-2's byte alphabet, which is undone.
 * ============================================================================================ */

#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"

static const struct { const char *name, *regex; } split_patterns[] = {
    {"llama3", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {"tekken", "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*|"
               "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
};

#undef UPPER
#undef LOWER

enum { PIECE_FOREIGN = 0 };     /* a key outside the byte alphabet: an added token must claim it */

typedef struct {
    size_t at, n;               /* its bytes in source_tokenizer.text                          */
    int type;                   /* PIECE_UNUSED until an entry has this id                     */
} source_piece;

typedef struct {
    span bytes;
    uint32_t id;
} vocab_entry;

typedef struct {
    json_file file, config;     /* tokenizer.json, tokenizer_config.json                       */
    source_piece *pieces;
    size_t n_pieces, n_merges;
    buffer text, merges;
    vocab_entry *entries;       /* the vocabulary sorted by its bytes, which point into text   */
    size_t n_entries;
    const char *pretokenizer;
    int32_t bos, eos;           /* or -1                                                       */
    bool add_bos, ignore_merges;
} source_tokenizer;

static void free_tokenizer(source_tokenizer *t) {
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

/* N pieces that are not used yet, and room for ENTRIES of the vocabulary. All their text together
 * is at most TEXT bytes, so it will not move any more. */
static int make_pieces(source_tokenizer *t, size_t n, size_t entries, size_t text,
                       medrun_error *e) {
    t->n_pieces = n;
    t->pieces = new_array(n, sizeof *t->pieces);
    t->entries = new_array(entries, sizeof *t->entries);
    if (!t->pieces || !t->entries) return out_of_memory(e, n * sizeof *t->pieces);
    for (size_t i = 0; i < n; i++) t->pieces[i].type = PIECE_UNUSED;
    return buffer_room(&t->text, text) ? MEDRUN_OK : out_of_memory(e, text);
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
static int64_t find_entry(const source_tokenizer *t, const uint8_t *p, size_t n) {
    vocab_entry key = {{p, n}, 0};
    if (!t->n_entries) return -1;
    const vocab_entry *v = bsearch(&key, t->entries, t->n_entries, sizeof key, compare_spans);
    return v ? (int64_t)v->id : -1;
}

/* How many ids there are: one more than the largest of the vocabulary and the added tokens. */
static int count_pieces(source_tokenizer *t, uint32_t vocab, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    uint64_t entries = children(j, vocab) / 2, largest = 0, id;
    for EACH_KEY(j, vocab, c) {
        WANT(json_size(j, c + 1, &id), &t->file, "model.vocab", c + 1, "whole numbers");
        if (id > largest) largest = id;
    }
    for EACH(j, added, c) {
        WANT(json_size(j, json_get(j, c, "id"), &id), &t->file, "added_tokens", c, "an id");
        if (id > largest) largest = id;
        entries++;
    }
    if (largest >= 1u << 22 || largest > 2 * entries + 1024)
        return refuse(e, "%s: found id %llu among %llu entries, wanted ids without large gaps",
                      t->file.path, (unsigned long long)largest, (unsigned long long)entries);
    return make_pieces(t, (size_t)largest + 1, (size_t)entries, t->file.map.n, e);
}

/* Entries in the byte alphabet go into the sorted table, where merges look their sides up. */
static int read_vocab(source_tokenizer *t, uint32_t vocab, medrun_error *e) {
    const json *j = &t->file.j;
    buffer key = {0};
    for EACH_KEY(j, vocab, c) {
        uint64_t id = 0;
        size_t at = t->text.n;
        json_size(j, c + 1, &id);
        key.n = 0;
        json_unescape(j, c, &key);
        bool known = undo_alphabet(key.data, key.n, &t->text);
        if (!known) t->text.n = at, buffer_add(&t->text, key.data, key.n);
        if (key.failed) out_of_memory(e, key.n);
        else if (!key.n || t->pieces[id].type != PIECE_UNUSED)
            wrong_field(&t->file, "model.vocab", c + 1, "text for each id, and each id once", e);
        if (e->code) break;
        t->pieces[id] = (source_piece){at, t->text.n - at, known ? PIECE_NORMAL : PIECE_FOREIGN};
        if (known)
            t->entries[t->n_entries++] = (vocab_entry){{t->text.data + at, t->text.n - at},
                                                       (uint32_t)id};
    }
    if (t->n_entries) qsort(t->entries, t->n_entries, sizeof *t->entries, compare_spans);
    buffer_free(&key);
    return e->code;
}

/* The id of one side of a merge, which is written in the byte alphabet; -1 if it is no entry. */
static int64_t side_id(const source_tokenizer *t, const uint8_t *p, size_t n, buffer *scratch) {
    scratch->n = 0;
    if (!n || !undo_alphabet(p, n, scratch) || scratch->failed) return -1;
    return find_entry(t, scratch->data, scratch->n);
}

/* A merge is "a b" (until 2024) or ["a", "b"]: appends both to TEXT with a space between. A space
 * inside one of them is not of the byte alphabet and will be found. */
static void merge_text(const json *j, uint32_t v, buffer *text) {
    if (is(j, v, JSON_STRING)) json_unescape(j, v, text);
    if (!is(j, v, JSON_ARRAY) || children(j, v) != 2 || !is(j, v + 1, JSON_STRING) ||
        !is(j, v + 2, JSON_STRING)) return;
    json_unescape(j, v + 1, text);
    buffer_text(text, " ");
    json_unescape(j, v + 2, text);
}

/* Appends the ids of both sides, which is all that tokenizer.bin keeps of a merge; the order of
 * merges is their rank. False: there is no space between two entries of the vocabulary. */
static bool put_merge(source_tokenizer *t, const uint8_t *p, size_t n, buffer *scratch) {
    const uint8_t *space = n ? memchr(p, ' ', n) : NULL;
    size_t left = space ? (size_t)(space - p) : 0;
    int64_t a = space ? side_id(t, p, left, scratch) : -1;
    int64_t b = a < 0 ? -1 : side_id(t, space + 1, n - left - 1, scratch);
    write_le(&t->merges, (uint64_t)a, 4);
    write_le(&t->merges, (uint64_t)b, 4);
    t->n_merges++;
    return b >= 0;
}

static int read_merges(source_tokenizer *t, uint32_t merges, medrun_error *e) {
    const json *j = &t->file.j;
    buffer text = {0}, scratch = {0};
    for EACH(j, merges, c) {
        text.n = 0;
        merge_text(j, c, &text);
        bool known = put_merge(t, text.data, text.n, &scratch);
        if (text.failed || scratch.failed || t->merges.failed) out_of_memory(e, t->merges.n);
        else if (!known) wrong_field(&t->file, "model.merges", c, "two entries of vocab", e);
        if (e->code) break;
    }
    buffer_free(&text);
    buffer_free(&scratch);
    return e->code;
}

/* The literal CONTENT of added token V becomes the piece of its id. */
static int add_token(source_tokenizer *t, uint32_t v, const buffer *content, buffer *scratch,
                     medrun_error *e) {
    static const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
    const json_file *f = &t->file;
    bool special = false;
    uint64_t id = 0;
    json_size(&f->j, json_get(&f->j, v, "id"), &id);
    for (size_t i = 0; i < 4; i++) {
        bool on = false;
        if (read_bool(f, v, flags[i], &on, e)) return e->code;
        WANT(!on, f, "added_tokens", v, "single_word, lstrip, rstrip, normalized all false");
    }
    if (read_bool(f, v, "special", &special, e)) return e->code;
    source_piece *piece = &t->pieces[id];
    scratch->n = 0;
    bool known = undo_alphabet(content->data, content->n, scratch);
    const buffer *key = piece->type == PIECE_FOREIGN ? content : scratch;
    bool same = key->n == piece->n && !memcmp(key->data, t->text.data + piece->at, piece->n);
    int64_t other = known ? find_entry(t, scratch->data, scratch->n) : -1;
    WANT((piece->type == PIECE_UNUSED || same) && (other < 0 || other == (int64_t)id), f,
         "added_tokens", v, "an id that agrees with model.vocab");
    *piece = (source_piece){t->text.n, content->n, special ? PIECE_CONTROL : PIECE_USER};
    buffer_add(&t->text, content->data, content->n);
    return scratch->failed ? out_of_memory(e, scratch->n) : MEDRUN_OK;
}

/* After the merges, which know only the vocabulary: from here on an id may have another text. */
static int read_added(source_tokenizer *t, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    buffer content = {0}, scratch = {0};
    for EACH(j, added, c) {
        uint32_t text = json_get(j, c, "content");
        content.n = 0;
        if (is(j, text, JSON_STRING)) json_unescape(j, text, &content);
        if (content.failed) out_of_memory(e, content.n);
        else if (!content.n) wrong_field(&t->file, "added_tokens", c, "some content", e);
        else add_token(t, c, &content, &scratch, e);
        if (e->code) break;
    }
    buffer_free(&content);
    buffer_free(&scratch);
    for (size_t id = 0; !e->code && id < t->n_pieces; id++)
        if (t->pieces[id].type == PIECE_FOREIGN)
            refuse(e, "%s: field model.vocab: found %.*s, wanted an entry in the byte alphabet; "
                   "only byte-level BPE is supported", t->file.path,
                   t->pieces[id].n < 80 ? (int)t->pieces[id].n : 80,
                   (const char *)t->text.data + t->pieces[id].at);
    return e->code;
}

/* ---- the programs around the vocabulary ---------------------------------------------------- */

/* The parts of the program are objects with a type. */
static bool is_part(const json *j, uint32_t v, const char *type) {
    return json_is(j, json_get(j, v, "type"), type);
}

/* Sequence[Split(a known pattern, Isolated), ByteLevel without its own pattern]. */
static int read_pretokenizer(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "pre_tokenizer"), list = json_get(j, v, "pretokenizers");
    bool two = is_part(j, v, "Sequence") && children(j, list) == 2;
    uint32_t split = two ? list + 1 : JSON_NONE, bytes = two ? j->nodes[split].next : JSON_NONE;
    uint32_t regex = json_get(j, json_get(j, split, "pattern"), "Regex");
    WANT(is_part(j, split, "Split") && json_is(j, json_get(j, split, "behavior"), "Isolated") &&
         is(j, json_get(j, split, "invert"), JSON_FALSE) && is_part(j, bytes, "ByteLevel") &&
         is(j, json_get(j, bytes, "add_prefix_space"), JSON_FALSE) &&
         is(j, json_get(j, bytes, "use_regex"), JSON_FALSE), &t->file, "pre_tokenizer", v,
         "that of Llama-3; this medrun knows no other");
    for (size_t i = 0; i < sizeof split_patterns / sizeof *split_patterns; i++)
        if (json_is(j, regex, split_patterns[i].regex)) t->pretokenizer = split_patterns[i].name;
    WANT(t->pretokenizer, &t->file, "pre_tokenizer: Regex", regex,
         "that of Llama-3; this medrun knows no other");
    return MEDRUN_OK;
}

/* The id that a template's SpecialToken ITEM stands for. */
static int template_id(source_tokenizer *t, uint32_t v, uint32_t item, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t name = json_get(j, json_get(j, item, "SpecialToken"), "id");
    uint64_t id = 0;
    for EACH_KEY(j, json_get(j, v, "special_tokens"), c) {
        uint32_t ids = json_get(j, c + 1, "ids");
        if (!is(j, name, JSON_STRING) || !same_text(j, name, c)) continue;
        WANT(children(j, ids) == 1 && json_size(j, ids + 1, &id) && id < t->n_pieces, &t->file,
             "post_processor: special_tokens", c + 1, "one id of the vocabulary");
        return t->add_bos = true, t->bos = (int32_t)id, MEDRUN_OK;
    }
    return wrong_field(&t->file, "post_processor", item, "a token of its special_tokens", e);
}

/* One post-processor: ByteLevel changes no id; a template may put one token before the text. */
static int read_post_part(source_tokenizer *t, uint32_t v, medrun_error *e) {
    const json *j = &t->file.j;
    if (is_part(j, v, "ByteLevel")) return MEDRUN_OK;
    uint32_t single = json_get(j, v, "single"), n = children(j, single), first = single + 1;
    uint32_t text = n == 1 ? first : n == 2 ? j->nodes[first].next : JSON_NONE;
    WANT(is_part(j, v, "TemplateProcessing") && !t->add_bos &&
         json_is(j, json_get(j, json_get(j, text, "Sequence"), "id"), "A"), &t->file,
         "post_processor", v, "ByteLevel, or a template with at most one token before the text");
    return n == 1 ? MEDRUN_OK : template_id(t, v, first, e);
}

/* Does the tokenizer put a BOS before every text? */
static int read_post_processor(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "post_processor");
    if (v == JSON_NONE) return MEDRUN_OK;
    if (!is_part(j, v, "Sequence")) return read_post_part(t, v, e);
    for EACH(j, json_get(j, v, "processors"), c) if (read_post_part(t, c, e)) break;
    return e->code;
}

/* What would change ids and is not byte-level BPE. */
static int check_program(const json_file *f, uint32_t model, medrun_error *e) {
    static const char *const empty[] = {"dropout", "unk_token", "continuing_subword_prefix",
                                        "end_of_word_suffix", "byte_fallback"};
    const json *j = &f->j;
    uint32_t normalizer = given(j, 0, "normalizer"), decoder = given(j, 0, "decoder");
    WANT(is_part(j, model, "BPE"), f, "model.type", json_get(j, model, "type"), "BPE");
    for (size_t i = 0; i < 5; i++) {
        uint32_t v = given(j, model, empty[i]);
        WANT(v == JSON_NONE || json_is(j, v, "") || is(j, v, JSON_FALSE), f, empty[i], v,
             "nothing; only byte-level BPE is supported");
    }
    WANT(normalizer == JSON_NONE, f, "normalizer", normalizer, "null");
    WANT(is_part(j, decoder, "ByteLevel"), f, "decoder", decoder, "ByteLevel");
    return MEDRUN_OK;
}

static int read_tokenizer_json(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t model = given(j, 0, "model"), added = given(j, 0, "added_tokens");
    uint32_t vocab = given(j, model, "vocab"), merges = given(j, model, "merges");
    if (check_program(&t->file, model, e) || read_pretokenizer(t, e) ||
        read_bool(&t->file, model, "ignore_merges", &t->ignore_merges, e)) return e->code;
    WANT(is(j, vocab, JSON_OBJECT), &t->file, "model.vocab", vocab, "an object");
    WANT(is(j, merges, JSON_ARRAY), &t->file, "model.merges", merges, "an array");
    WANT(added == JSON_NONE || is(j, added, JSON_ARRAY), &t->file, "added_tokens", added,
         "an array");
    if (count_pieces(t, vocab, added, e) || read_vocab(t, vocab, e) ||
        read_merges(t, merges, e) || read_added(t, added, e)) return e->code;
    return read_post_processor(t, e);
}

/* ---- tokenizer_config.json ----------------------------------------------------------------- */

/* bos_token or eos_token: a string, an object with its content, or nothing. */
static int named_token(const source_tokenizer *t, const char *field, int32_t *id, medrun_error *e) {
    const json *j = &t->config.j;
    uint32_t v = given(j, 0, field);
    if (v == JSON_NONE) return MEDRUN_OK;
    if (is(j, v, JSON_OBJECT)) v = json_get(j, v, "content");
    buffer b = {0};
    if (is(j, v, JSON_STRING)) json_unescape(j, v, &b);
    for (size_t i = 0; i < t->n_pieces; i++)
        if (t->pieces[i].type == PIECE_CONTROL && t->pieces[i].n == b.n &&
            !memcmp(t->text.data + t->pieces[i].at, b.data, b.n)) *id = (int32_t)i;
    buffer_free(&b);
    WANT(*id >= 0, &t->config, field, v, "a special token of tokenizer.json");
    return MEDRUN_OK;
}

/* What it says about BOS must be what tokenizer.json does. */
static int read_tokenizer_config(source_tokenizer *t, medrun_error *e) {
    const json_file *f = &t->config;
    int32_t bos = -1;
    bool add_bos = t->add_bos, add_eos = false;
    if (named_token(t, "bos_token", &bos, e) || named_token(t, "eos_token", &t->eos, e) ||
        read_bool(f, 0, "add_bos_token", &add_bos, e) ||
        read_bool(f, 0, "add_eos_token", &add_eos, e)) return e->code;
    WANT(bos < 0 || !t->add_bos || bos == t->bos, f, "bos_token", given(&f->j, 0, "bos_token"),
         "the token that tokenizer.json's post_processor adds");
    WANT(add_bos == t->add_bos, f, "add_bos_token", given(&f->j, 0, "add_bos_token"),
         "what tokenizer.json's post_processor does");
    WANT(!add_eos, f, "add_eos_token", given(&f->j, 0, "add_eos_token"), "false");
    if (bos >= 0) t->bos = bos;
    return MEDRUN_OK;
}

/* ---- tables -------------------------------------------------------------------------------- */

/* What the arrays tokenizer.ggml.* of a GGUF file say. Spans may point into the file. A key that is
 * missing: NULL, or -1; a flag: true, llama.cpp's default for the tokenizers known here. */
typedef struct {
    const char *model, *pre;            /* "llama" or "gpt2"; "llama-bpe", "tekken"            */
    size_t n, n_merges;
    const span *tokens;                 /* n texts, the id is the index                        */
    const int32_t *types;               /* n: 1 normal, 2 unknown, 3 control, 4 user, 5 unused, */
    const float *scores;                /* 6 byte; n scores, only for "llama"                  */
    const span *merges;                 /* n_merges, "a b", only for "gpt2"                    */
    int64_t bos, eos;
    bool add_bos, add_space_prefix;     /* the latter only for "llama"                         */
} token_tables;

static int put_token(source_tokenizer *t, size_t id, span text, int type, const char *what,
                     medrun_error *e) {
    size_t at = t->text.n;
    int as = type == 2 ? PIECE_CONTROL : type;
    if (as == PIECE_UNUSED) return MEDRUN_OK;
    bool known = as == PIECE_CONTROL || as == PIECE_USER || as == PIECE_NORMAL;
    if (as == PIECE_NORMAL) known = undo_alphabet(text.p, text.n, &t->text);
    else if (known) buffer_add(&t->text, text.p, text.n);
    if (!known || !text.n)
        return refuse(e, "%s: tokenizer.ggml.tokens: id %zu: found \"%.*s\" of type %d, wanted "
                      "text in the byte alphabet, or a control or user-defined token", what, id,
                      text.n < 80 ? (int)text.n : 80, text.n ? (const char *)text.p : "", type);
    t->pieces[id] = (source_piece){at, t->text.n - at, as};
    if (as == PIECE_NORMAL)
        t->entries[t->n_entries++] = (vocab_entry){{t->text.data + at, t->text.n - at},
                                                   (uint32_t)id};
    return MEDRUN_OK;
}

static int put_table_merges(source_tokenizer *t, const token_tables *g, const char *what,
                            medrun_error *e) {
    buffer scratch = {0};
    for (size_t i = 0; !e->code && i < g->n_merges; i++) {
        span m = g->merges[i];
        bool known = put_merge(t, m.p, m.n, &scratch);
        if (scratch.failed || t->merges.failed) out_of_memory(e, t->merges.n);
        else if (!known)
            refuse(e, "%s: tokenizer.ggml.merges: number %zu: found \"%.*s\", wanted two tokens "
                   "with a space between", what, i, m.n < 80 ? (int)m.n : 80,
                   m.n ? (const char *)m.p : "");
    }
    buffer_free(&scratch);
    return e->code;
}

/* Fills T, which is zero before, from G; after it write_tokenizer gives the bytes, which the engine
 * must still check (tokenizer_open). WHAT names the file in messages. Give T to free_tokenizer,
 * also after a failure. */
MAYBE_UNUSED static int tokenizer_from_tables(source_tokenizer *t, const token_tables *g,
                                              const char *what, medrun_error *e) {
    static const char *const known[][2] = {{"llama-bpe", "llama3"}, {"tekken", "tekken"}};
    size_t text = 0;
    if (!g->model || strcmp(g->model, "gpt2"))
        return refuse(e, "%s: tokenizer.ggml.model: found \"%s\", wanted \"gpt2\"", what,
                      g->model ? g->model : "");
    for (size_t i = 0; g->pre && i < 2; i++)
        if (!strcmp(g->pre, known[i][0])) t->pretokenizer = known[i][1];
    if (!t->pretokenizer)
        return refuse(e, "%s: tokenizer.ggml.pre: found \"%s\", wanted \"llama-bpe\" or \"tekken\"",
                      what, g->pre ? g->pre : "");
    if (!g->n || !g->types || !g->merges)
        return refuse(e, "%s: tokenizer.ggml: found no tokens, token_type or merges, wanted all "
                      "three", what);
    for (size_t i = 0; i < g->n; i++) text += g->tokens[i].n;
    if (make_pieces(t, g->n, g->n, text, e)) return e->code;
    for (size_t i = 0; i < g->n; i++)
        if (put_token(t, i, g->tokens[i], g->types[i], what, e)) return e->code;
    qsort(t->entries, t->n_entries, sizeof *t->entries, compare_spans);
    if (g->bos < -1 || g->eos < -1 || g->bos >= (int64_t)g->n || g->eos >= (int64_t)g->n)
        return refuse(e, "%s: tokenizer.ggml.bos_token_id, eos_token_id: found %lld, %lld, wanted "
                      "ids below %zu", what, (long long)g->bos, (long long)g->eos, g->n);
    t->bos = (int32_t)g->bos, t->eos = (int32_t)g->eos;
    t->add_bos = g->add_bos && t->bos >= 0, t->ignore_merges = true;
    return put_table_merges(t, g, what, e);
}

/* ---- tokenizer.bin ------------------------------------------------------------------------- */

/* Appends the file, as section 10 of medrun.c reads it. */
static void write_tokenizer(const source_tokenizer *t, buffer *out) {
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

/* Converts the open files of T and lets the engine check the result. */
static int convert_tokenizer(source_tokenizer *t, buffer *out, medrun_error *e) {
    tokenizer check;
    t->bos = t->eos = -1;
    if (read_tokenizer_json(t, e) || read_tokenizer_config(t, e)) return e->code;
    write_tokenizer(t, out);
    if (out->failed) return out_of_memory(e, out->n);
    if (!tokenizer_open(&check, out->data, out->n, t->file.path, e)) tokenizer_close(&check);
    return e->code;
}
