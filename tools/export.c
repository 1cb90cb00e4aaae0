/* medrun-export - makes a medrun checkpoint from a Hugging Face folder or a GGUF file.
 * MIT licence, see LICENSE.
 *
 *     cc -O2 -o medrun-export tools/export.c -lm -lpthread
 *     medrun-export SOURCE OUT.mdr --type int8
 *
 * A source gives three things: a config, named tensors and a tokenizer. Everything in it is checked
 * before anything is written: what is not known to be right is refused, with file, field, what was
 * found and what was wanted. Then the weights stream through, a panel of 16 rows at a time, many
 * tensors at once, into OUT.partial; the engine opens that file and computes the proofs; the file
 * is read again, hash by hash, and only then gets its name.
 *
 *  1 Files         a folder's files, JSON without doubts
 *  2 Config        config.json and generation_config.json
 *  3 Tokenizer     tokenizer.json, tokenizer.model or tables -> tokenizer.bin
 *  4 Chat          template, stop ids, licence
 *  5 Safetensors   a strict parser
 *  6 GGUF          the other kind of source, and how its blocks are decoded
 *  7 Plan          which tensor of the source becomes which section; the header
 *  8 Proofs        texts, conversations and prompts with what they must give
 *  9 Writing       sections on all threads, progress, Ctrl-C
 * 10 Calibration   int4's errors made good, by what is seen on a text
 * 11 Finishing     proofs, reading again, the name
 * 12 Commands      options, --dry-run, main
 *
 * Tests: tests/20_export.c, 21_gguf.c. */

#ifndef MEDRUN_EXPORT           /* tests/all_export.c includes it for each test file */
#define MEDRUN_EXPORT
#define MEDRUN_NO_MAIN
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#ifdef MEDRUN_KERNELS_APART
#include "kernels.h"
#endif
#ifndef _WIN32
#include <sys/statvfs.h>
#endif
#include "options.c"
#include "files.c"
#include "read.c"
#include "write.c"
#include "walk.c"
#include "export_int4.c"

/* ============================================================================================
 * 1 Files: a folder's files, JSON without doubts
 * ============================================================================================ */

/* What most of this file does with most of what it can be given. */
#define refuse(e, ...) fail(e, MEDRUN_BAD_FILE, __VA_ARGS__)

enum { PATH_BYTES = 4096, JSON_BYTES = 64 << 20, MAX_SHARDS = 512, READ_BYTES = 1 << 20 };

/* A file the checkpoint is made from, for its provenance. */
typedef struct {
    char name[256];             /* within the folder                                           */
    uint64_t bytes;
    uint8_t digest[32];
    int fd;                     /* of a shard of weights; else -1                              */
    uint64_t device, inode;
} source_file;

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
    bool given;                 /* by the model's files                                        */
} source_sampling;

/* What any kind of source gives; only the functions that fill it know which kind it is. */
typedef struct {
    const char *folder;
    const char *description;    /* what describes the model: config.json or the metadata       */
    const char *architecture;   /* llama, mistral, arcee, apertus                              */
    bool gguf;                  /* tensors have GGUF's names                                   */
    char own_folder[PATH_BYTES];            /* a GGUF file's                                   */
    char name[128];             /* what the source calls itself, or ""                         */
    source_file *files;
    size_t n_files, files_cap;
    source_tensor *tensors;     /* sorted by name once they are all there                      */
    size_t n_tensors, tensors_cap;
    model_config config;
    buffer tokenizer;           /* the bytes of a tokenizer.bin                                */
    int32_t eos;                /* the tokenizer's, or -1                                      */
    const chat_template *chat;  /* NULL: unknown                                               */
    chat_template fitted;       /* a row of medrun's as this model has it, of which these are  */
    char bos[TOKENIZER_MAX_ADDED + 1];
    buffer system;
    int n_stops, stops[MEDRUN_MAX_STOPS];
    source_sampling sampling;
    char licence[128];
    const char *pre;            /* what --pre says, or NULL                                    */
    double yarn_factor;         /* what --yarn-factor says, or 0                               */
    int sliding_window;         /* what --sliding-window says, or -1                           */
    float *xielu;               /* (n_layers, 4) alpha_p, alpha_n, beta, eps; else NULL        */
    buffer notes;               /* what the user should know, a line each                      */
} source;

typedef struct {
    char path[PATH_BYTES];      /* for messages                                                */
    file_map map;
    json j;
} json_file;

/* ---- what only this program asks of the system --------------------------------------------- */

#ifndef _WIN32
/* Bytes that the disk of PATH, which is open as FD, has room for. 0, or -1. */
static int disk_room(int fd, const char *path, uint64_t *room) {
    struct statvfs fs;
    (void)path;
    if (fstatvfs(fd, &fs)) return -1;
    *room = (uint64_t)fs.f_bavail * fs.f_frsize;
    return 0;
}

/* Puts on the disk what was written, and lets memory forget it, as far as the system does that. */
static int settle_file(int fd) {
    if (sync_file(fd)) return -1;
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    return 0;
}

/* PATH from the root without links, to be freed; or NULL. */
static char *full_path(const char *path) { return realpath(path, NULL); }

/* The / before the last name of PATH, or NULL. */
static char *last_slash(const char *path) { return strrchr(path, '/'); }
#else
static ssize_t pread(int fd, void *to, size_t n, off_t at) {
    OVERLAPPED o = {.Offset = (DWORD)at, .OffsetHigh = (DWORD)(at >> 32)};
    DWORD got = 0, most = n < 1 << 30 ? (DWORD)n : 1 << 30;
    if (ReadFile((HANDLE)_get_osfhandle(fd), to, most, &got, &o)) return (ssize_t)got;
    return GetLastError() == ERROR_HANDLE_EOF ? 0 : windows_failed();
}

static ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
    OVERLAPPED o = {.Offset = (DWORD)at, .OffsetHigh = (DWORD)(at >> 32)};
    DWORD put = 0, most = n < 1 << 30 ? (DWORD)n : 1 << 30;
    bool done = WriteFile((HANDLE)_get_osfhandle(fd), from, most, &put, &o);
    return done ? (ssize_t)put : windows_failed();
}

static int disk_room(int fd, const char *path, uint64_t *room) {
    wchar_t wide[WIDE_PATH];
    wchar_t *name = wide_path(path, wide);
    ULARGE_INTEGER bytes;
    (void)fd;
    if (!name) return -1;
    wcsrchr(name, '\\')[1] = 0;
    if (!GetDiskFreeSpaceExW(name, &bytes, NULL, NULL)) return windows_failed();
    *room = bytes.QuadPart;
    return 0;
}

static int settle_file(int fd) { return sync_file(fd); }

static char *full_path(const char *path) {
    wchar_t wide[WIDE_PATH];
    wchar_t *name = wide_path(path, wide);
    size_t n = name ? wcslen(name) : 0;
    if (n && name[n - 1] == '\\') name[n - 1] = 0;
    return name ? utf8_of(name) : NULL;
}

static char *last_slash(const char *path) {
    char *a = strrchr(path, '/'), *b = strrchr(path, '\\');
    return !a || (b && b > a) ? b : a;
}
#endif

/* The first N bytes of a file, or all it has; -1 on failure. */
static ssize_t read_start(int fd, void *to, size_t n) {
    ssize_t got;
    do got = pread(fd, to, n, 0);
    while (got < 0 && errno == EINTR);
    return got;
}

/* ---- lists and files ----------------------------------------------------------------------- */

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
    return refuse(e, "%s: this path is too long", name);
}

/* Appends a line for the user. */
MEDRUN_PRINTF_LIKE(2, 3)
static void add_note(source *s, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    make_safe(text);
    buffer_printf(&s->notes, "note         %s\n", text);
}

static bool file_exists(const char *folder, const char *name) {
    char path[PATH_BYTES];
    file_facts there;
    if (join_path(path, folder, name, NULL)) return false;
    return !get_facts(path, -1, &there) || (errno != ENOENT && errno != ENOTDIR);
}

/* Adds a file to the provenance, with the digest of its bytes unless MAP is NULL. */
static int add_file(source *s, const char *name, const char *path, const file_map *map,
                    medrun_error *e) {
    file_facts facts;
    if (grow(&s->files, s->n_files, &s->files_cap, sizeof *s->files, e)) return e->code;
    if (get_facts(path, -1, &facts)) return cannot(e, MEDRUN_BAD_FILE, path, "open");
    source_file *f = &s->files[s->n_files++];
    *f = (source_file){.bytes = map ? map->n : facts.bytes, .fd = -1,
                       .device = facts.device, .inode = facts.inode};
    snprintf(f->name, sizeof f->name, "%s", name);
    if (map) sha256_of(map->data, map->n, f->digest);
    return MEDRUN_OK;
}

/* Appends a text file of the folder to OUT and adds it to the provenance. */
static int read_text(source *s, const char *name, buffer *out, medrun_error *e) {
    char path[PATH_BYTES];
    file_map map;
    if (join_path(path, s->folder, name, e) || map_file(path, &map, e)) return e->code;
    if (map.n > JSON_BYTES)
        refuse(e, "%s: found %zu bytes, wanted at most %d", path, map.n, JSON_BYTES);
    else if (!add_file(s, name, path, &map, e)) buffer_add(out, map.data, map.n);
    unmap_file(&map);
    return out->failed ? out_of_memory(e, out->n) : e->code;
}

/* ---- JSON: showing ------------------------------------------------------------------------- */

/* The value of KEY, JSON_NONE also when it is null: Hugging Face writes null for "not set". */
static uint32_t given(const json *j, uint32_t v, const char *key) {
    uint32_t f = json_get(j, v, key);
    return json_is_type(j, f, JSON_NULL) ? JSON_NONE : f;
}

/* A whole number without sign, point or exponent, exactly. */
static bool json_size(const json *j, uint32_t v, uint64_t *out) {
    *out = 0;
    if (!json_is_type(j, v, JSON_NUMBER)) return false;
    for (const char *p = j->text + j->nodes[v].start; p < j->text + j->nodes[v].end; p++) {
        if (*p < '0' || *p > '9' || *out > (UINT64_MAX - 9) / 10) return false;
        *out = *out * 10 + (uint64_t)(*p - '0');
    }
    return true;
}

/* A value as it stands in the file, without white space and shortened, for messages. */
typedef struct { char text[120]; } shown;

static shown show(const json *j, uint32_t v) {
    static const char *const words[] = {"null", "false", "true"};
    shown s = {"nothing"};
    size_t n = 0;
    if (v == JSON_NONE) return s;
    if (json_typeof(j, v) <= JSON_TRUE)
        return snprintf(s.text, sizeof s.text, "%s", words[json_typeof(j, v)]), s;
    const char *p = j->text + j->nodes[v].start, *end = j->text + j->nodes[v].end;
    bool string = json_is_type(j, v, JSON_STRING);
    for (; p < end && n < sizeof s.text - 5; p++)
        if (string || !memchr(" \t\r\n", *p, 4)) s.text[n++] = *p;
    n -= utf8_unfinished((const uint8_t *)s.text, n);
    snprintf(s.text + n, sizeof s.text - n, "%s", p < end ? "..." : "");
    return s;
}

/* Do two values stand in the file with the same letters? */
static bool same_text(const json *j, uint32_t a, uint32_t b) {
    const json_node *x = &j->nodes[a], *y = &j->nodes[b];
    size_t n = x->end - x->start;
    return n == y->end - y->start && !memcmp(j->text + x->start, j->text + y->start, n);
}

static int wrong_field(const json_file *f, const char *field, uint32_t v, const char *wanted,
                       medrun_error *e) {
    return refuse(e, "%s: field %s: found %s, wanted %s", f->path, field, show(&f->j, v).text,
                  wanted);
}

/* The check of most functions below: unless COND holds, field FIELD with value V is wrong. */
#define WANT(cond, f, field, v, wanted) \
    do { if (!(cond)) return wrong_field(f, field, v, wanted, e); } while (0)

/* Fields that may be missing: then *OUT keeps its value. */
static int read_bool(const json_file *f, uint32_t v, const char *key, bool *out, medrun_error *e) {
    uint32_t b = given(&f->j, v, key);
    if (b == JSON_NONE) return MEDRUN_OK;
    WANT(json_is_type(&f->j, b, JSON_TRUE) || json_is_type(&f->j, b, JSON_FALSE), f, key, b,
         "true or false");
    return *out = json_is_type(&f->j, b, JSON_TRUE), MEDRUN_OK;
}

static int read_real(const json_file *f, uint32_t v, const char *key, double min, double max,
                     double *out, medrun_error *e) {
    if (given(&f->j, v, key) == JSON_NONE || e->code) return e->code;
    double value = json_real(&f->j, v, f->path, key, min, max, false, e);
    if (!e->code) *out = value;
    return e->code;
}

static int read_whole(const json_file *f, uint32_t v, const char *key, int64_t min, int64_t max,
                      int64_t *out, medrun_error *e) {
    if (given(&f->j, v, key) == JSON_NONE || e->code) return e->code;
    int64_t value = json_int(&f->j, v, f->path, key, min, max, e);
    if (!e->code) *out = value;
    return e->code;
}

/* ---- JSON: opening ------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *p;
    size_t n;
} span;

/* By bytes; shorter first where one begins the other. Also sorts what begins with a span. */
static int compare_spans(const void *a, const void *b) {
    const span *x = a, *y = b;
    size_t n = x->n < y->n ? x->n : y->n;
    int order = n ? memcmp(x->p, y->p, n) : 0;
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

/* A key that stands twice in an object means that two readers may see two different files. */
static int check_keys(const json *j, uint32_t v, const char *path, medrun_error *e) {
    size_t n = children(j, v) / 2, i = 0;
    if (n < 2) return MEDRUN_OK;
    buffer text = {0};
    span *keys = new_array(n, sizeof *keys);
    for EACH_KEY(j, v, c) {
        size_t before = text.n;
        json_unescape(j, c, &text);
        if (keys) keys[i++].n = text.n - before;
    }
    if (!keys || text.failed) out_of_memory(e, n * sizeof *keys);
    const uint8_t *p = text.data;
    for (i = 0; !e->code && i < n; p += keys[i++].n) keys[i].p = p;
    if (!e->code) qsort(keys, n, sizeof *keys, compare_spans);
    for (i = 1; !e->code && i < n; i++)
        if (!compare_spans(&keys[i - 1], &keys[i]))
            refuse(e, "%s: field %.*s: found twice in one object, wanted once", path,
                   keys[i].n < 80 ? (int)keys[i].n : 80, keys[i].n ? (const char *)keys[i].p : "");
    free(keys);
    buffer_free(&text);
    return e->code;
}

/* The parser stops at NaN and Infinity, which are no JSON but which Python writes: name them. */
static int json_failure(const json *j, size_t n, const char *path, const medrun_error *why,
                        medrun_error *e) {
    static const char *const words[] = {"NaN", "Infinity", "-Infinity"};
    const json_node *last = j->n > 1 ? &j->nodes[j->n - 1] : NULL;
    for (size_t i = 0; last && i < 3; i++) {
        size_t len = strlen(words[i]);
        if (n - last->start < len || memcmp(j->text + last->start, words[i], len)) continue;
        return refuse(e, "%s: field %s: found %s, wanted a finite number", path,
                      show(j, (uint32_t)j->n - 2).text, words[i]);
    }
    return fail(e, why->code, "%s: %s; download it again", path, why->text);
}

/* Parses TEXT, an object, and refuses doubtful ones; on failure J is free again. */
static int parse_json(json *j, const char *text, size_t n, const char *path, medrun_error *e) {
    medrun_error why = {0};
    if (json_parse(j, text, n, &why)) json_failure(j, n, path, &why, e);
    for (uint32_t v = 0; !e->code && v < j->n; v++)
        if (json_typeof(j, v) == JSON_OBJECT) check_keys(j, v, path, e);
    if (!e->code && !json_is_type(j, 0, JSON_OBJECT))
        refuse(e, "%s: found %s, wanted an object", path, show(j, 0).text);
    if (e->code) json_free(j);
    return e->code;
}

static void close_json(json_file *f) {
    json_free(&f->j);
    unmap_file(&f->map);
}

/* Files that stand where others should: git without its large files, what the hub says to those
 * who may not have the file. */
#define GET_IT "fetch it with hf download, or by a link with /resolve/ in it, not /blob/"
#define LOG_IN "accept the model's conditions on its page, then hf auth login and hf download"
static const struct { const char *begin, *what, *way; } not_the_file[] = {
    {"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "the folder was cloned "
     "without its large files; `git lfs install` and `git lfs pull` in it fetch them"},
    {"# xet version", "a pointer of Git Xet", "hf download fetches the file itself"},
    {"<!DOCTYPE", "a web page", GET_IT}, {"<!doctype", "a web page", GET_IT},
    {"<html", "a web page", GET_IT}, {"<HTML", "a web page", GET_IT},
    {"Entry not found", "the hub's word that there is none", "look at the model's page for it"},
    {"Repository not found", "the hub's word that there is no such model", LOG_IN},
    {"Access to model", "the hub's refusal", LOG_IN},
    {"Invalid username or password", "the hub's refusal", LOG_IN},
    {"{\"error\":", "the hub's refusal", LOG_IN},
};

static int check_content(const char *path, const uint8_t *p, size_t n, medrun_error *e) {
    for (size_t i = 0; i < sizeof not_the_file / sizeof *not_the_file; i++) {
        size_t length = strlen(not_the_file[i].begin);
        if (n >= length && !memcmp(p, not_the_file[i].begin, length))
            return refuse(e, "%s: found %s in place of the file; %s", path, not_the_file[i].what,
                          not_the_file[i].way);
    }
    return MEDRUN_OK;
}

/* Maps and parses the file at f->path; an editor may have put a byte order mark before it. */
static int open_json_path(json_file *f, medrun_error *e) {
    if (map_file(f->path, &f->map, e)) return e->code;
    const uint8_t *p = f->map.data;
    size_t mark = f->map.n > 3 && !memcmp(p, "\xEF\xBB\xBF", 3) ? 3 : 0;
    if (f->map.n > 1 && (p[0] ^ p[1]) == 1 && p[0] >= 0xFE)
        refuse(e, "%s: found UTF-16, wanted UTF-8; an editor may have saved it so: save it as "
                  "UTF-8", f->path);
    else if (f->map.n > JSON_BYTES)
        refuse(e, "%s: found %zu bytes, wanted at most %d", f->path, f->map.n, JSON_BYTES);
    else if (!check_content(f->path, p, f->map.n, e))
        parse_json(&f->j, (const char *)p + mark, f->map.n - mark, f->path, e);
    if (e->code) close_json(f);
    return e->code;
}

/* Opens NAME of the folder and adds it to the provenance. A missing OPTIONAL file reads as if it
 * were an empty object. */
static int open_json(source *s, const char *name, bool optional, json_file *f, medrun_error *e) {
    *f = (json_file){0};
    if (join_path(f->path, s->folder, name, e)) return e->code;
    if (optional && !file_exists(s->folder, name)) return json_parse(&f->j, "{}", 2, e);
    if (open_json_path(f, e)) return e->code;
    if (add_file(s, name, f->path, &f->map, e)) close_json(f);
    return e->code;
}

/* ============================================================================================
 * 2 Config: config.json and generation_config.json
 *
 * Files of transformers 4 have rope_theta and rope_scaling, files of transformers 5 have
 * rope_parameters. Who looks for one spelling only takes the default theta for the other, silently;
 * so both are read, and where both stand they must say the same.
 * ============================================================================================ */

/* a != b, of which compilers warn for good reasons: here both were read from text. */
static bool differ(double a, double b) { return a < b || a > b; }

/* What is known of each architecture. A window of -1: the class knows none. */
static const struct {
    const char *class, *name, *hidden_act;
    int activation;
    int64_t window;             /* what the class assumes where the config says nothing        */
    bool qk_norm;
} architectures[] = {
    {"LlamaForCausalLM", "llama", "silu", ACTIVATION_SILU, -1, false},
    {"MistralForCausalLM", "mistral", "silu", ACTIVATION_SILU, 4096, false},
    {"ArceeForCausalLM", "arcee", "relu2", ACTIVATION_RELU2, -1, false},
    {"ApertusForCausalLM", "apertus", "xielu", ACTIVATION_XIELU, -1, true},
};
enum { N_CLASSES = sizeof architectures / sizeof *architectures };

/* The architecture names the code that made the weights; nothing else says it as surely. */
static int check_architecture(source *s, const json_file *f, medrun_error *e) {
    const json *j = &f->j;
    uint32_t list = given(j, 0, "architectures"), type = given(j, 0, "model_type");
    uint32_t activation = given(j, 0, "hidden_act");
    size_t i = 0;
    while (i < N_CLASSES && !(children(j, list) == 1 && json_is(j, list + 1,
                                                                architectures[i].class))) i++;
    WANT(i < N_CLASSES, f, "architectures", list, "one of LlamaForCausalLM, MistralForCausalLM, "
         "ArceeForCausalLM, ApertusForCausalLM; this medrun knows no other");
    WANT(type == JSON_NONE || json_is(j, type, architectures[i].name), f, "model_type", type,
         architectures[i].name);
    WANT(activation == JSON_NONE || json_is(j, activation, architectures[i].hidden_act), f,
         "hidden_act", activation, architectures[i].hidden_act);
    s->architecture = architectures[i].name;
    s->config.activation = architectures[i].activation;
    s->config.qk_norm = architectures[i].qk_norm;
    if (architectures[i].window < 0) return MEDRUN_OK;
    int64_t window = architectures[i].window;
    if (json_get(j, 0, "sliding_window") == JSON_NONE)
        add_note(s, "config.json has no sliding_window: %lld is used, transformers' default for %s",
                 (long long)window, s->architecture);
    else if (given(j, 0, "sliding_window") == JSON_NONE) window = 0;
    if (read_whole(f, 0, "sliding_window", 1, 1 << 24, &window, e)) return e->code;
    return s->config.sliding_window = (int)window, MEDRUN_OK;
}

/* All refusals of weights that another program has rounded read the same; BEFORE stands between the
 * path and the NAME of what told it. */
static int refuse_quantised(const char *path, const char *before, const char *name, const char *by,
                            medrun_error *e) {
    return refuse(e, "%s%s%s: found a model quantised by %s, wanted the one it was made from: "
                  "medrun quantises by itself (--type)", path, before, name, by);
}

/* What a config may say but this engine does not compute. */
static int check_unsupported(const json_file *f, medrun_error *e) {
    static const char *const unwanted[] = {"attention_bias", "mlp_bias", "post_norm"};
    static const char *const quantised[] = {"quantization_config", "quantization"};
    const json *j = &f->j;
    for (size_t i = 0; i < 2; i++) {            /* the latter is MLX's                           */
        uint32_t v = given(j, 0, quantised[i]), by = json_get(j, v, "quant_method");
        if (v == JSON_NONE) continue;
        return refuse_quantised(f->path, ": field ", quantised[i], by != JSON_NONE ?
                                show(j, by).text : i ? "MLX" : "another program", e);
    }
    uint32_t part = given(j, 0, "partial_rotary_factor"), norm = given(j, 0, "qk_norm");
    uint32_t before = given(j, 0, "torch_dtype"), now = given(j, 0, "dtype");
    for (size_t i = 0; i < 3; i++) {
        uint32_t v = given(j, 0, unwanted[i]);
        WANT(v == JSON_NONE || json_is_type(j, v, JSON_FALSE), f, unwanted[i], v,
             "false or nothing; this medrun does not compute with it");
    }
    WANT(norm == JSON_NONE || json_is_type(j, norm, JSON_TRUE), f, "qk_norm", norm,
         "true or nothing");
    WANT(part == JSON_NONE ||
         (json_is_type(j, part, JSON_NUMBER) && !differ(json_number(j, part), 1)), f,
         "partial_rotary_factor", part, "1");
    WANT(before == JSON_NONE || now == JSON_NONE || same_text(j, before, now), f, "torch_dtype",
         before, "the same as dtype; remove the wrong one");
    return MEDRUN_OK;
}

/* The ranges are those of section 12 of medrun.c, where the same numbers are read again. */
static int read_sizes(const json_file *f, model_config *c, medrun_error *e) {
    const struct { const char *key; int64_t min, max; int *to; bool optional; } fields[] = {
        {"vocab_size", 1, 1 << 22, &c->vocab_size, false},
        {"hidden_size", 16, 1 << 16, &c->hidden_size, false},
        {"num_hidden_layers", 1, 1024, &c->n_layers, false},
        {"num_attention_heads", 1, 1024, &c->n_heads, false},
        {"num_key_value_heads", 1, 1024, &c->n_kv_heads, true},
        {"head_dim", 16, 1024, &c->head_dim, true},
        {"intermediate_size", 16, 1 << 20, &c->ffn_size, false},
        {"max_position_embeddings", 1, 1 << 24, &c->max_positions, false},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (fields[i].optional && given(&f->j, 0, fields[i].key) == JSON_NONE) continue;
        *fields[i].to = (int)json_int(&f->j, 0, f->path, fields[i].key, fields[i].min,
                                      fields[i].max, e);
    }
    if (e->code) return e->code;
    if (!c->n_kv_heads) c->n_kv_heads = c->n_heads;
    WANT(c->n_heads % c->n_kv_heads == 0, f, "num_key_value_heads",
         given(&f->j, 0, "num_key_value_heads"), "a divisor of num_attention_heads");
    WANT(c->head_dim || c->hidden_size % c->n_heads == 0, f, "head_dim", JSON_NONE,
         "a number, as hidden_size is no multiple of num_attention_heads");
    if (!c->head_dim) c->head_dim = c->hidden_size / c->n_heads;
    return MEDRUN_OK;
}

/* ---- rotary positions ---------------------------------------------------------------------- */

enum { FACTOR, LOW, HIGH, ORIGINAL, BETA_FAST, BETA_SLOW, ATTENTION, MSCALE, MSCALE_ALL,
       N_ROPE_FIELDS };

/* What a block says. A number that is not given is 0, which also means that to transformers. */
typedef struct {
    int type;
    bool truncate;
    double theta, number[N_ROPE_FIELDS];
} rope;

static const struct { const char *key; double min, max; bool llama3, yarn; }
rope_fields[N_ROPE_FIELDS] = {
    {"factor", 1, 1e6, true, true},
    {"low_freq_factor", 1e-3, 1e6, true, false},
    {"high_freq_factor", 1e-3, 1e6, true, false},
    {"original_max_position_embeddings", 1, 1e9, true, true},
    {"beta_fast", 0, 1e6, false, true},
    {"beta_slow", 0, 1e6, false, true},
    {"attention_factor", 1e-3, 1e3, false, true},
    {"mscale", 0, 1e3, false, true},
    {"mscale_all_dim", 0, 1e3, false, true},
};

static bool same_scaling(const rope *a, const rope *b) {
    bool same = a->type == b->type && a->truncate == b->truncate;
    for (size_t i = 0; i < N_ROPE_FIELDS; i++) same = same && !differ(a->number[i], b->number[i]);
    return same;
}

/* One field of a block, key C. A field that is not known is an error: it might change every
 * position. */
static int read_rope_field(const json_file *f, uint32_t v, uint32_t c, rope *r, medrun_error *e) {
    const json *j = &f->j;
    bool llama3 = r->type == ROPE_LLAMA3, yarn = r->type == ROPE_YARN;
    if (json_is(j, c, "rope_type") || json_is(j, c, "type")) return MEDRUN_OK;
    if (json_is(j, c, "rope_theta"))
        return read_real(f, v, "rope_theta", 1.001, 1e12, &r->theta, e);
    if (json_is(j, c, "truncate") && yarn) return read_bool(f, v, "truncate", &r->truncate, e);
    for (size_t i = 0; i < N_ROPE_FIELDS; i++)
        if (json_is(j, c, rope_fields[i].key) &&
            ((llama3 && rope_fields[i].llama3) || (yarn && rope_fields[i].yarn)))
            return read_real(f, v, rope_fields[i].key, rope_fields[i].min, rope_fields[i].max,
                             &r->number[i], e);
    return refuse(e, "%s: field %s: found a field that rope_type %s does not have here; it may "
                  "change what the model computes", f->path, show(j, c).text, rope_names[r->type]);
}

static int read_rope_block(const json_file *f, uint32_t v, rope *r, medrun_error *e) {
    const json *j = &f->j;
    uint32_t type = given(j, v, "rope_type"), older = given(j, v, "type");
    if (type == JSON_NONE) type = older;
    WANT(older == JSON_NONE || same_text(j, type, older), f, "rope_type", type, "the same as type");
    WANT(type == JSON_NONE || json_is(j, type, "default") || json_is(j, type, "llama3") ||
         json_is(j, type, "yarn"), f, "rope_type", type, "default, llama3 or yarn; this medrun "
         "computes no other positions");
    r->truncate = true;
    r->type = json_is(j, type, "llama3") ? ROPE_LLAMA3 : json_is(j, type, "yarn") ? ROPE_YARN :
              ROPE_NONE;
    for EACH_KEY(j, v, c) if (read_rope_field(f, v, c, r, e)) return e->code;
    const double *n = r->number;
    WANT(r->type != ROPE_LLAMA3 || (n[FACTOR] > 0 && n[LOW] > 0 && n[HIGH] > 0 && n[ORIGINAL] > 0),
         f, "rope_type", type, "with llama3 all of factor, low_freq_factor, high_freq_factor, "
         "original_max_position_embeddings");
    WANT(r->type != ROPE_LLAMA3 || n[HIGH] > n[LOW], f, "high_freq_factor",
         json_get(j, v, "high_freq_factor"), "more than low_freq_factor");
    return MEDRUN_OK;
}

/* rope_parameters: one block, or one for each type of layer, which must then be the same. */
static int read_rope_parameters(const json_file *f, uint32_t v, rope *r, medrun_error *e) {
    const json *j = &f->j;
    if (!children(j, v) || !json_is_type(j, v + 2, JSON_OBJECT)) return read_rope_block(f, v, r, e);
    for EACH_KEY(j, v, c) {
        rope next = {.truncate = true};
        WANT(json_is_type(j, c + 1, JSON_OBJECT), f, "rope_parameters", v,
             "a block per layer type");
        if (read_rope_block(f, c + 1, &next, e)) return e->code;
        WANT(c == v + 1 || (same_scaling(r, &next) && !differ(r->theta, next.theta)), f,
             "rope_parameters", v, "the same positions in all layers");
        *r = next;
    }
    return MEDRUN_OK;
}

/* Reads both spellings; R is what they agree on. */
static int read_both_ropes(const json_file *f, rope *r, medrun_error *e) {
    const json *j = &f->j;
    rope old = {.truncate = true}, now = old;
    uint32_t scaling = given(j, 0, "rope_scaling"), block = given(j, 0, "rope_parameters");
    double theta = 0, original = 0;
    WANT(scaling == JSON_NONE || json_is_type(j, scaling, JSON_OBJECT), f, "rope_scaling", scaling,
         "an object or null");
    WANT(block == JSON_NONE || json_is_type(j, block, JSON_OBJECT), f, "rope_parameters", block,
         "an object or null");
    if (read_real(f, 0, "rope_theta", 1.001, 1e12, &theta, e) ||
        (scaling != JSON_NONE && read_rope_block(f, scaling, &old, e)) ||
        (block != JSON_NONE && read_rope_parameters(f, block, &now, e)) ||
        read_real(f, 0, rope_fields[ORIGINAL].key, 1, 1e9, &original, e)) return e->code;
    WANT(!(theta > 0 && old.theta > 0 && differ(theta, old.theta)), f, "rope_theta",
         given(j, 0, "rope_theta"), "the same as in rope_scaling; remove the wrong one");
    if (theta > 0) old.theta = theta;
    *r = block == JSON_NONE ? old : now;
    if (!(r->theta > 0)) r->theta = old.theta;
    bool both = block != JSON_NONE && json_get(j, 0, "rope_scaling") != JSON_NONE;
    WANT(!(old.theta > 0 && differ(old.theta, r->theta)) && (!both || same_scaling(&old, r)), f,
         "rope_parameters", block, "the same as rope_theta and rope_scaling; remove the wrong");
    double *inner = &r->number[ORIGINAL];
    if (r->type == ROPE_YARN && !(*inner > 0)) *inner = original;
    WANT(!(original > 0 && r->type != ROPE_NONE && differ(original, *inner)), f,
         rope_fields[ORIGINAL].key, given(j, 0, rope_fields[ORIGINAL].key),
         "the same as in the rope block; remove the wrong one");
    return MEDRUN_OK;
}

/* ln(factor) / 10 + 1 of the YaRN paper, weighted. */
static double yarn_scale(double factor, double weight) {
    return factor <= 1 ? 1 : 0.1 * weight * ln_exact(factor) + 1;
}

/* What transformers 5 computes for what is missing, into C. Its version 4 overrode a given factor
 * by the ratio of the two context lengths; models differ in which was meant. */
static void set_yarn(source *s, const rope *r, model_config *c) {
    const double *n = r->number;
    double original = n[ORIGINAL] > 0 ? n[ORIGINAL] : c->max_positions;
    double ratio = c->max_positions / original, factor = n[FACTOR] > 0 ? n[FACTOR] : ratio;
    if (s->yarn_factor > 0) factor = s->yarn_factor;
    if (differ(factor, ratio) || s->yarn_factor > 0)
        add_note(s, "YaRN factor %g is used, as %s says. transformers 5, vLLM and llama.cpp "
                 "compute with the %g of %s, transformers 4 with the ratio of the context lengths "
                 "%g / %g = %g: --yarn-factor chooses", factor,
                 s->yarn_factor > 0 ? "--yarn-factor" : s->description,
                 n[FACTOR] > 0 ? n[FACTOR] : ratio, s->description, (double)c->max_positions,
                 original, ratio);
    c->rope_factor = factor, c->rope_original = original, c->rope_truncate = r->truncate;
    c->rope_beta_fast = n[BETA_FAST] > 0 ? n[BETA_FAST] : 32;
    c->rope_beta_slow = n[BETA_SLOW] > 0 ? n[BETA_SLOW] : 1;
    c->rope_attention = n[ATTENTION] > 0 ? n[ATTENTION] :
                        n[MSCALE] > 0 && n[MSCALE_ALL] > 0 ?
                        yarn_scale(factor, n[MSCALE]) / yarn_scale(factor, n[MSCALE_ALL]) :
                        yarn_scale(factor, 1);
}

/* The class's own positions where config.json says nothing at all; only some classes have any. */
static int default_rope(source *s, const json_file *f, rope *r, medrun_error *e) {
    bool apertus = !strcmp(s->architecture, "apertus");
    bool block = given(&f->j, 0, "rope_scaling") != JSON_NONE ||
                 given(&f->j, 0, "rope_parameters") != JSON_NONE;
    WANT(!apertus || block || !(r->theta > 0), f, "rope_scaling", JSON_NONE,
         "a block, as rope_theta is given");
    if (apertus && !block)
        *r = (rope){ROPE_LLAMA3, true, 1.2e7, {[FACTOR] = 8, [LOW] = 1, [HIGH] = 4,
                                               [ORIGINAL] = 8192}};
    else if (!(r->theta > 0)) r->theta = apertus ? 1.2e7 : 10000;
    else return MEDRUN_OK;
    add_note(s, "config.json has no rope_theta%s: transformers' default for %s is used, %.9g%s",
             block ? "" : " and no rope scaling", s->architecture, r->theta,
             r->type == ROPE_LLAMA3 && !block ? " with llama3 scaling 8" : "");
    return MEDRUN_OK;
}

static int check_multiples(const model_config *c, const char *path, medrun_error *e) {
    if (c->hidden_size % 16 == 0 && c->head_dim % 16 == 0 && c->ffn_size % 16 == 0)
        return MEDRUN_OK;
    return refuse(e, "%s: found hidden_size %d, head_dim %d, intermediate_size %d, wanted "
                  "multiples of 16", path, c->hidden_size, c->head_dim, c->ffn_size);
}

static int read_hf_config(source *s, const json_file *f, medrun_error *e) {
    model_config *c = &s->config;
    rope r = {0};
    s->description = "config.json";
    if (check_architecture(s, f, e) || check_unsupported(f, e) || read_sizes(f, c, e) ||
        read_bool(f, 0, "tie_word_embeddings", &c->tied, e) || read_both_ropes(f, &r, e) ||
        default_rope(s, f, &r, e)) return e->code;
    c->norm_eps = (float)json_real(&f->j, 0, f->path, "rms_norm_eps", 1e-12, 1, false, e);
    if (e->code || check_multiples(c, f->path, e)) return e->code;
    if (s->yarn_factor > 0 && r.type != ROPE_YARN)
        return fail(e, MEDRUN_USAGE, "--yarn-factor: %s has no yarn scaling", f->path);
    c->rope_theta = r.theta, c->rope_type = r.type;
    c->rope_factor = r.number[FACTOR], c->rope_original = r.number[ORIGINAL];
    c->rope_low = r.number[LOW], c->rope_high = r.number[HIGH];
    if (r.type == ROPE_YARN) set_yarn(s, &r, c);
    return MEDRUN_OK;
}

/* ---- stop ids and sampling ----------------------------------------------------------------- */

static int add_stop(source *s, const char *path, double id, medrun_error *e) {
    if (!(id >= 0 && id < s->config.vocab_size) || differ(id, floor(id)))
        return refuse(e, "%s: field eos_token_id: found %.17g, wanted an id below vocab_size %d",
                      path, id, s->config.vocab_size);
    for (int i = 0; i < s->n_stops; i++) if (s->stops[i] == (int)id) return MEDRUN_OK;
    if (s->n_stops == MEDRUN_MAX_STOPS)
        return refuse(e, "%s: field eos_token_id: found more than %d different ids that end an "
                      "answer", path, MEDRUN_MAX_STOPS);
    return s->stops[s->n_stops++] = (int)id, MEDRUN_OK;
}

/* eos_token_id: an id, several, or none. */
static int read_eos_ids(source *s, const json_file *f, medrun_error *e) {
    const json *j = &f->j;
    uint32_t v = given(j, 0, "eos_token_id");
    WANT(v == JSON_NONE || json_is_type(j, v, JSON_NUMBER) || json_is_type(j, v, JSON_ARRAY), f,
         "eos_token_id", v,
         "an id or a list of ids");
    if (json_is_type(j, v, JSON_NUMBER)) return add_stop(s, f->path, json_number(j, v), e);
    for EACH(j, v, c) {
        WANT(json_is_type(j, c, JSON_NUMBER), f, "eos_token_id", v, "a list of ids");
        if (add_stop(s, f->path, json_number(j, c), e)) return e->code;
    }
    return MEDRUN_OK;
}

/* transformers' defaults, and greedy unless do_sample is true. */
static const source_sampling default_sampling = {.temperature = 1, .top_p = 1, .repeat_penalty = 1,
                                                 .top_k = 50};

static int read_generation(source *s, const json_file *f, medrun_error *e) {
    source_sampling *p = &s->sampling;
    bool sample = false;
    *p = default_sampling;
    if (read_bool(f, 0, "do_sample", &sample, e) ||
        read_real(f, 0, "temperature", 0, 100, &p->temperature, e) ||
        read_real(f, 0, "top_p", 0, 1, &p->top_p, e) ||
        read_real(f, 0, "min_p", 0, 1, &p->min_p, e) ||
        read_whole(f, 0, "top_k", 0, 1 << 24, &p->top_k, e) ||
        read_real(f, 0, "repetition_penalty", 0.01, 100, &p->repeat_penalty, e)) return e->code;
    if (!sample) p->temperature = 0;
    static const char *const keys[] = {"do_sample", "temperature", "top_p", "top_k"};
    for (size_t i = 0; i < 4; i++) p->given |= given(&f->j, 0, keys[i]) != JSON_NONE;
    return read_eos_ids(s, f, e);
}

#include "export_tokenizer.c"           /* section 3 */

#include "export_jinja.c"
#include "export_chat.c"                /* section 4 */

#include "export_foreign.c"             /* what is no source */

/* ============================================================================================
 * 5 Safetensors: a strict parser
 *
 * A file is a 64-bit header length, a JSON header, data. Each tensor says its type, its shape and
 * its bytes of the data; together they must fill the data, without gap or overlap, as the reference
 * implementation demands: then nothing can hide in the file.
 * ============================================================================================ */

/* The types of weights: those that can be exported, then others that safetensors knows. Quantised
 * ones come in blocks along a row. */
enum { SOURCE_BF16, SOURCE_F16, SOURCE_F32, SOURCE_Q8_0, SOURCE_Q4_0, SOURCE_Q4_1, SOURCE_Q5_0,
       SOURCE_Q5_1, SOURCE_Q4_K, SOURCE_Q5_K, SOURCE_Q6_K, N_WEIGHT_TYPES };

static const struct { const char *name; size_t block, size; } source_types[] = {
    {"BF16", 1, 2}, {"F16", 1, 2}, {"F32", 1, 4}, {"Q8_0", 32, 34}, {"Q4_0", 32, 18},
    {"Q4_1", 32, 20}, {"Q5_0", 32, 22}, {"Q5_1", 32, 24}, {"Q4_K", 256, 144}, {"Q5_K", 256, 176},
    {"Q6_K", 256, 210}, {"F64", 1, 8}, {"I64", 1, 8}, {"U64", 1, 8}, {"I32", 1, 4}, {"U32", 1, 4},
    {"I16", 1, 2}, {"U16", 1, 2}, {"I8", 1, 1}, {"U8", 1, 1}, {"BOOL", 1, 1}, {"F8_E4M3", 1, 1},
    {"F8_E5M2", 1, 1},
};
enum { N_SOURCE_TYPES = sizeof source_types / sizeof *source_types, SHARD_HEADER = 100000000 };

/* Bytes of N values, a multiple of the block. */
static size_t source_bytes(int dtype, size_t n) {
    return n / source_types[dtype].block * source_types[dtype].size;
}

static int read_at(int fd, void *to, size_t n, uint64_t at, const char *path, medrun_error *e) {
    uint8_t *p = to;
    while (n) {
        ssize_t got = pread(fd, p, n, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return cannot(e, MEDRUN_FAILED, path, "read");
        if (!got) return fail(e, MEDRUN_FAILED, "%s: cannot read: it became shorter", path);
        p += got, n -= (size_t)got, at += (uint64_t)got;
    }
    return MEDRUN_OK;
}

/* Type, shape and place of the tensor that entry V describes; DATA bytes follow the header. */
static int read_entry(const json *j, uint32_t v, const char *path, uint64_t data,
                      source_tensor *t, medrun_error *e) {
    uint32_t shape = json_get(j, v, "shape"), place = json_get(j, v, "data_offsets");
    const char *wanted = NULL;
    t->rank = (int)children(j, shape);
    while (t->dtype < N_SOURCE_TYPES && (source_types[t->dtype].block > 1 ||
           !json_is(j, json_get(j, v, "dtype"), source_types[t->dtype].name))) t->dtype++;
    if (children(j, v) != 6 || t->dtype == N_SOURCE_TYPES || !json_is_type(j, shape, JSON_ARRAY) ||
        children(j, place) != 2 || !json_size(j, place + 1, &t->begin) ||
        !json_size(j, place + 2, &t->end))
        return refuse(e, "%s: tensor %s: found %s, wanted a known dtype, a shape and two "
                      "data_offsets", path, t->name, show(j, v).text);
    uint64_t bytes = source_types[t->dtype].size, n;
    int i = 0;
    for EACH(j, shape, c) {
        if (!json_size(j, c, &n) || (n && bytes > UINT64_MAX / n))
            return refuse(e, "%s: tensor %s: shape: found %s, wanted whole numbers whose product a "
                          "file can hold", path, t->name, show(j, shape).text);
        bytes *= n;
        if (i < 2) t->shape[i++] = n;
    }
    if (t->begin > t->end || t->end > data) wanted = "a place inside the file; it was cut";
    else if (t->end - t->begin != bytes) wanted = "as many bytes as its shape and dtype take";
    return !wanted ? MEDRUN_OK : refuse(e, "%s: tensor %s: data_offsets: found %s, wanted %s; "
                                        "download it again", path, t->name, show(j, place).text,
                                        wanted);
}

static int compare_places(const void *a, const void *b) {
    const source_tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

/* Tensors T of one file: sorted by place, each begins where the one before it ends. */
static int check_places(source_tensor *t, size_t n, const char *path, uint64_t data,
                        medrun_error *e) {
    uint64_t at = 0;
    if (n) qsort(t, n, sizeof *t, compare_places);
    for (size_t i = 0; i < n; at = t[i++].end)
        if (t[i].begin != at)
            return refuse(e, "%s: tensor %s: data_offsets: found a beginning at %llu, wanted %llu; "
                          "tensors must neither overlap nor leave a gap", path, t[i].name,
                          (unsigned long long)t[i].begin, (unsigned long long)at);
    if (at != data)
        return refuse(e, "%s: found %llu bytes of data, its tensors want %llu; download it again",
                      path, (unsigned long long)data, (unsigned long long)at);
    return MEDRUN_OK;
}

/* A copy of string node V as a name, or NULL: no memory, or a NUL inside. */
static char *copy_name(const json *j, uint32_t v) {
    buffer b = {0};
    json_unescape(j, v, &b);
    if (b.failed || (b.n && memchr(b.data, 0, b.n))) return buffer_free(&b), NULL;
    return b.n ? (char *)b.data : new_array(1, 1);
}

/* All entries of one header; DATA bytes from DATA_AT on are the tensors'. */
static int read_entries(source *s, const json *j, const char *path, uint64_t data_at, uint64_t data,
                        medrun_error *e) {
    size_t first = s->n_tensors;
    for EACH_KEY(j, 0, c) {
        if (json_is(j, c, "__metadata__")) continue;
        if (grow(&s->tensors, s->n_tensors, &s->tensors_cap, sizeof *s->tensors, e)) return e->code;
        source_tensor *t = &s->tensors[s->n_tensors];
        *t = (source_tensor){.name = copy_name(j, c), .file = s->n_files - 1};
        if (!t->name) return refuse(e, "%s: a tensor's name cannot be read", path);
        s->n_tensors++;
        if (read_entry(j, c + 1, path, data, t, e)) return e->code;
    }
    for EACH_KEY(j, json_get(j, 0, "__metadata__"), c)
        if (!json_is_type(j, c + 1, JSON_STRING))
            return refuse(e, "%s: field __metadata__: found %s, wanted strings", path,
                          show(j, c + 1).text);
    size_t n = s->n_tensors - first;
    if (check_places(n ? s->tensors + first : NULL, n, path, data, e)) return e->code;
    for (size_t i = first; i < s->n_tensors; i++)
        s->tensors[i].begin += data_at, s->tensors[i].end += data_at;
    return MEDRUN_OK;
}

/* The header of the open file FD of SIZE bytes. */
static int read_shard_header(source *s, int fd, uint64_t size, const char *path, medrun_error *e) {
    uint8_t head[64] = {0};
    size_t n_head = size < sizeof head ? (size_t)size : sizeof head;
    if (read_at(fd, head, n_head, 0, path, e) || check_content(path, head, n_head, e))
        return e->code;
    uint64_t n = read_u64(&(reader){head, 8, 0, false});
    if (size < 8 || n > SHARD_HEADER || n > size - 8)
        return refuse(e, "%s: header length: found %llu in a file of %llu bytes, wanted at most %d "
                      "and less than the file; download it again", path, (unsigned long long)n,
                      (unsigned long long)size, SHARD_HEADER);
    json j = {0};
    char *text = new_array((size_t)n, 1);
    if (!text) return out_of_memory(e, (size_t)n);
    if (!read_at(fd, text, (size_t)n, 8, path, e) && !parse_json(&j, text, (size_t)n, path, e))
        read_entries(s, &j, path, 8 + n, size - 8 - n, e);
    json_free(&j);
    free(text);
    return e->code;
}

/* Opens one file of weights, adds it and its tensors to the source. */
static int read_shard(source *s, const char *name, medrun_error *e) {
    char path[PATH_BYTES];
    file_facts facts;
    if (join_path(path, s->folder, name, e)) return e->code;
    int fd = open_file(path, TO_MAP);
    if (fd < 0)
        return fail(e, errno_code(MEDRUN_BAD_FILE), "%s: cannot open: %s; the "
                    "weights are not complete", path, strerror(errno));
    if (get_facts(NULL, fd, &facts) || !facts.regular || add_file(s, name, path, NULL, e)) {
        close(fd);
        return refuse(e, "%s: found no regular file, wanted weights", path);
    }
    s->files[s->n_files - 1].fd = fd;
    return read_shard_header(s, fd, s->files[s->n_files - 1].bytes, path, e);
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
            return refuse(e, "%s: tensor %s: found in %s and in %s, wanted once", s->folder,
                          s->tensors[i].name, s->files[s->tensors[i - 1].file].name,
                          s->files[s->tensors[i].file].name);
    return MEDRUN_OK;
}

/* ---- the index of shards ------------------------------------------------------------------- */

/* Opens each file that the weight map names, once; they lie in the folder itself. */
static int open_shards(source *s, const json_file *f, uint32_t map, medrun_error *e) {
    const json *j = &f->j;
    uint32_t previous = JSON_NONE;
    for EACH_KEY(j, map, c) {
        uint32_t v = c + 1;
        if (previous != JSON_NONE && same_text(j, previous, v)) continue;
        size_t i = 0;
        while (i < s->n_files && !json_is(j, v, s->files[i].name)) i++;
        if (i < s->n_files) continue;
        char *name = json_is_type(j, v, JSON_STRING) ? copy_name(j, v) : NULL;
        bool plain = name && *name && *name != '.' && !strpbrk(name, "/\\:") &&
                     strlen(name) < sizeof s->files->name && s->n_files < MAX_SHARDS;
        if (!plain) wrong_field(f, "weight_map", v, "at most 500 files of this folder", e);
        else read_shard(s, name, e);
        free(name);
        if (e->code) return e->code;
        previous = v;
    }
    return MEDRUN_OK;
}

/* Index and shards must name the same tensors in the same files. */
static int match_index(source *s, const json_file *f, uint32_t map, medrun_error *e) {
    const json *j = &f->j;
    for EACH_KEY(j, map, c) {
        char *name = copy_name(j, c);
        source_tensor *t = name ? find_tensor(s, name) : NULL;
        free(name);
        if (!t || !json_is(j, c + 1, s->files[t->file].name))
            return refuse(e, "%s: weight_map: tensor %s: not found in %s; download the folder "
                          "again", f->path, show(j, c).text, show(j, c + 1).text);
        t->indexed = true;
    }
    for (size_t i = 0; i < s->n_tensors; i++)
        if (!s->tensors[i].indexed)
            return refuse(e, "%s/%s: tensor %s: found, but the index does not name it; download "
                          "the folder again", s->folder, s->files[s->tensors[i].file].name,
                          s->tensors[i].name);
    return MEDRUN_OK;
}

static int read_index(source *s, medrun_error *e) {
    json_file f;
    if (open_json(s, "model.safetensors.index.json", false, &f, e)) return e->code;
    uint32_t map = given(&f.j, 0, "weight_map");
    if (!json_is_type(&f.j, map, JSON_OBJECT)) wrong_field(&f, "weight_map", map, "an object", e);
    else if (!open_shards(s, &f, map, e) && !sort_tensors(s, e)) match_index(s, &f, map, e);
    close_json(&f);
    return e->code;
}

/* Both forms at once are mostly an old file that nobody removed: which is meant, nobody knows. */
static int read_weights(source *s, medrun_error *e) {
    bool one = file_exists(s->folder, "model.safetensors");
    bool many = file_exists(s->folder, "model.safetensors.index.json");
    if (one && many)
        return refuse(e, "%s: found model.safetensors and model.safetensors.index.json, wanted one "
                      "of them; remove the one that is out of date", s->folder);
    if (many) return read_index(s, e);
    if (one) return read_shard(s, "model.safetensors", e) ? e->code : sort_tensors(s, e);
    if (name_weights(s, e)) return e->code;
    return refuse(e, "%s: found neither model.safetensors nor an index of shards", s->folder);
}

/* ---- a whole Hugging Face folder ----------------------------------------------------------- */

static int read_hf_tokenizer(source *s, const char *template_name, medrun_error *e) {
    source_tokenizer t = {0};
    buffer jinja = {0};
    if (!open_tokenizer(s, &t, e) && !read_any_tokenizer(&t, e) &&
        !fill_up(s, &t, (size_t)s->config.vocab_size, e))
        finish_tokenizer(&t, &s->tokenizer, t.file.path, e);
    s->eos = t.eos;
    if (!e->code && (template_name || !read_jinja(s, &t.config, &jinja, e)))
        choose_template(s, &jinja, template_name, e);
    buffer_free(&jinja);
    free_tokenizer(&t);
    return e->code;
}

/* Small files first: what they refuse costs no time. */
static int open_hf_folder(source *s, const char *template_name, medrun_error *e) {
    json_file f;
    if (open_cache(s, e) || check_folder(s, e) || open_json(s, "config.json", false, &f, e))
        return e->code;
    if (!read_hf_config(s, &f, e)) read_eos_ids(s, &f, e);
    close_json(&f);
    if (e->code || open_json(s, "generation_config.json", true, &f, e)) return e->code;
    read_generation(s, &f, e);
    close_json(&f);
    if (e->code || read_hf_tokenizer(s, template_name, e) || finish_stops(s, e)) return e->code;
    finish_sampling(s);
    read_licence(s);
    return read_weights(s, e);
}

static void close_source(source *s) {
    for (size_t i = 0; i < s->n_files; i++) if (s->files[i].fd >= 0) close(s->files[i].fd);
    for (size_t i = 0; i < s->n_tensors; i++) free(s->tensors[i].name);
    free(s->files);
    free(s->tensors);
    free(s->xielu);
    buffer_free(&s->tokenizer);
    buffer_free(&s->system);
    buffer_free(&s->notes);
}

#include "export_gguf.c"                /* section 6 */

/* ============================================================================================
 * 7 Plan: which tensor of the source becomes which section; the header
 * ============================================================================================ */

typedef struct {
    char name[64];
    int type;                   /* of medrun.c, section 5                                      */
    size_t rows, cols;
    const source_tensor *from;  /* NULL: values, or the tokenizer                              */
    size_t paired;              /* head_dim, where the rows of a head stand in pairs; else 0   */
    const float *values;        /* (rows, cols) that are known already                         */
    size_t layer, input;        /* of a layer's matrix: the stage it is multiplied by          */
    uint64_t offset, bytes;
    uint8_t digest[32];
} section;

typedef struct {
    int32_t *ids;
    size_t n;
    uint8_t digest[32], wanted[32];
    bool given;                 /* --proof says which digest is wanted                         */
    buffer reference;           /* JSON; what another implementation computed, or nothing      */
} logits_proof;

/* A section to write or a source file to hash. */
typedef struct {
    section *section;           /* NULL: hash                                                  */
    source_file *file;
    uint64_t begin;
} job;

typedef struct {
    uint8_t *raw, *out;
    float *rows;
} scratch;                      /* of one thread                                               */

enum { N_INPUTS = 4, MAX_WINDOWS = 32 };

/* What --calibrate's text shows, and what is computed from it: section 10. */
typedef struct {
    size_t cols, width, n;      /* of all, of a block; blocks, the last may go beyond COLS     */
    float *sums;                /* (n, width, width) products of two columns, below the diagonals */
} moments;

typedef struct {
    buffer ids;                             /* int32_t, window after window                    */
    size_t window[MAX_WINDOWS], n_windows;  /* tokens of each                                  */
    size_t hidden, widest;                  /* columns; those of all blocks of any stage       */
    float *stream;                          /* (ids, hidden) what the layer that runs reads    */
    float *rows;                            /* (WINDOW_CHUNK, widest) of a stage               */
    moments seen[N_INPUTS];
    float *chain;                           /* (widest block, the same) couplings              */
    size_t *order;                          /* (widest block) its columns as they are rounded  */
    float *loss, *size;                     /* (widest block) of an error that is left there   */
    thread_pool *pool;                      /* of the model that runs, and its kernels         */
    const struct more_kernels *more;
    size_t layer, first;                    /* which looks on, counted in the run; the row of
                                             * STREAM that comes first                         */
    bool opening;                           /* that row opens a window                         */
} calibration;

typedef struct {
    const char *source, *out, *type, *template_name, *name, *proof, *yarn_factor, *window, *threads;
    const char *calibrate, *pre;
    bool tokenizer_only, dry_run, force, quiet, help, version;
} export_options;

typedef struct {
    export_options options;
    source source;
    char name[128], precision[256];
    int type, threads;
    section *sections;          /* the tensors, then the tokenizer                             */
    size_t n_sections, sections_cap;
    uint64_t data_at, file_bytes;           /* where the first section begins; all of it       */
    buffer header, token_proofs, chat_proofs;           /* JSON; proofs without brackets       */
    logits_proof *logits;
    size_t n_logits, logits_cap;
    tokenizer tokenizer;        /* opened on source.tokenizer, for the proofs                  */
    file_writer out;            /* OUT.partial while it is there                               */
    const char *partial;        /* its name                                                    */
    int fd;                     /* the same file                                               */
    thread_pool pool;
    scratch scratch[MAX_THREADS];
    job *jobs;
    atomic_uint_fast64_t done;  /* bytes read, of TOTAL                                        */
    uint64_t total;
    double start, drawn;        /* seconds                                                     */
    int tenth;                  /* the last line of progress, when not on a terminal           */
    bool terminal;
    pthread_mutex_t lock;       /* for drawing, and for the first failure of any thread        */
    medrun_error error;
    atomic_bool stop;
    const kernel_set *kernels;  /* search for the scales of int4                               */
    calibration calibration;
} exporter;

static int add_section(exporter *x, const char *name, int type, size_t rows, size_t cols,
                       const source_tensor *from, medrun_error *e) {
    if (grow(&x->sections, x->n_sections, &x->sections_cap, sizeof *x->sections, e)) return e->code;
    section *t = &x->sections[x->n_sections++];
    *t = (section){.type = type, .rows = rows, .cols = cols, .from = from};
    snprintf(t->name, sizeof t->name, "%s", name);
    t->bytes = cols ? tensor_bytes(type, rows, cols) : x->source.tokenizer.n;
    return MEDRUN_OK;
}

/* A vector that needs no reading any more; VALUES must outlive the plan. */
static int plan_values(exporter *x, const char *name, const float *values, size_t n,
                       medrun_error *e) {
    if (add_section(x, name, TYPE_F32, 1, n, NULL, e)) return e->code;
    return x->sections[x->n_sections - 1].values = values, MEDRUN_OK;
}

typedef struct { char text[64]; } shape_text;

static shape_text show_shape(int rank, uint64_t rows, uint64_t cols) {
    shape_text s;
    unsigned long long a = rows, b = cols;
    if (rank == 1) snprintf(s.text, sizeof s.text, "(%llu)", a);
    else if (rank == 2) snprintf(s.text, sizeof s.text, "(%llu, %llu)", a, b);
    else snprintf(s.text, sizeof s.text, "of rank %d", rank);
    return s;
}

/* GPTQ and AWQ have q_proj.qweight where others have q_proj.weight; who wraps a model puts words
 * before its names. */
static int missing_tensor(const source *s, const char *name, shape_text shape, medrun_error *e) {
    char quantised[128];
    size_t n = strlen(name);
    snprintf(quantised, sizeof quantised, "%.*sqweight", n > 6 ? (int)n - 6 : 0, name);
    if (find_tensor(s, quantised))
        return refuse_quantised(s->folder, ": tensor ", quantised, "GPTQ or AWQ", e);
    for (size_t i = 0; i < s->n_tensors; i++) {
        const char *other = s->tensors[i].name;
        size_t length = strlen(other);
        if (length > n + 1 && other[length - n - 1] == '.' && !strcmp(other + length - n, name))
            return refuse(e, "%s: tensor %s: found %s in its place: this was saved from within "
                          "another model (peft, torch.compile, an image model); save the language "
                          "model itself", s->folder, name, other);
    }
    return refuse(e, "%s: tensor %s: found nothing, wanted shape %s; the weights are not complete",
                  s->folder, name, shape.text);
}

/* Finds tensor FROM of the source, checks its type and shape (rows 0: a vector) and plans section
 * NAME. */
static int plan_tensor(exporter *x, const char *name, const char *from, int rows, int cols,
                       medrun_error *e) {
    source *s = &x->source;
    source_tensor *t = find_tensor(s, from);
    uint64_t first = (uint64_t)(rows ? rows : cols), second = rows ? (uint64_t)cols : 0;
    int rank = rows ? 2 : 1;
    if (!t) return missing_tensor(s, from, show_shape(rank, first, second), e);
    const char *file = s->files[t->file].name;
    if (t->dtype >= N_WEIGHT_TYPES)
        return refuse(e, "%s/%s: tensor %s: dtype: found %s, wanted BF16, F16 or F32, as in the "
                      "model that a quantised one was made from", s->folder,
                      file, from, source_types[t->dtype].name);
    if (t->rank != rank || t->shape[0] != first || t->shape[1] != second)
        return refuse(e, "%s/%s: tensor %s: shape: found %s, wanted %s, as %s says", s->folder,
                      file, from, show_shape(t->rank, t->shape[0], t->shape[1]).text,
                      show_shape(rank, first, second).text, s->description);
    t->used = true;
    bool vocabulary = !strcmp(name, "embed") || !strcmp(name, "output");
    int type = !rows ? TYPE_F32 : vocabulary ? rows_type(x->type) : x->type;
    return add_section(x, name, type, rows ? (size_t)rows : 1, (size_t)cols, t, e);
}

/* Rows as Hugging Face has them: the rotation turns halves of a head. Most GGUF files turn pairs,
 * with rows of q and k in the order for that, which is undone in writing. */
static int plan_layer(exporter *x, int layer, medrun_error *e) {
    const model_config *c = &x->source.config;
    int hidden = c->hidden_size, heads = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    bool gated = c->activation == ACTIVATION_SILU, apertus = c->qk_norm, own = x->source.gguf;
    const struct {
        const char *name, *hf_name, *gguf_name;
        int rows, cols;
        size_t input;                       /* of input_stages                                 */
        bool missing;
    } all[] = {
        {"attn_norm", apertus ? "attention_layernorm" : "input_layernorm", "attn_norm", 0, hidden,
         0, false},
        {"q", "self_attn.q_proj", "attn_q", heads, hidden, 0, false},
        {"k", "self_attn.k_proj", "attn_k", kv, hidden, 0, false},
        {"v", "self_attn.v_proj", "attn_v", kv, hidden, 0, false},
        {"q_norm", "self_attn.q_norm", "attn_q_norm", 0, c->head_dim, 0, !c->qk_norm},
        {"k_norm", "self_attn.k_norm", "attn_k_norm", 0, c->head_dim, 0, !c->qk_norm},
        {"o", "self_attn.o_proj", "attn_output", hidden, heads, 1, false},
        {"ffn_norm", apertus ? "feedforward_layernorm" : "post_attention_layernorm", "ffn_norm", 0,
         hidden, 0, false},
        {"gate", "mlp.gate_proj", "ffn_gate", c->ffn_size, hidden, 2, !gated},
        {"up", "mlp.up_proj", "ffn_up", c->ffn_size, hidden, 2, false},
        {"xielu", NULL, NULL, 0, 4, 0, c->activation != ACTIVATION_XIELU},
        {"down", "mlp.down_proj", "ffn_down", hidden, c->ffn_size, 3, false},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char name[64], from[96] = "";
        if (all[i].missing) continue;
        snprintf(name, sizeof name, "layers.%d.%s", layer, all[i].name);
        if (all[i].hf_name)
            snprintf(from, sizeof from, "%s.%d.%s.weight", own ? "blk" : "model.layers", layer,
                     own ? all[i].gguf_name : all[i].hf_name);
        if (from[0]) plan_tensor(x, name, from, all[i].rows, all[i].cols, e);
        else plan_values(x, name, x->source.xielu + 4 * layer, 4, e);
        if (e->code) return e->code;
        section *t = &x->sections[x->n_sections - 1];
        t->layer = (size_t)layer, t->input = all[i].input;
        bool turned = !strcmp(all[i].name, "q") || !strcmp(all[i].name, "k");
        if (own && turned && !apertus) t->paired = (size_t)c->head_dim;
    }
    return MEDRUN_OK;
}

/* A tied model's file may hold the output matrix once more: only if it is the same. */
static int same_bytes(const source *s, const source_tensor *a, const source_tensor *b, bool *same,
                      medrun_error *e) {
    uint8_t *p = new_array(2, READ_BYTES), *q = p + READ_BYTES;
    uint64_t n = a->end - a->begin, at = 0;
    *same = a->dtype == b->dtype && n == b->end - b->begin;
    if (!p) out_of_memory(e, 2 * (size_t)READ_BYTES);
    for (size_t take; !e->code && *same && at < n; at += take) {
        take = n - at < READ_BYTES ? (size_t)(n - at) : READ_BYTES;
        if (!read_at(s->files[a->file].fd, p, take, a->begin + at, a->name, e) &&
            !read_at(s->files[b->file].fd, q, take, b->begin + at, b->name, e))
            *same = !memcmp(p, q, take);
    }
    free(p);
    return e->code;
}

/* One of the four numbers of xIELU in LAYER, each of which a tensor of its own holds: a scalar or
 * a vector of one. */
static int read_xielu_number(source *s, int layer, const char *name, float *out, bool *found,
                             medrun_error *e) {
    char hf_name[96];
    uint8_t raw[4];
    snprintf(hf_name, sizeof hf_name, "model.layers.%d.mlp.act_fn.%s", layer, name);
    source_tensor *t = find_tensor(s, hf_name);
    if (!(*found = t)) return MEDRUN_OK;
    const source_file *file = &s->files[t->file];
    if (t->dtype > SOURCE_F32 || t->rank > 1 || (t->rank == 1 && t->shape[0] != 1))
        return refuse(e, "%s/%s: tensor %s: found another type or shape, wanted one number",
                      s->folder, file->name, hf_name);
    t->used = true;
    if (read_at(file->fd, raw, (size_t)(t->end - t->begin), t->begin, file->name, e))
        return e->code;
    return to_floats(t->dtype, raw, 1, out) ? MEDRUN_OK :
           refuse(e, "%s/%s: tensor %s: found no finite number", s->folder, file->name, hf_name);
}

/* Fills s->xielu from a Hugging Face folder. beta and eps are buffers, which some exports leave
 * out: then transformers' initial values hold. */
static int read_hf_xielu(source *s, medrun_error *e) {
    static const char *const names[4] = {"alpha_p", "alpha_n", "beta", "eps"};
    s->xielu = new_array((size_t)s->config.n_layers * 4, sizeof *s->xielu);
    if (!s->xielu) return out_of_memory(e, (size_t)s->config.n_layers * 16);
    for (int i = 0; i < 4 * s->config.n_layers; i++) {
        bool found = false;
        s->xielu[i] = i % 4 == 2 ? 0.5f : -1e-6f;
        if (read_xielu_number(s, i / 4, names[i % 4], &s->xielu[i], &found, e)) return e->code;
        if (!found && i % 4 < 2)
            return refuse(e, "%s: tensor model.layers.%d.mlp.act_fn.%s: found nothing, wanted one "
                          "number; the weights are not complete", s->folder, i / 4, names[i % 4]);
        if (!found && i < 4)
            add_note(s, "the weights have no %s for xIELU: transformers' %g is used", names[i],
                     (double)s->xielu[i]);
    }
    return MEDRUN_OK;
}

/* A tensor nobody asked for is a part of the model that would silently be missing. */
static int check_leftover(exporter *x, const source_tensor *t, medrun_error *e) {
    static const char harmless[] = "rotary_emb.inv_freq";
    const source_tensor *embed = find_tensor(&x->source, "model.embed_tokens.weight");
    size_t n = strlen(t->name), len = sizeof harmless - 1;
    bool output = !strcmp(t->name, "lm_head.weight");
    bool ignored = n >= len && !strcmp(t->name + n - len, harmless);
    if (output && same_bytes(&x->source, t, embed, &ignored, e)) return e->code;
    if (ignored) return MEDRUN_OK;
    if (strstr(t->name, ".lora_"))
        return refuse(e, "%s/%s: tensor %s: found an adapter within the weights, wanted a merged "
                      "model: merge_and_unload().save_pretrained(FOLDER)", x->source.folder,
                      x->source.files[t->file].name, t->name);
    return refuse(e, "%s/%s: tensor %s: found a tensor that %s", x->source.folder,
                  x->source.files[t->file].name, t->name, output ?
                  "differs from model.embed_tokens.weight, though tie_word_embeddings is true" :
                  x->source.gguf ? "this medrun does not compute with" :
                  "is no part of the model that config.json describes; medrun would not compute "
                  "with it");
}

/* How the source holds the matrices, for the provenance and, if they were rounded, for a note. */
static void describe_precision(exporter *x) {
    size_t count[N_WEIGHT_TYPES] = {0}, n = 0;
    bool rounded = false;
    for (size_t i = 0; i < x->n_sections; i++)
        if (x->sections[i].from && x->sections[i].type != TYPE_F32)
            count[x->sections[i].from->dtype]++;
    for (int t = 0; t < N_WEIGHT_TYPES; t++) {
        if (!count[t]) continue;
        const char *word = n ? "" : count[t] > 1 ? " tensors" : " tensor";
        n += (size_t)snprintf(x->precision + n, sizeof x->precision - n, "%s%s (%zu%s)",
                              n ? ", " : "", source_types[t].name, count[t], word);
        rounded |= source_types[t].block > 1;
    }
    if (rounded)
        add_note(&x->source, "the weights come from %s: %s re-encodes values that were already "
                 "rounded%s", x->precision, type_names[x->type],
                 x->type == TYPE_INT4 ? "; int8 adds far less to what that lost" : "");
}

static int plan_model(exporter *x, medrun_error *e) {
    const model_config *c = &x->source.config;
    int vocab = c->vocab_size, hidden = c->hidden_size;
    bool own = x->source.gguf;
    if (c->activation == ACTIVATION_XIELU && !x->source.xielu && read_hf_xielu(&x->source, e))
        return e->code;
    plan_tensor(x, "embed", own ? "token_embd.weight" : "model.embed_tokens.weight", vocab, hidden,
                e);
    for (int layer = 0; !e->code && layer < c->n_layers; layer++) plan_layer(x, layer, e);
    if (!e->code)
        plan_tensor(x, "final_norm", own ? "output_norm.weight" : "model.norm.weight", 0, hidden,
                    e);
    if (!e->code && !c->tied)
        plan_tensor(x, "output", own ? "output.weight" : "lm_head.weight", vocab, hidden, e);
    for (size_t i = 0; !e->code && i < x->source.n_tensors; i++)
        if (!x->source.tensors[i].used) check_leftover(x, &x->source.tensors[i], e);
    if (!e->code) describe_precision(x);
    return e->code ? e->code : add_section(x, "tokenizer", -1, 0, 0, NULL, e);
}

/* ---- the header ---------------------------------------------------------------------------- */

static void put_string(buffer *b, const char *text) { json_quote(b, text, strlen(text)); }

/* "KEY":V in as few digits as give V back, or only its float, which is what some fields are. */
static void put_real(buffer *b, const char *key, double v, bool as_float) {
    char text[40];
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, v);
        double back = strtod(text, NULL);
        if (!differ(as_float ? (double)(float)back : back, v)) break;
    }
    buffer_printf(b, "\"%s\":%s", key, text);
}

static void put_ids(buffer *b, const void *ids, size_t n) {
    buffer_text(b, "[");
    for (size_t i = 0; i < n; i++) buffer_printf(b, i ? ",%d" : "%d", ((const int32_t *)ids)[i]);
    buffer_text(b, "]");
}

static void put_digest(buffer *b, const uint8_t digest[32]) {
    char hex[65];
    hex_of(digest, hex);
    buffer_printf(b, ",\"sha256\":\"%s\"}", hex);
}

static void put_scaling(buffer *b, model_config *c) {
    buffer_printf(b, ",\"rope_scaling\":{\"type\":\"%s\"", rope_names[c->rope_type]);
    for (const header_field *d = scaling_fields[c->rope_type]; d->key; d++) {
        const void *from = (const char *)c + d->at;
        buffer_text(b, ",");
        if (d->kind == FIELD_DOUBLE) put_real(b, d->key, *(const double *)from, false);
        else buffer_printf(b, "\"%s\":%s", d->key, *(const bool *)from ? "true" : "false");
    }
    if (c->rope_type == ROPE_DIVISORS) {
        buffer_text(b, ",\"divisors\":[");
        for (int i = 0; i < c->head_dim / 2; i++)
            buffer_printf(b, i ? ",%.9g" : "%.9g", (double)c->rope_divisors[i]);
        buffer_text(b, "]");
    }
    buffer_text(b, "}");
}

static void put_config(buffer *b, model_config *c) {
    buffer_printf(b, "\"config\":{\"vocab_size\":%d,\"hidden_size\":%d,\"n_layers\":%d,"
                  "\"n_heads\":%d,\"n_kv_heads\":%d,\"head_dim\":%d,\"ffn_size\":%d,"
                  "\"max_positions\":%d,", c->vocab_size, c->hidden_size, c->n_layers, c->n_heads,
                  c->n_kv_heads, c->head_dim, c->ffn_size, c->max_positions);
    put_real(b, "norm_eps", (double)c->norm_eps, true);
    buffer_text(b, ",");
    put_real(b, "rope_theta", c->rope_theta, false);
    put_scaling(b, c);
    buffer_printf(b, ",\"activation\":\"%s\"", activation_names[c->activation]);
    if (c->sliding_window) buffer_printf(b, ",\"sliding_window\":%d", c->sliding_window);
    if (c->qk_norm) buffer_text(b, ",\"qk_norm\":true");
    buffer_printf(b, ",\"tied\":%s},\n", c->tied ? "true" : "false");
}

/* The tokenizer is the last section, and the one without a name. */
static void put_sections(buffer *b, const exporter *x) {
    for (size_t i = 0; i < x->n_sections; i++) {
        const section *t = &x->sections[i];
        bool last = i + 1 == x->n_sections;
        buffer_text(b, last ? "],\n\"tokenizer\":{" : i ? ",\n{" : "\"tensors\":[\n{");
        if (!last)
            buffer_printf(b, "\"name\":\"%s\",\"type\":\"%s\",\"rows\":%zu,\"cols\":%zu,", t->name,
                          type_names[t->type], t->rows, t->cols);
        buffer_printf(b, "\"offset\":%llu,\"bytes\":%llu", (unsigned long long)t->offset,
                      (unsigned long long)t->bytes);
        put_digest(b, t->digest);
    }
}

static void put_chat(buffer *b, const source *s) {
    const source_sampling *p = &s->sampling;
    const struct { const char *key; double v; } fields[] = {
        {"temperature", p->temperature}, {"top_k", (double)p->top_k}, {"top_p", p->top_p},
        {"min_p", p->min_p}, {"repeat_penalty", p->repeat_penalty}};
    const chat_template *c = s->chat, *row = c ? chat_find(c->name) : NULL;
    buffer_printf(b, ",\n\"chat\":{\"template\":\"%s\",\"system\":", c ? c->name : MEDRUN_UNKNOWN);
    put_string(b, c && c->system != row->system ? c->system : "");
    if (c && c->bos != row->bos) {
        buffer_text(b, ",\"bos\":");
        put_string(b, c->bos ? c->bos : "");
    }
    if (c && c->trims != row->trims)
        buffer_printf(b, ",\"trims\":%s", c->trims ? "true" : "false");
    buffer_text(b, ",\"stop_ids\":");
    put_ids(b, s->stops, (size_t)s->n_stops);
    for (size_t i = 0; i < 5; i++) {
        buffer_text(b, i ? "," : ",\"sampling\":{");
        put_real(b, fields[i].key, fields[i].v, false);
    }
    buffer_text(b, "}},\n");
}

static void put_provenance(buffer *b, const exporter *x) {
    const source *s = &x->source;
    buffer_text(b, "\"provenance\":{\"sources\":[");
    for (size_t i = 0; i < s->n_files; i++) {
        buffer_text(b, i ? ",\n{\"file\":" : "\n{\"file\":");
        put_string(b, s->files[i].name);
        buffer_printf(b, ",\"bytes\":%llu", (unsigned long long)s->files[i].bytes);
        put_digest(b, s->files[i].digest);
    }
    if (x->options.calibrate)               /* with the last of the sources                    */
        buffer_printf(b, "],\"calibration\":{\"tokens\":%zu}", x->calibration.ids.n / 4);
    else buffer_text(b, "]");
    buffer_printf(b, ",\"precision\":\"%s\",\"licence\":", x->precision);
    put_string(b, s->licence);
    buffer_text(b, ",\"notice\":\"For research and education. Not a medical device; not for "
                   "clinical use.\"},\n");
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
        buffer_add(b, x->logits[i].reference.data, x->logits[i].reference.n);
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
    buffer_printf(b, ",\"architecture\":\"%s\",\"type\":\"%s\",\n", x->source.architecture,
                  type_names[x->type]);
    put_config(b, &x->source.config);
    put_sections(b, x);
    put_chat(b, &x->source);
    put_provenance(b, x);
    put_proofs(b, x);
    if (b->failed) return out_of_memory(e, b->n);
    if (b->n > MAX_HEADER)
        return fail(e, MEDRUN_USAGE, "the header takes %zu bytes, wanted at most %d; give fewer "
                    "proofs", b->n, MAX_HEADER);
    return MEDRUN_OK;
}

/* Offsets are part of the header, whose length moves them: try until nothing moves. Then let the
 * engine say what it thinks of the config, before hours of writing rather than after. */
static int lay_out(exporter *x, medrun_error *e) {
    model_file f = {.path = x->source.folder};
    model_config c = {0};
    for (uint64_t wanted = FILE_ALIGN; wanted != x->data_at;) {
        uint64_t at = x->data_at = wanted;
        for (size_t i = 0; i < x->n_sections; i++) {
            x->sections[i].offset = (at + FILE_ALIGN - 1) / FILE_ALIGN * FILE_ALIGN;
            at = x->sections[i].offset + x->sections[i].bytes;
        }
        x->file_bytes = at;
        if (render_header(x, e)) return e->code;
        wanted = round_up(PREAMBLE + x->header.n + 32, FILE_ALIGN);
    }
    if (x->file_bytes > SIZE_MAX)
        return fail(e, MEDRUN_USAGE, "the checkpoint would have %llu bytes, a program of 32 bits "
                    "can address 4294967295: export on a machine of 64 bits",
                    (unsigned long long)x->file_bytes);
    if (!json_parse(&f.header, (const char *)x->header.data, x->header.n, e))
        read_config(&f, &c, e);
    json_free(&f.header);
    return e->code;
}

/* ============================================================================================
 * 8 Proofs: texts, conversations and prompts with what they must give
 *
 * They go into the header, so that `medrun verify` shows on any machine that what arrived computes
 * what was exported. With --proof come more, best made by another implementation
 * (tools/reference/compare.py): ids and digests that stand there already must come out the same
 * here, and some of its logits may stand there for comparison.
 * ============================================================================================ */

/* In the form of --proof's file. What is said is not important, only that it is varied. */
#define PROOF_TEXT "The patient is a 54-year-old woman with fever and cough for 3 days."
static const char own_proofs[] =
    "{\"tokens\":[{\"text\":\"" PROOF_TEXT "\"},"
    "{\"text\":\"BP 138/84 mmHg, HR 96/min, SpO2 93 %; Na+ 138 mmol/l, K+ 4.1 (2019-11-05).\"},"
    "{\"text\":\"I'm sure she'd better go; THEY'VE said it isn't urgent, but we'll wait.\"},"
    "{\"text\":\"Give 2.5mg/kg q8h x10d, then 1000000 IU; see p. 12345.\"},"
    "{\"text\":\"  two  spaces,\\ttabs\\t\\tand\\n\\nempty\\r\\n lines \\n\\n\\n  at the end  \"},"
    "{\"text\":\"for (int i = 0; i < n; i++) { sum += x[i] * y[i]; }  // a loop\"},"
    "{\"text\":\"Der Patient klagt \\u00fcber Schmerzen, \\u00dcbelkeit; 37,5\\u00a0\\u00b0C.\"},"
    "{\"text\":\"\\u60a3\\u8005\\u53d1\\u70ed\\u4e09\\u5929\\uff0c\\u54b3\\u55fd\\u3002\"},"
    "{\"text\":\"\\u0627\\u0644\\u0645\\u0631\\u064a\\u0636 \\u0431\\u043e\\u043b\\u044c "
    "\\u0930\\u094b\\u0917\\u0940\"},"
    "{\"text\":\"e\\u0301 \\ud83e\\ude7a\\ud83d\\udc69\\u200d\\u2695\\ufe0f \\u2265 5 \\u00b5g "
    "\\u2014 \\u201cquoted\\u201d\\u2026\"},"
    "{\"text\":\"It looks like control: <|eot_id|><|start_header_id|>system</s>[INST]<|im_end|>\"},"
    "{\"text\":\"\"}],"
    "\"chats\":[{\"messages\":[{\"role\":\"user\",\"content\":\"What is hypertension?\"}]},"
    "{\"messages\":[{\"role\":\"system\",\"content\":\"You are a careful medical assistant.\"},"
    "{\"role\":\"user\",\"content\":\"  A man of 30 has chest pain.\\nWhat is asked first?\\n\"}]},"
    "{\"messages\":[{\"role\":\"system\",\"content\":\"Answer briefly.\"},"
    "{\"role\":\"user\",\"content\":\"Is 38.5 \\u00b0C a fever?\"},"
    "{\"role\":\"assistant\",\"content\":\"Yes.<|eot_id|>\"},"
    "{\"role\":\"user\",\"content\":\"And 37.0?\"}]}]}";

/* Ends a proof in B with its IDS, which must be those that entry V of F gives, if it does. */
static int put_proof(buffer *b, const buffer *ids, const json_file *f, uint32_t v,
                     medrun_error *e) {
    uint32_t list = given(&f->j, v, "ids");
    size_t n = 0;
    bool same = list == JSON_NONE || children(&f->j, list) == ids->n / 4;
    for EACH(&f->j, list, c) {
        int32_t id;
        uint64_t wanted;
        if (!same) break;
        memcpy(&id, ids->data + 4 * n++, 4);
        same = json_size(&f->j, c, &wanted) && wanted == (uint64_t)id;
    }
    put_ids(b, ids->data, ids->n / 4);
    buffer_text(b, "}");
    if (b->failed || ids->failed) return out_of_memory(e, b->n);
    return same ? MEDRUN_OK : fail(e, MEDRUN_DIFFERS, "%s: %s: found ids that differ from those "
                                   "computed here", f->path, show(&f->j, v).text);
}

/* A text, whose ids are without BOS and without special tokens in the text. */
static int prove_text(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    uint32_t text = given(&f->j, v, "text");
    buffer words = {0}, ids = {0}, *b = &x->token_proofs;
    WANT(json_is_type(&f->j, text, JSON_STRING), f, "tokens", v, "a text");
    json_unescape(&f->j, text, &words);
    if (words.failed) out_of_memory(e, words.n);
    else tokenizer_encode(&x->tokenizer, (const char *)words.data, words.n, 0, &ids, e);
    buffer_text(b, b->n ? ",\n{\"text\":" : "\n{\"text\":");
    json_quote(b, (const char *)words.data, words.n);
    buffer_text(b, ",\"ids\":");
    if (!e->code) put_proof(b, &ids, f, v, e);
    buffer_free(&words);
    buffer_free(&ids);
    return e->code;
}

/* The messages of entry V: M has room for them, ROLES 16 bytes for each, TEXT gets the contents. */
static int read_messages(const json_file *f, uint32_t v, medrun_message *m, char *roles,
                         buffer *text, medrun_error *e) {
    const json *j = &f->j;
    size_t i = 0, at = 0;
    for EACH(j, given(j, v, "messages"), c) {
        uint32_t content = given(j, c, "content");
        size_t before = text->n;
        WANT(json_is_type(j, content, JSON_STRING), f, "content", content, "a string");
        if (json_text(j, c, f->path, "role", roles + 16 * i, 16, e)) return e->code;
        json_unescape(j, content, text);
        m[i] = (medrun_message){roles + 16 * i, "", text->n - before};
        i++;
    }
    if (text->failed) return out_of_memory(e, text->n);
    for (size_t k = 0; k < i; at += m[k++].n_bytes)
        if (m[k].n_bytes) m[k].text = (const char *)text->data + at;
    return MEDRUN_OK;
}

/* Has template C a place for the role in node V of J? */
static bool takes_role(const chat_template *c, const json *j, uint32_t v) {
    bool found = c->said || (c->opening && json_is(j, v, "system"));
    for (const chat_kind *k = c->turns; k && k->role; k++) found |= json_is(j, v, k->role);
    return found;
}

/* A conversation, whose ids end with the opening of the answer. A date that its template would
 * take from today is recorded; a checkpoint without a template has no such proofs. */
static int prove_chat(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    size_t n = children(&f->j, given(&f->j, v, "messages"));
    buffer text = {0}, ids = {0}, *b = &x->chat_proofs;
    char date[11] = "";
    if (!x->source.chat) return MEDRUN_OK;
    WANT(n, f, "chats", v, "messages");
    for EACH(&f->j, given(&f->j, v, "messages"), turn)          /* own proofs must fit           */
        if (!f->map.n && !takes_role(x->source.chat, &f->j, json_get(&f->j, turn, "role")))
            return MEDRUN_OK;
    if (given(&f->j, v, "date") != JSON_NONE) {
        if (json_text(&f->j, v, f->path, "date", date, sizeof date, e)) return e->code;
    } else if (x->source.chat->states_today) date_today(date);
    medrun_message *m = new_array(n, sizeof *m);
    char *roles = new_array(n, 16);
    if (!m || !roles) out_of_memory(e, n * sizeof *m);
    else if (!read_messages(f, v, m, roles, &text, e)) {
        medrun_chat_options o = {.date = date[0] ? date : NULL};
        chat_writer w = {.c = x->source.chat, .t = &x->tokenizer, .o = &o, .out = &ids, .e = e};
        chat_render(&w, m, n, true);
    }
    buffer_text(b, b->n ? ",\n{\"messages\":[" : "\n{\"messages\":[");
    for (size_t i = 0; !e->code && i < n; i++) {
        buffer_text(b, i ? ",{\"role\":" : "{\"role\":");
        put_string(b, m[i].role);
        buffer_text(b, ",\"content\":");
        json_quote(b, m[i].text, m[i].n_bytes);
        buffer_text(b, "}");
    }
    buffer_text(b, "],");
    if (date[0]) buffer_printf(b, "\"date\":\"%s\",", date);
    buffer_text(b, "\"ids\":");
    if (!e->code) put_proof(b, &ids, f, v, e);
    free(m);
    free(roles);
    buffer_free(&text);
    buffer_free(&ids);
    return e->code;
}

/* Plans a digest of the logits after N ids, which it returns for the caller to fill; NULL: none. */
static int32_t *plan_logits(exporter *x, size_t n, medrun_error *e) {
    if (grow(&x->logits, x->n_logits, &x->logits_cap, sizeof *x->logits, e)) return NULL;
    logits_proof *p = &x->logits[x->n_logits];
    *p = (logits_proof){.ids = new_array(n, sizeof *p->ids), .n = n};
    if (!p->ids) return out_of_memory(e, n * sizeof *p->ids), NULL;
    return x->n_logits++, p->ids;
}

/* The ids in LIST, each below VOCAB and only once; SEEN has a zero for each of them. */
static bool put_different_ids(buffer *b, const json *j, uint32_t list, uint8_t *seen,
                              size_t vocab) {
    const char *before = "[";
    for EACH(j, list, c) {
        uint64_t id;
        if (!json_size(j, c, &id) || id >= vocab || seen[id]++) return false;
        buffer_printf(b, "%s%d", before, (int)id);
        before = ",";
    }
    return buffer_text(b, "]"), true;
}

/* What logits another implementation has for some ids: `medrun verify` says how far they are. */
static int prove_reference(const exporter *x, const json_file *f, uint32_t v, buffer *b,
                           medrun_error *e) {
    const json *j = &f->j;
    size_t vocab = (size_t)x->source.config.vocab_size;
    uint32_t ids = given(j, v, "ids"), values = given(j, v, "values");
    char name[64];
    if (json_text(j, v, f->path, "source", name, sizeof name, e)) return e->code;
    WANT(json_is_type(j, ids, JSON_ARRAY) && children(j, ids), f, "reference: ids", ids, "ids");
    WANT(json_is_type(j, values, JSON_ARRAY) && children(j, values) == children(j, ids), f,
         "reference: values", values, "a number for each of ids");
    uint8_t *seen = new_array(vocab, 1);
    if (!seen) return out_of_memory(e, vocab);
    buffer_text(b, ",\"reference\":{\"source\":");
    put_string(b, name);
    buffer_text(b, ",\"ids\":");
    bool good = put_different_ids(b, j, ids, seen, vocab);
    free(seen);
    WANT(good, f, "reference: ids", ids, "different ids below vocab_size");
    const char *before = ",\"values\":[";
    for EACH(j, values, c) {
        double value = json_is_type(j, c, JSON_NUMBER) ? json_number(j, c) : INFINITY;
        WANT(fabs(value) <= FLT_MAX, f, "reference: values", c, "a float32 that is finite");
        buffer_printf(b, "%s%.9g", before, value);
        before = ",";
    }
    buffer_text(b, "]}");
    return b->failed ? out_of_memory(e, b->n) : MEDRUN_OK;
}

/* Ids, with or without the digest that they must give and logits to set beside. */
static int prove_ids(exporter *x, const json_file *f, uint32_t v, medrun_error *e) {
    const json *j = &f->j;
    uint32_t list = given(j, v, "ids"), sum = given(j, v, "sha256");
    size_t n = children(j, list), i = 0;
    WANT(n && n <= (size_t)x->source.config.max_positions, f, "logits", v,
         "1 to max_position_embeddings ids");
    int32_t *ids = plan_logits(x, n, e);
    for EACH(j, list, c) {
        uint64_t id;
        if (e->code) return e->code;
        WANT(json_size(j, c, &id) && id < (uint64_t)x->source.config.vocab_size, f, "logits", c,
             "ids below vocab_size");
        ids[i++] = (int32_t)id;
    }
    logits_proof *p = &x->logits[x->n_logits - 1];
    uint32_t reference = given(j, v, "reference");
    char hex[65] = "";
    if (reference != JSON_NONE && prove_reference(x, f, reference, &p->reference, e))
        return e->code;
    if (sum == JSON_NONE) return MEDRUN_OK;
    p->given = !json_text(j, v, f->path, "sha256", hex, sizeof hex, e) && strlen(hex) == 64 &&
               parse_hex(hex, p->wanted);
    return p->given ? MEDRUN_OK : wrong_field(f, "sha256", sum, "64 hex digits", e);
}

static int prove_file(exporter *x, const json_file *f, medrun_error *e) {
    static const struct {
        const char *key;
        int (*prove)(exporter *, const json_file *, uint32_t, medrun_error *);
    } kinds[] = {{"tokens", prove_text}, {"chats", prove_chat}, {"logits", prove_ids}};
    for (size_t k = 0; k < 3; k++) {
        uint32_t list = given(&f->j, 0, kinds[k].key);
        WANT(list == JSON_NONE || json_is_type(&f->j, list, JSON_ARRAY), f, kinds[k].key, list,
             "an array");
        for EACH(&f->j, list, c) if (kinds[k].prove(x, f, c, e)) return e->code;
    }
    return MEDRUN_OK;
}

/* Logits after one id, and after the first dozen of the first text. */
static int prove_own_logits(exporter *x, medrun_error *e) {
    buffer ids = {0};
    tokenizer_encode(&x->tokenizer, PROOF_TEXT, strlen(PROOF_TEXT),
                     x->tokenizer.bos >= 0 ? MEDRUN_ADD_BOS : 0, &ids, e);
    size_t n = ids.n / 4, most = (size_t)x->source.config.max_positions;
    if (n > 12) n = 12;
    if (n > most) n = most;
    if (ids.failed) out_of_memory(e, ids.n);
    for (size_t length = 1; !e->code && length <= n; length = length < n ? n : n + 1) {
        int32_t *to = plan_logits(x, length, e);
        if (to) memcpy(to, ids.data, length * sizeof *to);
    }
    buffer_free(&ids);
    return e->code;
}

static int plan_proofs(exporter *x, medrun_error *e) {
    const buffer *b = &x->source.tokenizer;
    json_file f = {.path = "own proofs"};
    if (tokenizer_open(&x->tokenizer, b->data, b->n, x->source.folder, e) ||
        parse_json(&f.j, own_proofs, sizeof own_proofs - 1, f.path, e)) return e->code;
    if (!prove_file(x, &f, e)) prove_own_logits(x, e);
    close_json(&f);
    if (e->code || !x->options.proof) return e->code;
    snprintf(f.path, sizeof f.path, "%s", x->options.proof);
    if (open_json_path(&f, e)) return e->code;
    prove_file(x, &f, e);
    close_json(&f);
    return e->code;
}

/* ============================================================================================
 * 9 Writing: sections on all threads, progress, Ctrl-C
 *
 * Sections have known places, so threads write at once, each one tensor from its first panel to its
 * last; memory is a few buffers each. Jobs stand in the order of the source files, so that hashing
 * and packing read about the same places at about the same time, and the disk once.
 * ============================================================================================ */

static volatile sig_atomic_t interrupted;
static medrun_session *volatile running;        /* its pass ends early, for one may take long    */

static void on_interrupt(int signal_number) {
    interrupted = 1;
    if (running) medrun_interrupt(running);
    on_signal(signal_number, on_interrupt);
}

static int check_interrupt(medrun_error *e) {
    return interrupted ? fail(e, MEDRUN_INTERRUPTED, "interrupted; nothing is left behind") :
                         MEDRUN_OK;
}

/* Processes what is pending. */
static int step_pending(medrun_session *s, medrun_error *e) {
    while (!e->code && medrun_pending(s)) {
        running = s;
        if (check_interrupt(e) || medrun_step(&s, 1, e) != MEDRUN_INTERRUPTED) continue;
        *e = (medrun_error){0};                         /* the next turn says more               */
    }
    running = NULL;
    return e->code;
}

/* On a terminal a bar, else a line for each tenth: a log should not fill with bars. */
static void draw_progress(exporter *x, uint64_t done) {
    double share = x->total ? (double)done / (double)x->total : 1, passed = seconds() - x->start;
    double rate = passed > 0 ? (double)done / passed : 0;
    int left = rate > 0 ? (int)((double)(x->total - done) / rate) : 0, filled = (int)(share * 30);
    if (x->terminal) {
        fprintf(stderr, "\r[%.*s%*s] %3d %%  %5.0f MB/s  %d:%02d left ", filled,
                "##############################", 30 - filled, "", (int)(share * 100), rate / 1e6,
                left / 60, left % 60);
    } else if ((int)(share * 10) > x->tenth) {
        x->tenth = (int)(share * 10);
        fprintf(stderr, "%3d %%  %.0f MB/s\n", x->tenth * 10, rate / 1e6);
    }
}

/* N more bytes are read. Any thread may say so; one of them draws, five times a second. */
static void add_progress(exporter *x, uint64_t n) {
    uint64_t done = atomic_fetch_add(&x->done, n) + n;
    if (pthread_mutex_trylock(&x->lock)) return;
    double now = seconds();
    if (!x->options.quiet && (now - x->drawn > 0.2 || done == x->total)) {
        x->drawn = now;
        draw_progress(x, done);
        fflush(stderr);
    }
    pthread_mutex_unlock(&x->lock);
}

/* Records a thread's failure, if it is the first, and stops the others. */
static void stop_export(exporter *x, const medrun_error *why) {
    pthread_mutex_lock(&x->lock);
    if (!x->error.code) x->error = *why;
    pthread_mutex_unlock(&x->lock);
    atomic_store(&x->stop, true);
}

static int cannot_write(const exporter *x, medrun_error *e) {
    return fail(e, errno_code(MEDRUN_FAILED), "%s: cannot write: %s; nothing is left behind",
                x->options.out, strerror(errno));
}

static int write_at(const exporter *x, const void *from, size_t n, uint64_t at, medrun_error *e) {
    const uint8_t *p = from;
    while (n) {
        ssize_t put = pwrite(x->fd, p, n, (off_t)at);
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return cannot_write(x, e);
        p += put, n -= (size_t)put, at += (uint64_t)put;
    }
    return MEDRUN_OK;
}

/* Reads N rows from ROW on. Where rows stand in pairs, row i of a head's first half is followed by
 * row i of its second half. */
static int read_rows(const exporter *x, const section *t, size_t row, size_t n, uint8_t *to,
                     medrun_error *e) {
    const source_file *file = &x->source.files[t->from->file];
    size_t bytes = source_bytes(t->from->dtype, t->cols), half = t->paired / 2;
    if (!half) return read_at(file->fd, to, n * bytes, t->from->begin + row * bytes, file->name, e);
    for (size_t end = row + n; row < end; row++, to += bytes) {
        size_t head = row / t->paired * t->paired, i = row - head;
        size_t at = head + i % half * 2 + i / half;
        if (read_at(file->fd, to, bytes, t->from->begin + at * bytes, file->name, e))
            return e->code;
    }
    return MEDRUN_OK;
}

/* One section, 16 rows at a time: read, widen, pack, hash, write. */
static int write_section(exporter *x, section *t, const scratch *m, medrun_error *e) {
    const source_tensor *from = t->from;
    const source_file *file = &x->source.files[from->file];
    size_t step = t->type == TYPE_F32 ? 1 : LANES;
    uint64_t at = t->offset;
    sha256 sum;
    sum = sha256_start;
    for (size_t row = 0; row < t->rows && !atomic_load(&x->stop); row += step) {
        size_t n = t->rows - row < step ? t->rows - row : step;
        if (check_interrupt(e) || read_rows(x, t, row, n, m->raw, e)) return e->code;
        if (!to_floats(from->dtype, m->raw, n * t->cols, m->rows))
            return refuse(e, "%s/%s: tensor %s: rows %zu to %zu: found a weight that is infinite, "
                          "not a number or too large; the model is damaged", x->source.folder,
                          file->name, from->name, row, row + n - 1);
        const void *out = m->rows;
        size_t n_out = n * t->cols * sizeof(float);
        if (t->type != TYPE_F32) {
            float most = t->type == TYPE_INT4 ? INT4_LARGEST : 0x1p120f;   /* sums of 64 fit */
            for (size_t i = 0; t->type != TYPE_BF16 && i < n * t->cols; i++)
                if (fabsf(m->rows[i]) > most)
                    return refuse(e, "%s/%s: tensor %s: found the weight %g, %s has none beyond "
                                  "%g; use --type %s", x->source.folder, file->name, from->name,
                                  (double)m->rows[i], type_names[t->type], (double)most,
                                  t->type == TYPE_INT4 ? "int8" : "bf16");
            store_rows(x->kernels, t->type, m->rows, n, t->cols, m->out);
            out = m->out, n_out = panel_bytes(t->type, t->cols);
        }
        sha256_add(&sum, out, n_out);
        if (write_at(x, out, n_out, at, e)) return e->code;
        at += n_out;
        add_progress(x, n * source_bytes(from->dtype, t->cols));
    }
    sha256_done(&sum, t->digest);
    return MEDRUN_OK;
}

/* SHA-256 of BYTES bytes of FD from AT on. */
static int hash_range(exporter *x, int fd, uint64_t at, uint64_t bytes, const char *path,
                      const scratch *m, uint8_t digest[32], medrun_error *e) {
    sha256 sum;
    sum = sha256_start;
    while (bytes && !atomic_load(&x->stop)) {
        size_t n = bytes < READ_BYTES ? (size_t)bytes : READ_BYTES;
        if (check_interrupt(e) || read_at(fd, m->raw, n, at, path, e)) return e->code;
        sha256_add(&sum, m->raw, n);
        at += n, bytes -= n;
        add_progress(x, n);
    }
    sha256_done(&sum, digest);
    return MEDRUN_OK;
}

static void run_jobs(void *context, size_t begin, size_t end, int thread) {
    exporter *x = context;
    for (size_t i = begin; i < end && !atomic_load(&x->stop); i++) {
        const job *j = &x->jobs[i];
        const scratch *m = &x->scratch[thread];
        medrun_error why = {0};
        if (j->section) write_section(x, j->section, m, &why);
        else hash_range(x, j->file->fd, 0, j->file->bytes, j->file->name, m, j->file->digest, &why);
        if (why.code) stop_export(x, &why);
    }
}

/* Reads each section again and compares its hash with the header's. */
static void run_checks(void *context, size_t begin, size_t end, int thread) {
    exporter *x = context;
    for (size_t i = begin; i < end && !atomic_load(&x->stop); i++) {
        const section *t = &x->sections[i];
        uint8_t digest[32];
        medrun_error why = {0};
        hash_range(x, x->fd, t->offset, t->bytes, x->partial, &x->scratch[thread], digest, &why);
        if (!why.code && !atomic_load(&x->stop) && memcmp(digest, t->digest, 32))
            fail(&why, MEDRUN_FAILED, "%s: %s: what was read again is not what was written; the "
                 "disk or the memory is faulty", x->partial, t->name);
        if (why.code) stop_export(x, &why);
    }
}

static int run_parallel(exporter *x, size_t n, task_fn *task, medrun_error *e) {
    parallel_for(&x->pool, n, 1, task, x);
    if (x->error.code) return fail(e, x->error.code, "%s", x->error.text);
    return check_interrupt(e);
}

/* By file; its hash first, then its tensors as they lie. */
static int compare_jobs(const void *a, const void *b) {
    const job *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    if (!x->section != !y->section) return !x->section ? -1 : 1;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* Adds the writing of T to the N jobs that there are. */
static void plan_job(exporter *x, section *t, size_t *n) {
    x->jobs[(*n)++] = (job){t, &x->source.files[t->from->file], t->from->begin};
}

static int plan_jobs(exporter *x, size_t *n_jobs, medrun_error *e) {
    source *s = &x->source;
    size_t n = 0;
    x->jobs = new_array(x->n_sections + s->n_files, sizeof *x->jobs);
    if (!x->jobs) return out_of_memory(e, x->n_sections * sizeof *x->jobs);
    for (size_t i = 0; i < s->n_files; i++) {
        if (s->files[i].fd < 0) continue;
        x->jobs[n++] = (job){NULL, &s->files[i], 0};
        x->total += s->files[i].bytes;
    }
    for (size_t i = 0; i < x->n_sections; i++) {
        const source_tensor *t = x->sections[i].from;
        x->total += x->sections[i].bytes;               /* each is read again at the end         */
        if (!t) continue;
        plan_job(x, &x->sections[i], &n);
        bool again = x->options.calibrate && x->sections[i].type == TYPE_INT4;
        x->total += (t->end - t->begin) * (again ? 2 : 1);
    }
    qsort(x->jobs, n, sizeof *x->jobs, compare_jobs);
    return *n_jobs = n, MEDRUN_OK;
}

/* Buffers for each thread; fewer threads where all of them would take over 512 MB. */
static int start_threads(exporter *x, medrun_error *e) {
    size_t raw = READ_BYTES, panel = 0, floats = 0;
    for (size_t i = 0; i < x->n_sections; i++) {
        const section *t = &x->sections[i];
        if (!t->from) continue;
        size_t n = (t->type == TYPE_F32 ? 1 : LANES) * t->cols;
        size_t in = source_bytes(t->from->dtype, n);
        size_t out = t->type == TYPE_F32 ? 0 : panel_bytes(t->type, t->cols);
        if (in > raw) raw = in;
        if (n > floats) floats = n;
        if (out > panel) panel = out;
    }
    size_t most = (512u << 20) / (raw + panel + 4 * floats);
    if ((size_t)x->threads > most) x->threads = most ? (int)most : 1;
    for (int i = 0; i < x->threads; i++) {
        scratch *m = &x->scratch[i];
        *m = (scratch){new_array(raw, 1), new_array(panel, 1), new_array(floats, sizeof(float))};
        if (!m->raw || !m->out || !m->rows) return out_of_memory(e, raw);
    }
    return pool_start(&x->pool, x->threads, e);
}

/* ---- OUT.partial --------------------------------------------------------------------------- */

/* OUT may be a new name or a file to replace, but none of the sources. */
static int check_target(const exporter *x, medrun_error *e) {
    file_facts there;
    if (get_facts(x->options.out, -1, &there)) return MEDRUN_OK;
    for (size_t i = 0; i < x->source.n_files; i++)
        if (x->source.files[i].device == there.device && x->source.files[i].inode == there.inode)
            return fail(e, MEDRUN_USAGE, "%s: is a file of the source; choose another name",
                        x->options.out);
    return MEDRUN_OK;
}

/* Creates OUT.partial with room for BYTES bytes. */
static int create_partial(exporter *x, uint64_t bytes, medrun_error *e) {
    static const file_kind checkpoint = {"a checkpoint", "MEDRUN0", false, false, 0};
    static const file_kind only_tokenizer = {"a tokenizer.bin", "MEDTOK0", false, false, 0};
    const file_kind *kind = x->options.tokenizer_only ? &only_tokenizer : &checkpoint;
    uint64_t room = 0;
    catch_ends(on_interrupt);           /* so that OUT.partial goes                               */
    if (check_target(x, e) || writer_open(&x->out, x->options.out, kind, x->options.force, e))
        return e->code;
    x->fd = fileno(x->out.f);
    x->partial = (const char *)x->out.partial.data;
    if (disk_room(x->fd, x->partial, &room)) return cannot_write(x, e);
    if (room < bytes)
        return fail(e, MEDRUN_FAILED, "%s: needs %llu MB, but this disk has %llu MB free; make "
                    "room or choose another disk", x->options.out,
                    (unsigned long long)(bytes + 999999) / 1000000,
                    (unsigned long long)room / 1000000);
    return set_length(x->fd, bytes) ? cannot_write(x, e) : MEDRUN_OK;
}

/* Gives the finished file its name; a crash of the machine leaves the old file or the new one. */
static int rename_partial(exporter *x, medrun_error *e) {
    return check_interrupt(e) ? e->code : writer_done(&x->out, e);
}

#include "export_calibrate.c"           /* section 10 */

/* ============================================================================================
 * 11 Finishing: proofs, reading again, the name
 * ============================================================================================ */

/* Written twice: for the engine that computes the proofs, and with them. */
static int write_header(exporter *x, medrun_error *e) {
    buffer b = {0};
    uint8_t digest[32];
    if (render_header(x, e)) return e->code;
    buffer_add(&b, "MEDRUN02", 8);
    write_le(&b, x->header.n, 8);
    buffer_add(&b, x->header.data, x->header.n);
    if (!b.failed) sha256_of(b.data, b.n, digest);
    buffer_add(&b, digest, 32);
    if (b.failed) out_of_memory(e, b.n);
    else if (round_up(b.n, FILE_ALIGN) != x->data_at)
        fail(e, MEDRUN_FAILED, "the header takes %zu bytes, not what was reserved", b.n);
    else write_at(x, b.data, b.n, 0, e);
    buffer_free(&b);
    return e->code;
}

/* The sections that no thread had to read: vectors of known values, and the tokenizer. */
static int write_known_sections(exporter *x, medrun_error *e) {
    for (size_t i = 0; !e->code && i < x->n_sections; i++) {
        section *t = &x->sections[i];
        if (t->from) continue;
        const void *bytes = t->values ? (const void *)t->values : x->source.tokenizer.data;
        sha256_of(bytes, (size_t)t->bytes, t->digest);
        write_at(x, bytes, (size_t)t->bytes, t->offset, e);
    }
    return e->code;
}

/* Strict and with f32 keys and values: the bits are then the same on every machine. */
static int run_logits(const medrun_model *m, logits_proof *p, medrun_error *e) {
    medrun_session *s = NULL;
    medrun_session_options o = {.context = (int)p->n, .strict = true, .kv = MEDRUN_KV_F32};
    size_t vocab = (size_t)m->config.vocab_size;
    if (!medrun_start(&s, m, &o, NULL, 0, e)) medrun_feed(s, p->ids, p->n, e);
    step_pending(s, e);
    const float *row = e->code ? NULL : medrun_logits(s, 0);
    for (size_t i = 0; row && i < vocab; i++)
        if (!(fabsf(row[i]) <= FLT_MAX))
            fail(e, MEDRUN_FAILED, "the model computes logits that are not finite");
    if (row) sha256_of(row, vocab * sizeof *row, p->digest);
    medrun_stop(s);
    if (!e->code && p->given && memcmp(p->digest, p->wanted, 32))
        fail(e, MEDRUN_DIFFERS, "--proof: logits of %zu ids: their SHA-256 differs from the one "
             "that is given", p->n);
    return e->code;
}

/* Opens what was written, as anyone will, and computes the digests of logits. */
static int run_proofs(exporter *x, medrun_error *e) {
    medrun_model *m = NULL;
    medrun_options o = {.threads = x->threads, .kernels = x->kernels->name};
    if (medrun_open(&m, x->partial, &o, e)) return e->code;
    for (size_t i = 0; !e->code && i < x->n_logits; i++) run_logits(m, &x->logits[i], e);
    medrun_close(m);
    return e->code;
}

static int read_again(exporter *x, medrun_error *e) {
    model_file f;
    if (settle_file(x->fd)) return cannot_write(x, e);
    if (file_open(&f, x->partial, false, e)) return e->code;
    file_close(&f);
    return run_parallel(x, x->n_sections, run_checks, e);
}

/* Nothing before this function has written anything. */
static int write_checkpoint(exporter *x, medrun_error *e) {
    size_t n_jobs = 0;
    double start = x->start = seconds();
    x->terminal = !x->options.quiet && is_terminal(STDERR_FILENO);
    if (x->source.notes.n) fputs((const char *)x->source.notes.data, stderr);
    if (!create_partial(x, x->file_bytes, e) && !plan_jobs(x, &n_jobs, e) && !start_threads(x, e) &&
        !run_parallel(x, n_jobs, run_jobs, e) && !write_known_sections(x, e) &&
        !write_header(x, e) && !write_calibrated(x, e) && !run_proofs(x, e) &&
        !write_header(x, e) && !read_again(x, e))
        rename_partial(x, e);
    if (x->terminal) fprintf(stderr, "\r%76s\r", "");
    if (!e->code && !x->options.quiet)
        fprintf(stderr, "%s: %s, %s, %zu tensors, %.1f MB, %.1f s\n", x->options.out, x->name,
                type_names[x->type], x->n_sections - 1, (double)x->file_bytes / 1e6,
                seconds() - start);
    return e->code;
}

static void close_exporter(exporter *x) {
    writer_drop(&x->out);
    if (x->pool.threads) pool_stop(&x->pool);
    for (int i = 0; i < MAX_THREADS; i++) {
        free(x->scratch[i].raw);
        free(x->scratch[i].out);
        free(x->scratch[i].rows);
    }
    for (size_t i = 0; i < x->n_logits; i++) {
        free(x->logits[i].ids);
        buffer_free(&x->logits[i].reference);
    }
    free(x->logits);
    free(x->sections);
    free(x->jobs);
    free_calibration(&x->calibration);
    buffer_free(&x->header);
    buffer_free(&x->token_proofs);
    buffer_free(&x->chat_proofs);
    tokenizer_close(&x->tokenizer);
    close_source(&x->source);
}

/* ============================================================================================
 * 12 Commands: options, --dry-run, main
 * ============================================================================================ */

#define AT(field) offsetof(export_options, field)
static const tool_option option_table[] = {
    {"--type", NULL, "TYPE", AT(type), "int8 (default), bf16, int4: smaller, less exact"},
    {"--template", NULL, "NAME", AT(template_name), "the chat template (default: recognised)"},
    {"--name", NULL, "TEXT", AT(name), "the checkpoint's name (default: the folder's)"},
    {"--proof", NULL, "FILE", AT(proof), "JSON with more proofs: tokens, chats, logits"},
    {"--threads", "-t", "N", AT(threads), "threads (default: all processors)"},
    {"--calibrate", NULL, "FILE", AT(calibrate), "text that int4 is fitted to (advised)"},
    {"--yarn-factor", NULL, "F", AT(yarn_factor), "YaRN's factor, if not the config's"},
    {"--sliding-window", NULL, "N", AT(window), "keys a token sees, 0: all; for GGUF"},
    {"--pre", NULL, "NAME", AT(pre), "the pre-tokenizer, if not the file's; for GGUF"},
    {"--force", NULL, NULL, AT(force), "write over a file that is no checkpoint, too"},
    {"--dry-run", NULL, NULL, AT(dry_run), "check everything, print what would be written"},
    {"--tokenizer-only", NULL, NULL, AT(tokenizer_only), "write only a tokenizer.bin"},
    {"--quiet", "-q", NULL, AT(quiet), "no progress"},
    {"--help", "-h", NULL, AT(help), "this text"},
    {"--version", "-V", NULL, AT(version), "the version"},
};
#undef AT
enum { N_EXPORT_OPTIONS = sizeof option_table / sizeof *option_table };

static void print_export_help(void) {
    print_wrapped("medrun-export SOURCE OUT.mdr [options]\n"
                  "medrun-export --tokenizer-only SOURCE OUT.bin\n\n"
                  "Makes a medrun checkpoint from a Hugging Face folder (config.json, "
                  "tokenizer.json, safetensors) or from a GGUF file. Writes OUT.partial; renames "
                  "it when it is complete and read again.\n\n");
    print_options(&(tool_line){.table = option_table, .n = N_EXPORT_OPTIONS});
    print_wrapped("\nTemplates: " MEDRUN_TEMPLATES ".\n"
                  "MEDRUN_TYPE, MEDRUN_TEMPLATE and so on set an option that is not given.\n"
                  "Exit codes: 0 ok, 1 failed while running, 2 usage, 3 file missing, unsupported "
                  "or malformed, 4 a given proof differs, 6 out of memory, 130 interrupted.\n");
}

static int parse_line(exporter *x, int argc, char **argv, medrun_error *e) {
    const char *words[3];
    tool_line line = {option_table, N_EXPORT_OPTIONS, &x->options, words, 0, 3};
    if (parse_options(&line, argc, argv, e)) return e->code;
    if (line.n_words == 3)
        return fail(e, MEDRUN_USAGE, "found a third word %s, wanted SOURCE and OUT; see --help",
                    words[2]);
    if (line.n_words) x->options.source = words[0];
    if (line.n_words > 1) x->options.out = words[1];
    return MEDRUN_OK;
}

/* Ranges of options, and what is not there yet. */
static int check_options(exporter *x, medrun_error *e) {
    const export_options *o = &x->options;
    double factor = 0;
    const char *limit;
    int window = -1, threads = default_threads(&limit);
    if (!o->source || (!o->out && !o->dry_run))
        return fail(e, MEDRUN_USAGE, "wanted SOURCE and OUT; see --help");
    x->type = o->type ? type_find(o->type) : TYPE_INT8;
    if (x->type != TYPE_BF16 && x->type != TYPE_INT8 && x->type != TYPE_INT4)
        return fail(e, MEDRUN_USAGE, "--type: found %s, wanted bf16, int8 or int4", o->type);
    if (o->calibrate && (x->type != TYPE_INT4 || o->tokenizer_only))
        return fail(e, MEDRUN_USAGE, "--calibrate: is only for --type int4");
    if (choose_kernels(&x->kernels, getenv("MEDRUN_KERNELS"), e)) return e->code;
    option_number("--yarn-factor", o->yarn_factor, 1, 1e6, &factor, e);
    option_int("--sliding-window", o->window, 0, 1 << 24, &window, e);
    option_int("--threads", o->threads, 1, MAX_THREADS, &threads, e);
    if (e->code) return e->code;
    x->source.yarn_factor = factor, x->source.sliding_window = window;
    x->source.pre = o->pre;
    if (o->pre && !is_gguf(o->source))
        return fail(e, MEDRUN_USAGE, "--pre: is only for GGUF files; tokenizer.json says it");
    x->threads = threads;
    if (o->name && (strlen(o->name) >= sizeof x->name || !*o->name))
        return fail(e, MEDRUN_USAGE, "--name: found %zu bytes, wanted 1 to %zu", strlen(o->name),
                    sizeof x->name - 1);
    return MEDRUN_OK;
}

/* --name, or the name in the file, or the folder's own, cut between characters. */
static int choose_name(exporter *x, medrun_error *e) {
    char *full = full_path(x->source.gguf ? x->options.source : x->source.folder);
    const char *name = x->options.name;
    if (!full) return cannot(e, MEDRUN_BAD_FILE, x->options.source, "resolve its path");
    if (!name && x->source.name[0]) name = x->source.name;
    if (!name) name = cache_name(full);
    if (!name) name = last_slash(full) + 1;
    size_t n = strlen(name) < sizeof x->name ? strlen(name) : sizeof x->name - 1;
    memcpy(x->name, name, n);
    x->name[n - utf8_unfinished((const uint8_t *)name, n)] = 0;
    make_safe(x->name), make_safe(x->source.licence);           /* a file's own words           */
    free(full);
    return MEDRUN_OK;
}

static int print_plan(const exporter *x, medrun_error *e) {
    const source *s = &x->source;
    const model_config *c = &s->config;
    uint64_t parameters = 0, weights = 0;
    double token = 4.0 * c->n_layers * c->n_kv_heads * c->head_dim;
    for (size_t i = 0; i + 1 < x->n_sections; i++) {
        parameters += (uint64_t)x->sections[i].rows * x->sections[i].cols;
        weights += x->sections[i].bytes;
    }
    printf("name         %s\nsource       %s\nlicence      %s\n", x->name, x->options.source,
           s->licence[0] ? s->licence : "not stated");
    buffer about = {0};
    describe_config(&about, c, s->architecture, type_names[x->type], parameters, 13);
    fputs(about.data ? (const char *)about.data : "", stdout);
    buffer_free(&about);
    printf("chat         %s, stop ids", s->chat ? s->chat->name : MEDRUN_UNKNOWN);
    for (int i = 0; i < s->n_stops; i++) printf(" %d", s->stops[i]);
    printf("\nsampling     temperature %g, top_k %lld, top_p %g, min_p %g, repeat_penalty %g\n",
           s->sampling.temperature, (long long)s->sampling.top_k, s->sampling.top_p,
           s->sampling.min_p, s->sampling.repeat_penalty);
    if (s->notes.n) fputs((const char *)s->notes.data, stdout);
    printf("tensors      %zu, matrices %s, norms f32; from %s\n", x->n_sections - 1,
           type_names[x->type], x->precision);
    printf("file         %llu bytes\n", (unsigned long long)x->file_bytes);
    printf("memory       %.1f MB of weights; %.1f KB of keys and values (f16) a token of context, "
           "%.1f MB for all %d\n", (double)weights / 1e6, token / 1e3,
           token * c->max_positions / 1e6, c->max_positions);
    return finish_stdout(e);
}

static int export_model(exporter *x, medrun_error *e) {
    source *s = &x->source;
    file_facts there;
    s->folder = x->options.source;
    if (is_gguf(s->folder)) open_gguf_source(s, x->options.source, x->options.template_name, e);
    else if (!get_facts(s->folder, -1, &there) && there.regular)
        name_file(s->folder, e);
    else if (s->sliding_window < 0) open_hf_folder(s, x->options.template_name, e);
    else fail(e, MEDRUN_USAGE, "--sliding-window: is only for GGUF files; config.json says it");
    if (e->code || choose_name(x, e) || plan_model(x, e) || plan_proofs(x, e) ||
        plan_calibration(x, e) || lay_out(x, e)) return e->code;
    return x->options.dry_run ? print_plan(x, e) : write_checkpoint(x, e);
}

/* SOURCE is a folder, a tokenizer.json or tokenizer.model by itself, or a GGUF file. */
static int export_tokenizer(exporter *x, medrun_error *e) {
    source *s = &x->source;
    source_tokenizer t = {0};
    file_facts there;
    s->folder = x->options.source;
    if (is_gguf(s->folder)) open_gguf_tokenizer(s, x->options.source, e);
    else if (!get_facts(s->folder, -1, &there) && there.regular) open_tokenizer_file(s, &t, e);
    else if (!open_cache(s, e)) open_tokenizer(s, &t, e);
    if (!e->code && !s->gguf) convert_tokenizer(&t, &s->tokenizer, e);
    free_tokenizer(&t);
    if (e->code || x->options.dry_run || create_partial(x, s->tokenizer.n, e) ||
        write_at(x, s->tokenizer.data, s->tokenizer.n, 0, e)) return e->code;
    return settle_file(x->fd) ? cannot_write(x, e) : rename_partial(x, e);
}

/* The whole program; tests call it in a child process. */
static int export_main(int argc, char **argv) {
    static exporter x;
    medrun_error e = {0};
    x = (exporter){0};
    if (!(argv = start_program(&argc, argv))) return MEDRUN_FAILED;
    pthread_mutex_init(&x.lock, NULL);
    expect_lost_files("medrun-export");
    catch_ends(end_at_once);
    parse_line(&x, argc, argv, &e);
    if (!e.code && x.options.help) print_export_help();
    else if (!e.code && x.options.version) puts("medrun-export " MEDRUN_VERSION);
    else if (!e.code && !check_options(&x, &e))
        x.options.tokenizer_only ? export_tokenizer(&x, &e) : export_model(&x, &e);
    close_exporter(&x);
    finish_stdout(&e);
    if (e.code) fprintf(stderr, "medrun-export: %s\n", e.text);
    return e.code;
}

#ifndef MEDRUN_EXPORT_NO_MAIN
int main(int argc, char **argv) { return export_main(argc, argv); }
#endif
#endif
