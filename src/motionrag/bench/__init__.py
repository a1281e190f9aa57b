"""Benchmarks: one function in one file each, chosen by `conf/bench/NAME.yaml`.

A benchmark returns {"summary": one line, "title": str, "rows": [{column: value}], ...}; `motionrag bench NAME` prints
the rows as a table and keeps everything in results.json.
"""
