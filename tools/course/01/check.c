/* Checks lesson 1: random texts give the ids of medrun tokenize. */
#include "course.h"

static const char *const parts[] = {
    "hyper", "hypo", "tension", "glyc", "emia", "cardi", "itis", "para", "ceta", "mol", "metho",
    "trexate", "levo", "thyrox", "ine", "ami", "trip", "tyl", "statin", "pril", "olol", "mycin",
    "What", "is", "the", "dose", "of", "for", "pain", "in", "blood", "pressure", "not"};

static void add_word(char *text, size_t most, bool triple) {
    char word[96];
    size_t n = 0, k = 1 + draw_below(3);
    if (triple) {                       /* the same letter three times and more                 */
        char c = "slotfe0"[draw_below(7)];
        for (k = 3 + draw_below(6); k--;) word[n++] = c;
        word[n] = 0;
    } else if (draw_below(5) == 0) {
        snprintf(word, sizeof word, "%d.%d mg", (int)draw_below(900), (int)draw_below(9));
    } else {
        word[0] = 0;
        while (k--) {
            n = strlen(word);
            snprintf(word + n, sizeof word - n, "%s",
                     parts[draw_below(sizeof parts / sizeof *parts)]);
        }
    }
    size_t at = strlen(text);
    snprintf(text + at, most - at, "%s%s", at ? " " : "", word);
}

static bool same_text(const char *word, size_t n_bytes, const int32_t *ids, size_t n) {
    char joined[256] = "";
    for (size_t i = 0; i < n; i++)
        strncat(joined, demo_piece(ids[i]), sizeof joined - strlen(joined) - 1);
    return strlen(joined) == n_bytes && !memcmp(joined, word, n_bytes);
}

static void check_word(const char *word, size_t n_bytes, int32_t *ids, size_t *n) {
    size_t before = demo_bytes(word, n_bytes, ids);
    int32_t rank, result;
    *n = merge_pieces(ids, before);
    if (*n < 1 || *n > before)
        hint("\"%.*s\" came as %zu pieces, and you returned %zu. The last pair is ids[n - 2] and "
             "ids[n - 1]: do you look behind it?", (int)n_bytes, word, before, *n);
    for (size_t i = 0; i < *n; i++)
        if (ids[i] < 0 || ids[i] >= facts.vocab_size)
            hint("\"%.*s\": %d is no id.", (int)n_bytes, word, (int)ids[i]);
    for (size_t i = 0; i + 1 < *n; i++)
        if (demo_merge(ids[i], ids[i + 1], &rank, &result))
            hint("\"%.*s\": you stopped, but \"%s\" and \"%s\" still merge. Go on until no pair "
                 "does.",
                 (int)n_bytes, word, demo_piece(ids[i]), demo_piece(ids[i + 1]));
    if (!same_text(word, n_bytes, ids, *n))
        hint("\"%.*s\": your pieces no longer spell the word. Is each result that of its own pair, "
             "is the gap behind it closed, and does your loop end at the last pair?",
             (int)n_bytes, word);
}

/* The same text with yours and with medrun's pieces. */
static void check_text(const char *text, bool triple) {
    int32_t yours[MOST_IDS], engine[MOST_IDS];
    size_t n = 0, n_engine = demo_tokens(text, false, engine), length = strlen(text), k;
    for (size_t at = 0, bytes; at < length; at += bytes) {
        bytes = demo_word(text + at, length - at);
        check_word(text + at, bytes, yours + n, &k);
        for (size_t i = 0; i < k; i++)
            if (n + i >= n_engine || yours[n + i] != engine[n + i])
                hint(triple ? "\"%.*s\": two merges have the same rank and overlap. The leftmost "
                              "goes first."
                            : "\"%.*s\": these are not medrun's pieces. Do you always merge the "
                              "pair with the lowest rank, not the first that you find?",
                     (int)bytes, text + at);
        n += k;
    }
}

void lesson(void) {
    char text[400];
    for (int triple = 0; triple < 2; triple++)
        for (int i = 0; i < 250; i++) {
            text[0] = 0;
            for (size_t k = 2 + draw_below(5); k--;) add_word(text, sizeof text, triple);
            check_text(text, triple);
        }
    int32_t a[MOST_IDS], b[MOST_IDS];
    right("500 texts give the ids of medrun tokenize. Behind a space \"levothyroxine\" is %zu "
          "pieces, \"azathioprine\" %zu.",
          demo_tokens(" levothyroxine", false, a), demo_tokens(" azathioprine", false, b));
}
