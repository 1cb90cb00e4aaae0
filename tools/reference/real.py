#!/usr/bin/env python3
"""What `make real` does with a published model's GGUF file, step by step (tests/real.sh).

    real.py folder MODEL.gguf OUT
        Writes the file as a Hugging Face folder: its weights in float32, its vocabulary with the
        pre-tokenizer of SmolLM2's tokenizer.json, its template. Needs gguf, safetensors.

    real.py lines DATA OUT [--limit 10000]
        Writes lines of real text: questions, answers, dialogues and abstracts from DATA/medical.

    real.py text MODEL.gguf MODEL.mdr [--folder HF_FOLDER] [--tokens 48]
        Greedy answers to 20 questions by medrun (--strict) and by llama.cpp, which reads the same
        file: the same text for as long as the two best logits of llama.cpp differ by more than its
        rounding. Where they part, says by how much each side prefers its own token, and with
        --folder also what float32 says. Needs xllamacpp, numpy; for --folder torch, transformers.

    real.py kl DATA REFERENCE MODEL.mdr... [--tokens 8000]
        Mean KL(reference || model) in nats and the share of positions with the same likeliest token,
        on abstracts. REFERENCE is a .mdr, run with --strict, or a Hugging Face folder, run in float32
        by transformers. Exit code 1 above the bound of the model's type. Needs numpy.

--medrun names the program (./medrun).
"""
import argparse
import csv
import glob
import json
import os
import re
import subprocess
import sys
import tempfile

# Mean KL in nats that a checkpoint's type may have, and the least share of the same likeliest token.
BOUNDS = {"bf16": (2e-4, 0.985), "int8": (0.004, 0.95), "int4": (0.2, 0.77)}
# llama.cpp multiplies Q4_1 with activations in 8 bits. By how much that moves the difference of its two
# best logits: of 804 that were seen the largest was 0.73.
ROUNDING = 1.0
QUESTIONS = [
    "What are the symptoms of diabetes?", "How does aspirin work?", "What is blood pressure?",
    "Why do we need vitamin C?", "What should I do about a nosebleed?",
    "Explain what an antibody is in two sentences.", "Which organ makes insulin?",
    "What is the difference between a virus and a bacterium?", "How many bones does an adult have?",
    "List three causes of a headache.", "What does a kidney do?", "Is a fever of 38.5 C dangerous?",
    "What is anaemia, and how is it found?", "How much water should I drink each day?",
    "Name four kinds of white blood cells.", "What happens in the lungs when we breathe?",
    "Write one sentence about sleep.", "How is a broken arm treated?",
    "What is 12 times 7?", "Translate 'good health' into French."]


def run(*command):
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        sys.exit("%s\nended with %d: %s" % (" ".join(command), done.returncode, done.stderr.decode()))
    return done.stdout


# ---- a folder

def part_heads(weight, heads):
    """GGUF has the two halves that turn together side by side in a head, Hugging Face one after the
    other."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def hf_name(name):
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer:
        return "model.layers.%s.%s.weight" % (layer[1], names[layer[2]])
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}[name]


def hf_tokenizer(tokens, types, merges):
    """tokenizer.json of a vocabulary with SmolLM's pre-tokenizer."""
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": kind == 3}
             for i, (t, kind) in enumerate(zip(tokens, types)) if kind in (3, 4)]
    spaces = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", **spaces}]},
            "post_processor": None, "decoder": {"type": "ByteLevel", **spaces},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                      "byte_fallback": False, "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": merges}}


def write_folder(path, out):
    import gguf
    import numpy as np
    from safetensors.numpy import save_file
    reader = gguf.GGUFReader(path)
    at = {name: field.contents() for name, field in reader.fields.items()}
    if at["tokenizer.ggml.pre"] != "smollm" or at["general.architecture"] != "llama":
        sys.exit("%s: wanted a Llama with SmolLM's tokenizer" % path)
    heads, kv_heads = at["llama.attention.head_count"], at["llama.attention.head_count_kv"]
    weights = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        if ".attn_q." in t.name or ".attn_k." in t.name:
            w = part_heads(w, heads if ".attn_q." in t.name else kv_heads)
        weights[hf_name(t.name)] = np.ascontiguousarray(w)
    os.makedirs(out, exist_ok=True)
    save_file(weights, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    tokens = at["tokenizer.ggml.tokens"]
    bos, eos = at["tokenizer.ggml.bos_token_id"], at["tokenizer.ggml.eos_token_id"]
    write(out, "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": at["llama.embedding_length"], "intermediate_size": at["llama.feed_forward_length"],
        "num_hidden_layers": at["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": at["llama.context_length"],
        "rms_norm_eps": at["llama.attention.layer_norm_rms_epsilon"], "vocab_size": len(tokens),
        "rope_theta": at["llama.rope.freq_base"], "rope_scaling": None, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "float32"})
    write(out, "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    write(out, "tokenizer.json", hf_tokenizer(tokens, at["tokenizer.ggml.token_type"],
                                              at["tokenizer.ggml.merges"]))
    write(out, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos],
        "pad_token": tokens[eos], "clean_up_tokenization_spaces": False,
        "model_max_length": at["llama.context_length"], "chat_template": at["tokenizer.chat_template"]})


def write(folder, name, what):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(what, f, ensure_ascii=False)


# ---- texts

def abstracts(data):
    with open(glob.glob(os.path.join(data, "medical", "pubmedqa*.json"))[0], encoding="utf-8") as f:
        return ["\n".join(item["CONTEXTS"]) for item in json.load(f).values()]


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from strings(x)


def all_texts(data):
    medical = os.path.join(data, "medical")
    for path in sorted(glob.glob(os.path.join(medical, "*.jsonl"))):
        with open(path, encoding="utf-8") as f:
            for line in f:
                yield from strings(json.loads(line))
    with open(glob.glob(os.path.join(medical, "pubmedqa*.json"))[0], encoding="utf-8") as f:
        yield from strings(json.load(f))
    for path in sorted(glob.glob(os.path.join(medical, "*.csv")) +
                       glob.glob(os.path.join(medical, "mmlu", "*.csv"))):
        with open(path, newline="", encoding="utf-8") as f:
            for row in csv.reader(f):
                yield from row


def write_lines(data, out, limit):
    """Different lines, the longest that there are: those of one word say little."""
    lines = sorted({line for text in all_texts(data) for line in text.split("\n") if line.strip()},
                   key=lambda line: (-len(line), line))[:limit]
    with open(out, "w", encoding="utf-8", newline="") as f:
        f.write("\n".join(lines))
    print("%d lines, %d characters" % (len(lines), sum(map(len, lines))))
    return len(lines) < limit


# ---- logits

def medrun_logits(o, model, ids, *more):
    import numpy as np
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.f32")
        run(o.medrun, "logits", model, "--ids", " ".join(map(str, ids)), "--all", "-o", out, *more)
        return np.fromfile(out, "<f4").reshape(len(ids), -1)


class Float32:
    """transformers on a folder."""
    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].numpy()


def log_softmax(x):
    """In float32, which is quick; sums in float64."""
    import numpy as np
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, dtype=np.float64, keepdims=True)).astype(np.float32)


# ---- the same text as llama.cpp

class LlamaCpp:
    def __init__(self, path):
        import xllamacpp
        p = xllamacpp.CommonParams()
        p.model.path = path
        p.n_ctx, p.n_gpu_layers, p.warmup, p.verbosity = 1024, 0, False, 0
        p.cpuparams.n_threads = 1                   # which other work on the machine disturbs least
        self.server = xllamacpp.Server(p)

    def answer(self, ids, n):
        """[(id, bytes, second id, difference of the two best logits)]"""
        out = self.server.handle_completions({
            "prompt": ids, "n_predict": n, "temperature": 0, "n_probs": 2, "cache_prompt": False})
        steps = out["choices"][0]["logprobs"]["content"]
        return [(s["id"], bytes(s["bytes"]), s["top_logprobs"][1]["id"],
                 s["top_logprobs"][0]["logprob"] - s["top_logprobs"][1]["logprob"]) for s in steps]


def prompt_ids(o, question):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, "m.json", [{"role": "user", "content": question}])
        out = run(o.medrun, "render", o.model, "--messages", os.path.join(folder, "m.json"), "--ids")
    return [int(i) for i in out.split()]


def part(o, question, ids, steps, rows, exact):
    """How far both write the same, and whether that is as their logits have it. Says where they part."""
    own = [int(row.argmax()) for row in rows]
    same = next((k for k, step in enumerate(steps) if own[k] != step[0]), len(steps))
    start = b"".join(step[1] for step in steps[:same])
    if same < len(steps):
        start += run(o.medrun, "detokenize", o.model, str(own[same]))
    text = run(o.medrun, "run", o.model, "--strict", "--temp", "0", "-n", str(o.tokens), "-q", "-p", question)
    good = text.startswith(start)
    if not good:
        print("%s: medrun wrote %r, its logits say %r" % (question, text, start))
    if same < len(steps):
        best, piece, _, gap = steps[same]
        said = "%s: after %d of %d tokens llama.cpp says %r, %.3f before its second; medrun its own by %.3f" % (
            question, same, len(steps), piece.decode(errors="replace"), gap,
            rows[same][own[same]] - rows[same][best])
        if exact is not None:
            by = exact[same][own[same]] - exact[same][best]
            said += "; float32 says %s's by %.3f" % ("medrun" if by > 0 else "llama.cpp", abs(by))
        print(said)
        good = good and gap <= ROUNDING
    return same, good


def compare_text(o):
    """Every step of llama.cpp's is looked at, also behind the place where the two part: there too medrun
    must say the same unless the two best logits are close."""
    import numpy as np
    reference = Float32(o.folder) if o.folder else None
    llama = LlamaCpp(o.gguf)
    moved, mine, bad, whole, total, agree = [], [], 0, 0, 0, 0
    for question in QUESTIONS[:o.questions]:
        ids = prompt_ids(o, question)
        steps = llama.answer(ids, o.tokens)
        forced = ids + [s[0] for s in steps[:-1]]
        rows = medrun_logits(o, o.model, forced, "--strict")[len(ids) - 1:]
        exact = reference.logits(forced)[len(ids) - 1:] if reference else None
        same, good = part(o, question, ids, steps, rows, exact)
        whole, total, bad = whole + (same == len(steps)), total + len(steps), bad + (not good)
        for k, (best, _, second, gap) in enumerate(steps):
            moved.append(abs(gap - (rows[k][best] - rows[k][second])))
            if reference:
                mine.append(abs(exact[k][best] - exact[k][second] - rows[k][best] + rows[k][second]))
            agree += rows[k].argmax() == best
            if rows[k].argmax() != best and gap > ROUNDING:
                bad += 1
                print("%s: at %d another token, though llama.cpp's second is %.3f behind" % (question, k, gap))
    print("%d answers, %d the same to the end; of %d tokens of llama.cpp's medrun would write %d; between the two "
          "the difference of the two best logits moves by %.3f on average, by %.3f at most" % (
              o.questions, whole, total, agree, np.mean(moved), np.max(moved)))
    if mine:
        print("between medrun and float32 by %.3f on average, by %.3f at most" % (np.mean(mine), np.max(mine)))
    return bad


# ---- how far types are from float32

def windows(o, model):
    left = o.tokens
    for text in abstracts(o.data):
        done = subprocess.run([o.medrun, "tokenize", model, "-p", text], capture_output=True, check=True)
        ids = [int(i) for i in done.stdout.split()][:left]
        if len(ids) > 1:
            yield ids
        left -= len(ids)
        if left <= 1:
            return


def divergence(o):
    import numpy as np
    folder = os.path.isdir(o.reference)
    exact = Float32(o.reference) if folder else None
    sums = {m: [] for m in o.models}
    for ids in windows(o, o.models[0]):
        reference = exact.logits(ids) if folder else medrun_logits(o, o.reference, ids, "--strict")
        p = log_softmax(reference)
        share = np.exp(p)
        for model in o.models:
            logits = medrun_logits(o, model, ids, "--strict")
            q = log_softmax(logits)
            sums[model].append(((share * (p - q)).sum(-1, dtype=np.float64), logits.argmax(-1) == reference.argmax(-1)))
    bad = 0
    for model, parts in sums.items():
        kl, same = (np.concatenate(x) for x in zip(*parts))
        kind = next(t for t in BOUNDS if t in os.path.basename(model))
        most, least = BOUNDS[kind]
        over = kl.mean() > most or same.mean() < least
        bad += over
        print("%s: %d positions, KL %.3g nats (largest %.3g), the same likeliest token at %.2f %%%s" % (
            kind, len(kl), kl.mean(), kl.max(), 100 * same.mean(), "  ABOVE ITS BOUND" if over else ""))
    return bad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--medrun", default="./medrun")
    sub = p.add_subparsers(dest="what", required=True)
    s = sub.add_parser("folder")
    s.add_argument("gguf")
    s.add_argument("out")
    s = sub.add_parser("lines")
    s.add_argument("data")
    s.add_argument("out")
    s.add_argument("--limit", type=int, default=10000)
    s = sub.add_parser("text")
    s.add_argument("gguf")
    s.add_argument("model")
    s.add_argument("--folder")
    s.add_argument("--tokens", type=int, default=48)
    s.add_argument("--questions", type=int, default=len(QUESTIONS))
    s = sub.add_parser("kl")
    s.add_argument("data")
    s.add_argument("reference")
    s.add_argument("models", nargs="+")
    s.add_argument("--tokens", type=int, default=8000)
    o = p.parse_args()
    if o.what == "folder":
        bad = write_folder(o.gguf, o.out)
    elif o.what == "lines":
        bad = write_lines(o.data, o.out, o.limit)
    else:
        bad = (compare_text if o.what == "text" else divergence)(o)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
