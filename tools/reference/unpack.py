"""Turns an int8 checkpoint of the Llama architecture back into a Hugging Face folder in float32.

    python tools/reference/unpack.py MODEL-int8.mdr TOKENIZER_FOLDER OUT_FOLDER

For the demo model, whose float weights are not kept: what its int8 weights stand for is a model like
any other, and other types can be compared with it. The tokenizer's files are copied from
TOKENIZER_FOLDER (train.py writes them before it trains, always the same). Needs numpy, safetensors.
"""
import json
import pathlib
import shutil
import struct
import sys

import numpy as np
from safetensors.numpy import save_file

LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
         "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
         "up": "mlp.up_proj", "down": "mlp.down_proj"}
OTHERS = {"embed": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}


def hadamard(n):
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(np.float32(n))


def int8_matrix(raw, rows, cols):
    """Panels of 16 rows; per 128 columns a line of 2 x 16 scales, then 2 x 16 steps of 4 columns.
    Whole 64 columns are turned back."""
    groups = -(-cols // 64)
    panels = np.frombuffer(raw, np.uint8).reshape(-(-rows // 16), -1)
    out = np.zeros((len(panels) * 16, groups * 64), np.float32)
    for g in range(groups):
        at = g // 2 * (64 + 2048)
        line = np.ascontiguousarray(panels[:, at + g % 2 * 32:at + g % 2 * 32 + 32]).view("<u2").astype("<u4")
        scales = (line << 16).view("<f4").reshape(-1, 1)
        steps = panels[:, at + 64 + g % 2 * 1024:][:, :1024].reshape(-1, 16, 16, 4)
        q = steps.transpose(0, 2, 1, 3).reshape(-1, 64).astype(np.float32) - 128
        out[:, g * 64:g * 64 + 64] = q * scales
        if g * 64 + 64 <= cols:
            out[:, g * 64:g * 64 + 64] = out[:, g * 64:g * 64 + 64] @ hadamard(64)
    return np.ascontiguousarray(out[:rows, :cols])


def hf_name(name):
    if not name.startswith("layers."):
        return OTHERS[name] + ".weight"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def main():
    model, tokenizer, out = map(pathlib.Path, sys.argv[1:])
    data = model.read_bytes()
    assert data[:8] == b"MEDRUN02"
    header = json.loads(data[16:16 + struct.unpack("<Q", data[8:16])[0]])
    assert header["architecture"] == "llama" and header["type"] == "int8" and "scaling" not in header["config"]
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for t in header["tensors"]:
        raw = data[t["offset"]:t["offset"] + t["bytes"]]
        tensors[hf_name(t["name"])] = (np.frombuffer(raw, "<f4").copy() if t["type"] == "f32" else
                                       int8_matrix(raw, t["rows"], t["cols"]))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    c = header["config"]
    stops = header["chat"]["stop_ids"]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "vocab_size": c["vocab_size"], "hidden_size": c["hidden_size"], "intermediate_size": c["ffn_size"],
              "num_hidden_layers": c["n_layers"], "num_attention_heads": c["n_heads"],
              "num_key_value_heads": c["n_kv_heads"], "head_dim": c["head_dim"], "rms_norm_eps": c["norm_eps"],
              "max_position_embeddings": c["max_positions"], "rope_theta": c["rope_theta"],
              "tie_word_embeddings": c["tied"], "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
              "eos_token_id": stops}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": stops}) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)


main()
