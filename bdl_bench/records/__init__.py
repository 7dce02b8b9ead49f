"""Records of runs: what is written, and when it is still valid."""

from bdl_bench.records.record import Cost, Record, RecordStore, Training, Tuning

__all__ = ["Cost", "Record", "RecordStore", "Training", "Tuning"]
