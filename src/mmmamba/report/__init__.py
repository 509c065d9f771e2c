"""What every report is built from: tables, numbers, HTML, plots, marked blocks in pages, and the environment.

Nothing here knows what is reported. Evaluation, benchmark, ablation and the demo import
this package, never the reverse.
"""
