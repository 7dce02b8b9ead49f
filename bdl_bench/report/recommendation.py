"""The recommendation at the head of a report: which method, and why, by rules that this module states.

1. A method is a candidate if no test finds it worse than the method with the best mean over the tasks.
2. If some methods are significantly better than the baseline, only they are candidates; if none is, the baseline is
   kept.
3. Of the candidates, the cheapest is recommended, by its time to fit, tune and predict.
4. If that one has no epistemic variance, another candidate by rule 1 that has one is named, too: the nearest to the
   posterior where that was sampled, and the cheapest otherwise. If the nearest takes more than ten times as long as the
   cheapest one, the nearest of those that do not is named beside it.

The sampled posterior is a reference, not a method to use: the rules leave it out, and only "Predicts best" names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bdl_bench.methods import BASELINE, POSTERIOR
from bdl_bench.report.formatting import join_names, mean_and_half_width, mean_of, number
from bdl_bench.report.overall import Overall
from bdl_bench.stats import FEWEST_SEEDS, Interval, Verdict, detectable_difference
from estimators.runtime.units import in_seconds

__all__ = ["Answer", "Evidence", "Recommendation", "recommendation"]

_MORE_SEEDS = 10
"""Seeds that are advised at least, to find smaller differences."""
_MOST_TASKS = 3
"""Tasks that are named beside a method that misses them."""
_QUICK = 10
"""Multiple of the time of the cheapest method up to which another one is quick."""
_NOT_BETTER: dict[Verdict, str] = {
    "no relevant difference": "is too small to be relevant",
    "no significant difference": "is not significant",
    "unknown": "was not tested",
}
"""What is said of a better mean whose verdict is not "better"."""


@dataclass(frozen=True)
class Evidence:
    """What the recommendation rests on, beside the tests.

    Args:
        seconds: time to fit, tune and predict by method, summed over the tasks.
        with_variance: methods with an epistemic variance that is not zero.
        posterior_ranks: mean rank by the distance from the posterior at the test rows; empty if it was not sampled.
        posterior_tasks: names of the tasks whose posterior was sampled.
        exclusive: whether no other job ran at the time of any run.
    """

    seconds: Mapping[str, float]
    with_variance: Collection[str]
    posterior_ranks: Mapping[str, float]
    posterior_tasks: Collection[str]
    exclusive: bool = True


@dataclass(frozen=True)
class Answer:
    """An answer to one question of a reader."""

    question: str
    text: str


@dataclass(frozen=True)
class Recommendation:
    """The recommended method (None if nothing can be said), a headline, its reason, and three answers."""

    method: str | None
    headline: str
    reason: str
    answers: list[Answer]


def recommendation(found: Overall, evidence: Evidence) -> Recommendation:
    """Return the recommendation by the rules of this module.

    Args:
        found: the comparison over all tasks.
        evidence: times, variances and distances from the posterior.

    Returns:
        The recommendation, whose sentences have the numbers that it follows from.
    """
    usable = found.without(POSTERIOR)
    answers = [_predicts_best(found), _nearest(evidence), _cost(usable, evidence)]
    if found.n_seeds < FEWEST_SEEDS:
        of = f" of {join_names(found.fewest_seeds)}" if found.fewest_seeds else ""
        reason = (
            f"{found.n_seeds} distinct seed{'' if found.n_seeds == 1 else 's'}{of} cannot be tested. Best "
            f"{_metric(found)}: {usable.best}; the order of the methods may be chance. {_for_more_seeds(found)}"
        )
        return Recommendation(None, "No recommendation yet.", reason, answers)
    method, headline, reason = _choice(usable, evidence)
    reason += f"{_with_variance(usable, evidence, method)}{_left_out(found)}"
    return Recommendation(method, headline, reason, answers)


def _choice(found: Overall, evidence: Evidence) -> tuple[str, str, str]:
    candidates = found.not_worse_than_best
    better = [m for m in candidates if found.tests.with_baseline.get(m) == "better"]
    if found.baseline is not None and not better:
        about = f" {BASELINE} is the trained network as it is." if found.baseline == BASELINE else ""
        return found.baseline, f"Keep {found.baseline}.", f"{_keep(found)}{about}"
    chosen = _cheapest(better or candidates, evidence)
    gain = f"The methods are compared by {_metric(found)}. "
    if found.baseline is not None:
        gain = f"Its {_metric(found)} is {_gain(found, found.tests.baseline_differences[chosen])}. "
    others = [m for m in better or candidates if m != chosen]
    if others:
        which = " and significantly better than the baseline" if better else ""
        why = (
            f"It is the cheapest of the {len(others) + 1} methods that are not significantly worse than the best{which}"
        )
        return chosen, f"Use {chosen}.", f"{gain}{why} (the others: {join_names(others)})."
    if len(found.means) == 1:
        return chosen, f"Use {chosen}.", "No other method was compared."
    alone = "It has the best mean" if chosen == found.best else "No tested method is significantly better"
    rest = f"; {_all_others(found)} are significantly worse" if candidates == [chosen] else ""
    return chosen, f"Use {chosen}.", f"{gain}{alone}{rest}."


def _all_others(found: Overall) -> str:
    return "all other methods that finished every seed" if found.left_out else "all others"


def _left_out(found: Overall) -> str:
    """Return which methods the rules leave out."""
    text = f" {POSTERIOR} is a reference and is left out." if POSTERIOR in found.means else ""
    missing = [m for m in found.left_out if m != POSTERIOR]
    if missing:
        named = [_with_tasks(m, found.missing_tasks.get(m, ())) for m in missing]
        text += f" Left out, because of missing tasks or seeds, or values that are not finite: {join_names(named)}."
    return text


def _with_tasks(method: str, tasks: Sequence[str]) -> str:
    return f"{method} ({join_names(tasks, most=_MOST_TASKS)})" if tasks else method


def _keep(found: Overall) -> str:
    """Return why the baseline is kept: nothing is shown to be better, and what could have been found."""
    against = found.tests.baseline_differences
    if not against:
        return "No other method was compared."
    tested = [d for d in against.values() if d.p_value is not None]
    if found.best == found.baseline:
        head = f"No method has a better {_metric(found)}."
    else:
        verdict = found.tests.with_baseline[found.best]
        corrected = verdict == "no significant difference" and len(tested) > 1
        how = _NOT_BETTER[verdict] + (f" after the correction for {len(tested)} tests" if corrected else "")
        head = f"No method is shown to predict better: the best {_metric(found)}, of {found.best}, is "
        head += f"{_gain(found, against[found.best])}, which {how}."
    needed = [v for d in tested if (v := detectable_difference(d, n_comparisons=len(tested))) is not None]
    if not needed or median(needed) < found.smallest_relevant:
        return head
    return (
        f"{head} These {found.n_seeds} seeds detect a difference in {_metric(found)} of about "
        f"{number(median(needed))}{found.unit}; more seeds (--seeds {max(_MORE_SEEDS, 2 * found.n_seeds)}) find "
        "smaller ones."
    )


def _for_more_seeds(found: Overall) -> str:
    """Return what to do about too few distinct seeds."""
    if found.has_copies:
        return "Seeds with identical predictions count as one: check whether the problem uses its seed."
    return "Run again with --seeds 5 or more."


def _with_variance(found: Overall, evidence: Evidence, chosen: str) -> str:
    able = [m for m in found.not_worse_than_best if m in evidence.with_variance]
    if chosen in evidence.with_variance or not able:
        return ""
    need = f" If you need an epistemic variance, which {chosen} does not have"
    ranked = [m for m in able if m in evidence.posterior_ranks and m in evidence.seconds]
    if ranked:
        return f"{need}: {_nearest_of(ranked, evidence)}."
    other = _cheapest(able, evidence)
    how = "with the best mean" if other == found.best else "not significantly worse than the best"
    return f"{need}: {other}, {how}."


def _nearest_of(methods: Sequence[str], evidence: Evidence) -> str:
    """Return the nearest to the posterior with its time, and the nearest quick one if that is another."""
    ranks, seconds = evidence.posterior_ranks, evidence.seconds
    limit = _QUICK * min(seconds[m] for m in methods)
    ordered = sorted(methods, key=lambda m: (ranks[m], seconds[m]))  # of equally near ones the cheapest
    nearest, quick = ordered[0], next(m for m in ordered if seconds[m] <= limit)
    text = f"{nearest} is the nearest to the posterior of the methods that are not significantly worse than the best"
    if quick == nearest:
        return text
    times = in_seconds(seconds[nearest]), in_seconds(seconds[quick])
    within = f"that take at most {_QUICK} times as long as the cheapest of them"
    return f"{text} ({times[0]}); {quick} ({times[1]}) is the nearest of those {within}"


def _cheapest(methods: Collection[str], evidence: Evidence) -> str:
    return min(methods, key=lambda m: evidence.seconds.get(m, float("inf")))


def _predicts_best(found: Overall) -> Answer:
    rest = [m for m in found.not_worse_than_best if m != found.best]
    about = " (a reference, not a method to use)" if found.best == POSTERIOR else ""
    head = f"{found.best}{about}: {_metric(found)} {number(found.means[found.best])}"
    if found.baseline is not None and found.best != found.baseline:
        head += f", {_gain(found, found.tests.baseline_differences[found.best])}"
    if found.n_seeds < FEWEST_SEEDS:
        tail = "Not tested."
    elif len(rest) == len(found.means) - 1:
        none = "No other method is significantly worse than it."
        tail = none if _all_tested(found) else "Some pairs could not be tested."
    else:
        worse = f"{_all_others(found).capitalize()} are significantly worse."
        tail = f"Not significantly worse than it: {join_names(rest)}." if rest else worse
    return Answer("Predicts best", f"{head}. {tail}")


def _all_tested(found: Overall) -> bool:
    return all(verdict != "unknown" for verdict in found.tests.pairs.values())


def _nearest(evidence: Evidence) -> Answer:
    ranks = evidence.posterior_ranks
    question = "Nearest to the posterior"
    if not ranks:
        text = "not measured. For small networks, add reference-posterior to --methods."
        return Answer(question, text)
    first = min(ranks.values())
    nearest = [m for m, rank in ranks.items() if rank == first]
    where = f"{len(evidence.posterior_tasks)} task{'' if len(evidence.posterior_tasks) == 1 else 's'}"
    return Answer(question, f"{join_names(nearest)} (mean rank {number(first)} at the test rows of {where}).")


def _cost(found: Overall, evidence: Evidence) -> Answer:
    named = [m for m in (found.baseline, *found.not_worse_than_best) if m is not None and m in evidence.seconds]
    if not named:
        return Answer("Cost", "not recorded.")
    order = sorted(dict.fromkeys(named), key=lambda m: evidence.seconds[m])
    times = [f"{m} {in_seconds(evidence.seconds[m])}" for m in order]
    bound = "" if evidence.exclusive else " Other jobs ran at the same time: upper bounds."
    return Answer("Cost", f"{join_names(times, most=5)}, to fit, tune and predict all tasks.{bound}")


def _metric(found: Overall) -> str:
    return f"{mean_of(found.metric.label)} {found.scope}".strip()


def _gain(found: Overall, difference: Interval) -> str:
    """Return a difference from the baseline in words, such as "0.12 ± 0.03 nats lower than that of map"."""
    word = "lower" if difference.mean < 0 else "higher"
    size = replace(difference, mean=abs(difference.mean))
    return f"{' '.join(mean_and_half_width(size)).strip()}{found.unit} {word} than that of {found.baseline}"
