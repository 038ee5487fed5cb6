#!/usr/bin/env python3
"""One table and one picture of what benchmarks/run measured: report.py build/bench [--docs].

--docs also writes them into docs/performance.md, between its two marks.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import report_decode
import report_peers
import report_sequences
from report_picture import draw
from report_text import table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: benchmarks/run --docs -->", "<!-- end of figures -->"
PICTURE = "performance.png"

# What makes up the page, in its order. Each has bars(results), rows of report_text.bar, and
# sections(results), paragraphs and tables; results: {name: content of build/bench/<name>.json}, and
# a file that was not measured is missing.
MODULES = (report_sequences, report_peers, report_decode)


def read(folder):
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def machine(results):
    context = results["kernels"]["context"]
    torch = f"; PyTorch {results['eager']['torch']}" if results.get("eager") else ""
    return (
        f"{processor()}, {context['threads']} threads, {context['instruction_set']}; OpenBLAS's "
        f"kernels: {context['openblas_core']}{torch}; a memory copy by one thread moves "
        f"{float(context['copy_gbytes']):.0f} GB/s. {context['date'][:10]}; processes that wanted "
        f"a core when it began: {context['load_avg'][0]:.1f}."
    )


def report(results):
    rows = [row for module in MODULES for row in module.bars(results)]
    bars = table(["what", "bar", "by the clock", "by processor time", "met"], rows)
    parts = [machine(results), bars]
    for module in MODULES:
        parts += module.sections(results)
    return "\n\n".join(parts) + "\n"


def write_docs(text, picture):
    page = ROOT / "docs/performance.md"
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        sys.exit(f"report: {page} has no line {BEGIN} or {END}")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    new = page.with_suffix(".new")
    new.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    os.replace(new, page)
    if picture.is_file():
        shutil.copyfile(picture, ROOT / "docs" / PICTURE)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    results = read(args.folder)
    if "kernels" not in results:
        sys.exit(f"report: no {args.folder / 'kernels.json'}; run: make bench")
    text = report(results)
    (args.folder / "report.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    picture = args.folder / PICTURE
    if draw(results["kernels"], picture):
        print(f"picture: {picture}")
    if args.docs:
        write_docs(text, picture)


if __name__ == "__main__":
    main()
