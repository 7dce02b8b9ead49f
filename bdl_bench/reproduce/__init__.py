"""Published comparisons, run again by the same protocol and printed beside the published numbers."""

from bdl_bench.reproduce.page import page
from bdl_bench.reproduce.published import Published
from bdl_bench.reproduce.studies import STUDIES, Column, Study, StudyTask, study_named

__all__ = ["STUDIES", "Column", "Published", "Study", "StudyTask", "page", "study_named"]
