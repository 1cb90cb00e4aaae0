#!/usr/bin/env python3
"""Print the C table of Unicode character classes that the tokenizer's patterns need.

    python3 tools/unicode.py > table.inc           print the table
    python3 tools/unicode.py --check               compare it with Hugging Face tokenizers as well

The pre-tokenizer patterns of Llama-3 and of Mistral's tekken ask about letters (Lu, Ll, Lt, Lm,
Lo), marks (M), numbers (N) and white space (\\s), so a code point belongs to one of nine classes.
What counts is what Hugging Face tokenizers answers: its regex engine, Oniguruma, has Unicode 16.0
(measured with tokenizers 0.23.3 on every code point). Python's own `unicodedata` may be older:
Python 3.11 has 14.0. No letter, mark or number of 14.0 changed its class until 16.0, so ADDED
below, the code points that came since, is all that differs.

Whatever Python runs this, the class of every code point must have the digest CLASSES_SHA256, or
nothing is printed. `--check` asks the regex engine of an installed `tokenizers` about each class
and each code point. No network is used.
"""

import hashlib
import sys
import unicodedata

UNICODE_VERSION = "16.0"
N_CODE_POINTS = 0x110000
OTHER, LU, LL, LT, LM, LO, M, N, SPACE, ALT, ALT_ODD = range(11)
CLASSES = {"Lu": LU, "Ll": LL, "Lt": LT, "Lm": LM, "Lo": LO, "M": M, "N": N}
CLASSES_SHA256 = "5d7411aaf446704e798a5c25e16ecdc8f111002157adacf40b21f0dcb6933d8d"

# White space is Oniguruma's \s: the property White_Space. Python's str.isspace() differs, it adds
# U+001C to U+001F.
WHITE_SPACE = "9-D 20 85 A0 1680 2000-200A 2028-2029 202F 205F 3000"

# Letters, marks and numbers that Unicode 15.0, 15.1 and 16.0 added.
ADDED = """
    M:897 M:CF3 M:ECE Lu:1C89 Ll:1C8A Lu:A7CB-A7CC Ll:A7CD Lu:A7DA Ll:A7DB Lu:A7DC Lo:105C0-105F3
    N:10D40-10D49 Lo:10D4A-10D4D Lm:10D4E Lo:10D4F Lu:10D50-10D65 M:10D69-10D6D Lm:10D6F
    Ll:10D70-10D85 Lo:10EC2-10EC4 M:10EFC-10EFF Lo:1123F-11240 M:11241 Lo:11380-11389 Lo:1138B
    Lo:1138E Lo:11390-113B5 Lo:113B7 M:113B8-113C0 M:113C2 M:113C5 M:113C7-113CA M:113CC-113D0
    Lo:113D1 M:113D2 Lo:113D3 M:113E1-113E2 N:116D0-116E3 Lo:11BC0-11BE0 N:11BF0-11BF9
    M:11F00-11F01 Lo:11F02 M:11F03 Lo:11F04-11F10 Lo:11F12-11F33 M:11F34-11F3A M:11F3E-11F42
    N:11F50-11F59 M:11F5A Lo:1342F M:13440 Lo:13441-13446 M:13447-13455 Lo:13460-143FA
    Lo:16100-1611D M:1611E-1612F N:16130-16139 Lm:16D40-16D42 Lo:16D43-16D6A Lm:16D6B-16D6C
    N:16D70-16D79 Lo:18CFF Lo:1B132 Lo:1B155 N:1CCF0-1CCF9 N:1D2C0-1D2D3 Ll:1DF25-1DF2A
    Lm:1E030-1E06D M:1E08F Lo:1E4D0-1E4EA Lm:1E4EB M:1E4EC-1E4EF N:1E4F0-1E4F9 Lo:1E5D0-1E5ED
    M:1E5EE-1E5EF Lo:1E5F0 N:1E5F1-1E5FA Lo:2B739 Lo:2EBF0-2EE5D Lo:31350-323AF
"""


def span(text):
    """The code points of "2028" or "2028-2029"."""
    first, _, last = text.partition("-")
    return range(int(first, 16), int(last or first, 16) + 1)


def classify():
    """One byte per code point: its class."""
    classes = bytearray(N_CODE_POINTS)
    for c in range(N_CODE_POINTS):
        category = unicodedata.category(chr(c))
        classes[c] = CLASSES.get(category, CLASSES.get(category[0], OTHER))
    for entry in ADDED.split():
        name, _, where = entry.partition(":")
        for c in span(where):
            classes[c] = CLASSES[name]
    for where in WHITE_SPACE.split():
        for c in span(where):
            classes[c] = SPACE
    return bytes(classes)


def alternating(c, kind):
    """The class of code point c inside a run of kind ALT (upper when even) or ALT_ODD."""
    return LU if c % 2 == (kind == ALT_ODD) else LL


def encode(classes, first, end):
    """The shortest list of (kind, length) from FIRST to END: each run is the one that lasts longest."""
    runs = []
    c = first
    while c < end:
        best, best_end = None, c
        for kind in (classes[c], ALT, ALT_ODD):
            last = c
            while last < end and classes[last] == (
                    kind if kind < ALT else alternating(last, kind)):
                last += 1
            if last > best_end:  # a plain class comes first, so it wins a tie
                best, best_end = kind, last
        runs.append((best, best_end - c))
        c = best_end
    return runs


DIGITS = "".join(chr(c) for c in range(35, 127) if chr(c) not in "?\\\\")  # in a C string as they are
BLOCK = 512  # code points between two marks
LAST = 0x20000  # where the last block begins, which goes on to the end


def write_run(kind, length):
    """A run in characters: kind * 8 + length where that is 1 to 7; else kind * 8, then the length in
    digits of base 45, the last of them plus 45."""
    if length < 8:
        return DIGITS[kind * 8 + length]
    digits = []
    while length:
        digits.append(length % 45)
        length //= 45
    digits[0] += 45
    return DIGITS[kind * 8] + "".join(DIGITS[d] for d in reversed(digits))


def read_class(text, marks, code):
    """As the C code reads the table."""
    block = min(code, LAST) // BLOCK
    at = DIGITS.index(marks[2 * block]) * 90 + DIGITS.index(marks[2 * block + 1])
    left = code - block * BLOCK
    while True:
        kind, length = divmod(DIGITS.index(text[at]), 8)
        at += 1
        last = length != 0
        while not last:
            digit = DIGITS.index(text[at])
            at += 1
            last = digit >= 45
            length = length * 45 + digit % 45
        if left < length:
            return alternating(code, kind) if kind >= ALT else kind
        left -= length


def make_table(classes):
    """The runs of all blocks, those of equal blocks once, and where each block begins."""
    text, marks = "", ""
    for first in range(0, LAST + 1, BLOCK):
        end = first + BLOCK if first < LAST else N_CODE_POINTS
        runs = "".join(write_run(*run) for run in encode(classes, first, end))
        if runs not in text:
            text += runs
        at = text.index(runs)
        marks += DIGITS[at // 90] + DIGITS[at % 90]
    return text, marks


def print_string(name, text):
    lines = [text[i:i + 93] for i in range(0, len(text), 93)]
    print("static const char %s[] =" % name)
    for line in lines:
        print('    "%s"%s' % (line, ";" if line is lines[-1] else ""))


def print_table(text, marks):
    print("/* Made by tools/unicode.py: Unicode %s, as in Hugging Face tokenizers' regex engine. Runs"
          % UNICODE_VERSION)
    print(" * of code points, each a character, class * 8 + length; or, where the length is not 1 to 7,")
    print(" * class * 8 and the length in digits of base 45, the last of them plus 45. Digits are the")
    print(" * characters from # to ~ without ? and \\. Two digits of base 90 are a mark: where the runs of")
    print(" * the next %d code points begin. Equal blocks share them, and one block is all behind U+1FFFF. */"
          % BLOCK)
    print_string("unicode_runs", text)
    print_string("unicode_marks", marks)


def check_against_tokenizers(classes):
    """Ask Hugging Face tokenizers' regex engine about every class and code point."""
    import tokenizers
    from tokenizers import Regex, pre_tokenizers
    characters = [c for c in range(N_CODE_POINTS) if not 0xD800 <= c <= 0xDFFF]
    wrong = 0
    for name, kind in list(CLASSES.items()) + [("s", SPACE)]:
        pattern = r"\s" if kind == SPACE else r"\p{%s}" % name
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        found = set()
        for i in range(0, len(characters), 4096):
            text = "".join(map(chr, characters[i:i + 4096]))
            for piece, _ in split.pre_tokenize_str(text):
                found.update(map(ord, piece))
        for c in characters:
            if (c in found) != (classes[c] == kind):
                print("U+%04X: %s is %s in tokenizers" % (c, pattern, c in found), file=sys.stderr)
                wrong += 1
    print("tokenizers %s: %d differences in %d code points" %
          (tokenizers.__version__, wrong, len(characters)), file=sys.stderr)
    return wrong


def main():
    classes = classify()
    digest = hashlib.sha256(classes).hexdigest()
    if digest != CLASSES_SHA256:
        sys.exit("unicode.py: unicodedata %s does not give the classes of Unicode %s;\n"
                 "use a Python whose unicodedata is 14.0 to 16.0\nfound  %s\nwanted %s" %
                 (unicodedata.unidata_version, UNICODE_VERSION, digest, CLASSES_SHA256))
    text, marks = make_table(classes)
    assert all(read_class(text, marks, c) == classes[c] for c in range(N_CODE_POINTS))
    if "--check" in sys.argv[1:] and check_against_tokenizers(classes):
        sys.exit(1)

    print_table(text, marks)


if __name__ == "__main__":
    main()
