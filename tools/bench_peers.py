#!/usr/bin/env python3
"""Measure medrun beside llama.cpp: the same random weights, the same machine, turn by turn.

    make && pip install gguf numpy      # and llama-cpp-python, where no llama-bench is named
    python tools/bench_peers.py --dir DIR [--shape 8b] [--layers 4] [-p 512 -n 64 -r 5 -t 2]
        [--types int8,bf16,int4] [--llama-bench [NAME=]PATH]... [--prompts 128,512,2048,8192]
        [--depths 0,2048,8192] [--peer-depths] [--delete] [-o md|json]

Nothing is downloaded. A model of random bf16 weights in the shape of a published one is written to
DIR as GGUF; medrun-export makes the checkpoints from that file, llama.cpp's own quantiser the
other GGUFs: --llama-quantize, or the one beside the first llama-bench, or the package's. What lies
in DIR already is used again; --delete removes what a table needed when it is measured. The numbers
are random because speed does not depend on them.

What is compared, each with its counterpart of the same width:

    int8   Q8_0                 bf16   BF16                 int4   Q4_0 and Q4_K_M

(int4 where medrun-export knows it). Peers: llama-cpp-python through its low-level calls, and each
llama-bench binary that is named, of llama.cpp or of a fork, which should be built for this machine
(-march=native, as their build does unless told otherwise). Two such binaries are fairer than the
package, which is built for any machine, so where two are named it is left out. The tests are those of llama-bench:
a prompt of -p random tokens, with logits for the last one, and -n tokens one by one from an empty
context. Threads are equal on all sides, the cache is f16 on all sides, weights are mapped. Each
peer first tries its settings (flash attention on and off, repacked weights or not) and keeps
the best of each test. medrun has no settings.

Engines take turns, A B A B: a turn is a process of its own that warms up and measures once, and a
machine that is slower for a while is so for both. A figure is the median of the turns with the
smallest and largest; a ratio is that of the medians, and its interval holds 95 % of the ratios
when turns are drawn anew with replacement (pairs stay together). A ratio above 1 says that medrun
is faster. With five turns an interval is a rough one; where it holds 1 nothing was shown.

Other programs disturb. A turn waits until they use less than a tenth of a processor, --wait seconds
at most, and is measured again when they use more of one meanwhile, up to --retries times (Linux
only). What was left of such company is said above the table.

Shares compare with what this machine could do at most, as `medrun-lab bench` measured it by turns with
the rest: for a prompt the operations a second (two a weight and token) beside the rate of the
instruction that multiplies, for generation the bytes of weights beside the rate of reading memory.
A peer's are counted in the same way from its own file.

--prompts and --depths show cost as the work grows: longer prompts; and both tests behind tokens
that lie in the cache already. They show medrun alone, or with --peer-depths peers beside it.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time

# Rows of the published models; llama.cpp's arcee is Llama without a gate.
SHAPES = {
    "8b": dict(arch="llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336,
               vocab=128256, theta=500000.0),
    "7b": dict(arch="llama", hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336,
               vocab=32000, theta=10000.0),
    "4.5b": dict(arch="arcee", hidden=2560, layers=36, heads=20, kv_heads=4, head_dim=128,
                 ffn=18432, vocab=128005, theta=10000.0),
    "tiny": dict(arch="llama", hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=512,
                 vocab=512, theta=10000.0),
}
POSITIONS = 131072                       # more than any test needs
PAIRS = {"int8": ["Q8_0"], "bf16": ["BF16"], "int4": ["Q4_0", "Q4_K_M"]}
# Bytes a weight, and of output.weight where the quantiser gives it another type: for disk space.
BYTES = {"bf16": (2, 2), "int8": (1.04, 1.04), "int4": (0.57, 1.04), "BF16": (2, 2),
         "Q8_0": (1.0625, 1.0625), "Q4_0": (0.5625, 0.83), "Q4_K_M": (0.62, 0.83)}
POOL = 1 << 24                           # random numbers; matrices are pieces of them
COMPANY = 0.1                            # processors busy with other programs
DRAWS = 2000                             # resamples behind an interval


class Stop(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, text, code=1):
        super().__init__(text)
        self.code = code


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---- the model ----

def matrices(shape, layers):
    """(name, rows, columns) of each matrix, and (name, n) of each vector."""
    hidden, ffn = shape["hidden"], shape["ffn"]
    inner, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    wide, narrow = [("token_embd", shape["vocab"], hidden)], []
    for i in range(layers):
        wide += [("blk.%d.%s" % (i, name), rows, cols) for name, rows, cols in (
            ("attn_q", inner, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, inner), ("ffn_gate", ffn, hidden), ("ffn_up", ffn, hidden),
            ("ffn_down", hidden, ffn)) if shape["arch"] == "llama" or name != "ffn_gate"]
        narrow += [("blk.%d.attn_norm" % i, hidden), ("blk.%d.ffn_norm" % i, hidden)]
    return wide + [("output", shape["vocab"], hidden)], narrow + [("output_norm", hidden)]


def file_bytes(shape, layers, kind):
    inner, output = BYTES[kind]
    return sum(rows * cols * (output if name == "output" else inner)
               for name, rows, cols in matrices(shape, layers)[0])


def add_tokenizer(writer, vocab):
    """The least that both sides accept: 256 bytes, one merge, unused rows, a start and an end."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(len(other))]
    unused = vocab - len(letters) - 3
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(letters + ["ab"] + ["[unused%d]" % i for i in range(unused)] +
                          ["<|begin|>", "<|end|>"])
    writer.add_token_types([1] * (len(letters) + 1) + [5] * unused + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocab - 2)
    writer.add_eos_token_id(vocab - 1)


def write_bf16(path, name, layers):
    """The model as BF16 GGUF. One matrix at a time is in memory."""
    import gguf
    import numpy as np
    shape = SHAPES[name]
    source = np.random.Generator(np.random.PCG64(1))
    pool = source.standard_normal(POOL, np.float32) * np.float32(0.02)
    pool = ((pool.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    wide, narrow = matrices(shape, layers)
    w = gguf.GGUFWriter(path, shape["arch"])
    w.add_type("model")
    w.add_name("random %s, %d layers" % (name, layers))
    w.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    w.add_block_count(layers)
    w.add_context_length(POSITIONS)
    w.add_embedding_length(shape["hidden"])
    w.add_feed_forward_length(shape["ffn"])
    w.add_head_count(shape["heads"])
    w.add_head_count_kv(shape["kv_heads"])
    w.add_key_length(shape["head_dim"])
    w.add_value_length(shape["head_dim"])
    w.add_rope_dimension_count(shape["head_dim"])
    w.add_rope_freq_base(shape["theta"])
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(shape["vocab"])
    add_tokenizer(w, shape["vocab"])
    for title, n in narrow:
        w.add_tensor_info(title + ".weight", (n,), np.dtype(np.float32), 4 * n)
    for title, rows, cols in wide:
        w.add_tensor_info(title + ".weight", (rows, cols), np.dtype(np.float32), 2 * rows * cols,
                          raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for _, n in narrow:
        w.write_tensor_data(np.ones(n, np.float32))
    for _, rows, cols in wide:
        w.write_tensor_data(np.resize(np.roll(pool, -int(source.integers(POOL))), (rows, cols)))
    w.close()


def quantise(source, path, kind):
    import llama_cpp.llama_cpp as lib
    quiet_log(lib)
    p = lib.llama_model_quantize_default_params()
    p.ftype = getattr(lib, "LLAMA_FTYPE_MOSTLY_" + kind)
    p.nthread = os.cpu_count()
    if lib.llama_model_quantize(source.encode(), path.encode(), p):
        raise Stop("llama.cpp could not make %s" % path)


class Files:
    """What lies in the folder: names, making, deleting."""

    def __init__(self, o):
        self.o, self.made = o, set()
        self.source = self.path("BF16")

    def path(self, kind):
        end = ".mdr" if kind in PAIRS else ".gguf"
        return os.path.join(self.o.dir, "%s-%d-%s%s" % (self.o.shape, self.o.layers, kind.lower(),
                                                        end))

    def check_space(self):
        """Says what will be written; stops where there is no room."""
        o, kept, most = self.o, 0, 0
        missing = {kind: file_bytes(SHAPES[o.shape], o.layers, kind)
                   for t in o.types for kind in ["BF16", t, *PAIRS[t]]
                   if not os.path.exists(self.path(kind))}
        for t in o.types:
            group = sum(missing.get(kind, 0) for kind in [t, *PAIRS[t]] if kind != "BF16")
            most, kept = max(most, kept + group), kept if o.delete else kept + group
        need, free = missing.get("BF16", 0) + most, shutil.disk_usage(o.dir).free
        say("%s needs %.1f GB more, has %.1f GB free" % (o.dir, need / 1e9, free / 1e9))
        if need > free:
            raise Stop("%s: %.1f GB are needed, %.1f GB are free; see --layers, --types, --delete" %
                       (o.dir, need / 1e9, free / 1e9), 2)

    def need(self, kind):
        """The path of a file, which is made if it is not there."""
        path = self.path(kind)
        if os.path.exists(path):
            return path
        if kind != "BF16":
            self.need("BF16")
        say("making %s" % path)
        partial = path + ".partial"
        if kind in PAIRS:
            command = [self.o.export, self.source, path, "--type", kind, "--template", "none"]
            run_command(command, nice=10)
        else:
            job = dict(job="bf16", name=self.o.shape, layers=self.o.layers, path=partial)
            if kind != "BF16":
                job = dict(job="quantise", source=self.source, path=partial, kind=kind)
            try:
                if kind != "BF16" and self.o.llama_quantize:
                    run_command([self.o.llama_quantize, self.source, partial, kind], nice=10)
                else:
                    run_child(job, nice=10)
                os.rename(partial, path)
            finally:
                with contextlib.suppress(OSError):
                    os.remove(partial)
        self.made.add(path)
        return path

    def forget(self, kinds):
        """With --delete: removes what this run made."""
        for path in {self.path(kind) for kind in kinds} & self.made if self.o.delete else ():
            os.remove(path)
            self.made.discard(path)


def settle(path, others):
    """Brings PATH into the page cache; what does not fit beside it leaves, so that no turn pays for
    what another one read."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sum(map(os.path.getsize, {path, *others})) > 0.7 * ram:
            for other in set(others) - {path}:
                with open(other, "rb+") as f:
                    os.fsync(f.fileno())
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    part = bytearray(1 << 22)
    with open(path, "rb", buffering=0) as f:
        while f.readinto(part):
            pass


# ---- processes ----

class Disturbed(Exception):
    """Others were too busy during a turn."""


class Meter:
    """How many processors other programs keep busy: what all used (/proc/stat) without what this
    one and its children used. Where there is no /proc nobody is seen."""

    limit = math.inf

    def mark(self, running=None):
        """Now, and the seconds that others have used; RUNNING is a child that has not ended."""
        try:
            with open("/proc/stat", encoding="ascii") as f:
                user, nice, system, _, _, irq, soft, steal = map(int, f.readline().split()[1:9])
            ticks = user + nice + system + irq + soft + steal
            if running:
                with open("/proc/%d/stat" % running, encoding="ascii", errors="replace") as f:
                    ticks -= sum(map(int, f.read().rpartition(")")[2].split()[11:13]))
        except (OSError, ValueError):
            return time.monotonic(), 0.0
        own = sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (
            resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK") - own

    def others(self, mark, running=None):
        now, used = self.mark(running)
        return max(0.0, used - mark[1]) / max(now - mark[0], 1e-3)


meter = Meter()


def run_command(command, nice=0, stdin=None):
    """What COMMAND writes; its last line of complaint when it fails. Ends it when others are busier
    than the meter's limit."""
    lower = (lambda: os.nice(nice)) if nice else None
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, errors="replace",
                          preexec_fn=lower) as p:
        mark = meter.mark(p.pid)
        while True:
            try:
                out, err = p.communicate(stdin, timeout=2)
                break
            except subprocess.TimeoutExpired:
                stdin, others = None, meter.others(mark, p.pid)
                if others > meter.limit:
                    p.kill()
                    p.communicate()
                    raise Disturbed from None
                mark = meter.mark(p.pid)
            except BaseException:
                p.kill()
                raise
    if p.returncode:
        lines = err.strip().splitlines() or ["nothing was said"]
        raise Stop("%s failed (%d): %s" % (os.path.basename(command[0]), p.returncode, lines[-1]))
    return out


def read_json(text, who):
    try:
        return json.loads(text)
    except ValueError:
        raise Stop("%s wrote no JSON: %s" % (who, text[:200])) from None


def run_child(job, nice=0):
    """A job in a process of its own, with this file as the program."""
    return read_json(run_command([sys.executable, os.path.abspath(__file__), "--child"], nice,
                                 json.dumps(job)), "a child process")


def quietly(o, work):
    """What WORK returns when others are quiet, tried again while they are not, and how many
    processors they kept busy meanwhile."""
    for left in range(o.retries, -1, -1):
        until = time.monotonic() + o.wait
        others = COMPANY + 1
        while others > COMPANY and time.monotonic() < until:
            mark = meter.mark()
            time.sleep(1)
            others = meter.others(mark)
        meter.limit = 2 * COMPANY if left else math.inf
        mark = meter.mark()
        with contextlib.suppress(Disturbed):
            result = work()
            others = meter.others(mark)
            if others <= COMPANY or not left:
                meter.limit = math.inf
                return result, others


def help_of(command):
    try:
        done = subprocess.run([*command], capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise Stop("cannot run %s: %s" % (command[0], e.strerror), 2) from None
    return done.stdout + done.stderr


# ---- medrun ----

class Medrun:
    """One type of checkpoint of one binary."""

    def __init__(self, o, kind, path):
        self.o, self.kind, self.path, self.name = o, kind, path, "medrun"
        self.last = None

    def turn(self, prompt, generate, depth=0):
        command = [self.o.lab, "bench", self.path, "-p", str(prompt), "-n", str(generate),
                   "-t", str(self.o.threads), "-r", "1", "-o", "json"]
        r = self.last = read_json(run_command(command + (["-d", str(depth)] if depth else [])),
                                  "medrun-lab bench")
        return {"pp": r["pp"]["tps"], "tg": r["tg"]["tps"], "about": r}


# ---- peers ----

class Peer:
    """One GGUF in one peer. Settings are tried once, the best of each test is kept."""

    def __init__(self, o, kind, path):
        self.o, self.kind, self.path = o, kind, path
        self.best = None

    def choose(self, prompt, generate):
        """Those near the best are tried again: one slow moment must not decide."""
        best, near = {}, self.settings()
        for _ in range(2):
            for s in near:
                r, others = quietly(self.o, lambda: self.run([dict(
                    s, prompt=prompt, generate=generate, depth=0)])[0])
                say("%s %s, %s: prompt of %d %.2f, generation %.2f tokens/s; others %.2f" %
                    (self.name, self.kind, show_setting(s), prompt, r["pp"], r["tg"], others))
                best.setdefault("pp", []).append((r["pp"], s))
                best.setdefault("tg", []).append((r["tg"], s))
            top = {test: max(found, key=lambda item: item[0]) for test, found in best.items()}
            near = [s for s in near if any(rate > 0.9 * top[test][0] for test in best
                                           for rate, other in best[test] if other == s)]
            if len(near) < 2:
                break
        self.best = {test: s for test, (_, s) in top.items()}

    def turn(self, prompt, generate, depth=0):
        if self.best["pp"] == self.best["tg"]:
            return self.run([dict(self.best["pp"], prompt=prompt, generate=generate,
                                  depth=depth)])[0]
        runs = [dict(self.best["pp"], prompt=prompt, generate=0, depth=depth),
                dict(self.best["tg"], prompt=0, generate=generate, depth=depth)]
        pp, tg = self.run(runs)
        return {"pp": pp["pp"], "tg": tg["tg"]}

    def read_bytes(self):
        """Weights that a generated token reads: all but the embedding."""
        import gguf
        if not hasattr(self, "bytes"):
            self.bytes = sum(int(t.n_bytes) for t in gguf.GGUFReader(self.path).tensors
                             if t.name != "token_embd.weight")
        return self.bytes


def show_setting(s):
    return ", ".join("%s %s" % (key, "on" if value else "off") for key, value in s.items())


class LlamaCppPython(Peer):
    name = "llama.cpp"
    about = {}

    def settings(self):
        """Floats are never repacked."""
        repack = [True] if self.kind == "BF16" else [True, False]
        return [dict(flash=flash, repack=r) for r in repack for flash in (True, False)]

    def run(self, runs):
        r = run_child(dict(job="run", path=self.path, threads=self.o.threads, runs=runs))
        LlamaCppPython.about = r["about"]
        return r["results"]


class LlamaBench(Peer):
    """A llama-bench binary. Forks have switches of their own: what its help does not name is not
    used."""

    def __init__(self, o, kind, path, name, binary, text):
        super().__init__(o, kind, path)
        self.name, self.binary, self.help = name, binary, text
        self.about = {}

    def settings(self):
        repack = [False, True] if "-rtr" in self.help else [None]
        return [dict(flash=flash, **({} if r is None else {"repack": r}))
                for r in repack for flash in (True, False)]

    def run(self, runs):
        return [self.one(run) for run in runs]

    def one(self, run):
        words = ["off", "on"] if re.search(r"--flash-attn.*on\|off", self.help) else ["0", "1"]
        command = [self.binary, "-m", self.path, "-p", str(run["prompt"]), "-n",
                   str(run["generate"]), "-t", str(self.o.threads), "-r", "1", "-ngl", "0",
                   "-fa", words[run["flash"]], "-o", "json"]
        if "repack" in run:
            command += ["-rtr", str(int(run["repack"]))]
        if run["depth"]:
            command += ["-d", str(run["depth"])]
        result = {"pp": None, "tg": None}
        for r in read_json(run_command(command), self.binary):
            result["tg" if r["n_gen"] else "pp"] = float(r["avg_ts"])
            self.about.update(version="%s %s" % (r.get("build_number"), r.get("build_commit")))
        return result


# ---- inside a child process: llama-cpp-python ----

def quiet_log(lib):
    global silence                       # llama.cpp keeps the pointer
    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, ctypes.c_void_p(0))


def set_field(p, name, value):
    """Older versions lack some."""
    if any(field[0] == name for field in p._fields_):
        setattr(p, name, value)


def load_model(lib, path, repack):
    p = lib.llama_model_default_params()
    p.n_gpu_layers = 0
    set_field(p, "use_extra_bufts", repack)
    set_field(p, "use_mmap", True)
    set_field(p, "load_mode", getattr(lib, "LLAMA_LOAD_MODE_MMAP", 0))
    model = lib.llama_model_load_from_file(path.encode(), p)
    if not model:
        raise Stop("llama.cpp could not load %s" % path)
    return model


class Context:
    """A context of llama.cpp as llama-bench makes one, fed with random tokens."""

    def __init__(self, lib, model, run, threads):
        p = lib.llama_context_default_params()
        p.n_ctx = run["depth"] + run["prompt"] + run["generate"]
        p.n_batch, p.n_ubatch = 2048, 512
        p.n_threads = p.n_threads_batch = threads
        set_field(p, "flash_attn_type", int(run["flash"]))
        set_field(p, "flash_attn", run["flash"])
        self.lib, self.context = lib, lib.llama_init_from_model(model, p)
        if not self.context:
            raise Stop("llama.cpp could not make a context of %d tokens" % p.n_ctx)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.random = random.Random(1)

    def feed(self, n, each):
        """Seconds for N tokens, EACH at a time, with logits after each part."""
        start = time.perf_counter()
        for at in range(0, n, each):
            k = min(each, n - at)
            ids = (self.lib.llama_token * k)(*(self.random.randrange(self.vocab)
                                               for _ in range(k)))
            if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, k)):
                raise Stop("llama.cpp: llama_decode failed")
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - start

    def keep(self, n):
        """Forgets all but the first N tokens."""
        memory = self.lib.llama_get_memory(self.context)
        if not n:
            self.lib.llama_memory_clear(memory, True)
        elif not self.lib.llama_memory_seq_rm(memory, 0, n, -1):
            raise Stop("llama.cpp: llama_memory_seq_rm failed")

    def measure(self, run):
        """Tokens a second of both tests, after each was warmed up."""
        result = {"pp": None, "tg": None}
        self.feed(run["prompt"], 2048)
        if run["generate"]:
            self.keep(0)
            self.feed(min(run["generate"], 4), 1)
        self.keep(0)
        self.feed(run["depth"], 2048)
        for test, n, each in (("pp", run["prompt"], 2048), ("tg", run["generate"], 1)):
            if n:
                self.keep(run["depth"])
                result[test] = n / self.feed(n, each)
        self.lib.llama_free(self.context)
        return result


def run_llama_cpp(job):
    import llama_cpp
    import llama_cpp.llama_cpp as lib
    quiet_log(lib)
    lib.llama_backend_init()
    results, model, loaded = [], None, None
    for run in job["runs"]:
        if loaded != run["repack"]:
            if model:
                lib.llama_model_free(model)
            model, loaded = load_model(lib, job["path"], run["repack"]), run["repack"]
        results.append(Context(lib, model, run, job["threads"]).measure(run))
    about = dict(version="llama-cpp-python " + llama_cpp.__version__,
                 cpu=re.sub(r" = 1|CPU : | \|", "", lib.llama_print_system_info().decode()).strip())
    return dict(results=results, about=about)


def child():
    job = json.load(sys.stdin)
    what = job.pop("job")
    result = {"bf16": write_bf16, "quantise": quantise}[what](**job) if what != "run" else \
        run_llama_cpp(job)
    json.dump(result, sys.stdout)


# ---- figures ----

def interval(a, b):
    """95 % of the ratios of medians when the turns, in pairs, are drawn anew."""
    source, n = random.Random(1), len(a)
    ratios = []
    for _ in range(DRAWS):
        drawn = [source.randrange(n) for _ in range(n)]
        ratios.append(statistics.median(a[i] for i in drawn) /
                      statistics.median(b[i] for i in drawn))
    ratios.sort()
    return ratios[int(0.025 * DRAWS)], ratios[int(0.975 * DRAWS) - 1]


def spread(values):
    return dict(median=statistics.median(values), min=min(values), max=max(values), turns=values)


def compare(ours, theirs):
    low, high = interval(ours, theirs)
    return dict(ratio=statistics.median(ours) / statistics.median(theirs), low=low, high=high)


def alternate(o, engines, prompt, generate, depth=0):
    """{engine: {test: [a rate each turn]}}, what medrun said of its ceilings, and the most
    that others used."""
    rates = {e: {"pp": [], "tg": []} for e in engines}
    said, company = [], 0.0
    for e in engines:
        if isinstance(e, Peer) and e.best is None:
            settle(e.path, [other.path for other in engines])
            e.choose(min(prompt, 512), min(generate, 64))
    for r in range(o.repetitions):
        for e in engines:
            settle(e.path, [other.path for other in engines])
            got, others = quietly(o, lambda: e.turn(prompt, generate, depth))
            company = max(company, others)
            for test in rates[e]:
                rates[e][test].append(got[test])
            if "about" in got:
                said.append(got["about"])
            say("turn %d, %s %s%s: prompt of %d %.2f, generation %.2f tokens/s; others %.2f" % (
                r + 1, e.name, e.kind, ", %d deep" % depth if depth else "", prompt, got["pp"],
                got["tg"], others))
    return rates, said, company


def pair_rows(engines, rates, said, prompt, generate):
    """A row for each test and peer. The best ceiling of all turns is the machine's."""
    ours, rows = engines[0], []
    top = {"pp": max(s["dot_gops"] for s in said), "tg": max(s["read_gbps"] for s in said)}
    cost = {"pp": said[-1]["pp"]["gops"] / said[-1]["pp"]["tps"],
            "tg": said[-1]["tg"]["gbps"] / said[-1]["tg"]["tps"]}      # of a token, in 1e9
    for e in engines[1:]:
        for test, n in (("pp", prompt), ("tg", generate)):
            a, b = spread(rates[ours][test]), spread(rates[e][test])
            theirs = cost["pp"] if test == "pp" else e.read_bytes() / 1e9
            rows.append(dict(
                type=ours.kind, peer=e.name, peer_type=e.kind, test=test, n=n, medrun=a, other=b,
                setting=e.best[test], ceiling=top[test], **compare(a["turns"], b["turns"]),
                share=a["median"] * cost[test] / top[test],
                other_share=b["median"] * theirs / top[test]))
    return rows


# ---- tables ----

def digits(x):
    return "%.*f" % (0 if x >= 100 else 1 if x >= 10 else 2, x)


def show_rate(s):
    return "%s (%s to %s)" % tuple(digits(s[key]) for key in ("median", "min", "max"))


def show_ratio(r):
    return "**%.2f** (%.2f to %.2f)" % (r["ratio"], r["low"], r["high"])


def print_pairs(rows):
    print("| weights | test | medrun, tokens/s | peer, tokens/s | ratio | the ceiling | "
          "medrun's share | peer's |\n|---|---|---|---|---|---|---|---|")
    for r in rows:
        pp = r["test"] == "pp"
        print("| %s, %s %s | %s %d | %s | %s | %s | %.0f %s | %.0f %% | %.0f %% |" % (
            r["type"], r["peer"], r["peer_type"], "prompt of" if pp else "generation,", r["n"],
            show_rate(r["medrun"]), show_rate(r["other"]), show_ratio(r), r["ceiling"],
            "GOPS" if pp else "GB/s", 100 * r["share"], 100 * r["other_share"]))


def print_growth(rows, first):
    """One row for each length or depth; peers' columns where there are any."""
    peers = [p["peer"] + " " + p["peer_type"] for p in rows[0]["peers"]]
    tests = list(rows[0]["medrun"])
    titles = {"pp": "prompt", "tg": "generation"}
    heads = ["weights", first]
    for test in tests:
        heads += ["%s, tokens/s" % titles[test]] + [
            text for p in peers for text in ("%s, %s" % (p, titles[test]), "ratio")]
    print("\n| %s |\n|%s" % (" | ".join(heads), "---|" * len(heads)))
    for r in rows:
        cells = [r["type"], str(r["n"])]
        for test in tests:
            cells.append(show_rate(r["medrun"][test]))
            for p in r["peers"]:
                cells += [show_rate(p[test]), show_ratio(p[test])]
        print("| %s |" % " | ".join(cells))


def growth_row(engines, rates, n, tests):
    row = dict(type=engines[0].kind, n=n, peers=[],
               medrun={t: spread(rates[engines[0]][t]) for t in tests})
    for e in engines[1:]:
        row["peers"].append(dict(peer=e.name, peer_type=e.kind, **{
            t: dict(spread(rates[e][t]), **compare(rates[engines[0]][t], rates[e][t]))
            for t in tests}))
    return row


# ---- the run ----

def engines_of(o, files, t):
    engines = [Medrun(o, t, files.need(t))]
    for kind in PAIRS[t]:
        path = files.need(kind)
        if not o.no_python_peer:
            engines.append(LlamaCppPython(o, kind, path))
        engines += [LlamaBench(o, kind, path, *bench) for bench in o.llama_bench]
    return engines


def growth(o, engines, result):
    """The tables of --prompts and --depths for one type."""
    shown = engines if o.peer_depths else engines[:1]
    for n in o.prompts:
        rates, _, company = alternate(o, shown, n, 1)
        result["company"] = max(result["company"], company)
        result["prompts"].append(growth_row(shown, rates, n, ["pp"]))
    for depth in o.depths:
        able = [e for e in shown if not isinstance(e, LlamaBench) or
                not depth or re.search(r"^ *-d,", e.help, re.M)]
        rates, _, company = alternate(o, able, o.prompt, o.predict, depth)
        result["company"] = max(result["company"], company)
        result["depths"].append(growth_row(able, rates, depth, ["pp", "tg"]))


def measure(o):
    files = Files(o)
    files.check_space()
    result = dict(shape=o.shape, layers=o.layers, threads=o.threads, medrun=o.version, kernels=None,
                  company=0.0, peers={}, pairs=[], prompts=[], depths=[])
    for t in o.types:
        engines = engines_of(o, files, t)
        if not o.no_pairs:
            rates, said, company = alternate(o, engines, o.prompt, o.predict)
            result["company"] = max(result["company"], company)
            result["pairs"] += pair_rows(engines, rates, said, o.prompt, o.predict)
        growth(o, engines, result)
        result["kernels"] = engines[0].last and engines[0].last["kernels"]
        result["peers"].update((e.name, e.about) for e in engines[1:] if e.about)
        files.forget([t, *(kind for kind in PAIRS[t] if kind != "BF16")])
    files.forget(["BF16"])
    return result


def print_tables(o, r):
    print("%s shape, %d of its %d layers, random weights; %d threads; %s, %s kernels; %d turns "
          "each" % (o.shape, o.layers, SHAPES[o.shape]["layers"], o.threads, o.version,
                    r["kernels"], o.repetitions))
    for name, about in r["peers"].items():
        print("%s: %s" % (name, ", ".join(about.values())))
    if r["company"] > COMPANY:
        print("not alone: in some turns other programs kept up to %.1f processors busy" %
              r["company"])
    if r["pairs"]:
        print()
        print_pairs(r["pairs"])
    for rows, first in ((r["prompts"], "prompt of"), (r["depths"], "tokens before")):
        if rows:
            print_growth(rows, first)


# ---- the command ----

def whole(text):
    n = int(text)
    if n < 1:
        raise ValueError
    return n


def lengths(text):
    found = [int(n) for n in text.split(",") if n]
    if any(n < 0 for n in found):
        raise ValueError
    return found


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                epilog="The top of this file says what the figures mean.")
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
    p.add_argument("--dir", required=True, help="where the models lie or shall be made")
    p.add_argument("--shape", default="8b", choices=sorted(SHAPES), help="default: 8b, Llama 3's")
    p.add_argument("--layers", type=whole, help="fewer than the shape has, for a quick run")
    p.add_argument("--types", default="int8,bf16,int4", help="of medrun's checkpoints")
    p.add_argument("--lab", default=os.path.normpath(os.path.join(here, "medrun-lab")))
    p.add_argument("--export", default=os.path.normpath(os.path.join(here, "medrun-export")))
    p.add_argument("--llama-bench", action="append", default=[], metavar="[NAME=]PATH",
                   help="a binary to measure too; may be given again")
    p.add_argument("--llama-quantize", metavar="PATH", help="llama.cpp's, for the other GGUFs")
    p.add_argument("--no-python-peer", action="store_true", help="llama-bench binaries only")
    p.add_argument("-p", "--prompt", type=whole, default=512, help="tokens (512)")
    p.add_argument("-n", "--predict", type=whole, default=64, help="tokens (64)")
    p.add_argument("-r", "--repetitions", type=whole, default=5, help="turns of each engine (5)")
    p.add_argument("--retries", type=int, default=3, help="of a turn that others disturb (3)")
    p.add_argument("--wait", type=int, default=60, help="seconds for others to be quiet (60)")
    p.add_argument("-t", "--threads", type=whole, help="of both sides (each processor one)")
    p.add_argument("--prompts", type=lengths, default=[], help="a table over these lengths")
    p.add_argument("--depths", type=lengths, default=[], help="a table over these depths")
    p.add_argument("--peer-depths", action="store_true", help="peers in those two tables too")
    p.add_argument("--no-pairs", action="store_true", help="only those two tables")
    p.add_argument("--delete", action="store_true", help="remove what was made, when measured")
    p.add_argument("-o", "--output", default="md", choices=["md", "json"])
    return p.parse_args()


def check_options(o):
    """Finds what is missing before anything is made."""
    benches = []
    for given in o.llama_bench:
        name, _, path = given.rpartition("=")
        benches.append((name or "llama-bench", path, help_of([path, "--help"])))
        beside = os.path.join(os.path.dirname(path), "llama-quantize")
        if not o.llama_quantize and os.access(beside, os.X_OK):
            o.llama_quantize = beside
    o.llama_bench = benches
    o.no_python_peer |= len(benches) > 1
    packages = {"gguf": "gguf", "numpy": "numpy"}
    if not (o.no_python_peer and o.llama_quantize):
        packages["llama_cpp"] = "llama-cpp-python"
    for module in packages:
        if importlib.util.find_spec(module) is None:
            raise Stop("no package %s; wanted: pip install %s" % (
                packages[module], " ".join(packages.values())), 2)
    usage = help_of([o.export, "--help"])
    o.version = help_of([o.lab, "--version"]).strip()
    o.layers = min(o.layers or math.inf, SHAPES[o.shape]["layers"])
    if not o.threads:
        o.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else \
            os.cpu_count()
    o.types = [t for t in o.types.split(",") if t]
    for t in o.types:
        if t not in PAIRS:
            raise Stop("--types: found %s, wanted some of %s" % (t, ",".join(PAIRS)), 2)
    if "int4" in o.types and not re.search(r"\bint4\b", usage):
        o.types.remove("int4")
        say("left out: int4, this medrun-export does not know it")
    if not re.search(r"^ *-d,", help_of([o.lab, "bench", "--help"]), re.M) and any(o.depths):
        say("left out: depths past 0, this medrun-lab bench has no -d")
        o.depths = [depth for depth in o.depths if not depth]
    os.makedirs(o.dir, exist_ok=True)


def main():
    try:
        if sys.argv[1:] == ["--child"]:
            return child()
        o = options()
        check_options(o)
        result = measure(o)
        if o.output == "json":
            print(json.dumps(result))
        else:
            print_tables(o, result)
    except Stop as e:
        print("bench_peers.py: %s" % e, file=sys.stderr)
        sys.exit(e.code)
    except OSError as e:
        print("bench_peers.py: %s" % e, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
