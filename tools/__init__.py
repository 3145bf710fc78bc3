"""What looks at the scripts. `python -m tools.compare`, and likewise plot, bench, memory, flags."""
