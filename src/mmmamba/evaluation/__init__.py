"""Evaluation by generation: suites of questions, scoring rules, and reports."""
