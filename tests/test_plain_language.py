"""Code, templates and docs use the terms of the field: a table of retired words, each with its standard term."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".md", ".j2", ".html", ".js", ".css", ".toml", ".ini", ".yml", ".yaml", ".cff"}
SEARCHED = (
    "estimators",
    "bdl_bench",
    "benchmarks",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
)
OLD_VERSION = "## [0.1"
"""The changelog is searched down to this heading: what older versions were called is history."""

EXEMPT: tuple[str, ...] = ()
"""Files and folders that are not rewritten yet. Only ever shortened."""


@dataclass(frozen=True)
class Retired:
    """A retired word and the standard term for it.

    Words are found within snake_case names too. `unless` is a pattern around the word in which it is a standard term.
    """

    pattern: str
    write: str
    unless: str | None = None

    def found_in(self, line: str) -> list[str]:
        """Return the occurrences in a line that no standard use covers."""
        allowed = [match.span() for match in re.finditer(self.unless, line)] if self.unless else []
        return [
            match.group()
            for match in re.finditer(rf"(?<![A-Za-z])(?:{self.pattern})(?![a-z])", line)
            if not any(start <= match.start() and match.end() <= end for start, end in allowed)
        ]


RETIRED = (
    # Rules
    Retired("[Rr]efus(?:e|es|ed|al|als|ing)", "raise, reject or check"),
    Retired("[Ss]urest", "most confident"),
    Retired("(?:[Tt]old|[Tt]ell|[Tt]ells|[Tt]elling) apart", "significantly different; distinguish"),
    Retired("[Oo]ne's own|[Ss]omebody else's", "your own, or custom"),
    Retired(
        "(?:once|twice|times|rows|bytes|seconds|number|value|one|each|several|passes|products?|steps|panel|line|vector|"
        "class|targets?|labels?|index|output|A) "
        "a (?:row|draw|method|sample|step|epoch|batch|query|vector|class|sequence)",
        "per row, per step, per method",
    ),
    Retired("too (?:un)?sure|unsure|surer", "overconfident, underconfident"),
    Retired("[Ll]ikewise", "a sentence that names its subject"),
    Retired("[Bb]y (?:itself|themselves)", "alone, or a sentence that names its subject"),
    Retired("[Gg]oes on|[Gg]o on|[Gg]oing on|[Ww]ent on|GoOn|go_on", "continues; should_continue"),
    # The objective, solvers and variances of RegVar
    Retired("[Ee]nergy[ _]errors?|EnergyError", "A-norm error, a_norm_error"),
    Retired("far from (?:its|their) end", "not converged"),
    Retired("[Ee]xact[ _]blocks?|ExactBlock", "Rao-Blackwellisation, rao_blackwell"),
    Retired(
        "[Pp]laces?|at_places",
        "position (token, pixel), index, location, training job, or interpolation weight",
        unless=r"in[ _-]places?|inplace|decimal places?|takes? (?:the )?place",
    ),
    Retired("[Tt]ilt(?:s|ed|ing)?|TiltedLabels", "LinearPerturbation, GradientCorrectedLoss"),
    Retired("[Pp]oses?|[Pp]osed", "build_problem"),
    Retired("[Rr]eadouts?|DrawReadout|BoundedReadout|ClampedReadout", "variance estimate"),
    Retired("[Aa]rms?", "perturbed copies"),
    Retired("Replicas|batch_replicas|at_once", "PerturbedCopies, vmap_chunk_size"),
    Retired("[Ff]lights?|in_flight|Landed|landed", "sample batches, max_concurrent", unless="[Pp]re-flight"),
    Retired("(?:blown|blows?|blew)[ _]up", "diverged, diverges"),
    Retired("[Ww]atch(?:es|ed|ing|ers?)?", "callback, side effects, or monitor"),
    Retired("[Bb]end(?:s|ing)?|[Bb]ent|[Dd]epartures?|straightest", "nonlinearity, nonlinearity ratio"),
    Retired("[Tt]ilted|SelfTargets", "SelfTargetLoss"),
    # Runtime, data, persistence
    Retired("[Tt]eams?", "process group"),
    Retired("[Ll]edgers?", "pass counter"),
    Retired("row_digests|[Ff]ingerprints?|_fingerprint", "checksum, row_hashes, weight_checksum"),
    Retired("[Ww]iden(?:s|ed|ing)?|_Wide", "convert to float64, to_float64"),
    Retired("[Ff]ree[ _]?[Bb]atches|FreeBatches", "unlabelled data"),
    # Curvature and models
    Retired("with_pieces|[Pp]ieces?", "params, functional_call; part"),
    Retired("Head|FullHead|KronHead|DiagHead|HeadPrecision", "LastLayer"),
    Retired("[Hh]eard|[Ll]istening|[Ll]istens?", "FeatureHook, capture_features"),
    Retired("RowFactors|LinearUse|UseRecorder|used_once", "JacobianFactors, LinearCall, no_weight_sharing"),
    Retired("[Ss]treamed|StreamedDual|StreamedRows", "matrix-free dual"),
    Retired("RowsInFactors", "FactoredCurvature"),
    Retired("Refittable|Storable|_learned|_restore", "clone_with, _get_fit_state, _set_fit_state"),
    # Training, tuning and testing
    Retired("for_rows|Enough|own_loop|TwoNetworks", "resolve, stop criterion, manual_training, RegularizedPair"),
    Retired("Axis|Surface", "TunedOption, ScoreGrid"),
    Retired("[Ll]aws?", "invariants", unless="[Pp]ower laws?|[Ll]aws? of (?:total|large)"),
    Retired("[Cc]laim(?:s|ed|ing)?", "capabilities, file locks; states"),
    # Running a comparison
    Retired(
        "[Cc]ells?",
        "evaluation job (in the report: run)",
        unless=r"(?:[Tt]able|[Nn]otebook|[Cc]losure) cells?|cell_contents|rows?(?:\[0\])?\.cells",  # of the DOM
    ),
    Retired("Prepared|Stages", "TrainedModel, GridRun"),
    Retired("[Dd]eaths?|[Dd]ied|[Dd]ies|[Cc]rew|_Crew|[Hh]ire[sd]?|[Dd]ismiss(?:es|ed)?", "worker errors, pool"),
    Retired("[Oo]utlooks?", "ETA"),
    Retired("[Ff]ootprints?|rise above (?:its|their) start", "peak memory, increase in resident memory"),
    # Verification and statistics
    Retired("[Pp]roofs?|[Pp]rov(?:e|es|ed|en|ing)", "verification, verify, show"),
    Retired("[Ll]adders?|[Cc]limb(?:s|ed|ing)?|[Rr]ungs?", "λ sweep, step"),
    Retired("[Zz]oos?", "test problems"),
    Retired("[Pp]olish(?:es|ed|ing)?", "converged, refine"),
    Retired("[Cc]overing", "pairwise cover"),
    Retired("[Bb]est[ _]groups?", "not significantly worse than the best"),
    Retired("(?:in)?distinguishabl[ey]", "significantly different; no significant difference"),
    # Headings of the report
    Retired("[Aa]s fitted", "untuned"),
    Retired("Between the data", "Predictive bands"),
    Retired("Before the run", "Pre-flight diagnostics"),
    Retired("Output by output", "Per-output comparison"),
    Retired("Predictions of the test rows", "Test metrics"),
    Retired("Quality against cost", "Accuracy–cost trade-off"),
    Retired("Risk and coverage", "Selective prediction"),
    Retired("Under shift", "Distribution shift"),
    # Options and methods of the command line
    Retired("(?<!-)--limit", "--timeout"),
    Retired("(?<!-)--points", "--n-queries"),
    Retired("(?<!-)--only", "--select"),
    Retired("(?<!-)--data(?![-_])", "--data-dir"),
    Retired("(?<!-)--tune(?![-_])", "--tune-budget"),
    Retired("regvar-(?:krylov|draws|mean-absolute(?:-refit)?|probes)", "regvar, regvar-finetune, regvar-amortized"),
    Retired("multi-head", "multihead-ensemble", unless="[Mm]ulti-head (?:self-)?attention"),
    Retired("map-temperature", "temperature-scaling"),
    Retired("last-layer-kron", "last-layer-laplace-kron"),
)


ANY = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(f'(?:{retired.pattern})' for retired in RETIRED)})(?![a-z])")
"""One search that tells lines without any retired word, which are nearly all, from the others."""


@dataclass(frozen=True)
class Occurrence:
    """A retired word in a line of a file."""

    path: str
    number: int
    word: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.word!r}: write {self.write}"


def occurrences(path: str, text: str) -> Iterator[Occurrence]:
    """Yield every retired word of a text."""
    for number, line in enumerate(text.splitlines(), start=1):
        if path == "CHANGELOG.md":
            if line.startswith(OLD_VERSION):
                return
            line = without_first_cell(line)
        for retired in RETIRED if ANY.search(line) else ():
            for word in retired.found_in(line):
                yield Occurrence(path, number, word, retired.write)


def without_first_cell(line: str) -> str:
    """Return a row of the migration table without its first column, the old names; any other line as it is."""
    return "|".join(line.split("|")[2:]) if line.startswith("|") else line


def files(name: str) -> list[Path]:
    """Return the searched files of a file or folder, without generated records and pages."""
    root = ROOT / name
    found = [root] if root.is_file() else sorted(root.rglob("*"))
    return [path for path in found if path.suffix in SUFFIXES and path.is_file()]


def is_exempt(path: str) -> bool:
    """Return whether a file lies in a part that is not rewritten yet."""
    return any(path == part or path.startswith(f"{part}/") for part in EXEMPT)


def occurrences_in(name: str) -> list[Occurrence]:
    """Return every retired word in a file or folder, those of exempt parts included."""
    texts = ((path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files(name))
    return [found for path, text in texts for found in occurrences(path, text)]


@pytest.mark.parametrize("name", SEARCHED)
def test_no_retired_word(name: str):
    found = [str(occurrence) for occurrence in occurrences_in(name) if not is_exempt(occurrence.path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", SEARCHED)
def test_searched_and_exempt_parts_exist(name: str):
    assert files(name)
    assert all((ROOT / part).exists() for part in EXEMPT)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("def refuse_if_changed(cell):", ["refuse", "cell"]),
        ("class BoundedReadout(Readout):", ["BoundedReadout", "Readout"]),
        ("The energy error of the proof, once a row.", ["once a row", "energy error", "proof"]),
        ("bdl-bench compare --limit 3 --data folder", ["--limit", "--data"]),
        ("--data-dir folder --tune-budget 3", []),
        ("const cell = row.cells[0]; table.tHead.rows[0].cells", ["cell"]),
        ("x.add_(1)  # in place, of a table cell; the power law", []),
        ("replace, cellular, alarm, steam, harms", []),
        ("The energy of HMC; pre-flight diagnostics; multi-head attention", []),
    ],
)
def test_planted_words(line: str, words: list[str]):
    assert sorted(found.word for found in occurrences("docs/page.md", line)) == sorted(words)


def test_old_names_stand_in_the_migration_table_and_in_old_versions_only():
    table = "| `--limit` | `--timeout` |\n"
    assert not list(occurrences("CHANGELOG.md", table))
    assert [found.word for found in occurrences("CHANGELOG.md", "| new | a zoo |\n")] == ["zoo"]
    assert not list(occurrences("CHANGELOG.md", "## [0.1.0]\na zoo\n"))
    assert len(list(occurrences("README.md", table))) == 1


def test_messages_name_the_standard_term():
    (found,) = occurrences("README.md", "the zoo")
    assert str(found) == "README.md:1: 'zoo': write test problems"
