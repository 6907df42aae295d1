"""Runs as a person reads them: tables on the terminal, and one page with curves and pictures."""
