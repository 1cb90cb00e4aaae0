#!/usr/bin/env python3
"""Compare medrun-eval with lm-evaluation-harness (its `hf` model, float32) question by question.

    pip install "lm-eval[hf]==0.4.13" torch transformers tokenizers sentencepiece safetensors numpy
    python tools/reference/lm_eval_compare.py DATA [--folder HF_FOLDER]... [--bin .] [--limit 12]

DATA has the questions as they are published: medqa*.jsonl, medmcqa*.jsonl, pubmedqa*.json and
mmlu/SUBJECT_val.csv with SUBJECT_dev.csv. The harness gets the same questions in the form of the
Hugging Face copies, with its own task files, of which only the data set's place is changed;
mmlu_pro's are medqa's with more choices, as many as ten. Shots are the first of a data set, which
are then not asked.

Models: tiny random ones of Mistral, Arcee and Apertus, made here, each with the chat template of
its family, and every --folder, whose weights are rounded to bfloat16 first. medrun runs the bf16
checkpoint with --strict.

For every question, plain and with chat template, without shots, with three in one text, and with
three as turns: the prompt is the same (by SHA-256), the log-likelihood of every choice within 1e-3,
the prediction the same; and the accuracy of every task to the last digit. Exit code 1 otherwise.
"""

import argparse
import csv
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
BOUND = 1e-3
SHOTS = 3
AFM = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + persona + '<|im_end|>\\n' }}"
       "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
       "'<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}")
APERTUS = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}"
           "{% set messages = messages[1:] %}{% else %}{% set first = 'You are Apertus, a helpful assistant "
           "created by the SwissAI initiative.\\nKnowledge cutoff: 2024-04\\nCurrent date: 2026-01-02' %}"
           "{% endif %}{{ '<|system_start|>' + first + '<|system_end|><|developer_start|>Deliberation: "
           "disabled\\nTool Capabilities: disabled<|developer_end|>' }}{% for m in messages %}{{ '<|' + "
           "m['role'] + '_start|>' + m['content'] + '<|' + m['role'] + '_end|>' }}{% endfor %}"
           "{{ '<|assistant_start|>' }}")
ALPACA = ("{% if messages[0]['role'] != 'system' %}{{ '### System:\\nYou are a medical assistant, provide "
          "accurate and unbiased answers to the questions.\\n\\n' }}{% endif %}{% for m in messages %}"
          "{{ {'system': '### System:', 'user': '### Instruction:', 'assistant': '### Response:'}[m['role']]"
          " + '\\n' + m['content'] + '\\n\\n' }}{% endfor %}{{ '### Response:\\n' }}")
TINY = {"mistral-window": ("alpaca", ALPACA), "arcee-yarn": ("afm", AFM), "arcee-yarn5": ("afm", AFM),
        "apertus-plain": ("apertus", APERTUS)}
SUBJECTS = 2


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit("%s\nended with %d: %s" % (" ".join(command), done.returncode, done.stderr))
    return done.stdout


# ---- models ----

def make_tiny(work, name):
    """A fixture's model with room for long prompts and the chat template of its family."""
    import make_fixtures
    m = dict(next(m for m in make_fixtures.MODELS if m["name"] == name), max_position=16384)
    folder = os.path.join(work, name)
    make_fixtures.write_model(folder, m)
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as f:
        settings = json.load(f)
    settings["chat_template"] = TINY[name][1].replace("persona", json.dumps(afm_persona()))
    with open(path, "w", encoding="utf-8") as f:
        json.dump(settings, f)
    return folder, TINY[name][0]


def afm_persona():
    """As medrun has it; that it is the published one is checked elsewhere."""
    with open(os.path.join(os.path.dirname(__file__), "../../medrun.c"), encoding="utf-8") as f:
        text = f.read()
    lines = text[text.index('"The assistant is AFM-4.5B'):].split(',\n        .turns')[0]
    return "".join(line.strip()[1:-1] for line in lines.split("\n")).replace("\\xE2\\x80\\x94", "\u2014")


def round_weights(folder, work):
    """A copy of FOLDER with bfloat16 weights, which a bf16 checkpoint holds exactly, and with room for
    the prompts with shots (only models without rope scaling: it may follow from the length)."""
    import torch
    from safetensors.torch import load_file, save_file
    copy = os.path.join(work, os.path.basename(folder.rstrip("/")) + "-bf16")
    shutil.copytree(folder, copy)
    for path in glob.glob(os.path.join(copy, "*.safetensors")):
        tensors = {k: t.to(torch.bfloat16) for k, t in load_file(path).items()}
        os.remove(path)
        save_file(tensors, path, metadata={"format": "pt"})
    path = os.path.join(copy, "config.json")
    with open(path, encoding="utf-8") as f:
        config = json.load(f)
    if not (config.get("rope_scaling") or config.get("rope_parameters", {}).get("factor")):
        config["max_position_embeddings"] = max(config["max_position_embeddings"], 8192)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(config, f)
    return copy


# ---- data: as published for medrun, as the Hugging Face copies for the harness ----

def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    return path


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def of_medqa(r):
    return {"sent1": r["question"], "label": "ABCD".index(r["answer_idx"]),
            **{"ending%d" % i: r["options"]["ABCD"[i]] for i in range(4)}}


def of_medmcqa(r):
    return {"question": r["question"], "cop": "ABCD".index(r["answer_idx"]),
            **{"op" + k.lower(): r["options"][k] for k in "ABCD"}}


def of_pro(rows):
    """Question i gets 4 + i % 7 choices: its own and the answers of other questions."""
    made = []
    for i, r in enumerate(rows):
        options = [r["options"][k] for k in "ABCD"] + [o["answer"] for o in rows if o is not r][:i % 7]
        made.append({"question_id": i, "question": r["question"], "options": options,
                     "answer": r["answer_idx"], "category": "health", "cot_content": ""})
    return made


def split(work, name, rows, limit, published, suffix="jsonl"):
    """Shots and questions, for both sides: {task: (ours, our shots, theirs, their shots)}."""
    paths = []
    for part, some in (("ask", rows[SHOTS:SHOTS + limit]), ("shots", rows[:SHOTS])):
        ours = os.path.join(work, "%s_%s.%s" % (name, part, suffix))
        if suffix == "json":
            with open(ours, "w", encoding="utf-8") as f:
                json.dump({k: v for k, v in some}, f, indent=1)
        else:
            write_lines(ours, some)
        theirs = write_lines(os.path.join(work, "%s_%s_hf.jsonl" % (name, part)),
                             [published(r) for r in some])
        paths += [ours, theirs]
    return paths[0], paths[2], paths[1], paths[3]


def mmlu_data(work, folder, subject, limit):
    paths = []
    for part, most in (("val", limit), ("dev", SHOTS)):
        ours = os.path.join(work, "%s_%s.csv" % (subject, part))
        with open(os.path.join(folder, "%s_%s.csv" % (subject, part)), newline="", encoding="utf-8") as f:
            rows = list(csv.reader(f))[:most]
        with open(ours, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows(rows)
        paths += [ours, write_lines(os.path.join(work, "%s_%s_hf.jsonl" % (subject, part)), [
            {"question": r[0], "subject": subject, "choices": r[1:5], "answer": "ABCD".index(r[5])}
            for r in rows])]
    return paths[0], paths[2], paths[1], paths[3]


def make_data(work, data, limit):
    """{our task: (harness's file, (paths))}"""
    import lm_eval
    home = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
    medqa = read_lines(glob.glob(os.path.join(data, "medqa*.jsonl"))[0])
    medmcqa = read_lines(glob.glob(os.path.join(data, "medmcqa*.jsonl"))[0])
    with open(glob.glob(os.path.join(data, "pubmedqa*.json"))[0], encoding="utf-8") as f:
        pubmedqa = list(json.load(f).items())
    tasks = {
        "medqa": ("medqa/medqa.yaml", split(work, "medqa", medqa, limit, of_medqa)),
        "medmcqa": ("medmcqa/medmcqa.yaml", split(work, "medmcqa", medmcqa, limit, of_medmcqa)),
        "pubmedqa": ("pubmedqa/pubmedqa.yaml", split(work, "pubmedqa", pubmedqa, limit, lambda r: r[1], "json")),
        "mmlu_pro": ("leaderboard/mmlu_pro/mmlu_pro.yaml",
                     split(work, "mmlu_pro", of_pro(medqa), limit, lambda r: r))}
    found = sorted(glob.glob(os.path.join(data, "mmlu", "*_val.csv")))[:SUBJECTS]
    for path in found:
        subject = os.path.basename(path)[:-len("_val.csv")]
        tasks["mmlu " + subject] = ("mmlu/default/mmlu_%s.yaml" % subject,
                                    mmlu_data(work, os.path.dirname(path), subject, limit))
    return {name: (os.path.join(home, file), paths) for name, (file, paths) in tasks.items()}


def write_tasks(work, tasks):
    """The harness's own files, with another place of the data."""
    folder = os.path.join(work, "tasks")
    os.makedirs(folder)
    for name, (file, paths) in tasks.items():
        with open(os.path.join(folder, name.replace(" ", "_") + ".yaml"), "w", encoding="utf-8") as f:
            json.dump({"include": file, "task": "local_" + name.replace(" ", "_"), "dataset_path": "json",
                       "dataset_name": None, "dataset_kwargs": {"data_files": {"test": paths[2], "dev": paths[3]}},
                       "training_split": None, "validation_split": None, "test_split": "test",
                       "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}, "num_fewshot": None,
                       "tag": None}, f)  # JSON is YAML
    return folder


# ---- both sides ----

def harness(model, manager, names, chat, shots, turns):
    """{task: ([(prompt hash, log-likelihoods, right)], accuracy)}"""
    import lm_eval
    out = lm_eval.simple_evaluate(model=model, tasks=names, num_fewshot=shots, task_manager=manager,
                                  apply_chat_template=chat, fewshot_as_multiturn=turns, bootstrap_iters=0,
                                  log_samples=True)
    result = {}
    for name in names:
        samples = sorted(out["samples"][name], key=lambda s: s["doc_id"])
        result[name] = ([(s["prompt_hash"], [float(r[0]) for r in s["filtered_resps"]], s["acc"])
                         for s in samples], out["results"][name]["acc,none"])
    return result


def medrun(binary, model, template, task, paths, chat, shots, turns, work):
    lines = os.path.join(work, "lines.jsonl")
    if os.path.exists(lines):
        os.remove(lines)
    how = ["--template", template, "--date", "2026-01-02"] if chat else ["--no-template"]
    if shots:
        how += ["--fewshot", str(shots), paths[1]] + ["--fewshot-multiturn"] * turns
    summary = json.loads(run(binary, model, task.split()[0], paths[0], "--strict", "--quiet", "--summary", "json",
                             "-o", lines, *how))
    rows = sorted(read_lines(lines)[1:], key=lambda r: r["n"])
    return [(r["prompt"], r["ll"], float(r["pred"] == r["truth"])) for r in rows], summary["results"][0]["acc"]


def compare(ours, theirs, where):
    """How many questions differ, and the largest difference of a log-likelihood."""
    (mine, my_acc), (wanted, acc) = ours, theirs
    bad, worst = 0, 0.0
    if len(mine) != len(wanted):
        print("%s: %d questions, wanted %d" % (where, len(mine), len(wanted)))
        return 1, 0.0
    for i, ((prompt, ll, right), (wanted_prompt, wanted_ll, wanted_right)) in enumerate(zip(mine, wanted)):
        gap = max(abs(a - b) for a, b in zip(ll, wanted_ll)) if len(ll) == len(wanted_ll) else float("inf")
        worst = max(worst, gap)
        if prompt != wanted_prompt or gap > BOUND or right != wanted_right or \
                ll.index(max(ll)) != wanted_ll.index(max(wanted_ll)):
            bad += 1
            print("%s, question %d: prompt %s, %s, wanted %s" % (
                where, i, "same" if prompt == wanted_prompt else "DIFFERS", ll, wanted_ll))
    if float(my_acc) != float(acc):
        bad += 1
        print("%s: accuracy %r, wanted %r" % (where, my_acc, acc))
    return bad, worst


def compare_model(folder, template, o, work, tasks, task_folder):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    checkpoint = os.path.join(work, "model.mdr")
    run(os.path.join(o.bin, "medrun-export"), folder, checkpoint, "--type", "bf16", "--template", template)
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
    manager = TaskManager(include_path=task_folder)
    bad = count = 0
    worst = 0.0
    for chat, shots, turns in ((False, 0, False), (False, SHOTS, False), (True, 0, False), (True, SHOTS, False),
                               (True, SHOTS, True)):
        theirs = harness(model, manager, ["local_" + t.replace(" ", "_") for t in tasks], chat, shots, turns)
        for task, (_, paths) in tasks.items():
            ours = medrun(os.path.join(o.bin, "medrun-eval"), checkpoint, template, task, paths, chat, shots, turns,
                          work)
            where = "%s, %s, %s, %d shots%s" % (os.path.basename(folder), task, "chat" if chat else "plain", shots,
                                                " as turns" if turns else "")
            more, gap = compare(ours, theirs["local_" + task.replace(" ", "_")], where)
            bad, worst, count = bad + more, max(worst, gap), count + len(ours[0])
    print("%s: %d questions, %d differ, log-likelihoods within %.1e" % (os.path.basename(folder), count, bad, worst),
          flush=True)
    os.remove(checkpoint)
    return bad


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("data")
    p.add_argument("--folder", action="append", default=[], help="also a model of the llama3 template")
    p.add_argument("--bin", default=".", help="where medrun-eval and medrun-export are")
    p.add_argument("--limit", type=int, default=12, help="questions of each data set")
    p.add_argument("--tiny", nargs="*", default=list(TINY), help="which of " + ", ".join(TINY))
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = os.path.join(work, "hf")
        tasks = make_data(work, o.data, o.limit)
        task_folder = write_tasks(work, tasks)
        bad = 0
        for name in o.tiny:
            folder, template = make_tiny(work, name)
            bad += compare_model(folder, template, o, work, tasks, task_folder)
        for folder in o.folder:
            bad += compare_model(round_weights(folder, work), "llama3", o, work, tasks, task_folder)
    print("DIFFERS" if bad else "agrees")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
