#!/usr/bin/env python3
"""Compare what llama.cpp computes from a GGUF with what medrun computes from a checkpoint of it.

    pip install llama-cpp-python numpy
    python tools/reference/compare_gguf.py MODEL.gguf [MODEL.mdr] [--folder HF_FOLDER]
        [--medrun ./medrun] [--steps 64] [--bound 0.01]

Prints the relative L2 distance of the logits of several prompts, the share of positions where both
have the same largest logit, and how many of --steps greedy tokens after each prompt agree; where
they part, by how much llama.cpp preferred its own. Exit code 1 when logits are further apart than
--bound, greedy tokens part where the preference was clearer than the distance of the logits
explains, or the ids of an ordinary text differ. The prompts are random ids. With --folder,
transformers' float32 logits stand for medrun's (or are a third party beside them).

llama.cpp keeps its cache in float32 here, but rounds what it multiplies: to bfloat16 with BF16
weights, to 8 bits with quantised ones. That rounding is most of the distance, and in a random
model, whose logits lie close together, enough for greedy tokens to part. A file with F32 weights
(make_gguf.py --type F32) shows what is left: nothing but float32 rounding.
"""

import argparse
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np

TEXTS = ["The patient is a 54-year-old woman with fever, cough and shortness of breath.",
         "Which of these is the next step?\n(A) Observation (B) Surgery\nAnswer: 12345",
         "Sodium 138 mmol/l; potassium 4.1, then 3.9 (see p. 12). It isn't urgent."]


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, path):
        self.model = llama_cpp.Llama(path, n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True,
                                     n_threads=1, n_threads_batch=1, flash_attn=False,
                                     type_k=llama_cpp.GGML_TYPE_F32,
                                     type_v=llama_cpp.GGML_TYPE_F32, verbose=False)

    def logits(self, ids):
        self.model.reset()
        self.model.eval(ids)
        return self.model.scores[:len(ids)].copy()

    def next(self, ids, fresh):
        """Logits after ids, of which all but the last were evaluated before, unless FRESH."""
        if fresh:
            return self.logits(ids)[-1]
        self.model.eval(ids[-1:])
        return self.model.scores[len(ids) - 1].copy()

    def tokens(self, text):
        return self.model.tokenize(text.encode("utf-8"), add_bos=False, special=False)


class Medrun:
    name = "medrun"

    def __init__(self, binary, path):
        self.binary, self.path = binary, path

    def logits(self, ids):
        with tempfile.NamedTemporaryFile() as out:
            subprocess.run([self.binary, "logits", self.path, "--ids", " ".join(map(str, ids)),
                            "--all", "--strict", "-o", out.name], check=True)
            return np.fromfile(out.name, "<f4").reshape(len(ids), -1)

    def tokens(self, text):
        done = subprocess.run([self.binary, "tokenize", self.path, "-p", text], check=True,
                              capture_output=True, text=True)
        return [int(i) for i in done.stdout.split()]


class Transformers:
    name = "transformers"

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()

    def logits(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def tokens(self, text):
        return None


def relative_l2(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def compare_greedy(one, other, prompt, steps):
    """Steps that agree, and where they part how clearly each preferred its own token."""
    ids = list(prompt)
    for _ in range(steps):  # llama.cpp's tokens; then the other's choice at each of those positions
        ids.append(int(one.next(ids, len(ids) == len(prompt)).argmax()))
    theirs = other.logits(ids[:-1])[len(prompt) - 1:]
    ours = one.logits(ids[:-1])[len(prompt) - 1:]
    same = theirs.argmax(axis=1) == np.array(ids[len(prompt):])
    if same.all():
        return steps, 0.0, 0.0
    first = int(same.argmin())
    a, b = ids[len(prompt) + first], int(theirs[first].argmax())
    return first, float(ours[first][a] - ours[first][b]), float(np.abs(
        ours[first] - theirs[first]).max())


def prompts_of(vocab):
    random = np.random.RandomState(5)
    return [random.randint(0, vocab, size=n).tolist() for n in (1, 7, 64, 300)]


def compare(one, other, steps, bound):
    failed = False
    for prompt in prompts_of(one.model.n_vocab()):
        a, b = one.logits(prompt), other.logits(prompt)
        distance = relative_l2(a, b)
        top = (a.argmax(axis=1) == b.argmax(axis=1)).mean()
        n, preference, largest = compare_greedy(one, other, prompt, steps)
        bad = distance > bound or (n < steps and preference > 2 * largest)
        failed |= bad
        print("%s, %3d ids: relative L2 %.2e, top-1 %.1f %%, greedy %d of %d%s%s" % (
            other.name, len(prompt), distance, 100 * top, n, steps, "" if n == steps else
            " (parts at a preference of %.1e, logits within %.1e)" % (preference, largest),
            "  DIFFERS" if bad else ""))
    for text in TEXTS:
        mine, theirs = other.tokens(text), one.tokens(text)
        if mine is not None and mine != theirs:
            failed = True
            print("%s: %r: ids %s, llama.cpp %s  DIFFERS" % (other.name, text, mine, theirs))
    return failed


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("gguf")
    p.add_argument("model", nargs="?")
    p.add_argument("--folder")
    p.add_argument("--medrun", default="./medrun")
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--bound", type=float, default=0.01)
    o = p.parse_args()
    others = [Medrun(o.medrun, o.model)] if o.model else []
    others += [Transformers(o.folder)] if o.folder else []
    if not others:
        p.error("wanted MODEL.mdr, --folder or both")
    one = LlamaCpp(o.gguf)
    failed = [compare(one, other, o.steps, o.bound) for other in others]
    print("DIFFERS" if any(failed) else "agrees")
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(main())
