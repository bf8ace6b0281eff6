"""Grids of images: generated ones, data beside reconstructions, interpolations.

All are importable from :mod:`numpyro_ebipla.plots`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_ebipla._core.tree import spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from numpyro_ebipla.results.fit import Fit


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ImportError: without Matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("numpyro_ebipla.plots needs Matplotlib: pip install numpyro_ebipla[plots].") from e
    return plt


def plot_images(
    images: Any,
    ax: "Axes | None" = None,
    *,
    image_shape: tuple[int, ...] | None = None,
    columns: int | None = None,
    num_images: int = 36,
    vmin: float | None = None,
    vmax: float | None = None,
) -> "Axes":
    """Plot a grid of images, such as draws of ``Predictive`` or a posterior's.

    Args:
        images: ``[n, height, width]``, with a last axis of 3 for colours, or of 1; or ``[n, ...]`` with an
            ``image_shape``.
        ax: where to draw, by default a new figure.
        image_shape: ``(height, width)`` or ``(height, width, 3)``, of images that are flat.
        columns: of the grid, by default so many that it is square.
        num_images: at most, evenly spaced.
        vmin: value drawn black, by default the least.
        vmax: value drawn white, by default the greatest.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if the shapes are not those of images.

    >>> plot_images(np.eye(4).reshape(1, 4, 4)).images[0].get_array().shape
    (4, 4)
    """
    images = _as_images(images, image_shape)
    images = images[spaced(len(images), num_images)]
    return _show(images, columns or int(np.ceil(np.sqrt(len(images)))), ax, vmin, vmax)


def plot_reconstructions(
    data: Any,
    reconstructions: Any,
    ax: "Axes | None" = None,
    *,
    image_shape: tuple[int, ...] | None = None,
    columns: int = 8,
    num_images: int = 16,
    vmin: float | None = None,
    vmax: float | None = None,
) -> "Axes":
    """Plot data, each with its reconstruction to the right.

    Args:
        data: see :func:`plot_images`.
        reconstructions: likewise, as many: such as of :meth:`.EBIPLA.reconstruct` or :meth:`.Fit.posterior_mean`.
        ax: where to draw, by default a new figure.
        image_shape: see :func:`plot_images`.
        columns: images in a row, of both kinds: an even number.
        num_images: data shown, at most, evenly spaced.
        vmin: value drawn black, by default the least of the data.
        vmax: value drawn white, by default the greatest of the data.

    Raises:
        ImportError: without Matplotlib.
        ValueError: if the shapes are not those of images, or not the same.
    """
    data, found = _as_images(data, image_shape), _as_images(reconstructions, image_shape)
    if data.shape != found.shape:
        raise ValueError(f"data have shape {data.shape}, reconstructions {found.shape}: pass those of the same data.")
    some = spaced(len(data), num_images)
    pairs = np.stack([data[some], found[some]], 1).reshape(-1, *data.shape[1:])
    low, high = data.min() if vmin is None else vmin, data.max() if vmax is None else vmax
    return _show(pairs, columns + columns % 2, ax, low, high)


def plot_interpolation(
    fit: "Fit",
    pairs: Sequence[tuple[int, int]],
    ax: "Axes | None" = None,
    *,
    site: str | None = None,
    num: int = 8,
    image_shape: tuple[int, ...] | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> "Axes":
    """Plot what lies between the particles of two data, a row for each pair; see :meth:`.Fit.interpolate`.

    Args:
        fit: of :meth:`.EBIPLA.run`.
        pairs: indices of two data each.
        ax: where to draw, by default a new figure.
        site: whose values are the images, by default the observed one.
        num: images in a row.
        image_shape: see :func:`plot_images`.
        vmin: value drawn black, by default the least.
        vmax: value drawn white, by default the greatest.

    Raises:
        ImportError: without Matplotlib.
        ModelError, ValueError: naming a site or datum that there is not, or for shapes that are not those of images.
    """
    rows = [_as_images(fit.interpolate(first, second, num, site=site), image_shape) for first, second in pairs]
    return _show(np.concatenate(rows), num, ax, vmin, vmax)


def tiles(images: np.ndarray, columns: int, low: float, high: float) -> np.ndarray:
    """Put images ``[n, height, width, …]`` side by side, scaled to [0, 1], with white lines between them."""
    number, height, width, *colours = images.shape
    rows = -(-number // columns)
    framed = np.ones((rows * columns, height + 1, width + 1, *colours))
    framed[:number, :height, :width] = np.clip((images - low) / max(high - low, 1e-12), 0, 1)
    grid = framed.reshape(rows, columns, height + 1, width + 1, *colours)
    grid = np.moveaxis(grid, 2, 1).reshape(rows * (height + 1), columns * (width + 1), *colours)
    return grid[:-1, :-1]


def _as_images(images: Any, image_shape: tuple[int, ...] | None) -> np.ndarray:
    """Return images ``[n, height, width]`` or ``[n, height, width, 3]``."""
    images = np.asarray(images, dtype=float)
    if image_shape is not None:
        if np.prod(image_shape) != np.prod(images.shape[1:]):
            raise ValueError(f"image_shape {image_shape} does not hold {np.prod(images.shape[1:], dtype=int)} values.")
        images = images.reshape(-1, *image_shape)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[-1] == 3):
        raise ValueError(
            f"images must have shape [n, height, width] or [n, height, width, 3], got {images.shape}: image_shape=… "
            "says what flat ones are."
        )
    return images


def _show(images: np.ndarray, columns: int, ax: "Axes | None", low: float | None, high: float | None) -> "Axes":
    if ax is None:
        size = 0.7 * np.array([columns, -(-len(images) // columns)])
        _, ax = pyplot().subplots(figsize=tuple(np.maximum(size, 2.0)), layout="constrained")
    low, high = images.min() if low is None else low, images.max() if high is None else high
    ax.imshow(tiles(images, columns, low, high), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax
