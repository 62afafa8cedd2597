"""The report: which system is better, by how much, and whether the difference is real.

`build.build` writes `reports/<suite>/index.html`, `leaderboard.md` and `leaderboard.json`; `results_page` writes
`docs/results.md` and the table in the README. The same input files give the same bytes.
"""
