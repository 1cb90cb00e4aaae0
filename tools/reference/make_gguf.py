#!/usr/bin/env python3
"""Write a Hugging Face folder as GGUF, the way llama.cpp's converter lays it out.

    pip install gguf numpy sentencepiece protobuf
    python tools/reference/make_gguf.py HF_FOLDER OUT.gguf [--type TYPE] [--tensor PATTERN=TYPE]...
    python tools/reference/make_gguf.py --fixtures [tests/fixtures]

TYPE is F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1, made by gguf's own quantizers. For Q4_K,
Q5_K and Q6_K gguf has none: the blocks are random, of about the size of the tensor's numbers, and
the model is one of its own. --tensor gives the tensors whose name contains PATTERN another type;
the last one counts. Tensors with one dimension are F32, and rows that do not divide into blocks are
F16.

Architectures: Llama and Mistral (both "llama"), Arcee, Apertus. The rows of q_proj and k_proj are
reordered for llama and arcee, so that a rotated pair is adjacent. What the format has no place for
is lost, as in llama.cpp: Mistral's sliding window, yarn's mscale and truncate, the second and
further end tokens. One thing is said that the converter leaves out: add_bos_token false where the
tokenizer adds none. Tensors pass through memory one by one, in parts.

--fixtures makes tests/fixtures/gguf; the README.md there says what is in it.
"""

import argparse
import json
import os
import shutil
import struct
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama",
                 "ArceeForCausalLM": "arcee", "ApertusForCausalLM": "apertus"}
NAMES = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
         "model.norm.weight": "output_norm.weight"}
LAYER_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
               "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
               "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
               "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
               "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
               "attention_layernorm": "attn_norm", "feedforward_layernorm": "ffn_norm"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15,
              "Q5_K": 17, "Q6_K": 18, "BF16": 32}
RANDOM_TYPES = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
TEKKEN_MARK = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
CHUNK = 1 << 24  # numbers in memory at a time


# ---- the folder ----

class Tensor:
    """One tensor of a safetensors file: shape, and rows as float32 when asked for."""

    def __init__(self, path, start, about):
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[about["dtype"]]
        self.shape, self.bf16 = tuple(about["shape"]), about["dtype"] == "BF16"
        self.data = np.memmap(path, kind, "r", start + about["data_offsets"][0],
                              shape=self.shape or (1,))

    def rows(self, which):
        values = self.data[which]
        if self.bf16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


def read_tensors(folder):
    tensors = {}
    for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
        path = os.path.join(folder, file)
        with open(path, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(n))
        tensors.update((name, Tensor(path, 8 + n, about)) for name, about in header.items()
                       if name != "__metadata__")
    return tensors


def read_json(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def rope_of(config):
    """The rope block in the spelling of transformers 5, from either spelling."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)     # transformers' default
    return rope


# ---- metadata ----

def add_config(w, config):
    rope = rope_of(config)
    heads = config["num_attention_heads"]
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(config.get("num_key_value_heads") or heads)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        w.add_key_length(config["head_dim"])
        w.add_value_length(config["head_dim"])
    w.add_vocab_size(config["vocab_size"])
    w.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("attention_factor", w.add_rope_scaling_yarn_attn_factor),
                         ("beta_fast", w.add_rope_scaling_yarn_beta_fast),
                         ("beta_slow", w.add_rope_scaling_yarn_beta_slow)):
            if rope.get(key) is not None:
                add(rope[key])


def rope_divisors(config):
    """What each frequency is divided by under llama3 scaling, in float32; None without."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    one = np.float32(1)
    frequency = one / (np.float32(rope["rope_theta"]) **
                       (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))
    length = np.float32(2 * np.pi) / frequency
    original, factor = rope["original_max_position_embeddings"], np.float32(rope["factor"])
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (np.float32(original) / length - np.float32(low)) / np.float32(high - low)
    mixed = one / ((one - smooth) / factor + smooth)
    return np.where(length < original / high, one, np.where(length > original / low, factor, mixed))


def add_xielu(w, tensors, n_layers):
    for name in ("alpha_p", "alpha_n", "beta", "eps"):
        values = [tensors["model.layers.%d.mlp.act_fn.%s" % (i, name)].rows(slice(None))
                  for i in range(n_layers)]
        getattr(w, "add_xielu_" + name)([float(v.ravel()[0]) for v in values])


def added_to_model(folder):
    """Tokens beside a tokenizer.model, {id: (text, type)}, as llama.cpp's converter sees them."""
    config = read_json(folder, "tokenizer_config.json")
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        return {int(i): (t["content"], 3 if t.get("special") else 4) for i, t in decoder.items()}
    return {i: (text, 4) for text, i in read_json(folder, "added_tokens.json").items()}


def filled_up(entries, n):
    """The list of all entries, {id: (text, type, score)}; what has no text is called [PAD7]."""
    return [entries.get(i, ("[PAD%d]" % i, 5, -10000.0)) for i in range(max(n, max(entries) + 1))]


def add_sentencepiece(w, folder, n):
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto()
    with open(os.path.join(folder, "tokenizer.model"), "rb") as f:
        model.ParseFromString(f.read())
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    entries = {i: (p.piece, int(p.type), float(p.score)) for i, p in enumerate(model.pieces)}
    for i, (text, kind) in added_to_model(folder).items():
        entries.setdefault(i, (text, kind, -1000.0))
    entries = filled_up(entries, n)
    w.add_token_list([text.encode("utf-8") for text, _, _ in entries])
    w.add_token_scores([score for _, _, score in entries])
    w.add_token_types([kind for _, kind, _ in entries])  # the same numbers
    w.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)


def add_sentencepiece_json(w, table):
    """A SentencePiece vocabulary without scores, in tokenizer.json: the order of merges gives them.
    """
    vocab = sorted(table["model"]["vocab"].items(), key=lambda item: item[1])
    added = {t["content"]: t for t in table["added_tokens"]}
    rank = {}
    for i, pair in enumerate(table["model"]["merges"]):
        rank.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), i)
    types = []
    for text, _ in vocab:
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types.append(2 if text == table["model"]["unk_token"] else 3 if text in added else
                     6 if is_byte else 1)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([text.encode("utf-8") for text, _ in vocab])
    w.add_token_scores([-float(rank.get(text, len(rank))) if kind == 1 else 0.0
                        for (text, _), kind in zip(vocab, types)])
    w.add_token_types(types)
    w.add_add_space_prefix(True)


def add_byte_level(w, table, n):
    entries = {i: (text, 1, 0) for text, i in table["model"]["vocab"].items()}
    for t in table["added_tokens"]:
        entries[t["id"]] = (t["content"], 3 if t["special"] else 4, 0)
    entries = filled_up(entries, n)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("tekken" if TEKKEN_MARK in json.dumps(table["pre_tokenizer"]).replace(
        "\\\\", "\\") else "llama-bpe")
    w.add_token_list([entries[i][0].encode("utf-8") for i in range(len(entries))])
    w.add_token_types([entries[i][1] for i in range(len(entries))])


def add_tokenizer(w, folder, n):
    table = read_json(folder, "tokenizer.json")
    byte_level = False
    if os.path.exists(os.path.join(folder, "tokenizer.model")):
        add_sentencepiece(w, folder, n)
    elif table["model"].get("byte_fallback"):
        add_sentencepiece_json(w, table)
    else:
        add_byte_level(w, table, n)
        byte_level = True
    # bos, eos and others from tokenizer_config.json and config.json; merges; the chat template
    special = gguf.SpecialVocab(folder, load_merges=byte_level)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(w, quiet=True)


# ---- tensors ----

def gguf_name(name):
    """The name in GGUF; None for what does not become a tensor."""
    if name in NAMES:
        return NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    if rest.startswith("mlp.act_fn.") or rest.endswith("rotary_emb.inv_freq"):
        return None
    return "blk.%s.%s.weight" % (layer, LAYER_NAMES[rest.removesuffix(".weight")])


def random_blocks(kind, rows, blocks, size, random):
    """Random bytes in the form of KIND with scales that make numbers of about SIZE."""
    type_size = gguf.GGML_QUANT_SIZES[kind][1]
    data = random.randint(0, 256, size=(rows, blocks, type_size), dtype=np.uint8)

    def half(at, value):
        spread = random.uniform(0.7, 1.3, size=(rows, blocks, 1)) * value
        data[:, :, at:at + 2] = spread.astype(np.float16).view(np.uint8).reshape(rows, blocks, 2)
    if kind == Type.Q6_K:
        half(208, size / 1300)
    else:
        levels = 7.5 if kind == Type.Q4_K else 15.5
        half(0, size / 25 / levels)
        half(2, size / 25)
    return data.reshape(rows, blocks * type_size)


def permutation(rows, heads):
    """For each row of GGUF's q or k the row of the folder's: pairs that turn become neighbours."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


def encode(tensor, kind, order, random):
    """The bytes (rows, row bytes) of a matrix as KIND, its rows in the order given."""
    n_rows, n_cols = tensor.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((n_rows, n_cols // block * size), np.uint8)
    step = max(1, CHUNK // n_cols)
    for at in range(0, n_rows, step):
        values = tensor.rows(order[at:at + step])
        if kind in RANDOM_TYPES:
            part = random_blocks(kind, len(values), n_cols // block, float(values.std()), random)
        else:
            part = gguf.quantize(values, kind)
        out[at:at + step] = np.ascontiguousarray(part).view(np.uint8).reshape(len(values), -1)
    return out


def type_of(name, shape, kind, choices):
    if len(shape) < 2:
        return Type.F32
    for pattern, other in choices:
        if pattern in name:
            kind = other
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def write_gguf(folder, path, kind, choices=()):
    config = read_json(folder, "config.json")
    arch = ARCHITECTURES[config["architectures"][0]]
    tensors = read_tensors(folder)
    w = gguf.GGUFWriter(path, arch)
    w.add_type("model")
    w.add_name(os.path.basename(os.path.normpath(folder)))
    w.add_file_type(FILE_TYPES[kind.name])
    w.add_quantization_version(2)
    add_config(w, config)
    add_tokenizer(w, folder, config["vocab_size"])
    if arch == "apertus":
        add_xielu(w, tensors, config["num_hidden_layers"])

    divisors = rope_divisors(config)
    if divisors is not None:
        w.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    plan = []
    for name, tensor in tensors.items():
        new = gguf_name(name)
        if new is None or (new == "output.weight" and config.get("tie_word_embeddings")):
            continue
        into = type_of(new, tensor.shape, kind, choices)
        block, size = gguf.GGML_QUANT_SIZES[into]
        plan.append((name, new, into))
        w.add_tensor_info(new, tensor.shape, np.dtype(np.float32),
                          int(np.prod(tensor.shape)) // block * size, raw_dtype=into)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    if divisors is not None:
        w.write_tensor_data(divisors)
    random = np.random.RandomState(1)
    heads = {"attn_q": config["num_attention_heads"],
             "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"]}
    for name, new, into in plan:
        tensor = tensors[name]
        if len(tensor.shape) < 2:
            w.write_tensor_data(np.atleast_1d(tensor.rows(slice(None))))
            continue
        order = np.arange(tensor.shape[0])
        part = new.split(".")[-2]
        if arch != "apertus" and part in heads:
            order = permutation(len(order), heads[part])
        w.write_tensor_data(encode(tensor, into, order, random))
    w.close()


# ---- tests/fixtures/gguf ----

MIXED = dict(name="llama-mixed", arch="llama", tokenizer="llama3", window=None, seed=111, std=0.07,
             hidden=256, heads=2, kv_heads=1, head_dim=32, layers=2, intermediate=96, vocab=269,
             tied=True, theta=10000.0, scaling=None, max_position=512, spelling=4, merges="pairs",
             shard_size="5GB", n_shards=1, eos=["<|end_of_text|>", "<|eot_id|>"])
MIXED_TYPES = [("token_embd", "Q6_K"), ("blk.0.attn_q", "Q4_K"), ("blk.0.attn_k", "Q5_K"),
               ("blk.0.attn_v", "Q6_K"), ("blk.0.attn_output", "Q5_1"), ("blk.0.ffn_gate", "Q5_K"),
               ("blk.0.ffn_up", "Q4_K"), ("blk.0.ffn_down", "Q4_0"), ("blk.1.attn_q", "Q4_0"),
               ("blk.1.attn_k", "Q4_1"), ("blk.1.attn_v", "F32"), ("blk.1.attn_output", "BF16"),
               ("blk.1.ffn_gate", "Q5_0"), ("blk.1.ffn_up", "Q5_1"), ("blk.1.ffn_down", "Q8_0")]
BLOCK_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def dequantize(data, kind):
    return gguf.dequantize(data, kind) if kind != Type.BF16 else (
        data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def write_blocks(folder):
    """Random bit patterns of every type, all finite, and what gguf makes of them."""
    random = np.random.RandomState(7)
    w = gguf.GGUFWriter(os.path.join(folder, "blocks.gguf"), "llama")
    for name in BLOCK_TYPES:
        kind = Type[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.randint(0, 256, size=(4, 512 // block, size), dtype=np.uint8)
        if name in HALVES:
            for at in HALVES[name]:  # every scale may be subnormal, zero, huge or negative
                half = random.randint(0, 1 << 16, size=data.shape[:2]).astype("<u2")
                half[:, 0] = [0x0001, 0x83ff, 0x0000, 0xfbff]
                half &= np.where(half & 0x7c00 == 0x7c00, 0xbfff, 0xffff).astype("<u2")
                data[:, :, at:at + 2] = half.view(np.uint8).reshape(*data.shape[:2], 2)
        else:
            top = data[:, :, -1]  # exponents of ones only are infinities and NaNs
            top[:] = np.where(top & 0x7c == 0x7c, top & 0xbf, top)
        data = data.reshape(4, -1)
        values = dequantize(data, kind)
        assert values.shape == (4, 512) and np.isfinite(values).all()
        values.astype("<f4").tofile(os.path.join(folder, "blocks_%s.f32" % name))
        w.add_tensor("blocks_%s.weight" % name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def to_bf16(x):
    """Rounded to nearest, ties to even: what a bf16 checkpoint of these numbers holds."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def folder_tensors(path, heads, kv_heads):
    """The tensors of a GGUF under the names and in the row order of a folder, in float64."""
    names = {v: k for k, v in NAMES.items()}
    of_layer = {v: k for k, v in LAYER_NAMES.items()
                if not k.startswith(("attention", "feedforward"))}
    tensors = {}
    for t in gguf.GGUFReader(path).tensors:
        values = dequantize(t.data, t.tensor_type).reshape(list(reversed(t.shape.tolist())))
        if t.name in names:
            name = names[t.name]
        else:
            _, layer, part, _ = t.name.split(".")
            name = "model.layers.%s.%s.weight" % (layer, of_layer[part])
            if part in ("attn_q", "attn_k"):
                order = permutation(len(values), heads if part == "attn_q" else kv_heads)
                values = values[np.argsort(order)]
        tensors[name] = (to_bf16(values) if values.ndim > 1 else values).astype(float)
    return tensors


def write_mixed(folder):
    """A model of eleven types, and its logits in float64 from the numbers rounded to bfloat16."""
    import make_fixtures
    path = os.path.join(folder, "llama-mixed.gguf")
    source = tempfile.mkdtemp()
    try:
        make_fixtures.write_model(os.path.join(source, MIXED["name"]), MIXED)
        write_gguf(os.path.join(source, MIXED["name"]), path, Type.F16,
                   [(pattern, Type[name]) for pattern, name in MIXED_TYPES])
    finally:
        shutil.rmtree(source)
    tensors = folder_tensors(path, MIXED["heads"], MIXED["kv_heads"])
    make_fixtures.read_safetensors = lambda _: tensors
    ids = make_fixtures.prompt_ids(MIXED, 64)
    logits = make_fixtures.independent_logits(None, MIXED, ids)
    ids.tofile(os.path.join(folder, "llama-mixed_ids_64.i32"))
    logits.astype("<f4").tofile(os.path.join(folder, "llama-mixed_logits_64.f32"))
    print("llama-mixed: logits of rms %.3f" % np.sqrt((logits ** 2).mean()))


def write_fixtures(fixtures):
    folder = os.path.join(fixtures, "gguf")
    os.makedirs(folder, exist_ok=True)
    for name, kind in (("llama-small", "BF16"), ("mistral-spm", "BF16"), ("arcee-yarn", "BF16"),
                       ("arcee-yarn", "Q8_0"), ("apertus-plain", "BF16")):
        path = os.path.join(folder, "%s-%s.gguf" % (name, kind.lower()))
        write_gguf(os.path.join(fixtures, name), path, Type[kind])
    write_mixed(folder)
    write_blocks(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", nargs="?")
    p.add_argument("out", nargs="?")
    p.add_argument("--type", default="BF16", choices=sorted(FILE_TYPES))
    p.add_argument("--tensor", action="append", default=[], metavar="PATTERN=TYPE")
    p.add_argument("--fixtures", action="store_true")
    o = p.parse_args()
    if o.fixtures:
        return write_fixtures(o.folder or os.path.join("tests", "fixtures"))
    if not o.out:
        p.error("wanted HF_FOLDER OUT.gguf")
    choices = [(pattern, Type[name]) for pattern, name in (t.rsplit("=", 1) for t in o.tensor)]
    write_gguf(o.folder, o.out, Type[o.type], choices)


if __name__ == "__main__":
    main()
