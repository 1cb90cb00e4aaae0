#!/usr/bin/env python3
"""Write tests/fixtures/tokenizer: tokenizers of every form, and what their references make of texts.

    pip install torch transformers tokenizers sentencepiece protobuf safetensors numpy
    python tools/reference/make_tokenizers.py tests/fixtures/tokenizer

    tekken.json      byte-level BPE with tekken's pattern, added tokens that are not special
    legacy.json      SentencePiece BPE as transformers 4 wrote it: Prepend and Replace
    metaspace.json   the same as newer files have it: Metaspace, which prepends to the text only
    pieces.model     SentencePiece's own form, with user-defined pieces and many equal scores

NAME.bin beside each is little-endian, one record after another to the end of the file:

    u32 flags, u32 n_bytes, the text as UTF-8, u32 n_ids, u32 ids[n_ids], u32 n_bytes, what they
    decode to

Flags 2: special tokens in the text are parsed. Without BOS. The reference of a .json is Hugging Face
tokenizers, of a .model the SentencePiece library, which parses none. (tokenizer.json and vectors.bin
in the same folder are made by make_fixtures.py.)
"""

import io
import json
import os
import struct
import sys

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, pre_tokenizers

import tokenizer_vectors as texts_of
from make_fixtures import (SPACED_TEXT, TEKKEN_PATTERN, TRAINING_TEXT, byte_characters,
                           sentencepiece_as_json, tekken_tokenizer, train_merges,
                           train_sentencepiece, write_json)

SPACE = "\u2581"
ADDED = ["\\begin{", "<think>", " x", "two words"]
USER_DEFINED = ["<think>", SPACE * 4, "\n", SPACE + "lead", "patient", "\\begin{", "two words", "\u4e2d"]
SPACED = ["", " ", "  ", "a", " a", "  a", "a ", "a  ", "<s>", "<s>a", "<s> a", "a<s>b", "a <s> b",
          " <s> a", "</s>", "<unk>", "a<unk>", "<0x41>", "<0x0A>", "\n", "\na", "a\n\nb", SPACE,
          SPACE + "a", "a" + SPACE + "b", " " + SPACE, SPACE + " a", "\\begin{a}", " \\begin{ a",
          "a\\begin{", "\\begin{\\begin{", "<think>", "a <think> b", " x", "a x", "x x x", "two words",
          "a two words b", "    a", "a     b", "        ", " lead", "lead", "a lead", "  lead", "patient",
          " patient", "patients", "impatient patients", "\u4e2d", "\u4e2d\u4e2da\u4e2d", "a\u4e2d",
          "<think>\n\npatient lead", "<|im_start|>user\nhello<|im_end|>", "\u2047", " \u2047 ", "\0",
          "a\0b", "\ufffd", "\U0010ffff", "e" * 100, "patient" * 20, " the" * 40, "ee " * 30, "\t"]


def tekken():
    """As tokenizer_for_vectors in make_fixtures.py: a wrong split shows in the ids."""
    of_byte = byte_characters()
    controls = [0, 9, 11, 12, 28, 29, 30, 31]
    merges = train_merges(110, TEKKEN_PATTERN) + train_merges(50, None)
    merges += [(of_byte[0xCC], of_byte[0x81]), ("a", "B"), ("A", "B"), ("/", of_byte[10])]
    for mark in "aA!":
        merges += [(mark, of_byte[b]) for b in [*controls, *range(0xC2, 0xF5)]]
        merges += [(of_byte[b], mark) for b in [*controls, *range(0x80, 0xC0)]]
    merges = list(dict.fromkeys(merges))
    return tekken_tokenizer(merges)


def spaced(metaspace):
    tokenizer = sentencepiece_as_json(train_sentencepiece(500))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    if metaspace:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def pieces():
    """Scores are rounded, so that many are equal: then the leftmost pair merges first."""
    model = io.BytesIO()
    text = [line for line in (TRAINING_TEXT + SPACED_TEXT).split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=560,
        byte_fallback=True, character_coverage=0.99, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=USER_DEFINED)
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(model.getvalue())
    for piece in spec.pieces:
        piece.score = piece.score // 40
    return spec.SerializeToString()


def write_records(path, records):
    with open(path, "wb") as f:
        for flags, text, ids, decoded in records:
            data, decoded = text.encode(), decoded.encode()
            f.write(struct.pack("<II", flags, len(data)) + data)
            f.write(struct.pack("<%dI" % (1 + len(ids)), len(ids), *ids))
            f.write(struct.pack("<I", len(decoded)) + decoded)


def json_records(tokenizer, texts):
    for flags in 0, 2:
        tokenizer.encode_special_tokens = not flags
        for text in texts if flags == 0 else SPACED + texts_of.SPECIAL_TOKENS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            yield flags, text, ids, tokenizer.decode(ids)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    spaced_texts = list(dict.fromkeys(SPACED + texts_of.ENGLISH + texts_of.SCRIPTS +
                                      texts_of.SPACES + texts_of.SPECIAL_TOKENS))
    for name, tokenizer, texts in (("tekken", tekken(), texts_of.all_texts()),
                                   ("legacy", spaced(False), spaced_texts),
                                   ("metaspace", spaced(True), spaced_texts)):
        path = os.path.join(sys.argv[1], name)
        write_json(path + ".json", json.loads(tokenizer.to_str()))
        write_records(path + ".bin", json_records(tokenizer, texts))
        print("%s: %d entries" % (name, tokenizer.get_vocab_size()))
    model = pieces()
    with open(os.path.join(sys.argv[1], "pieces.model"), "wb") as f:
        f.write(model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    write_records(os.path.join(sys.argv[1], "pieces.bin"),
                  ((0, t, sp.encode(t), sp.decode(sp.encode(t))) for t in spaced_texts))
    print("pieces: %d entries" % sp.get_piece_size())


if __name__ == "__main__":
    main()
