#!/usr/bin/env python3
"""Compare a checkpoint with transformers on the folder it was exported from; write --proof's file.

    pip install torch transformers tokenizers safetensors jinja2 numpy
        (and sentencepiece protobuf for a folder without tokenizer.json)
    python tools/reference/compare.py HF_FOLDER MODEL.mdr [--medrun ./medrun] [--proof PROOF.json]
        [--prompts 4] [--length 64] [--yarn-factor F] [--threads N]

Compares, and prints a line for each:

    tokens   the ids of some 570 texts; special tokens written in a text are ordinary text
    chats    the ids of conversations, as apply_chat_template gives them, and what is refused
    template which of medrun's templates renders these conversations as the folder's own does
    logits   of --prompts prompts of --length ids, with transformers in float32, eager attention:
             relative L2 distance, largest difference, mean KL divergence, same largest logit

The last line is the verdict; the exit code is 1 when something differs: an id, a conversation, or
logits of a bf16 checkpoint of bfloat16 weights that are further than 1e-5 (relative L2) from
transformers'. Of other checkpoints the distance is reported and not judged: they hold other
numbers. A checkpoint exported with --yarn-factor is compared with the same factor.

Memory: transformers' layers are loaded one at a time, so what is needed is the largest of one
layer, the embedding and the output matrix in float32, not the model (8B: about 2.5 GB). The folder
is read once, for all prompts together.

--proof writes texts, conversations and prompts with what transformers gives for them, for
`medrun-export --proof`: the checkpoint then carries them, `medrun verify` repeats the ids
anywhere, and says how far its logits are from these.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tokenizer_vectors import all_texts, plain_tokenizer

BOUND = 1e-5

# Conversations, "system: ..." and so on. Texts that look like special tokens are left out: medrun
# takes them as text and transformers does not, and that is meant.
CHATS = [
    ["user: What is hypertension?"],
    ["system: You are a careful medical assistant.", "user: What is hypertension?"],
    ["user: Is 38.5 \u00b0C a fever?", "assistant: Yes.", "user: And 37.0?"],
    ["system: Answer briefly.", "user: A man of 30 has chest pain.", "assistant: Since when?",
     "user: For an hour.", "assistant: Call an ambulance now.", "user: Why?"],
    ["system:  \n spaces around  \n", "user: \n\n  Spaces around. \t\n"],
    ["user: "],
    ["system: ", "user: An empty system message."],
    ["user: Several\n\nlines,\n\n\n```c\nint x = 1;\n```\nand a list:\n- one\n- two\n"],
    ["user: \u60a3\u8005\u53d1\u70ed\u4e09\u5929\u3002 \u0627\u0644\u0645\u0631\u064a\u0636 "
     "\U0001fa7a e\u0301 \u2014 \u201cquoted\u201d\u2026"],
    ["system: ### Instruction:\nnot one", "user: ### Response:\n{{ messages }} {% raw %} \\n"],
    ["user: one", "user: two in a row"],
    ["user: one", "assistant: two", "assistant: three", "user: four"],
    ["assistant: Good morning.", "user: The answer came first."],
    ["user: one", "system: A late system message.", "user: two"],
    ["system: Only a system message."],
    ["user: one", "assistant: The last word."],
]


def run(command, data=None):
    return subprocess.run(command, input=data, capture_output=True)


class Medrun:
    def __init__(self, binary, model, threads):
        self.binary, self.model = binary, model
        self.threads = ["--threads", str(threads)] if threads else []

    def tokens(self, text):
        done = run([self.binary, "tokenize", self.model, "-f", "-"], text.encode("utf-8"))
        if done.returncode:
            sys.exit("%s tokenize: %s" % (self.binary, done.stderr.decode(errors="replace")))
        return [int(i) for i in done.stdout.split()]

    def render(self, messages, template=None, ids=False):
        """The text or ids; None where medrun refuses the conversation, with the reason."""
        command = [self.binary, "render", *(["--template", template] if template else [self.model]),
                   "--messages", "-"] + ["--ids"] * ids
        done = run(command, json.dumps(messages).encode("utf-8"))
        if done.returncode:
            return None, done.stderr.decode(errors="replace").strip()
        return ([int(i) for i in done.stdout.split()] if ids else done.stdout.decode("utf-8")), ""

    def template_names(self):
        found = re.search(r"--template NAME\s+chat template: ([^\[\n]*)",
                          run([self.binary, "help", "render"]).stdout.decode())
        return [n.strip() for n in found.group(1).split(",") if n.strip() != "none"]

    def logits(self, ids):
        with tempfile.NamedTemporaryFile() as out:
            done = run([self.binary, "logits", self.model, "--ids", " ".join(map(str, ids)),
                        "--all", "--strict", *self.threads, "-o", out.name])
            if done.returncode:
                sys.exit(done.stderr.decode(errors="replace"))
            return np.fromfile(out.name, "<f4").reshape(len(ids), -1)

    def header(self):
        with open(self.model, "rb") as f:
            f.seek(8)
            return json.loads(f.read(int.from_bytes(f.read(8), "little")))


# ---- the reference ----

class Reference:
    """The folder's tokenizer and chat template, as transformers has them.

    Without a tokenizer.json, texts without special tokens go to SentencePiece itself: what
    transformers 5 makes of a tokenizer.model alone differs from it where spaces stand together, and
    its AutoTokenizer loses the space before a text (so the class is that of tokenizer_config.json).
    """

    def __init__(self, folder):
        path = os.path.join(folder, "tokenizer.json")
        self.has_json = os.path.exists(path)
        if self.has_json:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            plain = plain_tokenizer(path)
            self.encode = lambda text: plain.encode(text, add_special_tokens=False).ids
            return
        import sentencepiece
        with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as f:
            name = json.load(f).get("tokenizer_class", "LlamaTokenizer")
        self.tokenizer = getattr(transformers, name).from_pretrained(folder)
        self.encode = sentencepiece.SentencePieceProcessor(
            os.path.join(folder, "tokenizer.model")).encode

    def render(self, messages, tokenize=False):
        """None where the template refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=tokenize, return_dict=False, add_generation_prompt=True)
        except Exception:  # whatever the template raises
            return None

    def chat_ids(self, messages):
        text = self.render(messages)
        special = text is not None and any(t in text for t in self.tokenizer.all_special_tokens)
        if self.has_json or text is None or special:
            return self.render(messages, tokenize=True)
        return self.encode(text)


def chat_of(lines):
    return [dict(zip(("role", "content"), line.split(": ", 1))) for line in lines]


class Weights:
    """The folder's tensors by name, from however many files."""

    def __init__(self, folder):
        self.files = [safe_open(os.path.join(folder, f), "pt") for f in sorted(os.listdir(folder))
                      if f.endswith(".safetensors")]
        self.of = {name: f for f in self.files for name in f.keys()}

    def only_bf16(self):
        return all(f.get_slice(name).get_dtype() == "BF16" for name, f in self.of.items())

    def load(self, module, prefix, alias):
        state = {}
        for name in module.state_dict():
            full = prefix + "." + name
            full = full if full in self.of else alias.get(full, full)
            state[name] = self.of[full].get_tensor(full).float()
        module.load_state_dict(state, strict=True, assign=True)


def streamed_model(folder, yarn_factor):
    """The model without weights: every part loads its own when it is about to run."""
    config = AutoConfig.from_pretrained(folder)
    if yarn_factor:
        assert config.rope_parameters["rope_type"] == "yarn"
        config.rope_parameters["factor"] = yarn_factor
    weights = Weights(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    inner = model.model
    inner.rotary_emb = type(inner.rotary_emb)(config)  # has no weights; must be real
    parts = {"model.embed_tokens": inner.embed_tokens, "model.norm": inner.norm,
             "lm_head": model.lm_head}
    parts.update(("model.layers.%d" % i, layer) for i, layer in enumerate(inner.layers))
    alias = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    largest = max(sum(t.numel() for t in part.state_dict().values()) for part in parts.values())
    print("reference: transformers %s, float32, eager; needs about %.1f GB for weights at a time"
          % (transformers.__version__, 4e-9 * largest))
    for name, part in parts.items():
        def load(module, _, name=name):
            weights.load(module, name, alias)

        def unload(module, *_):
            module.to("meta")
        part.register_forward_pre_hook(load)
        part.register_forward_hook(unload)
    return model, weights.only_bf16()


def make_prompts(reference, n_prompts, length):
    """Texts cut in pieces of one length, so that one pass over the weights does for all."""
    texts = [t for t in all_texts() if 20 < len(t) < 400]
    ids = [i for text in texts for i in reference.encode(text)]
    bos = [i for i in [reference.tokenizer.bos_token_id] if i is not None]
    step = length - len(bos)
    while len(ids) < n_prompts * step:
        ids += ids
    stride = len(ids) // n_prompts
    return [bos + ids[i * stride:i * stride + step] for i in range(n_prompts)]


# ---- comparisons ----

def compare_tokens(medrun, encode):
    texts = all_texts()
    wrong = [text for text in texts if medrun.tokens(text) != encode(text)]
    print("tokens:    %d of %d texts have the same ids" % (len(texts) - len(wrong), len(texts)))
    for text in wrong[:5]:
        print("  %r: transformers %s, medrun %s" % (text[:60], encode(text)[:20],
                                                    medrun.tokens(text)[:20]))
    return not wrong


def compare_chats(medrun, reference):
    """Whether all agree, and the conversations that the folder's template renders."""
    if not reference.tokenizer.chat_template:
        print("chats:     the folder has no chat template")
        return True, []
    same, kept = 0, []
    for lines in CHATS:
        messages = chat_of(lines)
        wanted = reference.chat_ids(messages)
        found, why = medrun.render(messages, ids=True)
        same += found == wanted
        if wanted is not None:
            kept.append({"messages": messages, "ids": wanted})
        if found != wanted:
            print("  %s: the folder's template %s, medrun %s" % (
                lines, "refuses" if wanted is None else repr(reference.render(messages)),
                why or repr(medrun.render(messages)[0])))
    print("chats:     %d of %d conversations have the same ids, or both refuse" % (
        same, len(CHATS)))
    return same == len(CHATS), kept


def compare_templates(medrun, reference):
    if not reference.tokenizer.chat_template:
        return
    wanted = [reference.render(chat_of(lines)) for lines in CHATS]
    counts = {}
    for name in medrun.template_names():
        found = [medrun.render(chat_of(lines), template=name)[0] for lines in CHATS]
        counts[name] = sum(a == b for a, b in zip(wanted, found))
    print("template:  the folder's renders %s" % ", ".join(
        "%d of %d as %s" % (n, len(CHATS), name)
        for name, n in sorted(counts.items(), key=lambda item: -item[1])))


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def compare_logits(medrun, prompts, references, exact):
    good = True
    for ids, wanted in zip(prompts, references):
        found = medrun.logits(ids)
        distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        a, b = log_softmax(wanted), log_softmax(found)
        divergence = (np.exp(a) * (a - b)).sum(axis=1).mean()
        top = (found.argmax(axis=1) == wanted.argmax(axis=1)).mean()
        bad = exact and not distance <= BOUND
        good &= not bad
        print("logits:    %d ids: relative L2 %.2e, largest difference %.2e, KL %.1e nats, top-1 "
              "%.2f %%%s" % (len(ids), distance, np.abs(found - wanted).max(), divergence,
                             100 * top, "  DIFFERS" if bad else ""))
    return good


# ---- the proof ----

def proof_of_logits(ids, wanted):
    """The 64 largest logits of the last position and some 192 spread over the vocabulary."""
    row = wanted[-1]
    chosen = list(np.argsort(-row)[:64])
    spread = np.linspace(0, len(row) - 1, 192).astype(int)
    chosen += [i for i in dict.fromkeys(spread) if i not in set(chosen)]
    return {"ids": [int(i) for i in ids],
            "reference": {"source": "transformers %s, float32" % transformers.__version__,
                          "ids": [int(i) for i in chosen],
                          "values": [float("%.9g" % row[i]) for i in chosen]}}


def write_proof(path, encode, chats, prompts, references):
    texts = [t for t in all_texts() if len(t) < 200][::8]
    proof = {"tokens": [{"text": text, "ids": encode(text)} for text in texts], "chats": chats,
             "logits": [proof_of_logits(ids, wanted) for ids, wanted in zip(prompts, references)]}
    with open(path, "w", encoding="ascii") as f:
        json.dump(proof, f)
        f.write("\n")
    print("proof:     %s: %d texts, %d conversations, %d prompts" % (
        path, len(texts), len(chats), len(prompts)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder")
    p.add_argument("model")
    p.add_argument("--medrun", default="./medrun")
    p.add_argument("--proof", metavar="OUT.json")
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--yarn-factor", type=float)
    p.add_argument("--threads", type=int)
    o = p.parse_args()
    if o.threads:
        torch.set_num_threads(o.threads)
    medrun = Medrun(o.medrun, o.model, o.threads)
    reference = Reference(o.folder)
    same_tokens = compare_tokens(medrun, reference.encode)
    same_chats, chats = compare_chats(medrun, reference)
    compare_templates(medrun, reference)

    model, bf16_source = streamed_model(o.folder, o.yarn_factor)
    prompts = make_prompts(reference, o.prompts, o.length)
    with torch.no_grad():
        logits = model(torch.tensor(prompts), use_cache=False).logits.numpy()
    types = {t["type"] for t in medrun.header()["tensors"]} - {"f32"}
    exact = bf16_source and types == {"bf16"}
    same_logits = compare_logits(medrun, prompts, logits, exact)
    if not exact:
        print("logits:    not judged: weights are %s, the checkpoint's matrices %s" % (
            "bfloat16" if bf16_source else "not all bfloat16", ", ".join(sorted(types))))
    if o.proof:
        write_proof(o.proof, reference.encode, chats, prompts, logits)
    what = [name for name, same in (("tokens", same_tokens), ("chats", same_chats),
                                    ("logits", same_logits)) if not same]
    print("DIFFERS: " + ", ".join(what) if what else "agrees")
    return 1 if what else 0


if __name__ == "__main__":
    sys.exit(main())
