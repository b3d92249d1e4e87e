"""Do similar rankings give similar pruned networks? From runs that differ in the criterion alone.

Three likenesses of every pair of criteria: of their rankings of the baseline's filters, of the
sets that they have pruned, and of the accuracy that came out. Whether one follows another is a
Mantel test (Cancer Research 27, 1967), as the pairs of a few criteria are not independent: the
correlation over the pairs, its null the names of the criteria permuted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy import stats

from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.report.cells import identity, told_apart
from fpgm.report.collect import Found, changed, collect
from fpgm.report.standings import residual
from fpgm.runs import checkpoint
from fpgm.study.scores import Layer, scored_layers
from fpgm.study.settings import Settings
from fpgm.study.statistics.agreement import Array, in_one_ranking, spearman
from fpgm.study.statistics.tables import Row, mean, number
from fpgm.study.subject import find

LEAST = 4  # criteria that a comparison needs
PERMUTATIONS = 9999
LEVEL = 0.05
Runs = Mapping[str, Mapping[int, Found]]  # criterion with its options -> seed -> run


def compare(directories: Sequence[Path], data: Path | None) -> dict[str, Any]:
    """`criteria` and `pairs`: rows for each, whose `runs` says in words what their runs have in
    common; `lines`: by the same words, what they show. Raises Error."""
    sets: dict[tuple[tuple[str, str], ...], dict[str, dict[int, Found]]] = {}
    for run in collect(directories):
        if run.problem is None and (run.directory / "zeroed.pt").exists():
            common = {k: v for k, v in identity(run).items() if not k.startswith("criterion.")}
            of_set = sets.setdefault(tuple(sorted(common.items())), {})
            of_set.setdefault(_name(run), {})[run.config["seed"]] = run
    enough = {key: runs for key, runs in sets.items() if len(runs) >= LEAST}
    if not enough:
        most = max(map(len, sets.values()), default=0)
        raise Error(
            f"{', '.join(map(str, directories))}: at most {most} criteria in done runs that are "
            f"alike in all else, {LEAST} are needed, as in fpgm-train experiment=criteria"
        )
    criteria: list[Row] = []
    pairs: list[Row] = []
    lines: dict[str, list[str]] = {}
    words = told_apart([dict(key) for key in enough])
    for name, runs in zip(words, enough.values(), strict=True):
        name = name or "all runs"
        notes = _uncounted(runs)
        of_pairs = _pairs(runs, _rankings(runs, data, notes))
        of_criteria = [_criterion(*one) for one in sorted(runs.items())]
        lines[name] = in_words(of_criteria, of_pairs, _spread(runs), notes)
        criteria += [{"runs": name, **row} for row in of_criteria]
        pairs += [{"runs": name, **row} for row in of_pairs]
    return {"criteria": criteria, "pairs": pairs, "lines": lines}


def _uncounted(runs: Runs) -> list[str]:
    """What of the criteria the verdicts leave out."""
    orders = [name for name in sorted(runs) if name not in CRITERIA or CRITERIA[name].places]
    chance = [name for name in sorted(runs) if _by_chance(name)]
    return [
        f"{', '.join(names)} ({why})"
        for names, why in (
            (orders, "no scores of the filters, so in no ranking"),
            (chance, "decided by a seed: shown and not counted"),
        )
        if names
    ]


def _name(run: Found) -> str:
    options = changed("criterion", run.config["criterion"])
    words = (f"{key}={value}" for key, value in options.items() if key != "name")
    return " ".join([run.config["criterion"]["name"], *words])


def _accuracy(run: Found) -> float:
    return float(run.entry("accuracy", "compact_last"))


def _criterion(name: str, by_seed: Mapping[int, Found]) -> Row:
    values = [_accuracy(run) for run in by_seed.values()]
    return {
        "criterion": name, "seeds": len(values), "accuracy": fmean(values),
        "std": stdev(values) if values[1:] else None,
        "macs_removed": fmean(run.entry("reduction", "macs") for run in by_seed.values()),
    }  # fmt: skip


def _spread(runs: Runs) -> float | None:
    """Standard deviation of one run, of what neither criterion nor seed explains; None where each
    criterion has one seed."""
    values = [{seed: _accuracy(run) for seed, run in own.items()} for own in runs.values()]
    std, freedom = residual(values)
    return std if freedom else None


# Likenesses.


def _rankings(runs: Runs, data: Path | None, notes: list[str]) -> dict[int, list[Layer]]:
    """By seed, the baseline's layers with the scores that the criteria give them."""
    found: dict[int, list[Layer]] = {}
    for seed in sorted({seed for own in runs.values() for seed in own}):
        of_seed = {name: own[seed] for name, own in runs.items() if seed in own}
        some = next(iter(of_seed.values()))
        given = str(some.config["pretrained"])
        places = (Path(given), some.directory.parent / Path(given).name)
        place = next((p for p in places if (p / "zeroed.pt").exists()), None)
        names = [n for n in of_seed if n in CRITERIA and not CRITERIA[n].places]
        if place is None or len(names) < 2:
            notes.append(f"the rankings of seed {seed} (no baseline {given} that is done)")
            continue
        subject = find(place, None, None, data, None, seed, True)
        settings = Settings(criteria=tuple(names), seed=seed, resamples=1)
        found[seed], _, _ = scored_layers(subject, settings, notes)
    return found


def _pairs(runs: Runs, rankings: Mapping[int, Sequence[Layer]]) -> list[Row]:
    keeps = {
        name: {seed: checkpoint.read(run.directory / "zeroed.pt", ["keep"])["keep"]
               for seed, run in own.items()}
        for name, own in runs.items()
    }  # fmt: skip
    rows = []
    for a, b in combinations(sorted(runs), 2):
        seeds = sorted(runs[a].keys() & runs[b].keys())
        gone = [shared(keeps[a][s], keeps[b][s], _widths(runs[a][s])) for s in seeds]
        differences = [_accuracy(runs[a][s]) - _accuracy(runs[b][s]) for s in seeds]
        alike = [_alike(rankings.get(s, ()), a, b, runs[a][s], keeps[a][s]) for s in seeds]
        rows.append(
            {
                "a": a, "b": b, "seeds": len(seeds), "spearman": mean(alike),
                "jaccard": mean(one for one, _ in gone),
                "jaccard_null": mean(chance for _, chance in gone),
                "difference": mean(differences),
                "std": stdev(differences) if differences[1:] else None,
            }
        )  # fmt: skip
    return rows


def _widths(run: Found) -> dict[str, int]:
    return {row["name"]: row["filters"] for row in run.entry("layers")}


def shared(a: Mapping[str, Any], b: Mapping[str, Any], widths: Mapping[str, int]) -> Any:
    """Jaccard overlap of what two runs have pruned, over all layers, and what it is on average for
    sets of the same sizes drawn by chance in each layer; nan where nothing is pruned. a, b: layer
    -> indices that stay, none for layers that stay whole."""
    both, sizes, chance = 0, 0, 0.0
    for layer, width in widths.items():
        gone = [set(range(width)) - set(map(int, keep.get(layer, range(width)))) for keep in (a, b)]
        both += len(gone[0] & gone[1])
        sizes += len(gone[0]) + len(gone[1])
        chance += len(gone[0]) * len(gone[1]) / width
    return (both / (sizes - both), chance / (sizes - chance)) if sizes else (None, None)


def _alike(
    layers: Sequence[Layer], a: str, b: str, run: Found, keep: Mapping[str, Any]
) -> float | None:
    """Spearman of two criteria's scores: the mean of the layers that are pruned, or in one ranking
    where the runs had one."""
    scored = [one for one in layers if one.name in keep and {a, b} <= one.scores.keys()]
    if not scored:
        return None
    if run.config["scope"] == "global":
        together = in_one_ranking([one.matrix([a, b]) for one in scored], run.config["scope_norm"])
        return number(spearman(together)[0, 1])
    return mean(number(spearman(one.matrix([a, b]))[0, 1]) for one in scored)


def mantel(a: Array, b: Array, seed: int = 0) -> tuple[float, float]:
    """Spearman's correlation of two likenesses (K, K), symmetric, over the pairs of K items, and
    the share of permuted names that give one as large in the same direction (two-sided)."""
    over = np.triu_indices(len(a), 1)
    generator = np.random.default_rng(seed)
    orders = [np.arange(len(a)), *(generator.permutation(len(a)) for _ in range(PERMUTATIONS))]
    rows = np.stack([b[np.ix_(order, order)][over] for order in orders])
    ranks = stats.rankdata(np.vstack((a[over], rows)), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    rho = ranks[1:] @ ranks[0] / np.sqrt((ranks[1:] ** 2).sum(1) * (ranks[0] ** 2).sum())
    p = (np.abs(rho) >= abs(rho[0]) - 1e-12).mean()
    return float(rho[0]), float(p)


# In words.


def follows(pairs: Sequence[Row], one: str, other: str) -> tuple[float, float, int] | None:
    """Whether a likeness follows another: correlation, p and the criteria that it is over; those
    that lack one of the two, or that a seed decides, are left out. None for fewer than LEAST, where
    all pairs are equally alike, or where some pair has no figures."""
    names = {n for row in pairs for n in (row["a"], row["b"]) if not _by_chance(n)}
    defined = [r for r in pairs if {r["a"], r["b"]} <= names and None not in (r[one], r[other])]
    have = {name: sum(name in (r["a"], r["b"]) for r in defined) for name in names}
    kept = sorted(name for name in names if have[name] == max(have.values()) > 0)
    place = {name: i for i, name in enumerate(kept)}
    a, b = (np.zeros((len(kept), len(kept))) for _ in range(2))
    for row in defined:
        if row["a"] in place and row["b"] in place:
            i, j = place[row["a"]], place[row["b"]]
            a[i, j] = a[j, i] = row[one]
            b[i, j] = b[j, i] = abs(row[other])
    over = np.triu_indices(len(kept), 1)
    complete = all(have[name] == len(kept) - 1 for name in kept)
    differ = complete and len(kept) >= LEAST and np.ptp(a[over]) > 0 and np.ptp(b[over]) > 0
    return (*mantel(a, b), len(kept)) if differ else None


def _by_chance(name: str) -> bool:
    return name in CRITERIA and "seed" in CRITERIA[name].given


def in_words(
    criteria: Sequence[Row], pairs: Sequence[Row], spread: float | None, notes: Sequence[str]
) -> list[str]:
    """The answer. spread: of one run, see `_spread`."""
    rows = [row for row in pairs if row["jaccard"] is not None]
    rows = [row for row in rows if not (_by_chance(row["a"]) or _by_chance(row["b"]))]
    rows.sort(key=lambda row: -row["jaccard"])
    third = max(len(rows) // 3, 1)
    ends = []
    for part, some in (("most", rows[:third]), ("least", rows[-third:])):
        overlap, apart = (mean(abs(r[k]) for r in some) or 0 for k in ("jaccard", "difference"))
        ends.append(f"the {third} pairs that overlap {part} ({overlap:.2f}) by {apart:.2f} points")
    best, worst = (f(criteria, key=lambda row: row["accuracy"]) for f in (max, min))
    seeds = max(row["seeds"] for row in criteria)
    chance = mean(row["jaccard_null"] for row in rows)
    return [
        f"{len(criteria)} criteria, {seeds} seed{'s' if seeds > 1 else ''}: "
        f"{best['criterion']} ends highest, {best['accuracy']:.2f} %, {worst['criterion']} lowest, "
        f"{worst['accuracy']:.2f} %, "
        + (
            "and no spread is known: one seed."
            if spread is None
            else f"one run's spread is {spread:.2f}."
        ),
        "Do similar rankings prune similar filters? "
        + _verdict(follows(pairs, "spearman", "jaccard"), "Spearman and Jaccard overlap", 1)
        + (f" (Overlap by chance: {chance:.2f}.)" if chance is not None else ""),
        "Do similar sets of pruned filters end at similar accuracy? "
        + _verdict(follows(pairs, "jaccard", "difference"), "overlap and |difference|", -1)
        + f" They differ: {', '.join(ends)}.",
        "And do similar rankings? "
        + _verdict(follows(pairs, "spearman", "difference"), "Spearman and |difference|", -1),
        "Left out: " + ("; ".join(dict.fromkeys(notes)) or "nothing") + ".",
    ]


def _verdict(found: tuple[float, float, int] | None, what: str, sign: int) -> str:
    if found is None:
        return f"Unknown: it takes {LEAST} criteria that have both figures, and pairs that differ."
    rho, p, count = found
    answer = "Cannot be told" if p >= LEVEL else "Yes" if rho * sign > 0 else "No, the reverse"
    return f"{answer}: {what} of {count} criteria's pairs correlate by {rho:+.2f} (p {p:.2g})."
