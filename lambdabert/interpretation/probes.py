"""Linear probes: what can be read from features, beside what a probe learns by heart and what it costs in bits.

Logistic regression on standardised features, or on counts of words in their proportions, its strength chosen on dev.
Control tasks and selectivity: Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks", arXiv 1909.03368.
Online codelength: Voita & Titov, "Information-Theoretic Probing with Minimum Description Length", arXiv 2003.12298.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .intervals import FEWEST_GROUPS, bootstrap_interval
from .topics import as_list

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # inverse of the L2 penalty
SPLITS = ("train", "dev", "test")
DRAWN = (0.6, 0.2, 0.2)  # of the groups, where splits are drawn
KEPT = 0.9  # of train, for each seed where splits are given
SEEDS = 3
PORTIONS = (
    0.001,
    0.002,
    0.004,
    0.008,
    0.016,
    0.032,
    0.0625,
    0.125,
    0.25,
    0.5,
    1,
)  # of train, Voita & Titov, section 3.2
UNIFORM = 1e-3  # part of the uniform distribution in a code, which keeps every codelength finite
ITERATIONS = 500
EMPTY = 1e-10  # of the largest variance; a component with less is rounding


@dataclass
class ProbeResult:
    """What a probe reads from features.

    Attributes:
        accuracy: on test, mean over seeds.
        interval: of the accuracy, 95 %, bootstrap over groups of test examples.
        accuracies: of every seed.
        strength: inverse of the L2 penalty, chosen on dev; of the first seed where splits are drawn.
        dev_bits: for the labels of dev, of the first seed; what a layer may be chosen by.
        majority: accuracy on test of the commonest label of train, mean over seeds.
        dimension: of the features that the probe sees.
        control_accuracy: on the control task, a random label for each group; None without groups.
        selectivity: accuracy less control accuracy; None without groups.
        codelength: bits for the labels that the first seed trains on, given the features, by the online code. Where
            splits are given, these are 90 % of train.
        uniform_codelength: bits for the same labels without the features.
        correct: [seeds x test examples], 0 or 1.
        clusters: [seeds x test examples], the group that each belongs to.
    """

    accuracy: float
    interval: tuple[float, float]
    accuracies: list[float]
    strength: float
    dev_bits: float
    majority: float
    dimension: int
    control_accuracy: float | None
    selectivity: float | None
    codelength: float
    uniform_codelength: float
    correct: torch.Tensor
    clusters: torch.Tensor

    @property
    def test_groups(self) -> int:
        """Groups that the test examples belong to; of fewer than `FEWEST_GROUPS` an interval says little."""
        return len(self.clusters.unique())


def probe(
    features: Any,
    labels: Sequence[Any],
    groups: Sequence[Any] | None = None,
    splits: Sequence[str] | None = None,
    dimension: int | None = None,
) -> ProbeResult:
    """Trains and tests linear probes with three seeds.

    Args:
        features: [S, F], an array or tensor of S examples. Whole numbers, by their type, are counts of words.
        labels: [S], each example's class.
        groups: [S], what may not be learnt by heart: the word that decides the label, or the article. Drawn splits
            keep each group together, a control task gives each group a random label and spreads its members over
            train and test, and intervals draw groups. None = each example for itself, and no control task.
        splits: [S] of "train", "dev" and "test"; each seed then trains on 90 % of train, with the strength that the
            first chose. None = drawn by each seed, which then chooses its own strength.
        dimension: principal components of train that replace the features, where there are more features. None = all.

    Raises:
        ValueError: scikit-learn is missing; sizes that differ; features that are not finite; labels of one class, of
            as many classes as examples, of mixed types or NaN; a group with a single member; a split that is unknown
            or empty, or leaves train one class.
    """
    _require_scikit_learn()
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu()
        features = features.float() if features.is_floating_point() else features  # NumPy has no bfloat16
    given = np.asarray(features)
    table: Any = given.astype(np.float32)
    count = len(table)
    for name, column in (("labels", labels), ("groups", groups), ("splits", splits)):
        if column is not None and len(column) != count:
            raise ValueError(f"{name} has {len(column)} entries for {count} examples; give one for each.")
    if table.ndim != 2 or not np.isfinite(table).all():
        raise ValueError(f"features has shape {table.shape}, or numbers that are not finite; give finite [S, F].")
    if dimension is not None and dimension < 1:
        raise ValueError(f"dimension={dimension} leaves no feature; set it to 1 or more.")
    if np.asarray(labels).dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError("labels holds NaN, which is no class; leave these examples out.")
    if np.issubdtype(given.dtype, np.integer):
        from scipy.sparse import csr_array

        table = csr_array(table)
    kinds = {type(label).__name__ for label in as_list(labels)}
    if len(kinds) > 1:  # NumPy would make them strings
        raise ValueError(f"labels has entries of types {', '.join(sorted(kinds))}; give classes of one type.")
    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"labels={names.tolist()}: there is one class, and nothing to tell apart; give two or more.")
    if len(names) == count:
        raise ValueError(
            f"labels: no two of the {count} examples have the same, so that none can be learned from another; give "
            "classes, not measurements."
        )
    members = _members(groups, count)
    if groups is not None and members.max() == 0:
        raise ValueError(f"groups={groups[0]!r} is the only group; give two or more, or none.")
    if splits is not None:
        _check_splits(np.asarray(splits), classes)

    parts = [_parts(members, splits, classes, seed) for seed in range(SEEDS)]
    found: dict[str, list[Any]] = {name: [] for name in ("correct", "majority")}
    for seed, (train, dev, test) in enumerate(parts):
        if seed == 0 or splits is None:  # given splits have one train, of which the seeds leave out different parts
            prepared = _prepare(table, train if splits is None else np.asarray(splits) == "train", dimension)
            strength, bits = _best_strength(prepared[train], classes[train], prepared[dev], classes[dev])
        if seed == 0:
            first_strength, dev_bits = strength, bits
            codelength = _codelength(prepared[train], classes[train], len(names), strength)
            uniform_codelength = len(train) * math.log2(len(names))
            whole = prepared
        found["correct"].append(
            _fit(prepared[train], classes[train], strength).predict(prepared[test]) == classes[test]
        )
        found["majority"].append((classes[test] == np.bincount(classes[train]).argmax()).mean())
    correct = torch.from_numpy(np.concatenate(found["correct"])).double()
    clusters = torch.from_numpy(np.concatenate([members[test] for _, _, test in parts]))
    accuracies = [float(of_seed.mean()) for of_seed in found["correct"]]
    accuracy = float(np.mean(accuracies))
    control = _control_accuracy(whole, classes, members) if groups is not None else None
    return ProbeResult(
        accuracy=accuracy,
        interval=bootstrap_interval(correct, clusters),
        accuracies=accuracies,
        strength=first_strength,
        dev_bits=dev_bits,
        majority=float(np.mean(found["majority"])),
        dimension=whole.shape[1],
        control_accuracy=control,
        selectivity=None if control is None else accuracy - control,
        codelength=codelength,
        uniform_codelength=uniform_codelength,
        correct=correct,
        clusters=clusters,
    )


def difference(first: ProbeResult, second: ProbeResult) -> tuple[float, tuple[float, float]]:
    """By how much the first is more accurate on the same examples, with the interval (95 %, bootstrap).

    Raises:
        ValueError: probes of other examples.
    """
    if not torch.equal(first.clusters, second.clusters):
        raise ValueError("first and second were tested on different examples; give both the same groups and splits.")
    gain = first.correct - second.correct
    return gain.mean().item(), bootstrap_interval(gain, first.clusters)


def is_encoded(row: ProbeResult, bag_of_words: ProbeResult, random_models: Sequence[ProbeResult]) -> bool:
    """Whether a row says more than the words do and than random weights do, each by more than the interval.

    False if the test examples are of fewer than `FEWEST_GROUPS` groups, whose interval shows nothing.
    """
    enough = row.test_groups >= FEWEST_GROUPS
    return enough and all(difference(row, other)[1][0] > 0 for other in (bag_of_words, *random_models))


def _require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("scikit-learn is not installed, and probes need it: pip install scikit-learn") from error


def _members(groups: Sequence[Any] | None, count: int) -> np.ndarray:
    """[S], the number of each example's group."""
    if groups is None:
        return np.arange(count)
    names, members, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if (single := names[sizes == 1]).size:
        raise ValueError(
            f"groups={single[0].item()!r} has a single member, and so do {len(single) - 1} others: a control task needs"
            " one to train on and one to test on; leave such examples out or give them a group in common."
        )
    return members


def _check_splits(splits: np.ndarray, classes: np.ndarray) -> None:
    for name in np.unique(splits):
        if name not in SPLITS:
            raise ValueError(f"splits={name.item()!r} is unknown; give one of {', '.join(SPLITS)} for each example.")
    for name in SPLITS:
        if not (splits == name).any():
            raise ValueError(f"splits: no example is in {name!r}; put some there, or leave splits out to draw them.")
    if len(np.unique(classes[splits == "train"])) < 2:
        raise ValueError("splits: train has labels of one class only; put examples of two or more there.")


def _parts(
    members: np.ndarray, splits: Sequence[str] | None, classes: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, dev and test."""
    generator = np.random.default_rng(seed)
    if splits is not None:
        train, dev, test = (np.flatnonzero(np.asarray(splits) == name) for name in SPLITS)
        kept = generator.permutation(train)[: max(2, round(KEPT * len(train)))]
        return (kept if len(np.unique(classes[kept])) > 1 else train), dev, test
    order = generator.permutation(members.max() + 1)
    bounds = np.cumsum([round(part * len(order)) for part in DRAWN[:2]])
    train, dev, test = (np.flatnonzero(np.isin(members, some)) for some in np.split(order, bounds))
    if not len(dev) or not len(test) or len(np.unique(classes[train])) < 2:
        raise ValueError(
            f"groups: {len(order)} are too few to draw train, dev and test of; give more, or name the splits."
        )
    return generator.permutation(train), dev, test


def _prepare(table: Any, train: np.ndarray, dimension: int | None) -> Any:
    """Features [S, F] standardised by train's, and turned into its principal components where that leaves fewer.

    Counts of words, which are sparse, are divided by one scale, by which they have the same variance in all: a
    scale for each would make the rarest words the longest axes, and principal components of little else.

    All components of more features than examples change no probe: its penalty is that of a length, and what no example
    of train has keeps a weight of 0. What labels are given, and in which order, plays no part.

    Args:
        table: [S, F]
        train: bool or indices.
        dimension: principal components; None = as many as there are.
    """
    from sklearn.preprocessing import StandardScaler

    if not isinstance(table, np.ndarray):
        occurring = table[train].count_nonzero(axis=0) > 0
        variances = StandardScaler(with_mean=False).fit(table[train]).var_
        if not variances[occurring].any():  # as where all texts have the same words, in other orders
            return np.zeros((table.shape[0], 1), dtype=np.float32)
        table = table / np.sqrt(variances[occurring].mean(), dtype=np.float32)
        if dimension is None or dimension >= min(table.shape):
            return table  # the intercept has no penalty, so that a mean left in changes nothing but the intercept
        table = table[:, occurring].toarray()
        scaled = table - table[train].mean(axis=0)
    else:
        scaled = StandardScaler().fit(table[train]).transform(table)
    if not scaled[train].any():  # as the content lambda of a new model, whose gain is 0
        return np.zeros((len(scaled), 1), dtype=np.float32)
    examples, features = scaled[train].shape
    components = min(dimension or features, examples, features)
    return scaled if components == features else scaled @ _principal_axes(scaled[train], components)


def _principal_axes(scaled: np.ndarray, components: int) -> np.ndarray:
    """Directions [F, C] of the largest variance of centred rows [S, F], by the smaller of their two square products."""
    from scipy.linalg import eigh

    rows = scaled.astype(np.float64)
    is_wide = rows.shape[1] > rows.shape[0]
    square = rows @ rows.T if is_wide else rows.T @ rows
    size = len(square)
    values, vectors = eigh(square, subset_by_index=(size - components, size - 1))
    vectors = vectors[:, values > EMPTY * values[-1]]
    axes = rows.T @ vectors if is_wide else vectors
    return (axes / np.linalg.norm(axes, axis=0)).astype(scaled.dtype)


def _fit(table: Any, classes: np.ndarray, strength: float, start: Any = None) -> Any:
    """A logistic regression, fitted to [S, F] and two classes or more [S].

    Args:
        start: a regression of the same classes that is fitted on, which saves most of the steps.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted = start or LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    fitted.set_params(C=strength)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at weak penalties, the rest would change no prediction
        return fitted.fit(table, classes)


def _bits(fitted: Any, table: Any, classes: np.ndarray, count: int) -> float:
    """Codelength of the classes [S], of `count`, by a probe's probabilities for [S, F]."""
    probabilities = np.full((len(classes), count), UNIFORM / count)
    probabilities[:, fitted.classes_] += (1 - UNIFORM) * fitted.predict_proba(table)
    return float(-np.log2(probabilities[np.arange(len(classes)), classes]).sum())


def _best_strength(train: Any, train_classes: np.ndarray, dev: Any, dev_classes: np.ndarray) -> tuple[float, float]:
    """The strength with the fewest bits for dev, and these; accuracy would not tell a good code from a lucky one."""
    count = max(train_classes.max(), dev_classes.max()) + 1
    fitted, bits = None, []
    for strength in STRENGTHS:
        fitted = _fit(train, train_classes, strength, fitted)
        bits.append(_bits(fitted, dev, dev_classes, count))
    best = int(np.argmin(bits))
    return STRENGTHS[best], bits[best]


def _control_accuracy(table: Any, classes: np.ndarray, members: np.ndarray) -> float:
    """Accuracy where each group has a random label, drawn from those of the task; mean over seeds.

    The members of a group stand in a random order, of which the second of every five is for test and the third for dev:
    what is right on test was learnt from other members of the same group.
    """
    accuracies = []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        of_groups = generator.choice(classes, members.max() + 1)
        while len(np.unique(of_groups)) < 2:
            of_groups = generator.choice(classes, members.max() + 1)
        order = generator.permutation(len(members))
        order = order[np.argsort(members[order], kind="stable")]
        ranks = np.arange(len(order)) - np.searchsorted(members[order], members[order])
        test, dev = order[ranks % 5 == 1], order[ranks % 5 == 2]
        train = order[(ranks % 5 != 1) & (ranks % 5 != 2)]
        control = of_groups[members]
        if seed == 0:  # groups of two leave nothing for dev
            chosen_on = dev if len(dev) else train
            strength, _ = _best_strength(table[train], control[train], table[chosen_on], control[chosen_on])
        accuracies.append(_fit(table[train], control[train], strength).score(table[test], control[test]))
    return float(np.mean(accuracies))


def _codelength(table: Any, classes: np.ndarray, count: int, strength: float) -> float:
    """Bits for the classes [S], given [S, F]: each portion by a probe of the portions before, the first uniformly."""
    bounds = np.unique([math.ceil(portion * len(classes)) for portion in PORTIONS])
    bits = bounds[0] * math.log2(count)
    fitted = None
    for known, end in zip(bounds, bounds[1:]):
        seen = np.unique(classes[:known])
        if len(seen) > 1:
            is_same = fitted is not None and np.array_equal(fitted.classes_, seen)
            fitted = _fit(table[:known], classes[:known], strength, fitted if is_same else None)
            bits += _bits(fitted, table[known:end], classes[known:end], count)
        else:
            bits += (end - known) * math.log2(count)
    return float(bits)
