"""
What looks at the scripts; to be started in the folder above this one.

    python -m tools.compare    all scripts on the same budget, compared in pairs
    python -m tools.gradients  the expected gradient of each script, and that of its objective
    python -m tools.plot       curves of runs; a wrong answer of prime.py, token by token
    python -m tools.bench      the speed, beside TRL
    python -m tools.memory     what fits on a GPU
    python -m tools.flags      writes docs/flags.md
"""
