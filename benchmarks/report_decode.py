"""Decode: one token of one sequence."""

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


def bars(results):
    kernels = results["kernels"]
    fastest = kernels["context"]["instruction_set"]
    found = []
    for rest, run in measured(kernels, "decode/"):
        if rest.endswith(fastest):
            K, H, _ = rest.split("/")
            what = f"decode over 31 sgemv, K = {K[2:]}, {H[2:]} heads"
            found.append(bar(what, "<= 2.00", None, run["ratio"]))
    return found


def sections(results):
    kernels = results["kernels"]
    found = rows(kernels)
    if not found:
        return []
    head = ["K = V", "heads", "code", "ours", "31 sgemv", "ratio (range)"]
    return [title(kernels), table(head, found)]
