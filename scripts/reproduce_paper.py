"""Moved to studies/reproduce_paper.py."""

raise SystemExit("error: scripts/reproduce_paper.py is now studies/reproduce_paper.py.")
