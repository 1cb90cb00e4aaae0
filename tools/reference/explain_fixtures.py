#!/usr/bin/env python3
"""Compare the numbers of medrun-explain with transformers, and where it is there TransformerLens.

    pip install torch transformers numpy          (and transformer_lens for --lens)
    python tools/reference/explain_fixtures.py MEDRUN_EXPLAIN FOLDER MODEL.mdr [--n 24] [--lens]
                                               [--ids FILE.i32] [--text TEXT]

FOLDER is the Hugging Face folder that MODEL.mdr was exported from, with --type bf16. The model runs
with eager attention in float32; components of the stream are taken by hooks, and summed in float64.
Each quantity of the page is compared, and the worst difference held against its bar:

    log p         surprisal and the ten likeliest of each position           1e-4 nats
    lens          lm_head(norm(x)) of every layer, at every place            1e-4 nats
    attention     every head, every row                                      1e-5
    parts, heads  contributions to z_a - z_b: layers, heads, tokens          1e-4 nats
    neurons       activation times column, in the same direction             1e-4 nats
    ablation      logits when a head or a feed-forward part is its mean      1e-4 nats

For more than 8 layers a bar grows by 1e-5 of the number that is compared: surprisals of 60 nats
are sums of large float32 numbers there. Exit 1 when a bar is missed. --lens also compares the lens,
attention, layers and heads with TransformerLens.

Two float32 programs differ by the rounding of both. So the same model also runs in float64, and a
table says how far each of the two is from that: whose rounding a difference is."""

import argparse
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BARS = {"log p": 1e-4, "lens": 1e-4, "attention": 1e-5, "parts": 1e-4, "heads": 1e-4,
        "tokens": 1e-4, "neurons": 1e-4, "ablation": 1e-4, "sum": 1e-4, "kl": 1e-3,
        "TransformerLens parts": 1e-4, "TransformerLens heads": 1e-4,
        "TransformerLens lens": 1e-4, "TransformerLens attention": 1e-5}
noted = {}                      # of a name and a run: our numbers and its own, in the same order


def note(name, ours, theirs, kind):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    noted.setdefault((name, kind), []).append((ours.flatten(), theirs.flatten()))


def print_table(deep, double):
    """The distances of each quantity; returns those that miss their bar."""
    missed = []
    print("%-26s%10s%10s%10s%10s" % ("", "medrun to", "medrun to", "other to", "where the"))
    print("%-26s%10s%10s%10s%10s%s" % ("", "other", "float64", "float64", "number is",
                                       "  past the allowance" if deep else ""))
    for name, kind in [key for key in noted if key[1] == "float32"]:
        ours, theirs = map(np.concatenate, zip(*noted[name, kind]))
        exact = np.concatenate([pair[1] for pair in noted[name, "float64"]])
        apart = np.abs(ours - theirs)
        at, far = int(apart.argmax()), np.abs(ours - exact)
        line = "%-26s%10.1e%10.1e%10.1e%10.3g" % (
            name, apart[at], far.max(), np.abs(theirs - exact).max(), exact[at])
        apart = far if double else apart
        if deep:                # of 30 layers: float32 sums are right to so much of their size
            apart = np.maximum(0, apart - 1e-5 * np.abs(exact))
            line += "%10.1e" % apart.max()
        print(line)
        if not apart.max() <= BARS[name]:
            missed.append("%s %.2g, bar %.2g" % (name, apart.max(), BARS[name]))
    return missed


class Exact(torch.overrides.TorchFunctionMode):
    """float64 also where a model asks for float32: in norms, angles and softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(v) for key, v in (kwargs or {}).items()})


def in_float64(model):
    with Exact():
        model = copy.deepcopy(model).double()
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=model.config)
    return model


def run_ours(program, model, ids, at, ablate):
    out = tempfile.NamedTemporaryFile(suffix=".json", delete=False).name
    command = [program, model, "--ids", " ".join(map(str, ids)), "-n", "0", "--why", str(at + 1),
               "--attention", "all", "--mid", "--strict", "--kv", "f32", "--budget", "900",
               "--ablate", ablate, "--neurons", "40", "--json", out, "--force", "-q",
               "--lens", "all" if len(ids) <= 64 else "auto"]
    subprocess.run(command, check=True)
    with open(out) as f:
        numbers = json.load(f)
    os.remove(out)
    for block in numbers["blocks"]:
        numbers[block["name"]] = np.array(numbers[block["name"]],
                                          np.float64).reshape(block["shape"])
    return numbers


class Watched:
    """One run of the model with what its blocks read and write."""

    def __init__(self, model, ids):
        self.model, self.layers = model, model.model.layers
        self.kind = "float64" if model.dtype == torch.float64 else "float32"
        self.read, self.found, self.attended, self.active, self.values = [], [], [], [], []
        hooks = []
        for layer in self.layers:
            attn, mlp = layer.self_attn, layer.mlp
            hooks.append(layer.register_forward_pre_hook(
                lambda m, a, k: self.read.append((a[0] if a else k["hidden_states"])[0].double()),
                with_kwargs=True))
            hooks.append(attn.o_proj.register_forward_hook(
                lambda m, a, out: self.found.append(a[0][0].double())))
            hooks.append(attn.o_proj.register_forward_hook(
                lambda m, a, out: self.attended.append(out[0].double())))
            hooks.append(mlp.down_proj.register_forward_hook(
                lambda m, a, out: self.active.append(a[0][0].double())))
            hooks.append(attn.v_proj.register_forward_hook(
                lambda m, a, out: self.values.append(out[0].double())))
        hooks.append(model.model.norm.register_forward_pre_hook(
            lambda m, a: self.read.append(a[0][0].double())))
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True)
        self.logits = out.logits[0].double()
        self.attentions = [a[0].double() for a in out.attentions]
        for hook in hooks:
            hook.remove()

    def stream(self):
        """x_0, m_0, x_1, m_1, ... x_L, each (n, hidden)."""
        rows = []
        for x, out in zip(self.read, self.attended):
            rows += [x, x + out]
        return rows + [self.read[-1]]


def lens_of(run, n_vocab):
    """Of every row of the stream the log p of all ids."""
    model = run.model
    for row in run.stream():
        logits = model.lm_head(model.model.norm(row.to(model.dtype)))[:, :n_vocab].double()
        yield torch.log_softmax(logits, -1).numpy()


def compare_lens(ours, run, n_vocab):
    with torch.no_grad():
        for k, logp in enumerate(lens_of(run, n_vocab)):
            for i, at in enumerate(ours["lens_at"].astype(int)):
                top = ours["lens"][i, k].astype(int)
                note("lens", ours["lens_logp"][i, k], logp[at, top], run.kind)
                tracked = ours["tracked"].astype(int)
                note("lens", ours["tracked_logp"][i, k], logp[at, tracked], run.kind)
                last = torch.log_softmax(run.logits[at, :n_vocab], -1).numpy()
                kl = (np.exp(last) * (last - logp[at])).sum() / np.log(2)
                note("kl", ours["lens_kl"][i, k], max(kl, 0), run.kind)


def compare_parts(ours, run, model, at):
    a, b = ours["pair"][0].astype(int)
    config = model.config
    stream = [row[at] for row in run.stream()]
    u = model.lm_head.weight.double()
    g = model.model.norm.weight.double()
    rms = torch.sqrt((stream[-1] ** 2).mean() + config.rms_norm_eps)
    w = (g * (u[a] - u[b]) / rms).detach()
    parts = [stream[0] @ w] + [(stream[i] - stream[i - 1]) @ w for i in range(1, len(stream))]
    note("parts", ours["parts"][0], torch.stack(parts).numpy(), run.kind)
    note("sum", ours["parts"][0].sum() + ours["rest"][0],
         float(run.logits[at, a] - run.logits[at, b]), run.kind)
    heads = config.num_attention_heads
    size = run.found[0].shape[1] // heads
    per_head = np.zeros((len(run.layers), heads))
    for l, layer in enumerate(run.layers):
        o = layer.self_attn.o_proj.weight.double().detach()
        for h in range(heads):
            cut = slice(h * size, (h + 1) * size)
            per_head[l, h] = float(w @ (o[:, cut] @ run.found[l][at, cut]))
    note("heads", ours["heads"][0], per_head, run.kind)
    group = heads // config.num_key_value_heads
    for row, (l, h) in enumerate(ours["split_head"].astype(int)):
        o = run.layers[l].self_attn.o_proj.weight.double().detach()[:, h * size:(h + 1) * size]
        v = run.values[l][:at + 1, h // group * size:(h // group + 1) * size]
        weight = run.attentions[l][h, at, :at + 1]
        note("tokens", ours["split"][row], (weight * (v @ (o.T @ w))).numpy(), run.kind)
    for i, (l, k) in enumerate(ours["neuron"].astype(int)):
        column = run.layers[l].mlp.down_proj.weight.double().detach()[:, k]
        note("neurons", ours["neuron_adds"][i], float(run.active[l][at, k] * (column @ w)), run.kind)


def compare_ablations(ours, run, model, ids, at, n_prompt):
    heads = model.config.num_attention_heads
    size = run.found[0].shape[1] // heads
    for change in ours["ablations"]:
        layer, head = run.layers[change["layer"]], change["head"]
        cut = slice(head * size, (head + 1) * size)

        def one_head(module, args):
            x = args[0].clone()
            x[..., cut] = run.found[change["layer"]][:n_prompt, cut].mean(0).to(model.dtype)
            return (x,)

        def whole(module, args, out):
            mean = (run.active[change["layer"]][:n_prompt] @
                    module.weight.double().detach().T).mean(0).to(model.dtype)
            return mean.expand_as(out)

        hook = (layer.mlp.down_proj.register_forward_hook(whole) if head < 0
                else layer.self_attn.o_proj.register_forward_pre_hook(one_head))
        with torch.no_grad():
            logits = model(torch.tensor([ids[:at + 1]])).logits[0, -1].double()
        hook.remove()
        logp = torch.log_softmax(logits, -1)
        note("ablation", change["difference"],
             float(logits[ours["winner"]] - logits[ours["foil"]]), run.kind)
        note("ablation", change["winner"], float(logp[ours["winner"]]), run.kind)


def compare_with_lens(ours, model, folder, ids, at, exact):
    from transformer_lens.model_bridge import TransformerBridge
    bridge = TransformerBridge.boot_transformers(folder, hf_model=model)
    bridge.enable_compatibility_mode()
    vocab = ours["shape"]["vocab"]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([ids[:at + 1]]))
        rows = cache.accumulated_resid(layer=-1, incl_mid=True)     # (2 layers + 1, 1, n, hidden)
        logits = bridge.unembed(bridge.ln_final(rows))[:, 0, :, :vocab]
        with Exact():
            truth = list(lens_of(exact, vocab))
    logp = torch.log_softmax(logits.double(), -1).numpy()

    def beside(name, mine, theirs, true):
        note("TransformerLens " + name, mine, theirs, "float32")
        note("TransformerLens " + name, mine, true, "float64")

    for i, row in enumerate(ours["lens_at"].astype(int)):
        for k in range(len(logp) if row <= at else 0):
            top = ours["lens"][i, k].astype(int)
            beside("lens", ours["lens_logp"][i, k], logp[k, row, top], truth[k][row, top])
    within = np.tril_indices(at + 1)                    # rows of a triangle follow each other
    for i, (l, h) in enumerate(ours["map_head"].astype(int)):
        beside("attention", ours["maps"][i][:len(within[0])],
               cache["pattern", int(l)][0, int(h)].double().numpy()[within],
               exact.attentions[l][h].numpy()[within])
    pair = torch.tensor(ours["pair"][0].astype(int))
    pair = {"tokens": pair[0:1], "incorrect_tokens": pair[1:2], "pos_slice": -1}
    parts, labels = cache.decompose_resid(layer=-1, mode="full", pos_slice=-1, return_labels=True)
    keep = [i for i, name in enumerate(labels) if name not in ("bias", "pos_embed")]
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    for name, rows in ("parts", parts[keep]), ("heads", heads):
        true = np.concatenate([row[1] for row in noted[name, "float64"]])
        beside(name, ours[name][0].flatten(),
               cache.logit_attrs(rows, **pair).flatten().detach().double().numpy(), true)


def compare_all(ours, run, ids, at):
    vocab = ours["shape"]["vocab"]
    logp = torch.log_softmax(run.logits[:, :vocab], -1).numpy()
    note("log p", ours["surprisal"][1:], [-logp[i, ids[i + 1]] / np.log(2)
                                         for i in range(len(ids) - 1)], run.kind)
    for i in range(len(ids)):
        note("log p", ours["top_logp"][i], logp[i, ours["top"][i].astype(int)], run.kind)
    compare_lens(ours, run, vocab)
    for i, (l, h) in enumerate(ours["map_head"].astype(int)):
        theirs = run.attentions[l][h].numpy()
        note("attention", ours["maps"][i], theirs[np.tril_indices(len(ids))], run.kind)
    compare_parts(ours, run, run.model, at)
    compare_ablations(ours, run, run.model, ids, at, ours["n_prompt"])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("program"), p.add_argument("folder"), p.add_argument("model")
    p.add_argument("--n", type=int, default=24)
    p.add_argument("--ids")
    p.add_argument("--text")
    p.add_argument("--lens", action="store_true")
    p.add_argument("--double", action="store_true", help="bars are held against float64")
    o = p.parse_args()
    model = AutoModelForCausalLM.from_pretrained(o.folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    for weight in model.parameters():           # norms are float32 in the checkpoint, matrices bf16
        if weight.dim() > 1:
            weight.data = weight.data.bfloat16().float()
    if o.text:
        from transformers import AutoTokenizer
        ids = AutoTokenizer.from_pretrained(o.folder)(o.text)["input_ids"]
    else:
        path = o.ids or os.path.join(o.folder, "ids_64.i32")
        ids = np.fromfile(path, "<i4")[:o.n].tolist()
    at = len(ids) - 2
    layers = len(model.model.layers)
    ours = run_ours(o.program, o.model, ids, at, "1.2,%d.1,mlp%d" % (layers, layers))
    for exact in False, True:
        with Exact() if exact else contextlib.nullcontext():
            run = Watched(in_float64(model) if exact else model, ids)
            compare_all(ours, run, ids, at)
    if o.lens:
        compare_with_lens(ours, model, o.folder, ids, at, run)
    print("%s, %d tokens, the largest distances:" % (os.path.basename(o.folder.rstrip("/")),
                                                     len(ids)))
    missed = print_table(layers > 8, o.double)
    if missed:
        sys.exit("missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
