"""How far checkpoints are from float32: mean KL divergence, the same likeliest token, bits a weight, questions.

    python tools/reference/precision.py HF_FOLDER [MODEL.mdr...] TEXT... [--types bf16,int8,int4]
        [--calibrate TEXT] [--permute SEED] [--kv f16,int8] [--work DIR] [--bin .] [--strict]
        [--chunk 256] [--limit 8704] [--llama BIN] [--quants Q8_0,Q4_K_M] [--imports int8,int4]
        [--questions DATA]

The reference is transformers in float32 on the folder's weights; medrun's side is `medrun logits
--all`. What is measured are the models that are named, and --types, which are exported from the
folder to --work (int4 also with --calibrate's text), each with the caches of --kv. TEXT is UTF-8, cut
into windows of --chunk tokens, LIMIT in all; or pubmedqa's .json, whose abstracts are joined; or a
.jsonl of questions ("question", "answer"; of tools/demo/heldout.jsonl the corpus knows the answers), each
rendered as a chat, whose answers are counted apart.

--permute shuffles the residual stream, the feed-forward units and the value channels of the folder
first (a copy in --work): the same function, but where its weights once were rounded by groups to 4
bits no group of ours holds the same numbers. Llama's architecture, one safetensors file.

--llama names the folder of llama-quantize and llama-perplexity. They make --quants of the same weights,
and say how far llama.cpp is with them from itself with float32, on the same windows. As it counts only
the second half of a window, so it is done here then. --imports are types of checkpoints that are made
from each of these GGUF files.

--questions names a folder with medqa's .jsonl and mmlu/*_val.csv: how many medrun-eval finds right by
the likelihood of the whole answers; of a GGUF file with what it holds as bf16.

Needs torch, transformers, safetensors, numpy; for --llama also gguf.
"""
import argparse
import glob
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def permute(folder, out, seed):
    """HF_FOLDER -> OUT, the same function."""
    from safetensors.torch import load_file, save_file
    os.makedirs(out, exist_ok=True)
    for name in os.listdir(folder):
        if not name.endswith(".safetensors"):
            shutil.copy(os.path.join(folder, name), out)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim = c.get("head_dim") or hidden // heads
    g = torch.Generator().manual_seed(seed)
    stream = torch.randperm(hidden, generator=g)
    w = load_file(os.path.join(folder, "model.safetensors"))
    for layer in range(c["num_hidden_layers"]):
        units = torch.randperm(c["intermediate_size"], generator=g)
        channels = torch.stack([torch.randperm(dim, generator=g) for _ in range(kv)])
        values = (channels + dim * torch.arange(kv)[:, None]).flatten()
        queries = channels.repeat_interleave(heads // kv, 0) + dim * torch.arange(heads)[:, None]
        for name in [n for n in w if n.startswith(f"model.layers.{layer}.")]:
            if re.search("[qkv]_proj|gate_proj|up_proj", name):
                w[name] = w[name][:, stream]
            if re.search("o_proj|down_proj", name):
                w[name] = w[name][stream]
            if re.search("gate_proj|up_proj", name):
                w[name] = w[name][units]
            if "down_proj" in name:
                w[name] = w[name][:, units]
            if "v_proj" in name:
                w[name] = w[name][values]
            if "o_proj" in name:
                w[name] = w[name][:, queries.flatten()]
            if name.endswith("layernorm.weight"):
                w[name] = w[name][stream]
    w["model.norm.weight"] = w["model.norm.weight"][stream]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in w:
            w[name] = w[name][:, stream]
    save_file({k: v.contiguous() for k, v in w.items()}, os.path.join(out, "model.safetensors"),
              metadata={"format": "pt"})
    return out


def demo_answers():
    """What the demo model learned to say to its held-out questions, whose file only has key words."""
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../demo"))
    import corpus
    return {q: fact.answer for fact in corpus.build(corpus.read_corpus()) for q, _ in fact.held}


def chats(path, tokenizer, limit):
    """(ids, position from which the answer is predicted) of each held-out question."""
    total, known = 0, demo_answers()
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            question = [{"role": "user", "content": row["question"]}]
            said = row.get("answer") or known[row["question"]]
            answer = [{"role": "assistant", "content": said}]
            render = tokenizer.apply_chat_template
            whole = render(question + answer, tokenize=False, add_generation_prompt=False)
            opened = render(question, tokenize=False, add_generation_prompt=True)
            end = whole.rindex(said) + len(said)
            ids = tokenizer.encode(whole[:end], add_special_tokens=False)
            total += len(ids)
            if total > limit:
                return
            yield ids, len(tokenizer.encode(opened, add_special_tokens=False)) - 1


def read_text(path):
    with open(path, encoding="utf-8") as f:
        text = f.read()
    if path.endswith(".json"):
        text = "\n\n".join("\n".join(item["CONTEXTS"]) for item in json.loads(text).values())
    return text


def windows(path, tokenizer, chunk, limit):
    if path.endswith(".jsonl"):
        yield from chats(path, tokenizer, limit)
        return
    # the tokenizer takes long over megabytes
    ids = tokenizer.encode(read_text(path)[:limit * 8], add_special_tokens=False)[:limit]
    for at in range(0, len(ids) - 1, chunk):
        yield ids[at:at + chunk], None


def run(*command):
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        sys.exit("%s\nended with %d: %s" % (" ".join(command), done.returncode, done.stderr.decode()))
    return done.stdout.decode()


def logits(o, model, kv, ids):
    with tempfile.NamedTemporaryFile() as out:
        run(o.bin + "/medrun", "logits", model, "--ids", " ".join(map(str, ids)), "--all", "--kv", kv,
            "--force", "-o", out.name, *["--strict"] * o.strict)
        return torch.from_numpy(np.fromfile(out.name, dtype="<f4").reshape(len(ids), -1))


def measure(o, reference, tokenizer, subjects):
    """{(text, subject): [(KL, same token) of positions]}, of answers under (text + " answers", subject)"""
    found = {}
    for path in o.texts:
        for ids, answer in windows(path, tokenizer, o.chunk, o.limit):
            begin = len(ids) // 2 if o.llama and answer is None else 0
            end = len(ids) - 1 if o.llama and answer is None else len(ids)
            with torch.no_grad():
                a = torch.log_softmax(reference(torch.tensor([ids])).logits[0, begin:end], -1)
            share = a.exp()
            for subject in subjects:
                b = torch.log_softmax(logits(o, *subject, ids)[begin:end], -1)
                kl = (share * (a - b)).sum(-1, dtype=torch.float64)
                rows = torch.stack([kl, (a.argmax(-1) == b.argmax(-1)).double()], -1)
                found.setdefault((path, subject), []).append(rows)
                if answer is not None:
                    found.setdefault((path + ", answers", subject), []).append(rows[answer:])
    return {key: torch.cat(rows) for key, rows in found.items()}


# ---- llama.cpp

def make_quants(o, folder):
    """GGUF files of the folder's weights: the name of each, and its path."""
    here = os.path.dirname(os.path.abspath(__file__))
    exact = o.work + "/F32.gguf"
    run(sys.executable, here + "/make_gguf.py", folder, exact, "--type", "F32")
    made = {"F32": exact}
    for name in filter(None, o.quants.split(",")):
        made[name] = f"{o.work}/{name}.gguf"
        run(o.llama + "/llama-quantize", exact, made[name], name)
    return made


def perplexity(o, quants):
    """{(text, name): (KL, largest, same token)} of llama.cpp with each file."""
    found, base = {}, o.work + "/base.kld"
    for path in [t for t in o.texts if len(quants) > 1 and not t.endswith(".jsonl")]:
        with open(o.work + "/text.txt", "w", encoding="utf-8") as f:
            f.write(read_text(path)[:o.limit * 8])
        ask = [o.llama + "/llama-perplexity", "-c", str(o.chunk), "--chunks", str(o.limit // o.chunk),
               "--kl-divergence-base", base, "-m"]
        run(*ask, quants["F32"], "-f", o.work + "/text.txt")
        for name in list(quants)[1:]:
            said = run(*ask, quants[name], "--kl-divergence")
            numbers = [re.search(what + r" *: *([-\d.]+)", said) for what in ("Mean +KLD", "Maximum KLD", "Same top p")]
            found[path, name] = [float(n[1]) for n in numbers]
    return found


def gguf_bits(path):
    import gguf
    tensors = gguf.GGUFReader(path).tensors
    return 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)


# ---- questions

def questions(o, model):
    right = asked = 0
    tasks = {"medqa": o.questions + "/medqa*.jsonl", "mmlu": o.questions + "/mmlu/*_val.csv"}
    for task, pattern in tasks.items():
        for path in sorted(glob.glob(pattern)):
            said = run(o.bin + "/medrun-eval", model, task, path, "--mode", "answer", "--no-template",
                       "--summary", "json")
            row = next(r for r in json.loads(said)["results"] if not r["subject"])
            right, asked = right + row["right"], asked + row["n"]
    return f"{right} of {asked}"


def bits_a_weight(model):
    with open(model, "rb") as f:
        header = f.read(16)
        tensors = json.loads(f.read(struct.unpack("<Q", header[8:])[0]))["tensors"]
    return 8 * sum(t["bytes"] for t in tensors) / sum(t["rows"] * t["cols"] for t in tensors)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("files", nargs="+", metavar="MODEL.mdr or TEXT")
    p.add_argument("--types", default="")
    p.add_argument("--calibrate")
    p.add_argument("--permute", type=int)
    p.add_argument("--kv", default="f16")
    p.add_argument("--work", default="build/precision")
    p.add_argument("--bin", default=".")
    p.add_argument("--strict", action="store_true")
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--limit", type=int, default=8704)
    p.add_argument("--llama")
    p.add_argument("--quants", default="")
    p.add_argument("--imports", default="")
    p.add_argument("--questions")
    o = p.parse_args()
    models = [f for f in o.files if f.endswith(".mdr")]
    o.texts = [f for f in o.files if not f.endswith(".mdr")]
    if o.quants and not o.llama:
        p.error("--quants: wanted --llama too")
    os.makedirs(o.work, exist_ok=True)
    folder = o.folder if o.permute is None else permute(o.folder, o.work + "/permuted", o.permute)
    quants = make_quants(o, folder) if o.quants else {}
    checkpoints = {}

    def export(source, kind, name, *more):
        out = f"{o.work}/{name}.mdr"
        run(o.bin + "/medrun-export", source, out, "--type", kind, "--force", *more)
        return out

    def both(source, kind, name):
        models.append(export(source, kind, name))
        if kind == "int4" and o.calibrate:
            models.append(export(source, kind, name + "-calibrated", "--calibrate", o.calibrate))

    for kind in filter(None, o.types.split(",")):
        both(folder, kind, kind)
    for name in list(quants)[1:]:
        for kind in filter(None, o.imports.split(",")):
            both(quants[name], kind, f"{kind}-from-{name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    subjects = [(m, kv) for m in models for kv in o.kv.split(",")]
    right = {m: questions(o, m) if o.questions else "" for m in models}
    print("| text | model | cache | bits a weight | positions | KL, nats | largest | same token | questions right |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for (path, (model, kv)), rows in measure(o, reference, tokenizer, subjects).items():
        kl, same = rows[:, 0], rows[:, 1]
        print(f"| {os.path.basename(path)} | {os.path.basename(model)} | {kv} | {bits_a_weight(model):.2f} | {len(kl)} | "
              f"{kl.mean():.3g} | {kl.max():.3g} | {100 * same.mean():.2f} % | {right[model]} |", flush=True)
    for (path, name), (kl, largest, same) in perplexity(o, quants).items():
        answered = questions(o, export(quants[name], "bf16", "bf16-from-" + name)) if o.questions else ""
        print(f"| {os.path.basename(path)} | llama.cpp {name} | f16 | {gguf_bits(quants[name]):.2f} | | "
              f"{kl:.3g} | {largest:.3g} | {same:.2f} % | {answered} |", flush=True)


main()
