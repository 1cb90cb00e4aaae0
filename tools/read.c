/* What tools read of foreign files: bytes with bounds. medrun's own files need no such reader, as
 * they are checked and mapped. A tool includes this file after medrun.c.
 * MIT licence, see LICENSE. */
#ifndef MEDRUN_READ             /* programs of several parts may include it twice               */
#define MEDRUN_READ

/* Reads past the end give zeros and set `failed`. */
typedef struct {
    const uint8_t *data;
    size_t n, at;
    bool failed;
} reader;

/* The next N bytes, NULL past the end. */
static const uint8_t *read_bytes(reader *r, size_t n) {
    if (r->failed || n > r->n - r->at) return r->failed = true, NULL;
    r->at += n;
    return r->data + r->at - n;
}

/* A number of N bytes, the lowest first. */
static uint64_t read_le(reader *r, size_t n) {
    const uint8_t *p = read_bytes(r, n);
    uint64_t v = 0;
    for (size_t i = 0; p && i < n; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

__attribute__((unused)) static uint64_t read_u64(reader *r) { return read_le(r, 8); }
#endif
