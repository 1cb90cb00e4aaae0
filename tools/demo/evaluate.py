"""Asks the held-out questions and counts the answers that hold all their keys.

    python evaluate.py FOLDER                               with transformers, greedily
    python evaluate.py FOLDER --medrun ./medrun MODEL.mdr   with the engine, one question at a time
    python evaluate.py FOLDER --ask "What is asthma?"       prints one answer, and grades nothing

Ends with exit code 1 when the share of right answers is below --require. Keys are a crude judge: an answer that holds
them can still be wrong elsewhere. They are the same for every run, though, and nobody chose them after the fact.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections import Counter

from corpus import HERE, has_keys

MAX_NEW = 96            # tokens of an answer; the longest answer of the corpus has fewer


def answers_of_transformers(folder, questions, batch=32):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tok = AutoTokenizer.from_pretrained(folder, padding_side="left")    # so that every row ends where it goes on
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for i in range(0, len(questions), batch):
        chats = [[{"role": "user", "content": q}] for q in questions[i:i + batch]]
        prompts = tok.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tok(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
        new = out[:, inputs.input_ids.shape[1]:]
        answers += [a.strip() for a in tok.batch_decode(new, skip_special_tokens=True)]
    return answers


def answers_of_medrun(program, model, questions):
    answers = []
    for q in questions:
        command = [program, "run", model, "-p", q, "--temp", "0", "-n", str(MAX_NEW)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr.strip()}")
        answers.append(done.stdout.strip())
    return answers


def report(rows, answers, show):
    """Prints the table and returns the share of right answers."""
    right = [has_keys(a, r["keys"]) for r, a in zip(rows, answers)]
    for row, answer, ok in zip(rows, answers, right):
        if show and not ok:
            print(f"[{row['split']} {row['kind']} / {row['topic']} / {row['aspect']}] {row['question']}\n"
                  f"    {answer}\n    wanted: {row['keys']}")
    total, good = Counter(), Counter()
    for row, ok in zip(rows, right):
        for group in (("kind", row["kind"]), ("split", row["split"]), ("all", "")):
            total[group] += 1
            good[group] += ok
    for group in sorted(total):
        print(f"{group[0]:6} {group[1]:11} {good[group]:4} of {total[group]:4}  {good[group] / total[group]:6.1%}")
    return sum(right) / len(right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="the checkpoint that train.py wrote")
    parser.add_argument("--medrun", nargs=2, metavar=("PROGRAM", "MODEL"), help="ask this program instead")
    parser.add_argument("--require", type=float, default=0.8, help="least share of right answers (default 0.8)")
    parser.add_argument("--show", action="store_true", help="print the answers that miss a key")
    parser.add_argument("--ask", nargs="+", metavar="QUESTION", help="print the answers to these and stop")
    parser.add_argument("--questions", type=pathlib.Path, default=HERE / "heldout.jsonl")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()]
    asked = args.ask or [r["question"] for r in rows]
    if args.medrun:
        answers = answers_of_medrun(*args.medrun, asked)
    else:
        answers = answers_of_transformers(args.folder, asked)
    if args.ask:
        for q, a in zip(asked, answers):
            print(f"> {q}\n{a}\n")
        return
    share = report(rows, answers, args.show)
    if share < args.require:
        sys.exit(f"{share:.1%} of the answers hold their keys; required: {args.require:.0%}")


if __name__ == "__main__":
    main()
