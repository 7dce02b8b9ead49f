"""docs/verification.md, as the whole verification suite writes it: cases, and networks with difficult derivatives."""

import base64
import itertools
import pickle

from cases import all_cases
from trust_routes import LIKELIHOODS, ROUTES, builders

from bdl_bench.verify.table import to_markdown
from bdl_bench.verify.verification import Verification
from estimators.persistence.atomic import write_text

SECTION = "## Networks with difficult derivatives"


_PROPERTY = "finding for the verification page"


class Page:
    """What the tests of a session found: verifications by case, and outcomes by network, route and likelihood."""

    def __init__(self):
        self.verifications, self.outcomes = {}, {}

    def add(self, key, finding):
        (self.verifications if isinstance(finding, Verification) else self.outcomes)[key] = finding

    def sort(self, order):
        """In the order of a list of keys: tests that several processes share end in another one."""
        ranks = {key: rank for rank, key in enumerate(order)}
        for findings in (self.verifications, self.outcomes):
            for key in sorted(findings, key=ranks.__getitem__):
                findings[key] = findings.pop(key)

    def write(self, path):
        """Each of the two parts if it is new, else as it was."""
        before, _, after = (path.read_text() if path.exists() else "").partition(SECTION)
        if self.verifications:
            before = (
                to_markdown(list(self.verifications.values()), title="Verification: RegVar against the dense reference")
                + "\n"
            )
        write_text(
            path, before.rstrip() + "\n\n" + (self._networks() if self.outcomes else SECTION + after if after else "")
        )

    def _networks(self):
        entries = {}
        for (name, route, _), outcome in self.outcomes.items():
            entries.setdefault((name, route), []).append(outcome)
        names, routes = (dict.fromkeys(key[i] for key in entries) for i in (0, 1))
        lines = [SECTION, "", _LEGEND, "", _line(["network", *routes]), _line(["---"] * (len(routes) + 1))]
        for name in names:
            lines.append(_line([name, *(_worst(entries.get((name, route), [])) for route in routes)]))
        return "\n".join(lines) + "\n"


class PageWriter:
    """A plugin of the process that reports: collects what the tests of all processes recorded, and writes the page."""

    def __init__(self, path):
        self.path, self.page = path, Page()

    def pytest_runtest_logreport(self, report):
        if report.when == "teardown":  # the properties of a test are in each of its reports
            for name, value in report.user_properties:
                if name == _PROPERTY:
                    self.page.add(*pickle.loads(base64.b64decode(value)))

    def pytest_sessionfinish(self):
        if self.page.verifications or self.page.outcomes:
            self.page.sort([*(str(case) for case in all_cases()), *itertools.product(builders(), ROUTES, LIKELIHOODS)])
            self.page.write(self.path)


def recorder(record_property):
    """The function (key, finding) that adds a finding to the properties of a test, as text that processes exchange."""
    return lambda key, finding: record_property(_PROPERTY, base64.b64encode(pickle.dumps((key, finding))).decode())


_LEGEND = """Small networks whose derivatives are hard to get right (tests/trust_networks), and every route to their
variances, against plain `backward` on the module itself, one output at a time, in float64. Each entry is the larger of
regression and classification: the largest difference over the largest variance, or the typed error that was raised.
*draws* and *samples* have 1,000 draws, and five standard errors are 0.22; *bounds*: how far the reference is outside;
*refit*: central differences at λ = 1e-4."""


def _line(entries):
    return "| " + " | ".join(entries) + " |"


def _worst(outcomes):
    """The larger error; else the name of what was raised."""
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    raised = sorted({str(outcome) for outcome in outcomes if outcome.error is None})
    return ", ".join([f"{error:.1e}" for error in sorted(errors)[-1:]] + raised) or "–"
