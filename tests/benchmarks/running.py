"""Runs a benchmark as from the command line, and reads what it wrote."""

import csv
import sys


def run(monkeypatch, module, arguments=""):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    module.main()


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
