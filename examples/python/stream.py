"""Generation that stops, saves its state, and goes on later: python stream.py [MODEL_FOLDER]"""

import sys
import tempfile
from pathlib import Path

import kalmanet
import torch
from kalmanet.models import HybridQwen3Config, HybridQwen3ForCausalLM

if len(sys.argv) > 1:
    model = kalmanet.load(sys.argv[1])  # a folder that `kalmanet train` wrote, for instance
else:
    torch.manual_seed(0)  # no folder: new weights, to show how it goes
    config = HybridQwen3Config(num_hidden_layers=3, hybrid_override_pattern="GKA-GKA-*")
    model = HybridQwen3ForCausalLM(config).eval()


@torch.no_grad()
def stream(ids, state, count):
    """Yields `count` bytes; `state` has read everything but the last of them."""
    for _ in range(count):
        logits = model(ids, past_key_values=state, use_cache=True).logits[0, -1, :256]
        ids = logits.argmax().view(1, 1)
        yield ids.item()


prompt = torch.tensor([list(b"The memory of this sequence ")])
whole = bytes(stream(prompt, kalmanet.State(), 40))

state = kalmanet.State()
first = bytes(stream(prompt, state, 20))
with tempfile.TemporaryDirectory() as folder:
    state.save(Path(folder) / "state.kn")  # ... another day, another machine ...
    state = kalmanet.State.load(Path(folder) / "state.kn")
second = bytes(stream(torch.tensor([[first[-1]]]), state, 20))
print(f"a state of {state.bytes()} bytes; the same text in one go: {first + second == whole}")
