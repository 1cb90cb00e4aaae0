/* Tests of sections 2 and 3: errors, memory, bounded reading, UTF-8, SHA-256, JSON. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "../tools/read.c"
#include "../tools/write.c"
#include "test.h"
#include <dirent.h>
#include <locale.h>

/* ---- errors and memory --------------------------------------------------------------------- */

static void test_errors(void) {
    medrun_error e = {0};
    CHECK_EQ(fail(&e, MEDRUN_BAD_FILE, "%s: %d", "first", 7), MEDRUN_BAD_FILE);
    CHECK_EQ(e.code, MEDRUN_BAD_FILE);
    CHECK(!strcmp(e.text, "first: 7"));
    CHECK_EQ(fail(&e, MEDRUN_FAILED, "second"), MEDRUN_FAILED);     /* the first one is kept */
    CHECK_EQ(e.code, MEDRUN_BAD_FILE);
    CHECK(!strcmp(e.text, "first: 7"));
    CHECK_EQ(fail(NULL, MEDRUN_USAGE, "nobody listens"), MEDRUN_USAGE);

    e = (medrun_error){0};
    fail(&e, MEDRUN_FAILED, "a\nb\x1b[31mc\x7f\td");
    CHECK(!strcmp(e.text, "a?b?[31mc??d"));
    e = (medrun_error){0};
    fail(&e, MEDRUN_FAILED, "%0700d", 1);
    CHECK_EQ(strlen(e.text), sizeof e.text - 1);
    e = (medrun_error){0};
    CHECK_EQ(out_of_memory(&e, 12345), MEDRUN_NO_MEMORY);
    CHECK(strstr(e.text, "12345") != NULL);
    for (int code = MEDRUN_FAILED; code <= MEDRUN_BAD_FILE; code++) {   /* and so whatever failed */
        e = (medrun_error){0};
        errno = ENOMEM;
        CHECK_EQ(cannot(&e, code, "x", "open"), MEDRUN_NO_MEMORY);
        CHECK_EQ(e.code, MEDRUN_NO_MEMORY);
        e = (medrun_error){0};
        errno = ENOENT;
        CHECK_EQ(cannot(&e, code, "x", "open"), code);
        CHECK(!strcmp(e.text, "x: cannot open: No such file or directory"));
    }
}

static void test_new_array(void) {
    CHECK(mul_overflows(SIZE_MAX / 2 + 1, 2) && mul_overflows(2, SIZE_MAX / 2 + 1));
    CHECK(!mul_overflows(SIZE_MAX / 2, 2) && !mul_overflows(SIZE_MAX, 1));
    CHECK(!mul_overflows(SIZE_MAX, 0) && !mul_overflows(0, SIZE_MAX));
    CHECK(new_array(SIZE_MAX / 2 + 1, 2) == NULL);
    CHECK(new_array((size_t)1 << (sizeof(size_t) * 4), (size_t)1 << (sizeof(size_t) * 4)) == NULL);
    for (size_t n = 0; n < 40; n += 13) {
        uint8_t *p = new_array(n, 3);
        bool zero = p != NULL;
        for (size_t i = 0; zero && i < 3 * n; i++) zero = p[i] == 0;
        CHECK(zero);
        free(p);
    }
}

static void test_buffer(void) {
    buffer b = {0};
    buffer_add(&b, "", 0);
    CHECK(b.n == 0 && b.data == NULL && !b.failed);
    int wrong = 0;
    for (size_t n = 0; n < 700; n++) {                  /* pieces of growing length, all kept    */
        uint8_t piece[700];
        memset(piece, (int)(n % 251), n);
        buffer_add(&b, piece, n);
        wrong += b.n && b.data[b.n] != 0;
    }
    CHECK_EQ(b.n, 699 * 700 / 2);
    for (size_t n = 0, at = 0; n < 700; at += n++)
        for (size_t i = 0; i < n; i++) wrong += b.data[at + i] != n % 251;
    CHECK_EQ(wrong, 0);
    CHECK(b.cap > b.n && b.cap <= 2 * b.n + 64);
    buffer_free(&b);
    CHECK(b.data == NULL && b.n == 0 && b.cap == 0);
    for (int i = 0; i < 300; i++) {                     /* room for the NUL, also when just full */
        buffer_add(&b, "x", 1);
        wrong += b.cap <= b.n || b.data[b.n] != 0;
    }
    CHECK_EQ(wrong, 0);
    buffer_free(&b);

    for (int n = 0; n < 600; n++) {                     /* printf around its 256 bytes on stack  */
        buffer_text(&b, "<");
        buffer_printf(&b, "%*s", n, "x");
        buffer_text(&b, ">");
        size_t len = n < 1 ? 1 : (size_t)n;
        wrong += b.n != len + 2 || b.data[len] != 'x' || b.data[len + 1] != '>' || b.data[0] != '<';
        wrong += strlen((char *)b.data) != b.n;
        buffer_free(&b);
    }
    CHECK_EQ(wrong, 0);

    buffer_text(&b, "kept");
    CHECK(!buffer_room(&b, SIZE_MAX) && b.failed);      /* no wrap-around                        */
    buffer_text(&b, "dropped");
    buffer_printf(&b, "%d", 5);
    CHECK(b.failed && b.n == 4 && !memcmp(b.data, "kept", 5));
    buffer_free(&b);
    CHECK(!b.failed);
}

static void test_reader(void) {
    const uint8_t bytes[11] = {1, 2, 3, 4, 5, 6, 7, 8, 0xFE, 0xFF, 9};
    reader r = {bytes, sizeof bytes, 0, false};
    CHECK_EQ((uint32_t)read_le(&r, 4), 0x04030201);
    CHECK(read_bytes(&r, 0) == bytes + 4 && !r.failed);
    CHECK_EQ(read_le(&r, 3), 0x070605);
    CHECK(read_bytes(&r, 4) == bytes + 7 && r.at == 11);
    CHECK(!r.failed && read_le(&r, 1) == 0 && r.failed);
    CHECK(read_u64(&r) == 0 && r.at == 11);
    r = (reader){bytes, sizeof bytes, 2, false};
    CHECK_EQ(read_u64(&r), (long long)0xFFFE080706050403);
    r = (reader){bytes, sizeof bytes, 4, false};
    CHECK(read_u64(&r) == 0 && r.failed);               /* one byte short                        */
    CHECK(read_bytes(&r, 0) == NULL);                   /* and failed for good                   */
    r = (reader){bytes, sizeof bytes, 4, false};
    CHECK(read_bytes(&r, SIZE_MAX) == NULL && r.failed);
    CHECK(read_bytes(&(reader){bytes, 0, 0, false}, 1) == NULL);

    buffer b = {0};
    for (size_t n = 1; n <= 8; n++) write_le(&b, 0x1122334455667788, n);
    r = (reader){b.data, b.n, 0, false};
    int wrong = 0;
    for (size_t n = 1; n <= 8; n++)
        wrong += read_le(&r, n) != (0x1122334455667788 & (UINT64_MAX >> (64 - 8 * n)));
    CHECK(!wrong && !r.failed && r.at == b.n && b.data[0] == 0x88 && b.data[1] == 0x88);
    buffer_free(&b);
}

/* ---- SHA-256 ------------------------------------------------------------------------------- */

static bool sha256_is(const void *bytes, size_t n, const char *wanted) {
    uint8_t digest[32];
    char hex[65];
    sha256_of(bytes, n, digest);
    hex_of(digest, hex);
    return !strcmp(hex, wanted);
}

/* FIPS 180-4's examples, then lengths around a block's end with digests from Python's hashlib. */
static void test_sha256(void) {
    CHECK(sha256_is("", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"));
    CHECK(sha256_is("abc", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"));
    CHECK(sha256_is("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56,
                    "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"));
    CHECK(sha256_is("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnop"
                    "jklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu", 112,
                    "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"));
    static const struct { size_t n; const char *hex; } known[] = {
        {1, "084fed08b978af4d7d196a7446a86b58009e636b611db16211b65a9aadff29c5"},
        {55, "e7313d333c272e639f790978283f9eb392e843d0f29b7016828bb1daa4aac70b"},
        {56, "4324d65f3c103567f5589c710bc08f8523f929a9272e3af36fc968e52abc6c27"},
        {57, "35df609437dcfea3279283ab79fd554e2bf78f8f7ae2de532d8ee300b09e8f73"},
        {63, "81c80242132f230c3bd41b3e63bbcff16107339549214a99614ff26664625055"},
        {64, "39e3d7b6b5d075d37d053ad89b24b41bef4f3c29760c84447cab3f3be1882241"},
        {65, "aacca6ff74fdbb296d165a45cecfa04e5127bc008770fbbdd48006f2d2fae95e"},
        {119, "9ce7368e4daf32341631b492e80359dc9f594b48453cd0dd5bf0b19279cc177e"},
        {120, "7836b787757e95e58b3ca5aec90b1b004e8deba1e50e9675af9cabf1a13a04b5"},
        {128, "d2742f1f4ac6bb7ca2b239ee18402ba8b3f9f8e652d2a72973c2b9ba11c08cf6"},
        {200, "2c7e18c942ef065b526a2d4e5546283749cd3ddfb51d8fc71f42717363685f46"},
    };
    uint8_t text[200], whole[32], split[32];
    for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)(7 * i + 3);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        CHECK(sha256_is(text, known[i].n, known[i].hex));

    int wrong = 0;
    sha256_of(text, 200, whole);
    for (size_t a = 0; a <= 200; a++)                   /* three pieces, every pair of cuts      */
        for (size_t b = a; b <= 200; b++) {
            sha256 s;
            s = sha256_start;
            sha256_add(&s, text, a);
            sha256_add(&s, text + a, b - a);
            sha256_add(&s, text + b, 200 - b);
            sha256_done(&s, split);
            wrong += memcmp(whole, split, 32) != 0;
        }
    CHECK_EQ(wrong, 0);
}

/* FIPS 180-4's million letters. Then 512 MiB of zeros and 3 letters, past 2^32 bits, as weights are:
 * the state after the zeros stands here so that the test need not compute it; the digest is
 * hashlib's. */
static void test_sha256_long(void) {
    size_t n = 1000000;
    uint8_t *letters = malloc(n), digest[32];
    char hex[65];
    if (!CHECK(letters != NULL)) return;
    memset(letters, 'a', n);
    CHECK(sha256_is(letters, n, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"));
    free(letters);
    sha256 s = {.h = {0xc1945316, 0x0ed03e10, 0x4e1064e9, 0x2f8b0652, 0xe52774ad, 0x065ea229,
                      0xc9c3c246, 0x0e0cc072}, .n = 512ull << 20};
    sha256_add(&s, "abc", 3);
    sha256_done(&s, digest);
    hex_of(digest, hex);
    CHECK(!strcmp(hex, "717dbb38e902c8ccfec58bd3ad0c34913fab4850d86992ad326ed3ada0382653"));
}

/* ---- UTF-8 --------------------------------------------------------------------------------- */

/* RFC 3629's grammar as it stands there: the ranges of each byte of each kind of character. */
static const uint8_t utf8_kinds[][9] = {
    {1, 0x00, 0x7F},
    {2, 0xC2, 0xDF, 0x80, 0xBF},
    {3, 0xE0, 0xE0, 0xA0, 0xBF, 0x80, 0xBF},
    {3, 0xE1, 0xEC, 0x80, 0xBF, 0x80, 0xBF},
    {3, 0xED, 0xED, 0x80, 0x9F, 0x80, 0xBF},
    {3, 0xEE, 0xEF, 0x80, 0xBF, 0x80, 0xBF},
    {4, 0xF0, 0xF0, 0x90, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
    {4, 0xF1, 0xF3, 0x80, 0xBF, 0x80, 0xBF, 0x80, 0xBF},
    {4, 0xF4, 0xF4, 0x80, 0x8F, 0x80, 0xBF, 0x80, 0xBF},
};

/* Length of the character that starts at P, or 0; *PREFIX: all N bytes are the beginning of one. */
static size_t utf8_by_grammar(const uint8_t *p, size_t n, bool *prefix) {
    *prefix = false;
    for (size_t k = 0; k < sizeof utf8_kinds / sizeof *utf8_kinds; k++) {
        const uint8_t *kind = utf8_kinds[k];
        size_t i = 0;
        while (i < kind[0] && i < n && p[i] >= kind[1 + 2 * i] && p[i] <= kind[2 + 2 * i]) i++;
        if (i == kind[0]) return i;
        if (i == n) *prefix = true;
    }
    return 0;
}

static void test_utf8_code_points(void) {
    int wrong = 0;
    uint8_t before[4] = {0};
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xD800 && c < 0xE000) continue;
        uint8_t bytes[4] = {0};
        uint32_t back = 0;
        size_t n = utf8_encode(c, bytes);
        wrong += n != (c < 0x80 ? 1u : c < 0x800 ? 2u : c < 0x10000 ? 3u : 4u);
        wrong += utf8_decode(bytes, n, &back) != n || back != c;
        wrong += c && memcmp(before, bytes, 4) >= 0;    /* UTF-8 sorts as its code points do     */
        memcpy(before, bytes, 4);
        bool prefix;
        wrong += utf8_by_grammar(bytes, n, &prefix) != n;
        for (size_t cut = 1; cut < n; cut++) wrong += utf8_decode(bytes, cut, &back) != 0;
        for (size_t cut = 0; cut <= n; cut++)           /* behind other text and by itself       */
            wrong += utf8_unfinished(bytes, cut) != (cut == n ? 0 : cut);
    }
    CHECK_EQ(wrong, 0);
    uint8_t b[4];
    CHECK(utf8_encode(0x20AC, b) == 3 && !memcmp(b, "\xE2\x82\xAC", 3));
    CHECK(utf8_encode(0x1F600, b) == 4 && !memcmp(b, "\xF0\x9F\x98\x80", 4));
}

/* Every sequence of three bytes, and of four with the last two at the edges of their ranges. */
static void test_utf8_all_bytes(void) {
    static const uint8_t edge[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2,
                                   0xE0, 0xF4, 0xFF};
    int wrong = 0;
    bool prefix;
    uint32_t code;
    for (uint32_t i = 0; i < 1 << 24; i++) {
        uint8_t p[3] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i};
        if (p[0] >= 0xE0 && p[0] < 0xF8)                /* else the third byte says nothing new  */
            wrong += utf8_decode(p, 3, &code) != utf8_by_grammar(p, 3, &prefix);
        else if (p[2] == 0x80)
            for (size_t n = 1; n <= 3; n++)
                wrong += utf8_decode(p, n, &code) != utf8_by_grammar(p, n, &prefix);
    }
    for (uint32_t i = 0xE000; i < 1 << 16; i++)
        for (size_t j = 0; j < sizeof edge * sizeof edge; j++) {
            uint8_t p[4] = {(uint8_t)(i >> 8), (uint8_t)i, edge[j / sizeof edge],
                            edge[j % sizeof edge]};
            for (size_t n = 2; n <= 4; n++)
                wrong += utf8_decode(p, n, &code) != utf8_by_grammar(p, n, &prefix);
        }
    CHECK_EQ(wrong, 0);
}

/* The definition: the last k < 4 bytes are the beginning of a character, and not all of it. */
static size_t unfinished_by_definition(const uint8_t *p, size_t n) {
    for (size_t k = 1; k <= 3 && k <= n; k++) {
        bool prefix;
        if (!utf8_by_grammar(p + n - k, k, &prefix) && prefix) return k;
    }
    return 0;
}

static void test_utf8_unfinished(void) {
    static const char text[] = "na\xC3\xAFve \xE2\x82\xAC \xED\x9F\xBF\xEE\x80\x80 "
                               "\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\xF0\x9F\xA9\xBA.";
    int wrong = 0, some = 0;
    for (size_t n = 0; n < sizeof text; n++) {
        size_t k = utf8_unfinished((const uint8_t *)text, n);
        wrong += k != unfinished_by_definition((const uint8_t *)text, n);
        size_t at = 0;
        while (at < n - k) {                            /* what stands before it is whole        */
            uint32_t code;
            size_t len = utf8_decode((const uint8_t *)text + at, n - k - at, &code);
            if (!len) { wrong++; break; }
            at += len;
        }
    }
    CHECK_EQ(wrong, 0);
    static const uint8_t likely[] = {0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF,
                                     0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF};
    for (uint32_t i = 0; i < 1000000; i++) {
        uint8_t p[6];
        size_t n = test_random() % 7;
        for (size_t k = 0; k < n; k++)
            p[k] = i & 1 ? (uint8_t)test_random() : likely[test_random() % sizeof likely];
        size_t k = unfinished_by_definition(p, n);
        wrong += utf8_unfinished(p, n) != k;
        some += k > 1;
    }
    CHECK_EQ(wrong, 0);
    CHECK(some > 10000);
}

static size_t from_hex(const char *text, const char *end, uint8_t *out) {
    size_t n = 0;
    int high = -1;
    for (; text < end; text++) {
        int d = *text >= '0' && *text <= '9' ? *text - '0' : (*text | 32) >= 'a' && (*text | 32) <= 'f'
                ? (*text | 32) - 'a' + 10 : -1;
        if (d < 0) continue;
        if (high < 0) { high = d; continue; }
        out[n++] = (uint8_t)(high << 4 | d), high = -1;
    }
    return n;
}

/* What a reader makes of bytes: with the invalid ones left out, or, as W3C and Unicode recommend,
 * each longest beginning of a character that does not go on replaced by U+FFFD. */
static size_t clean_utf8(const uint8_t *p, size_t n, bool replace, uint8_t *out) {
    size_t m = 0;
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        len = utf8_decode(p + at, n - at, &code);
        if (len) {
            m += utf8_encode(code, out + m);
            continue;
        }
        len = 1;
        for (size_t k = 2; k <= 3 && k <= n - at; k++) if (utf8_unfinished(p + at, k) == k) len = k;
        if (replace) m += utf8_encode(0xFFFD, out + m);
    }
    return m;
}

/* utf8tests.txt: number:valid hex:bytes, or number:invalid hex:bytes:skipped:replaced */
static void test_utf8_file(const char *folder) {
    char path[1024], line[1024];
    snprintf(path, sizeof path, "%s/malformed/utf8/utf8tests.txt", folder);
    FILE *f = fopen(path, "r");
    if (!CHECK(f != NULL)) return;
    int cases = 0;
    while (fgets(line, sizeof line, f)) {
        uint8_t bytes[400], wanted[400], got[1200];
        char *kind = line[0] == '#' ? NULL : strchr(line, ':');
        bool valid = kind && !strncmp(kind, ":valid hex:", 11);
        if (!kind || (!valid && strncmp(kind, ":invalid hex:", 13))) continue;
        char *field[4] = {strchr(kind + 1, ':') + 1};
        for (int i = 1; i < 4; i++) {
            char *colon = field[i - 1] ? strchr(field[i - 1], ':') : NULL;
            field[i] = colon ? colon + 1 : NULL;
        }
        size_t n = from_hex(field[0], field[1] ? field[1] : line + strlen(line), bytes);
        cases++;
        for (int replace = 0; replace < 2; replace++) {
            const char *from = valid ? field[0] : field[1 + replace];
            const char *end = !valid && !replace ? field[2] : line + strlen(line);
            bool nothing = !valid && from && !strncmp(from, "nothing", 7);
            size_t m = nothing || !from ? 0 : from_hex(from, end, wanted);
            size_t k = clean_utf8(bytes, n, replace, got);
            if (!CHECK(k == m && !memcmp(got, wanted, m))) printf("    %s", line);
        }
    }
    fclose(f);
    CHECK(cases > 80);
}

/* ---- JSON ---------------------------------------------------------------------------------- */

/* Parses a copy without a byte behind it, so that the sanitizer sees a step too far. */
static int parse_copy(json *j, const char *text, size_t n, char **copy) {
    medrun_error e = {0};
    *copy = malloc(n ? n : 1);
    if (n) memcpy(*copy, text, n);
    int code = json_parse(j, *copy, n, &e);
    CHECK_EQ(e.code, code);
    return code;
}

static void free_copy(json *j, char *copy) {
    json_free(j);
    free(copy);
}

/* Do the nodes of V describe a tree that lies in the text as JSON does? Returns what follows V. */
static uint32_t tree_end(const json *j, uint32_t v, size_t n, int *wrong) {
    const json_node *o = &j->nodes[v];
    if (o->end > n || o->start > o->end || o->next > j->n || o->next <= v) return ++*wrong, v + 1;
    bool object = o->type == JSON_OBJECT;
    uint32_t c = v + 1;
    if (object || o->type == JSON_ARRAY) {
        *wrong += j->text[o->start] != (object ? '{' : '[');
        *wrong += j->text[o->end - 1] != (object ? '}' : ']');
        *wrong += object && o->count % 2;
        for (uint32_t i = 0; i < o->count; i++) {
            if (c >= o->next) return ++*wrong, o->next;
            *wrong += object && i % 2 == 0 && j->nodes[c].type != JSON_STRING;
            *wrong += j->nodes[c].start <= o->start || j->nodes[c].end >= o->end;
            c = tree_end(j, c, n, wrong);
        }
    } else if (o->type == JSON_STRING) {
        *wrong += o->start < 1 || j->text[o->start - 1] != '"' || j->text[o->end] != '"';
    }
    *wrong += c != o->next;
    return o->next;
}

/* Reads everything that can be read of a parsed text. */
static int read_all(const json *j, size_t n) {
    int wrong = 0;
    tree_end(j, 0, n, &wrong);
    wrong += j->nodes[0].next != j->n;
    for (uint32_t v = 0; v < j->n; v++) {
        json_type type = json_typeof(j, v);
        buffer b = {0};
        uint32_t code;
        if (type == JSON_STRING) {
            json_unescape(j, v, &b);
            for (size_t at = 0, len; at < b.n; at += len)       /* strings are always UTF-8      */
                if (!(len = utf8_decode(b.data + at, b.n - at, &code))) { wrong++; break; }
        }
        if (type == JSON_NUMBER) wrong += isnan(json_number(j, v));
        if (type == JSON_OBJECT) wrong += json_get(j, v, "no such key \x01") != JSON_NONE;
        buffer_free(&b);
    }
    return wrong;
}

/* Y: accept, N: refuse, I: either, but without a crash. */
static bool json_case(char kind, const char *text, size_t n) {
    json j;
    char *copy;
    int code = parse_copy(&j, text, n, &copy);
    bool ok = code == MEDRUN_OK ? kind != 'n' && read_all(&j, n) == 0
                                : kind != 'y' && code == MEDRUN_BAD_FILE;
    free_copy(&j, copy);
    return ok;
}

static void test_json_cases(void) {
    static const char *const good[] = {
        "null", "true", "false", "0", "-0", "-1", "12345678901234567890", "1.5", "-0.25e+10", "1E5",
        "1e-400", "\"\"", "\"a\"", "[]", "{}", " [ ] ", "\t\r\n{ }\n", "[1,2,3]", "[[],[[]],{}]",
        "{\"\":0}", "{\"a\":{\"b\":[{\"c\":null}]},\"d\":[]}", "{\"a\":1,\"a\":2}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\"", "\"\\u0000\"", "\"\\ud83d\\ude00\"", "\"\\uD800\"",
        "\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\"", "\"\x7F\"", "[0e0,0E-0,0.0]",
        "[true,false,null,\"x\",-1]", "\"\\u007F\\uABCD\\uabcd\"",
    };
    static const char *const bad[] = {
        "", " ", "nul", "True", "nulll", "01", "-01", "00", "+1", "-", ".5", "1.", "1.e5", "1e", "1e+",
        "0x10", "1 2", "Infinity", "NaN", "\"", "\"a", "'a'", "\"\\x\"", "\"\\u12\"", "\"\\u12g4\"",
        "\"\\\"", "\"a\nb\"", "\"a\tb\"", "\"\x80\"", "\"\xC0\x80\"", "\"\xED\xA0\x80\"",
        "\"\xF4\x90\x80\x80\"", "[", "]", "{", "}", "[1", "[1,", "[1,]", "[,1]", "[1,,2]", "[1 2]",
        "[1}", "{]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{,}", "{\"a\" 1}", "{\"a\":1 \"b\":2}",
        "{1:2}", "{a:1}", "{\"a\":1}}", "[]]", "{\"a\",\"b\"}", "[\"a\":1]", "{\"a\":1:2}", "//x\n1",
        "[1]x", "\xEF\xBB\xBF{}", "[\v1]", "\"\\u\"", "\"\\",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        if (!CHECK(json_case('y', good[i], strlen(good[i])))) printf("    %s\n", good[i]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (!CHECK(json_case('n', bad[i], strlen(bad[i])))) printf("    %s\n", bad[i]);
    CHECK(json_case('n', "[1]\0", 4));
    CHECK(json_case('n', "\"\\\0\"", 4));
    CHECK(json_case('n', "\"\0\"", 3));

    char deep[2 * JSON_MAX_DEPTH + 3];
    for (int extra = 0; extra < 2; extra++) {           /* the deepest that is read, one more    */
        size_t n = JSON_MAX_DEPTH + (size_t)extra;
        memset(deep, '[', n), memset(deep + n, ']', n);
        CHECK(json_case(extra ? 'n' : 'y', deep, 2 * n));
    }
    medrun_error e = {0};
    json j;
    CHECK_EQ(json_parse(&j, "[1,\n x]", 7, &e), MEDRUN_BAD_FILE);
    CHECK(!strcmp(e.text, "JSON: unexpected character at byte 5"));
    json_free(&j);
    e = (medrun_error){0};
    CHECK_EQ(json_parse(&j, "[1, ]", 5, &e), MEDRUN_BAD_FILE);
    CHECK(!strcmp(e.text, "JSON: a value is missing at byte 4"));
    json_free(&j);
    CHECK_EQ(json_parse(&j, "1", 0xFFFFFFF0, NULL), MEDRUN_BAD_FILE);   /* offsets are 32 bits   */
    json_free(&j);
}

static void test_json_nodes(void) {
    static const char text[] = " {\"a\":[1,{\"b\":null}, -2e1 ],\"c\\u0064\" : \"\\n\"} ";
    static const struct { json_type type; uint32_t start, end, next, count; } wanted[] = {
        {JSON_OBJECT, 1, 45, 10, 4}, {JSON_STRING, 3, 4, 2, 0}, {JSON_ARRAY, 6, 27, 8, 3},
        {JSON_NUMBER, 7, 8, 4, 0},   {JSON_OBJECT, 9, 19, 7, 2}, {JSON_STRING, 11, 12, 6, 0},
        {JSON_NULL, 14, 0, 7, 0},    {JSON_NUMBER, 21, 25, 8, 0}, {JSON_STRING, 29, 36, 9, 0},
        {JSON_STRING, 41, 43, 10, 0},
    };
    json j;
    char *copy;
    CHECK_EQ(parse_copy(&j, text, strlen(text), &copy), MEDRUN_OK);
    CHECK_EQ(j.n, 10);
    for (size_t i = 0; i < j.n && i < 10; i++) {
        const json_node *o = &j.nodes[i];
        bool same = o->type == wanted[i].type && o->start == wanted[i].start &&
                    o->next == wanted[i].next && o->count == wanted[i].count &&
                    (o->end == wanted[i].end || !wanted[i].end);
        if (!CHECK(same)) printf("    node %zu: %u..%u next %u count %u\n", i, o->start, o->end,
                                 o->next, o->count);
    }
    CHECK_EQ(json_get(&j, 0, "a"), 2);
    CHECK_EQ(json_get(&j, 0, "cd"), 9);
    CHECK_EQ(json_get(&j, 0, "c"), JSON_NONE);
    CHECK_EQ(json_get(&j, 0, "b"), JSON_NONE);          /* not the one further in                */
    CHECK_EQ(json_get(&j, 4, "b"), 6);
    CHECK_EQ(json_get(&j, 2, "a"), JSON_NONE);          /* an array has no keys                  */
    CHECK_EQ(json_get(&j, JSON_NONE, "a"), JSON_NONE);
    CHECK(json_is(&j, 1, "a") && json_is(&j, 8, "cd") && json_is(&j, 9, "\n"));
    CHECK(!json_is(&j, 1, "") && !json_is(&j, 1, "ab") && !json_is(&j, 3, "1"));
    CHECK(!json_is(&j, 8, "c") && !json_is(&j, 8, "cde") && !json_is(&j, JSON_NONE, ""));
    free_copy(&j, copy);
    CHECK(j.nodes == NULL && j.n == 0);
}

/* Does the one-string text give these bytes? */
static bool unescapes(const char *text, const char *wanted, size_t n) {
    json j;
    char *copy;
    buffer b = {0};
    bool same = !parse_copy(&j, text, strlen(text), &copy);
    if (same) json_unescape(&j, 0, &b);
    same = same && b.n == n && (!n || !memcmp(b.data, wanted, n));
    buffer_free(&b);
    free_copy(&j, copy);
    return same;
}

static void test_json_strings(void) {
    CHECK(unescapes("\"\"", "", 0));
    CHECK(unescapes("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 8));
    CHECK(unescapes("\"x\\u0041y\\u00e9\\u20AC\"", "xAy\xC3\xA9\xE2\x82\xAC", 8));
    CHECK(unescapes("\"\\u0000\"", "\0", 1));
    CHECK(unescapes("\"\\ud83d\\ude00\"", "\xF0\x9F\x98\x80", 4));
    CHECK(unescapes("\"\\uDBFF\\uDFFF\"", "\xF4\x8F\xBF\xBF", 4));
    CHECK(unescapes("\"\\ud83d\"", "\xEF\xBF\xBD", 3));
    CHECK(unescapes("\"\\ude00\\ud83d\"", "\xEF\xBF\xBD\xEF\xBF\xBD", 6));
    CHECK(unescapes("\"\\ud83d\\ue000\"", "\xEF\xBF\xBD\xEE\x80\x80", 6));
    CHECK(unescapes("\"\\ud83dx\"", "\xEF\xBF\xBDx", 4));
    CHECK(unescapes("\"\\ud83d\\n\"", "\xEF\xBF\xBD\n", 4));
    CHECK(unescapes("\"\\ud83d\\u0041\"", "\xEF\xBF\xBD" "A", 4));
    CHECK(unescapes("\"\\ud83d\\ud83d\\ude00\"", "\xEF\xBF\xBD\xF0\x9F\x98\x80", 7));

    int wrong = 0;
    for (int i = 0; i < 20000; i++) {                   /* quote, parse, unescape: the same text */
        uint8_t text[40], wanted[120];
        size_t n = test_random() % sizeof text, m = 0;
        for (size_t k = 0; k < n; k++) {
            uint64_t r = test_random();
            text[k] = (uint8_t)(r & 256 ? r : 0x80 | (r & 63));
            if ((r & 768) == 512) text[k] = (uint8_t)"\"\\/\n\x1f\x7f\0u"[r & 7];
        }
        for (size_t at = 0, len; at < n; at += len) {   /* each bad byte becomes U+FFFD          */
            bool prefix;
            len = utf8_by_grammar(text + at, n - at, &prefix);
            if (len) memcpy(wanted + m, text + at, len), m += len;
            else memcpy(wanted + m, "\xEF\xBF\xBD", 3), m += 3, len = 1;
        }
        buffer quoted = {0}, back = {0};
        json j;
        json_quote(&quoted, (const char *)text, n);
        wrong += json_parse(&j, (const char *)quoted.data, quoted.n, NULL) != MEDRUN_OK;
        for (size_t k = 0; k < quoted.n; k++) wrong += quoted.data[k] < 0x20 || quoted.data[k] == 0x7F;
        if (j.n == 1) json_unescape(&j, 0, &back);
        wrong += back.n != m || (m && memcmp(back.data, wanted, m));
        json_free(&j);
        buffer_free(&quoted), buffer_free(&back);
    }
    CHECK_EQ(wrong, 0);
}

/* ---- JSON numbers -------------------------------------------------------------------------- */

static double number_of(const char *text) {
    json j;
    medrun_error e = {0};
    double d = json_parse(&j, text, strlen(text), &e) ? (double)NAN : json_number(&j, 0);
    json_free(&j);
    return d;
}

static bool same_double(double a, double b) { return !memcmp(&a, &b, sizeof a); }

static char *put_digits(char *p, size_t n) {
    while (n--) *p++ = (char)('0' + test_random() % 10);
    return p;
}

static void random_number(char *p, size_t whole, size_t fraction, int exponent) {
    if (test_random() & 1) *p++ = '-';
    if (!whole) *p++ = '0';
    if (whole) *p++ = (char)('1' + test_random() % 9), p = put_digits(p, whole - 1);
    if (fraction) *p++ = '.', p = put_digits(p, fraction);
    *p = 0;
    if (exponent) sprintf(p, "%c%s%d", test_random() & 1 ? 'e' : 'E',
                          exponent > 0 && test_random() & 1 ? "+" : "", exponent);
}

/* How many of the numbers differ from strtod's in a locale with a point. */
static int wrong_numbers(int n, size_t whole, size_t fraction, int exponents) {
    int wrong = 0;
    char *locale = strdup(setlocale(LC_NUMERIC, NULL));
    for (int i = 0; i < n; i++) {
        char text[2500];
        random_number(text, test_random() % (whole + 1), test_random() % (fraction + 1),
                      exponents ? (int)(test_random() % (2 * (unsigned)exponents)) - exponents : 0);
        double got = number_of(text);
        setlocale(LC_NUMERIC, "C");
        double wanted = strtod(text, NULL);
        setlocale(LC_NUMERIC, locale);
        if (!same_double(got, wanted) && !wrong++)
            printf("    %s gives %.17g, strtod %.17g\n", text, got, wanted);
    }
    free(locale);
    return wrong;
}

static void test_json_numbers(void) {
    CHECK(same_double(number_of("0"), 0) && same_double(number_of("-0"), -0.0));
    CHECK(same_double(number_of("-0.0e5"), -0.0));
    CHECK(number_of("1e5") == 100000 && number_of("-12.5") == -12.5 && number_of("0.1") == 0.1);
    CHECK(number_of("9007199254740993") == 9007199254740992.0);         /* a tie, to even        */
    CHECK(number_of("9007199254740993.00000000000000000000000000001") == 9007199254740994.0);
    CHECK(number_of("2.2250738585072011e-308") == 2.2250738585072011e-308);
    CHECK(number_of("4.9e-324") > 0 && number_of("1e-400") == 0);
    CHECK(isinf(number_of("1e309")) && isinf(number_of("-1e99999999999")));
    CHECK(number_of("1e-99999999999") == 0 && number_of("0e99999999999") == 0);
    CHECK(number_of("1e0000000000000000000022") == 1e22);
    CHECK_EQ(wrong_numbers(100000, 17, 17, 30), 0);
    CHECK_EQ(wrong_numbers(50000, 20, 20, 330), 0);
    CHECK_EQ(wrong_numbers(20000, 3, 8, 25), 0);
    CHECK_EQ(wrong_numbers(20000, 8, 0, 0), 0);
    CHECK_EQ(wrong_numbers(2000, 190, 190, 300), 0);
    CHECK_EQ(wrong_numbers(1000, 1100, 1100, 1200), 0);         /* longer than any buffer        */

    char text[2500];
    memset(text, '0', sizeof text);
    memcpy(text, "0.", 2), memcpy(text + 1202, "1e1201", 7);    /* 0.000...1e1201                */
    CHECK(number_of(text) == 1);
    memset(text, '0', sizeof text);
    memcpy(text, "1", 1), memcpy(text + 1201, "e-1200", 7);     /* 1000...e-1200                 */
    CHECK(number_of(text) == 1);
    memset(text, '0', sizeof text);
    memcpy(text, "9007199254740993.", 17), memcpy(text + 2000, "1", 2);     /* just past a tie   */
    CHECK(number_of(text) == 9007199254740994.0);
    memcpy(text + 2000, "0", 2);
    CHECK(number_of(text) == 9007199254740992.0);
}

/* A locale whose decimal point is a comma must change nothing. */
static void test_json_locale(void) {
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "it_IT.UTF-8",
                                        "es_ES.UTF-8", "pt_BR.UTF-8", "ru_RU.UTF-8", "de_DE"};
    bool set = false;
    for (size_t i = 0; i < sizeof names / sizeof *names && !set; i++)
        set = setlocale(LC_NUMERIC, names[i]) && localeconv()->decimal_point[0] == ',';
    if (!set) {
        SKIP("no locale with a decimal comma is installed");
        return;
    }
    CHECK_EQ(wrong_numbers(20000, 17, 17, 330), 0);
    CHECK_EQ(wrong_numbers(500, 190, 190, 300), 0);
    setlocale(LC_NUMERIC, "C");
}

static void test_json_fields(void) {
    static const char text[] = "{\"n\":5,\"big\":4503599627370496,\"half\":0.5,\"minus\":-3,\"s\":\"x\","
        "\"e\":1e2,\"huge\":1e300,\"nul\":\"a\\u0000b\",\"long\":\"12345678\",\"esc\":\"\\u00e9\"}";
    json j;
    medrun_error e = {0};
    char s[8];
    CHECK_EQ(json_parse(&j, text, strlen(text), &e), MEDRUN_OK);
#define INT(key, min, max) (e = (medrun_error){0}, json_int(&j, 0, "f.mdr", key, min, max, &e))
#define REAL(key, min, max) (e = (medrun_error){0}, json_real(&j, 0, "f.mdr", key, min, max, false, &e))
#define STRING(key) (e = (medrun_error){0}, json_text(&j, 0, "f.mdr", key, s, sizeof s, &e))
#define BAD(value) (!(value) && e.code == MEDRUN_BAD_FILE)     /* they give 0 after a failure  */
    CHECK(INT("n", 5, 5) == 5 && !e.code);
    CHECK(INT("big", 0, 1ll << 52) == 1ll << 52 && !e.code);
    CHECK(INT("e", 0, 1000) == 100 && !e.code);
    CHECK(INT("minus", -3, 0) == -3 && !e.code);
    CHECK(BAD(INT("n", 6, 9)));
    CHECK(!strcmp(e.text, "f.mdr: field n: found 5, wanted a whole number from 6 to 9"));
    CHECK(BAD(INT("n", 0, 4)) && BAD(INT("big", 0, (1ll << 52) - 1)) && BAD(INT("minus", -2, 0)));
    CHECK(BAD(INT("half", 0, 1)) && strstr(e.text, "found 0.5"));
    CHECK(BAD(INT("huge", 0, 1ll << 52)) && BAD(INT("s", 0, 9)));
    CHECK(strstr(e.text, "field s: found another type, wanted a whole number") != NULL);
    CHECK(BAD(INT("none", 0, 9)));
    CHECK(strstr(e.text, "field none: found nothing, wanted a whole number") != NULL);
    CHECK(REAL("half", 0.5, 0.5) == 0.5 && !e.code);
    CHECK(REAL("n", 0, 5) == 5 && !e.code);
    CHECK(BAD(REAL("half", 0.51, 1) != 0));
    CHECK(!strcmp(e.text, "f.mdr: field half: found 0.5, wanted 0.51000000000000001 to 1") ||
          !strcmp(e.text, "f.mdr: field half: found 0.5, wanted 0.51 to 1"));
    CHECK(BAD(REAL("half", 0, 0.49) != 0) && BAD(REAL("s", 0, 1) != 0));
    CHECK(BAD(REAL("none", 0, 1) != 0) && BAD(REAL("huge", 0, 1) != 0));
    CHECK(!STRING("s") && !strcmp(s, "x") && !STRING("esc") && !strcmp(s, "\xC3\xA9"));
    CHECK(STRING("long") == MEDRUN_BAD_FILE && strstr(e.text, "field long") && !s[0]);
    CHECK(STRING("nul") && STRING("n") && STRING("none") && strstr(e.text, "wanted a string"));
    CHECK(e.code == MEDRUN_BAD_FILE);
    e = (medrun_error){0};
    CHECK(!json_text(&j, 0, "f.mdr", "long", (char[9]){0}, 9, &e) && e.code == MEDRUN_OK);
    CHECK(BAD(json_int(&j, JSON_NONE, "f.mdr", "n", 0, 9, &e)));
    /* the first failure is kept, and what follows gives nothing */
    char first[256];
    memcpy(first, e.text, sizeof first);
    CHECK(!json_int(&j, 0, "f.mdr", "n", 0, 9, &e) && !(json_real(&j, 0, "f.mdr", "n", 0, 9, false, &e) > 0));
    s[0] = 'y';
    CHECK(json_text(&j, 0, "f.mdr", "s", s, sizeof s, &e) == MEDRUN_BAD_FILE && !s[0]);
    CHECK(!strcmp(e.text, first));
    json_free(&j);
}

/* ---- JSON from files, and damaged ---------------------------------------------------------- */

static void test_json_files(const char *folder) {
    char path[2048];
    snprintf(path, sizeof path, "%s/malformed/json", folder);
    DIR *dir = opendir(path);
    if (!CHECK(dir != NULL)) return;
    int files = 0;
    for (struct dirent *d; (d = readdir(dir));) {
        const char *dot = strrchr(d->d_name, '.');
        if (!dot || strcmp(dot, ".json") || d->d_name[1] != '_') continue;
        snprintf(path, sizeof path, "%s/malformed/json/%s", folder, d->d_name);
        FILE *f = fopen(path, "rb");
        static char text[1 << 20];
        size_t n = f ? fread(text, 1, sizeof text, f) : 0;
        if (f) fclose(f);
        files++;
        if (!CHECK(f && json_case(d->d_name[0], text, n))) printf("    %s\n", d->d_name);
    }
    closedir(dir);
    CHECK(files > 300);
}

/* Texts with a few bytes changed, left out or doubled: refused or read, with nothing out of place.
 * Worth most under -fsanitize=address,undefined. */
static void test_json_damaged(void) {
    static const char text[] = "{\"name\":\"m\\u00e9d\\ud83d\\ude00\",\"a\":[1,-2.5e-3,true,null,[]],"
        "\"b\":{\"c\":\"\\\"\\\\\",\"d\":[[{\"e\":12345678901234567890.5}]]},\"f\":\"\xC3\xA9\xE2\x82\xAC\"}";
    static const char any[] = "{}[],:\"\\u0eE.-+1tfn \xC3\xF0\x80";
    int wrong = 0, accepted = 0;
    for (int i = 0; i < 60000; i++) {
        char mutant[2 * sizeof text], *copy;
        size_t n = strlen(text);
        json j;
        memcpy(mutant, text, n);
        for (uint64_t left = 1 + test_random() % 4; left; left--) {
            size_t at = test_random() % n, kind = test_random() % 4;
            if (kind < 2) mutant[at] = any[test_random() % (sizeof any - 1)];
            else if (kind == 2) memmove(mutant + at, mutant + at + 1, --n - at);
            else if (n < sizeof mutant) memmove(mutant + at + 1, mutant + at, n++ - at);
        }
        if (i % 5 == 0) n = test_random() % (n + 1);
        copy = malloc(n ? n : 1);
        memcpy(copy, mutant, n);
        medrun_error e = {0};
        int code = json_parse(&j, copy, n, &e);
        wrong += code != e.code || (code && (code != MEDRUN_BAD_FILE || !e.text[0]));
        if (!code) wrong += read_all(&j, n), accepted++;
        free_copy(&j, copy);
    }
    CHECK_EQ(wrong, 0);
    CHECK(accepted > 1000 && accepted < 40000);
}

/* An error line drives no terminal, whatever name it holds, and is never cut inside a character. */
static void test_hostile_errors(void) {
    medrun_error e = {0};
    char long_name[600];
    fail(&e, MEDRUN_BAD_FILE, "a\x1b[31m\x7f\xC2\x9B" "31m\xE2\x80\xAE\xFFz \xC3\xA4");
    CHECK(!strcmp(e.text, "a?[31m??31m??z \xC3\xA4"));
    for (size_t i = 0; i < sizeof long_name - 1; i += 2) memcpy(long_name + i, "\xC3\xA4", 2);
    long_name[598] = 0;
    e = (medrun_error){0};
    fail(&e, MEDRUN_BAD_FILE, "%s", long_name);
    CHECK_EQ(strlen(e.text), 511);
    CHECK(e.text[510] == '?' && !strncmp(e.text, long_name, 510));
}

int main(void) {
    test_hostile_errors();
    const char *data = getenv("MEDRUN_TEST_DATA");
    test_errors();
    test_new_array();
    test_buffer();
    test_reader();
    test_sha256();
    test_sha256_long();
    test_utf8_code_points();
    test_utf8_all_bytes();
    test_utf8_unfinished();
    test_json_cases();
    test_json_nodes();
    test_json_strings();
    test_json_numbers();
    test_json_locale();
    test_json_fields();
    test_json_damaged();
    if (data) test_utf8_file(data), test_json_files(data);
    else SKIP("MEDRUN_TEST_DATA is not set: JSONTestSuite and the UTF-8 cases");
    return report();
}
