"""What the sections of the report share: tables, bars, and reading kalmanet_bench's counters."""


def table(head, rows):
    """Markdown whose columns line up, so that it also reads well on a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines
    )


def ms(value):
    """Milliseconds to three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bar(what, limit, by_clock, by_processor_time):
    """A row of the table of bars. limit: ">= 2.5" or "<= 1.15"; the figures of all threads by the
    clock and of one thread by its processor time, or None. Met only if all figures there are meet
    it."""
    relation, number = limit.split()
    figures = [value for value in (by_clock, by_processor_time) if value is not None]
    above = relation == ">="
    met = all(value >= float(number) if above else value <= float(number) for value in figures)
    texts = ["-" if value is None else f"{value:.2f}" for value in (by_clock, by_processor_time)]
    return [what, limit, *texts, "yes" if met and figures else "NO"]


def measured(kernels, prefix):
    """(rest of the name, case) of every timed case whose name starts so."""
    for run in kernels["benchmarks"]:
        name = run["name"].split("/iterations")[0]
        if name.startswith(prefix) and not run.get("error_occurred"):
            yield name[len(prefix) :], run


def only(kernels, name):
    """The timed case of that very name, or None."""
    return next((run for rest, run in measured(kernels, name) if rest == ""), None)


def variants(run):
    """{variant: {field: value}} of a group, in the group's order (groups.hpp: counters are named
    "<index> <variant>:<field>")."""
    found = {}
    for counter, value in run.items():
        if ":" in counter and counter.split(" ")[0].isdigit():
            name, field = counter.rsplit(":", 1)
            found.setdefault(name, {})[field] = value
    ordered = sorted(found.items(), key=lambda item: int(item[0].split(" ")[0]))
    return {name.split(" ", 1)[1]: fields for name, fields in ordered}


def lengths(run, solver, field):
    """{T: value} of the counters "<solver>:<field>_T<T>", shortest first."""
    start = f"{solver}:{field}_T"
    found = {int(name[len(start) :]): v for name, v in run.items() if name.startswith(start)}
    return dict(sorted(found.items()))
