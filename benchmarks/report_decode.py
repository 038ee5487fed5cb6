"""Decode: a token of one sequence, of many, of a stack of layers, of a whole layer."""

from report_text import bar, measured, table


def rows(kernels):
    found = []
    for rest, run in measured(kernels, "decode/"):
        K, H, isa = rest.split("/")
        found.append(
            [
                K.split(":")[1],
                H.split(":")[1],
                isa,
                f"{run['us_per_head']:.1f}",
                f"{run['openblas_us']:.1f}",
                f"{run['ratio']:.2f} ({run['ratio_min']:.2f} .. {run['ratio_max']:.2f})",
            ]
        )
    return found


def title(kernels):
    """What was decoded, and what a state of few keys costs at most."""
    runs = [run for _, run in measured(kernels, "decode/")]
    text = "Decode, microseconds a token and head of processor time, one thread"
    many, few = runs[0]["state_keys"], runs[0]["few_keys"]
    dearer = max(run["few_keys_over_ours"] for run in runs)
    return (
        f"{text}, from a state that {many:.0f} different keys have filled (one of only {few:.0f} "
        f"may be solved in float64, see numerics.md, and costs up to {dearer:.1f} times as much):"
    )


VARIANTS = {
    "update": "update and read-out",
    "chebyshev30": "chebyshev(30)",
    "direct": "direct",
}
# Of a memory copy's rate, in bytes of the states.
STATE_BARS = {"update": ">= 0.70", "chebyshev30": ">= 0.35"}


def state_cases(kernels):
    """(sequences times heads, case) of the states that may exceed the last-level cache."""
    for rest, run in measured(kernels, "decode_states/"):
        yield rest.split("/")[1].split(":")[1], run


def state_rows(kernels):
    found = []
    for heads, run in state_cases(kernels):
        for variant, text in VARIANTS.items():
            us, share, one_us, one_share = (
                run[f"{variant}:{field}"] for field in ("us", "share", "one_us", "one_share")
            )
            size = f"{heads} ({run['state_mbytes']:.0f} MB)"
            found.append(
                [size, text, f"{us:.1f}", f"{share:.0%}", f"{one_us:.1f}", f"{one_share:.0%}"]
            )
    return found


def state_bars(kernels):
    found = []
    for heads, run in state_cases(kernels):
        if int(heads) < 512:  # smaller ones fit the caches of this size
            continue
        for variant, limit in STATE_BARS.items():
            what = f"decode of {heads} states, {VARIANTS[variant]}, over a memory copy"
            found.append(bar(what, limit, run[f"{variant}:share"], run[f"{variant}:one_share"]))
    return found


def state_sections(kernels):
    rows = state_rows(kernels)
    if not rows:
        return []
    copies = [run["one_copy_gbytes"] for _, run in state_cases(kernels)]
    return [
        "Decode of many sequences, K = V = 128: microseconds a token and head, and bytes of the "
        "states (both read and written once) a second over those of a copy of as much memory "
        f"(read and written; one thread {min(copies):.0f} to {max(copies):.0f} GB/s), turn by "
        "turn; all threads by the clock, one by its processor time. Update and read-out: alpha 0, "
        "one step of an iteration that nobody reads.",
        table(["states", "what", "us", "of a copy", "one thread, us", "of a copy"], rows),
    ]


def stack_sections(stack):
    """24 layers beside attention, by benchmarks/eager_decode.py."""
    if not stack:
        return []
    rows = [
        [name, f"{peer['ms']:.1f}", f"{peer['one_ms']:.1f}"]
        for name, peer in stack["peers"].items()
    ]
    return [
        f"A token of one sequence through {stack['layers']} layers of {stack['heads']} heads of "
        f"{stack['dim']}, projections left out, beside softmax attention with a cache of "
        f"{stack['cache']} tokens (PyTorch {stack['torch']}, scaled_dot_product_attention), "
        f"milliseconds, {stack['threads']} threads by the clock and one by its processor time:",
        table(["what", "clock", "one thread"], rows),
    ]


def layer_sections(layer):
    """One layer of width 2048, by kalmanet_layer_decode_bench."""
    if not layer:
        return []
    rows = []
    for name in ("float32", "bfloat16", "float32, alpha 0"):
        fused, separate, products, ratio = (
            layer[f"{name}:{field}"]
            for field in ("fused_us", "separate_us", "products_us", "separate_over_fused")
        )
        rows.append([name, f"{fused:.0f}", f"{separate:.0f}", f"{products:.0f}", f"{ratio:.2f}"])
    shares = " and ".join(
        f"{layer[f'prefill {solver}:around_share']:.1%} of the layer's time with {solver}"
        for solver in ("chebyshev", "direct")
    )
    return [
        "A token of decode through a layer of width 2048 with 16 heads of 128, microseconds of "
        "one thread: the fused step, operator by operator, and the projections' products, which "
        "are part of either:",
        table(["weights", "fused", "operators", "products", "operators / fused"], rows),
        "In a prefill of 1024 tokens the convolutions, norms and gates around the operator take "
        f"{shares}: all that fusing them could save.",
    ]


def bars(results):
    kernels = results["kernels"]
    fastest = kernels["context"]["instruction_set"]
    found = []
    for rest, run in measured(kernels, "decode/"):
        if rest.endswith(fastest):
            K, H, _ = rest.split("/")
            what = f"decode over 31 sgemv, K = {K[2:]}, {H[2:]} heads"
            found.append(bar(what, "<= 2.00", None, run["ratio"]))
    return found + state_bars(kernels)


def sections(results):
    kernels = results["kernels"]
    others = (
        state_sections(kernels)
        + stack_sections(results.get("decode_stack"))
        + layer_sections(results.get("layer_decode"))
    )
    found = rows(kernels)
    if not found:
        return others
    head = ["K = V", "heads", "code", "ours", "31 sgemv", "ratio (range)"]
    return [title(kernels), table(head, found), *others]
