/* What tools write, and tests: whole numbers as bytes, and text as JSON. A tool includes this file
 * after medrun.c, which only reads such things. MIT licence, see LICENSE. */
#ifndef MEDRUN_WRITE            /* programs of several parts may include it twice               */
#define MEDRUN_WRITE

/* The N low bytes of V, the lowest first. */
__attribute__((unused)) static void write_le(buffer *b, uint64_t v, size_t n) {
    uint8_t bytes[8];
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)(v >> 8 * i);
    buffer_add(b, bytes, n);
}

/* Appends TEXT as a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD. Line ends
 * of all kinds are escaped, as some readers cut at Unicode's, too. */
__attribute__((unused)) static void json_quote(buffer *b, const char *text, size_t n) {
    buffer_text(b, "\"");
    for (size_t i = 0, len; i < n; i += len) {
        uint32_t code;
        len = utf8_decode((const uint8_t *)text + i, n - i, &code);
        if (!len) len = 1, buffer_text(b, "\\ufffd");
        else if (code == '"' || code == '\\') buffer_printf(b, "\\%c", (char)code);
        else if (code < 0x20 || code == 0x7F || code == 0x85 || code == 0x2028 || code == 0x2029)
            buffer_printf(b, "\\u%04x", (unsigned)code);
        else buffer_add(b, text + i, len);
    }
    buffer_text(b, "\"");
}

__attribute__((unused))
static void write_base64(const uint8_t *p, size_t n, buffer *to) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = (uint32_t)p[i] << 16;
        if (i + 1 < n) v |= (uint32_t)p[i + 1] << 8;
        if (i + 2 < n) v |= p[i + 2];
        char four[4] = {digits[v >> 18], digits[v >> 12 & 63],
                        i + 1 < n ? digits[v >> 6 & 63] : '=', i + 2 < n ? digits[v & 63] : '='};
        buffer_add(to, four, 4);
    }
}
#endif
