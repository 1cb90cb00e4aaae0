"""How far checkpoints are from float32: mean KL divergence, the same likeliest token, bits a weight.

    python tools/reference/precision.py HF_FOLDER [MODEL.mdr...] TEXT... [--types bf16,int8,int4]
        [--calibrate TEXT] [--permute SEED] [--kv f16,int8] [--work DIR] [--bin .] [--strict]
        [--chunk 256] [--limit 8704]

The reference is transformers in float32 on the folder's weights; medrun's side is `medrun logits
--all`. What is measured are the models that are named, and --types, which are exported from the
folder to --work (int4 also with --calibrate's text), each with the caches of --kv. TEXT is UTF-8, cut
into windows of --chunk tokens, LIMIT in all; or pubmedqa's .json, whose abstracts are joined; or a
.jsonl of the demo model's held-out questions ("question", "answer"), each rendered as a chat, whose
answers are counted apart.

--permute shuffles the residual stream, the feed-forward units and the value channels of the folder
first (a copy in --work): the same function, but where its weights once were rounded by groups to 4
bits no group of ours holds the same numbers. Llama's architecture, one safetensors file.

Needs torch, transformers, safetensors, numpy.
"""
import argparse
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


def chats(path, tokenizer, limit):
    """(ids, position from which the answer is predicted) of each held-out question."""
    total = 0
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = json.loads(line)
            question = [{"role": "user", "content": row["question"]}]
            answer = [{"role": "assistant", "content": row["answer"]}]
            render = tokenizer.apply_chat_template
            whole = render(question + answer, tokenize=False, add_generation_prompt=False)
            opened = render(question, tokenize=False, add_generation_prompt=True)
            end = whole.rindex(row["answer"]) + len(row["answer"])
            ids = tokenizer.encode(whole[:end], add_special_tokens=False)
            total += len(ids)
            if total > limit:
                return
            yield ids, len(tokenizer.encode(opened, add_special_tokens=False)) - 1


def windows(path, tokenizer, chunk, limit):
    if path.endswith(".jsonl"):
        yield from chats(path, tokenizer, limit)
        return
    with open(path, encoding="utf-8") as f:
        text = f.read()
    if path.endswith(".json"):
        text = "\n\n".join("\n".join(item["CONTEXTS"]) for item in json.loads(text).values())
    # the tokenizer takes long over megabytes
    ids = tokenizer.encode(text[:limit * 8], add_special_tokens=False)[:limit]
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
            with torch.no_grad():
                a = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
            for subject in subjects:
                b = torch.log_softmax(logits(o, *subject, ids).double(), -1)
                kl = (a.exp() * (a - b)).sum(-1)
                rows = torch.stack([kl, (a.argmax(-1) == b.argmax(-1)).double()], -1)
                found.setdefault((path, subject), []).append(rows)
                if answer is not None:
                    found.setdefault((path + ", answers", subject), []).append(rows[answer:])
    return {key: torch.cat(rows) for key, rows in found.items()}


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
    o = p.parse_args()
    models = [f for f in o.files if f.endswith(".mdr")]
    o.texts = [f for f in o.files if not f.endswith(".mdr")]
    os.makedirs(o.work, exist_ok=True)
    folder = o.folder if o.permute is None else permute(o.folder, o.work + "/permuted", o.permute)
    for kind in filter(None, o.types.split(",")):
        ways = [("", [])] + [(" calibrated", ["--calibrate", o.calibrate])] * (kind == "int4" and bool(o.calibrate))
        for what, more in ways:
            models.append(f"{o.work}/{kind}{what.replace(' ', '-')}.mdr")
            run(o.bin + "/medrun-export", folder, models[-1], "--type", kind, "--force", *more)
    subjects = [(m, kv) for m in models for kv in o.kv.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    print("| text | model | cache | bits a weight | positions | KL, nats | largest | same token |\n|---|---|---|---|---|---|---|---|")
    for (path, (model, kv)), rows in measure(o, reference, tokenizer, subjects).items():
        kl, same = rows[:, 0], rows[:, 1]
        print(f"| {os.path.basename(path)} | {os.path.basename(model)} | {kv} | {bits_a_weight(model):.2f} | {len(kl)} | "
              f"{kl.mean():.3g} | {kl.max():.3g} | {100 * same.mean():.2f} % |")


main()
