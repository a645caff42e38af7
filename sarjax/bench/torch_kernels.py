"""`sarjax.bench.kernel_cases` in good PyTorch, on a GPU where torch sees one; images are (b, c, h, w)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sarjax.machine import visible_cores
from sarjax.spec import IGNORE_LABEL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def placed(array: np.ndarray) -> Tensor:
    """A copy of an array, where PyTorch computes; with as many threads as there are cores."""
    torch.set_num_threads(visible_cores())
    torch.set_float32_matmul_precision("highest")
    return torch.from_numpy(np.array(array)).to(DEVICE)


def done(result: Tensor) -> Tensor:
    """The result, once it is there."""
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


@torch.inference_mode()
def nearest(bank: Tensor, neighbours: int, queries: int) -> Tensor:
    """Indices of the nearest rows by cosine, so many queries at a time."""
    rows, found = F.normalize(bank), []
    for start in range(0, len(rows), queries):
        similarity = rows[start : start + queries] @ rows.T
        similarity.diagonal(start).fill_(-torch.inf)
        found.append(similarity.topk(neighbours).indices)
    return done(torch.cat(found)).cpu()


@torch.inference_mode()
def confusion(predicted: Tensor, label: Tensor, classes: int, ignored: int) -> Tensor:
    """(b, k, k) counts by one `bincount`."""
    bins = classes**2 + 1
    pair = torch.where(label != ignored, label.long() * classes + predicted, classes**2)
    pair += bins * torch.arange(len(label), device=label.device)[:, None, None]
    counted = torch.bincount(pair.view(-1), minlength=len(label) * bins).view(-1, bins)
    return done(counted[:, :-1].reshape(-1, classes, classes)).cpu()


@torch.inference_mode()
def flips(images: Mapping[str, Tensor], view: Mapping[str, Tensor], sensors: Sequence[str]) -> dict[str, Tensor]:
    """Each tile flipped and transposed as drawn."""
    down, across, turned = (view[name].tolist() for name in ("flip_y", "flip_x", "transpose"))
    out = {}
    for name, batch in images.items():
        out[name] = torch.empty_like(batch)
        for row, tile in enumerate(batch):
            axes = [axis for axis, flipped in ((-2, down[row]), (-1, across[row])) if flipped]
            tile = tile.flip(axes) if axes else tile
            out[name][row] = tile.transpose(-2, -1) if turned[row] else tile
        done(out[name])
    return out


@torch.inference_mode()
def views(images: Mapping[str, Tensor], view: Mapping[str, Tensor], sensors: Sequence[str]) -> dict[str, Tensor]:
    """Means of the valid neighbours of each pixel of the view, by `grid_sample`; masks and labels of the nearest."""
    side = images["label"].shape[-1]
    y, x = (torch.where(view[f"flip_{n}"][:, None], view[n].flip(1), view[n]) for n in ("y", "x"))
    grid = torch.stack(
        torch.broadcast_tensors(((2 * x + 1) / side - 1)[:, None], ((2 * y + 1) / side - 1)[..., None]), -1
    )
    turned = view["transpose"][:, None, None, None]

    def sample(image: Tensor, mode: str) -> Tensor:
        return F.grid_sample(image, grid, mode, padding_mode="zeros", align_corners=False)

    def turn(image: Tensor) -> Tensor:
        return torch.where(turned, image.transpose(2, 3), image).byte()

    out = {}
    for name in sensors:
        valid = images[f"{name}_valid"].float()
        parts = sample(torch.cat([images[name] * valid, valid], 1), "bilinear")
        shown = sample(valid, "nearest")
        mean = torch.where(shown > 0, parts[:, :-1] / parts[:, -1:].clamp_min(1e-6), 0.0)
        out[name], out[f"{name}_valid"] = turn(mean.round_()), turn(shown)
    # What lies outside of a tile would be 0 here: labels are counted from the one that is ignored.
    label = sample(IGNORE_LABEL - images["label"].float(), "nearest")
    out["label"] = done(turn(IGNORE_LABEL - label))
    return out


@torch.inference_mode()
def noise(images: Mapping[str, Tensor], looks: float, contrast: Tensor, brightness: Tensor) -> list[Tensor]:
    """Speckled amplitude, and reflectance whose contrast and brightness change."""
    valid = images["sar_valid"] > 0
    gain = torch._standard_gamma(torch.full(images["sar"].shape, looks, device=DEVICE)) / looks
    sar = torch.where(valid, images["sar"] * gain.sqrt_(), 0.0)
    valid = images["optical_valid"] > 0
    x = torch.where(valid, images["optical"].float(), 0.0)
    mean = x.sum((2, 3), keepdim=True) / valid.sum((2, 3), keepdim=True).clamp_min(1)
    x = (brightness * (mean + contrast * (x - mean))).clamp_(0, 255)
    return [sar, done(torch.where(valid, x, 0.0))]
