"""Networks with difficult derivatives: every route gives the variance by plain autograd, or a typed error.

By default every network is fitted by the default estimator and some by RegVar; every route and likelihood with
`-m verification`.
"""

import itertools

import pytest
from trust_networks import BUILDERS
from trust_routes import DEFAULTS, LIKELIHOODS, ROUTES, Outcome, builders, run
from verification_page import Page

NAMES = list(builders())
THIN = [(name, LIKELIHOODS[i % 2], "laplace") for i, name in enumerate(NAMES)] + [
    (name, LIKELIHOODS[i // 4 % 2], "pointwise") for i, name in enumerate(NAMES) if i % 4 == 0
]


@pytest.mark.parametrize(("name", "likelihood", "route"), THIN)
def test_the_default_routes_are_right_or_raise_a_typed_error(name, likelihood, route):
    _, failures = run(name, likelihood, ROUTES[route])
    assert failures == []


@pytest.mark.verification
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_route_is_right_or_raises_a_typed_error(name, likelihood, route, page):
    outcome, failures = run(name, likelihood, ROUTES[route])
    page((name, route, likelihood), outcome)
    assert failures == []


def test_the_networks_are_many_and_of_every_kind():
    cases = [BUILDERS[name]() for name in BUILDERS]
    assert len(cases) >= 60
    assert {case.expects for case in cases} == {"answer", "raise", "answer or raise"}
    assert len({case.kind for case in cases}) == 10
    assert all(len(case.batches) == 3 for case in cases)
    assert set(DEFAULTS) <= set(ROUTES)


def test_the_page_has_a_section_of_networks_and_keeps_the_rest(tmp_path):
    page, path = Page(), tmp_path / "page.md"
    path.write_text("# Verifications\n\n| a |\n")
    page.add(("other", "last layer", "regression"), Outcome(0.5))
    page.add(("net", "last layer", "regression"), Outcome(None, raised="NoLastLayerError: no | last layer"))
    page.add(("net", "laplace", "regression"), Outcome(1e-9))
    page.add(("net", "laplace", "classification"), Outcome(3e-9))
    page.add(("other", "laplace", "regression"), Outcome(None, raw="RuntimeError: shapes"))
    page.add(("other", "laplace", "classification"), Outcome(0.5))
    page.sort(list(itertools.product(("net", "other"), ("laplace", "last layer"), ("regression", "classification"))))
    for _ in range(2):
        page.write(path)
    text = path.read_text()
    assert text.startswith("# Verifications\n\n| a |\n")
    assert text.count("## Networks with difficult derivatives") == 1
    assert "| network | laplace | last layer |" in text
    assert text.index("| net |") < text.index("| other |")
    assert "| net | 3.0e-09 | NoLastLayerError |" in text
    assert "| other | 5.0e-01, raw RuntimeError | 5.0e-01 |" in text
