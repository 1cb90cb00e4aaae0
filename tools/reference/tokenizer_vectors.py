#!/usr/bin/env python3
"""Write what Hugging Face tokenizers makes of a varied list of texts, for tests in C.

    pip install tokenizers
    python tools/reference/tokenizer_vectors.py TOKENIZER_JSON OUT

OUT is binary, little-endian, one record after another to the end of the file:

    u32 n_bytes, the text as UTF-8, u32 n_ids, u32 ids[n_ids]

The ids are without BOS, and text that looks like a special token ("<|eot_id|>") is ordinary text:
that is how medrun tokenizes what people write. tokenizers cuts added tokens out of every text, so
the ids come from a copy of tokenizer.json that has only those added tokens that are not special
(Apertus has some, such as "\\begin{"); the property `encode_special_tokens` must give the same.

The list is the same for every tokenizer. It goes through what the Llama-3 and tekken patterns
distinguish (contractions, digits, white space, line ends, punctuation, case), scripts from all over
Unicode, and code points on both sides of the borders between letters, numbers, white space and the
rest: there "aXa" and "!X!" are split in a different way for each of the four.
"""

import json
import random
import struct
import sys

from tokenizers import Regex, Tokenizer, pre_tokenizers

WHITE_SPACE = [9, 10, 11, 12, 13, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000]
NOT_WHITE_SPACE = [0x1C, 0x1D, 0x1E, 0x1F, 0x180E, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0]

ENGLISH = [
    "", "a", " ", "\n", "Hello, world!", "The patient's blood pressure is 138/84 mmHg.",
    "Take 2.5 mg twice daily (b.i.d.) for 10-14 days; max. 5 mg/day.",
    "A 54-year-old woman presents with fever, cough, and shortness of breath.",
    "Which of the following is the most likely diagnosis?\n(A) Asthma\n(B) COPD\n(C) Pneumonia\n",
    "Na+ 138 mmol/L, K+ 4.1 mmol/L, HbA1c 7.2%, SpO2 94 %, T 38.5 °C, CRP <5 mg/L", "pneumonia",
    " pneumonia", "Pneumonia", " electrocardiogram", "electrocardiogram", " electrocardiograms",
    "ology", "pathology", "path", " path", " ology", "hypertension hypertension",
    "https://example.org/a/b?c=d&e=f#g", "user@example.com", "C:\\Users\\me\\file.txt", "a/b/c//d",
    "for (int i = 0; i < n; i++) {\n\tx[i] += y[i] * 0x1F;  // comment\n}\n",
    "def f(x):\n    return x ** 2\n\n\n# end\n", "{\"key\": [1, 2.0, null, \"v\\n\"]}",
    "CamelCaseWords", "camelCase", "XMLHttpRequest", "mRNA", "HbA1c", "pH", "iPhone", "McDonald",
    "ALL CAPS TEXT", "ALLCAPSthenlower", "lowerTHENcaps", "aB", "Ab", "AB", "ABc", "aBC",
    "snake_case_name", "kebab-case-name", "__init__", "-", "--", "---", "...", "\u2026", "?!?!",
]

CONTRACTIONS = [
    "I'm you're he's she'd we've they'll don't it's", "I'M YOU'RE HE'S SHE'D WE'VE THEY'LL DON'T",
    "I'Ll we'Ve you'rE", "'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "'D", "'L", "'l", "'r",
    "'v", "'x", "'sa", "'tab", "'red", "'very", "'mild", "'llama", "'day", "a's's's", "''s", "'''",
    "the patients' rights", "rock 'n' roll", "O'Brien's", "l'h\u00f4pital d'enfants", "1's 2'S",
    "it\u2019s don\u2019t", " 's", "\n's", "'\u017f", "'\u017fa", "he'\u017f", "'\u212a", "'\u1e9e",
    "'\u00df", "'LL'Ll'lL'll",
]

DIGITS = [
    "0", "12", "123", "1234", "12345", "123456", "1234567", "12345678901234567890",
    "a1b22c333d4444", " 1", " 12345", "1,234,567.89", "2024-02-29T23:59:60Z", "+44 20 7946 0958",
    "3.14159", "1/2", "1 2 3", "1  2   3", "007", "0x7fff", "1e-5", "x2", "2x", "10%", "$10", "#1",
    "1st 2nd 3rd", "\u0661\u0662\u0663\u0664", "\u0967\u0968\u0969\u096a\u096b",
    "\uff11\uff12\uff13\uff14", "\u00b2\u00b3\u00b9", "x\u00b2+y\u00b2", "10\u207b\u00b3",
    "H\u2082O CO\u2082", "\u00bd\u00bc", "1\u00bd", "\u2160\u2161\u2162\u2163", "\u2170",
    "\u3007\u4e00\u4e8c", "\u2460\u2461\u2462\u2463", "\u0bf0\u0bf1\u0bf2", "\U00010107\U00010108",
    "\U0001d7ce\U0001d7cf\U0001d7d0\U0001d7d1", "\u19da", "\u0f2a", "1\u0660\u0967\uff11",
    "a\u00b2b", " \u00b2", "12\u00b2\u00b3" "45",
]

SPACES = [
    "  ", "   ", "    ", " " * 7, " " * 64, " a", "  a", "   a", "a ", "a  ", "a   ", "a b", "a  b",
    "a   b", "\t", "\t\t", "\ta", "a\tb", "a\t\tb", " \t a", "\t a", "\r", "\r\n", "\r\n\r\n",
    "a\r\nb", "a\n\nb", "a \n b", "a\n b", "a \nb", "a  \n  b", "\n\n\n", "\n a", " \n", "  \n",
    " \n \n a", "a\n\n\n  b", "\r\r\n\n\r", "\n\t\n\ta", "a \r\n \r\n b", "x\n \n", "x \n  \n   ",
    "\u00a0", "\u00a0\u00a0", " \u00a0", "\u00a0 ", "a\u00a0b", "a\u00a0\u00a0b", "10\u00a0mg",
    "\u2028a", "a\u2028b", "a\u2028\u2028\nb", "\u3000a", "a\u3000\u3000b", "\u3000\n\u3000a",
    "\u2003\u2003a", "a\u202fb", "a\x0bb", "a\x0cb", "a\x85b", "a\x85\x85\nb", "\x0b\x0c a", " .",
    "  .", ". ", ".  ", " \t.", "\t.", "\u00a0.", " 1", "  1", "\t1", "\n1", " \n1", "1 \n",
    "end.  \n\n  Next", "a" + " " * 20 + "b", "a" + "\n" * 20 + "b",
    " " * 3 + "\n" * 3 + " " * 3 + "x",
]

PUNCTUATION = [
    "!\n", "!!\n\n", "!\r\n", " !\n", "a!\nb", "a!\n\nb", "a! \nb", "...\n\n...", "?)\n",
    "\").\n\n", "/\n", "//\n/", "a/\n", "!/\n/", "a./b", "(a)", " (a)", "((a))", "[1]", "{x}",
    "<b>", "</b>", "!a", "!!a", " !a", " !!a", "@a", "#a", "$a", "_a", "a_", "a__b", "-a", "--a",
    "a--b", "!1", "1!", "\u00bfQu\u00e9?", "\u00ab\u00a0a\u00a0\u00bb", "\u201ca\u201d", "\u2014a",
    "a\u2014b", "\u3002\n\u3001", "\u2022 a\n\u2022 b", "\u2192", "\u2264 5", "\u00b5g", "\u03bcg",
    "\u00b1", "=" * 40, "-" * 100 + "\n", "*" * 17 + " a", "!?" * 30, "\u2500" * 12, ". . . .",
    "; ; \n;",
]

SCRIPTS = [
    "\u60a3\u8005\u4e3b\u8bc9\u53d1\u70ed\u4e09\u5929\u3002",
    "\u8840\u5727\u306f138/84\u3067\u3059\u3002",
    "\u30ab\u30bf\u30ab\u30ca\u30fc\u3068\u3072\u3089\u304c\u306a", "\uff8a\uff9d\uff76\uff78",
    "\ud658\uc790\uc758 \ud608\uc555\uc740 \ub192\ub2e4.", "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0627\u0644\u0645\u0631\u064a\u0636 \u064a\u0639\u0627\u0646\u064a "
    "\u0645\u0646 \u062d\u0645\u0649\u061f",
    "\u0627\u0644\u0652\u062d\u064e\u0645\u0652\u062f\u064f", "\u0640\u0640\u0640",
    "\u06f1\u06f2\u06f3",
    "\u0930\u094b\u0917\u0940 \u0915\u094b \u092c\u0941\u0916\u093e\u0930 \u0939\u0948\u0964",
    "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f",
    "\u0939\u093f\u0928\u094d\u0926\u0940\u200d",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0aaa\u0abe\u0aa3\u0ac0", "\u0ba8\u0bcb\u0baf\u0bbe\u0bb3\u0bbf", "\u0c30\u0c4b\u0c17\u0c3f",
    "\u0d30\u0d4b\u0d17\u0d3f",
    "\u0e1c\u0e39\u0e49\u0e1b\u0e48\u0e27\u0e22\u0e21\u0e35\u0e44\u0e02\u0e49",
    "\u0e81\u0eb2\u0e99", "\u1780\u17b6\u179a\u1796\u17b7\u1793\u17b7\u178f\u17d2\u1799",
    "\u101c\u1030\u1014\u102c", "\u0f56\u0f7c\u0f51\u0f0b\u0f61\u0f72\u0f42",
    "\u10de\u10d0\u10ea\u10d8\u10d4\u10dc\u10e2\u10d8", "\u1c90\u1c91\u10d0\u10d1",
    "\u0540\u056b\u057e\u0561\u0576\u0564", "\u1260\u123d\u1270\u129b",
    "\u041f\u0430\u0446\u0438\u0435\u043d\u0442 \u0436\u0430\u043b\u0443\u0435\u0442\u0441\u044f",
    "\u041f\u0410\u0426\u0418\u0415\u041d\u0422", "\u0391\u03c3\u03b8\u03b5\u03bd\u03ae\u03c2",
    "\u1f08\u03c3\u03ba\u03bb\u03b7\u03c0\u03b9\u03cc\u03c2 \u1f88 \u1fbc",
    "\u01c4\u01c5\u01c6 \u01f2x", "\u0130stanbul \u0131\u011f", "Stra\u00dfe STRA\u1e9eE",
    "na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301", "e\u0301\u0323\u0308x", "\u0301a", "a\u0301",
    "A\u030angstro\u0308m", "\u02b0\u02b1\u1d2c a\u02c8b", "Ti\u1ebfng Vi\u1ec7t",
    "Tie\u0302\u0301ng Vie\u0323\u0302t", "\u00e6\u00f8\u00e5 \u00c6\u00d8\u00c5",
    "\u0142\u00f3d\u017a \u010de\u0161tina", "\u00aa\u00ba", "\u13a0\u13a1\uab70\uab71",
    "\u1401\u1402", "\u16a0\u16a2\u16ee", "\u2c00\u2c30", "\ua9c1\ua98f", "\U00010400\U00010428",
    "\U0001e900\U0001e922", "\U00012000\U00012001", "\U00013000\U00013001",
    "\U00020000\U0002a6d6\U0002b740", "\u3400\u4dbf\u9fff", "\U0001d400\U0001d41a\U0001d7cb",
    "\u2102\u210e\u2113", "\u2c7c\ua7f9", "\u00b7 \u0387", "a\u0430\u03b1\u0561",
    "abc\u4e2d\u6587def", "\u4e2d\u65871\u4e2d", "\u4e2d A\u4e2d a\u4e2d",
]

EMOJI_AND_ODD = [
    "\U0001f600", "\U0001f600\U0001f603", " \U0001f600", "a\U0001f600b",
    "\U0001f469\u200d\u2695\ufe0f", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd", "\u2764\ufe0f", "\U0001f1e8\U0001f1ed", "1\ufe0f\u20e3",
    "#\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\u0000", "a\u0000b",
    "\u0000\u0000", " \u0000", "\u0001\u001b[0m", "\u007f", "\ufffd", "\ufeffa", "\ue000",
    "a\ue000b", "\U000f0000", "\U0010ffff", "a\U0010ffffa", "\uffff", "\ufffe", "\ufdd0a", "\u0378",
    "a\u0378a", "\u0378\u0379 !", "\U000e0fff", "\U0003fffe", "\U0001e000", "\u200fa\u200e",
    "\u00ad", "co\u00adoperate", "\u034f", "\u061ca", "\u2066a\u2069", "\u20ac\u20b9\u00a3",
    "\u2122\u00ae", "\u1c89\u1c8a", "\ua7cb\ua7cd", "\U00010d50\U00010d70 \U00010d40",
    "\U0002ebf0\U0002ee5d", "\U00031350", "\U0001e4d0\U0001e4eb\U0001e4f0",
    "a\U00011f00a \U00011f50", "\U00016d43\U00016d70", "\U0001ccf0",
]

SPECIAL_TOKENS = [
    "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>system<|end_header_id|>\n\n", "a<|eot_id|>b", " <|eot_id|> ", "<|eot_id|",
    "|eot_id|>", "<|eot_id|><|eot_id|>", "<|im_start|>user\n", "<s>", "</s>", "[INST] a [/INST]",
    "<unk>", "<0x0A>", "<|reserved_special_token_0|>", "<pad>",
    "\\begin{x} a\\text{b} \\boxed{C}\\end{x}", "\\boxed", "<think>", "[TOOL_CALLS]",
    "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\nSure",
]

LONG = [
    "a" * 2, "a" * 3, "a" * 4, "a" * 5, "a" * 31, "a" * 256, "A" * 33, "ab" * 40, "e" * 1000,
    "aaab" * 25, " a" * 50, "0" * 100, "\u4e2d" * 50, "\u0301" * 20, "\U0001f600" * 20, "\n " * 30,
    "the " * 40, "The patient was seen in the clinic. " * 8, "m" * 63 + "\n", " " * 255 + "a",
]


def character_classes():
    """For every code point L, N, S or other, as the regex engine of tokenizers sees it."""
    classes = ["other"] * 0x110000
    characters = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for pattern in r"\p{L}", r"\p{N}", r"\s":
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        for i in range(0, len(characters), 4096):
            text = "".join(map(chr, characters[i:i + 4096]))
            for piece, _ in split.pre_tokenize_str(text):
                for c in piece:
                    classes[ord(c)] = pattern
    return classes


def pick(generator, items):
    """One of the items; random.random() gives the same stream in every Python."""
    return items[int(generator.random() * len(items))]


def border_texts(n_texts, n_each):
    """Texts that ask for the class of code points on both sides of a border between classes."""
    classes = character_classes()
    borders = []
    for c in range(0x80, 0x110000):
        if classes[c] != classes[c - 1]:
            borders += [x for x in (c - 1, c) if not 0xD800 <= x <= 0xDFFF]
    generator = random.Random(1)
    for _ in range(n_texts):
        chosen = [chr(pick(generator, borders)) for _ in range(n_each)]
        yield "".join("a%sa!%s!" % (c, c) for c in chosen)


def mixed_texts(n):
    """Random strings of units that stand for all that the patterns distinguish."""
    generator = random.Random(2)
    units = ["a", "the", "B", "Xy", "'s", "'T", "'ll", "'", "1", "22", "333", " ", "  ", "\n",
             "\r\n", "\t", "\u00a0", ".", "!", "/", "(", "-", "\u00e9", "\u4e2d", "\u0301",
             "\u0627", "\u0939\u093f", "\u01c5", "\u02b0", "\u00b2", "\u2028", "\U0001f600",
             "\u200d", "\u0410", "\u0431", "\u3000", "\0"]
    for _ in range(n):
        length = 2 + int(generator.random() * 14)
        yield "".join(pick(generator, units) for _ in range(length))


def all_texts():
    texts = (ENGLISH + CONTRACTIONS + DIGITS + SPACES + PUNCTUATION + SCRIPTS + EMOJI_AND_ODD +
             SPECIAL_TOKENS + LONG)
    for c in WHITE_SPACE + NOT_WHITE_SPACE:
        texts.append("a%sa %s!%s%s1%s \n%s" % ((chr(c),) * 6))
        texts.append("!%s! a%s%sa\n%s%s" % ((chr(c),) * 5))
    texts += list(border_texts(8, 64)) + list(mixed_texts(60))
    return list(dict.fromkeys(texts))  # each once, in order


def plain_tokenizer(tokenizer_json):
    """The tokenizer without special tokens and without what would add BOS or EOS."""
    with open(tokenizer_json, encoding="utf-8") as f:
        table = json.load(f)
    table["added_tokens"] = [t for t in table["added_tokens"] if not t["special"]]
    table["post_processor"] = None
    return Tokenizer.from_str(json.dumps(table))


def write_vectors(tokenizer_json, out):
    tokenizer = plain_tokenizer(tokenizer_json)
    other_way = Tokenizer.from_file(tokenizer_json)
    other_way.encode_special_tokens = True
    texts = all_texts()
    with open(out, "wb") as f:
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == other_way.encode(text, add_special_tokens=False).ids, repr(text)
            data = text.encode("utf-8")
            f.write(struct.pack("<I", len(data)) + data)
            f.write(struct.pack("<%dI" % (1 + len(ids)), len(ids), *ids))
    return len(texts)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print("%d texts" % write_vectors(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
