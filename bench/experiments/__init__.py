"""What the papers claim, tried: one command each, `python -m bench.experiments.<name>`; tables and pictures in bench/results/experiments/."""
