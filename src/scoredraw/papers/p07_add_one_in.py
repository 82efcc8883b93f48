"""Add-One-In: a set grown by asking which of a few candidates adds most (arXiv:2503.02359).

*Digits.* 1,200 of the 8x8 digits are the pool, a quarter of their labels drawn anew; the rest is
the test set. A subset of 150 is chosen, ten of them at random, and a logistic regression trained on
it. In place of a language model, the chooser weighs the quality of an example (the probability that
models which have not seen it give to its label) and its distance to the examples shown. The longest
response, one of the paper's baselines, means nothing for images of one size. Full scale: the same
with more of the pool kept, up to most of it, against training on all.

*Requests* (study): a small language model reads requests to a voice assistant and is asked for a
letter; does it choose the text or the letter? See `letter_choices`.

Everything is paired by seed: the arms of a seed share the pool, the wrong labels and the qualities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoredraw.data_selection.add_one_in import QualityDiversity, UtilityChooser, label_quality
from scoredraw.data_selection.representatives import facility_location, k_center
from scoredraw.draws import Draw
from scoredraw.metrics import Estimate, mean_interval, paired_difference
from scoredraw.papers import letter_choices, real_trials
from scoredraw.reports import Cell, Claim, Figure, Report, ReportTable, Series
from scoredraw.sampling import top_k, uniform
from scoredraw.set_selection import Choice, Chooser, add_one_in

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

POOL, WRONG, KEPT, SEEDED = 1200, 0.25, 150, 10
BOTH = "both, 10 of 10"
QUALITY = "quality only, 10 candidates"
DIVERSITY = "diversity only"
MANY = "both, 26 candidates"
NEAREST = "both, nearest 10 shown"
WIDE = "both, 50 shown, 26 candidates"
BIASED = "both, first letter half of the time"
HALF = "random of the better half"
COVER = "facility location of the better half"
MAIN = ("random", "top by quality", HALF, QUALITY, BOTH)


@dataclass(frozen=True)
class Scale:
    """How much is run. shares: of the pool that is kept, in the sweep; picks: to test the laws."""

    seeds: int
    shares: tuple[float, ...] = ()
    picks: int = 2000
    study: letter_choices.Scale | None = None


SHARES = (0.05, 0.18, 0.3, 0.5, 0.7)
SCALES = {
    "smoke": Scale(2, (0.18,), 200),
    "quick": Scale(12, (0.18, 0.5, 0.7)),
    "full": Scale(30, SHARES),
    "study": Scale(60, SHARES, 5000, letter_choices.Scale()),
}


def run(scale: str = "quick", rng: int = 0) -> Report:
    """Rerun the paper's experiments; the clock and the machine are added by `reports`."""
    settings = SCALES[scale]
    worlds = [World.draw(rng, s) for s in range(settings.seeds)]
    accuracy, clean = measure(worlds, list(ARMS))
    full = np.array([world.accuracy(np.arange(POOL)) for world in worlds])
    report = Report(
        paper=7,
        scale=scale,
        seed=rng,
        claims=digit_claims(accuracy, clean),
        tables=[digits_table("Digits", accuracy, clean, full)],
        figures=[digits_figure(accuracy)],
        notes=notes(accuracy),
        title="Add-One-In",
    )
    again = measure([world.sharper() for world in worlds], (*MAIN, COVER))
    add_scorer(report, *again)
    sweep = {s: measure(worlds, MAIN, round(s * POOL))[0] for s in settings.shares}
    add_sweep(report, sweep, full)
    add_laws(report, settings.picks, rng)
    real_trials.add_to(
        report, {"Add-One-In": "add-one-in"}, "its subsets beat random ones and the full data"
    )
    if settings.study is not None:
        letter_choices.add_to(report, settings.study, rng)
    return report


# ── Digits with wrong labels ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class World:
    """One seed's pool, labels as given and as they are, qualities, and the digits to test on."""

    x: Floats
    given: Rows
    true: Rows
    quality: Floats
    test_x: Floats
    test_y: Rows
    seed: int

    @classmethod
    def draw(cls, rng: int, member: int) -> World:
        from sklearn.datasets import load_digits

        pixels, y = load_digits(return_X_y=True)
        own = seed(rng, 0, member)
        random = np.random.default_rng(own)
        order = random.permutation(len(y))
        pool, test = order[:POOL], order[POOL:]
        x, true = pixels[pool] / 16, y[pool].astype(np.int64)
        given = np.where(random.random(POOL) < WRONG, random.integers(0, 10, POOL), true)
        quality = label_quality(x, given, standardise=False, rng=own)
        return cls(x, given, true, quality, pixels[test] / 16, y[test].astype(np.int64), own)

    def sharper(self) -> World:
        """The same with a better scorer: on standardised pixels, less shrunk and so surer."""
        return replace(self, quality=label_quality(self.x, self.given, rng=self.seed))

    def accuracy(self, rows: Rows) -> float:
        """Of a logistic regression that was trained on these rows, labels as given."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(max_iter=1000).fit(self.x[rows], self.given[rows])
        return float(model.score(self.test_x, self.test_y))

    def clean_share(self, rows: Rows) -> float:
        return float((self.given[rows] == self.true[rows]).mean())

    def better(self, size: int) -> Rows:
        """The half of higher quality, or as many as are wanted."""
        return top_k(self.quality, max(POOL // 2, size), rng=self.seed).indices

    def grow(self, size: int, balance: float, a: int = 10, b: int = 10, **options: Any) -> Rows:
        """A set grown by the utility; `wrap` makes another chooser of it."""
        utility = UtilityChooser(QualityDiversity(self.quality, self.x, balance))
        chooser = options.pop("wrap", lambda same, _: same)(utility, self.seed)
        log = add_one_in(
            POOL, size, chooser, context_window=a, candidate_window=b,
            n_seed=SEEDED, vectors=self.x, rng=self.seed, **options,
        )  # fmt: skip
        return log.indices


Arm = Callable[[World, int], Rows]


def grown(balance: float, a: int = 10, b: int = 10, **options: Any) -> Arm:
    return lambda world, size: world.grow(size, balance, a, b, **options)


def covering(draw: Callable[..., Draw], of_better: bool = False) -> Arm:
    """A baseline that covers the pool, or the half of higher quality."""

    def choose(world: World, size: int) -> Rows:
        rows = world.better(size) if of_better else np.arange(POOL)
        return rows[draw(world.x[rows], size, rng=world.seed).indices]

    return choose


def any_of(x: Floats, size: int, *, rng: int) -> Draw:
    return uniform(len(x), size, rng=rng)


def half_biased(chooser: UtilityChooser, seed: int) -> Chooser:
    """Names the first letter with probability one half, and the best otherwise."""
    random = np.random.default_rng([seed, 1])

    def choose(context: Any, candidates: Any) -> Choice:
        return Choice(0) if random.random() < 0.5 else chooser(context, candidates)

    return choose


ARMS: dict[str, Arm] = {
    "random": covering(any_of),
    "top by quality": lambda world, size: top_k(world.quality, size, rng=world.seed).indices,
    HALF: covering(any_of, of_better=True),
    "k-center": covering(k_center),
    "facility location": covering(facility_location),
    COVER: covering(facility_location, of_better=True),
    QUALITY: grown(0.0),
    DIVERSITY: grown(1.0),
    BOTH: grown(0.5),
    "both, 20 shown": grown(0.5, a=20),
    "both, 4 candidates": grown(0.5, b=4),
    MANY: grown(0.5, b=26),
    WIDE: grown(0.5, a=50, b=26),
    NEAREST: grown(0.5, context="nearest"),
    BIASED: grown(0.5, wrap=half_biased),
}


def measure(
    worlds: list[World], names: Sequence[str], size: int = KEPT
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """{arm: (seeds,)} accuracies, and shares of right labels, of what each arm keeps."""
    kept = {arm: [ARMS[arm](world, size) for world in worlds] for arm in names}
    pairs = {arm: list(zip(worlds, rows, strict=True)) for arm, rows in kept.items()}
    accuracy = {arm: np.array([w.accuracy(rows) for w, rows in p]) for arm, p in pairs.items()}
    clean = {arm: np.array([w.clean_share(rows) for w, rows in p]) for arm, p in pairs.items()}
    return accuracy, clean


def seed(*parts: int) -> int:
    """An independent 63-bit seed for each purpose and member."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ── What the paper claims ────────────────────────────────────────────────────────────────────────


def digit_claims(accuracy: dict[str, Floats], clean: dict[str, Floats]) -> list[Claim]:
    """What 150 of 1,200 digits, a quarter of them wrongly labelled, have to say."""
    where = f"{KEPT} of {POOL:,} digits, a quarter of the labels drawn anew"

    def gap(a: str, b: str) -> Estimate:
        return paired_difference(accuracy[a], accuracy[b])

    def at_least(name: str, says: str, a: str, b: str, bound: float) -> Claim:
        rule = f"accuracy difference, paired by seed, at least {bound:g}"
        return Claim.at_least(f"{name} ({where})", says, gap(a, b), bound, rule)

    best = max(
        (arm for arm in ("k-center", "facility location")), key=lambda arm: accuracy[arm].mean()
    )
    alone = "a chooser has to weigh quality and what a sample adds"
    return [
        at_least(
            "quality and diversity beat a random subset",
            "choices beat random subsets and the whole of Alpaca", BOTH, "random", 0.03,
        ),
        at_least(
            "they beat the best by a score of single examples",
            "beats AlpacaGasus-style per-sample scores", BOTH, "top by quality", 0.02,
        ),
        Claim.at_most(
            f"diversity alone is no better than random ({where})", alone,
            gap(DIVERSITY, "random"), 0.01,
            "accuracy difference, paired by seed, at most 0.01",
        ),
        at_least("quality alone is worse than both", alone, BOTH, QUALITY, 0.0),
        at_least(
            f"they beat coverage of the pool ({best})",
            "competitive with the state of the art", BOTH, best, 0.0,
        ),
        at_least(
            "they beat a random draw from the better half",
            "competitive with the state of the art", BOTH, HALF, 0.0,
        ),
        at_least("50 shown and 26 candidates are worse than 10 and 10", "-", BOTH, WIDE, 0.0),
        at_least("26 candidates are worse than 10, 10 being shown", "-", BOTH, MANY, 0.0),
        at_least("a preference for a letter costs accuracy", "-", BOTH, BIASED, 0.0),
        at_least("half of a preference still beats random", "-", BIASED, "random", 0.0),
        Claim.at_least(
            f"what is chosen is clean ({where})", "-", mean_interval(clean[BOTH]), 0.95,
            "share of right labels at least 0.95",
        ),
    ]  # fmt: skip


def add_scorer(report: Report, accuracy: dict[str, Floats], clean: dict[str, Floats]) -> None:
    """Does it still hold when the baseline of single examples has a better scorer, too?"""
    report.claims.append(
        Claim.at_least(
            "they beat the best by a score of single examples, where the score is sharper",
            "beats AlpacaGasus-style per-sample scores",
            paired_difference(accuracy[BOTH], accuracy["top by quality"]),
            0.02,
            "accuracy difference, paired by seed, at least 0.02",
        )
    )
    title = "Digits, with a sharper scorer (pixels standardised)"
    report.tables.append(digits_table(title, accuracy, clean))


def add_sweep(report: Report, sweep: dict[float, dict[str, Floats]], full: Floats) -> None:
    """More of the pool kept, against training on all of it."""
    alpaca = "9k of 52k Alpaca samples beat all of them"
    medical = "on HuatuoGPT's 226k samples parts gain over all of them"
    for share in (0.18, 0.5, 0.7):
        if share in sweep:
            report.claims.append(
                Claim.at_least(
                    f"{share:.0%} of the pool beat all of it (digits, a quarter of labels redrawn)",
                    alpaca if share == 0.18 else medical,
                    paired_difference(sweep[share][BOTH], full),
                    0.0,
                    "accuracy difference to the whole pool, paired by seed, at least 0",
                )
            )
    shares = list(sweep)
    rows: list[list[Cell]] = [
        [f"{share:.3g}", *(paired_difference(sweep[share][arm], full) for arm in MAIN)]
        for share in shares
    ]
    report.tables.append(
        ReportTable(
            "Digits: accuracy minus that of the whole pool",
            ["share kept", *MAIN],
            rows,
            f"The whole pool, wrong labels and all: {mean_interval(full)}.",
        )
    )
    if len(shares) < 2:
        return
    series = []
    for arm in MAIN:
        points = [mean_interval(sweep[share][arm]) for share in shares]
        series.append(interval_series(arm, shares, points, baseline=arm == "random"))
    report.figures.append(
        Figure(
            "line",
            "Accuracy by how much of the pool is kept",
            "share of the pool",
            "test accuracy",
            series,
            reference=float(full.mean()),
            caption="The level line is the whole pool. Intervals are 95 %.",
        )
    )


def interval_series(
    name: str, x: Sequence[float | str], points: Sequence[Estimate], *, baseline: bool = False
) -> Series:
    values = [[getattr(p, part) for p in points] for part in ("value", "low", "high")]
    return Series(name, list(x), values[0], values[1], values[2], baseline=baseline)


def add_laws(report: Report, picks: int, rng: int) -> None:
    """What must hold whatever the data: the best of b, one answer an item, any pool."""
    n = 200 * picks
    report.claims.append(
        Claim.within(
            "one candidate a window is a random draw",
            "-",
            best_of(1, n, picks, rng),
            0.45,
            0.55,
            "mean rank quantile of the picks from .45 to .55",
        )
    )
    rows: list[list[Cell]] = []
    worst = 0.0
    for b in (1, 4, 10, 26):
        found = best_of(b, n, picks, rng)
        rows.append([b, b / (b + 1), found])
        worst = max(worst, abs(found.value - b / (b + 1)) / (found.half_width or 1.0))
    report.claims.append(
        Claim.judge(
            "the best of b candidates has rank quantile b / (b + 1)",
            "-",
            f"largest deviation {worst:.2f} half widths of the 95 % interval",
            "b of 1, 4, 10, 26: all within two half widths",
            worst <= 2,
        )
    )
    report.tables.append(
        ReportTable(
            f"Picks by quality alone from {n:,}: mean rank quantile",
            ["candidates", "b / (b + 1)", "measured"],
            rows,
        )
    )
    calls = {}
    for size in (1_000, 10_000, 100_000):
        log = add_one_in(size, KEPT, lambda shown, offered: 0, n_seed=SEEDED, rng=rng)
        calls[size] = log.calls
    report.claims.append(
        Claim.judge(
            "the answers asked for do not depend on the size of the pool",
            "cost O(K T_LLM), independent of n",
            ", ".join(f"{count} for {size:,}" for size, count in calls.items()),
            f"{KEPT - SEEDED} for each",
            set(calls.values()) == {KEPT - SEEDED},
        )
    )


def best_of(b: int, n: int, picks: int, rng: int) -> Estimate:
    """The mean rank quantile of picks of the largest of b out of n."""
    best = UtilityChooser(lambda shown, offered: offered)
    log = add_one_in(n, picks + 1, best, candidate_window=b, n_seed=1, rng=seed(rng, 1, b))
    return mean_interval((log.indices[1:] + 0.5) / n)


# ── Tables and figures ───────────────────────────────────────────────────────────────────────────


def digits_table(
    title: str,
    accuracy: dict[str, Floats],
    clean: dict[str, Floats],
    full: Floats | None = None,
) -> ReportTable:
    rows: list[list[Cell]] = []
    if full is not None:
        rows.append(["the whole pool", mean_interval(full), None, None])
    for arm, values in accuracy.items():
        gap = None if arm == "random" else paired_difference(values, accuracy["random"])
        rows.append([arm, mean_interval(values), gap, mean_interval(clean[arm])])
    return ReportTable(
        f"{title}: {KEPT} of {POOL:,} kept, a quarter of the labels drawn anew",
        ["kept", "test accuracy", "minus random", "right labels"],
        rows,
        "Ten of each grown subset are random. Shown and candidates 10 each where nothing is said.",
    )


def digits_figure(accuracy: dict[str, Floats]) -> Figure:
    arms = [arm for arm in accuracy if arm != "random"]
    gaps = [paired_difference(accuracy[arm], accuracy["random"]) for arm in arms]
    return Figure(
        "interval",
        f"Accuracy minus a random subset's: {KEPT} of {POOL:,} digits",
        "accuracy difference",
        "",
        [interval_series("minus random", arms, gaps)],
        reference=0.0,
        caption="Intervals are 95 %, paired by seed.",
    )


def notes(accuracy: dict[str, Floats]) -> list[str]:
    """What was measured, in words."""
    return [
        (
            f"What the two halves are worth: {BOTH} minus quality only is "
            f"{paired_difference(accuracy[BOTH], accuracy[QUALITY])}, minus diversity only "
            f"{paired_difference(accuracy[BOTH], accuracy[DIVERSITY])}. Wrong labels are diverse, "
            "and the surest examples are all alike."
        ),
        (
            "The same two criteria one after the other, a cut at the median quality and then "
            f"facility location, come to {mean_interval(accuracy[COVER])}; {BOTH} minus that is "
            f"{paired_difference(accuracy[BOTH], accuracy[COVER])}. The windows are for judges "
            "that can't be asked about every example."
        ),
        (
            f"What is shown counts: the ten of the set nearest to the candidates are worth "
            f"{paired_difference(accuracy[NEAREST], accuracy[BOTH])} more than ten at random; with "
            f"26 candidates, fifty at random are worth "
            f"{paired_difference(accuracy[WIDE], accuracy[MANY])} more than ten."
        ),
        (
            "Not measured: SelectLLM and Deita's learned scorers, which want a large model, and "
            "the longest response, which means nothing for images of one size."
        ),
    ]
