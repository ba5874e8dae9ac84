"""The frozen model seen through a few facts. Knowledge of an architecture lives here and in ``engine``."""
