#!/usr/bin/env python3
"""System calls that fail, programs that are killed, memory that ends: what becomes of the files.

    faults.py BIN [--model FILE.mdr] [--runs 300] [--seed 1] [--only WORDS]

Runs commands of medrun's programs in BIN, which should be linked statically (make static
STATIC_CC=gcc), under strace's fault injection: one system call fails, or the program is killed at one.
After each run it looks whether

    - files that are none of the command's are as they were;
    - the output is the old one, or the new one to its last byte, and the new one only if it is whole;
    - the exit code is that of the fault: 0 only with the new output, 6 where memory ended, 0 where a
      call was merely interrupted; at most one line says why;
    - nothing half written is left, except by a kill; what a kill left does not stop --force.

Then the same with less and less address space. Prints what is wrong, and counts. Needs strace, Linux.
"""
import argparse
import collections
import json
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile

# What a call may answer, and the exit codes that are right then. No signal interrupts the writing of a
# regular file, so stdio need not go on after it. brk is not here: Linux's never answers with an error.
FAULTS = {
    "openat": {"EINTR": {0}, "EMFILE": {1, 3}, "EACCES": {1, 3}, "EIO": {1, 3}, "ENOMEM": {6}},
    "read": {"EINTR": {0}, "EIO": {0, 1, 2, 3}}, "pread64": {"EINTR": {0}, "EIO": {1, 3}},
    "write": {"EINTR": {0, 1}, "ENOSPC": {1}, "EIO": {1}},
    "pwrite64": {"EINTR": {0}, "ENOSPC": {1}, "EIO": {1}},
    "fsync": {"EIO": {0, 1}, "ENOSPC": {0, 1}, "EINTR": {0, 1}},     # 0: of the folder, after the renaming
    "fdatasync": {"EIO": {1}},
    "rename": {"EACCES": {1}, "EIO": {1}}, "renameat": {"EACCES": {1}}, "renameat2": {"EACCES": {1}},
    "ftruncate": {"ENOSPC": {1}, "EINTR": {0}, "EIO": {1}}, "fallocate": {"ENOSPC": {0, 1}, "EINTR": {0}},
    "fcntl": {"ENOLCK": {0, 1, 3}, "EINTR": {0, 1, 3}}, "flock": {"ENOLCK": {0, 1}, "EINTR": {0, 1}},
    "newfstatat": {"EIO": {0, 1, 3}}, "fstat": {"EIO": {0, 1, 3}}, "lseek": {"EIO": {0, 1, 3}},
    "mmap": {"ENOMEM": {0, 6}}, "clone3": {"EAGAIN": {0, 6}},
    "madvise": {"ENOMEM": {0}}, "close": {"EIO": {0, 1}}, "unlink": {"EACCES": {0, 1}},
}


def commands(bin_, model, fixtures, work):
    """name: (line, output or None, whether its bytes are the same each time)"""
    out = str(work / "out")
    asked, text = work / "asked.jsonl", work / "text.txt"
    return {
        "logits": ([bin_ / "medrun", "logits", model, "--ids", "1 2 3", "--all", "-o", out, "-t", "1"], True),
        "save": ([bin_ / "medrun", "run", model, "-p", "hello", "-n", "2", "-q", "--temp", "0", "-t", "1",
                  "--save-prefix", out], False),
        "record": ([bin_ / "medrun-lab", "record", model, out, "-p", "hello", "-n", "2", "-q", "--temp", "0",
                    "-t", "1"], False),
        "export": ([bin_ / "medrun-export", fixtures / "llama-tied", out, "--type", "int8",
                    "--threads", "1"], True),
        "export-gguf": ([bin_ / "medrun-export", fixtures / "gguf/llama-small-bf16.gguf", out,
                         "--type", "int4", "--threads", "1"], True),
        "tokenizer": ([bin_ / "medrun-export", "--tokenizer-only", fixtures / "llama-tied", out], True),
        "eval": ([bin_ / "medrun-eval", model, "generic", asked, "-q", "-t", "1", "-o", out], True),
        "page": ([bin_ / "medrun-eval", model, "generic", asked, "-q", "-t", "1", "--html", out], False),
        "file": ([bin_ / "medrun", "run", model, "-f", text, "-n", "2", "-q", "--temp", "0",
                  "-t", "1"], None),
        "verify": ([bin_ / "medrun", "verify", model], None),
        "show": ([bin_ / "medrun", "show", model], None),
    }


class Campaign:
    def __init__(self, args, work):
        self.args, self.work, self.chance = args, work, random.Random(args.seed)
        self.counts, self.wrong = collections.Counter(), 0

    def fresh(self, name, old):
        """The folder as before each run: somebody's letter, and an earlier output where there may be one."""
        for path in self.work.glob("out*"):
            path.unlink()
        (self.work / "letter").write_text("a letter")
        if old is not None:
            (self.work / "out").write_bytes(old)

    def run(self, line, before=(), space=None):
        limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (space, space))) if space else None
        done = subprocess.run([*before, *map(str, line)], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=120, cwd=self.work, preexec_fn=limit, check=False)
        return done.returncode, done.stdout, done.stderr.decode(errors="replace")

    def strace(self, line, injection):
        return self.run(line, ["strace", "-f", "-o", "/dev/null", "-e", "inject=" + injection])

    def complain(self, name, fault, what):
        self.wrong += 1
        print(f"WRONG {name}, {fault}: {what}", flush=True)

    def output(self):
        path = self.work / "out"
        return path.read_bytes() if path.exists() else None

    def whole(self, name, data):
        if name == "save":              # its state of chance and time differ, its parts do not
            return len(data) == len(self.new) and data[:8] == self.new[:8]
        if name == "record":
            try:
                return bool(json.loads(data))
            except ValueError:
                return False
        return data.startswith(b"<!-- medrun -->") and data.rstrip()[-20:] == self.new.rstrip()[-20:]

    def judge(self, name, fault, result, old, new, same, codes, killed=False):
        code, stdout, stderr = result
        found = self.output()
        self.counts[f"exit {code}"] += 1
        if (self.work / "letter").read_text() != "a letter":
            self.complain(name, fault, "the letter is another")
        if code not in codes:
            self.complain(name, fault, f"exit {code}, wanted one of {sorted(codes)}: {stderr.strip()[-200:]}")
        if same is None:
            return
        is_new = found == new if same else found is not None and self.whole(name, found)
        if name == "eval" and found is not None and new.startswith(found):
            is_new, found = found == new, old               # lines of questions that were answered stay
        if not is_new and found != old:
            self.complain(name, fault, "the output is neither the old one nor the new one")
        if code == 0 and not is_new:
            self.complain(name, fault, "exit 0 without the new output")
        left = [p.name for p in self.work.glob("out.*")]
        if left and not killed and "unlink" not in fault and "stat" not in fault:
            self.complain(name, fault, f"left: {left}")
        if killed and left:
            self.counts["kills that left something half written"] += 1

    def calls(self, line):
        """How often the command makes each call, which openat ask for what may as well not be there, and
        which writes are lines for people on stderr, whose loss is no failure."""
        log = self.work / "trace"
        self.run(line, ["strace", "-f", "-o", log])
        text = log.read_text(errors="replace")
        opened = re.findall(r"^\d+ +openat\(\w+, (.*?)\)", text, re.M)         # or a folder, to sync it
        asks = {n for n, words in enumerate(opened, 1)
                if re.match(r'"/(sys|proc|etc|dev)/|.*/README\.md"|.*O_DIRECTORY', words) or
                re.match(f'"{re.escape(str(self.work))}/?"', words)}
        writes = re.findall(r"^\d+ +write\((\d+),", text, re.M)
        told = {n for n, fd in enumerate(writes, 1) if fd == "2"}
        return collections.Counter(re.findall(r"^\d+ +(\w+)\(", text, re.M)), asks, told

    def inject(self, name, line, same):
        self.fresh(name, None)
        code, stdout, stderr = self.run(line)
        self.new = new = self.output()
        if code or (same is not None and new is None):
            sys.exit(f"{name}: exit {code}: {stderr}")
        old = None if name == "eval" else new
        if new and same is False:
            old = new[:len(new) // 2]                       # cut, with the mark of its kind
        self.fresh(name, old)
        calls, asks, told = self.calls(line)
        some = set(self.chance.sample(sorted(asks), min(len(asks), 4)))
        cases = [(c, f, n) for c, faults in FAULTS.items() for f in faults for n in range(1, calls[c] + 1)
                 if (c != "openat" or n not in asks or n in some)]
        for call, error, n in self.chance.sample(cases, min(len(cases), self.args.runs)):
            self.fresh(name, old)
            fault = f"{call} {n} of {calls[call]}: {error}"
            result = self.strace(line, f"{call}:error={error}:when={n}")
            self.counts["faults"] += 1
            no_matter = n in {"openat": asks, "write": told}.get(call, ())
            codes = FAULTS[call][error] | ({0} if no_matter else set())
            self.judge(name, fault, result, old, new, same, codes)
        places = [(c, n) for c in calls if c in FAULTS for n in range(1, calls[c] + 1)]
        for call, n in self.chance.sample(places, min(len(places), self.args.runs // 4)):
            self.fresh(name, old)
            result = self.strace(line, f"{call}:signal=KILL:when={n}")
            self.counts["kills"] += 1
            self.judge(name, f"killed at {call} {n}", result, old, new, same, {-9, 137, 0}, killed=True)
            if same is not None:
                code, _, stderr = self.run([*line, "--force"])
                if code or not self.output():
                    self.complain(name, f"after a kill at {call} {n}",
                                  f"--force: exit {code}: {stderr.strip()}")
        return old, new

    def squeeze(self, name, line, same, old, new):
        """Less and less address space: from what is enough down to what loads the program."""
        space = 1 << 20
        for _ in range(self.args.spaces):
            self.fresh(name, old)
            space += self.args.step << 10
            result = self.run(line, space=space)
            if result[0] < 0 or result[0] == 127:           # not even the program fits
                continue
            self.counts["address spaces"] += 1
            self.judge(name, f"{space >> 10} KiB of address space", result, old, new, same, {0, 6})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin")
    parser.add_argument("--model", default="build/llama-tied-int8.mdr")
    parser.add_argument("--runs", type=int, default=300, help="faults for each command; a fourth of it kills")
    parser.add_argument("--spaces", type=int, default=60, help="how many sizes of address space")
    parser.add_argument("--step", type=int, default=384, help="KiB of address space from one run to the next")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    root = pathlib.Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        shutil.copy(args.model, work / "model.mdr")
        question = {"question": "What is it?", "choices": ["a", "b"], "answer": 0}
        (work / "asked.jsonl").write_text((json.dumps(question) + "\n") * 3)
        (work / "text.txt").write_text("Is 38.5 a fever?\n")
        campaign = Campaign(args, work)
        bin_ = (root / args.bin).resolve()
        for name, (line, same) in commands(bin_, work / "model.mdr", root / "tests/fixtures", work).items():
            if args.only and name not in args.only:
                continue
            before = campaign.counts.copy()
            campaign.squeeze(name, line, same, *campaign.inject(name, line, same))
            print(name, dict(campaign.counts - before), flush=True)
    print(f"{dict(campaign.counts)}, {campaign.wrong} wrong")
    sys.exit(1 if campaign.wrong else 0)


if __name__ == "__main__":
    main()
