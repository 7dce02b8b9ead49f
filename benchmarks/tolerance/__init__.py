"""The measured error of RegVar's default solver, compared with the exact variance."""
