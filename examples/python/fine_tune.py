"""A hybrid model under transformers.Trainer. Needs: pip install 'kalmanet[models]' accelerate"""

import tempfile

import torch
from kalmanet.models import HybridQwen3Config, HybridQwen3ForCausalLM
from transformers import Trainer, TrainingArguments

torch.manual_seed(0)
text = b"".join(b"%d squared is %d. " % (i, i * i) for i in range(400))
windows = [torch.tensor(list(text[i : i + 64])) for i in range(0, len(text) - 64, 64)]
config = HybridQwen3Config(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=16,
    hybrid_override_pattern="GKA-*-GKA",
    gka_config={"solver_type": "direct"},
)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=HybridQwen3ForCausalLM(config),
        args=TrainingArguments(
            folder,
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            logging_steps=20,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": w, "labels": w} for w in windows],
    )
    trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
print("losses", " ".join(f"{float(loss):.2f}" for loss in losses))
