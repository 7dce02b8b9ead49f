"""Verification: RegVar as λ → 0 against a dense reference that shares no code with the library."""
