# demo, test, bench, lint: each builds what it needs first.
