#!/usr/bin/env python3
"""How far apart two or more checkpoints are on the same questions, from medrun-eval's result files.

    python tools/reference/eval_agreement.py DATA REFERENCE.mdr OTHER.mdr... [--bin .]

DATA as in lm_eval_compare.py. Asks every question of it with each checkpoint, plain and with the
chat template, and prints for each but the first: the share of questions with the reference's
prediction, and the mean absolute difference of a choice's log-likelihood, in nats.
"""

import argparse
import glob
import json
import os
import subprocess
import tempfile


def questions(data):
    for task, pattern in (("medqa", "medqa*.jsonl"), ("medmcqa", "medmcqa*.jsonl"),
                          ("pubmedqa", "pubmedqa*.json"), ("mmlu", "mmlu/*_val.csv")):
        for path in sorted(glob.glob(os.path.join(data, pattern))):
            yield task, path


def ask(binary, model, data, how):
    """{(file, question): (prediction, log-likelihoods)}"""
    rows = {}
    for task, path in questions(data):
        with tempfile.TemporaryDirectory() as work:
            out = os.path.join(work, "out.jsonl")
            subprocess.run([binary, model, task, path, "-q", "-o", out, *how], check=True, stdout=subprocess.DEVNULL)
            with open(out, encoding="utf-8") as f:
                for line in list(f)[1:]:
                    r = json.loads(line)
                    if "ll" in r:
                        rows[path, r["n"]] = r["pred"], r["ll"]
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("data")
    p.add_argument("models", nargs="+")
    p.add_argument("--bin", default=".")
    o = p.parse_args()
    binary = os.path.join(o.bin, "medrun-eval")
    for how in ["--no-template"], []:
        all_rows = [ask(binary, m, o.data, ["--overflow", "skip", *how]) for m in o.models]
        wanted = all_rows[0]
        for model, rows in zip(o.models[1:], all_rows[1:]):
            same = sum(rows[k][0] == wanted[k][0] for k in wanted)
            gaps = [abs(a - b) for k in wanted for a, b in zip(rows[k][1], wanted[k][1])]
            print("%s, %s: %d of %d predictions (%.1f %%), log-likelihoods differ by %.4f on average" % (
                os.path.basename(model), "plain" if how else "chat", same, len(wanted), 100 * same / len(wanted),
                sum(gaps) / len(gaps)))


if __name__ == "__main__":
    main()
