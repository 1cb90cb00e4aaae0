/* Files: what is refused, and what a writer leaves alone.
 * Checkpoints as strangers send them: cut anywhere, any header byte flipped, and headers that are
 * well signed but lie. All are refused with code 3 and one line; none crashes. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"
#ifndef _WIN32
#include <sys/resource.h>
#endif

static char source[256], file[256];
static uint8_t *whole;
static size_t n_whole, header_bytes;

static void write_file(const uint8_t *bytes, size_t n) {
    FILE *f = fopen(file, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) { perror(file); exit(1); }
}

/* Is the file refused as it should be? */
static bool refused(medrun_error *e) {
    medrun_model *m = NULL;
    *e = (medrun_error){0};
    int code = medrun_open(&m, file, &(medrun_options){.threads = 1}, e);
    if (!code) medrun_close(m);
    return code == MEDRUN_BAD_FILE && !m && e->text[0] && !strchr(e->text, '\n');
}

#ifndef O_BINARY
#define O_BINARY 0
#endif
static void put_byte(int fd, size_t at, uint8_t byte) {
    if (lseek(fd, (off_t)at, SEEK_SET) < 0 || write(fd, &byte, 1) != 1) exit(1);
}

static void test_cuts(void) {
    int wrong = 0, cuts = 0;
    medrun_error e;
    write_file(whole, n_whole);
    size_t tail = n_whole - 5000;
    for (size_t n = n_whole - 1; n > 0; n -= n > tail ? 7 : n > header_bytes + 8192 ? 1499 : 3, cuts++) {
        if (truncate(file, (off_t)n)) exit(1);
        wrong += !refused(&e);
        if (n <= 3) break;
    }
    write_file(whole, 0);
    wrong += !refused(&e);
    CHECK(cuts > 1000);
    CHECK_EQ(wrong, 0);
    uint8_t *longer = calloc(1, n_whole + 5000);
    memcpy(longer, whole, n_whole);
    for (size_t more = 1; more <= 5000; more += 1249) {
        write_file(longer, n_whole + more);
        CHECK(refused(&e));
    }
    free(longer);
}

static void test_flips(void) {
    int wrong = 0;
    medrun_error e;
    write_file(whole, n_whole);
    int fd = open(file, O_RDWR | O_BINARY);
    for (size_t i = 0; i < PREAMBLE + header_bytes + 32 + 300; i++) {
        uint8_t bad = (uint8_t)(whole[i] ^ 1 << i % 8);
        if (i >= PREAMBLE + header_bytes + 32 && i % 4096 == 0) continue;
        put_byte(fd, i, bad);
        bool section = i >= round_up(PREAMBLE + header_bytes + 32, FILE_ALIGN);
        wrong += !section && !refused(&e);              /* weights are for `verify`              */
        put_byte(fd, i, whole[i]);
    }
    CHECK_EQ(wrong, 0);
    /* the tokenizer's bytes are hashed at each open */
    for (size_t i = n_whole - 1; i > n_whole - 2000; i -= 37) {
        uint8_t bad = whole[i] ^ 0x10;
        put_byte(fd, i, bad);
        wrong += !refused(&e);
        put_byte(fd, i, whole[i]);
    }
    CHECK_EQ(wrong, 0);
    medrun_model *m;
    CHECK(!medrun_open(&m, file, NULL, NULL));          /* and it is whole again                 */
    medrun_close(m);
    close(fd);
}

/* Writes the checkpoint with OLD replaced by NEW (no longer) in the header, properly signed. */
static void lie(const char *old, const char *new) {
    uint8_t *copy = malloc(n_whole);
    memcpy(copy, whole, n_whole);
    char *header = (char *)copy + PREAMBLE, *at = NULL;
    size_t n = strlen(old);
    for (size_t i = 0; i + n <= header_bytes && !at; i++)
        if (!memcmp(header + i, old, n)) at = header + i;
    if (!at || strlen(new) > n) { printf("no \"%s\" in the header\n", old); exit(1); }
    memset(at, ' ', n);
    memcpy(at, new, strlen(new));
    sha256_of(copy, PREAMBLE + header_bytes, copy + PREAMBLE + header_bytes);
    write_file(copy, n_whole);
    free(copy);
}

static void test_lies(void) {
    static const struct { const char *old, *new, *says; } lies[] = {
        {"\"format\":1", "\"format\":2", "format"},
        {"\"format\":1", "\"format\":[", "JSON"},
        {"\"architecture\":\"llama\"", "\"architecture\":\"lla\"", "architecture"},
        {"\"n_layers\":2", "\"n_layers\":3", "tensor"},
        {"\"n_layers\":2", "\"n_layers\":1", "tensor"},
        {"\"n_layers\":2", "\"n_layers\":0", "n_layers"},
        {"\"n_layers\":2", "\"n_layers\":\"", "JSON"},
        {"\"n_heads\":8", "\"n_heads\":7", "n_heads"},
        {"\"n_kv_heads\":2", "\"n_kv_heads\":4", "tensor"},
        {"\"head_dim\":64", "\"head_dim\":63", "head_dim"},
        {"\"head_dim\":64", "\"head_dim\":-4", "head_dim"},
        {"\"vocab_size\":269", "\"vocab_size\":270", "embed"},
        {"\"vocab_size\":269", "\"vocab_size\":1e9", "vocab_size"},
        {"\"hidden_size\":80", "\"hidden_size\":64", "embed"},
        {"\"rope_theta\":250000", "\"rope_theta\":null", "rope_theta"},
        {"\"rope_theta\":250000", "\"rope_theta\":1e300", "rope_theta"},
        {"\"rope_theta\":250000", "\"rope_theta\":-3", "rope_theta"},
        {"\"activation\":\"silu\"", "\"activation\":\"gelu\"", "activation"},
        {"\"type\":\"none\"", "\"type\":\"yarn\"", "field factor: found nothing"},
        {"\"type\":\"none\"", "\"type\":\"nine\"", "rope_scaling"},
        {"\"activation\":\"silu\"", "\"activation\":\"relu\"", "activation"},
        {"\"type\":\"int8\"", "\"type\":\"int3\"", "type"},
        {"\"tied\":false", "\"tied\":true ", "more than the config needs"},
        {"\"tied\":false", "\"tied\":0    ", "tied"},
        {"\"template\":\"llama3\"", "\"template\":\"llama9\"", "template"},
        {"\"stop_ids\":[", "\"stop_ids\":{", "JSON"},
        {"\"temperature\":", "\"temperatura\":", "temperature"},
        {"\"name\":\"embed\"", "\"name\":\"umbed\"", "embed"},
        {"\"offset\":", "\"uffset\":", "offset"},
        {"\"tokenizer\":", "\"takenizer\":", "tokenizer"},
        {"\"tensors\":", "\"tensars\":", "tensors"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        medrun_error e;
        if (strlen(lies[i].new) > strlen(lies[i].old)) continue;
        lie(lies[i].old, lies[i].new);
        if (!CHECK(refused(&e)) || !CHECK(strstr(e.text, lies[i].says)))
            printf("    %s -> %s: %s\n", lies[i].old, lies[i].new, e.text);
    }
}

/* Signed headers with random damage: refused or, if the damage is harmless, used. */
static void test_noise(void) {
    uint8_t *copy = malloc(n_whole);
    int accepted = 0;
    for (int round = 0; round < 3000; round++) {
        memcpy(copy, whole, round ? PREAMBLE + header_bytes + 32 : n_whole);
        for (uint64_t hits = 1 + test_random() % 4; hits; hits--) {
            size_t at = PREAMBLE + test_random() % header_bytes;
            uint64_t kind = test_random();
            copy[at] = kind % 3 == 0 ? (uint8_t)(kind >> 8)
                     : kind % 3 == 1 ? (uint8_t)('0' + kind / 8 % 10) : copy[at - 1];
        }
        sha256_of(copy, PREAMBLE + header_bytes, copy + PREAMBLE + header_bytes);
        int fd = open(file, round ? O_WRONLY : O_WRONLY | O_CREAT | O_TRUNC, 0600);
        size_t n = round ? PREAMBLE + header_bytes + 32 : n_whole;
        if (fd < 0 || write(fd, copy, n) != (ssize_t)n || close(fd)) exit(1);
        medrun_model *m = NULL;
        medrun_error e = {0};
        int code = medrun_open(&m, file, &(medrun_options){.threads = 1}, &e);
        if (code) CHECK(code == MEDRUN_BAD_FILE && e.text[0]);
        else accepted++, medrun_close(m);
    }
    printf("noise: %d of 3000 damaged headers still opened\n", accepted);
    CHECK(accepted < 3000);
    free(copy);
}

/* ---- files that are written ----------------------------------------------------------------- */

static const file_kind note_kind = {"a saved note", "NOTE1", false, false, 0};
static const file_kind secret_kind = {"a saved secret", "NOTE1", true, false, 0};
static const file_kind bare_kind = {"to be overwritten", NULL, false, false, 0};

static char place[300], beside[320], victim[300];

static void put_text(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(text, 1, strlen(text), f) != strlen(text) || fclose(f)) exit(1);
}

/* Does PATH hold TEXT and nothing more? NULL: nothing is there. */
static bool holds(const char *path, const char *text) {
    char found[64] = "";
    FILE *f = fopen(path, "rb");
    if (!f) return !text;
    size_t n = fread(found, 1, sizeof found - 1, f);
    fclose(f);
    return text && n == strlen(text) && !memcmp(found, text, n);
}

static int write_note(const file_kind *kind, bool force, const char *text, medrun_error *e) {
    file_writer w;
    *e = (medrun_error){0};
    if (!writer_open(&w, place, kind, force, e)) fputs(text, w.f);
    return writer_done(&w, e);
}

static void test_writer(void) {
    medrun_error e;
    CHECK_EQ(write_note(&note_kind, false, "NOTE1 one", &e), MEDRUN_OK);
    CHECK(holds(place, "NOTE1 one") && holds(beside, NULL));
    CHECK_EQ(write_note(&note_kind, false, "NOTE1 two", &e), MEDRUN_OK);        /* its own       */
    CHECK(holds(place, "NOTE1 two") && holds(beside, NULL));
    CHECK_EQ(write_note(&bare_kind, false, "NOTE1 three", &e), MEDRUN_USAGE);   /* has no mark   */
    CHECK(strstr(e.text, " exists and is not to be overwritten") && holds(place, "NOTE1 two"));
    static const char *const foreign[] = {"NOTE", "NOTE2", "a letter", "\nNOTE1"};
    for (size_t i = 0; i < 4; i++) {
        put_text(place, foreign[i]);
        CHECK_EQ(write_note(&note_kind, false, "NOTE1", &e), MEDRUN_USAGE);
        CHECK(strstr(e.text, " exists and is not a saved note") && strstr(e.text, place));
        CHECK(holds(place, foreign[i]) && holds(beside, NULL));
    }
    CHECK_EQ(write_note(&note_kind, true, "NOTE1 by force", &e), MEDRUN_OK);
    CHECK(holds(place, "NOTE1 by force"));
    put_text(place, "");                                                /* holds nothing        */
    CHECK_EQ(write_note(&bare_kind, false, "x", &e), MEDRUN_OK);
    CHECK(holds(place, "x"));
}

/* What happens when a writer stops half way, and when there are two. */
static void test_writer_fails(void) {
    file_writer a, b;
    medrun_error e = {0}, other = {0};
    put_text(place, "NOTE1 old");
    CHECK(!writer_open(&a, place, &note_kind, false, &e) && !holds(beside, NULL));
    CHECK_EQ(writer_open(&b, place, &note_kind, false, &other), MEDRUN_FAILED);
    CHECK(strstr(other.text, beside) && strstr(other.text, "another program"));
    writer_drop(&b);
    CHECK(!holds(beside, NULL));                        /* that of the first is still there     */
    fputs("NOTE1 new", a.f);
    CHECK(holds(place, "NOTE1 old"));
    CHECK(!writer_done(&a, &e) && holds(place, "NOTE1 new") && holds(beside, NULL));
    CHECK(!writer_open(&a, place, &note_kind, false, &e));
    fputs("NOTE1 half", a.f);
    fail(&e, MEDRUN_NO_MEMORY, "what was to be written could not be made");
    CHECK_EQ(writer_done(&a, &e), MEDRUN_NO_MEMORY);
    CHECK(holds(place, "NOTE1 new") && holds(beside, NULL));
    CHECK_EQ(writer_open(&a, place, &note_kind, false, &e), MEDRUN_NO_MEMORY);  /* kept          */
    CHECK_EQ(writer_done(&a, &e), MEDRUN_NO_MEMORY);
    CHECK(holds(place, "NOTE1 new") && holds(beside, NULL));
    e = (medrun_error){0};
    CHECK(!writer_open(&a, place, &note_kind, false, &e));
    writer_drop(&a);
    CHECK(holds(place, "NOTE1 new") && holds(beside, NULL));
    static const char *const bad[] = {".", "no such folder/x"};
    for (size_t i = 0; i < 2; i++) {
        e = (medrun_error){0};
        CHECK_EQ(writer_open(&a, bad[i], &note_kind, true, &e), MEDRUN_FAILED);
        CHECK(strstr(e.text, ": cannot write: "));
    }
}

#ifndef _WIN32
static int folders_synced;

/* Stands before the C library's. Counts folders, whose new name must be there by then. */
int fsync(int fd) {
    struct stat st;
    folders_synced += !fstat(fd, &st) && S_ISDIR(st.st_mode) && holds(place, "NOTE1 kept");
    return 0;
}

/* A crash of the machine must not take the name of a file that is said to be safe. */
static void test_synced(void) {
    medrun_error e;
    CHECK(!write_note(&note_kind, true, "NOTE1 kept", &e) && folders_synced == 1);
    CHECK(!write_note(&secret_kind, true, "NOTE1 kept", &e) && folders_synced == 2);
    folders_synced = 0;
}

static void test_links(void) {
    medrun_error e;
    struct stat st;
    put_text(victim, "NOTE1 of a patient");             /* even one of the right kind           */
    unlink(place);
    if (symlink(victim, place)) exit(1);
    CHECK_EQ(write_note(&note_kind, false, "NOTE1", &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "symbolic link") && holds(beside, NULL));
    CHECK_EQ(write_note(&note_kind, true, "NOTE1 mine", &e), MEDRUN_OK);
    CHECK(!lstat(place, &st) && S_ISREG(st.st_mode) && holds(place, "NOTE1 mine"));
    CHECK(holds(victim, "NOTE1 of a patient"));
    if (symlink(victim, beside)) exit(1);               /* laid where the file is written       */
    CHECK_EQ(write_note(&note_kind, false, "NOTE1 new", &e), MEDRUN_FAILED);
    CHECK(holds(victim, "NOTE1 of a patient") && holds(place, "NOTE1 mine"));
    unlink(beside), unlink(place), unlink(victim);
    if (symlink(victim, place)) exit(1);                /* to nothing, yet                      */
    CHECK_EQ(write_note(&note_kind, false, "NOTE1", &e), MEDRUN_USAGE);
    CHECK(holds(victim, NULL));
    unlink(place);
    mode_t mask = umask(0);                             /* who may read it, by its kind         */
    put_text(place, "NOTE1 for all");
    CHECK(!write_note(&secret_kind, false, "NOTE1", &e));
    CHECK(!stat(place, &st) && (st.st_mode & 0777) == 0600);
    CHECK(!write_note(&note_kind, false, "NOTE1", &e));
    CHECK(!stat(place, &st) && (st.st_mode & 0777) == 0666);
    umask(mask);
    CHECK_EQ(writer_open(&(file_writer){0}, "/dev/null", &note_kind, true, &e), MEDRUN_FAILED);
    CHECK(strstr(e.text, "not a regular file"));
}

/* A disk that is full leaves the old file. */
static void test_full_disk(void) {
    struct rlimit limit, tight;
    medrun_error e = {0};
    file_writer w;
    put_text(place, "NOTE1 old");
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    tight = limit, tight.rlim_cur = 10000;
    setrlimit(RLIMIT_FSIZE, &tight);
    CHECK(!writer_open(&w, place, &note_kind, false, &e));
    for (int i = 0; i < 20000; i++) fputc('x', w.f);
    CHECK_EQ(writer_done(&w, &e), MEDRUN_FAILED);
    setrlimit(RLIMIT_FSIZE, &limit);
    CHECK(strstr(e.text, "cannot write: ") && strstr(e.text, "large"));
    CHECK(holds(place, "NOTE1 old") && holds(beside, NULL));
}
#endif

int main(void) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    file_map map;
    medrun_error e = {0};
    snprintf(source, sizeof source, "%s/llama-grouped-int8.mdr", build ? build : "build");
    snprintf(file, sizeof file, "%s/hostile.mdr", build ? build : "build");
    if (map_file(source, &map, &e)) { printf("%s\n", e.text); return 1; }
    whole = malloc(n_whole = map.n);
    memcpy(whole, map.data, n_whole);
    unmap_file(&map);
    uint64_t length;
    memcpy(&length, whole + 8, 8);
    header_bytes = (size_t)length;
    test_cuts();
    test_flips();
    test_lies();
    test_noise();
    remove(file);
    snprintf(place, sizeof place, "%s/writer.note", build ? build : "build");
    snprintf(beside, sizeof beside, "%s.partial", place);
    snprintf(victim, sizeof victim, "%s/writer.victim", build ? build : "build");
    remove(place), remove(beside);
    CHECK(is_written(beside));                  /* gone between two looks: somebody finished it  */
    test_writer();
    test_writer_fails();
#ifndef _WIN32
    test_synced();
    test_links();
    test_full_disk();
#endif
    remove(place);
    free(whole);
    return report();
}
