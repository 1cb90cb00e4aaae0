/* A part of medrun-export, included by tools/export.c: the tokenizers of all kinds of sources
 * become the bytes of a tokenizer.bin, as section 10 of medrun.c reads it. */

/* ============================================================================================
 * 3 Tokenizer: tokenizer.json, tokenizer.model or a GGUF file's tables -> tokenizer.bin
 *
 * A tokenizer.json is a small program: normalizer, pre-tokenizer, model, post-processor, decoder.
 * Only the programs that section 10 of medrun.c runs are known here; each part of another one is
 * refused by its name. A byte-level vocabulary comes in GPT-2's byte alphabet, which is undone; one
 * of SentencePiece has U+2581 for spaces. A tokenizer.model is SentencePiece's own, a protobuf.
 *
 * What one tokenizer does in its different forms is not the same: text that begins with a space,
 * say. Each form is converted to what its own reference does with it: Hugging Face tokenizers,
 * the SentencePiece library, llama.cpp.
 * ============================================================================================ */

#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"

static const struct { const char *name, *regex; } split_patterns[] = {
    {"llama3", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {"tekken", "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+|"
               "[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER "*|"
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
    json_file file, config;     /* tokenizer.json or tokenizer.model; tokenizer_config.json    */
    bool is_model;              /* the former is a tokenizer.model                             */
    json_file added, special;   /* beside that: added_tokens.json, special_tokens_map.json     */
    source_piece *pieces;
    size_t n_pieces, n_merges;
    buffer text, merges, scores;        /* scores: a float for each piece, or nothing          */
    vocab_entry *entries;       /* the vocabulary sorted by its bytes, which point into text   */
    size_t n_entries;
    int kind;                   /* as in tokenizer.bin, and so are the flags                   */
    uint32_t flags;             /* all but the two below                                       */
    const char *pretokenizer;   /* of byte-level BPE                                           */
    int32_t bos, eos;           /* or -1                                                       */
    bool add_bos, ignore_merges;
} source_tokenizer;

static void free_tokenizer(source_tokenizer *t) {
    close_json(&t->file);
    close_json(&t->config);
    close_json(&t->added);
    close_json(&t->special);
    free(t->pieces);
    free(t->entries);
    buffer_free(&t->text);
    buffer_free(&t->merges);
    buffer_free(&t->scores);
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

/* SentencePiece's name of a byte, "<0x0A>": the byte, or -1. */
static int byte_piece(const uint8_t *p, size_t n) {
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(p, "<0x", 3) || p[5] != '>') return -1;
    const char *high = memchr(digits, p[3], 16), *low = memchr(digits, p[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

/* Appends what a vocabulary means by TEXT; false if that is nothing. */
static bool spell(const source_tokenizer *t, const uint8_t *p, size_t n, buffer *out) {
    if (t->kind == TOKENIZER_BYTE_LEVEL) return undo_alphabet(p, n, out);
    add_spaced(out, p, n);
    return true;
}

/* Makes TEXT, as the vocabulary has it, the piece of ID; false if it can be no piece of that TYPE.
 * Normal ones, and in a GGUF added words, go into the table where merges look their sides up. One
 * with a space where others have U+2581 is never found in a text, only decoded. */
static bool put_piece(source_tokenizer *t, size_t id, span text, int type) {
    size_t at = t->text.n;
    bool inside = type == PIECE_NORMAL || (type == PIECE_USER && t->flags & TOKENIZER_USER_INSIDE);
    bool ok = text.n > 0, spaced = t->kind == TOKENIZER_SENTENCEPIECE;
    int b = type == PIECE_BYTE ? byte_piece(text.p, text.n) : 0;
    if (type == PIECE_UNUSED) return true;
    if (b < 0) return false;
    if (inside && spaced && ok && memchr(text.p, ' ', text.n)) type = PIECE_UNKNOWN, inside = false;
    if (type == PIECE_BYTE) buffer_add(&t->text, &(uint8_t){(uint8_t)b}, 1);
    else if (inside) ok = spell(t, text.p, text.n, &t->text) && ok;
    else buffer_add(&t->text, text.p, text.n);
    span bytes = {t->text.data + at, t->text.n - at};
    t->pieces[id] = (source_piece){at, bytes.n, type};
    if ((type == PIECE_NORMAL || (type == PIECE_USER && !spaced)) && ok)
        t->entries[t->n_entries++] = (vocab_entry){bytes, (uint32_t)id};
    return ok;
}

static void sort_entries(source_tokenizer *t) {
    if (t->n_entries) qsort(t->entries, t->n_entries, sizeof *t->entries, compare_spans);
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

static int read_vocab(source_tokenizer *t, uint32_t vocab, medrun_error *e) {
    const json *j = &t->file.j;
    bool spaced = t->kind == TOKENIZER_SENTENCEPIECE;
    buffer key = {0};
    for EACH_KEY(j, vocab, c) {
        uint64_t id = 0;
        json_size(j, c + 1, &id);
        key.n = 0;
        json_unescape(j, c, &key);
        span text = {key.data, key.n};
        int type = spaced && byte_piece(text.p, text.n) >= 0 ? PIECE_BYTE : PIECE_NORMAL;
        if (key.failed) out_of_memory(e, key.n);
        else if (!key.n || t->pieces[id].type != PIECE_UNUSED)
            wrong_field(&t->file, "model.vocab", c + 1, "text for each id, and each id once", e);
        if (e->code) break;
        size_t at = t->text.n;
        if (put_piece(t, (size_t)id, text, type)) continue;
        t->text.n = at;
        put_piece(t, (size_t)id, text, PIECE_FOREIGN);
    }
    sort_entries(t);
    buffer_free(&key);
    return e->code;
}

/* The id of one side of a merge, which is written as in the vocabulary; -1 if it is no entry. */
static int64_t side_id(const source_tokenizer *t, const uint8_t *p, size_t n, buffer *scratch) {
    scratch->n = 0;
    if (!n || !spell(t, p, n, scratch) || scratch->failed) return -1;
    return find_entry(t, scratch->data, scratch->n);
}

/* A merge is "a b" (until 2024) or ["a", "b"]: appends both to TEXT with a space between. With a
 * space inside one of them, that one will not be found. */
static void merge_text(const json *j, uint32_t v, buffer *text) {
    if (json_is_type(j, v, JSON_STRING)) json_unescape(j, v, text);
    if (!json_is_type(j, v, JSON_ARRAY) || children(j, v) != 2 ||
        !json_is_type(j, v + 1, JSON_STRING) ||
        !json_is_type(j, v + 2, JSON_STRING)) return;
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

/* Appends the text of a token that V names: a string, or an object with its content. */
static void token_text(const json *j, uint32_t v, buffer *out) {
    if (json_is_type(j, v, JSON_OBJECT)) v = json_get(j, v, "content");
    if (json_is_type(j, v, JSON_STRING)) json_unescape(j, v, out);
}

/* Is TEXT one of the special tokens that a file like special_tokens_map.json names? */
static bool names_special(const json_file *f, const buffer *text) {
    static const char *const keys[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                       "pad_token", "cls_token", "mask_token"};
    const json *j = &f->j;
    bool found = false;
    buffer name = {0};
    if (!j->n || !text->n) return false;
    uint32_t more = given(j, 0, "additional_special_tokens"), left = children(j, more);
    for (uint32_t i = 0, c = more + 1; i < 7 + left && !found; i++) {
        uint32_t v = i < 7 ? given(j, 0, keys[i]) : c;
        if (i >= 7) c = j->nodes[c].next;
        name.n = 0;
        token_text(j, v, &name);
        found = name.n == text->n && !memcmp(name.data, text->data, name.n);
    }
    buffer_free(&name);
    return found;
}

/* The normalizer, JSON_NONE where there is none or an empty sequence. */
static uint32_t normalizer_of(const json *j) {
    uint32_t v = given(j, 0, "normalizer"), list = json_get(j, v, "normalizers");
    return json_is_type(j, list, JSON_ARRAY) && !children(j, list) ? JSON_NONE : v;
}

/* The flags of added token V of F: only `special` may be set, and `normalized` where nothing
 * normalizes. */
static int read_added_flags(const json_file *f, uint32_t v, bool *special, medrun_error *e) {
    static const char *const flags[] = {"single_word", "lstrip", "rstrip", "normalized"};
    bool plain = normalizer_of(&f->j) == JSON_NONE;
    for (size_t i = 0; i < 4; i++) {
        bool on = false;
        if (read_bool(f, v, flags[i], &on, e)) return e->code;
        WANT(!on || (i == 3 && plain), f, "added_tokens", v, plain ?
             "single_word, lstrip, rstrip all false" :
             "single_word, lstrip, rstrip, normalized all false, as there is a normalizer; where a "
             "tokenizer.model lies beside it, take this file away");
    }
    return read_bool(f, v, "special", special, e);
}

/* Some files call these no special tokens, but no text that people type may mean a turn. */
static bool opens_turn(const buffer *content) {
    static const char *const names[] = {"<|im_start|>", "<|im_end|>", "<|start_header_id|>",
                                        "<|end_header_id|>", "<|eot_id|>"};
    for (size_t i = 0; i < 5; i++)
        if (content->n == strlen(names[i]) && !memcmp(content->data, names[i], content->n))
            return true;
    return false;
}

/* The literal CONTENT of added token V of F becomes the piece ID. */
static int add_token(source_tokenizer *t, const json_file *f, uint32_t v, uint64_t id, bool special,
                     const buffer *content, buffer *scratch, medrun_error *e) {
    WANT(t->kind == TOKENIZER_BYTE_LEVEL || find_mark(content->data, content->n) == content->n, f,
         "added_tokens", v, "no U+2581 in it");
    source_piece *piece = &t->pieces[id];
    scratch->n = 0;
    bool known = spell(t, content->data, content->n, scratch);
    const buffer *key = piece->type == PIECE_FOREIGN ? content : scratch;
    bool same = key->n == piece->n && !memcmp(key->data, t->text.data + piece->at, piece->n);
    same |= t->is_model && (piece->type == PIECE_UNKNOWN || piece->type == PIECE_CONTROL);
    if (t->kind == TOKENIZER_SENTENCEPIECE && memchr(content->data, ' ', content->n)) known = false;
    int64_t other = known ? find_entry(t, scratch->data, scratch->n) : -1;
    WANT((piece->type == PIECE_UNUSED || same) && (other < 0 || other == (int64_t)id), f,
         "added_tokens", v, t->is_model ?
         "an id that agrees with tokenizer.model" : "an id that agrees with model.vocab");
    special |= opens_turn(content);
    *piece = (source_piece){t->text.n, content->n, special ? PIECE_CONTROL : PIECE_USER};
    buffer_add(&t->text, content->data, content->n);
    return scratch->failed ? out_of_memory(e, scratch->n) : MEDRUN_OK;
}

/* The text of added token V; empty where its `normalized` is not ON. */
static span added_text(const source_tokenizer *t, uint32_t v, bool on) {
    const json *j = &t->file.j;
    uint64_t id = 0;
    json_size(j, json_get(j, v, "id"), &id);
    const source_piece *piece = &t->pieces[id];
    bool normalized = json_is_type(j, json_get(j, v, "normalized"), JSON_TRUE);
    return (span){t->text.data + piece->at, normalized == on ? piece->n : 0};
}

/* Does one of these N sorted texts begin inside A, so that both cannot stand there? */
static bool begins_inside(const span *others, size_t n, span a) {
    for (size_t from = 0; from < a.n; from++)
        for (size_t i = 0; i < n && others[i].p[0] <= a.p[from]; i++) {
            size_t left = a.n - from, both = others[i].n < left ? others[i].n : left;
            bool longer = !from && others[i].n >= a.n;          /* it is the one in any case     */
            if (!longer && !memcmp(others[i].p, a.p + from, both)) return true;
        }
    return false;
}

/* Where nothing normalizes, `normalized` still says which tokens are looked for first: the others.
 * Here all are looked for at once from the left, which gives the same unless two overlap. */
static int check_normalized(const source_tokenizer *t, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    size_t n = 0;
    span *others = new_array(children(j, added), sizeof *others), text;
    if (!others) return out_of_memory(e, children(j, added) * sizeof *others);
    for EACH(j, added, c) if ((text = added_text(t, c, false)).n) others[n++] = text;
    if (n) qsort(others, n, sizeof *others, compare_spans);
    for EACH(j, added, c)
        if (!e->code && begins_inside(others, n, added_text(t, c, true)))
            wrong_field(&t->file, "added_tokens", c, "none that is not normalized to begin inside "
                        "one that is", e);
    free(others);
    return e->code;
}

/* The text of added tokens is cut out before anything merges. Merges with one of them, which a
 * vocabulary has where a word that is a piece already was added once more, never happen and go. */
static void drop_merges(source_tokenizer *t, buffer *scratch) {
    size_t kept = 0;
    for (size_t i = 0; i < t->n_merges; i++) {
        const source_piece *a = &t->pieces[u32_at(t->merges.data, 2 * i)];
        const source_piece *b = &t->pieces[u32_at(t->merges.data, 2 * i + 1)];
        scratch->n = 0;
        buffer_add(scratch, t->text.data + a->at, a->n);
        buffer_add(scratch, t->text.data + b->at, b->n);
        int64_t id = find_entry(t, scratch->data, scratch->n);
        if (a->type != PIECE_NORMAL || b->type != PIECE_NORMAL ||
            (id >= 0 && t->pieces[id].type != PIECE_NORMAL)) continue;
        memmove(t->merges.data + 8 * kept++, t->merges.data + 8 * i, 8);
    }
    t->n_merges = kept, t->merges.n = 8 * kept;
}

/* After the merges, which know only the vocabulary: from here on an id may have another text. */
static int read_added(source_tokenizer *t, uint32_t added, medrun_error *e) {
    const json *j = &t->file.j;
    buffer content = {0}, scratch = {0};
    for EACH(j, added, c) {
        uint32_t text = json_get(j, c, "content");
        content.n = 0;
        if (json_is_type(j, text, JSON_STRING)) json_unescape(j, text, &content);
        if (content.failed) out_of_memory(e, content.n);
        else if (!content.n) wrong_field(&t->file, "added_tokens", c, "some content", e);
        uint64_t id = 0;
        bool special = false;
        json_size(j, json_get(j, c, "id"), &id);
        if (!e->code) read_added_flags(&t->file, c, &special, e);
        if (e->code) break;
        special |= names_special(&t->config, &content);
        add_token(t, &t->file, c, id, special, &content, &scratch, e);
        if (e->code) break;
    }
    if (!e->code) check_normalized(t, added, e);
    if (!e->code) drop_merges(t, &scratch);
    if (scratch.failed) out_of_memory(e, scratch.n);
    buffer_free(&content);
    buffer_free(&scratch);
    for (size_t id = 0; !e->code && id < t->n_pieces; id++)
        if (t->pieces[id].type == PIECE_FOREIGN)
            refuse(e, "%s: field model.vocab: found %.*s, wanted an entry in the byte alphabet, "
                   "as byte_fallback is not true", t->file.path,
                   t->pieces[id].n < 80 ? (int)t->pieces[id].n : 80,
                   (const char *)t->text.data + t->pieces[id].at);
    return e->code;
}

/* ---- the programs around the vocabulary ---------------------------------------------------- */

/* The parts of the program are objects with a type. */
static bool is_part(const json *j, uint32_t v, const char *type) {
    return json_is(j, json_get(j, v, "type"), type);
}

/* Sequence[Digits one by one, ByteLevel with its own pattern, which is GPT-2's]: SmolLM's. */
static bool is_smollm(const json *j, uint32_t digits, uint32_t bytes) {
    return is_part(j, digits, "Digits") &&
           json_is_type(j, json_get(j, digits, "individual_digits"), JSON_TRUE) &&
           is_part(j, bytes, "ByteLevel") &&
           json_is_type(j, json_get(j, bytes, "add_prefix_space"), JSON_FALSE) &&
           !json_is_type(j, json_get(j, bytes, "use_regex"), JSON_FALSE);
}

/* Sequence[Split(a known pattern, Isolated), ByteLevel without its own pattern], or SmolLM's. */
static int read_pretokenizer(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "pre_tokenizer"), list = json_get(j, v, "pretokenizers");
    bool two = is_part(j, v, "Sequence") && children(j, list) == 2;
    uint32_t split = two ? list + 1 : JSON_NONE, bytes = two ? j->nodes[split].next : JSON_NONE;
    uint32_t regex = json_get(j, json_get(j, split, "pattern"), "Regex");
    if (is_smollm(j, split, bytes)) return t->pretokenizer = "smollm", MEDRUN_OK;
    WANT(is_part(j, split, "Split") && json_is(j, json_get(j, split, "behavior"), "Isolated") &&
         json_is_type(j, json_get(j, split, "invert"), JSON_FALSE) &&
         is_part(j, bytes, "ByteLevel") &&
         json_is_type(j, json_get(j, bytes, "add_prefix_space"), JSON_FALSE) &&
         json_is_type(j, json_get(j, bytes, "use_regex"), JSON_FALSE), &t->file, "pre_tokenizer", v,
         "that of Llama-3, tekken or SmolLM; this medrun knows no other");
    for (size_t i = 0; i < sizeof split_patterns / sizeof *split_patterns; i++)
        if (json_is(j, regex, split_patterns[i].regex)) t->pretokenizer = split_patterns[i].name;
    WANT(t->pretokenizer, &t->file, "pre_tokenizer: Regex", regex,
         "that of Llama-3, tekken or SmolLM; this medrun knows no other");
    return MEDRUN_OK;
}

#define MARK "\xE2\x96\x81"     /* U+2581, SentencePiece's space                               */

/* Replace FROM by TO, as a normalizer or a decoder. */
static bool is_replace(const json *j, uint32_t v, const char *from, const char *to) {
    return is_part(j, v, "Replace") && json_is(j, json_get(j, v, "content"), to) &&
           json_is(j, json_get(j, json_get(j, v, "pattern"), "String"), from);
}

/* The older form of SentencePiece's spaces: [Prepend one,] Replace all, for each run of text. */
static int read_normalizer(source_tokenizer *t, uint32_t v, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t list = json_get(j, v, "normalizers");
    uint32_t n = is_part(j, v, "Sequence") ? children(j, list) : 0, first = n ? list + 1 : v;
    bool prepend = n == 2 && is_part(j, first, "Prepend") &&
                   json_is(j, json_get(j, first, "prepend"), MARK);
    if (prepend) t->flags |= TOKENIZER_PREFIX_RUNS;
    WANT((prepend || n < 2) && is_replace(j, prepend ? j->nodes[first].next : first, " ", MARK),
         &t->file, "normalizer", v, "null, or that of Llama-2: Prepend and Replace with U+2581");
    return MEDRUN_OK;
}

/* The newer form: Metaspace, which puts no space before one. */
static int read_metaspace(source_tokenizer *t, uint32_t v, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t scheme = json_get(j, v, "prepend_scheme");
    bool first = json_is(j, scheme, "first"), always = json_is(j, scheme, "always");
    WANT(is_part(j, v, "Metaspace") && json_is(j, json_get(j, v, "replacement"), MARK) &&
         json_is_type(j, json_get(j, v, "split"), JSON_FALSE) &&
         (first || always || json_is(j, scheme, "never")), &t->file, "pre_tokenizer", v,
         "Metaspace of U+2581 with a prepend_scheme and no split");
    if (first) t->flags |= TOKENIZER_PREFIX_TEXT | TOKENIZER_UNLESS_SPACE;
    if (always) t->flags |= TOKENIZER_PREFIX_RUNS | TOKENIZER_UNLESS_SPACE;
    return MEDRUN_OK;
}

/* Sequence[Replace U+2581 by a space, ByteFallback, Fuse, and mostly Strip one space]. */
static int read_spaced_decoder(source_tokenizer *t, medrun_error *e) {
    static const char *const types[] = {"Replace", "ByteFallback", "Fuse", "Strip"};
    const json *j = &t->file.j;
    uint32_t v = given(j, 0, "decoder"), list = json_get(j, v, "decoders"), n = 0;
    uint64_t start = 1, stop = 0;
    bool same = is_part(j, v, "Sequence");
    for EACH(j, list, c) {
        same = same && n < 4 && is_part(j, c, types[n]) && (n || is_replace(j, c, MARK, " "));
        if (n++ == 3)
            same = same && json_is(j, json_get(j, c, "content"), " ") &&
                   json_size(j, json_get(j, c, "start"), &start) && start == 1 &&
                   json_size(j, json_get(j, c, "stop"), &stop) && stop == 0;
    }
    WANT(same && n >= 3, &t->file, "decoder", v,
         "that of Llama-2: Replace, ByteFallback, Fuse, Strip one space");
    if (n == 4) t->flags |= TOKENIZER_STRIP;
    return MEDRUN_OK;
}

/* All that is not the vocabulary of a SentencePiece tokenizer. */
static int read_spaces(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t normalizer = normalizer_of(j), pre = given(j, 0, "pre_tokenizer");
    WANT(normalizer == JSON_NONE || pre == JSON_NONE, &t->file, "pre_tokenizer", pre,
         "none beside a normalizer");
    if (normalizer != JSON_NONE) read_normalizer(t, normalizer, e);
    else read_metaspace(t, pre, e);
    return e->code ? e->code : read_spaced_decoder(t, e);
}

/* The id that a template's SpecialToken ITEM stands for. */
static int template_id(source_tokenizer *t, uint32_t v, uint32_t item, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t name = json_get(j, json_get(j, item, "SpecialToken"), "id");
    uint64_t id = 0;
    for EACH_KEY(j, json_get(j, v, "special_tokens"), c) {
        uint32_t ids = json_get(j, c + 1, "ids");
        if (!json_is_type(j, name, JSON_STRING) || !same_text(j, name, c)) continue;
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

/* What would change ids. */
static int check_model(const source_tokenizer *t, uint32_t model, medrun_error *e) {
    static const char *const empty[] = {"dropout", "continuing_subword_prefix",
                                        "end_of_word_suffix", "unk_token"};
    const json *j = &t->file.j;
    bool spaced = t->kind == TOKENIZER_SENTENCEPIECE;   /* then bytes stand for what is unknown  */
    WANT(is_part(j, model, "BPE"), &t->file, "model.type", json_get(j, model, "type"),
         "BPE; this medrun knows no other");
    for (size_t i = 0; i < (spaced ? 3 : 4); i++) {
        uint32_t v = given(j, model, empty[i]);
        bool zero = json_is_type(j, v, JSON_NUMBER) && json_number(j, v) == 0;      /* dropout   */
        WANT(v == JSON_NONE || zero || json_is(j, v, ""), &t->file, empty[i], v, "nothing");
    }
    WANT(!spaced || !t->ignore_merges, &t->file, "ignore_merges",
         given(j, model, "ignore_merges"), "false, as byte_fallback is true");
    return MEDRUN_OK;
}

/* byte_fallback tells the two kinds of BPE from each other. */
static int read_program(source_tokenizer *t, uint32_t model, medrun_error *e) {
    const json *j = &t->file.j;
    bool spaced = false;
    if (read_bool(&t->file, model, "byte_fallback", &spaced, e) ||
        read_bool(&t->file, model, "ignore_merges", &t->ignore_merges, e)) return e->code;
    t->kind = spaced ? TOKENIZER_SENTENCEPIECE : TOKENIZER_BYTE_LEVEL;
    if (check_model(t, model, e)) return e->code;
    if (spaced) return read_spaces(t, e);
    uint32_t normalizer = normalizer_of(j), decoder = given(j, 0, "decoder");
    WANT(normalizer == JSON_NONE, &t->file, "normalizer", normalizer,
         "null; this medrun knows no other for this kind of vocabulary");
    WANT(is_part(j, decoder, "ByteLevel"), &t->file, "decoder", decoder, "ByteLevel");
    return read_pretokenizer(t, e);
}

static int read_tokenizer_json(source_tokenizer *t, medrun_error *e) {
    const json *j = &t->file.j;
    uint32_t model = given(j, 0, "model"), added = given(j, 0, "added_tokens");
    uint32_t vocab = given(j, model, "vocab"), merges = given(j, model, "merges");
    if (read_program(t, model, e)) return e->code;
    WANT(json_is_type(j, vocab, JSON_OBJECT), &t->file, "model.vocab", vocab, "an object");
    WANT(json_is_type(j, merges, JSON_ARRAY), &t->file, "model.merges", merges, "an array");
    WANT(added == JSON_NONE || json_is_type(j, added, JSON_ARRAY), &t->file, "added_tokens", added,
         "an array");
    if (count_pieces(t, vocab, added, e) || read_vocab(t, vocab, e) ||
        read_merges(t, merges, e) || read_added(t, added, e)) return e->code;
    return read_post_processor(t, e);
}

/* ---- tokenizer.model ----------------------------------------------------------------------- */

/* One field of a protobuf message: its number is the key's upper bits. */
typedef struct {
    uint32_t field, wire;       /* wire: how it is stored, one of these                        */
    uint64_t number;            /* of the first three                                          */
    span bytes;                 /* of WIRE_BYTES                                               */
} pb_item;

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

/* Seven bits a byte, the lowest first; the top bit says that more follow. */
static uint64_t read_varint(reader *r) {
    uint64_t v = 0, byte = 0x80;
    for (unsigned shift = 0; byte & 0x80; shift += 7) {
        byte = read_le(r, 1);
        if (shift > 63 || (shift == 63 && byte > 1)) return r->failed = true, 0;
        v |= (byte & 0x7F) << shift;
    }
    return v;
}

/* The next field of the message R; false at its end, or where something cannot be one. */
static bool next_item(reader *r, pb_item *item) {
    if (r->failed || r->at == r->n) return false;
    uint64_t key = read_varint(r);
    *item = (pb_item){.field = (uint32_t)(key >> 3), .wire = key & 7};
    if (!item->field || key >> 32) r->failed = true;
    else if (item->wire == WIRE_VARINT) item->number = read_varint(r);
    else if (item->wire == WIRE_64) item->number = read_le(r, 8);
    else if (item->wire == WIRE_32) item->number = read_le(r, 4);
    else if (item->wire != WIRE_BYTES) r->failed = true;
    else {
        uint64_t n = read_varint(r);
        item->bytes.n = n > r->n ? r->n + 1 : (size_t)n;
        item->bytes.p = read_bytes(r, item->bytes.n);
    }
    return !r->failed;
}

static reader reader_of(span bytes) { return (reader){.data = bytes.p, .n = bytes.n}; }

static int no_model(const source_tokenizer *t, medrun_error *e) {
    const uint8_t *p = t->file.map.data;
    size_t n = t->file.map.n, i = 0;
    while (i < n && i < 64 && (isalnum(p[i]) || memchr("+/=", p[i], 3))) i++;
    if (i > 1 && i + 1 < n && p[i] == ' ' && isdigit(p[i + 1]))
        return refuse(e, "%s: found the ranks of tiktoken, Meta's own form, wanted SentencePiece; "
                      "take tokenizer.json of the model's folder in transformers' form",
                      t->file.path);
    return refuse(e, "%s: this is no tokenizer.model of SentencePiece, or it was cut or damaged; "
                  "download it again", t->file.path);
}

/* A field of a message that matters. WANTS is NULL where any value can be run. */
typedef struct {
    const char *name, *wants;
    uint32_t field;
    uint64_t value, wanted;     /* value: the default until read; of bytes, their number       */
    span bytes;
} setting;

enum { MODEL_TYPE, BYTE_FALLBACK, SUFFIX, BOS_ID, EOS_ID, UNK_SURFACE, N_TRAINER };
enum { CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPE_SPACES, N_NORMALIZER };

typedef struct {
    size_t n_pieces, bytes;     /* bytes: of all pieces' messages                              */
    setting trainer[N_TRAINER], normalizer[N_NORMALIZER], denormalizer[1];
} spm_model;

static const spm_model model_defaults = {
    .trainer = {{"model_type", "2 (BPE; 1 is unigram)", 3, 1, 2, {0}},
                {"byte_fallback", "1", 35, 0, 1, {0}},
                {"treat_whitespace_as_suffix", "0", 24, 0, 0, {0}},
                {"bos_id", NULL, 41, 1, 0, {0}}, {"eos_id", NULL, 42, 2, 0, {0}},
                {"unk_surface", NULL, 44, 5, 0, {(const uint8_t *)" \xE2\x81\x87 ", 5}}},
    .normalizer = {{"bytes of precompiled_charsmap", "none (the identity)", 2, 0, 0, {0}},
                   {"add_dummy_prefix", NULL, 3, 1, 0, {0}},
                   {"remove_extra_whitespaces", "0", 4, 1, 0, {0}},
                   {"escape_whitespaces", "1", 5, 1, 1, {0}}},
    .denormalizer = {{"bytes of the denormalizer's charsmap", "none", 2, 0, 0, {0}}},
};

/* Reads the message BYTES into SETTINGS; its other fields do not matter. */
static bool read_settings(span bytes, setting *settings, size_t n) {
    reader r = reader_of(bytes);
    for (pb_item item; next_item(&r, &item);)
        for (size_t i = 0; i < n; i++)
            if (item.field == settings[i].field)
                settings[i].value = item.wire == WIRE_BYTES ? item.bytes.n : item.number,
                settings[i].bytes = item.bytes;
    return !r.failed;
}

static int check_settings(const source_tokenizer *t, const setting *s, size_t n, medrun_error *e) {
    for (size_t i = 0; i < n; i++)
        if (s[i].wants && s[i].value != s[i].wanted)
            return refuse(e, "%s: field %s: found %llu, wanted %s", t->file.path, s[i].name,
                          (unsigned long long)s[i].value, s[i].wants);
    return MEDRUN_OK;
}

/* All but the pieces, which are counted. */
static int read_model_specs(const source_tokenizer *t, spm_model *m, medrun_error *e) {
    reader r = reader_of((span){t->file.map.data, t->file.map.n});
    bool good = true;
    *m = model_defaults;
    for (pb_item item; good && next_item(&r, &item);) {
        if (item.wire != WIRE_BYTES) continue;
        if (item.field == 1) m->n_pieces++, m->bytes += item.bytes.n;
        if (item.field == 2) good = read_settings(item.bytes, m->trainer, N_TRAINER);
        if (item.field == 3) good = read_settings(item.bytes, m->normalizer, N_NORMALIZER);
        if (item.field == 5) good = read_settings(item.bytes, m->denormalizer, 1);
    }
    if (!good || r.failed || !m->n_pieces) return no_model(t, e);
    if (check_settings(t, m->trainer, N_TRAINER, e) ||
        check_settings(t, m->normalizer, N_NORMALIZER, e)) return e->code;
    return check_settings(t, m->denormalizer, 1, e);
}

/* Message BYTES is piece ID: its text, score and type. */
static int read_model_piece(source_tokenizer *t, const spm_model *m, size_t id, span bytes,
                            medrun_error *e) {
    reader r = reader_of(bytes);
    span text = {0};
    uint64_t type = PIECE_NORMAL, score = 0;
    bool scored = false;
    for (pb_item item; next_item(&r, &item);) {
        if (item.field == 1 && item.wire == WIRE_BYTES) text = item.bytes;
        if (item.field == 2 && item.wire == WIRE_32) score = item.number, scored = true;
        if (item.field == 3 && item.wire == WIRE_VARINT) type = item.number;
    }
    if (r.failed) return no_model(t, e);
    if (!scored && type == PIECE_NORMAL)
        return refuse(e, "%s: piece %zu: found no score, wanted one", t->file.path, id);
    if (type == PIECE_UNKNOWN) text = m->trainer[UNK_SURFACE].bytes;
    write_le(&t->scores, score, 4);
    if (type < PIECE_NORMAL || type > PIECE_BYTE || type == PIECE_UNUSED ||
        !put_piece(t, id, text, (int)type))
        return refuse(e, "%s: piece %zu: found \"%.*s\" of type %llu, wanted some text of type 1 "
                      "to 4, or a byte of type 6", t->file.path, id, text.n < 80 ? (int)text.n : 80,
                      text.n ? (const char *)text.p : "", (unsigned long long)type);
    return MEDRUN_OK;
}

/* With scores, text merges whatever it is: ids say the same only where all characters are pieces,
 * as they are in every model that SentencePiece has trained. */
static int check_characters(const source_tokenizer *t, const char *what, medrun_error *e) {
    uint32_t code;
    for (size_t id = 0; id < t->n_pieces; id++) {
        const uint8_t *p = t->text.data + t->pieces[id].at;
        size_t n = t->pieces[id].type == PIECE_NORMAL ? t->pieces[id].n : 0;
        for (size_t i = 0, len; i < n; i += len) {
            len = utf8_decode(p + i, n - i, &code);
            if (!len || find_entry(t, p + i, len) < 0)
                return refuse(e, "%s: piece %zu: found \"%.*s\", wanted characters that are pieces",
                              what, id, n < 80 ? (int)n : 80, (const char *)p);
        }
    }
    return MEDRUN_OK;
}

/* A special id, which must be that of a control token; -1: none. */
static int special_id(const source_tokenizer *t, const char *field, int64_t found, int32_t *id,
                      const char *what, medrun_error *e) {
    if (found >= (int64_t)t->n_pieces || (found >= 0 && t->pieces[found].type != PIECE_CONTROL))
        return refuse(e, "%s: field %s: found %lld, wanted the id of a control token", what, field,
                      (long long)found);
    return *id = found < 0 ? -1 : (int32_t)found, MEDRUN_OK;
}

/* ---- tokens that transformers adds to a tokenizer.model ------------------------------------- */

/* They stand in added_tokens_decoder of tokenizer_config.json, {"384": {"content": "<|im_end|>",
 * ...}}, and only where that is missing in added_tokens.json, {"<|im_end|>": 384}. */
typedef struct {
    const json_file *f;
    uint32_t list;
    bool decoder;               /* the former                                                  */
} added_list;

static added_list find_added(const source_tokenizer *t) {
    uint32_t list = given(&t->config.j, 0, "added_tokens_decoder");
    bool decoder = list != JSON_NONE;
    if (decoder) return (added_list){&t->config, list, true};
    return (added_list){&t->added, t->added.j.n ? 0 : JSON_NONE, false};
}

/* The id of the entry with key C. */
static bool added_id(const added_list *a, uint32_t c, uint64_t *id) {
    const json *j = &a->f->j;
    if (!a->decoder) return json_size(j, c + 1, id);
    const char *p = j->text + j->nodes[c].start, *end = j->text + j->nodes[c].end;
    for (*id = 0; p < end && *p >= '0' && *p <= '9' && *id < 1u << 24; p++)
        *id = *id * 10 + (uint64_t)(*p - '0');
    return p == end && end > j->text + j->nodes[c].start;
}

/* How many ids there are with the added ones. */
static int count_added(const source_tokenizer *t, size_t *n, medrun_error *e) {
    added_list a = find_added(t);
    uint64_t id, room = *n + children(&a.f->j, a.list) / 2 + 1024;
    if (a.list == JSON_NONE) return MEDRUN_OK;
    WANT(json_is_type(&a.f->j, a.list, JSON_OBJECT), a.f, "added_tokens_decoder", a.list,
         "an object");
    for EACH_KEY(&a.f->j, a.list, c) {
        WANT(added_id(&a, c, &id) && id < room, a.f, a.decoder ? "added_tokens_decoder" :
             "id", a.decoder ? c : c + 1, "ids without large gaps");
        if (id >= *n) *n = (size_t)id + 1;
    }
    return MEDRUN_OK;
}

/* A user-defined piece of SentencePiece's does not end a run of text, an added token does. There is
 * one flag for all of them. */
static int end_runs(source_tokenizer *t, size_t n_model, const uint8_t *added, medrun_error *e) {
    bool own = false, other = false;
    for (size_t id = 0; id < t->n_pieces; id++) {
        if (t->pieces[id].type != PIECE_USER) continue;
        own |= id < n_model && !added[id];
        other |= added[id];
    }
    if (other && own)
        return refuse(e, "%s: found user-defined pieces here and added tokens beside it, wanted "
                      "one kind; AutoTokenizer.from_pretrained(...).save_pretrained(...) makes a "
                      "tokenizer.json of both", t->file.path);
    if (other) t->flags &= ~(uint32_t)TOKENIZER_USER_INSIDE;
    return MEDRUN_OK;
}

/* What stands for unknown text is a special token where tokenizer_config.json names it. */
static void name_unknown(source_tokenizer *t) {
    const json *j = &t->config.j;
    for (size_t id = 0, at = t->text.n; id < t->n_pieces; id++) {
        if (t->pieces[id].type != PIECE_UNKNOWN) continue;
        token_text(j, given(j, 0, "unk_token"), &t->text);
        if (t->text.n > at) t->pieces[id] = (source_piece){at, t->text.n - at, PIECE_CONTROL};
        return;
    }
}

/* Adds them as transformers does: text that is cut out before SentencePiece sees the rest. */
static int add_to_model(source_tokenizer *t, size_t n_model, medrun_error *e) {
    added_list a = find_added(t);
    const json *j = &a.f->j;
    buffer content = {0}, scratch = {0};
    uint8_t *added = new_array(t->n_pieces, 1);
    if (!added) return out_of_memory(e, t->n_pieces);
    for EACH_KEY(j, a.list, c) {
        uint32_t text = a.decoder ? json_get(j, c + 1, "content") : c;
        uint64_t id = 0;
        bool special = false;
        if (e->code) break;
        content.n = 0;
        if (json_is_type(j, text, JSON_STRING)) json_unescape(j, text, &content);
        if (content.failed) out_of_memory(e, content.n);
        else if (!content.n) wrong_field(a.f, "added_tokens_decoder", c + 1, "some content", e);
        else if (a.decoder) read_added_flags(a.f, c + 1, &special, e);
        if (e->code) break;
        added_id(&a, c, &id);
        added[id] = 1;
        int type = t->pieces[id].type;
        special |= type == PIECE_CONTROL || type == PIECE_UNKNOWN ||
                   names_special(&t->config, &content) || names_special(&t->special, &content);
        add_token(t, a.f, c + 1, id, special, &content, &scratch, e);
    }
    if (!e->code) name_unknown(t);
    if (!e->code) end_runs(t, n_model, added, e);
    free(added);
    buffer_free(&content);
    buffer_free(&scratch);
    return e->code;
}

/* transformers puts one space before the whole text where `legacy` is false, unless one is there;
 * else before each run between added tokens. Of false beside false its versions make different
 * things. */
static int read_legacy(source_tokenizer *t, medrun_error *e) {
    bool legacy = true, prefix = true;
    if (read_bool(&t->config, 0, "legacy", &legacy, e) ||
        read_bool(&t->config, 0, "add_prefix_space", &prefix, e)) return e->code;
    if (legacy || !(t->flags & TOKENIZER_PREFIX_RUNS)) return MEDRUN_OK;
    WANT(prefix, &t->config, "add_prefix_space", given(&t->config.j, 0, "add_prefix_space"),
         "true where legacy is false, as versions of transformers disagree about it; "
         "AutoTokenizer.from_pretrained(...).save_pretrained(...) makes a tokenizer.json that says "
         "which it is");
    t->flags &= ~(uint32_t)TOKENIZER_PREFIX_RUNS;
    t->flags |= TOKENIZER_PREFIX_TEXT | TOKENIZER_UNLESS_SPACE;
    return MEDRUN_OK;
}

/* SentencePiece's own form, to be encoded as its library does it; BOS is added by default, as
 * transformers' class for such files does. */
static int read_tokenizer_model(source_tokenizer *t, medrun_error *e) {
    spm_model m;
    size_t id = 0, n = 0;
    if (read_model_specs(t, &m, e)) return e->code;
    t->kind = TOKENIZER_SENTENCEPIECE, t->add_bos = true;
    t->flags = TOKENIZER_SCORES | TOKENIZER_USER_INSIDE;
    if (m.normalizer[DUMMY_PREFIX].value) t->flags |= TOKENIZER_PREFIX_RUNS | TOKENIZER_STRIP;
    n = m.n_pieces;
    if (count_added(t, &n, e) || read_legacy(t, e) ||
        make_pieces(t, n, m.n_pieces, m.bytes + m.trainer[UNK_SURFACE].bytes.n + t->config.map.n +
                    t->added.map.n, e)) return e->code;
    reader r = reader_of((span){t->file.map.data, t->file.map.n});
    for (pb_item item; next_item(&r, &item);)
        if (item.field == 1 && item.wire == WIRE_BYTES &&
            read_model_piece(t, &m, id++, item.bytes, e)) return e->code;
    while (id++ < n) write_le(&t->scores, 0, 4);
    if (t->scores.failed) return out_of_memory(e, t->scores.n);
    sort_entries(t);
    if (add_to_model(t, m.n_pieces, e)) return e->code;
    const char *what = t->file.path;
    if (special_id(t, "bos_id", (int64_t)m.trainer[BOS_ID].value, &t->bos, what, e) ||
        special_id(t, "eos_id", (int64_t)m.trainer[EOS_ID].value, &t->eos, what, e)) return e->code;
    t->add_bos = t->bos >= 0;
    return check_characters(t, what, e);
}

/* ---- tokenizer_config.json ----------------------------------------------------------------- */

/* bos_token or eos_token: a string, an object with its content, or nothing. */
static int named_token(const source_tokenizer *t, const char *field, int32_t *id, medrun_error *e) {
    const json *j = &t->config.j;
    uint32_t v = given(j, 0, field);
    if (v == JSON_NONE) return MEDRUN_OK;
    buffer b = {0};
    token_text(j, v, &b);
    for (size_t i = 0; i < t->n_pieces; i++)
        if (t->pieces[i].type == PIECE_CONTROL && t->pieces[i].n == b.n &&
            !memcmp(t->text.data + t->pieces[i].at, b.data, b.n)) *id = (int32_t)i;
    buffer_free(&b);
    WANT(*id >= 0, &t->config, field, v, "a special token of this vocabulary");
    return MEDRUN_OK;
}

/* What it says about BOS must be what tokenizer.json does; beside a tokenizer.model, it decides. */
static int read_tokenizer_config(source_tokenizer *t, medrun_error *e) {
    const json_file *f = &t->config;
    int32_t bos = -1, eos = -1;
    bool add_bos = t->add_bos, add_eos = false;
    if (named_token(t, "bos_token", &bos, e) || named_token(t, "eos_token", &eos, e) ||
        read_bool(f, 0, "add_bos_token", &add_bos, e) ||
        read_bool(f, 0, "add_eos_token", &add_eos, e)) return e->code;
    WANT(bos < 0 || !t->add_bos || bos == t->bos || t->is_model, f, "bos_token",
         given(&f->j, 0, "bos_token"), "the token that tokenizer.json's post_processor adds");
    WANT(add_bos == t->add_bos || t->is_model, f, "add_bos_token", given(&f->j, 0, "add_bos_token"),
         "what tokenizer.json's post_processor does");
    WANT(!add_eos, f, "add_eos_token", given(&f->j, 0, "add_eos_token"), "false");
    if (bos >= 0) t->bos = bos;
    if (eos >= 0) t->eos = eos;
    t->add_bos = add_bos && t->bos >= 0;
    return MEDRUN_OK;
}

/* ---- tables -------------------------------------------------------------------------------- */

/* What the arrays tokenizer.ggml.* of a GGUF file say. Spans may point into the file. A key that is
 * missing: NULL, or -1; a flag: true, llama.cpp's default for the tokenizers known here. */
typedef struct {
    const char *model, *pre;            /* "llama" or "gpt2"; see gpt2_patterns                */
    size_t n, n_merges;
    const span *tokens;                 /* n texts, the id is the index                        */
    const int32_t *types;               /* n: 1 normal, 2 unknown, 3 control, 4 user, 5 unused, */
    const float *scores;                /* 6 byte; n scores, only for "llama"                  */
    const span *merges;                 /* n_merges, "a b", only for "gpt2"                    */
    int64_t bos, eos;
    bool add_bos, add_space_prefix;     /* the latter only for "llama"                         */
} token_tables;

/* llama.cpp's converters fill up what has no text by [PAD275]; older ones made that a word. */
static bool is_filler(span text, size_t id) {
    char name[32];
    size_t n = (size_t)snprintf(name, sizeof name, "[PAD%zu]", id);
    return text.n == n && !memcmp(text.p, name, n);
}

static int put_tokens(source_tokenizer *t, const token_tables *g, const char *what,
                      medrun_error *e) {
    size_t bytes = 0;
    for (size_t i = 0; i < g->n; i++) bytes += g->tokens[i].n;
    if (make_pieces(t, g->n, g->n, bytes, e)) return e->code;
    for (size_t i = 0; i < g->n; i++) {
        span text = g->tokens[i];
        int type = g->types[i] == PIECE_USER && is_filler(text, i) ? PIECE_UNUSED : g->types[i];
        bool known = type >= PIECE_NORMAL && type <= PIECE_BYTE &&
                     (type != PIECE_BYTE || t->kind == TOKENIZER_SENTENCEPIECE);
        if (!known || !put_piece(t, i, text, type == PIECE_UNKNOWN ? PIECE_CONTROL : type))
            return refuse(e, "%s: tokenizer.ggml.tokens: id %zu: found \"%.*s\" of type %d, wanted "
                          "a text and a type that go with %s", what, i, text.n < 80 ? (int)text.n :
                          80, text.n ? (const char *)text.p : "", type, g->model);
    }
    sort_entries(t);
    return MEDRUN_OK;
}

static int put_merges(source_tokenizer *t, const token_tables *g, const char *what,
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
    if (!e->code) drop_merges(t, &scratch);
    if (scratch.failed) out_of_memory(e, scratch.n);
    buffer_free(&scratch);
    return e->code;
}

/* The values of tokenizer.ggml.pre, and what llama.cpp means by them. */
typedef struct { const char *pre, *pretokenizer; bool ignore_merges, add_bos; } gpt2_pattern;

static const gpt2_pattern gpt2_patterns[] = {
    {"llama-bpe", "llama3", true, true}, {"llama3", "llama3", true, true},
    {"llama-v3", "llama3", true, true}, {"smaug-bpe", "llama3", false, true},
    {"tekken", "tekken", true, true}, {"smollm", "smollm", false, false},
};
#define GPT2_PATTERNS "llama-bpe, llama3, llama-v3, smaug-bpe, tekken or smollm"

static const gpt2_pattern *find_pattern(const char *pre) {
    for (size_t i = 0; pre && i < sizeof gpt2_patterns / sizeof *gpt2_patterns; i++)
        if (!strcmp(pre, gpt2_patterns[i].pre)) return &gpt2_patterns[i];
    return NULL;
}

/* Files of before May 2024 have no name for the pattern. Llama 3's vocabulary tells it. */
static bool is_llama3_vocabulary(const span *tokens, size_t n) {
    static const struct { size_t id; const char *text; } known[] = {
        {128000, "<|begin_of_text|>"}, {128001, "<|end_of_text|>"}, {128009, "<|eot_id|>"}};
    for (size_t i = 0; i < 3; i++) {
        size_t length = strlen(known[i].text);
        if (n <= known[i].id || tokens[known[i].id].n != length ||
            memcmp(tokens[known[i].id].p, known[i].text, length)) return false;
    }
    return true;
}

/* Byte-level BPE: as the tokenizer.json from which the tables were made. */
static int read_gpt2_tables(source_tokenizer *t, const token_tables *g, const char *what,
                            medrun_error *e) {
    const gpt2_pattern *pattern = find_pattern(g->pre);
    t->kind = TOKENIZER_BYTE_LEVEL;
    if (!pattern)
        return refuse(e, "%s: tokenizer.ggml.pre: found \"%s\", wanted " GPT2_PATTERNS "; if the "
                      "model was made from one with such a tokenizer, --pre NAME says so "
                      "(--pre llama-bpe: Llama 3)", what, g->pre ? g->pre : "");
    t->pretokenizer = pattern->pretokenizer;
    t->ignore_merges = pattern->ignore_merges;
    if (!g->merges)
        return refuse(e, "%s: tokenizer.ggml.merges: found none, wanted some", what);
    return put_tokens(t, g, what, e) ? e->code : put_merges(t, g, what, e);
}

/* SentencePiece: as llama.cpp encodes it. */
static int read_llama_tables(source_tokenizer *t, const token_tables *g, const char *what,
                             medrun_error *e) {
    t->kind = TOKENIZER_SENTENCEPIECE, t->flags = TOKENIZER_SCORES;
    if (g->add_space_prefix) t->flags |= TOKENIZER_PREFIX_RUNS | TOKENIZER_STRIP;
    if (!g->scores)
        return refuse(e, "%s: tokenizer.ggml.scores: found none, wanted one a token", what);
    for (size_t i = 0; i < g->n; i++) {
        uint32_t bits;
        memcpy(&bits, &g->scores[i], 4);
        write_le(&t->scores, bits, 4);
    }
    if (t->scores.failed) return out_of_memory(e, t->scores.n);
    return put_tokens(t, g, what, e) ? e->code : check_characters(t, what, e);
}

/* Fills T, which is zero before, from G; after it write_tokenizer gives the bytes, which the engine
 * must still check (tokenizer_open). WHAT names the file in messages. Give T to free_tokenizer,
 * also after a failure. */
static int tokenizer_from_tables(source_tokenizer *t, const token_tables *g, const char *what,
                                 medrun_error *e) {
    const char *model = g->model ? g->model : "";
    bool llama = !strcmp(model, "llama");
    if (!llama && strcmp(model, "gpt2"))
        return refuse(e, "%s: tokenizer.ggml.model: found \"%s\", wanted \"llama\" or \"gpt2\"",
                      what, model);
    if (!g->n || !g->tokens || !g->types)
        return refuse(e, "%s: tokenizer.ggml.tokens, token_type: found none, wanted both", what);
    if ((llama ? read_llama_tables : read_gpt2_tables)(t, g, what, e)) return e->code;
    int64_t bos = llama && g->bos < 0 ? 1 : g->bos, eos = llama && g->eos < 0 ? 2 : g->eos;
    if (special_id(t, "tokenizer.ggml.bos_token_id", bos, &t->bos, what, e) ||
        special_id(t, "tokenizer.ggml.eos_token_id", eos, &t->eos, what, e)) return e->code;
    return t->add_bos = g->add_bos && t->bos >= 0, MEDRUN_OK;
}

/* ---- tokenizer.bin ------------------------------------------------------------------------- */

/* Appends the file, as section 10 of medrun.c reads it. */
static void write_tokenizer(const source_tokenizer *t, buffer *out) {
    buffer body = {0}, text = {0}, types = {0};
    char pattern[24] = {0};
    uint8_t digest[32];
    snprintf(pattern, sizeof pattern, "%s", t->pretokenizer ? t->pretokenizer : "");
    for (size_t i = 0; i < t->n_pieces; i++) {
        buffer_add(&text, t->text.data + t->pieces[i].at, t->pieces[i].n);
        buffer_add(&types, &(uint8_t){(uint8_t)t->pieces[i].type}, 1);
    }
    while (types.n % 4 && !types.failed) buffer_add(&types, "", 1);
    uint32_t flags = t->flags | (t->ignore_merges ? TOKENIZER_IGNORE_MERGES : 0) |
                     (t->add_bos ? TOKENIZER_ADD_BOS : 0);
    const uint64_t head[8] = {1, (uint64_t)t->kind, flags, t->n_pieces,
                              t->n_merges, (uint32_t)t->bos, text.n, 0};
    for (size_t i = 0; i < 8; i++) write_le(&body, head[i], 4);
    buffer_add(&body, pattern, sizeof pattern);
    for (size_t i = 0, end = 0; i < t->n_pieces; i++)
        write_le(&body, end += t->pieces[i].n, 4);
    buffer_add(&body, types.data, types.n);
    buffer_add(&body, t->merges.data, t->merges.n);
    buffer_add(&body, t->scores.data, t->scores.n);
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

/* Opens tokenizer.json, or tokenizer.model where there is none, and tokenizer_config.json. */
static int open_tokenizer(source *s, source_tokenizer *t, medrun_error *e) {
    static const char *const forms[] = {"vocab.json", "tekken.json", "spiece.model", "vocab.txt"};
    const char *model = "tokenizer.model", *other = NULL;
    bool fast = file_exists(s->folder, "tokenizer.json");
    t->is_model = !fast && file_exists(s->folder, model);
    for (size_t i = 0; i < 4 && !other; i++)
        if (file_exists(s->folder, forms[i])) other = forms[i];
    if (!fast && !t->is_model)
        return refuse(e, "%s: found %s%s, wanted tokenizer.json; %s", s->folder, other ? "only " :
                      "no tokenizer", other ? other : "", other ?
                      "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
                      "transformers writes it" : "take that of the model this one was made from");
    if (!t->is_model) open_json(s, "tokenizer.json", false, &t->file, e);
    else if (!join_path(t->file.path, s->folder, model, e) &&
             !map_file(t->file.path, &t->file.map, e) &&
             !check_content(t->file.path, t->file.map.data, t->file.map.n, e))
        add_file(s, model, t->file.path, &t->file.map, e);
    if (e->code || open_json(s, "tokenizer_config.json", true, &t->config, e) || !t->is_model)
        return e->code;
    if (open_json(s, "added_tokens.json", true, &t->added, e)) return e->code;
    return open_json(s, "special_tokens_map.json", true, &t->special, e);
}

/* The same for a tokenizer.json or tokenizer.model by itself, which its name must tell. */
static int open_tokenizer_file(source *s, source_tokenizer *t, medrun_error *e) {
    json_file *f = &t->file;
    snprintf(f->path, sizeof f->path, "%s", s->folder);
    if (json_parse(&t->config.j, "{}", 2, e) || map_file(f->path, &f->map, e)) return e->code;
    size_t n = strlen(f->path);
    t->is_model = n > 6 && !strcmp(f->path + n - 6, ".model");
    if (!t->is_model) unmap_file(&f->map), open_json_path(f, e);
    else check_content(f->path, f->map.data, f->map.n, e);
    return e->code ? e->code : add_file(s, "", s->folder, &f->map, e);
}

/* Appends the file and lets the engine check it. */
static int finish_tokenizer(const source_tokenizer *t, buffer *out, const char *what,
                            medrun_error *e) {
    tokenizer check;
    write_tokenizer(t, out);
    if (out->failed) return out_of_memory(e, out->n);
    if (!tokenizer_open(&check, out->data, out->n, what, e)) tokenizer_close(&check);
    return e->code;
}

/* A token that was added for padding, and for which the embedding was not enlarged, is never used:
 * it goes. More than a few, or one that ends or begins a text, are another model's. */
static bool drop_unused(source *s, source_tokenizer *t, size_t rows) {
    if (t->n_pieces <= rows || t->n_pieces - rows > 16) return false;
    if (t->bos >= (int64_t)rows || t->eos >= (int64_t)rows) return false;
    for (size_t i = rows; i < t->n_pieces; i++)
        if (t->pieces[i].type != PIECE_CONTROL && t->pieces[i].type != PIECE_USER) return false;
    add_note(s, "the tokenizer has %zu ids, the embedding %zu rows: added tokens from id %zu on "
             "are left out", t->n_pieces, rows, rows);
    t->n_pieces = rows;
    if (t->scores.n) t->scores.n = 4 * rows;
    return true;
}

/* MORE of ROWS without a text are still of one model. */
static bool are_fillers(uint64_t more, uint64_t rows) { return more <= 1024 || more <= rows / 8; }

/* Embeddings are often filled up to a multiple of 64 or so: ROWS behind the last id have no text.
 * If they are many, the tokenizer is probably another model's; and so it is if it has more ids. */
static int fill_up(source *s, source_tokenizer *t, size_t rows, medrun_error *e) {
    if (drop_unused(s, t, rows)) return MEDRUN_OK;
    size_t n = t->n_pieces, more = rows > n ? rows - n : 0;
    if (n > rows || !are_fillers(more, rows))
        return refuse(e, "%s: found %zu ids, but config.json's vocab_size is %zu, %s; use the "
                      "tokenizer of this model", t->file.path, n, rows, n > rows ?
                      "so that the last ones have no row" : "far more");
    if (!more) return MEDRUN_OK;
    source_piece *pieces = MEDRUN_ALLOC(t->pieces, rows * sizeof *pieces);
    if (!pieces) return out_of_memory(e, rows * sizeof *pieces);
    t->pieces = pieces, t->n_pieces = rows;
    for (size_t i = n; i < rows; i++) {
        pieces[i] = (source_piece){0, 0, PIECE_UNUSED};
        if (t->scores.n) write_le(&t->scores, 0, 4);
    }
    for (int i = 0; i < s->n_stops; i++)
        if (s->stops[i] >= (int)n)
            return refuse(e, "%s: found %zu ids, but eos_token_id is %d; use the tokenizer of this "
                          "model", t->file.path, n, s->stops[i]);
    add_note(s, "the tokenizer has %zu ids, the embedding %zu rows: ids from %zu on have no text "
             "and are never chosen", n, rows, n);
    return t->scores.failed ? out_of_memory(e, t->scores.n) : MEDRUN_OK;
}

/* Reads the open files of T. */
static int read_any_tokenizer(source_tokenizer *t, medrun_error *e) {
    t->bos = t->eos = -1;
    if ((t->is_model ? read_tokenizer_model : read_tokenizer_json)(t, e)) return e->code;
    return read_tokenizer_config(t, e);
}

/* Converts them, not for a certain model. */
static int convert_tokenizer(source_tokenizer *t, buffer *out, medrun_error *e) {
    return read_any_tokenizer(t, e) ? e->code : finish_tokenizer(t, out, t->file.path, e);
}
