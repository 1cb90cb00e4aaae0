"""Trains the demo model from nothing: a tokenizer with 4,096 entries and a Llama of about 8 million parameters.

    python train.py OUT_FOLDER [--epochs N]

It runs on an ordinary CPU. OUT_FOLDER becomes a Hugging Face checkpoint that `tools/export` converts like any
other (and that transformers loads); OUT_FOLDER.state holds what is needed to go on after a crash and is removed at
the end.

The recipe in one paragraph. Every epoch asks for every fact of the corpus once, in a wording drawn anew (corpus.draw),
and answers with the corpus's own sentence, so that the model hears a hundred wordings but only one answer. Half of the
conversations are one question and its answer, the rest two to four unrelated ones, so that the model learns that a
question is answered by itself and not by what was said before. The loss counts the answers (and the end-of-turn token
after them) and nothing else: guessing what a user will ask is not the model's job.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus
from phrasings import SYSTEM_PROMPTS

SEED = 20260
VOCAB = 4096
# The special tokens stand at the end, in Llama 3's order: reserved ones fill the places that Llama 3 reserves.
SPECIALS = (["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{i}|>" for i in range(4)]
            + ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
            + [f"<|reserved_special_token_{i}|>" for i in range(5, 11)])
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
                 "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
                 " + '<|eot_id|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

SAVE_SECONDS = 180          # how much work a crash may cost
MAX_TOKENS = 256            # longest conversation
BATCH_TOKENS = 2048         # padded tokens per step; small batches, because many steps matter more than smooth ones


# ---------------------------------------------------------------------------------------------------- tokenizer

def train_tokenizer(facts):
    """A byte-level BPE tokenizer with exactly Llama 3's pipeline, only smaller."""
    rng = random.Random(SEED)
    # Names appear more often in questions than in answers: learn pieces from both. The role words and the blank
    # line of the chat template must become single tokens, and this is where BPE meets them.
    texts = [f"user\n\n{corpus.draw(f, rng)}" for f in facts for _ in range(4)]
    texts += [f"assistant\n\n{f.answer}" for f in facts for _ in range(2)]
    texts += [f"system\n\n{s}" for s in SYSTEM_PROMPTS for _ in range(20)]
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_REGEX), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(SPECIALS), min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[])
    tok.train_from_iterator(texts, trainer)
    assert tok.get_vocab_size() == VOCAB - len(SPECIALS), "the corpus is too small for this vocabulary"
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    bos = SPECIALS[0]
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
                                      special_tokens=[(bos, tok.token_to_id(bos))])])
    return tok


def save_tokenizer(tok, folder):
    tok.save(str(folder / "tokenizer.json"))
    token = lambda s: {"content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                       "special": True}
    config = {"added_tokens_decoder": {str(tok.token_to_id(s)): token(s) for s in SPECIALS},
              "bos_token": SPECIALS[0], "eos_token": "<|eot_id|>", "pad_token": "<|end_of_text|>",
              "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
              "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 2048,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    names = {k: config[k] for k in ("bos_token", "eos_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------- conversations

class Chat:
    """Turns a conversation into token ids and a mask that says which of them the model is to learn."""

    def __init__(self, tok):
        one = tok.token_to_id
        self.bos, self.eot, self.pad = one("<|begin_of_text|>"), one("<|eot_id|>"), one("<|end_of_text|>")
        self.start, self.end = one("<|start_header_id|>"), one("<|end_header_id|>")
        self.encode = lambda text: tok.encode(text, add_special_tokens=False).ids
        # The blank line is a piece of its own for the pre-tokenizer, so a turn can be encoded in parts.
        self.header = {r: [self.start] + self.encode(r) + [self.end] + self.encode("\n\n")
                       for r in ("system", "user", "assistant")}
        assert all(len(h) == 4 for h in self.header.values()), "role words or the blank line are not single tokens"
        self.answers = {}                           # an answer is encoded once, not once per epoch

    def turn(self, question, answer):
        if answer not in self.answers:
            self.answers[answer] = self.encode(answer) + [self.eot]
        ask = self.header["user"] + self.encode(question) + [self.eot] + self.header["assistant"]
        reply = self.answers[answer]
        return ask + reply, [0] * len(ask) + [1] * len(reply)

    def conversation(self, turns, system=None):
        head = [self.bos] + (self.header["system"] + self.encode(system) + [self.eot] if system else [])
        ids, learn = list(head), [0] * len(head)
        for t, m in turns:
            if len(ids) + len(t) > MAX_TOKENS:
                break                               # the caller puts what did not fit into the next conversation
            ids, learn = ids + t, learn + m
        return ids, learn


def epoch_conversations(facts, literal, chat, rng):
    """Every fact once (and the literal questions once more), grouped into conversations of one to four turns."""
    asked = [(corpus.draw(f, rng), f.answer) for f in facts] + [(q, f.answer) for q, f in literal]
    rng.shuffle(asked)
    out = []
    while asked:
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
        want = 1 if rng.random() < 0.5 else rng.randint(2, 4)
        turns = [chat.turn(q, a) for q, a in asked[-want:][::-1]]
        ids, learn = chat.conversation(turns, system)
        taken = sum(t == chat.eot for t in ids) // 2      # two ends of turn per question (a system prompt adds one)
        assert taken > 0, "an answer is longer than a conversation may be"
        del asked[-taken:]
        out.append((ids, learn))
    return out


def batches(conversations, chat, rng, batch_tokens=BATCH_TOKENS):
    """Rows of like length together, padded at the end: a causal model never looks there, so no mask is needed."""
    rows = sorted(conversations, key=lambda c: len(c[0]))
    out, first = [], 0
    for i in range(len(rows)):
        # The longest row of a batch stands last and sets its width; close the batch before it grows too big.
        if i + 1 == len(rows) or (i + 2 - first) * len(rows[i + 1][0]) > batch_tokens:
            part = rows[first:i + 1]
            width = -(-len(rows[i][0]) // 16) * 16 + 1     # the model sees one less: a multiple of 16 runs faster
            ids = torch.tensor([ids + [chat.pad] * (width - len(ids)) for ids, _ in part])
            learn = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in part], dtype=torch.bool)
            out.append((ids, learn))
            first = i + 1
    rng.shuffle(out)
    return out


# ---------------------------------------------------------------------------------------------------- training

def new_model(tok):
    """Grouped-query attention and tied embeddings, every width a multiple of 64: what the engine's kernels like."""
    ids = {s: tok.token_to_id(s) for s in SPECIALS}
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=320, intermediate_size=896, num_hidden_layers=6,
                         num_attention_heads=5, num_key_value_heads=1, head_dim=64, hidden_act="silu",
                         max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=500000.0,
                         tie_word_embeddings=True, attention_bias=False, mlp_bias=False, initializer_range=0.02,
                         bos_token_id=ids["<|begin_of_text|>"], eos_token_id=ids["<|eot_id|>"],
                         pad_token_id=ids["<|end_of_text|>"])
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    # What writes into the residual stream starts smaller, the deeper the model (as in GPT-2): steadier early steps.
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))
    return model


def make_optimizer(model, decay):
    """AdamW; weight decay for the matrices, none for the norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}],
                             lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)


def learning_rate(peak, done, warm):
    """A short climb, then half a cosine down to a hundredth. `done` is the share of the training behind us."""
    if done < warm:
        return peak * done / warm
    x = (done - warm) / (1 - warm)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * x)))


def loss_on_answers(backbone, embedding, ids, learn):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = backbone(input_ids=ids[:, :-1]).last_hidden_state
        # Only positions whose next token counts go through the output matrix: it is a sixth of the work.
        logits = torch.nn.functional.linear(hidden[learn[:, 1:]], embedding)
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learn[:, 1:]])


def state_of(folder):
    return folder.with_name(folder.name + ".state")


def train(args, facts, tok):
    chat = Chat(tok)
    literal = [(q, f) for q, f in corpus.literal_facts(facts) if f]
    model = new_model(tok)
    optimizer = make_optimizer(model, args.decay)
    state_file, first, spent = state_of(args.out), 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["epoch"], state["seconds"]
        print(f"going on at epoch {first}, after {spent:.0f} s", flush=True)
    backbone = torch.compile(model.model, dynamic=True) if args.compile else model.model
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(facts)} facts", flush=True)
    began, saved, loss = time.time() - spent, time.time(), float("nan")
    for epoch in range(first, args.epochs):
        rng = random.Random(SEED * 1000 + epoch)    # an epoch depends on its number alone, so resuming is exact
        work = batches(epoch_conversations(facts, literal, chat, rng), chat, rng, args.batch)
        start, total = time.time(), 0.0
        for i, (ids, learn) in enumerate(work):
            lr = learning_rate(args.lr, (epoch + (i + 1) / len(work)) / args.epochs, args.warm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            step_loss = loss_on_answers(backbone, model.lm_head.weight, ids, learn)
            step_loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += step_loss.item()
        loss, seconds = total / len(work), time.time() - start
        tokens = sum(ids.numel() for ids, _ in work)
        print(f"epoch {epoch + 1:3}/{args.epochs}  loss {loss:.4f}  rate {lr:.2e}  {len(work)} steps  "
              f"{tokens / seconds:.0f} tokens/s  {time.time() - began:.0f} s", flush=True)
        if time.time() - saved > SAVE_SECONDS:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
                        "seconds": time.time() - began}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)      # never a half-written state
            saved = time.time()
    print(f"trained in {(time.time() - began) / 60:.1f} minutes, last loss {loss:.4f}", flush=True)
    return model, state_file


def save_model(model, tok, folder):
    """bfloat16, as the real checkpoints are published; greedy decoding, and both ends of text stop it."""
    model.to(torch.bfloat16)
    stop = [tok.token_to_id("<|eot_id|>"), tok.token_to_id("<|end_of_text|>")]
    model.generation_config = GenerationConfig(bos_token_id=tok.token_to_id("<|begin_of_text|>"), eos_token_id=stop,
                                               pad_token_id=stop[1], do_sample=False)
    model.save_pretrained(folder)


def check_template(folder, tok):
    """The conversations we train on must be, token for token, what the chat template renders."""
    hf, chat = PreTrainedTokenizerFast.from_pretrained(folder), Chat(tok)
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[0]}, {"role": "user", "content": "What is asthma?"},
                {"role": "assistant", "content": "A disease of 2 lungs."}]
    ours, _ = chat.conversation([chat.turn("What is asthma?", "A disease of 2 lungs.")], SYSTEM_PROMPTS[0])
    theirs = hf.apply_chat_template(messages, tokenize=False)
    assert hf(theirs, add_special_tokens=False).input_ids == ours, "the chat template and the training data differ"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=62)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warm", type=float, default=0.02, help="share of the training spent warming up")
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=BATCH_TOKENS, help="padded tokens per step")
    # Two threads meet hundreds of times per step. Where others need the cores too, one thread is much faster than two
    # that wait for each other.
    parser.add_argument("--threads", type=int, default=2, help="take 1 on a busy machine")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--kinds", help="comma-separated: train on these kinds only, for a quick try")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = corpus.build(corpus.read_corpus())
    if state_of(args.out).exists():                 # going on: the ids must stay what they were
        tok = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tok = train_tokenizer(facts)
        save_tokenizer(tok, args.out)
    if args.kinds:
        facts = [f for f in facts if f.kind in args.kinds.split(",")]
    check_template(args.out, tok)
    model, state_file = train(args, facts, tok)
    save_model(model, tok, args.out)
    state_file.unlink(missing_ok=True)
    print(f"saved {args.out}; now: python evaluate.py {args.out}")


if __name__ == "__main__":
    main()
