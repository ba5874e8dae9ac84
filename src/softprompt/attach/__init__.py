"""The HF-style module users hold: named prompts on one frozen model, reversible."""
