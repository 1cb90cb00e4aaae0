/* A part of medrun-export, included by tools/export.c: GGUF files, the other kind of source. */

/* ============================================================================================
 * 6 GGUF: the other kind of source, and how its blocks are decoded
 *
 * A GGUF file is "GGUF", a version, two counts, keys with values, descriptions of tensors, and then
 * their data. It holds what a Hugging Face folder holds, tokenizer and chat template too, under
 * llama.cpp's names, as llama.cpp's converters write it. Versions 2 and 3 are the same but for
 * big-endian files, which only 3 allows and which are refused.
 * Tests: tests/21_gguf.c.
 * ============================================================================================ */

/* ---- numbers of all types to floats -------------------------------------------------------- */

static float half_at(const uint8_t *p) { return f16_to_f32((uint16_t)(p[0] | p[1] << 8)); }

/* Q4_0, Q4_1, Q5_0, Q5_1: 32 numbers of 4 bits, value j low and value j + 16 high in a byte, with
 * FIFTH a bit more of each in 32 bits; they count from the middle, or with OFFSET from a smallest
 * value. In decoders the order of operations is that of gguf's own, so that each bit is. */
static void decode_small(const uint8_t *b, bool fifth, bool offset, float *out) {
    float d = half_at(b), least = offset ? half_at(b + 2) : 0;
    const uint8_t *q = b + 2 + 2 * offset;
    uint32_t high = 0;
    if (fifth) memcpy(&high, q, 4), q += 4;
    for (int j = 0; j < 16; j++) {
        int x = (q[j] & 15) | (int)(high >> j & 1) << 4;
        int y = q[j] >> 4 | (int)(high >> (j + 16) & 1) << 4;
        int middle = offset ? 0 : fifth ? 16 : 8;
        out[j] = d * (float)(x - middle), out[j + 16] = d * (float)(y - middle);
        if (offset) out[j] += least, out[j + 16] += least;
    }
}

/* Q4_K, Q5_K: 256 numbers, eight runs of 32 with a scale and a smallest value of 6 bits each. */
static void decode_k(const uint8_t *b, bool fifth, float *out) {
    static const uint8_t zeros[32];
    float d = half_at(b), dmin = half_at(b + 2);
    const uint8_t *s = b + 4, *high = fifth ? b + 16 : zeros, *q = fifth ? b + 48 : b + 16;
    for (int run = 0; run < 8; run++, out += 32) {
        int i = run & 3, shift = run & 1 ? 4 : 0;
        int scale = run < 4 ? s[i] & 63 : (s[i + 8] & 15) | (s[i] >> 6) << 4;
        int least = run < 4 ? s[i + 4] & 63 : s[i + 8] >> 4 | (s[i + 4] >> 6) << 4;
        float by = d * (float)scale, minus = dmin * (float)least;
        const uint8_t *from = q + run / 2 * 32;
        for (int l = 0; l < 32; l++)
            out[l] = by * (float)((from[l] >> shift & 15) | (high[l] >> run & 1) << 4) - minus;
    }
}

/* Q6_K: 256 numbers, sixteen runs of 16 with a signed scale each. */
static void decode_q6_k(const uint8_t *b, float *out) {
    float d = half_at(b + 208);
    for (int run = 0; run < 16; run++, out += 16) {
        int half = run / 8, part = run % 8 / 2, at = run % 2 * 16;
        const uint8_t *low = b + 64 * half + part % 2 * 32 + at, *high = b + 128 + 32 * half + at;
        float by = d * (float)(int8_t)b[192 + run];
        for (int l = 0; l < 16; l++) {
            int q = (low[l] >> (part / 2 * 4) & 15) | (high[l] >> (2 * part) & 3) << 4;
            out[l] = by * (float)(q - 32);
        }
    }
}

static void decode_block(int dtype, const uint8_t *b, float *out) {
    if (dtype == SOURCE_Q6_K) decode_q6_k(b, out);
    else if (dtype == SOURCE_Q4_K || dtype == SOURCE_Q5_K) decode_k(b, dtype == SOURCE_Q5_K, out);
    else if (dtype == SOURCE_Q8_0) {
        float d = half_at(b);
        for (int k = 0; k < 32; k++) out[k] = (float)(int8_t)b[2 + k] * d;
    } else {
        bool fifth = dtype == SOURCE_Q5_0 || dtype == SOURCE_Q5_1;
        decode_small(b, fifth, dtype == SOURCE_Q4_1 || dtype == SOURCE_Q5_1, out);
    }
}

/* N numbers -> floats; false if one is infinite, not a number, or too large for a bf16. */
static bool to_floats(int dtype, const uint8_t *raw, size_t n, float *out) {
    uint32_t bad = 0, bits;
    uint16_t h;
    for (size_t k = 0; dtype == SOURCE_BF16 && k < n; k++) {
        memcpy(&h, raw + 2 * k, 2);
        bits = (uint32_t)h << 16;
        memcpy(&out[k], &bits, 4);
    }
    for (size_t k = 0; dtype == SOURCE_F16 && k < n; k++) {
        memcpy(&h, raw + 2 * k, 2);
        out[k] = f16_to_f32(h);
    }
    if (dtype == SOURCE_F32) memcpy(out, raw, n * sizeof *out);
    size_t block = source_types[dtype].block, size = source_types[dtype].size;
    for (size_t k = 0; block > 1 && k < n; k += block, raw += size)
        decode_block(dtype, raw, out + k);
    for (size_t k = 0; k < n; k++) {
        memcpy(&bits, &out[k], 4);
        bad |= (bits & 0x7FFFFFFF) >= 0x7F7F8000;
    }
    return !bad;
}

/* ---- the container ------------------------------------------------------------------------- */

enum { GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING,
       GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, N_GGUF_TYPES };
enum { MAX_GGUF_ITEMS = 1 << 16, MAX_GGUF_STRINGS = 1 << 24 };  /* keys, tensors; of an array    */
static const uint8_t gguf_sizes[N_GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

typedef struct {
    span key;
    uint32_t type;              /* of the value, or of an array's items                        */
    bool array, used;
    uint64_t n;                 /* items; 1 if no array                                        */
    const uint8_t *data;        /* of the first; a string is a 64-bit length and its bytes     */
} gguf_value;

typedef struct {
    char path[PATH_BYTES];      /* for messages                                                */
    file_map map;
    gguf_value *values;         /* sorted by key                                               */
    size_t n_values, cap;
    char architecture[32];
} gguf_file;

static void close_gguf(gguf_file *g) {
    free(g->values);
    unmap_file(&g->map);
}

/* A 64-bit length and as many bytes. */
static span take_string(reader *r) {
    uint64_t n = read_u64(r);
    if (n > r->n - r->at) r->failed = true;
    const uint8_t *p = read_bytes(r, (size_t)n);
    return p ? (span){p, (size_t)n} : (span){NULL, 0};
}

static bool printable(span s) {
    for (size_t i = 0; i < s.n; i++) if (s.p[i] < 0x20 || s.p[i] > 0x7E) return false;
    return s.n > 0;
}

/* As much of S as a message should have. */
static int shown_length(span s) { return s.n < 80 ? (int)s.n : 80; }

static int was_cut(const gguf_file *g, const char *where, medrun_error *e) {
    return refuse(e, "%s: found the end of the file inside %s; download it again", g->path, where);
}

/* One key with its value, which is looked at but not copied. */
static int read_gguf_value(gguf_file *g, reader *r, medrun_error *e) {
    if (grow(&g->values, g->n_values, &g->cap, sizeof *g->values, e)) return e->code;
    gguf_value *v = &g->values[g->n_values++];
    *v = (gguf_value){.key = take_string(r), .n = 1};
    v->type = (uint32_t)read_le(r, 4);
    if (!r->failed && (!printable(v->key) || v->key.n > 65535))
        return refuse(e, "%s: key %zu: found %zu bytes, wanted 1 to 65535 of ASCII", g->path,
                      g->n_values, v->key.n);
    if ((v->array = v->type == GGUF_ARRAY)) v->type = (uint32_t)read_le(r, 4), v->n = read_u64(r);
    if (!r->failed && (v->type >= N_GGUF_TYPES || v->type == GGUF_ARRAY))
        return refuse(e, "%s: key %.*s: found type %u%s, wanted a number, a string, or an array of "
                      "them", g->path, shown_length(v->key), (const char *)v->key.p,
                      (unsigned)v->type, v->array ? " in an array" : "");
    v->data = r->data + r->at;
    if (r->failed) return was_cut(g, "the keys", e);
    uint64_t size = gguf_sizes[v->type];
    for (uint64_t i = 0; !size && i < v->n && !r->failed; i++) take_string(r);
    if (size && v->n > (r->n - r->at) / size) r->failed = true;
    else if (size) r->at += (size_t)(v->n * size);
    return r->failed ? was_cut(g, "the value of a key", e) : MEDRUN_OK;
}

/* The keys must differ, or two readers may see two different files. */
static int read_gguf_values(gguf_file *g, reader *r, uint64_t n, medrun_error *e) {
    for (uint64_t i = 0; i < n; i++) if (read_gguf_value(g, r, e)) return e->code;
    if (g->n_values) qsort(g->values, g->n_values, sizeof *g->values, compare_spans);
    for (size_t i = 1; i < g->n_values; i++)
        if (!compare_spans(&g->values[i - 1], &g->values[i]))
            return refuse(e, "%s: key %.*s: found twice, wanted once", g->path,
                          shown_length(g->values[i].key), (const char *)g->values[i].key.p);
    return MEDRUN_OK;
}

/* The types of tensors by their number in the file, those that were given up too. */
static const char *const ggml_types[] = {
    "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
    "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8",
    "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4", "NVFP4",
    "Q1_0",
};
enum { N_GGML_TYPES = sizeof ggml_types / sizeof *ggml_types };

static int find_ggml_type(const gguf_file *g, const char *name, uint32_t type, int *dtype,
                          medrun_error *e) {
    const char *found = type < N_GGML_TYPES ? ggml_types[type] : "unknown";
    for (*dtype = 0; *dtype < N_WEIGHT_TYPES; ++*dtype)
        if (!strcmp(found, source_types[*dtype].name)) return MEDRUN_OK;
    return refuse(e, "%s: tensor %s: found type %u, %s, which this medrun does not read; take the "
                  "model's Q8_0, Q6_K, Q5_K_M or Q4_K_M file", g->path, name, (unsigned)type,
                  found);
}

/* The description of one tensor. The file has the length of a row first, safetensors last. */
static int read_gguf_tensor(source *s, const gguf_file *g, reader *r, uint64_t align,
                            medrun_error *e) {
    uint64_t dims[4] = {1, 1, 1, 1}, values = 1;
    if (grow(&s->tensors, s->n_tensors, &s->tensors_cap, sizeof *s->tensors, e)) return e->code;
    span name = take_string(r);
    if (r->failed) return was_cut(g, "the descriptions of tensors", e);
    if (!printable(name) || name.n > 64)
        return refuse(e, "%s: tensor %zu: found a name of %zu bytes, wanted 1 to 64 of ASCII",
                      g->path, s->n_tensors + 1, name.n);
    source_tensor *t = &s->tensors[s->n_tensors];
    *t = (source_tensor){.name = new_array(name.n + 1, 1), .file = s->n_files - 1};
    if (!t->name) return out_of_memory(e, name.n + 1);
    memcpy(t->name, name.p, name.n);
    s->n_tensors++;
    uint32_t rank = (uint32_t)read_le(r, 4);
    if (rank > 4)
        return refuse(e, "%s: tensor %s: found %u dimensions, wanted at most 4", g->path, t->name,
                      (unsigned)rank);
    for (uint32_t i = 0; i < rank; i++) dims[i] = read_u64(r);
    uint32_t type = (uint32_t)read_le(r, 4);
    t->begin = read_u64(r);
    if (r->failed) return was_cut(g, "the descriptions of tensors", e);
    if (find_ggml_type(g, t->name, type, &t->dtype, e)) return e->code;
    uint64_t block = source_types[t->dtype].block, size = source_types[t->dtype].size;
    bool fits = dims[0] % block == 0;
    for (size_t i = 0; i < 4 && fits; i++)
        if ((fits = dims[i] && values <= UINT64_MAX / size / dims[i])) values *= dims[i];
    if (!fits || t->begin % align || t->begin > UINT64_MAX - values / block * size)
        return refuse(e, "%s: tensor %s: found shape (%llu, %llu, %llu, %llu) of %s at %llu, "
                      "wanted rows of whole blocks, a size a file can have, and a place that is a "
                      "multiple of %llu", g->path, t->name, (unsigned long long)dims[0],
                      (unsigned long long)dims[1], (unsigned long long)dims[2],
                      (unsigned long long)dims[3], ggml_types[type],
                      (unsigned long long)t->begin, (unsigned long long)align);
    t->rank = (int)rank;
    t->shape[0] = rank == 2 ? dims[1] : dims[0], t->shape[1] = rank == 2 ? dims[0] : 0;
    t->end = t->begin + values / block * size;
    return MEDRUN_OK;
}

/* Each tensor begins at the first aligned place after the one before it, as llama.cpp demands.
 * What follows the last one is not looked at. */
static int place_gguf_tensors(source *s, const gguf_file *g, uint64_t at, uint64_t align,
                              medrun_error *e) {
    uint64_t mask = align - 1, data = (at + mask) & ~mask, next = 0;
    if (!s->n_tensors) return MEDRUN_OK;
    qsort(s->tensors, s->n_tensors, sizeof *s->tensors, compare_places);
    for (size_t i = 0; i < s->n_tensors; i++) {
        source_tensor *t = &s->tensors[i];
        if (t->begin != next)
            return refuse(e, "%s: tensor %s: found at %llu of the data, wanted %llu; tensors must "
                          "neither overlap nor leave a gap", g->path, t->name,
                          (unsigned long long)t->begin, (unsigned long long)next);
        if (data > g->map.n || t->end > g->map.n - data)
            return refuse(e, "%s: tensor %s: found %llu bytes in a file of %zu, wanted them all; "
                          "download it again", g->path, t->name,
                          (unsigned long long)(t->end - t->begin), g->map.n);
        next = (t->end + mask) & ~mask;
        t->begin += data, t->end += data;
    }
    return sort_tensors(s, e);
}

/* ---- values -------------------------------------------------------------------------------- */

/* The value of KEY; one that begins with a point is the architecture's. NULL: there is none. */
static const gguf_value *find_value(const gguf_file *g, const char *key) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", *key == '.' ? g->architecture : "", key);
    gguf_value wanted = {.key = {(const uint8_t *)full, strlen(full)}};
    if (!g->n_values) return NULL;
    gguf_value *v = bsearch(&wanted, g->values, g->n_values, sizeof *v, compare_spans);
    if (v) v->used = true;
    return v;
}

static bool is_number(const gguf_value *v) { return v->type != GGUF_STRING; }
static bool is_whole(const gguf_value *v) {
    return is_number(v) && v->type != GGUF_F32 && v->type != GGUF_F64 && v->type != GGUF_BOOL;
}

/* Item I of a value that is_number; whole numbers past 2^53 only nearly. */
static double number_at(const gguf_value *v, uint64_t i) {
    size_t size = gguf_sizes[v->type];
    reader r = {v->data + i * size, size, 0, false};
    uint64_t bits = read_le(&r, size);
    double d;
    memcpy(&d, &bits, 8);
    switch (v->type) {
        case GGUF_F64: return d;
        case GGUF_F32: return (double)bits_float((uint32_t)bits);
        case GGUF_I8: return (int8_t)bits;
        case GGUF_I16: return (int16_t)bits;
        case GGUF_I32: return (int32_t)bits;
        case GGUF_I64: return (double)(int64_t)bits;
        default: return (double)bits;
    }
}

static shown show_value(const gguf_value *v) {
    shown s = {"nothing"};
    if (v && v->array)
        snprintf(s.text, sizeof s.text, "an array of %llu", (unsigned long long)v->n);
    else if (v && is_number(v)) snprintf(s.text, sizeof s.text, "%.9g", number_at(v, 0));
    else if (v) {
        span text = take_string(&(reader){v->data, SIZE_MAX / 2, 0, false});
        snprintf(s.text, sizeof s.text, "\"%.*s\"", shown_length(text),
                 text.n ? (const char *)text.p : "");
    }
    return s;
}

static int wrong_key(const gguf_file *g, const char *key, const gguf_value *v, const char *wanted,
                     medrun_error *e) {
    return refuse(e, "%s: key %s%s: found %s, wanted %s", g->path,
                  *key == '.' ? g->architecture : "", key, show_value(v).text, wanted);
}

/* A number, or an array of one and the same. Missing: *OUT keeps its value. */
static int read_number(const gguf_file *g, const char *key, double min, double max, bool whole,
                       double *out, medrun_error *e) {
    const gguf_value *v = find_value(g, key);
    char wanted[80];
    if (!v) return MEDRUN_OK;
    snprintf(wanted, sizeof wanted, "%s from %.9g to %.9g", whole ? "a whole number" : "a number",
             min, max);
    if (!v->n || !(whole ? is_whole(v) : is_number(v))) return wrong_key(g, key, v, wanted, e);
    *out = number_at(v, 0);
    for (uint64_t i = 1; i < v->n; i++)
        if (differ(number_at(v, i), *out))
            return wrong_key(g, key, v, "the same in all layers", e);
    return *out >= min && *out <= max ? MEDRUN_OK : wrong_key(g, key, v, wanted, e);
}

/* A string, cut where it does not fit. Missing: "". */
static int read_string(const gguf_file *g, const char *key, char *out, size_t cap,
                       medrun_error *e) {
    const gguf_value *v = find_value(g, key);
    out[0] = 0;
    if (!v) return MEDRUN_OK;
    if (v->array || is_number(v)) return wrong_key(g, key, v, "a string", e);
    span s = take_string(&(reader){v->data, SIZE_MAX / 2, 0, false});
    if (s.n && memchr(s.p, 0, s.n)) return wrong_key(g, key, v, "a string without NUL", e);
    snprintf(out, cap, "%.*s", s.n < cap ? (int)s.n : (int)cap - 1, s.n ? (const char *)s.p : "");
    return MEDRUN_OK;
}

static int read_switch(const gguf_file *g, const char *key, bool *out, medrun_error *e) {
    const gguf_value *v = find_value(g, key);
    if (v && (v->array || v->type != GGUF_BOOL)) return wrong_key(g, key, v, "true or false", e);
    if (v) *out = v->data[0];
    return MEDRUN_OK;
}

/* ---- opening ------------------------------------------------------------------------------- */

/* Is this a regular file that begins with the letters of the format? */
static bool is_gguf(const char *path) {
    file_facts there;
    uint8_t magic[4] = {0};
    if (get_facts(path, -1, &there) || !there.regular || there.bytes < 4) return false;
    int fd = open_file(path, TO_MAP);
    bool same = fd >= 0 && read_start(fd, magic, 4) == 4 && !memcmp(magic, "GGUF", 4);
    if (fd >= 0) close(fd);
    return same;
}

/* Everything before the data. Memory is taken item by item, as they are found. */
static int read_gguf_header(source *s, gguf_file *g, medrun_error *e) {
    reader r = {g->map.data, g->map.n, 4, false};
    uint32_t version = (uint32_t)read_le(&r, 4);
    uint64_t n_tensors = read_u64(&r), n_values = read_u64(&r);
    double align = 32;
    if (r.failed) return was_cut(g, "the header", e);
    if (version && !(version & 0xFFFF))
        return refuse(e, "%s: found a big-endian file, wanted the little-endian one", g->path);
    if (version != 2 && version != 3)
        return refuse(e, "%s: found GGUF version %u, wanted 2 or 3", g->path, (unsigned)version);
    if (n_values > MAX_GGUF_ITEMS || n_tensors > MAX_GGUF_ITEMS)
        return refuse(e, "%s: found %llu keys and %llu tensors, wanted at most %d; download it "
                      "again", g->path, (unsigned long long)n_values, (unsigned long long)n_tensors,
                      MAX_GGUF_ITEMS);
    if (read_gguf_values(g, &r, n_values, e)) return e->code;
    const gguf_value *v = find_value(g, "general.alignment");
    if (v) align = v->type == GGUF_U32 && !v->array ? number_at(v, 0) : 0;
    if (!(align > 0) || (uint32_t)align & ((uint32_t)align - 1))
        return wrong_key(g, "general.alignment", v, "a power of two of type u32", e);
    for (uint64_t i = 0; i < n_tensors; i++)
        if (read_gguf_tensor(s, g, &r, (uint64_t)align, e)) return e->code;
    return place_gguf_tensors(s, g, r.at, (uint64_t)align, e);
}

/* Opens the file at PATH, adds it and its tensors to the source. Close G also after a failure. */
static int open_gguf(source *s, gguf_file *g, const char *path, medrun_error *e) {
    const char *slash = last_slash(path);
    const char *name = slash ? slash + 1 : path;
    double parts = 1, part = 0;
    snprintf(g->path, sizeof g->path, "%s", path);
    snprintf(s->own_folder, sizeof s->own_folder, "%.*s", slash ? (int)(slash - path) : 1,
             slash ? path : ".");
    s->folder = s->own_folder, s->description = "the metadata", s->gguf = true;
    if (map_file(path, &g->map, e) || add_file(s, name, path, NULL, e)) return e->code;
    source_file *f = &s->files[s->n_files - 1];
    f->fd = open_file(path, TO_MAP);
    if (f->fd < 0) return cannot(e, MEDRUN_BAD_FILE, path, "open");
    if (f->bytes != g->map.n) return refuse(e, "%s: its length changes while it is read", path);
    if (read_gguf_header(s, g, e) ||
        read_string(g, "general.architecture", g->architecture, sizeof g->architecture, e) ||
        read_number(g, "split.count", 0, 65535, true, &parts, e) ||
        read_number(g, "split.no", 0, 65535, true, &part, e)) return e->code;
    if (parts > 1)
        return refuse(e, "%s: found file %g of %g of one model, wanted the model in one file; "
                      "`llama-gguf-split --merge FIRST OUT.gguf`, FIRST being %s, makes it", path,
                      part + 1, parts, part > 0 ? "the one with -00001-of- in its name" : "this");
    if (!g->architecture[0])
        return wrong_key(g, "general.architecture", NULL, "the name of one", e);
    return MEDRUN_OK;
}

/* ---- config -------------------------------------------------------------------------------- */

static const struct { const char *name; int activation; } gguf_architectures[] = {
    {"llama", ACTIVATION_SILU}, {"arcee", ACTIVATION_RELU2}, {"apertus", ACTIVATION_XIELU},
};

static int check_gguf_architecture(source *s, const gguf_file *g, medrun_error *e) {
    char type[32];
    for (size_t i = 0; i < 3; i++) {
        if (strcmp(g->architecture, gguf_architectures[i].name)) continue;
        s->architecture = gguf_architectures[i].name;
        s->config.activation = gguf_architectures[i].activation;
        s->config.qk_norm = s->config.activation == ACTIVATION_XIELU;
    }
    if (!s->architecture)
        return wrong_key(g, "general.architecture", find_value(g, "general.architecture"),
                         "llama, arcee or apertus; this medrun knows no other", e);
    if (read_string(g, "general.type", type, sizeof type, e)) return e->code;
    if (!strcmp(type, "adapter"))
        return refuse(e, "%s: found a LoRA adapter, which is no model by itself; llama-export-lora "
                      "merges it with its model", g->path);
    if (type[0] && strcmp(type, "model"))
        return wrong_key(g, "general.type", find_value(g, "general.type"), "\"model\"", e);
    return s->n_tensors ? MEDRUN_OK : refuse(e, "%s: found no tensors, wanted weights; this file "
                                             "has only a vocabulary (--tokenizer-only)", g->path);
}

/* The ranges are those of section 12 of medrun.c, where the same numbers are read again. */
static int read_gguf_sizes(const gguf_file *g, model_config *c, medrun_error *e) {
    double head = 0, value = 0, rotated = 0;
    const struct { const char *key; double min, max; int *to; bool optional; } fields[] = {
        {".embedding_length", 16, 1 << 16, &c->hidden_size, false},
        {".block_count", 1, 1024, &c->n_layers, false},
        {".attention.head_count", 1, 1024, &c->n_heads, false},
        {".attention.head_count_kv", 1, 1024, &c->n_kv_heads, true},
        {".feed_forward_length", 16, 1 << 20, &c->ffn_size, false},
        {".context_length", 1, 1 << 24, &c->max_positions, false},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        double n = 0;
        if (read_number(g, fields[i].key, fields[i].min, fields[i].max, true, &n, e))
            return e->code;
        if (!(n > 0) && !fields[i].optional)
            return wrong_key(g, fields[i].key, NULL, "a whole number", e);
        *fields[i].to = (int)n;
    }
    if (!c->n_kv_heads) c->n_kv_heads = c->n_heads;
    if (c->n_heads % c->n_kv_heads)
        return refuse(e, "%s: key %s.attention.head_count_kv: found %d, wanted a divisor of "
                      "head_count %d", g->path, g->architecture, c->n_kv_heads, c->n_heads);
    if (read_number(g, ".attention.key_length", 16, 1024, true, &head, e) ||
        read_number(g, ".attention.value_length", 16, 1024, true, &value, e) ||
        read_number(g, ".rope.dimension_count", 1, 1024, true, &rotated, e)) return e->code;
    double whole = (double)c->hidden_size / c->n_heads;
    if (!(head > 0)) head = whole;
    if (differ(head, floor(head)) || head > (double)MAX_HEAD_DIM ||
        differ(head, value > 0 ? value : whole) || (rotated > 0 && differ(head, rotated)))
        return refuse(e, "%s: found heads of key_length %g, value_length %g, rope.dimension_count "
                      "%g, wanted the same whole number, which is embedding_length / head_count = "
                      "%g where they are not given", g->path, head, value, rotated, whole);
    c->head_dim = (int)head;
    return check_multiples(c, g->path, e);
}

/* llama.cpp's converter writes llama3 scaling as a table of divisors of the frequencies F. Is this
 * the table for these numbers? Computed in float as there. */
static bool is_llama3_table(const float *table, const float *f, int n, float original,
                            float factor) {
    for (int i = 0; i < n; i++) {
        float wave = 6.2831853071795865f / f[i], smooth = (original / wave - 1) / 3;
        float d = wave < original / 4 ? 1 : wave > original ? factor :
                  1 / ((1 - smooth) / factor + smooth);
        if (!(fabsf(table[i] - d) <= 1e-6f * d)) return false;
    }
    return true;
}

/* With the numbers themselves a GGUF file gives the same bits as the folder it was made from. The
 * converter knows only these frequency factors and, mostly, this original context. */
static void recognise_llama3(source *s, const float *table, double original) {
    model_config *c = &s->config;
    float f[MAX_HEAD_DIM / 2], factor = 1;
    int n = c->head_dim / 2;
    rope_frequencies(c, f);
    for (int i = 0; i < n; i++) factor = fmaxf(factor, table[i]);
    for (int k = -2; k < 25 && c->rope_type == ROPE_NONE && factor > 1; k++) {
        double context = k == -2 ? 8192 : k == -1 ? original : ldexp(1, k);
        if (!(context > 0) || !is_llama3_table(table, f, n, (float)context, factor)) continue;
        c->rope_type = ROPE_LLAMA3, c->rope_factor = (double)factor, c->rope_original = context;
        c->rope_low = 1, c->rope_high = 4;
    }
    if (c->rope_type == ROPE_LLAMA3) return;
    c->rope_type = ROPE_DIVISORS;
    memcpy(c->rope_divisors, table, (size_t)n * sizeof *table);
    add_note(s, "rope_freqs.weight is not the table of a llama3 scaling: it is used as it stands");
}

/* rope_freqs.weight, if there is one. */
static int read_rope_table(source *s, const gguf_file *g, double original, medrun_error *e) {
    model_config *c = &s->config;
    float table[MAX_HEAD_DIM / 2];
    size_t n = (size_t)c->head_dim / 2, bytes = n * sizeof *table;
    source_tensor *t = find_tensor(s, "rope_freqs.weight");
    if (!t) return MEDRUN_OK;
    t->used = true;
    if (c->rope_type != ROPE_NONE || t->dtype != SOURCE_F32 || t->rank != 1 || t->shape[0] != n)
        return refuse(e, "%s: tensor rope_freqs.weight: found a table of %llu %s, wanted %zu F32 "
                      "and no other scaling", g->path, (unsigned long long)t->shape[0],
                      source_types[t->dtype].name, n);
    if (read_at(s->files[t->file].fd, table, bytes, t->begin, g->path, e)) return e->code;
    for (size_t i = 0; i < n; i++)
        if (!(table[i] >= 1e-6f && table[i] <= 1e6f))
            return refuse(e, "%s: tensor rope_freqs.weight: found %g, wanted 1e-6 to 1e6", g->path,
                          (double)table[i]);
    return recognise_llama3(s, table, original), MEDRUN_OK;
}

/* What llama.cpp reads for yarn, and transformers' attention_factor, which its converter keeps. */
static int read_gguf_yarn(source *s, const gguf_file *g, rope *r, medrun_error *e) {
    double ignored, *n = r->number;
    const struct { const char *key; double min, max, *to; } fields[] = {
        {".rope.scaling.yarn_beta_fast", 1e-3, 1e6, &n[BETA_FAST]},
        {".rope.scaling.yarn_beta_slow", 1e-3, 1e6, &n[BETA_SLOW]},
        {".rope.scaling.yarn_attn_factor", 1e-3, 1e3, &n[ATTENTION]},
        {".rope.scaling.yarn_ext_factor", 1, 1, &ignored},
        {".rope.scaling.attn_factor", 1, 1, &ignored},
        {".rope.scaling.yarn_log_multiplier", 0, 0, &ignored},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (read_number(g, fields[i].key, fields[i].min, fields[i].max, false, fields[i].to, e))
            return e->code;
    if (n[ATTENTION] > 0)
        add_note(s, "YaRN attention factor %g is used, as the file says and transformers computes; "
                 "llama.cpp does not read it", n[ATTENTION]);
    return MEDRUN_OK;
}

static int read_gguf_rope(source *s, const gguf_file *g, medrun_error *e) {
    model_config *c = &s->config;
    rope r = {.theta = 10000, .truncate = true};
    char type[16];
    double factor = 0, *original = &r.number[ORIGINAL];
    if (read_number(g, ".rope.freq_base", 1.001, 1e12, false, &r.theta, e) ||
        read_number(g, ".rope.scale_linear", 0, 1e6, false, &factor, e) ||
        read_number(g, ".rope.scaling.factor", 0, 1e6, false, &factor, e) ||
        read_number(g, ".rope.scaling.original_context_length", 1, 1e9, false, original, e) ||
        read_string(g, ".rope.scaling.type", type, sizeof type, e)) return e->code;
    bool none = !strcmp(type, "none"), linear = !type[0] || !strcmp(type, "linear");
    bool yarn = !strcmp(type, "yarn");
    if (!none && !yarn && (!linear || (factor > 0 && differ(factor, 1))))
        return refuse(e, "%s: key %s.rope.scaling.type: found \"%s\" with factor %g, wanted none "
                      "or yarn; this medrun computes no other positions", g->path, g->architecture,
                      type[0] ? type : "linear", factor);
    if (yarn && !(factor >= 1))
        return refuse(e, "%s: key %s.rope.scaling.factor: found %g, wanted at least 1", g->path,
                      g->architecture, factor);
    if (s->yarn_factor > 0 && !yarn)
        return fail(e, MEDRUN_USAGE, "--yarn-factor: %s has no yarn scaling", g->path);
    c->rope_theta = r.theta, c->rope_type = yarn ? ROPE_YARN : ROPE_NONE;
    r.number[FACTOR] = factor;
    if (yarn && read_gguf_yarn(s, g, &r, e)) return e->code;
    if (yarn) set_yarn(s, &r, c);
    return read_rope_table(s, g, *original, e);
}

/* llama.cpp computes no window for llama, so its converter writes none: that a model has one must
 * be said by who knows it. */
static int read_window(source *s, const gguf_file *g, medrun_error *e) {
    const model_config *c = &s->config;
    double window = -1;
    char model[16];
    if (read_number(g, ".attention.sliding_window", 0, 1 << 24, true, &window, e) ||
        read_string(g, "tokenizer.ggml.model", model, sizeof model, e)) return e->code;
    if (s->sliding_window >= 0) window = s->sliding_window;
    else if (window < 0 && c->max_positions == 32768 && !differ(c->rope_theta, 10000) &&
             !strcmp(model, "llama"))
        add_note(s, "this may be Mistral 7B v0.1 or made from it, whose tokens see 4096 others at "
                 "most; GGUF does not tell. It matters only past 4096 tokens: --sliding-window "
                 "4096 computes as transformers does, 0 as llama.cpp does and as is done now");
    return s->config.sliding_window = window > 0 ? (int)window : 0, MEDRUN_OK;
}

/* Four arrays over the layers, which the converter writes without the architecture's name. */
static int read_gguf_xielu(source *s, const gguf_file *g, medrun_error *e) {
    static const char *const keys[4] = {".xielu.alpha_p", ".xielu.alpha_n", ".xielu.beta",
                                        ".xielu.eps"};
    uint64_t n = (uint64_t)s->config.n_layers;
    s->xielu = new_array((size_t)n, 4 * sizeof *s->xielu);
    if (!s->xielu) return out_of_memory(e, (size_t)n * 16);
    for (size_t k = 0; k < 4; k++) {
        const gguf_value *v = find_value(g, keys[k] + 1);
        if (!v) v = find_value(g, keys[k]);
        if (!v || v->type != GGUF_F32 || (v->array && v->n != n))
            return wrong_key(g, keys[k] + 1, v, "an f32 for each layer", e);
        for (uint64_t i = 0; i < n; i++)
            s->xielu[4 * i + k] = (float)number_at(v, v->array ? i : 0);
    }
    return MEDRUN_OK;
}

/* A key of the architecture that was not read, and is not 0 or false, may change what the model
 * computes: experts, scales, soft caps, ... */
static int check_unread(const gguf_file *g, medrun_error *e) {
    static const char *const harmless[] = {".vocab_size", ".tensor_data_layout",
                                           ".rope.scaling.finetuned", ".attention.causal"};
    size_t n = strlen(g->architecture);
    for (size_t i = 0; i < 4; i++) find_value(g, harmless[i]);
    for (size_t i = 0; i < g->n_values; i++) {
        const gguf_value *v = &g->values[i];
        if (v->used || v->key.n <= n || memcmp(v->key.p, g->architecture, n) || v->key.p[n] != '.')
            continue;
        if (!v->array && is_number(v) && !differ(number_at(v, 0), 0)) continue;
        return refuse(e, "%s: key %.*s: found %s; this medrun does not compute with it", g->path,
                      shown_length(v->key), (const char *)v->key.p, show_value(v).text);
    }
    return MEDRUN_OK;
}

/* As many as the embedding has rows, where some are behind the last token, but not many. */
static int count_rows(const source *s, uint64_t tokens) {
    const source_tensor *t = find_tensor(s, "token_embd.weight");
    uint64_t rows = t && t->rank == 2 ? t->shape[0] : 0, more = rows > tokens ? rows - tokens : 0;
    return (int)(are_fillers(more, rows) ? tokens + more : tokens);
}

static int read_gguf_config(source *s, const gguf_file *g, medrun_error *e) {
    static const char eps_key[] = ".attention.layer_norm_rms_epsilon";
    model_config *c = &s->config;
    const gguf_value *tokens = find_value(g, "tokenizer.ggml.tokens");
    double eps = 0;
    if (check_gguf_architecture(s, g, e) || read_gguf_sizes(g, c, e) ||
        read_number(g, eps_key, 1e-12, 1, false, &eps, e) || read_gguf_rope(s, g, e) ||
        read_window(s, g, e)) return e->code;
    if (!(eps > 0)) return wrong_key(g, eps_key, NULL, "a number", e);
    if (!tokens || !tokens->array || tokens->n > 1 << 22)
        return wrong_key(g, "tokenizer.ggml.tokens", tokens, "a vocabulary", e);
    c->vocab_size = count_rows(s, tokens->n);
    c->norm_eps = (float)eps, c->tied = !find_tensor(s, "output.weight");
    if (c->activation == ACTIVATION_XIELU && read_gguf_xielu(s, g, e)) return e->code;
    return check_unread(g, e);
}

/* ---- tokenizer ----------------------------------------------------------------------------- */

/* What token_tables points to. */
typedef struct {
    char model[32], pre[32];
    span *tokens, *merges;
    int32_t *types;
    float *scores;
} table_store;

/* An array of strings, which stay in the file. Missing: NULL. */
static int read_strings(const gguf_file *g, const char *key, span **out, size_t *n,
                        medrun_error *e) {
    const gguf_value *v = find_value(g, key);
    if (!v) return MEDRUN_OK;
    if (!v->array || v->type != GGUF_STRING || v->n > MAX_GGUF_STRINGS)
        return wrong_key(g, key, v, "an array of strings", e);
    reader r = {v->data, SIZE_MAX / 2, 0, false};
    *n = (size_t)v->n;
    if (!(*out = new_array(*n, sizeof **out))) return out_of_memory(e, *n * sizeof **out);
    for (size_t i = 0; i < *n; i++) (*out)[i] = take_string(&r);
    return MEDRUN_OK;
}

/* An array of N numbers of TYPE, copied to OUT, whose items have the same size. Missing: NULL. */
static int read_array(const gguf_file *g, const char *key, uint32_t type, size_t n, void *out,
                      medrun_error *e) {
    const gguf_value *v = find_value(g, key);
    void **to = out;
    if (!v) return MEDRUN_OK;
    if (!v->array || v->type != type || v->n != n)
        return wrong_key(g, key, v, "one number for each token", e);
    if (!(*to = new_array(n, gguf_sizes[type]))) return out_of_memory(e, n * gguf_sizes[type]);
    memcpy(*to, v->data, n * gguf_sizes[type]);
    return MEDRUN_OK;
}

static int read_id(const gguf_file *g, const char *key, size_t n, int64_t *out, medrun_error *e) {
    double id = -1;
    int code = read_number(g, key, 0, (double)n - 1, true, &id, e);
    if (id >= 0) *out = (int64_t)id;
    return code;
}

/* Which pattern cuts the text before byte-level BPE: what --pre says, or the file, or its
 * vocabulary. */
static int choose_pattern(source *s, table_store *m, token_tables *t, medrun_error *e) {
    bool bytes = !strcmp(m->model, "gpt2"), unnamed = !m->pre[0] || !strcmp(m->pre, "default");
    if (s->pre && (!bytes || !find_pattern(s->pre)))
        return fail(e, MEDRUN_USAGE, "--pre: found %s, wanted " GPT2_PATTERNS ", and only for "
                    "byte-level BPE", s->pre);
    if (s->pre) snprintf(m->pre, sizeof m->pre, "%s", s->pre);
    else if (bytes && unnamed && is_llama3_vocabulary(m->tokens, t->n)) {
        snprintf(m->pre, sizeof m->pre, "llama-bpe");
        add_note(s, "the file does not name its pre-tokenizer; its vocabulary is that of Llama 3, "
                 "so Llama 3's is used");
    }
    const gpt2_pattern *pattern = find_pattern(m->pre);
    t->add_bos = !bytes || !pattern || pattern->add_bos;
    return MEDRUN_OK;
}

static int read_tables(source *s, const gguf_file *g, table_store *m, token_tables *t,
                       medrun_error *e) {
    bool add_eos = false;
    *t = (token_tables){.bos = -1, .eos = -1, .add_space_prefix = true};
    if (read_string(g, "tokenizer.ggml.model", m->model, sizeof m->model, e) ||
        read_string(g, "tokenizer.ggml.pre", m->pre, sizeof m->pre, e) ||
        read_strings(g, "tokenizer.ggml.tokens", &m->tokens, &t->n, e) ||
        choose_pattern(s, m, t, e) ||
        read_strings(g, "tokenizer.ggml.merges", &m->merges, &t->n_merges, e) ||
        read_array(g, "tokenizer.ggml.token_type", GGUF_I32, t->n, &m->types, e) ||
        read_array(g, "tokenizer.ggml.scores", GGUF_F32, t->n, &m->scores, e)) return e->code;
    if (read_id(g, "tokenizer.ggml.bos_token_id", t->n, &t->bos, e) ||
        read_id(g, "tokenizer.ggml.eos_token_id", t->n, &t->eos, e) ||
        read_switch(g, "tokenizer.ggml.add_bos_token", &t->add_bos, e) ||
        read_switch(g, "tokenizer.ggml.add_space_prefix", &t->add_space_prefix, e) ||
        read_switch(g, "tokenizer.ggml.add_eos_token", &add_eos, e)) return e->code;
    if (add_eos)
        return refuse(e, "%s: key tokenizer.ggml.add_eos_token: found true, wanted false", g->path);
    t->model = m->model[0] ? m->model : NULL, t->pre = m->pre[0] ? m->pre : NULL;
    t->tokens = m->tokens, t->merges = m->merges, t->types = m->types, t->scores = m->scores;
    return MEDRUN_OK;
}

static int read_gguf_tokenizer(source *s, const gguf_file *g, medrun_error *e) {
    source_tokenizer t = {0};
    table_store m = {0};
    token_tables tables;
    if (!read_tables(s, g, &m, &tables, e) && !tokenizer_from_tables(&t, &tables, g->path, e) &&
        (!s->config.vocab_size || !fill_up(s, &t, (size_t)s->config.vocab_size, e)))
        finish_tokenizer(&t, &s->tokenizer, g->path, e);
    s->eos = t.eos;
    free_tokenizer(&t);
    free(m.tokens);
    free(m.merges);
    free(m.types);
    free(m.scores);
    return e->code;
}

/* ---- chat, names --------------------------------------------------------------------------- */

/* Greedy, unless the file says otherwise, as with a folder's generation_config.json. */
static int read_gguf_sampling(source *s, const gguf_file *g, medrun_error *e) {
    source_sampling *p = &s->sampling;
    double top_k = (double)default_sampling.top_k;
    *p = default_sampling;
    p->temperature = 0;
    if (read_number(g, "general.sampling.temp", 0, 100, false, &p->temperature, e) ||
        read_number(g, "general.sampling.top_p", 0, 1, false, &p->top_p, e) ||
        read_number(g, "general.sampling.min_p", 0, 1, false, &p->min_p, e) ||
        read_number(g, "general.sampling.top_k", 0, 1 << 24, true, &top_k, e) ||
        read_number(g, "general.sampling.penalty_repeat", 0.01, 100, false, &p->repeat_penalty, e))
        return e->code;
    static const char *const keys[] = {"temp", "top_p", "top_k"};
    for (size_t i = 0; i < 3; i++) {
        char key[40];
        snprintf(key, sizeof key, "general.sampling.%s", keys[i]);
        p->given |= find_value(g, key) != NULL;
    }
    return p->top_k = (int64_t)top_k, MEDRUN_OK;
}

static int read_gguf_chat(source *s, const gguf_file *g, const char *template_name,
                          medrun_error *e) {
    static const char *const ends[] = {"eos", "eot", "eom"};
    const gguf_value *v = find_value(g, "tokenizer.chat_template");
    buffer jinja = {0};
    if (v && (v->array || is_number(v)))
        return wrong_key(g, "tokenizer.chat_template", v, "a string", e);
    span text = v ? take_string(&(reader){v->data, SIZE_MAX / 2, 0, false}) : (span){NULL, 0};
    buffer_add(&jinja, text.p, text.n);
    if (jinja.failed) out_of_memory(e, text.n);
    else choose_template(s, &jinja, template_name, e);
    buffer_free(&jinja);
    for (size_t i = 0; !e->code && i < 3; i++) {
        char key[48];
        int64_t id = -1;
        snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id", ends[i]);
        if (!read_id(g, key, (size_t)s->config.vocab_size, &id, e) && id >= 0)
            add_stop(s, g->path, (double)id, e);
    }
    return e->code ? e->code : finish_stops(s, e);
}

/* The model's name is the file's where it has none. */
static int read_gguf_names(source *s, const gguf_file *g, medrun_error *e) {
    char name[sizeof s->licence];
    if (read_string(g, "general.name", s->name, sizeof s->name, e) ||
        read_string(g, "general.license", s->licence, sizeof s->licence, e) ||
        read_string(g, "general.license.name", name, sizeof name, e)) return e->code;
    if (!strcmp(s->licence, "other") && name[0]) memcpy(s->licence, name, sizeof name);
    if (s->name[0]) return MEDRUN_OK;
    snprintf(s->name, sizeof s->name, "%.127s", s->files->name);
    size_t n = strlen(s->name);
    if (n > 5 && !strcmp(s->name + n - 5, ".gguf")) s->name[n - 5] = 0;
    return MEDRUN_OK;
}

static int open_gguf_source(source *s, const char *path, const char *template_name,
                            medrun_error *e) {
    gguf_file g = {0};
    if (!open_gguf(s, &g, path, e) && !read_gguf_config(s, &g, e) &&
        !read_gguf_tokenizer(s, &g, e) && !read_gguf_chat(s, &g, template_name, e) &&
        !read_gguf_names(s, &g, e) && !read_gguf_sampling(s, &g, e)) finish_sampling(s);
    close_gguf(&g);
    return e->code;
}

/* The tokenizer alone, also of a file that has nothing else. */
static int open_gguf_tokenizer(source *s, const char *path, medrun_error *e) {
    gguf_file g = {0};
    if (!open_gguf(s, &g, path, e)) read_gguf_tokenizer(s, &g, e);
    close_gguf(&g);
    return e->code;
}
