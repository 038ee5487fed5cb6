"""kalmanet.State: files, copies, the documented format of saved states."""

import re
import struct

import pytest
import torch
from cases import DEVICE, SEED
from kalmanet import GatedKalmaNet, State
from kalmanet.state import KeyValues, load_gka_state, save_gka_state


def example():
    torch.manual_seed(SEED)
    layers = [
        GatedKalmaNet(16, head_dim=4, num_heads=2, layer_idx=i, device=DEVICE) for i in (0, 2)
    ]
    x = torch.randn(2, 9, 16)
    state = State()
    with torch.no_grad():
        for layer in layers:
            layer(x, past_key_values=state, use_cache=True)
    state.set_layer(1, KeyValues(torch.randn(2, 1, 16, 4), torch.randn(2, 1, 16, 4), 9), 9)
    state.mask = torch.ones(2, 9, dtype=torch.bool)
    return state, layers, x


def tensors(state):
    found = []
    state._copy(lambda t: (found.append(t), t)[1])
    return found


def test_a_saved_state_goes_on_as_the_kept_one(tmp_path):
    state, layers, x = example()
    state.save(tmp_path / "state.kn")
    loaded = State.load(tmp_path / "state.kn", DEVICE)
    a, b = tensors(state), tensors(loaded)
    assert len(a) == len(b) == 13 and all(torch.equal(s, t) for s, t in zip(a, b))
    assert loaded.get_seq_length() == 9 and len(loaded) == 3
    with torch.no_grad():
        one, two = (
            layers[0](x[:, :3], past_key_values=s, use_cache=True)[0] for s in (state, loaded)
        )
    assert torch.equal(one, two)
    assert [p.name for p in tmp_path.iterdir()] == ["state.kn"]


def test_the_file_begins_with_the_documented_format(tmp_path):
    state, _, _ = example()
    state.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    h, u = state[0]["recurrent_state"]
    assert data[:8] == bytes.fromhex("894B4E5354 0D0A1A") and data[8:12] == b"\x04\x03\x02\x01"
    version, header, dtype, N, H, K, V, payload = struct.unpack_from("<IIIqqqqq", data, 12)
    assert (version, header, dtype, N, H, K, V) == (1, 128, 0, 2, 2, 4, 4)
    assert payload == 4 * 2 * 2 * 4 * 8
    assert data[128 : 128 + h.numel() * 4] == h.cpu().numpy().tobytes()
    second = 128 + payload
    assert data[second : second + 8] == data[:8]
    assert save_gka_state(h, u) == data[:second]
    again = load_gka_state(data)
    assert torch.equal(again[0], h.cpu()) and torch.equal(again[1], u.cpu())
    # A file of saved states alone is one too.
    (tmp_path / "bare").write_bytes(data[: 2 * second])
    bare = State.load(tmp_path / "bare", DEVICE)
    assert len(bare) == 2 and torch.equal(bare[0]["recurrent_state"][1], u)


def test_float64_and_strides():
    h = torch.randn(2, 3, 4, 4, dtype=torch.float64).transpose(2, 3)
    u = torch.randn(2, 3, 5, 4, dtype=torch.float64).transpose(2, 3)
    a, b = load_gka_state(save_gka_state(h, u))
    assert torch.equal(a, h.cpu()) and torch.equal(b, u.cpu())


def test_a_clone_is_independent():
    state, layers, x = example()
    fork = state.clone()
    kept = [t.clone() for t in tensors(fork)]
    with torch.no_grad():
        layers[0](x[:, :1], past_key_values=state, use_cache=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(fork)))
    assert not torch.equal(state[0]["recurrent_state"][0], fork[0]["recurrent_state"][0])
    assert fork.bytes() == sum(t.numel() * t.element_size() for t in kept)
    assert all(t.device.type == "meta" for t in tensors(fork.to("meta")))


def test_sequences_are_taken_for_beam_search():
    state, _, _ = example()
    h = state[0]["recurrent_state"][0].clone()
    state.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(state[0]["recurrent_state"][0], h[[1, 1]])
    state.batch_repeat_interleave(2)
    assert state[2]["conv_state"][0].shape[0] == 4


def test_damaged_files(tmp_path):
    state, _, _ = example()
    path = tmp_path / "s"
    state.save(path)
    good = path.read_bytes()

    def message(data):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            State.load(path)
        return str(caught.value)

    assert "checksum" in message(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    assert "truncated" in message(good[:300])
    assert "behind the saved states" in message(good[:-5])
    assert "behind the saved states" in message(b"anything else")
    assert "the format is 'kalmanet-state-9'" in message(good.replace(b"state-1", b"state-9"))
    assert "has 2 saved states" in message(good.replace(b"GKA,*,GKA", b"GKA,*,***"))
    with pytest.raises(ValueError, match="is no saved state"):
        load_gka_state(b"")
    with pytest.raises(RuntimeError, match="state: dtype float16 .*states are float32 or float64"):
        save_gka_state(torch.zeros(1, 1, 2, 2).half(), torch.zeros(1, 1, 2, 2).half())
