#!/usr/bin/env python3
"""Compare medrun's tokenizer with the reference of its source on many random texts.

    pip install tokenizers sentencepiece
    python tools/reference/compare_tokenizer.py SOURCE [--texts N] [--seed N] [--corpus FILE ...]
        [--lines FILE ...] [--export ./medrun-export]

SOURCE is a tokenizer.json, whose reference is Hugging Face tokenizers, or a tokenizer.model, whose
reference is the SentencePiece library. It is converted by medrun-export, and the engine is compiled
in for speed; so this runs in the project's folder, after `make`. Each line of the files --lines is
one text more.

The texts are mixtures of pieces of the vocabulary, characters of all kinds, white space, special
tokens spelled out, and mutated excerpts of the corpus files. Of each are compared: the ids with
special tokens in the text parsed and not parsed, and the text that its ids and random ids decode to.
The last line says how many differ; the exit code is 1 if any do.
"""

import argparse
import os
import random
import struct
import subprocess
import sys
import tempfile

HARNESS = r"""
#define MEDRUN_NO_MAIN
#include "medrun.c"
/* Records on stdin: u32 flags, u32 n, n bytes of text, or of ids with flags 0x80000000. Out go
 * for a text u32 n, n bytes of ids; then for both u32 n, n bytes of what the ids decode to. */
static void put_buffer(const buffer *b) {
    uint32_t n = (uint32_t)b->n;
    fwrite(&n, 4, 1, stdout);
    if (n) fwrite(b->data, 1, n, stdout);
}
int main(int argc, char **argv) {
    tokenizer t;
    file_map map;
    medrun_error e = {0};
    uint32_t head[2];
    if (argc != 2 || map_file(argv[1], &map, &e) ||
        tokenizer_open(&t, map.data, map.n, argv[1], &e)) return fputs(e.text, stderr), 3;
    while (fread(head, 4, 2, stdin) == 2) {
        uint8_t *in = malloc(head[1] + 1);
        buffer ids = {0}, text = {0};
        if (fread(in, 1, head[1], stdin) != head[1]) return 1;
        if (head[0] >> 31) buffer_add(&ids, in, head[1]);
        else {
            if (tokenizer_encode(&t, (char *)in, head[1], (int)head[0], &ids, &e)) return 1;
            put_buffer(&ids);
        }
        tokenizer_decode(&t, (const int32_t *)(void *)ids.data, ids.n / 4, false, &text);
        put_buffer(&text);
        free(in), buffer_free(&ids), buffer_free(&text);
    }
    return 0;
}
"""

PARSE_SPECIAL, DECODE = 2, 1 << 31
ODD = ["\u2581", "\u2581\u2581", " \u2581", "\u2581 ", "\0", "\ufffd", "\u0301", "\u200d", "\ufe0f",
       "<s>", "</s>", "<unk>", "<0x0A>", "<0x41>", "<", ">", "s>", "<s", "\u2047", " \u2047 "]
WORDS = ["the", "The", "patient", "mg", "HbA1c", "camelCase", "XMLHttp", "don't", "I'LL", "l'",
         "\u00e9t\u00e9", "\u4e2d\u6587", "\u3072\u3089", "\ud55c\uae00", "\u0391\u03b8", "\u041f\u0430",
         "\u0639\u0631\u0628", "\u0939\u093f\u0928\u094d", "\u01c5", "\u02b0", "\u00aa", "\U0001f600",
         "\U0001f469\u200d\u2695\ufe0f", "\u00bd", "\u0661", "12", "3.5", "2024"]
MARKS = list("!?.,;:'\"()[]{}/\\|-_=+*&^%$#@~`<>") + ["...", "//", "--", "\n/", ")\n\n", "!/\r\n"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\u00a0", "\u3000", "\u2028", "\x0b"]


def random_character(r):
    kind = r.random()
    if kind < 0.5:
        return chr(r.randrange(0x20, 0x7F))
    if kind < 0.8:
        return chr(r.randrange(0x80, 0x3000))
    c = r.randrange(0x110000)
    return chr(c) if not 0xD800 <= c < 0xE000 else "\ufffd"


def random_unit(r, pieces, specials):
    kind = r.random()
    if kind < 0.30:
        return r.choice(pieces)
    if kind < 0.45:
        return r.choice(WORDS)
    if kind < 0.65:
        return r.choice(SPACES)
    if kind < 0.75:
        return r.choice(MARKS)
    if kind < 0.80:
        return r.choice(ODD)
    if kind < 0.84:
        return r.choice(specials)
    if kind < 0.88:
        return r.choice("aAe 0.\n\u2581\u4e2d\u0301") * r.randrange(1, 40)
    return random_character(r)


def mutate(r, text):
    text = list(text)
    for _ in range(r.randrange(4)):
        at = r.randrange(len(text) + 1)
        kind = r.random()
        if kind < 0.4:
            text[at:at] = random_character(r)
        elif kind < 0.7:
            del text[at:at + r.randrange(1, 4)]
        else:
            text[at:at] = text[max(0, at - 5):at]
    return "".join(text)


def random_text(r, pieces, specials, corpus):
    if corpus and r.random() < 0.4:
        at = r.randrange(len(corpus))
        return mutate(r, corpus[at:at + r.randrange(1, 200)])
    return "".join(random_unit(r, pieces, specials) for _ in range(r.randrange(1, 12)))


class HuggingFace:
    def __init__(self, path):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(path)
        self.n = self.tokenizer.get_vocab_size()
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.specials = [t.content for t in added]
        self.pieces = [p for p in self.tokenizer.get_vocab()]
        self.can_parse = True

    def encode(self, texts, parse):
        self.tokenizer.encode_special_tokens = not parse
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode_batch(ids, skip_special_tokens=True)


class SentencePiece:
    def __init__(self, path):
        import sentencepiece
        self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        self.n = self.sp.get_piece_size()
        self.pieces = [self.sp.id_to_piece(i) for i in range(self.n)]
        self.specials = [p for i, p in enumerate(self.pieces) if self.sp.is_control(i)]
        self.can_parse = False

    def encode(self, texts, parse):
        return self.sp.encode(texts)

    def decode(self, ids):
        return self.sp.decode(ids)


class Medrun:
    def __init__(self, export, source, folder):
        binary, c = os.path.join(folder, "t.bin"), os.path.join(folder, "harness.c")
        self.command = [os.path.join(folder, "harness"), binary]
        subprocess.run([export, "--tokenizer-only", source, binary], check=True)
        with open(c, "w") as f:
            f.write(HARNESS)
        subprocess.run([os.environ.get("CC", "cc"), "-O1", "-DMEDRUN_SCALAR", "-I.", "-o", self.command[0], c, "-lm",
                        "-lpthread"], check=True)

    def ask(self, records, n_answers):
        data = b"".join(struct.pack("<II", flags, len(x)) + x for flags, x in records)
        out = subprocess.run(self.command, input=data, stdout=subprocess.PIPE, check=True).stdout
        answers, at = [], 0
        while at < len(out):
            n, = struct.unpack_from("<I", out, at)
            answers.append(out[at + 4:at + 4 + n])
            at += 4 + n
        assert len(answers) == len(records) * n_answers
        return answers

    def encode(self, texts, parse):
        flags = PARSE_SPECIAL if parse else 0
        answers = self.ask([(flags, t.encode()) for t in texts], 2)
        return [list(struct.unpack("<%dI" % (len(a) // 4), a)) for a in answers[::2]]

    def decode(self, ids):
        return self.ask([(DECODE, struct.pack("<%dI" % len(i), *i)) for i in ids], 1)


def compare_batch(medrun, reference, texts, r, counts):
    for parse in (False, True) if reference.can_parse else (False,):
        wanted, found = reference.encode(texts, parse), medrun.encode(texts, parse)
        for text, a, b in zip(texts, wanted, found):
            counts["ids"] += 1
            if a != b:
                counts["different"] += 1
                print("ids, parse %s: %a\n  wanted %s\n  found  %s" % (parse, text, a, b))
    ids = [list(a) for a in wanted if a]
    ids += [[r.randrange(reference.n) for _ in range(r.randrange(1, 6))] for _ in texts[::4]]
    for i, a, b in zip(ids, reference.decode(ids), medrun.decode(ids)):
        try:
            b = b.decode()
        except UnicodeDecodeError:
            continue
        if "\ufffd" in a:  # medrun keeps the bytes of what is no character
            continue
        counts["decoded"] += 1
        if a != b:
            counts["different"] += 1
            print("decoded: %s\n  wanted %a\n  found  %a" % (i, a, b))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--texts", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", nargs="*", default=[])
    parser.add_argument("--lines", nargs="*", default=[])
    parser.add_argument("--export", default="./medrun-export")
    args = parser.parse_args()
    r = random.Random(args.seed)
    model = args.source.endswith(".model")
    reference = SentencePiece(args.source) if model else HuggingFace(args.source)
    corpus = "\n".join(open(path, encoding="utf-8").read() for path in args.corpus)
    counts = {"ids": 0, "decoded": 0, "different": 0}
    with tempfile.TemporaryDirectory() as folder:
        medrun = Medrun(args.export, args.source, folder)
        for path in args.lines:
            with open(path, encoding="utf-8", newline="") as f:
                compare_batch(medrun, reference, f.read().split("\n"), r, counts)
        for start in range(0, args.texts, 10000):
            n = min(10000, args.texts - start)
            texts = [random_text(r, reference.pieces, reference.specials, corpus) for _ in range(n)]
            compare_batch(medrun, reference, texts, r, counts)
            if counts["different"] > 20:
                break
    print("%s: %d encodings and %d decodings compared, %d different" %
          (args.source, counts["ids"], counts["decoded"], counts["different"]))
    sys.exit(counts["different"] > 0)


if __name__ == "__main__":
    main()
