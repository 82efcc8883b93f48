"""Speed against the peers: both sides in one process, on the same input, taking turns.

    python -m benchmarks [NAME...] [--out FILE.json] [--repeats N]

A family of lines a file (`matrices`, `races`, `files`); `contest` runs and judges them.
"""
