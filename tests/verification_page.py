"""docs/verification.md, as the whole verification suite writes it: cases, and networks with difficult derivatives."""

from bdl_bench.verify.table import to_markdown
from estimators.persistence.atomic import write_text

SECTION = "## Networks with difficult derivatives"


class Page:
    """What the tests of a session found: verifications, and outcomes by network and route."""

    def __init__(self):
        self.verifications, self.outcomes = [], {}

    def write(self, path):
        """Each of the two parts if it is new, else as it was."""
        before, _, after = (path.read_text() if path.exists() else "").partition(SECTION)
        if self.verifications:
            before = to_markdown(self.verifications, title="Verification: RegVar against the dense reference") + "\n"
        write_text(
            path, before.rstrip() + "\n\n" + (self._networks() if self.outcomes else SECTION + after if after else "")
        )

    def _networks(self):
        routes = list(dict.fromkeys(route for _, route in self.outcomes))
        lines = [SECTION, "", _LEGEND, "", _line(["network", *routes]), _line(["---"] * (len(routes) + 1))]
        for name in dict.fromkeys(name for name, _ in self.outcomes):
            lines.append(_line([name, *(_worst(self.outcomes.get((name, route), [])) for route in routes)]))
        return "\n".join(lines) + "\n"


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
