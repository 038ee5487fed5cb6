"""One Gated KalmaNet layer learns to say again what it heard: sixteen random symbols, twice."""

import torch
from kalmanet import GatedKalmaNet

torch.manual_seed(0)
embed, head = torch.nn.Embedding(20, 64), torch.nn.Linear(64, 20)
layer = GatedKalmaNet(hidden_size=64, head_dim=32, num_heads=2, solver="direct")
model = torch.nn.ModuleList([embed, layer, head])
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(301):
    ids = torch.randint(20, (16, 16)).repeat(1, 2)
    x = embed(ids[:, :-1])
    logits = head(x + layer(x)[0])[:, 16:]  # of the second time
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 17:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 60 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
