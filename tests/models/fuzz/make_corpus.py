"""Writes the fuzzers' seeds, corpus/<fuzzer>/*: small valid files and near misses of each kind."""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"


def safetensors(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_seeds() -> dict:
    two = {"a": entry("F32", [2], 0, 8), "b": entry("BF16", [1, 3], 8, 14)}
    sizes = {
        "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
        "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
    }  # fmt: skip
    every, end = {}, 0
    for name, size in sizes.items():
        every[name] = entry(name, [1], end, end + size)
        end += size
    return {
        "empty": safetensors("{}"),
        "scalar": safetensors(json.dumps({"s": entry("F64", [], 0, 8)}), bytes(8)),
        "zero_size": safetensors(json.dumps({"z": entry("F32", [0, 4], 0, 0)})),
        "two": safetensors(json.dumps({"__metadata__": {"format": "pt"}, **two}) + "  ", bytes(14)),
        "every_dtype": safetensors(json.dumps(every), bytes(end)),
        "overlap": safetensors(
            json.dumps({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}), bytes(6)
        ),
        "huge": safetensors(json.dumps({"a": entry("F32", [2**32, 2**32], 0, 2**62)})),
        "short": safetensors("{}")[:9],
    }


def config_seeds() -> dict:
    small = {
        "model_type": "hybrid_qwen3", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 0,
        "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4,
        "hybrid_override_pattern": "GKA-*",
    }  # fmt: skip
    full = {
        **small, "architectures": ["HybridQwen3ForCausalLM"], "num_key_value_heads": 1,
        "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e4,
        "attention_bias": True, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "initializer_range": 0.02, "bos_token_id": 1,
        "eos_token_id": [2], "use_sliding_window": False, "unknown": {"a": [1, None, "x"]},
        "gka_config": {
            "use_beta_gate": True, "use_alpha_connection": True, "use_v_conv": False,
            "use_forgetting_gate": True, "use_forgetting_gate_kk": False, "gla_rescale": True,
            "use_gate": False, "bp_lambda": True, "solver_type": "cg", "num_iter": "auto",
            "ridge_strength": 0.02, "conv_size": 4, "norm_eps": 1e-6, "chunk_size": 64,
            "num_q_heads": 2, "num_k_heads": 1, "num_v_heads": 4, "head_dim": 4, "expand_v": 1.5,
            "learned_ridge": True, "tolerance": 1e-5, "qk_norm": "fla", "fixed_alpha": 1.0,
            "arithmetic": "standard", "kv_proj_rank": None, "kv_learnable_residual": False,
            "mode": "chunk",
        },
    }  # fmt: skip
    next_keys = {
        **small, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 3, "dtype": "float16",
    }  # fmt: skip
    not_built = {**small, "hybrid_override_pattern": "GDN-M2"}
    wrong = {**small, "hidden_size": -1, "num_hidden_layers": 1e300}
    seeds = {"small": small, "full": full, "next": next_keys, "not_built": not_built}
    seeds["wrong"] = wrong
    return {name: json.dumps(value).encode() for name, value in seeds.items()} | {
        "deep": b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        "twice": b'{"a":1,"a":2}',
    }


def index_seeds() -> dict:
    plain = {"metadata": {"total_size": 8}, "weight_map": {"a": "1.safetensors"}}
    return {
        "plain": json.dumps(plain).encode(),
        "two": b'{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}',
        "parent": b'{"weight_map":{"a":"../1.safetensors"}}',
        "zero_byte": b'{"weight_map":{"a":"1\\u0000.safetensors"}}',
        "tokenizer": b'{"model":{"type":"BPE","merges":[],"vocab":{"!":33}},"added_tokens":[]}',
        "utf8": "a\u00e9\u20ac\U0001f600".encode() + b"\xff\xe2\x82",
    }


def main() -> None:
    kinds = {
        "safetensors": safetensors_seeds(), "config": config_seeds(), "index": index_seeds(),
    }  # fmt: skip
    for kind, seeds in kinds.items():
        folder = CORPUS / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
