#!/usr/bin/env python3
"""Make the tiny random models in tests/fixtures, and what transformers computes with them.

    pip install torch transformers tokenizers sentencepiece protobuf safetensors numpy
    python tools/reference/make_fixtures.py [OUT_DIR [NAME...]]     (default: tests/fixtures, all)

Folders as Hugging Face has them (config.json, generation_config.json, safetensors in
bfloat16, tokenizer.json, tokenizer_config.json), each with token ids and the float32 logits that
transformers computes for them from the bfloat16 weights, with eager attention:

    llama-plain     1 query head per kv head, rope without scaling, config as Llama-3 8B's
    llama-tied      4 per kv head, tied embedding, llama3 rope in the spelling of transformers 5
    llama-sharded   8 per kv head, llama3 rope in the spelling of transformers 4, two shards
    llama-grouped   4 per kv head and more than one kv head: shows which head reads which
    llama-small     llama3 rope in few bytes, for a GGUF file of it
    mistral-window  a sliding window that prompts pass; SentencePiece BPE as tokenizer.json
    mistral-spm     no window; the tokenizer is a SentencePiece tokenizer.model and nothing else
    arcee-yarn      relu2, yarn in the spelling of transformers 4, a factor that is not the ratio
                    of the contexts; no BOS
    arcee-yarn5     yarn in the spelling of transformers 5, attention factor given, not truncated
    apertus-plain   xIELU, norms of q and k, llama3 rope in the spelling of transformers 4
    apertus-grouped the same in the spelling of transformers 5, several kv heads, a given head_dim

One model of each architecture also has the activations of every stage of every layer for one short
prompt. The folder tokenizer has a larger vocabulary, no model, and the ids of many texts
(tokenizer_vectors.py makes them). OUT_DIR's README.md describes the files.

Each model is computed once more in float64 by the numpy code in `independent_logits`, which uses
nothing of transformers, reads the written files by itself, and must agree: so the fixtures are
what their config says they are.

Everything is seeded with numpy's RandomState, whose streams are frozen: ids and weights come out
the same everywhere, logits up to the rounding of the machine's matrix product.
"""

import io
import json
import os
import struct
import sys

import numpy as np
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)
from transformers import (ApertusConfig, ApertusForCausalLM, ArceeConfig, ArceeForCausalLM,
                          AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          MistralConfig, MistralForCausalLM)

from tokenizer_vectors import write_vectors

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
           "arcee": (ArceeConfig, ArceeForCausalLM),
           "apertus": (ApertusConfig, ApertusForCausalLM)}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

YARN = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
YARN5 = {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 64,
         "beta_fast": 5.0, "beta_slow": 0.5, "attention_factor": 1.1, "truncate": False}

# tokenizer: which function below makes it; window: of attention, None where there is none.
# spelling 4 is how transformers 4 wrote rope and dtype in config.json, 5 how transformers 5 does.
# merges: tokenizer.json has them as "a b" (until 2024) or as ["a", "b"].
MODELS = [
    dict(name="llama-plain", arch="llama", tokenizer="llama3", window=None,
         seed=101, std=0.08, hidden=128, heads=2, kv_heads=2, head_dim=64,
         layers=2, intermediate=320, vocab=283, tied=False, theta=10000.0, scaling=None,
         max_position=512, spelling=4, merges="strings", shard_size="5GB", n_shards=1,
         eos=["<|end_of_text|>"]),
    dict(name="llama-tied", arch="llama", tokenizer="llama3", window=None,
         seed=102, std=0.08, hidden=160, heads=4, kv_heads=1, head_dim=128,
         layers=2, intermediate=224, vocab=301, tied=True, theta=500000.0, scaling=LLAMA3_ROPE,
         max_position=1024, spelling=5, merges="pairs", shard_size="5GB", n_shards=1,
         eos=["<|end_of_text|>", "<|eot_id|>"]),
    dict(name="llama-sharded", arch="llama", tokenizer="llama3", window=None,
         seed=103, std=0.1, hidden=96, heads=8, kv_heads=1, head_dim=64,
         layers=3, intermediate=192, vocab=277, tied=False, theta=500000.0, scaling=LLAMA3_ROPE,
         max_position=512, spelling=4, merges="pairs", shard_size="600KB", n_shards=2,
         eos=["<|end_of_text|>", "<|eot_id|>"]),
    dict(name="llama-grouped", arch="llama", tokenizer="llama3", window=None,
         seed=104, std=0.1, hidden=80, heads=8, kv_heads=2, head_dim=64,
         layers=2, intermediate=96, vocab=269, tied=False, theta=250000.0, scaling=None,
         max_position=512, spelling=5, merges="strings", shard_size="5GB", n_shards=1,
         eos=["<|end_of_text|>", "<|eot_id|>"]),
    dict(name="llama-small", arch="llama", tokenizer="llama3", window=None,
         seed=112, std=0.12, hidden=64, heads=4, kv_heads=2, head_dim=32,
         layers=2, intermediate=96, vocab=275, tied=False, theta=500000.0, scaling=LLAMA3_ROPE,
         max_position=512, spelling=5, merges="pairs", shard_size="5GB", n_shards=1,
         eos=["<|end_of_text|>", "<|eot_id|>"]),
    dict(name="mistral-window", arch="mistral", tokenizer="spm-as-json", window=20,
         seed=105, std=0.12, hidden=64, heads=4, kv_heads=2, head_dim=16,
         layers=2, intermediate=64, vocab=360, tied=False, theta=10000.0, scaling=None,
         max_position=512, spelling=4, merges="strings", shard_size="5GB", n_shards=1,
         eos=["</s>"]),
    dict(name="mistral-spm", arch="mistral", tokenizer="spm", window=None,
         seed=106, std=0.12, hidden=64, heads=6, kv_heads=2, head_dim=16,
         layers=2, intermediate=96, vocab=384, tied=False, theta=1000000.0, scaling=None,
         max_position=512, spelling=5, merges=None, shard_size="5GB", n_shards=1,
         eos=["</s>"]),
    dict(name="arcee-yarn", arch="arcee", tokenizer="chatml", window=None,
         seed=107, std=0.12, hidden=64, heads=2, kv_heads=1, head_dim=32,
         layers=2, intermediate=160, vocab=290, tied=False, theta=10000.0, scaling=YARN,
         max_position=512, spelling=4, merges="pairs", shard_size="5GB", n_shards=1,
         eos=["<|im_end|>"]),
    dict(name="arcee-yarn5", arch="arcee", tokenizer="chatml-bos", window=None,
         seed=108, std=0.11, hidden=80, heads=4, kv_heads=2, head_dim=32,
         layers=2, intermediate=112, vocab=281, tied=False, theta=50000.0, scaling=YARN5,
         max_position=384, spelling=5, merges="strings", shard_size="5GB", n_shards=1,
         eos=["<|im_end|>", "<|end_of_text|>"]),
    dict(name="apertus-plain", arch="apertus", tokenizer="tekken", window=None,
         seed=109, std=0.12, hidden=64, heads=2, kv_heads=1, head_dim=32,
         layers=2, intermediate=160, vocab=310, tied=False, theta=12000000.0, scaling=LLAMA3_ROPE,
         max_position=512, spelling=4, merges="pairs", shard_size="5GB", n_shards=1,
         eos=["</s>", "<|assistant_end|>", "<|tools_suffix|>"]),
    dict(name="apertus-grouped", arch="apertus", tokenizer="tekken", window=None,
         seed=110, std=0.11, hidden=80, heads=4, kv_heads=2, head_dim=32,
         layers=2, intermediate=96, vocab=296, tied=False, theta=500000.0, scaling=LLAMA3_ROPE,
         max_position=512, spelling=5, merges="pairs", shard_size="5GB", n_shards=1,
         eos=["</s>", "<|assistant_end|>", "<|tools_suffix|>"]),
]
EPSILON = 1e-5
PROMPTS = [1, 7, 64, 300]
ROWS_OF_300 = [0, 63, 64, 127, 128, 255, 299]  # of the long prompt only these rows are kept
STAGES = {"llama-tied": 7, "mistral-window": 24, "arcee-yarn": 7, "apertus-plain": 7}

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>"]
CHATML_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>",
                   "<|finetune_right_pad_id|>"]
APERTUS_SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"] + ["<|%s|>" % name for name in (
    "system_start", "system_end", "developer_start", "developer_end", "user_start", "user_end",
    "assistant_start", "assistant_end", "inner_prefix", "inner_suffix", "tools_prefix",
    "tools_suffix")]
SPM_SPECIALS = ["<unk>", "<s>", "</s>"]
APERTUS_ADDED = ["\\begin{", "\\boxed{"]  # added tokens that are not special
WHOLE = ["pneumonia", " pneumonia", " electrocardiogram", "path", " hypertension", "1234", "777",
         "\n\n\n\n", "!?!?", "\u4e2d\u6587", " \u0301"]
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
# What the vocabularies are trained on: written for this purpose, several scripts, code, numbers.
TRAINING_TEXT = """
The patient is a 54 year old woman with fever, cough and shortness of breath for three days.
The blood pressure is 138/84 mmHg and the heart rate is 96 per minute. The lungs are clear.
Which of the following is the most likely diagnosis? What is the next step in the treatment?
The infection is treated with an antibiotic, and the patient's pain is treated with paracetamol.
I'm sure it's fine, but she'd better see the doctor if they don't think we've found the reason.
You're right: he'll be well again. That isn't what the nurse's notes say, they've been changed.
Pathology, cardiology and radiology reported nothing unusual; the biopsy was read twice.
(A) Observation and reassurance (B) Intravenous fluids (C) Surgery (D) None of the above
She takes 2.5 mg twice a day since 2019, then 5 mg, then 10 mg; sodium 138, potassium 4.1.
In 1000 patients there were 123 events, in the other 1000 there were 150 (p = 0.08).
Question: what does the answer depend on?  Answer: on the question, and on who is asking.
for (int i = 0; i < n; i++) { sum += x[i] * y[i]; }    // a loop that adds the products
Ahhhh, that is much better!!! ... aaaah. Well -- no: see the note below, and the table (page 12).
Der Patient klagt über Kopfschmerzen und Übelkeit; die Laborwerte sind unauffällig.
Le patient présente une fièvre élevée, la tension artérielle est normale.
El paciente refiere dolor abdominal; la exploración física es normal en este año.
Пациент жалуется на боль в голове и на боль в груди.
患者发热三天，咳嗽，患者血压正常。患者没有过敏史。
المريض يعاني من الحمى والسعال
रोगी को बुखार है और रोगी को दर्द है
"""

SPACED_TEXT = """
  two spaces, then    four, then        eight: a table   of   values
def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
name        dose      times
aspirin     100 mg    once a day
ramipril    5 mg      twice a day
"""


# ---- the tokenizer ----

def gpt2_alphabet():
    """The 256 printable characters that stand for bytes, in the order of GPT-2's vocabulary."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in own] + [chr(256 + i) for i in range(256 - len(own))]


def byte_characters():
    """The same characters, byte 0 to byte 255."""
    alphabet = gpt2_alphabet()
    of_byte = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], alphabet))
    of_byte.update(zip((b for b in range(256) if b not in of_byte), alphabet[188:]))
    return [of_byte[b] for b in range(256)]


def train_merges(n, pattern):
    """Merges that BPE learns from the text, cut by the pattern if there is one, for n new entries.

    There may be more than n: now and then two merges have the same result, as in Llama-3's list.
    """
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=256 + n, show_progress=False, special_tokens=[],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TRAINING_TEXT.strip().split("\n"), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_level_tokenizer(merges, whole=(), specials=SPECIALS, bos=SPECIALS[0]):
    """A tokenizer built as Meta built Llama-3's: 256 bytes, the merges' results, specials.

    The texts in `whole` stand in the vocabulary without merges that lead to them, as some words
    of Llama-3's do: only ignore_merges finds them, and only where they are a whole piece.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True,
                                          use_regex=False)
    entries = list(dict.fromkeys(gpt2_alphabet() + [a + b for a, b in merges]))
    entries += [byte_level.pre_tokenize_str(text)[0][0] for text in whole]
    assert len(set(entries)) == len(entries)  # what stands in `whole` has no merge
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)},
                                     merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False), byte_level])
    tokenizer.add_special_tokens(specials)
    byte_level = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.post_processor = byte_level if bos is None else processors.Sequence(
        [byte_level, prepend(bos, tokenizer)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def prepend(bos, tokenizer):
    return processors.TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", bos + ":1", "$B:1"],
                                         special_tokens=[(bos, tokenizer.token_to_id(bos))])


def tekken_tokenizer(merges):
    """A tokenizer built as Apertus's: special tokens first, then bytes in order, then merges."""
    specials = APERTUS_SPECIALS[:4] + APERTUS_ADDED + APERTUS_SPECIALS[4:]
    entries = list(dict.fromkeys(specials + byte_characters() + [a + b for a, b in merges]))
    tokenizer = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)},
                                     merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(TEKKEN_PATTERN), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tokenizer.add_special_tokens(APERTUS_SPECIALS)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in APERTUS_ADDED])
    tokenizer.post_processor = prepend("<s>", tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_sentencepiece(n_entries):
    """The bytes of a tokenizer.model with the settings of Mistral 7B's: BPE, byte fallback.

    It learns from the lines in Latin letters, so that there is room for more than characters.
    """
    model = io.BytesIO()
    text = [line for line in (TRAINING_TEXT + SPACED_TEXT).split("\n")
            if line and max(line) < "\u0250"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=n_entries,
        byte_fallback=True, character_coverage=0.98, split_digits=True, num_threads=1,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, minloglevel=2)
    return model.getvalue()


def sentencepiece_as_json(model):
    """The same vocabulary as transformers 4 wrote it to tokenizer.json: a normalizer prepares the
    text, and the merges are all the ways to make a piece of two, best piece first."""
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(model)
    vocab = {p.piece: i for i, p in enumerate(spec.pieces)}
    normal = [p for p in spec.pieces if p.type == p.NORMAL]
    merges = []
    for p in sorted(normal, key=lambda p: -p.score):
        cuts = [(p.piece[:i], p.piece[i:]) for i in range(1, len(p.piece))]
        merges += sorted((c for c in cuts if c[0] in vocab and c[1] in vocab),
                         key=lambda c: (vocab[c[0]], vocab[c[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                 normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPM_SPECIALS])
    tokenizer.post_processor = prepend("<s>", tokenizer)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(content=" ", left=1, right=0)])
    other = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TRAINING_TEXT.split("\n") + SPACED_TEXT.split("\n"):
        if text and text[0] != " ":  # there the two differ, by one piece
            assert tokenizer.encode(text, add_special_tokens=False).ids == other.encode(text), text
    return tokenizer


def tokenizer_for_vectors():
    """A vocabulary in which a wrong split or a wrong merge shows in the ids.

    Merges learned from text that the pattern has cut never cross a cut, so alone they would hide
    wrong cuts. Hence merges learned from uncut text as well, and one for "a" and "!" with each
    byte that can stand next to them: then "aXa" and "!X!" show the class of any character X.
    """
    of_byte = byte_characters()
    controls = [0, 9, 11, 12, 28, 29, 30, 31]
    merges = train_merges(110, LLAMA3_PATTERN) + train_merges(50, None)
    for mark in "a!":
        merges += [(mark, of_byte[b]) for b in [*controls, *range(0xC2, 0xF5)]]
        merges += [(of_byte[b], mark) for b in [*controls, *range(0x80, 0xC0)]]
    return byte_level_tokenizer(list(dict.fromkeys(merges)), WHOLE)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)
        f.write("\n")


def write_tokenizer(folder, tokenizer, merges, settings):
    """tokenizer.json and tokenizer_config.json; merges is "strings" or "pairs"."""
    table = json.loads(tokenizer.to_str())
    if merges == "strings":
        table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
    write_json(os.path.join(folder, "tokenizer.json"), table)
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in t if k != "id"}
                                 for t in table["added_tokens"]},
        **settings, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": settings.get("tokenizer_class", "PreTrainedTokenizerFast")})


LLAMA3_SETTINGS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
                   "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": True}
CHATML_SETTINGS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>",
                   "pad_token": "<|finetune_right_pad_id|>", "clean_up_tokenization_spaces": False}
APERTUS_SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                    "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
SPM_SETTINGS = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True,
                "clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizer"}


def write_spm_tokenizer(folder, model):
    """tokenizer.model and a tokenizer_config.json as the Internist.ai folder has them."""
    with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
        f.write(model)
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "added_tokens_decoder": {str(i): {"content": text, "lstrip": False, "normalized": False,
                                          "rstrip": False, "single_word": False, "special": True}
                                 for i, text in enumerate(SPM_SPECIALS)},
        **SPM_SETTINGS, "model_max_length": 1000000000000000019884624838656})


def make_tokenizer(folder, m):
    """Writes the model's tokenizer into its folder; returns the ids that config.json names."""
    n, kind = m["vocab"], m["tokenizer"]
    if kind == "llama3":
        tokenizer = byte_level_tokenizer(train_merges(n - 256 - len(SPECIALS), LLAMA3_PATTERN))
        settings = LLAMA3_SETTINGS
    elif kind in ("chatml", "chatml-bos"):
        merges = train_merges(n - 256 - len(CHATML_SPECIALS), LLAMA3_PATTERN)
        bos = CHATML_SPECIALS[0] if kind == "chatml-bos" else None
        tokenizer = byte_level_tokenizer(merges, specials=CHATML_SPECIALS, bos=bos)
        settings = CHATML_SETTINGS
    elif kind == "tekken":
        merges = train_merges(n - len(APERTUS_SPECIALS + APERTUS_ADDED) - 256, TEKKEN_PATTERN)
        tokenizer, settings = tekken_tokenizer(merges), APERTUS_SETTINGS
    else:
        model = train_sentencepiece(n)
        tokenizer, settings = sentencepiece_as_json(model), SPM_SETTINGS
    if kind == "spm":
        write_spm_tokenizer(folder, model)
    else:
        write_tokenizer(folder, tokenizer, m["merges"], settings)
    assert tokenizer.get_vocab_size() == n
    return {"bos_token_id": tokenizer.token_to_id(settings["bos_token"]),
            "eos_token_id": [tokenizer.token_to_id(t) for t in m["eos"]],
            "pad_token_id": tokenizer.token_to_id(settings.get("pad_token", ""))}


# ---- the model's folder ----

def make_config(m, special):
    eos = special["eos_token_id"]
    more = {} if m["arch"] == "llama" else {"pad_token_id": special["pad_token_id"]}
    if m["arch"] == "mistral":
        more["sliding_window"] = m["window"]
    if m["heads"] * m["head_dim"] != m["hidden"] or m["arch"] == "llama":
        more["head_dim"] = m["head_dim"]
    return CLASSES[m["arch"]][0](
        vocab_size=m["vocab"], hidden_size=m["hidden"], intermediate_size=m["intermediate"],
        num_hidden_layers=m["layers"], num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"], rms_norm_eps=EPSILON,
        max_position_embeddings=m["max_position"], tie_word_embeddings=m["tied"],
        rope_parameters=dict(m["scaling"] or {"rope_type": "default"}, rope_theta=m["theta"]),
        bos_token_id=special["bos_token_id"], eos_token_id=eos if eos[1:] else eos[0], **more)


def randomise(model, seed, std):
    """Matrices normal with the given standard deviation, norm weights even in 0.5 to 1.5.

    With inputs of about unit size, std * sqrt(K) is near 1: queries, keys and logits are then of
    order one, so that attention is not uniform and no logit is close to zero by accident.
    """
    random = np.random.RandomState(seed)
    for name, p in sorted(model.named_parameters()):
        if p.dim() == 1:
            values = random.uniform(0.5, 1.5, size=tuple(p.shape))
        else:
            values = random.standard_normal(tuple(p.shape)) * std
        p.data.copy_(torch.from_numpy(values))
    for name, p in sorted(model.named_buffers()):  # xIELU's; eps large enough to show
        if name.endswith((".beta", ".eps")):
            low, high = (0.2, 0.9) if name.endswith(".beta") else (-0.02, -0.005)
            p.data.fill_(random.uniform(low, high))


def write_old_spelling(folder, m):
    """Rewrite config.json as transformers 4 wrote it, by hand: the library writes only the new."""
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        c = json.load(f)
    del c["rope_parameters"], c["dtype"], c["transformers_version"]
    if m["arch"] == "apertus":  # stand in the published file and say nothing new
        c.update(hidden_dropout=0.0, mlp_bias=False, post_norm=False, qk_norm=True)
    c["rope_theta"] = m["theta"]
    c["rope_scaling"] = m["scaling"]
    c["torch_dtype"] = "bfloat16"
    if m["heads"] * m["head_dim"] == m["hidden"]:
        c.pop("head_dim", None)  # Llama-3 8B's file has none: it follows from hidden_size and heads
    write_json(path, dict(sorted(c.items())))


def write_model(folder, m):
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    config = make_config(m, make_tokenizer(folder, m))
    model = CLASSES[m["arch"]][1](config)
    randomise(model, m["seed"], m["std"])
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=True,
        temperature=0.6, top_p=0.9)
    model.save_pretrained(folder, max_shard_size=m["shard_size"])
    shards = [f for f in os.listdir(folder) if f.endswith(".safetensors")]
    assert len(shards) == m["n_shards"], shards
    for shard in shards:
        os.chmod(os.path.join(folder, shard), 0o644)
    if m["spelling"] == 4:
        write_old_spelling(folder, m)


def load_model(folder, m):
    """What transformers makes of the written folder, in float32; the config must have survived."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    c = model.config
    rope = c.rope_parameters
    assert rope["rope_theta"] == m["theta"]
    assert model.model.layers[0].self_attn.head_dim == m["head_dim"]
    assert getattr(c, "sliding_window", None) == m["window"]
    assert rope["rope_type"] == (m["scaling"] or {"rope_type": "default"})["rope_type"]
    for key, value in (m["scaling"] or {}).items():
        assert rope[key] == value, key
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == m["tied"]
    return model


# ---- what transformers computes ----

# of a layer before attention and before the feed-forward; the second name of each is Apertus's
NORMS = (("input_layernorm", "attention_layernorm"),
         ("post_attention_layernorm", "feedforward_layernorm"))


def prompt_ids(m, n):
    """n random ids; every prompt has the last id, all but the shortest have id 0 as well."""
    ids = np.random.RandomState(m["seed"] * 1000 + n).randint(0, m["vocab"], size=n)
    ids[n // 2] = m["vocab"] - 1
    if n > 1:
        ids[1] = 0
    return ids.astype("<i4")


def logits_of(model, ids):
    with torch.no_grad():
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        return model(batch, use_cache=False).logits[0].numpy()


class Stages:
    """Collects (name, layer, 2-d float32 array) in the order of the forward pass, by hooks."""

    def __init__(self, model):
        self.list = []
        self.layer = -1
        inner = model.model
        inner.embed_tokens.register_forward_hook(lambda _, i, out: self.add("embed", out, -1))
        for number, layer in enumerate(inner.layers):
            self.watch(number, layer)
        inner.norm.register_forward_hook(lambda _, i, out: self.add("final_norm", out, -1))
        model.lm_head.register_forward_hook(lambda _, i, out: self.add("logits", out, -1))

        # q and k after rope are in no module's output: stand around the function that makes them.
        module = sys.modules[type(model).__module__]
        rope = module.apply_rotary_pos_emb

        def watched_rope(q, k, *rest, **named):
            q, k = rope(q, k, *rest, **named)
            for name, x in ("q", q), ("k", k):  # (1, heads, tokens, head_dim)
                self.add(name, x.transpose(1, 2).flatten(2), self.layer)
            return q, k
        module.apply_rotary_pos_emb = watched_rope

    def watch(self, number, layer):
        def output(name):
            return lambda _, i, out: self.add(name, out, number)

        def first_input(name):
            return lambda _, i: self.add(name, i[0], number)

        def enter(_, i):
            self.layer = number
        attn_norm, ffn_norm = (getattr(layer, name, None) or getattr(layer, other)
                               for name, other in NORMS)
        attn_norm.register_forward_pre_hook(enter)
        attn_norm.register_forward_hook(output("attn_norm"))
        layer.self_attn.v_proj.register_forward_hook(output("v"))
        layer.self_attn.o_proj.register_forward_pre_hook(first_input("attn_out"))
        ffn_norm.register_forward_pre_hook(first_input("attn_resid"))
        ffn_norm.register_forward_hook(output("ffn_norm"))
        layer.mlp.down_proj.register_forward_pre_hook(first_input("ffn_act"))
        layer.register_forward_hook(output("layer_out"))

    def add(self, name, tensor, layer):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        self.list.append((name, layer, tensor[0].detach().numpy().copy()))

    def write(self, folder, n):
        offset = 0
        with open(os.path.join(folder, "stages_%d.f32" % n), "wb") as data, \
                open(os.path.join(folder, "stages_%d.txt" % n), "w", encoding="utf-8") as index:
            for name, layer, array in self.list:
                rows, cols = array.shape
                index.write("%s %d %d %d %d\n" % (name, layer, rows, cols, offset))
                data.write(array.astype("<f4").tobytes())
                offset += array.size


# ---- the same numbers from the files alone, in float64, without transformers ----

def read_safetensors(folder):
    tensors = {}
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
        with open(os.path.join(folder, file), "rb") as f:
            blob = f.read()
        (n,) = struct.unpack("<Q", blob[:8])
        for name, t in json.loads(blob[8:8 + n]).items():
            if name != "__metadata__":
                assert t["dtype"] == "BF16"
                first, last = t["data_offsets"]
                bits = np.frombuffer(blob[8 + n + first:8 + n + last], "<u2").astype(np.uint32)
                tensors[name] = (bits << 16).view(np.float32).reshape(t["shape"]).astype(float)
    return tensors


def independent_frequencies(m):
    """(head_dim / 2) radians a position, and the factor of cosine and sine."""
    frequency = m["theta"] ** (-np.arange(0, m["head_dim"], 2) / m["head_dim"])
    scaling = m["scaling"]
    if scaling is None:
        return frequency, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    turns = original * frequency / (2 * np.pi)  # how often this pair turns in that context
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share, scale = np.clip((turns - low) / (high - low), 0, 1), 1.0
    else:
        # the pair, a fraction of it even, that turns so often; those between are mixed
        first, last = (m["head_dim"] * np.log(original / (2 * np.pi * scaling[beta])) /
                       (2 * np.log(m["theta"])) for beta in ("beta_fast", "beta_slow"))
        if scaling.get("truncate", True):
            first, last = np.floor(first), np.ceil(last)
        first = max(first, 0)
        share = 1 - np.clip((np.arange(len(frequency)) - first) / (last - first), 0, 1)
        scale = scaling.get("attention_factor", 0.1 * np.log(factor) + 1)
    return share * frequency + (1 - share) * frequency / factor, scale


def independent_activation(x, matrix, tensor):
    """What goes into down_proj: silu(gate) * up, relu(up)^2, or xIELU(up)."""
    up = x @ matrix("mlp.up_proj")
    gate = matrix("mlp.gate_proj")
    if gate is not None:
        gate = x @ gate
        return gate / (1 + np.exp(-gate)) * up
    alpha_p, alpha_n, beta, eps = (tensor("mlp.act_fn." + name) for name in (
        "alpha_p", "alpha_n", "beta", "eps"))
    if alpha_p is None:
        return np.maximum(up, 0) ** 2
    assert np.abs(up).min() > 2e-6  # at 0 the function jumps by about eps: no rounding may do that
    positive, negative = np.log1p(np.exp(alpha_p)), beta + np.log1p(np.exp(alpha_n))
    return beta * up + np.where(up > 0, positive * up ** 2,
                                negative * (np.expm1(np.minimum(up, eps)) - up))


def independent_logits(folder, m, ids):
    w = read_safetensors(folder)
    n, heads, kv_heads, dim = len(ids), m["heads"], m["kv_heads"], m["head_dim"]

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * weight

    frequency, scale = independent_frequencies(m)
    angle = np.arange(n)[:, None, None] * frequency
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale

    def rope(x):  # (tokens, heads, dim): the first half of a head turns with the second
        a, b = x[..., :dim // 2], x[..., dim // 2:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    h = w["model.embed_tokens.weight"][ids]
    distance = np.arange(n)[:, None] - np.arange(n)
    hidden = np.where((distance < 0) | (distance >= (m["window"] or n)), -np.inf, 0)
    for i in range(m["layers"]):
        def tensor(name):
            return w.get("model.layers.%d.%s" % (i, name))

        def matrix(name):
            weight = tensor(name + ".weight")
            return None if weight is None else weight.T

        attn_norm, ffn_norm = (next(t for t in map(matrix, names) if t is not None)
                               for names in NORMS)
        x = norm(h, attn_norm)
        q = (x @ matrix("self_attn.q_proj")).reshape(n, heads, dim)
        k = (x @ matrix("self_attn.k_proj")).reshape(n, kv_heads, dim)
        v = (x @ matrix("self_attn.v_proj")).reshape(n, kv_heads, dim)
        if m["arch"] == "apertus":
            q, k = norm(q, matrix("self_attn.q_norm")), norm(k, matrix("self_attn.k_norm"))
        q, k = rope(q), rope(k)
        out = np.empty_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            score = q[:, head] @ k[:, group].T / np.sqrt(dim) + hidden
            p = np.exp(score - score.max(axis=1, keepdims=True))
            out[:, head] = p / p.sum(axis=1, keepdims=True) @ v[:, group]
        h = h + out.reshape(n, heads * dim) @ matrix("self_attn.o_proj")
        h = h + independent_activation(norm(h, ffn_norm), matrix, tensor) @ matrix("mlp.down_proj")
    head = w["model.embed_tokens.weight" if m["tied"] else "lm_head.weight"]
    return norm(h, w["model.norm.weight"]) @ head.T


def relative_l2(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def write_tokenizer_fixture(folder):
    """tests/fixtures/tokenizer: a tokenizer without a model, and what it makes of many texts."""
    os.makedirs(folder, exist_ok=True)
    tokenizer = tokenizer_for_vectors()
    write_tokenizer(folder, tokenizer, "pairs", LLAMA3_SETTINGS)
    n = write_vectors(os.path.join(folder, "tokenizer.json"), os.path.join(folder, "vectors.bin"))
    print("tokenizer: %d entries, %d texts" % (tokenizer.get_vocab_size(), n))


def write_logits(folder, m, model, n, name="logits_%d.f32"):
    ids = prompt_ids(m, n)
    logits = logits_of(model, ids)
    error = relative_l2(logits, independent_logits(folder, m, ids))
    assert logits.shape == (n, m["vocab"]) and error < 1e-5
    print("%-15s %3d tokens: logits of rms %.3f, relative L2 to numpy float64 %.2e, "
          "%d different argmax" % (m["name"], n, np.sqrt((logits ** 2).mean()), error,
                                   len(set(logits.argmax(axis=1)))))
    kept = logits[ROWS_OF_300] if n == 300 else logits
    ids.tofile(os.path.join(folder, "ids_%d.i32" % n))
    kept.astype("<f4").tofile(os.path.join(folder, name % n))


def write_stages(folder, m, model, n):
    ids = prompt_ids(m, n)
    before = logits_of(model, ids)
    stages = Stages(model)
    assert (logits_of(model, ids) == before).all()
    ids.tofile(os.path.join(folder, "ids_%d.i32" % n))
    stages.write(folder, n)


def main():
    out_dir = sys.argv[1] if len(sys.argv) > 1 else os.path.join("tests", "fixtures")
    names = sys.argv[2:] or ["tokenizer"] + [m["name"] for m in MODELS]
    if "tokenizer" in names:
        write_tokenizer_fixture(os.path.join(out_dir, "tokenizer"))
    torch.set_num_threads(1)  # one order of additions
    for m in (m for m in MODELS if m["name"] in names):
        folder = os.path.join(out_dir, m["name"])
        write_model(folder, m)
        model = load_model(folder, m)
        for n in PROMPTS:
            write_logits(folder, m, model, n)
        if m["name"] in STAGES:
            write_stages(folder, m, model, STAGES[m["name"]])
        if m["scaling"] is YARN:  # what transformers 4 computed: the factor is a ratio of contexts
            ratio = m["max_position"] / YARN["original_max_position_embeddings"]
            other = dict(m, scaling=dict(YARN, factor=ratio))
            model.config.rope_parameters["factor"] = ratio
            model = AutoModelForCausalLM.from_pretrained(folder, config=model.config,
                                                         dtype=torch.float32).eval()
            write_logits(folder, other, model, 300, "logits_%d_ratio.f32")


if __name__ == "__main__":
    main()
