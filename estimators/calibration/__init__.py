"""Calibration of stored predictions on validation rows, and the record of what was tried. No refits here."""
