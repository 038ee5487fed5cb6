"""What the plot scripts share: their two arguments, and matplotlib where there is no display."""

import sys
from pathlib import Path

NO_MATPLOTLIB = 3  # exit code; the command (apps/plot.cpp) says then what to install


def run(draw) -> int:
    """Saves the figure of draw(pyplot, path of the data) to the second argument."""
    script, *arguments = sys.argv
    if len(arguments) != 2:
        print(f"usage: {Path(script).name} DATA PICTURE", file=sys.stderr)
        return 2
    try:
        import matplotlib
    except ImportError:
        return NO_MATPLOTLIB
    matplotlib.use("Agg")
    from matplotlib import pyplot

    data, picture = arguments
    draw(pyplot, data).savefig(picture, dpi=130)
    return 0
