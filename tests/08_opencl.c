/* A device against the processor, bit for bit: every architecture and type of weights, prompts and
 * generation, company, part of the layers, observers, files of sessions; and all that can be wrong
 * with a device. Runs on any OpenCL device (MEDRUN_TEST_DEVICE, 0), PoCL's for one. */
#if defined __has_include
#if __has_include(<CL/cl.h>) || __has_include(<OpenCL/cl.h>)
#define MEDRUN_OPENCL
#endif
#endif
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

#ifdef MEDRUN_OPENCL

static const char *const folders[] = {"llama-plain", "llama-tied", "llama-sharded",
                                      "llama-grouped", "mistral-window", "mistral-spm",
                                      "arcee-yarn", "arcee-yarn5", "apertus-plain",
                                      "apertus-grouped"};
static const char *const types[] = {"bf16", "int8", "int4"};
enum { N_FOLDERS = sizeof folders / sizeof *folders, CONTEXT = 320 };
static const char *device_name = "0";

static medrun_model *open_model(const char *folder, const char *type, bool on_device, int layers) {
    char path[256];
    const char *build = getenv("MEDRUN_TEST_BUILD");
    medrun_model *m;
    medrun_error e = {0};
    snprintf(path, sizeof path, "%s/%s-%s.mdr", build ? build : "build", folder, type);
    if (medrun_open(&m, path, &(medrun_options){.threads = 2}, &e) ||
        (on_device && medrun_attach(m, device_name, layers, &e)))
        printf("%s\n", e.text), exit(1);
    return m;
}

static medrun_session *start(const medrun_model *m, medrun_session_options o) {
    medrun_session *s;
    medrun_error e = {0};
    if (!o.context) o.context = CONTEXT;
    o.strict = true;
    if (medrun_start(&s, m, &o, NULL, 0, &e)) printf("%s\n", e.text), exit(1);
    return s;
}

static void feed(medrun_session *s, size_t n) {
    int failed = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = (int32_t)((medrun_length(s) * 31 + 7) % 260);
        failed += medrun_feed(s, &id, 1, NULL);
    }
    CHECK_EQ(failed, 0);
}

static void run(medrun_session *s) {
    medrun_error e = {0};
    while (medrun_pending(s) && !e.code) medrun_step(&s, 1, &e);
    if (!CHECK(!e.code)) printf("%s\n", e.text);
}

static bool same_logits(const medrun_session *a, const medrun_session *b, size_t rows) {
    size_t vocab = (size_t)a->model->config.vocab_size;
    for (size_t r = 0; r < rows; r++) {
        const float *x = medrun_logits(a, r), *y = medrun_logits(b, r);
        if (!x || !y || memcmp((const void *)x, (const void *)y, vocab * sizeof *x)) return false;
    }
    return true;
}

/* Prompts of several lengths in chunks, every row of logits of the last, then tokens one by one. */
static bool same_run(const medrun_model *cpu, const medrun_model *gpu, int batch, int kv,
                     size_t length) {
    int rows = batch < 16 ? batch : 16;
    medrun_session_options o = {.batch = batch, .kv = kv, .logit_rows = rows};
    medrun_session *a = start(cpu, o), *b = start(gpu, o);
    feed(a, length), feed(b, length);
    run(a), run(b);
    size_t last = length % (size_t)batch ? length % (size_t)batch : (size_t)batch;
    bool same = same_logits(a, b, last < (size_t)rows ? last : (size_t)rows);
    for (int i = 0; i < 3; i++) {
        feed(a, 1), feed(b, 1);
        run(a), run(b);
        same = same && same_logits(a, b, 1);
    }
    medrun_stop(a), medrun_stop(b);
    return same;
}

static void test_models(void) {
    static const struct { int batch, kv; size_t length; } runs[] = {
        {512, MEDRUN_KV_F16, 1}, {512, MEDRUN_KV_F32, 7}, {7, MEDRUN_KV_F16, 64},
        {512, MEDRUN_KV_F16, 300}, {100, MEDRUN_KV_F32, 300}};
    for (int f = 0; f < N_FOLDERS; f++)
        for (int t = 0; t < 3; t++) {
            medrun_model *cpu = open_model(folders[f], types[t], false, 0);
            medrun_model *gpu = open_model(folders[f], types[t], true, -1);
            CHECK(gpu->device->layers == gpu->config.n_layers && gpu->device->output);
            size_t same = 0, n = sizeof runs / sizeof *runs;
            for (size_t i = 0; i < n; i++)
                same += same_run(cpu, gpu, runs[i].batch, runs[i].kv, runs[i].length);
            if (!CHECK_EQ(same, n)) printf("%s %s\n", folders[f], types[t]);
            gpu->device->part_floats = (size_t)gpu->config.n_heads * 2 *
                                       ((size_t)gpu->config.head_dim + 2);
            CHECK(same_run(cpu, gpu, 512, MEDRUN_KV_F16, 300));     /* row by row                 */
            medrun_close(cpu), medrun_close(gpu);
        }
}

static void test_part(void) {
    for (int f = 2; f < N_FOLDERS; f += 3) {
        medrun_model *cpu = open_model(folders[f], "int8", false, 0);
        medrun_model *gpu = open_model(folders[f], "int8", true, 1);
        medrun_info info;
        medrun_describe(gpu, &info);
        CHECK(strstr(info.device, ": 1 of ") && !strstr(info.device, "logits"));
        CHECK(gpu->device->layers == 1 && !gpu->device->output);
        CHECK(same_run(cpu, gpu, 50, MEDRUN_KV_F16, 300));
        medrun_close(cpu), medrun_close(gpu);
    }
}

/* Three sessions of different lengths in each step. */
static void test_company(void) {
    medrun_model *cpu = open_model("mistral-window", "int8", false, 0);
    medrun_model *gpu = open_model("mistral-window", "int8", true, -1);
    medrun_session *a[3], *b[3];
    bool same = true;
    for (size_t i = 0; i < 3; i++) {
        a[i] = start(cpu, (medrun_session_options){0});
        b[i] = start(gpu, (medrun_session_options){0});
        feed(a[i], 1 + 40 * i), feed(b[i], 1 + 40 * i);
    }
    for (int round = 0; round < 4; round++) {
        for (size_t i = 0; i < 3; i++) run(a[i]);
        CHECK(!medrun_step(b, 3, NULL));
        for (size_t i = 0; i < 3; i++) {
            same = same && same_logits(a[i], b[i], 1);
            feed(a[i], 1 + i), feed(b[i], 1 + i);
        }
    }
    CHECK(same);
    for (size_t i = 0; i < 3; i++) medrun_stop(a[i]), medrun_stop(b[i]);
    medrun_close(cpu), medrun_close(gpu);
}

static void look(void *user, const char *stage, int layer, size_t rows, size_t cols, size_t stride,
                 const float *data) {
    (void)stage, (void)layer, (void)rows, (void)cols, (void)stride, (void)data;
    ++*(int *)user;
}

/* Caches wander between the device and here: an observer's passes, files, rewinding. */
static void test_wandering(int layers, int kv) {
    medrun_model *cpu = open_model("llama-sharded", "int8", false, 0);
    medrun_model *gpu = open_model("llama-sharded", "int8", true, layers);
    medrun_session_options o = {.kv = kv};
    medrun_session *a = start(cpu, o), *b = start(gpu, o), *c = start(gpu, o);
    char path[256];
    const char *build = getenv("MEDRUN_TEST_BUILD");
    int seen = 0;
    snprintf(path, sizeof path, "%s/opencl.state", build ? build : "build");
    feed(a, 37), feed(b, 37), run(a), run(b);
    medrun_observe(b, look, &seen);
    feed(a, 5), feed(b, 5), run(a), run(b);
    CHECK(seen > 20 && same_logits(a, b, 1));
    medrun_observe(b, NULL, NULL);
    feed(a, 20), feed(b, 20), run(a), run(b);
    CHECK(same_logits(a, b, 1));
    CHECK(!medrun_rewind(a, 40, NULL) && !medrun_rewind(b, 40, NULL));
    feed(a, 10), feed(b, 10), run(a), run(b);
    CHECK(same_logits(a, b, 1));
    CHECK(!medrun_save(b, path, NULL) && !medrun_restore(c, path, NULL));
    feed(a, 3), feed(c, 3), run(a), run(c);
    CHECK(same_logits(a, c, 1));
    CHECK(!medrun_save(a, path, NULL) && !medrun_restore(c, path, NULL));
    feed(a, 3), feed(c, 3), run(a), run(c);
    CHECK(same_logits(a, c, 1));
    remove(path);
    medrun_stop(a), medrun_stop(b), medrun_stop(c);
    medrun_close(cpu), medrun_close(gpu);
}

/* Guessing ahead gives the same ids. */
static void test_lookup(void) {
    medrun_model *cpu = open_model("llama-plain", "int8", false, 0);
    medrun_model *gpu = open_model("llama-plain", "int8", true, -1);
    medrun_session *a = start(cpu, (medrun_session_options){0});
    medrun_session *b = start(gpu, (medrun_session_options){.lookup = 8});
    const char *text;
    size_t n;
    int same = 0;
    feed(a, 20), feed(b, 20);
    for (int i = 0; i < 60; i++) {
        int32_t one = -1, two = -2;
        medrun_next(a, &one, &text, &n, NULL);
        medrun_next(b, &two, &text, &n, NULL);
        same += one == two;
    }
    CHECK_EQ(same, 60);
    medrun_stop(a), medrun_stop(b);
    medrun_close(cpu), medrun_close(gpu);
}

/* ---- what can be wrong ---------------------------------------------------------------------- */

/* Attaching with VARIABLE=VALUE must fail with a line that has WORDS; the model works on. */
static void refused(const char *variable, const char *value, const char *name, const char *words,
                    int code) {
    medrun_model *m = open_model("llama-plain", "int8", false, 0);
    medrun_error e = {0};
    medrun_info info;
    setenv(variable, value, 1);
    CHECK_EQ(medrun_attach(m, name, -1, &e), code);
    unsetenv(variable);
    if (!CHECK(strstr(e.text, words) != NULL)) printf("%s\n", e.text);
    medrun_describe(m, &info);
    CHECK(!*info.device && !m->device);
    CHECK(!*info.device_log == !strstr(words, "built"));
    medrun_session *s = start(m, (medrun_session_options){0});
    feed(s, 3), run(s);
    CHECK(medrun_logits(s, 0) != NULL);
    medrun_stop(s);
    medrun_close(m);
}

static void test_refusals(void) {
    enum { NONE = MEDRUN_USAGE, UNABLE = MEDRUN_NO_MEMORY };
    const char *options = "MEDRUN_OPENCL_OPTIONS";
    refused("MEDRUN_OPENCL_LIBRARY", "./no-such-library.so", "0", "no OpenCL library", NONE);
    refused("MEDRUN_OPENCL_LIBRARY", "libm.so.6", "0", "has no cl", NONE);
    refused("MEDRUN_TEST", "", "99", "found no \"99\"", NONE);
    refused("MEDRUN_TEST", "", "no such name", "found no", NONE);
    refused("MEDRUN_DEVICE_MEMORY", "1", device_name, "1 MB are not enough", UNABLE);
    refused(options, "-D norm=+", device_name, "cannot be built", UNABLE);
    refused(options, "-D get_global_size=get_local_size", device_name, "off the", UNABLE);
}

/* Kernels for devices that divide carelessly: here their division is exact, and corrected too. */
static void test_corrected(void) {
    medrun_model *cpu = open_model("apertus-plain", "int8", false, 0);
    setenv("MEDRUN_OPENCL_OPTIONS", "-D CORRECTED", 1);
    medrun_model *gpu = open_model("apertus-plain", "int8", true, -1);
    unsetenv("MEDRUN_OPENCL_OPTIONS");
    CHECK(same_run(cpu, gpu, 512, MEDRUN_KV_F16, 300));
    medrun_close(cpu), medrun_close(gpu);
}

/* Memory: layers that do not fit stay here; a context that does not is refused. */
static void test_memory(void) {
    medrun_model *m = open_model("llama-sharded", "int8", true, -1);
    medrun_error e = {0};
    medrun_session *s;
    uint64_t room = device_room(&m->device->facts), used = room - m->device->room;
    medrun_close(m);
    m = open_model("llama-sharded", "int8", false, 0);
    char least[32];
    int before = -1, layers = 0, grew = 0;
    for (uint64_t mb = used >> 20; mb && mb < (used >> 20) + 4; mb++) {
        snprintf(least, sizeof least, "%llu", (unsigned long long)mb);
        setenv("MEDRUN_DEVICE_MEMORY", least, 1);
        layers = medrun_attach(m, device_name, -1, NULL) ? 0 : m->device->layers;
        grew += layers > before, before = layers;
        if (!layers) continue;
        medrun_session wanted = {.model = m, .options = {.context = 512}};
        size_t n = cache_bytes(&wanted, layers, 0);
        m->device->room = n;                            /* for the keys, and not for the values  */
        CHECK_EQ(medrun_start(&s, m, &(medrun_session_options){.context = 512}, NULL, 0, &e),
                 MEDRUN_NO_MEMORY);
        CHECK(strstr(e.text, "MB of device") && m->device->room == n);
        medrun_close(m);
        m = open_model("llama-sharded", "int8", false, 0);
    }
    unsetenv("MEDRUN_DEVICE_MEMORY");
    CHECK(grew >= 2 && layers == 3);
    medrun_close(m);
}

static void test_errors(void) {
    medrun_model *m = open_model("llama-plain", "bf16", true, -1);
    medrun_session *s;
    medrun_error e = {0};
    CHECK_EQ(medrun_attach(m, device_name, -1, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_start(&s, m, &(medrun_session_options){.kv = MEDRUN_KV_INT8}, NULL, 0, &e),
             MEDRUN_USAGE);
    CHECK(!medrun_start(&s, m, &(medrun_session_options){.batch = 4000}, NULL, 0, NULL));
    CHECK(s->options.strict && s->options.batch <= DEVICE_ROWS);
    feed(s, 3), run(s);
    e = (medrun_error){0};
    device_ok(m->device, -5, "a call");                 /* as when a device is lost              */
    feed(s, 1);
    CHECK_EQ(medrun_step(&s, 1, &e), MEDRUN_FAILED);
    CHECK(strstr(e.text, "a call failed (-5)") && medrun_pending(s) == 1);
    CHECK_EQ(medrun_save(s, "build/none", NULL), MEDRUN_FAILED);
    medrun_stop(s);
    medrun_close(m);
}

/* PoCL keeps a few bytes of every kernel. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

int main(void) {
    opencl cl;
    device_facts all[MAX_DEVICES];
    medrun_error e = {0};
    if (getenv("MEDRUN_TEST_DEVICE")) device_name = getenv("MEDRUN_TEST_DEVICE");
    if (opencl_open(&cl, &e)) return SKIP(e.text), report();
    int n = list_devices(&cl, all);
    if (!n) return SKIP("OpenCL has no device here"), report();
    test_models();
    test_part();
    test_company();
    test_wandering(-1, MEDRUN_KV_F16);
    test_wandering(1, MEDRUN_KV_F32);
    test_lookup();
    test_corrected();
    test_memory();
    test_errors();
    test_refusals();
    return report();
}

#else
int main(void) {
    SKIP("no OpenCL headers (opencl-headers)");
    return report();
}
#endif
