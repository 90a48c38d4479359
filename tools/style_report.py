"""How notebooks read, in figures, beside those of good models: a report, not limits to meet.

    python tools/style_report.py [WORD ...]

prints a row for each notebook whose path contains one of the words (all without a word). A figure
outside of the range that the models have carries a star. Nothing fails: a notebook with a star may
be right as it is."""

import argparse
import statistics
import sys

from nb_filter import directives
from nb_read import EQUATION, Notebook, asserting, code_lines, notebooks

# Ranges found in good literate notebooks, by the kind of notebook; "silent" is the longest run of
# lesson cells without an output; "median", "p90" and "max" are lines of code a cell; "width" is the
# longest line of code.
CODE = dict(silent=(0, 3), median=(1, 6), p90=(1, 20), max=(1, 45), width=(1, 100))
MODELS = dict(
    part=dict(
        cells=(40, 90),
        prose=(0.40, 0.55),
        words=(900, 2500),
        figures=(3, 8),
        equations=(3, 12),
        checks=(6, 15),
    ),
    results=dict(
        cells=(25, 90),
        prose=(0.40, 0.60),
        words=(600, 2500),
        figures=(3, 8),
        equations=(0, 12),
        checks=(3, 15),
    ),
    core=dict(
        cells=(25, 90),
        prose=(0.40, 0.55),
        words=(600, 2500),
        figures=(1, 8),
        equations=(0, 12),
        checks=(6, 15),
    ),
    benchmarks=dict(
        cells=(8, 90),
        prose=(0.25, 0.70),
        words=(200, 2500),
        figures=(1, 8),
        equations=(0, 12),
        checks=(1, 15),
    ),
    paper=dict(
        cells=(5, 60),
        prose=(0.0, 1.0),
        words=(300, 2500),
        figures=(1, 8),
        equations=(0, 12),
        checks=(0, 15),
    ),
    index=dict(
        cells=(5, 60),
        prose=(0.0, 1.0),
        words=(200, 2500),
        figures=(0, 8),
        equations=(0, 12),
        checks=(0, 15),
    ),
)


def longest_silence(nb):
    "Most lesson cells in a row that show nothing"
    longest = run = 0
    for c in nb.lessons:
        run = 0 if c["outputs"] else run + 1
        longest = max(longest, run)
    return longest


def measure(nb):
    "The figures of one notebook, by the names in MODELS and CODE"
    sizes = sorted(code_lines(c) for c in nb.code if "default_exp" not in directives(c["source"]))
    widths = [len(line) for c in nb.code for line in c["source"].splitlines()]
    return dict(
        cells=len(nb.cells),
        prose=round(len(nb.md) / len(nb.cells), 2),
        words=sum(len(c["source"].split()) for c in nb.md),
        figures=len(nb.figures),
        equations=sum(len(EQUATION.findall(c["source"])) for c in nb.md),
        checks=sum(asserting(c) for c in nb.code if c not in nb.exports),
        silent=longest_silence(nb),
        median=statistics.median(sizes) if sizes else 0,
        p90=sizes[int(0.9 * (len(sizes) - 1))] if sizes else 0,
        max=sizes[-1] if sizes else 0,
        width=max(widths, default=0),
    )


def shown(name, value):
    "A figure as the table has it"
    return f"{value:.0%}" if name == "prose" else f"{value:g}"


def outside(value, limits):
    "Is a figure outside of what the models have?"
    return not limits[0] <= value <= limits[1]


def report(words=()):
    "The table, as lines"
    names = [*MODELS["part"], *CODE]
    chosen = [p for p in notebooks() if not words or any(w in p.as_posix() for w in words)]
    width = max([len(p.as_posix()) for p in chosen] + [len("models: benchmarks")])
    head = f"{'':{width}} " + " ".join(f"{n:>9}" for n in names)
    lines, kinds = [head], []
    for rel in chosen:
        nb = Notebook(rel)
        models = MODELS[nb.kind] | CODE
        kinds.append(nb.kind)
        row = [shown(n, v) + "* "[not outside(v, models[n])] for n, v in measure(nb).items()]
        lines.append(f"{rel.as_posix():{width}} " + " ".join(f"{s:>9}" for s in row))
    lines += ["", "what the models have (* above: outside of it)", head]
    for k in MODELS:
        if k in kinds:
            row = ["-".join(shown(n, x) for x in (MODELS[k] | CODE)[n]) for n in names]
            lines.append(f"{'models: ' + k:{width}} " + " ".join(f"{s:>9}" for s in row))
    return lines


def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description="Figures on how the notebooks read")
    p.add_argument("words", nargs="*", help="only notebooks whose path contains one of these")
    words = p.parse_args(argv).words
    lines = report(words)
    if len(lines) <= 4:
        print(f"no notebook has {' or '.join(words)} in its path", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
