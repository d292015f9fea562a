"""Do random lungs look like real ones? Frechet and kernel inception distance of sets of images, and
the classes that the classifiers give random lungs."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cxr import metrics
from cxr.checkpoints import Model
from cxr.classifier import to_tensor
from cxr.datasets import Dataset
from cxr.sampling import draw_codes, walk

HALVINGS = 100  # of the real images, for the spread of FID and KID
SUBSET = 1000  # most images of a half, as in Binkowski et al.
DRAWN = 512  # random lungs, for disentanglement
COMPARED = 20_000  # most images whose features are compared
CHUNK = 64  # images generated at once


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet inception distance (Heusel et al. 2017), with features of any network.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2), the distance of the Gaussians with
    the features' means and covariances. The matrix in the inner bracket is symmetric and has the
    eigenvalues of S_x S_y. x: [N, C], y: [M, C]. The bias grows as N shrinks, so compare values
    only at equal N.
    """
    x, y = x.double(), y.double()
    s_x, s_y = torch.cov(x.T), torch.cov(y.T)  # [C, C]
    values, vectors = torch.linalg.eigh(s_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_y @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + s_x.trace() + s_y.trace() - 2 * cross).item()


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance (Binkowski et al. 2018), with features of any network.

    The unbiased squared maximum mean discrepancy with the kernel (a.b / C + 1)^3. For two samples
    of one distribution it is 0 on average, so it may be negative. x: [N, C], y: [M, C].
    """
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return (sum(within) - 2 * xy.mean()).item()


def against_reals(
    measure: Callable[[Tensor, Tensor], float],
    fakes: Tensor,
    reals: Tensor,
    patients: Sequence,
    labels: np.ndarray,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The distance of fakes from reals, the distance of reals from the reals of other patients at
    equal n (the floor), and the ratio of the two.

    The patients of each class are halved at random 100 times. The images of one half are the
    reference. The floor compares it with the images of the other half, after both are cut to equal
    n in each class, at most 1000 in all; the fakes have the doses of the other half's images. The
    values are means over the halvings. The ratio is the ratio of the means, because halvings with a
    floor near 0 would dominate a mean of ratios. Low and high are the 2.5th and 97.5th percentiles;
    those of the ratio are divided by the mean floor. There is no bootstrap: images drawn twice
    would make the distribution look narrower.

    fakes, reals: [N, C] features; a row has the same dose in both; patients, labels: [N]. Returns
    {value, low, high, n} of each.
    """
    random = np.random.default_rng(seed)
    halvings = []
    for _ in range(HALVINGS):
        first, others = halves(np.asarray(patients), labels, random)
        n = len(first)
        reference = reals[first]
        pair = [measure(x[others], reference) if n > 1 else np.nan for x in (fakes, reals)]
        halvings.append((*pair, n))
    of_fakes, of_reals, sizes = np.array(halvings).T
    figures = []
    with np.errstate(divide="ignore", invalid="ignore"):  # of a floor that is 0
        for values in (of_fakes, of_reals, of_fakes / of_reals.mean()):
            low, high = np.percentile(values, [2.5, 97.5])
            figures.append({"value": float(values.mean()), "low": float(low), "high": float(high)})
    return tuple(figure | {"n": int(np.median(sizes))} for figure in figures)


def halves(
    patients: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of rows of different patients, with equal numbers of each class in both. Larger sets
    are cut to 1000 random rows."""
    names, place, group = np.unique(patients, return_index=True, return_inverse=True)
    chosen = np.zeros(len(names), bool)
    for label in np.unique(labels):  # of each patient's first image
        of_class = random.permutation(np.flatnonzero(labels[place] == label))
        chosen[of_class[: len(of_class) // 2]] = True
    pairs = []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        inside = chosen[group[rows]]
        n = min(inside.sum(), (~inside).sum())
        pairs.append([rows[inside][:n], rows[~inside][:n]])
    both = np.concatenate(pairs, 1)  # [2, n]
    return tuple(both[:, random.permutation(both.shape[1])[:SUBSET]])


@torch.no_grad()
def random_lungs(model: Model, seed: int, oracle: nn.Module | None = None) -> dict[str, dict]:
    """The shares of 512 random lungs that are called healthy at dose 0 and diseased at dose 1, by
    the model's classifier and by the independent classifier (`oracle`)."""
    asked = {"": model.classifier} | ({} if oracle is None else {"oracle_": oracle})
    logits: dict[str, list[Tensor]] = {name: [] for name in asked}
    for first in range(0, DRAWN, CHUNK):
        codes = draw_codes(model.generator, CHUNK, seed + first)
        x = walk(model.generator, *codes, doses=(0.0, 1.0))
        for name, classifier in asked.items():
            logits[name].append(classifier(x.flatten(0, 1)).unflatten(0, (CHUNK, 2)))
    called = {}
    for name, parts in logits.items():
        zero, full = torch.cat(parts).cpu().numpy().T
        called |= {f"{name}healthy_at_zero": zero < 0, f"{name}diseased_at_full": full > 0}
    each = np.arange(DRAWN)
    return {
        name: metrics.bootstrap(metrics.share, each, hits.astype(float))
        for name, hits in called.items()
    }


@torch.no_grad()
def pools(oracle: nn.Module | None, data: Dataset, device: torch.device) -> bool:
    """Whether `oracle` has a method `features` from images [N, 1, R, R] to features [N, C]."""
    x = to_tensor(data.images[:2], device)
    with contextlib.suppress(Exception):  # a user's network may have anything under that name
        return oracle.features(x).ndim == 2
    return False


@torch.no_grad()
def distances(model: Model, oracle: nn.Module, data: Dataset, split: str, seed: int) -> dict:
    """KID and FID of random lungs from a split's images, and of its images from each other, with
    the pooled features of the independent classifier (`oracle`). There are as many fakes as reals,
    at most 20,000, with the same doses."""
    rows, device = drawn_rows(data, split, COMPARED, seed), model.generator.const.device
    reals, fakes = [], []
    for number, part in enumerate(np.array_split(rows, -(-len(rows) // CHUNK))):
        x = to_tensor(data.images[part], device)
        diseased = torch.from_numpy(data.labels[part]).to(device)
        reals.append(oracle.features(x).float())
        lungs = _lungs(model, model.dose(model.classifier(x)) * diseased, seed + number)
        fakes.append(oracle.features(lungs).float())
    patients = [data.patients[row] for row in rows]
    sets = torch.cat(fakes), torch.cat(reals), patients, data.labels[rows], seed
    fakes_kid, reals_kid, _ = against_reals(kid, *sets)
    fakes_fid, reals_fid, ratio = against_reals(fid, *sets)
    return {
        "kid": fakes_kid,
        "kid_real": reals_kid,
        "fid": fakes_fid,
        "fid_real": reals_fid,
        "fid_ratio": ratio,
    }


@torch.no_grad()
def counterfactual_distances(
    oracle: nn.Module | None,
    data: Dataset,
    split: str,
    seed: int,
    features: dict[str, list[list[float]]],
    diseased: np.ndarray,
) -> dict[str, dict]:
    """FID of each kind of counterfactual from real images of the class that it was turned into, as of
    `against_reals`. features: {kind: [N, C]} of the independent classifier; diseased: bool [N], its
    image's verdict. Empty without features, and where a class has no pair to compare."""
    pairs: list[
        tuple[np.ndarray, np.ndarray]
    ] = []  # places of counterfactuals, rows of real images
    for label in (0, 1):
        made = np.flatnonzero(diseased != bool(label))
        real = [row for row in drawn_rows(data, split, None, seed) if data.labels[row] == label]
        n = min(len(made), len(real))
        pairs.append((made[:n], np.array(real[:n], int)))
    made, real = (np.concatenate(parts) for parts in zip(*pairs))
    patients = [data.patients[row] for row in real]
    if not features or len(set(patients)) < 4:
        return {}
    device = next(oracle.parameters()).device
    parts = np.array_split(data.images[real], -(-len(real) // CHUNK))
    reals = torch.cat([oracle.features(to_tensor(part, device)).float() for part in parts])
    figures = {}
    for name, rows in features.items():
        fakes = torch.tensor(rows, device=reals.device)[torch.from_numpy(made)]
        sets = fakes, reals, patients, data.labels[real], seed
        figures[name], figures["fid_real"], _ = against_reals(fid, *sets)
    return figures


def _lungs(model: Model, doses: Tensor, seed: int) -> Tensor:
    """Random lungs [N, 1, R, R], one for each dose [N]."""
    w1, u, noise = draw_codes(model.generator, len(doses), seed)
    return model.generator(w1, u * doses[:, None], noise).clamp(-1, 1)


def drawn_rows(data: Dataset, split: str, limit: int | None, seed: int) -> np.ndarray:
    """The rows to explain, at most `limit`, in random order."""
    return np.random.default_rng(seed).permutation(data.rows(split))[:limit]
