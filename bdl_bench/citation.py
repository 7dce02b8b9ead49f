"""How to cite the method and the software, as BibTeX. CITATION.cff has the same entries."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["bibtex", "software_version"]


def software_version() -> str:
    """Return the version of the installed package; "unknown" for a source tree that is not installed."""
    try:
        return version("bdl-bench")
    except PackageNotFoundError:
        return "unknown"


def bibtex() -> str:
    """Return the entries of the paper whose method this is, and of the software in its installed version."""
    return _ENTRIES.replace("VERSION", software_version())


_ENTRIES = """\
@inproceedings{mcinerney2025variation,
  title     = {Variation Due to Regularization Tractably Recovers {Bayesian} Deep Learning Uncertainty},
  author    = {McInerney, James and Kallus, Nathan},
  booktitle = {Proceedings of the 28th International Conference on Artificial Intelligence and Statistics},
  series    = {Proceedings of Machine Learning Research},
  volume    = {258},
  pages     = {2494--2502},
  year      = {2025},
  publisher = {PMLR},
  url       = {https://proceedings.mlr.press/v258/mcinerney25a.html}
}

@software{bdlbench,
  title   = {bdl-bench: predictive variance of trained {PyTorch} networks, and a comparison of methods},
  author  = {{The bdl-bench authors}},
  version = {VERSION},
  license = {MIT}
}
"""
