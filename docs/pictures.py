"""Pictures of the pages, drawn when the documentation is built; all lie on a light page as on a dark one."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.figure import Figure

from openreml_nn import lmm
from openreml_nn.datasets import sleepstudy
from openreml_nn.inference import profile
from openreml_nn.report import caterpillar, zeta

#: The colour of text and axes, and the two of lines, by the theme of the page.
INKS = {"light": ("#26292e", "#1f77b4", "#ff7f0e"), "dark": ("#cfd0d0", "#58a6ff", "#ffa657")}
BLUE, RED = (0.16, 0.50, 0.85), (0.85, 0.27, 0.22)


def heat_map(matrix: torch.Tensor, path: Path, inches: float, dpi: int) -> None:
    """Draw a matrix: blue is positive, red negative, and what is zero shows the page behind it."""
    share = (matrix / matrix.abs().max()).numpy()
    pixels = np.empty((*share.shape, 4))
    pixels[..., :3] = np.where((share < 0)[..., None], RED, BLUE)
    pixels[..., 3] = np.abs(share) ** 0.7
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axis = figure.subplots()
    axis.imshow(pixels)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("0.5")
    figure.savefig(path, dpi=dpi, transparent=True)


def draw_plots(folder: Path) -> None:
    """Draw the plots of a fit that pages show, once for each theme: ``blup-dark.png`` and the like."""
    folder.mkdir(parents=True, exist_ok=True)
    result = lmm("Reaction ~ Days + (Days | Subject)", sleepstudy())
    profiled = profile(lmm("Reaction ~ Days + (Days | Subject)", sleepstudy(), method="ml"))
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    for theme, (ink, *lines) in INKS.items():
        style = {**dict.fromkeys(names, ink), "axes.prop_cycle": cycler(color=lines)}
        with matplotlib.rc_context({**style, "font.size": 9}):
            blups, curves = caterpillar(result, "Subject"), zeta(profiled)
            # Smaller than by default, so that their text can be read on the screen of a telephone.
            blups.set_size_inches(5.2, 4.2)
            curves.set_size_inches(6.0, 4.0)
            for axis in curves.axes:
                axis.title.set_fontsize(7.5)
            blups.savefig(folder / f"blup-{theme}.png", dpi=250, transparent=True)
            curves.savefig(folder / f"zeta-{theme}.png", dpi=250, transparent=True)
