/* tools/export.c: what it makes of good folders, and that it refuses bad ones with the right code,
 * one line on stderr, and nothing left behind. Bad folders are made here from the fixtures. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <stddef.h>
#include <sys/types.h>
#include <unistd.h>

/* The n-th write can fail or be interrupted, the n-th allocation can fail. */
static void *test_realloc(void *p, size_t n);
static ssize_t test_pwrite(int fd, const void *from, size_t n, off_t at);
#define MEDRUN_ALLOC test_realloc
#define MEDRUN_EXPORT_NO_MAIN
#define pwrite test_pwrite
#include "../tools/export.c"
#undef pwrite
#include "test.h"
#include <dirent.h>
#include <sys/resource.h>
#include <sys/wait.h>

static long fail_alloc_at = -1, fail_write_at = -1, signal_write_at = -1;
static atomic_long n_allocs, n_writes;

static void *test_realloc(void *p, size_t n) {
    long i = atomic_fetch_add(&n_allocs, 1);
    return fail_alloc_at >= 0 && i >= fail_alloc_at ? NULL : realloc(p, n);
}

static ssize_t test_pwrite(int fd, const void *from, size_t n, off_t at) {
    long i = atomic_fetch_add(&n_writes, 1);
    if (i == signal_write_at) raise(SIGINT);
    if (i == fail_write_at) return errno = ENOSPC, -1;
    return pwrite(fd, from, n, at);
}

/* ---- folders ------------------------------------------------------------------------------- */

static char work[256], fixtures[256];       /* a temporary folder with src/ and out/            */

/* The path of NAME in it; the same name gives the same pointer. */
static const char *in_work(const char *name) {
    static char names[32][64], paths[32][512];
    size_t i = 0;
    while (names[i][0] && strcmp(names[i], name)) i++;
    snprintf(names[i], sizeof names[i], "%s", name);
    snprintf(paths[i], sizeof paths[i], "%s/%s", work, name);
    return paths[i];
}

/* What a test needs of the machine: without it no test says anything. */
static void must(bool ok, const char *what, const char *path) {
    if (ok) return;
    printf("%s %s: %s\n", what, path, strerror(errno));
    exit(1);
}

static void read_file(const char *path, buffer *b) {
    medrun_error e = {0};
    file_map map = {0};
    b->n = 0;
    if (!map_file(path, &map, &e)) buffer_add(b, map.data, map.n);
    unmap_file(&map);
}

static void write_file(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    must(f && fwrite(data, 1, n, f) == n && !fclose(f), "cannot write", path);
}

/* Removes the files of a folder; returns how many there were. */
static int clear_folder(const char *name) {
    char path[512], file[1024];
    int n = 0;
    snprintf(path, sizeof path, "%s/%s", work, name);
    DIR *d = opendir(path);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        if (entry->d_name[0] == '.') continue;
        snprintf(file, sizeof file, "%s/%s", path, entry->d_name);
        n += !remove(file);
    }
    if (d) closedir(d);
    return n;
}

/* src/ becomes a copy of a fixture. */
static void copy_fixture(const char *name) {
    static const char *const files[] = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors"};
    buffer b = {0};
    clear_folder("src");
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char from[512], to[512];
        snprintf(from, sizeof from, "%s/%s/%s", fixtures, name, files[i]);
        snprintf(to, sizeof to, "%s/src/%s", work, files[i]);
        if (access(from, R_OK)) continue;
        read_file(from, &b);
        write_file(to, b.data, b.n);
    }
    buffer_free(&b);
}

/* Replaces the first FROM in bytes [begin, end) of B by TO. */
static bool replace(buffer *b, size_t begin, size_t end, const char *from, const char *to) {
    buffer out = {0};
    uint8_t *at = memmem(b->data + begin, end - begin, from, strlen(from));
    if (!at) return false;
    size_t n = (size_t)(at - b->data);
    buffer_add(&out, b->data, n);
    buffer_text(&out, to);
    buffer_add(&out, at + strlen(from), b->n - n - strlen(from));
    buffer_free(b);
    *b = out;
    return true;
}

static void edit(const char *file, const char *from, const char *to) {
    char path[512];
    buffer b = {0};
    snprintf(path, sizeof path, "%s/src/%s", work, file);
    read_file(path, &b);
    must(replace(&b, 0, b.n, from, to), "cannot edit", from);
    write_file(path, b.data, b.n);
    buffer_free(&b);
}

/* The same in a safetensors header, whose length follows. */
static void edit_header(const char *file, const char *from, const char *to) {
    char path[512];
    buffer b = {0}, out = {0};
    snprintf(path, sizeof path, "%s/src/%s", work, file);
    read_file(path, &b);
    uint64_t n = read_u64(&(reader){b.data, b.n, 0, false});
    size_t before = b.n;
    must(replace(&b, 8, 8 + (size_t)n, from, to), "cannot edit", from);
    write_le(&out, n + b.n - before, 8);
    buffer_add(&out, b.data + 8, b.n - 8);
    write_file(path, out.data, out.n);
    buffer_free(&b);
    buffer_free(&out);
}

/* ---- running ------------------------------------------------------------------------------- */

static buffer errors;                       /* what the last run wrote to stderr                */
static char answer[4096];                   /* and to stdout                                    */

/* Runs the exporter in a child with arguments up to NULL; returns its exit code. */
static int run(const char *const *args, rlim_t file_limit) {
    char *argv[16] = {(char *)(uintptr_t)"medrun-export"};
    int n = 1, status = 0;
    while (args[n - 1]) argv[n] = (char *)(uintptr_t)args[n - 1], n++;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen(in_work("stdout"), "wb", stdout) || !freopen(in_work("stderr"), "wb", stderr))
            _exit(99);
        struct rlimit limit = {file_limit, file_limit};
        if (file_limit && setrlimit(RLIMIT_FSIZE, &limit)) _exit(98);
        n_allocs = n_writes = 0;
        exit(export_main(n, argv));
    }
    waitpid(child, &status, 0);
    fail_alloc_at = fail_write_at = signal_write_at = -1;
    buffer b = {0};
    read_file(in_work("stderr"), &errors);
    read_file(in_work("stdout"), &b);
    snprintf(answer, sizeof answer, "%s", b.n ? (const char *)b.data : "");
    buffer_free(&b);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

#define RUN(...) run((const char *const[]){__VA_ARGS__, NULL}, 0)
#define EXPORT(...) RUN(in_work("src"), in_work("out/x.mdr"), __VA_ARGS__)

/* The last run gave CODE, one line that holds NEEDLE, and left nothing in out/. */
static void expect(int found, int code, const char *needle, const char *what) {
    size_t lines = 0;
    for (size_t i = 0; i < errors.n; i++) lines += errors.data[i] == '\n';
    const char *text = errors.n ? (const char *)errors.data : "";
    int left = clear_folder("out");
    bool good = found == code && (code == 0 || (lines == 1 && strstr(text, needle))) &&
                left == (code == 0);
    if (!CHECK(good))
        printf("    %s: code %d (wanted %d), %zu lines, %d files left: %s", what, found, code,
               lines, left, text);
}

/* ---- good folders -------------------------------------------------------------------------- */

/* Each weight of the source's tensor is in T: exactly in bf16, within half a step in int8, in int4
 * near it, groups of 32 with a mean square that 12 of 172 steps of its range bound. */
static void compare_weights(const char *file, const char *tensor_name, const tensor *t) {
    source s = {.folder = in_work("src")};
    medrun_error e = {0};
    size_t bad = 0, n = t->cols;
    if (!CHECK(!read_shard(&s, file, &e) && !sort_tensors(&s, &e))) return;
    const source_tensor *from = find_tensor(&s, tensor_name);
    float *row = new_array(n, sizeof *row), *from_raw = new_array(n, sizeof *from_raw);
    uint16_t *raw = new_array(n, 2);
    CHECK(from);
    for (size_t r = 0; from && r < t->rows; r++) {
        size_t panel = panel_bytes(t->type, t->cols);
        read_at(s.files[0].fd, raw, 2 * n, from->begin + 2 * n * r, file, &e);
        panel_unpack_row(t->type, t->data + r / LANES * panel, r % LANES, n, row);
        for (size_t k = 0; t->type == TYPE_INT4 && k < n; k += GROUP4) {
            double low = 0, high = 0, squares = 0, m = n - k < GROUP4 ? (double)(n - k) : GROUP4;
            for (size_t i = k; i < n && i < k + GROUP4; i++) {
                double x = (double)bf16_to_f32(raw[i]), d = (double)row[i] - x;
                low = fmin(low, x), high = fmax(high, x), squares += d * d;
            }
            bad += !(sqrt(squares / m) <= (high - low) * 12 / 172);
        }
        for (size_t k = 0; k < n; k++) from_raw[k] = bf16_to_f32(raw[k]);
        if (t->type == TYPE_INT8) turn_row(row, n), turn_row(from_raw, n);  /* as it is rounded  */
        for (size_t k = 0; t->type != TYPE_INT4 && k < n; k++) {
            float largest = 0;
            for (size_t i = k / GROUP * GROUP; i < n && i < (k / GROUP + 1) * GROUP; i++)
                largest = fmaxf(largest, fabsf(from_raw[i]));
            float tolerance = t->type == TYPE_BF16 ? 0 : largest / 127 * 0.51f;
            bad += !(fabsf(row[k] - from_raw[k]) <= tolerance);
        }
    }
    CHECK_EQ(bad, 0);
    free(row), free(from_raw);
    free(raw);
    close_source(&s);
}

/* Logits of the last of 64 tokens against those of transformers: 1 for "all is wrong". */
static double logits_error(const medrun_model *m, const char *fixture) {
    char path[512];
    buffer ids = {0}, logits = {0};
    medrun_session *s = NULL;
    medrun_session_options o = {.context = 64, .strict = true, .kv = MEDRUN_KV_F32};
    size_t vocab = (size_t)m->config.vocab_size;
    double difference = 1, size = 1;
    snprintf(path, sizeof path, "%s/%s/ids_64.i32", fixtures, fixture);
    read_file(path, &ids);
    snprintf(path, sizeof path, "%s/%s/logits_64.f32", fixtures, fixture);
    read_file(path, &logits);
    if (CHECK(ids.n == 4 * 64 && logits.n == 4 * 64 * vocab &&
              !medrun_start(&s, m, &o, NULL, 0, NULL) &&
              !medrun_feed(s, (int32_t *)(void *)ids.data, 64, NULL))) {
        while (medrun_pending(s)) medrun_step(&s, 1, NULL);
        const float *found = medrun_logits(s, 0);
        const float *wanted = (const float *)(void *)logits.data + 63 * vocab;
        difference = size = 0;
        for (size_t i = 0; i < vocab; i++) {
            double d = (double)(found[i] - wanted[i]);
            difference += d * d, size += (double)(wanted[i] * wanted[i]);
        }
    }
    medrun_stop(s);
    buffer_free(&ids);
    buffer_free(&logits);
    return sqrt(difference / size);
}

static void test_good(const char *fixture, const char *type, double tolerance) {
    medrun_model *m = NULL;
    medrun_error e = {0};
    medrun_info info;
    copy_fixture(fixture);
    if (!CHECK_EQ(EXPORT("--type", type, "--threads", "3"), 0)) return;
    CHECK(!answer[0] && access(in_work("out/x.mdr.partial"), F_OK));
    if (!CHECK(!medrun_open(&m, in_work("out/x.mdr"), NULL, &e))) return;
    medrun_describe(m, &info);
    CHECK(!strcmp(info.type, type) && !strcmp(info.chat_template, "llama3"));
    CHECK(!strcmp(info.name, "src") && strstr(info.notice, "Not a medical device"));
    CHECK_EQ(info.n_stops, 2);
    CHECK(info.sampling.temperature > 0.59f && info.sampling.temperature < 0.61f &&
          info.sampling.top_k == 50);
    double error = logits_error(m, fixture);
    if (!CHECK(error < tolerance)) printf("    %s %s: %g\n", fixture, type, error);
    bool shards = !strcmp(fixture, "llama-sharded");
    const char *last = shards ? "model-00002-of-00002.safetensors" : "model.safetensors";
    compare_weights(last, "model.layers.1.mlp.down_proj.weight", &m->layers[1].down);
    if (!m->config.tied) compare_weights(last, "lm_head.weight", &m->output);
    medrun_close(m);
}

/* Every digest of the header is that of the bytes; provenance has the files' own. */
static void test_header(void) {
    model_file f;
    medrun_error e = {0};
    uint8_t digest[32];
    char hex[65];
    buffer b = {0};
    copy_fixture("llama-sharded");
    CHECK_EQ(EXPORT("--name", "A \"name\" \xc3\xa9"), 0);
    if (!CHECK(!file_open(&f, in_work("out/x.mdr"), false, &e))) return;
    const json *j = &f.header;
    CHECK(json_is(j, json_get(j, 0, "name"), "A \"name\" \xc3\xa9"));
    size_t n = 0, wrong = 0;
    for EACH(j, f.tensors, c) {
        uint64_t offset = 0, bytes = 0;
        json_size(j, json_get(j, c, "offset"), &offset);
        json_size(j, json_get(j, c, "bytes"), &bytes);
        sha256_of(f.map.data + offset, (size_t)bytes, digest);
        hex_of(digest, hex);
        n++, wrong += !json_is(j, json_get(j, c, "sha256"), hex);
    }
    CHECK(n == 30 && wrong == 0);
    for EACH(j, json_get(j, json_get(j, 0, "provenance"), "sources"), c) {
        char path[512];
        snprintf(path, sizeof path, "%s/src/%s", work, show(j, json_get(j, c, "file")).text);
        read_file(path, &b);
        sha256_of(b.data, b.n, digest);
        hex_of(digest, hex);
        n++, wrong += !json_is(j, json_get(j, c, "sha256"), hex);
    }
    CHECK(n == 37 && wrong == 0);
    uint32_t proofs = json_get(j, 0, "proofs");
    CHECK_EQ(children(j, json_get(j, proofs, "tokens")), 12);
    CHECK_EQ(children(j, json_get(j, proofs, "chats")), 3);
    uint32_t logits = json_get(j, proofs, "logits");
    CHECK_EQ(children(j, logits), 2);
    medrun_model *m = NULL;
    CHECK(!medrun_open(&m, in_work("out/x.mdr"), NULL, &e));
    for EACH(j, logits, c) {
        logits_proof p = {.given = true, .n = children(j, json_get(j, c, "ids"))};
        int32_t ids[16] = {0};
        size_t i = 0;
        for EACH(j, json_get(j, c, "ids"), id) if (i < 16) ids[i++] = (int32_t)json_number(j, id);
        p.ids = ids;
        CHECK(!json_text(j, c, "", "sha256", hex, sizeof hex, &e) && parse_hex(hex, p.wanted));
        CHECK(m && p.n <= 16 && !run_logits(m, &p, &e));
    }
    medrun_close(m);
    file_close(&f);
    buffer_free(&b);
}

/* Threads do not show in the file; the section is a tokenizer.bin; an old OUT is replaced. */
static void test_same_bytes(void) {
    buffer one = {0}, other = {0}, bin = {0};
    copy_fixture("llama-tied");
    CHECK_EQ(EXPORT("--threads=1"), 0);
    read_file(in_work("out/x.mdr"), &one);
    CHECK_EQ(EXPORT("-t", "7"), 0);
    read_file(in_work("out/x.mdr"), &other);
    CHECK(one.n && one.n == other.n && !memcmp(one.data, other.data, one.n));
    CHECK_EQ(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin")), 0);
    read_file(in_work("out/t.bin"), &bin);
    CHECK(bin.n && bin.n < one.n && !memcmp(one.data + one.n - bin.n, bin.data, bin.n));
    CHECK_EQ(RUN(in_work("src/tokenizer.json"), in_work("out/u.bin"), "--tokenizer-only"), 0);
    read_file(in_work("out/u.bin"), &other);
    CHECK(bin.n == other.n && !memcmp(bin.data, other.data, bin.n));
    clear_folder("out");
    copy_fixture("llama-plain");
    edit("config.json", "\"rope_theta\": 10000.0,", "");
    CHECK_EQ(EXPORT("--dry-run"), 0);
    CHECK(strstr(answer, "no rope_theta") && strstr(answer, "rope theta 10000"));
    copy_fixture("llama-tied");
    CHECK_EQ(RUN("--dry-run", in_work("src")), 0);
    CHECK(strstr(answer, "llama3 scaling 8 (1 to 4) from 64") && strstr(answer, "tied") && !errors.n);
    CHECK_EQ(EXPORT("--dry-run"), 0);
    CHECK_EQ(clear_folder("out"), 0);
    buffer_free(&one);
    buffer_free(&other);
    buffer_free(&bin);
}

/* BF16, F16 and F32 sources of the same numbers give the same sections. */
static void test_source_types(void) {
    static const struct { const char *name; size_t size; } types[] = {{"F16", 2}, {"F32", 4}};
    buffer b = {0}, original = {0}, found = {0};
    copy_fixture("llama-plain");
    read_file(in_work("src/model.safetensors"), &b);
    size_t head = 8 + (size_t)read_u64(&(reader){b.data, b.n, 0, false});
    for (size_t i = head; i < b.n; i += 2) {            /* to values that an f16 holds as well   */
        uint16_t h;
        memcpy(&h, b.data + i, 2);
        h = f32_to_bf16(f16_to_f32(f32_to_f16(bf16_to_f32(h))));
        if (fabsf(bf16_to_f32(h)) < 1e-3f) h = 0;
        memcpy(b.data + i, &h, 2);
    }
    write_file(in_work("src/model.safetensors"), b.data, b.n);
    CHECK_EQ(EXPORT("--type", "int8"), 0);
    read_file(in_work("out/x.mdr"), &original);
    for (size_t k = 0; k < 2; k++) {
        buffer out = {0}, text = {0};
        json j;
        CHECK(!json_parse(&j, (const char *)b.data + 8, head - 8, NULL));
        buffer_text(&text, "{");
        for EACH_KEY(&j, 0, c) {
            if (json_is(&j, c, "__metadata__")) continue;
            uint64_t begin = 0, end = 0;
            uint32_t place = json_get(&j, c + 1, "data_offsets");
            json_size(&j, place + 1, &begin), json_size(&j, place + 2, &end);
            buffer_printf(&text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,"
                          "%llu]}", text.n > 1 ? "," : "", show(&j, c).text, types[k].name,
                          show(&j, json_get(&j, c + 1, "shape")).text,
                          (unsigned long long)begin / 2 * types[k].size,
                          (unsigned long long)end / 2 * types[k].size);
        }
        buffer_text(&text, "}");
        write_le(&out, text.n, 8);
        buffer_add(&out, text.data, text.n);
        for (size_t i = head; i < b.n; i += 2) {
            uint16_t h;
            memcpy(&h, b.data + i, 2);
            float f = bf16_to_f32(h);
            write_le(&out, k ? float_bits(f) : f32_to_f16(f), types[k].size);
        }
        write_file(in_work("src/model.safetensors"), out.data, out.n);
        CHECK_EQ(EXPORT("--type", "int8"), 0);
        read_file(in_work("out/x.mdr"), &found);
        CHECK(found.n == original.n && found.n > 65536 &&
              !memcmp(found.data + 65536, original.data + 65536, found.n - 65536));
        json_free(&j);
        buffer_free(&out);
        buffer_free(&text);
    }
    buffer_free(&b);
    buffer_free(&original);
    buffer_free(&found);
}

/* Converts N bytes as a tokenizer.model; the message is in E. */
static int convert_model(const uint8_t *bytes, size_t n, medrun_error *e) {
    static const char *const name = "out/m.model";
    source_tokenizer t = {.is_model = true};
    buffer out = {0};
    *e = (medrun_error){0};
    write_file(in_work(name), bytes, n);
    snprintf(t.file.path, sizeof t.file.path, "%s", in_work(name));
    int code = json_parse(&t.config.j, "{}", 2, e);
    if (!code) code = map_file(t.file.path, &t.file.map, e);
    if (!code) code = convert_tokenizer(&t, &out, e);
    free_tokenizer(&t);
    buffer_free(&out);
    remove(in_work(name));
    return code;
}

/* In protobuf the last value of a field counts, so each edit is what is put behind the file. */
static const struct { const char *bytes; size_t n; int code; const char *needle; } model_edits[] = {
#define EDIT(bytes, code, needle) {bytes, sizeof bytes - 1, code, needle}
    EDIT("", 0, ""),
    EDIT("\xF8\x06\x07", 0, ""),                               /* an unknown field              */
    EDIT("\xFA\x06\x03" "abc", 0, ""),
    EDIT("\x0B", 3, "no tokenizer.model"),                       /* a group                       */
    EDIT("\x00\x00", 3, "no tokenizer.model"),                  /* field 0                       */
    EDIT("\x12\x7F\x18", 3, "no tokenizer.model"),             /* longer than the file          */
    EDIT("\xF8\x06\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x02", 3, "no tokenizer.model"),
    EDIT("\x12\x01\x18", 3, "no tokenizer.model"),
    EDIT("\x12\x02\x18\x01", 3, "model_type: found 1, wanted 2 (BPE"),
    EDIT("\x12\x03\x98\x02\x00", 3, "byte_fallback: found 0"),
    EDIT("\x12\x03\xC0\x01\x01", 3, "treat_whitespace_as_suffix: found 1"),
    EDIT("\x12\x05\xC8\x02\xA0\x8D\x06", 3, "bos_id: found 100000"),
    EDIT("\x12\x03\xD0\x02\x05", 3, "eos_id: found 5"),
    EDIT("\x12\x0C\xC8\x02\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 0, ""),    /* -1       */
    EDIT("\x1A\x04\x12\x02xy", 3, "precompiled_charsmap: found 2"),
    EDIT("\x1A\x02\x18\x00", 0, ""),                          /* add_dummy_prefix              */
    EDIT("\x1A\x02\x20\x01", 3, "remove_extra_whitespaces: found 1"),
    EDIT("\x1A\x02\x28\x00", 3, "escape_whitespaces: found 0"),
    EDIT("\x2A\x04\x12\x02xy", 3, "denormalizer"),
    EDIT("\x0A\x04\x0A\x02zz", 3, "piece 560: found no score"),
    EDIT("\x0A\x00", 3, "piece 560: found no score"),
    EDIT("\x0A\x05\x15\0\0\0\0", 3, "piece 560: found \"\""),
    EDIT("\x0A\x0B\x0A\x02zz\x15\0\0\0\0\x18\x05", 3, "of type 5"),
    EDIT("\x0A\x0B\x0A\x02zz\x15\0\0\0\0\x18\x06", 3, "of type 6"),
    EDIT("\x0A\x0B\x0A\x02zz\x15\0\0\0\0\x18\x07", 3, "of type 7"),
    EDIT("\x0A\x08\x0A\x01" "a\x15\0\0\0\0", 3, "pieces that all differ"),
    EDIT("\x0A\x0D\x0A\x06<0x41>\x15\0\0\0", 3, "no tokenizer.model"),
    EDIT("\x0A\x0F\x0A\x06<0x41>\x15\0\0\0\0\x18\x06", 3, "byte piece"),
    EDIT("\x0A\x0D\x0A\x07<s>a\xC3\x9F" "b\x15\0\0\0\0", 3, "no tokenizer.model"),
    EDIT("\x0A\x0B\x0A\x04" "a\xC7\xBE" "b\x15\0\0\0\0", 3, "characters that are pieces"),
    EDIT("\x0A\x0A\x0A\x03" "a\xFF" "b\x15\0\0\0\0", 3, "characters that are pieces"),
    EDIT("\x0A\x09\x0A\x02zq\x15\0\0\xC0\x7F", 3, "score of piece"),
#undef EDIT
};

/* The same for SentencePiece's tokenizer.json: FROM is replaced where it stands first. */
static const struct {
    const char *file, *from, *to;
    int code;
    const char *needle;
} spaced_edits[] = {
    {"legacy.json", "\"Prepend\"", "\"Lowercase\"", 3, "normalizer: found"},
    {"legacy.json", "\"prepend\": \"\u2581\"", "\"prepend\": \"_\"", 3, "normalizer: found"},
    {"legacy.json", "\"content\": \"\u2581\"", "\"content\": \"_\"", 3, "normalizer: found"},
    {"legacy.json", "\"pre_tokenizer\": null", "\"pre_tokenizer\": {\"type\": \"ByteLevel\"}", 3,
     "none beside a normalizer"},
    {"legacy.json", "\"ByteFallback\"", "\"ByteLevel\"", 3, "decoder: found"},
    {"legacy.json", "\"start\": 1", "\"start\": 2", 3, "decoder: found"},
    {"legacy.json", "\"stop\": 0", "\"stop\": 1", 3, "decoder: found"},
    {"legacy.json", "\"byte_fallback\": true", "\"byte_fallback\": false", 3, "unk_token"},
    {"legacy.json", "\"ignore_merges\": false", "\"ignore_merges\": true", 3, "ignore_merges"},
    {"legacy.json", "\"<0xC3>\"", "\"<0xCg>\"", 3, "byte 0xc3 is no piece"},
    {"legacy.json", "\"content\": \" x\"", "\"content\": \"\u2581x\"", 3, "no U+2581 in it"},
    {"legacy.json", "\"normalized\": false", "\"normalized\": true", 3, "added_tokens"},
    {"metaspace.json", "\"split\": false", "\"split\": true", 3, "pre_tokenizer: found"},
    {"metaspace.json", "\"prepend_scheme\": \"first\"", "\"prepend_scheme\": \"never\"", 0, ""},
    {"metaspace.json", "\"prepend_scheme\": \"first\"", "\"prepend_scheme\": \"last\"", 3,
     "a prepend_scheme"},
    {"metaspace.json", "\"replacement\": \"\u2581\"", "\"replacement\": \"_\"", 3, "pre_tokenizer"},
    {"metaspace.json", "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", 3,
     "none beside"},
};

static void test_spaced_edits(void) {
    for (size_t i = 0; i < sizeof spaced_edits / sizeof *spaced_edits; i++) {
        char path[512];
        buffer b = {0};
        snprintf(path, sizeof path, "%s/tokenizer/%s", fixtures, spaced_edits[i].file);
        read_file(path, &b);
        must(replace(&b, 0, b.n, spaced_edits[i].from, spaced_edits[i].to), "cannot edit",
             spaced_edits[i].from);
        write_file(in_work("src/edited.json"), b.data, b.n);
        int code = RUN("--tokenizer-only", in_work("src/edited.json"), in_work("out/t.bin"));
        expect(code, spaced_edits[i].code, spaced_edits[i].needle, spaced_edits[i].to);
        buffer_free(&b);
    }
    remove(in_work("src/edited.json"));
}

/* Edits, every cut, a bit of every byte, and what is no protobuf at all. */
static void test_model(void) {
    char path[512];
    buffer b = {0}, edited = {0};
    medrun_error e;
    size_t wrong = 0, accepted = 0;
    snprintf(path, sizeof path, "%s/tokenizer/pieces.model", fixtures);
    read_file(path, &b);
    for (size_t i = 0; i < sizeof model_edits / sizeof *model_edits; i++) {
        edited.n = 0;
        buffer_add(&edited, b.data, b.n);
        buffer_add(&edited, model_edits[i].bytes, model_edits[i].n);
        int code = convert_model(edited.data, edited.n, &e);
        if (!CHECK(code == model_edits[i].code && strstr(e.text, model_edits[i].needle)))
            printf("    edit %zu (%s): %d %s\n", i, model_edits[i].needle, code, e.text);
    }
    for (size_t n = 0; n < b.n; n++) {
        int code = convert_model(b.data, n, &e);
        wrong += code != e.code || (code && code != MEDRUN_BAD_FILE);
        accepted += !code;
    }
    CHECK(!wrong && accepted <= 1);                     /* its last field, which is empty        */
    accepted = 0;
    for (size_t i = 0; i < b.n; i++) {
        uint8_t before = b.data[i];
        b.data[i] = (uint8_t)(before ^ (1u << test_random() % 8));
        int code = convert_model(b.data, b.n, &e);
        wrong += code != e.code || (code && code != MEDRUN_BAD_FILE);
        accepted += !code;
        b.data[i] = before;
    }
    CHECK_EQ(wrong, 0);
    CHECK(accepted > 0 && accepted < b.n);
    CHECK_EQ(convert_model((const uint8_t *)"{}", 2, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "no tokenizer.model"));
    for (int i = 0; i < 2000; i++) {
        uint8_t noise[64];
        size_t n = 1 + test_random() % sizeof noise;
        for (size_t k = 0; k < n; k++) noise[k] = (uint8_t)test_random();
        wrong += convert_model(noise, n, &e) != MEDRUN_BAD_FILE;
    }
    CHECK_EQ(wrong, 0);
    buffer_free(&b), buffer_free(&edited);
}

/* The tokenizer.bin of the folder, whose tokenizer.json has TO instead of FROM from now on. */
static void read_edited(const char *from, const char *to, buffer *file) {
    edit("tokenizer.json", from, to);
    CHECK_EQ(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin")), 0);
    read_file(in_work("out/t.bin"), file);
}

/* Without a normalizer, what is `normalized` is the same tokenizer. */
static void test_normalized(void) {
    buffer plain = {0}, marked = {0};
    copy_fixture("llama-plain");
    read_edited("\"added_tokens\": [", "\"added_tokens\": [{\"id\": 283, \"content\": "
                "\"type2diabetes\", \"normalized\": false},", &plain);
    read_edited("diabetes\", \"normalized\": false", "diabetes\", \"normalized\": true", &marked);
    CHECK(plain.n && plain.n == marked.n && !memcmp(plain.data, marked.data, plain.n));
    clear_folder("out");
    buffer_free(&plain);
    buffer_free(&marked);
}

/* A word that is added though it is a piece: it is cut out of texts, and what it merged with stays
 * apart. The ids are those of Hugging Face tokenizers. */
static void test_added_piece(void) {
    static const int32_t wanted[] = {83, 257, 77, 256, 257, 220, 257, 81};
    tokenizer t;
    medrun_error e = {0};
    buffer file = {0}, ids = {0};
    copy_fixture("llama-plain");
    read_edited("\"added_tokens\": [", "\"added_tokens\": [{\"id\": 257, \"content\": "
                "\"he\", \"normalized\": true},", &file);
    if (CHECK(!tokenizer_open(&t, file.data, file.n, "t.bin", &e))) {
        tokenizer_encode(&t, "then the her", 12, 0, &ids, &e);
        CHECK(ids.n == sizeof wanted && !memcmp(ids.data, wanted, sizeof wanted));
        tokenizer_close(&t);
    }
    clear_folder("out");
    buffer_free(&file);
    buffer_free(&ids);
}

/* What each form's own reference makes of texts (tools/reference/make_tokenizers.py). */
static void test_forms(void) {
    static const struct { const char *source, *vectors; int kind, vocab, bos; } forms[] = {
        {"tekken.json", "tekken.bin", 1, 806, 1}, {"legacy.json", "legacy.bin", 2, 504, 1},
        {"metaspace.json", "metaspace.bin", 2, 504, 1}, {"pieces.model", "pieces.bin", 2, 560, 1}};
    for (size_t f = 0; f < 4; f++) {
        char path[512];
        buffer bin = {0}, vectors = {0};
        tokenizer t;
        int wrong = 0, records = 0;
        snprintf(path, sizeof path, "%s/tokenizer/%s", fixtures, forms[f].source);
        CHECK_EQ(RUN("--tokenizer-only", path, in_work("out/t.bin")), 0);
        read_file(in_work("out/t.bin"), &bin);
        snprintf(path, sizeof path, "%s/tokenizer/%s", fixtures, forms[f].vectors);
        read_file(path, &vectors);
        if (!CHECK(!tokenizer_open(&t, bin.data, bin.n, "t.bin", NULL))) return;
        CHECK(t.kind == forms[f].kind && t.vocab_size == forms[f].vocab && t.add_bos &&
              t.bos == forms[f].bos);
        reader r = {vectors.data, vectors.n, 0, false};
        for (; r.at < r.n && !r.failed; records++) {
            int flags = (int)read_le(&r, 4);
            size_t n = read_le(&r, 4);
            const uint8_t *text = read_bytes(&r, n);
            size_t n_ids = read_le(&r, 4);
            const uint8_t *ids = read_bytes(&r, 4 * n_ids);
            size_t n_back = read_le(&r, 4);
            const uint8_t *back = read_bytes(&r, n_back);
            buffer got = {0}, decoded = {0};
            if (r.failed) break;
            tokenizer_encode(&t, (const char *)text, n, flags, &got, NULL);
            tokenizer_decode(&t, (const int32_t *)(void *)got.data, got.n / 4, false, &decoded);
            bool same = got.n == 4 * n_ids && (!got.n || !memcmp(got.data, ids, got.n)) &&
                        decoded.n == n_back && (!n_back || !memcmp(decoded.data, back, n_back));
            if (!same && wrong++ < 3) printf("    %s: %.60s\n", forms[f].source,
                                             (const char *)text);
            buffer_free(&got), buffer_free(&decoded);
        }
        CHECK(!r.failed && records > 180);
        CHECK_EQ(wrong, 0);
        remove(in_work("out/t.bin"));
        tokenizer_close(&t);
        buffer_free(&bin), buffer_free(&vectors);
    }
}

static void test_vectors(void) {
    char path[512];
    buffer bin = {0}, vectors = {0};
    tokenizer t;
    medrun_error e = {0};
    size_t n = 0, wrong = 0;
    snprintf(path, sizeof path, "%s/tokenizer", fixtures);
    CHECK_EQ(RUN("--tokenizer-only", path, in_work("out/t.bin")), 0);
    read_file(in_work("out/t.bin"), &bin);
    snprintf(path, sizeof path, "%s/tokenizer/vectors.bin", fixtures);
    read_file(path, &vectors);
    if (!CHECK(!tokenizer_open(&t, bin.data, bin.n, "t.bin", &e))) return;
    CHECK(t.add_bos && t.bos == 664 && !strcmp(t.pretokenizer->name, "llama3"));
    reader r = {vectors.data, vectors.n, 0, false};
    for (; r.at < r.n && !r.failed; n++) {
        buffer ids = {0};
        uint32_t bytes = (uint32_t)read_le(&r, 4);
        const uint8_t *text = read_bytes(&r, bytes);
        uint32_t count = (uint32_t)read_le(&r, 4);
        const uint8_t *wanted = read_bytes(&r, 4 * (size_t)count);
        if (r.failed) break;
        tokenizer_encode(&t, (const char *)text, bytes, 0, &ids, &e);
        wrong += ids.n != 4 * (size_t)count || (count && memcmp(ids.data, wanted, ids.n));
        buffer_free(&ids);
    }
    CHECK(n > 500 && wrong == 0 && !r.failed);
    tokenizer_close(&t);
    buffer_free(&bin);
    buffer_free(&vectors);
    clear_folder("out");
}

/* A tokenizer.model with tokens that transformers added: ids of transformers 4.46.3's slow class. */
#define DECODED(id, text, rest) "\"added_tokens_decoder\": {\"" id "\": {\"content\": \"" text "\", " \
    rest "}, "
#define SPECIAL "\"special\": true"
static const struct {
    const char *from, *to, *added, *special;    /* of tokenizer_config.json; two more files    */
    const char *refused, *text;
    int32_t ids[24];
} with_added[] = {
    {"\"legacy\"", DECODED("384", "<|im_end|>", SPECIAL) "\"385\": {\"content\": \"<|im_start|>\", "
     SPECIAL "}}, \"x\"", NULL, NULL, NULL, "<|im_start|>user\nhas type 2 <|im_end|>the end<unk> </s>",
     {385, 333, 345, 340, 272, 13, 342, 311, 260, 357, 347, 334, 333, 370, 333, 384, 263, 333, 268,
      344, 0, 259, 2}},
    {"\"legacy\": true", DECODED("384", "<|im_end|>", SPECIAL) "\"385\": {\"content\": \"<|im_start|>"
     "\"}, \"386\": {\"content\": \"type 2\"}}", NULL, NULL, NULL,
     "has<|im_end|> the<|im_start|>the type 2type 2",
     {333, 342, 311, 384, 259, 335, 261, 385, 263, 333, 386, 386}},
    {"\"legacy\": true", DECODED("384", "<|im_end|>", SPECIAL) "\"385\": {\"content\": \"<|im_start|>"
     "\", " SPECIAL "}}, \"legacy\": false", NULL, NULL, NULL, "has<|im_end|> the<|im_start|>the type 2type 2",
     {333, 342, 311, 384, 263, 385, 335, 261, 260, 357, 347, 334, 333, 370, 335, 357, 347, 334, 333,
      370}},
    /* no space before a space where legacy is false */
    {"\"legacy\": true", DECODED("384", "<|im_end|>", SPECIAL) "\"385\": {\"content\": \"<|im_start|>"
     "\", " SPECIAL "}}, \"legacy\": false", NULL, NULL, NULL, "  two spaces",
     {259, 335, 352, 339, 276, 347, 326, 269}},
    {"\"legacy\"", "\"x\"", "{\"<s>\": 1, \"<|im_end|>\": 384, \"<|im_start|>\": 385}",
     "{\"eos_token\": {\"content\": \"<|im_end|>\"}}", NULL, "has<|im_end|> the<|im_start|>the type 2type 2",
     {333, 342, 311, 384, 259, 335, 261, 385, 263, 260, 357, 347, 334, 333, 370, 335, 357, 347, 334,
      333, 370}},
    {"\"</s>\"", "\"<|im_end|>\"", "{\"<|im_end|>\": 384, \"<|im_start|>\": 385}", NULL, NULL,
     "the<|im_end|>", {263, 384}},
    {"\"legacy\"", DECODED("384", "<|im_end|>", "\"lstrip\": true") "\"385\": {\"content\": \"y\"}}, \"legacy\"", NULL, NULL,
     "lstrip, rstrip all false", NULL, {0}},
    {"\"legacy\"", DECODED("5", "<|im_end|>", SPECIAL) "\"384\": {\"content\": \"y\"}}, \"legacy\"", NULL, NULL,
     "agrees with tokenizer.model", NULL, {0}},
    {"\"legacy\"", "\"x\"", "{\"<|im_end|>\": 40000}", NULL, "ids without large gaps", NULL, {0}},
    {"\"legacy\"", "\"x\"", "{\"<|im_end|>\": 300}", NULL, "agrees with tokenizer.model", NULL, {0}},
    {"\"legacy\"", "\"x\"", "{\"\u2581x\": 384}", NULL, "no U+2581", NULL, {0}},
    {"\"legacy\"", "\"x\"", "{\"\": 384}", NULL, "some content", NULL, {0}},
    {"\"legacy\"", "\"x\"", "[]", NULL, "wanted an object", NULL, {0}},
};

/* No run of a conversation has a space that the same text has not. */
static void check_runs(const tokenizer *t) {
    static const medrun_message said[] = {{"system", "the end", 7}, {"user", " type", 5}};
    buffer text = {0}, ids = {0}, wanted = {0};
    medrun_error e = {0};
    medrun_chat_options o = {0};
    for (int as_text = 0; as_text < 2; as_text++) {
        chat_writer w = {.c = chat_find("afm"), .t = t, .o = &o, .as_text = as_text > 0,
                         .out = as_text ? &text : &ids, .e = &e};
        CHECK(!chat_render(&w, said, 2, true));
    }
    tokenizer_encode(t, (const char *)text.data, text.n, MEDRUN_PARSE_SPECIAL, &wanted, &e);
    CHECK(!e.code && ids.n > 40 && ids.n == wanted.n && !memcmp(ids.data, wanted.data, ids.n));
    buffer_free(&text);
    buffer_free(&ids);
    buffer_free(&wanted);
}

static void test_added_to_model(void) {
    for (size_t i = 0; i < sizeof with_added / sizeof *with_added; i++) {
        buffer bin = {0}, ids = {0};
        tokenizer t;
        size_t n = 0;
        copy_fixture("mistral-spm");
        edit("tokenizer_config.json", with_added[i].from, with_added[i].to);
        if (!strncmp(with_added[i].to, "\"added", 6))
            edit("tokenizer_config.json", "\"added_tokens_decoder\": {\n", "\"y\": {\n");
        else edit("tokenizer_config.json", "\"added_tokens_decoder\"", "\"y\"");
        if (with_added[i].added)
            write_file(in_work("src/added_tokens.json"), with_added[i].added, strlen(with_added[i].added));
        if (with_added[i].special)
            write_file(in_work("src/special_tokens_map.json"), with_added[i].special,
                       strlen(with_added[i].special));
        int code = RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin"));
        read_file(in_work("out/t.bin"), &bin);
        expect(code, with_added[i].refused ? 3 : 0, with_added[i].refused, with_added[i].to);
        if (code || !CHECK(!tokenizer_open(&t, bin.data, bin.n, "t.bin", NULL))) continue;
        tokenizer_encode(&t, with_added[i].text, strlen(with_added[i].text), MEDRUN_PARSE_SPECIAL,
                         &ids, NULL);
        for (n = 24; !with_added[i].ids[n - 1];) n--;
        CHECK(ids.n == 4 * n && !memcmp(ids.data, with_added[i].ids, ids.n));
        if (i == 0 || i == 2) check_runs(&t);
        tokenizer_close(&t);
        buffer_free(&bin);
        buffer_free(&ids);
    }
    copy_fixture("mistral-spm");
    edit("tokenizer_config.json", "\"add_prefix_space\": true", "\"add_prefix_space\": false");
    CHECK_EQ(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin")), 0);
    clear_folder("out");
    edit("tokenizer_config.json", "\"legacy\": true", "\"legacy\": false");
    expect(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin")), 3,
           "add_prefix_space: found false", "no space where legacy is false");
}
#undef DECODED
#undef SPECIAL

/* The rows of both vocabularies become ROWS, the new ones full of VALUE. */
static void add_rows(size_t rows, float value) {
    buffer b = {0}, text = {0}, data = {0};
    json j;
    read_file(in_work("src/model.safetensors"), &b);
    size_t head = 8 + (size_t)read_u64(&(reader){b.data, b.n, 0, false});
    CHECK(!json_parse(&j, (const char *)b.data + 8, head - 8, NULL));
    for EACH_KEY(&j, 0, c) {
        uint64_t begin = 0, end = 0;
        uint32_t shape = json_get(&j, c + 1, "shape"), place = json_get(&j, c + 1, "data_offsets");
        if (json_is(&j, c, "__metadata__")) continue;
        json_size(&j, place + 1, &begin), json_size(&j, place + 2, &end);
        bool wide = strstr(show(&j, c).text, "lm_head") || strstr(show(&j, c).text, "embed_tokens");
        size_t at = data.n, columns = wide ? (size_t)json_number(&j, shape + 2) : 0;
        buffer_add(&data, b.data + head + begin, (size_t)(end - begin));
        while (wide && data.n - at < rows * columns * 2) write_le(&data, f32_to_bf16(value), 2);
        buffer_printf(&text, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":", text.n ? "," : "{",
                      show(&j, c).text);
        if (wide) buffer_printf(&text, "[%zu,%zu]", rows, columns);
        else buffer_text(&text, show(&j, shape).text);
        buffer_printf(&text, ",\"data_offsets\":[%zu,%zu]}", at, data.n);
    }
    buffer_text(&text, "}");
    b.n = 0;
    write_le(&b, text.n, 8);
    buffer_add(&b, text.data, text.n);
    buffer_add(&b, data.data, data.n);
    write_file(in_work("src/model.safetensors"), b.data, b.n);
    json_free(&j);
    buffer_free(&b);
    buffer_free(&text);
    buffer_free(&data);
}

/* Rows past the tokenizer's ids change no other logit, are never chosen and print nothing. */
static void test_filled_up(const char *fixture, const char *vocab_size) {
    static const int32_t ids[] = {5, 6, 7};
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    float before[600];
    size_t vocab = 0, chosen = 0, smaller = 0;
    for (int filled = 0; filled < 3; filled++) {
        medrun_session_options o = {.context = 64, .sampling = {.temperature = 1, .top_p = 1}};
        int32_t id = 0;
        copy_fixture(fixture);
        if (filled) edit("config.json", vocab_size, "\"vocab_size\": 600");
        if (filled) add_rows(600, filled == 1 ? 3 : -3);
        if (!CHECK_EQ(EXPORT("--type", "bf16"), 0)) return;
        if (filled) CHECK(strstr((char *)errors.data, "have no text"));
        if (!CHECK(!medrun_open(&m, in_work("out/x.mdr"), NULL, NULL)) ||
            !CHECK(!medrun_start(&s, m, &o, NULL, 0, NULL))) return;
        CHECK(!medrun_feed(s, ids, 3, NULL));
        while (medrun_pending(s)) medrun_step(&s, 1, NULL);
        const float *logits = medrun_logits(s, 0);
        if (!filled) memcpy(before, logits, (vocab = (size_t)m->config.vocab_size) * 4);
        else CHECK(m->config.vocab_size == 600 && !memcmp(before, logits, vocab * 4));
        for (size_t i = 0; filled && i < vocab; i++) smaller += logits[i] < logits[vocab];
        for (int i = 0; filled && i < 500; i++) {
            s->options.sampling.temperature = (float)(i % 3);
            s->options.sampling.top_k = i % 2 ? 7 : 0;
            chosen += medrun_sample(s, &id, NULL) || id >= (int32_t)vocab;
        }
        buffer text = {0};
        tokenizer_decode(&m->tokenizer, &(int32_t){(int32_t)vocab}, filled > 0, true, &text);
        CHECK(!text.n && !chosen && (filled < 2 || smaller >= vocab));
        buffer_free(&text);
        medrun_stop(s);
        medrun_close(m);
    }
    clear_folder("out");
}

/* ---- edits of the JSON files --------------------------------------------------------------- */

#define ROPE4(text) "\"rope_scaling\": " text
#define ROPE5(text) "\"rope_scaling\": null, \"rope_parameters\": " text
#define LLAMA3(low, high) "{\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": " low \
    ", \"high_freq_factor\": " high ", \"original_max_position_embeddings\": 64}"

/* A normalizer that changes nothing. */
#define NO_NORMALIZER "\"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []}"

/* One more added token, as tokenizers' add_tokens writes it. */
#define WORD(text) "{\"id\": 283, \"content\": \"" text "\", \"normalized\": true},"

static const struct { const char *file, *from, *to; int code; const char *needle; } edits[] = {
    /* config.json: accepted */
    {"config.json", "\"hidden_act\": \"silu\",", "", 0, ""},
    {"config.json", "\"num_key_value_heads\": 2,", "", 0, ""},
    {"config.json", "\"num_key_value_heads\": 2,", "\"num_key_value_heads\": null,", 0, ""},
    {"config.json", "\"vocab_size\"", "\"head_dim\": null, \"vocab_size\"", 0, ""},
    {"config.json", "\"vocab_size\"", "\"head_dim\": 64, \"vocab_size\"", 0, ""},
    {"config.json", "\"tie_word_embeddings\": false,", "", 0, ""},
    {"config.json", "\"rope_scaling\": null,", "", 0, ""},
    {"config.json", "\"rope_theta\": 10000.0,", "", 0, ""},
    {"config.json", "\"torch_dtype\"", "\"dtype\": \"bfloat16\", \"torch_dtype\"", 0, ""},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"type\": \"default\"}"), 0, ""},
    {"config.json", "\"rope_scaling\": null", ROPE4(LLAMA3("1", "4")), 0, ""},
    {"config.json", "\"rope_scaling\": null",
     ROPE5("{\"rope_type\": \"default\", \"rope_theta\": 10000}"), 0, ""},
    {"config.json", "\"rope_scaling\": null,", "\"rope_parameters\": {\"full_attention\": "
     "{\"rope_type\": \"default\", \"rope_theta\": 1e4}, \"x\": {\"rope_type\": \"default\", "
     "\"rope_theta\": 10000.0}},", 0, ""},
    {"config.json", "\"eos_token_id\": 279,", "\"eos_token_id\": [279, 3, 4],", 0, ""},
    {"config.json", "\"eos_token_id\": 279,", "", 0, ""},
    /* config.json: refused */
    {"config.json", "\"LlamaForCausalLM\"", "\"GPT2LMHeadModel\"", 3, "GPT2LMHeadModel"},
    {"config.json", "\"LlamaForCausalLM\"", "\"LlamaForCausalLM\", \"X\"", 3, "architectures"},
    {"config.json", "\"model_type\": \"llama\"", "\"model_type\": \"mistral\"", 3, "mistral"},
    {"config.json", "\"silu\"", "\"gelu\"", 3, "hidden_act: found gelu"},
    {"config.json", "\"attention_bias\": false", "\"attention_bias\": true", 3, "attention_bias"},
    {"config.json", "\"mlp_bias\": false", "\"mlp_bias\": true", 3, "mlp_bias"},
    {"config.json", "\"vocab_size\"", "\"quantization_config\": {\"bits\": 4}, \"vocab_size\"", 3,
     "quantization_config"},
    {"config.json", "\"vocab_size\"", "\"partial_rotary_factor\": 0.5, \"vocab_size\"", 3,
     "partial_rotary_factor"},
    {"config.json", "\"torch_dtype\"", "\"dtype\": \"float16\", \"torch_dtype\"", 3, "dtype"},
    {"config.json", "1e-05", "NaN", 3, "rms_norm_eps: found NaN"},
    {"config.json", "1e-05", "Infinity", 3, "rms_norm_eps: found Infinity"},
    {"config.json", "1e-05", "-Infinity", 3, "rms_norm_eps: found -Infinity"},
    {"config.json", "1e-05", "1e999", 3, "rms_norm_eps"},
    {"config.json", "1e-05", "0", 3, "rms_norm_eps"},
    {"config.json", "1e-05", "\"1e-05\"", 3, "rms_norm_eps"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": 0", 3, "hidden_size"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": -128", 3, "hidden_size"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": 128.5", 3, "hidden_size"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": 1e30", 3, "hidden_size"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": null", 3, "hidden_size"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": NaN", 3, "hidden_size: found NaN"},
    {"config.json", "\"hidden_size\": 128", "\"hidden_size\": 160", 3, "shape: found (283, 128)"},
    {"config.json", "\"hidden_size\": 128,", "", 3, "hidden_size"},
    {"config.json", "\"num_attention_heads\": 2", "\"num_attention_heads\": 3", 3, "divisor"},
    {"config.json", "\"num_attention_heads\": 2", "\"num_attention_heads\": 6", 3, "head_dim"},
    {"config.json", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 0", 3, "num_key_value"},
    {"config.json", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 1", 3, "k_proj"},
    {"config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", 3, "layers.2."},
    {"config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", 3, "no part of"},
    {"config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 4000000000", 3, "layers"},
    {"config.json", "\"intermediate_size\": 320", "\"intermediate_size\": 321", 3, "multiples"},
    {"config.json", "\"intermediate_size\": 320", "\"intermediate_size\": 336", 3, "gate_proj"},
    {"config.json", "\"max_position_embeddings\": 512", "\"max_position_embeddings\": 0", 3, "max"},
    {"config.json", "\"vocab_size\": 283", "\"vocab_size\": 284", 3,
     "shape: found (283, 128), wanted (284, 128)"},
    {"config.json", "\"vocab_size\": 283", "\"vocab_size\": 282", 3, "shape: found (283, 128), wanted (282, 128)"},
    {"config.json", "\"vocab_size\": 283", "\"vocab_size\": 1400", 3, "1400, far more"},
    {"config.json", "\"vocab_size\": 283", "\"vocab_size\": 283, \"vocab_size\": 283", 3, "twice"},
    {"config.json", "\"vocab_size\": 283", "\"vocab_size\": 283 \"", 3, "JSON"},
    {"config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", 3, "lm_h"},
    {"config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": \"no\"", 3, "tie_"},
    {"config.json", "\"eos_token_id\": 279", "\"eos_token_id\": 283", 3, "eos_token_id"},
    {"config.json", "\"eos_token_id\": 279", "\"eos_token_id\": -1", 3, "eos_token_id"},
    {"config.json", "\"eos_token_id\": 279", "\"eos_token_id\": [1.5]", 3, "eos_token_id"},
    {"config.json", "\"eos_token_id\": 279", "\"eos_token_id\": [\"x\"]", 3, "eos_token_id"},
    {"config.json", "\"eos_token_id\": 279", "\"eos_token_id\": [1,2,3,4,5,6,7,8,9]", 3,
     "more than"},
    {"config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": 0", 3, "rope_theta"},
    {"config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": NaN", 3, "rope_theta: found NaN"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"type\": \"linear\", \"factor\": 2}"), 3,
     "linear"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"rope_type\": \"dynamic\", \"factor\": 2}"),
     3, "dynamic"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"rope_type\": \"yarn\", \"factor\": 2, "
     "\"low_freq_factor\": 1}"), 3, "low_freq_factor"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"factor\": 2}"), 3, "rope_type"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"rope_type\": \"default\", \"factor\": 2}"),
     3, "rope_type"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"rope_type\": \"default\", \"new\": 2}"), 3,
     "field new"},
    {"config.json", "\"rope_scaling\": null",
     ROPE4("{\"rope_type\": \"default\", \"type\": \"llama3\"}"), 3, "rope_type"},
    {"config.json", "\"rope_scaling\": null", ROPE4("{\"rope_type\": \"llama3\", \"factor\": 8}"),
     3, "llama3"},
    {"config.json", "\"rope_scaling\": null", ROPE4(LLAMA3("4", "4")), 3, "high_freq_factor"},
    {"config.json", "\"rope_scaling\": null", ROPE4("[]"), 3, "rope_scaling"},
    {"config.json", "\"rope_scaling\": null", ROPE5("{\"rope_type\": \"default\", "
     "\"rope_theta\": 20000}"), 3, "rope_parameters"},
    {"config.json", "\"rope_scaling\": null", ROPE5(LLAMA3("1", "4")), 3, "rope_parameters"},
    {"config.json", "\"rope_scaling\": null,", "\"rope_parameters\": {\"a\": {\"rope_theta\": 1e4},"
     " \"b\": {\"rope_theta\": 2e4}},", 3, "rope_parameters"},
    /* generation_config.json */
    {"generation_config.json", "\"do_sample\": true", "\"do_sample\": null", 0, ""},
    {"generation_config.json", "\"temperature\": 0.6", "\"temperature\": -1", 3, "temperature"},
    {"generation_config.json", "\"top_p\": 0.9", "\"top_p\": 2", 3, "top_p"},
    {"generation_config.json", "\"do_sample\": true", "\"do_sample\": \"yes\"", 3, "do_sample"},
    {"generation_config.json", "\"eos_token_id\": 279", "\"eos_token_id\": 999", 3, "eos_token_id"},
    /* tokenizer.json */
    {"tokenizer.json", "\"type\": \"BPE\"", "\"type\": \"Unigram\"", 3, "Unigram"},
    {"tokenizer.json", "\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", 3, "NFC"},
    {"tokenizer.json", "\"normalizer\": null", NO_NORMALIZER, 0, ""},
    {"tokenizer.json", "{1,3}", "", 3, "Regex"},
    {"tokenizer.json", "\"Isolated\"", "\"Removed\"", 3, "pre_tokenizer"},
    {"tokenizer.json", "\"invert\": false", "\"invert\": true", 3, "pre_tokenizer"},
    {"tokenizer.json", "\"use_regex\": false", "\"use_regex\": true", 3, "pre_tokenizer"},
    {"tokenizer.json", "\"lstrip\": false", "\"lstrip\": true", 3, "added_tokens"},
    {"tokenizer.json", "\"rstrip\": false", "\"rstrip\": true", 3, "added_tokens"},
    {"tokenizer.json", "\"normalized\": false", "\"normalized\": true", 0, ""},
    {"tokenizer.json", "\"added_tokens\": [", "\"added_tokens\": [" WORD("ab<|eot"), 3, "begin inside"},
    {"tokenizer.json", "\"added_tokens\": [", "\"added_tokens\": [" WORD("<|eot_id|"), 0, ""},
    {"tokenizer.json", "\"added_tokens\": [", "\"added_tokens\": [" WORD("<|eot_id|>s"), 3, "inside"},
    {"tokenizer.json", "\"added_tokens\": [", "\"added_tokens\": [" WORD("eot_id|>"), 0, ""},
    {"tokenizer.json", "\"single_word\": false", "\"single_word\": true", 3, "added_tokens"},
    {"tokenizer.json", "\"byte_fallback\": false", "\"byte_fallback\": true", 3, "ignore_merges"},
    {"tokenizer.json", "\"unk_token\": null", "\"unk_token\": \"<unk>\"", 3, "unk_token"},
    {"tokenizer.json", "\"dropout\": null", "\"dropout\": 0.1", 3, "dropout"},
    {"tokenizer.json", "\"dropout\": null", "\"dropout\": 0.0", 0, ""},
    {"tokenizer.json", "\"id\": 278", "\"id\": 5", 3, "added_tokens"},
    {"tokenizer.json", "\"id\": 278", "\"id\": 4000000", 3, "gaps"},
    {"tokenizer.json", "\"id\": 278", "\"id\": -1", 3, "added_tokens"},
    {"tokenizer.json", "\"id\": 278", "\"id\": 278.5", 3, "added_tokens"},
    {"tokenizer.json", "\"!\": 0", "\"!\": 1", 3, "model.vocab"},
    {"tokenizer.json", "\"!\": 0", "\"!\": 300", 3, "found 301 ids"},
    {"tokenizer.json", "\"!\": 0", "\"~~x\": 0", 0, ""},       /* a vocabulary without that byte */
    {"tokenizer.json", "\"!\": 0", "\"\\u4e2d\": 0", 3, "byte alphabet"},
    {"tokenizer.json", "\"!\": 0", "\"\": 0", 3, "model.vocab"},
    {"tokenizer.json", "\"!\": 0", "\"!\": \"0\"", 3, "model.vocab"},
    {"tokenizer.json", "\"h e\"", "\"h e r\"", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "\"he\"", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "\"h qqqq\"", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "[\"h\", \"e\"]", 0, ""},
    {"tokenizer.json", "\"h e\"", "[\"h\", \"e\", \"r\"]", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "[\"h\", \"q q\"]", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "7", 3, "model.merges"},
    {"tokenizer.json", "\"h e\"", "\"z q\"", 3, "merge"},
    {"tokenizer.json", "\"TemplateProcessing\"", "\"BertProcessing\"", 3, "post_processor"},
    {"tokenizer.json", "\"ids\"", "\"idz\"", 3, "special_tokens"},
    {"tokenizer.json", "\"post_processor\"", "\"post_processor\": null, \"none\"", 0, ""},
    {"tokenizer.json", "<|eot_id|>", "<|eot_no|>", 3, "<|eot_id|>"},
    /* tokenizer_config.json */
    {"tokenizer_config.json", "\"bos_token\": \"<|begin_of_text|>\"",
     "\"bos_token\": {\"content\": \"<|begin_of_text|>\"}", 0, ""},
    {"tokenizer_config.json", "\"bos_token\": \"<|begin_of_text|>\"", "\"bos_token\": \"<s>\"", 3,
     "bos_token"},
    {"tokenizer_config.json", "\"bos_token\": \"<|begin_of_text|>\"",
     "\"bos_token\": \"<|eot_id|>\"", 3, "bos_token"},
    {"tokenizer_config.json", "\"eos_token\": \"", "\"eos_token\": \"X", 3, "eos_token"},
    {"tokenizer_config.json", "\"eos_token\"", "\"add_bos_token\": true, \"eos_token\"", 0, ""},
    {"tokenizer_config.json", "\"eos_token\"", "\"add_bos_token\": false, \"eos_token\"", 3,
     "add_bos_token"},
    {"tokenizer_config.json", "\"eos_token\"", "\"add_eos_token\": true, \"eos_token\"", 3,
     "add_eos_token"},
    {"tokenizer_config.json", "\"chat_template\": \"", "\"chat_template\": 7, \"x\": \"", 3,
     "--template"},
    {"tokenizer_config.json", "\"chat_template\": \"", "\"chat_template\": [{\"name\": "
     "\"default\", \"template\": \"### Instruction: <|eot_id|>\"}], \"x\": \"", 0, ""},
};

static void test_edits(void) {
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        char what[200];
        copy_fixture("llama-plain");
        edit(edits[i].file, edits[i].from, edits[i].to);
        snprintf(what, sizeof what, "%s: %s -> %s", edits[i].file, edits[i].from, edits[i].to);
        int code = edits[i].code ? EXPORT(NULL) : EXPORT("--dry-run");
        if (!edits[i].code) write_file(in_work("out/x.mdr"), "", 0);
        expect(code, edits[i].code, edits[i].needle, what);
    }
    copy_fixture("llama-plain");
    edit("config.json", "\"eos_token_id\": 279", "\"eos_token_id\": 284");
    edit("config.json", "\"vocab_size\": 283", "\"vocab_size\": 300");
    expect(EXPORT(NULL), 3, "283 ids, but eos_token_id is 284", "a stop without text");
    copy_fixture("llama-plain");
    edit("tokenizer.json", "\"normalizer\": null", NO_NORMALIZER);
    edit("tokenizer.json", "\"normalized\": false", "\"normalized\": true");
    expect(EXPORT(NULL), 0, "", "a normalized token where the normalizer is empty");
}

/* What an editor of Windows puts before a JSON file, or makes of it. */
static void test_edited_json(void) {
    static const struct { const char *mark; size_t n; int code; const char *needle; } marks[] = {
        {"\xEF\xBB\xBF", 3, 0, ""}, {"\xFF\xFE", 2, 3, "found UTF-16, wanted UTF-8"},
        {"\xFE\xFF", 2, 3, "found UTF-16, wanted UTF-8"},
        {"\xEF\xBB", 2, 3, "JSON: unexpected character"}};
    static const char *const files[] = {"config.json", "tokenizer.json", "tokenizer_config.json"};
    for (size_t i = 0; i < 3 * sizeof marks / sizeof *marks; i++) {
        char path[512], what[64];
        buffer text = {0}, with = {0};
        copy_fixture("llama-plain");
        snprintf(path, sizeof path, "%s/src/%s", work, files[i % 3]);
        read_file(path, &text);
        buffer_add(&with, marks[i / 3].mark, marks[i / 3].n);
        buffer_add(&with, text.data, text.n);
        write_file(path, with.data, with.n);
        snprintf(what, sizeof what, "%s, mark %zu", files[i % 3], i / 3);
        expect(EXPORT(NULL), marks[i / 3].code, marks[i / 3].needle, what);
        buffer_free(&text), buffer_free(&with);
    }
    copy_fixture("llama-plain");                        /* a hostile name drives no terminal     */
    CHECK_EQ(RUN(in_work("src"), in_work("out/x.mdr"), "--name", "a\x1B[31mb"), 0);
    CHECK(errors.n && strstr((char *)errors.data, "a?[31mb") && !memchr(errors.data, 27, errors.n));
    clear_folder("out");
}

/* SmolLM's pre-tokenizer, and a vocabulary without byte 0xFF, which is left out of texts. */
static void test_smollm(void) {
    static const char start[] = "\"type\": \"Digits\", \"individual_digits\": true, \"x\": \"\"";
    static const int32_t wanted[] = {'1' - '!', '2' - '!'};
    buffer bin = {0}, ids = {0};
    tokenizer t;
    copy_fixture("llama-plain");
    edit("tokenizer.json", "\"type\": \"Split\"", start);
    expect(EXPORT(NULL), 3, "Llama-3, tekken or SmolLM", "Digits without a pattern after them");
    edit("tokenizer.json", "\"use_regex\": false", "\"use_regex\": true");
    edit("tokenizer.json", "\"ignore_merges\": true", "\"ignore_merges\": false");
    edit("tokenizer.json", "\"\xC3\xBF\":", "\"~~x\":");
    CHECK_EQ(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin")), 0);
    read_file(in_work("out/t.bin"), &bin);
    if (CHECK(!tokenizer_open(&t, bin.data, bin.n, "t.bin", NULL))) {
        CHECK(!strcmp(t.pretokenizer->name, "smollm") && !(t.flags & TOKENIZER_IGNORE_MERGES) && t.byte_id[0xFF] == UINT32_MAX);
        CHECK(!tokenizer_encode(&t, "1\xFF" "2", 3, 0, &ids, NULL) && ids.n == sizeof wanted &&
              !memcmp(ids.data, wanted, sizeof wanted));
        tokenizer_close(&t);
    }
    remove(in_work("out/t.bin"));
    edit("tokenizer.json", "\"individual_digits\": true", "\"individual_digits\": false");
    expect(EXPORT(NULL), 3, "pre_tokenizer", "digits in one piece");
    edit("tokenizer.json", "\"individual_digits\": false", "\"individual_digits\": true");
    edit("tokenizer.json", "\"add_prefix_space\": false", "\"add_prefix_space\": true");
    expect(EXPORT(NULL), 3, "pre_tokenizer", "a space before the text");
    buffer_free(&bin), buffer_free(&ids);
}

/* ---- weights ------------------------------------------------------------------------------- */

static const struct { const char *from, *to; int code; const char *needle; } header_edits[] = {
    {"[283,128]", "[128,283]", 3, "shape: found (128, 283), wanted (283, 128)"},
    {"[283,128]", "[36224]", 3, "shape: found (36224)"},
    {"[283,128]", "[283,128,1]", 3, "rank 3"},
    {"[283,128]", "[283,64]", 3, "data_offsets"},
    {"[283,128]", "[283,-128]", 3, "shape"},
    {"[283,128]", "[4294967296,4294967296]", 3, "shape"},
    {"[283,128]", "\"x\"", 3, "shape"},
    {"\"BF16\"", "\"I16\"", 3, "dtype: found I16"},
    {"\"BF16\"", "\"Q4\"", 3, "dtype"},
    {"\"dtype\":\"BF16\",", "", 3, "dtype"},
    {"model.norm.weight", "model.xorm.weight", 3, "model.norm.weight"},
    {"model.norm.weight", "model.norm.bias", 3, "model.norm.weight"},
    {"model.norm.weight", "model.norm.weight\\u0000", 3, "name"},
    {"model.norm.weight", "lm_head.weight", 3, "twice"},
    {"{", "{\"model.extra\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},", 3,
     "model.extra"},
    {"{", "{\"model.rotary_emb.inv_freq\":{\"dtype\":\"F32\",\"shape\":[0],"
     "\"data_offsets\":[0,0]},", 0, ""},
    {"{", "{\"__metadata__\":7,\"__metadata__\":{},", 3, "twice"},
    {"\"pt\"", "7", 3, "__metadata__"},
    {"data_offsets\":[0,", "data_offsets\":[2,", 3, "data_offsets"},
    {"data_offsets\":[0,", "data_offsets\":[-2,", 3, "data_offsets"},
    {"data_offsets\":[0,", "data_offsets\":[18446744073709551616,", 3, "data_offsets"},
    {"{", "[", 3, "JSON"},
};

/* Whole files: a header, and how many bytes of data follow it. */
static const struct { const char *header; size_t data; int code; const char *needle; } files[] = {
    {"{}", 0, 0, ""},
    {" {}  ", 0, 0, ""},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 0, ""},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0, 0, ""},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[4,8]},"
     "\"b\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 8, 0, ""},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[4,8]},"
     "\"b\":{\"dtype\":\"I8\",\"shape\":[3],\"data_offsets\":[0,3]}}", 8, 3, "gap"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[3,7]},"
     "\"b\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 7, 3, "overlap"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]},"
     "\"b\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, 3, "overlap"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 5, 3, "bytes of data"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 3, 3, "cut"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4],\"data_offsets\":[4,0]}}", 4, 3, "inside"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, 3,
     "product"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0, 3,
     "product"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[1.0],\"data_offsets\":[0,1]}}", 1, 3, "whole"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1,1]}}", 1, 3, "two"},
    {"{\"a\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":0}}", 1, 3, "wanted"},
    {"{\"a\":7}", 0, 3, "wanted"},
    {"[]", 0, 3, "object"},
    {"", 0, 3, "JSON"},
};

/* What the configs of each family may say: an edit of config.json, the exit code, and what --dry-run
 * prints or the message holds. */
static const struct { const char *fixture, *from, *to; int code; const char *needle; } families[] = {
    {"mistral-window", NULL, NULL, 0, "each sees the last 20,"},
    {"mistral-window", "\"sliding_window\": 20", "\"sliding_window\": null", 0, "512 tokens, rope"},
    {"mistral-window", "\"sliding_window\": 20,", "", 0, "no sliding_window: 4096 is used"},
    {"mistral-window", "\"sliding_window\": 20", "\"sliding_window\": 0", 3, "sliding_window"},
    {"mistral-window", "\"sliding_window\": 20", "\"sliding_window\": 2.5", 3, "sliding_window"},
    {"mistral-window", "\"silu\"", "\"gelu\"", 3, "hidden_act: found gelu, wanted silu"},
    {"mistral-window", "MistralForCausalLM", "LlamaForCausalLM", 3, "model_type"},
    {"mistral-spm", NULL, NULL, 0, "mistral, 0."},
    {"arcee-yarn", NULL, NULL, 0, "yarn scaling 20 from 64, attention factor 1.299573"},
    {"arcee-yarn", NULL, NULL, 0, "YaRN factor 20 is used, as config.json says"},
    {"arcee-yarn", NULL, NULL, 0, "512 / 64 = 8: --yarn-factor chooses"},
    {"arcee-yarn", "\"factor\": 20.0", "\"factor\": null", 0, "yarn scaling 8 from 64"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"mscale\": 1.0, \"mscale_all_dim\": 0.0", 0,
     "factor 1.299573"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"mscale\": 1.0, \"mscale_all_dim\": 0.5", 0,
     "factor 1.130273"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"attention_factor\": 1.5", 0, "factor 1.5"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"attention_factor\": 0", 3, "attention_factor"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"mscale\": \"x\"", 3, "mscale"},
    {"arcee-yarn", "\"mscale\": 1.0", "\"finetuned\": true", 3, "finetuned"},
    {"arcee-yarn", "\"original_max_position_embeddings\": 64,", "", 0, "yarn scaling 20 from 512"},
    {"arcee-yarn", "relu2", "silu", 3, "wanted relu2"},
    {"arcee-yarn", "\"mlp_bias\": false", "\"mlp_bias\": true", 3, "mlp_bias"},
    {"arcee-yarn5", NULL, NULL, 0, "yarn scaling 6 from 64, attention factor 1.1"},
    {"apertus-plain", NULL, NULL, 0, "(1 key-value) with norms, ffn 160 xielu"},
    {"apertus-plain", "\"qk_norm\": true", "\"qk_norm\": false", 3, "qk_norm"},
    {"apertus-plain", "\"qk_norm\": true,", "", 0, "with norms"},
    {"apertus-plain", "\"post_norm\": false", "\"post_norm\": true", 3, "post_norm"},
    {"apertus-plain", "\"rope_theta\": 12000000.0,", "", 0, "no rope_theta: transformers' default"},
    {"apertus-grouped", NULL, NULL, 0, "apertus, 0."},
};

static void test_families(void) {
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        copy_fixture(families[i].fixture);
        if (families[i].from) edit("config.json", families[i].from, families[i].to);
        int code = EXPORT("--dry-run");
        const char *text = families[i].code ? (const char *)errors.data : answer;
        if (!CHECK(code == families[i].code && text && strstr(text, families[i].needle)))
            printf("    %s, %s: code %d (wanted %d): %s\n", families[i].fixture,
                   families[i].to ? families[i].to : "as it is", code, families[i].code,
                   text ? text : "");
    }
    copy_fixture("arcee-yarn");
    CHECK_EQ(EXPORT("--dry-run", "--yarn-factor", "8"), 0);
    CHECK(strstr(answer, "yarn scaling 8 from 64, attention factor 1.207944"));
    CHECK(strstr(answer, "YaRN factor 8 is used, as --yarn-factor says"));
    /* xIELU's numbers: two must be there, two may be missing; each is one finite number */
    copy_fixture("apertus-plain");
    edit_header("model.safetensors", "layers.1.mlp.act_fn.alpha_n", "layers.1.mlp.act_fn.alpha_x");
    expect(EXPORT("--type", "bf16"), 3, "layers.1.mlp.act_fn.alpha_n: found nothing", "alpha_n");
    copy_fixture("apertus-plain");
    edit_header("model.safetensors", "layers.0.mlp.act_fn.beta", "layers.0.mlp.act_fn.bets");
    expect(EXPORT("--type", "bf16"), 3, "bets: found a tensor that is no part", "beta");
    copy_fixture("arcee-yarn");
    edit_header("model.safetensors", "layers.1.mlp.up_proj", "layers.1.mlp.gate_proj");
    expect(EXPORT("--type", "bf16"), 3, "up_proj.weight: found nothing", "no up");
}

static void test_files(void) {
    clear_folder("src");
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        source s = {.folder = in_work("src")};
        medrun_error e = {0};
        buffer b = {0};
        write_le(&b, strlen(files[i].header), 8);
        buffer_text(&b, files[i].header);
        for (size_t k = 0; k < files[i].data; k++) buffer_add(&b, "", 1);
        write_file(in_work("src/a.safetensors"), b.data, b.n);
        int code = read_shard(&s, "a.safetensors", &e);
        if (!CHECK(code == files[i].code && strstr(e.text, files[i].needle)))
            printf("    %s: code %d: %s\n", files[i].header, code, e.text);
        close_source(&s);
        buffer_free(&b);
    }
    /* the largest header there may be, and one byte more, in sparse files */
    for (uint64_t n = 100000000; n <= 100000001; n++) {
        source s = {.folder = in_work("src")};
        medrun_error e = {0};
        buffer b = {0};
        write_le(&b, n, 8);
        write_file(in_work("src/a.safetensors"), b.data, b.n);
        must(!truncate(in_work("src/a.safetensors"), 100000100), "cannot write", "a sparse file");
        CHECK_EQ(read_shard(&s, "a.safetensors", &e), 3);
        CHECK(strstr(e.text, n == 100000000 ? "JSON" : "header length"));
        close_source(&s);
        buffer_free(&b);
    }
}

/* What int4 has no scale for, and what has none at all: named, in vocabulary and matrices. */
static void test_int4_weights(void) {
    static const struct { const char *tensor; uint16_t bits; int code; const char *needle; } all[] = {
        {"model.layers.1.mlp.down_proj.weight", 0x4416, 3, "found the weight 600, int4 has none"},
        {"model.layers.0.self_attn.q_proj.weight", 0xC416, 3, "found the weight -600, int4"},
        {"model.layers.1.mlp.down_proj.weight", 0x4400, 0, ""},         /* 512                   */
        {"model.layers.1.mlp.down_proj.weight", 0xC400, 0, ""},
        {"model.layers.0.mlp.up_proj.weight", 0x7F80, 3, "not a number"},
        {"model.layers.0.mlp.gate_proj.weight", 0x7FC0, 3, "not a number"},
        {"lm_head.weight", 0xFF80, 3, "not a number"},
        {"lm_head.weight", 0x4416, 0, ""},              /* int8 there: it has room               */
        {"lm_head.weight", 0x7B80, 0, ""},              /* 2^120: 64 of them add up              */
        {"lm_head.weight", 0x7B81, 3, "found the weight 1.33961e+36, int8 has none"},
        {"model.norm.weight", 0x4416, 0, ""},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        buffer b = {0};
        source s = {.folder = in_work("src")};
        medrun_error e = {0};
        copy_fixture("llama-plain");
        must(!read_shard(&s, "model.safetensors", &e) && !sort_tensors(&s, &e), "cannot read", "");
        const source_tensor *t = find_tensor(&s, all[i].tensor);
        read_file(in_work("src/model.safetensors"), &b);
        memcpy(b.data + t->end - 2 * (1 + i), &all[i].bits, 2);
        write_file(in_work("src/model.safetensors"), b.data, b.n);
        int code = EXPORT("--type", "int4", "--threads", "2");
        const char *said = errors.n ? (const char *)errors.data : "";
        if (!CHECK(code == all[i].code && (!code || (strstr(said, all[i].needle) &&
                                                     strstr(said, all[i].tensor)))))
            printf("    %s: code %d: %s\n", all[i].tensor, code, said);
        CHECK_EQ(clear_folder("out"), code == 0);
        close_source(&s);
        buffer_free(&b);
    }
}

static void test_weights(void) {
    for (size_t i = 0; i < sizeof header_edits / sizeof *header_edits; i++) {
        copy_fixture("llama-plain");
        edit_header("model.safetensors", header_edits[i].from, header_edits[i].to);
        expect(EXPORT(NULL), header_edits[i].code, header_edits[i].needle, header_edits[i].to);
    }
    buffer b = {0}, copy = {0};
    copy_fixture("llama-plain");
    read_file(in_work("src/model.safetensors"), &b);
    size_t n = (size_t)read_u64(&(reader){b.data, b.n, 0, false});
    static const uint64_t lengths[] = {0, 1, 100000001, UINT64_MAX, UINT64_MAX - 7};
    for (size_t i = 0; i < 5; i++) {
        copy.n = 0;
        write_le(&copy, lengths[i], 8);
        buffer_add(&copy, b.data + 8, b.n - 8);
        write_file(in_work("src/model.safetensors"), copy.data, copy.n);
        expect(EXPORT(NULL), 3, i < 2 ? "JSON" : "header length", "header length");
    }
    static const size_t kept[] = {0, 7, 8, 9, 500};
    for (size_t i = 0; i < 8; i++) {
        size_t keep = i < 5 ? kept[i] : i == 5 ? 8 + n : i == 6 ? b.n - 1 : b.n / 2;
        write_file(in_work("src/model.safetensors"), b.data, keep);
        expect(EXPORT(NULL), 3, "model.safetensors", "cut");
    }
    buffer_add(&b, "x", 1);
    write_file(in_work("src/model.safetensors"), b.data, b.n);
    expect(EXPORT(NULL), 3, "bytes of data", "one byte more");
    b.n--;
    static const uint16_t bad[] = {0x7F80, 0xFF80, 0x7FC0};
    for (size_t i = 0; i < 3; i++) {
        memcpy(b.data + b.n - 2, &bad[i], 2);
        write_file(in_work("src/model.safetensors"), b.data, b.n);
        int code = EXPORT("--threads", "2");
        CHECK(code == 3 && strstr((const char *)errors.data, "not a number"));
        CHECK_EQ(clear_folder("out"), 0);
    }
    test_int4_weights();
    buffer_free(&b);
    buffer_free(&copy);
}

static void test_shards(void) {
    static const char index[] = "model.safetensors.index.json";
    static const char second[] = "src/model-00002-of-00002.safetensors";
    static const char quoted[] = "\"model-00002-of-00002.safetensors\"";
    static const struct { const char *from, *to, *needle; } cases[] = {
        {quoted, "\"../model-00002-of-00002.safetensors\"", "weight_map"},
        {quoted, "\"/etc/passwd\"", "weight_map"},
        {quoted, "7", "weight_map"},
        {quoted, "\"\"", "weight_map"},
        {quoted, "\"config.json\"", "not found in config.json"},
        {quoted, "\"model-00001-of-00002.safetensors\"", "not found in"},
        {quoted, "\"gone.safetensors\"", "gone.safetensors: cannot open"},
        {"model.norm.weight", "model.norm.weight2", "model.norm.weight2"},
        {"\"weight_map\"", "\"weights\"", "weight_map"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        copy_fixture("llama-sharded");
        edit(index, cases[i].from, cases[i].to);
        expect(EXPORT(NULL), 3, cases[i].needle, cases[i].to);
    }
    copy_fixture("llama-sharded");
    remove(in_work(second));
    expect(EXPORT(NULL), 3, "model-00002-of-00002.safetensors: cannot open", "missing shard");
    copy_fixture("llama-sharded");
    edit(index, "\"model.norm.weight\": \"model-00002-of-00002.safetensors\"", "\"\": 7");
    expect(EXPORT(NULL), 3, "weight_map", "index without a tensor");
    copy_fixture("llama-sharded");
    edit_header("model-00002-of-00002.safetensors", "model.norm.weight",
                "model.embed_tokens.weight");
    expect(EXPORT(NULL), 3, "wanted once", "a tensor in both shards");
    copy_fixture("llama-sharded");
    write_file(in_work("src/model.safetensors"), "x", 1);
    expect(EXPORT(NULL), 3, "one of them", "both forms");
    copy_fixture("llama-plain");
    remove(in_work("src/model.safetensors"));
    expect(EXPORT(NULL), 3, "neither", "no weights");
    remove(in_work("src/config.json"));
    expect(EXPORT(NULL), 3, "config.json", "no config");
    copy_fixture("llama-plain");
    remove(in_work("src/tokenizer.json"));
    expect(EXPORT(NULL), 3, "tokenizer.json", "no tokenizer");
    copy_fixture("llama-plain");
    remove(in_work("src/generation_config.json"));
    remove(in_work("src/tokenizer_config.json"));
    expect(EXPORT("--template", "llama3"), 0, "", "optional files");
    expect(EXPORT(NULL), 0, "", "no template at all");
}

#define POINTER "version https://git-lfs.github.com/spec/v1\noid sha256:4d4d\nsize 4976698672\n"

/* What people have instead of a model. A file of src/ becomes TEXT (NULL: it goes); another goes. */
static const struct { const char *fixture, *file, *text, *gone, *needle; } foreign[] = {
    {"llama-plain", "model.safetensors", POINTER, NULL, "git lfs pull"},
    {"llama-plain", "tokenizer.json", POINTER, NULL, "tokenizer.json: found a Git LFS pointer"},
    {"mistral-spm", "tokenizer.model", POINTER, NULL, "git lfs pull"},
    {"llama-sharded", "model-00002-of-00002.safetensors", POINTER, NULL, "git lfs pull"},
    {"llama-sharded", "model.safetensors.index.json", POINTER, NULL, "git lfs pull"},
    {"llama-plain", "tokenizer.json", "<!doctype html><p>Log in", NULL, "found a web page"},
    {"llama-plain", "adapter_config.json", "{\"peft_type\": \"LORA\", \"base_model_name_or_path\": "
     "\"org/base\"}", "model.safetensors", "a LoRA adapter of org/base, which"},
    {"llama-plain", "adapter_config.json", "{\"peft_type\": \"IA3\"}", "model.safetensors",
     "a IA3 adapter of a model it does not name"},
    {"llama-plain", "adapter_config.json", "{}", "model.safetensors", "merge_and_unload"},
    {"llama-plain", "pytorch_model.bin", "x", "model.safetensors", "safe_serialization=True"},
    {"llama-plain", "pytorch_model-00001-of-00002.bin", "x", "model.safetensors", "PyTorch's"},
    {"llama-plain", "consolidated.00.pth", "x", "model.safetensors", "Meta's own program"},
    {"llama-plain", "consolidated.safetensors", "x", "model.safetensors", "Mistral's own"},
    {"llama-plain", "model_q4.onnx", "x", "model.safetensors", "found model_q4.onnx, ONNX"},
    {"llama-plain", "m.gguf", "x", "config.json", "found no config.json"},
    {"llama-plain", "m.Q4_K_M.gguf", "x", "model.safetensors", "give its own path"},
    {"llama-plain", "model-00001-of-00003.safetensors", "x", "model.safetensors",
     "no model.safetensors.index.json"},
    {"llama-plain", "quantize_config.json", "{}", NULL, "quantised by GPTQ"},
    {"llama-plain", "quant_config.json", "{}", NULL, "quantised by AWQ"},
    {"llama-plain", "config.json", "{\"architectures\": [\"LlamaForCausalLM\"], \"quantization_config\""
     ": {\"quant_method\": \"awq\"}}", NULL, "quantization_config: found a model quantised by awq"},
    {"llama-plain", "config.json", "{\"architectures\": [\"LlamaForCausalLM\"], \"quantization\": "
     "{\"bits\": 4}}", NULL, "quantised by MLX"},
    {"llama-plain", "zero_to_fp32.py", "x", "model.safetensors", "zero_to_fp32.py FOLDER OUT"},
    {"llama-plain", "pytorch_model_fsdp_0", "x", "model.safetensors", "accelerate merge-weights"},
    {"llama-plain", "openvino_model.xml", "x", "model.safetensors", "OpenVINO's form"},
    {"llama-plain", "optimizer.pt", "x", "model.safetensors", "the state of a training"},
    {"llama-plain", "rank0.engine", "x", "model.safetensors", "TensorRT's form"},
    {"llama-plain", "model.safetensors.incomplete", "x", "model.safetensors", "hf download goes on"},
    {"llama-plain", "vocab.json", "{}", "tokenizer.json", "found only vocab.json, wanted tokenizer"},
    {"llama-plain", "tekken.json", "{}", "tokenizer.json", "save_pretrained(FOLDER)"},
    {"llama-plain", "notes", "x", "tokenizer.json", "take that of the model this one was made from"},
    {"mistral-spm", "tokenizer.model", "IQ== 0\nIg== 1\n", NULL, "the ranks of tiktoken"},
    {"llama-plain", "config.json", "Entry not found", NULL, "the hub's word that there is none"},
    {"llama-plain", "config.json", "Access to model a/b is restricted", NULL, "hf auth login"},
    {"llama-plain", "model.safetensors", "{\"error\":\"Repository not found\"}", NULL, "the hub's refusal"},
    {"llama-plain", "model.safetensors", "# xet version 0\n", NULL, "a pointer of Git Xet"},
};

/* Files that are given as the source. */
static const struct { const char *name, *text, *needle; } foreign_sources[] = {
    {"m.gguf", POINTER, "git lfs pull"}, {"m.gguf", "<html>", "found a web page"},
    {"m.mdr", "MEDRUN01", "a checkpoint of medrun"}, {"m.bin", "PK\3\4x", "PyTorch's own form"},
    {"m.bin", "tjgg\3", "GGML"}, {"m.onnx", "x", "found ONNX"},
    {"config.json", "{}", "the folder that it lies in"},
    {"m.gguf-split-b", "x", "cat all pieces"}, {"m.gguf.part2of2", "x", "cat all pieces"},
    {"m", "", "found an empty file"}, {"m", "x", "does not begin with GGUF"},
    {"m.tgz", "\x1F\x8B\x08", "unpack it first"}, {"m", "7z\xBC\xAF", "unpack it first"},
    {"m", "\xFD" "7zXZ", "unpack it first"}, {"m", "BZh91", "unpack it first"},
    {"m", "Rar!", "unpack it first"}, {"m", "\x28\xB5\x2F\xFD", "unpack it first"},
    {"m.pt", "\x80\2}q", "PyTorch's own form"}, {"m.h5", "\x89HDF\r", "Keras"},
    {"m", "MZqFpD", "a llamafile"}, {"Modelfile", "FROM ./m.gguf\n", "a Modelfile of Ollama"},
    {"m", "{\"schemaVersion\":2}", "a manifest of Ollama"},
    {"tokenizer.model", "\n\x0E", "the folder that it lies in"},
};

static void test_foreign(void) {
    char path[512];
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        copy_fixture(foreign[i].fixture);
        snprintf(path, sizeof path, "%s/src/%s", work, foreign[i].file);
        write_file(path, foreign[i].text, strlen(foreign[i].text));
        if (foreign[i].gone) {
            snprintf(path, sizeof path, "%s/src/%s", work, foreign[i].gone);
            CHECK(!remove(path));
        }
        expect(EXPORT(NULL), 3, foreign[i].needle, foreign[i].file);
    }
    copy_fixture("llama-plain");
    edit_header("model.safetensors", "0.self_attn.q_proj.weight", "0.self_attn.q_proj.qweight");
    expect(EXPORT(NULL), 3, "quantised by GPTQ or AWQ", "a quantised tensor");
    copy_fixture("llama-plain");
    edit_header("model.safetensors", "model.embed_tokens.weight", "m.model.embed_tokens.weight");
    expect(EXPORT(NULL), 3, "saved from within another model", "a wrapped model");
    copy_fixture("llama-plain");
    edit_header("model.safetensors", "0.self_attn.q_proj.weight", "0.self_attn.q_proj.lora_A.weight");
    expect(EXPORT(NULL), 3, "q_proj.weight: found nothing", "an adapter's names");
    copy_fixture("llama-plain");
    remove(in_work("src/config.json"));
    if (!symlink("gone", in_work("src/config.json")))
        expect(EXPORT(NULL), 3, "hf download goes on", "a link to nothing");
    remove(in_work("src/config.json"));
    copy_fixture("llama-plain");
    write_file(in_work("src/adapter_config.json"), "{}", 2);
    expect(EXPORT(NULL), 0, "", "an adapter beside the weights");
    CHECK(errors.n && strstr((char *)errors.data, "an adapter lies beside the weights"));
    clear_folder("src");
    for (size_t i = 0; i < sizeof foreign_sources / sizeof *foreign_sources; i++) {
        size_t n = strlen(foreign_sources[i].text);
        snprintf(path, sizeof path, "%s/src/%s", work, foreign_sources[i].name);
        write_file(path, foreign_sources[i].text, n);
        expect(RUN(path, in_work("out/x.mdr")), 3, foreign_sources[i].needle, path);
        remove(path);
    }
    write_file(in_work("src/m"), "\x09\1\0\0\0\0\0\0{\"a\":", 13);
    expect(RUN(in_work("src/m"), in_work("out/x.mdr")), 3, "the folder that it lies in", "weights");
    uint8_t tar[512] = "config.json";
    memcpy(tar + 257, "ustar", 5);
    write_file(in_work("src/m"), tar, sizeof tar);
    expect(RUN(in_work("src/m"), in_work("out/x.mdr")), 3, "unpack it first", "tar");
    remove(in_work("src/m"));
    expect(RUN("no-org/no-model", in_work("out/x.mdr")), 3, "hf download", "a name of the hub's");
    expect(EXPORT(NULL), 3, "found no config.json", "an empty folder");
}

/* Every byte of a header, in several ways: a code, never a crash, and what is accepted is in
 * range. */
static void test_flips(void) {
    buffer b = {0};
    copy_fixture("llama-plain");
    read_file(in_work("src/model.safetensors"), &b);
    size_t n = 8 + (size_t)read_u64(&(reader){b.data, b.n, 0, false}), wrong = 0;
    FILE *f = fopen(in_work("src/model.safetensors"), "r+b");
    const char *folder = in_work("src");
    must(f != NULL, "cannot write", "model.safetensors");
    for (size_t i = 0; i < n; i++) {
        static const uint8_t flips[] = {0x01, 0x10, 0x80};
        source s = {.folder = folder};
        medrun_error e = {0};
        uint8_t byte = (uint8_t)(b.data[i] ^ flips[test_random() % 3]);
        fseek(f, (long)i, SEEK_SET);
        fwrite(&byte, 1, 1, f);
        fflush(f);
        int code = read_shard(&s, "model.safetensors", &e);
        wrong += code != e.code || (code && code != MEDRUN_BAD_FILE);
        for (size_t k = 0; !code && k < s.n_tensors; k++)
            wrong += s.tensors[k].begin > s.tensors[k].end || s.tensors[k].end > b.n;
        close_source(&s);
        fseek(f, (long)i, SEEK_SET);
        fwrite(b.data + i, 1, 1, f);
    }
    CHECK_EQ(wrong, 0);
    fclose(f);
    buffer_free(&b);
}

/* The same for the tokenizer.json of a fixture. */
static void test_tokenizer_flips(const char *fixture) {
    buffer b = {0};
    size_t wrong = 0, accepted = 0, step = test_all() ? 3 : 13;
    copy_fixture(fixture);
    read_file(in_work("src/tokenizer.json"), &b);
    char path[512];
    snprintf(path, sizeof path, "%s", in_work("src/tokenizer.json"));
    for (size_t i = 0; i < b.n; i += step) {
        source_tokenizer t = {0};
        buffer out = {0};
        medrun_error e = {0};
        uint8_t before = b.data[i];
        b.data[i] = (uint8_t)(before ^ (1u << test_random() % 8));
        write_file(path, b.data, b.n);
        b.data[i] = before;
        snprintf(t.file.path, sizeof t.file.path, "%s", path);
        int code = json_parse(&t.config.j, "{}", 2, &e);
        if (!code) code = open_json_path(&t.file, &e);
        if (!code) code = convert_tokenizer(&t, &out, &e);
        wrong += code != e.code || (code && code != MEDRUN_BAD_FILE);
        accepted += !code;
        free_tokenizer(&t);
        buffer_free(&out);
    }
    CHECK_EQ(wrong, 0);
    CHECK(accepted > 0 && accepted < b.n / step);
    buffer_free(&b);
}

/* ---- options ------------------------------------------------------------------------------- */

static void test_options(void) {
    const char *src = in_work("src"), *out = in_work("out/x.mdr");
    copy_fixture("llama-plain");
    expect(RUN(src, out, "--thread", "2"), 2, "--threads", "nearest");
    expect(RUN(src, out, "--dri-run"), 2, "--dry-run", "nearest");
    expect(RUN(src, out, "-x"), 2, "unknown option -x", "unknown");
    expect(RUN(src, out, "--type", "int3"), 2, "wanted bf16, int8 or int4", "int3");
    expect(RUN(src, out, "--type=f32"), 2, "f32", "f32");
    expect(RUN(src, out, "--yarn-factor", "16"), 2, "no yarn scaling", "yarn");
    expect(RUN(src, out, "--yarn-factor", "0.5"), 2, "wanted 1 to 1000000", "yarn");
    expect(RUN(src, out, "--threads", "0"), 2, "--threads", "threads");
    expect(RUN(src, out, "--threads", "2x"), 2, "--threads", "threads");
    expect(RUN(src, out, "--threads", "999999999999999999999"), 2, "--threads", "threads");
    expect(RUN(src, out, "--threads", "0x2"), 2, "--threads", "threads");
    expect(RUN(src, out, "--threads", " 2"), 2, "--threads", "threads");
    expect(RUN(src, out, "--yarn-factor", "0x10"), 2, "--yarn-factor", "yarn");
    expect(RUN(src, out, "--yarn-factor", "nan"), 2, "--yarn-factor", "yarn");
    expect(RUN(src, out, "--sliding-window", "0x10"), 2, "--sliding-window", "window");
    expect(RUN(src, out, "--sliding-window", "1e3"), 2, "only for GGUF", "window");
    expect(RUN(src, out, "--threads"), 2, "--threads", "no value");
    expect(RUN(src, out, "--name="), 2, "--name", "empty name");
    expect(RUN(src, out, "--dry-run=1"), 2, "no value", "flag with a value");
    expect(RUN(src, out, "more"), 2, "third word", "third word");
    expect(RUN(src), 2, "OUT", "no OUT");
    expect(RUN("--type", "int8"), 2, "SOURCE", "no SOURCE");
    expect(RUN(src, out, "--template", "chatty"), 2, "chatty", "template");
    expect(RUN(src, out, "--sliding-window", "9"), 2, "only for GGUF", "window");
    expect(RUN(src, out, "--pre", "llama-bpe"), 2, "only for GGUF", "pre");
    expect(RUN(src, out, "--sliding-window", "-1"), 2, "--sliding-window", "window");
    expect(RUN(in_work("nowhere"), out), 3, "nowhere", "no folder");
    expect(RUN(in_work("src/config.json"), out), 3, "config.json", "a file for a folder");
    expect(RUN("--tokenizer-only", in_work("src/config.json"), out), 3, "config.json",
           "not a tokenizer");
    expect(RUN("--", src, out), 0, "", "only words");
    CHECK_EQ(RUN("--help"), 0);
    CHECK(strstr(answer, "--tokenizer-only") && !errors.n);
    CHECK_EQ(RUN("--version"), 0);
    CHECK(strstr(answer, MEDRUN_VERSION) && !errors.n);
    setenv("MEDRUN_TYPE", "int3", 1);
    expect(RUN(src, out), 2, "int3", "environment");
    expect(RUN(src, out, "--type", "bf16"), 0, "", "the flag wins");
    unsetenv("MEDRUN_TYPE");
    static const char card[] = "---\nlicense: other\nlicense_name: \"llama3\"\n---\n";
    write_file(in_work("src/README.md"), card, sizeof card - 1);
    CHECK_EQ(EXPORT("--dry-run"), 0);
    CHECK(strstr(answer, "licence      llama3\n"));
}

#define REFERENCE(source, ids, values) \
    "{\"logits\":[{\"ids\":[1],\"reference\":{\"source\":" source ",\"ids\":" ids ",\"values\":" \
    values "}}]}"

/* The reference of the last proof stands in the header as it was given. */
static void test_reference(void) {
    static const char given_text[] = REFERENCE("\"a\\\"b\"", "[282,0]", "[-0.001,1.23456789e+20]");
    static const char wanted[] = "{\"source\":\"a\\\"b\",\"ids\":[282,0],"
                                 "\"values\":[-0.001,1.23456789e+20]}";
    medrun_error e = {0};
    model_file f;
    copy_fixture("llama-plain");
    write_file(in_work("proof.json"), given_text, sizeof given_text - 1);
    CHECK_EQ(EXPORT("--proof", in_work("proof.json")), 0);
    CHECK_EQ(file_open(&f, in_work("out/x.mdr"), false, &e), 0);
    const json *j = &f.header;
    uint32_t last = JSON_NONE;
    for EACH(j, json_get(j, json_get(j, 0, "proofs"), "logits"), c) last = c;
    uint32_t v = json_get(j, last, "reference");
    CHECK(json_is_type(j, v, JSON_OBJECT) &&
          j->nodes[v].end - j->nodes[v].start == sizeof wanted - 1 &&
          !memcmp(j->text + j->nodes[v].start, wanted, sizeof wanted - 1));
    file_close(&f);
    clear_folder("out");
}

/* ---- templates ----------------------------------------------------------------------------- */

/* The template's name, then what a model has of its own: its BOS or "-", whether texts are trimmed
 * where they usually are not, or the other way, and its system text. */
static const char *recognised(const char *jinja) {
    static char found[1024];
    bool llama3 = strstr(jinja, "header_id") != NULL;
    buffer system = {0};
    const char *end = llama3 ? "<|eot_id|>" : strstr(jinja, "im_start") ? "<|im_end|>" : "</s>";
    fitted_template f = fit_template(jinja, strlen(jinja), llama3 ? "<|begin_of_text|>" : "<s>",
                                     end, &system);
    const chat_template *c = &f.chat, *row = c->name ? chat_find(c->name) : c;
    snprintf(found, sizeof found, "%s%s%s%s%s%s", c->name ? c->name : "unknown",
             c->bos != row->bos ? " " : "", c->bos == row->bos ? "" : c->bos ? c->bos : "-",
             c->trims != row->trims ? " trims" : "", c->system != row->system ? ": " : "",
             c->system != row->system ? c->system : "");
    buffer_free(&system);
    return found;
}

/* Spellings that mean the same have one fingerprint; a change of any word is another template. */
static medrun_info exported(medrun_model **m);

static bool fingerprint(const char *jinja, uint8_t digest[32]) {
    jinja_reader r = {0};
    buffer lines = {0};
    bool good = jinja_tokens(&r, &lines, jinja, strlen(jinja));
    if (good) sha256_of(r.out.data, r.out.n, digest);
    buffer_free(&lines), buffer_free(&r.out), buffer_free(&r.text);
    return good;
}

static void test_fingerprint(void) {
    static const char *const same[] = {
        "{% for m in messages %}{{ m['role'] + 'a\\n' }}  \n{% endfor %}\n{{ x }}",
        "{%for m in messages%}{{m[\"role\"]+\"a\\n\"}}  \n{%endfor%}{{x}}\n",
        ("{# a comment #}{% for m\n in\tmessages -%}  \n {{ m.role + 'a\n' }}  \n   {% endfor %}"
         "{#- #}{{ x }}"),
        "  {%- for m in messages %}\n{{ m.role + 'a\\n' }}  \r\n{% endfor %}\r\n{{ x }}",
        "{% for m in messages %}{{ m.role + \"a\n\" }}  {# {{ y }} #}\n\n{% endfor %}{{ x }}\r\n"};
    static const char *const other[] = {
        "{% for m in messages %}{{ m['role'] + 'b\\n' }}  \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ m['rule'] + 'a\\n' }}  \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ m['role'] + 'a\\n' -}}  \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ m['role'] + 'a\\n' }}  \n{%+ endfor %}\n\n{{ x }}",
        "{% for m in messages %}{{ m['role'] - 'a\\n' }}  \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ m['role'] + 'a\\n' }}   \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ mm['role'] + 'a\\n' }}  \n{% endfor %}\n{{ x }}",
        "{% for m in messages %}{{ m['role'] + 'a\\n' }}  \n{% endfor %}\n{{ x }} ",
        "{{ 'a' }}", "a", "{{ a }}", "{% a %}", "{{ {'a': 1} }}", "{{ {'a': 1}}}", "\n\n"};
    static const char *const unread[] = {"", "\n", "{{", "{{ x", "{% x }}", "{{ 'x }}", "{{ (x }}",
                                         "{{ 'x\\", "{% raw %}{{ x }}{% endraw %}", "{%- raw -%}a"};
    uint8_t first[32], digest[32], others[16][32];
    CHECK(fingerprint(same[0], first));
    for (size_t i = 1; i < sizeof same / sizeof *same; i++)
        if (!CHECK(fingerprint(same[i], digest) && !memcmp(first, digest, 32)))
            printf("    spelling %zu\n", i);
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        bool differs = fingerprint(other[i], others[i]) &&
                       memcmp(first, others[i], 32);
        bool brackets = !strncmp(other[i], "{{ {", 4);  /* a closing bracket more or less         */
        for (size_t k = 0; k < i; k++)
            differs &= memcmp(others[k], others[i], 32) != 0 ||
                       (brackets && !strncmp(other[k], "{{ {", 4));
        if (!CHECK(differs)) printf("    %s\n", other[i]);
    }
    for (size_t i = 0; i < sizeof unread / sizeof *unread; i++)
        if (!CHECK(!fingerprint(unread[i], digest))) printf("    %s\n", unread[i]);
}

/* SmolLM2's template, and the same with another system text. */
static void test_chatml(void) {
#define CHATML(who) "{% for message in messages %}{% if loop.first and messages[0].role != 'system' " \
    "%}{{ '<|im_start|>system\nYou are " who "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + " \
    "message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}" \
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    static const char smollm[] = CHATML("a helpful AI assistant named SmolLM, trained by Hugging Face");
    CHECK(!strcmp(recognised(smollm), "chatml"));
    CHECK(!strcmp(recognised(CHATML("somebody else")), "chatml: You are somebody else"));
}

/* Llama 2's and Mistral's formats in our own words. */
static const char llama2_jinja[] =
    "{%- set start = 1 if messages[0].role == 'system' else 0 -%}{%- for m in "
    "messages[start:] -%}{%- if (m.role == 'user') == (loop.index is even) -%}{{ "
    "raise_exception('in turn') }}{%- endif -%}{%- set text = m.content -%}{%- if "
    "loop.first and start -%}{%- set text = '<<SYS>>\\n' + messages[0].content + "
    "'\\n<</SYS>>\\n\\n' + text -%}{%- endif -%}{%- if m.role == 'user' -%}{{ bos_token + "
    "'[INST] ' + text.strip() + ' [/INST]' }}{%- elif m.role == 'assistant' -%}{{ ' ' + "
    "text.strip() + ' ' + eos_token }}{%- endif -%}{%- endfor -%}";
static const char mistral_jinja[] =
    "{%- set start = 1 if messages[0].role == 'system' else 0 -%}{{ bos_token }}{%- for m "
    "in messages[start:] -%}{%- if m.role not in ['user', 'assistant'] or (m.role == "
    "'user') == (loop.index is even) -%}{{ raise_exception('in turn') }}{%- endif -%}{%- "
    "if m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}{%- else -%}{{ ' [INST] "
    "' + (messages[0].content + '\\n\\n' if loop.first and start else '') + m.content + ' "
    "[/INST]' }}{%- endif -%}{%- endfor -%}";

/* Common spellings of one template, and that bos_token and eos_token must be the template's. */
static void test_spellings(void) {
#define SAID "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | " \
    "trim + '<|eot_id|>'"
#define ASKS "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}" \
    "{% endif %}"
#define ONE "'<|im_start|>' + message['role'] + '\n' + message['content'] + "
#define TURN "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    static const char *const known[][2] = {
        {llama2_jinja, "llama2"}, {mistral_jinja, "mistral"},
        {"{{ bos_token }}{% for message in messages %}{{ " SAID " }}{% endfor %}" ASKS, "llama3"},
        {"{{ '<|begin_of_text|>' }}{% for message in messages %}{{ " SAID " }}{% endfor %}" ASKS,
         "llama3"},
        {"{% for message in messages %}{% set content = " SAID " %}{% if loop.index0 == 0 %}"
         "{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}" ASKS,
         "llama3"},
        {"{% for message in messages %}{{ " ONE "'<|im_end|>' + '\n' }}{% endfor %}" TURN, "chatml-bare"},
        {"{% for message in messages %}{{ " ONE "'<|im_end|>\n' }}{% endfor %}" TURN, "chatml-bare"},
        {"{% for message in messages %}{{ " ONE "eos_token + '\n' }}{% endfor %}" TURN, "chatml-bare"},
        {"{% for message in messages %}{{ " ONE "'<|im_end|>' }}{% endfor %}" TURN, "unknown"},
        /* a BOS in front, as a word, as text, in the loop; a branch for each role; trimmed texts */
        {"<s>{% for message in messages %}{{ " ONE "'<|im_end|>\n' }}{% endfor %}" TURN,
         "chatml-bare <s>"},
        {"{{ bos_token }}{% for message in messages %}{{ " ONE "'<|im_end|>\n' }}{% endfor %}" TURN,
         "chatml-bare <s>"},
        {"{%- for m in messages -%}{{ bos_token if loop.first else '' }}<|im_start|>{{ m.role ~ '\n' ~ "
         "m.content ~ '<|im_end|>\n' }}{%- endfor -%}" TURN, "chatml-bare <s>"},
        {"{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content }}{% elif "
         "m.role in ['assistant'] %}{{ '<|im_start|>assistant\n' + m.content }}{% else %}{{ "
         "'<|im_start|>system\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" TURN,
         "chatml-bare"},
        {"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.strip() + '<|im_end|>\n' "
         "}}{% endfor %}" TURN, "chatml-bare trims"},
        /* a macro writes the turns */
        {"{% macro turn(role, text, end='<|im_end|>') %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ end ~ '\n' "
         "}}{% endmacro %}{% for m in messages %}{{ turn(m.role, text=m.content) }}{% endfor %}" TURN,
         "chatml-bare"},
        /* the system text looked up, by a namespace and by a filter */
        {"{% set ns = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.text "
         "= m.content %}{% endif %}{% endfor %}{% if ns.text %}{{ '<|im_start|>system\n' + ns.text + "
         "'<|im_end|>\n' }}{% endif %}{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + "
         "m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" TURN, "chatml-bare"},
        {"{{ bos_token }}{% for m in (messages | selectattr('role', 'equalto', 'system') | list) + (messages"
         " | rejectattr('role', 'equalto', 'system') | list) %}{{ '<|start_header_id|>' ~ m.role ~ "
         "'<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}" ASKS, "llama3"},
        /* the opening of the answer with the question, and texts as they are */
        {"{{ '<|begin_of_text|>' }}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{{ "
         "'<|start_header_id|>system<|end_header_id|>\n\n' + messages[0].content + '<|eot_id|>' }}{% else %}"
         "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ "
         "'<|start_header_id|>user<|end_header_id|>\n\n' + m.content + '<|eot_id|><|start_header_id|>"
         "assistant<|end_header_id|>\n\n' }}{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}",
         "llama3 trims"},
        /* a default system text */
        {"{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>"
         "\n\nBe kind.<|eot_id|>' }}{% endif %}{% for message in messages %}{{ " SAID " }}{% endfor %}"
         ASKS, "llama3: Be kind."},
        /* what is not understood is not guessed */
        {"{% macro turn(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
         "unknown"},
        {"{% macro turn(m) %}{{ " ONE "'<|im_end|>\n' }}{% endmacro %}{% for message in messages %}{{ "
         "turn(message) }}{% endfor %}" TURN, "unknown"},
        {"{% for message in messages %}{{ " ONE "'<|im_end|>\n' | shuffle }}{% endfor %}" TURN, "unknown"},
        {"{% for message in messages %}{{ " ONE "'<|im_end|>\n' }}" TURN, "unknown"},
        {"{{ ((((((((((((((((((((((((((((((((((((((((((((1)))))))))))))))))))))))))))))))))))))))))))) }}",
         "unknown"},
        {"{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}x{% endfor %}"
         "{% endfor %}{% endfor %}", "unknown"},
        {"{% set x = 'ab' * 3 %}{{ messages[0].content / 2 }}", "unknown"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!CHECK(!strcmp(recognised(known[i][0]), known[i][1]))) printf("    %s\n", known[i][0]);
    medrun_model *m = NULL;
    copy_fixture("mistral-spm");
    write_file(in_work("src/chat_template.jinja"), llama2_jinja, strlen(llama2_jinja));
    medrun_info info = exported(&m);
    CHECK(info.chat_template && !strcmp(info.chat_template, "llama2"));
    medrun_close(m), clear_folder("out");
    CHECK_EQ(EXPORT("--template", "mistral-v0.1"), 0);  /* which has no place for a system's     */
    clear_folder("out");
    edit("tokenizer_config.json", "\"eos_token\": \"</s>\"", "\"eos_token\": \"<s>\"");
    info = exported(&m);
    CHECK(info.chat_template && !strcmp(info.chat_template, "unknown"));
    medrun_close(m), clear_folder("out");
    copy_fixture("mistral-spm");                        /* <|im_start|> is not called special    */
    edit("tokenizer_config.json", "\"added_tokens_decoder\"", "\"x\"");
    edit("tokenizer_config.json", "\"eos_token\": \"</s>\"", "\"eos_token\": \"<|im_end|>\"");
    edit("config.json", "\"vocab_size\": 384", "\"vocab_size\": 386");
    add_rows(386, 0);
    static const char added[] = "{\"<|im_end|>\": 384, \"<|im_start|>\": 385}";
    write_file(in_work("src/added_tokens.json"), added, sizeof added - 1);
    info = exported(&m);                                /* no template: its tokens are named     */
    CHECK(info.chat_template && !strcmp(info.chat_template, "none"));
    CHECK(errors.n && strstr((char *)errors.data, "--template chatml-bare may be theirs"));
    medrun_close(m), clear_folder("out");
    write_file(in_work("src/chat_template.jinja"), known[7][0], strlen(known[7][0]));
    info = exported(&m);
    CHECK(info.chat_template && !strcmp(info.chat_template, "chatml-bare"));
    medrun_close(m), clear_folder("out");
    static const char own[] =                           /* a BOS, trimmed, its own system text   */
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' "
        "}}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + "
        "'<|im_end|>\n' }}{% endfor %}" TURN;
    write_file(in_work("src/chat_template.jinja"), own, sizeof own - 1);
    info = exported(&m);
    CHECK(info.chat_template && !strcmp(info.chat_template, "chatml") && !strcmp(info.system, "Be kind."));
    const medrun_message asked[] = {{"system", "Be kind.", 8}, {"user", " Hm? ", 5}, {"user", "Hm?", 3}};
    int32_t ids[2][64];
    size_t n[2] = {0};
    CHECK(!medrun_render(m, NULL, NULL, asked + 1, 1, true, ids[0], 64, &n[0], NULL));
    const medrun_message plain[] = {asked[0], asked[2]};
    const medrun_chat_options with_bos = {.bos = MEDRUN_BOS_ON};
    CHECK(!medrun_render(m, "chatml", &with_bos, plain, 2, true, ids[1], 64, &n[1], NULL));
    CHECK(n[0] > 8 && n[0] == n[1] && !memcmp(ids[0], ids[1], 4 * n[0]) && ids[0][0] == 1);
    medrun_session *s = NULL;
    medrun_session_options wanted = {.context = 64};
    CHECK(!medrun_start(&s, m, &wanted, NULL, 0, NULL) && !medrun_say(s, "user", " Hm? ", 5, NULL) &&
          medrun_length(s) == n[0]);
    medrun_stop(s), medrun_close(m), clear_folder("out");
#undef SAID
#undef ASKS
#undef ONE
#undef TURN
}

/* How many conversations of a template end in another way than EXPECTED says; a null there: a
 * refusal. MAY_LOSE: it may be one that is not understood. */
static int wrong_renderings(const json *j, uint32_t template, uint32_t expected, bool may_lose) {
    buffer text = {0}, lines = {0}, out = {0}, wanted = {0};
    jinja_reader r = {0};
    int wrong = 0;
    json_unescape(j, template, &text);
    size_t n = 0;
    bool good = jinja_tokens(&r, &lines, (const char *)text.data, text.n);
    jinja_token *tokens = good ? jinja_list_tokens(&r, &n) : NULL;
    uint32_t chat = json_get(j, 0, "conversations") + 1;
    for EACH(j, expected, e) {
        medrun_message *m = NULL;
        size_t count = 0;
        buffer words = {0};
        medrun_error error = {0};
        CHECK(!chat_messages(chat_find("none"), j, chat, "jinja", &m, &count, &words, &error));
        out.n = wanted.n = 0;
        int state = tokens ? jinja_render(tokens, n, m, count, count != 2, "<s>", "</s>", &out) :
                             JINJA_LOST;
        bool refuses = !json_is_type(j, e, JSON_STRING);
        if (!refuses) json_unescape(j, e, &wanted);
        bool same = refuses ? state == JINJA_REFUSES : !state && same_text_in(&wanted, &out);
        wrong += !same && !(may_lose && state == JINJA_LOST);
        chat = j->nodes[chat].next;
        buffer_free(&words);
        free(m);
    }
    if (wrong) printf("    %.*s\n", (int)text.n, (const char *)text.data);
    buffer_free(&text), buffer_free(&out), buffer_free(&wanted);
    buffer_free(&lines), buffer_free(&r.out), buffer_free(&r.text), free(tokens);
    return wrong;
}

/* What jinja2 makes of small templates: tools/reference/jinja_cases.py. */
static void test_jinja(void) {
    buffer b = {0};
    json j;
    read_file("tests/fixtures/jinja.json", &b);
    if (!CHECK(b.n && !json_parse(&j, (const char *)b.data, b.n, NULL))) return;
    int found = 0;
    for (int lost = 0; lost < 2; lost++) {
        for EACH(&j, json_get(&j, 0, lost ? "lost" : "known"), c) {
            CHECK_EQ(wrong_renderings(&j, c + 1, j.nodes[c + 1].next, lost), 0);
            found++;
        }
    }
    CHECK(found > 90);
    json_free(&j);
    buffer_free(&b);
}

/* What the checkpoint of the folder in src says, with M to be closed. */
static medrun_info exported(medrun_model **m) {
    medrun_info info = {0};
    if (CHECK_EQ(EXPORT("--type", "bf16"), 0) &&
        CHECK(!medrun_open(m, in_work("out/x.mdr"), NULL, NULL))) medrun_describe(*m, &info);
    return info;
}

static bool near(float a, double b) { return fabs((double)a - b) < 1e-6; }

static void test_templates(void) {
    medrun_model *m = NULL;
    medrun_session *s = NULL;
    medrun_error e = {0};
    size_t n;
    copy_fixture("llama-plain");                        /* nobody knows this one                 */
    edit("tokenizer_config.json", "{% set loop", "Cutting Knowledge {% set loop");
    medrun_info info = exported(&m);
    CHECK(errors.n && strstr((char *)errors.data, "--template") &&
          strstr((char *)errors.data, "templates.py"));
    if (!CHECK(info.chat_template && !strcmp(info.chat_template, "unknown"))) return;
    CHECK(near(info.sampling.temperature, 0.6) && info.n_stops == 1);
    medrun_session_options o = {.context = 64};
    const medrun_message hi = {"user", "Hi", 2};
    CHECK(!medrun_start(&s, m, &o, NULL, 0, NULL));
    CHECK_EQ(medrun_say(s, "user", "Hi", 2, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "--template") && medrun_length(s) == 0);
    CHECK_EQ(medrun_render(m, NULL, NULL, &hi, 1, true, NULL, 0, &n, NULL), MEDRUN_USAGE);
    CHECK(!medrun_render(m, "llama3", NULL, &hi, 1, true, NULL, 0, &n, NULL) && n > 5);
    medrun_stop(s), medrun_close(m), clear_folder("out");

    copy_fixture("llama-plain");                        /* the card's sampling                   */
    edit("generation_config.json", "\"do_sample\": true,", "");
    edit("generation_config.json", "\"temperature\": 0.6,", "");
    edit("generation_config.json", "\"top_p\": 0.9,", "");
    info = exported(&m);
    CHECK(near(info.sampling.temperature, 0.4) && info.sampling.top_k == 150 &&
          near(info.sampling.top_p, 0.75));
    CHECK(errors.n && strstr((char *)errors.data, "temperature 0.4, top_k 150"));
    medrun_close(m), clear_folder("out");
    CHECK_EQ(EXPORT("--template", "med42"), 0);
    CHECK(errors.n && strstr((char *)errors.data, "temperature 0.7, top_k 50, top_p 1"));
    clear_folder("out");
    edit("generation_config.json", "{", "{\"top_k\": 7,");
    info = exported(&m);                                /* the model's own word is enough        */
    CHECK(near(info.sampling.temperature, 0) && info.sampling.top_k == 7);
    medrun_close(m), clear_folder("out");

    copy_fixture("llama-plain");                        /* chat_template.jinja wins              */
    static const char jinja[] = "{{ nobody knows }}";
    write_file(in_work("src/chat_template.jinja"), jinja, sizeof jinja - 1);
    info = exported(&m);
    CHECK(info.chat_template && !strcmp(info.chat_template, "unknown"));
    medrun_close(m), clear_folder("out");
    remove(in_work("src/tokenizer_config.json")), remove(in_work("src/chat_template.jinja"));
    CHECK_EQ(EXPORT("--dry-run"), 0);
    CHECK(strstr(answer, "chat         none") && strstr(answer, "there is no chat template"));
}

/* Of other people's templates only Llama 3's is one of ours. */
static const char *published_name(const char *name) {
    static const char *const known[][2] = {
        {"Llama-3", "llama3"}, {"teknium/OpenHermes-2.5-Mistral-7B", "chatml-bare"},
        {"mistralai/Mistral-7B-Instruct-v0.2 (NOTE", "mistral-v0.2"},
        {"mistralai/Mistral-7B-Instruct-v0.2 (mistralai 'v1'", "mistral"}};
    for (size_t i = 0; i < 4; i++)
        if (!strncmp(name, known[i][0], strlen(known[i][0]))) return known[i][1];
    return "unknown";
}

static void test_published(const char *data) {
    buffer b = {0};
    json j;
    int found = 0, wrong = 0;
    char path[1024];
    snprintf(path, sizeof path, "%s/templates/llamacpp_test_chat_template.json", data);
    read_file(path, &b);
    if (!CHECK(b.n && !json_parse(&j, (const char *)b.data, b.n, NULL))) return;
    for EACH(&j, json_get(&j, 0, "cases"), c) {
        buffer text = {0};
        json_unescape(&j, json_get(&j, c, "template_str"), &text);
        const char *wanted = published_name(show(&j, json_get(&j, c, "name")).text);
        wrong += strcmp(recognised((const char *)text.data), wanted) != 0;
        found++;
        buffer_free(&text);
    }
    CHECK_EQ(wrong, 0);
    CHECK_EQ(found, 33);
    json_free(&j), buffer_free(&b);
}

static void test_proofs(void) {
    static const struct { const char *text; int code; const char *needle; } cases[] = {
        {"{\"tokens\":[{\"text\":\"the\"}],\"chats\":[{\"messages\":[{\"role\":\"user\","
         "\"content\":\"x\\u0000y\"}]}],\"logits\":[{\"ids\":[0,282,7]}]}", 0, ""},
        {"{}", 0, ""},
        {"{\"tokens\":[{\"text\":\"!\",\"ids\":[0]}]}", 0, ""},
        {"{\"tokens\":[{\"text\":\"!\",\"ids\":[1]}]}", 4, "differ"},
        {"{\"tokens\":[{\"text\":\"!\",\"ids\":[]}]}", 4, "differ"},
        {"{\"tokens\":[{\"words\":\"!\"}]}", 3, "tokens"},
        {"{\"tokens\":7}", 3, "tokens"},
        {"{\"chats\":[{\"messages\":[{\"role\":\"user\",\"content\":\"!\"}],\"ids\":[0]}]}", 4,
         "differ"},
        {"{\"chats\":[{\"messages\":[{\"role\":\"doctor\",\"content\":\"!\"}]}]}", 2, "doctor"},
        {"{\"chats\":[{\"messages\":[{\"role\":\"user\"}]}]}", 3, "content"},
        {"{\"chats\":[{\"messages\":[]}]}", 3, "messages"},
        {"{\"logits\":[{\"ids\":[]}]}", 3, "logits"},
        {"{\"logits\":[{\"ids\":[283]}]}", 3, "logits"},
        {"{\"logits\":[{\"ids\":[-1]}]}", 3, "logits"},
        {"{\"logits\":[{\"ids\":[1],\"sha256\":\"zz\"}]}", 3, "sha256"},
        {REFERENCE("\"a\"", "[0,282]", "[-1e-3,2.5]"), 0, ""},
        {REFERENCE("7", "[0]", "[1]"), 3, "source"},
        {REFERENCE("\"a\"", "[]", "[]"), 3, "reference: ids"},
        {REFERENCE("\"a\"", "{\"0\":1}", "[1,2]"), 3, "reference: ids"},
        {REFERENCE("\"a\"", "[283]", "[1]"), 3, "reference: ids"},
        {REFERENCE("\"a\"", "[-1]", "[1]"), 3, "reference: ids"},
        {REFERENCE("\"a\"", "[5,5]", "[1,1]"), 3, "reference: ids"},
        {REFERENCE("\"a\"", "[0,1]", "[1]"), 3, "reference: values"},
        {REFERENCE("\"a\"", "[0]", "7"), 3, "reference: values"},
        {REFERENCE("\"a\"", "[0]", "[\"1\"]"), 3, "reference: values"},
        {REFERENCE("\"a\"", "[0]", "[1e39]"), 3, "reference: values"},
        {REFERENCE("\"a\"", "[0]", "[-1e999]"), 3, "reference: values"},
        {"{\"logits\":[{\"ids\":[1],\"reference\":7}]}", 3, "source"},
        {"{\"logits\":[{\"ids\":[1]}", 3, "JSON"},
    };
    copy_fixture("llama-plain");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_file(in_work("proof.json"), cases[i].text, strlen(cases[i].text));
        expect(EXPORT("--proof", in_work("proof.json")), cases[i].code, cases[i].needle,
               cases[i].text);
    }
    char wrong[200];
    snprintf(wrong, sizeof wrong, "{\"logits\":[{\"ids\":[1],\"sha256\":\"%064d\"}]}", 7);
    write_file(in_work("proof.json"), wrong, strlen(wrong));
    CHECK_EQ(EXPORT("--proof", in_work("proof.json")), 4);
    CHECK(strstr((const char *)errors.data, "differs") && clear_folder("out") == 0);
}

/* ---- calibration --------------------------------------------------------------------------- */

/* N bytes of words that differ; the fixtures' tokenizers take most letters for one. */
static void write_words(const char *path, size_t n) {
    static const char *const words[] = {"fever", "cough", "a", "dose", "of", "\xc3\xa9t\xc3\xa9"};
    buffer b = {0};
    for (size_t i = 0; b.n < n; i++)
        buffer_printf(&b, "%s%c", words[test_random() % 6], i % 9 ? ' ' : '\n');
    while (n && b.data[n - 1] >= 0x80) b.data[n - 1] = 'x', n -= n > 1 && b.data[n - 2] >= 0x80;
    write_file(path, b.data, n);
    buffer_free(&b);
}

#define CALIBRATE(...) EXPORT("--type", "int4", "--calibrate", in_work("text.txt"), __VA_ARGS__)

/* The error of what down_proj of layer 1 gives on the text, e^T H e of each row e summed up; MOMENTS
 * NULL: that of its weights. */
static double output_error(const medrun_model *m, const double *squares) {
    source s = {.folder = in_work("src")};
    medrun_error e = {0};
    const tensor *t = &m->layers[1].down;
    double error = 0;
    must(!read_shard(&s, "model.safetensors", &e) && !sort_tensors(&s, &e), "cannot read", "");
    const source_tensor *from = find_tensor(&s, "model.layers.1.mlp.down_proj.weight");
    float *row = new_array(t->cols, sizeof *row);
    uint16_t *raw = new_array(t->cols, 2);
    for (size_t r = 0; r < t->rows; r++) {
        read_at(s.files[0].fd, raw, 2 * t->cols, from->begin + 2 * t->cols * r, "", &e);
        panel_unpack_row(t->type, t->data + r / LANES * panel_bytes(t->type, t->cols), r % LANES,
                         t->cols, row);
        for (size_t k = 0; k < t->cols; k++) row[k] -= bf16_to_f32(raw[k]);
        for (size_t k = 0; k < t->cols; k++)
            for (size_t i = 0; i < t->cols; i++)
                error += (double)row[k] * (double)row[i] *
                         (squares ? squares[k * t->cols + i] : i == k);
    }
    free(row), free(raw);
    close_source(&s);
    return error;
}

static void add_moments(void *user, const char *stage, int layer, size_t rows, size_t cols,
                        size_t stride, const float *data) {
    double *squares = user;
    for (size_t r = 0; r < rows && layer == 1 && !strcmp(stage, "ffn_act"); r++)
        for (size_t k = 0; k < cols; k++)
            for (size_t i = 0; i < cols; i++)
                squares[k * cols + i] += (double)data[r * stride + k] * (double)data[r * stride + i];
}

/* The products of two columns that down_proj of layer 1 is multiplied by on the text, as this model
 * computes them. */
static double *moments_of(const medrun_model *m) {
    size_t cols = (size_t)m->config.ffn_size;
    double *squares = new_array(cols * cols, sizeof *squares);
    medrun_session *s = NULL;
    int32_t ids[512];
    size_t n = 0;
    buffer b = {0};
    read_file(in_work("text.txt"), &b);
    CHECK(!medrun_tokenize(m, (const char *)b.data, 400, 0, ids, 512, &n, NULL) && n > 200);
    if (CHECK(!medrun_start(&s, m, NULL, NULL, 0, NULL) && !medrun_feed(s, ids, n, NULL))) {
        medrun_observe(s, add_moments, squares);
        while (medrun_pending(s)) medrun_step(&s, 1, NULL);
    }
    medrun_stop(s);
    buffer_free(&b);
    return squares;
}

/* Provenance and proofs of a checkpoint that was calibrated or not. */
static void check_calibrated(const medrun_model *m, bool calibrated) {
    const json *j = &m->file.header;
    medrun_error e = {0};
    uint32_t from = json_get(j, 0, "provenance"), c = json_get(j, from, "calibration");
    uint32_t last = JSON_NONE;
    uint64_t tokens = 0;
    buffer b = {0};
    uint8_t digest[32];
    char hex[65], made[256] = "", said[64];
    CHECK((c != JSON_NONE) == calibrated);
    CHECK(!calibrated || (json_size(j, json_get(j, c, "tokens"), &tokens) && tokens > 1000));
    read_file(in_work("text.txt"), &b);
    sha256_of(b.data, b.n, digest), hex_of(digest, hex);
    for EACH(j, json_get(j, from, "sources"), file) last = file;
    CHECK(json_is(j, json_get(j, last, "file"), "text.txt") == calibrated &&
          json_is(j, json_get(j, last, "sha256"), hex) == calibrated);
    json_text(j, from, "", "precision", made, sizeof made, &(medrun_error){0});
    snprintf(said, sizeof said, "what %d tokens of a text gave", (int)tokens);
    CHECK((strstr(made, said) != NULL) == calibrated);
    for EACH(j, json_get(j, json_get(j, 0, "proofs"), "logits"), proof) {
        logits_proof p = {.given = true};
        int32_t ids[16] = {0};
        for EACH(j, json_get(j, proof, "ids"), id)
            if (p.n < 16) ids[p.n++] = (int32_t)json_number(j, id);
        p.ids = ids;
        CHECK(!json_text(j, proof, "", "sha256", hex, sizeof hex, &e) && parse_hex(hex, p.wanted) &&
              !run_logits(m, &p, &e));
    }
    buffer_free(&b);
}

/* What a matrix gives on the text is nearer to the source's than without it, its weights are not. */
static void test_calibration(void) {
    medrun_error e = {0};
    double error[2][2], *squares = NULL;
    copy_fixture("llama-plain");
    write_words(in_work("text.txt"), 6000);
    for (int with = 0; with < 2; with++) {
        medrun_model *m = NULL;
        CHECK_EQ(with ? CALIBRATE("--threads", "2") : EXPORT("--type", "int4"), 0);
        if (!CHECK(!medrun_open(&m, in_work("out/x.mdr"), NULL, &e))) return;
        if (!with) squares = moments_of(m);
        error[with][0] = output_error(m, squares), error[with][1] = output_error(m, NULL);
        CHECK(logits_error(m, "llama-plain") < 0.3);
        check_calibrated(m, with);
        medrun_close(m);
    }
    printf("calibrated: %.3f of the outputs' error, %.3f of the weights'\n",
           error[1][0] / error[0][0], error[1][1] / error[0][1]);
    CHECK(error[1][0] < error[0][0] * 0.7 && error[1][1] > error[0][1]);
    free(squares);
    clear_folder("out");
}

/* The chain of a matrix whose factor is known, and one that is none. */
static void test_factor(void) {
    enum { N = 64 };
    static float chain[N * (N + 16)], pivots[32 * (N + 16)], loss[N];
    static double r[N][N];
    const kernel_set *sets[N_KERNEL_SETS];
    calibration c = {0};
    thread_pool pool;
    medrun_error e = {0};
    double worst = 0;
    usable_kernels(sets);
    c.more = sets[0]->more;
    if (!CHECK(!pool_start(&pool, 2, &e))) return;
    for (int i = 0; i < N; i++)
        for (int j = i; j < N; j++) r[i][j] = i == j ? 2 + i % 3 : (double)(test_random() % 100) * 1e-3;
    for (int i = 0; i < N; i++)
        for (int j = 0; j <= i; j++) {
            double sum = 0;
            for (int k = i; k < N; k++) sum += r[i][k] * r[j][k];
            chain[(size_t)i * spread(N) + (size_t)j] = (float)sum;
        }
    CHECK(factor(&c, &pool, chain, loss, N, pivots));
    turn_over(chain, N);
    for (int k = 0; k < N; k++) {
        worst = fmax(worst, fabs((double)loss[k] - r[k][k] * r[k][k]));
        for (int j = 0; j < N; j++)
            worst = fmax(worst, fabs((double)chain[k * (int)spread(N) + j] - (j > k ? r[k][j] / r[j][j] : 0)));
    }
    CHECK(worst < 1e-4);
    memset(chain, 0, sizeof chain);
    for (int i = 0; i < N; i++) chain[(size_t)i * (spread(N) + 1)] = i == 20 ? -1 : 1;
    CHECK(!factor(&c, &pool, chain, loss, N, pivots));
    pool_stop(&pool);
}

/* Of each row what has the smaller loss is kept: a row is never worse than without feeding on. */
static void test_kept_rows(void) {
    enum { WIDTH = 64 };
    static uint8_t q[WIDTH * UNIT_LANES], panel[1 << 12];
    static uint16_t bits[WIDTH / GROUP4 * UNIT_LANES];
    static size_t order[WIDTH];
    exporter x = {.calibration = {.order = order}};
    moments m = {WIDTH, WIDTH, 1, NULL};
    unit u = {.q = q, .bits = bits, .panel = panel};
    int wrong = 0;
    for (size_t i = 0; i < WIDTH; i++) order[i] = (i + 32) % 64 / 32 * 32 + (i * 5) % 32;
    for (size_t i = 0; i < WIDTH * UNIT_LANES; i++) q[i] = i % UNIT_LANES < UNIT ? 3 : 12;
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        bits[i] = (uint16_t)(i % UNIT_LANES < UNIT ? 0x1000 : 0x2000);
    for (size_t r = 0; r < UNIT; r++)
        u.loss[r] = 1, u.loss[r + UNIT] = r % 3 == 0 ? 0.5f : (float)(r % 3);
    pack_block(&(round_job){&x, NULL, &m, 0}, &u, LANES, LANES);
    for (size_t r = 0; r < LANES; r++)
        for (size_t k = 0; k < WIDTH; k++) {
            bool plain = (LANES + r) % 3 == 0;
            wrong += stored_int(TYPE_INT4, panel, r, k) !=
                     int4_levels[plain ? 12 : 3] - INT4_ZERO - SHIFT_ZERO;
            wrong += stored_scale(TYPE_INT4, panel, r, k) != int4_scale(plain ? 0x2000 : 0x1000) * 0x1p-13f;
        }
    CHECK_EQ(wrong, 0);
}

/* A window's first row, a thousand times the others, counts as one of them; a smaller one as it is.
 * Where it was left out, the exporter fed errors to the columns that this row alone has. */
static void test_first_row(void) {
    enum { ROWS = 5, COLS = 16, STRIDE = 32 };
    static float rows[ROWS * STRIDE];
    double sizes[ROWS] = {0};
    for (int times = 0; times < 2; times++) {
        for (int i = 0; i < ROWS * STRIDE; i++) rows[i] = (float)(i % 7 - 3);
        for (int k = 0; k < COLS; k++) rows[k] = k == 3 ? times ? 5000 : 1 : 0;
        tame_first(rows, ROWS, COLS, STRIDE);
        memset(sizes, 0, sizeof sizes);
        for (int i = 0; i < ROWS * STRIDE; i++)
            if (i % STRIDE < COLS) sizes[i / STRIDE] += (double)rows[i] * rows[i];
        double others = (sizes[1] + sizes[2] + sizes[3] + sizes[4]) / 4;
        CHECK(fabs(sizes[0] - (times ? others : 1)) < 1e-4 * others);
        CHECK(rows[2] == 0 && rows[COLS] == (float)(COLS % 7 - 3));
    }
    rows[3] = 5000;
    tame_first(rows, 1, COLS, STRIDE);          /* alone it is its own measure                      */
    CHECK(rows[3] == 5000);
}

/* Whole rows where a gigabyte has room for their moments, else blocks of 256 columns or more. */
static void test_moments(void) {
    static const struct { size_t hidden, heads, ffn, blocks, downs; } shapes[] = {
        {576, 576, 1536, 1, 1}, {4096, 4096, 14336, 1, 4}, {8192, 8192, 28672, 4, 14}};
    for (size_t i = 0; i < 3; i++) {
        calibration c = {.ids = {.n = 4 * MAX_WINDOWS * WINDOW_TOKENS}, .hidden = shapes[i].hidden};
        const size_t columns[N_INPUTS] = {c.hidden, shapes[i].heads, c.hidden, shapes[i].ffn};
        CHECK(plan_blocks(&c, columns) <= MOST_MOMENTS);
        CHECK_EQ(c.seen[0].n, shapes[i].blocks);
        CHECK_EQ(c.seen[3].n, shapes[i].downs);
        for (size_t k = 0; k < N_INPUTS; k++)
            CHECK(c.seen[k].width >= LEAST_BLOCK && c.seen[k].n * c.seen[k].width >= columns[k]);
    }
}

/* Neither threads nor kernels show; another text does. */
static void test_calibration_bytes(void) {
    const kernel_set *sets[N_KERNEL_SETS];
    int n_sets = usable_kernels(sets);
    buffer one = {0}, other = {0};
    copy_fixture("llama-grouped");
    write_words(in_work("text.txt"), 3000);
    for (int i = 0; i < n_sets + 2; i++) {
        setenv("MEDRUN_KERNELS", i < n_sets ? sets[i]->name : sets[0]->name, 1);
        if (i > n_sets) write_words(in_work("text.txt"), 3000);
        CHECK_EQ(CALIBRATE("--threads", i % 2 ? "3" : "1"), 0);
        read_file(in_work("out/x.mdr"), i ? &other : &one);
        bool same = one.n && one.n == other.n && !memcmp(one.data, other.data, one.n);
        if (i) CHECK_EQ(same, i <= n_sets);
    }
    unsetenv("MEDRUN_KERNELS");
    clear_folder("out");
    buffer_free(&one), buffer_free(&other);
}

static void test_bad_calibration(void) {
    const char *text = in_work("text.txt");
    copy_fixture("llama-plain");
    write_words(text, 3000);
    expect(EXPORT("--calibrate", text), 2, "only for --type int4", "int8 by default");
    expect(EXPORT("--calibrate", text, "--type", "bf16"), 2, "only for --type int4", "bf16");
    expect(RUN("--tokenizer-only", in_work("src"), in_work("out/t.bin"), "--type", "int4",
               "--calibrate", text), 2, "only for", "a tokenizer");
    expect(EXPORT("--type", "int4", "--calibrate"), 2, "--calibrate: wanted a value", "no value");
    expect(EXPORT("--type", "int4", "--calibrate", in_work("none.txt")), 3, "none.txt: cannot open",
           "no file");
    expect(EXPORT("--type", "int4", "--calibrate", work), 3, "is a folder", "a folder");
    expect(EXPORT("--type", "int4", "--calibrate", "/dev/null"), 3, "not a regular", "a device");
    expect(RUN(in_work("src"), text, "--type", "int4", "--calibrate", text), 2, "of the source",
           "OUT is the text");
    write_file(text, "", 0);
    expect(CALIBRATE(NULL), 3, "is empty", "empty");
    write_words(text, 200);
    expect(CALIBRATE(NULL), 3, " tokens, wanted at least 512", "short");
    static const struct { const char *bytes; size_t n; const char *needle; } bad[] = {
        {"\x7f" "ELF\x02\x01\x01\x00", 8, "byte 3007:"}, {"\xff\xfe", 2, "byte 3000:"},
        {"\xed\xa0\x80", 3, "byte 3000:"}, {"\xc3", 1, "byte 3000:"}, {"\xc0\x80", 2, "byte 3000:"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint8_t bytes[3008];
        memset(bytes, 'a', 3000);
        memcpy(bytes + 3000, bad[i].bytes, bad[i].n);
        write_file(text, bytes, 3000 + bad[i].n);
        expect(CALIBRATE(NULL), 3, bad[i].needle, "not UTF-8");
    }
}

/* The second writing of matrices, and the text, stopped by a full disk, Ctrl-C, no memory. */
static void test_calibration_failures(void) {
    int failed = 0, stopped = 0, wrong = 0, code = 6, runs = 0;
    copy_fixture("llama-grouped");
    write_words(in_work("text.txt"), 3000);
    for (long at = 5; at < 700; at += 60) {
        fail_write_at = at;
        code = CALIBRATE("--threads", "2");
        wrong += code && (code != 1 || !strstr((const char *)errors.data, "No space left"));
        wrong += clear_folder("out") != (code == 0), failed += code == 1;
        signal_write_at = at;
        code = CALIBRATE("--threads", "2");
        wrong += code && (code != 130 || !strstr((const char *)errors.data, "interrupted"));
        wrong += clear_folder("out") != (code == 0), stopped += code == 130;
    }
    if (!CHECK(failed > 4 && failed < 12 && stopped > 4)) printf("    %d, %d\n", failed, stopped);
    code = 6;
    for (long i = 0; code && runs < 200; i += 1 + i / 5, runs++) {
        fail_alloc_at = i;
        if ((code = CALIBRATE("--threads", "2")) == 0) break;
        wrong += (code != 6 && code != 3 && code != 1) || clear_folder("out");
    }
    CHECK_EQ(wrong, 0);
    CHECK(code == 0 && runs > 20);
    clear_folder("out");
}

/* A dry run says what the text gives. Control tokens in it count; a long one is not read whole. */
static void test_calibration_plan(void) {
    buffer b = {0};
    copy_fixture("llama-plain");
    for (int i = 0; i < 600; i++) buffer_text(&b, "<|eot_id|>");
    write_file(in_work("text.txt"), b.data, b.n);
    CHECK_EQ(CALIBRATE("--dry-run"), 0);
    if (!CHECK(strstr(answer, "fitted to what 6"))) printf("%s\n", answer);
    CHECK_EQ(clear_folder("out"), 0);
    write_words(in_work("text.txt"), 900000);
    CHECK_EQ(CALIBRATE("--dry-run"), 0);
    CHECK(strstr(answer, "what 16384 tokens of a text gave"));
    buffer_free(&b);
}

/* ---- failures while writing ---------------------------------------------------------------- */

#define OLD "MEDRUN00"                  /* a checkpoint of long ago                              */

/* An existing OUT must be as it was, and no OUT.partial be left. */
static void expect_untouched(int found, int code, const char *needle) {
    buffer b = {0};
    read_file(in_work("out/x.mdr"), &b);
    const char *text = errors.n ? (const char *)errors.data : "";
    if (!CHECK(found == code && strstr(text, needle) && b.n == 8 && !memcmp(b.data, OLD, 8)))
        printf("    code %d, wanted %d: %s\n", found, code, text);
    CHECK_EQ(clear_folder("out"), 1);
    buffer_free(&b);
}

static void test_failures(void) {
    static const long at[] = {0, 1, 5, 30, 60};
    const char *src = in_work("src"), *out = in_work("out/x.mdr");
    copy_fixture("llama-plain");
    for (size_t i = 0; i < 5; i++) {
        write_file(out, OLD, 8);
        fail_write_at = at[i];
        expect_untouched(RUN(src, out, "--threads", "2"), 1, "No space left on device");
        write_file(out, OLD, 8);
        signal_write_at = at[i];
        expect_untouched(RUN(src, out, "--threads", "2"), 130, "interrupted");
    }
    write_file(out, OLD, 8);
    expect_untouched(run((const char *const[]){src, out, NULL}, 100000), 1, "cannot write");
    write_file(out, OLD, 8);
    int lock = open(in_work("out/x.mdr.partial"), O_RDWR | O_CREAT, 0600);
    CHECK(!flock(lock, LOCK_EX));
    int code = RUN(src, out);
    CHECK(!remove(in_work("out/x.mdr.partial")));
    close(lock);
    expect_untouched(code, 1, "another program is writing");
    write_file(out, OLD, 8);
    write_file(in_work("out/x.mdr.partial"), "half", 4);
    code = RUN(src, out);
    CHECK(!remove(in_work("out/x.mdr.partial")));
    expect_untouched(code, 1, "is left from a run that was stopped");
    for (int i = 0; i < 3; i++) {       /* somebody's own file, once more, and a link            */
        buffer b = {0};
        if (i == 2) must(!symlink(in_work("none"), out), "cannot link", out);
        else write_file(out, "a letter", 8);
        code = i == 1 ? RUN("--tokenizer-only", src, out) : RUN(src, out);
        CHECK(code == 2 && strstr((const char *)errors.data, i == 2 ? "is a symbolic link" :
              i == 1 ? "exists and is not a tokenizer.bin" : "exists and is not a checkpoint"));
        if (i < 2) read_file(out, &b);
        CHECK(i == 2 || (b.n == 8 && !memcmp(b.data, "a letter", 8)));
        CHECK_EQ(clear_folder("out"), 1);
        buffer_free(&b);
    }
    write_file(out, "a letter", 8);
    write_file(in_work("out/x.mdr.partial"), "half", 4);
    CHECK_EQ(RUN(src, out, "--force"), 0);
    CHECK_EQ(clear_folder("out"), 1);
    expect(RUN(src, in_work("none/x.mdr")), 1, "cannot write", "no folder for OUT");
    expect(RUN(src, work), 1, "found a folder", "OUT is a folder");
    expect(RUN(src, "/dev/null"), 1, "device", "OUT is a device");
    expect(RUN(src, in_work("src/model.safetensors")), 2, "file of the source", "OUT is a source");
    CHECK(access(in_work("src/model.safetensors"), F_OK) == 0);
    expect(RUN("--tokenizer-only", src, in_work("src/tokenizer.json")), 2, "source",
           "OUT is a source");
    expect(RUN("--tokenizer-only", src, "/dev/null"), 1, "device", "tokenizer to a device");
    fail_write_at = 0;
    expect(RUN("--tokenizer-only", src, out), 1, "No space left", "tokenizer: full disk");
    signal_write_at = 0;
    expect(RUN("--tokenizer-only", src, out), 130, "interrupted", "tokenizer: interrupted");
}

/* Ever later allocations fail: one line, nothing left, until there are no more. (Mostly code 6;
 * what cannot be read for lack of memory may be called malformed.) */
static void test_allocations(void) {
    int wrong = 0, runs = 0, code = 6;
    copy_fixture("llama-plain");
    for (long i = 0; code && runs < 200; i += 1 + i / 12, runs++) {
        fail_alloc_at = i;
        code = EXPORT("--threads", "2");
        if (code == 0) break;
        const char *line = errors.n ? strstr((const char *)errors.data, "medrun-export: ") : NULL;
        bool good = (code == 6 || code == 3 || code == 1) && line && !strchr(line, '\n')[1];
        if (clear_folder("out") || !good) {
            wrong++;
            printf("    allocation %ld: code %d: %s\n", i, code,
                   errors.n ? (const char *)errors.data : "");
        }
    }
    CHECK(wrong == 0 && code == 0 && runs > 20);
    clear_folder("out");
}

/* A sparse file that claims ten terabytes: refused before a byte is written. */
static void test_no_room(void) {
    buffer text = {0};
    uint64_t hidden = 65536, ffn = 1 << 20, vocab = 283, at = 0;
    const struct { const char *name; uint64_t rows, cols; } all[] = {
        {"input_layernorm", 0, hidden}, {"post_attention_layernorm", 0, hidden},
        {"self_attn.q_proj", 1024, hidden}, {"self_attn.k_proj", 1024, hidden},
        {"self_attn.v_proj", 1024, hidden}, {"self_attn.o_proj", hidden, 1024},
        {"mlp.gate_proj", ffn, hidden}, {"mlp.up_proj", ffn, hidden},
        {"mlp.down_proj", hidden, ffn}};
    copy_fixture("llama-plain");
    edit("config.json", "\"hidden_size\": 128", "\"hidden_size\": 65536, \"head_dim\": 512");
    edit("config.json", "\"intermediate_size\": 320", "\"intermediate_size\": 1048576");
    edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 24");
    for (int layer = 0; layer < 24; layer++)
        for (size_t i = 0; i < 9; i++) {
            uint64_t rows = all[i].rows ? all[i].rows : 1, end = at + 2 * rows * all[i].cols;
            buffer_printf(&text, "\"model.layers.%d.%s.weight\":{\"dtype\":\"BF16\",\"shape\":[",
                          layer, all[i].name);
            if (all[i].rows) buffer_printf(&text, "%llu,", (unsigned long long)rows);
            buffer_printf(&text, "%llu],\"data_offsets\":[%llu,%llu]},",
                          (unsigned long long)all[i].cols, (unsigned long long)at,
                          (unsigned long long)end);
            at = end;
        }
    buffer b = {0};
    buffer_text(&b, "{");
    buffer_add(&b, text.data, text.n);
    const char *const ends[] = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"};
    for (size_t i = 0; i < 3; i++) {
        uint64_t end = at + 2 * hidden * (i < 2 ? vocab : 1);
        buffer_printf(&b, "\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s65536],\"data_offsets\":[%llu,"
                      "%llu]}%s", ends[i], i < 2 ? "283," : "", (unsigned long long)at,
                      (unsigned long long)end, i < 2 ? "," : "}");
        at = end;
    }
    text.n = 0;
    write_le(&text, b.n, 8);
    buffer_add(&text, b.data, b.n);
    write_file(in_work("src/model.safetensors"), text.data, text.n);
    if (truncate(in_work("src/model.safetensors"), (off_t)(text.n + at)))
        SKIP("this file system holds no sparse file of ten terabytes");
    else expect(run((const char *const[]){in_work("src"), in_work("out/x.mdr"), NULL}, 1 << 20),
                SIZE_MAX > UINT32_MAX ? 1 : 2, SIZE_MAX > UINT32_MAX ? "MB free" : "of 32 bits",
                "no room");                             /* the limit: should the check be gone    */
    clear_folder("src");
    buffer_free(&text);
    buffer_free(&b);
}

/* ---- real data ----------------------------------------------------------------------------- */

static void test_manifest(const char *data) {
    char path[512];
    json_file f = {0};
    medrun_error e = {0};
    size_t n = 0, wrong = 0;
    buffer b = {0};
    snprintf(path, sizeof path, "%s/malformed/safetensors/MANIFEST.json", data);
    read_file(path, &b);
    if (!CHECK(b.n && !json_parse(&f.j, (const char *)b.data, b.n, &e))) return;
    snprintf(path, sizeof path, "%s/malformed/safetensors", data);
    for EACH(&f.j, 0, c) {
        source s = {.folder = path};
        medrun_error why = {0};
        shown name = show(&f.j, json_get(&f.j, c, "file"));
        int code = read_shard(&s, name.text, &why);
        bool accept = json_is(&f.j, json_get(&f.j, c, "expect"), "accept");
        if ((code == 0) != accept) wrong++, printf("    %s: %d %s\n", name.text, code, why.text);
        n++;
        close_source(&s);
    }
    CHECK(n > 20 && wrong == 0);
    json_free(&f.j);
    buffer_free(&b);
}

static void test_llama3(const char *data, const char *name) {
    char path[512];
    buffer b = {0}, ids = {0};
    tokenizer t;
    medrun_error e = {0};
    snprintf(path, sizeof path, "%s/tokenizers/%s", data, name);
    CHECK_EQ(RUN("--tokenizer-only", path, in_work("out/t.bin")), 0);
    read_file(in_work("out/t.bin"), &b);
    if (!CHECK(!tokenizer_open(&t, b.data, b.n, name, &e))) return;
    CHECK_EQ(t.vocab_size, 128256);
    CHECK_EQ(t.bos, 128000);
    CHECK(!tokenizer_encode(&t, "Hello world", 11, MEDRUN_ADD_BOS, &ids, &e) && ids.n == 12 &&
          !memcmp(ids.data, (int32_t[]){128000, 9906, 1917}, 12));
    tokenizer_close(&t);
    buffer_free(&b);
    buffer_free(&ids);
    clear_folder("out");
}

static void test_real_data(void) {
    const char *data = getenv("MEDRUN_TEST_DATA");
    if (!data) {
        SKIP("malformed safetensors and Llama-3 tokenizers: MEDRUN_TEST_DATA is not set");
        return;
    }
    test_manifest(data);
    test_llama3(data, "llama3-8b");
    test_llama3(data, "llama33-merges-as-pairs.tokenizer.json");
    static const char *const others[] = {"mistral-7b-v0.1.tokenizer.json",
                                         "tekken-ministral-8b-2410.tokenizer.json",
                                         "llama2.tokenizer.model"};
    for (size_t i = 0; i < 3; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/tokenizers/%s", data, others[i]);
        expect(RUN("--tokenizer-only", path, in_work("out/t.bin")), 0, "", others[i]);
    }
}

int main(void) {
    const char *slash = strrchr(__FILE__, '/'), *tmp = getenv("TMPDIR");
    signal(SIGINT, SIG_DFL);            /* a shell's job in the background has it ignored        */
    snprintf(fixtures, sizeof fixtures, "%.*sfixtures", slash ? (int)(slash - __FILE__) + 1 : 0,
             __FILE__);
    snprintf(work, sizeof work, "%s/medrun-export-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(work) || mkdir(in_work("src"), 0700) || mkdir(in_work("out"), 0700)) return 1;
    static const char *const names[] = {"llama-plain", "llama-tied", "llama-sharded",
                                        "llama-grouped"};
    static const char *const twins[] = {"MEDRUN_TYPE", "MEDRUN_TEMPLATE", "MEDRUN_NAME",
                                        "MEDRUN_PROOF", "MEDRUN_THREADS", "MEDRUN_DRY_RUN",
                                        "MEDRUN_CALIBRATE", "MEDRUN_KERNELS"};
    for (size_t i = 0; i < 8; i++) unsetenv(twins[i]);
    for (size_t i = 0; i < 4; i++) {
        test_good(names[i], "bf16", 1e-5);
        test_good(names[i], "int8", 0.1);
        test_good(names[i], "int4", 0.3);
    }
    test_header();
    test_same_bytes();
    test_source_types();
    test_vectors();
    test_smollm();
    test_chatml();
    test_spellings();
    test_jinja();
    test_forms();
    test_model();
    test_spaced_edits();
    test_normalized();
    test_added_piece();
    test_added_to_model();
    test_filled_up("llama-plain", "\"vocab_size\": 283");
    test_filled_up("mistral-spm", "\"vocab_size\": 384");
    test_edits();
    test_edited_json();
    test_families();
    test_files();
    test_weights();
    test_shards();
    test_flips();
    test_tokenizer_flips("llama-plain");
    test_tokenizer_flips("mistral-window");
    test_options();
    test_foreign();
    test_fingerprint();
    test_templates();
    if (getenv("MEDRUN_TEST_DATA")) test_published(getenv("MEDRUN_TEST_DATA"));
    else SKIP("MEDRUN_TEST_DATA is not set: other people's templates");
    test_proofs();
    test_reference();
    test_calibration();
    test_factor();
    test_kept_rows();
    test_moments();
    test_first_row();
    test_calibration_bytes();
    test_bad_calibration();
    test_calibration_failures();
    test_calibration_plan();
    test_failures();
    test_allocations();
    test_no_room();
    test_real_data();
    clear_folder("src"), clear_folder("out");
    remove(in_work("stdout")), remove(in_work("stderr")), remove(in_work("proof.json"));
    remove(in_work("text.txt"));
    remove(in_work("src")), remove(in_work("out"));
    CHECK(!remove(work));
    buffer_free(&errors);
    return report();
}
