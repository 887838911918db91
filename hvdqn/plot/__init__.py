"""`hvdqn plot`: draw the learning curves of one or many runs as PNG or SVG. Never imports torch.

`runs` reads run directories, `groups` decides which runs make one curve, `statistics` summarizes their seeds, `drawing`
makes the figure, and `command` is the command line.
"""

from __future__ import annotations

from hvdqn.plot.command import PlotOptions, main, plot
from hvdqn.plot.drawing import COLOURS, STYLE

__all__ = ["COLOURS", "STYLE", "PlotOptions", "main", "plot"]
