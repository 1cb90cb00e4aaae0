"""How far a checkpoint's logits are from float32: mean KL divergence and top-1 agreement.

    python tools/reference/precision.py HF_FOLDER MODEL.mdr TEXT... [--medrun ./medrun] [--strict]
        [--chunk 256] [--limit 20000]

TEXT is a UTF-8 text file, cut into windows of --chunk tokens, or a .jsonl of the demo model's
held-out questions ("question", "answer"), each rendered as a chat, whose answers are counted apart.
The reference is transformers in float32 on the folder's weights; medrun's side is `medrun logits
--all`. Prints the number of positions, the mean and the largest KL(reference || medrun) in nats, and
the share of positions where both have the same largest logit. Needs torch and transformers.
"""
import argparse
import json
import subprocess
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def windows(path, tokenizer, chunk, limit):
    """(token ids, position from which the answer is predicted) for each window, LIMIT ids in all."""
    if path.endswith(".jsonl"):
        total = 0
        for line in open(path, encoding="utf-8"):
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
        return
    ids = tokenizer.encode(open(path, encoding="utf-8").read(), add_special_tokens=False)[:limit]
    for at in range(0, len(ids) - 1, chunk - 1):
        yield [tokenizer.bos_token_id] + ids[at:at + chunk - 1], None


def report(what, divergence, same):
    if same:
        print(f"{what}: {len(same)} positions, KL {np.mean(divergence):.3g} nats (largest "
              f"{np.max(divergence):.3g}), top-1 {100 * np.mean(same):.2f} %")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder")
    p.add_argument("model")
    p.add_argument("text", nargs="+")
    p.add_argument("--medrun", default="./medrun")
    p.add_argument("--strict", action="store_true")
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--limit", type=int, default=20000)
    o = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(o.folder)
    model = AutoModelForCausalLM.from_pretrained(o.folder, dtype=torch.float32).eval()
    for path in o.text:
        divergence, same, answers, same_answers = [], [], [], []
        for ids, answer in windows(path, tokenizer, o.chunk, o.limit):
            with torch.no_grad():
                reference = model(torch.tensor([ids])).logits[0].double()
            with tempfile.NamedTemporaryFile() as out:
                command = [o.medrun, "logits", o.model, "--ids", " ".join(map(str, ids)), "--all",
                           "-o", out.name] + ["--strict"] * o.strict
                subprocess.run(command, check=True)
                ours = np.fromfile(out.name, dtype="<f4").reshape(len(ids), -1)
            a = torch.log_softmax(reference, -1)
            b = torch.log_softmax(torch.from_numpy(ours).double(), -1)
            kl = (a.exp() * (a - b)).sum(-1).tolist()
            agree = (a.argmax(-1) == b.argmax(-1)).tolist()
            divergence += kl
            same += agree
            if answer is not None:
                answers += kl[answer:]
                same_answers += agree[answer:]
        report(path, divergence, same)
        report("  the answers in it", answers, same_answers)


main()
