#!/usr/bin/env python3
"""Compare medrun-eval with lm-evaluation-harness (its `hf` model, float32) question by question.

    pip install "lm-eval[hf]==0.4.13" torch transformers tokenizers sentencepiece safetensors numpy
    python tools/reference/lm_eval_compare.py DATA [--folder HF_FOLDER]... [--bin .] [--limit 12]
        [--template llama3] [--tasks TASK...] [--plain] [--subjects 2] [--no-chat]

DATA has the questions as they are published: medqa*.jsonl, medmcqa*.jsonl, pubmedqa*.json and
mmlu/SUBJECT_val.csv with SUBJECT_dev.csv. The harness gets the same questions in the form of the
Hugging Face copies, with its own task files, of which only the data set's place is changed;
mmlu_pro's are medqa's with more choices, as many as ten. Shots are the first of a data set, which
are then not asked.

Models: tiny random ones of Mistral, Arcee and Apertus, made here, each with the chat template of
its family, and every --folder, whose weights are rounded to bfloat16 first, with --template. medrun
runs the bf16 checkpoint with --strict. --tasks: only these. --plain: without shots and without what
the model writes. --no-chat: nor with a chat template. --subjects: how many of mmlu.

For every question, plain and with chat template, without shots, with three in one text, and with
three as turns: the prompt is the same (by SHA-256), the log-likelihood of every choice within 1e-3,
the prediction the same; and the accuracy of every task to the last digit. With --mode generate the
prompt, the text that the model writes (greedily, at most 48 tokens), what counts as its answer, and
the accuracy are the same: the harness's own mmlu_pro, and tasks written here as MeditronFO's are
described. Exit code 1 otherwise.
"""

import argparse
import csv
import glob
import hashlib
import json
import os
import re
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
GENERATED = 48
REASON = ("Instructions: The following are multiple choice questions about medical knowledge. Solve them in a "
          "step-by-step fashion, starting by summarizing the available information. Output a single option from "
          "the %s options as the final answer.\n\n Question: %s\n Response (think step by step and then end with "
          "'Final Answer:' followed by *only* the letter corresponding to the correct answer enclosed in "
          "parentheses)")
REASONED = {  # our task: (text, target)
    "medqa": (REASON % ("four", "{{sent1}} (A) {{ending0}} (B) {{ending1}} (C) {{ending2}} (D) {{ending3}}"),
              "{{['A', 'B', 'C', 'D'][label]}}"),
    "medmcqa": (REASON % ("four", "{{question}}\n (A) {{opa}} (B) {{opb}} (C) {{opc}} (D) {{opd}}"),
                "{{['A', 'B', 'C', 'D'][cop]}}"),
    "pubmedqa": (REASON % ("three", "{{CONTEXTS | join(' ')}} {{QUESTION.strip()}} (A) Yes (B) No (C) Maybe "),
                 "{{ {'yes': 'A', 'no': 'B', 'maybe': 'C'}[final_decision] }}")}


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
                     "answer": r["answer_idx"], "category": "health", "cot_content":
                     "A: Let's think step by step. Nothing else fits. The answer is (%s)." % r["answer_idx"]})
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


def make_data(work, data, limit, subjects):
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
    found = sorted(glob.glob(os.path.join(data, "mmlu", "*_val.csv")))[:subjects]
    for path in found:
        subject = os.path.basename(path)[:-len("_val.csv")]
        tasks["mmlu " + subject] = ("mmlu/default/mmlu_%s.yaml" % subject,
                                    mmlu_data(work, os.path.dirname(path), subject, limit))
    return {name: (os.path.join(home, file), paths) for name, (file, paths) in tasks.items()}


def local_name(task, generate):
    return ("write_" if generate else "local_") + task.replace(" ", "_")


def write_tasks(work, tasks):
    """The harness's own files, with another place of the data; and the tasks whose answers are
    generated."""
    folder = os.path.join(work, "tasks")
    os.makedirs(folder)
    for name, (file, paths) in tasks.items():
        place = {"dataset_path": "json", "dataset_name": None,
                 "dataset_kwargs": {"data_files": {"test": paths[2], "dev": paths[3]}}, "training_split": None,
                 "validation_split": None, "test_split": "test", "fewshot_split": "dev", "num_fewshot": None,
                 "tag": None}
        made = {local_name(name, False): {"include": file, "fewshot_config": {"sampler": "first_n"}, **place}}
        if name == "mmlu_pro":
            home = os.path.dirname(os.path.dirname(os.path.dirname(file)))
            made[local_name(name, True)] = {
                "include": os.path.join(home, "mmlu_pro", "mmlu_pro_health.yaml"), **place}
        if name in REASONED:
            made[local_name(name, True)] = {
                "output_type": "generate_until", "doc_to_text": REASONED[name][0],
                "doc_to_target": REASONED[name][1], "filter_list": [{"name": "strict-final-answer", "filter": [
                    {"function": "regex",
                     "regex_pattern": r"(?i)Answer[^A-D]*(?::)*[^A-D]*(?:boxed)*[^A-D]*([A-D])\b"},
                    {"function": "take_first"}]}],
                "generation_kwargs": {"until": ["</s>", "Q:", "<|im_end|>", "<|end_of_text|>"], "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                                 "ignore_case": True, "ignore_punctuation": True}], **place}
        for task, settings in made.items():
            with open(os.path.join(folder, task + ".yaml"), "w", encoding="utf-8") as f:
                json.dump({"task": task, **settings}, f)  # JSON is YAML
    return folder


# ---- both sides ----

def harness(model, manager, names, chat, shots, turns):
    """{task: ([(prompt hash, log-likelihoods or text, right)], accuracy)}"""
    import lm_eval
    out = lm_eval.simple_evaluate(model=model, tasks=names, num_fewshot=shots, task_manager=manager,
                                  apply_chat_template=chat, fewshot_as_multiturn=turns, bootstrap_iters=0,
                                  gen_kwargs="max_gen_toks=%d" % GENERATED, log_samples=True)
    result = {}
    for name in names:
        samples = sorted(out["samples"][name], key=lambda s: s["doc_id"])
        scores = out["results"][name]
        if "acc,none" in scores:
            result[name] = ([(s["prompt_hash"], [float(r[0]) for r in s["filtered_resps"]], s["acc"])
                             for s in samples], scores["acc,none"])
        else:
            result[name] = ([(s["prompt_hash"], s["resps"][0][0], s["exact_match"]) for s in samples],
                            next(v for k, v in scores.items() if k.startswith("exact_match,")))
    return result


def medrun(binary, model, template, task, paths, chat, shots, turns, generate, work):
    lines = os.path.join(work, "lines.jsonl")
    if os.path.exists(lines):
        os.remove(lines)
    how = ["--template", template, "--date", "2026-01-02"] if chat else ["--no-template"]
    if shots:
        how += ["--fewshot", str(shots), paths[1]] + ["--fewshot-multiturn"] * turns
    if generate:
        how += ["--mode", "generate", "--predict", str(GENERATED)]
    summary = json.loads(run(binary, model, task.split()[0], paths[0], "--strict", "--quiet", "--summary", "json",
                             "-o", lines, *how))
    rows = sorted(read_lines(lines)[1:], key=lambda r: r["n"])
    return ([(r["prompt"], r["text" if generate else "ll"], float(r["pred"] == r["truth"])) for r in rows],
            summary["results"][0]["acc"])


def same_text(mine, wanted):
    """But for bytes that are no UTF-8: tokenizers makes U+FFFD of them by other rules, and also of the
    byte tokens beside them."""
    return re.fullmatch(".+".join(re.escape(part) for part in re.split("\ufffd+", wanted)), mine, re.DOTALL)


def compare(ours, theirs, where):
    """How many questions differ, and the largest difference of a log-likelihood."""
    (mine, my_acc), (wanted, acc) = ours, theirs
    bad, worst = 0, 0.0
    if len(mine) != len(wanted):
        print("%s: %d questions, wanted %d" % (where, len(mine), len(wanted)))
        return 1, 0.0
    for i, ((prompt, ll, right), (wanted_prompt, wanted_ll, wanted_right)) in enumerate(zip(mine, wanted)):
        if isinstance(ll, str):
            same = same_text(ll, wanted_ll)
        else:
            gap = max(abs(a - b) for a, b in zip(ll, wanted_ll)) if len(ll) == len(wanted_ll) else float("inf")
            worst = max(worst, gap)
            same = gap <= BOUND and ll.index(max(ll)) == wanted_ll.index(max(wanted_ll))
        if prompt != wanted_prompt or not same or right != wanted_right:
            bad += 1
            print("%s, question %d: prompt %s, %r, wanted %r" % (
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
    hows = [(False, 0, False), (True, 0, False)][:1 if o.no_chat else 2]
    if not o.plain:
        hows += [(False, SHOTS, False), (True, SHOTS, False), (True, SHOTS, True)]
    for generate in (False, True)[:1 if o.plain else 2]:
        for chat, shots, turns in hows:
            # MeditronFO's have no shots
            some = [t for t in tasks if not generate or t == "mmlu_pro" or (t in REASONED and not shots)]
            theirs = harness(model, manager, [local_name(t, generate) for t in some], chat, shots, turns)
            for task in some:
                ours = medrun(os.path.join(o.bin, "medrun-eval"), checkpoint, template, task, tasks[task][1], chat,
                              shots, turns, generate, work)
                where = "%s, %s%s, %s, %d shots%s" % (os.path.basename(folder), task, " generated" * generate,
                                                      "chat" if chat else "plain", shots, " as turns" * turns)
                more, gap = compare(ours, theirs[local_name(task, generate)], where)
                bad, worst, count = bad + more, max(worst, gap), count + len(ours[0])
    print("%s: %d questions, %d differ, log-likelihoods within %.1e" % (os.path.basename(folder), count, bad, worst),
          flush=True)
    os.remove(checkpoint)
    return bad


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("data")
    p.add_argument("--folder", action="append", default=[], help="also this model")
    p.add_argument("--template", default="llama3", help="of the folders")
    p.add_argument("--tasks", nargs="*", help="only these")
    p.add_argument("--plain", action="store_true", help="no shots, nothing written")
    p.add_argument("--no-chat", action="store_true", help="with --plain: no chat template")
    p.add_argument("--subjects", type=int, default=2, help="how many of mmlu's")
    p.add_argument("--bin", default=".", help="where medrun-eval and medrun-export are")
    p.add_argument("--limit", type=int, default=12, help="questions of each data set")
    p.add_argument("--tiny", nargs="*", default=list(TINY), help="which of " + ", ".join(TINY))
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ["HF_HOME"] = os.path.join(work, "hf")
        tasks = make_data(work, o.data, o.limit, o.subjects)
        tasks = {t: tasks[t] for t in tasks if not o.tasks or t.split()[0] in o.tasks}
        task_folder = write_tasks(work, tasks)
        bad = 0
        for name in o.tiny:
            folder, template = make_tiny(work, name)
            bad += compare_model(folder, template, o, work, tasks, task_folder)
        for folder in o.folder:
            bad += compare_model(round_weights(folder, work), o.template, o, work, tasks, task_folder)
    print("DIFFERS" if bad else "agrees")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
