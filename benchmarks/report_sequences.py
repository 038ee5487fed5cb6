"""Whole sequences: solvers, ridges, dtypes, head sizes, instruction sets, lengths, memory."""

from report_text import bar, lengths, measured, ms, only, table, variants

PASSES = ("forward", "forward_backward")
SOLVERS = ("chebyshev(30)", "direct")
MEMORIES = ("256", "unlimited")
# In the order of the page: name of the group, what its table shows.
GROUPS = {
    "solvers/memory:256": "Solvers, memory of 256 tokens, ridge ratio 0.02",
    "solvers/memory:unlimited": "Solvers, unlimited memory, ridge ratio 0.02",
    "ridges/memory:256": "direct by ridge ratio, memory of 256 tokens",
    "ridges/memory:unlimited": "direct by ridge ratio, unlimited memory",
    "learned/memory:256": "Ridge ratios of 0.005 to 0.05 a token, tolerance 1e-5, memory 256",
    "learned/memory:unlimited": "The same, unlimited memory",
    "dtypes": "dtypes (16 bits computed with float32 accuracy)",
    "head_sizes": "Head sizes",
    "one_head": "One sequence, one head",
    "instruction_sets": "Instruction sets, forced at run time",
}


def text_of(pass_name):
    return pass_name.replace("_", "+")


def group_rows(kernels, group):
    rows = []
    for pass_name in PASSES:
        run = only(kernels, f"sequence/{group}/{pass_name}")
        for name, v in (variants(run) if run else {}).items():
            rows.append(
                [
                    text_of(pass_name),
                    name,
                    f"{v['gflop']:.1f}",
                    f"{v['mbytes']:.0f}",
                    f"{ms(v['ms'])} ({ms(v['ms_min'])} .. {ms(v['ms_max'])})",
                    f"{v['gflops']:.0f} = {v['ratio']:.0%}",
                    f"{v['speed']:.2f}",
                    ms(v["one_ms"]),
                    f"{v['one_gflops']:.0f} = {v['one_ratio']:.0%}",
                    f"{v['one_speed']:.2f}",
                    f"{v['steps_min']:.0f} .. {v['steps_max']:.0f}",
                    f"{v['factorizations']:.2f}",
                ]
            )
    return rows


GROUP_HEAD = [
    "pass",
    "what",
    "GFLOP",
    "MB",
    "ms (range)",
    "GFLOP/s = of sgemm",
    "speed",
    "1 thread: ms",
    "GFLOP/s = of sgemm",
    "speed",
    "steps",
    "factors",
]


def slowest_over_fastest(values):
    values = list(values)
    return max(values) / min(values)


def group_bars(kernels):
    rows = []

    def speed(group, pass_name, variant, text, limit, fields=("speed", "one_speed")):
        run = only(kernels, f"sequence/{group}/{pass_name}")
        v = variants(run).get(variant) if run else None
        if v:
            rows.append(bar(text, limit, v[fields[0]], v[fields[1]]))

    sgemm = "chebyshev(30) forward, GFLOP/s over OpenBLAS's sgemm"
    ratios = ("ratio", "one_ratio")
    speed("solvers/memory:256", "forward", "chebyshev(30)", sgemm, ">= 0.75", ratios)
    for pass_name, limit in zip(PASSES, (">= 2.5", ">= 2.2")):
        for memory in MEMORIES:
            text = f"direct over chebyshev(30), {text_of(pass_name)}, memory {memory}"
            speed(f"solvers/memory:{memory}", pass_name, "direct", text, limit)
    for pass_name in PASSES:
        for memory in MEMORIES:
            run = only(kernels, f"sequence/ridges/memory:{memory}/{pass_name}")
            if run:
                # speed is the time of the first ridge over this one's, round by round.
                spread = [
                    slowest_over_fastest(v[field] for v in variants(run).values())
                    for field in ("speed", "one_speed")
                ]
                what = f"direct, ridge 0.1 to 0.001, slowest over fastest, {text_of(pass_name)}"
                rows.append(bar(f"{what}, memory {memory}", "<= 1.15", *spread))
    for memory in MEMORIES:
        text = f"a ridge a token, direct over chebyshev(auto), forward, memory {memory}"
        speed(f"learned/memory:{memory}", "forward", "direct", text, ">= 4")
    return rows


def length_bars(kernels):
    rows = []
    run = only(kernels, "lengths/forward")
    for solver, first in zip(SOLVERS, (1024, 4096)):
        if run and max(lengths(run, solver, "us"), default=0) >= first:
            spread = [
                slowest_over_fastest(
                    v for T, v in lengths(run, solver, field).items() if first <= T
                )
                for field in ("us", "cpu_us")
            ]
            what = f"{solver}, time a token from {first // 1024}k on, slowest over fastest"
            rows.append(bar(what, "<= 1.10", *spread))
    for pass_name in PASSES:
        run = only(kernels, f"memory/{pass_name}")
        for solver in SOLVERS if run else ():
            tensors = lengths(run, solver, "tensors")
            workspace = lengths(run, solver, "workspace")
            last, before = sorted(tensors)[-1], sorted(tensors)[-2]
            a_token = [(tensors[T] + workspace[T]) / T for T in (last, before)]
            what = f"{solver}, {text_of(pass_name)}, bytes a token, {last // 1024}k over "
            rows.append(bar(f"{what}{before // 1024}k", "<= 1.05", None, a_token[0] / a_token[1]))
    return rows


def bars(results):
    return [*group_bars(results["kernels"]), *length_bars(results["kernels"])]


def length_section(kernels, pass_name):
    run = only(kernels, f"lengths/{pass_name}")
    if run is None:
        return []
    rows = []
    for T in lengths(run, SOLVERS[0], "us"):
        row = [f"{T}"]
        for solver in SOLVERS:
            us, low, high, cpu = (
                lengths(run, solver, field)[T] for field in ("us", "us_min", "us_max", "cpu_us")
            )
            row += [f"{us:.2f} ({low:.2f} .. {high:.2f})", f"{cpu:.2f}"]
        rows.append(row)
    head = ["T", *(text for s in SOLVERS for text in (f"{s}, by the clock", "processor time"))]
    title = f"Microseconds a token, {text_of(pass_name)} ({run['label']}, memory 256):"
    return [title, table(head, rows)]


def memory_section(kernels):
    rows = []
    for pass_name in PASSES:
        run = only(kernels, f"memory/{pass_name}")
        for solver in SOLVERS if run else ():
            for T, tensors in lengths(run, solver, "tensors").items():
                asked = lengths(run, solver, "workspace")[T]
                grew = lengths(run, solver, "resident")[T]
                rows.append(
                    [
                        text_of(pass_name),
                        solver,
                        f"{T}",
                        f"{tensors / 1e6:.2f}",
                        f"{asked / 1e6:.2f}",
                        f"{grew / 1e6:.2f}",
                        f"{tensors / T:.0f}",
                        f"{asked / T:.0f}",
                    ]
                )
    if not rows:
        return []
    title = (
        "Memory, megabytes (H=1 K=128 V=128, float32, one thread). tensors: what the caller holds, "
        "results included; workspace: what `gka_workspace_bytes` says at most; grew: how far the "
        "process's resident memory rose meanwhile, which the kernel counts in steps of 0.26 MB:"
    )
    head = ["pass", "solver", "T", "tensors", "workspace", "grew", "tensors, bytes a token"]
    return [title, table([*head, "workspace, bytes a token"], rows)]


def sections(results):
    kernels = results["kernels"]
    parts = []
    if any(True for _ in measured(kernels, "sequence/")):
        parts.append(
            "Whole sequences. GFLOP: operations as counted above; MB: bytes of the tensors read "
            "and written; of sgemm: over OpenBLAS's rate in the same round (all threads) or turn "
            "(one thread, by its processor time); speed: how many times as fast as the table's "
            "first line of that pass; steps: the solver's, fewest and most of a chunk; factors: "
            "K x K factorizations a chunk."
        )
    for group, title in GROUPS.items():
        rows = group_rows(kernels, group)
        if rows:
            label = next(run["label"] for _, run in measured(kernels, f"sequence/{group}/"))
            where = "" if group == "head_sizes" else f" ({label})"
            parts += [f"**{title}**{where}:", table(GROUP_HEAD, rows)]
    for pass_name in PASSES:
        parts += length_section(kernels, pass_name)
    return parts + memory_section(kernels)
