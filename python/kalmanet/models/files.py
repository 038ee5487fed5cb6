"""Model folders: config.json, safetensors, tokenizer.json, as the `kalmanet` command reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .config import HybridQwen3Config
from .model import HybridQwen3ForCausalLM


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> HybridQwen3ForCausalLM:
    """The model in a folder, in eval mode. dtype "auto": that of the weights on disk; A_log and
    dt_bias are float32 always. ValueError: a tensor is missing, unexpected or of another shape, and
    the message lists them."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: has no config.json; is it a model folder?")
    config = HybridQwen3Config.from_pretrained(folder)
    loaded: Any = HybridQwen3ForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    wrong = {
        what: sorted(map(str, report.get(key, ())))
        for what, key in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
        )
    }
    wrong = {what: names for what, names in wrong.items() if names}
    if wrong:
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items())
        raise ValueError(f"{folder}: the weights do not fit config.json: {listed}")
    return model.to(device).eval()


def save(
    model: HybridQwen3ForCausalLM,
    folder: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Any = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes a model folder. tokenizer: a folder or tokenizer.json to copy from, or a Transformers
    tokenizer; the `kalmanet` command needs its own byte tokenizer there."""
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer)
    shutil.copyfile(
        source / "tokenizer.json" if source.is_dir() else source, folder / "tokenizer.json"
    )
